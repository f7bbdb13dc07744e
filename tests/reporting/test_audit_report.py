import re
from dataclasses import replace

import numpy as np
import pytest

from chestct.audit.findings import findings
from chestct.reporting.audit_report import HEIGHT, stack, summary, write
from tests.audit.conftest import faulty, make, make_data, official, quick, run  # noqa: F401 - fixtures


@pytest.fixture
def page(official, faulty, tmp_path):  # noqa: F811
    write(official, faulty.manifest, faulty.images, tmp_path)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone_and_escapes_names(page, tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    assert "&lt;wbr" not in page  # names break after folders, and are still escaped
    assert "&lt;b&gt;broken" in page
    assert "truncated &amp; short" in page
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|https?://", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<table>") == page.count("</table>")


def test_the_page_has_every_chapter_and_the_pictures_that_findings_rest_on(page, official):  # noqa: F811
    for heading in ("Does the test set leak?", "Map of copies", "Alike, but labelled differently", "same rules on the",
                    "How much is there really?", "Does test look like train?", "Unreadable files"):  # fmt: skip
        assert heading in page
    shown = sum(len(row["slices"]) for row in official.contacts) + 2 * len(official.examples)
    assert page.count('src="data:image/jpeg;base64,') == shown


def test_undefined_numbers_are_shown_as_n_a_with_the_reason(tmp_path):
    data = make(40, cancer=0.1)
    audit = run(data)
    write(audit, data.manifest, data.images, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "n/a: too few groups" in page
    assert not re.search(r"\b(nan|None)\b", re.sub(r"<style>.*?</style>|base64,[^\"]*", "", page, flags=re.S))
    assert "n/a" in summary(audit)


def test_a_file_name_that_is_no_utf_8_is_written(official, faulty, tmp_path):  # noqa: F811
    finding = replace(official.findings[0], text="test/normal/\udcff.png")
    write(replace(official, findings=[finding]), faulty.manifest, faulty.images, tmp_path)
    assert "\\udcff" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_report_holds_a_limited_number_of_small_thumbnails(tmp_path):
    data = make(600)
    data.images = np.random.default_rng(0).integers(0, 256, (600, 224, 224), dtype=np.uint8)  # noise: the largest JPEGs
    data.manifest["group"] = np.arange(600) % 100
    data.manifest["content"] = data.manifest["group"].astype(str)
    write(run(data), data.manifest, data.images, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_the_summary_shows_every_policy_next_to_the_one_in_force(official):  # noqa: F811
    text = summary(official)
    assert re.search(r"official +test 2 of \d+.*\(in force\)", text)
    assert re.search(r"grouped +test 0 of \d+", text)


def test_a_column_of_the_map_keeps_its_proportions_when_it_is_cut():
    assert stack(["test", "train", "valid"]) == ["train", "valid", "test"]
    column = stack(["train"] * 300 + ["test"] * 100)
    assert len(column) == HEIGHT
    assert column.count("test") == pytest.approx(HEIGHT / 4, abs=1)


def test_files_that_are_not_used_and_identifiers_that_link_nothing_are_listed(official, faulty, tmp_path):  # noqa: F811
    skipped = [{"source": "s", "path": f"Training/<{i}>.txt", "reason": "not an image"} for i in range(5)]
    audit = replace(official, skipped=skipped, disbelieved=["PatientID is ANONYMOUS in all 60 slices."])
    audit = replace(audit, findings=findings(audit))
    assert {("skipped", "info"), ("identifiers", "warning")} <= {(f.kind, f.severity) for f in audit.findings}
    write(audit, faulty.manifest, faulty.images, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("not an image</td>") == 5
    assert "PatientID is ANONYMOUS in all 60 slices." in page
    assert "&lt;4&gt;.txt" in page
