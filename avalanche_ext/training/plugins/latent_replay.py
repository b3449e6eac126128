r"""Latent replay: activations of earlier samples, stored at one layer, pass the head again.

``Naive(MLP(784, (400, 400), 10), ..., plugins=[LatentReplayPlugin("features.1", mem=1500)])``.

Reference:
    Pellegrini, Graffieti, Lomonaco, Maltoni (2020), Latent Replay for Real-Time Continual Learning,
    IROS (AR1* with latent replay).

Faithfulness:
    1. Replay alone, for any strategy. The paper's system adds a penalty on the weights behind the
       layer (a plugin of its own here), batch renormalisation, and consolidated weights per class.
    2. New and stored activations count by their numbers (``r="share"``), as in the paper's batches
       of both; but they pass the head one after the other, so its batch norms see them apart.
    3. The paper learns slowly in front of the layer (``encoder="slow"``); by default nothing is
       learnt there after the first experience, in its code too. Where it goes on learning, stored
       activations age.
    4. The paper replaces a random part of the memory after each batch of the stream. Here each
       class keeps a uniform random subset of all that it had, all classes as many.
    5. Activations are stored when an experience has ended, from images without augmentation.

Cost: the head's forward and backward pass for the stored activations; what stands in front of the
layer sees one sample more, and, frozen, has no backward pass. One pass over each experience.
"""

from __future__ import annotations

from typing import Any

from avalanche_ext.training.checks import check_count, check_one_of
from avalanche_ext.training.latent_rehearsal import LatentRehearsal
from avalanche_ext.training.replay_sources import check_new_data_weight
from avalanche_ext.training.storage_policy.feature_buffer import FeatureBuffer

__all__ = ["LatentReplayPlugin"]

_ENCODERS = ("freeze_after_first", "frozen", "slow", "finetune")


class LatentReplayPlugin(LatentRehearsal):
    """Train the head on new activations and on stored ones.

    Logged after each experience: ``LatentReplay_Loss``, the mean of the stored ones' term, and
    ``LatentReplay_Bytes``.

    Args:
        layer: Name of the layer whose output is stored.
        mem: Size of the memory in samples; 1500, the paper's, unless ``mem_bytes`` is given.
        mem_bytes: Or in bytes.
        encoder: What stands in front: ``"freeze_after_first"``, ``"frozen"``, ``"slow"`` or
            ``"finetune"``.
        slow: Share of each step that a slow encoder takes after the first experience.
        n: Stored activations per step; as many as the batch by default.
        r: Weight of the new data: ``"share"``, ``"class_ratio"``, ``"1/t"`` or a number in [0, 1].
            With 1 nothing is done, bit for bit.

    Raises:
        TypeError, ValueError: For a bad argument; in training, for a layer that the network does
            not have (near matches are listed) or behind which it cannot be cut; for a memory that
            is too small for one sample of each class; for a model with a head for each
            task.
    """

    label = "LatentReplay"

    def __init__(
        self,
        layer: str,
        *,
        mem: int | None = None,
        mem_bytes: int | None = None,
        encoder: str = "freeze_after_first",
        slow: float = 0.1,
        n: int | None = None,
        r: str | float = "share",
    ) -> None:
        owner = type(self).__name__
        check_count(owner, mem=mem, mem_bytes=mem_bytes, n=n)
        check_one_of(owner, "encoder", encoder, _ENCODERS)
        if r != "share":
            check_new_data_weight(owner, r)
        if mem is not None and mem_bytes is not None:
            raise ValueError(
                f"{owner} got mem={mem} and mem_bytes={mem_bytes}; give one of the two."
            )
        size = 1500 if mem is None and mem_bytes is None else mem
        super().__init__(layer, FeatureBuffer(size, mem_bytes=mem_bytes), encoder, r, slow)
        self.n = n

    def rows(self, strategy: Any) -> int:
        """See ``LatentRehearsal``."""
        return self.n or super().rows(strategy)

    def __str__(self) -> str:
        return self.label
