"""Known data sets as shards: CIFAR-10, CIFAR-100, STL-10, and class folders as ImageNet has them.

`clipkit shards import KIND SOURCE OUT` reads the files as their authors publish them, once unpacked; nothing
is downloaded. Arrays become PNG, files keep their bytes. Each split is a folder of shards below OUT, under
the data set's own name for it.

References: A. Coates, H. Lee, A. Ng 2011, "An analysis of single-layer networks in unsupervised feature
learning" (STL-10, whose binary files are described at https://cs.stanford.edu/~acoates/stl10/).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.encoded import open_image
from clipkit.errors import ConfigError, DataError, ImageError, InputError, NotFoundError
from clipkit_data.loose import OTHER_PICTURES, PICTURE_SUFFIXES
from clipkit_data.records import SampleFault
from clipkit_data.shards.scan import picture_reason
from clipkit_data.tools.cifar import read_cifar
from clipkit_data.tools.labelled import PER_SHARD, Labelled, png, write_splits

Splits = Mapping[str, Iterable[Labelled | SampleFault]]
SPLITS = ("train", "val", "valid", "validation", "test")  # folders that are splits and not classes
ALL = "all"
_STL_SIDE = 96
_STL_PICTURE = 3 * _STL_SIDE * _STL_SIDE
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}


def import_dataset(
    kind: str,
    source: Path,
    out: Path,
    *,
    per_shard: int = PER_SHARD,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Write the shards of a known data set.

    Args:
        kind: One of `KINDS`.
        source: Its unpacked files.
        out: A new folder; it appears whole or not at all, with one folder per split.
        per_shard: Samples per shard.
        progress: Called with 1 after each sample.

    Returns:
        `{"samples": {split: count}, "faults": {reason: count}, "out": path}`.

    Raises:
        ConfigError: There is no such kind.
        NotFoundError: The data set's files are not in `source`.
        InputError: `source` is laid out otherwise.
        DataError: A file is damaged.
        ArtifactError: `out` holds something already.
    """
    if kind not in KINDS:
        raise ConfigError(f"no data set named {kind!r}", hint=f"known: {', '.join(KINDS)}, tu")
    if not source.is_dir():
        raise NotFoundError(f"no such folder: {source}", hint="unpack the archive and give its folder")
    return write_splits(KINDS[kind](source), out, per_shard=per_shard, progress=progress)


def read_stl10(source: Path) -> Splits:
    """STL-10's splits train, test and, where it is there, unlabeled; read picture by picture."""
    folder = source / "stl10_binary" if (source / "stl10_binary").is_dir() else source
    names = [line.strip() for line in _read(folder / "class_names.txt").decode().splitlines() if line.strip()]
    splits = {split: _stl_samples(folder, split, names) for split in ("train", "test")}
    if (folder / "unlabeled_X.bin").is_file():
        splits["unlabeled"] = _stl_samples(folder, "unlabeled", None)
    return splits


def _stl_samples(folder: Path, split: str, names: list[str] | None) -> Iterator[Labelled]:
    path = folder / f"{split}_X.bin"
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise NotFoundError(f"{path} is missing", hint="unpack stl10_binary.tar.gz again")
    count, left = divmod(size, _STL_PICTURE)
    if left:
        raise DataError(
            f"{path}: cut in picture {count}: {left} bytes of {_STL_PICTURE}", hint="unpack it again"
        )
    labels = b"" if names is None else _read(folder / f"{split}_y.bin")
    if names is not None and len(labels) != count:
        raise DataError(f"{folder / f'{split}_y.bin'}: {len(labels)} labels for {count} pictures")
    with path.open("rb") as file:
        for row in range(count):
            # Planes are stored column by column.
            pixels_3WH = np.frombuffer(file.read(_STL_PICTURE), np.uint8).reshape(3, _STL_SIDE, _STL_SIDE)
            image, more = png(pixels_3WH.transpose(2, 1, 0)), {"file": path.name, "row": row}
            if names is None:
                yield Labelled(image, "png", None, None, more)
                continue
            number = labels[row] - 1  # counted from 1
            if not 0 <= number < len(names):
                raise DataError(f"{folder / f'{split}_y.bin'}: label {labels[row]} of {len(names)} at {row}")
            yield Labelled(image, "png", names[number], number, more)


def read_class_folders(source: Path) -> Splits:
    """Pictures in `SPLIT/CLASS/…` as ImageNet has them, or in `CLASS/…`, which is one split named "all".

    A class's number is the place of its name among all names of all splits, sorted.

    Raises:
        InputError: There are no class folders, or pictures lie beside them.
    """
    roots = {name: source / name for name in SPLITS if (source / name).is_dir()} or {ALL: source}
    classes = {name: _class_folders(root) for name, root in roots.items()}
    numbers = {name: number for number, name in enumerate(sorted({n for c in classes.values() for n in c}))}
    return {split: _folder_samples(root, classes[split], numbers) for split, root in roots.items()}


def _class_folders(root: Path) -> list[str]:
    with os.scandir(root) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    loose = next((entry.name for entry in entries if entry.is_file() and _is_picture(entry.name)), None)
    classes = [entry.name for entry in entries if entry.is_dir()]
    if loose or not classes:
        words = f"{loose} lies in no class folder" if loose else "no class folders"
        raise InputError(f"{root}: {words}", hint="pictures lie in one folder per class: CLASS/picture.jpg")
    return classes


def _folder_samples(
    root: Path, classes: list[str], numbers: Mapping[str, int]
) -> Iterator[Labelled | SampleFault]:
    """The pictures of a split, the classes mixed: in the order of their paths' SHA-256."""
    paths = sorted(
        (path for name in classes for path in _pictures(root, name)),
        key=lambda path: hashlib.sha256(os.fsencode(path)).digest(),
    )
    for place, name in enumerate(paths):
        label, path = name.split("/", 1)[0], root / name
        try:
            name.encode()
            data = path.read_bytes()
            image = open_image(data, name=str(path))
        except ImageError as error:
            yield SampleFault(place, str(path), picture_reason(error), error.message)
        except UnicodeEncodeError:  # a name in another encoding
            yield SampleFault(place, repr(name), "text is not Unicode", f"{path!r}: no Unicode name")
        except OSError as error:
            yield SampleFault(place, str(path), "unreadable file", f"{path}: {error.strerror or error}")
        else:
            more = {"file": name, "width": image.width, "height": image.height}
            yield Labelled(data, _EXTENSIONS[image.format or ""], label, numbers[label], more)


def _pictures(root: Path, label: str) -> Iterator[str]:
    """The pictures below a class folder, as paths below `root`; hidden ones are passed over."""
    for folder, inside, files in os.walk(root / label, followlinks=True):
        inside[:] = [name for name in inside if not name.startswith(".")]
        below = Path(folder).relative_to(root).as_posix()
        yield from (f"{below}/{name}" for name in files if _is_picture(name) and not name.startswith("."))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES + OTHER_PICTURES)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise NotFoundError(f"{path} is missing", hint="unpack the archive again and give its folder")
    return path.read_bytes()


KINDS: dict[str, Callable[[Path], Splits]] = {
    "cifar10": partial(read_cifar, "cifar10"),
    "cifar100": partial(read_cifar, "cifar100"),
    "stl10": read_stl10,
    "imagenet": read_class_folders,
}
