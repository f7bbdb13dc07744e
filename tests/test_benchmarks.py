"""The page of the benchmarks, made of what a run wrote. How quick anything is, no test says."""

import json

import pytest

from benchmarks.__main__ import machine, main
from benchmarks.measure import EAGER, KERAS, compared, row


def test_a_page_is_made_of_the_values_of_a_run(tmp_path, monkeypatch):
    given = iter([1.0, 4.0, 3.0, 2.0, 2.0, 8.0])
    contestants = dict.fromkeys(["torch", EAGER], lambda: next(given))
    rows = compared("answer, ", "s", 3, contestants, (KERAS, EAGER))  # in turns: torch 1, 3, 2 and PyTorch 4, 2, 8
    rows.append(row("start", "s", [0.5]))
    facts = {"command": "python -m benchmarks --quick", "data": "phantoms", "rows": rows}
    (tmp_path / "made.json").write_text(json.dumps(machine() | facts), encoding="utf-8")
    options = ["--from", f"{tmp_path}/made.json", "--write", f"{tmp_path}/page.md", "--json", f"{tmp_path}/none.json"]
    monkeypatch.setattr("sys.argv", ["benchmarks", *options])
    main()
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| answer, torch | 2 s | 1 to 3 | 3 | Keras: not measured; 0.5 of PyTorch eager |" in page
    assert "| start | 0.5 s | - | 1 |  |" in page
    assert "`python -m benchmarks --quick`" in page
    assert not (tmp_path / "none.json").exists()


@pytest.mark.slow
def test_every_measurement_runs(tmp_path, monkeypatch):
    options = ["--quick", "--json", f"{tmp_path}/made.json", "--write", f"{tmp_path}/page.md"]
    monkeypatch.setattr("sys.argv", ["benchmarks", *options])
    main()
    rows = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))["rows"]
    assert {what.split(",")[0] for what in (row["what"] for row in rows)} >= {
        *("matrix product in fp32", "features", "`train.py`", "one answer with heat map", "50 clients at once"),
        *("explanation", "`serve.py`", "`chestct predict`"),
    }
    assert all(value > 0 for row in rows for value in row["values"] if row["unit"] in ("s", "slices/s", "GFLOP/s"))
