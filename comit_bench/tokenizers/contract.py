"""What the harness asks of every tokenizer at its border. The contract stands in ``base.py``.

A tokenizer is looked at when it is loaded or handed over; tokens, codes and images when they come back.
Shapes and types cost nothing. Values are looked at where they are on the CPU anyway, and on CUDA once per
batch, never per tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from comit_bench.errors import BenchError, UsageError
from comit_bench.tokenizers.base import STEMS, CropStep, Tokenizer, TokenizerInfo, Tokens
from comit_bench.tokenizers.pixels import patch_sides

KINDS = ("learned", "baseline", "reference")
CONTRACT = "see comit_bench/tokenizers/base.py"


def check_tokenizer(tokenizer: Any, who: str) -> None:
    """Refuse an object that is no tokenizer, or says impossible things about itself.

    Args:
        tokenizer: Of a loader, or an object handed over.
        who: Named in errors.
    """
    info = getattr(tokenizer, "info", None)
    absent = [name for name in ("encode", "codes_from_ids") if not callable(getattr(tokenizer, name, None))]
    if not isinstance(info, TokenizerInfo):
        absent.insert(0, "info (a TokenizerInfo)")
    if isinstance(tokenizer, type) or not isinstance(info, TokenizerInfo) or absent:
        kind = f"the class {tokenizer.__name__}" if isinstance(tokenizer, type) else type(tokenizer).__name__
        lacks = f" without {', '.join(absent)}" if absent else " and no object of it"
        raise UsageError(
            f"{who}: this is {kind}{lacks}. A tokenizer has info, encode, codes_from_ids and decode; "
            f"{CONTRACT}."
        )
    counts = {
        "message_length": info.message_length,
        "code_dim": info.code_dim,
        "resolution": info.resolution,
        "vocab_size": 1 if info.vocab_size is None else info.vocab_size,
        "parameters": info.parameters + 1 if _is_whole(info.parameters) else info.parameters,
    }
    wrong = [f"{name} {getattr(info, name)!r}" for name, n in counts.items() if not _is_whole(n) or n < 1]
    wrong += [f"kind {info.kind!r} (one of {', '.join(KINDS)})"] if info.kind not in KINDS else []
    wrong += [f"stem {info.stem!r} (one of {', '.join(map(repr, STEMS))})"] if info.stem not in STEMS else []
    texts = ("name", "family", "weights", "preprocessing")
    wrong += [f"{n} {getattr(info, n)!r}" for n in texts if not str(getattr(info, n) or "").strip()]
    if wrong:
        raise UsageError(f"{who}: its info has {'; '.join(wrong)}; {CONTRACT}.")
    if info.stem:
        patch_sides(info.message_length, info.code_dim, who)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _form(value: object) -> str:
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _kind(tokenizer: Tokenizer) -> str:
    return f"It is a {type(tokenizer).__module__}.{type(tokenizer).__qualname__}"


def _refuse(tokenizer: Tokenizer, call: str, came: str, wanted: str) -> NoReturn:
    raise UsageError(
        f"{tokenizer.info.name}: its {call} returned {came}, but the contract wants {wanted}. "
        f"{_kind(tokenizer)}; {CONTRACT}."
    )


def check_tokens(tokenizer: Tokenizer, tokens: Any, count: int) -> None:
    """Refuse what ``encode`` returned when its shapes or types are not those of the contract.

    Args:
        tokenizer: Whose.
        tokens: What it returned for ``count`` images; values are not looked at.
        count: Images.

    Raises:
        UsageError: Names the tokenizer, what came and what is wanted.
    """
    info = tokenizer.info
    if not isinstance(tokens, Tokens):
        _refuse(tokenizer, "encode", _form(tokens), "Tokens(ids, codes, offsets)")
    length, vocab, dim = info.message_length, info.vocab_size, info.code_dim
    if vocab is None:
        if tokens.ids is not None:
            _refuse(tokenizer, "encode", f"ids {_form(tokens.ids)}", "none, because vocab_size is None")
    else:
        _check(tokenizer, "encode", "ids", tokens.ids, torch.int64, (count, length))
    _check(tokenizer, "encode", "codes", tokens.codes, torch.float32, (count, length, dim))
    if tokens.offsets is not None:
        _check(tokenizer, "encode", "offsets", tokens.offsets, torch.float32, (count, 2))


def check_steps(tokenizer: Tokenizer, steps: Any, count: int, crops: int) -> list[CropStep]:
    """What ``encode_by_crop`` returned: one :class:`CropStep` per crop, or it is refused.

    Args:
        tokenizer: Whose.
        steps: What it returned for ``count`` images; codes are looked at.
        count: Images.
        crops: Of the policy.

    Raises:
        UsageError: Another number of steps, shape or type.
        BenchError: Codes that are not finite.
    """
    found = list(steps) if isinstance(steps, list | tuple) else []
    if len(found) != crops or not all(isinstance(step, CropStep) for step in found):
        came = f"{len(found)} steps" if found else _form(steps)
        _refuse(tokenizer, "encode_by_crop", came, f"a list of {crops} CropStep, one per crop")
    for step in found:
        check_tokens(tokenizer, step.tokens, count)
        check_values(tokenizer, "codes", step.tokens.codes)
        _check(tokenizer, "encode_by_crop", "boxes", step.boxes, torch.int64, (count, 3))
    return found


def check_values(tokenizer: Tokenizer, name: str, values: Tensor) -> None:
    """Refuse ids outside the vocabulary, and numbers that are not finite.

    Args:
        tokenizer: Whose.
        name: ``ids``, ``codes`` or ``offsets``.
        values: On the CPU, or once per batch.
    """
    if values.is_floating_point():
        if not bool(values.isfinite().all()):
            raise BenchError(
                f"{tokenizer.info.name}: its {name} are not finite (NaN or infinity), and the contract wants "
                f"finite numbers: nothing is stored. {_kind(tokenizer)}; {CONTRACT}."
            )
    elif values.numel():
        low, high, vocab = int(values.min()), int(values.max()), tokenizer.info.vocab_size or 0
        if low < 0 or high >= vocab:
            _refuse(tokenizer, "encode", f"{name} from {low} to {high}", f"0..{vocab - 1}")


def check_decoded(images: object, info: TokenizerInfo, count: int) -> Tensor:
    """What a tokenizer decoded: uint8 [B, 3, S, S], or it is refused; a plugin may hand out floats.

    Raises:
        BenchError: Another type or shape.
    """
    expected = (count, 3, info.resolution, info.resolution)
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or tuple(images.shape) != expected:
        wanted = f"uint8 images {list(expected)}"
        raise BenchError(f"{info.name}: decode() must return {wanted}, got {_form(images)}")
    return images


def check_looked_up(tokenizer: Tokenizer, codes: Any, ids: Tensor) -> Tensor:
    """Refuse codes that ``codes_from_ids`` made of ids [..., K] when their form is another.

    Raises:
        UsageError: As :func:`check_tokens`.
    """
    shape = (*ids.shape, tokenizer.info.code_dim)
    return _check(tokenizer, "codes_from_ids", "codes", codes, torch.float32, shape)


def _check(
    tokenizer: Tokenizer, call: str, name: str, value: Any, dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != dtype or tuple(value.shape) != tuple(shape):
        wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        _refuse(tokenizer, call, f"{name} {_form(value)}", wanted)
    checked: Tensor = value
    return checked
