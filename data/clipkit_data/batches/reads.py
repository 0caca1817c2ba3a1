"""What a model reads: pictures, clips, texts or graphs, as a `Content`."""

from clipkit.errors import ConfigError
from clipkit.models import DualEncoder, Encoder
from clipkit_data.batches.clips import Clips
from clipkit_data.batches.content import Content, Pictures, Texts, WholePictures
from clipkit_data.batches.graphs import Graphs


def content_of(model: DualEncoder | Encoder, size: int | None = None) -> Content:
    """The content of the samples that a model reads.

    Args:
        model: An image tower that says of how many `frames` reads clips.
        size: Side in pixels that whole pictures are loaded at, to cut views from; None: as the model
            sees them.

    Raises:
        ConfigError: A size for what has no pictures.
        DependencyError: torch_geometric is missing for graphs.
    """
    modality = "image" if isinstance(model, DualEncoder) else model.modality
    if modality != "image" and size is not None:
        raise ConfigError(f"data.load_size is of pictures: the model reads {modality}s")
    if modality == "text":
        return Texts()
    if modality == "graph":
        assert isinstance(model, Encoder)
        return Graphs(model.config.tower.get("features"))
    tower, preprocess = model.image if isinstance(model, DualEncoder) else model.tower, model.preprocess
    if size is not None:
        preprocess = preprocess.model_copy(update={"size": size, "resize_size": None})
    frames = getattr(tower, "frames", None)
    if frames is not None:
        return Clips(preprocess, frames)
    return Pictures(preprocess) if size is None else WholePictures(preprocess)
