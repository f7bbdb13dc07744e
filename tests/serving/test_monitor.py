"""The record of what the service saw: what is in it, what is not, and what it survives."""

import os
import sqlite3
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from chestct.errors import ChestCTError
from chestct.imaging.slice import Slice
from chestct.serving import monitor
from chestct.serving.monitor import COLUMNS, Monitor, read_records
from chestct.serving.prediction import Prediction
from chestct.serving.predictor import Predictor
from tests.serving.test_predictor import png


def prediction(score: float = 0.25, decision: str = "normal", patient: str = "") -> Prediction:
    gray = np.full((70, 80), 137, np.uint8)
    result = Slice(gray, "DICOM", "DICOM", patient=patient)
    what = (score, decision, "", {"normal": 1 - score}, ("normal",), 0.7, False, None, result)
    return Prediction(*what, "b" * 12)


def record(path: Path, *predictions: Prediction, **settings: int) -> Monitor:
    kept = Monitor(path, **settings)
    for one in predictions:
        kept.record(one)
    kept.close()
    return kept


def test_a_record_holds_what_the_drift_report_needs(tmp_path):
    before = int(time.time())
    record(tmp_path / "m.db", prediction(0.25), prediction(0.75, "cancer"))
    result = read_records(tmp_path / "m.db")
    assert tuple(result) == COLUMNS
    assert result["score"].tolist() == [0.25, 0.75]
    assert result["decision"].tolist() == ["normal", "cancer"]
    assert result["width"].tolist() == [80, 80]
    assert result["mean"] == pytest.approx(137 / 255)
    assert set(result["bundle"]) == {"b" * 12}
    assert all(before <= moment <= time.time() for moment in result["time"])


def test_nothing_of_a_file_but_its_numbers_is_written_and_nobody_else_may_read_them(small_bundle, tmp_path):
    predictor, data = Predictor(small_bundle), png(3)
    (tmp_path / "Jane-Doe-1970.png").write_bytes(data)
    result = predictor.predict(tmp_path / "Jane-Doe-1970.png")
    record(tmp_path / "records" / "m.db", result, prediction(patient="Jane-Doe-1970"))
    written = b"".join(path.read_bytes() for path in (tmp_path / "records").iterdir())
    assert b"Jane" not in written
    for content in (result.gray.tobytes(), data):
        assert not any(content[i : i + 16] in written for i in range(0, len(content), 16))
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "records").iterdir()} == {0}


def test_old_records_are_deleted_and_a_window_leaves_older_ones_out(tmp_path):
    record(tmp_path / "m.db", prediction(0.1), prediction(0.2), prediction(0.3))
    with sqlite3.connect(tmp_path / "m.db") as database:
        for score, age in ((0.1, 91), (0.2, 8)):
            database.execute("UPDATE answers SET time = ? WHERE score = ?", (time.time() - age * 86400, score))
    assert len(read_records(tmp_path / "m.db")["score"]) == 3
    record(tmp_path / "m.db", prediction(0.4))
    assert read_records(tmp_path / "m.db")["score"].tolist() == [0.2, 0.3, 0.4]
    assert read_records(tmp_path / "m.db", days=7)["score"].tolist() == [0.3, 0.4]
    record(tmp_path / "m.db", prediction(0.5), keep_days=7)
    assert read_records(tmp_path / "m.db")["score"].tolist() == [0.3, 0.4, 0.5]


def test_records_are_read_from_a_folder_that_nobody_may_write_to():
    with TemporaryDirectory() as folder:  # not pytest's, which another user cannot enter
        path = Path(folder, "m.db")
        record(path, prediction())
        path.chmod(0o444)
        Path(folder).chmod(0o555)
        try:
            if os.geteuid() == 0:  # whom permissions do not concern
                os.seteuid(65534)
            assert len(read_records(path)["score"]) == 1
        finally:
            os.seteuid(os.getuid())
            Path(folder).chmod(0o755)


def test_several_processes_may_share_a_file(tmp_path):
    monitors = [Monitor(tmp_path / "m.db") for _ in range(3)]
    for kept in monitors * 50:
        kept.record(prediction())
    for kept in monitors:
        kept.close()
    assert len(read_records(tmp_path / "m.db")["time"]) == 150


@pytest.mark.parametrize("broken", ["folder", "rubbish", "no_parent", "locked"])
def test_a_place_that_cannot_be_written_costs_records_only(tmp_path, monkeypatch, caplog, broken):
    monkeypatch.setattr(monitor, "BUSY", 0.1)
    path = tmp_path / "m.db"
    other = sqlite3.connect(path if broken == "locked" else ":memory:")
    other.execute("BEGIN EXCLUSIVE")
    if broken == "folder":
        path.mkdir()
    elif broken == "rubbish":
        path.write_bytes(b"rubbish" * 1000)
    elif broken == "no_parent":
        path.write_text("")
        path /= "m.db"
    assert record(path, *[prediction()] * 50).dropped == 50
    assert "go on without a record" in caplog.text


def test_a_file_that_holds_no_records_is_told_from_an_empty_one(tmp_path):
    (tmp_path / "text.db").write_text("hello" * 500)
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (a)").connection.close()
    record(tmp_path / "high.db", prediction())
    with sqlite3.connect(tmp_path / "high.db") as database:
        database.execute("UPDATE answers SET score = 'high'")
    none = ("none", r"monitor\.enabled=true")
    for name, message in (none, ("text", "cannot be read"), ("other", "no such table"), ("high", "'high'.*move this")):
        with pytest.raises(ChestCTError, match=message):
            read_records(tmp_path / f"{name}.db")
    for days in (0, -7, float("nan")):
        with pytest.raises(ChestCTError, match="above 0"):
            read_records(tmp_path / "high.db", days)
