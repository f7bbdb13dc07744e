"""The batch command: what lands in the table, what a killed run leaves, and what strangers' files can do to it."""

import os
from pathlib import Path

import pytest

from chestct.serving import batch
from chestct.serving.batch import find_files, predict_files
from chestct.serving.predictor import Predictor
from tests.models.test_bundle import make
from tests.serving.conftest import rows, zipped
from tests.serving.test_predictor import png, tiff

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Six slices in two folders, and what is none: a text, a pipe, a link to nowhere."""
    folder = tmp_path / "scans"
    for i in range(6):
        path = folder / ("b" if i % 2 else "a") / f"s{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    (folder / "a" / "notes.txt").write_text("no image")
    os.mkfifo(folder / "b" / "pipe.png")
    (folder / "b" / "gone.png").symlink_to("nowhere")
    return folder


def test_every_file_gets_a_row_in_order_with_the_predictors_numbers(call, small_bundle, scans, tmp_path, capsys):
    assert call(scans, "--out", tmp_path / "s.csv") == 1
    table = rows(tmp_path / "s.csv")
    assert [row["path"] for row in table] == [str(path) for path in sorted(scans.rglob("*.*"))]
    bad = {Path(row["path"]).name: row for row in table if row["decision"] == "unreadable"}
    assert bad.keys() == {"notes.txt", "pipe.png", "gone.png"}
    assert "neither PNG" in bad["notes.txt"]["reason"]
    assert "not a regular file" in bad["pipe.png"]["reason"]
    assert not any(row["score"] for row in bad.values())
    predictor = Predictor(small_bundle)
    for row in table:
        if row["score"]:
            own = predictor.predict(Path(row["path"]))
            assert float(row["score"]) == pytest.approx(own.score, abs=1e-5)
            assert float(row["probability_normal"]) + float(row["probability_cancer"]) == pytest.approx(1, abs=1e-5)
            assert (row["decision"], row["bundle"]) == (own.decision, predictor.bundle.id)
    printed = capsys.readouterr().out
    assert f"Scored by bundle {predictor.bundle.id}" in printed
    assert "3 unreadable" in printed
    assert "Not a medical device" in printed


def test_the_exit_status_and_errors_say_what_went_wrong(call, scans, tmp_path, capsys):
    out = tmp_path / "s.csv"
    assert call(scans / "b" / "s1.png", "--out", out) == 0
    assert call(scans / "a" / "notes.txt", "--out", out) == 2
    (tmp_path / "empty").mkdir()
    (tmp_path / "rubbish.zip").write_bytes(b"rubbish")
    (tmp_path / "empty.zip").write_bytes(zipped({"DICOMDIR": b""}))
    (tmp_path / "patients.csv").write_text("name,age\nA,1\n")
    for arguments, message in {
        (tmp_path / "nowhere",): "No such file or folder",
        (tmp_path / "empty",): "No files in",
        (tmp_path / "rubbish.zip",): "rubbish.zip",
        (tmp_path / "empty.zip",): "empty.zip",
        (scans, "--bundle", tmp_path / "nowhere"): "No bundle in",
        (scans, "--out", tmp_path / "patients.csv"): "no table of this program",
        (scans, "--out", tmp_path / "patients.csv" / "s.csv"): "--out",
        (scans, "--out", tmp_path): "--out",
    }.items():
        assert call(*arguments, *(() if "--out" in arguments else ("--out", out))) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "patients.csv").read_text() == "name,age\nA,1\n"


def test_a_second_run_reads_only_what_changed_or_could_not_be_read(small_bundle, scans, tmp_path):
    out = tmp_path / "s.csv"
    first, _ = predict_files(find_files([scans], out)[0], out, Predictor(small_bundle))
    (scans / "a" / "s0.png").write_bytes(png(50))
    (scans / "a" / "new.png").write_bytes(png(51))
    second, reused = predict_files(find_files([scans], out)[0], out, Predictor(small_bundle))
    assert reused == 5  # of six, and the others are no slices
    assert rows(out) == [{"score": "", **dict.fromkeys(rows(out)[0], ""), **row} for row in second]
    assert [row["path"] for row in second] == [str(path) for path in sorted(scans.rglob("*.*"))]
    kept = {row["path"]: row for row in first}
    changed = {Path(row["path"]).name for row in second if row != kept.get(row["path"])}
    assert changed - {"notes.txt", "pipe.png", "gone.png"} == {"s0.png", "new.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"scans", "s.csv"}


@pytest.mark.parametrize("change", ["frame", "columns", "bundle"])
def test_what_a_table_does_not_hold_whole_is_answered_anew(small_bundle, tmp_path, change):
    pages, out, predictor = tmp_path / "a.tiff", tmp_path / "s.csv", Predictor(small_bundle)
    pages.write_bytes(tiff(3))
    assert [predict_files([pages], out, predictor)[1] for _ in range(2)] == [0, 1]
    whole = out.read_text("utf-8")
    if change == "bundle":
        make(tmp_path / "four", classes=4)
        predictor = Predictor(tmp_path / "four")
    elif change == "columns":
        out.write_text(batch._as_csv(batch.FIRST, rows(out)), "utf-8")
    else:
        out.write_text("".join(whole.splitlines(keepends=True)[:-1]), "utf-8")
    assert predict_files([pages], out, predictor)[1] == 0
    assert [row["frame"] for row in rows(out)] == ["0", "1", "2"]
    assert len({row["score"] for row in rows(out)}) == 3
    assert ("probability_squamous" in rows(out)[0]) == (out.read_text("utf-8") != whole) == (change == "bundle")


def test_own_outputs_leftovers_and_loops_are_not_looked_at(call, scans, capsys):
    for name in ("s.csv", "s.csv.partial", "Thumbs.db"):
        (scans / name).write_bytes(b"")
    (scans / "a" / "loop").symlink_to(scans)
    paths, skipped = find_files([scans, scans / "a" / "s0.png"], scans / "s.csv")
    assert paths == sorted(path for part in ("a", "b") for path in (scans / part).iterdir() if path.name != "loop")
    assert (str(scans / "Thumbs.db"), "left by Windows") in skipped
    (scans / "s.csv").unlink()
    (scans / "s.csv.partial").unlink()
    assert call(scans / "b", scans / "Thumbs.db", "--out", scans / "s.csv") == 1  # named by the user: looked at
    assert call(scans, "--out", scans / "s.csv") == 1
    assert "2 skipped" in capsys.readouterr().out


def test_names_of_all_kinds_stay_one_row_each_and_are_never_a_formula(small_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = ["läsion 肺 🫁.png", "x" * 251 + ".png", 'a,"b";c.png', "two\nlines.png", "a=b", os.fsdecode(b"\xff.png")]
    formulas = ["=cmd|' _C calc'!A0.png", "+1.png", "-1.png", "@SUM(A1).png", "＝1.png"]
    for i, name in enumerate(plain + formulas):
        Path(name).write_bytes(png(i))
    paths, out = [Path(name) for name in plain + formulas], Path("s.csv")
    predict_files(paths, out, Predictor(small_bundle))
    written = [*plain[:3], "two\\nlines.png", "a=b", "\\udcff.png", *(f"'{name}" for name in formulas)]
    assert [row["path"] for row in rows(out)] == written
    assert out.read_bytes().count(b"\n") == len(paths) + 1
    assert all(line.startswith('"') for line in out.read_text("utf-8").splitlines())
    assert predict_files(paths, out, Predictor(small_bundle))[1] == len(paths)


def test_a_run_that_is_stopped_goes_on_where_it_ended(call, scans, tmp_path, monkeypatch, capsys):
    out, partial, killed = tmp_path / "s.csv", tmp_path / "s.csv.partial", tmp_path / "killed"
    write, written = batch._as_csv, []

    def stop(columns, rows, header=True):
        written.append(rows)
        if len(written) == 6:  # the head, four files, and this one
            killed.write_bytes(partial.read_bytes() + b'"torn')  # what a kill would leave at this moment
            raise KeyboardInterrupt
        return write(columns, rows, header)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_as_csv", stop)
        assert call(scans, "--out", out) == 130
    assert f"The same command goes on from {partial}" in capsys.readouterr().err
    assert not out.exists()
    killed.replace(partial)
    assert call(scans, "--out", out) == 1
    assert "3 scored before" in capsys.readouterr().out  # of four files one is no slice
    assert not partial.exists()
    assert call(scans, "--out", tmp_path / "straight.csv") == 1
    resumed, straight = rows(out), rows(tmp_path / "straight.csv")
    assert [row["path"] for row in resumed] == [row["path"] for row in straight]
    scores = [[float(row["score"] or 0) for row in table] for table in (resumed, straight)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
