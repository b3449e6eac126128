"""Toy pictures in CORe50's layout on disk, to try the real tracks' code without the real images."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from avalanche_ext.benchmarks.core50 import LISTS, image_folder
from avalanche_ext.benchmarks.core50_tracks import (
    NC_ORDER,
    SESSIONS,
    TEST_SESSIONS,
    TRACKS,
    TRAIN_SESSIONS,
    Clip,
    plan_stream,
)
from avalanche_ext.benchmarks.toy_frames import CATEGORIES, draw_world, render_clip
from avalanche_ext.training.checks import check_count, check_one_of

__all__ = ["write_core50_tree"]

_OBJECTS = tuple(range(1, 51))
# Avalanche's and CORe50's name of each track, as in the pickles.
_SCENARIOS = {"ni": "ni", "nc": "nc", "nic": "nicv2_391"}


def write_core50_tree(
    root: str | Path,
    *,
    frames: int = 2,
    size: int | None = None,
    mini: bool = False,
    runs: int = 1,
    seed: int = 0,
) -> Path:
    """Write ``11 x 50 x frames`` toy pictures, file lists and pickles as CORe50 lays them out.

    ``core50`` and Avalanche's own ``CORe50`` (``"ni"``, ``"nc"``, ``"nicv2_391"``) read the
    result. Run 0 brings the objects of ``"nc"`` in CORe50's order; the other orders are ours.
    With two frames: ``"ni"`` 8 x 100, ``"nc"`` 160 + 8 x 80, ``"nic"`` 20 + 390 x 2 and 300
    test images.

    Args:
        root: Folder to write to; made if absent.
        frames: Pictures of each object in each session.
        size: Width and height in pixels; 128, or 32 with ``mini``.
        mini: Write to ``core50_32x32`` in place of ``core50_128x128``.
        runs: Write the lists of this many runs, 1 to 10.
        seed: Draws the objects and rooms.

    Returns:
        The root.

    Raises:
        FileExistsError: If there is a CORe50 in the folder; nothing is ever overwritten.
    """
    check_count("write_core50_tree", frames=frames, size=size)
    check_one_of("write_core50_tree", "runs", runs, tuple(range(1, 11)))
    root = Path(root).expanduser()
    for name in (image_folder(mini), "batches_filelists", "NIC_v2_391", "paths.pkl"):
        if (root / name).exists():
            raise FileExistsError(
                f"{root / name} exists; write_core50_tree overwrites nothing. Name an empty folder."
            )
    _write_images(root / image_folder(mini), frames, size or (32 if mini else 128), seed)
    lists = {t: [_write_lists(root, t, run, frames) for run in range(runs)] for t in TRACKS}
    _write_pickles(root, lists)
    return root


def _write_images(folder: Path, frames: int, size: int, seed: int) -> None:
    from PIL import Image

    world = draw_world(seed)
    for session in SESSIONS:
        for obj in _OBJECTS:
            pictures = render_clip(world, session, obj, frames, size).permute(0, 2, 3, 1)
            (folder / f"s{session}" / f"o{obj}").mkdir(parents=True)
            for name, picture in zip(_names((session, obj), frames), pictures, strict=True):
                Image.fromarray(picture.numpy()).save(folder / name, compress_level=1)


def _names(clip: Clip, frames: int) -> list[str]:
    session, obj = clip
    return [f"s{session}/o{obj}/C_{session:02d}_{obj:02d}_{k:03d}.png" for k in range(frames)]


def _run_order(run: int) -> tuple[list[int], list[int], torch.Generator]:
    """Objects and training sessions in the order of a run, and the generator of the rest."""
    generator = torch.Generator().manual_seed(run)
    if run == 0:
        return list(NC_ORDER), list(TRAIN_SESSIONS), generator
    order, sessions = (
        [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
        for items in (_OBJECTS, TRAIN_SESSIONS)
    )
    return order, sessions, generator


def _object_labels(track: str, run: int) -> dict[int, int]:
    objects = _run_order(run)[0] if track == "nc" else _OBJECTS
    return {obj: label for label, obj in enumerate(objects)}


def _write_lists(root: Path, track: str, run: int, frames: int) -> list[list[tuple[str, int]]]:
    """One list of ``path label`` per training experience, and the test list; returns the rows."""
    order, sessions, generator = _run_order(run)
    label = _object_labels(track, run)
    test = [(s, o) for s in TEST_SESSIONS for o in _OBJECTS]
    experiences = [*plan_stream(track, order, sessions, generator), test]
    rows = [[(n, label[c[1]]) for c in clips for n in _names(c, frames)] for clips in experiences]
    folder = root / LISTS[track][0] / f"run{run}"
    folder.mkdir(parents=True)
    names = [f"train_batch_{k:02d}_filelist.txt" for k in range(len(rows) - 1)]
    for name, part in zip([*names, "test_filelist.txt"], rows, strict=True):
        text = "".join(f"{path} {number}\n" for path, number in part)
        (folder / name).write_text(text, "utf-8", newline="\n")
    return rows


def _write_pickles(root: Path, lists: dict[str, list[list[list[tuple[str, int]]]]]) -> None:
    # Avalanche looks targets up by a path's index in run 0 of NI, so paths have that order.
    paths = [name for rows in lists["ni"][0] for name, _ in rows]
    index = {name: i for i, name in enumerate(paths)}
    content: dict[str, Any] = {
        "paths": paths,
        "LUP": {_SCENARIOS[t]: [[[index[n] for n, _ in rows] for rows in run] for run in of]
                for t, of in lists.items()},
        "labels": {_SCENARIOS[t]: [[[y for _, y in rows] for rows in run] for run in of]
                   for t, of in lists.items()},
        "labels2names": {t: [{y: f"{CATEGORIES[(o - 1) // 5]}{(o - 1) % 5 + 1}"
                              for o, y in _object_labels(t, run).items()}
                             for run in range(len(of))]
                         for t, of in lists.items()},
    }  # fmt: skip
    for name, value in content.items():
        (root / f"{name}.pkl").write_bytes(pickle.dumps(value))
