"""Uses everything that the examples of docs/extending.md add: `python extended.py COPY`.

Run by tests/repository/test_extending.py with the changed copy of the packages first on the path.
Prints the title of each section whose example works.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image


def recipe() -> None:
    from pipelines.recipes.registry import RECIPES

    line, cfg = RECIPES["cifar10_longer"]
    assert line == "`cifar10_demo`, ten times as long."
    assert cfg.run.steps == 28_000


def objective() -> None:
    from models.objectives.registry import build_objective
    from pipelines.config.as_json import from_json, to_json
    from pipelines.config.objectives import ObjectiveConfig
    from pipelines.config.train import ModelConfig, PretrainConfig

    cfg = PretrainConfig(
        model=ModelConfig(encoder="vit_micro32", image_size=32, patch_size=8),
        objective=ObjectiveConfig(name="barlow_twins", projector=(32, 16), redundancy_weight=0.01),
    )
    assert from_json(PretrainConfig, to_json(cfg)) == cfg
    built = build_objective(
        "barlow_twins", model=cfg.model_settings, objective=cfg.objective_settings
    )
    keys = torch.arange(8)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    optimizer = torch.optim.SGD(built.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        output = built({"images": images, "sample_keys": keys})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0], losses


def masker() -> None:
    from pipelines.config.train import ModelConfig, PretrainConfig
    from pipelines.loading.masks.maskers import MASKERS

    cfg = PretrainConfig(model=ModelConfig(image_size=32, patch_size=8))
    masks = MASKERS["checkerboard"](cfg).for_samples(np.arange(3, dtype=np.uint64))
    assert masks["context_ids"][0].tolist() == [0, 2, 5, 7, 8, 10, 13, 15]
    assert masks["target_ids"].shape == (3, 1, 8)


def source() -> None:
    from pipelines.config.ingest import IngestConfig
    from pipelines.ingestion.reading.items import Tally
    from pipelines.ingestion.sources.registry import list_source, read_chunk

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    folder = Path(sys.argv[1]) / "zips"
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("cats/1.png", buffer.getvalue())
        archive.writestr("cats/notes.txt", b"text")
        archive.writestr("dogs/2.png", buffer.getvalue())
    (folder / "b.zip").write_bytes(b"PK no zip")
    cfg = IngestConfig(source=str(folder), out=str(folder / "out"))
    tally = Tally()
    items = [item for chunk in list_source(cfg).chunks for item in read_chunk(chunk, cfg, tally)]
    found = [(Path(item.uri).name, item.label, (item.problem or ("",))[0]) for item in items]
    assert found == [
        ("1.png", "cats", ""),
        ("2.png", "dogs", ""),
        ("b.zip", None, "corrupt_archive"),
    ]
    assert dict(tally.ignored) == {"other file": 1}


def probe() -> None:
    from pipelines.evaluation.probes.centroid import CENTROID
    from pipelines.evaluation.probes.registry import PROBES, columns

    train = torch.tensor([[0.0, 1.0], [0.0, 3.0], [5.0, 0.0], [7.0, 0.0]])
    test = torch.tensor([[1.0, 2.0], [6.0, 1.0], [0.0, 2.0]])
    features = (train, np.array([2, 2, 5, 5]), test, np.array([2, 5, 5]))
    found = CENTROID.run(SimpleNamespace(features=features))
    assert found == {"centroid": 2 / 3}, found
    assert CENTROID in PROBES
    assert "Centroid" in [column.name for column in columns()]
    assert CENTROID.columns[0].cell(found) == "66.7"


def sampler() -> None:
    from models.sink_lm.engine.sampling import allowed
    from serve.lm.frontend.schemas import CompletionRequest

    body = CompletionRequest.model_validate({"prompt": "a", "top_a": 0.5})
    params = body.sampling_params(max_tokens=1, logprobs=None)
    assert params.top_a == 0.5
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    kept = allowed(logits, [params])[0]
    assert kept.gt(0).tolist() == [True, True, False]  # 0.5 * 0.6 ** 2 = 0.18
    assert allowed(logits, [replace(params, top_a=0.0)])[0].gt(0).all()


def http_field() -> None:
    from serve.embeddings.encoding import encode
    from serve.embeddings.frontend.schemas import EmbeddingRequest

    body = {"input": "x", "decimals": 1, "normalize": False}
    options = EmbeddingRequest.model_validate(body)
    reply = encode(np.array([0.26, 1.0], np.float32), options, None, (1, 1))
    assert json.dumps(np.round(reply["embedding"], 3).tolist()) == "[0.3, 1.0]"


CHECKS = {
    "A recipe": recipe,
    "An objective": objective,
    "A masker": masker,
    "A type of source": source,
    "A probe": probe,
    "A sampler parameter": sampler,
    "An HTTP field": http_field,
}


if __name__ == "__main__":
    torch.manual_seed(0)
    for title, check in CHECKS.items():
        check()
        print(title)
