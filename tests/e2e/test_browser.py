"""The page in a real browser (Debian's Chromium): what a person sees, hears and can reach, and where requests go."""

import io
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from chestct.evaluation.protocol import Part
from chestct.reporting import render
from chestct.stats.metrics import Estimate
from tests.evaluation.evaluations import made_up
from tests.serving.conftest import Served, zipped

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'chestct[dev]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")]

ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, served: Served) -> Iterator[Callable]:
    """visit(**context options) -> a loaded page; afterwards: no error in the console, no request to anywhere else."""
    contexts, problems = [], []

    def note(request) -> None:
        if not request.url.startswith((served.url, "data:", "blob:")):
            problems.append(f"request to {request.url}")

    def open_page(**options):
        context = browser.new_context(**{"viewport": DESKTOP} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", note)
        page.on("console", lambda line: problems.append(f"console: {line.text}") if line.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(f"script: {error}"))
        page.goto(served.url)
        page.wait_for_selector("text=Drop a slice, or try an example")
        page.wait_for_selector("#upload input[type=file]", state="attached")
        page.wait_for_selector("#examples >> text=Not a slice")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def give(page, *files: tuple[str, bytes]) -> None:
    """Chooses files as a person does, and waits for the answer."""
    page.set_input_files(
        "#upload input[type=file]", [{"name": name, "mimeType": "", "buffer": data} for name, data in files]
    )
    page.wait_for_selector("#headline h2")


def test_everything_works_with_the_keyboard_alone(visit, files) -> None:
    page = visit()

    def tab_to(condition: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate(f"(() => {{ const e = document.activeElement; return Boolean({condition}); }})()"):
                return
        raise AssertionError(f"never reached: {condition}")

    tab_to("e.getAttribute('role') === 'tab'")
    tab_to("e.closest('#upload')")
    tab_to("e.closest('#examples')")
    page.keyboard.press("Enter")
    page.wait_for_selector("#headline h2")
    tab_to("e.textContent.includes('When not to trust it')")
    page.keyboard.press("Enter")
    page.wait_for_selector("#caveats", state="hidden")
    give(page, ("a.png", files[0]), ("b.png", files[1]))
    page.focus("#slices button >> nth=1")
    page.keyboard.press("Enter")
    page.wait_for_selector("#verdict >> text=File: b.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(visit, examples, scheme: str) -> None:
    page = visit(viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True)
    give(page, ("a.dcm", examples["large-lesion.dcm"]))
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.wait_for_function("(img => img.complete && img.naturalWidth > 0)(document.querySelector('#heat img'))")
    page.evaluate("window.scrollTo(0, 600)")
    assert page.locator("#notice").bounding_box()["y"] == 0  # wherever a prediction is seen
    image = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    assert (np.median(image) < 80) == (scheme == "dark")
    page.click("role=tab[name='Model']")
    assert page.locator("#card th >> text=threshold").bounding_box()["width"] > 80  # not a letter a line
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_no_serious_barrier(visit, examples, scheme: str, viewport: dict[str, int]) -> None:
    page = visit(color_scheme=scheme, viewport=viewport)

    def serious() -> list[str]:
        page.wait_for_timeout(300)
        return [
            f"{one['id']}: {node['target']} {node['failureSummary']}"
            for one in axe.Axe().run(page).response["violations"]
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"][:3]
        ]

    assert serious() == []
    give(page, ("a.dcm", examples["large-lesion.dcm"]), ("b.jpg", examples["hills.png"]), ("c.png", b"rubbish"))
    assert serious() == []
    page.click("#slices button >> nth=1")
    assert not page.is_visible("text=means nothing reliable")
    page.click("text=Show the score anyway")
    page.wait_for_selector("text=means nothing reliable")
    assert serious() == []
    page.click("role=tab[name='Model']")
    page.wait_for_selector("text=Trying things out")  # the card, without its scripts
    page.wait_for_selector("#card table[tabindex]")  # a wide one is scrolled by keys, too
    assert page.locator("script:has-text('alert(1)')").count() == 0
    assert serious() == []
    page.click("role=tab[name='Slices']")
    many = zipped({f"{i}.png": b"" for i in range(513)})  # more than a request may hold
    page.set_input_files("#upload input[type=file]", {"name": "a.zip", "mimeType": "", "buffer": many})
    page.wait_for_selector("#status [role=alert] >> text=That did not work.")  # announced to screen readers
    assert serious() == []


def test_a_scan_is_shown_as_a_strip_of_scores(visit, scan) -> None:
    page = visit()
    give(page, ("scan.zip", zipped(scan(8))))
    strip = page.locator("#strip")
    strip.locator("canvas, svg").first.wait_for()
    assert strip.bounding_box()["height"] > 100
    assert "Not validated for patients" in page.inner_text("#status")
    page.locator("#slices button >> nth=7").wait_for()


def test_no_table_of_a_report_is_cut_off_where_sources_have_long_names(browser, tmp_path) -> None:
    share, name = Estimate(0.9, 0.8, 1.0, 20, 20), "university_hospital_of_somewhere_emergency_department_2019_2023"
    shares = ("sensitivity", "specificity", "sensitivity of these", "specificity of these", "ECE")
    row = {"held out": name, "threshold": 0.5, "answered": 0.5} | dict.fromkeys(shares, share)
    evaluation = made_up(protocol={"loso": Part("At the threshold of the others", [row], [])})
    (tmp_path / "report.html").write_text(render.html(evaluation), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    cut = "[...document.querySelectorAll('.scroll')].map(table => table.scrollWidth - table.clientWidth)"
    assert set(page.evaluate(cut)) == {0}
    height = page.evaluate(
        """() => {
            const text = document.createRange();
            const cells = [...document.querySelectorAll("td")];
            text.selectNodeContents(cells.find(cell => cell.innerText.includes("1.000]")));
            return text.getBoundingClientRect().height;
        }"""
    )
    assert 30 < height < 60  # the interval below its value, in one piece
