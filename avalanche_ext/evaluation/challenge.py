"""Scores of the CLVision 2020 challenge.

Seven raw numbers and their weighted sum. The challenge normalised each number over its
participants in a way that its public sources do not state, so here the caller gives values in
[0, 1].

References:
    V. Lomonaco et al. (2020), CVPR 2020 Continual Learning in Computer Vision Competition.
    N. Diaz-Rodriguez et al. (2018), Don't forget, there is more than forgetting (the CL score).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from avalanche_ext.evaluation.accuracy_matrix import Matrix, filled, seen_accuracies

__all__ = [
    "CHALLENGE_WEIGHTS",
    "ChallengeScores",
    "average_validation_accuracy",
    "average_validation_accuracy_seen",
    "cl_score",
]

# The challenge's announcement lists these five, which sum to 0.8. Were RAM counted twice (mean and
# maximum) and disk twice at 0.1, they would sum to 1; no source says so.
CHALLENGE_WEIGHTS: dict[str, float] = {
    "test_accuracy": 0.3,
    "average_validation_accuracy": 0.1,
    "time": 0.15,
    "ram": 0.125,
    "disk": 0.125,
}


@dataclass(frozen=True)
class ChallengeScores:
    """The seven raw numbers, and the one that the challenge does not have.

    Args:
        final_test_accuracy: 0 to 1, behind the last experience; the mean over test experiences.
        average_validation_accuracy: Over experiences and all tasks, 0 to 1.
        minutes: From the start to the end of training, validation included, test left out.
        mean_ram_mb: Resident memory of the process, in MB of 2^20 bytes, a sample per epoch.
        max_ram_mb: The largest sample.
        mean_disk_mb: Size of the external memory, likewise; 0 where there is none.
        max_disk_mb: The largest.
        average_validation_accuracy_seen: Over the tasks seen so far; not the challenge's.
    """

    final_test_accuracy: float
    average_validation_accuracy: float
    minutes: float
    mean_ram_mb: float
    max_ram_mb: float
    mean_disk_mb: float
    max_disk_mb: float
    average_validation_accuracy_seen: float

    def to_json(self) -> dict[str, float]:
        """Names and numbers, for ``json.dumps``."""
        return asdict(self)


def average_validation_accuracy(matrix: Matrix) -> float:
    r"""Mean over training of the accuracy on all test experiences, :math:`\frac1{T K}\sum_{i,j} a_{ij}`.

    Seen or not: on the nine tasks of Multi-Task-NC a network that is perfect on what it saw
    reaches :math:`\frac19\sum_k k/9 = 5/9`. ``nan`` where nothing ahead of training was tested.

    Args:
        matrix: Accuracies ``(T, K)`` on the validation stream after each of the experiences so
            far; ``K`` is 1 or the number of tasks.
    """  # noqa: E501 - one formula
    return float(filled(matrix).mean() if _ended(matrix) else np.mean(matrix))


def average_validation_accuracy_seen(matrix: Matrix) -> float:
    """The same over the tasks seen so far, which is ``average_incremental_accuracy``."""
    known = matrix if _ended(matrix) else [row[: i + 1] for i, row in enumerate(matrix)]
    values = seen_accuracies(known)
    return sum(values) / len(values)


def _ended(matrix: Matrix) -> bool:
    """Whether the stream has ended: before, there are fewer rows than tasks."""
    return len({len(row) for row in matrix}) != 1 or len(matrix) >= len(matrix[0])


def cl_score(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    r"""The weighted sum :math:`\sum_i w_i c_i` of criteria in [0, 1], of which 1 is best.

    Args:
        values: The criteria, normalised by the caller.
        weights: A weight for each; they must sum to 1. ``CHALLENGE_WEIGHTS`` does not and has to
            be completed or divided by its sum, and said so.

    Raises:
        ValueError: If criteria and weights differ, a value is outside [0, 1], a weight is
            negative, or the weights do not sum to 1.
    """
    if set(values) != set(weights):
        raise ValueError(
            f"cl_score expects one weight per criterion; got criteria {sorted(values)} and "
            f"weights {sorted(weights)}."
        )
    outside = {name: v for name, v in values.items() if not 0 <= v <= 1}
    if outside:
        raise ValueError(f"cl_score expects criteria in [0, 1], 1 the best; got {outside}.")
    if min(weights.values(), default=0) < 0 or not math.isclose(sum(weights.values()), 1):
        raise ValueError(
            f"cl_score expects weights that are not negative and sum to 1; got "
            f"{dict(weights)}, which sum to {sum(weights.values()):g}."
        )
    return sum(weights[name] * v for name, v in values.items())
