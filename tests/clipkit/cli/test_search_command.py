"""`clipkit search`: by words, by picture, as JSON and as a table, and what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from clipkit.index import Index
from clipkit.models import load_model


def test_a_picture_finds_itself(world, clipkit) -> None:
    done = clipkit("search", world.index, "--image", world.pictures[7], "-k", "3", "--json")
    assert (done.code, done.err) == (0, "")
    results = done.json
    assert [result["rank"] for result in results] == [1, 2, 3]
    assert set(results[0]) == {"rank", "id", "similarity", "metadata"}
    assert results[0]["id"] == 7
    assert results[0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert results[0]["metadata"]["name"] == "picture number 7"
    assert results[0]["similarity"] >= results[1]["similarity"] >= results[2]["similarity"]


def test_words(world, clipkit) -> None:
    results = clipkit("search", world.index, "a red balloon", "--json").json
    model = load_model(str(world.model))
    with torch.inference_mode():
        text_D = model.encode_text(model.tokenize(["a red balloon"])).numpy()[0]
    exact = Index.open(world.index).vectors(range(12)) @ text_D
    assert [result["id"] for result in results] == np.argsort(-exact)[:10].tolist()
    assert [r["similarity"] for r in results] == pytest.approx(np.sort(exact)[::-1][:10].tolist(), abs=1e-5)


def test_more_results_than_items(world, clipkit) -> None:
    assert len(clipkit("search", world.index, "x", "-k", "1000", "--json").json) == 12


def test_table(world, clipkit) -> None:
    done = clipkit("search", world.index, "--image", world.pictures[2], "-k", "2")
    lines = done.out.splitlines()
    assert lines[0].split() == ["rank", "id", "similarity", "item"]
    assert lines[1].split()[:2] == ["1", "2"]
    assert lines[1].rstrip().endswith("picture number 2")


def test_a_model_that_moved_with_its_index(
    world,
    clipkit,
    tmp_path: Path,
    write_embeddings,
    small_models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The name in the manifest is stale, but the folder of that name beside the index is the model."""
    from clipkit.index import build_index

    moved = tmp_path / "moved"
    shutil.copytree(world.model, moved / "model")
    described = {"fingerprint": load_model(str(world.model)).fingerprint, "name": "demo/model"}
    vectors = Index.open(world.index).vectors(range(12))
    index = build_index(write_embeddings(tmp_path / "e2", vectors, model=described), moved / "index")
    monkeypatch.chdir(tmp_path)
    assert clipkit("search", index, "x", "--json").code == 0
    shutil.copytree(small_models[1], tmp_path / "demo/model")
    assert clipkit("search", index, "x", "--json").code == 0, "another model now has the old name"
    shutil.rmtree(tmp_path / "demo")
    (moved / "model").rename(moved / "elsewhere")
    lost = clipkit("search", index, "x", "--json")
    assert lost.code == 2
    assert "demo/model" in lost.err
    assert clipkit("search", index, "x", "--json", "--model", moved / "elsewhere").code == 0


def test_another_model_is_refused(world, clipkit, small_models: tuple[Path, Path]) -> None:
    done = clipkit("search", world.index, "x", "--model", small_models[1], "--json")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"clipkit: error: the index {world.index} was made with {world.model}")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{index}"], 2, "give a text or --image FILE"),
        (["{index}", "x", "--image", "y"], 2, "give a text or --image FILE"),
        (["{index}", "  "], 2, "the text is empty"),
        (["{index}", "x", "-k", "0"], 2, "k is 0 (ask for 1 to 1000 results)"),
        (["{index}", "x", "-k", "1001"], 2, "k is 1001"),
        (["nowhere", "x"], 2, "no such index: nowhere"),
        (["{embeddings}", "x"], 1, "artifact of another kind"),
        (["{index}", "--image", "nowhere.png"], 2, "no such file: nowhere.png"),
        (["{index}", "--image", "{index}/CURRENT"], 2, "CURRENT is no picture"),
        (["{index}", "x", "--model", "nowhere"], 2, "nowhere"),
    ],
)
def test_errors(world, clipkit, arguments, code, message) -> None:
    done = clipkit("search", *(a.format(index=world.index, embeddings=world.embeddings) for a in arguments))
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("clipkit: error: ")
    assert message in done.err
    assert done.err.count("\n") == 1
