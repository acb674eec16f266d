"""The Optuna dashboard on the studies of all jobs, for reading only.

Its pages ask for absolute paths, so it cannot live under a prefix: it is mounted at the root, after our own routes, and
gets exactly the paths that are its own.
"""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

from a2wsgi import WSGIMiddleware
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import RedirectResponse
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ranksearch.search.coordinates import RANKS
from ranksearch.search.trials import best_trial, space_of
from ranksearch.service.heatmap import heatmap
from ranksearch.service.problems import problem

_FOLDERS: Final = (
    *("/dashboard", "/static", "/csv", "/artifacts"),
    *("/api/meta", "/api/studies", "/api/trials", "/api/artifacts"),
)
_PAGES: Final = ("/", "/favicon.ico")
_STUDY: Final = re.compile(r"/dashboard/studies/(\d+)/?")
_UNUSED: Final = ("optuna_dashboard.preferential.samplers.gp", "sklearn")


def owns(path: str) -> bool:
    """Whether a path is the dashboard's."""
    return path in _PAGES or any(path == folder or path.startswith(f"{folder}/") for folder in _FOLDERS)


class Dashboard(Mount):
    """A route that takes the dashboard's paths and leaves all others to be 404 or 405 as usual."""

    def __init__(self, storage: BaseStorage) -> None:
        wsgi: Any = WSGIMiddleware(OnFirstUse(storage))
        # Its API sends megabytes of JSON uncompressed; the highest level takes four times as long for a seventh less.
        compressed = GZipMiddleware(wsgi, minimum_size=1024, compresslevel=4)
        super().__init__("", app=ReadOnly(Preload(compressed)), name="dashboard")

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Take our paths only."""
        if scope["type"] != "http" or not owns(scope["path"]):
            return Match.NONE, {}
        return super().matches(scope)


class OnFirstUse:
    """The WSGI application, loaded by the first request, without what a dashboard for reading never asks.

    It would take in torch for a sampler, and scikit-learn, with pandas and most of SciPy, for an importance by random
    forests where it shows PED-ANOVA: two seconds of CPU time and 150 MB.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self.storage = storage
        self._lock = threading.Lock()
        self._app: Callable[..., Iterable[bytes]] | None = None

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        with self._lock:
            if self._app is None:
                with absent(*_UNUSED):
                    import optuna_dashboard

                self._app = optuna_dashboard.wsgi(self.storage, artifact_store=Heatmaps(self.storage))
        return self._app(environ, start_response)


@contextmanager
def absent(*modules: str) -> Iterator[None]:
    """As if these modules were not installed, unless they are imported already; what is imported inside, by whichever
    thread, goes without them for good."""
    hidden = [module for module in modules if module not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is Python's way to say: not here
    try:
        yield
    finally:
        for module in hidden:
            sys.modules.pop(module, None)


class Heatmaps:
    """An artifact store (Optuna's protocol) that holds nothing: the pictures of studies and trials are drawn when they
    are read."""

    def __init__(self, storage: BaseStorage) -> None:
        self.storage = storage

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The heat map of a study's best ranks so far, or of one trial's, as SVG (`picture_attribute` has the ids)."""
        study, _, number = artifact_id.partition("-")
        try:
            study_id = int(study)
            name = self.storage.get_study_name_from_id(study_id)
            trial = self._trial(study_id, int(number)) if number else best_trial(self.storage, study_id)
        except (KeyError, ValueError):
            raise ArtifactNotFound(artifact_id) from None
        job_id, _, kept = name.rpartition("/")
        panels, space = {}, space_of(self.storage, job_id, float(kept))
        if space is not None and trial is not None:
            panels[f"{name}, trial {trial.number}"] = (space, space.unpack(trial.user_attrs[RANKS]))
        return io.BytesIO(heatmap(panels).encode())

    def _trial(self, study_id: int, number: int) -> FrozenTrial:
        return self.storage.get_trial(self.storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        raise NotImplementedError("the dashboard is for looking")

    def remove(self, artifact_id: str) -> None:
        raise NotImplementedError("the dashboard is for looking")


class Preload:
    """Tells the browser, with the page of a study, what the page is going to ask for.

    The server then answers while the browser still loads and evaluates a script of six megabytes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        study = _STUDY.fullmatch(scope["path"])

        async def linked(message: Message) -> None:
            if study is not None and message["type"] == "http.response.start" and message["status"] == 200:
                trials = f"/api/studies/{study[1]}?after=0"
                for path in (trials, f"/api/studies/{study[1]}/param_importances", "/api/meta"):
                    link = f"<{path}>; rel=preload; as=fetch; crossorigin"
                    MutableHeaders(scope=message).append("Link", link)
            await send(message)

        await self.app(scope, receive, linked)


class ReadOnly:
    """Refuses whatever could change a study: the dashboard itself can delete, rename and tell."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            refusal = problem(
                403,
                "dashboard_read_only",
                "the dashboard is for looking; change jobs through /v1/jobs",
                headers={"Allow": "GET, HEAD"},
            )
            await refusal(scope, receive, send)
        elif scope["path"] == "/":
            await RedirectResponse("/dashboard/", 302)(scope, receive, send)
        else:
            if "accept-encoding" not in Headers(scope=scope):  # the dashboard breaks without one
                scope = {**scope, "headers": [*scope["headers"], (b"accept-encoding", b"identity")]}
            await self.app(scope, receive, send)
