"""The graph tower: GIN, the network that sums over neighbours.

A graph is a `torch_geometric` batch with node features `x` and directed pairs `edge_index`. Each layer adds a
node's features to the sum of its neighbours' and passes them through a small network; what the tower gives is
each layer's node features pooled over the graph, side by side. Summing over neighbours and over nodes does
not depend on how nodes are numbered. torch_geometric is an extra: it is imported when a tower is built.

Shapes: N graphs, V nodes of all of them, E directed pairs, F features of a node, H a layer's width, L layers.
"""

import warnings
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.errors import DependencyError, InputError

Count = Annotated[int, Field(ge=1)]


class GINConfig(Config):
    """The graph isomorphism network.

    Args:
        features: F, features of each node; 1 where graphs have none and every node counts as 1.
        hidden: H, width of each layer.
        layers: L; the tower's width is L · H.
        norm: BatchNorm over the nodes after each layer, or "none".
        pooling: "sum", "mean" or "max" over the nodes of a graph.
        train_eps: Learn the weight 1 + ε of a node beside its neighbours; else ε is 0.
    """

    features: Count = 1
    hidden: Count = 32
    layers: Count = 3
    norm: Literal["batch", "none"] = "batch"
    pooling: Literal["sum", "mean", "max"] = "sum"
    train_eps: bool = False


@cache
def torch_geometric() -> Any:
    """The package torch_geometric with its parts `data` and `nn`. Raises: DependencyError without it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it compiles parts of itself in a way that torch warns of
            import torch_geometric
            import torch_geometric.data
            import torch_geometric.nn
    except ImportError as error:
        raise DependencyError("torch_geometric is missing", hint="pip install 'clipkit[graph]'") from error
    return torch_geometric


class GIN(nn.Module):
    """A graph isomorphism network whose layers are all read out.

        h_l = BN(ReLU(MLP_l((1 + ε) h_{l−1} + Σ_{neighbours} h_{l−1})))

    Args:
        config: Its sizes.

    Attributes:
        width: L · H, of a graph's features and of a node's.

    References:
        Xu et al. 2019, "How Powerful are Graph Neural Networks?", eq. 4.1 and 4.2; You et al. 2020, "Graph
        Contrastive Learning with Augmentations", whose unsupervised encoder has 3 layers of 32, BatchNorm
        after the ReLU and sums over nodes.
    """

    def __init__(self, config: GINConfig) -> None:
        super().__init__()
        geometric = torch_geometric()
        self.features, self.width = config.features, config.layers * config.hidden
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        widths = [config.features] + [config.hidden] * config.layers
        for before, after in pairwise(widths):
            network = nn.Sequential(nn.Linear(before, after), nn.ReLU(), nn.Linear(after, after))
            self.convs.append(geometric.nn.GINConv(network, train_eps=config.train_eps))
            self.norms.append(nn.BatchNorm1d(after) if config.norm == "batch" else nn.Identity())
        self.pool = getattr(
            geometric.nn, f"global_{'add' if config.pooling == 'sum' else config.pooling}_pool"
        )

    def nodes(self, batch: Any) -> Tensor:
        """Features of every node, each layer's beside the last, (V, L · H).

        Args:
            batch: A `torch_geometric` batch with x, float (V, F), and edge_index, int64 (2, E).

        Raises:
            InputError: The nodes have another number of features.
        """
        x_VF = batch.x
        if x_VF.shape[1] != self.features:
            raise InputError(
                f"the graphs' nodes have {x_VF.shape[1]} features, the tower takes {self.features}",
                hint=f"set model.tower.features: {x_VF.shape[1]}",
            )
        layers = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_VF = norm(torch.relu(conv(x_VF, batch.edge_index)))
            layers.append(x_VF)
        return torch.cat(layers, dim=1)

    def read_out(self, nodes_VD: Tensor, batch: Any) -> Tensor:
        """Nodes' features (V, D) pooled over each graph of the batch, (N, D)."""
        return self.pool(nodes_VD, batch.batch, size=batch.num_graphs)

    def forward(self, batch: Any) -> Tensor:
        """Features of every graph, (N, L · H)."""
        return self.read_out(self.nodes(batch), batch)


def build_gin(config: GINConfig, argument: None = None) -> GIN:
    """A GIN. Raises: DependencyError without torch_geometric."""
    return GIN(config)
