"""What answers look like: the shapes of `schemas`' other half, as the OpenAPI document shows them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Hit(BaseModel):
    id: int
    rank: int
    similarity: float
    metadata: dict[str, Any] | None = None
    image_url: str | None = None
    vector: list[float] | None = None


class SearchResponse(BaseModel):
    object: Literal["search"] = "search"
    index: str
    model: str
    data: list[Hit]


class LabelScore(BaseModel):
    label: str
    score: float
    similarity: float
    index: int


class ClassifyResponse(BaseModel):
    object: Literal["classify"] = "classify"
    model: str
    data: list[list[LabelScore]]


class ZeroShotScore(BaseModel):
    label: str
    score: float


class EmbeddingItem(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    images: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: Usage


class RankResult(BaseModel):
    index: int
    relevance_score: float
    similarity: float


class RankResponse(BaseModel):
    object: Literal["rank"] = "rank"
    model: str
    results: list[RankResult]


class ModelCard(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "clipkit"
    dim: int
    image_size: int
    context_length: int
    logit_scale: float
    logit_bias: float
    scoring: str
    revision_sha256: str
    limits: dict[str, int]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class IndexCard(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    name: str
    ntotal: int
    dim: int
    metric: str
    type: str
    model_sha256: str
    snapshot: str
    built_at: str


class IndexList(BaseModel):
    object: Literal["list"] = "list"
    data: list[IndexCard]


class ItemCard(BaseModel):
    id: int
    index: str
    metadata: dict[str, Any]
    image_url: str | None


class Ready(BaseModel):
    status: Literal["ready", "not ready"]
    reasons: list[str] = []
    models: dict[str, bool]
    indexes: dict[str, bool]
    queues: dict[str, dict[str, int]]


class ProblemBody(BaseModel):
    """RFC 9457, with OpenAI's `error` member."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    errors: list[dict[str, str]]
    error: dict[str, str | None]
