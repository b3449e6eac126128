"""What the progress bar shows."""

from __future__ import annotations

import io

import pytest

from avalanche_ext.experiments.observers import Progress
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
