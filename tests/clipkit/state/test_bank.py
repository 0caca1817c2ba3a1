"""The memory bank: unit rows averaged per sample, uniform draws of what was seen, resume without a trace."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from clipkit.errors import InputError
from clipkit.losses import contrast, nce_loss
from clipkit.state import Bank
from clipkit.state.bank import _last_occurrence

fast = settings(max_examples=60, deadline=None, derandomize=True)


def _features(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _resumed(bank: Bank) -> Bank:
    """A fresh bank with the state of another one that went through a file's bytes."""
    fresh = Bank(*bank.rows.shape, momentum=bank.momentum, dtype=bank.rows.dtype)
    fresh.load_state_dict(load(save(bank.state_dict())))
    return fresh


def _same(one: Bank, other: Bank) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def _unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


@fast
@given(
    size=st.integers(1, 7),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    batches=st.lists(st.lists(st.integers(0, 6), max_size=8), max_size=8),
    resume_at=st.integers(0, 8),
)
def test_rows_are_those_of_a_loop_over_samples(
    size: int, momentum: float, batches: list[list[int]], resume_at: int
) -> None:
    bank = never_stopped = Bank(size, 4, momentum=momentum, dtype=torch.float64)
    model: dict[int, list[float]] = {}
    for step, batch in enumerate(batches):
        if step == resume_at:
            bank = _resumed(bank)
        index = [i % size for i in batch]
        features = _features(len(index), step)
        last = {i: f for i, f in zip(index, features.tolist(), strict=True)}  # noqa: C416 (the last one wins)
        for i, feature in last.items():
            new = _unit(feature)
            if i in model:
                new = _unit([momentum * a + (1 - momentum) * b for a, b in zip(model[i], new, strict=True)])
            model[i] = new
        for one in {id(b): b for b in (bank, never_stopped)}.values():
            one.update(torch.tensor(index, dtype=torch.int64), features)
    rows, ids = bank.valid()
    assert ids.tolist() == sorted(model)
    expected = torch.tensor([model[i] for i in sorted(model)], dtype=torch.float64).reshape(-1, 4)
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
    assert not bank.rows[~bank.seen].any()
    _same(bank, never_stopped)


def test_a_first_visit_is_not_averaged_with_anything() -> None:
    bank, features = Bank(6, 4, momentum=0.9), _features(2, dtype=torch.float32)
    bank.update(torch.tensor([4, 1]), 7 * features)
    expected = torch.nn.functional.normalize(features)
    torch.testing.assert_close(bank.lookup(torch.tensor([4, 1])), expected)
    assert bank.seen.tolist() == [False, True, False, False, True, False]


def test_the_last_of_repeated_indices_counts_once() -> None:
    features, index = _features(6), torch.tensor([2, 0, 2, 1, 0, 2])
    bank, single = (Bank(3, 4, dtype=torch.float64) for _ in range(2))
    for one in (bank, single):
        one.update(torch.arange(3), _features(3, 1))
    bank.update(index, features)
    single.update(torch.tensor([1, 0, 2]), features[3:])
    _same(bank, single)
    # The same rows are written for equal indices, since an accelerator writes them in any order.
    assert _last_occurrence(index).tolist() == [5, 4, 5, 3, 4, 5]


def test_what_is_not_marked_as_seen_has_no_part_in_an_update() -> None:
    bank, forgotten = (Bank(3, 4, dtype=torch.float64) for _ in range(2))
    forgotten.update(torch.arange(3), _features(3, 1))
    forgotten.seen.fill_(False)
    assert forgotten.valid()[0].shape == (0, 4)
    for one in (bank, forgotten):
        one.update(torch.arange(3), _features(3))
    _same(bank, forgotten)


def test_every_row_and_nothing_else_is_in_the_state_dict() -> None:
    bank = Bank(3, 4)
    assert set(bank.state_dict()) == {"rows", "seen"}
    bank.update(torch.tensor([2]), _features(1))
    _same(bank, _resumed(bank))
    bank.load_state_dict(Bank(3, 4).state_dict())
    assert bank.valid()[0].shape == (0, 4)


def test_an_unseen_row_is_no_random_vector_but_an_error() -> None:
    bank = Bank(5, 4)
    assert not bank.rows.any()
    bank.update(torch.tensor([1]), _features(1))
    with pytest.raises(InputError, match=r"index: 2 of the samples were never seen, the first is 3 .*update"):
        bank.lookup(torch.tensor([1, 3, 0]))


@pytest.mark.parametrize("index", [5, -1])
def test_an_index_outside_of_the_bank_is_named(index: int) -> None:
    bank = Bank(5, 4)
    bank.update(torch.arange(5), _features(5))
    before = _resumed(bank)
    places = torch.tensor([0, index, 9])
    message = rf"index {index} \(at place 1\) is outside of the bank, whose rows are 0 to 4"
    with pytest.raises(InputError, match=message):
        bank.lookup(places)
    with pytest.raises(InputError, match=message):
        bank.update(places, _features(3))
    _same(bank, before)


def test_the_whole_bank_as_negatives_is_the_softmax_over_the_bank() -> None:
    size, index = 6, torch.tensor([4, 0, 3])
    bank, f = Bank(size, 4, dtype=torch.float64), _features(3, 9)
    bank.update(torch.arange(size), _features(size))
    rows, ids = bank.valid()
    out = contrast(
        f, bank.lookup(index), q_id=index, paired=True, negatives=rows, negative_id=ids, scale=1 / 0.07
    )
    logits = torch.nn.functional.normalize(f) @ rows.T / 0.07
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, index))
    assert out.candidates.item() == size
    other = contrast(f, rows, q_id=index, k_id=ids, scale=1 / 0.07)
    torch.testing.assert_close(out.per_row, other.per_row)


def test_a_sample_that_was_never_seen_is_skipped_by_the_loss_over_seen_rows() -> None:
    bank = Bank(6, 4, dtype=torch.float64)
    bank.update(torch.tensor([0, 2, 5]), _features(3))
    rows, ids = bank.valid()
    out = contrast(_features(2, 1), rows, q_id=torch.tensor([2, 3]), k_id=ids)
    assert out.counted.tolist() == [True, False]


def test_backward_of_a_loss_is_right_after_a_later_update() -> None:
    bank, index = Bank(6, 4, dtype=torch.float64), torch.tensor([4, 0, 3])
    bank.update(torch.arange(6), _features(6))

    def loss(x: Tensor) -> Tensor:
        rows, ids = bank.valid()
        noise, noise_id = bank.sample((3, 2), generator=torch.Generator().manual_seed(0))
        return contrast(
            x, bank.lookup(index), q_id=index, paired=True, similarity="inner_product",
            negatives=rows, negative_id=ids, own_negatives=noise, own_negative_id=noise_id,
        ).loss  # fmt: skip

    before, after = (_features(3, 1).requires_grad_() for _ in range(2))
    loss(before).backward()
    kept = loss(after)
    bank.update(index, _features(3, 2))
    kept.backward()
    assert before.grad is not None
    assert after.grad is not None
    assert torch.equal(before.grad, after.grad)
    assert not torch.equal(loss(after), kept)  # the later update did change the bank


def test_draws_are_uniform_over_the_seen_rows() -> None:
    bank, seen = Bank(9, 4), torch.tensor([1, 4, 5, 8])
    bank.update(seen, _features(4))
    rows, ids = bank.sample(8000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rows, bank.rows[ids])
    counts = torch.bincount(ids, minlength=9)
    assert counts[seen].sum() == 8000
    chi_squared = ((counts[seen] - 2000.0) ** 2 / 2000).sum().item()
    assert chi_squared < 16.3  # 3 degrees of freedom, p = 0.001; the generator is seeded


def test_draws_repeat_with_the_generator_and_have_any_shape() -> None:
    bank = Bank(9, 4)
    bank.update(torch.arange(9), _features(9))
    drawn = [bank.sample((5, 3), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert drawn[0][0].shape == (5, 3, 4)
    assert drawn[0][1].shape == (5, 3)
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][1], drawn[2][1])
    torch.manual_seed(3)
    first = bank.sample(20)[1]
    torch.manual_seed(3)
    assert torch.equal(first, bank.sample(20)[1])


def test_draws_may_be_the_own_sample_which_their_ids_can_leave_out() -> None:
    bank, index = Bank(2, 4, dtype=torch.float64), torch.tensor([0, 1])
    bank.update(index, _features(2))
    noise, noise_id = bank.sample((2, 50), generator=torch.Generator().manual_seed(0))
    own = noise_id == index[:, None]
    assert own.any()
    f, positive = _features(2, 1), bank.lookup(index)
    out = contrast(f, positive, q_id=index, paired=True, own_negatives=noise, own_negative_id=noise_id)
    assert out.candidates.item() == 1 + (~own).sum().item() / 2
    with_own = nce_loss(f, positive, noise, temperature=0.07, log_z=1.0, num_noise_population=2)
    scores = torch.einsum("nd,nmd->nm", torch.nn.functional.normalize(f), noise) / 0.07 - 1.0
    by_hand = torch.nn.functional.softplus(scores - math.log(50 / 2)).sum(1)
    hit = (torch.nn.functional.normalize(f) * positive).sum(1) / 0.07 - 1.0 - math.log(50 / 2)
    torch.testing.assert_close(with_own, (by_hand + torch.nn.functional.softplus(-hit)).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_bank_is_updated_in_float32(dtype: torch.dtype) -> None:
    narrow, index = Bank(3, 4, dtype=dtype), torch.arange(3)
    first, second = _features(3, 1, torch.float32) * 300, _features(3, 2, torch.float32)
    narrow.update(index, first)
    narrow.update(index, second)
    normalize = torch.nn.functional.normalize
    stored = normalize(first).to(dtype).float()
    expected = normalize(0.5 * stored + 0.5 * normalize(second))
    assert narrow.rows.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(narrow.rows.float(), expected, rtol=eps, atol=eps)
    _same(narrow, _resumed(narrow))


def test_to_another_dtype_converts_the_rows_alone() -> None:
    bank = Bank(3, 4)
    bank.update(torch.arange(2), _features(2))
    before = bank.rows.clone()
    bank.to(torch.float64)
    assert bank.seen.dtype == torch.bool
    assert torch.equal(bank.rows, before.double())
    bank.update(torch.tensor([2]), _features(1, 1, torch.float32))
    torch.testing.assert_close(bank.rows[2].norm().item(), 1.0, rtol=1e-14, atol=0)


def test_features_are_taken_without_their_graph_and_at_any_length() -> None:
    bank, features = Bank(2, 4, dtype=torch.float64), _features(2).requires_grad_()
    bank.update(torch.arange(2), features * torch.tensor([[1e-200], [1e200]], dtype=torch.float64))
    assert not bank.rows.requires_grad
    torch.testing.assert_close(bank.rows, torch.nn.functional.normalize(features.detach()))


def test_wrong_arguments_are_refused() -> None:
    bank = Bank(4, 4)
    with pytest.raises(InputError, match="nothing was seen yet"):
        bank.sample(3)
    bank.update(torch.arange(4), _features(4))
    with pytest.raises(InputError, match=r"features \(2, 3\) .* the bank \(4, 4\)"):
        bank.update(torch.arange(2), _features(2)[:, :3])
    with pytest.raises(InputError, match=r"index must have shape \(2,\), one id for each row, got \(3,\)"):
        bank.update(torch.arange(3), _features(2))
    with pytest.raises(InputError, match=r"index must be a tensor of integers"):
        bank.lookup(torch.ones(2))
    with pytest.raises(InputError, match=r"index must have shape \(4,\).* got \(2, 2\)"):
        bank.lookup(torch.zeros(2, 2, dtype=torch.int64))
    for shape in (-1, (2, -1), True, (2, 1.0), 2.5):
        with pytest.raises(InputError, match="shape must be an integer >= 0"):
            bank.sample(shape)  # type: ignore
    for momentum in (1.0, -0.1, float("nan"), "0.5"):
        with pytest.raises(InputError, match=r"momentum must be a number in \[0, 1\)"):
            Bank(4, 4, momentum=momentum)  # type: ignore
    with pytest.raises(InputError, match="size must be an integer >= 1, got 0"):
        Bank(0, 4)
    with pytest.raises(InputError, match="dtype must be one of"):
        Bank(4, 4, dtype=torch.int64)
