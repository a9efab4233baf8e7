"""Systems that lack what Linux has: seen by taking the attributes away before a script starts. The same bytes."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import chain, files, prune_arguments, run, state, write
from conftest import ROOT

from common.shards import systems

MACOS = """
import mmap, os, ctypes
for module, names in ((os, {missing!r}.split()), (mmap, ["MADV_HUGEPAGE", "MAP_POPULATE"])):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""
LACKS = "sched_getaffinity sched_setaffinity O_DIRECT posix_fadvise copy_file_range " + " ".join(
    name for name in dir(os) if name.startswith("RWF_")
)
NO_MINCORE = """
class Libc:
    def __init__(self, name, *rest, real=ctypes.CDLL, **more):
        self.real = real(name, *rest, **more)
    def __getattr__(self, name):
        if name in ("mincore", "syscall"):
            raise AttributeError(name)
        return getattr(self.real, name)
ctypes.CDLL = Libc
"""
NO_FCNTL = "import sys; sys.modules['fcntl'] = None\n"
SYSTEMS = {
    "macOS": MACOS.format(missing=LACKS),
    "macOS before 11": MACOS.format(missing=LACKS + " preadv pwritev"),
    "no mincore, no fcntl": MACOS.format(missing=LACKS) + NO_MINCORE + NO_FCNTL,
}
START = (
    "\nimport runpy, sys\nscript = sys.argv.pop(1)\nsys.argv[0] = script\nrunpy.run_path(script, run_name='__main__')\n"
)


def in_subprocess(prelude: str, script: str, *arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    """A script in a Python that `prelude` has prepared."""
    command = [sys.executable, "-c", prelude + START, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300, cwd=cwd
    )


@pytest.fixture(scope="module")
def linux(tmp_path_factory) -> Path:
    """base, a, b, va, vb, and pa and pb as Linux writes them."""
    folder = chain(tmp_path_factory.mktemp("platforms"))
    run("prune", *prune_arguments(folder))
    return folder


def prune_to(folder: Path, out: Path) -> list:
    return [str(a).replace(f"{folder}/p", f"{out}/p") for a in prune_arguments(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_that_lack_calls(linux, tmp_path, system):
    """convert and prune, through the page cache."""
    done = in_subprocess(SYSTEMS[system], "prune_task_vector_7b.py", *prune_to(linux, tmp_path))
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "pa") == files(linux / "pa") and files(tmp_path / "pb") == files(linux / "pb")
    assert ("has no locks" in done.stderr) == ("fcntl" in system)
    done = in_subprocess(
        SYSTEMS[system], "convert_dtype.py", "--model_path", linux / "a", "--save_path", tmp_path / "c"
    )
    assert done.returncode == 0 and (tmp_path / "c" / "model.safetensors").is_file(), done.stderr


def test_windows_points_to_wsl():
    """One line, whatever else is missing there."""
    done = in_subprocess("import sys; sys.platform = 'win32'", "convert_dtype.py")
    assert done.returncode == 1
    assert done.stderr == (
        "error: Windows is not supported as it is; install WSL (wsl --install) and run the same command in it\n"
    )


@pytest.mark.slow
def test_other_processors_give_the_same_bits(linux, tmp_path):
    """numba told to compile for a processor without AVX-512."""
    cache = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    done = in_subprocess("", "prune_task_vector_7b.py", *prune_to(linux, tmp_path), **cache)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "pa") == files(linux / "pa") and files(tmp_path / "pb") == files(linux / "pb")


@pytest.mark.slow
def test_safe_path(tmp_path):
    """PYTHONSAFEPATH=1 leaves the script's directory out of the path; common/ is found all the same."""
    for script in (
        "convert_dtype.py",
        "extract_task_vector_7b.py",
        "prune_task_vector_7b.py",
        "merge_and_evaluate_7b.py",
    ):
        command = [sys.executable, "-P", str(ROOT / script), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


# Of numba's ways to find a directory for its cache, the one for zip archives: it finds none for an ordinary file.
NO_CACHE = {"NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"}


@pytest.mark.slow
def test_no_place_for_compiled_kernels(linux, tmp_path):
    """A read-only checkout and no home: compiled without a cache, with one line."""
    done = in_subprocess("", "prune_task_vector_7b.py", *prune_to(linux, tmp_path), **NO_CACHE)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "pa") == files(linux / "pa")
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and "set NUMBA_CACHE_DIR to a writable directory" in lines[0]


SAID_BY_THREADS = """
from concurrent.futures import ThreadPoolExecutor
from time import sleep

from tqdm import tqdm

from common.pruners.kernels import compiler

write = tqdm.write
tqdm.write = lambda *args, **options: (sleep(0.1), write(*args, **options))  # time enough for the others to come
with ThreadPoolExecutor(8) as threads:
    for _ in range(8):
        threads.submit(compiler._warn)
"""


@pytest.mark.slow
def test_one_line_from_all_threads():
    """The first kernels are compiled by several threads at once; the line about their cache is one all the same."""
    done = subprocess.run([sys.executable, "-c", SAID_BY_THREADS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr.count("warning: ") == 1, done.stderr


# --- file systems ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def warned():
    """Each test is a process of its own to the warnings."""
    systems._warned.clear()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_no_locks(tmp_path, monkeypatch, capsys, code):
    """Lustre and some NFS: the job runs, one line names the path."""

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(systems.fcntl, "flock", flock)
    write(tmp_path / "m", state())
    run("convert", "--model_path", tmp_path / "m", "--save_path", tmp_path / "out")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning: {tmp_path}/out.part/.run/lock: this file system has no locks ({os.strerror(code)}), so nothing "
        "keeps a second job from writing there; run one at a time"
    ]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_no_fsync_of_directories(tmp_path, monkeypatch, capsys, code):
    real, path_of = os.fsync, lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}"))

    def fsync(descriptor):
        if path_of(descriptor).is_dir():
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(systems.os, "fsync", fsync)
    write(tmp_path / "m", state())
    run("convert", "--model_path", tmp_path / "m", "--save_path", tmp_path / "out")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {tmp_path}/out.part")
    assert f"does not confirm that files are on disk ({os.strerror(code)})" in warnings[0]


def test_a_broken_disk_is_no_missing_fsync(tmp_path, monkeypatch):
    def fsync(_descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(systems.os, "fsync", fsync)
    write(tmp_path / "m", state())
    with pytest.raises(OSError, match="Input/output error"):
        run("convert", "--model_path", tmp_path / "m", "--save_path", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_fsync_where_there_is_one(tmp_path, monkeypatch):
    """macOS: F_FULLFSYNC is asked for first, fsync where a disk does not know it."""
    calls = []

    def control(descriptor, command):
        calls.append(command)
        if len(calls) > 1:
            raise OSError(errno.ENOTSUP, "no")

    monkeypatch.setattr(systems.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(systems.fcntl, "fcntl", control)
    monkeypatch.setattr(systems.os, "fsync", lambda _descriptor: calls.append("fsync"))
    with open(tmp_path / "x", "wb") as file:
        systems.make_durable(file.fileno(), tmp_path / "x")
        systems.make_durable(file.fileno(), tmp_path / "x")
    assert calls == [51, 51, "fsync"]
