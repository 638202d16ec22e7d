"""SelfTok's equations written out from the specification, with plain tensors and a mask.

Reads the state dict only: no module of the implementation takes part, so that both can be compared.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from comit_bench.tokenizers.selftok.model import Selftok

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def time_embedding(state: State, name: str, p: Tensor) -> Tensor:
    f = torch.exp((-math.log(10000.0) * torch.arange(128, dtype=torch.float32, device=p.device)) / 128)
    angle = p[:, None] * f
    features = torch.cat([angle.cos(), angle.sin()], dim=1)
    return linear(state, f"{name}.mlp.2", silu(linear(state, f"{name}.mlp.0", features)))


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    h = linear(state, f"{name}.fc1", x)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return linear(state, f"{name}.fc2", h)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    def split(x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    qh, kh, vh = split(q), split(k), split(v)
    logits = qh @ kh.transpose(-1, -2) / math.sqrt(qh.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return (logits.softmax(-1) @ vh).transpose(1, 2).reshape(q.shape)


def crop(table: Tensor, rows: int, columns: int) -> Tensor:
    side = math.isqrt(table.shape[1])
    top, left = (side - rows) // 2, (side - columns) // 2
    index = [r * side + c for r in range(top, top + rows) for c in range(left, left + columns)]
    return table[:, index]


def patches(state: State, name: str, x: Tensor) -> Tensor:
    out = F.conv2d(x, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"], stride=2)
    return out.flatten(2).transpose(1, 2)


def positions(count: int, like: Tensor) -> Tensor:
    return torch.tensor([1000.0 + 8 * k for k in range(count)], device=like.device)


def plain_encode(model: Selftok, latents: Tensor) -> Tensor:
    """[B, C, h, w] -> queries of the last block."""
    state = {k.removeprefix("encoder."): v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    spec = model.spec
    heads, query_heads, width = spec.encoder.heads, spec.encoder.query_heads, spec.encoder.query_width
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    x = patches(state, "x_embedder", latents) + crop(state["pos_embed"], rows, columns)
    q = state["query_tokens"].repeat(len(x), 1, 1)
    for i in range(spec.encoder.depth):
        b = f"blocks.{i}"
        te = time_embedding(state, f"{b}.t_embedder", positions(spec.tokens, q))
        m = linear(state, f"{b}.adaLN_modulation.1", silu(te)).split(width, dim=-1)
        n, u = norm(x), norm(q) * (1 + m[1]) + m[0]
        a, c, e = linear(state, f"{b}.attn.qkv", n).chunk(3, -1)
        a_x = linear(state, f"{b}.attn.proj", softmax_attention(a, c, e, heads))
        k_x, v_x = linear(state, f"{b}.attn.to_query_kv", n).chunk(2, -1)
        q_q, k_q, v_q = linear(state, f"{b}.attn.query_linear", u).chunk(3, -1)
        mixed = softmax_attention(q_q, torch.cat([k_x, k_q], 1), torch.cat([v_x, v_q], 1), query_heads)
        x = x + a_x
        x = x + mlp(state, f"{b}.mlp", norm(x))
        q = q + m[2] * linear(state, f"{b}.attn.query_proj", mixed)
        q = q + m[5] * mlp(state, f"{b}.q_mlp", norm(q) * (1 + m[4]) + m[3])
    return q


def _trunk(
    model: Selftok, state: State, image: Tensor, codes: Tensor, tau: Tensor, visible: int, rows: int
) -> Tensor:
    spec = model.spec
    width, heads, depth = spec.decoder.width, spec.decoder.heads, spec.decoder.depth
    k, p = codes.shape[1], image.shape[1]
    c = silu(time_embedding(state, "t_embedder", tau))[:, None]
    context = linear(state, "context_embedder", codes) + state["context_pos_embed"]
    mask = torch.ones(k + p, k + p, dtype=torch.bool, device=codes.device)
    mask[:, visible:k] = False
    if not spec.context_sees_image:
        mask[:k, k:] = False
    for i in range(depth):
        b = f"joint_blocks.{i}"
        m = linear(state, f"{b}.x_block.adaLN_modulation.1", c).split(width, dim=-1)
        last = i == depth - 1
        own = c
        if not last:
            own = silu(time_embedding(state, f"{b}.context_block.t_embedder", positions(k, codes)))
        o = linear(state, f"{b}.context_block.adaLN_modulation.1", own).split(width, dim=-1)
        q1, k1, v1 = linear(state, f"{b}.context_block.attn.qkv", norm(context) * (1 + o[1]) + o[0]).chunk(
            3, -1
        )
        q2, k2, v2 = linear(state, f"{b}.x_block.attn.qkv", norm(image) * (1 + m[1]) + m[0]).chunk(3, -1)
        joined = [torch.cat(pair, dim=1) for pair in ((q1, q2), (k1, k2), (v1, v2))]
        mixed = softmax_attention(*joined, heads, mask)
        for name, s, part, g in (("x", image, mixed[:, k:], m), ("context", context, mixed[:, :k], o)):
            if name == "context" and last:
                continue
            s = s + g[2] * linear(state, f"{b}.{name}_block.attn.proj", part)
            s = s + g[5] * mlp(state, f"{b}.{name}_block.mlp", norm(s) * (1 + g[4]) + g[3])
            image, context = (s, context) if name == "x" else (image, s)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", c).chunk(2, -1)
    y = linear(state, "final_layer.linear", norm(image) * (1 + scale) + shift)
    channels = spec.channels
    out = torch.zeros(len(y), channels, 2 * rows, 2 * (p // rows), device=y.device)
    for a in range(2):
        for d in range(2):
            part = y[..., (2 * a + d) * channels : (2 * a + d + 1) * channels]
            out[:, :, a::2, d::2] = part.transpose(1, 2).reshape(len(y), channels, rows, p // rows)
    return out


def _decoder_state(model: Selftok) -> State:
    return {k.removeprefix("model."): v for k, v in model.state_dict().items() if k.startswith("model.")}


def plain_velocity(model: Selftok, x: Tensor, codes: Tensor, time: Tensor, visible: int) -> Tensor:
    """The diffusion decoder at one time, with all K tokens and a key mask."""
    state, rows = _decoder_state(model), x.shape[-2] // 2
    image = patches(state, "x_embedder", x) + crop(state["pos_embed"], rows, x.shape[-1] // 2)
    return _trunk(model, state, image, codes, 1000 * time.view(1).to(codes.device), visible, rows)


def plain_render(model: Selftok, codes: Tensor) -> Tensor:
    """The renderer: [B, K, d] -> [B, C, h, w]."""
    state = _decoder_state(model)
    count = len(state["positional_embedding"])
    image = state["mask_token"].expand(len(codes), count, -1) + state["positional_embedding"]
    last = torch.tensor([1000.0], device=codes.device)
    return _trunk(model, state, image, codes, last, codes.shape[1], math.isqrt(count))
