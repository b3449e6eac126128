"""The methods: key -> card. The only registry; tests, recipes, tables and commands read it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from avalanche_ext.recipes import RECIPES, Recipe
from avalanche_ext.recipes.names import lookup

__all__ = ["CATALOG", "Card", "find_card"]


@dataclass(frozen=True)
class Card:
    """One method.

    Args:
        key: Its key.
        title: Its name in tables.
        summary: One line.
        family: Row of the catalog.
        parts: Gives the classes that make it up; imports them only then.
        build: Plugins for a recipe.
        strategy: Gives the strategy class; Avalanche's ``Naive`` by default.
        make: Builds the strategy from a recipe and the arguments that all strategies take, where
            it is more than a network, an optimizer and plugins.
        ours: Whether the method is implemented here, or is Avalanche's, for comparison.
    """

    key: str
    title: str
    summary: str
    family: str
    parts: Callable[[], tuple[type, ...]]
    build: Callable[[Any], list[Any]]
    strategy: Callable[[], type] | None = None
    make: Callable[..., Any] | None = None
    ours: bool = True

    @property
    def recipes(self) -> list[Recipe]:
        """The recipes of this method."""
        return [r for r in RECIPES.values() if r.method == self.key]

    def strategy_class(self) -> type:
        """The Avalanche strategy that runs the plugins."""
        if self.strategy is not None:
            return self.strategy()
        from avalanche.training.supervised import Naive

        return Naive

    def text(self) -> str:
        """The card: for each part its module's text and its arguments."""
        pages = [f"{self.title} ({self.key}): {self.summary}"]
        for part in self.parts():
            module = sys.modules[part.__module__]
            arguments = inspect.cleandoc(part.__doc__ or "")
            card = inspect.cleandoc(module.__doc__ or "") if self.ours else ""
            pages += [card, f"{part.__name__}\n\n{arguments}"]
        names = "\n".join(f"  {r.name}" for r in self.recipes)
        return "\n\n".join(p for p in [*pages, f"Recipes:\n{names}"] if p)


def find_card(key: str) -> Card:
    """The card of a key.

    Raises:
        ValueError: If there is none; near matches are listed.
    """
    return lookup("method", key, CATALOG)


def _drl(recipe: Any) -> Any:
    from avalanche_ext import DRLPlugin

    return DRLPlugin(recipe.lam, form=recipe.form, layers=recipe.layers)


def _ber(recipe: Any) -> Any:
    from avalanche_ext import BERPlugin

    return BERPlugin(
        recipe.mem,
        mem_scope=recipe.mem_scope,
        mode=recipe.mode,
        group_by=recipe.group_by,
        max_groups=recipe.max_groups,
    )


def _er(recipe: Any) -> Any:
    from avalanche_ext import ERPlugin

    return ERPlugin(recipe.mem, mem_scope=recipe.mem_scope)


def _shuffle(recipe: Any) -> Any:
    from avalanche_ext import ShuffleReplayPlugin

    return ShuffleReplayPlugin(recipe.mem, mem_scope=recipe.mem_scope)


def _per_experience(recipe: Any) -> int:
    """Avalanche's GEM and A-GEM count per experience; a total budget is shared out beforehand."""
    total = recipe.mem_scope == "total"
    return recipe.mem // recipe.benchmark.n_experiences if total else recipe.mem


def _gem(recipe: Any) -> Any:
    from avalanche.training.plugins import GEMPlugin

    return GEMPlugin(_per_experience(recipe), recipe.memory_strength)


def _agem(recipe: Any) -> Any:
    from avalanche.training.plugins import AGEMPlugin

    # One mini-batch of memory per past experience, as many as BER sees.
    sample = recipe.batch_size * max(1, recipe.benchmark.n_experiences - 1)
    return AGEMPlugin(_per_experience(recipe), sample)


def _joint_plugins(recipe: Any) -> list[Any]:
    from avalanche.training.plugins import FromScratchTrainingPlugin

    return [FromScratchTrainingPlugin()]


def _ours(*names: str) -> Callable[[], tuple[type, ...]]:
    def parts() -> tuple[type, ...]:
        import avalanche_ext

        return tuple(getattr(avalanche_ext, name) for name in names)

    return parts


def _plugin(name: str) -> Callable[[], tuple[type, ...]]:
    def parts() -> tuple[type, ...]:
        from avalanche.training import plugins

        return (getattr(plugins, name),)

    return parts


def _naive() -> tuple[type, ...]:
    from avalanche.training.supervised import Naive

    return (Naive,)


def _cumulative() -> type:
    from avalanche.training.supervised import Cumulative

    return Cumulative


def _expandable_der(recipe: Any, **options: Any) -> Any:
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


def _hat(recipe: Any, plugins: list[Any], **options: Any) -> Any:
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
            value_range=benchmark.value_range,
        )  # fmt: skip
    return GeneratorTraining(
        model=model, lr=recipe.generator_lr, r=_weight(recipe.generator_r),
        train_mb_size=recipe.batch_size, train_epochs=recipe.generator_epochs,
    )  # fmt: skip


def _dgr(recipe: Any) -> list[Any]:
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


def _weight(r: str) -> str | float:
    """A rule, or a number written out."""
    return r if r in ("1/t", "class_ratio") else float(r)


def _anchor(key: str, lam: float) -> list[Any]:
    """The importance method of a recipe."""
    import avalanche_ext

    return [] if key == "none" else [getattr(avalanche_ext, _IMPORTANCES[key])(lam)]


def _importance(key: str, title: str, summary: str) -> Card:
    return Card(
        key, title, summary, "importance", _ours(_IMPORTANCES[key]),
        lambda recipe: _anchor(key, recipe.lam),
    )  # fmt: skip


def _regulariser(key: str, title: str, summary: str, name: str, *fields: str, **fixed: Any) -> Card:
    """A penalty beside an importance method; ``fields`` are those of the recipe that it takes."""

    def build(recipe: Any) -> list[Any]:
        import avalanche_ext

        options = {field: getattr(recipe, field) for field in fields}
        penalty = getattr(avalanche_ext, name)(recipe.lam, **options, **fixed)
        return [*_anchor(recipe.importance, recipe.anchor_lam), penalty]

    return Card(key, title, summary, "sparsity", _ours(name), build)


def _competition(key: str, title: str, summary: str, unit: str) -> Card:
    """Units that compete come with the recipe's network."""
    return Card(
        key, title, summary, "sparsity", _ours(unit),
        lambda recipe: _anchor(recipe.importance, recipe.anchor_lam),
    )  # fmt: skip


_IMPORTANCES = {
    "ewc": "EWCPlugin",
    "online_ewc": "OnlineEWCPlugin",
    "si": "SynapticIntelligencePlugin",
    "mas": "MASPlugin",
    "rwalk": "RWalkPlugin",
    "l2_transfer": "L2TransferPlugin",
}

CATALOG: dict[str, Card] = {
    card.key: card
    for card in (
        Card("naive", "Naive", "train on, forget; the lower bound", "plain", _naive,
             lambda recipe: [], ours=False),
        Card("joint", "Joint", "train anew on all data seen so far; the upper bound", "plain",
             lambda: (_cumulative(),), _joint_plugins, _cumulative, ours=False),
        Card("er", "ER", "half the batch from memory", "replay", _ours("ERPlugin"),
             lambda recipe: [_er(recipe)]),
        Card("ber", "BER", "each past group in every batch", "replay", _ours("BERPlugin"),
             lambda recipe: [_ber(recipe)]),
        Card("shuffle_replay", "Shuffle", "the memory shuffled into the new data", "replay",
             _ours("ShuffleReplayPlugin"), lambda recipe: [_shuffle(recipe)]),
        Card("drl", "DRL", "discriminative representation loss, without replay", "replay",
             _ours("DRLPlugin"), lambda recipe: [_drl(recipe)]),
        Card("drl_er", "DRL+ER", "discriminative representation loss with ER", "replay",
             _ours("DRLPlugin", "ERPlugin"), lambda recipe: [_drl(recipe), _er(recipe)]),
        Card("drl_ber", "DRL+BER", "discriminative representation loss with BER, the paper's own",
             "replay", _ours("DRLPlugin", "BERPlugin"),
             lambda recipe: [_drl(recipe), _ber(recipe)]),
        Card("drl_shuffle_replay", "DRL+Shuffle", "discriminative representation loss with Shuffle",
             "replay", _ours("DRLPlugin", "ShuffleReplayPlugin"),
             lambda recipe: [_drl(recipe), _shuffle(recipe)]),
        Card("expandable_der", "ExpandableDER",
             "one extractor per experience, the classifier retrained on balanced samples",
             "expansion", _ours("ExpandableDER", "ExpandableNet"), lambda recipe: [],
             make=_expandable_der),
        Card("hat", "HAT", "each task's own masks on the channels of one network, kept for it",
             "expansion", _ours("HATPlugin", "HATNet"), lambda recipe: [], make=_hat),
        _importance("ewc", "EWC", "weights important to the Fisher information held"),
        _importance("online_ewc", "Online EWC", "EWC with one decaying importance"),
        _importance("si", "SI", "weights held by their part in the loss's descent"),
        _importance("mas", "MAS", "weights held by the output's sensitivity to them"),
        _importance("rwalk", "RWalk", "Fisher information and path score together"),
        _importance("l2_transfer", "L2-transfer", "all weights held alike"),
        _regulariser("slni", "SLNI", "units inhibit their neighbours", "SLNIPlugin", "sigma"),
        _regulariser("slnid", "SLNID", "SLNI, less where a unit matters to earlier experiences",
                     "SLNIPlugin", "sigma", form="slnid"),
        _regulariser("sni", "SNI", "units inhibit all others", "SLNIPlugin", form="sni"),
        _regulariser("snid", "SNID", "SNI, less where a unit matters to earlier experiences",
                     "SLNIPlugin", form="snid"),
        _regulariser("l1_rep", "L1-Rep", "L1 norm of the activations", "L1RepPlugin"),
        _regulariser("decov", "DeCov", "covariances of the activations", "DeCovPlugin"),
        _regulariser("orthreg", "OrthReg", "alikeness of a layer's weights", "OrthRegPlugin"),
        _regulariser("l2_decay", "L2-WD", "weight decay", "L2DecayPlugin"),
        _regulariser("l1_param", "L1-Param", "L1 norm of the parameters", "L1ParamPlugin"),
        _competition("maxout", "Maxout", "pairs of units, the larger passed on", "Maxout"),
        _competition("lwta", "LWTA", "pairs of units, the smaller silenced", "LWTA"),
        Card("dgr", "DGR", "a generator's samples of the past, labelled by the last solver",
             "generative", _ours("DGRPlugin", "GeneratorTraining"), _dgr),
        Card("gem", "GEM", "Avalanche's gradient episodic memory", "replay", _plugin("GEMPlugin"),
             lambda recipe: [_gem(recipe)], ours=False),
        Card("agem", "A-GEM", "Avalanche's averaged GEM", "replay", _plugin("AGEMPlugin"),
             lambda recipe: [_agem(recipe)], ours=False),
    )
}  # fmt: skip
