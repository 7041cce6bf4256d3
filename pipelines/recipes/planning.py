"""Recipes for world models."""

from __future__ import annotations

from dataclasses import replace

from pipelines.config.data import DataConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.optim import OptimConfig
from pipelines.config.run import RunConfig
from pipelines.config.train import ModelConfig, PretrainConfig, WatchConfig
from pipelines.recipes.recipe import recipe


@recipe
def worldmodel_tworooms() -> PretrainConfig:
    """A world model of Two-Rooms, which `pipelines.plan_episodes` then plans with.

    python -m pipelines.pretrain worldmodel_tworooms --data.train SHARDS

    Ingest the output of `pipelines.fetch tworooms` with --video.fps 10 --video.crf 8. What it
    reaches, and how long it takes, is in docs/planning.md.
    """
    return PretrainConfig(
        data=DataConfig(
            batch_size=32,
            lanes=8,
            crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
            shuffle_window=256,
        ),
        model=ModelConfig(
            encoder="vit_micro32",
            image_size=32,
            patch_size=8,
            mean=(0.05, 0.05, 0.1),
            std=(0.2, 0.2, 0.3),
            patch_std=0.14,
        ),
        objective=ObjectiveConfig(name="worldmodel"),
        optim=OptimConfig(
            lr=2e-3,
            start_lr=2e-5,
            final_lr=4e-5,
            warmup_steps=100,
            weight_decay=1e-5,
            final_weight_decay=1e-5,
            clip_norm=2.0,
        ),
        watch=WatchConfig(grace_steps=200),  # latents start close together
        run=RunConfig(
            name="worldmodel_tworooms",
            steps=1200,
            threads=1,
            log_every=50,
            checkpoint_every=300,
        ),
    )


@recipe
def worldmodel_tworooms_vit() -> PretrainConfig:
    """The same with a ViT as perception, which can be exported; its two losses are LeWM's.

    python -m pipelines.pretrain worldmodel_tworooms_vit --data.train SHARDS

    A quarter of its steps is what was run; docs/planning.md has the result.
    """
    base = worldmodel_tworooms()
    return replace(
        base,
        objective=replace(
            base.objective,
            perception="vit",
            isotropy_weight=0.09,
            variance_weight=0.0,
            covariance_weight=0.0,
            smoothness_weight=0.0,
            inverse_weight=0.0,
        ),
        run=replace(base.run, name="worldmodel_tworooms_vit"),
    )


@recipe
def worldmodel_doom() -> PretrainConfig:
    """A world model of the rooms of ViZDoom's `my_way_home`, seen by who walks there.

    python -m pipelines.pretrain worldmodel_doom --data.train SHARDS

    Ingest the output of `pipelines.fetch my_way_home` with --video.fps 10 --video.crf 8. What it
    reaches, and how long it takes, is in docs/planning_games.md.
    """
    base = worldmodel_tworooms()
    return replace(
        base,
        model=replace(
            base.model, image_size=(48, 64), mean=(0.25, 0.18, 0.17), std=(0.17, 0.16, 0.17)
        ),
        objective=replace(
            base.objective,
            perception="conv",
            action_width=7,
            latent_width=128,
            dynamics_width=256,
            smoothness_weight=12.0,
            inverse_weight=4.0,
        ),
        optim=replace(base.optim, lr=1e-3, start_lr=1e-5, final_lr=2e-5),
        run=replace(base.run, name="worldmodel_doom", steps=2000),
    )


@recipe
def worldmodel_doom_patches() -> PretrainConfig:
    """The same with the block-causal predictor over patches, after V-JEPA 2-AC.

    python -m pipelines.pretrain worldmodel_doom_patches --data.train SHARDS

    What it reaches, and how long it takes, is in docs/planning_games.md.
    """
    base = worldmodel_doom()
    return replace(
        base,
        data=replace(base.data, batch_size=16),
        objective=replace(
            base.objective,
            predictor="block_causal",
            window=5,
            latent_width=16,
            dynamics_width=64,
            dynamics_depth=3,
            variance_weight=4.0,
            covariance_weight=2.0,
            smoothness_weight=0.0,
            inverse_weight=2.0,
        ),
        run=replace(base.run, name="worldmodel_doom_patches"),
    )


@recipe
def worldmodel_breakout() -> PretrainConfig:
    """A world model of Atari's Breakout.

    python -m pipelines.pretrain worldmodel_breakout --data.train SHARDS

    Ingest the output of `pipelines.fetch breakout` with --video.fps 10 --video.crf 8. What it
    reaches, and how long it takes, is in docs/planning_games.md.
    """
    base = worldmodel_tworooms()
    return replace(
        base,
        data=replace(base.data, batch_size=16),
        model=replace(base.model, image_size=64, mean=(0.17, 0.15, 0.13), std=(0.26, 0.23, 0.21)),
        objective=replace(
            base.objective,
            history=2,
            action_width=5,
            dynamics_width=128,
            smoothness_weight=12.0,
        ),
        optim=replace(base.optim, lr=1e-3, start_lr=1e-5, final_lr=2e-5),
        run=replace(base.run, name="worldmodel_breakout", steps=1000),
    )
