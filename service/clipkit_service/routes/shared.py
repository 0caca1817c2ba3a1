"""What several routes need: the engine, how refusals are documented, and checks against the settings."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, Request
from starlette.datastructures import UploadFile

from clipkit_service.answers import ProblemBody
from clipkit_service.engine import Engine
from clipkit_service.problems import Problem, invalid, too_many
from clipkit_service.schemas import Part
from clipkit_service.settings import Settings

REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {
        "description": what,
        "model": ProblemBody,
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemBody"}}},
    }
    for code, what in (("4XX", "The request is refused."), ("5XX", "The server could not answer."))
}


def get_engine(request: Request) -> Engine:
    """The app's engine. Raises: Problem 503 while it is being loaded."""
    engine = getattr(request.app.state, "engine", None)
    if engine is None:
        raise Problem(503, "loading", "the model is being loaded", headers={"Retry-After": "5"})
    return engine


EngineDep = Annotated[Engine, Depends(get_engine)]


def check_text(text: str, pointer: str, settings: Settings) -> str:
    """The text when it is not too long. Raises: Problem 422."""
    if len(text) > settings.max_text_chars:
        raise invalid(f"the text has more than {settings.max_text_chars} characters", pointer)
    return text


async def read_uploads(files: Sequence[UploadFile], settings: Settings, pointer: str) -> list[bytes]:
    """The bytes of uploaded pictures. Raises: Problem 413."""
    if len(files) > settings.max_images:
        raise too_many("pictures", len(files), settings.max_images, pointer)
    return [await file.read() for file in files]


async def embed_parts(
    engine: Engine, parts: Sequence[Part], pointer: str, *, single: bool = False
) -> tuple[np.ndarray, int, int]:
    """Embeddings (N, D) of texts and pictures in their order, tokens, and the number of pictures.

    Args:
        engine: The engine.
        parts: Texts and pictures.
        pointer: Where the list is in the request, for example `/input`.
        single: The pointer names the one part itself.

    Raises:
        Problem: 413 for too many, else what is wrong with a text or picture.
    """
    settings = engine.settings
    base = [pointer if single else f"{pointer}/{i}" for i in range(len(parts))]
    texts = [(i, part.text) for i, part in enumerate(parts) if part.text is not None]
    images = [(i, part.image) for i, part in enumerate(parts) if part.image is not None]
    if len(texts) > settings.max_texts:
        raise too_many("texts", len(texts), settings.max_texts, pointer)
    if len(images) > settings.max_images:
        raise too_many("pictures", len(images), settings.max_images, pointer)
    vectors_ND = np.zeros((len(parts), engine.model.dim), dtype=np.float32)
    tokens = 0
    if texts:
        places = [f"{base[i]}/text" for i, _ in texts]
        checked = [check_text(text, place, settings) for (_, text), place in zip(texts, places, strict=True)]
        vectors, tokens = await engine.embed_texts(checked, places)
        vectors_ND[[i for i, _ in texts]] = vectors
    if images:
        places = [f"{base[i]}/image" for i, _ in images]
        vectors_ND[[i for i, _ in images]] = await engine.embed_images([image for _, image in images], places)
    return vectors_ND, tokens, len(images)
