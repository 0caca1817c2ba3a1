"""`/docs`: the API on one page, written from the OpenAPI document, with commands to paste.

The page is rendered here and loads nothing: no script, no other server, so that it works without a network
and under the same Content-Security-Policy as the rest.
"""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2f6fde; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 56rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.6rem; } h2 { margin: 2.5rem 0 .5rem; text-transform: capitalize; }
a { color: var(--accent); }
details { border: 1px solid var(--line); border-radius: .6rem; margin: .6rem 0; padding: .6rem .9rem; }
summary { cursor: pointer; overflow-wrap: anywhere; } summary code { font-weight: 600; }
.verb { display: inline-block; min-width: 3rem; color: var(--accent);
  font: 600 .75rem ui-monospace, monospace; }
.what { opacity: .75; margin-left: .5rem; }
pre { background: var(--soft); border-radius: .5rem; padding: .8rem; overflow: auto; font-size: .85rem;
  max-height: 22rem; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; }
table { border-collapse: collapse; font-size: .9rem; }
td { padding: .2rem .8rem .2rem 0; vertical-align: top; }
"""

Document = dict[str, Any]


def docs_page(document: Document, base: str, *, with_key: bool) -> str:
    """The page as HTML.

    Args:
        document: The OpenAPI document.
        base: The service's address, for the commands.
        with_key: Whether the commands must carry an API key.
    """
    sections: dict[str, list[str]] = {}
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            tag = operation.get("tags", ["more"])[0]
            sections.setdefault(tag, []).append(_operation(document, base, path, verb, operation, with_key))
    body = "".join(f"<h2>{escape(tag)}</h2>{''.join(items)}" for tag, items in sections.items())
    info = document["info"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])} API</title>"
        '<link rel="icon" href="/static/favicon.svg">'
        '<link rel="stylesheet" href="/docs/style.css"></head><body>'
        f"<h1>{escape(info['title'])} API <small>{escape(info['version'])}</small></h1>"
        f"<p>{escape(info['description']).replace('`', '')}</p>"
        '<p>The same for programs: <a href="/openapi.json">openapi.json</a>. OpenAI\'s clients work with '
        f"<code>base_url={escape(base)}/v1</code>. <a href='/'>Back to the page</a></p>{body}</body></html>"
    )


def _operation(
    document: Document, base: str, path: str, verb: str, operation: Document, with_key: bool
) -> str:
    """One route: what it does, its fields, and a command for each example."""
    rows = "".join(
        f"<tr><td><code>{name}</code></td><td>{what}</td></tr>" for name, what in _fields(document, operation)
    )
    commands = "".join(
        f"<p>{escape(title)}</p><pre>{escape(command)}</pre>"
        for title, command in _commands(base, path, verb, operation, with_key)
    )
    return (
        f'<details><summary><span class="verb">{verb.upper()}</span><code>{escape(path)}</code>'
        f'<span class="what">{escape(operation["summary"])}</span></summary>'
        f"<p>{escape(operation.get('description', '')).replace('`', '')}</p>"
        f"<table>{rows}</table>{commands}</details>"
    )


def _fields(document: Document, operation: Document) -> Iterator[tuple[str, str]]:
    """The parameters of a route and the fields of its body, each with what it is."""
    for parameter in operation.get("parameters", ()):
        yield _field(document, parameter["name"], parameter["schema"], parameter.get("required", False))
    content = operation.get("requestBody", {}).get("content", {})
    for kind in content.values():
        schema = _resolved(document, kind["schema"])
        for name, field in schema.get("properties", {}).items():
            yield _field(document, name, field, name in schema.get("required", ()))
        break


def _field(document: Document, name: str, schema: Document, required: bool) -> tuple[str, str]:
    words = [_kind(document, schema), "required" if required else ""]
    if schema.get("default") is not None:
        words.append(f"default {json.dumps(schema['default'])}")
    words.append(schema.get("description", ""))
    return escape(name), escape(" · ".join(word for word in words if word))


def _kind(document: Document, schema: Document) -> str:
    """A type in a few words."""
    if "$ref" in schema:
        return "{" + " | ".join(_resolved(document, schema).get("properties", ())) + "}"
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(
            _kind(document, option) for option in schema["anyOf"] if option.get("type") != "null"
        )
    if schema.get("type") == "array":
        return f"list of {_kind(document, schema.get('items', {}))}"
    return schema.get("type", "any")


def _resolved(document: Document, schema: Document) -> Document:
    name = schema.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"][name] if name else schema


def _commands(
    base: str, path: str, verb: str, operation: Document, with_key: bool
) -> Iterator[tuple[str, str]]:
    """A curl command for each example of a route."""
    key = ' -H "Authorization: Bearer $CLIPKIT_API_KEY"' if with_key else ""
    address, query = path, []
    for parameter in operation.get("parameters", ()):
        example = next(iter(parameter.get("examples", {}).values()), None)
        if example and parameter["in"] == "path":
            address = address.replace(f"{{{parameter['name']}}}", str(example["value"]))
        elif example and parameter["in"] == "query":
            query.append(f" --data-urlencode {parameter['name']}={json.dumps(example['value'])}")
    content = operation.get("requestBody", {}).get("content", {})
    if not content:
        yield "Example", f"curl -s{' -G' if query else ''}{key} {base}{address}{''.join(query)}"
    for example in content.get("application/json", {}).get("examples", {}).values():
        sent = json.dumps(example["value"], ensure_ascii=False).replace("'", "'\\''")
        yield (
            example["summary"],
            f"curl -s{key} {base}{address} -H 'Content-Type: application/json' -d '{sent}'",
        )
    if "multipart/form-data" in content:
        field = "files" if path.endswith("/embeddings/images") else "file"
        labels = " -F labels=cat,dog" if path.endswith("/classify") else ""
        yield "A file", f"curl -s{key} {base}{address} -F {field}=@picture.png{labels}"
