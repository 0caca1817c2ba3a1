"""GraphCL: two changed copies of a graph attract each other and repel the rest of the batch.

Each view is made of the batch by a change that is drawn per graph from a list (`clipkit_data.graph_views`).
The paper and its published codes differ, and the options can say each of them. The paper changes both views
with ratio 0.2. The code for the TU data sets leaves the first view alone, changes 0.1 of the second and keeps
a subgraph of 0.2; the code for semi-supervised training changes both with ratio 0.2 at T 0.5. All codes leave
the positive out of the denominator (`denominator: neg`): then the loss may be negative, and log K − loss
bounds no information. The default here, "all", is InfoNCE.

Shapes: N graphs of this rank, D features.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.errors import ConfigError, InputError
from clipkit.losses import contrast
from clipkit.models import Encoder
from clipkit.models.batch_norm import synchronised
from clipkit.models.heads import mlp_head
from clipkit_data.batches.maker import Batch
from clipkit_data.graph_views import GraphChange, graph_view
from clipkit_training.steps.base import Metrics, Setting, Step, collapse_figures

Changes = Annotated[tuple[GraphChange, ...], Field(min_length=1)]
_DROP_OR_PART = (GraphChange(name="drop_nodes"), GraphChange(name="subgraph"))


class GraphCLConfig(Config):
    """Options of GraphCL.

    Args:
        first, second: The changes of which one is drawn for each graph, for each view.
        temperature: Of the cosines.
        denominator: "all", InfoNCE, or "neg", negatives alone.
        direction: "one", the first view's graphs against the second's, or "both".
        hidden, dim: Widths of the projection head; None: of the features.
        seed: Of the changes; None: the run's.
        sync_batch_norm: BatchNorm takes the statistics of all ranks' nodes.
    """

    first: Changes = _DROP_OR_PART
    second: Changes = _DROP_OR_PART
    temperature: Annotated[float, Field(gt=0)] = 0.2
    denominator: Literal["all", "neg"] = "all"
    direction: Literal["one", "both"] = "one"
    hidden: Annotated[int, Field(ge=1)] | None = None
    dim: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    sync_batch_norm: bool = True


class GraphCL(Step):
    """Graphs against themselves under two changes.

        L = mean_i −log(exp(s_ii) / Σ_j exp(s_ij)),   s_ij = cosine(z_i, z'_j) / T;   "neg": j ≠ i

    A graph that is in a batch twice, at the border of two epochs, is no negative of itself: both copies are
    its positives, with the mean over them outside of the logarithm.

    Args:
        model: The encoder; its BatchNorm layers are changed in place.
        config: The options.
        setting: The run.

    Raises:
        ConfigError: There is one training sample alone.

    References:
        You et al. 2020, "Graph Contrastive Learning with Augmentations", eq. 3.
    """

    model: Encoder

    def __init__(self, model: Encoder, config: GraphCLConfig, setting: Setting) -> None:
        super().__init__()
        setting.need_negatives()
        self.model = synchronised(model, setting.group) if config.sync_batch_norm else model
        self.config, self.group = config, setting.group
        self.seed = setting.seed if config.seed is None else config.seed
        widths = (model.dim, config.hidden or model.dim, config.dim or model.dim)
        self.head = mlp_head(widths, batch_norm=False, bias=True, last_bias=True)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of a batch's graphs. Raises: InputError for one graph alone."""
        count = len(batch.sample_ids)
        if count < 2 and self.group is None:
            raise InputError("a batch of one graph has no negatives", hint="raise data.batch_size")
        first_ND, second_ND = (self.model(self._view(batch, view)) for view in (0, 1))
        output = contrast(
            self.head(first_ND),
            self.head(second_ND),
            q_id=batch.sample_ids.to(first_ND.device),
            scale=1 / self.config.temperature,
            denominator=self.config.denominator,
            direction=self.config.direction,
            group=self.group,
        )
        assert output.accuracy is not None
        return output.loss, {
            "loss": output.value,
            "accuracy": output.accuracy,
            "positive_similarity": output.positive_similarity,
            "negative_similarity": output.negative_similarity,
            **(collapse_figures(first_ND) if count > 1 else {}),
        }

    def _view(self, batch: Batch, view: int) -> Any:
        """One view of every graph, a `torch_geometric` batch."""
        return graph_view(
            batch.images,
            (self.config.first, self.config.second)[view],
            seed=self.seed,
            epoch_N=batch.epochs.cpu().numpy(),
            id_N=batch.sample_ids.cpu().numpy(),
            view=view,
        )


def graph_encoder(model: nn.Module, step: str) -> Encoder:
    """The model, where it encodes graphs. Raises: ConfigError."""
    if not isinstance(model, Encoder) or model.modality != "graph":
        raise ConfigError(f"step: {step} trains an encoder of graphs", hint="set model.modality: graph")
    return model


def build_graphcl(model: nn.Module, config: GraphCLConfig, setting: Setting) -> GraphCL:
    """GraphCL around an encoder of graphs. Raises: ConfigError."""
    return GraphCL(graph_encoder(model, "graphcl"), config, setting)
