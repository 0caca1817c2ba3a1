"""`clipkit evaluate` on what people bring: no held-out part, some labels, several files, unfinished runs."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipkit.cli import main
from clipkit.errors import InputError, NotFoundError
from clipkit.models import Encoder, EncoderConfig, build_model, save_model
from clipkit_data.batches.pairs import EvalBatches
from clipkit_data.dataset import ShardDataset
from clipkit_training.judge import raw as raw_content
from clipkit_training.judge.encoders import encoder_table, judge_encoder
from clipkit_training.judge.features import encoded, read_features
from clipkit_training.judge.linear import moco_probe
from clipkit_training.judge.overlap import Overlap
from clipkit_training.judge.report import report_encoder
from tests.clipkit_training.test_judge_encoders import CONFIG, squares, write_shard

SHORT = ("--max-steps", "3", "--evaluations", "1", "--checkpoints", "1")


def run(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> Any:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    """What a command that fails says."""
    capsys.readouterr()
    assert main(words) != 0
    return capsys.readouterr().err


def write_trees(folder: Path, count: int) -> Path:
    """Random trees with labels that mean nothing, as a data set of the TU collection."""
    draw, edges, graph_of, kinds, nodes = random.Random(0), list[str](), list[int](), list[int](), 0
    for graph in range(1, count + 1):
        for place in range(draw.randint(5, 20)):
            nodes += 1
            graph_of.append(graph)
            kinds.append(draw.randrange(37) if nodes > 37 else nodes - 1)
            if place:
                other = nodes - 1 - draw.randrange(place)
                edges += [f"{nodes}, {other}", f"{other}, {nodes}"]
    labels = [draw.randrange(2) for _ in range(count)]
    folder.mkdir()
    files = {"A": edges, "graph_indicator": graph_of, "graph_labels": labels, "node_labels": kinds}
    for name, lines in files.items():
        (folder / f"{folder.name}_{name}.txt").write_text("\n".join(map(str, lines)) + "\n")
    return folder


def test_graphs_without_a_held_out_part_are_judged_by_cross_validation_and_none_counts_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shards, folder = str(tmp_path / "shards"), str(tmp_path / "run")
    run(capsys, ["shards", "import", "tu", str(write_trees(tmp_path / "NCI1", 60)), shards])
    run(capsys, ["train", "graphcl-nci1", "--data.train", shards, "--run", folder, "--max-steps", "3"])
    alone = run(capsys, ["evaluate", folder])
    facts = {"label": "label", "classes": 2, "train": 60, "seeds": [0], "alignment_of": "labels"}
    shape = {"rankme", "embedding_std", "alignment", "uniformity"}
    assert set(alone) == {"model", "svm", "untrained", "raw", *shape, *facts}
    assert {name: alone[name] for name in facts} == facts
    assert set(alone["raw"]) == {"svm"}
    assert not caplog.records
    twins = run(capsys, ["evaluate", folder, "--data", shards])
    assert (twins["svm"], twins["raw"], twins["overlap"]) == (alone["svm"], twins["raw"], 60)
    assert twins["raw"]["svm"] == alone["raw"]["svm"]
    assert "60 of 60 held-out samples are in the training data, too: knn and linear" in caplog.text
    several = run(capsys, ["evaluate", folder, "--seeds", "0", "1", "2", "--no-untrained"])
    assert several["svm_std"] > 0
    assert several["seeds"] == [0, 1, 2]
    assert "this one encodes graphs" in refused(capsys, ["evaluate", folder, "--finetune", "10"])
    model = f"{folder}/model"
    assert "no label is known" in refused(
        capsys, ["evaluate", str(_moved(model, tmp_path)), "--train-data", shards]
    )


def _moved(model: str, tmp_path: Path) -> Path:
    """The model away from its run."""
    return Path(model).rename(tmp_path / "model")


def test_shards_that_are_in_both_parts_are_known_by_their_samples(tmp_path: Path) -> None:
    one = write_shard(tmp_path / "a/0.tar", squares(2, 0))
    other = write_shard(tmp_path / "a/1.tar", squares(3, 50))
    copy = write_shard(tmp_path / "b/9.tar", squares(2, 0))
    train = ShardDataset([*one.paths, *other.paths, *one.paths])
    heldout = ShardDataset([*write_shard(tmp_path / "b/8.tar", squares(1, 90)).paths, *copy.paths])
    parts = [[data[place] for place in range(len(data))] for data in (train, heldout)]
    overlap = Overlap(train, heldout)
    assert overlap.in_training(parts[1]) == 8
    first = 8 + 12
    assert overlap.once(parts) == [*range(first), *range(first + 8, first + 8 + 4)]
    assert Overlap(one, other).in_training([other[0]]) == 0


@pytest.fixture(scope="module")
def half_labelled(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of training: two of three samples have a label, and all have a number."""
    root, words = tmp_path_factory.mktemp("half"), list[str]()
    for part, first in (("train", 0), ("heldout", 100)):
        samples = [
            (picture, {"size": place} | ({"klass": meta["hue"]} if place % 3 else {}))
            for place, (picture, meta) in enumerate(squares(8, first))
        ]
        write_shard(root / part / "00000.tar", samples)
        words += [f"--data.{part}", str(root / part)]
    return [*words, "--data.batch-size", "16", "--data.label"]


def test_samples_without_a_label_do_not_stop_a_run(
    half_labelled: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "run")
    run(capsys, ["train", "simclr-glyphs", "--run", folder, *SHORT, *half_labelled, "klass"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (live,) = [line for line in lines if line["kind"] == "heldout"]
    assert 0 <= live["knn"] <= 1
    assert live["heldout"] == 21
    found = run(capsys, ["evaluate", folder, "--no-untrained"])
    assert (found["train"], found["heldout"], found["faults"]) == (21, 21, {"no klass": 22})
    assert "there are klass, size" in refused(capsys, ["evaluate", folder, "--label", "class"])


def test_where_one_class_alone_has_labels_a_run_goes_on_without_neighbours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    samples = [
        (picture, {"klass": "c0"} if place % 2 else {}) for place, (picture, _) in enumerate(squares(4, 0))
    ]
    write_shard(tmp_path / "x/00000.tar", samples)
    data = [
        "--data.train",
        str(tmp_path / "x"),
        "--data.heldout",
        str(tmp_path / "x"),
        "--data.batch-size",
        "8",
    ]
    words = ["train", "simclr-glyphs", "--run", str(tmp_path / "run"), *SHORT, *data]
    run(capsys, [*words, "--data.label", "klass"])
    assert "not measured by klass: the training part has 1 classes, only 'c0'" in caplog.text


def test_a_mistyped_label_of_a_run_is_told_the_fields_that_there_are(
    half_labelled: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run(capsys, ["train", "simclr-glyphs", "--run", str(tmp_path / "run"), *SHORT, *half_labelled, "class"])
    assert "nearest neighbours are not measured by class: no training sample has that field" in caplog.text
    assert "(there are klass, size)" in caplog.text


@pytest.fixture
def parts(tmp_path: Path) -> tuple[ShardDataset, ShardDataset]:
    """Coloured squares, to learn from and held out."""
    train = write_shard(tmp_path / "train/00000.tar", squares(12, 0))
    return train, write_shard(tmp_path / "heldout/00000.tar", squares(8, 100))


@pytest.fixture
def encoder() -> Encoder:
    return build_model(CONFIG, seed=0)


def test_probe_temperature_and_seeds_are_in_the_report(
    parts: tuple[ShardDataset, ShardDataset], encoder: Encoder
) -> None:
    options: dict[str, Any] = {"label": "hue", "baselines": False}
    usual = report_encoder(encoder, *parts, **options)
    assert (usual["probe"], usual["temperature"]) == ("logistic", 0.07)
    assert "seeds" not in usual, "nothing here has seeds"
    options |= {"probe": "sgd", "temperature": 1e9, "ks": (48,), "shares": (10,), "seeds": (3, 4)}
    found = report_encoder(encoder, *parts, **options)
    assert (found["probe"], found["temperature"], found["seeds"]) == ("sgd", 1e9, [3, 4])
    assert set(usual) - set(found) == set()
    assert found["linear"] > 0.8, "chance is 0.25"
    train, heldout = (
        read_features(EvalBatches(part, CONFIG.preprocess, captions=False), {"": encoded(encoder)}, "hue")[""]
        for part in parts
    )
    few = moco_probe(train, heldout, share=0.1, draws=3)
    assert (found["linear_10pct"], found["linear_10pct_std"]) == pytest.approx(
        (few["top1"], few["std"]), abs=1e-4
    )
    assert found["knn"] < 0.5, "all samples vote alike: that is chance"
    one_by_one = [report_encoder(encoder, *parts, **{**options, "seeds": (seed,)}) for seed in (3, 4)]
    assert all("finetune_10pct_std" not in each for each in one_by_one)
    accuracies = [each["finetune_10pct"] for each in one_by_one]
    assert found["finetune_10pct"] == pytest.approx(np.mean(accuracies), abs=1e-4)
    assert found["finetune_10pct_std"] == pytest.approx(np.std(accuracies), abs=1e-4)


def test_raw_content_that_would_not_fit_is_left_out_with_a_word(
    parts: tuple[ShardDataset, ShardDataset], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_of_all = 4 * (48 + 32) * 3 * 16 * 16
    monkeypatch.setattr(raw_content, "MOST", bytes_of_all)
    assert "raw" in report_encoder(encoder, *parts, label="hue")
    monkeypatch.setattr(raw_content, "MOST", bytes_of_all - 1)
    found = report_encoder(encoder, *parts, label="hue")
    assert "raw" not in found
    assert found["raw_left_out"] == "80 samples would take 0.0 GiB"
    rows, columns = encoder_table(found)
    assert columns == ["", "trained", "untrained"]
    assert ["raw_left_out", found["raw_left_out"], ""] in rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "above 0, not 0.0"),
        ({"temperature": float("nan")}, "above 0, not nan"),
        ({"seeds": (0, -1)}, "from 0 on, not 0, -1"),
        ({"seeds": (1, 1)}, "different whole numbers"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge_encoder("gone", **options)


def test_several_files_of_sentences_are_one(
    tmp_path: Path, parts: tuple[ShardDataset, ShardDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    tower = {"name": "transformer", "width": 16, "layers": 1, "heads": 2}
    save_model(
        build_model(EncoderConfig.model_validate({"modality": "text", "tower": tower}), seed=0),
        tmp_path / "m",
    )
    files = [str(tmp_path / name) for name in ("lines.txt", "lines2.txt", "more.csv")]
    Path(files[0]).write_text("a cat\na dog\n")
    Path(files[1]).write_text("one house\ntwo houses\nthree\n")
    Path(files[2]).write_text("caption,kind\nred,hue\n")
    words = ["evaluate", str(tmp_path / "m"), *(word for file in files for word in ("--data", file))]
    assert run(capsys, words)["heldout"] == 6
    shards = str(parts[1].paths[0])
    error = refused(capsys, [*words, "--data", shards])
    assert f"{files[0]} is a file of sentences, {shards} is shards" in error
    assert "no such file" in refused(capsys, [*words, "--data", str(tmp_path / "gone.txt")])


def test_an_unfinished_run_is_named_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoder: Encoder
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = {
        "step": "simclr",
        "model": CONFIG.model_dump(mode="json"),
        "data": {"train": "x"},
        "max_steps": 1,
    }
    (folder / "config.yaml").write_text(json.dumps(recipe))
    error = refused(capsys, ["evaluate", str(folder)])
    assert f"{folder} has no model yet: the run is not finished" in error
    assert f"clipkit train {folder}/config.yaml --run {folder} --resume" in error
    elsewhere = tmp_path / "elsewhere"
    (folder / "result.json").write_text(json.dumps({"model": str(elsewhere)}))
    with pytest.raises(NotFoundError, match="is no longer in"):
        judge_encoder(str(folder))
    save_model(encoder, elsewhere)
    write_shard(tmp_path / "data/00000.tar", squares(2, 0))
    assert judge_encoder(str(folder), data=[str(tmp_path / "data")])["heldout"] == 8


def test_help_names_what_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--temperature", "--probe", "--seeds", "--k", "--device"))
