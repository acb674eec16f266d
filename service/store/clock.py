"""One clock for all machines: the database's. Times are aware and UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """`timestamptz` on PostgreSQL; text in UTC on SQLite, which knows no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive times and store UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive time has no place in the database")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give the time zone back."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class ago(FunctionElement[datetime]):  # reads as the SQL function it is
    """The database's time, `seconds` ago, to the microsecond (SQLite: millisecond)."""

    inherit_cache = True
    type = UtcDateTime()
    name = "ago"

    def __init__(self, seconds: float = 0.0) -> None:
        """Bind the seconds."""
        super().__init__(float(seconds))


def now() -> ago:
    """The database's time."""
    return ago(0.0)


@compiles(ago, "sqlite")
def _ago_sqlite(element: ago, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', -({seconds}))) || '000')"


@compiles(ago, "postgresql")
def _ago_postgresql(element: ago, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"(clock_timestamp() - make_interval(secs => {seconds}))"
