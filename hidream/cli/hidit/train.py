"""`hidream hidit train`: the latent backbone with --ldm-only, then the pixel branch without it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from hidream.cli import console
from hidream.cli.arguments import Parser
from hidream.errors import InputError, ModelError, UsageError

EXAMPLES = """\
hidream hidit train --ldm-only --data-dir data/imagenet256 --vae-latents-name e2e-vavae-400k \\
    --vae-ckpt pretrained/e2e-vavae-400k.safetensors --exp-name stage1 --max-train-steps 400000
hidream hidit train --resume-step 400000 --continue-train-exp-dir exps/stage1 \\
    --data-dir data/imagenet256 --vae-latents-name e2e-vavae-400k \\
    --vae-ckpt pretrained/e2e-vavae-400k.safetensors --exp-name stage2 --max-train-steps 420000
torchrun --nproc_per_node 8 -m hidream hidit train ..."""

PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run(argv: list[str]) -> int:
    parser = _parser()
    arguments = parser.parse(argv)
    _check(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")

    from hidream.models.hidit.files import write_json
    from hidream.pipelines.devices import find_device
    from hidream.train.distributed import launched
    from hidream.train.loop import train
    from hidream.train.track import tracker

    device = find_device(arguments.device)
    stopped: list[int] = []
    before: dict[int, Any] = {}

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)

    try:
        with launched(device.type) as world:
            if arguments.batch_size % world.size:
                raise UsageError(
                    f"--batch-size {arguments.batch_size} is that of all {world.size} processes, "
                    "and no multiple of their number."
                )
            recipe, resume = _recipe(arguments, world.device)

            def begin() -> None:
                for number in (signal.SIGINT, signal.SIGTERM):  # so far, they end it at once
                    before[number] = signal.signal(number, stop)
                if world.main:
                    recipe.run_dir.mkdir(parents=True, exist_ok=True)
                    write_json(recipe.run_dir / "args.json", vars(arguments))

            kind = arguments.report_to if world.main else "none"
            with tracker(kind, recipe.run_dir, recipe.name, vars(arguments)) as track:

                def say(record: dict[str, Any]) -> None:
                    from hidream.train.log import readable

                    console.say(readable(record))
                    track(record)

                finished = train(
                    recipe,
                    world,
                    resume=resume,
                    stop_requested=lambda: bool(stopped),
                    on_begin=begin,
                    on_log=say,
                )
            if world.main and finished:
                print(recipe.run_dir)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if finished else console.INTERRUPTED


def _parser() -> Parser:
    parser = Parser(
        "hidit train",
        "Train a Hi-DiT on cached latents. Ctrl-C ends the step and saves a checkpoint.",
        usage="hidream hidit train --data-dir DIR --vae-latents-name NAME --exp-name NAME [flags]",
        epilog=EXAMPLES,
    )
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", default="exps", metavar="DIR")
    group.add_argument("--exp-name", required=True, metavar="NAME", help="its folder in that one")
    group.add_argument("--max-train-steps", type=int, default=400_000, metavar="N", help="in all")
    group.add_argument("--checkpointing-steps", type=int, default=50_000, metavar="N")
    group.add_argument("--keep-checkpoints", type=int, default=0, metavar="N", help="0: all")
    group.add_argument("--sampling-steps", type=int, default=10_000, metavar="N", help="0: never")
    group.add_argument("--log-every", type=int, default=100, metavar="N")
    group.add_argument("--report-to", default="none", help="none, tensorboard or wandb")
    group.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    group.add_argument("--resume-step", type=int, default=0, metavar="N", help="from this one")
    group.add_argument(
        "--continue-train-exp-dir", metavar="DIR", help="the run, or saved model, of --resume-step"
    )
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", required=True, metavar="DIR", help="of images.h5")
    group.add_argument("--vae-latents-name", required=True, metavar="NAME", help="of NAME.h5")
    group.add_argument("--latents-dtype", default="float16", choices=("float16", "float32"))
    group.add_argument(
        "--vae", default="", metavar="ARCH", help="of --vae-ckpt, where it says none"
    )
    group.add_argument("--vae-ckpt", default="", metavar="FILE", help="for the sampled pictures")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="SiT-XL/1", metavar="SIZE")
    group.add_argument("--ldm-only", action="store_true", help="stage 1: no pixel branch")
    group.add_argument("--gate", type=float, default=0.3, metavar="T", help="pixels up to here")
    group.add_argument("--attention", default="readonly", choices=("readonly", "full", "add"))
    group.add_argument("--pixel-clock", default="shared", choices=("shared", "rescaled"))
    group.add_argument("--qk-norm", action="store_true")

    group = parser.add_argument_group("objective")
    group.add_argument("--path-type", default="linear", choices=("linear",))
    group.add_argument("--prediction", default="v", choices=("v",))
    group.add_argument("--weighting", default="uniform", choices=("uniform", "lognormal"))
    group.add_argument("--cfg-prob", type=float, default=0.1, metavar="P", help="of no label")
    group.add_argument(
        "--enc-type", default="dinov2-vit-b", help="dinov2-vit-s|b|l|g, or stand-in for tests"
    )
    group.add_argument("--enc-path", default="", metavar="DIR", help="else from the hub's cache")
    group.add_argument("--encoder-depth", type=int, default=8, metavar="N")
    group.add_argument("--proj-coeff", type=float, default=0.5, help="0: no alignment")
    group.add_argument("--pixel-weight", type=float, default=1.0)

    group = parser.add_argument_group("optimizer")
    group.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    group.add_argument("--learning-rate", type=float, default=1e-4)
    group.add_argument("--warmup-steps", type=int, default=0)
    group.add_argument("--adam-beta1", type=float, default=0.9)
    group.add_argument("--adam-beta2", type=float, default=0.999)
    group.add_argument("--adam-weight-decay", type=float, default=0.0)
    group.add_argument("--adam-epsilon", type=float, default=1e-8)
    group.add_argument("--max-grad-norm", type=float, default=1.0)
    group.add_argument("--ema-decay", type=float, default=0.9999)

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    group.add_argument("--mixed-precision", choices=tuple(PRECISIONS), help="default bf16 on a GPU")
    group.add_argument(
        "--parallel", default="ddp", choices=("ddp", "fsdp"), help="fsdp shards over processes"
    )
    group.add_argument("--allow-tf32", action="store_true")
    group.add_argument("--compile", action="store_true", default=None, help="default on a GPU")
    group.add_argument("--no-compile", dest="compile", action="store_false")
    return parser


def _check(arguments: Namespace) -> None:
    """What needs no file; UsageError."""
    if Path(arguments.exp_name).name != arguments.exp_name or arguments.exp_name in ("", ".", ".."):
        raise UsageError(f'--exp-name "{arguments.exp_name}" is not the name of a folder.')
    limits: tuple[tuple[str, float, float], ...] = (
        *(("max_train_steps", 1, 10**9), ("checkpointing_steps", 1, 10**9)),
        *(("keep_checkpoints", 0, 10**6), ("sampling_steps", 0, 10**9), ("log_every", 1, 10**9)),
        *(("resume_step", 0, 10**9), ("seed", 0, 2**31 - 1), ("gate", 1e-6, 1), ("cfg_prob", 0, 1)),
        *(("encoder_depth", 1, 1000), ("proj_coeff", 0, 1e6), ("pixel_weight", 0, 1e6)),
        *(("batch_size", 1, 10**6), ("learning_rate", 1e-12, 10), ("warmup_steps", 0, 10**9)),
        *(("adam_beta1", 0, 0.999999), ("adam_beta2", 0, 0.999999), ("adam_weight_decay", 0, 10)),
        *(("adam_epsilon", 1e-16, 1), ("max_grad_norm", 0, 1e9), ("ema_decay", 0, 1)),
    )
    for name, low, high in limits:
        value = getattr(arguments, name)
        if not low <= value <= high:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {value:g} is out of range: {low:g} … {high:g}.")
    if arguments.warmup_steps > arguments.max_train_steps:
        raise UsageError("--warmup-steps is more than --max-train-steps.")
    if arguments.continue_train_exp_dir and not arguments.resume_step:
        raise UsageError("--continue-train-exp-dir needs --resume-step.", "Say from which step.")
    if arguments.resume and arguments.resume_step:
        raise UsageError("--resume and --resume-step exclude each other.")
    for name in ("output_dir", "continue_train_exp_dir", "data_dir", "vae_ckpt", "enc_path"):
        if given := getattr(arguments, name):
            setattr(arguments, name, str(Path(given).expanduser()))
    if arguments.vae_ckpt and not Path(arguments.vae_ckpt).exists():
        raise ModelError(f"--vae-ckpt {arguments.vae_ckpt} is not there.", "Check its path.")
    if not Path(arguments.data_dir).is_dir():
        raise InputError(f"--data-dir {arguments.data_dir} is not a folder.")
    out = Path(arguments.output_dir, arguments.exp_name)
    there = next(place for place in (out, *out.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--output-dir {arguments.output_dir}: {there} takes no files.")


def _recipe(arguments: Namespace, device: str) -> tuple[Any, bool]:
    """The run as a recipe, and whether it resumes one in its own folder."""
    from hidream.models.hidit.config import size_of
    from hidream.models.hidit.vae import arch_named, open_vae
    from hidream.train.config import HiDiTOptions, Optimizer, Recipe, Stage, parse_recipe
    from hidream.train.layout import Parallel

    # What is unknown is refused before anything is read.
    num_layers = size_of(arguments.model).num_layers
    if arguments.proj_coeff and arguments.encoder_depth > num_layers:
        raise UsageError(
            f"--encoder-depth {arguments.encoder_depth}: {arguments.model} has {num_layers} blocks."
        )
    if arguments.vae:
        arch_named(arguments.vae)
    if arguments.vae_ckpt:
        open_vae(arguments.vae_ckpt, arguments.vae or None)
        _check_same_vae(arguments)
    elif arguments.sampling_steps:
        console.warn("without --vae-ckpt no pictures are drawn on the way.")
        arguments.sampling_steps = 0
    on_gpu = device != "cpu"
    if arguments.mixed_precision is None:
        arguments.mixed_precision = "bf16" if on_gpu else "no"
    if arguments.compile is None:
        arguments.compile = on_gpu
    if arguments.allow_tf32:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    names = HiDiTOptions.__dataclass_fields__
    stage = Stage(
        size=1,  # the data's own
        steps=arguments.max_train_steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup=arguments.warmup_steps,
    )
    run_dir = Path(arguments.output_dir) / arguments.exp_name
    recipe = Recipe(
        name=arguments.exp_name,
        model=f"hidit-{arguments.model}",
        stages=(stage,),
        out=str(run_dir),
        seed=arguments.seed,
        device=device,
        precision=PRECISIONS[arguments.mixed_precision],
        parallel=replace(Parallel.named(arguments.parallel), checkpoint="whole"),
        compile=arguments.compile,
        optimizer=Optimizer(
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            weight_decay=arguments.adam_weight_decay,
            clip=arguments.max_grad_norm,
            ema_decay=arguments.ema_decay,
        ),
        hidit=HiDiTOptions(**{k: v for k, v in vars(arguments).items() if k in names}),
        log_every=arguments.log_every,
        checkpoint_every=arguments.checkpointing_steps,
        keep_checkpoints=arguments.keep_checkpoints,
        grid_every=arguments.sampling_steps,
        **_start(arguments, run_dir),
    )
    return parse_recipe(recipe.to_dict()), arguments.resume


def _check_same_vae(arguments: Namespace) -> None:
    """Warn where the cache notes that another VAE made the latents."""
    from hidream.cli.hidit.cache_latents import digest
    from hidream.data.h5 import h5_file, read_note

    cache = h5_file(Path(arguments.data_dir), arguments.vae_latents_name)
    if not cache.is_file():  # packed, or missing, which is told later
        return
    made_by, *_ = [*str(read_note(cache).get("made_by") or "").split(), ""]
    if made_by and made_by != digest(Path(arguments.vae_ckpt)):
        console.warn(
            f"{cache} was made with other files than --vae-ckpt {arguments.vae_ckpt}: "
            "unless they are the same VAE, what it decodes will look wrong."
        )


def _start(arguments: Namespace, run_dir: Path) -> dict[str, Any]:
    """The recipe's fields that say where it begins."""
    from hidream.train import checkpoint

    begun = (run_dir / "checkpoints" / "latest").exists()
    if arguments.resume:
        checkpoint.current(run_dir)  # there must be one
        return {}
    source = Path(arguments.continue_train_exp_dir or run_dir)
    if begun and (not arguments.resume_step or source.resolve() != run_dir.resolve()):
        raise UsageError(
            f"{run_dir} already holds a run.",
            "Continue it with --resume or --resume-step N, or choose another --exp-name.",
        )
    if not arguments.resume_step:
        return {}
    folder = checkpoint.folder_of(source, arguments.resume_step)
    if folder.is_dir():
        latents = (checkpoint.read_progress(folder).recipe.get("hidit") or {}).get(
            "vae_latents_name"
        )
        if latents not in (None, arguments.vae_latents_name):
            console.warn(f"{folder} was trained on the latents {latents}, by their statistics.")
        return {"start": str(folder)}
    if (source / "model.safetensors").is_file():
        console.warn(f"{source} has weights and no optimizer: it starts anew.")
        return {"init": str(source), "first_step": arguments.resume_step}
    there = ", ".join(str(step) for step in checkpoint.steps_of(source)) or "none"
    raise ModelError(
        f"{source} holds no checkpoint of step {arguments.resume_step}; there are: {there}.",
        "Choose one of them, or name another --continue-train-exp-dir.",
    )
