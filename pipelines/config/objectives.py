"""Settings of the objectives: one class each, registered under the names that it serves.

`ObjectiveConfig` joins all of them, because every objective has its flags under `--objective.` in
every run; an objective reads only the fields of its own class. To add one, write its class here and
add it to the bases of `ObjectiveConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pipelines.config.checks import require

Masks = Literal["blocks", "clip", "random", "disjoint", "none"]
Modality = Literal["image", "video"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the objectives' settings; each class checks its own fields and calls the next."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Registered:
    """What a run has to know of an objective before it loads any network."""

    settings: type[Settings]
    """Class that holds the fields which the objective reads."""
    masks: Masks
    """Masks that the loader draws for it (`pipelines.loading.masks.maskers.MASKERS`)."""
    modality: Modality
    """What it learns from, which the shards must hold."""
    actions: bool = False
    """Whether it is a world model: it also reads what was done between the frames of a clip. It
    encodes every frame by itself, so the length of its clips is `window` and not `model.frames`."""


REGISTERED: dict[str, Registered] = {}
"""Objectives by name, entered by `objective`."""

C = TypeVar("C", bound=type[Settings])


def objective(
    name: str, *, masks: Masks, modality: Modality = "image", actions: bool = False
) -> Callable[[C], C]:
    """Registers a class of settings under the name of an objective that reads it."""

    def enter(settings: C) -> C:
        REGISTERED[name] = Registered(
            settings=settings, masks=masks, modality=modality, actions=actions
        )
        return settings

    return enter


def find_registered(name: str) -> Registered:
    """Returns what is registered under a name.

    Raises:
        ValueError: nothing is; the message lists the names.
    """
    if name not in REGISTERED:
        raise ValueError(f"--objective.name: no {name!r}; one of {', '.join(REGISTERED)}")
    return REGISTERED[name]


@objective("ijepa", masks="blocks")
@objective("vjepa", masks="clip", modality="video")
@objective("dmjd", masks="disjoint")
@dataclass(frozen=True, kw_only=True)
class LatentPredictionConfig(Settings):
    """Settings of the objectives that predict the features of a target encoder."""

    loss: Literal["smooth_l1", "l2", "l1"] = "smooth_l1"
    """Distance between predicted and target features (I-JEPA's code: smooth_l1; its paper: l2)."""
    ema: tuple[float, float] = (0.996, 1.0)
    """Momentum of the target encoder at the first and at the last step, linear between."""
    target: Literal["ema", "self"] = "ema"
    """`ema` is the method. `self` is the negative control: the context encoder is its own target,
    gradients flow through both, and the features must collapse."""
    target_norm: Literal["token", "batch", "local"] = "token"
    """`token` layer-normalises every target token, as I-JEPA and V-JEPA do. `batch` then subtracts
    its mean over the batch at the same place of the grid and divides every dimension by its
    deviation, so that what is the same in all samples, as a fixed background is, does not count.
    data2vec (arXiv 2202.03555) too normalises targets against collapse, over the tokens of one
    sample. `local` does both: it first takes the mean of the sample's tokens away, so that what all
    of them say does not count either, and where things are has to be predicted."""
    predict: Literal["tokens", "mean"] = "tokens"
    """What is predicted of the hidden tokens of a block: `tokens` every one of them, as in I-JEPA
    and V-JEPA; `mean` their mean, which probes of the mean gain from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.0 <= self.ema[0] <= self.ema[1] <= 1.0, "objective.ema", "0 <= start <= end <= 1")
        require(
            self.predict == "tokens" or self.target_norm != "local",
            "objective.predict",
            "mean: --objective.target-norm local takes the mean away; use batch or token",
        )


@dataclass(frozen=True, kw_only=True)
class SIGRegConfig(Settings):
    """Settings of the statistic SIGReg, for lejepa, levjepa and the regularizer."""

    slices: int = 1024
    """Number of random directions that SIGReg projects on, drawn anew in every step."""
    knots: int = 17
    """Number of points of SIGReg's integral."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.slices > 0, "objective.slices", "must be positive")
        require(self.knots >= 2, "objective.knots", "must be at least 2")


@dataclass(frozen=True, kw_only=True)
class JointEmbeddingConfig(Settings):
    """Settings that lejepa, levjepa and vicreg share."""

    projector: tuple[int, ...] = (2048, 2048, 128)
    """Widths of the MLP on top of the encoder, for lejepa, levjepa and vicreg; it is dropped after
    training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = len(self.projector) > 0 and min(self.projector) > 0
        require(ok, "objective.projector", "needs positive widths")


@objective("lejepa", masks="none")
@objective("levjepa", masks="none", modality="video")
@dataclass(frozen=True, kw_only=True)
class LeJEPAConfig(JointEmbeddingConfig, SIGRegConfig):
    """Settings of LeJEPA and LeVJEPA."""

    sigreg_weight: float = 0.02
    """lejepa, levjepa: weight of SIGReg in the loss; the agreement of the views has the rest of 1.
    With 0 the embeddings must collapse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.sigreg_weight <= 1, "objective.sigreg-weight", "must lie in [0, 1]")


@objective("vicreg", masks="none")
@dataclass(frozen=True, kw_only=True)
class VICRegConfig(JointEmbeddingConfig):
    """Settings of VICReg."""

    vicreg_weights: tuple[float, float, float] = (25.0, 25.0, 1.0)
    """vicreg: weights of invariance, variance and covariance. Without the last two the embeddings
    must collapse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(min(self.vicreg_weights) >= 0, "objective.vicreg-weights", "must be >= 0")


@objective("mae", masks="random")
@objective("videomae", masks="clip", modality="video")
@dataclass(frozen=True, kw_only=True)
class MAEConfig(Settings):
    """Settings of the masked autoencoders."""

    norm_pixels: bool = True
    """mae, videomae: reconstruct each patch after subtracting its mean and dividing by its standard
    deviation. In flat patches this amplifies noise."""


@objective("worldmodel", masks="none", modality="video", actions=True)
@dataclass(frozen=True, kw_only=True)
class WorldModelConfig(SIGRegConfig):
    """Settings of the world model (docs/planning.md)."""

    perception: Literal["keypoints", "conv", "vit"] = "keypoints"
    """worldmodel: what encodes a frame. `keypoints` is a small convolutional network that says
    where things are, which suits worlds of moving points. `conv` is another one, for views in which
    everything moves. `vit` is the encoder of --model.encoder, and the only one that can be
    exported."""
    predictor: Literal["pooled", "block_causal"] = "pooled"
    """worldmodel: what predicts. `pooled` has one latent a frame, which actions change.
    `block_causal` is a transformer over the patches of all frames so far, as in V-JEPA 2-AC."""
    window: int = 9
    """worldmodel: frames of a clip. The model imagines all of them from the first, and must agree
    with what it sees."""
    history: int = 1
    """worldmodel: frames that a state is made of, for `pooled`: one does not say how fast things
    move."""
    recurrent_width: int = 0
    """worldmodel: width of the state of a recurrent network over the last `history` frames, for
    `pooled`. It stands beside the newest latent, in the place of the older ones. 0 for none."""
    rollout_steps: int = 2
    """worldmodel: steps that are imagined in training from the model's own predictions, for
    `block_causal` and recurrent states; else all of the window's are."""
    action_width: int = 2
    """worldmodel: numbers that describe what was done between two frames of a clip: those of one
    frame's action, times --clip.stride."""
    latent_width: int = 32
    """worldmodel: dimensions of the latent state."""
    dynamics_width: int = 64
    """worldmodel: width of the predictor of the next latent."""
    dynamics_depth: int = 2
    """worldmodel: number of its blocks."""
    ensemble: int = 1
    """worldmodel: number of predictors, whose disagreement says how sure the model is."""
    isotropy_weight: float = 0.0
    """worldmodel: weight of SIGReg of the latents. LeWM (arXiv 2603.19312) has this alone."""
    variance_weight: float = 16.0
    """worldmodel: weight of VICReg's variance of the latents."""
    covariance_weight: float = 8.0
    """worldmodel: weight of VICReg's covariance of the latents."""
    smoothness_weight: float = 60.0
    """worldmodel: weight of the change of the latents from frame to frame."""
    inverse_weight: float = 1.0
    """worldmodel: weight of telling the action from the latents before and after it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 2, "objective.window", "must be at least 2 frames")
        for name in ("action", "latent", "dynamics"):
            width = getattr(self, f"{name}_width")
            require(width > 0, f"objective.{name}-width", "must be positive")
        require(
            self.perception != "keypoints" or self.latent_width % 2 == 0,
            "objective.latent-width",
            f"keypoints have two coordinates each, so it must be even, got {self.latent_width}",
        )
        self._check_predictor()
        require(self.dynamics_depth > 0, "objective.dynamics-depth", "must be positive")
        require(self.ensemble > 0, "objective.ensemble", "must be positive")
        for name in ("isotropy", "variance", "covariance", "smoothness", "inverse"):
            weight = getattr(self, f"{name}_weight")
            require(weight >= 0, f"objective.{name}-weight", "must be >= 0")

    def _check_predictor(self) -> None:
        require(
            1 <= self.history < self.window,
            "objective.history",
            f"must be positive and below --objective.window ({self.window}), got {self.history}",
        )
        require(self.rollout_steps > 0, "objective.rollout-steps", "must be positive")
        require(self.recurrent_width >= 0, "objective.recurrent-width", "must be >= 0")
        require(
            self.rollout_steps < self.window or not self._takes_rollout_steps,
            "objective.rollout-steps",
            f"must be below --objective.window ({self.window}), got {self.rollout_steps}",
        )
        require(
            self.history > 1 or not self.recurrent_width,
            "objective.recurrent-width",
            "needs frames to run over: set --objective.history to more than 1",
        )
        if self.predictor == "block_causal":
            self._check_block_causal()

    @property
    def _takes_rollout_steps(self) -> bool:
        return self.predictor == "block_causal" or self.recurrent_width > 0

    def _check_block_causal(self) -> None:
        require(
            self.perception != "keypoints",
            "objective.predictor",
            "block_causal needs patches: use --objective.perception conv or vit",
        )
        require(
            self.history == 1, "objective.history", "is for `pooled`: block_causal sees all frames"
        )
        require(
            self.dynamics_width % 32 == 0,
            "objective.dynamics-width",
            f"block_causal needs a multiple of 32, got {self.dynamics_width}",
        )


@dataclass(frozen=True, kw_only=True)
class RegularizerConfig(SIGRegConfig):
    """Settings of SIGReg as an addition to any objective."""

    regularize: str | None = None
    """Adds SIGReg of this monitored tensor to the loss of any objective: context_pooled, embedded
    or, where it has a gradient, target_pooled."""
    regularizer_weight: float = 0.02
    """Weight of that addition."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.regularizer_weight >= 0, "objective.regularizer-weight", "must be >= 0")


@dataclass(frozen=True, kw_only=True)
class NameConfig(Settings):
    """The choice of the objective."""

    name: str = "ijepa"
    """Name of the objective. An unknown name is refused with the list of all."""


# Python collects the fields of bases from right to left.
@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(
    WorldModelConfig,
    RegularizerConfig,
    MAEConfig,
    VICRegConfig,
    LeJEPAConfig,
    LatentPredictionConfig,
    NameConfig,
):
    """What is learned: the objective's name, and the settings of all objectives."""

    @property
    def registered(self) -> Registered:
        """What is registered under `name`. Raises a ValueError if nothing is."""
        return find_registered(self.name)

    @property
    def own(self) -> dict[str, Any]:
        """The fields that the chosen objective and the regularizer read."""
        classes = (self.registered.settings, RegularizerConfig)
        names = [field.name for cls in classes for field in dataclasses.fields(cls)]
        return {name: getattr(self, name) for name in names}
