"""Sessions that outlive their replica: each has a token log, KV snapshots and an owner.

    URI/SESSION/session.json              the session's settings; written last, never changed
    URI/SESSION/owner.json                epoch and replica of the latest owner
    URI/SESSION/turn.json                 where in the stream the latest prompt and answer lie
    URI/SESSION/tokens.i32                the log (in a remote store a folder `tokens/` of segments)
    URI/SESSION/snapshots/POSITION.safetensors

A session is restored from its newest readable snapshot and the tokens after it. The log is written
before a token is shown, snapshots from time to time; without any snapshot the log alone is enough.
A snapshot includes the last tokens before it. It is used only if the log has the same ones, for a
replica that lost the session may have written it.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from models.file_systems import url_to_fs
from models.sink_lm.engine.session import SessionExists, UnknownSession
from serve.lm.contract import is_session_id
from serve.lm.store.segmented_log import SegmentedLog, list_segments
from serve.lm.store.token_log import TOKEN_BYTES, LocalLog, TokenLog

FORMAT = 1
KEEP_SNAPSHOTS = 2
PATIENCE_S = 60.0
"""Seconds for which S3 is waited for: as long as a log waits (`segmented_log.WAIT_S`)."""
RECENT = 256
"""Tokens before a snapshot that it includes."""


class OtherModel(ValueError):
    """Another model made the session, so that its tokens and keys mean nothing here."""


@dataclass(frozen=True, kw_only=True)
class SessionSpec:
    """Settings of a session.

    Attributes:
        session_id: its name.
        sinks: tokens at the start of the stream that are never evicted.
        ttl_s: idle seconds after which it is deleted; None keeps it.
        created: Unix time of its creation.
        fingerprint: names the model, its cache shape and its tokenizer.
        request_id: id of the call that created it, which may be repeated.
        format: format number of the files.
    """

    session_id: str
    sinks: int
    ttl_s: float | None
    created: float
    fingerprint: str
    request_id: str = ""
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Where the latest prompt and its answer lie in the stream.

    Attributes:
        request_id: the request that sent the prompt, or the latest one that went on with the
            answer. It keeps a repeated call from feeding the prompt twice, and a reader whose
            session another request has gone on with from coming back.
        prompt_from: stream position before the prompt.
        answer_from: stream position after the prompt; the tokens from there on were generated.
    """

    request_id: str = ""
    prompt_from: int = 0
    answer_from: int = 0


class StoredSession:
    """An opened session: this replica owns it until another one opens it.

    Args:
        store: where it lies.
        spec: its settings.
        owner: name of this replica.
    """

    def __init__(self, store: SessionStore, spec: SessionSpec, owner: str) -> None:
        self.spec = spec
        self._store, self._folder, self._owner = store, store.folder(spec.session_id), owner
        self.epoch = int(store.owner(spec.session_id).get("epoch", 0)) + 1
        record = {"epoch": self.epoch, "replica": owner, "since": time.time()}
        store.write(f"{self._folder}/owner.json", json.dumps(record).encode())
        self.log: TokenLog = store.open_log(spec.session_id, self.epoch)

    def is_owned(self) -> bool:
        """Whether no other replica has opened the session since."""
        record = self._store.owner(self.spec.session_id)
        return (record.get("epoch"), record.get("replica")) == (self.epoch, self._owner)

    def publish(self) -> None:
        """Makes a new session visible, once its first tokens are durable.

        Raises:
            SessionExists: another replica has created one of that name meanwhile.
        """
        name = self.spec.session_id
        self.log.wait(self.log.position)
        if self._store.exists(name) or not self.is_owned():
            raise SessionExists(f"the session {name!r} exists already")
        data = json.dumps(asdict(self.spec), indent=2).encode()
        self._store.write(f"{self._folder}/session.json", data)

    def begin_turn(self, turn: Turn) -> None:
        """Stores where a prompt and its answer will lie; call it before the prompt is logged."""
        self._store.write(f"{self._folder}/turn.json", json.dumps(asdict(turn)).encode())

    def save_snapshot(self, position: int, state: dict[str, Tensor]) -> None:
        """Stores a state after `position` tokens and deletes all but the newest snapshots.

        It first waits until the log has these tokens: without them the snapshot would be wrong
        after a crash.

        Raises:
            ValueError: the log has fewer tokens.
            OSError: the snapshot could not be written.
        """
        if position > self.log.position:
            raise ValueError(f"a state of {position} tokens, of which {self.log.position} logged")
        self.log.wait(position)
        recent = torch.tensor(self._recent(position), dtype=torch.long)
        metadata = {"fingerprint": self.spec.fingerprint, "format": str(FORMAT)}
        data = safetensors.torch.save(state | {"recent": recent}, metadata)
        self._store.write(f"{self._folder}/snapshots/{position:015d}.safetensors", data)
        old = [p for p in self._store.snapshot_paths(self.spec.session_id) if _at(p) <= position]
        ahead = [p for p in self._store.snapshot_paths(self.spec.session_id) if _at(p) > position]
        for path in ahead + old[KEEP_SNAPSHOTS:]:  # ahead of us: of an owner that lost the session
            self._store.fs.rm_file(path)

    def newest_snapshot(self) -> tuple[int, dict[str, Tensor]]:
        """Returns position and state of the newest readable snapshot that agrees with the log.

        If there is none, it returns position 0 and no tensors; the log then rebuilds the session.
        """
        for path in self._store.snapshot_paths(self.spec.session_id):
            position = _at(path)
            if position > self.log.position:
                continue
            try:
                state = safetensors.torch.load(self._store.fs.cat_file(path))
            except SafetensorError:
                continue  # damaged; an older one and more of the log give the same state
            recent = state.pop("recent", None)
            if recent is not None and recent.tolist() == self._recent(position):
                return position, state
        return 0, {}

    def close(self) -> None:
        """Closes the log; the files stay."""
        self.log.close()

    def _recent(self, position: int) -> list[int]:
        return self.log.read(max(0, position - RECENT), position)


class SessionStore:
    """All sessions under one folder or fsspec URL.

    Args:
        uri: a path or e.g. `s3://bucket/sessions`.
        fingerprint: names the model served here; sessions of another are refused.
    """

    def __init__(self, uri: str, fingerprint: str) -> None:
        self.fs, path = url_to_fs(uri)
        protocol = self.fs.protocol
        self._local = "file" in (protocol if isinstance(protocol, tuple | list) else (protocol,))
        self._root = str(Path(path).resolve()) if self._local else str(path).rstrip("/")
        self._fingerprint = fingerprint

    def create(
        self,
        session_id: str,
        owner: str,
        *,
        sinks: int,
        ttl_s: float | None,
        request_id: str = "",
    ) -> StoredSession:
        """Creates an empty session, which nobody sees before `publish`.

        Raises:
            SessionExists: the name is taken.
        """
        if self.exists(session_id):
            raise SessionExists(f"the session {session_id!r} exists already")
        if self.fs.exists(self.folder(session_id)):  # its creation was interrupted
            self.fs.rm(self.folder(session_id), recursive=True)
        spec = SessionSpec(
            session_id=session_id,
            sinks=sinks,
            ttl_s=ttl_s,
            created=time.time(),
            fingerprint=self._fingerprint,
            request_id=request_id,
        )
        return StoredSession(self, spec, owner)

    def open(self, session_id: str, owner: str) -> StoredSession:
        """Opens a session, which takes it away from whoever has it open.

        Raises:
            UnknownSession: there is none.
            OtherModel: it belongs to another model.
        """
        spec = self.spec(session_id)
        if spec.fingerprint != self._fingerprint:
            raise OtherModel(
                f"the session {session_id!r} was made by the model {spec.fingerprint}, "
                f"this is {self._fingerprint}"
            )
        self._remove_parts(session_id)
        return StoredSession(self, spec, owner)

    def spec(self, session_id: str) -> SessionSpec:
        """Returns a session's settings.

        Raises:
            UnknownSession: there is none.
            ValueError: its files have another format number.
        """
        data = self.read(self._spec_path(session_id)) if is_session_id(session_id) else b""
        if not data:
            raise UnknownSession(session_id)
        spec = SessionSpec(**json.loads(data))
        if spec.format != FORMAT:
            raise ValueError(f"session {session_id!r}: format {spec.format}, known is {FORMAT}")
        return spec

    def exists(self, session_id: str) -> bool:
        """Whether the session exists."""
        return is_session_id(session_id) and bool(self.fs.exists(self._spec_path(session_id)))

    def names(self) -> list[str]:
        """Returns the names of all sessions."""
        found = self.fs.glob(f"{self._root}/*/session.json")
        return sorted(Path(str(path)).parent.name for path in found)

    def delete(self, session_id: str) -> None:
        """Deletes a session's files, first the one that makes it visible."""
        if self.exists(session_id):
            self.fs.rm_file(self._spec_path(session_id))
            self.fs.rm(self.folder(session_id), recursive=True)

    def last_used(self, session_id: str) -> float:
        """Returns the Unix time of the last write to a session; 0 if it has no files."""
        paths = self.fs.find(self.folder(session_id), detail=True).values()
        return max((_modified(entry) for entry in paths), default=0.0)

    def folder(self, session_id: str) -> str:
        """Returns the folder of a session."""
        return f"{self._root}/{session_id}"

    def position(self, session_id: str) -> int:
        """Returns how many tokens a session's log has, without opening the session."""
        if not self._local:
            segments = list_segments(self.fs, f"{self.folder(session_id)}/tokens")
            return segments[-1].stop if segments else 0
        path = Path(self.folder(session_id)) / "tokens.i32"
        return path.stat().st_size // TOKEN_BYTES if path.exists() else 0

    def owner(self, session_id: str) -> dict[str, Any]:
        """Returns `epoch`, `replica` and `since` of a session's latest owner; empty without one."""
        data = self.read(f"{self.folder(session_id)}/owner.json")
        return dict(json.loads(data)) if data else {}

    def turn(self, session_id: str) -> Turn:
        """Returns where a session's latest turn lies; an empty `Turn` if there was none."""
        data = self.read(f"{self.folder(session_id)}/turn.json")
        return Turn(**json.loads(data)) if data else Turn()

    def snapshots(self, session_id: str) -> list[int]:
        """Returns the positions of a session's snapshots, newest first."""
        return [_at(path) for path in self.snapshot_paths(session_id)]

    def snapshot_paths(self, session_id: str) -> list[str]:
        """Returns the paths of a session's snapshots, newest first."""
        found = self.fs.glob(f"{self.folder(session_id)}/snapshots/*.safetensors")
        return sorted((str(path) for path in found), reverse=True)

    def open_log(self, session_id: str, epoch: int) -> TokenLog:
        """Opens a session's log for its owner."""
        if self._local:
            return LocalLog(Path(self.folder(session_id)) / "tokens.i32")
        return SegmentedLog(self.fs, f"{self.folder(session_id)}/tokens", epoch)

    def read(self, path: str) -> bytes:
        """Returns a file's bytes; none if there is no such file."""
        try:
            data: bytes = self.fs.cat_file(path)
        except FileNotFoundError:
            return b""
        return data

    def write(self, path: str, data: bytes) -> None:
        """Writes a file atomically: readers see the old content or the new."""
        if not self._local:
            self.fs.pipe_file(path, data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        part.write_bytes(data)
        part.replace(target)

    def _remove_parts(self, session_id: str) -> None:
        """Deletes the temporary files of a replica that was killed during `write`."""
        if self._local:
            for part in Path(self.folder(session_id)).rglob(".*"):
                part.unlink(missing_ok=True)

    def _spec_path(self, session_id: str) -> str:
        return f"{self.folder(session_id)}/session.json"


def _modified(entry: dict[str, Any]) -> float:
    for key in ("mtime", "LastModified", "last_modified", "created"):
        value = entry.get(key)
        if value is not None:
            return float(value.timestamp()) if hasattr(value, "timestamp") else float(value)
    return 0.0


def _at(snapshot_path: str) -> int:
    """Returns the stream position of a snapshot."""
    return int(Path(snapshot_path).stem)
