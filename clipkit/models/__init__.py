"""Models: two towers in one space, or one on its own, and how they are built, saved and loaded.

`load_model` and `load_encoder` are the ways in for a model that exists, `build_model` for one to be trained.
"""

from clipkit.models.build import build_model, seeded
from clipkit.models.dual_encoder import DualEncoder, ModelConfig
from clipkit.models.encoder import Encoder, EncoderConfig
from clipkit.models.folder import save_model
from clipkit.models.pretrained import load_any, load_encoder, load_model

__all__ = [
    "DualEncoder",
    "Encoder",
    "EncoderConfig",
    "ModelConfig",
    "build_model",
    "load_any",
    "load_encoder",
    "load_model",
    "save_model",
    "seeded",
]
