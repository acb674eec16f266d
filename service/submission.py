"""Taking in a job: what can be seen to be impossible is refused now, the rest goes into the queue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError

from ranksearch.search.errors import InvalidInput, JobNotFound, UnsafeModel
from ranksearch.search.spec import JobSpec
from ranksearch.service.context import Context
from ranksearch.service.estimate import check_budgets, rank_space, with_kept
from ranksearch.service.models import HubUnreachable, read_model
from ranksearch.service.problems import at
from ranksearch.service.store import tables
from ranksearch.service.store.clock import ago, now
from ranksearch.service.store.database import reading, writing
from ranksearch.service.store.jobs import Job, Jobs, create_job
from ranksearch.service.store.paths import check_dataset
from ranksearch.service.store.settings import Settings

KEY_SECONDS: Final = 24 * 3600.0

Answer = dict[str, Any]


class KeyReused(InvalidInput):
    """The Idempotency-Key belongs to another request."""

    code = "idempotency_key_reused"


def check(spec: JobSpec, settings: Settings) -> JobSpec:
    """Refuse what cannot work; the error names the field and the way out.

    Returns:
        The spec, with the `kept` that budgets in bytes come to.
    """
    check_consent(spec, settings)
    check_datasets(spec, settings)
    try:
        with at("/model/source"):
            tensors = read_model(spec, settings)
    except HubUnreachable:
        if spec.budget.bytes is None:
            return spec
        with at("/budget/bytes"):
            raise InvalidInput(
                f"this server cannot see how large {spec.model.source} is, so it cannot tell what fits into so many "
                "bytes; name kept instead, or a local folder"
            ) from None
    spec = with_kept(spec, tensors)
    check_budgets(spec, rank_space(spec, tensors))
    return spec


def check_consent(spec: JobSpec, settings: Settings) -> None:
    """A model's own code needs the server's consent as well.

    Raises:
        UnsafeModel: The server has not consented.
    """
    if spec.model.trust_remote_code and not settings.trust_remote_code:
        with at("/model/trust_remote_code"):
            raise UnsafeModel("this server does not run code that comes with a model; leave trust_remote_code false")


def check_datasets(spec: JobSpec, settings: Settings) -> None:
    """Check every path the spec's datasets name."""
    named = [("/calibration/dataset", spec.calibration.dataset)]
    if spec.evaluation.dataset is not None:
        named.append(("/evaluation/dataset", spec.evaluation.dataset))
    named += [(f"/evaluation/test/{place}", test) for place, test in enumerate(spec.evaluation.test)]
    for pointer, dataset in named:
        with at(pointer):
            check_dataset(dataset, settings)


def check_learn_from(spec: JobSpec, jobs: Jobs) -> None:
    """Check that the jobs a search is to learn from are there and about the same model.

    Raises:
        InvalidInput: One is not.
    """
    for place, job_id in enumerate(spec.search.learn_from):
        with at(f"/search/learn_from/{place}"):
            try:
                source = jobs.get(job_id).spec["model"]["source"]
            except JobNotFound as error:
                raise InvalidInput(f"search.learn_from: {error.message}; leave it out", job=job_id) from None
            if source != spec.model.source:
                raise InvalidInput(
                    f"search.learn_from: job {job_id} is about model {source}; name jobs about {spec.model.source}",
                    job=job_id,
                )


def submit(context: Context, spec: JobSpec, *, owner: str, key: str | None, show: Callable[[Job], Answer]) -> Answer:
    """Check and queue a job, and give the answer `show` makes of it; a repeated key gives the first answer again.

    Raises:
        KeyReused: The key came with another spec before.
    """
    digest = hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    if key is not None and (earlier := _earlier(context, owner, key, digest)) is not None:
        return earlier
    spec = check(spec, context.settings)
    check_learn_from(spec, context.jobs)
    try:
        return _create(context, spec, owner, key, digest, show)
    except IntegrityError:
        # Another request with this key was faster.
        earlier = _earlier(context, owner, key, digest) if key is not None else None
        if earlier is None:
            raise
        return earlier


def _create(
    context: Context, spec: JobSpec, owner: str, key: str | None, digest: str, show: Callable[[Job], Answer]
) -> Answer:
    table = tables.idempotency
    with writing(context.engine) as connection:
        job = create_job(connection, spec, enqueue=context.queue.enqueue_job)
        answer = show(job)
        if key is not None:
            connection.execute(delete(table).where(table.c.created < ago(KEY_SECONDS)))
            values = {"owner": owner, "key": key, "body_sha256": digest, "job_id": job.id, "answer": answer}
            connection.execute(insert(table).values(**values, created=now()))
    return answer


def _earlier(context: Context, owner: str, key: str, digest: str) -> Answer | None:
    table = tables.idempotency
    query = select(table.c.body_sha256, table.c.answer).where(
        table.c.owner == owner, table.c.key == key, table.c.created >= ago(KEY_SECONDS)
    )
    with reading(context.engine) as connection:
        row = connection.execute(query).one_or_none()
    if row is None:
        return None
    if row.body_sha256 != digest:
        raise KeyReused("this Idempotency-Key was used with another spec; take a new key for a new job")
    answer: Answer = row.answer
    return answer
