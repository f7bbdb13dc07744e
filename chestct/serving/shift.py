"""Whether what the service sees still looks like what the model was trained on: each number, and the mix of decisions.

A drift has to be both sure and large: small windows differ by chance, and in large ones any difference is significant.
Refused slices count in the share of refusals alone; what the model declined to judge says nothing about its judgement.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from chestct.errors import ChestCTError
from chestct.imaging.statistics import STATISTICS
from chestct.models.bundle import Bundle
from chestct.models.novelty import FOREIGN
from chestct.models.operating_point import CANCER, NORMAL, REFUSED, UNCERTAIN
from chestct.stats.drift import MEASURED, PSI_LARGE, PSI_MODERATE, difference, holm

FEWEST = 50
"""Slices below which nothing is judged: with 50, chance alone makes a PSI of about 0.2."""

SIGNIFICANT = 0.001
"""Stricter than custom: slices come in series and copies, so there is less in them than their number says. At 0.05 the
public set's own test slices raise an alarm (110 that the packaged bundle has not seen: p from 0.015)."""

SHARE_LARGE = 0.1
"""Change of a share that counts as large."""

TITLES = {
    "width": "Width in pixels",
    "height": "Height in pixels",
    "mean": "Mean grey level",
    "std": "Contrast (standard deviation)",
    "border_mean": "Mean grey level of the border",
    "border_std": "Contrast of the border",
    "score": "Calibrated score",
    "novelty": "Distance to the training data",
    "flagged": "Scores at or above the threshold",
    "refused": "Refused slices",
}


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class Shift:
    """One number, or one share, then and now.

    p: after Holm's correction over all that was compared, None where nothing was; effect: PSI of a number, change of a
    share; verdict: same, small or drift, or unknown with too few slices.
    """

    name: str
    verdict: str
    sentence: str
    before: float  # median of a number, or share in [0, 1]
    now: float
    effect: float
    p: float | None
    distance: float | None = None  # Kolmogorov-Smirnov, in [0, 1]; None for shares
    quantiles: np.ndarray | None = None  # of the reference, and the values now; to be drawn
    values: np.ndarray | None = None

    @property
    def title(self) -> str:
        return TITLES[self.name]


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class Drift:
    """A window of records against a bundle. mix: decision -> (count, share expected, or None where nobody knows)."""

    bundle: str
    slices: int
    others: int  # records of other bundles in the window; left out, as are those of
    known: int  # slices that the model was trained on: they lie nearer to the training data than any new slice
    first: int  # Unix seconds
    last: int
    shifts: list[Shift]
    mix: dict[str, tuple[int, float | None]]

    @property
    def verdict(self) -> str:
        """`few`, `drift` or `same`."""
        if self.slices < FEWEST:
            return "few"
        return "drift" if any(shift.verdict == "drift" for shift in self.shifts) else "same"

    @property
    def sentence(self) -> str:
        """The verdict, in a sentence."""
        if self.slices < FEWEST:
            return f"{self.slices} slices are too few to judge: {FEWEST} are needed."
        drifted = [shift.title.lower() for shift in self.shifts if shift.verdict == "drift"]
        if drifted:
            return f"{len(drifted)} of {len(self.shifts)} things compared have drifted: {'; '.join(drifted)}."
        return f"No drift in {self.slices:,} slices: of {len(self.shifts)} things compared none has changed by much."


def compare(bundle: Bundle, records: dict[str, np.ndarray]) -> Drift:
    """The records of `bundle` (see chestct.serving.monitor.read_records) against what it was trained on.

    Raises ChestCTError for a bundle that keeps no statistics.
    """
    facts = bundle.facts
    if missing := next((name for name in MEASURED if name not in facts.get("statistics", {})), ""):
        raise ChestCTError(f"The bundle {bundle.id} has no statistics of {missing} to compare with. Export it again.")
    own = records["bundle"] == bundle.id
    fresh = own & ~records["known"]
    mine = {name: column[fresh] for name, column in records.items()}
    answered = {name: column[mine["decision"] != REFUSED] for name, column in mine.items()}
    shifts = [_number(name, facts, answered[name]) for name in MEASURED]
    counts = facts["operating_point"]["validation"]
    slices = counts["cancers"] + counts["normals"]
    flagged = answered["score"] >= bundle.point.threshold
    foreign = _share_above(np.array(facts["statistics"]["novelty"]), FOREIGN)
    shifts += [
        _share("flagged", counts["found"] + counts["flagged"], slices, int(flagged.sum()), len(flagged)),
        _share("refused", round(foreign * slices), slices, int((mine["decision"] == REFUSED).sum()), int(fresh.sum())),
    ]
    times = mine["time"]
    return Drift(
        bundle=bundle.id,
        slices=len(times),
        others=int((~own).sum()),
        known=int((own & ~fresh).sum()),
        first=int(times.min()) if len(times) else 0,
        last=int(times.max()) if len(times) else 0,
        shifts=_corrected(shifts),
        mix=_mix(bundle, mine["decision"]),
    )


def _number(name: str, facts: dict[str, Any], values: np.ndarray) -> Shift:
    quantiles = np.array(facts["statistics"][name])
    if len(values) < FEWEST:
        sentence = f"Not judged: {len(values)} answered slices, {FEWEST} are needed."
        return Shift(name, "unknown", sentence, float(np.median(quantiles)), float("nan"), float("nan"), None)
    new = difference(name, facts, values)
    return Shift(name, "", "", new.before, new.now, new.psi, new.p, new.distance, quantiles, values)


def _share(name: str, before: int, slices: int, now: int, seen: int) -> Shift:
    """A share of validation against one of the window, by Fisher's exact test."""
    from scipy.stats import fisher_exact

    share = before / slices
    if seen < FEWEST:
        sentence = f"Not judged: {seen} slices, {FEWEST} are needed."
        return Shift(name, "unknown", sentence, share, float("nan"), float("nan"), None)
    p = float(fisher_exact([[before, slices - before], [now, seen - now]]).pvalue)
    return Shift(name, "", "", share, now / seen, now / seen - share, p)


def _corrected(shifts: list[Shift]) -> list[Shift]:
    """With Holm's step-down correction (Holm 1979) over what was compared, verdicts and sentences."""
    raw = {shift.name: shift.p for shift in shifts if shift.p is not None}
    corrected = dict(zip(raw, holm(np.array(list(raw.values()))).tolist(), strict=True))
    return [_judged(shift, corrected[shift.name]) if shift.name in corrected else shift for shift in shifts]


def _judged(shift: Shift, p: float) -> Shift:
    small, large = (PSI_MODERATE, PSI_LARGE) if shift.distance is not None else (0.0, SHARE_LARGE)
    sure, effect = p < SIGNIFICANT, abs(shift.effect)
    verdict = "drift" if sure and effect >= large else "small" if sure and effect >= small else "same"
    if shift.distance is None:
        what = f"{shift.now:.1%} of slices, {shift.before:.1%} in validation"
    else:
        source = "training" if shift.name in STATISTICS else "validation"
        what = f"median {shift.now:.4g}, in {source} {shift.before:.4g}; PSI {shift.effect:.2f}"
    words = {"drift": "Has drifted", "small": "Has changed a little", "same": "No certain change"}
    if verdict == "same" and sure:
        words["same"] = "A change for sure, but too small to matter"
    return replace(shift, p=p, verdict=verdict, sentence=f"{words[verdict]}: {what}, p {_p(p)}.")


def _p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}"


def _mix(bundle: Bundle, decisions: np.ndarray) -> dict[str, tuple[int, float | None]]:
    expected: dict[str, float | None] = dict.fromkeys((CANCER, NORMAL, UNCERTAIN, REFUSED))
    if bundle.task == "binary":  # with more classes the score alone does not make the decision
        score = np.array(bundle.facts["statistics"]["score"])
        decided = bundle.point.decide(np.stack([1 - score, score], 1), np.zeros(len(score)))
        expected |= {name: float((decided == name).mean()) for name in expected}
    return {name: (int((decisions == name).sum()), share) for name, share in expected.items()}


def _share_above(quantiles: np.ndarray, value: float) -> float:
    """Share of a distribution that lies above a value, from its quantiles."""
    return float(1 - np.interp(value, quantiles, np.linspace(0, 1, len(quantiles))))
