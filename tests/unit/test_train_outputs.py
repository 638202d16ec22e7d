"""What a run leaves behind: event files, the validation picture, curves, the model card, small weights."""

from __future__ import annotations

import csv
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from comit_bench import load_tokenizer
from comit_bench.errors import BenchError, MissingError, UsageError
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.comit.checkpoint import build, save
from comit_bench.tokenizers.comit.codec import decode, encode, one_step_decode, to_uint8
from comit_bench.tokenizers.comit.crops import CropPolicy, parse_policy
from comit_bench.tokenizers.comit.model import PRESETS, Comit
from comit_bench.train import board, checkpoint, pictures
from comit_bench.train.card import RunFacts, front_matter
from comit_bench.train.config import TrainConfig, load_config
from comit_bench.train.curves import PANELS, draw_curves, save_curves
from comit_bench.train.data import open_images, read_all, to_pixels
from comit_bench.train.loop import Trainer
from comit_bench.train.objectives.comit_run import export
from comit_bench.train.pictures import COLOURS, GAP, LABEL, UNSEEN, Sheet, draw_sheet, picture_corners
from comit_bench.train.validation import GATHER, READ, _draws, float_psnr, read_out, validate

ONLY_GLOBAL = "max_crops: 1, count_global: true, global_first: 1, global_first_among: encoded"
GLOBAL_FIRST = f"curriculum=[{{until: 2, {ONLY_GLOBAL}}}]"
TINY = (
    "model.depth=1", "model.width=16", "model.heads=2", "model.message_length=4",
    "model.representation_layer=0", "global_batch=4", "data.count=12", "data.val_count=3",
    "optim.warmup_steps=4", GLOBAL_FIRST,
    "save_every=2", "validate_every=2", "log_every=1", "keep_last=50", "steps=6",
    "teacher.name=none", "objective.srepa_weight=0", "optim.name=adam",
)  # fmt: skip


def settings(output: Path, *overrides: str) -> TrainConfig:
    return load_config("comit-nano", (*TINY, f"output={output}", *overrides))


def train(output: Path, *overrides: str) -> Trainer:
    trainer = Trainer(settings(output, *overrides), device="cpu", progress=False)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("outputs")
    train(output, "tensorboard=true", "export.dtype=float16", "validation.steps=3")
    return output / "comit-nano"


# ------------------------------------------------------------------ TensorBoard


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars by tag; "picture" holds the steps of the pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / board.FOLDER), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    tags = read.Tags()
    found = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["images"]:
        found[tag] = [(e.step, float(len(e.encoded_image_string))) for e in read.Images(tag)]
    return found


def rows(run: Path, name: str) -> list[dict[str, str]]:
    with (run / name).open() as stream:
        return list(csv.DictReader(stream))


def assert_events_are_the_logs(run: Path) -> None:
    found = events(run)
    for group, name in (("train", "log.csv"), ("validation", "validation.csv")):
        logged = rows(run, name)
        for column in logged[0].keys() - {"step"}:
            expected = [(int(row["step"]), float(row[column])) for row in logged]
            assert [step for step, _ in found[f"{group}/{column}"]] == [step for step, _ in expected]
            values = [value for _, value in found[f"{group}/{column}"]]
            assert values == pytest.approx([value for _, value in expected], rel=1e-6), column
    assert [step for step, _ in found["validation/picture"]] == [2, 4, 6]
    assert all(size > 1000 for _, size in found["validation/picture"])


def test_events_hold_what_the_csv_logs_hold(finished: Path) -> None:
    assert len(rows(finished, "log.csv")) == 6
    columns = (finished / "log.csv").read_text().split("\n", 1)[0].split(",")
    assert len(columns) == 12 and set(events(finished)) >= {f"train/{name}" for name in columns[1:]}
    assert_events_are_the_logs(finished)


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    """Killed after step 5, the last checkpoint is that of step 4."""
    train(tmp_path, "tensorboard=true", "steps=5")
    run = tmp_path / "comit-nano"
    shutil.rmtree(checkpoint.folder(run / "checkpoints", 5))
    assert [step for step, _ in events(run)["train/flow"]] == [1, 2, 3, 4, 5]
    train(tmp_path, "tensorboard=true", "steps=6")
    assert len(list((run / board.FOLDER).glob("events.*"))) == 2
    assert_events_are_the_logs(run)


def test_switched_on_later_the_events_start_with_the_first_row(tmp_path: Path) -> None:
    train(tmp_path, "steps=2")
    run = tmp_path / "comit-nano"
    assert not (run / board.FOLDER).exists()
    train(tmp_path, "tensorboard=true", "steps=4")
    assert [step for step, _ in events(run)["train/flow"]] == [1, 2, 3, 4]
    assert [step for step, _ in events(run)["validation/val_flow"]] == [2, 4]


def test_without_tensorboard_the_run_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(board, "version", absent)
    with pytest.raises(MissingError, match=r'pip install "comit-bench\[track\]"'):
        train(tmp_path, "tensorboard=true")
    assert not list(tmp_path.iterdir())
    board.check_tensorboard(False)


# ----------------------------------------------------------------------- picture


def sheet(corners: list[list[list[int]]], count: int = 2) -> Sheet:
    """Images of 32 px in plain colours: 200 (image), 90 (one step), 40 (guided)."""

    def plain(value: int) -> torch.Tensor:
        return torch.full((count, 3, 32, 32), value, dtype=torch.uint8)

    return Sheet(plain(200), torch.tensor(corners), 12, plain(90), plain(40), "3 steps\nguidance 2")


def test_the_picture_shows_rows_crops_in_order_and_what_was_not_seen() -> None:
    whole, first, second = [-1, -1], [2, 5], [20, 20]
    picture = draw_sheet(sheet([[whole, first], [first, second]]))
    factor, step = 5, 160 + GAP
    assert picture.size == (LABEL + 2 * step, GAP + 4 * step)

    def at(row: int, column: int, x: float, y: float) -> tuple[int, int, int]:
        place = (LABEL + column * step + int(x * factor), GAP + row * step + int(y * factor))
        found = picture.getpixel(place)
        assert isinstance(found, tuple)
        return found

    def colour(name: str) -> tuple[int, int, int]:
        return tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))  # type: ignore[return-value]

    assert [at(row, 0, 16, 28)[0] for row in (0, 2, 3)] == [200, 90, 40]
    assert at(1, 0, 31.8, 16) == colour(COLOURS[0])  # frame of the whole image
    assert at(1, 0, 16.8, 8) == colour(COLOURS[1])  # right side of a crop at top 2, left 5
    assert at(1, 0, 25, 25)[0] == 200  # seen, because the whole image was
    assert at(1, 1, 10, 10)[0] == 200  # inside the first local crop
    assert at(1, 1, 28, 5)[0] == int(200 * UNSEEN)
    assert at(1, 1, 31.8, 28) == colour(COLOURS[1])  # the second crop reaches to 32
    labels = picture.crop((0, 0, LABEL, picture.height)).convert("L")
    for row in range(4):
        assert labels.crop((0, GAP + row * step, LABEL, (row + 1) * step)).getextrema()[0] < 60


def test_crops_of_the_picture_follow_the_configuration(tmp_path: Path) -> None:
    ids = tuple(f"image/{n}" for n in range(40))
    corners = picture_corners(settings(tmp_path), ids)
    assert corners.shape == (4, 40, 2)
    whole = (corners[0] == -1).all(dim=1)
    assert 10 <= int(whole.sum()) <= 34  # 55 % of 40
    assert (corners[1:] >= 0).all()
    assert (corners <= 32 - 12).all()
    again = picture_corners(settings(tmp_path), ids[::-1]).flip(1)
    assert torch.equal(again, corners)
    alone = picture_corners(settings(tmp_path, "crops.max_crops=1", "crops.global_first=1"), ids)
    assert alone.tolist() == [[[-1, -1]] * 40]
    two = picture_corners(settings(tmp_path, "validation.picture_crops=2"), ids)
    assert two.shape[0] == 2


def test_the_picture_shows_the_message_of_its_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On crops of the grid it must be what the tokenizer's own policy gives."""
    config = settings(tmp_path, "validation.steps=2")
    model = build(config.model.spec()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.predictor.parameters():  # large, so that the message matters
            parameter.normal_(0, 0.3, generator=generator)
    images = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(2, 12, 8, 8, generator=generator)
    corners = torch.tensor([[-1, -1], [0, 0], [20, 10]])  # whole, cell 0, cell 7 (stride 10)
    seen = {}
    for name, used, policy in (
        ("three", corners, CropPolicy(order=(0, 1, 8), global_crop=True)),
        ("one", corners[:1], CropPolicy(global_crop=True, num_crops=1)),
    ):
        monkeypatch.setattr(pictures, "picture_corners", lambda *_, c=used: c[:, None].expand(-1, 2, -1))
        made = pictures.make_sheet(model, config, images, noise, ("a", "b"))
        with torch.inference_mode():
            message = encode(model, images, policy)
            one = one_step_decode(model, message.codes, message.offset, noise)
            sampled = decode(model, message.codes, message.offset, noise, steps=2).latents
        assert (made.one_step.int() - to_uint8(model.vae.decode(one)).int()).abs().max() <= 1
        assert (made.guided.int() - to_uint8(model.vae.decode(sampled)).int()).abs().max() <= 1
        seen[name] = made.one_step
    assert (seen["three"].int() - seen["one"].int()).abs().max() > 20


def test_guidance_and_steps_are_settings(tmp_path: Path) -> None:
    values = {}
    for name, more in {
        "default": (),
        "same": ("validation.steps=10", "validation.guidance=7.5"),
        "short": ("validation.steps=2",),
        "free": ("validation.guidance=1",),
    }.items():
        trainer = train(tmp_path / name, "steps=2", "optim.learning_rate=0.05", *more)
        values[name] = trainer.metrics
    assert values["default"] == values["same"]
    for name in ("short", "free"):
        assert values[name]["psnr_guided"] != values["default"]["psnr_guided"]
        assert values[name]["psnr_one_step"] == values["default"]["psnr_one_step"]


# -------------------------------------------------------------- card and curves


def test_the_card_tells_how_it_was_made(finished: Path) -> None:
    folder = finished / "export" / "comit-nano"
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["license"] == "apache-2.0"
    assert matter["library_name"] == "comit-bench"
    assert "comit" in matter["tags"]
    assert all(isinstance(tag, str) for tag in matter["tags"])
    for part in (
        "12 images, 2.00 epochs", "steps: 6 of 4 images, 24 images in all (0 steps skipped",
        "stored as float16", "measured before rounding", "wall time: 0.", "CPU with", "probability 0.1;",
        "minus the location of the last crop", "no alignment",
        "first one the whole image with probability 0.55",
        "optimizer: Adam; peak learning rate 0.002 after 4 steps, then a cosine to 5 % at step 3,000",
        "3 images that were not trained on",
        "PSNR of guided reconstructions (dB; 3 steps, weight 7.5)", "attention mask: hard; seed 0",
        "![Reconstructions](reconstructions.png)", "![Learning curves](curves.png)",
    ):  # fmt: skip
        assert part in " ".join(body.split()), part
    for name in ("reconstructions.png", "curves.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 600
    settings_text = body.rsplit("```yaml\n", 1)[1].rsplit("```", 1)[0]
    assert TrainConfig(**yaml.safe_load(settings_text)).export.dtype == "float16"


def test_the_front_matter_is_what_the_hub_accepts(tmp_path: Path) -> None:
    from huggingface_hub import ModelCardData

    for licence, expected in (("MIT", {"license": "mit"}), ("Some Licence 2.0", {"license": "other"})):
        matter = front_matter(settings(tmp_path, f"weights_licence={licence}"))
        assert matter.items() >= expected.items()
        assert ModelCardData(**matter).to_dict() == matter
        if matter["license"] == "other":
            assert matter["license_name"] == "some-licence-2.0"
    assert "license_name" not in front_matter(settings(tmp_path, "weights_licence=CC-BY-4.0"))


def test_curves_show_the_logs(finished: Path, tmp_path: Path) -> None:
    figure = draw_curves(finished)
    for axes, (title, lines) in zip(figure.axes, PANELS, strict=True):
        assert axes.get_title() == title
        assert len(axes.lines) == len(lines)
        for line, (log, column, _) in zip(axes.lines, lines, strict=True):
            logged = rows(finished, f"{log}.csv")
            assert list(line.get_ydata()) == [float(row[column]) for row in logged]
            assert list(line.get_xdata()) == [int(row["step"]) for row in logged]
    assert not save_curves(tmp_path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


# ------------------------------------------------------------------------- gather


def lively(config: TrainConfig) -> Comit:
    """A network whose message depends on everything that it sees."""
    model = build(config.model.spec()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.predictor.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def test_gather_measures_the_messages_of_the_policies(tmp_path: Path) -> None:
    """Each column against its own encoding, image by image."""
    config = settings(tmp_path, "data.val_count=5", "validation.gather=4")
    held = read_all(open_images(config)[1])
    assert held.labels is not None
    model = lively(config)
    values, _ = validate(model, config, held, device=torch.device("cpu"), batch=3)
    vectors: dict[str, list[torch.Tensor]] = {policy: [] for policy in READ.values()}
    with torch.no_grad():
        for column, policy in GATHER.items():
            found = []
            for row, name in enumerate(held.ids[:4]):
                image = to_pixels(held.images[row : row + 1], torch.device("cpu"))
                order = [generator_for(0, f"gather/{name}")]
                sent = encode(model, image, parse_policy(policy), generators=order)
                noise = _draws(config, model, (name,))[1]
                drawn = model.codec.decode(one_step_decode(model, sent.codes, sent.offset, noise))
                found.append(float(float_psnr(image, drawn)))
                if policy in vectors:
                    vectors[policy].append(sent.codes.flatten())
            assert values[column] == pytest.approx(sum(found) / 4, abs=1e-3), column
    assert len({round(values[column], 6) for column in GATHER}) == 5
    for column, policy in READ.items():
        assert values[column] == read_out(torch.stack(vectors[policy]), held.labels[:4])


def test_the_read_out_is_a_ridge_regression() -> None:
    from sklearn.linear_model import Ridge

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    vectors = torch.randn(120, 6, generator=generator) + 1.2 * torch.eye(3, 6)[labels]
    order = torch.randperm(120, generator=generator_for(0, "read-out"))
    fit, rest = order[::2], order[1::2]
    x = (vectors - vectors[fit].mean(0)) / vectors[fit].std(0, unbiased=False)
    ridge = Ridge(alpha=6.0).fit(x[fit].numpy(), torch.eye(3)[labels[fit]].numpy())
    right = ridge.predict(x[rest].numpy()).argmax(1) == labels[rest].numpy()
    assert read_out(vectors, labels) == pytest.approx(right.mean())
    assert 0.6 < right.mean() < 1.0
    assert read_out(vectors, labels + 7) == pytest.approx(right.mean())


def test_logs_and_card_show_what_was_gathered(finished: Path) -> None:
    (*_, last) = rows(finished, "validation.csv")
    card = (finished / "export" / "comit-nano" / "README.md").read_text()
    for column, policy in {**GATHER, **READ}.items():
        assert float(last[column]) >= 0
        assert f"`{policy}`" in card
    assert "| one-step PSNR from the crops `random:9` (dB) |" in card


# ------------------------------------------------------------------ half precision


def test_half_precision_weights_load_and_tokenize(finished: Path) -> None:
    folder = finished / "export" / "comit-nano"
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    averages = load_file(checkpoint.folder(finished / "checkpoints", 6) / "ema.safetensors")
    assert all(torch.equal(stored[f"predictor.{key}"], value.half()) for key, value in averages.items())
    tokenizer = load_tokenizer(str(folder), device="cpu")
    assert {p.dtype for p in tokenizer.model.parameters()} == {torch.float32}
    tokens = tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert tokens.codes.dtype == torch.float32


def test_comit_nano_in_half_precision_is_small_enough_to_ship(tmp_path: Path) -> None:
    model = build(PRESETS["comit-nano"])
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    config = load_config("comit-nano", ("export.dtype=float16",))
    facts = RunFacts(1, 0, 64, 64, 2, 1.0, "one machine", "", {"val_flow": 1.0})
    export(model.eval(), config, facts, tmp_path / "nano", picture=None)
    assert sum(path.stat().st_size for path in (tmp_path / "nano").iterdir()) <= 5_000_000
    images = torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    tokenizer = load_tokenizer(str(tmp_path / "nano"), device="cpu")
    ids = tokenizer.encode(images).ids
    assert ids is not None
    assert ids.shape == (4, 16)
    save(model, tmp_path / "whole")
    exact = load_tokenizer(str(tmp_path / "whole"), device="cpu", family="comit").encode(images).ids
    assert exact is not None
    assert (ids == exact).float().mean() > 0.9
    with torch.no_grad():
        next(model.parameters()).fill_(1e5)
    with pytest.raises(BenchError, match="not finite as float16"):
        export(model, config, facts, tmp_path / "large", picture=None)
    assert not (tmp_path / "large").exists()


def test_new_settings_do_not_stop_old_checkpoints(finished: Path, tmp_path: Path) -> None:
    config = settings(tmp_path)
    saved = config.model_dump(mode="json")
    for key in ("validation", "export", "tensorboard", "push_to_hub"):
        del saved[key]
    del saved["teacher"]["cache_dtype"]
    assert checkpoint.config_differences(saved, config) == []
    saved["objective"]["skip"] = 0.5
    assert checkpoint.config_differences(saved, config) == ["objective.skip: 0.5 -> 0.1"]
    with pytest.raises(UsageError, match="cache_dtype without a cache"):
        settings(tmp_path, "teacher.cache=none", "teacher.cache_dtype=float16")
