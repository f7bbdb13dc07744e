"""Whether what the service sees still looks like what the model was trained on: `chestct drift report`.

Each number is compared alone, and the share of refusals; what the model declined to judge counts in that share only.
Small windows differ by chance, and in large ones everything is significant: a drift has to be both sure and large.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import fisher_exact

from chestct.models.bundle import Bundle, load_bundle
from chestct.models.novelty import FOREIGN
from chestct.models.operating_point import REFUSED
from chestct.serving.monitor import read_records
from chestct.stats.drift import MEASURED, PSI_LARGE, check_reference, differences, holm, reference

FEWEST = 50  # slices below which nothing is judged: with 50, chance alone makes a PSI of about 0.2

SIGNIFICANT = 0.001
"""Stricter than custom: slices come in series and copies, so there is less in them than their number says."""

SHARE_LARGE = 0.1  # change of the share of refusals that counts as large


@dataclass(frozen=True)
class Shift:
    """One number, or the share of refusals. p: after Holm's correction over all that was compared."""

    name: str
    change: str  # then and now, and the size of the change
    p: float
    drifted: bool


@dataclass(frozen=True)
class Drift:
    """A window of records against a bundle. others, known: slices that were left out, see `compare`."""

    bundle: str
    period: str
    slices: int
    others: int
    known: int
    shifts: list[Shift]  # of all that there were enough slices for
    decisions: dict[str, int]

    @property
    def verdict(self) -> str:
        """`drift`, `few` (where nothing but refusals could be compared, and they are as they were) or `same`."""
        if any(shift.drifted for shift in self.shifts):
            return "drift"
        return "few" if self.answered < FEWEST else "same"

    @property
    def answered(self) -> int:
        """Slices that were not refused."""
        return self.slices - self.decisions.get(REFUSED, 0)


def compare(bundle: Bundle, records: dict[str, np.ndarray]) -> Drift:
    """The records (see chestct.serving.monitor.read_records) against what `bundle` was trained on.

    Records of other bundles are left out, and so are slices that the model was trained on: they lie nearer to the
    training data than any new slice. Raises BundleError for a bundle that keeps no statistics.
    """
    facts = bundle.facts
    check_reference(facts, bundle.id)
    of_bundle = np.char.startswith(records["bundle"].astype(str), bundle.id)  # whatever its backend
    fresh = of_bundle & ~records["known"]
    refused = fresh & (records["decision"] == REFUSED)
    answered, slices = fresh & ~refused, int(fresh.sum())
    compared: list[tuple[str, str, bool, float]] = []  # name, change, whether that is large, p-value
    if answered.sum() >= FEWEST:
        for d in differences(facts, {name: records[name][answered] for name in MEASURED}):
            change = f"median {d.now:.4g}, was {d.before:.4g}; PSI {d.psi:.2f}"
            compared.append((d.name, change, d.psi >= PSI_LARGE, d.p))
    if slices >= FEWEST:
        foreign, count = reference(facts, "novelty") > FOREIGN, int(refused.sum())
        before, now = float(foreign.mean()), count / slices
        p = float(fisher_exact([[foreign.sum(), (~foreign).sum()], [count, slices - count]]).pvalue)
        change = f"{now:.1%} of slices, was {before:.1%}"
        compared.append(("refused", change, abs(now - before) >= SHARE_LARGE, p))
    adjusted = holm(np.array([p for *_, p in compared])).tolist()
    days = np.sort(records["time"][fresh]).astype("datetime64[s]").astype("datetime64[D]")
    return Drift(
        bundle=bundle.id,
        period=f"{days[0]} to {days[-1]}" if slices else "no slices",
        slices=slices,
        others=int((~of_bundle).sum()),
        known=int((of_bundle & ~fresh).sum()),
        shifts=[
            Shift(name, change, p, large and p < SIGNIFICANT)
            for (name, change, large, _), p in zip(compared, adjusted, strict=True)
        ],
        decisions=dict(Counter(records["decision"][fresh].tolist()).most_common()),
    )


def summary(drift: Drift) -> str:
    """The report for a terminal, one line for each thing compared."""
    names = ", ".join(shift.name for shift in drift.shifts if shift.drifted)
    verdict = {
        "few": f"{drift.answered} answered slices, of {drift.slices}, are too few to judge: {FEWEST} are needed.",
        "drift": f"Of {len(drift.shifts)} things compared these have drifted: {names}.",
        "same": f"No drift in {drift.slices:,} slices ({drift.answered:,} answered): nothing has changed by much.",
    }[drift.verdict]
    lines = [f"Bundle {drift.bundle}, {drift.period}. {verdict}"]
    lines += [f"  {'DRIFT' if s.drifted else 'same':<7}{s.name:<13}{s.change}, p {s.p:.2g}" for s in drift.shifts]
    lines += [f"  {count:,} {decision}" for decision, count in drift.decisions.items()]
    return "\n".join([*lines, f"  Left out: {drift.others:,} of other bundles, {drift.known:,} of the training data."])


def report(db: Path, bundle: str, days: float | None) -> int:
    """Prints the report; returns the exit status: 0 no drift, 1 drift, 3 too few records."""
    drift = compare(load_bundle(bundle), read_records(db, days))
    print(summary(drift))
    return {"same": 0, "drift": 1, "few": 3}[drift.verdict]
