"""Controls on the messages, and the text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.nn.text import random_t5, word_ids, words_of
from comit_bench.probing.fit import Examples, FitTask, MessageSource, build_probe
from comit_bench.recipes.kinds import TextSpec
from comit_bench.recipes.specs import ProbeSpec
from comit_bench.tasks.controls import check_control, controlled_messages, token_orders
from comit_bench.tasks.text import find_text_encoder

COUNT, LENGTH = 240, 4


def by_order(seed: int) -> tuple[Tensor, Tensor]:
    """Two special tokens in every message; the class is which of them comes first."""
    generator = torch.Generator().manual_seed(seed)
    codes = 0.1 * torch.randn(COUNT, LENGTH, 3, generator=generator)
    labels = torch.randint(2, (COUNT,), generator=generator)
    places = torch.rand(COUNT, LENGTH, generator=generator).argsort(dim=1)[:, :2].sort(dim=1).values
    rows = torch.arange(COUNT)
    codes[rows, places[rows, labels], 0] += 1
    codes[rows, places[rows, 1 - labels], 1] += 1
    return codes, labels


def share_right(control: str | None) -> float:
    splits = {}
    for seed, name in enumerate(("train", "early_stop", "report")):
        codes, labels = by_order(seed)
        source = controlled_messages(
            MessageSource(codes=codes), control, lambda name=name: [f"{name}/{i}" for i in range(COUNT)]
        )
        splits[name] = Examples(source, labels)
    spec = ProbeSpec(
        width=16, depth=2, heads=2, batch_size=32, learning_rate=1e-2, max_epochs=10, patience=10
    )
    task = FitTask(spec=spec, outputs=2, **splits, positions=control != "bag-of-tokens")
    outputs = task.fit(0).outputs
    assert outputs is not None
    return float((outputs.argmax(1) == splits["report"].targets).double().mean())


def test_what_only_the_order_tells_is_lost_without_it() -> None:
    assert share_right(None) > 0.9
    for control in ("shuffle-tokens", "bag-of-tokens"):
        assert abs(share_right(control) - 0.5) < 3 * (0.25 / COUNT) ** 0.5, control


def test_shuffled_messages_keep_their_tokens() -> None:
    codes, _ = by_order(0)
    names = [f"a/{i}" for i in range(COUNT)]
    shuffled = controlled_messages(MessageSource(codes=codes), "shuffle-tokens", lambda: names).take(
        torch.arange(COUNT)
    )
    assert not torch.equal(shuffled, codes)
    assert torch.equal(shuffled.sort(dim=1).values, codes.sort(dim=1).values)
    orders = token_orders(names, LENGTH)
    assert torch.equal(token_orders(names[5:6], LENGTH)[0], orders[5])  # an image's order is its own
    assert len(orders.unique(dim=0)) > 10
    disk = MessageSource(read=lambda rows: codes[rows], count=COUNT)
    again = controlled_messages(disk, "shuffle-tokens", lambda: names).take(torch.arange(COUNT))
    assert torch.equal(again, shuffled)
    plain = MessageSource(codes=codes)
    assert controlled_messages(plain, "permute-labels", lambda: names) is plain


def test_a_bag_has_no_order() -> None:
    codes, _ = by_order(1)
    spec = ProbeSpec(width=16, depth=2, heads=2)
    bag = build_probe(spec, code_shape=(LENGTH, 3), outputs=2, seed=0, positions=False)
    usual = build_probe(spec, code_shape=(LENGTH, 3), outputs=2, seed=0)
    turned = codes.flip(1)
    torch.testing.assert_close(bag(codes), bag(turned), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(usual(codes), usual(turned), atol=1e-2)


def test_messages_on_disk_give_the_same_probe() -> None:
    spec = ProbeSpec(width=16, depth=1, heads=2, batch_size=32, learning_rate=1e-2, max_epochs=3, patience=3)
    found = []
    for disk in (False, True):
        splits: dict[str, Any] = {}
        for seed, name in enumerate(("train", "early_stop", "report")):
            codes, labels = by_order(seed)
            read = MessageSource(read=lambda rows, codes=codes: codes[rows], count=COUNT)
            splits[name] = Examples(read if disk else MessageSource(codes=codes), labels)
        found.append(FitTask(spec=spec, outputs=2, **splits).fit(0).outputs)
    assert torch.equal(found[0], found[1])  # type: ignore[arg-type]


def test_unknown_control() -> None:
    with pytest.raises(UsageError, match="shuffle-tokens"):
        check_control("shuffle-token")


def test_random_t5_depends_on_the_text_alone(tmp_path: Path) -> None:
    encoder = find_text_encoder(TextSpec(), offline=True)
    texts = ["red three", "left of", "blue three"]
    vectors = encoder.features([*texts, "red three"], tmp_path)
    assert vectors.shape == (4, 64) and torch.equal(vectors[0], vectors[3])
    alone = encoder.features(["red three"], None)
    torch.testing.assert_close(alone[0], vectors[0], rtol=0, atol=0)
    other = find_text_encoder(TextSpec(seed=1), offline=True)
    assert other.identity != encoder.identity
    assert not torch.allclose(other.features(texts, None), vectors[:3], atol=0.1)
    cosine = torch.cosine_similarity
    assert cosine(vectors[0], vectors[2], dim=0) > cosine(vectors[0], vectors[1], dim=0)
    (path,) = (tmp_path / "text").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptFileError, match="damaged text features"):
        encoder.features([*texts, "red three"], tmp_path)
    with pytest.raises(UsageError, match="has no word"):
        encoder.features([" "], None)


def test_random_t5_is_frozen_by_its_keys() -> None:
    """The words of a vocabulary and the version of torch's initialisation change no vector."""
    words = ["above", "red"]
    state = torch.get_rng_state()
    model = random_t5(words, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    wider = random_t5(["above", "new", "red"], seed=0)
    for name, parameter in model.named_parameters():
        if "shared" not in name and "embed_tokens" not in name:
            assert torch.equal(parameter, wider.get_parameter(name)), name
    ids, mask = word_ids(["red", "above red"], words)
    assert ids.tolist() == [[3, 1, 0], [2, 3, 1]] and mask.sum().item() == 5
    assert words_of("Next-to  a TREE!") == ["next", "-", "to", "a", "tree", "!"]


def test_released_encoder_from_a_directory(tmp_path: Path) -> None:
    """A T5 as it lies on the hub, small: word pieces, safetensors, padding does not matter."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["above", "red"]
    random_t5(words, seed=0).save_pretrained(tmp_path)
    vocabulary = {"<pad>": 0, "</s>": 1, "above": 2, "red": 3}
    pieces = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    found = find_text_encoder(TextSpec(encoder=str(tmp_path)), offline=True)
    assert found.identity["weights"].startswith("sha256:")
    expected = find_text_encoder(TextSpec(), offline=True).features(["above red", "red"], None)
    torch.testing.assert_close(found.features(["above red", "red"], None), expected, rtol=1e-5, atol=1e-5)


def test_missing_encoders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"config.json, model.safetensors.*text.encoder"):
        find_text_encoder(TextSpec(encoder=str(tmp_path)), offline=True)
    with pytest.raises(MissingError, match=r"google-t5/t5-none.*hf download"):
        find_text_encoder(TextSpec(encoder="google-t5/t5-none"), offline=True)
