"""Recipes of generative replay: DGR and its baselines, MeRGAN, DGM.

Those that end in ``_paper`` have the papers' networks and steps: for DGR van de Ven & Tolias's
(2018), whose figures are on record (20 seeds); for MeRGAN and DGM those of their released code, one
class at a time. The others are sized for a CPU. Steps are Adam's, as in the papers. ``noise``,
``exact`` and no replay are the source's baselines; its "ER" is exact replay.

Of MeRGAN the papers print how often a classifier of real images names what was asked for; accuracy
here is that of a solver on real test images, so the two are not set side by side.
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
    source: str = "Ostapenko et al. (2019), Learning to Remember"


def _with_baselines(
    stream: str, rows: dict[str, dict[str, Any]], *, mergan: bool = False, **protocol: Any
) -> dict[str, Recipe]:
    """One table: no replay, joint training, variants of DGR by the suffix of their name, MeRGAN."""
    main = GenerativeRecipe(name=f"dgr/{stream}", method="dgr", **protocol)
    shared = {f.name: getattr(main, f.name) for f in dataclasses.fields(Recipe)}
    made: dict[str, Recipe] = {}
    for method in ("naive", "joint"):
        name = f"{method}/{stream}_generative"
        made[name] = Recipe(**{**shared, "name": name, "method": method, "published": ()})
    for suffix, changes in rows.items():
        name = f"dgr/{stream}_{suffix}"
        made[name] = dataclasses.replace(main, name=name, published=(), **changes)
    for key in ("mergan_jtr", "mergan_ra") if mergan else ():
        made[f"{key}/{stream}"] = _mergan(stream, key, generator_lr=_RATES[key], **protocol)
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
_JTR = {"generator_r": "class_ratio"}
_RA = {"generator_r": "1", "alignment": 0.03}


def _mergan(
    stream: str, key: str, benchmark: BenchmarkSettings, **changes: Any
) -> GenerativeRecipe:
    own = {"mergan_jtr": _JTR, "mergan_ra": _RA}[key]
    return GenerativeRecipe(
        name=f"{key}/{stream}", method=key, benchmark=benchmark, **{**_MERGAN, **own, **changes}
    )


def _one_class_each() -> dict[str, Recipe]:
    """The papers' own protocol: ten classes, one at a time, networks of convolutions."""
    made: dict[str, Recipe] = {}
    # Steps of the generator per class (MeRGAN), and weight of the alignment; learning rate, and
    # weight of the capacity for DGMw; A_10 of DGMw and DGMa.
    rows: dict[str, tuple[BenchmarkSettings, int, float, float, float, float, float]] = {
        "mnist_10_paper": (
            SplitMNIST(n_experiences=10), 4000, 0.03, 2e-3, 0.08, 0.9646, 0.9792,
        ),
        "svhn_10_paper": (SplitSVHN(n_experiences=10), 8000, 0.3, 5e-4, 0.001, 0.7438, 0.6689),
        "cifar10_10_paper": (
            SplitCIFAR10(n_experiences=10), 8000, 0.3, 5e-4, 0.001, 0.5621, 0.5175,
        ),
    }  # fmt: skip
    for stream, (benchmark, steps, alignment, lr, lam, weights, units) in rows.items():
        for key in ("mergan_jtr", "mergan_ra"):
            aligned = {"alignment": alignment} if key == "mergan_ra" else {}
            recipe = _mergan(
                stream, key, benchmark, generator="ac_wgan", generator_lr=1e-4, critic_steps=5,
                generator_epochs=steps * 5 * 64 // 6000, epochs=10, **aligned,
            )  # fmt: skip
            made[recipe.name] = recipe
        for key, value, part, widths in (
            ("dgm_w", weights, lam, (24, 12, 6)), ("dgm_a", units, 0.01, (80, 40, 20)),
        ):  # fmt: skip
            name = f"{key}/{stream}"
            made[name] = DGMRecipe(
                name=name, method=key, benchmark=benchmark, network="conv", widths=widths,
                critic_widths=(128, 64, 32), latent=128, batch_size=64, epochs=101, lr=lr,
                lam=part, s_max=1e5 if key == "dgm_a" else 1e4,
                published=(Published("average_accuracy", value, None, "Ostapenko et al. (2019)"),),
            )  # fmt: skip
    return made


_DIGITS: dict[str, Any] = {
    "benchmark": SplitDigits(), "hidden": (100,), "batch_size": 16, "epochs": 20, "lr": 3e-3,
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "dgr/split_digits": GenerativeRecipe(
        name="dgr/split_digits", method="dgr", generator="tiny_vae", **_DIGITS
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
        mergan=True, benchmark=SplitMNIST(), epochs=3,
    ),
    **_with_baselines(
        "split_mnist_10", {"exact": _EXACT, "soft": _SOFT},
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
    **_one_class_each(),
}  # fmt: skip
