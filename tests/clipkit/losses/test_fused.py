"""`contrast` by way of the Triton kernels, which Triton's interpreter runs on the CPU: all numbers as before.

The interpreter is chosen when triton is imported, so each test is a process of its own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed on this system")

COMPARE = """
import sys
import torch
from clipkit import losses
from clipkit.losses import contrast, fused, triton_tiles

calls = dict.fromkeys(("states", "slopes"), 0)


def counted(name):
    def call(*args, **kwargs):
        calls[name] += 1
        return kept[name](*args, **kwargs)

    return call


kept = {name: getattr(triton_tiles, name) for name in calls}
for name in calls:
    setattr(triton_tiles, name, counted(name))
labels = torch.tensor([0, 1, 2, 0, 3, 1, 4, 0, 2, 5, 3, 1, 6, 7, 2, 8, 9, 10, 9])
own = torch.randn(19, 2, 20, generator=torch.Generator().manual_seed(2))
CASES = {
    "clip": lambda x, y, s: losses.clip_loss(x, y, scale=s),
    "siglip": lambda x, y, s: losses.siglip_loss(x, y, scale=s, bias=s * 0 - 3.0),
    "siglip both ways": lambda x, y, s: contrast(x, y, scale=s, link="logistic", direction="both").loss,
    "sup_con": lambda x, y, s: losses.sup_con_loss(torch.cat([x, y]), labels.repeat(2), temperature=1 / s),
    "in": lambda x, y, s: contrast(x, y, q_id=labels, scale=s, aggregate="in", direction="both").loss,
    "neg": lambda x, y, s: contrast(x, y, q_id=labels, scale=s, denominator="neg", direction="both").loss,
    "queue": lambda x, y, s: contrast(
        x, y, q_id=labels, paired=True, negatives=y.detach().flip(0), negative_id=labels.flip(0), scale=s
    ).loss,
    "own negatives": lambda x, y, s: contrast(x, y, own_negatives=own.to(x.dtype), scale=s).loss,
    "inner product": lambda x, y, s: contrast(x, y, scale=s / 20, similarity="inner_product").loss,
}
dtype = getattr(torch, sys.argv[1])
own = own.to(dtype)
for name, case in CASES.items():
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(19, 20, generator=g).to(dtype).requires_grad_() for _ in range(2))
    with torch.no_grad():
        x[3] = 0  # a row of zeros
    s = torch.tensor(7.0, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, y, s)]
    before = dict(calls)
    loss = case(x, y, s)
    mine = torch.autograd.grad(loss, [x, y, s])
    assert all(calls[kernel] > before[kernel] for kernel in calls), name
    seen = dict(calls)
    right = case(*wide)
    assert seen == calls, "float64 is for the other way"
    assert abs(loss.item() - right.item()) <= 1e-5 * abs(right.item()), (name, loss.item(), right.item())
    close = {torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    for a, b in zip(mine, torch.autograd.grad(right, wide)):
        assert a.dtype == (torch.float32 if a.dim() == 0 else dtype)
        assert (a.double() - b).abs().max() <= close * b.abs().max(), (name, a, b)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_losses_and_gradients_are_those_of_float64(dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, dtype], cwd=ROOT, env={**os.environ, **INTERPRETED},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_tests_of_the_losses_pass_through_the_kernels_too() -> None:
    """Other libraries' values, edges, properties: whatever holds for tiles holds for the kernels."""
    files = ["test_against_others", "test_edges", "test_public_losses", "test_contrast_properties"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    # The interpreter computes what a mask then drops, and numpy warns that it overflowed.
    command += ["-W", "ignore::RuntimeWarning", *(str(HERE / f"{name}.py") for name in files)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **INTERPRETED}, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
