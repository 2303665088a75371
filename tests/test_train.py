"""train.py: losses against formulas, what main feeds them, many processes against one, resuming, and bad input."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, cli, drawn_numbers, drawn_rows, process
from PIL import Image
from scipy import stats

import sample
import train
from extract_latents import Latents, load_vae
from models import SiT, SiT_models, patchify

CUDA = torch.cuda.is_available()


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Runs are compared to the bit, which only the CPU promises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def write_set(folder, size=8, moments=None, **about):
    """Latents as extract_latents.py stores them: 12 of 10 classes, 4 x size x size, normalised per channel."""
    rng = np.random.default_rng(0)
    if moments is None:
        mean, std = rng.normal(1, 2, (12, 4, size, size)), rng.uniform(0.5, 1.5, (12, 4, size, size))
        moments = np.concatenate([mean, std], 1).astype(np.float16)
    folder.mkdir()
    np.save(folder / "moments.npy", moments)
    np.save(folder / "labels.npy", np.arange(12) % 10)
    about = {"vae": "nobody/nothing", "shift": [0.5, 1.0, 1.5, -0.5], "scale": [0.5, 0.25, 1.0, 2.0],
             "num_classes": 10, "files_sha256": "0", **about}
    (folder / "latents.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "latents")


def fit(capsys, data, run, *flags):
    """Train in this process: (log lines, the last state)."""
    status, _, stderr = cli(capsys, "train", *TINY, "--data", data, "--run-dir", run, *flags)
    assert status == 0, stderr
    return log(run), load(run / "state.pt")


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def load(path):
    return torch.load(path, weights_only=True)


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    return train.parse_args()


def smooth_l1(delta, beta=0.05):
    return torch.where(delta.abs() < beta, delta**2 / (2 * beta), delta.abs() - beta / 2)


def test_interpolant():
    x, noise = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64)
    assert torch.equal(train.interpolate(x, noise, torch.zeros(3))[0], x)  # t = 0 is data
    assert torch.equal(train.interpolate(x, noise, torch.ones(3))[0], noise)
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    x_t, dx_dt = torch.autograd.functional.jvp(lambda t: train.interpolate(x, noise, t)[0], t, torch.ones_like(t))
    torch.testing.assert_close(train.interpolate(x, noise, t)[1], dx_dt)
    torch.testing.assert_close(x_t[1], (x[1] + noise[1]) / 2)  # each image at its own t
    torch.testing.assert_close(x_t[2], 0.2 * x[2] + 0.8 * noise[2])


@pytest.mark.parametrize("patch", [1, 2])
def test_objectives_against_formulas(patch):
    x, x_pred = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    delta = x_pred - x
    delta[0] *= 0.02  # an image on either branch of smooth-L1
    x_pred = x + delta

    def loss(*objective):
        return train.alignment_loss(patchify(x_pred, patch), patchify(x, patch), *objective).double()

    def close(value, expected):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)  # losses are float32

    assert delta[0].abs().min() < 0.05 < delta[1].abs().max()
    close(loss(), smooth_l1(delta).mean((1, 2, 3)))
    close(loss("smooth_l1", 0.7), smooth_l1(delta, 0.7).mean((1, 2, 3)))
    close(loss("l1"), delta.abs().mean((1, 2, 3)))
    close(loss("l2"), (delta**2).mean((1, 2, 3)))
    expected = torch.zeros(3, dtype=torch.float64)
    for i in range(0, 4, patch):
        for j in range(0, 4, patch):
            a, b = (z[:, :, i : i + patch, j : j + patch].flatten(1) for z in (x_pred, x))
            expected -= (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    close(loss("cosine"), expected / (4 // patch) ** 2)


def test_smooth_l1_is_continuous_at_beta():
    prediction = torch.tensor([0.05 - 1e-6, 0.05 + 1e-6]).view(2, 1, 1)
    below, above = train.alignment_loss(prediction, torch.zeros(2, 1, 1), "smooth_l1", 0.05).tolist()
    assert below == pytest.approx(0.025, abs=1e-5) and above == pytest.approx(0.025, abs=1e-5)


def vae_repa(model, batch, objective="smooth_l1", beta=0.05, patch_size=2):
    """training_losses of VAE-REPA alone."""
    args, ema = SimpleNamespace(vae_repa_loss=objective, vae_repa_beta=beta), SimpleNamespace(patch_size=patch_size)
    return train.training_losses(model, {"interval_weight": torch.ones(len(batch["x"])), **batch}, args, ema, None)


class Recorder(torch.nn.Module):
    """Stands in for SiT: keeps what it is given and answers with fixed tensors."""

    def __init__(self, v, **heads):
        super().__init__()
        self.answer = v, heads

    def forward(self, x_t, t, y, return_align):
        self.seen = x_t, t, y, return_align
        return self.answer


def test_the_aligned_target_is_the_very_latent_that_made_x_t():
    x, noise, v_pred, x_pred = torch.randn(4, 5, 4, 8, 8)
    t, y = torch.rand(5), torch.arange(5)
    model = Recorder(v_pred.bfloat16(), vae_repa=patchify(x_pred, 2).bfloat16())
    batch = {"x": x, "y": y, "t": t, "noise": noise}
    denoising, alignment = vae_repa(model, batch).values()
    x_t, t_seen, y_seen, aligned = model.seen
    assert aligned and torch.equal(t_seen, t) and torch.equal(y_seen, y)
    torch.testing.assert_close(x_t, (1 - t.view(5, 1, 1, 1)) * x + t.view(5, 1, 1, 1) * noise)
    assert denoising.dtype == alignment.dtype == torch.float32 and denoising.shape == alignment.shape == (5,)
    # a target rounded to bf16 would be off by 1e-3
    v_error, x_error = v_pred.bfloat16().float() - (noise - x), x_pred.bfloat16().float() - x
    torch.testing.assert_close(denoising, v_error.square().mean((1, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(alignment, smooth_l1(x_error).mean((1, 2, 3)), rtol=1e-5, atol=0)

    weights = torch.arange(5.0)
    weighed = vae_repa(model, {**batch, "interval_weight": weights})
    assert torch.equal(weighed["vae_repa"], weights * alignment) and torch.equal(weighed["denoising"], denoising)
    (plain,) = vae_repa(Recorder(v_pred.bfloat16()), batch).values()
    assert torch.equal(plain, denoising)


def test_alignment_options_reach_the_objective():
    x, noise, v_pred, x_pred = torch.randn(4, 2, 4, 8, 8)
    batch = {"x": x, "y": torch.zeros(2, dtype=torch.long), "t": torch.rand(2), "noise": noise}

    def loss(objective, beta, patch):
        return vae_repa(Recorder(v_pred, vae_repa=patchify(x_pred, patch)), batch, objective, beta, patch)["vae_repa"]

    torch.testing.assert_close(loss("smooth_l1", 1.5, 2), smooth_l1(x_pred - x, 1.5).mean((1, 2, 3)))
    whole = -(x_pred * x).sum((1, 2, 3)) / (x_pred.flatten(1).norm(dim=1) * x.flatten(1).norm(dim=1))
    torch.testing.assert_close(loss("cosine", 0.05, 8), whole)
    assert not torch.allclose(loss("cosine", 0.05, 1), loss("cosine", 0.05, 2))


# The batch of a step


def batch_of(data, step, local=None, **options):
    """What main feeds to a step on the set `data`."""
    options = {"batch_size": 12, "seed": 0, "vae_repa_interval": [0, 1], "label_dropout": 0.1, "sra_t_max": 0.2, **options}
    args, latents, device = SimpleNamespace(**options), Latents(data), torch.device("cpu")
    local = local or slice(0, args.batch_size)
    stored = latents.read(train.step_rows(latents.facts, args, step)[local])
    return train.make_batch(stored, step, latents.facts, args, local, device)


def test_a_batch_depends_on_seed_and_step_alone(data):
    first = batch_of(data, 7)
    torch.manual_seed(123)  # the global generator plays no part
    assert all(torch.equal(value, first[name]) for name, value in batch_of(data, 7).items())
    for other in (batch_of(data, 8), batch_of(data, 7, seed=1), batch_of(data, 6, seed=1), batch_of(data, 0, seed=7)):
        assert not torch.equal(first["x"], other["x"]) and not torch.equal(first["noise"], other["noise"])
        assert not set(first["t"].tolist()) & set(other["t"].tolist())  # nor an image's draw moved elsewhere
    halves = [batch_of(data, 7, local) for local in (slice(0, 6), slice(6, 12))]
    assert all(torch.equal(torch.cat([half[name] for half in halves]), value) for name, value in first.items())


def test_a_batch_is_what_its_definition_says(data):
    """Every number of a batch from the files, and from the definition of what is drawn."""
    mean, std = np.split(np.load(data / "moments.npy").astype(np.float64), 2, axis=1)
    labels, about = np.load(data / "labels.npy"), json.loads((data / "latents.json").read_text())
    shift, scale = (np.reshape(about[key], (4, 1, 1)) for key in ("shift", "scale"))
    for seed, step in ((0, 0), (5, 3)):
        options = {"seed": seed, "label_dropout": 0.4, "sra_t_max": 0.3, "vae_repa_interval": [0.2, 0.6]}
        batch, rows = batch_of(data, step, **options), drawn_rows(seed, step, 12, 12)
        eps, noise, t, u_drop, u_teacher = drawn_numbers(seed, step, 12, (4, 8, 8))
        x = (mean[rows] + std[rows] * eps.numpy() - shift) * scale
        np.testing.assert_allclose(batch["x"].numpy(), x, rtol=1e-4, atol=1e-4)
        assert batch["x"].dtype == torch.float32 and torch.equal(batch["noise"], noise) and torch.equal(batch["t"], t)
        assert batch["y"].tolist() == [10 if u < 0.4 else labels[row] for row, u in zip(rows, u_drop.tolist())]
        torch.testing.assert_close(batch["t_teacher"], (t - 0.3 * u_teacher).clamp(min=0))
        inside = (0.2 <= t) & (t <= 0.6)
        torch.testing.assert_close(batch["interval_weight"], inside * 12 / inside.sum().clamp(min=1))


def test_distributions_of_a_step(tmp_path):
    """20 000 images with mean 0 and std 1: t uniform, x and noise normal and independent, a tenth of the labels dropped."""
    n = 20_000
    moments = np.concatenate([np.zeros((12, 4, 1, 1)), np.ones((12, 4, 1, 1))], 1)
    data = write_set(tmp_path / "set", moments=moments, shift=0.0, scale=1.0)
    batch = batch_of(data, 5, batch_size=n, seed=3)
    x, noise, t, y, inside, earlier = (batch[name] for name in ("x", "noise", "t", "y", "interval_weight", "t_teacher"))
    assert stats.kstest(t.numpy(), "uniform").pvalue > 0.01
    gap = (t - earlier)[t > 0.2] / 0.2
    assert stats.kstest(gap.numpy(), "uniform").pvalue > 0.01 and abs(np.corrcoef(t[t > 0.2], gap)[0, 1]) < 0.03
    assert all(stats.kstest(normal.flatten().numpy(), "norm").pvalue > 0.01 for normal in (x, noise))
    assert abs((x * noise).mean()) < 0.03
    dropped = y == 10
    assert abs(dropped.float().mean() - 0.1) < 0.01
    assert abs(t[dropped].mean() - 0.5) < 0.03  # labels are dropped at all times alike
    assert torch.equal(inside, torch.ones(n))
    assert not (batch_of(data, 5, batch_size=n, label_dropout=0.0)["y"] == 10).any()


def test_alignment_averages_over_the_images_inside_the_interval(data):
    losses = torch.rand(64)
    for low, high in [(0, 0.5), (0.5, 1), (0.3, 0.4)]:
        batch = batch_of(data, 0, batch_size=64, vae_repa_interval=[low, high])
        inside = (low <= batch["t"]) & (batch["t"] <= high)
        assert 0 < inside.sum() < 64
        torch.testing.assert_close((batch["interval_weight"] * losses).mean(), losses[inside].mean())
    batch = batch_of(data, 0, batch_size=64, vae_repa_interval=[0.5, 0.5])
    assert torch.equal(batch["interval_weight"], torch.zeros(64))  # none inside: 0, not NaN
    assert torch.equal(batch["t"], batch_of(data, 0, batch_size=64)["t"])  # t itself stays uniform


def test_ema_arithmetic():
    sizes = {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 10, "vae_repa_depth": 1}
    ema, model = SiT(**sizes), SiT(**sizes)
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    live = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.pos_embed += 1  # frozen: the average must not follow
    train.update_ema(ema.requires_grad_(False), model, 0.9)
    for name, p in ema.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * live[name])
        assert torch.equal(model.get_parameter(name), live[name])
    assert torch.equal(ema.pos_embed, before["pos_embed"])


@pytest.mark.parametrize("count, batch", [(12, 4), (10, 4), (3, 8)])
def test_batches_are_cut_from_shuffled_epochs(count, batch):
    facts = {"count": count, "flip": False}
    whole = [train.step_rows(facts, SimpleNamespace(batch_size=batch, seed=0), step).tolist() for step in range(15)]
    assert whole == [drawn_rows(0, step, batch, count) for step in range(15)]
    rows = sum(whole, [])
    epochs = [rows[i : i + count] for i in range(0, len(rows) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew
    assert epochs[0] != sorted(epochs[0]) or epochs[1] != sorted(epochs[1])
    other = [train.step_rows(facts, SimpleNamespace(batch_size=batch, seed=1), step).tolist() for step in range(15)]
    assert other != whole


def test_guidance_uses_the_models_own_null_class():
    def model(x, t, y):
        calls.append((t, y))
        return x * (1 + y.view(-1, 1, 1, 1))

    model.num_classes, x, y = 10, torch.randn(2, 4, 2, 2), torch.tensor([3, 0])
    calls = []
    v = sample.guided_velocity(model, x, 0.5, y, 3.0, (0.0, 1.0))
    assert sorted(torch.cat([y for _, y in calls]).tolist()) == [0, 3, 10, 10]
    torch.testing.assert_close(v, 11 * x + 3 * (x * (1 + y.view(2, 1, 1, 1)) - 11 * x))


def test_both_losses_overfit_one_batch():
    torch.manual_seed(0)
    model = SiT(input_size=4, patch_size=2, hidden_size=64, depth=2, num_heads=4, num_classes=8, vae_repa_depth=1)
    x, noise = torch.randn(2, 8, 4, 4, 4)
    t, y = torch.rand(8), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    history = []
    for _ in range(300):
        losses = vae_repa(model, {"x": x, "y": y, "t": t, "noise": noise})
        denoising, alignment = (loss.mean() for loss in losses.values())
        optimizer.zero_grad()
        (denoising + alignment).backward()
        optimizer.step()
        history.append((denoising.item(), alignment.item()))
    assert history[-1][0] < history[0][0] / 10 and history[-1][1] < history[0][1] / 10, history[::50]


@pytest.fixture
def seen(monkeypatch):
    """The (x, y, t, noise) of every call of training_losses."""
    calls, original = [], train.training_losses

    def recorder(model, batch, *rest):
        calls.append([batch[name] for name in ("x", "y", "t", "noise")])
        return original(model, batch, *rest)

    monkeypatch.setattr(train, "training_losses", recorder)
    return calls


def test_what_main_trains_on(capsys, seen, data, tmp_path):
    """Every x is a fresh, normalised draw from a row's posterior; dropped labels are the null class, here 10."""
    flags = ("--max-steps", 6, "--batch-size", 12, "--label-dropout", 0.4, "--seed", 5, "--lr", 1e-9)
    lines, _ = fit(capsys, data, tmp_path / "run", *flags, "--vae-repa-interval", 0.2, 0.6)
    mean, std = np.split(np.load(data / "moments.npy").astype(np.float64), 2, axis=1)
    labels, about = np.load(data / "labels.npy"), json.loads((data / "latents.json").read_text())
    shift, scale = (np.reshape(about[key], (4, 1, 1)) for key in ("shift", "scale"))
    dropped, draws_of_row_7 = 0, set()
    for step, (x, y, t, noise) in enumerate(seen):
        rows = drawn_rows(5, step, 12, 12)
        eps, noise_drawn, t_drawn, u_drop, _ = drawn_numbers(5, step, 12, (4, 8, 8))
        expected = (mean[rows] + std[rows] * eps.numpy() - shift) * scale
        np.testing.assert_allclose(x.numpy(), expected, rtol=1e-4, atol=1e-4)
        draws_of_row_7.add(x[rows.index(7), 0, 0, 0].item())
        assert torch.equal(noise, noise_drawn) and torch.equal(t, t_drawn)
        assert y.tolist() == [10 if u < 0.4 else labels[row] for row, u in zip(rows, u_drop.tolist())]
        dropped += (y == 10).sum().item()
        # the model starts at zero and hardly moves here, so the losses are known, and are logged unweighted
        inside = (0.2 <= t) & (t <= 0.6)
        assert lines[step]["denoising"] == pytest.approx(((noise - x) ** 2).mean().item(), rel=1e-4)
        assert lines[step]["vae_repa"] == pytest.approx(smooth_l1(x[inside]).mean().item(), rel=1e-4)
    assert 12 < dropped < 48 and len(draws_of_row_7) == len(seen) == 6


@pytest.mark.parametrize("flags, formula", [
    (("--vae-repa-loss", "l1"), lambda x: x.abs().mean()), (("--vae-repa-loss", "l2"), lambda x: x.square().mean()),
    (("--vae-repa-loss", "cosine"), lambda x: x.new_tensor(0.0)),
    (("--vae-repa-beta", 0.8), lambda x: smooth_l1(x, 0.8).mean()),
    (("--vae-repa-weight", 0.1), lambda x: smooth_l1(x).mean()),
    (("--vae-repa-layers", 2), lambda x: smooth_l1(x).mean()), (("--vae-repa-depth", 6), lambda x: smooth_l1(x).mean())])
def test_rows_of_table_1_are_flags(capsys, seen, data, tmp_path, flags, formula):
    """The head first predicts 0, so its term is known at step 1; the weight scales the gradient and not the log."""
    (line,), checkpoint = fit(capsys, data, tmp_path / "run", "--max-steps", 1, "--grad-clip", "inf", *flags)
    x = seen[0][0]
    assert line["vae_repa"] == pytest.approx(formula(x).item(), rel=1e-5)
    assert checkpoint["settings"][flags[0][2:].replace("-", "_")] == flags[1]
    head = sorted(k for k in checkpoint["model"] if k.startswith("heads.vae_repa.mlp") and k.endswith("weight"))
    assert len(head) == (1 if "--vae-repa-layers" in flags else 4)
    if flags[0] == "--vae-repa-weight":  # d smooth_l1(0 - x) / d prediction is clamp(-x / beta, -1, 1)
        names = [name for name, _ in built(checkpoint["settings"]).named_parameters()]
        bias = checkpoint["opt"]["state"][names.index("heads.vae_repa.final_layer.linear.bias")]["exp_avg"] * 10
        gradient = 0.1 * (-x / 0.05).clamp(-1, 1) / x.numel()
        expected = gradient.reshape(4, 4, 2, 4, 2, 4).sum((0, 2, 4)).permute(1, 2, 0).reshape(-1)  # over all tokens
        torch.testing.assert_close(bias, expected, rtol=1e-4, atol=1e-8)


def built(settings):
    """The model that main builds, with main's initial weights."""
    torch.manual_seed(settings["seed"])
    data = settings["data"]
    return SiT_models[settings["model"]](
        input_size=data["latent_shape"][1], in_channels=data["latent_shape"][0], num_classes=data["num_classes"],
        vae_repa_depth=settings["vae_repa_depth"], vae_repa_layers=settings["vae_repa_layers"],
        repa_depth=settings["repa_depth"], sra_depth=settings["sra_depth"], repa_dim=settings.get("repa_dim", 768))


def test_first_steps_of_the_optimizer_and_the_ema(capsys, data, tmp_path):
    run = tmp_path / "run"
    flags = ("--ema-decay", 0.75, "--grad-clip", 0.01, "--lr", 1e-3)
    lines, last = fit(capsys, data, run, "--max-steps", 2, "--ckpt-every", 1, *flags)
    _, first = fit(capsys, data, tmp_path / "first", "--max-steps", 1, *flags)
    start = built(first["settings"])
    assert same_tensors(load(run / "checkpoints" / "0000001.pt")["ema"], first["ema"])
    for i, (name, p) in enumerate(start.named_parameters()):
        clipped = first["opt"]["state"][i]["exp_avg"].double() * 10
        expected = p.double() - 1e-3 * clipped / (clipped.abs() + 1e-8)  # Adam's first step, without weight decay
        torch.testing.assert_close(first["model"][name].double(), expected, rtol=0, atol=1e-6, msg=name)
        ema = 0.75 * p + 0.25 * first["model"][name]
        torch.testing.assert_close(first["ema"][name], ema, rtol=0, atol=1e-6, msg=name)
        ema = 0.75 * ema + 0.25 * last["model"][name]
        torch.testing.assert_close(last["ema"][name], ema, rtol=0, atol=1e-6, msg=name)
    norm = torch.cat([state["exp_avg"].flatten() for state in first["opt"]["state"].values()]).norm().item() * 10
    assert norm == pytest.approx(0.01, rel=1e-4) and lines[0]["grad_norm"] > 0.1  # logged before it is clipped
    (group,) = last["opt"]["param_groups"]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (1e-3, (0.9, 0.999), 0)


def test_log_lines_are_means_over_their_interval(capsys, data, tmp_path):
    flags = ("--max-steps", 6, "--lr", 1e-2)
    every, _ = fit(capsys, data, tmp_path / "a", *flags)
    third, _ = fit(capsys, data, tmp_path / "b", *flags, "--log-every", 3)
    assert [line["step"] for line in every] == [1, 2, 3, 4, 5, 6] and [line["step"] for line in third] == [3, 6]
    for i, line in enumerate(third):
        for key in ("denoising", "vae_repa", "grad_norm"):
            assert line[key] == pytest.approx(np.mean([each[key] for each in every[3 * i : 3 * i + 3]]), rel=1e-4)
        assert line["grad_norm_max"] == pytest.approx(max(each["grad_norm"] for each in every[3 * i : 3 * i + 3]), rel=1e-4)
    for line in every + third:
        assert list(line) == ["step", "denoising", "vae_repa", "grad_norm", "grad_norm_max", "images_per_s", "memory_gib"]
        assert 0 < line["images_per_s"] < 1e5


@pytest.mark.parametrize("off", [("--vae-repa-depth", 0), ("--vae-repa-weight", 0)])
def test_depth_0_and_weight_0_train_plain_sit(capsys, monkeypatch, data, tmp_path, off):
    """The same weights as from a loop that knows no alignment."""
    lines, checkpoint = fit(capsys, data, tmp_path / "run", "--max-steps", 3, "--lr", 1e-3, "--label-dropout", 0, *off)
    assert not any("vae_repa" in key for key in [*checkpoint["model"], *checkpoint["ema"]])
    assert not any("vae_repa" in line for line in lines)
    model = built({**checkpoint["settings"], "vae_repa_depth": 0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0, fused=True)
    moments, labels = torch.from_numpy(np.load(data / "moments.npy")), torch.from_numpy(np.load(data / "labels.npy"))
    about = json.loads((data / "latents.json").read_text())
    shift, scale = (torch.tensor(about[key]).view(4, 1, 1) for key in ("shift", "scale"))
    for step in range(3):
        rows = drawn_rows(0, step, 4, 12)
        eps, noise, t, _, _ = drawn_numbers(0, step, 4, (4, 8, 8))
        mean, std = moments[rows].float().chunk(2, dim=1)
        x, s = (mean + std * eps - shift) * scale, t.view(4, 1, 1, 1)
        loss = (model((1 - s) * x + s * noise, t, labels[rows]) - (noise - x)).square().mean()
        assert lines[step]["denoising"] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(checkpoint["model"][name], p.data, rtol=0, atol=2e-5, msg=name)


def test_checkpoints_and_settings(capsys, data, tmp_path):
    """Numbered ones hold the EMA's weights and the settings, state.pt all that a resume needs."""
    run = tmp_path / "run"
    flags = ("--max-steps", 3, "--ckpt-every", 2, "--vae-repa-interval", 0.25, 0.5, "--lr", 1e-3)
    _, state = fit(capsys, data, run, *flags)
    files = sorted(path.name for path in run.rglob("*") if path.is_file())
    assert files == ["0000002.pt", "0000003.pt", "lock", "log.jsonl", "settings.json", "state.pt"]
    assert set(state) == {"model", "ema", "opt", "step", "settings"} and state["step"] == 3
    assert list(state["model"]) == list(state["ema"]) == list(built(state["settings"]).state_dict())
    for step in (2, 3):
        numbered = load(run / "checkpoints" / f"{step:07d}.pt")
        assert set(numbered) == {"ema", "step", "settings"} and numbered["step"] == step
    assert same_tensors(numbered["ema"], state["ema"]) and not same_tensors(state["model"], state["ema"])
    settings = json.loads((run / "settings.json").read_text())
    assert settings == state["settings"] == numbered["settings"]
    expected = {"model": "SiT-Ti/4", "vae_repa_depth": 2, "vae_repa_weight": 1.0, "vae_repa_loss": "smooth_l1",
                "vae_repa_beta": 0.05, "vae_repa_layers": 5, "vae_repa_interval": [0.25, 0.5], "batch_size": 4,
                "micro_batch": 4, "max_steps": 3, "lr": 1e-3, "ema_decay": 0.9999, "grad_clip": 1.0,
                "label_dropout": 0.1, "precision": "fp32", "compile": False, "seed": 0}
    assert {key: settings[key] for key in expected} == expected
    assert settings["data"]["latent_shape"] == [4, 8, 8] and settings["data"]["num_classes"] == 10
    assert settings["data"]["vae"] == "nobody/nothing" and settings["data"]["scale"] == [0.5, 0.25, 1.0, 2.0]


@pytest.mark.parametrize("every, steps, written", [(2, 5, [2, 4, 5]), (3, 3, [3]), (9, 2, [2])])
def test_how_often_state_is_rewritten(capsys, monkeypatch, data, tmp_path, every, steps, written):
    """Every --state-every steps, with each numbered checkpoint, and at the end: which a kill can cost no more than."""
    saved, save = [], train.save
    monkeypatch.setattr(train, "save", lambda path, content: saved.append((path.name, content["step"])) or save(path, content))
    fit(capsys, data, tmp_path / "run", "--max-steps", steps, "--state-every", every)
    assert saved == [pair for step in written for pair in
                     ([(f"{step:07d}.pt", step)] if step == steps else []) + [("state.pt", step)]]


def test_defaults_are_the_papers(monkeypatch):
    args = parsed(monkeypatch, "--model", "SiT-XL/2", "--vae-repa-depth", 8)
    assert vars(parsed(monkeypatch)) == vars(args)  # XL/2 at depth 8 is the default
    recipe = {"lr": 1e-4, "batch_size": 256, "grad_clip": 1.0, "ema_decay": 0.9999, "label_dropout": 0.1,
              "vae_repa_weight": 1.0, "vae_repa_loss": "smooth_l1", "vae_repa_beta": 0.05, "vae_repa_layers": 5,
              "vae_repa_interval": [0.0, 1.0]}
    assert {key: getattr(args, key) for key in recipe} == recipe
    assert [parsed(monkeypatch, "--model", f"SiT-{size}/2").vae_repa_depth for size in ("B", "L", "XL")] == [2, 8, 8]


CHANGES = [
    ("--model", "SiT-L/2"), ("--data", "other/set"), ("--precision", "bf16"), ("--seed", 1), ("--batch-size", 128),
    ("--lr", 2e-4), ("--label-dropout", 0.2), ("--ema-decay", 0.999), ("--grad-clip", 2), ("--vae-repa-depth", 6),
    ("--vae-repa-depth", 0), ("--vae-repa-weight", 0.5), ("--vae-repa-loss", "l2"), ("--vae-repa-beta", 0.1),
    ("--vae-repa-layers", 2), ("--vae-repa-interval", 0, 0.5), ("--vae-repa-interval", 0.5, 1)]
FREE = [("--max-steps", 7), ("--micro-batch", 1), ("--log-every", 1), ("--ckpt-every", 1), ("--sample-every", 0),
        ("--state-every", 1)]


def test_settings_that_matter_name_the_run_directory(monkeypatch):
    """Whatever a resume would refuse to change leads to a directory of its own, and nothing else does."""
    default = parsed(monkeypatch).run_dir
    names = [parsed(monkeypatch, *change).run_dir for change in CHANGES]
    assert default.startswith("runs/") and all(Path(name).parent == Path("runs") for name in names)
    same = [change for change, name in zip(CHANGES, names) if name == default]
    assert not same and len(set(names)) == len(names)
    assert {parsed(monkeypatch, *change).run_dir for change in FREE} == {default}


def test_sample_grid_is_drawn_by_the_ema(capsys, latents, vae, tmp_path):
    run = tmp_path / "run"
    flags = ("--max-steps", 2, "--sample-every", 2, "--ema-decay", 0.5, "--lr", 0.03)
    _, checkpoint = fit(capsys, latents, run, *flags)
    assert [path.name for path in (run / "samples").iterdir()] == ["0000002.png"]
    drawn = np.array(Image.open(run / "samples" / "0000002.png"))
    assert drawn.shape == (3 * 32, 4 * 32, 3)  # a row of 4 for each of 3 classes
    settings, grids = checkpoint["settings"], {}
    for weights in ("ema", "model"):
        model = built(settings).eval()
        model.load_state_dict(checkpoint[weights])
        images = sample.sample_images(model, load_vae(str(vae)), settings["data"], range(12),
                                      np.repeat([0, 1, 2], 4), 0, "fp32", mode="ode", num_steps=50, cfg_scale=4.0).numpy()
        grids[weights] = images.reshape(3, 4, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(drawn.shape).astype(int)
    assert np.abs(grids["ema"] - drawn).max() <= 1  # one thread rounds unlike two
    assert np.abs(grids["model"] - drawn).max() > 20


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_compiled_training_has_the_same_losses(capsys, data, tmp_path):
    flags = ("--max-steps", 3, "--lr", 1e-3)
    eager, _ = fit(capsys, data, tmp_path / "eager", *flags)
    compiled, checkpoint = fit(capsys, data, tmp_path / "compiled", *flags, "--compile")
    for a, b in zip(eager, compiled, strict=True):
        assert [a["denoising"], a["vae_repa"]] == pytest.approx([b["denoising"], b["vae_repa"]], rel=1e-4)
    assert list(checkpoint["model"]) == list(built(checkpoint["settings"]).state_dict())  # no compiler's prefixes


STEPS, BATCH = 12, 8
SHARED = (*TINY, "--batch-size", BATCH, "--seed", 1, "--lr", 1e-3, "--vae-repa-depth", 2, "--vae-repa-interval", 0, 0.5,
          "--ckpt-every", 3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """An undisturbed run of one process."""
    run = tmp_path_factory.mktemp("alone")
    process("train", *SHARED, "--data", data, "--run-dir", run, "--max-steps", STEPS)
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory, data):
    """The same of two processes, each in two micro-batches."""
    run = tmp_path_factory.mktemp("pair")
    process("train", *SHARED, "--data", data, "--run-dir", run, "--max-steps", STEPS, "--micro-batch", 2, processes=2)
    return run


def same_tensors(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_run(a, b):
    """The states of two runs, bit by bit; and their last numbered checkpoints."""
    one, other = load(a / "state.pt"), load(b / "state.pt")
    assert one["step"] == other["step"]
    assert same_tensors(one["model"], other["model"]) and same_tensors(one["ema"], other["ema"])
    assert list(one["opt"]["state"]) == list(other["opt"]["state"])
    assert all(map(same_tensors, one["opt"]["state"].values(), other["opt"]["state"].values()))
    for run, state in ((a, one), (b, other)):
        assert same_tensors(load(run / "checkpoints" / f"{one['step']:07d}.pt")["ema"], state["ema"])


def assert_close_run(run, other, step=STEPS):
    """Losses, gradients and weights of the same run in another order of summation."""
    for a, b in zip(log(run), log(other), strict=True):
        for key in ("denoising", "vae_repa", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
    a, b = (load(path / "state.pt") for path in (run, other))
    assert a["step"] == b["step"] == step
    for i, (name, _) in enumerate(built(a["settings"]).named_parameters()):
        one, two = (c["opt"]["state"][i]["exp_avg"] for c in (a, b))  # the gradients of the last steps
        assert (one - two).abs().max() <= 1e-3 * one.abs().max(), name
        # a weight moves up to 1e-3 a step
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=0, atol=3e-4, msg=name)


def test_processes_and_micro_batches_change_nothing(alone, pair):
    times = torch.stack([drawn_numbers(1, step, BATCH, (4, 8, 8))[2] for step in range(STEPS)])
    inside = [(half <= 0.5).sum().item() for half in times.view(-1, BATCH // 2)]  # of each process
    assert 0 in inside and inside[::2] != inside[1::2]  # where a mean per process would go wrong
    assert_close_run(alone, pair)


def test_accumulation_equals_the_whole_batch(capsys, alone, data, tmp_path):
    fit(capsys, data, tmp_path / "run", *SHARED, "--max-steps", STEPS, "--micro-batch", 1)
    assert_close_run(alone, tmp_path / "run")


def test_a_killed_run_resumes_to_the_bit(alone, data, tmp_path):
    run = tmp_path / "run"
    command = [*map(str, SHARED), "--data", str(data), "--run-dir", str(run)]
    with open(tmp_path / "stderr", "w") as stderr:
        training = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command, "--max-steps", "100000"],
                                    stdout=stderr, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not (run / "state.pt").exists() and training.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    training.kill()
    training.wait()
    killed_after = load(run / "state.pt")["step"]
    assert killed_after < STEPS, (tmp_path / "stderr").read_text()
    process("train", *command, "--max-steps", STEPS)
    assert [line["step"] for line in log(run)][-(STEPS - killed_after) :] == list(range(killed_after + 1, STEPS + 1))
    assert_same_run(alone, run)


def test_resuming_plain_sit_with_previews(capsys, latents, tmp_path, one_thread):
    """Neither a preview nor what may change between runs disturbs the weights."""
    flags = ("--vae-repa-depth", 0, "--ckpt-every", 2, "--lr", 1e-3)
    fit(capsys, latents, tmp_path / "whole", *flags, "--max-steps", 5)
    run = tmp_path / "run"
    fit(capsys, latents, run, *flags, "--max-steps", 2)
    (run / "state.pt.tmp").write_bytes((run / "state.pt").read_bytes()[:100_000])  # as a kill leaves it
    fit(capsys, latents, run, *flags, "--max-steps", 5, "--sample-every", 4, "--log-every", 2)
    assert (run / "samples" / "0000004.png").exists()
    assert_same_run(tmp_path / "whole", run)


def test_the_same_command_again_has_nothing_to_do(capsys, alone, data):
    before = {path: path.read_bytes() for path in alone.rglob("*") if path.is_file()}
    status, _, _ = cli(capsys, "train", *SHARED, "--data", data, "--run-dir", alone, "--max-steps", STEPS)
    assert status == 0 and {path: path.read_bytes() for path in alone.rglob("*") if path.is_file()} == before


def complaint(capsys, *flags):
    """The one sentence that train.py prints on stderr, beside progress bars, as it stops with status 2."""
    status, _, stderr = cli(capsys, "train", *TINY, "--max-steps", 2, *flags)
    bar = r"training: .*\]\s*|\s*"
    lines = [line for line in re.split("[\r\n]", stderr) if not re.fullmatch(bar, line)]
    assert status == 2, stderr
    assert len(lines) == 1 and lines[0].startswith("train.py: error: "), stderr
    return lines[0]


def test_no_latents(capsys, tmp_path):
    message = complaint(capsys, "--data", tmp_path / "missing", "--run-dir", tmp_path / "run")
    assert "extract_latents.py" in message and "tests/demo.py" in message and str(tmp_path / "missing") in message
    assert not (tmp_path / "run").exists()


def test_an_unfinished_set(capsys, data, tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    for end in ("partial", "progress", "settings"):
        (folder / f"moments.npy.{end}").write_bytes(b"{}")
    message = complaint(capsys, "--data", folder, "--run-dir", tmp_path / "run")
    assert "unfinished" in message and "extract_latents.py" in message
    assert not (tmp_path / "run").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [
    lambda f: truncate(f / "moments.npy"), lambda f: truncate(f / "labels.npy"), lambda f: truncate(f / "latents.json"),
    lambda f: (f / "moments.npy").write_bytes(b""),
    lambda f: (f / "moments.npy").unlink(), lambda f: (f / "labels.npy").unlink(),
    lambda f: (f / "latents.json").write_text("[]"), lambda f: (f / "latents.json").write_text('{"scale": 1}'),
    lambda f: np.save(f / "moments.npy", np.zeros((12, 8, 8, 6), np.float16)),
    lambda f: np.save(f / "moments.npy", np.zeros((11, 8, 8, 8), np.float16)),
    lambda f: np.save(f / "labels.npy", np.arange(11) % 10), lambda f: np.save(f / "labels.npy", np.arange(12) % 11),
    lambda f: np.save(f / "labels.npy", np.arange(12) % 10 - 1)])
def test_a_damaged_set(capsys, data, tmp_path, damage):
    shutil.copytree(data, tmp_path / "latents")
    damage(tmp_path / "latents")
    message = complaint(capsys, "--data", tmp_path / "latents", "--run-dir", tmp_path / "run")
    assert "damaged" in message and str(tmp_path / "latents") in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("about", [{"shift": [0.1, 0.2]}, {"scale": None}])
def test_a_set_with_a_wrong_normalisation(capsys, tmp_path, about):
    folder = write_set(tmp_path / "latents", **about)
    assert "damaged" in complaint(capsys, "--data", folder, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, names", [
    (("--model", "SiT-XXL/2"), ["SiT-XXL/2", "SiT-XL/2"]),
    (("--vae-repa-depth", 7), ["7", "6"]), (("--sra-depth", 2, "--sra-teacher-depth", 7), ["7", "6"]),
    (("--vae-repa-depth", -1), ["-1"]),
    (("--vae-repa-layers", 1), ["layers"]),
    (("--batch-size", 4, "--micro-batch", 3), ["--batch-size 4", "--micro-batch 3"]),
    (("--batch-size", 4, "--micro-batch", 8), ["--batch-size 4", "--micro-batch 8"]),
    (("--batch-size", 0), ["--batch-size"]),
    (("--vae-repa-interval", 0.6, 0.4), ["--vae-repa-interval 0.6 0.4"]),
    (("--vae-repa-interval", -0.1, 0.4), ["--vae-repa-interval", "-0.1"]),
    (("--vae-repa-interval", 0.5, 1.5), ["--vae-repa-interval", "1.5"]),
    (("--vae-repa-interval", 0, "nan"), ["--vae-repa-interval"]),
    (("--vae-repa-dept", 2), ["--vae-repa-dept"]),  # no abbreviations either
    (("--vea-repa-depth", 2), ["--vea-repa-depth"]),
    (("--max-step", 2), ["--max-step"]),
    (("--vae-repa-loss", "huber"), ["huber", "smooth_l1"]),
    (("--lr", "nan"), ["--lr"]), (("--lr", 0), ["--lr"]), (("--vae-repa-weight", -1), ["--vae-repa-weight"]),
    (("--vae-repa-beta", 0), ["--vae-repa-beta"]), (("--label-dropout", 1.5), ["--label-dropout"]),
    (("--ema-decay", 1.1), ["--ema-decay"]), (("--grad-clip", 0), ["--grad-clip"]), (("--seed", -1), ["--seed"])])
def test_bad_flags(capsys, data, tmp_path, flags, names):
    message = complaint(capsys, "--data", data, "--run-dir", tmp_path / "run", *flags)
    assert all(name in message for name in names), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes, micro_batch, fits", [(3, 1, False), (2, 4, False), (2, 1, True), (2, 2, True)])
def test_the_batch_of_4_is_shared(capsys, monkeypatch, data, tmp_path, processes, micro_batch, fits):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if fits:
        assert parsed(monkeypatch, *TINY, "--micro-batch", micro_batch).micro_batch == micro_batch
    else:
        flags = ("--data", data, "--run-dir", tmp_path / "run", "--micro-batch", micro_batch)
        assert f"{processes} process" in complaint(capsys, *flags)
        assert not (tmp_path / "run").exists()
    assert parsed(monkeypatch, "--batch-size", 4 * processes).micro_batch == 4  # by default the whole share


def test_latents_that_patches_do_not_tile(capsys, tmp_path):
    message = complaint(capsys, "--data", write_set(tmp_path / "latents", size=6), "--run-dir", tmp_path / "run")
    assert "6" in message and "patch size 4" in message
    assert not (tmp_path / "run").exists()


def test_a_vae_that_is_gone(capsys, tmp_path):
    """Found out before the first step, by a run that will draw with it."""
    folder = write_set(tmp_path / "latents", vae=str(tmp_path / "gone"))
    flags = ("--data", folder, "--run-dir", tmp_path / "run", "--max-steps", 2, "--sample-every", 2)
    assert str(tmp_path / "gone") in complaint(capsys, *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [
    ("--lr", 2e-3), ("--seed", 2), ("--batch-size", 4), ("--model", "SiT-Ti/8"), ("--precision", "bf16"),
    ("--vae-repa-depth", 3), ("--vae-repa-interval", 0, 1), ("--vae-repa-weight", 0.5)])
def test_settings_that_disagree_with_the_run_directory(capsys, alone, data, change):
    before = {path: path.read_bytes() for path in alone.rglob("*") if path.is_file()}
    message = complaint(capsys, *SHARED, "--data", data, "--run-dir", alone, "--max-steps", STEPS + 1, *change)
    assert change[0][2:].replace("-", "_") in message and str(change[-1]) in message and str(alone) in message
    assert {path: path.read_bytes() for path in alone.rglob("*") if path.is_file()} == before


def test_a_run_from_before_a_flag_was_added(capsys, alone, data, tmp_path):
    """A fork's new flag does not stop an older run from resuming."""
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    settings = json.loads((run / "settings.json").read_text())
    del settings["sra_t_max"]
    (run / "settings.json").write_text(json.dumps(settings))
    fit(capsys, data, run, *SHARED, "--max-steps", STEPS + 1)
    assert [line["step"] for line in log(run)] == list(range(1, STEPS + 2))


def test_no_guidance_without_a_null_class(capsys, monkeypatch, latents, tmp_path):
    """--label-dropout 0 never trains the null class: grids are not guided, and sample.py refuses to."""
    scales, draw = [], train.sample_images
    monkeypatch.setattr(train, "sample_images", lambda *args, **options: scales.append(options["cfg_scale"]) or draw(*args, **options))
    for dropout in (0, 0.1):
        run = tmp_path / str(dropout)
        fit(capsys, latents, run, "--max-steps", 1, "--sample-every", 1, "--label-dropout", dropout)
        status, _, stderr = cli(capsys, "sample", "--ckpt", run / "state.pt", "--cfg-scale", 2, "--num-steps", 2, "--per-class", 1)
        assert (status, "--label-dropout 0" in stderr) == ((0, False) if dropout else (2, True)), stderr
    assert scales == [1.0, 4.0]


def test_other_latents_than_the_run_began_with(capsys, alone, tmp_path):
    other = write_set(tmp_path / "latents", files_sha256="1", scale=1.0)
    message = complaint(capsys, *SHARED, "--data", other, "--run-dir", alone, "--max-steps", STEPS + 1)
    assert "files_sha256" in message and "scale" in message


@pytest.mark.parametrize("part", [0, 0.001, 0.5, 0.999])
def test_a_truncated_state_in_the_run_directory(capsys, alone, data, tmp_path, part):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    path, before = run / "state.pt", sorted(tmp_path.rglob("*"))
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    message = complaint(capsys, *SHARED, "--data", data, "--run-dir", run, "--max-steps", STEPS)
    assert str(path) in message and sorted(tmp_path.rglob("*")) == before


def test_a_loss_that_is_not_finite(capsys, tmp_path):
    """The first bad step is named, however late it is noticed, and no checkpoint follows it."""
    good = write_set(tmp_path / "good")
    moments = np.load(good / "moments.npy")
    moments[drawn_rows(0, 2, 4, 12)[1], 0, 0, 0] = np.nan  # first met in step 3
    bad = write_set(tmp_path / "bad", moments=moments)
    for every, saved in ((2, ["0000002.pt", "state.pt"]), (5, [])):
        run = tmp_path / f"run{every}"
        flags = ("--max-steps", 5, "--log-every", 5, "--ckpt-every", every)
        message = complaint(capsys, "--data", bad, "--run-dir", run, *flags)
        assert re.search(r"not finite at step 3\b", message)
        assert sorted(path.name for path in run.rglob("*.pt")) == saved and not (run / "log.jsonl").exists()
        assert all(value.isfinite().all() for path in run.rglob("*.pt") for value in load(path)["ema"].values())


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_bf16_and_compile_on_a_gpu(capsys, monkeypatch, data, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    kinds, original = [], train.training_losses

    def recorder(*arguments):
        losses = original(*arguments)
        kinds.extend((loss.device.type, loss.dtype, torch.is_autocast_enabled("cuda")) for loss in losses.values())
        return losses

    monkeypatch.setattr(train, "training_losses", recorder)
    flags = ("--max-steps", 3, "--lr", 1e-3)
    lines, checkpoint = fit(capsys, data, tmp_path / "bf16", *flags, "--precision", "bf16", "--compile")
    reference, _ = fit(capsys, data, tmp_path / "fp32", *flags)
    assert kinds[:6] == [("cuda", torch.float32, True)] * 6 and kinds[6:] == [("cuda", torch.float32, False)] * 6
    for a, b in zip(lines, reference, strict=True):
        assert [a["denoising"], a["vae_repa"]] == pytest.approx([b["denoising"], b["vae_repa"]], rel=0.02)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in checkpoint["ema"].values())


def test_two_runs_in_one_directory(capsys, data, tmp_path):
    """The second is refused as long as the first lives, and not a moment longer."""
    run = tmp_path / "run"
    run.mkdir()
    code = "import sys, time; from extract_latents import lock; lock(sys.argv[1], ''); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, run / "lock"], cwd=ROOT, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        message = complaint(capsys, *SHARED, "--data", data, "--run-dir", run, "--max-steps", 1)
        assert "another process" in message and str(run) in message and not list(run.rglob("*.pt"))
        first.kill()
    fit(capsys, data, run, "--max-steps", 1)
    assert sorted(path.name for path in run.rglob("*.pt")) == ["0000001.pt", "state.pt"]


@pytest.mark.parametrize("room, name", [(0.1, "0000002.pt"), (0.5, "state.pt")])
def test_a_full_disk(capsys, data, tmp_path, room, name):
    """What does not fit, a numbered checkpoint or the state, leaves nothing behind, and what was there is whole."""
    run = tmp_path / "run"
    fit(capsys, data, run, "--max-steps", 1)
    state, first = run / "state.pt", run / "checkpoints" / "0000001.pt"
    before = {path: path.read_bytes() for path in (state, first)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * state.stat().st_size), hard))
    try:
        message = complaint(capsys, "--data", data, "--run-dir", run, "--max-steps", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert name in message and "disk full" in message
    assert not list(run.rglob("*.tmp")) and {path: path.read_bytes() for path in before} == before
    fit(capsys, data, run, "--max-steps", 2)
    assert load(state)["step"] == load(run / "checkpoints" / "0000002.pt")["step"] == 2
