"""Recipes are complete, named after what they run, and changed only on purpose."""

from __future__ import annotations

import dataclasses

import pytest

from avalanche_ext.catalog import CATALOG, find_card
from avalanche_ext.recipes import RECIPES, find_recipe, with_settings
from avalanche_ext.recipes.generative import DGMRecipe, GenerativeRecipe
from avalanche_ext.recipes.latent import AlignmentRecipe, LatentRecipe
from avalanche_ext.recipes.online import OnlineRecipe
from avalanche_ext.recipes.selfless import ImportanceRecipe, SelflessRecipe
from avalanche_ext.recipes.settings import to_json
from avalanche_ext.recipes.streams import CORe50Track, SplitDigits


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_named_after_its_method_and_its_baselines_exist(name):
    recipe = RECIPES[name]
    assert recipe.name == name
    assert name.split("/")[0] == recipe.method
    assert recipe.method in CATALOG
    assert all(b in RECIPES and b != name for b in recipe.baselines)


@pytest.mark.parametrize("key", CATALOG)
def test_every_method_runs_offline(key):
    assert isinstance(RECIPES[f"{key}/split_digits"].benchmark, SplitDigits)
    assert find_card(key).recipes


def settings_of(recipe):
    """As JSON, with the weight of new data that ``None`` stands for."""
    settings = to_json(recipe)
    if isinstance(recipe, LatentRecipe):
        rule = "share" if recipe.method == "latent_replay" else "class_ratio"
        settings["r"] = settings["r"] or rule
    return settings


def test_rows_of_one_table_share_their_protocol():
    free = {"name", "method", "baselines", "mode", "published"}
    for recipe in RECIPES.values():
        if isinstance(recipe.benchmark, CORe50Track):
            continue  # the paper's tables change several settings from row to row
        for rival in map(find_recipe, recipe.baselines):
            ours, theirs = settings_of(recipe), settings_of(rival)
            if type(recipe) is not type(rival):  # what both have is the protocol
                # lam is each method's own weight; DGM has no solver beside its own networks.
                own = {"title", "source", "lam"}
                own |= {"epochs", "lr"} if DGMRecipe in (type(recipe), type(rival)) else set()
                common = ours.keys() & theirs.keys() - own
                ours, theirs = ({k: v[k] for k in common} for v in (ours, theirs))
            else:
                free_here = {"auxiliary", "prune", "title"} if "auxiliary" in ours else set()
                if isinstance(recipe, SelflessRecipe):  # units that compete are another network
                    free_here = {"lam", "anchor_lam", "backbone"}
                elif isinstance(recipe, GenerativeRecipe):
                    own = {"replay", "labels", "title", "alignment", "critic_steps"}
                    free_here = {k for k in ours if k.startswith("generator")} | own
                elif isinstance(recipe, DGMRecipe):
                    free_here = {"lam", "s_max", "widths"}
                    free_here |= {"epochs"} if "svhn" in recipe.name else set()
                elif isinstance(recipe, LatentRecipe):
                    free_here = {"encoder", "memory", "title", "stored", "stored_bytes", "head"}
                    free_here |= {"drift"}
                elif isinstance(recipe, AlignmentRecipe):
                    free_here = {"bridge", "compose", "title"}
                elif isinstance(recipe, OnlineRecipe):
                    free_here = {"eps", "eps_on", "n_inputs", "steps", "title"}
                elif isinstance(recipe, ImportanceRecipe):
                    free_here = {"lam"}
                ours = {k: v for k, v in ours.items() if k not in free_here}
                theirs = {k: v for k, v in theirs.items() if k not in free_here}
            assert {k: v for k, v in ours.items() if k not in free} == {
                k: v for k, v in theirs.items() if k not in free
            }


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("1e-4", "lam", 1e-4),
        ("1", "lam", 1.0),
        ("balanced", "mode", "balanced"),
        ("[64, 32]", "hidden", (64, 32)),
        ("3", "max_groups", 3),
        ("null", "max_groups", None),
        ("None", "max_groups", None),
        ("[4]", "seeds", (4,)),
    ],
)
def test_settings_are_read_as_the_fields_type(text, field, value):
    changed = with_settings(find_recipe("drl_ber/split_digits"), {field: text})
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)


def test_settings_of_the_benchmark_are_reached_by_a_dot():
    changed = with_settings(find_recipe("er/split_digits"), {"benchmark.validation": "true"})
    assert changed.benchmark.validation is True
    assert find_recipe("er/split_digits").benchmark.validation is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lamb": "1"}, r"no field 'lamb'. Close: lam"),
        ({"benchmark.n_experience": "2"}, r"Close: n_experiences"),
        ({"lam": "much"}, r"'lam' expects float; got 'much'"),
        ({"epochs": "1.5"}, r"'epochs' expects int"),
        ({"epochs": "true"}, r"'epochs' expects int"),
        ({"hidden": "100"}, r"'hidden' expects tuple\[int, ...\]"),
    ],
)
def test_a_wrong_setting_names_what_was_expected(settings, message):
    with pytest.raises(ValueError, match=message):
        with_settings(find_recipe("drl_ber/split_digits"), settings)


def test_unknown_names_list_near_matches():
    with pytest.raises(ValueError, match=r"Close: .*drl_ber/split_digits"):
        find_recipe("drl_ber/split_digit")
    with pytest.raises(ValueError, match=r"Close: .*shuffle_replay"):
        find_card("shuffle")


def test_recipes_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        find_recipe("er/split_digits").lr = 1.0


@pytest.mark.parametrize("key", CATALOG)
def test_a_card_tells_what_it_is_and_lists_its_recipes(key):
    text = find_card(key).text()
    assert f"{key}/split_digits" in text
    assert not find_card(key).ours or "Faithfulness:" in text


def test_drls_card_opens_with_the_sign():
    opening = find_card("drl_ber").text()[:1200]
    for fact in ("L_bt - L_wi", "unbounded below", "564\nsteps", 'form="eq3"'):
        assert fact in opening


def test_the_table_of_generative_replay_holds_the_sources_figures():
    """Half of its figures of MNIST and SVHN, all of CIFAR-10; in %, A_5 and A_10."""
    want = {
        "mnist": {"joint": (99.87, 99.24), "dgr": (90.39, 85.40), "mergan_ra": (98.19, 97.00)},
        "svhn": {"mergan_jtr": (80.90, 66.78), "dgm_w": (83.93, 74.38), "dgm_a": (81.07, 66.89)},
        "cifar10": {"joint": (83.40, 77.82), "dgr": (), "mergan_ra": (), "mergan_jtr": (),
                    "dgm_w": (72.45, 56.21), "dgm_a": (71.91, 51.75)},
    }  # fmt: skip
    for data, figures in want.items():
        recipe = find_recipe(f"dgm_a/{data}_10_paper")
        table = {r.method: r for r in [recipe, *map(find_recipe, recipe.baselines)]}
        assert table["dgm_w"].epochs == (151 if data == "svhn" else 101)
        assert list(table) == ["dgm_a", "joint", "dgr", "mergan_jtr", "mergan_ra", "dgm_w"]
        for row, values in figures.items():
            kind = "generator_accuracy" if row.startswith("mergan") else "average_accuracy"
            held = {p.quantity: round(100 * p.value, 2) for p in table[row].published}
            assert held == dict(zip((f"{kind}_after_5", kind), values, strict=False))
        # generator steps for an average class, of five batches of 64
        images = {"mnist": 6000, "svhn": 73257 / 10, "cifar10": 5000}[data]
        steps = table["mergan_ra"].generator_epochs * images / 64 / 5  # type: ignore[attr-defined]
        assert steps == pytest.approx(4000 if data == "mnist" else 8000, rel=0.01)


def test_the_rows_of_the_papers_tables_say_in_which_settings_they_differ():
    for track, n in (("ni", 11), ("nc", 7), ("nic", 7)):
        main = {"nic": "drl_shuffle_replay"}.get(track, "drl_ber")
        recipe = find_recipe(f"{main}/core50_{track}")
        rows = [recipe, *map(find_recipe, recipe.baselines)]
        assert len(rows) == len({row.title for row in rows}) == n
        assert {row.benchmark for row in rows} == {CORe50Track(track=track)}
        for row in rows:
            assert all(str(v) in row.title for v in (row.mem, row.batch_size))
            assert row.published
    bold = find_recipe("drl_ber/core50_ni")  # the settings of the call that everybody copies
    assert (bold.lam, bold.mem, bold.batch_size, bold.mem_scope) == (1e-3, 300, 16, "experience")
    assert {p.quantity: p.value for p in bold.published} == {
        "test_accuracy": 0.83, "average_validation_accuracy": 0.79,
    }  # fmt: skip
