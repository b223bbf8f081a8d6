"""Trains the demo's transformer by flow matching on latents, with the official shifted noise levels.

In:   a folder with `vae.pt`, minutes. Out: `transformer.pt` in it (weights, their average, the optimiser: resumable).
Never: pixels, except those of examples that are encoded during training.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _demo_optimiser import Optimiser
from _demo_stock import Batch, Stock
from _demo_vae import (
    average_gradients,
    common_clock,
    fast_convolutions,
    pick_device,
    resume,
    save_training,
    update_average,
)
from torch import nn
from torch.nn import functional as F

from runner.generation.wan_animate.transformer import (
    ConditioningCache,
    Context,
    CrossAttended,
    KeyValue,
    attend_self,
    denoise_step,
    embed_context,
    in_heads,
    project,
)

__all__ = ["Ready", "predict_velocity", "train_transformer"]

SHIFT = 5.0
RATE = 1.5e-3  # peak of AdamW's learning rate
FIRST_STOCK = 60  # short examples at the start of a worker; it adds more, also long ones, during training
SHORT = 0.45  # of the time is for the first five frames: they contain everything to learn, at a quarter of the cost


class Ready(nn.Module):
    """Replaces the frozen motion encoder: its input is already the encoder's output."""

    def forward(self, motion: torch.Tensor) -> torch.Tensor:
        return motion.flatten(1)


def distinct(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a prompt's embedding [1, 512, d] with only one row of padding, and the attention bias of each row.

    All padding rows are equal, so that one row with the weight of all gives the same result.
    """
    words = int((text[0].abs().sum(1) > 0).sum())
    bias = torch.zeros(words + 1, device=text.device)
    bias[-1] = math.log(text.shape[1] - words)
    return text[:, : words + 1], bias


def run_block_briefly(bias: torch.Tensor) -> Any:
    """Return `transformer.run_block` for a prompt shortened by `distinct`, with gradients."""

    def cross(attn: Any, hidden: torch.Tensor, attended: CrossAttended) -> torch.Tensor:
        query = in_heads(attn, attn.norm_q(attn.to_q(hidden))).transpose(1, 2)

        def read(pair: KeyValue, mask: torch.Tensor | None) -> torch.Tensor:
            key, value = (t.transpose(1, 2).expand(query.shape[0], -1, -1, -1) for t in pair)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)

        out = read(attended.text, bias.view(1, 1, 1, -1).expand(1, 1, query.shape[2], -1))
        assert attended.image is not None
        return project(attn, out + read(attended.image, None))

    def step(block: Any, hidden: Any, modulation: Any, rope: Any, attended: CrossAttended) -> torch.Tensor:
        table = block.scale_shift_table + modulation
        shift, scale, gate, ff_shift, ff_scale, ff_gate = table.chunk(6, dim=1)
        hidden = hidden + attend_self(block.attn1, block.norm1(hidden) * (1 + scale) + shift, rope) * gate
        hidden = hidden + cross(block.attn2, block.norm2(hidden), attended)
        return hidden + block.ffn(block.norm3(hidden) * (1 + ff_scale) + ff_shift) * ff_gate

    return step


def predict_velocity(
    model: Any, batch: Batch, text: torch.Tensor, bias: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Return the model's velocity [B, 16, T, h, w] at noise levels `sigma` [B]; its motion encoder must be `Ready`."""
    (context,) = embed_context(model, [text], batch.clip)
    conditioning = ConditioningCache(model, Context(context.text, context.image), batch.pose, batch.motion)
    hidden = torch.cat([noisy, batch.scene], dim=1)
    return denoise_step(model, conditioning, hidden, 1000 * sigma, block_forward=run_block_briefly(bias))


def _choose(progress: float, rng: np.random.Generator) -> tuple[int, int]:
    """Return a batch's latent frames and examples: first single pictures and short clips; always equal token counts."""
    choices = [1, 1, 2] if progress < SHORT else [1, 3, 4, 5, 6] if progress < 0.75 else [2, 4, 5, 6]
    frames = int(rng.choice(choices))
    return frames, {1: 10, 2: 7, 3: 5, 4: 4, 5: 3, 6: 3}[frames]


def _losses(model: Any, batch: Batch, text: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the loss, at noise levels that are evenly spread before the shift, and the error of the clean latents."""
    count, device = len(batch.clean), batch.clean.device
    even = ((torch.arange(count) + torch.rand(count)) / count).to(device)
    sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
    level, noise = sigma.view(-1, 1, 1, 1, 1), torch.randn_like(batch.clean)
    encoder, model.motion_encoder = model.motion_encoder, Ready()
    velocity = predict_velocity(model, batch, text, bias, batch.clean + level * (noise - batch.clean), sigma)
    model.motion_encoder = encoder
    squared = (velocity - (noise - batch.clean)).square().mean(dim=1, keepdim=True)
    return (squared * batch.weight).mean(), float((squared.detach() * level**2)[:, :, 1:].mean())


def train_transformer(
    folder: Path, pipe: Any, texts: list[torch.Tensor], minutes: float, rank: int = 0, world: int = 1
) -> None:
    """Train until `minutes` have passed in total, over all resumptions. `texts`: embedded prompts, padded to 512."""
    device = pick_device()
    fast_convolutions()
    pipe.to(device)
    texts = [text.to(device) for text in texts]
    model, path = pipe.transformer, folder / "transformer.pt"
    for parameter in model.motion_encoder.parameters():
        parameter.requires_grad_(False)
    optimiser = Optimiser(model.parameters(), weight_decay=0.01)
    average, step, spent = resume(path, model, optimiser)
    rng = np.random.default_rng([rank, step, 11])
    torch.manual_seed(100_000 * rank + step)
    short, long = Stock(pipe, rng, 4000, frames=5), Stock(pipe, rng, 1500)
    for _ in range(FIRST_STOCK):
        short.add()
    while len(long.held) < (FIRST_STOCK if spent > SHORT * 60 * minutes else 1):
        long.add()
    prompts = [distinct(text) for text in texts]
    begun, last_saved, recent = time.monotonic() - spent, time.monotonic(), []
    while (spent := common_clock(begun, world)) < 60 * minutes:
        progress = spent / (60 * minutes)
        rate = float(RATE * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * progress))))
        if step % 2 == 0 and progress < SHORT:
            short.add()
        if step % 4 == 0:
            long.add()
        shared = np.random.default_rng(step)  # the same on every worker, because they wait for each other
        frames, count = _choose(progress, shared)
        batch = (short if frames <= 2 else long).batch(count, frames)
        loss, clean = _losses(model, batch, *prompts[step % len(prompts)])
        optimiser.zero_grad()
        loss.backward()
        average_gradients(optimiser.parameters, world)
        torch.nn.utils.clip_grad_norm_(optimiser.parameters, 1.0)
        optimiser.step(rate)
        step += 1
        update_average(average, model.state_dict(), min(0.998, step / (step + 10)))
        recent.append([float(loss.detach()), clean])
        if step % 50 == 0 and rank == 0:
            mean, clean = np.mean(recent[-200:], axis=0)
            made = f"made {short.made} {long.made}"
            print(f"transformer step {step} {spent:.0f}s loss {mean:.4f} clean {clean:.4f} {made}", flush=True)
        if rank == 0 and time.monotonic() - last_saved > 120:
            save_training(path, model.state_dict(), optimiser, average, step, spent)
            last_saved = time.monotonic()
    if rank == 0:
        save_training(path, model.state_dict(), optimiser, average, step, spent)
