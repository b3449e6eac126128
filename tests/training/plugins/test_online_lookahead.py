"""Online look-ahead inside the training loop, against steps computed by hand."""

from __future__ import annotations

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch.nn import functional as F

from avalanche_ext import DRLPlugin
from avalanche_ext.training.plugins.online_lookahead import OnlineLookaheadPlugin
from tests.conftest import class_stream
from tests.training.plugins.online_runs import Fixed, Watch, inputs, mlp, run

LR = 0.05


def network(params, x):
    first, a, second, b, third, c = params
    h = torch.relu(x.flatten(1) @ first.T + a)
    return torch.relu(h @ second.T + b) @ third.T + c


def looked_ahead(before, batch, x, *, lam, steps, form, rate=LR):
    """What one iteration makes of the weights ``before``: in float64, with plain autograd."""
    params = [v.double().requires_grad_() for v in before.values()]
    current, x = batch[0].double(), x.double()
    y = network(params, x).detach()
    values = []
    for _ in range(steps):
        loss = F.cross_entropy(network(params, current), batch[1])
        slopes = torch.autograd.grad(loss, params, create_graph=form != "first_order")
        ahead = [p - rate * s for p, s in zip(params, slopes, strict=True)]
        anchor = network(params, x) if form == "moving" else y
        drift = ((network(ahead, x) - anchor) ** 2).sum() / len(x)
        values.append(drift.item())
        found = torch.autograd.grad(drift, params)
        params = [
            (p - lam * rate * g).detach().requires_grad_()
            for p, g in zip(params, found, strict=True)
        ]
    loss = F.cross_entropy(network(params, current), batch[1])
    slopes = torch.autograd.grad(loss, params)
    end = [(p - rate * s).detach() for p, s in zip(params, slopes, strict=True)]
    return dict(zip(before, end, strict=True)), values


@pytest.mark.parametrize("form", ["second_order", "first_order", "moving"])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_iteration_is_the_safe_steps_and_then_the_step_from_there(steps, form):
    watch, x = Watch(), inputs()
    plugin = OnlineLookaheadPlugin(0.7, steps=steps, form=form, source=Fixed(x), n_inputs=5)
    run(mlp(), [watch, plugin], n=2, lr=LR)
    for step in watch.steps[5:]:
        want, values = looked_ahead(
            step["before"], step["batch"], x, lam=0.7, steps=steps, form=form
        )
        for name, value in want.items():
            torch.testing.assert_close(step["after"][name].double(), value, rtol=0, atol=2e-6)
    assert float(plugin.last) == pytest.approx(values[0], rel=1e-4)


def test_the_step_that_follows_moves_the_outputs_less():
    def moved(plugins):
        watch, x = Watch(), inputs()
        run(mlp(), [watch, *plugins(Fixed(x))], n=2, lr=LR)
        step = watch.steps[5]
        before, after = (network(list(step[k].values()), x) for k in ("before", "after"))
        return float((before - after).square().sum())

    plain = moved(lambda source: [])
    safe = moved(lambda s: [OnlineLookaheadPlugin(1.0, steps=20, source=s)])
    literal = moved(lambda s: [OnlineLookaheadPlugin(1.0, steps=20, form="moving", source=s)])
    assert safe < 0.2 * plain
    assert literal > 0.5 * plain  # it may move before the step as much as it likes


def test_the_strategys_own_criterion_is_asked():
    class Weighted(Naive):
        def criterion(self):
            return 3 * super().criterion()

    def train(cls, rate):
        model, watch = mlp(), Watch()
        strategy = cls(
            model=model, optimizer=torch.optim.SGD(model.parameters(), rate), train_mb_size=8,
            plugins=[watch, OnlineLookaheadPlugin(0.3, source=Fixed(inputs()), n_inputs=5)],
            evaluator=None,
        )  # fmt: skip
        torch.manual_seed(1)
        for experience in class_stream().train_stream[:2]:
            strategy.train(experience, eval_streams=[])
        return watch.steps

    step = train(Weighted, LR)[5]
    params = {k: v.double() for k, v in step["before"].items()}

    def by_hand(weight):
        ps = [v.clone().requires_grad_() for v in params.values()]
        x, y = step["batch"][0].double(), step["batch"][1]
        kept = inputs().double()
        target = network(ps, kept).detach()
        loss = weight * F.cross_entropy(network(ps, x), y)
        slopes = torch.autograd.grad(loss, ps, create_graph=True)
        ahead = [p - LR * s for p, s in zip(ps, slopes, strict=True)]
        drift = ((network(ahead, kept) - target) ** 2).sum() / len(kept)
        ps = [
            (p - 0.3 * LR * g).detach().requires_grad_()
            for p, g in zip(ps, torch.autograd.grad(drift, ps), strict=True)
        ]
        slopes = torch.autograd.grad(3 * F.cross_entropy(network(ps, x), y), ps)
        return [(p - LR * s).detach() for p, s in zip(ps, slopes, strict=True)]

    after = [v.double() for v in step["after"].values()]
    torch.testing.assert_close(after, by_hand(3), rtol=0, atol=2e-6)
    assert max(float((a - b).abs().max()) for a, b in zip(after, by_hand(1), strict=True)) > 1e-5


def test_the_last_output_is_still_there_when_an_iteration_begins():
    class Last(SupervisedPlugin):
        output = None

        def before_training_iteration(self, strategy, **kwargs):
            assert strategy.mb_output is self.output

        def after_training_iteration(self, strategy, **kwargs):
            self.output = strategy.mb_output

    plugin = OnlineLookaheadPlugin(source="previous_batch")
    run(mlp(), [plugin, Last()], n=1)
    assert plugin.last > 0


def test_other_plugins_record_their_own_forward_pass_alone():
    # DRL's hooks would hear these passes if they came between its attach and its detach.
    for plugins in ([DRLPlugin(1e-3), OnlineLookaheadPlugin()],
                    [OnlineLookaheadPlugin(), DRLPlugin(1e-3)]):  # fmt: skip
        run(mlp(), plugins, n=2)
        drl = next(p for p in plugins if isinstance(p, DRLPlugin))
        assert set(drl.last) == {"L_bt", "L_wi", "L_DR"}


def test_gradients_that_are_there_stay():
    seen = []

    class Look(OnlineLookaheadPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            marks = [torch.full_like(p, 7.0) for p in strategy.model.parameters()]
            for p, mark in zip(strategy.model.parameters(), marks, strict=True):
                p.grad = mark
            super().before_training_iteration(strategy, **kwargs)
            seen.append(all(bool((p.grad == 7).all()) for p in strategy.model.parameters()))

    run(mlp(), [Look()], n=2)
    assert seen == [True] * 10


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"'second_order', 'first_order', 'moving'.*'third'"):
        OnlineLookaheadPlugin(form="third")
    with pytest.raises(TypeError, match="steps >= 1; got None"):
        OnlineLookaheadPlugin(steps=None)
    with pytest.raises(ValueError, match="steps=0"):
        OnlineLookaheadPlugin(steps=0)
    with pytest.raises(ValueError, match=r"lam=-0\.1"):
        OnlineLookaheadPlugin(-0.1)
