"""A real Slurm of one machine: `slurm_cluster`, with two fake GPUs, started once a session; loopback only.

The daemons run in the foreground, as children of the tests, and are stopped by their handles. They share nothing with
a Slurm or munge that runs here already: own folder, socket, key and ports.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system_tests import ASKED_FOR, NOT_ASKED_FOR

__all__ = ["GPUS", "RENDER", "URGENT", "SlurmCluster", "slurm_cluster", "wait_until", "why_no_slurm"]

GPUS = 2
RENDER, URGENT = "render", "urgent"  # partitions; jobs of the second take the place of the first's
GRACE_S, KILL_WAIT_S = 60, 30  # seconds that a preempted job has; the second is Slurm's default
REQUEUE_DELAY_S = 5  # the least that Slurm takes
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")

# CPUs and memory are claimed, not there (config_overrides), so that the product's own defaults fit the node.
# cred_expire is also how long a requeued job waits before it starts again; 120 s by default (slurm.conf, AuthInfo).
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_delay_s}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
KillWait={kill_wait_s}
MaxArraySize=1001
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=512000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=render Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""


def why_no_slurm() -> str:
    """Why no Slurm can be started here; empty if it can."""
    if not ASKED_FOR:
        return NOT_ASKED_FOR
    if os.geteuid() != 0:
        return "needs root: the node's daemon starts jobs"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"not installed: {' '.join(missing)} (slurm-wlm, munge)" if missing else ""


def wait_until(true: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Ask every 0.2 s until `true()` holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.2)


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster; `environment` makes Slurm's tools speak to it."""

    folder: Path
    environment: Mapping[str, str]

    def run(self, *words: str, **variables: str) -> str:
        """A tool's standard output; fails where the tool does."""
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, env={**self.environment, **variables}, timeout=120
        )
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of one task of an array (`12_0`)."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def wait_for_end(self, *job_ids: str) -> None:
        """Until none of them is in the queue any more."""
        ids = ",".join(job_ids)
        wait_until(lambda: not self.run("squeue", "--noheader", f"--jobs={ids}"), f"end of {ids}", 240)


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster of this machine alone, with the partitions RENDER, whose jobs can be preempted, and URGENT."""
    if reason := why_no_slurm():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().partition(".")[0]
    gres = []
    for index in range(GPUS):
        device = folder / f"gpu{index}"
        try:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null; Slurm wants a character device
        except PermissionError:
            pytest.skip("devices cannot be made here, and a GPU of Slurm is one")
        gres.append(f"NodeName={host} Name=gpu File={device} Flags=nvidia_gpu_env\n")
    (folder / "gres.conf").write_text("".join(gres), encoding="utf-8")
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    controller_port, node_port = _free_ports(2)
    values = {"host": host, "folder": folder, "controller_port": controller_port, "node_port": node_port}
    numbers = {"gpus": GPUS, "grace_s": GRACE_S, "kill_wait_s": KILL_WAIT_S, "requeue_delay_s": REQUEUE_DELAY_S}
    conf.write_text(CONF.format(**values, **numbers), encoding="utf-8")
    others = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    cluster = SlurmCluster(folder, {**others, "SLURM_CONF": str(conf)})
    files = {"--socket": "munge.socket", "--key-file": "munge.key", "--seed-file": "munge.seed"}
    files |= {"--pid-file": "munged.pid", "--log-file": "munged.log"}
    munge = [word for flag, name in files.items() for word in (flag, str(folder / name))]
    with ExitStack() as daemons:
        # --force: the folder of a test belongs to root, as everything here does
        daemons.enter_context(_daemon(cluster, "munged", "--foreground", "--force", *munge))
        wait_until((folder / "munge.socket").exists, "munged")
        daemons.enter_context(_daemon(cluster, "slurmctld", "-D", "-f", str(conf)))
        daemons.enter_context(_daemon(cluster, "slurmd", "-D", "-f", str(conf), "-N", host))
        wait_until(lambda: "idle" in _answer(cluster, "sinfo", "--noheader", "--format=%T"), f"a node; see {folder}")
        try:
            yield cluster
        finally:
            cluster.run("scancel", "--user=root")
            wait_until(lambda: not cluster.run("squeue", "--noheader"), "end of all jobs", KILL_WAIT_S + 60)


@contextmanager
def _daemon(cluster: SlurmCluster, *words: str) -> Iterator[None]:
    with open(cluster.folder / f"{words[0]}.out", "wb") as said:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=cluster.environment)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answer(cluster: SlurmCluster, *words: str) -> str:
    """What a tool prints; nothing while the controller does not answer."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=cluster.environment, timeout=60)
    return done.stdout


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
