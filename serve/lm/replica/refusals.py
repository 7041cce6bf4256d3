"""What a replica says no to: the refusals that several places share."""

from __future__ import annotations

from serve.lm.contract import Refused

NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients repeat a 409 unless told not to."""


class Refusal(Exception):
    """Carries a `Refused` out of nested calls."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.refused = Refused(
            status=status, code=code, message=message, param=param, headers=headers or {}
        )


def unknown_session(session_id: str) -> Refusal:
    """404."""
    message = f"the session {session_id!r} does not exist"
    return Refusal(404, "session_not_found", message, param="session_id")


def session_exists(session_id: str) -> Refusal:
    """409: the name is taken."""
    message = f"the session {session_id!r} exists already"
    return Refusal(409, "session_exists", message, param="session_id", headers=NO_RETRY)


class NoSlab(Refusal):
    """Every slab belongs to a session that generates, or that is stored nowhere."""


def no_slab(*, waiting: int = 0, waited_s: float = 0.0) -> NoSlab:
    """429: see `NoSlab`; where requests queue, too many do or this one did for too long."""
    message = "every slab is in use"
    if waiting:
        message += f" and {waiting} requests wait for one"
    elif waited_s:
        message += f" and none came free within {waited_s:g} s"
    message += "; retry after the given delay"
    return NoSlab(429, "no_free_slab", message, headers={"Retry-After": "1"})


def nobody_waits() -> Refusal:
    """409: the caller went away before the answer began; nobody reads this."""
    return Refusal(409, "cancelled", "nobody waits for the answer", headers=NO_RETRY)


def session_busy(session_id: str) -> Refusal:
    """409: one request at a time."""
    message = f"the session {session_id!r} is generating; cancel that, or resume it (resume_at)"
    return Refusal(409, "session_busy", message, param="session_id", headers=NO_RETRY)


def log_failed(error: Exception | None) -> Refusal:
    """503: what a session reads or says can not be logged here, so nothing of it is shown."""
    message = f"the session's log cannot be written: {error}"
    return Refusal(503, "log_failed", message, headers={"Retry-After": "1"})


def cannot_follow(problem: str) -> Refusal:
    """400: the template has no form for these messages after earlier ones."""
    return Refusal(400, "invalid_messages", problem, param="messages")


def replaced(session_id: str) -> Refusal:
    """409: a reader comes back to an answer that another one has taken over."""
    message = f"another request went on with the session {session_id!r}"
    return Refusal(409, "cancelled", message, param="session_id", headers=NO_RETRY)


def check_resume(resume_at: int, position: int, answer_from: int) -> None:
    """Refuses to go on from where there is nothing, or nothing of the model's.

    Args:
        resume_at: what the client has.
        position: tokens of the stream.
        answer_from: where its latest answer begins.
    """
    if resume_at > position:
        message = f"resume_at: the stream has {position} tokens, not {resume_at}"
        raise Refusal(400, "invalid_value", message, param="resume_at")
    if resume_at < answer_from:
        message = (
            f"resume_at: the latest answer begins at {answer_from}; what lies before it, or is "
            "still missing of its prompt, is not the model's"
        )
        raise Refusal(409, "resume_in_prompt", message, param="resume_at", headers=NO_RETRY)
