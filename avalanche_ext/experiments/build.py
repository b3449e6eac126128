"""From a recipe to its network, its optimizer and its strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.models import as_multitask
from avalanche.training.plugins import EvaluationPlugin

from avalanche_ext.catalog import find_card
from avalanche_ext.models.backbones import build_backbone, freeze
from avalanche_ext.models.heads import FixedSizeClassifier
from avalanche_ext.recipes import Recipe
from avalanche_ext.training.plugins.device_data import DeviceDataPlugin
from avalanche_ext.training.plugins.schedule import SchedulePlugin
from avalanche_ext.training.schedule import Schedule

__all__ = ["build_model", "build_optimizer", "build_strategy"]


def build_strategy(
    recipe: Recipe,
    *,
    plugins: Sequence[Any] = (),
    evaluator: EvaluationPlugin | None = None,
    device: str = "cpu",
) -> Any:
    """The Avalanche strategy of a recipe: network, optimizer, the method's plugins, ``plugins``.

    Data stay in tensors on the device (``DeviceDataPlugin``), which changes no number.
    The network's first weights come from torch's global random state: seed it before.

    Raises:
        ValueError: For a growing head with a method that makes its own.
    """
    card = find_card(recipe.method)
    options: dict[str, Any] = {
        "criterion": torch.nn.CrossEntropyLoss(),
        "train_mb_size": recipe.batch_size,
        "train_epochs": recipe.epochs,
        "eval_mb_size": 512,
        "device": device,
        "plugins": [DeviceDataPlugin(), *card.build(recipe), *plugins],
        "evaluator": evaluator,
    }
    if card.make is not None:
        if recipe.head != "fixed":
            raise ValueError(
                f"{recipe.name}: {card.title} makes its own heads; got head={recipe.head!r}. Leave "
                f"it out."
            )
        return card.make(recipe, **options)
    if recipe.warmup_epochs or recipe.milestones:
        schedule = Schedule(recipe.lr, recipe.warmup_epochs, recipe.milestones)
        options["plugins"].insert(0, SchedulePlugin(schedule))
    model = build_model(recipe)
    optimizer = build_optimizer(recipe, model)
    return card.strategy_class()(model=model, optimizer=optimizer, **options)


def build_optimizer(recipe: Recipe, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe over all parameters of its network."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(
            model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
    )


def build_model(recipe: Recipe) -> torch.nn.Module:
    """The network of a recipe, its first weights from torch's global random state.

    With one head, or one for each experience of a task-incremental benchmark.

    Raises:
        ValueError: For a growing head where each experience has its own.
    """
    model = build_backbone(
        recipe.backbone, recipe.benchmark.n_outputs, recipe.benchmark.in_shape,
        pretrained=recipe.pretrained, hidden=recipe.hidden,
    )  # fmt: skip
    freeze(model, recipe.freeze)
    name = getattr(model, "default_cfg", {}).get("classifier")
    name = name or ("fc" if hasattr(model, "fc") else "classifier")
    if recipe.benchmark.multi_head:
        if recipe.head == "growing":
            raise ValueError(
                f"{recipe.name}: head='growing' is for one head; a task-incremental benchmark has "
                f"one for each experience. Leave it out."
            )
        # A head per task label; they are made as the experiences come.
        return as_multitask(model, name)
    if recipe.head == "growing":
        width: Any = model.num_features
        head = FixedSizeClassifier(width, recipe.benchmark.n_outputs, initial_out_features=1)
        setattr(model, name, head)
    return model
