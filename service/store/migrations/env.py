"""Alembic's entry: migrate over the connection that `database.migrate` hands in."""

from __future__ import annotations

from typing import Any

from alembic import context

from ranksearch.service.store.database import VERSION_TABLE
from ranksearch.service.store.tables import metadata


def include_name(name: str | None, kind: str, parents: Any) -> bool:
    """Only our tables; Optuna and the queue keep theirs in the same database."""
    if kind == "table":
        return name in metadata.tables
    return kind != "schema" or name is None


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    include_name=include_name,
    compare_type=True,
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
