"""GIN: its layers by hand, graphs whose nodes are numbered in another way, and graphs alone or in a batch."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipkit.errors import DependencyError, InputError
from clipkit.models import Encoder, EncoderConfig, build_model, load_encoder, save_model
from clipkit.models.towers_graph import torch_geometric

PAIRS = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=30)


def encoder(**options: Any) -> Encoder:
    """A GIN with fixed weights, in eval mode."""
    return build_model(EncoderConfig(modality="graph", tower={"name": "gin", **options}), seed=0).eval()


def batch_of(*graphs: tuple[Tensor, list[tuple[int, int]]]) -> Any:
    """A batch of undirected graphs from features and pairs."""
    data = torch_geometric().data
    items = []
    for x_VF, pairs in graphs:
        edges_E2 = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        items.append(data.Data(x=x_VF, edge_index=torch.cat([edges_E2, edges_E2.flip(1)]).T))
    return data.Batch.from_data_list(items)


@given(pairs=PAIRS, seed=st.integers(0, 1000), norm=st.sampled_from(["batch", "none"]))
@settings(max_examples=10, deadline=None)
def test_features_do_not_depend_on_how_nodes_are_numbered(
    pairs: list[tuple[int, int]], seed: int, norm: str
) -> None:
    model = encoder(features=3, norm=norm)
    x_VF = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed))
    place_V = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    renamed = [(int(place_V[u]), int(place_V[v])) for u, v in pairs]
    there = model.encode(batch_of((x_VF, pairs)))
    back = model.encode(batch_of((x_VF[place_V.argsort()], renamed)))
    torch.testing.assert_close(there, back, rtol=1e-4, atol=1e-5)


def test_each_layer_is_the_formula_of_the_paper() -> None:
    model = encoder(features=2, hidden=4, layers=2, norm="none", train_eps=True)
    tower: Any = model.tower
    for conv in tower.convs:
        conv.eps.data.fill_(0.5)
    x_VF = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    pairs = [(0, 1), (1, 2), (1, 3)]
    adjacent_VV = torch.zeros(4, 4)
    for u, v in pairs:
        adjacent_VV[u, v] = adjacent_VV[v, u] = 1
    layers, h_VH = [], x_VF
    for conv in tower.convs:
        h_VH = torch.relu(conv.nn(1.5 * h_VH + adjacent_VV @ h_VH))
        layers.append(h_VH)
    expected = torch.cat(layers, dim=1)
    torch.testing.assert_close(tower.nodes(batch_of((x_VF, pairs))), expected)
    torch.testing.assert_close(model.encode(batch_of((x_VF, pairs))), expected.sum(0, keepdim=True))


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_a_graph_has_the_same_features_alone_and_in_a_batch(pooling: str) -> None:
    model = encoder(pooling=pooling)
    graphs = [
        (torch.ones(3, 1), [(0, 1), (1, 2)]),
        (torch.ones(1, 1), []),
        (torch.ones(5, 1), [(0, 1), (0, 2), (0, 3)]),
    ]
    together = model.encode(batch_of(*graphs))
    alone = torch.cat([model.encode(batch_of(graph)) for graph in graphs])
    torch.testing.assert_close(together, alone)
    assert together.shape == (3, model.dim) == (3, 96)


def test_a_saved_encoder_gives_the_same_features(tmp_path: Path) -> None:
    model = encoder(features=2, hidden=8, layers=2)
    save_model(model, tmp_path / "model")
    again = load_encoder(str(tmp_path / "model"))
    batch = batch_of((torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), [(0, 1), (1, 2)]))
    assert torch.equal(again.eval().encode(batch), model.encode(batch))
    assert again.fingerprint == model.fingerprint


def test_other_node_features_than_the_towers_are_refused() -> None:
    with pytest.raises(InputError, match="have 2 features, the tower takes 1"):
        encoder().encode(batch_of((torch.ones(3, 2), [(0, 1)])))


def test_without_torch_geometric_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    torch_geometric.cache_clear()
    with pytest.raises(DependencyError, match=r"clipkit\[graph\]"):
        encoder()
