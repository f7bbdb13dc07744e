"""chestct tells cancer from normal on chest CT slices, and tells how far that answer can be trusted.

import chestct

model = chestct.load()
print(model.predict("slice.dcm"))
"""

from typing import TYPE_CHECKING

from chestct.version import __version__

if TYPE_CHECKING:
    from chestct.serving.model import Model

__all__ = ["__version__", "load"]


def load(source: str = "packaged") -> "Model":
    """The model in the package, in a bundle's folder, or behind a name, ready to answer; see `Model.predict`.

    source: `packaged`, a folder, `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/RUN_ID` or
    `hf://USER/NAME[@REVISION]`, on the Hugging Face hub. MLFLOW_TRACKING_URI says which MLflow store or server knows a
    name. torch is imported here and not with `chestct`, which stays cheap.
    Raises BundleError for what is no sound bundle, and ConfigError where a name leads to none.
    """
    from chestct.serving.model import Model

    return Model(source)
