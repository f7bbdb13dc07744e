"""How well frozen features give away the source of a slice: what a model could hide behind in place of lesions."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from chestct.data.datamodule import SliceModule
from chestct.evaluation.evaluate import SPLITS
from chestct.models import features
from chestct.models.vgg16 import VGG16

FOLDS = 5


def source_probe(data: SliceModule, net: VGG16, sources: Sequence[str]) -> list[dict[str, Any]]:
    """For each source, the share of its *normal* slices whose source a linear model tells from mean-pooled features.

    data: set up, with the features that it holds. The model is logistic regression on standardised features, tested by
    cross-validation over groups; the mean of the shares is its balanced accuracy. A source with normal slices of one
    group is left out: tested, there would be none to learn from. Empty where fewer than two sources remain.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pooled = torch.cat([pooled_features(net, data, split) for split in SPLITS]).numpy()
    table = pd.concat([data.manifest[data.manifest["split"] == split] for split in SPLITS])
    normal = (table["label"] == "normal") & table["source"].isin(sources)
    groups = table[normal].groupby("source")["group"].nunique()
    groups = groups[groups > 1]
    if len(groups) < 2:
        return []
    used = (normal & table["source"].isin(groups.index)).to_numpy()
    source, group = (table[column].to_numpy()[used] for column in ("source", "group"))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=data.cfg.data.split_seed)
    told = cross_val_predict(model, pooled[used], source, groups=group, cv=folds)
    return [
        {
            "source": name,
            "normal slices": int((source == name).sum()),
            "groups": int(groups[name]),
            "told right": float((told[source == name] == name).mean()),
        }
        for name in groups.index
    ]


def pooled_features(net: VGG16, data: SliceModule, split: str) -> torch.Tensor:
    """Mean-pooled features [N, C] of a split's plain slices, from what `data` holds, else by the convolutions."""
    return features.outputs(net, data.dataset(split), data.cfg.data.batch_size)[1]
