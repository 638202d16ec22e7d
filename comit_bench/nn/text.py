"""Short texts -> vectors with a frozen T5 encoder: its last states, averaged over the words of a text.

Two encoders, both transformers' ``T5EncoderModel``:

- a released one, loaded by whoever calls (weights and word pieces come from its files);
- :func:`random_t5`, small and never trained, for runs without files: every weight matrix is drawn from a
  generator keyed by its name, every word has a vector keyed by the word itself. So a text's vector does
  not depend on which other texts exist. Nothing about language is in it: equal words give nearby vectors
  and order matters a little, that is all.

Shape legend: ``B`` texts, ``L`` words or word pieces, ``D`` width.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

RANDOM_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_PAD, _END = 0, 1


def _keyed(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"random-t5/{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def words_of(text: str) -> list[str]:
    """The words of the word-level vocabulary: runs of letters and digits in lower case, other signs alone."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def random_t5(words: Sequence[str], *, seed: int) -> Any:
    """A T5 encoder with random weights for a closed list of words.

    Matrices are normal with the standard deviation of T5's own initialisation at this size, word vectors
    standard normal; the words have ids from 2 on, after padding and the end mark.

    Args:
        words: Distinct words.
        seed: Another seed is another encoder.

    Returns:
        ``transformers.T5EncoderModel`` in eval mode, float32 on the CPU.
    """
    from transformers import T5Config, T5EncoderModel

    sizes: dict[str, Any] = dict(RANDOM_T5)
    config: Any = T5Config(vocab_size=2 + len(words), dropout_rate=0.0, feed_forward_proj="relu", **sizes)
    with torch.device("meta"):
        model: Any = T5EncoderModel(config)
    model = model.to_empty(device="cpu").eval()
    width, inner = config.d_model, config.num_heads * config.d_kv
    deviations = {"q": (width * config.d_kv) ** -0.5, "o": inner**-0.5, "wo": config.d_ff**-0.5}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.fill_(1.0)
            elif "embed_tokens" in name or name == "shared.weight":
                rows = ["<pad>", "</s>", *words]
                drawn = [torch.randn(width, generator=_keyed(seed, f"word/{word}")) for word in rows]
                parameter.copy_(torch.stack(drawn))
            else:
                std = deviations.get(name.split(".")[-2], width**-0.5)
                parameter.copy_(std * torch.randn(parameter.shape, generator=_keyed(seed, name)))
    return model


def word_ids(texts: Sequence[str], words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask of some texts for :func:`random_t5`: int64 and bool [B, L], end mark included.

    Raises:
        KeyError: A word is not in the list.
    """
    number = {word: index + 2 for index, word in enumerate(words)}
    rows = [[*(number[word] for word in words_of(text)), _END] for text in texts]
    length = max(map(len, rows), default=1)
    ids = torch.tensor([row + [_PAD] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return ids, mask


@torch.inference_mode()
def mean_states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Last encoder states averaged over what is no padding: float32 [B, D].

    Args:
        model: A ``T5EncoderModel`` (or another encoder with the same interface).
        ids: int64 [B, L].
        mask: bool [B, L], False for padding.
    """
    states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()  # [B, L, D]
    weight = mask[..., None].float()
    mean: Tensor = (states * weight).sum(dim=1) / weight.sum(dim=1)
    return mean
