"""Random numbers that are a function of their place: nothing is kept, nothing is drawn one after another.

Every sample of a stream (one kind of choice in one step) has a splitmix64 generator of its own (Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", 2014; the constants of its finaliser are David
Stafford's "Mix13"). The n-th word of such a generator is the finaliser applied to its start plus n times the
golden gamma, so all words are computed at once. A sample's start is word ``sample`` of the stream's own
generator, whose start is a hash of the seed and the stream's name. So a number depends neither on the other
samples that are asked for nor on how many words are.

Rounding: NumPy computes sines and logarithms of an element alike wherever it stands in an array.

Shape legend: ``n`` samples, ``k`` numbers of each.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.seeding import seed_for

Words = NDArray[np.uint64]
Numbers = NDArray[np.int64]
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _32 = (np.uint64(bits) for bits in (30, 27, 31, 32))
_LOW = np.uint64(2**32 - 1)


def _mixed(state: Words) -> Words:
    """The finaliser, a bijection of 64-bit words; products are modulo 2^64."""
    state = (state ^ (state >> _30)) * _FIRST
    state = (state ^ (state >> _27)) * _SECOND
    return state ^ (state >> _31)


def _starts(seed: int, stream: str, samples: Numbers) -> Words:
    """Where the generators of samples start: uint64 [n]."""
    start = np.uint64(seed_for(seed, stream))
    return _mixed(start + _GAMMA * (samples.astype(np.uint64) + np.uint64(1)))


def words(seed: int, stream: str, samples: Numbers, count: int) -> Words:
    """The first ``count`` words of samples (numbers from 0 on, [n]) -> uint64 [n, count]."""
    own = _starts(seed, stream, samples)
    return _mixed(own[:, None] + _GAMMA * np.arange(1, count + 1, dtype=np.uint64))


def uniforms(drawn: Words) -> NDArray[np.float64]:
    """Multiples of 2^-53 in [0, 1)."""
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(drawn: Words, limit: int) -> Numbers:
    """Integers in [0, limit); each is off its share by less than 2^-32."""
    return (((drawn >> _32) * np.uint64(limit)) >> _32).astype(np.int64)


def normals(seed: int, stream: str, samples: Numbers, count: int) -> NDArray[np.float32]:
    """Standard normal float32 [n, count] by Box and Muller (1958), two from a word; at most 6.7 large."""
    drawn = words(seed, stream, samples, (count + 1) // 2)
    first, second = (half.astype(np.float32) for half in (drawn >> _32, drawn & _LOW))
    radius = np.sqrt(np.float32(-2) * np.log((first + np.float32(1)) * np.float32(2.0**-32)))
    angle = second * np.float32(2 * np.pi / 2**32)
    out = np.empty((len(samples), drawn.shape[1], 2), np.float32)
    out[..., 0], out[..., 1] = radius * np.cos(angle), radius * np.sin(angle)
    return out.reshape(len(samples), -1)[:, :count]


def normals_on(device: torch.device, seed: int, stream: str, samples: Numbers, count: int) -> Tensor:
    """:func:`normals` of the same words, computed on a device: float32 [n, count], off by its rounding.

    Words are int64 there, whose sums and products are modulo 2^64 too.
    """
    own = torch.from_numpy(_starts(seed, stream, samples).view(np.int64)).to(device)[:, None]
    steps = torch.arange(1, (count + 1) // 2 + 1, device=device)
    state = own + steps * _signed(_GAMMA)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    state = state ^ _shifted(state, 31)
    first, second = _shifted(state, 32).float(), (state & int(_LOW)).float()
    radius = ((first + 1) * 2.0**-32).log_().mul_(-2).sqrt_()
    angle = second * (2 * np.pi / 2**32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :count]


def _signed(word: np.uint64) -> int:
    """The int64 of the same bits."""
    return int(word.astype(np.int64))


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Bits of int64 words moved right, zeros put before them."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
