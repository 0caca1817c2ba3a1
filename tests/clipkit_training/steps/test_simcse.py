"""SimCSE against its formula in plain loops, in two processes, from text shards, and with bad input."""

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from webdataset.writer import TarWriter

from clipkit.errors import ConfigError, InputError
from clipkit.models import EncoderConfig, build_model, load_encoder
from clipkit_training.recipe import load_recipe
from clipkit_training.run import train_recipe
from clipkit_training.steps import build_step
from clipkit_training.steps.base import Setting
from clipkit_training.steps.simcse import SimCSE
from clipkit_training.world import World
from tests.clipkit_training.steps import simcse_worker as worker
from tests.clipkit_training.steps.simcse_worker import (
    HARD,
    POSITIVES,
    SENTENCES,
    batch_of,
    simcse,
    text_encoder,
)
from tests.distributed.support import run

T = 0.05
ALONE = World(0, 1, torch.device("cpu"), None)
DIFFERENT = ["a cat", "two dogs run", "red", "nobody sleeps here", "the sun"]


def naive_loss(
    q: Tensor,
    p: Tensor,
    sentences: list[str],
    hard: Tensor | None = None,
    words: Any = (),
    alpha: float = 1.0,
) -> Tensor:
    """The formula in loops, in float64; equal sentences are positives of each other.

    Args:
        q, p, hard: Sentences, positives and hard negatives, (N, D).
        sentences, words: The texts of the sentences and of the hard negatives.
        alpha: Weight of the own hard negative.
    """
    losses = []
    for i in range(len(q)):
        positives, total = [], torch.zeros((), dtype=torch.float64)
        for j in range(len(p)):
            score = F.cosine_similarity(q[i], p[j], dim=0) / T
            total = total + score.exp()
            if sentences[i] == sentences[j]:
                positives.append(score)
            if hard is not None and words[j] != sentences[i]:
                weight = alpha if i == j else 1.0
                total = total + weight * (F.cosine_similarity(q[i], hard[j], dim=0) / T).exp()
        losses.append(total.log() - torch.stack(positives).mean())
    return torch.stack(losses).mean()


def check_against(step: SimCSE, batch: Any, reference: nn.Module, expected: Tensor, seed: int) -> None:
    """The step's loss and gradients are those of the reference."""
    torch.manual_seed(seed)
    loss, metrics = step(batch)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(reference.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    assert largest > 0.01
    for name, parameter in step.named_parameters():
        assert parameter.grad is not None, name
        error = (parameter.grad - theirs[name].grad).abs().max()  # pyright: ignore[reportOperatorIssue]
        assert error <= 1e-5 * largest, name


@pytest.mark.parametrize("sentences", [DIFFERENT, SENTENCES], ids=["different", "some equal"])
@pytest.mark.parametrize("pooling", ["end", "mean"])
def test_one_step_is_the_formula_with_the_same_masks(sentences: list[str], pooling: str) -> None:
    step = simcse(text_encoder(dropout=0.2, pooling=pooling)).train()
    reference, batch = copy.deepcopy(step).double(), batch_of(step.model, sentences)
    torch.manual_seed(7)
    z = reference.head(reference.model.tower(torch.cat([batch.ids, batch.ids])))
    expected = naive_loss(z[: len(sentences)], z[len(sentences) :], sentences)
    check_against(step, batch, reference, expected, seed=7)


@pytest.mark.parametrize("alpha", [1.0, 0.3, 4.0])
def test_one_step_with_hard_negatives_is_the_formula(alpha: float) -> None:
    step = simcse(text_encoder(), positive="caption", hard_negative_weight=alpha).train()
    reference, batch = copy.deepcopy(step).double(), batch_of(step.model, SENTENCES, POSITIVES, HARD)
    q, p, hard = (
        reference.head(reference.model.tower(ids))
        for ids in (batch.ids, batch.more_ids[0], batch.more_ids[1])
    )
    expected = naive_loss(q, p, SENTENCES, hard, HARD, alpha)
    check_against(step, batch, reference, expected, seed=0)


def test_without_merging_equal_sentences_are_negatives() -> None:
    step = simcse(text_encoder(), positive="caption", merge_equal=False, hard_negative_weight=2.0)
    reference, batch = copy.deepcopy(step).double(), batch_of(step.model, SENTENCES, POSITIVES, HARD)
    q, p, hard = (reference.head(reference.model.tower(ids)) for ids in (batch.ids, *batch.more_ids))
    rows, none = [str(row) for row in range(len(q))], [""] * len(q)
    check_against(step, batch, reference, naive_loss(q, p, rows, hard, none, 2.0), seed=0)


def test_it_is_the_ranking_loss_of_sentence_transformers() -> None:
    # MultipleNegativesRankingLoss: cross-entropy of 20 · cos against [positives; hard negatives], label i.
    step = simcse(text_encoder(), positive="caption", mlp=False, merge_equal=False)
    batch = batch_of(step.model, SENTENCES, POSITIVES, HARD)
    a, p, n = (step.model.embed(ids) for ids in (batch.ids, *batch.more_ids))
    expected = F.cross_entropy(20 * a @ torch.cat([p, n]).T, torch.arange(len(a)))
    assert step(batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_row_of_both_passes_has_a_mask_of_its_own() -> None:
    step = simcse(text_encoder(dropout=0.2), mlp=False).train()
    batch = batch_of(step.model, ["a cat"] * 8)
    with torch.no_grad():
        features = step.model(torch.cat([batch.ids, batch.ids]))
        apart = torch.pdist(features)
        assert apart.min() > 1e-3
        _, metrics = step(batch_of(step.model, DIFFERENT))
        assert metrics["positive_similarity"] < 0.999
        _, metrics = step.eval()(batch_of(step.model, DIFFERENT))
        assert metrics["positive_similarity"] == pytest.approx(1)
        assert metrics["embedding_std"] > 0.1
        _, metrics = step(batch)
        assert metrics["embedding_std"] < 1e-3, "equal features are collapsed ones"


def test_only_the_own_hard_negative_is_weighed() -> None:
    def value(alpha: float, hard: list[str]) -> float:
        step = simcse(text_encoder(), positive="caption", hard_negative_weight=alpha)
        return step(batch_of(step.model, SENTENCES, POSITIVES, hard))[1]["loss"].item()

    assert value(4.0, HARD) > value(1.0, HARD) > value(0.25, HARD)
    # hard negatives that are left out where they would count are the same with any weight
    assert value(4.0, SENTENCES) == pytest.approx(value(0.25, SENTENCES), rel=1e-6)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks of a real gloo group saved."""
    return run(worker, tmp_path_factory.mktemp("gloo"), 2)


@pytest.mark.parametrize("form", worker.FORMS)
def test_two_processes_have_the_gradient_of_one(ranks: list[dict[str, Any]], form: str) -> None:
    # The published code trains with 1/W of it on W GPUs; sentence-transformers once pointed at the hard
    # negatives instead of the positives after gathering.
    expected = worker.gradients(form, None, None)
    largest = max(float(value.abs().max()) for name, value in expected.items() if "." in name)
    assert largest > 0.01
    for rank in ranks:
        assert rank[form].keys() == expected.keys()
        for name, value in expected.items():
            assert (rank[form][name] - value).abs().max() <= 1e-5 * max(1, largest), name


def build(encoder: nn.Module, **options: Any) -> SimCSE:
    step = build_step(encoder, {"name": "simcse", **options}, Setting())
    assert isinstance(step, SimCSE)
    return step


def test_an_encoder_without_dropout_is_refused_unless_positives_are_captions() -> None:
    with pytest.raises(ConfigError, match="no dropout") as caught:
        build(text_encoder())
    assert caught.value.hint is not None
    assert "dropout" in caught.value.hint
    assert build(text_encoder(), positive="caption").model.training
    before = torch.random.get_rng_state()
    assert build(text_encoder(dropout=0.1), mlp=False).model.training
    assert torch.equal(torch.random.get_rng_state(), before), "the probe draws from a seed of its own"
    pictures = EncoderConfig(tower={"name": "cnn", "widths": [8], "depths": [1]})
    with pytest.raises(ConfigError, match="trains a text encoder"):
        build(build_model(pictures, seed=0))


def test_a_single_line_is_refused_before_it_is_trained_on(recipe: Path, tmp_path: Path) -> None:
    line = tmp_path / "one.txt"
    line.write_text("a sentence alone\n")
    more = yaml.safe_load(recipe.read_text())
    more["data"]["train"] = str(line)
    recipe.write_text(yaml.safe_dump(more))
    with pytest.raises(ConfigError, match="the training data has one sample"):
        train_recipe(load_recipe(str(recipe)), tmp_path / "run", ALONE)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_wrong_batches_are_refused() -> None:
    encoder = text_encoder(dropout=0.1)
    unsupervised, supervised = build(encoder), build(encoder, positive="caption")
    with pytest.raises(InputError, match="one sentence has no negatives"):
        unsupervised(batch_of(encoder, ["a cat"]))
    with pytest.raises(InputError, match=r"dropout does not go with 1 of data\.more_captions"):
        unsupervised(batch_of(encoder, SENTENCES, POSITIVES))
    for texts in ((SENTENCES,), (SENTENCES, POSITIVES, HARD, HARD)):
        with pytest.raises(InputError, match=rf"caption does not go with {len(texts) - 1} of data"):
            supervised(batch_of(encoder, *texts))


def bert(**options: Any) -> EncoderConfig:
    """A tiny BERT with new weights."""
    config = {
        "model_type": "bert", "vocab_size": 49408, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16, **options,
    }  # fmt: skip
    tokenizer = {"name": "clip", "context_length": 16}
    tower = {"name": "hf", "config": config, "pooling": "pooler"}
    return EncoderConfig(modality="text", tower=tower, tokenizer=tokenizer)


def test_bert_brings_its_dropout_and_a_head_that_is_kept() -> None:
    step = build(build_model(bert(), seed=0), mlp=False).train()
    loss, _ = step(batch_of(step.model, DIFFERENT))
    loss.backward()
    names = [name for name, parameter in step.named_parameters() if parameter.grad is not None]
    assert any("pooler.dense.weight" in name for name in names)
    assert len(names) == len(list(step.parameters()))
    still = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with pytest.raises(ConfigError, match="no dropout"):
        build(build_model(still, seed=0))


RECIPE = """
step: {name: simcse, positive: dropout}
max_steps: 6
precision: fp32
device: cpu
evaluations: 0
checkpoints: 2
model:
  modality: text
  tower: {name: transformer, width: 32, layers: 1, heads: 2, dropout: 0.1}
  tokenizer: {name: clip, context_length: 16}
data: {train: TRAIN, batch_size: 16}
optim: {lr: 0.003, warmup_steps: 2}
"""


def samples() -> Iterator[dict[str, Any]]:
    for number in range(40):
        meta = {"positive": f"means {number}", "hard": f"not {number}"}
        text = {"txt": f"sentence {number}".encode(), "json": json.dumps(meta).encode()}
        yield {"__key__": f"{number:05d}", **text}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that trains a tiny encoder on a shard of texts."""
    (tmp_path / "shards").mkdir()
    shard = tmp_path / "shards/00000.tar"
    with shard.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for sample in samples():
            writer.write(sample)
    path = tmp_path / "simcse.yaml"
    path.write_text(RECIPE.replace("TRAIN", str(shard)))
    return path


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("form", ["dropout", "caption"])
def test_a_resumed_run_is_bit_for_bit_the_whole_one_and_saves_the_tower(
    recipe: Path, tmp_path: Path, form: str
) -> None:
    more = yaml.safe_load(recipe.read_text())
    if form == "caption":
        more["step"] = {"name": "simcse", "positive": "caption", "hard_negative_weight": 2.0}
        more["data"]["more_captions"] = ["positive", "hard"]
        recipe.write_text(yaml.safe_dump(more))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_recipe(load_recipe(str(recipe)), whole, ALONE)
    train_recipe(load_recipe(str(recipe)), parts, ALONE)
    shutil.rmtree(parts / "checkpoints/step_00000006")
    train_recipe(load_recipe(str(recipe)), parts, ALONE, resume=True)
    first, second = (load_file(folder / "model/model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(whole) == losses(parts)
    assert all(math.isfinite(loss) for loss in losses(whole))
    encoder = load_encoder(whole / "model")
    assert encoder.modality == "text"
    assert not any("head" in name for name, _ in encoder.named_parameters())
    assert encoder.tokenizer is not None
    ids = encoder.tokenizer.encode(["sentence 1", "sentence 2"])
    assert torch.equal(encoder.encode(ids), encoder.encode(ids)), "no dropout once trained"
