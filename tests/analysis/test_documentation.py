"""docs/analysis.md: its blocks run as they stand there, its table is the schema, its numbers are the committed ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from olmoe.analysis.report import findings
from olmoe.cli.main import _parse, main
from olmoe.io.hub import SHIPPED

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = (DOCS / "analysis.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
NUMBERS = json.loads((DOCS / "reports" / "olmoe-tiny.json").read_text(encoding="utf-8"))
FOUND = " ".join(SECTIONS["What olmoe-tiny does"].split())

pytestmark = pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there")


# ---- blocks ----


def test_blocks(tmp_path, monkeypatch, capsys):
    """In their order, each in the folder that those before it left. What names a hub id is parsed alone."""
    pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples" / "text", "examples/text")
    Path("configs").mkdir()
    config = (ROOT / "configs" / "quick.toml").read_text(encoding="utf-8")
    for old, new in (("122_880", "20_480"), ("20_480\n\n", "2_048\n\n"), ("every_steps = 60", "every_steps = 10")):
        assert old in config
        config = config.replace(old, new)
    Path("configs/quick.toml").write_text(config, encoding="utf-8")  # a sixth of the run
    Path("stories.txt").write_text("Once upon a time there was a little girl.\n" * 40, encoding="utf-8")
    Path("code.txt").write_text("def add(a, b):\n    return a + b\n\n" * 40, encoding="utf-8")
    Path("law.jsonl").write_text(json.dumps({"text": "The lessor shall pay the lessee. " * 9}), encoding="utf-8")
    namespace: dict[str, object] = {}
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code, "analysis.md", "exec"), namespace)
            continue
        for command in code.splitlines():
            words = shlex.split(command)
            assert words[0] == "olmoe"
            if "allenai/OLMoE-1B-7B-0924" in words:
                assert _parse(words[1:]).revisions == ["step5000-tokens20B", "step490000-tokens2055B"]
            else:
                assert main([*words[1:], "--quiet"]) == 0, capsys.readouterr().err
    written = {path.name for path in Path("packed").iterdir()}
    table = re.findall(r"^\| `([^|]+)` \|", PAGE.split("## ")[0], flags=re.MULTILINE)
    assert {"report.html", "metrics.json", "trace.safetensors", "against.safetensors"} < set(table)
    assert {name for name in table if "*" not in name} < written
    assert {"figure-load.png", "figure-load.svg", "figure-before-after.svg"} < written
    training = json.loads(Path("training/metrics.json").read_text(encoding="utf-8"))
    assert [each["step"] for each in training["revisions"]] == [10]
    assert training["model"] == "step-0000020"
    layers, top = namespace["trace"].expert_ids[0].shape
    assert (layers, top) == (4, 8)
    assert namespace["together"].shape == namespace["theirs"].shape == (4, 64, 64)
    assert len(namespace["found"]["domains"]["code"]["layers"]["3"]["top_k"]) == 64


# ---- the table of keys ----


def keys_of(table: str) -> set[str]:
    """The keys that a table names; those after the first of a row stand under the same one."""
    found = set()
    for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE):
        first, *rest = re.findall(r"`([^`]+)`", row)
        above = first.rpartition(".")[0]
        found |= {first, *(f"{above}.{name}" if above else name for name in rest)}
    return found


def keys_in(value, path=()):
    """The keys of nested objects, in the words of the table."""
    if not isinstance(value, dict):
        return {".".join(path)}
    return {key for name, each in value.items() for key in keys_in(each, (*path, name))}


def test_every_key_is_in_the_table():
    told = keys_of(SECTIONS["metrics.json"])
    domain, layer = next(iter(NUMBERS["domains"])), "0"
    replaced = {domain: "NAME", layer: "L"}
    shown = {
        **NUMBERS,
        "domains": {
            domain: {**NUMBERS["domains"][domain], "layers": {layer: NUMBERS["domains"][domain]["layers"][layer]}}
        },
        "layers": {layer: NUMBERS["layers"][layer]},
        "against": {
            "domains": {domain: NUMBERS["against"]["domains"][domain]},
            "shares": {domain: {layer: NUMBERS["against"]["shares"][domain][layer]}},
        },
    }
    found = {".".join(replaced.get(part, part) for part in key.split(".")) for key in keys_in(shown)}
    inner = ("layers.L.vocabulary", "layers.L.together", "top_tokens", "token_shares", "chance", "flow")
    found = {next((key for key in inner if name.startswith(key)), name) for name in found}
    told = {"flow" if name == "flow.A-B" else name for name in told}
    assert found == {name for name in told if not name.startswith("revisions")}


# ---- what is said of olmoe-tiny ----


def test_the_report_is_of_these_numbers():
    report = (DOCS / "reports" / "olmoe-tiny.html").read_text(encoding="utf-8")
    assert len(report.encode()) < 1_000_000
    for sentence in findings(NUMBERS).values():
        assert sentence.replace("'", "&#x27;") in report


def test_links_lead_somewhere_and_pictures_are_small():
    targets = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert "reports/olmoe-tiny.html" in targets
    for target in targets:
        if not target.startswith("https://"):
            assert (DOCS / target).is_file(), target
    pictures = sorted((DOCS / "images" / "routing").iterdir())
    assert {f"images/routing/{path.name}" for path in pictures} <= set(targets)
    assert all(path.stat().st_size < 150_000 for path in pictures)


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def busiest(layer) -> tuple[int, float]:
    shares = layer["top_k"]
    return max(range(len(shares)), key=shares.__getitem__), max(shares)


def test_domains():
    rows = re.findall(r"^\| ([a-z ]+) \| (\d+): (\d+ %) \| (\d+): (\d+ %) \| ([\d.]+) \|$", PAGE, flags=re.MULTILINE)
    told = {name: rest for name, *rest in rows}
    assert set(told) == set(NUMBERS["domains"])
    for name, domain in NUMBERS["domains"].items():
        assert domain["tokens"] == 20_000
        (first, first_share), (last, last_share) = (busiest(domain["layers"][layer]) for layer in ("0", "3"))
        distance = f"{domain['layers']['3']['distance']:.2f}"
        assert told[name] == [str(first), percent(first_share), str(last), percent(last_share), distance]
    code = NUMBERS["domains"]["code"]["layers"]["3"]["top_1"]
    assert f"35 is first for {percent(code[35])} of the tokens of code" in FOUND
    books, tales = (busiest(NUMBERS["domains"][name]["layers"]["3"])[0] for name in ("books", "fairy tales"))
    assert books == tales
    layers = NUMBERS["layers"].values()
    assert f"at least {percent(min(layer['entropy'] for layer in layers))} of the greatest entropy" in FOUND
    assert sum(layer["dead"] for layer in layers) == 0
    assert f"the busiest at {max(layer['max_over_mean'] for layer in layers):.1f} times the mean" in FOUND


def test_ids_of_experts():
    counts = NUMBERS["token_shares"]["experts"]["35"]
    assert NUMBERS["token_shares"]["layer"] == 3
    often, most = ({name: sum(numbers[at:]) for name, numbers in counts.items()} for at in (0, 5))
    assert f"Of the {often['code']} ids" in FOUND
    assert f"{most['code']} go there more than half of the time, and most nearly always" in FOUND
    assert counts["code"][-1] > most["code"] / 2
    assert f"in mathematics {most['mathematics']} of {often['mathematics']} do" in FOUND
    assert f"in small stories {most['small stories']} of {often['small stories']}" in FOUND
    for expert, name in (("11", "reference"), ("36", "law")):
        own = {domain: sum(numbers[5:]) for domain, numbers in NUMBERS["token_shares"]["experts"][expert].items()}
        assert max(own, key=own.__getitem__) == name


def test_vocabulary():
    layers = [NUMBERS["layers"][layer]["vocabulary"] for layer in "0123"]
    read = [layer["input"] for layer in layers]
    assert (
        f"in {percent(read[0]['top_k'], 1)} of its occurrences, and the first of them in {percent(read[0]['top_1'])}"
        in (FOUND)
    )
    low, high = ([f(layer[top] for layer in read[1:]) for top in ("top_k", "top_1")] for f in (min, max))
    assert (
        f"falls to {percent(low[0])} to {percent(high[0])} ({percent(low[1])} to {percent(high[1])}) in later" in FOUND
    )
    predicted = ", ".join(percent(layer["predicted"]["top_k"]) for layer in layers[1:])
    assert f"{predicted} in layers 1 to 3" in FOUND
    last = layers[3]
    assert (
        f"({percent(last['predicted']['top_1'])} against {percent(last['input']['top_1'])} of first choices)" in FOUND
    )
    experts = layers[1]["experts"]
    assert f"the mean over ids is {percent(read[1]['top_1'])} of first choices" in FOUND
    above = {expert for expert, share in enumerate(experts) if share is not None and share > 0.7}
    assert above == {55, 30, 60}
    assert f"55 ({percent(experts[55])}), 30 ({percent(experts[30])})" in FOUND
    assert f"60 ({percent(experts[60])})" in FOUND
    assert f"{experts.count(None)} experts are no id's favourite" in FOUND
    words = [text for text, share, _ in NUMBERS["top_tokens"]["experts"]["60"][:4]]
    assert words == [" stopped", " stood", " lay", " sat"]
    assert {"~$\\", " $\\"} < {text for text, *_ in NUMBERS["top_tokens"]["experts"]["30"][:4]}


def test_experts_together_and_neighbours():
    layers = [NUMBERS["layers"][layer] for layer in "0123"]
    often = [layer["often_together"] for layer in layers]
    assert f"{often[0]} of 4,032 ordered pairs of layer 0" in FOUND
    assert f"{often[1]} in layer 1, {often[2]} in layer 2 and {often[3]} in layer 3" in FOUND
    strongest = max(layer["coactivation"][0][2] for layer in layers)
    assert f"the strongest is {percent(strongest)} (chance: {percent(NUMBERS['chance']['coactivation'])})" in FOUND
    widest = max(tokens for triples in NUMBERS["flow"].values() for *_, tokens in triples)
    assert f"the widest has {percent(widest / NUMBERS['tokens'], 1)} of all tokens" in FOUND
    leaving = [i for i, _, _ in NUMBERS["flow"]["0-1"]]
    assert f"{leaving.count(43)} of the {len(leaving)} widest between layers 0 and 1 leave expert 43" in FOUND
    shared = [layer["neighbours"] for layer in layers]
    assert f"shares {percent(min(shared))} to {percent(max(shared))} of its experts with the one before it" in FOUND
    first, mass = ([layer[name] for layer in layers] for name in ("first", "mass"))
    assert first == sorted(first)
    assert f"probability of {first[0]:.2f} in layer 0 and {first[3]:.2f} in layer 3" in FOUND
    assert f"all eight together {mass[0]:.2f} and {mass[3]:.2f}" in FOUND


def test_packing():
    assert NUMBERS["against"]["model"] == "olmoe-tiny-int4"
    shares = [share for domain in NUMBERS["against"]["domains"].values() for share in domain["top_k"]]
    assert (
        f"chooses {percent(sum(shares) / len(shares), 1)} of the same experts, between {percent(min(shares), 1)} and "
        f"{percent(max(shares), 1)} in every domain and layer" in FOUND
    )
