"""`clipkit classify`: scores of labels, label files, templates, and one bad file among good ones."""

from pathlib import Path

import pytest


def test_scores(world, clipkit) -> None:
    files = world.pictures[:3]
    done = clipkit("classify", world.model, *files, "--labels", "cat, dog,a bird", "--json")
    assert (done.code, done.err) == (0, "")
    assert [result["file"] for result in done.json] == [str(file) for file in files]
    for result in done.json:
        scores = result["scores"]
        assert {score["label"] for score in scores} == {"cat", "dog", "a bird"}
        assert all(set(score) == {"label", "score", "similarity"} for score in scores)
        assert sum(score["score"] for score in scores) == pytest.approx(1)
        assert [score["score"] for score in scores] == sorted((s["score"] for s in scores), reverse=True)


def test_a_label_file_top_k_and_templates(world, clipkit, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\ufeffcat\n\nbirds, small\n 狗 \r\n", encoding="utf-8")
    arguments = ["classify", world.model, world.pictures[0], "--labels", f"@{labels}", "--json"]
    first = clipkit(*arguments, "--top-k", 2).json[0]["scores"]
    everything = clipkit(*arguments).json[0]["scores"]
    assert {score["label"] for score in everything} == {"cat", "birds, small", "狗"}
    assert first == everything[:2]
    templates = clipkit(*arguments, "--template", "{}", "--template", "a drawing of {}").json[0]["scores"]
    assert templates != everything


def test_a_bad_file_does_not_hide_the_others(world, clipkit, tmp_path: Path) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(world.pictures[0].read_bytes()[:200])
    files = [world.pictures[0], torn, tmp_path / "nowhere.png", world.pictures[1]]
    done = clipkit("classify", world.model, *files, "--labels", "cat,dog", "--json")
    assert done.code == 1
    assert [result["file"] for result in done.json] == [str(files[0]), str(files[3])]
    errors = done.err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("clipkit: error: ") for line in errors)
    assert str(torn) in errors[0]
    assert f"no such file: {files[2]}" in errors[1]


def test_only_bad_files(world, clipkit, tmp_path: Path) -> None:
    done = clipkit("classify", world.model, tmp_path / "a.png", "--labels", "cat,dog", "--json")
    assert (done.code, done.json) == (1, [])


def test_table(world, clipkit) -> None:
    lines = clipkit("classify", world.model, world.pictures[0], "--labels", "cat,dog").out.splitlines()
    assert lines[0].split() == ["file", "label", "score", "similarity"]
    assert len(lines) >= 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{model}", "{picture}", "--labels", ""], 2, "there are no labels"),
        (["{model}", "{picture}", "--labels", "cat,,dog"], 2, "label 2 of 3 is empty"),
        (["{model}", "{picture}", "--labels", "@nowhere.txt"], 2, "label file nowhere.txt cannot be read"),
        (["{model}", "{picture}", "--labels", "@{picture}"], 2, "is not UTF-8 text"),
        (["{model}", "{picture}", "--labels", "a,b", "--top-k", "0"], 2, "--top-k is 0"),
        (["{model}", "{picture}", "--labels", "a,b", "--template", "none"], 2, "{}"),
        (["{model}", "{picture}", "--labels", "a," * 1000 + "b"], 2, "1000"),
        (["nowhere", "{picture}", "--labels", "a,b"], 2, "nowhere"),
        (["{embeddings}", "{picture}", "--labels", "a,b"], 1, "is of kind 'embeddings', not 'model'"),
    ],
)
def test_errors(world, clipkit, arguments, code, message) -> None:
    names = {"model": world.model, "picture": world.pictures[0], "embeddings": world.embeddings}
    filled = [a if a == "none" else a.format(**names) for a in arguments]
    done = clipkit("classify", *filled)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("clipkit: error: ")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_wrong_usage(world, clipkit) -> None:
    for arguments in ([world.model, "--labels", "a"], [world.model, world.pictures[0]]):
        done = clipkit("classify", *arguments)
        assert done.code == 2
        assert "Traceback" not in done.err
