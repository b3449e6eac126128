"""Small runs of the three plugins of online generative memory, and what they share."""

from __future__ import annotations

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.plugins.online_distillation import OnlineDistillationPlugin
from avalanche_ext.training.plugins.online_lookahead import OnlineLookaheadPlugin
from avalanche_ext.training.plugins.online_projection import OnlineProjectionPlugin
from tests.conftest import class_stream, naive

PLUGINS = {
    "lookahead": OnlineLookaheadPlugin,
    "distillation": OnlineDistillationPlugin,
    "projection": OnlineProjectionPlugin,
}


class Fixed:
    """A generator that always gives the same inputs, and notes how it was asked."""

    def __init__(self, x):
        self.x, self.asked = x, []

    def sample(self, n, *, generator):
        self.asked.append((n, generator.initial_seed()))
        return self.x


class Watch(SupervisedPlugin):
    """The weights before every iteration and behind it, with its batch."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def before_training_iteration(self, strategy, **kwargs):
        batch = [column.clone() for column in strategy.mbatch]
        self.steps.append({"batch": batch, "before": state(strategy.model)})

    def after_training_iteration(self, strategy, **kwargs):
        self.steps[-1]["after"] = state(strategy.model)


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def weights(strategy):
    return torch.cat([v.detach().double().flatten() for v in strategy.model.state_dict().values()])


def mlp(*widths, classes=6, in_features=8):
    torch.manual_seed(0)
    return MLP(in_features, widths or (16, 12), classes)


def noisy_net(width=8):
    """Batch statistics and dropout: what a forward pass in training mode would disturb."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, 16),
        nn.BatchNorm1d(16, affine=False),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 6),
    )


def inputs(n=5, width=8, seed=9):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def run(model, plugins, *, n=3, seed=1, stream=None, optimizer=None, **kwargs):
    """Train on the first ``n`` experiences of a class-incremental stream."""
    stream = class_stream().train_stream if stream is None else stream
    strategy = naive(model, plugins, **kwargs)
    if optimizer is not None:
        strategy.optimizer = optimizer(model.parameters())
    torch.manual_seed(seed)
    for experience in stream[:n]:
        strategy.train(experience, eval_streams=[])
    return strategy
