"""A private SLURM on this machine, for tests: real daemons, virtual nodes and GPUs.

munged, slurmctld and one slurmd per virtual node run as this user, listen on loopback
and write into one directory only. GPUs are declared without hardware: a job that asks
for two sees CUDA_VISIBLE_DEVICES=0,1. There is no accounting, as on a small cluster.

From the shell:

    eval "$(python tests/slurm/cluster.py start /tmp/cluster --nodes 2 --gpus 2)"
    sinfo
    python tests/slurm/cluster.py stop /tmp/cluster

Debian: apt-get install slurmctld slurmd slurm-client munge
"""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PACKAGES = "slurmctld slurmd slurm-client munge"
# Debian's place of daemons, not on everyone's path.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
# A GPU has to name a character device. Nobody opens it.
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

# 107 letters are left for /spool/0x7f000001/0x7f000001_JOB.STEP, a socket.
_LONGEST_PATH = 55

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is how long a requeued job waits before it starts again: 120 s by default,
# 5 at least.
AuthInfo=socket={directory}/munge/socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/run/slurmctld.pid
SlurmdPidFile={directory}/run/slurmd.%n.pid
SlurmctldLogFile={directory}/log/slurmctld
SlurmdLogFile={directory}/log/slurmd.%n
{listen}
# What needs neither cgroups nor systemd nor a data base.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
# Virtual nodes may be larger than the machine.
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=1,sched_min_interval=0
KillWait=5
SlurmdTimeout=15
MessageTimeout=20
CompleteWait=0
InactiveLimit=0
# Jobs that have ended stay known, without accounting.
MinJobAge=86400
ReturnToService=2
JobRequeue=1
# A job of the partition `prio` takes the place of one of `main`, which is told so by
# the signal that it asked for, and is queued again.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
FirstJobId={first_job}
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 \
PriorityTier=1 GraceTime=30
PartitionName=prio Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=10 \
PreemptMode=OFF
"""


class ClusterError(RuntimeError):
    """The cluster cannot be started."""


def install() -> None:
    """Installs SLURM's daemons and tools if they are missing, as root on Debian.

    Raises:
        ClusterError: If that is not possible, saying what is missing.
    """
    missing = missing_programs()
    if not missing:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise ClusterError(
            f"{', '.join(missing)} not found. As root on Debian they are installed by "
            f"`make slurm-test`; elsewhere install Debian's packages {PACKAGES} or "
            "what they are called there."
        )
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    packages = PACKAGES.split()
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
    ):
        if subprocess.run(command, env=environment).returncode:
            raise ClusterError(f"{' '.join(command)} failed: see above.")


def missing_programs() -> list[str]:
    """Returns the programs of SLURM that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


class Cluster:
    """A private SLURM in a directory. Several may run side by side.

    As a context manager it also ends when this process is killed.

    Args:
        directory:
            Where it keeps everything, with a path of at most 55 letters, as sockets
            lie in it. None for a new temporary one, which goes when the cluster stops.
        nodes:
            Number of virtual nodes.
        cpus:
            CPUs that each node declares.
        gpus:
            GPUs that each node declares, 6 at most.
        memory:
            Megabytes that each node declares.

    Attributes:
        node_names:
            Names of the nodes. They are addresses of the loopback device, as Lightning
            and submitit take the name of the first node for the address of rank 0.
        environment:
            Environment of a process that uses the cluster.
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        nodes: int = 2,
        cpus: int = 2,
        gpus: int = 2,
        memory: int = 64_000,
    ) -> None:
        self._temporary = directory is None
        self.directory = Path(directory or tempfile.mkdtemp(prefix="slurm-")).resolve()
        self.node_names = [f"0x7f0000{number:02x}" for number in range(1, nodes + 1)]
        self.cpus, self.gpus, self.memory = cpus, gpus, memory
        self.config = self.directory / "etc" / "slurm.conf"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE"))
        }
        self.environment = {**inherited, "SLURM_CONF": str(self.config), "PATH": _PATH}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        command = [sys.executable, __file__, "guard", str(self.directory)]
        command += ["--remove"] * self._temporary
        self._guard = subprocess.Popen(
            command, stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the daemons and waits until the nodes take jobs.

        Raises:
            ClusterError: If programs are missing or a daemon does not come up.
        """
        if missing := missing_programs():
            raise ClusterError(
                f"{', '.join(missing)} not found: run `make slurm-test`."
            )
        if len(str(self.directory)) > _LONGEST_PATH:
            raise ClusterError(
                f"{self.directory} is longer than {_LONGEST_PATH} letters, and SLURM's "
                "sockets in it have to have names of at most 107: take a shorter one."
            )
        if any(_processes(self.config)):
            raise ClusterError(f"A cluster runs in {self.directory} already.")
        self._write_config()
        munge = self.directory / "munge"
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self._launch(
            "munged",
            # By force: a folder for tests is private, and munged wants its socket to
            # be everyone's.
            *("munged", "--foreground", "--force", "--num-threads=1"),
            f"--key-file={key}",
            *(f"--socket={munge}/socket", f"--pid-file={munge}/pid"),
            *(f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        self._wait("munged", (munge / "socket").exists, 60)
        self.start_controller()
        for name in self.node_names:
            self.start_node(name)
        self.wait_for_nodes()

    def _write_config(self) -> None:
        for name in ("etc", "log", "run", "munge", "state", "spool"):
            # What an earlier cluster knew of its jobs would confuse this one's.
            shutil.rmtree(self.directory / name, ignore_errors=True)
            (self.directory / name).mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        listen = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
        try:
            address = socket.gethostbyname(host)
        except OSError:
            address = ""
        if not address.startswith("127."):
            # The daemons bind what the host's name stands for, or else everything.
            address, listen = "127.0.0.1", ""
        with ExitStack() as stack:
            ports = []
            for _ in range(len(self.node_names) + 1):
                listener = stack.enter_context(socket.socket())
                listener.bind(("127.0.0.1", 0))
                ports.append(listener.getsockname()[1])
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} "
            f"CPUs={self.cpus} RealMemory={self.memory}{gres}"
            for name, port in zip(self.node_names, ports[1:], strict=True)
        ]
        self.config.write_text(
            _CONFIG.format(
                host=host,
                address=address,
                port=ports[0],
                user=getpass.getuser(),
                directory=self.directory,
                listen=listen,
                # Numbers that no earlier cluster used: submitit would take the
                # results of an earlier job in the same folder for this one's.
                first_job=int(time.time()) % 6_000_000 * 10 + 1,
                nodes="\n".join(nodes),
            )
        )
        devices = ",".join(f"/dev/{device}" for device in _DEVICES[: self.gpus])
        lines = [f"NodeName={name} Name=gpu File={devices}" for name in self.node_names]
        (self.config.parent / "gres.conf").write_text(
            "\n".join(lines if self.gpus else []) + "\n"
        )

    def _launch(self, name: str, *command: str) -> None:
        with (self.directory / "log" / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.directory / "log",
                start_new_session=True,
            )

    def start_controller(self) -> None:
        """Starts slurmctld, which takes up what it had saved."""
        self._launch("slurmctld", "slurmctld", "-D", "-f", str(self.config))
        self._wait(
            "slurmctld", lambda: "is UP" in self.run("scontrol", "ping").stdout, 60
        )

    def kill_controller(self) -> None:
        """Kills slurmctld without warning."""
        self._kill("slurmctld")

    def start_node(self, name: str) -> None:
        """Starts the slurmd of a node."""
        (self.directory / "spool" / name).mkdir(exist_ok=True)
        self._launch(f"slurmd.{name}", "slurmd", "-D", "-N", name)

    def kill_node(self, name: str, with_jobs: bool = False) -> None:
        """Kills the slurmd of a node without warning.

        Args:
            name:
                The node.
            with_jobs:
                Whether the jobs' processes on the node go with it, as in a power cut.
                Otherwise they go on, and nobody looks after them.
        """
        self._kill(f"slurmd.{name}")
        if not with_jobs:
            return
        tasks = [
            pid
            for pid, variables in _processes(self.config)
            if variables.get("SLURMD_NODENAME") == name and _name(pid) != "slurmstepd"
        ]
        # Those who would report the end of the others go first.
        parents = {_parent(pid) for pid in tasks}
        for pid in [pid for pid in parents if _name(pid) == "slurmstepd"] + tasks:
            _signal(pid, signal.SIGKILL)

    def _kill(self, daemon: str) -> None:
        process = self._daemons.pop(daemon)
        process.kill()
        process.wait()

    def wait_for_nodes(self) -> None:
        """Waits until all nodes take jobs."""
        usable = {"idle", "mixed", "allocated", "completing"}

        def ready() -> bool:
            found = self.run("sinfo", "--noheader", "-N", "-p", "main", "-o", "%N %T")
            lines = [line.split() for line in found.stdout.splitlines()]
            up = {line[0] for line in lines if len(line) == 2 and line[1] in usable}
            return up == set(self.node_names)

        self._wait("the nodes", ready, 120)

    def _wait(self, what: str, done: Callable[[], bool], seconds: float) -> None:
        def checked() -> bool:
            self._check_daemons()
            return done()

        try:
            _wait_for(what, seconds, checked)
        except ClusterError as error:
            logs = sorted((self.directory / "log").iterdir())
            ends = [f"{log.name}: {log.read_text()[-1000:]}" for log in logs]
            raise ClusterError("\n".join([str(error), *ends])) from None

    def _check_daemons(self) -> None:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                raise ClusterError(f"{name} ended with code {daemon.returncode}.")

    def run(
        self, *command: str, check: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the cluster and returns what it said."""
        return subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=check,
        )

    def jobs(self) -> dict[str, str]:
        """Returns the states of all jobs, also of those that have ended, by number."""
        found = self.run(
            "squeue", "--noheader", "--array", "--states=all", "-o", "%i %T", check=True
        )
        return dict(line.split() for line in found.stdout.splitlines())

    def job_field(self, job: str, field: str) -> str:
        """Returns what `scontrol show job` says, for example of field 'Restarts'."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job, check=True)
        fields = dict(
            part.split("=", 1) for part in shown.stdout.split() if "=" in part
        )
        return fields[field]

    def processes(self, job: str) -> list[int]:
        """Returns the ids of a job's processes on all nodes, SLURM's own left out."""
        return [
            pid
            for pid, variables in _processes(self.config)
            if variables.get("SLURM_JOB_ID") == job and _name(pid) != "slurmstepd"
        ]

    def stop(self) -> None:
        """Kills all jobs and ends the daemons. Does no harm if they are gone."""
        # The controller first, that it starts nothing anew; then the nodes' daemons.
        names = ("slurmctld", "slurmscriptd", "slurmd", "slurmstepd", None, "munged")
        for wanted in names:
            for pid, _ in _processes(self.config):
                if wanted is None or _name(pid) == wanted:
                    _signal(pid, signal.SIGKILL)
        for daemon in self._daemons.values():
            daemon.wait(60)
        self._daemons.clear()
        _wait_for("the end", 60, lambda: not any(_processes(self.config)))
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait(60)
            self._guard = None
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)


def _processes(config: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the daemons of a cluster and its jobs' processes, and their variables.

    Not what a user does with the cluster: a shell, sbatch, this program.
    """
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            text = (entry / "environ").read_bytes().decode(errors="replace")
            zombie = ") Z " in (entry / "stat").read_text()
        except OSError:
            continue
        variables = dict(part.split("=", 1) for part in text.split("\0") if "=" in part)
        if zombie or variables.get("SLURM_CONF") != str(config):
            continue
        daemon = _name(int(entry.name)).startswith(("slurm", "munged"))
        if daemon or "SLURM_JOB_ID" in variables:
            yield int(entry.name), variables


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        # pid (name) state parent ...; the name may hold anything.
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def _signal(pid: int, signum: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signum)


def _wait_for(what: str, seconds: float, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise ClusterError(f"Waited {seconds:.0f} s for {what}.")
        time.sleep(0.05)


def _guard(cluster: Cluster, remove: bool) -> None:
    """Waits until the process that started it is gone, and cleans up."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    sys.stdin.read()
    cluster.stop()
    if remove:
        shutil.rmtree(cluster.directory, ignore_errors=True)


def main() -> None:
    """Starts or stops a cluster from the shell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install")
    for name in ("start", "stop", "guard"):
        command = commands.add_parser(name)
        command.add_argument("directory", type=Path)
        if name == "start":
            command.add_argument("--nodes", type=int, default=2)
            command.add_argument("--cpus", type=int, default=2)
            command.add_argument("--gpus", type=int, default=2)
        if name == "guard":
            command.add_argument("--remove", action="store_true")
    arguments = vars(parser.parse_args())
    command = arguments.pop("command")
    if command == "install":
        try:
            install()
        except ClusterError as error:
            sys.exit(f"error: {error}")
        return
    remove = arguments.pop("remove", False)
    cluster = Cluster(**arguments)
    if command == "stop":
        cluster.stop()
    elif command == "guard":
        _guard(cluster, remove)
    else:
        try:
            cluster.start()
        except ClusterError as error:
            cluster.stop()
            sys.exit(f"error: {error}")
        for name in ("SLURM_CONF", "PATH"):
            print(f"export {name}='{cluster.environment[name]}'")


if __name__ == "__main__":
    main()
