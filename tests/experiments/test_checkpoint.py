"""A run that is killed goes on and ends with the same numbers, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from functools import cache

import pytest
import torch
from avalanche.training.plugins import AGEMPlugin, SupervisedPlugin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avalanche_ext.experiments.checkpoint import Checkpoints, UntrustedCheckpointError
from tests.experiments.checkpoint_cases import CASES, STEPS, build, train, train_to_file

pytestmark = pytest.mark.filterwarnings("ignore")


class Interrupted(Exception):  # noqa: N818 - a way out, not an error
    """Stands for the end of the process."""


class Stop(SupervisedPlugin):
    """End at a training step; the number is not part of the state."""

    at = -1

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == Stop.at:
            raise Interrupted


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    @cache
    def result(case):
        Stop.at = -1
        return train(case, tmp_path_factory.mktemp("whole"), None, [Stop()])

    return result


@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_as_if_it_had_not_been(case, every, tmp_path, uninterrupted):
    draw = random.Random(f"{case} {every}")
    stops = sorted(draw.sample(range(1, STEPS - 1), 2))
    for Stop.at in stops:
        with pytest.raises(Interrupted):
            train(case, tmp_path, every, [Stop()])
    Stop.at = -1
    assert train(case, tmp_path, every, [Stop()]) == uninterrupted(case)


@pytest.mark.parametrize("stop", range(1, 11))
def test_every_step_of_an_experience(stop, tmp_path, uninterrupted):
    """The second experience's ten steps, the last of an epoch and of the experience included."""
    Stop.at = 10 + stop
    with pytest.raises(Interrupted):
        train("drl_ber", tmp_path, 1, [Stop()])
    Stop.at = -1
    assert train("drl_ber", tmp_path, 1, [Stop()]) == uninterrupted("drl_ber")


def test_work_is_not_done_again(tmp_path):
    class Count(Stop):
        steps = 0

        def after_training_iteration(self, strategy, **kwargs):
            Count.steps += 1
            super().after_training_iteration(strategy, **kwargs)

    Stop.at = 17
    with pytest.raises(Interrupted):
        train("er", tmp_path, 5, [Count()])
    Stop.at, before = -1, Count.steps
    train("er", tmp_path, 5, [Count()])
    # The 18th step was under way; the last checkpoint was behind the 15th.
    assert (before, Count.steps - before) == (18, STEPS - 15)


def test_tensorboard_has_every_value_once(tmp_path, uninterrupted):
    def scalars(folder):
        found = EventAccumulator(str(folder / "tensorboard"))
        found.Reload()
        tags = found.Tags()["scalars"]
        return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags}

    Stop.at = -1
    train("drl_ber", tmp_path / "whole", None, [Stop()])
    for Stop.at in (3, 14, 23):
        with pytest.raises(Interrupted):
            train("drl_ber", tmp_path / "parts", 2, [Stop()])
    Stop.at = -1
    train("drl_ber", tmp_path / "parts", 2, [Stop()])
    assert scalars(tmp_path / "parts") == scalars(tmp_path / "whole")


# a real process that is killed -------------------------------------------------------------------


@pytest.mark.parametrize("case", ["drl_ber", "replay_on_device", "ewc", "lwf"])
def test_a_process_killed_at_random_moments_ends_with_the_same_numbers(
    case, tmp_path, uninterrupted
):
    """SIGKILL, at least six times in each of four cases, wherever the process happens to be."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.experiments.checkpoint_cases"])
    draw, kills = random.Random(case), 0
    for attempt in range(200):
        process = context.Process(target=train_to_file, args=(case, tmp_path, 1))
        process.start()
        # Longer and longer, so that a slow machine gets there too.
        process.join(draw.uniform(0, 0.4 + 0.05 * attempt) if kills < 6 else 120)
        if process.is_alive():
            assert kills < 6, "the process did not end"
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            continue
        assert process.exitcode == 0
        if kills >= 6:
            break
        for file in tmp_path.glob("end.json"):  # it was quicker than the killer: once more
            file.unlink()
        for file in tmp_path.glob("*.pt"):
            file.unlink()
    expected = {**uninterrupted(case), "events": None}
    found = {**json.loads((tmp_path / "end.json").read_text("utf-8")), "events": None}
    assert found == json.loads(json.dumps(expected))


# files -------------------------------------------------------------------------------------------


def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch, uninterrupted):
    Stop.at = 13
    with pytest.raises(Interrupted):
        train("er", tmp_path, 2, [Stop()])
    before = (tmp_path / "step.pt").read_bytes()
    real = torch.save

    def cut_short(state, file):
        real(state, file)
        file.truncate(100)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", cut_short)
    Stop.at = -1
    with pytest.raises(OSError, match="disk full"):
        train("er", tmp_path, 2, [Stop()])
    assert (tmp_path / "step.pt").read_bytes() == before
    monkeypatch.setattr(torch, "save", real)
    assert train("er", tmp_path, 2, [Stop()]) == uninterrupted("er")


def test_the_file_is_loaded_without_running_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    benchmark, strategy = build("naive")
    torch.save({"format": 2, "x": Evil()}, tmp_path / "experience.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        Checkpoints(tmp_path, strategy, benchmark).resume()
    assert not (tmp_path / "ran").exists()


class Opaque:
    """State that is neither a tensor nor a plain value."""

    __slots__ = ("value",)

    def __init__(self):
        self.value = 1

    def __reduce__(self):
        return (Opaque, ())


class WithOpaqueState(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        self.opaque = Opaque()


def test_pickled_state_needs_to_be_trusted(tmp_path):
    Stop.at = 12
    with pytest.raises(Interrupted):
        train("er", tmp_path, 1, [Stop(), WithOpaqueState()])
    Stop.at = -1
    with pytest.raises(UntrustedCheckpointError, match=r"WithOpaqueState.*--trust-checkpoint"):
        train("er", tmp_path, 1, [Stop(), WithOpaqueState()])
    result = train("er", tmp_path, 1, [Stop(), WithOpaqueState()], trusted=True)
    assert result["steps"] == STEPS


def test_what_cannot_even_be_pickled_is_run_without_checkpoints_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="AGEMPlugin cannot be saved"):
        result = train("naive", tmp_path, 1, [AGEMPlugin(6, 6)])
    assert result["steps"] == STEPS
    assert not (tmp_path / "experience.pt").exists()


def test_time_to_write_within_an_experience_is_told(tmp_path):
    for every in (None, 2):
        benchmark, strategy = build("naive")
        checkpoints = Checkpoints(tmp_path / str(every), strategy, benchmark, every=every)
        checkpoints.train(0, benchmark.train_stream[0])
        assert (checkpoints.seconds > 0) == (every is not None)
        checkpoints.every = None
        checkpoints.train(1, benchmark.train_stream[1])
        assert checkpoints.seconds == 0


def test_a_file_of_another_format_is_refused(tmp_path):
    benchmark, strategy = build("naive")
    torch.save({"format": 0}, tmp_path / "experience.pt")
    with pytest.raises(ValueError, match="format 0, and this version reads 2"):
        Checkpoints(tmp_path, strategy, benchmark).resume()


@pytest.mark.parametrize("damage", ["altered", "cut", "empty", "text"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    benchmark, strategy = build("naive")
    checkpoints = Checkpoints(tmp_path, strategy, benchmark)
    checkpoints.train(0, benchmark.train_stream[0])
    checkpoints.save(1, {})
    path = tmp_path / "experience.pt"
    whole = path.read_bytes()
    at = whole.index(strategy.model.body[0].weight.detach().numpy().tobytes()[:64])
    path.write_bytes({
        "altered": whole[: at + 20] + bytes([whole[at + 20] ^ 1]) + whole[at + 21 :],
        "cut": whole[: len(whole) // 2], "empty": b"", "text": b"nothing of the kind",
    }[damage])  # fmt: skip
    again = Checkpoints(tmp_path, build("naive")[1], benchmark)
    with pytest.raises(ValueError, match=r"experience\.pt is damaged"):
        again.resume()
    path.write_bytes(whole)
    again.resume()


def test_a_checkpoint_of_other_plugins_is_refused(tmp_path):
    Stop.at = 12
    with pytest.raises(Interrupted):
        train("er", tmp_path, 1, [Stop()])
    Stop.at = -1
    with pytest.raises(ValueError, match=r"plugins.*Stop.*this one has \['ERPlugin', 'Eval"):
        train("er", tmp_path, 1, [])


def test_a_step_count_of_none_at_all_is_refused(tmp_path):
    benchmark, strategy = build("naive")
    with pytest.raises(ValueError, match="1 or more; got 0"):
        Checkpoints(tmp_path, strategy, benchmark, every=0)
