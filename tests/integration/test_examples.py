"""The files of examples/ are what the commands of its page write, and the compose file starts a run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path, PurePosixPath

import pytest
import yaml

from runner.cli import parse_command
from runner.launch.submission_checks import check_image
from runner.redact import redact
from runner.verbs.commands import VERBS
from tests.goldens.collect import EXAMPLES, example_commands, write_examples
from tests.launch.recorded_tools import complaints

FOLDERS = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE", "VIDEO_LAB_MODELS"):
            environment.delenv(name, raising=False)
        write_examples(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_there_is_a_folder_for_each_platform():
    assert [verb.name.split()[1] for verb in VERBS if verb.name.startswith("submit ")] == FOLDERS
    assert [words[1] for words in example_commands()] == FOLDERS


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_what_its_command_writes(written, name):
    assert files(EXAMPLES / name) == files(written / name)


@pytest.mark.parametrize("name", FOLDERS)
def test_no_credential_and_no_place_of_this_machine_is_in_it(name):
    for file, content in files(EXAMPLES / name).items():
        text = content.decode()
        assert redact(text) == text, file
        assert not re.search(r"/(?:home|root|tmp|work)/", text), file


@pytest.mark.parametrize("name", FOLDERS)
def test_its_scripts_pass_shellcheck(name):
    scripts = [path for path in (EXAMPLES / name).iterdir() if path.suffix in (".sh", ".sbatch")]
    assert EXAMPLES / name / "submit.sh" in scripts
    assert all(complaints(path.read_text(encoding="utf-8")) == "" for path in scripts)


def test_the_apptainer_line_runs_the_runner():
    script = (EXAMPLES / "slurm/run.sbatch").read_text(encoding="utf-8")
    (line,) = re.findall(r"^# +(apptainer run .*)$", script, flags=re.MULTILINE)
    words = shlex.split(line)
    verb, fields, _ = parse_command(words[words.index("/shared/video-lab-0.1.0.sif") + 1 :])
    settings = verb.settings(**fields)
    assert (verb.name, settings.out, settings.models) == ("run", "/shared/out", "/shared/models")


def test_the_compose_file_starts_a_run_on_all_gpus():
    document = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))
    service = document["services"]["run"]
    verb, fields, _ = parse_command(service["command"])
    settings = verb.settings(**fields)
    assert (verb.name, settings.gpus) == ("run", "all")
    check_image(service["image"])
    mounts = {PurePosixPath(text.split(":")[1]): text.split(":")[2:] for text in service["volumes"]}
    for place, mode in ((settings.out, []), (settings.manifest, ["ro"]), ("/models", ["ro"]), ("/cache", [])):
        at = next(path for path in (PurePosixPath(place), *PurePosixPath(place).parents) if path in mounts)
        assert mounts[at] == mode, place
    assert "cache" in document["volumes"]
    assert (service["read_only"], service["tmpfs"]) == (True, ["/tmp"])
    assert int(service["stop_grace_period"].rstrip("s")) > settings.drain_s
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
