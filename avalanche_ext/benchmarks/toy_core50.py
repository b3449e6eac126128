"""The three CORe50 tracks on rendered toy objects: nothing to download, seconds to build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from avalanche_ext.benchmarks.core50_tracks import (
    CHALLENGE_MEAN,
    CHALLENGE_STD,
    NC_ORDER,
    TEST_SESSIONS,
    TRACKS,
    TRAIN_SESSIONS,
    Clip,
    every_twentieth,
    name_classes,
    nc_blocks,
    plan_stream,
)
from avalanche_ext.benchmarks.streams import Images, _thin, benchmark_of
from avalanche_ext.benchmarks.toy_frames import VALIDATION_SESSIONS, draw_world, render_clip
from avalanche_ext.training.checks import check_count, check_one_of

__all__ = ["toy_core50"]


def toy_core50(
    track: str = "ni",
    *,
    objects: int = 50,
    train_sessions: int = 8,
    frames: int = 20,
    test_frames: int | None = None,
    size: int = 32,
    object_lvl: bool = True,
    class_order: Sequence[int] | None = None,
    train_per_experience: int | None = None,
    validation: bool = False,
    seed: int = 0,
    order_seed: int | None = None,
) -> Any:
    """CORe50's structure on rendered objects in rendered rooms, see ``toy_frames``.

    50 objects (10 categories of 5) are filmed in 11 sessions, each with its own background and
    light. Sessions 3, 7 and 10 are the test set: known objects in rooms never seen in training.
    Frames of a clip (one object in one session) are near copies of each other.

    ``"ni"``: 8 experiences, one training session each, all objects. ``"nc"``: 9 experiences with
    task labels 0 to 8, ten objects and then five each, labels contiguous in the order of arrival,
    one head; the test stream is cut the same way. ``"nic"``: 391 experiences, ten objects in one
    session and then one clip each, every clip once; a class may come late, and comes back.
    In ``"ni"`` and ``"nic"`` a label is the object's number less one, and the test stream is one
    experience with the whole test set.

    The benchmark has a third stream, ``valid_stream``, as in the CLVision challenge: every 20th
    image of each test experience. It overlaps with the test stream by design; to choose settings
    use ``validation=True``.

    Args:
        track: ``"ni"``, ``"nc"`` or ``"nic"``.
        objects: Use the first 10, 15, ... 50 objects; a shorter ``"nc"`` and ``"nic"``.
        train_sessions: Use the first 1 to 8 training sessions; a shorter ``"ni"`` and ``"nic"``.
        frames: Training frames of a clip, at even moments (CORe50 has about 300).
        test_frames: The same for the test stream; ``frames`` by default.
        size: Width and height of a picture in pixels.
        object_lvl: Labels are the objects; else the ``objects / 5`` categories.
        class_order: Objects, numbered from 0, in the order of arrival (``"nc"``, ``"nic"``).
        train_per_experience: Keep this many random training images of each experience.
        validation: Test on three further sessions, 12 to 14, which CORe50 does not have: rooms
            of neither the training nor the test stream; for choosing settings. Frames held out
            of the training sessions would be copies of trained ones.
        seed: Draws the objects and rooms, and what ``train_per_experience`` keeps.
        order_seed: Shuffles the order of objects and sessions. By default sessions ascend, objects
            come as in run 0 of CORe50's New Classes, and ``"nic"`` is one fixed order.

    Returns:
        An Avalanche benchmark of uint8 images ``(3, size, size)``, which the data set's transforms
        make float and normalise with ImageNet's statistics; no augmentation, as in the challenge.

    Raises:
        ValueError: If the stream asked for does not exist.

    References:
        V. Lomonaco, D. Maltoni (2017), CORe50: a New Dataset and Benchmark for Continuous Object
        Recognition, CoRL. V. Lomonaco et al. (2022), CVPR 2020 Continual Learning in Computer
        Vision Competition.
    """
    from torchvision.transforms import Compose, ConvertImageDtype, Normalize

    owner = "toy_core50"
    check_one_of(owner, "track", track, TRACKS)
    check_one_of(owner, "objects", objects, tuple(range(10, 51, 5)))
    check_one_of(owner, "train_sessions", train_sessions, tuple(range(1, 9)))
    check_count(owner, frames=frames, test_frames=test_frames, size=size,
                train_per_experience=train_per_experience)  # fmt: skip
    generator = torch.Generator().manual_seed(order_seed or 0)
    order = _object_order(track, objects, class_order, order_seed, generator)
    sessions = list(TRAIN_SESSIONS[:train_sessions])
    tested = VALIDATION_SESSIONS if validation else TEST_SESSIONS
    if order_seed is not None:
        sessions = _shuffled(sessions, generator)

    labels = _labels(track, order, object_lvl)
    pictures = _Pictures(seed, size, labels)
    thin = torch.Generator().manual_seed(seed)
    plan = plan_stream(track, order, sessions, generator)
    train = [_thin(pictures.of(clips, frames), train_per_experience, thin) for clips in plan]
    blocks = nc_blocks(order) if track == "nc" else [sorted(order)]
    test = [
        pictures.of([(s, o) for s in tested for o in block], test_frames or frames)
        for block in blocks
    ]
    to_float = Compose([ConvertImageDtype(torch.float32), Normalize(CHALLENGE_MEAN, CHALLENGE_STD)])
    benchmark = benchmark_of(
        train, test, task_labels=track == "nc", complete_test_set_only=track != "nc",
        other_streams_tensors={"valid": [tuple(map(every_twentieth, part)) for part in test]},
        train_transform=to_float, eval_transform=to_float,
        other_streams_transforms={"valid": (to_float, None)},
    )  # fmt: skip
    groups = [sorted({labels[o] for o in block}) for block in blocks] if track == "nc" else []
    return name_classes(benchmark, groups, objects if object_lvl else objects // 5)


class _Pictures:
    """Renders clips and labels them."""

    def __init__(self, seed: int, size: int, labels: dict[int, int]) -> None:
        self.world, self.size, self.labels = draw_world(seed), size, labels

    def of(self, clips: Sequence[Clip], frames: int) -> Images:
        """Images ``(N, 3, size, size)`` and labels ``(N,)`` of some clips, one after the other."""
        x: list[Tensor] = [render_clip(self.world, s, o, frames, self.size) for s, o in clips]
        y = torch.tensor([self.labels[o] for _, o in clips])
        return torch.cat(x), y.repeat_interleave(frames)


def _object_order(
    track: str,
    objects: int,
    class_order: Sequence[int] | None,
    order_seed: int | None,
    generator: torch.Generator,
) -> list[int]:
    """The objects, numbered from 1, in the order of arrival."""
    if class_order is not None:
        if track == "ni":
            raise ValueError(
                "toy_core50: in track 'ni' all classes come at once; leave class_order out, or "
                "shuffle the sessions with order_seed."
            )
        order = [int(c) + 1 for c in class_order]
        if sorted(order) != list(range(1, objects + 1)):
            raise ValueError(
                f"toy_core50: class_order must be a permutation of 0 to {objects - 1}; got "
                f"{list(class_order)}."
            )
        return order
    order = [o for o in NC_ORDER if o <= objects]
    return order if order_seed is None else _shuffled(order, generator)


def _labels(track: str, order: Sequence[int], object_lvl: bool) -> dict[int, int]:
    if not object_lvl:
        return {o: (o - 1) // 5 for o in order}
    if track == "nc":
        return {o: position for position, o in enumerate(order)}
    return {o: o - 1 for o in order}


def _shuffled(items: Sequence[int], generator: torch.Generator) -> list[int]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
