"""Takes Ray's wrappers off an error: what was raised, where, and about what."""

from __future__ import annotations

import builtins
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LAST_LINE = re.compile(r"^(?P<name>[A-Za-z_][\w.]*): (?P<text>.+)$", re.M)
_ERRNO = re.compile(r"\[[Ee]rrno (\d+)\] ?([^:\n]*)(?:: '([^']*)')?")
_S3_CODE = re.compile(r"\((\w+): s3://([^/)]*)")
"""How `models.s3_errors.named` writes the code and the object, of which this takes the bucket."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """An error, read from the exception or from a worker's traceback."""

    name: str
    """Name of its class."""
    module: str
    """First part of the class's module."""
    bases: frozenset[str]
    """Names of its class and of those it is derived from, as far as known."""
    text: str
    number: int | None = None
    """`errno`."""
    path: str | None = None
    code: str | None = None
    """Error code of S3, such as NoSuchBucket."""
    bucket: str | None = None
    endpoint: str | None = None
    about: str | None = None
    """Flag and value of the place that was being tried (`places.about`)."""
    package: str | None = None
    """Package whose import failed."""
    raised_in: Path | None = None
    """The file it was raised in; None where that is not known."""

    def is_a(self, *names: str) -> bool:
        """Whether its class, or one it is derived from, has one of these names."""
        return not self.bases.isdisjoint(names)

    @property
    def first_line(self) -> str:
        """First line of its text."""
        return self.text.strip().partition("\n")[0]


def faults_of(error: BaseException) -> Iterator[Fault]:
    """Yields an error and its causes, outermost first, without Ray's wrappers."""
    seen: set[int] = set()
    todo: list[BaseException] = [error]
    while todo:
        one = todo.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        inner = _wrapped(one)
        if inner is None:
            yield _of_exception(one)
            inner = [one.__cause__]
        elif not any(inner):  # what was inside did not survive the way here, but as text
            told = list(_of_text(_ANSI.sub("", str(one))))
            yield from told or ([_of_exception(one)] if _is_loss(one) else [])
        todo += [found for found in inner if found is not None]


def _wrapped(error: BaseException) -> list[BaseException | None] | None:
    """Returns the errors inside one of Ray's wrappers; None for any other error."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if "WorkerGroupError" in names:
        failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
        return [failures[rank] for rank in sorted(failures)]
    if "ControllerError" in names:
        return [getattr(error, "controller_failure", None)]
    if "RayTaskError" in names:
        cause = getattr(error, "cause", None)
        lost = cause is not None and _wrapped(cause) is not None and cause.__cause__ is None
        return [None if lost else cause]
    if names & {"UserCodeException", "SystemException", "UserExceptionWithTraceback"}:
        return [getattr(error, "_original_exception", None) or error.__cause__]
    if "WorkerHealthCheckFailedError" in names:
        return [getattr(error, "health_check_failure", None)]
    return [None] if _is_loss(error) else None


def _is_loss(error: BaseException) -> bool:
    """Whether a process is gone; if an error of its own ended it, the text says which."""
    return any(cls.__name__ == "RayActorError" for cls in type(error).__mro__)


def _of_exception(error: BaseException) -> Fault:
    origin = error.__cause__ if getattr(error.__cause__, "response", None) else error
    answer: dict[str, Any] = (getattr(origin, "response", None) or {}).get("Error", {})
    details: dict[str, Any] = getattr(error, "kwargs", None) or {}
    found = _ERRNO.search(str(error))
    named = _S3_CODE.search(str(error))
    number = getattr(error, "errno", None)
    return Fault(
        name=type(error).__name__,
        module=type(error).__module__.partition(".")[0],
        bases=frozenset(cls.__name__ for cls in type(error).__mro__),
        text=str(error),
        number=number if isinstance(number, int) else int(found[1]) if found else None,
        path=str(path) if (path := getattr(error, "filename", None)) is not None else None,
        code=answer.get("Code") or (named[1] if named else None),
        bucket=answer.get("BucketName") or (named[2] if named else None),
        endpoint=details.get("endpoint_url"),
        about=next(iter(getattr(error, "__notes__", ())), None),
        package=(getattr(error, "name", None) or "").partition(".")[0] or None,
        raised_in=_raised_in(error),
    )


def _raised_in(error: BaseException) -> Path | None:
    trace, path = error.__traceback__, None
    while trace is not None:
        path, trace = Path(trace.tb_frame.f_code.co_filename), trace.tb_next
    return path


def _of_text(text: str) -> Iterator[Fault]:
    """The first error that a traceback in words ends with: the one all others came from."""
    found = _LAST_LINE.search(text)
    if found is None:
        return
    module, _, name = found["name"].rpartition(".")
    known = getattr(builtins, name, None)
    number, named = (pattern.search(found["text"]) for pattern in (_ERRNO, _S3_CODE))
    bases = {cls.__name__ for cls in known.__mro__} if isinstance(known, type) else {name}
    if module:  # ours end in Error and are told; whether they are ValueErrors too does not matter
        bases.add(name)
    yield Fault(
        name=name,
        module=module.partition(".")[0] or "builtins",
        bases=frozenset(bases),
        text=found["text"],
        number=int(number[1]) if number else None,
        path=number[3] if number else None,
        code=named[1] if named else None,
        bucket=named[2] if named else None,
    )
