"""/v1/embeddings in OpenAI's dialect (with OpenAI's own client), for pictures, and /v1/rank."""

import asyncio
import base64
from typing import Any, cast

import httpx
import numpy as np
import openai
import pytest
import torch

pytestmark = pytest.mark.anyio


def vectors(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return np.array([item["embedding"] for item in data])


async def test_texts_and_pictures_keep_their_order(client: httpx.AsyncClient, world: Any) -> None:
    picture = base64.b64encode(world.pictures[0]).decode()
    mixed = [{"text": "cat"}, {"image": picture}, "dog"]
    response = await client.post("/v1/embeddings", json={"input": mixed, "model": "tiny", "ignored": 1})
    found = vectors(response)
    usage = response.json()["usage"]
    assert usage["images"] == 1
    assert usage["prompt_tokens"] == 6
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
    with torch.inference_mode():
        wanted = world.encoder.encode_text(world.encoder.tokenizer.encode(["cat", "dog"])).numpy()
    np.testing.assert_allclose(found[[0, 2]], wanted, atol=1e-5)
    alone = vectors(await client.post("/v1/embeddings", json={"input": {"image": picture}}))
    np.testing.assert_allclose(found[1], alone[0], atol=1e-5)
    infinity = {"input": [picture], "modality": "image"}
    np.testing.assert_array_equal(alone, vectors(await client.post("/v1/embeddings", json=infinity)))
    files = await client.post("/v1/embeddings/images", files=[("files", p) for p in world.pictures[:2]])
    np.testing.assert_allclose(vectors(files)[0], alone[0], atol=1e-5)


async def test_base64_is_the_same_numbers(client: httpx.AsyncClient) -> None:
    plain = vectors(await client.post("/v1/embeddings", json={"input": ["cat", "dog"]}))
    coded = await client.post("/v1/embeddings", json={"input": ["cat", "dog"], "encoding_format": "base64"})
    rows = [np.frombuffer(base64.b64decode(i["embedding"]), "<f4") for i in coded.json()["data"]]
    np.testing.assert_array_equal(plain.astype(np.float32), np.array(rows))


async def test_openai_client(client: httpx.AsyncClient) -> None:
    sdk = openai.AsyncOpenAI(
        api_key="none", base_url="http://127.0.0.1:8000/v1", http_client=cast(Any, client), max_retries=0
    )
    answer = await sdk.embeddings.create(model="tiny", input=["cat", "dog"])  # asks for base64 by itself
    plain = vectors(await client.post("/v1/embeddings", json={"input": ["cat", "dog"]}))
    np.testing.assert_allclose(np.array([item.embedding for item in answer.data]), plain, atol=1e-7)
    assert [model.id async for model in sdk.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="no model of that name") as refused:
        await sdk.embeddings.create(model="text-embedding-3-small", input="cat")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        ({"input": []}, 422, "/input"),
        ({"input": ""}, 422, "/input/0/text"),
        ({"input": [1, 2]}, 422, "/input/0"),
        ({"input": {"text": "x", "image": "AAAA"}}, 422, "/input/0"),
        ({"input": ["x"] * 257}, 413, "/input"),
        ({"input": "x", "dimensions": 4}, 400, "/dimensions"),
        ({"input": "x", "encoding_format": "int8"}, 422, "/encoding_format"),
        ({"input": "x", "normalized": False}, 422, "/normalized"),
        ({"input": [{"image": "https://example.org/x.png"}]}, 400, "/input/0/image"),
        ({"input": ["x", {"image": "not base64!"}]}, 400, "/input/1/image"),
        ({"input": ["x", {"image": "AAAA"}]}, 415, "/input/1/image"),
    ],
)
async def test_refusals_say_where(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, pointer: str
) -> None:
    response = await client.post("/v1/embeddings", json=body)
    assert response.status_code == status, response.text
    assert response.json()["errors"][0]["pointer"] == pointer


async def test_batched_equals_single(world: Any, serve: Any) -> None:
    """Many requests at once, in any order, give what each gives alone."""
    from clipkit_service import create_app

    texts = [f"{'very ' * (i % 7)}large cat number {i}" for i in range(24)]
    pictures = [{"image": base64.b64encode(p).decode()} for p in world.pictures]
    inputs = [*texts, *pictures]
    async with serve(create_app(world.settings(text_cache_items=0))) as client:
        alone = [vectors(await client.post("/v1/embeddings", json={"input": i}))[0] for i in inputs]
        order = np.random.default_rng(0).permutation(len(inputs))
        together = await asyncio.gather(
            *(client.post("/v1/embeddings", json={"input": inputs[i]}) for i in order)
        )
        sizes = (await client.get("/metrics")).text
    for i, response in zip(order, together, strict=True):
        np.testing.assert_allclose(vectors(response)[0], alone[i], atol=1e-5)
    batches = [
        line
        for line in sizes.splitlines()
        if line.startswith('clipkit_batch_size_bucket{le="4.0",queue="text"')
    ]
    counts = [line for line in sizes.splitlines() if line.startswith('clipkit_batch_size_count{queue="text"')]
    assert float(batches[0].split()[1]) < float(counts[0].split()[1]), "no batch had more than four texts"


async def test_rank(client: httpx.AsyncClient, world: Any) -> None:
    image = base64.b64encode(world.pictures[0]).decode()
    body = {"query": {"image": image}, "candidates": ["cat", {"image": image}, {"text": "dog"}], "top_n": 2}
    answer = (await client.post("/v1/rank", json=body)).json()
    assert answer["results"][0]["index"] == 1
    assert answer["results"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    whole = (await client.post("/v1/rank", json={**body, "top_n": None})).json()["results"]
    assert sum(result["relevance_score"] for result in whole) == pytest.approx(1)
    refused = await client.post("/v1/rank", json={**body, "candidates": []})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/candidates")
