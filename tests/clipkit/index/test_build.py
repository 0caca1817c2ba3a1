"""build_index: what it writes, that others can read it, and what it refuses."""

import json
import math
from collections.abc import Callable
from datetime import date
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from clipkit.errors import ArtifactError, DataError, NotFoundError
from clipkit.files import sha256_file, write_manifest
from clipkit.index import Index, build_index

Write = Callable[..., Path]


def test_layout_and_manifest(tmp_path: Path, index_path: Path) -> None:
    assert (index_path / "CURRENT").read_text() == "000001\n"
    snapshot = index_path / "snapshots" / "000001"
    manifest = json.loads((snapshot / "clipkit.json").read_text())
    assert manifest["kind"] == "index"
    assert manifest["embeddings"] == sha256_file(tmp_path / "embeddings" / "clipkit.json")
    assert manifest["model"]["name"] == "a-model"
    assert (manifest["rows"], manifest["dim"], manifest["metric"]) == (200, 16, "inner_product")
    assert (manifest["engine"], manifest["parent"], manifest["next_id"]) == ("flat", None, 200)
    assert set(manifest["files"]) == {
        "image.index",
        "items.sqlite",
        "metadata/metadata_0.parquet",
        "metadata/metadata_1.parquet",
        "metadata/metadata_2.parquet",
    }
    leftovers = [path for path in index_path.rglob(".*") if path.name != ".lock"]
    assert leftovers == []


def test_faiss_and_parquet_are_read_as_clip_retrieval_reads_them(
    index_path: Path, vectors: np.ndarray
) -> None:
    """`clip-retrieval back` reads image.index, and row r of the sorted parquet parts for faiss id r."""
    snapshot = index_path / "snapshots" / "000001"
    index = faiss.read_index(str(snapshot / "image.index"))
    _, ids, found = index.search_and_reconstruct(vectors[[150]], 3)
    assert ids[0, 0] == 150
    np.testing.assert_allclose(found[0, 0], vectors[150], atol=1e-3)
    captions = [
        caption
        for part in sorted((snapshot / "metadata").glob("*.parquet"))
        for caption in pq.read_table(part)["caption"].to_pylist()
    ]
    assert captions[150] == "picture 150"


def test_row_r_is_id_r_where_pictures_were_left_out(
    tmp_path: Path, vectors: np.ndarray, write_embeddings: Write
) -> None:
    source = write_embeddings(tmp_path / "e", vectors[:4], parts=2, ids=[5, 1, 2, 0])
    path = build_index(source, tmp_path / "i")
    table = pq.read_table(path / "snapshots" / "000001" / "metadata")
    assert table["id"].to_pylist() == [0, 1, 2, None, None, 5]
    with Index.open(path) as index:
        assert [item["caption"] for item in index.items([5, 0])] == ["picture 5", "picture 0"]
        assert index.search(vectors[[3]], 1)[1].tolist() == [[0]]


def test_vectors_are_normalised_again(index_path: Path, vectors: np.ndarray) -> None:
    with Index.open(index_path) as index:
        stored = index.vectors(range(200))
        half = vectors.astype(np.float16).astype(np.float64)
        expected = half / np.linalg.norm(half, axis=1, keepdims=True)
        np.testing.assert_allclose(stored, expected, atol=1e-7)


def test_metadata_values_become_json(tmp_path: Path, vectors: np.ndarray, write_embeddings: Write) -> None:
    columns = {
        "score": [math.nan, 0.5],
        "keywords": [["a", "b"], None],
        "day": [date(2024, 2, 29), None],
        "name_zh": ["气球", None],
    }
    path = build_index(write_embeddings(tmp_path / "e", vectors[:2], columns=columns), tmp_path / "i")
    with Index.open(path) as index:
        first, second = index.items([0, 1])
    expected = {"image_path": "000000000", "caption": "picture 0", "score": None, "keywords": ["a", "b"]}
    assert first == {**expected, "day": "2024-02-29", "name_zh": "气球"}
    assert second["score"] == 0.5
    assert second["keywords"] is None


def test_thumbnails_are_optional(tmp_path: Path, vectors: np.ndarray, write_embeddings: Write) -> None:
    path = build_index(write_embeddings(tmp_path / "e", vectors, thumbnails=False), tmp_path / "i")
    with Index.open(path) as index:
        assert index.thumbnail(3) is None


def test_eleven_parts_keep_their_order(tmp_path: Path, vectors: np.ndarray, write_embeddings: Write) -> None:
    path = build_index(write_embeddings(tmp_path / "e", vectors, parts=11), tmp_path / "i")
    with Index.open(path) as index:
        assert index.items([199])[0]["caption"] == "picture 199"
        assert index.search(vectors[[199]], 1)[1][0, 0] == 199


def test_progress_counts_every_item(tmp_path: Path, vectors: np.ndarray, write_embeddings: Write) -> None:
    done: list[int] = []
    build_index(write_embeddings(tmp_path / "e", vectors, parts=2), tmp_path / "i", progress=done.append)
    assert sum(done) == 200


def test_building_again_makes_the_next_snapshot(
    tmp_path: Path, index_path: Path, vectors: np.ndarray, write_embeddings: Write
) -> None:
    old = Index.open(index_path)
    more = write_embeddings(tmp_path / "more", np.concatenate([vectors, -vectors]))
    for _ in range(3):
        build_index(more, index_path)
    assert len(Index.open(index_path)) == 400
    assert sorted(p.name for p in (index_path / "snapshots").iterdir()) == ["000003", "000004"]
    assert len(old) == 200
    assert old.items([7])[0]["caption"] == "picture 7"
    assert old.refresh() is True
    assert old.refresh() is False
    assert len(old) == 400


@pytest.mark.parametrize("where", ["img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"])
def test_damaged_embeddings_are_refused(
    tmp_path: Path, vectors: np.ndarray, write_embeddings: Write, where: str
) -> None:
    source = write_embeddings(tmp_path / "e", vectors)
    data = bytearray((source / where).read_bytes())
    data[len(data) // 2] ^= 1
    (source / where).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{where}.*SHA-256"):
        build_index(source, tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_refusals(tmp_path: Path, vectors: np.ndarray, write_embeddings: Write) -> None:
    good = write_embeddings(tmp_path / "good", vectors)
    with pytest.raises(NotFoundError, match=r"unknown index engine 'hnsw'.*known: flat"):
        build_index(good, tmp_path / "i", engine="hnsw")
    with pytest.raises(NotFoundError, match="no such folder"):
        build_index(tmp_path / "nowhere", tmp_path / "i")
    with pytest.raises(ArtifactError, match=r"holds other things than an index: clipkit\.json, img_emb"):
        build_index(good, good)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is no folder"):
        build_index(good, tmp_path / "file")
    with pytest.raises(DataError, match="id 5 is given 2 times"):
        build_index(write_embeddings(tmp_path / "twice", vectors[:3], ids=[1, 5, 5]), tmp_path / "i")
    with pytest.raises(DataError, match="row 1 has the negative id -1"):
        build_index(write_embeddings(tmp_path / "negative", vectors[:3], ids=[1, -1, 5]), tmp_path / "i")
    with pytest.raises(DataError, match="holds no pictures"):
        build_index(write_embeddings(tmp_path / "none", vectors[:0]), tmp_path / "i")
    broken = vectors[:3].copy()
    broken[1, 4] = np.nan
    with pytest.raises(DataError, match=r"row 1 of .*img_emb_0.npy has a value that is not finite"):
        build_index(write_embeddings(tmp_path / "nan", broken), tmp_path / "i")
    with pytest.raises(DataError, match=r"row 0 of .*img_emb_0.npy has length 0"):
        build_index(write_embeddings(tmp_path / "zero", np.zeros((2, 4))), tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_rows_that_do_not_match_their_manifest(
    tmp_path: Path, vectors: np.ndarray, write_embeddings: Write
) -> None:
    source = write_embeddings(tmp_path / "e", vectors)
    model = {"dim": 16, "fingerprint": "f", "name": "m"}
    write_manifest(source, "embeddings", model=model, rows=9, parts=[{"rows": 9}])
    with pytest.raises(DataError, match=r"img_emb_0.npy has shape \(200, 16\), its manifest says \(9, 16\)"):
        build_index(source, tmp_path / "i")
    write_manifest(source, "embeddings", model=model, rows=200, parts=[{"rows": 100}, {"rows": 100}])
    with pytest.raises(ArtifactError, match="has 1 img_emb and 1 metadata parts, its manifest names 2"):
        build_index(source, tmp_path / "i")
    write_manifest(source, "embeddings", model={}, rows=200, parts=[])
    with pytest.raises(ArtifactError, match=r"lacks model\.dim or parts"):
        build_index(source, tmp_path / "i")
