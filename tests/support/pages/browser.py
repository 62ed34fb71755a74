"""Pages in a real Chromium: its marks, the browser, and a page that asks nobody else and complains of nothing."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

_CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
BROWSER_MARKS = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(_CHROMIUM is None, reason="no Chromium; set CHROMIUM"),
]


@contextmanager
def running_chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def watched_page(
    browser: Browser, address: str, allowed: tuple[str, ...], is_complaint: Callable[[str], bool]
) -> Iterator[Page]:
    """A page that is open; requests to other addresses than those allowed, errors and complaints fail the test.

    Args:
        allowed: Beginnings of addresses.
        is_complaint: Whether a line of the console is one.
    """
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    opened, wrong = context.new_page(), list[str]()

    def only_allowed(route: Route) -> None:
        if route.request.url.startswith(allowed):
            route.continue_()
        else:
            wrong.append(route.request.url)
            route.abort()

    context.route("**/*", only_allowed)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda line: wrong.extend([line.text] * is_complaint(line.text)))
    opened.set_default_timeout(60_000)
    opened.goto(address)
    yield opened
    assert wrong == []
    assert opened.evaluate("window.hurt") is None
    context.close()
