"""The application: routes, errors, guards and the dashboard, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from ranksearch.service import health, problems
from ranksearch.service.auth import Guard
from ranksearch.service.context import open_context
from ranksearch.service.dashboard import Dashboard
from ranksearch.service.requests import BodyLimit, Requests
from ranksearch.service.routes import v1
from ranksearch.service.store.settings import Settings, load_settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application; brings the database up to date first.

    Raises:
        InvalidSettings: A setting is not usable, or strangers could reach the server.
    """
    settings = settings or load_settings()
    settings.refuse_exposure()
    context = open_context(settings)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        yield
        context.close()

    app = FastAPI(
        title="ranksearch",
        summary="Rank search for low-rank compression of language models.",
        version=_version(),
        lifespan=life,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.context = context
    app.include_router(v1)
    app.include_router(health.router)
    problems.install(app)
    app.router.routes.append(Dashboard(context.shown))
    app.add_middleware(BodyLimit)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(Requests)  # the last one added is the outermost
    return app


def _version() -> str:
    try:
        return version("ranksearch")
    except PackageNotFoundError:  # a bare checkout
        return "0"
