"""``comit-bench cost`` and the table that it made: complete, fresh, and counted right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.commands.cost import HEAD, count, heading, label, measure, presets, table
from comit_bench.errors import UsageError
from comit_bench.tokenizers.base import TILE, tile_rows
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.registry import builtin, find_tokenizer

TABLE = Path(__file__).parents[2] / "results" / "reference" / "cost.md"
CHEAP = ("comit-nano", "titok-nano", "titok-s-128", "titok-l-32", "vq-grid-nano", "alit-small")
# The first is a name for other people's networks.
NO_NETWORK = {"vqmodel", "kmeans-patch", "pixel-oracle", "supervised-cnn"}


def committed() -> dict[str, list[str]]:
    """Row name -> its cells."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert tuple(rows[0]) == HEAD
    return {row[0]: row for row in rows[2:]}


def test_the_committed_table_has_every_preset_of_the_registry() -> None:
    rows = committed()
    assert list(rows) == [label(entry, options) for entry, options in presets()]
    assert builtin().keys() - {name.split()[0] for name in rows} == NO_NETWORK
    for name, cells in rows.items():
        assert len(cells) == len(HEAD), name
        for cell in cells[4:]:
            assert cell.startswith("not run: ") or float(cell.partition(" (")[0].replace(",", "")) > 0, (
                name,
                cell,
            )
        assert not cells[4].startswith("not") and not cells[5].startswith("not"), "FLOPs are always counted"


@pytest.mark.parametrize("name", CHEAP)
def test_the_committed_table_is_what_is_counted_now(name: str) -> None:
    (line,) = list(table([name], timed=False))[2:]
    fresh = [cell.strip() for cell in line.strip("|").split(" | ")]
    assert committed()[name][:6] == fresh[:6] and fresh[6:] == ["–", "–"]


@pytest.mark.parametrize("name", ["comit-nano", "titok-nano", "vq-grid-nano"])
def test_what_is_counted_on_the_meta_device_is_what_runs(name: str) -> None:
    tokenizer = load_tokenizer(name, weights="random", device="cpu")
    side = tokenizer.info.resolution
    images = torch.zeros(TILE, 3, side, side, dtype=torch.uint8)
    tokenizer.decode(tokenizer.encode(images), seeds=range(TILE))  # makes what is kept for later images
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as encoding:
        tokens = tokenizer.encode(images)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as decoding:
        tokenizer.decode(tokens, seeds=range(TILE))
    cost = count(find_tokenizer(name), {})
    assert cost.encode == pytest.approx(encoding.get_total_flops() / TILE / 1e9, rel=1e-9)
    assert cost.decode == pytest.approx(decoding.get_total_flops() / TILE / 1e9, rel=1e-9)
    assert (cost.parameters, cost.tokens) == (tokenizer.info.parameters, tokenizer.info.message_length)


def test_a_large_preset_is_counted_without_weights() -> None:
    tokenizer = load_tokenizer("titok-l-32", weights="random", device="meta")
    assert {value.device.type for value in tokenizer.model.state_dict().values()} == {"meta"}  # type: ignore[attr-defined]


def test_settings_are_said() -> None:
    assert count(find_tokenizer("comit-nano"), {}).settings == "one global crop, 10 steps, guidance 7.5"
    assert count(find_tokenizer("titok-nano"), {}).settings == "–"


def test_time_is_that_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    from comit_bench.tokenizers.titok.adapter import Titok

    rows: list[int] = []
    plain = Titok.encode
    monkeypatch.setattr(Titok, "encode", lambda self, x: (rows.append(len(x)), plain(self, x))[1])
    entry = find_tokenizer("titok-nano")
    cost = count(entry, {})
    encode, decode = measure(entry, {}, cost, limit=60, memory=1)
    assert rows == [TILE, TILE, 1, 1, 1] and tile_rows.get() == TILE
    assert isinstance(encode, float) and isinstance(decode, float) and min(encode, decode) > 0


def test_what_is_not_measured_says_why() -> None:
    entry = find_tokenizer("titok-nano")
    cost = count(entry, {})
    for limit, memory in ((60, 0), (0, 1)):
        encode, decode = measure(entry, {}, cost, limit=limit, memory=memory)
        assert str(encode).startswith("not run: ") and str(decode).startswith("not run: ")


def test_a_slow_sampler_is_measured_by_a_few_steps() -> None:
    entry = find_tokenizer("comit-nano")
    cost = count(entry, {})
    encode, decode = measure(entry, {}, cost, limit=0.01, memory=1)
    assert isinstance(encode, float) and isinstance(decode, str)
    seconds, _, how = decode.partition(" ")
    assert how == "(from 2 of 10 steps)" and 2 * encode < float(seconds) < 200 * encode


def test_the_heading_names_command_and_torch() -> None:
    text = heading("a command")
    assert "\n    a command\n" in text and torch.__version__ in text
    assert TABLE.read_text(encoding="utf-8").startswith("# Cost of one image\n")


def test_the_command_refuses_names_without_a_network() -> None:
    done = CliRunner().invoke(app, ["cost", "kmeans-patch"])
    assert isinstance(done.exception, UsageError) and done.stdout == ""
    with pytest.raises(UsageError, match="titok-nano"):
        list(table(["titok-nanno"]))
    done = CliRunner().invoke(app, ["cost", "titok-nano", "--no-time"])
    assert done.exit_code == 0 and "| titok-nano | 0.28 M | 16 |" in done.stdout
