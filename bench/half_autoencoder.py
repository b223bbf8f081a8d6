"""The autoencoder in 16 bits against float32: the demo's trained models, through 1 and 8 chained segments.

    python bench/half_autoencoder.py [--clips N] [--models DIR] [--json PATH]

It compares frames of the product's own pipeline (uint8, 96x144, windows of 9 frames with one in common) with the
autoencoder in bfloat16 and in float16 against float32; everything else is in float32. Each segment after the first
begins with the decoded end of the one before. `autoencoder alone`: a clip that is encoded and decoded, window by window
in the same chain. PSNR in dB over all frames, and over those of the last segment.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "tools"), str(ROOT)]

import _picture as picture  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from _json_file import write_json  # noqa: E402
from demo_world import Example, example  # noqa: E402
from quality import HEIGHT, SEED, WIDTH, Renderer, Trial  # noqa: E402

from runner.errors import NotFinite  # noqa: E402
from runner.generation.wan_animate.autoencoder import prepare_vae  # noqa: E402
from runner.generation.wan_animate.half_choice import pick_half  # noqa: E402
from runner.generation.wan_animate.transformer import Switches  # noqa: E402

SEGMENTS, WINDOW, STEPS = (1, 8), 9, 6
DTYPES = (torch.bfloat16, torch.float16)
GATE_DB = 55.0  # of the type that is picked


def reconstructed(vae: Any, clip: np.ndarray) -> np.ndarray:
    """The clip encoded and decoded, a window at a time; each begins with the last decoded frame."""
    pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].to(vae.dtype) / 127.5 - 1
    found = [pixels[:, :, :0]]
    previous = pixels[:, :, :1]
    for start in range(0, len(clip) - 1, WINDOW - 1):
        window = torch.cat([previous, pixels[:, :, start + 1 : start + WINDOW]], dim=2)
        decoded = vae.decode(vae.encode(window).latent_dist.mode(), return_dict=False)[0]
        found.append(decoded[:, :, 1 if start else 0 :])
        previous = decoded[:, :, -1:]
    frames = torch.cat(found, dim=2)[0].permute(1, 2, 3, 0).float().numpy()
    return np.asarray(((frames + 1) * 127.5).round().clip(0, 255).astype(np.uint8))


def rendered(renderer: Renderer, made: Example, segments: int, vae: Any, seed: int) -> np.ndarray | None:
    """None where a number was not finite."""
    renderer.pipeline.vae = vae
    frames = 1 + segments * (WINDOW - 1)
    try:
        return renderer.render(made, Trial("", "bf16", STEPS, frames=frames, window=WINDOW), seed)
    except NotFinite:
        return None


@torch.no_grad()
def measure(renderer: Renderer, clips: int) -> list[dict[str, Any]]:
    rows = []
    vaes = {dtype: copy.deepcopy(renderer.pipeline.vae).to(dtype) for dtype in (torch.float32, *DTYPES)}
    for vae in vaes.values():
        prepare_vae(vae, Switches())
    for index in range(clips):
        rng = np.random.default_rng([SEED, index])
        size = renderer.pipeline.transformer.config.motion_encoder_size
        made = example(rng, WIDTH, HEIGHT, 1 + max(SEGMENTS) * (WINDOW - 1), size)
        for segments in SEGMENTS:
            truth = made.truth[: 1 + segments * (WINDOW - 1)]
            ways = {
                "autoencoder alone": lambda dtype, truth=truth: reconstructed(vaes[dtype], truth),
                "whole pipeline": lambda dtype, segments=segments, made=made, index=index: rendered(
                    renderer, made, segments, vaes[dtype], index
                ),
            }
            for way, run in ways.items():
                exact = run(torch.float32)
                assert exact is not None
                for dtype in DTYPES:
                    found = run(dtype)
                    last = slice(1 - WINDOW, None)
                    rows.append(
                        {
                            "way": way,
                            "segments": segments,
                            "dtype": str(dtype).removeprefix("torch."),
                            "clip": index,
                            "psnr": 0.0 if found is None else picture.psnr(found, exact),
                            "psnr last": 0.0 if found is None else picture.psnr(found[last], exact[last]),
                        }
                    )
                    print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--models", type=Path, default=ROOT / ".cache" / "demo-models")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from runner.demo.build import build_demo_models

    build_demo_models(args.models)
    renderer = Renderer(args.models, Path(), ["bf16"])
    picked, why = pick_half(renderer.pipeline.vae)
    name = str(picked).removeprefix("torch.")
    print(f"picked: {name}; {why}")
    rows = measure(renderer, args.clips)
    print("\n| way | segments | bfloat16: all, last | float16: all, last |\n|---|---|---|---|")
    for way in dict.fromkeys(row["way"] for row in rows):
        for segments in SEGMENTS:
            cells = []
            for dtype in ("bfloat16", "float16"):
                some = [r for r in rows if (r["way"], r["segments"], r["dtype"]) == (way, segments, dtype)]
                cells.append(", ".join(f"{min(r[key] for r in some):.1f}" for key in ("psnr", "psnr last")))
            print(f"| {way} | {segments} | {' | '.join(cells)} |")
    worst = min(row["psnr"] for row in rows if row["dtype"] == name)
    print(f"least of {name}: {worst:.1f} dB, {GATE_DB:g} asked for")
    if args.json:
        write_json(args.json, {"picked": name, "why": why, "rows": rows})
    return 0 if worst >= GATE_DB else 1


if __name__ == "__main__":
    raise SystemExit(main())
