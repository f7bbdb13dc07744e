"""What makes an ingest of a dozen slices quick where near-copies are not what is tested."""

import pytest

from chestct.data import duplicates


@pytest.fixture
def quick_ingest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors are learned from few changed copies, however few the slices are: a quarter of the time."""
    monkeypatch.setattr(duplicates, "CHANGES", 64)
