"""What users install: the wheel that is built from the sdist, without anything of this checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("search", "worker", "service")
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "demo", "test-artifacts", "dist")
)


def package_files() -> set[str]:
    """Every source file of the three folders, as the wheel should name it."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return {f"ranksearch/{path.relative_to(ROOT)}" for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel made from it."""
    source = tmp_path_factory.mktemp("checkout") / "ranksearch"
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_OUT)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_wheel_holds_every_file_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    code = {name for name in names if ".dist-info/" not in name}
    assert code == package_files()
    assert {f"ranksearch/{folder}/py.typed" for folder in FOLDERS} <= code
    assert any(re.fullmatch(r"ranksearch/service/store/migrations/versions/.+\.py", name) for name in code)
    assert {name.split("/")[0] for name in names - code} == {"ranksearch-0.1.0.dist-info"}


def test_the_sdist_holds_sources_without_the_links(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {name.removeprefix("ranksearch/") for name in package_files()} <= names
    assert not {name for name in names if name.startswith((".ns", ".git/", ".venv"))}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_the_installed_wheel_works_alone(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import ranksearch.search.errors as errors, ranksearch.service.cli as cli
print(errors.__file__, cli.__file__)
"""
    environment = {"PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(file.startswith(str(tmp_path)) for file in done.stdout.split())


def extras(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """Names of the distributions that an extra asks for, extras of our own resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"][name] if name else project["dependencies"]
    found: set[str] = set()
    for requirement in wanted:
        if own := re.fullmatch(r"ranksearch\[(.+)\]", requirement):
            for inner in own[1].split(","):
                assert inner not in seen
                found |= extras(inner, seen | {name})
        else:
            found.add(re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-"))
    return found


def test_the_server_needs_no_torch() -> None:
    heavy = {"torch", "transformers", "botorch", "gpytorch", "accelerate", "datasets"}
    assert not extras("service") & heavy
    assert heavy - {"gpytorch"} <= extras("worker")


def test_a_worker_alone_has_its_command() -> None:
    """What only the server's extra asks for is hidden; `ranksearch worker` must not miss it."""
    hidden = {name.replace("-", "_") for name in extras("service") - extras("worker")}
    assert {"fastapi", "uvicorn"} <= hidden
    script = f"import sys\nsys.modules.update(dict.fromkeys({sorted(hidden)!r}))\nimport ranksearch.service.cli"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".ns")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_requirement_says_which_file_needs_it() -> None:
    """Every `# some/file.py` beside a dependency exists."""
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'^\s+"[^"]+",\s+# ([\w*/.]+/[\w*/.]+)', text, re.MULTILINE)
    assert len(named) > 15
    for path in named:
        assert list(ROOT.glob(path.rstrip(":"))), path


def test_constraints_are_exact_and_take_any_build_of_torch() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    assert "torch==2.13.0" in lines
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert extras("dev") | extras("") <= pinned
