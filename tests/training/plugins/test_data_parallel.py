"""Two processes on half of each batch take the steps that one process takes on the whole."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from avalanche.benchmarks.utils import data_loader
from avalanche.distributed import DistributedHelper
from avalanche.training.plugins import SupervisedPlugin

from avalanche_ext import MLP, BERPlugin, DRLPlugin, ERPlugin
from avalanche_ext.training import process_group
from avalanche_ext.training.distributed import rank_and_world, share
from avalanche_ext.training.plugins.data_parallel import DataParallelPlugin
from tests.training.distributed_workers.cases import (
    BATCH,
    CASES,
    LOOSE,
    WIDTH,
    benchmark,
    dtypes,
    strategy_for,
    train,
)

ROOT = Path(__file__).parents[3]
PATIENCE = 120  # seconds
WORLD = 2
RUNS = [(name, dtype) for name, case in CASES.items() for dtype in dtypes(*case)]
EXACT = {torch.float32: 1e-6, torch.float64: 1e-10}


def torchrun(module: str, *arguments: str) -> None:
    """Start ``WORLD`` processes; a dead-lock is an error, not a test that never ends."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(WORLD), *module.split(), *arguments]
    ours = {k: v for k, v in os.environ.items() if k not in process_group._TORCHRUN}
    process = subprocess.Popen(
        command, cwd=ROOT, env={**ours, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun then ends its processes
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"two processes did not finish in {PATIENCE} s:\n{output[-4000:]}")
    assert process.returncode == 0, output[-6000:]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What each of two processes recorded, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = "-m tests.training.distributed_workers.worker"
    torchrun(worker, str(folder), str(PATIENCE - 20))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="session")
def one_process():
    """The same case without the plugin, in this process; trained once."""
    records = {}

    def record(name, dtype):
        if (name, dtype) not in records:
            torch.set_num_threads(1)
            records[name, dtype] = train(name, dtype, parallel=False)
        return records[name, dtype]

    return record


def both(ranks, name, dtype=torch.float32):
    return [records[f"{name} {dtype}"] for records in ranks]


# the same steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_gradients_and_weights_are_those_of_one_process(ranks, one_process, name, dtype):
    alone = one_process(name, dtype)
    close = {"rtol": EXACT[dtype], "atol": EXACT[dtype]}
    for mine in both(ranks, name, dtype):
        assert len(mine["gradients"]) == len(alone["gradients"]) > 10
        assert mine["missing"] == alone["missing"]
        for ours, theirs in zip(mine["gradients"], alone["gradients"], strict=True):
            torch.testing.assert_close(ours, theirs, **close)
        torch.testing.assert_close(mine["weights"], alone["weights"], **close)


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_the_ranks_are_the_same_bit_for_bit(ranks, name, dtype):
    first, second = both(ranks, name, dtype)
    assert torch.equal(first["weights"], second["weights"])
    assert first["left_over"] == second["left_over"] == []
    for ours, theirs in zip(first["memories"], second["memories"], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_draws_are_disjoint_and_together_the_batch(ranks, one_process, name, dtype):
    alone = one_process(name, dtype)["rows"]
    first, second = (mine["rows"] for mine in both(ranks, name, dtype))
    assert len(alone) == len(first) == len(second)
    for batch, a, b in zip(alone, first, second, strict=True):
        if len(batch) < WORLD:
            assert torch.equal(a, batch)
            assert torch.equal(b, batch)
            continue
        assert len(a) + len(b) == len(batch)
        assert torch.equal(a, batch[0::2])
        assert torch.equal(b, batch[1::2])


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_memories_and_metrics_are_those_of_one_process(ranks, one_process, name, dtype):
    alone = one_process(name, dtype)
    for mine in both(ranks, name, dtype):
        assert len(mine["memories"]) == len(alone["memories"])
        for ours, theirs in zip(mine["memories"], alone["memories"], strict=True):
            assert torch.equal(ours, theirs)
        assert mine["metrics"] == pytest.approx(alone["metrics"])


def test_the_cases_have_what_they_are_there_for(one_process):
    sizes = {len(rows) for rows in one_process("naive", torch.float32)["rows"]}
    assert sizes == {8, 3, 1, 5}  # shared equally, not equally, not at all
    missing = one_process("tasks_naive", torch.float32)["missing"]
    assert any(any(step) for step in missing)  # heads without a gradient
    assert sum(map(len, one_process("ber", torch.float32)["memories"])) == 15


def test_a_head_that_only_one_rank_uses_gets_its_gradient(ranks):
    tasks = [[set(rows[:, -1].tolist()) for rows in mine["rows"]] for mine in both(ranks, "tasks")]
    assert any(a != b for a, b in zip(*tasks, strict=True))
    # ... and test_gradients_and_weights_are_those_of_one_process compares them.


# what is a rank's own -----------------------------------------------------------------------------


def test_batch_statistics_end_each_epoch_as_rank_0s(ranks):
    first, second = both(ranks, "batchnorm")
    assert first["buffers"]
    for ours, theirs in zip(first["buffers"], second["buffers"], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first["weights"], second["weights"])


def test_half_precision_overflows_on_all_ranks_or_none(ranks):
    first, second = both(ranks, "fp16")
    assert torch.equal(first["weights"], second["weights"])
    overflowed = [not gradients.any() for gradients in first["gradients"]]
    assert any(overflowed)
    assert not all(overflowed)


def test_a_models_noise_differs_and_does_not_disturb_the_draws(ranks):
    first, second = both(ranks, "noise")
    assert set(first["noise"]).isdisjoint(second["noise"])
    assert len(set(first["noise"])) == len(first["noise"])
    steps = len(first["rows"]) // 2
    for a, b in zip(first["rows"], second["rows"], strict=True):
        assert abs(len(a) - len(b)) <= 1
    # The last experience: its own 21 samples once in each of two epochs, whoever has them.
    last = torch.cat([*first["rows"][-6:], *second["rows"][-6:]])
    numbers = (last[:, 0] * 100).round().long()
    assert steps
    assert sorted(numbers[numbers >= 200].tolist()) == sorted([*range(200, 221)] * 2)


def test_avalanches_loaders_are_left_as_they_were(ranks):
    for records in ranks:
        assert records["distributed"]
        assert records["helper restored"]
    assert data_loader.DistributedHelper is DistributedHelper


# mistakes -----------------------------------------------------------------------------------------

MESSAGES = {
    "layers_of_heads": ["same layers of a batch", "layers that all tasks go through"],
    "odd_batch": ["2 processes", "train_mb_size=7"],
    "other_batch": ["same strategy", "train_mb_size: rank 0 has 8, rank 1 has 10"],
    "more_data": ["same experience", "samples: rank 0 has 19, rank 1 has 20"],
    "other_labels": ["same experience", "label sum"],
    "other_batches": ["same batches in an epoch", "rows and labels"],
    "other_memory": ["same memories", "ExemplarMemory 0"],
    "other_model": ["same model", "rank 0 has ((12, 5), 'torch.float32')"],
    "adds_too_late": ["part of a batch of 8 rows has 4", "the batch has 8"],
    "own_loop": ["OwnLoop", "strategy.backward()"],
    "batchnorm_on_cpu": ["sync_batchnorm=True", "CUDA", "cpu"],
    "data_parallel_model": ["inside a DataParallel"],
}


@pytest.mark.parametrize("mistake", MESSAGES)
def test_a_mistake_is_a_clear_error_on_every_rank(ranks, mistake):
    for records in ranks:
        for words in MESSAGES[mistake]:
            assert words in records[mistake]


def test_a_wrong_argument_is_refused():
    with pytest.raises(TypeError, match="sync_batchnorm to be True or False; got 1"):
        DataParallelPlugin(sync_batchnorm=1)  # type: ignore[arg-type]


# one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["naive", "ber", "drl_ber", "replay", "tasks"])
def test_outside_torchrun_it_changes_nothing(one_process, name):
    alone = one_process(name, torch.float32)
    mine = train(name, parallel=True)
    assert torch.equal(mine["weights"], alone["weights"])
    for key in ("rows", "gradients"):
        for ours, theirs in zip(mine[key], alone[key], strict=True):
            assert torch.equal(ours, theirs)


class Look(SupervisedPlugin):
    """Does something in the middle of training."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def after_backward(self, strategy, **kwargs):
        self.look(strategy)


def test_it_can_be_copied_and_pickled_in_training():
    plugin = DataParallelPlugin()
    strategy = strategy_for(MLP(WIDTH, (4,), 6), [plugin, ERPlugin(mem=3)], epochs=1)
    seen = []

    def look(strategy):
        assert rank_and_world(strategy) == (0, 1)
        seen.append(pickle.loads(pickle.dumps(copy.deepcopy(plugin))).world)

    strategy.plugins.append(Look(look))
    strategy.train(benchmark().train_stream[0], eval_streams=[])
    assert set(seen) == {1}


def test_it_can_be_pickled_while_it_splits_batches(ranks):
    for mine in both(ranks, "ber"):
        assert mine["pickled"] == [True]


@pytest.mark.slow
def test_the_example_trains_the_same_with_two_processes(tmp_path):
    script, found = str(ROOT / "examples" / "data_parallel.py"), []
    torchrun(script, "--smoke", "--out", str(tmp_path / "two"))
    alone = [sys.executable, script, "--smoke", "--out", str(tmp_path / "one")]
    subprocess.run(alone, cwd=ROOT, check=True, timeout=PATIENCE)
    for name, world in (("two", 2), ("one", 1)):
        found.append(json.loads((tmp_path / name / "result.json").read_text("utf-8")))
        assert found[-1]["world_size"] == world
    for key in ("accuracy_of_each_experience", "sum_of_weights"):
        assert found[0][key] == pytest.approx(found[1][key], abs=1e-4)


def test_main_is_rank_0_also_before_training(monkeypatch):
    assert DataParallelPlugin().is_main
    monkeypatch.setenv("RANK", "1")
    assert not DataParallelPlugin().is_main


# which rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [[8], [5, 0, 4], [1, 8, 8], [2, 3, 4, 5], [7, 1]])
def test_every_row_has_one_owner_in_order(sizes, world):
    numbers = torch.arange(sum(sizes))
    sources = list(numbers.split(sizes))
    shares = [share(sources, rank, world) for rank in range(world)]
    for rank, mine in enumerate(shares):
        assert torch.equal(torch.cat(mine), numbers[rank::world])
        assert len(mine) == len(sources)
    counts = [sum(map(len, mine)) for mine in shares]
    assert max(counts) - min(counts) <= 1


def test_fewer_rows_than_ranks_are_everyones():
    sources = [torch.tensor([4]), torch.tensor([7, 8])]
    for rank in range(4):
        assert torch.equal(torch.cat(share(sources, rank, 4)), torch.tensor([4, 7, 8]))


def test_a_strategy_without_the_plugin_is_one_process():
    strategy = strategy_for(MLP(WIDTH, (4,), 6), [DRLPlugin(), BERPlugin(mem=3)])
    assert rank_and_world(strategy) == (0, 1)
    assert strategy.train_mb_size == BATCH
    assert set(LOOSE).isdisjoint(CASES)
