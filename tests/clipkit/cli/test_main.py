"""The `clipkit` command itself: finding commands, exit codes, one-line errors, printing."""

import io
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import clipkit
from clipkit import cli
from clipkit.cli import output
from clipkit.errors import ArtifactError, InputError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clipkit", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def provide(monkeypatch: pytest.MonkeyPatch, **commands: object) -> None:
    """Make these the only commands; a string is what an entry point would name."""
    points = []
    for name, command in commands.items():
        value = command if isinstance(command, str) else f"{__name__}:{name}"
        point = EntryPoint(name, value, cli.GROUP)
        if not isinstance(command, str):
            monkeypatch.setattr(sys.modules[__name__], name, command, raising=False)
        points.append(point)
    monkeypatch.setattr(cli, "entry_points", lambda group: points)


def test_module_and_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"clipkit {clipkit.__version__}\n")


def test_unknown_command() -> None:
    done = run("indx")
    assert done.returncode == 2
    assert done.stderr.startswith("clipkit: error: unknown command 'indx' (known: classify, ")
    assert done.stderr.count("\n") == 1


def test_no_arguments_show_the_commands_and_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: clipkit COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"), [(InputError("bad text", "use words"), 2), (ArtifactError("torn\nfile"), 1)]
)
def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fail(args: object) -> None:
        raise error

    provide(monkeypatch, broken=cli.Command(help="fails", run=fail))
    assert cli.main(["broken"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("clipkit: error: ")
    assert err.count("\n") == 1


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: object) -> None:
        raise KeyboardInterrupt

    provide(monkeypatch, slow=cli.Command(help="is slow", run=interrupt))
    assert cli.main(["slow"]) == 130
    assert capsys.readouterr().err == "clipkit: error: interrupted\n"


def test_a_broken_plugin_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    provide(monkeypatch, good=cli.Command(help="works", run=lambda args: None), bad="no_such_module:x")
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "\n  good  works\n" in out
    assert "the command 'bad' cannot be loaded from no_such_module:x" in out
    assert cli.main(["bad"]) == 1
    assert "clipkit: error: the command 'bad' cannot be loaded" in capsys.readouterr().err
    assert cli.main(["good"]) == 0


def test_arguments_that_are_not_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    child = cli.Command(
        help="below",
        arguments=lambda parser: parser.add_argument("--number", type=int) and None,
        run=lambda args: seen.append([args.number, *args.rest]),
    )
    provide(
        monkeypatch,
        strict=cli.Command(help="strict", subcommands={"child": child}),
        loose=cli.Command(help="loose", run=lambda args: seen.append(args.rest), passthrough=True),
    )
    assert cli.main(["strict", "child", "--number", "3"]) == 0
    assert cli.main(["loose", "--data.train", "x"]) == 0
    assert seen == [[3], ["--data.train", "x"]]
    for wrong in (["strict", "child", "--num", "3"], ["strict", "child", "--other"], ["strict"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(wrong)
        assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_stops_early() -> None:
    """As in `clipkit … | head`: no traceback, no noise."""
    code = (
        "import os, sys\n"
        "from clipkit import cli\n"
        "def flood(args):\n"
        "    for _ in range(100_000): sys.stdout.write('x' * 100 + '\\n')\n"
        "class Point:\n"
        "    name, value = 'flood', 'x:y'\n"
        "    def load(self): return cli.Command(help='floods', run=flood)\n"
        "cli.entry_points = lambda group: [Point()]\n"
        "sys.exit(cli.main(['flood']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as done:
        assert done.stdout is not None
        assert done.stderr is not None
        done.stdout.readline()
        done.stdout.close()
        assert done.stderr.read() == b""
        assert done.wait(timeout=60) == 1


def test_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table([("a", 1.0, 3), ("[b]", 0.25, 10)], ("name", "score", "n"))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["name   score   n", "a     1.0000   3", "[b]   0.2500  10"]
    output.print_json({"名": 1})
    assert capsys.readouterr().out == '{"名": 1}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        output.print_json(float("nan"))


def test_progress_is_silent_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with output.progress("Working", total=3) as task:
        task.advance()
        task.update(completed=3, text="done")
    assert stream.getvalue() == ""
