"""A real Chromium with the chat page open, for its tests: fixtures to import, and what they watch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from page_backend import Backend, serving  # noqa: E402  (it needs what is looked for above)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for found in map(shutil.which, NAMES) if found), None)
VIOLATIONS = (
    "window.violations = []; addEventListener('securitypolicyviolation', (e) => violations.push(e.violatedDirective));"
)


class Opened:
    """A page of the browser on a server, with all that it asked for and complained of."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.address = address
        self.context = browser.new_context(viewport=options.pop("viewport", {"width": 1360, "height": 860}), **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.add_init_script(VIOLATIONS)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))

    def open(self) -> Any:
        self.page.goto(self.address)
        sync_api.expect(self.page.locator("#model")).not_to_have_text("connecting…")
        return self.page

    def ask(self, text: str, *, wait: bool = True) -> Any:
        """Sends a message; waits for the end of its answer, and returns its turn."""
        turns = self.page.locator(".turn").count()
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        turn = self.page.locator(".turn").nth(turns)
        if wait:
            self.ended(turn)
        return turn

    def ended(self, turn: Any) -> None:
        sync_api.expect(turn.locator(".answer-notes .meta")).to_be_visible(timeout=20_000)

    def comes(self, condition: Callable[[], Any], seconds: float = 20) -> bool:
        """Whether a condition comes true in time."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            self.page.wait_for_timeout(20)
        return True

    def forgive(self, part: str) -> None:
        """What the browser itself says of an answer with an error status is expected."""
        assert any(part in complaint for complaint in self.complaints), self.complaints
        self.complaints = [complaint for complaint in self.complaints if part not in complaint]

    def check(self) -> None:
        """Nothing went elsewhere, nothing broke the policy, nothing was complained of."""
        foreign = [url for url in self.requests if not url.startswith((self.address, "data:"))]
        assert foreign == []
        assert self.page.evaluate("violations") == []
        assert self.complaints == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; for each module anew, since playwright's loop must not outlive the tests that use it."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def backend() -> Iterator[tuple[Backend, str]]:
    made = Backend()
    with serving(made.app) as address:
        yield made, address


@pytest.fixture
def opened(browser: Any, backend: tuple[Backend, str]) -> Iterator[Opened]:
    """The page in light colours on a wide screen; checked at the end of each test."""
    made = Opened(browser, backend[1], color_scheme="light")
    made.open()
    yield made
    made.check()
    made.context.close()


@pytest.fixture(scope="module")
def opened_once(browser: Any) -> Iterator[Opened]:
    """The same for a module whose tests leave the page as it is."""
    with serving(Backend().app) as address:
        made = Opened(browser, address)
        made.open()
        yield made
        made.check()
        made.context.close()
