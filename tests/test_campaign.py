"""200 random faults in training, extraction, sampling and metrics, by one process and by two: kills, hangs,
signals, full disks, power cuts, damaged files, second commands.

After each, the same command must give the same bytes as if nothing had happened, or one sentence must say
what to remove. `python -m pytest tests/test_campaign.py -m slow -s` takes 40 minutes on 2 cores and prints a
table's rows. Full disks are file systems in memory, which only root can make.
"""

import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import DETECTOR, ROOT, TINY, cli, message, process
from test_faults import family, started, wait_until
from test_power_cuts import rebuild, result, watched

from extract_latents import first_line

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_on_one_thread")]
FAULTS = {"SIGKILL": 40, "SIGSTOP": 15, "SIGTERM": 20, "second command": 20, "full disk": 25, "power cut": 40,
          "damaged file": 40}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder to work in."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def commands(latents, checkpoint, images, vae, tmp_path):
    """{name: words}; they write into the folder they start in, and take some seconds."""
    pictures = tmp_path / "pictures"
    for i in range(5):
        shutil.copytree(images, pictures, copy_function=lambda a, b, i=i: shutil.copy(a, f"{b[:-4]}-{i}.png"),
                        dirs_exist_ok=True)
    samples = tmp_path / "samples.npz"
    np.savez(samples, arr_0=np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8))
    return {
        "training": ("train", *TINY, "--data", latents, "--run-dir", "run", "--max-steps", 60,
                     "--ckpt-every", 20, "--state-every", 6, "--lr", 1e-3),
        "extraction": ("extract_latents", "--images", pictures, "--vae", vae, "--image-size", 32,
                       "--out", "latents", "--batch-size", 1, "--num-workers", 1, "--store-images"),
        "sampling": ("sample", "--ckpt", checkpoint, "--num-samples", 60, "--batch-size", 1, "--num-steps", 6,
                     "--out", "a.npz"),
        "metrics": ("fid", samples, "--ref", pictures, "--json", "fid.json", "--detector", DETECTOR,
                    "--batch-size", 1, "--num-workers", 1),
    }


def again(capsys, words, processes=1):
    """Run a command to its end: what it says if it fails."""
    if processes > 1 and words[0] == "train":  # else the number of processes changes nothing
        ran = process(*words, processes=processes, check=False)
        (said,) = {line for line in ran.stderr.splitlines() if ": error: " in line} or {""}
        assert ran.returncode == 0 or said, ran.stderr
        return said
    status, _, err = cli(capsys, *words)
    return message(err) if status else ""


class Campaign:
    def __init__(self, capsys, work, commands):
        self.capsys, self.work, self.commands, self.rng = capsys, work, commands, random.Random(0)
        self.whole, self.disks = {}, {}
        for name, words in commands.items():
            for processes in (1, 2) if name == "training" else (1,):
                self.clear()
                assert not again(capsys, words, processes)
                self.whole[name, processes] = result(work)
            self.clear()
            self.disks[name] = list(watched(work, lambda words=words: again(capsys, words)).states)

    def clear(self):
        rebuild(self.work, {})

    def expected(self, name, processes):
        return self.whole.get((name, processes)) or self.whole[name, 1]

    def outcome(self, name, processes):
        """Run the command again, and see."""
        words = self.commands[name]
        said = again(self.capsys, words, processes)
        if not said:
            return "same bytes" if result(self.work) == self.expected(name, processes) else "DIFFERENT"
        if not any(word in said for word in ("remove", "give another")):
            return f"UNHELPFUL: {said}"
        self.clear()
        again(self.capsys, words, processes)
        return "a sentence" if result(self.work) == self.expected(name, processes) else "DIFFERENT"

    # faults of running processes

    @contextlib.contextmanager
    def running(self, name, processes):
        """The command, at a random moment after its first file."""
        script, *flags = self.commands[name]
        said, script = self.work.parent / "said.txt", ROOT / f"{script}.py"
        said.unlink(missing_ok=True)
        with started(said, *flags, script=script, processes=processes) as it:
            wait_until(lambda: any(self.work.iterdir()), it, dead=True)
            time.sleep(self.rng.uniform(0, 1.5 + processes))
            yield it

    def someone(self, it):
        """A process of the command, which it may no longer have."""
        return self.rng.choice(family(it.pid))

    def kill(self, name, processes):
        for _ in range(self.rng.choice([1, 1, 3])):
            with self.running(name, processes) as it:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.someone(it), signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    it.wait(self.rng.choice([0, 20]))
        return self.outcome(name, processes)

    def stop(self, name, processes):
        with self.running(name, processes) as it:
            who = self.someone(it)
            with contextlib.suppress(ProcessLookupError):
                os.kill(who, signal.SIGSTOP)
                time.sleep(self.rng.uniform(0, 3))
                if self.rng.random() < 0.7:
                    os.kill(who, signal.SIGCONT)
                    assert it.wait(60) == 0
        return self.outcome(name, processes)

    def terminate(self, name, processes):
        with self.running(name, processes) as it:
            os.kill(it.pid, signal.SIGTERM)
            assert it.wait(60) in (0, 1, -signal.SIGTERM)
        assert "Traceback" not in (self.work.parent / "said.txt").read_text() or processes > 1
        return self.outcome(name, processes)

    def second(self, name, processes):
        with self.running(name, processes) as it:
            said = again(self.capsys, self.commands[name])
            assert not said or "another process is writing" in said, said
            assert it.wait(60) == 0
        return self.outcome(name, processes)

    # faults of the disk

    def full(self, name, processes):
        size = sum(len(content) for content in self.expected(name, 1).values()) * self.rng.uniform(0.05, 1.6)
        mount = ["mount", "-t", "tmpfs", "-o"]
        subprocess.run([*mount, f"size={int(size)}", "tmpfs", "."], check=True)
        os.chdir(self.work)
        try:
            said = again(self.capsys, self.commands[name])
            assert not said or "is the disk full?" in said or "are free" in said or "No space" in said, said
            subprocess.run([*mount, "remount,size=1g", "tmpfs", self.work], check=True)
            return self.outcome(name, 1)
        finally:
            os.chdir(self.work.parent)
            subprocess.run(["umount", "--lazy", self.work], check=True)
            os.chdir(self.work)

    def power(self, name, processes):
        rebuild(self.work, dict(self.rng.choice(self.disks[name])))
        return self.outcome(name, 1)

    def damage(self, name, processes):
        """A byte of a file that has checksums, or is compared; or the end of any file is missing."""
        while True:
            tree = dict(self.rng.choice([self.disks[name][-1], self.rng.choice(self.disks[name])]))
            cut = self.rng.random() < 0.5
            files = [path for path, content in tree.items() if content and (
                cut or path.endswith((".pt", ".npz", "log.jsonl")) or "done-" in path)]
            if files:
                break
        path = self.rng.choice(files)
        place, content = self.rng.randrange(len(tree[path])), tree[path]
        flipped = bytes([content[place] ^ 1 << self.rng.randrange(8)])
        tree[path] = content[:place] + (b"" if cut else flipped + content[place + 1 :])
        rebuild(self.work, tree)
        before, outcome = result(self.work), self.outcome(name, 1)
        if outcome == "DIFFERENT" and result(self.work) == before:  # is it noticed when used?
            user = {"training": ("sample", "--ckpt", path), "metrics": ("fid", path, "--ref", path),
                    "sampling": ("fid", path, "--ref", path),
                    "extraction": ("train", *TINY, "--data", "latents", "--max-steps", 1, "--repa-depth", 2,
                                   "--repa-encoder", "dinov2_vitt14")}
            said = again(self.capsys, user[name])
            noticed = path.split("/")[0 if name == "extraction" else -1] in said
            outcome = "a sentence, when used" if noticed else outcome
        return outcome if outcome != "DIFFERENT" else f"DIFFERENT: {path} {place} {cut}"


@pytest.mark.parametrize("kind", FAULTS)
def test_campaign(capsys, work, commands, kind):
    campaign, names, found = Campaign(capsys, work, commands), list(commands), collections.Counter()
    does = {"SIGKILL": campaign.kill, "SIGSTOP": campaign.stop, "SIGTERM": campaign.terminate,
            "second command": campaign.second, "full disk": campaign.full, "power cut": campaign.power,
            "damaged file": campaign.damage}[kind]
    for i in range(FAULTS[kind]):
        campaign.clear()
        name, processes = names[i % 4], 1 + i // 4 % 2
        try:
            outcome = does(name, processes)
        except AssertionError as error:
            outcome = f"FAILED: {first_line(error)}"
        found[outcome] += 1
        with capsys.disabled():
            print(f"{kind} {i}, {name} by {processes} process(es): {outcome}", flush=True)
    with capsys.disabled():
        print(f"| {kind} | {sum(found.values())} | {dict(found)} |", flush=True)
    assert found.keys() <= {"same bytes", "a sentence", "a sentence, when used"}
