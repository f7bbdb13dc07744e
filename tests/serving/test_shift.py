"""The drift report on simulated windows: when it speaks, when it is silent, and what it shows."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact

from chestct import drift_command as program
from chestct.files import json_digest
from chestct.imaging.statistics import STATISTICS
from chestct.models.bundle import FACTS, Bundle, load_bundle
from chestct.reporting import drift_report
from chestct.serving.monitor import COLUMNS, NUMBERS, _opened
from chestct.serving.shift import TITLES, compare
from chestct.stats.drift import holm, kolmogorov_smirnov
from tests.models.test_bundle import make

ROOT = Path(__file__).parents[2]
TRAIN, VALID = 500, 120
LEVELS = np.linspace(0, 1, 101)


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


def records(bundle: Bundle, rng: np.random.Generator, n: int, refused: int = 0) -> dict[str, np.ndarray]:
    values = draw(rng, n)
    decision = bundle.point.decide(np.stack([1 - values["score"], values["score"]], 1), values["novelty"])
    decision[:refused] = "refused"
    return {
        "time": np.arange(n) + 1_790_000_000,
        "bundle": np.full(n, bundle.id),
        "decision": decision.astype(str),
        "known": np.zeros(n, bool),
        **values,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the statistics of one draw."""
    folder = tmp_path_factory.mktemp("bundles") / "one"
    make(folder)
    rng = np.random.default_rng(1000)
    train, valid = draw(rng, TRAIN), draw(rng, VALID)
    facts = json.loads((folder / FACTS).read_text())
    facts["statistics"] = {
        name: np.quantile((train if name in STATISTICS else valid)[name], LEVELS).tolist() for name in NUMBERS
    }
    facts["data"]["slices"] = {"train": TRAIN, "valid": VALID, "test": 100}
    flagged = int((valid["score"] >= facts["operating_point"]["threshold"]).sum())
    facts["operating_point"]["validation"] = {"cancers": 60, "found": 0, "normals": 60, "flagged": flagged}
    del facts["digest"]
    (folder / FACTS).write_text(json.dumps(facts | {"digest": json_digest(facts)}))
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder)


def write(path: Path, found: dict[str, np.ndarray]) -> Path:
    with _opened(path) as database:
        rows = zip(*(found[name].tolist() for name in COLUMNS), strict=True)
        database.executemany(f"INSERT INTO answers VALUES ({', '.join('?' * len(COLUMNS))})", list(rows))
    return path


@pytest.mark.parametrize("n", [50, 100, 1000])
def test_slices_like_those_of_training_hardly_ever_raise_an_alarm(bundle, n):
    alarms = [compare(bundle, records(bundle, np.random.default_rng(seed), n)).verdict == "drift" for seed in range(20)]
    assert sum(alarms) <= 1


@pytest.mark.parametrize("name", ["mean", "std", "border_mean", "height", "score", "novelty"])
def test_a_number_that_moves_by_a_standard_deviation_is_found_and_named(bundle, name):
    found = records(bundle, np.random.default_rng(3), 200)
    found[name] = found[name] + found[name].std()
    drift = compare(bundle, found)
    assert drift.verdict == "drift"
    assert TITLES[name].lower() in drift.sentence
    drifted = {shift.name for shift in drift.shifts if shift.verdict == "drift"}
    assert drifted <= {name, "flagged"}
    assert "Has drifted: median" in next(shift.sentence for shift in drift.shifts if shift.name == name)


def test_p_values_are_holms(bundle):
    found = records(bundle, np.random.default_rng(3), 200)
    found["mean"] += 0.015
    shifts = compare(bundle, found).shifts
    raw = [
        kolmogorov_smirnov(
            np.array(bundle.facts["statistics"][name]), found[name], TRAIN if name in STATISTICS else VALID
        )[1]
        for name in (*STATISTICS, "score", "novelty")
    ]
    adjusted = [shift.p for shift in shifts]
    flagged = bundle.facts["operating_point"]["validation"]["flagged"]
    now = int((found["score"] >= bundle.point.threshold).sum())
    raw += [fisher_exact([[flagged, VALID - flagged], [now, 200 - now]]).pvalue, 1.0]
    assert adjusted == pytest.approx(holm(np.array(raw)), abs=1e-9)


def test_a_sure_change_that_is_small_is_no_alarm(bundle):
    found = records(bundle, np.random.default_rng(3), 5000)
    found["mean"] = found["mean"] + 0.4 * found["mean"].std()
    drift = compare(bundle, found)
    assert drift.verdict == "same"
    assert next(shift.verdict for shift in drift.shifts if shift.name == "mean") == "small"


def test_refusals_raise_an_alarm_of_their_own_and_do_not_colour_the_rest(bundle):
    found = records(bundle, np.random.default_rng(3), 300, refused=90)
    for name in NUMBERS:
        found[name][:90] = 50.0
    drift = compare(bundle, found)
    assert {shift.name for shift in drift.shifts if shift.verdict == "drift"} == {"refused"}
    assert drift.mix["refused"] == (90, 0.0)


def test_when_all_are_refused_that_alone_is_judged(bundle):
    drift = compare(bundle, records(bundle, np.random.default_rng(3), 80, refused=80))
    assert drift.verdict == "drift"
    assert [shift.name for shift in drift.shifts if shift.verdict != "unknown"] == ["refused"]


def test_few_records_are_not_judged(bundle):
    found = records(bundle, np.random.default_rng(3), 49)
    found["mean"] += 1
    drift = compare(bundle, found)
    assert drift.verdict == "few"
    assert "49 slices are too few to judge" in drift.sentence


def test_records_of_other_bundles_are_counted_and_left_out(bundle):
    found = records(bundle, np.random.default_rng(3), 120)
    found["bundle"][:30] = "other"
    found["mean"][:30] = 9.0
    drift = compare(bundle, found)
    assert (drift.slices, drift.others, drift.verdict) == (90, 30, "same")


def test_slices_of_the_training_data_are_counted_and_left_out(bundle):
    found = records(bundle, np.random.default_rng(3), 120)
    found["known"][:30] = True
    found["novelty"][:30] = 0.1
    drift = compare(bundle, found)
    assert (drift.slices, drift.known, drift.verdict) == (90, 30, "same")
    assert "30 slices" in drift_report.summary(drift)


@pytest.mark.parametrize(("change", "n", "status"), [(0.0, 200, 0), (0.2, 200, 1), (0.2, 20, 3)])
def test_the_exit_status_tells_the_verdict(bundle, folder, tmp_path, capsys, change, n, status):
    found = records(bundle, np.random.default_rng(4), n)
    found["mean"] += change
    db = write(tmp_path / "m.db", found)
    arguments = ["report", "--db", str(db), "--bundle", str(folder), "--out", str(tmp_path / "drift.html")]
    assert program.main(arguments) == status
    assert (tmp_path / "drift.html").is_file()
    assert bundle.id in capsys.readouterr().out


def test_errors_end_with_2_and_say_the_way_out(folder, tmp_path, capsys):
    assert program.main(["report", "--db", str(tmp_path / "none"), "--bundle", str(folder)]) == 2
    assert "monitor.enabled=true" in capsys.readouterr().err
    make(tmp_path / "plain")
    found = records(load_bundle(tmp_path / "plain"), np.random.default_rng(0), 60)
    db = write(tmp_path / "m.db", found)
    assert program.main(["report", "--db", str(db), "--bundle", str(tmp_path / "plain")]) == 2
    assert "no statistics" in capsys.readouterr().err


class Page(HTMLParser):
    """What a page refers to, and its identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.outside.append(value)
            if name == "id":
                self.ids.append(value)


def test_the_page_shows_all_that_was_compared_and_fetches_nothing(bundle):
    found = records(bundle, np.random.default_rng(5), 300, refused=9)
    found["mean"] += 0.1
    drift = compare(bundle, found)
    html = drift_report.html(drift)
    page = Page()
    page.feed(html)
    assert page.outside == []
    assert "script" not in page.tags
    assert not re.search(r"https?://|url\(", html)
    assert set(TITLES) <= set(page.ids)
    assert page.tags.count("svg") == len(TITLES) - 2  # two are shares, drawn as bars
    assert html.count("this window: ") == 2
    assert "nan" not in html
    for shift in drift.shifts:
        assert shift.sentence in html


def test_an_empty_window_makes_a_page_too(bundle):
    html = drift_report.html(compare(bundle, records(bundle, np.random.default_rng(5), 0)))
    assert "too few to judge" in html


def test_what_is_drawn_has_the_masses_of_what_was_seen(bundle):
    """Both histograms add up to one distribution each."""
    found = records(bundle, np.random.default_rng(5), 400)
    drawn = {shift.name: drift_report.histogram(shift) for shift in compare(bundle, found).shifts}
    assert drawn["refused"] is None  # a share
    assert drawn["mean"]["before"].sum() == pytest.approx(1)
    assert drawn["mean"]["now"].sum() == pytest.approx(1)
    assert drawn["mean"]["low"] < found["mean"].mean() < drawn["mean"]["high"]


def test_records_are_exported_for_other_tools(bundle, tmp_path):
    found = records(bundle, np.random.default_rng(5), 70)
    db = write(tmp_path / "m.db", found)
    assert program.main(["export", "--db", str(db), "--out", str(tmp_path / "r.parquet")]) == 0
    table = pd.read_parquet(tmp_path / "r.parquet")
    assert list(table.columns) == list(COLUMNS)
    assert table["mean"].to_numpy() == pytest.approx(found["mean"])
    assert str(table["time"].dt.tz) == "UTC"


@pytest.mark.slow
def test_the_report_imports_nothing_that_trains_or_serves(bundle, folder, tmp_path):
    db = write(tmp_path / "m.db", records(bundle, np.random.default_rng(5), 70))
    arguments = ["report", "--db", str(db), "--bundle", str(folder), "--out", str(tmp_path / "d.html")]
    code = (
        f"import sys; from chestct.drift_command import main; main({arguments}); "
        "print([m for m in ('lightning', 'hydra', 'mlflow', 'dvc', 'gradio', 'sklearn', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
