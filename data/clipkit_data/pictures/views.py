"""Views of a picture: how many, how large and how changed, and the families that papers use.

A `ViewsConfig` is a list of specs; view v of a sample is drawn with key (seed, epoch, sample id, v), v
counted through the specs, so a view does not depend on those beside it.

Every family is a function of the output size alone (None keeps the input's), with the parameters of the
paper or its authors' code at the place that the docstring names. Three things are as in torchvision and the
MoCo codes for all of them: brightness is a factor and contrast turns on the picture's mean grey (the
TensorFlow and JAX codes of SimCLR and BYOL use the mean of each channel, BYOL an offset for brightness), and
a blur mirrors the picture at its border (SimCLR's code pads with black).

Shapes: N pictures, H × W pixels in, S pixels a side out.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError
from torch import Tensor

from clipkit.config import Config, describe, validate
from clipkit.errors import ConfigError
from clipkit_data.pictures.augment import AugmentConfig, augment

_ASPECT = (3 / 4, 4 / 3)


class ViewSpec(Config):
    """Views that are drawn alike.

    Args:
        augment: How they are changed.
        size: Side S in pixels; None keeps the input's height and width.
        count: How many of them.
    """

    augment: AugmentConfig = AugmentConfig()
    size: Annotated[int, Field(ge=1, le=4096)] | None = None
    count: Annotated[int, Field(ge=1)] = 1


class ViewsConfig(Config):
    """All views of a picture, in the order in which a method sees them."""

    views: Annotated[tuple[ViewSpec, ...], Field(min_length=1)]

    @property
    def each(self) -> list[ViewSpec]:
        """One spec per view."""
        return [spec for spec in self.views for _ in range(spec.count)]

    def __len__(self) -> int:
        return len(self.each)


def make_views(
    images_N3HW: Tensor,
    views: ViewsConfig,
    *,
    seed: int,
    epoch_N: np.ndarray,
    id_N: np.ndarray,
    ratio_N: np.ndarray | None = None,
) -> list[Tensor]:
    """Every view of every picture.

    Args:
        images_N3HW: uint8 (N, 3, H, W), on any device.
        views: What the views are.
        seed: The run's seed.
        epoch_N: Epoch of each picture, integers (N,).
        id_N: Sample id of each picture, integers (N,).
        ratio_N: Width / height of each picture before it was squashed; see `augment`.

    Returns:
        For each view uint8 (N, 3, S, S), or (N, 3, H, W) where it has no size, on the same device.
    """
    keys: dict[str, Any] = {"seed": seed, "epoch_N": epoch_N, "id_N": id_N, "ratio_N": ratio_N}
    return [
        augment(images_N3HW, spec.augment, view=view, size=spec.size, **keys)
        for view, spec in enumerate(views.each)
    ]


def _twice(size: int | None, **changes: Any) -> ViewsConfig:
    """Two views that are drawn alike."""
    return ViewsConfig(views=(ViewSpec(augment=AugmentConfig(**changes), size=size, count=2),))


def none(size: int | None = None) -> ViewsConfig:
    """One view, as it is; resized if it has another size."""
    return ViewsConfig(views=(ViewSpec(size=size),))


def clip(size: int | None = None) -> ViewsConfig:
    """One view, of 90 to 100 % of the area, bicubic.

    Source: open_clip, `open_clip/transform.py`, `AugmentationCfg(scale=(0.9, 1.0))`.
    """
    changes = AugmentConfig(area=(0.9, 1), aspect=_ASPECT, interpolation="bicubic")
    return ViewsConfig(views=(ViewSpec(augment=changes, size=size),))


def clip_openai(size: int | None = None) -> ViewsConfig:
    """One view: a random square of the whole short side, which of a square picture is all of it.

    Source: Radford et al. 2021, "Learning transferable visual models from natural language supervision",
    section 2.3: "A random square crop from resized images is the only data augmentation used".
    """
    return ViewsConfig(
        views=(ViewSpec(augment=AugmentConfig(square=True, interpolation="bicubic"), size=size),)
    )


def simclr(size: int | None = None, strength: float = 1.0, blur: float = 0.5) -> ViewsConfig:
    """Two views: crops of 8 to 100 %, strong jitter, grey, blur with a kernel of a tenth of the side.

    For CIFAR-10 the paper takes strength 0.5 and no blur.

    Source: Chen et al. 2020, "A simple framework for contrastive learning of visual representations",
    appendix A and B.9; google-research/simclr, `data_util.py`.
    """
    return _twice(
        size, area=(0.08, 1), aspect=_ASPECT, interpolation="bicubic", flip=0.5, jitter_p=0.8,
        brightness=0.8 * strength, contrast=0.8 * strength, saturation=0.8 * strength, hue=0.2 * strength,
        grayscale=0.2, blur=blur,
    )  # fmt: skip


def moco_v1(size: int | None = None) -> ViewsConfig:
    """Two views: crops of 20 to 100 %, grey before jitter, jitter for every picture, no blur.

    Source: He et al. 2020, "Momentum contrast for unsupervised visual representation learning", section
    3.3; facebookresearch/moco, `main_moco.py` without `--aug-plus`.
    """
    return _twice(
        size, area=(0.2, 1), aspect=_ASPECT, flip=0.5, grayscale=0.2, grayscale_first=True,
        brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4,
    )  # fmt: skip


def moco_v2(size: int | None = None) -> ViewsConfig:
    """Two views: crops of 20 to 100 %, jitter, grey, blur with SimCLR's probabilities.

    The authors' code blurs with Pillow, whose kernel is as wide as the standard deviation needs; ours ends
    at a tenth of the side, which at 224 pixels is 5.5 standard deviations or more to each side.

    Source: Chen et al. 2020, "Improved baselines with momentum contrastive learning";
    facebookresearch/moco, `main_moco.py --aug-plus`.
    """
    return _twice(
        size, area=(0.2, 1), aspect=_ASPECT, flip=0.5, jitter_p=0.8,
        brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5,
    )  # fmt: skip


def simsiam(size: int | None = None) -> ViewsConfig:
    """Two views, drawn as MoCo v2's.

    Source: Chen and He 2021, "Exploring simple Siamese representation learning", appendix
    A; facebookresearch/simsiam, `main_simsiam.py`.
    """
    return moco_v2(size)


def supcon(size: int | None = None) -> ViewsConfig:
    """Two views: crops of 20 to 100 %, jitter, grey, no blur: what the authors' code does for CIFAR.

    Source: Khosla et al. 2020, "Supervised contrastive learning"; HobbitLong/SupContrast, `main_supcon.py`.
    """
    return _twice(
        size, area=(0.2, 1), aspect=_ASPECT, flip=0.5, jitter_p=0.8,
        brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2,
    )  # fmt: skip


def characters(size: int | None = None) -> ViewsConfig:
    """Two views for written characters: moved, turned and stretched a little, cropped, blurred; no mirroring.

    Mirrored, a b is a d. Not from a paper: the papers' families are for photographs.
    """
    return _twice(
        size, area=(0.5, 1), aspect=_ASPECT, rotate=12, shear=10, scale=0.15, translate=0.08,
        brightness=0.3, contrast=0.4, blur=0.5,
    )  # fmt: skip


def _asymmetric(size: int | None, **crop: Any) -> ViewsConfig:
    """BYOL's two views: the first is always blurred, the second seldom, but it may be solarized."""
    both = AugmentConfig(
        aspect=_ASPECT, flip=0.5, jitter_p=0.8,
        brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grayscale=0.2, **crop,
    )  # fmt: skip
    first = both.model_copy(update={"blur": 1.0})
    second = both.model_copy(update={"blur": 0.1, "solarize": 0.2})
    return ViewsConfig(views=(ViewSpec(augment=first, size=size), ViewSpec(augment=second, size=size)))


def byol(size: int | None = None) -> ViewsConfig:
    """Two views of crops of 8 to 100 %, unlike each other: blur 1.0 and 0.1, solarize 0 and 0.2.

    Source: Grill et al. 2020, "Bootstrap your own latent", appendix B, table 6.
    """
    return _asymmetric(size, area=(0.08, 1), interpolation="bicubic")


def moco_v3(size: int | None = None) -> ViewsConfig:
    """BYOL's views from crops of 20 to 100 %, with which the published ResNet-50 was trained.

    The code's default for vision transformers is 8 %, as in `byol`.

    Source: Chen, Xie and He 2021, "An empirical study of training self-supervised vision transformers";
    facebookresearch/moco-v3, `main_moco.py` and `CONFIG.md` (`--crop-min=.2`).
    """
    return _asymmetric(size, area=(0.2, 1))


def multi_crop(size: int | None = None, small: int = 96, smalls: int = 6) -> ViewsConfig:
    """SwAV's two large views of 14 to 100 % and six small ones of 5 to 14 %, with SimCLR's colours.

    Source: Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster
    assignments", appendix A; facebookresearch/swav, `src/multicropdataset.py` (kernel 23 for both sizes).
    """
    colours = {
        "flip": 0.5, "jitter_p": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2,
        "grayscale": 0.2, "blur": 0.5, "blur_kernel": 23,
    }  # fmt: skip
    large, tiny = (
        AugmentConfig.model_validate({"area": area, "aspect": _ASPECT, **colours})
        for area in ((0.14, 1), (0.05, 0.14))
    )
    return ViewsConfig(
        views=(
            ViewSpec(augment=large, size=size, count=2),
            ViewSpec(augment=tiny, size=small, count=smalls),
        )
    )


FAMILIES: Mapping[str, Callable[..., ViewsConfig]] = {
    "none": none,
    "clip": clip,
    "clip_openai": clip_openai,
    "simclr": simclr,
    "moco_v1": moco_v1,
    "moco_v2": moco_v2,
    "moco_v3": moco_v3,
    "byol": byol,
    "simsiam": simsiam,
    "supcon": supcon,
    "characters": characters,
    "multi_crop": multi_crop,
}


def family(name: str, size: int | None = None, **options: float) -> ViewsConfig:
    """The views of a named family.

    Args:
        name: A key of `FAMILIES`.
        size: Side of the (large) views in pixels; None keeps the input's.
        options: Further arguments of the family's function, such as `strength`.

    Raises:
        ConfigError: No family of that name, or one without such an option, or with another value.
    """
    if name not in FAMILIES:
        raise ConfigError(f"unknown family of views {name!r}", hint=f"known are {', '.join(FAMILIES)}")
    known = list(signature(FAMILIES[name]).parameters)
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"views {name!r} have no {unknown[0]!r}", hint=f"they have {', '.join(known)}")
    try:
        return FAMILIES[name](size, **options)
    except ValidationError as error:
        raise ConfigError(f"views {name!r}: {describe(error)}") from error
    except TypeError as error:  # a text where a number is reckoned with
        raise ConfigError(f"views {name!r}: an option is no number: {options}") from error


def views_of(options: Mapping[str, Any]) -> ViewsConfig:
    """The views that a recipe describes: `{"family": NAME, options…}` or `{"views": [specs…]}`.

    Raises:
        ConfigError: They describe none.
    """
    if "family" not in options:
        return validate(ViewsConfig, dict(options), "views")
    rest = dict(options)
    return family(rest.pop("family"), **rest)
