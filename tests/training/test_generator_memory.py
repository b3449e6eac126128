"""A generator of features learns them: at their own scale, with their own labels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from avalanche_ext.models.generators.vae import VAE
from avalanche_ext.training.generator_memory import GeneratorMemory
from avalanche_ext.training.supervised.generator_training import GeneratorTraining

CENTRES = 50 * torch.tensor([[1.0, 0.0, 2.0, 1.0], [3.0, 4.0, 0.0, 1.0]])


def features(labels, n, seed=0):
    """Of two far classes, at a scale that is not the networks'."""
    y = torch.tensor(labels).repeat_interleave(n)
    g = torch.Generator().manual_seed(seed)
    return (CENTRES[y] + 5 * torch.randn(len(y), 4, generator=g)).relu(), y


def learnt(dtype=torch.float32, steps=300):
    torch.manual_seed(0)
    model = VAE((4,), hidden=(32,), latent=2, n_classes=2, value_range=None)
    memory = GeneratorMemory(GeneratorTraining(model=model, lr=1e-2))
    experience = SimpleNamespace(classes_in_this_experience=[0, 1])
    memory.begin(experience, 4, 2, torch.device("cpu"))
    u, y = features([0, 1], 200)
    for k in range(steps):
        rows = torch.randperm(len(u), generator=torch.Generator().manual_seed(k))[:64]
        memory.step(u[rows], y[rows], None)
    memory.write(u.to(dtype), y)
    memory.begin(experience, 4, 2, torch.device("cpu"))
    return memory


def test_samples_of_each_class_are_where_its_features_are():
    u, y = learnt().sample(600, torch.Generator().manual_seed(1))
    for label, centre in enumerate(CENTRES):
        found = u[y == label].mean(0)
        torch.testing.assert_close(found, centre, atol=12.0, rtol=0)
    untrained, y = learnt(steps=1).sample(600, torch.Generator().manual_seed(1))
    assert (untrained[y == 1].mean(0) - CENTRES[1]).abs().max() > 50


def test_features_that_may_be_negative_are_made_negative():
    memory = learnt()
    assert memory.nonnegative
    assert memory.sample(600)[0].min() >= 0
    memory.nonnegative = False
    assert memory.sample(600)[0].min() < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_features_type(dtype):
    assert learnt(dtype, steps=2).sample(3)[0].dtype == dtype
