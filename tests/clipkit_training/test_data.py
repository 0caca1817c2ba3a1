"""What runs read: mixtures, streams, augmentation on the device, all through real training."""

import json
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import torch
import yaml
from safetensors.torch import load_file

from clipkit.cli import main
from clipkit.errors import ClipkitError, ConfigError, InputError
from clipkit.models import build_model
from clipkit_data.shards.scan import scan_shard
from clipkit_data.tools.indexing import index_shards
from clipkit_data.tools.reshard import reshard
from clipkit_training.data import TrainingData
from clipkit_training.recipe import Recipe, load_recipe
from clipkit_training.run import train_recipe
from clipkit_training.world import World

ALONE = World(0, 1, torch.device("cpu"), None)


def changed(path: Path, tmp_path: Path, *overrides: str, **data: Any) -> Recipe:
    """The tiny recipe with other fields of `data`; None takes one out."""
    fields = yaml.safe_load(path.read_text())
    fields["data"] = {name: value for name, value in (fields["data"] | data).items() if value is not None}
    other = tmp_path / "recipe.yaml"
    other.write_text(yaml.safe_dump(fields))
    return load_recipe(str(other), overrides)


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_two_sources_are_trained_on_by_weight(tiny_recipe: Path, shape_shards: Path, tmp_path: Path) -> None:
    train, heldout = str(shape_shards / "train"), str(shape_shards / "heldout")
    recipe = changed(tiny_recipe, tmp_path, train=None, sources={train: 3, heldout: 1}, heldout=None)
    result = train_recipe(recipe, tmp_path / "run", ALONE)
    described = json.loads((tmp_path / "run/data.json").read_text())["sources"]
    shares = [described[0]["share"], described[1]["share"]]
    assert shares == (["3/4", "1"] if described[0]["name"] == train else ["1/4", "1"])
    shards = {source["name"]: [shard["name"] for shard in source["shards"]] for source in described}
    assert shards == {train: ["00000.tar", "00001.tar"], heldout: ["00000.tar"]}
    assert result["faults"] == {}
    assert rows(tmp_path / "run")[-1]["epochs"] == {heldout: 1.5, train: 1.5}  # 144 pairs of 24 and of 72
    other = changed(tiny_recipe, tmp_path, train=None, sources={train: 2, heldout: 1}, heldout=None)
    with pytest.raises(ClipkitError, match=r"share was [13]/4, is [12]/3"):
        train_recipe(other, tmp_path / "run", ALONE, resume=True)


def test_sources_may_move_and_be_named_in_another_order(
    tiny_recipe: Path, shape_shards: Path, tmp_path: Path
) -> None:
    train, heldout = str(shape_shards / "train"), str(shape_shards / "heldout")
    recipe = changed(tiny_recipe, tmp_path, train=None, sources={train: 3, heldout: 1}, heldout=None)
    train_recipe(recipe, tmp_path / "run", ALONE)
    moved = tmp_path / "a" / "moved"
    shutil.copytree(heldout, moved)
    sources = {str(moved): 1, train: 3}
    later = changed(tiny_recipe, tmp_path, "--max-steps", "8", train=None, sources=sources, heldout=None)
    assert train_recipe(later, tmp_path / "run", ALONE, resume=True)["steps"] == 8


def test_the_source_that_changed_is_the_one_that_is_named(
    tiny_recipe: Path, shape_shards: Path, tmp_path: Path
) -> None:
    """Sources stand by their fingerprints: one that changes may move the others to other places."""
    parts = {"a": (shape_shards / "train", 0.5), "b": (shape_shards / "heldout", 0.3)}
    parts["c"] = (shape_shards / "train/00001.tar", 0.2)
    for name, (spec, _) in parts.items():
        reshard(spec, tmp_path / name, per_shard=12)
    sources = {str(tmp_path / name): weight for name, (_, weight) in parts.items()}
    fields = {"train": None, "sources": sources, "heldout": None}
    train_recipe(changed(tiny_recipe, tmp_path, "--max-steps", "2", **fields), tmp_path / "run", ALONE)
    recipe = changed(tiny_recipe, tmp_path, "--max-steps", "4", **fields)
    places = []
    for per_shard in (5, 6, 7, 8, 9):
        shutil.rmtree(tmp_path / "a")
        reshard(parts["a"][0], tmp_path / "a", per_shard=per_shard)
        with pytest.raises(ClipkitError, match="the data is not what the run started with") as caught:
            train_recipe(recipe, tmp_path / "run", ALONE, resume=True)
        words = caught.value.message.partition("started with: ")[2]
        assert f"{tmp_path / 'a'}: 000" in words
        assert f"{tmp_path / 'b'}:" not in words
        assert f"{tmp_path / 'c'}:" not in words
        model = build_model(recipe.model, seed=0)
        places.append([data.name for data in TrainingData(recipe, model, ALONE).datasets])
    assert any(names != places[0] for names in places), "a stood at another place at least once"


def test_other_contents_of_the_same_size_are_refused(
    tiny_recipe: Path, shape_shards: Path, tmp_path: Path
) -> None:
    shards, run = shutil.copytree(shape_shards / "train", tmp_path / "shards"), tmp_path / "run"
    index_shards(shards)
    train_recipe(changed(tiny_recipe, tmp_path, "--max-steps", "2", train=str(shards)), run, ALONE)
    data = bytearray((shards / "00001.tar").read_bytes())
    for sample in scan_shard(shards / "00001.tar").samples:
        start, size = sample.members["txt"]
        data[start : start + size] = data[start : start + size][::-1]
    (shards / "00001.tar").write_bytes(data)
    index_shards(shards)
    recipe = changed(tiny_recipe, tmp_path, "--max-steps", "4", train=str(shards))
    with pytest.raises(ClipkitError, match=r"shards: 00001\.tar: contents changed \("):
        train_recipe(recipe, run, ALONE, resume=True)
    described = json.loads((run / "data.json").read_text())
    for shard in described["sources"][0]["shards"]:
        del shard["contents"]  # as runs have it that began without index files
    (run / "data.json").write_text(json.dumps(described))
    assert train_recipe(recipe, run, ALONE, resume=True)["steps"] == 4


def test_a_cache_that_is_too_small_for_the_order_is_named_once(
    tiny_recipe: Path,
    shape_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory, root = fsspec.filesystem("memory"), f"memory://{uuid4().hex}"
    reshard(shape_shards / "train", tmp_path / "twelve", per_shard=6)
    for path in (tmp_path / "twelve").iterdir():
        memory.pipe_file(f"{root}/{path.name}", path.read_bytes())
    size = sum(path.stat().st_size for path in (tmp_path / "twelve").glob("*.tar"))
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))

    def said(limit: int | None, **data: int) -> str:
        monkeypatch.setenv("CLIPKIT_CACHE_BYTES", str(limit or ""))
        caplog.clear()
        recipe = changed(tiny_recipe, tmp_path, train=root, **data)
        TrainingData(recipe, build_model(recipe.model, seed=0), ALONE)
        assert len(caplog.records) < 2
        return caplog.text

    assert "they will be fetched again and again; raise CLIPKIT_CACHE_BYTES" in said(size * 9 // 12)
    assert "(data.lanes: 2, data.window: 6)" in caplog.text
    assert not said(size * 9 // 12, lanes=2, window=6)
    assert "raise CLIPKIT_CACHE_BYTES" in said(size * 9 // 12, lanes=5, window=6)
    assert said(size * 2 // 12).rstrip().endswith("raise CLIPKIT_CACHE_BYTES"), "two shards are too few"
    assert not said(size)
    assert not said(None)


def test_ranks_that_torchrun_starts_again_go_on(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(tiny_recipe), "--run", str(tmp_path / "run"), "--json"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main([*words, "--max-steps", "4"]) == 0, "nothing was there to go on from"
    assert main([*words, "--max-steps", "6"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 6
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert main([*words, "--max-steps", "8"]) == 1


def test_a_recipe_has_one_kind_of_source(tiny_recipe: Path, tmp_path: Path) -> None:
    for wrong in ({"sources": {"a": 1}}, {"train": None}):
        with pytest.raises(ConfigError, match="train, or sources"):
            changed(tiny_recipe, tmp_path, **wrong)
    with pytest.raises(ConfigError, match=r"data\.sources"):
        changed(tiny_recipe, tmp_path, train=None, sources={"a": 0})


def test_lines_of_text_are_no_pictures(tiny_recipe: Path, tmp_path: Path) -> None:
    lines = tmp_path / "photos.jsonl"
    lines.write_text('{"path": "a.png", "caption": "a cat"}\n' * 50)
    with pytest.raises(InputError, match=r"photos\.jsonl holds lines of text, .*clipkit shards pack"):
        train_recipe(changed(tiny_recipe, tmp_path, train=str(lines)), tmp_path / "run", ALONE)


def test_pictures_are_augmented_alike_in_workers_and_on_the_device(tiny_recipe: Path, tmp_path: Path) -> None:
    augment = {"rotate": 10, "brightness": 0.2, "blur": 0.5}
    runs = []
    for where in ("workers", "device"):
        recipe = changed(tiny_recipe, tmp_path, "--max-steps", "4", augment=augment, augment_on=where)
        train_recipe(recipe, tmp_path / where, ALONE)
        runs.append(tmp_path / where)
    assert [row["samples"] for row in rows(runs[0])] == [row["samples"] for row in rows(runs[1])]
    first, second = map(weights, runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["stream:{}/{{00000..00001}}.tar", "pipe:cat {}/{{00000..00001}}.tar"])
def test_a_stream_trains_and_promises_nothing(
    kind: str, tiny_recipe: Path, shape_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = kind.format(shape_shards / "train")
    recipe = changed(tiny_recipe, tmp_path, "--max-steps", "20", train=train)
    run = tmp_path / "run"
    train_recipe(recipe, run, ALONE)
    losses = [row["loss"] for row in rows(run)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert "no promised order" in caplog.text
    assert json.loads((run / "data.json").read_text())["stream"] == train
    longer = changed(tiny_recipe, tmp_path, "--max-steps", "22", train=train)
    assert train_recipe(longer, run, ALONE, resume=True)["steps"] == 22
    with pytest.raises(ConfigError, match="a stream has no epochs"):
        train_recipe(changed(tiny_recipe, tmp_path, "--max-epochs", "1", train=train), tmp_path / "b", ALONE)
