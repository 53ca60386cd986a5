"""Ranks under torchrun: signals, deaths and restarts, two machines, and agreement."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from olmoe.errors import ConfigError, UserError
from olmoe.train import loop
from olmoe.train.config import load_config
from olmoe.train.ranks import ALONE, Ranks, _among_the_living, join_ranks
from ports import kept_port
from rank_processes import ends_on_ranks, error_of, on_ranks, rank_environment, train_run
from sentences import refused
from training_runs import fixed, read_metrics, write_run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LIMIT = 120


def write(folder: Path, tokenizer: Path, steps: int) -> Path:
    return write_run(
        folder / "run",
        tokenizer,
        batch={"sequences": 2, "accumulation": 1},
        schedule={"total_tokens": steps * 32, "warmup_tokens": 32},
        evaluation={"every_steps": 1000},
        checkpoint={"every_steps": 5, "keep": 100},
    )


@pytest.fixture
def meeting():
    """Options of torchrun for where its processes meet."""
    with kept_port() as port:
        yield "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"


def start(path: Path, *options: str, ranks: int = 2, before: tuple[str, ...] = ()):
    """`torchrun ... -m olmoe train`, in a session of its own."""
    command = [*before, *TORCHRUN, "--nproc-per-node", str(ranks), *options]
    command += ["-m", "olmoe", "train", str(path), "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def end(process) -> None:
    if process.poll() is None:
        for pid in [process.pid, *workers(process)]:  # each in a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def workers(process) -> list[int]:
    """The processes that torchrun started, by rank."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        ranks = [v for v in variables if v.startswith(b"RANK=")]
        if int(parent) == process.pid and ranks:
            found[int(ranks[0][5:])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until(condition) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_checkpoint(output: Path) -> bool:
    return (output / "checkpoints").is_dir() and any((output / "checkpoints").glob("step-*"))


def sentences_of(stderr: str) -> list[str]:
    """olmoe's own messages among torchrun's."""
    return [line for line in stderr.split("\n") if line.startswith("olmoe: ")]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
@pytest.mark.slow
def test_a_killed_rank_ends_the_job_with_one_sentence_and_torchrun_restarts_it(tmp_path, tokenizer_file, meeting):
    path = write(tmp_path, tokenizer_file, 120)
    output = path.parent / "out"
    process = start(path, *meeting)
    try:
        wait_for(lambda: has_checkpoint(output), process)
        os.kill(workers(process)[1], signal.SIGKILL)
        out, err = process.communicate(timeout=LIMIT)
    finally:
        end(process)
    assert process.returncode == 1, err
    assert out == ""
    assert len(sentences_of(err)) == 1, err
    (told,) = sentences_of(err)
    assert told.startswith("olmoe: Another of the 2 processes has ended (")
    assert "; continue it from step-" in told
    assert "Traceback" not in "".join(line for line in err.split("\n") if "olmoe" in line)
    # torchrun restarts all ranks, which find the checkpoint by themselves.
    shutil.rmtree(output)
    process = start(path, *meeting, "--max-restarts", "3")
    try:
        wait_for(lambda: has_checkpoint(output), process)
        os.kill(workers(process)[0], signal.SIGKILL)
        out, err = process.communicate(timeout=LIMIT)
    finally:
        end(process)
    assert process.returncode == 0, err
    assert out == f"{output / 'best'}\n"
    whole = write(tmp_path / "whole", tokenizer_file, 120)
    on_ranks(2, train_run, whole)
    expected = [fixed(r) for r in read_metrics(whole.parent / "out")]
    assert [fixed(r) for r in read_metrics(output)] == expected


@pytest.mark.slow
def test_sigterm_to_torchrun_lets_all_ranks_save_and_leave(tmp_path, tokenizer_file, meeting):
    path = write(tmp_path, tokenizer_file, 100_000)
    output = path.parent / "out"
    process = start(path, *meeting)
    try:
        wait_for(lambda: has_checkpoint(output), process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT)
    finally:
        end(process)
    told = [line for line in sentences_of(err) if "interrupted; saved" in line]
    assert len(told) == 1
    assert "torchrun ... -m olmoe train" in told[0]
    last = read_metrics(output)[-1]["step"]
    assert sorted(p.name for p in (output / "checkpoints").iterdir())[-1] == f"step-{last:07d}"


@pytest.mark.slow
def test_two_machines_train_as_one(tmp_path, tokenizer_file):
    """Two nodes, each in a network namespace of its own, joined by a pair of virtual interfaces."""
    names = [f"olmoe{os.getpid()}{letter}" for letter in "ab"]
    commands = [
        f"ip netns add {names[0]}", f"ip netns add {names[1]}",
        f"ip link add v{names[0][5:]} netns {names[0]} type veth peer name v{names[1][5:]} netns {names[1]}",
    ]  # fmt: skip
    for number, name in enumerate(names, start=1):
        device = f"v{name[5:]}"
        commands += [
            f"ip -n {name} addr add 10.77.0.{number}/24 dev {device}", f"ip -n {name} link set {device} up",
            f"ip -n {name} link set lo up",
        ]  # fmt: skip
    processes = []
    try:
        for command in commands:
            try:
                done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("there is no ip command")
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted: {done.stderr.strip()}")
        path = write(tmp_path, tokenizer_file, 6)
        for number, name in enumerate(names):
            node = (
                "--nnodes", "2", "--node-rank", str(number), "--master-addr", "10.77.0.1", "--master-port", "29511",
            )  # fmt: skip
            inside = ("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME=v{name[5:]}")
            processes.append(start(path, *node, ranks=1, before=inside))
        outputs = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            end(process)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [out for out, _ in outputs] == [f"{path.parent / 'out' / 'best'}\n", ""]
    whole = write(tmp_path / "whole", tokenizer_file, 6)
    on_ranks(2, train_run, whole)
    expected = [fixed(r) for r in read_metrics(whole.parent / "out")]
    assert [fixed(r) for r in read_metrics(path.parent / "out")] == expected


# ---- agreement ----


def agree() -> dict:
    with join_ranks("cpu") as ranks:

        def one_fails() -> int:
            if ranks.rank == 1:
                raise ConfigError("rank 1 is wrong")
            return ranks.rank

        return {
            "who": (ranks.rank, ranks.size, ranks.is_first),
            "sum": ranks.sum(torch.tensor([1.0, float(ranks.rank)])).tolist(),
            "any": ranks.any(ranks.rank == 1, False),
            "first": ranks.on_first(lambda: f"from {ranks.rank}"),
            "all": ranks.on_all(lambda: ranks.rank),
            "error on first": error_of(ranks.on_first, lambda: 1 // 0 if ranks.rank else one_more()),
            "error on one": error_of(ranks.on_all, one_fails),
            "turn": ranks.first_in_turn(lambda: ranks.rank),
            "error in turn": error_of(ranks.first_in_turn, one_more),
        }


def one_more() -> None:
    raise UserError("the first is wrong")


def test_ranks_agree_and_one_rank_reports_a_mistake():
    found = on_ranks(2, agree)
    assert [f["who"] for f in found] == [(0, 2, True), (1, 2, False)]
    assert [f["sum"] for f in found] == [[2.0, 1.0]] * 2
    assert [f["any"] for f in found] == [[True, False]] * 2
    assert [f["first"] for f in found] == ["from 0"] * 2
    assert [f["all"] for f in found] == [f["turn"] for f in found] == [0, 1]
    told = "the first is wrong"
    assert [f["error on first"] for f in found] == [("UserError", told), ("ToldByAnother", told)]
    assert [f["error in turn"] for f in found] == [("UserError", told), ("ToldByAnother", told)]
    told = "rank 1 is wrong"
    assert [f["error on one"] for f in found] == [("ToldByAnother", told), ("ConfigError", told)]


def test_a_single_process_needs_no_process_group():
    with join_ranks("cpu") as ranks:
        assert ranks is ALONE
        assert not torch.distributed.is_initialized()
    assert ALONE.any(True, False) == [True, False]
    with join_ranks("cpu", group_of_one=True) as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()


def meet(port: int, late: int, attempt: int) -> tuple[list[float], bool, bool]:
    """Ranks that meet through torchrun's store at this port; one of them comes late."""
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if int(os.environ["RANK"]) == late:
        time.sleep(0.5)
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    with join_ranks("cpu") as ranks:

        def turn() -> bool:
            """Whether the first has had its turn."""
            if ranks.is_first:
                time.sleep(0.2)  # one that does not wait would come before
                store.set(f"turn of the first/{attempt}", "over")
            return store.check([f"turn of the first/{attempt}"])

        in_turn = ranks.first_in_turn(turn)
        return ranks.sum(torch.ones(1)).tolist(), in_turn, ranks._is_first_to_tell(f"that of rank {ranks.rank}")


@pytest.mark.parametrize("late", [0, 1])
def test_restarted_ranks_do_not_see_stale_entries_in_torchruns_store(late):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in range(2):
        assert on_ranks(2, meet, store.port, late, attempt) == [([2.0], True, True)] * 2


def test_the_first_rank_waits_for_living_ranks():
    store = HashStore()
    store.set("olmoe/word/1", "of one that was killed before it had an answer")
    store.set("olmoe/word/2", "of another")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(_among_the_living, store, 0, 3)
        second = pool.submit(_among_the_living, store, 2, 3)
        second.result(LIMIT).set("from", "rank 2")
        assert not first.done()
        third = pool.submit(_among_the_living, store, 1, 3)
        assert [met.result(LIMIT).get("from") for met in (first, third)] == [b"rank 2"] * 2


def test_a_missing_rank_is_named():
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 has not come"):
        _among_the_living(store, 0, 2)


def test_a_waiting_rank_tells_which_ranks_it_waits_for(monkeypatch, caplog):
    """It was silent for half an hour, until the store's time was over."""
    monkeypatch.setattr("olmoe.train.ranks._TELL_SECONDS", 0.05)
    store = HashStore()
    store.set_timeout(timedelta(seconds=LIMIT))

    def told(sentence: str) -> bool:
        return any(sentence in message for message in caplog.messages)

    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(_among_the_living, store, 1, 3)
        wait_until(lambda: told("rank 1 of 3 waits for rank 0 (2 min so far)"))
        first = pool.submit(_among_the_living, store, 0, 3)
        wait_until(lambda: told("waiting for rank 2 of 3 processes"))
        third = pool.submit(_among_the_living, store, 2, 3)
        for met in (first, second, third):
            met.result(LIMIT)
    sentences = len(caplog.messages)
    time.sleep(0.2)
    assert len(caplog.messages) == sentences  # nobody waits any more


def test_a_failing_rank_reports_why_despite_torchruns_sigterm():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(UserError, match="wrong"), Ranks(0, 2).guarded(lambda: "go on"):
        raise UserError("it is wrong")
    try:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)  # passes
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_an_invalid_torchrun_environment_is_reported_in_one_sentence(monkeypatch):
    for name, value in rank_environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR")

    def join() -> None:
        with join_ranks("cpu"):
            pass

    assert "MASTER_ADDR" in refused(join, ConfigError)


def test_a_split_for_more_processes_says_how_to_start_them(tmp_path, tokenizer_file):
    path = write_run(tmp_path, tokenizer_file, parallel={"data": 2})
    message = refused(lambda: train_run(path), ConfigError)
    assert "torchrun --nproc-per-node 2 -m olmoe train" in message
    assert load_config(path).parallel.data == 2


def fail_in_the_middle(path: Path, error: str) -> None:
    """Train until something happens to rank 1 alone."""
    original = loop.train_step

    def train_step(*arguments, **options):
        if os.environ["RANK"] == "1" and arguments[5] > 0:
            raise {"disk": OSError(errno.ENOSPC, "No space left on device"), "mistake": UserError("it is wrong")}[error]
        return original(*arguments, **options)

    loop.train_step = train_step
    train_run(path)


@pytest.mark.parametrize("error", ["disk", "mistake"])
def test_an_error_on_one_rank_is_reported_by_that_rank_alone(tmp_path, tokenizer_file, error):
    path = write(tmp_path, tokenizer_file, 6)
    kind = {"disk": "OSError", "mistake": "UserError"}[error]
    assert ends_on_ranks(tmp_path, 2, fail_in_the_middle, path, error) == ["_LossToldByAnother", kind]
