"""MoCo against its definition written out in float64, and where others are known to fail."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipkit.errors import ConfigError, InputError
from clipkit.models import Encoder
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.moco import MocoStep, MocoV1Config, MocoV2Config, build_moco_v1, build_moco_v2
from tests.clipkit_training.steps.memory_worker import MOCO, RATE, batches, tiny
from tests.clipkit_training.steps.support import (
    assert_near,
    gradients,
    in_float64,
    pixels,
    random_batch,
    setting,
    tiny_encoder,
    train,
)


def moco(tower: str = "group_norm", rows: int = 8, **options: Any) -> MocoStep:
    """A MoCo v2 of tiny widths."""
    step = tiny(MOCO | options, tower, rows)
    assert isinstance(step, MocoStep)
    return step


def queued(step: MocoStep) -> list[int]:
    """The ids in the queue, the oldest first."""
    ids, cursor = step.queue.ids[: len(step.queue)], int(step.queue.cursor)
    return ids.roll(-cursor).tolist() if len(step.queue) == len(step.queue.ids) else ids.tolist()


class Naive:
    """MoCo with a plain tower, a list as its queue, and one candidate after the other; float64."""

    def __init__(self, step: MocoStep, tower: str, groups: int) -> None:
        self.pictures = tiny_encoder(tower)
        self.net = nn.ModuleList([in_float64(self.pictures.tower), in_float64(step.head)])
        self.twin = copy.deepcopy(self.net)
        self.config, self.groups = step.config, groups
        self.queue: list[tuple[Tensor, int]] = []

    def encode(self, net: nn.ModuleList, view: Tensor) -> Tensor:
        parts = pixels(self.pictures, view).tensor_split(self.groups)
        return torch.cat([net[1](net[0](part)) for part in parts])

    def key(self, view: Tensor, step: int) -> Tensor:
        if self.groups == 1:
            return self.encode(self.twin, view)
        order = torch.randperm(len(view), generator=torch.Generator().manual_seed(step)).tolist()
        shuffled = self.encode(self.twin, view[order])
        return torch.stack([shuffled[order.index(row)] for row in range(len(view))])

    def step(self, batch: Batch) -> Tensor:
        """One step of gradient descent; the loss before it."""
        one, two = batch.views
        pairs = [(one, two), (two, one)] if self.config.symmetric else [(one, two)]
        queries = [self.encode(self.net, query) for query, _ in pairs]
        with torch.no_grad():
            for slow, fast in zip(self.twin.parameters(), self.net.parameters(), strict=True):
                slow.mul_(self.config.momentum).add_(fast, alpha=1 - self.config.momentum)
            keys = [self.key(key, batch.step) for _, key in pairs]
        ids, losses = batch.sample_ids.tolist(), []
        new = [pair for k in keys for pair in zip(k, ids, strict=True)]
        others = self.queue or new
        for q, k in zip(queries, keys, strict=True):
            for row, own in enumerate(ids):
                far = [key for key, id_ in others if id_ != own]
                near = torch.stack([k[row], *far])
                score = nn.functional.cosine_similarity(q[row], near, dim=1) / self.config.temperature
                losses.append(score.logsumexp(0) - score[0])
        loss = torch.stack(losses).mean()
        self.net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in self.net.parameters():
                assert parameter.grad is not None
                parameter -= RATE * parameter.grad
        self.queue = (self.queue + new)[-self.config.queue :]
        return loss.detach()


def weights(net: Sequence[nn.Module] | nn.Module) -> dict[str, Tensor]:
    """Parameters by their place."""
    modules = net.children() if isinstance(net, nn.Module) else net
    return {
        f"{place}.{name}": value.detach()
        for place, module in enumerate(modules)
        for name, value in module.named_parameters()
    }


@pytest.mark.parametrize(
    ("tower", "rows", "samples", "options"),
    [
        ("group_norm", 8, 40, {}),
        ("group_norm", 8, 40, {"symmetric": True, "temperature": 0.5}),
        ("group_norm", 8, 8, {"queue": 64}),
        ("batch_norm", 16, 40, {}),
        ("batch_norm", 16, 24, {"symmetric": True, "queue": 40}),
    ],
)
def test_three_steps_are_those_of_the_definition(
    tower: str, rows: int, samples: int, options: dict[str, Any]
) -> None:
    step = moco(tower, rows, **options)
    naive = Naive(step, tower, groups=2 if tower == "batch_norm" else 1)
    share = 2e-2 if tower == "batch_norm" else 1e-4  # a ReLU near 0 may open in one of the two alone
    for batch in batches(3, rows, samples=samples):
        expected = naive.step(batch)
        found = train(step, [batch], RATE)[0]
        assert float(found["loss"]) == pytest.approx(float(expected), rel=2e-5)
        reference = {name: p.grad for name, p in naive.net.named_parameters() if p.grad is not None}
        mine = {f"0.{name}": x for name, x in gradients(step.model.tower).items()}
        assert_near(mine | {f"1.{name}": x for name, x in gradients(step.head).items()}, reference, share)
    backbone, head = step.twin.module.children()
    assert isinstance(backbone, Encoder)
    assert_near(weights([backbone.tower, head]), weights(naive.twin), 1e-4)
    assert queued(step) == [id_ for _, id_ in naive.queue]
    rows_KD = step.queue.rows[: len(step.queue)]
    if len(naive.queue) == step.config.queue:
        rows_KD = rows_KD.roll(-int(step.queue.cursor), 0)
    assert_near({"queue": rows_KD}, {"queue": torch.stack([key for key, _ in naive.queue])}, 1e-4)


def test_v1_has_a_linear_head_and_its_temperature() -> None:
    step = build_moco_v1(tiny_encoder("group_norm"), MocoV1Config(queue=16), setting())
    (layer,) = step.head.children()
    assert isinstance(layer, nn.Linear)
    assert layer.out_features == 128
    assert (step.config.temperature, MocoV2Config().temperature) == (0.07, 0.2)
    assert [type(layer) for layer in moco().head.children()] == [nn.Linear, nn.ReLU, nn.Linear]


def test_metrics_are_plain_numbers_from_the_first_step_on() -> None:
    step = moco()
    for figures in train(step, batches(4)):
        assert set(figures) == {
            "loss", "accuracy", "positive_similarity", "negative_similarity", "embedding_std",
        }  # fmt: skip
        assert all(value.isfinite() and value.ndim == 0 for value in figures.values())
        assert not any(value.requires_grad for value in figures.values())


def test_lightlys_loss_with_a_memory_bank_is_the_same() -> None:
    with warnings.catch_warnings():  # what it warns about at import is its own
        warnings.simplefilter("ignore")
        from lightly.loss import NTXentLoss
    step, (first, second, batch) = moco(momentum=1.0, queue=16), batches(3)
    train(step, [first, second])  # the queue is full
    step.zero_grad()
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(16, 6))
    theirs.memory_bank.bank = nn.functional.normalize(step.queue.rows.clone())
    q = step.head(step.model.encode(batch.views[0]))
    with torch.no_grad():
        k = step.twin(batch.views[1])
    expected = theirs(q, k)
    expected.backward()
    reference = gradients(step)
    step.zero_grad()
    loss, _ = step(batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_near(gradients(step), reference, 1e-5)


# Known faults of others, by their numbers among the anchors


def test_fault_4_a_wrapping_queue_keeps_the_tail_of_the_batch() -> None:
    step = moco(queue=12)
    train(step, batches(2))
    assert queued(step) == list(range(4, 16))
    train(step, batches(1, first=2))
    assert queued(step) == list(range(12, 24))


@pytest.mark.parametrize("symmetric", [False, True])
def test_faults_5_6_24_nothing_of_the_own_picture_is_a_negative(symmetric: bool) -> None:
    step = moco(symmetric=symmetric)
    for batch in batches(4, samples=1):  # every row, and every key in the queue, is of one picture
        loss, _ = step(batch)
        assert loss.item() == 0.0
        loss.backward()
    assert len(step.queue) == 20


@settings(max_examples=12, deadline=None)
@given(strangers=st.lists(st.booleans(), max_size=12), seed=st.integers(0, 9))
def test_faults_6_24_stale_keys_of_the_own_picture_change_nothing(strangers: list[bool], seed: int) -> None:
    """The loss with keys of others and of the own picture, in any order, is that with those of others."""
    batch = random_batch(3, sample_ids=[8, 8, 8])
    without, step = moco(momentum=1.0, queue=64), moco(momentum=1.0, queue=64)
    rows = torch.randn(len(strangers), 6, generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor([100 if stranger else 8 for stranger in strangers], dtype=torch.int64)
    step.queue.enqueue(rows, ids)
    without.queue.enqueue(rows[ids == 100], ids[ids == 100])
    found, expected = step(batch)[1]["loss"], without(batch)[1]["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (found > 0) == any(strangers)


@pytest.mark.parametrize("build", [build_moco_v1, build_moco_v2])
def test_fault_7_the_twin_starts_as_a_copy_of_backbone_and_head(build: Callable[..., MocoStep]) -> None:
    step = build(tiny_encoder("batch_norm"), MocoV2Config(queue=16), setting(16))
    source = nn.Sequential(step.model, step.head).state_dict()
    twin = step.twin.module.state_dict()
    assert source.keys() == twin.keys()
    assert all(torch.equal(source[name], twin[name]) for name in source)
    assert not any(parameter.requires_grad for parameter in step.twin.parameters())


# BatchNorm


def test_the_twin_gathers_batch_statistics_of_its_own() -> None:
    step = moco("batch_norm", rows=16, momentum=1.0)
    before = {name: x.clone() for name, x in step.twin.named_buffers() if "running_mean" in name}
    train(step, batches(1, 16))
    assert before
    after, source = dict(step.twin.named_buffers()), dict(step.model.named_buffers())
    for name, value in before.items():
        assert not torch.equal(after[name], value), name
        assert not torch.equal(after[name], source[name.removeprefix("module.0.")]), name


def test_a_key_sits_in_another_group_than_its_query_does() -> None:
    """A key depends on all rows of its group: which these are changes from step to step."""
    step = moco("batch_norm", rows=16)
    view = batches(1, 16)[0].views[1].clone()

    def reached(seed: int) -> list[int]:
        keys = step._keys(view, seed)
        changed = view.clone()
        changed[0] = 255 - changed[0]
        return [row for row, same in enumerate((step._keys(changed, seed) == keys).all(1)) if not same]

    found = [reached(seed) for seed in range(3)]
    assert all(len(rows) == 8 and 0 in rows for rows in found)
    assert all(rows != list(range(8)) for rows in found)
    assert found[0] != found[1] != found[2]


def test_the_order_of_the_keys_is_of_the_runs_seed() -> None:
    view = batches(1, 16)[0].views[1]

    def keys(seed: int) -> Tensor:
        step = tiny(MOCO, "batch_norm", 16, seed=seed)
        assert isinstance(step, MocoStep)
        return step._keys(view, 5)

    one, same, other = (keys(seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, rtol=1e-3)


def test_what_is_kept_is_a_plain_backbone() -> None:
    step, plain = moco("batch_norm", rows=16), tiny_encoder("batch_norm")
    train(step, batches(2, 16))
    plain.load_state_dict(step.model.state_dict())
    view = batches(1)[0].views[0]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval().encode(view), step.model.eval().encode(view))


@pytest.mark.parametrize(
    ("rows", "groups", "expected"), [(16, 8, 2), (256, 8, 8), (64, 4, 4), (15, 8, None), (64, 1, None)]
)
def test_small_batches_have_fewer_groups(rows: int, groups: int, expected: int | None) -> None:
    step = moco("batch_norm", rows=rows, groups=groups, queue=256)
    found = {module.groups for module in step.model.modules() if type(module).__name__ == "_Split"}
    assert found == ({expected} if expected else set())
    assert step.shuffles == bool(expected)


# Bad input


def test_a_queue_smaller_than_a_steps_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match="queue is 7, less than the 8 keys of one step"):
        moco(queue=7)
    with pytest.raises(ConfigError, match="queue is 15, less than the 16 keys of one step"):
        moco(queue=15, symmetric=True)
    moco(queue=8)


@pytest.mark.parametrize("views", [0, 1, 3])
def test_anything_but_two_views_is_refused(views: int) -> None:
    with pytest.raises(InputError, match=f"needs two views of each picture, the data gives {views}"):
        moco()(random_batch(8, views=views))


def test_a_batch_of_one_picture_is_refused() -> None:
    with pytest.raises(InputError, match="at least two pictures"):
        moco()(random_batch(1))


@pytest.mark.parametrize("build", [build_moco_v1, build_moco_v2])
def test_another_model_is_refused(build: Callable[..., MocoStep]) -> None:
    with pytest.raises(ConfigError, match=r"moco_v\d trains one tower of pictures"):
        build(nn.Linear(2, 2), MocoV2Config(), setting())
