"""Figures: their numbers against calculations of a few lines, their files, and their commands."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.commands.figure import NEEDS
from comit_bench.errors import MissingError, UnsupportedOperation, UsageError
from comit_bench.figures import edit, evolution, policies, reconstruction, style, tracing
from comit_bench.figures.inputs import Images, decode, encode, generators, load_inputs, noise_seeds
from comit_bench.metrics.similarity import psnr
from comit_bench.seeding import generator_for, seed_for
from comit_bench.tokenizers.base import Tokens
from comit_bench.tokenizers.comit.codec import locate, one_step_decode, to_uint8
from comit_bench.tokenizers.comit.crops import GLOBAL
from comit_bench.tokenizers.load import load_tokenizer


@pytest.fixture(scope="module")
def nano() -> Any:
    return load_tokenizer("comit-nano", device="cpu")


@pytest.fixture(scope="module")
def scenes(nano: Any) -> Images:
    return load_inputs("scenes", nano.info, 3, 0)


def odd_folder(root: Path) -> Path:
    """Grey, transparent, elongated, named in Unicode, broken, and no image at all."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 4), dtype=np.uint8)
    (root / "sub dir").mkdir(parents=True)
    Image.fromarray(pixels[..., 0]).save(root / "grey.png")
    Image.fromarray(pixels).save(root / "alpha.png")
    Image.fromarray(pixels[..., :3]).resize((8, 200)).save(root / "sub dir" / "strip ☀.webp")
    (root / "broken.png").write_bytes(b"\x89PNG nothing")
    (root / "notes.txt").write_text("no image")
    return root


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["figure", *(str(one) for one in arguments)])


def check_files(figure: Any, folder: Path) -> tuple[bytes, bytes]:
    """Save a figure; its PDF and PNG are such files."""
    pdf, png = style.save(figure, folder / "name.with.dots")
    assert (pdf.name, png.name) == ("name.with.dots.pdf", "name.with.dots.png")
    assert pdf.read_bytes().startswith(b"%PDF-")
    assert b"CreationDate" not in pdf.read_bytes()
    with Image.open(png) as image:
        width, height = figure.get_size_inches()
        assert image.size == (int(width * style.DPI), int(height * style.DPI))
        assert np.asarray(image.convert("L")).std() > 5
    return pdf.read_bytes(), png.read_bytes()


def check_texts(figure: Any) -> None:
    """Texts outside the pictures lie on the page and do not cover each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts if text.get_text()]
    page = figure.bbox
    for number, box in enumerate(boxes):
        assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1
        assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1
        for other in boxes[:number]:
            assert not (box.shrunk(0.98, 0.9).overlaps(other.shrunk(0.98, 0.9)))


# ------------------------------------------------------------------- inputs


def test_the_choice_of_images_depends_on_names_and_seed(nano: Any) -> None:
    few, many = load_inputs("scenes", nano.info, 3, 0), load_inputs("scenes", nano.info, 10, 0)
    assert set(few.names) < set(many.names)
    assert list(many.names) == sorted(many.names)
    assert set(load_inputs("scenes", nano.info, 10, 1).names) != set(many.names)
    other = load_tokenizer("titok-nano", device="cpu")
    assert load_inputs("scenes", other.info, 3, 0).names == few.names
    everything = load_inputs("scenes", nano.info, None, 0)
    assert len(everything) == 200
    assert everything.masks is not None and len(everything.masks) == 200
    row = everything.names.index(few.names[0])
    assert torch.equal(everything.images[row], few.images[0])
    assert everything.masks[row].stem == few.paths[0].stem


def test_a_folder_gives_what_can_be_read(tmp_path: Path, nano: Any, caplog: Any) -> None:
    folder = odd_folder(tmp_path / "in")
    found = load_inputs(str(folder), nano.info, 10, 0)
    assert found.names == ("alpha.png", "grey.png", "sub dir/strip ☀.webp")
    assert found.images.shape == (3, 3, 32, 32) and found.masks is None
    assert "broken.png" in caplog.text
    one = load_inputs(str(folder), nano.info, 1, 0)
    assert one.names[0] == min(found.names, key=lambda name: seed_for(0, f"figure/{name}"))


def test_what_gives_no_images_is_refused(tmp_path: Path, nano: Any) -> None:
    with pytest.raises(MissingError, match="no such folder"):
        load_inputs(str(tmp_path / "scene"), nano.info, 3, 0)
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(MissingError, match="none of its 1"):
        load_inputs(str(tmp_path), nano.info, 3, 0)
    with pytest.raises(UsageError, match="--count 0"):
        load_inputs("scenes", nano.info, 0, 0)


def test_psnr_by_hand() -> None:
    one = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    two = one.clone()
    two[0, 0, 0, 0] = 100  # one of 48 values
    expected = 20 * math.log10(255) - 10 * math.log10(100**2 / 48)
    values = psnr(one, two)
    assert values[0] == pytest.approx(expected)
    assert values[1] == 100


def test_batches_change_nothing(nano: Any, scenes: Images) -> None:
    tokens = [encode(nano, scenes, policy="random:3", batch=size) for size in (1, 2, 32)]
    assert all(torch.equal(tokens[0].codes, one.codes) for one in tokens)
    seeds = noise_seeds(scenes.names, 0)
    images = [decode(nano, tokens[0], seeds, batch=size) for size in (1, 2, 32)]
    assert all(torch.equal(images[0], one) for one in images)


# --------------------------------------------------------------------- style


def test_the_same_figure_is_the_same_bytes_and_the_session_stays(tmp_path: Path) -> None:
    import matplotlib

    @style.styled
    def draw() -> Any:
        figure = style.new_figure(2, 1, layout="constrained")
        figure.subplots().plot([1, 2], [3, 4], label="x")
        return figure

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30.0, "lines.linewidth": 9.0}):
        loud = check_files(draw(), tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert check_files(draw(), tmp_path) == loud


def test_file_names_hold_no_folders() -> None:
    assert style.file_stem("edit", "cvg-unibe/comit-l") == "edit-cvg-unibe-comit-l"
    assert style.file_stem("a", "", "../b") == "a-..-b"
    assert "/" not in style.file_stem("x" * 500) and len(style.file_stem("x" * 500)) == 150


def test_galleries_stay_readable_when_they_are_wide() -> None:
    picture = np.zeros((3, 8, 8), dtype=np.uint8)
    figure, axes = style.gallery(
        [[picture] * 30, [None] * 30], row_labels=["a-very-long-name-of-a-tokenizer", "b"],
        captions=[None, ["12.3 dB"] * 30],
    )  # fmt: skip
    assert figure.get_size_inches()[0] > 30 * style.LEAST_CELL
    assert axes[0][0].get_position().width * figure.get_size_inches()[0] == pytest.approx(style.LEAST_CELL)
    assert len(axes[0][0].images) == 1 and not axes[1][0].images
    check_texts(figure)


# ------------------------------------------------------------ reconstruction


def test_reconstruction_is_encode_and_decode(nano: Any, scenes: Images, tmp_path: Path) -> None:
    oracle = load_tokenizer("pixel-oracle", device="cpu")
    data = reconstruction.compute([nano, oracle], [scenes, scenes], policy="random:2", seed=4)
    name = scenes.names[1]
    tokens = nano.encode(scenes.images[1:2], policy="random:2", generators=[generator_for(4, name)])
    image = nano.decode(tokens, seeds=[seed_for(4, name)])[0]
    np.testing.assert_array_equal(data.images[0][1], image.numpy())
    error = ((image.double() - scenes.images[1].double()) ** 2).mean()
    assert data.psnr[0, 1] == pytest.approx(float(10 * torch.log10(255**2 / error)))
    assert (data.psnr[1] == 100).all()  # the oracle loses nothing
    figure = reconstruction.draw(data)
    assert len(figure.axes) == 3 * len(scenes)  # equal originals are shown once
    check_texts(figure)
    check_files(figure, tmp_path)


def test_worst_and_best_are_those_of_the_first_tokenizer(nano: Any, scenes: Images) -> None:
    data = reconstruction.compute([nano], [scenes], seed=1)
    for best, order in ((False, np.argsort(data.psnr[0])), (True, np.argsort(-data.psnr[0]))):
        two = reconstruction.extremes(data, 2, best=best)
        assert two.names == tuple(data.names[i] for i in order[:2])
        np.testing.assert_array_equal(two.images[0], data.images[0][order[:2]])
        np.testing.assert_array_equal(two.originals[0], data.originals[0][order[:2]])
        np.testing.assert_array_equal(two.psnr, data.psnr[:, order[:2]])


def test_originals_that_differ_are_shown_twice(nano: Any, scenes: Images) -> None:
    oracle = load_tokenizer("pixel-oracle", device="cpu", resolution=16, patch=4)
    small = load_inputs("scenes", oracle.info, 3, 0)
    data = reconstruction.compute([nano, oracle], [scenes, small])
    texts = [text.get_text() for text in reconstruction.draw(data).texts]
    assert "original 32 px" in texts and "original 16 px" in texts
    with pytest.raises(ValueError, match="same images"):
        reconstruction.compute([nano, oracle], [scenes, replace(small, names=("a", "b", "c"))])


def test_what_cannot_decode_is_one_clear_error(nano: Any, scenes: Images) -> None:
    class Blind:
        info = nano.info
        encode = nano.encode

        def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> torch.Tensor:
            raise UnsupportedOperation("no decoder was released")

    blind: Any = Blind()
    with pytest.raises(UnsupportedOperation, match=r"comit-nano cannot decode.*no decoder was released"):
        reconstruction.compute([blind], [scenes])


# ------------------------------------------------------- evolution, policies


@pytest.mark.parametrize("policy", ["raster:3", "random:4", "global+adaptive:4", "adaptive:3"])
def test_a_trace_ends_with_the_message_and_shows_what_it_says(nano: Any, scenes: Images, policy: str) -> None:
    found = tracing.trace(nano, scenes, policy, 0)
    tokens = encode(nano, scenes, policy=policy)
    assert torch.equal(found.codes[-1], tokens.codes)
    assert tokens.offsets is not None
    assert torch.equal(found.offsets[-1], tokens.offsets)
    for k, cells in enumerate(found.cells):
        assert torch.equal(found.offsets[k], -locate(nano.model, cells, 32))
    if "adaptive" in policy:
        return
    noise = torch.stack([nano.noise(seed) for seed in noise_seeds(scenes.names, 0)])
    with torch.inference_mode():
        latents = one_step_decode(nano.model, found.codes[-1], found.offsets[-1], noise)
        pixels = nano.model.vae.decode(latents)
    difference = (to_uint8(pixels).int() - found.one_step[-1].int()).abs()
    assert int(difference.max()) <= 1  # another batch size may round differently


def test_adaptive_maps_are_those_that_chose(nano: Any, scenes: Images) -> None:
    found = tracing.trace(nano, scenes, "adaptive:5", 0)
    own = generators(scenes.names, 0)
    steps = nano.messages(scenes.images, nano.policy("adaptive:5"), own).steps
    for k in range(4):
        torch.testing.assert_close(found.errors[k], steps[k].scores)
        for i in range(len(scenes)):
            seen = set(found.cells[: k + 1, i].tolist())
            allowed = [cell for cell in range(9) if cell not in seen]
            errors = found.errors[k, i].flatten()
            assert int(found.cells[k + 1, i]) == max(allowed, key=lambda cell: float(errors[cell]))


def test_errors_by_region_by_hand(nano: Any, scenes: Images) -> None:
    data = evolution.compute(nano, scenes, policy="global+raster:3", seed=0)
    assert data.cells[:, 0].tolist() == [GLOBAL, 0, 1]
    geometry = nano.model.spec.geometry
    side, stride = geometry.crop, geometry.stride(32)
    assert data.boxes[:, 0].tolist() == [[0, 0, 32], [0, 0, side], [stride, 0, side]]
    # rounding to uint8 and clipping move a value of [-1, 1] a little
    seen = data.one_step[2, 1].astype(np.float64) / 127.5 - 1
    truth = data.images[1].astype(np.float64) / 127.5 - 1
    region = (slice(None), slice(stride, stride + side), slice(2 * stride, 2 * stride + side))
    by_hand = ((seen - truth)[region] ** 2).sum(axis=0).mean()
    assert data.errors[2, 1, 1, 2] == pytest.approx(by_hand, rel=0.1, abs=0.01)
    whole = 10 * np.log10(255**2 / ((data.one_step[2, 1].astype(float) - data.images[1]) ** 2).mean())
    assert data.psnr[2, 1] == pytest.approx(whole)


def test_a_trace_does_not_depend_on_its_batch(nano: Any) -> None:
    many = load_inputs("scenes", nano.info, 11, 0)
    one = Images(many.names[9:10], many.images[9:10], many.paths[9:10])
    for policy in ("random:3", "adaptive:3"):
        alone, among = tracing.trace(nano, one, policy, 0), tracing.trace(nano, many, policy, 0)
        for name in ("cells", "codes", "offsets", "one_step", "errors"):
            assert torch.equal(getattr(alone, name)[:, 0], getattr(among, name)[:, 9]), name


@pytest.mark.parametrize("policy", ["adaptive:2", "global+random:10"])
def test_evolution_is_drawn(nano: Any, scenes: Images, tmp_path: Path, policy: str) -> None:
    data = evolution.compute(nano, scenes, policy=policy)
    figure = evolution.draw(data)
    steps = data.cells.shape[0]
    assert len(figure.axes) == 3 * 3 * steps
    numbers = [text.get_text() for text in figure.axes[2 * steps].texts]
    assert numbers == [evolution.short(100 * value) for value in data.errors[0, 0].flatten()]
    check_texts(figure)
    check_files(figure, tmp_path)


def test_only_comit_has_crops(scenes: Images) -> None:
    other = load_tokenizer("titok-nano", device="cpu")
    for compute in (evolution.compute, policies.compute, policies.compute_curves):
        with pytest.raises(UnsupportedOperation, match="titok-nano does not build its message crop by crop"):
            compute(other, scenes)


def test_policies_are_reconstructions(nano: Any, scenes: Images, tmp_path: Path) -> None:
    data = policies.compute(nano, scenes, policies=("global", "GLOBAL+random:4"), seed=2)
    assert data.policies == ("global", "global+random:4")
    for number, name in enumerate(data.policies):
        other = reconstruction.compute([nano], [scenes], policy=name, seed=2)
        np.testing.assert_array_equal(data.reconstructions[number], other.images[0])
        np.testing.assert_allclose(data.psnr[number], other.psnr[0])
    figure = policies.draw(data)
    check_texts(figure)
    check_files(figure, tmp_path)
    with pytest.raises(UsageError, match="unknown cropping policy"):
        policies.compute(nano, scenes, policies=("spiral:3",))


def test_curves_are_those_of_the_policies_with_fewer_crops(nano: Any, scenes: Images, tmp_path: Path) -> None:
    data = policies.compute_curves(nano, scenes, crops=3, seed=1)
    assert data.orders == ("raster", "random", "adaptive")
    assert data.one_step.shape == data.full.shape == (3, 3, 3)
    for number, order in enumerate(data.orders):
        other = reconstruction.compute([nano], [scenes], policy=f"{order}:2", seed=1)
        np.testing.assert_allclose(data.full[number, 1], other.psnr[0])
    tokens = encode(nano, scenes, policy="raster:2", seed=1)
    assert tokens.offsets is not None
    seeds = noise_seeds(scenes.names, 1)
    seen = tracing.one_step_images(nano, tokens.codes, tokens.offsets, seeds)
    np.testing.assert_allclose(data.one_step[0, 1], psnr(scenes.images, seen))
    figure = policies.draw_curves(data)
    line, _, (bars,) = figure.axes[1].containers[2].lines
    np.testing.assert_allclose(line.get_ydata(), data.full[2].mean(axis=-1))
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(data.full[2, 0].std(ddof=1) / math.sqrt(3))
    check_files(figure, tmp_path)
    lonely = replace(data, one_step=data.one_step[..., :1], full=data.full[..., :1])
    check_files(policies.draw_curves(lonely), tmp_path)  # one image has no standard error


# ---------------------------------------------------------------------- edit


def test_swapped_positions_come_from_b(nano: Any, tmp_path: Path) -> None:
    pairs = load_inputs("scenes", nano.info, 4, 0)
    data = edit.compute(nano, pairs, span=3, starts=(0, 13))
    assert data.spans == ((0, 3), (13, 16), (0, 8), (0, 16))
    assert data.prefixes == 2
    assert data.names == ((pairs.names[0], pairs.names[1]), (pairs.names[2], pairs.names[3]))
    ids = nano.encode(pairs.images).ids
    mixed = ids[2].clone()
    mixed[13:] = ids[3, 13:]
    tokens = Tokens(mixed[None], nano.codes_from_ids(mixed[None]), torch.zeros(1, 2))
    image = nano.decode(tokens, seeds=[seed_for(0, pairs.names[2])])[0].numpy()
    np.testing.assert_array_equal(data.edited[1, 1], image)
    a, b = data.reconstructions[1].astype(float)
    to_a, to_b = (math.sqrt(((image - end) ** 2).mean()) for end in (a, b))
    assert data.way[1, 1] == pytest.approx(to_a / (to_a + to_b))
    np.testing.assert_array_equal(data.edited[:, -1], data.reconstructions[:, 1])  # the whole of B
    assert (data.way[:, -1] == 1).all()
    figure = edit.draw(data)
    check_texts(figure)
    check_files(figure, tmp_path)


def test_continuous_messages_are_swapped_too() -> None:
    oracle = load_tokenizer("pixel-oracle", device="cpu")
    pair = load_inputs("scenes", oracle.info, 2, 0)
    data = edit.compute(oracle, pair)
    expected = pair.images[0].clone()
    expected[:, :8] = pair.images[1][:, :8]  # the first quarter: four of sixteen patches, the upper row
    np.testing.assert_array_equal(data.edited[0, 0], expected.numpy())


def test_impossible_edits_are_refused(nano: Any, scenes: Images) -> None:
    with pytest.raises(UsageError, match="pairs of images, got 3"):
        edit.compute(nano, scenes)
    pair = Images(scenes.names[:2], scenes.images[:2], scenes.paths[:2])
    for settings in ({"span": 17}, {"span": 0}, {"starts": (-1,)}, {"span": 4, "starts": (13,)}):
        with pytest.raises(UsageError, match="does not lie in a message of 16"):
            edit.compute(nano, pair, **settings)


def test_of_many_spans_eight_are_shown(nano: Any, scenes: Images) -> None:
    pair = Images(scenes.names[:2], scenes.images[:2], scenes.paths[:2])
    data = edit.compute(nano, pair, span=1)
    assert data.spans[:8] == tuple((start, start + 1) for start in (0, 2, 4, 6, 9, 11, 13, 15))
    figure = edit.draw(data)
    assert figure.get_size_inches()[0] == pytest.approx(style.FULL)
    check_texts(figure)


def test_equal_images_have_no_way_between_them(nano: Any, scenes: Images) -> None:
    twice = Images(("a", "b"), scenes.images[:1].expand(2, -1, -1, -1), scenes.paths[:1] * 2)
    data = edit.compute(nano, twice)
    assert np.isnan(data.way).all()
    assert "1–4" in [text.get_text() for text in edit.draw(data).texts]


# ------------------------------------------------------------------ commands


def test_ls_names_every_command_and_what_it_needs() -> None:
    done = run("ls")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*NEEDS]
    commands = {command.name for command in app_commands()}
    assert NEEDS.keys() == commands - {"ls"}
    assert any("COMiT only" in line for line in lines if line.startswith("evolution"))


def app_commands() -> list[Any]:
    from comit_bench.commands.figure import app as figures

    return list(figures.registered_commands)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (
            ["reconstruction", "-t", "comit-nano", "-t", "titok-nano"],
            ["reconstruction-comit-nano+titok-nano"],
        ),
        (["evolution", "--policy", "raster:2"], ["evolution-comit-nano-raster-2"]),
        (["evolution", "--policy", "ADAPTIVE:6"], ["evolution-comit-nano"]),
        (
            ["policies", "--policy", "global", "--curve-count", 1],
            ["policies-comit-nano", "policies-curves-comit-nano"],
        ),
        (["edit", "-t", "vq-grid-nano", "--span", 8], ["edit-vq-grid-nano"]),
    ],
)
def test_commands_write_both_files_and_print_them(
    tmp_path: Path, arguments: list[object], names: list[str]
) -> None:
    images = "scenes" if "policies" in arguments else odd_folder(tmp_path / "in")
    out = tmp_path / "out"
    done = run(*arguments, "--images", images, "--count", 2, "--output", out, "--device", "cpu")
    assert done.exit_code == 0, done.output
    expected = [str(out / f"{name}.{kind}") for name in names for kind in ("pdf", "png")]
    assert done.stdout.splitlines() == expected
    assert sorted(path.name for path in out.iterdir()) == sorted(Path(path).name for path in expected)


def test_a_command_with_random_weights_and_one_that_cannot(tmp_path: Path) -> None:
    done = run("reconstruction", "--weights", "random", "--count", 1, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    wrong = run("evolution", "-t", "titok-nano", "--output", tmp_path)
    assert isinstance(wrong.exception, UnsupportedOperation)
    assert not list(tmp_path.glob("evolution*"))


def test_a_policy_that_means_nothing_is_said(scenes: Images, caplog: Any) -> None:
    titok = load_tokenizer("titok-nano", device="cpu")
    with_policy = encode(titok, scenes, policy="raster:9")
    assert "titok-nano looks at whole images" in caplog.text
    assert torch.equal(with_policy.codes, encode(titok, scenes).codes)


def test_png_opens(nano: Any, scenes: Images, tmp_path: Path) -> None:
    """The picture in the figure is the picture: its pixels can be found in the PNG."""
    data = reconstruction.compute([nano], [scenes])
    figure = reconstruction.draw(data)
    _, png = check_files(figure, tmp_path)
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGB"))
    place = figure.axes[4].get_position()  # second reconstruction
    height, width = pixels.shape[:2]
    row = int((1 - (place.y0 + place.height * (1 - 10.5 / 32))) * height)
    column = int((place.x0 + place.width * 20.5 / 32) * width)
    assert pixels[row, column].tolist() == data.images[0][1][:, 10, 20].tolist()
