"""Aligns the features of new footage with those of old footage, without labels and training.

    python -m pipelines.align --checkpoint runs/games --old shards/old --new shards/new_hud \\
        --exclude huds.toml:both --out new_hud.safetensors

OUT maps features of the new footage to `features @ weight + bias`, which have the mean (or the mean
and covariance) of those of the old footage, so that probes of the old features read them. The file
says whose features it is for. `--align OUT` of evaluate and embed and `align: OUT` of the endpoint
apply it. docs/adapting.md has the details.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

# Lets `python pipelines/align.py` run from an uninstalled checkout, as `ray job submit` does.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from models.artifacts.alignment import Origin, alignment_bytes
from pipelines.config.jobs import AlignConfig
from pipelines.dataset.aspects import fit_notes
from pipelines.dataset.rows import Wanted, iter_labelled
from pipelines.dataset.shards import Manifest, read_manifest
from pipelines.evaluation.arrays import held_out_split
from pipelines.evaluation.drift import statistics_drift, unpaired_alignment
from pipelines.evaluation.features import extract_features
from pipelines.evaluation.subject import Subject, load_subject, with_sampler
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare
from pipelines.runtime.uris import open_uri, write_atomic

LEAST = 4
"""Samples of each kind of footage at least; half of them are held out."""


def align(cfg: AlignConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Fits the alignment and writes it.

    Args:
        cfg: the job.
        console: where progress and the table are printed; None for stdout.

    Returns:
        `samples` of each kind of footage, and the drift (`drift.statistics_drift`) `before` and
        `after`: of held-out halves, by a map that was fitted to the others.

    Raises:
        ValueError: there is no such encoder, the sets do not go together, or have too few samples.
    """
    console = console or Console()
    cfg = prepare(cfg)
    footage = _read_footage(cfg)
    subject = with_sampler(cfg, load_subject(cfg.checkpoint), footage[0].manifest.modality)
    _say_fit(subject, footage, console)
    subject.encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    with console.status("computing features"):
        old_ND, new_MD = (_features(cfg, one, subject) for one in footage)
    samples = {"old": len(old_ND), "new": len(new_MD)}
    found = {"samples": samples, **_held_out_drift(new_MD, old_ND, cfg)}
    origin = Origin.of(
        subject.encoder,
        subject.preprocessing,
        how=cfg.how,
        name=subject.name,
        clip=subject.clip,
        samples=samples,
    )
    fs, path = open_uri(cfg.out)
    write_atomic(fs, path, alignment_bytes(unpaired_alignment(new_MD, old_ND, cfg.how), origin))
    console.print(_table(found))
    console.print(f"alignment: {cfg.out}", markup=False, highlight=False, soft_wrap=True)
    return found


@dataclasses.dataclass(frozen=True)
class Footage:
    """One of the two sets."""

    flag: str
    uri: str
    manifest: Manifest


def _read_footage(cfg: AlignConfig) -> list[Footage]:
    """Reads the manifests of both sets; raises a ValueError if they do not go together."""
    uris = {"--old": cfg.old, "--new": cfg.new}
    footage = [Footage(flag, uri, read_manifest(uri)) for flag, uri in uris.items()]
    old, new = (one.manifest.modality for one in footage)
    if old != new:
        raise ValueError(f"--new: holds {new}s, --old {old}s")
    for one in footage:
        if cfg.only is not None and cfg.only not in one.manifest.classes:
            known = ", ".join(one.manifest.classes) or "none"
            raise ValueError(f"--only: no class {cfg.only!r} in {one.flag}; there are {known}")
    return footage


def _say_fit(subject: Subject, footage: Sequence[Footage], console: Console) -> None:
    """Prints what the encoder's fit does to pictures of another aspect."""
    prep, sets = subject.preprocessing, [(one.flag, one.uri, one.manifest) for one in footage]
    for note in fit_notes(sets, prep.fit, prep.image_size):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _features(cfg: AlignConfig, one: Footage, subject: Subject) -> np.ndarray:
    """Computes pooled features [N, D] of at most `cfg.limit` samples, labelled or not."""
    only = None if cfg.only is None else one.manifest.classes.index(cfg.only)
    rows = iter_labelled(one.uri, cfg.limit, wanted=Wanted(column="sample_id", only=only))
    tables = [table for table in rows if table.num_rows]
    if (count := sum(table.num_rows for table in tables)) < LEAST:
        raise ValueError(f"{one.flag}: {one.uri}: of {count} samples there are no statistics")
    return extract_features(
        subject.encoder,
        subject.preprocessing,
        tables,
        batch_size=cfg.batch_size,
        sampler=subject.sampler,
    )


def _held_out_drift(
    new_MD: np.ndarray, old_ND: np.ndarray, cfg: AlignConfig
) -> dict[str, dict[str, float]]:
    """Measures the drift on random halves, before and after a map fitted to the other halves.

    On the samples that a map was fitted to, nothing would be left by construction.
    """
    (new_read, new_fit), (old_read, old_fit) = (
        held_out_split(len(x), 0.5, seed=0) for x in (new_MD, old_ND)
    )
    mapped = unpaired_alignment(new_MD[new_fit], old_ND[old_fit], cfg.how)
    before, old = new_MD[new_read], old_ND[old_read]
    return {
        "before": statistics_drift(before, old),
        "after": statistics_drift(mapped(before), old),
    }


def _table(found: dict[str, Any]) -> Table:
    samples = found["samples"]
    drawn = Table(
        title=f"{samples['new']:,} samples of new footage beside {samples['old']:,} of old",
        title_justify="left",
        caption="relative to the spread of old features; read on halves that the map has not seen",
        caption_justify="left",
    )
    for heading in ("distance of", "before", "after"):
        drawn.add_column(heading, justify="left" if heading == "distance of" else "right")
    for key, name in (("mean", "means"), ("covariance", "covariances")):
        drawn.add_row(name, *(f"{found[when][key]:.3f}" for when in ("before", "after")))
    return drawn


def main() -> None:
    """Entry point of `python -m pipelines.align`."""
    run_command(lambda: tyro.cli(AlignConfig, description=__doc__), align)


if __name__ == "__main__":
    main()
