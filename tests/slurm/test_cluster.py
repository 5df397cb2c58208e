from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from . import cluster as module
from .cluster import Cluster, ClusterError
from .conftest import require_slurm

pytestmark = pytest.mark.slurm


def wait_for(cluster: Cluster, job: str, *states: str) -> str:
    deadline = time.monotonic() + 120
    while (state := cluster.jobs()[job]) not in states:
        why = cluster.run("scontrol", "show", "job", job).stdout
        assert time.monotonic() < deadline, f"{job} is {state}: {why}"
        time.sleep(0.2)
    return state


def submit(cluster: Cluster, *options: str) -> str:
    done = cluster.run(
        "sbatch", "--parsable", "--output=/dev/null", *options, check=True
    )
    return done.stdout.strip()


def test_gpus_and_tasks(cluster: Cluster, tmp_path: Path) -> None:
    script = f"srun sh -c 'echo $CUDA_VISIBLE_DEVICES > {tmp_path}/$SLURM_PROCID'"
    options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2")
    job = submit(cluster, *options, f"--wrap={script}")
    assert wait_for(cluster, job, "COMPLETED", "FAILED") == "COMPLETED"
    assert [(tmp_path / n).read_text() for n in "01"] == ["0,1\n", "0,1\n"]
    refused = cluster.run("sbatch", "--gpus-per-node=3", "--wrap=true")
    assert refused.returncode != 0


def test_two_clusters_do_not_disturb_each_other(cluster: Cluster) -> None:
    job = submit(cluster, "--wrap=srun sleep 600")
    wait_for(cluster, job, "RUNNING")
    with Cluster(nodes=1, gpus=0) as other:
        theirs = submit(other, "--wrap=true")
        wait_for(other, theirs, "COMPLETED")
        assert job not in other.jobs()
    assert cluster.jobs()[job] == "RUNNING"
    cluster.run("scancel", job, check=True)
    wait_for(cluster, job, "CANCELLED")


def test_nodes_and_controller_come_back() -> None:
    require_slurm()
    with Cluster() as cluster:
        job = submit(cluster, "--wrap=srun sleep 2")
        wait_for(cluster, job, "RUNNING")
        cluster.kill_controller()
        cluster.start_controller()
        name = cluster.node_names[1]
        cluster.kill_node(name)
        cluster.start_node(name)
        cluster.wait_for_nodes()
        assert wait_for(cluster, job, "COMPLETED", "FAILED") == "COMPLETED"
        assert cluster.job_field(job, "Restarts") == "0"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_its_owner(signum: int) -> None:
    require_slurm()
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    script = (
        "import signal, sys, time\n"
        # A shell that starts the tests in the background lets them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(Path(module.__file__).parent)!r})\n"
        "from cluster import Cluster\n"
        f"with Cluster({str(directory)!r}) as cluster:\n"
        "    cluster.run('sbatch', '--output=/dev/null', '--wrap=srun sleep 600')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    config = directory / "etc" / "slurm.conf"
    assert len(list(module._processes(config))) >= 4
    os.kill(owner.pid, signum)
    owner.communicate(timeout=120)
    deadline = time.monotonic() + 120
    while any(module._processes(config)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    shutil.rmtree(directory)


def test_refuses_directories(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="runs in .* already"):
        Cluster(cluster.directory).start()
    with pytest.raises(ClusterError, match="take a shorter one"):
        Cluster(tmp_path / ("c" * 60)).start()


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="slurmctld.* not found.*slurm-test"):
        Cluster(tmp_path / "c").start()
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match="slurmd.* not found.*Debian's packages"):
        module.install()
