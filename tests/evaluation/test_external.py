import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from chestct.config.schema import Config, PhantomConfig, SourceConfig
from chestct.data.splits import load_splits
from chestct.errors import BundleError
from chestct.evaluation import external
from chestct.evaluation.evaluate import Evaluation
from chestct.evaluation.external import evaluate_bundle
from chestct.models.bundle import load_bundle
from chestct.reporting.figures import gallery
from chestct.reporting.text import summary
from chestct.training.train import Result

LABELS = {"healthy": "normal", "tumour": "cancer"}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of another seed in folders with names of their own."""
    from chestct.phantom.dataset import write

    drawn = tmp_path_factory.mktemp("others")
    write(drawn / "drawn", PhantomConfig(slices=24, size=96, seed=7, difficulty=0.0))
    for path in (drawn / "drawn").glob("t*/*/*.png"):
        name = "healthy" if path.parent.name == "normal" else "tumour"
        (drawn / "renamed" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, drawn / "renamed" / name / f"{path.parent.parent.name}-{path.parent.name}-{path.name}")
    return drawn / "renamed"


def settings(run: tuple[Config, Result], folder: Path, **data: object) -> Config:
    return replace(run[0], ckpt=None, bundle=str(folder), data=replace(run[0].data, **data))


def test_foreign_folders_are_measured_with_the_frozen_threshold(run, folder, others, evaluation) -> None:
    cfg = settings(run, folder, name="elsewhere", root=str(others), labels=LABELS)
    cfg = replace(cfg, model=replace(cfg.model, pool="topk"))  # of another model's settings
    result = evaluate_bundle(replace(cfg, evaluation=replace(cfg.evaluation, robustness=2)))
    assert "robustness" in result.sections  # what the settings ask for beyond
    assert result.about["split"] == result.headline.policy == "external"
    assert result.cfg.model.pool == load_bundle(folder).facts["model"]["pool"] != cfg.model.pool
    assert result.point == evaluation.point
    assert result.point.threshold != 0.5
    frozen = evaluation.point.probabilities(result.table[["logit_cancer"]].to_numpy())[:, 1]
    assert result.table["probability_cancer"].to_numpy() == pytest.approx(frozen)
    assert (result.table["flagged"] == (frozen >= evaluation.point.threshold)).all()
    called = result.table["flagged"][result.table["label"] == "cancer"]
    assert result.metrics["test"]["sensitivity"].value == pytest.approx(called.mean())
    assert result.metrics["test"]["auroc"].value is not None
    assert len(result.table) == len(list(others.glob("*/*")))
    assert {row.name for row in result.sections["shift"]} >= {"width", "std", "score", "novelty"}
    assert {row["by"] for row in result.sections["subgroups"]} == {"subtype"}
    shown = [picture for pictures in gallery(result).values() for picture in pictures]
    assert {picture["path"] for picture in shown} <= set(result.table["path"])
    assert len(shown) > 0


def test_a_bundle_that_keeps_nothing_to_compare_with_is_refused_before_anything_is_predicted(run, folder, monkeypatch):
    bundle = load_bundle(folder)
    del bundle.facts["statistics"]
    monkeypatch.setattr(external, "load_bundle", lambda *given: bundle)
    monkeypatch.setattr(external, "prepare_store", lambda *given: pytest.fail("went on"))
    with pytest.raises(BundleError, match=r"no statistics of .* to compare with\. Export it again"):
        evaluate_bundle(settings(run, folder))


def test_a_bundle_that_does_not_say_how_its_data_were_divided_is_measured_as_on_others(
    run: tuple[Config, Result], folder: Path, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(folder)
    del bundle.facts["data"]["splitting"]
    monkeypatch.setattr(external, "load_bundle", lambda *given: bundle)
    result = evaluate_bundle(settings(run, folder))
    assert result.about["split"] == "external"
    assert sorted(result.table["path"]) == sorted(evaluation.test["path"])


def test_files_that_tell_no_patient_are_said_for_intervals_rest_on_them(run, folder, others, capsys) -> None:
    first = min(others.glob("*/*")).name
    sources = {"clinic": SourceConfig(str(others), patient=f"({first})")}
    evaluate_bundle(settings(run, folder, root=None, sources=sources, labels=LABELS))
    count = len(list(others.glob("*/*")))
    assert f"does not match {count - 1} of {count} files: of their patients nothing" in capsys.readouterr().err


def test_phantoms_beside_patients_are_not_measured_and_said_to_be_left_out(run, folder, others) -> None:
    labels = {**run[0].data.labels, **LABELS}
    sources = {"clinic": SourceConfig(str(others)), "phantom": SourceConfig(run[0].data.root or "")}
    result = evaluate_bundle(settings(run, folder, root=None, sources=sources, labels=labels))
    alone = evaluate_bundle(settings(run, folder, name="clinic", root=str(others), labels=LABELS))
    assert result.headline == alone.headline
    assert result.sections["subgroups"] == alone.sections["subgroups"]
    assert result.about["phantoms"] > 0
    assert f"Not measured: {result.about['phantoms']} phantoms beside slices of patients." in summary(result)
    assert "SYNTHETIC: Tested" not in summary(result)


def test_its_own_data_give_its_test_slices_and_no_others_where_the_split_has_become_another(
    run: tuple[Config, Result], folder: Path, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = evaluate_bundle(settings(run, folder, split="official"))
    assert result.about["split"] == result.headline.policy == "grouped"  # as it was made, whatever the settings say
    own, test = (table.set_index("path").sort_index() for table in (result.table, evaluation.test))
    assert list(own.index) == list(test.index)
    assert own["probability_cancer"].to_numpy() == pytest.approx(test["probability_cancer"].to_numpy(), abs=1e-3)
    assert result.metrics["test"]["auroc"].value == pytest.approx(evaluation.metrics["test"]["auroc"].value, abs=1e-6)

    def dealt_otherwise(manifest: pd.DataFrame, cfg: Config) -> pd.DataFrame:
        table = load_splits(manifest, cfg)
        trained = table.index[table["split"] == "train"][:5]
        return table.assign(split=table["split"].where(~table.index.isin(trained), "test"))

    monkeypatch.setattr(external, "load_splits", dealt_otherwise)
    result = evaluate_bundle(settings(run, folder))
    assert result.about["left_out"] == 5
    assert sorted(result.table["path"]) == sorted(evaluation.test["path"])


def test_slices_it_was_trained_on_their_near_copies_and_pictures_of_two_labels_are_left_out(
    run: tuple[Config, Result], folder: Path, others: Path, tmp_path: Path
) -> None:
    mixed = Path(shutil.copytree(others, tmp_path / "mixed"))
    known = run[1].data.manifest.query("split == 'train' and label == 'cancer'").iloc[0]["path"]
    # Another file, the same pixels; and a grey level more.
    pixels = Image.open(Path(run[0].data.root or "") / known).convert("L")
    pixels.convert("RGB").save(mixed / "tumour" / "again.bmp")
    pixels.point(lambda level: min(255, level + 1)).save(mixed / "tumour" / "again-brighter.png")
    twice = max((mixed / "tumour").glob("t*.png"))
    shutil.copy(twice, mixed / "healthy" / "twice.png")
    result = evaluate_bundle(settings(run, folder, name="mixed", root=str(mixed), labels=LABELS))
    assert (result.about["left_out"], result.about["label_conflicts"]) == (2, 1)
    assert len(result.table) == len(list(others.glob("*/*"))) - 1
    assert not result.table["path"].str.contains(f"again|twice|{twice.name}").any()
    assert "2 slices that the model learned from" in summary(result)
    assert "1 picture with more than one label" in summary(result)
