"""Recipes of memory in latent space: densities of features, stored features, bridges; on MNIST.

The source (Skorokhodov, 2019) proposes these methods and prints no figures; those of generative
feature replay (Liu et al., 2020) could not be verified. So there is no published column.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from avalanche_ext.recipes.base import Recipe
from avalanche_ext.recipes.drl_ber import ReplayRecipe
from avalanche_ext.recipes.streams import SplitCIFAR100, SplitDigits, SplitMNIST, ToyCORe50

__all__ = ["RECIPES", "AlignmentRecipe", "LatentRecipe"]

_SOURCE = "Skorokhodov (2019), Generative Memory for Continual Learning"


@dataclass(frozen=True, kw_only=True)
class LatentRecipe(Recipe):
    """A protocol of rehearsal in feature space.

    Args:
        layer: Where the network is cut.
        encoder: What becomes of the part in front: ``"freeze_after_first"``, ``"frozen"``,
            ``"slow"``, ``"distill"`` or ``"finetune"``.
        memory: ``"gaussian"``, ``"diagonal"``, ``"full"``, ``"mixture"``, ``"vae"`` or ``"wgan"``.
        drift: ``"linear"``, ``"sdc"``, ``"prototypes"`` or ``"none"``.
        slow: Share of its steps that a slow encoder takes after the first experience.
        prototypes: Images of each class that are kept for ``drift="prototypes"``.
        r: Weight of the new data; by default the method's own rule.
        lam: Weight of the distance of features, for ``"distill"``.
        stored: Features that ``latent_replay`` stores.
        stored_bytes: Or their bytes.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    hidden: tuple[int, ...] = (400, 200)
    batch_size: int = 64
    layer: str = "features.1"
    encoder: str = "freeze_after_first"
    memory: str = "gaussian"
    drift: str | None = None
    slow: float = 0.1
    prototypes: int = 10
    r: str | None = None
    lam: float = 1.0
    stored: int | None = None
    stored_bytes: int | None = None
    source: str = _SOURCE


@dataclass(frozen=True, kw_only=True)
class AlignmentRecipe(Recipe):
    """A protocol of latent space alignment.

    Args:
        bridge: ``"linear"`` or ``"mlp"``.
        compose: ``"chain"`` or ``"direct"``.
        lam: Weight of the ridge.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    hidden: tuple[int, ...] = (256, 64)
    batch_size: int = 64
    bridge: str = "linear"
    compose: str = "chain"
    lam: float = 1e-2
    source: str = _SOURCE


def _split_mnist() -> dict[str, Recipe]:
    """Memories and encoders beside stored features of as many bytes; one table."""
    stream, key = "split_mnist", "latent_generative_memory"
    main = LatentRecipe(name=f"{key}/{stream}", method=key, benchmark=SplitMNIST(), epochs=2)
    shared = {f.name: getattr(main, f.name) for f in dataclasses.fields(Recipe)}
    made: dict[str, Recipe] = {}
    for method in ("naive", "joint"):
        name = f"{method}/{stream}_latent"
        made[name] = Recipe(**{**shared, "name": name, "method": method})
    frozen = {"encoder": "frozen"}
    distilled = {"encoder": "distill", "memory": "full"}  # the densities follow by a linear map
    variants: dict[str, dict[str, Any]] = {
        "finetune": {"encoder": "finetune", "title": "encoder free"},
        "distill": {**distilled, "title": "encoder distilled, full"},
        "distill_still": {**distilled, "drift": "none", "title": "encoder distilled, full, still"},
        "distill_sdc": {**distilled, "drift": "sdc", "title": "encoder distilled, full, SDC"},
        "distill_prototypes": {
            **distilled,
            "drift": "prototypes",
            "title": "encoder distilled, full, prototypes",
        },
        "slow": {"encoder": "slow", "memory": "full", "title": "encoder slow, full"},
        "diagonal": {**frozen, "memory": "diagonal", "title": "encoder random, diagonal"},
        "mixture": {**frozen, "memory": "mixture", "title": "encoder random, mixture"},
        "vae": {**frozen, "memory": "vae", "title": "encoder random, VAE"},
        "full": {**frozen, "memory": "full", "title": "encoder random, full"},
        "random": {**frozen, "title": "encoder random, 20 directions"},
        "growing": {"head": "growing", "title": "encoder frozen after the first, growing head"},
    }
    for suffix, changes in variants.items():
        name = f"{key}/{stream}_{suffix}"
        made[name] = dataclasses.replace(main, name=name, **changes)
    # As many bytes as 20 directions of ten classes take, and their weight beside new data.
    stored: dict[str, Any] = {"stored_bytes": 336_000, "r": "class_ratio"}
    random: dict[str, Any] = {**frozen, "title": "Latent replay, encoder random"}
    slow = {"encoder": "slow", "title": "Latent replay, encoder slow"}
    for suffix, changes in (
        ("", {"title": "Latent replay"}), ("_slow", slow), ("_random", random),
    ):  # fmt: skip
        name = f"latent_replay/{stream}{suffix}"
        made[name] = dataclasses.replace(
            main, name=name, method="latent_replay", **stored, **changes
        )
    made[main.name] = dataclasses.replace(
        main, baselines=tuple(made), title="encoder frozen after the first, 20 directions"
    )
    return made


def _larger() -> dict[str, Recipe]:
    """Streams of colour images: a cut behind the convolutions, stored things of as many bytes."""
    made: dict[str, Recipe] = {}
    streams = {
        "cifar100_10": (SplitCIFAR100(augment=False), 20),
        "cifar100_10_small": (SplitCIFAR100(augment=False, train_per_experience=500), 10),
        "cifar100_20": (SplitCIFAR100(n_experiences=20, augment=False), 20),
        "toy_core50_nc": (ToyCORe50(track="nc"), 4),
        "toy_core50_ni": (ToyCORe50(track="ni"), 4),
    }
    key = "latent_generative_memory"
    for stream, (benchmark, epochs) in streams.items():
        main = LatentRecipe(
            name=f"{key}/{stream}", method=key, benchmark=benchmark, backbone="small_convnet",
            layer="features", epochs=epochs, title="encoder frozen after the first, 20 directions",
        )  # fmt: skip
        shared = {f.name: getattr(main, f.name) for f in dataclasses.fields(Recipe)}
        shared["title"] = ""
        # 20 directions and a mean of each class's 128 features.
        room = benchmark.n_outputs * 21 * 128 * 4
        rows: list[Recipe] = [
            Recipe(**{**shared, "name": f"{method}/{stream}_latent", "method": method})
            for method in ("naive", "joint")
        ]
        rows.append(
            ReplayRecipe(
                **{**shared, "name": f"er/{stream}_latent", "method": "er", "source": _SOURCE},
                mem=room // math.prod(benchmark.in_shape),  # one byte a value
            )
        )
        replay = dataclasses.replace(
            main, name=f"latent_replay/{stream}", method="latent_replay", title="",
            stored_bytes=room, r="class_ratio",
        )  # fmt: skip
        slow: dict[str, Any] = {"encoder": "slow"}
        everything: dict[str, Any] = {"stored_bytes": None, "stored": 100_000}
        distill: dict[str, Any] = {"encoder": "distill", "memory": "full", "drift": "linear"}
        for row, suffix, title, changes in (
            (main, "distill", "encoder distilled, full", distill),
            (main, "slow", "encoder slow, 20 directions", slow),
            (replay, "slow", "Latent replay, encoder slow", slow),
            (replay, "all", "Latent replay of all features", everything),
        ):
            name = f"{row.name}_{suffix}"
            rows.append(dataclasses.replace(row, name=name, title=title, **changes))
        if not stream.endswith("ni"):  # there every class is in the first experience
            name, title = f"{main.name}_growing", "encoder frozen after the first, growing head"
            rows.append(dataclasses.replace(main, name=name, title=title, head="growing"))
        rows.append(replay)
        made |= {row.name: row for row in rows}
        made[main.name] = dataclasses.replace(main, baselines=tuple(row.name for row in rows))
    return made


def _alignment() -> dict[str, Recipe]:
    """With and without bridges, and other bridges; one table."""
    stream, key = "split_mnist_task", "latent_alignment"
    main = AlignmentRecipe(
        name=f"{key}/{stream}", method=key, benchmark=SplitMNIST(scenario="task"), epochs=2
    )
    shared = {f.name: getattr(main, f.name) for f in dataclasses.fields(Recipe)}
    plain = f"naive/{stream}_alignment"
    made: dict[str, Recipe] = {
        plain: Recipe(**{**shared, "name": plain, "method": "naive", "title": "no bridges"})
    }
    for suffix, changes in (("direct", {"compose": "direct", "title": "direct bridges"}),
                            ("mlp", {"bridge": "mlp", "title": "MLP bridges"})):  # fmt: skip
        name = f"{key}/{stream}_{suffix}"
        made[name] = dataclasses.replace(main, name=name, **changes)
    made[main.name] = dataclasses.replace(main, baselines=tuple(made))
    return made


RECIPES: dict[str, Recipe] = {
    **{
        f"{key}/split_digits": LatentRecipe(
            name=f"{key}/split_digits", method=key, benchmark=SplitDigits(), hidden=(200, 50),
            batch_size=16, epochs=10, lr=3e-3, stored=200 if key == "latent_replay" else None,
        )
        for key in ("latent_generative_memory", "latent_replay")
    },
    "latent_alignment/split_digits": AlignmentRecipe(
        name="latent_alignment/split_digits", method="latent_alignment",
        benchmark=SplitDigits(scenario="task"), hidden=(64, 32), batch_size=16, epochs=5,
    ),
    **_split_mnist(),
    **_larger(),
    **_alignment(),
}  # fmt: skip
