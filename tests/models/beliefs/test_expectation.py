"""What is expected is what the objective is trained on, and surprise is its error made comparable.

Shape legend: B images or clips, T hidden tokens, D width, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from helpers.models.beliefs import (
    CLIPS,
    GREY,
    HALVES,
    IMAGES,
    mask_of,
    objective,
    patches_of,
    random_pixels,
)
from models.beliefs.expectation import Expectation, Surprise
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import normalize
from models.objectives.latent import TARGET_NORMS
from models.objectives.mae import MAE
from models.objectives.objective import WrappedObjective


class Wrapped(WrappedObjective):
    def forward(self, batch):
        return self.objective(batch)


def test_the_error_is_the_objectives_loss() -> None:
    built, pixels = objective(IMAGES), random_pixels(IMAGES, 5)
    mask = mask_of([0, 1, 4, 5, 8], [10, 11, 14])
    batch = {
        "images": pixels,
        "context_ids": mask.context_K.expand(5, -1),
        "target_ids": mask.hidden_T.expand(5, 1, -1),
    }
    found = Expectation.of(Wrapped(built))
    patches_BNP = patches_of(found, pixels)
    expected_BTD = found.expect(patches_BNP, mask)
    targets_BTD = found.targets(patches_BNP)[:, mask.hidden_T]
    with torch.no_grad():
        loss = built(batch).loss
    torch.testing.assert_close((expected_BTD - targets_BTD).square().mean(), loss)
    other = found.expect(patches_BNP.roll(1, 0), mask)
    assert not torch.allclose((other - targets_BTD).square().mean(), loss)


def test_a_run_that_predicts_means_expects_nothing_of_a_place() -> None:
    with pytest.raises(ValueError, match=r"--objective\.predict mean"):
        Expectation.of(Wrapped(objective(CLIPS, predict="mean")))


def test_what_is_hidden_cannot_leak_into_what_is_expected() -> None:
    found, pixels = Expectation.of(objective(CLIPS)), random_pixels(CLIPS, 2)
    changed = pixels.clone()
    changed[:, :, 2:] = 255 - changed[:, :, 2:]  # the second time step, which the first mask hides
    both = [found.expect(patches_of(found, one), HALVES[0]) for one in (pixels, changed)]
    assert torch.equal(*both)
    both = [found.targets(patches_of(found, one)) for one in (pixels, changed)]
    assert not torch.allclose(both[0][:, 4:], both[1][:, 4:], atol=1e-2)


@pytest.mark.parametrize("norm", ["batch", "local"])
def test_standardised_targets_are_the_batches_own(norm: str) -> None:
    built, pixels = objective(CLIPS, target_norm=norm), random_pixels(CLIPS, 6)
    found = Expectation.of(built)
    patches_BNP = patches_of(found, pixels)
    found.fit([patches_BNP[:4], patches_BNP[4:]])
    encoder = built.feature_encoder
    assert isinstance(encoder, VisionTransformer)
    with torch.no_grad():
        tokens_BND = encoder(normalize(pixels, GREY["mean"], GREY["std"]))
    torch.testing.assert_close(
        found.targets(patches_BNP), TARGET_NORMS[norm](tokens_BND), atol=1e-4, rtol=1e-4
    )


def test_an_objective_without_a_predictor_is_refused() -> None:
    from models.encoders.predictor import Predictor

    encoder = VisionTransformer(IMAGES)
    sizes = {"encoder_width": 48, "width": 24, "depth": 1, "heads": 2, "output_width": 192}
    decoder = Predictor(grid=IMAGES.grid, **sizes)
    with pytest.raises(ValueError, match="MAE has no predictor of hidden tokens"):
        Expectation.of(MAE(encoder, decoder, norm_pixels=True, **GREY))


def test_surprise_is_one_for_ordinary_samples_and_more_where_the_predictor_is_more_wrong() -> None:
    found = Expectation.of(objective(CLIPS))
    surprise = Surprise(found, HALVES)
    patches_BNP = patches_of(found, random_pixels(CLIPS, 8))
    surprise.calibrate([patches_BNP[:3], patches_BNP[3:]])
    errors_BN = surprise.errors(patches_BNP)
    naive_N = torch.zeros(8)
    for mask in HALVES:
        expected_BTD = found.expect(patches_BNP, mask)
        for t, n in enumerate(mask.hidden_T.tolist()):
            real_BD = found.targets(patches_BNP)[:, n]
            naive_N[n] += (expected_BTD[:, t] - real_BD).square().mean()
    torch.testing.assert_close(surprise.usual_N, naive_N)
    torch.testing.assert_close(surprise.whole(errors_BN).mean(), torch.tensor(1.0))
    torch.testing.assert_close(surprise.map(errors_BN).mean(0), torch.ones(8))
    worse_BN = errors_BN.clone()
    worse_BN[0, 5] *= 3
    step_BS = surprise.by_step(worse_BN) / surprise.by_step(errors_BN)
    assert step_BS[0, 0] == 1 < step_BS[0, 1]
    assert torch.equal(step_BS[1:], torch.ones(7, 2))


def test_a_token_that_no_mask_hides_has_no_surprise() -> None:
    found = Expectation.of(objective(CLIPS))
    surprise = Surprise(found, HALVES[:1])
    patches_BNP = patches_of(found, random_pixels(CLIPS, 4))
    surprise.calibrate([patches_BNP])
    map_BN = surprise.map(surprise.errors(patches_BNP))
    assert map_BN[:, :4].isnan().all()
    assert map_BN[:, 4:].isfinite().all()
    with pytest.raises(ValueError, match="no sample"):
        surprise.calibrate([])
