"""tools/pip_settings.py and tools/install.py: which packages come from where, as pip itself sees it."""

from __future__ import annotations

import configparser
import re
import tomllib
import zipfile
from pathlib import Path

import install
import pip_settings
import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = ROOT / "pyproject.toml"


@pytest.fixture
def pip_alone(monkeypatch, tmp_path):
    """pip with no settings but those that the test gives."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def write_wheel(folder: Path, version: str) -> None:
    """A wheel of an empty package named torch: enough for pip to choose it."""
    folder.mkdir(exist_ok=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_parse_reads_every_section_and_lets_the_environment_win():
    listing = "\n".join(
        [
            ":env:.find-links='/from/env'",
            "global.cert='/etc/ca.crt'",
            "global.extra-index-url='file:///a/simple https://example.org/simple'",
            "global.find-links='/from/file'",
            "install.timeout='9'",
            "global.timeout='5'",
        ]
    )
    assert pip_settings.parse(listing) == {
        "find-links": "/from/env",
        "cert": "/etc/ca.crt",
        "extra-index-url": "file:///a/simple https://example.org/simple",
        "timeout": "9",
    }


def test_parse_takes_one_value_a_line_as_pip_prints_it():
    """pip shows a multi-line value of a file as a Python literal."""
    assert pip_settings.parse(r"global.find-links='\n/one\n/two'")["find-links"] == "/one /two"


def test_read_agrees_with_pip(pip_alone, tmp_path):
    (tmp_path / "pip.conf").write_text("[global]\nfind-links =\n    /one\n    /two\ntimeout = 7\n")
    pip_alone.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    pip_alone.setenv("PIP_TIMEOUT", "11")
    settings = pip_settings.read()
    assert settings["find-links"] == "/one /two"
    assert settings["timeout"] == "11"


def test_uv_gets_the_same_places():
    settings = {"find-links": "/one /two", "extra-index-url": "https://e/simple", "cert": "/ca.crt", "timeout": "5"}
    settings["constraint"] = "/c.txt https://e/c.txt"
    assert pip_settings.uv_environment(settings) == {
        "UV_FIND_LINKS": "/one,/two",
        "UV_INDEX": "https://e/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "SSL_CERT_FILE": "/ca.crt",
        "UV_CONSTRAINT": "/c.txt https://e/c.txt",
    }
    assert pip_settings.uv_environment({}) == {}


@pytest.mark.parametrize("location", ["https://example.org/simple", "relative/wheels", "/no/such/folder"])
def test_local_path_refuses_what_cannot_be_mounted(location):
    assert pip_settings.local_path(location) is None


def test_carry_moves_certificate_and_folders_into_the_build(tmp_path):
    (tmp_path / "ca.pem").write_text("certificate")
    (tmp_path / "caps.txt").write_text("torch<3")
    wheels, simple = tmp_path / "my wheels", tmp_path / "mirror" / "simple"
    wheels.mkdir()
    simple.mkdir(parents=True)
    settings = {
        "cert": str(tmp_path / "ca.pem"),
        "constraint": f"{tmp_path / 'caps.txt'} https://example.org/caps.txt",
        "find-links": f"{simple.parent}",
        "extra-index-url": f"{simple.as_uri()} https://example.org/simple",
    }
    volumes = pip_settings.carry(settings, tmp_path / "out")
    assert volumes == [f"{tmp_path / 'out'}:/mnt:ro", f"{simple.parent}:{simple.parent}:ro"]
    assert (tmp_path / "out" / "ca.crt").read_text() == "certificate"
    written = configparser.RawConfigParser()
    written.read(tmp_path / "out" / "pip.conf")
    assert written["global"]["cert"] == "/mnt/ca.crt"
    assert written["global"]["constraint"] == "/mnt/constraints-0.txt https://example.org/caps.txt"
    assert (tmp_path / "out" / "constraints-0.txt").read_text() == "torch<3"
    assert written["global"]["extra-index-url"] == settings["extra-index-url"]


def test_carried_settings_are_read_back_by_pip(pip_alone, tmp_path):
    pip_settings.carry({"timeout": "33", "index-url": "https://example.org/100%25/simple"}, tmp_path)
    pip_alone.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    settings = pip_settings.read()
    assert settings["timeout"] == "33"
    assert settings["index-url"] == "https://example.org/100%25/simple"


@pytest.mark.parametrize(
    ("asked", "extras", "driver", "backend"),
    [
        ("", ["test"], False, "cpu"),
        ("", ["test"], True, "auto"),
        ("", ["gpu", "demo"], True, "auto"),
        ("", ["gpu", "demo"], False, install.CUDA_BACKEND),  # an image for GPUs, built where there is none
        ("cu128", ["gpu"], True, "cu128"),
        ("index", ["cpu"], False, "index"),
    ],
)
def test_backend(asked, extras, driver, backend):
    assert install.choose_backend(asked, extras, has_driver=driver) == backend


def test_the_projects_bound_on_torch_is_found():
    requirement = install.torch_requirement(PYPROJECT)
    assert requirement.startswith("torch>=")
    assert "<" in requirement
    assert install.torch_requirement(PYPROJECT, ["gpu", "demo"]) == requirement


def test_an_extra_bounds_torch_too(pip_alone, tmp_path):
    """The wheel of pip's find-links that the project takes is too new for the kernels of `svdq`."""
    write_wheel(tmp_path / "wheels", "2.13.0+cpu")
    pip_alone.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert install.local_torch(install.torch_requirement(PYPROJECT)) == "2.13.0+cpu"
    assert install.local_torch(install.torch_requirement(PYPROJECT, ["cpu", "svdq"])) is None
    write_wheel(tmp_path / "wheels", "2.12.1+cpu")
    assert install.local_torch(install.torch_requirement(PYPROJECT, ["cpu", "svdq"])) == "2.12.1+cpu"


def test_extras_that_extras_name_are_found():
    assert install.expand_extras(PYPROJECT, ["gpu", "svdq"]) == ["gpu", "svdq"]
    assert {"test", "test-tools", "cpu", "compare"} <= set(install.expand_extras(PYPROJECT, ["test"]))


@pytest.mark.parametrize(
    ("extras", "words"),
    [
        ("test-tools,svdq", "extras test-tools and svdq: cache-dit and cache-dit-cu13 install the same folder"),
        ("svdq,test", "test-tools and svdq"),
        ("cpu,gpu", "extras cpu and gpu: onnxruntime and onnxruntime-gpu install the same folder"),
    ],
)
def test_extras_that_share_a_folder_are_refused(uv, capsys, extras, words):
    with pytest.raises(SystemExit) as stop:
        install.main(["--extras", extras])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert uv == []


def test_each_shared_folder_names_what_its_extras_bring():
    """The table of the program against pyproject.toml."""
    of_extras = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]["optional-dependencies"]
    for pair in install.SHARED_FOLDERS:
        for name, extra in pair:
            assert any(re.match(rf"{re.escape(name)}[<>=]", line) for line in of_extras[extra]), name


def test_local_wheel_is_found_by_pip_and_only_within_bounds(pip_alone, tmp_path):
    write_wheel(tmp_path / "wheels", "2.11.0+cpu")
    write_wheel(tmp_path / "wheels", "3.1.0+cpu")
    pip_alone.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert install.local_torch("torch>=2.10,<2.14") == "2.11.0+cpu"
    assert install.local_torch("torch>=2.12,<2.14") is None


def test_without_find_links_there_is_no_local_wheel(pip_alone):
    assert install.local_torch("torch>=2.10") is None


ORT, GPU, CPU_TORCH = {"onnxruntime": "1.32.0"}, {"onnxruntime-gpu": "1.31.1"}, {"torch": "2.13.0+cpu"}
PEER, KERNELS = {"cache-dit": "1.5.3"}, {"cache-dit-cu13": "1.5.0"}


@pytest.mark.parametrize(
    ("extras", "backend", "installed", "stale"),
    [
        (["gpu"], "cu130", ORT, ["onnxruntime"]),
        (["test", "cpu"], "cpu", GPU, ["onnxruntime-gpu"]),
        # Both at once share one folder: whichever goes, the other is broken, so both go.
        (["gpu"], "auto", ORT | GPU, ["onnxruntime", "onnxruntime-gpu"]),
        (["gpu"], "auto", GPU | {"torch": "2.13.0+cu130"}, []),
        (["test"], "cpu", ORT | CPU_TORCH, []),
        (["gpu"], "cu130", ORT | CPU_TORCH, ["onnxruntime", "torch"]),
        (["test"], "cpu", {}, []),
        (["gpu", "svdq"], "cu130", PEER, ["cache-dit"]),
        (
            ["gpu", "test-tools"],
            "index",
            {"cache-dit": "1.5.3", "cache-dit-cu13": "1.5.0"},
            ["cache-dit", "cache-dit-cu13"],
        ),
        (["gpu"], "index", KERNELS, []),
    ],
)
def test_what_cannot_stay_goes_first(extras, backend, installed, stale):
    assert install.stale(extras, backend, installed) == stale


@pytest.fixture
def uv(monkeypatch):
    """The uv commands that install.py gives, recorded instead of run; `refuse` is the one that fails."""

    class Recorded(list):
        refuse: str | None = None

        def __call__(self, *arguments: str, environment=None, text=None) -> None:
            self.append(" ".join([*arguments, *([] if text is None else ["<", text])]))
            if self.refuse is not None and self.refuse in self[-1]:
                raise SystemExit(2)

    recorded = Recorded()
    monkeypatch.setattr(install, "run_uv", recorded)
    monkeypatch.setattr(install.pip_settings, "read", dict)
    monkeypatch.setattr(install, "local_torch", lambda _requirement: "2.13.0+cpu")
    return recorded


def test_a_local_wheel_is_named_exactly(uv):
    assert install.main(["--extras", "cpu,demo", "--backend", "cpu", "--editable"]) == 0
    requirements, editable = uv[-2:]
    assert requirements == f"install -r {PYPROJECT} --extra cpu --extra demo torch==2.13.0+cpu"
    assert editable == f"install --no-deps -e {ROOT}"


def test_cuda_never_takes_the_local_cpu_wheel(uv):
    assert install.main(["--extras", "gpu", "--backend", "cu130"]) == 0
    assert uv[-1] == f"install -r {PYPROJECT} --extra gpu --torch-backend cu130"


def test_the_bound_of_an_extra_reaches_pip(uv, monkeypatch):
    asked = []
    monkeypatch.setattr(install, "local_torch", asked.append)
    assert install.main(["--extras", "gpu,svdq", "--backend", "index"]) == 0
    assert asked == [install.torch_requirement(PYPROJECT, ["svdq"])]
    assert uv[-1] == f"install -r {PYPROJECT} --extra gpu --extra svdq"


def test_resolving_asks_for_the_same_and_installs_nothing(uv):
    """Of the very arguments that installing takes, torch's build among them."""
    target = "--python-version 3.11 --python-platform x86_64-manylinux_2_36 --no-header --no-annotate"
    for extra, backend, build, exact in (
        ("gpu", "cu130", "--torch-backend cu130 ", ""),
        ("gpu", "index", "", ""),
        ("cpu", "cpu", "", "torch==2.13.0+cpu"),
    ):
        assert install.main(["--extras", extra, "--backend", backend, "--editable", "--resolve", "3.11"]) == 0
        assert uv == [f"compile {PYPROJECT} - --extra {extra} {build}{target} < {exact}"]
        uv.clear()


def test_nothing_is_removed_before_its_successor_is_found(uv, monkeypatch):
    monkeypatch.setattr(install, "stale", lambda *_arguments: ["onnxruntime", "torch"])
    uv.refuse = "--dry-run"
    with pytest.raises(SystemExit):
        install.main(["--extras", "gpu", "--backend", "cu130"])
    assert not any(command.startswith("uninstall") for command in uv)
    uv.refuse = None
    assert install.main(["--extras", "gpu", "--backend", "cu130"]) == 0
    assert [command.split()[0] for command in uv[-3:]] == ["install", "uninstall", "install"]
