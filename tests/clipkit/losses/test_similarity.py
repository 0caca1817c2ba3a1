"""The three similarity functions against torch's own, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from clipkit.errors import InputError
from clipkit.losses import similarity


def test_values() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(similarity.inner_product(x, y), x @ y.T)
    cosine = F.cosine_similarity(x[:, None], y[None], dim=-1)
    torch.testing.assert_close(similarity.cosine(x, y), cosine)
    distance = (x[:, None] - y[None]).norm(dim=-1)
    torch.testing.assert_close(similarity.euclidean(x, y), distance)


@pytest.mark.parametrize("name", ["inner_product", "cosine", "euclidean"])
def test_gradients_and_dtypes(name: str) -> None:
    function = getattr(similarity, name)
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert function(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    assert function(x.half(), y).dtype == torch.float64


def test_equal_rows_and_small_distances() -> None:
    x = torch.full((40, 3), 1000.0, requires_grad=True)
    distance = similarity.euclidean(x, x + 1e-3)
    torch.testing.assert_close(distance, torch.full((40, 40), 0.0016913), rtol=1e-3, atol=0)
    similarity.euclidean(x, x.detach()).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(similarity.cosine(torch.zeros(2, 3), x), torch.zeros(2, 40))


@pytest.mark.parametrize("name", ["inner_product", "cosine", "euclidean"])
def test_bad_input(name: str) -> None:
    function = getattr(similarity, name)
    with pytest.raises(InputError, match=r"x \(2, 3\) and y \(2, 4\)"):
        function(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(InputError, match=r"y must be a floating tensor"):
        function(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64))
