"""Intervals over groups: a group stands in for a patient, and two slices of one patient are not two observations."""

from collections.abc import Iterator

import numpy as np

MIN_GROUPS = 10  # with fewer groups of a class, resampling alone gives intervals too narrow to be believed


def draws(group: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each slice is drawn, float [r, N] in blocks of bounded memory: groups [N] = 0..G-1, with replacement.

    The whole group comes or stays away (Field & Welsh 2007).
    """
    groups, generator = int(group.max()) + 1, np.random.default_rng(seed)
    block = max(1, 1_000_000 // len(group))
    for at in range(0, resamples, block):
        rows = min(block, resamples - at)
        drawn = generator.integers(0, groups, (rows, groups)) + groups * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups)
        yield counts[:, group].astype(float)


def percentiles(drawn: np.ndarray, value: float) -> tuple[float | None, float | None, str]:
    """95 % interval of resamples [R] with the value itself in it; a reason if over 5 % of them (NaN) are undefined."""
    undefined = np.isnan(drawn).mean()
    if undefined > 0.05:
        return None, None, f"no interval: undefined in {undefined:.0%} of the resamples, for want of groups"
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return min(float(low), value), max(float(high), value), ""


def difference_interval(drawn: np.ndarray, difference: float, groups: int) -> tuple[float | None, float | None, str]:
    """95 % interval of a paired difference from its resamples [R], or a reason; groups: of the class with fewest."""
    if groups < MIN_GROUPS:
        return None, None, f"no interval: {groups} groups of a class, needs {MIN_GROUPS}"
    low, high, reason = percentiles(drawn, difference)
    if low is not None and high is not None and high - low < 1e-12:
        return None, None, "no interval: the same difference in every resample"
    return low, high, reason


def fewest_groups(target: np.ndarray, group: np.ndarray) -> int:
    """Groups of the class that has fewest; target and group: int [N], of classes that occur."""
    return min(len(np.unique(group[target == k])) for k in np.unique(target))


def effective_size(hit: np.ndarray, group: np.ndarray) -> float:
    """How many independent slices a share of slices is worth: hit bool [n], group int [n]; between 1 and n.

    n over the design effect (variance of the share between groups, linearised, to that of independent slices), times
    (t[n-1] / t[G-1])^2 for a variance from few groups (Korn & Graubard 1998; Franco et al. 2019). A share of 0 or 1 has
    no variance to look at: then slices of a group count as copies, n^2 / sum(m^2) for group sizes m (Kish 1965).
    """
    from scipy.special import stdtrit

    index = np.unique(group, return_inverse=True)[1]
    sizes, hits = np.bincount(index), np.bincount(index, hit)
    n, groups, share = len(hit), len(sizes), hit.mean()
    if groups == 1:
        return 1.0
    if share in (0, 1):
        return float(n**2 / (sizes**2).sum())
    variance = groups / (groups - 1) * ((hits - share * sizes) ** 2).sum() / n**2
    size = min(n, share * (1 - share) / max(variance, 1e-12) * n / (n - 1))  # groups may agree by chance
    few = (stdtrit(n - 1, 0.975) / stdtrit(groups - 1, 0.975)) ** 2
    return float(max(1, size * few))
