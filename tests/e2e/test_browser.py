"""The page in a real browser (Debian's Chromium): what a person sees, hears and can reach, and where requests go."""

import io
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serving.conftest import Served, bundle_folder, examples, files, served

__all__ = ["bundle_folder", "examples", "files", "served"]  # fixtures

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'chestct[dev]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium"),
]

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
        page.set_default_timeout(30_000)
        page.on("request", note)
        page.on("console", lambda said: problems.append(f"console: {said.text}") if said.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(f"script: {error}"))
        page.goto(served.url)
        page.wait_for_selector("#result .start")
        page.wait_for_selector("#drop button[data-named]")  # by page.js: everything is in place
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def give(page, *files: tuple[str, bytes]) -> None:
    """Chooses files as a person does, and waits for the answer."""
    page.set_input_files(
        "#drop input[type=file]", [{"name": name, "mimeType": "", "buffer": data} for name, data in files]
    )
    page.wait_for_selector("#result .slice")


def jpeg(png: bytes) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).save(file, "JPEG", quality=95)
    return file.getvalue()


def loaded(page, selector: str) -> bool:
    return page.eval_on_selector(selector, "img => img.complete && img.naturalWidth > 0")


@pytest.mark.parametrize("kind", ["png", "jpeg", "dicom"])
def test_an_upload_is_answered_with_decision_and_pictures(visit, files, examples, kind: str) -> None:
    data = {"png": files[0], "jpeg": jpeg(files[0]), "dicom": examples["large-lesion.dcm"]}[kind]
    page = visit()
    give(page, (f"slice.{kind}", data))
    assert re.match("The model (sees|cannot)", page.inner_text(".slice:not([hidden]) h2"))
    assert "probability of cancer" in page.inner_text(".meter")
    assert "cancers in the validation set were found" in page.inner_text(".verdict")
    assert all(loaded(page, f"figure:nth-of-type({i}) img.ct") for i in (1, 2))
    assert page.locator("fieldset.window").count() == (kind == "dicom")
    assert "Research use only" in page.inner_text("#banner")


def test_an_example_is_answered_by_a_click(visit) -> None:
    page = visit()
    page.click("text=Large lesion")
    page.wait_for_selector("#result .verdict")
    assert page.inner_text("#result h2") == "The model sees signs of cancer"


def test_a_photograph_is_refused_and_the_score_comes_with_a_warning(visit, examples) -> None:
    page = visit()
    give(page, ("holiday.jpg", examples["hills.jpg"]))
    assert page.inner_text("#result h2") == "No answer for this image"
    assert "colour image" in page.inner_text(".verdict")
    assert not page.is_visible(".meter")
    page.click("text=Show the score anyway")
    assert page.is_visible(".meter")
    assert "means nothing reliable" in page.inner_text(".anyway")


def test_the_opacity_of_the_colour_follows_its_slider(visit, examples) -> None:
    page = visit()
    give(page, ("a.dcm", examples["large-lesion.dcm"]))
    opacity = "getComputedStyle(document.querySelector('img.heat')).opacity"
    assert float(page.evaluate(opacity)) == pytest.approx(0.6)
    page.focus("input.opacity")
    page.keyboard.press("Home")
    assert float(page.evaluate(opacity)) == 0


def test_the_window_changes_the_picture_and_not_the_answer(visit, examples) -> None:
    page = visit()
    give(page, ("a.dcm", examples["large-lesion.dcm"]))
    picture = "document.querySelector('img.ct').src"
    before, verdict = page.evaluate(picture), page.inner_text(".verdict")
    page.click("text=Soft tissue")
    page.wait_for_function(f"old => {picture} !== old", arg=before)
    # -1000 HU of air is black in the soft tissue window, and not in the lung window
    mean = """async () => { const img = document.querySelector('img.ct'); await img.decode();
      const c = document.createElement('canvas'); c.width = c.height = 4; const x = c.getContext('2d');
      x.drawImage(img, 0, 0, 8, 8, 0, 0, 4, 4); return x.getImageData(0, 0, 4, 4).data[0]; }"""
    assert page.evaluate(mean) == 0
    page.click("text=As the model sees it")
    page.wait_for_function(f"old => {picture} === old", arg=before)
    assert page.inner_text(".verdict") == verdict


def test_several_slices_are_walked_through_with_the_most_suspicious_first(visit, served, files) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        for i in range(6):
            made.writestr(f"{i + 1}.png", files[i])
    found = [served.predictor.predict(data) for data in files]
    best = max(range(6), key=lambda i: (found[i].decision != "refused", found[i].score))
    page = visit()
    give(page, ("scan.zip", archive.getvalue()))
    shown = ".slice:not([hidden]) .name"
    page.wait_for_function(f"document.querySelectorAll('{shown}').length === 1")
    assert page.inner_text(shown) == f"{best + 1}.png"
    page.focus("input.pick")
    page.keyboard.press("Home")
    assert page.inner_text(shown) == "1.png"
    page.click("[aria-label='Next slice']")
    assert page.inner_text(shown) == "2.png"
    page.click("text=Table of all slices")
    assert page.locator(".overview tbody tr").count() == 6


def test_the_history_lists_the_visit_and_downloads_as_csv(visit, files, tmp_path: Path) -> None:
    page = visit()
    give(page, ("first.png", files[0]))
    page.click("role=tab[name='History']")
    assert "first.png" in page.inner_text("#visit")
    with page.expect_download() as download:
        page.click("text=Download CSV")
    download.value.save_as(tmp_path / "history.csv")
    assert "first.png" in (tmp_path / "history.csv").read_text("utf-8-sig")


def test_a_picture_from_the_clipboard_is_answered(visit, files) -> None:
    page = visit()
    page.evaluate(
        """bytes => { const data = new DataTransfer(); data.items.add(new File([new Uint8Array(bytes)], 'pasted.png'));
        document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true})); }""",
        list(files[0]),
    )
    page.wait_for_selector("#result .slice")
    assert page.inner_text(".name") == "pasted.png"


def test_everything_works_with_the_keyboard_alone(visit) -> None:
    page = visit()

    def tab_to(condition: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(f"(() => {{ const e = document.activeElement; return Boolean({condition}); }})()"):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
                assert outline != "0px"  # one sees where one is
                return
        raise AssertionError(f"never reached: {condition}")

    tab_to("e.getAttribute('role') === 'tab'")
    tab_to("e.closest('#drop')")
    tab_to("e.dataset.example === '0'")
    page.keyboard.press("Enter")
    page.wait_for_selector("#result .verdict")
    tab_to("e.matches('.opacity')")
    page.keyboard.press("End")
    assert page.input_value("input.opacity") == "100"
    tab_to("e.tagName === 'SUMMARY' && e.textContent.includes('When not')")
    for visible in (False, True):  # it is open at first
        page.keyboard.press("Enter")
        assert page.is_visible(".slice:not([hidden]) >> text=It has only seen") == visible


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(visit, examples, scheme: str) -> None:
    page = visit(viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True)
    give(page, ("a.dcm", examples["large-lesion.dcm"]))
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.is_visible(".research")
    image = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    assert (np.median(image) < 80) == (scheme == "dark")


def test_the_page_about_the_model_draws_how_well_its_probability_holds(visit) -> None:
    page = visit()
    page.click("role=tab[name='Model']")
    assert page.locator("svg.plot circle.point").count() >= 2
    assert page.is_visible("text=What it scored")
    assert not page.is_visible("text=Trying things out")  # the card, folded
    page.click("text=The whole model card")
    assert page.is_visible("text=Trying things out")


def test_results_are_announced_to_screen_readers(visit, examples) -> None:
    page = visit()
    give(page, ("a.jpg", examples["hills.jpg"]))
    page.wait_for_function("document.querySelector('p.vh[role=status]').textContent.includes('No answer')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_no_serious_barrier(visit, examples, scheme: str, viewport: dict[str, int]) -> None:
    page = visit(color_scheme=scheme, viewport=viewport)

    def serious() -> list[str]:
        found = axe.Axe().run(page).response["violations"]
        return [
            f"{one['id']}: {node['target']} {node['failureSummary']}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"][:3]
        ]

    assert serious() == []
    give(page, ("a.dcm", examples["large-lesion.dcm"]), ("b.jpg", examples["hills.jpg"]), ("c.png", b"rubbish"))
    page.wait_for_timeout(300)
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert serious() == []
    page.evaluate("document.querySelectorAll('.slice').forEach((one) => (one.hidden = false))")
    assert serious() == []
    for name in ("History", "Model", "API"):
        page.click(f"role=tab[name='{name}']")
        page.wait_for_timeout(300)
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert serious() == []
