"""The reference is complete: what the code offers, read from the code, has its row or heading."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from pydantic import BaseModel
from typer.core import TyperGroup

from ranksearch.search.spec import Dataset, JobSpec, TestSet
from ranksearch.service.app import create_app
from ranksearch.service.cli import app
from ranksearch.service.store.settings import Settings

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
SOURCES = sorted(path for folder in ("search", "worker", "service") for path in (ROOT / folder).rglob("*.py"))
MARKDOWN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rows(page: str) -> set[str]:
    """What stands in backticks in the first cell of a table row."""
    found: set[str] = set()
    for line in (REFERENCE / page).read_text().splitlines():
        if line.startswith("|"):
            found |= set(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return found


def variables() -> set[str]:
    """The settings, and what workers read from the environment beside them."""
    settings = {f"RANKSEARCH_{name.upper()}" for name in Settings.model_fields}
    text = "".join(path.read_text() for path in (ROOT / "worker").rglob("*.py"))
    return settings | set(re.findall(r"os\.environ(?:\.get\(|\[)\"(RANKSEARCH_\w+)", text))


def test_every_setting_has_its_row() -> None:
    assert "RANKSEARCH_THREADS" in variables()
    assert variables() == rows("settings.md")


def test_every_route_has_its_row(tmp_path: Path) -> None:
    paths = create_app(Settings(data_dir=tmp_path)).openapi()["paths"]
    offered = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert offered | {"/dashboard/"} == rows("rest.md")


def command_section(name: str) -> str:
    text = (REFERENCE / "cli.md").read_text()
    found = re.search(rf"^### `ranksearch {name}`\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no heading for {name}"
    return found[1]


def test_every_command_and_option_is_there() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    described = re.findall(r"^### `ranksearch (\w+)`", (REFERENCE / "cli.md").read_text(), re.MULTILINE)
    assert sorted(group.commands) == sorted(described)
    shared = set(re.findall(r"^\| `(--[\w-]+)`", command_section("submit"), re.MULTILINE))
    for name, command in group.commands.items():
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        options -= {"--help"}
        listed = set(re.findall(r"`(--[\w-]+)`", command_section(name)))
        if name == "estimate":
            listed |= shared - {"--watch", "--idempotency-key"}
        assert options == listed, name


def spec_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Dataset:
            yield from spec_fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_field_of_the_spec_has_its_row() -> None:
    assert {*spec_fields(JobSpec), *spec_fields(TestSet)} == rows("job-spec.md")


def trees() -> Iterator[ast.Module]:
    for path in SOURCES:
        yield ast.parse(path.read_text())


def error_codes() -> set[str]:
    """`code = "..."` of the error classes, and the codes of problems that are no exception."""
    codes: set[str] = set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for line in node.body:
                    name = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
                    if isinstance(name, ast.Name) and name.id == "code" and isinstance(line.value, ast.Constant):  # type: ignore[union-attr]
                        codes.add(line.value.value)  # type: ignore[union-attr]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "problem":
                codes |= choices(node.args[1])
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_CODES":
                codes |= choices(node.value)
    return codes


def choices(node: ast.expr) -> set[str]:
    """The strings an expression may be: a literal, or one of two."""
    if isinstance(node, ast.IfExp):
        return choices(node.body) | choices(node.orelse)
    if isinstance(node, ast.Dict):
        return {code for value in node.values for code in choices(value)}
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def test_every_error_code_has_its_row() -> None:
    codes = error_codes()
    assert {"impossible_budget", "foreign_host", "invalid_spec", "method_not_allowed", "internal"} <= codes
    assert codes | {"http_error"} == rows("errors.md")


#: Position of the kind among the arguments of what writes events.
KIND_AT = {"tell": 0, "add_event": 1, "append_event": 2, "_change": 2}


def event_kinds() -> set[str]:
    """Kinds of the events that are written; a `*` stands for what is filled in."""
    constants: dict[str, str] = {}
    kinds: set[str] = set()
    parsed = list(trees())
    for tree in parsed:
        for node in tree.body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(node.value, ast.Constant)
            ):
                constants[node.target.id] = str(node.value.value)
    for tree in parsed:
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in KIND_AT or len(node.args) <= KIND_AT[name]:
                continue
            kind = node.args[KIND_AT[name]]
            if isinstance(kind, ast.Constant) and isinstance(kind.value, str):
                kinds.add(kind.value)
            elif isinstance(kind, ast.JoinedStr):
                kinds.add("".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in kind.values))
            elif isinstance(kind, ast.Name) and kind.id in constants:
                kinds.add(constants[kind.id])
    return kinds


def test_every_event_kind_has_its_row() -> None:
    written, described = event_kinds(), rows("events.md")
    assert {"status", "stage", "trial", "*.cache_hit", "released"} <= written
    patterns = [re.compile(re.escape(kind).replace(r"\*", r"\w+")) for kind in written]
    for pattern in patterns:
        assert any(pattern.fullmatch(kind) for kind in described), f"{pattern.pattern} is not described"
    for kind in described:
        assert any(pattern.fullmatch(kind) for pattern in patterns), f"{kind} is never written"


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_name_commands_and_variables_that_exist(page: Path) -> None:
    text = page.read_text()
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for verb in re.findall(r"^(?:\$ )?(?:\S*/)?ranksearch ([a-z]+)", text, re.MULTILINE):
        assert verb in group.commands, verb
    known = variables() | {"RANKSEARCH_URL", "RANKSEARCH_TOKEN"}
    assert set(re.findall(r"RANKSEARCH_[A-Z_]*[A-Z]", text)) <= known
