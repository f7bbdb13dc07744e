"""The batch command: what lands in the table, what a killed run leaves, and what strangers' files can do to it."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chestct.imaging.slice import Slice
from chestct.models import backends
from chestct.models.vgg16 import VGG16
from chestct.serving import batch
from chestct.serving.batch import find_files, predict_files
from chestct.serving.predictor import Predictor
from chestct.serving.scan import place_of
from tests.conftest import command
from tests.models.test_bundle import make
from tests.serving.conftest import rows
from tests.serving.test_predictor import png
from tests.serving.test_sentences import answer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Six slices in two folders, and a file that is none."""
    folder = tmp_path / "scans"
    for i in range(6):
        path = folder / ("b" if i % 2 else "a") / f"s{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    (folder / "a" / "notes.txt").write_text("no image")
    return folder


def test_every_file_gets_a_row_in_order_with_the_predictors_numbers(call, small_bundle, scans, tmp_path, capsys):
    assert call(scans, "--out", tmp_path / "s.csv") == 1
    table = rows(tmp_path / "s.csv")
    assert [row["path"] for row in table] == [str(path) for path in sorted(scans.rglob("*.*"))]
    (bad,) = [row for row in table if row["decision"] == "unreadable"]
    assert bad["path"].endswith("notes.txt")
    assert "neither PNG" in bad["reason"]
    assert bad["score"] == ""
    predictor = Predictor(small_bundle)
    for row in table:
        if row is not bad:
            own = predictor.predict(Path(row["path"]))
            assert float(row["score"]) == pytest.approx(own.score, abs=1e-5)
            assert float(row["probability_normal"]) + float(row["probability_cancer"]) == pytest.approx(1, abs=1e-5)
            assert (row["decision"], row["bundle"]) == (own.decision, predictor.bundle.id)
    printed = capsys.readouterr().out
    assert f"Scored by bundle {predictor.bundle.id}" in printed
    assert "1 unreadable" in printed
    assert "Not a medical device" in printed


def test_the_exit_status_and_errors_say_what_went_wrong(call, scans, tmp_path, capsys):
    out = tmp_path / "s.csv"
    assert call(scans / "b", "--out", out) == 0
    assert call(scans / "a" / "notes.txt", "--out", out) == 2
    (tmp_path / "empty").mkdir()
    (tmp_path / "patients.csv").write_text("name,age\nA,1\n")
    for arguments, message in {
        (tmp_path / "nowhere",): "No such file or folder",
        (tmp_path / ("x" * 300),): "File name too long",
        (tmp_path / "empty",): "No files in",
        (scans, "--bundle", tmp_path / "nowhere"): "No bundle in",
        (scans, "--out", tmp_path / "patients.csv"): "no table of this program",
        (scans, "--out", tmp_path / "patients.csv" / "s.csv"): "--out",
        (scans, "--out", tmp_path): "--out",
        (scans, "--out", "."): "--out .",
        (scans, "--out", "/"): "--out /",
        (scans, "--out", ""): "--out",
        ("",): "PATH",
    }.items():
        assert call(*arguments, *(() if "--out" in arguments else ("--out", out))) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "patients.csv").read_text() == "name,age\nA,1\n"


@pytest.mark.parametrize("program", ["predict", "embed"])
def test_a_device_or_pipe_is_no_table_and_a_link_stays_one(program, small_bundle, scans, tmp_path, capsys):
    def run(out):
        return command(program, scans / "b", "--bundle", small_bundle, "--out", out)

    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path / "pipe", Path("/dev/null")):
        assert run(out) == 2
        assert f"--out {out} is no regular file" in capsys.readouterr().err
        assert not out.is_file()
    (tmp_path / "link").symlink_to("table")
    assert run(tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "table").stat().st_size


def test_an_accelerator_computes_where_there_is_one(small_bundle, scans, tmp_path, monkeypatch):
    devices: list[object] = []
    monkeypatch.setattr(backends, "pick_device", lambda accelerator: torch.device("meta"))
    monkeypatch.setattr(VGG16, "to", lambda net, device: devices.append(device) or net)  # none is needed for this test
    predict_files([scans / "b" / "s1.png"], tmp_path / "s.csv", Predictor(small_bundle))
    assert devices == [torch.device("meta")]


def test_a_second_run_reads_only_what_changed_or_could_not_be_read(small_bundle, scans, tmp_path):
    out = tmp_path / "s.csv"
    first, _ = predict_files(find_files([scans], out)[0], out, Predictor(small_bundle))
    (scans / "a" / "s0.png").write_bytes(png(50))
    (scans / "a" / "new.png").write_bytes(png(51))
    second, reused = predict_files(find_files([scans], out)[0], out, Predictor(small_bundle))
    assert reused == 5
    assert rows(out) == [{"score": "", **dict.fromkeys(rows(out)[0], ""), **row} for row in second]
    assert [row["path"] for row in second] == [str(path) for path in sorted(scans.rglob("*.*"))]
    kept = {row["path"]: row for row in first}
    changed = {Path(row["path"]).name for row in second if row != kept.get(row["path"])}
    assert changed - {"notes.txt"} == {"s0.png", "new.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"scans", "s.csv"}


def test_another_bundle_answers_everything_anew_and_with_its_own_columns(small_bundle, scans, tmp_path):
    paths, out = [scans / "b" / "s1.png"], tmp_path / "s.csv"
    predict_files(paths, out, Predictor(small_bundle))
    make(tmp_path / "four", classes=4)
    assert predict_files(paths, out, Predictor(tmp_path / "four"))[1] == 0
    assert {"probability_squamous", "probability_normal"} <= set(rows(out)[0])


def test_a_table_without_some_of_its_columns_is_made_anew(small_bundle, scans, tmp_path):
    paths, out = [scans / "b" / "s1.png"], tmp_path / "s.csv"
    predict_files(paths, out, Predictor(small_bundle))
    whole = out.read_text("utf-8")
    out.write_text(batch._as_csv(batch.FIRST, rows(out)), "utf-8")
    assert predict_files(paths, out, Predictor(small_bundle))[1] == 0
    assert out.read_text("utf-8") == whole


def test_each_page_has_a_row_and_a_table_that_lacks_one_is_not_believed(small_bundle, tmp_path):
    pages = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (96, 96), np.uint8)) for i in range(3)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    out, predictor = tmp_path / "s.csv", Predictor(small_bundle)
    for kept in (0, 1):
        found, reused = predict_files([tmp_path / "a.tiff"], out, predictor)
        assert ("".join(row["frame"] for row in found), reused) == ("012", kept)
        assert len({row["score"] for row in rows(out)}) == 3
    out.write_text("".join(out.read_text("utf-8").splitlines(keepends=True)[:-1]), "utf-8")
    assert predict_files([tmp_path / "a.tiff"], out, predictor)[1] == 0


@pytest.mark.parametrize(
    ("column", "value"),
    [("score", "0,19"), ("score", ""), ("novelty", "far"), ("probability_cancer", "?"), ("position", "7 cm")],
)
def test_a_row_whose_numbers_are_none_is_made_anew(small_bundle, tmp_path, column, value):
    predictor, out = Predictor(small_bundle), tmp_path / "s.csv"
    (tmp_path / "a.png").write_bytes(png(0))
    first, _ = predict_files([tmp_path / "a.png"], out, predictor)
    out.write_text(batch._as_csv(list(rows(out)[0]), [rows(out)[0] | {"series": "1.2", column: value}]), "utf-8")
    assert predict_files([tmp_path / "a.png"], out, predictor) == (first, 0)


@pytest.mark.parametrize(
    ("kind", "value", "written"),
    [("number", 2147483647.0, "no. 2147483647"), ("mm", float(np.float32(-1234.0625)), "-1234.0625 mm")],
)
def test_the_table_keeps_positions_apart(kind, value, written):
    shown = Slice(np.zeros((9, 9), np.uint8), "DICOM", "DICOM", series="1.2", position=("1.2", kind, value))
    row = batch.row_of("a.dcm", dataclasses.replace(answer(0.5, "normal"), slice=shown))
    assert row["position"] == written
    assert place_of(row) == ("1.2", kind, value)


def test_own_outputs_leftovers_and_loops_are_not_looked_at(call, scans, capsys):
    for name in ("s.csv", "s.csv.partial", "Thumbs.db"):
        (scans / name).write_bytes(b"")
    (scans / "a" / "loop").symlink_to(scans)
    paths, skipped = find_files([scans, scans / "a" / "s0.png"], scans / "s.csv")
    assert [path.name for path in paths] == ["notes.txt", "s0.png", "s2.png", "s4.png", "s1.png", "s3.png", "s5.png"]
    assert (str(scans / "Thumbs.db"), "left by Windows") in skipped
    (scans / "s.csv").unlink()
    (scans / "s.csv.partial").unlink()
    assert call(scans / "b", scans / "Thumbs.db", "--out", scans / "s.csv") == 1  # named by the user: looked at
    assert call(scans, "--out", scans / "s.csv") == 1
    assert "2 skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_written_for_a_viewer_is_not_scored(call, scan, bundle_folder, tmp_path):
    folder = tmp_path / "scans"
    for name, data in scan(1).items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(data)
    for viewer in (folder / "viewer", folder):
        for _ in range(2):
            given = ("--bundle", bundle_folder, "--out", tmp_path / "s.csv", "--viewer", viewer)
            assert call(folder, *given) == 0
        assert len(list(viewer.glob("*.dcm"))) == 2
        assert len(rows(tmp_path / "s.csv")) == 1


def test_what_cannot_be_read_gets_a_row_with_the_reason(call, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    (folder / "ok.png").write_bytes(png(0))
    assert call(folder, "--out", tmp_path / "s.csv") == 1
    assert [row["decision"] == "unreadable" for row in rows(tmp_path / "s.csv")] == [True, False, True]
    assert "not a regular file" in rows(tmp_path / "s.csv")[2]["reason"]


def test_names_of_all_kinds_stay_one_row_each_and_are_never_a_formula(small_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = ["läsion 肺 🫁.png", "x" * 251 + ".png", 'a,"b";c.png', "two\nlines.png", "a=b"]
    plain += [os.fsdecode(b"\xff.png")] * (sys.platform != "darwin")  # which makes no file of such a name
    formulas = ["=cmd|' _C calc'!A0.png", "+1.png", "-1.png", "@SUM(A1).png", "＝1.png"]
    for i, name in enumerate(plain + formulas):
        Path(name).write_bytes(png(i))
    paths, out = [Path(name) for name in plain + formulas], Path("s.csv")
    predict_files(paths, out, Predictor(small_bundle))
    escaped = {"\n": "\\n", "\udcff": "\\udcff"}
    written = [*(name.translate(str.maketrans(escaped)) for name in plain), *(f"'{name}" for name in formulas)]
    assert [row["path"] for row in rows(out)] == written
    assert out.read_bytes().count(b"\n") == len(paths) + 1
    assert all(line.startswith('"') for line in out.read_text("utf-8").splitlines())
    assert predict_files(paths, out, Predictor(small_bundle))[1] == len(paths)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_goes_on_where_it_ended(small_bundle, tmp_path, stop):
    """The run stops itself with its tenth file, however quick the machine is."""
    folder, out, partial = tmp_path / "d", tmp_path / "s.csv", tmp_path / "s.csv.partial"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:03}.png").write_bytes(png(i))
    code = f"""
import os, sys
from chestct.cli import main
from chestct.serving import batch
write, written = batch._as_csv, []
def stopping(columns, rows, header=True):
    written.append(rows)
    if len(written) == 12:  # the head, ten files, and this one
        os.kill(os.getpid(), {int(stop)})
    return write(columns, rows, header)
batch._as_csv = stopping
sys.argv = ["chestct", "predict", {str(folder)!r}, "--bundle", {str(small_bundle)!r}, "--out", {str(out)!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (-9 if stop == signal.SIGKILL else 130), done.stderr
    assert stop == signal.SIGKILL or "s.csv.partial" in done.stderr
    assert not out.exists()
    whole = len(rows(partial))
    assert whole == 10
    paths, _ = find_files([folder], out)
    resumed, reused = predict_files(paths, out, Predictor(small_bundle))
    assert reused == whole
    assert not partial.exists()
    straight, _ = predict_files(paths, tmp_path / "straight.csv", Predictor(small_bundle))
    assert [row["path"] for row in resumed] == [row["path"] for row in straight]
    scores = [[float(row["score"]) for row in table] for table in (resumed, straight)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
