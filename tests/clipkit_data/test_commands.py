"""The commands as a person types them: output, exit codes, one-line errors."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from clipkit.cli import main
from clipkit.models import ModelConfig, build_model, save_model
from clipkit_data.commands import shards as shards_command
from clipkit_data.tools import pack, plots, stats

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


def test_check_names_a_damaged_manifest_and_index_mends_it(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "index", str(shards)]) == 0
    assert main(["shards", "check", str(shards)]) == 0
    manifest = shards / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    capsys.readouterr()
    assert main(["shards", "check", str(shards), "--json"]) == 1
    (fault,) = json.loads(capsys.readouterr().out)
    assert (fault["shard"], fault["reason"]) == (str(manifest), "damaged manifest")
    assert "it is not used" in fault["detail"]
    assert main(["shards", "index", str(shards)]) == 0
    assert main(["shards", "check", str(shards)]) == 0


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


def test_an_interrupted_pack_says_how_to_go_on(
    tmp_path: Path,
    picture: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / f"in/{number}.png").write_bytes(picture(number))
    decode, command = pack.decode_image, ["shards", "pack", str(tmp_path / "in"), str(tmp_path / "out")]

    def interrupt(data: bytes, *, name: str) -> Image.Image:
        if name == "2.png":
            raise KeyboardInterrupt
        return decode(data, name=name)

    monkeypatch.setattr(pack, "decode_image", interrupt)
    assert main([*command, "--per-shard", "1", "--jobs", "1"]) == 130
    assert "the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*command, "--per-shard", "2"]) == 1
    assert "was begun with another per shard" in capsys.readouterr().err
    assert main([*command, "--per-shard", "1"]) == 0
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3


def test_index(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "index", str(shards), "--json", "--energon"]) == 0
    out, err = capsys.readouterr()
    manifest = str(shards / "manifest.json")
    assert json.loads(out) == {"shards": 2, "samples": 13, "faults": [], "manifest": manifest}
    assert "2 shards, 13 readable samples, 0 faults" in err
    assert len(list(shards.glob("*.tar.idx"))) == 2
    path = shards / "00001.tar"
    path.write_bytes(path.read_bytes()[:9216])
    assert main(["shards", "index", str(shards)]) == 1
    out, err = capsys.readouterr()
    assert "00001.tar" in out
    assert main(["shards", "index", str(shards / "gone")]) == 2


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_check_compares_the_data_with_the_index(
    shards: Path, capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    assert main(["shards", "index", str(shards)]) == 0
    path = shards / "00000.tar"
    time = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[data.index(b"caption 4")] ^= 1  # the caption is as good as before, only another one
    path.write_bytes(data)
    os.utime(path, ns=(time, time))
    capsys.readouterr()
    assert main(["shards", "check", str(shards), "--jobs", jobs, "--json"]) == 1
    (fault,) = json.loads(capsys.readouterr().out)
    assert (fault["shard"], fault["sample"], fault["reason"]) == (str(path), "000000004", "CRC")


def test_stats(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    assert main(["shards", "stats", str(shards), "--json", "--plot", str(plot)]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 13
    with Image.open(plot) as image:
        assert image.size == (1260, 564)
    assert main(["shards", "stats", str(shards)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["samples", "13"] in lines
    assert ["width", "24", "24", "24", "24", "24", "24"] in lines
    assert main(["shards", "stats", str(shards), "--jobs", "0"]) == 2


def test_stats_looks_at_the_plots_name_before_it_reads(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "save_picture", fill_the_disk)
    (tmp_path / "folder.png").mkdir()
    read = stats.shard_statistics
    monkeypatch.setattr(stats, "shard_statistics", None)  # what is refused now was refused before
    for name, words in (
        ("plot.txt", "name it .png"),
        ("plot.pdf", "name it .png"),
        ("folder.png", "is a folder"),
        ("shards/00000.tar/plot.png", "is no folder"),
    ):
        assert main(["shards", "stats", str(shards), "--plot", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert words in err
    monkeypatch.setattr(stats, "shard_statistics", read)
    assert main(["shards", "stats", str(shards), "--plot", str(tmp_path / "plot.png")]) == 1
    out, err = capsys.readouterr()
    assert ["samples", "13"] in [line.split() for line in out.splitlines()], "printed all the same"
    assert "No space left" in err


def fill_the_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "plot.png")


def test_show(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = str(tmp_path / "sheet.png")
    assert main(["shards", "show", str(shards), sheet, "--keys", "000000009", "000000002", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"out": sheet, "keys": ["000000009", "000000002"]}
    assert "2 of 13 samples" in err
    assert main(["shards", "show", str(shards), sheet, "--keys", "none"]) == 2
    assert "no sample of" in capsys.readouterr().err
    assert main(["shards", "show", str(shards), str(tmp_path / "sheet.pdf")]) == 2
    assert "name it .png, .webp or .jpg" in capsys.readouterr().err
    assert not (tmp_path / "sheet.pdf").exists()


def test_reshard(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["shards", "reshard", str(shards), out, "--per-shard", "5", "--shuffle", "--json"]) == 0
    printed, err = capsys.readouterr()
    assert json.loads(printed) == {"samples": 13, "shards": 3, "faults": {}, "out": out}
    assert "13 samples in 3 shards" in err
    assert main(["shards", "reshard", str(shards), out]) == 1
    assert main(["shards", "check", out]) == 0


def test_filter(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    condition = ["--where", "name in ('name 1', 'name 9')"]
    assert main(["shards", "filter", str(shards), "--dry-run", *condition]) == 0
    printed, err = capsys.readouterr()
    assert "2 of 13 samples would be kept" in err
    assert "dropped: where ×11" in err
    assert not printed
    assert main(["shards", "filter", str(shards), str(out), "--json", *condition]) == 0
    printed, err = capsys.readouterr()
    assert json.loads(printed)["kept"] == 2
    assert str(out / "dropped.jsonl") in err
    both = [*condition, "--where", "name = 'name 9' or name = 'name 2'", "--dry-run", "--json"]
    assert main(["shards", "filter", str(shards), *both]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 1
    assert main(["shards", "filter", str(shards), *condition]) == 2
    assert main(["shards", "filter", str(shards), str(out) + "2", "--where", "1 ="]) == 2
    assert main(["shards", "filter", str(shards), str(out) + "2"]) == 2
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["clipkit"] * 3


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
        "import sys, clipkit_data.commands, clipkit_data.shards.scan\n"
        "assert not {'torch', 'numpy', 'pyarrow', 'webdataset', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "command", [["embed"], ["shards"], *(["shards", name] for name in shards_command.subcommands)]
)
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    assert "examples:\n  clipkit " in capsys.readouterr().out


def test_check_fails_where_a_shard_of_the_manifest_is_gone(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "index", str(shards)]) == 0
    (shards / "00001.tar").unlink()
    capsys.readouterr()
    assert main(["shards", "check", str(shards), "--json"]) == 1
    out, err = capsys.readouterr()
    (fault,) = json.loads(out)
    assert (fault["shard"], fault["reason"]) == (str(shards / "00001.tar"), "missing shard")
    assert "`clipkit shards index` if it was removed on purpose" in fault["detail"]
    assert "1 shard, 7 readable samples, 1 fault" in err
    assert main(["shards", "index", str(shards)]) == 0
    assert main(["shards", "check", str(shards)]) == 0
