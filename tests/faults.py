"""A process that runs the scripts in children and lets things go wrong at their k-th write.

    python tests/faults.py      reads one request a line on stdin, answers one line on stdout, both JSON

Whatever changes the disk is counted: writes, syncs, renames, deletions. At call number `at` the child is killed
with SIGKILL (a write halfway through), gets another signal, or is told that the disk is full. Children are forked
from a process that has everything imported, so that hundreds of runs take seconds.
"""

import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

COUNTED = [
    (os, "pwrite"),
    (os, "ftruncate"),
    (os, "fsync"),
    (os, "rename"),
    (os, "unlink"),
    (os, "rmdir"),
    (os, "mkdir"),
    (shutil, "copyfile"),
    (Path, "write_text"),
]


class Faults:
    """Counts the calls of one run and strikes at the one asked for."""

    def __init__(self, request: dict):
        self.kind, self.at, self.target = request.get("kind"), request.get("at", 0), request.get("target")
        self.calls: list[str] = []
        self.lock = threading.Lock()
        for module, name in COUNTED:
            setattr(module, name, self.counting(name, getattr(module, name)))

    def counting(self, name: str, real):
        """`real`, counted; nothing is made durable, since a killed process loses nothing that it wrote."""

        def call(*arguments, **options):
            with self.lock:  # or two threads at once might both miss their number
                self.calls.append(f"{name} {arguments[1] if name == 'rename' else arguments[0]}")
                number = len(self.calls)
            if number == self.at:
                self.strike(name, real, arguments)
            return None if name == "fsync" else real(*arguments, **options)

        return call

    def strike(self, name: str, real, arguments) -> None:
        """Do what was asked for, in the middle of the call."""
        if self.kind == "full" and name not in ("unlink", "rmdir", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.kind == "truncate":
            os.truncate(self.target, os.path.getsize(self.target) // 2)
        if self.kind == "remove":
            os.remove(self.target)
        if self.kind and self.kind.startswith("SIG"):
            if name == "pwrite":  # half of a write
                real(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2], arguments[2])
            os.kill(os.getpid(), getattr(signal, self.kind))


def child(request: dict, folder: str) -> None:
    """Run a script as __main__ would; never returns."""
    import checkpoints

    import common.exits

    sys.stderr = open(Path(folder) / "stderr", "w")  # noqa: SIM115
    sys.stdout = open(Path(folder) / "stdout", "w")  # noqa: SIM115
    faults, status = Faults(request), 0
    try:
        common.exits.run(lambda: checkpoints.run(request["script"], *request["arguments"]))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    finally:
        sys.stderr.flush()
        with open(Path(folder) / "calls", "w") as file:
            json.dump(faults.calls, file)
        os._exit(status)


def answer(request: dict) -> dict:
    """Fork a child for the request -> its exit status (negative: a signal), calls and last words.

    With "leave" a child that has stopped itself (SIGSTOP) is left as it is and its number returned.
    """
    folder = tempfile.mkdtemp()
    number = os.fork()
    if number == 0:
        child(request, folder)
    _, status = os.waitpid(number, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return {"stopped": number}
    status, stderr, calls = os.waitstatus_to_exitcode(status), Path(folder, "stderr"), Path(folder, "calls")
    found = {
        "status": status,
        "stderr": stderr.read_text() if stderr.exists() else "",
        "calls": json.loads(calls.read_text()) if calls.exists() else [],
    }
    shutil.rmtree(folder)
    return found


def resume(number: int) -> dict:
    """Let a stopped child go on to its end."""
    os.kill(number, signal.SIGCONT)
    return {"status": os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])}


def main() -> None:
    import checkpoints
    from tqdm import tqdm

    import common.pruners.kernels
    import common.shards.buffers

    # Small models, too, take several requests of several blocks.
    common.shards.buffers.READ = common.shards.buffers.WRITE = 2 * common.shards.buffers.PAGE
    common.pruners.kernels.BLOCK = 2048
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background deaf to it
    tqdm.monitor_interval = 0  # no thread of its own, which a fork would not take along
    sys.stdout, answers = sys.stderr, sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        if "resume" in request:
            found = resume(request["resume"])
        elif request.get("here"):  # in this process: compiled code is loaded once for all children
            checkpoints.run(request["script"], *request["arguments"])
            found = {}
        else:
            found = answer(request)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
