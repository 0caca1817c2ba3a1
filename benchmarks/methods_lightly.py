"""The same training with lightly's building blocks, in a loop of its own, as lightly's examples write it.

Pictures are transformed one by one with torchvision, through lightly's `MultiViewTransform`, in the
DataLoader. Heads, losses, momentum updates and their schedule are lightly's; the backbone, its initial
weights, the optimizer and the learning rates are those of clipkit's run.

Shapes: N pictures, D features.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import heads
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2


class Pictures(Dataset[Any]):
    """Decoded pictures with their views."""

    def __init__(self, pictures: Sequence[Any], transform: Callable[[Any], Any]) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> Any:
        return self.transform(self.pictures[place])


def transform(changes: dict[str, Any], size: int) -> MultiViewTransform:
    """Two views drawn as `AugmentConfig(**changes)` draws them."""
    names = ("brightness", "contrast", "saturation", "hue")
    view = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=changes["area"], ratio=changes["aspect"], antialias=True),
            v2.RandomApply([v2.ColorJitter(*(changes[name] for name in names))], p=changes["jitter_p"]),
            v2.RandomGrayscale(changes["grayscale"]),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    return MultiViewTransform([view, view])


class InFloat32(nn.Module):
    """A loss in float32, whatever the network computes in."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *features: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.loss(*(feature.float() for feature in features))


class SimCLR(nn.Module):
    def __init__(self, backbone: nn.Module, width: int, case: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = heads.SimCLRProjectionHead(width, case["hidden"], case["dim"])
        self.loss = InFloat32(NTXentLoss(temperature=case["temperature"]))

    def forward(self, views: Sequence[Tensor], done: float) -> Tensor:
        z_2ND = self.head(self.backbone(torch.cat(list(views))))
        return self.loss(*z_2ND.chunk(2))


class MoCo(nn.Module):
    def __init__(self, backbone: nn.Module, width: int, case: dict[str, Any]) -> None:
        super().__init__()
        self.backbone, self.momentum = backbone, case["momentum"]
        self.head = heads.MoCoProjectionHead(width, case["hidden"], case["dim"])
        self.keys, self.key_head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        deactivate_requires_grad(self.keys)
        deactivate_requires_grad(self.key_head)
        self.loss = NTXentLoss(temperature=case["temperature"], memory_bank_size=(case["queue"], case["dim"]))

    def forward(self, views: Sequence[Tensor], done: float) -> Tensor:
        update_momentum(self.backbone, self.keys, m=self.momentum)
        update_momentum(self.head, self.key_head, m=self.momentum)
        query = self.head(self.backbone(views[0]))
        with torch.no_grad():
            key = self.key_head(self.keys(views[1]))
        return self.loss(query, key)


class BYOL(nn.Module):
    def __init__(self, backbone: nn.Module, width: int, case: dict[str, Any]) -> None:
        super().__init__()
        self.backbone, self.momentum = backbone, case["momentum"]
        self.head = heads.BYOLProjectionHead(width, case["hidden"], case["dim"])
        self.predictor = heads.BYOLPredictionHead(case["dim"], case["hidden"], case["dim"])
        self.twin, self.twin_head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        deactivate_requires_grad(self.twin)
        deactivate_requires_grad(self.twin_head)
        self.loss = InFloat32(NegativeCosineSimilarity())

    def forward(self, views: Sequence[Tensor], done: float) -> Tensor:
        tau = cosine_schedule(round(1000 * done), 1000, self.momentum, 1)
        update_momentum(self.backbone, self.twin, m=tau)
        update_momentum(self.head, self.twin_head, m=tau)
        predicted = [self.predictor(self.head(self.backbone(view))) for view in views]
        with torch.no_grad():
            target = [self.twin_head(self.twin(view)) for view in views]
        return (self.loss(predicted[0], target[1]) + self.loss(predicted[1], target[0])) / 2


class SimSiam(nn.Module):
    def __init__(self, backbone: nn.Module, width: int, case: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = heads.SimSiamProjectionHead(width, case["hidden"], case["dim"])
        self.predictor = heads.SimSiamPredictionHead(case["dim"], case["dim"] // 4, case["dim"])
        self.loss = InFloat32(NegativeCosineSimilarity())

    def forward(self, views: Sequence[Tensor], done: float) -> Tensor:
        z = [self.head(self.backbone(view)) for view in views]
        p = [self.predictor(projected) for projected in z]
        return (self.loss(p[0], z[1].detach()) + self.loss(p[1], z[0].detach())) / 2


METHODS = {"simclr": SimCLR, "moco_v2": MoCo, "byol": BYOL, "simsiam": SimSiam}


def train(
    backbone: nn.Module,
    width: int,
    pictures: Sequence[Any],
    case: dict[str, Any],
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    rate_at: Callable[[int], float],
    bfloat16: bool,
) -> None:
    """Train `backbone` in place for `case["steps"]` steps, in mixed precision if so."""
    torch.manual_seed(case["seed"])
    data = Pictures(pictures, transform(case["changes"], case["size"]))
    loader = DataLoader(data, case["batch"], shuffle=True, drop_last=True, num_workers=case["workers"])
    model = METHODS[case["method"]](backbone, width, case)
    optimizer = optimizer_of(model)
    batches = _endless(loader)
    model.train()
    for step in range(case["steps"]):
        views = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(views, step / case["steps"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _endless(loader: DataLoader[Any]) -> Iterator[list[Tensor]]:
    while True:
        yield from loader
