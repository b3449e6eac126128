"""Recipes of generative replay: DGR and its baselines, MeRGAN, DGM.

Those that end in ``_paper`` have the papers' networks and steps: for DGR van de Ven & Tolias's
(2018), whose figures are on record (20 seeds); for MeRGAN and DGM those of their released code, one
class at a time. Passes are the same for all classes of a table, so that steps follow their sizes:
MeRGAN's are right for an average one. The others are sized for a CPU. Steps are Adam's, as in the
papers. ``noise``, ``exact`` and no replay are the source's baselines; its "ER" is exact replay.

The source's table has A_5 and A_10 of one run: ``dgm_a/mnist_10_paper`` and its baselines. Its
figures of MeRGAN say how often a classifier of real images names what was asked for, so our
``generator_accuracy`` is held to them; accuracy here is that of a solver on real test images.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from avalanche_ext.recipes.base import Published, Recipe
from avalanche_ext.recipes.streams import (
    BenchmarkSettings,
    PermutedMNIST,
    SplitCIFAR10,
    SplitDigits,
    SplitMNIST,
    SplitSVHN,
)

__all__ = ["RECIPES", "DGMRecipe", "GenerativeRecipe"]

_DGM_SOURCE = "Ostapenko et al. (2019), Learning to Remember"
_SOURCE = "Shin, Lee, Kim, Kim (2017), Continual Learning with Deep Generative Replay"


@dataclass(frozen=True, kw_only=True)
class GenerativeRecipe(Recipe):
    """A protocol of generative replay.

    Args:
        replay: Where samples come from: ``"generator"``, ``"noise"`` or ``"exact"``.
        generator: Its name in ``models.generators.build``.
        generator_widths: Its hidden widths, where they are not those of its name.
        labels: ``"hard"`` or ``"soft"`` of the last solver, or ``"source"``.
        r: Weight of the new data: ``"1/t"``, ``"class_ratio"`` or a number.
        generator_r: The same for the generator's own training.
        generator_lr: The generator's learning rate, where it is not its own.
        generator_epochs: The generator's passes over an experience, where it learns by itself.
        alignment: Weight of MeRGAN's replay alignment.
        critic_steps: Batches for each step of an adversarial generator.
        schedule: When it learns: ``"interleaved"``, ``"before"`` or ``"after"``.
        prefetch: Steps for which samples are made at once.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    hidden: tuple[int, ...] = (400, 400)
    batch_size: int = 64
    replay: str = "generator"
    generator: str = "small_vae"
    generator_widths: tuple[int, ...] | None = None
    labels: str = "hard"
    r: str = "1/t"
    generator_r: str = "1/t"
    generator_lr: float | None = None
    generator_epochs: int = 1
    alignment: float = 0.0
    critic_steps: int = 5
    schedule: str | None = None
    prefetch: int = 1
    source: str = _SOURCE

    def smoke(self) -> GenerativeRecipe:
        """As of every recipe, and one pass of the generator."""
        small = super().smoke()
        assert isinstance(small, GenerativeRecipe)
        return dataclasses.replace(small, generator_epochs=1)


@dataclass(frozen=True, kw_only=True)
class DGMRecipe(Recipe):
    """A protocol of DGM; ``lr`` is that of both networks.

    Args:
        network: ``"conv"`` or ``"mlp"``.
        widths: Of the generator, at the start.
        critic_widths: Of the discriminator, which is the classifier.
        latent: Numbers of noise.
        lam: Weight of the capacity that a task takes.
        s_max: Scale of the masks in the end.
        expand: Whether the generator grows.
        restart: Whether the discriminator begins anew with each experience.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    network: str = "mlp"
    widths: tuple[int, ...] = (64, 64)
    critic_widths: tuple[int, ...] = (128, 128)
    latent: int = 16
    lam: float = 1.0
    s_max: float = 1e4
    expand: bool = True
    restart: bool = True
    source: str = _DGM_SOURCE


def _with_baselines(
    stream: str,
    rows: dict[str, dict[str, Any]],
    *,
    mergan: dict[str, Any] | None = None,
    dgm: dict[str, Any] | None = None,
    **protocol: Any,
) -> dict[str, Recipe]:
    """One table: no replay, joint training, DGR and, by the suffix of their name, its variants.

    ``mergan`` and ``dgm`` are changes to the small recipes of these two; ``None`` leaves them out.
    """
    main = GenerativeRecipe(name=f"dgr/{stream}", method="dgr", **protocol)
    shared = {f.name: getattr(main, f.name) for f in dataclasses.fields(Recipe)}
    made: dict[str, Recipe] = {}
    for method in ("naive", "joint"):
        name = f"{method}/{stream}_generative"
        made[name] = Recipe(**{**shared, "name": name, "method": method, "published": ()})
    for suffix, changes in rows.items():
        name = f"dgr/{stream}_{suffix}"
        made[name] = dataclasses.replace(main, name=name, published=(), **changes)
    for key in () if mergan is None else ("mergan_jtr", "mergan_ra"):
        own = {"generator_lr": _RATES[key], **protocol, **(mergan or {})}
        made[f"{key}/{stream}"] = _mergan(stream, key, **own)
    for key in () if dgm is None else ("dgm_w", "dgm_a"):
        own = {"name": f"{key}/{stream}", "method": key, "source": _DGM_SOURCE, **_DGM}
        made[f"{key}/{stream}"] = DGMRecipe(**{**shared, **own, **(dgm or {})})
    made[main.name] = dataclasses.replace(main, baselines=tuple(made))
    return made


_NOISE = {"replay": "noise", "title": "Noise replay"}
_EXACT = {"replay": "exact", "labels": "source", "title": "Exact replay"}
_SOFT = {"labels": "soft", "title": "DGR, soft labels"}
_CONDITIONAL = {"generator": "small_cvae", "labels": "source", "title": "DGR, conditional"}

# Memory Replay GANs at the size of the specification's runs: 300 steps of the generator.
_MERGAN = {
    "generator": "small_ac_wgan", "labels": "source", "generator_lr": 5e-4, "generator_epochs": 5,
    "critic_steps": 3,
}  # fmt: skip
# Learning rates on MNIST, chosen on held-out images.
_RATES = {"mergan_jtr": 2e-3, "mergan_ra": 1e-3}
# DGM on MNIST, of the size of these.
_DGM = {
    "widths": (64, 64),
    "critic_widths": (256, 256),
    "latent": 32,
    "batch_size": 64,
    "epochs": 15,
}
_JTR = {"generator_r": "class_ratio"}
_RA = {"generator_r": "1", "alignment": 0.03}


def _mergan(
    stream: str, key: str, benchmark: BenchmarkSettings, **changes: Any
) -> GenerativeRecipe:
    own = {"mergan_jtr": _JTR, "mergan_ra": _RA}[key]
    return GenerativeRecipe(
        name=f"{key}/{stream}", method=key, benchmark=benchmark, **{**_MERGAN, **own, **changes}
    )


@dataclass(frozen=True)
class _Table:
    """A column pair of the source's table, A_5 and A_10, and how the papers got there."""

    benchmark: BenchmarkSettings
    images: int  # of a class, on average
    steps: int  # of MeRGAN's generator for a class of as many
    alignment: float
    lr: float  # of DGM
    lam: float  # of DGMw
    epochs: int  # of DGMw
    figures: dict[str, tuple[float, float]]


_TABLES = {
    "mnist_10_paper": _Table(
        SplitMNIST(n_experiences=10), 6000, 4000, 0.03, 2e-3, 0.08, 101,
        {"joint": (0.9987, 0.9924), "dgr": (0.9039, 0.8540), "mergan": (0.9819, 0.9700),
         "dgm_w": (0.9875, 0.9646), "dgm_a": (0.9917, 0.9792)},
    ),
    "svhn_10_paper": _Table(
        SplitSVHN(n_experiences=10), 7326, 8000, 0.3, 5e-4, 0.001, 151,
        {"joint": (0.9299, 0.8872), "dgr": (0.6129, 0.4728), "mergan": (0.8090, 0.6678),
         "dgm_w": (0.8393, 0.7438), "dgm_a": (0.8107, 0.6689)},
    ),
    "cifar10_10_paper": _Table(
        SplitCIFAR10(n_experiences=10), 5000, 8000, 0.3, 5e-4, 0.001, 101,
        {"joint": (0.8340, 0.7782), "dgm_w": (0.7245, 0.5621), "dgm_a": (0.7191, 0.5175)},
    ),
}  # fmt: skip


def _one_class_each(stream: str, table: _Table) -> dict[str, Recipe]:
    """One table of the papers: ten classes, one at a time, networks of convolutions."""
    grey = table.benchmark.in_shape[0] == 1
    protocol: dict[str, Any] = {
        "benchmark": table.benchmark, "backbone": "mlp" if grey else "small_convnet",
        "hidden": (400, 400), "epochs": 10, "batch_size": 64, "optimizer": "adam", "lr": 1e-3,
    }  # fmt: skip
    passes = table.steps * 5 * 64 // table.images

    def held_to(row: str, quantity: str = "average_accuracy", note: str = "") -> dict[str, Any]:
        """Figures of a row, where the table has them."""
        names = (f"{quantity}_after_5", quantity)
        figures = zip(names, table.figures.get(row, ()), strict=False)
        source = f"Ostapenko et al. (2019){note}"
        return {"published": tuple(Published(n, v, None, source) for n, v in figures)}

    generators = {"generator_lr": 1e-4, "generator_epochs": passes}
    rows: list[Recipe] = [
        Recipe(name=f"joint/{stream}", method="joint", **protocol, **held_to("joint")),
        GenerativeRecipe(
            name=f"dgr/{stream}", method="dgr", generator="wgan", **generators, **protocol,
            **held_to("dgr", note=", most likely a judge's accuracy on generated images"),
        ),
        *(
            _mergan(
                stream, key, generator="ac_wgan", critic_steps=5, **aligned, **generators,
                **protocol,
                **held_to("mergan", "generator_accuracy",
                          ", one row for both variants; a judge's accuracy on generated images"),
            )
            for key, aligned in (("mergan_jtr", {}), ("mergan_ra", {"alignment": table.alignment}))
        ),
    ]  # fmt: skip
    for key, lam, epochs, s_max, widths in (
        ("dgm_w", table.lam, table.epochs, 1e4, (24, 12, 6)),
        ("dgm_a", 0.01, 101, 1e5, (80, 40, 20)),
    ):
        own = {**protocol, "epochs": epochs, "lr": table.lr, "lam": lam, "s_max": s_max}
        recipe = DGMRecipe(
            name=f"{key}/{stream}", method=key, network="conv", widths=widths,
            critic_widths=(128, 64, 32), latent=128, **own, **held_to(key),
        )  # fmt: skip
        rows.append(recipe)
    rows[-1] = dataclasses.replace(rows[-1], baselines=tuple(r.name for r in rows[:-1]))
    return {row.name: row for row in rows}


_DIGITS: dict[str, Any] = {
    "benchmark": SplitDigits(), "hidden": (100,), "batch_size": 16, "epochs": 20, "lr": 3e-3,
}  # fmt: skip

# Colour images: a network of convolutions, 32 steps an epoch of a thousand images per class.
_COLOUR: dict[str, Any] = {"backbone": "small_convnet", "epochs": 10, "generator_epochs": 10}

RECIPES: dict[str, Recipe] = {
    "dgr/split_digits": GenerativeRecipe(
        # its rate chosen on held-out images
        name="dgr/split_digits", method="dgr", generator="tiny_vae", generator_lr=1e-2, **_DIGITS
    ),
    **{
        f"{key}/split_digits": _mergan("split_digits", key, generator_epochs=60, **_DIGITS)
        for key in ("mergan_jtr", "mergan_ra")
    },
    **{
        f"{key}/split_digits": DGMRecipe(
            name=f"{key}/split_digits", method=key, benchmark=SplitDigits(), batch_size=32,
            epochs=60, baselines=() if key == "dgm_w" else ("dgm_w/split_digits",),
        )
        for key in ("dgm_w", "dgm_a")
    },
    **_with_baselines(
        "split_mnist",
        {"noise": _NOISE, "exact": _EXACT, "soft": _SOFT, "conditional": _CONDITIONAL},
        mergan={}, dgm={}, benchmark=SplitMNIST(), epochs=3,
    ),
    **_with_baselines(
        "split_mnist_10", {"exact": _EXACT, "soft": _SOFT},
        mergan={"generator_epochs": 10}, dgm={},
        benchmark=SplitMNIST(n_experiences=10), epochs=6,
    ),
    **_with_baselines(
        "permuted_mnist_5",
        {"noise": {**_NOISE, "labels": "soft"}, "exact": _EXACT,
         "hard": {"labels": "hard", "title": "DGR, hard labels"}},
        benchmark=PermutedMNIST(n_experiences=5, train_per_experience=10_000), epochs=2,
        labels="soft",
    ),
    "dgr/split_mnist_paper": GenerativeRecipe(
        name="dgr/split_mnist_paper", method="dgr", benchmark=SplitMNIST(), generator="vae",
        batch_size=128, epochs=21, seeds=tuple(range(20)),
        published=(
            Published("average_accuracy", 0.9124, None,
                      "van de Ven, Tolias (2018), Generative replay with feedback connections"),
        ),
    ),
    **_with_baselines(
        "split_cifar10", {"exact": _EXACT}, mergan={}, dgm={},
        benchmark=SplitCIFAR10(train_per_experience=2000), **_COLOUR,
    ),
    **_with_baselines(
        "split_svhn", {"exact": _EXACT}, mergan={}, dgm={},
        benchmark=SplitSVHN(n_experiences=5, train_per_experience=2000), **_COLOUR,
    ),
    **{k: r for name, table in _TABLES.items() for k, r in _one_class_each(name, table).items()},
}  # fmt: skip
