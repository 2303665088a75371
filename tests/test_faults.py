"""Kills, signals, and processes that die or hang, as whole commands.

Signals save and stop, torchrun restarts what dies, and the run goes on as if nothing had happened.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, cli, process, write_set
from test_train import load, log
from torch.distributed.run import get_args_parser

import train

pytestmark = pytest.mark.usefixtures("all_on_one_thread")
TRAIN, STATE_EVERY, NAN_STEP = ROOT / "train.py", 3, 24
FLAGS = (*TINY, "--seed", 1, "--lr", 1e-3, "--ckpt-every", 10, "--state-every", STATE_EVERY)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("latents") / "set", count=160)


def training(data, run, steps):
    return (*FLAGS, "--data", data, "--run-dir", run, "--max-steps", steps)


def fit(capsys, *flags):
    """Train in this process, which keeps no lock: (stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "lock", lambda *_: None)
        patch.setattr(train, "signals", [])
        status, stdout, err = cli(capsys, "train", *flags)
    assert status == 0, err
    return stdout


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


def worker(torchrun, rank):
    """Id of torchrun's worker of this rank."""
    return next(pid for pid in family(torchrun.pid)[1:]
                if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def slay(running):
    """SIGKILL to a process and its family, which is stopped first, so that it starts none meanwhile."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for each in reversed(family(running.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, number)
    running.wait()


@contextlib.contextmanager
def started(output, *args, script=TRAIN, processes=1, torchrun=()):
    """A command, running, with its words at the end of the file `output`; it does not outlive the block."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
    command = [sys.executable, *(launch if processes > 1 else []), *map(str, (script, *args))]
    with open(output, "ab") as file:
        running = subprocess.Popen(command, stdout=file, stderr=file,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    running.output = output
    try:
        yield running
    finally:
        slay(running)


def wait_until(what, running, seconds=90, dead=False):
    """Until it holds, of a command that must be running unless it may be dead by then."""
    deadline = time.time() + seconds
    while not what() and not (dead and running.poll() is not None):
        assert running.poll() is None and time.time() < deadline, running.output.read_text()[-2000:]
        time.sleep(0.002)


def steps_logged(run):
    return len(log(run)) if (run / "log.jsonl").exists() else 0


def wait_for_steps(run, running, count):
    """Until it has logged so many more steps."""
    before = steps_logged(run)
    wait_until(lambda: steps_logged(run) >= before + count, running)


def newest_step(run):
    """The step of the state; every file under a final name loads and is finite."""
    for path in run.rglob("*.pt"):
        found = load(path)
        assert found["step"] == int(path.stem) if path.stem.isdigit() else path.name == "state.pt"
        weights = [*found["ema"].values(), *found.get("model", {}).values()]
        assert all(value.isfinite().all() for value in weights), path
    return load(run / "state.pt")["step"] if (run / "state.pt").exists() else 0


def assert_same_log(whole, run, rel=0.0):
    """The same losses, and each step once."""
    for line, expected in zip(log(run), log(whole), strict=True):
        for key in ("step", "denoising", "vae_repa", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=rel, abs=0), line["step"]


def assert_same_run(whole, run):
    """The same files, losses and states, to the bit."""
    names = {path.relative_to(whole) for path in whole.rglob("*")}
    assert {path.relative_to(run) for path in run.rglob("*")} == names
    for name in (name for name in names if name.suffix == ".pt"):
        one, other = ({**load(each / name), "settings": None, "log": None} for each in (whole, run))
        torch.testing.assert_close(other, one, rtol=0, atol=0)
    assert_same_log(whole, run)


# ---- signals, restarts, dead and hung processes


def test_signals_save_and_stop(capsys, data, tmp_path, monkeypatch):
    """Each stops after the step it came in; the run goes on to the same bits, no step done twice."""
    real, run, due = train.training_step, tmp_path / "run", {1: "SIGTERM", 3: "SIGINT", 6: "SIGUSR1"}

    def step(*args):
        if name := due.pop(steps_logged(run), None):
            os.kill(os.getpid(), signal.Signals[name])
        return real(*args)

    fit(capsys, *training(data, tmp_path / "whole", 8))
    monkeypatch.setattr(train, "training_step", step)
    for at, name in list(due.items()):
        said = f"done at step {at + 1}, stopped by {name}; run the same command again to resume"
        assert said in fit(capsys, *training(data, run, 8))
        assert newest_step(run) == log(run)[-1]["step"] == at + 1
    fit(capsys, *training(data, run, 8))
    assert_same_run(tmp_path / "whole", run)
    assert [line["step"] for line in log(run)] == list(range(1, 9))


def gone(pids):
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_two_processes(capsys, data, tmp_path):
    """Two go on with what one began. torchrun starts both again if one dies. A latent that is NaN, which the
    second alone reads, ends both, and no checkpoint holds it. A signal to one stops both, and one goes on. In
    all of that it is the run that one process gives."""
    run, whole, good = tmp_path / "run", tmp_path / "whole", np.load(data / "moments.npy")
    output, spoilt, bad = tmp_path / "out.txt", shutil.copytree(data, tmp_path / "spoilt"), good.copy()
    bad[np.random.default_rng([1, 2, 0]).permutation(160)[4 * NAN_STEP - 1], 0, 0, 0] = np.nan
    np.save(spoilt / "moments.npy", bad)
    fit(capsys, *training(spoilt, run, 2))
    flags = {"processes": 2, "torchrun": ["--max-restarts=2"]}
    with started(output, *training(spoilt, run, 200), **flags) as running:
        wait_for_steps(run, running, 3)
        os.kill(worker(running, 0), signal.SIGKILL)
        wait_until(lambda: "train.py: error: " in output.read_text(), running)
        killed = NAN_STEP // STATE_EVERY * STATE_EVERY - STATE_EVERY
        assert newest_step(run) == killed
        np.save(spoilt / "moments.npy", good)
        wait_for_steps(run, running, 3)
        everyone = family(running.pid)
        os.kill(worker(running, 1), signal.SIGUSR1)
        assert running.wait(20) == 0 and len(everyone) >= 3 and gone(everyone[1:])
    said, last = output.read_text(), log(run)[-1]["step"]
    assert newest_step(run) == last < 200 and f"done at step {last}, stopped by" in said
    first, second, third = map(int, re.findall(r" from step (\d+)", said))
    assert (first, third) == (2, killed) and first < second < NAN_STEP and second % STATE_EVERY == 0
    (line,) = (line for line in said.splitlines() if "train.py: error: " in line)
    assert re.search(rf"not finite at step {NAN_STEP}\b", line) and "by peer" not in said
    fit(capsys, *training(spoilt, run, last + 2))
    fit(capsys, *training(data, whole, last + 2), "--state-every", 1000)
    assert_same_log(whole, run, rel=1e-3)


@pytest.mark.slow
def test_kills_and_signals_under_torchrun(data, tmp_path):
    """It starts all again if one dies, and hands signals on: all is saved, though its own status is then 1.

    SIGUSR1 only where its flag --signals-to-handle is known.
    """
    run, output, flags = tmp_path / "run", tmp_path / "out.txt", training(data, tmp_path / "run", 60)
    process("train", *training(data, tmp_path / "whole", 60), processes=2)
    knows = "--signals-to-handle" in get_args_parser().format_help()
    torchrun = ["--max-restarts=2", *["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"][: knows]]
    for whom, number, status in [("workers", signal.SIGTERM, 0), ("torchrun", signal.SIGTERM, 1),
                                 ("torchrun", signal.SIGUSR1 if knows else signal.SIGINT, 1)]:
        with started(output, *flags, processes=2, torchrun=torchrun) as running:
            wait_for_steps(run, running, 3)
            everyone = family(running.pid)
            for pid in everyone[1:] if whom == "workers" else everyone[:1]:
                os.kill(pid, number)
            assert running.wait(20) == status and gone(everyone[1:])
        assert newest_step(run) == log(run)[-1]["step"] < 60
    assert [line["step"] for line in log(run)] == list(range(1, newest_step(run) + 1))
    with started(output, *flags, processes=2, torchrun=torchrun) as running:
        for rank in (1, 0):
            wait_for_steps(run, running, 5)
            os.kill(worker(running, rank), signal.SIGKILL)
        assert running.wait(60) == 0, output.read_text()[-2000:]
    assert output.read_text().count(" from step ") == 6
    assert_same_run(tmp_path / "whole", run)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_ends_the_others(data, tmp_path, rank, number):
    """Within seconds if it dies, else once the process group's time-out is over, 8 seconds here; torchrun
    kills the one that hangs 30 seconds later."""
    run, script, limit = tmp_path / "run", tmp_path / "impatient.py", 8
    script.write_text(f"import sys, datetime, functools\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
                      "train.init_distributed = functools.partial(train.init_distributed, timeout="
                      f"datetime.timedelta(seconds={limit}))\ntrain.run(train.main)\n")
    flags = training(data, run, 100_000)
    with started(tmp_path / "out.txt", *flags, script=script, processes=2) as running:
        wait_for_steps(run, running, STATE_EVERY + 1)
        other, everyone, since = worker(running, 1 - rank), family(running.pid), time.time()
        os.kill(worker(running, rank), number)
        wait_until(lambda: gone([other]) or other not in family(running.pid), running, 60)
        took = time.time() - since
        assert running.wait(60) == 1
        print(f"\nworker {rank}, {number.name}: the other ended after {took:.1f} s")
        assert took < 20 if number == signal.SIGKILL else limit - 1 < took < limit + 15
        assert gone(everyone[1:]) and newest_step(run) > 0
