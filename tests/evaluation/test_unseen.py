import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chestct.config.schema import Config, SourceConfig
from chestct.errors import ChestCTError, DataError
from chestct.evaluation import evaluate as module
from chestct.evaluation.evaluate import evaluate
from chestct.evaluation.export import export
from chestct.evaluation.unseen import leave_out_learned
from chestct.reporting.render import model_card
from chestct.reporting.text import summary
from chestct.training.train import Result
from tests.conftest import opened


@pytest.fixture
def grown(run: tuple[Config, Result], tmp_path: Path) -> Config:
    """Settings of the run on its slices and one more, by which all are dealt anew."""
    root = Path(shutil.copytree(run[0].data.root or "", tmp_path / "grown"))
    noise = np.random.default_rng(0).integers(0, 256, (96, 96), dtype=np.uint8)
    Image.fromarray(noise).save(next(root.glob("train/normal/*.png")).with_name("new.png"))
    return replace(run[0], data=replace(run[0].data, root=str(root), valid_fraction=0.3))


@pytest.mark.slow
def test_of_data_that_have_grown_nothing_is_measured_that_the_checkpoint_learned_from(
    run: tuple[Config, Result], grown: Config, tmp_path: Path
) -> None:
    evaluation = evaluate(grown)
    then = run[1].data.manifest.set_index("content")["split"]
    table = evaluation.table.assign(then=evaluation.table["content"].map(then))
    assert set(table["then"][table["split"] == "test"].dropna()) <= {"test"}
    assert set(table["then"][table["split"] == "valid"].dropna()) <= {"valid", "test"}
    dealt, left_out = len(opened(grown).manifest), evaluation.about["left_out"]
    assert left_out == dealt - len(evaluation.manifest) > 0
    assert f"{left_out} slices that the model learned from" in summary(evaluation)
    assert evaluation.about["trained_on"][:16] in model_card(evaluation)
    bundle = export(evaluation, tmp_path / "bundle", model_card(evaluation))
    learned = [then.index[then != "test"], evaluation.manifest.query("split != 'test'")["content"]]
    assert bundle.seen == {content[:16] for contents in learned for content in contents}


@pytest.mark.slow
def test_a_checkpoint_that_does_not_say_what_it_has_seen_points_to_its_bundle(
    run: tuple[Config, Result], grown: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = module.load_classifier

    def of_earlier_version(*arguments: object) -> object:
        model = load(*arguments)
        del model.hparams["data"]["seen"]
        return model

    monkeypatch.setattr(module, "load_classifier", of_earlier_version)
    with pytest.raises(DataError, match=r"might be test now. Train anew\."):
        evaluate(grown)
    with pytest.raises(DataError, match="groups or data have changed since"):
        evaluate(run[0])


def checkpoint(**data: object) -> SimpleNamespace:
    """A model whose settings are the defaults, with sources, and what it knows of its data."""
    return SimpleNamespace(cfg=with_pattern("(.)"), hparams={"data": data})


def with_pattern(patient: str) -> Config:
    cfg = Config(ckpt="run/checkpoints/best.ckpt")
    cfg.data.sources = {"a": SourceConfig("a", patient=patient)}
    return cfg


def dealt(rows: list[tuple[str, str, int, bool]], targets: tuple[int, ...] = (0, 1)) -> SimpleNamespace:
    """Data of these slices: content, split, group, leaked; of all targets each."""
    table = pd.DataFrame(rows, columns=["content", "split", "group", "leaked"])
    manifest = pd.concat([table.assign(target=target) for target in targets], ignore_index=True)
    return SimpleNamespace(manifest=manifest, store=SimpleNamespace(manifest=manifest, data_hash="h"))


def test_groups_that_are_made_otherwise_on_the_same_data_leave_out_near_copies_too() -> None:
    rows = [("a", "train", 0, False), ("b", "valid", 1, False), ("c", "valid", 2, False), ("a2", "valid", 3, False)]
    rows += [("a3", "train", 3, False), ("d", "test", 4, False), ("b2", "test", 5, False), ("b3", "train", 5, False)]
    data = dealt([*rows, ("b4", "test", 6, True), ("e", "test", 6, True)])
    model = checkpoint(hash="h", seen={"train": ["a", "a3", "c"], "valid": ["b", "b3", "b4"]})
    assert leave_out_learned(model, data, with_pattern("(.)")) == 2 * 3
    kept = data.manifest[data.manifest["target"] == 0]
    assert kept["content"].tolist() == ["a", "b", "a3", "d", "b3", "b4", "e"]


def test_too_little_that_is_left_and_another_pattern_for_patients_are_errors(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    cfg = with_pattern("(.)")
    cfg.ckpt = f"{tmp_path}/checkpoints/best.ckpt"
    model = checkpoint(hash="h", seen={"train": ["a"], "valid": ["b"]})
    for rows in ([("b", "valid", 1), ("a", "test", 0)], [("a", "valid", 0), ("c", "test", 1)]):
        with pytest.raises(DataError, match=rf"learned from 2 of the valid and .*bundle={tmp_path}/bundle data=\.\.\."):
            leave_out_learned(model, dealt([(*row, False) for row in rows]), cfg)
    with pytest.raises(ChestCTError, match=r"trained with data\.sources\.a\.patient=\(\.\): divided otherwise"):
        leave_out_learned(model, dealt([]), with_pattern("(..)"))
