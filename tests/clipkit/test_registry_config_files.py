"""The lowest layer: errors, named choices, configuration, files that are whole or not there."""

import json
import os
import stat
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from pydantic import Field

from clipkit import errors, files, registry
from clipkit.config import Config, dump_yaml, load_yaml, validate
from clipkit.errors import ArtifactError, ClipkitError, ConfigError, ImageError, InputError, NotFoundError
from clipkit.files import (
    MANIFEST,
    atomic_folder,
    atomic_write,
    read_manifest,
    sha256_file,
    write_manifest,
)
from clipkit.registry import Registry, Spec


class Inner(Config):
    """Part of a recipe."""

    rate: float = Field(default=0.1, gt=0)


class Recipe(Config):
    """A recipe."""

    steps: int
    inner: Inner = Inner()
    names: tuple[str, ...] = ()


OUTSIDE = Spec("outside", Inner, lambda config: config.rate)


def test_every_error_is_a_clipkit_error_with_an_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 10
    assert all(issubclass(kind, ClipkitError) for kind in kinds)
    assert [kind.exit_code for kind in (ConfigError, InputError, ImageError, NotFoundError)] == [2] * 4
    assert ArtifactError.exit_code == 1


def test_messages_carry_their_hint() -> None:
    assert str(ClipkitError("wrong", hint="do this")) == "wrong (do this)"
    assert str(ClipkitError("wrong")) == "wrong"
    error = ImageError("bad", "undecodable")
    assert (error.reason, error.message, error.hint) == ("undecodable", "bad", None)


def test_registry_finds_and_lists() -> None:
    table = Registry("fruit", (Spec("apple", Inner, list), Spec("pear", Inner, dict)), group="clipkit.none")
    assert table.names() == ["apple", "pear"]
    assert table.get("pear").build is dict
    with pytest.raises(NotFoundError, match=r"unknown fruit 'plum' \(known: apple, pear\)"):
        table.get("plum")


def test_registry_takes_entry_points_and_refuses_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("outside", f"{__name__}:OUTSIDE", "clipkit.fruits")
    monkeypatch.setattr(EntryPoint, "load", lambda self: OUTSIDE)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "clipkit.fruits" else [])
    assert Registry("fruit", (Spec("apple", Inner, list),), group="clipkit.fruits").names() == [
        "apple",
        "outside",
    ]
    assert Registry("fruit", (), group="clipkit.trees").names() == []
    with pytest.raises(ConfigError, match="the fruit 'outside' is defined twice"):
        Registry("fruit", (OUTSIDE,), group="clipkit.fruits").names()


def test_validate_names_the_field_and_counts_the_rest() -> None:
    assert validate(Recipe, {"steps": 3}, "r.yaml").inner.rate == 0.1
    with pytest.raises(ConfigError, match=r"^r\.yaml: stepz: unknown key$"):
        validate(Recipe, {"steps": 3, "stepz": 4}, "r.yaml")
    with pytest.raises(ConfigError, match=r"r\.yaml: inner\.rate: Input should be greater than 0"):
        validate(Recipe, {"steps": 3, "inner": {"rate": -1}}, "r.yaml")
    with pytest.raises(ConfigError, match=r"steps: Field required \(and 1 more\)"):
        validate(Recipe, {"names": 3}, "r.yaml")
    with pytest.raises(ConfigError, match="top level"):
        validate(Recipe, [1], "r.yaml")


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe(steps=1).steps = 2  # type: ignore[misc]


def test_yaml_round_trip_and_faults(tmp_path: Path) -> None:
    recipe = Recipe(steps=3, inner=Inner(rate=0.25), names=("红苹果", "b"))
    path = tmp_path / "r.yaml"
    path.write_text(dump_yaml(recipe), encoding="utf-8")
    assert validate(Recipe, load_yaml(path), "r") == recipe
    assert "红苹果" in path.read_text(encoding="utf-8")
    with pytest.raises(NotFoundError, match="no such file"):
        load_yaml(tmp_path / "none.yaml")
    path.write_text("a: 1\nb: [1, 2\n")
    with pytest.raises(ConfigError, match=r"r\.yaml line \d+: not YAML"):
        load_yaml(path)
    path.write_text("a: 1\nb:\n  c: 2\n  c: 3\n")
    with pytest.raises(ConfigError, match=r"r\.yaml line 4: .*'c' is there twice"):
        load_yaml(path)
    path.write_text("a: &one {x: 1, y: 2}\nb: {<<: *one, y: 3}\n")
    assert load_yaml(path)["b"] == {"x": 1, "y": 3}
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="found list"):
        load_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        load_yaml(path)
    path.write_text("a: !!python/object/apply:os.system [echo]\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_yaml(path)


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    atomic_write(path, "old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


def test_atomic_write_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_atomic_folder_appears_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    with pytest.raises(ArtifactError, match="already exists"), atomic_folder(target):
        pass
    with pytest.raises(FileNotFoundError), atomic_folder(target, overwrite=True) as folder:
        (folder / "b.txt").rename(folder / "c.txt")
    assert os.listdir(target) == ["a.txt"]
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "c.txt").write_text("c")
    assert os.listdir(target) == ["c.txt"]
    assert os.listdir(tmp_path) == ["out"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_atomic_folder_takes_an_empty_folder_but_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    assert os.listdir(tmp_path / "empty") == ["a"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="already exists"), atomic_folder(tmp_path / "file"):
        pass


def test_manifest_round_trip(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.bin").write_bytes(b"abc")
    written = write_manifest(tmp_path, "thing", rows=3)
    assert written["files"] == {"deep/a.bin": sha256_file(tmp_path / "deep/a.bin")}
    assert read_manifest(tmp_path, "thing") == written
    assert (written["kind"], written["format"], written["rows"]) == ("thing", 1, 3)


def test_manifest_faults(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        read_manifest(tmp_path / "none", "thing")
    with pytest.raises(ArtifactError, match="no thing folder"):
        read_manifest(tmp_path, "thing")
    (tmp_path / "a.bin").write_bytes(b"abc")
    write_manifest(tmp_path, "thing")
    with pytest.raises(ArtifactError, match="of kind 'thing', not 'other'"):
        read_manifest(tmp_path, "other")
    (tmp_path / "a.bin").write_bytes(b"abd")
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        read_manifest(tmp_path, "thing")
    assert read_manifest(tmp_path, "thing", verify=False)["kind"] == "thing"
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ArtifactError, match=r"a\.bin is missing"):
        read_manifest(tmp_path, "thing")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"kind": "thing"}', "null"])
def test_a_damaged_manifest_is_an_artifact_error(content: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match="not a clipkit manifest"):
        read_manifest(tmp_path, "thing")


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, "thing")
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ArtifactError, match="upgrade clipkit"):
        read_manifest(tmp_path, "thing")
