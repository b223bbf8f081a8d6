"""Text encoder: quantise UMT5's linears to INT4 (awq.py), save them to one file, load them from it.

In:   the `text_encoder` folder of a diffusers store (fp32, fp16 or bf16 safetensors), or a quantised file.
Out:  one safetensors file whose metadata holds the config; or a `UMT5EncoderModel` whose linears are `W4Linear`.
Never: pickles, tokenizers, prompts, jobs; while quantising, more than one tensor of the model in memory.

The file's layout is that of nunchaku's loader for T5: `{linear}.qweight`, `.scales`, `.scaled_zeros`, every other
parameter under its name, the config as JSON under the metadata key `config`. The embedding of UMT5-XXL, 1.05 G
parameters, is published in fp32 (4.20 GB) beside 2.46 GB of INT4; here it is loaded and written in bf16 (2.10 GB).
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
    """The result of `quantize_text_encoder`: number of INT4 linears, names of the other linears, bytes on disk."""

    path: Path
    linears: int
    kept_linears: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    sha256: str  # of the data after the header, as in the metadata


# The empty model


def plan_text_encoder(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    """Make the quantised UMT5EncoderModel on the meta device, with the dtypes of a model loaded in `dtype`.

    `config` is the text encoder's config.json. Raises WeightsCorrupt if it describes no UMT5.
    """
    model = _empty_model(config, where="config.json").to(dtype)
    _swap(model, {name: torch.bfloat16 for name, linear in _linears(model) if _fits(linear)})
    return model


def _empty_model(config: Mapping[str, Any], where: object) -> Any:
    """A UMT5EncoderModel on the meta device with a tied embedding."""
    from transformers import UMT5Config, UMT5EncoderModel

    if config.get("model_type") != "umt5":
        raise WeightsCorrupt(
            f"the config is of model type {config.get('model_type')!r}, not 'umt5'",
            where=where,
            todo="Use the text encoder of Wan2.2-Animate",
        )
    try:
        with torch.device("meta"):
            model = UMT5EncoderModel(UMT5Config.from_dict(dict(config)))
    except Exception as err:  # the library checks a config in many places, each with an error of its own
        raise WeightsCorrupt(f"no UMT5 can be built from the config ({err})", where=where, todo=AGAIN) from err
    _tie(model)
    return model


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.bfloat16, torch.float32):
        raise ConfigInvalid(f"UMT5's values exceed the range of {dtype}", todo="Use bfloat16 or float32")


def _tie(model: Any) -> None:
    model.encoder.embed_tokens.weight = model.shared.weight


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _fits(linear: nn.Linear) -> bool:
    return fits(linear.out_features, linear.in_features)


def _swap(model: nn.Module, scale_dtypes: Mapping[str, torch.dtype]) -> None:
    """Replace each named linear by an empty W4Linear on the meta device; all share one workspace."""
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
    """Every tensor of a complete file; the embedding under its first name only."""
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name != EMBEDDING_ALIAS}


# Files in


class TensorFiles:
    """The tensors of some safetensors files by name; the embedding under its first name in any case.

    Raises WeightsMissing for a missing file, WeightsCorrupt for a truncated one or one that is no safetensors.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.headers: list[SafetensorsHeader] = [read_header(path) for path in paths]
        self.held: dict[str, tuple[Path, TensorInfo]] = {
            name: (header.path, info) for header in self.headers for name, info in header.tensors.items()
        }
        alias = self.held.pop(EMBEDDING_ALIAS, None)
        if alias is not None:
            self.held.setdefault(EMBEDDING, alias)

    def expect(self, expected: Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]) -> None:
        """Raise WeightsCorrupt unless the files hold exactly these tensors, with these shapes and allowed dtypes."""
        wrong = [f"{name} is missing" for name in expected if name not in self.held]
        for name, (_, info) in self.held.items():
            shape, dtypes = expected.get(name, (None, ()))
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
                todo=f"Use a UMT5 encoder with its own config, as published or in INT4 with groups of {GROUP}",
            )

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Copy a tensor from the file: a mapped file could change or disappear while a model runs.

        It is cast in blocks of rows. Raises WeightsCorrupt for NaN and infinity.
        """
        path, info = self.held[name]
        mapped = read_tensor(path, info.name)
        made = torch.empty(info.shape, dtype=dtype, device=device)
        step = max(1, CHECKED * len(mapped) // max(1, mapped.numel()))
        for first in range(0, len(mapped), step):
            rows = mapped[first : first + step]
            if rows.is_floating_point() and not torch.isfinite(rows).all():
                raise WeightsCorrupt(f"NaN or infinity in {name}", where=path, todo=AGAIN)
            made[first : first + step] = rows
        return made

    def sha256(self) -> str:
        """sha256 of one file; of several files, of their sha256sum listing by name."""
        return combine({header.path.name: sha256_file(header.path) for header in self.headers})


def _source_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards in its index. Pickled weights are ignored."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise WeightsMissing(
            "the folder has neither model.safetensors nor its index",
            where=folder,
            todo="Download text_encoder/ of the model",
        )
    names = parse_json_object(index.read_bytes(), index, AGAIN).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise WeightsCorrupt("the index names no shards", where=index, todo=AGAIN)
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
    """Quantise a store's `text_encoder` folder tensor by tensor; `out_file` gets its name when it is complete.

    Linears whose columns are no multiple of 128, and all other parameters, are stored in `kept_dtype`.
    `progress(bytes read, bytes in all)` is called after each tensor; an exception in it stops the work, and no file is
    left. "auto" searches scales on CUDA if there is one. Raises WeightsMissing, WeightsCorrupt, StorageFull.
    """
    source_dir, out_file = Path(source_dir), Path(out_file)
    _check_dtype(kept_dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config_file = source_dir / "config.json"
    if not config_file.is_file():
        raise WeightsMissing(
            "the folder has no config.json", where=source_dir, todo="Download text_encoder/ of the model"
        )
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
    """Load a `UMT5EncoderModel` in evaluation mode on `device`; linears with a `.qweight` in the file are W4Linears.

    The model is built without weights, then filled tensor by tensor: the file must hold exactly its tensors. Codes and
    scales stay as stored, all other tensors (also the embedding) get `dtype`: bfloat16 or float32, since UMT5's
    activations exceed the range of float16. Raises WeightsMissing; WeightsCorrupt; ConfigInvalid for `dtype`.
    """
    file, model, held = _open_quantised(Path(path), dtype)
    state = {name: file.read(name, held[name], device) for name in _shapes(model)}
    state[EMBEDDING_ALIAS] = state[EMBEDDING]
    model.load_state_dict(state, strict=True, assign=True)
    _tie(model)
    return model.requires_grad_(False).eval()


def check_text_encoder(path: Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the model that `load_text_encoder` makes. Reads the header only; raises as it, except for NaN and
    infinity."""
    _, model, held = _open_quantised(Path(path), dtype)
    return sum(math.prod(shape) * held[name].itemsize for name, shape in _shapes(model).items())


def _open_quantised(path: Path, dtype: torch.dtype) -> tuple[TensorFiles, Any, dict[str, torch.dtype]]:
    """Return the file, its model without weights, and the dtype of each of the model's tensors."""
    _check_dtype(dtype)
    file = TensorFiles([path])
    config = file.headers[0].metadata.get("config")
    if config is None:
        raise WeightsCorrupt("no config in the file's metadata", where=path, todo=AGAIN)
    model = _empty_model(parse_json_object(config, f"{path}, config in the metadata", AGAIN), where=path)
    packed = [(name, linear) for name, linear in _linears(model) if f"{name}.qweight" in file.held]
    unfit = [name for name, linear in packed if not _fits(linear)]
    if unfit:
        raise WeightsCorrupt(f"{unfit[0]} is in INT4, but its columns are no multiple of {GROUP}", where=path)
    _swap(model, {name: _scale_dtype(file, name) for name, _ in packed})
    int4 = {f"{name}.{key}" for name, _ in packed for key in INT4}
    held = {name: t.dtype if name in int4 else dtype for name, t in model.state_dict().items()}
    shapes = _shapes(model)
    file.expect({name: (shape, (held[name],) if name in int4 else FLOATS) for name, shape in shapes.items()})
    return file, model, held


def _scale_dtype(file: TensorFiles, name: str) -> torch.dtype:
    """The dtype of scales in the file; bfloat16 for missing scales and other dtypes, which `expect` then refuses."""
    _, scales = file.held.get(f"{name}.scales", (None, None))
    return torch.float16 if scales and scales.dtype == torch.float16 else torch.bfloat16
