"""The commands as a person types them: output, exit codes, one-line errors."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clipkit.cli import main
from clipkit.models import ModelConfig, build_model, save_model

MODEL = ModelConfig.model_validate(
    {
        "image": {"name": "cnn", "widths": (8,), "depths": (1,), "groups": 4},
        "text": {"name": "transformer", "width": 16, "layers": 1, "heads": 2},
        "dim": 8,
        "preprocess": {"size": 16},
        "tokenizer": {"name": "clip", "context_length": 16},
    }
)


def test_check_says_what_is_wrong(
    shards: Path, capsys: pytest.CaptureFixture[str], write_shard: Callable[..., Path]
) -> None:
    assert main(["shards", "check", str(shards), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == []
    assert "2 shards, 13 readable samples, 0 faults" in err
    path = shards / "00001.tar"
    path.write_bytes(path.read_bytes()[:9216])
    assert main(["shards", "check", str(shards), "--json"]) == 1
    out, err = capsys.readouterr()
    faults = json.loads(out)
    assert faults
    for fault in faults:
        assert set(fault) == {"shard", "sample", "offset", "reason", "detail"}
        assert fault["shard"] == str(path)
    assert main(["shards", "check", str(shards)]) == 1
    out, err = capsys.readouterr()
    assert "no end-of-archive marker" in out.replace("\n", " ") or "cut" in out
    assert len(err.splitlines()) == 1


def test_quick_check_decodes_nothing(
    write_shard: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_shard("00000.tar", [{"__key__": "0", "png": b"no picture", "txt": b"words"}])
    assert main(["shards", "check", str(path), "--quick", "--json"]) == 0
    assert main(["shards", "check", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[1])[0]["reason"] == "picture format"


def test_pack(tmp_path: Path, picture: Callable[..., bytes], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/red_box.png").write_bytes(picture(0))
    (tmp_path / "in/broken.png").write_bytes(b"no")
    out = str(tmp_path / "out")
    assert main(["shards", "pack", str(tmp_path / "in"), out, "--per-shard", "5", "--json"]) == 0
    printed, err = capsys.readouterr()
    assert json.loads(printed) == {"samples": 1, "shards": 1, "faults": {"picture format": 1}, "out": out}
    assert "left out: picture format ×1" in err
    assert "faults.jsonl" in err
    assert main(["shards", "pack", str(tmp_path / "in"), out]) == 1
    printed, err = capsys.readouterr()
    assert err.startswith("clipkit: error: ")
    assert "already exists" in err
    assert len(err.splitlines()) == 1
    (tmp_path / "in/red_box.png").unlink()
    assert main(["shards", "pack", str(tmp_path / "in"), str(tmp_path / "none")]) == 1
    assert "nothing could be packed" in capsys.readouterr().err
    assert main(["shards", "pack", str(tmp_path / "nowhere"), str(tmp_path / "none")]) == 2


def test_embed(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(build_model(MODEL, seed=0), tmp_path / "model")
    capsys.readouterr()
    out = tmp_path / "out"
    assert main(["embed", str(tmp_path / "model"), str(shards), str(out), "--json"]) == 0
    printed, err = capsys.readouterr()
    result = json.loads(printed)
    assert result["rows"] == 13
    assert result["model"]["name"] == str(tmp_path / "model")
    assert f"{out}: 13 embeddings of dimension 8" in err
    assert (out / "img_emb/img_emb_0.npy").is_file()
    assert main(["embed", str(tmp_path / "gone"), str(shards), str(tmp_path / "b")]) == 2
    assert main(["embed", str(tmp_path / "model"), str(tmp_path / "gone"), str(tmp_path / "b")]) == 2
    assert main(["embed", str(tmp_path / "model"), str(shards), str(out), "--thumbnail-size", "0"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("clipkit: error: ") for line in errors)


def test_the_commands_load_without_torch() -> None:
    code = (
        "import sys, clipkit_data.commands, clipkit_data.shards\n"
        "assert not {'torch', 'numpy', 'pyarrow', 'webdataset', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", [["shards"], ["shards", "pack"], ["shards", "check"], ["embed"]])
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    assert "examples:\n  clipkit " in capsys.readouterr().out
