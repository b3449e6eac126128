"""Sweeps: a grid or a search over a recipe's settings, by any number of workers, in one folder.

Optuna keeps the trials and proposes values; here is what it leaves open: what a trial is (the
recipe over its seeds, on the protocol of ``experiments.selection``), and what happens to the trial
of a worker that dies.

Decisions and limits:
    1. A trial is a run folder, ``DIR/trials/N``. Its score is the average accuracy after the first
       experiences on held-out training images, averaged over the seeds.
    2. A grid is a queue of all its points, not Optuna's ``GridSampler``, which gives points that
       are still running to idle workers too: every point is to be trained once.
    3. Trials are handed out under a lock. Who takes the next one first looks for trials whose
       worker is dead (``experiments.leases``) and queues them again, with the same values, the same
       folder and ``retried_from``. After ``TRIES`` dead workers a trial is left alone.
    4. A worker leaves when nothing is left to do or to wait for: while others are at work, it stays
       to take over from them.
    5. A trial that ends in an error of its own (values that do not fit, a loss that is no longer
       finite) has failed, and is not repeated.
    6. Searching, a trial's random state follows from the sweep's seed and the trial's number, so
       that one worker makes the same search again. With several, what they know when they choose
       depends on who finished first.
    7. Workers on several machines need the folder on a file system they share, whatever keeps
       the trials.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avalanche_ext.experiments.leases import FileLock, Lease
from avalanche_ext.experiments.run import FinishedError, run_recipe
from avalanche_ext.experiments.search_space import (
    distribution,
    examples,
    grid_points,
    value_text,
)
from avalanche_ext.experiments.selection import for_selection
from avalanche_ext.recipes import Recipe, find_recipe, with_settings

__all__ = ["TRIES", "Sweep", "is_finished", "is_lost", "load", "open_study", "prepare", "work"]

TRIES = 5  # dead workers after which a trial is left alone
_POLL = 0.5  # seconds between two looks at the trials of others

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is varied, and how each trial is scored.

    Args:
        recipe: Name of the recipe.
        settings: Fields that every trial changes, as text: ``{"epochs": "2"}``.
        grid: Values of each field; every combination is a trial.
        search: A distribution for each field, ``{"lam": "loguniform:1e-5:1e-2"}``, instead.
        trials: Number of trials of a search.
        seeds: Seeds that a trial is averaged over; the recipe's by default.
        first: Experiences that a trial trains on; ``None`` for all.
        smoke: Few images, one epoch, one seed.
        device: Where to train.
        storage: URL of a database for the trials; a file in the folder by default.
        seed: Seed of the search.

    Raises:
        ValueError: For a field or value that the recipe does not take; for the test stream.
    """

    recipe: str
    settings: Mapping[str, str] = field(default_factory=dict)
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    search: Mapping[str, str] = field(default_factory=dict)
    trials: int | None = None
    seeds: tuple[int, ...] | None = None
    first: int | None = 2
    smoke: bool = False
    device: str = "cpu"
    storage: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.grid) == bool(self.search):
            raise ValueError("a sweep expects a grid or a search; give one of the two.")
        if self.search and (self.trials is None or self.trials < 1):
            raise ValueError(f"a search expects trials >= 1; got trials={self.trials}.")
        if self.grid and self.trials is not None:
            raise ValueError(
                f"a grid has as many trials as points ({len(grid_points(self.grid))}); got "
                f"trials={self.trials}. Leave it out."
            )
        twice = sorted({*self.settings} & {*self.grid, *self.search})
        if twice:
            raise ValueError(f"{twice} are both set and varied; leave them out of one of the two.")
        values = {f: list(v) for f, v in self.grid.items()}
        values |= {f: examples(f, spec) for f, spec in self.search.items()}
        for name, texts in values.items():
            for text in texts:
                self.trial_recipe({name: text})

    def trial_recipe(self, params: Mapping[str, Any]) -> Recipe:
        """The recipe of one trial.

        Raises:
            ValueError: For a field or value that the recipe does not take; for the test stream.
        """
        texts = {name: value_text(value) for name, value in params.items()}
        held_out = {"benchmark.validation": "true", **self.settings, **texts}
        recipe = with_settings(find_recipe(self.recipe), held_out)
        recipe = recipe.smoke() if self.smoke else recipe
        if self.seeds is not None:
            recipe = dataclasses.replace(recipe, seeds=self.seeds)
        return for_selection(recipe, self.first)

    def distributions(self) -> dict[str, Any]:
        """Optuna's distribution of each field."""
        from optuna.distributions import CategoricalDistribution

        grid = {name: CategoricalDistribution(values) for name, values in self.grid.items()}
        return grid | {name: distribution(name, spec) for name, spec in self.search.items()}


def prepare(sweep: Sweep, folder: Path) -> None:
    """Make the folder ready for workers; one that holds this very sweep goes on.

    Raises:
        ValueError: If the folder holds another sweep, or files that are none.
    """
    _optuna()
    if folder.is_file():
        raise ValueError(f"{folder} is a file; --out names the folder of the sweep.")
    path = folder / "protocol.json"
    if folder.exists() and not path.exists() and {p.name for p in folder.iterdir()} - {"lock"}:
        raise ValueError(
            f"{folder} holds files, but no sweep (no protocol.json); choose another --out. "
            f"Nothing of it was touched."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        new = json.loads(json.dumps(dataclasses.asdict(sweep)))
        old = json.loads(path.read_text("utf-8")) if path.exists() else {}
        study = old.pop("study", f"{sweep.recipe} {uuid.uuid4().hex[:8]}")
        changed = sorted(k for k in new if old and old.get(k) != new[k] and k != "trials")
        if changed:
            raise ValueError(
                f"{folder} holds another sweep ({', '.join(changed)} differ). Choose another --out."
            )
        if old != new:
            write_json(path, {"study": study, **new})
        _queue(sweep, open_study(folder))


def load(folder: Path) -> Sweep:
    """The sweep of a folder.

    Raises:
        FileNotFoundError: If it holds none.
    """
    data = _protocol(folder)
    data.pop("study")
    data["grid"] = {name: tuple(values) for name, values in data["grid"].items()}
    data["seeds"] = data["seeds"] and tuple(data["seeds"])
    return Sweep(**data)


def open_study(folder: Path) -> Any:
    """Optuna's study of a folder."""
    optuna = _optuna()
    data = _protocol(folder)
    url = data["storage"]
    if url is None:
        from optuna.storages.journal import JournalFileBackend

        backend = JournalFileBackend(str(folder / "journal.log"))
        storage: Any = optuna.storages.JournalStorage(backend)
    else:
        patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        storage = optuna.storages.RDBStorage(url, engine_kwargs=patience)
    return optuna.create_study(
        study_name=data["study"], storage=storage, load_if_exists=True, direction="maximize"
    )


def work(folder: Path, say: Say = lambda text: None) -> None:
    """Take trials and train them until none is left; any number of processes may do so at once.

    Args:
        folder: Made ready by ``prepare``.
        say: Called with a line of text for each trial.
    """
    sweep, study = load(folder), open_study(folder)
    with Lease(folder / "workers") as lease:
        while (trial := _claim(sweep, study, folder, lease, say)) is not None:
            _train(sweep, study, trial, folder, say)


def is_lost(trial: Any) -> bool:
    """Whether a trial ended with its worker, not by an error of its own."""
    return trial.state.name == "FAIL" and "error" not in trial.user_attrs


def is_finished(sweep: Sweep, trials: list[Any]) -> bool:
    """Whether nothing is running, waiting or yet to be proposed."""
    busy = any(not t.state.is_finished() for t in trials)
    return not (busy or _to_repeat(trials) or _places(sweep, trials))


def write_json(path: Path, data: Any) -> None:
    """Write through a second file: a crash while writing leaves the old one."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    draft.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    draft.replace(path)


# parts ----------------------------------------------------------------------------------------


def _queue(sweep: Sweep, study: Any) -> None:
    """Queue the points of the grid that are not there yet."""
    there = {t.user_attrs.get("point") for t in study.get_trials(deepcopy=False)}
    for number, point in enumerate(grid_points(sweep.grid) if sweep.grid else ()):
        if number not in there:
            study.enqueue_trial(point, user_attrs={"point": number, "params": point})


def _claim(sweep: Sweep, study: Any, folder: Path, lease: Lease, say: Say) -> Any:
    """The next trial, or ``None`` when all is done; waits while others are at work."""
    while True:
        with FileLock(folder / "lock"):
            _take_up_lost(study, lease, say)
            trials = study.get_trials(deepcopy=False)
            if any(t.state.name == "WAITING" for t in trials) or _places(sweep, trials):
                study.sampler = _optuna().samplers.TPESampler(
                    seed=(1_000_003 * sweep.seed + len(trials)) % 2**32
                )
                trial = study.ask(sweep.distributions())
                trial.set_user_attr("worker", lease.name)
                return trial
            if is_finished(sweep, trials):
                return None
        time.sleep(_POLL)


def _take_up_lost(study: Any, lease: Lease, say: Say) -> None:
    """Queue the trials of dead workers again. Under the lock no trial is without its worker."""
    for trial in study.get_trials(deepcopy=False):
        worker = trial.user_attrs.get("worker")
        if trial.state.name == "RUNNING" and not (worker and lease.is_alive(worker)):
            study.tell(trial.number, state=type(trial.state).FAIL, skip_if_finished=True)
    for trial in _to_repeat(study.get_trials(deepcopy=False)):
        own = trial.user_attrs
        marks = {
            "retried_from": trial.number,
            "first_try": own.get("first_try", trial.number),
            "deaths": _deaths(trial),
            "params": own.get("params", trial.params),
        }
        if "point" in own:
            marks["point"] = own["point"]
        study.enqueue_trial(marks["params"], user_attrs=marks)
        say(f"trial {trial.number} was lost with its worker; it is taken up again")


def _to_repeat(trials: list[Any]) -> list[Any]:
    done = {t.user_attrs.get("retried_from") for t in trials}
    return [t for t in trials if is_lost(t) and t.number not in done and _deaths(t) < TRIES]


def _deaths(trial: Any) -> int:
    """Workers that died over the values of a lost trial; one that was stopped did not."""
    released = trial.user_attrs.get("released", False)
    return trial.user_attrs.get("deaths", 0) + (0 if released else 1)


def _places(sweep: Sweep, trials: list[Any]) -> int:
    """How many trials a search has yet to propose."""
    return max(0, (sweep.trials or 0) - sum("retried_from" not in t.user_attrs for t in trials))


def _train(sweep: Sweep, study: Any, trial: Any, folder: Path, say: Say) -> None:
    from optuna.exceptions import UpdateFinishedTrialError

    number = trial.user_attrs.get("first_try", trial.number)
    place = folder / "trials" / f"{number:04d}"
    shown = " ".join(f"{name}={value_text(value)}" for name, value in trial.params.items())
    row, error = {}, ""
    try:
        row = _score(sweep.trial_recipe(trial.params), place, sweep.device)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as reason:
        error = f"{type(reason).__name__}: {reason}"
    except KeyboardInterrupt:
        trial.set_user_attr("released", True)
        raise
    try:
        if error:
            trial.set_user_attr("error", error)
            study.tell(trial, state=_optuna().trial.TrialState.FAIL)
            say(f"trial {trial.number}: {shown}: failed, {error}")
            return
        mean = row["average_accuracy"]["mean"]
        trial.set_user_attr("values", row["average_accuracy"]["values"])
        trial.set_user_attr("parameters_mean", row["parameters_mean"]["mean"])
        trial.set_user_attr("seconds", sum(row["seconds"]["values"]))
        study.tell(trial, mean)
    except UpdateFinishedTrialError:
        say(f"trial {trial.number} was taken over by another worker; this result is dropped")
        return
    say(f"trial {trial.number}: {shown}: accuracy {100 * mean:.2f} %")


def _score(recipe: Recipe, folder: Path, device: str) -> dict[str, Any]:
    """The row of the trial's run; seeds that an earlier try has finished are kept."""
    try:
        summary = run_recipe(recipe, folder, device=device)
    except FinishedError:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
    return summary["rows"][0]


def _protocol(folder: Path) -> dict[str, Any]:
    path = folder / "protocol.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; {folder} holds no sweep. 'avalanche-ext sweep RECIPE --out "
            f"{folder}' makes one."
        )
    return json.loads(path.read_text("utf-8"))


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sweeps need Optuna, which is not installed: pip install 'avalanche-ext[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
