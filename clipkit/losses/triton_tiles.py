"""The second backend of the contrastive core: states and slopes of a slab of scores on a CUDA device.

`states` and `slopes` do for a slab (thousands of rows and columns) what `links` does for a tile, without
writing the scores. They take features as they are and a factor for each, so that nobody makes a normalised
or widened copy either. `states` gives the states of `links`, for `links.merge` and `links.finish`; `slopes`
gives the matrix whose products with the features are the gradients.

Shapes: n, c = rows and columns of the slab, D = features, B = partial results of each row or column.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton import knobs

from clipkit.losses import links
from clipkit.losses.links import Rule, empty_state
from clipkit.losses.triton_kernels import listed_kernel, slopes_kernel, states_kernel

Precision = Literal["ieee", "tf32x3", "tf32"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGE = 1 << 24  # scores from which a slab fills a device; blocks for smaller ones are tuned apart
_EACH = 16  # squares for a program of `listed_kernel`
_FUSED = {"enable_fp_fusion": True}  # Triton 3.9 does so anyway, but warns where nobody asked for it
_INTERPRETED = bool(knobs.runtime.interpret)


def _config(n: int, c: int, d: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_N": n, "BLOCK_C": c, "BLOCK_D": d}, num_warps=warps, num_stages=stages)


CONFIGS = [
    _config(128, 256, 64, 8, 3), _config(128, 128, 64, 8, 3), _config(128, 128, 64, 8, 4),
    _config(256, 64, 64, 8, 3), _config(64, 256, 64, 8, 3), _config(128, 64, 64, 4, 3),
    _config(64, 128, 64, 4, 3), _config(64, 64, 64, 4, 4), _config(128, 128, 32, 8, 3),
    _config(64, 64, 32, 4, 3), _config(64, 64, 16, 4, 2),
]  # fmt: skip
SQUARE = 64  # divides the edges of all tiles
_PROGRAMS = 1024  # several for each multiprocessor of the largest devices
if _INTERPRETED:  # nothing to tune; small slabs shall have whole and broken blocks
    CONFIGS, SQUARE, _PROGRAMS = [_config(32, 16, 16, 1, 1)], 16, 4


def _fitting(configs: list[triton.Config], named: dict[str, Any], **others: Any) -> list[triton.Config]:
    """The configurations that are worth a try."""
    q, found = others["q"], []
    memory = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    scalar = (
        others["PRECISION"] == "ieee" and q.dtype == torch.float32
    )  # no matrix units, fewer registers left
    for config in configs:
        n, c, d = (config.kwargs[name] for name in ("BLOCK_N", "BLOCK_C", "BLOCK_D"))
        fits = (n + c) * d * q.element_size() * config.num_stages <= memory
        if fits and (d == 16 or d < 2 * others["D"]) and (not scalar or (d <= 32 and n * c <= 128 * 128)):
            found.append(config)
    return found


_KEY = ["D", "LARGE", "LOGISTIC", "BOTH", "PRECISION"]  # and the dtypes
_listed: Any = listed_kernel
_tuned = triton.autotune(CONFIGS, _KEY, prune_configs_by={"early_config_prune": _fitting}, cache_results=True)
_states, _slopes = _tuned(states_kernel), _tuned(slopes_kernel)


def supports(rule: Rule) -> bool:
    """Whether there are kernels for a rule."""
    return rule.logistic or (rule.link == "softmax" and not rule.whole_rows)


def _blocks(n: int, c: int, config: dict[str, int]) -> tuple[int, int]:
    """How many blocks of rows and of columns a slab has."""
    return triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(c, config["BLOCK_C"])


def _grid(n: int, c: int, config: dict[str, int]) -> tuple[int, int]:
    """Blocks of rows, and shares of the blocks of columns: a program of `states_kernel` for each of both."""
    rows, columns = _blocks(n, c, config)
    return rows, min(columns, triton.cdiv(_PROGRAMS, rows))


def _room(of: Callable[[int, int, dict[str, int]], tuple[int, int]], n: int, c: int) -> list[int]:
    """The most blocks, in both directions, that any configuration may write."""
    return [max(sizes) for sizes in zip(*(of(n, c, config.kwargs) for config in CONFIGS), strict=True)]


def _arguments(
    q: Tensor, k: Tensor, q_factor: Tensor, k_factor: Tensor, bias: Tensor,
    row_id: Tensor, row_view: Tensor, column_id: Tensor | None, column_view: Tensor | None,
    rule: Rule, both: bool, precision: Precision,
) -> dict[str, Any]:  # fmt: skip
    """What both kernels take."""
    (n, d), c = q.shape, k.shape[0]
    assert supports(rule)
    assert q.dtype == k.dtype
    assert q.dtype in DTYPES
    assert q.stride(1) == 1 or d == 1
    assert k.stride(1) == 1 or d == 1
    if _INTERPRETED:  # it multiplies the bits of bfloat16 as integers
        q, k = q.float(), k.float()
    listed = None
    if column_id is not None:
        row_id, column_id = row_id.contiguous(), column_id.contiguous()
        down, across = triton.cdiv(n, SQUARE), triton.cdiv(c, SQUARE)
        listed = torch.empty(down, across, dtype=torch.int32, device=q.device)
        _listed[(down, triton.cdiv(across, _EACH))](row_id, column_id, listed, n, c, SQUARE, _EACH, **_FUSED)
    return {
        "q": q, "k": k, "q_factor": q_factor.float().contiguous(), "k_factor": k_factor.float().contiguous(),
        "bias": bias.float(), "row_id": row_id, "row_view": row_view.contiguous(), "column_id": column_id,
        "column_view": None if column_view is None else column_view.contiguous(), "listed": listed,
        "n": n, "c": c, "q_stride": q.stride(0), "k_stride": k.stride(0), "D": d, "LARGE": n * c >= _LARGE,
        "LOGISTIC": rule.logistic, "BOTH": both, "PRECISION": precision, "SQUARE": SQUARE,
    }  # fmt: skip


def _launch(
    kernel: Any, grid: Callable[[dict[str, Any]], tuple[int]], arguments: dict[str, Any], **listed: Any
) -> dict[str, int]:
    """Run a kernel on the plain tiles, then, the arguments `listed` changed, on those with equal ids.

    Returns:
        The block sizes, which are those that were the fastest on the plain tiles.
    """
    kernel[grid](**arguments, **_FUSED, LISTED=False)
    best = kernel.best_config
    if arguments["listed"] is not None:
        kernel.fn[grid](**(arguments | listed), **_FUSED, LISTED=True, **best.all_kwargs())
    return best.kwargs


def _on(x: Tensor) -> Any:
    """Kernels are launched on the current device, whatever their arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def states(
    q: Tensor, k: Tensor, q_factor: Tensor, k_factor: Tensor, bias: Tensor,
    row_id: Tensor, row_view: Tensor, column_id: Tensor | None, column_view: Tensor | None,
    rule: Rule, both: bool, precision: Precision = "ieee",
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """States of the rows of a slab of scores s_ij = a_i b_j ⟨q_i, k_j⟩ (+ bias, not for a softmax).

    Args:
        q: (n, D) bfloat16, float16 or float32, rows anywhere, their features side by side.
        k: (c, D), the same.
        q_factor: a (n,) float32, e.g. scale / ‖q_i‖.
        k_factor: b (c,) float32, e.g. 1 / ‖k_j‖.
        bias: 0-d.
        row_id, row_view: (n,) int64.
        column_id: (c,) int64, or None: all columns are negatives.
        column_view: (c,) int64, or None: a column with the row's id is left out. Else it is left out where
            the views are equal too, and a positive where they are not.
        rule: one that `supports`.
        both: whether the columns' states are wanted.
        precision: of products of float32 numbers. "ieee": exact ones; "tf32x3": nearly, on matrix units.

    Returns:
        States of the rows (8, n) and of the columns (8, c) or None, float32; sums (2,) float64 of scores
        without bias over positives and over negatives.
    """
    n, c = q.shape[0], k.shape[0]
    like = q_factor.new_empty(0, dtype=torch.float32)
    if n == 0 or c == 0:
        nothing = torch.zeros(2, dtype=torch.float64, device=q.device)
        return empty_state(n, like), empty_state(c, like) if both else None, nothing
    room = _room(_grid, n, c)
    of_rows = like.new_empty(2, room[1], 8, n)  # of plain tiles, and of those with equal ids
    of_columns = like.new_empty(room[0], 7, c) if both else None

    def grid(config: dict[str, Any]) -> tuple[int]:
        used = _grid(n, c, config)
        assert used[0] <= room[0]
        assert used[1] <= room[1]
        return (used[0] * used[1],)

    with _on(q):
        arguments = _arguments(
            q, k, q_factor, k_factor, bias, row_id, row_view, column_id, column_view, rule, both, precision
        ) | {"of_rows": of_rows[0], "of_columns": of_columns}
        rows, shares = _grid(n, c, _launch(_states, grid, arguments, of_rows=of_rows[1]))
    parts = of_rows[: 1 if column_id is None else 2, :shares].flatten(0, 1)
    state = _merged(parts, c, rule)
    shift = bias.double() if rule.logistic else 0.0
    totals = torch.stack([state[links.SCORE_P], parts[:, 7].sum(0)]).double().sum(1)
    counts = state[links.COUNT_P : links.COUNT_N + 1].double().sum(1)
    column_state = None if of_columns is None else _merged(of_columns[:rows], n, rule)
    return state, column_state, totals - shift * counts


def _merged(part: Tensor, others: int, rule: Rule) -> Tensor:
    """The states (8, n) of rows or columns, from what kernels found of them in parts.

    Args:
        part: (B, 7, n): LSE_N and LSE_P of a state without their logarithms, BEST_N to COUNT_P, and how many
            pairs are not negatives. An eighth row is not looked at.
        others: how many pairs each has.
        rule: the reduction.
    """
    state = empty_state(part.shape[2], part)
    mass, best = part[:, : links.BEST_N], part[:, links.BEST_N : links.SCORE_P]
    state[links.BEST_N : links.SCORE_P] = high = best.amax(0)
    if rule.logistic:
        state[links.TOTAL] = mass.sum((0, 1))
    else:
        known = high.masked_fill(high.isinf(), 0.0)
        state[: links.BEST_N] = known + (mass * (best - known).exp()).sum(0).log()
    state[links.SCORE_P : links.COUNT_N] = part[:, links.SCORE_P : links.COUNT_N].sum(0)
    state[links.COUNT_N] = others - part[:, links.COUNT_N].sum(0)
    return state


def slopes(
    q: Tensor, k: Tensor, q_factor: Tensor, k_factor: Tensor, bias: Tensor,
    row_id: Tensor, row_view: Tensor, column_id: Tensor | None, column_view: Tensor | None,
    rule: Rule, row_need: Tensor, column_need: Tensor | None, dtype: torch.dtype,
    precision: Precision = "ieee",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """W_ij = a_i b_j dL/ds_ij of a slab, so that the gradients of features are W k and Wᵀ q.

    They are those of the raw features with a and b held fixed. For a_i = scale / ‖q_i‖ and b_j = 1 / ‖k_j‖
    the whole gradient of q_i is what is left of g = (W k)_i after taking away its part along q_i, the same
    for k_j, and that of log scale is Σ_i ⟨g_i, q_i⟩.

    Args:
        q, k, q_factor, k_factor, bias: as in `states`.
        row_id, row_view, column_id, column_view: as in `states`.
        rule, precision: as in `states`.
        row_need: (5, n), what `links.finish` left of the rows, with their upstream gradients.
        column_need: (5, c), the same of the columns, for both directions, or None.
        dtype: that of W.

    Returns:
        W (n, c), and Σ dL/ds (0-d, float64), which is the gradient of the bias.
    """
    n, c = q.shape[0], k.shape[0]
    out = torch.empty(n, c, dtype=dtype, device=q.device)
    if n == 0 or c == 0:
        return out, torch.zeros((), dtype=torch.float64, device=q.device)
    room = _room(_blocks, n, c)
    sums = torch.empty(room[0] * room[1], dtype=torch.float32, device=q.device)

    def grid(config: dict[str, Any]) -> tuple[int]:
        used = _blocks(n, c, config)
        assert used[0] * used[1] <= sums.numel()
        return (used[0] * used[1],)

    with _on(q):
        arguments = _arguments(
            q, k, q_factor, k_factor, bias, row_id, row_view, column_id, column_view, rule,
            column_need is not None, precision,
        ) | {
            "row_need": row_need.float().contiguous(),
            "column_need": None if column_need is None else column_need.float().contiguous(),
            "out": out, "sums": sums, "OUT": rule.aggregate == "out",
        }  # fmt: skip
        rows, columns = _blocks(n, c, _launch(_slopes, grid, arguments))
    return out, sums[: rows * columns].sum(dtype=torch.float64)
