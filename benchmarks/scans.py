"""How many slices make the score of a scan: AUROC over scans, and over stretches within scans, by the number averaged.

    python -m benchmarks.scans SCORES.csv

SCORES.csv: a row a slice with scan, patient, position, score (any that rises with suspicion) and cancer (0 or 1), of a
model that has seen none of them.
"""

import sys

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

STRETCH, RESAMPLES = 6, 1000


def best(scores: pd.Series, count: int) -> float:
    return float(np.sort(scores.to_numpy())[-count:].mean())


def main() -> None:
    table = pd.read_csv(sys.argv[1]).sort_values(["scan", "position"])
    print("mean of | AUROC over scans, 95 % over patients | over stretches of one scan")
    for count in (1, 2, 3, 5, 8):
        groups = table.groupby("scan")
        scans = groups.agg(patient=("patient", "first"), cancer=("cancer", "max"))
        scans["score"] = groups.score.apply(best, count)
        rng, drawn = np.random.default_rng(0), []
        patients = {name: part[["cancer", "score"]].to_numpy() for name, part in scans.groupby("patient")}
        strata = [[part for part in patients.values() if part[0, 0] == value] for value in (0, 1)]
        for _ in range(RESAMPLES):
            part = np.concatenate([some[i] for some in strata for i in rng.integers(len(some), size=len(some))])
            drawn.append(roc_auc_score(part[:, 0], part[:, 1]))
        within = []
        for _, one in groups:
            parts = [one.iloc[i : i + STRETCH] for i in range(len(one) - STRETCH + 1)]
            cancer = [part.cancer.max() for part in parts]
            if len(set(cancer)) == 2:
                within.append(roc_auc_score(cancer, [best(part.score, count) for part in parts]))
        low, high = np.quantile(drawn, (0.025, 0.975))
        whole = f"{roc_auc_score(scans.cancer, scans.score):.3f} [{low:.3f}, {high:.3f}]"
        inside = f"{np.mean(within):.3f}, {len(within)} scans" if within else "n/a"
        print(f"{count:7} | {whole}, {len(scans)} scans, {len(patients)} patients | {inside}")


if __name__ == "__main__":
    main()
