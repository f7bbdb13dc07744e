"""A bundle as an MLflow model: `mlflow.pyfunc.load_model` and `mlflow models serve` score image arrays with it.

MLflow is given the name of this module and the bundle's folder, never an object, so that nothing is pickled and the
bundle's own checks hold when it is loaded. That is true of models saved here: `mlflow.pyfunc.load_model` runs whatever
code a foreign model names, so for a bundle of unknown origin use `bundle=models:/NAME@ALIAS`, which runs none.
"""

import json
import platform
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from chestct.config.schema_serving import FACTS
from chestct.models.bundle import Bundle, load_bundle
from chestct.portable import copy_package, is_installed, requirements
from chestct.version import __version__

if TYPE_CHECKING:
    from chestct.tracking import Run


@dataclass
class Scorer:
    """What `mlflow.pyfunc.load_model` wraps."""

    bundle: Bundle

    def predict(self, images: np.ndarray, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answers for slices as they were decoded, all of one size, uint8 [N, H, W] with 255 for white.

        A row each: `score` (calibrated P(cancer)), `decision`, `novelty`, and `probability_CLASS`. Raises ValueError
        for another shape.
        """
        images = np.asarray(images, np.uint8)
        if images.ndim != 3:
            raise ValueError(f"Slices are uint8 [N, H, W]; got an array of shape {list(images.shape)}.")
        answers = [self.bundle.predict(self.bundle.preprocess(image)[None]) for image in images]
        rows = [[a.score[0], a.decision[0], a.novelty[0], *a.probabilities[0]] for a in answers]
        return pd.DataFrame(rows, columns=columns(self.bundle.classes))


def columns(classes: Iterable[str]) -> list[str]:
    """Of a table of answers."""
    return ["score", "decision", "novelty", *(f"probability_{name}" for name in classes)]


def save_model(bundle: Path, folder: Path, code: bool = False) -> None:
    """Writes the bundle in a folder, as `save_bundle` left it there, as an MLflow model with its signature.

    code: the package goes along (30 MB), so that `mlflow models serve` needs nothing but what indexes have.
    """
    from mlflow import __version__ as mlflow_version
    from mlflow import pyfunc
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    from chestct.tracking.registry import BUNDLE

    # Stated, since MLflow would infer it from an answer: the bundle loaded once more, and the network's time.
    classes = json.loads((bundle / FACTS).read_text(encoding="utf-8"))["classes"]
    types = {"decision": "string", "novelty": "float"}
    answers = Schema([ColSpec(types.get(name, "double"), name) for name in columns(classes)])
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1))])  # any number of slices, of any one size
    # By parts: `pyfunc.save_model` reads the file lists of all installed packages, a second.
    shutil.copytree(bundle, folder / "data" / BUNDLE)  # not by its folder's name: a run's next takes the place of this
    if code:
        copy_package(folder / "code")
    needed = dict.fromkeys([f"mlflow=={mlflow_version}", *(requirements() if code else [f"chestct=={__version__}"])])
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    environment = f"python: {platform.python_version()}\nbuild_dependencies: [pip, setuptools, wheel]\n"
    (folder / "python_env.yaml").write_text(f"{environment}dependencies: [-r requirements.txt]\n", encoding="utf-8")
    model = Model(signature=ModelSignature(images, answers))
    parts = {"data": f"data/{BUNDLE}", "python_env": "python_env.yaml"} | ({"code": "code"} if code else {})
    pyfunc.add_to_model(model, __name__, **parts)
    model.save(folder / "MLmodel")


def log_bundle(run: "Run", bundle: Path, code: bool = False) -> None:
    """Keeps the bundle in a folder with the run, as an MLflow model; `code` as for save_model."""
    if run.client:
        if code and not is_installed():
            print("The package does not go along with the model: only one that was installed knows what it needs.")
            code = False
        with tempfile.TemporaryDirectory() as folder:
            save_model(bundle, Path(folder) / "model", code)
            run.model(Path(folder) / "model")


def _load_pyfunc(path: str) -> Scorer:
    """Called by MLflow with the bundle's folder."""
    return Scorer(load_bundle(path))
