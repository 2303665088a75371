"""Fixtures: a tiny image set, a tiny VAE with random weights, latents and a checkpoint made of them by the real scripts."""

import importlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)
import extract_latents  # noqa: E402  (found only now)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long campaigns, run only where -m names them: `python -m pytest tests -m slow -s`")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run it with -m slow -s"))


def cli(capsys, script, *args):
    """Run a script's main() in this process with the given flags: (exit status, stdout, stderr)."""
    argv, sys.argv = sys.argv, [f"{script}.py", *map(str, args)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    capsys.readouterr()
    try:
        extract_latents.run(importlib.import_module(script).main)
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, *capsys.readouterr()


def process(script, *args, processes=1, check=True, **options):
    """Run a script as a user does, under torchrun if more than one process is asked for: a subprocess.CompletedProcess."""
    launch = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if processes > 1:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # a machine may have one GPU alone
    run = subprocess.run([*launch, str(ROOT / f"{script}.py"), *map(str, args)], capture_output=True, text=True,
                         env=environment, **options)
    assert not check or run.returncode == 0, run.stderr[-6000:]
    return run


def message(err):
    """What stderr shows beside tqdm's bars: exactly one line."""
    lines = [line.split("\r")[-1] for line in err.split("\n")]
    lines = [line for line in lines if line.strip() and not ("%|" in line and line.rstrip().endswith("]"))]
    assert len(lines) == 1, err
    return lines[0]


def drawn_numbers(seed, step, batch_size, latent_shape):
    """(eps, noise, t, u of the label dropout, u of the teacher's time) of a training step, from its definition.

    A run is the same run in every later version only if these stay as they are.
    """
    base = int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0])
    g = torch.Generator().manual_seed((base + step) % 2**63)
    eps, noise = torch.randn(2, batch_size, *latent_shape, generator=g)
    t, u_drop, u_teacher = torch.rand(3, batch_size, generator=g)
    return eps, noise, t, u_drop, u_teacher


def drawn_rows(seed, step, batch_size, count, flip=False):
    """The rows of a training step: the next batch_size of the epochs' permutations, one after another."""
    rows = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        rows.append(int(np.random.default_rng([seed, 2, epoch]).permutation(count)[place]))
    if flip:
        mirrored = np.random.default_rng([seed, 3, step]).integers(2, size=batch_size)
        rows = [int(row + count * mirror) for row, mirror in zip(rows, mirrored)]
    return rows


class Killed(BaseException):
    """Raised by tests where a process is to die."""


@pytest.fixture
def one_thread():
    """Torch on one thread, as `process` starts it, for comparisons byte by byte."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 3 class folders with 12 images in all, 40 x 36 pixels of smooth random colour."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        folder = root / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        small.resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A local folder with a diffusers AutoencoderKL of random weights: 3 x 32 x 32 images, 4 x 8 x 8 latents."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4,
                  up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.5, shift_factor=0.25).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def latents(tmp_path_factory, images, vae):
    """The images, encoded by extract_latents.py."""
    out = tmp_path_factory.mktemp("data") / "latents"
    process("extract_latents", "--images", images, "--vae", vae, "--image-size", 32, "--out", out, "--num-workers", 1)
    return out


TINY = ("--model", "SiT-Ti/4", "--batch-size", 4, "--sample-every", 0, "--log-every", 1, "--precision", "fp32",
        "--no-compile")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, latents):
    """A checkpoint of train.py after 4 steps."""
    run = tmp_path_factory.mktemp("run")
    process("train", *TINY, "--data", latents, "--run-dir", run, "--max-steps", 4, "--lr", 1e-3)
    return run / "checkpoints" / "0000004.pt"
