"""With short lists of hooks, everything that is called is called as before, and nothing is lost."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from avalanche.evaluation import GenericPluginMetric, Metric, PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    forgetting_metrics,
    loss_metrics,
    timing_metrics,
)
from avalanche.logging import BaseLogger, InteractiveLogger, TextLogger
from avalanche.models import MultiTaskModule
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive

from avalanche_ext.training import lean_hooks
from avalanche_ext.training.lean_hooks import EVAL_EVENTS, TRAIN_EVENTS
from avalanche_ext.training.publishing import publish
from tests.conftest import class_stream, naive

STREAM = class_stream(2, n_per_class=6)
EVENTS = (*TRAIN_EVENTS, *EVAL_EVENTS)
NAMES = {f"_{event}" for event in EVENTS}


class Lean(SupervisedPlugin):
    """What ``DeviceDataPlugin`` does about hooks, alone."""

    def before_training_epoch(self, strategy, **kwargs):
        lean_hooks.install(strategy, TRAIN_EVENTS)

    def after_training_epoch(self, strategy, **kwargs):
        lean_hooks.remove(strategy, TRAIN_EVENTS)

    def before_eval_exp(self, strategy, **kwargs):
        lean_hooks.install(strategy, EVAL_EVENTS)

    def after_eval_exp(self, strategy, **kwargs):
        lean_hooks.remove(strategy, EVAL_EVENTS)


def linear():
    torch.manual_seed(1)
    return torch.nn.Linear(8, 6)


def trained(plugins, *, evaluator=None, make=naive, model=linear, **train):
    torch.manual_seed(0)
    strategy = make(model(), plugins, evaluator=evaluator, epochs=2, eval_every=1)
    for experience in STREAM.train_stream:
        strategy.train(experience, eval_streams=[STREAM.test_stream], **train)
    return strategy


def state(strategy):
    """The step, and what there is of the batch, when a hook is called."""
    batch = None if strategy.mbatch is None else strategy.mbatch[1].tolist()
    return strategy.clock.train_iterations, strategy.is_training, batch, strategy.loss.tolist()


class Base(SupervisedPlugin):
    def __init__(self, log, name="plugin"):
        super().__init__()
        self.log, self.name = log, name

    def note(self, event, strategy, kwargs):
        self.log.append((self.name, event, *state(strategy), sorted(kwargs.items())))


def _hook(event):
    def hook(self, strategy, **kwargs):
        self.note(event, strategy, kwargs)

    hook.__name__ = event
    hook.__qualname__ = f"Everything.{event}"
    return hook


class Everything(Base):
    """Every hook of the loop."""


for _event in EVENTS:
    setattr(Everything, _event, _hook(_event))


class Mixin:
    """Hooks that come by multiple inheritance, from a class that is no plugin."""

    def after_forward(self, strategy, **kwargs):
        self.note("after_forward", strategy, kwargs)

    def before_eval_iteration(self, strategy, **kwargs):
        self.note("before_eval_iteration", strategy, kwargs)


class Inherits(Mixin, Base):
    pass


class FromTheInstance(Base):
    """A hook put into the instance."""

    def __init__(self, log):
        super().__init__(log)
        self.before_backward = self.after_eval_forward = self.mine

    def mine(self, strategy, **kwargs):
        self.note("mine", strategy, kwargs)


class OnTheFly:
    """No base class; hooks are made when they are asked for."""

    def __init__(self, log):
        self.log = log

    def __getattr__(self, name):
        if name not in EVENTS:
            raise AttributeError(name)
        return lambda strategy, **kwargs: self.log.append((name, *state(strategy)))


class Intercepted(Base):
    """Hooks that are swapped for others when they are asked for."""

    def __getattribute__(self, name):
        if name in EVENTS:
            return lambda strategy, **kwargs: self.note(name, strategy, kwargs)
        return super().__getattribute__(name)


class Plain:
    """No base class, and only one hook."""

    def __init__(self, log):
        self.log = log

    def after_update(self, strategy, **kwargs):
        self.log.append(("after_update", *state(strategy)))


class Sub(Everything):
    """A subclass that goes back to an empty hook and keeps the others."""

    after_forward = SupervisedPlugin.after_forward

    def after_update(self, strategy, **kwargs):
        super().after_update(strategy, **kwargs)
        self.note("again", strategy, kwargs)


KINDS = [Everything, Inherits, FromTheInstance, OnTheFly, Intercepted, Plain, Sub]


@pytest.mark.filterwarnings("ignore:No loggers")
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_calls_in_the_same_order(kind, where):
    logs = []
    for lean in (False, True):
        log = []
        plugins = [kind(log), Everything(log, "other")]
        if lean:
            plugins.insert(where, Lean())
        strategy = trained(plugins, drop_last=True)
        assert not NAMES & vars(strategy).keys()
        logs.append(log)
    assert logs[0] == logs[1]
    steps = 2 * 2 * 2
    assert len(logs[0]) >= steps * 8


@pytest.mark.filterwarnings("ignore:No loggers")
def test_only_followers_are_called():
    """The other hooks, empty ones, are not in the lists: that is what saves the time."""
    lists = {}

    class Look(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            for event in EVENTS:
                if f"_{event}" in vars(strategy):
                    lists[event] = len(vars(strategy)[f"_{event}"].callbacks)

    trained([Lean(), Look(), *(SupervisedPlugin() for _ in range(5))])
    evaluator = 1
    expected = dict.fromkeys(TRAIN_EVENTS, evaluator)
    expected["before_forward"] += 1
    expected["after_training_iteration"] += 2  # periodic evaluation and the clock
    assert lists == expected


# values and loggers -----------------------------------------------------------------------------


class Lines(BaseLogger):
    """What is logged, and, as in ``InteractiveLogger``, what some hooks see."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_single_metric(self, name, value, x_plot):
        self.lines.append((name, value, x_plot))

    def after_training_iteration(self, strategy, metric_values, **kwargs):
        self.lines.append(("iteration", *state(strategy), [m.name for m in metric_values]))

    def before_eval_exp(self, strategy, metric_values, **kwargs):
        self.lines.append(("eval", strategy.experience.current_experience, len(metric_values)))


class Silent(BaseLogger):
    """No hooks: only values."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_single_metric(self, name, value, x_plot):
        self.lines.append((name, value, x_plot))


class Calls(Silent):
    """A logger that notices being called without any value."""

    def log_metrics(self, metric_values):
        self.lines.append([m.name for m in metric_values])


class Publishes(SupervisedPlugin):
    """Publishes numbers in some of its hooks."""

    def __init__(self, events):
        super().__init__()
        for event in events:
            setattr(self, event, Publisher(self, event))


class Publisher:
    def __init__(self, plugin, event):
        self.plugin, self.event = plugin, event

    def __call__(self, strategy, **kwargs):
        publish(self.plugin, strategy, self.event, strategy.clock.train_iterations / 7)


class Count(Metric):
    def __init__(self):
        self.n = 0

    def update(self, strategy):
        self.n += 1

    def result(self):
        return self.n

    def reset(self):
        self.n = 0


class Generic(GenericPluginMetric):
    def __init__(self, level, mode):
        super().__init__(Count(), level, level, mode)

    def update(self, strategy):
        self._metric.update(strategy)

    def __str__(self):
        return f"Count_{self._reset_at}_{self._mode}"


class Backward(PluginMetric):
    """A metric that follows a hook which no other does."""

    def __init__(self):
        super().__init__()
        self.value = 0.0

    def before_backward(self, strategy):
        self.value = float(strategy.loss)
        name = "Backward" if strategy.is_training else "never"
        return [MetricValue(self, name, self.value, strategy.clock.train_iterations)]

    def result(self):
        return self.value

    def reset(self):
        self.value = 0.0


def levels():
    return {"minibatch": True, "epoch": True, "experience": True, "stream": True}


METRICS = {
    "none": list,
    "minibatch": lambda: [*accuracy_metrics(minibatch=True), *loss_metrics(minibatch=True)],
    "epoch": lambda: [*accuracy_metrics(epoch=True), *loss_metrics(epoch=True)],
    "experience": lambda: [
        *accuracy_metrics(experience=True),
        *forgetting_metrics(experience=True),
    ],
    "all": lambda: [*accuracy_metrics(**levels()), *loss_metrics(**levels())],
    "generic": lambda: [
        *(Generic(level, "train") for level in ("iteration", "epoch", "experience")),
        *(Generic(level, "eval") for level in ("iteration", "experience", "stream")),
    ],
    "backward": lambda: [Backward()],
}


def logged(lean, where, metrics, logger, published, *, kind=EvaluationPlugin, **kwargs):
    log, plugins = logger(), [Publishes(published)]
    if lean:
        plugins.insert(where, Lean())
    evaluator = kind(METRICS[metrics](), loggers=[log], **kwargs)
    strategy = trained(plugins, evaluator=evaluator)
    assert evaluator._metric_values == []
    return log.lines, dict(evaluator.get_all_metrics()), evaluator.get_last_metrics(), strategy


@pytest.mark.parametrize("published", [(), ("after_backward",), EVENTS], ids=["", "one", "all"])
@pytest.mark.parametrize("logger", [Lines, Silent, Calls])
@pytest.mark.parametrize("metrics", METRICS)
def test_the_same_values_are_logged_in_the_same_order(metrics, logger, published):
    expected = logged(False, 0, metrics, logger, published)
    for where in (0, 1):
        found = logged(True, where, metrics, logger, published)
        assert found[:3] == expected[:3]
    if published:
        names = [line[0] for line in expected[0]] if logger is Silent else []
        per_step = [n for n in names if n.startswith("after_backward/")]
        assert len(per_step) == (2 * 2 * 3 if logger is Silent else 0)


@pytest.mark.parametrize("interactive", [False, True])
def test_avalanches_loggers_print_the_same(interactive, capsys):
    texts = []
    for first in ([], [Lean()]):
        file = io.StringIO()
        logger = InteractiveLogger() if interactive else TextLogger(file)
        evaluator = EvaluationPlugin(METRICS["all"](), loggers=[logger])
        trained([*first, Publishes(("after_backward",))], evaluator=evaluator)
        printed = capsys.readouterr().out if interactive else file.getvalue()
        texts.append([line for line in printed.splitlines() if "it/s" not in line])
    assert sum("after_backward/train_phase" in line for line in texts[0]) == 4
    assert texts[0] == texts[1]


def test_values_stay_where_they_are_while_the_evaluator_is_inactive():
    found = []
    for first in ([], [Lean()]):

        class Sleep(SupervisedPlugin):
            def before_training_iteration(self, strategy, **kwargs):
                strategy.evaluator.active = strategy.clock.train_iterations not in (1, 2)

        log = Silent()
        evaluator = EvaluationPlugin(METRICS["minibatch"](), loggers=[log])
        trained([*first, Sleep(), Publishes(("after_backward",))], evaluator=evaluator)
        found.append(log.lines)
    assert found[0] == found[1]


class OwnEvaluator(EvaluationPlugin):
    """An evaluator with a hook of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.hooked = []

    def after_update(self, strategy, **kwargs):
        self.hooked.append(strategy.clock.train_iterations)
        return self._update_metrics_and_loggers(strategy, "after_update")


def test_a_subclass_of_the_evaluator_keeps_its_hooks():
    one = logged(False, 0, "none", Silent, (), kind=OwnEvaluator)[3]
    other = logged(True, 0, "none", Silent, (), kind=OwnEvaluator)[3]
    assert one.evaluator.hooked == other.evaluator.hooked == list(range(12))


def test_metrics_are_given_the_logging_view_of_the_experience():
    class View(PluginMetric):
        def __init__(self):
            self.seen = []

        def after_forward(self, strategy):
            self.seen.append(strategy.experience._exp_mode.name)

        def result(self):
            return None

        def reset(self):
            pass

    view = View()
    trained([Lean()], evaluator=EvaluationPlugin([view], loggers=[Silent()]))
    assert set(view.seen) == {"LOGGING"}


def test_time_is_measured_in_the_hooks_that_it_needs():
    evaluator = EvaluationPlugin(timing_metrics(minibatch=True, epoch=True), loggers=[Silent()])
    strategy = trained([Lean()], evaluator=evaluator)
    times = strategy.evaluator.get_all_metrics()["Time_MB/train_phase/train_stream/Task000"]
    assert len(times[1]) == 12


# what stays the strategy's own ------------------------------------------------------------------


class Overrides(Naive):
    def _before_forward(self, **kwargs):
        self.before = getattr(self, "before", 0) + 1
        super()._before_forward(**kwargs)

    def forward(self):
        self.forwards = getattr(self, "forwards", 0) + 1
        return super().forward()


def overriding(model, plugins, *, epochs, eval_every, evaluator):
    return Overrides(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), train_mb_size=8,
        eval_mb_size=64, plugins=plugins, train_epochs=epochs, eval_every=eval_every,
        evaluator=evaluator,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:No loggers")
def test_a_strategy_class_keeps_its_own_methods():
    logs, strategies = [], []
    for first in ([], [Lean()]):
        log = []
        strategies.append(trained([*first, Everything(log)], make=overriding))
        logs.append(log)
    assert logs[0] == logs[1]
    one, other = strategies
    assert one.before == other.before == 12
    assert one.forwards == other.forwards > 12


@pytest.mark.filterwarnings("ignore:No loggers")
@pytest.mark.parametrize("name", ["_before_forward", "forward"])
def test_what_was_put_into_the_instance_is_kept(name):
    calls = []
    strategy = naive(linear(), [Lean()])
    original = getattr(strategy, name)

    def mine(**kwargs):
        calls.append(name)
        return original(**kwargs)

    setattr(strategy, name, mine)
    strategy.train(STREAM.train_stream[0], eval_streams=[])
    assert len(calls) == 3
    assert vars(strategy)[name] is mine


@pytest.mark.filterwarnings("ignore:No loggers")
def test_install_twice_and_remove_twice():
    log = []
    strategy = naive(linear(), [Everything(log)])
    before = set(vars(strategy))
    for _ in range(2):
        lean_hooks.install(strategy, TRAIN_EVENTS)
    assert set(vars(strategy)) - before == {f"_{e}" for e in TRAIN_EVENTS} | {"forward"}
    strategy.mbatch = [torch.zeros(1, 8), torch.zeros(1), torch.zeros(1)]
    strategy._before_forward()
    assert len(log) == 1
    lean_hooks.install(strategy, EVAL_EVENTS)
    for _ in range(2):
        lean_hooks.remove(strategy, EVAL_EVENTS)
        assert set(vars(strategy)) - before == {f"_{e}" for e in TRAIN_EVENTS} | {
            "forward", "mbatch"
        } - before  # fmt: skip
    for _ in range(2):
        lean_hooks.remove(strategy, TRAIN_EVENTS)
        assert set(vars(strategy)) == before
    strategy._before_forward()
    assert len(log) == 2


@pytest.mark.filterwarnings("ignore:No loggers")
def test_a_plugin_that_is_added_is_called_from_the_next_epoch_on():
    log = []

    class Adds(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            if strategy.clock.train_iterations == 1:
                strategy.plugins.insert(0, Everything(log))

    strategy = naive(linear(), [Lean(), Adds()], epochs=2)
    strategy.train(STREAM.train_stream[0], eval_streams=[])
    assert [entry[2] for entry in log if entry[1] == "before_forward"] == [3, 4, 5]


class Heads(MultiTaskModule):
    """A model that must be told of task labels."""

    def __init__(self):
        super().__init__()
        self.body = linear()
        self.told = []

    def forward(self, x, task_labels):
        self.told.append(None if task_labels is None else task_labels.tolist())
        return self.body(x)

    def forward_single_task(self, x, task_label):
        return self.body(x)


@pytest.mark.filterwarnings("ignore:No loggers")
def test_a_multi_task_model_is_told_of_task_labels():
    stream = class_stream(2, n_per_class=6, task_labels=True).train_stream
    found = []
    for first in ([], [Lean()]):
        torch.manual_seed(1)
        model = Heads()
        torch.manual_seed(0)
        strategy = naive(model, first)
        for experience in stream:
            strategy.train(experience, eval_streams=[])
        found.append((model.told, model.body.weight.tolist()))
    assert found[0] == found[1]
    assert {t for told in found[0][0] for t in told} == {0, 1}


@pytest.mark.filterwarnings("ignore:No loggers")
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copied_strategy_calls_its_own_plugins(clone):
    strategy = naive(linear(), [Everything([])])
    lean_hooks.install(strategy, TRAIN_EVENTS)
    twin = clone(strategy)
    twin.mbatch = strategy.mbatch = [torch.ones(1, 8), torch.zeros(1), torch.zeros(1)]
    twin._before_forward()
    assert (len(strategy.plugins[0].log), len(twin.plugins[0].log)) == (0, 1)
    with torch.no_grad():
        twin.model.weight.zero_()
        twin.model.bias.zero_()
    assert twin.forward().tolist() == [[0.0] * 6]
    assert strategy.forward().abs().sum() > 0


def test_what_a_listener_follows():
    assert not any(lean_hooks.follows(SupervisedPlugin(), event) for event in EVENTS)
    for event, kind in itertools.product(EVENTS, (Everything, OnTheFly, Intercepted)):
        assert lean_hooks.follows(kind([]), event)
    assert [e for e in EVENTS if lean_hooks.follows(Plain([]), e)] == ["after_update"]
    assert not lean_hooks.follows(Sub([]), "after_forward")
    assert lean_hooks.follows(Sub([]), "before_forward")
    assert not lean_hooks.follows(object(), "before_forward")
