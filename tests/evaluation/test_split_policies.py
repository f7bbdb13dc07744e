from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest

from chestct import experiment
from chestct.config.schema import Config
from chestct.data.datamodule import SliceModule
from chestct.errors import ChestCTError, DataError
from chestct.evaluation.protocol import protocol
from chestct.evaluation.split_policies import check_anew, policy_row
from chestct.training.train import Result, train


def settings(cfg: Config, **evaluation: object) -> Config:
    return replace(cfg, evaluation=replace(cfg.evaluation, **evaluation))


def again(out: Path, name: str, cfg: Config, data: SliceModule) -> tuple[pd.DataFrame, list[Path]]:
    result = train(cfg, out / name, data=data)
    return result.predictions, [result.best]


@pytest.mark.slow
def test_every_policy_gets_a_model_of_its_own(run: tuple[Config, Result], tmp_path: Path) -> None:
    # As a job of a search leaves them, whose own training never looked at test.
    rows = experiment._evaluate_checkpoint(settings(run[0], policies=True, report=False), tmp_path).rows
    assert [row.policy for row in rows] == ["grouped", "official", "official_clean"]
    assert all(row.estimates["auroc"].value is not None for row in rows)
    assert rows[1].groups > 0
    assert {path.name for path in (tmp_path / "refits").iterdir()} == {"official", "official_clean"}


@pytest.mark.slow
def test_folds_within_the_only_source_score_every_slice_once(run, evaluation, tmp_path) -> None:
    asked = replace(evaluation, cfg=settings(run[0], protocol=["within"]))
    (row,) = protocol(asked, partial(again, tmp_path))["within"].rows
    manifest = run[1].data.manifest
    assert row["source"] == run[0].data.name
    assert (row["AUROC"].slices, row["AUROC"].groups) == (len(manifest), manifest["group"].nunique())
    assert row["AUROC"].low < row["AUROC"].value
    assert row["sensitivity"].slices + row["specificity"].slices == len(manifest)


def test_a_policy_that_the_data_do_not_admit_is_a_row_with_the_reason(run: tuple[Config, Result]) -> None:
    impossible = Mock(side_effect=DataError("no test folder"))
    rows = [policy_row(run[0], policy, impossible) for policy in ("official", "official_clean")]
    assert [row.note for row in rows] == ["not available: no test folder"] * 2


def test_nothing_is_trained_unless_it_is_asked_for_and_fine_tuned_models_never(run, tmp_path: Path) -> None:
    assert [row.policy for row in experiment._evaluate_checkpoint(run[0], tmp_path).rows] == ["grouped"]
    assert not list(tmp_path.iterdir())
    cfg = replace(run[0], model=replace(run[0].model, freeze=False))
    check_anew(cfg)
    for asked in ({"policies": True}, {"protocol": ["within"]}):
        with pytest.raises(ChestCTError, match="frozen"):
            check_anew(settings(cfg, **asked))
