"""A loader that fetches some batches before they are due."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor

__all__ = ["LookAhead"]


class LookAhead:
    """The batches of ``loader``, unchanged and in order, fetched ``ahead`` at a time.

    Whoever trains on them can so work on many batches at once: ``upcoming`` holds the inputs of
    those that were fetched and not yet given out, the one being trained on first.

    Args:
        loader: Any loader of lists of tensors, the input first.
        ahead: Batches to fetch at a time, >= 1.
        device: Where to put them.
    """

    def __init__(self, loader: Any, ahead: int, device: Any) -> None:
        self.loader, self.ahead, self.device = loader, ahead, device
        self.upcoming: deque[Tensor] = deque()
        self._version = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Tensor]]:
        batches = iter(self.loader)
        while fetched := list(islice(batches, self.ahead)):
            moved = [[part.to(self.device) for part in batch] for batch in fetched]
            self.upcoming = deque(batch[0] for batch in moved)
            for batch in moved:
                self._version = batch[0]._version
                yield batch
                self.upcoming.popleft()

    def gave(self, x: Tensor) -> bool:
        """Whether ``x`` is the input that was given out last, as it was given out."""
        return bool(self.upcoming) and x is self.upcoming[0] and x._version == self._version
