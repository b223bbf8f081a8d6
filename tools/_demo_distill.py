"""The demo's LoRA: trains a LoRA that gives few steps the quality of many.

In:   a folder with `vae.pt` and `transformer.pt`, minutes. Out: `lora.pt` in it.

The training data are videos of the trained model, each with its initial noise. A LoRA of low rank learns a straight
line from the noise to the video, so that the number of steps on this line matters little.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _demo_optimiser import Optimiser
from _demo_stock import Batch, Stock
from _demo_transformer import SHIFT, Ready, distinct, predict_velocity
from _demo_vae import (
    average_gradients,
    common_clock,
    fast_convolutions,
    pick_device,
    save_training,
    update_average,
)
from torch import nn

from runner.generation.sampling import official_sigmas

__all__ = ["LORA_NAMES", "RANK", "attach", "distill", "published_tensors"]

RANK = 16
TEACHER_STEPS = 12
LATENT_FRAMES, COUNT = 6, 3
PARTS = ("down", "up", "diff_b")
PAIRS = 180  # videos of the teacher that each worker learns from
# Layers of a block that get a LoRA, by the library's names and by the published names.
LORA_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
HEAD = ("proj_out", "head.head")


class Adapted(nn.Module):
    """A frozen linear layer with a LoRA and an additional bias."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        self.diff_b = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T + self.diff_b


def attach(model: Any, rank: int = RANK) -> dict[str, Adapted]:
    """Freeze `model` and add a LoRA to its layers. Return them by their published names without the prefix."""
    model.requires_grad_(False)
    blocks = [(f"blocks.{i}.{a}", f"blocks.{i}.{b}") for i in range(len(model.blocks)) for a, b in LORA_NAMES.items()]
    adapted = {}
    for ours, theirs in (*blocks, HEAD):
        parent, _, name = ours.rpartition(".")
        owner = model.get_submodule(parent)
        layer = Adapted(owner.get_submodule(name), rank)
        if isinstance(owner, nn.ModuleList | nn.Sequential):
            owner[int(name)] = layer
        else:
            setattr(owner, name, layer)
        adapted[theirs] = layer
    return adapted


def published_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`LAYER.down`, `.up`, `.diff_b` under the keys of the published file, in bf16."""
    names = {"down": "lora_down.weight", "up": "lora_up.weight", "diff_b": "diff_b"}
    keys = {key: key.rpartition(".") for key in state}
    return {
        f"diffusion_model.{layer}.{names[part]}": state[key].bfloat16().contiguous()
        for key, (layer, _, part) in keys.items()
    }


class Pairs:
    """The teacher's videos, each with its noise and its conditions, and batches of points between noise and video."""

    def __init__(self, pipe: Any, text: torch.Tensor, bias: torch.Tensor, rng: np.random.Generator) -> None:
        self.pipe, self.text, self.bias, self.rng = pipe, text, bias, rng
        self.held: list[tuple[Batch, torch.Tensor, torch.Tensor]] = []
        self.levels = np.unique(np.concatenate([official_sigmas(n, SHIFT)[:-1] for n in (1, 2, 4, 6)]))

    @torch.no_grad()
    def add(self) -> None:
        """Add COUNT new videos, made in TEACHER_STEPS. The model must have its own motion encoder."""
        model, stock = self.pipe.transformer, Stock(self.pipe, self.rng, COUNT)
        for _ in range(COUNT):
            stock.add()
        batch = stock.batch(COUNT, LATENT_FRAMES)
        x = noise = torch.randn_like(batch.clean)
        levels = torch.from_numpy(official_sigmas(TEACHER_STEPS, SHIFT)).float().to(noise.device)
        encoder, model.motion_encoder = model.motion_encoder, Ready()
        for level, following in pairwise(levels):
            x = x + (following - level) * predict_velocity(model, batch, self.text, self.bias, x, level.expand(COUNT))
        model.motion_encoder = encoder
        self.held.append((batch, noise, x))

    def loss(self) -> torch.Tensor:
        """Return the error of the model's velocity against the straight line, at random points of the lines.

        Half of the points are at full noise, where every sigma schedule begins; a single step has only this point.
        """
        batch, noise, made = self.held[self.rng.integers(len(self.held))]
        some = np.where(self.rng.uniform(size=COUNT) < 0.5, 1.0, self.rng.choice(self.levels, COUNT))
        sigma = torch.from_numpy(some).float().to(noise.device)
        between = made + sigma.view(-1, 1, 1, 1, 1) * (noise - made)
        velocity = predict_velocity(self.pipe.transformer, batch, self.text, self.bias, between, sigma)
        return ((velocity - (noise - made)).square().mean(dim=1, keepdim=True) * batch.weight).mean()


class Layers(nn.Module):
    """All LoRA layers of a model; `tensors` are named as published, without prefix and suffix."""

    def __init__(self, adapted: dict[str, Adapted]) -> None:
        super().__init__()
        self.names = list(adapted)
        self.layers = nn.ModuleList(adapted.values())

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{part}": getattr(layer, part).data
            for name, layer in zip(self.names, self.layers, strict=True)
            for part in PARTS
        }


def distill(folder: Path, pipe: Any, texts: list[torch.Tensor], minutes: float, rank: int = 0, world: int = 1) -> None:
    """Train for `minutes`, at most two fifths for the teacher's videos. Continues from `lora.pt` if it exists."""
    device = pick_device()
    fast_convolutions()
    pipe.to(device)
    model, path = pipe.transformer, folder / "lora.pt"
    model.load_state_dict(torch.load(folder / "transformer.pt", map_location=device, weights_only=True)["average"])
    torch.manual_seed(rank + 5)
    begun = time.monotonic()
    pairs = Pairs(pipe, *distinct(texts[0].to(device)), np.random.default_rng([rank, 23]))
    while not pairs.held or (len(pairs.held) * COUNT < PAIRS and time.monotonic() - begun < 60 * minutes * 0.4):
        pairs.add()
    model.motion_encoder = Ready()
    layers = Layers(attach(model)).to(device)
    tensors, optimiser = layers.tensors(), Optimiser(layers.parameters(), weight_decay=0.0)
    average, step = {key: value.clone() for key, value in tensors.items()}, 0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        for key, value in tensors.items():
            value.copy_(saved["model"][key])
        optimiser.load_state_dict(saved["optimiser"])
        average, step = saved["average"], saved["step"]
    recent: list[float] = []
    while (spent := common_clock(begun, world)) < 60 * minutes:
        rate = float(1e-3 * min(1, (step + 1) / 30) * max(0.05, 1 - spent / (60 * minutes)))
        loss = pairs.loss()
        optimiser.zero_grad()
        loss.backward()
        average_gradients(optimiser.parameters, world)
        nn.utils.clip_grad_norm_(optimiser.parameters, 1.0)
        optimiser.step(rate)
        step += 1
        update_average(average, tensors, min(0.99, step / (step + 10)))
        recent.append(float(loss.detach()))
        if step % 25 == 0 and rank == 0:
            print(f"distill step {step} {spent:.0f}s loss {np.mean(recent[-100:]):.4f}", flush=True)
    if rank == 0:
        save_training(path, tensors, optimiser, average, step, spent)
