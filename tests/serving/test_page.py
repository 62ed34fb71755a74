"""The page in a real browser: a mention with a picture, cards, hostile texts, keyboard, narrow screens, no network."""

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect

import dsmip
from dsmip.linking.bundle import Example
from dsmip.runs.run import Run
from dsmip.serving.app import create_app
from dsmip.serving.served import Source
from tests.support.cluster.ray_heads import wait_until
from tests.support.pages.browser import BROWSER_MARKS, running_chromium, watched_page
from tests.support.small_release import image_bytes

pytestmark = BROWSER_MARKS
HOSTILE = "<img src=x onerror=window.hurt=1><script>window.hurt=1</script>"


@pytest.fixture(scope="module")
def address(run: Run) -> Iterator[str]:
    linker = dsmip.load(run.folder)
    examples = [Example(word="red", sentence="a red thing, number 3"), Example(word=HOSTILE, sentence="in an example")]
    app = create_app(Source(lambda: linker, lambda: ""), name=f"colours {HOSTILE}", examples=examples)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, 60, "the service does not start")
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page, which may ask nobody but its service, and complains of nothing."""
    allowed = (address, "blob:", "data:")
    with watched_page(browser, address, allowed, lambda line: "Content Security" in line) as opened:
        yield opened


def cards(page: Page) -> Any:
    return page.locator("#cards .card")


def test_a_mention_with_a_picture_becomes_cards(page: Page, tmp_path: Path) -> None:
    picture = tmp_path / "mention.jpg"
    picture.write_bytes(image_bytes((40, 32), "green"))
    page.fill("#word", "green")
    page.fill("#sentence", "a green thing")
    page.set_input_files("#file", picture)
    expect(page.locator("#shown")).to_be_visible()
    page.click("#go")
    expect(cards(page)).to_have_count(5)
    first = cards(page).first
    expect(first.locator("h2")).not_to_be_empty()
    expect(first.locator("meter")).to_have_count(3)  # one for each expert
    expect(first.locator(".chosen")).to_have_count(1)
    assert page.evaluate("[...document.querySelectorAll('.card img')].every(i => i.complete && i.naturalWidth > 0)")
    expect(page.locator("#state")).to_contain_text("Best entities for “green”")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "wide.png", full_page=True)
        page.set_viewport_size({"width": 380, "height": 800})
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=Path(folder) / "narrow-dark.png", full_page=True)


def test_examples_the_keyboard_and_a_shared_address(page: Page, address: str) -> None:
    page.locator(".example").first.click()
    expect(cards(page)).to_have_count(5)
    page.click("#share")
    shared = page.url
    assert "#word=red" in shared
    page.goto("about:blank")
    page.goto(shared)
    expect(cards(page)).to_have_count(5)
    expect(page.locator("#word")).to_have_value("red")
    page.click("#clear")
    expect(cards(page)).to_have_count(0)
    page.keyboard.type("blue")  # the word has the focus
    page.keyboard.press("Enter")
    expect(cards(page)).to_have_count(5)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "drop"


def test_hostile_texts_stay_texts(page: Page) -> None:
    page.fill("#word", HOSTILE)
    page.fill("#sentence", HOSTILE)
    page.click("#go")
    expect(page.locator("#state")).to_contain_text(HOSTILE)
    page.route("**/link", lambda route: route.fulfill(json={"mentions": [hostile_answer()]}))
    page.click("#go")
    expect(cards(page).locator("h2")).to_contain_text(HOSTILE)
    expect(page.locator("#state.nil")).to_contain_text("not in the knowledge base")


def hostile_answer() -> dict[str, Any]:
    link = {"entity_id": HOSTILE, "name": HOSTILE, "attributes": HOSTILE, "score": 1.0, "confidence": 0.25}
    link |= {"expert": None, "image": "/entities/x/image", "parts": [{"name": HOSTILE, "score": 1.0, "share": 1.0}]}
    return {"id": "", "word": HOSTILE, "is_nil": True, "links": [link], "reason": None}


def test_what_is_refused_is_said(page: Page, tmp_path: Path) -> None:
    page.fill("#word", "red")
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.click("#go")
    expect(page.locator("#state.problem")).to_contain_text("unreadable")
    page.route("**/link", lambda route: route.abort())
    page.click("#go")
    expect(page.locator("#state.problem")).to_contain_text("does not answer")


HAND_IN = """
([kind, items]) => {
  const data = new DataTransfer();
  for (const [type, name, content] of items) {
    if (name) data.items.add(new File([Uint8Array.from(content)], name, { type }));
    else data.items.add(content, type);
  }
  const options = { bubbles: true, cancelable: true };
  const event = kind === "drop"
    ? new DragEvent("drop", { ...options, dataTransfer: data })
    : new ClipboardEvent("paste", { ...options, clipboardData: data });
  document.getElementById(kind === "drop" ? "drop" : "sentence").dispatchEvent(event);
}
"""
GREEN = ["image/jpeg", "green.jpg", list(image_bytes((40, 32), "green"))]
BLUE = ["image/jpeg", "blue.jpg", list(image_bytes((24, 32), "blue"))]
NOTES = ["text/plain", "<b>notes.txt", [104, 105]]
TEXT = ["text/plain", "", "a text"]


def width_shown(page: Page, kind: str, *items: list[Any]) -> Any:
    """Of the mention's picture in pixels once something is dropped or pasted; None: there is none."""
    page.evaluate(HAND_IN, [kind, items])
    return page.evaluate(
        "async () => { const shown = document.getElementById('shown'); if (shown.hidden) return null;"
        " await shown.decode(); return shown.naturalWidth; }"
    )


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_pictures_are_dropped_and_pasted_and_nothing_else_takes_their_place(page: Page, kind: str) -> None:
    state = page.locator("#state")
    assert width_shown(page, kind, TEXT) is None
    assert width_shown(page, kind, NOTES) is None
    expect(page.locator("#state.problem")).to_have_text("“<b>notes.txt” is no picture.")
    assert width_shown(page, kind, NOTES, GREEN) == 40
    expect(state).to_have_text("The picture is taken.")
    assert width_shown(page, kind, TEXT) == 40
    assert width_shown(page, kind) == 40
    expect(state).not_to_contain_class("problem")
    assert width_shown(page, kind, NOTES) == 40
    expect(page.locator("#state.problem")).to_be_visible()
    assert width_shown(page, kind, BLUE) == 24
    page.fill("#word", "blue")
    with page.expect_request("**/link") as asked:
        page.click("#go")
    assert b'filename="blue.jpg"' in (asked.value.post_data_buffer or b"")
    expect(cards(page)).to_have_count(5)
    page.focus("#drop")
    page.keyboard.press("Delete")
    expect(page.locator("#shown")).to_be_hidden()


DRAGGED = """
([kind, target, name]) => {
  const data = new DataTransfer();
  if (name) data.items.add(new File([], name, { type: "image/png" })); else data.items.add("a text", "text/plain");
  const event = new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: data });
  document.querySelector(target).dispatchEvent(event);
  return event.defaultPrevented;
}
"""


@pytest.mark.parametrize("kind", ["dragover", "drop"])
def test_text_is_dragged_into_a_field_and_files_anywhere(page: Page, kind: str) -> None:
    for target in ("#word", "#sentence"):
        assert not page.evaluate(DRAGGED, [kind, target, ""])
        assert page.evaluate(DRAGGED, [kind, target, "x.png"])
    assert page.evaluate(DRAGGED, [kind, "body", ""])  # a link would lead away


def test_a_chosen_file_that_is_no_picture_is_refused(page: Page) -> None:
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hi"})
    expect(page.locator("#state.problem")).to_have_text("“notes.txt” is no picture.")
    expect(page.locator("#shown")).to_be_hidden()


def lightness(page: Page, selector: str, name: str) -> float:
    """Of a colour of an element, from 0 to 1."""
    colour = page.evaluate("([s, n]) => getComputedStyle(document.querySelector(s))[n]", [selector, name])
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_its_colours_are_the_readers(page: Page, scheme: Literal["dark", "light"]) -> None:
    page.emulate_media(color_scheme=scheme)
    page.locator(".example").first.click()
    expect(cards(page)).to_have_count(5)
    is_dark = scheme == "dark"
    for selector in ("body", "#word", "#sentence", "#drop"):
        assert (lightness(page, selector, "backgroundColor") < 0.2) is is_dark, selector
        assert (lightness(page, selector, "backgroundColor") > 0.8) is not is_dark, selector
    for selector in ("body", "#word", "#sentence", ".card h2", ".card p"):
        assert (lightness(page, selector, "color") > 0.8) is is_dark, selector
        assert (lightness(page, selector, "color") < 0.2) is not is_dark, selector


def test_it_fits_a_narrow_screen(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    page.locator(".example").first.click()
    expect(cards(page)).to_have_count(5)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
