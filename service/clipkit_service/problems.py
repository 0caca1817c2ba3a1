"""Errors as `application/problem+json` (RFC 9457), one shape for every refusal.

A `Problem` carries a status, a stable `code`, and for each fault a JSON pointer into what was sent. The same
body has the `error` member that OpenAI's clients read. What a client sent is never echoed, and what went
wrong inside is logged with the request's id, never shown.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from clipkit.errors import (
    ArtifactError,
    ClipkitError,
    ImageError,
    InputError,
    MismatchError,
    NotFoundError,
)
from clipkit_service import context

log = logging.getLogger("clipkit.service")

IMAGE_STATUS = {"too_large": 413, "format": 415, "undecodable": 422, "empty": 422}
IMAGE_CODE = {
    "too_large": "image_too_large",
    "format": "image_format_not_allowed",
    "undecodable": "image_undecodable",
    "empty": "image_empty",
}
_CODES = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    500: "internal_error",
}


class Problem(HTTPException):
    """A refusal with a status and a stable code.

    Args:
        status: HTTP status.
        code: Short name that programs can compare.
        detail: What was wrong and what to do, for people.
        pointers: JSON pointers to the faulty parts of the body, with what is wrong with each.
        headers: Headers of the answer.
        extra: Further members of the body, for example `limit` and `actual`.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        pointers: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(status, detail, headers)
        self.code = code
        self.errors = [{"pointer": pointer, "detail": fault} for pointer, fault in pointers]
        self.extra = extra


def too_many(what: str, actual: int, limit: int, pointer: str = "") -> Problem:
    """413: more items than a request may carry."""
    detail = f"{actual} {what} in one request; the limit is {limit}"
    return Problem(413, "too_many_items", detail, pointers=[(pointer, detail)], limit=limit, actual=actual)


def invalid(detail: str, pointer: str, code: str = "invalid_request") -> Problem:
    """422: one value of the request is wrong."""
    return Problem(422, code, detail, pointers=[(pointer, detail)])


def image_problem(faults: Sequence[tuple[str, ImageError | Problem]]) -> Problem:
    """One problem for all pictures of a request that cannot be used; the first decides the status."""
    pointers = [(pointer, _detail(error)) for pointer, error in faults]
    first = faults[0][1]
    if isinstance(first, Problem):
        return Problem(first.status_code, first.code, first.detail, pointers=pointers, **first.extra)
    return Problem(IMAGE_STATUS[first.reason], IMAGE_CODE[first.reason], str(first), pointers=pointers)


def _detail(error: ImageError | Problem) -> str:
    return error.detail if isinstance(error, Problem) else str(error)


def from_clipkit(error: ClipkitError) -> Problem:
    """The problem that a `ClipkitError` is. Damaged artifacts are the server's fault: opaque, and logged."""
    match error:
        case ImageError():
            return Problem(IMAGE_STATUS[error.reason], IMAGE_CODE[error.reason], str(error))
        case InputError():
            return Problem(422, "invalid_request", str(error))
        case NotFoundError():
            return Problem(404, "not_found", str(error))
        case MismatchError():
            return Problem(409, "mismatch", str(error))
        case ArtifactError():
            log.error("request %s: %s", context.request_id(), error)
            return Problem(500, "artifact_damaged", "the index or the model on the server is damaged")
        case _:
            log.error("request %s: %s", context.request_id(), error)
            return internal()


def internal() -> Problem:
    """500: the request's id is all that a client learns."""
    return Problem(500, "internal_error", "something went wrong on the server; the log has the request's id")


def body_of(problem: HTTPException, instance: str) -> dict[str, Any]:
    """The members of the answer to a refused request."""
    status = problem.status_code
    native = isinstance(problem, Problem)
    code = problem.code if native else _CODES.get(status, f"http_{status}")
    errors = problem.errors if native else []
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": problem.detail,
        "instance": instance,
        "code": code,
        "request_id": context.request_id(),
        "errors": errors,
        **(problem.extra if native else {}),
        "error": {
            "message": problem.detail,
            "type": kind,
            "param": errors[0]["pointer"] if errors else None,
            "code": code,
        },
    }


def respond(problem: HTTPException, path: str) -> Response:
    """The HTTP answer to a refused request; ASCII, so that no client's text can break it."""
    content = json.dumps(body_of(problem, path), ensure_ascii=True).encode()
    headers = dict(problem.headers or {})
    return Response(content, problem.status_code, headers, media_type="application/problem+json")


def from_validation(error: RequestValidationError, content_type: str) -> Problem:
    """400 when the body is no JSON at all, 415 when it claims to be something else, else 422."""
    faults = cast(Sequence[Mapping[str, Any]], error.errors())
    first = faults[0]
    if first["type"] == "json_invalid":
        detail = f"the body is not JSON: {first['ctx']['error']}"
        return Problem(400, "malformed_json", detail, pointers=[("", detail)])
    media_type = content_type.partition(";")[0].strip().lower()
    as_json = media_type == "application/json" or media_type.endswith("+json")
    if not as_json and tuple(first["loc"]) == ("body",) and first["type"] == "model_attributes_type":
        return Problem(415, "unsupported_media_type", "send the body as application/json")
    pointers = [(_pointer(fault["loc"]), _sentence(fault)) for fault in faults[:20]]
    place, sentence = pointers[0]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Problem(422, "invalid_request", f"{place or 'the body'}: {sentence}{more}", pointers=pointers)


def _pointer(loc: Sequence[str | int]) -> str:
    """A pydantic location as a JSON pointer; the first part names the body, the query or the path."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in loc[1:])


def _sentence(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return "unknown field"
    return str(fault["msg"]).removeprefix("Value error, ")


def install(app: FastAPI) -> None:
    """Answer every foreseen exception of `app` with a problem; unforeseen ones are the middleware's."""

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return respond(error, request.url.path)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        content_type = request.headers.get("content-type", "")
        return respond(from_validation(error, content_type), request.url.path)

    async def on_clipkit(request: Request, error: Exception) -> Response:
        assert isinstance(error, ClipkitError)
        return respond(from_clipkit(error), request.url.path)

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(ClipkitError, on_clipkit)
