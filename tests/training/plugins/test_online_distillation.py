"""Online distillation inside the training loop, against steps computed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from avalanche.models import MTSimpleMLP
from torch.nn import functional as F

from avalanche_ext import HATNet, HATPlugin
from avalanche_ext.functional.kept_outputs import output_drift
from avalanche_ext.training.plugins.online_distillation import OnlineDistillationPlugin
from tests.conftest import class_stream
from tests.training.plugins.online_runs import Fixed, Watch, inputs, mlp, noisy_net, run, state

LR = 0.05


def distilled(before, batch, x, *, lam, steps, temperature, rate=LR):
    """What one iteration makes of the weights ``before``: in float64, with plain autograd."""
    model = mlp().double()
    model.load_state_dict(before)
    params, x = list(model.parameters()), x.double()
    y = model(x).detach()
    drifts = []
    F.cross_entropy(model(batch[0].double()), batch[1]).backward()
    with torch.no_grad():
        for p in params:
            p -= rate * p.grad
    for _ in range(steps):
        z = model(x)
        if temperature is None:
            drift = ((z - y) ** 2).sum() / len(x)
        else:
            p, q = (y / temperature).softmax(1), (z / temperature).softmax(1)
            drift = temperature**2 * (p * (p / q).log()).sum() / len(x)
        drifts.append(drift.item())
        slopes = torch.autograd.grad(drift, params)
        with torch.no_grad():
            for p, slope in zip(params, slopes, strict=True):
                p -= lam * rate * slope
    return model.state_dict(), drifts


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_iteration_is_the_step_and_then_steps_back_to_the_outputs_before(steps, temperature):
    watch, x = Watch(), inputs()
    plugin = OnlineDistillationPlugin(
        0.4, steps=steps, temperature=temperature, source=Fixed(x), n_inputs=5
    )
    run(mlp(), [watch, plugin], n=2, lr=LR)
    for step in watch.steps[5:]:
        want, drifts = distilled(
            step["before"], step["batch"], x, lam=0.4, steps=steps, temperature=temperature
        )
        for name, value in want.items():
            torch.testing.assert_close(step["after"][name].double(), value, rtol=0, atol=2e-6)
    assert float(plugin.last) == pytest.approx(drifts[0], rel=2e-3)  # float32


def test_enough_steps_bring_the_outputs_back_and_cost_the_batch_little():
    def drift_and_loss(plugins):
        watch, x = Watch(), inputs(4)
        run(mlp(), [watch, *plugins(Fixed(x))], n=2, lr=LR)
        step, model, drift = watch.steps[5], mlp(), []
        for when in ("before", "after"):
            model.load_state_dict(step[when])
            drift.append(model(x))
        loss = F.cross_entropy(model(step["batch"][0]), step["batch"][1])
        return output_drift(*drift).item(), loss.item()

    plain = drift_and_loss(lambda source: [])
    kept = drift_and_loss(lambda source: [OnlineDistillationPlugin(1.0, steps=100, source=source)])
    assert kept[0] < 0.02 * plain[0]
    assert plain[1] < kept[1]  # and what it brings back is part of the step


def test_the_optimizers_state_knows_nothing_of_the_steps():
    def moments(plugins):
        strategy = run(
            mlp(), plugins, n=1,
            optimizer=lambda params: torch.optim.SGD(params, LR, momentum=0.9, weight_decay=0.1),
        )  # fmt: skip
        return [s["momentum_buffer"] for s in strategy.optimizer.state.values()]

    class FirstStep(OnlineDistillationPlugin):
        """Distil in the last iteration alone, where no gradient can follow."""

        def draw(self, strategy):
            last = strategy.clock.train_iterations == 4
            return (inputs(), torch.zeros(5, dtype=torch.int64)) if last else None

    plugin = FirstStep()
    assert all(map(torch.equal, moments([plugin]), moments([])))
    assert plugin.last > 0


def test_each_parameter_moves_at_its_own_groups_rate():
    def groups(params):
        *body, weight, bias = params
        frozen = {"params": [weight, bias], "lr": 0.0}
        return torch.optim.SGD([{"params": body, "lr": LR}, frozen])

    start = state(mlp().classifier)
    strategy = run(mlp(), [OnlineDistillationPlugin(source="previous_batch")], optimizer=groups)
    end = state(strategy.model.classifier)
    assert all(torch.equal(end[name], start[name]) for name in start)


def test_frozen_parts_and_networks_stay():
    model = mlp()
    model.features.requires_grad_(False)
    start = state(model.features)
    plugin = OnlineDistillationPlugin()
    run(model, [plugin])
    assert plugin.last > 0
    assert all(torch.equal(value, start[name]) for name, value in state(model.features).items())
    model = torch.nn.Sequential(mlp(), torch.nn.Linear(6, 6))
    other = OnlineDistillationPlugin(source=Fixed(inputs()))
    model.forward = lambda x: (
        (model[0](x).detach() + 0 * x[:, :6]) + (model[1].bias if model.training else 0)
    )
    run(model, [other])  # in evaluation mode these outputs depend on nothing that is trained
    assert other.last is None


def test_the_head_of_another_task_is_left_alone():
    stream = class_stream(task_labels=True).train_stream
    torch.manual_seed(0)
    watch = Watch()
    run(MTSimpleMLP(8, 16), [watch, OnlineDistillationPlugin()], stream=stream)
    # From the second task on the memory holds the first task, whose head the batch does not use.
    first = "classifier.classifiers.0.classifier.weight"
    second = "classifier.classifiers.1.classifier.weight"
    assert not torch.equal(watch.steps[5]["before"][first], watch.steps[5]["after"][first])
    for step in watch.steps[:5]:
        assert second not in step["after"] or torch.equal(
            step["before"][second], step["after"][second]
        )


def test_weights_that_hat_holds_stay_held():
    stream = class_stream(task_labels=True, n_classes=6).train_stream

    def first_task_outputs(order):
        torch.manual_seed(0)
        model = HATNet(mlp(16, 12, classes=0), hard=True)
        plugins = [HATPlugin(), OnlineDistillationPlugin(0.3, mem=20)][::order]
        strategy = run(model, plugins, n=1, stream=stream, epochs=2)
        x = torch.stack([x for x, *_ in stream[0].dataset])
        found = []
        for experience in (None, *stream[1:]):
            if experience is not None:
                strategy.train(experience, eval_streams=[])
            strategy.model.eval()
            found.append(strategy.model(x, 0)[:, :2].detach())
        return found

    for order in (1, -1):
        first, *later = first_task_outputs(order)
        for outputs in later:
            torch.testing.assert_close(outputs, first, rtol=0, atol=1e-5)


def test_batch_of_one_and_a_model_in_evaluation_mode():
    model = noisy_net()
    model[1].eval()
    strategy = run(model, [OnlineDistillationPlugin(source="previous_batch")], batch=40)
    assert strategy.model[1].training  # Avalanche's train() at every experience
    model = copy.deepcopy(mlp())
    plugin = OnlineDistillationPlugin(n_inputs=1, mem=1)
    run(model, [plugin], batch=1)
    assert plugin.last >= 0


def test_bad_arguments():
    for settings in ({"steps": None}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="steps >= 1, and temperature > 0 or None"):
            OnlineDistillationPlugin(**settings)
    with pytest.raises(ValueError, match="steps=0"):
        OnlineDistillationPlugin(steps=0)
    with pytest.raises(TypeError, match="steps >= 1"):
        OnlineDistillationPlugin(steps=1.5)
    with pytest.raises(ValueError, match="lam=-1"):
        OnlineDistillationPlugin(-1)
    with pytest.raises(ValueError, match="temperature=-2"):
        OnlineDistillationPlugin(temperature=-2)
