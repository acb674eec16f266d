"""The arrows between the three folders, read from every import statement, and what the light parts really load."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("search", "worker", "service")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
HEAVY = ("torch", "transformers", "botorch", "gpytorch", "accelerate", "datasets")
#: What the numerics may use: they also run from the bare source tree, beside nothing but torch and transformers.
NUMERICS = (
    *("linalg", "covariance", "calibrate", "bank", "prefix", "evaluate", "spill", "targets"),
    *("hardware", "placement", "readout", "sections", "stream", "sweep", "tensor_file"),
    *("calibration_file", "centred_bias", "factors", "loss_slope", "metrics", "observe", "pooled", "residual_stream"),
    *("weight_gradients",),
    *("checkpoint", "loading", "speed"),
)
NUMERICS_MAY = {"torch", "transformers", "numpy", "safetensors", "ranksearch", *sys.stdlib_module_names}


def modules_imported_by(path: Path, *, lazily: bool = True) -> Iterator[str]:
    """Full names of the modules a file imports; without `lazily` only what importing the file runs."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazily else _executed_on_import(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _executed_on_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from _executed_on_import(node.body)
            yield from _executed_on_import(node.orelse)
        elif isinstance(node, ast.ClassDef | ast.Try | ast.With):
            yield from _executed_on_import(node.body)
            for handler in getattr(node, "handlers", []):
                yield from _executed_on_import(handler.body)
        else:
            yield node


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    imported = set(modules_imported_by(path))
    ours = {module for module in imported if within(module, "ranksearch")}
    assert not {module for module in imported if within(module, *FOLDERS)}, "say ranksearch.search, not search"
    if folder == "search":
        forbidden = {m for m in ours if within(m, "ranksearch.worker", "ranksearch.service")}
        forbidden |= {m for m in imported if within(m, "transformers", "fastapi", "sqlalchemy", "httpx", "starlette")}
    elif folder == "worker":
        service = {m for m in ours if within(m, "ranksearch.service")}
        forbidden = {m for m in service if not within(m, "ranksearch.service.store")} - {"ranksearch.service"}
        forbidden |= {m for m in imported if within(m, "fastapi", "starlette", "uvicorn")}
    else:
        forbidden = {m for m in ours if within(m, "ranksearch.worker")}
        forbidden |= {m for m in imported if within(m, *HEAVY)}
        if "store" in path.relative_to(ROOT).parts:
            inner = {m for m in ours if within(m, "ranksearch.service")}
            forbidden |= {m for m in inner if not within(m, "ranksearch.service.store")} - {"ranksearch.service"}
    assert not forbidden


@pytest.mark.parametrize("name", NUMERICS)
def test_numerics_need_only_torch_and_transformers(name: str) -> None:
    path = ROOT / "worker" / f"{name}.py"
    imported = set(modules_imported_by(path, lazily=False))
    assert not {module for module in imported if module.split(".")[0] not in NUMERICS_MAY}
    ours = {module for module in imported if within(module, "ranksearch")}
    allowed = ("ranksearch.worker", "ranksearch.search.errors", "ranksearch.search.targets", "ranksearch.search.space")
    assert not {module for module in ours if not within(module, *allowed)} - {"ranksearch", "ranksearch.search"}


@pytest.mark.parametrize(
    "module",
    [f"service.{name}" for name in ("app", "cli", "listen", "demo", "store.jobs", "store.queue")] + ["search.space"],
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    script = f"""
import importlib, sys
importlib.import_module("ranksearch.{module}")
heavy = {{name.split(".")[0] for name in sys.modules}} & set({HEAVY!r})
ours = {{name for name in sys.modules if name.startswith("ranksearch.worker")}}
assert not heavy | ours, heavy | ours
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".ns")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_gpu_benchmark_runs_from_the_source_tree_beside_torch_and_transformers(tmp_path: Path) -> None:
    absent = ("sqlalchemy", "alembic", "optuna", "dbos", "pydantic", "fastapi", "botorch", "gpytorch", "accelerate")
    benchmark, figures = ROOT / "benchmarks" / "gpu.py", tmp_path / "gpu.json"
    small = ["--preset", "tiny", "--blocks", "2", "--repetitions", "1", "--dtype", "float32", "--device", "cpu"]
    arguments = [str(benchmark), *small, "--fetched", "--memory-limit", "1000000", "--json", str(figures)]
    script = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({(*absent, "datasets", "scipy", "typer", "rich")!r}))  # None: not to be had
sys.argv = {arguments!r}
runpy.run_path({str(benchmark)!r}, run_name="__main__")
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())["rows"]
    assert {"forward", "forward, backward", "calibrate", "factor", "trial, kept 0.5"} <= rows.keys()
    assert all(row["seconds"] > 0 for row in rows.values())


def test_the_guard_itself_sees_a_forbidden_import(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("from ranksearch import worker\ndef f():\n    import torch.nn\n")
    assert {"ranksearch.worker", "torch.nn"} <= set(modules_imported_by(file))
    assert "torch.nn" not in set(modules_imported_by(file, lazily=False))
