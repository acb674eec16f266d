"""`python -m ranksearch.service.cli` is the `ranksearch` command."""

from __future__ import annotations

from ranksearch.service.cli import main

main()
