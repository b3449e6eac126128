"""A memory of features that is a generator: it learns beside the classifier, on its features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avalanche_ext.models.generators.build import GENERATORS, build_generator
from avalanche_ext.training.checks import check_one_of
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.replay_sources import classes_of
from avalanche_ext.training.supervised.generator_training import GeneratorTraining

__all__ = ["GeneratorMemory"]

_SALT = 0x666561  # keeps its draws apart from those of other users of the seed


class GeneratorMemory:
    """Features that a conditional generator makes, divided by their spread for its networks.

    Unlike a density for each class it is trained on in every experience, and remembers by replaying
    itself. A step of it follows every step of the classifier, on the same features.

    Args:
        generator: A conditional name of ``build_generator``, sized for features and built at the
            first batch, or a ``GeneratorTraining`` of a conditional model for samples ``(D,)``,
            built with ``value_range=None``.

    Attributes:
        opened: Whether an experience has begun and not ended.

    Raises:
        ValueError: For a generator without labels or with bounds on its values.
    """

    def __init__(self, generator: str | GeneratorTraining) -> None:
        if isinstance(generator, str):
            names = tuple(n for n, (_, conditional, _) in GENERATORS.items() if conditional)
            check_one_of("GeneratorMemory", "generator", generator, names)
        elif not generator.labelled or generator.model.value_range is not None:
            raise ValueError(
                f"GeneratorMemory expects a generator of features that can be asked for classes; "
                f"got n_classes={generator.model.n_classes} and "
                f"value_range={generator.model.value_range}. Build the model with n_classes, and "
                f"with value_range=None: features have no bounds."
            )
        self.generator = generator
        self.scale: Tensor | None = None
        self.dtype = torch.float32  # of the network's features
        self.nonnegative = True
        self.opened = False

    @property
    def training(self) -> GeneratorTraining:
        """The generator's training; there is none before the first batch."""
        assert isinstance(self.generator, GeneratorTraining), "the first batch builds the generator"
        return self.generator

    @property
    def classes(self) -> list[int]:
        """Classes that it has learnt."""
        built = isinstance(self.generator, GeneratorTraining)
        return list(self.training.model.seen) if built else []

    @property
    def nbytes(self) -> int:
        """Bytes of its networks."""
        if not isinstance(self.generator, GeneratorTraining):
            return 0
        model = self.training.model
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    def begin(self, experience: Any, width: int, n_classes: int, device: torch.device) -> None:
        """An experience begins: until it ends, draws come from what was known before it.

        Args:
            experience: Its classes are learnt.
            width: Numbers per sample.
            n_classes: Outputs of the network.
            device: Where the generator is trained.
        """
        if isinstance(self.generator, str):
            # The first weights are a function of the seed, not of the global random state.
            with torch.random.fork_rng(devices=[]):
                start = seeded(torch.initial_seed(), _SALT).initial_seed()
                torch.default_generator.manual_seed(start)
                model = build_generator(self.generator, (width,), n_classes, value_range=None)
            self.generator = GeneratorTraining(model=model, r="class_ratio")
        model = self.training.model
        outside = [c for c in classes_of(experience) if c >= model.n_classes]
        if outside:
            raise ValueError(
                f"the generator of features was built at the first batch for the "
                f"{model.n_classes} classes that the network had outputs for, and has no label "
                f"for {outside}. Use a head with an output for every class of the stream, or pass "
                f"a generator of your own: GeneratorTraining(model=VAE(({width},), n_classes=..., "
                f"value_range=None), r='class_ratio')."
            )
        self.training.begin(experience, device)
        self.opened = True

    def step(self, u: Tensor, y: Tensor, replay: tuple[Tensor, Tensor] | None) -> None:
        """One update on features ``(N, D)``, and on what the classifier was given beside them."""
        if self.scale is None:
            spread = u.std()
            self.scale = torch.where(spread > 0, spread, torch.ones_like(spread))
        old = None if replay is None else (replay[0] / self.scale, replay[1])
        self.training.step(u / self.scale, y, old)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """See ``LatentMemory``."""
        draws = generator if generator is not None else torch.default_generator
        u, y = self.training.replay(n, draws)
        assert y is not None
        assert self.scale is not None
        u = (u * self.scale).to(self.dtype)
        return u.clamp_min(0) if self.nonnegative else u, y

    def write(self, u: Tensor, y: Tensor, generator: torch.Generator | None = None) -> None:
        """The experience has ended; it has been learnt already."""
        self.nonnegative = self.nonnegative and bool((u >= 0).all())
        self.dtype = u.dtype
        self.training.finish()
        self.opened = False
