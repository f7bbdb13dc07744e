import numpy as np
import pandas as pd
import pytest

from chestct.errors import DataError
from chestct.evaluation.compare import compare, compare_text
from chestct.models.predictions import output_names, to_scores
from chestct.stats.metrics import measure


def run(n=120, noise=1.0, seed=0, own=1.0, task="binary"):
    """A run's table of predictions; runs of one seed share their slices and, but for `own`, what is hard in them."""
    rng = np.random.default_rng(seed)
    names = output_names(task)
    target = rng.integers(0, max(2, len(names)), n)
    signal = (2 * target - 1)[:, None] if task == "binary" else 2 * np.eye(4)[target]
    hard = rng.normal(size=(n, len(names)))
    scores = to_scores(signal + noise * (hard + own * rng.normal(size=(n, len(names)))))
    frame = pd.DataFrame(
        {"source": "x", "path": [f"{i}.png" for i in range(n)], "content": [f"c{i}" for i in range(n)]}
    )
    frame = frame.assign(split="test", target=target, group=np.arange(n) // 2)
    return frame.assign(**{f"score_{name}": scores[:, i] for i, name in enumerate(names)})


def rows(frame):
    return {row["metric"]: row for row in frame.to_dict("records")}


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_differences_are_those_of_the_shared_slices_in_whatever_order(task):
    a, b = run(noise=2, task=task), run(noise=1, task=task)
    shuffled = b.sample(frac=1, random_state=1).iloc[:100]
    found = rows(compare(a, shuffled, task, resamples=50))
    shared = a[a["path"].isin(shuffled["path"])]
    of_a, of_b = measure(shared, task, resamples=10), measure(shuffled, task, resamples=10)
    assert set(found) == set(of_a)
    for name, row in found.items():
        assert row["a"] == pytest.approx(of_a[name].value), name
        assert row["b"] == pytest.approx(of_b[name].value), name
        assert row["difference"] == pytest.approx(row["b"] - row["a"]), name
        assert row["low"] <= row["difference"] <= row["high"], name
    assert found["accuracy"]["slices"] == 100
    assert found["accuracy"]["groups"] == shared["group"].nunique()


def test_only_the_split_that_was_asked_for_is_compared():
    a = run()
    a.loc[:59, "split"] = "valid"
    assert rows(compare(a, a, "binary", resamples=20))["accuracy"]["slices"] == 60
    b = run()
    assert rows(compare(a, b, "binary", resamples=20))["accuracy"]["slices"] == 60


def test_a_better_run_is_told_from_an_equal_one():
    a, better, equal = run(noise=3), run(noise=0.7), run(noise=3, own=1.0, seed=0).assign()
    equal["score_cancer"] = (equal["score_cancer"] + 1e-3 * np.random.default_rng(1).normal(size=120)).clip(0, 1)
    found = rows(compare(a, better, "binary"))
    assert found["auroc"]["excludes_zero"]
    assert found["auroc"]["low"] > 0
    assert found["log_loss"]["excludes_zero"]
    assert found["log_loss"]["high"] < 0
    assert not rows(compare(a, equal, "binary"))["auroc"]["excludes_zero"]
    mirrored = rows(compare(better, a, "binary"))
    assert mirrored["auroc"]["high"] == pytest.approx(-found["auroc"]["low"])


def test_pairing_narrows_the_interval():
    """Two runs that fail on the same slices: the difference is known better than either value."""
    a, b = run(n=300, noise=2), run(n=300, noise=2, own=1.2)
    paired = rows(compare(a, b, "binary"))["auroc"]
    single = measure(a, "binary")["auroc"]
    assert paired["high"] - paired["low"] < 0.6 * np.sqrt(2) * (single.high - single.low)


def test_a_run_compared_with_itself_has_no_interval_rather_than_certainty():
    found = rows(compare(run(), run(), "binary", resamples=50))["auroc"]
    assert (found["difference"], found["low"], found["excludes_zero"]) == (0.0, None, False)
    assert "same difference in every resample" in found["reason"]


def test_calibrated_scores_and_thresholds_belong_to_their_own_run():
    a = run()
    b = a.iloc[::-1]
    squeezed = b[["score_cancer"]].to_numpy() / 2
    found = rows(compare(a, b, "binary", scores=(None, squeezed), thresholds=(0.5, 0.25), resamples=20))
    assert found["accuracy"]["difference"] == 0
    assert found["auroc"]["difference"] == 0
    assert found["brier"]["difference"] > 0


def test_a_class_with_few_groups_gets_no_interval_for_what_rests_on_it():
    a, b = run(n=160, noise=3), run(n=160, noise=1)
    kept = np.r_[np.flatnonzero(a["target"] == 1), np.flatnonzero(a["target"] == 0)[:8]]
    found = rows(compare(a.iloc[kept], b.iloc[kept], "binary", resamples=200))
    for name in ("auroc", "specificity", "balanced_accuracy"):
        assert found[name]["difference"] is not None
        assert (found[name]["low"], found[name]["excludes_zero"]) == (None, False)
        assert "groups of a class, needs 10" in found[name]["reason"]
    for name in ("sensitivity", "log_loss", "accuracy"):
        assert found[name]["low"] is not None


def test_one_class_only_is_none_with_the_reason():
    a = run()[lambda frame: frame["target"] == 1]
    found = rows(compare(a, a, "binary", resamples=20))
    assert found["auroc"]["difference"] is None
    assert found["specificity"]["reason"] == "no normal slices in this split"
    text = compare_text(compare(a, a, "binary", resamples=20), "A", "B")
    assert "n/a" in text
    assert "nan" not in text.lower()


def test_runs_without_shared_slices_say_how_many_each_has():
    other = run().assign(content="another picture")
    with pytest.raises(DataError, match=r"share no test slice: A has 120, B has 80\b.*data\.split"):
        compare(run(), other.iloc[:80], "binary")
    with pytest.raises(DataError, match="share 6 test slices in 3 groups; a comparison needs 10"):
        compare(run(), run().iloc[:6], "binary")
    with pytest.raises(DataError, match="share no valid slice: A has 0, B has 0"):
        compare(run(), run(), "binary", split="valid")


def test_tables_that_disagree_are_refused_with_the_count():
    changed = run()
    changed.loc[:2, "target"] = 1 - changed.loc[:2, "target"]
    with pytest.raises(DataError, match="3 of 120 shared slices have another target"):
        compare(run(), changed, "binary")
    with pytest.raises(DataError, match="Run B holds 5 test slices twice"):
        compare(run(), pd.concat([run(), run().iloc[:5]]), "binary")
    with pytest.raises(DataError, match="Not a table of task subtype"):
        compare(run(), run(), "subtype")


def test_the_text_marks_what_excludes_zero():
    text = compare_text(compare(run(noise=3), run(noise=0.7), "binary"), "runs/old", "runs/new")
    assert "A  runs/old" in text
    assert "120 shared slices in 60 groups" in text
    marked = next(line for line in text.splitlines() if line.startswith("auroc"))
    assert marked.endswith("] *")
    assert max(map(len, text.splitlines())) <= 120
