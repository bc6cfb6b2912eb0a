"""Kernels of attention as one operator, and of rotary positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_mdp.training.kernels.elementwise import DTYPES
from onnx_mdp.training.kernels.registry import Call, kernel

__all__: list[str] = []


def _in_heads(x: Tensor, heads: int | None) -> Tensor:
    """``[batch, heads, tokens, width]``, also of heads and width in one axis."""
    if x.dim() == 4:
        return x
    assert heads is not None
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


@kernel("Attention")
def _attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> object:
    """``softmax(scale · q kᵀ + bias) v``; a query that may attend to nothing gets 0."""
    flat = query.dim() == 3
    q = _in_heads(query, call.get("q_num_heads"))
    k, v = (_in_heads(x, call.get("kv_num_heads")) for x in (key, value))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    past = past_key.shape[2] if past_key is not None else 0
    bias = _bias(call, q, k, mask, past, lengths)
    scale = call.get("scale") or 1 / math.sqrt(q.shape[3])
    shared = q.shape[1] // k.shape[1]
    all_k, all_v = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v))
    if call.outputs == 1 and not call.get("softcap", 0.0) and "softmax_precision" not in call.attributes:
        y = F.scaled_dot_product_attention(q, all_k, all_v, bias, scale=scale)
        scores = None
    else:
        y, scores = _written_out(call, q, all_k, all_v, bias, scale)
    if bias is not None:
        y = torch.where((bias == -math.inf).all(-1, keepdim=True), 0, y)
    y = y.transpose(1, 2).flatten(2) if flat else y
    return y if call.outputs == 1 else (y, k, v, scores)


def _bias(
    call: Call, q: Tensor, k: Tensor, mask: Tensor | None, past: int, lengths: Tensor | None
) -> Tensor | None:
    """What is added to the scores, ``[…, queries, keys]``; minus infinity where a query may not look."""
    queries, keys = q.shape[2], k.shape[2]
    bias = torch.zeros(queries, keys, dtype=q.dtype, device=q.device)
    if mask is not None:
        added = torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask
        bias = bias + F.pad(added.to(q.dtype), [0, keys - mask.shape[-1]], value=-math.inf)
    place = torch.arange(keys, device=q.device)
    seen = torch.full((1, 1, 1, 1), True, device=q.device)
    if lengths is not None:
        seen = seen & (place < lengths.reshape(-1, 1, 1, 1))
    first = past if lengths is None else lengths.reshape(-1, 1, 1, 1) - queries
    ahead = place - (first + torch.arange(queries, device=q.device).reshape(-1, 1))
    left, right = call.get("left_window_size", -1), call.get("right_window_size", -1)
    right = 0 if call.get("is_causal", 0) else right
    seen = seen & (ahead <= right) if right >= 0 else seen
    seen = seen & (ahead >= -left) if left >= 0 else seen
    if mask is None and seen.numel() == 1:
        return None
    return (
        bias.masked_fill(~seen, -math.inf) if seen.dim() <= bias.dim() else torch.where(seen, bias, -math.inf)
    )


def _written_out(
    call: Call, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the scores as ``qk_matmul_output_mode`` wants them."""
    raw = torch.matmul(q * math.sqrt(scale), k.mT * math.sqrt(scale))
    cap = call.get("softcap", 0.0)
    capped = cap * torch.tanh(raw / cap) if cap else raw
    biased = capped if bias is None else capped + bias
    wide = biased.to(DTYPES[call.get("softmax_precision")]) if call.get("softmax_precision") else biased
    share = torch.nan_to_num(F.softmax(wide, -1), 0.0).to(q.dtype)
    mode = call.get("qk_matmul_output_mode", 0)
    return torch.matmul(share, v), (raw, capped, biased, share)[mode]


@kernel("RotaryEmbedding")
def _rotary_embedding(
    call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> Tensor:
    tokens = x.transpose(1, 2) if x.dim() == 4 else x.reshape(*x.shape[:2], call.get("num_heads"), -1)
    width = call.get("rotary_embedding_dim", 0) or tokens.shape[3]
    turned, rest = tokens[..., :width], tokens[..., width:]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if call.get("interleaved", 0):
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    parts = cos * first - sin * second, sin * first + cos * second
    y = torch.stack(parts, -1).flatten(-2) if call.get("interleaved", 0) else torch.cat(parts, -1)
    y = torch.cat([y, rest], -1)
    return y.transpose(1, 2) if x.dim() == 4 else y.reshape(x.shape)
