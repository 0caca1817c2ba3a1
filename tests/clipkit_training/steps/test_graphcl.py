"""GraphCL: a step by hand in float64, and the published codes' faults."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clipkit.errors import ConfigError, InputError
from clipkit_data.batches.maker import Batch
from clipkit_data.graph_views import GraphChange, graph_view
from clipkit_training.steps.base import Setting
from clipkit_training.steps.graphcl import GraphCL, GraphCLConfig, build_graphcl
from tests.clipkit_training.steps.graph_worker import IDS, TWICE, graph_batch, graph_encoder
from tests.clipkit_training.steps.support import (
    assert_near,
    cosines,
    gradients,
    in_float64,
    tiny_encoder,
)

NOTHING = (GraphChange(name="none"),)


def step_of(run: Setting | None = None, **options: Any) -> GraphCL:
    torch.manual_seed(0)
    return build_graphcl(graph_encoder(), GraphCLConfig(**options), run or Setting())


def views(batch: Batch, config: GraphCLConfig, seed: int = 0) -> list[Any]:
    """The two views as the step makes them, in float64."""
    epochs, ids = batch.epochs.numpy(), batch.sample_ids.numpy()
    found = [
        graph_view(batch.images, changes, seed=seed, epoch_N=epochs, id_N=ids, view=view)
        for view, changes in enumerate((config.first, config.second))
    ]
    for view in found:
        view.x = view.x.double()
    return found


def naive(s_NN: Tensor, denominator: str, ids: Sequence[int]) -> Tensor:
    """The paper's loss of one direction, row by row; of a graph's positives the mean."""
    rows = []
    for i, own in enumerate(ids):
        others = [s_NN[i, j] for j, other in enumerate(ids) if denominator == "all" or other != own]
        positives = [s_NN[i, j] for j, other in enumerate(ids) if other == own]
        rows.append(-torch.stack(positives).mean() + torch.logsumexp(torch.stack(others), 0))
    return torch.stack(rows).mean()


@pytest.mark.parametrize("denominator", ["all", "neg"])
@pytest.mark.parametrize("direction", ["one", "both"])
@pytest.mark.parametrize("ids", [IDS, TWICE])
def test_a_step_is_the_formula_in_float64(denominator: str, direction: str, ids: Sequence[int]) -> None:
    # With ids that come up twice: the batch crosses from one epoch to the next, and a graph of both does not
    # repel itself.
    step = step_of(denominator=denominator, direction=direction, temperature=0.3, dim=5)
    tower, head = in_float64(step.model.tower), in_float64(step.head)
    batch = graph_batch(ids=ids)
    loss, metrics = step(batch)
    loss.backward()
    z1_ND, z2_ND = (head(tower(view)) for view in views(batch, step.config))
    s_NN = cosines(z1_ND, z2_ND) / 0.3
    expected = naive(s_NN, denominator, ids)
    if direction == "both":
        expected = (expected + naive(s_NN.T, denominator, ids)) / 2
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    parts = {"model.tower": tower, "head": head}
    wanted = {f"{part}.{n}": g for part, module in parts.items() for n, g in gradients(module).items()}
    assert_near(gradients(step), wanted, 1e-4)
    torch.testing.assert_close(metrics["loss"], loss.detach())
    assert 0 < metrics["embedding_std"] < 2


def test_views_are_those_of_the_sample_whatever_the_batch() -> None:
    step = step_of(first=NOTHING)
    whole, part = graph_batch(), graph_batch(slice(5, 8))
    one, other = step._view(whole, 1), step._view(part, 1)
    assert torch.equal(one.x[one.ptr[5] :], other.x)
    assert len(one.x) < len(whole.images.x)
    assert torch.equal(step._view(whole, 0).x, whole.images.x)


def test_the_runs_seed_decides_the_views_unless_the_step_has_its_own() -> None:
    def view(run: int, own: int | None = None) -> Tensor:
        return step_of(Setting(seed=run), seed=own)._view(graph_batch(), 1).edge_index

    assert torch.equal(view(3), view(3))
    assert not torch.equal(view(3), view(0))
    assert torch.equal(view(3, own=0), view(0))


def test_the_denominator_holds_the_positive_unless_the_codes_form_is_asked_for() -> None:
    # GraphCL's and CEBRA's codes leave it out: the loss falls below zero, and log K − loss bounds nothing.
    losses = {}
    for denominator in ("all", "neg"):
        step = step_of(denominator=denominator, first=NOTHING, second=NOTHING, temperature=0.05)
        losses[denominator] = step(graph_batch())[0].item()
    assert losses["neg"] < 0 < losses["all"]


def test_a_collapsed_encoder_has_the_loss_of_as_many_candidates_as_there_are_graphs() -> None:
    # PyGCL's mask lets the similarities within a view back into the denominator: 2 N − 1 candidates.
    step = step_of()
    for parameter in step.head.parameters():
        parameter.data.fill_(1 if parameter.ndim == 1 else 0)
    loss, _ = step(graph_batch())
    torch.testing.assert_close(loss, torch.tensor(np.log(8.0), dtype=torch.float32))


def test_a_small_temperature_does_not_overflow() -> None:
    # The published code takes exponentials of cosine / T before it sums them.
    loss, _ = step_of(temperature=0.001)(graph_batch())
    loss.backward()
    assert torch.isfinite(loss)


def test_graphs_without_edges_are_trained_on_too() -> None:
    step = step_of(first=[{"name": "perturb_edges"}], second=[{"name": "subgraph"}])
    loss, _ = step(graph_batch(edgeless=tuple(range(8))))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(step).values())


def test_one_graph_alone_has_no_negatives() -> None:
    with pytest.raises(InputError, match="a batch of one graph has no negatives"):
        step_of()(graph_batch(slice(0, 1)))


def test_one_graph_in_all_has_none_either() -> None:
    with pytest.raises(ConfigError, match="the training data has one sample"):
        step_of(Setting(samples=1))


def test_a_model_of_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match="graphcl trains an encoder of graphs"):
        build_graphcl(tiny_encoder("group_norm"), GraphCLConfig(), Setting())


def test_training_brings_views_together() -> None:
    step = step_of()
    optimizer = torch.optim.Adam(step.parameters(), lr=0.01)
    accuracies = []
    for seed in range(40):
        loss, metrics = step(graph_batch(seed=seed % 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracies.append(float(metrics["accuracy"]))
    assert sum(accuracies[-8:]) > sum(accuracies[:8]) + 0.8
