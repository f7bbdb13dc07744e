"""The drift report on simulated windows: when it speaks, when it is silent, and what it shows."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from chestct.imaging.statistics import STATISTICS
from chestct.models.bundle import Bundle, load_bundle, save_bundle
from chestct.reporting import drift_report
from chestct.reporting.drift_report import compare
from chestct.serving.monitor import COLUMNS, NUMBERS
from chestct.stats.drift import MEASURED, QUANTILES
from tests.conftest import command
from tests.models.test_bundle import make


def draw(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """The numbers of n slices, about as those of the public set: skewed, with ties, bimodal."""
    black = rng.random(n) < 0.4
    return {
        "score": np.where(rng.random(n) < 0.5, rng.beta(8, 1, n), rng.beta(1, 8, n)),
        "novelty": rng.lognormal(-0.4, 0.15, n),
        "width": rng.choice([331.0, 400.0, 512.0], n, p=[0.3, 0.5, 0.2]),
        "height": np.rint(rng.normal(300, 40, n)),
        "mean": rng.normal(0.35, 0.06, n),
        "std": rng.normal(0.27, 0.03, n),
        "border_mean": np.where(black, 0.0, rng.gamma(2, 0.03, n)),
        "border_std": np.where(black, 0.0, rng.gamma(2, 0.02, n)),
    }


def records(bundle: Bundle, seed: int, n: int, refused: int = 0) -> dict[str, np.ndarray]:
    what = {"bundle": np.full(n, bundle.id), "decision": np.array(["refused"] * refused + ["normal"] * (n - refused))}
    days = np.arange(n) + 1_790_000_000
    return {"time": days, **what, "known": np.zeros(n, bool), **draw(np.random.default_rng(seed), n)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the statistics of one draw."""
    folder = tmp_path_factory.mktemp("bundles") / "one"
    made = make(folder)
    rng = np.random.default_rng(1000)
    train, valid = draw(rng, 500), draw(rng, 120)
    both = valid | {name: train[name] for name in STATISTICS}
    made.facts["statistics"] = {name: np.quantile(both[name], QUANTILES).tolist() for name in NUMBERS}
    made.facts["data"]["slices"] = {"train": 500, "valid": 120, "test": 100}
    save_bundle(folder, made)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder)


def write(path: Path, window: dict[str, np.ndarray]) -> Path:
    with closing(sqlite3.connect(path)) as database:
        pd.DataFrame(window)[list(COLUMNS)].to_sql("answers", database, index=False)
    return path


def drifted(drift: drift_report.Drift) -> list[str]:
    return [shift.name for shift in drift.shifts if shift.drifted]


@pytest.mark.parametrize("n", [50, 100, 1000])
def test_slices_like_those_of_training_hardly_ever_raise_an_alarm(bundle, n):
    assert sum(compare(bundle, records(bundle, seed, n)).verdict == "drift" for seed in range(20)) <= 1


@pytest.mark.parametrize("name", ["mean", "std", "border_mean", "height", "score", "novelty"])
def test_a_number_that_moves_by_a_standard_deviation_is_found_and_named(bundle, name):
    window = records(bundle, 3, 200)
    window[name] = window[name] + window[name].std()
    drift = compare(bundle, window)
    assert drifted(drift) == [name]
    assert f"have drifted: {name}." in drift_report.summary(drift)
    assert [shift.name for shift in drift.shifts] == [*MEASURED, "refused"]


def test_a_sure_change_that_is_small_is_no_alarm(bundle):
    window = records(bundle, 3, 5000)
    window["mean"] = window["mean"] + 0.4 * window["mean"].std()
    drift = compare(bundle, window)
    assert drift.verdict == "same"
    assert next(shift.p for shift in drift.shifts if shift.name == "mean") < 0.001


def test_refusals_raise_an_alarm_of_their_own_and_do_not_colour_the_rest(bundle):
    window = records(bundle, 3, 300, refused=90)
    for name in NUMBERS:
        window[name][:90] = 50.0
    drift = compare(bundle, window)
    assert drifted(drift) == ["refused"]
    assert drift.decisions == {"normal": 210, "refused": 90}
    drift = compare(bundle, records(bundle, 3, 80, refused=80))  # nothing else is left to judge
    assert drifted(drift) == [shift.name for shift in drift.shifts] == ["refused"]


def test_too_few_answers_are_no_sign_that_nothing_changed(bundle):
    drift = compare(bundle, records(bundle, 3, 52, refused=3))
    assert [shift.name for shift in drift.shifts] == ["refused"]
    assert drift.verdict == "few"
    assert "49 answered slices, of 52, are too few to judge" in drift_report.summary(drift)
    everything = compare(bundle, records(bundle, 3, 52, refused=52))
    assert everything.verdict == "drift"


def test_slices_of_other_bundles_and_of_the_training_data_are_counted_and_left_out(bundle):
    window = records(bundle, 3, 150)
    window["bundle"] = np.array(["other"] * 30 + [bundle.id] * 60 + [f"{bundle.id}-openvino_int8"] * 60)
    window["known"][30:60] = True
    window["mean"][:60] = 9.0
    drift = compare(bundle, window)
    assert (drift.slices, drift.others, drift.known, drift.verdict) == (90, 30, 30, "same")
    assert "30 of other bundles, 30 of the training data" in drift_report.summary(drift)


@pytest.mark.parametrize(("change", "n", "status"), [(0.0, 200, 0), (0.2, 200, 1), (0.2, 49, 3), (0, 0, 3)])
def test_the_exit_status_tells_the_verdict(bundle, folder, tmp_path, capsys, change, n, status):
    window = records(bundle, 4, n)
    window["mean"] += change
    assert command("drift", "report", "--db", write(tmp_path / "m.db", window), "--bundle", folder) == status
    printed = capsys.readouterr().out
    assert bundle.id in printed
    for shift in compare(bundle, window).shifts:
        assert shift.change in printed


def test_errors_end_with_2_and_say_the_way_out(bundle, folder, small_bundle, tmp_path, capsys):
    db = write(tmp_path / "m.db", records(bundle, 0, 60))
    for records_of, model, message in (
        (tmp_path / "none", folder, "monitor.enabled=true"),
        (db, small_bundle, "no statistics"),
    ):
        assert command("drift", "report", "--db", records_of, "--bundle", model) == 2
        assert message in capsys.readouterr().err
