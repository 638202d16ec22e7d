"""The two tokenizers without a network: visual words and raw patches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from comit_bench.errors import CorruptFileError, MissingError, UnsupportedOperation, UsageError
from comit_bench.tokenizers import kmeans
from comit_bench.tokenizers.base import Tokenizer, Tokens
from comit_bench.tokenizers.kmeans import KMeansPatchTokenizer
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.pixels import PixelOracleTokenizer, from_codes, from_patches, to_codes, to_patches


def make_images(count: int, *, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth colour fields with some noise: neighbouring patches are alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 226, (count, 3, 4, 4), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    noise = torch.randint(0, 30, (count, 3, side, side), generator=generator)
    return (smooth + noise).to(torch.uint8)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return make_images(96)


@pytest.fixture(scope="module")
def words(images: Tensor) -> KMeansPatchTokenizer:
    return KMeansPatchTokenizer.fit(images, vocab=64, training_data="colour fields")


def brute_force(patches: Tensor, centroids: Tensor) -> Tensor:
    """Lowest id among the nearest centroids, in whole numbers."""
    distances = (patches.long()[:, None] - centroids.long()[None]).square().sum(-1)
    return torch.tensor([row.index(min(row)) for row in distances.tolist()])


def test_both_satisfy_the_contract(words: KMeansPatchTokenizer) -> None:
    oracle = PixelOracleTokenizer()
    assert isinstance(words, Tokenizer)
    assert isinstance(oracle, Tokenizer)
    assert (words.info.kind, words.info.trained, words.info.message_length) == ("baseline", True, 16)
    assert (words.info.vocab_size, words.info.code_dim, words.info.parameters) == (64, 192, 64 * 192)
    assert words.info.weights.startswith("fitted:")
    assert words.info.training_data == "colour fields"
    assert (oracle.info.kind, oracle.info.weights, oracle.info.vocab_size) == ("reference", "none", None)
    assert (oracle.info.message_length, oracle.info.code_dim) == (16, 192)
    assert oracle.info.preprocessing == words.info.preprocessing


def test_pixels_come_back_exactly(images: Tensor) -> None:
    oracle = PixelOracleTokenizer()
    tokens = oracle.encode(images)
    assert tokens.ids is None
    assert tokens.codes.shape == (96, 16, 192)
    assert tokens.codes.dtype == torch.float32
    assert float(tokens.codes.min()) >= -1.0
    assert float(tokens.codes.max()) <= 1.0
    assert torch.equal(oracle.decode(tokens, seeds=[0] * 96), images)


def test_every_grey_level_survives_the_code_range() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    codes = to_codes(levels)
    assert (float(codes[0]), float(codes[255])) == (-1.0, 1.0)
    assert torch.equal(from_codes(codes), levels)
    assert from_codes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_patches_and_back(patch: int, grid: int, count: int) -> None:
    side = patch * grid
    batch = torch.arange(count * 3 * side * side).reshape(count, 3, side, side)
    patches = to_patches(batch, patch)
    assert patches.shape == (count, grid * grid, 3 * patch * patch)
    assert torch.equal(from_patches(patches, patch), batch)


def test_patches_are_in_raster_order() -> None:
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    image[0, 0, 0, 3] = 7  # top right pixel, red
    patches = to_patches(image, 2)
    assert patches[0, 1].tolist() == [0, 7, 0, 0] + [0] * 8
    assert int(patches.sum()) == 7


def test_ids_are_the_nearest_centroids(words: KMeansPatchTokenizer) -> None:
    batch = make_images(5, seed=7)
    ids = words.encode(batch).ids
    assert ids is not None
    assert ids.dtype == torch.int64
    assert torch.equal(ids.flatten(), brute_force(to_patches(batch, 8).flatten(0, 1), words.centroids))


def test_ties_go_to_the_lowest_id() -> None:
    centroids = torch.tensor([[0] * 3, [10] * 3, [20] * 3, [20] * 3], dtype=torch.uint8)
    tokenizer = KMeansPatchTokenizer(centroids, patch=1, resolution=2)
    image = torch.tensor([5, 15, 20, 255], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    ids = tokenizer.encode(image).ids
    assert ids is not None
    assert ids.tolist() == [[0, 1, 2, 2]]


@given(st.data())
def test_search_is_exact_at_the_extremes(data: st.DataObject) -> None:
    """Centroids that differ by one grey level in one value, far from the patch: the worst for rounding."""
    base = data.draw(st.sampled_from([0, 1, 254, 255]))
    centroids = torch.full((4, 192), base, dtype=torch.uint8)
    for row in range(4):
        place = data.draw(st.integers(0, 191))
        centroids[row, place] = data.draw(st.integers(max(base - 1, 0), min(base + 1, 255)))
    image = torch.full((1, 3, 8, 8), 255 - base, dtype=torch.uint8)
    tokenizer = KMeansPatchTokenizer(centroids, patch=8, resolution=8)
    ids = tokenizer.encode(image).ids
    assert ids is not None
    assert torch.equal(ids.flatten(), brute_force(image.reshape(1, 192), centroids))


@pytest.mark.parametrize("size", [1, 3, 7, 8, 64])
def test_batches_and_order_change_nothing(
    words: KMeansPatchTokenizer, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    batch = make_images(64, seed=3)
    whole = words.encode(batch)
    oracle = PixelOracleTokenizer()
    pixels = oracle.encode(batch).codes
    assert whole.ids is not None
    monkeypatch.setattr(kmeans, "SEARCH_ROWS", 11 * size)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(size))
    for rows in order.split(size):
        part = words.encode(batch[rows])
        assert part.ids is not None
        assert torch.equal(part.ids, whole.ids[rows])
        assert torch.equal(part.codes, whole.codes[rows])
        assert torch.equal(oracle.encode(batch[rows]).codes, pixels[rows])


def test_words_decode_to_their_centroids(words: KMeansPatchTokenizer) -> None:
    batch = make_images(4, seed=5)
    tokens = words.encode(batch)
    assert tokens.ids is not None
    pasted = words.decode(tokens, seeds=[0] * 4)
    assert (pasted.shape, pasted.dtype) == (batch.shape, torch.uint8)
    assert torch.equal(to_patches(pasted, 8), words.centroids[tokens.ids])
    assert torch.equal(words.codes_from_ids(tokens.ids), tokens.codes)
    assert torch.equal(tokens.codes, to_codes(words.centroids)[tokens.ids])
    again = words.encode(pasted)
    assert torch.equal(words.decode(again, seeds=[0] * 4), pasted)


def test_more_words_are_closer_to_the_image(images: Tensor) -> None:
    errors = []
    for vocab in (1, 8, 256):
        tokenizer = KMeansPatchTokenizer.fit(images, vocab=vocab)
        pasted = tokenizer.decode(tokenizer.encode(images), seeds=[0] * len(images))
        errors.append(float((pasted.float() - images.float()).square().mean()))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_one_word_is_nearly_the_mean_patch(images: Tensor) -> None:
    tokenizer = KMeansPatchTokenizer.fit(images, vocab=1)
    mean = to_patches(images, 8).flatten(0, 1).double().mean(0)
    assert (
        float((tokenizer.centroids[0].double() - mean).abs().max()) < 3
    )  # mini-batches draw with replacement


def test_fit_depends_on_images_and_settings_only(images: Tensor, words: KMeansPatchTokenizer) -> None:
    threads = torch.get_num_threads()
    pieces = [images[0], *images[1:50].split(7), images[50:]]  # single images and uneven batches
    same = KMeansPatchTokenizer.fit(iter(pieces), vocab=64)
    assert torch.equal(same.centroids, words.centroids)
    assert same.info.weights == words.info.weights
    assert torch.get_num_threads() == threads
    for other in (
        KMeansPatchTokenizer.fit(images, vocab=64, seed=1),
        KMeansPatchTokenizer.fit(images[:90], vocab=64),
        KMeansPatchTokenizer.fit(images, vocab=63),
    ):
        assert other.info.weights != words.info.weights


def test_sample_of_patches_ignores_batch_borders(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "MAX_PATCHES", 100)
    drawn = [
        kmeans._sample_patches(images.split(size), patch=8, resolution=32, seed=0) for size in (1, 7, 96)
    ]
    assert drawn[0].shape == (100, 192)
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] == drawn[2]).all()
    rows = {bytes(row): n for n, row in enumerate(to_patches(images, 8).flatten(0, 1).numpy())}
    places = [rows[bytes(row)] for row in drawn[0]]
    assert places == sorted(places)
    assert places[-1] > 96 * 16 / 2  # from the whole stream, not from its beginning


def test_words_run_from_dark_to_bright(words: KMeansPatchTokenizer) -> None:
    brightness = words.centroids.long().sum(1)
    assert torch.equal(brightness, brightness.sort().values)


def test_fewer_distinct_patches_than_words() -> None:
    flat = torch.tensor([10, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    tokenizer = KMeansPatchTokenizer.fit(flat, vocab=8)
    tokens = tokenizer.encode(flat)
    assert torch.equal(tokenizer.decode(tokens, seeds=[0, 0]), flat)


@pytest.mark.parametrize(("patch", "resolution", "length"), [(4, 32, 64), (8, 24, 9), (16, 64, 16)])
def test_other_sizes(patch: int, resolution: int, length: int) -> None:
    batch = make_images(4, side=resolution)
    tokenizer = KMeansPatchTokenizer.fit(batch, patch=patch, resolution=resolution, vocab=9)
    oracle = PixelOracleTokenizer(patch=patch, resolution=resolution)
    tokens = tokenizer.encode(batch)
    assert tokens.ids is not None
    assert tokens.ids.shape == (4, length)
    assert tokenizer.decode(tokens, seeds=[0] * 4).shape == batch.shape
    assert torch.equal(oracle.decode(oracle.encode(batch), seeds=[0] * 4), batch)


@pytest.mark.parametrize(
    ("resolution", "patch", "text"),
    [(30, 8, "resolution 24 or 32"), (4, 8, "take resolution 8"), (32, 0, "at least 1 pixel")],
)
def test_sizes_that_do_not_fit_name_those_that_do(resolution: int, patch: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        PixelOracleTokenizer(resolution=resolution, patch=patch)
    with pytest.raises(UsageError, match=text):
        KMeansPatchTokenizer.fit(make_images(2), resolution=resolution, patch=patch, vocab=2)


def test_images_of_another_size_or_type_are_refused(words: KMeansPatchTokenizer) -> None:
    for tokenizer in (words, PixelOracleTokenizer()):
        with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\], got uint8 \[2, 3, 64, 64\]"):
            tokenizer.encode(make_images(2, side=64))
        with pytest.raises(ValueError, match="got float32"):
            tokenizer.encode(make_images(2).float())
    with pytest.raises(ValueError, match=r"\[3, 32, 32\], got uint8 \[2, 3, 64, 64\]"):
        KMeansPatchTokenizer.fit(make_images(2, side=64), vocab=2)


def test_too_little_to_fit_on() -> None:
    with pytest.raises(UsageError, match="32 training patches are too few for 1024 centroids"):
        KMeansPatchTokenizer.fit(make_images(2))
    with pytest.raises(UsageError, match="0 training patches"):
        KMeansPatchTokenizer.fit([])
    with pytest.raises(UsageError, match=r"vocab must be .* from 1 .*got 0"):
        KMeansPatchTokenizer.fit(make_images(2), vocab=0)


def test_tokens_that_do_not_fit_are_refused(words: KMeansPatchTokenizer) -> None:
    codes = torch.zeros(1, 16, 192)
    for ids, text in (
        (None, "got none"),
        (torch.zeros(1, 15, dtype=torch.int64), r"got \[1, 15\]"),
        (torch.full((1, 16), 64), r"0\.\.63, got 64"),
        (torch.full((1, 16), -1), "got -1"),
    ):
        with pytest.raises(ValueError, match=text):
            words.decode(Tokens(ids, codes), seeds=[0])
    with pytest.raises(ValueError, match=r"0\.\.63, got 64"):
        words.codes_from_ids(torch.tensor([64]))
    oracle = PixelOracleTokenizer()
    with pytest.raises(ValueError, match=r"got \[1, 15, 192\]"):
        oracle.decode(Tokens(None, codes[:, :15]), seeds=[0])
    with pytest.raises(UnsupportedOperation, match="no ids"):
        oracle.codes_from_ids(torch.tensor([0]))


def test_a_policy_without_effect_is_said(
    words: KMeansPatchTokenizer, recwarn: pytest.WarningsRecorder
) -> None:
    batch = make_images(2)
    for tokenizer in (words, PixelOracleTokenizer()):
        tokenizer.encode(batch, policy="global")
        assert not recwarn.list
        with pytest.warns(UserWarning, match="'adaptive:3' has no effect"):
            tokenizer.encode(batch, policy="adaptive:3")


def test_saved_and_loaded(words: KMeansPatchTokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "words"
    words.save(folder)
    words.save(folder)  # replaces itself
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["words"]
    loaded = KMeansPatchTokenizer.load(folder)
    assert loaded.info == words.info
    assert torch.equal(loaded.centroids, words.centroids)


def test_missing_files_are_named(words: KMeansPatchTokenizer, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="nowhere"):
        KMeansPatchTokenizer.load(tmp_path / "nowhere")
    words.save(tmp_path / "words")
    (tmp_path / "words" / "model.safetensors").unlink()
    with pytest.raises(MissingError, match=r"model\.safetensors"):
        KMeansPatchTokenizer.load(tmp_path / "words")


def test_damaged_weights_are_refused(words: KMeansPatchTokenizer, tmp_path: Path) -> None:
    words.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", whole[:7], whole[:-1], whole + b"\0", whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
            KMeansPatchTokenizer.load(tmp_path)
    weights.write_bytes(whole)
    assert torch.equal(KMeansPatchTokenizer.load(tmp_path).centroids, words.centroids)


@pytest.mark.parametrize(
    "change",
    [
        {"family": "comit"},
        {"format": 99},
        {"patch": "8"},
        {"patch": 4},
        {"patch": 0},
        {"resolution": 33},
        {"vocab": 65},
        {"vocab": True},
        {"weights": "fitted:00"},
        {"training_data": None},
    ],
)
def test_changed_configuration_is_refused(
    words: KMeansPatchTokenizer, tmp_path: Path, change: dict[str, object]
) -> None:
    words.save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(CorruptFileError, match=str(tmp_path)):
        KMeansPatchTokenizer.load(tmp_path)


def test_fit_happens_once_per_settings_and_data(images: Tensor, tmp_path: Path) -> None:
    calls: list[str] = []

    def loader() -> Tensor:
        calls.append("loaded")
        return images

    def fitted(data: str, **settings: int) -> KMeansPatchTokenizer:
        return KMeansPatchTokenizer.fit_cached(loader, {"data": data}, tmp_path, **{"vocab": 32, **settings})

    first = fitted("a")
    assert torch.equal(fitted("a").centroids, first.centroids)
    assert len(calls) == 1
    fitted("b")
    fitted("a", seed=1)
    fitted("a", vocab=16)
    assert len(calls) == 4
    assert fitted("a").info == first.info
    assert len(calls) == 4


def test_a_damaged_fit_is_made_again(
    images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = KMeansPatchTokenizer.fit_cached(lambda: images, {}, tmp_path, vocab=16)
    (weights,) = tmp_path.rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-3])
    again = KMeansPatchTokenizer.fit_cached(lambda: images, {}, tmp_path, vocab=16)
    assert torch.equal(again.centroids, first.centroids)
    assert "model.safetensors" in caplog.text
    assert "Fitting it again" in caplog.text
    KMeansPatchTokenizer.load(weights.parent)


def test_the_one_way_in(words: KMeansPatchTokenizer, tmp_path: Path) -> None:
    words.save(tmp_path / "words")
    folder = str(tmp_path / "words")
    assert load_tokenizer(folder, device="cpu").info == words.info
    assert load_tokenizer("kmeans-patch", weights=folder, device="cpu", patch=8).info == words.info
    assert load_tokenizer("Pixel-Oracle", device="cpu", resolution=64, patch=16).info.message_length == 16


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("pixel-oracle", {"path": 8}, UsageError, "Did you mean 'patch'"),
        ("pixel-oracle", {"resolution": 30}, UsageError, "24 or 32"),
        ("kmeans-patch", {}, UsageError, "fitted on the images"),
        ("kmeans-patch", {"weights": "random"}, UsageError, "no random weights"),
        ("kmeans-patch", {"weights": "/nowhere/words"}, MissingError, "/nowhere/words"),
        ("WORDS", {"patch": 4}, UsageError, "fitted with patch 8, not 4"),
        ("WORDS", {"vocabulary": 4}, UsageError, "Did you mean 'vocab'"),
    ],
)
def test_loading_what_cannot_be(
    words: KMeansPatchTokenizer,
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    words.save(tmp_path / "words")
    with pytest.raises(error, match=text):
        load_tokenizer(str(tmp_path / "words") if name == "WORDS" else name, device="cpu", **options)
