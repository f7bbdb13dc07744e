"""The slices that a reader should look at: surest errors, abstentions, refusals, and a few that were right.

Each is shown twice, as the network sees it and with its heat over it. One slice of a group is shown;
its neighbours would show the same again.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from chestct.config.schema import classes_of
from chestct.evaluation.evaluate import Evaluation, calibrated
from chestct.models.bundle import Bundle
from chestct.models.saliency import Placement, explained_output, heat, normalised_cam, overlay
from chestct.reporting.environment import jpeg
from chestct.stats.metrics import sample_of

SIDE = 192
"""Side of a picture in pixels."""

KINDS = ("errors", "uncertain", "novel", "right")


def gallery(evaluation: Evaluation) -> dict[str, list[dict[Any, Any]]]:
    """Up to cfg.evaluation.gallery pictures of each of KINDS from the test slices; nothing without the network.

    errors: the surest first. uncertain: nearest to the threshold first. novel: the most unlike first. right: drawn at
    random, so that nobody picked them. A picture holds the columns of `described`, `plain` and `heat` (JPEGs as data
    URIs) and `silent`: whether nothing in the slice speaks for what it was called.
    """
    if evaluation.images is None or not evaluation.cfg.evaluation.gallery:
        return {}
    test = described(evaluation)
    wrong, uncertain, novel = test["called"] != test["truth"], test["decision"] == "uncertain", test["novelty"] > 1
    kinds = {
        "errors": test[wrong].sort_values("sureness", ascending=False),
        "uncertain": test[uncertain].sort_values("sureness"),
        "novel": test[novel].sort_values("novelty", ascending=False),
        "right": test[~wrong & ~uncertain & ~novel].sample(frac=1, random_state=evaluation.cfg.data.split_seed),
    }
    most = evaluation.cfg.evaluation.gallery
    return {kind: list(_pictures(part.drop_duplicates("group").head(most), evaluation)) for kind, part in kinds.items()}


def described(evaluation: Evaluation) -> pd.DataFrame:
    """The test slices with `score` (P(cancer)), `truth` and `called` (class names) and `sureness` (float, >= 0)."""
    task, threshold = evaluation.cfg.task, evaluation.point.threshold
    test, names = evaluation.test.reset_index(drop=True), np.array(classes_of(task))
    scores = calibrated(test, task)
    called = names[sample_of(test, task, scores, threshold).decision]
    score = 1 - test["probability_normal"].to_numpy()
    sureness = scores.max(1)
    if task == "binary":
        odds = [np.log(p / (1 - p)) for p in (score.clip(1e-9, 1 - 1e-9), np.clip(threshold, 1e-9, 1 - 1e-9))]
        sureness = np.abs(odds[0] - odds[1])
    return test.assign(score=score, truth=names[test["target"]], called=called, sureness=sureness)


def _pictures(part: pd.DataFrame, evaluation: Evaluation) -> Iterator[dict[Any, Any]]:
    assert evaluation.images is not None
    assert evaluation.manifest is not None
    bundle, places = evaluation.bundle, evaluation.manifest.set_index(["source", "path"])["row"]
    for slice_ in part.to_dict("records"):
        gray = np.array(evaluation.images[places[slice_["source"], slice_["path"]]])
        with torch.no_grad():
            conv5 = bundle.net.conv5(torch.from_numpy(gray)[None, None].float() / 255)
            # What speaks for what the slice was called: an error is understood by what led to it.
            output, against = _explained(slice_["called"], bundle, conv5)
            shown = heat(normalised_cam(bundle.net, conv5, output, bundle.baseline, against)[1])[0]
        square = Placement(len(gray), (0, 0, len(gray), len(gray)), (0, 0, len(gray), len(gray)))
        pictures = {"plain": jpeg(gray, SIDE), "heat": jpeg(overlay(gray, shown, square), SIDE)}
        yield slice_ | pictures | {"silent": not bool(shown.any())}


def _explained(called: str, bundle: Bundle, conv5: torch.Tensor) -> tuple[np.ndarray, bool]:
    """The output to explain, int [1], and whether what speaks against it is what the slice was called for.

    A bundle of subtypes may have been reduced to cancer and normal; then it is the likeliest kind of cancer.
    """
    if bundle.baseline.shape[1] == 1:
        return np.zeros(1, int), called == "normal"
    names = classes_of("subtype")
    if called in names:
        return np.array([names.index(called)]), False
    return explained_output(bundle.net.head(bundle.net.pool(conv5)).numpy()), False
