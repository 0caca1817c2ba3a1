"""Graphs with known labels as shards: families of random graphs, and the atlas of all small ones.

`families`: eight ways to draw a random graph. Graph i of each family has the same number of nodes and of
edges, so neither tells the family; random edges are taken away or added until the number is right.
`atlas`: every graph of one to seven nodes (networkx), with properties to probe for. All graphs are
undirected, without node features, and their nodes are numbered in a random order. The same seed gives the
same bytes, with the same networkx.

References: Erdős and Rényi 1959; Barabási and Albert 1999; Watts and Strogatz 1998; Read and Wilson 1998, "An
Atlas of Graphs".
"""

import json
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import ConfigError, DependencyError
from clipkit.files import atomic_folder
from clipkit_data.batches.graphs import write_graph
from clipkit_data.shards.writing import Entry, sample_key, shard_name, write_shard

NODES = (10, 60)
DENSITY = (1.6, 2.4)  # edges for each node
Sample = tuple[bytes, dict[str, Any]]
"""A `.graph.npz` and the sample's `.json`."""


def write_families(
    out: Path,
    *,
    train: int = 150,
    heldout: int = 50,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Write `OUT/train` and `OUT/heldout`: so many graphs of each family; the `.json` has "family".

    Args:
        out: A new folder; it appears whole or not at all.
        train, heldout: Graphs of each family.
        seed: Of all graphs.
        progress: Called with 1 after each graph.

    Returns:
        `{"families", "train", "heldout", "out"}`: names, and numbers of graphs.

    Raises:
        ConfigError: A number is below 1.
        DependencyError: networkx is missing.
    """
    if min(train, heldout) < 1:
        raise ConfigError(f"train {train}, heldout {heldout}: at least 1 graph of each family")
    splits = {"train": range(train), "heldout": range(train, train + heldout)}
    with atomic_folder(out) as folder:
        for split, numbers in splits.items():
            samples = (family_graph(name, number, seed) for number in numbers for name in FAMILIES)
            write_graph_shards(_counted(samples, progress), folder / split)
    counts = {split: len(numbers) * len(FAMILIES) for split, numbers in splits.items()}
    return {"families": list(FAMILIES), **counts, "out": str(out)}


def write_atlas(out: Path, *, seed: int = 0, progress: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """Write the atlas to `OUT/train` and, a fifth of it, to `OUT/heldout`.

    The `.json` has "triangles" ("0" to "3", "4+"), "connected", "bipartite" and "planar" ("yes", "no").

    Args:
        out: A new folder; it appears whole or not at all.
        seed: Of the split and of the numbering of nodes.
        progress: Called with 1 after each graph.

    Returns:
        `{"train", "heldout", "out"}`.

    Raises:
        DependencyError: networkx is missing.
    """
    graphs = [graph for graph in _networkx().graph_atlas_g() if len(graph)]  # the first has no nodes
    order = np.random.default_rng(seed).permutation(len(graphs))
    splits = {"train": order[len(graphs) // 5 :], "heldout": order[: len(graphs) // 5]}
    with atomic_folder(out) as folder:
        for split, numbers in splits.items():
            samples = (
                _sample(graphs[i], _properties(graphs[i]), np.random.default_rng([seed, i]))
                for i in np.sort(numbers).tolist()
            )
            write_graph_shards(_counted(samples, progress), folder / split)
    return {**{split: len(numbers) for split, numbers in splits.items()}, "out": str(out)}


def write_graph_shards(samples: Iterable[Sample], out: Path, *, per_shard: int = 10_000) -> int:
    """Write graphs as shards, one at a time. Returns how many graphs there were."""
    out.mkdir(parents=True, exist_ok=True)
    rest, total = iter(samples), 0
    for number, first in enumerate(rest):
        name = shard_name(number)
        part = enumerate(chain([first], islice(rest, per_shard - 1)))
        total += write_shard((_entry(sample_key(name, i, per_shard), item) for i, item in part), out, name)
    return total


def _entry(key: str, sample: Sample) -> Entry:
    data, meta = sample
    row = {**meta, "key": key}
    return {"graph.npz": data, "json": json.dumps(row, ensure_ascii=False).encode()}, row


def family_graph(family: str, number: int, seed: int) -> Sample:
    """Graph `number` of a family: nodes and edges as many as graph `number` of every other family."""
    sizes = np.random.default_rng([seed, number])
    nodes = int(sizes.integers(NODES[0], NODES[1] + 1))
    edges = round(nodes * sizes.uniform(*DENSITY))
    generator = np.random.default_rng([seed, number, list(FAMILIES).index(family)])
    graph = FAMILIES[family](nodes, edges, int(generator.integers(2**31)))
    return _sample(_with_edges(graph, edges, generator), {"family": family}, generator)


def _with_edges(graph: Any, edges: int, generator: np.random.Generator) -> Any:
    """A graph with random edges taken away, or random new ones added, until it has so many."""
    have = sorted(tuple(sorted(edge)) for edge in graph.edges)
    away = generator.permutation(len(have))[: max(0, len(have) - edges)]
    graph.remove_edges_from([have[i] for i in away])
    while graph.number_of_edges() < edges:
        u, v = generator.choice(len(graph), 2, replace=False).tolist()
        graph.add_edge(u, v)
    return graph


def _sample(graph: Any, meta: dict[str, Any], generator: np.random.Generator) -> Sample:
    """A graph with its nodes in a random order."""
    place_V = generator.permutation(len(graph))
    pairs_E2 = place_V[np.array(list(graph.edges), dtype=np.int64).reshape(-1, 2)]
    edges_2E = np.concatenate([pairs_E2, pairs_E2[:, ::-1]]).T
    data = write_graph(edges_2E, nodes=len(graph))
    return data, {**meta, "nodes": len(graph), "edges": graph.number_of_edges()}


def _counted(samples: Iterable[Sample], progress: Callable[[int], Any] | None) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        if progress:
            progress(1)


def _properties(graph: Any) -> dict[str, str]:
    networkx = _networkx()
    triangles = sum(networkx.triangles(graph).values()) // 3
    yes = {
        "connected": networkx.is_connected(graph),
        "bipartite": networkx.is_bipartite(graph),
        "planar": networkx.is_planar(graph),
    }
    return {"triangles": str(triangles) if triangles < 4 else "4+"} | {
        name: "yes" if value else "no" for name, value in yes.items()
    }


def _random(nodes: int, edges: int, seed: int) -> Any:
    return _networkx().gnm_random_graph(nodes, edges, seed=seed)


def _preferential(nodes: int, edges: int, seed: int) -> Any:
    return _networkx().barabasi_albert_graph(nodes, -(-edges // nodes), seed=seed)


def _small_world(nodes: int, edges: int, seed: int) -> Any:
    return _networkx().watts_strogatz_graph(nodes, 2 * -(-edges // nodes), 0.1, seed=seed)


def _regular(nodes: int, edges: int, seed: int) -> Any:
    degree = -(-2 * edges // nodes)
    return _networkx().random_regular_graph(degree + nodes * degree % 2, nodes, seed=seed)


def _lattice(nodes: int, edges: int, seed: int) -> Any:
    """A square lattice with one diagonal in each square, filled row by row."""
    width = max(2, round(nodes**0.5))
    graph = _networkx().empty_graph(nodes)
    for node in range(nodes):
        steps = [width] + ([1, width + 1] if (node + 1) % width else [])
        graph.add_edges_from((node, node + step) for step in steps if node + step < nodes)
    return graph


def _geometric(nodes: int, edges: int, seed: int) -> Any:
    """Random points in a square; the nearest pairs are edges."""
    points_V2 = np.random.default_rng(seed).random((nodes, 2))
    left, right = np.triu_indices(nodes, 1)
    nearest = np.argsort(((points_V2[left] - points_V2[right]) ** 2).sum(1), kind="stable")[:edges]
    graph = _networkx().empty_graph(nodes)
    graph.add_edges_from(zip(left[nearest].tolist(), right[nearest].tolist(), strict=True))
    return graph


def _communities(nodes: int, edges: int, seed: int) -> Any:
    """Groups of about eight nodes: nine edges of ten within a group, as far as there is room."""
    sizes = [len(part) for part in np.array_split(np.arange(nodes), max(2, round(nodes / 8)))]
    inside = sum(size * (size - 1) // 2 for size in sizes)
    within = min(1.0, 0.9 * edges / inside)
    between = max(0.0, (edges - within * inside) / (nodes * (nodes - 1) // 2 - inside))
    chances = np.where(np.eye(len(sizes), dtype=bool), within, between).tolist()
    return _networkx().stochastic_block_model(sizes, chances, seed=seed)


def _hubs(nodes: int, edges: int, seed: int) -> Any:
    """A star for every ten nodes, joined by random edges."""
    hubs = max(1, nodes // 10)
    graph = _networkx().empty_graph(nodes)
    owner = np.random.default_rng(seed).integers(hubs, size=nodes)
    graph.add_edges_from((int(owner[node]), node) for node in range(hubs, nodes))
    return graph


FAMILIES: dict[str, Callable[[int, int, int], Any]] = {
    "random": _random,
    "preferential": _preferential,
    "small world": _small_world,
    "regular": _regular,
    "lattice": _lattice,
    "geometric": _geometric,
    "communities": _communities,
    "hubs": _hubs,
}
"""Each makes a graph with so many nodes, and edges not far from so many, from a seed."""


def _networkx() -> Any:
    try:
        return import_module("networkx")
    except ImportError as error:
        raise DependencyError("networkx is missing", hint="pip install 'clipkit[graph]'") from error
