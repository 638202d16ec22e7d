"""Released weight files that are not plain hub checkpoints: where they come from and what is inside.

Light on purpose: names and links only. The converters behind ``unpack`` and ``config`` are imported when a
file is converted.

A new family adds its files to ``RELEASES``: ``unpack`` names a function ``(content, path) -> tensors`` that
takes what ``torch.load(weights_only=True)`` returned, ``config`` one that returns the ``config.json`` of a
name, or a clear error where it cannot be known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from comit_bench.errors import UsageError, did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """One released file.

    Attributes:
        name: Tokenizer name, or the name of a further part of one.
        file: Name under which it is kept until it is converted.
        url: Direct link, or None.
        hub: Hub repository that holds ``file``, or None.
        unpack: ``module:function`` that picks the state dict out of the pickle.
        config: ``module:function`` that returns ``config.json`` for ``name``, or None.
        check: ``module:function`` ``(name, tensors, path)`` that refuses tensors of another model, or None.
        allow: Harmless classes that the pickle names beside tensors, ``module:class``.
    """

    name: str
    file: str
    url: str | None = None
    hub: str | None = None
    unpack: str
    config: str | None = None
    check: str | None = None
    allow: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Where it comes from, for messages and lists."""
        return f"hub {self.hub}/{self.file}" if self.hub else str(self.url)


def resolve(target: str) -> Callable[..., Any]:
    """Import ``module:name``."""
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


_DROPBOX = "https://www.dropbox.com/scl/fi"
_ALIT = "comit_bench.tokenizers.alit.config"


def _alit(name: str, file: str, link: str, state: str) -> Release:
    return Release(
        name=name,
        file=f"{file}.pth",
        url=f"{_DROPBOX}/{link}&st={state}&dl=1",
        unpack=f"{_ALIT}:unpack",
        config=f"{_ALIT}:released_config",
        check=f"{_ALIT}:check_fits",
        allow=("argparse:Namespace",),
    )


_SELFTOK = "comit_bench.tokenizers.selftok.config"


def _selftok(name: str, file: str) -> Release:
    return Release(
        name=name,
        file=f"{file}_ckpt.pth",
        hub="selftok-team/SelftokTokenizer",
        unpack=f"{_SELFTOK}:unpack",
        config=f"{_SELFTOK}:released_config",
        check=f"{_SELFTOK}:check_fits",
    )


RELEASES: tuple[Release, ...] = (
    _alit(
        "alit-small",
        "alit_small_vqgan_quantized_latents_imagenet",
        "u8jyro5wysttp5mvs6gir/alit_vqgan_small_quantized_latent.pth?rlkey=1py1s9755gjhdyw5ifd9h2wff",
        "swdbevjk",
    ),
    _alit(
        "alit-small-in100",
        "alit_small_vqgan_quantized_latents",
        "iszluhiop09z3afo2gw5f/alit_small_vqgan_quantized_latents.pth?rlkey=klt0zgeunb60l1snuzhjdzdq2",
        "zgwzgc2r",
    ),
    _alit(
        "alit-base",
        "alit_base_vqgan_quantized_latents",
        "6cygifz37knpqtkxgfj81/alit_base_vqgan_quantized_latents.pth?rlkey=r8hn0d4d8j8eg2wjorzl9c67s",
        "c5iv7wor",
    ),
    _alit(
        "alit-semilarge",
        "alit_semilarge_vqgan_quantized_latents",
        "wcp7s6w86slh1yy4m3egc/alit_semilarge_vqgan_quantized_latents.pth?rlkey=cf2s13c6ah3ru4ly9tb911gi7",
        "d11uoq0i",
    ),
    _alit(
        "alit-small-continuous",
        "alit_small_vqgan_continuous_latents",
        "twbxjch2hutxjsy3sd85y/alit_small_vqgan_continuous_latents.pth?rlkey=68ycbjp6upkrxt22w5rm58cjv",
        "5nyk6uvu",
    ),
    _alit(
        "alit-small-vae",
        "alit_small_vae_quantized_latents",
        "svykasoyyoapfzlghjuz2/alit_small_vae_quantized_latents.pth?rlkey=dtvyj74zq593zc7c63miwkhs3",
        "dwm9w2sp",
    ),
    _alit(
        "alit-small-vae-continuous",
        "alit_small_vae_continuous_latents",
        "bq2yzr7dufvrpnycb856b/alit_small_vae_continuous_latents.pth?rlkey=hjx6jpr6vvfzhtgkp1cc1rnrs",
        "4aa1vyh9",
    ),
    _selftok("selftok-512", "tokenizer_512"),
    _selftok("selftok-512-renderer", "renderer_512"),
    _selftok("selftok-1024", "tokenizer_1024"),
    _selftok("selftok-1024-renderer", "renderer_1024"),
)


def find_release(name: str) -> Release:
    """The release of a name, in any case.

    Raises:
        UsageError: There is none; suggests the nearest names.
    """
    known = {release.name: release for release in RELEASES}
    if name.lower() not in known:
        raise UsageError(f"no released file is known for {name!r}.{did_you_mean(name, known)}")
    return known[name.lower()]
