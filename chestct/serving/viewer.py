"""An answer as DICOM, for the viewer that the slice came from: Secondary Capture of the overlay, Structured Report.

Both are of the slice's own study and refer to it, are marked as derived, preliminary and unverified, and say in the
picture and in the text that they are for research. highdicom writes them; it is imported when they are asked for.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import DA, TM

from chestct.errors import ChestCTError, DataError
from chestct.files import digest, write_atomic
from chestct.imaging.decode import read
from chestct.imaging.dicom import axes, numbers
from chestct.imaging.slice_files import File
from chestct.serving.batch import cell
from chestct.serving.prediction import NOT_MEDICAL, Prediction
from chestct.serving.predictor import Predictor
from chestct.serving.scan import SHOWN, Row, Scan, scans_in
from chestct.serving.sentences import capped
from chestct.version import __version__

warnings.filterwarnings("ignore", module=r"highdicom\b")  # names of one part, as anonymised files have them

SERIES = {"overlay": 9900, "report": 9901}
"""Numbers of the two series: behind a scanner's own."""

OPTIONAL: tuple[str, ...] = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber")
OPTIONAL += ("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName")
"""What anonymised files leave out, and highdicom wants to copy."""


def import_highdicom() -> Any:
    """highdicom itself. Raises ChestCTError where it is not installed."""
    try:
        import highdicom
    except ModuleNotFoundError:
        raise ChestCTError("DICOM for a viewer needs highdicom: pip install 'chestct[viewer]'.") from None
    return highdicom


def write_dicom(source: bytes, name: str, prediction: Prediction, folder: Path) -> list[Path]:
    """Writes both files for the answer to a DICOM slice, called after it; returns their paths.

    source: the slice's file; name: of it. Raises DataError where it is no DICOM image of one frame, says not which
    study it is of, or has values that cannot be written, and ChestCTError where highdicom is not installed.
    """
    highdicom = import_highdicom()
    try:
        slice_ = pydicom.dcmread(io.BytesIO(source), stop_before_pixels=True)
    except Exception:  # whatever wrong bytes lead pydicom to
        slice_ = Dataset()
    needed = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
    if missing := [keyword for keyword in needed if not slice_.get(keyword)]:
        raise DataError(f"{name}: no DICOM image that others can refer to; it has no {', '.join(missing)}.")
    if int(slice_.get("NumberOfFrames") or 1) > 1:
        raise DataError(f"{name}: it has several frames; DICOM for a viewer is written for single slices.")
    try:
        _blank_odd_values(highdicom, slice_)
        contents = {}
        for kind, make in (("overlay", _overlay), ("report", _report)):
            file, dataset = io.BytesIO(), make(highdicom, slice_, prediction, _identity(kind, slice_, prediction))
            dataset.save_as(file, enforce_file_format=True)
            contents[kind] = file.getvalue()
    except Exception as error:  # whatever other values lead highdicom and pydicom to
        raise DataError(f"{name}: DICOM for a viewer cannot be written: {error}") from error
    stem = f"{Path(name).stem[:50]}-{digest(source)[:8]}"  # systems allow 255 bytes
    return [write_atomic(folder / f"{stem}-{kind}.dcm", content) for kind, content in contents.items()]


def export(
    rows: list[Row], files: Sequence[File], predictor: Predictor, folder: Path
) -> tuple[list[Path], dict[str, str]]:
    """Writes both files for DICOM slices in a table: of a scan the most suspicious, of others all with answers.

    files: those that the table is of; predictor: as the table's, so that both say the same. Returns the paths written,
    and by file why none are. Raises ChestCTError where highdicom is not installed.
    """
    named = {cell(str(file)): file for file in files}
    paths: list[Path] = []
    failed: dict[str, str] = {}
    rows = [row for row in rows if row.get("format") == "DICOM"]
    alone = Scan("", tuple({row["path"]: row for row in rows if not row["series"]}.values()))
    for scan in [*scans_in(rows), alone]:
        for row in scan.answered if scan is alone or scan.left_out else scan.answered[:SHOWN]:
            if (name := row["path"]) in failed:  # frames of one file
                continue
            try:
                data = read(named[name], predictor.limits)
                paths += write_dicom(data, name, predictor.predict(data), folder)
            except DataError as error:
                failed[name] = str(error).removeprefix(f"{name}: ")
    return paths, failed


def _blank_odd_values(highdicom: Any, source: Dataset) -> None:
    """Empties what highdicom wants to copy and cannot convert, as anonymised files have it: a sex X, a date ANON."""
    for keyword in OPTIONAL:
        source.setdefault(keyword, "")
    kinds = {"PatientSex": highdicom.PatientSexValues, "PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}
    for keyword, kind in kinds.items():
        try:
            if value := source[keyword].value:
                kind(str(value))
        except ValueError:
            setattr(source, keyword, "")


def _identity(kind: str, source: Dataset, prediction: Prediction) -> dict[str, Any]:
    """Whose and which a file is. The same answer again has the same UIDs, so a viewer keeps it once, in one series."""
    answer = [prediction.bundle, kind]
    return {
        "series_instance_uid": generate_uid(entropy_srcs=[source.SeriesInstanceUID, *answer]),
        "series_number": SERIES[kind],
        "series_description": "chestct, research only",
        "sop_instance_uid": generate_uid(entropy_srcs=[source.SOPInstanceUID, *answer]),
        "instance_number": max(1, int((numbers([source], "InstanceNumber", 1) or [1])[0])),
        "transfer_syntax_uid": ExplicitVRLittleEndian,
        "manufacturer": "chestct",
        "manufacturer_model_name": "chestct",
        "software_versions": __version__,
    }


def _overlay(highdicom: Any, source: Dataset, prediction: Prediction, identity: dict[str, Any]) -> Dataset:
    """The slice with its heat, and what it is worth, as Secondary Capture (PS3.3 A.8.1)."""
    picture = (prediction.overlay() or Image.fromarray(prediction.gray)).convert("RGB")
    text = f"RESEARCH ONLY, NOT A MEDICAL DEVICE  {prediction.decision}, score {capped(prediction.score):.2f}"
    ImageDraw.Draw(picture).text((4, 4), text, fill=(255, 255, 0), stroke_width=1, stroke_fill=(0, 0, 0))
    capture = highdicom.sc.SCImage.from_ref_dataset(
        source,
        pixel_array=np.asarray(picture),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=_orientation(source),
        **identity,
    )
    capture.Laterality = ""  # of the body part: both sides
    capture.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    capture.DerivationDescription = f"Where bundle {prediction.bundle} of chestct looked. {NOT_MEDICAL}"[:1024]
    referred = Dataset()
    referred.ReferencedSOPClassUID, referred.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    capture.SourceImageSequence = [referred]
    return capture


def _orientation(source: Dataset) -> tuple[str, str]:
    """Where rows and columns run to (PS3.3 C.7.6.1.1.1); where the slice says nothing, left and back, as is usual."""
    plane = axes([source])
    if plane is None:
        return "L", "P"
    largest = abs(plane).argmax(1)  # of x, y, z: to the left, back, head, or the other way
    rows, columns = (("LPH" if axis[i] > 0 else "RAF")[i] for axis, i in zip(plane, largest, strict=True))
    return rows, columns


def _report(highdicom: Any, source: Dataset, prediction: Prediction, identity: dict[str, Any]) -> Dataset:
    """Score, decision, regions, caveats and the bundle's id as an Enhanced SR (PS3.3 A.35.2), with the slice's UID."""
    sr = highdicom.sr

    def concept(code: str, meaning: str) -> Any:
        return sr.CodedConcept(code, "99CHESTCT", meaning)

    contains = {"relationship_type": sr.RelationshipTypeValues.CONTAINS}
    score = concept("SCORE", "Score between 0 and 1 of a research model")
    boxes = "; ".join(" ".join(map(str, region.box)) for region in prediction.regions)
    texts = {
        "NOTICE": ("Notice", NOT_MEDICAL),
        "DECISION": ("Decision of a research model", prediction.decision),
        "REASON": ("Reason of the decision", prediction.reason),
        "REGIONS": ("Where the model looked, pixels left top right bottom", boxes),
        "CAVEAT": ("Results elsewhere", prediction.caveat),
        "MODEL": ("Model", f"chestct {__version__}, bundle {prediction.bundle}"),
    }
    root = sr.ContainerContentItem(concept("RESULT", "Research result, not a diagnosis"))
    root.ContentSequence = [
        *(sr.TextContentItem(concept(code, name), text, **contains) for code, (name, text) in texts.items() if text),
        sr.NumContentItem(score, round(prediction.score, 6), sr.CodedConcept("1", "UCUM", "no units"), **contains),
        sr.ImageContentItem(concept("SLICE", "The slice"), source.SOPClassUID, source.SOPInstanceUID, **contains),
    ]
    return sr.EnhancedSR(
        evidence=[source], content=root, is_complete=False, is_final=False, is_verified=False, **identity
    )
