"""Metrics of several shards as Debian's tools read them: promtool, and the textfile collector of a real node_exporter.

`.ci/run` installs both. Elsewhere their tests are skipped, and pytest says why.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from runner.batch.lease import host_name
from runner.batch.summary import SummaryWriter
from runner.errors import InputNotFound
from runner.records.record import ErrorRecord, JobLine
from runner.storage import open_storage
from tests.records.test_record import a_failure
from tests.system_tests import ASKED_FOR, NOT_ASKED_FOR

PAGE = Path(__file__).parents[2] / "docs/metrics.md"
NO_DUPLICATES = r'^promhttp_metric_handler_errors_total{cause="gathering"} 0$'
RECIPE = 'fp4-distill "quoted" \\ back'


def find_node_exporter() -> str | None:
    return next(
        (found for name in ("prometheus-node-exporter", "node_exporter") if (found := shutil.which(name))), None
    )


def needs(found: str | None, name: str) -> pytest.MarkDecorator:
    reason = f"no {name} is installed" if ASKED_FOR else NOT_ASKED_FOR
    return pytest.mark.skipif(not ASKED_FOR or found is None, reason=reason)


needs_promtool = needs(shutil.which("promtool"), "promtool")
needs_node_exporter = needs(find_node_exporter(), "node_exporter")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two shards of each of two runs, in a folder a run: the first shards were stopped, the others still run."""
    storage = open_storage(tmp_path / "out")
    line = JobLine(id="a", status="failed", reason="", seconds=2.0, error=ErrorRecord.of(InputNotFound("x"), "prepare"))
    record = a_failure(timings_s={"fetch": 0.5}, caches={"pose_cache_hits": 2, "text_encoder_loads": 1})
    for run_id in ("night-1", "night-2"):
        for shard in ("0-of-2", "1-of-2"):
            summary = SummaryWriter(
                storage, run_id=run_id, shard=shard, shard_reason="", manifest="", recipe=RECIPE, job_ids=["a", "b"]
            )
            summary.note_work(1.5, "NVIDIA H200")
            summary.add(line, record)
            if shard == "0-of-2":
                summary.finish("SIGTERM", 143)
    return tmp_path / "out/runs"


def promtool(*arguments: str, text: str = "") -> tuple[int, str]:
    done = subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


@needs_promtool
def test_promtool_finds_no_fault_in_any_file(runs):
    files = [path.read_text(encoding="utf-8") for path in runs.glob("*/*.prom")]
    assert len(files) == 4
    assert [promtool("check", "metrics", text=text) for text in files] == [(0, "")] * 4
    code, found = promtool("check", "metrics", text=files[0].replace("_jobs", "_jobs_total"))
    assert code != 0, "promtool does not complain about a gauge with a counter's name"
    assert 'should not have "_total" suffix' in found


@contextmanager
def scrape_folder(pattern: str) -> Iterator[str]:
    """The text that a node_exporter gives away which reads the folders of `pattern`."""
    command = [find_node_exporter() or "", "--collector.disable-defaults", "--collector.textfile"]
    command += [f"--collector.textfile.directory={pattern}", "--web.listen-address=127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            told: list[str] = []
            while not (found := re.search(r'"Listening on" address=(\S+)', "".join(told[-1:]))):
                told.append(process.stderr.readline())
                assert told[-1], f"node_exporter has ended: {''.join(told)}"
            for _ in range(2):  # the second answer counts the errors of the first
                with urlopen(f"http://{found[1]}/metrics", timeout=30) as answer:
                    text = answer.read().decode()
            yield text
        finally:
            process.kill()


def series_in(text: str) -> dict[tuple, float]:
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("video_lab_")
    }


@needs_node_exporter
@pytest.mark.timeout(120)
def test_node_exporter_takes_every_series_of_all_files(runs, tmp_path):
    written: dict[tuple, float] = {}
    for path in runs.glob("*/*.prom"):
        written |= series_in(path.read_text(encoding="utf-8"))
    with scrape_folder(f"{runs}/*") as text:
        assert re.search(r"^node_textfile_scrape_error 0$", text, re.M)
        assert re.search(NO_DUPLICATES, text, re.M)
        assert {_as_written(key): value for key, value in series_in(text).items()} == written

    # Where series stand in two files, node_exporter says so: the test can fail.
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("one", "other"):
        shutil.copy(runs / "night-1/0-of-2.metrics.prom", twice / f"{name}.prom")
    with scrape_folder(str(twice)) as text:
        assert not re.search(NO_DUPLICATES, text, re.M)


def _as_written(key: tuple) -> tuple:
    """node_exporter writes the bound of a bucket as 1, Python as 1.0."""
    return key[0], *((name, value + ".0" if name == "le" and value.isdigit() else value) for name, value in key[1:])


@needs_promtool
def test_the_alerts_of_the_page_fire_on_these_files(runs, tmp_path):
    (rules,) = re.findall(r"```yaml\n(groups:.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    (tmp_path / "alerts.yaml").write_text(rules)
    assert promtool("check", "rules", str(tmp_path / "alerts.yaml"))[0] == 0
    texts = [path.read_text(encoding="utf-8") for path in runs.glob("night-1/*.prom")]
    lines = [line.rsplit(" ", 1) for text in texts for line in text.splitlines() if not line.startswith("#")]
    series = [  # promtool's clock begins at 0, and so does the run
        {"series": name, "values": f"{0 if '_start_time_' in name else float(value):f}x720"} for name, value in lines
    ]
    shard = {"run": "night-1", "shard": "1-of-2", "host": host_name(), "recipe": RECIPE, "device": "NVIDIA H200"}
    late = "shard 1-of-2 of run night-1 began more than ten hours ago and has no end"
    stopped = "shard 0-of-2 of run night-1 ended with exit code 143"
    expected = (
        ("VideoLabJobsFailed", "1h", {"run": "night-1"}, "failed jobs of run night-1: 2"),
        ("VideoLabRunHasNotEnded", "9h", None, ""),
        ("VideoLabRunHasNotEnded", "11h", shard, late),
        ("VideoLabRunStopped", "1h", {"run": "night-1", "shard": "0-of-2"}, stopped),
    )
    tests = [
        {
            "alertname": name,
            "eval_time": when,
            "exp_alerts": [] if labels is None else [{"exp_labels": labels, "exp_annotations": {"summary": text}}],
        }
        for name, when, labels, text in expected
    ]
    whole = {
        "rule_files": ["alerts.yaml"],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": tests}],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(whole))
    code, found = promtool("test", "rules", str(tmp_path / "test.yaml"))
    assert code == 0, found
