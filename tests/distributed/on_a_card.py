"""What to run on a machine with a card: ``python tests/distributed/on_a_card.py``, some 90 seconds the first time.

It runs NCCL itself on one rank, checks whether NCCL lets two ranks share a card, and runs two and three ranks that
share it through the stand-in. All run at once, each with a time limit. It exits with 1 if any of them fails.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIMIT = 150
JOBS = [
    ("NCCL of one rank", 1, "on_nccl"),
    ("NCCL of two ranks", 2, "on_nccl"),
    ("the bits, three ranks", 3, "on_devices", "bits"),
    ("what a step is told, two ranks", 2, "on_devices", "told", "zeros", "streams", "behind"),
    ("files and refusals, two ranks", 2, "on_devices", "refused", "fails", "connects", "files"),
    ("one rank", 1, "on_devices", "one_rank"),
]


def main():
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False).stdout
    options = []
    if "Open MPI" in version or "OpenRTE" in version or "PRTE" in version:
        options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    paths = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NUMBA_NUM_THREADS": "2", "NCCL_DEBUG": "WARN"}
    ours |= {"MPIEXEC_TIMEOUT": str(LIMIT)}
    begin, running = time.monotonic(), []
    for title, ranks, program, *names in JOBS:
        command = [mpiexec, *options, "-n", str(ranks), sys.executable, "-m", "mpi4py"]
        process = subprocess.Popen(
            [*command, str(HERE / "programs" / f"{program}.py"), *names],
            env={**os.environ, **ours},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append((title, process))
    failed = 0
    for title, process in running:
        try:
            out, _ = process.communicate(timeout=max(1, LIMIT + 10 - (time.monotonic() - begin)))
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
        failed += process.returncode != 0
        print(f"== {title}: {'ok' if process.returncode == 0 else f'FAILED ({process.returncode})'}", end=" ")
        print(f"within {time.monotonic() - begin:.0f} s\n{out[-3000:]}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
