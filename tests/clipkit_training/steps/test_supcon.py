"""SupCon: every view with the label is a positive, and the mean over them is outside of the logarithm."""

import math
from typing import Any

import pytest
import torch
from pytorch_metric_learning.losses import SupConLoss

from clipkit.errors import InputError
from clipkit_training.steps.supcon import SupConConfig, SupConStep, build_supcon
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

LABELS = [3, 1, 3, 3, 5, 1]  # one of them alone


def make(tower: str = "batch_norm", **options: Any) -> SupConStep:
    torch.manual_seed(0)
    return build_supcon(tiny_encoder(tower), SupConConfig(**options), setting())


def test_a_step_is_that_of_the_paper() -> None:
    step, batch = make(dim=8, temperature=0.3), random_batch(6, labels=LABELS)
    reference, labels, rows = Reference(step, "head"), LABELS * 2, range(12)
    z_2ND = reference.parts["head"](reference.features(torch.cat(batch.views)))
    logits = cosines(z_2ND, z_2ND) / 0.3
    losses = []
    for row in rows:
        total = torch.logsumexp(logits[row, [j for j in rows if j != row]], 0)
        positives = [j for j in rows if j != row and labels[j] == labels[row]]
        losses.append(sum(total - logits[row, j] for j in positives) / len(positives))
    expected = torch.stack([torch.as_tensor(loss) for loss in losses]).mean()
    expected.backward()
    loss, _ = step(widened(step, batch))
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert_near(gradients(step), reference.gradients(), 1e-4)


def test_the_loss_is_that_of_pytorch_metric_learning() -> None:
    step, batch = make(dim=8), random_batch(6, labels=LABELS)
    z_2ND = step.head(step.model.encode(torch.cat(batch.views)))
    torch.testing.assert_close(step(batch)[0], SupConLoss(temperature=0.1)(z_2ND, torch.tensor(LABELS * 2)))


def test_two_processes_train_as_one(two_ranks: list[dict[str, Any]]) -> None:
    assert_one_is_two("supcon", trained("supcon", None, None), two_ranks)


@pytest.mark.parametrize("temperature", [0.05, 0.07, 0.5])
def test_fault_20_no_temperature_rescales_the_loss_and_a_label_alone_is_no_nan(temperature: float) -> None:
    step, batch = make("group_norm", temperature=temperature), random_batch(6, labels=range(6))
    for view in batch.views:
        view[:] = 100
    assert step(batch)[0].item() == pytest.approx(math.log(11), abs=1e-4)


def test_missing_labels_are_reported() -> None:
    with pytest.raises(InputError, match=r"needs a label for each picture, 4 pictures have 0 .*data.label"):
        make("group_norm")(random_batch(4))
    with pytest.raises(InputError, match=r"1 of 4 have none in the field of data.label"):
        make("group_norm")(random_batch(4, labels=[1, ~7, 1, 2]))
