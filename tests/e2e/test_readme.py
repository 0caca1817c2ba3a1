"""Everything the READMEs tell people to type is typed here, in both languages.

Two substitutions: the pretrained model, which cannot be downloaded here, is the walk's own; and a minute of
training is six seconds.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipkit_data.dataset import ShardDataset
from clipkit_data.sources import resolve_shards
from tests.e2e.support import CLIPKIT, Walk, wait_for_url

ROOT = Path(__file__).parents[2]
PRETRAINED = "open_clip:ViT-B-32/laion2b_s34b_b79k"
READMES = ("README.md", "README.zh-CN.md")


def blocks(name: str, language: str) -> list[str]:
    """The fenced code blocks of a language in a README."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def inline(name: str) -> list[str]:
    """The code in the sentences of a README."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"`([^`]+)`", text)


def commands(name: str) -> list[str]:
    """The shell commands of a README, without comments."""
    lines = [shlex.split(line, comments=True) for block in blocks(name, "sh") for line in block.splitlines()]
    return [shlex.join(words) for words in lines if words]


@pytest.fixture(scope="module")
def folder(walk: Walk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's folder: photos, a table of their captions, and nothing else."""
    root = tmp_path_factory.mktemp("readme")
    shutil.copytree(walk.pictures, root / "photos")
    table = (walk.root / "own/captions.jsonl").read_text(encoding="utf-8").replace('"pictures/', '"photos/')
    (root / "photos.jsonl").write_text(table, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    scripts = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def address(folder: Path, walk: Walk, environment: dict[str, str]) -> Iterator[str]:
    """The service of the READMEs, on a free port."""
    line = next(line for line in commands("README.md") if line.startswith("clipkit serve"))
    words = shlex.split(line.replace(PRETRAINED, str(walk.model)))
    subprocess.run(
        [*CLIPKIT, "embed", str(walk.model), "photos", "served-embeddings"],
        cwd=folder,
        check=True,
        env=environment,
    )
    subprocess.run(
        [*CLIPKIT, "index", "build", "served-embeddings", "served"], cwd=folder, check=True, env=environment
    )
    words[words.index("--index") + 1] = "served"
    log = folder / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*CLIPKIT, *words[1:], "--port", "0"], cwd=folder, env=environment, stdout=file, stderr=file
        )
    try:
        yield wait_for_url(process, log)
    finally:
        process.terminate()
        process.wait(30)


def test_both_languages_say_the_same() -> None:
    english, chinese = READMES
    assert commands(english) == commands(chinese)
    code = [[re.sub(r"\s*#.*", "", block) for block in blocks(name, "python")] for name in READMES]
    assert code[0] == code[1]
    spans = [sorted(" ".join(code.split()) for code in inline(name)) for name in READMES]
    assert spans[0] == spans[1]
    headings = [re.findall(r"^#+ ", (ROOT / name).read_text(), re.MULTILINE) for name in READMES]
    assert headings[0] == headings[1]
    rows = [len(re.findall(r"^\|", (ROOT / name).read_text(), re.MULTILINE)) for name in READMES]
    assert rows[0] == rows[1]
    numbers = [re.findall(r"0\.\d{2,}", (ROOT / name).read_text()) for name in READMES]
    assert numbers[0] == numbers[1]


def test_make_targets_run_what_they_say(environment: dict[str, str]) -> None:
    flags = next(
        code for code in map(str.split, inline("README.md")) if code[:2] == ["make", "demo"] and code[2:]
    )
    assert "DEMO_FLAGS=--port 8080" in shlex.split(" ".join(flags))
    for target, wanted in (("demo", "clipkit demo"), ("test", "-m pytest"), ("help", "make demo")):
        words = ["make", "--always-make", *(["-n"] if target != "help" else []), target]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
        assert wanted in done.stdout


def test_the_environment_has_the_commands() -> None:
    typed = next(code for code in inline("README.md") if code.endswith("bin/activate"))
    typed = typed.replace(".venv", sys.prefix)
    for command in ("clipkit --version", "torchrun --help"):
        done = subprocess.run(
            f"{typed} && {command}", shell=True, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
        )
        assert done.returncode == 0, done.stderr


def test_the_commands_work(folder: Path, walk: Walk, address: str, environment: dict[str, str]) -> None:
    ran = []
    for line in commands("README.md"):
        if line.startswith(("make ", "clipkit serve")):
            continue
        if line.startswith("curl") and shutil.which("curl") is None:
            assert "CI" not in os.environ, "CI must have curl: see .ci/run"
            continue
        typed = line.replace(PRETRAINED, str(walk.model)).replace("http://127.0.0.1:8000", address)
        typed = typed.replace("--max-minutes 1 ", "--max-minutes 0.1 ").replace(
            "curl ", "curl --fail -sS ", 1
        )
        typed = typed.replace("simclr-glyphs ", "simclr-glyphs --max-steps 4 ")
        typed = typed.replace("evaluate runs/simclr", "evaluate runs/simclr --no-untrained")  # a minute less
        done = subprocess.run(
            typed,
            shell=True,
            cwd=folder,
            capture_output=True,
            text=True,
            env=environment,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{typed}\n{done.stdout}\n{done.stderr}"
        ran.append(line.split()[0:2])
    assert ["clipkit", "train"] in ran
    assert ["torchrun", "--nproc-per-node"] in ran
    assert (folder / "runs/two/model/clipkit.json").is_file()
    resume = next(t for t in re.findall(r"`(clipkit train runs/[^`]+)`", (ROOT / "README.md").read_text()))
    done = subprocess.run(
        resume, shell=True, cwd=folder, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", READMES)
def test_the_python_works(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(name, "python"):
        exec(compile(block, name, "exec"), {})
    loss, accuracy, negative = map(float, capsys.readouterr().out.split())
    assert loss > 0
    assert 0 <= accuracy <= 1
    assert -1 <= negative <= 1


def test_the_held_out_example_is_held_out() -> None:
    dataset = ShardDataset(resolve_shards("sample:emoji/heldout"))
    metas = [dataset[position].meta for position in range(len(dataset))]
    dataset.close()
    for name, field in zip(READMES, ("name", "name_zh"), strict=True):
        quoted = re.findall(r"“([^”]+: [^”]+)”", (ROOT / name).read_text(encoding="utf-8"))
        assert quoted, name
        assert set(quoted) <= {meta[field] for meta in metas}, name


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
