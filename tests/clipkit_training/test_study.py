"""Studies in small: real runs on shards of shapes, resumed, refused, and drawn."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipkit.cli import parser_for
from clipkit.errors import ClipkitError, ConfigError, InputError, NotFoundError
from clipkit.models import load_encoder
from clipkit_data.pictures.views import views_of
from clipkit_data.sources import resolve_shards
from clipkit_training.recipe import Recipe, load_recipe
from clipkit_training.study import (
    RESULTS,
    SMALL,
    TRANSFORMS,
    Cell,
    augmentation_cells,
    averages,
    base_of,
    changed,
    chosen,
    head_cells,
    read_results,
    run_study,
)
from clipkit_training.study_commands import study

RECIPE = """
step: simclr
max_minutes: 3
precision: fp32
device: cpu
model:
  modality: image
  tower: {name: cnn, widths: [16, 32], depths: [0, 1], groups: 4}
  preprocess: {size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], resize: squash}
data:
  train: TRAIN
  heldout: HELDOUT
  label: shape
  batch_size: 24
  cache: true
  views: {family: simclr, size: 16}
optim: {lr: 0.003, warmup_steps: 2}
"""


@pytest.fixture
def recipe_file(shape_shards: Path, tmp_path: Path) -> Path:
    text = RECIPE.replace("TRAIN", str(shape_shards / "train")).replace(
        "HELDOUT", str(shape_shards / "heldout")
    )
    path = tmp_path / "shapes.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def base(recipe_file: Path) -> Recipe:
    return base_of(load_recipe(str(recipe_file)), 3)


Run = Callable[..., Any]


@pytest.fixture
def clipkit_study(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `clipkit study KIND … --json` for three steps a cell and gives what it printed."""

    def run(kind: str, *words: str) -> Any:
        command = study.subcommands[kind]
        shared = ["--recipe", str(recipe_file), "--steps", "3", "--out", str(tmp_path / "study"), "--json"]
        args, args_rest = parser_for(command, f"clipkit study {kind}").parse_known_args([*shared, *words])
        args.rest = args_rest
        assert command.run is not None
        assert not command.run(args)
        return json.loads(capsys.readouterr().out)

    return run


def test_pairs_of_augmentations_are_trained_judged_and_drawn(clipkit_study: Run, tmp_path: Path) -> None:
    report = clipkit_study("augmentations", "--transforms", "crop,colour")
    assert list(report["cells"]) == ["crop", "crop+colour", "colour"]
    for cell in report["cells"].values():
        assert 0 <= cell["linear"] <= 1
        assert 0 <= cell["knn"] <= 1
        assert cell["loss"] > 0
        assert cell["embedding_std"] > 0
    assert 0 <= report["untrained"]["linear"] <= 1
    run = tmp_path / "study/runs/crop+colour/seed-0"
    views = load_recipe(str(run / "config.yaml")).data.views
    assert views is not None
    first, second = views_of(views).each
    assert first.augment.crops
    assert first.augment.jitters
    assert (second.augment.moves, second.augment.colours) == (False, False), (
        "one branch alone, as in the paper"
    )
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert load_encoder(run / "model").dim == 32
    png, svg = (Path(file) for file in report["pictures"])
    with Image.open(png) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    assert {">crop<", ">colour<", ">average<"} <= set(re.findall(">[a-z]+<", svg.read_text()))


def test_a_study_goes_on_with_the_cells_that_are_missing(clipkit_study: Run, tmp_path: Path) -> None:
    words = ("--transforms", "crop,flip")
    clipkit_study("augmentations", *words, "--only", "flip+crop")
    first = read_results(tmp_path / "study")
    assert [row["cell"] for row in first] == ["untrained", "crop+flip"]
    report = clipkit_study("augmentations", *words)
    rows = read_results(tmp_path / "study")
    assert rows[:2] == first, "what was done is not done again"
    assert [row["cell"] for row in rows[2:]] == ["crop", "flip"]
    assert list(report["cells"]) == ["crop", "crop+flip", "flip"]


def test_a_run_that_was_stopped_is_trained_to_its_end(base: Recipe, tmp_path: Path) -> None:
    (cell,) = augmentation_cells(["crop"], 16)
    run = tmp_path / "study/runs/crop/seed-0"
    whole = run_study(base, [cell], tmp_path / "study")
    (run / "result.json").unlink()
    (tmp_path / "study" / RESULTS).unlink()
    again = run_study(base, [cell], tmp_path / "study")
    without = [{key: value for key, value in row.items() if key != "seconds"} for row in again]
    assert without == [{key: value for key, value in row.items() if key != "seconds"} for row in whole]
    assert (run / "result.json").is_file()


def test_a_failed_cell_leaves_the_others_in_the_results(base: Recipe, tmp_path: Path) -> None:
    cells = [*head_cells(["linear"], [8]), Cell("far", "", "", {"optim.lr": 1e30, "optim.warmup_steps": 0})]
    with pytest.raises(ClipkitError, match="the loss is nan"):
        run_study(base, cells, tmp_path / "study")
    assert [row["cell"] for row in read_results(tmp_path / "study")] == ["untrained", "linear-8"]


def test_an_impossible_cell_is_refused_before_anything_is_written(base: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="head"):
        run_study(base, head_cells(["linear", "no-such-head"], [8]), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_heads_and_widths_are_compared(clipkit_study: Run, tmp_path: Path) -> None:
    report = clipkit_study("heads", "--heads", "none,linear,v1", "--dims", "8")
    assert list(report["cells"]) == ["none", "linear-8", "v1-8"]
    saved = load_recipe(str(tmp_path / "study/runs/v1-8/seed-0/config.yaml")).step
    assert saved == {"name": "simclr", "head": "v1", "dim": 8}
    assert [Path(file).name for file in report["pictures"]] == ["heads.png", "heads.svg"]


def test_seeds_are_averaged(clipkit_study: Run, tmp_path: Path) -> None:
    report = clipkit_study("augmentations", "--transforms", "crop", "--seeds", "3,4")
    rows = [row for row in read_results(tmp_path / "study") if row["cell"] == "crop"]
    assert [row["seed"] for row in rows] == [3, 4]
    assert rows[0]["loss"] != rows[1]["loss"]
    assert report["cells"]["crop"]["loss"] == pytest.approx((rows[0]["loss"] + rows[1]["loss"]) / 2)


def test_a_folder_of_another_study_is_refused(base: Recipe, tmp_path: Path) -> None:
    run_study(base, [], tmp_path / "study")
    with pytest.raises(ConfigError, match="another recipe"):
        run_study(changed(base, {"optim.lr": 0.1}), [], tmp_path / "study")


def test_a_recipe_without_labels_or_of_pairs_is_refused(recipe_file: Path, tiny_recipe: Path) -> None:
    with pytest.raises(ConfigError, match="judged by labels"):
        base_of(changed(load_recipe(str(recipe_file)), {"data.label": None}), None)
    with pytest.raises(ConfigError, match="image encoder"):
        base_of(load_recipe(str(tiny_recipe)), None)


def test_the_steps_take_the_place_of_every_other_budget(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file))
    assert (base_of(recipe, 7).max_steps, base_of(recipe, 7).max_minutes) == (7, None)
    assert base_of(recipe, None).max_steps == 100, "minutes would make cells unlike"
    assert base_of(changed(recipe, {"max_steps": 9}), None).max_steps == 9


def test_the_recipe_of_studies_is_one_that_a_study_takes() -> None:
    base = base_of(load_recipe(str(SMALL)), None)
    assert base.max_steps == 100
    assert all(resolve_shards(spec) for spec in (base.data.train, base.data.heldout or ""))


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--transforms", "crop,crop"), InputError),
        (("--transforms", "crop,cutout"), NotFoundError),
        (("--only", "crop+grey"), NotFoundError),
        (("--seeds", "0,x"), InputError),
        (("--steps", "0"), InputError),
    ],
)
def test_wrong_words_are_refused_before_any_training(
    words: tuple[str, ...], fault: type[ClipkitError], clipkit_study: Run, tmp_path: Path
) -> None:
    with pytest.raises(fault):
        clipkit_study("augmentations", *words)
    assert not (tmp_path / "study").exists()


@given(st.lists(st.sampled_from(sorted(TRANSFORMS)), unique=True, min_size=1))
def test_every_unordered_pair_is_one_cell(names: list[str]) -> None:
    cells = augmentation_cells(names, 16)
    assert len({frozenset((cell.row, cell.column)) for cell in cells}) == len(cells)
    assert len(cells) == len(names) * (len(names) + 1) // 2
    assert {name for cell in cells for name in (cell.row, cell.column)} == set(names)
    for cell in cells:
        views_of(cell.changes["data.views"])  # every pair is a valid augmentation
        assert chosen(cells, ["+".join(reversed(cell.name.split("+")))]) == [cell]


def test_only_a_new_line_ends_a_row(tmp_path: Path) -> None:
    rows = [{"cell": "crop\u2028colour"}, {"cell": "flip\x85"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / RESULTS).write_text(text, encoding="utf-8")
    assert read_results(tmp_path) == rows


def test_averages_leave_out_what_a_cell_has_not() -> None:
    rows = [{"cell": "a", "loss": 1.0}, {"cell": "a", "loss": 2.0}, {"cell": "untrained"}]
    assert averages(rows, "loss") == {"a": 1.5}
