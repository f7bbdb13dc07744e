"""The record of what the service saw: what is in it, what is not, and what it survives."""

import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from chestct.imaging.slice import Slice
from chestct.serving import monitor
from chestct.serving.monitor import Monitor, MonitorError, read_records
from chestct.serving.predictor import Prediction, Predictor
from tests.serving.test_predictor import png

ROOT = Path(__file__).parents[2]


def prediction(score: float = 0.25, decision: str = "normal", patient: str = "") -> Prediction:
    gray = np.full((70, 80), 137, np.uint8)
    statistics = {"width": 80, "height": 70, "mean": 0.5, "std": 0.1, "border_mean": 0.0, "border_std": 0.0}
    result = Slice(gray, "DICOM", "DICOM", patient=patient)
    return Prediction(
        score,
        decision,
        "",
        {"normal": 1 - score},
        ("normal",),
        0.7,
        False,
        gray,
        None,
        result,
        statistics,
        {},
        "b" * 12,
    )


def test_a_record_holds_what_the_drift_report_needs(tmp_path):
    kept = Monitor(tmp_path / "m.db")
    before = int(time.time())
    kept.record(prediction(0.25))
    kept.record(prediction(0.75, "cancer"))
    kept.close()
    result = read_records(tmp_path / "m.db")
    assert set(result) == {
        *("time", "bundle", "decision", "known", "score", "novelty", "width", "height", "mean", "std"),
        *("border_mean", "border_std"),
    }
    assert result["score"].tolist() == [0.25, 0.75]
    assert result["decision"].tolist() == ["normal", "cancer"]
    assert result["width"].tolist() == [80, 80]
    assert set(result["bundle"]) == {"b" * 12}
    assert all(before <= moment <= time.time() for moment in result["time"])


def test_nothing_of_a_file_but_its_numbers_is_written(small_bundle, tmp_path):
    predictor, kept = Predictor(small_bundle), Monitor(tmp_path / "records" / "m.db")
    data = png(3)
    (tmp_path / "Jane-Doe-1970.png").write_bytes(data)
    result = predictor.predict(tmp_path / "Jane-Doe-1970.png")
    kept.record(result)
    kept.record(prediction(patient="Jane-Doe-1970"))
    kept.close()
    predictor.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "records").iterdir())
    assert b"Jane" not in written
    assert b"1970" not in written
    pixels = result.gray.tobytes()
    assert not any(pixels[i : i + 16] in written for i in range(0, len(pixels), 16))
    assert not any(data[i : i + 16] in written for i in range(0, len(data), 16))


def test_nobody_else_may_read_the_records(tmp_path):
    kept = Monitor(tmp_path / "m.db")
    kept.record(prediction())
    kept.close()
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}


def test_threads_and_monitors_of_one_file_lose_nothing(tmp_path):
    monitors = [Monitor(tmp_path / "m.db") for _ in range(3)]
    threads = [
        threading.Thread(target=lambda m=m: [m.record(prediction()) for _ in range(200)])
        for m in monitors
        for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kept in monitors:
        kept.close()
    assert len(read_records(tmp_path / "m.db")["time"]) == 1200
    assert [kept.dropped for kept in monitors] == [0, 0, 0]


@pytest.mark.slow
def test_processes_of_one_file_lose_nothing(tmp_path):
    code = (
        "from tests.serving.test_monitor import prediction; import sys, time\n"
        "from chestct.serving.monitor import Monitor\n"
        "m = Monitor(sys.argv[1])\n"
        "for _ in range(100): m.record(prediction()); time.sleep(0.002)\n"
        "m.close(); sys.exit(m.dropped)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "m.db")], cwd=ROOT) for _ in range(3)]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    assert len(read_records(tmp_path / "m.db")["time"]) == 300


def test_old_records_are_deleted(tmp_path):
    now = 100 * 86400.0
    old = Monitor(tmp_path / "m.db", clock=lambda: now - 91 * 86400)
    old.record(prediction(0.1))
    old.close()
    young = Monitor(tmp_path / "m.db", keep_days=90, clock=lambda: now)
    young.record(prediction(0.2))
    young.close()
    assert read_records(tmp_path / "m.db")["score"].tolist() == [0.2]


def test_a_window_of_days_leaves_older_records_out(tmp_path):
    for age, score in ((8, 0.1), (6, 0.2)):
        kept = Monitor(tmp_path / "m.db", clock=lambda age=age: time.time() - age * 86400)
        kept.record(prediction(score))
        kept.close()
    assert read_records(tmp_path / "m.db", days=7)["score"].tolist() == [0.2]
    assert len(read_records(tmp_path / "m.db")["score"]) == 2


def test_a_locked_file_delays_no_request_and_its_records_are_counted_as_lost(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(monitor, "BUSY", 0.1)
    kept = Monitor(tmp_path / "m.db")
    kept.record(prediction())
    kept.close()
    kept = Monitor(tmp_path / "m.db")
    with sqlite3.connect(tmp_path / "m.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.perf_counter()
        for _ in range(50):
            kept.record(prediction())
        assert time.perf_counter() - began < 0.05
        kept.close()
        other.rollback()
    assert kept.dropped == 50
    assert "go on without a record" in caplog.text


def test_a_full_disk_costs_records_only(tmp_path, monkeypatch):
    # SQLite itself is told that the disk ends here, so the error is the real one.
    real = sqlite3.connect

    def full(*arguments, **options):
        database = real(*arguments, **options)
        database.execute("PRAGMA max_page_count = 4")
        return database

    monkeypatch.setattr(monitor.sqlite3, "connect", full)
    kept = Monitor(tmp_path / "m.db")
    for _ in range(300):
        kept.record(prediction())
    kept.close()
    written = len(read_records(tmp_path / "m.db")["time"])
    assert kept.dropped == 300 - written > 100
    monkeypatch.setattr(monitor.sqlite3, "connect", real)
    kept = Monitor(tmp_path / "m.db")
    kept.record(prediction())
    kept.close()
    assert len(read_records(tmp_path / "m.db")["time"]) == written + 1


@pytest.mark.parametrize("broken", ["folder", "rubbish", "no_parent"])
def test_a_place_that_cannot_be_written_costs_records_only(tmp_path, broken):
    path = tmp_path / "m.db"
    if broken == "folder":
        path.mkdir()
    elif broken == "rubbish":
        path.write_bytes(b"rubbish" * 1000)
    else:
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "m.db"
    kept = Monitor(path)
    kept.record(prediction())
    kept.close()
    assert kept.dropped == 1


def test_more_records_than_can_wait_are_dropped_and_not_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "WAITING", 10)
    gate = threading.Event()
    monkeypatch.setattr(Monitor, "_write", lambda self, rows: gate.wait(30))
    kept = Monitor(tmp_path / "m.db")
    for _ in range(50):
        kept.record(prediction())
    gate.set()
    kept.close()
    assert 30 <= kept.dropped <= 40


def test_a_file_that_holds_no_records_is_told_from_an_empty_one(tmp_path):
    with pytest.raises(MonitorError, match=r"monitor\.enabled=true"):
        read_records(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("hello" * 500)
    with pytest.raises(MonitorError, match="cannot be read"):
        read_records(tmp_path / "text.db")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (a)").connection.close()
    with pytest.raises(MonitorError, match="schema 0"):
        read_records(tmp_path / "other.db")
