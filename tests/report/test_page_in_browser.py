"""The page in a real Chromium: sorting, filtering, opening runs, without requests, errors or, where axe-core is, barriers."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Page, chromium
from tests.report.test_page import HOSTILE
from tests.report.written_runs import share, write_run
from vipbench.harness.report.page.build import Options, build_page

AXE = Path(os.environ.get("AXE_CORE", "axe.min.js"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a page of runs of three methods."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        for shots in (1, 16):
            for method, right in (("coop", 60), ("vip", 70), ("kgcoop", 9)):
                write_run(folder, method, shots, seed, share(right + shots), classes=("nevus", HOSTILE))
    out = tmp_path_factory.mktemp("page") / "report.html"
    out.write_text(build_page([folder], Options(cards=0)), encoding="utf-8")
    return out.as_uri()


@pytest.fixture
def page(browser: Page, file: str) -> Iterator[Page]:
    """The page, opened anew; at the end there must be no error and no request but that for the file."""
    browser.look(1280)
    browser.open(file)
    yield browser
    assert browser.errors == []
    assert {url.partition("#")[0] for url in browser.requests} == {file}


def column(page: Page, name: str) -> list[str]:
    return list(
        page.run(
            f"(() => {{ const place = $$('#list thead th').findIndex((cell) => cell.textContent === '{name}');"
            "return [...list.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[place].textContent) })()"
        )
    )


def test_sorts_by_number_and_by_text(page: Page) -> None:
    before = column(page, "accuracy")
    for name, order in (("accuracy", float), ("method", str)):
        page.run(f"$$('#list button.sort').find((button) => button.textContent === '{name}').click()")
        assert column(page, name) == sorted(column(page, name), key=order)
        assert page.run("$('#list [aria-sort]').getAttribute('aria-sort')") == "ascending"
        page.run("$('#list [aria-sort] button').click()")
        assert column(page, name) == sorted(column(page, name), key=order, reverse=True)
        assert page.run("$('#list [aria-sort]').getAttribute('aria-sort')") == "descending"
    assert sorted(column(page, "accuracy")) == sorted(before) != before


def test_filters_by_words_and_comparisons(page: Page) -> None:
    for text, count in (("", 12), ("vip", 4), ("method=coop shots=16", 2), ("accuracy>70", 6), ("accuracy<0", 0)):
        page.run(f"filter.value = {text!r}; filter.dispatchEvent(new Event('input'))")
        page.wait(f"shown.textContent === '{count} of 12 runs'")
        assert len(column(page, "method")) == count


def test_keyboard_opens_a_number_its_run_and_closes(page: Page) -> None:
    page.run("$('#tables td a').focus()")
    page.press("Enter", 13, "\r")
    page.wait("panel.open && $$('tbody tr', panel).length === 2")
    assert page.run("$('.command', panel).textContent.split('\\n').length") == 2
    page.run("$('tbody a', panel).focus()")
    page.press("Enter", 13, "\r")
    page.wait("!!$('table.samples', panel)")
    assert page.run("$$('table.samples tr.mistake').length") == 39, "61 of 100 are right; the rest is shown first"
    page.run("which.value = 'all'; which.dispatchEvent(new Event('change'))")
    page.run("$('[data-samples] > button', panel).click()")
    assert page.run("$$('table.samples tbody tr', panel).length") == 100
    assert HOSTILE in page.run("panel.textContent")
    page.press("Escape", 27)
    page.wait("!panel.open")
    assert page.run("document.activeElement.closest('#tables') !== null"), "the focus is where it was"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_fits_the_window_and_has_contrast(page: Page, width: int, dark: bool) -> None:
    page.look(width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    page.run("$('#list a').click()")
    page.wait("!!$('table.samples', panel)")
    assert page.run("panel.scrollWidth") <= width
    back, text = page.run("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (back, text) == (
        ("rgb(15, 19, 24)", "rgb(230, 237, 243)") if dark else ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
    )


def test_prints_light_within_the_paper_and_with_what_is_folded(browser: Page, tmp_path: Path) -> None:
    for shots in (1, 2, 4):
        for seed in (1, 2):
            for method in ("coop", "vip"):
                write_run(tmp_path, method, shots, seed, share(50 + 7 * shots + seed))
    out = tmp_path / "report.html"
    out.write_text(build_page([tmp_path], Options(cards=0)), encoding="utf-8")
    browser.look(718)  # A4 less margins
    browser.open(out.as_uri())
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.call("Emulation.setEmulatedMedia", media="print", features=[scheme])
    assert browser.run("document.documentElement.scrollWidth") <= 718
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    folded = browser.run("$('details.note').getBoundingClientRect().height")
    assert folded > 3 * browser.run("$('details.note summary').getBoundingClientRect().height")
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
    assert browser.errors == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_serious_barrier(page: Page, dark: bool) -> None:
    if not AXE.is_file():
        pytest.skip("needs AXE_CORE, the path of axe.min.js; .ci/run fetches it from npm")
    page.look(1280, dark=dark)
    page.run(AXE.read_text(encoding="utf-8"))
    for opened in (False, True):
        if opened:
            page.run("$('#list a').click()")
            page.wait("!!$('table.samples', panel)")
        found = page.run("axe.run(document).then(({ violations }) => violations)")
        serious = [one for one in found if one["impact"] in ("serious", "critical")]
        assert not serious, [(one["id"], one["nodes"][0]["html"], one["nodes"][0]["failureSummary"]) for one in serious]


def test_reads_without_script(browser: Page, file: str) -> None:
    browser.look(1280)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(file)
        tree = browser.call("DOM.getDocument", depth=-1)["root"]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    found = browser.call("DOM.querySelectorAll", nodeId=tree["nodeId"], selector="#details article pre.command")
    assert len(found["nodeIds"]) == 12
    assert browser.errors == []


def test_packed_runs_open(browser: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipbench.harness.report.page.build.INLINE_BYTES", 0)
    monkeypatch.setattr("vipbench.harness.report.page.build.CHUNK", 2)
    for seed in (1, 2, 3):
        write_run(tmp_path / "runs", "vip", 16, seed, share(60 + seed))
    out = tmp_path / "report.html"
    out.write_text(build_page([tmp_path], Options(cards=0)), encoding="utf-8")
    browser.open(out.as_uri() + "#d2")
    browser.wait("panel.open && !!$('table.samples', panel)")
    assert browser.run("title.textContent") == "vip_16shot_seed3_data"
    assert browser.errors == []


def test_policy_refuses_what_is_not_ours(browser: Page, file: str) -> None:
    """The test of errors above can fail: a script that the page did not come with is refused, and seen."""
    browser.open(file)
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.x = 1' }))"
    )
    assert browser.run("window.x") is None
    assert any("Content Security Policy" in error for error in browser.errors)
