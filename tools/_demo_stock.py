"""Training examples of the demo's transformer: encoded once, as the pipeline prepares them, and cached.

In:   the trained autoencoder and the frozen encoders. Out: batches of latents and conditions, tensors only.
All conditions are made by the pipeline's `prepare_*` methods from the project's own drawings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from demo_world import Example, example
from torch.nn import functional as F

__all__ = ["FRAMES", "HEIGHT", "WIDTH", "Batch", "Stock", "encode_example"]

WIDTH, HEIGHT, FRAMES = 96, 144, 21
REPLACE, CONTINUED = 0.15, 0.15  # shares of examples in replace mode, and of those with a given first frame
FIGURE = 3.0  # weight of a latent pixel of the dancer


@dataclass
class Batch:
    """B examples; T latent frames, the reference's in front."""

    clean: torch.Tensor  # [B, 16, T, h, w]: the target latents
    scene: torch.Tensor  # [B, 20, T, h, w]
    pose: torch.Tensor  # [B, 16, T - 1, h, w]
    motion: torch.Tensor  # [B, dim, 4 (T - 1) - 3, 1, 1]: the frozen motion encoder's output, used in its place
    clip: torch.Tensor  # [B, tokens, dim]
    weight: torch.Tensor  # [B, 1, T, h, w], of mean 1


def _video(frames: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> [1, 3, n, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@torch.no_grad()
def encode_example(
    pipe: Any, made: Example, *, continued: bool = False, blank: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Encode an example as `pipe`, the library's WanAnimatePipeline, does. `continued`: its first frame is given.

    `blank`: the part of an earlier example's `scene` behind the reference without given frames, reused to save time.
    """
    from PIL import Image

    device = pipe.vae.device

    image = Image.fromarray(made.reference)
    height, width = made.reference.shape[:2]
    frames, replace = len(made.truth), made.background is not None
    boxed = pipe.vae_image_processor.preprocess(image, height=height, width=width, resize_mode="fill")
    reference = pipe.prepare_reference_image_latents(boxed.float(), device=device)
    truth = pipe.prepare_pose_latents(_video(made.truth), device=device)
    if replace or continued or blank is None:
        rest = pipe.prepare_prev_segment_cond_latents(
            _video(made.truth[:1]).to(device) if continued else None,
            background_video=_video(made.background).to(device) if replace else None,
            mask_video=torch.from_numpy(made.mask)[None, None].float().to(device) / 255 if replace else None,
            segment_frame_length=frames,
            start_frame=int(continued),
            height=height,
            width=width,
            prev_segment_cond_frames=1,
            task="replace" if replace else "animate",
            device=device,
        )[0]
    else:
        rest = blank
    motion = pipe.transformer.motion_encoder(_video(made.face)[0].transpose(0, 1).to(device))
    figure = torch.from_numpy(made.silhouette)[None, None].float()
    figure = torch.cat([figure[:, :, :1].expand(-1, -1, 3, -1, -1), figure], dim=2)
    figure = F.max_pool3d(figure, (4, 8, 8))[0].to(device)
    weight = torch.cat([torch.full_like(figure[:, :1], 0.3), 1 + (FIGURE - 1) * figure], dim=1)
    return {
        "clean": torch.cat([reference[0, 4:], truth[0]], dim=1),
        "scene": torch.cat([reference[0], rest], dim=1),
        "pose": pipe.prepare_pose_latents(_video(made.pose), device=device)[0],
        "motion": motion.T[..., None, None],
        "clip": pipe.encode_image(image, device)[0],
        "weight": weight / weight.mean(),
    }


class Stock:
    """Encoded examples; new ones replace the oldest."""

    def __init__(self, pipe: Any, rng: np.random.Generator, most: int, frames: int = FRAMES) -> None:
        self.pipe, self.rng, self.most, self.frames = pipe, rng, most, frames
        self.held: list[dict[str, torch.Tensor]] = []
        self.made = 0
        self.blank: torch.Tensor | None = None

    def add(self) -> None:
        kind = self.rng.uniform()
        size = self.pipe.transformer.config.motion_encoder_size
        made = example(self.rng, WIDTH, HEIGHT, self.frames, size, replace=kind < REPLACE)
        continued = kind > 1 - CONTINUED
        encoded = encode_example(self.pipe, made, continued=continued, blank=self.blank)
        if REPLACE <= kind <= 1 - CONTINUED:
            self.blank = encoded["scene"][:, 1:]
        if len(self.held) < self.most:
            self.held.append(encoded)
        else:
            self.held[self.made % self.most] = encoded
        self.made += 1

    def batch(self, count: int, latent_frames: int) -> Batch:
        """Return `count` examples, cut after `latent_frames` latent frames; possible as the autoencoder is causal."""
        some = [self.held[i] for i in self.rng.integers(len(self.held), size=count)]

        def stack(name: str, frames: int) -> torch.Tensor:
            return torch.stack([one[name][:, :frames] for one in some])

        k = latent_frames
        return Batch(
            stack("clean", k + 1),
            stack("scene", k + 1),
            stack("pose", k),
            stack("motion", 4 * k - 3),
            torch.stack([one["clip"] for one in some]),
            stack("weight", k + 1),
        )
