"""A real Slurm on one machine: slurmctld on a login host, and slurmd on nodes with networks and disks of their own. Nothing outside its folder is touched."""

import functools
import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.slurm.hosts import Hosts, why_not

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
DAEMONS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
GPUS, CPUS, MEMORY_MB = 8, 16, 64_000  # of each node, on paper

# What differs from Slurm's defaults makes it quick, quiet or patient with a busy machine: a requeued job is held for cred_expire, KillWait is what a job has to end,
# and so is OverTimeLimit (minutes).
# The second partition takes nodes from the first.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=login({login})
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/logs/slurmctld.log
SlurmdLogFile={folder}/logs/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MessageTimeout=100
SlurmdTimeout=300
SlurmctldTimeout=300
BatchStartTimeout=100
KillWait=120
OverTimeLimit=60
MinJobAge=3600
GresTypes=gpu
NodeName={nodes} CPUs={cpus} SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=low Nodes={nodes} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=600
PartitionName=high Nodes={nodes} MaxTime=INFINITE PriorityTier=10 PreemptMode=off
"""


@functools.cache
def why_no_cluster() -> str | None:
    """The reason why no Slurm can be started here, after an attempt to install it; None if it can."""
    if reason := why_not():
        return reason
    if not Path("/sys/fs/cgroup").is_dir():
        return "slurmd needs /sys/fs/cgroup"
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    if _missing():
        if shutil.which("apt-get") is None:
            return f"{_missing()} is not installed, and there is no apt-get to install it with"
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(command, env=quiet, capture_output=True, text=True)
            if done.returncode:
                return f"Slurm cannot be installed: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
    return f"{_missing()} is not installed" if _missing() else None


def _missing() -> str | None:
    return next((program for program in DAEMONS if shutil.which(program) is None), None)


class Cluster:
    """Two nodes by default, with so many GPUs on paper; partition ``high`` pre-empts ``low``, the default one."""

    def __init__(self, folder: Path, num_nodes: int = 2):
        self.folder = folder
        names = [f"node{number}" for number in range(num_nodes)]
        for part in ("logs", "state", "munge", *(f"spool/{name}" for name in names)):
            (folder / part).mkdir(parents=True)
        gpu_files = f"/dev/tty[1-{GPUS}]"  # any devices will do: Slurm counts them
        (folder / "gres.conf").write_text(f"NodeName=node[0-{num_nodes - 1}] Name=gpu File={gpu_files}\n")
        settings = folder / "slurm.conf"
        self.hosts = Hosts(folder, names, dict(os.environ) | {"SLURM_CONF": str(settings)})
        self.login, self.nodes = self.hosts.all["login"], [self.hosts.all[name] for name in names]
        settings.write_text(
            CONFIGURATION.format(folder=folder, login=self.login.address, nodes=f"node[0-{num_nodes - 1}]", cpus=CPUS, gpus=GPUS, memory=MEMORY_MB)
        )
        try:
            self._start_munge()
            self.login.start("slurmctld", "-D", "-i", "-f", settings, log=folder / "logs/slurmctld.out")
            for node in self.nodes:
                self.start_slurmd(node)
            self._until(lambda: self.idle_nodes() == num_nodes, 60, "the nodes are not idle")
        except BaseException:
            self.close()
            raise

    def _start_munge(self) -> None:
        """Which proves to Slurm's daemons who asks; with a key, and a socket, of this cluster alone."""
        folder = self.folder / "munge"
        folder.chmod(0o700)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}={folder / part}" for name, part in (("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
        self.login.start("munged", "--foreground", "--force", *files, log=self.folder / "logs/munged.out")
        self._until((folder / "socket").exists, 20, "munged does not start")

    def start_slurmd(self, node) -> None:
        node.start("slurmd", "-D", "-N", node.name, "-f", self.folder / "slurm.conf", log=self.folder / f"logs/slurmd.{node.name}.out")

    def idle_nodes(self) -> int:
        counted = self.login.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D", check=False)
        return int(counted.stdout.strip() or 0) if counted.returncode == 0 else 0

    def submit(self, *arguments: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> int:
        """``sbatch`` with these arguments in ``cwd``; the job's number."""
        said = self.login.run("sbatch", "--parsable", *arguments, cwd=cwd, environment=environment).stdout
        return int(said.strip().split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What Slurm knows of a job: ``JobState``, ``Restarts``, ``ExitCode``, ..."""
        text = self.login.run("scontrol", "--oneliner", "show", "job", str(number)).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, number: int | str) -> str:
        return self.job(number)["JobState"]

    def wait(self, number: int | str, *states: str, seconds: float = 240, log: Path | None = None) -> dict[str, str]:
        """Until a job is in one of these states; AssertionError with the end of its log when it is not in time."""

        def there() -> bool:
            return self.state(number) in states

        self._until(there, seconds, lambda: f"job {number} is {self.state(number)}, not {' or '.join(states)}\n{log.read_text(errors='replace')[-6000:] if log and log.exists() else ''}")
        return self.job(number)

    def _until(self, condition, seconds: float, otherwise) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(otherwise() if callable(otherwise) else f"{otherwise}:\n{self._daemons_say()}")
            time.sleep(0.1)

    def _daemons_say(self) -> str:
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-1000:]}" for file in sorted((self.folder / "logs").iterdir()))

    def close(self) -> None:
        """End every process of the cluster, running jobs included; the folder stays."""
        self.hosts.close()
