"""The walk's artifacts and commands, and the service over HTTP."""

import base64
import json
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.e2e.support import Walk, clipkit


def test_each_step_said_what_it_made(walk: Walk) -> None:
    printed = walk.printed
    assert printed["pack"]["samples"] == 600
    assert printed["pack"]["shards"] == 3
    assert printed["check"] == [] or printed["check"].get("faults") == []
    assert printed["train"]["steps"] > 5
    assert printed["embed"]["rows"] == 600
    assert printed["info"]["rows"] == 600


def test_half_a_minute_of_training_learns(walk: Walk) -> None:
    figures = walk.printed["evaluate"]
    assert "heldout" not in figures, "the model has seen these shards"
    trained, untrained = figures["seen"], figures["untrained"]["seen"]
    assert trained["gallery"] == 600
    assert trained["text_to_image"]["recall@10"] > 0.1, "chance is 0.017"
    assert trained["text_to_image"]["recall@10"] > 3 * untrained["text_to_image"]["recall@10"]


def test_the_embeddings_folder_is_clip_retrievals(walk: Walk) -> None:
    image = np.load(walk.embeddings / "img_emb/img_emb_0.npy")
    text = np.load(walk.embeddings / "text_emb/text_emb_0.npy")
    table = pq.read_table(walk.embeddings / "metadata/metadata_0.parquet")
    assert image.dtype == text.dtype == np.float16
    assert image.shape == text.shape == (600, 256)
    assert np.linalg.norm(image.astype(np.float32), axis=1) == pytest.approx(1, abs=2e-3)
    assert table.column_names[:2] == ["image_path", "caption"]
    assert table.column("id").to_pylist() == list(range(600))


def test_search_by_words_and_by_picture(walk: Walk) -> None:
    found = json.loads(clipkit("search", "index", "a smiling cat", "-k", 5, "--json", cwd=walk.root).stdout)
    assert [hit["rank"] for hit in found] == [1, 2, 3, 4, 5]
    assert set(found[0]) == {"rank", "id", "similarity", "metadata"}
    similarities = [hit["similarity"] for hit in found]
    assert similarities == sorted(similarities, reverse=True)
    picture = walk.pictures / "0007.webp"
    found = json.loads(
        clipkit("search", "index", "--image", picture, "-k", 1, "--json", cwd=walk.root).stdout
    )
    assert found[0]["id"] == 7
    assert found[0]["similarity"] == pytest.approx(1, abs=2e-3)


def test_classify(walk: Walk) -> None:
    labels = "--labels", "flag,face,hand"
    done = clipkit("classify", "run/model", walk.pictures / "0001.webp", *labels, "--json", cwd=walk.root)
    scores = json.loads(done.stdout)[0]["scores"]
    assert {entry["label"] for entry in scores} == {"flag", "face", "hand"}
    assert sum(entry["score"] for entry in scores) == pytest.approx(1, abs=1e-6)


def test_http(walk: Walk, server_url: str) -> None:
    captions = [json.loads(line) for line in (walk.root / "own/captions.jsonl").read_text().splitlines()]
    picture = (walk.pictures / "0042.webp").read_bytes()
    with httpx.Client(base_url=server_url, timeout=30) as client:
        answer = client.post("/v1/search", json={"query": {"text": captions[42]["caption"]}, "k": 10})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == 10
        similar = client.post("/v1/search/image", files={"file": picture}, data={"k": "3"}).json()["data"]
        assert similar[0]["id"] == 42
        assert similar[0]["metadata"]["name_zh"] == captions[42]["name_zh"]
        thumbnail = client.get(similar[0]["image_url"])
        assert thumbnail.headers["content-type"].startswith("image/")
        rows = client.post(
            "/v1/classify", files={"file": picture}, data={"labels": ["flag", "face", "hand"]}
        ).json()["data"][0]
        assert sum(row["score"] for row in rows) == pytest.approx(1, abs=1e-6)
        uri = f"data:image/webp;base64,{base64.b64encode(picture).decode()}"
        body = {"model": "default", "input": [{"image": uri}, {"text": "a cat"}]}
        embeddings = client.post("/v1/embeddings", json=body).json()["data"]
        stored = np.load(walk.embeddings / "img_emb/img_emb_0.npy")[42].astype(np.float32)
        assert np.dot(embeddings[0]["embedding"], stored) == pytest.approx(1, abs=2e-3)
        by_vector = client.post(
            "/v1/search", json={"query": {"vector": embeddings[0]["embedding"]}, "k": 1}
        ).json()["data"]
        assert by_vector[0]["id"] == 42
        assert "clipkit_requests_total" in client.get("/metrics").text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("search", "index", "cat", "-k", "0"), 2, "k"),
        (("search", "nowhere", "cat"), 2, "nowhere"),
        (("classify", "run/model", "own/captions.jsonl", "--labels", "a,b"), 1, "captions.jsonl"),
        (("classify", "run/model", "missing.png", "--labels", "a,b"), 1, "missing.png"),
        (("classify", "run/model", "own/pictures/0000.webp", "--labels", ""), 2, "label"),
        (("embed", "nowhere", "shards", "elsewhere"), 2, "nowhere"),
        (("index", "build", "shards", "elsewhere"), 1, "embeddings"),
        (("serve", "--model", "index", "--port", "0"), 1, "index"),
        (("train", "no-such-recipe"), 2, "clip-emoji"),
        (("shards", "pack", "nowhere", "elsewhere"), 2, "nowhere"),
        (("nonsense",), 2, "known"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    walk: Walk, words: tuple[str, ...], code: int, message: str
) -> None:
    done = clipkit(*words, cwd=walk.root, code=code)
    lines = [line for line in done.stderr.splitlines() if line.startswith("clipkit: error:")]
    assert len(lines) == 1, done.stderr
    assert message in lines[0]
    assert "Traceback" not in done.stderr
    assert not (walk.root / "elsewhere").exists(), "nothing half-written"


def test_an_index_of_another_model_is_refused(walk: Walk, tmp_path: Path) -> None:
    arguments = ("--max-steps", "1", "--max-minutes", "1", "--data.train", "shards", "--data.heldout", "None")
    clipkit("train", "clip-emoji", "--seed", 1, *arguments, "--run", tmp_path / "other", cwd=walk.root)
    other = tmp_path / "other/model"
    for words in (
        ("search", "index", "cat", "--model", other),
        ("serve", "--model", other, "--index", "index"),
    ):
        done = clipkit(*words, cwd=walk.root, code=1)
        assert "was made with" in done.stderr or "another model" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
