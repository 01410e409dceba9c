"""A private SLURM of two nodes on this machine: munged, slurmctld and two slurmd, of the installed packages, in a folder of their own.

Partition "low" can be preempted by "high", which requeues its jobs; "grace" too, after 30 seconds of grace. Both nodes are in all three.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge"  # Debian's and Ubuntu's names
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
KILL_WAIT = 20  # seconds between SIGTERM and SIGKILL

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait}
OverTimeLimit=0
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1
PartitionName=grace Nodes=n1,n2 PriorityTier=1 GraceTime=30
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start it in `folder`, which must be new, and give the environment in which SLURM's commands find it. As root only.

    However the block ends, no daemon and no job is left.
    """
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    folder.mkdir(mode=0o755)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, host=socket.gethostname(), user=getpass.getuser(), ports=ports, kill_wait=KILL_WAIT)
    )
    munge = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munge += [f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"]
    daemons = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does, it comes to the end of this function

    def start(*command: str) -> None:
        # Sessions of their own: a Ctrl-C is for pytest alone, which then ends them in the right order.
        with open(folder / "daemons.log", "a") as log:
            daemons.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            )

    def ask(*command: str) -> str:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30).stdout

    try:
        start(*munge)
        wait_for(lambda: (folder / "munge.socket").exists(), 20, "munged does not start")
        start("slurmctld", "-D")
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node)
        wait_for(lambda: ask("sinfo", "--noheader", "--partition=low", "--format=%T %D").split() == ["idle", "2"], 60, "no two nodes")
        yield environment
    finally:
        try:
            with contextlib.suppress(TimeoutError, subprocess.TimeoutExpired):
                ask("scancel", "--user", getpass.getuser())
                wait_for(lambda: not ask("squeue", "--noheader"), KILL_WAIT + 20, "jobs are left")
        finally:
            for daemon in reversed(daemons):  # munged last: the others need it to end
                daemon.terminate()
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            signal.signal(signal.SIGTERM, before)


def wait_for(condition, seconds: float, complaint: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(complaint)
        time.sleep(0.2)


if __name__ == "__main__":  # by hand: python tests/slurm/cluster.py NEW_FOLDER
    with contextlib.suppress(KeyboardInterrupt), slurm(Path(sys.argv[1])):
        # Its nodes' names resolve nowhere.
        print(f"export SLURM_CONF={sys.argv[1]}/slurm.conf MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo; end it with Ctrl-C", flush=True)
        signal.pause()
