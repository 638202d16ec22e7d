"""Under bfloat16 autocast: what decides an id, and every autoencoder, computes in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_tokenizers import ROUNDING, SD_NANO, SMALL_TOKENIZERS, pictures, seeded, small_sd_vae, streams
from torch import Tensor, nn

from comit_bench.nn.precision import exact_products
from comit_bench.nn.vae import DctVae
from comit_bench.tokenizers.base import autocast
from comit_bench.tokenizers.comit.model import PRESETS, Comit
from comit_bench.train.config import TrainConfig
from comit_bench.train.objectives.comit import TrainingModule
from comit_bench.train.sampling import plan_step

CPU = torch.device("cpu")
# The layers between a network and its quantizer, and the autoencoders, by tokenizer.
FLOAT32 = {
    "comit-nano": ("predictor.r_final_layer",),
    "comit-sd": ("predictor.r_final_layer", "vae."),
    "titok-nano": ("encoder.conv_out",),
    "titok-legacy": ("encoder.conv_out",),
    "vq-grid-nano": ("encoder.norm", "encoder.head"),
    "alit": ("encoder_ln_post", "pre_quantizer_mlp", "base_tokenizer."),
    "alit-halting": ("encoder_ln_post", "pre_quantizer_mlp", "base_tokenizer."),
    "alit-vae": ("encoder_ln_post", "pre_quantizer_mlp", "base_tokenizer."),
    "flextok": ("encoder.module_dict.enc_to_latents", "vae."),
    "selftok": ("encoder.quantizer", "encoder.final_layer_norm3", "vae."),
    "selftok-renderer": ("encoder.quantizer", "encoder.final_layer_norm3", "vae."),
    "vqmodel": ("quant_conv",),
}


def types_of_outputs(model: nn.Module, run: Any) -> dict[str, set[torch.dtype]]:
    """Name of every module without children -> types of the floats it gave while ``run`` was running."""
    seen: dict[str, set[torch.dtype]] = {}
    hooks = []
    for name, module in model.named_modules():
        if any(True for _ in module.children()):
            continue

        def note(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
            if isinstance(out, Tensor) and out.is_floating_point():
                seen.setdefault(name, set()).add(out.dtype)

        hooks.append(module.register_forward_hook(note))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def both_ways(tokenizer: Any) -> None:
    tokens = tokenizer.encode(pictures(tokenizer, 3), generators=streams(3))
    tokenizer.decode(tokens, seeds=range(3))


@pytest.mark.parametrize("name", ROUNDING)
def test_what_decides_an_id_is_float32(name: str) -> None:
    tokenizer: Any = SMALL_TOKENIZERS[name](device=CPU, dtype=torch.bfloat16)
    seen = types_of_outputs(tokenizer.model, lambda: both_ways(tokenizer))
    exact = {module: types for module, types in seen.items() if module.startswith(FLOAT32[name])}
    for prefix in FLOAT32[name]:
        assert any(module.startswith(prefix) for module in exact), f"{prefix} was never called"
    assert {module: types for module, types in exact.items() if types != {torch.float32}} == {}
    rest = set().union(*(types for module, types in seen.items() if module not in exact))
    assert torch.bfloat16 in rest  # the network itself does compute in bfloat16


@pytest.mark.parametrize("name", ["comit-nano", "comit-sd", "alit-vae", "flextok", "selftok"])
def test_an_autoencoder_gives_the_same_bits_under_autocast(name: str) -> None:
    tokenizer: Any = SMALL_TOKENIZERS[name](device=CPU)
    vae = tokenizer.model.base if name == "alit-vae" else tokenizer.model.vae
    images = pictures(tokenizer, 2).float().div(127.5).sub(1)
    with torch.inference_mode():
        latents = vae.encode(images)
        wanted = (latents, vae.decode(latents))
        with autocast(CPU, torch.bfloat16):
            latents = vae.encode(images)
            rounded = vae.decode(latents.bfloat16()), vae.encode(images.bfloat16())
            found = (latents, vae.decode(latents))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert {x.dtype for x in (*found, *rounded)} == {torch.float32}  # also for inputs that were rounded


@pytest.mark.parametrize("name", ROUNDING)
def test_messages_are_float32_whatever_the_network_computes_in(name: str) -> None:
    tokenizer: Any = SMALL_TOKENIZERS[name](device=CPU, dtype=torch.bfloat16)
    tokens = tokenizer.encode(pictures(tokenizer, 2), generators=streams(2))
    assert tokens.codes.dtype == torch.float32 and tokens.ids.dtype == torch.int64
    assert torch.equal(tokenizer.codes_from_ids(tokens.ids), tokens.codes)


@pytest.mark.parametrize("vae", ["dct", "sd"])
def test_training_under_autocast(vae: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Message head, latents and their autoencoder; the rest of the step computes in bfloat16."""
    if vae == "sd":
        monkeypatch.setitem(PRESETS, "comit-nano", SD_NANO)
    run = TrainConfig.model_validate(
        {
            "name": "t",
            "steps": 1,
            "global_batch": 4,
            "model": {"preset": "comit-nano", "depth": 2, "width": 32, "representation_layer": 1},
            "crops": {"max_crops": 3, "mean": 6.0},
            "objective": {"repa_weight": 0, "srepa_weight": 0},
        }
    )
    spec = run.model.spec()
    network = Comit(spec, small_sd_vae() if vae == "sd" else DctVae(4))
    network.predictor.init_weights(seeded(), zero_gates=False)
    module = TrainingModule(network, run, None)
    plan = plan_step(run, step=0, samples=range(4))
    images = torch.rand(4, 3, spec.image_size, spec.image_size, generator=seeded(1)) * 2 - 1

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            parts = module(images, plan, None, 1.0)
        parts.total.backward()

    seen = types_of_outputs(module.model, step)
    exact = {name: types for name, types in seen.items() if name.startswith(("vae.", "predictor.r_final"))}
    assert "predictor.r_final_layer.linear" in exact and (vae == "dct" or any("vae" in n for n in exact))
    assert set().union(*exact.values()) == {torch.float32}
    assert seen["predictor.blocks.0.mlp.fc1"] == {torch.bfloat16}
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert {None if g is None else g.dtype for g in gradients} == {torch.float32}


def test_float32_on_cuda_is_not_tf32() -> None:
    """The flags are global, so they are set where a network computes and put back afterwards."""
    cuda = torch.device("cuda")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        for conv, matmul in ((True, True), (True, False), (False, False)):
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = conv, matmul
            with pytest.raises(KeyError), exact_products(cuda):
                assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
                raise KeyError
            assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (conv, matmul)
            with exact_products(CPU):
                assert torch.backends.cudnn.allow_tf32 == conv
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
