"""SimCLR: the loss is NT-Xent of all views in one batch, in the mean over rows, on one process and on two."""

import math
from typing import Any

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor

from clipkit.losses import contrast
from clipkit_training.steps.simclr import SimCLRConfig, SimCLRStep, build_simclr
from tests.clipkit_training.steps.step_worker import trained
from tests.clipkit_training.steps.support import (
    Reference,
    assert_near,
    assert_one_is_two,
    cosines,
    gradients,
    random_batch,
    setting,
    tiny_encoder,
    widened,
)


def make(tower: str = "batch_norm", **options: Any) -> SimCLRStep:
    torch.manual_seed(0)
    return build_simclr(tiny_encoder(tower), SimCLRConfig(**options), setting())


def nt_xent(z_2ND: Tensor, temperature: float) -> Tensor:
    """Row by row, from the paper's eq. 1."""
    rows, half = len(z_2ND), len(z_2ND) // 2
    logits = cosines(z_2ND, z_2ND) / temperature
    losses = []
    for row in range(rows):
        others = [j for j in range(rows) if j != row]
        losses.append(torch.logsumexp(logits[row, others], 0) - logits[row, (row + half) % rows])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("head", ["v1", "v2", "linear", "none"])
def test_a_step_is_that_of_the_paper(head: str) -> None:
    step, batch = make(head=head, dim=8, temperature=0.2), random_batch(6)
    reference = Reference(step, "head")
    expected = nt_xent(reference.parts["head"](reference.features(torch.cat(batch.views))), 0.2)
    expected.backward()
    loss, _ = step(widened(step, batch))
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert_near(gradients(step), reference.gradients(), 1e-5)


def test_the_loss_is_lightlys() -> None:
    step, batch = make(dim=8, temperature=0.3), random_batch(6)
    z_2ND = step.head(step.model.encode(torch.cat(batch.views)))
    torch.testing.assert_close(step(batch)[0], NTXentLoss(temperature=0.3)(*z_2ND.chunk(2)))


def test_faults_1_2_and_8_two_processes_train_as_one(two_ranks: list[dict[str, Any]]) -> None:
    # Gradients lost in the gather, labels beside it, views joined before it: each is another loss.
    assert_one_is_two("simclr", trained("simclr", None, None), two_ranks)


def test_fault_9_small_temperatures_stay_finite_and_self_is_masked_whatever_they_are() -> None:
    step, batch = make("group_norm", head="none", temperature=0.002), random_batch(6)
    loss, _ = step(batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(step).values())
    same = random_batch(6)
    for view in same.views:
        view[:] = 100
    for temperature in (0.01, 0.5, 1.0):  # subtracting e instead of e^(1/τ) is right for 1.0 alone
        alike, _ = make("group_norm", head="none", temperature=temperature)(same)
        assert alike.item() == pytest.approx(math.log(11), abs=1e-4)


def test_a_picture_that_is_in_a_batch_twice_is_no_negative_of_itself() -> None:
    step, batch = make("group_norm", head="none"), random_batch(4, sample_ids=[7, 7, 8, 9])
    for view in batch.views:
        view[1] = view[0]
    reference = Reference(step)
    logits = cosines(*[reference.features(torch.cat(batch.views))] * 2) / 0.5
    # of row 0: itself and row 1 are the same view, rows 4 and 5 the positives
    row = torch.logsumexp(logits[0, [2, 3, 4, 5, 6, 7]], 0) - logits[0, [4, 5]].mean()
    z_2ND = step.model.encode(torch.cat(batch.views))
    ids_2N, view_2N = step.identities(batch)
    out = contrast(z_2ND, z_2ND, q_id=ids_2N, q_view=view_2N, k_view=view_2N, scale=2.0)
    torch.testing.assert_close(out.per_row[0].double(), row, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step(batch)[0], out.loss)
