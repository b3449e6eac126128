"""Continual-learning methods as Avalanche plugins, with every number checkable.

Public names load on first use: importing this package loads neither torch nor Avalanche.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that defines it
_PUBLIC = {
    "BERPlugin": "training.plugins.ber",
    "DRLPlugin": "training.plugins.drl",
    "ERPlugin": "training.plugins.er",
    "ShuffleReplayPlugin": "training.plugins.shuffle_replay",
    "CompilePlugin": "training.plugins.compile",
    "DataParallelPlugin": "training.plugins.data_parallel",
    "DeviceDataPlugin": "training.plugins.device_data",
    "PrecisionPlugin": "training.plugins.precision",
    "ClassBalancedMemory": "training.storage_policy.exemplar_memory",
    "ExemplarMemory": "training.storage_policy.exemplar_memory",
    "ExperienceBalancedMemory": "training.storage_policy.exemplar_memory",
    "ReservoirMemory": "training.storage_policy.exemplar_memory",
    "AccuracyMatrixMetrics": "evaluation.metrics.matrix",
    "ChallengeMetrics": "evaluation.metrics.challenge",
    "RepresentationTransfer": "evaluation.metrics.representation",
    "ResourceMetrics": "evaluation.metrics.resources",
    "HerdingMemory": "training.storage_policy.herding",
    "ClassifierStage": "training.supervised.expandable_der",
    "ExpandableDER": "training.supervised.expandable_der",
    "Schedule": "training.schedule",
    "SchedulePlugin": "training.plugins.schedule",
    "ChannelMasks": "models.expandable_net",
    "ExpandableNet": "models.expandable_net",
    "GatedNetwork": "models.channel_gates",
    "find_channel_groups": "models.channel_groups",
    "fold_batch_norms": "models.pruning",
    "prune_channels": "models.pruning",
    "HATNet": "models.hat_net",
    "HATPlugin": "training.plugins.hat",
    "GradientDiversity": "evaluation.metrics.gradient_diversity",
    "FixedSizeClassifier": "models.heads",
    "MLP": "models.mlp",
    "build_backbone": "models.backbones",
    "SLNIPlugin": "training.plugins.slni",
    "NeuronImportance": "training.plugins.slni",
    "L1RepPlugin": "training.plugins.activation_penalty",
    "DeCovPlugin": "training.plugins.activation_penalty",
    "OrthRegPlugin": "training.plugins.parameter_penalty",
    "L1ParamPlugin": "training.plugins.parameter_penalty",
    "L2DecayPlugin": "training.plugins.parameter_penalty",
    "Maxout": "models.competition",
    "LWTA": "models.competition",
    "CompetitiveMLP": "models.competition",
    "SparsityMetrics": "evaluation.metrics.sparsity",
    "EWCPlugin": "training.plugins.parameter_anchor",
    "OnlineEWCPlugin": "training.plugins.parameter_anchor",
    "SynapticIntelligencePlugin": "training.plugins.parameter_anchor",
    "MASPlugin": "training.plugins.parameter_anchor",
    "RWalkPlugin": "training.plugins.parameter_anchor",
    "L2TransferPlugin": "training.plugins.parameter_anchor",
    "ParameterAnchorPlugin": "training.plugins.parameter_anchor",
    "DGRPlugin": "training.plugins.dgr",
    "ExactReplay": "training.replay_sources",
    "NoiseReplay": "training.replay_sources",
    "GeneratorTraining": "training.supervised.generator_training",
    "DGM": "training.supervised.dgm",
    "Discriminator": "models.generators.discriminator",
    "MaskedGenerator": "models.generators.masked",
    "VAE": "models.generators.vae",
    "WGAN": "models.generators.wgan",
    "build_generator": "models.generators.build",
    "LatentGenerativeMemoryPlugin": "training.plugins.latent_generative_memory",
    "LatentReplayPlugin": "training.plugins.latent_replay",
    "LatentAlignmentPlugin": "training.plugins.latent_alignment",
    "OnlineLookaheadPlugin": "training.plugins.online_lookahead",
    "OnlineDistillationPlugin": "training.plugins.online_distillation",
    "OnlineProjectionPlugin": "training.plugins.online_projection",
    "GaussianMemory": "models.feature_memory",
    "drl_loss": "functional.drl",
}

__all__ = [
    "DGM",
    "LWTA",
    "MLP",
    "VAE",
    "WGAN",
    "AccuracyMatrixMetrics",
    "BERPlugin",
    "ChallengeMetrics",
    "ChannelMasks",
    "ClassBalancedMemory",
    "ClassifierStage",
    "CompetitiveMLP",
    "CompilePlugin",
    "DGRPlugin",
    "DRLPlugin",
    "DataParallelPlugin",
    "DeCovPlugin",
    "DeviceDataPlugin",
    "Discriminator",
    "ERPlugin",
    "EWCPlugin",
    "ExactReplay",
    "ExemplarMemory",
    "ExpandableDER",
    "ExpandableNet",
    "ExperienceBalancedMemory",
    "FixedSizeClassifier",
    "GatedNetwork",
    "GaussianMemory",
    "GeneratorTraining",
    "GradientDiversity",
    "HATNet",
    "HATPlugin",
    "HerdingMemory",
    "L1ParamPlugin",
    "L1RepPlugin",
    "L2DecayPlugin",
    "L2TransferPlugin",
    "LatentAlignmentPlugin",
    "LatentGenerativeMemoryPlugin",
    "LatentReplayPlugin",
    "MASPlugin",
    "MaskedGenerator",
    "Maxout",
    "NeuronImportance",
    "NoiseReplay",
    "OnlineDistillationPlugin",
    "OnlineEWCPlugin",
    "OnlineLookaheadPlugin",
    "OnlineProjectionPlugin",
    "OrthRegPlugin",
    "ParameterAnchorPlugin",
    "PrecisionPlugin",
    "RWalkPlugin",
    "RepresentationTransfer",
    "ReservoirMemory",
    "ResourceMetrics",
    "SLNIPlugin",
    "Schedule",
    "SchedulePlugin",
    "ShuffleReplayPlugin",
    "SparsityMetrics",
    "SynapticIntelligencePlugin",
    "__version__",
    "build_backbone",
    "build_generator",
    "drl_loss",
    "find_channel_groups",
    "fold_batch_norms",
    "prune_channels",
]

if TYPE_CHECKING:
    from avalanche_ext.evaluation.metrics.challenge import ChallengeMetrics
    from avalanche_ext.evaluation.metrics.gradient_diversity import GradientDiversity
    from avalanche_ext.evaluation.metrics.matrix import AccuracyMatrixMetrics
    from avalanche_ext.evaluation.metrics.representation import RepresentationTransfer
    from avalanche_ext.evaluation.metrics.resources import ResourceMetrics
    from avalanche_ext.evaluation.metrics.sparsity import SparsityMetrics
    from avalanche_ext.functional.drl import drl_loss
    from avalanche_ext.models.backbones import build_backbone
    from avalanche_ext.models.channel_gates import GatedNetwork
    from avalanche_ext.models.channel_groups import find_channel_groups
    from avalanche_ext.models.competition import LWTA, CompetitiveMLP, Maxout
    from avalanche_ext.models.expandable_net import ChannelMasks, ExpandableNet
    from avalanche_ext.models.feature_memory import GaussianMemory
    from avalanche_ext.models.generators.build import build_generator
    from avalanche_ext.models.generators.discriminator import Discriminator
    from avalanche_ext.models.generators.masked import MaskedGenerator
    from avalanche_ext.models.generators.vae import VAE
    from avalanche_ext.models.generators.wgan import WGAN
    from avalanche_ext.models.hat_net import HATNet
    from avalanche_ext.models.heads import FixedSizeClassifier
    from avalanche_ext.models.mlp import MLP
    from avalanche_ext.models.pruning import fold_batch_norms, prune_channels
    from avalanche_ext.training.plugins.activation_penalty import DeCovPlugin, L1RepPlugin
    from avalanche_ext.training.plugins.ber import BERPlugin
    from avalanche_ext.training.plugins.compile import CompilePlugin
    from avalanche_ext.training.plugins.data_parallel import DataParallelPlugin
    from avalanche_ext.training.plugins.device_data import DeviceDataPlugin
    from avalanche_ext.training.plugins.dgr import DGRPlugin
    from avalanche_ext.training.plugins.drl import DRLPlugin
    from avalanche_ext.training.plugins.er import ERPlugin
    from avalanche_ext.training.plugins.hat import HATPlugin
    from avalanche_ext.training.plugins.latent_alignment import LatentAlignmentPlugin
    from avalanche_ext.training.plugins.latent_generative_memory import LatentGenerativeMemoryPlugin
    from avalanche_ext.training.plugins.latent_replay import LatentReplayPlugin
    from avalanche_ext.training.plugins.online_distillation import OnlineDistillationPlugin
    from avalanche_ext.training.plugins.online_lookahead import OnlineLookaheadPlugin
    from avalanche_ext.training.plugins.online_projection import OnlineProjectionPlugin
    from avalanche_ext.training.plugins.parameter_anchor import (
        EWCPlugin,
        L2TransferPlugin,
        MASPlugin,
        OnlineEWCPlugin,
        ParameterAnchorPlugin,
        RWalkPlugin,
        SynapticIntelligencePlugin,
    )
    from avalanche_ext.training.plugins.parameter_penalty import (
        L1ParamPlugin,
        L2DecayPlugin,
        OrthRegPlugin,
    )
    from avalanche_ext.training.plugins.precision import PrecisionPlugin
    from avalanche_ext.training.plugins.schedule import SchedulePlugin
    from avalanche_ext.training.plugins.shuffle_replay import ShuffleReplayPlugin
    from avalanche_ext.training.plugins.slni import NeuronImportance, SLNIPlugin
    from avalanche_ext.training.replay_sources import ExactReplay, NoiseReplay
    from avalanche_ext.training.schedule import Schedule
    from avalanche_ext.training.storage_policy.exemplar_memory import (
        ClassBalancedMemory,
        ExemplarMemory,
        ExperienceBalancedMemory,
        ReservoirMemory,
    )
    from avalanche_ext.training.storage_policy.herding import HerdingMemory
    from avalanche_ext.training.supervised.dgm import DGM
    from avalanche_ext.training.supervised.expandable_der import ClassifierStage, ExpandableDER
    from avalanche_ext.training.supervised.generator_training import GeneratorTraining


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(
            f"avalanche_ext has no public name {name!r}; it has {', '.join(sorted(_PUBLIC))}."
        )
    value = getattr(importlib.import_module(f"avalanche_ext.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
