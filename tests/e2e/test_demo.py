"""`clipkit demo`: the whole path in one command, and what it refuses."""

import json
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.e2e.support import CLIPKIT, clipkit, wait_for_url


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("demo")
    done = clipkit("demo", "--out", "out", "--minutes", 0.2, "--seed", 3, "--no-serve", "--json", cwd=root)
    return root, json.loads(done.stdout.splitlines()[-1])


def test_artifacts_and_figures(demo: tuple[Path, dict]) -> None:
    root, result = demo
    for part, kind in {"model": "model", "embeddings": "embeddings"}.items():
        assert json.loads((root / "out" / part / "clipkit.json").read_text())["kind"] == kind
    assert (root / "out/run/metrics.jsonl").is_file()
    assert (root / "out/index/CURRENT").is_file()
    assert 0 < result["seconds"]["train"] < 24, "twelve seconds were asked for"
    assert result["seconds"]["train"] < result["seconds"]["total"]
    heldout, seen, untrained = result["heldout"], result["seen"], result["untrained"]["heldout"]
    assert (heldout["queries"], heldout["gallery"], seen["queries"]) == (500, 3641, 3141)
    for figures in (heldout, seen, untrained):
        for direction in ("text_to_image", "image_to_text"):
            recalls = [figures[direction][f"recall@{k}"] for k in (1, 5, 10)]
            assert recalls == sorted(recalls)
            assert all(0 <= recall <= 1 for recall in recalls)
    # How far twelve seconds lead depends on what else the machine does; that they lead somewhere does not.
    records = [json.loads(line) for line in (root / "out/run/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert heldout["text_to_image"]["recall@10"] >= untrained["text_to_image"]["recall@10"]


def test_a_finished_demo_is_served_again(demo: tuple[Path, dict], tmp_path: Path) -> None:
    root, result = demo
    arguments = ["demo", "--out", "out", "--minutes", "0.2", "--seed", "3"]
    again = clipkit(*arguments, "--no-serve", "--json", cwd=root)
    assert json.loads(again.stdout) == result
    log = tmp_path / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen([*CLIPKIT, *arguments, "--port", "0"], cwd=root, stdout=file, stderr=file)
    try:
        url = wait_for_url(process, log)
        found = httpx.get(f"{url}/v1/search", params={"q": "cat", "k": 3}).json()["data"]
        assert len(found) == 3
    finally:
        process.terminate()
        process.wait(30)


def test_other_settings_and_other_folders_are_left_alone(demo: tuple[Path, dict], tmp_path: Path) -> None:
    root, _ = demo
    done = clipkit("demo", "--out", "out", "--minutes", 0.2, "--seed", 4, "--no-serve", cwd=root, code=1)
    assert "other settings" in done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    done = clipkit("demo", "--out", "mine", "--no-serve", cwd=tmp_path, code=1)
    assert "not empty" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_port_in_use_is_said_before_training(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = clipkit("demo", "--out", "out", "--port", port, cwd=tmp_path, code=1)
    assert str(port) in done.stderr
    assert "--port" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--port", "70000"), ("--port", "-1"), ("--seed", "-1")])
def test_numbers_out_of_range(option: str, value: str, tmp_path: Path) -> None:
    done = clipkit("demo", "--out", "out", f"{option}={value}", cwd=tmp_path, code=2)
    assert option.strip("-") in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_a_budget_must_be_above_zero(minutes: str, tmp_path: Path) -> None:
    done = clipkit("demo", "--out", "out", "--minutes", minutes, "--no-serve", cwd=tmp_path, code=2)
    assert "--minutes" in done.stderr
    assert "yaml" not in done.stderr
    assert "Traceback" not in done.stderr
