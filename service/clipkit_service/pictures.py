"""Pictures from requests: bytes in, one fixed-size tensor out, before anything is batched.

A picture comes as the file of a form, as a data URI or as plain base64; never by address. It is decoded
fully and resized in a thread of the request's own, so that a hostile one can only fail its own request.

S: the model's picture size.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from functools import partial

import anyio
import anyio.to_thread
from torch import Tensor

from clipkit.errors import ImageError
from clipkit.images import Preprocess, decode_image
from clipkit_service import context
from clipkit_service.metrics import Metrics
from clipkit_service.problems import IMAGE_CODE, Problem, image_problem
from clipkit_service.settings import Settings

_ADDRESS = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
_SPACE = str.maketrans("", "", " \t\r\n")


def from_base64(value: str, pointer: str, max_bytes: int) -> bytes:
    """The bytes that a data URI or plain base64 stands for.

    Raises:
        Problem: 400 for an address (`url_fetch_disabled`) or what is no base64, 413 when too long.
    """
    if _ADDRESS.match(value):
        detail = "pictures are not fetched from addresses: send the bytes as a data URI or base64"
        raise Problem(400, "url_fetch_disabled", detail, pointers=[(pointer, detail)])
    if value[:5].lower() == "data:":
        head, comma, value = value.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            detail = "a data URI must read data:image/…;base64,…"
            raise Problem(400, "invalid_base64", detail, pointers=[(pointer, detail)])
    if len(value) * 3 // 4 > max_bytes + 1024:  # white space may have made a sound one a little longer
        detail = f"the picture has more than {max_bytes} bytes"
        raise Problem(413, "image_too_large", detail, pointers=[(pointer, detail)], limit=max_bytes)
    try:
        return base64.b64decode(value.translate(_SPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        detail = f"the picture is no base64: {error}"
        raise Problem(400, "invalid_base64", detail, pointers=[(pointer, detail)]) from error


class Decoder:
    """Decodes the pictures of requests, a few at a time.

    Args:
        preprocess: What the model wants to see.
        settings: The limits.
        metrics: Where refusals are counted.
    """

    def __init__(self, preprocess: Preprocess, settings: Settings, metrics: Metrics) -> None:
        self._preprocess = preprocess
        self._settings = settings
        self._metrics = metrics
        self._threads = anyio.CapacityLimiter(settings.decode_threads)

    async def __call__(self, sources: Sequence[bytes | str], pointers: Sequence[str]) -> list[Tensor]:
        """Each picture as uint8 (3, S, S).

        Args:
            sources: Encoded pictures as bytes, data URIs or base64.
            pointers: Where in the request each one is.

        Raises:
            Problem: Names every picture that cannot be used; the first decides the status.
        """
        tensors: list[Tensor | None] = [None] * len(sources)
        faults: list[tuple[str, ImageError | Problem]] = []

        async def one(i: int) -> None:
            work = partial(self.decode, sources[i], pointers[i])
            try:
                tensors[i] = await anyio.to_thread.run_sync(work, limiter=self._threads)
            except (ImageError, Problem) as error:
                faults.append((pointers[i], error))

        with context.timed("decode"):
            async with anyio.create_task_group() as group:
                for i in range(len(sources)):
                    group.start_soon(one, i)
        if faults:
            for _, error in faults:
                code = IMAGE_CODE[error.reason] if isinstance(error, ImageError) else error.code
                self._metrics.decode_failures.labels(code).inc()
            order = {pointer: place for place, pointer in enumerate(pointers)}
            raise image_problem(sorted(faults, key=lambda fault: order[fault[0]]))
        return [tensor for tensor in tensors if tensor is not None]

    def decode(self, source: bytes | str, pointer: str) -> Tensor:
        """One picture as uint8 (3, S, S). Raises: ImageError; Problem."""
        limits = self._settings
        if isinstance(source, str):
            source = from_base64(source, pointer, limits.max_image_bytes)
        image = decode_image(
            source,
            max_pixels=limits.max_image_pixels,
            max_bytes=limits.max_image_bytes,
            name="the picture",
            min_side=self._preprocess.min_side,
        )
        return self._preprocess.uint8(image)
