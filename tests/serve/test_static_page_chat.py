"""The chat in a real browser: sending, streaming, stopping, editing, errors. Requests go to a scripted server."""

from __future__ import annotations

import re
import socket

import pytest

from page_backend import ATTACK, EMOJI, MARKDOWN
from page_browser import Opened, backend, browser, opened, sync_api  # noqa: F401  (fixtures)

expect = sync_api.expect


def answer_of(turn):
    return turn.locator(".answer-text")


def test_a_message_is_answered(opened, backend):  # noqa: F811
    page = opened.page
    expect(page.locator("#model")).to_have_text("olmoe-tiny")
    page.click("#open-settings")
    page.fill("#set-system", "Be brief.")
    page.fill("#set-seed", "7")
    page.fill("#set-top_k", "40")
    page.fill("#set-temperature", "")
    page.fill("#set-stop", "END\n\\n\\n")
    page.click("#close-settings")
    turn = opened.ask("Tell me")
    (body,) = backend[0].bodies
    assert body == {
        "model": "olmoe-tiny", "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me"}],
        "seed": 7, "top_k": 40, "top_p": 0.95, "max_tokens": 256, "stop": ["END", "\n\n"],
        "routing": True, "return_token_ids": True, "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    expect(turn.locator(".user-text")).to_have_text("Tell me")
    text = answer_of(turn).inner_text()
    assert re.fullmatch(r"(\w+ ){23}\w+\.", text)
    expect(turn.locator(".meta")).to_contain_text("26 tokens")
    expect(turn.locator(".meta")).to_contain_text("seed 7")
    expect(page.locator("#prompt")).to_be_focused()

    opened.ask("And then?")
    assert backend[0].bodies[1]["messages"][1:] == [
        {"role": "user", "content": "Tell me"}, {"role": "assistant", "content": text},
        {"role": "user", "content": "And then?"},
    ]  # fmt: skip


def test_settings_survive_a_reload_but_the_key_only_the_tab(opened, backend):  # noqa: F811
    page = opened.page
    page.click("#open-settings")
    page.fill("#set-min_p", "0.05")
    page.fill("#set-key", "secret")
    page.click("#close-settings")
    page.reload()
    assert page.input_value("#set-min_p") == "0.05"
    assert page.input_value("#set-key") == "secret"
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    opened.ask("Hello")
    assert backend[0].bodies[0]["min_p"] == 0.05
    assert backend[0].keys[-1] == "Bearer secret"
    other = opened.context.new_page()  # another tab
    other.goto(opened.address)
    assert other.input_value("#set-key") == ""
    assert other.input_value("#set-min_p") == "0.05"
    other.click("#open-settings")
    other.click("#settings-defaults")
    assert other.input_value("#set-min_p") == ""
    assert other.input_value("#set-temperature") == "0.7"


def test_a_setting_out_of_range_is_reported_and_not_sent(opened, backend):  # noqa: F811
    page = opened.page
    page.click("#open-settings")
    page.fill("#set-top_p", "7")
    expect(page.locator("#settings-error")).to_have_text("Top p must be from 0 to 1, not 7.")
    page.click("#close-settings")
    turn = opened.ask("Hello")
    expect(turn.locator(".failed")).to_have_text("Top p must be from 0 to 1, not 7. Change it under Settings.")
    assert backend[0].bodies == []


def test_markdown_is_rendered(opened):  # noqa: F811
    answer = answer_of(opened.ask("markdown"))
    expect(answer.locator("h3")).to_have_text("Of foxes")
    expect(answer.locator("strong").first).to_have_text("bold")
    expect(answer.locator("em")).to_have_text("italic")
    expect(answer.locator("a")).to_have_attribute("href", "https://example.org/a")
    expect(answer.locator("ul ul li")).to_have_text("nested")
    expect(answer.locator("ol li")).to_have_count(2)
    expect(answer.locator("blockquote")).to_have_text("quoted")
    expect(answer.locator("pre code")).to_have_text(
        "def reverse(items: list[int]) -> list[int]:\n    return items[::-1]"
    )
    expect(answer.locator("td").nth(1)).to_have_text("3")
    # in the token view, nothing of the source is hidden
    opened.page.click("#open-settings")
    opened.page.check("#set-source")
    opened.page.click("#close-settings")
    assert answer.evaluate("node => node.firstChild && node.textContent").startswith(MARKDOWN)


def test_answers_can_be_copied(opened):  # noqa: F811
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    turn = opened.ask("markdown")
    clipboard = "navigator.clipboard.readText()"
    turn.locator(".answer-notes").get_by_text("Copy").click()
    expect(turn.locator(".answer-notes").get_by_text("Copied")).to_be_visible()
    assert opened.page.evaluate(clipboard) == MARKDOWN
    turn.locator(".copy-code").click()
    expect(turn.locator(".copy-code")).to_have_text("Copied")
    assert opened.page.evaluate(clipboard) == "def reverse(items: list[int]) -> list[int]:\n    return items[::-1]"
    turn.locator(".user").get_by_text("Copy").click()
    assert opened.page.evaluate(clipboard) == "markdown"


def test_model_output_is_harmless(opened):  # noqa: F811
    turn = opened.ask("attack")
    answer = answer_of(turn)
    page = opened.page
    assert answer.locator("img, script, iframe, b, svg, object, form").count() == 0
    # What looks like a web address becomes a link; so does the picture, which is not fetched.
    hrefs = [a.get_attribute("href") for a in answer.locator("a").all()]
    assert hrefs == ["https://attacker.example/pixel.png", "https://attacker.example/"]
    assert "<img src=x onerror=" in answer.inner_text()
    for token in answer.locator(".token").all()[::9]:
        token.hover()
    # the same text as a message, as settings and in the other views
    page.click("#open-settings")
    page.fill("#set-system", ATTACK)
    page.check("#set-source")
    page.click("#close-settings")
    assert answer.locator("img, script, iframe, b, a").count() == 0
    opened.ask(ATTACK)
    assert page.locator(".turn img, .turn script, .turn iframe, #inspector img").count() == 0
    page.wait_for_timeout(100)
    assert page.evaluate("window.attacked") is None


def test_the_policy_blocks_injected_content(browser, backend):  # noqa: F811
    """If the page had a hole, the browser would still block inline scripts, other hosts and strings as HTML."""
    made = Opened(browser, backend[1])
    page = made.open()
    page.evaluate("""() => {
      const script = document.createElement("script");
      document.body.append(script);
      const image = document.createElement("img");
      image.src = "http://127.0.0.2:9/pixel.png";
      document.body.append(image);
    }""")
    assert (
        page.evaluate(
            "() => { try { document.body.innerHTML = '<b>x</b>'; return 'made'; } catch (e) { return e.name; } }"
        )
        == "TypeError"
    )
    failed = page.evaluate("fetch('http://127.0.0.2:9/').then(() => 'sent', (e) => e.name)")
    assert failed == "TypeError"
    refused = {"img-src", "connect-src", "require-trusted-types-for"}
    assert made.comes(lambda: refused <= set(page.evaluate("violations")))
    made.context.close()


def test_text_streams_and_can_be_stopped(opened, backend):  # noqa: F811
    page = opened.page
    turn = opened.ask("slow", wait=False)
    answer = answer_of(turn)
    expect(page.locator("#send")).to_have_text("Stop")
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(answer.locator(".token").nth(6)).to_be_visible()
    early = answer.inner_text()
    expect(answer.locator(".token").nth(20)).to_be_visible()
    assert answer.inner_text().startswith(early.strip())
    page.click("#send")
    opened.ended(turn)
    expect(turn.locator(".meta")).to_contain_text("stopped by you")
    expect(page.locator("#send")).to_have_text("Send")
    assert opened.comes(lambda: backend[0].aborted)
    assert backend[0].aborted == 1
    count = len(answer.inner_text().split())
    assert 8 < count < 300
    page.wait_for_timeout(100)
    assert len(answer.inner_text().split()) == count


def test_queued_requests_can_be_stopped_too(opened, backend):  # noqa: F811
    turn = opened.ask("silent", wait=False)
    assert opened.comes(lambda: backend[0].begun)
    opened.page.press("#prompt", "Escape")
    opened.ended(turn)
    expect(turn.locator(".meta")).to_contain_text("stopped by you")
    assert opened.comes(lambda: backend[0].aborted)
    assert backend[0].aborted == 1


def test_escape_stops_and_enter_waits_for_the_answer(opened, backend):  # noqa: F811
    page = opened.page
    turn = opened.ask("slow", wait=False)
    expect(answer_of(turn).locator(".token").nth(4)).to_be_visible()
    page.fill("#prompt", "next")
    page.press("#prompt", "Enter")
    assert len(backend[0].bodies) == 1
    assert page.input_value("#prompt") == "next"
    page.press("#prompt", "Escape")
    opened.ended(turn)
    page.press("#prompt", "Shift+Enter")
    page.keyboard.type("line")
    page.press("#prompt", "Enter")
    opened.ended(page.locator(".turn").nth(1))
    assert backend[0].bodies[1]["messages"][-1]["content"] == "next\nline"


def test_a_new_chat_can_start_while_an_answer_runs(opened, backend):  # noqa: F811
    page = opened.page
    turn = opened.ask("slow", wait=False)
    expect(answer_of(turn).locator(".token").nth(4)).to_be_visible()
    page.click("#new-chat")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#send")).to_have_text("Send")
    opened.ask("Hello")
    assert [message["content"] for message in backend[0].bodies[1]["messages"]] == ["Hello"]
    expect(page.locator(".turn")).to_have_count(1)


def test_an_answer_can_be_regenerated(opened, backend):  # noqa: F811
    turn = opened.ask("Tell me")
    first = answer_of(turn).inner_text()
    turn.get_by_text("Same seed").click()
    expect(turn.locator(".pager")).to_contain_text("2 / 2")
    expect(turn.locator(".compared")).to_have_text("No token differs from the previous answer.")
    assert answer_of(turn).inner_text() == first
    turn.get_by_text("Regenerate").click()
    expect(turn.locator(".pager")).to_contain_text("3 / 3")
    assert answer_of(turn).inner_text() != first
    expect(turn.locator(".compared")).to_contain_text("tokens differ from the previous answer")
    assert turn.locator(".token.changed").count() > 0
    seeds = [body["seed"] for body in backend[0].bodies]
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(len(body["messages"]) == 1 for body in backend[0].bodies)
    turn.get_by_label("Earlier version").click()
    turn.get_by_label("Earlier version").click()
    expect(turn.locator(".pager")).to_contain_text("1 / 3")
    assert answer_of(turn).inner_text() == first
    opened.ask("Go on")  # with the version that is shown
    assert backend[0].bodies[3]["messages"][1]["content"] == first
    expect(turn.get_by_text("Regenerate")).to_have_count(0)


def test_a_message_can_be_edited(opened, backend):  # noqa: F811
    page = opened.page
    opened.ask("First")
    turn = opened.ask("Second")
    opened.ask("Third")
    turn.get_by_text("Edit").click()
    box = turn.get_by_label("Edit the message")
    expect(box).to_be_focused()
    assert box.input_value() == "Second"
    box.press("Escape")
    expect(turn.locator(".user-text")).to_have_text("Second")
    turn.get_by_text("Edit").click()
    turn.get_by_label("Edit the message").fill("Changed")
    turn.get_by_label("Edit the message").press("Enter")
    opened.ended(page.locator(".turn").nth(1))
    expect(page.locator(".turn")).to_have_count(2)
    contents = [m["content"] for m in backend[0].bodies[3]["messages"] if m["role"] == "user"]
    assert contents == ["First", "Changed"]
    page.press("#prompt", "ArrowUp")
    expect(page.get_by_label("Edit the message")).to_be_focused()
    assert page.get_by_label("Edit the message").input_value() == "Changed"


def test_a_text_can_be_completed(opened, backend):  # noqa: F811
    page = opened.page
    page.get_by_text("Complete", exact=True).click()
    expect(page.locator("#prompt")).to_have_attribute("placeholder", "A text to continue…")
    turn = opened.ask("Once upon *a* time")
    (body,) = backend[0].bodies
    assert body["prompt"] == "Once upon *a* time"
    assert body["logprobs"] == 5
    assert "messages" not in body
    assert body["routing"] is True
    expect(turn.locator(".user-text")).to_have_text("Once upon *a* time")
    expect(answer_of(turn).locator(".token.unseen")).to_have_text("<|endoftext|>")
    text = answer_of(turn).inner_text().removesuffix("<|endoftext|>")
    turn.get_by_text("Continue").click()
    opened.ended(page.locator(".turn").nth(1))
    assert backend[0].bodies[1]["prompt"] == "Once upon *a* time" + text


@pytest.mark.parametrize("mode", ["Chat", "Complete"])
def test_characters_of_several_tokens_are_shown_whole(opened, mode):  # noqa: F811
    opened.page.get_by_text(mode, exact=True).click()
    turn = opened.ask("emoji")
    assert "".join(answer_of(turn).locator(".token:not(.unseen)").all_text_contents()) == EMOJI


def test_reaching_the_limit_is_shown(opened):  # noqa: F811
    turn = opened.ask("long")
    expect(turn.locator(".ended")).to_contain_text("cut off after 26 tokens")


@pytest.mark.parametrize(
    ("prompt", "sentence", "status"),
    [
        ("invalid", "`top_p` must be from 0 to 1, not 7.", 400),
        ("busy", "64 requests are waiting already. Try again in 3 seconds.", 503),
        ("error", "The engine stopped: out of memory.", 200),
        ("drop", "The connection ended before the answer did.", 200),
    ],
)
def test_errors_are_shown_as_sentences(opened, prompt, sentence, status):  # noqa: F811
    turn = opened.ask(prompt)
    expect(turn.locator(".failed")).to_have_text(sentence)
    if status == 200:
        assert answer_of(turn).inner_text() != ""  # the text received so far is kept
    else:
        opened.forgive(f"{status}")
    opened.ask("And now?")  # the page keeps working
    expect(opened.page.locator(".turn")).to_have_count(2)


def test_a_missing_key_is_asked_for(browser, backend):  # noqa: F811
    backend[0].key = "right"
    made = Opened(browser, backend[1])
    page = made.open()
    expect(page.locator("#notice")).to_contain_text("This server wants an API key. Enter it under Settings.")
    page.locator("#notice").get_by_role("button").click()
    page.fill("#set-key", "right")
    page.press("#set-key", "Enter")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#model")).to_have_text("olmoe-tiny")
    expect(page.locator("#notice")).to_be_hidden()
    made.ask("Hello")
    assert backend[0].keys[-1] == "Bearer right"
    made.forgive("401")
    made.check()
    made.context.close()


def test_an_unreachable_server_is_reported(opened):  # noqa: F811
    page = opened.page
    page.route("**/v1/**", lambda route: route.abort())
    turn = opened.ask("Hello")
    expect(turn.locator(".failed")).to_have_text("The server cannot be reached. Is it running, and on this address?")
    page.unroute("**/v1/**")
    turn.get_by_text("Regenerate").click()
    expect(turn.locator(".failed")).to_have_count(0)
    opened.forgive("ERR_FAILED")


def test_a_broken_connection_is_reported(browser):  # noqa: F811
    """The server dies in the middle of a chunk."""
    import threading

    from olmoe.serve.static_page import page_files

    listener = socket.create_server(("127.0.0.1", 0))
    pages = page_files()
    pages[""] = pages["index.html"]

    def serve(connection):
        with connection:
            path = connection.recv(65536).decode().split()[1].removeprefix("/").removeprefix("page/")
            if path == "v1/models":
                head, body = "Content-Type: application/json", b'{"data": [{"id": "m"}]}'
            elif path.startswith("v1/"):
                data = b'data: {"choices": [{"delta": {"content": "Half an"}, "finish_reason": null}]}\n\n'
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9999\r\n\r\n" + data
                )
                threading.Event().wait(0.5)  # received text is read before the end is noticed
                return
            else:
                head, body = f"Content-Type: {pages[path].media_type}", pages[path].content
            connection.sendall(
                f"HTTP/1.1 200 OK\r\n{head}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
            )

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    made = Opened(browser, f"http://127.0.0.1:{listener.getsockname()[1]}")
    made.open()
    turn = made.ask("Hello")
    expect(turn.locator(".failed")).to_have_text("The connection to the server was lost.")
    expect(answer_of(turn)).to_have_text("Half an")
    listener.close()
    made.context.close()
