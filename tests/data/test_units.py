"""What stands for the patient: identifiers that are believed, names of files, runs of their numbers."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chestct.config.schema import DataConfig, SourceConfig
from chestct.data import units
from chestct.data.duplicates import link
from chestct.data.prepare import ingest
from chestct.data.units import believable
from chestct.errors import DataError
from tests.data.test_prepare import LABELS, draw
from tests.imaging.files import dicom


def table(**columns: list[str]) -> pd.DataFrame:
    """Six slices of one source: three normal, three cancer."""
    manifest = pd.DataFrame({"source": "s", "subtype": ["normal"] * 3 + ["cancer"] * 3, "content": list("abcdef")})
    return manifest.assign(**{name: columns.get(name, [""] * 6) for name in units.IDENTIFIERS})


@pytest.mark.parametrize(
    ("values", "believed"),
    [
        (["id"] * 6, [""] * 6),
        (["normal"] * 3 + ["cancer"] * 3, [""] * 6),
        (["健康"] * 3 + ["Krebs"] * 3, [""] * 6),
        (["only this"] * 5 + [""], [""] * 6),
        (["Patient ID", "none", "N/A", "xxx", "", "Anonymized"], [""] * 6),
        (["p1", "p2", "id", "p3", "ANONYMOUS", "p3"], ["p1", "p2", "", "p3", "", "p3"]),
        (["0", "0", "1", "1", "2", "2"], None),
        (["ANON1", "ANON1", "ANON2", "ANON2", "ANON2", "ANON3"], None),
        (["a", "a", "a", "b", "b", "a"], None),  # two patients, one with both classes
        (["a", "a", "", "", "", ""], None),  # of a few slices among many others
        (["test1", "normal1", "id7", "id7", "", ""], None),
    ],
)
@pytest.mark.parametrize("column", units.IDENTIFIERS)
def test_an_identifier_is_believed_where_it_tells_slices_apart_and_else_named(column, values, believed):
    result, notes = believable(table(**{column: values}))
    assert result[column].tolist() == (values if believed is None else believed)
    assert len(notes) == (believed is not None)
    assert all(units.IDENTIFIERS[column] in note for note in notes)


def test_an_identifier_that_is_set_aside_is_shown_only_where_it_is_a_placeholder():
    _, (note,) = believable(table(patient=["MUELLER^HANS"] * 3 + ["SCHMIDT^EVA"] * 3))
    assert "is the same throughout each class (different values: 2) in 6 slices of s:" in note
    _, (note,) = believable(table(patient=["Anonymized"] * 6))
    assert "is a placeholder ('Anonymized') in 6 slices" in note


def test_each_source_is_judged_by_itself():
    other = table(patient=list("aabbcc")).assign(source="t", content=list("ghijkl"))
    result, (note,) = believable(pd.concat([table(patient=["id1"] * 6), other], ignore_index=True))
    assert result["patient"].tolist() == [""] * 6 + list("aabbcc")
    assert "of s:" in note


@pytest.mark.parametrize(
    ("identifiers", "groups", "noted"),
    [
        ({"PatientID": ["ANONYMOUS"] * 6}, 6, True),  # no single patient
        ({"PatientID": list("abcdef"), "SeriesInstanceUID": ["1.1", "1.1", "1.2", "1.2", "1.3", "1.3"]}, 3, False),
        ({"PatientID": list("aabbcc"), "StudyInstanceUID": ["1.1", "1.2", "1.2", "1.3", "1.4", "1.5"]}, 2, False),
    ],
)
def test_slices_with_a_believed_identifier_in_common_are_one_group(tmp_path, identifiers, groups, noted):
    for i in range(6):
        path = tmp_path / "d" / ("normal" if i < 3 else "cancer") / f"{i}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = np.kron(np.random.default_rng(i).integers(0, 1500, (8, 8)), np.ones((10, 10))).astype(np.int16)
        own = {name: values[i] for name, values in identifiers.items()}
        path.write_bytes(dicom(stored, **dict.fromkeys(units.IDENTIFIERS.values()) | own))
    made = ingest(DataConfig(name="s", root=str(tmp_path / "d"), labels=LABELS, size=64), tmp_path / "store")
    assert made.manifest["group"].nunique() == groups
    assert bool(made.disbelieved) is noted


def test_a_bare_number_in_two_sources_is_two_patients():
    one, two = (table(patient=[*"112233"]).assign(source=source) for source in "st")
    one["patient"] = one["patient"].where(one["patient"] != "3", "P7")
    two["patient"] = two["patient"].where(two["patient"] != "3", "P7")
    joined = units.join(pd.concat([one, two], ignore_index=True), link([], "exact"), [], [])
    assert joined.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 2, 2]
    assert joined.notes == ["Patient numbers that stand in several sources (2) are taken for different patients."]


def test_an_ordered_source_without_a_slice_joins_nothing_and_is_not_spoken_of():
    manifest = table().assign(path=[f"s/{i}.png" for i in range(6)])
    joined = units.join(manifest, link([], "exact"), [], ["none", "s"])
    assert joined.group.tolist() == [*range(6)]
    (note,) = joined.notes
    assert "File numbers of s " in note


def named(root, **settings):
    """Settings of the slices of `cfg` as the source `s` of several."""
    return DataConfig(name="several", sources={"s": SourceConfig(str(root), **settings)}, labels=LABELS, size=64)


def test_a_patient_in_the_name_joins_slices_and_is_believed_whatever_it_is(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    names = ["cancer/id-A7_1", "cancer/id-A7_2", "normal/id-A7_3", "normal/id-B_1", "normal/12", "normal/13"]
    for name in names:
        draw(tmp_path / "data" / f"{name}.png", rng)
    made = ingest(named(tmp_path / "data", patient=r"id-([A-Z]\d?)_"), tmp_path / "store")
    assert made.manifest["patient"].tolist() == ["A7", "A7", "", "", "A7", "B"]
    assert made.manifest["group"].tolist() == [0, 0, 1, 2, 0, 3]
    (note,) = made.notes
    assert "does not match 2 of 6 files: " in note
    assert note.endswith(" For example normal/12.png.")
    numbers = ingest(named(tmp_path / "data", patient=r"_(\d)"), tmp_path / "store")
    assert set(numbers.manifest["patient"]) == {"", "s 1", "s 2", "s 3"}  # another source's 1 is somebody else
    assert numbers.manifest["group"].nunique() == 5
    with pytest.raises(DataError, match=r"data.sources.s.patient=\(Q\\d\) matches none of the 6 files"):
        ingest(named(tmp_path / "data", patient=r"(Q\d)"), tmp_path / "store")
    monkeypatch.setattr("chestct.data.sources.SECONDS", 1)
    with pytest.raises(DataError, match=r"data\.sources\.s\.patient=.* more than 1 s for 6 names.*repeat"):
        ingest(named(tmp_path / "data", patient=r"(?:(?:.|\S)+)+(Q)"), tmp_path / "store")


def test_near_copy_groups_whose_file_numbers_interleave_are_one_unit(tmp_path):
    """Two slices of three patients each were saved twice or three times; numbers run from patient to patient."""
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "cancer"
    # patient 1: a b a b; patient 2: c d c d, a stray copy of c far away; patient 3: e e
    order = {1: "a", 2: "b", 3: "a", 4: "b", 5: "c", 6: "d", 7: "c", 9: "d", 10: "e", 11: "e", 40: "c"}
    for slice_ in sorted(set(order.values())):
        draw(tmp_path / f"{slice_}.png", rng)
    folder.mkdir(parents=True)
    for number, slice_ in order.items():
        image = Image.open(tmp_path / f"{slice_}.png")
        image.point(lambda level, by=number: level * (100 - by % 7) / 100).save(folder / f"Case ({number}).png")
    draw(tmp_path / "data" / "normal" / "Case (6).png", rng)  # other folders count for themselves
    plain = ingest(named(tmp_path / "data"), tmp_path / "store")
    assert (plain.manifest["group"].nunique(), plain.notes) == (6, [])
    made = ingest(named(tmp_path / "data", ordered=True), tmp_path / "store")
    numbers = made.manifest["path"].str.extract(r"\((\d+)\)")[0].astype(int)
    cancers = made.manifest["label"] == "cancer"
    units = made.manifest[cancers].groupby("group").apply(lambda rows: sorted(numbers[rows.index])).tolist()
    assert sorted(units) == [[1, 2, 3, 4], [5, 6, 7, 9, 40], [10, 11]]
    assert (made.pairs["kind"] == "order").sum() == 2
    (note,) = made.notes
    assert "interleave were joined, 6 to 4" in note
    draw(tmp_path / "data" / "normal" / f"1.2.840.{10**30}.png", rng)  # more than 64 bits, as in UIDs
    assert ingest(named(tmp_path / "data", ordered=True), tmp_path / "store").manifest["group"].nunique() == 5
    (tmp_path / "data" / "normal" / "Case (6).png").rename(tmp_path / "data" / "normal" / "six.png")
    with pytest.raises(DataError, match=r"ordered says .* normal/six.png has no number .* Set .*.ordered=false"):
        ingest(named(tmp_path / "data", ordered=True), tmp_path / "store")
