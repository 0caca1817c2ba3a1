"""What Steps on two views of pictures share: which models they train, and which batches they take.

Shapes: N rows of this rank, S picture side.
"""

from torch import Tensor, nn

from clipkit.errors import ConfigError, InputError
from clipkit.models import Encoder
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import two_views


def image_encoder(model: nn.Module, step: str) -> Encoder:
    """The model, if it is one tower of pictures. Raises: ConfigError."""
    if not isinstance(model, Encoder) or model.modality != "image":
        raise ConfigError(
            f"step: {step} trains one tower of pictures, the model is another",
            hint="give model.tower and model.modality: image",
        )
    return model


def view_pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """The two views of a batch, uint8 (N, 3, S, S) each, N ≥ 2.

    Raises:
        InputError: There are fewer or more views, or less than two rows.
    """
    first, second = two_views(batch)
    if len(first) < 2:
        raise InputError(
            f"this step needs at least two pictures in each process, this batch has {len(first)}",
            hint="raise data.batch_size",
        )
    return first, second
