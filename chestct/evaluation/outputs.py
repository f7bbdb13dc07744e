"""What a trained network gives for the slices of a data module: logits, pooled features, maps of normal slices.

While the convolutions are the given ones, all of it comes from the cache of frozen features.
"""

import numpy as np
import torch

from chestct.config.schema import Config
from chestct.data.datamodule import SliceModule
from chestct.models import features
from chestct.models.lightning_module import Classifier

SPLITS = ("train", "valid", "test")

NORMALS = 128
"""Normal training slices that heat maps are held against, at most."""


def outputs(model: Classifier, data: SliceModule, cfg: Config) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Logits [N, K] and mean-pooled features [N, 512] of the plain slices of every split, both float32.

    Frozen networks take them from the feature cache; others run their convolutions.
    """
    data.features = {}  # what training left there may come from convolutions that have changed since
    if cfg.features.cache and model.cfg.always_frozen:
        features.attach(data, model.net, cfg, SPLITS, views=1)
    parts = [features.outputs(model.net, data.dataset(split), cfg.data.batch_size) for split in SPLITS]
    logits, pooled = zip(*parts, strict=True)
    return dict(zip(SPLITS, logits, strict=True)), dict(zip(SPLITS, pooled, strict=True))


def normal_features(model: Classifier, data: SliceModule, cfg: Config) -> torch.Tensor:
    """The last convolution's output for NORMALS normal training slices, float16 [N, 512, h, w].

    Cached like frozen features while the convolutions are the given ones: it takes as long as all else in a warm run.
    """
    net, dataset = model.net, data.dataset("train")
    normal = np.flatnonzero((data.manifest.loc[data.manifest["split"] == "train", "label"] == "normal").to_numpy())
    chosen = np.random.default_rng(cfg.data.split_seed).permutation(normal)[:NORMALS].tolist()

    def conv5(x: torch.Tensor) -> torch.Tensor:
        return net.conv5(x).half()  # half the space

    if not (cfg.features.cache and model.cfg.always_frozen):
        images = dataset.images[dataset.rows[chosen]]
        return torch.cat([conv5(x).cpu() for x in net.batches(images, cfg.features.batch_size)])
    return features.extract(
        conv5,
        lambda positions: dataset.slices([chosen[i] for i in positions], view=0),
        [dataset.contents[i] for i in chosen],
        features.space_folder(cfg, net.digest, 0) / "conv5",
        net.mean.device,
        batch_size=cfg.features.batch_size,
    )
