"""Decode speed of llama.cpp with context shift, on the GGUF file that `sink_lm.py` reads.

    pip install xllamacpp        # llama.cpp as a wheel; another environment than ours will do
    python benchmarks/language/peer_llama_cpp.py --gguf data/smollm2/FILE.gguf \
        --caches 256 1024 4096

It needs none of our code. With `ctx_shift` and `n_keep = 4` llama.cpp keeps the first 4 tokens;
when its context is full it drops the older half of the rest and moves the positions of what is
left. So its context swings between half the cache and all of it, and tokens are not evicted one by
one: another function than the paper's, with less to read on average. Timed is one such swing. Its
weights stay quantised as they are in the file.

With `--passages FILE`, a JSON list of lists of token ids, it prints the mean loss of the second
half of every passage instead, each read from an empty context (`int4_quality.py` compares ours).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path

KEEP = 4
ORDINARY = 260
"""A token of SmolLM2's vocabulary that is a word, " the"."""


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def serve(llama: object, gguf: str, cache: int, threads: int) -> object:
    params = llama.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_keep, params.n_parallel = cache, KEEP, 1
    params.ctx_shift = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return llama.Server(params)


def time_decode(server: object, cache: int) -> dict[str, float]:
    """Fills the context, then decodes until it is full the next time."""
    times: list[tuple[float, float]] = []
    fill, swing = 16, (cache - KEEP) // 2
    request = {
        "prompt": [random.randrange(1000, 40_000) for _ in range(cache - fill)],
        "n_predict": 2 * fill + swing,
        "n_keep": KEEP,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
    }
    replies: list[object] = []

    def take(reply: object) -> None:
        times.append((time.perf_counter(), time.process_time()))
        replies.append(reply)

    server.handle_completions(request, take)
    if len(times) < fill + swing:
        raise SystemExit(f"only {len(times)} tokens came: {replies[-1]}")
    seconds, cpu_seconds = (
        late - early for early, late in zip(times[fill - 1], times[fill + swing - 1], strict=True)
    )
    return {
        "tokens": swing,
        "tokens_per_s": swing / seconds,
        "tokens_per_cpu_s": swing / cpu_seconds,
        "rss_mib": resident_mib(),
    }


def mean_loss(server: object, passages: list[list[int]]) -> dict[str, float]:
    """Mean nats of the tokens in the second halves.

    The server gives no losses of a prompt, so that every token costs a request for the one after
    the tokens before it, which it keeps in its cache.
    """
    losses = []
    for passage in passages:
        for place in range(len(passage) // 2, len(passage)):
            found = None
            for count in (1000, 200_000):  # few first: the whole vocabulary takes long to print
                top = likeliest(server, passage[:place], count)
                if (found := top.get(passage[place])) is not None:
                    break
            losses.append(-found)
    return {"tokens": len(losses), "mean_loss": sum(losses) / len(losses)}


def likeliest(server: object, prompt: list[int], count: int) -> dict[int, float]:
    # A reply that ends, or that ends inside a character, reports no probabilities. Those that are
    # reported are the ones before sampling: a bias that forces an ordinary token changes none.
    request = {"prompt": prompt, "n_predict": 1, "n_probs": count}
    request |= {"logit_bias": [[ORDINARY, 100.0]], "temperature": 0.0}
    replies: list[dict] = []
    server.handle_completions(request | {"cache_prompt": True}, replies.append)
    content = replies[-1]["choices"][0]["logprobs"]["content"][0]
    return {token["id"]: token["logprob"] for token in content["top_logprobs"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--caches", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passages", type=Path)
    args = parser.parse_args()
    try:
        import xllamacpp
    except ImportError as error:
        sys.exit(f"not run: xllamacpp is not installed ({error})")
    if args.passages:
        passages = json.loads(args.passages.read_text())
        server = serve(xllamacpp, args.gguf, len(passages[0]) + 8, args.threads)
        print(json.dumps(mean_loss(server, passages) | {"xllamacpp": version("xllamacpp")}))
        return
    random.seed(0)
    for cache in args.caches:
        server = serve(xllamacpp, args.gguf, cache, args.threads)
        row = {"cache": cache, "threads": args.threads} | time_decode(server, cache)
        print(json.dumps(row | {"xllamacpp": version("xllamacpp")}), flush=True)
        del server


if __name__ == "__main__":
    main()
