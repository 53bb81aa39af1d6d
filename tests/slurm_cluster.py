"""A real Slurm of two nodes on this machine, as root, with Debian's packages; all it needs is in a temporary folder.

python -m tests.slurm_cluster COMMAND...  runs a command whose `sbatch`, `srun`, `squeue` talk to such a cluster
python -m tests.slurm_cluster --show      prints what somebody sees who submits the job of chapter 8, and an urgent one
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from pathlib import Path

from ddp_tutorial.show.notebook import written_file
from tests.ranks import DDP, NOTEBOOKS, RESILIENT, SINGLE, data_gen, environment

NODES = ("node1", "node2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PACKAGES = "slurmctld slurmd slurm-client munge"
# Whatever this machine is called: for the page's job, for torchrun (instead of its flag --local-addr) and for gloo.
ADDRESSES = {"FIRST_HOST": "127.0.0.1", "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
LIMIT = 60.0  # seconds: for a hang, more than ten times what a daemon's start and its end take
GRACE = 60  # seconds that a job in the partition "normal" has to make room for one in "urgent"
# A requeued job waits until its credential has expired: two minutes, if nothing else is said. The names of the nodes do
# not resolve: both are this machine.
CONFIG = """
ClusterName=lesson
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def missing() -> str | None:
    """Why no cluster can be started here, in one line; None if it can."""
    if os.getuid() != 0:
        return "a Slurm of one's own needs root"
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=path())]:
        return f"no {absent[0]} here: apt-get install {PACKAGES}"
    return None


def path() -> str:
    """PATH with this Python's folder first, for `torchrun`, and the daemons' last."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"))


class Cluster:
    """Two nodes of two CPUs each. At the end of the `with` block every process that it or a job has started is ended.

    Raises `RuntimeError` if it does not start.
    """

    def __enter__(self):
        if reason := missing():
            raise RuntimeError(reason)
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm_")))
            # Slurm gives SLURM_CONF to each job: what has it is ours.
            ours = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path()}
            self.env = environment(str(self.folder)) | ADDRESSES | ours
            self.daemons = []
            stack.callback(self._end)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._stack.close()

    def _start(self) -> None:
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        with ExitStack() as stack:  # all at once, so that they differ
            sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            ports = [s.getsockname()[1] for s in sockets]
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, ports=ports, grace=GRACE))
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        # --force: else it refuses a folder that others may write to, such as /tmp
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={self.folder}/munge.{v}" for k, v in files.items()))
        self.until((self.folder / "munge.socket").exists, "munged does not listen")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self.until(lambda: self.ask("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], "the nodes are not ready")

    def _daemon(self, *command: str) -> None:
        log = self.folder / f"{command[0]}.{len(self.daemons)}.log"
        options = {"env": self.env, "start_new_session": True}  # a Ctrl-C is for us, who then end them in order
        guarded = ("setpriv", "--pdeathsig", "TERM", *command)  # should we be killed
        with log.open("w") as file:
            self.daemons.append(subprocess.Popen(guarded, stdout=file, stderr=subprocess.STDOUT, **options))

    def _end(self) -> None:
        """Jobs first: a daemon that is asked to stop leaves them alive."""
        with suppress(Exception):
            self.ask("scancel", "--full", "--signal=KILL", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        with suppress(subprocess.TimeoutExpired):
            for daemon in self.daemons:
                daemon.wait(10)
        deadline = time.monotonic() + LIMIT
        while (pids := self.processes()) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for daemon in self.daemons:
            daemon.wait()

    def processes(self) -> list[int]:
        """Those that run and have been started by this cluster, its jobs' among them."""
        mark, found = f"SLURM_CONF={self.env['SLURM_CONF']}".encode(), []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended
                if mark in file.read_bytes().split(b"\0"):
                    found.append(int(file.parent.name))
        return found

    def ask(self, *command: str, **options) -> str:
        """What a command of Slurm's prints. Raises `subprocess.CalledProcessError`."""
        options = {"env": self.env, "text": True, "timeout": LIMIT} | options
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, **options).stdout

    def until(self, condition: Callable[[], object], otherwise: str, limit: float = LIMIT):
        """What `condition` returns, once it is true. Raises `RuntimeError` after `limit` seconds, with the logs."""
        deadline = time.monotonic() + limit
        while True:
            with suppress(subprocess.CalledProcessError):  # the controller does not answer yet
                if value := condition():
                    return value
            if time.monotonic() > deadline:
                logs = (f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))
                raise RuntimeError("\n".join((f"{otherwise} after {limit:.0f} s", *logs)))
            time.sleep(0.1)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by its names: JobState, Restarts, ExitCode, ..."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def submit(self, *command: str | Path, folder: Path) -> str:
        """The number of the job that `sbatch command` puts in the queue. It is to run in `folder`."""
        return self.ask("sbatch", "--parsable", *map(str, command), cwd=folder).strip()


def workplace(folder: Path) -> Path:
    """Put into `folder` what chapter 8 submits, the scripts, and the digits in `data/digits`."""
    for name in ("ddp_short.sbatch", "ddp_job.sbatch", "srun_alone.sbatch"):
        (folder / name).write_text(written_file(NOTEBOOKS / "08_go_multi_node.ipynb", name))
    for script in (SINGLE, DDP, RESILIENT):
        shutil.copy(script, folder)
    assert data_gen("digits", "--out", folder / "data" / "digits") == 0
    return folder


def show(cluster: Cluster, folder: Path) -> None:
    """Print commands and what they print, but for `hidden` flags, as the job goes from one state to the next."""

    def run(command: str, *hidden: str) -> str:
        print(f"$ {command}")
        print(text := cluster.ask("bash", "-c", " ".join((command, *hidden)), cwd=folder), flush=True)
        return text

    def states() -> list[str]:
        return [cluster.job(number)["JobState"] for number in (job, urgent)]

    queue = 'squeue --format="%.5i %.9P %.8j %.10T %.5D %R"'
    job = run("sbatch ddp_job.sbatch --data-dir data/digits --epochs 100 --batch-size 64").split()[-1]
    cluster.until((folder / f"runs/job_{job}/history.jsonl").exists, "no epoch", LIMIT * 5)
    run(queue)
    urgent = 'sbatch --partition=urgent --nodes=2 --job-name=urgent --wrap "sleep 4"'
    urgent = run(urgent, "--output=/dev/null").split()[-1]
    for expected in (["PENDING", "RUNNING"], ["RUNNING", "COMPLETED"]):
        cluster.until(lambda wanted=expected: states() == wanted, f"not {expected}", LIMIT * 5)
        run(queue)
    cluster.until(lambda: states()[0] not in ("RUNNING", "COMPLETING"), "no end", LIMIT * 5)
    run(f'grep -E "cpu:|^epoch|going on|stopped" ddp-{job}.log')
    run(f'scontrol show job {job} | grep -o -E "JobState=\\w+|Restarts=\\w+|ExitCode=\\S+"')


def main() -> int:
    if reason := missing():
        sys.exit(reason)
    with Cluster() as cluster:
        if sys.argv[1:] != ["--show"]:
            return subprocess.run(sys.argv[1:] or ["sinfo"], env=cluster.env).returncode
        with tempfile.TemporaryDirectory() as folder:
            with redirect_stdout(sys.stderr):
                workplace(Path(folder))
            show(cluster, Path(folder))
        return 0


if __name__ == "__main__":
    sys.exit(main())
