"""How figures are written for people."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any


def number(value: Any, digits: int = 3) -> str:
    """A score as a person reads it; a dash when there is none."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3e}"


def count(value: Any) -> str:
    """A count of things, with separators."""
    return f"{value:,}" if isinstance(value, int) else "-"


def size(value: Any) -> str:
    """Bytes in units of 1024."""
    if not isinstance(value, int | float):
        return "-"
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def duration(seconds: Any) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 2 h 5 min."""
    if not isinstance(seconds, int | float):
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def ago(time: str | None) -> str:
    """How long ago an RFC 3339 time was."""
    if not time:
        return "-"
    return f"{duration((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())} ago"
