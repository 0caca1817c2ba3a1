"""Ablations: one recipe trained again and again with one thing changed, each run judged the same way.

A cell is a name and the fields of the recipe that it changes. Cells are ordinary runs, in folders of their
own below the study's; what they came to stands in `results.jsonl`, so that a study that was stopped goes on
with the cells that are missing. Two studies of SimCLR (Chen et al. 2020, "A simple framework for contrastive
learning of visual representations") are here as lists of cells:

- figure 5: pairs of augmentations. As there (section 3.1), only one view is changed and the other stays as it
  is, since two changed views would hide what each augmentation does. The paper first crops both to one size;
  pictures here are resized to one size, so the other view is the whole picture. Ours are always applied in
  one order (see `clipkit_data.pictures.augment`), so first and second can change places, and a pair is
  trained once. The paper's order counts: its matrix is not symmetric.
- figure 8: projection heads of several kinds and widths.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from clipkit.config import dump_yaml, load_yaml, validate
from clipkit.errors import ConfigError, NotFoundError
from clipkit.files import atomic_write
from clipkit.metrics import knn_accuracy
from clipkit.models import Encoder, EncoderConfig, build_model, load_encoder
from clipkit_data.batches.pairs import EvalBatches
from clipkit_data.dataset import ShardDataset
from clipkit_data.sources import resolve_shards
from clipkit_training.judge.features import Features, encoded, read_features
from clipkit_training.judge.labels import code_labels
from clipkit_training.judge.linear import sgd_probe
from clipkit_training.log import METRICS
from clipkit_training.recipe import Recipe
from clipkit_training.run import CONFIG, train_recipe
from clipkit_training.steps import step_of
from clipkit_training.world import pick_device, world_from_environment

RESULTS = "results.jsonl"
RUNS = "runs"
UNTRAINED = "untrained"

SMALL = Path(__file__).parent / "studies" / "glyphs.yaml"
"""The recipe that studies train where none is named."""

_DEFAULT_STEPS = 100

TRANSFORMS: Mapping[str, Mapping[str, Any]] = {
    "crop": {"area": [0.08, 1.0], "aspect": [3 / 4, 4 / 3], "interpolation": "bicubic"},
    "flip": {"flip": 0.5},
    "rotate": {"rotate": 30.0},
    "shift": {"translate": 0.15},
    "colour": {"jitter_p": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2},
    "grey": {"grayscale": 0.2},
    "blur": {"blur": 0.5},
    "solarize": {"solarize": 0.2},
}
"""Augmentations by name: SimCLR's with its numbers, BYOL's solarize, and moderate turns and shifts."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        name: Unlike every other cell's; also its folder.
        row, column: Where it stands in the picture.
        changes: Fields of the recipe by dotted name, and their values.
    """

    name: str
    row: str
    column: str
    changes: Mapping[str, Any]


def augmentation_cells(names: Sequence[str], size: int) -> list[Cell]:
    """Every augmentation alone and every pair of them.

    Args:
        names: Keys of `TRANSFORMS`.
        size: Side of the views, pixels.

    Raises:
        NotFoundError: An unknown name.
    """
    for name in names:
        if name not in TRANSFORMS:
            raise NotFoundError(f"unknown augmentation {name!r}", hint=f"known: {', '.join(TRANSFORMS)}")
    cells = []
    for i, row in enumerate(names):
        for column in names[i:]:
            first = {"augment": {**TRANSFORMS[row], **TRANSFORMS[column]}, "size": size}
            name = row if row == column else f"{row}+{column}"
            cells.append(Cell(name, row, column, {"data.views": {"views": [first, {"size": size}]}}))
    return cells


def head_cells(heads: Sequence[str], dims: Sequence[int]) -> list[Cell]:
    """Every projection head with every width of its output; one cell for "none", which has no width.

    Args:
        heads: As the step's option `head` has them.
        dims: Widths, as the step's option `dim` has them.
    """
    cells = []
    for head in heads:
        if head == "none":
            cells.append(Cell(head, head, "", {"step.head": head}))
            continue
        cells += [Cell(f"{head}-{dim}", head, str(dim), {"step.head": head, "step.dim": dim}) for dim in dims]
    return cells


def chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells of those names, all where there are none; a pair's names may stand in either order.

    Raises:
        NotFoundError: No such cell.
    """
    if not only:
        return list(cells)
    by_name = {frozenset(cell.name.split("+")): cell for cell in cells}
    for name in only:
        if frozenset(name.split("+")) not in by_name:
            raise NotFoundError(
                f"the study has no cell {name!r}", hint=f"its cells: {', '.join(cell.name for cell in cells)}"
            )
    return [by_name[frozenset(name.split("+"))] for name in only]


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of the fields of those dotted names. Raises: ConfigError."""
    values = recipe.model_dump(mode="json")
    for name, value in changes.items():
        *path, last = name.split(".")
        place = values
        for part in path:
            if isinstance(place[part], str):  # `step: simclr` is short for `step: {name: simclr}`
                place[part] = {"name": place[part]}
            place = place[part]
        place[last] = value
    return validate(Recipe, values, "the study's recipe")


def base_of(recipe: Recipe, steps: int | None) -> Recipe:
    """What all cells have in common: an image encoder, labels to judge by, and so many steps.

    A cell is not judged while it trains and writes no checkpoint: one that was stopped starts again.

    Raises:
        ConfigError: The recipe trains something else, or has no labels or no held-out data.
    """
    if not isinstance(recipe.model, EncoderConfig) or recipe.model.modality != "image":
        raise ConfigError(
            "a study trains an image encoder", hint="for example --recipe simclr-glyphs --steps 100"
        )
    if not recipe.data.heldout or not recipe.data.label or not recipe.data.train:
        raise ConfigError("a study is judged by labels", hint="give data.train, data.heldout and data.label")
    changes: dict[str, Any] = {"evaluations": 0, "checkpoints": 0}
    if steps is not None or recipe.max_steps is None:
        changes |= {"max_steps": steps or _DEFAULT_STEPS, "max_minutes": None, "max_epochs": None}
    return changed(recipe, changes)


def run_study(
    base: Recipe,
    cells: Iterable[Cell],
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    advance: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Train and judge what is missing: every cell and the untrained model, with every seed.

    Args:
        base: A recipe of `base_of`.
        cells: What to change in it.
        out: The study's folder, new or of a study of the same recipe.
        seeds: Seeds of the runs.
        advance: Called with a cell's name when it is done.

    Returns:
        The rows of `results.jsonl`, those of earlier calls included: `{"cell", "row", "column", "seed",
        "linear", "knn", "loss", "embedding_std", "steps", "seconds"}`.

    Raises:
        ConfigError: The folder holds a study of another recipe, or a cell has options that there are not.
    """
    cells = list(cells)
    for cell in cells:
        step_of(changed(base, cell.changes).step)  # what cannot be trained is said before anything is written
    _check_same_study(base, out)
    rows = read_results(out)
    done = {(row["cell"], row["seed"]) for row in rows}
    for seed in seeds:
        for cell in (Cell(UNTRAINED, "", "", {}), *cells):
            if (cell.name, seed) not in done:
                rows.append(_row(changed(base, {**cell.changes, "seed": seed}), cell, out / RUNS))
                atomic_write(out / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
            advance(cell.name)
    return rows


def read_results(out: Path) -> list[dict[str, Any]]:
    """The rows of a study's folder; none where there is no study yet."""
    if not (out / RESULTS).is_file():
        return []
    return [json.loads(line) for line in (out / RESULTS).read_bytes().splitlines()]


def averages(rows: Iterable[Mapping[str, Any]], figure: str) -> dict[str, float]:
    """The mean of a figure over the seeds of each cell that has it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.get(figure) is not None:
            values.setdefault(row["cell"], []).append(row[figure])
    return {name: fmean(each) for name, each in values.items()}


def _check_same_study(base: Recipe, out: Path) -> None:
    if (out / CONFIG).is_file():
        if validate(Recipe, load_yaml(out / CONFIG), str(out / CONFIG)) != base:
            raise ConfigError(
                f"{out} holds a study of another recipe or of other steps", hint="choose another --out"
            )
        return
    atomic_write(out / CONFIG, dump_yaml(base))


def _row(recipe: Recipe, cell: Cell, runs: Path) -> dict[str, Any]:
    """Train one cell, unless its run is whole already, and judge it."""
    described = {"cell": cell.name, "row": cell.row, "column": cell.column, "seed": recipe.seed}
    if cell.name == UNTRAINED:
        encoder = build_model(recipe.model, seed=recipe.seed).eval()
        assert isinstance(encoder, Encoder)
        return described | judged(encoder, recipe)
    run = runs / cell.name / f"seed-{recipe.seed}"
    if not (run / "result.json").is_file():
        with world_from_environment(recipe.device) as world:
            train_recipe(recipe, run, world, resume=(run / CONFIG).is_file())
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    last = json.loads((run / METRICS).read_bytes().splitlines()[-1])
    trained = {"loss": last["loss"], "embedding_std": last.get("embedding_std")}
    cost = {key: result[key] for key in ("steps", "seconds")}
    return described | judged(load_encoder(run / "model"), recipe) | trained | cost


def judged(encoder: Encoder, recipe: Recipe) -> dict[str, float]:
    """Accuracy on held-out pictures of a linear layer and of 20 neighbours, by features of the training part.

    The linear layer is `sgd_probe` on standardised features: one short training, whatever the features.
    """
    encoder = encoder.to(pick_device(recipe.device))
    train, heldout = (_features(encoder, recipe, spec) for spec in (recipe.data.train, recipe.data.heldout))
    coded = code_labels(train.labels, heldout.labels)
    linear = sgd_probe(train, heldout, batch_norm=True)["top1"]
    (knn,) = knn_accuracy(heldout.x_ND, coded.heldout_N, train.x_ND, coded.train_N, ks=(20,)).values()
    return {"linear": round(linear, 4), "knn": round(knn, 4)}


def _features(encoder: Encoder, recipe: Recipe, spec: str | None) -> Features:
    assert spec is not None
    batches = EvalBatches(
        ShardDataset(resolve_shards(spec)), encoder.preprocess, workers=recipe.data.workers, captions=False
    )
    return read_features(batches, {"": encoded(encoder)}, recipe.data.label)[""]
