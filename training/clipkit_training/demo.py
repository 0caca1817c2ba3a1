"""The whole path on the sample shards, in one folder: `run`, `model`, `embeddings`, `index`.

A finished demo of the same settings is served again as it is; an unfinished one is made again from the
start, since all of it takes minutes. A folder with anything else in it is left alone.
"""

import json
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from clipkit.cli.output import progress
from clipkit.errors import ArtifactError, ConfigError, PortInUseError
from clipkit.files import atomic_write, read_manifest
from clipkit.index import build_index
from clipkit_data.embedding import embed
from clipkit_training.evaluate import evaluate_model
from clipkit_training.recipe import load_recipe
from clipkit_training.run import train_recipe
from clipkit_training.world import world_from_environment

RECIPE = "clip-emoji"
TRAIN, HELDOUT, EVERYTHING = "sample:emoji/train", "sample:emoji/heldout", "sample:emoji"
STAMP, RESULT = "demo.json", "result.json"
PARTS = ("run", "model", "embeddings", "index")


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be served on. Raises: ConfigError; PortInUseError."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: a port is a number from 0 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUseError(
                f"cannot serve on {host}:{port}: {error.strerror or error}",
                hint="choose another --port, or stop what is using it",
            ) from error


def run_demo(
    out: Path, *, minutes: float, seed: int, address: tuple[str, int] | None = None
) -> dict[str, Any]:
    """Train on the sample shards, evaluate, embed every picture, build the index.

    Args:
        out: Folder for all artifacts.
        minutes: Budget of the training loop.
        seed: Decides weights, order and augmentation.
        address: Checked to be free before anything else.

    Returns:
        `{"seconds": {"train", "total"}, "heldout": {…}, "seen": {…}, "untrained": {"heldout": {…}}, …}`;
        recalls are of captions and pictures of that set against all pictures and captions there are.

    Raises:
        ConfigError: `minutes` is not above 0, or `seed` below.
        PortInUseError: `address` is taken.
        ArtifactError: `out` holds something that is no demo, or a demo with other settings.
    """
    if not minutes > 0:
        raise ConfigError(f"--minutes {minutes:g}: training takes more than 0 minutes")
    if seed < 0:
        raise ConfigError(f"--seed {seed}: a seed is 0 or more")
    if address:
        check_address(*address)
    started = time.monotonic()
    recipe = load_recipe(RECIPE, changes={"max_minutes": minutes, "seed": seed})
    settings = {"recipe": RECIPE, "minutes": minutes, "seed": seed}
    if finished := _prepare(out, settings):
        _say(f"{out} holds this demo already; remove the folder to train again")
        return finished
    _say(f"training {RECIPE} for {minutes:g} minutes")
    with world_from_environment(recipe.device) as world:
        trained = train_recipe(recipe, out / "run", world, model_folder=out / "model")
    model = str(out / "model")
    with progress("evaluating") as bar:
        figures = evaluate_model(model, [HELDOUT, TRAIN], advance=bar.advance)
    with progress("embedding") as bar:
        embed(model, EVERYTHING, out / "embeddings", progress=bar.advance)
    with progress("indexing") as bar:
        build_index(out / "embeddings", out / "index", progress=bar.advance)
    untrained = figures.pop("untrained")
    result = {
        "seconds": {"train": trained["seconds"], "total": round(time.monotonic() - started, 2)},
        "heldout": figures["heldout"],
        "seen": figures["seen"],
        "untrained": untrained,
        "pairs_per_second": trained["pairs_per_second"],
        "precision": trained["precision"],
        "out": str(out),
    }
    atomic_write(out / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def serve_command(out: Path, host: str, port: int) -> list[str]:
    """The command line that serves a demo."""
    return [
        *(sys.executable, "-m", "clipkit", "serve"),
        *("--model", str(out / "model"), "--index", str(out / "index")),
        *("--host", host, "--port", str(port)),
    ]


def _prepare(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Make `out` ready for a new demo, or return the result of a finished one with the same settings."""
    stamp = out / STAMP
    if stamp.is_file():
        if json.loads(stamp.read_text()) != settings:
            raise ArtifactError(
                f"{out} holds a demo with other settings: {stamp.read_text().strip()}",
                hint="choose another --out, or remove it",
            )
        if (out / RESULT).is_file():
            read_manifest(out / "model", "model")
            return json.loads((out / RESULT).read_text())
        for part in PARTS:
            shutil.rmtree(out / part, ignore_errors=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} is not empty and no demo", hint="choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(stamp, json.dumps(settings))
    return None


def _say(text: str) -> None:
    sys.stderr.write(f"clipkit: {text}\n")
