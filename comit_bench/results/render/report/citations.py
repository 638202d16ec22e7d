"""What to cite for the tokenizers and data sets of a report, as BibTeX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from comit_bench import __version__
from comit_bench.results.schema import Record

SOFTWARE = f"""@software{{comit_bench,
  title   = {{comit\\_bench: what do the tokens of 1D discrete image tokenizers mean?}},
  author  = {{{{The comit\\_bench contributors}}}},
  version = {{{__version__}}},
  license = {{Apache-2.0}}
}}"""


def _preprint(key: str, title: str, number: str) -> str:
    return (
        f"@misc{{{key},\n  title         = {{{{{title}}}}},\n  eprint        = {{{number}}},\n"
        f"  archivePrefix = {{arXiv}},\n  year          = {{20{number[:2]}}}\n}}"
    )


def _article(key: str, title: str, where: str, year: int, first: str) -> str:
    return (
        f"@article{{{key},\n  title   = {{{{{title}}}}},\n  author  = {{{first} and others}},\n"
        f"  journal = {{{where}}},\n  year    = {{{year}}}\n}}"
    )


_TITOK = "An Image is Worth 32 Tokens for Reconstruction and Generation"
_GENOME = "Visual Genome: Connecting Language and Vision Using Crowdsourced Dense Image Annotations"
_IMAGENET = _article(
    "imagenet",
    "ImageNet Large Scale Visual Recognition Challenge",
    "International Journal of Computer Vision",
    2015,
    "Russakovsky",
)
FAMILIES = {
    "titok": _preprint("titok", _TITOK, "2406.07550"),
    "flextok": _preprint(
        "flextok", "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length", "2502.13967"
    ),
    "alit": _preprint("alit", "Adaptive Length Image Tokenization via Recurrent Allocation", "2411.02393"),
    "selftok": _preprint(
        "selftok",
        "Selftok: Discrete Visual Tokens of Autoregression, by Diffusion, and for Reasoning",
        "2505.07538",
    ),
}
DATASETS = {
    "imagenet": _IMAGENET,
    "mscoco": _article("mscoco", "Microsoft COCO: Common Objects in Context", "ECCV", 2014, "Lin"),
    "visual-genome": _article(
        "visualgenome", _GENOME, "International Journal of Computer Vision", 2017, "Krishna"
    ),
}


def citations(records: Iterable[Record]) -> tuple[str, list[str]]:
    """BibTeX of this program and of what the records use, and names of which none is known here.

    Baselines and references of this package, and embedded data sets, are part of the program.
    """
    used: list[str] = [SOFTWARE]
    unknown: dict[str, None] = {}
    for record in records:
        found = [_for(record.tokenizer.family, FAMILIES), _for(record.task.dataset.name, DATASETS)]
        used += [text for text in found if text]
        if not found[0] and record.tokenizer.kind == "learned":
            unknown[record.tokenizer.family] = None
    return "\n\n".join(dict.fromkeys(used)), list(unknown)


def _for(name: str, known: dict[str, str]) -> str:
    return next((text for key, text in known.items() if name.startswith(key)), "")


def cited(families: Sequence[str]) -> str:
    """A sentence about families without an entry here; empty when there are none."""
    if not families:
        return ""
    return (
        f"No entry is known here for {', '.join(sorted(families))}: see the model cards of these tokenizers."
    )
