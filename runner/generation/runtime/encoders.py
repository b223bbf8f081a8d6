"""Encoders: the text and the image encoder, read when first needed, and where they rest between two inputs.

In:   how to load each, a device, a home. Out: the model, ready to be called, for as long as somebody needs it.
Never: prompts, images, what is kept of the results (memos.py, text_cache.py). An encoder is not loaded if every input
is already cached.

    home     between inputs               while it computes, on the device
    device   whole on the device          the same
    host     in host memory               one layer at a time
    disk     nowhere: read again          one layer at a time, then gone

All compute on the same device with the same kernels: frames do not depend on the home. UMT5-XXL has 11 GB in bfloat16;
layer by layer it needs 2.1 GB, for its embedding, and seconds for a new prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import structlog
import torch

from runner.timing import StageTimer

__all__ = ["Encoder", "Encoders", "Home", "comes_by_layer"]

Home = Literal["device", "host", "disk"]


def comes_by_layer(home: Home, device: torch.device) -> bool:
    """Do the layers come to the device one by one? Where the device is the CPU they are there already."""
    return home != "device" and device.type != "cpu"


class Encoder:
    """One encoder. For one thread."""

    def __init__(
        self, name: str, load: Callable[[], Any], *, nbytes: int = 0, by_layer: Callable[..., bool] = comes_by_layer
    ) -> None:
        """`load`: reads the model onto the host, in evaluation mode; may be called again. `nbytes`: of its weights."""
        self.name, self.nbytes = name, nbytes
        self.home: Home = "device"
        self.device = torch.device("cpu")
        self.loads = 0  # since it was made
        self._load, self._by_layer = load, by_layer
        self._model: Any = None
        self._uncounted = 0  # loads that no job has been charged with

    @classmethod
    def of(cls, name: str, model: Any) -> Encoder:
        """An encoder that somebody has loaded, and keeps."""
        made = cls(name, lambda: model, nbytes=sum(p.nbytes for p in model.parameters()))
        made._model = model
        return made

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> Any:
        """The model, loaded if it was not, where its home is. With home disk, one that nobody keeps after `awake`."""
        if self._model is None:
            model = self._load()
            self.loads += 1
            self._uncounted += 1
            self._model = self._settled(model)
            structlog.get_logger().debug("encoder_loaded", encoder=self.name, home=self.home, device=str(self.device))
        return self._model

    def settle(self, device: torch.device, home: Home) -> None:
        """Compute on `device` and rest at `home` from now on. Loads nothing; a model that is there moves, or goes."""
        if home not in get_args(Home):
            raise ValueError(f"no home {home!r} for an encoder; there are {', '.join(get_args(Home))}")
        if (device, home) == (self.device, self.home):
            return
        self.device, self.home = device, home
        if self._model is not None:
            model, self._model = self._model, None
            self._model = self._settled(model) if home != "disk" else None

    def release(self) -> None:
        """Forget the model; the next input loads it again."""
        self._model = None

    @contextmanager
    def awake(self, timer: StageTimer) -> Iterator[Any]:
        """The model, ready for inputs on `device`. Loading is a stage of its own and is counted as `name`_loads."""
        if self._model is None:
            with timer.stage("load_encoders"):
                _ = self.model
        if self._uncounted:
            timer.count(f"{self.name}_loads", self._uncounted)
            self._uncounted = 0
        try:
            yield self._model
        finally:
            if self.home == "disk":
                self.release()

    def _settled(self, model: Any) -> Any:
        from accelerate import cpu_offload
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(model)  # else those of the last home would fetch the weights to the old device
        if self._by_layer(self.home, self.device):
            model.to("cpu")
            return cpu_offload(model, execution_device=self.device)
        return model.to(self.device)


@dataclass(frozen=True)
class Encoders:
    """Both of them."""

    text: Encoder
    image: Encoder

    def settle(self, device: torch.device, home: Home) -> None:
        """As `Encoder.settle`, for both."""
        for encoder in (self.text, self.image):
            encoder.settle(device, home)

    @property
    def nbytes(self) -> int:
        """Of the weights of both, loaded or not."""
        return self.text.nbytes + self.image.nbytes

    def __iter__(self) -> Iterator[Encoder]:
        return iter((self.text, self.image))
