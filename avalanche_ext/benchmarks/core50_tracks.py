"""What the real and the toy CORe50 share: sessions, objects, tracks and the challenge's rules.

A *clip* is one object in one session: ``(session, object)``, both counted from 1 as in CORe50's
file names. A stream is planned as a list of experiences, each a list of clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

__all__ = [
    "CHALLENGE_MEAN",
    "CHALLENGE_STD",
    "NC_ORDER",
    "SESSIONS",
    "TEST_SESSIONS",
    "TRACKS",
    "TRAIN_SESSIONS",
    "Clip",
    "every_twentieth",
    "held_out_sessions",
    "name_classes",
    "nc_blocks",
    "plan_stream",
]

Clip = tuple[int, int]
Item = TypeVar("Item")

TRACKS = ("ni", "nc", "nic")
SESSIONS = tuple(range(1, 12))
TEST_SESSIONS = (3, 7, 10)
TRAIN_SESSIONS = tuple(s for s in SESSIONS if s not in TEST_SESSIONS)
# Objects in the order in which run 0 of CORe50's New Classes brings them: 10, then eight times 5.
NC_ORDER = (
    1, 6, 11, 16, 21, 26, 31, 36, 41, 46, 30, 35, 40, 45, 50, 3, 8, 13, 18, 23, 27, 32, 37, 42, 47,
    5, 10, 15, 20, 25, 2, 7, 12, 17, 22, 4, 9, 14, 19, 24, 28, 33, 38, 43, 48, 29, 34, 39, 44, 49,
)  # fmt: skip
# The challenge normalises with ImageNet's statistics.
CHALLENGE_MEAN = (0.485, 0.456, 0.406)
CHALLENGE_STD = (0.229, 0.224, 0.225)

_FIRST, _BLOCK = 10, 5


def nc_blocks(order: Sequence[Item]) -> list[list[Item]]:
    """Cut an order of objects (or labels) into New Classes' experiences: 10, then 5 each."""
    starts = [0, *range(_FIRST, len(order), _BLOCK)]
    return [list(order[a:b]) for a, b in zip(starts, [*starts[1:], len(order)], strict=True)]


def plan_stream(
    track: str,
    order: Sequence[int],
    sessions: Sequence[int],
    generator: torch.Generator,
) -> list[list[Clip]]:
    """The clips of every experience of a track; each clip comes exactly once.

    Args:
        track: ``"ni"``: one experience per session, with all objects. ``"nc"``: ten objects, then
            five at a time, with all sessions. ``"nic"``: ten objects in one session, then one
            clip per experience: ``len(order) * len(sessions) - 9`` experiences.
        order: The objects in order of arrival (``"nc"``, ``"nic"``).
        sessions: The training sessions in order of arrival (``"ni"``); the first one opens
            ``"nic"``.
        generator: Draws the order of ``"nic"``.
    """
    if track == "ni":
        return [[(s, o) for o in sorted(order)] for s in sessions]
    if track == "nc":
        return [[(s, o) for s in sorted(sessions) for o in block] for block in nc_blocks(order)]
    return _nic(order, sessions, generator)


def _nic(
    order: Sequence[int], sessions: Sequence[int], generator: torch.Generator
) -> list[list[Clip]]:
    """Ten objects first; each of the others appears at an even pace over half of the stream.

    A clip gets a moment in [0, 1): the first one of a new object at its turn, its other ones at
    random after it. So a class may be new late in the stream, and comes back later, as in NICv2.
    """
    known, new = order[:_FIRST], order[_FIRST:]
    moments: list[tuple[float, Clip]] = []
    for position, obj in enumerate(order):
        turn = 0.5 * max(0, position + 1 - len(known)) / (len(new) + 1)
        if position < len(known):
            others = list(sessions[1:])
        else:
            drawn = torch.randperm(len(sessions), generator=generator).tolist()
            moments.append((turn, (sessions[drawn[0]], obj)))
            others = [sessions[i] for i in drawn[1:]]
        later = turn + (1 - turn) * torch.rand(len(others), generator=generator)
        moments += [(float(m), (s, obj)) for m, s in zip(later, others, strict=True)]
    return [[(sessions[0], o) for o in known], *([clip] for _, clip in sorted(moments))]


def held_out_sessions(sessions: Sequence[int], kept: Sequence[int] = ()) -> tuple[int, ...]:
    """Training sessions to validate on: the last quarter by number, at least one.

    Frames of one clip are near copies of each other, so frames held out at random would measure
    memory, not recognition in a new room. Whole sessions do.

    Args:
        sessions: The training sessions.
        kept: Sessions that must stay in training (the one that opens ``"nic"``).

    Raises:
        ValueError: If no session would be left to train on.
    """
    free = sorted(set(sessions) - set(kept))
    n = max(1, round(len(set(sessions)) / 4))
    if len(set(sessions)) <= n or len(free) < n:
        raise ValueError(
            f"validation=True holds out {n} of the training sessions {sorted(set(sessions))} "
            f"and cannot use {sorted(kept)}; a stream of two or more training sessions is needed."
        )
    return tuple(free[-n:])


def every_twentieth(items: Any) -> Any:
    """The challenge's validation choice: items 0, 20, 40, ... of a list or a tensor."""
    return items[::20]


def name_classes(benchmark: Any, classes: Sequence[Sequence[int]], n_classes: int) -> Any:
    """Add what Avalanche's class-incremental benchmarks carry; ``classes`` by experience."""
    benchmark.n_classes = n_classes
    if classes:
        benchmark.n_classes_per_exp = [len(group) for group in classes]
        benchmark.classes_order = [c for group in classes for c in group]
    return benchmark
