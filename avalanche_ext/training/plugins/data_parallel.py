"""Data-parallel training: several processes share each batch and train one model.

``torchrun --nproc-per-node 4 script.py`` starts the script four times. With this plugin in the list
each process takes its rows of every batch and the gradients are averaged, so that a step is the
step that one process would take on the whole batch.

Faithfulness:
    1. ``train_mb_size`` is the batch of all processes together, as in every script without this
       plugin: adding processes does not change the method. It must be divisible by their number.
    2. Every process plans the same batches: draws from data and memories come from rank 0's random
       state, which all ranks are given at the start of each experience and of each epoch. Row
       ``p`` of a batch is rank ``p % world``'s. A last batch with fewer rows than ranks is not
       split; every rank takes all of it.
    3. Gradients are weighed by rows, so uneven parts of a short batch and terms that are the same
       on every rank (EWC) come out exactly. A loss that is not a mean over rows (class weights,
       ``ignore_index``, a mean over only the replayed rows) is averaged over ranks as it is.
    4. Memories are whole on every rank: each sees the whole experience and chooses with the same
       seed. After each experience the ranks compare the number and the labels of exemplars.
    5. Loss terms of pairs of rows (DRL) are computed over the rows of all ranks.
    6. Batch statistics are a rank's own, as in torch's DistributedDataParallel, and rank 0's are
       copied at the end of each epoch. ``sync_batchnorm=True`` takes them over all ranks.
    7. A model's own noise (dropout) differs between ranks, in a stream apart from that of draws.
    8. Evaluation is not split: every rank evaluates everything. Training metrics are of the rank's
       own rows. Give loggers to rank 0 only: ``loggers=[...] if data_parallel.is_main else []``.

Cost: per step one averaging of the gradients after the backward pass, not overlapped with it. Data
sets, memories and DRL's gathered representations are on every rank in full.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_ext.training import process_group
from avalanche_ext.training.distributed import average_gradients, share
from avalanche_ext.training.loading.flat_data import attribute_values
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.process_group import all_ranks_agree, from_first_rank
from avalanche_ext.training.wrapping import unwrap, wrap

__all__ = ["DataParallelPlugin"]

_ORDER = 10  # inside the layers that scale gradients back: one rank's overflow is every rank's
# The strategy's methods that get a layer, and the layer. Unlike hooks, layers do not depend on the
# plugin's place in the list.
_LAYERS = {
    "_before_training_exp": "_start_experience",
    "check_model_and_optimizer": "_adapt",
    "model_adaptation": "_convert",
    "_before_training_epoch": "_start_epoch",
    "_make_empty_loss": "_split",
    "forward": "_forward",
    "backward": "_backward",
    "_after_training_epoch": "_end_epoch",
    "_after_training_exp": "_end_experience",
}


class DataParallelPlugin(SupervisedPlugin, supports_distributed=True):
    """Share every batch among the processes that torchrun has started.

    Uses torch's default process group; starts it (NCCL for a CUDA device, else Gloo) under torchrun
    if there is none. Without either, and with one process, it changes nothing, bit for bit.

    Args:
        sync_batchnorm: Take batch statistics over all ranks (``torch.nn.SyncBatchNorm``, CUDA).

    Raises:
        ValueError: In training, if the number of processes does not divide ``train_mb_size``; if
            settings, data, models or memories differ between ranks; for a strategy whose loop does
            not call ``strategy.backward()``.
    """

    def __init__(self, *, sync_batchnorm: bool = False) -> None:
        super().__init__()
        if not isinstance(sync_batchnorm, bool):
            raise TypeError(
                f"DataParallelPlugin expects sync_batchnorm to be True or False; got "
                f"{sync_batchnorm!r}."
            )
        self.sync_batchnorm = sync_batchnorm
        self.rank, self.world = 0, 1
        self.global_rows = 0  # of the present batch, over all ranks
        self.splits_batches = False
        self._weight = 1.0
        self._done: set[str] = set()
        self._noise: Tensor | None = None
        self._seen: Tensor | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that should log, print and write: rank 0."""
        return process_group.rank() == 0

    # hooks ----------------------------------------------------------------------------------

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Join the other processes."""
        self.rank, self.world = process_group.join(strategy.device)
        if self.world == 1:
            return
        self._check(strategy)
        process_group.let_avalanche_split(False)
        self.splits_batches = True
        for name, layer in _LAYERS.items():
            wrap(strategy, name, getattr(self, layer), order=_ORDER)

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """A new batch has come."""
        self._done.clear()

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse to go on without having averaged anything."""
        if self.splits_batches and self._done != {"split", "averaged"}:
            raise ValueError(
                f"{type(strategy).__name__} has a training loop of its own, which does not go "
                f"through strategy.backward(); DataParallelPlugin cannot average its gradients. "
                f"Train it in one process."
            )

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """Leave the strategy as it was."""
        for name, layer in _LAYERS.items():
            unwrap(strategy, name, getattr(self, layer))
        self.splits_batches = False
        self._noise = self._seen = None
        process_group.let_avalanche_split(True)

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Every rank evaluates everything."""
        process_group.let_avalanche_split(False)

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Outside training leave Avalanche as it was."""
        if not self.splits_batches:
            process_group.let_avalanche_split(True)

    # layers ---------------------------------------------------------------------------------

    def _start_experience(self, strategy: Any, inner: Any, **kwargs: Any) -> None:
        process_group.share_random_state()
        inner(**kwargs)

    def _adapt(self, strategy: Any, inner: Any, *args: Any, **kwargs: Any) -> None:
        dataset = strategy.adapted_dataset
        labels = process_group.fingerprint(attribute_values(dataset, "targets"))
        all_ranks_agree({"samples": len(dataset), "label sum": labels}, "experience")
        inner(*args, **kwargs)
        state = dict([*strategy.model.named_parameters(), *strategy.model.named_buffers()])
        all_ranks_agree({n: (tuple(t.shape), str(t.dtype)) for n, t in state.items()}, "model")
        process_group.copy_from_first_rank(state.values())

    def _convert(self, strategy: Any, inner: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model = inner(*args, **kwargs)
        if self.sync_batchnorm and any(_is_plain_batchnorm(m) for m in model.modules()):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    def _start_epoch(self, strategy: Any, inner: Any, **kwargs: Any) -> None:
        inner(**kwargs)
        strategy._stop_training = from_first_rank(strategy._stop_training)
        seed = process_group.share_random_state()
        noise = seeded(seed, strategy.clock.train_iterations, self.rank)
        self._noise, self._seen = noise.get_state(), None
        if strategy.device.type == "cuda" and self.rank:
            torch.cuda.manual_seed(noise.initial_seed())

    def _split(self, strategy: Any, inner: Any) -> Tensor:
        """The loop calls this when every plugin's ``before_training_iteration`` has been."""
        if strategy.is_training and strategy.mbatch is not None and "split" not in self._done:
            self._take_my_rows(strategy)
            self._done.add("split")
        return inner()

    def _forward(self, strategy: Any, inner: Any) -> Any:
        if not strategy.is_training or self._noise is None:
            return inner()
        draws = torch.get_rng_state()
        torch.set_rng_state(self._noise)
        output = inner()
        self._noise = torch.get_rng_state()
        torch.set_rng_state(draws)
        return output

    def _backward(self, strategy: Any, inner: Any) -> None:
        inner()
        optimized = [p for group in strategy.optimizer.param_groups for p in group["params"]]
        average_gradients(dict.fromkeys([*strategy.model.parameters(), *optimized]), self._weight)
        self._done.add("averaged")

    def _end_epoch(self, strategy: Any, inner: Any, **kwargs: Any) -> None:
        seen = None if self._seen is None else self._seen.tolist()
        all_ranks_agree({"rows and labels": seen}, "batches in an epoch")
        process_group.copy_from_first_rank(strategy.model.buffers())
        inner(**kwargs)

    def _end_experience(self, strategy: Any, inner: Any, **kwargs: Any) -> None:
        process_group.share_random_state()  # memories draw now
        inner(**kwargs)
        memories = process_group.memory_fingerprints(strategy.plugins)
        all_ranks_agree(memories, "memories (number, label sum)")

    # parts ----------------------------------------------------------------------------------

    def _check(self, strategy: Any) -> None:
        size = strategy.train_mb_size
        settings = {"train_mb_size": size, "train_epochs": strategy.train_epochs}
        all_ranks_agree(settings, "strategy")
        if size % self.world:
            raise ValueError(
                f"DataParallelPlugin shares each batch equally: {self.world} processes do not "
                f"divide train_mb_size={size}, the batch of all processes together. Use a "
                f"multiple of {self.world}, or another number of processes."
            )
        if self.sync_batchnorm and strategy.device.type != "cuda":
            raise ValueError(
                f"sync_batchnorm=True needs a CUDA device (torch.nn.SyncBatchNorm); the strategy "
                f"is on {strategy.device}. Leave it out, or give the strategy a CUDA device."
            )
        if isinstance(strategy.model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"DataParallelPlugin averages the gradients itself; give it the model, not "
                f"the model inside a {type(strategy.model).__name__}."
            )

    def _take_my_rows(self, strategy: Any) -> None:
        rank, world, batch = self.rank, self.world, strategy.mbatch
        here = len(batch[1])
        if getattr(strategy.dataloader, "sharded", False):
            self.global_rows = strategy.dataloader.global_rows
            (mine,) = share([torch.arange(self.global_rows)], rank, world)
            if here != len(mine):
                raise ValueError(
                    f"this rank's part of a batch of {self.global_rows} rows has {len(mine)}, but "
                    f"the batch has {here}: a plugin changed it after the loader had split it. "
                    f"Add rows through the loader."
                )
        else:
            self.global_rows = here
            self._remember(batch[1])
            strategy.mbatch = [share([column], rank, world)[0] for column in batch]
        whole = self.global_rows < world  # then every rank computes the same
        self._weight = 1 / world if whole else len(strategy.mbatch[1]) / self.global_rows

    def _remember(self, labels: Tensor) -> None:
        rows = labels.detach().double().reshape(len(labels), -1).sum(1)
        places = torch.arange(1, len(rows) + 1, dtype=rows.dtype, device=rows.device)
        seen = torch.stack([places.sum(), rows.dot(places)])
        self._seen = seen if self._seen is None else self._seen + seen

    def __str__(self) -> str:
        return "DataParallel"


def _is_plain_batchnorm(module: nn.Module) -> bool:
    batchnorm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batchnorm and not isinstance(module, nn.SyncBatchNorm)
