"""How unlike the training slices a slice is: what the demo refuses by, and evaluation reports with every score.

A Gaussian with a few directions of its own and one variance for all others (probabilistic PCA: Tipping and Bishop
1999) is fitted to the mean-pooled features of VGG16, after each slice's features are turned into shares of their sum
and their roots taken, so that distances between slices are Hellinger distances. Brightness and contrast scale all
features alike and fall out; without this step a third of all photographs, drawings and noise passed (measured on the
public chest CT set against Euclidean, cosine and k-nearest distances). 1 is the threshold, whatever the data.
"""

from dataclasses import dataclass, replace
from statistics import NormalDist

import torch

from chestct.errors import DataError

DIRECTIONS = 64
"""Directions with a variance of their own; as 16-bit floats they fill 64 KiB of a bundle."""

SLICES_PER_DIRECTION = 4
"""Below this many training slices for each, a direction says more about the sample than about chests."""

FEWEST = 4
"""Slices without which neither a spread nor a threshold can be fitted."""

QUANTILE = 0.99
"""Share of validation slices that are to lie within the threshold."""

FOREIGN = 1.5
"""Distance beyond which a slice is hardly a chest CT at all. Measured with the public set as training set: CT from
other hospitals in another window 0.9 to 1.4, phantoms 1.0 to 1.3; photographs, drawings, text, noise, other
modalities 1.6 to 3.2; head CT and MR of the abdomen from 1.3; none of 158 test slices beyond 1.11."""


@dataclass(frozen=True)
class NoveltyModel:
    """What is kept of the training slices' features; D features, k directions.

    mean: float32 [D] of the roots of shares; directions: float16 [k, D], orthonormal; variances: float32 [k] along
    them; rest: float32 [], the variance in every other direction; threshold: float32 [], a distance before scaling.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    variances: torch.Tensor
    rest: torch.Tensor
    threshold: torch.Tensor

    def distance(self, features: torch.Tensor) -> torch.Tensor:
        """Distances float32 [N] of slices with pooled features float [N, D] >= 0; above 1 is unlike the training set.

        The Mahalanobis distance to the training slices, divided by the threshold.
        """
        offset = _roots_of_shares(features) - self.mean.double()
        directions = self.directions.double()
        along = offset @ directions.T  # (N, k)
        beyond = offset - along @ directions
        squared = (along**2 / self.variances.double()).sum(1) + (beyond**2).sum(1) / self.rest.double()
        return squared.sqrt().float() / self.threshold

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "NoveltyModel":
        """The inverse of dataclasses.asdict; raises TypeError or ValueError for tensors that do not fit each other."""
        model = cls(**tensors)
        k, d = model.directions.shape
        for name, shape in {"mean": [d], "variances": [k], "rest": [], "threshold": []}.items():
            if list(tensors[name].shape) != shape:
                raise ValueError(f"novelty.{name} is shaped {list(tensors[name].shape)}, not {shape}")
        return model


def fit_novelty(features_train: torch.Tensor, features_valid: torch.Tensor) -> NoveltyModel:
    """The novelty model of a training set, with the threshold that validation slices set.

    features_*: float [N, D] >= 0, pooled by the mean over places, of plain views. The threshold is the QUANTILE of
    the validation distances, or of the log-normal distribution fitted to them where that is higher: the quantile of
    a few slices is at most their largest, which refused half as many good slices again (60 training slices).
    Raises DataError with fewer than 4 slices in either.
    """
    for name, features in (("training", features_train), ("validation", features_valid)):
        if len(features) < FEWEST:
            raise DataError(
                f"{len(features)} {name} slices are too few to tell unlike slices by, which reports and bundles do: it "
                f"takes {FEWEST}. Train on more slices, or divide them otherwise (data.valid_fraction). What "
                "validation reached is in the run's history.csv; python train.py evaluation.report=false ends with it."
            )
    x = _roots_of_shares(features_train)
    mean = x.mean(0)
    _, spread, directions = torch.linalg.svd(x - mean, full_matrices=False)
    k = min(DIRECTIONS, len(x) // SLICES_PER_DIRECTION, x.shape[1] - 1)
    variances = spread**2 / (len(x) - 1)
    # The floor keeps slices that are all alike from dividing by zero.
    rest = (variances[k:].sum() / (x.shape[1] - k)).clamp(min=1e-12)
    along = variances[:k].clamp(min=rest.item()).float()
    model = NoveltyModel(mean.float(), directions[:k].half(), along, rest.float(), torch.tensor(1.0))
    distances = model.distance(features_valid).double()
    logs = distances.clamp(min=1e-12).log()
    fitted = logs.mean() + NormalDist().inv_cdf(QUANTILE) * logs.std()
    return replace(model, threshold=torch.maximum(distances.quantile(QUANTILE), fitted.exp()).float())


def _roots_of_shares(features: torch.Tensor) -> torch.Tensor:
    # float64: differences of directions that hardly vary are small next to the features themselves.
    features = features.double().clamp(min=0)
    return (features / features.sum(1, keepdim=True).clamp(min=1e-12)).sqrt()
