"""Settings of server and workers: the `RANKSEARCH_*` environment variables."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ranksearch.search.errors import InvalidSettings

_SHA256 = re.compile(r"[0-9a-f]{64}")


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "ranksearch"


class Settings(BaseSettings):
    """Where things are kept, who may call, and what the server may read.

    Everything is kept under `data_dir` (default `~/.local/share/ranksearch`) unless `database_url` or `artifacts_url`
    say otherwise. No local path may be read unless it lies under a folder of `allowed_paths`.
    """

    model_config = SettingsConfigDict(env_prefix="RANKSEARCH_", extra="ignore", frozen=True)

    data_dir: Annotated[Path, Field(description="Folder of the SQLite file and of the artifacts.")] = Field(
        default_factory=_default_data_dir, validate_default=True
    )
    database_url: str = Field("", description="`postgresql://...` for many machines; empty: SQLite in the data folder.")
    artifacts_url: str = Field(
        "", description="Folder shared by server and workers; empty: `artifacts` in the data folder."
    )
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    tokens: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="sha256 of each token, in hex, comma separated."
    )
    allowed_paths: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="Folders users may name, `:` separated."
    )
    trust_remote_code: bool = False
    log_format: Literal["text", "json"] = "text"
    worker_ttl_seconds: Annotated[float, Field(gt=0)] = 30.0

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: str) -> str:
        for scheme in ("postgresql://", "postgres://"):
            if url.startswith(scheme):
                return "postgresql+psycopg://" + url.removeprefix(scheme)
        if url and not url.startswith(("sqlite:///", "postgresql+psycopg://")):
            raise ValueError("must start with sqlite:/// or postgresql://")
        return url

    @field_validator("artifacts_url")
    @classmethod
    def _folder(cls, url: str) -> str:
        scheme = urlsplit(url).scheme
        if scheme not in ("", "file"):
            raise ValueError(f"{scheme}:// is not available yet; name a folder that server and workers share")
        return url

    @field_validator("tokens", mode="before")
    @classmethod
    def _split_tokens(cls, value: Any) -> Any:
        tokens = value.split(",") if isinstance(value, str) else value
        hashes = tuple(token.strip().lower() for token in tokens if token.strip())
        if not all(_SHA256.fullmatch(token) for token in hashes):
            raise ValueError("each must be a token's sha256 in hex: printf %s TOKEN | sha256sum")
        return hashes

    @field_validator("allowed_paths", mode="before")
    @classmethod
    def _split_paths(cls, value: Any) -> Any:
        paths = value.split(os.pathsep) if isinstance(value, str) else value
        return tuple(Path(path).expanduser().resolve() for path in paths if str(path).strip())

    @property
    def database(self) -> str:
        """The SQLAlchemy URL of the one database that jobs, queue and studies share."""
        return self.database_url or f"sqlite:///{self.data_dir / 'ranksearch.db'}"

    @property
    def artifacts_dir(self) -> Path:
        """The folder of checkpoints, calibrations and factor banks."""
        if not self.artifacts_url:
            return self.data_dir / "artifacts"
        return Path(unquote(urlsplit(self.artifacts_url).path)).expanduser().absolute()

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def refuse_exposure(self) -> None:
        """Refuse to serve strangers.

        Raises:
            InvalidSettings: The host can be reached from outside and there are no tokens.
        """
        if not self.loopback and not self.tokens:
            raise InvalidSettings(
                f"host {self.host} can be reached from other machines and RANKSEARCH_TOKENS is empty; set it to the "
                "sha256 of a token (printf %s TOKEN | sha256sum) or serve on 127.0.0.1",
                host=self.host,
            )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, seen from itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def load_settings(**values: Any) -> Settings:
    """Read the environment; arguments win.

    Raises:
        InvalidSettings: A value is not usable; the message names the variable.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        faults = [f"RANKSEARCH_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()]
        raise InvalidSettings("; ".join(faults)) from None
