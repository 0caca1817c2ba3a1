"""The TU collection of graph data sets, from its text files to shards.

A data set is a folder of `NAME_A.txt` (pairs of nodes, numbered from 1 over all graphs),
`NAME_graph_indicator.txt` (each node's graph, in order), `NAME_graph_labels.txt`, and perhaps
`NAME_node_labels.txt` and `NAME_node_attributes.txt`, as its zip file holds them. Node labels become one
column for each value; self-loops and repeated pairs are left out; a graph's label is its `.json`'s "label".

Shapes: N graphs, V nodes, E directed pairs, F features of a node.

References: Morris et al. 2020, "TUDataset: A collection of benchmark datasets for learning with graphs".
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import DataError, NotFoundError
from clipkit.files import atomic_folder
from clipkit_data.batches.graphs import write_graph
from clipkit_data.tools.graphs import Sample, write_graph_shards


def import_tu(
    source: Path, out: Path, *, attributes: bool = False, progress: Callable[[int], Any] | None = None
) -> dict[str, Any]:
    """Write the graphs of a TU data set as shards.

    Args:
        source: The folder with `NAME_A.txt` and the other files.
        out: A new folder; it appears whole or not at all.
        attributes: Also take the nodes' attributes, in front of the columns of their labels.
        progress: Called with 1 after each graph.

    Returns:
        `{"name", "graphs", "features", "labels", "out"}`; features are 0 where nodes have none.

    Raises:
        NotFoundError: No such data set.
        DataError: A file is damaged; says which, and where.
    """
    name = tu_name(source)
    edges_2E, graph_V, labels_N, x_VF = _read(source, name, attributes)

    def counted() -> Iterator[Sample]:
        for sample in _graphs(edges_2E, graph_V, labels_N, x_VF):
            yield sample
            if progress:
                progress(1)

    with atomic_folder(out) as folder:
        count = write_graph_shards(counted(), folder)
    features, labels = 0 if x_VF is None else x_VF.shape[1], sorted(set(labels_N.astype(str).tolist()))
    return {"name": name, "graphs": count, "features": features, "labels": labels, "out": str(out)}


def tu_name(source: Path) -> str:
    """The name of the data set in a folder. Raises: NotFoundError unless there is exactly one."""
    names = [path.name.removesuffix("_A.txt") for path in sorted(source.glob("*_A.txt"))]
    if len(names) != 1:
        found = f"it has {', '.join(names)}" if names else "it has no NAME_A.txt"
        raise NotFoundError(
            f"{source} is no folder of one TU data set: {found}",
            hint="give the folder that the zip file makes",
        )
    return names[0]


def _read(
    source: Path, name: str, attributes: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Pairs (2, E) without loops and repetitions, each node's graph (V,), labels (N,), features (V, F)."""
    graph_V = _numbers(source / f"{name}_graph_indicator.txt")[:, 0] - 1
    labels_N = _numbers(source / f"{name}_graph_labels.txt")[:, 0]
    graphs = graph_V[-1] + 1 if len(graph_V) else 0
    if len(graph_V) == 0 or graph_V[0] != 0 or (np.diff(graph_V) < 0).any() or len(labels_N) != graphs:
        raise DataError(
            f"{source}: {name}_graph_indicator.txt must go up from 1 to {len(labels_N)}, the number of labels"
        )
    pairs_E2 = _numbers(source / f"{name}_A.txt", columns=2) - 1
    if pairs_E2.size and not (pairs_E2.min() >= 0 and pairs_E2.max() < len(graph_V)):
        raise DataError(
            f"{source}: {name}_A.txt names nodes {pairs_E2.min() + 1} to {pairs_E2.max() + 1}, "
            f"there are {len(graph_V)}"
        )
    apart = np.flatnonzero(graph_V[pairs_E2[:, 0]] != graph_V[pairs_E2[:, 1]])
    if len(apart):
        raise DataError(f"{source}: {name}_A.txt line {apart[0] + 1}: the two nodes are of different graphs")
    edges_E2 = np.unique(pairs_E2[pairs_E2[:, 0] != pairs_E2[:, 1]], axis=0)
    return edges_E2.T, graph_V, labels_N, _features(source, name, len(graph_V), attributes)


def _features(source: Path, name: str, nodes: int, attributes: bool) -> np.ndarray | None:
    """Attributes and one column for each value of each label, (V, F); None without any."""
    columns: list[np.ndarray] = []
    path = source / f"{name}_node_attributes.txt"
    if attributes:
        columns += list(_of_nodes(path, nodes, np.float64).T)
    path = source / f"{name}_node_labels.txt"
    if path.exists():
        for label_V in _of_nodes(path, nodes, np.int64).T:
            columns += [label_V == value for value in range(label_V.min(), label_V.max() + 1)]
    return np.stack(columns, axis=1).astype(np.float32) if columns else None


def _of_nodes(path: Path, nodes: int, dtype: type) -> np.ndarray:
    numbers = _numbers(path, dtype)
    if len(numbers) != nodes:
        raise DataError(f"{path} has {len(numbers)} lines, there are {nodes} nodes")
    return numbers


def _numbers(path: Path, dtype: type = np.int64, columns: int | None = None) -> np.ndarray:
    """The numbers of a file, lines × columns. Raises: NotFoundError, DataError."""
    if not path.is_file():
        raise NotFoundError(f"no such file: {path}")
    if not path.stat().st_size:
        return np.zeros((0, columns or 1), dtype=dtype)
    try:
        found = np.loadtxt(path, dtype=dtype, delimiter=",", ndmin=2)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if columns is not None and found.shape[1] != columns:
        raise DataError(f"{path} has {found.shape[1]} columns, expected {columns}")
    return found


def _graphs(
    edges_2E: np.ndarray, graph_V: np.ndarray, labels_N: np.ndarray, x_VF: np.ndarray | None
) -> Iterator[Sample]:
    node = np.searchsorted(graph_V, np.arange(len(labels_N) + 1))
    edge = np.searchsorted(edges_2E[0], node)  # pairs are sorted by their first node
    for number, label in enumerate(labels_N.tolist()):
        first, end = node[number : number + 2].tolist()
        own_2E = edges_2E[:, edge[number] : edge[number + 1]] - first
        meta = {"label": str(label), "nodes": end - first, "pairs": own_2E.shape[1]}
        yield write_graph(own_2E, None if x_VF is None else x_VF[first:end], nodes=end - first), meta
