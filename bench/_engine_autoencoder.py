"""The autoencoder alone: our frame loop beside the library's, and the scene of a later window with reused outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from _engine_ceilings import seconds
from _quantization import Rows
from diffusers import AutoencoderKLWan

from runner.forecast.flops import TERA, Costs
from runner.generation.wan_animate import autoencoder
from runner.generation.wan_animate.autoencoder import FramewiseVae, prepare_vae
from runner.generation.wan_animate.transformer import Switches

FRAMES = 81
NARROW = {"base_dim": 16}  # of the published autoencoder, for a CPU: a sixth of its channels


def walks(config: Mapping[str, Any], size: tuple[int, int], device: torch.device, frames: int) -> Rows:
    """Measure the seconds of encoding and decoding a clip by each frame loop, with the same random float32 weights.

    Also return the largest difference of our results from the library's, relative to the largest value.
    """
    torch.manual_seed(0)
    with torch.device(device):
        theirs, pixels = AutoencoderKLWan(**config).eval(), torch.rand(1, 3, frames, *reversed(size)) * 2 - 1
    ours = FramewiseVae.from_config(theirs.config).to(device).eval()
    ours.load_state_dict(theirs.state_dict())
    prepare_vae(ours, Switches())
    rows: Rows = []
    with torch.no_grad():
        latents = theirs.encode(pixels).latent_dist.mode()
        works: dict[str, Callable[[Any], torch.Tensor]] = {
            "encode": lambda vae: vae.encode(pixels).latent_dist.parameters,
            "decode": lambda vae: vae.decode(latents, return_dict=False)[0],
        }
        for what, work in works.items():
            wanted = work(theirs)
            off = float((work(ours) - wanted).abs().max() / wanted.abs().max())
            spent = [seconds(partial(work, vae), device, repeats=2) for vae in (theirs, ours)]
            row = {"autoencoder": what, "the library's walk, s": spent[0], "ours, s": spent[1]}
            rows.append(row | {"ratio": spent[0] / spent[1], "off": off})
    return rows


def later_scenes(config: Mapping[str, Any], size: tuple[int, int], device: torch.device, frames: int = FRAMES) -> Rows:
    """Measure the seconds of each way with random float32 weights. Raises AssertionError if their bits differ."""
    torch.manual_seed(0)
    with torch.device(device):
        vae = FramewiseVae(**config).eval()
        pixels = torch.zeros(1, 3, frames, *reversed(size))
        pixels[:, :, 0] = torch.rand(3, *reversed(size)) * 2 - 1
    shape = Costs.from_configs({}, vae.config).vae

    def encode() -> torch.Tensor:
        found: torch.Tensor = vae.encode(pixels).latent_dist.parameters
        return found

    rows: Rows = []
    with torch.no_grad():
        with mock.patch.object(autoencoder, "find_repeats", lambda pixels: [False] * pixels.shape[2]):
            whole = encode()
            rows.append(row("every picture run", seconds(encode, device, repeats=1), shape.encode_flop(*size, frames)))
        if not torch.equal(encode(), whole):
            raise AssertionError("the latents with reused outputs have other bits")
        flop = shape.encode_flop(*size, frames, blank_from=1)
        rows.append(row("outputs that repeat reused", seconds(encode, device, repeats=1), flop))
    rows[1]["of the first row"] = rows[1]["s"] / rows[0]["s"]
    return rows


def row(what: str, spent: float, flop: float) -> dict[str, Any]:
    return {"scene of a later window": what, "s": spent, "TFLOP": flop / TERA, "of the first row": None}
