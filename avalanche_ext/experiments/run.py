"""Run a recipe: one folder with everything that its numbers can be computed from again."""

from __future__ import annotations

import json
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin

import avalanche_ext
from avalanche_ext.catalog import find_card
from avalanche_ext.evaluation.accuracy_matrix import (
    average_accuracy,
    average_incremental_accuracy,
    draw_accuracy_matrix,
    forgetting,
)
from avalanche_ext.evaluation.metrics.device import accuracy_metrics, loss_metrics
from avalanche_ext.evaluation.tables import COLUMNS, aggregate
from avalanche_ext.experiments.accounting import bytes_remembered
from avalanche_ext.experiments.checkpoint import Checkpoints
from avalanche_ext.experiments.observers import ClassCounter, Logs, Progress, SampleCounter
from avalanche_ext.models.mlp import MLP
from avalanche_ext.recipes.base import Recipe, to_json
from avalanche_ext.training.plugins.device_data import DeviceDataPlugin

__all__ = ["FinishedError", "build_strategy", "run_recipe", "run_seed", "summarise", "versions"]

Say = Callable[[str], None]


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
    """Run a recipe and its baselines over the recipe's seeds.

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
        ValueError: If it holds a run of other settings, or files that are no run.
    """
    members = [(out, recipe)] + [
        (out / "baselines" / b.name.replace("/", "__"), b) for b in baselines
    ]
    if out.is_file():
        raise ValueError(f"{out} is a file; --out names the folder of the run.")
    if out.exists() and not (out / "recipe.json").exists() and any(out.iterdir()):
        raise ValueError(
            f"{out} holds files, but no run (no recipe.json); choose another --out. Nothing of it "
            f"was touched."
        )
    if overwrite and out.exists():
        shutil.rmtree(out)
    for folder, member in members:
        _check_same(folder, member)
    missing = [
        (folder, member, seed)
        for folder, member in members[1:] + members[:1]
        for seed in recipe.seeds
        if not (folder / f"seed_{seed}" / "result.json").exists()
    ]
    if not missing and (out / "summary.json").exists():
        raise FinishedError(f"{out} already holds this run, finished; use --overwrite to repeat it")
    for folder, member in members:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "recipe.json", to_json(member))
    for folder, member, seed in missing:
        result = run_seed(
            member, seed, folder / f"seed_{seed}", device=device,
            checkpoint_every=checkpoint_every, trust_checkpoint=trust_checkpoint,
        )  # fmt: skip
        say(
            f"{member.name} seed {seed}: accuracy {100 * result['average_accuracy']:.1f} %, "
            f"forgetting {100 * result['forgetting']:.1f} %, {result['seconds']:.1f} s"
        )
    rows = [summarise(folder, member, recipe.seeds) for folder, member in members]
    summary = {
        "recipe": recipe.name,
        "device": device,
        "versions": versions(),
        "rows": rows[1:] + rows[:1],
    }
    _write_json(out / "summary.json", summary)
    return summary


def run_seed(
    recipe: Recipe,
    seed: int,
    folder: Path,
    *,
    device: str = "cpu",
    checkpoint_every: int | None = None,
    trust_checkpoint: bool = False,
) -> dict[str, Any]:
    """Train and test one seed; write ``events.jsonl``, ``tensorboard/`` and ``result.json``.

    A seed that was interrupted goes on from its last checkpoint, see ``run_recipe``.
    """
    saved = folder / "checkpoints"
    if folder.exists() and not any(saved.glob("*.pt")):
        shutil.rmtree(folder)  # cut short before the first checkpoint: begin again
    folder.mkdir(parents=True, exist_ok=True)
    card = find_card(recipe.method)
    benchmark = recipe.benchmark.build(seed)
    RNGManager.set_random_seeds(seed)  # after the benchmark, which draws random numbers too
    logs = Logs(folder)
    title = f"{card.title}, seed {seed}"
    progress = Progress(title, len(benchmark.train_stream), recipe.epochs)
    counter, classes = SampleCounter(), ClassCounter(recipe.benchmark.n_outputs)
    strategy = build_strategy(
        recipe,
        plugins=[counter, classes, progress],
        evaluator=EvaluationPlugin(
            loss_metrics(epoch=True),
            accuracy_metrics(experience=True, stream=True),
            loggers=[logs.events, logs.board],
            strict_checks=False,
        ),
        device=device,
    )
    checkpoints = Checkpoints(
        saved, strategy, benchmark, every=checkpoint_every, trusted=trust_checkpoint,
        log_position=logs.position, rewind_logs=logs.rewind,
    )  # fmt: skip
    done = checkpoints.resume()
    matrix, seconds = done.get("accuracy_matrix", []), done.get("seconds_per_experience", [])
    progress.skip(len(matrix) * recipe.epochs)
    for k, experience in enumerate(benchmark.train_stream):
        if k < len(matrix):
            continue
        start = time.perf_counter()
        checkpoints.train(k, experience)
        seconds.append(time.perf_counter() - start)
        matrix.append(_accuracies(strategy.eval(benchmark.test_stream)))
        run = {"accuracy_matrix": matrix, "seconds_per_experience": seconds}
        checkpoints.save(k + 1, run)
    progress.close()
    result = {
        "recipe": recipe.name,
        "method": recipe.method,
        "seed": seed,
        "accuracy_matrix": matrix,
        "average_accuracy": average_accuracy(matrix),
        "average_incremental_accuracy": average_incremental_accuracy(matrix),
        "forgetting": forgetting(matrix),
        "per_class_accuracy": classes.accuracy,
        "seconds": sum(seconds),
        "seconds_per_experience": seconds,
        "samples_trained": counter.samples,
        "parameters": sum(p.numel() for p in strategy.model.parameters()),
        "bytes_remembered": bytes_remembered(strategy),
        **peak_memory(strategy.device),
        "versions": versions(),
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


def build_strategy(
    recipe: Recipe,
    *,
    plugins: Sequence[Any] = (),
    evaluator: EvaluationPlugin | None = None,
    device: str = "cpu",
) -> Any:
    """The Avalanche strategy of a recipe: network, SGD and the method's plugins, then ``plugins``.

    Data stay in tensors on the device (``DeviceDataPlugin``), which changes no number.
    The network's first weights come from torch's global random state: seed it before.
    """
    card = find_card(recipe.method)
    model = MLP(recipe.benchmark.input_features, recipe.hidden, recipe.benchmark.n_outputs)
    return card.strategy_class()(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=recipe.batch_size,
        train_epochs=recipe.epochs,
        eval_mb_size=512,
        device=device,
        plugins=[DeviceDataPlugin(), *card.build(recipe), *plugins],
        evaluator=evaluator,
    )


def summarise(folder: Path, recipe: Recipe, seeds: Sequence[int]) -> dict[str, Any]:
    """One row of a table from the results of a folder's seeds."""
    results = [
        json.loads((folder / f"seed_{seed}" / "result.json").read_text("utf-8")) for seed in seeds
    ]
    title = find_card(recipe.method).title
    if getattr(recipe, "mode", "per_group") != "per_group":
        title += f" {recipe.mode}"  # type: ignore[attr-defined]
    return {
        "title": title,
        "recipe": recipe.name,
        "seeds": len(seeds),
        **{field: aggregate([r[field] for r in results]) for field, *_ in COLUMNS},
        "parameters": results[0]["parameters"],
        "accuracy_matrices": [r["accuracy_matrix"] for r in results],
    }


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """The process's largest resident memory so far, and the device's largest allocation."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        # Linux counts in kilobytes, macOS in bytes.
        "peak_rss_bytes": resident if sys.platform == "darwin" else 1024 * resident,
        "peak_device_bytes": on_device,
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("torch", "avalanche-lib", "numpy", "scikit-learn")
    return {
        "avalanche_ext": avalanche_ext.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _accuracies(metrics: dict[str, Any]) -> list[float]:
    rows = {
        int(name.rsplit("/Exp", 1)[1]): value
        for name, value in metrics.items()
        if name.startswith("Top1_Acc_Exp/eval_phase/test_stream")
    }
    return [rows[k] for k in sorted(rows)]


def _check_same(folder: Path, recipe: Recipe) -> None:
    path = folder / "recipe.json"
    if not path.exists():
        return
    old, new = json.loads(path.read_text("utf-8")), to_json(recipe)
    changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k) and k != "seeds")
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
