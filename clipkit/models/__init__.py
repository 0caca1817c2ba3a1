"""Models: two towers that embed pictures and texts into one space, and how they are built, saved and loaded.

`load_model` is the way in for a model that exists, `build_model` for one that is to be trained.
"""

from clipkit.models.build import build_model
from clipkit.models.dual_encoder import DualEncoder, ModelConfig
from clipkit.models.folder import save_model
from clipkit.models.pretrained import load_model

__all__ = ["DualEncoder", "ModelConfig", "build_model", "load_model", "save_model"]
