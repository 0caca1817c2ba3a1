"""The page about shards: its commands run as they stand there, one after the other."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from clipkit.cli import main
from clipkit.models import ModelConfig, build_model, save_model
from clipkit_data.commands import shards
from clipkit_data.tools.where import KNOWN, Where

PAGE = Path(__file__).resolve().parents[2] / "docs" / "shards.md"
MODEL = {
    "image": {"name": "cnn", "widths": (8,), "depths": (1,), "groups": 4},
    "text": {"name": "transformer", "width": 16, "layers": 1, "heads": 2},
    "dim": 8,
    "preprocess": {"size": 16},
    "tokenizer": {"name": "clip", "context_length": 16},
}


def test_every_command_of_the_page_runs(
    tmp_path: Path, picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / f"photos/a_red_box_{number}.png").write_bytes(picture(number))
    save_model(build_model(ModelConfig.model_validate(MODEL), seed=0), tmp_path / "demo/model")
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "clipkit"
        assert main(arguments) == 0, line
    assert {shlex.split(line)[2] for line in lines} == set(shards.subcommands) - {"emoji", "glyphs", "import"}
    made = {"shards", "mixed", "wide", "good", "stats.png", "sheet.png", "sheet.html", "two.png"}
    assert made <= {path.name for path in tmp_path.iterdir()}


def test_the_conditions_of_the_page_are_conditions() -> None:
    conditions = re.findall(r'^ {4}--where "(.*)"$', PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(conditions) == 3
    fields = [Where(condition.replace('\\"', '"')).fields for condition in conditions]
    assert fields == [["group", "stars"], ["similarity"], []]


def test_every_column_is_named() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in KNOWN:
        assert f"`{name}`" in text or f"`.{name}`" in text, name
