"""Faults: kills, signals, dead and hung processes, full disks and hostile files, in training, sampling, extraction and
evaluation, on CPU processes that talk through gloo. The long campaigns: `python -m pytest tests -m slow -s`."""

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, cli, drawn_rows, message, process
from PIL import Image
from test_extract import decompression_bomb
from test_train import assert_close_run, assert_same_run, data, fit, load, log, on_the_cpu, write_set  # noqa: F401

from extract_latents import list_images

STATE_EVERY = 3
FLAGS = (*TINY, "--seed", 1, "--lr", 1e-3, "--ckpt-every", 10, "--state-every", STATE_EVERY)
QUICK, QUICK_PAIR = 70, 30  # steps


# ---- processes


def family(pid):
    """Ids of a process and of all that descend from it; torchrun's workers lead sessions of their own."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def slay(pid):
    """SIGKILL to a process and all that descend from it, at once: it is stopped first, so that it starts none meanwhile."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for each in reversed(family(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, number)


def worker(torchrun, rank):
    """Id of torchrun's worker of this rank."""
    for pid in family(torchrun.pid)[1:]:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1] == str(torchrun.pid):
                if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
    raise AssertionError(f"there is no worker {rank}")


@contextlib.contextmanager
def started(output, script, *args, processes=1, torchrun=(), **environment):
    """A command, running; stdout and stderr go to the end of `output`. Whatever happens, it does not outlive the block."""
    launch = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                       f"--master_port={free.getsockname()[1]}", *torchrun]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    with open(output, "ab") as file:
        running = subprocess.Popen([*launch, str(script), *map(str, args)], stdout=file, stderr=file, env=environment)
    running.output = output
    try:
        yield running
    finally:
        slay(running.pid)
        running.wait()


def training(run, data, steps, *flags, **options):  # noqa: F811  (the fixture is its argument)
    script = options.pop("script", ROOT / "train.py")
    return started(run.with_suffix(".out"), script, *FLAGS, "--data", data, "--run-dir", run, "--max-steps", steps, *flags, **options)


def wait_until(what, running, seconds=90):
    deadline = time.time() + seconds
    while not what():
        assert running.poll() is None, "it ended too early: " + running.output.read_text()[-2000:]
        assert time.time() < deadline, "it takes too long: " + running.output.read_text()[-2000:]
        time.sleep(0.002)


def steps_logged(run):
    return len((run / "log.jsonl").read_text().splitlines()) if (run / "log.jsonl").exists() else 0


def wait_for_steps(run, running, count):
    """Until it has logged so many more steps."""
    before = steps_logged(run)
    wait_until(lambda: steps_logged(run) >= before + count, running)


def newest_step(run):
    return load(run / "state.pt")["step"] if (run / "state.pt").exists() else 0


def damaged(run):
    """Files under final names that do not load, or hold what no run computed."""
    bad = []
    for path in run.rglob("*"):
        try:
            if path.suffix == ".pt":
                found = load(path)
                assert found["step"] == int(path.stem) if path.stem.isdigit() else found["step"] > 0
                parts = ("ema",) if path.stem.isdigit() else ("model", "ema")
                assert all(value.isfinite().all() for part in parts for value in found[part].values())
            elif path.suffix == ".json":
                assert json.loads(path.read_text())["data"]
            elif path.suffix == ".jsonl":
                assert all("step" in json.loads(line) for line in path.read_text().splitlines())
        except Exception:  # torch, zip and JSON errors have no common class
            bad.append(path)
    return bad


def settled(run):
    """What a finished run leaves: every numbered checkpoint and the state, and nothing unfinished."""
    last = newest_step(run)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"{step:07d}.pt" for step in range(10, last + 1, 10)] and not list(run.rglob("*.tmp"))
    return True


def assert_same_log(run, whole):
    """Steps done twice, because a kill took them, gave the same numbers as in the undisturbed run."""
    expected = {line["step"]: line for line in log(whole)}
    for line in log(run):
        assert all(line[key] == expected[line["step"]][key] for key in ("denoising", "vae_repa", "grad_norm"))
    assert {line["step"] for line in log(run)} == set(expected)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):  # noqa: F811
    """undisturbed(steps, processes): the directory of such a run, made once."""
    runs = {}

    def run(steps, processes=1):
        if (steps, processes) not in runs:
            folder = runs[steps, processes] = tmp_path_factory.mktemp("undisturbed") / "run"
            process("train", *FLAGS, "--data", data, "--run-dir", folder, "--max-steps", steps, processes=processes)
        return runs[steps, processes]

    return run


# ---- SIGKILL


def kill_again_and_again(run, data, whole, steps, processes, kills, seed):  # noqa: F811
    """Kill one training run at random moments, every third time while it writes a checkpoint, then let it end."""
    rng, lost, writing, bad = random.Random(seed), [], 0, []

    def unfinished():
        found = {}
        for path in run.rglob("*.pt.tmp"):
            with contextlib.suppress(OSError):
                found[path.name] = path.stat().st_mtime_ns
        return found

    for i in range(kills):
        before = unfinished()
        with training(run, data, steps, processes=processes) as running:
            if i % 3 == 0:
                wait_until(lambda: unfinished().items() - before.items(), running)
                time.sleep(rng.uniform(0, 0.02))
            elif i % 3 == 1:
                wait_for_steps(run, running, 1)
                time.sleep(rng.uniform(0, 0.2 if kills < 10 else 0.4))
            else:
                time.sleep(rng.uniform(0, 2.5 * processes))
            assert running.poll() is None, running.output.read_text()[-2000:]
            slay(running.pid)
            running.wait()
        writing += bool(unfinished().items() - before.items())
        bad += damaged(run)
        lost.append((log(run)[-1]["step"] if steps_logged(run) else 0) - newest_step(run))
    with training(run, data, steps, processes=processes) as running:
        assert running.wait(300) == 0, running.output.read_text()[-2000:]
    print(f"\ntraining, {processes} process(es): {kills} kills, {kills} resumed, {writing} of them while a checkpoint was written, "
          f"damaged files: {len(bad)}, steps lost per kill: mean {np.mean(lost):.1f}, max {max(lost)}")
    assert not bad and max(lost) <= STATE_EVERY and settled(run)
    assert_same_run(whole, run)
    assert_same_log(run, whole)
    return writing


@pytest.mark.slow
def test_killed_twice(data, undisturbed, tmp_path):  # noqa: F811
    kill_again_and_again(tmp_path / "run", data, undisturbed(QUICK), QUICK, processes=1, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("processes, steps", [(1, 1500), (2, 800)])
def test_killed_twenty_times(data, undisturbed, tmp_path, processes, steps):  # noqa: F811
    writing = kill_again_and_again(tmp_path / "run", data, undisturbed(steps, processes), steps, processes, kills=20, seed=processes)
    assert writing >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.npz", "folder"])
def test_sampling_killed_ten_times(checkpoint, tmp_path, name):
    flags = ("--num-samples", 300, "--batch-size", 2, "--num-steps", 8, "--ckpt", checkpoint)
    process("sample", *flags, "--out", tmp_path / "whole" / name)
    survive(tmp_path, name, "sample", *flags, "--out", tmp_path / "killed" / name, rows=300)


@pytest.mark.slow
def test_extraction_killed_ten_times(vae, tmp_path):
    for i in range(400):
        (tmp_path / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"class{i % 2}" / f"{i:03d}.png")
    flags = ("--images", tmp_path / "images", "--vae", vae, "--image-size", 32, "--batch-size", 1, "--num-workers", 1)
    process("extract_latents", *flags, "--out", tmp_path / "whole")
    survive(tmp_path, "moments.npy", "extract_latents", *flags, "--out", tmp_path / "killed", rows=400)


def contents(folder):
    """Bytes of the files under final names."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    ends = (".tmp", ".partial", ".progress", ".settings", ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files
            if not any(part.endswith(ends) for part in path.relative_to(folder).parts)}


def survive(tmp_path, name, script, *command, rows, kills=10):
    """Kill a command ten times, the last three in its last moments; then it has to end with an undisturbed run's bytes."""
    rng, progress, whole, late = random.Random(len(name)), tmp_path / "killed" / f"{name}.progress", contents(tmp_path / "whole"), 0
    state = progress.with_name(f"{name}.settings")

    def done():
        with contextlib.suppress(OSError):
            return progress.read_bytes().count(1)
        return rows if (tmp_path / "killed" / name).exists() else 0

    bad = []
    for i in range(kills):
        with started(tmp_path / "out.txt", ROOT / f"{script}.py", *command) as running:
            if i % 3 == 2 and i < kills - 3:
                time.sleep(rng.uniform(0, 3))
            else:
                goal = rows if i >= kills - 3 else min(rows - 40, done() + rng.randrange(1, 25))
                wait_until(lambda: done() >= goal or running.poll() is not None, running)
                time.sleep(rng.uniform(0, 0.01))
            late += running.poll() is not None
            slay(running.pid)
            running.wait()
        now = contents(tmp_path / "killed")
        bad += [path for path in now if now[path] != whole.get(path)]
        finished = (tmp_path / "killed" / name).exists() and not state.exists()
    process(script, *command)
    print(f"\n{script} ({name}): {kills} kills ({late} came after its end; finished before the last start: {finished}), "
          f"all resumed, damaged files: {len(bad)}")
    assert not bad and contents(tmp_path / "killed") == whole and late <= 2
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


# ---- signals


def test_signals_save_and_stop(capsys, data, tmp_path, one_thread):  # noqa: F811
    run, flags = tmp_path / "run", FLAGS[len(TINY) :]
    for name in ("SIGTERM", "SIGINT"):  # SIGUSR1: below
        with training(run, data, QUICK) as running:
            wait_for_steps(run, running, 4)
            os.kill(running.pid, signal.Signals[name])
            assert running.wait(10) == 0
        last = log(run)[-1]["step"]
        assert f"done at step {last}, stopped by {name}; run the same command again to resume" in running.output.read_text()
        assert newest_step(run) == last < QUICK and not damaged(run)
    for each in (run, tmp_path / "undisturbed"):
        fit(capsys, data, each, *flags, "--max-steps", QUICK)
    assert_same_run(tmp_path / "undisturbed", run)
    assert [line["step"] for line in log(run)] == list(range(1, QUICK + 1)) and settled(run)  # no step was done twice


def stop(data, run, plan):  # noqa: F811
    """Stop a run of two processes as the plan says, again and again."""
    forwarded = ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]
    for whom, number, status in plan:
        with training(run, data, QUICK_PAIR, processes=2, torchrun=forwarded) as running:
            wait_for_steps(run, running, 3)
            everyone = family(running.pid)
            targets = {"one": [worker(running, 1)], "all but torchrun": everyone[1:], "torchrun": everyone[:1]}[whom]
            assert len(everyone) >= 3
            for pid in targets:
                os.kill(pid, number)
            assert running.wait(20) == status
            assert not any(Path(f"/proc/{pid}").exists() for pid in everyone[1:])
        last = log(run)[-1]["step"]
        assert newest_step(run) == last < QUICK_PAIR and not damaged(run)
        assert f"done at step {last}, stopped by" in running.output.read_text()


def test_a_signal_to_one_of_two_stops_both(data, tmp_path):  # noqa: F811
    """Both after the same step, which the state holds; that a run of two resumes to the bit: below."""
    stop(data, tmp_path / "run", [("one", signal.SIGUSR1, 0)])


@pytest.mark.slow
def test_a_signal_to_torchrun(data, undisturbed, tmp_path):  # noqa: F811
    """It hands the signal on, all is saved, and its own status is 1 all the same; not so if its workers alone got it."""
    plan = [("all but torchrun", signal.SIGTERM, 0), ("torchrun", signal.SIGTERM, 1), ("torchrun", signal.SIGUSR1, 1)]
    run = tmp_path / "run"
    stop(data, run, plan)
    process("train", *FLAGS, "--data", data, "--run-dir", run, "--max-steps", QUICK_PAIR, processes=2)
    assert_same_run(undisturbed(QUICK_PAIR, 2), run)
    assert [line["step"] for line in log(run)] == list(range(1, QUICK_PAIR + 1))


# ---- dead and hung processes


@pytest.mark.parametrize("ranks", [(0,), pytest.param((1, 0), marks=pytest.mark.slow)])
def test_restarted_by_torchrun(data, undisturbed, tmp_path, ranks):  # noqa: F811
    """One worker is killed, and later the other; each time both start again, where the newest checkpoint is."""
    run = tmp_path / "run"
    with training(run, data, QUICK_PAIR, processes=2, torchrun=["--max-restarts=2"]) as running:
        for rank in ranks:
            wait_for_steps(run, running, 5)
            os.kill(worker(running, rank), signal.SIGKILL)
        assert running.wait(60) == 0, running.output.read_text()[-2000:]
    assert running.output.read_text().count(" from step ") == 1 + len(ranks) and not damaged(run)
    whole = undisturbed(QUICK_PAIR, 2)
    assert_same_run(whole, run)
    assert_same_log(run, whole)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_worker_that_dies_ends_the_others(data, tmp_path, rank):  # noqa: F811
    """Within seconds."""
    run = tmp_path / "run"
    with training(run, data, 100_000, processes=2) as running:
        wait_for_steps(run, running, 3)
        everyone, since = family(running.pid), time.time()
        os.kill(worker(running, rank), signal.SIGKILL)
        assert running.wait(25) == 1
        took = time.time() - since
        assert took < 20
        assert not any(Path(f"/proc/{pid}").exists() for pid in everyone[1:])
    assert not damaged(run)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_hangs_ends_the_others(data, tmp_path, rank):  # noqa: F811
    """Once the time-out of the process group is over, 8 seconds here; torchrun kills the one that hangs 30 seconds later."""
    run, script, limit = tmp_path / "run", tmp_path / "impatient.py", 8
    script.write_text("import sys\nfrom datetime import timedelta\nfrom functools import partial\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\nimport train\n"
                      f"train.init_distributed = partial(train.init_distributed, timeout=timedelta(seconds={limit}))\n"
                      "train.run(train.main)\n")
    with training(run, data, 100_000, processes=2, script=script) as running:
        wait_for_steps(run, running, 3)
        other, hung = worker(running, 1 - rank), worker(running, rank)
        os.kill(hung, signal.SIGSTOP)
        since = time.time()
        wait_until(lambda: other not in family(running.pid), running, 60)
        took = time.time() - since
        assert running.wait(60) == 1
        print(f"\nworker {rank} hung: the other ended after {took:.1f} s (time-out {limit} s), torchrun after {time.time() - since:.1f} s")
        assert limit - 1 < took < limit + 15 and not Path(f"/proc/{hung}").exists()
    assert not damaged(run)


def test_an_exception_does_not_wait_for_the_readers(data, tmp_path):  # noqa: F811
    script = tmp_path / "broken.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
                      "def broken(*_):\n    raise RuntimeError('out of memory')\n"
                      "train.training_step = broken\ntrain.run(train.main)\n")
    with training(tmp_path / "run", data, 5, script=script) as running:
        assert running.wait(25) == 1
    assert running.output.read_text().rstrip().endswith("RuntimeError: out of memory")


def test_another_number_of_processes_is_the_same_run(capsys, data, tmp_path):  # noqa: F811
    flags = ("--seed", 1, "--lr", 1e-3, "--ckpt-every", 3)
    fit(capsys, data, tmp_path / "alone", *flags, "--max-steps", 12)
    common = (*TINY, *flags, "--data", data, "--run-dir", tmp_path / "run")
    process("train", *common, "--max-steps", 4)  # a process of its own: the lock ends with it
    process("train", *common, "--max-steps", 8, processes=2)
    fit(capsys, data, tmp_path / "run", *flags, "--max-steps", 12)
    assert_close_run(tmp_path / "alone", tmp_path / "run", 12)


def test_a_loss_that_is_not_finite_on_one_of_two(tmp_path):
    """NaN in a latent that the second process alone reads: both end, the step is named once, no checkpoint holds it."""
    good = write_set(tmp_path / "good")
    moments = np.load(good / "moments.npy")
    moments[drawn_rows(1, 2, 4, 12)[3], 0, 0, 0] = np.nan  # row 3 of 4: the second process's, in step 3
    bad, since = write_set(tmp_path / "bad", moments=moments), time.time()
    flags = (*TINY, "--seed", 1, "--data", bad, "--run-dir", tmp_path / "run", "--max-steps", 9)
    ended = process("train", *flags, "--log-every", 5, "--ckpt-every", 2, processes=2, check=False)
    assert ended.returncode == 1 and time.time() - since < 30
    said = [line for line in ended.stderr.splitlines() if "train.py: error: " in line]
    assert len(said) == 1 and re.search(r"not finite at step 3\b", said[0]), ended.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000002.pt"] and not damaged(tmp_path / "run")


def test_a_spike_shows_in_the_log(capsys, tmp_path):
    """One image a thousand times too bright: the mean over the interval and the largest norm tell it apart."""
    moments = np.load(write_set(tmp_path / "calm") / "moments.npy")
    moments[drawn_rows(0, 1, 4, 12)[0]] *= 1000  # step 2
    loud = write_set(tmp_path / "loud", moments=moments)
    every, _ = fit(capsys, loud, tmp_path / "every", "--max-steps", 3, "--grad-clip", 0.5)
    (line,), last = fit(capsys, loud, tmp_path / "third", "--max-steps", 3, "--grad-clip", 0.5, "--log-every", 3)
    norms = [each["grad_norm_max"] for each in every]
    assert norms[1] > 20 * max(norms[0], norms[2]) and norms[1] > 50 * 0.5
    assert line["grad_norm_max"] == pytest.approx(norms[1], rel=1e-4) and line["grad_norm"] < line["grad_norm_max"] / 2
    assert all(value.isfinite().all() for value in last["model"].values())


# ---- disks and which checkpoints stay


@contextlib.contextmanager
def largest_file(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def checkpoints(run):
    return {path: path.read_bytes() for path in run.rglob("*.pt")}


def test_a_disk_that_fills_up(capsys, data, tmp_path):  # noqa: F811
    """A real one: what is there stays, and the same command goes on once there is room."""
    run = tmp_path / "run"
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=88m", "none", run]  # a state has 34 MB, and needs as much to be rewritten
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        flags = (*TINY, "--data", data, "--run-dir", run, "--ckpt-every", 1)
        fit(capsys, data, run, "--ckpt-every", 1, "--max-steps", 2)
        before = checkpoints(run)
        status, _, stderr = cli(capsys, "train", *flags, "--max-steps", 4)
        said = message(stderr)
        assert status == 2 and "state.pt" in said and "disk full" in said
        after = checkpoints(run)
        assert before.items() <= after.items() and not damaged(run) and not list(run.rglob("*.tmp"))
        (run / "checkpoints" / "0000001.pt").unlink()  # room again
        (run / "checkpoints" / "0000002.pt").unlink()
        fit(capsys, data, run, "--ckpt-every", 9, "--max-steps", 3)
        assert newest_step(run) == 3
    finally:
        subprocess.run(["umount", "-l", run], check=True)


# ---- bad input: one sentence that names the thing, exit status 2, nothing under a final name, no code run


class Code:
    """Unpickling it creates a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


class Inputs:
    """Paths of good inputs, in a folder of its own for each case, and ways to spoil them."""

    def __init__(self, root, good):
        self.root, self.good, self.out, self.marker = root, good, root / "out", root / "ran"
        self.out.mkdir()

    def __getattr__(self, name):
        """A copy of one of the good inputs: latents, images, vae, ckpt, samples."""
        source = self.__dict__["good"][name]
        copy = self.root / source.name
        if not copy.exists():
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
        return copy

    def put(self, path, content):
        """Put into the place of a file, or of a folder, something else."""
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        content(path) if callable(content) else path.write_text(content) if isinstance(content, str) else path.write_bytes(content)
        return path

    # contents
    def code(self, path):
        path.write_bytes(pickle.dumps({"ema": Code(self.marker)}))

    def torch_code(self, path):
        torch.save({"ema": {}, "step": 3, "opt": Code(self.marker)}, path)

    def array_of_code(self, path):
        with open(path, "wb") as file:
            np.save(file, np.array([Code(self.marker)] * 12, object), allow_pickle=True)

    def npz_of_code(self, path):
        with open(path, "wb") as file:
            np.savez(file, arr_0=np.array([Code(self.marker)] * 12, object))

    def statistics_of_code(self, path):
        with open(path, "wb") as file:
            np.savez(file, arr_0=np.zeros((12, 32, 32, 3), np.uint8), mu=np.array([Code(self.marker)], object))

    def json(self, path, **changes):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return path.parent

    def checkpoint(self, path, **changes):
        torch.save({**load(self.good["ckpt"]), **changes}, path)

    def state(self, path, **changes):
        torch.save({**load(self.good["ckpt"].parent.parent / "state.pt"), **changes}, path)

    def data_setting(self, **changes):
        settings = load(self.good["ckpt"])["settings"]
        return {**settings, "data": {**settings["data"], **changes}}

    # commands
    def train(self, *flags):
        return "train", (*TINY, "--data", self.latents, "--run-dir", self.out / "run", "--max-steps", 3, *flags)

    def sample(self, *flags):
        return "sample", ("--ckpt", self.ckpt, "--num-samples", 4, "--num-steps", 2, "--out", self.out / "a.npz", *flags)

    def extract(self, *flags):
        return "extract_latents", ("--images", self.images, "--vae", self.vae, "--image-size", 32, "--num-workers", 0,
                                   "--out", self.out / "latents", *flags)

    def fid(self, *flags):
        return "fid", (self.samples, "--ref", self.samples, "--detector", ROOT / "tests" / "demo_detector.pt", "--num-workers", 0, *flags)

    def benchmark(self, *flags):
        small = ("--device", "cpu", "--model", "SiT-Ti/4", "--micro-batch", 2, "--steps", 1, "--repeats", 1)
        return "benchmark", ("profile", *small, "--json", self.out / "a.json", *flags)


def folder(path):
    path.mkdir()


def bomb(path):
    decompression_bomb(path)


def swap(a, b):
    a.rename(a.with_name("x"))
    b.rename(a)
    a.with_name("x").rename(b)
    return a.parent


def edited(path, change):
    """Save an array again, changed."""
    np.save(path, change(np.load(path)))
    return path.parent


def nan_at_0(x):
    x = x.copy()
    x.reshape(len(x), -1)[:, 0] = np.nan
    return x


def in_run(i, name, content):
    return i.put(i.out / "run" / name, content)


def state_in_run(i, content):
    return in_run(i, "state.pt", content)


def partial_extraction(i, progress=bytes(12), partial=None, settings=None):
    """What a killed extraction leaves."""
    files, vae = list_images(i.images)[1], str(Path(i.vae).resolve())
    about = {"vae": vae, "image_size": 32, "dtype": "float16", "count": 12, "flip": False, "store_images": False,
             "files_sha256": hashlib.sha256(os.fsencode("\n".join(files))).hexdigest()}
    out = i.out / "latents" / "moments.npy"
    i.put(Path(f"{out}.settings"), settings or json.dumps(about))
    i.put(Path(f"{out}.progress"), progress)
    i.put(Path(f"{out}.partial"), partial if partial is not None else (lambda path: np.lib.format.open_memmap(path, "w+", np.float16, (12, 8, 8, 8))))


# (name, what it does to the inputs and the command that meets it, what the sentence says)
BAD = [
    # training: the latents
    ("latents are a file", lambda i: (i.put(i.latents, "x"), i.train())[1], "no latents at"),
    ("moments and labels swapped", lambda i: (swap(i.latents / "moments.npy", i.latents / "labels.npy"), i.train())[1], "damaged"),
    ("moments are a folder", lambda i: (i.put(i.latents / "moments.npy", folder), i.train())[1], "damaged"),
    ("latents.json is a folder", lambda i: (i.put(i.latents / "latents.json", folder), i.train())[1], "damaged"),
    ("code in labels", lambda i: (i.put(i.latents / "labels.npy", i.array_of_code), i.train())[1], "damaged"),
    ("code in moments", lambda i: (i.put(i.latents / "moments.npy", i.array_of_code), i.train())[1], "damaged"),
    ("labels are a bare pickle", lambda i: (i.put(i.latents / "labels.npy", i.code), i.train())[1], "damaged"),
    ("labels are an npz", lambda i: (i.put(i.latents / "labels.npy", i.npz_of_code), i.train())[1], "damaged"),
    ("labels are not whole", lambda i: (edited(i.latents / "labels.npy", lambda x: x * np.nan), i.train())[1], "damaged"),
    ("labels out of range", lambda i: (edited(i.latents / "labels.npy", lambda x: x + 2**40), i.train())[1], "damaged"),
    ("moments are text", lambda i: (edited(i.latents / "moments.npy", lambda x: x.astype("U3")), i.train())[1], "damaged"),
    ("moments are complex", lambda i: (edited(i.latents / "moments.npy", lambda x: x.astype(complex)), i.train())[1], "damaged"),
    ("moments hold NaN", lambda i: (edited(i.latents / "moments.npy", nan_at_0), i.train())[1], "not finite at step 1"),
    ("moments are infinite", lambda i: (edited(i.latents / "moments.npy", lambda x: x * np.inf), i.train())[1], "not finite at step 1"),
    ("num_classes is text", lambda i: (i.json(i.latents / "latents.json", num_classes="3"), i.train())[1], "damaged"),
    ("num_classes is not whole", lambda i: (i.json(i.latents / "latents.json", num_classes=3.0), i.train())[1], "damaged"),
    ("num_classes is too small", lambda i: (i.json(i.latents / "latents.json", num_classes=2), i.train())[1], "damaged"),
    ("scale is missing", lambda i: (i.put(i.latents / "latents.json", '{"vae": "x", "shift": 0, "num_classes": 3}'), i.train())[1], "scale"),
    ("moments in Fortran order", lambda i: (edited(i.latents / "moments.npy", np.asfortranarray), i.train())[1], "damaged"),
    ("shift is text", lambda i: (i.json(i.latents / "latents.json", shift="none"), i.train())[1], "damaged"),
    ("scale is nested", lambda i: (i.json(i.latents / "latents.json", scale=[[1, 2], [3]]), i.train())[1], "damaged"),
    ("vae is a list", lambda i: (i.json(i.latents / "latents.json", vae=[3]), i.train("--sample-every", 1))[1], "VAE"),
    ("latents.json is nested deeply", lambda i: (i.put(i.latents / "latents.json", "[" * 100_000), i.train())[1], "damaged"),
    # training: its directory
    ("run-dir is a file", lambda i: (i.put(i.out / "run", "x"), i.train())[1], "run"),
    ("checkpoints is a file", lambda i: (in_run(i, "checkpoints", "x"), i.train())[1], "checkpoints"),
    ("log.jsonl is a folder", lambda i: (in_run(i, "log.jsonl", folder), i.train())[1], "log.jsonl"),
    ("settings.json is a list", lambda i: (in_run(i, "settings.json", "[1]"), i.train())[1], "settings.json"),
    ("settings.json without data", lambda i: (in_run(i, "settings.json", '{"model": "SiT-Ti/4"}'), i.train())[1], "settings"),
    ("settings.json with data of a wrong type", lambda i: (in_run(i, "settings.json", '{"data": 3}'), i.train())[1], "settings"),
    ("code in a state", lambda i: (state_in_run(i, i.torch_code), i.train())[1], "state.pt"),
    ("state is a pickle", lambda i: (state_in_run(i, i.code), i.train())[1], "state.pt"),
    ("state is an npz", lambda i: (state_in_run(i, i.npz_of_code), i.train())[1], "state.pt"),
    ("state is a folder", lambda i: (state_in_run(i, folder), i.train())[1], "state.pt"),
    ("state is a tensor", lambda i: (state_in_run(i, lambda p: torch.save(torch.ones(3), p)), i.train())[1], "state.pt"),
    ("state is a numbered checkpoint", lambda i: (state_in_run(i, lambda p: shutil.copy(i.ckpt, p)), i.train())[1], "state.pt"),
    ("step of a state is text", lambda i: (state_in_run(i, lambda p: i.state(p, step="three")), i.train())[1], "state.pt"),
    ("weights of a state are none", lambda i: (state_in_run(i, lambda p: i.state(p, model={})), i.train())[1], "state.pt"),
    ("EMA of a state is narrower", lambda i: (state_in_run(i, lambda p: i.state(p, ema={
        key: value[..., :1].clone() for key, value in load(i.ckpt)["ema"].items()})), i.train())[1], "state.pt"),
    ("state-every is 0", lambda i: i.train("--state-every", 0), "--state-every"),
    ("max-steps in floating point", lambda i: i.train("--max-steps", "1e3"), "--max-steps"),
    ("learning rate is infinite", lambda i: i.train("--lr", "inf"), ""),
    # sampling
    ("npz as a checkpoint", lambda i: i.sample("--ckpt", i.samples), "samples.npz"),
    ("moments as a checkpoint", lambda i: i.sample("--ckpt", i.latents / "moments.npy"), "moments.npy"),
    ("TorchScript as a checkpoint", lambda i: i.sample("--ckpt", ROOT / "tests" / "demo_detector.pt"), "demo_detector.pt"),
    ("code in a checkpoint to sample", lambda i: (i.put(i.ckpt, i.torch_code), i.sample())[1], "0000004.pt"),
    ("latent_shape of a checkpoint is text", lambda i: (i.put(i.ckpt, lambda p: i.checkpoint(p, settings=i.data_setting(latent_shape="488"))),
                                                        i.sample())[1], "0000004.pt"),
    ("vae of a checkpoint is a list", lambda i: (i.put(i.ckpt, lambda p: i.checkpoint(p, settings=i.data_setting(vae=[3]))), i.sample())[1], "VAE"),
    ("shift of a checkpoint is text", lambda i: (i.put(i.ckpt, lambda p: i.checkpoint(p, settings=i.data_setting(shift="x"))), i.sample())[1], "VAE"),
    ("shift of a checkpoint is missing", lambda i: (i.put(i.ckpt, lambda p: i.checkpoint(p, settings={
        **i.data_setting(), "data": {k: v for k, v in i.data_setting()["data"].items() if k != "shift"}})), i.sample())[1], "shift"),
    ("code in the weights of a VAE", lambda i: ([file.unlink() for file in i.vae.glob("*.safetensors")],
                                                i.put(i.vae / "diffusion_pytorch_model.bin", i.torch_code), i.sample("--vae", i.vae))[2], "VAE"),
    ("a checkpoint as a VAE", lambda i: i.sample("--vae", i.ckpt), "0000004.pt"),
    ("record of samples is a list", lambda i: (i.put(i.out / "a.npz", "x"), i.put(i.out / "a.npz.json", "[]"), i.sample())[2], "a.npz.json"),
    ("record of samples is a folder", lambda i: (i.put(i.out / "a.npz", "x"), i.put(i.out / "a.npz.json", folder), i.sample())[2], "a.npz.json"),
    ("settings of unfinished samples are a number", lambda i: (i.put(i.out / "a.npz.settings", "3"), i.sample())[1], "a.npz.settings"),
    ("classes are words", lambda i: ("sample", ("--ckpt", i.ckpt, "--classes", "cat")), "--classes"),
    # extraction
    ("a bomb among the images", lambda i: (i.put(i.images / "class0" / "00.png", bomb), i.extract())[1], "class0/00.png"),
    ("a loop among the images", lambda i: (i.put(i.images / "class0" / "00.png", lambda p: p.symlink_to(p)), i.extract())[1], "class0/00.png"),
    ("an npz among the images", lambda i: (i.put(i.images / "class0" / "00.png", i.npz_of_code), i.extract())[1], "class0/00.png"),
    ("extraction: code in a VAE", lambda i: ([file.unlink() for file in i.vae.glob("*.safetensors")],
                                             i.put(i.vae / "diffusion_pytorch_model.bin", i.torch_code), i.extract())[2], "VAE"),
    ("extraction: config.json of a VAE is a list", lambda i: (i.put(i.vae / "config.json", "[1]"), i.extract())[1], "VAE"),
    ("extraction: scale of a VAE is text", lambda i: (i.json(i.vae / "config.json", scaling_factor="x"), i.extract())[1], "VAE"),
    ("latents.json to write is a folder", lambda i: (i.put(i.out / "latents" / "latents.json", folder), i.extract())[1], "latents.json"),
    ("progress was lost", lambda i: (partial_extraction(i, progress=b""), i.extract())[1], "moments.npy"),
    ("progress is too long", lambda i: (partial_extraction(i, progress=bytes(13)), i.extract())[1], "moments.npy"),
    ("partial array was lost", lambda i: (partial_extraction(i, partial=b""), i.extract())[1], "moments.npy"),
    ("partial array is code", lambda i: (partial_extraction(i, partial=i.array_of_code), i.extract())[1], "moments.npy"),
    ("settings of unfinished latents are a list", lambda i: (partial_extraction(i, settings="[]"), i.extract())[1], "moments.npy.settings"),
    # evaluation
    ("a checkpoint as --ref", lambda i: i.fid("--ref", i.ckpt), "0000004.pt"),
    ("a checkpoint named .npz as --ref", lambda i: (shutil.copy(i.ckpt, i.root / "x.npz"), i.fid("--ref", i.root / "x.npz"))[1], "x.npz"),
    ("moments as --ref", lambda i: i.fid("--ref", i.latents / "moments.npy"), "moments.npy"),
    ("labels as --ref", lambda i: i.fid("--ref", i.latents / "labels.npy"), "labels.npy"),
    ("code as images", lambda i: (i.put(i.samples, i.npz_of_code), i.fid())[1], "samples.npz"),
    ("code as statistics", lambda i: (i.put(i.samples, i.statistics_of_code), i.fid())[1], "samples.npz"),
    ("a bomb in --ref", lambda i: (i.put(i.images / "class0" / "00.png", bomb), i.fid("--ref", i.images))[1], "00.png"),
    ("code in the Inception weights", lambda i: ("fid", (i.samples, "--ref", i.samples, "--weights", i.put(i.root / "w.pth", i.torch_code))), "w.pth"),
    ("a folder as the Inception weights", lambda i: ("fid", (i.samples, "--ref", i.samples, "--weights", i.vae)), "vae"),
    ("code as a detector", lambda i: i.fid("--detector", i.put(i.root / "d.pt", i.torch_code)), "d.pt"),
    ("a checkpoint as a detector", lambda i: i.fid("--detector", i.ckpt), "0000004.pt"),
    ("cache is a file", lambda i: i.fid("--cache", i.put(i.root / "cache", "x")), "cache"),
    ("code in the cache", lambda i: spoilt_cache(i, i.npz_of_code), "cache"),
    ("cache is cut", lambda i: spoilt_cache(i, lambda p: p.write_bytes(b"PK")), "cache"),
    ("cache of something else", lambda i: spoilt_cache(i, lambda p: np.savez(p, other=np.zeros(3))), "cache"),
    ("json is a folder", lambda i: i.fid("--json", i.put(i.out / "a.json", folder)), "a.json"),
    ("save-stats over a folder", lambda i: ("fid", (i.samples, "--save-stats", i.put(i.out / "b.npz", folder), "--detector",
                                                    ROOT / "tests" / "demo_detector.pt")), "b.npz"),
    # benchmark
    ("benchmark without a mode", lambda i: ("benchmark", ()), "mode"),
    ("benchmark of an unknown model", lambda i: i.benchmark("--model", "DiT-XL/2"), "DiT-XL/2"),
    ("benchmark with a flag that does not exist", lambda i: i.benchmark("--modle", "SiT-Ti/4"), "--modle"),
    ("benchmark of 0 steps", lambda i: i.benchmark("--steps", 0), "--steps"),
    ("benchmark of minus one worker", lambda i: i.benchmark("--num-workers", -1), "--num-workers"),
    # full disks: the largest file that can be written, in bytes
    ("disk full at a checkpoint", lambda i: i.train(), "0000003.pt", 1_000_000),
    ("disk full at settings.json", lambda i: i.train(), "settings.json", 100),
    ("disk full at the samples", lambda i: i.sample(), "a.npz", 12_450),
    ("disk full at the array of samples", lambda i: i.sample(), "a.npz", 5_000),
    ("disk full at the moments", lambda i: i.extract(), "moments.npy", 5_000),
    ("disk full at the reference", lambda i: ("fid", (i.samples, "--save-stats", i.out / "b.npz", "--detector",
                                                     ROOT / "tests" / "demo_detector.pt")), "b.npz", 30_000),
    ("disk full at the numbers", lambda i: i.fid("--json", i.out / "a.json"), "a.json", 100),
]


def spoilt_cache(i, content):
    script, args = i.fid("--cache", i.root / "cache")
    i.root.joinpath("cache").mkdir()
    i.warm(script, args)
    for path in (i.root / "cache").iterdir():
        i.put(path, content)
    return script, args


@pytest.fixture(scope="module")
def good(tmp_path_factory, latents, images, vae, checkpoint):
    samples = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(samples, arr_0=np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8))
    return {"latents": latents, "images": images, "vae": vae, "ckpt": checkpoint, "samples": samples}


def under_final_names(out):
    """Outputs that a reader would take for whole; those of settings alone come first, and are whole."""
    return {path: path.is_dir() or path.read_bytes() for path in out.rglob("*")
            if path.suffix in (".pt", ".npz", ".png", ".npy", ".json") and path.name not in ("settings.json", "a.npz.json")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prepare, says, limit", [pytest.param(*case[1:], *[None] * (4 - len(case)), id=case[0]) for case in BAD])
def test_bad_input(capsys, good, tmp_path, prepare, says, limit):
    i = Inputs(tmp_path, good)
    i.warm = lambda script, args: cli(capsys, script, *args)
    script, args = prepare(i)
    before = under_final_names(i.out)
    with largest_file(limit) if limit else contextlib.nullcontext():
        status, _, stderr = cli(capsys, script, *args)
    assert status == 2, stderr
    said = message("\n".join(line for line in stderr.split("\n") if not line.startswith("fid.py: warning: ")))
    assert said.startswith(f"{script}.py: error: ") and says in said
    assert under_final_names(i.out) == before and not i.marker.exists()
    assert not list(i.out.rglob("*.tmp"))
