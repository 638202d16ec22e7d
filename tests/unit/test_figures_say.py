"""What figures say about themselves: weights, settings, nulls, ranges; their file names; their progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.errors import UsageError
from comit_bench.figures import (
    attention,
    codebook,
    counterfactual,
    edit,
    evolution,
    maps,
    neighbours,
    policies,
    reconstruction,
    style,
    tracing,
)
from comit_bench.figures.about import About, describe, joined
from comit_bench.figures.inputs import Images, decode, encode, load_inputs, progress, psnr_of_flat
from comit_bench.metrics.overlap import overlaps
from comit_bench.metrics.similarity import psnr
from comit_bench.recipes.kinds import ObjectnessSpec
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.comit.codec import to_uint8
from comit_bench.tokenizers.load import load_tokenizer

FIGURES: dict[str, Callable[[Any, Images], Any]] = {
    "attention": lambda t, x: attention.draw(attention.compute(t, x)),
    "attention sweep": lambda t, x: attention.draw_sweep(attention.compute_sweep(t, x, times=(0.5,))),
    "codebook": lambda t, x: codebook.draw(codebook.compute(t, x, positions=3)),
    "edit": lambda t, x: edit.draw(edit.compute(t, x, span=8)),
    "evolution": lambda t, x: evolution.draw(evolution.compute(t, x, policy="raster:1")),
    "maps": lambda t, x: maps.draw(maps.compute(t, x, tokens=2)),
    "neighbours": lambda t, x: neighbours.draw(neighbours.compute(t, x, queries=1, k=1)),
    "policies": lambda t, x: policies.draw(policies.compute(t, x, policies=("global",))),
    "policies curves": lambda t, x: policies.draw_curves(policies.compute_curves(t, x, crops=1)),
    "reconstruction": lambda t, x: reconstruction.draw(reconstruction.compute([t], [x])),
}
DECODING = {"attention", "attention sweep", "edit", "maps", "policies", "policies curves", "reconstruction"}
OWN_POLICIES = {"evolution", "policies", "policies curves"}


@pytest.fixture(scope="module")
def nano() -> Any:
    return load_tokenizer("comit-nano", device="cpu")


@pytest.fixture(scope="module")
def blank() -> Any:
    return load_tokenizer("comit-nano", weights="random", device="cpu")


@pytest.fixture(scope="module")
def scenes(nano: Any) -> Images:
    return load_inputs("scenes", nano.info, 2, 0)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["figure", *(str(one) for one in arguments)])


def words(figure: Any) -> str:
    """All text outside pictures and panels, lines joined."""
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ")


def photos(root: Path, count: int = 3) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(root / f"{number}.png")
    return root


# ---------------------------------------------------------------- on the page


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_who_made_it_and_whether_it_learned_anything(
    name: str, nano: Any, blank: Any, scenes: Images
) -> None:
    said, said_blank = (words(FIGURES[name](one, scenes)) for one in (nano, blank))
    assert "untrained: comit-nano has random weights" in said_blank
    assert "random weights (seed 0)" in said_blank
    assert "untrained" not in said and "trained on scenes-recognition train" in said
    for text in (said, said_blank):
        assert "2 of 200 images of scenes-objectness val, seed 0" in text
        assert ("steps 10, solver euler, guidance 7.5" in text) is (name in DECODING)
        assert ("policy global" in text) is (name not in OWN_POLICIES)


def test_a_counterfactual_figure_says_it_too(blank: Any) -> None:
    inputs = load_inputs("scenes", blank.info, None, 0, dataset=counterfactual.DATASET)
    figure = counterfactual.draw(counterfactual.compute(blank, inputs, count=1, policy="raster:1"))
    said = words(figure)
    assert "untrained" in said and "policy raster:1" in said and "null" in said and "blue 1" in said
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend() is not None]
    box = legends[0].get_window_extent()
    assert len(legends) == 1 and figure.bbox.y0 <= box.y0 and box.x1 <= figure.bbox.x1 + 1


def test_signing_moves_everything_and_covers_nothing(nano: Any, scenes: Images) -> None:
    about = About(("warning " * 30,), ("line " * 90, "two"))
    data = replace(reconstruction.compute([nano], [scenes]), about=about)
    plain, signed = reconstruction.draw(replace(data, about=About())), reconstruction.draw(data)
    assert signed.get_size_inches()[1] > plain.get_size_inches()[1] + 0.5
    assert signed.get_size_inches()[0] == plain.get_size_inches()[0]
    for one, two in zip(plain.axes, signed.axes, strict=True):
        assert one.get_window_extent().size == pytest.approx(two.get_window_extent().size)
    lines = [text for text in signed.texts if text.get_text().startswith(("warning", "line", "two"))]
    boxes = [line.get_window_extent() for line in lines]
    assert len(boxes) >= 5
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= signed.bbox.x1 and box.y0 >= 0 and box.y1 <= signed.bbox.y1
        others = [*boxes[:number], *(axes.get_window_extent() for axes in signed.axes)]
        assert not any(box.shrunk(0.98, 0.9).overlaps(other) for other in others)


def test_a_legend_stays_below_the_warnings(blank: Any, scenes: Images) -> None:
    figure = policies.draw_curves(policies.compute_curves(blank, scenes, crops=1))
    figure.draw_without_rendering()
    (warning,) = (text for text in figure.texts if text.get_text().startswith("untrained"))
    legend, above = figure.legends[0].get_window_extent(), warning.get_window_extent()
    panels = [axes.get_window_extent() for axes in figure.axes]
    assert legend.y1 <= above.y0 and legend.y0 >= max(panel.y1 for panel in panels)


def test_dollar_signs_in_names_are_no_formulas(tmp_path: Path, nano: Any) -> None:
    folder = photos(tmp_path / "cash $\\nothing$ here", 2)
    data = reconstruction.compute([nano], [load_inputs(str(folder), nano.info, 2, 0)])
    odd = replace(data, tokenizers=("a$\\b$",))
    (written, _) = style.save(reconstruction.draw(odd), tmp_path / "x")
    assert written.is_file()
    inputs = load_inputs(str(folder), nano.info, 2, 0)
    named = replace(neighbours.compute(nano, inputs, queries=1, k=1), classes=(("$\\x$", "$\\x$"),))
    style.save(neighbours.draw(named), tmp_path / "y")


def test_images_of_the_reader_and_files_that_were_left_out(tmp_path: Path, nano: Any) -> None:
    folder = photos(tmp_path / "holiday")
    (folder / "broken.png").write_bytes(b"nothing")
    about = describe(nano, load_inputs(str(folder), nano.info, 4, 3))
    assert about.lines[1] == "3 of 4 images of folder holiday, seed 3; incomplete: 1 could not be read"
    assert about.warnings == ("comit-nano was trained on 32 px embedded scenes; these are other images",)
    oracle = load_tokenizer("pixel-oracle", device="cpu")
    said = describe(oracle, load_inputs(str(folder), oracle.info, 1, 0))
    assert not said.warnings and said.lines[0] == "pixel-oracle: no weights"


def test_several_tokenizers_are_all_described(nano: Any, blank: Any, scenes: Images) -> None:
    titok = load_tokenizer("titok-nano", device="cpu", weights="random")
    both = joined([describe(one, scenes, decodes=True) for one in (nano, titok)])
    assert [line.split(":")[0] for line in both.lines[:2]] == ["comit-nano", "titok-nano"]
    assert len(both.lines) == 3 and both.untrained == ("titok-nano",)
    texts = [t.get_text() for t in reconstruction.draw(reconstruction.compute([blank], [scenes])).texts]
    assert "comit-nano\n(untrained)" in texts


# ---------------------------------------------------------- nulls and ranges


def test_the_null_of_attention_by_hand(nano: Any, scenes: Images) -> None:
    """The best of the other image's maps; of two images that is the other one in every draw."""
    spec = ObjectnessSpec(shares=(10, 20))
    data = attention.compute(nano, scenes, shares=(10, 20))
    maps = attention.each_map(nano, scenes, replace_spec(spec), None, 0)[2][0, 0]
    for image in (0, 1):
        found = overlaps(maps[1 - image], torch.from_numpy(data.masks[image]), (10, 20), resize="bilinear")
        np.testing.assert_allclose(data.null[image], found.amax(dim=1).numpy())
    assert data.candidates == 16


def test_one_image_alone_is_compared_with_its_own_maps_rolled(nano: Any) -> None:
    data = attention.compute(nano, load_inputs("scenes", nano.info, 1, 0), shares=(10,))
    assert 0 < data.null[0, 0] < 1 and data.null[0, 0] != data.iou[0, 0]


def replace_spec(spec: ObjectnessSpec) -> ObjectnessSpec:
    return spec.model_copy(update={"layers": (attention.LAYER,), "times": (attention.TIME,)})


def test_attention_shows_null_choice_and_range(nano: Any, scenes: Images) -> None:
    data = attention.compute(nano, scenes)
    figure = attention.draw(data)
    texts = [text.get_text() for text in figure.texts]
    assert f"IoU {data.iou[0, 0]:.2f} (null {data.null[0, 0]:.2f})\ntoken {data.tokens[0, 0]}" in texts
    low, high = data.maps[1, 1].min(), data.maps[1, 1].max()
    assert any(text.startswith(f"{low:.2g} .. {high:.2g}") for text in texts)
    said = words(figure)
    assert "oracle choice: the token shown is the one of 16" in said and "best of 16, top 10 %" in said
    mean = f"mean {data.iou[:, 3].mean():.2f} (null {data.null[:, 3].mean():.2f})"
    assert mean in said


def test_the_sweep_of_attention_has_a_null_in_every_cell(nano: Any, scenes: Images) -> None:
    sweep = attention.compute_sweep(nano, scenes, times=(0.2, 0.5))
    assert sweep.null.shape == sweep.miou.shape == (4, 2) and (sweep.null > 0.02).all()
    figure = attention.draw_sweep(sweep)
    cells = [text.get_text() for text in figure.axes[0].texts]
    wanted = f"{sweep.miou[0, 0]:.2f}\n({sweep.null[0, 0]:.2f})".replace("0.", ".")
    assert cells[0] == wanted and len(cells) == 8
    assert "optimistic" in words(figure) and len(figure.axes) == 2  # the second is the colour bar


def test_an_image_without_an_object_is_left_out_and_said(
    tmp_path: Path, nano: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = photos(tmp_path / "images", 2)
    (tmp_path / "ground_truth_mask").mkdir()
    mask = np.zeros((40, 40), dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "ground_truth_mask" / "0.png")
    mask[5:20, 5:20] = 255
    Image.fromarray(mask).save(tmp_path / "ground_truth_mask" / "1.png")
    data = attention.compute(nano, load_inputs(str(folder), nano.info, 2, 0))
    assert data.names == ("1.png",) and "0.png: no object is left" in caplog.text
    assert "incomplete: 1 image(s) without a mask" in words(attention.draw(data))
    (tmp_path / "ground_truth_mask" / "1.png").write_bytes(
        (tmp_path / "ground_truth_mask" / "0.png").read_bytes()
    )
    with pytest.raises(UsageError, match=r"no object is left.*Replace the mask"):
        attention.compute(nano, load_inputs(str(folder), nano.info, 2, 0))


def test_flat_images_by_hand_and_on_the_page(nano: Any, scenes: Images) -> None:
    flat = psnr_of_flat(scenes.images)
    one = scenes.images[0].double()
    error = (one - one.mean(dim=(1, 2), keepdim=True).round()).square().mean()
    assert flat[0] == pytest.approx(float(10 * torch.log10(255**2 / error)))
    for name in ("reconstruction", "policies"):
        assert f"flat: {flat[1]:.1f} dB" in words(FIGURES[name](nano, scenes))
    curves = policies.compute_curves(nano, scenes, crops=1)
    lines = policies.draw_curves(curves).axes[0].lines
    assert any(np.allclose(np.asarray(line.get_ydata()), flat.mean()) for line in lines)


def test_error_maps_say_their_range(nano: Any, scenes: Images) -> None:
    data = evolution.compute(nano, scenes, policy="raster:2")
    top = evolution.short(100 * float(data.errors[:, 1].max()))
    assert f"100 × squared error (0 to {top})" in words(evolution.draw(data))


def test_codebook_has_its_null_beside_the_numbers(nano: Any, scenes: Images) -> None:
    data = codebook.compute(nano, scenes)
    said = words(codebook.draw(data))
    assert said.count("even use") == 2 and f"perplexity {data.use.perplexity:.0f} (even use" in said


# ----------------------------------------------------------------- file names


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".png"}


def test_an_untrained_figure_never_takes_the_place_of_a_trained_one(tmp_path: Path) -> None:
    for more in ([], ["--weights", "random"], ["--policy", "raster:3"], ["-t", "comit-nano-untrained"]):
        done = run("reconstruction", "--count", 1, "-q", "--output", tmp_path, *more)
        assert done.exit_code == 0, done.output
    assert files(tmp_path) == {
        "reconstruction-comit-nano.png",
        "reconstruction-comit-nano-untrained.png",
        "reconstruction-comit-nano-raster-3.png",
    }


def test_weights_of_the_readers_own_have_their_own_name(tmp_path: Path, nano: Any) -> None:
    from comit_bench.files import shipped_weights

    own = tmp_path / "comit-nano"
    own.mkdir()
    for file in shipped_weights("comit-nano-no-srepa").iterdir():
        if file.is_file():
            (own / file.name).write_bytes(file.read_bytes())
    for name in (["-t", own], ["--weights", own]):
        done = run("reconstruction", "--count", 1, "-q", "--output", tmp_path / "out", *name)
        assert done.exit_code == 0, done.output
    (name,) = files(tmp_path / "out")
    digest = load_tokenizer(str(own), device="cpu").info.weights[7:15]
    assert name == f"reconstruction-comit-nano-{digest}.png"
    assert digest != nano.info.weights[7:15]


def test_long_names_that_differ_at_the_end_stay_different() -> None:
    one, two = (style.file_stem("reconstruction", "tokenizer+" * 20 + end) for end in "ab")
    assert one != two and len(one) == len(two) == 150


# -------------------------------------------------------- few images, progress


def test_one_photo_costs_one(nano: Any, scenes: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that the network sees for one image: one per look, nothing is padded."""
    rows: dict[str, list[int]] = {"messages": [], "one_step": [], "decode": []}
    messages, one_step = type(nano)._messages, type(nano).one_step

    def watched_messages(self: Any, images: torch.Tensor, *rest: Any, **more: Any) -> Any:
        rows["messages"].append(len(images))
        return messages(self, images, *rest, **more)

    def watched_step(self: Any, codes: torch.Tensor, *rest: Any) -> Any:
        rows["one_step"].append(len(codes))
        return one_step(self, codes, *rest)

    def watched_decode(model: Any, codes: torch.Tensor, *rest: Any, **more: Any) -> Any:
        rows["decode"].append(len(codes))
        return whole(model, codes, *rest, **more)

    import comit_bench.tokenizers.comit.adapter as adapter

    whole = adapter.decode
    monkeypatch.setattr(type(nano), "_messages", watched_messages)
    monkeypatch.setattr(type(nano), "one_step", watched_step)
    monkeypatch.setattr(adapter, "decode", watched_decode)
    one = replace(scenes, names=scenes.names[:1], images=scenes.images[:1], paths=scenes.paths[:1])
    evolution.compute(nano, one, policy="adaptive:3")
    assert rows == {"messages": [1], "one_step": [1, 1, 1], "decode": []}
    reconstruction.compute([nano], [one])
    assert rows["messages"] == [1, 1] and rows["decode"] == [1]
    rows["decode"].clear()
    edit.compute(nano, scenes, span=8)  # one pair: both, two spans, two prefixes
    assert rows["decode"] == [8]
    policies.compute(nano, one, policies=("global", "raster:2"))
    assert rows["decode"] == [8, 2]


def test_policies_that_share_crops_keep_their_tile(nano: Any, scenes: Images) -> None:
    own = [generator_for(0, name) for name in scenes.names]
    in_runs = nano.encode(scenes.images, policy="adaptive-shared:3", generators=own)
    assert torch.equal(encode(nano, scenes, policy="adaptive-shared:3").codes, in_runs.codes)
    found = tracing.trace(nano, scenes, "adaptive-shared:3", 0)
    assert torch.equal(found.codes[-1], in_runs.codes)


def test_few_images_are_those_of_a_run_within_rounding(nano: Any, scenes: Images) -> None:
    own = [generator_for(0, name) for name in scenes.names]
    in_runs = nano.encode(scenes.images, policy="raster:3", generators=own)
    tokens = encode(nano, scenes, policy="raster:3")
    assert float((tokens.codes != in_runs.codes).float().mean()) < 0.05
    difference = (decode(nano, in_runs, [1, 2]).int() - nano.decode(in_runs, seeds=[1, 2]).int()).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 0.01


def test_every_step_is_shown_and_ends(nano: Any, scenes: Images) -> None:
    seen: dict[str, list[int]] = {}

    def start(what: str, total: int, unit: str) -> Callable[[int], None]:
        counts = seen.setdefault(what, [0, 0])
        counts[0] += total

        def advance(done: int) -> None:
            counts[1] += done

        return advance

    token = progress.set(start)
    try:
        load_inputs("scenes", nano.info, 2, 0)
        for draw in FIGURES.values():
            draw(nano, scenes)
        for policy in ("adaptive:3", "adaptive-shared:2", "global+random:4", "order:1,2"):
            tracing.trace(nano, scenes, policy, 0)
    finally:
        progress.reset(token)
    assert {"reading", "comit-nano: encoding", "comit-nano: decoding", "comit-nano: crop by crop"} <= set(
        seen
    )
    assert {"neighbours of", "comit-nano: reading maps", "comparing with masks"} <= set(seen)
    assert all(total == done > 0 for total, done in seen.values()), seen


@pytest.mark.parametrize("figure", ["evolution", "reconstruction"])
def test_commands_show_a_bar_on_stderr(tmp_path: Path, figure: str) -> None:
    loud = run(figure, "--count", 1, "--output", tmp_path)
    assert loud.exit_code == 0 and "%|" in loud.stderr and "%|" not in loud.stdout
    quiet = run(figure, "--count", 1, "--output", tmp_path, "--quiet")
    assert quiet.exit_code == 0 and quiet.stderr == ""


# ------------------------------------------------- a default that nobody named


@pytest.mark.parametrize("figure", ["reconstruction", "edit", "neighbours"])
def test_the_small_default_is_named_for_photos(tmp_path: Path, figure: str) -> None:
    folder, said = photos(tmp_path / "in"), "note: no --tokenizer is given, so comit-nano is used"
    more = ["-k", 1] if figure == "neighbours" else ["--count", 2]
    done = run(figure, "--images", folder, "--output", tmp_path, "-q", *more)
    assert done.exit_code == 0 and done.stderr.count(said) == 1, done.output
    named = run(figure, "--images", folder, "--output", tmp_path, "-q", "-t", "comit-nano", *more)
    assert named.exit_code == 0 and named.stderr == ""


def test_tokenize_names_its_default(tmp_path: Path) -> None:
    folder, said = photos(tmp_path / "in"), "note: no --tokenizer is given, so comit-nano is used"
    for more, wanted in (([], 1), (["-t", "comit-nano"], 0)):
        command = ["tokenize", str(folder), "--out", str(tmp_path / "t.safetensors"), "-q", *more]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0 and done.stderr.count(said) == wanted, done.output


def test_too_many_neighbours_are_refused_before_anything_is_encoded(nano: Any, scenes: Images) -> None:
    class Deaf:
        info = nano.info

    deaf: Any = Deaf()
    with pytest.raises(UsageError, match=r"2 neighbours of 2 images.*--pool"):
        neighbours.compute(deaf, scenes, k=2)


def test_pictures_are_those_of_the_tokenizer(nano: Any, scenes: Images) -> None:
    """A trace of single images shows what the network says, pixel by pixel."""
    found = tracing.trace(nano, scenes, "raster:1", 0)
    noise = torch.stack([nano.noise(seed) for seed in _seeds(scenes)])
    pixels = nano.one_step(found.codes[0, :1], found.offsets[0, :1], noise[:1])
    assert torch.equal(to_uint8(pixels)[0], found.one_step[0, 0])
    assert psnr(scenes.images, found.one_step[0]).shape == (2,)


def _seeds(inputs: Images) -> list[int]:
    from comit_bench.figures.inputs import noise_seeds

    return noise_seeds(inputs.names, 0)
