"""The constants that a plan stands on, each with bounds and where it comes from.

Those that nobody has measured on the hardware in question are wide on purpose. `measure.py`
replaces them by what it measures on this machine.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.capacity.clusters import Cluster
from pipelines.config.train import PretrainConfig


@dataclass(frozen=True)
class Constant:
    """A number between two bounds, and its source."""

    value: float
    low: float
    high: float
    source: str = "assumed"

    def scaled(self, factor: float) -> Constant:
        """Returns the constant in another unit."""
        return Constant(self.value * factor, self.low * factor, self.high * factor, self.source)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What is known of the hardware, for one run."""

    compute_flops: Constant
    """FLOP/s of one worker in the forward and backward passes."""
    update_bytes_s: Constant
    """Bytes/s of the optimizer and the EMA of one worker, read and written."""
    read_cpu_s: Constant
    """CPU seconds of one core to read a sample and draw its crop and masks."""
    decode_cpu_s: Constant
    """CPU seconds of one core to decode a sample to its crop."""
    vcpu_share: Constant
    """What one hardware thread does of the work of one core, if all of them work."""
    read_bytes_s: Constant
    """Bytes/s that a host reads of the data."""
    checkpoint_bytes_s: Constant
    """Bytes/s with which a host writes a checkpoint to its disk, while training waits."""
    upload_bytes_s: Constant
    """Bytes/s with which a host uploads a checkpoint, while training goes on."""
    link_bytes_s: Constant
    """Bytes/s of a ring of the workers of one host."""
    network_bytes_s: Constant
    """Bytes/s of a ring of the hosts."""
    standstill_share: Constant = Constant(0.5, 0.1, 1.0, "I-JEPA on two cores, plan_run.md")
    """Where a worker trains and decodes on the same CPU: share of the CPU seconds of decoding in
    which training stands still, for Python's lock and for caches."""
    activation_share: Constant = Constant(1.0, 0.6, 1.15, "eager count; torch.compile keeps less")
    """Activations in memory, as a share of what is counted."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, which `with_measured` reads."""
        return {name: [*dataclasses.astuple(constant)] for name, constant in vars(self).items()}


JPEG_RESIZE_S, JPEG_BYTE_S = 0.4e-3, 18e-9
"""CPU seconds to resize one photo, and to decode one byte of it: 747 images/s of 51 KiB and 2,593/s
of resizing alone, on one core of an AMD EPYC (benchmarks/data/loader.md has the loader as a whole:
1.3 times as much)."""
LOADER_SHARE = 1.3
READ_S = 0.1e-3
"""CPU seconds to read a row and draw its crop and masks (same place)."""
FRAME_PIXEL_S = 4e-9
"""CPU seconds to decode one pixel of H.264."""


def assumed(cfg: PretrainConfig, cluster: Cluster, sample_bytes: float) -> Constants:
    """Returns constants for hardware that was not measured.

    Args:
        cfg: the run.
        cluster: what it runs on.
        sample_bytes: mean encoded bytes of a sample.
    """
    gpu = cluster.accelerator
    network = cluster.network_gbit * 1e9 / 8
    if gpu:
        peak = gpu.peak_flops(cfg.run.precision)
        compute = Constant(
            0.3 * peak, 0.18 * peak, 0.5 * peak,
            "30% of peak; I-JEPA's own ViT-H/14 run had about 20% (72 h on 16 A100)",
        )  # fmt: skip
        update = Constant(0.7, 0.4, 0.9, "70% of the memory's bandwidth").scaled(
            gpu.memory_gb_s * 1e9
        )
        link = Constant(0.7, 0.4, 0.9, "70% of the link").scaled(gpu.link_gb_s * 1e9)
    else:
        cores = cores_of_worker(cfg, cluster)
        compute = Constant(30e9, 10e9, 100e9, "30 GFLOP/s a core").scaled(cores)
        update, link = Constant(4e9, 1e9, 2e10), Constant(1e9, 3e8, 5e9)
    decode = LOADER_SHARE * (JPEG_RESIZE_S + JPEG_BYTE_S * sample_bytes)
    if cfg.modality == "video":
        # From the key frame before the clip to its end, at a short side a little above the crop's.
        height, width = cfg.model.height_width
        span = cfg.clip_frames * max(cfg.clip.stride, 15 / cfg.clip.fps if cfg.clip.fps else 1)
        decode = LOADER_SHARE * FRAME_PIXEL_S * 1.8 * height * width * span
    return Constants(
        compute_flops=compute,
        update_bytes_s=update,
        read_cpu_s=Constant(READ_S, READ_S / 2, READ_S * 2, "benchmarks/data/loader.md"),
        decode_cpu_s=Constant(decode, decode / 1.7, decode * 1.7, "benchmarks/data/loader.md"),
        vcpu_share=Constant(0.6, 0.5, 1.0, "two hardware threads share a core"),
        read_bytes_s=_capped(Constant(1.5e9, 5e8, 3e9, "S3 to a host"), network),
        checkpoint_bytes_s=Constant(1e9, 3e8, 3e9, "an NVMe disk"),
        upload_bytes_s=_capped(Constant(5e8, 1e8, 2e9, "a host to S3"), network),
        link_bytes_s=link,
        network_bytes_s=Constant(0.6, 0.3, 0.85, "60% of the network").scaled(network),
    )


def _capped(constant: Constant, network: float) -> Constant:
    """Limits bytes/s to 70% of a host's network (40 to 90%)."""
    return Constant(
        min(constant.value, 0.7 * network),
        min(constant.low, 0.4 * network),
        min(constant.high, 0.9 * network),
        constant.source,
    )


def cores_of_worker(cfg: PretrainConfig, cluster: Cluster) -> float:
    """Cores of one worker that trains without a GPU."""
    on_host = -(-cfg.run.most_workers // cluster.hosts)
    return float(cfg.run.threads or max(1, cluster.vcpus // on_host))


def with_measured(constants: Constants, values: Mapping[str, Any], flag: str) -> Constants:
    """Replaces constants by measured ones, as `Constants.to_json` gives them.

    Raises:
        ValueError: the values are not such; the flag is named.
    """
    try:
        known = {name: Constant(*_bounds(value), str(value[3])) for name, value in values.items()}
        for name, one in known.items():
            if not 0 < one.low <= one.value <= one.high < math.inf:
                raise ValueError(f"{name} is not between its bounds")
        return dataclasses.replace(constants, **known)
    except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        raise ValueError(f"{flag}: not constants that --save wrote ({error})") from error


def _bounds(value: Any) -> tuple[float, float, float]:
    middle, low, high = (float(number) for number in value[:3])
    return middle, low, high


def read_values(text: str, flag: str) -> dict[str, Any]:
    """Reads the text that `--save` wrote.

    Raises:
        ValueError: it is something else; the flag is named.
    """
    try:
        values = json.loads(text)["constants"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag}: not constants that --save wrote") from error
    if not isinstance(values, dict):
        raise ValueError(f"{flag}: not constants that --save wrote")
    return values


def measured_rate(amount: float, seconds: list[float], source: str) -> Constant:
    """Makes a rate of repeated timings: the median, within the quartiles and 5% at least.

    Args:
        amount: what was done in each of these times.
        seconds: the times, two or more.
        source: how they were measured.
    """
    middle = statistics.median(seconds)
    quick, _, slow = statistics.quantiles(seconds, n=4)
    quick, slow = min(quick, middle / 1.05), max(slow, middle * 1.05)
    return Constant(amount / middle, amount / slow, amount / quick, source)


@dataclass(frozen=True)
class Range:
    """An estimate with its error bars."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Range:
        """Returns the estimate in another unit."""
        return Range(self.value * factor, self.low * factor, self.high * factor)


def spread(function: Callable[[Constants], float], constants: Constants) -> Range:
    """Evaluates a function with error bars: each constant alone is moved to its bounds.

    The deviations upwards and downwards are added in quadrature, as those of independent errors
    are.
    """
    middle, up, down = function(constants), 0.0, 0.0
    for name, constant in vars(constants).items():
        moved = [
            function(
                dataclasses.replace(constants, **{name: dataclasses.replace(constant, value=v)})
            )
            - middle
            for v in (constant.low, constant.high)
        ]
        up += max(0.0, *moved) ** 2
        down += min(0.0, *moved) ** 2
    return Range(middle, max(0.0, middle - math.sqrt(down)), middle + math.sqrt(up))
