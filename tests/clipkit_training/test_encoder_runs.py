"""Encoders from their recipes to their reports: the shipped recipes, shortened, through the real commands."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from webdataset.writer import TarWriter

from clipkit.cli import main

SHORT = ("--max-steps", "3", "--data.batch-size", "32", "--evaluations", "1", "--checkpoints", "1")


def run(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> Any:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name",
    [
        *("simclr-glyphs", "supcon-glyphs", "moco-v1-glyphs", "moco-v2-glyphs", "moco-v3-glyphs"),
        *("byol-glyphs", "simsiam-glyphs", "instdisc-glyphs", "nce-glyphs"),
        *("simcse-emoji", "graphcl-families", "graphsage-families"),
    ],
)
def test_every_recipe_of_an_encoder_trains_and_is_measured(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = run(capsys, ["train", name, "--run", str(tmp_path / "run"), *SHORT])
    assert trained["steps"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert all(line["loss"] == pytest.approx(line["loss"]) for line in steps), "finite"
    (live,) = [line for line in lines if line["kind"] == "heldout"]
    assert 0 <= live["knn"] <= 1 <= live["rankme"]
    assert live["k"] == 20


def test_a_run_of_sentences_is_judged_by_neighbours_and_by_scored_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, pairs = str(tmp_path / "run"), str(tmp_path / "pairs.tsv")
    run(capsys, ["train", "simcse-emoji", "--run", train, *SHORT])
    assert run(capsys, ["shards", "pairs", "sample:emoji/heldout", pairs, "--count", "60"])["pairs"] == 60
    few = str(tmp_path / "few")  # a tenth: the regression on letters takes a minute and a half on all
    run(capsys, ["shards", "filter", "sample:emoji/train", few, "--where", "key like '%7'"])
    figures = run(capsys, ["evaluate", train, "--sts", pairs, "--k", "5", "--train-data", few])
    words = {"knn", "linear", "sts", "recall@1", "recall@10"}
    assert {*words, "linear_1pct", "rankme", "alignment", "uniformity"} <= set(figures)
    assert words <= set(figures["untrained"])
    assert words <= set(figures["raw"])
    assert (figures["k"], figures["label"]) == (5, "subgroup")
    assert -1 <= figures["sts"] <= 1
    assert figures["sts"] != figures["untrained"]["sts"]


def test_other_wordings_are_looked_for_where_a_field_holds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, heldout = str(tmp_path / "run"), ["--data", "sample:emoji/heldout"]
    run(capsys, ["train", "simcse-emoji", "--run", train, *SHORT, "--data.label", "None"])
    chinese = run(capsys, ["evaluate", train])
    assert chinese["raw"]["recall@1"] < 0.02, "no letter is in both languages"
    keywords = run(capsys, ["evaluate", train, "--wording", "keywords"])
    assert keywords["raw"]["recall@1"] > 0.1
    model = f"{train}/model"
    lines = tmp_path / "lines.txt"
    lines.write_text("red circle\nblue square\ngreen line\n")
    assert "recall@1" not in run(capsys, ["evaluate", model, "--data", str(lines)])
    assert main(["evaluate", model, *heldout, "--wording", "nickname"]) == 1
    error = capsys.readouterr().err
    assert "no sample has a caption and a text in the field 'nickname'" in error
    assert "there are" in error
    assert "name_zh" in error


def test_a_run_of_graphs_is_judged_by_cross_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = str(tmp_path / "families")
    run(capsys, ["shards", "graphs", "families", shards, "--train", "8", "--heldout", "4"])
    data = ("--data.train", f"{shards}/train", "--data.heldout", f"{shards}/heldout")
    run(capsys, ["train", "graphcl-families", "--run", str(tmp_path / "run"), *SHORT, *data])
    figures = run(capsys, ["evaluate", str(tmp_path / "run")])
    assert {"svm", "knn"} <= set(figures)
    assert "svm_std" not in figures
    assert 0 < figures["raw"]["svm"] < 1
    assert figures["classes"] == 8


def test_a_collapse_is_reported_where_nothing_is_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """BYOL without predictor and without a slow twin: in 40 steps all embeddings are one."""
    words = ["train", "byol-glyphs", "--max-steps", "60", "--data.batch-size", "32", "--evaluations", "3"]
    words += ["--data.heldout", "None", "--optim.warmup-steps", "0", "--step.momentum", "0"]
    run(capsys, [*words, "--run", str(tmp_path / "sound")])
    assert "collapsed" not in caplog.text
    run(capsys, [*words, "--run", str(tmp_path / "run"), "--step.predictor", "false"])
    assert "step 60: the embeddings of the batch are nearly one: the run has collapsed" in caplog.text


def test_options_of_the_step_and_of_the_tower_are_set_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "simclr-glyphs", "--run", str(tmp_path / "run"), *SHORT, "--step.head", "linear"]
    run(capsys, [*words, "--step.temperature=0.3", "--model.tower.widths", "[16, 32, 64]"])
    config = (tmp_path / "run/config.yaml").read_text()
    assert "head: linear" in config
    assert "temperature: 0.3" in config
    assert main([*words[:3], str(tmp_path / "other"), *SHORT, "--step.temprature", "1"]) == 2
    assert "step 'simclr': temprature: unknown key" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = ["--run", str(tmp_path / "run"), *SHORT]
    for name, words, message in (
        ("graphcl-families", ["--data.views.family", "simclr"], "data.views are of pictures"),
        ("byol-glyphs", ["--max-steps", "None", "--max-minutes", "1"], "give max_steps or max_epochs"),
        ("simclr-glyphs", ["--data.views", "{family: simcrl}"], "unknown family of views 'simcrl'"),
        ("simclr-glyphs", ["--data.views", "{family: simclr, strenght: 1}"], "have no 'strenght'"),
        ("simclr-glyphs", ["--data.load-size", "64"], "not turned, sheared or shifted"),
        ("moco-v2-glyphs", ["--step.queue", "16"], "queue"),
        ("clip-emoji", ["--step", "simclr"], "one tower"),
    ):
        assert main(["train", name, *run_folder, *words]) == 2, name
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


def test_pictures_without_a_label_train_and_are_measured_without_neighbours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run_folder = str(tmp_path / "run")
    words = ["--data.label", "nothing", "--run", run_folder, *SHORT]
    assert main(["train", "supcon-glyphs", *words]) == 2
    assert "32 of 32 have none in the field of data.label" in capsys.readouterr().err
    run(capsys, ["train", "simclr-glyphs", *words])  # a run that had no step leaves room for another
    assert "nearest neighbours are not measured by nothing" in caplog.text
    figures = run(capsys, ["evaluate", run_folder, "--label", "script", "--k", "3"])
    assert figures["classes"] == 3


def test_a_shard_of_pictures_in_a_format_that_is_not_read_is_none_of_texts(tmp_path: Path) -> None:
    from clipkit_data.shards.scan import scan_shard

    for members, samples in ((("tif", "txt"), 0), (("txt", "json"), 2), (("mp4", "jpg", "txt"), 2)):
        path = tmp_path / f"{'-'.join(members)}.tar"
        with path.open("wb") as file, TarWriter(file, encoder=False) as writer:
            for key in ("a", "b"):
                writer.write({"__key__": key} | dict.fromkeys(members, b"{}"))
        assert len(scan_shard(path).samples) == samples, members


def test_what_is_no_yaml_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "simclr-glyphs", "--step.temperature", "[1"]) == 2
    assert "--step.temperature: '[1' is no YAML" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("model: abc\nmax_steps: 1\ndata: {train: x}\n")
    assert main(["train", str(tmp_path / "bad.yaml")]) == 2
    assert "model" in capsys.readouterr().err
