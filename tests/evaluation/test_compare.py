import numpy as np
import pandas as pd
import pytest

from chestct.config.schema import classes_of
from chestct.errors import DataError
from chestct.evaluation.compare import compare, compare_text
from chestct.models.predictions import output_names
from chestct.stats.calibration import to_scores
from chestct.stats.metrics import measure


def run(n=120, noise=1.0, task="binary", power=1.0):
    """A run's table of predictions; runs share their slices and half of what is hard in them."""
    rng = np.random.default_rng(0)
    names = output_names(task)
    target = rng.integers(0, max(2, len(names)), n)
    signal = (2 * target - 1)[:, None] if task == "binary" else 2 * np.eye(4)[target]
    hard = rng.normal(size=(n, len(names)))
    logits = signal + noise * (hard + rng.normal(size=(n, len(names))))
    scores = to_scores(logits) ** power
    frame = pd.DataFrame(
        {"source": "x", "path": [f"{i}.png" for i in range(n)], "content": [f"c{i}" for i in range(n)]}
    )
    frame = frame.assign(split="test", target=target, group=np.arange(n) // 2)
    probabilities = np.hstack([1 - scores, scores]) if task == "binary" else scores
    frame = frame.assign(**{f"logit_{name}": logits[:, i] for i, name in enumerate(names)})
    frame = frame.assign(**{f"probability_{name}": probabilities[:, i] for i, name in enumerate(classes_of(task))})
    return frame.assign(flagged=1 - probabilities[:, 0] >= 0.5**power)


def rows(frame):
    return {row["metric"]: row for row in frame.to_dict("records")}


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_differences_are_those_of_the_shared_test_slices_in_whatever_order(task):
    a, b = run(noise=2, task=task), run(noise=1, task=task)
    shuffled = b.sample(frac=1, random_state=1)
    shuffled.loc[shuffled.index[100:], "split"] = "valid"
    compared = rows(compare(a, shuffled, resamples=50))
    tested = shuffled[shuffled["split"] == "test"]
    shared = a[a["path"].isin(tested["path"])]
    of_a, of_b = (measure(part, task, resamples=10) for part in (shared, tested))
    assert set(compared) == set(of_a)
    for name, row in compared.items():
        assert row["difference"] == pytest.approx(row["b"] - row["a"]), name
        assert row["low"] <= row["difference"] <= row["high"], name
    for name in ("auroc", "log_loss", "accuracy"):
        assert compared[name]["a"] == pytest.approx(of_a[name].value), name
        assert compared[name]["b"] == pytest.approx(of_b[name].value), name
    assert compared["accuracy"]["slices"] == 100
    assert compared["accuracy"]["groups"] == shared["group"].nunique()


def test_a_better_run_is_told_from_an_equal_one_and_the_text_marks_it():
    a, better, equal = run(noise=3), run(noise=0.7), run(noise=3)
    equal["probability_cancer"] += 1e-3 * np.random.default_rng(1).normal(size=120)
    frame = compare(a, better)
    compared = rows(frame)
    assert compared["auroc"]["excludes_zero"]
    assert compared["auroc"]["low"] > 0
    assert compared["log_loss"]["high"] < 0
    assert not rows(compare(a, equal))["auroc"]["excludes_zero"]
    assert rows(compare(better, a))["auroc"]["high"] == pytest.approx(-compared["auroc"]["low"])
    text = compare_text(frame, "runs/old", "runs/new")
    assert "A  runs/old" in text
    assert "120 shared slices in 60 groups" in text
    assert next(line for line in text.splitlines() if line.startswith("auroc")).endswith("] *")
    assert max(map(len, text.splitlines())) <= 120


def test_a_run_compared_with_itself_has_no_interval_and_each_run_its_own_scores_and_threshold():
    auroc = rows(compare(run(), run(), resamples=50))["auroc"]
    assert (auroc["difference"], auroc["low"], auroc["excludes_zero"]) == (0.0, None, False)
    assert "same difference in every resample" in auroc["reason"]
    compared = rows(compare(run(), run(power=2.0), resamples=20))
    assert compared["accuracy"]["difference"] == compared["auroc"]["difference"] == 0
    assert compared["brier"]["difference"] > 0


def test_a_class_with_few_groups_or_none_gets_no_interval_for_what_rests_on_it():
    a, b = run(n=160, noise=3), run(n=160, noise=1)
    kept = np.r_[np.flatnonzero(a["target"] == 1), np.flatnonzero(a["target"] == 0)[:8]]
    compared = rows(compare(a.iloc[kept], b.iloc[kept], resamples=200))
    for name in ("auroc", "specificity", "balanced_accuracy"):
        assert compared[name]["difference"] is not None
        assert (compared[name]["low"], compared[name]["excludes_zero"]) == (None, False)
        assert "groups of a class, needs 10" in compared[name]["reason"]
    for name in ("log_loss", "accuracy"):
        assert compared[name]["low"] is not None
    frame = compare(*[a[a["target"] == 1]] * 2, resamples=20)
    assert rows(frame)["auroc"]["difference"] is None
    assert rows(frame)["specificity"]["reason"] == "no normal slices in this split"
    assert "nan" not in compare_text(frame, "A", "B").lower()


def test_runs_that_cannot_be_compared_are_refused_with_the_count():
    other = run().assign(content="another picture")
    other["content"] += other["path"]
    changed = run()
    changed.loc[:2, "target"] = 1 - changed.loc[:2, "target"]
    for a, b, says in (
        (run(), other, r"share 0 test slices in 0 groups \(A has 120, B has 120\).*data\.split"),
        (run(), run().iloc[:6], "share 6 test slices in 3 groups"),
        (run(), changed, "3 of 120 shared slices have another target"),
        (run(), run(task="subtype"), "different tasks"),
        (run(task="subtype"), run(), "different tasks"),
    ):
        with pytest.raises(DataError, match=says):
            compare(a, b)


def test_a_bundle_of_subtypes_on_slices_that_only_say_cancer_is_compared_as_cancer_against_normal():
    told = [run(task="subtype", noise=noise) for noise in (2, 1)]
    binary = [
        t.assign(target=(t["target"] > 0).astype(int), probability_cancer=1 - t["probability_normal"]) for t in told
    ]
    compared = rows(compare(*binary, resamples=20))
    for key, table in zip("ab", binary, strict=True):
        assert compared["accuracy"][key] == pytest.approx((table["flagged"] == (table["target"] == 1)).mean())
    assert "auroc/squamous" not in compared
    with pytest.raises(DataError, match="different tasks"):
        compare(told[0], binary[1])


def test_decisions_are_those_in_the_table_to_the_last_slice():
    table = run()
    least = table.loc[table["flagged"], "probability_cancer"].idxmin()
    table["probability_normal"] = table["probability_normal"].where(table.index != least, lambda p: np.nextafter(p, 0))
    accuracy = rows(compare(table, table, resamples=20))["accuracy"]["a"]
    assert accuracy == (table["flagged"] == (table["target"] == 1)).mean()
