"""The optimizers of hyperoptim_lr.py; each takes one initial rate as its documentation says."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.hyperoptim.optimizer import HyperAdamW
from models.hyperoptim.tuner import Tuner

CEILING, FLOOR = 3e-2, 1e-7
"""No sensible Adam run takes a larger (or smaller) rate; ours is told so."""
DECAY, WARMUP, HYPER_LR = 0.01, 0.1, 0.1


class Method:
    """A network under an optimizer: `step` takes a batch and returns its loss before the update."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.network, self.optimizer, self.steps = network, optimizer, steps

    def step(self, x: Tensor, y: Tensor) -> float:
        loss = nn.functional.cross_entropy(self.network(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def predict(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(x)

    def rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])


class Fixed(Method):
    def __init__(self, network: nn.Module, rate: float, steps: int) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=DECAY, fused=True)
        super().__init__(network, optimizer, steps)


class Scheduled(Fixed):
    """The rate is the peak of a linear warm-up and a cosine to 0."""

    def __init__(self, network: nn.Module, rate: float, steps: int) -> None:
        super().__init__(network, rate, steps)
        warmup = int(WARMUP * steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _warmup_cosine(step, warmup, steps)
        )

    def step(self, x: Tensor, y: Tensor) -> float:
        loss = super().step(x, y)
        self.schedule.step()
        return loss


class Ours(Method):
    def __init__(self, network: nn.Module, rate: float, steps: int) -> None:
        tuner = Tuner(lr=HYPER_LR, bounds=(FLOOR / rate, CEILING / rate))
        optimizer = HyperAdamW(network.parameters(), lr=rate, weight_decay=DECAY, tuner=tuner)
        super().__init__(network, optimizer, steps)

    def rate(self) -> float:
        assert isinstance(self.optimizer, HyperAdamW)
        return self.optimizer.hyperparameters()[0]["lr"]


class OursAnnealed(Ours):
    """Tunes for three quarters of the run; then a cosine takes the rate to 0."""

    def __init__(self, network: nn.Module, rate: float, steps: int) -> None:
        super().__init__(network, rate, steps)
        self.first, self.taken = rate, 0

    def step(self, x: Tensor, y: Tensor) -> float:
        start = int(0.75 * self.steps)
        self.optimizer.tuning = self.taken < start  # type: ignore[attr-defined]
        share = _warmup_cosine(max(0, self.taken - start), 0, self.steps - start)
        self.optimizer.param_groups[0]["lr"] = self.first * share
        self.taken += 1
        return super().step(x, y)


class ScheduleFree(Method):
    def __init__(self, network: nn.Module, rate: float, steps: int) -> None:
        import schedulefree

        optimizer = schedulefree.AdamWScheduleFree(
            network.parameters(), lr=rate, weight_decay=DECAY, warmup_steps=int(WARMUP * steps)
        )
        super().__init__(network, optimizer, steps)
        self.optimizer.train()  # type: ignore[attr-defined]

    def predict(self, x: Tensor) -> Tensor:
        self.optimizer.eval()  # type: ignore[attr-defined]
        found = super().predict(x)
        self.optimizer.train()  # type: ignore[attr-defined]
        return found


class Prodigy(Method):
    def __init__(self, network: nn.Module, rate: float, steps: int) -> None:
        import prodigyopt

        optimizer = prodigyopt.Prodigy(network.parameters(), lr=1.0, d0=rate, weight_decay=DECAY)
        super().__init__(network, optimizer, steps)

    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["d"])


class Gdtuo(Method):
    """Its README's stack: Adam, whose alpha and betas an SGD of rate 1e-5 moves."""

    def __init__(self, network: nn.Module, rate: float, steps: int) -> None:
        from gradient_descent_the_ultimate_optimizer import gdtuo

        self.wrapped = gdtuo.ModuleWrapper(
            network, optimizer=gdtuo.Adam(rate, optimizer=gdtuo.SGD(1e-5))
        )
        self.wrapped.initialize()
        self.network = network

    def step(self, x: Tensor, y: Tensor) -> float:
        self.wrapped.begin()
        loss = nn.functional.cross_entropy(self.wrapped.forward(x), y)
        self.wrapped.zero_grad()
        loss.backward(create_graph=True)
        self.wrapped.step()
        return loss.item()

    def rate(self) -> float:
        return float(self.wrapped.optimizer.parameters["alpha"])


METHODS: dict[str, Callable[[nn.Module, float, int], Method]] = {
    "AdamW": Fixed,
    "AdamW, warm-up and cosine": Scheduled,
    "ours": Ours,
    "ours, annealed": OursAnnealed,
    "gdtuo Adam/SGD": Gdtuo,
    "Schedule-Free AdamW": ScheduleFree,
    "Prodigy (rate is d0)": Prodigy,
}


def _warmup_cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
