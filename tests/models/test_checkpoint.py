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


def last_of(folder, age):
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


def test_last_is_the_newest_run_or_job_of_a_sweep(tmp_path):
    last_of(tmp_path / "b", age=2)
    newest = last_of(tmp_path / "a_sweep" / "3", age=1)
    assert find_checkpoint("last", str(tmp_path)) == newest
    # runs that ended in the same instant: the later name
    later = last_of(tmp_path / "b_sweep" / "0", age=1)
    assert find_checkpoint("last", str(tmp_path)) == later


def test_last_is_never_a_refit_nor_hidden(tmp_path):
    own = last_of(tmp_path / "run", age=9)
    last_of(tmp_path / "x_evaluate" / "refits" / "permuted", age=0)
    last_of(tmp_path / ".trash" / "run", age=0)
    (tmp_path / "link").symlink_to(tmp_path / "x_evaluate" / "refits" / "permuted")
    copied = tmp_path / "copy" / "checkpoints"
    copied.mkdir(parents=True)
    (copied / "last.ckpt").symlink_to(tmp_path / "x_evaluate/refits/permuted/checkpoints/last.ckpt")
    assert find_checkpoint("last", str(tmp_path)) == own
    shutil.rmtree(own.parent)
    with pytest.raises(ConfigError, match="no run with a checkpoint under"):
        find_checkpoint("last", str(tmp_path))


def test_last_is_looked_for_below_a_folder_of_any_name(tmp_path):
    own = last_of(tmp_path / "refits" / ".hidden" / "runs" / "a", age=0)
    assert find_checkpoint("last", str(tmp_path / "refits" / ".hidden" / "runs")) == own


def test_a_run_folder_means_its_last_or_its_best_and_a_wrong_path_says_what_is_near(tmp_path):
    last = last_of(tmp_path / "run", age=0)
    assert find_checkpoint(str(tmp_path / "run")) == last
    assert find_checkpoint(str(last)) == last
    best = last.with_name("best.ckpt")
    with pytest.raises(ConfigError, match=r"no checkpoint .*best\.ckpt"):
        find_checkpoint("last", str(tmp_path), best=True)
    best.write_bytes(b"")
    assert (
        find_checkpoint("last", str(tmp_path), best=True) == find_checkpoint(str(tmp_path / "run"), best=True) == best
    )
    best.unlink()
    with pytest.raises(ConfigError, match=r"bets\.ckpt \(in that folder: last\.ckpt\)"):
        find_checkpoint(str(last.with_name("bets.ckpt")))


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


CONTENT = {
    "chestct": {"weights": "x"},
    "hyper_parameters": {"settings": {}, "data": {}},
    "epoch": 3,
    "state_dict": {"w": torch.rand(40, 30)},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.rand(40, 30)}}}],
}


def test_a_sealed_checkpoint_is_an_ordinary_one(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(sealed(saved(CONTENT)))
    for loaded in (torch.load(path, weights_only=True), read_checkpoint(path)):
        assert torch.equal(loaded["state_dict"]["w"], CONTENT["state_dict"]["w"])
        assert loaded["epoch"] == 3


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path, whole, rng = tmp_path / "x.ckpt", sealed(saved(CONTENT)), random.Random(0)
    # everywhere at random, and each byte of the directory and the seal at the end
    for at in [*(rng.randrange(len(whole)) for _ in range(300)), *range(len(whole) - 1000, len(whole))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"x\.ckpt is damaged"):
            read_checkpoint(path)


def test_a_checkpoint_without_a_seal_is_read_with_a_word_and_its_pieces_are_checked(tmp_path, capsys):
    path, whole = tmp_path / "x.ckpt", saved(CONTENT)
    path.write_bytes(whole)
    assert read_checkpoint(path)["epoch"] == 3
    assert "no checksum over a whole checkpoint" in capsys.readouterr().out
    at = whole.index(CONTENT["state_dict"]["w"].numpy().tobytes())
    path.write_bytes(whole[: at + 5] + bytes([whole[at + 5] ^ 1]) + whole[at + 6 :])
    with pytest.raises(WeightsError, match="damaged"):
        read_checkpoint(path)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize("what", ["missing", "empty", "text", "not ours", "truncated", "pickle"])
def test_what_is_no_checkpoint_is_one_clear_error(tmp_path, what):
    path = tmp_path / "x.ckpt"
    content = {
        "empty": b"",
        "text": b"hello",
        "not ours": sealed(saved({"state_dict": {}})),
        "truncated": sealed(saved(CONTENT))[:-100],
        "pickle": sealed(saved(CONTENT | {"evil": Evil()})),
    }
    if what in content:
        path.write_bytes(content[what])
    with pytest.raises(WeightsError, match=r"x\.ckpt"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        {"chestct": "x"},
        ["chestct"],
        CONTENT | {"chestct": "x"},
        CONTENT | {"state_dict": []},
        CONTENT | {"hyper_parameters": {"data": {}}},
        CONTENT | {"hyper_parameters": {"settings": "model: {head: {_target_: os.system}}", "data": {}}},
        CONTENT | {"hyper_parameters": {"settings": {}, "data": "x"}},
    ],
    ids=range(7),
)
def test_a_checkpoint_of_other_parts_is_refused_before_any_is_used(tmp_path, content):
    path = tmp_path / "x.ckpt"
    path.write_bytes(sealed(saved(content)))
    with pytest.raises(WeightsError, match=r"x\.ckpt is not a checkpoint of this project"):
        read_checkpoint(path)


def test_a_checkpoint_with_an_expression_is_refused_before_any_is_used(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(sealed(saved(CONTENT | {"hyper_parameters": {"settings": {"a": "${oc.env:HOME}"}, "data": {}}})))
    with pytest.raises(ConfigError, match=r"x\.ckpt sets a="):
        load_classifier(path)
