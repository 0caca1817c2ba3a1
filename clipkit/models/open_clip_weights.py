"""open_clip's models with their weights: names checked first, every failure told apart.

open_clip reports an unknown name, a failed download and weights that do not fit with the same exception, and
only warns where weights trained with QuickGELU meet a model without it, which then embeds wrongly. Here each
has its own error, and the activation follows the weights.
"""

import difflib
import pickle
import warnings
from pathlib import Path
from typing import Any

from clipkit.errors import ArtifactError, ConfigError, DependencyError, NotFoundError

SCHEMES = ("hf-hub:", "local-dir:")


def create_open_clip(architecture: str, weights: str | None) -> Any:
    """open_clip's model with its weights, every failure told apart."""
    import open_clip

    if not architecture.startswith(SCHEMES):
        _check_names(architecture, weights)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            return open_clip.create_model(
                architecture,
                pretrained=weights,
                force_custom_text=True,
                force_quick_gelu=wants_quick_gelu(architecture, weights),
                require_pretrained=True,
            )
    except (FileNotFoundError, OSError) as error:
        raise NotFoundError(f"open_clip {architecture!r}: {_one_line(error)}") from error
    except (RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ArtifactError(f"open_clip {architecture!r}: cannot be loaded: {_one_line(error)}") from error


def _check_names(architecture: str, weights: str | None) -> None:
    """Refuse an unknown architecture or tag before open_clip starts, and download a tag's weights."""
    import open_clip

    if architecture not in open_clip.list_models():
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=6, cutoff=0.4)
        raise NotFoundError(
            f"open_clip has no model {architecture!r}", hint=f"near: {', '.join(near) or 'none'}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not weights:
        raise ConfigError(
            f"open_clip:{architecture}: say which weights",
            hint=f"add /TAG or /WEIGHTS_FILE; known tags: {', '.join(tags) or 'none'}",
        )
    pretrained = open_clip.get_pretrained_cfg(architecture, weights)
    if not pretrained and not Path(weights).is_file():
        raise NotFoundError(
            f"open_clip:{architecture} has no weights {weights!r}, and no such file exists",
            hint=f"known: {', '.join(tags) or 'none'}",
        )
    if pretrained:
        try:
            open_clip.download_pretrained(pretrained)
        except (OSError, RuntimeError, ValueError) as error:
            raise DependencyError(
                f"cannot download the weights open_clip:{architecture}/{weights}: {_one_line(error)}",
                hint=f"without a network, fetch the file elsewhere and give open_clip:{architecture}/PATH",
            ) from error


def wants_quick_gelu(architecture: str, weights: str | None) -> bool:
    """Whether these weights were trained with QuickGELU: open_clip itself only warns, and embeds wrongly."""
    import open_clip

    if not weights or architecture.startswith(SCHEMES):
        return False
    return bool(open_clip.get_pretrained_cfg(architecture, weights).get("quick_gelu", False))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
