"""Answers as DICOM: valid by another program's judgement, and tied to the slice that they are of."""

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest

from chestct.errors import DataError
from chestct.serving.prediction import NOT_MEDICAL
from chestct.serving.viewer import write_dicom
from tests.conftest import real
from tests.serving.conftest import Slices, zipped


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


def test_what_nothing_can_refer_to_is_refused(model, examples: dict[str, bytes], tmp_path: Path) -> None:
    answer = model.predict(examples["hills.png"])
    with pytest.raises(DataError, match=r"hills\.png: no DICOM image"):
        write_dicom(examples["hills.png"], "hills.png", answer, tmp_path)
