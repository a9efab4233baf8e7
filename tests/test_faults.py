"""Killed, stopped, out of disk, two at once: nothing half-published, and the same command goes on to the same bytes."""

import json
import os
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from checkpoints import chain, extract, files, prune_arguments, run, write
from conftest import ROOT

from common.shards import sink, stream

pytestmark = pytest.mark.slow  # hundreds of jobs, each killed at another place
SIZE = ["--max_shard_size", "300B"]  # several shards
RESUMES = "free some space and run the same command again: it resumes there"


class Laboratory:
    """tests/faults.py at the other end of a pipe."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("faults.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **request) -> dict:
        request["arguments"] = [str(argument) for argument in request.get("arguments", [])]
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def laboratory():
    found = Laboratory()
    yield found
    found.process.stdin.close()
    found.process.wait()


class Job:
    """One command in one folder: its outputs, what they hold undisturbed, and how many calls it makes."""

    def __init__(self, laboratory: Laboratory, script: str, arguments: list, outputs: list[Path]):
        self.laboratory, self.script, self.arguments, self.outputs = laboratory, script, arguments, outputs
        laboratory.ask(script=script, arguments=arguments, here=True)
        self.whole = {output: files(output) for output in outputs}
        self.clean()
        undisturbed = self.start()
        assert undisturbed["status"] == 0 and self.published() == outputs
        self.calls = undisturbed["calls"]
        self.clean()

    def start(self, **fault) -> dict:
        return self.laboratory.ask(script=self.script, arguments=self.arguments, **fault)

    def clean(self) -> None:
        """Remove the outputs and whatever lies beside them under like names."""
        for output in self.outputs:
            for path in output.parent.glob(output.name + "*"):
                shutil.rmtree(path)

    def published(self) -> list[Path]:
        """The outputs that are there; each must be whole, but for a record of the run that goes at the very end."""
        there = [output for output in self.outputs if output.exists()]
        for output in there:
            held = {name: data for name, data in files(output).items() if not name.startswith(".run/")}
            assert held == self.whole[output]
        return there

    def finish(self) -> None:
        """The same command again: it goes on to the same bytes, or says that all was done; nothing else is left."""
        before, again = self.published(), self.start()
        if again["status"]:
            assert before == self.outputs and again["stderr"].strip().endswith(
                "already there; give --overwrite to replace it, or write elsewhere"
            ), again["stderr"]
        assert self.published() == self.outputs
        assert {output: files(output) for output in self.outputs} == self.whole
        for output in self.outputs:
            assert {path.name for path in output.parent.glob(output.name + "*")} == {output.name}

    def call(self, pattern: str) -> int:
        """The number of the first call like a pattern: call("rename */pa")."""
        return next(i for i, call in enumerate(self.calls, 1) if fnmatch(call, pattern))


def is_deletion(done: dict, at: int) -> bool:
    """Whether call number `at` of a job needed no space, so that a full disk did not strike there."""
    return done["calls"][at - 1].startswith(("unlink", "rmdir", "mkdir"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The chain's inputs, with a tokenizer file, so that there is something to copy."""
    made = chain(tmp_path_factory.mktemp("faults"))
    for name in ("base", "a", "va", "vb"):
        (made / name / "tokenizer.json").write_text("{}")
    return made


@pytest.fixture
def jobs(undisturbed) -> dict[str, Job]:
    """The three commands, their outputs gone."""
    for job in undisturbed.values():
        job.clean()
    return undisturbed


@pytest.fixture(scope="module")
def large(laboratory, tmp_path_factory) -> Job:
    """A prune of tensors of several pages that begin and end within one: most of it is written past the page cache."""
    made, sizes = tmp_path_factory.mktemp("large"), {"first.weight": 20_001, "second.weight": 30_003}
    write(made / "base", {name: torch.linspace(-1, 1, size).half() for name, size in sizes.items()})
    write(made / "a", {name: torch.linspace(1, -1, size).half() for name, size in sizes.items()})
    extract(made / "a", made / "base", made / "v")
    arguments = ["--n", 1, "--m", 4, "--task_vector_paths", made / "v", "--save_directories", made / "p"]
    return Job(laboratory, "prune", [*arguments, "--max_shard_size", "50KB"], [made / "p"])


@pytest.fixture(scope="module")
def undisturbed(laboratory, folder) -> dict[str, Job]:
    two_models = ["--finetuned_model_path", folder / "a", "--base_model_path", folder / "base"]
    return {
        "convert": Job(
            laboratory,
            "convert",
            ["--model_path", folder / "base", "--save_path", folder / "out", *SIZE],
            [folder / "out"],
        ),
        "extract": Job(laboratory, "extract", [*two_models, "--save_path", folder / "vc", *SIZE], [folder / "vc"]),
        "prune": Job(laboratory, "prune", prune_arguments(folder, *SIZE), [folder / "pa", folder / "pb"]),
    }


# --- killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, step", [("convert", 1), ("extract", 4), ("prune", 2)])
def test_kill_at_any_write(jobs, script, step):
    """SIGKILL in the middle of every (second, fourth) call that changes the disk, then the same command again."""
    job = jobs[script]
    assert len(job.calls) > 40
    for at in range(1, len(job.calls) + 1, step):
        assert job.start(kind="SIGKILL", at=at)["status"] == -9, at
        job.finish()
        job.clean()


@pytest.mark.parametrize("kind, status", [("SIGKILL", -9), ("full", 1)])
def test_large_writes(large, kind, status):
    """Killed or out of disk in the middle of every write of a whole request, then the same command again."""
    writes = [i for i, call in enumerate(large.calls, 1) if call.startswith("pwrite")]
    assert len(writes) > 12
    struck = 0
    for at in writes:
        done = large.start(kind=kind, at=at)
        if kind == "full" and is_deletion(done, at):
            large.clean()  # threads take turns as they come: this time it was no write
            continue
        struck += 1
        assert done["status"] == status, done
        assert large.published() == []
        large.finish()
        large.clean()
    assert struck > len(writes) // 2


def test_kill_again_and_again(jobs):
    """Killed at the 60th write of what is left, until it is done: each time it gets further."""
    job, deaths = jobs["prune"], 0
    while job.start(kind="SIGKILL", at=60)["status"] == -9:
        deaths += 1
        assert deaths < 40, "no progress"
        job.published()
    job.finish()
    job.clean()
    assert deaths > 1


def test_kill_between_the_two_renames(jobs):
    """The first output is there and whole, the second is not; the same command publishes the second."""
    job = jobs["prune"]
    at = job.call("rename */pb")
    assert job.start(kind="SIGKILL", at=at)["status"] == -9
    assert job.published() == job.outputs[:1]
    assert job.start()["status"] == 0
    assert {output: files(output) for output in job.outputs} == job.whole
    job.clean()


def test_kill_while_overwriting(jobs):
    """With --overwrite the old or the new output can be had at any moment, whole, under its name or beside it."""
    job = jobs["convert"]
    arguments, job.arguments = job.arguments, [*job.arguments, "--overwrite"]
    deaths, tried = 0, range(1, len(job.calls) + 6)
    for at in tried:
        for output in job.outputs:
            output.mkdir()
            (output / "old").write_text("old")
        died = job.start(kind="SIGKILL", at=at)["status"] == -9
        found = [files(p) for p in job.outputs[0].parent.glob("out*") if not p.name.endswith(".part")]
        found = [{n: d for n, d in held.items() if not n.startswith(".run/")} for held in found]
        whole = job.whole[job.outputs[0]]
        assert {"old": b"old"} in found or whole in found, at
        if died:
            deaths += 1
            job.start()
        assert files(job.outputs[0]) == whole
        job.clean()
    assert deaths >= len(job.calls)  # what replaces an old output makes no fewer calls than what finds none
    job.arguments = arguments


# --- stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, status", [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("script", ["convert", "prune"])
def test_signals(jobs, script, kind, status):
    """The exit status that shells expect, one line, whole shards kept, the same command goes on."""
    job = jobs[script]
    for at in (5, len(job.calls) // 3, len(job.calls) // 2):
        done = job.start(kind=kind, at=at)
        assert done["status"] == status
        assert "Traceback" not in done["stderr"]
        assert done["stderr"].strip().splitlines()[-1] == (
            "interrupted; nothing half-written was published. Run the same command again: a job that writes a "
            "checkpoint resumes at the last complete shard."
        )
        assert job.published() == []
        job.finish()
        job.clean()


@pytest.mark.parametrize("script, step", [("convert", 2), ("prune", 7)])
def test_disk_full(jobs, script, step):
    """No space left, at any write: one line, exit 1, nothing published; with space it goes on."""
    job = jobs[script]
    last = job.call(f"rename */{job.outputs[0].name}")
    struck, tried = 0, range(1, last, step)
    for at in tried:
        done = job.start(kind="full", at=at)
        if is_deletion(done, at):
            assert done["status"] == 0, done  # deleting needs no space: nothing was done to it
            job.clean()
            continue
        struck += 1
        line = done["stderr"].strip().splitlines()[-1]
        assert done["status"] == 1 and line.startswith("error: the disk is full") and line.endswith(RESUMES), line
        assert "Traceback" not in done["stderr"] and job.published() == []
        job.finish()
        job.clean()
    assert struck > len(tried) // 2


ON_A_SMALL_DISK = """
mount -t tmpfs -o size={size} tmpfs {disk} || exit 77
{command} 2> {disk}.first; echo $? > {disk}.status; ls -a {disk} > {disk}.listing
mount -o remount,size=9m {disk}
{command} 2> {disk}.second && cp -r {disk}/. {disk}.copy
"""


def test_a_disk_that_really_fills_up(tmp_path):
    """On a tmpfs with room for the weights and little else; then the same command with more room."""
    folder, disk = tmp_path / "x", tmp_path / "disk"
    write(folder / "base", {"w": torch.linspace(-1, 1, 200_000).half()})
    write(folder / "a", {"w": torch.linspace(1, -1, 200_000).half()})
    extract(folder / "a", folder / "base", folder / "v")
    flags = ["--n", 1, "--m", 4, "--task_vector_paths", folder / "v", "--save_directories"]
    run("prune", *flags, folder / "p")
    disk.mkdir()
    command = " ".join(map(str, [sys.executable, ROOT / "prune_task_vector_7b.py", *flags, disk / "p"]))
    script = ON_A_SMALL_DISK.format(size=400 * 1024, disk=disk, command=command)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if not Path(f"{disk}.status").exists():
        pytest.skip(f"no tmpfs of one's own here: {done.stderr.strip()}")
    assert Path(f"{disk}.status").read_text() == "1\n"
    last = Path(f"{disk}.first").read_text().strip().splitlines()[-1]
    assert last.startswith("error: the disk is full") and last.endswith(RESUMES), last
    assert Path(f"{disk}.listing").read_text().split() == [".", "..", "p.part"]
    assert files(Path(f"{disk}.copy") / "p") == files(folder / "p"), Path(f"{disk}.second").read_text()


def test_an_interrupt_while_threads_start(jobs, monkeypatch):
    """Whatever comes in the middle of starting workers: the sink is abandoned when the last of them has stopped."""
    events, real = [], stream.Worker.finish

    class Interrupted(stream.ThreadPoolExecutor):
        def submit(self, work):
            if events:
                raise KeyboardInterrupt
            events.append("submitted")
            started = super().submit(work)
            while len(events) < 2:
                time.sleep(0.001)
            return started

    def finish(worker, task, records):
        events.append("working")
        time.sleep(0.05)
        real(worker, task, records)
        events.append("done")

    abandon = sink.Sink.abandon
    monkeypatch.setattr(stream, "ThreadPoolExecutor", Interrupted)
    monkeypatch.setattr(stream.Worker, "finish", finish)
    monkeypatch.setattr(sink.Sink, "abandon", lambda self: (events.append("abandoned"), abandon(self)))
    job = jobs["prune"]
    with pytest.raises(KeyboardInterrupt):
        run("prune", *job.arguments)
    assert events[-2:] == ["done", "abandoned"], events
    monkeypatch.undo()
    job.finish()
    job.clean()


# --- others at the same place ---------------------------------------------------------------------


def test_two_at_once(jobs, laboratory):
    """The second is refused and changes nothing; the first ends as if it had been alone."""
    job = jobs["prune"]
    stopped = job.start(kind="SIGSTOP", at=job.call("fsync *"))["stopped"]
    for more in ([], ["--overwrite"]):
        second = laboratory.ask(script="prune", arguments=[*job.arguments, *more])
        assert second["status"] == 1
        assert second["stderr"].strip() == (
            f"error: {job.outputs[0]}.part: another job is writing there; wait for it, or write elsewhere"
        )
    assert laboratory.ask(resume=stopped)["status"] == 0
    assert {output: files(output) for output in job.outputs} == job.whole
    job.clean()


def changed(job: Job, *more) -> dict:
    """The command with other parameters, on what the killed one left."""
    return job.laboratory.ask(script=job.script, arguments=[*job.arguments, *more])


def test_another_command_does_not_go_on(jobs, folder):
    """Other parameters or other inputs: refused, with the difference; --overwrite starts afresh."""
    job = jobs["prune"]
    half = job.call("rename */pa.part/model-00003*")
    for more, difference in (
        (["--n", 2], "n: 1 there, 2 here"),
        (["--no-conflict_aware"], "conflict_aware: True there, False here"),
        (["--rescale"], "rescale: False there, True here"),
    ):
        assert job.start(kind="SIGKILL", at=half)["status"] == -9
        refused = changed(job, *more)
        assert refused["status"] == 1 and refused["stderr"].strip() == (
            f"error: {job.outputs[0]}.part: left by another job ({difference}); finish that job with its own command, "
            "delete the directory, or give --overwrite to start afresh"
        )
        job.finish()
        job.clean()
    assert job.start(kind="SIGKILL", at=half)["status"] == -9
    assert changed(job, "--n", 2, "--overwrite")["status"] == 0
    assert {output: files(output) for output in job.outputs} != job.whole
    job.clean()


def test_changed_inputs_do_not_go_on(jobs, folder):
    """An input file touched in between: its path and both times are in the line."""
    job, path = jobs["prune"], folder / "vb" / "model.safetensors"
    stat = path.stat()
    assert job.start(kind="SIGKILL", at=len(job.calls) // 2)["status"] == -9
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 5))
    refused = job.start()
    assert refused["status"] == 1 and f"left by another job ({path}: [" in refused["stderr"]
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    job.finish()
    job.clean()


@pytest.mark.parametrize("kind", ["truncate", "remove"])
def test_an_input_that_goes_away(jobs, folder, kind):
    """Cut short or removed while it is read: one line that names it; nothing is published."""
    job, path = jobs["convert"], folder / "base" / "model.safetensors"
    kept = path.read_bytes()
    try:
        done = job.start(kind=kind, at=job.call("ftruncate *"), target=str(path))
    finally:
        stat = (folder / "base" / "config.json").stat()
        path.write_bytes(kept)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if kind == "remove" and done["status"] == 0:  # a file that is open already is read to its end: the same bytes
        assert {output: files(output) for output in job.outputs} == job.whole
    else:
        last = done["stderr"].strip().splitlines()[-1]
        assert done["status"] == 1 and str(path) in last and last.startswith("error: "), done["stderr"]
        assert job.published() == []
    job.clean()


# --- what is made durable, and when ---------------------------------------------------------------


def test_everything_is_durable_before_its_name(jobs, folder, monkeypatch):
    """Every file is synced after its last write and before the rename; so are the directories."""
    events = []

    def record(module, name, what):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **kw: (events.append((name, what(*args))), real(*args, **kw))[1]
        )

    def path_of(file, *_):
        return os.readlink(f"/proc/self/fd/{file}")

    record(os, "pwrite", path_of)
    record(os, "fsync", path_of)
    record(os, "rename", lambda source, target: (str(source), str(target)))
    job = jobs["prune"]
    run("prune", *job.arguments)
    monkeypatch.undo()
    renames = {}
    for i, (name, what) in enumerate(events):
        if name == "rename":
            renames[what[1]] = (i, what[0])
    for output in job.outputs:
        published, part = renames[str(output)]
        synced = [what for name, what in events[:published] if name == "fsync"]
        assert part in synced, "the directory"
        for name in job.whole[output]:
            assert f"{part}/{name}" in synced or f"{part}/{name}.tmp" in synced, name
        for shard in (name for name in job.whole[output] if name.endswith(".safetensors")):
            renamed, temporary = renames[f"{part}/{shard}"]
            last_write = max(i for i, event in enumerate(events) if event == ("pwrite", temporary))
            assert ("fsync", temporary) in events[last_write:renamed]
    job.clean()


# --- several processes ----------------------------------------------------------------------------


def test_torchrun_writes_the_same_bytes(jobs):
    """Two processes, one publisher: byte-identical files. (The -- keeps torchrun from taking --n for its own.)"""
    job = jobs["prune"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--",
            ROOT / "prune_task_vector_7b.py",
            *map(str, job.arguments),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote ") == 2
    assert {output: files(output) for output in job.outputs} == job.whole
    job.clean()


ONE_IS_KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from common.exits import run_and_leave
from common.shards import sink
from prune_task_vector_7b import main

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1" and not os.path.exists({flag!r}):
    open({flag!r}, "w").close()
    sink.Sink.finish_tensor = killed
run_and_leave(main)
"""


def test_one_of_several_processes_is_killed(jobs, tmp_path):
    """The run fails, says so and publishes nothing; the same command goes on to the same bytes."""
    job, script = jobs["prune"], tmp_path / "script.py"
    script.write_text(ONE_IS_KILLED.format(root=str(ROOT), flag=str(tmp_path / "flag")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [*command, *map(str, job.arguments)]
    first = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert first.returncode == 1 and "Signal 9 (SIGKILL)" in first.stderr, first.stderr[-2000:]
    assert "interrupted; nothing half-written was published. Run the same command again" in first.stderr
    assert job.published() == []
    second = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert second.returncode == 0, second.stderr[-2000:]
    assert {output: files(output) for output in job.outputs} == job.whole
    job.clean()
