"""One job of the original scripts: a process that imports, loads, renders with the library's pipeline, and ends.

    python bench/_original_job.py COMPONENTS INPUTS.npz STEPS SEED

Prints CPU seconds by part as JSON, and the digest of the frames. `render` shares nothing between steps and encodes
everything again for each job. The library is unchanged, except for one setting: CLIP gets the whole reference.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np


def load(components: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanAnimatePipeline

    pipe = WanAnimatePipeline.from_pretrained(components, local_files_only=True)
    side = dict(pipe.image_processor.crop_size)
    pipe.image_processor.size, pipe.image_processor.do_center_crop = side, False
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def render(pipe: Any, inputs: dict[str, np.ndarray], prompt: str, steps: int, seed: int) -> np.ndarray:
    """uint8 [n, H, W, 3]."""
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    pose, face = ([Image.fromarray(frame) for frame in inputs[name]] for name in ("pose", "face"))
    frames = pipe(
        image=Image.fromarray(inputs["reference"]),
        pose_video=pose,
        face_video=face,
        prompt=prompt,
        height=pose[0].height,
        width=pose[0].width,
        segment_frame_length=len(pose),
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).frames[0]
    return (frames * 255).round().astype(np.uint8)


def digest(frames: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()


def main() -> int:
    components, inputs, steps, seed = Path(sys.argv[1]), dict(np.load(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4])
    prompt = str(inputs.pop("prompt"))
    import diffusers  # noqa: F401  what it needs comes with it

    marks = [0.0, time.process_time()]
    pipe = load(components)
    marks.append(time.process_time())
    frames = render(pipe, inputs, prompt, steps, seed)
    marks.append(time.process_time())
    parts = dict(zip(("import_s", "load_s", "render_s"), np.diff(marks).tolist(), strict=True))
    print(json.dumps({**parts, "cpu_s": marks[-1], "frames_sha256": digest(frames)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
