"""The probe: a shallow transformer that reads a message (paper, Appendix B.2).

    codes [B, K, d] -> Linear(d, D) -> [CLS] in front -> + position + type -> blocks -> norm -> head on [CLS]

What is unusual:

- Only the [CLS] state is read, so the last block computes that one row and nothing else. Keys and
  values still come from every token; the result is that of the full computation.
- Types beyond two announce tokens appended after the message, one type each (a relation task adds
  subject, predicate and object as text vectors: ``types=5``). Each has a projection of its own and no
  position.
- Nothing draws from the global random state: weights come from ``generator``.

Shape legend: ``B`` batch, ``K`` message length, ``d`` code dimension, ``E`` appended tokens,
``N`` = 1 + K + E tokens, ``D`` width, ``H`` heads, ``C`` outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.precision import full_precision
from comit_bench.probing.stem import ConvStem

CLS_TYPE = 0
MESSAGE_TYPE = 1


class ProbeBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual.

    Args:
        width: D, a multiple of ``heads``.
        heads: H.
        mlp_ratio: Hidden width of the MLP as a multiple of D.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = max(1, round(width * mlp_ratio))
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, H, N, D / H]."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, *, rows: int | None = None) -> Tensor:
        """Map [B, N, D] to [B, N, D], or to the first ``rows`` rows of it, [B, rows, D].

        Args:
            x: Token states.
            rows: How many leading rows are wanted; None is all.
        """
        states = self.norm1(x)  # [B, N, D]
        width = x.shape[-1]
        if rows is None:
            q, k, v = self.qkv(states).chunk(3, dim=-1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(states[:, :rows], weight[:width], bias[:width])
            k, v = F.linear(states, weight[width:], bias[width:]).chunk(2, dim=-1)
            x = x[:, :rows]
        return self._rest(x, q, k, v)

    def _rest(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What follows the projections: x and q [B, rows, D], k and v [B, N, D] -> [B, rows, D]."""
        mixed = F.scaled_dot_product_attention(self._split(q), self._split(k), self._split(v))
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.fc1(self.norm2(x)))  # [B, rows, hidden]
        answer: Tensor = x + self.fc2(hidden)
        return answer

    def forward_groups(self, x: Tensor, tail: Tensor, *, rows: int | None = None) -> Tensor:
        """The same for sequences that begin alike: their common part is normalised and projected once.

        Args:
            x: The common part, [B, M, D].
            tail: The G different rests of each, [B, G, E, D].
            rows: How many leading rows are wanted; None is all M + E.

        Returns:
            [B * G, M + E, D] or [B * G, rows, D]; the groups of an image stand together.
        """
        groups = tail.shape[1]

        def join(common: Tensor, own: Tensor) -> Tensor:
            wide = common[:, None].expand(-1, groups, -1, -1).flatten(0, 1)
            return torch.cat([wide, own.flatten(0, 1)], dim=1)

        whole = join(x, tail)
        q, k, v = join(self.qkv(self.norm1(x)), self.qkv(self.norm1(tail))).chunk(3, dim=-1)
        if rows is not None:
            whole, q = whole[:, :rows], q[:, :rows]
        return self._rest(whole, q, k, v)


class Probe(nn.Module):
    """Reads a message and answers with C numbers per image.

    Args:
        code_dim: d.
        message_length: K; shorter or longer messages are refused.
        outputs: C.
        width: D.
        depth: Number of blocks.
        heads: H, a divisor of ``width``.
        mlp_ratio: Hidden width of each MLP as a multiple of D.
        types: 2 ([CLS] and message) plus one per appended token.
        extra_dim: Length of an appended vector; needed exactly when ``types`` exceeds 2.
        positions: False leaves the positions out: the probe reads a message as an unordered bag.
        stem: Whether a :class:`~comit_bench.probing.stem.ConvStem` is learned in front.
        generator: CPU generator of the initial weights.

    Raises:
        ValueError: Width and heads do not fit, or ``types`` and ``extra_dim`` contradict each other.
        UsageError: A stem, and tokens that are no patches of an image.
    """

    def __init__(
        self,
        *,
        code_dim: int,
        message_length: int,
        outputs: int,
        width: int,
        depth: int,
        heads: int,
        generator: torch.Generator,
        mlp_ratio: float = 4.0,
        types: int = 2,
        extra_dim: int | None = None,
        positions: bool = True,
        stem: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"probe width {width} must be a multiple of heads {heads}")
        if types < 2 or (types > 2) != (extra_dim is not None):
            raise ValueError(
                f"types={types} with extra_dim={extra_dim}: give extra_dim for types above 2, "
                "one type for each appended token, and neither otherwise"
            )
        self.extra_tokens = types - 2
        with torch.device("meta"):  # torch's own initialisation would draw from the global state
            self.stem = ConvStem(message_length, code_dim) if stem else None
            if self.stem is not None:
                message_length, code_dim = self.stem.message_length, self.stem.code_dim
            self.message_length = message_length
            self.project = nn.Linear(code_dim, width)
            self.project_extra = nn.ModuleList(
                nn.Linear(extra_dim, width) for _ in range(types - 2) if extra_dim is not None
            )
            self.cls = nn.Parameter(torch.empty(1, 1, width))
            self.position_embed = (
                nn.Parameter(torch.empty(1, message_length + 1, width)) if positions else None
            )
            self.type_embed = nn.Parameter(torch.empty(types, width))
            self.blocks = nn.ModuleList(ProbeBlock(width, heads, mlp_ratio) for _ in range(depth))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, outputs)
        self.to_empty(device="cpu")
        self.reset(generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw all weights anew: matrices at std 1 / sqrt(inputs), embeddings at 1, biases 0, norms 1.

        All are truncated normals. Embeddings as large as the projected codes let the first block tell
        places apart from the start; with the customary 0.02 small probes learn several times slower.

        Args:
            generator: CPU generator; the same state gives the same weights on every device.
        """
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                std = parameter[0].numel() ** -0.5 if name.endswith("weight") else 1.0
                drawn = torch.empty(parameter.shape)
                nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
                parameter.copy_(drawn)

    def embed(self, codes: Tensor, extra: Tensor | None = None) -> Tensor:
        """Build the token states [B, N, D] that enter the first block.

        Args:
            codes: float [B, K, d].
            extra: float [B, E, extra_dim] with E = ``types`` - 2, or None when E is 0.
        """
        if self.stem is not None:
            codes = self.stem(codes)
        count = 0 if extra is None else extra.shape[1]
        if codes.shape[1] != self.message_length or count != self.extra_tokens:
            raise ValueError(
                f"this probe reads {self.message_length} codes and {self.extra_tokens} appended tokens, "
                f"got {codes.shape[1]} and {count}"
            )
        place = torch.cat(
            [
                self.type_embed[CLS_TYPE : CLS_TYPE + 1],
                self.type_embed[MESSAGE_TYPE].expand(self.message_length, -1),
            ]
        )[None]  # [1, K + 1, D]
        if self.position_embed is not None:
            place = self.position_embed + place
        cls = (self.cls + place[:, :1]).expand(codes.shape[0], -1, -1)
        parts = [cls, self.project(codes) + place[:, 1:]]
        if extra is not None:
            parts.append(self.embed_extra(extra))
        return torch.cat(parts, dim=1)

    def embed_extra(self, extra: Tensor) -> Tensor:
        """Project appended vectors, each by its own layer, and add their types: [B, E, T] -> [B, E, D]."""
        roles = [project(extra[:, role]) for role, project in enumerate(self.project_extra)]
        return torch.stack(roles, dim=1) + self.type_embed[2:]

    def forward(self, codes: Tensor, extra: Tensor | None = None) -> Tensor:
        """Answer for every message: float [B, C].

        Args:
            codes: float [B, K, d].
            extra: float [B, E, extra_dim], or None when nothing is appended.
        """
        x = self.embed(codes, extra)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            x = block(x, rows=1 if index == last else None)
        return self._answer(x)

    def _answer(self, x: Tensor) -> Tensor:
        """What the head says to the [CLS] state, in float32 also within autocast: [B, N, D] -> [B, C]."""
        with full_precision(x.device):
            answer: Tensor = self.head(self.norm(x[:, 0].float()))
        return answer

    def forward_groups(self, codes: Tensor, extra: Tensor) -> Tensor:
        """Answer for every message with each of G groups of appended tokens: float [B, G, C].

        Equal to repeating the messages G times and calling :meth:`forward`, at less cost.

        Args:
            codes: float [B, K, d].
            extra: float [B, G, E, extra_dim].
        """
        count, groups = extra.shape[:2]
        states = self.embed(codes, extra[:, 0])[:, : self.message_length + 1]  # [B, K + 1, D]
        tails = self.embed_extra(extra.flatten(0, 1)).unflatten(0, (count, groups))  # [B, G, E, D]
        last, x = len(self.blocks) - 1, states
        for index, block in enumerate(self.blocks):
            rows = 1 if index == last else None
            if isinstance(block, ProbeBlock) and index == 0:
                x = block.forward_groups(x, tails, rows=rows)
            else:
                x = block(x, rows=rows)
        grouped: Tensor = self._answer(x).unflatten(0, (count, groups))
        return grouped
