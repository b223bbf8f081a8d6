"""Job demands: what a manifest tells of its jobs' memory before anything is fetched or loaded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image
from structlog.testing import capture_logs

import runner.verbs.run as run_verb
from runner.batch.stop import Stop
from runner.batch.worker_link import MachineShare
from runner.generation.protocol import JobDemand
from runner.launch.mailbox import Mailbox
from runner.spec.manifest import parse_manifest
from runner.storage.roots import parse_roots
from runner.verbs.chosen_jobs import choose_jobs
from runner.verbs.job_demands import find_demands
from runner.verbs.run import run
from runner.verbs.settings import RunSettings
from tests.video_files import make_clip

PLAIN = JobDemand((480, 832), 81)


@pytest.fixture
def manifest_of(tmp_path):
    """manifest_of({options}, …): of jobs j0, j1, …; their reference has 300x400 pixels and their video 96x64."""
    Image.new("RGB", (300, 400)).save(tmp_path / "r.png")
    make_clip(tmp_path / "v.mp4", 6, 8)

    def make(*options, place=tmp_path):
        jobs = [
            {"id": f"j{n}", "reference": f"{place}/r.png", "video": f"{place}/v.mp4", "options": words}
            for n, words in enumerate(options)
        ]
        text = json.dumps({"version": 1, "jobs": jobs})
        return parse_manifest(text, base=str(tmp_path), source="m.json")

    return make


@pytest.fixture
def jobs_of(manifest_of):
    return lambda *options, **more: manifest_of(*options, **more).jobs


@pytest.mark.parametrize(
    ("options", "demand"),
    [
        ({"size": "480x832"}, PLAIN),
        ({"size": "1280x720", "max_segment_frames": 121}, JobDemand((1280, 720), 121)),
        ({"size": "480x832", "max_frames": 30}, JobDemand((480, 832), 33)),
        ({"size": "480x832", "max_frames": 300}, PLAIN),
        ({"size": "480x832", "guidance_scale": 1.0}, PLAIN),
        ({"size": "480x832", "guidance_scale": 3.5}, replace(PLAIN, guided=True)),
        ({"size": "480x832", "output": {"interpolate": 2}}, replace(PLAIN, interpolates=True)),
        ({"size": "480x832", "mode": "replace"}, replace(PLAIN, replace=True)),
        ({"size": "480x832", "loras": [{"name": "x", "strength": 0.5}]}, replace(PLAIN, loras=(("x", 0.5),))),
        # 399,360 pixels as 3:4, nearest multiples of 16; as 3:2 in `replace`, where the video counts.
        ({}, JobDemand((544, 736), 81)),
        ({"mode": "replace"}, JobDemand((768, 512), 81, replace=True)),
    ],
)
def test_a_demand_is_told_by_options_and_headers(jobs_of, options, demand):
    assert find_demands(jobs_of(options), ()) == (demand,)


def test_equal_demands_are_one(jobs_of):
    plain, large = {"size": "480x832"}, {"size": "1280x720"}
    found = find_demands(jobs_of(plain, {**plain, "seed": 1}, large, plain), ())
    assert found == (PLAIN, JobDemand((1280, 720), 81))


def test_what_cannot_be_read_has_no_size(jobs_of, tmp_path):
    """In a bucket, outside the roots, missing, or too late. Nothing is raised: the job will say so."""
    unknown = (JobDemand(None, 81),)
    assert find_demands(jobs_of({}, place="s3://nobodys/in"), ()) == unknown
    assert find_demands(jobs_of({}, place=tmp_path / "missing"), ()) == unknown
    (tmp_path / "in").mkdir()
    assert find_demands(jobs_of({}), parse_roots([str(tmp_path / "in")])) == unknown
    assert find_demands(jobs_of({}), (), within_s=-1.0) == unknown
    assert find_demands(jobs_of({"size": "480x832"}, place="s3://nobodys/in"), (), within_s=-1.0) == (PLAIN,)


def test_official_files_have_the_size_of_their_video(tmp_path):
    """Whatever `size` says. Where they are not here yet, an event tells how many jobs are planned for blindly."""
    (tmp_path / "made").mkdir()
    make_clip(tmp_path / "made/src_pose.mp4", 6, 8, size=(160, 96))
    jobs = [
        {"id": name, "options": {"preprocess": {"from": place}}}
        for name, place in (("here", str(tmp_path / "made")), ("there", "s3://nobodys/made"))
    ]
    manifest = parse_manifest(json.dumps({"version": 1, "jobs": jobs}), base=str(tmp_path), source="m.json")
    with capture_logs() as events:
        found = find_demands(manifest.jobs, ())
    assert found == (JobDemand((160, 96), 81), JobDemand(None, 81))
    assert [(event["event"], event["jobs"]) for event in events] == [("sizes_not_known", 1)]


@pytest.fixture
def asked(monkeypatch):
    """asked(settings, …): the demands for which a run would load its model."""

    class Asked(Exception):
        pass

    def build_engine(settings, manifest, processes, demands):
        raise Asked(demands)

    def ask(settings, **more):
        monkeypatch.setattr(run_verb, "build_engine", build_engine)
        with pytest.raises(Asked) as found:
            run(settings, **more)
        return found.value.args[0]()

    return ask


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ({}, {(480, 832), (1280, 720), (640, 640)}),
        ({"only": ["j0", "j2"]}, {(480, 832), (640, 640)}),
        ({"limit": 1}, {(480, 832)}),
        ({"shard": "1/3"}, {(1280, 720)}),
        ({"shard": "any"}, {(480, 832), (1280, 720), (640, 640)}),
    ],
)
def test_a_run_is_ready_for_the_jobs_that_it_may_take(manifest_of, asked, tmp_path, flags, sizes):
    manifest = manifest_of({"size": "480x832"}, {"size": "1280x720"}, {"size": "640x640"})
    settings = RunSettings(manifest=manifest, out=str(tmp_path / "out"), cache=tmp_path / "cache", **flags)
    assert {demand.size for demand in asked(settings)} == sizes
    assert len(choose_jobs(settings)[1]) == len(sizes)


def test_a_worker_is_ready_for_all_jobs_that_its_command_knows(manifest_of, asked, tmp_path):
    """One of several processes by its own manifest; one that is sent its jobs by what the driver tells."""
    settings = RunSettings(
        manifest=manifest_of({"size": "480x832"}), out=str(tmp_path / "out"), cache=tmp_path / "cache", shard="any"
    )
    stop = Stop()
    assert asked(settings, share=MachineShare(2, stop, lambda: None)) == (PLAIN,)
    sent = replace(settings, manifest=replace(settings.manifest, jobs=()))
    told = (PLAIN, JobDemand((1280, 720), 81))
    share = MachineShare(2, stop, lambda: None, told)
    assert asked(sent, source=Mailbox(), share=share) == told
    # A source of which nothing is known: the manifest's jobs do not run.
    assert asked(settings, source=Mailbox()) == ()


def test_the_model_is_planned_for_what_is_asked_when_it_is_loaded(manifest_of, demo_models, tmp_path):
    """With the demo's models, on the CPU. Neither mode nor sizes are in the fingerprint."""
    manifest, found = manifest_of({}), []
    common = {"manifest": manifest, "out": "out", "models": str(demo_models), "cache": tmp_path / "cache"}
    settings = RunSettings(**common, recipe="fp32", device="cpu")

    def demands():
        found.append("asked")
        return (PLAIN, JobDemand((1280, 720), 49, guided=True), JobDemand(None, 81))

    engine = run_verb.build_engine(settings, manifest, 1, demands)
    assert found == []
    assert engine.identity == run_verb.build_engine(replace(settings, memory="minimal"), manifest).identity
    generator = engine.load()
    assert found == ["asked"]
    assert "forecast at 1280x720x49, guided, " in generator.description["memory_why"]
    generator.close()
