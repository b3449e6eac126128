"""One schedule for every experience, from a fresh optimizer."""

from __future__ import annotations

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive

from avalanche_ext import MLP, Schedule, SchedulePlugin
from tests.conftest import class_stream


class Watch(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        self.rates, self.fresh = [], []

    def before_update(self, strategy, **kwargs):
        if strategy.clock.train_exp_iterations == 0:
            self.fresh.append(not strategy.optimizer.state)
        if strategy.clock.train_epoch_iterations == 0:
            self.rates.append([g["lr"] for g in strategy.optimizer.param_groups])


@pytest.mark.parametrize("fresh", [True, False])
def test_every_experience_has_the_whole_schedule(fresh):
    watch, model = Watch(), MLP(8, (5,), 6)
    first, *rest = model.parameters()
    groups = [{"params": rest}, {"params": [first], "lr_factor": 3.0}]
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(groups, 1.0, 0.9), train_epochs=4, train_mb_size=8,
        plugins=[SchedulePlugin(Schedule(0.2, 2, (1,)), fresh=fresh), watch], evaluator=None,
    )  # fmt: skip
    for experience in class_stream(3).train_stream[:2]:
        strategy.train(experience)
    rates = [pair[0] for pair in watch.rates[:4]]
    assert rates == pytest.approx([0.1, 0.2, 0.2, 0.02])
    assert [pair[1] for pair in watch.rates] == pytest.approx([3 * p[0] for p in watch.rates])
    assert watch.rates[4:] == watch.rates[:4]
    assert watch.fresh == [True, fresh]


def test_what_is_no_schedule_is_refused():
    with pytest.raises(TypeError, match="Schedule\\(lr"):
        SchedulePlugin(0.1)
