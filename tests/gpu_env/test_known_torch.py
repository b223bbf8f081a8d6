"""Which torch the tests of private names are for, and what they do elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.gpu_env import known_torch
from tests.gpu_env.known_torch import find_private, needs_gpu_env, newest_minor, why_unknown

BOUND = "torch>=2.10,<2.14"


def test_the_newest_version_of_a_bound():
    assert newest_minor(BOUND) == (2, 13)
    assert newest_minor("torch>=2.10,<3.4,<2.12") == (2, 11)


@pytest.mark.parametrize("bound", ["torch", "torch>=2.10", "torch>=2.10,<3", "torch<2.13.1"])
def test_a_bound_without_a_newest_version(bound):
    with pytest.raises(ValueError, match="upper bound"):
        newest_minor(bound)


@pytest.mark.parametrize("installed", ["2.13.0", "2.13.2+cu130", "2.13.0a0+git"])
def test_the_newest_version_is_known(installed):
    assert why_unknown(installed, BOUND) == ""


@pytest.mark.parametrize("installed", ["2.12.1+cu130", "2.14.0", "3.13.0"])
def test_others_are_not(installed):
    assert why_unknown(installed, BOUND) == f"private names of torch 2.13 are used; torch {installed} is installed"


def test_the_project_names_a_newest_version():
    assert newest_minor(known_torch._torch_requirement()) >= (2, 13)


def test_private_names():
    owner, attribute = find_private("torch.cuda:is_available")
    assert getattr(owner, attribute) is sys.modules["torch"].cuda.is_available
    assert find_private("collections:Counter.update")[1] == "update"


@pytest.mark.parametrize("name", ["torch.cuda:no_such_name", "torch.no_such_module:name", "torch.cuda:Stream.a.b"])
def test_a_private_name_that_is_not_there_is_a_failure(name):
    with pytest.raises(LookupError, match=f"has no {name}"):
        find_private(name)


@needs_gpu_env
def test_a_missing_name_stops_the_fake_device(monkeypatch):
    """On the known version the tests fail by it, and do not skip."""
    from tests.gpu_env import fake_cuda as module

    monkeypatch.setattr(module, "_replacements", lambda _: {"torch.cuda:no_such_name": None})
    with pytest.raises(LookupError, match="no_such_name"), module.fake_cuda("sm_90"):
        pass


@needs_gpu_env
def test_what_the_fake_device_replaces_is_put_back():
    """In a process of its own: importing Inductor takes seconds, and its caches stay."""
    program = (
        "import torch\nfrom tests.gpu_env import fake_cuda as module\n"
        "from tests.gpu_env.known_torch import find_private\n"
        "names = [*module._replacements(module.DEVICES['sm_90']), 'triton.runtime:driver._active']\n"
        "now = lambda: [getattr(*find_private(name)) for name in names]\n"
        "before = now()\n"
        "with module.fake_cuda('sm_90') as device:\n"
        "    assert torch.cuda.get_device_capability() == (9, 0) == device.capability\n"
        "    assert not any(a is b for a, b in zip(now(), before, strict=True))\n"
        "assert all(a is b for a, b in zip(now(), before, strict=True))\n"
        "assert not torch.cuda.is_available()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, cwd=known_torch.ROOT)
