"""Every objective has a class of settings, and `ObjectiveConfig` joins them."""

from __future__ import annotations

import pytest

from pipelines.config.objectives import REGISTERED, ObjectiveConfig, RegularizerConfig
from pipelines.config.train import PretrainConfig

ALWAYS = {"slices", "knots", "regularize", "regularizer_weight"}
WORLD_MODEL = {
    *("perception", "predictor", "window", "history", "rollout_steps", "ensemble"),
    "recurrent_width",
    *(f"{name}_width" for name in ("action", "latent", "dynamics")),
    "dynamics_depth",
    *(f"{n}_weight" for n in ("isotropy", "variance", "covariance", "smoothness", "inverse")),
}
OWN = {
    "worldmodel": WORLD_MODEL,
    "ijepa": {"loss", "ema", "target", "target_norm", "predict"},
    "vjepa": {"loss", "ema", "target", "target_norm", "predict"},
    "dmjd": {"loss", "ema", "target", "target_norm", "predict"},
    "mae": {"norm_pixels"},
    "videomae": {"norm_pixels"},
    "lejepa": {"projector", "sigreg_weight"},
    "levjepa": {"projector", "sigreg_weight"},
    "vicreg": {"projector", "vicreg_weights"},
}


@pytest.mark.parametrize("name", list(OWN))
def test_an_objective_is_given_its_own_settings_only(name: str) -> None:
    objective = ObjectiveConfig(name=name, projector=(8, 4))
    assert set(objective.own) == OWN[name] | ALWAYS
    assert objective.own.get("projector", (8, 4)) == (8, 4)


@pytest.mark.parametrize("name", list(REGISTERED))
def test_objective_config_has_the_fields_of_every_settings_class(name: str) -> None:
    assert issubclass(ObjectiveConfig, REGISTERED[name].settings)
    assert issubclass(ObjectiveConfig, RegularizerConfig)


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("ema", (0.9, 0.5), "ema"),
        ("projector", (), "projector"),
        ("sigreg_weight", 1.5, "sigreg-weight"),
        ("slices", 0, "slices"),
        ("knots", 1, "knots"),
        ("vicreg_weights", (1.0, -1.0, 0.0), "vicreg-weights"),
        ("window", 1, "window"),
        ("latent_width", 5, "latent-width"),
        ("ensemble", 0, "ensemble"),
        ("inverse_weight", -1.0, "inverse-weight"),
        ("regularizer_weight", -1.0, "regularizer-weight"),
    ],
)
def test_the_checks_of_all_classes_run_for_every_objective(
    field: str, value: object, flag: str
) -> None:
    with pytest.raises(ValueError, match=f"--objective.{flag}"):
        ObjectiveConfig(name="mae", **{field: value})  # type: ignore[arg-type]


def test_an_unknown_objective_is_refused_with_the_list_of_names() -> None:
    with pytest.raises(ValueError, match=r"--objective\.name: no 'nope'; one of .*ijepa"):
        PretrainConfig(objective=ObjectiveConfig(name="nope"))
