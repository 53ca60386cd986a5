"""How the page looks: light and dark, contrast, small screens."""

from __future__ import annotations

import pytest

from page_browser import Opened, backend, browser, sync_api  # noqa: F401  (fixtures)

expect = sync_api.expect


def test_colours_follow_the_system_until_changed(browser, backend):  # noqa: F811
    made = Opened(browser, backend[1], color_scheme="dark")
    page = made.open()

    def light():
        return page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])") > 128

    assert not light()
    page.click("#theme")
    assert light()
    page.reload()
    assert light()
    expect(page.locator("#theme")).to_have_attribute("aria-label", "Theme: light")
    page.click("#theme")
    assert not light()
    page.emulate_media(color_scheme="light")
    assert light()
    made.check()
    made.context.close()


CONTRAST = """() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number)
      .map((v) => (v /= 255, v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (/^rgb\\(/.test(colour)) return colour;
    }
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest(".off-screen, :disabled")) continue;
    const [a, b] = [getComputedStyle(node).color, behind(node)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const said = `${node.className || node.localName} ${node.textContent.trim().slice(0, 20)} ${ratio.toFixed(2)}`;
    if (ratio < 4.5) poor.push(said);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(browser, backend, scheme):  # noqa: F811
    """WCAG AA: 4.5 to 1 for every text, also of chips, errors, code, and tokens that have changed."""
    made = Opened(browser, backend[1], color_scheme=scheme)
    page = made.open()
    assert page.evaluate(CONTRAST) == []
    made.ask("markdown")
    made.ask("error")
    turn = made.ask("long")
    turn.locator(".token").nth(3).click()
    page.locator(".token-experts .expert").nth(0).click()
    assert page.evaluate(CONTRAST) == []
    page.get_by_role("menuitemradio", name="Ban").click()
    page.locator(".token-experts .expert").nth(9).click()
    page.get_by_role("menuitemradio", name="Boost strongly").click()
    page.click("#rerun")
    expect(turn.locator(".compared")).to_be_visible()
    assert page.evaluate(CONTRAST) == []
    page.click("#open-settings")
    assert page.evaluate(CONTRAST) == []
    made.check()
    made.context.close()


def test_the_page_fits_a_narrow_screen(browser, backend):  # noqa: F811
    made = Opened(browser, backend[1], viewport={"width": 380, "height": 740}, has_touch=True, is_mobile=True)
    page = made.open()
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) <= 0
    turn = made.ask("markdown")
    assert page.evaluate(overflow) <= 0
    picture, answer = page.locator("#picture").bounding_box(), turn.bounding_box()
    assert picture["width"] > 300  # visible above the conversation
    assert picture["y"] + picture["height"] < page.locator("#turns").bounding_box()["y"] + 1
    assert answer["width"] > 300
    expect(page.locator("#send")).to_be_in_viewport()
    expect(page.locator("#histogram")).to_be_hidden()
    turn.locator("strong .token").first.tap()
    expect(page.locator("#view-experts")).to_have_text("Experts of “bold”")
    page.click("#view-experts")
    expect(page.locator("#histogram")).to_be_visible()
    expect(page.locator(".token-experts")).to_be_visible()
    expect(page.locator("#prompt")).to_be_hidden()
    assert page.evaluate(overflow) <= 0
    page.click("#view-chat")
    expect(page.locator("#prompt")).to_be_visible()
    page.click("#open-settings")
    box = page.locator("#settings").bounding_box()
    assert box["x"] >= 0
    assert box["width"] <= 380
    made.check()
    made.context.close()
