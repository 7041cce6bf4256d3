"""Decode speed of mlx-lm's rotating cache that keeps 4 tokens, on the shapes of SmolLM2-135M.

    pip install 'mlx[cpu]' mlx-lm        # another environment than ours will do
    python benchmarks/language/peer_mlx.py --caches 256 1024 4096

It needs none of our code. The weights are random: they do not change the speed. Its kept tokens
stay at their true, ever-growing distance, which is another function than the paper's, and it holds
`cache` keys where ours holds one more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

KEEP = 4
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def time_decode(mx: object, llama: object, rotating: type, args: argparse.Namespace) -> None:
    model = llama.Model(llama.ModelArgs(**SMOLLM2))
    model.set_dtype(getattr(mx, args.dtype))
    mx.eval(model.parameters())
    for cache in args.caches:
        memory = [rotating(max_size=cache, keep=KEEP) for _ in model.layers]
        # Filled in chunks to one past its size, so that every timed step evicts a token.
        for start in range(0, cache + 1, 256):
            count = min(256, cache + 1 - start)
            chunk = mx.random.randint(1000, 40_000, (1, count))
            mx.eval(model(chunk, cache=memory))
        token, times = mx.array([[1]]), []
        for _ in range(args.steps + 3):
            started = time.perf_counter()
            token = mx.argmax(model(token, cache=memory)[:, -1:], axis=-1)
            mx.eval(token)
            times.append(time.perf_counter() - started)
        row = {
            "cache": cache,
            "dtype": args.dtype,
            "tokens_per_s": 1 / statistics.median(times[3:]),
            "rss_mib": resident_mib(),
            "mlx": version("mlx"),
            "mlx-lm": version("mlx-lm"),
            "device": str(mx.default_device()),
        }
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caches", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    args = parser.parse_args()
    try:
        import mlx.core as mx
        from mlx_lm.models import llama
        from mlx_lm.models.cache import RotatingKVCache
    except ImportError as error:
        sys.exit(f"not run: mlx[cpu] and mlx-lm are not installed ({error})")
    time_decode(mx, llama, RotatingKVCache, args)


if __name__ == "__main__":
    main()
