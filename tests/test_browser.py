"""The page in a real browser: Chromium without a window, driven by Selenium against the file itself."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ssgr import tables
from ssgr.records import Text
from ssgr.report import figures, page
from tests.conftest import ROOT
from tests.sweeps import grid, store, sweep

pytestmark = pytest.mark.xdist_group("browser")
SHOTS, PAPER = ROOT / "build" / "screenshots", ROOT / "outputs" / "paper" / "report.html"
GRID = grid(
    calib=["corpus", "ssgr", "matched"],
    difficulty=["any", "hard"],
    length=["any", "medium"],
    ratio=[0.4, 0.5],
    draw=[0, 1],
)
SECONDS, MIB = 5, 30  # what the issue asks of a page of 500 cells and 20,000 outcomes
CUT = """return [...document.querySelectorAll(".chart svg text")].filter((text) => {
  const [own, all] = [text, text.ownerSVGElement].map((one) => one.getBoundingClientRect());
  return own.width && (own.right > all.right + 1 || own.left < all.left - 1);
}).map((text) => text.textContent)"""
OFF_PAPER = """document.body.style.width = "718px"; // A4 between its margins
const off = [...document.querySelectorAll(".chart svg, .board table")].filter((one) =>
  one.getBoundingClientRect().right > one.parentElement.getBoundingClientRect().right + 1);
document.body.style.width = ""; return off.map((one) => one.outerHTML.slice(0, 200))"""
HOSTILE = {
    "script": "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>",
    "closes": "</script><script>window.hit = 3</script></pre></textarea></style><svg onload=window.hit=4>",
    "comment": "<!--<script>window.hit = 5",
    "link": "[press](javascript:window.hit=6) <a href='javascript:window.hit=7'>press</a>",
    "template": "{{ 7 * 7 }} ${7 * 7} {% raw %}",
    "ansi": "\x1b[31mred\x1b[0m\x1b]8;;http://x\x07link",
    "bidi": "right\u202etfel\u202c \u2066in\u2069 \u200f",
    "nulls": "a\x00b\x07c\x85d\u2028e\ufefff",
    "latex": r"$$\frac{1}{2} \href{javascript:window.hit=8}{x}$$ \boxed{42}",
    "emoji": "👩‍🔬🏳️‍🌈 ok 🧮",
    "long": "lo" * 100_000,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for the module, which notes what the page logs and what it asks a network for."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not there: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    out = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    out.set_script_timeout(180)  # axe takes seconds; beside the other tests of CI it has taken more than a minute
    yield out
    out.quit()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[page.Report, Path]:
    """The page of a grid of two draws."""
    folder = sweep(tmp_path_factory.mktemp("sweep"), GRID)
    store(folder)
    report = page.gather(*page.find([folder]))
    page.write(report, folder / "report.html")
    return report, folder / "report.html"


def scheme(dark: bool) -> list[dict[str, str]]:
    return [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]


def opened(browser: Any, file: Path, dark: bool = False, width: int = 1280) -> None:
    """Open a page as a light or dark, wide or narrow screen shows it."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme(dark)})
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(file.as_uri())


def draw_all(browser: Any) -> None:
    """Scroll to everything, and stay until it is there: a slow machine shows no frame of what is passed."""
    browser.execute_async_script(
        """const done = arguments[0];
        (async () => {
          const rest = () => new Promise((resolve) => setTimeout(resolve, 20));
          for (const one of document.querySelectorAll(".figure, .reader:has(.problem)")) {
            one.scrollIntoView();
            while (!one.matches("[data-drawn], [data-ready]")) await rest();
          }
          scrollTo(0, 0); await rest();
          done();
        })();"""
    )


def labels_drawn(browser: Any, script: str = "") -> list[str]:
    """The labels of the leaderboard's figure as it is once it is drawn, after a script that has it in `figure`."""
    found: list[str] = browser.execute_async_script(
        f"""const done = arguments[0];
        const figure = document.querySelector("[data-figure^=leaderboard]");
        {script}
        (async () => {{
          while (!figure.matches("[data-drawn]")) await new Promise((resolve) => setTimeout(resolve, 20));
          done(window.ssgr.drawn.get(figure).view.data("rows").map((row) => row.label));
        }})();"""
    )
    return found


def complaints(browser: Any) -> list[str]:
    return [one["message"] for one in browser.get_log("browser") if one["level"] == "SEVERE"]


def requests(browser: Any) -> set[str]:
    """Every address that the page asked for."""
    events = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}


def test_it_opens_and_draws_without_an_error_or_a_request(browser: Any, built: tuple[page.Report, Path]) -> None:
    report, file = built
    opened(browser, file)
    draw_all(browser)
    assert len(browser.find_elements("css selector", ".figure svg.marks")) == len(report.figures) > 12
    assert complaints(browser) == []
    asked = requests(browser)
    assert file.as_uri() in asked and {url for url in asked if not url.startswith("data:")} == {file.as_uri()}


def column(browser: Any, i: int) -> list[str]:
    script = """const rows = [...document.querySelectorAll(".board tbody tr")];
        return rows.filter((row) => !row.hidden).map((row) => row.cells[arguments[0]].dataset.value);"""
    found: list[str] = browser.execute_script(script, i)
    return found


def test_paper_has_the_figures_that_nobody_scrolled_to(browser: Any, built: tuple[page.Report, Path]) -> None:
    opened(browser, built[1])
    browser.execute_script(
        "addEventListener('afterprint', () => { window.printed = document.querySelectorAll('.chart svg').length; })"
    )
    browser.execute_cdp_cmd("Page.printToPDF", {})
    assert browser.execute_script("return window.printed") == len(built[0].figures)


def test_the_leaderboard_sorts_by_keyboard(browser: Any, built: tuple[page.Report, Path]) -> None:
    opened(browser, built[1])
    heads = browser.find_elements("css selector", ".board thead button")
    i = [head.text for head in heads].index("accuracy")
    cell = browser.find_elements("css selector", ".board thead th")[i]
    before = [float(value) for value in column(browser, i)]
    for order, way in (("ascending", 1), ("descending", -1)):
        heads[i].send_keys("\ue007")  # enter
        assert cell.get_attribute("aria-sort") == order
        assert [float(value) for value in column(browser, i)] == sorted(before, reverse=way < 0)
    assert before != sorted(before)


def test_sparsities_sort_by_their_zeros(browser: Any, tmp_path: Path) -> None:
    folder = sweep(tmp_path, [{"ratio": 0.3}, {"ratio": 0.6}, {"pattern": "2:4"}, {"pattern": "1:4", "ratio": 0.75}], 2)
    page.write(page.gather(*page.find([folder])), folder / "report.html")
    opened(browser, folder / "report.html")
    heads = browser.find_elements("css selector", ".board thead button")
    i = [head.text for head in heads].index("sparsity")
    heads[i].click()
    assert column(browser, i) == ["30 %", "2:4", "60 %", "1:4", ""]


def test_filters_by_text_and_field_reach_table_and_figure(browser: Any, built: tuple[page.Report, Path]) -> None:
    opened(browser, built[1])
    draw_all(browser)
    every = len(column(browser, 0))
    choice = browser.find_element("css selector", ".filters select[name=calib]")
    choice.find_element("css selector", "option[value=ssgr]").click()
    assert set(column(browser, 0)) == {"ssgr", ""}  # the dense model stays
    browser.find_element("css selector", ".filters input").send_keys("medium")
    left = column(browser, 0)
    assert 0 < len(left) < every and set(left) == {"ssgr"}
    assert browser.find_element("css selector", ".count").text == f"{len(left)} of {every} rows"
    shown = labels_drawn(browser)
    assert len(set(shown)) == len(left) and all("ssgr" in label and "medium" in label for label in shown)


def test_a_filter_that_comes_while_a_figure_is_drawn_is_kept(browser: Any, built: tuple[page.Report, Path]) -> None:
    opened(browser, built[1])
    shown = labels_drawn(
        browser,
        """const text = document.querySelector(".filters input");
        const filter = (value) => { text.value = value; text.dispatchEvent(new Event("input", {bubbles: true})); };
        window.ssgr.draw(figure);
        for (const value of ["medium", "nothing has this", "matched"]) filter(value);""",
    )
    assert shown and all("matched" in label for label in shown)


def plain(value: Any) -> float | str:
    """A number however it is written (1, 1.0 or 1e0), or a text."""
    try:
        return float(value)
    except ValueError:
        return str(value)


def plain_rows(rows: Iterable[dict[str, str]]) -> list[list[float | str]]:
    return [list(map(plain, row.values())) for row in rows]


def test_the_heat_map_has_the_numbers_of_the_csv(browser: Any, built: tuple[page.Report, Path]) -> None:
    report, file = built
    figure = next(one for one in report.figures if one.name.startswith("heat"))
    wanted = list(csv.DictReader(io.StringIO(figures.comma_separated(figure))))
    opened(browser, file)
    draw_all(browser)
    place = browser.find_element("css selector", "[data-figure^=heat]")
    seen = browser.execute_script("return window.ssgr.drawn.get(arguments[0]).view.data('rows')", place)
    assert [list(map(plain, (row[name] for name in figure.columns))) for row in seen] == plain_rows(wanted)
    browser.execute_script("arguments[0].scrollIntoView()", place)
    place.find_element("css selector", "summary").send_keys("\ue007")
    rows = [
        [c.text for c in row.find_elements("css selector", "td")]
        for row in place.find_elements("css selector", "tbody tr")
    ]
    assert [list(map(plain, row)) for row in rows] == plain_rows(wanted)
    drawn = browser.execute_script(
        "return [...arguments[0].querySelectorAll('svg text')].map((text) => text.textContent)", place
    )
    assert all(f"{float(row['value']):.3f}" in drawn and row["interval"] in drawn for row in wanted)


def test_the_csv_that_it_saves_is_that_of_the_figures_folder(
    browser: Any, built: tuple[page.Report, Path], tmp_path: Path
) -> None:
    report, file = built
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    opened(browser, file)
    figure = next(one for one in report.figures if one.name.startswith("differences"))
    for kind in ("csv", "svg", "png"):
        button = browser.find_element("css selector", f"[data-figure^=differences] [data-save={kind}]")
        browser.execute_script("arguments[0].click()", button)
        saved = tmp_path / f"{figure.name}.{kind}"
        for _ in range(1200):
            if saved.exists() and saved.stat().st_size:
                break
            time.sleep(0.05)
        if kind == "csv":
            wanted = csv.DictReader(io.StringIO(figures.comma_separated(figure)))
            assert plain_rows(csv.DictReader(io.StringIO(saved.read_text()))) == plain_rows(wanted)
        else:
            assert saved.read_bytes().startswith({"svg": b"<svg", "png": b"\x89PNG"}[kind])
    assert complaints(browser) == []


def test_the_reader_opens_a_trace(browser: Any, built: tuple[page.Report, Path]) -> None:
    opened(browser, built[1])
    draw_all(browser)
    reader = browser.find_element("css selector", ".reader")
    assert "What is 0 + 0?" in reader.text
    reader.find_element("css selector", "[name=next]").click()
    answers = reader.find_elements("css selector", ".answer")
    assert len(answers) == 13 and answers[0].text.startswith("dense")
    thought = answers[1].find_element("css selector", "details")
    assert not thought.find_element("css selector", "pre").is_displayed()
    thought.find_element("css selector", "summary").click()
    assert thought.find_element("css selector", "pre").text == "<think>so</think>"
    assert all(any(word in one.text for word in ("right", "wrong")) for one in answers)
    reader.find_element("css selector", "option[value=cut]").click()
    assert "cut at" in reader.text


def test_hostile_traces_are_text(browser: Any, tmp_path: Path) -> None:
    folder = sweep(tmp_path, [{}], problems=len(HOSTILE))
    for file in folder.glob("0/texts/*.parquet"):
        texts = tables.read_texts(file)
        evil = [
            Text(t.problem_id, 0, bad, bad[:400], bad, f"<think>{bad}</think>{bad}")
            for t, bad in zip(texts, HOSTILE.values(), strict=True)
        ]
        tables.write_texts(file, evil)
    report = page.gather(*page.find([folder]))
    page.write(report, folder / "report.html")
    opened(browser, folder / "report.html")
    draw_all(browser)
    shown: dict[str, str] = {}
    for option in browser.find_elements("css selector", "[name=problem] option"):
        option.click()
        for summary in browser.find_elements("css selector", ".answer summary"):
            summary.click()
        name = list(HOSTILE)[int(option.text.split("/")[1][:3])]
        shown[name] = browser.execute_script("return document.querySelector('.answer > pre').textContent")
        count = "return document.querySelectorAll('.problem script, .problem img, .problem a, .problem svg').length"
        assert browser.execute_script(count) == 0
    assert browser.execute_script("return window.hit") is None
    assert complaints(browser) == [] and len(requests(browser)) == 1
    for name in ("script", "closes", "comment", "link", "template", "latex", "emoji"):
        assert shown[name] == HOSTILE[name]
    assert shown["ansi"] == "␛[31mred␛[0m␛]8;;http://x␇link"
    assert shown["bidi"] == "right⟨U+202E⟩tfel⟨U+202C⟩ ⟨U+2066⟩in⟨U+2069⟩ ⟨U+200F⟩"
    assert shown["nulls"] == "a␀b␇c⟨U+0085⟩d⟨U+2028⟩e⟨U+FEFF⟩f"
    assert len(shown["long"]) < 10_000


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_serious(dark: bool, browser: Any, built: tuple[page.Report, Path]) -> None:
    import axe_core_python

    opened(browser, built[1], dark)
    draw_all(browser)
    for details in browser.find_elements("css selector", "[data-figure^=heat] details, .answer:first-child details"):
        browser.execute_script("arguments[0].open = true", details)
    # Through the debugger: the policy of the page lets no script in.
    source = (Path(axe_core_python.__path__[0]) / "axe.min.js").read_text()
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": source})
    found = browser.execute_async_script("axe.run(document, {resultTypes: ['violations']}).then(arguments[0])")
    grave = [
        f"{one['id']}: {one['nodes'][0]['html'][:300]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert grave == [] and found["passes"]


def test_500_cells_and_20_000_outcomes_open_in_time(browser: Any, tmp_path: Path) -> None:
    cells = grid(calib=["corpus", "ssgr", "self", "written", "matched"], difficulty=["easy", "hard"], length=["short", "long"],
                 ratio=[0.3, 0.4, 0.5, 0.6, 0.7], draw=[0, 1, 2, 3, 4])  # fmt: skip
    folder = sweep(tmp_path, cells, problems=20)
    assert len(cells) == 500
    report = page.gather(*page.find([folder]))
    page.write(report, folder / "report.html")
    assert (folder / "report.html").stat().st_size < MIB * 2**20
    opened(browser, folder / "report.html")
    entry = "return performance.getEntriesByType('navigation')[0]"
    assert browser.execute_script(entry)["loadEventEnd"] < 1000 * SECONDS
    assert len(browser.find_elements("css selector", ".board tbody tr")) == 101
    browser.find_element("css selector", "[data-figure^=leaderboard] summary")
    assert complaints(browser) == []


@pytest.mark.parametrize(
    ("name", "dark", "width"), [("light", False, 1280), ("dark", True, 1280), ("phone", False, 390)]
)
def test_screenshots(name: str, dark: bool, width: int, browser: Any, built: tuple[page.Report, Path]) -> None:
    """They are looked at by people; here only that nothing reaches over the edge of the screen, and no text over its figure's.

    Those of the page that `make paper` leaves, where it is there, are cut off for README.
    """
    SHOTS.mkdir(parents=True, exist_ok=True)
    pages = {name: built[1]} | ({f"paper-{name}": PAPER} if PAPER.exists() else {})
    for called, file in pages.items():
        opened(browser, file, dark, width)
        draw_all(browser)
        size = browser.execute_script(
            "const root = document.documentElement; return [root.scrollWidth, root.scrollHeight]"
        )
        assert size[0] <= width
        assert browser.execute_script(CUT) == []
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert file == PAPER or browser.execute_script(OFF_PAPER) == []
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": scheme(dark)})
        clip = {"x": 0, "y": 0, "width": width, "height": size[1], "scale": 1}
        if file == PAPER:
            top = browser.execute_script(
                "return document.querySelector('.board').getBoundingClientRect().top + scrollY"
            )
            clip |= {"y": max(0, top - 340), "height": 1100}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        (SHOTS / f"{called}.png").write_bytes(base64.b64decode(shot["data"]))
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 200) == dark
