"""Recipes for images."""

from __future__ import annotations

from dataclasses import replace

from pipelines.config.data import DataConfig, MaskConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.optim import OptimConfig
from pipelines.config.run import RunConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.recipes.recipe import recipe

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

# ImageNet-1k has 1,281,167 images, which are 625 whole batches of 2,048.
IN1K_STEPS_PER_EPOCH = 625


@recipe
def debug() -> PretrainConfig:
    """Does everything once, learns nothing.

    python -m pipelines.pretrain debug --data.train SHARDS

    It takes seconds on one CPU core once the workers have started. The result is meaningless.
    """
    return PretrainConfig(
        data=DataConfig(batch_size=32, lanes=4, shuffle_window=64),
        model=ModelConfig(encoder="vit_micro32", image_size=32, patch_size=8),
        optim=OptimConfig(warmup_steps=2),
        run=RunConfig(name="debug", steps=10, log_every=2, checkpoint_every=5),
    )


@recipe
def cifar10_demo() -> PretrainConfig:
    """I-JEPA on the shipped CIFAR-10 sample, small enough for two CPU cores.

    python -m pipelines.pretrain cifar10_demo --data.train SHARDS --data.test TEST_SHARDS

    It takes 3 to 4 minutes on two CPU cores in bf16. kNN accuracy on the 800 test images is 33.5,
    34.2 and 34.0% for seeds 0 to 2, and 24.8, 23.5 and 25.9% with random weights
    (benchmarks/training/pretraining.md).
    """
    return PretrainConfig(
        data=DataConfig(batch_size=64, lanes=8, flip=True),
        model=ModelConfig(
            encoder="vit_tiny32",
            image_size=32,
            patch_size=8,
            mean=CIFAR10_MEAN,
            std=CIFAR10_STD,
            patch_std=0.14,
        ),
        # Schedules of a run this short deliberately end early: with a rate annealed to zero and a
        # target frozen by momentum 1, the last two thirds of it gained nothing (docs/log.md).
        objective=ObjectiveConfig(ema=(0.99, 0.992)),
        optim=OptimConfig(
            lr=5e-4, start_lr=1e-4, final_lr=4e-4, warmup_steps=100, final_weight_decay=0.05
        ),
        # Matrices this small gain little from a second thread, which is left to decoding.
        run=RunConfig(
            name="cifar10_demo",
            steps=2800,
            threads=1,
            log_every=50,
            probe_every=700,
            checkpoint_every=700,
        ),
    )


@recipe
def lejepa_cifar10_demo() -> PretrainConfig:
    """LeJEPA on the shipped CIFAR-10 sample, at the compute of `cifar10_demo`.

    python -m pipelines.pretrain lejepa_cifar10_demo --data.train SHARDS --data.test TEST_SHARDS

    Two views of every picture are cropped and recoloured on the device. It takes 275 s on two CPU
    cores in bf16. kNN accuracy on the 800 test images is 38.2, 37.1 and 37.4% for seeds 0 to 2, and
    24.8, 23.5 and 25.9% with random weights. On all of CIFAR-10 it is 51.1, 49.6 and 50.4% after
    600 CPU seconds, 61.7, 61.8 and 61.1% after an hour, and 28.8, 28.3 and 28.6% with random
    weights (benchmarks/training/objectives.md).
    """
    base = cifar10_demo()
    return replace(
        base,
        # The loader does not crop the picture; all cropping is left to the views.
        data=replace(base.data, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False),
        objective=ObjectiveConfig(
            name="lejepa", projector=(512, 512, 64), sigreg_weight=0.02, slices=256
        ),
        optim=OptimConfig(
            lr=1.5e-3,
            start_lr=1e-4,
            final_lr=1.5e-4,
            warmup_steps=100,
            weight_decay=0.05,
            final_weight_decay=0.05,
        ),
        run=replace(
            base.run,
            name="lejepa_cifar10_demo",
            steps=2000,
            probe_every=500,
            checkpoint_every=500,
        ),
    )


@recipe
def vicreg_cifar10_demo() -> PretrainConfig:
    """VICReg on the shipped CIFAR-10 sample, at the compute of `cifar10_demo`.

    python -m pipelines.pretrain vicreg_cifar10_demo --data.train SHARDS --data.test TEST_SHARDS

    Views, optimizer and length are those of `lejepa_cifar10_demo`. It takes 210 s on two CPU cores
    in bf16. kNN accuracy on the 800 test images is 40.8, 39.4 and 39.8% for seeds 0 to 2, and 24.8,
    23.5 and 25.9% with random weights. On all of CIFAR-10 it is 52.7, 53.1 and 53.0% after 600 CPU
    seconds, 63.9, 63.7 and 63.5% after an hour, and 28.8, 28.3 and 28.6% with random weights
    (benchmarks/training/objectives.md).
    """
    base = lejepa_cifar10_demo()
    return replace(
        base,
        objective=ObjectiveConfig(name="vicreg", projector=(512, 512, 256)),
        run=replace(base.run, name="vicreg_cifar10_demo"),
    )


@recipe
def mae_cifar10_demo() -> PretrainConfig:
    """A masked autoencoder on the shipped CIFAR-10 sample, at the compute of `cifar10_demo`.

    python -m pipelines.pretrain mae_cifar10_demo --data.train SHARDS --data.test TEST_SHARDS

    It hides half of the 16 patches; hiding three quarters, as the paper does, would leave only 4.
    kNN accuracy on all of CIFAR-10 is 42.6, 43.7 and 42.9% for seeds 0 to 2 after 600 CPU seconds,
    49.3, 49.7 and 49.1% after an hour, and 28.8, 28.3 and 28.6% with random weights
    (benchmarks/training/objectives.md). With its own number of steps: not run.
    """
    base = cifar10_demo()
    return replace(
        base,
        mask=MaskConfig(hidden=0.5),
        objective=ObjectiveConfig(name="mae"),
        optim=lejepa_cifar10_demo().optim,
        run=replace(
            base.run, name="mae_cifar10_demo", steps=3600, probe_every=900, checkpoint_every=900
        ),
    )


@recipe
def dmjd_cifar10_demo() -> PretrainConfig:
    """I-JEPA with four disjoint contexts an image, at the compute of `cifar10_demo`.

    python -m pipelines.pretrain dmjd_cifar10_demo --data.train SHARDS --data.test TEST_SHARDS

    Each context has 6 patches and predicts 4 others. kNN accuracy on all of CIFAR-10 is 48.4, 46.8
    and 46.2% for seeds 0 to 2 after 600 CPU seconds, and 28.8, 28.3 and 28.6% with random weights
    (benchmarks/training/objectives.md). With its own number of steps: not run.
    """
    base = cifar10_demo()
    return replace(
        base,
        mask=MaskConfig(contexts=4, context_keep=6),
        objective=replace(base.objective, name="dmjd"),
        run=replace(
            base.run, name="dmjd_cifar10_demo", steps=1500, probe_every=500, checkpoint_every=500
        ),
    )


@recipe
def vicreg_laptop() -> PretrainConfig:
    """VICReg on any images on one machine without a GPU: the encoder of `laptop`.

    python -m pipelines.pretrain vicreg_laptop --data.train URI --data.test URI --run.storage URI

    In a trial of 40 steps it trained on 35 images/s on two CPU cores in fp32, at which its 5,000
    steps take two and a half hours. Its result is unknown: not run to the end.
    """
    base, demo = laptop(), vicreg_cifar10_demo()
    return replace(
        base,
        # The loader crops wide pictures to the middle, at 4:3; all else is left to the views.
        data=replace(base.data, crop_scale=(1.0, 1.0), flip=False),
        objective=demo.objective,
        optim=demo.optim,
        run=replace(base.run, name="vicreg_laptop"),
    )


@recipe
def laptop() -> PretrainConfig:
    """I-JEPA on any images on one machine without a GPU: a ViT-Ti/16 at 128 pixels.

    python -m pipelines.pretrain laptop --data.train URI --data.test URI --run.storage URI

    Expected time and result: not run.
    """
    base = cifar10_demo()
    return replace(
        base,
        data=DataConfig(batch_size=64, lanes=8, shuffle_window=256, flip=True),
        model=ModelConfig(encoder="vit_ti", image_size=128, patch_size=16, patch_std=0.14),
        run=RunConfig(
            name="laptop", steps=5000, log_every=10, probe_every=500, checkpoint_every=100
        ),
    )


@recipe
def cifar10_vits() -> PretrainConfig:
    """I-JEPA on all of CIFAR-10 for about ten minutes of one data-centre GPU.

    python -m pipelines.pretrain cifar10_vits --data.train SHARDS --data.test TEST_SHARDS

    Expected time and result: not run.
    """
    base = cifar10_demo()
    return replace(
        base,
        data=replace(base.data, batch_size=1024, decode_threads=8),
        model=replace(base.model, encoder="vit_small32", patch_size=4),
        objective=ObjectiveConfig(ema=(0.996, 1.0)),
        optim=OptimConfig(warmup_steps=1000, final_weight_decay=0.4),
        run=RunConfig(
            name="cifar10_vits",
            steps=10_000,
            gpu=True,
            cpus_per_worker=1.0,
            precision="bf16",
            compile=True,
            log_every=50,
            probe_every=1000,
            checkpoint_every=1000,
        ),
    )


@recipe
def ijepa_vits16() -> PretrainConfig:
    """A ViT-S/16 on ImageNet-1k, 300 epochs; the paper has none.

    python -m pipelines.pretrain ijepa_vits16 --data.train URI --data.test URI --run.storage URI

    Expected time and result: not run.
    """
    return _in1k_variant("ijepa_vits16", encoder="vit_s", patch_size=16, epochs=300, workers=8)


@recipe
def ijepa_vitb16() -> PretrainConfig:
    """The paper's ViT-B/16: 600 epochs of ImageNet-1k.

    python -m pipelines.pretrain ijepa_vitb16 --data.train URI --data.test URI --run.storage URI

    The paper reports 72.9% by linear probe. Here: not run.
    """
    return _in1k_variant("ijepa_vitb16", encoder="vit_b", patch_size=16, epochs=600, workers=8)


@recipe
def ijepa_vitl16() -> PretrainConfig:
    """The paper's ViT-L/16: 600 epochs of ImageNet-1k.

    python -m pipelines.pretrain ijepa_vitl16 --data.train URI --data.test URI --run.storage URI

    The paper reports 77.5% by linear probe. Here: not run.
    """
    return _in1k_variant("ijepa_vitl16", encoder="vit_l", patch_size=16, epochs=600, workers=16)


@recipe
def ijepa_vith14_in1k() -> PretrainConfig:
    """The paper's ViT-H/14: 300 epochs of ImageNet-1k, batch size 2,048 (Assran et al. 2023, A.1).

    python -m pipelines.pretrain ijepa_vith14_in1k --data.train s3://BUCKET/in1k/train \\
        --data.test s3://BUCKET/in1k/val --run.storage s3://BUCKET/runs

    The paper reports less than 72 h on 16 A100 and 79.3% by linear probe. Here: not run.
    """
    return PretrainConfig(
        data=DataConfig(batch_size=2048, lanes=64, shuffle_window=256, decode_threads=8),
        model=ModelConfig(encoder="vit_h", image_size=224, patch_size=14, fit="crop"),
        objective=ObjectiveConfig(ema=(0.996, 1.0)),
        optim=OptimConfig(
            lr=1e-3,
            start_lr=2e-4,
            final_lr=1e-6,
            warmup_steps=40 * IN1K_STEPS_PER_EPOCH,
            weight_decay=0.04,
            final_weight_decay=0.4,
        ),
        run=RunConfig(
            name="ijepa_vith14_in1k",
            steps=300 * IN1K_STEPS_PER_EPOCH,
            workers=16,
            gpu=True,
            cpus_per_worker=4.0,
            precision="bf16",
            compile=True,
            log_every=50,
            probe_every=5 * IN1K_STEPS_PER_EPOCH,
            checkpoint_every=IN1K_STEPS_PER_EPOCH,
            keep_checkpoints=3,
        ),
    )


@recipe
def ijepa_vith16_448() -> PretrainConfig:
    """The paper's ViT-H/16 at 448 pixels: 300 epochs of ImageNet-1k.

    python -m pipelines.pretrain ijepa_vith16_448 --data.train URI --data.test URI --run.storage URI

    The paper reports 81.1% by linear probe. Here: not run.
    """
    base = _in1k_variant("ijepa_vith16_448", encoder="vit_h", patch_size=16, epochs=300, workers=32)
    return replace(
        base,
        model=replace(base.model, image_size=448),
        run=replace(base.run, accumulate=2),
    )


@recipe
def ijepa_vitg16_in22k() -> PretrainConfig:
    """The paper's ViT-g/16: 44 epochs of ImageNet-22k (14.2M images, 6,933 steps an epoch).

    python -m pipelines.pretrain ijepa_vitg16_in22k --data.train URI --data.test URI \\
        --run.storage URI

    Expected time and result: not run.
    """
    base = ijepa_vith14_in1k()
    steps_per_epoch = 6933
    return replace(
        base,
        model=replace(base.model, encoder="vit_g", patch_size=16),
        optim=replace(base.optim, warmup_steps=3 * steps_per_epoch),
        run=replace(
            base.run,
            name="ijepa_vitg16_in22k",
            steps=44 * steps_per_epoch,
            workers=64,
            probe_every=5000,
            checkpoint_every=1000,
        ),
    )


def _in1k_variant(
    name: str, *, encoder: str, patch_size: int, epochs: int, workers: int
) -> PretrainConfig:
    base = ijepa_vith14_in1k()
    return replace(
        base,
        model=replace(base.model, encoder=encoder, patch_size=patch_size),
        run=replace(base.run, name=name, steps=epochs * IN1K_STEPS_PER_EPOCH, workers=workers),
    )
