import dataclasses

import pytest

from tritflow.config import ConfigError, Recipe
from tritflow.recipes import advice, load_recipe, recipe_dict, recipe_hash, recipe_names


def test_every_recipe_of_the_package_loads():
    assert set(recipe_names()) >= {"absmean", "fast", "compensated", "demo", "balanced", "best"}
    hashes = {recipe_hash(load_recipe(name)) for name in recipe_names()}
    assert len(hashes) == len(recipe_names())
    assert all(load_recipe(name).summary for name in recipe_names())
    assert load_recipe("fast").distillation.steps == 0
    assert load_recipe("best").distillation.steps > load_recipe("balanced").distillation.steps > 0


def test_own_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('summary = "x"\n[distillation]\nsteps = 7\n[ternary]\nmode = "w2a8"\n')
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.distillation.steps == 7
    assert recipe.ternary.mode == "w2a8"
    assert recipe_dict(recipe)["distillation"]["steps"] == 7
    assert recipe_hash(recipe) != recipe_hash(Recipe("mine"))
    assert recipe_hash(Recipe("a", summary="b")) == recipe_hash(Recipe("c"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 3", "unknown setting 'steps'"),
        ("ternarizer = 'absmaen'", "did you mean 'absmean'"),
        ("[distilation]\nsteps = 1", "did you mean 'distillation'"),
        ("[distillation]\nstep = 1", "did you mean 'steps'"),
        ("[distillation]\nactivation_bits = 4", "8 or 16"),
        ("[calibration]\nbatch_size = 0", "at least 1"),
        ("[calibration]\nguidance_scales = []", "is empty"),
        ("compensation = true\nternarizer = 'absmean'", "mse ternarizer"),
        ("ternary = 3", "must be a table"),
        ("= 3", "is not TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_unknown_names():
    with pytest.raises(ConfigError, match="did you mean 'balanced'"):
        load_recipe("balancd")
    with pytest.raises(ConfigError, match="No such file"):
        load_recipe("nowhere.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 3\nstride = 2", "leaves out blocks between windows of 1"),
        ("window = 0", "reconstruction.window must be at least 1"),
        ("activation_bits = 4", "reconstruction.activation_bits is 8 or 16"),
        ("widow = 2", "did you mean 'window'"),
    ],
)
def test_mistakes_in_reconstruction_are_named(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text("[reconstruction]\n" + text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_recipes_that_only_round_say_what_keeps_the_pictures():
    for name in recipe_names():
        said = advice(name, 10**7)
        assert (said is not None) == (name in ("absmean", "fast")), name
    assert "--recipe balanced" in advice("fast", 10**7)
    assert "--recipe large (one 24-80 GB GPU), large-offloaded (with 64 GB of memory) or large-distilled" in advice(
        "fast", 12 * 10**9
    )


def test_settings_that_came_later_leave_older_hashes_alone():
    """A job from before them goes on."""
    recipe = load_recipe("demo")
    then = dataclasses.replace(recipe.distillation, steps=120, checkpoint_every=60)
    recipe = dataclasses.replace(recipe, distillation=then)
    assert recipe_hash(recipe) == "f66e20f03a510960"
    changed = dataclasses.replace(recipe, distillation=dataclasses.replace(recipe.distillation, retreats=1))
    assert recipe_hash(changed) != recipe_hash(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smoothing = 0.0\nsmoothing_outliers = 0.5", "ratio above 1"),
        ("smoothing_outliers = 20.0", "need smoothing"),
        ("smoothing = 0.0\nsmoothing_skip = [3]", "list of patterns"),
        ("[distillation]\nsteps = 1\ndamp_columns = true", 'optimizer = "muon"'),
        ("[distillation]\nsteps = 1\nlean = true", 'lean is for optimizer = "muon"'),
        ('[distillation]\nsteps = 1\n[streaming]\nlatent_store = "ram"', "needs a distillation with lean = true"),
        (
            '[distillation]\nsteps = 1\nlean = true\noptimizer = "muon"\nlearning_rate = 0.0\n'
            '[streaming]\nlatent_store = "ram"',
            "a learning_rate above 0",
        ),
        ('[streaming]\nlatent_store = "disk"', "latent_store"),
        (
            "[distillation]\nsteps = 1\nlean = true\noptimizer = 'muon'\nfeature_weight = 0.1\n[online]\npool = 2",
            "no hidden states for feature_weight",
        ),
        ("[distillation]\nsteps = 1\nfeature_weight = 1.0", "needs the teacher of online.pool"),
        ("[distillation]\nsteps = 1\nfreeze_share = 1.0", "at least 0 and below 1"),
        ("[distillation]\nsteps = 1\nretreats = -1", "retreats is 0 or more"),
        ("[distillation]\nsteps = 1\nretreat_above = 1.0", "retreat_above above 1"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)
