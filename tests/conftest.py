"""Fixtures: images, a VAE of random weights, latents and a checkpoint, all tiny; ways to run the scripts; the
definition of what a training step draws."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DINOV2, DETECTOR = ROOT / "tests" / "data" / "dinov2", ROOT / "tests" / "data" / "detector.pt2"  # of the demo
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)
CUDA, VISIBLE = torch.cuda.is_available(), os.environ.get("CUDA_VISIBLE_DEVICES")
import extract_latents  # noqa: E402  (found only now)
import sample  # noqa: E402

UNSEEN = extract_latents.unseen_gpu()

TINY = ("--model", "SiT-Ti/4", "--batch-size", 4, "--sample-every", 0, "--log-every", 1,
        "--precision", "fp32", "--no-compile")


def pytest_collection_modifyitems(items):
    """Those of the GPU come first: torch remembers, for a whole process, whether it saw one."""
    items.sort(key=lambda item: "gpu" not in item.fixturenames)


def cli(capsys, script, *args):
    """Run a script's main() in this process: (status, stdout, stderr), both empty where capsys is None."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        capsys and capsys.readouterr()  # forget what was shown before
        try:
            status = extract_latents.run(importlib.import_module(script).main) or 0
        except SystemExit as stop:
            status = stop.code
        finally:
            list(map(signal.signal, handlers, handlers.values()))
    return status, *(capsys.readouterr() if capsys else ("", ""))


def process(script, *args, processes=0, check=True, **options):
    """Run a script as a user does, under torchrun if processes are given: a subprocess.CompletedProcess."""
    launch, environment = [sys.executable], {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launch, str(ROOT / f"{script}.py"), *map(str, args)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, **options)
    assert not check or run.returncode == 0, run.stderr[-6000:]
    return run


def message(err):
    """What stderr shows beside tqdm's bars: exactly one line."""
    lines = [line.split("\r")[-1].rstrip() for line in err.split("\n")]
    (line,) = [line for line in lines if line and not ("%|" in line and line.endswith("]"))]
    return line


def drawn_numbers(seed, step, batch_size, latent_shape):
    """(eps, noise, t, u of the label dropout, u of the teacher's time) of a step, from its definition."""
    base = int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0])
    g = torch.Generator().manual_seed((base + step) % 2**63)
    return (*torch.randn(2, batch_size, *latent_shape, generator=g), *torch.rand(3, batch_size, generator=g))


def drawn_rows(seed, step, batch_size, count):
    """The rows of a training step: the next batch_size of the epochs' permutations, one after another."""
    places = [divmod(position, count) for position in range(step * batch_size, (step + 1) * batch_size)]
    return [int(np.random.default_rng([seed, 2, epoch]).permutation(count)[place]) for epoch, place in places]


def write_set(folder, channels=4, size=8, image_size=32, count=12, **about):
    """Random latents and images of 10 classes, as extract_latents.py stores them."""
    rng, shape = np.random.default_rng(0), (count, channels, size, size)
    drawn = np.concatenate([rng.normal(1, 2, shape), rng.uniform(0.5, 1.5, shape)], 1).astype(np.float16)
    about = {"vae": "nobody/nothing", "shift": np.linspace(-0.5, 1.5, channels).tolist(),
             "scale": np.linspace(0.25, 2, channels).tolist(), "num_classes": 10, "files_sha256": "", **about}
    folder.mkdir(parents=True)
    np.save(folder / "moments.npy", drawn)
    np.save(folder / "labels.npy", np.arange(count) % 10)
    np.save(folder / "images.npy", rng.integers(0, 256, (count, image_size, image_size, 3), np.uint8))
    (folder / "latents.json").write_text(json.dumps(about))
    return folder


class Killed(BaseException):
    """Raised by tests where a process is to die."""


def on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# as `process` starts torch, for comparisons byte by byte; the quickest for small models
one_thread = pytest.fixture(on_one_thread)
all_on_one_thread = pytest.fixture(on_one_thread, scope="module")


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu():
    """A GPU has other random numbers and rounds otherwise, and two processes need two of them: tests and
    what they start see none, except where they ask for `gpu`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture
def under_torchrun(monkeypatch):
    """What a script finds as the only process of torchrun: its store, and these variables."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port,
                        "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def few_steps(monkeypatch):
    """Samplers take 2 steps, whatever they are told, where nobody looks at what they draw."""
    for name in ("sample_sde", "sample_ode"):
        real = getattr(sample, name)
        monkeypatch.setattr(sample, name, lambda *x, real=real, **how: real(*x, **{**how, "num_steps": 2}))


def tiny_encoder():
    """What "dinov2_vitt14" is to the scripts in tests."""
    torch.manual_seed(0)
    return torch.hub.load(str(DINOV2), "dinov2_vitt14", source="local", pretrained=False)


@pytest.fixture(scope="session", autouse=True)
def hub(tmp_path_factory):
    """torch.hub's folder, as it is once a network with DINOv2's interface and its weights were downloaded."""
    home = tmp_path_factory.mktemp("torch")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(DINOV2, home / "hub" / "facebookresearch_dinov2_main", ignore=ignored)
    (home / "hub" / "checkpoints").mkdir()
    torch.save(tiny_encoder().state_dict(), home / "hub" / "checkpoints" / "dinov2_vitt14_pretrain.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        yield home / "hub"


@pytest.fixture
def gpu(monkeypatch):
    """Lets a test see the GPUs, without TF32; skips it where there are none."""
    if UNSEEN:
        pytest.fail("there is a GPU, and torch does not see it")
    if not CUDA:
        pytest.skip("needs a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # of what a test starts
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if VISIBLE is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "latents")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 3 class folders with 12 images in all, 40 x 36 pixels of smooth random colour."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        (root / f"class{i % 3}").mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        small.resize((40, 36), Image.Resampling.BICUBIC).save(root / f"class{i % 3}" / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A folder with a diffusers AutoencoderKL of random weights: 3 x 32 x 32 images, 4 x 8 x 8 latents."""
    from diffusers import AutoencoderKL  # slow to import

    torch.manual_seed(0)
    folder, blocks = tmp_path_factory.mktemp("vae"), {"layers_per_block": 1, "norm_num_groups": 4}
    AutoencoderKL(3, 3, ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3, (8, 16, 16), **blocks,
                  scaling_factor=0.5, shift_factor=0.25).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def latents(tmp_path_factory, images, vae):
    """The images, encoded by extract_latents.py."""
    out = tmp_path_factory.mktemp("data") / "latents"
    flags = ("--images", images, "--vae", vae, "--image-size", 32, "--out", out, "--num-workers", 1)
    assert cli(None, "extract_latents", *flags)[0] == 0
    return out


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, latents):
    """A checkpoint of train.py after 4 steps."""
    flags = ("--run-dir", run := tmp_path_factory.mktemp("run"), "--max-steps", 4, "--lr", 1e-3)
    assert cli(None, "train", *TINY, "--data", latents, *flags)[0] == 0
    return run / "checkpoints" / "0000004.pt"
