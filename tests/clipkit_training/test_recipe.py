"""Recipes: precedence, errors that name the field, and the saved recipe that trains the same run again."""

from pathlib import Path

import pytest

from clipkit.config import dump_yaml
from clipkit.errors import ConfigError, NotFoundError
from clipkit.text import build_tokenizer
from clipkit_training.recipe import load_recipe, recipe_names
from clipkit_training.steps import STEPS, step_name


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(name)
    if recipe.model.tokenizer["name"] == "clip":  # others are downloaded
        build_tokenizer(recipe.model.tokenizer)
    assert STEPS.get(step_name(recipe.step))


def test_default_then_recipe_then_command_line(tiny_recipe: Path) -> None:
    plain = load_recipe(str(tiny_recipe))
    assert plain.optim.beta1 == 0.9, "a default"
    assert plain.optim.lr == 0.003, "the recipe beats the default"
    changed = load_recipe(
        str(tiny_recipe), ["--optim.lr", "1e-4", "--data.train", "elsewhere", "--max-minutes", "2"]
    )
    assert changed.optim.lr == 1e-4, "the command line beats the recipe"
    assert (changed.data.train, changed.max_minutes) == ("elsewhere", 2)
    assert changed.model == plain.model
    assert changed.data.captions == plain.data.captions
    assert changed.optim.warmup_steps == plain.optim.warmup_steps


def test_the_saved_recipe_is_the_same(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), ["--seed", "7"])
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_yaml(recipe))
    assert load_recipe(str(saved)) == recipe


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("optim: {lrr: 0.1}", "optim.lrr: unknown key"),
        ("optim: {lr: -1}", "optim.lr"),
        ("optim: {lr: fast}", "optim.lr"),
        ("max_steps: null", "give a budget"),
        ("precision: fp8", "precision"),
        ("model: {}", "model.image"),
    ],
)
def test_a_wrong_recipe_names_the_field(tiny_recipe: Path, line: str, message: str) -> None:
    key = line.split(":")[0]
    kept = [text for text in tiny_recipe.read_text().splitlines() if not text.startswith(f"{key}:")]
    if key == "model":
        kept = [text for text in kept if not text.startswith("  ") or "train:" in text]
    tiny_recipe.write_text("\n".join([*kept, line]))
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(tiny_recipe))


def test_a_syntax_error_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("step: clip\nmodel: [1, 2\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml line \d"):
        load_recipe(str(path))


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(NotFoundError) as caught:
        load_recipe("clip-emojy")
    assert "clip-emoji" in str(caught.value)


def test_a_wrong_override_of_an_open_field_is_not_blamed_on_the_file(tiny_recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny\.yaml as changed by the command line: optim\.milestones"):
        load_recipe(str(tiny_recipe), ["--optim.milestones", "often"])


def test_a_wrong_override_ends_with_usage(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_recipe(str(tiny_recipe), ["--optim.lrr", "1"])
    assert caught.value.code == 2
    assert "--optim.lr" in capsys.readouterr().err
