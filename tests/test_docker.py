"""What the images and the compose file name must exist; there is no Docker engine here to say so."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ranksearch.service.cli import app
from ranksearch.service.store.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SETTINGS = {f"RANKSEARCH_{name.upper()}" for name in Settings.model_fields}
#: Variables of the compose file itself, not of the program.
COMPOSE_ONLY = {"RANKSEARCH_PUBLISH"}
VERBS = {(command.name or command.callback.__name__) for command in app.registered_commands if command.callback}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(`RUN`, arguments) pairs, continued lines joined."""
    text = re.sub(r"\\\n", " ", path.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_names_only_what_exists(path: Path) -> None:
    steps = instructions(path)
    assert steps[0][0] in ("ARG", "FROM")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word, rest in steps:
        if word == "COPY" and not rest.startswith("--from"):
            *sources, _target = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest
        for names in re.findall(r"'\.\[(.+?)\]'", rest):
            assert set(names.split(",")) <= set(extras)
    assert set(re.findall(r"RANKSEARCH_\w+", path.read_text())) <= SETTINGS
    command = json.loads([rest for word, rest in steps if word == "CMD"][-1])
    assert (command[0] == "ranksearch" and command[1] in VERBS) or command[:3] == ["python", "-m", "ranksearch.worker"]
    users = [place for place, (word, _rest) in enumerate(steps) if word == "USER"]
    assert users, "does not run as root"
    assert users[0] < len(steps) - 1


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_folder_of_the_user_stays_with_root(path: Path) -> None:
    """`install --directory` gives the owner only the folders it is told, not those it makes on the way."""
    (made,) = re.findall(r"install --directory (.*)", "\n".join(rest for _, rest in instructions(path)))
    folders = [Path(word) for word in made.split(" && ")[0].split() if word.startswith("/")]
    there = {Path("/"), Path("/home/ranksearch")}
    for place, folder in enumerate(folders):
        assert folder.parent in there | set(folders[:place]), folder


def test_the_server_image_has_no_torch_and_the_worker_image_no_service() -> None:
    server, worker = ((ROOT / "docker" / f"Dockerfile.{name}").read_text() for name in ("server", "worker"))
    assert "'.[service]'" in server
    assert "'.[worker]'" in worker


def test_compose_names_only_what_exists() -> None:
    services, volumes = COMPOSE["services"], COMPOSE["volumes"]
    for name, service in services.items():
        if build := service.get("build"):
            context = (ROOT / "docker" / build["context"]).resolve()
            assert context == ROOT
            assert (context / build["dockerfile"]).is_file()
        settings = {key for key in service.get("environment", {}) if key.startswith("RANKSEARCH_")}
        assert settings <= SETTINGS, name
        for other in service.get("depends_on", {}):
            assert other in services
            healthy = "healthcheck" in services[other] or "build" in services[other]
            assert healthy or service["depends_on"][other]["condition"] != "service_healthy"
        for mount in service.get("volumes", []):
            source = re.sub(r"\$\{[^}]*\}", "./x", mount).split(":")[0]
            assert source.startswith(".") or source in volumes, mount


def test_server_and_worker_share_database_artifacts_and_models() -> None:
    server, worker = COMPOSE["services"]["server"], COMPOSE["services"]["worker"]
    shared = ("RANKSEARCH_DATABASE_URL", "RANKSEARCH_ARTIFACTS_URL", "RANKSEARCH_ALLOWED_PATHS")
    assert all(server["environment"][name] == worker["environment"][name] for name in shared)
    assert set(server["volumes"]) <= set(worker["volumes"])
    values = {"RANKSEARCH_TOKENS": "0" * 64, **{name: server["environment"][name] for name in shared}}
    values["RANKSEARCH_DATABASE_URL"] = re.sub(r"\$\{[^}]*\}", "secret", values["RANKSEARCH_DATABASE_URL"])
    settings = Settings(**{name.removeprefix("RANKSEARCH_").lower(): value for name, value in values.items()})
    assert settings.database == "postgresql+psycopg://ranksearch:secret@postgres:5432/ranksearch"
    assert str(settings.artifacts_dir) == "/data/artifacts"


def test_the_example_says_how_to_make_what_it_wants() -> None:
    example = (ROOT / "docker" / "example.env").read_text()
    command = re.search(r"printf .*", example)
    assert command
    done = subprocess.run(["sh", "-c", command[0]], capture_output=True, text=True, check=True)
    assert Settings(tokens=done.stdout).tokens == (hashlib.sha256(b"TOKEN").hexdigest(),)  # type: ignore[arg-type]
    assert "letters and digits only" in example.split("POSTGRES_PASSWORD=")[0].lower()


def test_every_variable_of_the_compose_file_is_in_the_example() -> None:
    wanted = set(re.findall(r"\$\{(\w+)", (ROOT / "docker" / "compose.yaml").read_text()))
    offered = set(re.findall(r"^(\w+)=", (ROOT / "docker" / "example.env").read_text(), re.MULTILINE))
    assert wanted == offered
    assert {name for name in wanted if name.startswith("RANKSEARCH_")} - COMPOSE_ONLY <= SETTINGS


def test_health_checks_ask_routes_that_exist(tmp_path: Path) -> None:
    from ranksearch.service.app import create_app

    paths = set(create_app(Settings(data_dir=tmp_path)).openapi()["paths"])
    asked = {path for file in DOCKERFILES for path in re.findall(r"127\.0\.0\.1:8000(/\w+)", file.read_text())}
    assert asked
    assert asked <= paths
