import numpy as np
import pytest
import torch

from chestct.errors import DataError
from chestct.models.novelty import fit_novelty


def population(n, seed, pattern_seed=0, width=512):
    """Features of n slices of one kind: a pattern of channels, varied along ten directions, at any brightness."""
    pattern = np.random.default_rng(pattern_seed)
    base, axes = pattern.gamma(2, 1, width), pattern.normal(size=(10, width))
    rng = np.random.default_rng(seed)
    features = base * np.exp(0.1 * rng.normal(size=(n, 10)) @ axes + 0.1 * rng.normal(size=(n, width)))
    return torch.tensor(features * rng.uniform(0.3, 3, (n, 1)), dtype=torch.float32)


def test_slices_of_another_kind_lie_beyond_the_threshold():
    model = fit_novelty(population(300, 1), population(100, 2))
    assert (model.distance(population(500, 3)) > 1).float().mean() < 0.04
    assert (model.distance(population(50, 3, pattern_seed=9)) > 1).all()
    assert (model.distance(torch.rand(50, 512)) > 1).all()
    slices = population(5, 4)
    assert torch.allclose(model.distance(slices), model.distance(slices * 7), rtol=1e-4)  # brightness is not novel


def test_few_validation_slices_do_not_set_the_threshold_at_their_largest_distance():
    train = population(60, 1)
    refused = [(fit_novelty(train, population(8, 10 + i)).distance(population(200, 3)) > 1) for i in range(20)]
    assert torch.stack(refused).float().mean() < 0.08  # a share of 1 / 9 lies beyond the largest of 8


def test_distance_is_mahalanobis_under_the_fitted_gaussian():
    train = population(400, 1, width=40)
    model = fit_novelty(train, population(50, 2, width=40))
    roots = (train / train.sum(1, keepdim=True)).sqrt().double()
    values, vectors = np.linalg.eigh(np.cov(roots.numpy().T))
    k = len(model.variances)
    values[: 40 - k] = values[: 40 - k].mean()
    covariance = vectors @ np.diag(values) @ vectors.T
    offset = roots.numpy() - roots.mean(0).numpy()
    expected = np.sqrt(np.einsum("nd,de,ne->n", offset, np.linalg.inv(covariance), offset))
    assert np.allclose((model.distance(train) * model.threshold).numpy(), expected, rtol=5e-3)


def test_too_few_slices_are_named_and_slices_that_are_all_alike_give_finite_distances():
    ways_out = r"Train on more .* history\.csv; python train\.py evaluation\.report=false"
    for n, valid, named in ((3, 9, "training"), (9, 1, "validation")):
        with pytest.raises(DataError, match=rf"^\d {named} slices are too few .* {ways_out}"):
            fit_novelty(population(n, 1), population(valid, 2))
    same = torch.ones(20, 512)
    distances = fit_novelty(same, same).distance(torch.cat([same, torch.rand(1, 512), torch.zeros(1, 512)]))
    assert distances.isfinite().all()
    assert (distances[-2:] > 1).all()
