"""SVDQ export: write a file of `quantize` in an SVDQ format for diffusers' Nunchaku Lite or for cache-dit.

In:   the path of the file, the model's config.json, a kind, a folder. Out: the filled folder; after an error no files.
Never: quantising anew; other formats; more than one layer in memory. Codes, scales and factors are copied as they are.

Both readers compute every packed layer with four-bit activations. A run here does so for the token-wise linears alone
(`is_token_wise`) and computes the other layers in 16 bits. Layers in modules that the model's class keeps in float32
(the time embedder) are written as float32 weights: the model reads the dtype of `time_embedder.linear_1.weight`, and
the readers' packed layers have no `weight`.

`lite`: a diffusers folder, `config.json` and `diffusion_pytorch_model.safetensors`. It needs the package `kernels`,
DIFFUSERS_TRUST_REMOTE_KERNELS=true and a GPU, and casts everything to bfloat16 (diffusers 0.42.1):

    from diffusers import WanAnimateTransformer3DModel

    model = WanAnimateTransformer3DModel.from_pretrained(folder)

`cache-dit`: `svdq_PRECISION_rRANK.safetensors` (with `_dq` for a file made without calibration) and `quant_config.json`
hold the packed layers, `unquantized.safetensors` everything else, merged LoRAs included, and `config.json` the model's
shape. `load` takes a path as a str, and a model with linears to replace; those may be on the meta device:

    import cache_dit
    from accelerate import init_empty_weights
    from diffusers import WanAnimateTransformer3DModel
    from safetensors.torch import load_file

    with init_empty_weights(include_buffers=False):
        model = WanAnimateTransformer3DModel.from_config(WanAnimateTransformer3DModel.load_config(folder))
    model.load_state_dict(load_file(f"{folder}/unquantized.safetensors"), strict=False, assign=True)
    model = cache_dit.load(model, folder).eval()
    assert not any(parameter.is_meta for parameter in model.parameters())

cache-dit 1.5.3 reads padded layers (sides that are no multiples of 128); 1.5.0 does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
import torch
from torch import Tensor, nn

from runner.errors import ConfigInvalid, WeightsCorrupt, as_runner_error
from runner.quantization.files.checkpoint_read import check_model
from runner.quantization.files.json_reading import read_json_object
from runner.quantization.files.quantized_header import (
    AGAIN,
    CALIBRATION_KEY,
    LORAS_KEY,
    REFITS_KEY,
    SMOOTHING_KEY,
    SOURCE_KEY,
    VERSION_KEY,
    QuantizedFile,
    check_file,
)
from runner.quantization.files.safetensors_stream import StreamWriter, data_sha256
from runner.quantization.formats.svdq import effective_weight, pack_vector, pad, torch_table
from runner.quantization.formats.svdq_layout import SvdqLayout
from runner.quantization.rules import kept_in_fp32, linear_shapes, stored_dtype, transformer_on_meta

__all__ = ["EXPORT_KINDS", "ExportPlan", "export_svdq", "plan_export"]

EXPORT_KINDS: Final = ("lite", "cache-dit")
EXPORTED_FROM_KEY: Final = "video_lab.exported_from_sha256"  # of the exported file's data
PROVENANCE: Final = (SOURCE_KEY, LORAS_KEY, SMOOTHING_KEY, CALIBRATION_KEY, REFITS_KEY, VERSION_KEY)
LITE_WEIGHTS: Final = "diffusion_pytorch_model.safetensors"  # the only name that diffusers' from_pretrained reads
UNQUANTIZED: Final = "unquantized.safetensors"  # no name of diffusers': from_pretrained must not read a part as a model
CONFIG, QUANT_CONFIG = "config.json", "quant_config.json"
COMPUTE_DTYPE: Final = torch.bfloat16  # of stored vectors and factors

Table = dict[str, tuple[tuple[int, ...], torch.dtype]]  # tensor → (shape, dtype)


@dataclass(frozen=True)
class ExportPlan:
    """The content of an export, by headers alone."""

    tensors: Mapping[str, Table]  # safetensors file → its tensors
    metadata: Mapping[str, Mapping[str, str]]  # the same files → their metadata
    documents: Mapping[str, Mapping[str, Any]]  # JSON file → its content, without the model's own config
    decoded: tuple[str, ...]  # layers written as float32 weights


def export_svdq(file: Path, kind: str, folder: Path, config: Path) -> Path:
    """Write `file` into `folder` (new or empty) for readers of `kind`, `lite` or `cache-dit`; returns `folder`.

    `config` is the config.json of `file`'s transformer. Files get their names at the end, config.json last; after an
    error none is left. Raises WeightsMissing and WeightsCorrupt for `file` and `config` (the data's sha256 is checked),
    ConfigInvalid for an unknown kind and for a folder or a file that does not fit, StorageFull, StorageDenied.
    """
    if kind not in EXPORT_KINDS:
        raise ConfigInvalid(f"no export called {kind!r}", todo=f"Exports: {', '.join(EXPORT_KINDS)}")
    source = check_file(file)
    if not isinstance(source.layout, SvdqLayout):
        raise ConfigInvalid(f"its weights are in {source.layout.name}; only SVDQ formats can be exported", where=file)
    settings = _read_config(config)
    model = transformer_on_meta(settings)
    check_model(source, model)
    plan = plan_export(source, kind, model)
    _check_folder(folder, plan)
    if data_sha256(file) != source.sha256:
        raise WeightsCorrupt("its data has changed since the file was made (sha256)", where=file, todo=AGAIN)
    size = _write(plan, _outputs(source, plan), folder, settings)
    structlog.get_logger().info("exported", kind=kind, folder=str(folder), gb=round(size / 1e9, 3))
    return folder


def plan_export(file: QuantizedFile, kind: str, model: nn.Module) -> ExportPlan:
    """List files, tensors and settings of an export of `file`, which holds `model` (on the meta device); reads nothing.

    Raises ConfigInvalid for a layer that needs padding in an export for `lite`, which does not pad.
    """
    layout = file.layout
    assert isinstance(layout, SvdqLayout)
    linears, fp32 = linear_shapes(model), kept_in_fp32(model)
    decoded = tuple(layer for layer in file.layers if stored_dtype(layer, fp32) is torch.float32)
    packed = [layer for layer in file.layers if layer not in decoded]
    if kind == "lite":
        for layer in packed:
            if linears[layer] != file.layers[layer]:
                raise ConfigInvalid(
                    f"{layer} is {list(linears[layer])}, stored as {list(file.layers[layer])}: Nunchaku Lite does not "
                    "pad, both sides must be multiples of 128",
                    where=file.header.path,
                    todo="Export for cache-dit, or quantise with a rule that keeps the layer",
                )
    layers: Table = {}
    rest: Table = {}
    for layer in file.layers:
        has_bias = f"{layer}.bias" in file.header.tensors
        if layer in decoded:
            rest[f"{layer}.weight"] = linears[layer], torch.float32
            if has_bias:
                rest[f"{layer}.bias"] = linears[layer][:1], torch.float32
        else:
            table = _layer_table(layout, file.layers[layer], kind, has_bias)
            layers |= {f"{layer}.{suffix}": entry for suffix, entry in table.items()}
    inside = {name for layer in file.layers for name in (*file.tensor_names(layer).values(), f"{layer}.bias")}
    rest |= {name: (info.shape, info.dtype) for name, info in file.header.tensors.items() if name not in inside}
    about = {"format": "pt", EXPORTED_FROM_KEY: file.sha256}
    about |= {key: file.header.metadata[key] for key in PROVENANCE if key in file.header.metadata}
    if kind == "lite":
        targets = {"precision": layout.precision, "group_size": layout.group, "rank": layout.rank, "targets": packed}
        names = {"quant_method": "nunchaku_lite", "compute_dtype": _dtype_name(COMPUTE_DTYPE), "svdq_w4a4": targets}
        return ExportPlan(
            {LITE_WEIGHTS: layers | rest}, {LITE_WEIGHTS: about}, {CONFIG: {"quantization_config": names}}, decoded
        )
    quantized, metadata, snapshot = _cache_dit_settings(layout, file.chosen["smoothing"] == "calibrated", packed)
    return ExportPlan(
        {quantized: layers, UNQUANTIZED: rest},
        {quantized: about | metadata, UNQUANTIZED: about},
        {QUANT_CONFIG: snapshot, CONFIG: {}},
        decoded,
    )


def _layer_table(layout: SvdqLayout, shape: tuple[int, int], kind: str, has_bias: bool) -> Table:
    """Suffix → (shape, dtype) of a packed layer in the naming of `kind`; `shape` as padded."""
    table = torch_table(layout, *shape)
    if has_bias:
        table["bias"] = shape[:1], COMPUTE_DTYPE
    if kind == "cache-dit":
        table["smooth_factor_orig"] = table["smooth_factor"]
    elif "wcscales" in table:  # Lite needs a scale of the whole tensor beside those of channels
        table["wtscale"] = (1,), COMPUTE_DTYPE
    return table


def _cache_dit_settings(
    layout: SvdqLayout, calibrated: bool, packed: list[str]
) -> tuple[str, dict[str, str], dict[str, Any]]:
    """(name of the file of packed layers, its metadata, quant_config.json): version 2 of both, as 1.5.0 to 1.5.3 read.

    Settings that one of these versions does not know are left out: 1.5.0 refuses `svd_refine_iters`.
    """
    quant_type = f"svdq_{layout.precision}_r{layout.rank}" + ("" if calibrated else "_dq")
    choices = {"smooth_strategy": "activation" if calibrated else "weight", "runtime_kernel": "v1"}
    payload = {
        "format": "cache_dit_svdq_ptq",
        "version": 2,
        "quant_type": quant_type,
        "rank": layout.rank,
        "precision": layout.precision,
        "quantized_layer_names": packed,
        "svdq_kwargs": choices,
    }
    name = f"{quant_type}.safetensors"
    snapshot = {
        "format": "cache_dit_svdq_quant_config",
        "version": 2,
        "backend": "CACHE_DIT",
        "quant_type": quant_type,
        "rank": layout.rank,
        "checkpoint_path": name,
        "exclude_layers": [],
        "regional_quantize": False,
        "repeated_blocks": None,
        "verbose": False,
        "svdq_kwargs": choices,
    }
    return name, {"cache_dit_svdq_ptq": json.dumps(payload, sort_keys=True)}, snapshot


def _outputs(file: QuantizedFile, plan: ExportPlan) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (file of the export, tensor, its values), layer by layer, in the order of the plan."""
    layout = file.layout
    assert isinstance(layout, SvdqLayout)
    for target, table in plan.tensors.items():
        layer, parts = "", dict[str, Tensor]()
        for name, (shape, dtype) in table.items():
            owner, _, suffix = name.rpartition(".")
            if owner not in file.layers:
                yield target, name, _read(file, [name])[name]
                continue
            if owner != layer:
                layer, parts = owner, _layer_tensors(file, owner)
            if suffix == "weight":
                values = effective_weight(parts, layout)[: shape[0], : shape[1]].contiguous()
            elif suffix == "wtscale":
                values = torch.ones(shape, dtype=dtype)  # wcscales include the scale of the whole tensor
            elif suffix == "smooth_factor_orig":
                values = parts["smooth_factor"]
            elif suffix == "bias":
                bias = parts["bias"].to(dtype)
                values = bias if owner in plan.decoded else pack_vector(pad(bias, shape))
            else:
                values = parts[suffix]
            yield target, name, values


def _layer_tensors(file: QuantizedFile, layer: str) -> dict[str, Tensor]:
    """A layer's tensors as stored, by suffix; `bias` too where it has one."""
    names = file.tensor_names(layer)
    if f"{layer}.bias" in file.header.tensors:
        names["bias"] = f"{layer}.bias"
    tensors = _read(file, names.values())
    return {suffix: tensors[name] for suffix, name in names.items()}


def _read(file: QuantizedFile, names: Iterable[str]) -> dict[str, Tensor]:
    """Map tensors on the CPU; the mapping ends with them, so that its pages are freed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file.header.path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except SafetensorError as err:
        raise WeightsCorrupt(f"not a whole safetensors file ({err})", where=file.header.path, todo=AGAIN) from err


def _check_folder(folder: Path, plan: ExportPlan) -> None:
    """Raise ConfigInvalid unless `folder` is absent, or empty except for leftovers of a killed export."""
    if folder.exists() and not folder.is_dir():
        raise ConfigInvalid("the export's folder is a file", where=folder)
    left_over = {f"{name}.tmp" for name in (*plan.tensors, *plan.documents)}
    try:
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as err:
        raise as_runner_error(err, where=folder) from err
    foreign = [name for name in found if name not in left_over]
    if foreign:
        raise ConfigInvalid(
            f"the export's folder is not empty: it holds {foreign[0]}", where=folder, todo="Name a new or empty folder"
        )


def _write(
    plan: ExportPlan, outputs: Iterator[tuple[str, str, Tensor]], folder: Path, settings: Mapping[str, Any]
) -> int:
    """Write all files of the plan, or none; returns the bytes of the safetensors files."""
    existed = folder.exists()
    writers: dict[str, StreamWriter] = {}
    documents: list[Path] = []
    try:
        with ExitStack() as stack:
            for name, table in plan.tensors.items():
                entries = [(tensor, shape, dtype) for tensor, (shape, dtype) in table.items()]
                writers[name] = stack.enter_context(StreamWriter(folder / name, entries, plan.metadata[name]))
            for name, tensor, values in outputs:
                writers[name].write(tensor, values)
        for name, document in plan.documents.items():
            documents.append(folder / name)
            _write_json(folder / name, {**settings, **document} if name == CONFIG else document)
    except BaseException:
        for path in (*documents, *(writer.path for writer in writers.values() if writer.digest is not None)):
            path.unlink(missing_ok=True)
        if not existed:
            with suppress(OSError):
                folder.rmdir()
        raise
    return sum(writer.size for writer in writers.values())


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    staged = path.with_name(f"{path.name}.tmp")
    try:
        with staged.open("w", encoding="utf-8") as stream:
            json.dump(document, stream, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, path)
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except BaseException as err:
        with suppress(OSError):
            staged.unlink()
        if isinstance(err, OSError):
            raise as_runner_error(err, where=path) from err
        raise


def _read_config(path: Path) -> dict[str, Any]:
    """The model's config, without settings of a quantised model."""
    try:
        settings = read_json_object(path, "It lies beside the quantised transformer")
    except OSError as err:
        raise as_runner_error(err, where=path) from err
    return {key: value for key, value in settings.items() if key != "quantization_config"}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
