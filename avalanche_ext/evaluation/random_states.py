"""Measuring without moving the random numbers that training will draw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["random_states_kept"]


@contextmanager
def random_states_kept(device: torch.device | str) -> Iterator[None]:
    """Whatever is drawn inside, the global random states are the same afterwards."""
    device = torch.device(device)
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - others may draw from it
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
