"""`/v1/search`: the items of the index nearest to a text, a picture, a vector or another item."""

import hashlib
from collections.abc import Collection
from functools import partial
from typing import Annotated, Any
from urllib.parse import quote

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Body, Form, Header, Query, Response, UploadFile

from clipkit.index import MAX_K, Snapshot
from clipkit_service import context, examples
from clipkit_service.answers import Hit, SearchResponse
from clipkit_service.engine import Engine
from clipkit_service.problems import invalid
from clipkit_service.routes.shared import REFUSALS, EngineDep, check_text, read_uploads
from clipkit_service.schemas import Query as Wanted
from clipkit_service.schemas import SearchRequest, Text

router = APIRouter(tags=["search"], responses=REFUSALS)
Similarity = Annotated[float | None, Query(allow_inf_nan=False)]


def image_url(index: str, snapshot: Snapshot, item: int) -> str:
    """Where an item's thumbnail is; it names the snapshot, so that it may be cached for ever."""
    return f"/v1/indexes/{quote(index, safe='')}/items/{item}/image?v={snapshot.digest[:12]}"


async def _vector_of(engine: Engine, snapshot: Snapshot, wanted: Wanted) -> np.ndarray:
    """The vector (1, D) that a query means. Raises: Problem."""
    if wanted.text is not None:
        check_text(wanted.text, "/query/text", engine.settings)
        vectors, _ = await engine.embed_texts([wanted.text], ["/query/text"])
        return vectors
    if wanted.image is not None:
        return await engine.embed_images([wanted.image], ["/query/image"])
    if wanted.id is not None:
        return snapshot.vectors([wanted.id])
    vector_1D = np.asarray([wanted.vector], dtype=np.float64)
    if vector_1D.shape[1] != snapshot.dim:
        raise invalid(f"the vector has {vector_1D.shape[1]} numbers, not {snapshot.dim}", "/query/vector")
    length = np.linalg.norm(vector_1D)
    if not np.isfinite(length) or length == 0:
        raise invalid("the vector has no finite length above 0", "/query/vector")
    return vector_1D


def _lookup(
    snapshot: Snapshot, index: str, found: list[tuple[int, float]], include: Collection[str]
) -> list[dict[str, Any]]:
    """The hits for ids and similarities, with what was asked for."""
    ids = [item for item, _ in found]
    has_pictures = bool(ids) and snapshot.items.thumbnail(ids[0]) is not None
    hits: list[dict[str, Any]] = [
        {"id": item, "rank": rank, "similarity": similarity}
        | ({"image_url": image_url(index, snapshot, item)} if has_pictures else {})
        for rank, (item, similarity) in enumerate(found, start=1)
    ]
    if "metadata" in include:
        for hit, metadata in zip(hits, snapshot.items.metadata(ids), strict=True):
            hit["metadata"] = metadata
    if "vector" in include:
        for hit, vector in zip(hits, snapshot.vectors(ids).tolist(), strict=True):
            hit["vector"] = vector
    return hits


def _check_k(engine: Engine, k: int) -> None:
    limit = min(engine.settings.max_k, MAX_K)
    if k > limit:
        raise invalid(f"k is {k}; at most {limit} results can be asked for", "/k")


async def _search(
    engine: Engine,
    snapshot: Snapshot,
    vector_1D: np.ndarray,
    k: int,
    *,
    min_similarity: float | None = None,
    include: Collection[str] = ("metadata",),
    itself: int | None = None,
) -> SearchResponse:
    """The answer for one query vector; the item `itself` is left out."""
    wanted = k if itself is None else min(k + 1, MAX_K)
    similarities_1k, ids_1k = await engine.search(snapshot, vector_1D, wanted)
    least = -np.inf if min_similarity is None else min_similarity
    found = [
        (item, similarity)
        for item, similarity in zip(ids_1k[0].tolist(), similarities_1k[0].tolist(), strict=True)
        if item >= 0 and item != itself and similarity >= least
    ][:k]
    with context.timed("lookup"):
        work = partial(_lookup, snapshot, engine.index_id, found, include)
        hits = await anyio.to_thread.run_sync(work)
    data = [Hit.model_construct(**hit) for hit in hits]
    return SearchResponse.model_construct(
        object="search", index=engine.index_id, model=engine.model_id, data=data
    )


@router.post("/v1/search", response_model_exclude_unset=True, summary="Search the index")
async def search(
    body: Annotated[SearchRequest, Body(openapi_examples=examples.SEARCH)], engine: EngineDep
) -> SearchResponse:
    """The `k` items most similar to the query, most similar first; equal ones by ascending id."""
    snapshot = engine.snapshot(body.index)
    _check_k(engine, body.k)
    vector_1D = await _vector_of(engine, snapshot, body.query)
    return await _search(
        engine,
        snapshot,
        vector_1D,
        body.k,
        min_similarity=body.min_similarity,
        include=body.include,
        itself=body.query.id,
    )


@router.get(
    "/v1/search",
    response_model=SearchResponse,
    response_model_exclude_unset=True,
    summary="Search by an address that can be shared",
)
async def search_by_address(
    engine: EngineDep,
    response: Response,
    q: Annotated[Text, Query(openapi_examples={"words": {"value": "a red balloon"}})],
    k: Annotated[int, Query(ge=1)] = 20,
    index: str | None = None,
    min_similarity: Similarity = None,
    if_none_match: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> SearchResponse | Response:
    """As `POST /v1/search` with a text. The `ETag` holds while the index and the model are the same."""
    snapshot = engine.snapshot(index)
    _check_k(engine, k)
    known_by = f"{snapshot.digest} {engine.fingerprint} {k} {min_similarity} {engine.index_id} {q}"
    etag = f'"{hashlib.sha256(known_by.encode()).hexdigest()[:32]}"'
    if if_none_match and etag in if_none_match:
        return Response(status_code=304, headers={"ETag": etag})
    response.headers["ETag"] = etag
    check_text(q, "/q", engine.settings)
    vector_1D, _ = await engine.embed_texts([q], ["/q"])
    return await _search(engine, snapshot, vector_1D, k, min_similarity=min_similarity)


@router.post("/v1/search/image", response_model_exclude_unset=True, summary="Search with a picture file")
async def search_by_picture(
    engine: EngineDep,
    file: UploadFile,
    k: Annotated[int, Form(ge=1)] = 20,
    index: Annotated[str | None, Form()] = None,
    min_similarity: Annotated[float | None, Form(allow_inf_nan=False)] = None,
) -> SearchResponse:
    """The items most similar to an uploaded picture (JPEG, PNG, WebP, BMP or GIF)."""
    snapshot = engine.snapshot(index)
    _check_k(engine, k)
    sources = await read_uploads([file], engine.settings, "/file")
    vector_1D = await engine.embed_images(sources, ["/file"])
    return await _search(engine, snapshot, vector_1D, k, min_similarity=min_similarity)
