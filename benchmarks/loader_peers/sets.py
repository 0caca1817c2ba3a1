"""The shards that every loader reads: photo-like JPEGs with captions, made once and kept.

The one idea: the same encoded bytes for everybody. The pictures are gradients, 1/f octaves of noise and hard
edges at quality 90, since flat or purely random ones would tell nothing of the time that photographs take.
A few of them stand many times in a set, each time with another caption. Peers with formats of their own make
them from these shards, in folders beside them.
"""

import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIZES = {"640x480": (640, 480), "1600x1200": (1600, 1200), "64x64": (64, 64)}
QUALITY = 90
DECAY = 0.45  # of the octaves: 60 kB for 640 × 480 pixels, as photographs have
WORDS = """
a the of on in with and near under behind two three old young small large red green blue white black
golden wooden bright quiet crowded rainy sunny photo painting close-up view scene portrait man woman
child dog cat horse bird boat train bicycle street bridge mountain river beach forest field kitchen
window table flower tree snow sky light shadow running sitting holding looking riding waiting sleeping
eating umbrella guitar camera coffee market station harbour lighthouse cathedral café village sunset
reflection
""".split()  # noqa: SIM905 (a list would be longer than the rest of the file)


@dataclass(frozen=True)
class Set:
    """A folder of shards: `shards` of `per_shard` samples each, from so many different pictures."""

    folder: Path
    size: str
    pictures: int
    shards: int
    per_shard: int

    @property
    def samples(self) -> int:
        return self.shards * self.per_shard

    @property
    def paths(self) -> list[Path]:
        return [self.folder / f"{number:05d}.tar" for number in range(self.shards)]


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG that is about as hard to decode as a photograph."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    cells = 2
    while cells < max(width, height):
        noise = random.uniform(-1, 1, (max(1, cells * height // width), cells, 3))
        layer = Image.fromarray(np.uint8(127.5 * (noise + 1))).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        total += (np.asarray(layer, np.float32) / 127.5 - 1) * cells**-DECAY
        cells *= 2
    total += 0.015 * random.standard_normal(total.shape, np.float32)  # the sensor's
    ramp = np.linspace(-1, 1, width)[None, :, None] * random.uniform(-0.5, 0.5, 3)
    image = Image.fromarray(np.uint8(np.clip(128 + 70 * (total + ramp), 0, 255)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = random.uniform(0, width), random.uniform(0, height)
        w, h = random.uniform(0.02, 0.25, 2) * (width, height)
        colour = tuple(random.integers(0, 256, 3).tolist())
        (draw.ellipse if random.random() < 0.5 else draw.rectangle)((x, y, x + w, y + h), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def samples(size: str, pictures: int, count: int) -> Iterator[dict[str, Any]]:
    """So many samples for `write_shards`, with captions of 5 to 20 words."""
    random = np.random.default_rng(0)
    encoded = [photo(*SIZES[size], seed) for seed in range(pictures)]
    for place in range(count):
        caption = " ".join(random.choice(WORDS, random.integers(5, 21)))
        yield {"image": encoded[place % pictures], "ext": "jpg", "caption": caption}


def speed_set(root: Path, size: str, pictures: int) -> Set:
    """Eight shards, each with every picture once; index files and a manifest beside them."""
    made = Set(root / f"{size}-{pictures}", size, pictures, shards=8, per_shard=pictures)
    return _once(made, repeats=1)


def many_shards(root: Path, shards: int) -> Set:
    """So many small shards of 16 tiny pictures: hard links to ten that differ."""
    made = Set(root / f"{shards}-shards", "64x64", 16, shards, per_shard=16)
    return _once(made, repeats=-(-shards // 10))


def _once(made: Set, repeats: int) -> Set:
    """The set, written unless it is there as a whole; each written shard stands so many times in it.

    What peers made of an earlier one goes with it.
    """
    if (made.folder / "manifest.json").exists():
        return made
    from clipkit_data.shards.writing import write_shards
    from clipkit_data.tools.indexing import index_shards

    part, written = (made.folder.with_name(f".{made.folder.name}.{kind}") for kind in ("part", "written"))
    for folder in (part, written, *made.folder.parent.glob(f"{made.folder.name}-*")):
        shutil.rmtree(folder, ignore_errors=True)
    part.mkdir(parents=True)
    different = -(-made.shards // repeats)
    count = different * made.per_shard
    sources = write_shards(samples(made.size, made.pictures, count), written, per_shard=made.per_shard)
    for number, path in enumerate(made.paths):
        os.link(sources[number % different], part / path.name)
    shutil.rmtree(written)
    index_shards(str(part))
    shutil.rmtree(made.folder, ignore_errors=True)
    part.rename(made.folder)
    return made


def linked(made: Set, name: str) -> Path:
    """A folder with the same shards under `name`, for a peer that writes files beside them."""
    folder = made.folder.with_name(f"{made.folder.name}-{name}")
    folder.mkdir(exist_ok=True)
    for path in made.paths:
        if not (folder / path.name).exists():
            os.link(path, folder / path.name)
    return folder
