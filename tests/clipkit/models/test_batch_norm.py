"""BatchNorm over all ranks is that of one process, over groups that of so many; the names stay plain."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipkit.errors import ConfigError, InputError
from clipkit.models.batch_norm import split, synchronised
from tests.clipkit.models import batch_norm_worker as worker
from tests.distributed.support import run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks of a real gloo group saved."""
    return run(worker, tmp_path_factory.mktemp("gloo"), 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_two_ranks_with_unequal_batches_have_the_batch_norm_of_one_process(
    ranks: list[dict[str, Any]], dtype: torch.dtype, tolerance: float
) -> None:
    name = str(dtype).removeprefix("torch.")
    first, second = ranks[0][name], ranks[1][name]
    for key, value in worker.found(None, None, dtype).items():
        if ".sum." in key:
            got = first[key] + second[key]
        elif ".same." in key:
            assert torch.equal(first[key], second[key]), key
            got = first[key]
        else:
            got = torch.cat([first[key], second[key]])
        limit = tolerance * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(got, value, rtol=0, atol=limit, msg=lambda m, key=key: f"{key}: {m}")


def test_one_row_of_all_ranks_together_is_refused_by_each(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "needs two values of each channel" in rank["refusal"]


def test_a_copy_is_of_the_same_ranks_and_half_precision_stays_so(ranks: list[dict[str, Any]]) -> None:
    expected = nn.BatchNorm1d(3)(torch.tensor([[0.0], [0.0], [1.0], [1.0]]).expand(4, 3))
    torch.testing.assert_close(torch.cat([rank["twin"] for rank in ranks]), expected)
    assert {rank["narrow"] for rank in ranks} == {"torch.bfloat16"}


def test_a_process_alone_changes_nothing() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3))
    assert synchronised(module, None) is module
    assert type(module[0]) is nn.BatchNorm1d


@given(groups=st.integers(1, 4), more=st.integers(0, 9), seed=st.integers(0, 99))
def test_each_group_is_normalised_by_itself(groups: int, more: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * groups + more, 3, 2, generator=generator, dtype=torch.float64)
    norm = nn.BatchNorm1d(3, dtype=torch.float64)
    out = split(norm, groups)(rows)
    means, variances = [], []
    for part, got in zip(rows.tensor_split(groups), out.tensor_split(groups), strict=True):
        mean, var = part.mean((0, 2), keepdim=True), part.var((0, 2), correction=0, keepdim=True)
        torch.testing.assert_close(got, (part - mean) / (var + norm.eps).sqrt())
        means.append(part.mean((0, 2)))
        variances.append(part.var((0, 2)))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0))


def test_the_gradient_of_groups_is_that_of_plain_layers_on_each() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    grouped = split(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(), 2)
    grouped.load_state_dict(plain.state_dict())
    rows = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    torch.cat([plain(part) for part in rows.split(3)]).pow(3).sum().backward()
    grouped(rows).pow(3).sum().backward()
    for (name, expected), (_, got) in zip(plain.named_parameters(), grouped.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet"])
def test_a_converted_model_is_saved_and_judged_as_the_plain_one(architecture: str, tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    plain, model = (timm.create_model(architecture, num_classes=0) for _ in range(2))
    names = list(model.state_dict())
    parameters = dict(model.named_parameters())
    model = split(model, 2)
    assert list(model.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    pictures = torch.rand(6, 3, 32, 32)
    model(pictures)
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(plain, str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(plain.eval()(pictures), model.eval()(pictures))


def test_one_group_is_plain_batch_norm_and_groups_can_be_changed() -> None:
    plain, norm = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    rows = torch.randn(5, 3)
    torch.testing.assert_close(split(split(norm, 2), 1)(rows), plain(rows))
    assert plain.running_var is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_a_layer_that_stands_in_two_places_stays_one() -> None:
    norm = nn.BatchNorm1d(3)
    module = split(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)}), 2)
    inner = module["b"]
    assert isinstance(inner, nn.Sequential)
    assert module["a"] is inner[0]
    assert module["a"] is not norm


def test_what_cannot_be_split_is_refused() -> None:
    class Other(nn.BatchNorm1d):
        pass

    with pytest.raises(InputError, match="groups must be an integer >= 1, got 0"):
        split(nn.BatchNorm1d(3), 0)
    with pytest.raises(InputError, match="in 3 groups needs two rows in each, the batch has 5 rows"):
        split(nn.BatchNorm1d(3), 3)(torch.ones(5, 3))
    with pytest.raises(ConfigError, match=r"0\.norm: statistics of a Other cannot be changed"):
        split(nn.Sequential(nn.ModuleDict({"norm": Other(3)})), 2)
