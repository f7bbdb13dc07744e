import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from chestct import experiment
from chestct.config.compose import compose
from chestct.config.schema import Config, PhantomConfig, SourceConfig
from chestct.data.datamodule import SliceModule
from chestct.errors import ChestCTError
from chestct.evaluation import protocol as module
from chestct.evaluation.compare import compare
from chestct.evaluation.evaluate import Evaluation, evaluate
from chestct.evaluation.protocol import Part, Spread, protocol
from chestct.evaluation.subgroups import of_cancer
from chestct.models.operating_point import OperatingPoint
from chestct.models.vgg16 import VGG16
from chestct.phantom.dataset import write
from chestct.reporting.render import write as write_report
from chestct.reporting.text import summary
from chestct.stats.calibration import reliability_table
from chestct.stats.metrics import measure
from chestct.training.train import train
from tests.conftest import SMALL
from tests.evaluation.evaluations import made_up

DRAWN = {"north": (40, 0.0), "south": (41, 0.0), "east": (22, 0.8), "clinic": (30, 0.0), "phantom": (23, 0.0)}
"""Slices and difficulty of each source; of `clinic` only the normal slices stay."""

BOTH = ["north", "south", "east"]
"""Sources of patients with both classes."""


@dataclass
class Trainings:
    """Every head that a protocol trained: its predictions, and the sources that it learned from."""

    out: Path
    predictions: dict[str, pd.DataFrame] = field(default_factory=dict)
    learned: dict[str, set[str]] = field(default_factory=dict)

    def __call__(self, name: str, cfg: Config, data: SliceModule) -> tuple[pd.DataFrame, list[Path]]:
        assert not cfg.evaluation.protocol, "evaluated, this checkpoint would train all of them again"
        result = train(cfg, self.out / name, data=data)
        self.predictions[name] = result.predictions
        self.learned[name] = set(data.manifest["source"][data.manifest["split"] != "test"])
        return result.predictions, [result.best]


@pytest.fixture(scope="module")
def evaluation(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """A head trained on five sources of phantoms, four of which pass for hospitals. Read only."""
    root, sources = tmp_path_factory.mktemp("hospitals"), []
    for name, (slices, difficulty) in DRAWN.items():
        write(root / name, PhantomConfig(slices=slices, size=96, difficulty=difficulty, seed=slices))
        for folder in root.glob("clinic/*/*"):
            if folder.is_dir() and folder.name != "normal":
                shutil.rmtree(folder)
        sources.append(f"{name}: {{root: {root / name}}}")
    settings = ["data.name=all", f"cache_dir={cache}", f"data.sources={{{', '.join(sources)}}}"]
    cfg = compose(*SMALL, *settings, "evaluation.resamples=200", "evaluation.threshold='sensitivity>=0.9'", "seeds=2")
    result = train(replace(cfg, seeds=1), root / "run")
    return evaluate(replace(cfg, ckpt=str(result.best)))


def asked(evaluation: Evaluation, *parts: str, **settings: object) -> Evaluation:
    cfg = replace(evaluation.cfg, evaluation=replace(evaluation.cfg.evaluation, protocol=list(parts)), **settings)
    return replace(evaluation, cfg=cfg)


@pytest.fixture(scope="module")
def measured(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Part], Trainings]:
    trainings = Trainings(tmp_path_factory.mktemp("refits"))
    return protocol(asked(evaluation, "loso", "matrix", "within", "probe"), trainings), trainings


def mean_logits(trainings: Trainings, name: str) -> pd.DataFrame:
    first, second = (trainings.predictions[f"{name}/seed-{seed}"] for seed in (0, 1))
    table = first.assign(mean=(first["logit_cancer"] + second["logit_cancer"]) / 2, y=first["label"] == "cancer")
    return table.assign(first=first["logit_cancer"], second=second["logit_cancer"])


@pytest.mark.slow
def test_phantoms_beside_patients_are_neither_fitted_to_nor_measured_on(evaluation: Evaluation) -> None:
    valid = evaluation.table[evaluation.table["split"] == "valid"]
    patients = valid[valid["source"] != "phantom"]
    cancer = patients["label"] == "cancer"
    assert len(patients) < len(valid)
    given = (cancer.to_numpy(int), evaluation.cfg.evaluation, [*patients["source"]])
    point = OperatingPoint.fit(patients[["logit_cancer"]].to_numpy(), *given)
    assert evaluation.point == point
    assert (point.validation["cancers"], point.validation["normals"]) == (cancer.sum(), (~cancer).sum())
    assert evaluation.metrics["valid"]["auroc"].value == pytest.approx(roc_auc_score(cancer, patients["logit_cancer"]))
    # The 99th percentile of the novelty of patients' slices is 1, or a fitted one above it.
    assert patients["novelty"].quantile(0.99) <= 1 + 1e-5


@pytest.mark.slow
def test_each_source_is_measured_by_heads_that_have_never_seen_it(measured: tuple[dict[str, Part], Trainings]) -> None:
    parts, trainings = measured
    values = {}
    for row in parts["loso"].rows[:3]:
        name = f"without-{row['held out']}"
        for seed in (0, 1):
            assert trainings.learned[f"{name}/seed-{seed}"] == {*DRAWN} - {row["held out"]}
        table = mean_logits(trainings, name)
        test = table[table["split"] == "test"]
        assert set(test["source"]) == {row["held out"]}
        values[row["held out"]] = row["AUROC"].value
        assert row["AUROC"].value == pytest.approx(roc_auc_score(test["y"], test["mean"]))
        assert row["AUROC"].low <= row["AUROC"].value <= row["AUROC"].high
        singles = [roc_auc_score(test["y"], test[seed]) for seed in ("first", "second")]
        assert row["single seeds"].values == pytest.approx(singles)
    assert list(values) == BOTH
    clinic, mean, worst = parts["loso"].rows[3:]  # no figure is measured on phantoms
    assert clinic["AUROC"].value is clinic["single seeds"] is None
    assert "no cancer slices" in clinic["AUROC"].reason
    assert parts["threshold"].rows[3]["specificity"].value is not None
    assert (mean["held out"], worst["held out"]) == ("mean", "worst")
    assert mean["AUROC"] == pytest.approx(np.mean(list(values.values())))
    assert worst["AUROC"] == min(values.values())
    assert parts["loso"].notes == ["Mean and worst are not of all 4 sources: AUROC of 3, single seeds of 3."]


@pytest.mark.slow
def test_the_threshold_is_that_of_the_other_sources_validation_slices(evaluation: Evaluation, measured) -> None:
    parts, trainings = measured
    for row in parts["threshold"].rows[:3]:
        table = mean_logits(trainings, f"without-{row['held out']}")
        valid, test = (table[table["split"] == split] for split in ("valid", "test"))
        valid = valid[valid["source"] != "phantom"]
        given = (valid["target"].to_numpy(), evaluation.cfg.evaluation, valid["source"].tolist())
        point = OperatingPoint.fit(valid[["mean"]].to_numpy(), *given)
        called = point.probabilities(test[["mean"]].to_numpy())[:, 1] >= point.threshold
        assert row["threshold"] == pytest.approx(point.threshold)
        assert row["sensitivity"].value == pytest.approx(called[test["y"]].mean())
        assert row["specificity"].value == pytest.approx(1 - called[~test["y"]].mean())
        assert (row["specificity of these"] is None) == (row["answered"] == 0)
        assert 0 <= row["ECE"].value <= 1
    assert parts["threshold"].rows[5]["ECE"] == max(row["ECE"].value for row in parts["threshold"].rows[:4])


@pytest.mark.slow
def test_the_matrix_trains_on_one_source_and_tests_on_each_other(measured) -> None:
    parts, trainings = measured
    assert [row["trained on"] for row in parts["matrix"].rows] == [*BOTH, "clinic"]
    assert parts["matrix"].notes[0].startswith("clinic: not available: ")
    assert parts["matrix"].rows[3] == {"trained on": "clinic"} | dict.fromkeys(BOTH) | {"clinic": "–"}
    for row, seeds in list(zip(parts["matrix"].rows, parts["seeds"].rows, strict=True))[:3]:
        name = row["trained on"]
        assert trainings.learned[f"only-{name}/seed-0"] == {name}
        assert row[name] == "–"
        table = mean_logits(trainings, f"only-{name}")
        assert "no cancer slices" in row["clinic"].reason
        for other in {*BOTH} - {name}:
            test = table[(table["split"] == "test") & (table["source"] == other)]
            assert row[other].value == pytest.approx(roc_auc_score(test["y"], test["mean"]))
            assert seeds[other].values[1] == pytest.approx(roc_auc_score(test["y"], test["second"]))


@pytest.mark.slow
def test_pointing_is_measured_on_known_lesions_and_on_lesions_drawn_into_normal_slices(evaluation, measured) -> None:
    manifest, rows = evaluation.data.store.manifest, measured[0]["pointing"].rows
    every = [(source, kind) for source in BOTH for kind in ("known", "drawn")]
    assert [(row["held out"], row["lesions"]) for row in rows] == [*every, ("clinic", "drawn")]
    for row in rows:
        label = "cancer" if row["lesions"] == "known" else "normal"
        count = ((manifest["source"] == row["held out"]) & (manifest["label"] == label)).sum()
        assert count * (0.7 if label == "normal" else 1) <= row["slices"] <= count  # not each phantom shows lungs
        assert row["heat map"].low <= row["heat map"].value <= row["heat map"].high
        assert 0 < row["random place in the lungs"] < 0.5
        assert row["usual place"] is None  # this head judges no places, and learns none


@pytest.mark.slow
def test_within_a_source_every_slice_is_scored_once(evaluation: Evaluation, measured) -> None:
    parts, trainings = measured
    manifest = evaluation.data.store.manifest
    assert parts["within"].notes[0] == "east: not available: 9 groups of a class, needs 10."
    assert parts["within"].notes[1] == "clinic: not available: 0 groups of a class, needs 10."
    for row in parts["within"].rows[:2]:
        tables = (mean_logits(trainings, f"within-{row['source']}/fold-{fold}") for fold in range(5))
        tests = [table[table["split"] == "test"] for table in tables]
        pooled = pd.concat(tests)
        assert sorted(pooled["path"]) == sorted(manifest["path"][manifest["source"] == row["source"]])
        first = np.mean([roc_auc_score(test["y"], test["first"]) for test in tests])
        assert row["single seeds"].values[0] == pytest.approx(first)
        assert row["AUROC"].slices == len(pooled)
        groups = [pooled["group"][pooled["y"] == cancer].nunique() for cancer in (False, True)]
        assert row["groups"] == " / ".join(map(str, groups))


@pytest.mark.slow
def test_the_source_of_normals_is_told_from_features_that_give_it_away(measured) -> None:
    rows = measured[0]["probe"].rows
    assert [row["source"] for row in rows] == ["clinic", "east", "north", "south", "balanced accuracy"]
    assert rows[-1]["told right"] == pytest.approx(np.mean([row["told right"] for row in rows[:-1]]))
    assert 0.1 < rows[-1]["told right"] < 0.75  # all were drawn by one program


@pytest.mark.slow
def test_the_protocol_is_made_again_without_running_a_convolution(evaluation, measured, tmp_path, monkeypatch) -> None:
    asks = asked(evaluation, "loso", "matrix")
    with monkeypatch.context() as patch:
        patch.setattr(VGG16, "conv5", lambda *_: pytest.fail("a convolution ran"))
        again = protocol(asks, Trainings(tmp_path))
    assert again["loso"] == measured[0]["loso"]
    assert again["matrix"] == measured[0]["matrix"]
    # The slices that were left out are kept, each as the others' model and threshold called it.
    write_report(replace(asks, sections=asks.sections | {"protocol": again}), tmp_path)
    kept = pd.read_parquet(tmp_path / "held_out.parquet")
    for ranked, called in zip(again["loso"].rows[:4], again["threshold"].rows[:4], strict=True):
        own = kept[kept["source"] == ranked["held out"]]
        assert set(own["threshold"]) == {called["threshold"]}
        assert ranked["normal / cancer"] == f"{(own['label'] == 'normal').sum()} / {(own['label'] == 'cancer').sum()}"
        figures = measure(own, "binary", 10, 0)
        assert figures["specificity"].value == called["specificity"].value
        assert figures["auroc"].value == getattr(ranked["AUROC"], "value", None)
    drawn = (tmp_path / "held_out.svg").read_text(encoding="utf-8")
    assert drawn.count("stroke-dasharray: 3.7") == 4 + 1  # a threshold a source, and the legend's
    assert "Scores of sources that were left out" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert compare(kept, kept, 100)["difference"].eq(0).all()


@pytest.mark.slow
def test_the_protocol_is_in_the_report_and_in_files_of_its_own(evaluation, measured, tmp_path: Path) -> None:
    told = replace(evaluation, sections=evaluation.sections | {"protocol": measured[0]})
    write_report(told, tmp_path)
    parts = json.loads((tmp_path / "protocol.json").read_text(encoding="utf-8"))
    assert list(parts) == ["loso", "threshold", "pointing", "matrix", "seeds", "within", "probe"]
    assert parts["loso"]["rows"][0]["AUROC"]["value"] == measured[0]["loso"].rows[0]["AUROC"].value
    for name in ("protocol.md", "MODEL_CARD.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert all(part.title in text for part in measured[0].values())
    markdown = (tmp_path / "protocol.md").read_text(encoding="utf-8")
    assert "| trained on | north | south | east | clinic |" in markdown
    assert all(part.title in summary(told) for part in measured[0].values())
    assert str(Spread([0.8, 0.9])) == "0.850 ± 0.071"


def test_of_subtypes_the_figures_are_those_of_cancer_against_normal() -> None:
    evaluation = made_up("subtype")
    test, cancer = evaluation.test, evaluation.test["label"] == "cancer"
    figures = of_cancer(test, evaluation.cfg)
    assert figures["sensitivity"].value == pytest.approx(test["flagged"][cancer].mean())
    assert figures["specificity"].value == pytest.approx(1 - test["flagged"][~cancer].mean())
    assert figures["sensitivity"].slices == cancer.sum()
    gaps = reliability_table((1 - test["probability_normal"]).to_numpy(), cancer.to_numpy(), bins=15)
    expected = sum(row["n"] * abs(row["score"] - row["observed"]) for row in gaps) / len(test)
    assert figures["ece"].value == pytest.approx(expected)


def test_within_a_source_groups_are_those_that_the_figures_rest_on(monkeypatch) -> None:
    evaluation = made_up()
    alone = evaluation.test.assign(seed_0=evaluation.test["logit_cancer"], group=lambda t: np.arange(len(t)) // 4)
    monkeypatch.setattr(module, "prepare_store", lambda cfg: SimpleNamespace(manifest=alone))
    folds = iter([alone.iloc[:40], alone.iloc[40:72]])
    monkeypatch.setattr(module, "FOLDS", 2)
    monkeypatch.setattr(module, "on_test", lambda *_: (next(folds), 0.5))
    (row,) = module._within(evaluation.cfg, lambda *_: (None, []), ["north"]).rows
    assert row["groups"] == "18 / 18"
    alone["group"] //= 4
    part = module._within(evaluation.cfg, None, ["north"])
    assert part.rows[0]["groups"] == "5 / 5"
    assert part.notes[0] == "north: not available: 5 groups of a class, needs 10."


@pytest.mark.parametrize(("slices", "folds"), [(6, 4), (2, 4), (1, 2)])
def test_the_probe_takes_fewer_folds_where_normal_slices_are_few(slices, folds, monkeypatch) -> None:
    rows = [(source, group) for group, source in enumerate("aabb") for _ in range(slices)]
    manifest = pd.DataFrame(rows, columns=["source", "group"]).assign(split="train", label="normal")

    monkeypatch.setattr(module, "_pooled", lambda net, data, split: torch.rand(len(rows) * (split == "train"), 8))
    part = module._probe(SimpleNamespace(manifest=manifest, cfg=Config()), None, ["a", "b"])
    assert part.notes == [
        f"Chance: 0.500. Linear model on standardised features, cross-validation over groups in {folds} folds."
    ]
    assert all(0 <= row["told right"] <= 1 for row in part.rows)


def test_a_probe_that_fails_does_so_before_anything_is_trained(monkeypatch) -> None:
    monkeypatch.setattr(module, "_probe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        protocol(asked(of_sources("north", "south"), "loso", "probe"), None)


def of_sources(*names: str) -> Evaluation:
    """A made-up evaluation of sources of these names, of which no slice is looked at."""
    evaluation = made_up()
    evaluation.cfg.data.sources = {name: SourceConfig(name) for name in names}
    return replace(evaluation, data=SimpleNamespace(store=object()))


def test_what_cannot_be_measured_says_why() -> None:
    impossible = Mock(side_effect=ChestCTError("one class is missing"))
    parts = protocol(asked(of_sources(*DRAWN), "loso", "matrix"), impossible)
    assert parts["loso"].notes == [f"{name}: not available: one class is missing" for name in (*BOTH, "clinic")]
    assert parts["matrix"].notes == parts["loso"].notes
    assert all(row["AUROC"] is None for row in parts["loso"].rows[:4])


def test_it_takes_two_sources_of_patients_and_says_so_before_anything_is_measured(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("chestct.evaluation.evaluate.evaluate", lambda *_: 1 / 0)
    for names, told in (({"north", "phantom"}, "is only north"), ({"phantom"}, "is none")):
        with pytest.raises(ChestCTError, match=rf"{told}.*data\.sources"):
            experiment._evaluate_checkpoint(asked(of_sources(*names), "within", "loso", ckpt="x").cfg, tmp_path)
    for names, part in ((["north"], "within"), (["north", "south"], "loso")):
        with pytest.raises(ZeroDivisionError):
            experiment._evaluate_checkpoint(asked(of_sources(*names), part, ckpt="x").cfg, tmp_path)
    assert protocol(asked(of_sources("north")), None) == {}
