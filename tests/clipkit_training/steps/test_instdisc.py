"""Instance discrimination against its definition written out in float64, its first epoch, and bad input."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from clipkit.errors import ConfigError, InputError
from clipkit_training.steps.instdisc import BankStep, InstDiscConfig, InstDiscStep, build_instdisc
from clipkit_training.steps.nce import NceConfig, build_nce
from tests.clipkit_training.steps.memory_worker import INSTDISC, NCE, RATE, batches, tiny
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


def instdisc(**options: Any) -> InstDiscStep:
    """A Step of tiny widths over a data set of 12 pictures."""
    step = tiny(INSTDISC | options, samples=12)
    assert isinstance(step, InstDiscStep)
    return step


class NaiveBank:
    """A plain tower, a dict as its bank, and one candidate after the other; float64."""

    def __init__(self, step: BankStep, temperature: float) -> None:
        self.pictures = tiny_encoder("group_norm")
        self.net = nn.Sequential(in_float64(self.pictures.tower), in_float64(step.head))
        self.temperature, self.bank = temperature, dict[int, Tensor]()

    def embed(self, images: Tensor, index: list[int]) -> Tensor:
        """Embeddings; those of new pictures are put into the bank."""
        f = self.net(pixels(self.pictures, images))
        for row, i in enumerate(index):
            self.bank.setdefault(i, normalize(f[row].detach(), dim=0))
        return f

    def scores(self, f: Tensor, rows: list[int]) -> Tensor:
        """Of one embedding with rows of the bank."""
        return cosine_similarity(f, torch.stack([self.bank[i] for i in rows]), dim=1) / self.temperature

    def drawn(self, count: int, step: int) -> list[int]:
        """Samples that have been seen, drawn by the step's number."""
        seen = sorted(self.bank)
        generator = torch.Generator().manual_seed(step)
        return [seen[i] for i in torch.randint(len(seen), (count,), generator=generator).tolist()]

    def descend(self, loss: Tensor, f: Tensor, index: list[int], *more: Tensor) -> None:
        """A step of gradient descent, and the bank's move."""
        self.net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in (*self.net.parameters(), *more):
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
            for row, i in enumerate(index):
                self.bank[i] = normalize(self.bank[i] + normalize(f[row], dim=0), dim=0)

    def assert_same(self, step: BankStep, share: float = 1e-5) -> None:
        """The Step's gradients and bank are these."""
        mine = {f"0.{name}": x for name, x in gradients(step.model.tower).items()}
        mine |= {f"1.{name}": x for name, x in gradients(step.head).items()}
        assert_near(mine, {n: p.grad for n, p in self.net.named_parameters() if p.grad is not None}, share)
        rows, ids = step.bank.valid()
        assert ids.tolist() == sorted(self.bank)
        assert_near({"": rows}, {"": torch.stack([self.bank[i] for i in ids.tolist()])}, share)


@pytest.mark.parametrize("draws", [None, 9])
def test_four_steps_are_those_of_the_definition(draws: int | None) -> None:
    step = instdisc(draws=draws)
    naive = NaiveBank(step, 0.2)
    for batch in batches(4, samples=12, views=0):
        index = batch.index.tolist()
        f, losses = naive.embed(batch.images, index), []
        rivals = sorted(naive.bank) if draws is None else naive.drawn(draws, batch.step)
        for row, own in enumerate(index):
            score = naive.scores(f[row], [own, *(i for i in rivals if i != own)])
            losses.append(score.logsumexp(0) - score[0])
        expected = torch.stack(losses).mean()
        naive.descend(expected, f, index)
        found = train(step, [batch], RATE)[0]
        assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        naive.assert_same(step, 1e-4)


def test_every_step_has_finite_figures_and_the_first_one_teaches() -> None:
    step = instdisc()
    first, *later = train(step, batches(4, samples=12, views=0))
    assert first["loss"] > 0
    assert any(bool(x.abs().max() > 0) for x in gradients(step).values())
    for figures in (first, *later):
        assert {"loss", "accuracy", "embedding_std"} < set(figures)
        assert all(value.isfinite() and value.ndim == 0 for value in figures.values())


def test_nothing_random_stands_in_for_what_was_not_seen() -> None:
    step = instdisc()
    train(step, batches(1, samples=12, views=0))
    assert step.bank.seen.tolist() == [True] * 8 + [False] * 4
    assert not step.bank.rows[8:].any()


def test_a_picture_that_is_in_a_batch_twice_is_no_negative_of_itself() -> None:
    step = instdisc()
    loss, _ = step(random_batch(4, views=0, index=[3, 3, 3, 3]))
    assert loss.item() == 0.0
    assert int(step.bank.seen.sum()) == 1


def test_a_draw_of_the_own_picture_is_no_negative() -> None:
    step = instdisc(draws=50)
    step(random_batch(4, views=0, index=[3, 3, 3, 3]))
    loss, _ = step(random_batch(4, views=0, seed=1, index=[3, 3, 3, 3]))
    assert loss.item() == 0.0, "all fifty draws are of the one picture"


def test_draws_are_of_the_runs_seed_and_the_step() -> None:
    def drawn(seed: int, number: int) -> list[int]:
        step = tiny(INSTDISC | {"draws": 9}, samples=40, seed=seed)
        assert isinstance(step, InstDiscStep)
        step.bank.seen.fill_(True)
        return step.drawn(30, number)[1].tolist()

    found = [drawn(seed, number) for seed in range(3) for number in range(3)]
    assert len({tuple(ids) for ids in found}) == 9
    assert drawn(2, 2) == found[-1]


def test_it_learns_to_tell_pictures_apart() -> None:
    step, (batch,) = instdisc(), batches(1, views=0)
    optimizer = torch.optim.Adam(step.parameters(), lr=3e-3)
    losses, figures = list[float](), dict[str, Tensor]()
    for _ in range(30):
        optimizer.zero_grad()
        loss, figures = step(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert figures["accuracy"] == 1
    assert figures["embedding_std"] > 0.9


@pytest.mark.parametrize("views", [1, 2])
def test_the_first_view_takes_the_place_of_the_pictures(views: int) -> None:
    batch = random_batch(8, views=views)
    found, expected = instdisc()(batch)[0], instdisc()(replace(batch, images=batch.views[0], views=()))[0]
    assert found == expected != instdisc()(replace(batch, views=()))[0]


BUILDS = [(build_instdisc, InstDiscConfig(dim=6)), (build_nce, NceConfig(dim=6))]


@pytest.mark.parametrize(("build", "config"), BUILDS)
def test_a_stream_has_no_bank(build: Any, config: Any) -> None:
    with pytest.raises(ConfigError, match=r"a stream does not tell how many.*without stream:"):
        build(tiny_encoder("group_norm"), config, setting(samples=0))


@pytest.mark.parametrize(("build", "config"), BUILDS)
def test_another_model_is_refused(build: Any, config: Any) -> None:
    with pytest.raises(ConfigError, match="trains one tower of pictures"):
        build(nn.Linear(2, 2), config, setting())


@pytest.mark.parametrize("options", [INSTDISC, NCE])
def test_a_batch_of_one_picture_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least two pictures in each process, this batch has 1"):
        tiny(options)(random_batch(1, views=0))
