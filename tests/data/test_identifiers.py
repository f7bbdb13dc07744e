from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from chestct.config.schema import DataConfig
from chestct.data.identifiers import believable
from chestct.data.ingest import ingest

LABELS = {"normal": "normal", "cancer": "cancer"}


def table(**columns: list[str]) -> pd.DataFrame:
    """Six slices of one source: three normal, three cancer."""
    manifest = pd.DataFrame({"source": "s", "subtype": ["normal"] * 3 + ["cancer"] * 3, "content": list("abcdef")})
    return manifest.assign(**{name: columns.get(name, [""] * 6) for name in ("patient", "study", "series")})


@pytest.mark.parametrize(
    "values",
    [
        ["id"] * 6,
        ["ANONYMOUS"] * 6,
        ["1.2.3"] * 6,
        ["one hospital"] * 6,
        ["normal"] * 3 + ["cancer"] * 3,
        ["健康"] * 3 + ["Krebs"] * 3,
        ["only this"] * 5 + [""],
        ["Patient ID", "none", "N/A", "xxx", "", "Anonymized"],
    ],
)
@pytest.mark.parametrize("column", ["patient", "study", "series"])
def test_an_identifier_that_tells_no_slices_apart_is_set_aside_and_named(column, values):
    believed, notes = believable(table(**{column: values}))
    assert (believed == "").all(axis=None)
    assert len(notes) == 1
    assert {"patient": "PatientID", "study": "Study", "series": "Series"}[column] in notes[0]


@pytest.mark.parametrize(
    "values",
    [
        list("aabbcd"),
        ["0", "0", "1", "1", "2", "2"],
        ["ANON1", "ANON1", "ANON2", "ANON2", "ANON2", "ANON3"],
        ["a", "a", "a", "b", "b", "a"],  # two patients, one with both classes
        ["a", "a", "", "", "", ""],  # of a few slices among many others
        ["test1", "normal1", "id7", "id7", "", ""],
    ],
)
def test_an_identifier_that_tells_slices_apart_is_believed(values):
    believed, notes = believable(table(patient=values))
    assert believed["patient"].tolist() == values
    assert not notes


def test_placeholders_among_real_identifiers_are_set_aside_alone():
    believed, notes = believable(table(patient=["p1", "p2", "id", "p3", "ANONYMOUS", "p3"]))
    assert believed["patient"].tolist() == ["p1", "p2", "", "p3", "", "p3"]
    assert "2 slices" in notes[0]


def test_each_source_is_judged_by_itself():
    manifest = table(patient=["id1"] * 6)
    other = table(patient=list("aabbcc")).assign(source="t", content=list("ghijkl"))
    believed, notes = believable(pd.concat([manifest, other], ignore_index=True))
    assert believed["patient"].tolist() == [""] * 6 + list("aabbcc")
    assert len(notes) == 1
    assert "of s " in notes[0]


def slice_file(path: Path, seed: int, **identifiers: str) -> None:
    """A small CT slice unlike those of other seeds."""
    pixels = np.kron(np.random.default_rng(seed).integers(0, 1500, (8, 8)), np.ones((10, 10))).astype(np.uint16)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CTImageStorage, f"1.2.{seed + 1}", "CT"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    for name, value in identifiers.items():
        setattr(ds, name, value)
    ds.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def groups(tmp_path: Path, **identifiers: list[str]) -> tuple[int, list[str]]:
    for i in range(6):
        own = {name: values[i] for name, values in identifiers.items()}
        slice_file(tmp_path / "d" / ("normal" if i < 3 else "cancer") / f"{i}.dcm", i, **own)
    store = ingest(DataConfig(name="s", root=str(tmp_path / "d"), labels=LABELS, size=64), tmp_path / "store")
    return store.manifest["group"].nunique(), store.disbelieved


def test_sixty_slices_of_one_placeholder_are_no_single_patient(tmp_path):
    number, notes = groups(tmp_path, PatientID=["ANONYMOUS"] * 6)
    assert number == 6
    assert "ANONYMOUS" in notes[0]


def test_an_identifier_for_each_file_leaves_the_series_together(tmp_path):
    number, notes = groups(
        tmp_path, PatientID=list("abcdef"), SeriesInstanceUID=["1.1", "1.1", "1.2", "1.2", "1.3", "1.3"]
    )
    assert number == 3
    assert not notes


def test_slices_with_any_identifier_in_common_are_one_group(tmp_path):
    number, _ = groups(tmp_path, PatientID=list("aabbcc"), StudyInstanceUID=["1.1", "1.2", "1.2", "1.3", "1.4", "1.5"])
    assert number == 2
