"""The recipe of `pipelines.adapt`: a finished run goes on with footage of another kind."""

from __future__ import annotations

from dataclasses import replace

from pipelines.config.data import DataConfig
from pipelines.config.jobs import AdaptConfig
from pipelines.config.train import AnchorConfig, PretrainConfig

ANCHOR = 1.0
"""Weight of the anchor to the old encoder's features of old footage."""
WARMUP = 0.05
"""Share of the steps in which the rate rises from zero. The optimizer starts without its moments,
so its first steps are as uncertain as those of a new run."""


def adapted(old: PretrainConfig, checkpoint: str, storage: str, cfg: AdaptConfig) -> PretrainConfig:
    """Returns the run that continues `old` on new footage, which `data.train` still has to name.

    Model, objective, masks and crops are those of the old run. All weights are taken over: encoder,
    target encoder, predictor and projector. The rate is warmed up again and decays again, and old
    footage is mixed in, as Ibrahim et al. (2024, arXiv 2403.08763) found best for continued
    pretraining. The anchor holds the features of old footage where the old encoder has them, and
    the weight decay stays where the old run ended. Online probes are left out, because
    they need labels of the footage that is trained on.

    Args:
        old: the finished run's configuration.
        checkpoint: its checkpoint, whose weights are the beginning.
        storage: where the new run's folder is made.
        cfg: the recipe's settings.
    """
    steps = max(1, round(cfg.length * old.run.steps))
    return replace(
        old,
        data=_mixed(old.data, cfg),
        model=replace(old.model, fit=old.model.chosen_fit),
        optim=replace(
            old.optim,
            lr=cfg.rate * old.optim.lr,
            start_lr=0.0,
            final_lr=cfg.rate * min(old.optim.final_lr, old.optim.lr),
            warmup_steps=round(WARMUP * steps),
            weight_decay=old.optim.final_weight_decay,
        ),
        anchor=AnchorConfig(
            checkpoint=checkpoint, weight=ANCHOR if cfg.mix.old and _can_anchor(old) else 0.0
        ),
        run=replace(
            old.run,
            name=f"{old.run.name}-adapted",
            storage=storage,
            steps=steps,
            stop_after=None,
            probe_every=0,
            resume_from=None,
            take_over=False,
            init_from=checkpoint,
        ),
    )


def _can_anchor(old: PretrainConfig) -> bool:
    """Whether the anchor goes with the old run's settings, as `PretrainConfig` requires."""
    parts = (n * old.run.accumulate for n in old.group_sizes)
    whole = any(old.data.lanes % part == 0 for part in parts)
    return whole and (old.masks != "none" or not old.model.exclude)


def _mixed(old: DataConfig, cfg: AdaptConfig) -> DataConfig:
    """Returns the data settings, in which `train` is left for the new footage.

    The old run's sets keep their proportions among one another.
    """
    base = replace(old, train="", test="", mix=(), mix_shares=(), published=())
    if not cfg.mix.old:
        return base
    if cfg.mix.data is not None:
        return replace(base, mix=(cfg.mix.data,), mix_shares=(cfg.mix.old,))
    shares = (1 - sum(old.mix_shares), *old.mix_shares)
    return replace(
        base,
        mix=(old.train, *old.mix),
        mix_shares=tuple(cfg.mix.old * share for share in shares),
        published=(0, *old.published) if old.published else (),
    )
