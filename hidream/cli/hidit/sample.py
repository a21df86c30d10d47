"""`hidream hidit sample`: a folder of pictures of every class, for FID or to look at."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.cli.arguments import DEVICES, DTYPES, Parser, add_json
from hidream.cli.hidit.source import Source, digest_of, find_source, find_vae
from hidream.errors import InputError, ModelError, UsageError

if TYPE_CHECKING:
    import torch

    from hidream.pipelines.hidit import Decode, Network, SamplingOptions
    from hidream.train.distributed import World

EXAMPLES = """\
hidream hidit sample --exp-path exps/stage2 --train-steps 450000 --cfg-scale 2.4 --skip-npz
torchrun --nproc_per_node 8 -m hidream hidit sample --exp-path exps/stage2 --cfg-scale 2.4"""


def run(argv: list[str]) -> int:
    arguments = _parser().parse(argv)
    _check(arguments)
    source = find_source(Path(arguments.exp_path).expanduser(), arguments.train_steps)

    from hidream.pipelines.devices import find_device, find_dtype
    from hidream.pipelines.hidit import first_pixel_step, needs_decoder
    from hidream.pipelines.hidit_folder import check_options, folder_name
    from hidream.train.distributed import launched

    options = _options(arguments, source)
    first_pixel_step(options, source.config.gate)
    vae = None
    if needs_decoder(options, source.config.pixel_clock):
        vae = find_vae(source, arguments.vae)
    device = find_device(arguments.device)
    dtype = find_dtype(None if arguments.dtype == "auto" else arguments.dtype, device)
    folder = Path(arguments.sample_dir).expanduser() / folder_name(
        source.name,
        source.step,
        options.cfg_scale,
        options.guidance_low,
        options.guidance_high,
        arguments.label_sampling,
    )
    noted = {
        "step": source.step,
        "weights": digest_of(source.weights),
        "vae": digest_of(vae) if vae is not None else None,
        "dtype": str(dtype).removeprefix("torch."),
        "label_sampling": arguments.label_sampling,
        "seed": arguments.seed,
        **options.to_dict(),
    }
    check_options(folder, noted)
    with launched(str(device)) as world:
        there, batches = _plan(arguments, source, folder, noted, world)
        if batches:
            network, decode = _load(source, vae, options, world.device, dtype)
            _draw(arguments, options, network, decode, folder, there, batches, world)
        return _finish(arguments, source, folder, there, world)


def _parser() -> Parser:
    parser = Parser(
        "hidit sample",
        "Draw pictures of every class with a trained Hi-DiT. A run that was stopped goes on.",
        usage="hidream hidit sample --exp-path DIR [flags]",
        epilog=EXAMPLES,
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--exp-path", required=True, metavar="DIR", help="a training run, or a saved model's folder"
    )
    group.add_argument(
        "--train-steps", type=int, metavar="N", help="the run's checkpoint (default its last)"
    )
    group.add_argument(
        "--vae", metavar="PATH", help="folder or .safetensors (default the run's --vae-ckpt)"
    )
    group.add_argument("--device", default="auto", help=", ".join(DEVICES))
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: fp32 on a CPU")

    group = parser.add_argument_group("pictures")
    group.add_argument("--num-fid-samples", type=int, default=50_000, metavar="N")
    group.add_argument("--label-sampling", default="equal", metavar="HOW", help="equal, random")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of labels and noise (default 0)"
    )

    group = parser.add_argument_group("sampler")
    group.add_argument("--mode", default="sde", help="sde (default) or ode")
    group.add_argument("--heun", action="store_true", help="ode: order 2, two calls a step")
    group.add_argument("--num-steps", type=int, default=50, metavar="N")
    group.add_argument("--cfg-scale", type=float, default=1.0, metavar="F", help="1: no guidance")
    group.add_argument("--guidance-low", type=float, default=0.0, metavar="SIGMA")
    group.add_argument("--guidance-high", type=float, default=1.0, metavar="SIGMA")
    group.add_argument(
        "--pixel-cfg-scale", type=float, metavar="F", help="of the pixels (default --cfg-scale)"
    )
    group.add_argument(
        "--pixel-tail", type=int, default=0, metavar="N", help="more steps, for fine detail"
    )
    group.add_argument(
        "--output", metavar="WHICH", help="pixels (default), or vae: what the latents decode to"
    )

    group = parser.add_argument_group("files")
    group.add_argument("--sample-dir", default="samples", metavar="DIR")
    group.add_argument(
        "--pproc-batch-size", type=int, default=32, metavar="N", help="of each process (default 32)"
    )
    group.add_argument("--skip-npz", action="store_true", help="no .npz beside the folder")
    add_json(group)
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """What can be seen from the flags alone, and is not for `SamplingOptions`."""
    for name, low, high in (
        ("num_fid_samples", 1, 10**8),
        ("pproc_batch_size", 1, 10**5),
        ("seed", 0, 2**31 - 1),
        ("train_steps", 0, 10**12),
    ):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {value} is not between {low} and {high}.")


def _options(arguments: argparse.Namespace, source: Source) -> SamplingOptions:
    from hidream.pipelines.hidit import SamplingOptions, labels_for

    options = SamplingOptions(
        mode=arguments.mode,
        heun=arguments.heun,
        num_steps=arguments.num_steps,
        cfg_scale=arguments.cfg_scale,
        guidance_low=arguments.guidance_low,
        guidance_high=arguments.guidance_high,
        pixel_cfg_scale=arguments.pixel_cfg_scale,
        pixel_tail=arguments.pixel_tail,
        output=arguments.output or "pixels",
    )
    labels_for(0, source.config.num_classes, arguments.label_sampling)
    if options.output == "pixels" and not source.draws_pixels:
        reason = (
            "was trained with --ldm-only"
            if source.has_pixels
            else "has no weights of a pixel branch"
        )
        if arguments.output is not None:
            raise UsageError(f"{source.weights} {reason}.", "Draw with --output vae.")
        console.say(f"{source.name} {reason}: what its latents decode to is drawn (--output vae).")
        options = replace(options, output="vae")
    return options


def _load(
    source: Source, vae: Path | None, options: SamplingOptions, device: str, dtype: torch.dtype
) -> tuple[Network, Decode | None]:
    """The network and, if there is one, the VAE's decoder, which stays in fp32."""
    import torch

    from hidream.models.hidit.model import has_trained_pixels
    from hidream.models.hidit.vae import load_vae
    from hidream.models.hidit.weights import load_hidit

    if device.startswith("cuda") and dtype is torch.float32:
        torch.set_float32_matmul_precision("high")  # TF32, as published
    decoder = load_vae(vae, device=device) if vae is not None else None
    network = load_hidit(
        source.weights, source.config, device=device, dtype=dtype, allow_no_pixels=True
    )
    if options.output == "pixels" and not has_trained_pixels(network):
        raise ModelError(
            f"the pixel branch in {source.weights} was never trained.", "Draw with --output vae."
        )
    return network, decoder.decode if decoder is not None else None


def _plan(
    arguments: argparse.Namespace,
    source: Source,
    folder: Path,
    noted: Mapping[str, Any],
    world: World,
) -> tuple[set[int], list[range]]:
    """Make the folder; the pictures that are there, and this process's share of the others."""
    from hidream.pipelines.hidit_folder import batches_to_draw, drawn, prepare

    num_samples, num_classes = arguments.num_fid_samples, source.config.num_classes
    if world.main:
        prepare(folder, noted)
    there = drawn(folder)
    world.barrier()  # nobody draws before the folder is made and everybody has looked
    batches = batches_to_draw(
        num_samples, arguments.pproc_batch_size, there, world.rank, world.size
    )
    if world.main:
        if arguments.label_sampling == "equal" and num_samples % num_classes:
            console.warn(
                f"{num_samples} pictures are no multiple of the {num_classes} classes: "
                "some have one picture more than others."
            )
        kept = len(there & set(range(num_samples)))
        if kept:
            console.say(f"{kept} of {num_samples} pictures are there already.")
        if len(there) > kept:
            console.warn(f"{folder} holds {len(there) - kept} pictures beyond these.")
    return there, batches


def _draw(
    arguments: argparse.Namespace,
    options: SamplingOptions,
    network: Network,
    decode: Decode | None,
    folder: Path,
    there: set[int],
    batches: list[range],
    world: World,
) -> None:
    """Draw this process's batches; write those of their pictures that are not there."""
    from hidream.pipelines.hidit import draw, labels_for
    from hidream.pipelines.hidit_folder import Writer, picture_path

    labels = labels_for(
        arguments.num_fid_samples,
        network.config.num_classes,
        arguments.label_sampling,
        arguments.seed,
    )
    progress = console.Progress(len(batches))
    on_step = progress.step if world.main else None
    try:
        with Writer() as writer:
            for batch in batches:
                pictures = draw(
                    network,
                    decode,
                    labels[batch.start : batch.stop],
                    batch,
                    arguments.seed,
                    options,
                    device=world.device,
                    on_step=on_step,
                )
                for index, picture in zip(batch, pictures.numpy(), strict=True):
                    if index not in there:
                        writer.put(picture_path(folder, index), picture)
    finally:
        if world.main:
            progress.close()


def _finish(
    arguments: argparse.Namespace, source: Source, folder: Path, there: set[int], world: World
) -> int:
    """Wait for the others, look whether all is there, and say where. The .npz, unless skipped."""
    from hidream.pipelines.hidit_folder import drawn, npz_is_whole, write_npz

    world.barrier()
    if not world.main:
        return 0
    num_samples = arguments.num_fid_samples
    num_drawn = len(set(range(num_samples)) - there)
    missing = set(range(num_samples)) - drawn(folder)
    if missing:
        raise InputError(
            f"{len(missing)} pictures are missing in {folder}.",
            "Was it changed meanwhile, or do the processes not share it? Draw again.",
        )
    npz = None
    if not arguments.skip_npz:
        npz = folder.with_name(folder.name + ".npz")
        if not npz_is_whole(folder, num_samples):
            console.say(f"writing {npz}")
            write_npz(folder, num_samples)
    if arguments.json:
        console.show(
            {
                "folder": str(folder),
                "npz": str(npz) if npz else None,
                "num_samples": num_samples,
                "num_drawn": num_drawn,
                "step": source.step,
            }
        )
    else:
        print(folder)
    return 0
