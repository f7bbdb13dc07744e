import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chestct.audit import Audit, audit, summary, write
from chestct.audit.findings import KINDS, SEVERITIES
from chestct.audit.pictures import HEIGHT, pictures, stack
from chestct.errors import DataError


def run(data: Any, split: str = "grouped") -> Audit:
    return audit(data.manifest, data.splits, data.images, data.unreadable, data.pairs, name="made_up", split=split)


@pytest.fixture(scope="module")
def faulty(make_data: Callable[..., Any]) -> Any:
    """Slice 1 is a copy of slice 0 across splits with another label; slice 2 is nearly slice 3; one file is broken."""
    data = make_data(120)
    data.manifest.loc[1, ["content", "row", "group"]] = data.manifest.loc[0, ["content", "row", "group"]]
    data.manifest.loc[3, "group"] = 2
    data.manifest.loc[[0, 1], "label"] = data.manifest.loc[[0, 1], "subtype"] = ["normal", "cancer"]
    data.manifest.loc[2, "path"] = "train/<script>alert('x')</script>.png"
    official = data.splits["grouped"].copy()
    official[:4] = ["train", "test", "train", "test"]
    data.splits["official"] = official
    data.splits["grouped"][:4] = ["train", "train", "test", "test"]
    data.pairs = pd.DataFrame({"a": [0, 2], "b": [1, 3], "similarity": [1.0, 0.996], "kind": ["exact", "near"]})
    data.unreadable = pd.DataFrame({"source": ["s"], "path": ["<b>broken</b>.png"], "reason": ["truncated & short"]})
    return data


@pytest.fixture(scope="module")
def official(faulty: Any) -> Audit:
    return run(faulty, "official")


def kinds(found: Audit) -> dict[str, str]:
    """The worst severity of each kind of finding."""
    return {finding.kind: finding.severity for finding in reversed(found.findings)}


def test_only_the_policy_in_force_can_be_in_error_for_leaking(faulty: Any, official: Audit) -> None:
    assert kinds(official)["leakage"] == "error"
    assert kinds(run(faulty, "grouped"))["leakage"] == "info"


def test_findings_come_worst_first_and_each_says_what_to_do(official: Audit) -> None:
    found = official
    assert {"leakage", "label_conflict", "unreadable", "duplicates", "sample_size"} <= set(kinds(found))
    ranks = [SEVERITIES.index(finding.severity) for finding in found.findings]
    assert ranks == sorted(ranks)
    for finding in found.findings:
        assert finding.kind in KINDS
        assert finding.text.endswith(".")
        assert finding.action.endswith(".")


def test_a_large_clean_set_has_no_finding_but_notes(make_data: Callable[..., Any]) -> None:
    found = run(make_data(500, cancer=0.5))
    assert found.verdict[0] == "clean"
    assert all(finding.severity == "info" for finding in found.findings)


@pytest.mark.parametrize(("cancer", "expected"), [(0.5, False), (0.9, True)])
def test_imbalance_is_judged_by_groups_of_train(make_data: Callable[..., Any], cancer: float, expected: bool) -> None:
    assert ("imbalance" in kinds(run(make_data(400, cancer=cancer)))) is expected


def test_few_groups_in_test_are_a_warning_with_the_numbers(make_data: Callable[..., Any]) -> None:
    data = make_data(500, cancer=0.5)
    data.manifest.loc[data.manifest["label"] == "normal", "group"] = 0
    finding = next(finding for finding in run(data).findings if finding.kind == "sample_size")
    assert finding.severity == "warning"
    assert "only 1 normal" in finding.text


def test_one_class_only_is_an_error_and_not_a_crash(make_data: Callable[..., Any]) -> None:
    found = run(make_data(60, cancer=1))
    assert kinds(found)["imbalance"] == "error"
    assert "one class only" in json.dumps(found.shortcuts)


def test_no_slices_is_an_error_that_says_how_to_mend_it(make_data: Callable[..., Any]) -> None:
    data = make_data(20)
    data.manifest = data.manifest[:0]
    with pytest.raises(DataError, match="no readable slices"):
        run(data)


def test_the_index_of_the_manifest_does_not_matter(faulty: Any, official: Audit) -> None:
    index = faulty.manifest.index[::-1] + 7
    splits = {name: pd.Series(split.to_numpy(), index)[::-1] for name, split in faulty.splits.items()}
    assert run(replace(faulty, manifest=faulty.manifest.set_index(index), splits=splits), "official") == official


def test_the_json_tells_everything_without_nan(official: Audit, tmp_path: Path) -> None:
    write(official, tmp_path)
    told = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert told["leakage"]["official"]["test"]["copies"] == 1
    assert told["findings"][0]["severity"] == "error"
    assert told["verdict"]["severity"] == "error"
    assert "thumbnails" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_html_stands_alone_and_escapes_names(official: Audit, tmp_path: Path) -> None:
    write(official, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert" in html
    assert "&lt;wbr" not in html  # names break after folders, and are still escaped
    assert "&lt;b&gt;broken" in html
    assert "truncated &amp; short" in html
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|https?://", html)
    assert len(html) < 3_000_000
    assert "prefers-color-scheme: dark" in html
    assert html.count("<table>") == html.count("</table>")


def test_undefined_numbers_are_shown_as_n_a_with_the_reason(make_data: Callable[..., Any], tmp_path: Path) -> None:
    found = run(make_data(40, cancer=0.1))
    write(found, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "n/a: too few groups" in html
    assert not re.search(r"\b(nan|None)\b", re.sub(r"<style>.*?</style>|base64,[^\"]*", "", html, flags=re.S))
    assert "n/a" in summary(found)


def test_a_file_name_that_is_no_utf_8_is_written(official: Audit, tmp_path: Path) -> None:
    finding = replace(official.findings[0], text="test/normal/\udcff.png")
    write(replace(official, findings=[finding]), tmp_path)
    assert "\\udcff" in (tmp_path / "report.html").read_text()


def test_the_report_holds_a_limited_number_of_small_thumbnails(make_data: Callable[..., Any], tmp_path: Path) -> None:
    data = make_data(600)
    data.images = np.random.default_rng(0).integers(0, 256, (600, 224, 224), dtype=np.uint8)  # noise: the largest JPEGs
    test = data.splits["grouped"] == "test"
    data.manifest["content"] = data.manifest["group"] = np.arange(600) % 100
    data.manifest["content"] = data.manifest["content"].astype(str)
    assert test.any()
    write(run(data), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_the_summary_shows_every_policy_side_by_side(official: Audit) -> None:
    text = summary(official)
    assert re.search(r"official +test 2 of \d+.*\(in force\)", text)
    assert re.search(r"grouped +test 0 of \d+", text)


def test_pictures_are_written_for_every_split_and_class(official: Audit, tmp_path: Path) -> None:
    written = pictures(official, tmp_path)
    assert {path.name for path in written} >= {"duplicates.png", "shortcuts.png", "contact_test_normal.png"}
    for path in written:
        with Image.open(path) as image:
            assert image.format == "PNG"


def test_pictures_can_be_made_where_nothing_can_be_measured(make_data: Callable[..., Any], tmp_path: Path) -> None:
    assert pictures(run(make_data(15, cancer=1)), tmp_path)


def test_a_column_of_the_map_keeps_its_proportions_when_it_is_cut() -> None:
    assert stack(["test", "train", "valid"]) == ["train", "valid", "test"]
    column = stack(["train"] * 300 + ["test"] * 100)
    assert len(column) == HEIGHT
    assert column.count("test") == pytest.approx(HEIGHT / 4, abs=1)


def test_the_same_seed_gives_the_same_audit(faulty: Any, official: Audit) -> None:
    assert run(faulty, "official") == official
