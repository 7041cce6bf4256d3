"""A refusal crosses from the replica to the ingress as the error that the client is told."""

from __future__ import annotations

import pickle

import pytest

from serve.ingress.errors import ApiError
from serve.lm.replica.refusals import log_failed, no_slab, session_busy, unknown_session


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (unknown_session("s"), 404, "invalid_request_error"),
        (session_busy("s"), 409, "invalid_request_error"),
        (no_slab(waiting=3), 429, "rate_limit_error"),
        (log_failed(OSError("full")), 503, "server_error"),
    ],
)
def test_a_pickled_refusal_is_the_same(error: ApiError, status: int, kind: str) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ApiError
    assert vars(copy) == vars(error)
    assert (copy.status, copy.error_type) == (status, kind)
    assert copy.content() == error.content()
    assert copy.content()["error"]["message"] == str(error)
