"""The device process: `python -m ranksearch.worker.device DEVICE` has torch and the model, and does what it is asked.

It speaks JSON, one object per line. Requests come on stdin as `{"id", "op", ...}`; on stdout go `{"id", "progress"}`,
`{"id", "result"}` or `{"id", "error": {code, message, data}}`, and first of all `{"hello": {...}}`
or an error without an id. Being a process of
its own, it may run out of memory, crash, or be killed for a cancellation without taking the worker down; it ends when
the agent does.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import traceback
from typing import Any, TextIO

from ranksearch.search.errors import RanksearchError
from ranksearch.worker.known_errors import as_known_error

log = logging.getLogger("ranksearch.worker.device")


def main(device: str) -> None:
    """Serve requests until stdin ends."""
    replies = _claim_stdout()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it two cuBLAS streams may sum differently
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()

    from ranksearch.worker.workbench import Workbench

    try:
        bench = Workbench(device)
    except RanksearchError as error:
        _write(replies, _error(error))
        return
    _write(replies, {"hello": bench.facts()})
    while True:
        request = requests.get()
        _write(replies, {"id": request["id"], **_answer(bench, request, replies)})


def _answer(bench: Any, request: dict[str, Any], replies: TextIO) -> dict[str, Any]:
    number, operation = request.pop("id"), request.pop("op")

    def progress(fraction: float) -> None:
        _write(replies, {"id": number, "progress": fraction})

    try:
        return {"result": bench.do(operation, progress=progress, **request)}
    except Exception as error:
        if not isinstance(error, RanksearchError):
            bench.recover()  # it may have left half of something behind, or no memory
        known = as_known_error(error, operation)
        if known is None:
            log.error("%s failed\n%s", operation, traceback.format_exc())
            known = RanksearchError(f"{operation} failed: {type(error).__name__}: {error}")
        return _error(known)


def _error(error: RanksearchError) -> dict[str, Any]:
    return {"error": {"code": error.code, "message": error.message, "data": error.data}}


def error_from(reply: dict[str, Any]) -> RanksearchError:
    """The error that a reply carries, as its own class again."""
    kinds = {kind.code: kind for kind in _kinds(RanksearchError)}
    error = kinds.get(reply["code"], RanksearchError)(reply["message"])
    error.data = reply["data"]
    return error


def _kinds(root: type[RanksearchError]) -> list[type[RanksearchError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in _kinds(child))]


def _claim_stdout() -> TextIO:
    """Keep stdout for replies; whatever libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return replies


def _write(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _read_requests(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)  # the agent is gone; a computation may be under way, so there is nobody else to end it


if __name__ == "__main__":
    from ranksearch.service.store.logs import configure_logging

    configure_logging(os.environ.get("RANKSEARCH_LOG_FORMAT", "text"))
    main(sys.argv[1])
