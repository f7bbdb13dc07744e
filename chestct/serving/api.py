"""An answer as plain JSON, the same through Gradio's endpoint and through POST /predict."""

from typing import Any

from chestct.serving.pictures import data_uri, overlay
from chestct.serving.predictor import NOT_MEDICAL, Prediction


def as_json(found: Prediction, picture: bool = False) -> dict[str, Any]:
    """score and decision first; seconds: where the time went; picture: with `overlay`, a PNG as data URI."""
    told: dict[str, Any] = {
        "score": round(found.score, 6),
        "decision": found.decision,
        "reason": found.reason,
        "probabilities": {name: round(share, 6) for name, share in found.probabilities.items()},
        "possible": list(found.possible),
        "novelty": round(found.novelty, 4),
        "known": found.known,
        "bundle": found.bundle,
        "seconds": {name: round(seconds, 4) for name, seconds in found.seconds.items()},
        "notice": NOT_MEDICAL,
    }
    return told | {"overlay": data_uri(overlay(found), "png")} if picture else told
