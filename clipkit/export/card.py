"""The card of an exported backbone: what it is, where it came from, what it wants to see, how to load it.

The code in it is complete: run in the folder, it builds the model.
"""

from collections.abc import Mapping
from typing import Any

from clipkit.export.backbone import Backbone, Target

_TITLES = {"timm": "timm", "torchvision": "torchvision", "detection": "torchvision's detectors"}

_CARD = """\
# {name} for {title}

A backbone without a classifier: pictures (N, 3, {size}, {size}) in, features (N, {features}) out.
{note}
## Where it came from

| | |
|---|---|
{source}

## What it wants to see

RGB, {size} × {size} pixels ({resize}; {interpolation} with antialiasing), values in [0, 1] less the mean and
divided by the standard deviation:

- mean {mean}
- std {std}

## Loading

In this folder:

```python
{code}```
"""

_NOTE = """
Its stem is one for small pictures: a 3×3 convolution of stride 1 and no pooling. Neither timm nor torchvision
has such a stem, so the code below puts it in before it loads the weights.{strides}
"""

_FOLDER = """\
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()
"""

_CODE = {
    "timm": """\
import timm
from safetensors.torch import load_file
{imports}
model = timm.create_model("{name}", num_classes=0)
{stem}model.load_state_dict(load_file("model.safetensors"))
model.eval()
""",
    "torchvision": """\
from safetensors.torch import load_file
from torch import nn
from torchvision import models

model = models.get_model("{name}", weights=None)
{stem}model.fc = nn.Identity()
model.load_state_dict(load_file("model.safetensors"))
model.eval()
""",
    "detection": """\
from safetensors.torch import load_file
{imports}from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

backbone = resnet_fpn_backbone(backbone_name="{name}", weights=None, trainable_layers=3)
{stem}loaded = backbone.load_state_dict(load_file("model.safetensors"), strict=False)
assert not loaded.unexpected_keys and all(key.startswith("fpn.") for key in loaded.missing_keys)
model = FasterRCNN(
    backbone,
    num_classes=91,
    image_mean={mean},
    image_std={std},
)
""",
}

_STEM = """\
{module}.conv1 = nn.Conv2d(3, {channels}, 3, stride=1, padding=1, bias=False){frozen}
{module}.maxpool = nn.Identity()
"""


def card(backbone: Backbone, target: Target, source: Mapping[str, Any]) -> str:
    """README.md of an export.

    Args:
        backbone: What is exported.
        target: For which library.
        source: Where it came from, JSON values by name.
    """
    look, small = backbone.preprocess, backbone.stem is not None
    words: dict[str, Any] = {
        "name": backbone.architecture,
        "title": _TITLES[target],
        "size": look.size,
        "features": backbone.tower.width,
        "interpolation": look.interpolation,
        "mean": list(look.mean),
        "std": list(look.std),
        "resize": "both sides scaled to it"
        if look.resize == "squash"
        else f"the short side scaled to {look.resize_size or look.size}, the centre cut out",
        "source": "\n".join(f"| {name} | {_words(value)} |" for name, value in source.items()),
        "strides": " Its maps have strides 1, 2, 4 and 8, a fourth of a common detector's."
        if target == "detection"
        else "",
        "imports": "from torch import nn\n" if small else "",
        "stem": "",
        "module": "backbone.body" if target == "detection" else "model",
        "channels": backbone.stem,
        "frozen": ".requires_grad_(False)" if target == "detection" else "",  # trainable_layers=3 is past it
    }
    if small:
        words["stem"] = _STEM.format(**words)
    code = _FOLDER if target == "timm" and not small else _CODE[target].format(**words)
    return _CARD.format(**words, note=_NOTE.format(**words) if small else "", code=code)


def _words(value: Any) -> str:
    text = ", ".join(f"{key}: {item}" for key, item in value.items()) if isinstance(value, dict) else value
    return " ".join(str(text).split()).replace("|", "\\|")
