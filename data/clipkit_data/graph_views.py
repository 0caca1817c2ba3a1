"""Views of graphs: nodes left out, edges moved, attributes masked, or a connected part.

What is drawn for a graph is a function of (seed, epoch, sample id, view) alone, by a generator of its own, so
a graph is changed the same way whatever batch it comes in. Each change keeps at least one node, and keeps
undirected graphs undirected: both directions of an edge go, stay and move together. Work is done on the CPU,
a graph at a time.

Shapes: N graphs, V nodes of one, E directed pairs of one, F features of a node.

References: You et al. 2020, "Graph Contrastive Learning with Augmentations", table 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from clipkit.config import Config
from clipkit.errors import InputError
from clipkit_data.keyed import Purpose, keyed_integers


class GraphChange(Config):
    """One way to change a graph.

    Args:
        name: "none", "drop_nodes", "perturb_edges", "mask_attributes" or "subgraph".
        ratio: How much is changed, rounded: the share of nodes that are left out (also by "subgraph", which
            so keeps 1 − ratio), of edges that are moved, or of nodes that are masked.
        fill: What masked nodes get instead: the mean over their graph's nodes, or "noise" drawn from a
            normal distribution of mean ½ and standard deviation ½.
    """

    name: Literal["none", "drop_nodes", "perturb_edges", "mask_attributes", "subgraph"]
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2
    fill: Literal["mean", "noise"] = "mean"


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph as arrays.

    Args:
        x_VF: Features of the nodes, float32.
        edges_2E: Directed pairs of nodes, int64; an undirected edge is two of them.
        attributes_EA: Attributes of the pairs; None without.
    """

    x_VF: np.ndarray
    edges_2E: np.ndarray
    attributes_EA: np.ndarray | None = None


def graph_view(
    batch: Any,
    changes: Sequence[GraphChange],
    *,
    seed: int,
    epoch_N: np.ndarray,
    id_N: np.ndarray,
    view: int,
) -> Any:
    """A view of every graph of a batch.

    Args:
        batch: A `torch_geometric` batch with x, edge_index and perhaps edge_attr.
        changes: One of them is drawn for each graph.
        seed, epoch_N, id_N, view: The key of the draws: the seed, and for each graph its epoch and sample id,
            int64 (N,); the number of the view.

    Returns:
        A new batch of as many graphs on the same device; only x, edge_index and edge_attr are carried over.

    Raises:
        InputError: No change to draw from.
    """
    if not changes:
        raise InputError("a view of graphs needs at least one change", hint="for example drop_nodes")
    numbers_N3 = keyed_integers(seed, Purpose.AUGMENT, epoch_N, id_N, 3, view=view)
    graphs = []
    for graph, numbers_3 in zip(unpacked(batch), numbers_N3, strict=True):
        change = changes[int(numbers_3[0] % np.uint64(len(changes)))]
        generator = np.random.Generator(np.random.Philox(key=numbers_3[1:]))
        graphs.append(changed(graph, change, generator))
    return packed(graphs).to(batch.x.device)


def changed(graph: Graph, change: GraphChange, generator: np.random.Generator) -> Graph:
    """A graph after one change."""
    if change.name == "drop_nodes":
        return drop_nodes(graph, change.ratio, generator)
    if change.name == "perturb_edges":
        return perturb_edges(graph, change.ratio, generator)
    if change.name == "mask_attributes":
        return mask_attributes(graph, change.ratio, generator, fill=change.fill)
    return subgraph(graph, change.ratio, generator) if change.name == "subgraph" else graph


def drop_nodes(graph: Graph, ratio: float, generator: np.random.Generator) -> Graph:
    """A graph without a share of its nodes and their edges; one node is always left."""
    nodes = len(graph.x_VF)
    dropped = generator.choice(nodes, min(round(ratio * nodes), nodes - 1), replace=False)
    keep_V = np.ones(nodes, dtype=bool)
    keep_V[dropped] = False
    return _induced(graph, keep_V)


def perturb_edges(graph: Graph, ratio: float, generator: np.random.Generator) -> Graph:
    """A graph with a share of its edges moved elsewhere: as many are added as are taken away.

    New edges are drawn from the pairs of different nodes that had none; a moved edge keeps its attributes.
    Where fewer pairs are free, fewer edges move: none in a complete graph, nor in one without edges.
    Self-loops stay where they are.
    """
    u_E, v_E = graph.edges_2E
    nodes, plain_E, undirected = len(graph.x_VF), u_E != v_E, is_undirected(graph.edges_2E)
    turned_E = undirected & (u_E > v_E)
    low_E, high_E = np.where(turned_E, v_E, u_E), np.where(turned_E, u_E, v_E)
    rank_E = _rank(low_E[plain_E], high_E[plain_E], nodes, undirected)
    ranks, which_E = np.unique(rank_E, return_inverse=True)
    free = nodes * (nodes - 1) // (2 if undirected else 1) - len(ranks)
    count = min(round(ratio * len(ranks)), free)
    if not count:
        return graph
    moved = generator.choice(len(ranks), count, replace=False)
    new = generator.choice(free, count, replace=False)
    # The i-th free pair: as many taken ones come before it as have at most i free ones before them.
    new += np.searchsorted(ranks - np.arange(len(ranks)), new, side="right")
    after = ranks.copy()
    after[moved] = new
    low, high = _pair(after[which_E], nodes, undirected)
    edges_2E = graph.edges_2E.copy()
    turned = turned_E[plain_E]
    edges_2E[:, plain_E] = np.where(turned, high, low), np.where(turned, low, high)
    return replace(graph, edges_2E=edges_2E)


def mask_attributes(
    graph: Graph, ratio: float, generator: np.random.Generator, *, fill: str = "mean"
) -> Graph:
    """A graph with the features of a share of its nodes replaced; see `GraphChange` for `fill`.

    Where all nodes have the same features, filling in the mean changes nothing.
    """
    nodes, features = graph.x_VF.shape
    masked = generator.choice(nodes, round(ratio * nodes), replace=False)
    x_VF = graph.x_VF.copy()
    if fill == "noise":
        x_VF[masked] = generator.normal(0.5, 0.5, (len(masked), features))
    else:
        x_VF[masked] = graph.x_VF.mean(axis=0)
    return replace(graph, x_VF=x_VF)


def subgraph(graph: Graph, ratio: float, generator: np.random.Generator) -> Graph:
    """A connected part that holds all but a share of the nodes.

    It grows from a random node: each next node is drawn from the neighbours of all that it already has. Where
    the component of the first node is smaller than what was asked for, the part is that component. Directions
    of edges do not count in it.
    """
    nodes = len(graph.x_VF)
    wanted = max(1, nodes - round(ratio * nodes))
    neighbours = _neighbours(graph.edges_2E, nodes)
    node = int(generator.integers(nodes))
    seen, border, part = {node}, [node], list[int]()
    for draw in generator.random(wanted):
        place = int(draw * len(border))
        border[place], border[-1] = border[-1], border[place]
        part.append(border.pop())
        new = [other for other in neighbours[part[-1]] if other not in seen]
        seen.update(new)
        border += new
        if not border:
            break
    keep_V = np.zeros(nodes, dtype=bool)
    keep_V[part] = True
    return _induced(graph, keep_V)


def is_undirected(edges_2E: np.ndarray) -> bool:
    """Whether each directed pair comes with its reverse."""
    size = int(edges_2E.max(initial=-1)) + 1
    there, back = edges_2E[0] * size + edges_2E[1], edges_2E[1] * size + edges_2E[0]
    return np.array_equal(np.unique(there), np.unique(back))


def unpacked(batch: Any) -> Iterator[Graph]:
    """The graphs of a `torch_geometric` batch as arrays."""
    edges_2M, x_MF = batch.edge_index.cpu().numpy(), batch.x.cpu().numpy()
    attributes = batch.edge_attr.cpu().numpy() if "edge_attr" in batch else None
    first = batch.ptr.cpu().numpy()
    edge = np.searchsorted(batch.batch.cpu().numpy()[edges_2M[0]], np.arange(len(first)))
    for start, end, left, right in zip(first, first[1:], edge, edge[1:], strict=False):
        own = None if attributes is None else attributes[left:right]
        yield Graph(x_MF[start:end], edges_2M[:, left:right] - start, own)


def packed(graphs: Sequence[Graph]) -> Any:
    """Graphs as a `torch_geometric` batch."""
    from clipkit.models.towers_graph import torch_geometric

    sizes = np.array([len(graph.x_VF) for graph in graphs])
    first = np.concatenate([[0], np.cumsum(sizes)])
    edges = [graph.edges_2E + start for graph, start in zip(graphs, first, strict=False)]
    parts = {
        "x": np.concatenate([graph.x_VF for graph in graphs]),
        "edge_index": np.concatenate(edges, axis=1),
        "batch": np.repeat(np.arange(len(graphs)), sizes),
        "ptr": first,
    }
    attributes = [graph.attributes_EA for graph in graphs if graph.attributes_EA is not None]
    if attributes:
        parts["edge_attr"] = np.concatenate(attributes)
    batch = torch_geometric().data.Batch
    return batch(**{name: torch.from_numpy(part) for name, part in parts.items()})


def _induced(graph: Graph, keep_V: np.ndarray) -> Graph:
    """The part of a graph on some of its nodes, in their order."""
    keep_E = keep_V[graph.edges_2E].all(axis=0)
    edges_2E = (np.cumsum(keep_V) - 1)[graph.edges_2E[:, keep_E]]
    attributes_EA = None if graph.attributes_EA is None else graph.attributes_EA[keep_E]
    return Graph(graph.x_VF[keep_V], edges_2E, attributes_EA)


def _neighbours(edges_2E: np.ndarray, nodes: int) -> list[list[int]]:
    """Each node's neighbours in increasing order, whatever the direction."""
    found: list[list[int]] = [[] for _ in range(nodes)]
    there, back = edges_2E
    for number in np.unique(np.concatenate([there * nodes + back, back * nodes + there])).tolist():
        found[number // nodes].append(number % nodes)
    return found


def _rank(low: np.ndarray, high: np.ndarray, nodes: int, undirected: bool) -> np.ndarray:
    """The number of a pair of different nodes in the list of all such pairs, by first and then by second."""
    if undirected:
        return low * (2 * nodes - low - 1) // 2 + high - low - 1
    return low * (nodes - 1) + high - (high > low)


def _pair(rank: np.ndarray, nodes: int, undirected: bool) -> tuple[np.ndarray, np.ndarray]:
    """The pair of a number: the inverse of `_rank`."""
    if undirected:
        row = np.arange(nodes)
        first = row * (2 * nodes - row - 1) // 2
        low = np.searchsorted(first, rank, side="right") - 1
        low = np.minimum(low, max(0, nodes - 2))  # the last row is empty and begins where the list ends
        return low, rank - first[low] + low + 1
    low, rest = np.divmod(rank, nodes - 1)
    return low, rest + (rest >= low)
