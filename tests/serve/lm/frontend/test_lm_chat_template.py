"""Chat turns that follow earlier ones, with the templates of different models."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from models.sink_lm.checkpoints.tokenizer import Tokenizer
from serve.ingress.errors import ApiError
from serve.lm.contract import LMCard
from serve.lm.frontend.chat_template import render_chat
from serve.lm.frontend.schemas import ChatRequest
from serve.lm.frontend.service import LanguageService
from serve.lm.settings import LMSettings

CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Reasoning stands in the answers after the last question only; an answer there without any gets an
# empty one.
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Turns alternate, the system prompt is part of the first question, each exchange has a start token.
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% set content = system + m.content if loop.index0 == 0 else m.content %}"
    "{% if m.role == 'user' %}{{ '<s>' + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + '</s>' }}{% endif %}{% endfor %}"
)
FORGETFUL = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


def make(template: str, special: Sequence[str], eos: str) -> Tokenizer:
    bpe = tokenizers.Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(["the answer and then the user answers "] * 3, trainer)
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        additional_special_tokens=[name for name in special if name != eos],
    )
    hf.chat_template = template
    return Tokenizer(hf)


def chatml(template: str) -> Tokenizer:
    return make(template, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")


def llama2() -> Tokenizer:
    return make(LLAMA2, ["<s>", "</s>"], "</s>")


def service(tokenizer: Tokenizer) -> LanguageService:
    card = LMCard(
        name="m",
        created=0,
        vocab_size=tokenizer.vocab_size,
        capacity=64,
        sinks=4,
        sessions=4,
        bytes_per_session=1,
        fingerprint="f",
        persistent=True,
    )
    settings = LMSettings(model="m", sessions=8)
    return LanguageService(settings, card, tokenizer)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("template", [CHATML, QWEN3, LLAMA2], ids=["chatml", "qwen3", "llama2"])
@pytest.mark.parametrize("said", ["all", "without its end token", "with its end token"])
def test_a_second_turn_continues_the_stream_as_the_template_has_it(
    template: str, said: str
) -> None:
    """The stream after two turns is the whole conversation rendered at once."""
    tokenizer = llama2() if template == LLAMA2 else chatml(template)
    talk = [user("who are you?"), assistant("I am the answer"), user("and then?")]
    whole = tokenizer.chat(talk)
    start = tuple(tokenizer.chat(talk[:1]))
    answer = tokenizer.encode(
        " I am the answer " if template == LLAMA2 else "I am the answer", bos=False
    )
    stream = [*start, *answer]
    if said != "without its end token":
        stream.append(tokenizer.eos_ids[0])
    if said == "all" and template != LLAMA2:
        stream += tokenizer.encode("\n", bos=False)
    feed = render_chat(tokenizer, talk[2:], start)
    assert not feed.problem
    follow = feed.after(len(stream), tuple(stream[-8:]))
    assert [*stream, *follow] == whole


def test_a_template_that_cannot_follow_is_refused_only_after_a_turn() -> None:
    """The same messages are accepted as a first turn."""
    tokenizer = llama2()
    talk = [{"role": "system", "content": "Be kind."}, user("hi")]
    start = tuple(tokenizer.chat(talk))
    feed = render_chat(tokenizer, talk, start)
    assert "roles must alternate" in feed.problem
    assert feed.after(0, ()) == start
    forgetful = chatml(FORGETFUL)
    assert "cannot put" in render_chat(forgetful, [user("hi")], (1,)).problem


@pytest.mark.parametrize("template", [CHATML, QWEN3, LLAMA2, FORGETFUL])
def test_a_chat_without_a_session_needs_no_second_turn(template: str) -> None:
    tokenizer = llama2() if template == LLAMA2 else chatml(template)
    messages = [user("hi")]
    if template == LLAMA2:
        messages = [{"role": "system", "content": "Be kind."}, *messages]
    job = service(tokenizer).chat(ChatRequest.model_validate({"messages": messages}), None)
    (feed,) = job.start.feeds
    assert list(feed.start) == tokenizer.chat(messages)
    in_session = ChatRequest.model_validate({"messages": messages, "session_id": "s"})
    assert service(tokenizer).chat(in_session, None).start.feeds[0].start == feed.start


def test_what_the_template_refuses_is_a_400() -> None:
    bad = ChatRequest.model_validate({"messages": [user("a"), user("b")], "session_id": "s"})
    with pytest.raises(ApiError, match="alternate") as caught:
        service(llama2()).chat(bad, None)
    assert (caught.value.status, caught.value.code) == (400, "invalid_messages")


def test_the_invented_answer_occurs_in_no_message() -> None:
    tokenizer = chatml(CHATML)
    for text in ("answer0x", "answer0x answer1x", "<|im_end|>answer0x"):
        feed = render_chat(tokenizer, [user(text)], (1,))
        expected = tokenizer.chat([assistant("w"), user(text)])
        assert list(feed.follow) == expected[-len(feed.follow) :]
        assert feed.follow[0] == tokenizer.eos_ids[0]
        assert feed.follow.count(tokenizer.eos_ids[0]) == 2
