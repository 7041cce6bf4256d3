"""A world model: latents of frames, and what actions do to them. Trained as an objective.

    z_t       = perception(frame_t)
    p_0       = z_0,   p_(t+1) = predictor(p_t, a_t)                    k steps from one frame
    loss      = mean |p_t - z_t|^2
                + isotropy * SIGReg(z_t)                       the two losses of LeWM (2603.19312)
                + variance * hinge + covariance * off-diagonal  VICReg's terms, as PLDM (2502.14819)
                + smoothness * mean |z_(t+1) - z_t|^2
                + inverse * mean |IDM(z_t, z_(t+1)) - a_t|^2

Gradients flow through both sides of the prediction. What keeps the latents from collapsing is one
of the regularisers; without any, the negative control, they do collapse. Statistics are taken over
the batch, step by step, and averaged over steps.

With E predictors in the ensemble each is trained on its own rollout, and their disagreement says
how far an imagined future can be trusted.

With a history, a state is the latents of the last h frames side by side, and clips are imagined
from their first h frames; or it is the newest latent and the state of a recurrent network over them
(`recurrent`), whose loss is `RecurrentPredictor`'s. Statistics are then taken over all frames of
the batch at once, because clips are long and few. With the predictor over patches (`block_causal`)
a frame has a latent of its own for every patch; the regularisers take patches as rows, and the
prediction's loss is that of `BlockCausalPredictor`.

Shape legend: B clips or rows, C = 3 channels, T frames, H and W pixels, N latents of a frame, L
latent width, D = N * L, h frames of history, Z = h * D, A action width, E predictors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from models.encoders.from_settings import Settings
from models.objectives.objective import Batch, Output, RegisteredObjective
from models.objectives.registry import register_objective
from models.objectives.sigreg import SIGReg, sigreg_from_settings
from models.objectives.vicreg import variance_and_covariance
from models.planning.world_model.block_causal import BlockCausalPredictor
from models.planning.world_model.perception import Perception, perception_from_settings
from models.planning.world_model.predictor import Dynamics, LatentPredictor
from models.planning.world_model.recurrent import RecurrentPredictor, RecurrentStates

ENCODED = 256
"""Frames of a walk that are encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of the regularisers beside the prediction."""

    isotropy: float = 0.0
    variance: float = 0.0
    covariance: float = 0.0
    smoothness: float = 0.0
    inverse: float = 0.0


@register_objective("worldmodel")
class WorldModel(RegisteredObjective):
    """Perception and predictors, trained together.

    Args:
        perception: encodes single frames.
        predictors: the ensemble.
        sigreg: computes the statistic of `weights.isotropy`.
        history: h, frames that a state is made of.
        recurrent: makes states of latents; None puts the last h latents side by side.
        actions: A.
        weights: of the regularisers.
        mean: channel means that are subtracted from the pixels, of values in [0, 1].
        std: channel standard deviations that the pixels are divided by.
    """

    def __init__(
        self,
        perception: Perception,
        predictors: list[Dynamics],
        sigreg: SIGReg,
        *,
        history: int = 1,
        recurrent: RecurrentStates | None = None,
        actions: int,
        weights: Weights,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.perception, self.predictors = perception, nn.ModuleList(predictors)
        self.history, self.recurrent = history, recurrent
        self.sigreg, self.weights, self.actions = sigreg, weights, actions
        width, seen = perception.width, 2 * perception.grid.tokens * perception.width
        self.inverse = nn.Sequential(
            nn.Linear(seen, 2 * width), nn.ReLU(), nn.Linear(2 * width, actions)
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_settings(cls, model: Settings, objective: Settings) -> Self:
        """See `RegisteredObjective.from_settings`."""
        perception = perception_from_settings(model, objective)
        return cls(
            perception,
            [_dynamics(perception, objective) for _ in range(objective["ensemble"])],
            sigreg_from_settings(objective),
            history=objective["history"],
            recurrent=_recurrent(perception, objective),
            actions=objective["action_width"],
            weights=Weights(**{name: objective[f"{name}_weight"] for name in vars(Weights())}),
            mean=model["mean"],
            std=model["std"],
        )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Clips, and the actions between their frames."""
        return ("clips", "actions")

    @property
    def feature_encoder(self) -> nn.Module:
        """The encoder of single frames."""
        return self.perception.backbone

    @property
    def regularizable(self) -> tuple[str, ...]:
        """The latents."""
        return ("latent",)

    @property
    def watched(self) -> dict[str, int]:
        """The latents."""
        return {"latent": self.perception.width}

    @property
    def frame_width(self) -> int:
        """D, the numbers of a frame's latents, which those of the newest frame end a state with."""
        return self.perception.grid.tokens * self.perception.width

    @property
    def told(self) -> int | None:
        """Last dimensions of a state that a single picture tells, the newest latents; None for all.

        They are not all where a recurrent network keeps what it saw before.
        """
        return None if self.recurrent is None else self.perception.width

    def forward(self, batch: Batch) -> Output:
        """Computes the loss of clips uint8 [B, C, T, H, W] and actions [B, T - 1, A].

        Actions are NaN where a clip has ended; these steps do not count.
        """
        clips_BCTHW, actions_BTA = batch["clips"], batch["actions"]
        latents = self._perceive(clips_BCTHW.transpose(1, 2).flatten(0, 1))
        latents_BTD = latents.view(len(clips_BCTHW), -1, latents.shape[-1])
        with torch.autocast(latents_BTD.device.type, enabled=False):
            latents_BTD = latents_BTD.float()
            loss, metrics = self.compare(latents_BTD, actions_BTA)
        return Output(loss, metrics, {"latent": latents_BTD.reshape(-1, self.perception.width)})

    def compare(self, latents_BTD: Tensor, actions_BTA: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of latents and the actions between them, and its parts, detached."""
        real_BT = ~actions_BTA.isnan().any(-1)
        actions_BTA = actions_BTA.nan_to_num()

        def over_steps(errors_BT: Tensor, first: int = 0) -> Tensor:
            """The mean over real steps, the first error being that of step number `first`."""
            counted_BT = real_BT[:, first : first + errors_BT.shape[1]]
            return (errors_BT * (counted_BT / counted_BT.sum().clamp(min=1))).sum()

        change_BTD = latents_BTD[:, 1:] - latents_BTD[:, :-1]
        pairs_BTX = torch.cat([latents_BTD[:, :-1], latents_BTD[:, 1:]], dim=-1)
        parts = {
            "smoothness": over_steps(change_BTD.square().mean(-1)),
            "inverse": over_steps((self.inverse(pairs_BTX) - actions_BTA).square().mean(-1)),
        }
        members = cast(Sequence[Dynamics], self.predictors)
        states_BSZ = self.states(latents_BTD)
        first = latents_BTD.shape[1] - states_BSZ.shape[1]
        errors = [one.errors(states_BSZ, actions_BTA[:, first:]) for one in members]
        for name in errors[0]:
            parts[name] = torch.stack([over_steps(one[name], first) for one in errors]).mean()
        width = self.perception.width
        steps = [latents_BTD] if self.recurrent else latents_BTD.unbind(1)
        rows = [step.reshape(-1, width) for step in steps]
        if self.weights.isotropy:
            parts["isotropy"] = torch.stack([self.sigreg(rows_ML) for rows_ML in rows]).mean()
        spread = [variance_and_covariance(rows_ML) for rows_ML in rows]
        for name, values in zip(("variance", "covariance"), zip(*spread, strict=True), strict=True):
            parts[name] = torch.stack(values).mean()
        weighted = {name: getattr(self.weights, name, 1.0) * part for name, part in parts.items()}
        return torch.stack([*weighted.values()]).sum(), {
            name: part.detach() for name, part in parts.items()
        }

    def states(self, latents_BTD: Tensor) -> Tensor:
        """Returns the states of clips, from the first frame on that has one, [B, S, Z].

        With a recurrent state that is the first frame, else number h.
        """
        if self.recurrent is not None:
            found_BTZ: Tensor = self.recurrent(latents_BTD)
            return found_BTZ
        return latents_BTD.unfold(1, self.history, 1).mT.flatten(2)

    def newest(self, states: Tensor) -> Tensor:
        """Returns the latents of each state's newest frame, [..., Z] to [..., D]."""
        return states[..., -self.frame_width :]

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Encodes what is seen as states [B, Z].

        Args:
            frames_BCHW: uint8 [B, h * 3, H, W], the last h frames one after the other, the newest
                last; or [B, 3, H, W], a frame in which nothing moves.
        """
        B, channels, H, W = frames_BCHW.shape
        latents = self._perceive(frames_BCHW.reshape(-1, 3, H, W))
        if self.recurrent is not None:
            return self.recurrent.last(latents.view(B, -1, latents.shape[-1]))
        states_BZ = latents.view(B, -1)
        return states_BZ.repeat(1, self.history) if channels == 3 else states_BZ

    def walk(self, frames_TCHW: Tensor) -> Tensor:
        """Returns the states at all frames of one walk, given those before each, [T, Z].

        It is what `encode` returns for each of them, for less: every frame is encoded once. A
        recurrent network sees all frames so far, also those further back than h.

        Args:
            frames_TCHW: uint8 [T, 3, H, W].
        """
        parts = torch.split(frames_TCHW, ENCODED)
        latents_TD = torch.cat([self._perceive(part_BCHW) for part_BCHW in parts])
        if self.recurrent is None:  # before the first frame nothing moved
            before_hD = latents_TD[:1].expand(self.history - 1, -1)
            latents_TD = torch.cat([before_hD, latents_TD])
        return self.states(latents_TD[None])[0]

    def rollout(self, states_BZ: Tensor, actions_BTA: Tensor) -> Tensor:
        """Imagines what T actions lead to, by each predictor of the ensemble, [E, B, T, Z]."""
        members = cast(Sequence[Dynamics], self.predictors)
        return torch.stack([one.rollout(states_BZ, actions_BTA) for one in members])

    def _perceive(self, frames_BCHW: Tensor) -> Tensor:
        """Returns the latents of single frames, uint8 [B, 3, H, W], as [B, D]."""
        pixels = (frames_BCHW.float() / 255 - self.mean) / self.std
        found: Tensor = self.perception(pixels)
        return found

    def after_step(self, step: int, total_steps: int) -> None:
        """Draws new slices for the next step."""
        self.sigreg.advance()


def _recurrent(perception: Perception, objective: Settings) -> RecurrentStates | None:
    width = objective.get("recurrent_width", 0)  # which agents of before do not have
    return RecurrentStates(perception.width, width) if width else None


def _dynamics(perception: Perception, objective: Settings) -> Dynamics:
    """Builds the predictor that `objective["predictor"]` names, with fresh weights."""
    actions, width = objective["action_width"], objective["dynamics_width"]
    depth = objective["dynamics_depth"]
    if objective["predictor"] == "block_causal":
        return BlockCausalPredictor(
            grid=perception.grid,
            latent=perception.width,
            actions=actions,
            width=width,
            depth=depth,
            context=objective["window"] - 1,
            steps=objective["rollout_steps"],
        )
    if recurrent := objective.get("recurrent_width", 0):
        return RecurrentPredictor(
            latent=perception.width,
            recurrent=recurrent,
            actions=actions,
            width=width,
            depth=depth,
            steps=objective["rollout_steps"],
        )
    return LatentPredictor(
        latent=perception.width,
        actions=actions,
        width=width,
        depth=depth,
        history=objective["history"],
    )
