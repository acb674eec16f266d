"""Ranks as a picture: layer by matrix type, the colour the share of the matrix' parameters kept, 1 for a dense one.

The SVG is written by hand, so that the server can draw one for every look at the dashboard, without matplotlib and in
milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

import numpy as np

from ranksearch.search.space import Floats, Ranks, RankSpace
from ranksearch.search.spec import budget_label
from ranksearch.search.targets import Target

#: Kept 0, 0.25, ..., 1; the colours of viridis.
COLOURS: Final = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
CELL: Final = 28  # pixels, as all lengths here
HEAD: Final = 56
FOOT: Final = 22
LETTER: Final = 7  # of the labels

_BLOCK: Final = re.compile(r".+?\.(?P<depth>\d+)\.(?P<below>.+)")


def heatmap(panels: Mapping[str, tuple[RankSpace, Ranks]]) -> str:
    """The panels below each other, as an SVG document.

    Args:
        panels: Title -> rank space and ranks `(targets,)`.
    """
    parts, top, width = [], 0, 0
    for title, (space, ranks) in panels.items():
        kinds, shares = shares_by_layer(space, ranks)
        left = LETTER * max(map(len, kinds)) + 12
        parts.append(f'<g transform="translate(0 {top})">{"".join(_panel(title, kinds, shares, left))}</g>')
        top += HEAD + CELL * len(kinds) + FOOT
        width = max(width, left + CELL * max(shares.shape[1], 14) + 12)
    page = f'viewBox="0 0 {width} {top}" width="{width}" height="{top}" font-family="sans-serif" font-size="12"'
    paper = f'<rect width="{width}" height="{top}" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {page}>{paper}{"".join(parts)}</svg>\n'


def shares_by_layer(space: RankSpace, ranks: Ranks) -> tuple[list[str], Floats]:
    """Kept parameters / original parameters of each matrix type in each layer.

    Returns:
        The types in the order of the model, and `(types, layers)`: several matrices of one type in a layer (experts)
        are counted together, and where there is none, it is not a number.
    """
    kinds = list(dict.fromkeys(target.kind for target in space.targets))
    shape = (len(kinds), 1 + max(target.depth for target in space.targets))
    at = ([kinds.index(target.kind) for target in space.targets], [target.depth for target in space.targets])
    kept, dense = np.zeros(shape), np.zeros(shape)
    np.add.at(kept, at, space.parameters_of(ranks))
    np.add.at(dense, at, space.dense_parameters)
    return kinds, np.divide(kept, dense, out=np.full(shape, np.nan), where=dense > 0)


def report_panels(report: Mapping[str, Any]) -> dict[str, tuple[RankSpace, Ranks]]:
    """The panels of a job's report: the ranks of each budget's checkpoint."""
    panels = {}
    for budget in report["budgets"]:
        targets = tuple(_target(name, facts["shape"]) for name, facts in budget["targets"].items())
        space = RankSpace(targets=targets, form=report["spec"]["method"]["form"])
        ranks = np.array([facts["rank"] for facts in budget["targets"].values()], dtype=np.int64)
        panels[f"{report['job']}, kept {budget_label(budget['kept'])}"] = (space, ranks)
    return panels


def _target(name: str, shape: tuple[int, int]) -> Target:
    """The target, its matrix type and layer read from its name."""
    match = _BLOCK.fullmatch(name)
    below = match["below"] if match else name
    kind = ".".join(part for part in below.split(".") if not part.isdecimal())
    depth = int(match["depth"]) if match else 0
    return Target(name=name, out_features=shape[0], in_features=shape[1], kind=kind, depth=depth)


def _panel(title: str, kinds: list[str], shares: Floats, left: int) -> Iterator[str]:
    yield f'<text x="12" y="20" font-size="14">{escape(title)}: share of parameters kept, %</text>'
    yield from _legend(left)
    for row, kind in enumerate(kinds):
        middle = HEAD + CELL * row + CELL / 2 + 4
        yield f'<text x="{left - 6}" y="{middle}" text-anchor="end">{escape(kind)}</text>'
        for layer, share in enumerate(shares[row]):
            if not np.isnan(share):
                what = f"{kind}, layer {layer}: {100 * share:.1f}%"
                yield _cell(left + CELL * layer, HEAD + CELL * row, float(share), what)
    for layer in range(shares.shape[1]):
        yield _label(left + CELL * layer, HEAD + CELL * len(kinds) - 6, str(layer))


def _legend(left: int) -> Iterator[str]:
    for step in range(11):
        yield _cell(left + CELL * step, HEAD - CELL - 3, step / 10, "", height=CELL // 2 + 4)
    yield f'<text x="{left + CELL * 11 + 6}" y="{HEAD - CELL + 10}">100: dense</text>'


def _cell(x: int, y: int, share: float, title: str, height: int = CELL) -> str:
    red, green, blue = (int(np.interp(share, np.linspace(0, 1, len(COLOURS)), part)) for part in COLOURS.T)
    ink = "white" if share < 0.6 else "black"
    tip = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<g>{tip}<rect x="{x}" y="{y}" width="{CELL - 1}" height="{height - 1}" fill="rgb({red},{green},{blue})"/>'
        f"{_label(x, y + height / 2 - 10, f'{100 * share:.0f}', ink)}</g>"
    )


def _label(x: int, y: float, text: str, ink: str = "black") -> str:
    return f'<text x="{x + CELL / 2}" y="{y + 14}" text-anchor="middle" font-size="11" fill="{ink}">{text}</text>'
