"""The doctor calls healthy what is, names each fault, and leaves the caller's objects alone."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.logging import TextLogger
from avalanche.training.plugins import (
    EvaluationPlugin,
    SupervisedPlugin,
)

from avalanche_ext import BERPlugin, DRLPlugin, ERPlugin, PrecisionPlugin
from avalanche_ext.evaluation.metrics.device import accuracy_metrics
from avalanche_ext.experiments import benchmark_checks, doctor
from avalanche_ext.experiments import forecast as forecast_module
from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.experiments.doctor import examine, examine_recipe, forecast_text, memory_text
from avalanche_ext.experiments.forecast import _line, forecast
from avalanche_ext.experiments.micro_steps import HOOKS, take_micro_steps
from avalanche_ext.recipes import find_recipe, with_settings
from avalanche_ext.recipes.streams import SplitMNIST
from tests.conftest import class_stream, naive

from .doctor_faults import FAULTS, mlp, strategy_for, stream


def smoke(key, **changes):
    return dataclasses.replace(find_recipe(f"{key}/split_digits").smoke(), **changes)


def found(examination, level, check):
    return [f.text for f in examination.findings if (f.level, f.check) == (level, check)]


# health ---------------------------------------------------------------------------------------


def test_a_healthy_recipe_has_no_fault_and_a_forecast():
    examination = examine_recipe(smoke("drl_ber"))
    assert examination.healthy
    assert {f.level for f in examination.findings} == {"ok"}
    assert [f.check for f in examination.findings] == [
        "device", "streams", "inputs", "labels", "memory", "plugins", "hooks", "weights", "room",
    ]  # fmt: skip
    assert found(examination, "ok", "labels") == ["0 to 9 fit the head of 10 units"]
    assert found(examination, "ok", "weights") == ["all 6 trainable tensors moved"]
    needs = examination.forecast
    assert [(e.samples, e.steps, e.rows) for e in needs.experiences] == [
        (40, 4, 10), (40, 4, 20), (40, 4, 30), (40, 4, 40), (40, 4, 50),
    ]  # fmt: skip
    parameters = 64 * 100 + 100 + 100 * 100 + 100 + 100 * 10 + 10
    digits = 1797 * (64 * 4 + 8)
    assert needs.memory["weights and gradients"] == 2 * 4 * parameters
    assert needs.memory["exemplars"] == 50 * (64 * 4 + 8 + 8)
    assert needs.memory["optimizer"] == 0
    assert 0 < needs.memory["data sets"] < digits
    # Two hidden layers and the input are kept for the backward pass, for 50 rows.
    assert needs.memory["activations of a step"] > 50 * (64 + 100 + 100) * 4
    assert needs.peak_bytes == sum(needs.memory.values())
    assert needs.total == pytest.approx(needs.training + 5 * needs.evaluation)
    assert all(e.seconds > 0 for e in needs.experiences)
    assert forecast_text(needs).splitlines()[3].split()[:4] == ["1", "40", "4", "20"]
    assert memory_text(needs).splitlines()[-1].startswith("in all")


class Counter(SupervisedPlugin):
    """Steps and rows of every experience."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def before_training_exp(self, strategy, **kwargs):
        self.seen.append([0, 0])

    def after_training_iteration(self, strategy, **kwargs):
        self.seen[-1][0] += 1
        self.seen[-1][1] = max(self.seen[-1][1], len(strategy.mb_y))


@pytest.mark.parametrize("key", ["naive", "er", "ber", "shuffle_replay", "joint"])
def test_the_forecast_has_the_steps_and_rows_of_the_run(key):
    recipe = smoke(key, mem=20)
    benchmark = recipe.benchmark.build(0)
    counter = Counter()
    strategy = build_strategy(recipe, plugins=[counter])
    needs = forecast(strategy, benchmark, steps=3)
    assert counter.seen == []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
    assert [[e.steps, e.rows] for e in needs.experiences] == counter.seen


def test_momentum_is_counted_as_the_optimizers_and_epochs_as_time():
    needs = examine_recipe(smoke("naive", momentum=0.9)).forecast
    assert needs.memory["optimizer"] == needs.memory["weights and gradients"] / 2
    assert _line([1, 2, 4], 5) == [1, 2, 4, 6, 8]
    assert _line([3, 5], 4) == [3, 5, 5, 5]


def test_experiences_may_have_other_numbers_of_epochs(monkeypatch):
    """A second per step, nothing around them: what is left are the epochs."""
    measure = forecast_module._measure

    def a_second_each(*args):
        return dataclasses.replace(measure(*args), step=1.0, around=0.0)

    monkeypatch.setattr(forecast_module, "_measure", a_second_each)
    recipe = smoke("naive", epochs=2)
    strategy, benchmark = build_strategy(recipe), recipe.benchmark.build(0)
    assert [e.seconds for e in forecast(strategy, benchmark).experiences] == [8.0] * 5
    needs = forecast(strategy, benchmark, epochs_of=lambda k: 3 if k == 0 else 1)
    assert [e.seconds for e in needs.experiences] == [12.0, 4.0, 4.0, 4.0, 4.0]
    recipe = find_recipe("expandable_der/split_digits").smoke()
    recipe = dataclasses.replace(recipe, first_epochs=7, epochs=2, batch_size=10)
    first, second = examine_recipe(recipe).forecast.experiences[:2]
    assert (first.seconds, second.seconds) == (7 * first.steps, 2 * second.steps)


def test_every_hook_is_called_and_counted():
    recipe = smoke("drl_ber")
    report = take_micro_steps(build_strategy(recipe), recipe.benchmark.build(0))
    assert report.error is None
    assert set(report.hooks) == set(HOOKS)
    once_per_run = {h for h in HOOKS if "eval" in h}
    assert {h: n for h, n in report.hooks.items() if n != 2} == dict.fromkeys(once_per_run, 1)
    assert len(report.losses) == 2
    # Who puts the loaders in place, in which experience.
    loaders = {k: [type(p).__name__ for p in v] for k, v in report.authors.items() if "loader" in k}
    assert loaders == {
        ("before_training_epoch", "loader", 0): ["DeviceDataPlugin"],
        ("before_training_epoch", "loader", 1): ["DeviceDataPlugin", "BERPlugin"],
        ("before_eval_exp", "loader", 1): ["DeviceDataPlugin"],
    }


class Draws(SupervisedPlugin):
    def before_training_exp(self, strategy, **kwargs):
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002


def test_nothing_of_the_callers_is_changed(tmp_path):
    benchmark = class_stream(3)
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        evaluator = EvaluationPlugin(accuracy_metrics(epoch=True), loggers=[TextLogger(file)])
        memory = BERPlugin(mem=10)
        strategy = naive(mlp(), [memory, DRLPlugin(1e-3), Draws()], evaluator=evaluator)
        state = copy.deepcopy(strategy.model.state_dict())
        plugins, sizes = list(strategy.plugins), [len(e.dataset) for e in benchmark.train_stream]
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        python_state = random.getstate()
        examination = examine(strategy, benchmark)
        assert examination.healthy
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
        assert random.getstate() == python_state
        assert strategy.plugins == plugins
        assert strategy.evaluator is evaluator
    assert log.read_text() == ""
    assert all(torch.equal(v, state[k]) for k, v in strategy.model.state_dict().items())
    assert not strategy.optimizer.state
    assert len(memory.memory) == 0
    assert strategy.clock.train_iterations == 0
    assert strategy.train_epochs == 1
    assert [len(e.dataset) for e in benchmark.train_stream] == sizes
    assert not any(m._forward_hooks for m in strategy.model.modules())


# faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault):
    build, level, check, text = FAULTS[fault]
    examination = examine(*build(), steps=2)
    texts = found(examination, level, check)
    assert len(texts) == 1, examination.findings
    assert re.search(text, texts[0]), texts[0]
    assert "\n" not in texts[0]
    assert examination.healthy == (level == "warning")
    assert (examination.forecast is None) == (level == "error")


def test_parameters_outside_the_optimizer_or_the_loss_are_named():
    def weights(groups, model):
        strategy = strategy_for(model=model, parameters=groups)
        return [(f.level, f.text) for f in examine(strategy, stream()).findings
                if f.check == "weights"]  # fmt: skip

    model = mlp(2)
    ((level, text),) = weights(model[2].parameters(), model)
    assert level == "warning"
    assert text.startswith("trainable, but 0.weight, 0.bias not given to the optimizer: Avalanche")
    groups = [{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 0.0}]
    ((level, text),) = weights(groups, model)
    assert level == "warning"
    assert text.startswith("trainable, but 0.weight, 0.bias not trained by the optimizer: check")
    for parameter in model[0].parameters():
        parameter.requires_grad = False
    frozen = weights(model[2].parameters(), model)
    assert frozen == [("ok", "all 2 trainable tensors moved")]

    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = torch.nn.Linear(8, 2), torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    unused = examine(strategy_for(model=Idle()), stream())
    assert found(unused, "warning", "weights") == [
        "trainable, but idle.weight, idle.bias are not reached by the loss: freeze them, or check "
        "the forward pass"
    ]


def test_an_empty_experience_is_found_before_anything_is_read():
    whole = stream()
    empty = copy.copy(whole.train_stream[1])
    empty._dataset = empty.dataset.subset([])
    benchmark = SimpleNamespace(
        train_stream=[whole.train_stream[0], empty], test_stream=list(whole.test_stream)
    )
    examination = examine(strategy_for(), benchmark)
    assert [f.check for f in examination.findings] == ["device", "streams"]
    assert found(examination, "error", "streams") == [
        "every experience needs a sample; training experiences [1] have none: drop them, or check "
        "how the benchmark was split"
    ]


def test_a_memory_per_experience_needs_room_for_one_experience_only():
    examination = examine(strategy_for([BERPlugin(mem=1)]), stream(experiences=3))
    assert found(examination, "ok", "memory") == ["BERPlugin: 1 samples for 1 groups (experience)"]
    assert examination.healthy


def test_a_plugin_behind_the_clock_is_named():
    strategy = strategy_for()
    strategy.plugins.append(ERPlugin(4))
    texts = found(examine(strategy, stream()), "warning", "plugins")
    assert len(texts) == 1
    assert texts[0].startswith("the clock is expected last; ['ERPlugin'] come behind it")


def test_a_precision_that_the_device_lacks_is_named(monkeypatch):
    strategy = strategy_for([PrecisionPlugin("bf16")])
    healthy = examine(strategy, stream())
    assert found(healthy, "ok", "precision") == ["bf16 is there on cpu"]
    assert "forward" not in vars(strategy)
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: False)
    text = found(examine(strategy, stream()), "error", "precision")
    assert text == [
        "precision='bf16' needs autocast, which device 'cpu' does not have. Use precision='fp32'."
    ]


def test_a_growing_head_fits_every_label():
    from avalanche.models import SimpleMLP, as_multitask

    model = as_multitask(SimpleMLP(num_classes=6, input_size=8, hidden_size=4), "classifier")
    examination = examine(strategy_for(model=model), class_stream(3, task_labels=True))
    assert examination.healthy
    assert found(examination, "ok", "labels")[0].endswith("the head grows with them")


def test_a_device_that_is_not_there_stops_the_examination():
    examination = examine_recipe(smoke("naive"), device="abacus")
    assert [f.level for f in examination.findings] == ["error"]
    assert examination.findings[0].text.startswith("'abacus' cannot be used here")


def test_data_that_are_not_there_stop_the_examination(monkeypatch, tmp_path):
    import avalanche.benchmarks.datasets as places

    monkeypatch.setattr(places, "default_dataset_location", lambda name: str(tmp_path / name))
    recipe = dataclasses.replace(smoke("naive"), benchmark=SplitMNIST())
    examination = examine_recipe(recipe)
    assert [(f.level, f.check) for f in examination.findings] == [
        ("ok", "device"),
        ("error", "data"),
    ]
    assert examination.findings[1].text.startswith("FileNotFoundError: MNIST is not in")


def test_a_recipe_that_cannot_be_built_is_an_error():
    recipe = with_settings(smoke("ber"), {"mode": "evenly"})
    examination = examine_recipe(recipe)
    assert found(examination, "error", "strategy")[0].startswith(
        "ValueError: BERPlugin expects mode"
    )


def test_too_little_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "available_bytes", lambda device: 1_000)
    examination = examine(strategy_for(), stream())
    assert found(examination, "warning", "room")[0].startswith("expected less than 90 %")


def test_samples_that_are_no_tensors_are_named():
    class Words:
        targets = (0, 1)

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return "word", i

    class Experience:
        class dataset:  # noqa: N801
            @staticmethod
            def train():
                return Words()

    benchmark = type("B", (), {"train_stream": [Experience], "test_stream": []})
    (finding,) = benchmark_checks.check_samples(benchmark)
    assert "is a str: add ToTensor()" in finding.text
