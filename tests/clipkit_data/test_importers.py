"""Importing known data sets: files in their exact formats, as torchvision reads them, and hostile ones."""

import hashlib
import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder

from clipkit.cli import main
from clipkit.errors import ArtifactError, ConfigError, DataError, InputError, NotFoundError
from clipkit_data.dataset import ShardDataset
from clipkit_data.records import Record
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.cifar import LAYOUTS, read_cifar
from clipkit_data.tools.importers import import_dataset

NAMES = {"cifar10": [f"thing {number}" for number in range(10)], "cifar100": [f"t{n}" for n in range(100)]}
COARSE = [f"kind {number}" for number in range(20)]
PER_FILE = 4


def python2(value: Any) -> bytes:
    """A value in the opcodes that Python 2's cPickle writes with protocol 2, without memo."""
    match value:
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case bytes():
            short = len(value) < 256
            return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value
        case list():
            return b"](" + b"".join(map(python2, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(python2, value)) + b"t"
        case dict():
            return b"}(" + b"".join(python2(k) + python2(v) for k, v in value.items()) + b"u"
        case np.ndarray():
            start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + python2((0,)) + b"U\x01btR"
            kind = (
                b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            )
            state = b"(K\x01" + python2(value.shape) + kind + b"\x89" + python2(value.tobytes()) + b"t"
            return start + state + b"b"
        case _:
            raise TypeError(type(value))


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + python2(value) + b"."


def draws(kind: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Labels (N, L) and pixels (N, 3072) of each file."""
    random, layout = np.random.default_rng(0), LAYOUTS[kind]
    most = [20, 100] if kind == "cifar100" else [10]
    files = [name for names in layout.splits.values() for name in names]
    return {
        name: (
            np.stack([random.integers(0, high, PER_FILE) for high in most], axis=1),
            random.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8),
        )
        for name in files
    }


def write_cifar(kind: str, root: Path, *, binary: bool) -> Path:
    """A small data set in the layout of the archive, below `root`."""
    layout = LAYOUTS[kind]
    folder = root / layout.folders[binary]
    folder.mkdir(parents=True)
    names = [COARSE, NAMES[kind]] if kind == "cifar100" else [NAMES[kind]]
    for name, (labels_NL, pixels_NP) in draws(kind).items():
        if binary:
            rows = np.concatenate([labels_NL.astype(np.uint8), pixels_NP], axis=1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            fields = zip(layout.labels, labels_NL.T.tolist(), strict=True)
            content = {b"batch_label": b"a batch", **{label.field.encode(): n for label, n in fields}}
            (folder / name).write_bytes(pickled(content | {b"data": pixels_NP}))
    if binary:
        for label, words in zip(layout.labels, names, strict=True):
            (folder / label.file).write_text("\n".join(words) + "\n\n")
    else:
        meta = {
            label.names.encode(): [w.encode() for w in ws]
            for label, ws in zip(layout.labels, names, strict=True)
        }
        (folder / layout.meta).write_bytes(pickled({b"num_vis": 3072, **meta}))
    return folder


def read(folder: Path) -> list[Record]:
    dataset = ShardDataset(resolve_shards(folder))
    assert dataset.faults == []
    records = [dataset[position] for position in range(len(dataset))]
    dataset.close()
    return records


def pixels(record: Record) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record.image)))


def checksums(owner: type, attribute: str, folder: Path) -> list[list[str]]:
    """torchvision's list of files with the checksums of these small ones."""
    digest = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    return [[name, digest[name]] for name, _ in getattr(owner, attribute) if name in digest]


@pytest.mark.parametrize(("kind", "reference"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
@pytest.mark.parametrize("binary", [False, True])
def test_cifar_is_read_as_torchvision_reads_it(
    kind: str, reference: type[CIFAR10], binary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_cifar(kind, tmp_path / "python", binary=False)
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(reference, attribute, checksums(reference, attribute, folder))
    meta = dict(reference.meta)
    meta["md5"] = hashlib.md5((folder / meta["filename"]).read_bytes()).hexdigest()
    monkeypatch.setattr(reference, "meta", meta)
    source = write_cifar(kind, tmp_path / "binary", binary=True) if binary else folder.parent
    result = import_dataset(kind, source, tmp_path / "out", per_shard=7)
    assert result["samples"] == {"train": 20 if kind == "cifar10" else 4, "test": 4}
    for split in ("train", "test"):
        expected = reference(tmp_path / "python", train=split == "train")
        records = read(tmp_path / "out" / split)
        assert len(records) == len(expected)
        for place, record in enumerate(records):
            image, label = expected[place]
            assert np.array_equal(pixels(record), np.asarray(image))
            assert record.meta["cls"] == str(label)
            assert record.meta["label"] == expected.classes[label]


def test_cifar_100_also_says_the_coarse_label(tmp_path: Path) -> None:
    for binary in (False, True):
        folder = write_cifar("cifar100", tmp_path, binary=binary)
        import_dataset("cifar100", folder, tmp_path / f"out{binary}")
        labels_NL = draws("cifar100")["train"][0]
        found = [record.meta["coarse_label"] for record in read(tmp_path / f"out{binary}" / "train")]
        assert found == [COARSE[number] for number in labels_NL[:, 0]]


def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    folder = write_cifar("cifar10", tmp_path, binary=False)
    trap = tmp_path / "trap"
    (folder / "data_batch_2").write_bytes(b"cos\nsystem\n(V" + f"touch {trap}".encode() + b"\ntR.")
    with pytest.raises(DataError, match=r"data_batch_2 was not read: it names os\.system"):
        import_dataset("cifar10", folder, tmp_path / "out")
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads((folder / "data_batch_2").read_bytes())
    assert trap.exists(), "the trap works"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_an_error_for_people_or_changes_a_value(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_cifar("cifar10", tmp_path_factory.mktemp("cifar"), binary=False)
    path = folder / data.draw(st.sampled_from(["test_batch", "batches.meta"]))
    content = bytearray(path.read_bytes())
    head = min(len(content), 400) - 1  # opcodes, not pixels
    place = data.draw(st.integers(0, head) | st.integers(len(content) - 100, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    with suppress(DataError):
        assert len(list(read_cifar("cifar10", folder)["test"])) == PER_FILE


def test_cifar_files_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    folder, binary = (write_cifar("cifar10", tmp_path, binary=binary) for binary in (False, True))
    data = np.zeros((2, 3072), np.uint8)
    path = folder / "test_batch"
    for content, words in (
        ({b"data": data, b"labels": [1]}, "the labels do not fit 6144 bytes"),
        ({b"data": data, b"labels": [1, 10]}, r"row 1: label is 10, of 10"),
        ({b"data": data}, "not the fields data, labels"),
        ({b"data": [1], b"labels": [1]}, "not the fields data, labels"),
        ([1], "holds a list and no dictionary"),
    ):
        path.write_bytes(pickled(content))
        with pytest.raises(DataError, match=words) as caught:
            import_dataset("cifar10", folder, tmp_path / "out")
        assert "test_batch" in str(caught.value)
    path = binary / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test_batch.bin: 12291 bytes are no whole number of rows of 3073"):
        import_dataset("cifar10", binary, tmp_path / "out")
    path.unlink()
    with pytest.raises(NotFoundError, match=r"test_batch.bin is missing"):
        import_dataset("cifar10", binary, tmp_path / "out")
    with pytest.raises(NotFoundError, match=r"no cifar100 in .*: neither train nor train.bin is there"):
        import_dataset("cifar100", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def stl(tmp_path: Path) -> Path:
    """STL-10 with few pictures, in the layout of its archive."""
    folder, random = tmp_path / "stl10_binary", np.random.default_rng(1)
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(NAMES["cifar10"]) + "\n")
    for split, count in (("train", 5), ("test", 3), ("unlabeled", 4)):
        (folder / f"{split}_X.bin").write_bytes(random.bytes(count * 3 * 96 * 96))
        if split != "unlabeled":
            (folder / f"{split}_y.bin").write_bytes(bytes(random.integers(1, 11, count).tolist()))
    return folder


def test_stl_10_is_read_as_torchvision_reads_it(
    stl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(STL10, attribute, checksums(STL10, attribute, stl))
    result = import_dataset("stl10", stl.parent, tmp_path / "out", per_shard=3)
    assert result["samples"] == {"train": 5, "test": 3, "unlabeled": 4}
    for split in ("train", "test", "unlabeled"):
        expected = STL10(stl.parent, split=split)
        for place, record in enumerate(read(tmp_path / "out" / split)):
            image, label = expected[place]
            assert np.array_equal(pixels(record), np.asarray(image))
            if split == "unlabeled":
                assert not {"label", "cls"} & set(record.meta)
            else:
                assert record.meta["cls"] == str(label)
                assert record.meta["label"] == expected.classes[label]


def test_stl_10_files_that_do_not_fit_together_are_named(stl: Path, tmp_path: Path) -> None:
    labels = (stl / "test_y.bin").read_bytes()
    for content, words in ((labels[:2], "2 labels for 3 pictures"), (b"\1\0\1", "label 0 of 10 at 1")):
        (stl / "test_y.bin").write_bytes(content)
        with pytest.raises(DataError, match=f"test_y.bin: {words}"):
            import_dataset("stl10", stl, tmp_path / "out")
    os.truncate(stl / "train_X.bin", 3 * 96 * 96 * 5 - 7)
    with pytest.raises(DataError, match=r"train_X.bin: cut in picture 4: 27641 bytes of 27648"):
        import_dataset("stl10", stl, tmp_path / "out")
    (stl / "train_X.bin").unlink()
    with pytest.raises(NotFoundError, match=r"train_X.bin is missing"):
        import_dataset("stl10", stl, tmp_path / "out")


@pytest.fixture
def class_folders(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """Two splits of three classes, as ImageNet lies on a disk."""
    root = tmp_path / "images"
    for split, count in (("train", 4), ("val", 2)):
        for place, label in enumerate(("n02", "n01", "n03")):
            for number in range(count):
                path = root / split / label / f"{label}_{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(10 * place + number, kind="JPEG"))
    return root


def test_class_folders_are_numbered_as_torchvision_numbers_them(class_folders: Path, tmp_path: Path) -> None:
    result = import_dataset("imagenet", class_folders, tmp_path / "out", per_shard=5)
    assert result["samples"] == {"train": 12, "val": 6}
    for split in ("train", "val"):
        expected = ImageFolder(class_folders / split)
        numbers = {Path(path).name: number for path, number in expected.samples}
        records = read(tmp_path / "out" / split)
        assert len(records) == len(numbers)
        for record in records:
            path = class_folders / split / record.meta["file"]
            assert record.image == path.read_bytes()
            assert record.meta["cls"] == str(numbers[path.name])
            assert record.meta["label"] == path.parent.name
            assert record.extension == "jpg"
        assert [r.meta["label"] for r in records] != sorted(r.meta["label"] for r in records), "mixed"


def test_folders_of_classes_alone_are_one_split(class_folders: Path, tmp_path: Path) -> None:
    result = import_dataset("imagenet", class_folders / "val", tmp_path / "out")
    assert result["samples"] == {"all": 6}
    assert main(["shards", "check", str(tmp_path / "out" / "all")]) == 0


def test_what_is_no_picture_is_left_out_and_listed(
    class_folders: Path, tmp_path: Path, picture: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_folders / "train" / "n01"
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "words.jpeg").write_bytes(b"<html>not found</html>")
    (folder / "named_wrongly.JPEG").write_bytes(picture(7))
    (folder / ".hidden.jpg").write_bytes(b"")
    (folder / "notes.md").write_text("no picture")
    (folder / "below").mkdir()
    (folder / "below" / "deep.jpg").write_bytes(picture(8, kind="JPEG"))
    out = tmp_path / "out"
    assert main(["shards", "import", "imagenet", str(class_folders), str(out), "--json"]) == 0
    printed, said = capsys.readouterr()
    result = json.loads(printed)
    assert result["samples"] == {"train": 14, "val": 6}
    assert result["faults"] == {"picture empty": 1, "picture format": 1}
    assert "14 samples in train, 6 samples in val" in said
    listed = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    assert {Path(fault["key"]).name for fault in listed} == {"empty.jpg", "words.jpeg"}
    by_file = {record.meta["file"]: record for record in read(out / "train")}
    assert by_file["n01/named_wrongly.JPEG"].extension == "png"
    assert by_file["n01/below/deep.jpg"].meta["label"] == "n01"


def test_a_folder_laid_out_otherwise_is_refused(
    class_folders: Path, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    (class_folders / "val" / "flat.JPEG").write_bytes(picture(1, kind="JPEG"))
    with pytest.raises(InputError, match=r"val: flat.JPEG lies in no class folder"):
        import_dataset("imagenet", class_folders, tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        import_dataset("imagenet", tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "nothing" / "class").mkdir()
    with pytest.raises(DataError, match="the split 'all' has no usable picture"):
        import_dataset("imagenet", tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_said_before_anything_is_written(class_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data set named 'mnist'") as caught:
        import_dataset("mnist", class_folders, tmp_path / "out")
    assert caught.value.hint == "known: cifar10, cifar100, stl10, imagenet, tu"
    with pytest.raises(NotFoundError, match="no such folder"):
        import_dataset("stl10", tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="samples per shard must be at least 1"):
        import_dataset("imagenet", class_folders, tmp_path / "out", per_shard=0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtifactError, match="already exists"):
        import_dataset("imagenet", class_folders, class_folders)
