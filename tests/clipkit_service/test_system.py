"""What surrounds the routes: health, metrics, headers, keys, hosts, limits, the page, the documentation."""

import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from clipkit.errors import ConfigError, MismatchError, NotFoundError
from clipkit_service import create_app
from clipkit_service.settings import load_settings

pytestmark = pytest.mark.anyio


async def test_health_and_readiness(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    ready = await client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["models"] == {"tiny": True}
    assert ready.json()["indexes"] == {"shop": True}


async def test_catalogue(client: httpx.AsyncClient, world: Any) -> None:
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert card["revision_sha256"] == world.encoder.fingerprint
    assert (card["dim"], card["image_size"], card["context_length"], card["scoring"]) == (
        8,
        32,
        16,
        "softmax",
    )
    assert card["limits"]["max_labels"] == 1000
    for name in ("tiny", "default"):
        assert (await client.get(f"/v1/models/{name}")).json() == card
    assert (await client.get("/v1/models/open_clip:ViT-B-32/x")).status_code == 404
    (index,) = (await client.get("/v1/indexes")).json()["data"]
    assert (index["name"], index["ntotal"], index["dim"]) == ("shop", 12, 8)
    assert index["model_sha256"] == card["revision_sha256"]
    assert (await client.get("/v1/indexes/default")).json() == index
    item = (await client.get("/v1/indexes/shop/items/4")).json()
    assert item["metadata"]["caption"] == "picture 4"
    assert (await client.get(item["image_url"])).status_code == 200


async def test_metrics_have_route_templates_and_no_paths(client: httpx.AsyncClient) -> None:
    await client.get("/v1/indexes/shop/items/5/image")
    await client.get("/secret-path")
    await client.get("/static/secret.js")
    await client.get("/v1/search", params={"q": "secret words"})
    text = (await client.get("/metrics")).text
    assert "secret" not in text
    assert 'route="/v1/indexes/{name}/items/{id}/image",status="200"' in text
    assert 'route="unmatched",status="404"' in text
    assert 'clipkit_index_vectors{index="shop"} 12.0' in text
    for name in (
        "clipkit_batch_size_bucket",
        "clipkit_queue_wait_seconds_sum",
        "clipkit_stage_seconds_count",
    ):
        assert name in text


async def test_every_answer_has_its_headers(client: httpx.AsyncClient) -> None:
    for path, status in (("/v1/models", 200), ("/nothing", 404), ("/v1/search", 422)):
        response = await client.get(path, headers={"X-Request-ID": "abc-1"})
        assert response.status_code == status
        assert response.headers["x-request-id"] == "abc-1"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert "total;dur=" in response.headers["server-timing"]
    odd = await client.get("/healthz", headers={"X-Request-ID": "a b<script>"})
    assert re.fullmatch("[0-9a-f]{32}", odd.headers["x-request-id"])
    timed = await client.get("/v1/search", params={"q": "never asked before"})
    for stage in ("queue", "infer", "search", "lookup"):
        assert f"{stage};dur=" in timed.headers["server-timing"]


async def test_wrong_method_and_unknown_path_are_problems(client: httpx.AsyncClient) -> None:
    for method, path, status in (("DELETE", "/v1/search", 405), ("GET", "/v1/nothing", 404)):
        response = await client.request(method, path)
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["instance"] == path


async def test_page_and_its_files(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["cache-control"] == "no-cache"
    for path in set(re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)):
        assert (await client.get(path)).status_code == 200, path
    for path in ("/static/../settings.py", "/static/%2e%2e/settings.py", "/static//etc/passwd"):
        assert (await client.get(path)).status_code == 404


async def test_key_is_asked_for(world: Any, serve: Any) -> None:
    async with serve(create_app(world.settings(api_key="sésame"))) as client:
        for path in ("/v1/models", "/metrics", "/v1/indexes/shop/items/1/image", "/v1/nothing"):
            response = await client.get(path)
            assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        wrong = await client.get("/v1/models", headers={"Authorization": "Bearer sesame"})
        assert wrong.status_code == 401
        for name, value in (("Authorization", "Bearer sésame"), ("X-API-Key", "sésame")):
            assert (await client.get("/v1/models", headers={name: value.encode()})).status_code == 200
        for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        picture = await client.get("/v1/indexes/shop/items/1/image", headers={"X-API-Key": "sésame".encode()})
        assert picture.headers["cache-control"] == "no-cache"
        assert "$CLIPKIT_API_KEY" in (await client.get("/docs")).text


async def test_foreign_hosts_and_origins(client: httpx.AsyncClient, world: Any, serve: Any) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:8000", ""):
        response = await client.get("/v1/models", headers={"Host": host})
        assert (response.status_code, response.json()["code"]) == (400, "host_not_allowed")
    for host in ("localhost:8000", "[::1]:9", "127.0.0.1"):
        assert (await client.get("/v1/models", headers={"Host": host})).status_code == 200
    allowed = world.settings(allowed_hosts="shop.example, other.example", cors_origins="https://a.example")
    async with serve(create_app(allowed)) as other:
        assert (await other.get("/healthz")).status_code == 400
        at_home = {"Host": "shop.example", "Origin": "https://a.example"}
        answer = await other.get("/v1/nothing", headers=at_home)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        answer = await other.get("/healthz", headers=at_home | {"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in answer.headers
    assert (
        "access-control-allow-origin" not in (await client.get("/healthz", headers={"Origin": "x"})).headers
    )


async def test_long_bodies_are_cut_short(world: Any, serve: Any) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

    async def chunks() -> Any:
        yield head
        for _ in range(100):
            yield b"x" * 1000

    async with serve(create_app(world.settings(max_body_bytes=10_000))) as client:
        for path, kind in (
            ("/v1/search", "application/json"),
            ("/v1/search/image", "multipart/form-data; boundary=x"),
            ("/v1/classify", "multipart/form-data; boundary=x"),
        ):
            for content in (head + b"x" * 10_001, chunks()):
                response = await client.post(path, content=content, headers={"Content-Type": kind})
                assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
                assert response.json()["limit"] == 10_000
        assert (await client.get("/readyz")).status_code == 200


async def test_wrong_index_or_model_stops_the_start(world: Any, serve: Any, tmp_path: Any) -> None:
    for settings, error, words in (
        (world.settings(model=str(world.other_model)), MismatchError, "was made with"),
        (world.settings(index=tmp_path / "none"), NotFoundError, "none"),
        (world.settings(model=str(tmp_path / "none")), NotFoundError, "none"),
    ):
        with pytest.raises(error, match=words):
            async with serve(create_app(settings)):
                pass


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MODEL": "m",
        "INDEX": "",
        "PORT": "9000",
        "MAX_K": "5",
        "CORS_ORIGINS": "a, b",
    }.items():
        monkeypatch.setenv(f"CLIPKIT_{name}", value)
    settings = load_settings(port=None, host="0.0.0.0")
    assert (settings.model, settings.index, settings.port, settings.max_k) == ("m", None, 9000, 5)
    assert settings.cors_origins == ("a", "b")
    assert not settings.on_loopback
    assert not settings.hosts
    assert load_settings(port=1).port == 1
    with pytest.raises(ConfigError, match="port"):
        load_settings(port=70000)
    monkeypatch.delenv("CLIPKIT_MODEL")
    with pytest.raises(ConfigError, match="no model"):
        load_settings()
    assert "secret" not in repr(load_settings(model="m", api_key="secret"))


# Documentation


def sent_examples(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, httpx arguments) for every example of the document."""
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            address, query = path, {}
            for parameter in operation.get("parameters", ()):
                for example in parameter.get("examples", {}).values():
                    if parameter["in"] == "path":
                        address = address.replace(f"{{{parameter['name']}}}", str(example["value"]))
                    else:
                        query[parameter["name"]] = example["value"]
            content = operation.get("requestBody", {}).get("content", {})
            if not content:
                yield verb, address, {"params": query}
            for example in content.get("application/json", {}).get("examples", {}).values():
                yield verb, address, {"json": example["value"]}


async def test_every_example_works(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    sent = list(sent_examples(document))
    assert len(sent) > 20
    for verb, path, arguments in sent:
        response = await client.request(verb, path, **arguments)
        assert response.status_code == 200, (verb, path, response.text)


async def test_docs_page_has_commands_that_work(client: httpx.AsyncClient, world: Any) -> None:
    page = await client.get("/docs")
    assert page.status_code == 200
    assert "<script" not in page.text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page.text)
    from html import unescape

    commands = [unescape(found) for found in re.findall(r"<pre>(.*?)</pre>", page.text, re.DOTALL)]
    assert len(commands) > 20
    for command in commands:
        words = shlex.split(command)
        address = next(word for word in words if word.startswith("http://127.0.0.1:8000/"))
        values = {flag: [b for a, b in pairwise(words) if a == flag] for flag in ("-d", "-F")}
        if values["-d"]:
            response = await client.post(address, json=json.loads(values["-d"][0]))
        elif values["-F"]:
            fields = dict(value.split("=", 1) for value in values["-F"])
            files = {
                name: ("picture.png", world.pictures[0]) for name in fields if fields[name].startswith("@")
            }
            data = {name: value for name, value in fields.items() if name not in files}
            response = await client.post(address, files=files, data=data)
        else:
            query = [b.split("=", 1) for a, b in pairwise(words) if a == "--data-urlencode"]
            response = await client.get(address, params=dict(query))
        assert response.status_code == 200, (command, response.text)


async def test_docs_can_be_off(world: Any, serve: Any) -> None:
    async with serve(create_app(world.settings(docs=False))) as client:
        assert (await client.get("/docs")).status_code == 404
        assert (await client.get("/openapi.json")).status_code == 404
