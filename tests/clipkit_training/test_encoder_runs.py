"""Encoders from their recipes to their reports: the shipped recipes, shortened, through the real commands."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

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
    figures = run(capsys, ["evaluate", train, "--sts", pairs, "--k", "5"])
    assert {"knn", "linear", "linear_1pct", "rankme", "alignment", "uniformity", "sts"} <= set(figures)
    assert {"knn", "linear", "sts"} <= set(figures["untrained"])
    assert {"knn", "linear"} <= set(figures["raw"])
    assert (figures["k"], figures["label"]) == (5, "subgroup")
    assert -1 <= figures["sts"] <= 1
    assert figures["sts"] != figures["untrained"]["sts"]


def test_a_run_of_graphs_is_judged_by_cross_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = str(tmp_path / "families")
    run(capsys, ["shards", "graphs", "families", shards, "--train", "8", "--heldout", "4"])
    data = ("--data.train", f"{shards}/train", "--data.heldout", f"{shards}/heldout")
    run(capsys, ["train", "graphcl-families", "--run", str(tmp_path / "run"), *SHORT, *data])
    figures = run(capsys, ["evaluate", str(tmp_path / "run")])
    assert {"svm", "svm_std", "knn"} <= set(figures)
    assert 0 < figures["raw"]["svm"] < 1
    assert figures["classes"] == 8


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
        ("moco-v2-glyphs", ["--step.queue", "16"], "queue"),
        ("clip-emoji", ["--step", "simclr"], "one tower"),
    ):
        assert main(["train", name, *run_folder, *words]) == 2, name
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()
