"""`import clipkit` and every `--help` are quick: they import neither torch nor faiss nor a web framework."""

import json
import subprocess
import sys
import time
from importlib.metadata import entry_points

import pytest

from clipkit.cli import GROUP, Command, load
from clipkit.errors import DependencyError

HEAVY = (
    "torch",
    "torchvision",
    "transformers",
    "open_clip",
    "timm",
    "faiss",
    "numba",
    "sklearn",
    "fastapi",
    "uvicorn",
    "webdataset",
)

RUN = """
import contextlib, io, json, sys
out = io.StringIO()
with contextlib.redirect_stdout(out):
    try:
        code = {action}
    except SystemExit as stop:
        code = stop.code
heavy = sorted(set({heavy!r}) & set(sys.modules))
print(json.dumps([code, heavy, out.getvalue()]))
"""


def in_a_fresh_process(action: str) -> tuple[int | None, list[str], str, float]:
    """Evaluate an expression in a new interpreter: its value, heavy modules, output, seconds."""
    start = time.perf_counter()
    code = RUN.format(action=action, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout), time.perf_counter() - start


def command_lines() -> list[tuple[str, ...]]:
    """Each command and each command below one."""
    lines: list[tuple[str, ...]] = []

    def walk(command: Command, line: tuple[str, ...]) -> None:
        lines.append(line)
        for name, child in command.subcommands.items():
            walk(child, (*line, name))

    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            walk(load(point), (point.name,))
        except DependencyError:  # its own test will say so
            lines.append((point.name,))
    return lines


def test_import_clipkit() -> None:
    _, heavy, _, seconds = in_a_fresh_process("__import__('clipkit') and 0")
    assert heavy == []
    assert seconds < 5


def test_a_training_loads_no_library_of_other_methods() -> None:
    _, heavy, _, _ = in_a_fresh_process("__import__('clipkit_training.loop') and 0")
    assert not {"torchvision", "transformers", "open_clip", "timm", "faiss", "fastapi", "sklearn"} & {*heavy}


def test_overview_names_every_command() -> None:
    code, heavy, out, seconds = in_a_fresh_process("__import__('clipkit.cli').cli.main(['--help'])")
    assert (code, heavy) == (0, [])
    for point in entry_points(group=GROUP):
        assert f"\n  {point.name} " in out
    assert "cannot be loaded" not in out
    assert seconds < 10


@pytest.mark.parametrize("line", command_lines(), ids=" ".join)
def test_help_of_each_command(line: tuple[str, ...]) -> None:
    arguments = [*line, "--help"]
    code, heavy, out, seconds = in_a_fresh_process(f"__import__('clipkit.cli').cli.main({arguments!r})")
    assert (code, heavy) == (0, [])
    assert f"usage: clipkit {' '.join(line)}" in out
    assert "examples:\n" in out
    examples = out.split("examples:\n")[1].splitlines()
    assert examples[0].startswith(f"  clipkit {line[0]}")
    assert seconds < 10
