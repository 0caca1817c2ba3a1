"""What is served: `/v1/models`, `/v1/indexes`, their items and the items' thumbnails."""

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Header, Path, Query, Response

from clipkit.index import Snapshot
from clipkit_service.answers import IndexCard, IndexList, ItemCard, ModelCard, ModelList
from clipkit_service.engine import Engine
from clipkit_service.problems import Problem
from clipkit_service.routes.search import image_url
from clipkit_service.routes.shared import REFUSALS, EngineDep
from clipkit_service.schemas import MAX_ID

router = APIRouter(tags=["catalogue"], responses=REFUSALS)

IndexName = Annotated[str, Path(openapi_examples={"the one there is": {"value": "default"}})]
Id = Annotated[int, Path(ge=0, le=MAX_ID, openapi_examples={"an item": {"value": 0}})]
LIMITS = (
    "max_body_bytes",
    "max_image_bytes",
    "max_image_pixels",
    "max_images",
    "max_texts",
    "max_text_chars",
    "max_labels",
    "max_label_chars",
    "max_templates",
    "max_prompts",
    "max_k",
    "max_batch",
    "queue_items",
)
_MAGIC = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


def _model_card(engine: Engine) -> ModelCard:
    model, settings = engine.model, engine.settings
    return ModelCard(
        id=engine.model_id,
        created=engine.loaded_at,
        dim=model.dim,
        image_size=model.preprocess.size,
        context_length=model.tokenizer.context_length,
        logit_scale=engine.scale,
        logit_bias=engine.bias,
        scoring=model.scoring,
        revision_sha256=engine.fingerprint,
        limits={name: getattr(settings, name) for name in LIMITS},
    )


def _index_card(engine: Engine, snapshot: Snapshot) -> IndexCard:
    manifest: dict[str, Any] = snapshot.manifest
    return IndexCard(
        name=engine.index_id,
        ntotal=len(snapshot),
        dim=snapshot.dim,
        metric=manifest["metric"],
        type=manifest["engine"],
        model_sha256=manifest["model"]["fingerprint"],
        snapshot=snapshot.folder.name,
        built_at=manifest["created"],
    )


@router.get("/v1/models", summary="The models there are")
async def models(engine: EngineDep) -> ModelList:
    """The one model, in OpenAI's list shape, with its limits."""
    return ModelList(data=[_model_card(engine)])


@router.get("/v1/models/{model_id:path}", summary="One model")
async def model(
    engine: EngineDep,
    model_id: Annotated[str, Path(openapi_examples={"the one there is": {"value": "default"}})],
) -> ModelCard:
    """The model of a name; `default` is the one there is."""
    engine.check_model_name(model_id)
    return _model_card(engine)


@router.get("/v1/indexes", summary="The indexes there are")
async def indexes(engine: EngineDep) -> IndexList:
    """The one index, or an empty list."""
    return IndexList(data=[] if engine.index is None else [_index_card(engine, engine.index.current)])


@router.get("/v1/indexes/{name}", summary="One index")
async def index(name: IndexName, engine: EngineDep) -> IndexCard:
    """The index of a name; `default` is the one there is."""
    return _index_card(engine, engine.snapshot(name, "/name"))


@router.get("/v1/indexes/{name}/items/{id}", summary="One item")
async def item(name: IndexName, id: Id, engine: EngineDep) -> ItemCard:
    """An item's metadata and where its thumbnail is."""
    snapshot = engine.snapshot(name, "/name")
    metadata = snapshot.items.metadata([id])[0]
    url = image_url(engine.index_id, snapshot, id) if snapshot.items.thumbnail(id) is not None else None
    return ItemCard(id=id, index=engine.index_id, metadata=metadata, image_url=url)


@router.get(
    "/v1/indexes/{name}/items/{id}/image",
    response_class=Response,
    responses={200: {"content": {"image/webp": {}, "image/png": {}, "image/jpeg": {}}}},
    summary="An item's thumbnail",
)
async def thumbnail(
    name: IndexName,
    id: Id,
    engine: EngineDep,
    v: Annotated[str | None, Query(description="The snapshot, as image_url gives it.")] = None,
    if_none_match: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Response:
    """A small picture of the item. An address that names the snapshot (`v`) may be cached for ever."""
    snapshot = engine.snapshot(name, "/name")
    version = snapshot.digest[:12]
    scope = "private" if engine.settings.api_key else "public"
    lasting = f"{scope}, max-age=31536000, immutable" if v == version else "no-cache"
    headers = {"ETag": f'"{version}-{id}"', "Cache-Control": lasting}
    data = await anyio.to_thread.run_sync(snapshot.items.thumbnail, id)
    if data is None:
        raise Problem(404, "no_thumbnail", "the index keeps no picture of this item")
    if if_none_match and headers["ETag"] in if_none_match:
        return Response(status_code=304, headers=headers)
    kind = next((kind for magic, kind in _MAGIC if data.startswith(magic)), None)
    if kind is None:
        raise Problem(404, "no_thumbnail", "the index keeps no picture of this item that can be shown")
    return Response(data, media_type=kind, headers=headers)
