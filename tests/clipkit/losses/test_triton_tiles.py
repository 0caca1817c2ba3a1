"""The Triton kernels against definitions written out in float64: states, gradients, merging, equal bits.

Triton's interpreter must be asked for before triton is imported, which a test process may have done already.
So this file, run as `python test_triton_tiles.py interpret FOLDER`, evaluates every case and saves what it
found; the tests start it so in a process with TRITON_INTERPRET=1, and where there is a GPU in one without,
and compare. Run with `compile`, it compiles the kernels for GPUs that need not be there.

Shapes: n, c, D = rows, columns, features of a slab.
"""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipkit.losses import links
from clipkit.losses.links import Rule

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not there for this platform")
PATTERNS = ("unique", "classes", "queue", "none")
RULES = {
    "softmax": Rule(),
    "softmax-in": Rule(aggregate="in"),
    "softmax-neg": Rule(denominator="neg"),
    "softmax-neg-in": Rule(denominator="neg", aggregate="in"),
    "softmax-single": Rule(single=True),
    "softmax-one": Rule(denominator="one", single=True),
    "logistic": Rule("logistic"),
    "nce": Rule("nce"),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDED = {"fp32": 1e-6, "bf16": 2.0**-7}  # of W; the interpreter cuts off what a device rounds


@dataclass(frozen=True)
class Case:
    """How to draw a slab.

    Attributes:
        pattern: of ids: each its own, seven classes in two views, a queue (no views), or none at all.
        scale: the size of scores; `steep` makes those of some rows and columns 50 times as large.
        zero: whether a row and a column have the factor 0.
        easy: whether positives are so near and negatives so far that nearly nothing is left of the loss.
        bias: added to scores by the logistic links.
        out: dtype of W.
    """

    n: int = 40
    c: int = 37
    d: int = 20
    rule: str = "softmax"
    both: bool = True
    pattern: str = "classes"
    dtype: str = "fp32"
    scale: float = 3.0
    steep: bool = False
    zero: bool = False
    easy: bool = False
    bias: float = -1.25
    out: str = "fp32"

    def __str__(self) -> str:
        words = [name for name in ("both", "steep", "zero", "easy") if getattr(self, name)]
        shape = f"{self.n}x{self.c}x{self.d}"
        sizes = f"{self.scale:g} {self.bias:g}"
        return " ".join([self.rule, shape, self.dtype, self.out, self.pattern, sizes, *words])

    def slab(self, device: str = "cpu") -> dict[str, Any]:
        """The first arguments of `states` and `slopes`."""
        g = torch.Generator().manual_seed(self.n * 1000 + self.c * 10 + self.d)

        def whole(high: int, size: int) -> Tensor:
            return torch.randint(0, high, (size,), generator=g)

        n, c, d = self.n, self.c, self.d
        q, k = (torch.randn(size, d + 3, generator=g).to(DTYPES[self.dtype])[:, :d] for size in (n, c))
        a, b = (0.5 + torch.rand(size, generator=g) for size in (n, c))
        a *= self.scale / d**0.5
        if self.steep:
            a[::3] *= 50.0
            b[1::4] *= 50.0
        if self.easy:
            q = torch.nn.functional.normalize(q, dim=1)
            k[: n - n // 3] = q[n // 3 :]
            a, b = torch.full((n,), self.scale), torch.ones(c)
        if self.zero:
            a[0], b[-1] = 0.0, 0.0
        row_view, column_view = torch.zeros(n, dtype=torch.int64), torch.ones(c, dtype=torch.int64)
        row_id, column_id = torch.arange(n), None
        if self.pattern == "unique":
            column_id = torch.arange(c) + n // 3
        elif self.pattern == "classes":  # numbers that differ only where 32 bits end
            row_id, column_id = whole(7, n) * 2**33 - 5, whole(7, c) * 2**33 - 5
            row_view, column_view = whole(2, n), whole(2, c)
        elif self.pattern == "queue":
            column_id = whole(2 * n, c)
        slab = {
            "q": q, "k": k, "q_factor": a, "k_factor": b, "bias": torch.tensor(self.bias),
            "row_id": row_id, "row_view": row_view, "column_id": column_id,
            "column_view": column_view if self.pattern in ("unique", "classes") else None,
        }  # fmt: skip
        return {name: None if x is None else x.to(device) for name, x in slab.items()}

    def upstream(self) -> tuple[Tensor, Tensor]:
        """Upstream gradients of rows and of columns."""
        g = torch.Generator().manual_seed(self.n + self.c)
        return torch.rand(self.n, generator=g), torch.rand(self.c, generator=g)


def _shapes() -> list[Case]:
    """Every shape with every number of features, and turns at the rest."""
    found, rules, dtypes = [], ("softmax", "logistic"), tuple(DTYPES)
    for i, (n, c) in enumerate(((1, 1), (1, 40), (5, 7), (33, 17), (70, 50))):
        for j, d in enumerate((1, 3, 20, 40)):
            found.append(Case(n, c, d, rules[(i + j // 2) % 2], True, PATTERNS[(i + j) % 4], dtypes[j % 3]))
    return found


CASES = [
    *(Case(rule=r, pattern="unique" if x.single else "classes") for r, x in RULES.items()),
    *(Case(rule=r, pattern="unique" if x.single else "classes", both=False) for r, x in RULES.items()),
    *_shapes(),
    *(Case(rule=r, dtype=t, scale=1e4) for r in ("softmax", "logistic") for t in DTYPES),
    *(Case(rule=r, steep=True) for r in ("softmax", "softmax-in", "softmax-neg", "logistic")),
    *(Case(21, 14, rule=r, scale=40.0, easy=True, pattern="unique") for r in ("softmax", "softmax-neg")),
    Case(rule="logistic", pattern="none", scale=0.5, bias=-14.0),
    *(Case(50, 60, rule=r, zero=True, pattern="unique") for r in ("softmax", "logistic")),
    *(Case(50, 60, rule=r, dtype="bf16", out="bf16") for r in ("softmax", "logistic")),
    *(Case(80, 70, both=False, pattern=p) for p in ("unique", "queue")),
]  # fmt: skip

AGAIN = CASES[::7]


# The process that runs the kernels


def _part(slab: dict[str, Any], rows: slice, columns: slice) -> dict[str, Any]:
    mine = {"q": rows, "q_factor": rows, "row_id": rows, "row_view": rows}
    mine |= dict.fromkeys(("k", "k_factor", "column_id", "column_view"), columns)
    return {name: x[mine[name]] if name in mine and x is not None else x for name, x in slab.items()}


def _evaluate(case: Case, device: str) -> dict[str, Any]:
    """States, and W with the sum of slopes that belong to them."""
    from clipkit.losses import triton_tiles

    rule, slab = RULES[case.rule], case.slab(device)
    rows, columns, sums = triton_tiles.states(**slab, rule=rule, both=case.both)
    needs = []
    for state, up in zip((rows, columns), case.upstream(), strict=True):
        needs.append(None if state is None else links.finish(state, rule)[2])
        if state is not None:
            needs[-1][links.UPSTREAM] *= up.to(device)
    w, total = triton_tiles.slopes(
        **slab, rule=rule, row_need=needs[0], column_need=needs[1], dtype=DTYPES[case.out]
    )
    return {"rows": rows, "columns": columns, "sums": sums, "w": w, "total": total}


def _halves(case: Case, device: str) -> list[list[Any]]:
    """States of the left and the right of a slab, of its upper and lower half, and of none of its rows."""
    from clipkit.losses import triton_tiles

    slab = case.slab(device)
    n, c, every = case.n // 2, case.c // 3, slice(None)
    parts = [(every, slice(c)), (every, slice(c, None)), (slice(n), every), (slice(n, None), every)]
    parts.append((slice(0), every))
    return [
        list(triton_tiles.states(**_part(slab, *part), rule=RULES[case.rule], both=True)) for part in parts
    ]


def _evaluate_all(folder: Path, device: str) -> None:
    found = {str(case): _evaluate(case, device) for case in CASES}
    again = {str(case): _evaluate(case, device) for case in AGAIN}
    halves = {str(case): _halves(case, device) for case in AGAIN}
    torch.save({"found": found, "again": again, "halves": halves}, folder / "found.pt")


def _compile(folder: Path) -> None:
    """Compile what a device would, down to its machine code, for Ampere (sm_80) and Hopper (sm_90)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clipkit.losses import triton_kernels

    types = {"q": "*bf16", "k": "*bf16", "out": "*bf16", "listed": "*i32", "bias": "*fp32"}
    types |= dict.fromkeys(("n", "c", "q_stride", "k_stride"), "i32")
    types |= dict.fromkeys(("row_id", "row_view", "column_id", "column_view"), "*i64")
    fixed = {"D": 96, "LARGE": False, "BOTH": True, "PRECISION": "ieee", "OUT": True, "EACH": 16}
    fixed |= {"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_D": 64, "SQUARE": 64}
    for arch, logistic in ((80, True), (90, False)):
        for name in ("listed_kernel", "states_kernel", "slopes_kernel"):
            for listed in (False, True):
                kernel = getattr(triton_kernels, name)
                values = fixed | {"LOGISTIC": logistic, "LISTED": listed}
                constants = {x: values[x] for x in kernel.arg_names if x in values}
                signature = {
                    x: "constexpr" if x in constants else types.get(x, "*fp32") for x in kernel.arg_names
                }
                source = ASTSource(kernel, signature, constants)
                options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
                done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
                (folder / f"{name}-{arch}-{listed:d}").write_bytes(done.asm["cubin"])


# What they must find


def _loss(positive: Tensor, negative: Tensor, rule: Rule) -> Tensor | None:
    """The loss of a row with these scores, from its definition; None where it does not count."""
    if rule.logistic:
        terms = torch.cat([torch.logaddexp(-positive, 0 * positive), torch.logaddexp(negative, 0 * negative)])
        return terms.sum() if len(terms) else None
    if len(positive) == 0 or (rule.denominator == "neg" and len(negative) == 0):
        return None
    below = negative if rule.denominator == "neg" else torch.cat([positive, negative])
    logs = positive - below.logsumexp(0)
    return -logs.mean() if rule.aggregate == "out" else torch.tensor(len(logs)).log() - logs.logsumexp(0)


def _state(positive: Tensor, negative: Tensor, rule: Rule) -> list[float]:
    """The eight numbers of a row with these scores."""
    lse, best, total = [-torch.inf, -torch.inf], [-torch.inf, -torch.inf], 0.0
    for i, scores in enumerate((negative, positive)):
        if len(scores):
            best[i] = scores.max().item()
            if rule.logistic:
                total += torch.logaddexp(scores if i == 0 else -scores, 0 * scores).sum().item()
            else:
                lse[i] = scores.logsumexp(0).item()
    return [*lse, *best, positive.sum().item(), len(positive), len(negative), total]


@functools.cache
def _expected(case: Case) -> dict[str, Any]:
    """Everything a case must give, in float64, row by row and column by column, gradients by autograd."""
    slab, rule = case.slab(), RULES[case.rule]
    q, k = (slab[name].double().requires_grad_() for name in "qk")
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    plain = slab["q_factor"].double()[:, None] * (q @ k.T) * slab["k_factor"].double()
    score = plain + shift + (slab["bias"].double() if rule.logistic else 0.0)
    equal = positive = torch.zeros(case.n, case.c, dtype=torch.bool)
    if slab["column_id"] is not None:
        equal = slab["row_id"][:, None] == slab["column_id"]
        if slab["column_view"] is not None:
            positive = equal & (slab["row_view"][:, None] != slab["column_view"])
    loss, found = 0.0 * (q.sum() + k.sum() + shift), {}
    sides = {"rows": (score, positive, ~equal), "columns": (score.T, positive.T, ~equal.T)}
    for (name, side), ups in zip(sides.items(), case.upstream(), strict=True):
        if name == "rows" or case.both:
            lines = [(s[p], s[e]) for s, p, e in zip(*side, strict=True)]
            found[name] = torch.tensor([_state(*line, rule) for line in lines], dtype=torch.float64).T
            for line, up in zip(lines, ups.double(), strict=True):
                one = _loss(*line, rule)
                loss = loss if one is None else loss + up * one
    found["sums"] = torch.stack([plain[positive].sum(), plain[~equal].sum()]).detach()
    found["q"], found["k"], found["total"] = torch.autograd.grad(loss, [q, k, shift])
    return found | {"largest": score.abs().max().item()}


BACKENDS = ["interpret", *(["cuda"] if torch.cuda.is_available() else [])]


def _run(mode: str, folder: Path, **variables: str) -> None:
    """This file as a program."""
    path = os.pathsep.join(x for x in (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")) if x)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, __file__, mode, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", params=BACKENDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels found, by the name of the case."""
    folder = tmp_path_factory.mktemp("triton")
    _run(request.param, folder, TRITON_INTERPRET="1" if request.param == "interpret" else "0")
    return torch.load(folder / "found.pt", weights_only=True, map_location="cpu")


def _near(got: Tensor, expected: Tensor, case: Case, of: float = 1.0) -> None:
    """Equal but for what float32 scores of this size can tell."""
    tolerance = 2e-6 * (1.0 + _expected(case)["largest"])
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=tolerance * of)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_are_those_of_the_definition(case: Case, saved: dict[str, Any]) -> None:
    got, expected = saved["found"][str(case)], _expected(case)
    for name in ("rows", "columns") if case.both else ("rows",):
        assert got[name].dtype == torch.float32
        _near(got[name], expected[name], case)
        for field in (links.COUNT_P, links.COUNT_N):
            assert torch.equal(got[name][field].double(), expected[name][field])
        if RULES[case.rule].logistic:  # a sum of many small terms keeps its relative precision
            terms, error = (x[name][links.TOTAL].double() for x in (got, expected)), expected["largest"] + 1.0
            torch.testing.assert_close(*terms, rtol=2e-6 * error, atol=0.0)
    assert case.both or got["columns"] is None
    _near(got["sums"], expected["sums"], case, of=(case.n * case.c) ** 0.5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_autograd(case: Case, saved: dict[str, Any]) -> None:
    got, expected, slab = saved["found"][str(case)], _expected(case), case.slab()
    assert got["w"].dtype == DTYPES[case.out]
    w = got["w"].double()
    for name, gradient, factor in (("q", w @ slab["k"].double(), w), ("k", w.T @ slab["q"].double(), w.T)):
        relative = 2e-6 * (1.0 + expected["largest"]) + ROUNDED[case.out]
        tolerance = factor.abs().sum(1).max().item() * relative + 1e-30
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, expected[name], rtol=0.0, atol=tolerance)
    _near(got["total"], expected["total"], case, of=float(case.n))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_and_slopes_are_those_that_links_gives_a_tile(case: Case, saved: dict[str, Any]) -> None:
    got, rule, slab = saved["found"][str(case)], RULES[case.rule], case.slab()
    scale = slab["q_factor"].double()[:, None] * slab["k_factor"].double()
    score = (slab["q"].double() @ slab["k"].double().T) * scale + (slab["bias"] if rule.logistic else 0.0)
    equal = torch.zeros(case.n, case.c, dtype=torch.bool)
    if slab["column_id"] is not None:
        equal = slab["row_id"][:, None] == slab["column_id"]
    row, column = equal.nonzero(as_tuple=True)
    other = torch.zeros(len(row), dtype=torch.bool)
    if slab["column_view"] is not None:
        other = slab["row_view"][row] != slab["column_view"][column]
    row, column, negative = row[other], column[other], score.masked_fill(equal, -torch.inf)
    bulks = links.bulk(negative, None, rule, True, False)
    needs = []
    for name, bulk, index, ups in zip(
        ("rows", "columns"), bulks, (row, column), case.upstream(), strict=True
    ):
        assert bulk is not None
        bulk[links.COUNT_N] = (~equal).sum(1 if name == "rows" else 0)
        state = links.merge(bulk, links.positives(score[row, column], index, bulk.shape[1], rule))
        if name == "rows" or case.both:
            _near(got[name], state, case)
            loss, counted, need = links.finish(state, rule)
            mine = links.finish(got[name].double(), rule)
            _near(mine[0], loss, case)
            assert torch.equal(mine[1], counted)
            need[links.UPSTREAM] *= ups
            needs.append(need)
    below = needs[1] if case.both else None
    slope = links.bulk_slope(negative, None, rule, needs[0], below, False)
    slope[row, column] = links.positive_slope(score[row, column], needs[0][:, row], rule)
    if below is not None:
        slope[row, column] += links.positive_slope(score[row, column], below[:, column], rule)
    tolerance = 4e-6 * (1.0 + _expected(case)["largest"])
    w = got["w"].double() / scale.clamp(min=1e-30)
    torch.testing.assert_close(w, slope * (scale > 0), rtol=ROUNDED[case.out], atol=tolerance)


@pytest.mark.parametrize("case", AGAIN, ids=str)
def test_two_runs_are_equal_in_every_bit(case: Case, saved: dict[str, Any]) -> None:
    for name, value in saved["again"][str(case)].items():
        assert value is None or torch.equal(value, saved["found"][str(case)][name]), name


@pytest.mark.parametrize("case", AGAIN, ids=str)
def test_two_slabs_merge_into_the_states_of_one(case: Case, saved: dict[str, Any]) -> None:
    whole, (left, right, top, bottom, _) = saved["found"][str(case)], saved["halves"][str(case)]
    _near(links.merge(left[0], right[0]), whole["rows"], case)
    _near(torch.cat([top[0], bottom[0]], 1), whole["rows"], case)
    if case.both:
        _near(links.merge(top[1], bottom[1]), whole["columns"], case)
        _near(torch.cat([left[1], right[1]], 1), whole["columns"], case)
    for one, other in ((left, right), (top, bottom)):
        _near(one[2] + other[2], whole["sums"], case, of=(case.n * case.c) ** 0.5)


@pytest.mark.parametrize("case", AGAIN, ids=str)
def test_a_slab_without_rows_has_the_states_of_nothing(case: Case, saved: dict[str, Any]) -> None:
    rows, columns, sums = saved["halves"][str(case)][-1]
    assert rows.shape == (8, 0)
    assert torch.equal(columns, links.empty_state(case.c, torch.empty(0)))
    assert not sums.any()


def test_rules_whose_rows_are_needed_whole_are_not_supported() -> None:
    from clipkit.losses import triton_tiles

    assert all(triton_tiles.supports(rule) for rule in RULES.values())
    others = (Rule("hinge", margin=0.1), Rule("pair", margin=1.0), Rule("align"), Rule(denominator="one"))
    assert not any(triton_tiles.supports(rule) for rule in others)


def test_the_kernels_compile_for_ampere_and_hopper(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    _run("compile", tmp_path / "code", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    code = list((tmp_path / "code").iterdir())
    assert len(code) == 12
    assert all(file.read_bytes().startswith(b"\x7fELF") for file in code)


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        _compile(Path(sys.argv[2]))
    else:
        _evaluate_all(Path(sys.argv[2]), "cpu" if sys.argv[1] == "interpret" else "cuda")
