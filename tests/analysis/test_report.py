"""The page of an analysis: complete in itself, true to the numbers, and readable in a real browser and on a phone."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")

from olmoe.analysis.figures import draw, image_bytes, shown_layers
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
def text(numbers):
    return page(numbers, draw(numbers))


def test_figures_of_all_that_there_is(numbers):
    drawn = draw(numbers)
    assert list(drawn) == [*FIGURES, "agreement"]
    assert image_bytes(drawn["load"], "png").startswith(b"\x89PNG")
    assert b"<svg" in image_bytes(drawn["flow"], "svg")
    bars = drawn["domains-top-1"].axes[0].patches
    wanted = numbers["domains"]["<b>one & all"]["layers"]["0"]["top_1"]
    assert [bar.get_height() for bar in bars] == pytest.approx([100 * share for share in wanted])
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
    assert "m4 chooses 70.0% as well on average, least on $other$ in layer 4 (50.0%)" in said["agreement"]
    assert "no expert is unused" in said["load"]
    often = sum(numbers["layers"][layer]["often_together"] for layer in ("0", "2", "4"))
    assert f"{often} of 168 ordered pairs" in said["coactivation"]
    changed = numbers | {"layers": {k: v | {"dead": 2} for k, v in numbers["layers"].items()}}
    assert "10 experts of all layers took no token" in findings(changed)["load"]


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
