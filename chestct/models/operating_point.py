"""What turns a logit into a decision: calibration, threshold and conformal sets, all fitted on validation slices.

They belong together, because a threshold means something only on the scores that it was chosen on. The bundle keeps
them as JSON, and evaluation and serving decide with the same lines.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chestct.config.schema import EvaluationConfig
from chestct.models.novelty import FOREIGN
from chestct.stats.calibration import Calibration, choose_threshold, fit_calibration, fit_conformal

CANCER, NORMAL, UNCERTAIN, REFUSED = "cancer", "normal", "uncertain", "refused"


@dataclass(frozen=True)
class Outputs:
    """What a bundle says of N slices."""

    logits: np.ndarray  # float32 [N, 1] or [N, classes]
    probabilities: np.ndarray  # float64 [N, classes], calibrated
    decision: np.ndarray  # str [N]: cancer, normal, uncertain or refused
    novelty: np.ndarray  # float32 [N]; above 1 a slice is too far from the training data
    heat: np.ndarray | None  # float32 [N, h, w] in [0, 1], what speaks for cancer more than in normal slices

    @property
    def score(self) -> np.ndarray:
        """P(cancer), float64 [N]."""
        return 1 - self.probabilities[:, 0]


@dataclass(frozen=True)
class OperatingPoint:
    """Calibrated scores, the threshold on P(cancer), and the conformal quantile of each class.

    validation: what the threshold does to the validation slices: {"cancers", "found", "normals", "flagged"}, counts.
    """

    calibration: Calibration
    threshold: float
    policy: str
    coverage: float
    quantiles: tuple[float, ...]
    validation: dict[str, int] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, logits: np.ndarray, targets: np.ndarray, cfg: EvaluationConfig, sources: Sequence[str] = ()
    ) -> "OperatingPoint":
        """From validation logits float [N, 1] or [N, K] and targets int [N] (0 is normal in both tasks).

        sources: of each slice; the threshold then goes by the means over sources of sensitivity and specificity.
        """
        calibration = fit_calibration(logits, targets)
        probabilities = _by_class(calibration.scores(logits))
        cancer, truth = 1 - probabilities[:, 0], targets > 0
        weights = source_weights(sources, truth) if len(sources) else None
        threshold = choose_threshold(cancer, truth.astype(int), cfg.threshold, cfg.cost_ratio, weights)
        flagged = cancer >= threshold
        counts = {"cancers": truth, "found": flagged & truth, "normals": ~truth, "flagged": flagged & ~truth}
        return cls(
            calibration,
            threshold,
            cfg.threshold,
            cfg.coverage,
            tuple(fit_conformal(probabilities, targets, cfg.coverage)),
            {name: int(slices.sum()) for name, slices in counts.items()},
        )

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated P(class), float64 [N, classes], for logits [N, 1] (normal, cancer) or [N, K]."""
        return _by_class(self.calibration.scores(logits))

    def decide(self, probabilities: np.ndarray, novelty: np.ndarray) -> np.ndarray:
        """`cancer`, `normal`, `uncertain` or `refused` for each row of `probabilities`.

        Uncertain where the conformal set does not hold the side that the threshold chose, or holds the other one too,
        and where a slice is further from the training data than nearly all of validation (novelty above 1); refused
        where it is hardly a chest CT slice at all (above FOREIGN).
        """
        cancer = 1 - probabilities[:, 0] >= self.threshold
        sets = self.sets(probabilities)
        holds_normal, holds_cancer = sets[:, 0], sets[:, 1:].any(1)
        sure = np.where(cancer, holds_cancer & ~holds_normal, holds_normal & ~holds_cancer)
        decision = np.where(sure & (novelty <= 1), np.where(cancer, CANCER, NORMAL), UNCERTAIN)
        return np.where(novelty > FOREIGN, REFUSED, decision)

    def sets(self, probabilities: np.ndarray) -> np.ndarray:
        """Conformal sets, bool [N, classes]: which cannot be excluded at the stated coverage, possibly none."""
        return 1 - probabilities <= np.asarray(self.quantiles)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OperatingPoint":
        """The inverse of dataclasses.asdict."""
        rest = {**values, "calibration": Calibration(**values["calibration"]), "quantiles": tuple(values["quantiles"])}
        return cls(**rest)


def source_weights(sources: Sequence[str], truth: np.ndarray) -> np.ndarray:
    """Weights float [N] under which each source counts alike within cancer and within normal slices.

    sources: [N]; truth: bool [N], cancer.
    """
    pairs = list(zip(sources, truth.tolist(), strict=True))
    counts = Counter(pairs)
    return 1 / np.array([counts[pair] for pair in pairs])


def _by_class(scores: np.ndarray) -> np.ndarray:
    """[N, 1] P(cancer) -> [N, 2] normal, cancer; [N, K] stays."""
    return np.hstack([1 - scores, scores]) if scores.shape[1] == 1 else scores
