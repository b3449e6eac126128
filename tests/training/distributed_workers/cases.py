"""Trainings that two processes and one process do alike; each returns a record of itself."""

from __future__ import annotations

import pickle
import random
from types import SimpleNamespace

import numpy as np
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.training.plugins import (
    AGEMPlugin,
    EvaluationPlugin,
    EWCPlugin,
    LwFPlugin,
    ReplayPlugin,
    SupervisedPlugin,
    SynapticIntelligencePlugin,
)
from avalanche.training.storage_policy import ClassBalancedBuffer, ParametricBuffer
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_ext import MLP, BERPlugin, DRLPlugin, ERPlugin, ReservoirMemory, ShuffleReplayPlugin
from avalanche_ext.training.distributed import rank_and_world, share
from avalanche_ext.training.plugins.data_parallel import DataParallelPlugin
from avalanche_ext.training.plugins.device_data import DeviceDataPlugin
from avalanche_ext.training.plugins.precision import PrecisionPlugin
from avalanche_ext.training.wrapping import _Wrapped

WIDTH, BATCH = 5, 8
# 19 = 8 + 8 + 3: a short batch that two ranks cannot share equally; 17 = 8 + 8 + 1: one row, which
# both ranks take.
SIZES = (19, 17, 21)


class Recorder(SupervisedPlugin):
    """Rows, gradients and noise of every step."""

    def __init__(self):
        super().__init__()
        self.rows, self.gradients, self.missing, self.noise = [], [], [], []
        self.pickled = []

    def before_forward(self, strategy, **kwargs):
        self.rows.append(torch.cat([c.double().reshape(len(c), -1) for c in strategy.mbatch], 1))

    def after_forward(self, strategy, **kwargs):
        self.noise += [float(m.noise) for m in strategy.model.modules() if isinstance(m, Noise)]

    def after_backward(self, strategy, **kwargs):
        grads = [p.grad for p in strategy.model.parameters()]
        self.gradients.append(
            torch.cat([g.double().flatten() for g in grads if g is not None]).clone()
        )
        self.missing.append([g is None for g in grads])
        parallel = [p for p in strategy.plugins if isinstance(p, DataParallelPlugin)]
        self.pickled = [pickle.loads(pickle.dumps(p)).splits_batches for p in parallel]


class Noise(nn.Module):
    """Dropout that can be looked at."""

    def forward(self, x):
        if self.training:
            mask = torch.rand(len(x), 1)
            self.noise = mask[0, 0]
            return x * (0.5 + mask)
        return x


class SplitLoader:
    """A loader that takes this rank's rows itself."""

    sharded = True

    def __init__(self, loader, rank, world):
        self.loader, self.rank, self.world, self.global_rows = loader, rank, world, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            self.global_rows = len(batch[0])
            yield [share([column], self.rank, self.world)[0] for column in batch]


class SplitsItself(SupervisedPlugin):
    """Puts a ``SplitLoader`` in place; ``adds`` rows afterwards, which is a mistake."""

    def __init__(self, adds=False):
        super().__init__()
        self.adds = adds

    def before_training_exp(self, strategy, **kwargs):
        strategy.dataloader = SplitLoader(strategy.dataloader, *rank_and_world(strategy))

    def before_training_iteration(self, strategy, **kwargs):
        if self.adds:
            strategy.mbatch = [torch.cat([c, c]) for c in strategy.mbatch]


class AddsRows(SupervisedPlugin):
    """Adds rows to the batch, as generative replay does."""

    def before_training_iteration(self, strategy, **kwargs):
        x, *labels = strategy.mbatch
        made = x + torch.randn(x.shape, dtype=torch.float64).to(x)
        strategy.mbatch = [torch.cat([x, made]), *(torch.cat([c, c]) for c in labels)]


class TwoHeads(MultiTaskModule):
    """A head for each task."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU())
        self.classifier = MultiHeadClassifier(12, 2)

    def forward(self, x, task_labels):
        return self.classifier(self.body(x), task_labels)


def mlp():
    return MLP(WIDTH, (12, 10), 6)


def growing():
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), IncrementalClassifier(12, 2))


def with_batchnorm():
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6))


def noisy():
    return nn.Sequential(nn.Linear(WIDTH, 12), Noise(), nn.ReLU(), nn.Linear(12, 6))


def benchmark(dtype=torch.float32, *, tasks=False, sizes=SIZES):
    """Experience k has classes 2k and 2k + 1 (0 and 1 in each task); x[0] numbers the samples."""
    parts = []
    for k, n in enumerate(sizes):
        x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(k)).to(dtype)
        x[:, 0] = (100 * k + torch.arange(n)) / 100
        parts.append((x, torch.arange(n) % 2 + (0 if tasks else 2 * k)))
    labels = list(range(len(sizes))) if tasks else [0] * len(sizes)
    return tensors_benchmark(train_tensors=parts, test_tensors=parts, task_labels=labels)


def parametric():
    """Chooses with Python's random numbers."""
    return [ReplayPlugin(9, storage_policy=ParametricBuffer(9, groupby="class"))]


def half():
    """From a scale at which everything overflows, down to one at which the odd row does."""
    precision = PrecisionPlugin("fp16")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    return [precision, DRLPlugin(1e-2), BERPlugin(mem=5)]


# name: plugins, model, options of ``train``
CASES = {
    "naive": (list, mlp, {}),
    "er": (lambda: [ERPlugin(mem=6)], mlp, {}),
    "ber": (lambda: [BERPlugin(mem=5)], mlp, {}),
    "ber_balanced": (lambda: [BERPlugin(mem=5, mode="balanced", group_by="class")], mlp, {}),
    "shuffle": (lambda: [ShuffleReplayPlugin(mem=4)], mlp, {}),
    "reservoir": (lambda: [ERPlugin(storage_policy=ReservoirMemory(7))], mlp, {"both": False}),
    "policy": (lambda: [BERPlugin(storage_policy=ClassBalancedBuffer(12))], mlp, {"both": False}),
    "drl": (lambda: [DRLPlugin(1e-2)], mlp, {}),
    "drl_batch": (lambda: [DRLPlugin(1e-2, form="followup", normalize=True)], mlp, {"both": False}),
    "drl_ber": (lambda: [DRLPlugin(1e-2), BERPlugin(mem=5)], mlp, {}),
    "ber_drl": (lambda: [BERPlugin(mem=5), DRLPlugin(1e-2)], mlp, {"first": False}),
    "replay": (lambda: [ReplayPlugin(9)], mlp, {}),
    "parametric": (parametric, mlp, {"both": False}),
    "ewc": (lambda: [EWCPlugin(5.0)], mlp, {}),
    "si": (lambda: [SynapticIntelligencePlugin(0.1)], mlp, {"cast": False}),
    "agem": (lambda: [AGEMPlugin(6, 6)], mlp, {"both": False}),
    "resident": (lambda: [DeviceDataPlugin(), BERPlugin(mem=5)], mlp, {"both": False}),
    "resident_replay": (lambda: [DeviceDataPlugin(), ReplayPlugin(9)], mlp, {"both": False}),
    "splits_itself": (lambda: [SplitsItself()], mlp, {"both": False}),
    "adds_rows": (lambda: [AddsRows()], mlp, {"both": False}),
    "adds_rows_last": (lambda: [AddsRows()], mlp, {"first": False, "both": False}),
    "lwf": (lambda: [LwFPlugin(1.0, 2.0)], mlp, {}),
    "evaluated": (lambda: [ERPlugin(mem=6)], mlp, {"eval_every": 1, "both": False}),
    "growing": (lambda: [DRLPlugin(1e-2), BERPlugin(mem=5)], growing, {"cast": False}),
    "tasks_naive": (list, TwoHeads, {"tasks": True, "cast": False}),
    "tasks": (lambda: [ERPlugin(mem=3)], TwoHeads, {"tasks": True, "cast": False}),
    "tasks_drl": (
        lambda: [DRLPlugin(1e-2, class_key="task_y"), BERPlugin(mem=3)],
        TwoHeads,
        {"tasks": True, "cast": False},
    ),
}
# Not the same steps as one process takes: batch statistics and noise are a rank's own, half
# precision rounds in another order.
LOOSE = {
    "batchnorm": (
        lambda: [ERPlugin(mem=6)],
        with_batchnorm,
        {"sizes": (20, 16, 12), "cast": False},
    ),
    "fp16": (half, mlp, {"cast": False}),
    "noise": (lambda: [ReplayPlugin(5)], noisy, {"cast": False}),
}


def dtypes(plugins, model, options):
    """The precisions in which a case is run: double is the sharper eye, single the usual one."""
    if not options.get("cast", True):  # modules that come later would be single
        return [torch.float32]
    return [torch.float32, torch.float64] if options.get("both", True) else [torch.float64]


def seed_everything(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def strategy_for(model, plugins, *, batch=BATCH, epochs=2, strategy=Naive, **kwargs):
    return strategy(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
        criterion=nn.CrossEntropyLoss(), train_mb_size=batch, train_epochs=epochs,
        eval_mb_size=16, plugins=plugins, evaluator=kwargs.pop("evaluator", None), **kwargs,
    )  # fmt: skip


def train(name, dtype=torch.float32, *, seed=0, parallel=True):
    """Run one case; every rank may have another seed and other initial weights."""
    make_plugins, make_model, options = {**CASES, **LOOSE}[name]
    bench = benchmark(dtype, tasks=options.get("tasks", False), sizes=options.get("sizes", SIZES))
    seed_everything(seed)
    model, plugins, recorder = make_model().to(dtype), make_plugins(), Recorder()
    split = [DataParallelPlugin()] if parallel else []
    first = options.get("first", True)
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=[])
    strategy = strategy_for(
        model,
        [*(split if first else []), *plugins, *([] if first else split), recorder],
        evaluator=evaluator,
        **({"eval_every": 1} if "eval_every" in options else {}),
    )
    for experience in bench.train_stream:
        streams = [bench.test_stream] if "eval_every" in options else []
        strategy.train(experience, eval_streams=streams)
    metrics = strategy.eval(bench.test_stream)
    memories = [p.storage_policy for p in plugins if hasattr(p, "storage_policy")]
    return {
        "rows": recorder.rows,
        "gradients": recorder.gradients,
        "missing": recorder.missing,
        "noise": recorder.noise,
        "pickled": recorder.pickled,
        "weights": torch.cat([p.detach().double().flatten() for p in model.parameters()]),
        "buffers": [b.clone() for b in model.buffers()],
        "memories": [contents(memory) for memory in memories],
        "metrics": {k: float(v) for k, v in metrics.items()},
        "left_over": sorted(k for k, v in vars(strategy).items() if isinstance(v, _Wrapped)),
    }


def contents(memory):
    dataset = memory.buffer
    return torch.stack([dataset[i][0].double() for i in range(len(dataset))])


# mistakes ---------------------------------------------------------------------------------------


def fails(make, rank):
    """Train on what ``make(rank)`` returns; the error's text."""
    seed_everything(0)
    made = SimpleNamespace(
        **{"plugins": [], "model": mlp(), "bench": benchmark(), "options": {}, "split": {}}
    )
    for key, value in make(rank).items():
        setattr(made, key, value)
    plugins = [DataParallelPlugin(**made.split), *made.plugins]
    strategy = strategy_for(made.model, plugins, **made.options)
    try:
        for experience in made.bench.train_stream:
            strategy.train(experience, eval_streams=[])
    except ValueError as error:
        return str(error)
    return "no error"


class OwnLoop(Naive):
    """Does not call ``backward``."""

    def training_epoch(self, **kwargs):
        for self.mbatch in self.dataloader:  # noqa: B020 - as Avalanche writes it
            self._unpack_minibatch()
            self._before_training_iteration(**kwargs)
            self.optimizer.zero_grad()
            self.loss = self._make_empty_loss()
            self.mb_output = self.forward()
            self.loss += self.criterion()
            self.loss.backward()
            self.optimizer_step()
            self._after_training_iteration(**kwargs)


class OtherLabels(SupervisedPlugin):
    """Changes a rank's batches behind the loader's back."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def before_training_iteration(self, strategy, **kwargs):
        strategy.mbatch[1] = strategy.mbatch[1].roll(self.rank)


def memory_of_its_own(rank):
    plugin = ERPlugin(mem=6)
    plugin.memory._seed = rank
    return {"plugins": [plugin]}


def wider_model(rank):
    return {"model": MLP(WIDTH, (12 + rank,), 6)}


def layers_of_heads(rank):
    plugins = [DRLPlugin(1e-2, layers="leaves", class_key="task_y"), ERPlugin(mem=3)]
    return {"plugins": plugins, "model": TwoHeads(), "bench": benchmark(tasks=True)}


MISTAKES = {
    "layers_of_heads": layers_of_heads,
    "odd_batch": lambda rank: {"options": {"batch": 7}},
    "other_batch": lambda rank: {"options": {"batch": 8 + 2 * rank}},
    "more_data": lambda rank: {"bench": benchmark(sizes=(19 + rank, 17, 21))},
    "other_labels": lambda rank: {"bench": benchmark(tasks=bool(rank))},
    "other_batches": lambda rank: {"plugins": [OtherLabels(rank)]},
    "other_memory": memory_of_its_own,
    "other_model": wider_model,
    "adds_too_late": lambda rank: {"plugins": [SplitsItself(adds=True)]},
    "own_loop": lambda rank: {"options": {"strategy": OwnLoop}},
    "batchnorm_on_cpu": lambda rank: {"split": {"sync_batchnorm": True}},
    "data_parallel_model": lambda rank: {"model": nn.DataParallel(mlp())},
}
