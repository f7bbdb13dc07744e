import re
from dataclasses import replace

from chestct.reporting.audit_report import summary, write
from tests.audit.conftest import faulty, make, make_data, official, quick, run  # noqa: F401 - fixtures


def test_the_page_stands_alone_escapes_names_and_shows_what_findings_rest_on(official, faulty, tmp_path):  # noqa: F811
    skipped = [{"source": "s", "path": f"Training/<{i}>.txt", "reason": "not an image"} for i in range(5)]
    audit = replace(official, skipped=skipped, disbelieved=["PatientID is ANONYMOUS in all 60 slices."])
    write(audit, faulty.manifest, tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"croissant.json", "report.html", "report.json", "slices.csv"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|(src|href)=\"(?!data:)|url\(|@import|https?://", page)
    for text in ("&lt;script&gt;alert", "&lt;b&gt;broken", "truncated &amp; short", "prefers-color-scheme: dark",
                 "Does the test set leak?", "Alike, but labelled differently",
                 "How much is there really?", "Unreadable files",
                 "PatientID is ANONYMOUS in all 60 slices.", "&lt;4&gt;.txt"):  # fmt: skip
        assert text in page
    assert page.count("not an image</td>") == 5
    assert page.count("<table>") == page.count("</table>")


def test_undefined_numbers_are_shown_as_n_a_with_the_reason(tmp_path):
    data = make(40, cancer=0.1)
    audit = run(data)
    write(audit, data.manifest, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "n/a: too few groups" in page
    assert not re.search(r"\b(nan|None)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.S))
    assert "n/a" in summary(audit)


def test_the_summary_shows_every_policy_next_to_the_one_in_force(official):  # noqa: F811
    text = summary(official)
    assert re.search(r"official +test 2 of \d+.*\(in force\)", text)
    assert re.search(r"grouped +test 0 of \d+", text)
