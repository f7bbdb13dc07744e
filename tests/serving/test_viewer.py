"""Answers as DICOM: valid by another program's judgement, and tied to the slice that they are of."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from chestct.config.schema import WindowConfig
from chestct.errors import DataError
from chestct.imaging.decode import decode, read
from chestct.serving import viewer
from chestct.serving.prediction import NOT_MEDICAL
from chestct.serving.viewer import write_dicom
from tests.conftest import Slices, real
from tests.serving.conftest import zipped


def check(path: Path) -> None:
    """dciodvfy knows which elements each kind of DICOM must hold."""
    if not shutil.which("dciodvfy"):
        pytest.skip("needs dciodvfy: apt-get install dicom3tools")
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    assert "Error" not in done.stderr, done.stderr
    assert done.returncode == 0


def test_overlay_and_report_are_valid_and_refer_to_their_slice(model, examples, tmp_path) -> None:
    data = examples["large-lesion.dcm"]
    (tmp_path / "slice.dcm").write_bytes(data)
    source, answer = pydicom.dcmread(tmp_path / "slice.dcm"), model.predict(data)
    overlay, report = (pydicom.dcmread(path) for path in write_dicom(data, "slice.dcm", answer, tmp_path / "out"))
    for made in (overlay, report):
        assert (made.StudyInstanceUID, made.PatientID) == (source.StudyInstanceUID, source.PatientID)
        assert made.SeriesInstanceUID != source.SeriesInstanceUID
    assert overlay.ImageType[0] == "DERIVED"
    assert list(overlay.PatientOrientation) == ["L", "P"]
    assert overlay.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert NOT_MEDICAL in overlay.DerivationDescription
    assert overlay.pixel_array.shape == (source.Rows, source.Columns, 3)
    assert np.ptp(overlay.pixel_array[:16], axis=2).max() > 100  # the notice in the picture, in yellow
    items = {item.ConceptNameCodeSequence[0].CodeValue: item for item in report.ContentSequence}
    assert float(items["SCORE"].MeasuredValueSequence[0].NumericValue) == pytest.approx(answer.score, abs=1e-5)
    assert items["DECISION"].TextValue == answer.decision
    assert items["NOTICE"].TextValue == NOT_MEDICAL
    assert answer.bundle in items["MODEL"].TextValue
    assert items["SLICE"].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert (report.VerificationFlag, report.CompletionFlag) == ("UNVERIFIED", "PARTIAL")
    again = [
        pydicom.dcmread(path).SOPInstanceUID for path in write_dicom(data, "slice.dcm", answer, tmp_path / "again")
    ]
    assert again == [overlay.SOPInstanceUID, report.SOPInstanceUID]
    for path in (tmp_path / "out").iterdir():
        check(path)


def test_the_overlay_of_a_patient_who_lies_face_down_says_so(model, examples, tmp_path) -> None:
    source, file = pydicom.dcmread(io.BytesIO(examples["large-lesion.dcm"])), io.BytesIO()
    source.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
    source.save_as(file)
    answer = model.predict(file.getvalue())
    overlay = pydicom.dcmread(write_dicom(file.getvalue(), "slice.dcm", answer, tmp_path)[0])
    assert list(overlay.PatientOrientation) == ["R", "A"]


def test_real_slices_get_valid_files(model, tmp_path: Path) -> None:
    path = sorted(real("dicom").glob("*.dcm"))[0]
    for made in write_dicom(path.read_bytes(), path.name, model.predict(path), tmp_path):
        check(made)


def test_a_scan_gets_files_for_its_most_suspicious_slices(call, scan: Slices, bundle_folder, tmp_path, capsys) -> None:
    (tmp_path / "scan.zip").write_bytes(zipped(scan(8)))
    asked = ("--bundle", bundle_folder, "--out", tmp_path / "s.csv", "--viewer", tmp_path / "dicom")
    assert call(tmp_path / "scan.zip", *asked) == 0
    made = [pydicom.dcmread(path) for path in (tmp_path / "dicom").iterdir()]
    assert len(made) == 10
    assert len({one.SeriesInstanceUID for one in made}) == 2  # one of pictures, one of reports
    assert "10 DICOM files" in capsys.readouterr().out


@pytest.mark.parametrize(
    "odd",
    [
        *({"PatientSex": "X"}, {"PatientSex": "unknown"}, {"PatientBirthDate": "ANON"}, {"StudyDate": "ANON"}),
        *({"StudyTime": "xx"}, {"ImageOrientationPatient": [1, 0, 0, 0, 1]}),
        {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
    ],
)
def test_values_that_anonymising_left_behind_are_blanked(model, scan: Slices, tmp_path: Path, odd) -> None:
    ((name, data),) = scan(1, **odd).items()
    overlay, report = (pydicom.dcmread(path) for path in write_dicom(data, name, model.predict(data), tmp_path))
    assert list(overlay.PatientOrientation) == ["L", "P"]
    assert [made.get(keyword, "") for made in (overlay, report) for keyword in odd] == ["", ""]
    for path in tmp_path.iterdir():
        check(path)


def test_a_number_of_a_slice_that_is_none_is_left_out(model, scan: Slices, tmp_path: Path) -> None:
    ((name, data),) = scan(1).items()
    odd = data.replace(b"IS\x02\x001 ", b"IS\x02\x00JD")
    assert odd != data
    assert pydicom.dcmread(write_dicom(odd, name, model.predict(odd), tmp_path)[0]).InstanceNumber == 1


def test_files_without_dicom_for_a_viewer_are_named_and_the_others_get_theirs(
    call, scan: Slices, bundle_folder, tmp_path: Path, monkeypatch, capsys
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(viewer, "read", lambda file, limits: opened.append(file) or read(file, limits))
    several = pydicom.dcmread(io.BytesIO(*scan(1, uid="1.9").values()))
    several.PixelData, several.NumberOfFrames = several.PixelData * 2, 2
    for i, data in enumerate([*scan(1, uid="1.8", SpecificCharacterSet="none").values(), *scan(2).values()]):
        (tmp_path / f"{i}.dcm".rjust(250, "0")).write_bytes(data)
    gray = decode(data, WindowConfig()).gray
    Image.fromarray((255 * gray).astype(np.uint8)).save(tmp_path / "a.png")
    several.save_as(tmp_path / "several.dcm")
    (tmp_path / "9.dcm").write_bytes(*scan(1, SeriesInstanceUID="").values())
    asked = ("--bundle", bundle_folder, "--out", tmp_path / "s.csv", "--viewer", tmp_path / "dicom")
    assert call(*sorted(tmp_path.glob("*.*")), *asked) == 0
    printed = capsys.readouterr().out
    assert {path.suffix for path in opened} == {".dcm"}
    assert len(list((tmp_path / "dicom").iterdir())) == 4
    assert "4 DICOM files" in printed
    assert "3 skipped" in printed
    assert "9.dcm (no DICOM image that others can refer to; it has no SeriesInstanceUID.)" in printed
    assert "0.dcm (DICOM for a viewer cannot be written" in printed
    assert "several.dcm (it has several frames" in printed


def test_a_missing_highdicom_or_folder_is_said_before_anything_is_scored(
    call, scan, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    (tmp_path / "scan.zip").write_bytes(zipped(scan(1)))
    assert call(tmp_path / "scan.zip", "--out", tmp_path / "s.csv", "--viewer", tmp_path / "dicom") == 2
    assert "chestct[viewer]" in capsys.readouterr().err
    monkeypatch.undo()
    assert call(tmp_path / "scan.zip", "--out", tmp_path / "s.csv", "--viewer", tmp_path / "scan.zip") == 2
    assert "choose another place" in (error := capsys.readouterr().err)
    assert "--viewer" in error
    assert [path.name for path in tmp_path.iterdir()] == ["scan.zip"]


def test_what_nothing_can_refer_to_is_refused(model, examples: dict[str, bytes], tmp_path: Path) -> None:
    answer = model.predict(examples["hills.png"])
    with pytest.raises(DataError, match=r"hills\.png: no DICOM image"):
        write_dicom(examples["hills.png"], "hills.png", answer, tmp_path)
