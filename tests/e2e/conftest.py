"""One walk through the whole path, by the commands a person types, shared by every end-to-end test.

A folder of emoji pictures with a table of captions is packed, trained on for half a minute, embedded,
indexed and served as a process on a free port. Each step is a real process that sees only files.
"""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.e2e.support import CLIPKIT, PICTURES, Walk, clipkit, wait_for_url, write_pictures


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """pack → check → train 30 s → evaluate → embed → index."""
    root = tmp_path_factory.mktemp("walk")
    table = write_pictures(root / "own", PICTURES)
    printed = {}

    def step(name: str, *words: object) -> None:
        printed[name] = json.loads(clipkit(*words, "--json", cwd=root).stdout.splitlines()[-1])

    step("pack", "shards", "pack", table, "shards", "--per-shard", 250)
    step("check", "shards", "check", "shards")
    budget = ("--max-minutes", "0.5", "--data.heldout", "None")
    small = ("--data.batch-size", "96", "--optim.warmup-steps", "5")  # many steps, also on a busy machine
    step("train", "train", "clip-emoji", "--data.train", "shards", *budget, *small, "--run", "run")
    step("evaluate", "evaluate", "run/model", "--data", "shards")
    step("embed", "embed", "run/model", "shards", "embeddings")
    step("build", "index", "build", "embeddings", "index")
    step("info", "index", "info", "index")
    return Walk(
        root,
        root / "own/pictures",
        root / "shards",
        root / "run/model",
        root / "embeddings",
        root / "index",
        printed,
    )


@pytest.fixture(scope="session")
def server_url(walk: Walk) -> Iterator[str]:
    """The address of a service process over the walk's model and index."""
    log = walk.root / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*CLIPKIT, "serve", "--model", "run/model", "--index", "index", "--port", "0"],
            cwd=walk.root,
            stdout=file,
            stderr=file,
        )
    try:
        yield wait_for_url(process, log)
    finally:
        process.terminate()
        process.wait(30)
