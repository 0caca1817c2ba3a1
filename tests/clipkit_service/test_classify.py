"""Zero-shot classification over REST: as JSON, as a form, in Hugging Face's shape, and its refusals."""

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.anyio

LABELS = ["cat", "dog", "red balloon"]


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def expected(world: Any, picture: bytes, labels: list[str], templates: list[str]) -> np.ndarray:
    """The probabilities by the definition, in float64."""
    from clipkit.images import decode_image

    model = world.encoder
    with torch.inference_mode():
        image_D = model.encode_image(model.preprocess([decode_image(picture)])).double()[0]
        text = [
            [model.encode_text(model.tokenizer.encode([t.replace("{}", a)]))[0] for t in templates]
            for a in labels
        ]
    mean_MD = torch.stack([torch.stack(row).double().mean(0) for row in text])
    mean_MD = mean_MD / mean_MD.norm(dim=1, keepdim=True)
    return (model.scale.item() * mean_MD @ image_D).softmax(0).numpy()


async def test_probabilities_are_the_models_own(client: httpx.AsyncClient, world: Any) -> None:
    templates = ["a photo of {}", "{}!"]
    pictures = world.pictures[:3]
    body = {"images": [uri(p) for p in pictures], "labels": LABELS, "templates": templates}
    response = await client.post("/v1/classify", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["object"] == "classify"
    for picture, row in zip(pictures, answer["data"], strict=True):
        wanted = expected(world, picture, LABELS, templates)
        assert [entry["score"] for entry in row] == sorted((entry["score"] for entry in row), reverse=True)
        for entry in row:
            assert entry["label"] == LABELS[entry["index"]]
            assert entry["score"] == pytest.approx(wanted[entry["index"]], abs=1e-5)


async def test_form_and_json_agree(client: httpx.AsyncClient, world: Any) -> None:
    picture = world.pictures[0]
    one = (await client.post("/v1/classify", json={"image": uri(picture), "labels": LABELS})).json()
    for labels in (LABELS, [",".join(LABELS)], ["cat，dog、red balloon"], [json.dumps(LABELS)]):
        form = await client.post("/v1/classify", files={"file": ("p.png", picture)}, data={"labels": labels})
        assert form.status_code == 200, form.text
        assert form.json() == one
    options = {"labels": LABELS, "templates": ["{}, as it is"], "top_k": "1", "multi_label": "false"}
    best = await client.post("/v1/classify", files=[("file", picture), ("file", picture)], data=options)
    assert [len(row) for row in best.json()["data"]] == [1, 1]


async def test_hugging_face_shape(client: httpx.AsyncClient, world: Any) -> None:
    picture = base64.b64encode(world.pictures[1]).decode()
    parameters = {"candidate_labels": LABELS, "hypothesis_template": "This is {}"}
    answers = [
        (
            await client.post(
                "/v1/zero-shot-image-classification", json={"inputs": inputs, "parameters": parameters}
            )
        )
        for inputs in (picture, {"image": picture})
    ]
    assert answers[0].json() == answers[1].json()
    wanted = expected(world, world.pictures[1], LABELS, ["This is {}"])
    assert {e["label"]: e["score"] for e in answers[0].json()} == pytest.approx(
        dict(zip(LABELS, wanted, strict=True)), abs=1e-5
    )


@pytest.mark.parametrize(
    ("change", "status", "pointer"),
    [
        ({"labels": []}, 422, "/labels"),
        ({"labels": ["cat", ""]}, 422, "/labels/1"),
        ({"labels": ["cat", "  "]}, 422, "/labels/1"),
        ({"labels": ["x" * 257]}, 422, "/labels/0"),
        ({"labels": [str(i) for i in range(1001)]}, 413, "/labels"),
        (
            {"labels": [str(i) for i in range(1000)], "templates": [f"{i} {{}}" for i in range(9)]},
            413,
            "/labels",
        ),
        ({"templates": ["no place"]}, 422, "/templates/0"),
        ({"templates": ["{} and {}"]}, 422, "/templates/0"),
        ({"templates": ["{0.__class__}"]}, 422, "/templates/0"),
        ({"templates": [f"{i} {{}}" for i in range(101)]}, 413, "/templates"),
        ({"top_k": 0}, 422, "/top_k"),
        ({"lables": ["cat"]}, 422, "/lables"),
        ({"image": None}, 422, ""),
        ({"images": ["x"]}, 422, ""),
        ({"image": None, "images": ["AAAA"] * 33}, 413, "/images"),
        ({"image": "http://169.254.169.254/latest"}, 400, "/image"),
        ({"model": "another"}, 404, "/model"),
    ],
)
async def test_refusals_say_where(
    client: httpx.AsyncClient, world: Any, change: dict[str, Any], status: int, pointer: str
) -> None:
    body = {"image": uri(world.pictures[0]), "labels": LABELS} | change
    response = await client.post("/v1/classify", json=body)
    assert response.status_code == status, response.text
    assert response.json()["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize(
    ("data", "status", "pointer"),
    [
        ({}, 422, "/labels"),
        ({"labels": ""}, 422, "/labels"),
        ({"labels": "cat,,dog"}, 422, "/labels/1"),
        ({"labels": "[1, 2]"}, 422, "/labels"),
        ({"labels": "[1, 2"}, 422, "/labels"),
        ({"labels": "cat", "top_k": "x"}, 422, "/top_k"),
        ({"labels": "cat", "colour": "x"}, 422, "/colour"),
        ({"labels": [str(i) for i in range(1001)]}, 413, "/labels"),
        ({"labels": ",".join(str(i) for i in range(1001))}, 413, "/labels"),
    ],
)
async def test_form_refusals_say_where(
    client: httpx.AsyncClient, world: Any, data: dict[str, Any], status: int, pointer: str
) -> None:
    response = await client.post("/v1/classify", files={"file": world.pictures[0]}, data=data)
    assert response.status_code == status, response.text
    assert response.json()["errors"][0]["pointer"] == pointer


async def test_form_without_a_picture_and_other_bodies(client: httpx.AsyncClient) -> None:
    empty = await client.post("/v1/classify", files={"labels": (None, "cat")})
    assert (empty.status_code, empty.json()["errors"][0]["pointer"]) == (422, "/file")
    for content, kind, status in (
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"x", "text/plain", 415),
        (b"", "", 415),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=y", 400),
    ):
        response = await client.post("/v1/classify", content=content, headers={"Content-Type": kind})
        assert response.status_code == status, (content[:10], kind, response.text)
        assert response.headers["content-type"] == "application/problem+json"


async def test_thousand_labels_pass_through_the_queue_once(client: httpx.AsyncClient, world: Any) -> None:
    labels = [f"label number {i}" for i in range(1000)]
    body = {"image": uri(world.pictures[0]), "labels": labels, "top_k": 3}
    first = await client.post("/v1/classify", json=body)
    assert first.status_code == 200, first.text
    assert "infer" in first.headers["server-timing"]
    before = (await client.get("/metrics")).text
    assert (await client.post("/v1/classify", json=body)).json() == first.json()
    after = (await client.get("/metrics")).text
    assert (
        counted(after, "clipkit_text_cache_hits_total")
        == counted(before, "clipkit_text_cache_hits_total") + 1000
    )


def counted(text: str, name: str) -> float:
    return float(next(line for line in text.splitlines() if line.startswith(name + " ")).split()[1])


async def test_multi_label_is_the_classifiers(client: httpx.AsyncClient, world: Any) -> None:
    from clipkit.zero_shot import ZeroShotClassifier

    body = {"image": uri(world.pictures[2]), "labels": LABELS, "multi_label": True}
    row = (await client.post("/v1/classify", json=body)).json()["data"][0]
    wanted = ZeroShotClassifier(world.encoder, LABELS).classify([world.pictures[2]], multi_label=True)[0]
    for entry, same in zip(row, wanted, strict=True):
        assert entry["label"] == same["label"]
        assert entry["score"] == pytest.approx(same["score"], abs=1e-5)
        assert entry["similarity"] == pytest.approx(same["similarity"], abs=1e-5)
