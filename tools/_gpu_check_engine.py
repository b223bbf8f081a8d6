"""Part `engine` of the GPU check: the engine's benchmark on full-size random weights, in the remaining time."""

from __future__ import annotations

import engine
import torch
from _gpu_check_record import PartRecord

CHOSEN = ("ceilings", "linears", "exact", "low_bits", "modes", "headlines")
TINY = ("ceilings", "exact")
END_S = 10.0  # reserve for the measurement that runs when the time is over


def run(part: PartRecord, device: torch.device, *, tiny: bool) -> None:
    """Run the benchmark; `part` gets its tables as they grow."""
    tables, lines = engine.run(
        device,
        chosen=TINY if tiny else CHOSEN,
        seconds=max(1.0, part.left() - END_S),
        quick=tiny,
        report=part.replace,
    )
    part.replace(tables | {"notes": [{"note": line} for line in lines]})
