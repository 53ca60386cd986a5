"""The expert view in a real browser: light, tokens, load, bans and boosts, and their effects."""

from __future__ import annotations

import base64
import re

import pytest

from page_backend import EXPERTS, LAYERS, PER_TOKEN, routing, token_id
from page_browser import Opened, backend, browser, opened, sync_api  # noqa: F401  (fixtures)

expect = sync_api.expect
DARK = 7 + 40 + 44  # the colour of an unchosen expert, its components added
PIXELS = """() => {
  const cells = document.getElementById("cells");
  const { data } = cells.getContext("2d").getImageData(0, 0, cells.width, cells.height);
  return Array.from({ length: cells.width * cells.height }, (_, i) => data[4 * i] + data[4 * i + 1] + data[4 * i + 2]);
}"""


def light(page):
    """How bright each cell is, layer by layer."""
    pixels = page.evaluate(PIXELS)
    assert len(pixels) == LAYERS * EXPERTS
    return [pixels[layer * EXPERTS : (layer + 1) * EXPERTS] for layer in range(LAYERS)]


def at_rest(watched):
    """How bright the cells are once they have not changed for 0.3 s."""
    seen = [light(watched.page)]

    def rests():
        watched.page.wait_for_timeout(300)
        seen.append(light(watched.page))
        return seen[-1] == seen[-2]

    assert watched.comes(rests)
    return seen[-1]


def chosen_of(page):
    """A token's table: its experts and weights in each layer."""
    rows = page.locator(".token-experts tbody tr").all()
    labels = [[b.get_attribute("aria-label") for b in row.locator(".expert").all()] for row in rows]
    found = [[re.fullmatch(r"Layer (\d+), expert (\d+), weight ([\d.]+)", label) for label in row] for row in labels]
    assert [{int(m[1]) for m in row} for row in found] == [{layer} for layer in range(LAYERS)]
    return [[(int(m[2]), float(m[3])) for m in row] for row in found]


def expected_at(text, body, at):
    """What the server sends for a token at this position."""
    raw = base64.b64decode(routing([text.encode()], body, at)["experts"])
    return [list(raw[layer * PER_TOKEN : (layer + 1) * PER_TOKEN]) for layer in range(LAYERS)]


def test_the_picture_has_a_cell_for_each_expert(opened):  # noqa: F811
    page = opened.page
    expect(page.locator("#picture-caption")).to_have_text("4 layers, 64 experts each, 8 chosen per token")
    assert page.evaluate("getComputedStyle(document.getElementById('cells')).imageRendering") == "pixelated"
    assert {value for row in light(page) for value in row} == {DARK}


def test_experts_light_up_and_fade(opened):  # noqa: F811
    page = opened.page
    turn = opened.ask("slow", wait=False)
    expect(turn.locator(".token").nth(10)).to_be_visible()
    first = light(page)
    assert all(max(row) > 3 * DARK for row in first)
    assert sum(value == DARK for row in first for value in row) > 0
    assert opened.comes(lambda: light(page) != first)
    page.keyboard.press("Escape")
    opened.ended(turn)
    rested = at_rest(opened)  # the load of the answer stays, dimmer
    assert DARK < max(max(row) for row in rested) < max(max(row) for row in first)
    page.click("#new-chat")
    assert {value for row in light(page) for value in row} == {DARK}


def test_with_reduced_motion_the_last_token_stays(browser, backend):  # noqa: F811
    made = Opened(browser, backend[1], reduced_motion="reduce")
    page = made.open()
    turn = made.ask("slow", wait=False)
    expect(turn.locator(".token").nth(10)).to_be_visible()
    page.keyboard.press("Escape")
    made.ended(turn)
    assert made.comes(lambda: max(max(row) for row in light(page)) == 255 + 250 + 235)
    assert at_rest(made) == light(page)
    made.check()
    made.context.close()


def test_pointing_at_a_token_shows_its_experts(opened, backend):  # noqa: F811
    page = opened.page
    turn = opened.ask("Tell me")
    token = turn.locator(".token").nth(5)
    token.hover()
    text = token.text_content()
    (body,) = backend[0].bodies
    assert [[expert for expert, _ in row] for row in chosen_of(page)] == expected_at(text, body, 5)
    weights = [weight for _, weight in chosen_of(page)[0]]
    assert weights == sorted(weights, reverse=True)
    assert weights[:3] == pytest.approx([0.4, 0.2, 0.133], abs=1e-3)
    expect(page.locator(".token-text")).to_have_text(text.replace(" ", "·"))
    expect(page.locator(".token-head")).to_contain_text(f"token 6 of 26, id {token_id(text.encode())}")
    expect(page.locator(".token-probability")).to_have_text("probability 61 %")
    expect(page.locator(".alternatives li")).to_have_text([re.compile("61 %"), re.compile("other.*22 %")])
    # and only these cells light up
    for layer, row in enumerate(chosen_of(page)):
        lit = {expert for expert, value in enumerate(light(page)[layer]) if value > DARK}
        assert lit == {expert for expert, _ in row}
    page.mouse.move(5, 5)
    assert {expert for expert, value in enumerate(light(page)[0]) if value > DARK} != {e for e, _ in chosen_of(page)[0]}


def test_a_pinned_token_stays(opened):  # noqa: F811
    page = opened.page
    turn = opened.ask("Tell me")
    turn.locator(".token").nth(2).click()
    kept = page.locator(".token-text").text_content()
    turn.locator(".token").nth(9).hover()
    expect(page.locator(".token-text")).to_have_text(kept)
    expect(turn.locator(".token.looked")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("#unpin")).to_be_hidden()
    turn.locator(".token").nth(10).hover()
    expect(page.locator(".token-head")).to_contain_text("token 11 of 26")


def test_the_load_is_shown(opened):  # noqa: F811
    page = opened.page
    expect(page.locator("#load-summary")).to_have_text("Nothing has been generated yet.")
    opened.ask("Tell me")
    bars = page.locator("#histogram .bar")
    expect(bars).to_have_count(EXPERTS)
    shares = [float(bar.get_attribute("height")) for bar in bars.all()]
    busiest = max(range(EXPERTS), key=shares.__getitem__)
    assert busiest % 5 == 0  # the server prefers these
    summary = page.locator("#load-summary").text_content()
    assert re.match(
        rf"\d+ of 64 experts used; busiest E{busiest} [\d.]+ %, E\d+ [\d.]+ %, E\d+ [\d.]+ %; even would be 1.6 %.",
        summary,
    )
    expect(page.locator("#histogram")).to_have_attribute("aria-label", f"Load of the experts, all layers. {summary}")
    page.select_option("#load-layer", label="layer 2")
    assert [float(bar.get_attribute("height")) for bar in bars.all()] != shares
    page.select_option("#load-layer", label="all layers")
    opened.ask("And more")
    last = page.locator("#load-summary").text_content()
    page.select_option("#load-scope", label="conversation")
    assert page.locator("#load-summary").text_content() != last


def test_banning_changes_the_text(opened, backend):  # noqa: F811
    page = opened.page
    turn = opened.ask("Tell me")
    before = turn.locator(".answer-text").inner_text()
    turn.locator(".token").nth(5).click()
    expert = chosen_of(page)[2][0][0]
    page.locator(".token-experts tbody tr").nth(2).locator(".expert").first.click()
    menu = page.locator("#menu")
    expect(menu.locator(".menu-title strong")).to_have_text(f"Layer 2 · Expert {expert}")
    menu.get_by_role("menuitemradio", name="Ban").click()
    expect(menu).to_be_hidden()
    expect(page.locator("#chips .chip span")).to_have_text([f"Ban L2 · E{expert}"])
    page.get_by_text("Run the last answer again, same seed").click()
    opened.ended(turn)
    expect(turn.locator(".pager")).to_contain_text("2 / 2")
    first, second = backend[0].bodies
    assert "router_policy" not in first
    assert second["router_policy"] == {"ban": [{"layer": 2, "expert": expert}]}
    assert {**second, "router_policy": None} == {**first, "router_policy": None}
    after = turn.locator(".answer-text").inner_text()
    assert before.split()[:3] == after.split()[:3]
    changed = [i for i, (a, b) in enumerate(zip(before.split(), after.split(), strict=True)) if a != b]
    assert changed
    assert [span.text_content().strip() for span in turn.locator(".token.changed").all()]
    expect(turn.locator(".compared")).to_contain_text("differ from the previous answer; the first is token")
    expect(turn.locator(".meta")).to_contain_text(f"Ban L2 · E{expert}")
    expect(page.locator("#rerun")).to_be_hidden()
    for span in turn.locator(".token").all()[::5]:
        span.hover()
        assert expert not in [e for e, _ in chosen_of(page)[2]]
    # reset, and the first answer comes back
    page.click("#policy-reset")
    expect(page.locator("#chips li")).to_have_count(0)
    page.click("#rerun")
    expect(turn.locator(".pager")).to_contain_text("3 / 3")
    assert turn.locator(".answer-text").inner_text() == before


def test_changes_are_marked_while_streaming(opened):  # noqa: F811
    page = opened.page
    turn = opened.ask("slow", wait=False)
    expect(turn.locator(".token").nth(40)).to_be_visible()
    page.keyboard.press("Escape")
    opened.ended(turn)
    count = turn.locator(".token").count()
    turn.get_by_text("Same seed").click()
    expect(turn.locator(".token").nth(30)).to_be_visible()
    marked = "node => [...node.querySelectorAll('.token.changed')].map((token) => Number(token.dataset.token))"
    # Tokens beyond the earlier answer have nothing to be compared with.
    assert [token for token in turn.evaluate(marked) if token < count] == []
    page.keyboard.press("Escape")
    expect(turn.locator(".pager")).to_contain_text("2 / 2")
    page.locator("#histogram .column").nth(20).click()
    page.get_by_role("menuitemradio", name="Ban").click()
    page.click("#rerun")
    expect(turn.locator(".streaming .token.changed").first).to_be_visible()
    expect(turn.locator(".token").first).not_to_have_class(re.compile("changed"))
    page.keyboard.press("Escape")
    expect(turn.locator(".pager")).to_contain_text("3 / 3")


def test_experts_can_be_boosted_and_weakened_in_all_layers(opened, backend):  # noqa: F811
    page = opened.page
    opened.ask("Tell me")
    picture = page.locator("#picture").bounding_box()

    def click(layer, expert):
        x, y = (expert + 0.5) * picture["width"] / EXPERTS, (layer + 0.5) * picture["height"] / LAYERS
        page.mouse.click(picture["x"] + x, picture["y"] + y)

    page.mouse.move(picture["x"] + 3, picture["y"] + 3)
    expect(page.locator("#cell")).to_contain_text("Layer 0, expert 0 · ")
    click(1, 17)
    page.get_by_role("menuitemradio", name="Boost strongly").click()
    click(3, 63)
    page.get_by_role("menuitemcheckbox", name="In all layers").click()
    page.get_by_role("menuitemradio", name="Weaken").click()
    expect(page.locator("#chips .chip span")).to_have_text(["Boost L1 · E17 +4", "Weaken all layers · E63 −2"])
    page.mouse.move(picture["x"] + picture["width"] - 2, picture["y"] + 3)
    expect(page.locator("#cell")).to_contain_text("weakened by 2")
    page.click("#open-settings")
    page.fill("#set-k", "4")
    page.click("#close-settings")
    page.click("#rerun")
    expect(page.locator(".compared")).to_be_visible()
    policy = backend[0].bodies[1]["router_policy"]
    assert policy == {"boost": [{"layer": 1, "expert": 17, "bias": 4}, {"expert": 63, "bias": -2}], "k": 4}
    page.locator(".token").nth(4).hover()
    assert [len(row) for row in chosen_of(page)] == [4] * LAYERS
    click(1, 17)  # active changes are checked and can be undone
    expect(page.get_by_role("menuitemradio", name="Boost strongly")).to_have_attribute("aria-checked", "true")
    page.get_by_role("menuitemradio", name="Leave as it is").click()
    page.get_by_label("Remove: Weaken all layers · E63 −2").click()
    expect(page.locator("#chips .chip span")).to_have_text(["4 experts per token"])
    page.get_by_label("Remove: 4 experts per token").click()
    assert page.input_value("#set-k") == ""
    expect(page.locator("#policy-none")).to_be_visible()


def test_the_histogram_opens_the_menu(opened):  # noqa: F811
    page = opened.page
    opened.ask("Tell me")
    page.select_option("#load-layer", label="layer 1")
    page.locator("#histogram .column").nth(20).click()
    expect(page.locator(".menu-title strong")).to_have_text("Layer 1 · Expert 20")
    page.mouse.click(300, 300)
    expect(page.locator("#menu")).to_be_hidden()
    page.select_option("#load-layer", label="all layers")
    page.locator("#histogram .column").nth(20).click()
    expect(page.locator(".menu-title strong")).to_have_text("Expert 20")
    page.get_by_role("menuitemradio", name="Ban").click()
    expect(page.locator("#chips .chip span")).to_have_text(["Ban all layers · E20"])
    expect(page.locator("#histogram .bar.banned")).to_have_count(1)


def test_everything_works_with_the_keyboard_alone(opened, backend):  # noqa: F811
    """From an empty page to a changed answer without a mouse."""
    page = opened.page
    keys = page.keyboard
    expect(page.locator("#prompt")).to_be_focused()
    keys.type("Tell me")
    keys.press("Enter")
    opened.ended(page.locator(".turn"))

    def tab_to(selector, key="Tab"):
        for _ in range(40):
            keys.press(key)
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"{selector} cannot be reached by {key}")

    tab_to(".token", "Shift+Tab")
    first = page.locator(".token-head").text_content()
    assert "token 1 of 26" in first
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    expect(page.locator(".token-head")).to_contain_text("token 3 of 26")
    keys.press("End")
    expect(page.locator(".token-head")).to_contain_text("token 25 of 26")
    keys.press("Home")
    keys.press("ArrowRight")
    keys.press("Enter")  # pins
    expect(page.locator("#unpin")).to_be_visible()
    tab_to("#picture")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "End", "ArrowLeft", "ArrowUp", "ArrowDown"):
        keys.press(key)
    expect(page.locator("#cell")).to_contain_text("Layer 1, expert 62")
    keys.press("Enter")
    expect(page.get_by_role("menuitemradio", name="Leave as it is")).to_be_focused()
    keys.press("Escape")
    expect(page.locator("#picture")).to_be_focused()
    keys.press("Enter")
    keys.press("Home")
    expect(page.get_by_role("menuitemradio", name="Ban")).to_be_focused()
    keys.press("Enter")
    expect(page.locator("#picture")).to_be_focused()
    tab_to(".token-experts .expert")
    keys.press("Enter")
    keys.press("Home")
    keys.press("ArrowDown")
    keys.press("Enter")
    expect(page.locator("#chips li")).to_have_count(2)
    tab_to("#rerun", "Shift+Tab")
    keys.press("Enter")
    expect(page.locator(".compared")).to_be_visible()
    assert backend[0].bodies[1]["router_policy"]["ban"] == [{"layer": 1, "expert": 62}]
    tab_to(".chip-remove")
    keys.press("Enter")
    expect(page.locator("#chips li")).to_have_count(1)
    tab_to("#open-settings", "Shift+Tab")
    keys.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    keys.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#open-settings")).to_be_focused()
    tab_to('input[name="mode"]', "Shift+Tab")
    keys.press("ArrowRight")
    expect(page.locator("#prompt")).to_have_attribute("placeholder", "A text to continue…")


def test_every_control_has_a_name(opened):  # noqa: F811
    page = opened.page
    opened.ask("markdown")
    page.locator(".token").nth(3).click()
    page.locator(".token-experts .expert").first.click()
    page.evaluate("document.getElementById('settings').showModal()")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, [role=img], [role=application]")]
          .filter((node) => !(node.getAttribute("aria-label") || node.labels?.length || node.textContent.trim()))
          .map((node) => node.outerHTML)"""
    )
    assert nameless == []
    twice = page.evaluate(
        """() => [...document.querySelectorAll("[id]")].map((node) => node.id)
          .filter((id, i, all) => all.indexOf(id) !== i)"""
    )
    assert twice == []


def test_chat_works_on_a_server_without_routing(browser, backend):  # noqa: F811
    backend[0].without_routing = True
    made = Opened(browser, backend[1])
    page = made.open()
    expect(page.locator("#picture-caption")).to_have_text("This server does not say which experts it has.")
    expect(page.locator("#picture")).to_be_hidden()
    made.ask("Hello")
    assert "routing" not in backend[0].bodies[0]
    made.check()
    made.context.close()
