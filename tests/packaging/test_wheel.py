"""The wheel: four packages with unique names at its top, and all that they need at run time inside."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from fnmatch import filter as matching
from pathlib import Path

import pytest

import clipkit

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "clipkit": ROOT / "clipkit",
    "clipkit_data": ROOT / "data" / "clipkit_data",
    "clipkit_training": ROOT / "training" / "clipkit_training",
    "clipkit_service": ROOT / "service" / "clipkit_service",
}
INFO = f"clipkit-{clipkit.__version__}.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    assert path.name == f"clipkit-{clipkit.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_top_level(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {*PACKAGES, INFO}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_a_package_is_inside(wheel: zipfile.ZipFile, package: str) -> None:
    folder = PACKAGES[package]
    expected = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }
    assert {name for name in wheel.namelist() if name.startswith(f"{package}/")} == expected
    assert f"{package}/py.typed" in expected


@pytest.mark.parametrize(
    "pattern",
    [
        "clipkit_data/samples/emoji/train/00000.tar",
        "clipkit_data/samples/emoji/heldout/00000.tar",
        "clipkit_data/samples/glyphs/train/00000.tar",
        "clipkit_data/samples/glyphs/LICENSES.txt",
        "clipkit_training/*clip-emoji.y*ml",
        "clipkit_service/*.html",
        "clipkit_service/*.css",
        "clipkit_service/*.js",
        f"{INFO}/licenses/LICENSE",
        f"{INFO}/licenses/NOTICE",
    ],
)
def test_what_is_needed_at_run_time(wheel: zipfile.ZipFile, pattern: str) -> None:
    assert matching(wheel.namelist(), pattern)


def test_check_wheel_contents(wheel: zipfile.ZipFile) -> None:
    command = [Path(sys.executable).parent / "check-wheel-contents", "--toplevel", ",".join(PACKAGES)]
    done = subprocess.run([*command, str(wheel.filename)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(wheel.read(f"{INFO}/METADATA").decode())
    assert metadata["Name"] == "clipkit"
    assert metadata["Requires-Python"] == ">=3.11"
    required = metadata.get_all("Requires-Dist", [])
    assert not [line for line in required if line.startswith("faiss") and "extra ==" not in line]
    assert "clipkit = clipkit.cli:main" in wheel.read(f"{INFO}/entry_points.txt").decode()
