"""Zero-shot classification: `/v1/classify`, as JSON or as a form, and Hugging Face's shape of it."""

import asyncio
import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Request
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile

from clipkit_service import examples
from clipkit_service.answers import ClassifyResponse, LabelScore, ZeroShotScore
from clipkit_service.engine import Engine
from clipkit_service.problems import Problem, invalid, too_many
from clipkit_service.routes.shared import REFUSALS, EngineDep, read_uploads
from clipkit_service.schemas import ClassifyRequest, ZeroShotRequest
from clipkit_service.scores import DEFAULT_TEMPLATES, check_labels, classifier, prompts

router = APIRouter(tags=["classify"], responses=REFUSALS)

_SEPARATORS = re.compile(r"[,，、\n]")
_FORM_SCHEMA = {
    "type": "object",
    "required": ["file", "labels"],
    "properties": {
        "file": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "description": "One picture, or several by repeating the field.",
        },
        "labels": {
            "type": "array",
            "items": {"type": "string"},
            "description": "One label for each field; or one field with commas between, or a JSON list.",
        },
        "templates": {"type": "array", "items": {"type": "string"}},
        "multi_label": {"type": "boolean", "default": False},
        "top_k": {"type": "integer", "minimum": 1},
        "model": {"type": "string"},
    },
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/ClassifyRequest"},
                "examples": examples.CLASSIFY,
            },
            "multipart/form-data": {"schema": _FORM_SCHEMA},
        },
    }
}


def _listed(values: Sequence[str], pointer: str, *, split: bool) -> list[str]:
    """Form fields as a list: repeated, a JSON list, or (`split`) with commas between."""
    if len(values) != 1:
        return list(values)
    value = values[0].strip()
    if value.startswith("["):
        try:
            found = json.loads(value)
        except ValueError as error:
            raise invalid(f"not a JSON list: {error}", pointer) from error
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise invalid("not a JSON list of strings", pointer)
        return found
    if not split:
        return [value]
    return [part.strip() for part in _SEPARATORS.split(value)] if value else []


def _body_error(error: ValidationError) -> RequestValidationError:
    return RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()])


async def _from_form(form: FormData, engine: Engine) -> tuple[ClassifyRequest, list[bytes], list[str]]:
    """The request that a form means, its pictures, and where they are. Raises: Problem; validation error."""
    given = [*form.getlist("file"), *form.getlist("files")]
    files = [item for item in given if isinstance(item, UploadFile)]
    unknown = set(form) - {"file", "files", *ClassifyRequest.model_fields}
    if unknown or not files:
        pointer = f"/{min(unknown)}" if unknown else "/file"
        raise invalid("unknown field" if unknown else "a picture is needed", pointer)
    texts = {
        name: [item for item in form.getlist(name) if isinstance(item, str)]
        for name in ("labels", "templates", "multi_label", "top_k", "model")
    }
    data: dict[str, Any] = {"image": "-", "labels": _listed(texts["labels"], "/labels", split=True)}
    if texts["templates"]:
        data["templates"] = _listed(texts["templates"], "/templates", split=False)
    data |= {name: texts[name][0] for name in ("multi_label", "top_k", "model") if texts[name]}
    try:
        asked = ClassifyRequest.model_validate(data)
    except ValidationError as error:
        raise _body_error(error) from error
    sources = await read_uploads(files, engine.settings, "/file")
    return asked, sources, [f"/file/{i}" for i in range(len(files))]


async def _read(request: Request, engine: Engine) -> tuple[ClassifyRequest, Sequence[bytes | str], list[str]]:
    """The request, its pictures, and where they are. Raises: Problem; validation error."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        limits = engine.settings
        async with request.form(
            max_files=4 * limits.max_images, max_fields=2 * limits.max_labels + 200, max_part_size=1024 * 1024
        ) as form:
            return await _from_form(form, engine)
    if kind != "application/json" and not kind.endswith("+json"):
        raise Problem(415, "unsupported_media_type", "send application/json or multipart/form-data")
    try:
        asked = TypeAdapter(ClassifyRequest).validate_json(await request.body())
    except ValidationError as error:
        raise _body_error(error) from error
    if asked.image is not None:
        return asked, [asked.image], ["/image"]
    images = asked.images or []
    if len(images) > engine.settings.max_images:
        raise too_many("pictures", len(images), engine.settings.max_images, "/images")
    return asked, images, [f"/images/{i}" for i in range(len(images))]


async def _scores(
    engine: Engine,
    sources: Sequence[bytes | str],
    places: list[str],
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    multi_label: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and similarities (N, M) of pictures and labels. Raises: Problem."""
    image_ND = await engine.embed_images(sources, places)
    written = prompts(labels, templates)
    pointers = [f"/labels/{i}" for i in range(len(labels)) for _ in templates]
    prompts_ND, _ = await engine.embed_texts(written, pointers)
    scorer = classifier(engine.model, labels, templates, prompts_ND)
    # On the model's thread: a softmax model that scores each label alone embeds one more text.
    score = partial(scorer.score, image_ND, multi_label=multi_label)
    scores_NM = await asyncio.get_running_loop().run_in_executor(engine.torch_thread, score)
    return scores_NM, scorer.similarities(image_ND)


@router.post("/v1/classify", openapi_extra=_BODY, summary="Tell which of some labels fits a picture")
async def classify(request: Request, engine: EngineDep) -> ClassifyResponse:
    """For each picture the labels with their scores, best first.

    Softmax models score labels against each other; sigmoid models, and `multi_label`, each on its own.
    """
    asked, sources, places = await _read(request, engine)
    engine.check_model_name(asked.model)
    templates = asked.templates or DEFAULT_TEMPLATES
    check_labels(asked.labels, templates, engine.settings)
    scores_NM, similarities_NM = await _scores(
        engine, sources, places, asked.labels, templates, multi_label=asked.multi_label
    )
    data = [
        [
            LabelScore(label=asked.labels[i], score=float(row[i]), similarity=float(similar[i]), index=int(i))
            for i in np.argsort(-similar, kind="stable")[: asked.top_k]
        ]
        for row, similar in zip(scores_NM, similarities_NM, strict=True)
    ]
    return ClassifyResponse(model=engine.model_id, data=data)


@router.post("/v1/zero-shot-image-classification", summary="Classify in Hugging Face's shape")
async def zero_shot(
    body: Annotated[ZeroShotRequest, Body(openapi_examples=examples.ZERO_SHOT)], engine: EngineDep
) -> list[ZeroShotScore]:
    """`[{label, score}]`, best first, as the `zero-shot-image-classification` task returns it."""
    asked = body.parameters
    templates = (asked.hypothesis_template,)
    labels_at, template_at = "/parameters/candidate_labels", "/parameters/hypothesis_template"
    check_labels(asked.candidate_labels, templates, engine.settings, labels_at, template_at)
    scores_NM, similarities_NM = await _scores(
        engine, [body.inputs], ["/inputs"], asked.candidate_labels, templates, multi_label=asked.multi_label
    )
    order = np.argsort(-similarities_NM[0], kind="stable")
    return [ZeroShotScore(label=asked.candidate_labels[i], score=float(scores_NM[0, i])) for i in order]
