"""Clients that ask an endpoint without pause, and count their answers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import openai

from helpers.waiting import wait_until


class Asking:
    """One client for every picture; see `asking`."""

    def __init__(self, url: str, pictures: Sequence[str]) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=5, timeout=60)
        self._pictures = pictures
        self._answered = [0] * len(pictures)
        self._stop = threading.Event()
        self.failures: list[Exception] = []

    def run(self, number: int) -> None:
        """Asks for one picture again and again, until all are told to stop."""
        while not self._stop.is_set():
            try:
                self._client.embeddings.create(model="tiny", input=self._pictures[number])
                self._answered[number] += 1
            except openai.OpenAIError as error:
                self.failures.append(error)

    def stop(self) -> None:
        """Tells all clients to stop."""
        self._stop.set()

    def wait_for_all(self) -> None:
        """Waits until every client has had an answer."""
        wait_until(lambda: all(self._answered))

    def wait_for_more(self, count: int) -> None:
        """Waits until so many more requests have been answered."""
        before = sum(self._answered)
        wait_until(lambda: sum(self._answered) >= before + count)


@contextlib.contextmanager
def asking(url: str, pictures: Sequence[str]) -> Iterator[Asking]:
    """Has a client for every picture ask for its embedding until the block ends.

    A request that fails is sent again up to five times, as docs/serving.md asks of clients.
    """
    clients = Asking(url, pictures)
    threads = [threading.Thread(target=clients.run, args=(n,)) for n in range(len(pictures))]
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        clients.stop()
        for thread in threads:
            thread.join()
