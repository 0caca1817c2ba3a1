"""Pairs of nodes for skip-gram on graphs: neighbours on random walks, and nodes drawn as noise.

All walks of a batch take their steps together. What is drawn for a graph is a function of (seed, epoch,
sample id) alone: also the noise, which each graph gives a fixed number of nodes of, drawn in whole numbers so
that no rounding depends on the other graphs. So batches may be shared out over processes in any way.

Shapes: N graphs, V nodes and E directed pairs of all of them, W walks of a graph, L steps of a walk, P pairs
of nodes, M noise nodes.
"""

from typing import Any, NamedTuple

import numpy as np

from clipkit_data.keyed import Purpose, keyed_uniforms

_UNIT = 1 << 20  # a weight of 1, in whole numbers


class NodePairs(NamedTuple):
    """Nodes of a batch by their numbers in it.

    Args:
        u_P, v_P: Nodes near each other on a walk, int64 (P,), never a node and itself.
        noise_M: Nodes drawn as negatives, int64 (M,), in the order of the graphs.
    """

    u_P: np.ndarray
    v_P: np.ndarray
    noise_M: np.ndarray


def node_pairs(
    batch: Any,
    *,
    seed: int,
    epoch_N: np.ndarray,
    id_N: np.ndarray,
    walks: int,
    length: int,
    window: int,
    noise: int,
    power: float = 0.75,
) -> NodePairs:
    """Pairs from random walks in each graph of a batch, and noise nodes.

    A walk starts at a random node with an edge and follows pairs in their direction; it stays where it cannot
    go on. A graph without edges gives no pairs, and noise from all of its nodes alike.

    Args:
        batch: A `torch_geometric` batch of at least one graph.
        seed, epoch_N, id_N: The key of the draws; epochs and sample ids int64 (N,).
        walks: Walks in each graph.
        length: Steps of a walk.
        window: Nodes that are at most so many steps apart on a walk are a pair.
        noise: Nodes drawn of each graph, with replacement, in proportion to degree^power.
        power: See `noise`; 3/4 in word2vec and GraphSAGE.

    References:
        Perozzi et al. 2014, "DeepWalk", section 4.2 (pairs in a window); Hamilton et al. 2017, "Inductive
        Representation Learning on Large Graphs", whose code pairs the first node of a walk with the others
        and has one graph, so one distribution of the noise.
    """
    source_E, target_E = batch.edge_index.cpu().numpy()
    graph_V, count = batch.batch.cpu().numpy(), batch.num_graphs
    degree_V = np.bincount(source_E, minlength=len(graph_V))
    draws_ND = keyed_uniforms(seed, Purpose.AUGMENT, epoch_N, id_N, walks * (length + 1) + noise)
    steps_NWL = draws_ND[:, : walks * (length + 1)].reshape(count, walks, length + 1)
    start_V = (degree_V > 0).astype(np.int64)
    some_N = np.bincount(graph_V, weights=start_V, minlength=count) > 0
    start_NW = _drawn(start_V, graph_V, steps_NWL[some_N, :, 0], some_N)
    walks_XL = _walks(source_E, target_E, degree_V, start_NW.ravel(), steps_NWL[some_N, :, 1:])
    u_P, v_P = _in_window(walks_XL, window)
    # A node without edges is drawn only where its graph has no others (but for one time in a million).
    weight_V = np.maximum(1, np.round(degree_V**power * _UNIT)).astype(np.int64)
    noise_NM = _drawn(weight_V, graph_V, draws_ND[:, walks * (length + 1) :], np.ones(count, dtype=bool))
    return NodePairs(u_P, v_P, noise_NM.ravel())


def _drawn(
    weight_V: np.ndarray, graph_V: np.ndarray, draws_nK: np.ndarray, which_N: np.ndarray
) -> np.ndarray:
    """Nodes of each of the graphs `which_N`, in proportion to whole weights, (n, K) from uniform draws."""
    up_to_V = np.cumsum(weight_V)
    last_N = np.searchsorted(graph_V, np.arange(len(which_N)), side="right")
    end_N = np.concatenate([[0], up_to_V])[last_N]
    begin_N = np.concatenate([[0], end_N[:-1]])
    begin_n, total_n = begin_N[which_N, None], (end_N - begin_N)[which_N, None]
    return np.searchsorted(up_to_V, begin_n + (draws_nK * total_n).astype(np.int64), side="right")


def _walks(
    source_E: np.ndarray,
    target_E: np.ndarray,
    degree_V: np.ndarray,
    start_X: np.ndarray,
    draws_nWL: np.ndarray,
) -> np.ndarray:
    """The nodes of X = n · W walks, int64 (X, 1 + L)."""
    if not len(start_X):
        return np.zeros((0, 1 + draws_nWL.shape[2]), dtype=np.int64)
    target_E = target_E[np.lexsort((target_E, source_E))]  # draws mean the same however pairs are ordered
    first_V = np.cumsum(degree_V) - degree_V
    nodes = [start_X]
    for draw_X in draws_nWL.reshape(len(start_X), -1).T:
        here_X = nodes[-1]
        place_X = first_V[here_X] + (draw_X * degree_V[here_X]).astype(np.int64)
        next_X = target_E[np.minimum(place_X, len(target_E) - 1)]
        nodes.append(np.where(degree_V[here_X] > 0, next_X, here_X))
    return np.stack(nodes, axis=1)


def _in_window(walks_XL: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Different nodes of the same walk that are at most `window` steps apart: (P,) and (P,)."""
    offsets = range(1, min(window, walks_XL.shape[1] - 1) + 1)
    u_P = np.concatenate([walks_XL[:, :-offset].ravel() for offset in offsets])
    v_P = np.concatenate([walks_XL[:, offset:].ravel() for offset in offsets])
    return u_P[u_P != v_P], v_P[u_P != v_P]
