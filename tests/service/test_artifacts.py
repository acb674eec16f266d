from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from ranksearch.search.errors import Conflict, JobNotFound, StorageFull
from ranksearch.search.spec import JobSpec
from ranksearch.service.store.artifacts import ArtifactStore
from ranksearch.service.store.checkpoints import CheckpointFile, Checkpoints
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.settings import Settings


@pytest.fixture
def store(settings: Settings, engine: Engine) -> ArtifactStore:
    return ArtifactStore.of(settings, engine)


def finished(jobs: Jobs, spec: JobSpec) -> str:
    job = jobs.create(spec)
    jobs.request_cancel(job.id)
    return job.id


def files(store: ArtifactStore) -> list[str]:
    return sorted(path.name for path in store.root.rglob("*") if path.is_file())


def test_a_file_is_named_by_its_content(store: ArtifactStore, jobs: Jobs, spec: JobSpec, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"x" * 3_000_000)
    blob = store.put_file(source, job_id=finished(jobs, spec))
    assert (blob.sha256, blob.size) == (hashlib.sha256(b"x" * 3_000_000).hexdigest(), 3_000_000)
    path = store.path(blob.sha256)
    assert path.read_bytes() == b"x" * 3_000_000
    assert path.relative_to(store.root).parts == ("blobs", "sha256", blob.sha256[:2], blob.sha256)
    assert files(store) == [blob.sha256]


@pytest.mark.one_database
@pytest.mark.parametrize("away", [False, True])
def test_a_file_is_moved_into_the_store(
    store: ArtifactStore, jobs: Jobs, spec: JobSpec, tmp_path: Path, away: bool
) -> None:
    if away and os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second filesystem")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if away else tmp_path) as folder:
        source = Path(folder, "bank")
        source.write_bytes(b"factors")
        inode, job = source.stat().st_ino, finished(jobs, spec)
        path = store.path(store.put_file(source, job_id=job).sha256)
        assert (path.read_bytes(), path.stat().st_ino == inode) == (b"factors", not away)
        source.write_bytes(b"factors")
        assert store.path(store.put_file(source, job_id=job).sha256) == path
        assert not source.exists()
    assert files(store) == [path.name]


@pytest.mark.one_database
def test_what_a_killed_process_was_writing_is_swept_away(store: ArtifactStore, jobs: Jobs, spec: JobSpec) -> None:
    with store._temporary() as (_, old), store._temporary() as (_, young):
        os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
        store.sweep()
        assert (old.exists(), young.exists()) == (False, True)


def test_the_same_content_is_kept_once_until_no_job_needs_it(store: ArtifactStore, jobs: Jobs, spec: JobSpec) -> None:
    first, second = finished(jobs, spec), finished(jobs, spec)
    shared = store.put([b"sha", b"red"], job_id=first)
    assert store.put([b"shared"], job_id=second) == shared
    mine = store.put([b"mine"], job_id=first)
    assert files(store) == sorted([shared.sha256, mine.sha256])
    assert store.delete_job(first) == 4
    assert files(store) == [shared.sha256]
    assert store.used_by(second) == {shared.sha256}
    assert store.delete_job(second) == 6
    assert files(store) == []


def test_a_calibration_is_found_by_later_jobs(store: ArtifactStore, jobs: Jobs, spec: JobSpec, tmp_path: Path) -> None:
    first, second, third = (finished(jobs, spec) for _ in range(3))
    source = tmp_path / "moments"
    source.write_bytes(b"moments")
    assert store.find("calibration", "f", job_id=first) is None
    path = store.save("calibration", "f", source, job_id=first)
    assert store.find("calibration", "f", job_id=second) == path
    assert store.find("bank", "f", job_id=second) is None
    store.delete_job(first)
    assert store.find("calibration", "f", job_id=third) == path
    store.delete_job(second)
    store.delete_job(third)
    assert files(store) == []
    assert store.find("calibration", "f", job_id=finished(jobs, spec)) is None


def test_two_jobs_may_save_the_same_calibration_at_once(
    store: ArtifactStore, jobs: Jobs, spec: JobSpec, tmp_path: Path
) -> None:
    count = 8
    ids, gate, saved = [finished(jobs, spec) for _ in range(count)], threading.Barrier(count), []

    def save(job_id: str) -> None:
        source = tmp_path / job_id
        gate.wait()
        for number in range(10):
            source.write_bytes(b"moments")
            saved.append(store.save("calibration", f"f{number}", source, job_id=job_id))

    threads = [threading.Thread(target=save, args=[job_id]) for job_id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(saved), len(set(saved))) == (10 * count, 1)


@pytest.mark.one_database
def test_a_damaged_calibration_is_not_found(store: ArtifactStore, jobs: Jobs, spec: JobSpec, tmp_path: Path) -> None:
    job = finished(jobs, spec)
    source = tmp_path / "moments"
    source.write_bytes(b"moments")
    path = store.save("calibration", "f", source, job_id=job)
    path.write_bytes(b"mom")
    assert store.find("calibration", "f", job_id=job) is None
    source.write_bytes(b"moments")
    assert store.save("calibration", "f", source, job_id=job).read_bytes() == b"moments"


def test_a_job_that_is_not_over_is_not_deleted(store: ArtifactStore, jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    blob = store.put([b"x"], job_id=job.id)
    for _ in range(2):
        with pytest.raises(Conflict, match="cancel it first"):
            store.delete_job(job.id)
        jobs.set_running(job.id, "w")
    assert store.path(blob.sha256).exists()
    jobs.fail(job.id, {})
    store.delete_job(job.id)
    with pytest.raises(JobNotFound):
        jobs.get(job.id)
    with pytest.raises(JobNotFound):
        store.delete_job(job.id)
    with pytest.raises(JobNotFound):
        store.put([b"late"], job_id=job.id)
    assert files(store) == []
    assert jobs.events(job.id) == []


@pytest.mark.one_database
def test_a_full_disk_is_said_and_leaves_nothing(store: ArtifactStore, jobs: Jobs, spec: JobSpec) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageFull, match="free space and submit") as caught:
        store.put(chunks(), job_id=finished(jobs, spec))
    assert caught.value.status == 507
    assert files(store) == []


@pytest.mark.one_database
def test_an_interrupted_write_leaves_nothing(store: ArtifactStore, jobs: Jobs, spec: JobSpec) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"some"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put(chunks(), job_id=finished(jobs, spec))
    assert files(store) == []


def test_a_blob_that_is_stored_while_another_job_is_deleted_stays(
    store: ArtifactStore, jobs: Jobs, spec: JobSpec
) -> None:
    for round_ in range(8):
        content = [f"round {round_}".encode()]
        old, new = finished(jobs, spec), finished(jobs, spec)
        blob = store.put(content, job_id=old)
        gate = threading.Barrier(2)

        def put(gate: threading.Barrier = gate, content: list[bytes] = content, new: str = new) -> None:
            gate.wait()
            store.put(content, job_id=new)

        thread = threading.Thread(target=put)
        thread.start()
        gate.wait()
        store.delete_job(old)
        thread.join(30)
        assert store.path(blob.sha256).is_file()


def test_a_checkpoint_lists_its_files(store: ArtifactStore, jobs: Jobs, spec: JobSpec, engine: Engine) -> None:
    job = jobs.create(spec)
    jobs.set_running(job.id, "w")
    checkpoints = Checkpoints(engine)
    names = {"config.json": b"{}", "sub/model.safetensors": b"weights"}
    held = []
    for name, content in names.items():
        blob = store.put([content], job_id=job.id)
        held.append(CheckpointFile(path=name, size=blob.size, sha256=blob.sha256))
    checkpoints.add(job.id, 0.5, held[:1])
    checkpoints.add(job.id, 0.5, held, facts={"parameters": 7})
    checkpoints.add(job.id, 0.25, held[:1])
    first, second = checkpoints.of(job.id)
    assert (first.kept, first.files, first.facts) == ("0.5", tuple(held), {"parameters": 7})
    assert (second.kept, second.files) == ("0.25", tuple(held[:1]))
    assert checkpoints.file(job.id, "0.5", "sub/model.safetensors") == held[1]
    assert checkpoints.file(job.id, "0.5", "../config.json") is None
    assert [event.kind for event in jobs.events(job.id)].count("checkpoint") == 2
    with pytest.raises(JobNotFound):
        checkpoints.add("job_x", 0.5, held)
    jobs.succeed(job.id)
    store.delete_job(job.id)
    assert checkpoints.of(job.id) == []
