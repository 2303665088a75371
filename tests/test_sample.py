"""sample.py: the samplers against a field whose solution is known, guidance, one stream per image, outputs that
continue and that no batch size or number of processes changes, published checkpoints, and bad input."""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import models
import sample
from conftest import ROOT, Killed, cli, message, process
from extract_latents import load_vae, rng
from models import SiT_models, to_bf16
from sample import guided_velocity, load_model, sample_images, sample_ode, sample_sde


# Data N(mean, std^2) in every element: v = E[noise - x | x_t] is linear in x_t, and x_t is Gaussian at every t

MEAN, STD = 1.5, 0.4
LABELS = torch.tensor([3, 5])


def gaussian_velocity(x, t, mean=MEAN, std=STD):
    variance = (1 - t) ** 2 * std**2 + t**2
    return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)


class GaussianModel:
    """The exact field; the null class, 10, is other data. It notes the t and the labels of every call."""

    num_classes = 10

    def __init__(self):
        self.times, self.labels = [], []

    def __call__(self, x, t, y):
        assert len(x) == len(t) == len(y) and (t == t[0]).all()
        self.times.append(float(t[0]))
        self.labels.append(y.tolist())
        t, null = t.view(-1, 1, 1, 1), (y == self.num_classes).view(-1, 1, 1, 1)
        return torch.where(null, gaussian_velocity(x, t, -0.5, 0.8), gaussian_velocity(x, t))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(count):
    return [torch.Generator().manual_seed(7 + i) for i in range(count)]


def ode_errors(heun):
    """The largest distance from the exact flow, z at t = 1 to mean + std z at t = 0, in 50, 100 and 200 steps."""
    z = draw(2, 4, 8, 8)
    return [(sample_ode(GaussianModel(), z, LABELS, num_steps=steps, heun=heun) - (MEAN + STD * z)).abs().max().item()
            for steps in (50, 100, 200)]


def test_euler_is_of_first_order():
    errors = ode_errors(heun=False)
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[2] == pytest.approx(2, rel=0.1)
    assert 1e-4 < errors[2] < 0.02


def test_heun_is_of_second_order():
    errors = ode_errors(heun=True)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1) and errors[1] / errors[2] == pytest.approx(4, rel=0.1)
    assert errors[2] < 1e-3


@pytest.mark.parametrize("heun", [False, True])
def test_ode_times(heun):
    model = GaussianModel()
    sample_ode(model, draw(2, 4, 2, 2), LABELS, num_steps=4, heun=heun)
    assert model.times == ([1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0] if heun else [1, 0.75, 0.5, 0.25])
    model.times.clear()
    sample_ode(model, draw(2, 4, 2, 2), LABELS, heun=heun)
    assert len(model.times) == (500 if heun else 250)


def test_sde_times():
    """250 evaluations: t = 1 down to 0.04, from where the last step goes to 0."""
    model = GaussianModel()
    sample_sde(model, draw(2, 4, 2, 2), LABELS)
    assert_allclose(model.times, np.linspace(1, 0.04, 250), rtol=1e-12)


def repa_euler_maruyama(model, z, y, num_steps, generators, cfg_scale=1.0, low=0.0, high=1.0):
    """REPA's sampler, step by step: guidance on the drift, noise in all steps but the last."""
    t_steps = [1 - (1 - 0.04) * i / (num_steps - 1) for i in range(num_steps)] + [0.0]
    x = z
    for i, (t_cur, t_next) in enumerate(zip(t_steps[:-1], t_steps[1:])):
        drifts = []
        for labels in (y, torch.full_like(y, 10)):
            v = model(x, torch.full((len(x),), t_cur, dtype=x.dtype), labels)
            reverse_alpha_ratio = (1 - t_cur) / -1
            score = (reverse_alpha_ratio * v - x) / (t_cur**2 - reverse_alpha_ratio * t_cur)
            drifts.append(v - 0.5 * (2 * t_cur) * score)
        drift, null = drifts
        if cfg_scale > 1 and low <= t_cur <= high:
            drift = null + cfg_scale * (drift - null)
        x = x + drift * (t_next - t_cur)
        if i < num_steps - 1:
            eps = torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in generators])
            x = x + (2 * t_cur) ** 0.5 * eps * abs(t_next - t_cur) ** 0.5
    return x


@pytest.mark.parametrize("scale, low, high", [(1.0, 0.0, 1.0), (1.8, 0.0, 0.7), (4.0, 0.3, 1.0)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_sde_equals_repa(scale, low, high, dtype, tolerance):
    z = draw(2, 4, 8, 8).to(dtype)
    expected = repa_euler_maruyama(GaussianModel(), z, LABELS, 250, seeded(2), scale, low, high)
    x = sample_sde(GaussianModel(), z, LABELS, cfg_scale=scale, guidance_interval=(low, high), generators=seeded(2))
    assert x.dtype == dtype
    torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


def test_sde_draws_the_data():
    """Mean and std of 160 000 values, to 4 standard errors and the first-order error of 250 steps."""
    torch.manual_seed(0)
    z = draw(16, 4, 50, 50)
    x = sample_sde(GaussianModel(), z, torch.zeros(16, dtype=torch.long))
    n = x.numel()
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / n**0.5 + 0.005)
    assert x.std().item() == pytest.approx(STD, abs=4 * STD / (2 * n) ** 0.5 + 0.005)
    assert np.corrcoef(x.flatten(), z.flatten())[0, 1] < 0.5  # the ODE would keep it at 1


def test_last_sde_step_adds_no_noise():
    """5 steps take 4 draws from an image's stream."""
    g, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    sample_sde(GaussianModel(), draw(1, 4, 2, 2), LABELS[:1], num_steps=5, generators=[g])
    for _ in range(4):
        torch.randn(4, 2, 2, generator=other, dtype=torch.float64)
    assert torch.equal(g.get_state(), other.get_state())


def test_state_stays_in_float32():
    """Under bf16 only the model's own output is rounded."""
    def rounded(x, t, y):
        return GaussianModel()(x, t, y).bfloat16()

    z = draw(2, 4, 8, 8).float()
    for x in (sample_sde(rounded, z, LABELS, generators=seeded(2)), sample_ode(rounded, z, LABELS)):
        assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())


# Guidance


def test_guidance_formula_and_null_class():
    """v0 + s (v - v0), where v0 is the velocity of the class num_classes and not of 1000."""
    model, x, t = GaussianModel(), draw(2, 4, 2, 2), 0.4
    v = guided_velocity(model, x, t, LABELS, 2.5, (0.0, 1.0))
    v_class, v_null = gaussian_velocity(x, t), gaussian_velocity(x, t, -0.5, 0.8)
    torch.testing.assert_close(v, v_null + 2.5 * (v_class - v_null), rtol=1e-12, atol=1e-12)
    assert model.labels == [[3, 5, 10, 10]]


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.25, 0.5), (0.5, 0.5), (0.3, 0.7), (0.51, 0.74)])
def test_guidance_interval_of_the_ode(low, high, heun):
    """Only calls inside, edges included, hold the null class; Heun's second slope is judged at its own time."""
    model, options = GaussianModel(), {"cfg_scale": 1.5, "guidance_interval": (low, high), "heun": heun}
    sample_ode(model, draw(2, 4, 2, 2), LABELS, num_steps=4, **options)
    times = [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0] if heun else [1, 0.75, 0.5, 0.25]
    assert model.labels == [[3, 5, 10, 10] if low <= t <= high else [3, 5] for t in times]


def test_guidance_interval_of_the_sde():
    """0.04 is the last time, and an edge of the interval."""
    model, options = GaussianModel(), {"cfg_scale": 1.8, "guidance_interval": (0.04, 0.7)}
    sample_sde(model, draw(2, 4, 2, 2), LABELS, num_steps=25, **options)
    assert [len(labels) for labels in model.labels] == [4 if t <= 0.7 else 2 for t in np.linspace(1, 0.04, 25)]


def test_heun_with_guidance():
    """One step from 1 to 0, guided at its end alone."""
    z = draw(2, 4, 2, 2)
    options = {"cfg_scale": 3.0, "guidance_interval": (0.0, 0.5), "heun": True}
    first = gaussian_velocity(z, 1.0)
    v, v_null = gaussian_velocity(z - first, 0.0), gaussian_velocity(z - first, 0.0, -0.5, 0.8)
    expected = z - (first + v_null + 3 * (v - v_null)) / 2
    torch.testing.assert_close(sample_ode(GaussianModel(), z, LABELS, num_steps=1, **options), expected)


@pytest.mark.parametrize("sampler", [sample_sde, sample_ode])
def test_scale_1_never_calls_the_null_class(sampler):
    model = GaussianModel()
    sampler(model, draw(2, 4, 2, 2), LABELS, num_steps=10, cfg_scale=1.0)
    assert model.labels == [[3, 5]] * 10


# One stream per image, with a model whose output depends on x, t and y


def lively(name, num_classes=10, latent=8, seed=0, **head):
    """A SiT whose every parameter is random, those that start at zero too: noise and class show in its images."""
    torch.manual_seed(seed)
    model = SiT_models[name](input_size=latent, num_classes=num_classes, **head).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    torch.nn.init.normal_(model.y_embedder.embedding_table.weight)
    return model


def settings_for(model_name, vae, num_classes=10, latent=8, **others):
    data = {"vae": str(vae), "shift": 0.25, "scale": 0.5, "num_classes": num_classes}
    return {"model": model_name, "data": {**data, "latent_shape": [4, latent, latent]}, **others}


@pytest.fixture(scope="module")
def weights():
    return lively("SiT-Ti/4").state_dict()


@pytest.fixture(scope="module")
def tiny(vae, weights, tmp_path_factory):
    """A checkpoint of a lively SiT-Ti/4 with 10 classes; it also holds a model, whose weights differ."""
    path = tmp_path_factory.mktemp("tiny") / "run" / "checkpoints" / "0000007.pt"
    path.parent.mkdir(parents=True)
    torch.save({"model": lively("SiT-Ti/4", seed=1).state_dict(), "ema": weights, "opt": {}, "step": 7,
                "settings": settings_for("SiT-Ti/4", vae)}, path)
    return path


def draw_rows(ckpt, vae, rows, y, seed=0, **options):
    model, settings = load_model(ckpt)
    return sample_images(model, load_vae(str(vae)), settings["data"], rows, y, seed, "fp32", num_steps=4, **options).numpy()


def close(a, b):
    """Equal to one grey level."""
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_streams():
    """Equal for equal (seed, index), and different for any other; train.py's seeds are lists."""
    def start(seed, i):
        return tuple(torch.randn(4, generator=rng(seed, i, "cpu")).tolist())

    seeds = [0, 1, 2, 2**40, [0, 1], [1, 1], [1, 2]]
    assert len({start(seed, i) for seed in seeds for i in range(50)}) == 50 * len(seeds)
    assert start(1, 7) == start(1, 7) and start([1, 1], 7) == start([1, 1], 7)


@pytest.mark.parametrize("options", [{"mode": "sde"}, {"mode": "ode"},
                                     {"cfg_scale": 2.0, "guidance_interval": (0.0, 0.7)}], ids=str)
def test_rows_do_not_depend_on_their_batch(tiny, vae, options):
    y = [0, 3, 9, 3, 5]
    batch = draw_rows(tiny, vae, range(5), y, **options)
    assert np.abs(batch[1].astype(int) - batch[3]).mean() > 5  # the same class, another image
    assert close(draw_rows(tiny, vae, [4, 2, 0], [5, 9, 0], **options), batch[[4, 2, 0]])
    for i in range(5):
        assert close(draw_rows(tiny, vae, [i], [y[i]], **options), batch[i : i + 1])


def test_latents_do_not_depend_on_their_batch(tiny):
    model, y = load_model(tiny)[0], torch.tensor([0, 3, 9])

    def latents(rows):
        generators = [rng(0, i, "cpu") for i in rows]
        z = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
        return sample_sde(model, z, y[rows], num_steps=20, generators=generators)

    batch = latents([0, 1, 2])
    torch.testing.assert_close(latents([2, 1, 0]).flip(0), batch, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([latents([i]) for i in range(3)]), batch, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sde", "ode", "heun"])
def test_sample_images_decodes_what_the_sampler_draws(tiny, vae, mode):
    """Noise first, then the steps, from one stream per image; z = x / scale + shift, decoded and rounded."""
    model, decoder, y = load_model(tiny)[0], load_vae(str(vae)), torch.tensor([1, 8])
    generators = [rng(5, i, "cpu") for i in (2, 3)]
    z = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
    if mode == "sde":
        x = sample_sde(model, z, y, num_steps=4, generators=generators)
    else:
        x = sample_ode(model, z, y, num_steps=4, heun=mode == "heun")
    with torch.no_grad():
        pixels = (decoder.decode(x / 0.5 + 0.25).sample + 1) * 127.5
    expected = torch.floor(pixels + 0.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    images = draw_rows(tiny, vae, [2, 3], [1, 8], seed=5, mode=mode)
    assert images.dtype == np.uint8 and images.std() > 5
    assert close(images, expected) and (images == expected).mean() > 0.999


# The command line


STEPS = ("--num-steps", 4)


def run_sample(capsys, ckpt, out, *args):
    """The path that sample.py prints."""
    status, stdout, err = cli(capsys, "sample", "--ckpt", ckpt, *STEPS, *(["--out", out] if out else []), *args)
    assert status == 0, err
    return Path(stdout.strip().split("\n")[-1])


def read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


def read_folder(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def random_labels(seed, count):
    return [int(np.random.default_rng([seed, i]).integers(10)) for i in range(count)]


@pytest.fixture(scope="module")
def ten(tiny, tmp_path_factory):
    """10 samples of random classes, batch 10, by the real command."""
    out = tmp_path_factory.mktemp("ten") / "ten.npz"
    process("sample", "--ckpt", tiny, *STEPS, "--num-samples", 10, "--batch-size", 10, "--out", out)
    return out


def test_npz(ten, tiny, vae):
    """arr_0 is uint8 NHWC; row i is image i of the stream, of a random class that depends on (seed, i)."""
    images, y = read_npz(ten), random_labels(0, 10)
    assert images.dtype == np.uint8 and images.shape == (10, 32, 32, 3) and len(set(y)) > 3
    assert close(images, draw_rows(tiny, vae, range(10), y))
    assert sorted(path.name for path in ten.parent.iterdir()) == ["ten.npz", "ten.npz.json"]


def test_batch_size_and_processes_do_not_change_samples(capsys, ten, tiny, tmp_path):
    images = read_npz(ten)
    assert np.abs(images[0].astype(int) - images[1]).mean() > 5
    three = run_sample(capsys, tiny, tmp_path / "3.npz", "--num-samples", 10, "--batch-size", 3)
    assert close(read_npz(three), images)
    out = tmp_path / "two.npz"
    process("sample", "--ckpt", tiny, *STEPS, "--num-samples", 10, "--batch-size", 3, "--out", out, processes=2)
    assert close(read_npz(out), images)
    fewer = run_sample(capsys, tiny, tmp_path / "4.npz", "--num-samples", 4)
    assert close(read_npz(fewer), images[:4])


def test_seed_changes_images_and_labels(capsys, ten, tiny, vae, tmp_path):
    other = read_npz(run_sample(capsys, tiny, tmp_path / "seed.npz", "--num-samples", 10, "--seed", 1))
    distances = np.abs(other.astype(int)[:, None] - read_npz(ten)).mean(axis=(2, 3, 4))
    assert (distances > 3).all()  # no image is any of the others
    assert random_labels(0, 10) != random_labels(1, 10)
    assert close(other, draw_rows(tiny, vae, range(10), random_labels(1, 10), seed=1))


def test_bf16_weights_change_no_bit(tiny):
    """Kept in bf16 once, or rounded by autocast in every call: the same latents."""
    model, y = load_model(tiny)[0], torch.tensor([0, 3])
    latents = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(sample_sde(model, draw(2, 4, 8, 8).float(), y, 8, 2.0, (0.0, 0.7), seeded(2)))
        to_bf16(model)
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16 and latents[0].dtype == torch.float32
    assert torch.equal(*latents)
    exact = sample_sde(load_model(tiny)[0], draw(2, 4, 8, 8).float(), y, 8, 2.0, (0.0, 0.7), seeded(2))
    assert 0 < (latents[0] - exact).norm() / exact.norm() < 0.05


def test_bf16_on_the_command_line(capsys, ten, tiny, vae, tmp_path):
    rounded = read_npz(run_sample(capsys, tiny, tmp_path / "a.npz", "--num-samples", 10, "--precision", "bf16"))
    distance = np.abs(rounded.astype(int) - read_npz(ten)).mean()
    assert 0 < distance < 3, distance  # grey levels


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_compiled_samples_are_the_same(capsys, ten, tiny, tmp_path, monkeypatch):
    """Blocks and final layer, for each size of batch: guided, not guided, and the short one at the end."""
    compiled, real = [], torch.nn.Module.compile

    def noting(layer, **how):
        compiled.append((layer, how))
        real(layer, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", noting)
    flags = ("--num-samples", 10, "--batch-size", 4, "--cfg-scale", 2, "--guidance-interval", 0, 0.5)
    images = read_npz(run_sample(capsys, tiny, tmp_path / "compiled.npz", *flags, "--compile"))
    assert [type(layer) for layer, _ in compiled] == [models.SiTBlock] * 6 + [models.FinalLayer]
    assert all(how == {"dynamic": False} for _, how in compiled)
    eager = read_npz(run_sample(capsys, tiny, tmp_path / "eager.npz", *flags, "--no-compile"))
    run_sample(capsys, tiny, tmp_path / "grid.png", "--classes", 1, "--per-class", 1, "--compile")
    assert len(compiled) == 7  # none more: a grid is drawn sooner than layers compile
    assert close(images, eager) and not close(images, read_npz(ten))


def test_class_balanced(capsys, tiny, vae, tmp_path):
    images = read_npz(run_sample(capsys, tiny, tmp_path / "even.npz", "--num-samples", 12, "--class-balanced"))
    assert close(images, draw_rows(tiny, vae, range(12), [i % 10 for i in range(12)]))


def test_grid_folder_and_npz_hold_the_same_pixels(capsys, tiny, vae, tmp_path):
    args = ("--classes", 3, 9, "--per-class", 3)
    images = read_npz(run_sample(capsys, tiny, tmp_path / "a.npz", *args))
    assert close(images, draw_rows(tiny, vae, range(6), [3, 3, 3, 9, 9, 9]))
    folder = run_sample(capsys, tiny, tmp_path / "folder", *args)
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:06d}.png" for i in range(6)]
    assert_array_equal(read_folder(folder), images)
    grid = np.asarray(Image.open(run_sample(capsys, tiny, tmp_path / "grid.png", *args)))  # a row per class
    assert_array_equal(grid, images.reshape(2, 3, 32, 32, 3).swapaxes(1, 2).reshape(64, 96, 3))


def test_a_grid_of_any_number(capsys, tiny, vae, tmp_path):
    """Random classes as a grid too: the rest of the last row is black."""
    out = run_sample(capsys, tiny, tmp_path / "a.png", "--num-samples", 5, "--per-class", 3)
    grid = np.asarray(Image.open(out)).reshape(2, 32, 3, 32, 3).swapaxes(1, 2).reshape(6, 32, 32, 3)
    assert close(grid[:5], draw_rows(tiny, vae, range(5), random_labels(0, 5))) and not grid[5].any()


def test_default_grid(capsys, tiny, vae):
    """Every class of ten, 8 images each, into the run's samples/, under a name that tells the settings apart."""
    out = run_sample(capsys, tiny, None)
    assert out.parent == tiny.parent.parent / "samples" and out.suffix == ".png"
    grid = np.asarray(Image.open(out)).reshape(10, 32, 8, 32, 3).swapaxes(1, 2).reshape(80, 32, 32, 3)
    assert close(grid, draw_rows(tiny, vae, range(80), [c for c in range(10) for _ in range(8)]))
    names = [out]
    for more in (["--seed", 1], ["--cfg-scale", 2], ["--cfg-scale", 2, "--guidance-interval", 0, 0.5],
                 ["--mode", "ode"], ["--mode", "heun"], ["--num-steps", 3], ["--num-samples", 1]):
        names.append(run_sample(capsys, tiny, None, *([] if "--num-samples" in more else ["--per-class", 1]), *more))
    assert len(set(names)) == 8 and names[-1].suffix == ".npz"


@pytest.mark.parametrize("args, options", [
    (["--cfg-scale", 3, "--guidance-interval", 0.2, 0.8], {"cfg_scale": 3.0, "guidance_interval": (0.2, 0.8)}),
    (["--mode", "ode"], {"mode": "ode"}),
    (["--mode", "heun", "--cfg-scale", 2], {"mode": "heun", "cfg_scale": 2.0})], ids=str)
def test_guidance_and_mode_reach_the_sampler(capsys, tiny, vae, tmp_path, args, options):
    images = read_npz(run_sample(capsys, tiny, tmp_path / "a.npz", "--classes", 1, 2, "--per-class", 1, *args))
    assert close(images, draw_rows(tiny, vae, [0, 1], [1, 2], **options))
    assert not close(images, draw_rows(tiny, vae, [0, 1], [1, 2]))


def test_another_vae(capsys, tiny, vae, tmp_path):
    """--vae replaces the decoder; shift and scale stay those of the latents that the model was trained on."""
    other = load_vae(str(vae))
    other.decoder.conv_out.bias.data += 0.2
    other.register_to_config(scaling_factor=7.0, shift_factor=3.0)
    other.save_pretrained(tmp_path / "vae")
    args = ("--classes", 1, 2)
    images = read_npz(run_sample(capsys, tiny, tmp_path / "a.npz", *args)).astype(int)
    shifted = read_npz(run_sample(capsys, tiny, tmp_path / "b.npz", *args, "--vae", tmp_path / "vae")).astype(int)
    inside = (images > 0) & (images < 229)
    assert inside.mean() > 0.5 and abs(shifted - images - 25.5)[inside].max() <= 1.5


def test_killed_it_continues(capsys, tiny, tmp_path, monkeypatch, one_thread):
    """Killed, it draws only the batches that are missing, and the array is that of an undisturbed run."""
    many = ["--num-samples", 80, "--batch-size", 2, "--num-steps", 25]
    whole = read_npz(run_sample(capsys, tiny, tmp_path / "whole.npz", *many))
    out, progress = tmp_path / "out.npz", tmp_path / "out.npz.progress"
    args = ["--ckpt", tiny, "--out", out, *STEPS, *many]
    run = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *map(str, args)], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not progress.exists() or progress.read_bytes().count(1) < 24:
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    run.kill()
    run.wait()
    done = np.flatnonzero(np.frombuffer(progress.read_bytes(), bool)).tolist()
    assert 24 <= len(done) < 80 and not out.exists()
    assert "seed is 0 there and 1 here" in refused(capsys, *args, "--seed", 1)

    drawn, real = [], sample.sample_images

    def noting(model, vae, data, rows, *rest, **options):
        drawn.extend(rows)
        return real(model, vae, data, rows, *rest, **options)

    monkeypatch.setattr(sample, "sample_images", noting)
    run_sample(capsys, tiny, out, *many)
    assert sorted(drawn + done) == list(range(80))
    assert_array_equal(read_npz(out), whole)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.npz", "out.npz.json"]


@pytest.mark.parametrize("name", ["a.npz", "a.png", "folder"])
def test_killed_while_writing_the_result(capsys, tiny, tmp_path, monkeypatch, name):
    """Every image is drawn, the result is not there yet: the same command writes it and draws nothing."""
    out, args = tmp_path / name, ("--classes", 1, 2, "--per-class", 2)
    real = os.replace

    def stop(*args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", lambda a, b: stop() if Path(b) == out else real(a, b))
        run_sample(capsys, tiny, out, *args)
    assert not out.exists()
    monkeypatch.setattr(sample, "sample_images", stop)
    run_sample(capsys, tiny, out, *args)
    monkeypatch.undo()
    whole = run_sample(capsys, tiny, tmp_path / f"whole-{name}", *args)
    if out.is_dir():
        assert_array_equal(read_folder(out), read_folder(whole))
    else:
        assert out.read_bytes() == whole.read_bytes()


# Existing outputs


def state(folder):
    return {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["out.npz", "out.png", "folder"])
def test_finished_output(capsys, tiny, tmp_path, name, monkeypatch):
    """The same command again does nothing; other settings are named; both leave it as it is."""
    out, args = tmp_path / name, ("--classes", 1, 2, "--per-class", 2)
    run_sample(capsys, tiny, out, *args)
    before = state(tmp_path)
    monkeypatch.setattr(sample, "sample_images", None)
    same = ["--ckpt", tiny, *STEPS, "--out", out, *args]
    status, stdout, err = cli(capsys, "sample", *same)
    assert status == 0 and "complete already" in stdout and not err
    for more, setting in [(["--seed", 3], "seed is 0 there and 3 here"), (["--num-steps", 5], "num_steps is 4 there"),
                          (["--cfg-scale", 2], "cfg_scale is 1.0 there and 2.0 here"),
                          (["--classes", 1, 3], "classes is [1, 2] there and [1, 3] here"),
                          (["--mode", "ode"], "mode is 'sde' there and 'ode' here"),
                          (["--per-class", 1], "per_class is 2 there and 1 here"),
                          (["--precision", "bf16"], "precision is 'fp32' there")]:
        assert setting in refused(capsys, *same, *more)
    status, stdout, _ = cli(capsys, "sample", *same, "--batch-size", 3, "--compile")  # they change no image
    assert status == 0 and "complete already" in stdout
    assert state(tmp_path) == before


def test_record_of_the_settings(capsys, tiny, vae, tmp_path):
    """What an output was made with lies beside it in full, defaults and all; a grid's classes are named."""
    out = run_sample(capsys, tiny, tmp_path / "out.npz", "--num-samples", 3, "--class-balanced")
    record = {"ckpt": str(tiny.resolve()), "step": 7, "vae": str(vae), "seed": 0, "classes": None,
              "per_class": 8, "num_samples": 3, "class_balanced": True, "mode": "sde", "num_steps": 4,
              "cfg_scale": 1.0, "guidance_interval": [0, 1],
              "precision": "bf16" if torch.cuda.is_available() else "fp32"}
    assert json.loads(Path(f"{out}.json").read_text()) == record
    grid = run_sample(capsys, tiny, tmp_path / "grid.png", "--per-class", 1, "--batch-size", 5)
    grids = {"classes": list(range(10)), "per_class": 1, "num_samples": None, "class_balanced": False}
    assert json.loads(Path(f"{grid}.json").read_text()) == {**record, **grids}


def test_other_grid_of_the_same_labels(capsys, tiny, tmp_path):
    """Two columns of one class are not one column of it given twice."""
    out = run_sample(capsys, tiny, tmp_path / "grid.png", "--classes", 1, "--per-class", 2)
    assert Image.open(out).size == (64, 32)
    assert "there and" in refused(capsys, "--ckpt", tiny, *STEPS, "--out", out, "--classes", 1, 1, "--per-class", 1)


def test_output_of_unknown_origin(capsys, tiny, tmp_path):
    (tmp_path / "mine.npz").write_text("precious")
    assert "mine.npz exists" in refused(capsys, "--ckpt", tiny, "--out", tmp_path / "mine.npz", "--num-samples", 1)
    assert (tmp_path / "mine.npz").read_text() == "precious"


def test_impossible_output(capsys, tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    line = refused(capsys, "--ckpt", tiny, "--out", tmp_path / "file" / "a.npz", "--num-samples", 1)
    assert str(tmp_path / "file") in line


# Checkpoints


def same_weights(model, expected):
    loaded = model.state_dict()
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[key], value) for key, value in expected.items())


def test_ema_is_what_samples(tiny, weights):
    model, settings = load_model(tiny)
    assert same_weights(model, weights) and not same_weights(model, torch.load(tiny)["model"])
    assert not model.training and settings["step"] == 7 and settings["model"] == "SiT-Ti/4"


def test_alignment_head_is_left_out(capsys, ten, vae, tmp_path, weights):
    """A model trained with a head draws what the same weights without it draw."""
    head = {"vae_repa_depth": 2, "vae_repa_layers": 2}
    both = {**lively("SiT-Ti/4", **head).state_dict(), **weights}
    assert any(key.startswith("heads.vae_repa.") for key in both)
    torch.save({"ema": both, "settings": settings_for("SiT-Ti/4", vae, **head)}, tmp_path / "head.pt")
    assert same_weights(load_model(tmp_path / "head.pt")[0], weights)
    images = read_npz(run_sample(capsys, tmp_path / "head.pt", tmp_path / "a.npz", "--num-samples", 10))
    assert close(images, read_npz(ten))


def test_checkpoint_of_train(capsys, checkpoint, vae, tmp_path):
    """What train.py writes is drawn from alone, with its own class count, VAE, shift and scale."""
    ema = torch.load(checkpoint, weights_only=True)["ema"]
    model, settings = load_model(checkpoint)
    assert same_weights(model, {key: value for key, value in ema.items() if not key.startswith("heads.")})
    assert model.num_classes == 3 and (settings["data"]["shift"], settings["data"]["scale"]) == (0.25, 0.5)
    images = read_npz(run_sample(capsys, checkpoint, tmp_path / "a.npz", "--classes", 0, 2, "--per-class", 2))
    assert close(images, draw_rows(checkpoint, vae, range(4), [0, 0, 2, 2]))


@pytest.fixture(scope="module")
def small():
    """A lively SiT-S/8 with 7 classes."""
    return lively("SiT-S/8", num_classes=7, latent=16)


def as_published(weights, *head):
    """A checkpoint as REPA and SRA publish it, whose EMA also holds a head's keys."""
    return {"model": {key: torch.zeros_like(value) for key, value in weights.items()},
            "ema": {**weights, **{key: torch.ones(3) for key in head}},
            "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "args": argparse.Namespace(model="SiT-S/8", data_dir="../data", cfg_prob=0.1), "steps": 400000}


FORMS = {"repa": lambda w: as_published(w, "projectors.0.0.weight", "projectors.0.0.bias", "projectors.0.4.weight"),
         "sra": lambda w: as_published(w, "ap_head.0.weight", "ap_head.2.bias"),
         "bare": dict}


@pytest.mark.parametrize("form", FORMS)
def test_published_checkpoints(capsys, small, vae, tmp_path, form):
    """They load without settings: model, class count and latent size are read off the weights, less the head's."""
    ckpt = tmp_path / "published.pt"
    torch.save(FORMS[form](small.state_dict()), ckpt)
    loaded, settings = load_model(ckpt)
    data = {"latent_shape": [4, 16, 16], "shift": 0.0, "scale": 0.18215}
    assert same_weights(loaded, small.state_dict()) and loaded.num_classes == 7
    assert settings["model"] == "SiT-S/8" and {key: settings["data"][key] for key in data} == data
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([0.2, 0.9]), torch.tensor([0, 7])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), small(x, t, y))
    images = read_npz(run_sample(capsys, ckpt, tmp_path / "a.npz", "--vae", vae, "--classes", 6, "--per-class", 2))
    assert close(images, sample_images(small, load_vae(str(vae)), data, [0, 1], [6, 6], 0, "fp32", num_steps=4).numpy())
    assert "0 to 6" in refused(capsys, "--ckpt", ckpt, "--vae", vae, "--classes", 7)


@pytest.mark.parametrize("name, latent", [("SiT-S/2", 32), ("SiT-Ti/1", 8)])
def test_published_size_is_read_off_the_shapes(name, latent, tmp_path):
    torch.save(FORMS["repa"](lively(name, num_classes=1000, latent=latent).state_dict()), tmp_path / "published.pt")
    loaded, settings = load_model(tmp_path / "published.pt")
    assert settings["model"] == name and loaded.num_classes == 1000 and loaded.input_size == latent


def test_half_precision_weights(capsys, weights, vae, tmp_path):
    """A state dict saved as float16 is drawn from in float32."""
    half = {key: value.half() for key, value in weights.items()}
    torch.save(half, tmp_path / "half.pt")
    run_sample(capsys, tmp_path / "half.pt", tmp_path / "a.npz", "--vae", vae, "--num-samples", 1)
    assert same_weights(load_model(tmp_path / "half.pt")[0], {key: value.float() for key, value in half.items()})


# Bad input


def refused(capsys, *args):
    """The one line with which sample.py ends, status 2, when it refuses its input."""
    status, _, err = cli(capsys, "sample", *args)
    assert status == 2, err
    line = message(err)
    assert line.startswith("sample.py: error: ")
    return line


def refused_checkpoint(capsys, path):
    """Refused by its name, and nothing is left beside it."""
    before = sorted(path.parent.rglob("*"))
    line = refused(capsys, "--ckpt", path, "--num-samples", 1, "--out", path.parent / "out.npz")
    assert str(path) in line and sorted(path.parent.rglob("*")) == before
    return line


def test_missing_and_truncated_checkpoints(capsys, tiny, tmp_path):
    assert "cannot be read as a checkpoint" in refused_checkpoint(capsys, tmp_path / "none.pt")
    (tmp_path / "folder.pt").mkdir()
    refused_checkpoint(capsys, tmp_path / "folder.pt")
    whole = tiny.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], whole[:-10], b"no checkpoint"):
        (tmp_path / "cut.pt").write_bytes(content)
        assert "cannot be read as a checkpoint" in refused_checkpoint(capsys, tmp_path / "cut.pt")


class Code:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("save", [torch.save, plain_pickle])
def test_code_in_a_checkpoint_does_not_run(capsys, tmp_path, save):
    save({"ema": {}, "opt": Code(str(tmp_path / "trap"))}, tmp_path / "evil.pt")
    assert "cannot be read as a checkpoint" in refused_checkpoint(capsys, tmp_path / "evil.pt")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("name, others", [
    ("SiT-S/4", {}), ("SiT-Ti/2", {}), ("SiT-Z/4", {}), ("SiT-Ti/4", {"num_classes": 11}), ("SiT-Ti/4", {"latent": 16}),
    ("SiT-Ti/4", {"latent": 9})], ids=str)
def test_weights_that_do_not_fit_their_settings(capsys, vae, weights, tmp_path, name, others):
    torch.save({"ema": weights, "settings": settings_for(name, vae, **others)}, tmp_path / "a.pt")
    assert "does not fit" in refused_checkpoint(capsys, tmp_path / "a.pt")


@pytest.mark.parametrize("without, extra", [("blocks.3.attn.qkv.bias", {}), ("", {"extra.weight": torch.ones(1)})])
def test_missing_and_superfluous_weights(capsys, vae, weights, tmp_path, without, extra):
    kept = {key: value for key, value in weights.items() if key != without}
    torch.save({"ema": {**kept, **extra}, "settings": settings_for("SiT-Ti/4", vae)}, tmp_path / "a.pt")
    line = refused_checkpoint(capsys, tmp_path / "a.pt")
    assert "does not fit" in line and (without or "extra.weight") in line


@pytest.mark.parametrize("value", [
    {}, {"a": 1}, [1, 2], 3, torch.ones(2), {"ema": {}}, {"ema": 5}, {"ema": torch.ones(2)}, {"settings": {}},
    {"x_embedder.proj.weight": torch.ones(2, 2)}, {"ema": {"blocks.0.attn.qkv.weight": torch.ones(2)}},
    {"ema": {}, "settings": {}}, {"ema": {}, "settings": 3},
    {"ema": {}, "settings": {"model": "SiT-Ti/4", "data": {}}}], ids=str)
def test_file_that_is_no_checkpoint(capsys, tmp_path, value):
    torch.save(value, tmp_path / "other.pt")
    refused_checkpoint(capsys, tmp_path / "other.pt")


@pytest.mark.parametrize("missing", ["blocks.11.", "final_layer."])
def test_published_weights_of_no_known_model(capsys, small, tmp_path, missing):
    kept = {key: value for key, value in small.state_dict().items() if not key.startswith(missing)}
    torch.save({"ema": kept}, tmp_path / "a.pt")
    refused_checkpoint(capsys, tmp_path / "a.pt")


@pytest.mark.parametrize("words, says", [
    (["--cfg-scale", 0.9], "--cfg-scale 0.9"), (["--cfg-scale", -2], "--cfg-scale"),
    (["--cfg-scale", "nan"], "--cfg-scale"), (["--cfg-scale", "inf", "--num-samples", 1], "--cfg-scale"),
    (["--guidance-interval", 0.7, 0], "--guidance-interval [0.7, 0.0]"),
    (["--guidance-interval", -0.1, 1], "--guidance-interval"),
    (["--guidance-interval", 0, 1.1], "--guidance-interval"),
    (["--guidance-interval", "nan", 1], "--guidance-interval"),
    (["--classes", 1, "--num-samples", 3], "--num-samples"),
    (["--class-balanced"], "--num-samples"), (["--seed", -1], "--seed"), (["--num-samples", 0], "--num-samples"),
    (["--num-steps", 0], "--num-steps"), (["--batch-size", 0], "--batch-size"), (["--mode", "dopri5"], "--mode"),
    (["--cfg", 2], "--cfg"), (["--vae", "/nonexistent"], "/nonexistent")], ids=str)
def test_flags_out_of_range(capsys, tiny, tmp_path, words, says):
    assert says in refused(capsys, "--ckpt", tiny, "--out", tmp_path / "out.npz", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("classes", [(10,), (-1,), (0, 11, 3)], ids=str)
def test_classes_that_the_checkpoint_does_not_have(capsys, tiny, tmp_path, classes):
    line = refused(capsys, "--ckpt", tiny, "--out", tmp_path / "out.npz", "--classes", *classes)
    assert "--classes" in line and "0 to 9" in line and not list(tmp_path.iterdir())


def test_vae_of_the_checkpoint_is_gone(capsys, weights, tmp_path):
    torch.save({"ema": weights, "settings": settings_for("SiT-Ti/4", tmp_path / "gone")}, tmp_path / "a.pt")
    args = ("--ckpt", tmp_path / "a.pt", "--out", tmp_path / "out.npz", "--num-samples", 1)
    assert str(tmp_path / "gone") in refused(capsys, *args)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_vae_of_other_channels(capsys, tiny, vae, tmp_path):
    """A decoder for 16 channels cannot draw latents of 4."""
    other = type(load_vae(str(vae))).from_config({**load_vae(str(vae)).config, "latent_channels": 16})
    other.save_pretrained(tmp_path / "vae")
    args = ("--ckpt", tiny, "--out", tmp_path / "out.npz", "--num-samples", 1, "--vae", tmp_path / "vae")
    assert "VAE" in refused(capsys, *args)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_error_line_of_the_real_command(tiny, tmp_path):
    (tmp_path / "cut.pt").write_bytes(tiny.read_bytes()[:5000])
    run = process("sample", "--ckpt", tmp_path / "cut.pt", check=False)
    assert run.returncode == 2 and message(run.stderr).startswith("sample.py: error: ") and not run.stdout
