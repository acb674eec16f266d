"""The API process: `python -m ranksearch.service.listen FD` serves on a socket that the supervisor has bound.

The socket outlives this process, so callers wait instead of being refused while a crashed API is restarted.
"""

from __future__ import annotations

import logging
import socket
import sys

import uvicorn

from ranksearch.service.app import create_app
from ranksearch.service.requests import name_request
from ranksearch.service.store.logs import configure_logging
from ranksearch.service.store.settings import load_settings


def main() -> None:
    settings = load_settings()
    configure_logging(settings.log_format).addFilter(name_request)
    if settings.log_format == "text":  # a line per request is for collectors, in a terminal it buries everything else
        logging.getLogger("ranksearch.service.requests").setLevel(logging.WARNING)
    listener = socket.socket(fileno=int(sys.argv[1]))
    config = uvicorn.Config(
        create_app(settings),
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
