"""What stands for the patient: copies and near-copies, identifiers, patients in file names, runs of file numbers.

Each of them links slices, and what is linked is one group. A link too many costs slices of the test set, a link too few
makes a score too good; so what is not sure (an anonymiser's placeholder, the order of files) is said in a sentence.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from chestct.config.schema import LABEL_NAMES
from chestct.data.duplicates import group, link
from chestct.errors import DataError

# Columns of the manifest and the DICOM attributes that they hold
IDENTIFIERS = {"patient": "PatientID", "study": "StudyInstanceUID", "series": "SeriesInstanceUID"}
# Identifiers, in lower case and without punctuation, that stand for "not given"
PLACEHOLDER = (
    "|id|name|patient|patientid|patientname|subject|case|test|noname|noid|unknown|none|null|na|nan|notavailable"
    "|removed|hidden|deidentified|anon[a-z]*|x+|" + "|".join(name.replace("_", "") for name in LABEL_NAMES)
)
GAP = 10  # numbers that may be missing within a run of files: others of the patient may be in another near-copy group


@dataclass(frozen=True)
class Units:
    """pairs: all that is linked, a < b, similarity, kind; group: int64 [N], the connected components of them;
    disbelieved, notes: sentences about identifiers that link nothing, and about what else is not sure."""

    pairs: pd.DataFrame
    group: np.ndarray
    disbelieved: list[str]
    notes: list[str]


def join(manifest: pd.DataFrame, copies: pd.DataFrame, named: Collection[str], ordered: Sequence[str]) -> Units:
    """The groups of a manifest's slices.

    copies: from `find_pairs`; named: sources whose column `patient` comes from file names; ordered: those whose file
    numbers run in patient order. Raises DataError for a file of the latter that has no number.
    """
    present = set(manifest["source"])  # others have no readable slice
    ordered = [source for source in ordered if source in present]
    identifiers, disbelieved = believable(manifest, named)
    # Every hospital counts from 1: a bare number is one within its source only.
    numbers = identifiers["patient"].where(identifiers["patient"].str.isdigit(), "")
    shared = int((manifest["source"].groupby(numbers).nunique().drop("", errors="ignore") > 1).sum())
    for column, ids in identifiers.items():
        identifiers[column] = ids.mask(ids.str.isdigit(), manifest["source"] + " " + ids)
    same_id = pd.concat([link(identifiers[column].tolist(), "series") for column in identifiers])
    pairs = pd.concat([copies, same_id.drop_duplicates()], ignore_index=True)
    groups, notes = group(len(manifest), pairs), []
    if shared:
        notes.append(f"Patient numbers that stand in several sources ({shared}) are taken for different patients.")
    for source in ordered:
        pairs = pd.concat([pairs, interleaved(manifest[manifest["source"] == source], groups)], ignore_index=True)
    joined = group(len(manifest), pairs)
    for source in ordered:
        before, after = (len(np.unique(part[manifest["source"] == source])) for part in (groups, joined))
        notes.append(
            f"File numbers of {source} are taken to run in patient order: groups whose runs of numbers interleave were "
            f"joined, {before} to {after}. They are runs of near-copies, without patient ids: some may be several "
            "patients, some patients may be several of them."
        )
    return Units(pairs, joined, disbelieved, notes)


def interleaved(rows: pd.DataFrame, groups: np.ndarray) -> pd.DataFrame:
    """Pairs of kind "order" that link groups of one class folder whose runs of file numbers interleave.

    rows: of the manifest, of one source; groups: int [N] of the whole manifest. A group's run is the longest part of
    its numbers without a gap above GAP: a stray near-copy far away does not stretch it. Raises DataError for a file
    whose name has no number.
    """
    folder, number = rows["path"].str.rpartition("/")[0], rows["path"].map(lambda path: PurePosixPath(path).stem)
    number = number.str.extract(r"(\d+)\D*$")[0]
    if (missing := number.isna()).any():
        setting = f"data.sources.{rows['source'].iat[0]}.ordered"
        raise DataError(
            f"{setting} says that file numbers run in patient order, but {rows['path'][missing].iat[0]} has no number "
            f"in its name. Set {setting}=false."
        )
    table = pd.DataFrame({"folder": folder, "number": number.map(int).astype(object), "group": groups[rows.index]})
    links: list[tuple[int, int]] = []
    for _, part in table.sort_values("number").groupby("folder"):
        runs = []
        for _, own in part.groupby("group"):
            parts = np.split(own["number"].to_numpy(), np.flatnonzero(np.diff(own["number"]) > GAP) + 1)
            run = max(parts, key=len)
            runs.append((run[0], run[-1], own.index[0]))
        end, last = -1, -1
        for low, high, first in sorted(runs):
            if low < end:
                links.append((min(last, first), max(last, first)))
            if high > end:
                end, last = high, first
    return pd.DataFrame(links, columns=["a", "b"], dtype=np.int64).assign(similarity=1.0, kind="order")


def believable(manifest: pd.DataFrame, named: Collection[str] = ()) -> tuple[pd.DataFrame, list[str]]:
    """The manifest's DICOM identifiers that tell slices apart, "" elsewhere, and a sentence for each set aside.

    Anonymisers write one PatientID (`id`, `ANONYMOUS`, the name of the class) into every file; believed, it would make
    one patient of a whole collection. Set aside are placeholders, and an identifier of a source that has one value at
    most in each class and covers most of the source's slices. Patients of the sources `named` are believed as they are.
    """
    result = manifest[list(IDENTIFIERS)].copy()
    notes = []
    for source, rows in manifest.groupby("source", sort=False):
        contents = rows["content"]
        for column, attribute in IDENTIFIERS.items():
            if column == "patient" and source in named:
                continue
            values = rows[column][rows[column] != ""]
            placeholder = values.str.replace(r"\W|_", "", regex=True).str.lower().str.fullmatch(PLACEHOLDER)
            given = values[~placeholder]
            classes = given.groupby(rows["subtype"]).nunique()
            covers_most = 2 * contents[given.index].nunique() > contents.nunique()
            one_a_class = (classes <= 1).all() and contents.nunique() > len(classes)
            constant = given if covers_most and one_a_class else given[:0]
            shown = ", ".join(map(repr, values[placeholder].unique()[:3]))
            # Not its values, which may be patients: notes go into cards and records.
            same = f"the same throughout each class (different values: {constant.nunique()})"
            for what, aside in ((f"a placeholder ({shown})", values[placeholder]), (same, constant)):
                if len(aside):
                    notes.append(
                        f"{attribute} is {what} in {len(aside)} slices of {source}: it tells no slices apart and was "
                        "not used."
                    )
                    result.loc[aside.index, column] = ""
    return result, notes
