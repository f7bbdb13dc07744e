"""A bundle as an MLflow model: `mlflow.pyfunc.load_model` and `mlflow models serve` score image arrays with it.

MLflow is given the name of this module and the bundle's folder, never an object, so that nothing is pickled and the
bundle's own checks hold when it is loaded. That is true of models saved here: `mlflow.pyfunc.load_model` runs whatever
code a foreign model names, so for a bundle of unknown origin use `bundle=models:/NAME@ALIAS`, which runs none.
"""

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import chestct
from chestct.models.bundle import Bundle, load_bundle
from chestct.tracking.registry import BUNDLE

if TYPE_CHECKING:
    from chestct.tracking import Run

BATCH = 16


class Scorer:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def predict(self, images: np.ndarray, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answers for slices as they were decoded, all of one size, uint8 [N, H, W] with 255 for white.

        A row each: `score` (calibrated P(cancer)), `decision`, `novelty`, and `probability_CLASS`. Raises ValueError
        for another shape.
        """
        images = np.asarray(images, np.uint8)
        if images.ndim != 3:
            raise ValueError(f"Slices are uint8 [N, H, W]; got an array of shape {list(images.shape)}.")
        parts = [self._answers(images[at : at + BATCH]) for at in range(0, len(images), BATCH)]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"score": [], "decision": []})

    def _answers(self, images: np.ndarray) -> pd.DataFrame:
        bundle = self.bundle
        answers = bundle.predict(np.stack([bundle.preprocess(image) for image in images]))
        names = [f"probability_{name}" for name in bundle.classes]
        return pd.DataFrame(
            {"score": answers.score, "decision": answers.decision, "novelty": answers.novelty}
            | dict(zip(names, answers.probabilities.T, strict=True))
        )


def save_model(bundle: Path, folder: Path) -> None:
    """Writes the bundle in a folder as an MLflow model with its signature and an example of its input."""
    from mlflow import pyfunc
    from mlflow.models import infer_signature
    from mlflow.models.signature import ModelSignature
    from mlflow.types import Schema, TensorSpec

    scorer = Scorer(load_bundle(bundle))
    size = scorer.bundle.preprocess.size
    example = np.zeros((1, size, size), np.uint8)
    answer = infer_signature(example, scorer.predict(example))
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1))])  # any number of slices, of any one size
    logging.getLogger("mlflow.models.model").setLevel(logging.ERROR)
    pyfunc.save_model(
        folder,
        loader_module=__name__,
        data_path=str(bundle),
        signature=ModelSignature(images, answer.outputs),
        input_example=example,
        pip_requirements=[f"chestct=={chestct.__version__}"],  # MLflow would look for them in a process of its own
    )


def log_bundle(run: "Run", bundle: Path) -> None:
    """Keeps the bundle in a folder with the run, as an MLflow model."""
    if run.client:
        with tempfile.TemporaryDirectory() as folder:
            save_model(bundle, Path(folder) / "model")
            run.artifacts(Path(folder) / "model", BUNDLE)


def _load_pyfunc(path: str) -> Scorer:
    """Called by MLflow with the bundle's folder."""
    return Scorer(load_bundle(path))
