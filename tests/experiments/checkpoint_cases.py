"""Strategies that are interrupted and go on; imported by processes that are killed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from avalanche.models import IncrementalClassifier
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import (
    EvaluationPlugin,
    EWCPlugin,
    GEMPlugin,
    LRSchedulerPlugin,
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    RWalkPlugin,
    SynapticIntelligencePlugin,
)
from avalanche.training.storage_policy import ClassBalancedBuffer
from avalanche.training.supervised import Naive

from avalanche_ext import BERPlugin, DeviceDataPlugin, DRLPlugin, ERPlugin, ShuffleReplayPlugin
from avalanche_ext.evaluation.metrics.device import accuracy_metrics, loss_metrics
from avalanche_ext.experiments.checkpoint import Checkpoints
from avalanche_ext.experiments.observers import Logs
from tests.conftest import class_stream

EXPERIENCES, EPOCHS, BATCH = 3, 2, 8
STEPS = EXPERIENCES * EPOCHS * 5  # 40 samples an experience


class Net(torch.nn.Module):
    """A growing head, and dropout, which draws from the global random state at every step."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Dropout(0.3)
        )
        self.classifier = IncrementalClassifier(16, 2)

    def forward(self, x):
        return self.classifier(self.body(x))


CASES: dict[str, Any] = {
    "naive": lambda optimizer: [],
    "drl_ber": lambda optimizer: [DRLPlugin(1e-2), BERPlugin(5)],
    "drl_ber_on_device": lambda optimizer: [DeviceDataPlugin(), DRLPlugin(1e-2), BERPlugin(5)],
    "er": lambda optimizer: [ERPlugin(5)],
    "shuffle": lambda optimizer: [ShuffleReplayPlugin(5)],
    "ber_by_class": lambda optimizer: [
        DeviceDataPlugin(), BERPlugin(6, group_by="class", mode="balanced"),
    ],
    "er_with_their_memory": lambda optimizer: [ERPlugin(storage_policy=ClassBalancedBuffer(9))],
    # A memory smaller than its batch: the sampler draws anew in the middle of the epoch.
    "replay": lambda optimizer: [ReplayPlugin(6, batch_size_mem=4)],
    "replay_on_device": lambda optimizer: [DeviceDataPlugin(), ReplayPlugin(6, batch_size_mem=4)],
    "ewc": lambda optimizer: [EWCPlugin(1.0)],
    "lwf": lambda optimizer: [LwFPlugin(1.0, 2.0)],
    "si": lambda optimizer: [SynapticIntelligencePlugin(0.5)],
    "mas": lambda optimizer: [MASPlugin()],
    "rwalk": lambda optimizer: [RWalkPlugin()],
    "gem": lambda optimizer: [GEMPlugin(6, 0.5)],
    "schedule": lambda optimizer: [
        LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), reset_lr=False)
    ],
}  # fmt: skip


def build(case, extra=(), loggers=()):
    """The case's benchmark and strategy, seeded."""
    benchmark = class_stream(EXPERIENCES)
    RNGManager.set_random_seeds(3)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    evaluator = EvaluationPlugin(
        loss_metrics(epoch=True), accuracy_metrics(epoch=True, stream=True), loggers=list(loggers)
    )
    strategy = Naive(
        model=model, optimizer=optimizer, criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=BATCH, train_epochs=EPOCHS, eval_mb_size=64,
        plugins=[*CASES[case](optimizer), *extra], evaluator=evaluator,
    )  # fmt: skip
    return benchmark, strategy


def train(case, folder: Path, every, extra=(), **options):
    """Train what is left; everything that an uninterrupted run must share."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = Logs(folder)
    benchmark, strategy = build(case, extra, [logs.events, logs.board])
    checkpoints = Checkpoints(
        folder, strategy, benchmark, every=every, log_position=logs.position,
        rewind_logs=logs.rewind, **options,
    )  # fmt: skip
    metrics = checkpoints.resume().get("metrics", [])
    for k in range(len(metrics), EXPERIENCES):
        checkpoints.train(k, benchmark.train_stream[k])
        last = strategy.eval(benchmark.test_stream[: k + 1])
        metrics.append({name: float(value) for name, value in sorted(last.items())})
        checkpoints.save(k + 1, {"metrics": metrics})
    logs.board.writer.close()
    weights = torch.cat([p.detach().flatten() for p in strategy.model.parameters()])
    return {
        "weights": [w.hex() for w in weights.double().tolist()],
        "metrics": metrics,
        "history": {k: [list(c) for c in v] for k, v in sorted(
            strategy.evaluator.get_all_metrics().items())},
        "random": torch.get_rng_state().tolist()[:64],
        "steps": strategy.clock.train_iterations,
        "events": logs.events.path.read_text("utf-8").splitlines(),
    }  # fmt: skip


def train_to_file(case, folder: Path, every) -> None:
    """``train`` in a process of its own, which leaves its result in ``folder/end.json``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result = train(case, folder, every)
    draft = folder / "end.part"
    draft.write_text(json.dumps(result), "utf-8")
    draft.rename(folder / "end.json")
