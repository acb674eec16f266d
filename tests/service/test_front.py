"""The front of a job from its report: which budgets are on it, as a table and as a picture."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from ranksearch.search.errors import InvalidInput
from ranksearch.service.front import Excess, front, text_of
from ranksearch.service.plot import check_picture, plot_front
from ranksearch.service.summary import front_table, score_table

DENSE = 10.0
#: Kept -> excess of the checkpoint; 0.6 is larger and worse than 0.4.
FRONT = {0.4: 0.2, 0.8: 0.05, 0.6: 0.25}


def scores(perplexity: float, half: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"perplexity": perplexity, "kl": 0.125}
    if half is not None:
        excess = math.log(perplexity / DENSE)
        found |= {"excess": excess, "excess_interval": [excess - half, excess + half]}
    return {"evaluation": {**found, "perplexity": 2 * perplexity}, "test": {"t.txt": found, "u.txt": {}}}


def report_of(half: float | None) -> dict[str, Any]:
    """A report with intervals of this half width, or one older than intervals."""
    budgets = [
        {
            "kept": kept,
            "scores": {
                "dense": scores(DENSE, half and 0.0),
                "uniform": scores(DENSE * math.exp(2 * excess), half),
                "prior": scores(DENSE * math.exp(1.5 * excess), half),
                "final": scores(DENSE * math.exp(excess), half),
            },
            "parameters": {"model": round(1_000_000 * kept)},
            "bytes": {"disk": round(2**22 * kept)},
            "speed": {"after": {"decode_tokens_per_second": 123.4}},
        }
        for kept, excess in FRONT.items()
    ]
    return {"budgets": budgets}


def printed(table: Table) -> str:
    console = Console(width=200, file=StringIO(), record=True)
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("half", [0.01, None])
def test_points_are_in_order_and_the_dominated_one_is_known(half: float | None) -> None:
    report = report_of(half)
    points = front(report)
    assert text_of(report) == "t.txt"
    assert [point.kept for point in points] == [0.8, 0.6, 0.4]
    assert [point.excess["final"].mean for point in points] == pytest.approx([0.05, 0.25, 0.2])
    assert [by and by.kept for by in (point.dominated_by(points) for point in points)] == [None, 0.4, None]
    interval = points[0].excess["final"].interval
    assert interval == (None if half is None else pytest.approx((0.04, 0.06)))


def test_a_score_that_is_not_known_is_no_point_and_beats_nobody() -> None:
    report = report_of(None)
    report["budgets"][0]["scores"]["final"]["test"]["t.txt"]["perplexity"] = None
    points = front(report)
    assert "final" not in points[-1].excess
    assert [point.dominated_by(points) for point in points] == [None, None, None]


def test_without_a_test_text_the_front_is_read_on_the_evaluation_text() -> None:
    report = report_of(None)
    for budget in report["budgets"]:
        for row in budget["scores"].values():
            row["test"] = {}
    assert text_of(report) == "evaluation"
    assert front(report)[0].perplexity["dense"] == 2 * DENSE
    assert front(report)[0].excess["final"] == Excess(mean=pytest.approx(0.05))


def test_the_table_marks_what_is_dominated() -> None:
    lines = printed(front_table(report_of(0.01))).splitlines()
    (row,) = (line for line in lines if line.startswith("0.6"))
    for words in ("600,000", "2.4 MiB", "10.000", "12.840", "0.2500 [0.2400, 0.2600]", "0.1250", "123"):
        assert words in row
    assert row.rstrip().endswith("dominated by 0.4")
    assert sum("dominated" in line for line in lines) == 1
    assert "0.2500 " in printed(front_table(report_of(None)))


def test_the_dense_model_stands_once_above_the_budgets() -> None:
    rows = [line.split()[:2] for line in printed(score_table(report_of(0.01))).splitlines()[1:]]
    assert rows[0] == ["1", "dense"]
    assert sum("dense" in row for row in rows) == 1
    assert [kept for kept, name in rows if name == "final"] == [
        f"{budget['kept']}" for budget in report_of(0.01)["budgets"]
    ]


def test_the_name_of_a_text_is_no_markup() -> None:
    report = json.loads(json.dumps(report_of(0.01)).replace("t.txt", "a[/b].txt"))
    assert "a[/b].txt perplexity" in printed(score_table(report))
    assert "front on a[/b].txt" in printed(front_table(report))


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "front.svg"
    folder.mkdir()
    with pytest.raises(InvalidInput, match="name a file"):
        check_picture(folder)
    with pytest.raises(InvalidInput, match=r"cannot write .*front\.svg"):
        plot_front(report_of(0.01), folder)


@pytest.mark.parametrize("half", [0.01, None])
def test_the_picture_has_a_line_for_each_row(half: float | None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").rcParams["svg.fonttype"] = "none"
    picture = tmp_path / "front.svg"
    plot_front(report_of(half), picture)
    words = {(each.text or "").strip() for each in ElementTree.parse(picture).iter()}
    assert {"uniform", "prior", "final", "kept", "excess on t.txt, nats per token"} <= words
