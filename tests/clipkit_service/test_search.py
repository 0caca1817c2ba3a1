"""/v1/search: every kind of query, the same answer by every way, and exact refusals."""

import base64
from typing import Any

import httpx
import numpy as np
import pytest

pytestmark = pytest.mark.anyio


async def hits(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return response.json()["data"]


async def test_picture_of_the_index_finds_itself(client: httpx.AsyncClient, world: Any) -> None:
    sent = base64.b64encode(world.pictures[3]).decode()
    for image in (sent, f"data:image/png;base64,{sent}"):
        found = await hits(await client.post("/v1/search", json={"query": {"image": image}, "k": 3}))
        assert [hit["rank"] for hit in found] == [1, 2, 3]
        assert found[0]["id"] == 3
        assert found[0]["similarity"] == pytest.approx(1, abs=1e-3)
        assert found[0]["metadata"]["caption"] == "picture 3"
    upload = await client.post(
        "/v1/search/image", files={"file": ("x.png", world.pictures[3])}, data={"k": "3"}
    )
    assert await hits(upload) == found


async def test_text_search_is_the_same_by_every_way(client: httpx.AsyncClient) -> None:
    posted = await client.post(
        "/v1/search", json={"index": "shop", "query": {"text": "a  red\nballoon "}, "k": 5}
    )
    asked = await client.get("/v1/search", params={"q": "a red balloon", "k": 5, "index": "default"})
    found = await hits(posted)
    assert found == await hits(asked)
    assert len(found) == 5
    assert [hit["similarity"] for hit in found] == sorted((h["similarity"] for h in found), reverse=True)
    again = await client.get(
        "/v1/search", params={"q": "a red balloon", "k": 5}, headers={"If-None-Match": asked.headers["etag"]}
    )
    assert again.status_code == 304
    assert again.content == b""


async def test_item_query_leaves_itself_out(client: httpx.AsyncClient) -> None:
    found = await hits(await client.post("/v1/search", json={"query": {"id": 7}, "k": 1000}))
    assert len(found) == 11
    assert 7 not in {hit["id"] for hit in found}


async def test_vector_query_and_included_vectors(client: httpx.AsyncClient, world: Any) -> None:
    body = {"query": {"id": 2}, "k": 1, "include": ["vector"]}
    (hit,) = await hits(await client.post("/v1/search", json=body))
    assert "metadata" not in hit
    vector = np.asarray(hit["vector"])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-3)
    scaled = (vector * 17).tolist()
    (same,) = await hits(await client.post("/v1/search", json={"query": {"vector": scaled}, "k": 1}))
    assert same["id"] == hit["id"]
    assert same["similarity"] == pytest.approx(1, abs=1e-5)


async def test_min_similarity_cuts(client: httpx.AsyncClient) -> None:
    everything = await hits(await client.post("/v1/search", json={"query": {"text": "cat"}, "k": 12}))
    least = everything[4]["similarity"]
    body = {"query": {"text": "cat"}, "k": 12, "min_similarity": least}
    assert await hits(await client.post("/v1/search", json=body)) == everything[:5]


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        ({"query": {"text": "x"}, "k": 0}, 422, "/k"),
        ({"query": {"text": "x"}, "k": 1001}, 422, "/k"),
        ({"query": {"text": "x"}, "k": "many"}, 422, "/k"),
        ({"query": {"text": ""}}, 422, "/query/text"),
        ({"query": {"text": " \n "}}, 422, "/query/text"),
        ({"query": {"text": "x" * 5000}}, 422, "/query/text"),
        ({"query": {}}, 422, "/query"),
        ({"query": {"text": "x", "id": 1}}, 422, "/query"),
        ({"query": {"text": "x"}, "kk": 3}, 422, "/kk"),
        ({"query": {"vector": [1.0] * 7}}, 422, "/query/vector"),
        ({"query": {"vector": [0.0] * 8}}, 422, "/query/vector"),
        ({"query": {"id": -1}}, 422, "/query/id"),
        ({"query": {"id": 2**63}}, 422, "/query/id"),
        ({"query": {"text": "x"}, "include": ["thumbnail"]}, 422, "/include/0"),
        ({"query": {"text": "x"}, "index": "other"}, 404, "/index"),
        ({"query": {"image": "https://example.org/cat.png"}}, 400, "/query/image"),
        ({"query": {"image": "file:///etc/passwd"}}, 400, "/query/image"),
        ({"query": {"image": "/etc/passwd"}}, 400, "/query/image"),
        ({"query": {"image": "data:image/png,xx"}}, 400, "/query/image"),
    ],
)
async def test_refusals_say_where(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, pointer: str
) -> None:
    response = await client.post("/v1/search", json=body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["errors"][0]["pointer"] == pointer
    assert problem["status"] == status
    assert problem["error"]["message"] == problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_vectors_are_finite(client: httpx.AsyncClient, value: str) -> None:
    body = f'{{"query": {{"vector": [{value},1,1,1,1,1,1,1]}}}}'
    response = await client.post("/v1/search", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "/query/vector/0"


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "malformed_json"),
        (b'"\xff"', "application/json", 400, "bad_request"),
        (b"[" * 100_000, "application/json", 400, "bad_request"),
        (b'{"query": {"text": "\\ud800"}}', "application/json", 422, "invalid_request"),
        (b'{"\\ud800": 1, "query": {"text": "x"}}', "application/json", 422, "invalid_request"),
        (b"query=x", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"", "application/json", 422, "invalid_request"),
    ],
)
async def test_bodies_that_are_no_request(
    client: httpx.AsyncClient, content: bytes, kind: str, status: int, code: str
) -> None:
    response = await client.post("/v1/search", content=content, headers={"Content-Type": kind})
    assert (response.status_code, response.json()["code"]) == (status, code)


async def test_unknown_item_is_404(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/search", json={"query": {"id": 99}})
    assert response.status_code == 404
    for path in ("items/99", "items/99/image"):
        assert (await client.get(f"/v1/indexes/default/{path}")).status_code == 404
    assert (await client.get("/v1/indexes/none/items/1")).status_code == 404
    assert (await client.get("/v1/indexes/default/items/x")).status_code == 422


async def test_thumbnails_are_pictures_with_lasting_addresses(client: httpx.AsyncClient) -> None:
    (hit, *_) = await hits(await client.get("/v1/search", params={"q": "cat"}))
    response = await client.get(hit["image_url"])
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/webp"
    assert "immutable" in response.headers["cache-control"]
    assert response.content[:4] == b"RIFF"
    plain = await client.get(f"/v1/indexes/shop/items/{hit['id']}/image")
    assert plain.headers["cache-control"] == "no-cache"
    assert plain.content == response.content
    known = {"If-None-Match": response.headers["etag"]}
    assert (await client.get(hit["image_url"], headers=known)).status_code == 304


async def test_without_an_index_the_rest_works(world: Any, serve: Any) -> None:
    from clipkit_service import create_app

    async with serve(create_app(world.settings(index=None))) as client:
        response = await client.get("/v1/search", params={"q": "cat"})
        assert (response.status_code, response.json()["code"]) == (404, "no_index")
        assert (await client.get("/v1/indexes")).json()["data"] == []
        assert (await client.post("/v1/embeddings", json={"input": "cat"})).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
