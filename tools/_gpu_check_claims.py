"""The claims of the pages that a GPU proves or disproves, one row each, and how each is judged.

In:   the findings of a check. Out: `met`, `not met` or `not measured` for each claim, with the numbers.

A claim's text is a part of README.md or of a page in docs/, word for word, with its lines joined; the tests check it. A
limit is read from that text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from _gpu_check_findings import Findings, number

__all__ = ["CLAIMS", "Claim", "verdicts"]

Verdict = tuple[Literal["met", "not met", "not measured"], str]
NOT_MEASURED: Verdict = ("not measured", "")
NOISE = 1.03  # largest ratio of two times that count as equal
HIDDEN = 1.1  # largest ratio of a streamed step's time to a resident one's if the blocks hide the copies


@dataclass(frozen=True)
class Claim:
    """`text`: as the page has it. `judged`: the measured keys and how they decide. `judge`: the same as a function."""

    text: str
    judged: str
    judge: Callable[[str, Findings], Verdict]


def verdicts(findings: Findings) -> list[dict[str, str]]:
    """Return a row for each claim. A check at a smaller scale measures none of them."""
    rows = []
    for claim in CLAIMS:
        verdict, why = claim.judge(claim.text, findings) if findings.full_scale else NOT_MEASURED
        rows.append({"claim": claim.text, "verdict": verdict, "why": why, "judged": claim.judged})
    return rows


def decided(met: bool, why: str) -> Verdict:
    return ("met" if met else "not met"), why


def peak_of_mode(mode: str, text: str, findings: Findings) -> Verdict:
    """Judge the process's peak under the cap of the mode's card. Without NVML: the allocator's, without the context."""
    limit = float(re.findall(r"([\d.]+) GB \|", text)[0])  # in a cell of the table
    row = findings.row("engine", "modes", mode=mode)
    if "OutOfMemory" in str(row.get("note")):
        return "not met", f"under a cap of {row['cap, GB']} GB: {row['note']}"
    peak = number(row.get("NVML GB")) or number(row.get("peak GB"))
    if peak is None:
        return NOT_MEASURED[0], str(row.get("note", ""))
    return decided(peak <= limit, f"{peak:.2f} GB at its peak, {limit:g} GB forecast")


def compiled_blocks(text: str, findings: Findings) -> Verdict:
    rows = findings.rows("block", "blocks")
    if not rows:
        return NOT_MEASURED
    wrong = [f"{name_of(row)}: {row['broken'] or row['off_eager']}" for row in rows if not is_right(row)]
    worst = max(float(row["off_eager"]) for row in rows)
    return decided(
        not wrong, "; ".join(wrong) or f"{len(rows)} kinds of block compiled, off eager by {worst:.2g} at most"
    )


def is_right(row: Any) -> bool:
    return not row["broken"] and float(row["off_eager"]) <= row["limit"]


def name_of(row: Any) -> str:
    """Return a name such as `bf16`, `int8 by comfy_kitchen`, `bf16 with 8-bit attention`."""
    by = f" by {row['product']}" if row.get("product") else ""
    return f"{row['compute']}{by}{' with 8-bit attention' if row.get('attention_8bit') else ''}"


def leading_attention(text: str, findings: Findings) -> Verdict:
    rows = [row for row in findings.rows("block", "attention", kind="exact") if number(row.get("ms")) is not None]
    picked = next((row for row in rows if row["picked"]), None)
    if picked is None or len(rows) < 2:
        return NOT_MEASURED
    fastest = min(rows, key=lambda row: float(row["ms"]))
    why = f"{picked['backend']} {picked['ms']:.4g} ms; the fastest is {fastest['backend']}, {fastest['ms']:.4g} ms"
    return decided(picked["ms"] <= NOISE * fastest["ms"], why)


def fewer_bits(text: str, findings: Findings) -> Verdict:
    """Require of each precision of the device a right product, and a whole clip after the self-test on its layers."""
    rows = findings.rows("choices", "products", device_has_it=True)
    if not rows:
        return NOT_MEASURED
    refused = [f"{row['precision']}: {row['refused']}" for row in rows if row["refused"]]
    notes = {str(row["what"]).partition("+")[2]: str(row["note"]) for row in findings.rows("engine", "low_bits")}
    refused += [
        f"{row['precision']}: {note}"
        for row in rows
        if "ConfigInvalid" in (note := notes.get(row["precision"], "")) and not row["refused"]
    ]
    tested = [row["precision"] for row in rows if "error" in notes.get(row["precision"], "") and not row["refused"]]
    if refused:
        return "not met", "; ".join(refused)
    if len(tested) < len(rows):
        missing = sorted({row["precision"] for row in rows} - set(tested))
        return "not measured", f"the self-test on the layers' own weights: {', '.join(missing)}"
    return "met", ", ".join(f"{name}: {notes[name]}" for name in tested)


def no_other_compute(text: str, findings: Findings) -> Verdict:
    rows = findings.rows("choices", "products", device_has_it=False)
    if not rows:
        return NOT_MEASURED
    silent = [row["precision"] for row in rows if not str(row["refused"]).startswith("ConfigInvalid")]
    return decided(
        not silent, ", ".join(f"{row['precision']} is refused" for row in rows if row["precision"] not in silent)
    )


def eight_bit_attention(text: str, findings: Findings) -> Verdict:
    row = findings.row("choices", "attention", kind="8 bit")
    if row:
        why = f"{row['chosen']}, error {row['trial_error']:.3g} of {row['limit']:g} allowed"
        block = findings.row("block", "blocks", attention_8bit=True)
        if block and not is_right(block):
            return "not met", f"{why}; blocks: {block['broken'] or block['off_eager']}"
        return "met", why
    machine = findings.row("choices", "machine")
    packages = [name for name in ("comfy-kitchen", "sageattention") if machine.get(name)]
    refused = findings.failed("choices", "attention", kind="8 bit")
    if refused and packages:
        return "not met", f"{', '.join(packages)} installed; {refused[0]['error']}"
    return NOT_MEASURED[0], "no package is installed" if refused else ""


def copied_while_computing(text: str, findings: Findings) -> Verdict:
    pinned = findings.row("choices", "pinned").get("pinned")
    if pinned is False:
        return "not met", str(findings.row("choices", "pinned").get("why"))
    step = {row["mode"]: number(row.get("s a step")) for row in findings.rows("engine", "modes")}
    stream, resident = step.get("stream"), step.get("resident")
    if pinned is None or stream is None or resident is None:
        return NOT_MEASURED
    return decided(
        stream <= HIDDEN * resident, f"a streamed step takes {stream / resident:.3f} of a resident one's time"
    )


def same_frames(text: str, findings: Findings) -> Verdict:
    rows = findings.rows("block", "blocks")
    if not rows:
        return NOT_MEASURED
    unlike = [name_of(row) for row in rows if not row["same_bits_again"]]
    return decided(
        not unlike,
        f"other bits in a second run: {', '.join(unlike)}" if unlike else "a block gives the same bits again",
    )


def cuda_code_runs(text: str, findings: Findings) -> Verdict:
    """Judge the tests marked `gpu`: met when they pass on a device. Then the sentence may be removed from the page."""
    row = findings.row("choices", "gpu_tests")
    if not row or not row["passed"] + row["failed"]:
        return NOT_MEASURED
    failures = ", ".join(row["failures"][:5])
    return decided(not row["failed"], f"{row['passed']} gpu tests passed, {row['failed']} failed {failures}".strip())


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "| `resident` | everything on the GPU; where memory is short, encoders and preprocessing on the host; "
        "where there is room, the weights' 8-bit codes too | 18 to 35 GB |",
        "engine.modes[resident]: NVML GB, else peak GB, under the cap of the smallest card that `auto` takes it for",
        partial(peak_of_mode, "resident"),
    ),
    Claim(
        "| `stream` | the blocks wait in pinned memory, and the next one is copied while one computes; "
        "activations in few copies | 7.9 GB |",
        "engine.modes[stream]: NVML GB, else peak GB",
        partial(peak_of_mode, "stream"),
    ),
    Claim(
        "| `minimal` | one block at a time; the autoencoder in bfloat16 (in tiles above 480p); the encoders on disk "
        "| 4.9 GB |",
        "engine.modes[minimal]: NVML GB, else peak GB",
        partial(peak_of_mode, "minimal"),
    ),
    Claim(
        "the blocks wait in pinned memory, and the next one is copied while one computes",
        f"choices.pinned, and engine.modes: s a step of stream at most {HIDDEN:g} of resident's",
        copied_while_computing,
    ),
    Claim(
        "On a GPU the blocks are compiled by `torch.compile`, once for each size, and kept in `--cache`. Where "
        "compiling fails, they run eagerly.",
        "block.blocks: `broken` empty and off_eager within TOLERANCES, in every precision of the device",
        compiled_blocks,
    ),
    Claim(
        "Self-attention runs on the backend that is fastest on the GPU's architecture.",
        f"block.attention: ms of the one picked at most {NOISE:g} of the fastest exact one's",
        leading_attention,
    ),
    Claim(
        "`+fp8`, `+int8` and `+nvfp4` compute in fewer bits after a self-test on the layers' own weights.",
        "choices.products and engine.low_bits, for each precision that the device has",
        fewer_bits,
    ),
    Claim(
        "A precision that the GPU does not have is an error. No other precision is taken in its place.",
        "choices.products: `refused` for each precision that the device does not have",
        no_other_compute,
    ),
    Claim(
        "self-attention in 8 bits on a GPU, by comfy-kitchen's INT8 kernel (in the GPU image; compute capability "
        "7.5 to 12.x)",
        "choices.attention[8 bit], and block.blocks with attention_8bit",
        eight_bit_attention,
    ),
    Claim(
        "same seed, same frames",
        "block.blocks: same_bits_again, in every precision of the device",
        same_frames,
    ),
    Claim(
        "CUDA's own code (streamed blocks, compiled blocks, products in 8 and 4 bits, bound buffers) has only run as "
        "its CPU counterpart.",
        "choices.gpu_tests: met means that they pass on a device, and that this sentence can be removed",
        cuda_code_runs,
    ),
)
