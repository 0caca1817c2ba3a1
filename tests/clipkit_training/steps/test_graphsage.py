"""GraphSAGE: a step by hand, the loss of the library, graphs without edges."""

from typing import Any

import pytest
import torch

from clipkit.errors import ConfigError, InputError
from clipkit.losses import logistic_loss
from clipkit_data.batches.maker import Batch
from clipkit_data.graph_walks import NodePairs, node_pairs
from clipkit_training.steps.base import Setting
from clipkit_training.steps.graphsage import GraphSAGE, GraphSAGEConfig, build_graphsage
from tests.clipkit_training.steps.graph_worker import IDS, graph_batch, graph_encoder
from tests.clipkit_training.steps.support import assert_near, gradients, in_float64, tiny_encoder


def step_of(run: Setting | None = None, **options: Any) -> GraphSAGE:
    return build_graphsage(graph_encoder(), GraphSAGEConfig(**options), run or Setting())


def pairs_of(batch: Batch, config: GraphSAGEConfig) -> NodePairs:
    """The nodes that the step takes."""
    counts = {name: getattr(config, name) for name in ("walks", "length", "window", "noise")}
    key = {"epoch_N": batch.epochs.numpy(), "id_N": batch.sample_ids.numpy()}
    return node_pairs(batch.images, seed=0, **key, **counts)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_step_is_the_formula_in_float64(unit: bool, weight: float) -> None:
    step = step_of(unit=unit, negative_weight=weight, temperature=0.5, walks=2, noise=2)
    tower: Any = in_float64(step.model.tower)
    batch = graph_batch()
    loss, metrics = step(batch)
    loss.backward()
    copy = batch.images.clone()
    copy.x = copy.x.double()
    z_VD = tower.nodes(copy)
    if unit:
        z_VD = z_VD / z_VD.norm(dim=1, keepdim=True).clamp(min=1e-300)
    u_P, v_P, noise_M = pairs_of(batch, step.config)
    rows = []
    for u, v in zip(u_P, v_P, strict=True):
        near = -torch.log(torch.sigmoid(z_VD[u] @ z_VD[v] / 0.5))
        far = sum(-torch.log(torch.sigmoid(-(z_VD[u] @ z_VD[n]) / 0.5)) for n in noise_M)
        rows.append(near + weight * far)
    expected = torch.stack(rows).mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert_near(gradients(step.model.tower), gradients(tower), 1e-4)
    torch.testing.assert_close(metrics["loss"], loss.detach())


def test_a_step_has_the_value_of_logistic_loss() -> None:
    step, batch = step_of(unit=False, negative_weight=0.7), graph_batch()
    tower: Any = step.model.tower
    z_VD = tower.nodes(batch.images)
    u_P, v_P, noise_M = pairs_of(batch, step.config)
    expected = logistic_loss(z_VD[u_P], z_VD[v_P], z_VD[noise_M], negative_weight=0.7)
    torch.testing.assert_close(step(batch)[0], expected)


def test_training_brings_neighbours_together_and_noise_apart() -> None:
    # The skip-gram loss of GraphSAGE's code has the sign the other way round: it was minimised all the same.
    step = step_of(temperature=0.5)
    optimizer = torch.optim.Adam(step.parameters(), lr=0.01)
    gaps = []
    for _ in range(30):
        loss, metrics = step(graph_batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gaps.append(float(metrics["positive_similarity"] - metrics["negative_similarity"]))
    assert gaps[-1] > gaps[0] + 0.05


@pytest.mark.parametrize("rows", [slice(0, 8), slice(0, 1)])
def test_graphs_without_any_edge_teach_nothing_and_are_refused(rows: slice) -> None:
    with pytest.raises(InputError, match=r"no graph of this batch has an edge.*step: graphcl"):
        step_of()(graph_batch(rows, edgeless=IDS))


def test_the_runs_seed_decides_the_walks_unless_the_step_has_its_own() -> None:
    def noise(run: int, own: int | None = None) -> list[int]:
        step = step_of(Setting(seed=run, samples=1), seed=own, noise=20)
        return step._pairs(graph_batch()).noise_M.tolist()

    assert noise(3) == noise(3) != noise(0)
    assert noise(3, own=0) == noise(0)


def test_one_graph_alone_is_trained_on() -> None:
    loss, metrics = step_of()(graph_batch(slice(0, 1)))
    loss.backward()
    assert metrics["loss"] > 0
    assert torch.isfinite(loss)


def test_a_model_of_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match="graphsage trains an encoder of graphs"):
        build_graphsage(tiny_encoder("group_norm"), GraphSAGEConfig(), Setting())
