"""What the progress bar shows."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from avalanche_ext.experiments import observers
from avalanche_ext.experiments.data_index import DataIndex
from avalanche_ext.experiments.observers import Progress
from avalanche_ext.experiments.state import capture, restore
from avalanche_ext.models.mlp import MLP
from tests.conftest import class_stream, naive


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_experience_epoch_throughput_and_time_left():
    benchmark = class_stream(3)
    sizes = [len(e.dataset) for e in benchmark.train_stream]
    screen = Terminal()
    progress = Progress("ER, seed 0", sizes, 2, file=screen)
    progress._bar.mininterval = 0
    strategy = naive(MLP(8, (4,), 6), plugins=[progress], epochs=2)
    seen = []
    for experience in benchmark.train_stream:
        strategy.train(experience)
        seen.append(progress._bar.n)
    assert seen == [2 * sum(sizes[: k + 1]) for k in range(3)]
    text = screen.getvalue()
    assert "ER, seed 0" in text
    assert "experience 1/3, epoch 1/2" in text
    assert "experience 3/3, epoch 2/2" in text
    assert " samples/s" in text
    assert "<00:0" in text  # tqdm: elapsed<left
    progress.close()


def test_experiences_of_an_earlier_process_are_no_throughput():
    progress = Progress("", [10, 20, 30], 3, file=Terminal())
    progress.skip(2)
    assert (progress._bar.n, progress._bar.initial) == (90, 90)


@pytest.mark.parametrize("shown", [None, False])
def test_nothing_is_drawn_where_nobody_looks(shown):
    file = io.StringIO()
    progress = Progress("title", [60, 60], 1, file=file, shown=shown)
    strategy = naive(MLP(8, (4,), 6), plugins=[progress])
    for experience in class_stream(2, n_per_class=20).train_stream:
        strategy.train(experience)
    progress.close()
    assert file.getvalue() == ""


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def strategy_at(experience, epoch=0, steps=2):
    clock = SimpleNamespace(train_exp_counter=experience, train_exp_epochs=epoch)
    return SimpleNamespace(clock=clock, dataloader=[None] * steps)


def test_without_a_terminal_it_says_a_line_per_experience_and_ten_seconds(monkeypatch):
    clock, said = Clock(), []
    monkeypatch.setattr(observers, "time", clock)
    progress = Progress("ER, seed 0", [100, 300, 50, 550], 2, file=io.StringIO(), say=said.append)
    for k, seconds in enumerate((4.0, 8.0, 9.0, 19.0)):
        for epoch in range(2):
            progress.before_training_epoch(strategy_at(k, epoch))
            for _ in range(2):
                progress.after_training_iteration(None)
            progress.after_training_epoch(None)
        clock.now += seconds
        progress.after_training_exp(None)
    assert said == [
        # 800 of 2,000 samples in 12 s: 18 s for the rest.
        "ER, seed 0: experience 2/4 trained on, 67 samples/s, 0:00:18 left",
        # 9 s later, at experience 3, nothing.
        "ER, seed 0: experience 4/4 trained on, 50 samples/s, 0:00:00 left",
    ]


def test_on_a_terminal_nothing_is_said(monkeypatch):
    clock, said = Clock(), []
    monkeypatch.setattr(observers, "time", clock)
    progress = Progress("title", [10], 1, file=Terminal(), say=said.append)
    progress.before_training_epoch(strategy_at(0))
    clock.now += 60
    progress.after_training_exp(None)
    assert said == []
    assert progress._bar.n == 10
    progress.close()


def test_by_default_nothing_is_said(monkeypatch):
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr(observers, "time", clock)
    progress = Progress("title", [10, 10], 1, file=file)
    progress.before_training_epoch(strategy_at(0))
    clock.now += 60
    progress.after_training_exp(None)
    assert file.getvalue() == ""


def test_an_empty_experience_has_no_forecast(monkeypatch):
    clock, said = Clock(), []
    monkeypatch.setattr(observers, "time", clock)
    progress = Progress("title", [0, 10], 1, file=io.StringIO(), say=said.append)
    progress.before_training_epoch(strategy_at(0))
    clock.now += 60
    progress.after_training_exp(None)
    assert said == []


def test_lines_count_from_where_this_process_began(monkeypatch):
    clock, said = Clock(), []
    monkeypatch.setattr(observers, "time", clock)
    progress = Progress("title", [1000, 100, 300], 1, file=io.StringIO(), say=said.append)
    progress.skip(1)
    progress.before_training_epoch(strategy_at(1))
    clock.now += 20
    progress.after_training_exp(None)
    assert said == ["title: experience 2/3 trained on, 5 samples/s, 0:01:00 left"]


@pytest.mark.parametrize("shown", [True, False])
def test_a_checkpoint_inside_an_experience_is_no_throughput(monkeypatch, shown):
    clock, said = Clock(), []
    monkeypatch.setattr(observers, "time", clock)
    sizes = [1000, 1000, 1000]
    first = Progress("title", sizes, 1, file=io.StringIO(), shown=True)
    first.before_training_epoch(strategy_at(1, steps=4))
    for _ in range(3):
        first.after_training_iteration(None)
    data = DataIndex(class_stream(2))
    state = capture(first, data)
    clock.now = 9999.0  # another process's clock
    second = Progress("title", sizes, 1, file=io.StringIO(), shown=shown, say=said.append)
    second.skip(1)
    second.before_training_epoch(strategy_at(1, steps=4))
    restore(second, state, data)
    second.after_training_iteration(None)
    if shown:
        assert (second._bar.initial, second._bar.n) == (1750, 2000)
    clock.now += 5
    second.after_training_epoch(None)
    second.after_training_exp(None)
    assert said == []
    clock.now += 5
    second.after_training_exp(None)
    expected = "title: experience 2/3 trained on, 25 samples/s, 0:00:40 left"
    assert said == ([] if shown else [expected])
    first.close()
    second.close()


def test_an_experience_that_stops_early_counts_as_done():
    progress = Progress("title", [10, 30], 5, file=io.StringIO(), shown=True)
    progress.before_training_epoch(strategy_at(0, epoch=0))
    progress.after_training_epoch(None)
    assert progress._bar.n == 10
    progress.after_training_exp(None)
    assert progress._bar.n == 50
    progress.close()


def test_the_forecast_is_over_the_whole_run():
    progress = Progress("title", [10], 1, file=io.StringIO(), shown=True)
    assert progress._bar.smoothing == 0
    assert progress._bar.miniters == 1
    progress.close()
