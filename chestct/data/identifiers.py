"""Which DICOM identifiers are believed: those that tell slices apart.

Anonymisers write one PatientID (`id`, `ANONYMOUS`, the name of the class) into every file. Believed, it would make one
patient of a whole collection. An identifier that is set aside is named in the audit, for patients may then cross
splits unnoticed.
"""

import re

import pandas as pd

from chestct.config.schema import LABEL_NAMES

IDENTIFIERS = {"patient": "PatientID", "study": "StudyInstanceUID", "series": "SeriesInstanceUID"}
"""Columns of the manifest and the DICOM attributes that they hold."""

PLACEHOLDERS = {
    *("", "id", "name", "patient", "patientid", "patientname", "subject", "case", "test", "noname", "noid"),
    *("unknown", "none", "null", "na", "nan", "notavailable", "removed", "hidden", "deidentified"),
    *(re.sub(r"\W|_", "", name) for name in LABEL_NAMES),
}
"""Values, in lower case and without punctuation, that stand for "not given"."""


def believable(manifest: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The identifiers of each slice, "" where they are not believed, and a sentence for each that is set aside.

    manifest: one row a slice, with source, subtype, content and the columns of IDENTIFIERS. An identifier of a source
    is set aside where it has one value at most in each class and covers most of the source's slices; single values are
    set aside where they are placeholders.
    """
    result = manifest[list(IDENTIFIERS)].copy()
    notes = []
    for source, rows in manifest.groupby("source", sort=False):
        for column, attribute in IDENTIFIERS.items():
            values = rows[column]
            placeholder = (values != "") & values.map(_is_placeholder)
            given = values[(values != "") & ~placeholder]
            if placeholder.any():
                shown = ", ".join(map(repr, values[placeholder].unique()[:3]))
                notes.append(f"{attribute} is a placeholder ({shown}) in {placeholder.sum()} slices of {source}")
                result.loc[values.index[placeholder], column] = ""
            classes = given.groupby(rows["subtype"]).nunique()
            contents = rows["content"]
            if 2 * contents[given.index].nunique() > contents.nunique() > len(classes) and (classes <= 1).all():
                what = "the same" if given.nunique() == 1 else "the same within each class"
                notes.append(f"{attribute} is {what} in all {len(given)} slices of {source} that have one")
                result.loc[given.index, column] = ""
    return result, [f"{note}: it tells no slices apart and was not used." for note in notes]


def _is_placeholder(value: str) -> bool:
    word = re.sub(r"\W|_", "", value).lower()
    return word in PLACEHOLDERS or re.fullmatch("anon[a-z]*|x+", word) is not None
