"""What the card of a COMiT tokenizer says about its training."""

from __future__ import annotations

from pathlib import Path

from comit_bench.tokenizers.comit.model import Comit
from comit_bench.train.card import USE_TOKENIZER, CardText
from comit_bench.train.config import CropsConfig, TrainConfig
from comit_bench.train.validation import GATHER, READ


def training_data(config: TrainConfig) -> str:
    """Name of the data for tables: ``data.title``, or what follows from the source."""
    data = config.data
    if data.title:
        return data.title
    if data.kind in ("scenes", "drawings"):
        name = "scenes-recognition" if data.kind == "scenes" else "drawings"
        return f"{name} {data.split} ({data.count} scenes)"
    source = str(data.source)
    if data.kind == "hf" and not Path(source).expanduser().exists():
        return source  # a hub id
    return Path(source).expanduser().resolve().name


def measure_names(config: TrainConfig) -> dict[str, str]:
    """What the columns of the validation log mean, in the card's words."""
    settings = config.validation
    return {
        "val_flow": "flow-matching loss",
        "psnr_one_step": "PSNR of one-step reconstructions (dB)",
        "psnr_guided": f"PSNR of guided reconstructions (dB; {settings.steps} steps, weight "
        f"{settings.guidance:g})",
        "psnr_mean_colour": "PSNR of the mean-colour image (dB, baseline)",
        "shuffled_gap": "one-step PSNR lost with another image's message (dB)",
        "ids_used": "distinct ids used",
        "perplexity": "perplexity of the ids",
        **{name: f"one-step PSNR from the crops `{policy}` (dB)" for name, policy in GATHER.items()},
        **{
            name: f"class by a linear read-out of the message of `{policy}` (accuracy)"
            for name, policy in READ.items()
        },
    }


def _crops(config: TrainConfig) -> str:
    phases = [
        f"before step {phase.until:,}: {_phase(config, config.crops_at(phase.until - 1))}; then "
        for phase in config.curriculum
    ]
    return "".join(phases) + _phase(config, config.crops)


def _phase(config: TrainConfig, crops: CropsConfig) -> str:
    """Crops of one phase of the curriculum."""
    side = config.model.spec().geometry.crop
    share = f"with probability {crops.global_first:g}"
    if crops.global_first_among == "all":
        share += " among all images, those decoded from the empty message included"
    if crops.max_crops == 1 and crops.count_global:
        return f"one per image, the whole image {share}"
    drawn = "step" if crops.per == "batch" else "image"
    limit = f"at most {crops.max_crops}"
    if not crops.count_global:
        limit += " and a whole image before them"
    number = "any number alike"
    if crops.count == "poisson":
        number = "1 + Poisson(exp(u))"
        limit = f"u of mean ln {crops.mean:g} - sigma²/2 and sigma {crops.sigma:g}, {limit}"
    where = "uniformly random places" if crops.places == "uniform" else "different cells of the 3 x 3 grid"
    told = f"{number} per {drawn}, {limit}, {side} px at {where}, the first one the whole image {share}"
    if crops.unseen_weight < 1:
        told += f"; where none has looked the flow's loss weighs {crops.unseen_weight:g}"
    return told


def _images(config: TrainConfig) -> str:
    """What is done to an image before the network sees it."""
    mirrored = f"mirrored with probability {config.data.flip:g}" if config.data.flip else "as they are"
    vae = config.model.spec().vae
    if not vae.startswith("sd-"):
        return f"{mirrored}; the autoencoder ({vae}) has no posterior"
    kind = "samples" if config.objective.posterior == "sample" else "the mode"
    return f"{mirrored}; latents are {kind} of the autoencoder's posterior"


def _objective(config: TrainConfig) -> list[str]:
    goal, teacher = config.objective, config.teacher
    place = "minus the location of the last crop" if goal.skipped_offset == "last-crop" else "zero"
    updates = "all" if goal.backprop_updates == "all" else f"the last {goal.backprop_updates}"
    lines = [
        f"flow matching, t = sigmoid({goal.time_mu:g} + {goal.time_sigma:g} n), gradient through {updates} "
        "message update(s)",
        f"images decoded from the empty message: probability {goal.skip:g}; their offset is {place}",
    ]
    if goal.message_dropout:
        lines.append(f"messages that skip the rounding: probability {goal.message_dropout:g}")
    if goal.repa_weight or goal.srepa_weight:
        counted = "also" if goal.srepa_on_skipped else "not"
        ramp = f", rising from 0 over {goal.alignment_ramp:,} steps" if goal.alignment_ramp else ""
        lines.append(
            f"alignment with {teacher.name}: REPA weight {goal.repa_weight:g}, SREPA weight "
            f"{goal.srepa_weight:g}{ramp}; SREPA is {counted} asked of images with the empty message; "
            f"projections of {goal.projector_layers} layers, {goal.projector_width} wide"
        )
    else:
        lines.append("no alignment with a teacher (REPA and SREPA weights are 0)")
    return lines


def _optimizer(config: TrainConfig) -> str:
    optim = config.optim
    warm = ", with a short memory at first" if optim.ema_warmup else ""
    name, muon = "Adam", ""
    if optim.name == "muon":
        name = "Muon for the matrices inside the blocks, Adam for the rest"
        muon = f" (Muon {optim.muon_learning_rate:g}, momentum {optim.muon_momentum:g})"
    fall = "an inverse square root"
    if optim.cosine_steps is not None:
        fall = f"a cosine to 5 % at step {optim.cosine_steps:,}"
    start = " Embedded codes start as strong as positions." if config.model.init == "message" else ""
    return (
        f"{name}; peak learning rate {optim.learning_rate:g}{muon} after {optim.warmup_steps:,} steps, then "
        f"{fall}; betas {optim.betas[0]:g} and {optim.betas[1]:g}, eps {optim.eps:g}, weight decay "
        f"{optim.weight_decay:g}, gradient norm clipped at {optim.clip:g}; averages of the weights "
        f"{optim.ema:g}{warm}.{start}"
    )


REMARKS = """
Choices that the paper does not print (mirror images, the posterior, whose number of crops is drawn, whether
the whole image is one of them, of which images its probability is, offset and alignment of images without a
message, time distribution, loss weights) are named above.
"""


def about(config: TrainConfig, model: Comit) -> CardText:
    """What the card says of a COMiT tokenizer."""
    spec = model.spec
    parameters = sum(p.numel() for p in model.predictor.parameters())
    rounded = "; measured before rounding to float16" if config.export.dtype == "float16" else ""
    return CardText(
        tags=("comit", "image-tokenizer", "discrete-tokens", "flow-matching"),
        what=f"COMiT image tokenizer ({parameters:,} parameters without the autoencoder): {spec.image_size} "
        f"px images become\n{spec.message_length} tokens of a vocabulary of {model.quantizer.vocab_size:,} "
        f"(FSQ levels {list(spec.fsq_levels)}). The layout of the files is the released one.",
        facts=(
            f"weights: exponential moving average ({config.optim.ema:g}), stored as {config.export.dtype}",
        ),
        data=training_data(config),
        measured=f"images that were not trained on; averaged weights{rounded}; message of the whole "
        "image where no crops are named",
        names=measure_names(config),
        recipe=(
            f"images: {_images(config)}",
            f"crops: {_crops(config)}",
            *_objective(config),
            f"optimizer: {_optimizer(config)}",
            f"attention mask: {spec.mask_mode}; seed {config.seed}",
        ),
        use=USE_TOKENIZER,
        remarks=REMARKS,
    )
