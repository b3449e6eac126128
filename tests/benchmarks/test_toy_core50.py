from __future__ import annotations

import pytest
import torch

from avalanche_ext.benchmarks import toy_core50
from avalanche_ext.benchmarks.core50_tracks import (
    CHALLENGE_MEAN,
    CHALLENGE_STD,
    NC_ORDER,
    TRAIN_SESSIONS,
    plan_stream,
)
from avalanche_ext.benchmarks.toy_frames import draw_world, render_clip

SMALL = {"frames": 2, "size": 8}


def sizes(stream):
    return [len(e.dataset) for e in stream]


def classes(experience):
    return sorted(set(map(int, experience.dataset.targets)))


def raw(x):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CHALLENGE_MEAN, CHALLENGE_STD))
    return (255 * (x * std + mean)).round().to(torch.uint8)


def test_the_three_tracks_have_core50s_structure():
    ni, nc, nic = (toy_core50(track, **SMALL) for track in ("ni", "nc", "nic"))
    assert sizes(ni.train_stream) == [100] * 8
    assert sizes(nc.train_stream) == [160] + [80] * 8
    assert sizes(nic.train_stream) == [20] + [2] * 390
    assert sizes(nc.test_stream) == [60] + [30] * 8
    assert sizes(nc.valid_stream) == [3] + [2] * 8
    for benchmark in (ni, nic):
        assert (sizes(benchmark.test_stream), sizes(benchmark.valid_stream)) == ([300], [15])
    assert [e.task_label for e in nc.test_stream] == list(range(9))
    assert {e.task_label for e in (*ni.train_stream, *nic.train_stream)} == {0}
    assert [classes(e) for e in nc.train_stream] == [classes(e) for e in nc.test_stream]
    assert classes(nc.train_stream[2]) == [15, 16, 17, 18, 19]
    assert all(classes(e) == list(range(50)) for e in ni.train_stream)
    assert classes(nic.train_stream[0]) == list(range(0, 50, 5))


def test_every_image_is_the_clips_that_its_label_names():
    world = draw_world(0)
    ni = toy_core50("ni", **SMALL)
    for k, session in enumerate(TRAIN_SESSIONS):
        x, y, _ = ni.train_stream[k].dataset[73]  # object 37, its second frame
        assert (int(y), x.shape) == (36, (3, 8, 8))
        assert torch.equal(raw(x), render_clip(world, session, 37, 2, 8)[1])
    nc = toy_core50("nc", **SMALL)
    x, y, _ = nc.test_stream[1].dataset[0]
    assert int(y) == 10
    assert torch.equal(raw(x), render_clip(world, 3, 30, 2, 8)[0])


@pytest.mark.parametrize("seed", range(3))
def test_each_clip_of_nic_comes_once_and_new_classes_come_in_the_first_half(seed):
    generator = torch.Generator().manual_seed(seed)
    plan = plan_stream("nic", NC_ORDER, TRAIN_SESSIONS, generator)
    clips = [clip for experience in plan for clip in experience]
    assert len(plan) == 391
    assert len(clips) == len(set(clips)) == 400
    assert {s for s, _ in plan[0]} == {1}
    first = {}
    for k, experience in enumerate(plan):
        for _, obj in experience:
            first.setdefault(obj, k)
    assert [o for o, _ in sorted(first.items(), key=lambda item: item[1])][10:] == list(
        NC_ORDER[10:]
    )
    assert 120 < max(first.values()) < 200  # of 391


def test_frames_of_a_clip_are_alike_and_rooms_are_not():
    world = draw_world(0)
    clips = torch.stack([render_clip(world, s, 7, 20, 32).float() for s in range(1, 12)])
    inside = (clips[:, 1:] - clips[:, :-1]).abs().mean()
    between = (clips[1:] - clips[:-1]).abs().mean()
    assert inside < 0.25 * between
    assert clips.std() > 20  # not a blank picture


def test_a_clip_does_not_depend_on_how_often_it_is_looked_at():
    world = draw_world(3)
    few, many = render_clip(world, 4, 9, 5, 16), render_clip(world, 4, 9, 10, 16)
    assert torch.equal(few, many[::2])


def test_the_global_random_state_is_not_touched():
    before = torch.random.get_rng_state()
    toy_core50("nic", objects=10, **SMALL)
    assert torch.equal(before, torch.random.get_rng_state())


def test_seeds():
    def first(**options):
        return toy_core50("nc", objects=10, **SMALL, **options).train_stream[0].dataset[0][0]

    assert torch.equal(first(), first(seed=0))
    assert not torch.equal(first(), first(seed=1))
    orders = [
        [int(e.dataset.targets[0]) for e in toy_core50("nic", **SMALL, order_seed=s).train_stream]
        for s in (None, 0, 0, 1)
    ]
    assert orders[1] == orders[2]
    assert len({tuple(o) for o in orders}) == 3


def test_validation_rooms_are_neither_trained_on_nor_tested_on():
    world = draw_world(0)
    benchmark = toy_core50("ni", **SMALL, validation=True)
    assert sizes(benchmark.train_stream) == [100] * 8
    shown = torch.stack([raw(x) for x, *_ in benchmark.test_stream[0].dataset])
    expected = [render_clip(world, s, o, 2, 8) for s in (12, 13, 14) for o in range(1, 51)]
    assert torch.equal(shown, torch.cat(expected))


def test_smaller_streams():
    assert len(toy_core50("nic", objects=10, **SMALL).train_stream) == 71
    assert sizes(toy_core50("nc", objects=20, **SMALL).train_stream) == [160, 80, 80]
    assert len(toy_core50("ni", train_sessions=3, **SMALL).train_stream) == 3
    assert sizes(toy_core50("ni", train_per_experience=7, **SMALL).train_stream) == [7] * 8
    tested = toy_core50("ni", frames=1, test_frames=3, size=8)
    assert (sizes(tested.train_stream)[0], sizes(tested.test_stream)[0]) == (50, 450)
    categories = toy_core50("nc", object_lvl=False, **SMALL)
    assert max(max(classes(e)) for e in categories.train_stream) == 9


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"track": "nicv2"}, "track"),
        ({"objects": 12}, "objects"),
        ({"train_sessions": 0}, "train_sessions"),
        ({"frames": 0}, "frames"),
        ({"track": "ni", "class_order": range(50)}, "all classes come at once"),
        ({"track": "nc", "class_order": [1, 1, 2]}, "permutation of 0 to 49"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        toy_core50(**options)
