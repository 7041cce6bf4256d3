"""Fields of other servers' APIs that are accepted at the value that changes nothing.

Clients send such fields at their default, or send back a message with all fields of a reply. At
that value, a field is dropped before the request is checked. At any other value it would change the
answer, so it is refused by name, like every unknown field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import model_validator

from serve.ingress.bodies import RequestModel

Neutral = Callable[[Any, Mapping[str, Any]], bool]
"""Returns whether a value changes nothing, given the value and all fields of its object."""


def only(*values: Any) -> Neutral:
    """Returns a test for these values; numbers do not count as true or false."""

    def is_neutral(value: Any, _: Mapping[str, Any]) -> bool:
        is_bool = isinstance(value, bool)
        return any(value == each and is_bool == isinstance(each, bool) for each in values)

    return is_neutral


def of_type(*kinds: type) -> Neutral:
    """Returns a test for any value of these types, for labels and for hints that only save work."""

    def is_neutral(value: Any, _: Mapping[str, Any]) -> bool:
        return isinstance(value, kinds)

    return is_neutral


def _as_many_as_asked(value: Any, fields: Mapping[str, Any]) -> bool:
    """Tests `best_of`, the number of answers from which the `n` best are returned."""
    return only(1, fields.get("n", 1))(value, fields)


REQUEST: Mapping[str, Neutral] = {
    # OpenAI's labels and hints
    "metadata": of_type(dict),
    "safety_identifier": of_type(str),
    "prompt_cache_key": of_type(str),
    "prompt_cache_retention": of_type(str),
    # OpenAI's options, switched off
    "best_of": _as_many_as_asked,
    "suffix": only(""),
    "echo": only(False),
    "tools": only([]),
    "functions": only([]),
    "tool_choice": only("none", "auto"),
    "function_call": only("none", "auto"),
    "parallel_tool_calls": of_type(bool),
    "response_format": only({"type": "text"}),
    "modalities": only(["text"]),
    "reasoning_effort": only("none"),
    "verbosity": only("medium"),
    "store": only(False),
    "service_tier": only("auto", "default"),
    # options of vLLM, SGLang and llama.cpp, switched off
    "repetition_penalty": only(1),
    "repeat_penalty": only(1),
    "length_penalty": only(1),
    "typical_p": only(1),
    "tfs_z": only(1),
    "top_a": only(0),
    "mirostat": only(0),
    "dry_multiplier": only(0),
    "xtc_probability": only(0),
    "n_probs": only(0),
    "priority": only(0),
    "cache_prompt": of_type(bool),
    "use_beam_search": only(False),
    "early_stopping": only(False),
    "skip_special_tokens": only(True),
    "spaces_between_special_tokens": of_type(bool),
    "include_stop_str_in_output": only(False),
    "no_stop_trim": only(False),
    "return_token_ids": only(False),
    "return_tokens_as_token_ids": only(False),
    "add_special_tokens": only(False),
    "add_generation_prompt": only(True),
    "continue_final_message": only(False),
    "chat_template_kwargs": only({}),
    "mm_processor_kwargs": only({}),
    "documents": only([]),
    "bad_words": only([]),
    "thinking": only({"type": "disabled"}),
    "extra_body": only({}),
}
"""Fields of requests to generate; names that a request has as its own field are ignored here."""

MESSAGE: Mapping[str, Neutral] = {
    # properties of a reply that are no part of its text
    "annotations": of_type(list),
    "cache_control": of_type(dict),
    "provider_specific_fields": of_type(dict),
    # reasoning behind an earlier answer, which is not part of the history
    "reasoning": of_type(str),
    "reasoning_content": of_type(str),
    "reasoning_details": of_type(list),
    "thinking_blocks": of_type(list),
    # fields that may be empty
    "refusal": only(""),
    "tool_calls": only([]),
    "tool_call_id": only(""),
    "images": only([]),
}
"""Fields of messages and of the parts of their content."""


class Tolerant(RequestModel):
    """Base of bodies that drop fields at their neutral value."""

    neutral: ClassVar[Mapping[str, Neutral]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values

        def asks_for_nothing(name: str, value: Any) -> bool:
            is_neutral = None if name in cls.model_fields else cls.neutral.get(name)
            return is_neutral is not None and is_neutral(value, values)

        return {name: each for name, each in values.items() if not asks_for_nothing(name, each)}
