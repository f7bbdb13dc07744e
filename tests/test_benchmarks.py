"""What the benchmarks write, and that they run. How quick anything is, no test says."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import scale
from chestct.config.schema import PhantomConfig

DOCS = Path(__file__).parents[1] / "docs"


def page_of(facts):
    return bench.PAGE.format(**facts) + "".join(bench.lines(**one) for one in facts["measurements"])


def test_a_line_has_the_median_and_its_ratio_to_each_rival_that_was_there():
    given = iter([1.0, 4.0, 3.0, 2.0, 2.0, 8.0])
    values = bench.in_turns(3, dict.fromkeys(["torch", bench.EAGER], lambda: next(given)))
    assert values == {"torch": [1, 3, 2], bench.EAGER: [4, 2, 8]}
    assert bench.lines("answer", "s", values).splitlines() == [
        "| answer | torch | 2 s | 1 to 3 | 3 | 0.5 of PyTorch eager |",
        "| answer | PyTorch eager | 4 s | 2 to 8 | 3 |  |",
    ]


def test_the_page_is_made_of_the_values_of_a_run(tmp_path, monkeypatch):
    measured = iter([("features", "slices/s", {"torch": [2.0]})])
    fake = type("Bench", (), dict.fromkeys(["training", "answers", "batch"], lambda _: measured))
    monkeypatch.setattr(bench, "Bench", lambda given, scratch: fake())
    options = ["--turns", "2", "--json", f"{tmp_path}/made.json", "--write", f"{tmp_path}/page.md"]
    monkeypatch.setattr("sys.argv", ["benchmarks", *options])
    monkeypatch.setattr(bench, "BACKENDS", bench.BACKENDS[:2])  # the others run by the same lines
    bench.main()
    facts, page = json.loads((tmp_path / "made.json").read_text("utf-8")), (tmp_path / "page.md").read_text("utf-8")
    assert page == page_of(facts)
    assert "`python -m benchmarks --turns 2" in page
    assert page.endswith("| features | torch | 2 slices/s | 2 to 2 | 1 |  |\n")


def test_the_published_page_is_that_of_the_published_values():
    facts = json.loads((DOCS / "benchmarks.json").read_text("utf-8"))
    assert (DOCS / "benchmarks.md").read_text("utf-8") == page_of(facts)


def test_a_program_that_fails_ends_the_measurement(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        bench.Program(tmp_path, "-c", "raise SystemExit(3)").until()
    program = bench.Program(tmp_path, "-c", "import time; open('here', 'w'); time.sleep(60)")
    assert 0 < program.until((tmp_path / "here").is_file) < 60
    program.process.kill()


@pytest.mark.slow
def test_every_measurement_runs(tmp_path, monkeypatch):
    options = ["--turns", "1", "--json", f"{tmp_path}/made.json", "--write", f"{tmp_path}/page.md"]
    monkeypatch.setattr(bench, "PhantomConfig", lambda slices: PhantomConfig(slices=24, size=96))
    monkeypatch.setattr(bench, "RATED", 4)
    monkeypatch.setattr(bench, "EPOCHS", 2)
    monkeypatch.setattr("sys.argv", ["benchmarks", *options])
    monkeypatch.setattr(bench, "BACKENDS", bench.BACKENDS[:2])  # the others run by the same lines
    bench.main()
    made = json.loads((tmp_path / "made.json").read_text("utf-8"))["measurements"]
    assert {one["what"].split(",")[0] for one in made} >= {
        *("matrix product in fp32", "features", "`train.py`", "one answer with heat map", "50 clients at once"),
        *("explanation", "`serve.py` by torch", "`chestct predict`"),
    }
    assert all(min(of) > 0 for one in made if one["unit"] != "%" for of in one["values"].values())


@pytest.mark.slow
def test_each_step_of_scale_runs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scale", "--sizes", "40"])
    scale.main()
    printed = capsys.readouterr().out
    assert all(f"40  {name} " in printed for name in scale.STEPS)
