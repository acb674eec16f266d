"""The API process: `python -m ranksearch.service.listen FD` serves on a socket that the supervisor has bound.

The socket outlives this process, so callers wait instead of being refused while a crashed API is restarted.
"""

from __future__ import annotations

import socket
import sys

import uvicorn

from ranksearch.service.app import create_app
from ranksearch.service.store.settings import load_settings


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    config = uvicorn.Config(
        create_app(load_settings()),
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
