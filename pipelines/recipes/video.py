"""Recipes for video."""

from __future__ import annotations

from dataclasses import replace

from pipelines.config.data import ClipConfig, DataConfig, VideoMaskConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.optim import OptimConfig
from pipelines.config.run import RunConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.config.views import ViewsConfig
from pipelines.recipes.recipe import recipe


@recipe
def vjepa_movingmnist() -> PretrainConfig:
    """V-JEPA on moving digits, small enough for two CPU cores.

    python -m pipelines.pretrain vjepa_movingmnist --data.train SHARDS --data.test TEST_SHARDS

    Ingest the output of `pipelines.fetch movingmnist` with --video.fps 10. Expected time and
    result: not run with these settings. No V-JEPA run with similar settings learned the direction
    of motion (docs/log.md, 2026-11-24); `vjepa_motion` learns its axis, `levjepa_movingmnist` all
    of it.
    """
    return PretrainConfig(
        data=DataConfig(batch_size=32, lanes=8, crop_scale=(0.5, 1.0), shuffle_window=256),
        clip=ClipConfig(stride=2),
        # Smaller blocks than V-JEPA's: on 4 x 4 patches, two of 70% would hide nearly everything.
        video_mask=VideoMaskConfig(blocks=(4, 2), scale=(0.2, 0.5)),
        model=ModelConfig(
            encoder="video_tiny",
            image_size=32,
            patch_size=8,
            frames=8,
            tubelet=2,
            mean=(0.08, 0.08, 0.08),
            std=(0.24, 0.24, 0.24),
            patch_std=0.14,
        ),
        objective=ObjectiveConfig(name="vjepa", loss="l1", ema=(0.99, 0.995)),
        optim=OptimConfig(
            lr=5e-4, start_lr=1e-4, final_lr=4e-4, warmup_steps=100, final_weight_decay=0.04
        ),
        run=RunConfig(
            name="vjepa_movingmnist",
            steps=3000,
            threads=1,
            log_every=50,
            probe_every=1000,
            checkpoint_every=1000,
        ),
    )


@recipe
def levjepa_gameplay() -> PretrainConfig:
    """LeVJEPA on recorded games: each view of a clip is a random quarter of its tokens.

    python -m pipelines.pretrain levjepa_gameplay --data.train SHARDS

    Ingest the output of `pipelines.fetch gameplay --side 64` with --video.fps 15
    --video.segment-seconds 2. Views are neither cropped nor cut in time, because things must be at
    the same place in both. It takes 14 minutes on two shared CPU cores. Averaged over seven tasks,
    accuracy is 55.0% by kNN (48.6% with random weights) and 62.1% by attentive probe (60.1% with
    random weights); see benchmarks/training/gameplay.md.
    """
    base = levjepa_movingmnist()
    return replace(
        base,
        data=replace(base.data, shuffle_window=64),
        clip=ClipConfig(fps=7.5),
        video_mask=VideoMaskConfig(),
        model=ModelConfig(
            encoder="video_tiny",
            image_size=64,
            patch_size=8,
            frames=4,
            tubelet=2,
            patch_std=0.14,
        ),
        views=replace(base.views, time_window=1.0, token_drop=0.75),
        optim=replace(
            base.optim,
            final_lr=3e-4,
            warmup_steps=60,
            weight_decay=0.04,
            final_weight_decay=0.04,
            clip_norm=10.0,
        ),
        run=replace(
            base.run, name="levjepa_gameplay", steps=1000, checkpoint_every=200, precision="bf16"
        ),
    )


@recipe
def levjepa_movingmnist() -> PretrainConfig:
    """LeVJEPA on moving digits: two stretches of a clip agree on how the digit moves.

    python -m pipelines.pretrain levjepa_movingmnist --data.train SHARDS --data.test TEST_SHARDS

    Ingest the output of `pipelines.fetch movingmnist` with --video.fps 10. The digit's position
    differs between the two stretches, but its class and velocity are the same. Views are not
    flipped, because that would reverse directions. It takes about 5 minutes on two CPU cores. A
    linear probe reads the direction with 99% accuracy, 64% with random weights
    (benchmarks/training/video_pretraining.md).
    """
    base = vjepa_movingmnist()
    return replace(
        base,
        data=replace(
            base.data, batch_size=64, lanes=16, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)
        ),
        model=replace(base.model, encoder="video_micro", positions="rope"),
        objective=ObjectiveConfig(
            name="levjepa", projector=(256, 128), sigreg_weight=0.02, slices=256
        ),
        views=ViewsConfig(
            global_scale=(1.0, 1.0),
            ratio=(1.0, 1.0),
            flip=0.0,
            colour=0.0,
            grey=0.0,
            time_window=0.5,
        ),
        optim=OptimConfig(
            lr=2e-3,
            start_lr=2e-4,
            final_lr=2e-4,
            warmup_steps=50,
            weight_decay=0.05,
            final_weight_decay=0.05,
        ),
        run=replace(
            base.run,
            name="levjepa_movingmnist",
            steps=800,
            probe_every=0,
            checkpoint_every=400,
        ),
    )


@recipe
def vjepa_gameplay() -> PretrainConfig:
    """V-JEPA on a recorded game: a quarter of a clip's patches tells what the rest says on average.

    python -m pipelines.pretrain vjepa_gameplay --data.train SHARDS

    Ingest the output of `pipelines.fetch gameplay --size 48x80 --games my_way_home` with
    --video.segment-seconds 2 --video.key-frame-every 1. What is predicted is the mean of the hidden
    tokens, compared over the batch; SIGReg keeps the mean of the visible ones spread out. It takes
    4 minutes or more of a CPU core. In Doom it reads places and the direction of view 9 to 13
    points better than random weights by ridge regression and 1 to 9 by kNN
    (benchmarks/training/vjepa.md); LeVJEPA reads them better.
    """
    base, games = vjepa_motion(), levjepa_gameplay()
    return replace(
        base,
        data=replace(base.data, batch_size=64, shuffle_window=games.data.shuffle_window),
        clip=games.clip,
        video_mask=VideoMaskConfig(kind="tube", tube_ratio=0.75),
        model=replace(
            games.model,
            encoder="video_micro",
            image_size=(48, 80),
            predictor_input="mean",
            predictor_width=96,
        ),
        objective=replace(base.objective, predict="mean", ema=(0.9, 0.99)),
        optim=games.optim,
        run=replace(
            games.run, name="vjepa_gameplay", steps=900, checkpoint_every=300, probe_every=0
        ),
    )


@recipe
def vjepa_motion() -> PretrainConfig:
    """V-JEPA on moving digits through a bottleneck: half of the frames tell the others.

    python -m pipelines.pretrain vjepa_motion --data.train SHARDS --data.test TEST_SHARDS

    Ingest the output of `pipelines.fetch movingmnist` with --video.fps 10. A token shows a patch of
    one frame, so that a single token tells nothing of motion. Two frames of four are hidden; the
    predictor reads only the mean of the visible tokens, targets are standardised at their place,
    and SIGReg keeps that mean spread out. A linear probe reads the direction with 34 to 36%
    accuracy, 17 to 19% with random weights. Where it was looked at, all of that was the axis and
    not the way along it; see benchmarks/training/vjepa.md.
    """
    base = vjepa_movingmnist()
    return replace(
        base,
        data=replace(base.data, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)),
        clip=ClipConfig(stride=4),
        video_mask=VideoMaskConfig(blocks=(1,), scale=(1.0,), temporal_scale=(0.5,)),
        model=replace(
            base.model,
            encoder="video_micro",
            frames=4,
            tubelet=1,
            init="fan_in",
            predictor_input="mean",
            predictor_width=96,
        ),
        objective=ObjectiveConfig(
            name="vjepa",
            loss="l2",
            ema=(0.99, 0.999),
            target_norm="batch",
            regularize="context_pooled",
            regularizer_weight=0.02,
            slices=256,
        ),
        optim=OptimConfig(
            lr=2e-3,
            start_lr=4e-5,
            final_lr=5e-4,
            warmup_steps=50,
            weight_decay=0.04,
            final_weight_decay=0.04,
        ),
        run=replace(base.run, name="vjepa_motion", steps=2500, probe_every=0, checkpoint_every=500),
    )


@recipe
def vjepa_occlusion() -> PretrainConfig:
    """V-JEPA on moving digits that are hidden for half of the time: where are they meanwhile?

    python -m pipelines.pretrain vjepa_occlusion --data.train SHARDS --data.test TEST_SHARDS

    Ingest the output of `pipelines.fetch movingmnist` with --video.fps 10. As `vjepa_motion`, but
    the predictor reads every visible token and not their mean, so that it can say where a digit is
    in the hidden frames. Targets lack what all tokens of a clip say, and positions are relative.
    What it expects in hidden frames, and how surprised it is: docs/beliefs.md.
    """
    base = vjepa_motion()
    return replace(
        base,
        model=replace(base.model, predictor_input="tokens", positions="rope"),
        objective=replace(base.objective, target_norm="local", regularize=None),
        run=replace(base.run, name="vjepa_occlusion"),
    )


@recipe
def vjepa_vitl16() -> PretrainConfig:
    """The paper's ViT-L/16: 90,000 steps of 3,072 clips (Bardes et al. 2024, appendix C).

    python -m pipelines.pretrain vjepa_vitl16 --data.train URI --run.storage URI

    Clips are 16 frames of 224 pixels at 7.5 frames/s, every fourth of 30. As in the released code,
    schedules are laid out for 112,500 steps and training stops after 90,000. There are two
    differences: gradients are clipped to norm 10 for encoder and predictor together rather than
    separately, and also during the warm-up. The paper reports 80.8% on Kinetics-400 and 69.5% on
    Something-Something v2 by attentive probe. Here: not run.
    """
    return PretrainConfig(
        data=DataConfig(
            batch_size=3072,
            lanes=128,
            shuffle_window=64,
            crop_scale=(0.3, 1.0),
            crop_ratio=(0.75, 1.35),
            flip=True,
            decode_threads=8,
        ),
        clip=ClipConfig(fps=7.5),
        model=ModelConfig(
            encoder="video_l", image_size=224, patch_size=16, frames=16, tubelet=2, fit="crop"
        ),
        objective=ObjectiveConfig(name="vjepa", loss="l1", ema=(0.998, 1.0)),
        optim=OptimConfig(
            lr=6.25e-4,
            start_lr=2e-4,
            final_lr=1e-6,
            warmup_steps=12_000,
            weight_decay=0.04,
            final_weight_decay=0.4,
            clip_norm=10.0,
        ),
        run=RunConfig(
            name="vjepa_vitl16",
            steps=112_500,
            stop_after=90_000,
            workers=128,
            gpu=True,
            cpus_per_worker=4.0,
            precision="bf16",
            compile=True,
            log_every=50,
            checkpoint_every=1000,
            keep_checkpoints=3,
        ),
    )


@recipe
def vjepa2_vitl16() -> PretrainConfig:
    """V-JEPA 2's ViT-L/16, first phase: 240,000 steps of 3,072 clips at constant rates.

    python -m pipelines.pretrain vjepa2_vitl16 --data.train URI --run.storage URI

    Clips are 16 frames of 256 pixels at 4 frames/s. Positions are rotary and gradients are not
    clipped, see Assran et al. 2025 (arXiv 2506.09985) and its released configuration. The second
    phase, 64 frames at higher resolution, is a run of its own with --run.init-from. Here: not run.
    """
    base = vjepa_vitl16()
    return replace(
        base,
        clip=ClipConfig(fps=4.0),
        model=replace(base.model, image_size=256, positions="rope", activation_checkpointing=True),
        objective=replace(base.objective, ema=(0.99925, 0.99925)),
        optim=OptimConfig(
            lr=5.25e-4,
            start_lr=1e-4,
            final_lr=5.25e-4,
            warmup_steps=12_000,
            weight_decay=0.04,
            final_weight_decay=0.04,
        ),
        run=replace(base.run, name="vjepa2_vitl16", steps=240_000, stop_after=None),
    )
