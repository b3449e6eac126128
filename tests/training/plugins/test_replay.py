"""What BER, ER and Shuffle train on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.models import MTSimpleMLP

from avalanche_ext.training.plugins.ber import BERPlugin
from avalanche_ext.training.plugins.er import ERPlugin
from avalanche_ext.training.plugins.shuffle_replay import ShuffleReplayPlugin
from tests.conftest import blobs, class_stream, naive
from tests.training.plugins.replaying import numbered, origins, trained

PLUGINS = {"BER": BERPlugin, "ER": ERPlugin, "Shuffle": ShuffleReplayPlugin}


def test_ber_trains_on_b_current_samples_and_b_of_each_past_experience():
    batches, _ = trained([BERPlugin(mem=5)], numbered([20, 12, 9, 17]))
    for t, steps in enumerate(batches):
        assert [len(b[0]) for b in steps] == [
            n + 8 * t for n in ([8, 8, 4], [8, 4], [8, 1], [8, 8, 1])[t]
        ]
        for batch in steps:
            assert all(Counter(origins(batch))[past] == 8 for past in range(t))


@pytest.mark.parametrize("plugin", [BERPlugin, ERPlugin, ShuffleReplayPlugin])
def test_replayed_samples_are_at_most_mem_of_each_past_experience(plugin):
    batches, _ = trained([plugin(mem=5)], numbered([40] * 4), epochs=4)
    for t, steps in enumerate(batches):
        seen = {n for b in steps for n in b[0]}
        counts = Counter(n // 1000 for n in seen)
        assert counts == {**dict.fromkeys(range(t), 5), t: 40}
        for numbers, labels, _ in steps:
            assert labels == [2 * (n // 1000) + n % 2 for n in numbers]


def test_er_replays_b_samples_however_many_experiences_there_were():
    batches, _ = trained([ERPlugin(mem=2)], numbered([16] * 19), batch=16)
    for t, steps in enumerate(batches):
        (batch,) = steps
        assert Counter(n == t for n in origins(batch)) == Counter(
            [True] * 16 + [False] * 16 * (t > 0)
        )
    last = Counter(n for n in origins(batches[18][0]) if n < 18)
    assert len(last) > 8


@pytest.mark.parametrize(("size", "rows"), [(3, 3), (20, 20), (None, 8)])
def test_er_replays_batch_size_mem_samples(size, rows):
    batches, _ = trained([ERPlugin(mem=4, batch_size_mem=size)], numbered([16, 16]))
    assert [len(b[0]) for b in batches[1]] == [8 + rows] * 2


def test_er_total_batch_is_half_and_half_with_more_steps():
    batches, _ = trained([ERPlugin(mem=4, total_batch=True)], numbered([16, 18]))
    counts = [Counter(origins(b)) for b in batches[1]]
    assert counts == [Counter({1: 4, 0: 4})] * 4 + [Counter({1: 2, 0: 4})]
    assert sorted(n for b in batches[1] for n in b[0] if n >= 1000) == list(range(1000, 1018))


def test_shuffle_visits_each_memorised_sample_once_per_epoch():
    batches, _ = trained([ShuffleReplayPlugin(mem=7)], numbered([20, 12, 9]), epochs=2)
    for t, n in ((1, 12), (2, 9)):
        total = n + 7 * t
        steps = -(-total // 8)
        assert len(batches[t]) == 2 * steps
        epochs = [batches[t][:steps], batches[t][steps:]]
        visits = [[n for b in epoch for n in b[0]] for epoch in epochs]
        assert len(set(visits[0])) == len(visits[0]) == total
        assert sorted(visits[0]) == sorted(visits[1])
        assert visits[0] != visits[1]
        assert Counter(n // 1000 for n in visits[0]) == {**dict.fromkeys(range(t), 7), t: n}


@pytest.mark.parametrize("groups", [1, 2])
def test_max_groups_bounds_the_batch(groups):
    batches, _ = trained([BERPlugin(mem=5, max_groups=groups)], numbered([24] * 5))
    for t, steps in enumerate(batches):
        for batch in steps:
            past = Counter(o for o in origins(batch) if o != t)
            assert sorted(past.values()) == [8] * min(t, groups)
    assert len({frozenset(origins(b)) for b in batches[4]}) > 1


def test_balanced_ber_spreads_one_batch_over_current_and_past():
    plugin = BERPlugin(mem=9, mode="balanced")
    batches, _ = trained([plugin], numbered([30] * 5), batch=10)
    for t, steps in enumerate(batches[1:], 1):
        assert len(steps) == 3
        for batch in steps:
            counts = Counter(origins(batch))
            assert len(batch[0]) == 10
            assert set(counts) == set(range(t + 1))
            assert max(counts.values()) - min(counts.values()) <= 1


def test_balanced_ber_by_class_gives_each_class_its_share():
    plugin = BERPlugin(mem=60, mode="balanced", group_by="class")
    batches, _ = trained([plugin], numbered([60] * 3), batch=12)
    for t, share in ((1, 3), (2, 2)):
        for numbers, labels, _ in batches[t]:
            past = Counter(y for y in labels if y < 2 * t)
            assert past == dict.fromkeys(range(2 * t), share)
            assert sum(n >= 1000 * t for n in numbers) == 2 * share


def test_ber_by_class_replays_b_of_each_class_also_of_one_that_comes_back():
    labels = [[0, 1] * 10, [2, 0] * 10, [0, 3] * 10]
    stream = numbered([20] * 3, labels=labels)
    batches, _ = trained([BERPlugin(mem=10, group_by="class")], stream, batch=4)
    for t, past in ((1, {0: 4, 1: 4}), (2, {0: 4, 1: 4, 2: 4})):
        for numbers, y, _ in batches[t]:
            replayed = [c for n, c in zip(numbers, y, strict=True) if n < 1000 * t]
            assert Counter(replayed) == past
    both = {n // 1000 for b in batches[2] for n, y in zip(b[0], b[1], strict=True) if y == 0}
    assert both == {0, 1, 2}


def test_ber_by_task_replays_b_of_each_task():
    stream = numbered([16] * 4, tasks=[0, 1, 0, 2])
    batches, _ = trained([BERPlugin(mem=6, group_by="task")], stream)
    for _, _, tasks in batches[3]:
        assert Counter(tasks) == {0: 8, 1: 8, 2: 8}


@pytest.mark.parametrize("name", PLUGINS)
def test_first_experience_is_plain_training_bit_for_bit(name):
    stream = numbered([20])
    plain = trained([], stream, epochs=2)
    replayed = trained([PLUGINS[name](mem=5)], stream, epochs=2)
    assert plain[0] == replayed[0]
    assert torch.equal(plain[1], replayed[1])


@pytest.mark.parametrize("name", PLUGINS)
def test_mem_of_zero_is_plain_training_bit_for_bit(name):
    stream = numbered([20, 12, 9])
    plain = trained([], stream, epochs=2)
    replayed = trained([PLUGINS[name](mem=0)], stream, epochs=2)
    assert plain[0] == replayed[0]
    assert torch.equal(plain[1], replayed[1])


@pytest.mark.parametrize("name", PLUGINS)
def test_same_seed_gives_the_same_bits_and_another_seed_others(name):
    stream = numbered([20, 12, 9])
    first, again, other = (trained([PLUGINS[name](mem=5)], stream, seed=s) for s in (3, 3, 4))
    assert first[0] == again[0] != other[0]
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("name", PLUGINS)
def test_order_of_current_samples_changes_with_the_experience_and_with_the_seed(name):
    stream, orders = numbered([20] * 4), []
    for seed in (3, 4):
        batches, _ = trained([PLUGINS[name](mem=5)], stream, seed=seed)
        for t in (1, 2, 3):
            order = [n % 1000 for b in batches[t] for n in b[0] if n // 1000 == t]
            assert sorted(order) == list(range(20))
            orders.append(tuple(order))
    assert len(set(orders)) == 6


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_change_nothing(name, persistent):
    stream = numbered([16, 12])
    plain = trained([PLUGINS[name](mem=5)], stream, epochs=2)
    torch.manual_seed(0)
    kwargs = {"num_workers": 2, "persistent_workers": persistent}
    workers = trained([PLUGINS[name](mem=5)], stream, epochs=2, kwargs=kwargs)
    # Avalanche's own loader, and with it the first experience, is not our concern.
    assert plain[0][1] == workers[0][1]


@pytest.mark.parametrize(("name", "steps"), [("BER", 2), ("ER", 2), ("Shuffle", 3)])
def test_drop_last_drops_the_short_batch(name, steps):
    stream = numbered([20, 20])
    batches, _ = trained([PLUGINS[name](mem=5)], stream, kwargs={"drop_last": True})
    assert len(batches[1]) == steps
    assert {sum(n >= 1000 for n in b[0]) for b in batches[1]} <= (
        {8} if steps == 2 else set(range(9))
    )


def test_unshuffled_current_samples_come_in_order():
    batches, _ = trained([BERPlugin(mem=5)], numbered([20, 20]), kwargs={"shuffle": False})
    assert [n for b in batches[1] for n in b[0] if n >= 1000] == list(range(1000, 1020))


@pytest.mark.parametrize(("name", "rows"), [("BER", [3 + 8]), ("ER", [3 + 8]), ("Shuffle", [8])])
def test_an_experience_smaller_than_a_batch_is_one_step(name, rows):
    batches, _ = trained([PLUGINS[name](mem=5)], numbered([20, 3]))
    assert [len(b[0]) for b in batches[1]] == rows


@pytest.mark.parametrize(("name", "growth"), [("BER", 8), ("ER", 0), ("Shuffle", 0)])
def test_forty_experiences(name, growth):
    batches, final = trained([PLUGINS[name](mem=2)], numbered([8] * 40))
    assert len(batches[39][0][0]) == {"BER": 8 * 40, "ER": 16, "Shuffle": 8}[name]
    assert len(batches[39]) == {"BER": 1, "ER": 1, "Shuffle": 11}[name]
    assert len(batches[39][0][0]) - len(batches[38][0][0]) == growth
    assert torch.isfinite(final).all()


@pytest.fixture(scope="module")
def many():
    return numbered([4] * 400, labels=[[k % 10, (k + 1) % 10] * 2 for k in range(400)])


@pytest.mark.parametrize(
    ("kwargs", "rows"), [({"mode": "balanced"}, 4), ({"max_groups": 2}, 4 + 2 * 4)], ids=str
)
def test_steps_keep_their_size_over_400_experiences(many, kwargs, rows):
    batches, _ = trained([BERPlugin(mem=1, **kwargs)], many, batch=4)
    assert {len(b[0]) for steps in batches[3:] for b in steps} == {rows}
    assert {len(steps) for steps in batches} == {1}
    past = {o for steps in batches[-60:] for b in steps for o in origins(b)}
    assert len(past) > 60 + 60


@pytest.mark.parametrize("name", PLUGINS)
def test_training_twice_on_an_experience_replays_its_first_round(name):
    (exp,) = numbered([16])
    batches, _ = trained([PLUGINS[name](mem=4)], [exp, exp])
    counts = Counter(n for b in batches[1] for n in b[0])
    assert len(counts) == 16
    assert sum(counts.values()) == {"BER": 32, "ER": 32, "Shuffle": 20}[name]
    assert len([n for n in counts.values() if n > 1]) in range(1, 5)


@pytest.mark.parametrize("name", PLUGINS)
def test_no_current_sample_is_in_memory_before_its_experience_ends(name):
    plugin, sizes = PLUGINS[name](mem=5), []

    class Watch(type(plugin)):
        def after_training_iteration(self, strategy, **kwargs):
            sizes.append(len(self.memory))

    watch = Watch(mem=5)
    batches, _ = trained([watch], numbered([16, 16, 16]))
    assert sizes == [len_ for t, steps in enumerate(batches) for len_ in [5 * t] * len(steps)]
    assert len(watch.memory) == 15


@pytest.mark.parametrize("name", PLUGINS)
def test_online_stream_replays_earlier_origins_only(name):
    parts = numbered([18, 18, 18])
    plugin = PLUGINS[name](mem=4)
    online = list(split_online_stream(parts, 6, seed=1))
    batches, _ = trained([plugin], online)
    for k, steps in enumerate(batches):
        origin = k // 3
        rows = sum(len(b[0]) for b in steps)
        past = {"BER": 8 * origin, "ER": 8 * (origin > 0), "Shuffle": 4 * origin}[name]
        assert rows == 6 + past
        assert sum(o == origin for b in steps for o in origins(b)) == 6
    assert plugin.memory.index().counts.tolist() == [4, 4, 4]


@pytest.mark.parametrize("name", PLUGINS)
def test_each_replayed_sample_keeps_its_task_label(name):
    batches, _ = trained([PLUGINS[name](mem=6)], numbered([16] * 3, tasks=[4, 0, 7]))
    for numbers, _, tasks in batches[2]:
        assert tasks == [(4, 0, 7)[n // 1000] for n in numbers]
    assert {t for b in batches[2] for t in b[2]} == {4, 0, 7}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_multi_head_model_trains_the_head_of_each_replayed_sample(name):
    stream = class_stream(3, task_labels=True).train_stream
    model = MTSimpleMLP(input_size=8, hidden_size=16)
    strategy = naive(model, [PLUGINS[name](mem=20)])
    for exp in stream[:2]:
        strategy.train(exp)
    heads = model.classifier.classifiers
    before = [heads[k].classifier.weight.clone() for k in ("0", "1")]
    strategy.train(stream[2])
    assert all(
        not torch.equal(old, heads[k].classifier.weight)
        for old, k in zip(before, ("0", "1"), strict=True)
    )
    assert {len(model.classifier.classifiers)} == {3}


@pytest.mark.parametrize("name", PLUGINS)
def test_class_incremental_benchmark_is_replayed(name):
    streams = {"train": blobs(), "test": blobs(seed=1)}
    stream = class_incremental_benchmark(streams, num_experiences=3).train_stream
    batches, _ = trained([PLUGINS[name](mem=12)], stream, model=torch.nn.Linear(8, 6))
    assert {y for b in batches[2] for y in b[1]} == set(range(6))
    rows = sum(len(b[1]) for b in batches[2])
    assert rows == {"BER": 40 + 5 * 16, "ER": 40 + 5 * 8, "Shuffle": 40 + 24}[name]
