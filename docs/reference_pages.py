"""The reference of the Python interface and of the JSON report, made from the code and from the schema."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import initaudit
from initaudit import testing
from initaudit.auditing import Audit
from initaudit.config import Config
from initaudit.integrations import lightning, transformers
from initaudit.report.report import Activation, Layer, ModelReport
from initaudit.rules.rule import Finding

# (where it is imported from, what it is called, the object)
PUBLIC: tuple[tuple[str, str, Any], ...] = (
    ("initaudit", "audit", initaudit.audit),
    ("initaudit.testing", "assert_trainable", testing.assert_trainable),
    ("initaudit.testing", "expect_init", testing.expect_init),
    ("initaudit.integrations.lightning", "InitauditCallback", lightning.InitauditCallback),
    ("initaudit.integrations.transformers", "InitauditCallback", transformers.InitauditCallback),
    ("initaudit.auditing", "Audit", Audit),
    ("initaudit.report.report", "ModelReport", ModelReport),
    ("initaudit.report.report", "Layer", Layer),
    ("initaudit.report.report", "Activation", Activation),
    ("initaudit.rules.rule", "Finding", Finding),
    ("initaudit.config", "Config", Config),
)


def api_page(note: str) -> str:
    """Every public name with its signature, its docstring, and its fields or properties."""
    parts = ["# Python API", note]
    for module, name, thing in PUBLIC:
        parts.append(f"## {module}.{name}\n\n```text\n{name}{_signature(thing)}\n```\n\n{_prose(thing)}")
        parts += list(_members(thing))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _signature(thing: Any) -> str:
    if dataclasses.is_dataclass(thing):
        return "(...)"
    signature = inspect.signature(thing)
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    # Annotations are strings here, and would be shown in quotes.
    return re.sub(r": '([^']*)'", r": \1", text)


def _prose(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "").replace("<", "&lt;")


def _members(thing: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(thing):
        fields = dataclasses.fields(thing)
        yield "\n".join(["| field | type |", "|---|---|", *(f"| `{f.name}` | `{_type(f)}` |" for f in fields)])
    elif thing is Audit:
        for name, member in vars(Audit).items():
            if isinstance(member, property):
                yield f"- `.{name}`: {_prose(member)}"
        yield f"- `.to_dict()`: {_prose(Audit.to_dict)}"


def _type(field: Any) -> str:
    return str(field.type).replace("|", "or")


def json_page(schema_file: Path, note: str) -> str:
    """Every object of the JSON report with its keys, as the schema has them."""
    schema = json.loads(schema_file.read_text("utf-8"))
    parts = ["# JSON report", note]
    parts.append(
        "`--format json` writes one document; [report.schema.json](../report.schema.json) (JSON Schema 2020-12) describes "
        "it, and `--format jsonl` writes the same objects one a line."
    )
    parts.append("## document\n\n" + _table(schema, schema["$defs"]))
    definitions = schema["$defs"]
    for name, part in definitions.items():
        if "properties" in part:
            parts.append(f"## {name}\n\n{part.get('description', '')}\n\n{_table(part, schema['$defs'])}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(part: dict[str, Any], definitions: dict[str, Any]) -> str:
    rows = [
        f"| `{key}` | {_kind(value, definitions)} | {value.get('description', '').replace('|', 'or')} |"
        for key, value in part.get("properties", {}).items()
    ]
    return "\n".join(["| key | type | meaning |", "|---|---|---|", *rows])


def _kind(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})" if "properties" in definitions[name] else _kind(definitions[name], definitions)
    if "enum" in value:
        return ", ".join(f"`{json.dumps(each)}`" for each in value["enum"])
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "items" in value:
        return f"array of {_kind(value['items'], definitions)}"
    for word in ("anyOf", "oneOf"):
        if word in value:
            return " or ".join(_kind(each, definitions) for each in value[word])
    kind = value.get("type", "any")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)
