"""Augmentation of a batch: the distributions of torchvision's per-image transforms, exactly.

Statistical thresholds are the values that a correct implementation passes with probability
1 - 1e-4; the seeds are fixed, so that the outcome is too.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torchvision.transforms as v1
from torch import Generator
from torchvision.transforms import functional as F1
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.transforms.v2 import functional as F2

from avalanche_ext.functional.augmentation import (
    PADDING_MODES,
    color_jitter,
    normalize,
    padding_sides,
    random_crop,
    random_flip,
    to_float,
)

CHI2 = {3: 21.1, 16: 45.9, 23: 57.1, 24: 58.6}  # upper 1e-4 quantiles by degrees of freedom
ALL = {
    "brightness": (0.6, 1.4),
    "contrast": (0.6, 1.4),
    "saturation": (0.6, 1.4),
    "hue": (-0.1, 0.1),
}


def seeded(seed=0):
    return Generator().manual_seed(seed)


def distinct(channels=1, height=8, width=8):
    """One image whose pixel values all differ, none of them 0."""
    n = channels * height * width
    return torch.arange(1, n + 1, dtype=torch.uint8 if n < 256 else torch.float32).view(
        1, channels, height, width
    )


def images(b=16, c=3, h=9, w=7, seed=0):
    return torch.randint(256, (b, c, h, w), dtype=torch.uint8, generator=seeded(seed))


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def independence(a, b, n):
    """Chi-square statistic of independence of two variables with values 0 to n - 1."""
    joint = torch.bincount(a * n + b, minlength=n * n).view(n, n).double()
    return chi_square(joint, joint.sum(1, keepdim=True) * joint.sum(0) / joint.sum())


def kolmogorov_smirnov(a, b):
    """Largest distance between the empirical distribution functions of two samples."""
    a, b = a.double().sort().values, b.double().sort().values
    at = torch.cat((a, b))
    return float(
        (
            torch.searchsorted(a, at, right=True) / len(a)
            - torch.searchsorted(b, at, right=True) / len(b)
        )
        .abs()
        .max()
    )


def ks_threshold(n, m):
    return math.sqrt(-math.log(1e-4 / 2) / 2 * (n + m) / (n * m))


def offsets(crops, padded, size=8):
    """Number ``top * columns + left`` of the window that each crop is, found by its content."""
    table = padded.unfold(-2, size, 1).unfold(-2, size, 1)[0, 0].flatten(0, 1).flatten(1)
    hits = (crops[:, 0].flatten(1)[:, None] == table).all(-1)
    assert (hits.sum(1) == 1).all()
    return hits.int().argmax(1)


# --- crop ---------------------------------------------------------------------------------------


def crop_offsets(n, seed=0):
    x = distinct()
    crops = random_crop(x.expand(n, -1, -1, -1), (8, 8), 2, generator=seeded(seed))
    return offsets(crops, torch.nn.functional.pad(x, (2, 2, 2, 2)))


def test_every_offset_of_a_crop_is_equally_likely():
    n = 5000
    assert chi_square(torch.bincount(crop_offsets(n), minlength=25), n / 25) < CHI2[24]


def test_crop_has_the_distribution_of_torchvision():
    n, x = 2500, distinct()
    theirs = torch.stack([v1.RandomCrop(8, padding=2)(x[0]) for _ in range(n)])
    theirs = torch.bincount(
        offsets(theirs, torch.nn.functional.pad(x, (2, 2, 2, 2))), minlength=25
    ).double()
    ours = torch.bincount(crop_offsets(n, seed=1), minlength=25).double()
    assert (
        chi_square(ours, (ours + theirs) / 2) + chi_square(theirs, (ours + theirs) / 2) < CHI2[24]
    )


def test_crops_of_one_batch_are_independent_in_both_directions():
    top, left = crop_offsets(5001) // 5, crop_offsets(5001) % 5
    assert independence(top, left, 5) < CHI2[16]
    assert independence(top[1:], top[:-1], 5) < CHI2[16]
    assert independence(left[1:], left[:-1], 5) < CHI2[16]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_every_crop_is_a_window_of_its_own_non_square_image(channels, dtype):
    x = images(20, channels, 6, 11).to(dtype)
    crops = random_crop(x, (3, 5), generator=seeded())
    assert (crops.shape, crops.dtype) == ((20, channels, 3, 5), dtype)
    found = set()
    for crop, image in zip(crops, x, strict=True):
        windows = image.unfold(1, 3, 1).unfold(2, 5, 1).permute(1, 2, 0, 3, 4)
        where = (windows == crop).flatten(2).all(-1).nonzero().tolist()
        assert len(where) == 1
        found.add(tuple(where[0]))
    assert len(found) > 10
    assert max(top for top, _ in found) == 3
    assert max(left for _, left in found) == 6


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("padding", [2, (3, 1), (1, 0, 2, 4), (0, 9, 13, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_padding_is_that_of_torchvision(mode, padding, channels):
    x = images(2, channels, 4, 6)
    left, top, right, bottom = padding_sides(padding)
    size = (4 + top + bottom, 6 + left + right)
    pad = v1.Pad(padding, fill=7, padding_mode=mode)
    wanted = torch.stack([pil_to_tensor(pad(to_pil_image(image))) for image in x])
    for y in (x, x.float()):
        out = random_crop(y, size, padding, fill=7, padding_mode=mode)
        assert out.dtype == y.dtype
        assert torch.equal(out, wanted.to(y.dtype))


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_padding_of_one_pixel(mode):
    x = images(2, 1, 1, 1)
    out = random_crop(x, (5, 3), (1, 2), fill=0, padding_mode=mode)
    wanted = torch.zeros_like(out) if mode == "constant" else x.expand(2, 1, 5, 3).clone()
    wanted[:, :, 2, 1] = x[:, :, 0, 0]
    assert torch.equal(out, wanted)


def test_fill_per_channel_is_that_of_torchvision():
    x, fill = images(2, 3, 4, 6), (10, 200, 30)
    wanted = [pil_to_tensor(v2.Pad((1, 2), fill=fill)(to_pil_image(image))) for image in x]
    out = random_crop(x, (8, 8), (1, 2), fill=fill)
    assert torch.equal(out, torch.stack(wanted))
    assert torch.equal(
        random_crop(x[:, :1], (8, 8), (1, 2), fill=(5,))[:, 0, 0, 0], x.new_full((2,), 5)
    )


def test_crop_of_an_unusual_memory_layout():
    x = images(8, 3, 6, 6)
    wanted = random_crop(x, (4, 4), 1, generator=seeded())
    for y in (
        x.to(memory_format=torch.channels_last),
        x.flip(-1).flip(-1),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(random_crop(y, (4, 4), 1, generator=seeded()), wanted)
        assert torch.equal(random_crop(y, (6, 6), 0, generator=seeded()), x)


def test_crop_mistakes():
    x = images(2, 3, 4, 6)
    with pytest.raises(ValueError, match=r"at least \(5, 5\) after padding; got \(4, 6\)"):
        random_crop(x, (5, 5))
    with pytest.raises(ValueError, match=r"at least \(3, 9\)"):
        random_crop(x, (3, 9), (1, 0))
    with pytest.raises(ValueError, match=r"padding_mode is one of .*'constant'.* got 'circular'"):
        random_crop(x, (2, 2), 1, padding_mode="circular")
    with pytest.raises(ValueError, match=r"one number or 3, one per channel; got \(1, 2\)"):
        random_crop(x, (2, 2), 1, fill=(1, 2))
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\); got shape \(3, 4, 6\)"):
        random_crop(x[0], (2, 2))


@pytest.mark.parametrize(
    ("padding", "sides"),
    [(3, (3, 3, 3, 3)), ([3], (3, 3, 3, 3)), ((1, 2), (1, 2, 1, 2)), ([1, 2, 3, 4], (1, 2, 3, 4))],
)
def test_padding_sides(padding, sides):
    assert padding_sides(padding) == sides


@pytest.mark.parametrize("padding", [(1, 2, 3), (), -1, (1, -2)])
def test_padding_sides_refuses(padding):
    with pytest.raises(ValueError, match="padding is 1, 2 or 4 numbers >= 0"):
        padding_sides(padding)


# --- flip ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_flip_mirrors_whole_images_with_its_probability(dim, p):
    n = 4000
    x = distinct(3, 2, 3).expand(n, -1, -1, -1)
    out = random_flip(x, p, dim, seeded())
    mirrored = (out == x.flip(dim)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(out == x).flatten(1).all(1))
    assert abs(float(mirrored.double().mean()) - p) <= 3.9 * math.sqrt(p * (1 - p) / n)
    if 0 < p < 1:
        joint = chi_square(
            torch.bincount(2 * mirrored[1:].int() + mirrored[:-1].int(), minlength=4).double(),
            torch.tensor([(1 - p) ** 2, p * (1 - p), p * (1 - p), p * p], dtype=torch.float64)
            * (n - 1),
        )
        assert joint < CHI2[3]


@pytest.mark.parametrize(("dim", "theirs"), [(-1, F1.hflip), (-2, F1.vflip)])
def test_a_certain_flip_is_that_of_torchvision(dim, theirs):
    x = images()
    assert torch.equal(random_flip(x, 1.0, dim), theirs(x))
    assert torch.equal(random_flip(x.float(), 1.0, dim), theirs(x.float()))


def test_flip_mistakes():
    with pytest.raises(ValueError, match=r"dim -1 .* or -2 .*; got 1"):
        random_flip(images(), 0.5, 1)
    with pytest.raises(ValueError, match=r"random_flip expects images \(B, C, H, W\)"):
        random_flip(images()[0], 0.5)


# --- colours ------------------------------------------------------------------------------------

FACTORS = {"brightness": 1.5, "contrast": 1.4, "saturation": 1.7, "hue": 0.21}
FIXED = {name: (factor, factor) for name, factor in FACTORS.items()}


def adjusted(module, x, names, factors=FACTORS):
    for name in names:
        x = getattr(module, f"adjust_{name}")(x, factors[name])
    return x


@pytest.mark.parametrize("module", [F1, F2], ids=["v1", "v2"])
@pytest.mark.parametrize(
    ("name", "factor"),
    [(n, f) for n in list(ALL)[:3] for f in (0.0, 0.37, 1.0, 2.2)]
    + [("hue", f) for f in (-0.5, -0.23, 0.0, 0.1, 0.5)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_one_operation_is_that_of_torchvision(module, name, factor, channels):
    x = torch.rand(6, channels, 5, 4, generator=seeded())
    x[0, :, 0], x[1] = x[0, :1, 0], 0.25  # grey pixels, an even image
    x[2], x[3] = x[2].round(), 0  # primary colours, black
    fixed: dict[str, Any] = {name: (factor, factor)}
    out = color_jitter(x, **fixed)
    wanted = adjusted(module, x, [name], {name: factor})
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)
    levels = color_jitter((x * 255).to(torch.uint8), **fixed)
    wanted = adjusted(module, (x * 255).to(torch.uint8), [name], {name: factor})
    assert levels.dtype == torch.uint8
    assert (levels.int() - wanted.int()).abs().max() <= (
        1
        if abs(1 - factor) <= 0.5 or name in ("hue", "brightness")
        else 1 + math.ceil(abs(1 - factor))
    )


def test_all_orders_are_those_of_torchvision_and_equally_likely():
    n, x = 2400, torch.rand(1, 3, 4, 4, generator=seeded(4))
    orders = list(itertools.permutations(FACTORS))
    table = torch.cat([adjusted(F1, x, order) for order in orders]).flatten(1)
    apart = torch.cdist(table, table, p=math.inf) + torch.eye(24)
    assert apart.min() > 1e-3  # the orders can be told from the outcome
    out = color_jitter(x.expand(n, -1, -1, -1), **FIXED, generator=seeded()).flatten(1)
    distance, found = torch.cdist(out, table, p=math.inf).min(1)
    assert distance.max() < 1e-5
    assert chi_square(torch.bincount(found, minlength=24), n / 24) < CHI2[23]
    assert independence(found[1:] % 5, found[:-1] % 5, 5) < CHI2[16]


@pytest.mark.parametrize(
    "settings", [ALL, {k: ALL[k] for k in ("contrast", "hue")}], ids=["4", "2"]
)
def test_jitter_has_the_distribution_of_torchvision(settings):
    n, x = 2000, torch.rand(3, 3, 3, generator=seeded(2))
    jitter = v1.ColorJitter(**settings)
    theirs = torch.stack([jitter(x) for _ in range(n)])
    ours = color_jitter(x.expand(n, -1, -1, -1), **settings, generator=seeded())
    for (a, b), (i, j) in itertools.product([(0, 1), (2, 0), (1, 2)], [(0, 0), (1, 2)]):
        assert kolmogorov_smirnov(ours[:, a, i, j], theirs[:, a, i, j]) < ks_threshold(n, n)
        products = [y[:, a, i, j] * y[:, b, j, i] for y in (ours, theirs)]
        assert kolmogorov_smirnov(*products) < ks_threshold(n, n)


def test_factors_are_uniform_and_independent():
    n = 4000
    x = torch.full((n, 3, 1, 1), 0.25)
    x[:, 1] = 0.5
    out = color_jitter(x, brightness=(0.5, 1.5), generator=seeded())
    factor = out[:, 0, 0, 0] / 0.25
    assert torch.equal(out[:, 1, 0, 0], 0.5 * factor)  # one factor for a whole image
    even = torch.linspace(0.5, 1.5, 20 * n)
    assert kolmogorov_smirnov(factor, even) < ks_threshold(n, 20 * n)
    neighbours = torch.corrcoef(torch.stack([factor[1:], factor[:-1]]))[0, 1]
    assert abs(float(neighbours)) < 3.9 / math.sqrt(n)


def test_factors_of_different_operations_are_independent():
    n = 4000
    x = torch.tensor([0.2, 0.4]).expand(n, 1, 1, 2)  # brightness scales the mean, contrast the gap
    out = color_jitter(x, brightness=(0.5, 1.5), contrast=(0.5, 1.5), generator=seeded())[:, 0, 0]
    brightness = out.mean(1) / 0.3
    contrast = (out[:, 1] - out[:, 0]) / 0.2 / brightness
    for factor in (brightness, contrast):
        assert 0.499 < factor.min() < 0.51
        assert 1.49 < factor.max() < 1.501
    both = torch.corrcoef(torch.stack([brightness, contrast]))[0, 1]
    assert abs(float(both)) < 3.9 / math.sqrt(n)


def test_jitter_of_bytes_is_that_of_floats_rounded():
    x = images(64)
    levels = color_jitter(x, **ALL, generator=seeded())
    floats = color_jitter(to_float(x), **ALL, generator=seeded())
    assert torch.equal(levels, (floats * 255).round().to(torch.uint8))


def test_jitter_of_bytes_is_close_to_that_of_torchvision():
    factors = {"brightness": 0.7, "contrast": 1.4, "saturation": 1.35, "hue": 0.08}
    fixed = {name: (factor, factor) for name, factor in factors.items()}
    x = images(1, 3, 12, 12)
    orders = list(itertools.permutations(factors))
    table = torch.cat([adjusted(F1, to_float(x), order, factors) for order in orders]).flatten(1)
    x = x.expand(300, -1, -1, -1)
    floats = color_jitter(to_float(x), **fixed, generator=seeded()).flatten(1)
    order = torch.cdist(floats, table, p=math.inf).argmin(1)
    theirs = torch.cat([adjusted(F1, x[:1], order, factors) for order in orders])[order]
    gap = (color_jitter(x, **fixed, generator=seeded()).int() - theirs.int()).abs()
    assert gap.max() <= 6
    assert gap.double().mean() < 2


def test_saturation_and_hue_leave_one_channel_alone():
    x = images(8, 1)
    assert torch.equal(color_jitter(x, saturation=(0.1, 3.0), hue=(-0.5, 0.5)), x)
    with_hue = color_jitter(x, (0.5, 1.5), (0.5, 1.5), (0.1, 3.0), (-0.5, 0.5), seeded())
    assert torch.equal(with_hue, color_jitter(x, (0.5, 1.5), (0.5, 1.5), generator=seeded()))


def test_jitter_without_ranges_changes_nothing():
    x = images()
    assert torch.equal(color_jitter(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_jitter_keeps_the_type_of_floats(dtype):
    x = to_float(images()).to(dtype)
    out = color_jitter(x, **ALL, generator=seeded())
    assert out.dtype == dtype
    torch.testing.assert_close(out, color_jitter(x.float(), **ALL, generator=seeded()).to(dtype))


def test_jitter_mistakes():
    with pytest.raises(ValueError, match="1 or 3 channels, uint8 or float; got 4 channels"):
        color_jitter(images(c=4), brightness=(0.5, 1.5))
    with pytest.raises(ValueError, match=r"got 3 channels of torch.int64"):
        color_jitter(images().long(), brightness=(0.5, 1.5))
    with pytest.raises(ValueError, match=r"color_jitter expects images \(B, C, H, W\)"):
        color_jitter(images()[0])


# --- to_float, normalize ------------------------------------------------------------------------


def test_to_float_is_that_of_torchvision_bit_for_bit():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    byte_image = to_pil_image(x[0])
    assert torch.equal(to_float(x)[0], v1.ToTensor()(byte_image))
    assert torch.equal(to_float(x), v1.ConvertImageDtype(torch.float32)(x))
    converted = v2.ToDtype(torch.float32, scale=True)(x)
    assert torch.equal(to_float(x, reciprocal=True), converted)
    assert not torch.equal(to_float(x), converted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_to_float_returns_floats_as_they_are(dtype):
    x = torch.rand(2, 3, 4, 4).to(dtype)
    assert to_float(x) is x


def test_to_float_refuses_other_integers():
    with pytest.raises(ValueError, match=r"expects uint8 or floats; got torch.int64"):
        to_float(torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("module", [v1, v2], ids=["v1", "v2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [(3, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), (1, (0.1307,), (0.3081,)),
     (3, (0.5,), (0.3,))],
)  # fmt: skip
def test_normalize_is_that_of_torchvision_bit_for_bit(module, dtype, channels, mean, std):
    x = torch.rand(5, channels, 6, 7, generator=seeded()).to(dtype)
    wanted = torch.stack([module.Normalize(mean, std)(image) for image in x])
    assert torch.equal(normalize(x, mean, std), wanted)


def test_normalize_takes_one_number_beside_three():
    x = torch.rand(2, 3, 4, 4)
    wanted = v2.Normalize([0.5], [0.1, 0.2, 0.3])(x)
    assert torch.equal(normalize(x, [0.5], [0.1, 0.2, 0.3]), wanted)


def test_normalize_mistakes():
    with pytest.raises(ValueError, match=r"normalize expects floats; got torch.uint8.*to_float"):
        normalize(images(), (0.5,), (0.5,))
    with pytest.raises(ValueError, match=r"1 or 1 numbers.*shape \(1, 9, 7\); got 3 and 3"):
        normalize(torch.rand(2, 1, 9, 7), (0.5,) * 3, (0.5,) * 3)


# --- all of them --------------------------------------------------------------------------------

STEPS = {
    "crop": lambda x, g: random_crop(x, (6, 6), 2, generator=g),
    "reflecting crop": lambda x, g: random_crop(x, (6, 6), 2, padding_mode="reflect", generator=g),
    "flip": lambda x, g: random_flip(x, 0.5, -1, g),
    "vertical flip": lambda x, g: random_flip(x, 0.5, -2, g),
    "jitter": lambda x, g: color_jitter(x, **ALL, generator=g),
}
all_steps = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())


@all_steps
def test_one_seed_gives_one_result(step):
    x = images()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = step(x, seeded(1))
    assert torch.equal(torch.get_rng_state(), before)  # the global numbers are not touched
    assert torch.equal(first, step(x, seeded(1)))
    assert not torch.equal(first, step(x, seeded(2)))
    generator = seeded(1)
    step(x, generator)
    assert not torch.equal(first, step(x, generator))  # the generator moved on


@all_steps
def test_without_a_generator_the_global_numbers_are_drawn(step):
    x = images()
    torch.manual_seed(3)
    first, second = step(x, None), step(x, None)
    torch.manual_seed(3)
    assert torch.equal(first, step(x, None))
    assert not torch.equal(first, second)


@all_steps
@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_the_input_is_left_alone(step, kind):
    x = images() if kind == "bytes" else to_float(images())
    copy = x.clone()
    step(x, None)
    assert torch.equal(x, copy)


@all_steps
def test_bytes_and_floats_get_the_same_draws(step):
    x = images(32)
    floats = step(to_float(x), seeded(1))
    assert torch.equal(step(x, seeded(1)), (floats * 255).round().to(torch.uint8))


@all_steps
@pytest.mark.parametrize("b", [0, 1])
@pytest.mark.parametrize("c", [1, 3])
def test_batches_of_nothing_and_of_one(step, b, c):
    for x in (images(b, c), to_float(images(b, c))):
        out = step(x, None)
        assert (out.shape[:2], out.dtype) == ((b, c), x.dtype)
        assert out.shape[2:] in {(6, 6), x.shape[2:]}


def test_conversions_of_nothing():
    assert to_float(images(0)).shape == (0, 3, 9, 7)
    assert normalize(to_float(images(0)), (0.5,), (0.5,)).shape == (0, 3, 9, 7)
