"""Run a recipe: one folder with everything that its numbers can be computed from again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin

from avalanche_ext.catalog import find_card
from avalanche_ext.evaluation.accounting import (
    bytes_by_kind,
    count_parameters,
    flops_per_sample,
)
from avalanche_ext.evaluation.accuracy_matrix import (
    draw_accuracy_matrix,
    matrix_metrics,
    seen_accuracies,
)
from avalanche_ext.evaluation.challenge import average_validation_accuracy
from avalanche_ext.evaluation.metrics.challenge import ChallengeMetrics
from avalanche_ext.evaluation.metrics.device import accuracy_metrics, loss_metrics
from avalanche_ext.evaluation.tables import COLUMNS, measured_fields
from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.experiments.checkpoint import Checkpoints
from avalanche_ext.experiments.generation import GENERATION_COLUMNS, GenerationWatch
from avalanche_ext.experiments.leases import FileLock
from avalanche_ext.experiments.observers import ClassCounter, Logs, Progress, SampleCounter
from avalanche_ext.experiments.provenance import commit, peak_memory, versions
from avalanche_ext.experiments.sample_grids import SampleGrids
from avalanche_ext.recipes import Recipe
from avalanche_ext.recipes.settings import completed, to_json

__all__ = [
    "FinishedError",
    "member_folders",
    "run_folders",
    "run_recipe",
    "run_seed",
    "summarise",
    "watched_stream",
]

Say = Callable[[str], None]
_LOCK = "running"  # held by the process that writes in the folder


class FinishedError(Exception):
    """The folder already holds this run, finished."""


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    baselines: Sequence[Recipe] = (),
    overwrite: bool = False,
    device: str = "cpu",
    checkpoint_every: int | None = None,
    trust_checkpoint: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Run a recipe and its baselines over the recipe's seeds (pairs of them, with class orders).

    Seeds whose ``result.json`` exists are not run again, and one that was interrupted goes on from
    its last checkpoint, with the numbers of an uninterrupted run: the same call finishes what an
    interrupted one began.

    Args:
        recipe: The protocol.
        out: Folder of the run.
        baselines: Recipes to run beside it, in ``out/baselines``.
        overwrite: Delete what is in the folder first.
        device: Where to train.
        checkpoint_every: Save a checkpoint behind every so many training steps, besides those
            behind every experience.
        trust_checkpoint: Load checkpoints with pickled state, which can run code.
        say: Called with a line of text for each finished seed.

    Returns:
        The summary, also written to ``out/summary.json``.

    Raises:
        FinishedError: If the folder holds this very run, complete.
        ValueError: If it holds a run of other settings, or files that are no run; if another
            process is at work there; for a bad argument of any of the methods, before the first
            one is run.
    """
    members = member_folders(out, recipe, baselines)
    if out.is_file():
        raise ValueError(f"{out} is a file; --out names the folder of the run.")
    inside = [path.name for path in out.iterdir()] if out.exists() else []
    if {*inside} - {_LOCK} and "recipe.json" not in inside:
        raise ValueError(
            f"{out} holds files, but no run (no recipe.json); choose another --out. Nothing of it "
            f"was touched."
        )
    for _, member in members:
        find_card(member.method).build(member)  # a bad argument is an error now, not hours later
    out.mkdir(parents=True, exist_ok=True)
    # Other systems have no such locks.
    lock = FileLock(out / _LOCK, wait=False) if os.name == "posix" else contextlib.nullcontext()
    try:
        with lock:
            try:
                return _run_members(
                    members, overwrite, device=device, checkpoint_every=checkpoint_every,
                    trust_checkpoint=trust_checkpoint, say=say,
                )  # fmt: skip
            finally:
                (out / _LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    out.rmdir()  # if nothing came of it
    except BlockingIOError as error:
        raise ValueError(
            f"another process is running in {out}; wait until it has finished, or choose another "
            f"--out."
        ) from error


def _run_members(
    members: list[tuple[Path, Recipe]],
    overwrite: bool,
    *,
    say: Say,
    **options: Any,
) -> dict[str, Any]:
    out, recipe = members[0]
    if overwrite:
        for path in out.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()
    for folder, member in members:
        _check_same(folder, member)
    missing = [
        (member, pair, home)
        for folder, member in members[1:] + members[:1]
        for pair, home in run_folders(folder, recipe).items()
        if not (home / "result.json").exists()
    ]
    if not missing and (out / "summary.json").exists():
        raise FinishedError(f"{out} already holds this run, finished; use --overwrite to repeat it")
    for folder, member in members:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "recipe.json", to_json(member))
    for member, (seed, order_seed), home in missing:
        result = run_seed(member, seed, home, order_seed=order_seed, say=say, **options)
        lost = result.get("forgetting")
        say(
            f"{member.name} {home.name.replace('_', ' ')}: accuracy "
            f"{100 * result['average_accuracy']:.1f} %, "
            + ("" if lost is None else f"forgetting {100 * lost:.1f} %, ")
            + f"{result['seconds']:.1f} s"
        )
    rows = [summarise(run_folders(folder, recipe).values(), member) for folder, member in members]
    summary = {
        "recipe": recipe.name,
        "device": options["device"],
        "versions": versions(),
        "commit": commit(),
        "rows": rows[1:] + rows[:1],
    }
    _write_json(out / "summary.json", summary)
    shown = {home.name for home in run_folders(out, recipe).values()}
    others = sorted({path.parent.name for path in out.glob("seed_*/result.json")} - shown)
    if others:
        say(
            f"{out} also holds {', '.join(others)}, which this table leaves out; ask for them with "
            f"--seeds."
        )
    return summary


def member_folders(
    out: Path, recipe: Recipe, baselines: Sequence[Recipe]
) -> list[tuple[Path, Recipe]]:
    """The folder of the recipe, then of each of its baselines."""
    others = [(out / "baselines" / b.name.replace("/", "__"), b) for b in baselines]
    return [(out, recipe), *others]


def run_folders(folder: Path, recipe: Recipe) -> dict[tuple[int, int | None], Path]:
    """The folder of each of the recipe's runs: ``seed_S``, or ``seed_S_order_O``."""
    return {
        (seed, order): folder / (f"seed_{seed}" + ("" if order is None else f"_order_{order}"))
        for seed, order in recipe.runs
    }


def run_seed(
    recipe: Recipe,
    seed: int,
    folder: Path,
    *,
    order_seed: int | None = None,
    device: str = "cpu",
    checkpoint_every: int | None = None,
    trust_checkpoint: bool = False,
    say: Say | None = None,
) -> dict[str, Any]:
    """Train and test one seed; write ``events.jsonl``, ``tensorboard/`` and ``result.json``.

    A benchmark with a ``valid_stream`` is tested on it after every experience, and on its test
    stream once, at the end; others on their test stream.

    A seed that was interrupted goes on from its last checkpoint, see ``run_recipe``.
    """
    saved = folder / "checkpoints"
    if folder.exists() and not any(saved.glob("*.pt")):
        shutil.rmtree(folder)  # cut short before the first checkpoint: begin again
    folder.mkdir(parents=True, exist_ok=True)
    card = find_card(recipe.method)
    benchmark = recipe.benchmark.build(seed, order_seed)
    watched = watched_stream(benchmark)
    RNGManager.set_random_seeds(seed)  # after the benchmark, which draws random numbers too
    logs = Logs(folder)
    title = f"{card.title}, seed {seed}"
    sizes_of_stream = _sizes(benchmark.train_stream)
    epochs = [recipe.epochs_of(k) for k in range(len(sizes_of_stream))]
    progress = Progress(title, sizes_of_stream, epochs, say=say)
    challenge = ChallengeMetrics()
    counter, classes = SampleCounter(), ClassCounter(recipe.benchmark.n_outputs)
    strategy = build_strategy(
        recipe,
        plugins=[counter, classes, progress, SampleGrids(logs.board.writer)],
        evaluator=EvaluationPlugin(
            loss_metrics(epoch=True),
            accuracy_metrics(experience=True, stream=True),
            *([] if watched is benchmark.test_stream else [challenge]),
            loggers=[logs.events, logs.board],
            strict_checks=False,
        ),
        device=device,
    )
    checkpoints = Checkpoints(
        saved, strategy, benchmark, every=checkpoint_every, trusted=trust_checkpoint,
        log_position=logs.position, rewind_logs=logs.rewind,
    )  # fmt: skip
    watch = GenerationWatch(
        strategy, benchmark, recipe.benchmark.n_outputs, folder, logs.board.writer
    )
    done = checkpoints.resume()
    matrix, seconds = done.get("accuracy_matrix", []), done.get("seconds_per_experience", [])
    sizes = done.get("parameters_per_experience", [])
    made = done.get("generation_per_experience", [])
    progress.skip(len(matrix))
    for k, experience in enumerate(benchmark.train_stream):
        if k < len(matrix):
            continue
        start = time.perf_counter()
        strategy.train_epochs = epochs[k]
        checkpoints.train(k, experience)
        seconds.append(time.perf_counter() - start - checkpoints.seconds)
        sizes.append(count_parameters(strategy.model))
        made += watch.after_experience(k)
        matrix.append(_accuracies(strategy.eval(watched), watched.name))
        checkpoints.save(k + 1, {
            "accuracy_matrix": matrix,
            "seconds_per_experience": seconds,
            "parameters_per_experience": sizes,
            "generation_per_experience": made,
        })  # fmt: skip
    progress.close()
    final = {}
    if watched is not benchmark.test_stream:
        values = _accuracies(strategy.eval(benchmark.test_stream), benchmark.test_stream.name)
        final = {
            "test_accuracies": values,
            "test_accuracy": sum(values) / len(values),
            "average_validation_accuracy": average_validation_accuracy(matrix),
            "challenge": challenge.result(),
        }
    kept = bytes_by_kind(strategy)
    kept_shares = getattr(strategy, "channels_kept", None)
    result = {
        "recipe": recipe.name,
        "method": recipe.method,
        "seed": seed,
        "order_seed": order_seed,
        "accuracy_matrix": matrix,
        "accuracy_matrix_stream": watched.name,
        **matrix_metrics(matrix, samples=_sizes(watched) if len(matrix[0]) > 1 else None),
        # A_5 and A_10 of one run, as tables of generative replay have them
        **({"average_accuracy_after_5": seen_accuracies(matrix)[4]} if len(matrix) > 5 else {}),
        **final,
        "per_class_accuracy": classes.accuracy,
        "seconds": sum(seconds),
        "seconds_per_experience": seconds,
        "samples_trained": counter.samples,
        "parameters": sizes[-1],
        "parameters_mean": sum(sizes) / len(sizes),
        "parameters_per_experience": sizes,
        **({"channels_kept": kept_shares} if kept_shares else {}),
        **watch.summary(made),
        "flops_per_sample": _flops(strategy, watched),
        "bytes_remembered": sum(kept.values()),
        "bytes_by_kind": kept,
        **peak_memory(strategy.device),
        "versions": versions(),
        "commit": commit(),
        "device": str(strategy.device),
    }
    figure = draw_accuracy_matrix(matrix, f"{card.title}: accuracy % (seed {seed})")
    logs.board.writer.add_figure("accuracy_matrix", figure, len(matrix))
    logs.board.writer.close()
    figure.savefig(folder / "accuracy_matrix.png", dpi=110)
    logs.events.write({"event": "finished", "average_accuracy": result["average_accuracy"]})
    _write_json(folder / "result.json", result)
    checkpoints.clear()
    return result


def watched_stream(benchmark: Any) -> Any:
    """What a run is tested on after every experience: the ``valid_stream`` if there is one."""
    return getattr(benchmark, "valid_stream", benchmark.test_stream)


def summarise(homes: Iterable[Path], recipe: Recipe) -> dict[str, Any]:
    """One row of a table from the folders of a recipe's runs."""
    results = [_result(home / "result.json") for home in homes]
    title = recipe.title or find_card(recipe.method).title
    own_mode = recipe.method in ("ber", "drl_ber") and getattr(recipe, "mode", "per_group")
    if not recipe.title and own_mode and own_mode != "per_group":
        title += f" {recipe.mode}"  # type: ignore[attr-defined]
    # The rest is in each result.json, and in the report's table of all metrics.
    more = ("test_accuracy", "average_validation_accuracy", "parameters_mean", *GENERATION_COLUMNS)
    shown = {*more, *(c[0] for c in COLUMNS), *(p.quantity for p in recipe.published)}
    return {
        "title": title,
        "recipe": recipe.name,
        "seeds": len(results),
        **{field: v for field, v in measured_fields(results).items() if field in shown},
        "parameters": results[0]["parameters"],
        "accuracy_matrices": [r["accuracy_matrix"] for r in results],
        "settings": to_json(recipe),
    }


def _result(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text("utf-8"))
    if "accuracy_matrix" not in found:
        raise ValueError(
            f"{path} is no result of a run; delete it, and the same command repeats it."
        )
    return found


def _accuracies(metrics: dict[str, Any], stream: str) -> list[float]:
    rows = {
        int(name.rsplit("/Exp", 1)[1]): value
        for name, value in metrics.items()
        if name.startswith(f"Top1_Acc_Exp/eval_phase/{stream}_stream")
    }
    return [rows[k] for k in sorted(rows)]


def _sizes(stream: Any) -> list[int]:
    return [len(experience.dataset) for experience in stream]


def _flops(strategy: Any, stream: Any) -> int:
    x, *_ = stream[0].dataset.eval()[0]
    return flops_per_sample(strategy.model, x[None].to(strategy.device))


def _check_same(folder: Path, recipe: Recipe) -> None:
    path = folder / "recipe.json"
    if not path.exists():
        return
    new = to_json(recipe)
    old = completed(json.loads(path.read_text("utf-8")))
    changed = sorted(
        k for k in {*old, *new} if old.get(k) != new.get(k) and k not in ("seeds", "order_seeds")
    )
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(changed)} differ). Choose "
            f"another --out, or --overwrite it."
        )


def _write_json(path: Path, data: Any) -> None:
    # Through a second file: a crash while writing leaves the old one.
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    draft.replace(path)
