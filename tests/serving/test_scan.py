"""Scans: whatever the files are called and whatever lies between them, slices are in the order of the body."""

import gzip
import json
import os
import resource
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from chestct.config.schema import WindowConfig
from chestct.errors import DataError, DecodeError
from chestct.imaging.decode import decode, decode_frames, read
from chestct.imaging.slice_files import entries
from chestct.serving.batch import find_files
from chestct.serving.model import Model
from chestct.serving.predictor import Predictor
from chestct.serving.reading import expand, scan_of
from chestct.serving.reading import read as read_file
from chestct.serving.scan import BEST, VALIDATION, describe_scans, in_order, scans_in
from tests.conftest import Slices, limited
from tests.serving.conftest import rows, zipped
from tests.serving.test_predictor import png


def positions(table: list[dict[str, str]]) -> list[float]:
    return [float(row["position"].removesuffix(" mm")) for row in table if row["position"]]


def test_a_zip_is_read_by_position_whatever_else_is_in_it(call, scan: Slices, bundle_folder, tmp_path, capsys) -> None:
    files = scan(8) | scan(2, "1.2.4", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    odd = {"DICOMDIR": b"x", "__MACOSX/._IM001": b"x", "1.2.3/readme.txt": b"no slice", "folder/": b""}
    mixed = dict(sorted((files | odd).items()))
    plain = zipped({name.replace("/", "\\"): data for name, data in mixed.items()})
    (tmp_path / "scan.zip").write_bytes(plain)
    asked = ("--bundle", bundle_folder, "--out", tmp_path / "s.csv")
    assert call(tmp_path / "scan.zip", *asked) == 1  # the text file is told of
    table = rows(tmp_path / "s.csv")
    own = [row for row in table if row["series"] == "1.2.3"]
    assert positions(own) == [5.0 * i - 20 for i in range(8)]
    assert [row["decision"] for row in table if not row["series"]] == ["unreadable"]
    first, other = json.loads((tmp_path / "s.scans.json").read_text(encoding="utf-8"))
    highest = sorted((float(row["score"]) for row in own if row["decision"] != "refused"), reverse=True)[:BEST]
    assert first["score"] == pytest.approx(sum(highest) / BEST, abs=1e-5)
    assert first["slices"][first["most_suspicious"][0]]["score"] == highest[0]
    assert "scout" in other["left_out"]
    assert other["score"] is None
    printed = capsys.readouterr().out
    assert "Scan 1.2.3: score" in printed
    assert "Left out: series 1.2.4, 2 images" in printed
    assert VALIDATION in printed


def test_the_order_is_the_same_from_a_folder_and_in_python(scan: Slices, model: Model, tmp_path: Path) -> None:
    for name, data in scan(6).items():
        path = tmp_path / "folder" / "deep" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        (tmp_path / "folder" / f"copy-{path.name}").write_bytes(data)
    (found,) = model.predict_scan(tmp_path / "folder")
    assert len(found.rows) == 6  # a copy counts once
    assert positions(list(found.rows)) == [5.0 * i - 20 for i in range(6)]
    each = np.sort([model.predict(data).score for data in scan(6).values()])
    assert found.score == pytest.approx(each[-BEST:].mean(), abs=1e-5)
    assert "Not a medical device" in repr(found)
    with pytest.raises(DataError, match="No such file"):
        model.predict_scan(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("count", "elements", "scans"),
    [
        (6, {}, 1),
        (3, {}, 0),  # not a scan by being copied
        (6, {"ImagePositionPatient": None, "InstanceNumber": None}, 1),
        (6, {"SeriesInstanceUID": ""}, 0),
    ],
)
def test_the_page_scores_the_slices_that_the_command_does(scan, model, bundle_folder, tmp_path, count, elements, scans):
    files = scan(count, **elements)
    archive = zipped(files | {f"copy/{name}": data for name, data in files.items()})
    (tmp_path / "scan.zip").write_bytes(archive)
    found = [one for one in model.predict_scan(tmp_path / "scan.zip") if not one.left_out]
    predictor = Predictor(bundle_folder)
    uploaded = expand([("scan.zip", archive)], 100, 100_000_000)
    readings = [one for file in uploaded for one in read_file(predictor, predictor.bundle, *file)]
    shown, about = scan_of(readings)
    assert len(found) == bool(shown) == scans
    for one in found:
        scores = sorted(float(row["score"]) for row in one.rows)
        assert sorted(reading.score for reading in shown) == pytest.approx(scores, abs=1e-5)
        assert f"{count} slices, score {one.score:.2f}" in about
        for reading in readings:
            reading.row["score"] = "0.999"
        assert "score 0.99:" in scan_of(readings)[1]  # no model is certain


def test_other_planes_other_kinds_and_short_series_are_left_out_with_a_reason(scan, model, tmp_path) -> None:
    kinds = {
        "1.1": (scan(6, "1.1", ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "not axial"),
        "1.2": (scan(6, "1.2", Modality="PT"), "not CT"),
        "1.3": (scan(2, "1.3"), "2 slices"),
        "1.4": (scan(6, "1.4"), ""),
    }
    for files, _ in kinds.values():
        for name, data in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
    found = model.predict_scan(tmp_path)
    assert len(found) == len(kinds)
    for one in found:
        reason = kinds[one.series][1]
        assert reason in one.left_out
        assert bool(reason) == bool(one.left_out)
    assert describe_scans(found).count("Left out: ") == 3
    alone = describe_scans([one for one in found if one.left_out])
    assert alone.count("Left out: ") == 3
    assert VALIDATION not in alone
    assert not describe_scans([])


def test_slices_without_a_position_are_ordered_by_their_numbers(call, scan: Slices, tmp_path) -> None:
    (tmp_path / "s.zip").write_bytes(zipped(scan(6, ImagePositionPatient=None)))
    assert call(tmp_path / "s.zip", "--out", tmp_path / "s.csv") == 0
    assert [row["position"] for row in rows(tmp_path / "s.csv")] == [f"no. {i}" for i in range(1, 7)]


@pytest.mark.parametrize(
    ("places", "order"),
    [
        ([("1", "mm", 5.0), ("1", "mm", -5.0), ("1", "mm", 0.0)], "bca"),  # along the scan
        ([("1", "number", 1.0), ("1", "mm", 9.0), ("1", "number", -1.0)], "bca"),  # a position says more than a number
        ([("2", "mm", 5.0), ("1", "mm", 1.0), ("2", "mm", 3.0)], "cab"),  # one series after the other
        ([("1", "mm", 1.0), ("1", "mm", 1.0), ("1", "mm", 0.0)], "cab"),  # one place twice: as they came
        ([("1", "mm", 3.0), None, ("1", "mm", 1.0)], "cab"),  # what has no place changes no order
    ],
)
def test_a_series_is_in_the_order_of_its_places(places, order: str) -> None:
    assert "".join(in_order("abc", dict(zip("abc", places, strict=True)).get)) == order


def test_bad_archives_end_in_a_sentence(call, tmp_path, capsys) -> None:
    (tmp_path / "rubbish.zip").write_bytes(b"rubbish")
    (tmp_path / "empty.zip").write_bytes(zipped({"DICOMDIR": b""}))
    for name in ("rubbish.zip", "empty.zip"):
        assert call(tmp_path / name, "--out", tmp_path / "s.csv") == 2
        assert name in capsys.readouterr().err
    (tmp_path / "bomb.zip").write_bytes(zipped({"big": b"\0" * 3_000_000, "small": b"\0" * 100}))
    big, small = entries(tmp_path / "bomb.zip")
    with pytest.raises(DecodeError, match=r"data\.max_bytes allows 1,000"):
        big.read(1000)
    assert small.read(1000) == b"\0" * 100


def test_a_bad_archive_below_a_folder_is_a_row_with_its_reason_and_spoils_no_other_file(call, scan, tmp_path) -> None:
    folder = tmp_path / "studies"
    folder.mkdir()
    os.mkfifo(folder / "pipe.zip")
    good = zipped(scan(5))
    contents = {"a": good, "cut": good[: len(good) // 2], "none": zipped({"DICOMDIR": b"x"}), "text": b"rubbish"}
    for name, content in contents.items():
        (folder / f"{name}.zip").write_bytes(content)
    assert call(folder, "--out", tmp_path / "s.csv") == 1
    bad = {Path(row["path"]).name: row["reason"] for row in rows(tmp_path / "s.csv") if row["decision"] == "unreadable"}
    assert len(rows(tmp_path / "s.csv")) == 5 + len(bad)
    assert {name: "holds 0 files" in reason for name, reason in bad.items()} == {
        "cut.zip": False,
        "none.zip": True,
        "pipe.zip": False,
        "text.zip": False,
    }
    assert all("zip archive" in reason or "holds 0 files" in reason for reason in bad.values())


def test_more_archives_than_a_system_lets_a_program_open_are_read(tmp_path) -> None:
    for i in range(60):
        (tmp_path / f"{i:02}.zip").write_bytes(zipped({"a": bytes([i]), "b": b"b"}))
    lowest = os.dup(0)
    os.close(lowest)
    with limited(resource.RLIMIT_NOFILE, lowest + 30):
        files, _ = find_files([tmp_path], Path("s.csv"))
        assert [read(file) for file in files[::2]] == [bytes([i]) for i in range(60)]


def test_no_score_of_an_earlier_run_stays_and_all_that_is_left_out_is_named(
    call, scan, bundle_folder, tmp_path, capsys
) -> None:
    kinds = {
        "scan": scan(6),
        "scout": scan(2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "none": {"a.png": png(0)},
    }
    for name, files in kinds.items():
        (tmp_path / f"{name}.zip").write_bytes(zipped(files))
    given = ("--bundle", bundle_folder, "--out", tmp_path / "s.csv")
    listed = tmp_path / "s.scans.json"
    assert call(tmp_path / "scan.zip", *given) == 0
    assert json.loads(listed.read_text(encoding="utf-8"))[0]["score"] is not None
    assert call(tmp_path / "scout.zip", *given) == 0
    assert "scout" in json.loads(listed.read_text(encoding="utf-8"))[0]["left_out"]
    assert "Left out: series 1.2.3, 2 images" in capsys.readouterr().out
    assert call(tmp_path / "none.zip", *given) == 0
    assert not listed.exists()


def test_of_a_damaged_archive_the_other_slices_are_scored(call, scan: Slices, tmp_path) -> None:
    damaged = bytearray(zipped(scan(5), zipfile.ZIP_STORED))
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "damaged.zip").write_bytes(damaged)
    assert call(tmp_path / "damaged.zip", "--out", tmp_path / "s.csv") == 1
    assert "zip archive" in next(row["reason"] for row in rows(tmp_path / "s.csv") if row["decision"] == "unreadable")


def volume(affine: np.ndarray, kind: type = nibabel.Nifti1Image) -> tuple[bytes, np.ndarray]:
    """A NIfTI file whose voxels, put on the patient's axes (right, front, head), are the array that comes with it."""
    hu = np.full((40, 30, 6), -800, np.int16)
    hu[30:, :, :] = 100  # a bright side on the patient's left: x runs to the right below
    hu[:, 20:, :] += 40
    hu += 10 * np.arange(6, dtype=np.int16)
    ras = nibabel.Nifti1Image(hu, np.diag([0.5, 0.75, 2.0, 1.0]))
    start = nibabel.io_orientation(ras.affine)
    turned = ras.as_reoriented(nibabel.orientations.ornt_transform(start, nibabel.io_orientation(affine)))
    return kind(np.asarray(turned.dataobj), turned.affine).to_bytes(), hu


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "ILA", "RAI"])
def test_a_volume_lies_as_on_a_viewer_however_it_is_stored(axes: str) -> None:
    affine = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(axes), (40, 30, 6))
    data, hu = volume(affine)
    data, window = gzip.compress(data), WindowConfig(center=-400.0, width=1601.0)
    slices = list(decode_frames(data, window))
    assert len(slices) == 6
    for k, one in enumerate(slices):
        expected = (hu[::-1, ::-1, k].T + 400.5) / 1600 + 0.5  # right on the left side, front above
        np.testing.assert_allclose(one.gray, expected, atol=1e-5)
        assert one.spacing == pytest.approx((0.75, 0.5))
    heights = [one.position[2] for one in slices if one.position]
    assert np.diff(heights) == pytest.approx([2.0] * 5)
    middle = decode(data, window)
    assert (middle.frame, middle.position) == (3, slices[3].position)
    np.testing.assert_array_equal(middle.gray, slices[3].gray)


@pytest.mark.parametrize("axes", ["RAS", "RAI", "ILA"])
def test_a_volume_is_inflated_once_or_twice_and_not_for_each_slice(axes: str, monkeypatch) -> None:
    backwards: list[int] = []

    class Stream(gzip.GzipFile):
        def seek(self, offset: int, whence: int = 0) -> int:
            if whence == 0 and 352 < offset < self.tell():
                backwards.append(offset)
            return super().seek(offset, whence)

    affine = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(axes), (40, 30, 6))
    data = gzip.compress(volume(affine)[0])
    monkeypatch.setattr("chestct.imaging.nifti.gzip.GzipFile", Stream)
    assert len(list(decode_frames(data, WindowConfig()))) == 6
    assert len(backwards) <= 1


def test_a_volume_is_one_scan_and_no_ct_is_refused(call, tmp_path, capsys) -> None:
    data, _ = volume(np.eye(4))
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(data))
    assert call(tmp_path / "ct.nii.gz", "--out", tmp_path / "s.csv") == 0
    table = rows(tmp_path / "s.csv")
    assert [row["frame"] for row in table] == [str(i) for i in range(6)]
    assert len({row["series"] for row in table}) == 1
    assert len(scans_in(table)) == 1
    labels = nibabel.Nifti1Image(np.ones((9, 9, 9), np.uint8), np.eye(4)).to_bytes()
    movie = nibabel.Nifti2Image(np.zeros((9, 9, 9, 2), np.int16), np.eye(4)).to_bytes()
    for name, bad, reason in (
        ("labels.nii", labels, "Hounsfield"),
        ("movie.nii", movie, "three axes"),
        ("cut.nii.gz", gzip.compress(data)[:-10], "damaged NIFTI"),
    ):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(DecodeError, match=reason):
            list(decode_frames(tmp_path / name, WindowConfig()))
