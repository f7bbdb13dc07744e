"""The numbers of /metrics: counts and distributions for Prometheus; nothing in them names a person or a file."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

if TYPE_CHECKING:
    from chestct.serving.predictor import Prediction

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60)
TENTHS = tuple(i / 10 for i in range(1, 11))


class Metrics:
    """The service's counters. Safe to use from any thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "chestct_requests", "Requests by route and HTTP status", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "chestct_request_seconds", "Time to answer a request", ["route"], buckets=SECONDS, registry=registry
        )
        self.slices = Counter("chestct_slices", "Slices answered, by decision", ["decision"], registry=registry)
        self.failures = Counter("chestct_failures", "Files without an answer, by reason", ["reason"], registry=registry)
        self.score = Histogram(
            "chestct_score", "Calibrated P(cancer) of slices that were not refused", buckets=TENTHS, registry=registry
        )
        self.novelty = Histogram(
            "chestct_novelty",
            "Distance to the training slices",
            buckets=(0.25, 0.5, 0.75, 1, 1.5, 2, 4),
            registry=registry,
        )
        self.bundle = Gauge("chestct_bundle_info", "The bundle in use", ["bundle"], registry=registry)
        for name in ("cancer", "normal", "uncertain", "refused"):
            self.slices.labels(name)

    def answered(self, prediction: "Prediction") -> None:
        """Counts one slice."""
        self.slices.labels(prediction.decision).inc()
        self.novelty.observe(prediction.novelty)
        if prediction.decision != "refused":
            self.score.observe(prediction.score)

    def requested(self, route: str, status: int, seconds: float) -> None:
        """Counts one request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def serves(self, bundle: str) -> None:
        """Notes which bundle answers from now on."""
        self.bundle.clear()
        self.bundle.labels(bundle).set(1)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
