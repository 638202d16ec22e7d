"""``--option``: to the tokenizers that know it, an error when none does, a word in the plan for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from comit_bench.commands.tokens import key_values
from comit_bench.errors import UsageError
from comit_bench.pipeline.jobs import Settings, check_options, each_once, left_out, make_jobs, options_for
from comit_bench.pipeline.plan import make_plan
from comit_bench.pipeline.session import Session
from comit_bench.tokenizers.family import Family
from comit_bench.tokenizers.registry import FAMILIES, TokenizerEntry, code, find_tokenizer

EVERYTHING = {
    *("allow_pickle", "base", "compile", "decoder", "guidance", "guidance_mode", "halting", "iterations"),
    *("k_per_stage", "latent", "latents", "momentum", "patch", "posterior", "resolution", "scaling_factor"),
    *("solver", "stages", "steps", "tokens", "vae", "vae_dtype", "vocab", "nonesuch"),
}


def taken(entry: TokenizerEntry, name: str) -> bool:
    """Whether the loader takes an option: any other end of the call than "has no option" counts."""
    try:
        entry.loader()(
            entry.name, weights="random", device=torch.device("meta"), offline=True, **{name: object()}
        )
    except UsageError as error:
        return "has no option" not in str(error)
    except (TypeError, ValueError):
        return True
    return True


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.fitted], ids=lambda family: family.name)
def test_what_a_loader_names_is_what_it_takes(family: Family) -> None:
    entry = TokenizerEntry(family.presets[0], family)
    options = entry.known_options()
    assert options and set(options) <= EVERYTHING and len(set(options)) == len(options)
    assert {name for name in EVERYTHING if taken(entry, name)} == set(options)


def test_kmeans_takes_what_the_registry_says() -> None:
    from comit_bench.tokenizers.kmeans import KMeansPatchTokenizer

    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    options: dict[str, Any] = {"patch": 4, "resolution": 8, "vocab": 5}
    assert set(options) == set(find_tokenizer("kmeans-patch").known_options() or ())
    info = KMeansPatchTokenizer.fit(images, **options).info
    assert (info.resolution, info.vocab_size, info.options["patch"]) == (8, 5, "4")
    for name in options:
        with pytest.raises(UsageError, match="whole number"):
            KMeansPatchTokenizer.fit(images, **{**options, name: "many"})


def test_options_go_to_those_that_know_them() -> None:
    options: dict[str, Any] = {"posterior": "sample", "steps": 3, "flextok.steps": 5, "titok-nano.compile": 0}
    wanted = {
        "comit-nano": {"posterior": "sample", "steps": 3},
        "flextok-d12-d12": {"posterior": "sample", "steps": 5},
        "titok-nano": {"compile": 0},
        "titok-l-32": {},
        "vq-grid-nano": {},
        "pixel-oracle": {},
    }
    for name, expected in wanted.items():
        assert options_for(find_tokenizer(name), options) == expected
        assert options_for(find_tokenizer(name), dict(reversed(options.items()))) == expected
    check_options(each_once(["majority", *wanted]), options)
    assert left_out(each_once(["majority", *wanted]), options) == {
        "posterior": ["titok-nano", "titok-l-32", "vq-grid-nano", "pixel-oracle"],
        "steps": ["titok-nano", "titok-l-32", "vq-grid-nano", "pixel-oracle"],
    }


@pytest.mark.parametrize(
    ("tokenizers", "key", "says"),
    [
        (["comit-nano", "titok-nano"], "postrior", "Did you mean 'posterior'"),
        (["titok-nano", "vq-grid-nano"], "posterior", "no tokenizer of this run"),
        (["comit-nano", "titok-nano"], "comit.stepps", "Did you mean 'comit.steps'"),
        (["comit-nano", "titok-nano"], "flextok.steps", "'comit.steps'"),
        (["comit-nano"], "dtype", "no tokenizer of this run"),
        (["comit-nano"], "device", "no tokenizer of this run"),
        (["majority"], "posterior", "no tokenizer of this run"),
    ],
)
def test_an_option_that_nobody_knows_is_refused(tokenizers: list[str], key: str, says: str) -> None:
    with pytest.raises(UsageError, match=f"--option {key}: ") as error:
        make_jobs(tokenizers, ["recognition-scenes"], Settings(options={key: 1}))
    assert says in str(error.value)


def test_rows_that_do_not_know_an_option_run_without_it_and_the_plan_says_so() -> None:
    from comit_bench.pipeline.plan import describe

    settings = Settings(options={"posterior": "sample", "comit.steps": 2}, limit=8, seeds=1)
    rows = ["majority", "comit-nano", "titok-nano", "vq-grid-nano"]
    session = Session(settings)
    jobs = make_jobs(rows, ["recognition-scenes"], settings)
    plan = make_plan(jobs, session)
    lines = [line for line in describe(plan, settings, suite="scenes", why="") if "--option" in line]
    assert lines == [
        "  --option posterior=sample: not known to titok-nano, vq-grid-nano, which run without it"
    ]
    made = {job.label: found.info.options for job in jobs if (found := session.tokenizer(job)) is not None}
    assert made["comit-nano"]["posterior"] == "sample"
    assert "posterior" not in made["titok-nano"] and "posterior" not in made["vq-grid-nano"]


def plain(name: str, *, weights: Any = None, device: Any = "cpu", tint: int = 0) -> None:
    """Loader of a plugin that names its options."""


def open_ended(name: str, *, weights: Any = None, device: Any = "cpu", **options: Any) -> None:
    """Loader of a plugin that does not."""


def test_a_plugin_gets_what_it_names_or_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(loader: Any) -> TokenizerEntry:
        monkeypatch.setattr(TokenizerEntry, "loader", lambda self: loader)
        return code("theirs", "theirs:load", "plugin:theirs", "plugin")

    named = entry(plain)
    assert named.known_options() == ("tint",)
    assert options_for(named, {"tint": 1, "steps": 2, "theirs.tint": 3, "weights": 4}) == {"tint": 3}
    anything = entry(open_ended)
    assert anything.known_options() is None
    assert options_for(anything, {"tint": 1, "comit.steps": 2}) == {"tint": 1}


def test_names_of_options_on_the_command_line() -> None:
    assert key_values(["a-b=1", "vq-grid.k-per=x", "FlexTok.steps=2.5"]) == {
        "a_b": 1,
        "vq-grid.k_per": "x",
        "flextok.steps": 2.5,
    }
    with pytest.raises(UsageError, match="KEY=VALUE"):
        key_values(["comit.=1"])
