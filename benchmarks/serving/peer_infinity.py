"""infinity with a CLIP whose vision tower has the benchmark's shape, as a peer of our endpoint.

    INFINITY_VENV/bin/python benchmarks/serving/peer_infinity.py --folder DIR --port 7997

It runs in an environment of its own, with `infinity-emb[torch,server,vision]`: that pins older
versions of numpy and transformers than ours. infinity serves images only of models that have
`get_text_features` too (CLIP, SigLIP), so the model is a CLIP with random weights: a vision tower
of ViT-S/16 at 224 with 197 tokens instead of 196, a projection, and a text tower that is never
called. On a CPU infinity computes in fp32: it passes `--dtype` on to CUDA models alone.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

MODEL = "clip"
"""Name in requests."""


def write_clip(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """Writes the model, its image processor and the least tokenizer that loads."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    width = args.width
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": args.depth,
        "num_attention_heads": args.heads,
        "image_size": args.image_size,
        "patch_size": args.patch_size,
        "hidden_act": "gelu",
    }
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "vocab_size": len(words), "bos_token_id": 0}
    text |= {"eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)
    CLIPModel(config).save_pretrained(folder)
    side = args.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)


def main() -> None:
    """Writes the model, and becomes infinity's server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    write_clip(args.folder, args)
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "DO_NOT_TRACK": "1"}
    os.environ |= {"INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}
    server = str(pathlib.Path(sys.executable).with_name("infinity_emb"))
    command = [server, "v2", "--model-id", str(args.folder), "--served-model-name", MODEL]
    command += ["--port", str(args.port), "--host", "127.0.0.1", "--device", "cpu"]
    command += ["--batch-size", str(args.batch_size), "--dtype", "float32", "--engine", "torch"]
    command += ["--no-bettertransformer"]
    os.execv(server, command)


if __name__ == "__main__":
    main()
