"""The reference row ``supervised-cnn``: pixels, and a convolutional network in front of the probe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_images, write_recipes
from torch import Tensor

import comit_bench
from comit_bench.errors import UsageError
from comit_bench.pipeline.jobs import Settings, make_jobs
from comit_bench.pipeline.plan import make_plan
from comit_bench.pipeline.session import Session
from comit_bench.pipeline.suite import with_references
from comit_bench.probing.fit import Examples, FitTask, MessageSource, build_probe
from comit_bench.probing.stem import ConvStem
from comit_bench.recipes.specs import ProbeSpec
from comit_bench.results.schema import protocol_digest
from comit_bench.tokenizers.contract import check_tokenizer
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.registry import find_tokenizer

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
SPEC = ProbeSpec(
    width=16, depth=1, heads=2, mlp_ratio=1, batch_size=32, learning_rate=4e-3, max_epochs=6, patience=6
)


def bars(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Uint8 images [count, 3, 32, 32] with one bar of any colour anywhere; whether it stands."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(2, (count,), generator=generator)
    for image, stands in zip(images, labels.tolist(), strict=True):
        y, x = torch.randint(24, (2,), generator=generator).tolist()
        colour = torch.randint(150, 256, (3, 1, 1), generator=generator, dtype=torch.uint8)
        image[:, y : y + (9 if stands else 2), x : x + (2 if stands else 9)] = colour
    return images, labels


def fit(name: str, **changes: Any) -> tuple[float, Tensor]:
    """Share of bars that are told apart, and the outputs."""
    tokenizer: Any = load_tokenizer(name, device="cpu")
    splits: dict[str, Any] = {}
    for seed, (role, count) in enumerate((("train", 512), ("early_stop", 128), ("report", 256))):
        images, labels = bars(count, seed)
        splits[role] = Examples(MessageSource(codes=tokenizer.encode(images).codes), labels)
    spec = SPEC.model_copy(update=changes)
    outputs = FitTask(spec=spec, outputs=2, **splits, stem=bool(tokenizer.info.stem)).fit(0).outputs
    assert outputs is not None
    return float((outputs.argmax(1) == splits["report"].targets).double().mean()), outputs


def test_it_learns_what_patches_do_not_show() -> None:
    assert fit("supervised-cnn")[0] > 0.97 > 0.95 > fit("pixel-oracle")[0]


def test_a_fit_is_the_same_twice() -> None:
    first, again = (fit("supervised-cnn", max_epochs=1)[1] for _ in "ab")
    assert torch.equal(first, again)


def test_the_map_has_at_most_sixteen_places() -> None:
    for side, patch, places in ((32, 8, 16), (64, 8, 16), (64, 4, 16), (256, 16, 16), (48, 8, 9), (8, 8, 4)):
        shape = ((side // patch) ** 2, 3 * patch**2)
        probe = build_probe(SPEC, code_shape=shape, outputs=3, seed=0, stem=True)
        assert probe.message_length == places
        assert probe(torch.zeros(2, *shape)).shape == (2, 3)


def test_the_network_sees_the_image_and_not_its_patches() -> None:
    """Other patches of the same image give the same answer."""
    images, _ = bars(3, 0)
    answers: list[Tensor] = []
    for patch in (8, 4):
        codes = load_tokenizer("supervised-cnn", device="cpu", patch=patch).encode(images).codes
        shape = (codes.shape[1], codes.shape[2])
        answers.append(build_probe(SPEC, code_shape=shape, outputs=2, seed=0, stem=True)(codes))
    assert torch.allclose(answers[0], answers[1], atol=1e-6) and answers[0].std() > 0.01


def test_an_answer_does_not_depend_on_the_rest_of_a_batch() -> None:
    codes = load_tokenizer("supervised-cnn", device="cpu").encode(bars(6, 0)[0]).codes
    probe = build_probe(SPEC, code_shape=(16, 192), outputs=2, seed=0, stem=True, extra=(3, 5)).train()
    texts = torch.randn(6, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    whole = probe.forward_groups(codes, texts)
    assert torch.allclose(whole[:2], probe.forward_groups(codes[:2], texts[:2]), atol=1e-5)
    assert torch.allclose(whole[:, 1], probe(codes, texts[:, 1]), atol=1e-5)


def test_probes_of_other_rows_start_as_they_did() -> None:
    probe = build_probe(SPEC, code_shape=(4, 12), outputs=2, seed=0)
    assert not [name for name in probe.state_dict() if "stem" in name]
    assert float(probe.project.weight.detach().std()) == pytest.approx(12**-0.5, rel=0.3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"message_length": 15}, "got 15 tokens of 192 values"),
        ({"code_dim": 191}, "got 16 tokens of 191 values"),
        ({"code_dim": 1}, "got 16 tokens of 1 values"),
        ({"stem": "resnet"}, "stem 'resnet' .one of '', 'cnn'."),
    ],
)
def test_tokens_that_are_no_square_image_are_refused(changes: dict[str, Any], says: str) -> None:
    tokenizer: Any = load_tokenizer("supervised-cnn", device="cpu")
    tokenizer.info = replace(tokenizer.info, **changes)
    with pytest.raises(UsageError, match=says) as error:
        check_tokenizer(tokenizer, "my tokenizer")
    assert str(error.value).startswith("my tokenizer: ")


def test_a_probe_refuses_them_too() -> None:
    with pytest.raises(UsageError, match="square image of RGB patches"):
        ConvStem(15, 192)


def test_it_is_a_reference_that_is_asked_for_by_name() -> None:
    info: Any = load_tokenizer("Supervised-CNN", device="cpu").info
    assert (info.name, info.kind, info.stem, info.weights) == ("supervised-cnn", "reference", "cnn", "none")
    assert find_tokenizer("supervised-cnn").family is find_tokenizer("pixel-oracle").family
    assert "supervised-cnn" not in with_references(["comit-nano"], "scenes")  # not yet in the default run


def test_records_name_the_network_and_those_of_other_rows_stay(tmp_path: Path) -> None:
    """Both rows read one store; only the protocol of the new one has a stem."""
    write_images(tmp_path / "data", train=10, val=6)
    write_recipes(tmp_path / "recipes")
    pixels, cnn = comit_bench.evaluate(
        ["pixel-oracle", "supervised-cnn"], ["tiny-colours"], suite="scenes", references=False, seeds=1,
        data_root=tmp_path / "data", include=(tmp_path / "recipes",), cache=tmp_path / "cache",
        output=tmp_path / "out", device="cpu",
    )  # fmt: skip
    (path,) = (REFERENCE / "pixel-oracle").glob("recognition-scenes-*.json")
    committed = json.loads(path.read_text())["protocol"]["tokenizer"]
    assert pixels.protocol["tokenizer"] == committed
    assert cnn.protocol["tokenizer"] == {**committed, "stem": {"name": "cnn", "version": "1"}}
    assert cnn.protocol_digest == protocol_digest(cnn.protocol) != pixels.protocol_digest
    assert cnn.tokenizer.name == "supervised-cnn" and cnn.outcomes is not None
    assert cnn.metrics["hue"].value > 50
    assert len(list((tmp_path / "cache" / "tokens").rglob("about.json"))) == 2  # of two splits


def test_controls(tmp_path: Path) -> None:
    write_images(tmp_path / "data", train=10, val=6)
    write_recipes(tmp_path / "recipes")
    options: dict[str, Any] = {
        "suite": "scenes", "references": False, "seeds": 1, "data_root": tmp_path / "data", "device": "cpu",
        "include": (tmp_path / "recipes",), "cache": tmp_path / "cache", "output": tmp_path / "out",
    }  # fmt: skip
    (moved,) = comit_bench.evaluate(["supervised-cnn"], ["tiny-colours"], control="shuffle-tokens", **options)
    assert moved.control == "shuffle-tokens"
    assert (
        comit_bench.evaluate(["supervised-cnn"], ["tiny-colours"], control="bag-of-tokens", **options) == []
    )


def test_tasks_that_fit_no_probe_leave_it_out(tmp_path: Path) -> None:
    settings = Settings(cache=tmp_path)
    jobs = make_jobs(["supervised-cnn", "pixel-oracle"], ["retrieval-scenes"], settings)
    plan = make_plan(jobs, Session(settings), dry=True)
    ((job, reason),) = plan.refused
    assert job.label == "supervised-cnn" and "retrieval fits none" in reason
    assert [part.job.label for part in plan.jobs] == ["pixel-oracle"]
