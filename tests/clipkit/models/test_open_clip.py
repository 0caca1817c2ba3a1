"""Models in open_clip's format, small and random, embed as open_clip does itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from clipkit.errors import ArtifactError, ConfigError, DependencyError, NotFoundError
from clipkit.images import Preprocess
from clipkit.models import ModelConfig, build_model, load_model, save_model

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TEXTS = ["a photo of a cat", "two dogs on a very long and winding road to nowhere", "!", "x " * 200]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "clipkit-tiny": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    "clipkit-tiny-quickgelu": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "clipkit-tiny-resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        "text_cfg": TEXT,
    },
    "clipkit-tiny-sigmoid": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True, "width": 24},
    },
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small architectures known to open_clip, each with a checkpoint as open_clip writes it."""
    folder = tmp_path_factory.mktemp("zoo")
    for name, architecture in ARCHITECTURES.items():
        (folder / f"{name}.json").write_text(json.dumps(architecture))
        open_clip.add_model_config(folder / f"{name}.json")
    return folder


def reference(name: str, zoo: Path, seed: int = 0) -> tuple[Any, Path]:
    """open_clip's own model and the file of its weights."""
    torch.manual_seed(seed)
    model = open_clip.create_model(name)
    path = zoo / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return model.eval(), path


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "sigmoid" not in name])
def test_embeddings_and_logits_equal_open_clip(name: str, zoo: Path, tmp_path: Path) -> None:
    theirs, weights = reference(name, zoo)
    ours = load_model(f"open_clip:{name}/{weights}")
    size = ARCHITECTURES[name]["vision_cfg"]["image_size"]
    pixels = torch.rand(3, 3, size, size)
    ids = open_clip.get_tokenizer(name)(TEXTS)
    with torch.no_grad():
        image, text = theirs.encode_image(pixels, normalize=True), theirs.encode_text(ids, normalize=True)
        logits = theirs.get_logits(pixels, ids)[0]
        image_ND, text_ND, scale, bias = ours(pixels, ids)
    assert torch.equal(ours.tokenizer.encode(TEXTS), ids)
    torch.testing.assert_close(image_ND, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_ND, text, atol=1e-5, rtol=0)
    torch.testing.assert_close(scale * image_ND @ text_ND.T, logits, atol=1e-4, rtol=0)
    assert bias is None
    assert ours.scoring == "softmax"
    save_model(ours, tmp_path / "model")
    again = load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(pixels, ids)[0], image_ND)
        assert torch.equal(again(pixels, ids)[1], text_ND)
    assert again.fingerprint == ours.fingerprint


def test_a_model_with_timm_tower_sigmoid_and_bias_equals_open_clip(zoo: Path, tmp_path: Path) -> None:
    name = "clipkit-tiny-sigmoid"
    theirs, weights = reference(name, zoo)
    with torch.no_grad():
        theirs.logit_bias.fill_(-9.25)
        theirs.logit_scale.fill_(2.75)
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, weights)
    ours = load_model(f"open_clip:{name}/{weights}")
    pixels, ids = torch.rand(2, 3, 160, 160), ours.tokenizer.encode(TEXTS)
    assert torch.equal(ids, open_clip.get_tokenizer(name)(TEXTS))
    with torch.no_grad():
        image_ND, text_ND, scale, bias = ours(pixels, ids)
        logits = theirs.get_logits(pixels, ids)[0]
    assert bias is not None
    assert ours.scoring == "sigmoid"
    torch.testing.assert_close(scale * image_ND @ text_ND.T + bias, logits, atol=1e-5, rtol=0)
    assert ours.tokenize(["a"]).shape == (1, 77), "not causal: nothing may be trimmed"
    save_model(ours, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert (again.fingerprint, again.bias) == (ours.fingerprint, ours.bias)


def test_a_local_folder_with_its_own_tokenizer_equals_open_clip(
    siglip_tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(siglip_tokenizer_folder, folder)
    text = {**TEXT, "context_length": 16, "vocab_size": 64, "no_causal_mask": True, "pool_type": "last"}
    text |= {"hf_tokenizer_name": "somewhere/else", "tokenizer_kwargs": {"clean": "canonicalize"}}
    architecture = {"embed_dim": 24, "init_logit_bias": -10, "vision_cfg": VISION, "text_cfg": text}
    preprocess = {"size": 32, "resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {**architecture, "custom_text": True}, "preprocess_cfg": preprocess})
    )
    torch.manual_seed(1)
    theirs = open_clip.CustomTextCLIP(**architecture).eval()
    save_file(
        {k: v.contiguous() for k, v in theirs.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    ours = load_model(f"open_clip:local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels, texts = torch.rand(2, 3, 32, 32), ["A cat, a dog!", "zebra"]
    assert torch.equal(ours.tokenizer.encode(texts), tokenizer(texts))
    with torch.no_grad():
        image, label = (
            theirs.encode_image(pixels, normalize=True),
            theirs.encode_text(tokenizer(texts), normalize=True),
        )
        image_ND, text_ND, _, _ = ours(pixels, tokenizer(texts))
    torch.testing.assert_close(image_ND, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_ND, label, atol=1e-5, rtol=0)
    assert ours.preprocess.resize == "squash"
    assert ours.preprocess.mean == (0.5, 0.5, 0.5)
    save_model(ours, tmp_path / "model")
    shutil.rmtree(folder)
    again = load_model(tmp_path / "model")
    assert again.fingerprint == ours.fingerprint
    with torch.no_grad():
        assert torch.equal(again.encode_text(again.tokenize(texts)), text_ND)


def test_a_text_tower_from_transformers_equals_open_clip(
    siglip_tokenizer_folder: Path, tmp_path: Path, zoo: Path
) -> None:
    bert = tmp_path / "bert"
    shutil.copytree(siglip_tokenizer_folder, bert)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    transformers.RobertaConfig(vocab_size=64, max_position_embeddings=40, **sizes).save_pretrained(bert)
    text = {"hf_model_name": str(bert), "hf_tokenizer_name": str(bert), "hf_model_pretrained": False}
    text |= {"context_length": 16, "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
    name = "clipkit-tiny-roberta"
    architecture = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": text}
    (zoo / f"{name}.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(zoo / f"{name}.json")
    torch.manual_seed(0)
    theirs: Any = open_clip.create_model(name, pretrained_text=False).eval()
    weights = tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, weights)
    ours = load_model(f"open_clip:{name}/{weights}")
    ids = ours.tokenizer.encode(["a cat", "a dog and a cat"])
    with torch.no_grad():
        expected = theirs.encode_text(ids, normalize=True)
        torch.testing.assert_close(ours.encode_text(ids), expected, atol=1e-5, rtol=0)
    save_model(ours, tmp_path / "model")
    shutil.rmtree(bert)
    again = load_model(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(
            again.encode_text(again.tokenize(["a cat"])), expected[:1], atol=1e-5, rtol=0
        )


def test_trimming_changes_nothing(zoo: Path) -> None:
    theirs, weights = reference("clipkit-tiny", zoo)
    ours = load_model(f"open_clip:clipkit-tiny/{weights}")
    short = TEXTS[:3]
    assert ours.tokenize(short).shape[1] < 77
    with torch.no_grad():
        expected = theirs.encode_text(open_clip.get_tokenizer("clipkit-tiny")(short), normalize=True)
        torch.testing.assert_close(ours.encode_text(ours.tokenize(short)), expected, atol=1e-5, rtol=0)


def test_pictures_are_preprocessed_as_by_open_clip(zoo: Path) -> None:
    _, weights = reference("clipkit-tiny", zoo)
    ours = load_model(f"open_clip:clipkit-tiny/{weights}")
    loaded: Any = open_clip.create_model_from_pretrained("clipkit-tiny", pretrained=str(weights))
    transform = loaded[1]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    torch.testing.assert_close(ours.preprocess([image])[0], transform(image), atol=1e-6, rtol=0)


def test_torch_checkpoints_of_the_trainer_load_without_running_code(zoo: Path, tmp_path: Path) -> None:
    theirs, weights = reference("clipkit-tiny", zoo)
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "epoch_1.pt")
    ours = load_model(f"open_clip:clipkit-tiny/{tmp_path / 'epoch_1.pt'}")
    assert ours.fingerprint == load_model(f"open_clip:clipkit-tiny/{weights}").fingerprint
    torch.save({"state_dict": Path("evil")}, tmp_path / "evil.pt")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_model(f"open_clip:clipkit-tiny/{tmp_path / 'evil.pt'}")


def test_unknown_names_are_told_apart(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no model 'ViT-B-33'.*near: .*ViT-B-32"):
        load_model("open_clip:ViT-B-33/openai")
    with pytest.raises(NotFoundError, match=r"no weights 'laion9b'.*known: .*laion2b_s34b_b79k"):
        load_model("open_clip:ViT-B-32/laion9b")
    with pytest.raises(ConfigError, match=r"say which weights.*laion2b_s34b_b79k"):
        load_model("open_clip:ViT-B-32")
    with pytest.raises(NotFoundError, match="local-dir"):
        load_model(f"open_clip:local-dir:{tmp_path / 'nowhere'}")


def test_weights_of_another_architecture_are_refused(zoo: Path) -> None:
    _, weights = reference("clipkit-tiny-resnet", zoo)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_model(f"open_clip:clipkit-tiny/{weights}")


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(DependencyError, match=r"cannot download.*unreachable.*give open_clip:ViT-B-32/PATH"):
        load_model("open_clip:ViT-B-32/laion2b_s34b_b79k")


def test_weights_trained_with_quick_gelu_get_it(monkeypatch: pytest.MonkeyPatch, zoo: Path) -> None:
    from clipkit.models import open_clip_weights

    assert open_clip_weights.wants_quick_gelu("ViT-B-32", "openai")
    assert not open_clip_weights.wants_quick_gelu("ViT-B-32", "laion2b_s34b_b79k")
    assert not open_clip_weights.wants_quick_gelu("ViT-B-32", "/some/file.safetensors")


def test_towers_alone_in_a_recipe(zoo: Path) -> None:
    image = {"name": "open_clip", "model": "clipkit-tiny"}
    text = {"name": "open_clip", "model": "clipkit-tiny"}
    small = {"name": "transformer", "width": 16, "layers": 1, "heads": 2}
    size = Preprocess(size=32)
    mixed = build_model(ModelConfig(image=image, text=small, dim=40, preprocess=size))
    assert mixed.image_projection.weight.shape == (40, 24)
    same = build_model(ModelConfig(image=image, text=text, dim=24, preprocess=size))
    assert isinstance(same.image_projection, torch.nn.Identity), "it ends in a projection of that width"
    assert same.config.image["vision_cfg"]["width"] == 64, "the architecture is kept, not only its name"
    with pytest.raises(ConfigError, match="takes pictures of 32 pixels, not 224"):
        build_model(ModelConfig(image=image, text=text))
    with pytest.raises(ConfigError, match="no model 'clipkit-none'"):
        build_model(ModelConfig(image={"name": "open_clip", "model": "clipkit-none"}, text=text))
    long = {"name": "clip", "context_length": 100}
    with pytest.raises(ConfigError, match="takes 77 tokens, the tokenizer gives 100"):
        build_model(ModelConfig(image=image, text=text, preprocess=size, tokenizer=long))
