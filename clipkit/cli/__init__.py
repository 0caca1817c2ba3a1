"""The `clipkit` command: finds a subcommand by its entry point, runs it, and turns errors into one line.

A subcommand is a `Command` named in the entry-point group `clipkit.commands`. Only the one that was asked
for is loaded (all of them for `clipkit --help`), and none imports torch, faiss or fastapi before it runs.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points

from clipkit import __version__
from clipkit.cli.output import complain
from clipkit.errors import ClipkitError, DependencyError

GROUP = "clipkit.commands"


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Args:
        help: What it does, in one line.
        examples: Command lines that work, shown at the end of `--help`.
        arguments: Adds its arguments to a parser.
        run: Does the work; returns the exit code (None is 0).
        subcommands: Instead of `arguments` and `run`: the commands below this one.
        passthrough: Arguments that the parser does not know are left in `args.rest` for `run`.
    """

    help: str
    examples: str = ""
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    run: Callable[[argparse.Namespace], int | None] | None = None
    subcommands: Mapping[str, "Command"] = field(default_factory=dict)
    passthrough: bool = False


def parser_for(command: Command, prog: str) -> argparse.ArgumentParser:
    """The argument parser of a command and of those below it."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=command.help,
        epilog=f"examples:\n{command.examples}" if command.examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.arguments(parser)
    parser.set_defaults(command=command)
    if command.subcommands:
        below = parser.add_subparsers(metavar="COMMAND", required=True)
        for name, child in command.subcommands.items():
            template = parser_for(child, f"{prog} {name}")
            below.add_parser(
                name,
                help=child.help,
                parents=[template],
                add_help=False,
                description=child.help,
                epilog=template.epilog,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
    return parser


def load(point: EntryPoint) -> Command:
    """The command that an entry point names. Raises: DependencyError when it cannot be imported."""
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise DependencyError(
            f"the command {point.name!r} cannot be loaded from {point.value}: {error}",
            hint="repair or remove the package that adds it",
        ) from error


def overview() -> str:
    """What `clipkit --help` prints: each command with its line."""
    helps: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        try:
            helps[point.name] = load(point).help
        except DependencyError as error:  # one broken plugin must not hide the others
            helps[point.name] = f"({error.message})"
    width = max(map(len, helps), default=0)
    lines = [f"  {name:<{width}}  {helps[name]}" for name in sorted(helps)]
    return "\n".join(
        [
            "usage: clipkit COMMAND [OPTIONS]",
            "",
            "Contrastive encoders from shards to search: train, embed, index, serve.",
            "",
            *lines,
            "",
            "clipkit COMMAND --help shows a command's options and examples.",
            "clipkit demo walks the whole path on the sample shards.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(overview() + "\n")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        sys.stdout.write(f"clipkit {__version__}\n")
        return 0
    points = {point.name: point for point in entry_points(group=GROUP)}
    name = arguments[0]
    if name not in points:
        return complain(f"unknown command {name!r}", f"known: {', '.join(sorted(points))}", code=2)
    try:
        parser = parser_for(load(points[name]), f"clipkit {name}")
    except DependencyError as error:
        return complain(error.message, error.hint, code=error.exit_code)
    args, rest = parser.parse_known_args(arguments[1:])
    command: Command = args.command
    if rest and not command.passthrough:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    assert command.run is not None
    try:
        return command.run(args) or 0
    except ClipkitError as error:
        return complain(error.message, error.hint, code=error.exit_code)
    except KeyboardInterrupt:
        return complain("interrupted", code=130)
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # no permission, no space, no such device
        where = f"{error.filename}: " if error.filename else ""
        return complain(f"{where}{error.strerror or error}", code=1)
