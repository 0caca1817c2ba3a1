"""One of two gloo ranks whose BatchNorm sees the rows of both; the test does the same in one process."""

import copy
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit.errors import InputError
from clipkit.models.batch_norm import synchronised
from clipkit.models.heads import simclr_head, simsiam_projector
from tests.distributed.support import launch

SIZES = [(5, 3), (1, 7), (0, 4), (4, 4)]  # rows of rank 0 and of rank 1


def cases() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Modules with fixed weights, and the shape of their rows."""
    torch.manual_seed(0)
    mean_of_all = nn.BatchNorm1d(4, momentum=None)
    one_picture = nn.Sequential(nn.BatchNorm3d(2, eps=0.1, momentum=0.3), nn.Flatten(), nn.Linear(16, 3))
    efficient = timm.create_model("test_efficientnet", num_classes=0)
    return {
        "1d": (nn.Sequential(nn.Linear(3, 4), mean_of_all), (3,)),
        "2d": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (3, 5, 5)),
        "3d": (one_picture, (2, 2, 2, 2)),
        "no statistics": (nn.BatchNorm1d(3, track_running_stats=False), (3,)),
        "scale alone": (simclr_head(3, "v1", dim=4), (3,)),
        "learns nothing": (simsiam_projector(3, dim=4), (3,)),
        "with activation": (efficient, (3, 16, 16)),
    }


def found(rank: int | None, group: dist.ProcessGroup | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, gradients of rows and weights, and buffers, over batches of `SIZES`."""
    results: dict[str, Tensor] = {}
    for name, (plain, shape) in cases().items():
        generator = torch.Generator().manual_seed(1)
        module = synchronised(plain.to(dtype), group)
        for number, sizes in enumerate(SIZES):
            if name == "with activation" and 0 in sizes:
                continue  # its pooling refuses no rows
            rows = 3 + 2 * torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64).to(dtype)
            rows = rows[_part(sizes, rank)].requires_grad_()
            out = module(rows)
            factors = torch.randn(sum(sizes), *out.shape[1:], generator=generator, dtype=torch.float64).to(
                dtype
            )
            module.zero_grad()
            (out * factors[_part(sizes, rank)]).sum().backward()
            assert rows.grad is not None
            results |= {f"{name}.{number}.out": out.detach(), f"{name}.{number}.rows": rows.grad}
            for parameter_name, parameter in module.named_parameters():
                assert parameter.grad is not None
                results[f"{name}.{number}.sum.{parameter_name}"] = parameter.grad.clone()
        results |= {f"{name}.same.{key}": value.clone() for key, value in module.state_dict().items()}
        with torch.no_grad():
            results[f"{name}.same.eval"] = module.eval()(torch.ones(2, *shape, dtype=dtype))
    return results


def _part(sizes: tuple[int, int], rank: int | None) -> slice:
    return {None: slice(None), 0: slice(0, sizes[0]), 1: slice(sizes[0], None)}[rank]


def refusal(rank: int, group: dist.ProcessGroup) -> str:
    """What this rank is told where all ranks together have one row."""
    norm = synchronised(nn.BatchNorm1d(3), group)
    try:
        norm(torch.ones(rank, 3))
    except InputError as error:
        return str(error)
    return ""


def work(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """Everything this rank finds out."""
    twin = copy.deepcopy(synchronised(nn.BatchNorm1d(3), group))
    half = synchronised(nn.BatchNorm1d(3), group)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = half(torch.randn(4, 3).bfloat16())
    return {
        "float32": found(rank, group, torch.float32),
        "float64": found(rank, group, torch.float64),
        "refusal": refusal(rank, group),
        "twin": twin(torch.full((2, 3), float(rank))).detach(),
        "narrow": str(narrow.dtype),
    }


if __name__ == "__main__":
    launch(work, 2)
