"""Clips of emoji that move, made from the emoji sample shards: `cat face` × `moves left`.

What moves can be told from any frame, how it moves only from several: each clip has a start pose of its own,
and at the middle of every motion the emoji is in that pose. Motions come in pairs, one the other backwards,
so that telling `grows` from `shrinks` takes the order of the frames too. Everything is a function of the
seed and of the emoji's name. A clip is numbered frames: `key.0.webp` … `key.7.webp`.

    train         most emoji, each in all motions but one
    recombined    those emoji, each in the motion it was not trained in
    heldout       other emoji, in all motions
"""

import io
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from clipkit.errors import ConfigError
from clipkit.files import atomic_folder
from clipkit_data.dataset import ShardDataset
from clipkit_data.records import Record
from clipkit_data.shards.writing import Entry, sample_key, shard_name, write_shard
from clipkit_data.sources import resolve_shards

FRAMES, SIDE, PER_SHARD = 8, 32, 1000
TRAINED, HELDOUT = 300, 40
GROUPS = ("Animals & Nature", "Food & Drink", "Activities", "Travel & Places", "Objects")
SPLITS = ("train", "recombined", "heldout")


@dataclass(frozen=True, slots=True)
class Pose:
    """How an emoji stands in a frame: centre (0 is the middle) and size in shares of the side, degrees."""

    x: float = 0.0
    y: float = 0.0
    size: float = 0.55
    angle: float = 0.0
    shown: bool = True


def _on(t: float) -> bool:
    return math.floor(4 * t) % 2 == 0


# Each changes a pose at a time t in (0, 1).
MOTIONS: Mapping[str, Callable[[Pose, float], Pose]] = {
    "moves left": lambda pose, t: replace(pose, x=pose.x + 0.5 * (0.5 - t)),
    "moves right": lambda pose, t: replace(pose, x=pose.x - 0.5 * (0.5 - t)),
    "moves up": lambda pose, t: replace(pose, y=pose.y + 0.5 * (0.5 - t)),
    "moves down": lambda pose, t: replace(pose, y=pose.y - 0.5 * (0.5 - t)),
    "grows": lambda pose, t: replace(pose, size=pose.size * 3 ** (t - 0.5)),
    "shrinks": lambda pose, t: replace(pose, size=pose.size * 3 ** (0.5 - t)),
    "turns clockwise": lambda pose, t: replace(pose, angle=pose.angle - 240 * (t - 0.5)),
    "turns counterclockwise": lambda pose, t: replace(pose, angle=pose.angle + 240 * (t - 0.5)),
    "bounces": lambda pose, t: replace(pose, y=pose.y - 0.25 * abs(math.sin(2 * math.pi * t))),
    "shakes": lambda pose, t: replace(pose, x=pose.x + 0.12 * math.sin(6 * math.pi * t)),
    "blinks": lambda pose, t: replace(pose, shown=_on(t)),
}


def write_moving_shards(
    out: Path,
    *,
    seed: int = 0,
    trained: int = TRAINED,
    heldout: int = HELDOUT,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Draw the clips and write `OUT/train`, `OUT/recombined` and `OUT/heldout`.

    Args:
        out: A new folder; it appears whole or not at all.
        seed: Decides which emoji are held out, start poses, and the order of clips.
        trained, heldout: Emoji to train on, and others that are only in the held-out clips.
        progress: Called with 1 after each clip.

    Returns:
        How many clips each part has.

    Raises:
        ConfigError: No emoji to train on or none to hold out, or more than there are.
    """
    known = _emoji(seed)
    if min(trained, heldout) < 1 or trained + heldout > len(known):
        raise ConfigError(
            f"{trained} and {heldout} emoji were asked for, of {len(known)}; at least 1 of each"
        )
    chosen = known[: trained + heldout]
    counts = {}
    with atomic_folder(out) as folder:
        for split in SPLITS:
            emoji = chosen[:-heldout] if split != "heldout" else chosen[-heldout:]
            pairs = [
                (record, motion)
                for record in emoji
                for motion in MOTIONS
                if split == "heldout" or (motion == _left_out(record, seed)) == (split == "recombined")
            ]
            pairs.sort(key=lambda pair: _hash(seed, "order", pair[0].meta["name"], pair[1]))
            counts[split] = len(pairs)
            _write(pairs, folder / split, split, seed, progress)
    return {**counts, "out": str(out)}


def draw_clip(emoji: Image.Image, name: str, motion: str, seed: int) -> list[Image.Image]:
    """The frames of one clip on white.

    Args:
        emoji: RGBA, square.
        name: The emoji's; with seed and motion it decides the start pose.
        motion: A key of `MOTIONS`.
        seed: Any integer.
    """
    chance = random.Random(f"{seed} {name} {motion}")
    start = Pose(
        x=chance.uniform(-0.1, 0.1),
        y=chance.uniform(-0.1, 0.1),
        size=chance.uniform(0.45, 0.65),
        angle=chance.uniform(-30, 30),
    )
    half = emoji.reduce(2)  # still larger than it is drawn, and sooner scaled
    return [_draw(half, MOTIONS[motion](start, (place + 0.5) / FRAMES)) for place in range(FRAMES)]


def _draw(emoji: Image.Image, pose: Pose) -> Image.Image:
    frame = Image.new("RGB", (SIDE, SIDE), "white")
    if pose.shown:
        size = max(2, round(pose.size * SIDE))
        small = emoji.resize((size, size), Image.Resampling.LANCZOS)
        small = small.rotate(pose.angle, Image.Resampling.BICUBIC, expand=True)
        corner = (
            round((0.5 + pose.x) * SIDE - small.width / 2),
            round((0.5 + pose.y) * SIDE - small.height / 2),
        )
        frame.paste(small, corner, small)
    return frame


def _emoji(seed: int) -> list[Record]:
    """The emoji that can move: things without variants, in an order of the seed's."""
    emoji = ShardDataset(resolve_shards("sample:emoji/train"), name="sample:emoji/train")
    records = [emoji[place] for place in range(len(emoji))]
    plain = [item for item in records if item.meta["group"] in GROUPS and not item.meta["modifiers"]]
    return sorted(plain, key=lambda item: _hash(seed, "emoji", item.meta["name"]))


def _left_out(record: Record, seed: int) -> str:
    """The one motion that an emoji of the training set is not trained in."""
    return min(MOTIONS, key=lambda motion: _hash(seed, "left out", record.meta["name"], motion))


def _hash(*parts: object) -> bytes:
    return sha256(" ".join(map(str, parts)).encode()).digest()


def _write(
    pairs: Sequence[tuple[Record, str]],
    out: Path,
    split: str,
    seed: int,
    progress: Callable[[int], Any] | None,
) -> None:
    """Shards of clips in the order given."""
    out.mkdir()
    for number, start in enumerate(range(0, len(pairs), PER_SHARD)):
        name = shard_name(number)
        part = pairs[start : start + PER_SHARD]
        write_shard(_entries(part, name, split, seed, progress), out, name)


def _entries(
    pairs: Sequence[tuple[Record, str]],
    shard: str,
    split: str,
    seed: int,
    progress: Callable[[int], Any] | None,
) -> Iterator[Entry]:
    for place, (record, motion) in enumerate(pairs):
        name, caption = record.meta["name"], f"{record.meta['name']} {motion}"
        with Image.open(io.BytesIO(record.image)) as image:
            frames = draw_clip(image.convert("RGBA"), name, motion, seed)
        row = {
            "key": sample_key(shard, place, PER_SHARD),
            "caption": caption,
            "name": name,
            "motion": motion,
            "group": record.meta["group"],
            "split": split,
        }
        members = {f"{number}.webp": _webp(frame) for number, frame in enumerate(frames)}
        members |= {"txt": caption.encode(), "json": json.dumps(row, ensure_ascii=False).encode()}
        yield members, row
        if progress:
            progress(1)


def _webp(frame: Image.Image) -> bytes:
    buffer = io.BytesIO()
    frame.save(buffer, "WEBP", quality=80, method=2)
    return buffer.getvalue()
