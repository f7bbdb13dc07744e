"""What was made of each slice of a split, such as its frozen features, and where lesions lie on their grid."""

from collections.abc import Sequence

import torch


class Rows:
    """A tensor for each of N slices, all of one shape.

    Those that are mapped from files are read when they are looked at: the maps of a large collection need no memory.
    """

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: Sequence[int] | slice) -> torch.Tensor:
        """Those at these positions, [B, ...]."""
        return torch.stack([*self.rows[at]] if isinstance(at, slice) else [self.rows[i] for i in at])
