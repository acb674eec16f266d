"""A small HTTP server that breaks on purpose: each connection is answered by the next script of a list."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Answer = Callable[[socket.socket, str], None]


@contextmanager
def faulty_server(answers: Sequence[Answer]) -> Iterator[tuple[str, list[str]]]:
    """Serve one connection per answer; gives the address and the heads of the requests that came."""
    listener = socket.create_server(("127.0.0.1", 0))
    heads: list[str] = []

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536)
                heads.append(head.decode())
                answer(connection, heads[-1])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", heads
    finally:
        listener.close()


def hang_up(_connection: socket.socket, _head: str) -> None:
    """Close without a word."""


def reply(body: bytes, *, status: str = "200 OK", kind: str = "application/json", length: int | None = None) -> Answer:
    """Send a body; with a larger announced `length` the connection breaks in the middle."""

    def answer(connection: socket.socket, _head: str) -> None:
        size = len(body) if length is None else length
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + body)

    return answer
