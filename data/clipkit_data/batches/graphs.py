"""Graphs as the content of samples: `key.graph.npz` in a shard, a `torch_geometric` batch in training.

The file is numpy's `.npz` without pickle. It holds `edge_index`, int64 (2, E): directed pairs of nodes, both
directions of an undirected edge. It may hold `x`, float32 (V, F), features of the nodes; without it every
node has the feature 1, and V is `num_nodes`, or else one more than the largest node in a pair. It may hold
`edge_attr`, float32 (E, A). Everything is checked when it is read: a graph that cannot be right is a fault.
"""

import zlib
from collections.abc import Sequence
from io import BytesIO
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from clipkit.decode import CropOf
from clipkit_data.records import Record, RecordError

MAX_NODES = 1_000_000
_LARGEST = float(np.finfo(np.float32).max)
_UNREADABLE = (BadZipFile, ValueError, OSError, EOFError, KeyError, NotImplementedError, zlib.error)


def write_graph(
    edges_2E: np.ndarray,
    x_VF: np.ndarray | None = None,
    *,
    nodes: int,
    attributes_EA: np.ndarray | None = None,
) -> bytes:
    """The bytes of a `.graph.npz`; the same graph gives the same bytes.

    Args:
        edges_2E: Directed pairs, integers (2, E).
        x_VF: Features of the nodes; None where they have none.
        nodes: V.
        attributes_EA: Attributes of the pairs.
    """
    arrays: dict[str, np.ndarray] = {"edge_index": np.asarray(edges_2E, dtype=np.int64).reshape(2, -1)}
    if x_VF is None:
        arrays["num_nodes"] = np.array(nodes, dtype=np.int64)
    else:
        arrays["x"] = np.asarray(x_VF, dtype=np.float32)
    if attributes_EA is not None:
        arrays["edge_attr"] = np.asarray(attributes_EA, dtype=np.float32)
    buffer = BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def read_graph(data: bytes, where: str) -> dict[str, np.ndarray]:
    """The arrays `edge_index`, `x` and perhaps `edge_attr` of a `.graph.npz`, checked.

    Args:
        data: The file.
        where: What to call it in messages.

    Raises:
        RecordError: It is no such file ("unreadable graph"), or no graph ("invalid graph").
    """
    try:
        with np.load(BytesIO(data), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except _UNREADABLE as error:
        raise RecordError(f"{where}: not a graph's .npz: {error}", "unreadable graph") from error
    fault = _fault(found)
    if fault:
        raise RecordError(f"{where}: {fault}", "invalid graph")
    edges_2E = found["edge_index"].astype(np.int64)
    x_VF = found.get("x")
    if x_VF is None:
        x_VF = np.ones((_nodes(found), 1))
    arrays = {"edge_index": edges_2E, "x": x_VF.astype(np.float32)}
    return arrays | {name: found[name].astype(np.float32) for name in found.keys() & {"edge_attr"}}


def _nodes(found: dict[str, np.ndarray]) -> int:
    """How many nodes a graph has."""
    if "x" in found:
        return len(found["x"])
    return int(found["num_nodes"]) if "num_nodes" in found else int(found["edge_index"].max(initial=-1)) + 1


def _fault(found: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the arrays of a graph, in words; None where nothing is."""
    edges = found.get("edge_index")
    if edges is None or edges.ndim != 2 or edges.shape[0] != 2 or edges.dtype.kind not in "iu":
        shape = "missing" if edges is None else f"{edges.dtype} {edges.shape}"
        return f"edge_index must be integers of shape (2, E), it is {shape}"
    for name, rows in (("x", None), ("edge_attr", edges.shape[1])):
        array = found.get(name)
        if array is None:
            continue
        if array.ndim != 2 or array.dtype.kind not in "fiub" or (rows is not None and len(array) != rows):
            shape = "(nodes, F)" if rows is None else f"({rows}, A)"
            return f"{name} must be numbers of shape {shape}, it is {array.dtype} {array.shape}"
        if not array.shape[1] or not (np.abs(array.astype(np.float64)) <= _LARGEST).all():
            return f"{name} has no columns, or numbers that are not finite in float32"
    if "num_nodes" in found and (found["num_nodes"].shape or found["num_nodes"].dtype.kind not in "iu"):
        return "num_nodes must be one integer"
    nodes = _nodes(found)
    if not 1 <= nodes <= MAX_NODES:
        return f"it has {nodes} nodes, expected 1 to {MAX_NODES:,}"
    if edges.size and not (edges.min() >= 0 and edges.max() < nodes):
        return f"edge_index names nodes {edges.min()} to {edges.max()}, the graph has {nodes}"
    return None


class Graphs:
    """Graphs as a model wants to see them: a `Content` for batches.

    Args:
        features: How many features each node must have; None takes what comes.

    Raises:
        DependencyError: torch_geometric is missing.
    """

    def __init__(self, features: int | None = None) -> None:
        _data()
        self.features = features

    def load(self, record: Record, crop: CropOf | None = None) -> Any:
        """A `torch_geometric` graph. Raises: RecordError where the sample holds none, or a bad one."""
        if not record.image or record.extension not in ("", "graph.npz"):
            raise RecordError(f"{record.key}: the sample holds no graph", "missing graph")
        arrays = read_graph(record.image, record.key)
        found = arrays["x"].shape[1]
        if found != (self.features or found):
            raise RecordError(
                f"{record.key}: its nodes have {found} features, the model takes {self.features}",
                "other node features",
            )
        return _data().Data(**{name: torch.from_numpy(array) for name, array in arrays.items()})

    def stack(self, items: Sequence[Any]) -> Any:
        """A `torch_geometric` batch; of no graphs where there are none. Pairs' attributes are all or none."""
        if items:
            some = any("edge_attr" not in item for item in items)
            return _data().Batch.from_data_list(list(items), exclude_keys=["edge_attr"] if some else None)
        none = torch.zeros(0, dtype=torch.int64)
        x_0F, edges_20 = torch.zeros(0, self.features or 1), none.reshape(2, 0)
        return _data().Batch(x=x_0F, edge_index=edges_20, batch=none, ptr=none.new_zeros(1))


def _data() -> Any:
    from clipkit.models.towers_graph import torch_geometric

    return torch_geometric().data
