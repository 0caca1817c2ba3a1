"""The guides say what is true: every field, setting, route and error code, with the defaults of the code.

The tables of the guides are read as Markdown and compared with the schemas; a field that is added, renamed or
given another default without its line in the guide is a failure here.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from clipkit import losses, state
from clipkit.config import Config, validate
from clipkit.images import Preprocess
from clipkit.models import EncoderConfig, ModelConfig
from clipkit.models.towers import GRAPH_TOWERS, IMAGE_TOWERS, TEXT_TOWERS
from clipkit.registry import Registry
from clipkit.text import TOKENIZERS
from clipkit_data.pictures.augment import AugmentConfig
from clipkit_service import Settings, create_app
from clipkit_training.recipe import DataConfig, OptimConfig, Recipe
from clipkit_training.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SCHEMAS: list[tuple[str, type[Config]]] = [
    ("", Recipe),
    ("data.", DataConfig),
    ("data.augment.", AugmentConfig),
    ("optim.", OptimConfig),
    ("model.", ModelConfig),
    ("model.", EncoderConfig),
    ("model.preprocess.", Preprocess),
]
PAGES = sorted([*DOCS.glob("*.md"), *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))])


def rows(page: str, header: str) -> list[list[str]]:
    """The rows of all tables of a page whose header row begins with `header`."""
    found: list[list[str]] = []
    inside = False
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.startswith(header):
            inside = True
        elif inside and not line.startswith("|---"):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def plain(value: Any) -> Any:
    """A default as YAML would give it."""
    if isinstance(value, BaseModel):
        return {} if value == type(value)() else value.model_dump()
    return list(value) if isinstance(value, tuple) else value


def recipe_fields() -> Iterator[tuple[str, FieldInfo]]:
    for prefix, schema in SCHEMAS:
        for name, field in schema.model_fields.items():
            yield prefix + name, field


def test_every_field_of_a_recipe_with_its_default() -> None:
    written = {row[0].strip("`"): row[1] for row in rows("recipes.md", "| field | default |")}
    assert set(written) == {name for name, _ in recipe_fields()}
    for name, field in recipe_fields():
        if field.is_required():
            assert written[name] == "required", name
        else:
            value = yaml.safe_load(written[name].strip("`"))
            assert value == plain(field.get_default(call_default_factory=True)), name


@pytest.mark.parametrize(
    ("page", "heading", "table"),
    [
        ("recipes.md", "### Image towers", IMAGE_TOWERS),
        ("recipes.md", "### Text towers", TEXT_TOWERS),
        ("recipes.md", "### Graph towers", GRAPH_TOWERS),
        ("recipes.md", "### Tokenizers", TOKENIZERS),
        ("methods.md", "## Steps", STEPS),
    ],
)
def test_every_choice_with_its_options(page: str, heading: str, table: Registry) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    section = text.partition(heading)[2].partition("\n#")[0]
    for name in table.names():
        if not table.get(name).config.model_fields:
            continue
        (line,) = [line for line in section.splitlines() if line.startswith(f"| `{name}` |")]
        options = set(re.findall(r"`(\w+)`", line.split("|")[2]))
        assert options == set(table.get(name).config.model_fields), name


def test_every_step_is_named() -> None:
    (row,) = [row for row in rows("recipes.md", "| field | default |") if row[0] == "`step`"]
    for name in STEPS.names():
        assert f"`{name}`" in row[2]


def test_the_recipe_that_is_shown_is_one() -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    recipe = validate(Recipe, yaml.safe_load(shown), "docs/recipes.md")
    for side, table in (("image", IMAGE_TOWERS), ("text", TEXT_TOWERS), ("tokenizer", TOKENIZERS)):
        options = dict(getattr(recipe.model, side))
        validate(table.get(options.pop("name")).config, options, side)


def test_every_setting_of_the_service_with_its_default() -> None:
    written = {row[0].strip("`"): row[1] for row in rows("service.md", "| variable | default |")}
    assert set(written) == {f"CLIPKIT_{name.upper()}" for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        cell = written[f"CLIPKIT_{name.upper()}"]
        if field.is_required():
            assert cell == "required"
        elif field.default in (None, ()):
            assert cell == "none"
        elif name == "decode_threads":
            assert cell == "cores, 4 at most"
        else:
            assert yaml.safe_load(cell.strip("`")) == field.default, name


def test_every_route() -> None:
    document = create_app(Settings.model_validate({"model": "any"})).openapi()
    routes = {f"{verb.upper()} {path}" for path, verbs in document["paths"].items() for verb in verbs}
    written = {row[0].strip("`") for row in rows("service.md", "| route |")}
    assert written - routes == {"GET /", "GET /docs", "GET /openapi.json"}
    assert routes - written == set()


def test_every_error_code() -> None:
    sources = sorted((ROOT / "service" / "clipkit_service").rglob("*.py"))
    source = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    used = set(re.findall(r'Problem\(\s*\d{3},\s*"(\w+)"', source))
    used |= set(re.findall(r'"(image_\w+)",$', source, re.MULTILINE))
    used |= set(re.findall(r'^    \d{3}: "(\w+)",$', source, re.MULTILINE))
    assert {"queue_full", "image_empty", "method_not_allowed", "invalid_request"} <= used
    written = {code for row in rows("service.md", "| status |") for code in re.findall(r"`(\w+)`", row[1])}
    assert written == used


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}


def test_the_code_about_losses_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "losses.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/losses.md", "exec"), names)  # one after the other, as a reader would
    assert len(blocks) == 3
    assert names["encoder"].weight.grad is not None  # type: ignore[attr-defined]
    assert len(names["queue"]) == 3 * 64  # type: ignore[arg-type]


def test_every_loss_is_named() -> None:
    text = (DOCS / "losses.md").read_text(encoding="utf-8")
    for name in (*losses.__all__, *state.__all__):
        if name not in ("ContrastOutput", "mutual_information_bound", "similarity"):
            assert f"`{name}" in text or f"import {name}" in text or f"{name}(" in text, name


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in listed, page.name


def test_the_changelog_has_this_version() -> None:
    from clipkit import __version__

    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
