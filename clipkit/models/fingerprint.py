"""A model's fingerprint: one digest over its weights and over what they mean.

It is computed when it is asked for, and again only when a weight was changed.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor


class Fingerprint:
    """Remembers the last digest and the weights it is of."""

    def __init__(self) -> None:
        self._last: tuple[tuple[int, ...], str] | None = None

    def of(self, state: dict[str, Tensor], meaning: dict[str, Any]) -> str:
        """SHA-256 (hex).

        Args:
            state: The model's state dict.
            meaning: JSON values that decide what the weights mean; the same in every call.
        """
        versions = tuple(
            number for tensor in state.values() for number in (tensor.data_ptr(), _version(tensor))
        )
        if self._last is None or self._last[0] != versions:
            self._last = (versions, _digest(state, meaning))
        return self._last[1]


def _digest(state: dict[str, Tensor], meaning: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(meaning, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; tensors made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
