"""State that contrastive methods keep outside of the loss: modules, all of it in buffers."""

from clipkit.state.bank import Bank
from clipkit.state.ema import Ema, cosine_decay
from clipkit.state.queue import Queue

__all__ = ["Bank", "Ema", "Queue", "cosine_decay"]
