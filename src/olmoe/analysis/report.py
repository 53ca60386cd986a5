"""The page of an analysis: each figure with one sentence about what it shows, computed from the numbers.

See `html_page` for the file.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

from olmoe.analysis.figures import apart_experts, middle_layer, shown_layers
from olmoe.analysis.html_page import document, section

Metrics = Mapping[str, Any]
# Experts in the table of tokens.
_LISTED = 16

_TITLES = {
    "domains-top-k": "Domains: all chosen experts",
    "domains-top-1": "Domains: first choices",
    "load": "Expert load",
    "coactivation": "Experts chosen together",
    "vocabulary": "Vocabulary specialisation",
    "vocabulary-experts": "Vocabulary specialisation of one layer’s experts",
    "token-shares": "An expert’s tokens by domain",
    "flow": "From layer to layer",
    "confidence": "Router confidence",
    "neighbours": "Neighbouring tokens",
    "agreement": "Agreement with another model",
    "before-after": "Domains in both models",
    "revisions": "During training",
}


def page(metrics: Metrics, figures: Mapping[str, Any]) -> str:
    """The page, from numbers as in metrics.json and figures by name (`olmoe.analysis.figures.draw`)."""
    title = f"Routing of {metrics['model']}"
    sentences = findings(metrics)
    sections = "".join(section(name, _TITLES[name], figure, sentences[name]) for name, figure in figures.items())
    return document(
        title,
        f"<p>{html.escape(_summary(metrics))}</p>\n{_domain_table(metrics)}{sections}{_token_table(metrics)}"
        "<p><small>Definitions are those of “OLMoE: Open Mixture-of-Experts Language Models” "
        "(Muennighoff et al. 2024), section 5. Dashed lines show uniform routing unless a caption says otherwise. "
        "All numbers are in metrics.json.</small></p>\n",
    )


def findings(metrics: Metrics) -> dict[str, str]:
    """What each figure shows, in one sentence."""
    sentences: dict[str, Callable[[Metrics], str]] = {
        "domains-top-k": lambda m: _say_domains(m, "top_k"),
        "domains-top-1": lambda m: _say_domains(m, "top_1"),
        "load": _say_load,
        "coactivation": _say_coactivation,
        "vocabulary": _say_vocabulary,
        "vocabulary-experts": _say_vocabulary_experts,
        "token-shares": _say_token_shares,
        "flow": _say_flow,
        "confidence": _say_confidence,
        "neighbours": _say_neighbours,
    }
    if "against" in metrics:
        sentences["agreement"] = _say_agreement
    if "shares" in metrics.get("against", {}):
        sentences["before-after"] = _say_before_after
    if metrics.get("revisions"):
        sentences["revisions"] = _say_revisions
    return {name: sentence(metrics) for name, sentence in sentences.items()}


# ---- the parts of the page ----


def _summary(metrics: Metrics) -> str:
    return (
        f"{_number(metrics['tokens'], 'token')} from {_number(len(metrics['domains']), 'domain')} passed through "
        f"{_number(metrics['layers_count'], 'layer')}, in each of which every token chose {metrics['top_k']} of "
        f"{_number(metrics['experts'], 'expert')}."
    )


def _domain_table(metrics: Metrics) -> str:
    """How far each domain is from all of them together."""
    layers = shown_layers(metrics)
    heads = "".join(f'<th class="number">layer {layer}</th>' for layer in layers)
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{numbers["tokens"]:,}</td>'
        + "".join(f'<td class="number">{_distance(numbers, layer):.2f}</td>' for layer in layers)
        + "</tr>\n"
        for name, numbers in metrics["domains"].items()
    )
    return (
        f'<div class="table"><table>\n<tr><th>domain</th><th class="number">tokens</th>{heads}</tr>\n{rows}'
        "</table></div>\n<p>The layer columns say how far a domain’s first choices are from those of all domains "
        "together, from 0 (the same) to 1 (no expert in common).</p>\n"
    )


def _token_table(metrics: Metrics) -> str:
    """The tokens of the experts that take tokens most exclusively (Table 8)."""
    found = metrics.get("top_tokens")
    if not found or not found["experts"]:
        return ""

    def strength(item: tuple[str, Any]) -> tuple[float, int]:
        # Not the mean: an expert with a single token of its own would be the strongest.
        return (-sum(share for _, share, _ in item[1]), int(item[0]))

    rows = "".join(
        f'<tr><td class="number">{expert}</td><td>'
        + " ".join(
            f"<code>{html.escape(_visible(text))}</code> <small>{share:.0%}</small>" for text, share, _ in tokens
        )
        + "</td></tr>\n"
        for expert, tokens in sorted(found["experts"].items(), key=strength)[:_LISTED]
    )
    return (
        f'<section id="tokens">\n<h2>Tokens of experts in layer {found["layer"]}</h2>\n<div class="table"><table>\n'
        f'<tr><th class="number">expert</th><th>tokens, each with the share of its occurrences that choose this '
        f"expert first</th></tr>\n{rows}</table></div>\n<p>Only tokens that occur at least {found['least']} times; the "
        "experts with the most exclusive tokens come first.</p>\n</section>\n"
    )


def _visible(text: str) -> str:
    """A token with its spaces and newlines made visible."""
    marks = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(marks.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text) or "∅"


# ---- sentences ----


def _say_domains(metrics: Metrics, which: str) -> str:
    uniform = metrics["top_k"] / metrics["experts"] if which == "top_k" else 1 / metrics["experts"]
    found = [
        (share, name, layer, expert)
        for name, numbers in metrics["domains"].items()
        for layer in shown_layers(metrics)
        for expert, share in enumerate(numbers["layers"][str(layer)][which])
    ]
    share, name, layer, expert = max(found, key=lambda item: item[0])
    how = "" if which == "top_k" else " first"
    text = (
        f"The strongest preference is that of {name} for expert {expert} of layer {layer}: {share:.1%} of its tokens "
        f"choose it{how}, against {uniform:.1%} if routing were uniform"
    )
    if len(metrics["domains"]) > 1:
        last = shown_layers(metrics)[-1]
        apart = {name: _distance(numbers, last) for name, numbers in metrics["domains"].items()}
        most, least = max(apart, key=apart.__getitem__), min(apart, key=apart.__getitem__)
        if apart[most] > apart[least]:
            text += f"; in the last layer, {most} differs most from all domains together and {least} least"
    return text + "."


def _say_load(metrics: Metrics) -> str:
    layers = metrics["layers"]
    dead = sum(numbers["dead"] for numbers in layers.values())
    peak = max(layers, key=lambda layer: layers[layer]["max_over_mean"])
    even = min(layers, key=lambda layer: layers[layer]["entropy"])
    unused = "no expert is unused" if dead == 0 else f"{_number(dead, 'expert')} over all layers received no token"
    return (
        f"The busiest expert has {layers[peak]['max_over_mean']:.1f} times the uniform load (layer {peak}), the least "
        f"balanced layer ({even}) reaches {layers[even]['entropy']:.1%} of the maximum entropy, and {unused}."
    )


def _say_coactivation(metrics: Metrics) -> str:
    found = [
        (share, layer, i, j)
        for layer in shown_layers(metrics)
        for i, j, share in metrics["layers"][str(layer)]["coactivation"]
    ]
    chance = metrics["chance"]["coactivation"]
    if not found:
        return "No two experts are chosen together, because a token chooses only one."
    share, layer, i, j = max(found)
    often = sum(metrics["layers"][str(layer)]["often_together"] for layer in shown_layers(metrics))
    pairs = sum(metrics["experts"] * (metrics["experts"] - 1) for _ in shown_layers(metrics))
    return (
        f"Of the tokens that choose expert {i} of layer {layer}, {share:.0%} also choose expert {j}, against "
        f"{chance:.1%} by chance; in the layers shown, {often:,} of {pairs:,} ordered pairs are chosen together more "
        "than half the time."
    )


def _say_vocabulary(metrics: Metrics) -> str:
    last = str(metrics["layers_count"] - 1)
    first, final = metrics["layers"]["0"]["vocabulary"], metrics["layers"][last]["vocabulary"]
    text = (
        f"On average over input ids, an id’s favourite expert is the first choice for {first['input']['top_1']:.0%} of "
        f"its occurrences in layer 0 and {final['input']['top_1']:.0%} in layer {last}"
    )
    if "predicted" in final:
        more = final["predicted"]["top_1"] > final["input"]["top_1"]
        follows = "the output token more than the input" if more else "the input token at least as much as the output"
        text += (
            f"; over predicted ids it is {final['predicted']['top_1']:.0%} there, so the last layer’s routing follows "
            f"{follows}"
        )
    return text + "."


def _say_vocabulary_experts(metrics: Metrics) -> str:
    layer = middle_layer(metrics)
    vocabulary = metrics["layers"][str(layer)]["vocabulary"]
    found = [(share, -expert) for expert, share in enumerate(vocabulary["experts"]) if share is not None]
    if not found:
        return f"No expert of layer {layer} is the favourite of any id."
    most, least = max(found), min(found)
    return (
        f"In layer {layer}, expert {-most[1]} is the most specialised: on average it takes {most[0]:.0%} of the "
        f"occurrences of the ids that prefer it, and expert {-least[1]}, the least specialised, {least[0]:.0%}; the "
        f"dashed line is the mean over ids, {vocabulary['input']['top_1']:.0%} for input ids."
    )


def _say_token_shares(metrics: Metrics) -> str:
    experts = apart_experts(metrics)
    if not experts:
        return "No expert of the last layer took any id often enough."
    found = metrics["token_shares"]
    counts = found["experts"][str(experts[0])]
    own = dict.fromkeys(metrics["domains"], 0)
    own |= {name: sum(numbers[len(numbers) // 2 :]) for name, numbers in counts.items()}
    most, least = max(own, key=own.__getitem__), min(own, key=own.__getitem__)
    return (
        f"Expert {experts[0]} of layer {found['layer']} takes at least half of the occurrences of "
        f"{_number(own[most], 'id')} in {most}, and of {own[least]:,} in {least}; each row is a histogram of the "
        "ids of one expert in one domain by the share of their occurrences that the expert takes there, with the "
        f"number of these ids beside it (only ids that it took at least {found['least']} times)."
    )


def _say_flow(metrics: Metrics) -> str:
    found = [(tokens, i, j, *name.split("-")) for name, triples in metrics["flow"].items() for i, j, tokens in triples]
    if not found:
        return "There is only one layer, so there are no paths between layers."
    tokens, i, j, a, b = max(found)
    chance = 1 / metrics["experts"] ** 2
    return (
        f"The widest path, from expert {i} of layer {a} to expert {j} of layer {b}, carries "
        f"{tokens / metrics['tokens']:.1%} of all tokens, against {chance:.2%} if first choices were uniform and "
        "independent; paths follow first choices, and only the widest are drawn."
    )


def _say_confidence(metrics: Metrics) -> str:
    layers = metrics["layers"]
    sure = max(layers, key=lambda layer: layers[layer]["first"])
    unsure = min(layers, key=lambda layer: layers[layer]["first"])
    return (
        f"Routers are most confident in layer {sure}, where the first expert’s probability is "
        f"{layers[sure]['first']:.2f} on average, {layers[sure]['margin']:.2f} above the second’s, and least confident "
        f"in layer {unsure} ({layers[unsure]['first']:.2f}, {layers[unsure]['margin']:.2f} above the second’s)."
    )


def _say_neighbours(metrics: Metrics) -> str:
    if metrics["tokens"] == 1:
        return "There is only one token, so it has no neighbour."
    values = {layer: numbers["neighbours"] for layer, numbers in metrics["layers"].items()}
    mean, most = sum(values.values()) / len(values), max(values, key=values.__getitem__)
    return (
        f"On average over layers, a token shares {mean:.0%} of its experts with the token before it, against "
        f"{metrics['chance']['saturation_k']:.1%} by chance; it shares most in layer {most} ({values[most]:.0%})."
    )


def _say_agreement(metrics: Metrics) -> str:
    found = [
        (share, name, layer)
        for name, numbers in metrics["against"]["domains"].items()
        for layer, share in enumerate(numbers["top_k"])
    ]
    mean = sum(share for share, *_ in found) / len(found)
    least, name, layer = min(found)
    return (
        f"On average, {metrics['against']['model']} also chooses {mean:.1%} of the experts that tokens choose here; "
        f"the models agree least on {name} in layer {layer} ({least:.1%})."
    )


def _say_before_after(metrics: Metrics) -> str:
    other = metrics["against"]
    found = [
        (abs(after - before), before, after, name, layer, expert)
        for name, numbers in metrics["domains"].items()
        for layer in shown_layers(metrics)
        for expert, (before, after) in enumerate(
            zip(numbers["layers"][str(layer)]["top_k"], other["shares"][name][str(layer)]["top_k"], strict=True)
        )
    ]
    _, before, after, name, layer, expert = max(found)
    mean = sum(item[0] for item in found) / len(found)
    return (
        f"The share of tokens that choose an expert differs most for {name} and expert {expert} of layer {layer}: "
        f"{before:.1%} here and {after:.1%} in {other['model']}; the mean absolute difference over domains, experts "
        f"and the layers shown is {100 * mean:.2f} percentage points."
    )


def _say_revisions(metrics: Metrics) -> str:
    earlier = metrics["revisions"]

    def mean(each: Mapping[str, Any], which: str) -> float:
        return sum(float(numbers[which]) for numbers in each["layers"].values()) / len(each["layers"])

    start, end = earlier[0], earlier[-1]
    slowest = min(end["layers"], key=lambda layer: end["layers"][layer]["saturation_k"])
    grown = "" if end is start else f", and {end['name']} {mean(end, 'saturation_k'):.0%}"
    return (
        f"On average over layers, {start['name']} chooses {mean(start, 'saturation_k'):.0%} of the final experts"
        f"{grown} ({mean(end, 'saturation_1'):.0%} of first choices), against "
        f"{metrics['chance']['saturation_k']:.1%} by chance; in {end['name']}, layer {slowest} is furthest from its "
        f"final choices ({end['layers'][slowest]['saturation_k']:.0%})."
    )


def _distance(domain: Mapping[str, Any], layer: int) -> float:
    return float(domain["layers"][str(layer)]["distance"])


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
