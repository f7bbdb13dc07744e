"""What a trained network gives for the slices of a data module: logits, pooled features, maps of normal slices.

While the convolutions are the given ones, all of it comes from the cache of frozen features.
"""

import dataclasses

import numpy as np
import torch

from chestct.config.schema import Config
from chestct.data.datamodule import SliceModule
from chestct.models.device import on_accelerator
from chestct.models.features import attach, extract, space_folder
from chestct.models.lightning_module import Classifier
from chestct.models.novelty import channel_means
from chestct.models.vgg16 import VGG16

SPLITS = ("train", "valid", "test")

NORMALS = 128
"""Normal training slices that heat maps are held against, at most."""


@torch.no_grad()
def outputs(model: Classifier, data: SliceModule, cfg: Config) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Logits [N, K] and mean-pooled features [N, 512] of the plain slices of every split, both float32.

    Frozen networks take them from the feature cache; others run their convolutions.
    """
    data.features = {}  # what training left there may come from convolutions that have changed since
    with on_accelerator(model.net, cfg.trainer.accelerator):
        if cfg.features.cache and model.cfg.always_frozen:
            attach(data, model.net, dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, views=0)), SPLITS)
        parts = [_outputs(model, data, split) for split in SPLITS]
    logits, pooled = zip(*parts, strict=True)
    return dict(zip(SPLITS, logits, strict=True)), dict(zip(SPLITS, pooled, strict=True))


def _outputs(model: Classifier, data: SliceModule, split: str) -> tuple[np.ndarray, torch.Tensor]:
    net, dataset = model.net, data.dataset(split)
    if dataset.features:
        features = dataset.features[0]
        return net.head(features.to(net.mean.device)).cpu().numpy(), channel_means(features, net.channels)
    every = (net.maps(x) for x in net.batches(dataset.images[dataset.rows], data.cfg.data.batch_size))
    parts = [(net.head(maps).float().cpu(), channel_means(maps, net.channels).float().cpu()) for maps in every]
    logits, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return logits.numpy(), pooled


def normal_features(model: Classifier, data: SliceModule, cfg: Config) -> torch.Tensor:
    """The last convolution's output for NORMALS normal training slices, float16 [N, 512, h, w].

    Cached like frozen features while the convolutions are the given ones: it takes as long as all else in a warm run.
    """
    dataset = data.dataset("train")
    normal = np.flatnonzero((data.manifest.loc[data.manifest["split"] == "train", "label"] == "normal").to_numpy())
    chosen = np.random.default_rng(cfg.data.split_seed).permutation(normal)[:NORMALS].tolist()
    if not (cfg.features.cache and model.cfg.always_frozen):
        images = dataset.images[dataset.rows[chosen]]
        return torch.cat([conv5(model.net, x).cpu() for x in model.net.batches(images, cfg.features.batch_size)])
    return extract(
        model.net,
        lambda positions: dataset.slices([chosen[i] for i in positions], view=0),
        [dataset.contents[i] for i in chosen],
        space_folder(cfg, model.net.digest, 0) / "conv5",
        batch_size=cfg.features.batch_size,
        label="Features, normal slices",
        layer=conv5,
    )


def conv5(net: VGG16, x: torch.Tensor) -> torch.Tensor:
    """What class activation maps are made from, at half the space: float16 [B, 512, h, w]."""
    return net.conv5(x).half()
