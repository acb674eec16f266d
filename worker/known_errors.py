"""What an error of the system or a library means to a user."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from ranksearch.search.errors import OutOfMemory, RanksearchError, StorageFull

_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
_NO_SPACE = ("No space left on device", "Disk quota exceeded", "Not enough disk space")


def as_known_error(error: BaseException, doing: str) -> RanksearchError | None:
    """The error of ours that says what `error`, or what caused it, means to a user; None when it is a defect.

    Args:
        error: What was raised.
        doing: The operation, for the message.
    """
    for each in _causes(error):
        text, number = str(each), getattr(each, "errno", None)
        reason = f"({text.strip().split(chr(10), 1)[0][:300]})"
        if isinstance(each, RanksearchError):
            return each
        if isinstance(each, MemoryError) or type(each).__name__ == "OutOfMemoryError" or _says(text, _NO_MEMORY):
            way_out = "use a device with more memory, shorter sequences or a smaller model"
            return OutOfMemory(f"Out of memory in {doing}: {way_out}. {reason}", doing=doing)
        if number in (errno.ENOSPC, errno.EDQUOT) or _says(text, _NO_SPACE):
            return StorageFull(f"The disk is full {reason}: free space and submit the job again.", doing=doing)
    return None


def _says(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text for phrase in phrases)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
