"""The methods: key -> card. The only registry; tests, recipes, tables and commands read it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from avalanche_ext import builders
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


def _importance(key: str, title: str, summary: str) -> Card:
    return Card(
        key, title, summary, "importance", _ours(builders.IMPORTANCES[key]),
        lambda recipe: builders.anchor(key, recipe.lam),
    )  # fmt: skip


def _regulariser(key: str, title: str, summary: str, name: str, *fields: str, **fixed: Any) -> Card:
    """A penalty beside an importance method; ``fields`` are those of the recipe that it takes."""

    def build(recipe: Any) -> list[Any]:
        import avalanche_ext

        options = {field: getattr(recipe, field) for field in fields}
        penalty = getattr(avalanche_ext, name)(recipe.lam, **options, **fixed)
        return [*builders.anchor(recipe.importance, recipe.anchor_lam), penalty]

    return Card(key, title, summary, "sparsity", _ours(name), build)


def _competition(key: str, title: str, summary: str, unit: str) -> Card:
    """Units that compete come with the recipe's network."""
    return Card(
        key, title, summary, "sparsity", _ours(unit),
        lambda recipe: builders.anchor(recipe.importance, recipe.anchor_lam),
    )  # fmt: skip


CATALOG: dict[str, Card] = {
    card.key: card
    for card in (
        Card("naive", "Naive", "train on, forget; the lower bound", "plain", _naive,
             lambda recipe: [], ours=False),
        Card("joint", "Joint", "train anew on all data seen so far; the upper bound", "plain",
             lambda: (_cumulative(),), builders.joint, _cumulative, ours=False),
        Card("er", "ER", "half the batch from memory", "replay", _ours("ERPlugin"),
             lambda recipe: [builders.er(recipe)]),
        Card("ber", "BER", "each past group in every batch", "replay", _ours("BERPlugin"),
             lambda recipe: [builders.ber(recipe)]),
        Card("shuffle_replay", "Shuffle", "the memory shuffled into the new data", "replay",
             _ours("ShuffleReplayPlugin"), lambda recipe: [builders.shuffle_replay(recipe)]),
        Card("drl", "DRL", "discriminative representation loss, without replay", "replay",
             _ours("DRLPlugin"), lambda recipe: [builders.drl(recipe)]),
        Card("drl_er", "DRL+ER", "discriminative representation loss with ER", "replay",
             _ours("DRLPlugin", "ERPlugin"),
             lambda recipe: [builders.drl(recipe), builders.er(recipe)]),
        Card("drl_ber", "DRL+BER", "discriminative representation loss with BER, the paper's own",
             "replay", _ours("DRLPlugin", "BERPlugin"),
             lambda recipe: [builders.drl(recipe), builders.ber(recipe)]),
        Card("drl_shuffle_replay", "DRL+Shuffle", "discriminative representation loss with Shuffle",
             "replay", _ours("DRLPlugin", "ShuffleReplayPlugin"),
             lambda recipe: [builders.drl(recipe), builders.shuffle_replay(recipe)]),
        Card("expandable_der", "ExpandableDER",
             "one extractor per experience, the classifier retrained on balanced samples",
             "expansion", _ours("ExpandableDER", "ExpandableNet"), lambda recipe: [],
             make=builders.expandable_der),
        Card("hat", "HAT", "each task's own masks on the channels of one network, kept for it",
             "expansion", _ours("HATPlugin", "HATNet"), lambda recipe: [], make=builders.hat),
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
             "generative", _ours("DGRPlugin", "GeneratorTraining"), builders.dgr),
        Card("mergan_jtr", "MeRGAN-JTR", "a conditional GAN taught again on what it made",
             "generative", _ours("GeneratorTraining", "WGAN", "DGRPlugin"), builders.dgr),
        Card("mergan_ra", "MeRGAN-RA", "a conditional GAN held to what it made from the same noise",
             "generative", _ours("GeneratorTraining", "WGAN", "DGRPlugin"), builders.dgr),
        Card("dgm_w", "DGMw", "a generator of which each task keeps some weights",
             "generative", _ours("DGM", "MaskedGenerator"), lambda recipe: [], make=builders.dgm),
        Card("dgm_a", "DGMa", "a generator of which each task keeps some channels",
             "generative", _ours("DGM", "MaskedGenerator"), lambda recipe: [], make=builders.dgm),
        Card("latent_generative_memory", "Latent generative memory",
             "features of earlier classes drawn from their densities",
             "latent", _ours("LatentGenerativeMemoryPlugin"), builders.latent_generative_memory),
        Card("latent_replay", "Latent replay",
             "features of earlier samples stored at one layer",
             "latent", _ours("LatentReplayPlugin"), builders.latent_replay),
        Card("latent_alignment", "Latent alignment",
             "bridges from the new embedding to those of earlier tasks",
             "latent", _ours("LatentAlignmentPlugin"), lambda recipe: [],
             make=builders.latent_alignment),
        Card("online_lookahead", "Online look-ahead",
             "steps that make the next step safe for earlier outputs",
             "online", _ours("OnlineLookaheadPlugin"), builders.online),
        Card("online_distillation", "Online distillation",
             "steps back to the outputs before each step",
             "online", _ours("OnlineDistillationPlugin"), builders.online),
        Card("online_projection", "Online projection",
             "each step projected to one that keeps earlier outputs",
             "online", _ours("OnlineProjectionPlugin"), builders.online),
        Card("gem", "GEM", "Avalanche's gradient episodic memory", "replay", _plugin("GEMPlugin"),
             lambda recipe: [builders.gem(recipe)], ours=False),
        Card("agem", "A-GEM", "Avalanche's averaged GEM", "replay", _plugin("AGEMPlugin"),
             lambda recipe: [builders.agem(recipe)], ours=False),
    )
}  # fmt: skip
