"""Memory that tiles use one after another: to get fresh pages takes longer than to fill them."""

import math

import torch
from torch import Tensor


class Space:
    """Tensors by name, each of which is handed out again and again; `reuse=False` makes a new one each time.

    What was taken under a name is overwritten by whoever takes it next.
    """

    def __init__(self, reuse: bool = True) -> None:
        self._reuse = reuse
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape and dtype, on the device of `like`."""
        size, held = math.prod(shape), self._held.get(name)
        if held is None or held.dtype != dtype or held.numel() < size:
            held = torch.empty(size, dtype=dtype, device=like.device)
            if self._reuse:
                self._held[name] = held
        return held[:size].view(shape)


FRESH = Space(reuse=False)
