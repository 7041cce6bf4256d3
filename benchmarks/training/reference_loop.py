"""The training loop of research code, written plainly; `step.py` compares with it.

Eager attention that materialises its scores, the whole image patch-embedded before tokens are
gathered, an int64 index repeated over the width, an EMA and an optimizer that walk the tensors one
by one, one host sync a weight matrix for logging, masks drawn image by image in a collator and cut
to the shortest. Same weights and names as `models.encoders.vit`, so that losses can be compared.

Shape legend: B images, N patches, K context tokens, M blocks, T tokens of a block, D width.
"""

import copy
import random

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q @ k.transpose(-2, -1)) * (D // self.heads) ** -0.5
        out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def pick(x_BND: Tensor, masks: list[Tensor]) -> Tensor:
    """Gathers every mask's tokens, masks along the batch."""
    return torch.cat(
        [x_BND.gather(1, m.unsqueeze(-1).repeat(1, 1, x_BND.shape[-1])) for m in masks]
    )


class Encoder(nn.Module):
    def __init__(
        self, grid: int, patch: int, width: int, depth: int, heads: int, ratio: float
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, width), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads, ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        if masks is not None:
            x = pick(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    def __init__(self, grid: int, encoder_width: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, width), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads, 4.0) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, encoder_width)

    def forward(self, x: Tensor, context: list[Tensor], targets: list[Tensor]) -> Tensor:
        B, K = context[0].shape
        positions = self.pos_embed.repeat(B, 1, 1)
        x = self.embed(x) + pick(positions, context)
        queries = pick(positions, targets) + self.mask_token
        x = torch.cat([x.repeat(len(targets), 1, 1), queries], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x)[:, K:])


class ReferenceLoop:
    """The step of the plain loop, on its own copies of an objective's weights."""

    def __init__(self, encoder: Encoder, predictor: Predictor, lr: float, decay: float) -> None:
        self.encoder, self.predictor = encoder, predictor
        self.target = copy.deepcopy(encoder).requires_grad_(False)
        trained = [*encoder.named_parameters(), *predictor.named_parameters()]
        groups = [
            {"params": [p for n, p in trained if p.requires_grad and p.ndim > 1]},
            {
                "params": [p for n, p in trained if p.requires_grad and p.ndim == 1],
                "weight_decay": 0,
            },
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=decay)

    def step(
        self, images: Tensor, context: Tensor, targets: Tensor, momentum: float, bf16: bool
    ) -> float:
        context_masks = [context]
        target_masks = list(targets.unbind(1))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                full = self.target(images)
                full = functional.layer_norm(full, (full.shape[-1],), eps=1e-6)
                wanted = pick(full, target_masks)
            z = self.encoder(images, context_masks)
            z = self.predictor(z, context_masks, target_masks)
            loss = functional.smooth_l1_loss(z, wanted)
        loss.backward()
        self.optimizer.step()
        self.log_gradients()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for q, k in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
                k.data.mul_(momentum).add_((1.0 - momentum) * q.detach().data)
        return float(loss)

    def log_gradients(self) -> list[float]:
        """One norm, and one sync, a weight matrix."""
        parameters = [*self.encoder.named_parameters(), *self.predictor.named_parameters()]
        return [float(p.grad.norm()) for n, p in parameters if p.grad is not None and p.ndim > 1]


def collate_masks(size: int, grid: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Multi-block masks, image by image with tensors, cut to the batch's shortest."""

    def block(scale: float, ratio: float) -> tuple[int, int]:
        area = int(grid * grid * scale)
        h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        return min(h, grid - 1), min(w, grid - 1)

    r = rng.random()
    target_size = block(0.15 + 0.05 * r, 0.75 + 0.75 * r)
    context_size = block(0.85 + 0.15 * rng.random(), 1.0)
    contexts, targets = [], []
    while len(contexts) < size:
        keep = torch.ones(grid, grid, dtype=torch.int32)
        blocks = []
        for _ in range(4):
            mask = torch.zeros(grid, grid, dtype=torch.int32)
            top = rng.randrange(grid - target_size[0])
            left = rng.randrange(grid - target_size[1])
            mask[top : top + target_size[0], left : left + target_size[1]] = 1
            keep = keep * (1 - mask)
            blocks.append(mask.flatten().nonzero().squeeze(1))
        seen = torch.zeros(grid, grid, dtype=torch.int32)
        top = rng.randrange(grid - context_size[0])
        left = rng.randrange(grid - context_size[1])
        seen[top : top + context_size[0], left : left + context_size[1]] = 1
        context = (seen * keep).flatten().nonzero().squeeze(1)
        if len(context) > 10:
            contexts.append(context)
            targets.append(blocks)
    shortest = min(len(c) for c in contexts)
    return (
        torch.stack([c[:shortest] for c in contexts]),
        torch.stack([torch.stack(b) for b in targets]),
    )
