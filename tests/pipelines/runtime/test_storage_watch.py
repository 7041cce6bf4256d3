"""What the terminal says while S3 does not answer the workers of a job, which nobody sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from helpers.s3_proxy import S3Proxy, proxied
from helpers.waiting import wait_until
from models import s3_waiting
from models.file_systems import url_to_fs
from models.patient_s3 import PATIENCE_ENV
from pipelines.config.ingest import IngestConfig
from pipelines.runtime import places
from pipelines.runtime.errors import run_command

SAY_AFTER_S = 0.6


@pytest.fixture
def proxy(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    monkeypatch.setattr(places, "ASK_EVERY_S", 0.2)
    monkeypatch.setattr(s3_waiting, "SAY_AFTER_S", SAY_AFTER_S)
    monkeypatch.delenv(PATIENCE_ENV, raising=False)
    with proxied(s3) as proxy:
        url_to_fs("s3://")[0].makedirs("watched", exist_ok=True)
        yield proxy


def run(source: str, meanwhile: Callable[[], None]) -> None:
    """A job that only waits, as a driver does whose workers work."""
    run_command(lambda: IngestConfig(source=source, out="/data/out"), lambda _: meanwhile())


def test_an_outage_is_told_in_one_line_and_its_end_in_another(
    proxy: S3Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    def outage() -> None:
        proxy.down()
        wait_until(lambda: caplog.messages)
        proxy.up()
        wait_until(lambda: len(caplog.messages) > 1)
        ask_again(proxy)

    run("s3://watched/raw", outage)
    waiting, answers = caplog.messages
    assert waiting.startswith(f"waiting for S3: no answer from {proxy.url} since ")
    assert waiting.endswith("gives up after 300 s (RAYJEPA_S3_PATIENCE_S)")
    assert answers.startswith(f"S3 answers again: {proxy.url}")


def ask_again(proxy: S3Proxy) -> None:
    """Waits until the watch has asked some more times, for longer than it takes to say a line."""
    proxy.reset()
    time.sleep(2 * SAY_AFTER_S)
    wait_until(lambda: sum(proxy.requests.values()) >= 3)


def test_a_job_without_outage_is_told_nothing(
    proxy: S3Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    run("s3://watched/raw", lambda: ask_again(proxy))
    assert caplog.messages == []


def test_a_job_without_s3_does_not_ask(proxy: S3Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing to wait for: a watch that asked would have done so several times."""

    def outage() -> None:
        time.sleep(2 * SAY_AFTER_S)
        proxy.down()
        time.sleep(2 * SAY_AFTER_S)
        proxy.up()

    proxy.reset()
    run("/data/raw", outage)
    assert caplog.messages == []
    assert not proxy.requests


def test_refusals_are_answers(proxy: S3Proxy, caplog: pytest.LogCaptureFixture) -> None:
    proxy.refuse = (403, "AccessDenied")
    run("s3://watched/raw", lambda: ask_again(proxy))
    proxy.refuse = None
    assert caplog.messages == []
