"""Models on the hub, asked of a small hub on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from ranksearch.search.errors import ModelNotFound, UnsafeModel
from ranksearch.search.spec import JobSpec
from ranksearch.service import models
from ranksearch.service.models import HubSilent, HubUnreachable, read_model
from ranksearch.service.store.settings import Settings

from .models import weights, write_model

pytestmark = pytest.mark.one_database


class Hub(BaseHTTPRequestHandler):
    """Knows `some/model`, `some/slow`, `some/gated` and `some/pickled`."""

    weights: bytes

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models").split("?")[0].strip("/")
        repo, _, file = name.partition("/resolve/main/")
        if repo not in ("some/model", "some/slow", "some/gated", "some/pickled"):
            self._answer(404, code="RepoNotFound")
        elif not file:
            self._answer(200, json.dumps({"id": repo}).encode())
        elif repo == "some/gated":
            self._answer(403, code="GatedRepo")
        elif repo == "some/pickled" or file != "model.safetensors":
            self._answer(404, code="EntryNotFound")
        else:
            time.sleep(0.5 if repo == "some/slow" else 0.0)
            self._answer(200, self.weights)

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes = b"", *, code: str = "") -> None:
        self.send_response(status)
        for header, value in (("X-Error-Code", code), ("ETag", '"x"'), ("X-Repo-Commit", "c" * 40)):
            if value:
                self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    Hub.weights = (write_model(tmp_path / "model") / "model.safetensors").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "_hub_asked_again", 0.0)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def read(settings: Settings) -> Callable[..., models.Tensors]:
    def read(source: str, **options: Any) -> models.Tensors:
        spec = JobSpec.model_validate({"model": {"source": source}, "budget": {"kept": [0.5]}})
        return read_model(spec, settings, **options)

    return read


def test_one_model_that_cannot_be_told_leaves_the_others_checked(
    hub: ThreadingHTTPServer, read: Callable[..., models.Tensors]
) -> None:
    with pytest.raises(HubUnreachable):
        read("some/gated")
    with pytest.raises(HubUnreachable):
        read("some/slow", hub_seconds=0.05)
    assert set(read("some/slow", hub_seconds=20.0)) == set(weights())
    assert set(read("some/model")) == set(weights())


def test_what_the_hub_does_not_have_is_refused(hub: ThreadingHTTPServer, read: Callable[..., models.Tensors]) -> None:
    for source in ("some/other", "some/a--b", "some/model.git"):
        with pytest.raises(ModelNotFound, match=source):
            read(source)
    with pytest.raises(UnsafeModel, match="safetensors"):
        read("some/pickled")


def test_a_hub_out_of_reach_is_left_alone_for_a_while(
    hub: ThreadingHTTPServer, read: Callable[..., models.Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(HubSilent):
            read("some/model")
    with pytest.raises(HubUnreachable):
        read("some/model")
    monkeypatch.setattr(models, "_hub_asked_again", 0.0)
    assert set(read("some/model")) == set(weights())
