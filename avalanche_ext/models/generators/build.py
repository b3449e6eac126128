"""Generators by name, sized as in the papers or for a CPU."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from avalanche_ext.models.generators.base import GenerativeModel, ValueRange
from avalanche_ext.models.generators.vae import VAE
from avalanche_ext.models.generators.wgan import WGAN

__all__ = ["GENERATORS", "build_generator"]

# Name: class, whether it takes labels, and its sizes where they are not the papers'.
GENERATORS: dict[str, tuple[type[VAE] | type[WGAN], bool, dict[str, Any]]] = {
    "vae": (VAE, False, {}),
    "cvae": (VAE, True, {}),
    "small_vae": (VAE, False, {"hidden": (256, 256), "latent": 32}),
    "small_cvae": (VAE, True, {"hidden": (256, 256), "latent": 32}),
    "tiny_vae": (VAE, False, {"hidden": (64,), "latent": 8}),
    "tiny_cvae": (VAE, True, {"hidden": (64,), "latent": 8}),
    "wgan": (WGAN, False, {}),
    "ac_wgan": (WGAN, True, {}),
    "small_wgan": (WGAN, False, {"network": "mlp", "widths": (256, 256), "latent": 64}),
    "small_ac_wgan": (WGAN, True, {"network": "mlp", "widths": (256, 256), "latent": 64}),
    "tiny_ac_wgan": (WGAN, True, {"widths": (32, 16), "latent": 16}),
}


def build_generator(
    name: str,
    in_shape: Sequence[int],
    n_classes: int,
    *,
    value_range: ValueRange = (0.0, 1.0),
    widths: Sequence[int] | None = None,
) -> GenerativeModel:
    """The generator of that name.

    Args:
        name: ``"vae"``: van de Ven & Tolias's for Split MNIST; ``"wgan"``: the networks of Memory
            Replay GANs; ``"cvae"`` and ``"ac_wgan"``: the same, conditional on the class;
            ``"small_..."``: for 28 x 28 and a CPU; ``"tiny_..."``: for 8 x 8.
        in_shape: Shape of one sample.
        n_classes: Classes of a conditional generator; others leave it out of account.
        value_range: Lowest and highest value of the data; ``None`` for data without bounds.
        widths: Hidden widths instead of those of the name.

    Raises:
        ValueError: For an unknown name (near matches are listed), or a size that the generator
            cannot make.
    """
    if name not in GENERATORS:
        near = difflib.get_close_matches(name, GENERATORS, 3, 0.4)
        raise ValueError(
            f"there is no generator {name!r}; did you mean {near or 'one of these'}? There are: "
            f"{', '.join(GENERATORS)}."
        )
    cls, conditional, sizes = GENERATORS[name]
    if widths is not None:
        sizes = {**sizes, "hidden" if cls is VAE else "widths": tuple(widths)}
    return cls(
        in_shape, n_classes=n_classes if conditional else 0, value_range=value_range, **sizes
    )
