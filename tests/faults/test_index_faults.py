"""A damaged index is refused before faiss or SQLite read it; kill -9 leaves the old index or the new one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clipkit.errors import ArtifactError, ClipkitError, DependencyError, NotFoundError
from clipkit.files import write_manifest
from clipkit.index import Index, build_index

Write = Callable[..., Path]
SNAPSHOT = Path("snapshots/000001")


@pytest.fixture
def index_path(tmp_path: Path, write_embeddings: Write) -> Path:
    vectors = np.random.default_rng(0).standard_normal((20, 8))
    return build_index(write_embeddings(tmp_path / "embeddings", vectors), tmp_path / "index")


def reseal(index_path: Path, **changes: object) -> None:
    """Write the snapshot's manifest anew over the files as they are now."""
    manifest = json.loads((index_path / SNAPSHOT / "clipkit.json").read_text())
    fields = {k: v for k, v in manifest.items() if k not in ("kind", "format", "clipkit", "created", "files")}
    write_manifest(index_path / SNAPSHOT, "index", **{**fields, **changes})


@pytest.mark.parametrize("name", ["image.index", "items.sqlite", "metadata/metadata_0.parquet"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.99])
def test_one_flipped_bit(index_path: Path, name: str, where: float) -> None:
    file = index_path / SNAPSHOT / name
    data = bytearray(file.read_bytes())
    data[int(len(data) * where)] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name} is not the file .*SHA-256"):
        Index.open(index_path)


@pytest.mark.parametrize(
    "name", ["image.index", "items.sqlite", "metadata/metadata_0.parquet", "clipkit.json"]
)
def test_a_missing_file(index_path: Path, name: str) -> None:
    (index_path / SNAPSHOT / name).unlink()
    with pytest.raises(
        ArtifactError, match=r"clipkit\.json" if name == "clipkit.json" else f"{name} is missing"
    ):
        Index.open(index_path)


@pytest.mark.parametrize("name", ["image.index", "items.sqlite"])
@pytest.mark.parametrize("keep", [0, 100])
def test_garbage_under_a_valid_manifest(index_path: Path, name: str, keep: int) -> None:
    """Even a manifest that vouches for it does not make it an index."""
    file = index_path / SNAPSHOT / name
    file.write_bytes(file.read_bytes()[:keep])
    reseal(index_path)
    with pytest.raises(ArtifactError, match=f"{name} cannot be read"):
        Index.open(index_path)


@pytest.mark.parametrize("changes", [{"rows": 19}, {"dim": 9}])
def test_a_manifest_that_says_something_else(index_path: Path, changes: dict[str, int]) -> None:
    reseal(index_path, **changes)
    with pytest.raises(ArtifactError, match=r"image\.index does not fit its manifest: found .*expected"):
        Index.open(index_path)


def test_another_metric_and_another_structure(index_path: Path) -> None:
    import faiss

    file = index_path / SNAPSHOT / "image.index"
    euclidean = faiss.IndexIDMap2(faiss.IndexFlatL2(8))
    euclidean.add_with_ids(np.ones((20, 8), dtype=np.float32), np.arange(20))
    faiss.write_index(euclidean, str(file))
    reseal(index_path)
    with pytest.raises(ArtifactError, match=r"does not fit its manifest.*'metric': 1"):
        Index.open(index_path)
    faiss.write_index(faiss.IndexFlatIP(8), str(file))
    reseal(index_path)
    with pytest.raises(ArtifactError, match="holds a IndexFlatIP, not an IndexIDMap2"):
        Index.open(index_path)


def test_a_manifest_of_another_shape(index_path: Path) -> None:
    manifest = json.loads((index_path / SNAPSHOT / "clipkit.json").read_text())
    del manifest["dim"]
    (index_path / SNAPSHOT / "clipkit.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="lacks dim"):
        Index.open(index_path)
    (index_path / SNAPSHOT / "clipkit.json").write_text("{")
    with pytest.raises(ArtifactError, match="not a clipkit manifest"):
        Index.open(index_path)


def test_what_is_no_index(tmp_path: Path, index_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no such index: .*nowhere.*clipkit index build"):
        Index.open(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="artifact of another kind"):
        Index.open(tmp_path / "embeddings")
    with pytest.raises(ArtifactError, match=r"one snapshot of an index .*open .*index"):
        Index.open(index_path / SNAPSHOT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="no index folder"):
        Index.open(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "../../embeddings", "1", "\x00\xff"])
def test_a_damaged_current(tmp_path: Path, index_path: Path, text: str) -> None:
    (index_path / "CURRENT").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match="CURRENT names no snapshot"):
        Index.open(index_path)
    build_index(tmp_path / "embeddings", index_path)
    assert len(Index.open(index_path)) == 20


def test_current_names_a_snapshot_that_is_missing(index_path: Path) -> None:
    (index_path / "CURRENT").write_text("000009\n")
    with pytest.raises(ArtifactError, match="names snapshot 000009, which is missing"):
        Index.open(index_path)


def test_half_written_snapshots_are_ignored_and_cleared(index_path: Path) -> None:
    snapshots = index_path / "snapshots"
    for name in ("000002", ".000002.x1y2", ".000003.abc.old"):
        (snapshots / name).mkdir()
        (snapshots / name / "image.index").write_bytes(b"half")
    (index_path / ".CURRENT.q1").write_text("0000")
    index = Index.open(index_path)
    assert len(index) == 20
    assert index.add(np.ones((1, 8)), [{}]).tolist() == [20]
    assert sorted(p.name for p in snapshots.iterdir()) == ["000001", "000002"]
    assert sorted(p.name for p in index_path.iterdir()) == [".lock", "CURRENT", "snapshots"]


def test_a_first_build_that_did_not_finish(tmp_path: Path, index_path: Path) -> None:
    (index_path / "CURRENT").unlink()
    with pytest.raises(ArtifactError, match="first build did not finish"):
        Index.open(index_path)
    build_index(tmp_path / "embeddings", index_path)
    assert len(Index.open(index_path)) == 20


def test_a_disk_that_fails_leaves_the_old_index(index_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.open(index_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            index.add(np.ones((1, 8)), [{}])
    assert len(index) == len(Index.open(index_path)) == 20
    assert [p.name for p in (index_path / "snapshots").iterdir()] == ["000001"]
    assert index.add(np.ones((1, 8)), [{}]).tolist() == [20]


def test_without_faiss(index_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DependencyError, match=r"pip install 'clipkit\[cpu\]'"):
        Index.open(index_path)
    with pytest.raises(DependencyError, match=r"pip install 'clipkit\[cpu\]'"):
        build_index(tmp_path / "embeddings", tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Adds three items and then deletes one of them, over and over; dies by itself at the N-th rename or fsync
# when told to. Every state between two changes can be recomputed from the number of items ever added.
WRITER = """
import os, signal, sys
import numpy as np
from clipkit.index import Index, build_index
embeddings, path, die_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
steps = 0
def counted(function):
    def call(*arguments):
        global steps
        steps += 1
        if steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
if die_at:
    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
print("ready", flush=True)
build_index(embeddings, path)
index = Index.open(path)
while True:
    first = index.manifest["next_id"]
    index.add(np.eye(8)[[first % 8] * 3], [{"caption": f"picture {first + i}"} for i in range(3)])
    print("added", flush=True)
    index.delete([first])
    print("deleted", flush=True)
"""


def check_whole(path: Path) -> int:
    """Open the index and check that vectors, items and manifest are of one moment; how much was added."""
    index = Index.open(path)
    added = (index.manifest["next_id"] - 20) // 3
    complete = {*range(20), *(20 + 3 * i + j for i in range(added) for j in (1, 2))}
    last = {20 + 3 * (added - 1)} if added else set()
    assert set(index.ids.tolist()) in (complete, complete | last)
    assert [item["caption"] for item in index.items(index.ids)] == [f"picture {key}" for key in index.ids]
    for i in range(added):
        key = 20 + 3 * i
        np.testing.assert_allclose(index.vectors([key + 1])[0], np.eye(8)[key % 8], atol=1e-6)
    return added


def run_and_kill(
    embeddings: Path, path: Path, *, die_at: int = 0, lines: int = 1, after: float = 0.0
) -> None:
    """Run the writer until it dies by itself, or kill it some seconds after a line that it printed."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(embeddings), str(path), str(die_at)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert writer.stdout is not None
    with writer, writer.stdout:
        for _ in range(lines):
            assert writer.stdout.readline()
        if not die_at:
            time.sleep(after)
            writer.kill()
        assert writer.wait(timeout=60) == -signal.SIGKILL


def recover(embeddings: Path, path: Path) -> int:
    """What a person finds after the kill: an index that opens, or one that says to build it again."""
    if (path / "CURRENT").exists():
        added = check_whole(path)
    else:  # only before the first build came into force
        with pytest.raises(ClipkitError, match=r"did not finish|no such index"):
            Index.open(path)
        added = 0
    build_index(embeddings, path)
    assert check_whole(path) == 0
    assert not [item for item in path.rglob(".*") if item.name != ".lock"]
    return added


@pytest.mark.parametrize("die_at", [1, 5, 11, 12, 14, 25])
def test_killed_at_a_given_rename_or_flush(tmp_path: Path, index_path: Path, die_at: int) -> None:
    for target in (tmp_path / "fresh", index_path):
        run_and_kill(tmp_path / "embeddings", target, die_at=die_at)
        recover(tmp_path / "embeddings", target)


def test_killed_at_random_moments(tmp_path: Path, index_path: Path) -> None:
    rng = random.Random(7)
    added = []
    for i in range(8):
        target = index_path if i % 2 else tmp_path / f"fresh{i}"
        lines, after = rng.choice([1, 1, 2, 3, 6]), rng.uniform(0.0, 0.05)
        run_and_kill(tmp_path / "embeddings", target, lines=lines, after=after)
        added.append(recover(tmp_path / "embeddings", target))
        assert added[-1] >= lines // 2
    assert max(added) > 0
