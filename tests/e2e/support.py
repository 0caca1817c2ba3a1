"""Running clipkit as a person does: commands as processes, a service on a real port, a real browser."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from clipkit_data.dataset import ShardDataset
from clipkit_data.sources import resolve_shards

PICTURES = 600
CLIPKIT = [sys.executable, "-m", "clipkit"]


@dataclass(frozen=True)
class Walk:
    """The folders of the walk, and what the commands printed."""

    root: Path
    pictures: Path
    shards: Path
    model: Path
    embeddings: Path
    index: Path
    printed: dict[str, dict]


def clipkit(
    *words: object, cwd: Path, code: int = 0, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a clipkit command and check its exit code."""
    done = subprocess.run(
        [*CLIPKIT, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def write_pictures(folder: Path, count: int) -> Path:
    """A person's own folder: pictures, and a table of paths and captions beside them."""
    (folder / "pictures").mkdir(parents=True)
    dataset = ShardDataset(resolve_shards("sample:emoji/train"))
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as table:
        for position in range(count):
            record = dataset[position]
            path = f"pictures/{position:04d}.webp"
            (folder / path).write_bytes(record.image)
            kept = {key: record.meta[key] for key in ("name", "name_zh", "keywords", "emoji", "base")}
            table.write(json.dumps({"path": path, "caption": record.caption, **kept}) + "\n")
    dataset.close()
    return folder / "captions.jsonl"


def wait_for_url(process: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> str:
    """The address that a service says it serves on, once it is ready."""
    for _ in range(int(seconds * 5)):
        assert process.poll() is None, log.read_text()
        for word in log.read_text().split():
            if word.startswith("http://127.0.0.1:"):
                url = word.rstrip(".,)")
                if httpx.get(f"{url}/readyz").status_code == 200:
                    return url
        time.sleep(0.2)
    raise AssertionError(f"not ready after {seconds} s: {log.read_text()}")


def chromium_path() -> str | None:
    """Where the browser is, if there is one. In CI there must be."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found or "CI" not in os.environ, "CI must have chromium: see .ci/run"
    return found
