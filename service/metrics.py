"""Prometheus metrics, read from the database when they are asked for: right in every process, at rest at no cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select, text

from ranksearch.service.context import Context
from ranksearch.service.store.clock import now
from ranksearch.service.store.database import reading
from ranksearch.service.store.tables import job

STATUSES: Final = ("queued", "running", "succeeded", "failed", "cancelled")
TRIAL_STATES: Final = ("running", "complete", "pruned", "fail", "waiting")
CONTENT_TYPE: Final = CONTENT_TYPE_LATEST


class _Gauges(Collector):
    def __init__(self, context: Context) -> None:
        self.context = context

    def collect(self) -> Iterator[Metric]:
        with reading(self.context.engine) as connection:
            counted = connection.execute(select(job.c.status, func.count()).group_by(job.c.status))
            jobs = {row[0]: row[1] for row in counted}
            oldest = select(now().label("now"), func.min(job.c.created).label("oldest")).where(job.c.status == "queued")
            queue = connection.execute(oldest).one()
            states = connection.execute(text("SELECT state, COUNT(*) FROM trials GROUP BY state"))
            trials = {str(row[0]).lower(): row[1] for row in states}
        yield _gauge("ranksearch_jobs", "Jobs by status.", "status", {name: jobs.get(name, 0) for name in STATUSES})
        age = (queue.now - queue.oldest).total_seconds() if queue.oldest else 0.0
        yield GaugeMetricFamily("ranksearch_queue_age_seconds", "Age of the oldest queued job.", value=max(0.0, age))
        known = self.context.workers.all()
        alive = sum(worker.alive for worker in known)
        workers = {"alive": alive, "silent": len(known) - alive}
        yield _gauge("ranksearch_workers", "Workers by liveness.", "state", workers)
        yield _gauge("ranksearch_trials", "Trials by state.", "state", {s: trials.get(s, 0) for s in TRIAL_STATES})


def _gauge(name: str, help_text: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def metrics_text(context: Context) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Gauges(context))
    return generate_latest(registry)
