r"""DGM: dynamic generative memory. One generator under masks remembers, a discriminator classifies.

The discriminator is ``strategy.model``, an ordinary classifier for Avalanche. Its head learns from
the experience and from what the generator makes of earlier classes:

.. math::
    L_D = r\, \mathrm{CE}(C(x), y) + (1 - r)\, \mathrm{CE}(C(x'), y')
          + D(G(z, y)) - D(x) + \gamma\, (\|\nabla D(\hat x)\| - 1)^2 \\
    L_G = -D(G(z, c)) + \mathrm{CE}(C(G(z, c)), c)
          + \lambda\, \frac{N_t}{N_1}
            \frac{\sum_i m_i (1 - M_i)}{\sum_i (1 - M_i)}

with :math:`r` the share of new classes, :math:`x'` samples of old classes :math:`y'`, masks
:math:`m` of the task, their maxima :math:`M` over earlier tasks, and :math:`N` gates. The generator
needs no replay: what earlier tasks use of it does not change.

Reference:
    Ostapenko, Puscas, Klein, Jahnichen, Nabi (2019), Learning to Remember: A Synaptic Plasticity
    Driven Framework for Continual Learning; released code
    ``SAP-samples/machine-learning-dgm``.

Faithfulness:
    1. DGMa is ``MaskedGenerator(masks="units")``, DGMw ``masks="weights"``.
    2. As in the released code, norms and output layers of the generator belong to a task, Adam
       begins anew with each task, and both variants grow. Growth comes when the next task begins,
       so there is none after the last one.
    3. The masks' scale grows with every batch of an experience, from ``1 / s_max`` to ``s_max``.
       The code raises it by epoch, and for DGMw within each epoch as well.
    4. Embeddings start from N(0, 0.01), and a gate is open from 0 on. In the code they start at 0,
       where every gate counts as used. Their gradient does not depend on the scale (see ``gate``).
    5. Old classes are drawn anew for every step, in the same pass as the new data. The code draws
       one set per experience and takes several steps of the classifier for one of the critic.
    6. The generator's class term is on, so that several classes in one experience are told apart;
       the code has it for ImageNet only. Labels stand beside the noise instead of in its place.
    7. The weight of the gradient penalty is 10, as in the papers of Wasserstein GANs; the code has
       1. Gradients are not clipped (code: 10000), which Adam hardly sees.
    8. The last epoch is kept. The code takes the best one on real data of all old classes.

Cost: a step passes the data and as many old samples through the discriminator once, and as many new
ones through the generator twice. Kept for each task: a mask, norms, an output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.training.templates import SupervisedTemplate
from torch import Generator as Draws
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam

from avalanche_ext.functional.generative import gradient_penalty, new_data_weight
from avalanche_ext.models.generators.base import to_symmetric
from avalanche_ext.models.generators.discriminator import Discriminator
from avalanche_ext.models.generators.masked import MaskedGenerator
from avalanche_ext.training.checks import check_count, check_experience, check_nonnegative
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.publishing import publish
from avalanche_ext.training.replay_sources import classes_of

__all__ = ["DGM"]

_SALT = 0x64676D  # keeps its draws apart from those of other users of the seed
_PENALTY = 10.0


class DGM(SupervisedTemplate):
    """Train a discriminator that classifies, and the masked generator that remembers for it.

    Logged after each experience, by hidden layer of the generator: ``DGM_Used_<layer>``, gates that
    the task uses, ``DGM_New_<layer>`` and ``DGM_Reused_<layer>``, which of them no earlier task and
    some earlier task used, and ``DGM_Free_<layer>``, those that nothing uses.

    Args:
        model: The discriminator.
        generator: The generator, of the same shape, range and classes.
        lam: Weight >= 0 of the capacity that a task takes (paper: 0.01 for DGMa, 0.08 for DGMw on
            MNIST).
        lr: Learning rate of both; the generator's own by default (paper: 2e-3 on MNIST).
        restart: Whether the discriminator begins anew with each experience, as in the paper on
            MNIST and SVHN.
        critic_steps: Batches for each step of the generator (paper: 1).
        evaluator: Avalanche's.
        plugins: Avalanche plugins.
        **options: Of Avalanche's ``SupervisedTemplate``: ``train_mb_size``, ``train_epochs``, ...

    Raises:
        TypeError: If the networks are not of these kinds.
        ValueError: For a bad argument; at the beginning of an experience, for a class that came
            before; at its first batch, for data that the generator was not built for; at its end,
            for a loss that is no longer finite.
    """

    model: Discriminator

    def __init__(
        self,
        *,
        model: Discriminator,
        generator: MaskedGenerator,
        lam: float = 0.01,
        lr: float | None = None,
        restart: bool = True,
        critic_steps: int = 1,
        evaluator: Any = None,
        plugins: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        _check_networks(model, generator)
        check_nonnegative("DGM", lam=lam)
        check_count("DGM", critic_steps=critic_steps)
        rate, betas = generator.adam
        rate = rate if lr is None else lr
        self.generator = generator
        self.lam = lam
        self.restart = restart
        self.critic_steps = critic_steps
        self.sample_optimizer = Adam(generator.sample_parameters(), rate, betas, fused=True)
        self.steps = 0  # of this experience
        self._batches = 0  # of this experience, once they are known
        self._old: list[int] = []  # classes of earlier experiences
        self._weight = 1.0
        self._draws: Draws | None = None
        # Of the present step: values of new data, logits and labels of replays.
        self._judged: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(
            model=model,
            optimizer=Adam(model.parameters(), rate, betas, fused=True),
            evaluator=evaluator,
            plugins=plugins,
            **options,
        )

    # an experience --------------------------------------------------------------------------

    def make_optimizer(self, **kwargs: Any) -> None:
        """Nothing: the discriminator's parameters stay the same objects."""

    def _before_training_exp(self, **kwargs: Any) -> None:
        check_experience(self)
        classes = classes_of(self.experience)
        self._old = list(self.generator.seen)
        self.model.learn_classes(classes)
        self.generator.to(self.device).begin_task(classes)
        if self.restart and self._old:
            self.model.restart()
        self.optimizer.state.clear()
        self.sample_optimizer.state.clear()
        self.sample_optimizer.param_groups[0]["params"] = self.generator.sample_parameters()
        number, n_seen = len(self.generator.tasks), len(self.generator.seen)
        self._weight = new_data_weight("class_ratio", number, len(classes), n_seen)
        self._draws = seeded(torch.initial_seed(), _SALT, number)
        self.steps = self._batches = 0
        self.generator.train()
        super()._before_training_exp(**kwargs)

    def _after_training_exp(self, **kwargs: Any) -> None:
        if not bool(torch.isfinite(self.loss).all()):
            raise ValueError(
                f"DGM: the loss is {float(self.loss.detach()):.3g} after {self.steps} updates on "
                f"classes {self.generator.tasks[-1]}: training has diverged. Lower lr."
            )
        for layer, taken in self.generator.end_task().items():
            for name, count in vars(taken).items():
                publish(self, self, f"DGM_{name.capitalize()}_{layer}", float(count))
        self._draws = None
        super()._after_training_exp(**kwargs)

    # one step -------------------------------------------------------------------------------

    def forward(self) -> Tensor:
        """Logits of the batch; in training replays go through the discriminator with it."""
        if not self.is_training:
            return self.model(self.mb_x)
        x, y = self.mb_x, self.mb_y
        if self.steps == 0:
            self.generator.check_data(x)
            self._batches = len(self.dataloader) * self.train_epochs  # pyright: ignore[reportArgumentType]
        # A plugin that changes the loader or the epochs may give more batches.
        self.generator.anneal(min(self.steps + 1, self._batches), self._batches)
        old_y = y[:0]
        if self._old:
            old_x, labels = self.generator.sample(len(x), self._old, self._draws)
            assert labels is not None
            x, old_y = torch.cat([x, old_x]), labels
        value, logits = self.model.judge(to_symmetric(x, self.model.value_range))
        n = len(y)
        self._judged = value[:n], logits[n:], old_y
        return logits[:n]

    def criterion(self) -> Tensor:
        """The classifier's loss, in training on replays too and with the critic's."""
        loss = super().criterion()
        if not self.is_training:
            return loss
        assert self._judged is not None
        value, logits, old_y = self._judged
        self._judged = None
        if len(old_y):
            replay = self._criterion(logits, old_y)
            loss = self._weight * loss + (1 - self._weight) * replay
        return loss + self._critic_loss(value)

    def _critic_loss(self, value: Tensor) -> Tensor:
        """Values of generated samples less those of real ones, and the gradient penalty."""
        real = to_symmetric(self.mb_x, self.model.value_range)
        with torch.no_grad():
            fake = self._generated(self.mb_y)
        share = torch.rand(len(real), generator=self._draws).to(real)
        penalty = gradient_penalty(lambda u: self.model.judge(u)[0], real, fake, share)
        return self.model.judge(fake)[0].mean() - value.mean() + _PENALTY * penalty.mean()

    def _generated(self, y: Tensor) -> Tensor:
        """Samples of classes of this experience, one by itself as one of two: for batch norms."""
        labels = y.repeat(2) if len(y) == 1 else y
        noise = self.generator.noise(len(labels), self._draws)
        return self.generator.make(noise, labels)[: len(y)]

    def optimizer_step(self) -> None:
        """Step of the discriminator; after every ``critic_steps`` batches, of the generator."""
        super().optimizer_step()
        self.steps += 1
        if self.steps % self.critic_steps == 0:
            self.sample_optimizer.zero_grad()
            self._generator_loss().backward()
            self.generator.hold()
            self.sample_optimizer.step()
            self.generator.clamp_embeddings()

    def _generator_loss(self) -> Tensor:
        y = self.generator.labels(len(self.mb_y), self.generator.tasks[-1], self._draws)
        assert y is not None
        value, logits = self.model.judge(self._generated(y))
        loss = F.cross_entropy(logits, y) - value.mean()
        return loss + self.lam * self.generator.sparsity() if self.lam else loss


def _check_networks(model: Any, generator: Any) -> None:
    if not isinstance(model, Discriminator) or not isinstance(generator, MaskedGenerator):
        raise TypeError(
            f"DGM expects model=Discriminator(shape, n_classes=10) and "
            f"generator=MaskedGenerator(shape, n_classes=10); got a {type(model).__name__} and a "
            f"{type(generator).__name__}."
        )
    own, other = ((g.n_classes, g.value_range) for g in (model, generator))
    if own != other:
        raise ValueError(
            f"DGM expects a discriminator and a generator of the same n_classes and value_range; "
            f"got {own} and {other}."
        )
