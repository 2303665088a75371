"""On a GPU, else skipped: training, resumed, under torchrun, compiled and in bf16, is the run of eager
float32 to rounding, and so is attention; samples, extraction, Inception and programs are those of float32 or
the CPU; the benchmark runs."""

import json
from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, cli, process
from test_alignments import METHODS, flags_of
from test_fid import inception  # noqa: F401  (a fixture)
from test_repa_e import common, programs, tuning  # noqa: F401
from test_sample import tiny  # noqa: F401
from test_train import assert_close_run, fit, log
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import train
from extract_latents import init_distributed
from models import load_program

pytestmark = pytest.mark.usefixtures("gpu")
ROUNDED = ("--precision", "bf16", "--compile")


def test_resume_under_torchrun(data, tmp_path):
    """Data, noise, dropout and weights, in float32, with DDP of one process and on two GPUs, if there are
    two; and about so in bf16, compiled."""
    flags, two = (*TINY, "--data", data, "--lr", 1e-4, "--max-steps"), min(torch.cuda.device_count(), 2)
    for run, steps, processes, more in (
            ("whole", 6, 0, ()), ("one", 6, 1, ()), ("halves", 3, two, ()), ("halves", 6, two, ()),
            ("rounded by one", 6, 1, ROUNDED), ("rounded", 6, two, ROUNDED)):
        process("train", *flags, steps, "--run-dir", tmp_path / run, *more, processes=processes)
    for run in ("one", "halves"):
        assert_close_run(tmp_path / "whole", tmp_path / run, 6)
    for run in ("rounded by one", "rounded"):
        for a, b in zip(log(tmp_path / run), log(tmp_path / "whole"), strict=True):
            assert a["denoising"] == pytest.approx(b["denoising"], rel=0.03)
            assert a["memory_gib"] > 0


def test_attention():
    """Of SiT-XL/2's shape in bf16, strided as SiT has it, by the kernel that torch takes after
    `init_distributed`: output and gradients are float32's, of plain products, but for bf16's rounding."""
    init_distributed()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.manual_seed(0)
    qkv = 2 * torch.randn(32, 256, 3 * 16 * 72, device="cuda").bfloat16()
    weight, results = torch.randn(32, 256, 16, 72, device="cuda").bfloat16().transpose(1, 2), []
    for dtype, kernels in ((torch.float32, [SDPBackend.MATH]), (torch.bfloat16, None)):
        x = qkv.to(dtype).requires_grad_()
        q, k, v = (part.reshape(32, 256, 16, 72).transpose(1, 2) for part in x.chunk(3, dim=-1))
        with sdpa_kernel(kernels) if kernels else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v)
            y.backward(weight.to(dtype))
        results.append((y, *x.grad.chunk(3, dim=-1)))
    for ours, exact in zip(results[1], results[0]):
        assert ours.isfinite().all() and (ours.float() - exact).norm() < 0.01 * exact.norm()


def test_compiled_is_eager(capsys, data, tmp_path):
    """All three methods' losses and gradients, in float32."""
    flags = ("--batch-size", 8, "--max-steps", 3, "--lr", 1e-4, *flags_of(METHODS))
    fit(capsys, data, tmp_path / "compiled", *flags, "--compile")
    fit(capsys, data, tmp_path / "eager", *flags)
    assert_close_run(tmp_path / "compiled", tmp_path / "eager", 3)


def test_bf16(capsys, monkeypatch, data, tmp_path):
    """All three methods' losses; weights stay float32."""
    autocast, losses = [], train.training_losses
    monkeypatch.setattr(train, "training_losses", lambda *inputs: autocast.append(
        torch.is_autocast_enabled("cuda")) or losses(*inputs))
    flags = ("--batch-size", 12, "--max-steps", 4, "--lr", 1e-3, *flags_of(METHODS))
    rounded, state = fit(capsys, data, tmp_path / "bf16", *flags, *ROUNDED)
    exact, _ = fit(capsys, data, tmp_path / "fp32", *flags)
    assert autocast == [True] * 4 + [False] * 4
    assert_rounded(rounded, exact, ("denoising", *METHODS), 0.03, 0.01)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in state["ema"].values())


def assert_rounded(rounded, exact, names, rel, absolute):
    for a, b in zip(rounded, exact, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=rel, abs=absolute), name


def test_a_tuned_vae(capsys, tuning, common, tmp_path):  # noqa: F811
    flags = (*common, "--max-steps", 4, "--sample-every", 4, "--lr", 1e-4)
    rounded, state = fit(capsys, tuning[0], tmp_path / "bf16", *flags, *ROUNDED)
    exact, _ = fit(capsys, tuning[0], tmp_path / "fp32", *flags)
    process("train", *TINY, "--data", tuning[0], *flags, *ROUNDED, "--run-dir", tmp_path / "one", processes=1)
    for run in (rounded, log(tmp_path / "one")):
        assert_rounded(run, exact, ("l1", "kl", "tune_repa", "lpips", "denoising", "repa"), 0.05, 0.05)
    assert all(x.isfinite().all() for part in ("ema", "tuned") for x in state[part].values())


def test_samples(capsys, tiny, tmp_path):  # noqa: F811
    """Compiled: the images of eager float32; bf16 differs by less than three grey levels."""
    flags = ("--ckpt", tiny, "--num-samples", 5, "--batch-size", 3, "--num-steps", 4, "--cfg-scale", 2,
             "--guidance-interval", 0, 0.5)
    images = []
    for more in (("fp32", "--no-compile"), ("fp32", "--compile"), ("bf16", "--compile")):
        out = tmp_path / f"{len(images)}.npz"
        status, _, err = cli(capsys, "sample", *flags, "--out", out, "--precision", *more)
        assert status == 0, err
        with np.load(out) as file:
            images.append(file["arr_0"].astype(int))
    assert images[0].std() > 5
    assert np.abs(images[1] - images[0]).mean() < 0.05 and np.abs(images[2] - images[0]).mean() < 3


def test_extraction(capsys, images, vae, latents, tmp_path):
    """The moments of the CPU."""
    flags = ("--images", images, "--vae", vae, "--image-size", 32, "--out", tmp_path / "latents")
    status, _, err = cli(capsys, "extract_latents", *flags)
    assert status == 0, err
    ours, expected = (np.load(folder / "moments.npy").astype(float)
                      for folder in (tmp_path / "latents", latents))
    assert np.abs(ours - expected).max() < 2e-3 * np.abs(expected).max()


def test_inception(inception):  # noqa: F811
    """The CPU's features."""
    network, x = inception[0], torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    ours, expected = deepcopy(network).to("cuda")(x.to("cuda")), network(x)
    for name, value in expected.items():
        assert (ours[name].cpu() - value).norm() < 1e-4 * value.norm(), name


def test_programs(programs):  # noqa: F811
    """Of torch.export, such as detectors and REPA's encoders: the CPU's outputs."""
    for path, size in programs:
        x = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
        ours, expected = load_program(path, "cuda")(x.to("cuda")), load_program(path, "cpu")(x)
        for a, b in zip(*map(tree_leaves, (ours, expected)), strict=True):
            assert a.device.type == "cuda" and (a.cpu() - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("mode", [
    "train --methods plain VAE-REPA --batch-size 8 --steps 2 --micro-batch 4 8", "profile --steps 2",
    "train --methods VAE-REPA --batch-size 8 --steps 2 --micro-batch 8 --attention cudnn",
    "memory --methods VAE-REPA REPA-E"])
def test_benchmark(capsys, mode, tmp_path):
    flags = "--model SiT-Ti/2 --repeats 1".split()
    files = "--vae", ROOT / "tests" / "data" / "vae", "--json", tmp_path / "b.json"
    status, _, err = cli(capsys, "benchmark", *mode.split(), *flags, *files)
    assert status == 0, err
    written = json.loads((tmp_path / "b.json").read_text())
    for column in written["figures"].values():
        assert all(np.isfinite(value) and value >= 0 for value in column.values())
    if mode.startswith("train") and torch.cuda.get_device_capability() >= (9, 0):
        kernel = "cudnn" if "cudnn" in mode else "flash"
        assert any(kernel in name for name in written["made_with"]["attention kernels"])
