"""NCE against its definition written out in float64, and its normaliser: estimated, followed and learned."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from clipkit.losses import nce_loss
from clipkit_training.optim import build_optimizer
from clipkit_training.recipe import OptimConfig
from clipkit_training.steps.nce import NceStep
from tests.clipkit_training.steps.memory_worker import NCE, RATE, batches, tiny
from tests.clipkit_training.steps.support import random_batch, train
from tests.clipkit_training.steps.test_instdisc import NaiveBank

SAMPLES = 12


def nce(samples: int = SAMPLES, **options: Any) -> NceStep:
    """A Step of tiny widths over a data set of so many pictures."""
    step = tiny(NCE | options, samples=samples)
    assert isinstance(step, NceStep)
    return step


def mean_exp(naive: NaiveBank, f: Tensor, index: list[int], rows: list[int]) -> float:
    """Mean of exp(score) over embeddings and the rows that are not their own."""
    terms = [
        naive.scores(f[row], [i for i in rows if i != own]).detach().exp() for row, own in enumerate(index)
    ]
    return float(torch.cat(terms).mean())


@pytest.mark.parametrize("z", ["learnable", "moving", "fixed"])
def test_four_steps_are_those_of_the_definition(z: str) -> None:
    step, m = nce(z=z), NCE["draws"]
    naive = NaiveBank(step, 0.2)
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=z == "learnable")
    for batch in batches(4, samples=SAMPLES, views=0):
        index = batch.index.tolist()
        f = naive.embed(batch.images, index)
        noise = naive.drawn(m, batch.step)
        with torch.no_grad():
            if batch.step == 0:
                log_z.fill_(math.log(SAMPLES * mean_exp(naive, f, index, sorted(naive.bank))))
            elif z == "moving":
                now = SAMPLES * mean_exp(naive, f, index, noise)
                log_z.copy_(0.99 * log_z + 0.01 * math.log(now))
        if log_z.grad is not None:
            log_z.grad.zero_()
        losses = []
        for row, own in enumerate(index):
            logits = naive.scores(f[row], [own, *noise]) - log_z - math.log(m / SAMPLES)
            losses.append(softplus(-logits[0]) + softplus(logits[1:]).sum())
        expected = torch.stack(losses).mean()
        before = log_z.item()
        naive.descend(expected, f, index, log_z)
        found = train(step, [batch], RATE)[0]
        assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        assert found["log_z"].item() == pytest.approx(before, rel=1e-5)
        naive.assert_same(step, 1e-4)
        assert (step.log_z == found["log_z"]) == (z != "learnable")
    assert step.log_z.item() == pytest.approx(log_z.item(), rel=1e-5)


def test_the_loss_is_that_of_nce_loss_with_the_same_noise_for_every_row() -> None:
    step, (first, batch) = nce(), batches(2, samples=SAMPLES, views=0)
    train(step, [first])
    f, index = step.embed(batch)
    noise, _ = step.drawn(step.draws, batch.step)
    expected = nce_loss(
        f, step.bank.lookup(index), noise.expand(8, -1, -1),
        temperature=0.2, log_z=step.log_z, num_noise_population=SAMPLES,
    )  # fmt: skip
    torch.testing.assert_close(step(batch)[0], expected)


def test_z_is_a_number_without_weight_decay() -> None:
    step = nce()
    step.lr_scales = {"log_z": 25.0}
    *others, own = build_optimizer(step, OptimConfig(weight_decay=0.5)).param_groups
    (log_z,) = own["params"]
    assert log_z is step.log_z
    assert (own["weight_decay"], own["lr_scale"]) == (0, 25)
    assert not any(parameter is step.log_z for group in others for parameter in group["params"])


@pytest.mark.parametrize("z", ["learnable", "moving", "fixed"])
def test_only_a_learnable_z_is_a_parameter_and_each_is_in_the_state_dict(z: str) -> None:
    step = nce(z=z)
    assert ("log_z" in dict(step.named_parameters())) == (z == "learnable")
    assert {"log_z", "started", "bank.rows", "bank.seen"} <= set(step.state_dict())


def test_z_is_set_once_and_a_resumed_step_does_not_set_it_again() -> None:
    step, (first, second) = nce(z="fixed"), batches(2, samples=SAMPLES, views=0)
    assert not step.started
    train(step, [first])
    assert step.started
    value = step.log_z.clone()
    resumed = nce(z="fixed")
    resumed.load_state_dict(step.state_dict())
    train(resumed, [second])
    assert torch.equal(resumed.log_z, value)


def test_pictures_without_others_leave_z_to_later_steps() -> None:
    step, one = nce(z="moving"), random_batch(3, views=0, index=[5, 5, 5])
    values = [figures["log_z"] for figures in train(step, [one, one])]
    assert not step.started
    assert values[0] == values[1] == torch.tensor(math.log(SAMPLES))
    train(step, batches(1, samples=SAMPLES, views=0))
    assert step.started


def test_z_counts_the_whole_data_set_while_the_bank_still_fills() -> None:
    """The logits do not depend on how many samples there are, so neither do loss and gradients."""
    batch = random_batch(8, views=0)
    small, large = nce(8), nce(800)
    torch.testing.assert_close(small(batch)[0], large(batch)[0])
    assert (large.log_z - small.log_z).item() == pytest.approx(math.log(100), rel=1e-5)


class Fixed(nn.Module):
    """A tower that gives the same features for every picture; it learns their length alone."""

    def __init__(self, features_D: Tensor) -> None:
        super().__init__()
        self.features_D, self.length = nn.Buffer(features_D), nn.Parameter(torch.ones(()))

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        return (self.length * self.features_D).expand(len(pixels_N3SS), -1)


def toy(z: str, start: float | None = None) -> tuple[NceStep, Tensor, float]:
    """A Step in which log Z alone can be learned, scores with the rows of its bank, and the true log Z.

    The model says p(i) = exp(cosine(f, v_i) / τ) / Z of 30 unit vectors v, and is right: pictures come up
    with these probabilities. Then NCE is least where Z is the sum of the exponentials.
    """
    g = torch.Generator().manual_seed(4)
    step = nce(30, z=z, draws=200, temperature=0.5)
    rows = normalize(torch.randn(30, 6, generator=g))
    step.bank.rows.copy_(rows)
    step.bank.seen.fill_(True)
    f = torch.randn(6, generator=g)
    step.model.tower, step.head = Fixed(f), nn.Sequential()
    score = normalize(f, dim=0) @ rows.T / 0.5
    if start is not None:
        with torch.no_grad():
            step.log_z.fill_(start)
        step.started.fill_(True)
    return step, score, score.logsumexp(0).item()


def run(step: NceStep, score: Tensor, count: int, rate: float) -> list[float]:
    """Draw pictures from the model, and learn log Z alone; the bank stays as it is. Returns every log Z."""
    g, rows, found = torch.Generator().manual_seed(5), step.bank.rows.clone(), []
    for number in range(count):
        index = torch.multinomial(score.softmax(0), 64, replacement=True, generator=g).tolist()
        train(step, [random_batch(64, views=0, side=1, step=number, index=index)], rate)
        step.bank.rows.copy_(rows)
        found.append(step.log_z.item())
    return found


@pytest.mark.parametrize("start", [None, 3.0, 9.0])
def test_a_learnable_z_ends_at_the_true_one(start: float | None) -> None:
    step, score, true = toy("learnable", start)
    found = run(step, score, 150, rate=0.5)
    assert sum(found[-80:]) / 80 == pytest.approx(true, abs=0.1)


def test_fault_25_a_first_estimate_that_is_wrong_is_left_behind_unless_it_is_fixed() -> None:
    """Embeddings that are all alike give N · e^{1/τ}."""
    wrong = math.log(30) + 1 / 0.5
    ends = {}
    for z in ("learnable", "moving", "fixed"):
        step, score, true = toy(z, wrong)
        ends[z] = run(step, score, 250, rate=0.5)[-1] - true
    assert ends["fixed"] > 1.5
    assert abs(ends["learnable"]) < 0.4
    assert abs(ends["moving"]) < 0.5


def test_fault_25_an_estimate_leaves_out_the_own_row() -> None:
    """Nearly all of a row's mean would be its own e^{1/τ} otherwise."""
    step = nce(temperature=0.01)
    f = torch.eye(6)[:4]
    index = torch.arange(4)
    step.bank.update(index, f)
    estimate = step._estimate(f, index, *step.bank.valid())
    assert estimate.item() == pytest.approx(math.log(SAMPLES)), "all others are at right angles"
