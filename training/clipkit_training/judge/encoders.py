"""`clipkit evaluate` for encoders: what a run folder says is filled in, judged, and laid out as a table."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clipkit.errors import ConfigError, DataError, InputError, NotFoundError
from clipkit.files import MANIFEST, read_manifest
from clipkit.models import Encoder, load_encoder
from clipkit_data.batches.pairs import Dataset, EvalBatches
from clipkit_data.batches.reads import content_of
from clipkit_data.dataset import ShardDataset
from clipkit_data.lines import LINE_SUFFIXES, LineDataset
from clipkit_data.pictures.views import ViewsConfig
from clipkit_data.sources import is_streamed, open_dataset, resolve_shards
from clipkit_training.judge.features import untrained
from clipkit_training.judge.live import report_live, rounded
from clipkit_training.judge.raw import letters
from clipkit_training.judge.report import Probe, report_encoder
from clipkit_training.judge.sentences import EmbedTexts, ScoredPair, embed_texts, read_scored_pairs, sts
from clipkit_training.judge.wordings import read_wordings, wordings_recall
from clipkit_training.recipe import Recipe, load_recipe

_CONFIG = "config.yaml"
_MODEL = "model"
_RESULT = "result.json"
_FACTS = (
    "label", "classes", "train", "heldout", "overlap", "unseen", "k", "temperature", "probe", "seeds",
    "alignment_of", "raw_left_out",
)  # fmt: skip


def find_run(name: str) -> tuple[str, Path | None]:
    """The model's name, and the run folder it belongs to if that is known.

    Args:
        name: A run folder, the model folder in it, or any model's name.

    Raises:
        NotFoundError: No such folder, and no pretrained model's name; or the run has no model yet.
    """
    path = Path(name)
    if not path.is_dir() and not name.startswith(("open_clip:", "hf:")):
        raise NotFoundError(f"no such run or model folder: {name}")
    if (path / _CONFIG).is_file() and not (path / MANIFEST).is_file():
        return str(_model_of(path)), path
    run = path.parent if path.is_dir() and (path.parent / _CONFIG).is_file() else None
    return name, run


def _model_of(run: Path) -> Path:
    """The model folder of a run, also one that `--model` put elsewhere. Raises: NotFoundError."""
    if (run / _MODEL).is_dir():
        return run / _MODEL
    if not (run / _RESULT).is_file():
        raise NotFoundError(
            f"{run} has no model yet: the run is not finished",
            hint=f"clipkit train {run / _CONFIG} --run {run} --resume goes on with it",
        )
    model = Path(json.loads((run / _RESULT).read_text(encoding="utf-8"))["model"])
    if not model.is_dir():
        raise NotFoundError(f"the model of {run} is no longer in {model}")
    return model


def is_encoder(name: str) -> bool:
    """Whether a run folder or model name stands for an encoder alone."""
    model, _ = find_run(name)
    return Path(model).is_dir() and "modality" in read_manifest(model, "model", verify=False)


def judge_encoder(
    name: str,
    *,
    data: Sequence[str] = (),
    train_data: Sequence[str] = (),
    label: str | None = None,
    shares: Sequence[int] = (),
    ks: Sequence[int] = (),
    temperature: float = 0.07,
    probe: Probe = "logistic",
    seeds: Sequence[int] = (),
    pairs: Sequence[str] = (),
    wording: str | None = None,
    baselines: bool = True,
    device: str | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """What `clipkit evaluate` reports of an encoder.

    Args:
        name: A run folder, an encoder's folder, or an image-text model whose image tower is judged.
        data: Held-out shards or files of sentences; by default the run's. Graphs need none.
        train_data: Shards that neighbours and probes learn from; by default the run's.
        label: Metadata field that names the class; by default the run's.
        shares: Per cent of the labels to fine-tune on.
        ks, temperature, probe: As in `report_encoder`.
        seeds: Of the SVM's folds and of fine-tuning; by default the run's alone.
        pairs: Files of scored sentence pairs (`read_scored_pairs`), for Spearman's correlation.
        wording: Metadata field with another wording of each held-out sentence, which is then looked for
            (`wordings_recall`); by default the first of the run's `data.more_captions`.
        baselines: Also judge new weights and the raw content.
        device: Where to encode, as `load_model` takes it.
        advance: Called with the number of samples done.

    Returns:
        `{"model": name, …}` and what `report_encoder` gives; without a label what needs none. Sentences also
        have "sts", "recall@1" and "recall@10", beside those of the letters as "raw".

    Raises:
        ConfigError: Data or label are neither given nor known from a run.
        InputError: A number is out of its range, or the encoder cannot be fine-tuned.
    """
    if not temperature > 0:
        raise InputError(f"the temperature of the neighbours' vote must be above 0, not {temperature}")
    if any(not 0 <= each < 1 << 32 for each in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds are different whole numbers from 0 on, not {', '.join(map(str, seeds))}")
    model, run = find_run(name)
    recipe = load_recipe(str(run / _CONFIG)) if run else None
    label = label or (recipe.data.label if recipe else None)
    train_data, data = _sources(recipe, train_data, data)
    encoder, seed = load_encoder(model, device), recipe.seed if recipe else 0
    views = recipe.data.make_views(encoder.preprocess.size) if recipe else None
    if shares and encoder.modality != "image":
        raise InputError(f"fine-tuning is for image encoders, this one encodes {encoder.modality}s")
    # read first: a mistake in them must not cost the minutes that the probes take
    tasks = {Path(file).stem: read_scored_pairs(file) for file in pairs}
    wordings = _wordings(recipe if encoder.modality == "text" else None, data, wording)
    kinds = {"": encoder}  # `report_encoder` makes its own untrained one
    if baselines and (encoder.modality == "text" or not label):
        kinds["untrained"] = untrained(encoder, seed)
    if label or not (pairs or data):
        report = _labelled(
            name, encoder, data, train_data, label,
            ks=ks, temperature=temperature, probe=probe, views=views, baselines=baselines, shares=shares,
            seeds=seeds or (seed % (1 << 32),),  # scikit-learn's have 32 bits
            seed=seed, advance=advance,
        )  # fmt: skip
    else:
        found = {kind: _without_label(judged, data, views, seed) for kind, judged in kinds.items()}
        report = found.pop("") | found
    for kind, figures in _of_sentences(kinds, tasks, wordings).items():
        into = report.setdefault(kind, {}) if kind else report
        into.update(figures)
    return {"model": name} | report


def _labelled(
    name: str,
    encoder: Encoder,
    data: Sequence[str],
    train_data: Sequence[str],
    label: str | None,
    **options: Any,
) -> dict[str, Any]:
    """`report_encoder`'s figures, once it is known what to judge on. Raises: ConfigError."""
    graphs = encoder.modality == "graph"  # without held-out data the SVM holds out each of them once
    for what, given, option in (
        ("held-out data", data or graphs, "--data"),
        ("training data", train_data, "--train-data"),
        ("label", label, "--label"),
    ):
        if not given:
            raise ConfigError(f"{name}: no {what} is known", hint=f"give {option}")
    assert label is not None
    heldout = _open(data) if data else None
    return report_encoder(encoder, _open(train_data), heldout, label=label, **options)


def _sources(
    recipe: Recipe | None, train: Sequence[str], heldout: Sequence[str]
) -> tuple[Sequence[str], Sequence[str]]:
    """What was given, or else what the run was trained and judged on."""
    if recipe is not None:
        own = list(recipe.data.sources) or [recipe.data.train]
        train = train or [spec for spec in own if not is_streamed(spec)]
        heldout = heldout or ([recipe.data.heldout] if recipe.data.heldout else [])
    return train, heldout


def _open(specs: Sequence[str]) -> Dataset:
    """Several sources as one. Raises: InputError where shards and files of sentences are among them."""
    if len(specs) == 1:
        return open_dataset(specs[0])
    lines = [spec for spec in specs if spec.lower().endswith(LINE_SUFFIXES)]
    if not lines:
        return ShardDataset(resolve_shards(specs))
    if len(lines) < len(specs):
        shards = next(spec for spec in specs if spec not in lines)
        raise InputError(
            f"{lines[0]} is a file of sentences, {shards} is shards: they cannot be read as one",
            hint="evaluate on one of them, then on the other",
        )
    return LineDataset([path for spec in lines for path in open_dataset(spec).paths])


def _without_label(
    encoder: Encoder, data: Sequence[str], views: ViewsConfig | None, seed: int
) -> dict[str, Any]:
    """The shape of the features of held-out samples."""
    if not data:
        return {}
    texts = encoder.modality == "text"
    batches = list(EvalBatches(_open(data), content_of(encoder), captions=texts))
    return report_live(encoder, [], batches, label=None, views=views, seed=seed)


def _wordings(recipe: Recipe | None, data: Sequence[str], field: str | None) -> Sequence[tuple[str, str]]:
    """Held-out sentences and their other wordings: of the field asked for, or the run's where it is there."""
    if field is not None and not data:
        raise ConfigError("no held-out data is known", hint="give --data")
    usual = next(iter(recipe.data.more_captions), None) if recipe else None
    if not data or (field or usual) is None:
        return []
    try:
        return read_wordings(_open(data), field or str(usual))
    except DataError:
        if field is not None:
            raise
        return []


def _of_sentences(
    kinds: Mapping[str, Encoder],
    tasks: Mapping[str, Sequence[ScoredPair]],
    wordings: Sequence[tuple[str, str]],
) -> dict[str, dict[str, float]]:
    """Figures of scored pairs and of other wordings, for each kind of features."""
    embed: dict[str, EmbedTexts] = {kind: partial(embed_texts, encoder) for kind, encoder in kinds.items()}
    embed |= {"raw": letters} if len(kinds) > 1 else {}
    figures: dict[str, dict[str, float]] = {kind: {} for kind in embed} if tasks or wordings else {}
    for kind, into in figures.items():
        if tasks:
            found = sts(embed[kind], tasks)
            into["sts"] = found.pop("mean")
            into |= {f"sts_{task}": value for task, value in found.items()} if len(found) > 1 else {}
        if wordings:
            into |= wordings_recall(embed[kind], wordings)
    return {kind: rounded(into) for kind, into in figures.items()}


def encoder_table(result: dict[str, Any]) -> tuple[list[list[Any]], list[str]]:
    """A report as a table: a row for each figure, a column for each kind of features.

    Returns:
        Rows, and the names of the columns, as `print_table` takes them.
    """
    kinds = {"trained": result} | {kind: result[kind] for kind in ("untrained", "raw") if kind in result}
    spreads = {f"{name}_std" for name in result}
    skip = {"model", "faults", *kinds, *_FACTS, *spreads}
    names = [name for name in result if name not in skip]
    rows = [[name, *(_cell(figures, name) for figures in kinds.values())] for name in names]
    facts = [name for name in _FACTS if name in result]
    rows += [[name, str(result[name]), *("" for _ in list(kinds)[1:])] for name in facts]
    for reason, count in result.get("faults", {}).items():
        rows.append([f"left out: {reason}", str(count), *("" for _ in list(kinds)[1:])])
    return rows, ["", *kinds]


def _cell(figures: dict[str, Any], name: str) -> str:
    if name not in figures:
        return ""
    spread = figures.get(f"{name}_std")
    return f"{figures[name]:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
