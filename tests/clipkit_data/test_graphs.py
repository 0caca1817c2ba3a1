"""Graphs in shards: what is refused, batches, families, the atlas, and the TU reader beside another one."""

import argparse
import json
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import ArtifactError, ConfigError, DataError, NotFoundError
from clipkit.models.towers_graph import torch_geometric
from clipkit_data.batches.graphs import Graphs, read_graph, write_graph
from clipkit_data.batches.loader import TrainBatches
from clipkit_data.dataset import ShardDataset
from clipkit_data.graph_commands import GRAPHS
from clipkit_data.known_commands import KNOWN
from clipkit_data.records import Record, RecordError
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.graphs import FAMILIES, family_graph, write_atlas, write_families
from clipkit_data.tools.tu_graphs import import_tu

EDGES = np.array([[0, 1], [1, 0]])
NAN = np.array([[0.0], [np.nan]])


def npz(**arrays: Any) -> bytes:
    buffer = BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@given(
    pairs=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=20),
    features=st.integers(0, 3),
    attributes=st.booleans(),
)
def test_a_graph_comes_back_as_it_was_written(
    pairs: list[tuple[int, int]], features: int, attributes: bool
) -> None:
    edges_2E = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    x_VF = np.arange(9.0 * features).reshape(9, features) if features else None
    attributes_EA = np.arange(2.0 * len(pairs)).reshape(-1, 2) if attributes else None
    data = write_graph(edges_2E, x_VF, nodes=9, attributes_EA=attributes_EA)
    assert data == write_graph(edges_2E, x_VF, nodes=9, attributes_EA=attributes_EA)
    found = read_graph(data, "a graph")
    assert np.array_equal(found["edge_index"], edges_2E)
    assert np.array_equal(found["x"], np.ones((9, 1)) if x_VF is None else x_VF)
    assert ("edge_attr" in found) == attributes
    assert {name: array.dtype.name for name, array in found.items()} == {
        name: "int64" if name == "edge_index" else "float32" for name in found
    }


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (b"no zip file", "unreadable graph", "not a graph"),
        (npz(edge_index=EDGES)[:-30], "unreadable graph", "not a graph"),
        (npz(edge_index=np.array([{}], dtype=object)), "unreadable graph", "allow_pickle"),
        (
            npz(x=np.ones((2, 1))),
            "invalid graph",
            "edge_index must be integers of shape .2, E., it is missing",
        ),
        (npz(edge_index=EDGES.astype(float)), "invalid graph", "float64"),
        (npz(edge_index=EDGES[:1]), "invalid graph", r"\(1, 2\)"),
        (npz(edge_index=EDGES, x=np.ones((1, 1))), "invalid graph", "nodes 0 to 1, the graph has 1"),
        (npz(edge_index=EDGES - 1, x=np.ones((2, 1))), "invalid graph", "nodes -1 to 0"),
        (npz(edge_index=EDGES, x=np.ones(2)), "invalid graph", r"shape \(nodes, F\)"),
        (npz(edge_index=EDGES, x=np.ones((2, 0))), "invalid graph", "no columns"),
        (npz(edge_index=EDGES, x=NAN), "invalid graph", "not finite"),
        (npz(edge_index=EDGES, x=np.full((2, 1), 1e39)), "invalid graph", "not finite in float32"),
        (npz(edge_index=EDGES, edge_attr=NAN), "invalid graph", "edge_attr has no columns, or"),
        (npz(edge_index=EDGES, edge_attr=np.ones((3, 1))), "invalid graph", r"edge_attr .* shape \(2, A\)"),
        (npz(edge_index=EDGES[:, :0]), "invalid graph", "0 nodes"),
        (npz(edge_index=EDGES, num_nodes=10**12), "invalid graph", "nodes, expected 1 to"),
        (npz(edge_index=EDGES, num_nodes=2.0), "invalid graph", "num_nodes must be one integer"),
    ],
)
def test_what_is_no_graph_is_refused_with_a_short_reason(data: bytes, reason: str, words: str) -> None:
    with pytest.raises(RecordError, match=words) as caught:
        read_graph(data, "00000.tar: 7")
    assert caught.value.reason == reason
    assert str(caught.value).startswith("00000.tar: 7: ")


def record(data: bytes, extension: str = "graph.npz") -> Record:
    return Record((0, 0), "7", data, None, extension=extension)


def test_a_content_refuses_samples_that_do_not_fit_the_model() -> None:
    two = write_graph(EDGES, np.ones((2, 2)), nodes=2)
    assert Graphs(2).load(record(two)).num_nodes == 2
    for content, sample, reason in (
        (Graphs(1), record(two), "other node features"),
        (Graphs(), record(b"", ""), "missing graph"),
        (Graphs(), record(two, "jpg"), "missing graph"),
    ):
        with pytest.raises(RecordError) as caught:
            content.load(sample)
        assert caught.value.reason == reason


def test_a_batch_is_torch_geometrics_also_of_no_graphs() -> None:
    content = Graphs(1)
    plain = content.load(record(write_graph(EDGES, nodes=3)))
    with_pairs = content.load(record(write_graph(EDGES, nodes=2, attributes_EA=np.ones((2, 1)))))
    batch = content.stack([with_pairs, plain])
    assert batch.num_graphs == 2
    assert batch.ptr.tolist() == [0, 2, 5]
    assert batch.edge_index.tolist() == [[0, 1, 2, 3], [1, 0, 3, 2]]
    assert "edge_attr" not in batch  # not every graph has some
    assert "edge_attr" in content.stack([with_pairs])
    none = content.stack([])
    assert (none.num_graphs, none.x.shape, none.edge_index.shape) == (0, (0, 1), (2, 0))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of six graphs of each family to train on, and two held out."""
    folder = tmp_path_factory.mktemp("graphs") / "families"
    result = write_families(folder, train=6, heldout=2)
    assert result == {"families": list(FAMILIES), "train": 48, "heldout": 16, "out": str(folder)}
    return folder


def opened(folder: Path) -> ShardDataset:
    return ShardDataset(resolve_shards(str(folder)))


def test_families_differ_in_neither_the_number_of_nodes_nor_of_edges(families: Path) -> None:
    sizes: dict[str, list[tuple[int, int]]] = {}
    for split in ("train", "heldout"):
        dataset = opened(families / split)
        assert not dataset.faults
        for i in range(len(dataset)):
            found, meta = read_graph(dataset[i].image, "a graph"), dataset[i].meta
            assert dataset[i].extension == "graph.npz"
            edges = {(u, v) for u, v in found["edge_index"].T.tolist()}
            assert all((v, u) in edges and u != v for u, v in edges)
            assert (len(found["x"]), len(edges) / 2) == (meta["nodes"], meta["edges"])
            sizes.setdefault(meta["family"], []).append((meta["nodes"], meta["edges"]))
    assert set(sizes) == set(FAMILIES)
    assert len({tuple(found) for found in sizes.values()}) == 1
    assert len(set(sizes["random"])) == 8


@given(number=st.integers(0, 10**6), name=st.sampled_from(list(FAMILIES)))
def test_every_graph_of_every_family_can_be_drawn_again(number: int, name: str) -> None:
    data, meta = family_graph(name, number, 1)
    assert (data, meta) == family_graph(name, number, 1)
    assert 10 <= meta["nodes"] <= 60
    assert meta["edges"] == read_graph(data, "a graph")["edge_index"].shape[1] // 2


def test_the_atlas_is_every_graph_of_one_to_seven_nodes(tmp_path: Path) -> None:
    result = write_atlas(tmp_path / "atlas")
    assert (result["train"], result["heldout"]) == (1002, 250)
    keys, sizes, kinds = set(), Counter[int](), Counter[str]()
    for split in ("train", "heldout"):
        dataset = opened(tmp_path / "atlas" / split)
        for i in range(len(dataset)):
            found, meta = read_graph(dataset[i].image, "a graph"), dataset[i].meta
            graph = nx.empty_graph(len(found["x"]))
            graph.add_edges_from(found["edge_index"].T.tolist())
            nx.set_node_attributes(graph, dict.fromkeys(graph, "node"), "kind")
            keys.add(nx.weisfeiler_lehman_graph_hash(graph, node_attr="kind"))
            sizes[len(graph)] += 1
            kinds[meta["triangles"]] += 1
            assert meta["connected"] == ("yes" if nx.is_connected(graph) else "no")
            assert (meta["triangles"] == "0") == (nx.transitivity(graph) == 0)
    assert dict(sizes) == {1: 1, 2: 2, 3: 4, 4: 11, 5: 34, 6: 156, 7: 1044}  # OEIS A000088
    assert set(kinds) == {"0", "1", "2", "3", "4+"}
    assert len(keys) > 1100  # the hash cannot tell all apart


def test_a_folder_of_graphs_is_not_overwritten(families: Path) -> None:
    with pytest.raises(ArtifactError, match="already exists"):
        write_families(families)
    with pytest.raises(ConfigError, match="at least 1 graph"):
        write_families(families / "more", train=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_graphs_do_not_depend_on_workers(families: Path, workers: int) -> None:
    batches = TrainBatches(
        opened(families / "train"), Graphs(1), None, batch_size=10, workers=workers, label="family"
    )
    batch = next(iter(batches))
    assert batch.images.num_graphs == 10
    assert len(batch.labels.unique()) <= 8
    moved = batch.to("cpu")
    alone = next(iter(TrainBatches(opened(families / "train"), Graphs(1), None, batch_size=10)))
    assert torch.equal(moved.images.edge_index, alone.images.edge_index)
    assert torch.equal(moved.sample_ids, alone.sample_ids)


@pytest.fixture
def tiny_tu(tmp_path: Path) -> Path:
    """Three graphs, of 3, 1 and 2 nodes, as the collection's files: with a loop, and a pair given twice.

    Where the last graph has no edge, torch_geometric loses it.
    """
    files = {
        "A": "1, 2\n2, 1\n2, 3\n3, 2\n3, 2\n3, 3\n6, 5\n5, 6\n",
        "graph_indicator": "1\n1\n1\n2\n3\n3\n",
        "graph_labels": "1\n-1\n1\n",
        "node_labels": "3\n4\n3\n6\n3\n4\n",
        "node_attributes": "0.5, 1\n1.5, 2\n-2, 3\n0, 4\n7, 5\n1e-1, 6\n",
    }
    raw = tmp_path / "TINY" / "raw"
    raw.mkdir(parents=True)
    for name, text in files.items():
        (raw / f"TINY_{name}.txt").write_text(text)
    return raw


@pytest.mark.parametrize("attributes", [False, True])
@pytest.mark.parametrize("missing", [(), ("node_attributes",), ("node_labels", "node_attributes")])
def test_a_tu_data_set_is_what_torch_geometric_reads(
    tiny_tu: Path, tmp_path: Path, attributes: bool, missing: tuple[str, ...]
) -> None:
    for name in missing:
        (tiny_tu / f"TINY_{name}.txt").unlink()
    if attributes and missing:
        with pytest.raises(NotFoundError, match="node_attributes"):
            import_tu(tiny_tu, tmp_path / "out", attributes=True)
        return
    result = import_tu(tiny_tu, tmp_path / "out", attributes=attributes)
    torch_geometric()
    from torch_geometric.datasets import TUDataset

    theirs: Any = TUDataset(str(tmp_path), "TINY", use_node_attr=attributes)
    ours = opened(tmp_path / "out")
    assert len(ours) == len(theirs) == result["graphs"] == 3
    assert [ours[i].meta["label"] for i in range(3)] == ["1", "-1", "1"]
    assert result["features"] == theirs.num_node_features
    for i in range(3):
        found = read_graph(ours[i].image, "a graph")
        assert np.array_equal(found["edge_index"], theirs[i].edge_index.numpy())
        x_VF = torch.ones(theirs[i].num_nodes, 1) if theirs[i].x is None else theirs[i].x
        assert np.array_equal(found["x"], x_VF.numpy())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("A", "1, 9\n", "nodes 1 to 9, there are 6"),
        ("A", "0, 1\n", "nodes 0 to 1"),
        ("A", "1, 2\n3, 4\n", "line 2: the two nodes are of different graphs"),
        ("A", "1\n2\n", "1 columns, expected 2"),
        ("A", "1, x\n", "TINY_A.txt: could not convert string ' x'"),
        ("graph_indicator", "1\n1\n2\n1\n3\n3\n", "must go up from 1 to 3"),
        ("graph_indicator", "", "must go up from 1 to 3"),
        ("graph_labels", "1\n1\n", "must go up from 1 to 2"),
        ("node_labels", "1\n", "has 1 lines, there are 6 nodes"),
    ],
)
def test_a_damaged_tu_file_is_named(tiny_tu: Path, tmp_path: Path, name: str, text: str, words: str) -> None:
    (tiny_tu / f"TINY_{name}.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        import_tu(tiny_tu, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_tu_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"it has no NAME_A\.txt"):
        import_tu(tmp_path, tmp_path / "out")


def test_the_commands_say_what_they_made(
    tiny_tu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [
        (GRAPHS.subcommands["families"], [str(tmp_path / "f"), "--train", "2", "--heldout", "1", "--json"]),
        (KNOWN["import"], ["tu", str(tiny_tu), str(tmp_path / "t"), "--attributes", "--json"]),
    ]
    results = []
    for command, words in commands:
        parser = argparse.ArgumentParser()
        assert command.arguments is not None
        assert command.run is not None
        command.arguments(parser)
        assert command.run(parser.parse_args(words)) == 0
        results.append(capsys.readouterr())
    assert "16 graphs to train on, 8 held out; families: random" in results[0].err
    assert json.loads(results[0].out)["heldout"] == 8
    assert "3 graphs of TINY, labels -1, 1, 6 features of each node" in results[1].err
    assert json.loads(results[1].out)["features"] == 6
