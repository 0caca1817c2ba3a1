"""`clipkit index build` and `clipkit index info`."""

from pathlib import Path

import pytest

from clipkit.index import Index


def test_build_and_info(world, clipkit, tmp_path: Path) -> None:
    built = clipkit("index", "build", world.embeddings, tmp_path / "new", "--json")
    assert (built.code, built.err) == (0, "")
    assert len(Index.open(tmp_path / "new")) == 12
    info = clipkit("index", "info", tmp_path / "new", "--json")
    assert info.json == built.json
    report = info.json
    assert (report["rows"], report["dim"], report["metric"], report["engine"]) == (
        12,
        8,
        "inner_product",
        "flat",
    )
    assert report["model"]["name"] == str(world.model)
    assert (report["snapshot"], report["parent"]) == ("000001", None)
    assert report["bytes"] > 1000


def test_info_as_a_table(world, clipkit) -> None:
    done = clipkit("index", "info", world.index)
    assert done.code == 0
    lines = {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if line.split()[1:]}
    assert lines["rows"] == ["12"]
    assert lines["snapshot"] == ["000001"]
    assert "model scoring" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "nowhere", "out"], 2, "no such folder: nowhere"),
        (["build", "{model}", "out"], 1, "is of kind 'model', not 'embeddings'"),
        (["build", "{embeddings}", "{embeddings}"], 1, "holds other things than an index"),
        (["build", "{embeddings}", "out", "--engine", "x"], 2, "unknown index engine 'x' (known: flat)"),
        (["info", "nowhere"], 2, "no such index: nowhere"),
        (["info", "{embeddings}"], 1, "an artifact of another kind"),
    ],
)
def test_errors(world, clipkit, tmp_path, monkeypatch, arguments, code, message) -> None:
    monkeypatch.chdir(tmp_path)
    done = clipkit("index", *(a.format(model=world.model, embeddings=world.embeddings) for a in arguments))
    assert done.code == code
    assert done.err.startswith("clipkit: error: ")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_info_of_a_damaged_index(world, clipkit) -> None:
    file = world.index / "snapshots/000001/image.index"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    done = clipkit("index", "info", world.index, "--json")
    assert (done.code, done.out) == (1, "")
    assert "SHA-256 differs" in done.err
