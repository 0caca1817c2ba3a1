"""Adding and deleting: each change is one new snapshot, all or nothing, seen by other handles on refresh."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from clipkit.errors import ArtifactError, InputError, NotFoundError
from clipkit.index import Index, build_index, layout

Write = Callable[..., Path]


def test_add(index_path: Path) -> None:
    index, other = Index.open(index_path), Index.open(index_path)
    new = index.add(
        np.eye(16)[:2] * 7,
        [{"caption": "one", "tags": ["x"]}, {"caption": "two"}],
        thumbnails=[b"webp", None],
    )
    assert new.tolist() == [200, 201]
    assert len(index) == 202
    assert index.search(np.eye(16)[:1], 1)[1][0, 0] == 200
    assert index.search(np.eye(16)[:1], 1)[0][0, 0] == pytest.approx(1, abs=1e-6)
    assert index.items([200, 201]) == [{"caption": "one", "tags": ["x"]}, {"caption": "two"}]
    assert (index.thumbnail(200), index.thumbnail(201), index.thumbnail(5)) == (b"webp", None, b"picture 5")
    assert index.manifest["parent"] == {"snapshot": "000001", "sha256": other.current.digest}
    assert index.manifest["model"] == other.manifest["model"]
    assert index.manifest["embeddings"] == other.manifest["embeddings"]
    assert len(other) == 200
    assert other.refresh()
    assert len(other) == len(Index.open(index_path)) == 202
    table = pq.read_table(index.current.folder / "metadata")
    assert table["caption"].to_pylist()[199:] == ["picture 199", "one", "two"]
    assert table["tags"].to_pylist()[199:] == [None, ["x"], None]


def test_delete_erases_and_never_gives_the_id_again(index_path: Path) -> None:
    index = Index.open(index_path)
    before = index.vectors([4])
    assert index.delete([3, 199]) == 2
    assert len(index) == 198
    assert 3 not in index.search(before, 198)[1]
    assert index.search(before, 1)[1][0, 0] == 4
    np.testing.assert_array_equal(index.vectors([4]), before)
    with pytest.raises(NotFoundError, match="id 3"):
        index.items([3])
    folder = index.current.folder
    for file in folder.rglob("*"):
        assert file.is_dir() or b"picture 199" not in file.read_bytes()
    table = pq.read_table(folder / "metadata")
    assert table["id"].to_pylist() == [0, 1, 2, None, *range(4, 199)]
    assert table["caption"].to_pylist()[2:5] == ["picture 2", None, "picture 4"]
    assert index.add(np.eye(16)[:1], [{"caption": "new"}]).tolist() == [200]
    table = pq.read_table(index.current.folder / "metadata")
    assert table["caption"].to_pylist()[198:] == ["picture 198", None, "new"]


def test_delete_everything_and_start_again(
    tmp_path: Path, vectors: np.ndarray, write_embeddings: Write
) -> None:
    index = Index.open(build_index(write_embeddings(tmp_path / "e", vectors[:2]), tmp_path / "i"))
    assert index.delete(index.ids) == 2
    assert len(Index.open(tmp_path / "i")) == 0
    assert index.search(vectors[:1], 2)[1].tolist() == [[-1, -1]]
    with pytest.raises(NotFoundError, match="id 0"):
        index.vectors([0])
    assert index.add(vectors[:1], [{"caption": "back"}]).tolist() == [2]
    assert index.search(vectors[:1], 2)[1].tolist() == [[2, -1]]


def test_own_ids(index_path: Path, vectors: np.ndarray) -> None:
    index = Index.open(index_path)
    assert index.add(vectors[:2], [{}, {}], ids=[10**12, 500]).tolist() == [10**12, 500]
    assert index.add(vectors[:1], [{}]).tolist() == [10**12 + 1]
    assert index.items([500]) == [{}]
    assert len(pq.read_table(index.current.folder / "metadata")) == 203


def test_nothing_to_do_makes_no_snapshot(index_path: Path) -> None:
    index = Index.open(index_path)
    assert index.add(np.zeros((0, 16)), []).tolist() == []
    assert index.delete([]) == 0
    assert index.current.folder.name == "000001"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": [3]}, "has an item with id 3 already"),
        ({"ids": [-4]}, "id -4 is negative"),
        ({"ids": [1.5]}, "not a list of whole numbers"),
        ({"ids": [300, 301]}, "1 vectors came with 2 ids"),
        ({"metadata": []}, "1 vectors came with 0 metadata"),
        ({"metadata": ["text"]}, "metadata 0 is not a mapping"),
        ({"metadata": [{"id": 4}]}, "without the key 'id'"),
        ({"metadata": [{"x": float("nan")}]}, "metadata 0 is not JSON"),
        ({"metadata": [{"x": object()}]}, "metadata 0 is not JSON"),
        ({"metadata": [{"caption": 5}]}, "field 'caption' does not fit the index, where it is string"),
        ({"thumbnails": ["text"]}, "thumbnail 0 is str, not bytes"),
        ({"thumbnails": []}, "1 vectors came with 0 thumbnails"),
        ({"vectors": np.zeros((1, 16))}, "length 0"),
    ],
)
def test_a_refused_add_changes_nothing(index_path: Path, arguments: dict[str, Any], message: str) -> None:
    index = Index.open(index_path)
    with pytest.raises(InputError, match=message):
        index.add(**{"vectors": np.ones((1, 16)), "metadata": [{}], **arguments})
    assert index.current.folder.name == "000001"
    assert (index_path / "CURRENT").read_text() == "000001\n"
    assert [p.name for p in (index_path / "snapshots").iterdir()] == ["000001"]


def test_ids_given_twice(index_path: Path) -> None:
    index = Index.open(index_path)
    with pytest.raises(InputError, match="id 300 is given more than once"):
        index.add(np.ones((2, 16)), [{}, {}], ids=[300, 300])
    with pytest.raises(InputError, match="id 3 is given more than once"):
        index.delete([3, 4, 3])


def test_unknown_ids_are_listed_and_nothing_is_deleted(index_path: Path) -> None:
    index = Index.open(index_path)
    with pytest.raises(NotFoundError, match=r"no item with id 200, 201, .* 209 and 5 more"):
        index.delete([1, *range(200, 215)])
    assert len(index) == len(Index.open(index_path)) == 200


def test_a_handle_builds_on_what_others_wrote(index_path: Path) -> None:
    first, second = Index.open(index_path), Index.open(index_path)
    first.add(np.eye(16)[:1], [{"by": "first"}])
    assert second.add(np.eye(16)[1:2], [{"by": "second"}]).tolist() == [201]
    assert len(Index.open(index_path)) == 202


def test_threads_with_their_own_handles_lose_nothing(index_path: Path) -> None:
    def write(name: str) -> None:
        handle = Index.open(index_path)
        for _ in range(3):
            handle.add(np.ones((1, 16)), [{"by": name}])

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index = Index.open(index_path)
    assert len(index) == 209
    assert sorted(item["by"] for item in index.items(range(200, 209))) == list("aaabbbccc")


def test_opening_while_snapshots_are_replaced(index_path: Path) -> None:
    """A snapshot that is removed while it is being opened is not an error: the next one is opened."""
    writer = threading.Thread(
        target=lambda: [Index.open(index_path).add(np.ones((1, 16)), [{}]) for _ in range(15)]
    )
    writer.start()
    opened = []
    while writer.is_alive():
        with Index.open(index_path) as index:
            opened.append(len(index))
    writer.join()
    assert opened == sorted(opened)
    assert len(Index.open(index_path)) == 215


def test_a_second_writer_is_told_to_wait(index_path: Path) -> None:
    with (
        layout.writing(index_path),
        pytest.raises(ArtifactError, match="another process is writing"),
        layout.writing(index_path, timeout=0.05),
    ):
        pass


def test_an_index_that_was_built_anew_under_the_same_name(
    tmp_path: Path, index_path: Path, vectors: np.ndarray, write_embeddings: Write
) -> None:
    index = Index.open(index_path)
    index_path.rename(tmp_path / "gone")
    build_index(write_embeddings(tmp_path / "new", vectors[:5]), index_path)
    assert index.refresh()
    assert len(index) == 5
