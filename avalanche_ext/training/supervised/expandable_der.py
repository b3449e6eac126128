r"""ExpandableDER: dynamically expandable representation, a class-incremental system in two stages.

Not Dark Experience Replay, which is Avalanche's ``DER``.

Reference:
    S. Yan, J. Xie, X. He (2021), DER: Dynamically Expandable Representation for Class Incremental
    Learning, CVPR.

Stage 1 learns a new extractor beside the frozen ones, on the experience and the memory shuffled
together:

.. math:: L = L_{H} + \lambda_a L_{H^a}

with the cross-entropy of the classifier over all classes seen and that of the auxiliary head over
the new ones and "old". Stage 2 freezes all extractors, draws the classifier anew and trains it on
as many samples of every class, with temperature: cross-entropy of :math:`z / T`. Then the memory is
brought up to date by herding.

Faithfulness:
    1. Schedule, augmentation, stage 2 and the missing bias of the classifier are those of the
       authors' released code; paper and code differ in one point, the old block of the classifier:
       inherited (paper, ``inherit=True``) or, in effect, not (their code draws the heads anew when
       warm-up ends: ``reset_heads=True``). The default is the code's.
    2. Milestones count from the end of warm-up, as there.
    3. The first experience has neither auxiliary loss nor stage 2.
    4. Without ``prune`` every extractor keeps its full width, the rows "w/o P" of the paper's
       tables. The masks' released code does not exist; what the paper leaves open (weight of the
       sparsity loss, largest scale, learning rate of the gates, residual stages) was decided as
       ``ChannelMasks`` says. The next extractor starts from the weights before the surgery.
    5. Masks grow hard within every epoch, so running statistics mix soft and hard masks; they are
       measured again once the masks are hard, on one pass over the experience and the memory.
    6. Pruning and stage 2 come before Avalanche's ``after_training_exp``, so what is evaluated is
       their result. Plugins see stage 1 only.

Cost: one more extractor per experience, in memory and in every forward pass; the frozen ones run
without gradients, pruned and folded, and with ``lookahead`` on several batches at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_ext.models.expandable_net import ChannelMasks, ExpandableNet
from avalanche_ext.models.pruning import recalibrate_batch_norms
from avalanche_ext.training.checks import check_count, check_nonnegative
from avalanche_ext.training.loading.flat_data import attribute_values
from avalanche_ext.training.loading.lookahead import LookAhead
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.loading.sources import source_for
from avalanche_ext.training.plugins.shuffle_replay import ShuffleReplayPlugin
from avalanche_ext.training.publishing import publish
from avalanche_ext.training.schedule import Schedule, set_rate
from avalanche_ext.training.storage_policy.herding import HerdingMemory

__all__ = ["ClassifierStage", "ExpandableDER"]


_STAGE_TWO = Schedule(0.1, 0, (15,))


@dataclass(frozen=True)
class ClassifierStage:
    """Stage 2.

    Args:
        epochs: Passes over the balanced samples; 0 leaves stage 2 out.
        schedule: Its learning rate.
        temperature: Logits are divided by it in the loss, not at inference; > 0.

    Raises:
        ValueError: For a number out of range.
    """

    epochs: int = 30
    schedule: Schedule = _STAGE_TWO
    temperature: float = 5.0

    def __post_init__(self) -> None:
        check_nonnegative("ClassifierStage", epochs=self.epochs, temperature=self.temperature)
        if self.temperature == 0:
            raise ValueError("ClassifierStage expects temperature > 0; got 0.")


class ExpandableDER(SupervisedTemplate):
    """Grow one extractor per experience and retrain the classifier on balanced samples.

    Args:
        backbone: The first extractor; ``build_backbone(name, 0, in_shape)`` gives one.
        mem: Exemplars in all (paper: 2000), 0 for none, or ``None``.
        mem_per_class: Or exemplars of each class (paper: 20, where the first half comes at once).
        auxiliary: Weight of the auxiliary loss (paper's code: 1).
        prune: Channel masks and their removal; ``None`` keeps every channel.
        schedule: Learning rate of stage 1.
        first_schedule: The same for the first experience; ``schedule`` by default.
        classifier_stage: Stage 2.
        momentum: Of both stages' SGD.
        weight_decay: Of both.
        inherit: Whether the classifier keeps its weights when it grows.
        reset_heads: Whether both heads are drawn anew when the warm-up ends.
        n_outputs: Least width of the output.
        lookahead: Batches that the frozen extractors see at once. Same numbers up to rounding;
            1 is the plain order. A batch that a plugin alters is worked out anew.
        plugins: Avalanche plugins, before which the memory's own is put.
        **options: Of Avalanche's ``SupervisedTemplate``.

    Raises:
        TypeError: For settings of another kind.
        ValueError: For a bad argument; for a backbone whose channels cannot be followed, with
            ``prune``; for an experience without a new class; for a memory that
            holds less than one sample of each class.
    """

    model: ExpandableNet

    def __init__(
        self,
        *,
        backbone: nn.Module,
        mem: int | None = 2000,
        mem_per_class: int | None = None,
        auxiliary: float = 1.0,
        prune: ChannelMasks | None = None,
        schedule: Schedule | None = None,
        first_schedule: Schedule | None = None,
        classifier_stage: ClassifierStage | None = None,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        inherit: bool = True,
        reset_heads: bool = True,
        n_outputs: int = 0,
        lookahead: int = 1,
        plugins: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        check_nonnegative(
            "ExpandableDER", auxiliary=auxiliary, momentum=momentum, weight_decay=weight_decay
        )
        check_count("ExpandableDER", lookahead=lookahead)
        for name, value, kind in (
            ("prune", prune, ChannelMasks), ("schedule", schedule, Schedule),
            ("first_schedule", first_schedule, Schedule),
            ("classifier_stage", classifier_stage, ClassifierStage),
        ):  # fmt: skip
            if not isinstance(value, kind | None):
                raise TypeError(
                    f"ExpandableDER expects {name} to be a {kind.__name__} or None; got {value!r}."
                )
        self.auxiliary = auxiliary
        self.prune = prune
        self.lookahead = lookahead
        self.schedule = schedule or Schedule()
        self.first_schedule = first_schedule or self.schedule
        self.classifier_stage = classifier_stage or ClassifierStage()
        self.momentum, self.weight_decay = momentum, weight_decay
        self.reset_heads = reset_heads
        self.memory = HerdingMemory(mem, mem_per_class=mem_per_class)
        # Of each extractor, by channel group, with ``prune``.
        self.channels_kept: list[dict[str, float]] = []
        self._features: Tensor | None = None
        self._ahead: deque[Tensor] = deque()  # frozen features of the batches to come
        self._as_drawn = False
        self._stages = 0  # how often stage 2 has been run: part of its seed
        # Avalanche wants an optimizer before there is anything to train.
        optimizer = torch.optim.SGD(
            [nn.Parameter(torch.zeros(1))], self.schedule.lr, momentum, weight_decay=weight_decay
        )
        super().__init__(
            model=ExpandableNet(backbone, n_outputs=n_outputs, inherit=inherit, masks=prune),
            optimizer=optimizer,
            plugins=[ShuffleReplayPlugin(storage_policy=self.memory), *(plugins or ())],
            **options,
        )

    # stage 1 --------------------------------------------------------------------------------

    def make_optimizer(self, **kwargs: Any) -> None:
        """Begin anew with what is trained in this experience, and nothing frozen.

        The masks' embeddings have a learning rate of their own and no weight decay, which would
        draw them to where a channel is neither open nor closed.
        """
        live = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        gates = () if self.model.gates is None else self.model.gates.embeddings
        own = {id(p) for p in gates}
        weights = [p for p in live.values() if id(p) not in own]
        self.optimizer.state.clear()
        self.optimizer.param_groups.clear()
        self.optimizer.add_param_group({"params": weights or [nn.Parameter(torch.zeros(1))]})
        if self.prune is not None and own:
            factor = self.prune.lr_factor
            self.optimizer.add_param_group({
                "params": list(gates), "weight_decay": 0.0,
                "lr_factor": self.prune.s_max if factor is None else factor,
            })  # fmt: skip
        self.optimized_param_id = live

    def _before_training_epoch(self, **kwargs: Any) -> None:
        epoch = self.clock.train_exp_epochs
        schedule = self.schedule if len(self.model.extractors) > 1 else self.first_schedule
        set_rate(self.optimizer, schedule.at(epoch))
        if self.reset_heads and epoch == schedule.warmup_epochs > 0:
            self.model.reset_heads()
        super()._before_training_epoch(**kwargs)
        self._ahead.clear()
        if self.lookahead > 1 and len(self.model.extractors) > 1:
            # Behind the plugins, which know the loader that they have put in place.
            self.dataloader = LookAhead(self.dataloader, self.lookahead, self.device)

    def _after_training_epoch(self, **kwargs: Any) -> None:
        if isinstance(self.dataloader, LookAhead):
            self.dataloader = self.dataloader.loader
        super()._after_training_epoch(**kwargs)

    def _before_forward(self, **kwargs: Any) -> None:
        super()._before_forward(**kwargs)
        # Asked here: what comes after the plugins may change the layout, but not the values.
        loader = self.dataloader
        self._as_drawn = isinstance(loader, LookAhead) and loader.gave(self.mb_x)

    def forward(self) -> Tensor:
        """Logits over all labels; in training the features are kept for the auxiliary head."""
        if not self.is_training:
            return self.model(self.mb_x)
        if self.model.gates is not None:
            loader: Any = self.dataloader
            self.model.gates.anneal(self.clock.train_epoch_iterations + 1, len(loader))
        self._features = self.model.super_feature(self.mb_x, self._frozen_features())
        return self.model.logits(self._features)

    def _frozen_features(self) -> Tensor | None:
        """Those of this batch, from a pass over all batches that have been fetched."""
        if not isinstance(self.dataloader, LookAhead):
            return None
        if not self._ahead:
            upcoming = list(self.dataloader.upcoming)
            features = self.model.old_features(torch.cat(upcoming))
            assert features is not None
            self._ahead.extend(features.split([len(x) for x in upcoming]))
        ready = self._ahead.popleft()
        return ready if self._as_drawn else None

    def criterion(self) -> Tensor:
        """The classifier's loss, in training with the auxiliary one and the sparsity loss."""
        loss = super().criterion()
        features, self._features = self._features, None
        if not self.is_training:
            return loss
        if len(self.model.extractors) > 1 and self.auxiliary:
            assert features is not None
            z = self.model.auxiliary_logits(features)
            labels = self.model.auxiliary_labels(self.mb_y)
            loss = loss + self.auxiliary * F.cross_entropy(z, labels)
        if self.prune is not None and self.model.gates is not None:
            loss = loss + self.prune.lam * self.model.gates.sparsity_loss()
        return loss

    def _after_update(self, **kwargs: Any) -> None:
        if self.model.gates is not None:
            self.model.gates.clamp_embeddings()
        super()._after_update(**kwargs)

    # stage 2 --------------------------------------------------------------------------------

    def _after_training_exp(self, **kwargs: Any) -> None:
        masked = self.model.gates is not None
        shares = self.model.settle()
        if self.prune is not None and masked:
            self.channels_kept.append(shares)
            for name, share in shares.items():
                publish(self, self, f"ChannelsKept_{name}", share)
            if self.prune.recalibrate:
                recalibrate_batch_norms(self.model.extractors[-1], self._inputs())
        if len(self.model.extractors) > 1 and self.classifier_stage.epochs:
            self._train_classifier()
        super()._after_training_exp(**kwargs)

    def _inputs(self) -> Iterator[Tensor]:
        """One more pass over the experience and the memory, as in training."""
        for batch in self.dataloader:
            if len(batch[0]) > 1:  # of one sample there is no variance
                yield batch[0].to(self.device)

    def _train_classifier(self) -> None:
        stage, model, head = self.classifier_stage, self.model, self.model.classifier
        assert head is not None
        model.eval()
        head.reset_parameters()
        optimizer = torch.optim.SGD(
            head.parameters(), stage.schedule.lr, self.momentum, weight_decay=self.weight_decay
        )
        self._stages += 1
        draws = seeded(torch.initial_seed(), self._stages)
        samples = self._balanced(draws)
        for epoch in range(stage.epochs):
            set_rate(optimizer, stage.schedule.at(epoch))
            for batch in samples.order(draws).split(self.train_mb_size):
                x, y = (part.to(self.device) for part in samples.gather(batch, draws))
                with torch.no_grad():
                    features = model.super_feature(x)
                optimizer.zero_grad()
                z = model.logits(features)[:, model.classes] / stage.temperature
                F.cross_entropy(z, _positions(y, model.classes)).backward()
                optimizer.step()
        model.train()

    def _balanced(self, draws: torch.Generator) -> _Balanced:
        """As many samples of each class, from the experience and the memory; drawn once."""
        assert self.experience is not None
        dataset = self.experience.dataset.train()
        labels = attribute_values(dataset, "targets")
        assert labels is not None
        slots = self.memory.index().slots
        stored = self.memory.labels(slots)[0].cpu() if len(slots) else labels[:0]
        place = torch.cat([torch.arange(len(labels)), slots.cpu()])
        old = torch.cat([torch.zeros_like(labels), torch.ones_like(stored)]).bool()
        y = torch.cat([labels, stored])
        counts = [int((y == c).sum()) for c in self.model.classes]
        n = min(count for count in counts if count)
        chosen = []
        for c in self.model.classes:
            mine = torch.nonzero(y == c)[:, 0]
            chosen.append(mine[torch.randperm(len(mine), generator=draws)[:n]])
        picked = torch.cat(chosen)
        return _Balanced(source_for(self, dataset), self.memory, place[picked], old[picked])


@dataclass
class _Balanced:
    """Samples of the experience and of the memory under common numbers."""

    source: Any
    memory: HerdingMemory
    place: Tensor
    old: Tensor

    def order(self, draws: torch.Generator) -> Tensor:
        return torch.randperm(len(self.place), generator=draws)

    def gather(self, batch: Tensor, draws: torch.Generator) -> list[Tensor]:
        """Images and labels of a batch, with the training transforms."""
        old, place = self.old[batch], self.place[batch]
        parts = [
            part.gather(place[mine], draws)[:2]
            for part, mine in ((self.source, ~old), (self.memory, old))
            if bool(mine.any())
        ]
        return [torch.cat(columns) for columns in zip(*parts, strict=True)]


def _positions(y: Tensor, classes: Sequence[int]) -> Tensor:
    table = torch.zeros(max(classes) + 1, dtype=torch.int64, device=y.device)
    table[torch.tensor(classes, device=y.device)] = torch.arange(len(classes), device=y.device)
    return table[y]
