"""Views of graphs and random walks: counts, connectedness, and draws that do not depend on the batch."""

from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import InputError
from clipkit.models.towers_graph import torch_geometric
from clipkit_data.batches.graphs import Graphs
from clipkit_data.graph_views import (
    Graph,
    GraphChange,
    changed,
    drop_nodes,
    graph_view,
    is_undirected,
    mask_attributes,
    perturb_edges,
    subgraph,
    unpacked,
)
from clipkit_data.graph_walks import node_pairs

RATIOS = st.floats(0, 0.95)
CHANGES = [
    GraphChange(name="none"),
    GraphChange(name="drop_nodes"),
    GraphChange(name="perturb_edges"),
    GraphChange(name="mask_attributes", fill="noise"),
    GraphChange(name="subgraph"),
]


def graph_of(nodes: int, pairs: list[tuple[int, int]], *, directed: bool = False) -> Graph:
    """A graph whose nodes have their own number as feature, and pairs those of their ends as attributes."""
    edges_E2 = np.array(sorted(set(pairs)), dtype=np.int64).reshape(-1, 2)
    if not directed:
        edges_E2 = np.unique(np.concatenate([edges_E2, edges_E2[:, ::-1]]), axis=0)
    x_VF = np.arange(nodes, dtype=np.float32)[:, None]
    return Graph(x_VF, np.ascontiguousarray(edges_E2.T), edges_E2.astype(np.float32))


@st.composite
def graphs(draw: st.DrawFn, loops: bool = True) -> Graph:
    """Graphs of one to fourteen nodes, directed or not."""
    nodes = draw(st.integers(1, 14))
    pairs = draw(st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), max_size=40))
    return graph_of(nodes, [p for p in pairs if loops or p[0] != p[1]], directed=draw(st.booleans()))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def undirected(graph: Graph) -> nx.Graph:
    """The graph for networkx, without directions."""
    found = nx.empty_graph(len(graph.x_VF))
    found.add_edges_from(graph.edges_2E.T.tolist())
    return found


def pairs_of(graph: Graph) -> set[tuple[int, int]]:
    """The directed pairs, in the numbers that nodes had at first."""
    return {(int(u), int(v)) for u, v in graph.x_VF[graph.edges_2E, 0].T}


@given(graph=graphs(), ratio=RATIOS, seed=st.integers(0, 99))
def test_a_subgraph_is_connected_and_as_large_as_its_component_allows(
    graph: Graph, ratio: float, seed: int
) -> None:
    part = subgraph(graph, ratio, generator(seed))
    kept = part.x_VF[:, 0].astype(int).tolist()
    wanted = max(1, len(graph.x_VF) - round(ratio * len(graph.x_VF)))
    assert nx.is_connected(undirected(part))
    component = nx.node_connected_component(undirected(graph), kept[0])
    assert len(kept) == min(wanted, len(component))
    assert pairs_of(part) == {(u, v) for u, v in pairs_of(graph) if u in kept and v in kept}


def test_a_subgraph_of_a_path_grows_beyond_the_first_nodes_neighbours() -> None:
    # GraphCL's code threw the union with the new node's neighbours away: three nodes of a path at most.
    path = graph_of(20, [(i, i + 1) for i in range(19)])
    sizes = [len(subgraph(path, 0.2, generator(seed)).x_VF) for seed in range(20)]
    assert sizes == [16] * 20


@given(graph=graphs(), ratio=RATIOS, seed=st.integers(0, 99))
def test_dropping_nodes_leaves_the_part_on_the_others(graph: Graph, ratio: float, seed: int) -> None:
    left = drop_nodes(graph, ratio, generator(seed))
    nodes, kept = len(graph.x_VF), set(left.x_VF[:, 0].astype(int).tolist())
    assert len(kept) == len(left.x_VF) == nodes - min(round(ratio * nodes), nodes - 1) >= 1
    assert pairs_of(left) == {(u, v) for u, v in pairs_of(graph) if u in kept and v in kept}
    assert left.attributes_EA is not None
    assert np.array_equal(left.x_VF[left.edges_2E, 0].T, left.attributes_EA)


@given(graph=graphs(), ratio=RATIOS, seed=st.integers(0, 99))
def test_as_many_edges_are_added_as_are_taken_away(graph: Graph, ratio: float, seed: int) -> None:
    after = perturb_edges(graph, ratio, generator(seed))
    nodes, before, now = len(graph.x_VF), pairs_of(graph), pairs_of(after)
    both_ways = is_undirected(graph.edges_2E)
    assert is_undirected(after.edges_2E) == both_ways or not both_ways
    assert after.edges_2E.shape == graph.edges_2E.shape
    assert len(now) == len(before)  # none twice
    assert {p for p in now if p[0] == p[1]} == {p for p in before if p[0] == p[1]}
    pairs = sum(u != v for u, v in before) // (2 if both_ways else 1)
    free = nodes * (nodes - 1) // (2 if both_ways else 1) - pairs
    moved = min(round(ratio * pairs), free)
    assert len(before - now) == len(now - before) == moved * (2 if both_ways else 1)
    stayed = (after.edges_2E == graph.edges_2E).all(axis=0)
    assert graph.attributes_EA is after.attributes_EA  # a moved edge keeps its own
    assert stayed.sum() == len(before & now)


def test_new_edges_come_equally_often_from_every_free_pair() -> None:
    path = graph_of(6, [(i, i + 1) for i in range(5)])
    counts: dict[tuple[int, int], int] = {}
    for seed in range(2000):
        for pair in pairs_of(perturb_edges(path, 0.2, generator(seed))) - pairs_of(path):
            counts[pair] = counts.get(pair, 0) + 1
    assert sorted(counts) == sorted((u, v) for u in range(6) for v in range(6) if abs(u - v) > 1)
    assert all(abs(count - 200) < 60 for count in counts.values())  # 4.5 standard deviations


@given(graph=graphs(), ratio=RATIOS, fill=st.sampled_from(["mean", "noise"]))
def test_masking_replaces_the_features_of_a_share_of_the_nodes(graph: Graph, ratio: float, fill: str) -> None:
    before = Graph(graph.x_VF * 1000 + 0.25, graph.edges_2E)  # nobody has the mean, nor what noise gives
    after = mask_attributes(before, ratio, generator(), fill=fill)
    masked = (after.x_VF != before.x_VF).any(axis=1)
    mean = before.x_VF.mean(axis=0)
    at_mean = (before.x_VF == mean).all(axis=1)
    expected = round(ratio * len(masked))
    assert masked.sum() + (masked < at_mean).sum() >= expected >= masked.sum()
    if fill == "mean":
        assert (after.x_VF[masked] == mean).all()
    assert after.edges_2E is before.edges_2E
    assert after.x_VF.dtype == np.float32


def test_noise_has_the_mean_and_spread_of_the_published_code() -> None:
    graph = Graph(np.full((5000, 2), 9, dtype=np.float32), np.zeros((2, 0), dtype=np.int64))
    x_VF = mask_attributes(graph, 0.9, generator(), fill="noise").x_VF
    masked = x_VF[(x_VF != 9).all(axis=1)]
    assert len(masked) == 4500
    assert abs(masked.mean() - 0.5) < 0.03
    assert abs(masked.std() - 0.5) < 0.03


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
@pytest.mark.parametrize("nodes", [1, 4])
def test_a_graph_without_edges_stays_one(change: GraphChange, nodes: int) -> None:
    after = changed(graph_of(nodes, []), change, generator())
    assert after.edges_2E.shape == (2, 0)
    assert 1 <= len(after.x_VF) <= nodes


def test_a_complete_graph_has_no_edge_to_move() -> None:
    complete = graph_of(5, [(u, v) for u in range(5) for v in range(u)])
    assert perturb_edges(complete, 0.5, generator()) is complete


def batch_of(found: list[Graph]) -> Any:
    """Graphs as a `torch_geometric` batch."""
    data = torch_geometric().data
    items = []
    for graph in found:
        attributes = torch.from_numpy(graph.attributes_EA)
        x_VF, edges_2E = torch.from_numpy(graph.x_VF), torch.from_numpy(graph.edges_2E)
        items.append(data.Data(x=x_VF, edge_index=edges_2E, edge_attr=attributes))
    return Graphs().stack(items)


def some_graphs() -> list[Graph]:
    """Eight graphs, one of them without edges."""
    found = [nx.gnm_random_graph(n, 2 * n, seed=n) for n in (6, 9, 12, 7, 15, 8, 10)]
    return [graph_of(len(g), list(g.edges)) for g in found] + [graph_of(3, [])]


@given(rows=st.permutations(range(8)), count=st.integers(1, 8), seed=st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_a_graph_has_the_same_view_and_walks_in_any_batch(rows: list[int], count: int, seed: int) -> None:
    found, ids = some_graphs(), np.arange(100, 108)
    key: dict[str, Any] = {"seed": seed, "epoch_N": np.full(8, 3), "id_N": ids}
    mine = rows[:count]
    part = batch_of([found[i] for i in mine])
    part_key: dict[str, Any] = {"seed": seed, "epoch_N": np.full(count, 3), "id_N": ids[mine]}
    whole = graph_view(batch_of(found), CHANGES, view=1, **key)
    some = graph_view(part, CHANGES, view=1, **part_key)
    walk: dict[str, Any] = {"walks": 4, "length": 5, "window": 3, "noise": 2}
    whole_pairs, some_pairs = node_pairs(batch_of(found), **key, **walk), node_pairs(part, **part_key, **walk)
    noise_NK = whole_pairs.noise_M.reshape(8, 2) - batch_of(found).ptr[:8, None].numpy()
    assert np.array_equal(
        some_pairs.noise_M.reshape(count, 2) - part.ptr[:count, None].numpy(), noise_NK[mine]
    )
    by_graph = [_in_graph(whole_pairs.u_P, whole_pairs.v_P, batch_of(found).ptr.numpy(), i) for i in mine]
    assert by_graph == [_in_graph(some_pairs.u_P, some_pairs.v_P, part.ptr.numpy(), i) for i in range(count)]
    for place, row in enumerate(mine):
        mine_now, whole_now = list(unpacked(some))[place], list(unpacked(whole))[row]
        assert np.array_equal(mine_now.x_VF, whole_now.x_VF)
        assert np.array_equal(mine_now.edges_2E, whole_now.edges_2E)
        assert mine_now.attributes_EA is not None
        assert whole_now.attributes_EA is not None
        assert np.array_equal(mine_now.attributes_EA, whole_now.attributes_EA)


def _in_graph(u_P: np.ndarray, v_P: np.ndarray, first: np.ndarray, i: int) -> list[tuple[int, int]]:
    """The pairs of one graph, in its own numbers, sorted."""
    own = (u_P >= first[i]) & (u_P < first[i + 1])
    return sorted(zip((u_P[own] - first[i]).tolist(), (v_P[own] - first[i]).tolist(), strict=True))


def test_views_epochs_samples_and_seeds_have_draws_of_their_own() -> None:
    whole, zero = batch_of(some_graphs()[:1] * 4), np.zeros(4, dtype=np.int64)
    drop = [GraphChange(name="drop_nodes")]
    first = graph_view(whole, drop, seed=0, epoch_N=zero, id_N=np.arange(4), view=0)
    again = graph_view(whole, drop, seed=0, epoch_N=zero, id_N=np.arange(4), view=0)
    assert torch.equal(first.x, again.x)
    assert len({tuple(graph.x_VF[:, 0].tolist()) for graph in unpacked(first)}) > 1
    for other in ({"view": 1}, {"seed": 1}, {"epoch_N": zero + 1}):
        key: dict[str, Any] = {"seed": 0, "epoch_N": zero, "id_N": np.arange(4), "view": 0, **other}
        assert not torch.equal(graph_view(whole, drop, **key).x, first.x)


def test_a_view_without_changes_is_refused() -> None:
    with pytest.raises(InputError, match="at least one change"):
        graph_view(batch_of(some_graphs()), [], seed=0, epoch_N=np.zeros(8), id_N=np.arange(8), view=0)


@given(graph=graphs(loops=False), window=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_pairs_of_a_walk_are_as_near_as_the_window_says(graph: Graph, window: int, seed: int) -> None:
    key: dict[str, Any] = {"seed": seed, "epoch_N": np.zeros(1, dtype=np.int64), "id_N": np.array([7])}
    found = node_pairs(batch_of([graph]), **key, walks=5, length=5, window=window, noise=6)
    directed = nx.DiGraph(graph.edges_2E.T.tolist())
    for u, v in zip(found.u_P.tolist(), found.v_P.tolist(), strict=True):
        assert u != v
        assert nx.shortest_path_length(directed, u, v) <= window
    assert len(found.noise_M) == 6
    assert 0 <= found.noise_M.min() <= found.noise_M.max() < len(graph.x_VF)
    assert bool(len(found.u_P)) == bool(graph.edges_2E.size)


def test_noise_follows_the_degree_to_the_power_of_three_quarters() -> None:
    star = graph_of(7, [(0, i) for i in range(1, 6)])  # node 6 has no edge
    key: dict[str, Any] = {"seed": 0, "epoch_N": np.zeros(1, dtype=np.int64), "id_N": np.array([0])}
    noise_M = node_pairs(batch_of([star]), **key, walks=1, length=1, window=1, noise=20000).noise_M
    weights = np.array([5, 1, 1, 1, 1, 1, 0]) ** 0.75
    shares = np.bincount(noise_M, minlength=7) / 20000
    assert np.abs(shares - weights / weights.sum()).max() < 0.015
