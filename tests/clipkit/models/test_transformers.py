"""CLIP and SigLIP models in transformers' format, small and random, embed as transformers does itself."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from clipkit.errors import ArtifactError, ConfigError, DependencyError, NotFoundError
from clipkit.images import Preprocess
from clipkit.models import ModelConfig, build_model, load_model, save_model
from clipkit.zero_shot import ZeroShotClassifier

TEXTS = ["a photo of a cat", "two dogs on a very long and winding road to nowhere", "!", "a", "cat " * 40]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}


def copy_tokenizer(source: Path, target: Path) -> Any:
    shutil.copytree(source, target, dirs_exist_ok=True)
    return transformers.AutoTokenizer.from_pretrained(target)


@pytest.fixture(scope="module")
def clip_folder(clip_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel as `save_pretrained` writes it, with tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = copy_tokenizer(clip_tokenizer_folder, folder)
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = transformers.CLIPConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer), **special},
        vision_config=VISION,
        projection_dim=16,
        logit_scale_init_value=3.21,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip_folder(siglip_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SiglipModel as `save_pretrained` writes it, with tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("siglip")
    tokenizer = copy_tokenizer(siglip_tokenizer_folder, folder)
    text = {**TEXT, "vocab_size": len(tokenizer), "projection_size": 32, "max_position_embeddings": 64}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    torch.manual_seed(0)
    model = transformers.SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
        model.logit_bias.fill_(-9.5)
    model.save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_and_logits_equal_transformers(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_folder")
    ours = load_model(f"hf:{folder}")
    theirs: Any = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pixels = torch.rand(3, 3, 32, 32)
    length = ours.tokenizer.context_length
    inputs = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, **inputs)
        image_ND, text_ND, scale, bias = ours(pixels, ours.tokenizer.encode(TEXTS))
        logits = scale * image_ND @ text_ND.T + (0 if bias is None else bias)
        features = theirs.get_text_features(**inputs).pooler_output
    assert torch.equal(ours.tokenizer.encode(TEXTS), inputs["input_ids"])
    torch.testing.assert_close(image_ND, expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_ND, expected.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_ND, features / features.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected.logits_per_image, atol=1e-4, rtol=0)
    assert torch.equal(scale, theirs.logit_scale.detach().exp().reshape(()))
    assert ours.scoring == ("sigmoid" if kind == "siglip" else "softmax")
    assert (bias is None) == (kind == "clip")
    save_model(ours, tmp_path / "model")
    again = load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(pixels, ours.tokenizer.encode(TEXTS))[0], image_ND)
        assert torch.equal(again(pixels, again.tokenizer.encode(TEXTS))[1], text_ND)
    assert again.fingerprint == ours.fingerprint


def test_clip_is_trimmed_exactly_although_its_padding_is_its_end_token(clip_folder: Path) -> None:
    ours = load_model(f"hf:{clip_folder}")
    theirs: Any = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    short = ["a", "cat"]
    ids = ours.tokenizer.encode(short)
    assert ours.tokenize(short).shape[1] < ids.shape[1]
    assert ours.tokenizer.pad_id == ours.tokenizer.eos_id
    with torch.no_grad():
        features = theirs.get_text_features(ids).pooler_output
        text_ND = ours.encode_text(ours.tokenize(short))
    torch.testing.assert_close(text_ND, features / features.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


def test_siglip_is_never_trimmed(siglip_folder: Path) -> None:
    assert load_model(f"hf:{siglip_folder}").tokenize(["a"]).shape == (1, 64)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pictures_are_preprocessed_as_by_transformers(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_folder")
    ours = load_model(f"hf:{folder}")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    rows = np.linspace(0, 255, 50)[:, None, None] + np.linspace(0, 100, 70)[None, :, None] + np.zeros(3)
    image = Image.fromarray((rows % 256).clip(0, 255).astype(np.uint8))
    expected = processor(image, return_tensors="pt")["pixel_values"]
    _, std = ours.preprocess.statistics()
    levels = ((ours.preprocess([image]) - expected) * std * 255).abs()
    assert levels.max() < 3.1, "Pillow's and torchvision's bicubic differ by rounding"
    assert levels.mean() < 0.5


def test_chinese_clip_equals_transformers(siglip_tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chinese"
    tokenizer = copy_tokenizer(siglip_tokenizer_folder, folder)
    config = transformers.ChineseCLIPConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config=VISION,
        projection_dim=16,
    )
    torch.manual_seed(0)
    theirs: Any = transformers.ChineseCLIPModel(config).eval()
    theirs.save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    ours = load_model(f"hf:{folder}")
    assert ours.tokenizer.pad_id == ours.tokenizer.eos_id
    ids = ours.tokenize(["a cat", "two dogs"])
    mask = ours.text._mask(ids)  # type: ignore[operator, union-attr]
    assert mask.sum(dim=1).tolist() == [
        len(tokenizer("a cat").input_ids),
        len(tokenizer("two dogs").input_ids),
    ]
    with torch.no_grad():
        features: Any = theirs.get_text_features(ids, attention_mask=mask).pooler_output
        text_ND = ours.encode_text(ids)
    torch.testing.assert_close(text_ND, features / features.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    save_model(ours, tmp_path / "model")
    assert load_model(tmp_path / "model").fingerprint == ours.fingerprint


def bert(folder: Path, tokenizer: Any) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)
    torch.manual_seed(4)
    transformers.BertModel(config).save_pretrained(folder)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "auto"])
def test_any_text_model_as_a_tower(pooling: str, siglip_tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    bert(folder, copy_tokenizer(siglip_tokenizer_folder, folder))
    config = ModelConfig(
        image={"name": "cnn", "widths": [8], "depths": [1]},
        text={"name": "hf", "model": str(folder), "pretrained": True, "pooling": pooling},
        dim=8,
        preprocess=Preprocess(size=16),
        tokenizer={"name": "hf", "source": str(folder), "context_length": 24},
    )
    model = build_model(config, seed=0).eval()
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    ids = model.tokenizer.encode(["a cat"])
    count = len(transformers.AutoTokenizer.from_pretrained(folder)("a cat").input_ids)
    with torch.no_grad():
        states = theirs(ids[:, :count]).last_hidden_state[0]
        pooled = {"cls": states[0], "last": states[-1]}.get(pooling, states.mean(dim=0))
        torch.testing.assert_close(model.text(ids)[0], pooled, atol=1e-5, rtol=0)
        embedded = model.encode_text(model.tokenize(["a cat"]))
    model.train()
    model(torch.rand(1, 3, 16, 16), ids)[1].sum().backward()
    used = [p.grad is not None for p in model.text.parameters() if p.requires_grad]
    assert all(used), "no parameter without a gradient: distributed training needs that"
    save_model(model, tmp_path / "model")
    shutil.rmtree(folder)
    again = load_model(tmp_path / "model")
    assert again.config.text["pretrained"] is False
    with torch.no_grad():
        torch.testing.assert_close(again.encode_text(again.tokenize(["a cat"])), embedded, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["auto", "cls", "mean"])
def test_any_vision_model_as_a_tower(pooling: str) -> None:
    vision = {key: value for key, value in VISION.items() if key != "projection_dim"}
    config = ModelConfig(
        image={"name": "hf", "config": {"model_type": "vit", **vision}, "pooling": pooling},
        text={"name": "transformer", "width": 16, "layers": 1, "heads": 2},
        dim=8,
        preprocess=Preprocess(size=32),
    )
    model = build_model(config)
    model(torch.rand(2, 3, 32, 32), model.tokenize(["a", "b"]))[0].sum().backward()
    assert all(p.grad is not None for p in model.image.parameters())
    with pytest.raises(ConfigError, match="takes pictures of 32 pixels, not 224"):
        build_model(config.model_copy(update={"preprocess": Preprocess()}))


def test_faults_are_told_apart(clip_folder: Path, siglip_tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        load_model(f"hf:{tmp_path / 'nothing'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="model_type"):
        load_model(f"hf:{tmp_path / 'empty'}")
    bert(tmp_path / "bert", copy_tokenizer(siglip_tokenizer_folder, tmp_path / "bert"))
    with pytest.raises(ConfigError, match=r"is a 'bert' model.*clip, siglip"):
        load_model(f"hf:{tmp_path / 'bert'}")
    broken = tmp_path / "broken"
    shutil.copytree(clip_folder, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_model(f"hf:{broken}")
    (broken / "model.safetensors").write_bytes(weights)
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ArtifactError, match="lack"):
        load_model(f"hf:{broken}")
    (broken / "config.json").write_text(config.replace('"projection_dim": 16', '"projection_dim": 17'))
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_model(f"hf:{broken}")


def test_a_name_that_cannot_be_downloaded_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(DependencyError, match=r"couldn't connect.*give a folder"):
        load_model("hf:openai/clip-vit-base-patch32")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_zero_shot_equals_transformers_pipeline(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_folder")
    # the picture has the model's size already, so that the two bicubics do not matter
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    labels, template = ["a cat", "a dog", "zebra"], "a photo of {}"
    pipeline: Any = transformers.pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    expected = pipeline(
        image,
        candidate_labels=labels,
        hypothesis_template=template,
    )
    ours = ZeroShotClassifier(f"hf:{folder}", labels, [template]).classify([image])[0]
    assert [item["label"] for item in ours] == [item["label"] for item in expected]
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)
