"""`hidream hidit cache-latents`: a VAE reads every picture of images.h5 once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hidream.cli import console
from hidream.cli.arguments import DEVICES, DTYPES, Parser, add_json
from hidream.cli.hidit.progress import Items
from hidream.errors import InputError

EXAMPLE = """\
hidream hidit cache-latents --data-dir data/imagenet256 --output-dir data/imagenet256 \\
    --vae-arch f16d32 --vae-ckpt-path pretrained/e2e-vavae-400k.safetensors \\
    --vae-latents-name e2e-vavae-400k --pproc-batch-size 128

On several GPUs: torchrun --nproc_per_node 8 -m hidream hidit cache-latents ...
Stopped and started again, it goes on where it was, with as many processes as you like."""


def run(argv: list[str]) -> int:
    parser = Parser(
        "hidit cache-latents",
        "Encode every picture, and write NAME.h5, NAME_h5.json and NAME_stats.safetensors.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="has images.h5")
    parser.add_argument("--output-dir", metavar="DIR", help="default: the data folder")
    parser.add_argument(
        "--vae-arch", metavar="NAME", help="f16d32 or f8d4; default: the file's own"
    )
    parser.add_argument(
        "--vae-ckpt-path",
        required=True,
        metavar="PATH",
        help="a safetensors file, or a folder (a .pt: hidream models convert)",
    )
    parser.add_argument("--vae-latents-name", required=True, metavar="NAME", help="of the result")
    parser.add_argument(
        "--pproc-batch-size", type=int, default=128, metavar="N", help="default 128"
    )
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="default fp32")
    parser.add_argument("--overwrite", action="store_true", help="replace latents of this name")
    add_json(parser)
    arguments = parser.parse(argv)

    import torch
    from torch import Tensor

    from hidream.data.latents import cache_latents
    from hidream.models.hidit.vae import load_vae
    from hidream.pipelines.devices import find_device, find_dtype
    from hidream.train.distributed import launched

    data_dir = Path(arguments.data_dir).expanduser()
    out_dir = Path(arguments.output_dir or data_dir).expanduser()
    weights = Path(arguments.vae_ckpt_path).expanduser()
    found = find_device(arguments.device)
    dtype = find_dtype(None if arguments.dtype == "auto" else arguments.dtype, found)
    with launched(found.type) as world:
        device = torch.device(world.device)
        vae = load_vae(weights, arguments.vae_arch, device, dtype)

        def encode(pictures: Tensor) -> tuple[Tensor, Tensor]:
            return vae.moments(pictures.to(device, dtype))

        progress = Items("pictures")
        try:
            cached = cache_latents(
                data_dir,
                out_dir,
                arguments.vae_latents_name,
                encode,
                batch_size=arguments.pproc_batch_size,
                rank=world.rank,
                world=world.size,
                barrier=world.barrier,
                made_by=f"{digest(weights)} {dtype}",
                overwrite=arguments.overwrite,
                on_progress=progress.step if world.main else None,
            )
        finally:
            progress.close()
        if world.main:
            if cached.was_there:
                console.say(f"{cached.path} is whole already; there is nothing to do.")
            if arguments.json:
                console.show(
                    {
                        "path": str(cached.path),
                        "num_latents": cached.num_latents,
                        "shape": list(cached.shape),
                        "was_there": cached.was_there,
                    }
                )
            else:
                print(cached.path)
    return 0


def digest(weights: Path) -> str:
    """The SHA-256 of a weights file, or of all safetensors and JSON files of a folder."""
    kinds = (".safetensors", ".json")
    files = [weights]
    if weights.is_dir():
        files = sorted(path for path in weights.iterdir() if path.suffix in kinds)
    whole = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    return whole.hexdigest()
