"""One of two gloo ranks that train the Steps on graphs, on unequal parts of the same batches, under DDP.

The tests import this file too, to do the same in one process with the whole batches.
"""

from collections.abc import Sequence
from typing import Any

import networkx as nx
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipkit.errors import InputError
from clipkit.models import Encoder, EncoderConfig, build_model
from clipkit_data.batches.graphs import Graphs, write_graph
from clipkit_data.batches.maker import Batch
from clipkit_data.records import Record
from clipkit_training.steps.base import Step
from clipkit_training.steps.graphcl import GraphCLConfig, build_graphcl
from clipkit_training.steps.graphsage import GraphSAGEConfig, build_graphsage
from tests.clipkit_training.steps.support import gradients, setting, train
from tests.distributed.support import launch

ROWS, FIRST = 8, 5  # rank 0 has the first five graphs
IDS, TWICE = tuple(range(ROWS)), (0, 1, 2, 3, 4, 5, 6, 0)  # the last graph is the first in the next epoch
CONFIGS = {
    "graphcl": GraphCLConfig(),
    "graphcl_neg": GraphCLConfig(denominator="neg", direction="both"),
    "graphcl_twice": GraphCLConfig(),  # rank 1 has a graph that rank 0 has too
    "graphsage": GraphSAGEConfig(temperature=0.5),
    "graphsage_without_edges": GraphSAGEConfig(unit=False, negative_weight=0.5),
}


def graph_encoder(seed: int = 0, **options: Any) -> Encoder:
    """A small GIN for one feature of each node."""
    tower = {"name": "gin", "hidden": 8, "layers": 2, **options}
    return build_model(EncoderConfig(modality="graph", tower=tower), seed=seed)


def graph_batch(
    rows: slice = slice(0, ROWS), *, seed: int = 0, edgeless: tuple[int, ...] = (), ids: Sequence[int] = IDS
) -> Batch:
    """Random graphs with random features; those named have no edges, and a second one of an id is of the next
    epoch."""
    items = []
    for row in range(ROWS)[rows]:
        generator = np.random.default_rng([seed, row])
        nodes = int(generator.integers(5, 12))
        graph = nx.gnm_random_graph(nodes, 0 if row in edgeless else 2 * nodes, seed=seed * ROWS + row)
        pairs_E2 = np.array(graph.edges, dtype=np.int64).reshape(-1, 2)
        edges_2E = np.concatenate([pairs_E2, pairs_E2[:, ::-1]]).T
        data = write_graph(edges_2E, generator.normal(size=(nodes, 1)), nodes=nodes)
        items.append(Graphs(1).load(Record((0, row), str(row), data, None, extension="graph.npz")))
    epochs = [seed + list(ids[:row]).count(ids[row]) for row in range(ROWS)]
    return Batch(
        images=Graphs(1).stack(items),
        ids=torch.zeros(len(items), 0, dtype=torch.int64),
        sample_ids=torch.tensor(ids)[rows],
        epochs=torch.tensor(epochs)[rows],
        step=seed,
        first=rows.start or 0,
    )


def tiny_step(name: str, group: dist.ProcessGroup | None = None) -> Step:
    """A Step with fixed weights."""
    torch.manual_seed(0)
    build: Any = build_graphcl if name.startswith("graphcl") else build_graphsage
    return build(graph_encoder(), CONFIGS[name], setting(ROWS, group=group))


def trained(name: str, rank: int | None, group: dist.ProcessGroup | None) -> dict[str, dict[str, Tensor]]:
    """Loss and gradients of the first of three steps, and the state after the last."""
    step = tiny_step(name, group)
    rows = {None: slice(0, ROWS), 0: slice(0, FIRST), 1: slice(FIRST, ROWS)}[rank]
    edgeless = tuple(range(FIRST, ROWS)) if name.endswith("without_edges") else ()  # all that rank 1 has
    ids = TWICE if name.endswith("twice") else IDS
    batches = [graph_batch(rows, seed=seed, edgeless=edgeless, ids=ids) for seed in range(3)]
    forward: nn.Module = step
    if group is not None:
        forward = DistributedDataParallel(step, process_group=group, broadcast_buffers=False)
    figures = train(step, batches[:1], rate=0.02, forward=forward)
    first = gradients(step)
    train(step, batches[1:], rate=0.02, forward=forward)
    return {"loss": {"value": figures[0]["loss"]}, "gradients": first, "state": step.state_dict()}


def work(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """Everything this rank finds out."""
    rows = slice(0, FIRST) if rank == 0 else slice(FIRST, ROWS)
    try:
        tiny_step("graphsage", group)(graph_batch(rows, edgeless=IDS))
        refusal = ""
    except InputError as error:
        refusal = str(error)
    return {name: trained(name, rank, group) for name in CONFIGS} | {"refusal": refusal}


if __name__ == "__main__":
    launch(work, 2)
