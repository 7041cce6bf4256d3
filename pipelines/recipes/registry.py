"""Named complete runs. Each opens with its command, the time to expect and the result to expect.

A variant is a function that replaces fields of another. `python -m pipelines.pretrain RECIPE --help`
lists every field; recipes without a measured result say "not run".
"""

from __future__ import annotations

from pipelines.config.train import PretrainConfig
from pipelines.recipes.images import (
    cifar10_demo,
    cifar10_vits,
    debug,
    dmjd_cifar10_demo,
    ijepa_vitb16,
    ijepa_vitg16_in22k,
    ijepa_vith14_in1k,
    ijepa_vith16_448,
    ijepa_vitl16,
    ijepa_vits16,
    laptop,
    lejepa_cifar10_demo,
    mae_cifar10_demo,
    vicreg_cifar10_demo,
    vicreg_laptop,
)
from pipelines.recipes.video import (
    levjepa_gameplay,
    levjepa_movingmnist,
    vjepa2_vitl16,
    vjepa_gameplay,
    vjepa_movingmnist,
    vjepa_vitl16,
)

__all__ = [
    "RECIPES",
    "cifar10_demo",
    "cifar10_vits",
    "debug",
    "dmjd_cifar10_demo",
    "ijepa_vitb16",
    "ijepa_vitg16_in22k",
    "ijepa_vith14_in1k",
    "ijepa_vith16_448",
    "ijepa_vitl16",
    "ijepa_vits16",
    "laptop",
    "lejepa_cifar10_demo",
    "levjepa_gameplay",
    "levjepa_movingmnist",
    "mae_cifar10_demo",
    "vicreg_cifar10_demo",
    "vicreg_laptop",
    "vjepa2_vitl16",
    "vjepa_gameplay",
    "vjepa_movingmnist",
    "vjepa_vitl16",
]

RECIPES: dict[str, tuple[str, PretrainConfig]] = {
    recipe.__name__: ((recipe.__doc__ or "").partition("\n")[0], recipe())
    for recipe in (
        debug,
        cifar10_demo,
        lejepa_cifar10_demo,
        vicreg_cifar10_demo,
        mae_cifar10_demo,
        dmjd_cifar10_demo,
        vicreg_laptop,
        laptop,
        cifar10_vits,
        ijepa_vits16,
        ijepa_vitb16,
        ijepa_vitl16,
        ijepa_vith14_in1k,
        ijepa_vith16_448,
        ijepa_vitg16_in22k,
        vjepa_movingmnist,
        levjepa_gameplay,
        levjepa_movingmnist,
        vjepa_gameplay,
        vjepa_vitl16,
        vjepa2_vitl16,
    )
}
"""Name to (one line, configuration): the subcommands of `python -m pipelines.pretrain`."""
