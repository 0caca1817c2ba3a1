"""GraphSAGE without supervision: nodes near each other on random walks attract, nodes drawn as noise repel.

Skip-gram with negative sampling on the features that the tower gives each node. Every graph of the batch
gives walks and noise (`clipkit_data.graph_walks`), and the whole batch, of all ranks, shares the noise. What
is kept and judged is the tower, whose features of a graph are its nodes' pooled.

The sum over positives and negatives of `clipkit.losses.logistic_loss` is taken here as two sums, because
noise must be gathered over the ranks and a node's own positive must not.

Shapes: V nodes of this rank's graphs, P pairs of nodes, M noise nodes of this rank, D features.
"""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.distributed import sum_over_group
from clipkit.errors import ConfigError, InputError
from clipkit.losses import contrast
from clipkit.models import Encoder
from clipkit.models.batch_norm import synchronised
from clipkit_data.batches.maker import Batch
from clipkit_data.graph_walks import NodePairs, node_pairs
from clipkit_training.steps.base import Metrics, Setting, Step, collapse_figures
from clipkit_training.steps.graphcl import graph_encoder

Count = Annotated[int, Field(ge=1)]


class GraphSAGEConfig(Config):
    """Options of GraphSAGE.

    Args:
        walks: Random walks in each graph.
        length: Steps of a walk.
        window: Nodes at most so many steps apart on a walk are positives of each other.
        noise: Noise nodes that each graph of the batch gives, drawn in proportion to degree^(3/4).
        negative_weight: Q ≥ 0, of each negative beside the positive.
        unit: Scale nodes' features to length 1, as the authors' code does.
        temperature: Divides the inner products; 1 in the authors' code.
        seed: Of the walks and the noise; None: the run's.
        sync_batch_norm: BatchNorm takes the statistics of all ranks' nodes.
    """

    walks: Count = 8
    length: Count = 5
    window: Count = 5
    noise: Count = 1
    negative_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    unit: bool = True
    temperature: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0)] | None = None
    sync_batch_norm: bool = True


class GraphSAGE(Step):
    """Nodes against their neighbours on walks, and against noise.

        L = mean over pairs of −log σ(⟨z_u, z_v⟩ / T) − Q Σ_noise log σ(−⟨z_u, z_n⟩ / T)

    Args:
        model: The encoder, whose tower gives features of nodes; its BatchNorm layers are changed in place.
        config: The options.
        setting: The run.

    References:
        Hamilton et al. 2017, "Inductive Representation Learning on Large Graphs", eq. 1. The authors' code
        has a second loss ("skipgram") whose sign is wrong; it is not this one.
    """

    model: Encoder

    def __init__(self, model: Encoder, config: GraphSAGEConfig, setting: Setting) -> None:
        super().__init__()
        self.model = synchronised(model, setting.group) if config.sync_batch_norm else model
        self.config, self.group = config, setting.group
        self.seed = setting.seed if config.seed is None else config.seed

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of a batch's graphs. Raises: InputError where none of them, on any rank, has an edge."""
        nodes_VD, pairs = self._nodes(batch.images), self._pairs(batch)
        u_P, v_P, noise_M = (torch.from_numpy(part).to(nodes_VD.device) for part in pairs)
        weight_P = torch.ones(len(u_P), device=nodes_VD.device)
        if not sum_over_group(weight_P.sum(), self.group):  # all ranks raise, or none
            raise InputError(
                "no graph of this batch has an edge, so there are no neighbours to learn from",
                hint="raise data.batch_size if others have edges; if none has, step: graphcl needs no edges",
            )
        if not len(u_P):  # a row that weighs nothing keeps the ranks in step
            u_P, v_P, weight_P = noise_M[:1], noise_M[:1], torch.zeros(1, device=nodes_VD.device)
        rule: dict[str, Any] = {
            "link": "logistic",
            "similarity": "cosine" if self.config.unit else "inner_product",
            "scale": 1 / self.config.temperature,
            "weight": weight_P,
            "group": self.group,
        }
        near = contrast(nodes_VD[u_P], nodes_VD[v_P], paired=True, **rule)
        quantity = self.config.negative_weight
        far = contrast(
            nodes_VD[u_P],
            nodes_VD[noise_M],
            q_id=torch.zeros_like(u_P),
            k_id=torch.ones_like(noise_M),  # nobody's positives
            log_weight=math.log(quantity) if quantity else -math.inf,
            **rule,
        )
        return near.loss + far.loss, {
            "loss": near.value + far.value,
            "positive_similarity": near.positive_similarity,
            "negative_similarity": far.negative_similarity,
            **(collapse_figures(nodes_VD) if len(nodes_VD) > 1 else {}),
        }

    def _nodes(self, graphs: Any) -> Tensor:
        """Features of every node, fp32 (V, D)."""
        nodes: Any = self.model.tower.nodes
        return nodes(graphs).float()

    def _pairs(self, batch: Batch) -> NodePairs:
        config = self.config
        return node_pairs(
            batch.images,
            seed=self.seed,
            epoch_N=batch.epochs.cpu().numpy(),
            id_N=batch.sample_ids.cpu().numpy(),
            walks=config.walks,
            length=config.length,
            window=config.window,
            noise=config.noise,
        )


def build_graphsage(model: nn.Module, config: GraphSAGEConfig, setting: Setting) -> GraphSAGE:
    """GraphSAGE around an encoder of graphs. Raises: ConfigError."""
    encoder = graph_encoder(model, "graphsage")
    if not hasattr(encoder.tower, "nodes"):
        raise ConfigError("step: graphsage needs a tower that gives features of nodes", hint="tower: gin")
    return GraphSAGE(encoder, config, setting)
