"""The parts of a report that cost minutes and are made only where cfg.evaluation switches them on."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd

from chestct.config.schema import PHANTOM, SUBTYPES, of_patients
from chestct.data.prepare import prepare_store
from chestct.data.store import preprocess_of
from chestct.evaluation.evaluate import Evaluation
from chestct.evaluation.novelty_check import novelty_figures
from chestct.evaluation.pointing import check_explanation, known_lesions, pointing_game
from chestct.evaluation.protocol import without_weak_intervals
from chestct.evaluation.robustness import robustness

OTHER_SEED = 1_000_003
"""Added to the phantoms' seed: heat maps are checked on lesions that no training has seen."""


def optional_sections(evaluation: Evaluation) -> dict[str, Any]:
    """The sections `explanation`, `novelty` and `robustness` of an evaluation, as far as its settings ask for them.

    And `pointing`, where it is known of slices of patients where their lesions are.
    """
    cfg = evaluation.cfg
    sections = {
        "explanation": (cfg.evaluation.phantoms, explanation),
        "novelty": (cfg.evaluation.novelty, novelty),
        "robustness": (cfg.evaluation.robustness, under_changes),
        "pointing": (len(_known(evaluation)), pointing),
    }
    return {name: make(evaluation) for name, (slices, make) in sections.items() if slices}


def explanation(evaluation: Evaluation) -> dict[str, Any]:
    """Heat maps of phantoms like those of the settings, but new, held against their lesions: `check_explanation`."""
    cfg, number = evaluation.cfg, evaluation.cfg.evaluation.phantoms
    drawn = dataclasses.replace(
        cfg.data.phantom, seed=cfg.data.phantom.seed + OTHER_SEED, slices=max(12, round(number / 0.9)), cancer=0.95
    )
    data = dataclasses.replace(cfg.data, name=PHANTOM, root=None, sources={}, store=None, phantom=drawn)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(data, labels={name: name for name in SUBTYPES}))
    store = prepare_store(cfg, cfg.trainer.progress)
    rows = store.manifest[store.manifest["lesion"] != b""]
    rows = rows.sort_values("path", key=lambda path: path.str.rpartition("/")[2]).head(number)  # as they were drawn
    lesions = known_lesions(rows, store.images, cfg)
    assert lesions is not None
    return check_explanation(evaluation.bundle, lesions)


def pointing(evaluation: Evaluation) -> dict[str, Any]:
    """How often heat maps point into the known lesions of test slices, and how often who sees nothing does."""
    lesions = known_lesions(_known(evaluation), evaluation.images, evaluation.cfg)
    assert lesions is not None
    answers = evaluation.bundle.predict(lesions.images, explain=True)
    assert answers.heat is not None
    return without_weak_intervals(pointing_game(answers.heat, lesions))


def _known(evaluation: Evaluation) -> pd.DataFrame:
    """Rows of the manifest: test slices of patients with boxes or masks; phantoms have a check of their own."""
    manifest = evaluation.manifest
    return manifest[manifest["source"].map(of_patients) & (manifest["split"] == "test") & (manifest["lesion"] != b"")]


def novelty(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Pictures that are no chest CT, and how far from the training slices they lie (see novelty_check)."""
    number = evaluation.cfg.evaluation.novelty
    squares, _ = _some(evaluation, number)
    of_test = evaluation.test["novelty"].to_numpy()
    return novelty_figures(evaluation.bundle, preprocess_of(evaluation.cfg.data), of_test, squares, number)


def under_changes(evaluation: Evaluation) -> pd.DataFrame:
    """Scores of test slices after graded changes (see robustness)."""
    squares, targets = _some(evaluation, evaluation.cfg.evaluation.robustness)
    # The changes stand for what happens to a slice before it is preprocessed; its place in the square is settled.
    again = dataclasses.replace(preprocess_of(evaluation.cfg.data), fit="pad")

    def score_of(images: np.ndarray) -> np.ndarray:
        return evaluation.bundle.predict(np.stack([again(image) for image in images])).score

    return robustness(score_of, squares, targets, evaluation.point.threshold)


def _some(evaluation: Evaluation, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Test slices drawn at random, uint8 [N, S, S], and whether each is cancer, int [N].

    As many of each class as there are, up to half of `number`; cancer for the rest.
    """
    test = evaluation.manifest[evaluation.manifest["split"] == "test"]
    test = test.sample(frac=1, random_state=evaluation.cfg.data.split_seed)
    half = max(1, number // 2)
    normal, cancer = (test[test["label"] == label] for label in ("normal", "cancer"))
    chosen = pd.concat([normal.head(half), cancer.head(max(half, number - len(normal)))])
    return evaluation.images[chosen["row"].to_numpy()], (chosen["label"] == "cancer").to_numpy(int)
