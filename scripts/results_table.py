"""Write README's table of results from the lines that are committed in `benchmarks/results`.

    python scripts/results_table.py            # writes the table
    python scripts/results_table.py --check    # exits with 1 where README holds another one

Each row has an id, `file:part`, and quotes the newest line of that file which measured that part. A line whose figure
lies above the ceiling of the same line is never quoted: the ceiling and the figure were then measured in two states of
the machine, and neither says what the other is worth. Where every line is like that, the script fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: written by scripts/results_table.py -->", "<!-- end of results -->"
# Parameters of the released model that every token of a prompt is multiplied with: active ones without embeddings and
# head. A decoding step reads the head besides.
LAYER_PARAMETERS = 1_282_017_280 - 2 * 50_304 * 2048
STEP_PARAMETERS = LAYER_PARAMETERS + 50_304 * 2048

Line = dict[str, Any]


class AboveCeiling(Exception):
    """A row of which every measurement lies above its own ceiling."""


@dataclass(frozen=True)
class Figure:
    """What a line says of one part: our number, the peer's, and how many times better ours is.

    Where both were measured in turn, `ratio` is the one that the benchmark wrote: the median over its rounds, not the
    quotient of two medians. `share` is how much of its ceiling ours reaches, where the line has a ceiling.
    """

    ours: float
    peer: float
    peer_name: str
    ratio: float
    share: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table: where its numbers are, and in which words and unit they are said."""

    file: str
    part: str
    what: str
    unit: str
    read: Callable[[Line], Figure | None]

    @property
    def key(self) -> str:
        """The result's id."""
        return f"{self.file}:{self.part}"


def engines(group: str, measure: str) -> Callable[[Line], Figure | None]:
    """Tokens a second of `cpu_engines.py` against the fastest of llama.cpp's formats."""

    def read(line: Line) -> Figure | None:
        part = line["parts"].get(group, {}).get(measure)
        if part is None:
            return None
        speeds = dict(part["tokens_per_s"])
        ours = speeds.pop("ours")
        name = max(speeds, key=speeds.__getitem__)
        return Figure(ours, speeds[name], name, part["ratio"]["best"], part.get("share_of_ceiling"))

    return read


def bf16(measure: str, kernels: str) -> Callable[[Line], Figure | None]:
    """The whole released model in bf16 beside transformers; the ceiling is the machine's products, or its reads."""

    def read(line: Line) -> Figure | None:
        if line["layers"] != 16 or line.get("clock") != "wall" or line.get("kernels") != kernels:
            return None
        speed, limits = line[measure], line["ceilings"]
        if measure == "prefill":
            ceiling = max(limits["fp32_gflops"], limits["bf16_gflops"]) * 1e9 / (2 * LAYER_PARAMETERS)
        else:
            ceiling = limits["read_gb_per_s"] * 1e9 / (2 * STEP_PARAMETERS)
        return Figure(speed["ours"], speed["transformers"], "transformers", speed["ratio"], speed["ours"] / ceiling)

    return read


def training(line: Line) -> Figure | None:
    """Training steps of the 7.6M-parameter model."""
    if (line["sequences"], line["length"], line["threads"]) != (16, 256, 2):
        return None
    return Figure(line["ours"], line["transformers"], "transformers", line["ratio"])


def qlora(line: Line) -> Figure | None:
    """Steps of a layer of the released shapes with adapters on attention and experts, over frozen weights in NF4."""
    if (line["targets"], line["precision"]) != ("all", "fp32"):
        return None
    return Figure(line["ours"]["tokens_per_s"], line["trl"]["tokens_per_s"], "TRL + PEFT", line["ratio"])


def footprint(mode: str) -> Callable[[Line], Figure | None]:
    """Bytes after quantized loading, as a share of those in bf16."""

    def read(line: Line) -> Figure | None:
        ours, theirs = line["olmoe"][mode], line["transformers"][mode]
        return Figure(ours, theirs, "bitsandbytes", theirs / ours)

    return read


def quality(target: str, peer: str) -> Callable[[Line], Figure | None]:
    """KL against fp32 on held-out text; the peer's is that of the same commit."""

    def read(line: Line) -> Figure | None:
        if (line["source"], line["target"]) != ("olmoe-tiny", target):
            return None
        beside = [
            other["kl_mean"]
            for other in lines("quantization_quality")
            if (other["source"], other["target"], other["commit"]) == ("olmoe-tiny", peer, line["commit"])
        ]
        if not beside:
            return None
        return Figure(line["kl_mean"], beside[-1], peer.replace("llama-", "llama.cpp "), beside[-1] / line["kl_mean"])

    return read


def serving(scenario: str, measure: str, peer: str) -> Callable[[Line], Figure | None]:
    """Our server beside llama.cpp's under one load."""

    def read(line: Line) -> Figure | None:
        found = line["scenarios"].get(scenario)
        if found is None or peer not in found["medians"]:
            return None
        ours, theirs = found["medians"]["ours"][measure], found["medians"][peer][measure]
        share = found["share_of_ceiling"] if measure.endswith("tok_per_s") else None
        return Figure(ours, theirs, peer, found["gain"][peer][measure], share)

    return read


SPEED, MS, SHARE, NATS = "tokens/s", "ms", "of bf16's bytes", "nats"
_T, _F = "steady_output_tok_per_s", "ttft_ms"
ROWS = [
    Row("serve", "clients_1", "serving 1 client, int4", SPEED, serving("clients_1", _T, "llama.cpp")),
    Row("serve", "clients_8", "serving 8 clients, int4", SPEED, serving("clients_8", _T, "llama.cpp")),
    Row("serve", "clients_8.ttft", "their first token", MS, serving("clients_8", _F, "llama.cpp")),
    Row("serve", "clients_16", "serving 16 clients, int4", SPEED, serving("clients_16", _T, "llama.cpp")),
    Row("cpu_engines", "int4.prefill_512", "prompt of 512, int4", SPEED, engines("int4", "prefill_512")),
    Row("cpu_engines", "int4.decode_64", "decoding, int4", SPEED, engines("int4", "decode_64")),
    Row("cpu_engines", "whole.whole_64", "texts, sampled, int4", SPEED, engines("whole", "whole_64")),
    Row("cpu_engines", "int8.decode_64", "decoding, int8", SPEED, engines("int8", "decode_64")),
    Row("cpu_engines", "context.decode_2048", "after 2048, int4", SPEED, engines("context", "decode_2048")),
    Row("cpu_engines", "batch.decode_64_batch_8", "8 sequences, int4", SPEED, engines("batch", "decode_64_batch_8")),
    Row("prefill_transformers", "prefill", "prompt of 512, bf16", SPEED, bf16("prefill", "avx512")),
    Row("prefill_transformers", "decode", "decoding, bf16", SPEED, bf16("decode", "avx512")),
    Row("train_transformers", "16x256", "training olmoe-tiny's shape", SPEED, training),
    Row("qlora_peft", "all", "QLoRA with experts, one layer", SPEED, qlora),
    Row("quantized_footprint", "nf4", "loaded in NF4, 108M weights", SHARE, footprint("nf4_double_quant")),
    Row("quantization_quality", "int4", "KL of int4, olmoe-tiny", NATS, quality("int4", "llama-Q4_0")),
]


def lines(file: str) -> list[Line]:
    """The lines of a committed result, the newest last."""
    text = (RESULTS / f"{file}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def newest(row: Row, found: Iterable[Line]) -> tuple[Line, Figure]:
    """The newest line that measured a row and is not above its own ceiling."""
    above = 0
    for line in reversed(list(found)):
        figure = row.read(line)
        if figure is None:
            continue
        if figure.share is None or figure.share <= 1:
            return line, figure
        above += 1
    if above:
        raise AboveCeiling(f"{row.key}: all {above} measurements lie above their own ceiling")
    raise LookupError(f"{row.key}: no line of benchmarks/results/{row.file}.jsonl measured it")


def machine(line: Line) -> str:
    """Processor, threads and instruction set of a line."""
    limited = line.get("isa_limit") == "AVX2" or line.get("kernels") == "avx2"
    isa = line.get("engines", {}).get("ours", {}).get("isa") or line.get("kernels") or ("avx2" if limited else None)
    threads = "1 thread" if line["threads"] == 1 else f"{line['threads']} threads"
    return ", ".join([line["cpu"], threads, *([isa.upper().replace("AVX512", "AVX-512")] if isa else [])])


def number(value: float) -> str:
    """Three digits, and thousands with a comma."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Iterable[Row] = tuple(ROWS)) -> str:
    """The table in Markdown."""
    out = ["| id | what | olmoe | peer | ratio | machine | commit |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        line, figure = newest(row, lines(row.file))
        ours, peer = f"{number(figure.ours)} {row.unit}", f"{number(figure.peer)} ({figure.peer_name})"
        ratio = f"{figure.ratio:.2f}" if figure.ratio < 100 else number(figure.ratio)
        out.append(f"| `{row.key}` | {row.what} | {ours} | {peer} | {ratio} | {machine(line)} | {line['commit']} |")
    return "\n".join(out)


def with_table(readme: str, text: str) -> str:
    """README with `text` between its two markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the table differs")
    check: bool = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_table(old, table())
    if new == old:
        return 0
    if check:
        print(
            "README's table is not what benchmarks/results says; run python scripts/results_table.py", file=sys.stderr
        )
        return 1
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
