"""`/v1/embeddings` in OpenAI's shape, for texts and pictures, and `/v1/rank`."""

import base64
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Body, UploadFile

from clipkit_service import examples
from clipkit_service.answers import EmbeddingItem, EmbeddingsResponse, RankResponse, RankResult, Usage
from clipkit_service.engine import Engine
from clipkit_service.problems import Problem
from clipkit_service.routes.shared import REFUSALS, EngineDep, embed_parts, read_uploads
from clipkit_service.schemas import EmbeddingsRequest, RankRequest
from clipkit_service.scores import probabilities

router = APIRouter(tags=["embeddings"], responses=REFUSALS)


def _answer(
    engine: Engine, vectors_ND: np.ndarray, tokens: int, images: int, encoding: str = "float"
) -> EmbeddingsResponse:
    if encoding == "base64":
        little = vectors_ND.astype("<f4")
        coded: list[list[float] | str] = [base64.b64encode(row.tobytes()).decode() for row in little]
    else:
        coded = vectors_ND.tolist()
    data = [EmbeddingItem.model_construct(index=i, embedding=row) for i, row in enumerate(coded)]
    usage = Usage(prompt_tokens=tokens, total_tokens=tokens, images=images)
    return EmbeddingsResponse.model_construct(data=data, model=engine.model_id, usage=usage)


@router.post("/v1/embeddings", summary="Embed texts and pictures")
async def embeddings(
    body: Annotated[EmbeddingsRequest, Body(openapi_examples=examples.EMBEDDINGS)], engine: EngineDep
) -> EmbeddingsResponse:
    """Embeddings of length 1 in the order of `input`, as OpenAI's clients expect them.

    An input is a string, `{"text": …}` or `{"image": …}`. `base64` is little-endian float32.
    """
    engine.check_model_name(body.model)
    if body.dimensions not in (None, engine.model.dim):
        detail = f"this model gives {engine.model.dim} dimensions, no others"
        raise Problem(400, "unsupported_dimensions", detail, pointers=[("/dimensions", detail)])
    vectors_ND, tokens, images = await embed_parts(engine, body.input, "/input")
    return _answer(engine, vectors_ND, tokens, images, body.encoding_format)


@router.post("/v1/embeddings/images", summary="Embed picture files")
async def embed_files(engine: EngineDep, files: list[UploadFile]) -> EmbeddingsResponse:
    """Embeddings of uploaded pictures, in their order."""
    sources = await read_uploads(files, engine.settings, "/files")
    places = [f"/files/{i}" for i in range(len(sources))]
    return _answer(engine, await engine.embed_images(sources, places), 0, len(sources))


@router.post("/v1/rank", summary="Order candidates by how well they fit")
async def rank(
    body: Annotated[RankRequest, Body(openapi_examples=examples.RANK)], engine: EngineDep
) -> RankResponse:
    """Candidates (texts or pictures) by similarity to a text or picture; the scores are the model's own."""
    engine.check_model_name(body.model)
    candidates_MD, _, _ = await embed_parts(engine, body.candidates, "/candidates")
    query_1D, _, _ = await embed_parts(engine, [body.query], "/query", single=True)
    similarities_M = (query_1D @ candidates_MD.T)[0].astype(np.float64)
    scores_M = probabilities(similarities_M, engine.scale, engine.bias, engine.model.scoring)
    order = np.argsort(-similarities_M, kind="stable")[: body.top_n]
    results = [
        RankResult(index=int(i), relevance_score=float(scores_M[i]), similarity=float(similarities_M[i]))
        for i in order
    ]
    return RankResponse(model=engine.model_id, results=results)
