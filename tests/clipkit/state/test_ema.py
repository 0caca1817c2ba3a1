"""The slow twin: exact averages, what becomes of buffers, a decay that is a function of the step alone."""

import copy
import gc
import math
import weakref
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clipkit.errors import InputError
from clipkit.state import Ema, cosine_decay
from clipkit.state.ema import Decay

fast = settings(max_examples=40, deadline=None, derandomize=True)


def _encoder(seed: int = 0) -> nn.Sequential:
    """An encoder with a head, a frozen layer and BatchNorm, as in MoCo and BYOL."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    encoder[0].weight.requires_grad_(False)
    return encoder


def _trained(source: nn.Module, seed: int) -> None:
    """Changes all parameters and buffers, as a step of training does."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in source.parameters():
            x += 0.1 * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)
        for x in source.buffers():
            x += torch.randint(1, 9, x.shape, generator=g)


def _resumed(ema: Ema, source: nn.Module, decay: Decay, buffers: Literal["copy", "ema", "own"]) -> Ema:
    """A fresh twin with the state of another one that went through a file's bytes."""
    fresh = Ema(source, decay, buffers=buffers)
    fresh.load_state_dict(load(save(ema.state_dict())))
    return fresh


def _same(one: nn.Module, other: nn.Module) -> None:
    assert set(one.state_dict()) == set(other.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@fast
@given(
    decay=st.one_of(
        st.floats(0, 1),
        st.builds(cosine_decay, st.floats(0, 1), st.integers(1, 6)),
    ),
    resume_at=st.sets(st.integers(0, 6)),
    steps=st.integers(1, 6),
    buffers=st.sampled_from(["copy", "ema", "own"]),
)
def test_weights_are_those_of_a_loop_wherever_the_run_is_resumed(
    decay: Decay, resume_at: set[int], steps: int, buffers: Literal["copy", "ema", "own"]
) -> None:
    source = _encoder().double()
    ema, never_stopped = Ema(source, decay, buffers=buffers), Ema(source, decay, buffers=buffers)
    start = {name: x.clone() for name, x in source.state_dict().items()}
    expected = {name: x.clone() for name, x in source.state_dict().items()}
    for step in range(steps):
        if step in resume_at:
            ema = _resumed(ema, _encoder(9).double(), decay, buffers)
        _trained(source, step)
        for one in (ema, never_stopped):
            one.update(source)
        tau = decay(step) if callable(decay) else decay
        for name, x in source.state_dict().items():
            is_buffer = name in dict(source.named_buffers())
            if is_buffer and buffers == "own":
                expected[name] = start[name]
            elif is_buffer and (buffers == "copy" or not x.is_floating_point()):
                expected[name] = x.clone()
            else:
                expected[name] = tau * expected[name] + (1 - tau) * x
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
    assert int(ema.step) == steps
    _same(ema, never_stopped)


def test_the_twin_starts_as_an_exact_copy_of_encoder_head_and_statistics() -> None:
    # lightly's ImageNet MoCo v2 and BYOL copy the backbone but draw a new head for the keys.
    source = _encoder()
    _trained(source, 1)
    _same(Ema(source, 0.99).module, source)


def test_the_first_update_averages_where_torchs_averaged_model_copies() -> None:
    source = _encoder()
    ours, torchs = Ema(source, 0.75), AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    torchs.update_parameters(source)  # its first update, a copy, while there is nothing to average
    for step in range(3):
        _trained(source, step)
        ours.update(source)
        torchs.update_parameters(source)
        assert not torch.equal(ours.module.get_parameter("3.weight"), source.get_parameter("3.weight"))
        _same(ours.module, torchs.module)


def test_the_source_is_neither_kept_nor_saved_nor_trained_twice() -> None:
    source = _encoder()
    model = nn.ModuleDict({"online": source, "target": Ema(source, 0.9)})
    assert set(model["target"].state_dict()) == {"step"} | {f"module.{name}" for name in source.state_dict()}
    trainable = [name for name, x in model.named_parameters() if x.requires_grad]
    assert trainable == [f"online.{name}" for name, x in source.named_parameters() if x.requires_grad]
    ema = Ema(source, 0.9)
    ema.update(source)
    gone = weakref.ref(source)
    del source, model
    gc.collect()
    assert gone() is None
    assert ema.module.get_parameter("3.weight").shape == (2, 5)


def test_calling_the_ema_calls_the_twin_which_records_no_graph() -> None:
    source, x = _encoder().eval(), torch.randn(4, 3)
    ema = Ema(source, 0.5)
    assert torch.equal(ema(x), source(x))
    _trained(source, 1)
    assert not torch.equal(ema(x), source(x))
    assert not ema(x).requires_grad
    image = x.clone().requires_grad_()
    ema(image).sum().backward()  # the input of the twin may still have a gradient
    assert image.grad is not None
    assert all(p.grad is None for p in ema.parameters())


def test_copied_buffers_make_the_twin_right_in_eval_mode() -> None:
    # moco, byol-pytorch, solo-learn and lightly average parameters alone: in eval mode their twin
    # normalises with statistics of its first day.
    source, x = _encoder(), torch.randn(4, 3)
    fresh, stale = Ema(source, 0.0), Ema(source, 0.0, buffers="own")
    _trained(source, 1)
    for ema in (fresh, stale):
        ema.update(source)
        ema.eval()
    source.eval()
    assert torch.equal(fresh(x), source(x))
    assert not torch.equal(stale(x), source(x))


def test_own_buffers_are_the_statistics_of_the_batches_the_twin_saw() -> None:
    source, x = _encoder().train(), torch.randn(16, 3)
    ema, alone = Ema(source, 1.0, buffers="own"), copy.deepcopy(source)
    for _ in range(3):
        source(torch.randn(16, 3) + 7)
        ema(x)
        alone(x)
        ema.update(source)
    _same(ema.module, alone)


def test_averaged_buffers_follow_the_decay_and_counts_are_copied() -> None:
    source = _encoder()
    ema = Ema(source, 0.75, buffers="ema")
    before = ema.module.get_buffer("1.running_mean").clone()
    _trained(source, 1)
    ema.update(source)
    expected = 0.75 * before + 0.25 * source.get_buffer("1.running_mean")
    torch.testing.assert_close(ema.module.get_buffer("1.running_mean"), expected)
    assert ema.module.get_buffer("1.num_batches_tracked") == source.get_buffer("1.num_batches_tracked") > 0


def test_a_decay_of_0_copies_and_of_1_leaves_the_twin_exactly() -> None:
    source = _encoder()
    copied, left, start = Ema(source, 0), Ema(source, 1, buffers="own"), copy.deepcopy(source)
    for step in range(3):
        _trained(source, step)
        copied.update(source)
        left.update(source)
    _same(copied.module, source)
    _same(left.module, start)


def test_the_decay_goes_on_with_the_step_after_a_resume() -> None:
    # solo-learn does not save its current decay: the first step after a resume has the base again.
    source, asked = _encoder(), []

    def decay(step: int) -> float:
        asked.append(step)
        return 0.9

    ema = Ema(source, decay)
    ema.update(source)
    ema.update(source)
    resumed = _resumed(ema, source, decay, "copy")
    resumed.update(source)
    ema.load_state_dict(Ema(source, decay).state_dict())  # back to the start
    ema.update(source)
    ema.step.fill_(40)
    ema.update(source)
    copy.deepcopy(ema).update(source)
    assert asked == [0, 1, 2, 0, 40, 41]


def test_cosine_decay_is_the_formula_and_stays_1_after_the_last_step() -> None:
    decay = cosine_decay(0.996, 1000)
    assert decay(0) == pytest.approx(0.996, abs=1e-15)
    assert decay(500) == pytest.approx(0.998, abs=1e-15)
    for k in (1, 250, 999):
        assert decay(k) == pytest.approx(1 - 0.004 * (math.cos(math.pi * k / 1000) + 1) / 2, abs=1e-15)
    assert decay(1000) == decay(1001) == decay(10**9) == 1.0
    values = [decay(k) for k in range(1001)]
    assert values == sorted(values)


def test_tied_weights_stay_tied() -> None:
    source = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    source[1].weight = source.get_parameter("0.weight")
    ema = Ema(source, 0.5)
    before = ema.module.get_parameter("0.weight").clone()
    _trained(source, 1)
    ema.update(source)
    assert ema.module.get_parameter("0.weight") is ema.module.get_parameter("1.weight")
    torch.testing.assert_close(
        ema.module.get_parameter("0.weight"), (before + source.get_parameter("0.weight")) / 2
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wide_twin_follows_a_narrow_source_that_a_narrow_twin_loses(dtype: torch.dtype) -> None:
    source = nn.Linear(2, 2, bias=False).to(dtype)
    nn.init.ones_(source.weight)
    narrow, wide = Ema(source, 0.999), Ema(source, 0.999).float()
    nn.init.constant_(source.weight, 1.0625)
    for _ in range(1000):
        narrow.update(source)
        wide.update(source)
    assert narrow.module.weight.dtype == dtype
    assert (narrow.module.weight == 1).all()  # type: ignore
    assert wide.module.weight.dtype == torch.float32
    expected = torch.full((2, 2), 1.0625 - 0.0625 * 0.999**1000)
    torch.testing.assert_close(wide.module.weight, expected, rtol=1e-4, atol=0)
    _same(_resumed(narrow, source, 0.999, "copy"), narrow)


def test_to_another_dtype_converts_the_twin_and_not_the_step() -> None:
    source = _encoder()
    ema = Ema(source, 0.75, buffers="ema")
    ema.update(source)
    ema.to(torch.float64)
    _trained(source, 1)
    before = ema.module.get_parameter("3.weight").clone()
    ema.update(source)
    after: Tensor = ema.module.get_parameter("3.weight")
    assert after.dtype == torch.float64
    torch.testing.assert_close(
        after, 0.75 * before + 0.25 * source.get_parameter("3.weight").double(), rtol=1e-14, atol=0
    )
    assert ema.step.dtype == torch.int64
    assert int(ema.step) == 2


def test_a_source_of_another_structure_is_refused_and_the_twin_unchanged() -> None:
    source = _encoder()
    ema = Ema(source, 0.5)
    before = copy.deepcopy(ema)
    _trained(source, 1)
    wider, unnormalised, biased = copy.deepcopy(source), copy.deepcopy(source), copy.deepcopy(source)
    wider[3] = nn.Linear(6, 2)
    unnormalised[1] = nn.BatchNorm1d(5, track_running_stats=False)
    biased.register_parameter("extra", nn.Parameter(torch.ones(1)))
    for other, message in (
        (nn.Sequential(source), r"only the twin has a parameter '0.weight' .*not a wrapper such as DDP"),
        (biased, "only the source has a parameter 'extra'"),
        (unnormalised, r"only the twin has a buffer '1.running_mean'"),
        (wider, r"parameter '3.weight' has shape \(2, 6\), \(2, 5\) in the twin"),
    ):
        with pytest.raises(InputError, match=message):
            ema.update(other)
    _same(ema, before)
    Ema(source, 0.5, buffers="own").update(unnormalised)  # own buffers need no counterpart


def test_a_decay_or_rule_that_is_none_is_refused() -> None:
    source = _encoder()
    for decay in (-0.1, 1.1, float("nan"), "0.9", True):
        with pytest.raises(InputError, match=r"decay must be a number in \[0, 1\], got"):
            Ema(source, decay)  # type: ignore
    ema = Ema(source, lambda step: 0.5 + step)
    ema.update(source)
    before = copy.deepcopy(ema)
    with pytest.raises(InputError, match=r"the decay of step 1 must be a number in \[0, 1\], got 1.5"):
        ema.update(source)
    _same(ema, before)
    with pytest.raises(InputError, match="buffers must be one of 'copy', 'ema', 'own', got 'none'"):
        Ema(source, 0.5, buffers="none")  # type: ignore
    with pytest.raises(InputError, match=r"base must be a number in \[0, 1\]"):
        cosine_decay(1.5, 10)
    with pytest.raises(InputError, match="total_steps must be an integer >= 1, got 0"):
        cosine_decay(0.9, 0)
