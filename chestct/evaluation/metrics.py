"""Metrics from the table of predictions, by scikit-learn, each with the count it rests on.

A metric that is undefined (AUROC of one class, say) is None, with the reason beside it, never 0 or NaN.
"""

from typing import Any

import numpy as np
import pandas as pd
from sklearn import metrics as sk

from chestct.data.splits import classes_of


def measure(predictions: pd.DataFrame, task: str) -> dict[str, Any]:
    """Metrics of each split in a table of predictions (chestct.models.predictions).

    The binary task decides at 0.5 on the raw score and takes cancer as the positive class; the subtype task takes the
    largest score and macro means.
    """
    return {str(split): _measure(part, task) for split, part in predictions.groupby("split", sort=False)}


def _measure(part: pd.DataFrame, task: str) -> dict[str, Any]:
    names = classes_of(task)
    y = part["target"].to_numpy()
    counts = {"slices": len(part), "groups": int(part["group"].nunique()), "leaked": int(part["leaked"].sum())}
    per_class = {f"slices/{name}": int((y == i).sum()) for i, name in enumerate(names)}
    values = _binary(part, y) if task == "binary" else _subtype(part, y, names)
    undefined = [names[i] for i in range(len(names)) if not (y == i).any()]
    reason = {"undefined": f"no {' and no '.join(undefined)} slices in this split"} if undefined else {}
    return {**values, **counts, **per_class, **reason}


def _binary(part: pd.DataFrame, y: np.ndarray) -> dict[str, Any]:
    score = part["score_cancer"].to_numpy()
    decision = (score >= 0.5).astype(int)
    both = len(set(y)) == 2
    (tn, fp), (fn, tp) = sk.confusion_matrix(y, decision, labels=[0, 1])
    return {
        "accuracy": float(sk.accuracy_score(y, decision)),
        "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2 if both else None,
        "precision": tp / (tp + fp) if tp + fp else None,
        "recall": tp / (tp + fn) if tp + fn else None,
        "specificity": tn / (tn + fp) if tn + fp else None,
        "f1": float(sk.f1_score(y, decision, zero_division=0.0)) if both else None,
        "auroc": float(sk.roc_auc_score(y, score)) if both else None,
        "average_precision": float(sk.average_precision_score(y, score)) if both else None,
        "log_loss": float(sk.log_loss(y, score, labels=[0, 1])),
    }


def _subtype(part: pd.DataFrame, y: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    scores = part[[f"score_{name}" for name in names]].to_numpy()
    decision = scores.argmax(1)
    labels = list(range(len(names)))
    complete = len(set(y)) == len(names)
    one_hot = np.eye(len(names))[y]
    macro = {"labels": labels, "average": "macro", "zero_division": 0.0}
    return {
        "accuracy": float(sk.accuracy_score(y, decision)),
        "balanced_accuracy": float(sk.recall_score(y, decision, **macro)) if complete else None,
        "precision": float(sk.precision_score(y, decision, **macro)),
        "recall": float(sk.recall_score(y, decision, **macro)) if complete else None,
        "f1": float(sk.f1_score(y, decision, **macro)) if complete else None,
        "auroc": float(sk.roc_auc_score(one_hot, scores, average="macro")) if complete else None,
        "average_precision": float(sk.average_precision_score(one_hot, scores)) if complete else None,
        "log_loss": float(sk.log_loss(y, scores, labels=labels)),
    }
