"""One of two gloo ranks that train SimCSE on unequal parts of the same sentences, under DDP.

The tests import this file too, to do the same in one process with the whole batch. The encoder has no
dropout, whose masks would differ between one process and two.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipkit.models import Encoder, EncoderConfig, build_model
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Setting
from clipkit_training.steps.simcse import SimCSE, SimCSEConfig
from tests.distributed.support import launch

SENTENCES = ["a cat", "two dogs run", "a cat", "red", "nobody sleeps here", "the sun", "rain and wind"]
POSITIVES = ["an animal", "dogs", "a pet", "a colour", "all are awake", "a star", "weather"]
HARD = ["no cat", "two dogs sit", "a dog", "blue", "they sleep", "red", "rain and wind"]
FIRST = 5  # rank 0 has the first five rows
FORMS: dict[str, dict[str, Any]] = {
    "unsupervised": {"positive": "dropout"},
    "pairs": {"positive": "caption", "texts": 1},
    "hard negatives": {"positive": "caption", "texts": 2},
    "weighed hard negatives": {"positive": "caption", "texts": 2, "hard_negative_weight": 3.0},
    "equal sentences apart": {
        "positive": "caption", "texts": 2, "hard_negative_weight": 0.5, "merge_equal": False,
    },
}  # fmt: skip


def text_encoder(dropout: float = 0.0, **options: Any) -> Encoder:
    """A tiny encoder of texts with fixed weights."""
    tower = {"name": "transformer", "width": 16, "layers": 2, "heads": 2, "dropout": dropout, **options}
    tokenizer = {"name": "clip", "context_length": 16}
    return build_model(EncoderConfig(modality="text", tower=tower, tokenizer=tokenizer), seed=0)


def batch_of(encoder: Encoder, *texts: list[str]) -> Batch:
    """A batch of sentences and of what else is given of each; every text is trimmed to its own length."""
    assert encoder.tokenizer is not None
    ids, *more = (encoder.trim(encoder.tokenizer.encode(lines)) for lines in texts)
    count = torch.arange(len(ids))
    return Batch(
        images=torch.zeros(len(ids), 0, dtype=torch.uint8),
        ids=ids,
        sample_ids=count,
        epochs=torch.zeros_like(count),
        step=0,
        index=count,
        more_ids=tuple(more),
    )


def simcse(encoder: Encoder, group: dist.ProcessGroup | None = None, **options: Any) -> SimCSE:
    """The Step with a head of fixed weights."""
    torch.manual_seed(1)
    return SimCSE(encoder, SimCSEConfig(**options), Setting(group=group, batch_size=len(SENTENCES)))


def gradients(form: str, rank: int | None, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Loss and gradients of one step in one of the forms."""
    options = dict(FORMS[form])
    count = options.pop("texts", 0)
    step = simcse(text_encoder(), group, **options)
    rows = {None: slice(0, len(SENTENCES)), 0: slice(0, FIRST), 1: slice(FIRST, len(SENTENCES))}[rank]
    batch = batch_of(step.model, *(texts[rows] for texts in (SENTENCES, POSITIVES, HARD)[: count + 1]))
    forward: nn.Module = step
    if group is not None:
        forward = DistributedDataParallel(step, process_group=group, broadcast_buffers=False)
    loss, metrics = forward(batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    return found | {"loss": metrics["loss"], "accuracy": metrics["accuracy"]}


def work(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """Everything this rank finds out."""
    return {form: gradients(form, rank, group) for form in FORMS}


if __name__ == "__main__":
    launch(work, 2)
