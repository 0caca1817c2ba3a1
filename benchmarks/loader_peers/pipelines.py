"""The loaders that are compared: each from local shards to endless batches of pixels and token ids.

The one idea: every peer as its documentation writes it, with the same pictures, geometry, tokenizer, batch
size and number of workers. Geometry is RandomResizedCrop with 0.9 to 1 of the area ("crop", as open_clip has
it) or the short side scaled to 224 and the centre cut out ("centre"), bicubic and antialiased. open_clip
yields normalised floats, as in its own training; all others uint8, as clipkit does. Libraries of the peers
are imported when they are used, from their own virtual environments.

Shapes: B pictures, S side in pixels, L tokens.
"""

import io
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from loader_peers.sets import Set, linked

SIDE = 224
BUFFER = 1000  # samples that are shuffled together, where a peer lets one choose
Batches = Iterator[tuple[Any, Any]]


def tokenizer() -> Any:
    """CLIP's byte-pair encoding: open_clip's code, without importing all of its models."""
    from clipkit.text import build_tokenizer

    return build_tokenizer({"name": "clip"})


def tokenize(encode: Callable[[list[str]], Any], text: str) -> Any:
    return encode([text])[0]


def transform(geometry: str) -> Callable[[Any], Any]:
    """torchvision's, from a Pillow picture to uint8 (3, S, S)."""
    from torchvision.transforms import InterpolationMode, v2

    bicubic = InterpolationMode.BICUBIC
    if geometry == "crop":
        steps = [v2.RandomResizedCrop(SIDE, scale=(0.9, 1.0), interpolation=bicubic)]
    else:
        steps = [v2.Resize(SIDE, interpolation=bicubic), v2.CenterCrop(SIDE)]
    return v2.Compose([*steps, v2.PILToTensor()])


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def clipkit(made: Set, geometry: str, batch: int, workers: int, start_step: int = 0) -> Batches:
    from clipkit.images import Preprocess
    from clipkit_data.batches.loader import TrainBatches
    from clipkit_data.dataset import ShardDataset
    from clipkit_data.pictures.crop import CropConfig

    crop = CropConfig(scale=(0.9, 1.0)) if geometry == "crop" else None
    batches = TrainBatches(
        ShardDataset(made.paths),
        Preprocess(size=SIDE),
        tokenizer(),
        batch_size=batch,
        workers=workers,
        crop=crop,
        start_step=start_step,
    )
    for found in batches:
        yield found.images, found.ids


def open_clip(made: Set, geometry: str, batch: int, workers: int) -> Batches:
    """open_clip's training pipeline as it is, under the webdataset that it pins."""
    package, data = import_module("open_clip"), import_module("open_clip_train.data")
    args = Namespace(
        train_data=f"{made.folder}/{{00000..{made.shards - 1:05d}}}.tar",
        train_num_samples=10**9,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    pixels = package.image_transform(SIDE, is_train=geometry == "crop")
    found = data.get_wds_dataset(args, pixels, is_train=True, tokenizer=package.get_tokenizer("ViT-B-32"))
    yield from found.dataloader


def webdataset(made: Set, geometry: str, batch: int, workers: int) -> Batches:
    wds = import_module("webdataset")
    words = partial(tokenize, tokenizer().encode)
    shards = [str(path) for path in made.paths]
    samples = wds.WebDataset(shards, shardshuffle=made.shards, empty_check=False).shuffle(BUFFER)
    samples = samples.decode("pilrgb").to_tuple("jpg", "txt").map_tuple(transform(geometry), words)
    yield from wds.WebLoader(samples.batched(batch).repeat(), batch_size=None, num_workers=workers)


def energon(made: Set, geometry: str, batch: int, workers: int) -> Batches:
    library: Any = import_module("megatron.energon")
    folder = linked(made, "energon")
    if not (folder / ".nv-meta" / "dataset.yaml").exists():
        command = [str(Path(sys.executable).with_name("energon")), "prepare", str(folder)]
        command += ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CaptioningSample"]
        command += ["--field-map", '{"image": "jpg", "caption": "txt"}', "--no-progress"]
        subprocess.run(command, check=True, capture_output=True)
    pixels, words = transform(geometry), partial(tokenize, tokenizer().encode)

    class Encoder(library.DefaultTaskEncoder):
        decoder = library.SampleDecoder(image_decode="pilrgb")

        @library.stateless(restore_seeds=True)
        def encode_sample(self, sample: Any) -> Any:
            return replace(sample, image=pixels(sample.image), caption=words(sample.caption))

    samples = library.get_train_dataset(
        folder,
        worker_config=library.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=batch,
        shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    for found in endless(library.get_loader(samples)):
        yield found.image, found.caption


def streaming(made: Set, geometry: str, batch: int, workers: int) -> Batches:
    from PIL import Image
    from torch.utils.data import DataLoader

    library: Any = import_module("streaming")
    folder = made.folder.with_name(f"{made.folder.name}-mds")
    if not (folder / "index.json").exists():
        _write_mds(library, made, folder)
    pixels, words = transform(geometry), partial(tokenize, tokenizer().encode)

    class Decoded(library.StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return pixels(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")), words(sample["txt"])

    samples = Decoded(local=str(folder), shuffle=True, batch_size=batch, epoch_size=1_000_000)
    yield from DataLoader(samples, batch_size=batch, num_workers=workers)


def _write_mds(library: Any, made: Set, folder: Path) -> None:
    wds = import_module("webdataset")
    with library.MDSWriter(out=str(folder), columns={"jpg": "bytes", "txt": "str"}, exist_ok=True) as writer:
        for sample in wds.WebDataset([str(path) for path in made.paths], shardshuffle=False):
            writer.write({"jpg": sample["jpg"], "txt": sample["txt"].decode()})


def datasets(made: Set, geometry: str, batch: int, workers: int) -> Batches:
    import torch
    from torch.utils.data import DataLoader

    library: Any = import_module("datasets")
    pixels, words = transform(geometry), tokenizer()

    def collate(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
        images = torch.stack([pixels(row["jpg"].convert("RGB")) for row in rows])
        return images, words.encode([row["txt"] for row in rows])

    files = {"train": [str(path) for path in made.paths]}
    samples = library.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    samples = samples.shuffle(seed=0, buffer_size=BUFFER).repeat(None)
    yield from DataLoader(samples, batch_size=batch, num_workers=workers, collate_fn=collate)


PIPELINES: dict[str, Callable[..., Batches]] = {
    "clipkit": clipkit,
    "open_clip": open_clip,
    "webdataset": webdataset,
    "energon": energon,
    "streaming": streaming,
    "datasets": datasets,
}
