"""Train the demo's model: python tools/train_demo.py STAGE --out FOLDER [--minutes M] [--workers N]

    vae          the autoencoder, on drawn dancers, skeletons and scenes: frames first, then clips
    decoder      trains only the autoencoder's decoder further, while the transformer learns from its latents
    transformer  flow matching on the autoencoder's latents, with the official shifted noise levels
    distill      a LoRA that gives few steps the quality of many
    export       all of it in bfloat16, in the store's layout: runner/demo/weights

Every stage resumes from FOLDER's checkpoint and stops after M minutes in total. With CUDA it runs on the first GPU. On
a CPU each worker is one thread, and their gradients are averaged. `--rank R` runs only one worker: start the other
workers yourself, in separate sessions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

MINUTES = {"vae": 24.0, "decoder": 24.0, "transformer": 52.0, "distill": 9.0}


def work(rank: int, stage: str, folder: Path, minutes: float, workers: int, port: int) -> None:
    """One worker's part of one stage."""
    import torch

    if workers > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers
        )
    if stage in ("vae", "decoder"):
        from _demo_vae import train_decoder, train_vae

        (train_vae if stage == "vae" else train_decoder)(folder, minutes, rank, workers)
        return
    from _demo_models import embed_prompts, load_vae, make_pipeline

    pipe = make_pipeline(load_vae(folder))
    texts = embed_prompts(pipe)
    if stage == "transformer":
        from _demo_transformer import train_transformer

        train_transformer(folder, pipe, texts, minutes, rank, workers)
    else:
        from _demo_distill import distill

        distill(folder, pipe, texts, minutes, rank, workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*MINUTES, "export"])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--port", type=int, default=29511)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "export":
        from _demo_export import export

        export(arguments.out, ROOT / "runner" / "demo" / "weights")
        return
    minutes = arguments.minutes or MINUTES[arguments.stage]
    settings = (arguments.stage, arguments.out, minutes, arguments.workers, arguments.port)
    if arguments.rank is not None or arguments.workers == 1:
        work(arguments.rank or 0, *settings)
        return
    import torch

    torch.multiprocessing.spawn(work, args=settings, nprocs=arguments.workers)


if __name__ == "__main__":
    main()
