"""Named choices: one visible literal table per family, extended by entry points.

A `Spec` says what a name stands for: its configuration schema and the function that builds it. Built-in
specs are written out in a tuple beside the code they name; other distributions add theirs through an entry
point whose value is a `Spec`. Nothing registers itself on import.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from clipkit.errors import ConfigError, NotFoundError


@dataclass(frozen=True)
class Spec:
    """One choice of a family: `build` takes an instance of `config` and what else the family passes."""

    name: str
    config: type[Any]
    build: Callable[..., Any]


class Registry:
    """The choices of one family, for example the image towers.

    Args:
        family: What a choice is called in messages, for example `"image tower"`.
        table: The built-in specs.
        group: Entry-point group through which other distributions add specs.
    """

    def __init__(self, family: str, table: Sequence[Spec], group: str) -> None:
        self.family = family
        self.group = group
        self._table = tuple(table)

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Every spec by name, built-in ones first. Raises: ConfigError on a name given twice."""
        specs: dict[str, Spec] = {}
        outside = tuple(point.load() for point in entry_points(group=self.group))
        for spec in (*self._table, *outside):
            if spec.name in specs:
                raise ConfigError(
                    f"the {self.family} {spec.name!r} is defined twice",
                    hint=f"rename the one that entry-point group {self.group!r} adds",
                )
            specs[spec.name] = spec
        return specs

    def names(self) -> list[str]:
        """The known names, in table order."""
        return list(self.specs)

    def get(self, name: str) -> Spec:
        """The spec of that name. Raises: NotFoundError that lists the known names."""
        if name not in self.specs:
            raise NotFoundError(f"unknown {self.family} {name!r}", hint=f"known: {', '.join(self.names())}")
        return self.specs[name]
