"""What the terminal says while S3 does not answer the workers of a job, which nobody sees."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from helpers.s3_proxy import S3Proxy, proxied
from models import s3_waiting
from models.file_systems import url_to_fs
from models.patient_s3 import PATIENCE_ENV
from pipelines.config.ingest import IngestConfig
from pipelines.runtime import places
from pipelines.runtime.errors import run_command


@pytest.fixture
def proxy(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    monkeypatch.setattr(places, "ASK_EVERY_S", 0.2)
    monkeypatch.setattr(s3_waiting, "SAY_AFTER_S", 0.6)
    monkeypatch.delenv(PATIENCE_ENV, raising=False)
    with proxied(s3) as proxy:
        url_to_fs("s3://")[0].makedirs("watched", exist_ok=True)
        yield proxy


def run(proxy: S3Proxy, source: str, down_s: float, then_s: float) -> None:
    """A job that only waits, as a driver does whose workers work."""

    def job(cfg: IngestConfig) -> None:
        time.sleep(0.5)
        if down_s:
            proxy.down_for(down_s).join()
        time.sleep(then_s)

    run_command(lambda: IngestConfig(source=source, out="/data/out"), job)


def test_an_outage_is_told_in_one_line_and_its_end_in_another(
    proxy: S3Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    run(proxy, "s3://watched/raw", down_s=2.5, then_s=1.5)
    waiting, answers = caplog.messages
    assert waiting.startswith(f"waiting for S3: no answer from {proxy.url} since ")
    assert waiting.endswith("gives up after 300 s (RAYJEPA_S3_PATIENCE_S)")
    assert answers.startswith(f"S3 answers again: {proxy.url}")


@pytest.mark.parametrize(("source", "down_s"), [("s3://watched/raw", 0.0), ("/data/raw", 1.5)])
def test_a_job_without_outage_or_without_s3_says_nothing(
    proxy: S3Proxy, caplog: pytest.LogCaptureFixture, source: str, down_s: float
) -> None:
    proxy.reset()
    run(proxy, source, down_s, then_s=0.5)
    assert caplog.messages == []
    assert bool(proxy.requests) == source.startswith("s3://")  # it asks


def test_refusals_are_answers(proxy: S3Proxy, caplog: pytest.LogCaptureFixture) -> None:
    proxy.refuse = (403, "AccessDenied")
    run(proxy, "s3://watched/raw", down_s=0.0, then_s=1.5)
    proxy.refuse = None
    assert caplog.messages == []
