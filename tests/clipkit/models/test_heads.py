"""Heads have the layers that their papers give them, no more and no less."""

import pytest
import torch
from torch import nn

from clipkit.errors import InputError
from clipkit.models import heads


def layers(head: nn.Sequential) -> list[str]:
    """Each layer in a word: a linear one with its widths and "+b" for a bias, a norm with what it learns."""
    words = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            bias = "" if layer.bias is None else "+b"
            words.append(f"{layer.in_features}-{layer.out_features}{bias}")
        elif isinstance(layer, nn.BatchNorm1d):
            learns = [name for name, p in layer.named_parameters() if p is not None]
            words.append("norm" + "".join("*" if name == "weight" else "+" for name in learns))
        else:
            words.append(type(layer).__name__.lower())
    return words


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (heads.simclr_head(6, "v1", dim=4), "6-6 norm*+ relu 6-4 norm*"),
        (heads.simclr_head(6, "v2", hidden=5, dim=4), "6-5 norm*+ relu 5-5 norm*+ relu 5-4 norm*"),
        (heads.simclr_head(6, "linear", dim=4), "6-4 norm*"),
        (heads.simclr_head(6, "none"), ""),
        (heads.sup_con_head(6, dim=4), "6-6+b relu 6-4+b"),
        (heads.moco_head(6, "v1", dim=4), "6-4+b"),
        (heads.moco_head(6, "v2", dim=4), "6-6+b relu 6-4+b"),
        (heads.moco_v3_projector(6, hidden=5, dim=4), "6-5 norm*+ relu 5-4 norm"),
        (heads.moco_v3_projector(6, hidden=5, dim=4, layers=3), "6-5 norm*+ relu 5-5 norm*+ relu 5-4 norm"),
        (heads.moco_v3_predictor(4, hidden=5), "4-5 norm*+ relu 5-4 norm"),
        (heads.moco_v3_predictor(4, hidden=5, last_norm=False), "4-5 norm*+ relu 5-4"),
        (heads.byol_head(6, hidden=5, dim=4), "6-5+b norm*+ relu 5-4"),
        (heads.simsiam_projector(6, dim=4), "6-6 norm*+ relu 6-6 norm*+ relu 6-4 norm"),
        (heads.simsiam_projector(6, dim=4, layers=2), "6-6 norm*+ relu 6-4 norm"),
        (heads.simsiam_predictor(8), "8-2 norm*+ relu 2-8+b"),
        (heads.mlp_head([3, 2], batch_norm=True, last_norm="affine"), "3-2+b norm*+"),
    ],
)
def test_a_head_has_the_layers_of_its_paper(head: nn.Sequential, expected: str) -> None:
    assert " ".join(layers(head)) == expected


def test_a_norm_without_a_shift_scales_alone() -> None:
    head = heads.simclr_head(6, "linear", dim=4)
    norm = head[-1]
    assert isinstance(norm, nn.BatchNorm1d)
    nn.init.constant_(norm.weight, 3.0)
    out = head(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.full((4,), 3.0), atol=1e-2, rtol=0)
    assert set(norm.state_dict()) == {"weight", "running_mean", "running_var", "num_batches_tracked"}


def test_no_head_leaves_the_features_alone() -> None:
    features = torch.randn(3, 6)
    assert heads.simclr_head(6, "none")(features) is features


@pytest.mark.parametrize("widths", [[], [4, 0], [-1, 4]])
def test_widths_that_no_layer_has_are_refused(widths: list[int]) -> None:
    with pytest.raises(InputError, match="widths of a head must be integers >= 1"):
        heads.mlp_head(widths, batch_norm=False)
