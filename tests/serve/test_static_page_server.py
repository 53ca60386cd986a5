"""The page in a real browser on a real server with olmoe-tiny: it shows what the engine did."""

from __future__ import annotations

import re

import pytest

from olmoe.serve.state import ServeSettings
from page_browser import Opened, browser, sync_api  # noqa: F401  (fixtures)

expect = sync_api.expect


@pytest.fixture
def story(browser, server):  # noqa: F811
    made = Opened(browser, server.url)
    page = made.open()
    page.get_by_text("Complete", exact=True).click()
    page.click("#open-settings")
    page.fill("#set-seed", "11")
    page.fill("#set-max_tokens", "40")
    page.click("#close-settings")
    yield made
    made.check()
    made.context.close()


def test_a_story_is_shown_with_its_experts(story, server):
    page = story.page
    expect(page.locator("#model")).to_have_text("olmoe-tiny")
    expect(page.locator("#picture-caption")).to_have_text("4 layers, 64 experts each, 8 chosen per token")
    turn = story.ask("Once upon a time")
    body = {"prompt": "Once upon a time", "seed": 11, "max_tokens": 40, "temperature": 0.7, "top_p": 0.95}
    status, answer, _ = server.call("/v1/completions", {**body, "logprobs": 0})
    assert status == 200
    (choice,) = answer["choices"]
    shown = turn.locator(".token:not(.unseen)")
    assert "".join(shown.all_text_contents()) == choice["text"]
    assert shown.all_text_contents() == [token for token in choice["logprobs"]["tokens"] if token in choice["text"]]
    expect(turn.locator(".meta")).to_contain_text("40 tokens")
    expect(turn.locator(".ended")).to_contain_text("cut off after 40 tokens")
    shown.nth(5).hover()
    expect(page.locator(".token-experts .expert")).to_have_count(32)
    expect(page.locator(".alternatives li").first).to_be_visible()
    expect(page.locator("#load-summary")).to_contain_text("of 64 experts used")


def test_banned_experts_are_not_chosen_and_boosted_ones_are(story):
    page = story.page
    turn = story.ask("The little girl looked at the")
    before = turn.locator(".answer-text").inner_text()
    turn.locator(".token").nth(3).click()
    gone = page.locator(".token-experts tbody tr").nth(0).locator(".expert .expert-id").first.inner_text()
    page.locator(".token-experts tbody tr").nth(0).locator(".expert").first.click()
    page.get_by_role("menuitemradio", name="Ban").click()
    page.locator(".token-experts tbody tr").nth(2).locator(".expert").last.click()
    forced = page.locator(".menu-title strong").inner_text().split()[-1]
    page.get_by_role("menuitemradio", name="Boost strongly").click()
    page.click("#rerun")
    expect(turn.locator(".compared")).to_be_visible()
    ids = [page.locator(f".token-experts tbody tr:nth-child({row}) .expert-id") for row in (1, 3)]
    found = []
    for token in turn.locator(".token:not(.unseen)").all():
        token.hover()
        assert gone not in ids[0].all_inner_texts()
        found.append(forced in ids[1].all_inner_texts())
    assert sum(found) > 0.9 * len(found) > 0
    after = turn.locator(".answer-text").inner_text()
    assert (after != before) == (turn.locator(".token.changed").count() > 0)
    # without the policy, the same bits again
    page.click("#policy-reset")
    page.click("#rerun")
    expect(turn.locator(".pager")).to_contain_text("3 / 3")
    assert turn.locator(".answer-text").inner_text() == before


def test_a_chat_works_and_a_too_long_prompt_is_reported(story, server):
    page = story.page
    page.get_by_text("Chat", exact=True).click()
    turn = story.ask("Tell me a story.")
    expect(turn.locator(".meta")).to_contain_text(re.compile(r"\d+ tokens"))
    expect(turn.locator(".failed")).to_have_count(0)
    assert turn.locator(".token").count() > 0
    refused = story.ask("word " * 2000)
    expect(refused.locator(".failed")).to_contain_text(re.compile("tokens"))
    story.forgive("400")
    assert server.idle()


def test_stopping_frees_the_engine(story, server):
    page = story.page
    page.click("#open-settings")
    page.fill("#set-max_tokens", "")
    page.click("#close-settings")
    page.get_by_text("Chat", exact=True).click()
    turn = story.ask("Tell me a long story.", wait=False)
    page.click("#send")
    story.ended(turn)
    assert server.idle()


def test_the_page_opens_without_a_key_and_asks_for_it(browser, run_server):  # noqa: F811
    running = run_server(ServeSettings(port=0, api_keys=("a-key-of-this-test",)))
    made = Opened(browser, running.url)
    page = made.open()
    expect(page.locator("#notice")).to_contain_text("Enter it under Settings.")
    page.locator("#notice").get_by_role("button").click()
    page.fill("#set-key", "a-key-of-this-test")
    page.press("#set-key", "Enter")
    expect(page.locator("#model")).to_have_text("olmoe-tiny")
    turn = made.ask("Hello")
    expect(turn.locator(".failed")).to_have_count(0)
    made.forgive("401")
    made.check()
    made.context.close()
