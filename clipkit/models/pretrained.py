"""`load_model`: one name for a model folder of ours, an open_clip model or a transformers model.

Both libraries' two-tower models are taken apart into our towers, with their own projections, temperature,
bias, preprocessing and tokenizer, so that embeddings and logits equal theirs; the result is a `DualEncoder`
like any other and can be saved as a model folder, which then loads without a network.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.errors import ArtifactError, ConfigError, NotFoundError
from clipkit.files import model_folder
from clipkit.images import Interpolation, Preprocess
from clipkit.models.dual_encoder import DualEncoder, ModelConfig
from clipkit.models.encoder import Encoder, EncoderConfig
from clipkit.models.folder import load_folder
from clipkit.models.open_clip_weights import SCHEMES, create_open_clip, wants_quick_gelu
from clipkit.models.towers_hf import HFImage, HFText, portable_config, transformers_errors
from clipkit.models.towers_open_clip import OpenClipImage, OpenClipText, square
from clipkit.text import Tokenizer, build_tokenizer

KINDS = {"image": "pictures", "text": "texts", "graph": "graphs"}
_HF_KINDS = ("clip", "siglip", "metaclip_2", "chinese_clip")
_RESAMPLING: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}


def load_model(name: str | Path, device: torch.device | str | None = None) -> DualEncoder:
    """An image-text model with its weights, in eval mode.

    Args:
        name: A model folder, or the run folder that it is in; `open_clip:NAME/TAG` (or a weights file for
            TAG); `hf:NAME` or `hf:FOLDER` of a CLIP, SigLIP, MetaCLIP 2 or Chinese-CLIP model in
            transformers' format.
        device: Where to put it; the CPU by default, with "auto" a GPU if there is one.

    Raises:
        NotFoundError: An unknown name, or no such folder or file.
        DependencyError: Files that are neither here nor can be downloaded.
        ArtifactError: Files that are damaged or do not fit together, or an encoder alone.
        ConfigError: A model of a kind that clipkit does not have, or a wrong device.
    """
    target = _device(device)
    model = load_any(name)
    if isinstance(model, Encoder):
        raise ArtifactError(
            f"{name} encodes {KINDS[model.modality]} alone: it is no image-text model",
            hint="it can be judged and exported: clipkit evaluate, clipkit export",
        )
    return model.to(target)


def load_encoder(name: str | Path, device: torch.device | str | None = None) -> Encoder:
    """One encoder with its weights, in eval mode.

    Args:
        name: The folder of an encoder; or any name that `load_model` takes, whose image tower it then is,
            without the projection.
        device: As `load_model`.

    Raises:
        NotFoundError, DependencyError, ArtifactError, ConfigError: As `load_model`.
    """
    target = _device(device)
    model = load_any(name)
    if isinstance(model, DualEncoder):
        model = image_encoder(model)
    return model.to(target)


def image_encoder(model: DualEncoder) -> Encoder:
    """The image tower of an image-text model as an encoder; they share the weights."""
    config = EncoderConfig(tower=model.config.image, preprocess=model.preprocess)
    return Encoder(model.image, config).train(model.training)


def load_any(name: str | Path) -> DualEncoder | Encoder:
    """The model of that name, of whatever kind, on the CPU and in eval mode. Raises: as `load_model`."""
    text = str(name)
    if text.startswith("open_clip:"):
        return load_open_clip(text.removeprefix("open_clip:"))
    if text.startswith("hf:"):
        return load_hf(text.removeprefix("hf:"))
    return _load_folder(name)


def _load_folder(name: str | Path) -> DualEncoder | Encoder:
    if not Path(name).is_dir():
        raise NotFoundError(
            f"no such model folder: {name}", hint="or name one: open_clip:ViT-B-32/laion2b_s34b_b79k, hf:NAME"
        )
    return load_folder(model_folder(name))


def _device(device: torch.device | str | None) -> torch.device:
    if device is None or device == "auto":
        device = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"unknown device {device!r}", hint="for example auto, cpu, cuda or cuda:1"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: no GPU that torch can use", hint="use cpu")
    return found


def load_open_clip(name: str) -> DualEncoder:
    """The open_clip model `NAME/TAG`, `NAME/WEIGHTS_FILE`, `local-dir:FOLDER` or `hf-hub:NAME`."""
    import open_clip

    architecture, weights = name, None
    if not name.startswith(SCHEMES):
        architecture, _, weights = name.partition("/")
        weights = _home(weights)
    theirs = create_open_clip(architecture, weights)
    found: dict[str, Any] = open_clip.get_model_config(architecture) or {}
    vision_cfg, text_cfg = dict(found["vision_cfg"]), dict(found["text_cfg"])
    shared = {
        "name": "open_clip",
        "model": None if architecture.startswith(SCHEMES) else architecture,
        "pretrained": None,
        "embed_dim": found["embed_dim"],
        "quick_gelu": found.get("quick_gelu", False) or wants_quick_gelu(architecture, weights),
    }
    hf_config = portable_config(theirs.text.config) if text_cfg.get("hf_model_name") else None
    tokenizer = _open_clip_tokenizer(architecture, text_cfg)
    config = ModelConfig(
        image={**shared, "vision_cfg": {**vision_cfg, "timm_model_pretrained": False}},
        text={**shared, "text_cfg": text_cfg, "hf_config": hf_config},
        dim=None,
        preprocess=_open_clip_preprocess(theirs.visual.preprocess_cfg),
        tokenizer=tokenizer.config(),
        scoring="softmax" if theirs.logit_bias is None else "sigmoid",
    )
    width = int(found["embed_dim"])
    image, text = OpenClipImage(theirs.visual, width), OpenClipText(theirs.text, width)
    return _assembled(image, text, config, tokenizer, theirs.logit_scale, theirs.logit_bias)


def _open_clip_tokenizer(architecture: str, text_cfg: dict[str, Any]) -> Tokenizer:
    """The tokenizer that open_clip takes for a model, as one of ours."""
    length = text_cfg.get("context_length", 77)
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    source = text_cfg.get("hf_tokenizer_name")
    if not source:
        return build_tokenizer({"name": "clip", "context_length": length, **options})
    if architecture.startswith("local-dir:"):
        source = architecture.removeprefix("local-dir:")
    mode = text_cfg.get("tokenizer_mode")
    return build_tokenizer(
        {"name": "open_clip", "source": source, "context_length": length, "mode": mode, "options": options}
    )


def _open_clip_preprocess(found: dict[str, Any]) -> Preprocess:
    rule, interpolation = found["resize_mode"], found["interpolation"]
    if rule not in ("shortest", "squash"):
        raise ConfigError(f"preprocessing with resize {rule!r} is not supported")
    return Preprocess(
        size=square(found["size"]),
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
        resize=rule,
    )


def load_hf(source: str) -> DualEncoder:
    """The CLIP, SigLIP, MetaCLIP 2 or Chinese-CLIP model that a name or folder of transformers holds."""
    import transformers

    source = _home(source)
    with transformers_errors(source):
        settings: Any = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind = settings.model_type
        if kind not in _HF_KINDS:
            raise ConfigError(
                f"hf:{source} is a {kind!r} model", hint=f"clipkit loads {', '.join(_HF_KINDS)} models"
            )
        theirs, report = transformers.AutoModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        if report["missing_keys"]:
            raise RuntimeError(f"the weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
        processor = transformers.AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    length = settings.text_config.max_position_embeddings
    tokenizer = build_tokenizer({"name": "hf", "source": source, "context_length": length})
    preprocess = _hf_preprocess(processor)
    sigmoid = kind == "siglip"
    pooling = "cls" if kind == "chinese_clip" else "auto"
    width = None if sigmoid else settings.projection_dim
    shared = {"name": "hf", "model": None, "pretrained": False, "projection": width}
    config = ModelConfig(
        image={**shared, "config": portable_config(settings.vision_config), "pooling": "auto"},
        text={**shared, "config": portable_config(settings.text_config), "pooling": pooling},
        dim=None,
        preprocess=preprocess,
        tokenizer=tokenizer.config(),
        scoring="sigmoid" if sigmoid else "softmax",
    )
    image = HFImage(theirs.vision_model, "auto", getattr(theirs, "visual_projection", None), preprocess.size)
    text = HFText(
        theirs.text_model,
        pooling,
        getattr(theirs, "text_projection", None),
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    return _assembled(image, text, config, tokenizer, theirs.logit_scale, getattr(theirs, "logit_bias", None))


def _hf_preprocess(processor: Any) -> Preprocess:
    """transformers' image processor as our preprocessing. Raises: ConfigError where ours has no such rule."""
    size = dict(processor.size)
    short = size.get("shortest_edge")
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else {}
    interpolation = _RESAMPLING.get(int(processor.resample))
    squashed = (size.get("height"), size.get("width"))
    if interpolation is None or not processor.do_resize or (short is None and crop):
        raise ConfigError(
            f"preprocessing of kind {type(processor).__name__} with size {size} is not supported"
        )
    side = square([crop["height"], crop["width"]]) if short else square([side or 0 for side in squashed])
    normalised = processor.do_normalize
    return Preprocess(
        size=side,
        mean=tuple(processor.image_mean) if normalised else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normalised else (1.0, 1.0, 1.0),
        interpolation=interpolation,
        resize="shortest" if short else "squash",
        resize_size=short if short and short != side else None,
    )


def _home(path: str) -> str:
    """A leading `~`, which no shell expands after a prefix."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _assembled(
    image: nn.Module,
    text: nn.Module,
    config: ModelConfig,
    tokenizer: Tokenizer,
    log_scale: Tensor,
    bias: Tensor | None,
) -> DualEncoder:
    """A model of ours from loaded towers, with exactly their temperature and bias."""
    if bias is not None:
        config = config.model_copy(update={"init_bias": float(bias.detach().reshape(()))})
    model = DualEncoder(image, text, config, tokenizer)
    with torch.no_grad():
        model.log_scale.copy_(log_scale.detach().reshape(()))
    return model.eval()
