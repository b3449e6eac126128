"""Strategies and benchmarks with one fault each, for ``test_doctor``."""

from __future__ import annotations

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import GEMPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer
from avalanche.training.supervised import Naive

from avalanche_ext import BERPlugin, DRLPlugin, ShuffleReplayPlugin


def mlp(outputs=6, inputs=8):
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, 5), torch.nn.Tanh(), torch.nn.Linear(5, outputs)
    )


def stream(x=None, y=None, test_y=None, experiences=2):
    """Experiences of 12 samples of 8 numbers, labels 0 and 1 in each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 8, generator=generator) if x is None else x
    y = torch.arange(12) % 2 if y is None else y
    test_y = [y] * experiences if test_y is None else test_y
    return tensors_benchmark(
        train_tensors=[(x, y)] * experiences,
        test_tensors=[(x, t) for t in test_y],
        task_labels=[0] * experiences,
    )


class AddInfinity(SupervisedPlugin):
    def before_backward(self, strategy, **kwargs):
        strategy.loss = strategy.loss + float("inf")


class Reset(SupervisedPlugin):
    """Puts one weight back after every step."""

    def before_update(self, strategy, **kwargs):
        self.kept = strategy.model[0].weight.detach().clone()

    def after_update(self, strategy, **kwargs):
        with torch.no_grad():
            strategy.model[0].weight.copy_(self.kept)


class Sign(SupervisedPlugin):
    def after_backward(self, strategy, **kwargs):
        for p in strategy.model.parameters():
            p.grad.sign_()


class Double(SupervisedPlugin):
    def after_backward(self, strategy, **kwargs):
        for p in strategy.model.parameters():
            p.grad.mul_(2)


class OwnLoop(Naive):
    def training_epoch(self, **kwargs):
        for self.mbatch in self.dataloader:  # noqa: B020 - as Avalanche's loop
            self._unpack_minibatch()
            self.optimizer.zero_grad()
            self.mb_output = self.forward()
            self.loss = self.criterion()
            self.backward()
            self.optimizer_step()
            self._after_training_iteration(**kwargs)


def strategy_for(plugins=(), model=None, lr=0.1, kind=Naive, parameters=None):
    model = mlp(2) if model is None else model
    return kind(
        model=model,
        optimizer=torch.optim.SGD(parameters or model.parameters(), lr),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=4,
        eval_mb_size=4,
        plugins=list(plugins),
        evaluator=None,
    )


PLUGIN = DRLPlugin(1e-3)
FAULTS = {
    "labels": (lambda: (strategy_for(), stream(y=torch.arange(12) % 3)),
               "error", "labels", r"a head of 2 units.*got labels 0 to 2: give the model a wider"),
    "negative labels": (lambda: (strategy_for(), stream(y=torch.arange(12) % 2 - 1)),
                        "error", "labels", "got labels -1 to 0"),
    "unknown test labels": (lambda: (strategy_for(), stream(test_y=[torch.arange(12) % 4] * 2)),
                            "error", "streams", r"expects labels \[2, 3\] that no training"),
    "other test labels": (
        lambda: (strategy_for(), stream(test_y=[torch.arange(12) % 2, torch.zeros(12).long()])),
        "warning", "streams", r"test experiences \[1\] have other labels"),
    "one test experience": (lambda: (strategy_for(), stream(test_y=[torch.arange(12) % 2])),
                            "warning", "streams", "got 1 test experiences for 2 training"),
    "nan": (lambda: (strategy_for(), stream(x=torch.full((12, 8), float("nan")))),
            "error", "inputs", "sample 0 of training experience 0 has NaN or infinity"),
    "bytes": (lambda: (strategy_for(), stream(x=torch.ones(12, 8, dtype=torch.uint8))),
              "error", "inputs", r"got bytes \(uint8\): add ToTensor"),
    "range": (lambda: (strategy_for(), stream(x=torch.arange(96.0).view(12, 8))),
              "warning", "inputs", "got 0 to 95: scale or normalise"),
    "constant": (lambda: (strategy_for(), stream(x=torch.ones(12, 8))),
                 "warning", "inputs", "every number is 1"),
    "shape": (lambda: (strategy_for(), stream(x=torch.randn(12, 7))),
              "error", "model", r"takes inputs of shape \(7,\); Sequential raises RuntimeError"),
    "our memory": (
        lambda: (strategy_for([BERPlugin(mem=2, mem_scope="total")]), stream(experiences=3)),
        "error", "memory", r"BERPlugin expects room for each of 3 groups.*holds 2 samples in all"),
    "class memory": (
        lambda: (strategy_for([BERPlugin(mem=1, group_by="class")]), stream()),
        "error", "memory", r"each of 2 groups \(class\).*holds 1 samples per experience"),
    "stock memory": (
        lambda: (strategy_for([ReplayPlugin(1, storage_policy=ClassBalancedBuffer(1))]), stream()),
        "error", "memory", r"ReplayPlugin expects room for each of 2 groups \(class\)"),
    "no memory": (lambda: (strategy_for([GEMPlugin(0, 0.5)]), stream()),
                  "error", "memory", "GEMPlugin expects 1 sample per experience or more; got pat"),
    "twice": (lambda: (strategy_for([PLUGIN, PLUGIN]), stream()),
              "error", "plugins", r"\['DRLPlugin'\] are in the list twice"),
    "loaders": (lambda: (strategy_for([ReplayPlugin(4), ReplayPlugin(4)]), stream()),
                "error", "conflict", "ReplayPlugin and ReplayPlugin all replace the loader in "
                "before_training_exp, and only ReplayPlugin's batches come"),
    "shuffle": (lambda: (strategy_for([ShuffleReplayPlugin(4), ReplayPlugin(4)]), stream()),
                "error", "micro-step", "training experience 1, after before_training_epoch: "
                "ValueError.*ReplayDataLoader"),
    "order": (lambda: (strategy_for([Sign(), Double()]), stream()),
              "warning", "order", "Sign and Double all change the gradients in after_backward"),
    "infinite loss": (lambda: (strategy_for([AddInfinity()]), stream()),
                      "error", "loss", r"expected finite losses; got \[inf, inf\]"),
    "no learning rate": (lambda: (strategy_for(lr=0.0), stream()),
                         "error", "weights", "none moved: check the learning rate"),
    "held back": (lambda: (strategy_for([Reset()]), stream()),
                  "error", "weights", "0.weight expected to move with their gradients"),
    "silent hooks": (lambda: (strategy_for([DRLPlugin(1e-3)], kind=OwnLoop), stream()),
                     "warning", "hooks", r"DRLPlugin expects before_forward, after_forward, "
                     r"before_backward, which OwnLoop never calls"),
    "dead units": (lambda: (strategy_for(), stream(x=torch.zeros(12, 8))),
                   "warning", "weights", "0.weight have gradients of zero"),
    "batch of one": (
        lambda: (
            strategy_for(model=torch.nn.Sequential(
                torch.nn.Linear(8, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))),
            stream(x=torch.randn(13, 8), y=torch.arange(13) % 2)),
        "warning", "batches", r"epochs of experiences \[0, 1\] end in a batch of one"),
}  # fmt: skip
