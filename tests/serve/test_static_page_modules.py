"""The page's own parsers, in the Chromium that runs the page: Markdown, server-sent events, routing, comparison."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from page_browser import browser, opened_once  # noqa: F401  (fixtures)

MARKDOWN = """async (source) => {
  const { renderMarkdown } = await import("/page/markdown.js");
  const made = document.createElement("div");
  made.append(renderMarkdown(source));
  return made.innerHTML;
}"""
SSE = """async (parts) => {
  const { EventParser } = await import("/page/sse.js");
  const parser = new EventParser();
  return [...parts.flatMap((part) => parser.push(new Uint8Array(part))), ...parser.end()];
}"""


@pytest.fixture
def markdown(opened_once):  # noqa: F811
    return lambda source: opened_once.page.evaluate(MARKDOWN, source)


@pytest.fixture
def events(opened_once):  # noqa: F811
    return lambda parts: opened_once.page.evaluate(SSE, [list(part) for part in parts])


@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("plain", '<p>plain</p>'),
        ("two\nlines", '<p>two<br>lines</p>'),
        ("# Title #\ntext", '<h3 class="level-1">Title</h3><p>text</p>'),
        ("###### six", '<h6 class="level-6">six</h6>'),
        ("#no title", '<p>#no title</p>'),
        ("*a* **b** ***c*** _d_ __e__ ~~f~~", '<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> '
         "<em>d</em> <strong>e</strong> <del>f</del></p>"),
        ("**bold *and* more**", '<p><strong>bold <em>and</em> more</strong></p>'),
        ("2 * 3 * 4, snake_case_name, a**b", '<p>2 * 3 * 4, snake_case_name, a**b</p>'),
        ("*open **inner** end", '<p>*open <strong>inner</strong> end</p>'),
        ("`a*b*` ``c`d`` `open", '<p><code>a*b*</code> <code>c`d</code> `open</p>'),
        (r"\*not\* \a", r'<p>*not* \a</p>'),
        ("a &amp; &lt;b&gt; &copy;", '<p>a &amp; &lt;b&gt; &amp;copy;</p>'),
        ("- a\n- b\n  - c\n\n1) one\n2) two", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li></ul>"
         "<ol><li><p>one</p></li><li><p>two</p></li></ol>"),
        ("3. three\n4. four", '<ol start="3"><li><p>three</p></li><li><p>four</p></li></ol>'),
        ("text\n- item", '<p>text</p><ul><li><p>item</p></li></ul>'),
        ("in 1986. was\n1986. good", '<p>in 1986. was<br>1986. good</p>'),
        ("> a\n> - b\nc", '<blockquote><p>a</p><ul><li><p>b<br>c</p></li></ul></blockquote>'),
        ("a\n\n---\n\nb", '<p>a</p><hr><p>b</p>'),
    ],
)  # fmt: skip
def test_markdown(markdown, source, html):
    assert markdown(source).replace('<p class="tight">', "<p>") == html


def test_markdown_code_blocks(markdown):
    made = markdown("```python\nif a < b:\n\n    c = '**x**'\n```\nafter")
    assert "<code>if a &lt; b:\n\n    c = '**x**'</code>" in made
    assert "<span>python</span>" in made
    assert made.endswith("<p>after</p>")
    assert "<code>open\n&lt;b&gt;</code>" in markdown("~~~\nopen\n<b>")  # as it is while it streams
    assert "<code>a\n  b</code>" in markdown("- x\n  ```\n  a\n    b\n  ```")


def test_markdown_tables(markdown):
    made = markdown("| a | b | c |\n|:--|:-:|--:|\n| 1 | `x\\|y` | |\n| 2 |\n\nend")
    assert made.count("<tr>") == 3
    assert '<th class="align-left">a</th><th class="align-center">b</th><th class="align-right">c</th>' in made
    assert '<td class="align-left">2</td><td class="align-center"></td>' in made
    assert made.endswith("<p>end</p>")
    assert "<table>" not in markdown("a | b\nno rule")


@pytest.mark.parametrize(
    ("source", "href"),
    [
        ("[a](https://example.org/x)", "https://example.org/x"),
        ("[a](<https://example.org/a b>)", "https://example.org/ab"),
        ("[a](https://example.org/(x)_y 'title')", "https://example.org/(x)_y"),
        ("<https://example.org>", "https://example.org/"),
        ("see https://example.org/a_b_c, and", "https://example.org/a_b_c"),
        ("(https://example.org/a)", "https://example.org/a"),
        ("[a](mailto:a@example.org)", "mailto:a@example.org"),
        ("![alt](https://example.org/i.png)", "https://example.org/i.png"),
        ("[a](javascript:alert(1))", None),
        ("[a](JaVaScRiPt:alert(1))", None),
        ("[a](java\tscript:alert(1))", None),
        ("[a](<java\u0001script:alert(1)>)", None),
        ("[a](\u0001javascript:alert(1))", None),
        ("[a](data:text/html,<script>alert(1)</script>)", None),
        ("[a](vbscript:x)", None),
        ("[a](file:///etc/passwd)", None),
        ("[a](blob:https://example.org/x)", None),
        ("[a](//example.org/x)", None),
        ("[a](/v1/models)", None),
        ("[a](https://)", None),
        ("<javascript:alert(1)>", None),
        ("javascript:alert(1)", None),
        ("[a](https&#58;//example.org)", None),
    ],
)
def test_links_have_harmless_schemes(opened_once, source, href):  # noqa: F811
    found = opened_once.page.evaluate(
        """async (source) => {
          const { renderMarkdown } = await import("/page/markdown.js");
          const made = document.createElement("div");
          made.append(renderMarkdown(source));
          return [made.querySelector("a")?.href ?? null, made.querySelector("a")?.rel ?? null,
            [...made.querySelectorAll("*")].map((node) => node.localName)];
        }""",
        source,
    )
    assert found[0] == href
    if href is not None:
        assert found[1] == "noopener noreferrer nofollow"
    assert set(found[2]) <= {"p", "a"}


def test_markdown_creates_only_allowed_nodes(markdown):
    for tag in ("img", "script", "iframe", "svg", "style", "math", "form", "input", "base", "meta", "link"):
        blocks = (f"<{tag} src=x onerror=alert(1)>", f"- <{tag}>", f"> <{tag}>", f"| <{tag}> |\n| --- |\n| <{tag}> |")
        source = "\n\n".join(blocks) + f"\n\n```{tag}\n<{tag}>\n```"
        assert f"<{tag}" not in markdown(source)


@pytest.mark.parametrize(
    "source",
    [
        "*" * 20_000, "*a " * 8_000, "**a*b" * 6_000, "[" * 20_000, "[a](" * 8_000,
        "`" * 1_000 + "".join("`" * n + "x" for n in range(200)),
        "> " * 8_000 + "x", "".join("  " * n + "- x\n" for n in range(300)),
        "| a " * 6_000 + "|\n" + "|-" * 6_000 + "|", "<" * 20_000,
        "# " + " " * 20_000 + "x", "_a_b" * 8_000, "http" * 8_000, "&amp" * 8_000,
        "~" * 20_000, "- " * 8_000, "a\n" * 20_000,
        "1. a\n\n" * 4_000, "[a](<" * 6_000, "https://example.org/)" * 2_000,
    ],
    ids=lambda source: source[:12].replace("\n", "¶"),
)  # fmt: skip
def test_no_text_hangs_the_page(opened_once, source):  # noqa: F811
    """Quadratic work would take minutes here; the limit allows for busy machines."""
    took = opened_once.page.evaluate(
        """async (source) => {
          const { renderMarkdown } = await import("/page/markdown.js");
          const start = performance.now();
          renderMarkdown(source);
          return performance.now() - start;
        }""",
        source,
    )
    assert took < 5_000


def test_streamed_markdown_ends_like_the_whole_text(opened_once):  # noqa: F811
    """However it is split, and unchanged blocks keep their nodes."""
    source = "# A\n\ntext **bold** and `co\nde`\n\n- a\n- b\n\n  c\n\n"
    source += "```js\nlet x = 1;\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> q\n\nend"
    same = opened_once.page.evaluate(
        """async (source) => {
          const { renderMarkdown, GrowingMarkdown } = await import("/page/markdown.js");
          const whole = document.createElement("div");
          whole.append(renderMarkdown(source));
          const grown = document.createElement("div");
          const growing = new GrowingMarkdown(grown);
          let first = null;
          for (let n = 1; n <= source.length; n++) {
            growing.update(source.slice(0, n));
            if (n === 10) first = grown.firstChild;
            const once = document.createElement("div");
            once.append(renderMarkdown(source.slice(0, n)));
            if (once.innerHTML !== grown.innerHTML) return source.slice(0, n);
          }
          return whole.innerHTML === grown.innerHTML && grown.firstChild === first;
        }""",
        source,
    )
    assert same is True


def test_every_character_shown_maps_to_the_source(opened_once):  # noqa: F811
    source = "# A *b*\n\n- x `y` \\* &amp; [l](https://e.org)\n  > q **r**\n\n"
    source += "| a | b |\n|--|--|\n| c | d\u00fc🦊 |\n\n```\n  z\n```"
    pairs = opened_once.page.evaluate(
        """async (source) => {
          const { renderMarkdown } = await import("/page/markdown.js");
          const pairs = [];
          const leaf = (text, offsets) => {
            [...Array(text.length).keys()].forEach((i) => pairs.push([text[i], source[offsets[i]]]));
            return document.createTextNode(text);
          };
          renderMarkdown(source, leaf);
          return pairs;
        }""",
        source,
    )
    assert len(pairs) > 20
    assert [pair for pair in pairs if pair[0] != pair[1]] == []


STREAM = (
    ': keep-alive\n\ndata: {"a": "grün 🦊"}\r\n\r\nevent: error\rdata: x\rdata:y\r\r'
    "data: p\r\ndata: q\r\n\r\nid: 3\nretry: 10\nnonsense\ndata\n\n:\n\ndata: last\n\ndata: [DONE]"
).encode()
EVENTS = [
    {"event": "message", "data": '{"a": "grün 🦊"}'}, {"event": "error", "data": "x\ny"},
    {"event": "message", "data": "p\nq"},
    {"event": "message", "data": ""},
    {"event": "message", "data": "last"}, {"event": "message", "data": "[DONE]"},
]  # fmt: skip


def test_whole_events_are_parsed(events):
    assert events([STREAM]) == EVENTS


def test_events_split_anywhere_are_parsed(events):
    for cut in range(len(STREAM) + 1):
        assert events([STREAM[:cut], STREAM[cut:]]) == EVENTS, cut
    for size in (1, 2, 3, 5):
        assert events([STREAM[i : i + size] for i in range(0, len(STREAM), size)]) == EVENTS


def test_routing_is_decoded(opened_once):  # noqa: F811
    halves = np.array([0.5, 0.25, 1, 0, 6e-8, 65504, -2, 0.1], np.float16)
    for dtype, none in ((np.uint8, 255), (np.uint16, 65535)):
        ids = np.array([0, 63, none, 7, 1, 2, 3, 4], dtype)
        wire = {
            "tokens": 2, "layers": 2, "k": 2, "dtype": np.dtype(dtype).name,
            "experts": base64.b64encode(ids.astype(ids.dtype.newbyteorder("<")).tobytes()).decode(),
            "weights": base64.b64encode(halves.astype("<f2").tobytes()).decode(),
        }  # fmt: skip
        found = opened_once.page.evaluate(
            """async (wire) => (await import("/page/routing.js")).decodeRouting(wire)
                 .map((r) => ({ experts: [...r.experts], weights: [...r.weights], k: r.k }))""",
            wire,
        )
        assert [r["experts"] for r in found] == [[0, 63, 65535, 7], [1, 2, 3, 4]]
        assert [w for r in found for w in r["weights"]] == halves.astype(float).tolist()
    wrong = {**wire, "tokens": 3}
    refused = opened_once.page.evaluate(
        """async (wire) => {
          const { decodeRouting } = await import("/page/routing.js");
          try { decodeRouting(wire); } catch (error) { return error.message; }
        }""",
        wrong,
    )
    assert refused == "The server sent routing of the wrong size for 3 tokens."


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ([1, 2, 3], [1, 2, 3], []), ([], [1, 2], [0, 1]), ([1, 2], [], []), ([1, 2, 3, 4], [1, 9, 3, 4], [1]),
        ([1, 2, 3], [1, 7, 2, 3], [1]), ([1, 2, 3, 4, 5], [1, 3, 8, 5], [2]), ([1, 2], [1, 2, 3], [2]),
        ([1, 1, 1], [1], []),
    ],
)  # fmt: skip
def test_changed_tokens_are_found(opened_once, before, now, changed):  # noqa: F811
    script = """async ([a, b]) => [...(await import("/page/diff.js")).changedTokens(a, b)].sort((x, y) => x - y)"""
    assert opened_once.page.evaluate(script, [before, now]) == changed


def test_long_answers_are_compared_in_bounded_memory(opened_once):  # noqa: F811
    script = """async () => {
      const { changedTokens } = await import("/page/diff.js");
      const a = Array.from({ length: 9000 }, (_, i) => i), b = a.map((n) => (n > 4 && n < 8995 ? -n : n));
      return changedTokens(a, b).size;
    }"""
    assert opened_once.page.evaluate(script) == 8990


def test_tokens_are_located_in_the_text(opened_once):  # noqa: F811
    """Characters of several tokens, text that lags, a stop string that never comes, and no bytes at all."""
    script = """async (steps) => {
      const { Answer } = await import("/page/answer.js");
      const answer = new Answer({ seed: 1, policy: [], model: null });
      const token = ([text, bytes], id) => ({ id, text, bytes, logprob: 0, top: [] });
      for (const [text, tokens] of steps) answer.take({ text, tokens: tokens.map(token), routes: [] });
      answer.close("stop");
      return answer.starts.map((start, i) => answer.text.slice(start, answer.ends[i]));
    }"""

    def places(steps):
        return opened_once.page.evaluate(script, json.loads(json.dumps(steps)))

    fox = list("🦊".encode())
    assert places([["a", [["a", [97]]]], ["", [["?", fox[:2]]]], ["🦊", [["?", fox[2:]]]]]) == ["a", "", "🦊"]
    assert places([["", [["ab", None]]], ["ab", [["c", None]]], ["c", []]]) == ["ab", "c"]
    assert places([["ab", [["ab", None], ["</s>", None]]]]) == ["ab", ""]
    assert places([["ab", [["ab", None], ["cST", None]]], ["c", [["OP", None]]]]) == ["ab", "c", ""]
    assert places([["a🦊b", [["a", None], ["\ufffd", None], ["\ufffd", None], ["b", None]]]]) == ["a", "", "", "🦊b"]
