"""The streaming quantiser on a synthetic float32 store in shards: its speed beside plain reading, and its memory.

    python bench/checkpoint.py [--gb 4] [--json PATH]

Everything is measured in one run; the files come from the page cache, so reading is as fast as this machine can.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _json_file import write_json

from runner.quantization.files.checkpoint_write import quantize_store
from runner.quantization.formats.e2m1 import FORMATS
from tests.quantization.random_stores import WIDE, write_store

SOURCE_GB = 69.1  # the published transformer in float32
GB_A_BLOCK = 0.0805  # of the configuration below
CONFIG = {
    "num_attention_heads": 16,
    "attention_head_dim": 64,
    "added_kv_proj_dim": 1024,
    "ffn_dim": 4096,
    "inject_face_latents_blocks": 1,
}


class AnonymousMemory:
    """Measures the highest RssAnon of this process inside a block, in bytes: memory without mapped files."""

    def __enter__(self) -> AnonymousMemory:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            status = Path("/proc/self/status").read_text()
            now = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, now * 1024)


def read_all(folder: Path) -> float:
    """Seconds of reading every shard once."""
    begin = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(1 << 22)
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the synthetic source (4)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = dict(WIDE) | CONFIG | {"num_layers": max(1, round(arguments.gb / GB_A_BLOCK))}
        source = write_store(folder / "transformer", config, shard_bytes=512 << 20)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        read_all(source)  # into the page cache
        reading = read_all(source)
        shards = len(list(source.glob("*.safetensors")))
        print(f"{size / 1e9:.2f} GB of float32 in {shards} shards; read in {reading:.2f} s")
        for method in ("absmax", "mse"):
            with AnonymousMemory() as memory:
                done = quantize_store(source, folder / method / "q.safetensors", FORMATS["nvfp4"], method)
            row = {
                "method": method,
                "device": done.device,
                "source_gb": size / 1e9,
                "read_s": reading,
                "seconds": done.seconds,
                "times_reading": done.seconds / reading,
                "gb_per_s": size / 1e9 / done.seconds,
                "minutes_for_69_gb": SOURCE_GB / (size / 1e9) * done.seconds / 60,
                "rss_anon_mb": memory.peak / 1e6,
            }
            rows.append(row)
            speed = f"{row['seconds']:6.1f} s, {row['times_reading']:5.0f}x reading, {row['gb_per_s']:.3f} GB/s"
            print(f"{method:>7}: {speed}; 69 GB in {row['minutes_for_69_gb']:.0f} min ({done.device})")
            print(f"         {row['rss_anon_mb']:.0f} MB anonymous at most")
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
