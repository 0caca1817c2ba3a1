"""Training on clips with the pair step: what the order of frames tells is learned by what sees the order."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from webdataset.writer import TarWriter

from clipkit.models import DualEncoder, ModelConfig, build_model, load_model
from clipkit.zero_shot import ZeroShotClassifier
from clipkit_data.batches.clips import Clips
from clipkit_data.batches.pairs import EvalBatches, Pairs
from clipkit_data.batches.reads import content_of
from clipkit_data.dataset import ShardDataset
from clipkit_training.recipe import Recipe, load_recipe
from clipkit_training.run import train_recipe
from clipkit_training.world import World

ALONE = World(0, 1, torch.device("cpu"), None)

SIDE, FRAMES, COUNT = 16, 4, 32
LABELS = ["gets brighter", "gets darker"]


def frame(level: int) -> bytes:
    """A picture of one grey."""
    image, buffer = Image.new("RGB", (SIDE, SIDE), (level, level, level)), io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def samples() -> Iterator[dict[str, Any]]:
    """Clips that get brighter, each followed by the same clip backwards."""
    for number in range(COUNT):
        levels = [4 * (number // 2) + 60 * place for place in range(FRAMES)]
        brighter = number % 2 == 0
        frames = {
            f"{place}.png": frame(level) for place, level in enumerate(levels if brighter else levels[::-1])
        }
        yield {"__key__": f"{number:05d}", **frames, "txt": LABELS[0 if brighter else 1].encode()}


@pytest.fixture(scope="module")
def greys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of clips that get brighter or darker."""
    path = tmp_path_factory.mktemp("greys") / "00000.tar"
    with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for sample in samples():
            writer.write(sample)
    return path


def recipe_of(pool: str, shard: Path) -> Recipe:
    cnn = {"name": "cnn", "widths": [16, 32], "depths": [0, 1], "stem": 4}
    values = {
        "model": {
            "dim": 16,
            "image": {"name": "frames", "image": cnn, "pool": pool, "frames": FRAMES},
            "text": {"name": "transformer", "width": 16, "layers": 1, "heads": 2},
            "tokenizer": {"name": "clip", "context_length": 8},
            "preprocess": {"size": SIDE, "resize": "squash"},
        },
        "data": {"train": str(shard), "batch_size": 16, "cache": True, "augment": {"brightness": 0.1}},
        "optim": {"lr": 3e-3, "warmup_steps": 5},
        "max_steps": 60,
        "precision": "fp32",
        "device": "cpu",
        "evaluations": 0,
        "checkpoints": 1,
    }
    return Recipe.model_validate(values)


def everything(model: DualEncoder, shard: Path) -> Pairs:
    """All clips of the shard, as the model sees them."""
    return next(iter(EvalBatches(ShardDataset([shard]), content_of(model))))


@torch.inference_mode()
def accuracy(model: DualEncoder, shard: Path) -> float:
    """Share of clips for which the right phrase is the likelier of two."""
    pairs = everything(model, shard)
    classifier = ZeroShotClassifier(model, LABELS, templates=("{}",))
    best_N = classifier.score(model.encode_image(pairs.images).numpy()).argmax(axis=1)
    right = [LABELS[best] == words for best, words in zip(best_N, pairs.captions, strict=True)]
    return sum(right) / len(right)


def test_a_run_learns_what_only_the_order_of_frames_tells(greys: Path, tmp_path: Path) -> None:
    result = train_recipe(recipe_of("attention", greys), tmp_path / "run", ALONE)
    assert result["faults"] == {}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.85 * losses[0]
    model = load_model(tmp_path / "run/model")
    assert isinstance(model, DualEncoder)
    assert accuracy(model, greys) == 1


@torch.inference_mode()
def test_the_mean_cannot_tell_a_clip_from_its_reverse(greys: Path) -> None:
    config = recipe_of("mean", greys).model
    assert isinstance(config, ModelConfig)
    model = build_model(config, seed=0).eval()
    embedded_ND = model.encode_image(everything(model, greys).images)
    torch.testing.assert_close(embedded_ND[::2], embedded_ND[1::2])  # each clip and the same backwards
    assert (embedded_ND[0] - embedded_ND[-1]).norm() > 1e-3


def test_the_recipe_for_moving_emoji_builds_a_model_of_clips() -> None:
    recipe = load_recipe("video-emoji")
    assert isinstance(recipe.model, ModelConfig)
    model = build_model(recipe.model, seed=recipe.seed)
    content = content_of(model)
    assert isinstance(content, Clips)
    assert content.frames == 8
    pixels = torch.zeros(2, 8, 3, 32, 32, dtype=torch.uint8)
    assert model.encode_image(pixels).shape == (2, model.dim)
    assert recipe.zero_shot_field == "motion"
