"""Reading ``config.json``: every value has a type and a range before anything is built from it.

The formats are those of released files, so a node may hold keys that nothing reads: they are named in the
log. An unknown key that looks like a known one that is absent is an error: its value would silently be
another one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from comit_bench.errors import UsageError, did_you_mean, shown
from comit_bench.nn.sizes import LEVEL, LEVELS, VOCABULARY, WIDTH
from comit_bench.nn.vae import KLVaeSpec

SIMILAR = 0.84


class _Required:
    pass


REQUIRED: Final = _Required()


class Node:
    """A mapping of a config.

    Args:
        value: What stands in the file.
        source: File named in errors.
        name: Dotted place in it, ``""`` for the whole.

    Raises:
        UsageError: Not a mapping.
    """

    def __init__(self, value: object, source: Path, name: str = "") -> None:
        self.source, self.name = source, name
        if not isinstance(value, Mapping):
            raise UsageError(f"{source}: {name or 'the config'} should be a mapping, found {shown(value)}")
        self.values: Mapping[str, Any] = value

    def label(self, key: str) -> str:
        """The dotted name of a key."""
        return f"{self.name}.{key}" if self.name else key

    def wrong(self, key: str, expected: str, value: object) -> UsageError:
        """The error for a value."""
        return UsageError(f"{self.source}: {self.label(key)} must {expected}, found {shown(value)}")

    def _get(self, key: str, default: object, expected: str) -> Any:
        if key in self.values:
            return self.values[key]
        if isinstance(default, _Required):
            raise UsageError(f"{self.source}: {self.label(key)} is missing: it must {expected}")
        return default

    def node(self, key: str, hint: str = "") -> Node:
        """A mapping inside; a dotted key goes several levels down.

        Args:
            key: Its name.
            hint: Ends the message when it is not there, e.g. ``Is this a COMiT checkpoint?``.
        """
        found = self
        for part in key.split("."):
            if not isinstance(found.values.get(part), Mapping):
                what = f"found {shown(found.values[part])}" if part in found.values else "it is missing"
                raise UsageError(
                    f"{self.source}: node {self.label(key)!r} should be a mapping, {what}. {hint}"
                )
            found = Node(found.values[part], self.source, found.label(part))
        return found

    def maybe(self, key: str) -> Node:
        """A mapping inside; an empty one when it is absent or null.

        Raises:
            UsageError: Something else.
        """
        value = self.values.get(key)
        return Node({} if value is None else value, self.source, self.label(key))

    def check_keys(
        self,
        known: Iterable[str],
        *,
        unread: Iterable[str] = (),
        strict: bool = False,
        told: bool = True,
    ) -> None:
        """Look at the keys that nothing reads.

        Args:
            known: Keys that are read.
            unread: Keys that belong there but change nothing here.
            strict: Refuse every unknown key (a format of our own).
            told: Name unknown keys in the log; not where most of a node is foreign by design.
        """
        names = tuple(known)
        strange = [str(key) for key in self.values if key not in {*names, *unread}]
        absent = [name for name in names if name not in self.values]
        for key in strange:
            near = get_close_matches(key, absent, n=1, cutoff=SIMILAR)
            if near or strict:
                raise UsageError(
                    f"{self.source}: {self.label(shown(key)[1:-1])} is unknown.{did_you_mean(key, names)}"
                )
        if strange and told:
            listed = ", ".join(self.label(shown(key)[1:-1]) for key in strange[:8])
            _log.info("%s: nothing reads %s", self.source, listed)

    def whole(self, key: str, default: int | _Required = REQUIRED, *, low: int = 1, high: int = WIDTH) -> int:
        """A whole number from ``low`` to ``high``; 12.0 is one, true and "12" are not.

        Raises:
            UsageError: Absent without a default, of another type, or out of range.
        """
        expected = f"be a {'positive ' if low == 1 else ''}whole number ({low} or more, up to {high})"
        value = self._get(key, default, expected)
        whole = _as_whole(value)
        if whole is None or not low <= whole <= high:
            raise self.wrong(key, expected, value)
        return whole

    def number(
        self,
        key: str,
        default: float | _Required = REQUIRED,
        *,
        above: float | None = None,
        low: float | None = None,
        high: float,
    ) -> float:
        """A finite number up to ``high``, larger than ``above`` or at least ``low``.

        Raises:
            UsageError: Absent without a default, of another type, or out of range.
        """
        bound = f"above {above:g}" if above is not None else f"of at least {low:g}" if low is not None else ""
        expected = f"be a number {bound} and at most {high:g}".replace("  and", "")
        value = self._get(key, default, expected)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if (
            not good
            or value > high
            or (above is not None and value <= above)
            or (low is not None and value < low)
        ):
            raise self.wrong(key, expected, value)
        return float(value)

    def flag(self, key: str, default: bool | _Required = REQUIRED) -> bool:
        """``true`` or ``false``, nothing else.

        Raises:
            UsageError: Absent without a default, or of another type.
        """
        value = self._get(key, default, "be true or false")
        if not isinstance(value, bool):
            raise self.wrong(key, "be true or false", value)
        return value

    def text(self, key: str, default: str | _Required = REQUIRED, *, allowed: Sequence[str] = ()) -> str:
        """A text, one of ``allowed`` if there are any.

        Raises:
            UsageError: Absent without a default, of another type, or not allowed.
        """
        expected = f"be one of {', '.join(allowed)}" if allowed else "be a text"
        value = self._get(key, default, expected)
        if not isinstance(value, str) or (allowed and value not in allowed):
            raise self.wrong(key, expected, value)
        return value

    def wholes(
        self,
        key: str,
        default: Sequence[int] | _Required = REQUIRED,
        *,
        low: int = 1,
        high: int = WIDTH,
        length: int | None = None,
        shortest: int = 1,
    ) -> tuple[int, ...]:
        """A list of whole numbers, each from ``low`` to ``high``.

        Raises:
            UsageError: Absent without a default, no list, of another length, or a number out of range.
        """
        count = f"{length}" if length is not None else f"{shortest} to {LEVELS}"
        expected = f"list whole numbers, {count} of them, each {low} or more, up to {high}"
        value = self._get(key, default, expected)
        if not isinstance(value, list | tuple):
            raise self.wrong(key, expected, value)
        sizes = len(value) == length if length is not None else shortest <= len(value) <= LEVELS
        numbers = [_as_whole(item) for item in value] if sizes else []
        good = [number for number in numbers if number is not None and low <= number <= high]
        if not sizes or len(good) != len(value):
            raise self.wrong(key, expected, value)
        return tuple(good)

    def levels(self, key: str, default: Sequence[int] | _Required = REQUIRED) -> tuple[int, ...]:
        """Levels of a finite scalar quantizer, each 2 or more.

        Raises:
            UsageError: See :meth:`wholes`; or a vocabulary larger than ids can count.
        """
        found = self.wholes(key, default, low=2, high=LEVEL)
        if math.prod(found) > VOCABULARY:
            raise self.wrong(key, f"have a product of at most {VOCABULARY:,}", list(found))
        return found


def _as_whole(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@contextmanager
def blaming(source: Path | str) -> Iterator[None]:
    """A specification that refuses its sizes: the error names the file or option they come from.

    Raises:
        UsageError: Instead of a plain ``ValueError``.
    """
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from error


def kl_vae_spec(node: Node, base: KLVaeSpec, **changes: Any) -> KLVaeSpec:
    """Sizes of a diffusers ``AutoencoderKL`` from its constructor arguments.

    Args:
        node: Its ``config.json``.
        base: What holds for keys that are absent.
        **changes: Fields that are known otherwise.
    """
    for key, only in (
        ("act_fn", "silu"),
        ("in_channels", 3),
        ("out_channels", 3),
        ("mid_block_add_attention", True),
    ):
        value = node.values.get(key, only)
        if type(value) is not type(only) or value != only:
            raise node.wrong(key, f"be {only!r}: no other VAE is computed here", value)
    for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        blocks = node.values.get(key, [])
        if not isinstance(blocks, list | tuple) or any(one != block for one in blocks):
            raise node.wrong(key, f"list {block} only: no other VAE is computed here", blocks)
    for key in ("latents_mean", "latents_std"):
        if node.values.get(key) is not None:
            raise node.wrong(key, "be null: no other VAE is computed here", node.values[key])
    sizes = {
        "channels": node.whole("latent_channels", base.channels, high=4096),
        "widths": node.wholes("block_out_channels", base.widths, high=8192),
        "layers": node.whole("layers_per_block", base.layers, high=16),
        "groups": node.whole("norm_num_groups", base.groups, high=8192),
    }
    with blaming(node.source):
        return replace(base, **{**sizes, **changes})


@dataclass(frozen=True, slots=True)
class Facts:
    """What our own files say about themselves, in the node ``comit_bench``; None where they do not."""

    trained: bool = True
    training_data: str | None = None
    weights_licence: str | None = None
    group: str | None = None


def read_facts(config: Mapping[str, Any], source: Path) -> Facts:
    """The node ``comit_bench`` of a config.

    Raises:
        UsageError: A value of another type.
    """
    node = Node(config, source).maybe("comit_bench")
    texts = {
        key: node.text(key) if node.values.get(key) is not None else None
        for key in ("training_data", "weights_licence", "group")
    }
    return Facts(trained=node.flag("trained", True), **texts)


_log = logging.getLogger(__name__)
