"""Text encoder: UMT5 with its linears in INT4 (awq.py): quantised from a store, saved to one file, loaded from it.

In:   the `text_encoder` folder of a diffusers store (fp32, fp16 or bf16 safetensors), or a quantised file.
Out:  one safetensors file whose metadata holds the config; or a `UMT5EncoderModel` whose linears are `W4Linear`.
Never: pickles, tokenizers, prompts, jobs; nor, while quantising, more of the model in memory than one tensor.

The file holds what nunchaku's loader for T5 expects: `{linear}.qweight`, `.scales`, `.scaled_zeros`, every other
parameter under its own name, the config as JSON under the metadata key `config`. The embedding of UMT5-XXL, 1.05 G
parameters, is published in fp32 (4.20 GB) beside 2.46 GB of INT4; here it is held, and written, in bf16 (2.10 GB).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner import __version__
from runner.errors import ConfigInvalid, WeightsCorrupt, WeightsMissing, first_few
from runner.hashing import combine, sha256_file
from runner.quantization.files.file_header import SHARD_NAME, SafetensorsHeader, TensorInfo, read_header
from runner.quantization.files.json_reading import parse_json_object
from runner.quantization.files.safetensors_stream import StreamWriter, read_tensor
from runner.quantization.formats.awq import GROUP, Method, Tensors, W4Linear, Workspace, fits, quantize, tensors

__all__ = [
    "SavedTextEncoder",
    "load_text_encoder",
    "plan_text_encoder",
    "quantize_text_encoder",
]

EMBEDDING = "shared.weight"
EMBEDDING_ALIAS = "encoder.embed_tokens.weight"  # the same parameter, under its other name
INT4 = ("qweight", "scales", "scaled_zeros")
CHECKED = 1 << 23  # elements checked and cast at once
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AGAIN = "Download it again"


@dataclass(frozen=True)
class SavedTextEncoder:
    """What `quantize_text_encoder` wrote: `linears` in INT4, names of linears left as they were, bytes on disk."""

    path: Path
    linears: int
    kept_linears: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    sha256: str  # of the data after the header, as in the metadata


# The model, empty


def plan_text_encoder(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    """The quantised UMT5EncoderModel on the meta device: all that would be held in `dtype`, without a byte of it.

    `config` is the text encoder's config.json. Raises WeightsCorrupt if that describes no UMT5.
    """
    model = _empty_model(config, where="config.json").to(dtype)
    _swap(model, {name: torch.bfloat16 for name, linear in _linears(model) if _fits(linear)})
    return model


def _empty_model(config: Mapping[str, Any], where: object) -> Any:
    """UMT5EncoderModel on meta, its embedding tied."""
    from transformers import UMT5Config, UMT5EncoderModel

    if config.get("model_type") != "umt5":
        raise WeightsCorrupt(
            f"the config is of model type {config.get('model_type')!r}, not 'umt5'",
            where=where,
            todo="Take the text encoder of Wan2.2-Animate",
        )
    try:
        with torch.device("meta"):
            model = UMT5EncoderModel(UMT5Config.from_dict(dict(config)))
    except Exception as err:  # the library checks a config in many places, each with an error of its own
        raise WeightsCorrupt(
            f"no UMT5 can be built from the config ({err})", where=where, todo="Download it again"
        ) from err
    _tie(model)
    return model


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.bfloat16, torch.float32):
        raise ConfigInvalid(f"UMT5's values leave the range of {dtype}", todo="Use bfloat16 or float32")


def _tie(model: Any) -> None:
    model.encoder.embed_tokens.weight = model.shared.weight


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _fits(linear: nn.Linear) -> bool:
    return fits(linear.out_features, linear.in_features)


def _swap(model: nn.Module, scale_dtypes: Mapping[str, torch.dtype]) -> None:
    """Put an empty W4Linear on meta in place of each named linear; they share one workspace."""
    workspace = Workspace()
    for name, scale_dtype in scale_dtypes.items():
        linear: Any = model.get_submodule(name)
        layer = W4Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            scale_dtype=scale_dtype,
            device="meta",
            workspace=workspace,
        )
        model.set_submodule(name, layer)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every tensor a file must hold; the embedding under its first name only."""
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name != EMBEDDING_ALIAS}


# Files in


class TensorFiles:
    """The tensors of some safetensors files by name, an embedding stored under its other name among them.

    Raises WeightsMissing where a file is not there, WeightsCorrupt where it is truncated or no safetensors.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.headers: list[SafetensorsHeader] = [read_header(path) for path in paths]
        self.held: dict[str, tuple[Path, TensorInfo]] = {
            name: (header.path, info) for header in self.headers for name, info in header.tensors.items()
        }
        alias = self.held.pop(EMBEDDING_ALIAS, None)
        if alias is not None:
            self.held.setdefault(EMBEDDING, alias)

    def expect(self, wanted: Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]) -> None:
        """Exactly these tensors, of these shapes, each of one of its dtypes; or WeightsCorrupt with what is off."""
        wrong = [f"{name} is missing" for name in wanted if name not in self.held]
        for name, (_, info) in self.held.items():
            shape, dtypes = wanted.get(name, (None, ()))
            if shape is None:
                wrong.append(f"{name} belongs to no layer")
            elif info.shape != shape:
                wrong.append(f"{name} is {list(info.shape)}, not {list(shape)}")
            elif info.dtype not in dtypes:
                wrong.append(f"{name} is {info.dtype}, not {' or '.join(str(dtype) for dtype in dtypes)}")
        if wrong:
            path = self.headers[0].path
            raise WeightsCorrupt(
                first_few(wrong, 3, "; "),
                where=path if len(self.headers) == 1 else path.parent,
                todo=f"Take a UMT5 encoder with its own config, as published or in INT4 by groups of {GROUP}",
            )

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """The tensor in memory of its own: a mapped file may change or vanish under a running model.

        Cast on the way, a few rows at a time. Raises WeightsCorrupt for NaN and infinity.
        """
        path, info = self.held[name]
        mapped = read_tensor(path, info.name)
        made = torch.empty(info.shape, dtype=dtype, device=device)
        step = max(1, CHECKED * len(mapped) // max(1, mapped.numel()))
        for first in range(0, len(mapped), step):
            rows = mapped[first : first + step]
            if rows.is_floating_point() and not torch.isfinite(rows).all():
                raise WeightsCorrupt(f"NaN or infinity in {name}", where=path, todo="Download it again")
            made[first : first + step] = rows
        return made

    def sha256(self) -> str:
        """Of the one file; of several, that of their sha256sum listing by name."""
        return combine({header.path.name: sha256_file(header.path) for header in self.headers})


def _source_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards its index names. Pickled weights are not looked at."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise WeightsMissing(
            "neither model.safetensors nor its index", where=folder, todo="Download text_encoder/ of the model"
        )
    names = parse_json_object(index.read_bytes(), index, AGAIN).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise WeightsCorrupt("the index names no shards", where=index, todo="Download it again")
    shards = sorted(set(names.values()))
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard):
            raise WeightsCorrupt(f"the index names {shard!r}, which is no safetensors file beside it", where=index)
    return [folder / shard for shard in shards]


# Quantise and save


def quantize_text_encoder(
    source_dir: Path,
    out_file: Path,
    *,
    method: Method = "mse",
    scale_dtype: torch.dtype = torch.bfloat16,
    kept_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> SavedTextEncoder:
    """Read a store's `text_encoder` folder tensor by tensor; `out_file` gets its name once it is whole.

    Linears whose columns are no multiple of 128 stay as they are, like all that is no linear, in `kept_dtype`.
    `progress(bytes read, bytes in all)` is called after each tensor; what it raises ends the work and leaves nothing.
    "auto" searches scales on CUDA where there is one. Raises WeightsMissing, WeightsCorrupt, StorageFull.
    """
    source_dir, out_file = Path(source_dir), Path(out_file)
    _check_dtype(kept_dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config_file = source_dir / "config.json"
    if not config_file.is_file():
        raise WeightsMissing("no config.json", where=source_dir, todo="Download text_encoder/ of the model")
    config = parse_json_object(config_file.read_bytes(), config_file, AGAIN)
    model = _empty_model(config, where=config_file)
    shapes = _shapes(model)
    source = TensorFiles(_source_files(source_dir))
    source.expect({name: (shape, FLOATS) for name, shape in shapes.items()})

    packed = {f"{name}.weight": name for name, linear in _linears(model) if _fits(linear)}
    layout: Tensors = {}
    for name, shape in shapes.items():
        if name in packed:
            layout |= {f"{packed[name]}.{key}": spec for key, spec in tensors(shape[0], shape[1], scale_dtype).items()}
        else:
            layout[name] = (shape, kept_dtype)
    metadata = {
        "config": json.dumps(config),
        "format": "pt",
        "video_lab.format": "awq-int4",
        "video_lab.scale_method": method,
        "video_lab.group": str(GROUP),
        "video_lab.source_sha256": source.sha256(),
        "video_lab.version": __version__,
    }
    announced = [(name, shape, dtype) for name, (shape, dtype) in layout.items()]
    total, read = sum(source.held[name][1].bytes for name in shapes), 0
    with StreamWriter(out_file, announced, metadata, digest_key="video_lab.sha256") as writer:
        for name in shapes:
            if name in packed:
                for key, made in _quantized(source, name, method, scale_dtype, device).items():
                    writer.write(f"{packed[name]}.{key}", made)
            else:
                writer.write(name, source.read(name, kept_dtype))
            read += source.held[name][1].bytes
            if progress:
                progress(read, total)
    kept = tuple(name for name, linear in _linears(model) if not _fits(linear))
    return SavedTextEncoder(out_file, len(packed), kept, total, out_file.stat().st_size, str(writer.digest))


def _quantized(
    source: TensorFiles, name: str, method: Method, scale_dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    weight = source.read(name, torch.float32, device)
    try:
        return quantize(weight, method, scale_dtype)
    except ValueError as err:
        raise WeightsCorrupt(f"{name}: {err}", where=source.held[name][0]) from err


# Load


def load_text_encoder(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Any:
    """`UMT5EncoderModel` in evaluation mode on `device`; a linear is a W4Linear where the file has its `.qweight`.

    Built without weights, then filled tensor by tensor: the file must hold exactly the model's tensors. Codes and
    scales stay as stored, all else (the embedding too) is held in `dtype`. `dtype` is bfloat16 or float32: UMT5's
    activations leave the range of float16. Raises WeightsMissing; WeightsCorrupt; ConfigInvalid for `dtype`.
    """
    file, model, held = _described(Path(path), dtype)
    state = {name: file.read(name, held[name], device) for name in _shapes(model)}
    state[EMBEDDING_ALIAS] = state[EMBEDDING]
    model.load_state_dict(state, strict=True, assign=True)
    _tie(model)
    return model.requires_grad_(False).eval()


def check_text_encoder(path: Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that `load_text_encoder` would hold. By the header alone; raises as it does, but for NaN and infinity."""
    _, model, held = _described(Path(path), dtype)
    return sum(math.prod(shape) * held[name].itemsize for name, shape in _shapes(model).items())


def _described(path: Path, dtype: torch.dtype) -> tuple[TensorFiles, Any, dict[str, torch.dtype]]:
    """The file, the model that it describes, without weights, and the type in which each of its tensors is held."""
    _check_dtype(dtype)
    file = TensorFiles([path])
    config = file.headers[0].metadata.get("config")
    if config is None:
        raise WeightsCorrupt("no config in the file's metadata", where=path, todo="Download it again")
    model = _empty_model(parse_json_object(config, f"{path}, config in the metadata", AGAIN), where=path)
    packed = [(name, linear) for name, linear in _linears(model) if f"{name}.qweight" in file.held]
    unfit = [name for name, linear in packed if not _fits(linear)]
    if unfit:
        raise WeightsCorrupt(f"{unfit[0]} is in INT4, yet its columns make no groups of {GROUP}", where=path)
    _swap(model, {name: _scale_dtype(file, name) for name, _ in packed})
    own = {f"{name}.{key}" for name, _ in packed for key in INT4}
    held = {name: t.dtype if name in own else dtype for name, t in model.state_dict().items()}
    shapes = _shapes(model)
    file.expect({name: (shape, (held[name],) if name in own else FLOATS) for name, shape in shapes.items()})
    return file, model, held


def _scale_dtype(file: TensorFiles, name: str) -> torch.dtype:
    """As the file has it; bfloat16 where it has none, or something else, for `expect` to complain about."""
    _, scales = file.held.get(f"{name}.scales", (None, None))
    return torch.float16 if scales and scales.dtype == torch.float16 else torch.bfloat16
