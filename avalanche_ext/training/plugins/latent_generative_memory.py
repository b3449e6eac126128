r"""LGM: latent generative memory. Features of earlier classes are drawn from their densities.

``Naive(MLP(784, (400, 400), 10), ..., plugins=[LatentGenerativeMemoryPlugin("features.1")])``. The
network is cut behind the named layer; only the head behind it is taught by what is drawn.

Reference:
    Skorokhodov (2019), Generative Memory for Continual Learning, "Latent Generative Memory". Near:
    Liu et al. (2020), Generative Feature Replay for Class-Incremental Learning; Yu et al. (2020),
    Semantic Drift Compensation for Class-Incremental Learning.

Faithfulness:
    1. The source asks how to do without distilling the generator. Here a class's density is written
       once and never trained again (``"gaussian"``: mean and 20 directions); a generator that is
       trained jointly with the classifier, as in the source, is ``"vae"`` or ``"wgan"``, which
       replay themselves.
    2. It asks what to do about embeddings that move. Either they do not (the encoder is frozen
       after the first experience, the default, or from the start), or they are held
       (``"distill"``) or slowed down (``"slow"``), and the memory is moved after them (``drift``):
       by a map that is fitted on the new data, by what happened near each mean, or, as it
       suggests, by prototypes, a few images of each class that are kept. ``"finetune"`` does
       nothing about it, and shows that something must be done.
    3. A frozen encoder is in evaluation mode: batch statistics do not move either. So is a slow or
       distilled one after the first experience, as in the code of Liu et al.
    4. ``r`` is the share of new classes, counted at every visit; labels of what is drawn take turns
       over all old classes.
    5. Features that have never been below 0 are drawn at or above 0.
    6. The distance of ``"distill"`` is the squared one, summed over features, a mean over samples,
       with weight ``lam`` beside the mixed loss. The code of Liu et al. takes a norm of the
       whole batch, which depends on its size.
    7. ``drift="linear"`` shrinks towards no drift, not towards 0: where the new data do not vary
       they tell nothing about old classes.
    8. Freeze early layers. Those in front of a late one, learnt on the first classes alone, do not
       tell the others apart.

Cost: the head's forward and backward pass for as many drawn features as new samples; what stands
in front of the cut sees one sample more. A frozen encoder has no backward pass and no update, which
is more than that for an early cut. One pass over each experience at its end. With ``"distill"`` a
pass through the encoder of the last experience for every batch.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.utils import _at_task_boundary
from torch import Tensor

from avalanche_ext.models.feature_memory import GaussianMemory
from avalanche_ext.models.frozen import FrozenCopy
from avalanche_ext.models.network_split import NetworkSplit
from avalanche_ext.training.checks import check_count, check_nonnegative, check_one_of
from avalanche_ext.training.generator_memory import GeneratorMemory
from avalanche_ext.training.latent_rehearsal import LatentRehearsal, dataset_features
from avalanche_ext.training.loading.sources import source_for
from avalanche_ext.training.publishing import publish
from avalanche_ext.training.replay_sources import check_new_data_weight
from avalanche_ext.training.representation_penalty import bare
from avalanche_ext.training.supervised.generator_training import GeneratorTraining

__all__ = ["LatentGenerativeMemoryPlugin"]

_MEMORIES = {
    "gaussian": lambda: GaussianMemory(20),
    "diagonal": lambda: GaussianMemory("diagonal"),
    "full": lambda: GaussianMemory("full"),
    "mixture": lambda: GaussianMemory("diagonal", components=5),
    "vae": lambda: GeneratorMemory("small_cvae"),
    "wgan": lambda: GeneratorMemory("small_ac_wgan"),
}
_ENCODERS = ("freeze_after_first", "frozen", "slow", "distill", "finetune")
_DRIFTS = ("none", "linear", "sdc", "prototypes")


class LatentGenerativeMemoryPlugin(LatentRehearsal):
    r"""Teach the head on new features and on drawn ones, with weights ``r`` and ``1 - r``.

    .. math:: L = r\, \ell(h(f(x)), y) + (1 - r)\, \ell(h(\hat u), \hat y)
              + \lambda \| f(x) - f_{t-1}(x) \|^2, \qquad \hat u \sim p(u | \hat y)

    Logged after each experience: ``LatentGenerativeMemory_Loss``, the mean of the drawn features'
    term, ``_Bytes``, and ``_Drift``, how far features of the new data have moved, squared, over
    their squared length.

    Args:
        layer: Name of the layer that ends the encoder, an early one; its output may be a map.
        memory: ``"gaussian"`` (20 directions), ``"diagonal"``, ``"full"``, ``"mixture"`` (5
            diagonal Gaussians), a ``GaussianMemory``; ``"vae"``, ``"wgan"``, or a
            ``GeneratorTraining`` of features.
        encoder: ``"freeze_after_first"``, ``"frozen"`` (for one that is random or pretrained),
            ``"slow"``, ``"distill"`` or ``"finetune"``.
        drift: How the memory follows an encoder that moves: ``"linear"``, ``"sdc"``,
            ``"prototypes"`` or ``"none"``. By default ``"linear"`` with Gaussians and an encoder
            that is slow or distilled, else ``"none"``.
        slow: Share of each step that a slow encoder takes after the first experience.
        prototypes: Images that are kept of each class, those nearest to its mean, for
            ``drift="prototypes"``: the class's densities move by as much as these have on average.
        r: Weight of the new data: ``"class_ratio"``, ``"1/t"`` or a number in [0, 1]. With 1
            nothing is done, bit for bit.
        lam: Weight of the distance, for ``encoder="distill"``.

    Attributes:
        images: Prototypes by class.

    Raises:
        TypeError, ValueError: For a bad argument; in training, for a layer that the network does
            not have (near matches are listed) or behind which it cannot be cut; for a model
            with a head for each task.
    """

    label = "LatentGenerativeMemory"

    @property
    def bytes_remembered(self) -> int:
        """Bytes of the memory and of prototypes between experiences."""
        return super().bytes_remembered + sum(x.nbytes for x in self.images.values())

    def __init__(
        self,
        layer: str,
        *,
        memory: str | GaussianMemory | GeneratorTraining = "gaussian",
        encoder: str = "freeze_after_first",
        drift: str | None = None,
        slow: float = 0.1,
        prototypes: int = 10,
        r: str | float = "class_ratio",
        lam: float = 1.0,
    ) -> None:
        owner = type(self).__name__
        check_one_of(owner, "encoder", encoder, _ENCODERS)
        check_one_of(owner, "drift", drift, (None, *_DRIFTS))
        check_new_data_weight(owner, r)
        check_nonnegative(owner, lam=lam)
        check_count(owner, prototypes=prototypes)
        super().__init__(layer, _memory(owner, memory), encoder, r, slow)
        gaussian = isinstance(self.memory, GaussianMemory)
        moves = encoder in ("slow", "distill", "finetune")
        if drift in _DRIFTS[1:] and not (moves and gaussian):
            raise ValueError(
                f"{owner} got drift={drift!r}, which moves Gaussians after an encoder that moves; "
                f"the encoder is {encoder!r}, the memory {type(self.memory).__name__}. Leave drift "
                f"out, or choose encoder='distill' and a Gaussian memory."
            )
        held = encoder in ("slow", "distill")
        self.drift = drift or ("linear" if held and gaussian else "none")
        self.lam = lam
        self.prototypes = prototypes
        self.images: dict[int, Tensor] = {}
        self._teacher: FrozenCopy | None = None
        self._listening: Any = None
        self._features: Tensor | None = None  # of this batch

    # an experience --------------------------------------------------------------------------

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Keep the encoder as it is, where it may move."""
        super().before_train_dataset_adaptation(strategy, **kwargs)
        moves = self.encoder == "distill" or self.drift != "none"
        begins = _at_task_boundary(strategy.experience, before=True)
        if self.r != 1 and moves and begins and self.experiences:
            self._teacher = FrozenCopy(bare(strategy.model))

    def begin(self, strategy: Any) -> None:
        """A generator takes up the experience's classes."""
        if isinstance(self.memory, GeneratorMemory) and not self.memory.opened:
            assert self._split is not None
            assert self._shape is not None
            width, n_classes = self._shape.numel(), self._split.outputs
            self.memory.begin(self._learning, width, n_classes, strategy.device)

    def learn(self, strategy: Any, u: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """Move what is known to where the encoder is now, then write the new classes."""
        if self._teacher is not None:
            split = NetworkSplit(self._teacher.module, self.layer)
            before = dataset_features(strategy, split, self._learning.dataset)
            moved = (u - before).square().sum() / before.square().sum()
            publish(self, strategy, f"{self.label}_Drift", float(moved))
            if self.drift != "none":
                assert isinstance(self.memory, GaussianMemory)
                if self.drift == "prototypes":
                    self._follow_prototypes(strategy, split, self.memory)
                else:
                    self.memory.follow(before, u, self.drift)
            self._teacher = None
        super().learn(strategy, u, y, generator)
        if self.drift == "prototypes":
            self._keep_prototypes(strategy, u, y)

    def _follow_prototypes(
        self, strategy: Any, before: NetworkSplit, memory: GaussianMemory
    ) -> None:
        now = NetworkSplit(bare(strategy.model), self.layer)
        for label, x in self.images.items():
            moved = dataset_features(strategy, now, x) - dataset_features(strategy, before, x)
            memory.shift(label, moved.mean(0))

    def _keep_prototypes(self, strategy: Any, u: Tensor, y: Tensor) -> None:
        source = source_for(strategy, self._learning.dataset.eval())
        now = NetworkSplit(bare(strategy.model), self.layer)
        memory = self.memory
        assert isinstance(memory, GaussianMemory)

        def nearest(features: Tensor, label: int) -> Tensor:
            distance = (features - memory.mean(label)).square().sum(1)
            return distance.argsort(stable=True)[: self.prototypes]

        for label in y.unique().tolist():
            rows = torch.nonzero(y == label)[:, 0]
            chosen = rows[nearest(u[rows], label)].cpu()
            with torch.random.fork_rng(devices=[]):
                x = source.gather(chosen)[0].to(strategy.device)
            if label in self.images:  # a class that has come back
                x = torch.cat([self.images[label], x])
                x = x[nearest(dataset_features(strategy, now, x), label)]
            self.images[label] = x

    # one step -------------------------------------------------------------------------------

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Listen to the encoder, where its features are needed."""
        super().before_forward(strategy, **kwargs)
        distils = self.encoder == "distill" and self._teacher is not None
        self._stop_listening()  # to a pass that ended in an error
        if self.r != 1 and (distils or isinstance(self.memory, GeneratorMemory)):
            assert self._split is not None
            self._listening = self._split.listen(self._keep)

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Leave the network as it was."""
        super().after_forward(strategy, **kwargs)
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listening is not None:
            self._listening.remove()
            self._listening = None

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the distance to the last encoder."""
        if self.encoder != "distill" or self._teacher is None:
            return
        assert self._features is not None
        with torch.no_grad():
            before = NetworkSplit(self._teacher.module, self.layer).features(strategy.mb_x)
        moved = (self._features - before).flatten(1).square().sum(1).mean()
        strategy.loss = strategy.loss + self.lam * moved

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """A generator takes a step on what the head has seen."""
        if isinstance(self.memory, GeneratorMemory) and self._features is not None:
            u = self._features.detach().flatten(1).float()
            self.memory.step(u, strategy.mb_y, self._replay)
        self._features = self._replay = None

    def _keep(self, features: Tensor) -> None:
        self._features = features

    def __str__(self) -> str:
        return self.label


def _memory(owner: str, memory: Any) -> GaussianMemory | GeneratorMemory:
    if isinstance(memory, str):
        check_one_of(owner, "memory", memory, tuple(_MEMORIES))
        return _MEMORIES[memory]()
    if isinstance(memory, GeneratorTraining):
        return GeneratorMemory(memory)
    if not isinstance(memory, GaussianMemory):
        raise TypeError(
            f"{owner} expects memory to be one of {list(_MEMORIES)}, a GaussianMemory or a "
            f"GeneratorTraining of features; got a {type(memory).__name__}."
        )
    return memory
