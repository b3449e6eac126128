"""A moved transform gives a model what the per-sample transform gave it, bit for bit."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from avalanche.benchmarks.utils import transforms as multi
from PIL import Image
from torch import Generator, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from avalanche_ext.training.loading.batch_transforms import (
    BatchCompose,
    ColorJitter,
    MovedTransform,
    Normalize,
    RandomCrop,
    RandomFlip,
    ToFloat,
    UnmovableTransform,
    to_stored,
    translate,
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def seeded(seed=0):
    return Generator().manual_seed(seed)


def pictures(n=6, mode="RGB", height=10, width=12, seed=0):
    rng = np.random.default_rng(seed)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, *channels), dtype=np.uint8))
        for _ in range(n)
    ]


def moved(transform, samples, generator=None):
    plan = translate(transform)
    stored = torch.stack([plan.store(sample) for sample in samples])
    return plan.batch(stored, generator)


def per_sample(transform, samples):
    return torch.stack([transform(sample).as_subclass(torch.Tensor) for sample in samples])


def steps(transform):
    return translate(transform).batch.steps


def kinds(transform):
    return [type(part) for part in translate(transform).prepare]


# --- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_usual_recipe_is_exact(p, mode):
    n = 1 if mode == "L" else 3
    transform = v1.Compose(
        [v1.RandomCrop((10, 12), padding=0), v1.RandomHorizontalFlip(p), v1.ToTensor(),
         v1.Normalize(MEAN[:n], STD[:n])]
    )  # fmt: skip
    assert torch.equal(
        moved(transform, pictures(mode=mode)), per_sample(transform, pictures(mode=mode))
    )


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_usual_recipe_of_v2_is_exact(p):
    transform = v2.Compose(
        [v2.ToImage(), v2.RandomVerticalFlip(p), v2.RandomCrop((10, 12)),
         v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]
    )  # fmt: skip
    assert torch.equal(moved(transform, pictures()), per_sample(transform, pictures()))


@pytest.mark.parametrize(
    "convert",
    [
        v1.ToTensor(),
        v1.Compose([v1.PILToTensor(), v1.ConvertImageDtype(torch.float32)]),
        v2.Compose([v2.PILToTensor(), v2.ConvertImageDtype(torch.float32)]),
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.uint8, scale=True),
                    v2.ToDtype(torch.float32, scale=True)]),
    ],
    ids=["ToTensor", "v1 ConvertImageDtype", "v2 ConvertImageDtype", "ToDtype"],
)  # fmt: skip
def test_conversion_and_normalization_are_exact_for_every_byte(convert):
    levels = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=-1)
    image = [Image.fromarray(levels)]
    transform = v1.Compose([convert, v1.Normalize(MEAN, STD)])
    assert torch.equal(moved(transform, image), per_sample(transform, image))
    assert torch.equal(moved(convert, image), per_sample(convert, image))


@pytest.mark.parametrize("module", [v1, v2], ids=["v1", "v2"])
@pytest.mark.parametrize(
    "prefix",
    [
        lambda m: [m.Resize(7)],
        lambda m: [m.Resize((5, 9)), m.CenterCrop((4, 6))],
        lambda m: [m.Grayscale(), m.Pad((1, 2), fill=3)],
        lambda m: [m.Grayscale(3), m.Resize(6)],
        lambda m: [m.PILToTensor(), m.Resize(8, antialias=True), m.ToPILImage()],
    ],
    ids=["Resize", "Resize CenterCrop", "Grayscale Pad", "Grayscale Resize", "tensor and back"],
)
def test_what_is_deterministic_is_done_once_and_exact(module, prefix):
    parts = prefix(module)
    transform = v1.Compose([*parts, v1.RandomHorizontalFlip(1.0), v1.ToTensor()])
    plan = translate(transform)
    assert plan.prepare == tuple(parts)
    assert plan.batch == BatchCompose((RandomFlip(1.0), ToFloat()))
    assert plan.store(pictures(1)[0]).dtype == torch.uint8
    assert torch.equal(moved(transform, pictures()), per_sample(transform, pictures()))


@pytest.mark.parametrize("module", [v1, v2], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
def test_a_crop_is_one_that_torchvision_can_make(module, mode):
    """Left, top, right and bottom are told apart, in the order of either version."""
    picture = pictures(1)[0]
    padding, size = (1, 0, 3, 2), (12, 16)
    transform = v1.Compose(
        [module.RandomCrop(size, padding=padding, fill=9, padding_mode=mode), v1.ToTensor()]
    )
    assert torch.equal(moved(transform, [picture]), per_sample(transform, [picture]))


@pytest.mark.parametrize("module", [v1, v2], ids=["v1", "v2"])
def test_crop_settings_are_read(module):
    assert steps(module.RandomCrop(32, padding=4)) == (RandomCrop(32, 4),)
    assert steps(module.RandomCrop((3, 5))) == (RandomCrop((3, 5), 0),)
    assert steps(module.RandomCrop(5, padding=[1, 2])) == (RandomCrop(5, (1, 2)),)
    assert steps(module.RandomCrop(5, padding=[2])) == (RandomCrop(5, 2),)
    crop = module.RandomCrop(5, 1, fill=(1, 2, 3), padding_mode="constant")
    assert steps(crop) == (RandomCrop(5, 1, (1, 2, 3)),)
    assert steps(module.RandomCrop(5, 1, fill=None)) == (RandomCrop(5, 1),)
    assert steps(module.RandomCrop(5, 1, padding_mode="edge")) == (
        RandomCrop(5, 1, padding_mode="edge"),
    )


@pytest.mark.filterwarnings("ignore:The transform `ToTensor:UserWarning")
@pytest.mark.parametrize("module", [v1, v2], ids=["v1", "v2"])
def test_settings_of_the_other_steps_are_read(module):
    assert steps(module.RandomHorizontalFlip(0.2)) == (RandomFlip(0.2, -1),)
    assert steps(module.RandomVerticalFlip(0.3)) == (RandomFlip(0.3, -2),)
    jitter = module.ColorJitter(0.4, (0.5, 0.7), 2.0, 0.1)
    assert steps(jitter) == (ColorJitter((0.6, 1.4), (0.5, 0.7), (0.0, 3.0), (-0.1, 0.1)),)
    assert steps(module.ColorJitter(hue=0.1)) == (ColorJitter(hue=(-0.1, 0.1)),)
    assert steps(module.Normalize([0.5], [0.25])) == (Normalize((0.5,), (0.25,)),)
    assert steps(module.ToTensor()) == (ToFloat(),)


def test_normalize_takes_tensors_and_arrays():
    mean, std = torch.tensor(MEAN), np.array(STD)
    transform = v1.Compose([v1.ToTensor(), v1.Normalize(mean, std)])
    assert torch.equal(moved(transform, pictures()), per_sample(transform, pictures()))


def test_random_steps_draw_anew_for_every_batch_from_the_generator():
    plan = translate(v1.Compose([v1.RandomCrop(8), v1.RandomHorizontalFlip(), v1.ToTensor()]))
    stored = torch.stack([plan.store(picture) for picture in pictures(16)])
    generator = seeded(1)
    first, second = plan.batch(stored, generator), plan.batch(stored, generator)
    assert not torch.equal(first, second)
    generator = seeded(1)
    assert torch.equal(plan.batch(stored, generator), first)
    assert torch.equal(plan.batch(stored, generator), second)


def test_order_of_steps_is_kept():
    parts = [v1.ToTensor(), v1.RandomVerticalFlip(), v1.RandomCrop(4, 1), v1.Normalize([0.5], [2])]
    assert steps(v1.Compose(parts)) == (
        ToFloat(), RandomFlip(0.5, -2), RandomCrop(4, 1), Normalize((0.5,), (2.0,)),
    )  # fmt: skip


def test_floats_stay_as_they_are():
    x = torch.rand(4, 3, 5, 5)
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    assert torch.equal(moved(transform, x), per_sample(transform, x))
    assert torch.equal(moved(v1.ToTensor(), x), x)
    assert torch.equal(moved(v1.Normalize(MEAN, STD), x), per_sample(v1.Normalize(MEAN, STD), x))
    assert torch.equal(moved(None, x), x)


def test_floats_may_be_stored_as_bytes():
    x = torch.rand(4, 3, 5, 5)
    transform = v2.Compose(
        [v2.ToDtype(torch.uint8, scale=True), v2.RandomHorizontalFlip(1.0),
         v2.ToDtype(torch.float32, scale=True)]
    )  # fmt: skip
    assert translate(transform).store(x[0]).dtype == torch.uint8
    assert torch.equal(moved(transform, x), per_sample(transform, x))


def test_arrays_are_images_to_totensor():
    rng = np.random.default_rng(0)
    transform = v1.Compose([v1.ToTensor(), v1.RandomHorizontalFlip(1.0)])
    for array in (
        rng.integers(0, 256, (2, 6, 5, 3), dtype=np.uint8),
        rng.integers(0, 256, (2, 6, 5), dtype=np.uint8),
        rng.random((2, 6, 5, 3), dtype=np.float32),
        rng.random((2, 6, 5), dtype=np.float64),
    ):
        assert torch.equal(moved(transform, array), per_sample(transform, array))


def test_normalize_of_bytes_is_an_error_as_it_is_per_sample():
    with pytest.raises(ValueError, match=r"normalize expects floats; got torch.uint8"):
        moved(v1.Compose([v1.PILToTensor(), v1.Normalize(MEAN, STD)]), pictures())


# --- what holds transforms ----------------------------------------------------------------------

FLIP, CROP = v1.RandomHorizontalFlip(), v1.RandomCrop(4)
CONVERT = v1.ConvertImageDtype(torch.float32)
WANTED = (RandomFlip(), RandomCrop(4), ToFloat())


@pytest.mark.parametrize(
    "transform",
    [
        v1.Compose([FLIP, CROP, v1.ToTensor()]),
        v2.Compose([FLIP, CROP, v1.ToTensor()]),
        nn.Sequential(FLIP, nn.Sequential(CROP, nn.Identity()), CONVERT),
        [FLIP, (CROP, None, v1.ToTensor())],
        v1.Compose([v1.Compose([FLIP]), v2.Compose([CROP]), v2.Identity(), v1.ToTensor()]),
        multi.Compose([FLIP, CROP, v1.ToTensor()]),
        multi.MultiParamCompose([FLIP, v1.Compose([CROP]), v1.ToTensor()]),
        multi.MultiParamTransformCallable(v1.Compose([FLIP, CROP, v1.ToTensor()])),
        multi.TupleTransform([v1.Compose([FLIP, CROP, v1.ToTensor()]), lambda y: y + 1]),
        v1.Compose([BatchCompose((RandomFlip(), RandomCrop(4))), ToFloat()]),
        BatchCompose((BatchCompose((RandomFlip(), RandomCrop(4))), ToFloat())),
        [RandomFlip(), RandomCrop(4), v1.ToTensor()],
    ],
)  # fmt: skip
def test_containers_are_walked_in_order(transform):
    assert translate(transform) == MovedTransform((), BatchCompose(WANTED))


def test_of_a_tuple_of_transforms_only_the_one_of_x_counts():
    for_x = [
        multi.TupleTransform(t) for t in ([FLIP, None], [None, abs], [CROP], [], [v1.ToTensor()])
    ]  # type: ignore[list-item]
    transform = multi.MultiParamCompose(for_x)
    assert translate(transform) == MovedTransform((), BatchCompose(WANTED))


@pytest.mark.parametrize("nothing", [None, [], (), v1.Compose([]), nn.Identity(), v2.Identity(),
                                     BatchCompose(), nn.Sequential()])  # fmt: skip
def test_nothing_moves_to_nothing(nothing):
    assert translate(nothing) == MovedTransform()
    x = torch.rand(2, 3)
    assert MovedTransform().batch(x, None) is x


def test_conversions_that_change_no_value_may_stand_anywhere():
    transform = [v1.PILToTensor(), FLIP, v2.ToImage(), v1.ToTensor(), v2.ToPureTensor()]
    plan = translate(transform)
    assert [type(part) for part in plan.prepare] == [v1.PILToTensor]
    assert plan.batch.steps == (RandomFlip(), ToFloat())
    assert kinds([v2.ToImage(), v2.Resize(4), v2.ToPureTensor()]) == [
        v2.ToImage, v2.Resize, v2.ToPureTensor,
    ]  # fmt: skip


def brighten(x, generator):
    return x + torch.rand(len(x), generator=generator).view(-1, 1, 1, 1)


def test_a_step_of_ones_own_is_taken_as_it_is():
    plan = translate(v1.Compose([v1.ToTensor(), BatchCompose((brighten,))]))
    assert plan.batch.steps == (ToFloat(), brighten)
    x = torch.zeros(3, 1, 2, 2)
    assert torch.equal(plan.batch(x, seeded())[:, 0, 0, 0], torch.rand(3, generator=seeded()))


# --- what cannot be moved -----------------------------------------------------------------------

UNKNOWN = "how it acts on a whole batch is not known. Use Resize, CenterCrop, .*; or leave loading"
NOT_SCALED = r"not a conversion to float32 or to uint8 that scales the values. Use ToTensor\(\)"


class MyCrop(v1.RandomCrop):
    """May do anything."""


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v1.RandomResizedCrop(8), r"RandomResizedCrop\(size=\(8, 8\).*" + UNKNOWN),
        (v2.RandomResizedCrop(8), r"RandomResizedCrop\(.*" + UNKNOWN),
        (v1.Lambda(abs), r"Lambda\(\).*" + UNKNOWN),
        (abs, "built-in function abs.*" + UNKNOWN),
        (v1.RandomRotation(10), r"RandomRotation\(.*" + UNKNOWN),
        (v1.RandomGrayscale(), r"RandomGrayscale\(.*" + UNKNOWN),
        (v1.RandomApply([FLIP]), r"RandomApply\(.*" + UNKNOWN),
        (v2.RandomChoice([FLIP, CROP]), r"RandomChoice\(.*" + UNKNOWN),
        (v1.GaussianBlur(3), r"GaussianBlur\(.*" + UNKNOWN),
        (MyCrop(3), r"MyCrop\(size=\(3, 3\).*" + UNKNOWN),
        (v1.RandomCrop(8, pad_if_needed=True), r"RandomCrop\(.*pad_if_needed.*own size"),
        (v2.RandomCrop(8, pad_if_needed=True), r"RandomCrop\(.*pad_if_needed.*own size"),
        (v1.RandomCrop(8, padding=-1), "padding is negative. Use CenterCrop"),
        (v2.RandomCrop(8, 1, fill={tv_tensors.Image: 3}), "its fill is .*Fill with one number"),
        ([FLIP, v1.Resize(8)], r"Resize\(size=8.*deterministic.*after RandomFlip. Put it before"),
        ([v1.ToTensor(), v2.CenterCrop(8)], r"CenterCrop\(size=\(8, 8\)\).*after ToFloat. Put it"),
        ([v1.Normalize([0.5], [1]), v1.Pad(1)], r"Pad\(padding=1.*after Normalize"),
        ([BatchCompose((brighten,)), v1.Pad(1)], r"Pad\(padding=1.*after brighten"),
        ([v1.ToTensor(), FLIP, v1.ToPILImage()], r"ToPILImage\(\).*after ToFloat, RandomFlip"),
        ([v1.ToTensor(), v1.ConvertImageDtype(torch.uint8)], "ConvertImageDtype.*after ToFloat"),
        (v1.ConvertImageDtype(torch.float64), NOT_SCALED),
        (v2.ToDtype(torch.float32), NOT_SCALED),
        (v2.ToDtype({torch.Tensor: torch.float32}, scale=True), NOT_SCALED),
        (multi.MultiParamCompose([lambda x, y: (x, y)]), "lambda.*" + UNKNOWN),
        (multi.TupleTransform([abs]), "built-in function abs.*" + UNKNOWN),
        ("flip", "'flip' cannot be moved.*" + UNKNOWN),
    ],
)  # fmt: skip
def test_what_cannot_be_moved_is_named_with_reason_and_remedy(transform, message):
    with pytest.raises(UnmovableTransform, match=f"(?s){message}") as caught:
        translate(transform)
    assert isinstance(caught.value, ValueError)
    assert "cannot be moved from single samples to batches" in str(caught.value)
    assert str(caught.value).endswith("or leave loading to a DataLoader.")


# --- stored samples -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_an_image_is_stored_as_the_bytes_that_totensor_divides(mode):
    picture = pictures(1, mode)[0]
    stored = to_stored(picture)
    assert (stored.dtype, stored.is_contiguous()) == (torch.uint8, True)
    assert stored.shape == ({"L": 1, "RGB": 3, "RGBA": 4}[mode], 10, 12)
    assert torch.equal(stored.float() / 255, v1.ToTensor()(picture))


def test_an_array_is_stored_channels_first_and_copied():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    stored = to_stored(array)
    assert torch.equal(stored, torch.from_numpy(array).permute(2, 0, 1))
    plane = to_stored(array[:, :, 0])
    assert torch.equal(plane, stored[:1])
    single = np.zeros((2, 3), dtype=np.uint8)
    kept = to_stored(single)
    array[:], single[:] = 9, 9
    assert int(stored[0, 0, 0]) == int(kept[0, 0, 0]) == 0


@pytest.mark.parametrize("kind", [tv_tensors.Image, torch.Tensor])
def test_a_tensor_is_stored_as_it_is(kind):
    x = torch.rand(3, 4, 5)
    stored = to_stored(x.as_subclass(kind))
    assert type(stored) is torch.Tensor
    assert stored.data_ptr() == x.data_ptr()
    assert to_stored(torch.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("mode", ["1", "I", "F", "P", "CMYK", "LA"])
def test_images_of_other_modes_are_refused(mode):
    image = Image.new(mode, (4, 4))
    with pytest.raises(
        UnmovableTransform, match=rf"image of mode '{mode}'.*L, RGB, RGBA.*convert it"
    ):
        to_stored(image)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            np.zeros((3, 3), dtype=np.int64),
            r"int64 array of shape \(3, 3\).*convert it to a tensor",
        ),
        (np.zeros(3, dtype=np.uint8), r"uint8 array of shape \(3,\)"),
        (3, "cannot store a int.*leave loading to a DataLoader"),
        ([1.0], "cannot store a list"),
    ],
)
def test_other_samples_are_refused(sample, message):
    with pytest.raises(UnmovableTransform, match=message):
        to_stored(sample)


def test_a_transform_that_leaves_an_image_is_refused_when_a_sample_is_stored():
    for transform in (None, FLIP, v1.Resize(4)):
        with pytest.raises(
            UnmovableTransform, match=r"leaves samples as Image, .*add ToTensor\(\)"
        ):
            translate(transform).store(pictures(1)[0])
    with pytest.raises(UnmovableTransform, match="leaves samples as ndarray"):
        MovedTransform().store(np.zeros((3, 3, 3), dtype=np.uint8))


# --- values -------------------------------------------------------------------------------------

PAIRS = [
    (RandomCrop(4, 1), RandomCrop((4, 4), (1, 1)), RandomCrop(4, 2)),
    (RandomCrop([4, 5], [1, 2]), RandomCrop((4, 5), (1, 2, 1, 2)), RandomCrop((5, 4), (1, 2))),  # type: ignore[arg-type]
    (RandomCrop(4, fill=[1, 2, 3]), RandomCrop(4, fill=(1, 2, 3)), RandomCrop(4)),  # type: ignore[arg-type]
    (RandomCrop(4), RandomCrop(4, 0, 0, "constant"), RandomCrop(4, padding_mode="edge")),
    (RandomFlip(), RandomFlip(0.5, -1), RandomFlip(0.5, -2)),
    (ColorJitter([0.5, 1.5]), ColorJitter(brightness=(0.5, 1.5)), ColorJitter(None, (0.5, 1.5))),  # type: ignore[arg-type]
    (ToFloat(), ToFloat(False), ToFloat(True)),
    (Normalize([0.5], [1.0]), Normalize((0.5,), (1.0,)), Normalize((0.5,), (2.0,))),  # type: ignore[arg-type]
    (BatchCompose([ToFloat()]), BatchCompose((BatchCompose((ToFloat(),)),)), BatchCompose()),  # type: ignore[arg-type]
    (MovedTransform(), translate(None), MovedTransform(batch=BatchCompose((ToFloat(),)))),
]  # fmt: skip


@pytest.mark.parametrize(("one", "same", "other"), PAIRS, ids=lambda v: type(v).__name__)
def test_steps_are_values(one, same, other):
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    back = pickle.loads(pickle.dumps(one))
    assert back == one
    assert hash(back) == hash(one)
    with pytest.raises(AttributeError):
        one.anything = 1  # frozen


def test_a_pickled_plan_does_the_same():
    plan = translate(v1.Compose([v1.Resize(6), CROP, FLIP, v1.ColorJitter(0.4), v1.ToTensor()]))
    back = pickle.loads(pickle.dumps(plan))
    assert back.batch == plan.batch
    stored = [torch.stack([p.store(picture) for picture in pictures()]) for p in (plan, back)]
    assert torch.equal(*stored)
    assert torch.equal(plan.batch(stored[0], seeded()), back.batch(stored[1], seeded()))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomCrop(0), "size of 1 or 2 numbers >= 1; got 0"),
        (lambda: RandomCrop((1, 2, 3)), r"size of 1 or 2 numbers >= 1; got \(1, 2, 3\)"),  # type: ignore[arg-type]
        (lambda: RandomCrop(3, -1), "padding is 1, 2 or 4 numbers >= 0; got -1"),
        (lambda: RandomCrop(3, padding_mode="circular"), "RandomCrop expects padding_mode"),
        (lambda: RandomFlip(1.5), "0 <= p <= 1 .*got p=1.5"),
        (lambda: RandomFlip(0.5, 1), "dim -1 or -2; got .*dim=1"),
        (lambda: ColorJitter(brightness=(-0.1, 1.0)), "ColorJitter expects brightness .*-0.1"),
        (
            lambda: ColorJitter(saturation=(1.2, 1.0)),
            r"ColorJitter expects saturation .*\(1.2, 1.0\)",
        ),
        (lambda: ColorJitter(hue=(-0.6, 0.1)), r"hue .* within \[-0.5, 0.5\]"),
        (lambda: Normalize((0.5,), (0.0,)), "every std to differ from 0"),
    ],
)
def test_mistakes_in_a_step_are_found_at_once(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [0, 1])
@pytest.mark.parametrize("c", [1, 3])
def test_batches_of_nothing_and_of_one(b, c):
    plan = translate(
        v1.Compose([v1.RandomCrop((5, 7), 2), FLIP, v1.RandomVerticalFlip(),
                    v1.ColorJitter(0.4, 0.4, 0.4, 0.1), v1.ToTensor(), v1.Normalize([0.5], [0.2])])
    )  # fmt: skip
    out = plan.batch(torch.zeros(b, c, 5, 7, dtype=torch.uint8), seeded())
    assert (out.shape, out.dtype) == ((b, c, 5, 7), torch.float32)


def test_every_step_may_be_called_without_a_generator():
    x = torch.rand(2, 3, 4, 4)
    for step in (RandomCrop(4, 1), RandomFlip(), ColorJitter((0.5, 1.5)), ToFloat(),
                 Normalize((0.5,), (0.2,)), BatchCompose((RandomFlip(),))):  # fmt: skip
        torch.manual_seed(0)
        out = step(x)
        torch.manual_seed(0)
        assert torch.equal(out, step(x, None))


def test_a_picture_round_trip():
    picture = pictures(1)[0]
    assert to_pil_image(to_stored(picture)).tobytes() == picture.tobytes()
