"""Fetch a checkpoint: resume where an earlier download stopped, and believe nothing but the sha256."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import httpx

from ranksearch.search.errors import BrokenDownload, InvalidInput, ServerUnreachable, StorageFull
from ranksearch.search.spec import budget_label
from ranksearch.service.client import Client

PIECE_BYTES: Final = 1 << 20
ATTEMPTS: Final = 5

#: Called with a file's path and how many of its bytes are here.
Seen = Callable[[str, int], None]


def choose(checkpoints: Sequence[dict[str, Any]], kept: float | None) -> dict[str, Any]:
    """The checkpoint of a budget; the only one when no budget is named.

    Raises:
        InvalidInput: There is none, or the choice is open.
    """
    if not checkpoints:
        raise InvalidInput("the job has no checkpoint yet; follow it with `ranksearch watch`")
    there = {budget_label(float(checkpoint["kept"])): checkpoint for checkpoint in checkpoints}
    if kept is None:
        if len(there) > 1:
            raise InvalidInput(f"the job has checkpoints for kept {', '.join(there)}; name one with --kept")
        return checkpoints[0]
    if budget_label(kept) not in there:
        raise InvalidInput(f"the job has no checkpoint for kept {kept:g}, only for {', '.join(there)}")
    return there[budget_label(kept)]


def fetch(client: Client, files: Sequence[dict[str, Any]], folder: Path, seen: Seen) -> None:
    """Bring `files` (path, size, sha256, url) into a folder; files that are there already are checked and kept.

    Raises:
        BrokenDownload: A file does not have the announced content, even when fetched again.
        ServerUnreachable: The connection broke, and again and again without a byte in between.
        StorageFull: The disk is full; what has arrived stays for the next try.
    """
    for file in files:
        target = folder / _inside(file["path"])
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch_file(client, file, target, seen)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(
                    f"no space left for {target}; free some and fetch again, it goes on from there"
                ) from error
            raise InvalidInput(f"cannot write {target}: {error.strerror or error}") from error


def _fetch_file(client: Client, file: dict[str, Any], target: Path, seen: Seen) -> None:
    size, sha256 = int(file["size"]), str(file["sha256"])
    if target.is_file() and target.stat().st_size == size and _sha256(target) == sha256:
        seen(file["path"], size)
        return
    part = target.with_name(target.name + ".part")
    for fresh in (False, True):
        if fresh or (part.exists() and part.stat().st_size > size):
            part.unlink(missing_ok=True)
        if _complete(client, file, part, seen) == sha256:
            os.replace(part, target)
            return
    part.unlink(missing_ok=True)
    raise BrokenDownload(
        f"{file['path']}: the server announces sha256 {sha256[:12]}..., what arrived has another", path=file["path"]
    )


def _complete(client: Client, file: dict[str, Any], part: Path, seen: Seen) -> str:
    """Append to the part file until it has the announced size; returns its sha256, nothing when it has another size."""
    name, url, size = str(file["path"]), str(file["url"]), int(file["size"])
    digest = _digest(part) if part.exists() else hashlib.sha256()
    have = part.stat().st_size if part.exists() else 0
    seen(name, have)
    failures = 0
    with part.open("ab") as out:
        while have < size:
            before = have
            try:
                with client.open(url, offset=have) as response:
                    if response.status_code != 206 and have:  # the server does not resume: from the beginning
                        digest, have = hashlib.sha256(), 0
                        out.truncate(0)
                    for piece in response.iter_raw():  # as it comes, so that a broken piece is kept too
                        out.write(piece)
                        digest.update(piece)
                        have += len(piece)
                        seen(name, have)
            except httpx.TransportError as error:
                failures = 0 if have > before else failures + 1
                if failures >= ATTEMPTS:
                    raise ServerUnreachable(
                        f"the download of {name} broke off: {error}; fetch again, it goes on from there"
                    ) from error
                time.sleep(0.2 * 2**failures)
            else:
                if have == before:
                    break
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest() if have == size else ""


def _inside(path: str) -> PurePosixPath:
    """A relative path that stays in its folder, whatever the server says."""
    relative = PurePosixPath(path)
    if relative.is_absolute() or not relative.parts or ".." in relative.parts or "\\" in path:
        raise BrokenDownload(f"the server names a file outside the folder: {path!r}")
    return relative


def _digest(path: Path) -> hashlib._Hash:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest


def _sha256(path: Path) -> str:
    return _digest(path).hexdigest()
