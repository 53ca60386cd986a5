"""The page of an analysis: complete in itself, true to the numbers, and readable in a real browser and on a phone."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")

from olmoe.analysis.drawing import image_bytes
from olmoe.analysis.figures import draw, shown_layers
from olmoe.analysis.measurements import measure
from olmoe.analysis.report import findings, page
from olmoe.analysis.trace import Trace, TraceWriter

L, K, E = 5, 3, 8
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for found in map(shutil.which, NAMES) if found), None)
FIGURES = [
    "domains-top-k", "domains-top-1", "load", "coactivation", "vocabulary", "vocabulary-experts", "token-shares",
    "flow", "confidence", "neighbours",
]  # fmt: skip


def made(path, layers=L, k=K) -> Trace:
    """All tokens of one domain choose expert 5 first, those of the other any."""
    random = np.random.default_rng(1)
    domains = json.dumps([["<b>one & all", 0, 80], ["$other$", 80, 200]])
    options = {"predictions": True, "metadata": {"domains": domains, "model": "m<1>"}}
    with TraceWriter(path, layers=layers, experts=E, top_k=k, **options) as writer:
        chosen = np.argsort(random.random((200, layers, E)), axis=2)[:, :, :k]
        chosen[:80] = np.where(chosen[:80] == 5, chosen[:80, :, :1], chosen[:80])
        chosen[:80, :, 0] = 5
        weights = -np.sort(-random.dirichlet(np.ones(E), (200, layers)), axis=2)[:, :, :k]
        writer.start()
        ids = random.integers(0, 20, 200)
        writer.append(chosen, weights, ids.tolist(), ids + 1)
    return Trace.open(path)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    found = measure(made(tmp_path_factory.mktemp("report") / "trace"))
    found["top_tokens"] = {"layer": 2, "least": 10, "experts": {"5": [[" <i>", 0.75, 12]], "6": [["\n", 1.0, 10]]}}
    shares = {"top_k": [0.9, 0.8, 0.7, 0.6, 0.5], "top_1": [0.5] * L}
    found["against"] = {"model": "m4", "domains": dict.fromkeys(found["domains"], shares)}
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def trained(numbers):
    """The same, with the other model's shares and three earlier checkpoints."""
    other = {name: {layer: dict(each) for layer, each in d["layers"].items()} for name, d in numbers["domains"].items()}
    other["$other$"]["2"]["top_k"] = [0.0, *other["$other$"]["2"]["top_k"][1:]]
    layers = {
        str(layer): {"saturation_k": 0.4 + 0.1 * layer, "saturation_1": 0.2, "max_over_mean": 2.0, "first": 0.1}
        for layer in range(L)
    }
    nearer = {layer: each | {"saturation_k": 0.9, "saturation_1": 0.7} for layer, each in layers.items()}
    listed = [("step5", 5, layers), ("step1000", 1000, layers), ("step9000", 9000, nearer)]
    return numbers | {
        "against": numbers["against"] | {"shares": other},
        "revisions": [{"name": name, "step": step, "layers": each} for name, step, each in listed],
    }


@pytest.fixture(scope="module")
def text(numbers):
    return page(numbers, draw(numbers))


def test_figures_of_all_that_there_is(numbers):
    drawn = draw(numbers)
    assert list(drawn) == [*FIGURES, "agreement"]
    assert image_bytes(drawn["load"], "png").startswith(b"\x89PNG")
    assert b"<svg" in image_bytes(drawn["flow"], "svg")
    (bars,) = drawn["domains-top-1"].axes[0].patches
    wanted = numbers["domains"]["<b>one & all"]["layers"]["0"]["top_1"]
    assert bars.get_data().values.tolist() == pytest.approx([100 * share for share in wanted])
    assert bars.get_data().edges.tolist() == [expert - 0.5 for expert in range(E + 1)]
    assert bars.get_fill()
    uniform = drawn["domains-top-k"].axes[0].lines[0].get_ydata()
    assert list(uniform) == pytest.approx([100 * K / E] * 2)
    assert shown_layers(numbers) == [0, 2, 4]


def test_the_same_numbers_give_the_same_file(numbers):
    assert image_bytes(draw(numbers)["load"], "svg") == image_bytes(draw(numbers)["load"], "svg")


def test_sentences_are_computed(numbers):
    said = findings(numbers)
    assert list(said) == [*FIGURES, "agreement"]
    assert all(re.fullmatch(r"[A-Z][^\n]*[^.]\.", sentence) for sentence in said.values())
    assert (
        "<b>one & all for expert 5 of layer 0: 100.0% of its tokens choose it first, against 12.5%"
        in (said["domains-top-1"])
    )
    assert "against 37.5% if routing were uniform" in said["domains-top-k"]
    assert (
        "m4 also chooses 70.0% of the experts that tokens choose here; the models agree least on $other$ in layer 4 "
        "(50.0%)" in said["agreement"]
    )
    assert "no expert is unused" in said["load"]
    often = sum(numbers["layers"][layer]["often_together"] for layer in ("0", "2", "4"))
    assert f"{often} of 168 ordered pairs" in said["coactivation"]
    changed = numbers | {"layers": {k: v | {"dead": 2} for k, v in numbers["layers"].items()}}
    assert "10 experts over all layers received no token" in findings(changed)["load"]


def test_two_models_side_by_side(trained):
    drawn, said = draw(trained), findings(trained)
    assert list(drawn) == list(said) == [*FIGURES, "agreement", "before-after", "revisions"]
    axes = drawn["before-after"].axes[4]  # of the second domain, in layer 2
    bars, outline = (patch.get_data().values for patch in axes.patches)
    assert outline[0] == 0 < bars[0]
    assert outline[1:] == pytest.approx(bars[1:])
    before = trained["domains"]["$other$"]["layers"]["2"]["top_k"][0]
    assert f"differs most for $other$ and expert 0 of layer 2: {before:.1%} here and 0.0% in m4" in said["before-after"]


def test_curves_over_training(trained):
    drawn = draw(trained)["revisions"]
    first, every, load, _ = drawn.axes
    assert [line.get_ydata()[2] for line in every.lines[:L]] == pytest.approx([90] * L)
    assert [line.get_ydata()[0] for line in every.lines[:L]] == pytest.approx([40, 50, 60, 70, 80])
    assert list(first.lines[L].get_ydata()) == pytest.approx([100 / E] * 2)  # chance
    assert [label.get_text() for label in every.get_xticklabels()] == ["5", "1,000", "9,000"]
    assert [label.get_text() for label in load.get_xticklabels()] == ["5", "1,000", "9,000", "last"]
    assert load.lines[1].get_ydata()[3] == trained["layers"]["1"]["max_over_mean"]
    said = findings(trained)["revisions"]
    assert "step5 chooses 60% of the final experts, and step9000 90% (70% of first choices), against 37.5%" in said
    unnamed = [each | {"name": f"r{at}" * 9, "step": None} for at, each in enumerate(trained["revisions"] * 9)]
    many = draw(trained | {"revisions": unnamed})["revisions"].axes[1]
    assert len(many.get_xticks()) == 8
    assert many.get_xticklabels()[0].get_text() == "r0r0r0r0r0r0r…"
    assert "During training" in page(trained, {"revisions": drawn})


def test_an_expert_by_domain(numbers):
    """Expert 5, which all tokens of one domain choose first, is shown; its ids there are its own altogether."""
    figure = draw(numbers)["token-shares"]
    shown = {axes.get_title(): axes for axes in figure.axes}
    image = shown["expert 5"].images[0].get_array()
    counts = numbers["token_shares"]["experts"]["5"]
    assert image[0].tolist() == [0] * 9 + [100]
    assert image[1].tolist() == [0] * 10  # in the other domain it takes no id often enough
    own = sum(counts["<b>one & all"])
    assert f"half of the occurrences of {own} ids in <b>one & all, and of 0 in $" in findings(numbers)["token-shares"]
    mixed = {"5": {"<b>one & all": [0, 1, *[0] * 7, 2], "$other$": [3, *[0] * 8, 1]}}
    changed = numbers | {"token_shares": numbers["token_shares"] | {"experts": mixed}}
    image = draw(changed)["token-shares"].axes[0].images[0].get_array()
    assert image[:, [0, 1, 9]].tolist() == [[0, pytest.approx(100 / 3), pytest.approx(200 / 3)], [75, 0, 25]]
    assert "2 ids in <b>one & all, and of 1 in $other$" in findings(changed)["token-shares"]


def test_one_token_and_one_expert(tmp_path):
    metadata = {"domains": json.dumps([["a", 0, 1], ["b", 1, 2]]), "model": "m"}
    with TraceWriter(tmp_path / "t", layers=1, experts=1, top_k=1, predictions=True, metadata=metadata) as writer:
        writer.start()
        writer.append(np.zeros((2, 1, 1), dtype=int), np.ones((2, 1, 1)), [1, 1], [1, 1])
    found = json.loads(json.dumps(measure(Trace.open(tmp_path / "t"))))
    drawn = draw(found)
    text = page(found | {"tokens": 1}, drawn)
    assert "1 token from 2 domains" in text
    assert "chose 1 of 1 expert." in text
    assert "reaches 100.0% of the maximum entropy" in text
    assert "from all domains together and" not in text  # they are alike
    assert "only one token" in text
    for name in ("domains-top-k", "load", "vocabulary-experts"):
        ax = drawn[name].axes[0]
        assert all(place == int(place) for place in ax.get_xticks()), name


def test_each_expert_and_its_ids(numbers):
    axes = draw(numbers)["vocabulary-experts"].axes
    for ax, key in zip(axes, ("experts", "experts_predicted"), strict=True):
        wanted = numbers["layers"]["2"]["vocabulary"][key]
        heights = [bar.get_height() for bar in ax.patches]
        assert heights == pytest.approx([np.nan if v is None else 100 * v for v in wanted], nan_ok=True)
    values = [v for v in numbers["layers"]["2"]["vocabulary"]["experts"] if v is not None]
    assert f"{max(values):.0%}" in findings(numbers)["vocabulary-experts"]


@pytest.mark.parametrize(("layers", "k"), [(1, 1), (2, 1), (1, 3)])
def test_models_of_one_layer_or_one_expert_a_token(tmp_path, layers, k):
    found = measure(made(tmp_path / "t", layers, k))
    text = page(found, draw(found))
    assert ('id="flow"' in text) == (layers > 1)
    assert "<html" in text


def test_it_is_one_file_and_names_are_text(text):
    assert "<script" not in text
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]{0,30})""", text)
    assert addresses
    assert {address[:25] for address in addresses} == {"data:image/svg+xml;base64"}
    assert "<b>" not in text
    assert "m&lt;1&gt;" in text
    assert "<code>·&lt;i&gt;</code> <small>75%</small>" in text
    assert text.index("<code>⏎</code>") < text.index("<code>·&lt;i&gt;</code>")  # the most exclusive first


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(text, tmp_path, width):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    complaints, requests = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": width, "height": 800})
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on("request", lambda request: requests.append(request.url))
        shown.goto((tmp_path / "report.html").as_uri())
        sizes = shown.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.width])")
        scrolled = shown.evaluate("document.documentElement.scrollWidth")
        captions = shown.locator("figcaption").all_inner_texts()
        paper = shown.pdf()
        browser.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("data:", "file:"))] == []
    assert len(sizes) == len(captions) == len(FIGURES) + 1
    assert all(natural > 0 and 300 < seen <= width for natural, seen in sizes)  # each image could be drawn
    assert scrolled <= width
    assert all(captions)
    assert paper.startswith(b"%PDF")
