"""Encoders: load the text and the image encoder when they are first needed, and offload them between two inputs.

In:   how to load each, a device, an offload device. Out: the model, ready to be called while it is used.
Never: prompts, images, caching of results (tensor_cache.py, text_cache.py). An encoder is not loaded if every input is
already cached.

    offload  between inputs               while it computes, on the device
    device   whole on the device          the same
    host     in host memory               one layer at a time
    disk     not in memory                loaded again, one layer at a time, then dropped

Each of them computes on the same device with the same kernels, so frames do not depend on the offload device. UMT5-XXL
takes 11 GB in bfloat16. Layer by layer it takes 2.1 GB, for its embedding, and some seconds for a new prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import structlog
import torch

from runner.timing import StageTimer

__all__ = ["Encoder", "Encoders", "Offload", "runs_by_layer"]

Offload = Literal["device", "host", "disk"]


def runs_by_layer(offload: Offload, device: torch.device) -> bool:
    """Return whether layers are copied to the device one by one. On the CPU they are in its memory already."""
    return offload != "device" and device.type != "cpu"


class Encoder:
    """One encoder. For one thread."""

    def __init__(
        self, name: str, load: Callable[[], Any], *, nbytes: int = 0, by_layer: Callable[..., bool] = runs_by_layer
    ) -> None:
        """`load` reads the model into host memory, in evaluation mode, at every call. `nbytes`: of its weights."""
        self.name, self.nbytes = name, nbytes
        self.offload: Offload = "device"
        self.device = torch.device("cpu")
        self.loads = 0  # since this object was made
        self._load, self._by_layer = load, by_layer
        self._model: Any = None
        self._uncounted = 0  # loads that no timer has counted yet

    @classmethod
    def of(cls, name: str, model: Any) -> Encoder:
        """Wrap a model that is already loaded."""
        made = cls(name, lambda: model, nbytes=sum(p.nbytes for p in model.parameters()))
        made._model = model
        return made

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> Any:
        """Load the model if needed; return it on its offload device. With `disk` the caller must drop it after use."""
        if self._model is None:
            model = self._load()
            self.loads += 1
            self._uncounted += 1
            self._model = self._move(model)
            log = structlog.get_logger()
            log.debug("encoder_loaded", encoder=self.name, home=self.offload, device=str(self.device))
        return self._model

    def set_offload(self, device: torch.device, offload: Offload) -> None:
        """From now on compute on `device` and wait in `offload`. Moves or drops a loaded model; loads none.

        Raises ValueError for an unknown `offload`.
        """
        if offload not in get_args(Offload):
            raise ValueError(f"no offload device {offload!r} for an encoder; there are {', '.join(get_args(Offload))}")
        if (device, offload) == (self.device, self.offload):
            return
        self.device, self.offload = device, offload
        if self._model is not None:
            model, self._model = self._model, None
            self._model = self._move(model) if offload != "disk" else None

    def release(self) -> None:
        """Drop the model. The next input loads it again."""
        self._model = None

    @contextmanager
    def loaded(self, timer: StageTimer) -> Iterator[Any]:
        """Yield the model, ready for inputs on `device`. Times loading as a stage and counts it as `name`_loads."""
        if self._model is None:
            with timer.stage("load_encoders"):
                _ = self.model
        if self._uncounted:
            timer.count(f"{self.name}_loads", self._uncounted)
            self._uncounted = 0
        try:
            yield self._model
        finally:
            if self.offload == "disk":
                self.release()

    def _move(self, model: Any) -> Any:
        """Move the model to its offload device."""
        from accelerate import cpu_offload
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(model)  # else hooks of the last setting would copy the weights to the old device
        if self._by_layer(self.offload, self.device):
            model.to("cpu")
            return cpu_offload(model, execution_device=self.device)
        return model.to(self.device)


@dataclass(frozen=True)
class Encoders:
    """The text and the image encoder."""

    text: Encoder
    image: Encoder

    def set_offload(self, device: torch.device, offload: Offload) -> None:
        """As `Encoder.set_offload`, for both."""
        for encoder in (self.text, self.image):
            encoder.set_offload(device, offload)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of both, loaded or not."""
        return self.text.nbytes + self.image.nbytes

    def __iter__(self) -> Iterator[Encoder]:
        return iter((self.text, self.image))
