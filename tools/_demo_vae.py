"""Trains the demo's autoencoder: a tiny AutoencoderKLWan on drawn dancers, skeletons and scenes.

In:   a folder for checkpoints, minutes. Out: `vae.pt` in it (weights, their average, the optimiser: resumable), and
`decoder.pt`, whose decoder was trained further with a frozen encoder.
Training starts with single frames, which leave the first plateau at low cost, and continues with clips.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _demo_optimiser import Optimiser
from demo_world import random_take, skeletons
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan

from runner.demo.dancers import backdrop, draw_dancer, random_dancer
from runner.demo.scenes import SCENES, scene

__all__ = [
    "VAE_CONFIG",
    "average_gradients",
    "common_clock",
    "decode_unclamped",
    "fast_convolutions",
    "measure_latents",
    "new_vae",
    "pick_device",
    "resume",
    "save_training",
    "train_decoder",
    "train_vae",
    "update_average",
]

WIDTH, HEIGHT, FRAMES, CROP = 96, 144, 17, 48
STOCK = 150  # clips of each worker, from which batches are cut
FRAME_SHARE = 0.12  # of the time goes to single frames
FRAME_RATE, CLIP_RATE = 2e-3, 1.5e-3  # peaks of AdamW's learning rate
CLIPS = {5: 4, 9: 2, 17: 1}  # frames of a clip: clips of a batch
SLIP = 0.1  # of a channel's deviation: noise on the latents for the decoder's training, like the transformer's errors
VAE_CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "decoder_base_dim": 24,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}


def new_vae(**more: Any) -> AutoencoderKLWan:
    return AutoencoderKLWan(**VAE_CONFIG, **more)


def fast_convolutions() -> None:
    """Compute causal 3-D convolutions as sums of 2-D ones, without taps on padding: half the time on a CPU."""
    from torch.nn import functional as F

    def forward(self: Any, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        pad = list(self._padding)
        if cache_x is not None and pad[4] > 0:
            x = torch.cat([cache_x, x], dim=2)
            pad[4] -= cache_x.shape[2]
        taps, front = self.weight.shape[2], pad[4]
        if self.stride[0] != 1 or max(pad[4:]) < 0:
            return F.conv3d(F.pad(x, pad), self.weight, self.bias, self.stride)
        b, c, t, h, w = x.shape
        length = t + front - taps + 1
        total: Any = None
        for k in range(taps):
            first, last = max(k - front, 0), k - front + length
            if last <= first:
                continue
            part = x[:, :, first:last].transpose(1, 2).reshape(-1, c, h, w)
            y = F.conv2d(part, self.weight[:, :, k], None, padding=(pad[2], pad[0]))
            y = y.view(b, last - first, *y.shape[1:]).transpose(1, 2)
            y = F.pad(y, (0, 0, 0, 0, length - (last - first), 0)) if last - first < length else y
            total = y if total is None else total + y
        return total if self.bias is None else total + self.bias.view(1, -1, 1, 1, 1)

    autoencoder_kl_wan.WanCausalConv3d.forward = forward


def decode_unclamped(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """`vae.decode` without its clamp to [-1, 1], which stops the gradients of pixels outside this range."""
    vae.clear_cache()
    x, parts = vae.post_quant_conv(z), []
    for i in range(x.shape[2]):
        vae._conv_idx = [0]
        parts.append(
            vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return autoencoder_kl_wan.unpatchify(torch.cat(parts, 2), patch_size=vae.config.patch_size)


def _clip(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 [FRAMES, H, W, 3] and the places of drawn things, [k, 2] (x, y)."""
    take = random_take(rng, WIDTH, HEIGHT, FRAMES)
    joints, kind = take.joints(), rng.uniform()
    if kind < 0.25:
        frames = skeletons(joints, WIDTH, HEIGHT)
    else:
        dancer = random_dancer(rng)
        ground = backdrop(dancer, WIDTH, HEIGHT)
        if kind < 0.40:
            ground = scene(str(rng.choice(sorted(SCENES))), WIDTH, HEIGHT, seed=int(rng.integers(1 << 30)))
        frames = np.stack([draw_dancer(ground.copy(), j, take.stage.height, dancer) for j in joints])
        if kind < 0.33:  # the background of replace mode: blacked out where the dancer was
            black = np.abs(frames.astype(int) - ground).max(3) > 8
            frames = np.where(black[..., None], 0, np.broadcast_to(ground, frames.shape)).astype(np.uint8)
    return frames, joints.reshape(-1, 2)


class _Stock:
    """Clips to cut batches from; every few batches a new clip replaces an old one."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.clips = rng, [_clip(rng) for _ in range(size)]

    def batch(self, count: int, frames: int, crop: int) -> torch.Tensor:
        cut = []
        for _ in range(count):
            clip, points = self.clips[self.rng.integers(len(self.clips))]
            x, y = points[self.rng.integers(len(points))] + self.rng.uniform(-crop / 2, crop / 2, 2)
            left, top = (int(np.clip(v - crop / 2, 0, most - crop)) for v, most in ((x, WIDTH), (y, HEIGHT)))
            start = int(self.rng.integers(FRAMES - frames + 1))
            cut.append(clip[start : start + frames, top : top + crop, left : left + crop])
        return torch.from_numpy(np.stack(cut)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1

    def renew(self) -> None:
        self.clips[self.rng.integers(len(self.clips))] = _clip(self.rng)


def average_gradients(parameters: list[torch.nn.Parameter], world: int) -> None:
    if world > 1:
        with_gradient = [p for p in parameters if p.grad is not None]
        flat = torch.cat([p.grad.reshape(-1) for p in with_gradient])
        torch.distributed.all_reduce(flat)
        flat /= world
        for p, g in zip(with_gradient, flat.split([p.numel() for p in with_gradient]), strict=True):
            p.grad.copy_(g.view_as(p.grad))


def pick_device() -> torch.device:
    """Return CUDA if available, else the CPU with one thread per worker: more threads would wait for each other."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


def common_clock(begun: float, world: int) -> float:
    """Return the seconds since `begun` by the first worker's clock, so that all workers stop at the same step."""
    clock = torch.tensor([time.monotonic() - begun])
    if world > 1:
        torch.distributed.broadcast(clock, 0)
    return float(clock)


@torch.no_grad()
def update_average(average: dict[str, torch.Tensor], state: dict[str, torch.Tensor], decay: float) -> None:
    """Move `average` towards `state` in place."""
    for key, value in state.items():
        average[key].lerp_(value, 1 - decay)


def train_vae(folder: Path, minutes: float, rank: int = 0, world: int = 1, clips: int = 40) -> None:
    """Train until `minutes` have passed in total, over all resumptions; the learning rate falls until then."""
    torch.manual_seed(1000 * rank)
    vae, path = new_vae(), folder / "vae.pt"

    def losses(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = vae.encode(x).latent_dist
        difference = decode_unclamped(vae, posterior.sample()) - x
        squared = difference.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return difference.abs().mean() + squared + 1e-4 * kl, squared

    _train("vae", vae, path, losses, minutes, FRAME_SHARE, rank, world)
    if rank == 0:
        measure_latents(path, clips)


def train_decoder(folder: Path, minutes: float, rank: int = 0, world: int = 1) -> None:
    """Train the decoder of `vae.pt` further until `minutes` have passed in total; the latents do not change."""
    torch.manual_seed(1000 * rank + 1)
    saved = torch.load(folder / "vae.pt", map_location="cpu", weights_only=True)
    vae, path = new_vae(), folder / "decoder.pt"
    vae.load_state_dict(saved["average"])
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    deviation = torch.tensor(saved["latents_std"]).view(1, -1, 1, 1, 1)

    def losses(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mean
        slip = SLIP * torch.rand(len(x), 1, 1, 1, 1) * deviation
        latents = latents + slip.to(latents) * torch.randn_like(latents)
        difference = decode_unclamped(vae, latents) - x
        squared = difference.square().mean()
        return difference.abs().mean() + squared, squared

    _train("decoder", vae, path, losses, minutes, 0.0, rank, world)


def _train(
    name: str,
    vae: Any,
    path: Path,
    losses: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    minutes: float,
    frame_share: float,
    rank: int,
    world: int,
) -> None:
    """Minimise the first of `losses` (the second is the mean squared error) of batches cut from clips."""
    device = pick_device()
    fast_convolutions()
    vae.to(device)
    optimiser = Optimiser(vae.parameters())
    average, step, spent = resume(path, vae, optimiser)
    if world > 1:
        for p in vae.parameters():
            torch.distributed.broadcast(p.data, 0)
    stock, shared = _Stock(np.random.default_rng([rank, step, 7]), STOCK), np.random.default_rng(step)
    begun, last_saved, recent = time.monotonic() - spent, time.monotonic(), []
    while (spent := common_clock(begun, world)) < 60 * minutes:
        done = spent / (60 * minutes)
        frames_only = done < frame_share
        fall = 0.03 + 0.97 * 0.5 * (1 + np.cos(np.pi * done))
        rate = float((FRAME_RATE if frames_only else CLIP_RATE) * min(1, (step + 1) / 100) * fall)
        frames = 1 if frames_only else int(shared.choice(list(CLIPS)))  # the same on every worker
        x = stock.batch(CLIPS.get(frames, 8), frames, CROP).to(device)
        if step % 4 == 0:
            stock.renew()
        vae.clear_cache()
        loss, squared = losses(x)
        optimiser.zero_grad()
        loss.backward()
        average_gradients(optimiser.parameters, world)
        torch.nn.utils.clip_grad_norm_(optimiser.parameters, 1.0)
        optimiser.step(rate)
        step += 1
        update_average(average, vae.state_dict(), min(0.998, step / (step + 10)))
        recent.append(float(squared.detach()))
        if step % 100 == 0 and rank == 0:
            decibel = 10 * np.log10(4 / np.mean(recent[-100:]))
            print(f"{name} step {step} {spent:.0f}s psnr {decibel:.2f} rate {rate:.5f}", flush=True)
        if rank == 0 and time.monotonic() - last_saved > 120:
            save_training(path, vae.state_dict(), optimiser, average, step, spent)
            last_saved = time.monotonic()
    if rank == 0:
        save_training(path, vae.state_dict(), optimiser, average, step, spent)


@torch.no_grad()
def measure_latents(path: Path, clips: int = 40) -> None:
    """Add mean and deviation of each latent channel over dancers to the checkpoint, for normalisation."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    vae = new_vae().eval()
    vae.load_state_dict(saved["average"])
    rng, latents = np.random.default_rng(3), []
    while len(latents) < clips:
        take, dancer = random_take(rng, WIDTH, HEIGHT, FRAMES), random_dancer(rng)
        ground = backdrop(dancer, WIDTH, HEIGHT)
        frames = np.stack([draw_dancer(ground.copy(), j, take.stage.height, dancer) for j in take.joints()])
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        latents.append(vae.encode(video).latent_dist.mean[0])
    values = torch.stack(latents).transpose(0, 1).flatten(1)
    saved["latents_mean"], saved["latents_std"] = values.mean(1).tolist(), values.std(1).tolist()
    fresh = path.with_suffix(".tmp")
    torch.save(saved, fresh)
    fresh.replace(path)


def resume(path: Path, model: torch.nn.Module, optimiser: Any) -> tuple[dict[str, torch.Tensor], int, float]:
    """Load both from the checkpoint at `path`, if it exists. Return the average, and steps and seconds so far."""
    if not path.exists():
        return {key: value.clone() for key, value in model.state_dict().items()}, 0, 0.0
    saved = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
    model.load_state_dict(saved["model"])
    optimiser.load_state_dict(saved["optimiser"])
    return saved["average"], saved["step"], saved["spent"]


def save_training(
    path: Path,
    tensors: dict[str, torch.Tensor],
    optimiser: Any,
    average: dict[str, torch.Tensor],
    step: int,
    spent: float,
) -> None:
    """Replace the checkpoint at `path` atomically."""
    state = {"model": tensors, "average": average, "optimiser": optimiser.state_dict(), "step": step, "spent": spent}
    fresh = path.with_suffix(".tmp")
    torch.save(state, fresh)
    fresh.replace(path)
