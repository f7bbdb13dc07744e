"""The commands of docs/extend.md do what it says, from the command line, without a change to the package."""

import importlib.util
import re
import shlex
import sys

import pytest
import torch

from chestct.config.compose import CONF
from chestct.models.checkpoint import find_checkpoint, read_checkpoint

TEXT = (CONF.parent / "docs" / "extend.md").read_text(encoding="utf-8")
QUICK = ("data.size=64", "trainer.max_epochs=2", "trainer.progress=false", "tracking=off")


def commands(holding):
    """Settings of the documented commands that hold a word."""
    lines = [line for line in TEXT.splitlines() if "python train.py" in line and holding in line]
    return [shlex.split(line.split("python train.py", 1)[1]) for line in lines]


def code(word):
    """The documented block of Python that holds a word."""
    return next(block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if word in block)


@pytest.fixture
def run(call, phantoms, cache, tmp_path, monkeypatch):
    """run(settings) trains in an empty folder, whose Python files can be imported, and returns what was printed.

    In this process, which has imported all that takes seconds; test_documented runs these commands from outside.
    """
    monkeypatch.syspath_prepend(tmp_path)

    def started(script, *settings, code=0):
        sys.modules.pop("mine", None)  # another command's
        status, out, err = call(script, *settings, f"cache_dir={cache}", small=False)
        assert status == code, out + err
        return out + err

    def train(*settings, report=False, code=0):
        given = [*QUICK, f"data.root={phantoms}", f"evaluation.report={str(report).lower()}"]
        given += [] if "debug=" in settings[0] else ["data.views=1"]
        return started("train.py", *given, *settings, code=code)

    train.evaluate = lambda *settings, code=0: started("evaluate.py", *settings, "tracking=off", code=code)
    return train


def last(folder):
    return read_checkpoint(find_checkpoint("last", str(folder / "runs")))


@pytest.mark.slow
def test_another_optimiser_and_schedule(run, tmp_path):
    (optimiser,), (schedule,) = commands("RMSprop"), commands("ExponentialLR")
    run(*optimiser, *schedule)
    saved = last(tmp_path)
    assert "momentum_buffer" in next(iter(saved["optimizer_states"][0]["state"].values()))
    assert saved["lr_schedulers"][0]["gamma"] == 0.9
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-3 * 0.9**2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (("trainer.unfreeze_epoch=1", "data.size=32"), ("net.head.2.weight", "net.features.28.weight")),
        (("experiment=head", "evaluation.resamples=100"), ("net.head.2.weight",)),
    ],
)
def test_averaged_weights_are_kept_and_go_on(run, tmp_path, settings, parts):
    (averaged,) = commands("EMAWeightAveraging")
    run(averaged[1], *(averaged[:1] if len(parts) > 1 else ()), *settings, report=len(parts) == 1)
    saved = last(tmp_path)
    for part in parts:
        assert not torch.equal(saved["state_dict"][part], saved["current_model_state"][part])
    for refused in (run("ckpt=last", code=2), run.evaluate("ckpt=last", "evaluation.policies=true", code=2)):
        pasted = re.search(r"Say them again: (\S+);", refused)[1]
        assert pasted == averaged[1]
    run("ckpt=last", pasted, "trainer.max_epochs=3")
    assert last(tmp_path)["epoch"] == 2
    assert "current_model_state" in last(tmp_path)


@pytest.mark.slow
def test_a_callback_and_a_logger(run, tmp_path):
    (tmp_path / "mine.py").write_text(code("class Noisy"), encoding="utf-8")
    (callback,), (board,) = commands("Noisy"), commands("TensorBoardLogger")
    csv = ("loggers.csv._target_=lightning.pytorch.loggers.CSVLogger", "trainer.args.gradient_clip_val=1.0")
    printed = run(*callback, *(board if importlib.util.find_spec("tensorboard") else ()), *csv)
    assert re.search(r"after 1 \d\.\d+", printed)
    (table,) = tmp_path.glob("runs/*/lightning_logs/version_0/metrics.csv")
    assert "valid/loss" in table.read_text(encoding="utf-8")
    # callbacks are not taken from the checkpoint, and so need no trust
    run.evaluate("ckpt=last", "evaluation.resamples=100")


@pytest.mark.slow
def test_another_head_that_only_who_trusts_it_may_load(run, tmp_path):
    (tmp_path / "mine.py").write_text(code("class Narrow"), encoding="utf-8")
    (head,) = commands("Narrow")
    assert "No bundle" in run(*head, "evaluation.resamples=100", report=True)
    assert last(tmp_path)["state_dict"]["net.head.1.1.weight"].shape == (16, 512)
    assert "trust=[mine]" in run.evaluate("ckpt=last", code=2)
    run.evaluate("ckpt=last", "trust=[mine]", "evaluation.resamples=100")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "overfit", "profile"])
def test_presets_for_debugging(run, tmp_path, preset):
    run(f"debug={preset}", *(("trainer.max_epochs=60",) if preset == "overfit" else ()))
    (folder,) = (tmp_path / "runs").iterdir()
    if preset == "profile":
        assert "run_training_epoch" in (folder / "fit-profile.txt").read_text(encoding="utf-8")
    if preset == "overfit":
        import pandas as pd

        assert pd.read_csv(folder / "history.csv")["train/loss"].iloc[-1] < 0.05


@pytest.mark.slow
def test_seeds_end_with_mean_and_spread(run, tmp_path):
    import pandas as pd

    printed = run("seeds=3", "seed=5", "model.dropout=0.5")
    (table,) = tmp_path.glob("runs/*/seeds.csv")
    rows = pd.read_csv(table, index_col="seed")
    assert list(rows.index) == [5, 6, 7]
    assert rows["valid/loss"].nunique() == 3
    shown = next(line.split() for line in printed.splitlines() if line.startswith("valid/loss"))
    assert float(shown[1]) == pytest.approx(rows["valid/loss"].mean(), abs=1e-4)
    assert float(shown[2]) == pytest.approx(rows["valid/loss"].std(ddof=1), abs=1e-4)
    assert len(list(tmp_path.glob("runs/*/seed-*/checkpoints/best.ckpt"))) == 3
