"""What can be said of a benchmark, a head and a list of plugins before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.models import DynamicModule
from avalanche.training.storage_policy import ClassBalancedBuffer, ExperienceBalancedBuffer
from torch import Tensor, nn

from avalanche_ext.training.loading.flat_data import attribute_values
from avalanche_ext.training.plugins.precision import PrecisionPlugin
from avalanche_ext.training.storage_policy.exemplar_memory import ExemplarMemory

__all__ = [
    "FAILURES",
    "Finding",
    "check_device",
    "check_head",
    "check_last_batch",
    "check_memories",
    "check_plugin_list",
    "check_samples",
    "check_streams",
    "first_line",
    "labels_of",
    "name_of",
]

# What a benchmark, a model or a plugin raises when it does not fit; anything else is a bug here.
FAILURES = (
    ValueError, TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError,
    AssertionError, OSError, ImportError,
)  # fmt: skip
_SAMPLES = 512  # that are looked at in all
_LARGE = 50.0  # an input beyond it was not scaled


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Args:
        level: ``"ok"``, ``"warning"`` or ``"error"``.
        check: What was looked at.
        text: What was expected, what came, what to do; or what is fine.
    """

    level: str
    check: str
    text: str


def check_device(device: Any) -> Finding:
    """Whether torch can put something there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        return Finding(
            "error", "device", f"{str(device)!r} cannot be used here ({reason}); choose another"
        )
    return Finding("ok", "device", f"{device} is there")


def check_streams(benchmark: Any) -> Iterator[Finding]:
    """Experiences that are empty; a test stream that asks what was never taught."""
    streams = {"training": list(benchmark.train_stream), "test": list(benchmark.test_stream)}
    for kind, stream in streams.items():
        empty = [k for k, e in enumerate(stream) if not len(e.dataset)]
        if not stream or empty:
            yield Finding(
                "error", "streams",
                f"every experience needs a sample; {kind} experiences {empty or 'all'} have none: "
                f"drop them, or check how the benchmark was split",
            )  # fmt: skip
            return
    train, test = streams["training"], streams["test"]
    taught = set().union(*map(labels_of, train))
    strange = sorted(set().union(*map(labels_of, test)) - taught)
    if strange:
        yield Finding(
            "error", "streams",
            f"the test stream expects labels {strange} that no training experience has; check how "
            f"labels are mapped",
        )  # fmt: skip
    differ = [k for k, (a, b) in enumerate(zip(train, test, strict=False)) if _differ(a, b)]
    if len(train) != len(test) or differ:
        what = (
            f"{len(test)} test experiences for {len(train)} training experiences"
            if len(train) != len(test)
            else f"test experiences {differ} have other labels than the training experiences"
        )
        yield Finding(
            "warning", "streams",
            f"rows and columns of the accuracy matrix are expected to be the same experiences; "
            f"got {what}: forgetting and backward transfer cannot be read from it",
        )  # fmt: skip
    elif not strange:
        sizes = [len(e.dataset) for e in train]
        yield Finding(
            "ok", "streams",
            f"{len(train)} experiences of {min(sizes)} to {max(sizes)} samples, and a test "
            f"experience for each",
        )  # fmt: skip


def check_samples(benchmark: Any) -> Iterator[Finding]:
    """Kind, shape and range of the inputs, on samples from all over both streams."""
    experiences = [("training", k, e.dataset.train()) for k, e in enumerate(benchmark.train_stream)]
    experiences += [("test", k, e.dataset.eval()) for k, e in enumerate(benchmark.test_stream)]
    each = max(2, _SAMPLES // len(experiences))
    shapes, low, high, kinds = set(), float("inf"), -float("inf"), set()
    for kind, k, dataset in experiences:
        for i in sorted({round(j * (len(dataset) - 1) / (each - 1)) for j in range(each)}):
            x = dataset[i][0]
            place = f"sample {i} of {kind} experience {k}"
            if not isinstance(x, Tensor):
                yield Finding(
                    "error", "inputs",
                    f"expected tensors; {place} is a {type(x).__name__}: add ToTensor() to the "
                    f"data set's transforms",
                )  # fmt: skip
                return
            if not bool(torch.isfinite(x).all()):
                yield Finding(
                    "error", "inputs",
                    f"expected finite numbers; {place} has NaN or infinity: repair or drop it",
                )  # fmt: skip
                return
            shapes.add(tuple(x.shape))
            kinds.add(str(x.dtype).removeprefix("torch."))
            low, high = min(low, float(x.min())), max(high, float(x.max()))
    yield from _judge(shapes, kinds, low, high)


def check_head(strategy: Any, benchmark: Any) -> Iterator[Finding]:
    """Whether the model takes the inputs, and its head has a unit for every label."""
    everything = [*benchmark.train_stream, *benchmark.test_stream]
    labels = sorted(set().union(*map(labels_of, everything)))
    if any(isinstance(m, DynamicModule) for m in strategy.model.modules()):
        if labels[0] < 0:
            yield _misfit(labels, "a head that grows with the labels 0, 1, 2, ...")
            return
        yield Finding("ok", "labels", f"{labels[0]} to {labels[-1]}; the head grows with them")
        return
    model = copy.deepcopy(strategy.model).to(strategy.device).eval()
    x = benchmark.train_stream[0].dataset.train()[0][0][None].to(strategy.device)
    try:
        with torch.no_grad():
            output = model(x)
    except FAILURES as error:
        yield Finding(
            "error", "model",
            f"expected a model that takes inputs of shape {tuple(x.shape[1:])}; "
            f"{type(model).__name__} raises {first_line(error)}: change its first layer or the "
            f"transforms",
        )  # fmt: skip
        return
    width = output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None
    if width is None:
        yield Finding("ok", "labels", "the model's output is no single row of logits; not compared")
    elif labels[0] < 0 or labels[-1] >= width:
        yield _misfit(labels, f"a head of {width} units, for labels 0 to {width - 1}")
    else:
        yield Finding("ok", "labels", f"{labels[0]} to {labels[-1]} fit the head of {width} units")


def check_last_batch(strategy: Any, benchmark: Any) -> Iterator[Finding]:
    """Whether an epoch ends in a batch of one sample that batch normalisation cannot take."""
    if not any(isinstance(m, nn.BatchNorm1d) for m in strategy.model.modules()):
        return
    size = strategy.train_mb_size
    single = [k for k, e in enumerate(benchmark.train_stream) if len(e.dataset) % size == 1]
    if single:
        yield Finding(
            "warning", "batches",
            f"BatchNorm1d expects two samples; with batches of {size} the epochs of experiences "
            f"{single} end in a batch of one: choose another size, or drop_last=True",
        )  # fmt: skip


def check_memories(strategy: Any, benchmark: Any) -> Iterator[Finding]:
    """Whether every memory can give each group of the whole stream a sample."""
    for plugin in strategy.plugins:
        if getattr(plugin, "patterns_per_experience", 1) < 1:  # GEM, A-GEM
            yield Finding(
                "error", "memory",
                f"{name_of(plugin)} expects 1 sample per experience or more; got "
                f"patterns_per_experience={plugin.patterns_per_experience}: raise the memory",
            )  # fmt: skip
        policy = getattr(plugin, "storage_policy", None)
        if isinstance(policy, ExemplarMemory):
            grouping, scope = policy.group_by, policy.mem_scope
        elif isinstance(policy, ClassBalancedBuffer | ExperienceBalancedBuffer):
            grouping = "class" if isinstance(policy, ClassBalancedBuffer) else "experience"
            scope = "total"
        else:
            continue
        groups = [_groups(grouping, k, e) for k, e in enumerate(benchmark.train_stream)]
        whole = scope == "total"
        needed = len(set().union(*groups)) if whole else max(map(len, groups))
        size, name = policy.max_size, name_of(plugin)
        if 0 < size < needed:
            place = "in all" if whole else "per experience"
            yield Finding(
                "error", "memory",
                f"{name} expects room for each of {needed} groups ({grouping}); its memory holds "
                f"{size} samples {place}: raise it to {needed} or more, or group otherwise",
            )  # fmt: skip
        else:
            text = f"{name}: {size} samples for {needed} groups ({grouping})"
            yield Finding("ok", "memory", text)


def check_plugin_list(strategy: Any) -> Iterator[Finding]:
    """Plugins that are in the list twice, or behind the clock; a precision that is not there."""
    plugins, before = list(strategy.plugins), 0
    twice = {name_of(p) for k, p in enumerate(plugins) if any(p is q for q in plugins[:k])}
    if twice:
        before += 1
        yield Finding(
            "error", "plugins",
            f"each plugin is expected once; {sorted(twice)} are in the list twice, so each of "
            f"their hooks would run twice: remove one",
        )  # fmt: skip
    clock = next((k for k, p in enumerate(plugins) if p is strategy.clock), len(plugins))
    late = [name_of(p) for p in plugins[clock + 1 :]]
    if late:
        before += 1
        yield Finding(
            "warning", "plugins",
            f"the clock is expected last; {late} come behind it and see counters that are one "
            f"step ahead: give them to the strategy's constructor",
        )  # fmt: skip
    for plugin in plugins:
        if isinstance(plugin, PrecisionPlugin):
            before += 1
            yield _check_precision(plugin, strategy)
    if not before:
        names = ", ".join(dict.fromkeys(map(name_of, plugins)))
        yield Finding("ok", "plugins", f"{names}: each once, the clock last")


def labels_of(experience: Any) -> set[int]:
    """The labels of an experience's samples."""
    values = attribute_values(experience.dataset, "targets")
    if values is None:
        return {int(y) for _, y, *_ in experience.dataset}
    return {int(y) for y in values.unique()}


def name_of(plugin: Any) -> str:
    """A plugin's name in findings."""
    return type(plugin).__name__


# parts ----------------------------------------------------------------------------------------


def _judge(shapes: set[Any], kinds: set[str], low: float, high: float) -> Iterator[Finding]:
    before = 0
    if len(shapes) > 1:
        before += 1
        yield Finding(
            "error", "inputs",
            f"expected one shape for all samples; got {sorted(shapes)}: resize or pad them",
        )  # fmt: skip
    if "uint8" in kinds:
        before += 1
        yield Finding(
            "error", "inputs",
            "expected floating-point numbers; got bytes (uint8): add ToTensor() or a division by "
            "255 to the data set's transforms",
        )  # fmt: skip
    elif low == high:
        before += 1
        yield Finding("warning", "inputs", f"every number is {low:g}: check how data are read")
    elif max(-low, high) > _LARGE:
        before += 1
        yield Finding(
            "warning", "inputs",
            f"expected numbers of about -3 to 3; got {low:g} to {high:g}: scale or normalise them",
        )  # fmt: skip
    if not before:
        yield Finding(
            "ok", "inputs",
            f"{'/'.join(sorted(kinds))} of shape {shapes.pop()}, from {low:.3g} to {high:.3g}",
        )  # fmt: skip


def _misfit(labels: list[int], head: str) -> Finding:
    return Finding(
        "error", "labels",
        f"expected {head}; got labels {labels[0]} to {labels[-1]}: give the model a wider or a "
        f"growing head, or map the labels to 0, 1, 2, ...",
    )  # fmt: skip


def _check_precision(plugin: PrecisionPlugin, strategy: Any) -> Finding:
    bare = copy.copy(strategy)  # the plugin's own check, on a strategy that is then thrown away
    try:
        copy.deepcopy(plugin).before_training(bare)
    except ValueError as error:
        return Finding("error", "precision", str(error))
    return Finding("ok", "precision", f"{plugin.precision} is there on {strategy.device}")


def _groups(grouping: str | None, position: int, experience: Any) -> set[Any]:
    if grouping == "class":
        return set(labels_of(experience))
    if grouping == "task":
        return set(getattr(experience, "task_labels", [0]))
    return {position} if grouping == "experience" else {"all"}


def _differ(train: Any, test: Any) -> bool:
    return labels_of(train) != labels_of(test)


def first_line(error: BaseException) -> str:
    """Kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
