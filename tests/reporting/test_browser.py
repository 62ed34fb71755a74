"""The page of a report in a real browser, from a file: filters, a mention's address, hostile texts, no network."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from dsmip.reporting.page import ReportOptions, write_report
from tests.support.pages.browser import BROWSER_MARKS, running_chromium, watched_page
from tests.support.small_release import HOSTILE

pytestmark = BROWSER_MARKS


@pytest.fixture(scope="module")
def one(made_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "one.html"
    write_report(path, made_run)
    return path.as_uri()


@pytest.fixture(scope="module")
def two(made_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "two.html"
    write_report(path, made_run, made_run, options=ReportOptions(models=(None, "text")))
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser, one: str) -> Iterator[Page]:
    """The page, which asks nobody for anything and complains of nothing."""
    folder = one.rpartition("/")[0].rpartition("/")[0]
    with watched_page(browser, one, ("data:", folder), lambda line: True) as opened:
        yield opened


def count(page: Page) -> int:
    return int((page.locator("#state").text_content() or "").split()[0])


def test_filters_choose_mentions(page: Page) -> None:
    cards = page.locator(".mention")
    assert count(page) == 24
    expect(cards).to_have_count(20)
    page.locator("#more").focus()
    page.keyboard.press("Enter")
    expect(cards).to_have_count(24)
    expect(page.locator("#more")).to_be_hidden()
    page.select_option("#outcome", "right")
    right = count(page)
    expect(page.locator(".mention .badge.bad")).to_have_count(0)
    page.select_option("#outcome", "wrong")
    assert count(page) == 24 - right
    expect(page.locator(".mention .badge.good", has_text=re.compile("^right$"))).to_have_count(0)
    page.select_option("#outcome", "all")
    by_expert = []
    for value in ("0 0", "0 1", "0 2"):
        page.select_option("#expert", value)
        by_expert.append(count(page))
    assert sum(by_expert) == 24
    page.select_option("#expert", "")
    parts = []
    for value in ("agree", "disagree"):
        page.select_option("#own", value)
        parts.append(count(page))
    assert sum(parts) == 24
    page.select_option("#own", "all")
    page.select_option("#group", label="picture: mention+entity")
    found = count(page)
    assert 0 < found < 24
    expect(page.locator(".mention .badge", has_text="picture: mention+entity")).to_have_count(found)
    page.select_option("#group", label=f"kind: {HOSTILE}")
    assert count(page) > 0
    page.select_option("#group", "")
    page.fill("#text", "number 50")
    assert count(page) == 1
    page.fill("#text", "")
    page.select_option("#order", "worst")
    ranks = page.locator(".answer h4").all_text_contents()
    numbers = [float(re.search(r"rank is ([\d.]+)", rank)[1]) for rank in ranks]  # type: ignore[index]
    assert numbers == sorted(numbers, reverse=True)


def test_the_address_of_a_mention_opens_it(page: Page, one: str) -> None:
    hostile = page.locator(".mention h3 a", has_text=HOSTILE).first
    address = hostile.get_attribute("href") or ""
    assert address.startswith("#mention=m")
    page.goto("about:blank")
    page.goto(one + address)
    expect(page.locator(".mention")).to_have_count(1)
    expect(page.locator(".mention h3")).to_contain_text(HOSTILE)
    assert page.evaluate("document.activeElement.classList.contains('mention')")
    assert page.evaluate("[...document.querySelectorAll('.mention img')].every(i => i.complete && i.naturalWidth > 0)")
    page.click("#all")
    expect(page.locator(".mention")).to_have_count(20)
    page.locator(".mention h3 a").nth(1).click()
    expect(page.locator(".mention")).to_have_count(1)
    page.goto(f"{one}#mention=nobody")
    expect(page.locator("#state")).to_contain_text("Mention nobody is not on this page")
    assert page.locator(".mention").count() == 20


def test_hostile_texts_stay_texts(page: Page) -> None:
    page.fill("#text", "onerror")
    assert count(page) > 0
    first = page.locator(".mention").first
    expect(first.locator("blockquote mark")).to_have_text(HOSTILE)
    expect(first.locator(".entity.gold strong")).to_have_text(HOSTILE)
    assert page.locator("img[src='x']").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen(page: Page, two: str, one: str, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": 360, "height": 700})
    for address in (one, two):
        page.goto(address)
        expect(page.locator(".mention").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_what_one_of_two_runs_gets_right_and_the_other_wrong(page: Page, two: str) -> None:
    page.goto(two)
    cells = page.locator("#comparison table").nth(1).locator("tbody td")
    both, first, second, neither = (int(text) for text in cells.all_text_contents())
    for value, expected in (("both", both), ("first", first), ("second", second), ("neither", neither)):
        page.select_option("#outcome", value)
        assert count(page) == expected
    page.select_option("#outcome", "all")
    expect(page.locator(".mention").first.locator(".answer")).to_have_count(2)
