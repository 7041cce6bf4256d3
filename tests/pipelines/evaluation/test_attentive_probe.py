"""The attentive probe against one written out with PyTorch's own attention, and on made-up tokens.

B clips, T tokens, D width, P probes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipelines.evaluation.probes.attentive import attentive_probe
from pipelines.evaluation.probes.attentive_sweep import AttentiveProbes, _AdamW

D, HEADS, CLASSES, TOKENS = 24, 3, 4, 10


def written_out(probes: AttentiveProbes, p: int, tokens_BTD: torch.Tensor) -> torch.Tensor:
    """Probe `p`, every key and value computed, by torch's multi-head attention."""
    w = {name: value[p].detach() for name, value in probes.named_parameters()}
    norm = F.layer_norm(tokens_BTD, (D,), w["norm_tokens_weight"], w["norm_tokens_bias"], eps=1e-5)
    attention = nn.MultiheadAttention(D, HEADS, batch_first=True)
    with torch.no_grad():
        weights = [w[f"{name}_weight"].T for name in "qkv"]
        attention.in_proj_weight.copy_(torch.cat(weights))
        # Keys may have any bias: the softmax does not see it.
        attention.in_proj_bias.copy_(torch.cat([w["q_bias"], torch.randn(D), w["v_bias"]]))
        attention.out_proj.weight.copy_(torch.eye(D))
        attention.out_proj.bias.zero_()
        query = w["query"].expand(len(tokens_BTD), 1, D)
        x = query + attention(query, norm, norm)[0]
        hidden = F.layer_norm(x, (D,), w["norm_weight"], w["norm_bias"], eps=1e-5)
        hidden = F.gelu(hidden @ w["up_weight"] + w["up_bias"])
        x = x + hidden @ w["down_weight"] + w["down_bias"]
        return (x @ w["head_weight"] + w["head_bias"])[:, 0]


def test_all_probes_at_once_equal_each_written_out() -> None:
    torch.manual_seed(0)
    probes = AttentiveProbes(3, D, HEADS, CLASSES)
    with torch.no_grad():
        for weight in probes.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    tokens = torch.randn(5, TOKENS, D)
    logits_PBC = probes(tokens)
    assert logits_PBC.shape == (3, 5, CLASSES)
    for p in range(3):
        expected = written_out(probes, p, tokens)
        assert (logits_PBC[p] - expected).abs().max() < 1e-4
    assert (logits_PBC[0] - written_out(probes, 1, tokens)).abs().max() > 0.1  # the control


def test_a_token_that_is_nan_is_not_there() -> None:
    torch.manual_seed(0)
    probes = AttentiveProbes(2, D, HEADS, CLASSES)
    tokens = torch.randn(5, TOKENS, D)
    probes.standardise(tokens[:, :7])
    longer = torch.cat([tokens[:, :7], torch.full((5, 3, D), torch.nan)], 1)
    torch.testing.assert_close(probes(longer), probes(tokens[:, :7]))
    assert (probes.attention(longer)[..., 7:] == 0).all()
    again = AttentiveProbes(2, D, HEADS, CLASSES)
    again.standardise(longer)
    torch.testing.assert_close(again.scale_D, probes.scale_D)
    probes(longer).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in probes.parameters())


def test_every_probe_is_stepped_as_torchs_adamw_would() -> None:
    grid = [(1e-2, 0.1), (1e-3, 0.5)]
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(2, 7))
    single = [nn.Parameter(row.clone()) for row in weight.detach()]
    ours = _AdamW([weight], grid)
    theirs = [
        torch.optim.AdamW([p], lr=lr, weight_decay=decay)
        for p, (lr, decay) in zip(single, grid, strict=True)
    ]
    for step in range(4):
        gradient = torch.randn(2, 7) * (10 if step == 1 else 0.1)  # once above the clip
        weight.grad = gradient.clone()
        ours.step(1.0)
        for p, row, optimizer in zip(single, gradient, theirs, strict=True):
            p.grad = row.clone()
            nn.utils.clip_grad_norm_([p], 1.0)
            optimizer.step()
    assert (weight.detach() - torch.stack([p.detach() for p in single])).abs().max() < 1e-5


def made_up(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of noise, one of which carries the class; the mean of all tokens carries nothing."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    tokens = 0.3 * rng.standard_normal((count, TOKENS, D)).astype(np.float32)
    at = rng.integers(0, TOKENS, count)
    tokens[np.arange(count), at, labels] += 3
    tokens[np.arange(count), at, -1] += 3  # how the query finds it
    tokens[np.arange(count), (at + 1) % TOKENS] -= tokens[np.arange(count), at]  # and its opposite
    return tokens.astype(np.float16), labels


def test_it_finds_the_token_that_knows_and_chance_where_none_does() -> None:
    train, labels = made_up(600, 0)
    test, truth = made_up(200, 1)
    settings = {"heads": HEADS, "epochs": 12, "lrs": (3e-3, 1e-5), "weight_decays": (0.01,)}
    found = attentive_probe(train, labels, test, truth, **settings)
    assert found.accuracy > 0.9
    assert found.lr == 3e-3  # picked on the held-out part
    again = attentive_probe(train, labels, test, truth, **settings)
    assert found == again
    shuffled = np.random.default_rng(2).permutation(labels)
    control = attentive_probe(train, shuffled, test, truth, **settings)
    assert control.accuracy < 0.45


def test_labels_must_be_classes() -> None:
    tokens, labels = made_up(20, 0)
    with pytest.raises(ValueError, match="class indices"):
        attentive_probe(tokens, labels - 1, tokens, labels, heads=HEADS)
