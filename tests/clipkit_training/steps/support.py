"""What tests of the Steps share: tiny encoders with and without BatchNorm, batches of noise, gradients.

Plain functions, so that a worker of several processes calls them too.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from clipkit.images import Preprocess
from clipkit.models import Encoder, EncoderConfig, build_model
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Setting, Step

SIDE = 16
TOWERS = {
    "group_norm": {"name": "cnn", "widths": [8, 16], "depths": [1, 1], "stem": 2, "groups": 4},
    "batch_norm": {"name": "timm", "model": "test_resnet", "small_stem": True},
    "vit": {"name": "timm", "model": "test_vit"},
}


def tiny_encoder(tower: str = "batch_norm", seed: int = 0) -> Encoder:
    """An encoder of pictures of 16 pixels; its tower is one of `TOWERS`."""
    half = (0.5, 0.5, 0.5)
    side = 32 if tower == "vit" else SIDE
    preprocess = Preprocess(size=side, mean=half, std=half, resize="squash")
    encoder = build_model(EncoderConfig(tower=TOWERS[tower], preprocess=preprocess), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():  # no branch starts at zero, or its gradient would be nothing
        if not parameter.detach().any():
            parameter.data.uniform_(0.1, 0.5, generator=generator)
    return encoder


def random_batch(
    rows: int = 8,
    *,
    views: int = 2,
    seed: int = 0,
    step: int = 0,
    side: int = SIDE,
    sample_ids: Sequence[int] | None = None,
    index: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
) -> Batch:
    """Pictures of noise with so many views; sample ids and positions are 0 … rows − 1 unless given."""
    generator = torch.Generator().manual_seed(seed)

    def pictures() -> Tensor:
        return torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator)

    return Batch(
        images=pictures(),
        ids=torch.zeros(rows, 0, dtype=torch.int64),
        sample_ids=torch.tensor(range(rows) if sample_ids is None else sample_ids),
        epochs=torch.zeros(rows, dtype=torch.int64),
        step=step,
        views=tuple(pictures() for _ in range(views)),
        index=torch.tensor(range(rows) if index is None else index),
        labels=torch.tensor([] if labels is None else labels, dtype=torch.int64),
    )


def part_of(batch: Batch, rows: slice) -> Batch:
    """One rank's rows of a batch."""
    return replace(
        batch,
        images=batch.images[rows],
        ids=batch.ids[rows],
        sample_ids=batch.sample_ids[rows],
        epochs=batch.epochs[rows],
        first=rows.start,
        views=tuple(view[rows] for view in batch.views),
        index=batch.index[rows],
        labels=batch.labels[rows],
    )


def setting(batch_size: int = 8, **more: object) -> Setting:
    """A run of 100 steps over 64 samples in one process."""
    return Setting(**{"batch_size": batch_size, "total_steps": 100, "samples": 64, **more})  # pyright: ignore


def in_float64(module: nn.Module) -> nn.Module:
    """A copy that computes in float64, for references; of an `Encoder` take `.tower`."""
    return copy.deepcopy(module).double()


def pixels(encoder: Encoder, view_N3SS: Tensor) -> Tensor:
    """What the tower sees of a view, float64."""
    return (view_N3SS.double() / 255 - encoder.pixel_mean.double()) / encoder.pixel_std.double()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradient of every trainable parameter that has one."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def train(
    step: Step, batches: Sequence[Batch], rate: float = 0.1, forward: Callable | None = None
) -> list[dict[str, Tensor]]:
    """Plain gradient descent over batches; the metrics of each step. `forward` is a wrapper of the step."""
    metrics = []
    for batch in batches:
        step.zero_grad()
        loss, figures = (forward or step)(batch)
        loss.backward()
        with torch.no_grad():
            for parameter in step.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
        step.after_step()
        metrics.append(figures)
    return metrics


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Tensors by name are equal up to a share of the largest number among those expected."""
    assert got.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        difference = float((got[name].double() - value.double()).abs().max())
        assert difference <= share * largest, f"{name}: differs by {difference}, the largest is {largest}"


class Reference:
    """Parts of a Step as float64 copies, made before it has run, and their gradients under its names.

    Args:
        step: The Step, whose model is an `Encoder`.
        heads: Names of its other trained parts.
    """

    def __init__(self, step: Step, *heads: str) -> None:
        self.encoder = step.model
        self.parts = {"model.tower": in_float64(step.model.tower)}
        self.parts |= {name: in_float64(step.get_submodule(name)) for name in heads}

    def features(self, view_N3SS: Tensor) -> Tensor:
        """The backbone's features of a view."""
        return self.parts["model.tower"](pixels(self.encoder, view_N3SS))

    def gradients(self) -> dict[str, Tensor]:
        """As `gradients` gives them for the Step."""
        return {
            f"{part}.{name}": gradient
            for part, module in self.parts.items()
            for name, gradient in gradients(module).items()
        }


def widened(step: Step, batch: Batch) -> Batch:
    """Make the backbone compute in float64; its views of the batch.

    BatchNorm over few rows enlarges what float32 rounds off, until a ReLU falls to its other side.
    """
    step.model.tower.double()
    return replace(batch, views=tuple(pixels(step.model, view) for view in batch.views))


def cosines(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Cosine of every row with every row, (N, M)."""
    return (a_ND / a_ND.norm(dim=1, keepdim=True)) @ (b_MD / b_MD.norm(dim=1, keepdim=True)).T


def assert_one_is_two(name: str, alone: dict[str, dict[str, Tensor]], ranks: list[dict]) -> None:
    """Two ranks have the loss and gradients of one process, and its state after three steps."""
    for rank in ranks:
        assert_near(rank[name]["loss"], alone["loss"], 1e-5)
        assert_near(rank[name]["gradients"], alone["gradients"], 1e-5)
        assert_near(rank[name]["state"], alone["state"], 1e-3)
    for key, value in ranks[0][name]["state"].items():
        assert torch.equal(value, ranks[1][name]["state"][key]), key
