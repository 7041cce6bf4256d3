"""A Llama-style decoder (Llama, Mistral, Qwen2, Qwen3) that reads and writes a sink cache.

Legend: B rows (sessions of a decode batch or tokens of a chunk), E hidden width, H heads,
D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sink_lm.network.attention import (
    ChunkAttention,
    DecodeAttention,
    DraftAttention,
    PackedAttention,
)
from models.sink_lm.network.cache import Slabs
from models.sink_lm.network.config import LMConfig
from models.sink_lm.network.decode_step import DecodeStep
from models.sink_lm.network.rope import attention_scale, frequencies


class Attend(Protocol):
    """Attention of B rows in one layer: takes queries, keys and values, returns [B, H * D]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        """Writes the keys and values, then attends."""


class Layer(nn.Module):
    """One pre-norm decoder layer: attention, then a gated MLP.

    Args:
        cfg: the decoder.
        index: its number, which is also its layer in the cache.
    """

    def __init__(self, cfg: LMConfig, index: int) -> None:
        super().__init__()
        self._index = index
        self._heads = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
        self._head_dim = cfg.head_dim
        rows = sum(self._heads) * cfg.head_dim
        self.attention_norm = nn.RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.qkv = nn.Linear(cfg.hidden_size, rows, bias=cfg.qkv_bias)
        self.q_norm = nn.RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.out = nn.Linear(cfg.num_heads * cfg.head_dim, cfg.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.gate_up = nn.Linear(cfg.hidden_size, 2 * cfg.intermediate_size, bias=False)
        self.down = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x_BE: Tensor, attend: Attend) -> Tensor:
        """Adds the layer's output to the residual stream [B, E]."""
        heads_BHD = self.qkv(self.attention_norm(x_BE)).unflatten(1, (-1, self._head_dim))
        q_BHD, k_BHD, v_BHD = heads_BHD.split(self._heads, dim=1)
        mixed = attend(self._index, self.q_norm(q_BHD), self.k_norm(k_BHD), v_BHD)
        x_BE = x_BE + self.out(mixed)
        gate, up = self.gate_up(self.mlp_norm(x_BE)).chunk(2, dim=-1)
        mlp_BE: Tensor = self.down(F.silu(gate) * up)
        return x_BE + mlp_BE


class Llama(nn.Module):
    """The decoder, with the initial weights of `torch.nn` until others are loaded.

    Args:
        cfg: its shape.

    Attributes:
        decode_step: what `decode` calls instead of the layers; None without own kernels.
    """

    def __init__(self, cfg: LMConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.decode_step: DecodeStep | None = None
        self.embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg, index) for index in range(cfg.num_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.head: nn.Module | None = None  # then it is the embedding
        if not cfg.tie_embeddings:
            self.head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self._scale = attention_scale(cfg.rope)
        self._frequencies_F: Tensor | None = None

    def slabs(self, *, sessions: int, capacity: int, beyond_training: bool = False) -> Slabs:
        """Returns cache memory in the type and on the device of the weights; see `Slabs`."""
        weight = self.embed.weight
        return Slabs(
            self.cfg,
            sessions=sessions,
            capacity=capacity,
            dtype=weight.dtype,
            device=weight.device,
            beyond_training=beyond_training,
        )

    @torch.inference_mode()
    def decode(self, tokens_B: Tensor, slabs: Slabs, slots: Sequence[int]) -> Tensor:
        """Feeds one token to each of B sessions.

        Args:
            tokens_B: int64 [B].
            slabs: the cache.
            slots: B different slab numbers; neighbouring ones are fastest.

        Returns:
            Logits of the next tokens, float32 (float64 for a float64 model) [B, V].

        Raises:
            ValueError: a slab is named twice.
        """
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots {list(slots)} name a session twice")
        if self.decode_step is not None:
            logits_BV = self.decode_step(tokens_B, slabs, slots)
        else:
            logits_BV = self._decode(tokens_B, slabs, slots)
        for slot in slots:
            slabs.advance(slot, 1)
        return logits_BV

    def _decode(self, tokens_B: Tensor, slabs: Slabs, slots: Sequence[int]) -> Tensor:
        order = sorted(range(len(slots)), key=slots.__getitem__)
        ascending = [slots[row] for row in order]
        attend = DecodeAttention(ascending, slabs, *self.rotary(tokens_B.device))
        order_B = torch.tensor(order, device=tokens_B.device)
        logits_BV = self.logits(self.run(tokens_B[order_B], attend))
        return logits_BV[order_B.argsort()] if ascending != list(slots) else logits_BV

    @torch.inference_mode()
    def prefill(
        self,
        tokens_T: Tensor,
        slabs: Slabs,
        slot: int,
        *,
        logits: Literal["last", "all", "none"] = "last",
    ) -> Tensor | None:
        """Feeds the next tokens of one session; equals `decode` of one token after the other.

        Work and scratch memory grow with T * (C + T): feed long prompts in chunks.

        Args:
            tokens_T: int64 [T], at least one.
            slabs: the cache.
            slot: slab number.
            logits: the tokens after which to return logits.

        Returns:
            Logits, float32 (float64 for a float64 model) [V] or [T, V], or None.

        Raises:
            ValueError: there is no token.
        """
        x_TE = self.read(tokens_T, slabs, slot)
        if logits == "none":
            return None
        return self.logits(x_TE) if logits == "all" else self.logits(x_TE[-1:])[0]

    @torch.inference_mode()
    def read(self, tokens_T: Tensor, slabs: Slabs, slot: int) -> Tensor:
        """Feeds the next tokens of one session like `prefill`, but does not apply the head.

        Returns:
            The residual stream [T, E] after every layer, for `logits` of some rows at a time.

        Raises:
            ValueError: no token.
        """
        return self.read_packed([tokens_T], slabs, [slot])[0]

    @torch.inference_mode()
    def read_packed(
        self, prompts: Sequence[Tensor], slabs: Slabs, slots: Sequence[int]
    ) -> list[Tensor]:
        """Feeds the next tokens of several sessions in one pass; equals `read` of each.

        Args:
            prompts: int64 [T] for every session, at least one token each.
            slabs: the cache.
            slots: as many different slab numbers.

        Returns:
            The residual stream of each, [T, E].

        Raises:
            ValueError: a chunk has no token, or a slab is named twice.
        """
        sizes = [len(tokens_T) for tokens_T in prompts]
        if not all(sizes):
            raise ValueError("a chunk needs at least one token")
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots {list(slots)} name a session twice")
        rotary = self.rotary(slabs.device)
        chunks = [
            ChunkAttention(slot, size, slabs, *rotary)
            for slot, size in zip(slots, sizes, strict=True)
        ]
        attend = PackedAttention(chunks) if len(chunks) > 1 else chunks[0]
        x_TE = self.run(torch.cat(list(prompts)), attend)
        for slot, size in zip(slots, sizes, strict=True):
            slabs.advance(slot, size)
        return list(torch.split(x_TE, sizes))

    @torch.inference_mode()
    def look_ahead(
        self, tokens_T: Tensor, slabs: Slabs, slot: int
    ) -> tuple[Tensor, DraftAttention]:
        """Reads tokens that may not all come true, without feeding them.

        Args:
            tokens_T: int64 [T], fewer than the ring has slots.
            slabs: the cache.
            slot: slab number of a session whose sinks are all read.

        Returns:
            Logits after each, float32 (float64 for a float64 model) [T, V], and the attention,
            whose `keep` feeds the tokens one by one.
        """
        attend = DraftAttention(slot, len(tokens_T), slabs, *self.rotary(tokens_T.device))
        return self.logits(self.run(tokens_T, attend)), attend

    def rotary(self, device: torch.device) -> tuple[Tensor, float]:
        """Returns the frequencies, float64 [D / 2], and the factor on rotated heads.

        They are made when first needed: a buffer would be cast along with the weights.
        """
        if self._frequencies_F is None or self._frequencies_F.device != device:
            self._frequencies_F = frequencies(self.cfg.rope, self.cfg.head_dim).to(device)
        return self._frequencies_F, self._scale

    def run(self, tokens_B: Tensor, attend: Attend) -> Tensor:
        """Applies every layer: tokens int64 [B] to the residual stream [B, E]."""
        x_BE: Tensor = self.embed(tokens_B)
        for layer in self.layers:
            x_BE = layer(x_BE, attend)
        return x_BE

    def logits(self, x_BE: Tensor) -> Tensor:
        """Applies the head: the residual stream [B, E] to logits, float32 or float64 [B, V]."""
        x_BE, head = self.norm(x_BE), self.head
        logits_BV: Tensor = F.linear(x_BE, self.embed.weight) if head is None else head(x_BE)
        return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
