"""The same numbers on a CUDA device: run with ``pytest -m gpu``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from avalanche.training.determinism.rng_manager import RNGManager

from avalanche_ext.catalog import CATALOG
from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.functional.drl import FORMS, drl_loss
from avalanche_ext.recipes import find_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def trained(key, device, **changes):
    recipe = dataclasses.replace(find_recipe(f"{key}/split_digits").smoke(), **changes)
    benchmark = recipe.benchmark.build(0)
    RNGManager.set_random_seeds(3)
    strategy = build_strategy(recipe, device=device)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
    return torch.cat([p.detach().flatten().cpu() for p in strategy.model.parameters()])


@pytest.mark.parametrize("key", CATALOG)
def test_weights_are_those_of_the_cpu(key):
    torch.testing.assert_close(trained(key, "cuda"), trained(key, "cpu"), rtol=0, atol=2e-3)


@pytest.mark.parametrize("key", [k for k, card in CATALOG.items() if card.ours])
def test_one_seed_gives_one_result(key):
    assert torch.equal(trained(key, "cuda"), trained(key, "cuda"))


@pytest.mark.parametrize("method", ["gram", "class_sums"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_drl_loss_and_gradient_are_those_of_float64(method, form, dtype):
    torch.manual_seed(0)
    h = torch.rand(96, 3000, device="cuda").to(dtype).requires_grad_()
    y = torch.randint(0, 7, (96,), device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = drl_loss(h, y, form=form, method=method)
    loss.backward()
    exact = h.detach().double().cpu().requires_grad_()
    oracle = drl_loss(exact, y.cpu(), form=form, method="gram")
    oracle.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double().cpu(), oracle, rtol=1e-5, atol=1e-5)
    scale = exact.grad.abs().max()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        h.grad.double().cpu() / scale, exact.grad / scale, rtol=0, atol=tolerance
    )
