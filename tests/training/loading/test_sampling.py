"""How many of which group a step draws."""

from __future__ import annotations

import pytest
import torch

from avalanche_ext.training.loading.sampling import (
    BalancedDraw,
    GroupIndex,
    MergeDraw,
    PerGroupDraw,
    UniformDraw,
    seeded,
)

SIZES = [5, 1, 12, 2]


def index_of(sizes=SIZES, stride=3, offset=100):
    """Groups whose slots neither start at 0 nor are contiguous; group k holds ids k mod 1000."""
    groups, slot = {}, offset
    for k, n in enumerate(sizes):
        groups[f"g{k}"] = list(range(slot, slot + stride * n, stride))
        slot += stride * n + 7
    return GroupIndex.of(groups)


def group_of(index, slots):
    """Position of the group that each slot belongs to."""
    owner = {}
    for k, part in enumerate(index.slots.split(index.counts.tolist())):
        owner |= dict.fromkeys(part.tolist(), k)
    return [owner[s] for s in slots.tolist()]


def counted(index, slots):
    return torch.bincount(
        torch.tensor(group_of(index, slots), dtype=torch.int64), minlength=len(index.counts)
    )


def test_group_index_drops_empty_groups_and_keeps_their_order():
    index = GroupIndex.of({"b": [7, 3], "empty": [], "a": torch.tensor([5]), 9: [1, 2, 0]})
    assert index.keys == ("b", "a", 9)
    assert index.slots.tolist() == [7, 3, 5, 1, 2, 0]
    assert index.counts.tolist() == [2, 1, 3]
    assert index.spans[0].tolist() == [0, 2, 3]
    assert len(index) == 6
    assert index.slots.dtype == index.counts.dtype == torch.int64


def test_group_index_of_nothing_is_empty():
    index = GroupIndex.of({"a": []})
    assert (index.keys, len(index), len(index.counts)) == ((), 0, 0)


@pytest.mark.parametrize(
    ("key", "slots", "counts"),
    [("b", [5, 1], [1, 1]), ("a", [7, 3, 1], [2, 1]), ("c", [7, 3, 5], [2, 1])],
)
def test_without_takes_out_exactly_one_group(key, slots, counts):
    index = GroupIndex.of({"b": [7, 3], "a": [5], "c": [1]})
    rest = index.without(key)
    assert key not in rest.keys
    assert (rest.slots.tolist(), rest.counts.tolist()) == (slots, counts)
    assert index.slots.tolist() == [7, 3, 5, 1]


def test_without_an_unknown_key_changes_nothing():
    index = index_of()
    assert index.without("unknown") is index


def test_without_the_only_group_leaves_nothing():
    assert len(GroupIndex.of({"a": [1, 2]}).without("a")) == 0


@pytest.mark.parametrize("n", [1, 4, 16])
def test_per_group_draws_exactly_n_of_each_group(n):
    index, generator = index_of(), seeded(0)
    for _ in range(20):
        keep, slots = PerGroupDraw(n).step(9, index, generator)
        assert keep == 9
        assert counted(index, slots).tolist() == [n] * 4


def test_per_group_reaches_every_slot_of_a_group_equally_often():
    index = index_of()
    _, slots = PerGroupDraw(12_000).step(1, index, seeded(1))
    for part in index.slots.split(index.counts.tolist()):
        observed = torch.stack([(slots == s).sum() for s in part]).double()
        expected = 12_000 / len(part)
        chi_square = float(((observed - expected) ** 2 / expected).sum())
        assert chi_square < len(part) - 1 + 4 * (2 * len(part)) ** 0.5


@pytest.mark.parametrize("k", [1, 2, 3])
def test_max_groups_draws_n_from_k_different_groups(k):
    index, generator, seen = index_of(), seeded(2), torch.zeros(4)
    for _ in range(400):
        _, slots = PerGroupDraw(3, max_groups=k).step(9, index, generator)
        per_group = counted(index, slots)
        assert sorted(per_group.tolist()) == [0] * (4 - k) + [3] * k
        seen += per_group > 0
    assert (seen - 100 * k).abs().max() < 4 * (400 * (k / 4) * (1 - k / 4)) ** 0.5


@pytest.mark.parametrize("k", [4, 5, 100])
def test_max_groups_beyond_the_groups_changes_nothing(k):
    index = index_of()
    bounded = PerGroupDraw(3, max_groups=k).step(9, index, seeded(3))[1]
    assert torch.equal(bounded, PerGroupDraw(3).step(9, index, seeded(3))[1])


def test_uniform_draw_is_uniform_over_the_union():
    index = index_of()
    keep, slots = UniformDraw(20_000).step(5, index, seeded(4))
    assert (keep, len(slots)) == (5, 20_000)
    observed = torch.stack([(slots == s).sum() for s in index.slots]).double()
    expected = 20_000 / len(index)
    assert observed.sum() == 20_000
    assert ((observed - expected) ** 2 / expected).sum() < 19 + 4 * 38**0.5  # 19 degrees of freedom


@pytest.mark.parametrize(("batch", "current", "memory"), [(8, 4, 4), (7, 4, 3), (1, 1, 0)])
def test_share_splits_one_batch_in_half(batch, current, memory):
    draw = UniformDraw(batch // 2, share=True)
    assert draw.reshapes_current
    assert draw.current_batch_size(batch) == current
    assert len(draw.step(current, index_of(), seeded(5))[1]) == memory


@pytest.mark.parametrize(
    ("draw", "reshapes"),
    [
        (UniformDraw(3), False),
        (PerGroupDraw(3), False),
        (BalancedDraw(3), True),
        (MergeDraw(), True),
    ],
)
def test_every_other_draw_leaves_the_size_of_the_current_batch(draw, reshapes):
    assert draw.current_batch_size(11) == 11
    assert draw.reshapes_current is reshapes


@pytest.mark.parametrize("current_groups", [1, 2, 6])
@pytest.mark.parametrize("n_groups", [1, 3, 20])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 21, 40])
def test_balanced_draw_spreads_n_places_evenly(n, n_groups, current_groups):
    index = index_of([1 + k % 9 for k in range(n_groups)])
    groups = n_groups + current_groups
    share, rest = divmod(n, groups)
    for seed in range(8):
        keep, slots = BalancedDraw(n, current_groups).step(n, index, seeded(seed))
        past = counted(index, slots)
        assert keep >= 1
        assert keep + len(slots) == n
        assert past.max() - past.min() <= 1
        assert past.max() <= share + (rest > 0)
        low, high = current_groups * share, current_groups * share + min(rest, current_groups)
        assert max(1, low) <= keep <= max(1, high)


@pytest.mark.parametrize("current_groups", [1, 2, 4])
def test_balanced_draw_gives_current_data_one_share_per_group(current_groups):
    index, generator = index_of([9, 9, 9, 9]), seeded(6)
    groups = 4 + current_groups
    keep, slots = BalancedDraw(5 * groups, current_groups).step(99, index, generator)
    assert keep == 5 * current_groups
    assert counted(index, slots).tolist() == [5] * 4
    kept = sum(BalancedDraw(13, current_groups).step(13, index, generator)[0] for _ in range(600))
    assert abs(kept / 600 - 13 * current_groups / groups) < 0.15


def test_balanced_draw_with_few_places_takes_different_groups_and_one_current():
    index, generator, seen = index_of([3] * 30), seeded(7), torch.zeros(30)
    for _ in range(300):
        keep, slots = BalancedDraw(4).step(4, index, generator)
        past = counted(index, slots)
        assert (keep, int(past.sum()), int(past.max())) == (1, 3, 1)
        seen += past
    assert 10 < seen.min() <= seen.max() < 60  # 30 expected each


def test_balanced_draw_of_one_place_is_the_current_sample():
    for seed in range(20):
        keep, slots = BalancedDraw(1).step(1, index_of(), seeded(seed))
        assert (keep, len(slots)) == (1, 0)


def test_balanced_draw_keeps_no_more_current_samples_than_there_are():
    keep, slots = BalancedDraw(20).step(2, index_of(), seeded(8))
    assert (keep, len(slots)) == (2, 16)


def test_merge_draw_adds_nothing_to_a_single_step():
    keep, slots = MergeDraw().step(6, index_of(), seeded(9))
    assert (keep, slots.tolist()) == (6, [])


def test_draws_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    for draw in (UniformDraw(3), PerGroupDraw(3, 2), BalancedDraw(6), MergeDraw()):
        draw.step(6, index_of(), seeded(10))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("draw", [UniformDraw(6), PerGroupDraw(2, 3), BalancedDraw(9)])
def test_draws_follow_the_generator(draw):
    index = index_of()
    first, again, other = (draw.step(9, index, seeded(s))[1].tolist() for s in (11, 11, 12))
    assert first == again
    assert first != other


def test_seeded_is_a_function_of_its_numbers_alone():
    torch.manual_seed(1)
    first = torch.rand(4, generator=seeded(3, 1, 4))
    torch.manual_seed(2)
    torch.rand(7)
    assert torch.equal(first, torch.rand(4, generator=seeded(3, 1, 4)))


def test_seeded_gives_the_same_stream_in_every_process():
    draws = torch.randint(2**31, (4,), generator=seeded(3, 1, 4)).tolist()
    assert draws == [967328980, 307963412, 1620989105, 1539120167]


def test_seeded_separates_neighbours_order_and_length():
    numbers = [(a, b) for a in range(30) for b in range(30)]
    numbers += [(a,) for a in range(30)] + [(a, 0, 0) for a in range(30)] + [(-1,), (2**64 - 2,)]
    firsts = {int(torch.randint(2**62, (), generator=seeded(*n))) for n in numbers}
    assert len(firsts) == len(numbers)


def test_seeded_neighbours_are_not_correlated():
    draws = torch.stack([torch.rand(500, generator=seeded(5, k)) for k in range(10)])
    off_diagonal = torch.corrcoef(draws) - torch.eye(10)
    assert off_diagonal.abs().max() < 4.5 / 500**0.5
