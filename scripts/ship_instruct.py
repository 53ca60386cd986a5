"""Turn the last of the runs of olmoe-tiny-instruct into what ships: int8, with its card.

    python scripts/ship_instruct.py configs/sft-tiny-instruct{,-own,-own-2,-own-3,-own-4}.toml --credits ../shared/corpus

Every number of the card is measured here, on the packed weights as shipped, and goes into
benchmarks/results/story_obedience.json, beside what comes by chance and what olmoe-tiny does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import story_obedience
from ship_tiny import CREDITS, copy_credits

from olmoe.io.hub import SHIPPED_CHAT, SHIPPED_NAME
from olmoe.train.finetune.config import SFTConfig, load_config
from olmoe.weights.quantize import quantize

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "story_obedience.json"
ASKED = {
    "words": 'a story with one, two or three given words ("with the words …"): all of them are in it',
    "about": 'a story about someone or something ("about a dog named Max"): noun and name are in it',
    "begins": "a story that begins with a given sentence: it does, letter by letter",
    "go on": "the rest of a given beginning: it takes up a name of it and does not repeat it",
    "any": '"Tell me a story.": three sentences or more, the last one complete',
    "then": '"Go on." after half a story: as the rest of a beginning',
    "another": "another story after a first one, perhaps with words or about someone",
    "sentence": "one sentence with given words: they are in it, and it is one",
    "short": "a short story with given words: they are in it, and it has two to six sentences",
    "talk": "greetings, thanks, questions from outside its world: it says what it can do",
}

# The commands of docs/finetuning.md, up to this script's.
RECIPE = r"""
python scripts/story_chats.py CORPUS/train/stories_tinystories.txt runs/chats.jsonl --rounds 5 --most 750 --seed 1
python scripts/story_chats.py CORPUS/valid/stories_tinystories.txt runs/chats-valid.jsonl --held-out
olmoe sft configs/sft-tiny-instruct.toml
python scripts/story_chats.py CORPUS/train/stories_tinystories.txt runs/requests.jsonl --rounds 40 --most 750 --seed 2
python scripts/own_stories.py runs/requests.jsonl runs/own-a.jsonl --model runs/tiny-instruct/checkpoints/step-0001954 \
  --kinds words,another,about,begins --count 8704 --help-by 3 --seed 1
python scripts/own_stories.py runs/requests.jsonl runs/own-b.jsonl --model runs/tiny-instruct/checkpoints/step-0001954 \
  --kinds words,short --first 40000 --count 10240 --help-by 3 --seed 2
python scripts/own_stories.py runs/requests.jsonl runs/own-c.jsonl --model runs/tiny-instruct/checkpoints/step-0001954 \
  --kinds words --first 10000 --count 4096 --help-by 3 --seed 3
olmoe sft configs/sft-tiny-instruct-own.toml
python scripts/own_stories.py runs/requests.jsonl runs/own-d.jsonl --model runs/tiny-instruct-own/best \
  --kinds words,another,about,begins --first 16000 --count 10240 --seed 4
python scripts/own_stories.py runs/requests.jsonl runs/own-e.jsonl --model runs/tiny-instruct-own/best \
  --kinds words --first 4700 --count 9216 --seed 5
python scripts/own_stories.py runs/requests.jsonl runs/own-f.jsonl --model runs/tiny-instruct-own/best \
  --kinds short,sentence --first 60000 --count 10240 --seed 6
olmoe sft configs/sft-tiny-instruct-own-2.toml
python scripts/story_chats.py CORPUS/train/stories_tinystories.txt runs/requests-2.jsonl --rounds 40 --most 750 --seed 3
python scripts/own_stories.py runs/requests-2.jsonl runs/own-g.jsonl --model runs/tiny-instruct-own-2/best \
  --kinds words --count 8704 --more 0.5 --seed 7
python scripts/own_stories.py runs/requests-2.jsonl runs/own-h.jsonl --model runs/tiny-instruct-own-2/best \
  --kinds words,another,about,begins --first 19000 --count 8704 --more 0.5 --seed 8
olmoe sft configs/sft-tiny-instruct-own-3.toml
python scripts/own_stories.py runs/requests-2.jsonl runs/own-i.jsonl --model runs/tiny-instruct-own-3/best \
  --kinds words,about --first 9000 --count 7168 --more 0.5 --talk 0.25 --seed 9
python scripts/own_stories.py runs/requests-2.jsonl runs/own-j.jsonl --model runs/tiny-instruct-own-3/best \
  --kinds words,another,about,begins --count 7168 --more 0.5 --talk 0.25 --seed 10
olmoe sft configs/sft-tiny-instruct-own-4.toml"""


def main() -> None:
    """Pack, measure and write the folder of the shipped checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", help="the configurations of the runs in their order")
    parser.add_argument("--credits", type=Path, required=True, help="the corpus folder with its attribution tables")
    parser.add_argument("--checkpoint", default="best", help="a folder of the run, such as checkpoints/step-0000500")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that is shipped now")
    arguments = parser.parse_args()
    configs = [load_config(path, SFTConfig) for path in arguments.configs]
    run, held_out = configs[-1].resolve(configs[-1].run.output), configs[0].resolve(configs[0].data.valid[0].path)

    if SHIPPED_CHAT.exists() and not arguments.overwrite:
        parser.error(f"{SHIPPED_CHAT} exists already; replace it with --overwrite")
    weights = run / arguments.checkpoint
    shutil.rmtree(SHIPPED_CHAT, ignore_errors=True)
    quantize(weights, SHIPPED_CHAT, "int8")
    copy_credits(arguments.credits, SHIPPED_CHAT)
    measured = measure(held_out)
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (SHIPPED_CHAT / "README.md").write_text(write_card(configs, weights, measured), encoding="utf-8")
    print(sum(path.stat().st_size for path in SHIPPED_CHAT.iterdir()), "bytes")


def measure(held_out: Path) -> dict[str, Any]:
    """What the shipped model obeys of the held-out chats, greedily and sampled; olmoe-tiny; and strange stories."""
    rows = story_obedience.read_chats(held_out)
    third = rows[::3]
    few = rows[::20]  # olmoe-tiny ends no answer by itself, which takes long and says the same each time
    answers = {
        "greedy": (rows, story_obedience.ask(rows, str(SHIPPED_CHAT), 0.0)),
        "sampled": (third, story_obedience.ask(third, str(SHIPPED_CHAT), 0.7)),
        "olmoe-tiny": (few, story_obedience.ask(few, SHIPPED_NAME, 0.0)),
        "stories": (rows, story_obedience.strangers(rows)),
    }
    first = {row["kind"]: number for number, row in reversed(list(enumerate(rows)))}
    shown = [first[kind] for kind in ("words", "short", "about", "begins", "talk")]
    return {
        "benchmark": "story_obedience",
        "date": time.strftime("%Y-%m-%d"),
        "temperature": {"greedy": 0.0, "sampled": 0.7, "olmoe-tiny": 0.0},
        "measured": {name: story_obedience.summary(*each) for name, each in answers.items()},
        "samples": [(rows[n]["messages"][-2]["content"], answers["greedy"][1][n][0]) for n in shown],
    }


def obedience_table(measured: dict[str, Any]) -> str:
    """The card's table of how often the model does what it is asked."""
    found = measured["measured"]
    rows = [
        "| asked for, and what counts | requests | obeyed | sampled | by chance |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, what in ASKED.items():
        greedy, sampled, chance = (found[name]["kinds"][kind] for name in ("greedy", "sampled", "stories"))
        rows.append(
            f"| {what} | {greedy['n']} | {_with_interval(greedy)} | {_with_interval(sampled)} | {chance['obeyed']:.0%} |"
        )
    greedy, sampled, chance = (found[name]["all requests"] for name in ("greedy", "sampled", "stories"))
    rows.append(
        f"| all but short stories and talk | {greedy['n']} | {_with_interval(greedy)} | {_with_interval(sampled)} | {chance['obeyed']:.0%} |"
    )
    return "\n".join(rows)


def _with_interval(share: dict[str, Any]) -> str:
    low, high = share["interval"]
    return f"{share['obeyed']:.0%} ({low:.0%} to {high:.0%})"


def described(configs: Sequence[SFTConfig], weights: Path) -> str:
    """What each run trained up to the checkpoint that the next one started from, or that ships."""
    ends = [config.resolve(config.start) for config in configs[1:]] + [weights]
    lines = []
    for number, (config, end) in enumerate(zip(configs, ends, strict=True), 1):
        metrics = config.resolve(config.run.output) / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        steps = [record for record in records if "loss" in record]
        if end.name.startswith("step-"):  # the run may have gone on after it
            steps = steps[: int(end.name.removeprefix("step-"))]
        lines.append(
            f"{number}. {len(steps):,} steps, {steps[-1]['tokens'] / 1e6:.1f}M tokens, a learning rate of "
            f"{config.optimizer.learning_rate:g} at its peak and {steps[-1]['learning_rate']:.1g} at the end, "
            f"{'fp32' if config.compute.precision == 'fp32' else 'products in bf16'}"
        )
    return "\n".join(lines)


def write_card(configs: Sequence[SFTConfig], weights: Path, measured: dict[str, Any]) -> str:
    """The model card as Markdown."""
    shown = "\n\n".join(
        f"**{asked}**\n\n> " + answer.strip().replace("\n", "\n> ") for asked, answer in measured["samples"]
    )
    single = measured["measured"]["greedy"]["single words"]
    base = measured["measured"]["olmoe-tiny"]["all requests"]
    config = configs[-1]
    return f"""---
license: apache-2.0
language: en
tags: [olmoe, mixture-of-experts]
base_model: olmoe-tiny
---
# olmoe-tiny-instruct

[olmoe-tiny](../olmoe-tiny/README.md), of 7.6M parameters (2.1M active), fine-tuned to tell the story that it is asked for: with given
words, about someone, from a first sentence on, or the rest of a beginning. What `olmoe chat` talks to where no model is named.
Packed in int8 (`olmoe quantize --format int8`); a context of 512 tokens, which is two or three stories.

## How often it does what it is asked
Held-out requests, made of stories that neither this model nor olmoe-tiny was trained on; the weights as shipped. "Obeyed" is the
likeliest answer (temperature 0, the default of `olmoe chat`), "sampled" temperature 0.7 (of every third request), each with a 95 % interval; "by chance" is another
request's story. Only answers that end by themselves count. What a program can see is counted; whether a story makes sense is not.

{obedience_table(measured)}

Of single words asked for, {single["obeyed"]:.0%} are in the story. olmoe-tiny itself, asked in the same way, obeys {base["obeyed"]:.0%} of {base["n"]}:
it does not know what a chat is.

## What it says
Temperature 0, the first held-out request of five kinds:

{shown}

## How it was made
In five runs of `olmoe sft` on all weights. For the first, `scripts/story_chats.py` writes chats out of the corpus's TinyStories: several
requests of each story in many phrasings, single sentences and short passages with given words, stories that go on when asked to, a second
story after a first, greetings, and questions that a storyteller cannot answer. The answers are the corpus's stories, most of them with
other names, things or adjectives in place of some. For the others, `scripts/own_stories.py` samples answers to more such requests from
the model that the run before made, with the words that were asked for made likelier, and keeps those that do what was asked and repeat
nothing; a tenth to a half of the first chats is learned again beside them. The samplers were packed in int8.

```{RECIPE}
python scripts/ship_instruct.py configs/sft-tiny-instruct{{,-own,-own-2,-own-3,-own-4}}.toml --credits CORPUS
```

{described(configs, weights)}

AdamW, weight decay {config.optimizer.weight_decay}, load balancing {config.loss.load_balancing}.

## Limits
Its world is that of TinyStories: it knows no facts, and nothing but short stories for small children in plain English. It
repeats itself, loses its thread and mixes up who did what. Whom a story is about it mostly heeds, a first sentence more often than not; of
words asked for it brings three in five, all of several in one story of three, most in its first two sentences and then over and over.
What does not look like a request for a story it answers with what it can do, or with a story.

## Data and credits
{CREDITS}
The chats are made of the first of them. The weights are under Apache-2.0.
"""


if __name__ == "__main__":
    main()
