r"""Train a generator on a stream: on each experience, and on what it made before.

.. math:: L = r\, \mathbb E_{x \sim D_t}[\ell(x)] + (1 - r)\, \mathbb E_{x' \sim G_{t-1}}[\ell(x')]

with the negative ELBO of a variational autoencoder, or the loss of an adversarial critic, whose
generator takes a step after every ``critic_steps`` batches.

With a conditional ``WGAN`` this is MeRGAN in both its forms: joint retraining with replay (JTR) is
``r="class_ratio"``; replay alignment (RA) is ``r=1.0, alignment=0.03``, where the critic sees new
data alone and the generator's loss has the term

.. math:: \lambda\, \mathbb E_{z, c}\left[\|G_t(z, c) - G_{t-1}(z, c)\|^2\right],
          \qquad c \sim U(\text{old classes})

``r=1.0`` alone is its baseline, sequential fine-tuning. A classifier on top is
``DGRPlugin(source, r="class_ratio", labels="source")``; after JTR, not after RA, the class head of
the critic is one as well (``WGAN.classify``).

Reference:
    Shin, Lee, Kim, Kim (2017), Continual Learning with Deep Generative Replay, NeurIPS; Wu,
    Herranz, Liu, Wang, van de Weijer, Raducanu (2018), Memory Replay GANs: Learning to Generate New
    Categories without Forgetting, NeurIPS; released code ``WuChenshen/MeRGAN``.

Faithfulness:
    1. All replay of an experience comes from the generator as it was when the experience began.
    2. An adversarial generator's own loss is not weighted, as in code that is at hand; the critic's
       loss of replayed samples includes their gradient penalty.
    3. Optimizers are Adam's. Those of an adversarial pair begin anew with each experience, as in
       code of later papers; that of an autoencoder goes on.
    4. One batch is one step of the critic. So ``N`` steps of the generator take
       ``N * critic_steps`` batches.
    5. JTR: every class has the same weight. In the released code each old class adds a term of
       weight 1, which is the same up to a factor, and the gradient penalty is that of current data.
    6. RA: the distance is a sum over pixels in [-1, 1] and a mean over samples, as in the paper. In
       the released code the factor depends on the number of old classes; the paper's rates are an
       ``alignment`` of 0.03 for MNIST and 0.3 for SVHN with one old class. Both generators are in
       evaluation mode; there batch norms use the batch.
    7. A generator whose critic sees new data alone is asked for new classes alone.

Cost: a step sees twice the samples from the second experience on, in one pass; with alignment a
step of the generator passes through it twice more. During an experience a second copy of the
network is held; between experiences none is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.utils import _at_task_boundary
from torch import Generator as Draws
from torch import Tensor
from torch.optim import Adam

from avalanche_ext.functional.generative import new_data_weight
from avalanche_ext.models.frozen import FrozenCopy
from avalanche_ext.models.generators.base import GenerativeModel
from avalanche_ext.models.generators.wgan import WGAN
from avalanche_ext.training.checks import check_count, check_experience, check_nonnegative
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.replay_sources import (
    Replay,
    check_new_data_weight,
    classes_of,
    whole_experience,
)

__all__ = ["GeneratorTraining"]

_SALT = 0x67656E  # keeps its draws apart from those of other users of the seed
_PROBE = 256  # samples that are compared with the data
_COLLAPSED = 0.01  # of the data's variance


class GeneratorTraining(SupervisedTemplate):
    """A strategy whose model is a generator, and a source of replayed samples for a solver.

    ``strategy.train(experience)`` trains it by itself. ``begin``, ``replay``, ``step`` and
    ``finish`` let another loop drive it, as ``DGRPlugin`` does.

    Args:
        model: The generator, which is trained in place.
        lr: Learning rate of Adam; the model's own by default.
        r: Weight of the new data: ``"1/t"``, ``"class_ratio"`` or a number in [0, 1]; see
            ``avalanche_ext.functional.generative.new_data_weight``.
        alignment: Weight >= 0 of replay alignment, for a conditional adversarial generator; with
            ``r=1.0``. The new classes are learnt less the larger it is.
        critic_steps: Batches for each step of an adversarial generator.
        reset_optimizer: Whether Adam begins anew with each experience; by default for adversarial
            generators.
        evaluator: Avalanche's; its metrics get the loss of each sample as the model's output.
        plugins: Avalanche plugins, for ``train``.
        **options: Of Avalanche's ``SupervisedTemplate``: ``train_mb_size``, ``train_epochs``, ...

    Attributes:
        previous: The generator of the experiences before, while one is being trained on.

    Raises:
        TypeError: If the model is not a ``GenerativeModel``.
        ValueError: For a bad argument; at the first batch of an experience, for data that the
            generator was not built for; at its end, for a loss that is no longer finite.
    """

    model: GenerativeModel

    def __init__(
        self,
        *,
        model: GenerativeModel,
        lr: float | None = None,
        r: str | float = "1/t",
        alignment: float = 0.0,
        critic_steps: int = 5,
        reset_optimizer: bool | None = None,
        evaluator: Any = None,
        plugins: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, GenerativeModel):
            raise TypeError(
                f"GeneratorTraining expects a GenerativeModel, such as VAE((1, 28, 28)); got a "
                f"{type(model).__name__}."
            )
        check_new_data_weight("GeneratorTraining", r)
        check_count("GeneratorTraining", critic_steps=critic_steps)
        check_nonnegative("GeneratorTraining", alignment=alignment)
        if alignment and not (isinstance(model, WGAN) and model.conditional):
            raise ValueError(
                f"GeneratorTraining(alignment={alignment}) holds what a conditional adversarial "
                f"generator makes of each class, such as WGAN((1, 28, 28), n_classes=10); got a "
                f"{type(model).__name__} with n_classes={model.n_classes}. Leave alignment out."
            )
        rate, betas = model.adam
        rate = rate if lr is None else lr
        self.r = r
        self.alignment = alignment
        self.critic_steps = critic_steps
        self.reset_optimizer = model.adversarial if reset_optimizer is None else reset_optimizer
        self.sample_optimizer: Adam | None = None
        if model.adversarial:
            self.sample_optimizer = Adam(model.sample_parameters(), rate, betas, fused=True)
        self.previous: FrozenCopy | None = None
        self.experiences = 0
        self.steps = 0  # of this experience
        self._opened = False  # an experience has begun
        self._driven = False  # by another loop, which begins and finishes experiences
        self._weight = 1.0
        self._classes: list[int] = []  # of this experience
        self._classes_learnt = 0  # counted in each experience
        self._draws: Draws | None = None
        self._given: Replay | None = None  # replay for the present step
        self._probe: Tensor | None = None
        super().__init__(
            model=model,
            optimizer=Adam(model.data_parameters(), rate, betas, fused=True),
            evaluator=evaluator,
            plugins=plugins,
            **options,
        )

    @property
    def labelled(self) -> bool:
        """Whether samples come with labels."""
        return self.model.conditional

    @property
    def adversarial(self) -> bool:
        """Whether the model is an adversarial pair."""
        return self.model.adversarial

    # an experience --------------------------------------------------------------------------

    def begin(self, experience: Any, device: torch.device | None = None) -> None:
        """An experience begins: keep the generator as it is, and take up the new classes."""
        self.device = self.device if device is None else device
        self.model.to(self.device).train()
        self.previous = FrozenCopy(self.model) if self.experiences else None
        self._classes = classes = classes_of(experience)
        self.model.learn_classes(classes)
        self.experiences += 1
        self._classes_learnt += len(classes)
        self._weight = new_data_weight(self.r, self.experiences, len(classes), self._classes_learnt)
        self._draws = seeded(torch.initial_seed(), _SALT, self.experiences)
        self.steps, self._probe, self._opened = 0, None, True
        self.make_optimizer()
        if self.reset_optimizer:
            for optimizer in self._optimizers():
                optimizer.state.clear()

    def replay(self, n: int, generator: Draws) -> Replay:
        """``n`` samples of the generator before this experience, and their labels or ``None``."""
        assert self.previous is not None, "nothing to replay in the first experience"
        earlier: Any = self.previous.module
        return earlier.sample(n, generator=generator)

    def step(self, x: Tensor, y: Tensor, replay: Replay | None) -> None:
        """One update on a batch, and on what is replayed beside it."""
        self._given, self.is_training = replay, True
        self.mbatch = [x, y, torch.zeros_like(y)]
        self.optimizer.zero_grad()
        self.mb_output = self.forward()
        self.loss = self.criterion()
        self.backward()
        self.optimizer_step()
        self._given = self.mbatch = self.mb_output = None
        self.loss, self.is_training = self.loss.detach(), False

    def learn(self, experience: Any) -> None:
        """The strategy's own loop, inside an experience that has begun."""
        self._driven = True
        try:
            self.train(experience, eval_streams=[])
        finally:
            self._driven = False

    def finish(self) -> None:
        """The experience has ended: look at what the generator makes now."""
        self._check_loss()
        variances = self._variances()
        if self.model.adversarial and 0 < self.steps < self.critic_steps:
            warnings.warn(
                f"the generator was not trained on experience {self.experiences}: it takes a step "
                f"after every critic_steps={self.critic_steps} batches, and there were "
                f"{self.steps}. Train it longer (train_epochs), or lower critic_steps.",
                stacklevel=4,
            )
        elif variances is not None and variances[0] < _COLLAPSED * variances[1]:
            warnings.warn(
                f"the generator has collapsed: after {self.steps} updates on experience "
                f"{self.experiences} the total variance of {_PROBE} of its samples is "
                f"{variances[0]:.3g}, that of the data {variances[1]:.3g}. What it replays is one "
                f"and the same sample. Train it longer (train_epochs), or with another lr.",
                stacklevel=4,
            )
        self.previous = self._probe = self._draws = None
        self.loss, self._opened = self._make_empty_loss(), False

    def _check_loss(self) -> None:
        if not bool(torch.isfinite(self.loss).all()):
            raise ValueError(
                f"GeneratorTraining: the loss is {float(self.loss.detach()):.3g} after "
                f"{self.steps} updates on experience {self.experiences}: training has diverged. "
                f"Lower lr."
            )

    def _variances(self) -> tuple[float, float] | None:
        """Total variance of samples and of the data; ``None`` if data of one value says nothing."""
        if self._probe is None or len(self._probe) < 2:
            return None
        made = self.model.sample(_PROBE, generator=seeded(_SALT))[0]
        own, data = (float(x.flatten(1).var(0).sum()) for x in (made, self._probe))
        return (own, data) if data > 0 else None

    # Avalanche's loop -----------------------------------------------------------------------

    def make_optimizer(self, **kwargs: Any) -> None:
        """Point the optimizers to the parameters there are; what a known one learnt is kept."""
        parts = (self.model.data_parameters(), self.model.sample_parameters())
        for optimizer, parameters in zip(self._optimizers(), parts, strict=False):
            optimizer.param_groups[0]["params"] = parameters

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [o for o in (self.optimizer, self.sample_optimizer) if o is not None]

    def _before_training_exp(self, **kwargs: Any) -> None:
        check_experience(self)
        if not self._driven and _at_task_boundary(self.experience, before=True):
            if self._opened:  # an online stream does not always say which part is the last
                self.finish()
            self.begin(whole_experience(self.experience))
        super()._before_training_exp(**kwargs)

    def _after_training_exp(self, **kwargs: Any) -> None:
        self._check_loss()  # the loop forgets it
        super()._after_training_exp(**kwargs)
        if not self._driven and _at_task_boundary(self.experience, before=False):
            self.finish()

    def forward(self) -> Tensor:
        """Loss of each sample of the batch, then of each replayed one."""
        x, y = self.mb_x, self.mb_y
        if not self.is_training:
            return self.model.data_loss(x, y, seeded(_SALT))
        if self._probe is None:
            self.model.check_data(x)
            self._probe = x.detach()[:_PROBE]
        if self.previous is not None and self._weight < 1:
            assert self._draws is not None
            old_x, old_y = self._given or self.replay(len(x), self._draws)
            # Without labels of its own, a replayed sample needs none here.
            x = torch.cat([x, old_x])
            y = torch.cat([y, y.new_zeros(len(old_x)) if old_y is None else old_y])
        return self.model.data_loss(x, y, self._draws)

    def criterion(self) -> Tensor:
        """The mean over new samples and that over replayed ones, weighted."""
        losses: Any = self.mb_output
        n = len(self.mb_y)
        new = losses[:n].mean()
        if len(losses) == n:
            return new
        return self._weight * new + (1 - self._weight) * losses[n:].mean()

    def optimizer_step(self) -> None:
        """Step on the data; after every ``critic_steps`` batches, on the generator's own loss."""
        super().optimizer_step()
        self.steps += 1
        if self.sample_optimizer is not None and self.steps % self.critic_steps == 0:
            self.sample_optimizer.zero_grad()
            self.sample_criterion().backward()
            self.sample_optimizer.step()

    def sample_criterion(self) -> Tensor:
        """What an adversarial generator descends, as many samples as the batch has."""
        n, model = len(self.mb_y), self.model
        # A critic that sees new data alone has forgotten the other classes.
        classes = self._classes if self.labelled and self._weight == 1 else None
        loss = model.sample_loss(n, self._draws, classes).mean()
        if self.alignment and self.previous is not None:
            assert isinstance(model, WGAN)
            before: Any = self.previous.module
            loss = loss + self.alignment * model.alignment_loss(before, n, self._draws).mean()
        return loss
