"""Configuration: pydantic models, YAML in and out, and errors that name the field.

`Config` is the base of every schema: frozen, and an unknown key is an error. `validate` is the one place
where pydantic's report becomes a `ConfigError` with dotted field names, so that a typo in a recipe reads
like one.
"""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from clipkit.errors import ConfigError, NotFoundError

T = TypeVar("T", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which does not let a key replace an earlier one of the same name."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"the key {key.value!r} is there twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class Config(BaseModel):
    """Base of all configuration: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def validate(schema: type[T], data: Any, where: str) -> T:
    """`data` as an instance of `schema`.

    Args:
        schema: The pydantic model to build.
        data: Plain dicts, lists and scalars.
        where: What to call `data` in a message, for example the recipe's path.

    Raises:
        ConfigError: Names the first wrong field, what was given, and how many more are wrong.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """pydantic's report in one line: field, fault, and how many more there are."""
    faults = error.errors(include_url=False)
    first = faults[0]
    # <…> is the variant of a union that the field belongs to
    names = [str(part) for part in first["loc"] if not str(part).startswith("<")]
    field = ".".join(names) or "(top level)"
    message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{field}: {message}{more}"


def load_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises: NotFoundError; ConfigError with the line of a syntax error."""
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no such file: {path}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(data).__name__}")
    return data


def dump_yaml(config: BaseModel) -> str:
    """`config` as YAML that `load_yaml` and `validate` read back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
