"""The grid of samples, pixel by pixel."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from avalanche_ext.evaluation.sample_grid import _scaled, sample_grid

B = 48  # background

# Digits of 2 x 2 pixels each, on the strip above a tile of 48 x 48.
SEVEN = """
.....
.###.
...#.
...#.
...#.
...#.
....."""
MINUS_ONE = """
.........
......#..
.....##..
.###..#..
......#..
.....###.
........."""


def drawing(text):
    rows = [[255 if c == "#" else B for c in line] for line in text.strip().splitlines()]
    small = torch.tensor(rows, dtype=torch.uint8)
    return small.repeat_interleave(2, 0).repeat_interleave(2, 1)


def test_every_pixel_of_two_small_images():
    x = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]], [[[-8.0, -8.0], [-7.0, -8.0]]]])
    grid = sample_grid(x, [7, -1])
    # Two tiles of 14 + 48 rows and 48 columns, 2 pixels around each.
    expected = torch.full((1, 2 + 62 + 2, 2 + 48 + 2 + 48 + 2), B, dtype=torch.uint8)
    expected[0, 2:16, 2:20] = drawing(MINUS_ONE)  # labels ascend
    expected[0, 16:64, 2:50] = 0
    expected[0, 40:64, 2:26] = 255
    expected[0, 2:16, 52:62] = drawing(SEVEN)
    expected[0, 16:40, 52:76] = 0
    expected[0, 16:40, 76:100] = 64  # 255 / 4 = 63.75
    expected[0, 40:64, 52:76] = 128  # 127.5
    expected[0, 40:64, 76:100] = 255
    assert torch.equal(grid, expected)


def test_without_labels_there_is_no_strip():
    grid = sample_grid(torch.tensor([[[[5, 6]]]], dtype=torch.uint8))
    assert grid.shape == (1, 2 + 24 + 2, 2 + 48 + 2)
    assert grid[0, 2:26, 2:26].unique().tolist() == [0]
    assert grid[0, 2:26, 26:50].unique().tolist() == [255]


def test_all_channels_share_one_range():
    x = torch.stack([torch.full((48, 48), v) for v in (10.0, 20.0, 110.0)])[None]
    grid = sample_grid(x)
    assert [c.unique().tolist() for c in grid[:, 2:50, 2:50]] == [[0], [26], [255]]  # 25.5


def test_large_images_are_averaged_down():
    x = torch.zeros(1, 1, 256, 512)
    x[..., 0, 0:4] = 16.0  # 4 of 16 numbers of the first pixel
    x[..., 4:8, 4:8] = 16.0
    grid = sample_grid(x)
    assert grid.shape == (1, 2 + 64 + 2, 2 + 128 + 2)
    assert grid[0, 2:4, 2:5].tolist() == [[64, 0, 0], [0, 255, 0]]


def test_nine_images_take_two_rows_in_the_order_of_their_labels():
    labels = [4, 4, 0, 8, 1, 3, 2, 6, 7]
    x = torch.zeros(9, 1, 48, 48)
    x[:, 0, 0, :] = 9
    x[:, 0, 1, 0] = torch.tensor(labels, dtype=torch.float32)
    grid = sample_grid(TensorDataset(x, torch.tensor(labels)))
    assert grid.shape == (1, 2 * 64 + 2, 8 * 50 + 2)
    tops = [[grid[0, 64 * r + 17, 50 * c + 2].item() for c in range(8)] for r in range(2)]
    bytes_of = [round(255 * v / 9) for v in sorted(labels)]
    assert tops == [bytes_of[:8], [bytes_of[8], *[B] * 7]]


def test_the_seed_draws_and_global_random_numbers_stay():
    x = torch.rand(50, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    grids = [sample_grid(x, n=2, seed=s) for s in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(grids[0], grids[1])
    assert not torch.equal(grids[0], grids[2])


def test_only_what_is_drawn_is_read():
    read = []

    class Reading(TensorDataset):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    sample_grid(Reading(torch.rand(50, 1, 4, 4), torch.arange(50)), n=3)
    assert len(read) == len(set(read)) == 3


def test_gray_and_colour_of_several_sizes():
    parts = [(torch.arange(4.0).view(1, 2, 2), 0), (torch.rand(3, 60, 50), 12)]
    grid = sample_grid(parts)
    assert grid.shape == (3, 2 + 74 + 2, 2 * (50 + 2) + 2)
    assert torch.equal(grid[0], grid[1]) is False
    left = grid[:, :, :52]
    assert torch.equal(left[0], left[1])
    assert torch.equal(left[0], left[2])
    assert (left[:, 16 + 48 :] == B).all()  # the smaller image is at the top


def test_a_label_wider_than_its_image_is_whole():
    grid = sample_grid([(torch.rand(1, 48, 1), 1234567)])
    assert grid.shape == (1, 2 + 14 + 48 + 2, 2 + 2 * 29 + 2)


@pytest.mark.parametrize("value", [0.0, 3.5, -1e30])
def test_an_image_of_one_value_is_black(value):
    assert sample_grid(torch.full((1, 1, 48, 48), value))[0, 2:50, 2:50].max() == 0


def test_numbers_that_are_not_finite_are_black_and_no_part_of_the_range():
    x = torch.zeros(1, 1, 48, 48)
    x[0, 0, 0, :5] = torch.tensor([float("inf"), float("-inf"), float("nan"), -1.0, 1.0])
    assert sample_grid(x)[0, 2, 2:8].tolist() == [0, 0, 0, 0, 255, 128]
    assert sample_grid(torch.full((1, 1, 48, 48), float("nan")))[0, 2:50, 2:50].max() == 0


def test_in_a_large_image_they_do_not_spread():
    x = torch.ones(1, 1, 256, 256)
    x[0, 0, 0, :4] = torch.tensor([float("inf"), float("nan"), 0.0, 1.0])
    assert sample_grid(x)[0, 2, 2:5].tolist() == [128, 191, 255]  # (0 + 0 + 1 + 1) / 4, 3 / 4


def test_what_becomes_a_byte_is_a_number():
    for x in (torch.full((1, 2, 2), 3.5), torch.tensor([[[float("inf"), 0.0]]])):
        assert _scaled(x).tolist() == torch.zeros_like(x).tolist()


def test_the_largest_range_does_not_overflow():
    x = torch.zeros(1, 1, 48, 48, dtype=torch.float64)
    x[0, 0, 0, :2] = torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64)
    assert sample_grid(x)[0, 2, 2:5].tolist() == [0, 255, 128]


@pytest.mark.parametrize(
    "samples",
    [
        [], torch.zeros(0, 3, 4, 4), torch.zeros(5, 784), torch.zeros(5, 2, 4, 4),
        torch.zeros(5, 4, 4), torch.zeros(5, 1, 0, 4), torch.zeros(5, 1, 4, 4, 4),
        torch.zeros(2, 1, 4, 4, dtype=torch.complex64), ["text"], [({"boxes": 1}, 3)],
    ],
)  # fmt: skip
def test_what_is_no_image_has_no_grid(samples):
    assert sample_grid(samples) is None


@pytest.mark.parametrize("y", [0.7, torch.tensor([1, 2]), torch.tensor(2.0), {"boxes": []}])
def test_a_target_that_is_no_class_is_not_written(y):
    assert sample_grid([(torch.rand(1, 48, 48), y)]).shape == (1, 52, 52)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"n >= 1 or None; got n=0"):
        sample_grid(torch.zeros(2, 1, 4, 4), n=0)
    with pytest.raises(ValueError, match=r"one label per sample, 2; got 3"):
        sample_grid(torch.zeros(2, 1, 4, 4), [1, 2, 3])
