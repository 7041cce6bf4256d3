"""Tells the user, once an outage and not once a request, that this process waits for S3."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time

from models.s3_errors import code_of

SAY_AFTER_S = 10.0
"""Seconds without an answer after which a warning says that S3 is waited for."""
log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Outage:
    since: float
    told: bool = False


class Outages:
    """Which endpoints of S3 do not answer this process, from its first failure to an answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_endpoint: dict[str, _Outage] = {}

    def failed(self, endpoint: str, error: BaseException, gives_up: str) -> None:
        """Notes that a request failed that may be repeated.

        Args:
            endpoint: Address of the S3.
            error: What was raised.
            gives_up: When requests are no longer repeated, as the warning's last part.
        """
        now = time.monotonic()
        with self._lock:
            outage = self._by_endpoint.setdefault(endpoint, _Outage(now))
            tell = not outage.told and now - outage.since >= SAY_AFTER_S
            outage.told |= tell
        if tell:
            reason = code_of(error) or type(error).__name__
            log.warning(
                "waiting for S3: no answer from %s since %.0f s (%s); %s",
                *(endpoint, now - outage.since, reason, gives_up),
            )

    def answered(self, endpoint: str) -> None:
        """Notes that there was an answer, whatever it says."""
        if endpoint not in self._by_endpoint:  # as nearly always
            return
        with self._lock:
            outage = self._by_endpoint.pop(endpoint, None)
        if outage is not None and outage.told:
            waited = time.monotonic() - outage.since
            log.warning("S3 answers again: %s, after %.0f s", endpoint, waited)
