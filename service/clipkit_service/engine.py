"""The engine: one model and at most one index, and the ways through them.

Everything that runs the model goes through two micro-batchers (pictures, texts) that share one thread, so
that torch never competes with itself. Texts are cached by what they say. Searches run in threads of their
own. The engine knows nothing of HTTP but the `Problem`s it raises.

N: items, D: embedding dimension, S: picture side.
"""

import time
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread
import numpy as np
import torch
from torch import Tensor

from clipkit.index import Index, Snapshot
from clipkit.models import DualEncoder, load_model
from clipkit_service import context
from clipkit_service.batcher import Batcher
from clipkit_service.metrics import Metrics
from clipkit_service.pictures import Decoder
from clipkit_service.problems import Problem, invalid
from clipkit_service.settings import Settings

FRESH_S = 5.0


class Encoded(NamedTuple):
    """An embedding (D,) float32 of length 1 and the number of tokens it was made of."""

    vector: np.ndarray
    tokens: int


@dataclass(frozen=True)
class Artifacts:
    """What is served: loaded and checked before anything listens."""

    model: DualEncoder
    model_id: str
    index: Index | None
    index_id: str
    loaded_at: int


def load_artifacts(settings: Settings) -> Artifacts:
    """Load the model and the index, and check that they belong together.

    Raises:
        NotFoundError: No such model or index.
        ArtifactError: One is damaged; `MismatchError` when the index was made with another model.
    """
    index = Index.open(settings.index) if settings.index else None
    model = load_model(settings.model, device=settings.device or "auto").eval().requires_grad_(False)
    if index:
        index.check_model(model)
    folder = Path(settings.model)
    model_id = folder.resolve().name if folder.is_dir() else settings.model
    index_id = settings.index.resolve().name if settings.index else "default"
    return Artifacts(model, model_id, index, index_id, int(time.time()))


def normal_text(text: str) -> str:
    """What a text says: composed characters and single spaces. Equal keys share a cache entry."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class TextCache:
    """The embeddings of the texts used last, up to `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[str, Encoded] = OrderedDict()

    def get(self, text: str) -> Encoded | None:
        """The embedding of a text, if it is known."""
        found = self._entries.get(text)
        if found is not None:
            self._entries.move_to_end(text)
        return found

    def put(self, text: str, encoded: Encoded) -> None:
        """Remember an embedding; the one not used for longest goes."""
        self._entries[text] = encoded
        self._entries.move_to_end(text)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)


class Engine:
    """What the routes call. `start` before use, `close` after.

    Args:
        artifacts: The model and the index.
        settings: The limits.
        metrics: What is counted.
    """

    def __init__(self, artifacts: Artifacts, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.model, self.model_id = artifacts.model, artifacts.model_id
        self.index, self.index_id = artifacts.index, artifacts.index_id
        self.loaded_at = artifacts.loaded_at
        self.fingerprint = artifacts.model.fingerprint
        self.scale = self.model.scale.item()
        self.bias = 0.0 if self.model.bias is None else self.model.bias.item()
        self.cache = TextCache(settings.text_cache_items)
        self.torch_thread = ThreadPoolExecutor(1, thread_name_prefix="clipkit-torch")
        queue = {
            "executor": self.torch_thread,
            "max_batch": settings.max_batch,
            "max_items": settings.queue_items,
            "metrics": metrics,
        }
        self.images: Batcher[Tensor, np.ndarray] = Batcher("image", self._run_images, **queue)
        self.texts: Batcher[str, Encoded] = Batcher("text", self._run_texts, **queue)
        self.draining = False

    def start(self) -> None:
        """Start the workers; needs a running event loop."""
        self.decode = Decoder(self.model.preprocess, self.settings, self.metrics)
        self._search_threads = anyio.CapacityLimiter(2)
        self._probing = anyio.Lock()
        self.images.start()
        self.texts.start()
        if self.index is not None:
            self.metrics.index_vectors.labels(self.index_id).set(len(self.index))

    async def close(self) -> None:
        """Stop the workers and close the index."""
        self.draining = True
        await self.images.close()
        await self.texts.close()
        self.torch_thread.shutdown(wait=False, cancel_futures=True)
        if self.index is not None:
            self.index.close()

    # On the torch thread.

    @torch.inference_mode()
    def _run_images(self, pixels: list[Tensor]) -> list[np.ndarray]:
        batch_N3SS = torch.stack(pixels).to(self.model.device)
        return list(self.model.encode_image(batch_N3SS).float().cpu().numpy())

    @torch.inference_mode()
    def _run_texts(self, texts: list[str]) -> list[Encoded]:
        ids_NL = self.model.tokenize(texts)
        vectors_ND = self.model.encode_text(ids_NL.to(self.model.device)).float().cpu().numpy()
        # Padding may be the end token itself, so a text has at least its start and its end.
        tokens_N = (ids_NL != self.model.tokenizer.pad_id).sum(dim=1).clamp(min=1).tolist()
        return [Encoded(vector, count) for vector, count in zip(vectors_ND, tokens_N, strict=True)]

    # On the event loop.

    async def embed_images(self, sources: Sequence[bytes | str], pointers: Sequence[str]) -> np.ndarray:
        """Embeddings (N, D) float32 of encoded pictures. Raises: Problem."""
        with self.images.admit(len(sources)) as ticket:
            pixels = await self.decode(sources, pointers)
            vectors = await ticket.run(pixels, pointers)
        return _finite(vectors, pointers)

    async def embed_texts(self, texts: Sequence[str], pointers: Sequence[str]) -> tuple[np.ndarray, int]:
        """Embeddings (N, D) float32 of texts, and how many tokens they have. Raises: Problem."""
        keys = [normal_text(text) for text in texts]
        for key, pointer in zip(keys, pointers, strict=True):
            if not key:
                raise invalid("the text is empty", pointer)
        known = {key: found for key in set(keys) if (found := self.cache.get(key)) is not None}
        missing = {key: pointer for key, pointer in zip(keys, pointers, strict=True) if key not in known}
        self.metrics.cache_hits.inc(len(known))
        self.metrics.cache_misses.inc(len(missing))
        if missing:
            wanted = list(missing)
            with self.texts.admit(len(wanted)) as ticket:
                for start in range(0, len(wanted), ticket.slots):
                    chunk = wanted[start : start + ticket.slots]
                    places = [missing[key] for key in chunk]
                    encoded = await ticket.run(chunk, places)
                    _finite([item.vector for item in encoded], places)
                    for key, item in zip(chunk, encoded, strict=True):
                        known[key] = item
                        self.cache.put(key, item)
        vectors_ND = np.stack([known[key].vector for key in keys])
        return vectors_ND, sum(known[key].tokens for key in keys)

    async def search(
        self, snapshot: Snapshot, vectors_ND: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Similarities (N, k) and ids (N, k) of the nearest items; see `Index.search`."""
        with context.timed("search"):
            work = partial(snapshot.search, vectors_ND, k)
            return await anyio.to_thread.run_sync(work, limiter=self._search_threads)

    def snapshot(self, name: str | None, pointer: str = "/index") -> Snapshot:
        """The snapshot in force of an index. Raises: Problem 404."""
        if self.index is None:
            detail = "the service runs without an index: start it with --index INDEX"
            raise Problem(404, "no_index", detail)
        if name not in (None, "default", self.index_id):
            detail = "there is no index of that name"
            raise Problem(404, "index_not_found", detail, pointers=[(pointer, detail)], known=[self.index_id])
        return self.index.current

    def check_model_name(self, name: str | None) -> None:
        """Refuse a request that names a model other than the one loaded. Raises: Problem 404."""
        if name not in (None, "", "default", self.model_id):
            detail = "there is no model of that name"
            known = [self.model_id]
            raise Problem(404, "model_not_found", detail, pointers=[("/model", detail)], known=known)

    # Readiness.

    async def faults(self) -> list[str]:
        """Why the service cannot answer now; an empty list when it can.

        A batch that succeeded in the last seconds counts as the forward pass; otherwise one is made ahead
        of what waits. The search is always made.
        """
        if self.draining:
            return ["the server is shutting down"]
        faults = [f"the {b.name} worker is down" for b in (self.images, self.texts) if not b.alive]
        faults += [f"the {b.name} queue is full" for b in (self.images, self.texts) if b.depth >= b.max_items]
        if faults:
            return faults
        async with self._probing:
            side = self.model.preprocess.size
            grey_3SS = torch.full((3, side, side), 128, dtype=torch.uint8)
            for batcher, item in ((self.images, grey_3SS), (self.texts, "a photo")):
                fault = await self._probe(batcher, item)
                if fault:
                    faults.append(fault)
            faults += await self._probe_search()
        return faults

    async def _probe(self, batcher: Batcher, item: Tensor | str) -> str | None:
        """Why a forward pass of one item fails, if it does."""
        recent = time.perf_counter() - batcher.last_success < FRESH_S
        if recent and batcher.last_success > batcher.last_failure:
            return None
        try:
            with anyio.fail_after(self.settings.ready_timeout_s):
                result = await batcher.enqueue(item, first=True).future
        except TimeoutError:
            return f"the {batcher.name} model did not answer within {self.settings.ready_timeout_s:g} s"
        except Exception as error:  # whatever the model raises, it is not ready
            return f"the {batcher.name} model failed: {type(error).__name__}"
        vector = result.vector if isinstance(result, Encoded) else result
        return None if np.isfinite(vector).all() else f"the {batcher.name} model gives NaN or infinity"

    async def _probe_search(self) -> list[str]:
        """Why a search for a stored vector fails, if it does."""
        if self.index is None or not len(self.index):
            return []
        snapshot = self.index.current
        try:
            with anyio.fail_after(self.settings.ready_timeout_s):
                found, _ = await self.search(snapshot, snapshot.vectors(snapshot.ids[:1]), 1)
        except TimeoutError:
            return [f"the index did not answer within {self.settings.ready_timeout_s:g} s"]
        except Exception as error:  # whatever the index raises, it is not ready
            return [f"the index failed: {type(error).__name__}"]
        return [] if found[0, 0] > 0.99 else ["the index does not find its own vectors"]


def _finite(vectors: Sequence[np.ndarray], pointers: Sequence[str]) -> np.ndarray:
    """Vectors as (N, D). Raises: Problem 500 that names those with NaN, infinity or length 0."""
    vectors_ND = np.stack(vectors)
    lengths_N = np.linalg.norm(vectors_ND, axis=1)
    bad: list[int] = np.flatnonzero(~np.isfinite(lengths_N) | (lengths_N == 0)).tolist()
    if bad:
        raise Problem(
            500,
            "non_finite_output",
            "the model gave no finite embedding for a part of this request",
            pointers=[(pointers[i], "no finite embedding") for i in bad],
            indices=bad,
        )
    return vectors_ND
