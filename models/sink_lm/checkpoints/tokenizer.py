"""Text to token ids and back, with the model's own tokenizer and chat template.

transformers finds the tokenizer. Text is encoded by its `tokenizers` backend, in two copies that
never change: transformers sets options on its own copy at every call, which is not thread-safe.
Users' text never becomes control tokens: `<|im_end|>` in a prompt is ten ordinary characters.

The standard library's incremental UTF-8 decoder decodes streams from the bytes of each token and
holds at most three bytes. `tokenizers.decoders.DecodeStream` holds every token since its last
character: endless special tokens or stray bytes would make it slower and larger with each token.
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.reader import read_gguf_metadata

from models.sink_lm.checkpoints.checkpoint import errors_name, locate, read_config
from models.sink_lm.network.config import UnsupportedModel

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
PRIVATE_USE = range(0xE000, 0xF900)
PRIVATE_RUN = re.compile(r"([\ue000-\uf8ff])\1*")


class Tokenizer:
    """Encodes and decodes for one model. Any thread may call the methods.

    Args:
        hf: transformers' tokenizer.
        eos_ids: tokens that end a text, besides the tokenizer's own.

    Raises:
        UnsupportedModel: the tokens are neither byte-level BPE nor SentencePiece.
    """

    def __init__(self, hf: Any, eos_ids: Iterable[int] = ()) -> None:
        self._hf = hf
        self._control = _frozen(hf.backend_tokenizer, encode_special_tokens=False)
        self._plain = _frozen(hf.backend_tokenizer, encode_special_tokens=True)
        self._added = self._control.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in self._added.items() if token.special}
        self._special_ids = frozenset(self._special.values())
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_text = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._byte_of = _byte_alphabet(self._control)
        self.bos_id: int | None = hf.bos_token_id
        own = () if hf.eos_token_id is None else (int(hf.eos_token_id),)
        self.eos_ids = tuple(sorted({*own, *eos_ids}))
        self.vocab_size: int = self._control.get_vocab_size(with_added_tokens=True)
        self.adds_bos: bool = self.bos_id is not None and hf("a").input_ids[0] == self.bos_id

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides which tokens a text or a chat becomes."""
        marks = [self.bos_id, sorted(self.eos_ids), self.adds_bos, str(self._hf.chat_template)]
        return hashlib.sha256(f"{self._control.to_str()} {marks}".encode()).hexdigest()

    def encode(self, text: str, *, bos: bool, parse_special: bool = False) -> list[int]:
        """Returns the ids of a text.

        Args:
            text: any text.
            bos: put the model's start token first, if it has one. `adds_bos` says whether the model
                was trained with it.
            parse_special: read control tokens that are written out in the text, such as
                `<|im_start|>`. Only for text that no user wrote.
        """
        backend = self._control if parse_special else self._plain
        start = [self.bos_id] if bos and self.bos_id is not None else []
        return start + list(backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of some ids without special tokens; broken UTF-8 becomes U+FFFD.

        SentencePiece drops the space that encoding put first; a stream keeps it.
        """
        return str(self._control.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token; b"" for ids beyond the vocabulary (padded embeddings).

        Raises:
            ValueError: the id is negative.
        """
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        added = self._added.get(token_id)
        if added is not None:
            return bytes(added.content, "utf-8")
        token: str | None = self._control.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_of and self._byte_of.keys() >= set(token):
            return bytes(self._byte_of[char] for char in token)
        match = BYTE_FALLBACK.fullmatch(token)
        return bytes.fromhex(match[1]) if match else token.replace("▁", " ").encode()

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token, which has no text."""
        return token_id in self._special_ids

    def stream(self) -> Detokenizer:
        """Returns a decoder for one stream of tokens."""
        return Detokenizer(self)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Returns the ids of a conversation, laid out by the model's chat template.

        Control tokens come from the template alone; those written in messages stay text.

        Args:
            messages: with `role` and `content` each.
            add_generation_prompt: end with the opening of the assistant's answer.

        Raises:
            ValueError: the model has no chat template, or the template refuses the messages or
                fails on them.
        """
        if not any(self._special_text.search(text) for m in messages for text in m.values()):
            text = self._render(messages, add_generation_prompt)
            return list(self._control.encode(text, add_special_tokens=False).ids)
        mark = _mark("".join(text for message in messages for text in message.values()))
        # A mark inside each one keeps the template from making it whole; it is taken out again.
        marked = [
            {
                key: self._special_text.sub(lambda m: m[0][0] + mark + m[0][1:], value)
                for key, value in message.items()
            }
            for message in messages
        ]
        ids: list[int] = []
        for piece in self._special_text.split(self._render(marked, add_generation_prompt)):
            special = self._special.get(piece)
            ids += self.encode(piece.replace(mark, ""), bos=False) if special is None else [special]
        return ids

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        if not self._hf.chat_template:
            raise ValueError("the model has no chat template: use completions")
        conversation = [dict(message) for message in messages]
        try:
            return str(
                self._hf.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except TemplateError as error:
            raise ValueError(f"messages: the chat template says: {error}") from error
        except Exception as error:  # the model's own program, given what a client sent
            message = f"the chat template fails on them: {type(error).__name__}: {error}"
            raise ValueError(f"messages: {message}") from error


class Detokenizer:
    """Turns one stream of tokens into text, in whole characters and constant memory.

    Args:
        tokenizer: the tokens' tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Returns the characters that a token completes; "" for special tokens.

        Bytes that can no longer become a character are U+FFFD.
        """
        if self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Ends the stream: U+FFFD if it broke off inside a character, else ""."""
        return self._decoder.decode(b"", final=True)


def _mark(text: str) -> str:
    """Returns a run of one private-use character that is longer than any such run in `text`.

    So it can be found wherever it is put into the text. Control tokens have no such characters.
    """
    longest = dict.fromkeys(map(chr, PRIVATE_USE), 0)
    for run in PRIVATE_RUN.finditer(text):
        longest[run[1]] = max(longest[run[1]], len(run[0]))
    char = min(longest, key=longest.__getitem__)
    return char * (longest[char] + 1)


def load_tokenizer(path: str) -> Tokenizer:
    """Returns the tokenizer of the model at `path`: a folder, a hub id or a GGUF file.

    Raises:
        FileNotFoundError: there is no model, or it has no tokenizer.
        UnsupportedModel: the kind of tokenizer is not supported.
        ValueError: names the file that is damaged.
    """
    source = locate(path)
    if source.is_file():
        with errors_name(source):
            return Tokenizer(_from_gguf(source))
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{path}: none of {', '.join(TOKENIZER_FILES)}")
    ends = read_config(source).get("eos_token_id")
    eos_ids = [ends] if isinstance(ends, int) else ends or []
    return Tokenizer(_from_folder(source), eos_ids)


def _from_folder(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # `tokenizers` raises nothing narrower for a file it cannot parse
        raise ValueError(f"{folder}: the tokenizer cannot be read: {error}") from error


def _from_gguf(path: Path) -> Any:
    # Not AutoTokenizer: it parses the whole file to learn the class, which is this one anyway.
    hf = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    backend = hf.backend_tokenizer
    kind = read_gguf_metadata(str(path))[0].get("tokenizer.ggml.pre", "default")
    # What transformers makes of names that it does not know: GPT-2's rule.
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) or kind in (
        "default",
        "gpt-2",
    ):
        return hf
    if kind != "smollm":
        raise UnsupportedModel(f"tokenizer.ggml.pre {kind!r}: unknown rule for splitting text")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return hf


def _frozen(backend: tokenizers.Tokenizer, *, encode_special_tokens: bool) -> tokenizers.Tokenizer:
    """Returns a copy that no call of transformers can change."""
    own = copy.deepcopy(backend)
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = encode_special_tokens
    return own


def _byte_alphabet(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """Returns the byte that each character of a byte-level token means; {} for SentencePiece."""
    kinds = _kinds(json.loads(backend.decoder.__getstate__())) if backend.decoder else set()
    if "ByteLevel" in kinds:
        alphabet = bytes_to_unicode()  # type: ignore[no-untyped-call]
        return {char: byte for byte, char in alphabet.items()}
    if kinds & {"ByteFallback", "Metaspace"}:
        return {}
    raise UnsupportedModel(f"decoder {sorted(kinds)}: only byte-level BPE and SentencePiece")


def _kinds(decoder: Mapping[str, Any]) -> set[str]:
    inner = decoder.get("decoders", [])
    return {decoder["type"]}.union(*(_kinds(each) for each in inner))
