"""From a recipe to the plugins, or the strategy, of a method; what the catalog's cards build with.

Torch and Avalanche are imported when something is built, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = [
    "IMPORTANCES",
    "agem",
    "anchor",
    "ber",
    "dgm",
    "dgr",
    "drl",
    "er",
    "expandable_der",
    "gem",
    "hat",
    "joint",
    "latent_alignment",
    "latent_generative_memory",
    "latent_replay",
    "online",
    "shuffle_replay",
]

IMPORTANCES = {
    "ewc": "EWCPlugin",
    "online_ewc": "OnlineEWCPlugin",
    "si": "SynapticIntelligencePlugin",
    "mas": "MASPlugin",
    "rwalk": "RWalkPlugin",
    "l2_transfer": "L2TransferPlugin",
}


def drl(recipe: Any) -> Any:
    """The loss."""
    from avalanche_ext import DRLPlugin

    return DRLPlugin(recipe.lam, form=recipe.form, layers=recipe.layers)


def ber(recipe: Any) -> Any:
    """The replay of each past group."""
    from avalanche_ext import BERPlugin

    return BERPlugin(
        recipe.mem,
        mem_scope=recipe.mem_scope,
        mode=recipe.mode,
        group_by=recipe.group_by,
        max_groups=recipe.max_groups,
    )


def er(recipe: Any) -> Any:
    """The replay of half a batch."""
    from avalanche_ext import ERPlugin

    return ERPlugin(recipe.mem, mem_scope=recipe.mem_scope)


def shuffle_replay(recipe: Any) -> Any:
    """The memory among the new data."""
    from avalanche_ext import ShuffleReplayPlugin

    return ShuffleReplayPlugin(recipe.mem, mem_scope=recipe.mem_scope)


def _per_experience(recipe: Any) -> int:
    """Avalanche's GEM and A-GEM count per experience; a total budget is shared out beforehand."""
    total = recipe.mem_scope == "total"
    return recipe.mem // recipe.benchmark.n_experiences if total else recipe.mem


def gem(recipe: Any) -> Any:
    """Avalanche's."""
    from avalanche.training.plugins import GEMPlugin

    return GEMPlugin(_per_experience(recipe), recipe.memory_strength)


def agem(recipe: Any) -> Any:
    """Avalanche's; as much memory per step as BER sees."""
    from avalanche.training.plugins import AGEMPlugin

    # One mini-batch of memory per past experience, as many as BER sees.
    sample = recipe.batch_size * max(1, recipe.benchmark.n_experiences - 1)
    return AGEMPlugin(_per_experience(recipe), sample)


def joint(recipe: Any) -> list[Any]:
    """Training from scratch on everything, beside Avalanche's ``Cumulative``."""
    from avalanche.training.plugins import FromScratchTrainingPlugin

    return [FromScratchTrainingPlugin()]


def expandable_der(recipe: Any, **options: Any) -> Any:
    """The strategy."""
    from avalanche_ext import (
        ChannelMasks,
        ClassifierStage,
        ExpandableDER,
        Schedule,
        build_backbone,
    )

    own_first = recipe.first_epochs is not None
    first = Schedule(recipe.lr, 0, recipe.first_milestones) if own_first else None
    masks = ChannelMasks(recipe.lam, recipe.s_max, recipe.gate_lr_factor)
    return ExpandableDER(
        backbone=build_backbone(
            recipe.backbone, 0, recipe.benchmark.in_shape, pretrained=recipe.pretrained,
            hidden=recipe.hidden,
        ),
        mem=None if recipe.mem_per_class else recipe.mem,
        mem_per_class=recipe.mem_per_class,
        auxiliary=recipe.auxiliary,
        prune=masks if recipe.prune else None,
        lookahead=recipe.lookahead,
        schedule=Schedule(recipe.lr, recipe.warmup_epochs, recipe.milestones),
        first_schedule=first,
        classifier_stage=ClassifierStage(
            recipe.classifier_epochs,
            Schedule(recipe.lr, 0, recipe.classifier_milestones),
            recipe.temperature,
        ),
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        inherit=recipe.inherit,
        reset_heads=recipe.reset_heads,
        n_outputs=recipe.benchmark.n_outputs,
        **options,
    )  # fmt: skip


def hat(recipe: Any, plugins: list[Any], **options: Any) -> Any:
    """Its network and plugin in a ``Naive``."""
    from avalanche.training.supervised import Naive
    from torch.optim import SGD

    from avalanche_ext import HATNet, HATPlugin, build_backbone

    backbone = build_backbone(
        recipe.backbone, 0, recipe.benchmark.in_shape, pretrained=recipe.pretrained,
        hidden=recipe.hidden,
    )  # fmt: skip
    model = HATNet(backbone, s_max=recipe.s_max)
    optimizer = SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
    )
    plugins = [HATPlugin(recipe.lam), *plugins]
    return Naive(model=model, optimizer=optimizer, plugins=plugins, **options)


def _generator(recipe: Any) -> Any:
    """The generator of a recipe and how it is trained."""
    import torch

    from avalanche_ext import GeneratorTraining, build_generator

    benchmark = recipe.benchmark
    with torch.random.fork_rng(devices=[]):  # the solver starts where it would without it
        torch.manual_seed(torch.initial_seed() + 1)
        model = build_generator(
            recipe.generator, benchmark.in_shape, benchmark.n_outputs,
            value_range=benchmark.value_range, widths=recipe.generator_widths,
        )  # fmt: skip
    return GeneratorTraining(
        model=model, lr=recipe.generator_lr, r=_weight(recipe.generator_r),
        alignment=recipe.alignment, critic_steps=recipe.critic_steps,
        train_mb_size=recipe.batch_size, train_epochs=recipe.generator_epochs,
    )  # fmt: skip


def dgr(recipe: Any) -> list[Any]:
    """The plugin and where its samples come from."""
    from avalanche_ext import DGRPlugin, ExactReplay, NoiseReplay
    from avalanche_ext.recipes.names import lookup

    benchmark = recipe.benchmark
    sources: dict[str, Callable[[], Any]] = {
        "generator": lambda: _generator(recipe),
        "noise": lambda: NoiseReplay(benchmark.in_shape, value_range=benchmark.value_range),
        "exact": ExactReplay,
    }
    return [
        DGRPlugin(
            lookup("replay", recipe.replay, sources)(), r=_weight(recipe.r), labels=recipe.labels,
            schedule=recipe.schedule, prefetch=recipe.prefetch,
        )
    ]  # fmt: skip


def dgm(recipe: Any, **options: Any) -> Any:
    """The strategy."""
    from avalanche_ext import DGM, Discriminator, MaskedGenerator

    benchmark = recipe.benchmark
    shape, common = benchmark.in_shape, {
        "n_classes": benchmark.n_outputs, "network": recipe.network,
        "value_range": benchmark.value_range,
    }  # fmt: skip
    options = {k: v for k, v in options.items() if k != "criterion"}
    return DGM(
        model=Discriminator(shape, widths=recipe.critic_widths, **common),
        generator=MaskedGenerator(
            shape, masks="weights" if recipe.method == "dgm_w" else "units", widths=recipe.widths,
            latent=recipe.latent, s_max=recipe.s_max, expand=recipe.expand, **common,
        ),
        lam=recipe.lam, lr=recipe.lr, restart=recipe.restart, **options,
    )  # fmt: skip


def latent_generative_memory(recipe: Any) -> list[Any]:
    """The plugin; a generator of features is drawn when it meets the first ones."""
    from avalanche_ext import LatentGenerativeMemoryPlugin

    return [
        LatentGenerativeMemoryPlugin(
            recipe.layer, memory=recipe.memory, encoder=recipe.encoder, drift=recipe.drift,
            slow=recipe.slow, prototypes=recipe.prototypes, r=_weight(recipe.r or "class_ratio"),
            lam=recipe.lam,
        )
    ]  # fmt: skip


def latent_replay(recipe: Any) -> list[Any]:
    """The plugin."""
    from avalanche_ext import LatentReplayPlugin

    return [
        LatentReplayPlugin(
            recipe.layer, mem=recipe.stored, mem_bytes=recipe.stored_bytes,
            encoder=recipe.encoder, slow=recipe.slow, r=_weight(recipe.r or "share"),
        )
    ]  # fmt: skip


def latent_alignment(recipe: Any, plugins: list[Any], **options: Any) -> Any:
    """The plugin in a ``Naive`` with a head for each task."""
    from avalanche.training.supervised import Naive

    from avalanche_ext import LatentAlignmentPlugin
    from avalanche_ext.experiments.build import build_model, build_optimizer

    model = build_model(recipe)
    plugin = LatentAlignmentPlugin(recipe.bridge, compose=recipe.compose, lam=recipe.lam)
    optimizer = build_optimizer(recipe, model)
    return Naive(model=model, optimizer=optimizer, plugins=[plugin, *plugins], **options)


def online(recipe: Any) -> list[Any]:
    """One of the three plugins."""
    from avalanche_ext import (
        OnlineDistillationPlugin,
        OnlineLookaheadPlugin,
        OnlineProjectionPlugin,
    )

    inputs = {"mem": recipe.mem, "n_inputs": recipe.n_inputs}
    if recipe.method == "online_projection":
        return [OnlineProjectionPlugin(recipe.eps, eps_on=recipe.eps_on, **inputs)]
    lookahead = recipe.method == "online_lookahead"
    plugin = OnlineLookaheadPlugin if lookahead else OnlineDistillationPlugin
    return [plugin(recipe.lam, steps=recipe.steps, **inputs)]


def _weight(r: str) -> str | float:
    """A rule, or a number written out."""
    return r if r in ("1/t", "class_ratio", "share") else float(r)


def anchor(key: str, lam: float) -> list[Any]:
    """The importance method of a recipe."""
    import avalanche_ext

    return [] if key == "none" else [getattr(avalanche_ext, IMPORTANCES[key])(lam)]
