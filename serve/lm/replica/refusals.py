"""The refusals of a replica that several modules raise."""

from __future__ import annotations

from serve.ingress.errors import ApiError

NO_RETRY = {"x-should-retry": "false"}
"""Header of a 409 that OpenAI's clients should not repeat; they do unless told otherwise."""


def unknown_session(session_id: str) -> ApiError:
    """Returns the 404 for a session that does not exist."""
    message = f"the session {session_id!r} does not exist"
    return ApiError(404, "session_not_found", message, param="session_id")


def session_exists(session_id: str) -> ApiError:
    """Returns the 409 for a session name that is taken."""
    message = f"the session {session_id!r} exists already"
    return ApiError(409, "session_exists", message, param="session_id", headers=NO_RETRY)


def no_slab(*, waiting: int = 0, waited_s: float = 0.0) -> ApiError:
    """Returns the 429 for when every slab has a session that generates or is not stored.

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
    """Returns the 409 that ends a start whose caller went away; nobody reads it."""
    return ApiError(409, "cancelled", "nobody waits for the answer", headers=NO_RETRY)


def session_busy(session_id: str) -> ApiError:
    """Returns the 409 for a second request to a session that is generating."""
    message = f"the session {session_id!r} is generating; cancel that, or resume it (resume_at)"
    return ApiError(409, "session_busy", message, param="session_id", headers=NO_RETRY)


def log_failed(error: Exception | None) -> ApiError:
    """Returns the 503 for a session whose log cannot be written here.

    Tokens that are not in the log are never shown.
    """
    message = f"the session's log cannot be written: {error}"
    return ApiError(503, "log_failed", message, headers={"Retry-After": "1"})


def cannot_follow(problem: str) -> ApiError:
    """Returns the 400 for messages that the chat template cannot place after earlier ones."""
    return ApiError(400, "invalid_messages", problem, param="messages")


def replaced(session_id: str) -> ApiError:
    """Returns the 409 for a reader whose session another request has gone on with."""
    message = f"another request went on with the session {session_id!r}"
    return ApiError(409, "cancelled", message, param="session_id", headers=NO_RETRY)


def check_resume(resume_at: int, position: int, answer_from: int) -> None:
    """Refuses to resume beyond the stream's end or before its latest answer.

    Args:
        resume_at: stream position up to which the client has the tokens.
        position: tokens of the stream.
        answer_from: stream position at which its latest answer begins.

    Raises:
        ApiError: `resume_at` lies outside the latest answer.
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
