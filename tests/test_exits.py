"""How a script ends when nobody reads what it prints: the work is done and published, and the print is what fails."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import files, run, state, write
from conftest import ROOT

from common.exits import Stream

LOST = "error: not everything could be printed ({}); what was to be written is written"


@pytest.fixture
def job(tmp_path) -> tuple[list, Path]:
    """(a convert command, where its output goes)"""
    model = write(tmp_path / "m", state())
    out = tmp_path / "out"
    return [sys.executable, str(ROOT / "convert_dtype.py"), "--model_path", str(model), "--save_path", str(out)], out


def shell(command: list, ending: str, **environment) -> subprocess.CompletedProcess:
    """The command with a shell's ending: `| true`, `>&-`; bash's own status is the script's."""
    text = f"set -o pipefail; {' '.join(command)} {ending}"
    return subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "ending, reason",
    [
        ("| true", "Broken pipe"),
        (">&-", "it is closed"),
        ("> /dev/full", "No space left on device"),
        ("| (sleep 0.1; exec true)", "Broken pipe"),
    ],
)
def test_stdout_is_gone(job, ending, reason, unbuffered):
    """Published all the same; exit status 1 and one line."""
    command, out = job
    done = shell(command, ending, PYTHONUNBUFFERED=unbuffered)
    assert (out / "model.safetensors").is_file() and not (out / ".run").exists()
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and "B/s]" not in line]
    assert (done.returncode, lines) == (1, [LOST.format(reason)])


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["2>&-", "2> /dev/full", "2>&- >&- <&-"])
def test_stderr_is_gone(job, ending):
    """The progress bar has nowhere to go, and no checkpoint gets it in place of a terminal."""
    command, out = job
    done = shell(command, ending)
    run("convert", "--model_path", command[3], "--save_path", out.with_name("other"))
    assert files(out) == files(out.with_name("other"))
    assert done.returncode == (1 if ">&- <&-" in ending else 0)


@pytest.mark.slow
def test_help_into_a_pipe_that_closes(job):
    done = shell([*job[0][:2], "--help"], "| sleep 0", PYTHONUNBUFFERED="1")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_an_error_into_a_closed_pipe_stays_an_error(job):
    command, out = job
    done = shell([*command[:3], "/nowhere", *command[4:]], "| true")
    assert done.returncode == 1 and "no such directory" in done.stderr and not out.exists()


PAUSED = """
import signal, sys, time
sys.path.insert(0, {root!r})
from common.exits import run
def main():
    print("ready", flush=True)
    time.sleep(60)
run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_a_dropped_connection(tmp_path, ignored):
    """SIGHUP unwinds as SIGTERM does; under nohup, which has it ignored, it does nothing."""
    script = tmp_path / "s.py"
    script.write_text(PAUSED.format(root=str(ROOT)))
    disposition = signal.SIG_IGN if ignored else signal.SIG_DFL  # also where the tests themselves run under nohup
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, disposition),
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    if ignored:
        time.sleep(0.3)
        assert process.poll() is None
        process.terminate()
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == (143 if ignored else 129)
    assert stderr.startswith("\ninterrupted; nothing half-written was published.")


@pytest.mark.slow
def test_a_terminal_that_closes(job):
    """The far end of the terminal goes while the job runs on (disown): EIO at each print, and the output is whole."""
    command, out = job
    here, there = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=there,
        stdout=there,
        stderr=there,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    os.close(there)
    os.close(here)
    assert process.wait(timeout=60) == 1
    assert (out / "config.json").is_file()


def test_a_stream_remembers_its_failure():
    """Nothing more is tried after the first: a pipe that closed does not open again."""

    class Broken:
        calls = 0

        def write(self, _text):
            self.calls += 1
            raise BrokenPipeError(32, "Broken pipe")

    broken = Broken()
    stream = Stream(broken)
    assert print("a", file=stream) is None and stream.write("abc") == 3 and stream.flush() is None
    assert (stream.failure, broken.calls) == ("Broken pipe", 1)
    assert Stream(sys.__stdout__).encoding == sys.__stdout__.encoding


def test_nothing_is_searched_for_garbage_on_leaving():
    """What was imported, 400,000 objects after torch and transformers, is in no generation that is searched."""
    program = "import atexit, gc\nfrom common.exits import run\natexit.register(lambda: print(len(gc.get_objects())))\n"
    found = subprocess.run(
        [sys.executable, "-c", program + "run(lambda: None)"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(found.stdout) < 1000
