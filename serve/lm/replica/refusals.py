"""What a replica says no to: the refusals that several places share."""

from __future__ import annotations

from serve.ingress.errors import ApiError

NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients repeat a 409 unless told not to."""


def unknown_session(session_id: str) -> ApiError:
    """404."""
    message = f"the session {session_id!r} does not exist"
    return ApiError(404, "session_not_found", message, param="session_id")


def session_exists(session_id: str) -> ApiError:
    """409: the name is taken."""
    message = f"the session {session_id!r} exists already"
    return ApiError(409, "session_exists", message, param="session_id", headers=NO_RETRY)


def no_slab(*, waiting: int = 0, waited_s: float = 0.0) -> ApiError:
    """429: every slab belongs to a session that generates, or that is not stored.

    Args:
        waiting: requests that wait for a slab already, where these are too many.
        waited_s: how long this request has waited, where that is too long.
    """
    message = "every slab is in use"
    if waiting:
        message += f" and {waiting} requests wait for one"
    elif waited_s:
        message += f" and none came free within {waited_s:g} s"
    message += "; retry after the given delay"
    return ApiError(429, "no_free_slab", message, headers={"Retry-After": "1"})


def nobody_waits() -> ApiError:
    """409: the caller went away before the answer began; nobody reads this."""
    return ApiError(409, "cancelled", "nobody waits for the answer", headers=NO_RETRY)


def session_busy(session_id: str) -> ApiError:
    """409: one request at a time."""
    message = f"the session {session_id!r} is generating; cancel that, or resume it (resume_at)"
    return ApiError(409, "session_busy", message, param="session_id", headers=NO_RETRY)


def log_failed(error: Exception | None) -> ApiError:
    """503: what a session reads or says can not be logged here, so nothing of it is shown."""
    message = f"the session's log cannot be written: {error}"
    return ApiError(503, "log_failed", message, headers={"Retry-After": "1"})


def cannot_follow(problem: str) -> ApiError:
    """400: the template has no form for these messages after earlier ones."""
    return ApiError(400, "invalid_messages", problem, param="messages")


def replaced(session_id: str) -> ApiError:
    """409: a reader comes back to an answer that another one has taken over."""
    message = f"another request went on with the session {session_id!r}"
    return ApiError(409, "cancelled", message, param="session_id", headers=NO_RETRY)


def check_resume(resume_at: int, position: int, answer_from: int) -> None:
    """Refuses to go on from where there is nothing, or nothing of the model's.

    Args:
        resume_at: what the client has.
        position: tokens of the stream.
        answer_from: where its latest answer begins.
    """
    if resume_at > position:
        message = f"resume_at: the stream has {position} tokens, not {resume_at}"
        raise ApiError(400, "invalid_value", message, param="resume_at")
    if resume_at < answer_from:
        message = (
            f"resume_at: the latest answer begins at {answer_from}; what lies before it, or is "
            "still missing of its prompt, is not the model's"
        )
        raise ApiError(409, "resume_in_prompt", message, param="resume_at", headers=NO_RETRY)
