import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from chestct.evaluation.subgroups import subgroups
from tests.evaluation.evaluations import draw, made_up


def measured(wrong, strength=4.0):
    """Test slices, where those of `wrong`, bool [N], are of another source and called the opposite; and the rows of
    their subgroups by name.
    """
    labels, logits = draw(len(wrong), "binary", 0, strength)
    evaluation = made_up(test=(labels, np.where(wrong[:, None], -logits, logits)))
    test = evaluation.test.assign(source=np.where(wrong, "far_south", "north"))
    rows = subgroups(test, evaluation.cfg)
    return test, {row["name"]: row for row in rows}


def test_a_part_on_which_a_model_is_worse_is_flagged_and_one_on_which_it_is_better():
    test, rows = measured(np.arange(400) >= 200)
    overall = test["flagged"][test["label"] == "cancer"].mean()
    assert rows["far south"]["flag"] == f"sensitivity below the {overall:.3f} of all slices"
    assert rows["north"]["flag"] == f"sensitivity above the {overall:.3f} of all slices"
    parts = [(row["by"], row["normal"], row["cancer"], row["groups"]) for row in rows.values()]
    assert parts[:2] == [("source", 100, 100, 200)] * 2
    # Half of each subtype is wrong, as of all.
    assert [(row["by"], row["flag"]) for row in list(rows.values())[2:]] == [("subtype", "")] * 4


def test_parts_are_measured_at_the_threshold_on_their_own_slices():
    test, rows = measured(np.arange(400) >= 300, strength=1.0)
    score, cancer = test["probability_cancer"], test["label"] == "cancer"
    for name, source in (("far south", "far_south"), ("north", "north")):
        part, row = test["source"] == source, rows[name]
        assert row["sensitivity"].value == pytest.approx(test["flagged"][part & cancer].mean())
        assert row["specificity"].value == pytest.approx(1 - test["flagged"][part & ~cancer].mean())
        assert row["auroc"].value == pytest.approx(roc_auc_score(cancer[part], score[part]))
        assert row["sensitivity"].value != (score >= 0.5)[part & cancer].mean()
    assert rows["large cell"]["sensitivity"].value == test["flagged"][test["subtype"] == "large_cell"].mean()
    assert rows["large cell"]["specificity"].reason == "no normal slices in this split"
    assert rows["normal"]["flag"] == rows["large cell"]["flag"] == ""


@pytest.mark.parametrize(("groups", "judged"), [(4, False), (5, True)])
def test_a_part_of_few_groups_is_listed_but_not_judged(groups, judged):
    place = np.arange(400)
    _, rows = measured((place < 2 * groups) & (place % 2 == 1))  # cancer slices, all of which are missed
    south = rows["far south"]
    assert (south["cancer"], south["normal"], south["sensitivity"].value) == (groups, 0, 0)
    assert south["flag"][:17] == ("sensitivity below" if judged else "")


def test_what_does_not_divide_the_slices_is_left_out():
    evaluation = made_up()
    rows = subgroups(evaluation.test, evaluation.cfg)
    assert [row["name"] for row in rows] == ["adenocarcinoma", "large cell", "normal", "squamous"]
