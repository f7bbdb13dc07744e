"""Which file `ckpt` names, and that no damaged or foreign one is taken for a checkpoint."""

import io
import os
import random
import shutil

import pytest
import torch

from chestct.errors import ConfigError, WeightsError
from chestct.models.checkpoint import find_checkpoint, read_checkpoint, sealed
from chestct.models.lightning_module import load_classifier
from tests.conftest import Trap


def last_of(folder, age):
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


def test_last_is_the_newest_run_or_job_of_a_sweep_and_never_a_refit_nor_hidden(tmp_path):
    runs = tmp_path / "refits" / ".hidden" / "runs"  # what stands above does not count
    last_of(runs / "b", age=2)
    newest = last_of(runs / "a_sweep" / "3", age=1)
    last_of(runs / "x_evaluate" / "refits" / "fold-0", age=0)
    last_of(runs / ".trash" / "run", age=0)
    assert find_checkpoint("last", str(runs)) == newest
    later = last_of(runs / "b_sweep" / "0", age=1)  # ended in the same instant: the later name
    assert find_checkpoint("last", str(runs)) == later
    for name in ("a_sweep", "b_sweep", "b"):
        shutil.rmtree(runs / name)
    with pytest.raises(ConfigError, match="no run with a checkpoint under"):
        find_checkpoint("last", str(runs))


def test_a_run_folder_means_its_last_or_its_best_and_a_wrong_path_says_what_is_near(tmp_path):
    last = last_of(tmp_path / "run", age=0)
    assert find_checkpoint(str(tmp_path / "run")) == find_checkpoint(str(last)) == last
    best = last.with_name("best.ckpt")
    with pytest.raises(ConfigError, match=r"no checkpoint .*best\.ckpt"):
        find_checkpoint("last", str(tmp_path), best=True)
    best.write_bytes(b"")
    for name in ("last", str(tmp_path / "run")):
        assert find_checkpoint(name, str(tmp_path), best=True) == best
    with pytest.raises(ConfigError, match=r"bets\.ckpt \(in that folder: best\.ckpt, last\.ckpt\)"):
        find_checkpoint(str(last.with_name("bets.ckpt")))


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


SETTINGS = {"settings": {}, "data": {}}
CONTENT = {
    "chestct": {"weights": "x"},
    "hyper_parameters": SETTINGS,
    "epoch": 3,
    "state_dict": {"w": torch.rand(40, 30)},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.rand(40, 30)}}}],
}


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path, whole, rng = tmp_path / "x.ckpt", sealed(saved(CONTENT)), random.Random(0)
    path.write_bytes(whole)
    assert torch.load(path, weights_only=True)["epoch"] == read_checkpoint(path)["epoch"] == 3  # an ordinary file
    # everywhere at random, and each byte of the directory and the seal at the end
    for at in [*(rng.randrange(len(whole)) for _ in range(300)), *range(len(whole) - 1000, len(whole))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"x\.ckpt is missing or damaged"):
            read_checkpoint(path)


FOREIGN = [["chestct"], {"state_dict": {}}, CONTENT | {"state_dict": []}, CONTENT | {"hyper_parameters": {"data": {}}}]
FOREIGN += [CONTENT | {"hyper_parameters": SETTINGS | {"settings": "model: {head: {_target_: os.system}}"}}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        *((None, "missing"), (b"", "damaged"), (b"hello", "damaged"), (saved(CONTENT), "no checksum")),
        (sealed(saved(CONTENT))[:-100], "damaged"),
        (sealed(saved(CONTENT | {"evil": Trap()})), "more than plain data"),
        *((sealed(saved(value)), "is not a checkpoint of this project") for value in FOREIGN),
        (sealed(saved(CONTENT | {"hyper_parameters": SETTINGS | {"settings": {"a": "${oc.env:HOME}"}}})), "sets a="),
    ],
    ids=range(12),
)
def test_what_is_no_checkpoint_is_one_clear_error_and_runs_nothing(tmp_path, content, says):
    path = tmp_path / "x.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((WeightsError, ConfigError), match=rf"(?s)x\.ckpt.*{says}|{says}.*x\.ckpt"):
        load_classifier(path)
