import pandas as pd
import pytest

from chestct.models.predictions import of_patients_first


@pytest.mark.parametrize(
    ("sources", "targets", "kept"),
    [
        (["a", "phantom", "b", "phantom"], [0, 1, 3, 0], [True, False, True, False]),
        (["phantom", "phantom"], [1, 0], [True, True]),
        (["a", "phantom"], [1, 0], [True, True]),  # there are no other normals
    ],
)
def test_phantoms_do_not_count_where_there_are_patients(
    sources: list[str], targets: list[int], kept: list[bool]
) -> None:
    slices = pd.DataFrame({"split": "valid", "source": sources, "target": targets})
    others = slices.assign(split="train")
    assert of_patients_first(pd.concat([others, slices]), "valid").tolist() == kept
