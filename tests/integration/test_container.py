"""The image without CUDA, built and run for real: tools/image.sh, the Dockerfile and entrypoint.py.

Every container here is confined (tests/container_image.py) unless a test says otherwise. Costs minutes and gigabytes,
so it runs only when VIDEO_LAB_SYSTEM_TESTS=1 asks for it, as CI does.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.container_image import (
    as_its_owner,
    build,
    contain,
    make_demo,
    make_workplace,
    missing,
    output_of,
    python,
)
from tests.system_tests import ASKED_FOR, NOT_ASKED_FOR

WHY_NOT = missing() if ASKED_FOR else NOT_ASKED_FOR

pytestmark = [
    pytest.mark.container,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def image() -> str:
    """The CPU variant of the image, built from this working tree."""
    return build("localhost/video-lab:test", "cpu", "cpu")


@pytest.fixture(scope="module")
def workplace(image, tmp_path_factory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


def test_help_comes_from_the_entrypoint(image):
    done = contain(image)
    assert done.returncode == 0, output_of(done)
    assert "usage: video-lab" in done.stdout


def test_a_wrong_flag_is_a_usage_error(image):
    done = contain(image, "run", "--no-such-flag")
    assert done.returncode == 2, output_of(done)


def test_the_default_user_is_not_root_and_the_root_is_read_only(image):
    code = "import os\nprint(os.getuid(), os.getgid())\ntry: open('/app/x', 'w')\nexcept OSError as e: print(e.errno)"
    done = python(image, code)
    assert done.stdout.split("\n")[:2] == ["10001 10001", "30"], output_of(done)  # 30 is EROFS


def test_tini_is_the_first_process(image):
    """Zombies are reaped and SIGTERM arrives: the runner itself must not be process 1."""
    code = "print(open('/proc/1/comm').read().strip())"
    done = contain(image, "--", "python", "-c", code, options=("--entrypoint", "/usr/bin/tini"))
    assert done.stdout.strip() == "tini", output_of(done)


def test_nothing_of_the_build_settings_stays(image):
    """No pip.conf, no certificate; local package folders leave at most an empty directory where they were mounted."""
    code = (
        "import os, pathlib\n"
        "assert not os.path.exists('/etc/pip.conf')\n"
        "print([str(p) for root in ('/mnt', '/srv', '/run/secrets') for p in pathlib.Path(root).rglob('*')])\n"
        "print(len(list(pathlib.Path('/').glob('**/torch-*.whl'))))"
    )
    done = python(image, code, ("--user", "0:0"))
    assert done.stdout.split("\n")[:2] == ["[]", "0"], output_of(done)


COMPILE_A_KERNEL = """
import json, os, pathlib, torch

def curve(x):
    return torch.nn.functional.silu(x) * 2 + x.square().cumsum(0)

x = torch.linspace(-3, 3, 4096)
compiled = torch.compile(curve, fullgraph=True)
error = (compiled(x) - curve(x)).abs().max().item()
made = [str(path) for path in pathlib.Path("/cache/inductor").rglob("*.so")]
print(json.dumps({"uid": os.getuid(), "error": error, "made": made}))
"""


@pytest.mark.parametrize(
    "options",
    [(), ("--user", "1234:1234"), ("--user", "1234:1234", "--tmpfs", "/cache:mode=1777,exec")],
    ids=["image's own user", "a user without an account", "memory as the cache"],
)
def test_inductor_compiles_a_kernel_under_a_read_only_root(image, options):
    """The generated C++ needs a compiler, Python's headers, a user name and one writable place: all are there."""
    done = python(image, COMPILE_A_KERNEL, options)
    assert done.returncode == 0, output_of(done)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["error"] < 1e-3
    assert report["made"], "no shared object was built: the function ran uncompiled"
    assert report["uid"] == (1234 if options else 10001)


BUILD_AN_EXTENSION = """
import pathlib, subprocess, sysconfig, sys, os
folder = pathlib.Path(os.environ["TMPDIR"] if os.path.isdir(os.environ["TMPDIR"]) else "/cache")
(folder / "answer.c").write_text('''
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "answer", 0, -1, methods};
PyMODINIT_FUNC PyInit_answer(void) { return PyModule_Create(&module); }
''')
subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-I", sysconfig.get_paths()["include"],
                str(folder / "answer.c"), "-o", str(folder / "answer.so")], check=True)
sys.path.insert(0, str(folder))
import answer
print(answer.answer())
"""


def test_c_against_python_headers_compiles_as_triton_needs_it(image):
    """Triton builds its launcher so: gcc, Python.h, a shared object that is imported. (Triton itself needs a GPU.)"""
    done = python(image, BUILD_AN_EXTENSION)
    assert done.returncode == 0, output_of(done)
    assert done.stdout.strip() == "42"


@pytest.fixture(scope="module")
def demo(image, workplace) -> Path:
    return make_demo(image, workplace)


def test_the_demo_renders_inside(demo):
    records = sorted(demo.glob("jobs/*/result.json"))
    assert len(records) >= 4
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["status"] == "succeeded", path
        movie = path.with_name("output.mp4")
        assert movie.stat().st_size == record["output"]["bytes"]
        assert movie.stat().st_uid == 4321  # the user's own files, not root's
    assert (demo / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_finds_everything_done(image, workplace, demo):
    before = {path: path.stat().st_mtime_ns for path in demo.glob("jobs/*/output.mp4")}
    arguments = ["run", "manifests/demo.yaml", "--out", "out/demo", "--models", ".cache/demo-models"]
    done = contain(image, *arguments, options=as_its_owner(workplace))
    assert done.returncode == 0, output_of(done)
    assert {path: path.stat().st_mtime_ns for path in demo.glob("jobs/*/output.mp4")} == before


def test_children_of_an_aws_array_share_the_jobs(image, workplace, demo):
    """As AWS Batch starts them, by its variables alone: each takes every second job, and both belong to one run."""
    arguments = ["run", "manifests/demo.yaml", "--out", "out/array", "--models", ".cache/demo-models", "--limit", "2"]
    done = []
    for index in range(2):
        variables = {"AWS_BATCH_JOB_ID": f"5a4e-11:{index}", "AWS_BATCH_JOB_ATTEMPT": "1"}
        variables |= {"AWS_BATCH_JOB_ARRAY_INDEX": str(index), "AWS_BATCH_JOB_ARRAY_SIZE": "2"}
        given = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
        child = contain(image, *arguments, options=(*as_its_owner(workplace), *given))
        assert child.returncode == 0, output_of(child)
        done.append({path.parent.name for path in (workplace / "out" / "array").glob("jobs/*/result.json")})
    first, both = done
    assert (len(first), len(both)) == (1, 2)
    (run,) = (workplace / "out" / "array" / "runs").iterdir()
    assert run.name == "5a4e-11"
    shards = {path.name.partition(".")[0] for path in run.glob("*-of-*.summary.json")}
    assert shards == {"00000-of-00002", "00001-of-00002"}


def test_nights_are_compared_inside(image, workplace, demo):
    """The image has what measuring and the report need: one job of the second night shows another dancer."""
    baseline = ["--baseline", "baseline"]
    accepted = contain(image, "approve", "out/demo", *baseline, "--why", "seen", options=as_its_owner(workplace))
    assert accepted.returncode == 0, output_of(accepted)
    night = workplace / "out" / "night"
    shutil.copytree(demo / "jobs", night / "jobs")
    job, other = night / "jobs" / "mira-wave", night / "jobs" / "otto-wave"
    for name in ("output.mp4", "frames.sha256"):
        shutil.copyfile(other / name, job / name)
    record, shown = (json.loads((folder / "result.json").read_text("utf-8")) for folder in (job, other))
    record["output"] |= {key: shown["output"][key] for key in ("bytes", "identity", "sha256", "frames_sha256")}
    (job / "result.json").write_text(json.dumps(record), encoding="utf-8")
    arguments = ["compare", "out/night", *baseline, "--report", "report"]
    for path in [night, *night.rglob("*")]:
        os.chown(path, 4321, 4321)
    done = contain(image, *arguments, options=as_its_owner(workplace))
    assert done.returncode == 4, output_of(done)
    found = json.loads((workplace / "report" / "comparison.json").read_text("utf-8"))
    assert (found["jobs"][0]["id"], found["counts"]["broken"]) == ("mira-wave", 1)
    assert found["jobs"][0]["measurements"]["ssim"]["worst"] < 1
    assert (workplace / "report" / "report.html").stat().st_size > 50_000


def test_a_bad_manifest_exits_with_2(image, workplace):
    (workplace / "bad.yaml").write_text("version: 1\njobs:\n  - id: ../x\n    reference: a.png\n    video: b.mp4\n")
    done = contain(image, "run", "bad.yaml", "--out", "out/bad", options=as_its_owner(workplace))
    assert done.returncode == 2, output_of(done)
    assert "manifest.invalid" in done.stderr
    assert not (workplace / "out" / "bad" / "jobs").exists()


def test_an_output_of_another_user_is_refused_with_the_remedy(image, workplace, demo):
    """The commonest mistake with a mounted folder: it belongs to its owner, the container's user is someone else."""
    arguments = ["run", "manifests/demo.yaml", "--out", "denied", "--models", ".cache/demo-models"]
    mounted = ("--volume", f"{workplace}:/data", "--workdir", "/data")
    done = contain(image, *arguments, options=mounted)
    assert done.returncode == 2, output_of(done)
    assert "storage.denied" in done.stderr
    assert "--user" in done.stderr
    assert not (workplace / "denied").exists()
