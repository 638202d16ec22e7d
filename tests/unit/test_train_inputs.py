"""Training from Hugging Face data sets and WebDataset shards: the same run as from class folders."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from image_sets import image_files, write_folder, write_shards
from safetensors.torch import load_file
from versions import needs_muon

from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.train.config import DataConfig, TrainConfig, load_config
from comit_bench.train.data import Steps, TrainBatch, iterate_steps, open_images
from comit_bench.train.loop import Trainer
from comit_bench.train.objectives.comit_card import training_data
from comit_bench.train.sources import DecodedImages

ONLY_GLOBAL = "max_crops: 1, count_global: true, global_first: 1, global_first_among: encoded"
GLOBAL_FIRST = f"curriculum=[{{until: 1, {ONLY_GLOBAL}}}]"
TINY = (
    "model.depth=1", "model.width=16", "model.heads=2", "model.message_length=4",
    "model.representation_layer=0", "global_batch=8", "data.val_count=4", "optim.warmup_steps=2",
    GLOBAL_FIRST, "save_every=1", "validate_every=100", "log_every=2", "steps=4", "keep_last=50",
)  # fmt: skip
COUNT = 21
SOURCES = ("class-folders", "webdataset", "imagefolder", "parquet", "saved")
READ_BY_US = SOURCES[1:]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()


def rows(files: dict[str, bytes]) -> Dataset:
    names = sorted(files, reverse=True)  # any order: ids decide
    return Dataset.from_dict(
        {"picture": [{"bytes": files[name], "path": name} for name in names], "name": names},
        features=Features({"picture": Image(), "name": Value("string")}),
    )


def write_source(
    kind: str, root: Path, train: dict[str, bytes], val: dict[str, bytes] | None = None
) -> tuple[str, ...]:
    """Write the images in one form; returns the overrides that name it. Without ``val``: no splits."""
    if kind in ("class-folders", "imagefolder"):
        write_folder(root, train | (val or {}))
        return (f"data.kind={'hf' if kind == 'imagefolder' else kind}", f"data.source={root}")
    if kind == "webdataset":
        write_shards(root / "train" if val else root, train, 3)
        if val:
            write_shards(root / "val", val, 2)
        return ("data.kind=webdataset", f"data.source={root}")
    splits = {"train": rows(train)} | ({"validation": rows(val)} if val else {})
    if kind == "saved":
        DatasetDict(splits).save_to_disk(str(root), num_shards={k: min(2, len(v)) for k, v in splits.items()})
        return ("data.kind=hf", f"data.source={root}", "data.id_key=name")
    (root / "data").mkdir(parents=True)
    for name, table in splits.items():
        table.to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")
    return ("data.kind=hf", f"data.source={root}")


def settings(*overrides: str) -> TrainConfig:
    return load_config("comit-nano", (*TINY, *overrides))


def batches(config: TrainConfig, start: int = 0, **ranks: int) -> list[TrainBatch]:
    steps = Steps(config, open_images(config)[0], **ranks)
    return list(iterate_steps(steps, start, workers=config.data.workers, pin=False))


def assert_equal(one: TrainBatch, other: TrainBatch) -> None:
    assert (one.step, one.ids, one.broken) == (other.step, other.ids, other.broken)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.plan.noise, other.plan.noise)


def broken_set() -> dict[str, bytes]:
    """21 images, three of them damaged in different ways."""
    files = image_files(COUNT, below="train/")
    names = sorted(files)
    for name, content in zip(names[3:9:2], (b"", b"no image", files[names[7]][:200]), strict=True):
        files[name] = content
    return files


@pytest.mark.parametrize("kind", READ_BY_US)
def test_every_form_gives_the_batches_of_class_folders(tmp_path: Path, kind: str) -> None:
    """PNG, JPEG in RGB, grey and CMYK, WebP and BMP; ids, order, pixels and noise over two epochs."""
    files = image_files(COUNT, below="train/"), image_files(6, below="val/", start=60)
    plain = settings(*write_source("class-folders", tmp_path / "plain", *files))
    other = settings(*write_source(kind, tmp_path / "other", *files))
    for one, two in zip(batches(plain), batches(other), strict=True):
        assert_equal(one, two)
    for source in open_images(other):
        assert isinstance(source, DecodedImages)
    held, held_other = open_images(plain)[1], open_images(other)[1]
    assert list(held.ids) == list(held_other.ids)
    assert len(held.ids) == 4
    assert all(torch.equal(held.read(i), held_other.read(i)) for i in range(4))


@pytest.mark.parametrize("kind", READ_BY_US)
def test_validation_images_are_held_out_alike(tmp_path: Path, kind: str) -> None:
    files = image_files(30, below="train/")
    plain = open_images(settings(*write_source("class-folders", tmp_path / "plain", files)))
    other = open_images(settings(*write_source(kind, tmp_path / "other", files)))
    assert [tuple(part.ids) for part in plain] == [tuple(part.ids) for part in other]
    assert [len(part.ids) for part in other] == [27, 3]


@pytest.mark.parametrize("kind", READ_BY_US)
def test_ranks_and_workers_change_nothing(tmp_path: Path, kind: str) -> None:
    source = write_source(kind, tmp_path / "set", broken_set())
    whole = batches(settings(*source))
    assert any(batch.broken for batch in whole)
    for one, two in zip(whole, batches(settings(*source, "data.workers=2")), strict=True):
        assert_equal(one, two)
    for ranks in (2, 4):
        parts = [batches(settings(*source), rank=rank, ranks=ranks) for rank in range(ranks)]
        for batch, *pieces in zip(whole, *parts, strict=True):
            assert sum((piece.ids for piece in pieces), ()) == batch.ids
            assert torch.equal(torch.cat([piece.images for piece in pieces]), batch.images)


@pytest.mark.parametrize("kind", READ_BY_US)
def test_continuing_reads_nothing_of_the_past(tmp_path: Path, kind: str) -> None:
    """Step 3 of 8 images lies in the second epoch of 19; only its own images are read."""
    config = settings(*write_source(kind, tmp_path / "set", image_files(COUNT, below="train/")))
    straight = batches(config)
    images, _ = open_images(config)
    assert isinstance(images, DecodedImages)
    seen: list[int] = []

    class Watched:
        ids = images.source.ids
        where = staticmethod(images.source.where)

        def read(self, index: int) -> bytes:
            seen.append(index)
            return images.source.read(index)

    watched = DecodedImages(Watched(), images.rows, images.ids, images.recipe)
    (last,) = iterate_steps(Steps(config, watched), 3, workers=0, pin=False)
    assert_equal(last, straight[3])
    assert len(seen) == config.global_batch
    assert {watched.source.ids[i] for i in seen} == {name.rpartition("@")[0] for name in last.ids}
    assert any(name.endswith("@1") for name in last.ids)


@needs_muon
@pytest.mark.parametrize("kind", READ_BY_US)
def test_broken_images_are_named_replaced_and_limited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    files = broken_set()
    names = sorted(files)
    source = write_source(kind, tmp_path / "set", files, image_files(4, below="val/", start=60))
    trainer = run(tmp_path / "a", *source, "data.max_broken=0.15", "steps=6")  # 48 of 21: all are met
    assert trainer.objective.broken.seen == {names[3], names[5], names[7]}
    for name in trainer.objective.broken.seen:
        (said,) = [r.getMessage() for r in caplog.records if f"{name}: " in r.getMessage()]
        assert said.startswith("broken image, replaced by the next: ")
    steps = trainer.steps
    for batch in batches(trainer.config):
        for place, name in enumerate(batch.ids):
            if name.partition("@")[0] in trainer.objective.broken.seen:
                slot = steps.order.places(batch.step, 8)[place : place + 1]
                seen = trainer.objective.broken.seen
                after = next(
                    index
                    for shift in range(1, COUNT)
                    if names[index := int(steps.order.numbers(slot, shift))] not in seen
                )
                assert torch.equal(batch.images[place], steps.source.read(after))
    with pytest.raises(
        BenchError, match=r"of 21 training images are broken \(train/.*data\.max_broken = 0\.1"
    ):
        run(tmp_path / "b", *source, "data.max_broken=0.1", "steps=6")


def run(output: Path, *overrides: str) -> Trainer:
    trainer = Trainer(settings(f"output={output}", *overrides), device="cpu", progress=False)
    trainer.fit()
    return trainer


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    folder = output / "comit-nano" / "checkpoints" / f"step-{step:08d}"
    parts = ("model", "ema", "optimizer")
    found = {f"{p}.{k}": v for p in parts for k, v in load_file(folder / f"{p}.safetensors").items()}
    assert len(found) > 10
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain")
    torch.set_num_threads(1)
    run(output, *write_source("class-folders", output / "images", *run_images()))
    return output


def run_images() -> tuple[dict[str, bytes], dict[str, bytes]]:
    return image_files(COUNT, below="train/"), image_files(6, below="val/", start=60)


@needs_muon
@pytest.mark.parametrize("kind", READ_BY_US)
def test_the_run_equals_that_from_class_folders_bit_for_bit(
    plain_run: Path, tmp_path: Path, kind: str
) -> None:
    """With two workers, and stopped in the middle of the first epoch."""
    source = (*write_source(kind, tmp_path / "set", *run_images()), "data.workers=2")
    run(tmp_path, *source, "steps=2")
    run(tmp_path, *source)
    assert not all(torch.equal(v, weights(plain_run, 1)[k]) for k, v in weights(plain_run, 4).items())
    for step in (2, 4):
        assert_same(weights(plain_run, step), weights(tmp_path, step))
    rows_of = [
        [line.split(",")[:6] for line in (root / "comit-nano" / "validation.csv").read_text().splitlines()]
        for root in (plain_run, tmp_path)
    ]
    assert rows_of[0][-1] == rows_of[1][-1]


@needs_muon
def test_other_images_under_the_same_settings_are_refused(tmp_path: Path) -> None:
    source = write_source("webdataset", tmp_path / "set", *run_images())
    run(tmp_path, *source, "steps=1")
    other = write_source(
        "webdataset", tmp_path / "other", image_files(COUNT + 1, below="train/"), run_images()[1]
    )
    with pytest.raises(UsageError, match="the list of training images"):
        run(tmp_path, *other, "steps=2")
    (tmp_path / "set").rename(tmp_path / "moved")
    run(tmp_path, *source[:1], f"data.source={tmp_path}/moved", "steps=2")


def test_a_shard_that_vanishes_stops_the_run_without_blaming_an_image(tmp_path: Path) -> None:
    config = settings(*write_source("webdataset", tmp_path / "set", *run_images()))
    steps = Steps(config, open_images(config)[0])
    for path in (tmp_path / "set" / "train").iterdir():
        path.unlink()
    with pytest.raises(MissingError, match=r"shard-\d+\.tar: no such shard"):
        list(iterate_steps(steps, 0, workers=0, pin=False))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.kind=hf",), r"data\.kind hf needs data\.source: give data\.source=DIR or OWNER/NAME"),
        (("data.kind=webdataset",), r"webdataset needs data\.source: give data\.source=DIR or DIR/\{000"),
        (("data.source=x",), r"data\.source is for data\.kind class-folders or hf or webdataset, .* scenes"),
        (
            ("data.kind=class-folders", "data.source=x", "data.image_key=jpg"),
            r"image_key is for data\.kind hf or",
        ),
        (("data.kind=webdataset", "data.source=x", "data.id_key=a"), r"id_key is for data\.kind hf, but"),
        (("data.kind=webdataset", "data.source=x", "data.subset=a"), r"subset is for data\.kind hf, but"),
        (
            ("data.kind=hf", "data.source=x", "data.val_source=y"),
            r"val_source is for data\.kind webdataset, but",
        ),
        (("data.kind=webdatset",), r"data\.kind = 'webdatset'"),
        (("data.image_kex=jpg",), "image_key"),
    ],
)
def test_settings_that_contradict_each_other(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settings(*overrides)


def opened(*overrides: str) -> None:
    open_images(settings(*overrides))


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    saved = write_source("saved", tmp_path / "saved", *run_images())
    with pytest.raises(UsageError, match=r"data\.split: .* no split 'trian'\. Did you mean 'train'"):
        opened(*saved, "data.split=trian")
    with pytest.raises(UsageError, match=r"data\.val_split: .* no split 'test'"):
        opened(*saved, "data.val_split=test")
    with pytest.raises(UsageError, match=r"data\.split and data\.val_split are both 'train'"):
        opened(*saved, "data.val_split=train")
    one = tmp_path / "one"
    rows(run_images()[0]).save_to_disk(str(one))
    with pytest.raises(UsageError, match=r"data\.val_split 'val': .* has no named splits"):
        opened("data.kind=hf", f"data.source={one}", "data.val_split=val")
    shards = write_source("webdataset", tmp_path / "shards", run_images()[0])
    with pytest.raises(UsageError, match=r"data\.split: .* is no directory with folders part/ and val/"):
        opened(*shards, "data.split=part")


def test_shards_for_validation_of_their_own(tmp_path: Path) -> None:
    train, val = run_images()
    write_shards(tmp_path / "t", train, 2)
    write_shards(tmp_path / "v", val, 1)
    pattern = f"data.source={tmp_path}/t/shard-{{000000..000001}}.tar"
    images, held = open_images(
        settings("data.kind=webdataset", pattern, f"data.val_source={tmp_path}/v/*.tar")
    )
    assert list(images.ids) == sorted(train)
    assert set(held.ids) < set(val)
    with pytest.raises(UsageError, match=r"shard-000000\.tar: named by data\.source and by data\.val_source"):
        opened("data.kind=webdataset", pattern, f"data.val_source={tmp_path}/t/*0.tar")


@pytest.mark.parametrize("kind", ["webdataset", "saved"])
def test_sets_that_are_too_small(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="3 images; training and validation need 4 or more"):
        opened(*write_source(kind, tmp_path / "few", image_files(3)))
    with pytest.raises(UsageError, match="one validation image"):
        opened(*write_source(kind, tmp_path / "one", image_files(5), image_files(1, start=60)))


def test_a_truncated_shard_stops_before_the_first_step(tmp_path: Path) -> None:
    source = write_source("webdataset", tmp_path / "set", *run_images())
    path = tmp_path / "set" / "train" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-11_000])
    with pytest.raises(CorruptFileError, match=r"shard-000001\.tar: .*truncated"):
        run(tmp_path, *source)
    assert not (tmp_path / "comit-nano" / "checkpoints").exists()


def test_the_data_have_a_name_in_tables(tmp_path: Path) -> None:
    def name(**data: str) -> str:
        config = settings()
        return training_data(config.model_copy(update={"data": DataConfig(**data)}))  # type: ignore[arg-type]

    assert name(kind="hf", source="ILSVRC/imagenet-1k") == "ILSVRC/imagenet-1k"
    assert name(kind="hf", source=str(tmp_path)) == tmp_path.name
    assert name(kind="webdataset", source="/data/in1k-{000..146}.tar") == "in1k-{000..146}.tar"


def test_the_fixture_holds_what_it_says() -> None:
    """Colour, grey and CMYK."""
    from PIL import Image as pil

    modes = {pil.open(io.BytesIO(content)).mode for content in image_files(12).values()}
    assert modes == {"RGB", "L", "CMYK"}
