"""The page of a suite in a real browser, from a file: nothing is refused or asked for, and it fits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from dsmip.suites.report import SuiteReport, protocol_tables, share_charts, write_report
from dsmip.suites.tables import figure_tables
from tests.support.pages.browser import BROWSER_MARKS, running_chromium, watched_page
from tests.support.pages.suite_results import ROWS, made_results, made_suite
from tests.support.small_release import HOSTILE

pytestmark = BROWSER_MARKS


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as started:
        yield started


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_whole_offline_and_fits(browser: Browser, tmp_path: Path, width: int) -> None:
    suite, results = made_suite(), made_results()
    tables = tuple(figure_tables(suite, ROWS, results, []))
    charts, protocols = tuple(share_charts(suite, ROWS, results)), tuple(protocol_tables(suite, results))
    write_report(tmp_path, SuiteReport("x", "Suite", HOSTILE, tables, charts, protocols))
    address = (tmp_path / "results.html").as_uri()
    with watched_page(browser, address, (address,), lambda line: True) as page:
        page.set_viewport_size({"width": width, "height": 700})
        expect(page.locator("h1")).to_have_text("Suite")
        expect(page.locator("header p").first).to_have_text(HOSTILE)
        expect(page.locator("svg.chart")).to_have_count(2)
        # the style sheet was let in: a line of a chart has its colour
        assert page.evaluate("getComputedStyle(document.querySelector('.line')).strokeWidth") == "2px"
        plain = "[...document.querySelectorAll('table.plain')]"
        assert page.evaluate(f"{plain}.every(each => each.offsetWidth <= each.parentElement.clientWidth)")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
