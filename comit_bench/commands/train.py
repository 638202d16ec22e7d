"""The training command: ``python -m comit_bench.train`` and ``comit-bench train``.

Nothing heavy is imported at the top, so that ``--help`` answers at once.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from comit_bench.commands.console import INTERRUPTED, say, set_up_logging
from comit_bench.commands.options import Quiet, run_alone
from comit_bench.errors import BenchError, UsageError
from comit_bench.files import check_folder

if TYPE_CHECKING:
    from comit_bench.train.config import AnyRun, TrainConfig


def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. steps=50.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="Preset or YAML file.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto (the latest checkpoint), never, or a checkpoint.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the settings and stop.")] = False,
    list_presets: Annotated[bool, typer.Option("--list", help="List the presets and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a tokenizer and export it as a folder that `comit-bench run --tokenizer` takes.

    On several GPUs or nodes: `torchrun --nproc-per-node N -m comit_bench.train …` or `accelerate launch`.
    """
    from comit_bench.train.config import AutoencoderRun, TrainConfig, load_config

    set_up_logging()
    if list_presets:
        typer.echo(_listing())
        return
    if config is None:
        raise UsageError("--config is missing: name a preset or file, see --list")
    settings = load_config(config, tuple(overrides or ()))
    # for model cards; where the files lie changes nothing
    told = [text for text in overrides or () if not text.startswith("output=")]
    check_folder(Path(settings.output))
    command = "python -m comit_bench.train --config " + shlex.join([config, *told])
    if not isinstance(settings, TrainConfig):
        known = ("auto", "cpu", "cuda") if isinstance(settings, AutoencoderRun) else ("auto", "cpu")
        if device not in known:
            raise UsageError(
                f"--device {device!r:.40}: supported are {' and '.join(known)}; {config} is small, the CPU "
                "trains it"
            )
        device = "cuda" if device == "cuda" else "cpu"
    if dry_run:
        typer.echo(_plan(settings, device))
        return
    raise typer.Exit(_train(settings, device, resume, command, progress=not quiet))


def _train(config: AnyRun, device: str, resume: str, command: str, *, progress: bool) -> int:
    from comit_bench.train.config import TrainConfig
    from comit_bench.train.loop import Trainer

    trainer = Trainer(config, device=device, resume=resume, progress=progress, command=command)
    push = config if isinstance(config, TrainConfig) and config.push_to_hub is not None else None
    if trainer.main and push is not None:
        _warn_without_token(str(push.push_to_hub))
    try:
        exported = trainer.fit()
    except KeyboardInterrupt:
        say("\nstopped; the same command continues from the last checkpoint.")
        return INTERRUPTED
    finally:
        trainer.close()
    if trainer.counters.step < config.steps:
        if trainer.main:
            step = trainer.counters.step
            say(f"\nstopped after step {step}, checkpoint saved; the same command continues.")
            if "steps" in config.free:
                say(f"To export what is there: the same command with steps={step}.")
        return INTERRUPTED
    if exported is None:
        return 0
    typer.echo(str(exported))
    return 0 if push is None else _push(push, exported)


def _warn_without_token(repository: str) -> None:
    """At the start, when there is time to log in before the end."""
    from comit_bench.tokenizers.push import has_token

    if not has_token():
        say(
            f"warning: push_to_hub is {repository}, but there is no token for the hub on this machine. Run "
            "`hf auth login` before the training ends; otherwise only the upload will be missing."
        )


def _push(config: TrainConfig, exported: Path) -> int:
    """Upload the exported folder; a failure is reported with the command that tries again."""
    from comit_bench.tokenizers.push import prepare, push, retry_command

    repository = str(config.push_to_hub)
    try:
        done = push(prepare(exported, repository), private=config.push_private)
    except BenchError as error:
        again = retry_command(exported.resolve(), repository, private=config.push_private)
        say(f"\nthe training is finished and exported, only the upload is not:\n{error}\nTo upload: {again}")
        return error.exit_code
    say(str(done))
    return 0


def _listing() -> str:
    """One line per preset: its name and the first comment of its file."""
    from comit_bench.train.config import presets

    lines = []
    for name, path in presets().items():
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        lines.append(f"{name:30} {first.removeprefix('# ')}")
    return "\n".join(lines)


def _plan(config: AnyRun, device: str) -> str:
    """The resolved settings as YAML, after all checks that need no data or weights to be loaded."""
    import yaml

    from comit_bench.nn.ranks import launched
    from comit_bench.train.board import check_tensorboard
    from comit_bench.train.config import TrainConfig
    from comit_bench.train.data import open_images
    from comit_bench.train.setup import check_device, divide

    check_tensorboard(config.tensorboard)
    check_device(config, device)
    ranks = launched().world
    work = divide(config, ranks)
    lines = []
    if isinstance(config, TrainConfig):
        train_images, held = open_images(config)
        lines = [
            f"# {len(train_images.ids)} training and {len(held.ids)} validation images",
            f"# {ranks} processes x {work.pieces} pieces x {work.device_batch} images per step, "
            f"{config.steps} steps",
        ]
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return "\n".join([text.rstrip("\n"), *lines, f"# output: {Path(config.output) / config.name}"])


def main() -> None:
    """Entry point of ``python -m comit_bench.train``."""
    run_alone(train, "python -m comit_bench.train")
