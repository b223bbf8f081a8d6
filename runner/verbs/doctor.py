"""Doctor: checks whether this machine can render, and gives a remedy for each problem.

In:   the places of models, outputs and cache; the requested device. Out: one `Check` per subject: what was found, and
      what to do. Never: jobs, the contents of weights.

The checks leave no files. A missing part, even torch, does not stop the other checks. All facts of the machine come
from `Probes`, so that a test can replace them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from runner.errors import ConfigInvalid, as_runner_error
from runner.forecast.precisions import PRECISIONS, GemmPrecision, advised
from runner.generation.runtime.device import cudnn_problem, cudnn_version
from runner.records.events import default_logging
from runner.storage import is_remote, local_path, open_storage, probe_writable
from runner.verbs.probes import ProbeFailed, Probes, TorchInfo
from runner.verbs.settings import DoctorSettings

if TYPE_CHECKING:
    from runner.forecast.seconds import DeviceSpeed
    from runner.spec.recipes import Recipe

__all__ = ["Check", "doctor", "run_checks"]

GIB = 1 << 30
DRIVER_FOR_CUDA = {12: 525, 13: 580}  # CUDA major -> oldest Linux driver branch (CUDA Toolkit release notes, table 2)
GPU_GIB = 24  # with less, the published weights and a job do not fit together, and the weights are streamed
HOST_GIB = 48  # transformer, text and image encoder in bfloat16: 17.3, 5.7 and 0.6 billion parameters
OUT_GIB, CACHE_GIB = 5, 20
LEAST_TRITON = (7, 0)  # the oldest compute capability that torch.compile hands to Triton
USUAL_SIZE, USUAL_FRAMES = (832, 480), 81  # the clip of the forecasts
PYTHON = ((3, 11), (3, 15))
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
CUDA = "CUDAExecutionProvider"
# GEMM backend of SVDQuant → the distributions that provide it, the one with kernels first.
SVDQ_PACKAGES = {"cache_dit": ("cache-dit-cu13", "cache-dit"), "comfy_kitchen": ("comfy-kitchen",)}
SVDQ_EXTENSION = "_C_svdquant"
# Versions of the package index's `nunchaku`, a library of statistics. The SVDQuant engine of this name is 1.0 or later.
OTHER_NUNCHAKU = "0."
REINSTALL = "pip install 'video-lab-runner[{extra}]'"

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """The result of one check. `todo`: the remedy; empty if nothing is to be done."""

    name: str
    status: Literal["ok", "warn", "fail", "skipped"]
    found: str
    todo: str = ""


@default_logging()
def doctor(settings: DoctorSettings) -> list[Check]:
    """The verb `doctor`. A fact that cannot be read is a failed check, not an exception."""
    return run_checks(settings.models, settings.out, settings.cache, settings.device, recipe=settings.recipe)


def run_checks(
    models: str | None,
    out: str | None,
    cache: Path,
    device: str,
    *,
    recipe: str | None = None,
    probes: Probes | None = None,
) -> list[Check]:
    """Run all checks. Earlier ones come first because their problems often cause the later ones.

    `models` and `out`: folders or s3:// URIs; None skips their check. `device`: auto, cpu, cuda or cuda:N. A missing
    GPU requirement is a failure for cuda and a warning for auto; for cpu its check is skipped. `recipe`: the recipe
    whose weights are checked; None: the default recipe.
    """
    machine = _Machine(probes or Probes(), device)
    svdq = machine.svdq_rows(recipe)
    questions: dict[str, Callable[[], Check]] = {
        "python": machine.python,
        "torch": machine.torch,
        "diffusers": machine.diffusers,
        "driver": machine.driver,
        "gpu": machine.gpu,
        "cudnn": machine.cudnn,
        "gpu memory": machine.gpu_memory,
        "host memory": machine.host_memory,
        "onnxruntime": machine.onnxruntime,
        "providers": machine.providers,
        "video": machine.video,
        "compiler": machine.compiler,
        **({"svdq kernels": partial(machine.svdq, *svdq)} if svdq else {}),
        "weights": lambda: _weights(models, recipe),
        "cache": lambda: _folder("cache", cache, CACHE_GIB),
        "output": lambda: _output(out),
    }
    return [_ask(name, question) for name, question in questions.items()]


def _ask(name: str, question: Callable[[], Check]) -> Check:
    """Run one check. An unexpected exception becomes a failed check; the other checks still run."""
    try:
        return question()
    except Exception as err:
        error = as_runner_error(err)
        return Check(name, "fail", f"{error.where}: {error.what}" if error.where else error.what, error.todo or "")


def _answer(probe: Callable[[], T]) -> T | ProbeFailed:
    """Return the probe's result, or the ProbeFailed that it raised."""
    try:
        return probe()
    except ProbeFailed as err:
        return err


class _Machine:
    """Checks of the hardware and of the installed software."""

    def __init__(self, probes: Probes, device: str) -> None:
        self.probes = probes
        self.device = device
        self.wants_gpu = device != "cpu"
        self.lacking: Literal["fail", "warn"] = "fail" if device.startswith("cuda") else "warn"
        self.torch_info = _answer(probes.torch)
        self.driver_info = _answer(probes.driver) if self.wants_gpu else ProbeFailed("the device is cpu")

    def python(self) -> Check:
        version = self.probes.python_version()
        found, (low, high) = ".".join(map(str, version)), PYTHON
        if low <= version[:2] < high:
            return Check("python", "ok", found)
        return Check("python", "fail", found, f"Use Python {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}")

    def torch(self) -> Check:
        info = self.torch_info
        if isinstance(info, ProbeFailed):
            return Check("torch", "fail", str(info), "Run make setup, or install the package with its dependencies")
        found = f"{info.version}, " + (f"built for CUDA {info.cuda}" if info.cuda else "built without CUDA")
        if not info.cuda and self.device.startswith("cuda"):
            return Check(
                "torch", "fail", found, "Install a CUDA build of torch: uv pip install --torch-backend auto torch"
            )
        return Check("torch", "ok", found)

    def diffusers(self) -> Check:
        names = ("diffusers", "transformers", "accelerate", "safetensors")
        answers = {name: _answer(partial(self.probes.package, name)) for name in names}
        broken = _failures(*answers.values())
        if broken:
            return Check("diffusers", "fail", broken, "Run make setup, or reinstall the package")
        return Check("diffusers", "ok", ", ".join(f"{name} {version}" for name, version in answers.items()))

    def driver(self) -> Check:
        if not self.wants_gpu:
            return Check("driver", "skipped", "the device is cpu")
        if isinstance(self.driver_info, ProbeFailed):
            return Check(
                "driver",
                self.lacking,
                str(self.driver_info),
                "Install the NVIDIA driver; in a container, pass --gpus all (NVIDIA Container Toolkit)",
            )
        version = self.driver_info.version
        found = f"NVIDIA {version}"
        cuda = self.torch_info.cuda if isinstance(self.torch_info, TorchInfo) else None
        wanted = DRIVER_FOR_CUDA.get(int(cuda.partition(".")[0])) if cuda else None
        if wanted and int(version.partition(".")[0]) < wanted:
            return Check(
                "driver",
                self.lacking,
                f"{found}, too old for torch built for CUDA {cuda}",
                f"Install driver {wanted} or newer, or a torch built for an older CUDA",
            )
        return Check("driver", "ok", found)

    def gpu(self) -> Check:
        if not self.wants_gpu:
            return Check("gpu", "skipped", "the device is cpu")
        devices = self.torch_info.devices if isinstance(self.torch_info, TorchInfo) else ()
        if chosen := self._chosen_gpu():
            name, (major, minor) = chosen
            return Check("gpu", "ok", f"{name}, compute capability {major}.{minor}{self._forecasts(name)}")
        if devices:
            found = f"torch finds {len(devices)}, but not {self.device}"
            return Check("gpu", "fail", found, f"Choose cuda:0 to cuda:{len(devices) - 1}")
        if self.lacking == "warn":
            todo = "The CPU is enough for the demo; the published weights need a GPU"
            return Check("gpu", "warn", "torch finds no GPU", todo)
        todo = "First fix the checks torch and driver; check CUDA_VISIBLE_DEVICES; or use --device cpu"
        return Check("gpu", "fail", "torch finds no GPU", todo)

    def _forecasts(self, gpu: str) -> str:
        """Return the forecast seconds of a usual clip on a known GPU, with the default and with the fast recipe."""
        from runner.forecast.seconds import find_device
        from runner.generation.families import get_family
        from runner.generation.runtime.fast_choice import choice_words, foresee
        from runner.spec.options import JobOptions
        from runner.spec.recipes import DEFAULT_RECIPE, FAST_RECIPE, get_recipe

        speed = find_device(gpu)
        if speed is None:
            return ""
        seconds = []
        for recipe in map(get_recipe, (DEFAULT_RECIPE, FAST_RECIPE)):
            plan = get_family(recipe).forecaster(recipe, None).plan(USUAL_FRAMES, USUAL_SIZE, JobOptions(), speed)
            seconds.append(plan.seconds or 0.0)
        fast = foresee(get_recipe(FAST_RECIPE), speed)
        width, height = USUAL_SIZE
        return (
            f"; forecast for a clip of {width}x{height}, {USUAL_FRAMES} frames: {DEFAULT_RECIPE} {seconds[0]:.3g} s, "
            f"{FAST_RECIPE} {seconds[1]:.3g} s (with {choice_words(fast)}){_faster_in_svdq(fast, speed, seconds[1])}"
        )

    def svdq_rows(self, recipe: str | None) -> tuple[tuple[GemmPrecision, ...], bool] | None:
        """Return the SVDQuant rows of `PRECISIONS` to check, and whether the recipe computes in one of them.

        None: the recipe uses none, and no package for them is installed.
        """
        from runner.spec.recipes import DEFAULT_RECIPE, get_recipe

        rows = tuple(row for row in PRECISIONS.values() if row.layout == "svdq")
        try:
            required = tuple(row for row in rows if row.name == get_recipe(recipe or DEFAULT_RECIPE).compute)
        except ConfigInvalid:  # the check of the weights reports it
            required = ()
        if required:
            return required, True
        here = bool(self._installed(*SVDQ_PACKAGES["cache_dit"])) or bool(self._other_nunchaku())
        return (rows, False) if here else None

    def svdq(self, rows: tuple[GemmPrecision, ...], required: bool) -> Check:
        """Check which kernels compute these formats here. A CPU computes them in floats, without a package."""
        name, here = "svdq kernels", [f"{n} {v}" for n, v in self._installed(*SVDQ_PACKAGES["cache_dit"]).items()]
        if other := self._other_nunchaku():
            found = f"nunchaku {other} is a library of statistics, not the SVDQuant engine, and hides that engine"
            return Check(name, "warn", found, "pip uninstall -y nunchaku")
        if len(here) > 1:
            remove = f"pip uninstall -y {' '.join(SVDQ_PACKAGES['cache_dit'])} && {REINSTALL.format(extra='svdq')}"
            return Check(name, "warn", f"{', '.join(here)}: they overwrite each other", remove)
        chosen = self._chosen_gpu() if self.wants_gpu else None
        if chosen is None:
            return Check(name, "ok", "; ".join(["a CPU computes these formats in floats, slowly", *here]))
        gpu, capability = chosen
        fitting = [row for row in rows if row.runs_on(capability)]
        if not fitting:
            found = f"{gpu} has no units for {', '.join(row.name for row in rows)}"
            todo = f"Leave out +{rows[0].name}, or use +{advised(capability)}"
            return Check(name, "fail", found, todo) if required else Check(name, "skipped", found)
        problem = self._svdq_problem()
        products = {row.name: self._svdq_product(row, problem) for row in fitting}
        found = "; ".join(f"{row}: {product or 'no kernels here'}" for row, product in products.items())
        if problem is None:
            return Check(name, "ok", found)
        todo = f"{REINSTALL.format(extra='svdq')}, which needs torch below 2.13"
        return Check(name, "fail" if required and not all(products.values()) else "warn", f"{found}; {problem}", todo)

    def _installed(self, *names: str) -> dict[str, str]:
        return {name: version for name in names if (version := self.probes.distribution(name))}

    def _other_nunchaku(self) -> str:
        """Return the version of the index's `nunchaku`, which is not the SVDQuant engine; empty if it is not there."""
        version = self.probes.distribution("nunchaku") or ""
        return version if version.startswith(OTHER_NUNCHAKU) else ""

    def _svdq_problem(self) -> str | None:
        """Return why the kernels of cache-dit cannot be used; None if they can."""
        installed = self._installed(*SVDQ_PACKAGES["cache_dit"])
        if not installed:
            return f"{SVDQ_PACKAGES['cache_dit'][0]} is not installed"
        answer = _answer(partial(self.probes.extension, next(iter(installed)), SVDQ_EXTENSION))
        return str(answer) if isinstance(answer, ProbeFailed) else None

    def _svdq_product(self, row: GemmPrecision, problem: str | None) -> str:
        """Return package and version of the row's first available GEMM backend; empty if there is none.

        `problem`: of cache-dit's kernels. The self-test of a run checks whether a backend computes correctly.
        """
        for backend in row.backends:
            names = SVDQ_PACKAGES.get(backend.name)
            if names is None and isinstance(self.torch_info, TorchInfo) and self.torch_info.cuda:
                return f"torch {self.torch_info.version}"
            if backend.name == "cache_dit" and problem is not None:
                continue
            for name, version in self._installed(*(names or ())).items():
                return f"{name} {version}"
        return ""

    def cudnn(self) -> Check:
        if not self.wants_gpu:
            return Check("cudnn", "skipped", "the device is cpu")
        info = self.torch_info
        if isinstance(info, ProbeFailed) or not info.cuda:
            return Check("cudnn", "skipped", "no torch built for CUDA")
        number = _answer(self.probes.cudnn)
        install = f"pip install -U 'nvidia-cudnn-cu{info.cuda.partition('.')[0]}>=9.15'"
        if isinstance(number, ProbeFailed) or number is None:
            return Check("cudnn", self.lacking, str(number) if number else "this torch has no cuDNN", install)
        if problem := cudnn_problem(number):
            return Check("cudnn", "warn", problem, install)
        return Check("cudnn", "ok", cudnn_version(number))

    def gpu_memory(self) -> Check:
        if isinstance(self.driver_info, ProbeFailed):
            return Check("gpu memory", "skipped", "no driver was found" if self.wants_gpu else "the device is cpu")
        gpus = self.driver_info.gpus
        if not gpus:
            return Check(
                "gpu memory",
                self.lacking,
                "the driver finds no GPU",
                "Check that a GPU is installed; in a container, that it is passed on",
            )
        smallest = min(gpu.total_bytes for gpu in gpus)
        busiest = max(1 - gpu.free_bytes / gpu.total_bytes for gpu in gpus)
        found = "; ".join(
            f"{gpu.name}: {gpu.free_bytes / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB free" for gpu in gpus
        )
        if busiest > 0.5:
            return Check("gpu memory", "warn", found, "Another process holds the memory: see nvidia-smi")
        if smallest < GPU_GIB * GIB * 0.95:  # a card sold as 24 GB reports a little less
            return Check("gpu memory", "warn", found, f"Below {GPU_GIB} GiB: use small sizes and memory: minimal")
        return Check("gpu memory", "ok", found)

    def host_memory(self) -> Check:
        total = self.probes.host_memory_bytes()
        found = f"{total / GIB:.1f} GiB"
        if total < HOST_GIB * GIB:
            return Check(
                "host memory", "warn", found, f"Enough for the demo; the published weights need {HOST_GIB} GiB"
            )
        return Check("host memory", "ok", found)

    def onnxruntime(self) -> Check:
        installed = {name: version for name in ONNXRUNTIMES if (version := self.probes.distribution(name))}
        found = ", ".join(f"{name} {version}" for name, version in installed.items()) or "not installed"
        install = REINSTALL.format(extra="gpu" if self.device.startswith("cuda") else "cpu")
        if len(installed) > 1:  # they install into one folder; the last one installed overwrites the others
            remove = f"pip uninstall -y {' '.join(installed)}"
            return Check("onnxruntime", "fail", f"{found}: they overwrite each other", f"{remove} && {install}")
        if not installed:
            return Check("onnxruntime", "fail", found, install)
        return Check("onnxruntime", "ok", found)

    def providers(self) -> Check:
        has_gpu = isinstance(self.torch_info, TorchInfo) and bool(self.torch_info.devices)
        wants_cuda = self.wants_gpu and (has_gpu or self.lacking == "fail")
        answer = _answer(lambda: self.probes.providers(CUDA if wants_cuda else "CPUExecutionProvider"))
        if isinstance(answer, ProbeFailed):
            return Check("providers", "fail", str(answer), REINSTALL.format(extra="gpu" if wants_cuda else "cpu"))
        found = ", ".join(answer)
        if wants_cuda and CUDA not in answer:
            extra = REINSTALL.format(extra="gpu")
            todo = f"pip uninstall -y onnxruntime && {extra}, with the same CUDA major version as torch"
            return Check("providers", self.lacking, f"{found}: {CUDA} does not load", todo)
        return Check("providers", "ok", f"{found}; {self._pose_networks(CUDA in answer)}")

    def _pose_networks(self, on_gpu: bool) -> str:
        """Return where preprocessing runs its networks on this machine, and which faster option exists."""
        if on_gpu:
            there = _answer(self.probes.tensorrt)
            also = f"no TensorRT ({there})" if isinstance(there, ProbeFailed) else f"{there} with --tensorrt on or auto"
            return f"pose estimation uses {CUDA}, {also}"
        onnx = self.probes.distribution("onnx")
        also = f"with onnx {onnx}" if onnx else "which needs " + REINSTALL.format(extra="int8")
        return f"pose estimation uses the CPU, faster with --pose-precision int8 ({also})"

    def video(self) -> Check:
        package = _answer(partial(self.probes.package, "av"))
        encoder = _answer(partial(self.probes.encoder, "libx264"))
        if broken := _failures(package, encoder):
            return Check("video", "fail", broken, "pip install --force-reinstall av")
        return Check("video", "ok", f"PyAV {package} with libx264")

    def compiler(self) -> Check:
        """Check what Triton and torch.compile need. Without it blocks run eagerly; nothing fails."""
        if not self.wants_gpu:
            return Check("compiler", "skipped", "the device is cpu")
        compiler, header = _answer(self.probes.compiler), _answer(self.probes.python_header)
        info = self.torch_info
        for_cuda = isinstance(info, TorchInfo) and bool(info.cuda)
        triton = _answer(partial(self.probes.package, "triton")) if for_cuda else None
        chosen = self._chosen_gpu()
        old = chosen is not None and chosen[1] < LEAST_TRITON
        too_old = "{} has compute capability {}.{}".format(chosen[0], *chosen[1]) if chosen and old else ""
        missing = "; ".join(filter(None, [_failures(compiler, header, triton), too_old]))
        if not missing:
            return Check("compiler", "ok", ", ".join(str(part) for part in (compiler, header)))
        todo = []
        if _failures(compiler, header):
            todo.append("For Triton and torch.compile: apt-get install gcc libc6-dev python3-dev")
        if isinstance(triton, ProbeFailed):
            todo.append("Reinstall torch's CUDA build, which includes Triton")
        if old:
            todo.append("Triton needs a GPU of compute capability 7.0 or newer")
        return Check("compiler", "warn", missing, f"{'; '.join(todo)}. Until then: {self._cost_of_eager()}")

    def _chosen_gpu(self) -> tuple[str, tuple[int, int]] | None:
        """Return name and compute capability of the chosen device's GPU, from torch; None if there is none."""
        devices = self.torch_info.devices if isinstance(self.torch_info, TorchInfo) else ()
        index = int(self.device.partition(":")[2] or 0)
        return devices[index] if index < len(devices) else None

    def _cost_of_eager(self) -> str:
        """Return the warning that blocks run eagerly, for a window of the usual size on this GPU."""
        from runner.forecast.seconds import find_device
        from runner.generation.families import get_family
        from runner.spec.options import JobOptions
        from runner.spec.recipes import DEFAULT_RECIPE, get_recipe

        recipe, options, chosen = get_recipe(DEFAULT_RECIPE), JobOptions(), self._chosen_gpu()
        forecaster = get_family(recipe).forecaster(recipe, None)
        plan = forecaster.plan(USUAL_FRAMES, USUAL_SIZE, options)
        gpu = find_device(chosen[0]) if chosen else None
        return forecaster.eager_words("they cannot be compiled here", plan, options, gpu)


def _faster_in_svdq(fast: Recipe, speed: DeviceSpeed, seconds: float) -> str:
    """Return the fastest recipe in an SVDQuant format whose forecast for a usual clip is below `seconds`; else "".

    Its other choices are those of `fast` on this GPU.
    """
    from runner.generation.families import get_family
    from runner.spec.options import JobOptions
    from runner.spec.recipes import CHOSEN, DEFAULT_RECIPE, FIXED, get_recipe

    plain, text = get_recipe(DEFAULT_RECIPE), ""
    changed = {(name, getattr(fast, name)) for name in CHOSEN if getattr(fast, name) != getattr(plain, name)}
    others = [modifier.text for modifier in FIXED.values() if (modifier.field, modifier.value) in changed]
    for row in PRECISIONS.values():
        if row.layout != "svdq" or row.name not in speed.matmul:
            continue
        recipe = get_recipe("+".join([DEFAULT_RECIPE, row.name, *others]))
        plan = get_family(recipe).forecaster(recipe, None).plan(USUAL_FRAMES, USUAL_SIZE, JobOptions(), speed)
        if plan.seconds is not None and plan.seconds < seconds:
            rate = " (its rate is an estimate)" if speed.estimates(row.name) else ""
            text, seconds = f"; {recipe.name} {plan.seconds:.3g} s{rate}", plan.seconds
    return text


def _failures(*answers: object) -> str:
    """Return the reasons of the failed probes, each once."""
    return "; ".join(dict.fromkeys(str(answer) for answer in answers if isinstance(answer, ProbeFailed)))


def _weights(models: str | None, recipe: str | None) -> Check:
    if not models:
        return Check("weights", "skipped", "no model store given", "Pass --models, or set VIDEO_LAB_MODELS")
    if is_remote(models):
        first = next(iter(open_storage(models).list()), None)
        if first is None:
            return Check("weights", "fail", f"{models} is empty", "Check the bucket and the prefix")
        return Check("weights", "ok", f"{models} can be listed; the files are checked after they are synced")
    from runner.generation.families import EngineSettings, get_family
    from runner.spec.recipes import DEFAULT_RECIPE, get_recipe

    chosen = get_recipe(recipe or DEFAULT_RECIPE)
    get_family(chosen).resolve(local_path(models), chosen, EngineSettings())
    return Check("weights", "ok", f"{models} has all files of recipe {chosen.name}{_quantised(models, chosen)}")


def _quantised(models: str, recipe: Recipe) -> str:
    """Return which file of `quantize` the recipe uses, and how it was made; "" if it uses no such file."""
    from runner.quantization.files.quantized_header import SMOOTHINGS, check_file
    from runner.weights.variant import choose_variant

    root = local_path(models)
    variant = choose_variant(root, recipe)
    if variant.kind != "quantized":
        return ""
    file = check_file(variant.transformer)
    made = f"; it uses {variant.transformer.relative_to(root)}, {len(file.layers)} layers in {file.layout.name}"
    if file.chosen:
        by = "calibration" if file.chosen["smoothing"] == SMOOTHINGS[0] else "the weights alone"
        made += f", rank {file.chosen['rank']}, smoothing from {by}"
    return made


def _output(out: str | None) -> Check:
    if not out:
        return Check("output", "skipped", "no output given", "Pass --out to check it")
    if not is_remote(out):
        return _folder("output", local_path(out), OUT_GIB)
    storage = open_storage(out)
    next(iter(storage.list()), None)  # a run lists the finished jobs before it writes
    probe_writable(storage)
    return Check("output", "ok", f"{out} can be listed and written")


def _folder(name: str, folder: Path, wanted_gib: int) -> Check:
    """Check that a folder is writable and its disk has room. A missing folder is judged by its nearest parent."""
    folder = folder.expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    new = "" if there == folder else f" (will be created in {there})"
    if not there.is_dir():
        return Check(name, "fail", f"{there} is a file, not a folder", "Choose another folder")
    with tempfile.NamedTemporaryFile(dir=there, prefix=".video-lab-probe-") as probe:
        probe.write(b"\0" * 4096)
        probe.flush()
    free = shutil.disk_usage(there).free
    found = f"{folder}{new}, {free / GIB:.1f} GiB free"
    if free < GIB:
        return Check(name, "fail", found, "Free space, or choose a folder on another disk")
    if free < wanted_gib * GIB:
        return Check(name, "warn", found, f"{wanted_gib} GiB or more are recommended")
    return Check(name, "ok", found)
