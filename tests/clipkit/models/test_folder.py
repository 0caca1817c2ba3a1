"""The model folder: what is written, read back, and refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipkit.errors import ArtifactError, ConfigError, NotFoundError
from clipkit.files import write_manifest
from clipkit.images import Preprocess
from clipkit.models import DualEncoder, ModelConfig, build_model, load_model, save_model

CONFIG = ModelConfig(
    image={"name": "cnn", "widths": [8, 16], "depths": [1, 1]},
    text={"name": "transformer", "width": 16, "layers": 1, "heads": 2},
    dim=8,
    preprocess=Preprocess(size=16, resize="squash"),
    tokenizer={"name": "clip", "context_length": 16},
    scoring="sigmoid",
)


@pytest.fixture
def model() -> DualEncoder:
    return build_model(CONFIG, seed=1)


def test_round_trip(model: DualEncoder, tmp_path: Path) -> None:
    with torch.no_grad():
        model.log_scale.fill_(1.25)
    save_model(model, tmp_path / "m", name="test", recipe={"steps": 3})
    loaded = load_model(tmp_path / "m")
    assert not loaded.training
    assert loaded.fingerprint == model.fingerprint
    assert loaded.config == model.config
    for (name, ours), (_, theirs) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    manifest = json.loads((tmp_path / "m/clipkit.json").read_text())
    assert manifest["kind"] == "model"
    assert manifest["fingerprint"] == model.fingerprint
    assert (manifest["dim"], manifest["scoring"], manifest["recipe"]) == (8, "sigmoid", {"steps": 3})
    assert set(manifest["files"]) == {"model.safetensors"}


def test_an_existing_folder_is_not_overwritten_unless_asked(model: DualEncoder, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    with pytest.raises(ArtifactError, match="already exists"):
        save_model(model, tmp_path / "m")
    other = build_model(CONFIG, seed=2)
    save_model(other, tmp_path / "m", overwrite=True)
    assert load_model(tmp_path / "m").fingerprint == other.fingerprint
    assert [item.name for item in tmp_path.iterdir()] == ["m"]


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such model folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"has no clipkit\.json"):
        load_model(tmp_path)
    write_manifest(tmp_path, "index")
    with pytest.raises(ArtifactError, match="of kind 'index', not 'model'"):
        load_model(tmp_path)


def test_changed_weights_are_refused(model: DualEncoder, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("fault", ["missing", "shape", "garbage", "absent"])
def test_weights_that_do_not_fit_are_refused(fault: str, model: DualEncoder, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    manifest = json.loads((tmp_path / "m/clipkit.json").read_text())
    path = tmp_path / "m/model.safetensors"
    weights = load_file(path)
    if fault == "missing":
        del weights["log_scale"]
    if fault == "shape":
        weights["image_projection.weight"] = torch.zeros(3, 3)
    save_file(weights, path)
    if fault == "garbage":
        path.write_bytes(b"these are no tensors")
    if fault == "absent":
        path.unlink()
    write_manifest(tmp_path / "m", "model", config=manifest["config"])
    with pytest.raises(ArtifactError, match=r"do not fit|incomplete"):
        load_model(tmp_path / "m")


def test_unknown_tower_and_wrong_option_name_the_folder(model: DualEncoder, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    manifest = json.loads((tmp_path / "m/clipkit.json").read_text())
    config = manifest["config"]
    write_manifest(tmp_path / "m", "model", config={**config, "image": {"name": "gone"}})
    with pytest.raises(NotFoundError, match=r"m: unknown image tower 'gone'"):
        load_model(tmp_path / "m")
    write_manifest(tmp_path / "m", "model", config={**config, "scoring": "loud"})
    with pytest.raises(ConfigError, match="scoring"):
        load_model(tmp_path / "m")


def test_wrong_devices(model: DualEncoder, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    with pytest.raises(ConfigError, match="unknown device"):
        load_model(tmp_path / "m", device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            load_model(tmp_path / "m", device="cuda")


def test_loading_leaves_the_global_random_state_alone(model: DualEncoder, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_model(tmp_path / "m")
    assert torch.equal(torch.rand(1), expected)
