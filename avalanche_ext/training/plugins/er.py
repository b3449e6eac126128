"""ER: experience replay, half the batch from memory, half from the current experience.

Reference:
    Chaudhry et al. (2019), On Tiny Episodic Memories in Continual Learning; as the rival of BER
    in Chen et al. (2020), Discriminative Representation Loss (DRL) for Continual Learning, Sec. 3.

Faithfulness:
    1. "Divided equally": B current samples and B from memory, drawn uniformly with replacement
       from the union of all past experiences. ``total_batch=True`` makes B the whole batch, half
       and half, with as many more steps per epoch.
    2. The challenge code takes ``floor(B / t)`` from each of t past experiences, which is nothing
       at all once t > B: with B = 16 its ER replays nothing from the 17th experience on. That, not
       ER, is the accuracy of 0.04 in both NIC rows of the paper's Table 3. Here the number of
       replayed samples does not depend on t.
    3. ``mem`` counts per experience by default, as for ``BERPlugin``.

Cost: twice the samples per step.
"""

from __future__ import annotations

from typing import Any

from avalanche.training.storage_policy import ExemplarsBuffer

from avalanche_ext.training.checks import check_count
from avalanche_ext.training.loading.sampling import Draw, GroupIndex, UniformDraw
from avalanche_ext.training.plugins.replay_template import ReplayTemplate

__all__ = ["ERPlugin"]


class ERPlugin(ReplayTemplate, supports_distributed=True):
    """Experience replay with as many samples from memory as from the current experience.

    Args:
        mem: Exemplars, see ``mem_scope``; default 200, or what ``storage_policy`` holds. 0 is
            plain training, bit for bit.
        mem_scope: ``"experience"``: ``mem`` for every experience (paper). ``"total"``: in all.
        batch_size_mem: Samples from memory in each step; the strategy's mini-batch size by
            default.
        total_batch: Split one mini-batch in half instead of doubling it.
        storage_policy: A memory of ours or of Avalanche's instead of ``mem`` and ``mem_scope``.

    Raises:
        ValueError: For a bad argument; before an experience is trained on that is empty or whose
            labels do not fit the head.

    References:
        Chen et al. (2020), Sec. 3; Chaudhry et al. (2019).
    """

    label = "ER"

    def __init__(
        self,
        mem: int | None = None,
        *,
        mem_scope: str = "experience",
        batch_size_mem: int | None = None,
        total_batch: bool = False,
        storage_policy: ExemplarsBuffer | None = None,
    ) -> None:
        check_count("ERPlugin", batch_size_mem=batch_size_mem)
        if batch_size_mem is not None and total_batch:
            raise ValueError(
                f"ERPlugin expects batch_size_mem not together with total_batch=True; "
                f"got batch_size_mem={batch_size_mem}, total_batch={total_batch}."
            )
        super().__init__(mem, mem_scope, "experience", storage_policy)
        self.batch_size_mem = batch_size_mem
        self.total_batch = total_batch

    def draw(self, strategy: Any, index: GroupIndex) -> Draw:
        """See ``ReplayTemplate``."""
        size = strategy.train_mb_size
        if self.total_batch:
            return UniformDraw(size // 2, share=True)
        return UniformDraw(self.batch_size_mem or size)
