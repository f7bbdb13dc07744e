import re
import resource
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save

from chestct.models.feature_cache import Kept, extract
from chestct.program import errors_for_people
from tests.conftest import limited, network


@pytest.fixture(scope="module")
def net():
    return network(size=32)


class Slices:
    """Slices made from their position, and a note of which were computed."""

    def __init__(self, n, fails_from=99):
        self.all = torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        self.computed, self.fails_from = [], fails_from

    def __call__(self, positions):
        if max(positions) >= self.fails_from:
            raise KeyboardInterrupt
        self.computed += list(positions)
        return [self.all[list(positions)]]


def run(net, slices, names, folder):
    return extract([Kept(net.pooled, names, folder / "f")], slices, torch.device("cpu"), batch_size=4)[0][:]


def test_features_are_what_the_convolutions_give_and_are_computed_once(net, tmp_path):
    slices = Slices(6)
    result = run(net, slices, list("abcdef"), tmp_path)
    with torch.no_grad():
        assert torch.allclose(result, net.maps(slices.all).mean((2, 3)), rtol=1e-4, atol=1e-3)
    again = Slices(6)
    assert torch.equal(run(net, again, list("fedcba"), tmp_path), result.flip(0))
    assert again.computed == []


def test_rows_are_those_of_the_mapped_shard_and_no_copies_in_memory(net, tmp_path):
    kept = [Kept(net.pooled, list("abc"), tmp_path / "f")]
    for _ in ("computed", "read"):
        (rows,) = extract(kept, Slices(3), torch.device("cpu"), batch_size=4)
        assert len({row.untyped_storage().data_ptr() for row in rows.rows}) == 1


def test_only_what_is_new_is_computed_and_copies_once(net, tmp_path):
    run(net, Slices(2), ["a", "b"], tmp_path)
    slices = Slices(5)
    result = run(net, slices, ["a", "x", "b", "x", "y"], tmp_path)
    assert slices.computed == [1, 4]
    assert torch.equal(result[1], result[3])


@pytest.mark.parametrize("at", [9, 0.5, -1, "cut", "empty", "other"])
def test_a_damaged_shard_is_never_believed_and_computed_again(net, tmp_path, capsys, at):
    first = run(net, Slices(3), list("abc"), tmp_path)
    shard = next((tmp_path / "f").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    if at == "other":
        data = save({"features": torch.zeros(3, 512)}, {"contents": '["a", "b", "c"]'})
    elif isinstance(at, str):
        data = data[:-20] if at == "cut" else b""
    else:
        data[int(at * len(data)) if isinstance(at, float) else at] ^= 1
    shard.write_bytes(data)
    slices = Slices(3)
    assert torch.equal(run(net, slices, list("abc"), tmp_path), first)
    assert slices.computed == [0, 1, 2]
    assert "damaged" in capsys.readouterr().out
    assert len(list((tmp_path / "f").iterdir())) == 1


def test_a_shard_that_cannot_be_opened_is_not_taken_for_a_damaged_one(net, tmp_path, monkeypatch):
    run(net, Slices(3), list("abc"), tmp_path)
    monkeypatch.setattr("pathlib.Path.open", Mock(side_effect=PermissionError("not yours")))
    with pytest.raises(PermissionError, match="not yours"):
        run(net, Slices(3), list("abc"), tmp_path)
    assert len(list((tmp_path / "f").iterdir())) == 1


def test_a_killed_run_leaves_whole_shards_only(net, tmp_path, monkeypatch):
    monkeypatch.setattr("chestct.models.feature_cache.SHARD", 4)
    with pytest.raises(KeyboardInterrupt):
        run(net, Slices(8, fails_from=4), list("abcdefgh"), tmp_path)
    slices = Slices(8)
    run(net, slices, list("abcdefgh"), tmp_path)
    assert slices.computed == [4, 5, 6, 7]
    assert len(list((tmp_path / "f").iterdir())) == 2  # no half-written one


@pytest.mark.parametrize("room", [0, 2_000])
def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing_half_written(net, tmp_path, capsys, room):
    with limited(resource.RLIMIT_FSIZE, room), pytest.raises(SystemExit), errors_for_people():
        run(net, Slices(4), list("abcd"), tmp_path)
    assert re.search(rf"Cannot use {tmp_path}/f/\w+\.safetensors: File too large", message := capsys.readouterr().err)
    assert "cache_dir=FOLDER" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(run(net, Slices(4), list("abcd"), tmp_path)) == 4


def test_a_cache_that_cannot_be_written_ends_in_one_sentence(net, tmp_path, capsys):
    (tmp_path / "f").write_text("in the way")
    with pytest.raises(SystemExit), errors_for_people():
        run(net, Slices(4), list("abcd"), tmp_path)
    assert f"Cannot use {tmp_path / 'f'}" in (message := capsys.readouterr().err)
    assert "cache_dir=FOLDER" in message
