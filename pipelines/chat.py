"""A chat in the terminal with a served language model.

    python -m pipelines.chat --url http://localhost:8000/v1 --session me

Only what you type is sent, for the server keeps the stream. You can go on with a session tomorrow,
from another terminal, even after the server was restarted. Ctrl-C ends an answer, not the session.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    # `python pipelines/chat.py` from an uninstalled checkout: import from the root, not from here.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import httpx
import tyro
from rich.console import Console

from pipelines.runtime.errors import run_command

HELP = "/session shows it, /fork NAME branches off, /forget deletes it, /quit leaves"
RETRIES = 5


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Settings of a chat."""

    url: str = "http://localhost:8000/v1"
    """The server's base URL, with `/v1`."""
    session: str | None = None
    """Name of the session to begin or go on with; None makes one up."""
    system: str | None = None
    """System prompt of a new session. It is pinned, so that it is never evicted."""
    temperature: float = 0.7
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that have this much probability together."""
    max_tokens: int | None = None
    """Most tokens of one answer; None ends only with the model's end token."""
    api_key: str | None = None
    """Key for the server, sent as a bearer token."""


class ChatError(RuntimeError):
    """The server refused a request or could not be reached."""


class ChatClient:
    """Talks to one session.

    Args:
        cfg: the settings.
        http: client with the server's base URL.
    """

    def __init__(self, cfg: ChatConfig, http: httpx.Client) -> None:
        self._cfg, self._http = cfg, http
        self.session = cfg.session or f"chat-{uuid.uuid4().hex[:8]}"
        self.position = 0

    def begin(self) -> bool:
        """Creates the session unless it exists; returns whether it existed."""
        found = self._http.get(f"/sessions/{self.session}")
        if found.status_code == 200:
            return True
        body: dict[str, Any] = {"session_id": self.session}
        if self._cfg.system is not None:
            body["pin_prefix"] = [{"role": "system", "content": self._cfg.system}]
        _checked(self._http.post("/sessions", json=body))
        return False

    def say(self, text: str) -> Iterator[str]:
        """Sends a message and yields the answer as it comes.

        A stream that breaks is resumed after the last token that came.
        """
        body = self._body() | {"messages": [{"role": "user", "content": text}]}
        begun = False
        for attempt in range(RETRIES):
            try:
                for position, piece in self._stream(body):
                    self.position, begun = position or self.position, True
                    yield piece
                return
            except httpx.TransportError:
                if not begun or attempt + 1 == RETRIES:
                    raise
                time.sleep(2.0**attempt / 4)
                body = self._body() | {"resume_at": self.position}

    def describe(self) -> dict[str, Any]:
        """Returns the server's description of the session."""
        return dict(_checked(self._http.get(f"/sessions/{self.session}")).json())

    def fork(self, name: str) -> None:
        """Copies the session under a new name and goes on there."""
        reply = self._http.post(f"/sessions/{self.session}/fork", json={"session_id": name})
        self.session = str(_checked(reply).json()["id"])

    def forget(self) -> None:
        """Deletes the session."""
        _checked(self._http.delete(f"/sessions/{self.session}"))

    def _body(self) -> dict[str, Any]:
        cfg = self._cfg
        return {
            "session_id": self.session,
            "stream": True,
            "temperature": cfg.temperature,
            "top_p": cfg.top_p,
            "max_tokens": cfg.max_tokens,
        }

    def _stream(self, body: dict[str, Any]) -> Iterator[tuple[int | None, str]]:
        """Yields (stream position, text) of each event."""
        with self._http.stream("POST", "/chat/completions", json=body, timeout=60) as reply:
            if reply.status_code != 200:
                reply.read()
                _checked(reply)
            position = None
            for line in reply.iter_lines():
                if line.startswith("id: "):
                    position = int(line[4:])
                elif line == "data: [DONE]":
                    return
                elif line.startswith("data: "):
                    data = json.loads(line[6:])
                    if "error" in data:
                        raise ChatError(data["error"]["message"])
                    yield position, data["choices"][0]["delta"].get("content") or ""
            raise httpx.RemoteProtocolError("the stream ended without [DONE]")


def _checked(reply: httpx.Response) -> httpx.Response:
    if reply.is_success:
        return reply
    try:
        message = reply.json()["error"]["message"]
    except (ValueError, KeyError):
        message = reply.text
    raise ChatError(f"{reply.status_code}: {message}")


def chat(cfg: ChatConfig, console: Console) -> None:
    """Reads lines and prints answers until the input ends or the user types `/quit`."""
    headers = {"authorization": f"Bearer {cfg.api_key}"} if cfg.api_key else {}
    with httpx.Client(base_url=cfg.url, headers=headers, timeout=30) as http:
        client = ChatClient(cfg, http)
        try:
            again = client.begin()
        except httpx.TransportError as error:
            asked = "is the server running there?"
            raise ChatError(f"--url: no answer from {cfg.url} ({error}); {asked}") from error
        console.print(
            f"session [bold]{client.session}[/] ({'goes on' if again else 'new'}); {HELP}"
        )
        while True:
            try:
                line = console.input("[bold cyan]you[/] ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/quit":
                return
            if line:
                _turn(client, line, console)


def _turn(client: ChatClient, line: str, console: Console) -> None:
    """Runs one command or one message."""
    try:
        if line == "/session":
            console.print(client.describe())
        elif line.startswith("/fork "):
            client.fork(line.removeprefix("/fork ").strip())
            console.print(f"now in {client.session}")
        elif line == "/forget":
            client.forget()
            client.begin()
        elif line.startswith("/"):
            console.print(HELP)
        else:
            for piece in client.say(line):
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            console.print()
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/]")
    except (ChatError, httpx.TransportError) as error:
        console.print(f"[red]{error}[/]")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    run_command(
        lambda: tyro.cli(ChatConfig, args=argv, description=__doc__),
        lambda cfg: chat(cfg, Console()),
    )


if __name__ == "__main__":
    main()
