"""StreamEval: whether a streaming model still knows a line that it read some time ago.

    python -m pipelines.streameval --model data/smollm2 --cache 512 --distances 5,10,20,40

It re-implements section 4.4 of Xiao et al. 2023, whose code was never published. The model reads
lines such as "The REGISTER_CONTENT in line 17 is <4183>". After every tenth line it is asked for
the values some lines back. Each question goes to a copy of the stream, so that answers do not
change later ones. The answer is greedy, and right if it begins with the number. The table says
whether the lines asked for were still in the cache; the model cannot know a line that was evicted.

Legend: T tokens.
"""

from __future__ import annotations

import json
import pathlib
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

# Lets `python pipelines/streameval.py` work from an uninstalled checkout.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models.sink_lm.checkpoints.tokenizer import Tokenizer
from models.sink_lm.network.cache import Slabs
from models.sink_lm.network.llama import Llama
from pipelines.config.places import PlaceField
from pipelines.perplexity import numbers
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare

ASK_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class StreamEvalConfig:
    """Settings of a StreamEval run."""

    model: Annotated[str, PlaceField(or_name=True)]
    """Hugging Face folder or hub id, or a GGUF file."""
    cache: int = 512
    """Cache size in tokens, sinks included."""
    sinks: int = 4
    """Tokens at the start of the stream that are never evicted."""
    distances: str = "5,10,20,40"
    """Ask for the values this many lines back, comma-separated."""
    lines: int = 400
    """Number of lines in the stream."""
    seed: int = 0
    """Seed of the values."""
    threads: int | None = None
    """Torch threads; None leaves torch's choice."""
    json: Annotated[Path, PlaceField(written=True, file=True)] | None = None
    """Write the results to this file."""

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: names the flag at fault.
        """
        if max(numbers("--distances", self.distances)) + ASK_EVERY > self.lines:
            raise ValueError(f"--distances {self.distances} reach beyond --lines {self.lines}")
        if min(numbers("--distances", self.distances)) < 1:
            raise ValueError("--distances count lines back, from 1")
        if not 0 <= self.sinks < self.cache:
            raise ValueError(f"--sinks {self.sinks} leaves no window in --cache {self.cache}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Accuracy at one distance."""

    lines_back: int
    tokens_back: int
    """Mean tokens between the end of the value and the question's end."""
    in_cache: bool
    """Whether the line was still visible at every question."""
    asked: int
    right: int


class Stream:
    """A model that reads lines, with a second slab for questions.

    Args:
        model: the decoder.
        tokenizer: its tokenizer.
        cfg: cache and sinks.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, cfg: StreamEvalConfig) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._slabs: Slabs = model.slabs(sessions=2, capacity=cfg.cache + 1)
        self._slot, self._copy = (self._slabs.allocate(cfg.sinks) for _ in range(2))

    @property
    def position(self) -> int:
        """Number of tokens read."""
        return self._slabs.length(self._slot)

    def read(self, text: str) -> None:
        """Appends text to the stream."""
        tokens_T = torch.tensor(self._tokenizer.encode(text, bos=self.position == 0))
        self._model.prefill(tokens_T, self._slabs, self._slot, logits="none")

    def ask(self, text: str, count: int) -> tuple[str, int]:
        """Completes `text` greedily with `count` tokens, without changing the stream.

        Returns:
            The completion, and the number of tokens of the question.
        """
        self._slabs.copy(self._slot, self._copy)
        ids = self._tokenizer.encode(text, bos=False)
        logits_V = self._model.prefill(torch.tensor(ids), self._slabs, self._copy)
        assert logits_V is not None
        answer = [int(logits_V.argmax())]
        while len(answer) < count:
            token_B = torch.tensor(answer[-1:])
            logits_BV = self._model.decode(token_B, self._slabs, [self._copy])
            answer.append(int(logits_BV.argmax()))
        return self._tokenizer.decode(answer), len(ids)


def line(number: int) -> str:
    """Returns a line up to its value."""
    return f"The REGISTER_CONTENT in line {number} is <"


def stream_eval(cfg: StreamEvalConfig, model: Llama, tokenizer: Tokenizer) -> list[Result]:
    """Reads all lines and asks after every tenth."""
    values = random.Random(cfg.seed)
    stream = Stream(model, tokenizer, cfg)
    window = cfg.cache - cfg.sinks
    known: list[tuple[int, int]] = []  # value and stream position after it, by line
    found: dict[int, list[tuple[bool, int]]] = {
        back: [] for back in numbers("--distances", cfg.distances)
    }
    for number in track(range(cfg.lines), description="lines"):
        value = values.randrange(1000, 10_000)
        stream.read(f"{line(number)}{value}>\n")
        known.append((value, stream.position))
        if (number + 1) % ASK_EVERY:
            continue
        for back, answers in found.items():
            if back <= number:
                expected, position = known[number - back]
                answer, asked = stream.ask(line(number - back), 5)
                right = answer.startswith(str(expected))
                answers.append((right, stream.position + asked - position))
    return [
        Result(
            lines_back=back,
            tokens_back=round(sum(tokens for _, tokens in answers) / len(answers)),
            in_cache=max(tokens for _, tokens in answers) <= window,
            asked=len(answers),
            right=sum(right for right, _ in answers),
        )
        for back, answers in found.items()
    ]


def main() -> None:
    """Runs the command line."""
    import tyro

    run_command(lambda: tyro.cli(StreamEvalConfig), _evaluate_stream)


def _evaluate_stream(cfg: StreamEvalConfig) -> None:
    from models.sink_lm.checkpoints.loading import load_model
    from models.sink_lm.checkpoints.tokenizer import load_tokenizer

    cfg = prepare(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    results = stream_eval(cfg, load_model(cfg.model), load_tokenizer(cfg.model))
    table = Table("lines back", "tokens back", "in the cache", "accuracy")
    for row in results:
        accuracy = f"{100 * row.right / row.asked:.1f}% of {row.asked}"
        visible = "yes" if row.in_cache else "no"
        table.add_row(str(row.lines_back), str(row.tokens_back), visible, accuracy)
    Console().print(table)
    if cfg.json:
        report = {"model": cfg.model, "rows": [asdict(row) for row in results]}
        cfg.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
