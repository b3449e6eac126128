"""The three tracks of the CLVision 2020 challenge on CORe50's own images and file lists.

Where Avalanche's ``CORe50`` and the challenge differ, the challenge is followed:

* ``"nc"`` gives task labels 0 to 8 and a test stream of nine experiences (Avalanche: label 0, one).
* ``"nic"`` is NICv2-391 (Avalanche's ``"nic"`` is the older list of 79 batches).
* Images are scaled to [0, 1] and normalised; they are not mirrored at random.
* There is a ``valid_stream``: every 20th image of each test experience.

The file lists are read directly, so the four pickles are not needed and nothing is written: the
folder may be read-only. Only ``download=True`` goes through Avalanche's ``CORe50Dataset``, which
on its first use writes copies of all lists (``*_cat``) beside them, with categories as labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from avalanche_ext.benchmarks.core50_tracks import (
    CHALLENGE_MEAN,
    CHALLENGE_STD,
    TRACKS,
    Clip,
    every_twentieth,
    held_out_sessions,
    name_classes,
)
from avalanche_ext.training.checks import check_count, check_one_of

__all__ = ["LISTS", "challenge_transform", "core50", "image_folder"]

# Track -> folder of its lists below the root, number of training lists.
LISTS = {
    "ni": ("batches_filelists/NI_inc", 8),
    "nc": ("batches_filelists/NC_inc", 9),
    "nic": ("NIC_v2_391", 391),
}
Row = tuple[str, int]


def core50(
    track: str = "ni",
    *,
    object_lvl: bool = True,
    run: int = 0,
    mini: bool = False,
    train_transform: Callable[[Any], Any] | None = None,
    eval_transform: Callable[[Any], Any] | None = None,
    train_per_experience: int | None = None,
    validation: bool = False,
    seed: int = 0,
    root: str | Path | None = None,
    download: bool = False,
) -> Any:
    """CORe50 as in the CLVision 2020 challenge, see ``toy_core50`` for the structure.

    ``"ni"``: 8 experiences of about 14,990 images. ``"nc"``: 9 experiences (10 + 8 x 5 objects)
    with task labels 0 to 8 in training and test. ``"nic"``: 391 experiences, the first of about
    3,000 images and the others of about 300. Test: sessions 3, 7 and 10, 44,972 images; one
    experience, or nine for ``"nc"``. Valid: every 20th of them (2,249; 2,250 for ``"nc"``).

    Args:
        track: ``"ni"``, ``"nc"`` or ``"nic"``.
        object_lvl: 50 objects as classes; else 10 categories (``"nc"`` then repeats classes).
        run: 0 to 9, which of CORe50's orders; the challenge uses 0.
        mini: Images of 32 x 32 from ``core50_32x32`` in place of 128 x 128.
        train_transform: From a PIL image; ``challenge_transform()`` by default.
        eval_transform: The same for evaluation.
        train_per_experience: Keep this many random training images of each experience.
        validation: Test on held-out training sessions instead, never on the test sessions: two
            sessions, the highest numbers (for ``"nic"`` other than those of its first experience).
            Experiences left without images drop out: ``"ni"`` has 6, ``"nic"`` 291.
        seed: Seed of ``train_per_experience``.
        root: Folder that holds ``core50_128x128`` and the lists; Avalanche's data folder by
            default. It is only read.
        download: Fetch what is absent with Avalanche's ``CORe50Dataset``; the root must then be
            writable (see the module's text).

    Returns:
        An Avalanche benchmark with ``train_stream``, ``test_stream`` and ``valid_stream``; images
        are read from disk when they are asked for.

    Raises:
        FileNotFoundError: If images or lists are absent and ``download`` is off.
        ValueError: If a list cannot be understood, or the stream asked for does not exist.

    References:
        V. Lomonaco, D. Maltoni (2017), CORe50: a New Dataset and Benchmark for Continuous Object
        Recognition, CoRL. V. Lomonaco et al. (2022), CVPR 2020 Continual Learning in Computer
        Vision Competition.
    """
    from avalanche.benchmarks import paths_benchmark

    check_one_of("core50", "track", track, TRACKS)
    check_one_of("core50", "run", run, tuple(range(10)))
    check_count("core50", train_per_experience=train_per_experience)
    images, lists = _locate(track, run, mini, root, download)
    train, test = ([_read(path) for path in group] for group in (lists[:-1], lists[-1:]))
    for path, rows in zip(lists, [*train, *test], strict=True):
        _check_present(images, path, rows)

    groups = [sorted({label for _, label in rows}) for rows in train] if track == "nc" else []
    if validation:
        train, test = _hold_out(track, train)
    test = _split_by_label(test, groups) if groups else [list(chain(*test))]
    if not object_lvl:
        train, test = ([_categories(rows) for rows in part] for part in (train, test))
        groups = [sorted({label for _, label in rows}) for rows in train] if groups else []
    generator = torch.Generator().manual_seed(seed)
    train = [_thin(rows, train_per_experience, generator) for rows in train]

    def full(part: list[list[Row]]) -> list[list[Row]]:
        return [[(f"{images}/{path}", label) for path, label in rows] for rows in part]

    usual = eval_transform or challenge_transform()
    benchmark = paths_benchmark(
        full(train), full(test),
        other_streams_lists_of_files={"valid": full([every_twentieth(rows) for rows in test])},
        task_labels=list(range(len(train))) if track == "nc" else [0] * len(train),
        complete_test_set_only=track != "nc",
        train_transform=train_transform or challenge_transform(),
        eval_transform=usual,
        other_streams_transforms={"valid": (usual, None)},
    )  # fmt: skip
    return name_classes(benchmark, groups, 50 if object_lvl else 10)


def challenge_transform() -> Any:
    """PIL image to float in [0, 1], less ImageNet's mean, by its standard deviation; no more."""
    from torchvision.transforms import Compose, Normalize, ToTensor

    return Compose([ToTensor(), Normalize(CHALLENGE_MEAN, CHALLENGE_STD)])


def image_folder(mini: bool) -> str:
    """Name of the folder of images below the root."""
    return "core50_32x32" if mini else "core50_128x128"


def _locate(
    track: str, run: int, mini: bool, root: str | Path | None, download: bool
) -> tuple[Path, list[Path]]:
    """The folder of images, and the track's lists: training in order, then test."""
    from avalanche.benchmarks.datasets import default_dataset_location

    base = Path(root).expanduser() if root else Path(default_dataset_location("core50"))
    folder, n = LISTS[track]
    # Number 100 follows 99: names are made, never sorted.
    names = [f"train_batch_{k:02d}_filelist.txt" for k in range(n)] + ["test_filelist.txt"]
    lists = [base / folder / f"run{run}" / name for name in names]
    needed = [base / image_folder(mini), *lists]
    if download and not all(path.exists() for path in needed):
        from avalanche.benchmarks.datasets.core50 import core50 as avalanche_core50

        avalanche_core50.CORe50Dataset(root=base, mini=mini, download=True)
    missing = [path for path in needed if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"CORe50 is not complete in {base}: {missing[0]} is missing"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}. Expected there: "
            f"{image_folder(mini)}/s1..s11/o1..o50/C_SS_OO_FFF.png and {folder}/run{run}/ with "
            f"{names[0]} to {names[-2]} and {names[-1]}. Unpack CORe50's archives there, name "
            f"their folder with root=, pass download=True, or use toy_core50, which needs no data."
        )
    return needed[0], lists


def _read(path: Path) -> list[Row]:
    """Rows ``relative/path.png label`` of a list."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        name, _, label = line.rpartition(" ")
        if not name or not label.isdecimal():
            raise ValueError(
                f"{path}, line {number}: expected 's1/o1/C_01_01_000.png 0' (path, space, label); "
                f"got {line!r}."
            )
        rows.append((name, int(label)))
    if not rows:
        raise ValueError(f"{path} lists no images; unpack CORe50's lists again.")
    return rows


def _check_present(images: Path, path: Path, rows: Sequence[Row]) -> None:
    """Look for a list's first and last image; to look for all would cost seconds."""
    for name in (rows[0][0], rows[-1][0]):
        if not (images / name).is_file():
            raise FileNotFoundError(
                f"{images / name} is missing, though {path} lists it. Unpack the archive of "
                f"images again: {images} is not complete."
            )


def _clip(name: str) -> Clip:
    """Session and object of ``s1/o1/C_01_01_000.png``."""
    parts = name.split("/")
    if len(parts) != 3 or not (parts[0][1:].isdecimal() and parts[1][1:].isdecimal()):
        raise ValueError(f"expected a path like 's1/o1/C_01_01_000.png' in a list; got {name!r}.")
    return int(parts[0][1:]), int(parts[1][1:])


def _hold_out(track: str, train: list[list[Row]]) -> tuple[list[list[Row]], list[list[Row]]]:
    """Training lists without the held-out sessions, and the rows that were held out."""
    sessions = [{_clip(name)[0] for name, _ in rows} for rows in train]
    kept = sorted(sessions[0]) if track == "nic" else []
    held = held_out_sessions(sorted(set().union(*sessions)), kept)
    parts = [[[row for row in rows if (_clip(row[0])[0] in held) == out] for rows in train]
             for out in (False, True)]  # fmt: skip
    return [rows for rows in parts[0] if rows], parts[1]


def _split_by_label(test: list[list[Row]], groups: list[list[int]]) -> list[list[Row]]:
    """The test rows of each experience's classes, in the list's order."""
    owner = {label: k for k, group in enumerate(groups) for label in group}
    parts: list[list[Row]] = [[] for _ in groups]
    for row in chain(*test):
        if row[1] not in owner:
            raise ValueError(f"label {row[1]} of {row[0]} is tested but in no training list.")
        parts[owner[row[1]]].append(row)
    return parts


def _categories(rows: Sequence[Row]) -> list[Row]:
    """Labels by the object's number in the path: right in every track and run."""
    return [(name, (_clip(name)[1] - 1) // 5) for name, _ in rows]


def _thin(rows: list[Row], n: int | None, generator: torch.Generator) -> list[Row]:
    if n is None or n >= len(rows):
        return rows
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:n].tolist()]
