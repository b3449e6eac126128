"""What a run says about its generator: strips, numbers, and that training does not notice."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from avalanche_ext.benchmarks import split_digits
from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.experiments.generation import GenerationWatch, generator_of
from avalanche_ext.experiments.run import run_seed
from avalanche_ext.models.generators.base import GenerativeModel
from avalanche_ext.models.generators.vae import VAE
from avalanche_ext.recipes import find_recipe

EMPTY = 48


class Board:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.images = {}

    def add_image(self, tag, image, step):
        self.images[tag, step] = image


class Copies(GenerativeModel):
    """Makes test images of the class that is asked for; of the next class if it is ``wrong``."""

    def __init__(self, benchmark, *, wrong=False):
        super().__init__((1, 8, 8), 1, 10, (0.0, 1.0))
        self.scale = nn.Parameter(torch.ones(1))
        data = [e.dataset.eval() for e in benchmark.test_stream]
        self.x = torch.stack([x for d in data for x, *_ in d])
        self.y = torch.tensor([y for d in data for _, y, *_ in d])
        self.wrong = wrong

    def decode(self, z, y=None):
        place = torch.special.ndtr(z[:, 0])  # uniform
        rows = []
        for u, c in zip(place, y.tolist(), strict=True):
            mine = (self.y == ((c + 1) % 10 if self.wrong else c)).nonzero()[:, 0]
            rows.append(mine[int(u * len(mine))])
        return self.x[torch.stack(rows)] * self.scale


@pytest.fixture(scope="module")
def benchmark():
    return split_digits()


def watched(benchmark, generator, folder, seen=range(10)):
    generator.learn_classes(list(seen))
    strategy = SimpleNamespace(generator=generator, plugins=[], device=torch.device("cpu"))
    return GenerationWatch(strategy, benchmark, 10, folder, Board())


def strip(folder, name):
    return np.asarray(Image.open(folder / "samples" / f"{name}.png"))


def test_a_generator_of_real_images_is_as_good_as_real_images(benchmark, tmp_path):
    watch = watched(benchmark, Copies(benchmark), tmp_path)
    [found] = watch.after_experience(4)
    assert found["judge_accuracy"] > 0.95
    assert found["generator_accuracy"] == pytest.approx(found["judge_accuracy"], abs=0.02)
    assert found["generator_precision"] == 1
    assert found["generator_recall"] > 0.9
    assert found["reverse_accuracy"] > 0.95
    assert found["generator_label_kl"] < 0.01
    [wrong] = watched(benchmark, Copies(benchmark, wrong=True), tmp_path).after_experience(4)
    assert wrong["generator_accuracy"] < 0.05
    assert wrong["reverse_accuracy"] < 0.05
    # The same images under other names.
    assert wrong["generator_distance"] == pytest.approx(found["generator_distance"], abs=2)


def test_only_what_was_learnt_is_shown_and_the_rest_is_left_free(benchmark, tmp_path):
    watch = watched(benchmark, Copies(benchmark), tmp_path, seen=[0, 1, 2, 3])
    [found] = watch.after_experience(1)
    assert "reverse_accuracy" not in found  # there is more to come
    picture, real = strip(tmp_path, "exp_1"), strip(tmp_path, "real")
    assert picture.shape == real.shape == (8, 20 * 8 + 19 * 2)  # two of each class, a gap between
    assert (picture[:, 8 * 10 - 2 :] == EMPTY).all()
    board = watch.writer.images["samples/generated", 1]
    assert np.array_equal(board[0].numpy(), picture)
    # A place's noise is its own and the same each time.
    watch.strategy.generator.learn_classes([4, 5])
    watch.after_experience(2)
    later = strip(tmp_path, "exp_2")
    assert np.array_equal(later[:, : 8 * 10 - 2], picture[:, : 8 * 10 - 2])
    assert not (later[:, 8 * 10 : 12 * 10 - 2] == EMPTY).any(0).all()


def test_a_generator_without_labels_fills_the_strip(benchmark, tmp_path):
    torch.manual_seed(0)
    watch = watched(benchmark, VAE((1, 8, 8), hidden=(8,), latent=2), tmp_path)
    [found] = watch.after_experience(4)
    assert found["generator_accuracy"] is None
    assert "reverse_accuracy" not in found
    tiles = strip(tmp_path, "exp_4")[:, :-8].reshape(8, 19, 10)[:, :, :8]
    assert (tiles != EMPTY).any((0, 2)).all()


def test_random_numbers_and_modes_are_left_alone(benchmark, tmp_path):
    generator = VAE((1, 8, 8), hidden=(8,), latent=2).train()
    before = torch.get_rng_state()
    watched(benchmark, generator, tmp_path).after_experience(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert generator.training


def test_a_strategy_without_generator_is_left_alone(benchmark, tmp_path):
    strategy = build_strategy(find_recipe("er/split_digits").smoke())
    assert generator_of(strategy) is None
    watch = GenerationWatch(strategy, benchmark, 10, tmp_path, Board())
    assert watch.after_experience(0) == []
    assert watch.summary([]) == {}
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("name", ["dgm_a/split_digits", "mergan_ra/split_digits"])
def test_a_run_keeps_what_its_generator_made(name, tmp_path):
    recipe = find_recipe(name).smoke()
    result = run_seed(recipe, 0, tmp_path)
    found = result["generation_per_experience"]
    assert len(found) == 5
    assert result["reverse_accuracy"] == found[-1]["reverse_accuracy"]
    assert result["generator_accuracy"] == found[-1]["generator_accuracy"]
    assert result["judge_accuracy"] == found[0]["judge_accuracy"]
    assert ("critic_accuracy" in result) == name.startswith("mergan")
    strips = [strip(tmp_path, f"exp_{k}") for k in range(5)]
    assert all(s.shape == (8, 198) for s in strips)
    if name.startswith("dgm"):  # which forgets nothing
        for k, one in enumerate(strips):
            known = 4 * (k + 1) * 10 - 2
            assert np.array_equal(one[:, :known], strips[-1][:, :known])
        capacity = result["capacity"]
        assert len(capacity) == 5
        assert all(c["used"] == c["new"] + c["reused"] for e in capacity for c in e.values())
        assert all(c["reused"] == 0 for c in capacity[0].values())
    else:
        assert "capacity" not in result


def test_numbers_do_not_depend_on_whether_a_run_was_watched(tmp_path, monkeypatch):
    recipe = dataclasses.replace(find_recipe("mergan_jtr/split_digits").smoke(), epochs=2)
    plain = run_seed(recipe, 0, tmp_path / "watched")
    monkeypatch.setattr(GenerationWatch, "after_experience", lambda self, k: [])
    alone = run_seed(recipe, 0, tmp_path / "alone")
    assert plain["accuracy_matrix"] == alone["accuracy_matrix"]
    assert "generator_accuracy" not in alone


def test_a_run_of_ten_classes_has_the_figures_after_five(tmp_path):
    recipe = find_recipe("dgm_a/split_digits").smoke()
    benchmark = dataclasses.replace(recipe.benchmark, n_experiences=10)
    result = run_seed(dataclasses.replace(recipe, benchmark=benchmark), 0, tmp_path)
    row = result["accuracy_matrix"][4]
    assert result["average_accuracy_after_5"] == pytest.approx(sum(row[:5]) / 5)
    found = result["generation_per_experience"]
    assert result["generator_accuracy_after_5"] == found[4]["generator_accuracy"]
    assert result["generator_accuracy"] == found[9]["generator_accuracy"]
