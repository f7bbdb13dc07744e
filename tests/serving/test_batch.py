"""The batch command line: what lands in the table, what a killed run leaves, and what strangers' files can do to it."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chestct import predict_command as predict
from chestct.files import json_digest
from chestct.models.bundle import FACTS
from chestct.models.vgg16 import VGG16
from chestct.serving import batch
from chestct.serving.batch import find_files, overlay_name, predict_files
from chestct.serving.predictor import Predictor
from chestct.serving.table import TableError, cell
from tests.models.test_bundle import make
from tests.serving.test_predictor import png

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(small_bundle: Path) -> Path:
    return small_bundle


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


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def call(*arguments: object) -> int:
    try:
        return predict.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are answered anew."""
    names: list[str] = []
    real = batch._answer

    def spy(wanted, path, old):
        rows = real(wanted, path, old)
        names.extend([] if rows is None else [path.name])
        return rows

    monkeypatch.setattr(batch, "_answer", spy)
    return names


def test_an_accelerator_computes_where_there_is_one(bundle, scans, tmp_path, monkeypatch):
    devices: list[str] = []
    monkeypatch.setattr(batch, "pick_device", lambda: "the accelerator")
    monkeypatch.setattr(VGG16, "to", lambda net, device: devices.append(device))  # none is needed for this test
    call(scans, "--bundle", bundle, "--out", tmp_path / "s.csv")
    assert devices == ["the accelerator"]


def test_every_file_gets_a_row_in_order_with_the_predictors_numbers(bundle, scans, tmp_path, capsys):
    status = call(scans, "--bundle", bundle, "--out", tmp_path / "s.csv")
    table = rows(tmp_path / "s.csv")
    assert status == 1
    assert [row["path"] for row in table] == [str(path) for path in sorted(scans.rglob("*.*"))]
    (bad,) = [row for row in table if row["decision"] == "unreadable"]
    assert bad["path"].endswith("notes.txt")
    assert "neither PNG" in bad["reason"]
    assert bad["score"] == ""
    predictor = Predictor(bundle)
    for row in table:
        if row["decision"] == "unreadable":
            continue
        own = predictor.predict(Path(row["path"]))
        assert float(row["score"]) == pytest.approx(own.score, abs=1e-5)
        assert float(row["novelty"]) == pytest.approx(own.novelty, abs=1e-4)
        assert float(row["probability_normal"]) + float(row["probability_cancer"]) == pytest.approx(1, abs=1e-5)
        assert (row["decision"], row["reason"][:20]) == (own.decision, own.reason[:20])
        assert row["bundle"] == predictor.bundle.id
    predictor.close()
    printed = capsys.readouterr().out
    assert "6 slices of 7 files scored" in printed
    assert "1 file could not be read" in printed
    assert "Not a medical device" in printed


def test_exit_status_tells_whether_all_some_or_nothing_was_scored(bundle, scans, tmp_path, capsys):
    out = tmp_path / "s.csv"
    assert call(scans / "b", "--bundle", bundle, "--out", out) == 0
    assert call(scans / "a", "--bundle", bundle, "--out", out) == 1
    assert call(scans / "a" / "notes.txt", "--bundle", bundle, "--out", out) == 2
    assert call(tmp_path / "nowhere", "--bundle", bundle, "--out", out) == 2
    assert "No such file or folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert call(tmp_path / "empty", "--bundle", bundle, "--out", out) == 2
    assert call(scans, "--bundle", tmp_path / "nowhere", "--out", out) == 2
    assert "No bundle in" in capsys.readouterr().err


def test_a_second_run_reads_only_what_changed_or_could_not_be_read(bundle, scans, tmp_path, answered, capsys):
    out = tmp_path / "s.csv"
    call(scans, "--bundle", bundle, "--out", out)
    first = rows(out)
    answered.clear()
    (scans / "a" / "s0.png").write_bytes(png(50))
    (scans / "a" / "new.png").write_bytes(png(51))
    assert call(scans, "--bundle", bundle, "--out", out) == 1
    assert sorted(answered) == ["new.png", "notes.txt", "s0.png"]
    second = rows(out)
    assert [row["path"] for row in second] == [str(path) for path in sorted(scans.rglob("*.*"))]
    kept = {row["path"]: row for row in first}
    changed = {Path(row["path"]).name for row in second if row != kept.get(row["path"])}
    assert changed == {"s0.png", "new.png"}
    assert "5 files had been scored before" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*"))


def test_another_bundle_answers_everything_anew_and_with_its_own_columns(bundle, scans, tmp_path, answered):
    out = tmp_path / "s.csv"
    call(scans / "b", "--bundle", bundle, "--out", out)
    answered.clear()
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    facts = json.loads((other / FACTS).read_text()) | {"note": "trained again"}
    del facts["digest"]
    (other / FACTS).write_text(json.dumps(facts | {"digest": json_digest(facts)}))
    call(scans / "b", "--bundle", other, "--out", out)
    assert len(answered) == 3
    answered.clear()
    make(tmp_path / "four", classes=4)
    call(scans / "b", "--bundle", tmp_path / "four", "--out", out)
    assert len(answered) == 3
    assert {"probability_squamous", "probability_normal"} <= set(rows(out)[0])


def test_every_gives_a_row_a_page_and_knows_when_only_one_was_wanted(bundle, tmp_path, answered):
    pages = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (96, 96), np.uint8)) for i in range(3)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    out = tmp_path / "s.csv"
    predict_files([tmp_path / "a.tiff"], out, bundle=bundle)
    assert [row["frame"] for row in rows(out)] == ["0"]
    predict_files([tmp_path / "a.tiff"], out, bundle=bundle, every=True)
    assert [row["frame"] for row in rows(out)] == ["0", "1", "2"]
    assert len({row["score"] for row in rows(out)}) == 3
    predict_files([tmp_path / "a.tiff"], out, bundle=bundle, every=True)
    assert len(answered) == 2
    predict_files([tmp_path / "a.tiff"], out, bundle=bundle)
    assert len(rows(out)) == 1


def test_overlays_show_the_slice_at_its_own_size_and_are_made_when_missing(bundle, scans, tmp_path, answered):
    out, pictures = tmp_path / "s.csv", tmp_path / "overlays"
    call(scans / "b", "--bundle", bundle, "--out", out)
    answered.clear()
    call(scans / "b", "--bundle", bundle, "--out", out, "--overlays", pictures)
    names = [row["overlay"] for row in rows(out)]
    assert sorted(path.name for path in pictures.iterdir()) == sorted(names)
    assert len(answered) == 3
    for name in names:
        with Image.open(pictures / name) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (96, 96))
    (pictures / names[1]).unlink()
    answered.clear()
    call(scans / "b", "--bundle", bundle, "--out", out, "--overlays", pictures)
    assert len(answered) == 1
    assert (pictures / names[1]).is_file()


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", "-rf", "~/x.png", "a/" * 300 + "b", "é\u202egnp.exe", "\udcff"]
)
def test_overlay_names_are_safe_whatever_a_file_is_called(name):
    made = overlay_name(Path(name), "")
    assert "/" not in made
    assert made.isascii()
    assert not made.startswith((".", "-"))
    assert len(made) <= 128
    assert made.endswith(".png")


def test_overlay_names_differ_where_paths_differ():
    assert len({overlay_name(Path(name), "") for name in ("a/b.png", "a_b.png", "A_b.png", "a b.png")}) == 4


def test_own_outputs_hidden_files_and_loops_are_not_looked_at(scans):
    (scans / ".hidden.png").write_bytes(b"")
    (scans / "a" / "loop").symlink_to(scans)
    (scans / "s.csv").write_text("")
    (scans / "s.csv.partial").write_text("")
    (scans / "overlays").mkdir()
    (scans / "overlays" / "a.png").write_bytes(b"")
    table = find_files([scans, scans / "a" / "s0.png"], [scans / "s.csv", scans / "overlays"])
    assert [path.name for path in table] == ["notes.txt", "s0.png", "s2.png", "s4.png", "s1.png", "s3.png", "s5.png"]


def test_what_systems_leave_behind_is_skipped_and_listed(bundle, tmp_path, capsys):
    for name in ("a.png", "Thumbs.db", "@eaDir/a.png", ".ipynb_checkpoints/a.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(png(0))
    assert call(tmp_path / "d", "--bundle", bundle, "--out", tmp_path / "s.csv") == 0
    assert [Path(row["path"]).name for row in rows(tmp_path / "s.csv")] == ["a.png"]
    printed = capsys.readouterr().out
    assert "3 skipped" in printed
    assert "Thumbs.db (left by Windows)" in printed


def test_broken_links_and_pipes_get_a_row(bundle, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "d" / "pipe.png")
    (tmp_path / "d" / "ok.png").write_bytes(png(0))
    assert call(tmp_path / "d", "--bundle", bundle, "--out", tmp_path / "s.csv") == 1
    assert [row["decision"] == "unreadable" for row in rows(tmp_path / "s.csv")] == [True, False, True]


def test_what_may_not_be_read_gets_a_row_with_the_reason(bundle):
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o777)
        for name in ("closed/in.png", "open.png", "secret.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(png(0))
        (folder / "closed").chmod(0)
        (folder / "secret.png").chmod(0)
        stack.callback((folder / "closed").chmod, 0o755)
        if os.geteuid() == 0:  # permissions do not bind root
            bundle = Path(shutil.copytree(bundle, folder / "bundle"))
            for path in bundle.iterdir():
                path.chmod(0o644)
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
        paths = find_files([folder], [folder / "bundle"])
        predict_files(paths, folder / "s.csv", bundle=bundle)
        table = {Path(row["path"]).name: row for row in rows(folder / "s.csv")}
    assert set(table) == {"closed", "open.png", "secret.png"}
    assert table["open.png"]["decision"] != "unreadable"
    assert "Permission denied" in table["secret.png"]["reason"]
    assert table["closed"]["decision"] == "unreadable"


def test_names_of_all_kinds_stay_one_row_each(bundle, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    names = [
        "läsion 肺 🫁.png",
        "x" * 251 + ".png",
        'a,"b";c.png',
        "two\nlines.png",
        "tab\t.png",
        os.fsdecode(b"\xff.png"),
    ]
    for i, name in enumerate(names):
        (folder / name).write_bytes(png(i))
    out = tmp_path / "s.csv"
    assert call(folder, "--bundle", bundle, "--out", out, "--overlays", tmp_path / "o") == 0
    assert out.read_bytes().count(b"\n") == len(names) + 1
    names_in_table = {Path(row["path"]).name for row in rows(out)}
    assert {"läsion 肺 🫁.png", "x" * 251 + ".png", 'a,"b";c.png', "two\\nlines.png", "\\udcff.png"} <= names_in_table
    assert call(folder, "--bundle", bundle, "--out", out) == 0
    assert len(rows(out)) == len(names)


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0.png", "+1.png", "-1.png", "@SUM(A1).png", "＝1.png"])
def test_a_file_name_is_never_a_formula(bundle, tmp_path, monkeypatch, name):
    name = name.replace("/", "_")
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(png(0))
    batch.predict_files([Path(name)], Path("s.csv"), bundle=bundle)
    assert rows(Path("s.csv"))[0]["path"] == "'" + name
    assert Path("s.csv").read_text().splitlines()[1].startswith("\"'")
    assert cell("a=b") == "a=b"


def test_a_table_that_is_somebody_elses_is_left_alone(bundle, scans, tmp_path, capsys):
    (tmp_path / "patients.csv").write_text("name,age\nA,1\n")
    assert call(scans, "--bundle", bundle, "--out", tmp_path / "patients.csv") == 2
    assert "no table of this program" in capsys.readouterr().err
    assert (tmp_path / "patients.csv").read_text() == "name,age\nA,1\n"


def test_a_table_that_cannot_be_written_is_one_clear_error(bundle, scans, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call(scans, "--bundle", bundle, "--out", tmp_path / "file" / "s.csv") == 2
    assert "--out" in capsys.readouterr().err
    assert call(scans, "--bundle", bundle, "--out", tmp_path) == 2
    assert call(scans, "--bundle", bundle, "--out", tmp_path / "s.csv", "--overlays", tmp_path / "file") == 2
    assert "overlays" in capsys.readouterr().err


def test_two_runs_do_not_write_the_same_table(bundle, scans, tmp_path):
    def second() -> None:
        with pytest.raises(TableError, match="Another run"):
            predict_files([scans / "b" / "s1.png"], tmp_path / "s.csv", bundle=bundle)

    predict_files([scans / "b" / "s3.png"], tmp_path / "s.csv", bundle=bundle, advance=second)


@pytest.mark.parametrize("cut", [1, 40])
def test_a_torn_row_is_read_again_and_whole_ones_are_kept(bundle, scans, tmp_path, answered, cut):
    out = tmp_path / "s.csv"
    paths = find_files([scans / "b"])
    predict_files(paths, out, bundle=bundle)
    whole = out.read_bytes()
    (tmp_path / "s.csv.partial").write_bytes(whole[:-cut])
    out.unlink()
    answered.clear()
    predict_files(paths, out, bundle=bundle)
    assert answered == ["s5.png"]
    assert out.read_bytes() == whole


def test_of_a_file_with_two_rows_the_later_one_counts(bundle, scans, tmp_path, answered):
    out = tmp_path / "s.csv"
    paths = find_files([scans / "b"])
    predict_files(paths, out, bundle=bundle)
    lines = out.read_text().splitlines(keepends=True)
    stale = lines[1].replace(rows(out)[0]["file_hash"], "0" * 64)
    (tmp_path / "s.csv.partial").write_text("".join([lines[0], stale, *lines[1:]]))
    answered.clear()
    predict_files(paths, out, bundle=bundle)
    assert answered == []
    assert out.read_text() == "".join(lines)


def test_an_edited_row_is_read_again(bundle, scans, tmp_path, answered):
    out = tmp_path / "s.csv"
    paths = find_files([scans / "b"])
    predict_files(paths, out, bundle=bundle)
    before, lines = rows(out), out.read_text().splitlines()
    out.write_text("\n".join([lines[0], lines[1] + ",extra", *lines[2:]]) + "\n")
    answered.clear()
    predict_files(paths, out, bundle=bundle)
    assert answered == ["s1.png"]
    assert [row["path"] for row in rows(out)] == [row["path"] for row in before]
    assert rows(out)[1:] == before[1:]
    assert float(rows(out)[0]["score"]) == pytest.approx(float(before[0]["score"]), abs=1e-5)  # alone in its pass now


def start(folder: Path, bundle: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "chestct", "predict", str(folder), "--bundle", str(bundle), "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(partial: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not partial.exists() or partial.read_bytes().count(b"\n") < count + 1:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on_where_it_ended(bundle, tmp_path, stop):
    folder, out, partial = tmp_path / "d", tmp_path / "s.csv", tmp_path / "s.csv.partial"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i:03}.png").write_bytes(png(i))
    first = start(folder, bundle, out)
    wait_for_rows(partial, 20)
    first.send_signal(stop)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == (-9 if stop == signal.SIGKILL else 130), errors
    assert not out.exists()
    kept = partial.read_bytes()
    whole = kept[: kept.rindex(b"\n") + 1].count(b"\n") - 1
    assert 20 <= whole < 120
    second = start(folder, bundle, out)
    printed, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert f"{whole} files had been scored before" in printed
    assert not partial.exists()
    straight = tmp_path / "straight.csv"
    predict_files(find_files([folder]), straight, bundle=bundle)
    resumed, expected = rows(out), rows(straight)
    assert [row["path"] for row in resumed] == [row["path"] for row in expected]
    assert [float(row["score"]) for row in resumed] == pytest.approx(
        [float(row["score"]) for row in expected], abs=1e-5
    )


@pytest.mark.slow
def test_a_terminal_that_lacks_a_character_ends_nothing(bundle, tmp_path):
    folder = tmp_path / "健康"
    folder.mkdir()
    for name in ("läsion 肺.png", ".hidden 肺.png"):
        (folder / name).write_bytes(png(1))
    command = [sys.executable, "-m", "chestct", "predict", folder, "--bundle", bundle, "--out", tmp_path / "健康.csv"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"1 slice of 1 file scored" in done.stdout
    assert [row["path"] for row in rows(tmp_path / "健康.csv")] == [str(folder / "läsion 肺.png")]
    done = subprocess.run([*command[:4], tmp_path / "没有"], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 2
    assert b"No such file or folder" in done.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_files(bundle, tmp_path):
    code = """
import sys
from pathlib import Path
from chestct.serving.batch import find_files, predict_files
size = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
seen = []
paths = find_files([Path(sys.argv[1])])
predict_files(paths, Path(sys.argv[2]), bundle=sys.argv[3], advance=lambda: seen.append(size()))
print(max(seen[-20:]) - max(seen[40:60]))
"""
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.png").write_bytes(png(i, 512))
    command = [sys.executable, "-c", code, folder, tmp_path / "s.csv", bundle]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20  # MB; 140 slices kept as float32 would be 147


def test_a_few_files_are_read_ahead_and_no_more(bundle, tmp_path, monkeypatch):
    read: list[str] = []
    real = batch._answer
    monkeypatch.setattr(batch, "_answer", lambda wanted, path, old: read.append(path.name) or real(wanted, path, old))
    paths = [tmp_path / f"{i:02}.png" for i in range(30)]
    for i, path in enumerate(paths):
        path.write_bytes(png(i))
    ahead: list[int] = []
    predict_files(paths, tmp_path / "s.csv", bundle=bundle, advance=lambda: ahead.append(len(read) - len(ahead)))
    assert max(ahead) <= batch.AHEAD


@pytest.mark.slow
def test_help_is_quick_and_the_program_is_light(bundle, scans):
    light = (
        "print([m for m in ('lightning', 'hydra', 'mlflow', 'dvc', 'gradio', 'sklearn', 'pandas') if m in sys.modules])"
    )
    arguments = [str(scans / "b"), "--bundle", str(bundle), "--out", str(scans / "s.csv")]
    code = f"import sys; from chestct.predict_command import main; main({arguments}); {light}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    code = (
        "import sys; from chestct.predict_command import main; 'torch' in sys.modules and sys.exit(1); main(['--help'])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
