"""Curves of real runs, and of logs that are none."""

import json
from pathlib import Path

import pytest
from PIL import Image

from clipkit.cli import main
from clipkit_training.curves import draw_curves, read_curves
from clipkit_training.log import METRICS, RunLog


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two short runs."""
    folder = tmp_path_factory.mktemp("curves")
    short = ("--max-steps", "6", "--data.batch-size", "16", "--evaluations", "2", "--checkpoints", "1")
    for name in ("simclr", "simsiam"):
        words = ["train", f"{name}-glyphs", "--run", str(folder / name), *short, "--json"]
        assert main(words) == 0
    return [str(folder / name) for name in ("simclr", "simsiam")]


def test_runs_are_drawn_side_by_side(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["curves", *runs, "--over", "samples", "--out", str(tmp_path / "both.svg"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["runs"]) == ["simclr", "simsiam"]
    assert [x for x, _ in report["runs"]["simclr"]["loss"]] == [16, 32, 48, 64, 80, 96]
    assert [x for x, _ in report["runs"]["simsiam"]["knn"]] == [48, 96], "held-out figures at their steps"
    png, svg = report["pictures"]
    with Image.open(png) as picture:
        assert picture.width > picture.height
    text = Path(svg).read_text()
    assert all(word in text for word in ("simclr", "simsiam", "knn", "rankme", "loss", "samples seen"))


def test_seconds_rise(runs: list[str]) -> None:
    seconds = [x for x, _ in read_curves(Path(runs[0]), "seconds")["loss"]]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_one_figure_of_one_run(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "norm")
    assert main(["curves", runs[0], "--figure", "grad_norm", "--out", out]) == 0
    assert "norm.svg" in capsys.readouterr().out
    assert main(["curves", runs[0], "--figure", "los", "--out", out]) == 2
    assert "no run has 'los'" in (err := capsys.readouterr().err)
    assert "loss" in err


def test_a_run_without_a_figure_is_left_out_of_its_panel(runs: list[str], tmp_path: Path) -> None:
    here, other = read_curves(Path(runs[0])), read_curves(Path(runs[1]))
    del here["knn"]
    _, svg = draw_curves({"blind": here, "whole": other}, ["knn", "loss"], "steps", tmp_path / "two")
    assert all(svg.read_text().count(f">{name}<") == 1 for name in ("blind", "whole")), (
        "one legend, both runs"
    )


def test_only_a_new_line_ends_a_record(runs: list[str], tmp_path: Path) -> None:
    text = '{"kind": "train", "step": %d, "seconds": 1, "loss": 0.5, "note": "a\u2028b\x85c"}\n'
    log = tmp_path / METRICS
    log.write_text("".join(text % step for step in (1, 2, 3)) + '{"kind": "tr', encoding="utf-8")
    with RunLog.open(tmp_path, 2, "") as again:
        again.step(3, 1.0, {"loss": 0.25, "samples_per_second": 1, "seconds": 2})
    lines = log.read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert json.loads(lines[0])["note"] == "a\u2028b\x85c"
    (tmp_path / "config.yaml").write_text((Path(runs[0]) / "config.yaml").read_text())
    assert read_curves(tmp_path)["loss"] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_another_axis_is_refused(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curves", runs[0], "--over", "hours"]) == 2
    assert "curves cannot run over 'hours'" in capsys.readouterr().err


def test_what_is_no_run_is_said_so(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["curves", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert main(["curves", runs[0], runs[0]]) == 2
    assert "a run is named twice" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.yaml").write_text((Path(runs[0]) / "config.yaml").read_text())
    for log, words in (
        ('{"kind": "train", "st\n', "line 1, is no record"),
        ('{"kind": "held', "line 1, is no record"),
        ("", "no step is recorded yet"),
    ):
        (damaged / "metrics.jsonl").write_text(log)
        assert main(["curves", str(damaged), "--out", str(tmp_path / "x")]) == 1, log
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))
