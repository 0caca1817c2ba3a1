"""Clips of moving emoji: what is held out, what decides the pictures, and where samples are kept."""

import argparse
import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from clipkit.errors import ConfigError
from clipkit_data.dataset import ShardDataset
from clipkit_data.moving_commands import MOVING
from clipkit_data.shards.scan import check_shard
from clipkit_data.tools import moving
from clipkit_data.tools.drawn import drawn_sample
from clipkit_data.tools.moving import (
    FRAMES,
    MOTIONS,
    SPLITS,
    Pose,
    draw_clip,
    write_moving_shards,
)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of five moving emoji and of two others."""
    out = tmp_path_factory.mktemp("moving") / "clips"
    counts = write_moving_shards(out, trained=5, heldout=2)
    assert counts == {"train": 50, "recombined": 5, "heldout": 22, "out": str(out)}
    return out


def test_moving_emoji_are_split_by_emoji_and_by_motion(moved: Path) -> None:
    pairs, names = {}, {}
    for split in SPLITS:
        assert not check_shard(moved / split / "00000.tar").faults
        dataset = ShardDataset([moved / split / "00000.tar"])
        records = [dataset[place] for place in range(len(dataset))]
        pairs[split] = {(record.meta["name"], record.meta["motion"]) for record in records}
        names[split] = {name for name, _ in pairs[split]}
        assert all(record.caption == f"{record.meta['name']} {record.meta['motion']}" for record in records)
        assert all(len(record.frames) == FRAMES for record in records)
    assert names["train"] == names["recombined"]
    assert not names["train"] & names["heldout"]
    assert not pairs["train"] & pairs["recombined"]
    assert {motion for _, motion in pairs["heldout"]} == set(MOTIONS)


def test_a_moving_emoji_is_a_function_of_seed_name_and_motion() -> None:
    emoji = Image.new("RGBA", (136, 136), "red")
    clip = draw_clip(emoji, "cat", "grows", seed=0)
    assert clip == draw_clip(emoji, "cat", "grows", seed=0)
    others = [("cat", "grows", 1), ("dog", "grows", 0), ("cat", "shrinks", 0)]
    assert all(draw_clip(emoji, *other) != clip for other in others)


def test_clips_are_not_drawn_of_more_emoji_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"800 and 800 emoji were asked for, of \d+"):
        write_moving_shards(tmp_path / "none", trained=800, heldout=800)
    with pytest.raises(ConfigError, match="at least 1 of each"):
        write_moving_shards(tmp_path / "none", heldout=0)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("motion", "backwards"),
    [
        ("moves left", "moves right"),
        ("moves up", "moves down"),
        ("grows", "shrinks"),
        ("turns clockwise", "turns counterclockwise"),
    ],
)
def test_paired_motions_are_one_backwards_and_meet_in_the_middle(motion: str, backwards: str) -> None:
    pose = Pose(x=0.03, y=-0.05, size=0.5, angle=12)
    assert MOTIONS[motion](pose, 0.5) == MOTIONS[backwards](pose, 0.5) == pose
    for place in range(FRAMES):
        time = (place + 0.5) / FRAMES
        there, back = MOTIONS[motion](pose, time), MOTIONS[backwards](pose, 1 - time)
        assert there != pose
        for name in ("x", "y", "size", "angle"):
            assert getattr(there, name) == pytest.approx(getattr(back, name))


def test_sample_clips_are_drawn_once_into_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(moving, "write_moving_shards", partial(write_moving_shards, trained=1, heldout=1))
    folder = drawn_sample("moving")
    assert folder.is_relative_to(tmp_path)
    tar = folder / "train" / "00000.tar"
    before = tar.stat()
    assert drawn_sample("moving") == folder
    assert tar.stat() == before


def test_the_command_draws_the_same_clips_and_says_how_many(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert MOVING.arguments is not None
    assert MOVING.run is not None
    parser = argparse.ArgumentParser()
    MOVING.arguments(parser)
    out = tmp_path / "clips"
    assert MOVING.run(parser.parse_args([str(out), "--emoji", "5", "--heldout", "2", "--json"])) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["heldout"] == 22
    assert "50 train, 5 recombined, 22 heldout" in printed.err
    for split in SPLITS:
        name = f"{split}/00000.tar"
        assert (out / name).read_bytes() == (moved / name).read_bytes()
