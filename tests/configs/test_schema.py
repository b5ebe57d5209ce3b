"""The schema as documentation: every field says what it is, and every field is read."""

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from outrider.configs import schema, training
from outrider.configs.schema import Config

ROOT = Path(__file__).parents[2]
SECTIONS = [
    value
    for module in (schema, training)
    for value in vars(module).values()
    if inspect.isclass(value) and dataclasses.is_dataclass(value)
]


def documented_fields(section: Any) -> set[str]:
    """Fields that have a text below them."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    below = zip(definition.body, definition.body[1:], strict=False)
    return {
        first.target.id
        for first, second in below
        if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name)
        if isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant)
    }


def attributes_read() -> set[str]:
    """Names of all attributes that the code outside configs/ reads."""
    names = set()
    for folder in ("workers", "cluster"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_has_a_docstring(section: Any) -> None:
    names = {field.name for field in dataclasses.fields(section)}
    assert documented_fields(section) == names


def test_every_field_is_read_by_the_code() -> None:
    # The sampling section is handed over whole, as defaults of SamplingParams.
    read = attributes_read()
    sections = [section for section in SECTIONS if section not in (Config, schema.SamplingConfig)]
    unread = [
        field.name for section in sections for field in dataclasses.fields(section) if field.name not in read
    ]
    assert not unread
