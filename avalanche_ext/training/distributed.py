"""Data parallelism: which rows of a global batch are a rank's, and how their work is added up.

Every rank knows the whole plan of every batch, because all draws come from random states that all
ranks share. The row at position ``p`` of the global batch belongs to rank ``p % world``. A batch
with fewer rows than there are ranks is not split: every rank takes all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from avalanche.models import MultiTaskModule
from torch import Tensor

from avalanche_ext.training.process_group import all_ranks_agree

__all__ = ["average_gradients", "gather_rows", "rank_and_world", "share", "whole_batch"]

BUCKET_BYTES = 25 << 20


def rank_and_world(strategy: Any) -> tuple[int, int]:
    """This process's rank and the number of ranks that share each batch of ``strategy``.

    ``(0, 1)`` unless a ``DataParallelPlugin`` among the strategy's plugins is splitting batches.
    """
    plugin = _splitter(strategy)
    return (0, 1) if plugin is None else (plugin.rank, plugin.world)


def share(sources: Sequence[Tensor], rank: int, world: int) -> list[Tensor]:
    """Of each source's rows, those that are this rank's.

    Args:
        sources: One tensor for each source; behind one another they are the global batch.
        rank: Number of this process, from 0.
        world: Number of processes.

    Returns:
        One tensor for each source. With fewer rows than processes everything, for every rank.
    """
    if sum(rows.shape[0] for rows in sources) < world:
        return list(sources)
    mine, start = [], 0
    for rows in sources:
        mine.append(rows[(rank - start) % world :: world])
        start += rows.shape[0]
    return mine


def whole_batch(strategy: Any, columns: Sequence[Tensor]) -> list[Tensor]:
    """The rows of all ranks, in the order of the global batch, for each column of this rank's rows.

    For a loss term of pairs of rows: every rank computes the whole term. Without data parallelism
    the columns themselves.

    Raises:
        ValueError: If a multi-head model gave the ranks different columns.
    """
    plugin = _splitter(strategy)
    if plugin is None or plugin.global_rows < plugin.world:
        return list(columns)
    if any(isinstance(module, MultiTaskModule) for module in strategy.model.modules()):
        widths = {"shapes": [tuple(column.shape[1:]) for column in columns]}
        all_ranks_agree(widths, "layers of a batch", "Choose layers that all tasks go through.")
    whole: list[Tensor | None] = [None] * len(columns)
    for dtype in dict.fromkeys(column.dtype for column in columns):  # one message for each
        which = [k for k, column in enumerate(columns) if column.dtype == dtype]
        flat = [
            columns[k].flatten(1) if columns[k].ndim > 1 else columns[k][:, None] for k in which
        ]
        rows = gather_rows(torch.cat(flat, dim=1), plugin.global_rows)
        parts = rows.split([f.shape[1] for f in flat], dim=1)
        for k, part in zip(which, parts, strict=True):
            whole[k] = part.reshape(-1, *columns[k].shape[1:])
    return [column for column in whole if column is not None]


def gather_rows(rows: Tensor, total: int) -> Tensor:
    r"""The ``total`` rows of a global batch that ``share`` has split, from each rank's part.

    Its gradient at a rank's own rows is multiplied by ``total`` over the number of those rows:
    every rank computes the same term of all rows, and ``average_gradients`` weighs a rank by its
    part of the batch, so that the sum over ranks is the gradient of the term, once.

    Shapes:
        rows ``(b, ...)``, ``b`` this rank's part of ``total``; result ``(total, ...)``.
    """
    result = _GatherRows.apply(rows, total)
    assert isinstance(result, Tensor)
    return result


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int) -> Tensor:
        rank, world = dist.get_rank(), dist.get_world_size()
        ctx.own, ctx.scale = slice(rank, None, world), total / max(1, rows.shape[0])
        padded = rows.new_zeros((-(-total // world), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        # Rank r's row i is row i * world + r of the batch; padding can only be at the end.
        return torch.stack(parts, dim=1).flatten(0, 1)[:total]

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return grad[ctx.own] * ctx.scale, None


def average_gradients(parameters: Iterable[Tensor], weight: float) -> None:
    """Replace every gradient by the sum over ranks of ``weight`` times it.

    Args:
        parameters: The same on every rank, in the same order. One without a gradient on this rank
            counts as 0; one without a gradient on any rank keeps none.
        weight: This rank's part of the global batch; the weights of all ranks add up to 1, so what
            is the same on every rank stays the same.
    """
    waiting = []
    for bucket in _buckets(p for p in parameters if p.requires_grad):
        grads = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in bucket]
        present = bucket[0].new_ones(len(bucket))
        for k, p in enumerate(bucket):
            if p.grad is None:
                present[k].fill_(0)
        flat = torch.cat([*grads, present]).mul_(weight)
        waiting.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in waiting:
        assert work is not None
        work.wait()
        *grads, present = flat.split([*(p.numel() for p in bucket), len(bucket)])
        # Reading ``present`` makes an accelerator finish its work: only where it is in question.
        missing = any(p.grad is None for p in bucket)
        somewhere = (present > 0).tolist() if missing else [True] * len(bucket)
        for p, grad, there in zip(bucket, grads, somewhere, strict=True):
            if p.grad is not None:
                p.grad.copy_(grad.view_as(p))
            elif there:
                p.grad = grad.view_as(p).clone()


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one kind, joined until their gradients fill a message of a good size."""
    open_: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    filled: dict[tuple[torch.dtype, torch.device], int] = {}
    for p in parameters:
        kind = (p.dtype, p.device)
        open_.setdefault(kind, []).append(p)
        filled[kind] = filled.get(kind, 0) + p.numel() * p.element_size()
        if filled[kind] >= BUCKET_BYTES:
            yield open_.pop(kind)
            filled[kind] = 0
    yield from open_.values()


def _splitter(strategy: Any) -> Any:
    """The plugin that splits the strategy's batches at present, if there is one."""
    return next((p for p in strategy.plugins if getattr(p, "splits_batches", False)), None)
