"""CIFAR-10 and CIFAR-100 as their authors publish them, in the Python and in the binary version.

The Python version is pickles, and a pickle may run anything. Here only the names that a numpy array is
written with are known, and what they stand for is a class of this file that keeps bytes: not even numpy is
called. Any other name is refused before it is looked up.

A picture is 3072 bytes: the red plane, the green and the blue, each 32 rows of 32 pixels. In the binary
version a row is the label (in CIFAR-100 the coarse one and the fine one), then the picture.

References: A. Krizhevsky 2009, "Learning multiple layers of features from tiny images"; the files are
described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import DataError, NotFoundError
from clipkit_data.tools.labelled import Labelled, png

PICTURE = 3 * 32 * 32
_AGAIN = "unpack the archive again"


@dataclass(frozen=True, slots=True)
class Label:
    """One label of a sample: its name in the `.json`, and where the data set has it.

    Args:
        name: In the `.json`.
        field: In the pickles of pictures.
        names: In the pickle of names.
        file: The names in the binary version.
    """

    name: str
    field: str
    names: str
    file: str


@dataclass(frozen=True, slots=True)
class Layout:
    """What one of the two data sets calls its files.

    Args:
        folders: What the archives unpack to: the Python version and the binary one.
        splits: The files of each split; `.bin` is added in the binary version.
        meta: The pickle of names.
        labels: In the order of the binary version; the last one is the class.
    """

    folders: tuple[str, str]
    splits: dict[str, tuple[str, ...]]
    meta: str
    labels: tuple[Label, ...]


LAYOUTS = {
    "cifar10": Layout(
        ("cifar-10-batches-py", "cifar-10-batches-bin"),
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        "batches.meta",
        (Label("label", "labels", "label_names", "batches.meta.txt"),),
    ),
    "cifar100": Layout(
        ("cifar-100-python", "cifar-100-binary"),
        {"train": ("train",), "test": ("test",)},
        "meta",
        (
            Label("coarse_label", "coarse_labels", "coarse_label_names", "coarse_label_names.txt"),
            Label("label", "fine_labels", "fine_label_names", "fine_label_names.txt"),
        ),
    ),
}


def read_cifar(kind: str, source: Path) -> dict[str, Iterator[Labelled]]:
    """The samples of each split, in the files' order.

    Args:
        kind: "cifar10" or "cifar100".
        source: The folder that an archive unpacks to, or the one around it.

    Raises:
        NotFoundError: The data set is not there.
        DataError: While samples are read: a file is damaged, or not what it should be.
    """
    layout = LAYOUTS[kind]
    first = layout.splits["train"][0]
    for folder in (source, *(source / name for name in layout.folders)):
        for ending in ("", ".bin"):
            if (folder / f"{first}{ending}").is_file():
                files = {
                    split: [folder / f"{name}{ending}" for name in names]
                    for split, names in layout.splits.items()
                }
                return {split: _samples(layout, folder, paths) for split, paths in files.items()}
    raise NotFoundError(
        f"no {kind} in {source}: neither {first} nor {first}.bin is there",
        hint=f"unpack the archive and give the folder {' or '.join(layout.folders)}",
    )


def _samples(layout: Layout, folder: Path, paths: list[Path]) -> Iterator[Labelled]:
    binary = paths[0].suffix == ".bin"
    names = [_names(folder, layout, label, binary) for label in layout.labels]
    for path in paths:
        labels_NL, pixels_NP = (_binary if binary else _pickled)(path, layout)
        for row, (labels_L, pixels_P) in enumerate(zip(labels_NL.tolist(), pixels_NP, strict=True)):
            for number, known, label in zip(labels_L, names, layout.labels, strict=True):
                if not 0 <= number < len(known):
                    raise DataError(f"{path}: row {row}: {label.name} is {number}, of {len(known)}")
            words = {
                label.name: known[number]
                for number, known, label in zip(labels_L, names, layout.labels, strict=True)
            }
            image = png(pixels_P.reshape(3, 32, 32).transpose(1, 2, 0))
            more = {"file": path.name, "row": row}
            yield Labelled(image, "png", words.pop("label"), labels_L[-1], {**words, **more})


def _names(folder: Path, layout: Layout, label: Label, binary: bool) -> list[str]:
    """The names of a label's numbers."""
    path = folder / (label.file if binary else layout.meta)
    if binary:
        names = [line.strip() for line in _bytes(path).decode("utf-8", "replace").splitlines()]
        return [name for name in names if name]
    names = _load(path).get(label.names.encode())
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{path}: no list of names under {label.names!r}", hint=_AGAIN)
    return [name.decode("utf-8", "replace") for name in names]


def _binary(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N, L) and pixels uint8 (N, 3072) of a file of the binary version."""
    data, columns = _bytes(path), len(layout.labels)
    if not data or len(data) % (columns + PICTURE):
        raise DataError(
            f"{path}: {len(data)} bytes are no whole number of rows of {columns + PICTURE}", hint=_AGAIN
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, columns + PICTURE)
    return rows[:, :columns], rows[:, columns:]


def _pickled(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N, L) and pixels uint8 (N, 3072) of a file of the Python version."""
    content = _load(path)
    pixels = content.get(b"data")
    fields = [content.get(label.field.encode()) for label in layout.labels]
    labels = [numbers for numbers in fields if isinstance(numbers, list)]
    if not isinstance(pixels, _Array) or len(labels) < len(fields):
        wanted = ", ".join(label.field for label in layout.labels)
        raise DataError(f"{path}: not the fields data, {wanted}", hint=_AGAIN)
    counts = {len(numbers) for numbers in labels} | {len(pixels.data) / PICTURE}
    if len(counts) != 1 or not all(type(number) is int for numbers in labels for number in numbers):
        raise DataError(f"{path}: the labels do not fit {len(pixels.data)} bytes of pixels", hint=_AGAIN)
    return np.array(labels).T, np.frombuffer(pixels.data, np.uint8).reshape(-1, PICTURE)


class _Array:
    """Stands for a numpy array in a pickle: keeps its bytes (the last of what numpy writes)."""

    data = b""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and state and isinstance(state[-1], bytes):
            self.data = state[-1]


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _Unpickler(pickle.Unpickler):
    """Knows the names that an array is written with, and stands `_Array` in for all of them."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _KNOWN:
            raise DataError(f"it names {module_name}.{global_name}, which no CIFAR file does")
        return _Array


def _load(path: Path) -> dict[bytes, Any]:
    """A pickle's dictionary. Raises: NotFoundError, DataError."""
    try:
        content = _Unpickler(BytesIO(_bytes(path)), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path} was not read: {error.message}", hint="get it from its authors") from error
    except Exception as error:  # a damaged pickle fails in many ways
        raise DataError(f"{path}: no sound pickle: {error}", hint=_AGAIN) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__} and no dictionary", hint=_AGAIN)
    return content


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise NotFoundError(f"{path} is missing", hint=_AGAIN)
    return path.read_bytes()
