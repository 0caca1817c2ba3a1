"""The queue: a deque in a ring, resume without a trace, and no key that is a negative of its own sample."""

import copy
from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.errors import InputError
from clipkit.losses import contrast, info_nce_loss
from clipkit.state import Queue

fast = settings(max_examples=60, deadline=None, derandomize=True)
SCALE = 5.0


def _keys(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _resumed(queue: Queue) -> Queue:
    """A fresh queue with the state of another one that went through a file's bytes."""
    fresh = Queue(*queue.rows.shape, dtype=queue.rows.dtype)
    fresh.load_state_dict(load(save(queue.state_dict())))
    return fresh


def _oldest_first(queue: Queue) -> tuple[Tensor, Tensor]:
    rows, ids = queue.valid()
    shift = int(queue.cursor) if len(queue) == queue.rows.shape[0] else 0
    return rows.roll(-shift, 0), ids.roll(-shift)


def _same(one: Queue, other: Queue) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


ACTIONS = st.lists(st.one_of(st.integers(0, 12), st.sampled_from(["resume", "copy", "move"])), max_size=25)


@fast
@given(size=st.integers(1, 6), actions=ACTIONS)
def test_a_queue_is_a_deque_whenever_it_is_saved_copied_or_moved(size: int, actions: list[int | str]) -> None:
    queue, never_stopped, model, written = Queue(size, 4), Queue(size, 4), deque(maxlen=size), 0
    for step, action in enumerate(actions):
        if action == "resume":
            queue = _resumed(queue)
        elif action == "copy":
            queue = copy.deepcopy(queue)
        elif action == "move":
            queue = queue.to(torch.float64).to(torch.float32)
        else:
            assert isinstance(action, int)
            keys, ids = _keys(action, step), torch.arange(written, written + action)
            model.extend(zip(keys, ids.tolist(), strict=True))
            written += action
            for one in (queue, never_stopped):
                one.enqueue(keys, ids)
        rows, ids = _oldest_first(queue)
        assert len(queue) == len(rows) == len(model)
        assert ids.tolist() == [i for _, i in model]
        assert all(torch.equal(row, key) for row, (key, _) in zip(rows, model, strict=True))
        _same(queue, never_stopped)


def test_a_new_queue_has_no_rows_and_leaves_the_positive_alone() -> None:
    rows, ids = Queue(8, 4).valid()
    assert rows.shape == (0, 4)
    assert ids.shape == (0,)
    q, index = _keys(3), torch.arange(3)
    out = contrast(q, _keys(3, 1), q_id=index, paired=True, negatives=rows, negative_id=ids, scale=SCALE)
    assert out.candidates.item() == 1  # not 1 + 8 random fillers
    assert out.loss.item() == 0


def test_a_batch_over_the_end_wraps_without_losing_its_tail() -> None:
    # lightly's memory bank writes bank[ptr:] = batch[:size - ptr] and drops the rest of the batch.
    queue, keys = Queue(5, 4), _keys(8)
    queue.enqueue(keys[:4], torch.arange(4))
    queue.enqueue(keys[4:7], torch.arange(4, 7))
    assert queue.ids.tolist() == [5, 6, 2, 3, 4]
    assert torch.equal(queue.rows, keys[queue.ids])
    assert int(queue.cursor) == 2


def test_a_batch_larger_than_the_queue_keeps_the_last_rows() -> None:
    queue = Queue(3, 4)
    queue.enqueue(_keys(2), torch.arange(2))
    queue.enqueue(_keys(8, 1), torch.arange(10, 18))
    rows, ids = _oldest_first(queue)
    assert ids.tolist() == [15, 16, 17]
    assert torch.equal(rows, _keys(8, 1)[5:])


def test_everything_is_in_the_state_dict() -> None:
    # lightly's bank is not in it (persistent=False), the pointers of CMC's MemoryMoCo and of
    # pytorch-metric-learning's CrossBatchMemory are not: after a resume they overwrite from slot 0.
    queue = Queue(5, 4)
    queue.enqueue(_keys(3), torch.tensor([7, 8, 9]))
    assert set(queue.state_dict()) == {"rows", "ids", "cursor", "count"}
    resumed = _resumed(queue)
    for one in (queue, resumed):
        one.enqueue(_keys(1, 2), torch.tensor([10]))
    assert resumed.ids.tolist() == [7, 8, 9, 10, 0]
    _same(queue, resumed)


def test_buffers_are_the_only_truth() -> None:
    queue = Queue(5, 4)
    queue.enqueue(_keys(5), torch.arange(5))
    assert len(queue) == 5
    queue.load_state_dict(Queue(5, 4).state_dict())  # in place, back to an empty queue
    assert len(queue) == 0
    queue.enqueue(_keys(2), torch.arange(2))
    queue.load_state_dict({k: v.clone() for k, v in Queue(5, 4).state_dict().items()}, assign=True)
    assert len(queue) == 0
    other = Queue(5, 4)
    assert len(other) == 0
    other.load_state_dict({**other.state_dict(), "count": torch.tensor(3)}, assign=True)
    assert len(other) == 3
    queue.enqueue(_keys(4), torch.arange(4))
    queue.count.fill_(1)
    queue.cursor.fill_(1)
    queue.enqueue(_keys(1, 3), torch.tensor([9]))
    assert queue.valid()[1].tolist() == [0, 9]


class _HostReads(TorchDispatchMode):
    """Counts how often a tensor's value is read by Python, for which an accelerator has to be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::nonzero")
        return func(*args, **(kwargs or {}))


def test_values_of_buffers_are_read_once_after_they_came_from_elsewhere() -> None:
    queue, keys = Queue(5, 4), _keys(3)
    with _HostReads() as reads:
        queue.enqueue(keys, torch.arange(3))
        assert reads.count == 2  # the cursor and the count
        for _ in range(4):
            queue.valid()
            queue.enqueue(keys, torch.arange(3))
        assert reads.count == 2
        queue.load_state_dict(queue.state_dict())
        queue.valid()
        queue.enqueue(keys, torch.arange(3))
        assert reads.count == 4


def test_backward_of_a_loss_is_right_after_a_later_enqueue() -> None:
    queue, q, index = Queue(6, 4, dtype=torch.float64), _keys(3, 1, torch.float64), torch.arange(3)
    queue.enqueue(_keys(6, dtype=torch.float64), torch.arange(10, 16))

    def loss(x: Tensor) -> Tensor:
        rows, ids = queue.valid()
        return contrast(
            x, x.detach() + 1, q_id=index, paired=True, similarity="inner_product",
            negatives=rows, negative_id=ids,
        ).loss  # fmt: skip

    before, after = q.clone().requires_grad_(), q.clone().requires_grad_()
    loss(before).backward()
    kept = loss(after)
    queue.enqueue(_keys(6, 2, torch.float64), index.repeat(2))
    kept.backward()
    assert before.grad is not None
    assert after.grad is not None
    assert torch.equal(before.grad, after.grad)
    assert not torch.equal(loss(q), kept)  # the later enqueue did change the queue


def test_keys_are_kept_without_their_graph() -> None:
    queue, keys = Queue(4, 4), _keys(2).requires_grad_()
    queue.enqueue(keys * 2, torch.arange(2))
    assert not queue.rows.requires_grad
    assert queue.rows.grad_fn is None
    assert torch.equal(queue.valid()[0], keys.detach() * 2)


def test_a_key_enqueued_before_the_loss_is_no_negative_of_its_own_query() -> None:
    # stable-pretraining's MoCo v2 appends first: every positive is then also a negative.
    q, k, index = _keys(4, 1), _keys(4, 2), torch.arange(4)
    queue = Queue(12, 4)
    queue.enqueue(_keys(6), torch.arange(20, 26))

    def per_row() -> Tensor:
        rows, ids = queue.valid()
        return contrast(q, k, q_id=index, paired=True, negatives=rows, negative_id=ids, scale=SCALE).per_row

    good = per_row()
    queue.enqueue(k[:1], index[:1])
    torch.testing.assert_close(per_row()[0], good[0])
    assert (per_row()[1:] > good[1:]).all()  # to the other rows it is one more negative
    rows, _ = queue.valid()
    bad = contrast(q, k, q_id=index, paired=True, negatives=rows, scale=SCALE).per_row
    assert bad[0] > good[0]  # without ids the own key does count: the fault that the ids prevent


def test_one_queue_for_both_directions_of_a_symmetric_loss_makes_no_false_negative() -> None:
    # lightly's symmetric MoCo benchmarks enqueue k(x1) in the first loss; in the second one it is a
    # negative of its own sample's query.
    q, k, index = (_keys(4, 1), _keys(4, 2)), (_keys(4, 3), _keys(4, 4)), torch.arange(4)
    right, wrong_order = Queue(8, 4), Queue(8, 4)
    for queue in (right, wrong_order):
        queue.enqueue(_keys(3), torch.arange(20, 23))

    def direction(queue: Queue, query: Tensor, key: Tensor) -> Tensor:
        rows, ids = queue.valid()
        return contrast(
            query[:1], key[:1], q_id=index[:1], paired=True, negatives=rows, negative_id=ids, scale=SCALE
        ).loss

    expected = [direction(right, q[0], k[1]), direction(right, q[1], k[0])]
    first = direction(wrong_order, q[0], k[1])
    wrong_order.enqueue(k[1][:1], index[:1])
    torch.testing.assert_close([first, direction(wrong_order, q[1], k[0])], expected)


def test_a_queue_larger_than_the_data_set_holds_no_stale_negatives_of_the_own_sample() -> None:
    # MoCo with a small data set: the stale keys of an image are negatives of its own query.
    data, index = 5, torch.arange(5)
    queue = Queue(3 * data, 4)
    for epoch in range(3):
        queue.enqueue(_keys(data, epoch), index)
    q, k = _keys(data, 7), _keys(data, 8)
    rows, ids = queue.valid()
    out = contrast(q, k, q_id=index, paired=True, negatives=rows, negative_id=ids, scale=SCALE)
    assert out.candidates.item() == 1 + 3 * (data - 1)
    for i in range(data):
        others = rows[ids != i]
        one = info_nce_loss(q[i : i + 1], k[i : i + 1], negatives=others, temperature=1 / SCALE)
        torch.testing.assert_close(out.per_row[i], one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keys_are_stored_in_the_dtype_of_the_queue(dtype: torch.dtype) -> None:
    queue, keys = Queue(4, 4, dtype=dtype), _keys(6)
    queue.enqueue(keys, torch.arange(6))
    rows, ids = queue.valid()
    assert rows.dtype == dtype
    assert torch.equal(rows, keys[ids].to(dtype))
    assert _resumed(queue).rows.dtype == dtype
    _same(queue, _resumed(queue))
    losses = [
        info_nce_loss(_keys(2, 1), _keys(2, 2), negatives=x, temperature=0.1) for x in (rows, rows.float())
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_to_another_dtype_converts_the_rows_alone() -> None:
    queue, keys = Queue(4, 4), _keys(3)
    queue.enqueue(keys, torch.arange(3))
    queue.to(torch.float64)
    queue.enqueue(_keys(3, 1), torch.arange(3, 6))
    assert queue.rows.dtype == torch.float64
    assert (queue.ids.dtype, queue.cursor.dtype, queue.count.dtype) == (torch.int64,) * 3
    assert queue.ids.tolist() == [4, 5, 2, 3]
    assert torch.equal(queue.rows[2], keys[2].double())


def test_wrong_arguments_are_refused_and_change_nothing() -> None:
    queue = Queue(4, 4)
    queue.enqueue(_keys(3), torch.arange(3))
    before = _resumed(queue)
    for rows, ids, message in (
        (_keys(2)[0], torch.arange(1), r"rows must be a floating tensor of shape \(n, D\), got \(4,\)"),
        (_keys(2).long(), torch.arange(2), "rows must be a floating tensor .*int64"),
        (_keys(2)[:, :3], torch.arange(2), r"rows \(2, 3\) .* the queue \(4, 4\) .* number of features"),
        (_keys(2).to("meta"), torch.arange(2), "rows is on meta, the queue on cpu"),
        (_keys(2), torch.arange(3), r"ids must have shape \(2,\), one id for each row, got \(3,\)"),
        (_keys(2), torch.ones(2), r"ids must be a tensor of integers of shape \(2,\)"),
    ):
        with pytest.raises(InputError, match=message):
            queue.enqueue(rows, ids)
    _same(queue, before)
    for size, dim in ((0, 4), (4, 0), (True, 4), (4, 2.0)):
        with pytest.raises(InputError, match=r"(size|dim) must be an integer >= 1"):
            Queue(size, dim)  # type: ignore
    with pytest.raises(InputError, match=r"dtype must be one of torch.float64, .* got torch.int32"):
        Queue(4, 4, dtype=torch.int32)
