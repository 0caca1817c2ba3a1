"""The names that others build on exist, and only those are public."""

import inspect
from importlib import import_module
from importlib.metadata import entry_points

import pytest

import clipkit
from clipkit.cli import GROUP, Command

LOSSES = [
    "alignment_loss",
    "clip_loss",
    "contrast",
    "info_nce_loss",
    "logistic_loss",
    "mutual_information_bound",
    "nce_loss",
    "nt_xent_loss",
    "pair_loss",
    "siglip_loss",
    "sup_con_loss",
    "triplet_loss",
]


def test_top_level() -> None:
    assert sorted(clipkit.__all__) == [
        "ClipkitError",
        "Embedder",
        "Index",
        "ZeroShotClassifier",
        "load_model",
    ]
    for name in clipkit.__all__:
        assert getattr(clipkit, name).__name__ == name
        assert name in dir(clipkit)
    with pytest.raises(AttributeError, match="no attribute 'Indexx'"):
        clipkit.Indexx  # noqa: B018


def test_losses() -> None:
    losses = import_module("clipkit.losses")
    for name in LOSSES:
        assert callable(getattr(losses, name))
        assert inspect.getdoc(getattr(losses, name))
    similarity = import_module("clipkit.losses.similarity")
    for name in ("inner_product", "cosine", "euclidean"):
        assert callable(getattr(similarity, name))


def test_index_and_errors_are_documented() -> None:
    for name in (
        "open",
        "search",
        "add",
        "delete",
        "items",
        "thumbnail",
        "vectors",
        "check_model",
        "refresh",
    ):
        assert inspect.getdoc(getattr(clipkit.Index, name))


@pytest.mark.parametrize("point", entry_points(group=GROUP), ids=lambda point: point.name)
def test_commands(point) -> None:
    command = point.load()
    assert isinstance(command, Command)
    assert command.help
    assert (command.run is None) == bool(command.subcommands)
