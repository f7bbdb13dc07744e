import numpy as np
import pandas as pd

from chestct.models.predictions import training_facts
from chestct.stats.drift import MEASURED, STATISTICS, reference


def test_a_bundle_refers_to_as_many_training_slices_as_were_measured_without_phantoms_beside_patients() -> None:
    rng, n = np.random.default_rng(0), 90
    manifest = pd.DataFrame(
        {
            "source": np.repeat(["clinic", "phantom"], [60, 30]),
            "label": np.resize(["normal", "cancer"], n),
            "split": np.resize(["train", "train", "valid"], n),
        }
    )
    values = dict.fromkeys((*STATISTICS, "probability_normal", "novelty"), rng.normal(size=n))
    facts = training_facts(manifest.assign(**values), manifest.assign(**values))
    assert facts["data"]["slices"] == {"train": 40, "valid": 20, "test": 0}
    assert {name: len(reference(facts, name)) for name in MEASURED} == {
        name: 40 if name in STATISTICS else 20 for name in MEASURED
    }
