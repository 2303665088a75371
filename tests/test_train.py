"""train.py: losses against formulas, what main feeds them, many processes against one, resuming, and bad input."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, cli, process
from PIL import Image
from scipy import stats

import sample
import train
from models import SiT, SiT_models

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
             "latent_shape": [4, size, size], "image_size": 8 * size, "count": 12, "files_sha256": "0",
             "class_names": [f"class {i}" for i in range(10)], **about}
    (folder / "latents.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "latents")


def fit(capsys, data, run, *flags):
    """Train in this process: (log lines, the last checkpoint)."""
    status, _, stderr = cli(capsys, "train", *TINY, "--data", data, "--run-dir", run, *flags)
    assert status == 0, stderr
    return log(run), load(max((run / "checkpoints").glob("*.pt")))


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

    def loss(objective, beta=0.05):
        return train.alignment_loss(x_pred, x, objective, beta, patch)

    assert delta[0].abs().min() < 0.05 < delta[1].abs().max()
    torch.testing.assert_close(loss("smooth_l1"), smooth_l1(delta).mean((1, 2, 3)))
    torch.testing.assert_close(loss("smooth_l1", 0.7), smooth_l1(delta, 0.7).mean((1, 2, 3)))
    torch.testing.assert_close(loss("l1"), delta.abs().mean((1, 2, 3)))
    torch.testing.assert_close(loss("l2"), (delta**2).mean((1, 2, 3)))
    expected = torch.zeros(3, dtype=torch.float64)
    for i in range(0, 4, patch):
        for j in range(0, 4, patch):
            a, b = (z[:, :, i : i + patch, j : j + patch].flatten(1) for z in (x_pred, x))
            expected += 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(loss("cosine"), expected / (4 // patch) ** 2)


def test_smooth_l1_is_continuous_at_beta():
    x = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    x_pred = torch.tensor([0.05 - 1e-9, 0.05 + 1e-9], dtype=torch.float64).view(2, 1, 1, 1)
    below, above = train.alignment_loss(x_pred, x, "smooth_l1", 0.05, 1).tolist()
    assert below == pytest.approx(0.025, abs=1e-7) and above == pytest.approx(0.025, abs=1e-7)


def vae_repa(objective="smooth_l1", beta=0.05, patch_size=2):
    """The alignments of a run of VAE-REPA alone."""
    args = SimpleNamespace(vae_repa_loss=objective, vae_repa_beta=beta, vae_repa_weight=1.0, repa_weight=0.5, sra_weight=0.2,
                           sra_teacher_depth=4)
    model = SimpleNamespace(patch_size=patch_size, align_depths={"vae_repa": 2, "repa": 0, "sra": 0})
    return train.build_alignments(args, model, None)


class Recorder(torch.nn.Module):
    """Stands in for SiT: keeps what it is given and answers with fixed bf16 tensors."""

    def __init__(self, v, x_pred):
        super().__init__()
        self.answer = (v, {"vae_repa": x_pred})

    def forward(self, x_t, t, y, return_align):
        self.seen = x_t, t, y, return_align
        return self.answer


def test_the_aligned_target_is_the_very_latent_that_made_x_t():
    x, noise, v_pred, x_pred = torch.randn(4, 5, 4, 8, 8)
    t, y = torch.rand(5), torch.arange(5)
    model = Recorder(v_pred.bfloat16(), x_pred.bfloat16())
    batch = {"x": x, "y": y, "t": t, "noise": noise}
    denoising, alignment = train.training_losses(model, batch, vae_repa()).values()
    x_t, t_seen, y_seen, aligned = model.seen
    assert aligned and torch.equal(t_seen, t) and torch.equal(y_seen, y)
    torch.testing.assert_close(x_t, (1 - t.view(5, 1, 1, 1)) * x + t.view(5, 1, 1, 1) * noise)
    assert denoising.dtype == alignment.dtype == torch.float32 and denoising.shape == alignment.shape == (5,)
    # a target rounded to bf16 would be off by 1e-3
    v_error, x_error = v_pred.bfloat16().float() - (noise - x), x_pred.bfloat16().float() - x
    torch.testing.assert_close(denoising, v_error.square().mean((1, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(alignment, smooth_l1(x_error).mean((1, 2, 3)), rtol=1e-5, atol=0)

    share = torch.arange(5.0)
    weighed = train.training_losses(model, {**batch, "vae_repa_share": share}, vae_repa())
    assert torch.equal(weighed["vae_repa"], share * alignment) and torch.equal(weighed["denoising"], denoising)
    model.answer = (v_pred.bfloat16(), {})
    (plain,) = train.training_losses(model, batch, {}).values()
    assert torch.equal(plain, denoising)


def test_alignment_options_reach_the_objective():
    x, noise, v_pred, x_pred = torch.randn(4, 2, 4, 8, 8)
    model, batch = Recorder(v_pred, x_pred), {"x": x, "y": torch.zeros(2, dtype=torch.long), "t": torch.rand(2), "noise": noise}
    wide = train.training_losses(model, batch, vae_repa("smooth_l1", 1.5))["vae_repa"]
    torch.testing.assert_close(wide, smooth_l1(x_pred - x, 1.5).mean((1, 2, 3)))
    cosines = [train.training_losses(model, batch, vae_repa("cosine", 0.05, p))["vae_repa"] for p in (1, 2, 8)]
    whole = 1 - (x_pred * x).sum((1, 2, 3)) / (x_pred.flatten(1).norm(dim=1) * x.flatten(1).norm(dim=1))
    torch.testing.assert_close(cosines[2], whole)
    assert not torch.allclose(cosines[0], cosines[1])


@pytest.mark.parametrize("shift, scale", [(0.25, 0.18215), ([0.5, 1.0, -2.0, 0.0], [0.1, 1.0, 2.0, 4.0])])
def test_posterior_sample(shift, scale):
    rng = np.random.default_rng(0)
    mean, std = rng.normal(0, 3, (2, 4, 3, 3)).astype(np.float16), rng.uniform(0.1, 2, (2, 4, 3, 3)).astype(np.float16)
    eps = rng.normal(size=(2, 4, 3, 3)).astype(np.float32)
    moments = torch.from_numpy(np.concatenate([mean, std], 1))
    x = train.sample_posterior(moments, torch.from_numpy(eps), *(train.per_channel(v, moments) for v in (shift, scale)))
    shift, scale = (np.reshape(value, (-1, 1, 1)).astype(np.float64) for value in (shift, scale))
    expected = (mean.astype(np.float64) + std.astype(np.float64) * eps - shift) * scale
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_posterior_samples_scatter_around_the_mean_by_std():
    eps = train.draw_step(20_000, (4, 1, 1), 0, 0, [0, 1], 0.1, "cpu")[0]
    mean, std = torch.tensor([0.0, 1.0, -2.0, 5.0]), torch.tensor([1.0, 0.5, 0.0, 2.0])
    moments = torch.cat([mean, std]).view(1, 8, 1, 1).expand(20_000, -1, -1, -1)
    x = train.sample_posterior(moments, eps, torch.tensor(1.0), torch.tensor(0.5))
    torch.testing.assert_close(x.mean(0).flatten(), (mean - 1) * 0.5, rtol=0, atol=0.03)
    torch.testing.assert_close(x.std(0).flatten(), std * 0.5, rtol=0.03, atol=0)


def test_a_step_draws_by_seed_and_step_alone():
    def draw(seed, step):
        torch.manual_seed(np.random.randint(2**31))  # the global generator plays no part
        return train.draw_step(64, (4, 2, 2), seed, step, [0, 1], 0.5, "cpu")

    first = draw(0, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(0, 7)))
    for other in (draw(0, 8), draw(1, 7), draw(1, 6), draw(7, 0)):
        assert not any(torch.equal(a, b) for a, b in zip(first[:4], other[:4]))
        assert not set(first[2].tolist()) & set(other[2].tolist())  # nor an image's draw moved elsewhere
    assert not torch.equal(first[0], first[1])


def test_distributions_of_a_step():
    n = 20_000
    eps, noise, t, drop, align, u = train.draw_step(n, (2,), 3, 5, [0, 1], 0.1, "cpu")
    assert stats.kstest(t.numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01 and abs(np.corrcoef(t, u)[0, 1]) < 0.03
    assert all(stats.kstest(normal.flatten().numpy(), "norm").pvalue > 0.01 for normal in (eps, noise))
    assert abs((eps * noise).mean()) < 0.03
    assert drop.dtype == torch.bool and abs(drop.float().mean() - 0.1) < 0.01
    assert abs(t[drop].mean() - 0.5) < 0.03  # labels are dropped at all times alike
    assert torch.equal(align, torch.ones(n))
    assert not train.draw_step(n, (2,), 3, 5, [0, 1], 0.0, "cpu")[3].any()


def test_alignment_averages_over_the_images_inside_the_interval():
    losses = torch.rand(64)
    for low, high in [(0, 0.5), (0.5, 1), (0.3, 0.4)]:
        _, _, t, _, align, _ = train.draw_step(64, (4, 2, 2), 0, 0, [low, high], 0.1, "cpu")
        inside = (low <= t) & (t <= high)
        assert 0 < inside.sum() < 64
        torch.testing.assert_close((align * losses).mean(), losses[inside].mean())
    align = train.draw_step(64, (4, 2, 2), 0, 0, [0.5, 0.5], 0.1, "cpu")[4]
    assert torch.equal(align, torch.zeros(64))  # none inside: 0, not NaN
    t = train.draw_step(64, (4, 2, 2), 0, 0, [0.5, 0.5], 0.1, "cpu")[2]
    assert torch.equal(t, train.draw_step(64, (4, 2, 2), 0, 0, [0, 1], 0.1, "cpu")[2])  # t itself stays uniform


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
def test_batches(count, batch):
    steps = 15
    whole = list(train.StepBatches(count, batch, 0, 0, steps))
    assert [len(rows) for rows in whole] == [batch] * steps
    rows = sum(whole, [])
    epochs = [rows[i : i + count] for i in range(0, len(rows) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew
    assert epochs[0] != sorted(epochs[0]) or epochs[1] != sorted(epochs[1])
    for processes in (2, 4):
        shares = [train.StepBatches(count, batch, 0, 0, steps, rank, processes) for rank in range(processes)]
        assert [sum(parts, []) for parts in zip(*shares)] == whole
    assert list(train.StepBatches(count, batch, 0, 7, steps)) == whole[7:]
    assert list(train.StepBatches(count, batch, 1, 0, steps)) != whole


def test_the_order_does_not_depend_on_where_training_ends():
    assert list(islice(train.StepBatches(12, 4, 0, 0, 10**9), 5)) == list(train.StepBatches(12, 4, 0, 0, 5))


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
        losses = train.training_losses(model, {"x": x, "y": y, "t": t, "noise": noise}, vae_repa())
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

    def recorder(model, batch, alignments):
        calls.append([batch[name] for name in ("x", "y", "t", "noise")])
        return original(model, batch, alignments)

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
    for step, (rows, (x, y, t, noise)) in enumerate(zip(train.StepBatches(12, 12, 5, 0, 6), seen, strict=True)):
        eps, noise_drawn, t_drawn, drop, _, _ = train.draw_step(12, (4, 8, 8), 5, step, [0.2, 0.6], 0.4, "cpu")
        expected = (mean[rows] + std[rows] * eps.numpy() - shift) * scale
        np.testing.assert_allclose(x.numpy(), expected, rtol=1e-4, atol=1e-4)
        draws_of_row_7.add(x[rows.index(7), 0, 0, 0].item())
        assert torch.equal(noise, noise_drawn) and torch.equal(t, t_drawn)
        assert y.tolist() == [10 if out else labels[row] for row, out in zip(rows, drop.tolist())]
        dropped += (y == 10).sum().item()
        # the model starts at zero and hardly moves here, so the losses are known, and are logged unweighted
        inside = (0.2 <= t) & (t <= 0.6)
        assert lines[step]["denoising"] == pytest.approx(((noise - x) ** 2).mean().item(), rel=1e-4)
        assert lines[step]["vae_repa"] == pytest.approx(smooth_l1(x[inside]).mean().item(), rel=1e-4)
    assert 12 < dropped < 48 and len(draws_of_row_7) == 6


@pytest.mark.parametrize("flags, formula", [
    (("--vae-repa-loss", "l1"), lambda x: x.abs().mean()), (("--vae-repa-loss", "l2"), lambda x: x.square().mean()),
    (("--vae-repa-loss", "cosine"), lambda x: x.new_tensor(1.0)),
    (("--vae-repa-beta", 0.8), lambda x: smooth_l1(x, 0.8).mean()),
    (("--vae-repa-weight", 0.1), lambda x: smooth_l1(x).mean()),
    (("--vae-repa-layers", 2), lambda x: smooth_l1(x).mean()), (("--vae-repa-depth", 6), lambda x: smooth_l1(x).mean())])
def test_rows_of_table_1_are_flags(capsys, seen, data, tmp_path, flags, formula):
    """The head first predicts 0, so its term is known at step 1; the weight scales the gradient and not the log."""
    (line,), checkpoint = fit(capsys, data, tmp_path / "run", "--max-steps", 1, "--grad-clip", "inf", *flags)
    x = seen[0][0]
    assert line["vae_repa"] == pytest.approx(formula(x).item(), rel=1e-5)
    assert checkpoint["settings"][flags[0][2:].replace("-", "_")] == flags[1]
    head = sorted(k for k in checkpoint["model"] if k.startswith("vae_repa_head.mlp") and k.endswith("weight"))
    assert len(head) == (1 if "--vae-repa-layers" in flags else 4)
    if flags[0] == "--vae-repa-weight":  # d smooth_l1(0 - x) / d prediction is clamp(-x / beta, -1, 1)
        names = [name for name, _ in built(checkpoint["settings"]).named_parameters()]
        bias = checkpoint["opt"]["state"][names.index("vae_repa_head.final_layer.linear.bias")]["exp_avg"] * 10
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
    first = load(run / "checkpoints" / "0000001.pt")
    start = built(first["settings"])
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
        assert 0 < line["images_per_s"] < 1e5 and 0.05 < line["memory_gib"] < 100


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
    for step, rows in enumerate(train.StepBatches(12, 4, 0, 0, 3)):
        eps, noise, t, _, _, _ = train.draw_step(4, (4, 8, 8), 0, step, [0, 1], 0, "cpu")
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


def test_checkpoint_and_settings(capsys, data, tmp_path):
    run = tmp_path / "run"
    _, checkpoint = fit(capsys, data, run, "--max-steps", 3, "--ckpt-every", 2, "--vae-repa-interval", 0.25, 0.5)
    files = sorted(path.name for path in run.rglob("*") if path.is_file())
    assert files == ["0000002.pt", "0000003.pt", "lock", "log.jsonl", "settings.json"]
    assert list(checkpoint) == ["model", "ema", "opt", "step", "settings"] and checkpoint["step"] == 3
    assert list(checkpoint["model"]) == list(checkpoint["ema"]) == list(built(checkpoint["settings"]).state_dict())
    settings = json.loads((run / "settings.json").read_text())
    assert settings == checkpoint["settings"]
    expected = {"model": "SiT-Ti/4", "vae_repa_depth": 2, "vae_repa_weight": 1.0, "vae_repa_loss": "smooth_l1",
                "vae_repa_beta": 0.05, "vae_repa_layers": 5, "vae_repa_interval": [0.25, 0.5], "batch_size": 4,
                "micro_batch": 4, "max_steps": 3, "lr": 1e-4, "ema_decay": 0.9999, "grad_clip": 1.0,
                "label_dropout": 0.1, "precision": "fp32", "compile": False, "seed": 0}
    assert {key: settings[key] for key in expected} == expected
    assert settings["data"]["latent_shape"] == [4, 8, 8] and settings["data"]["num_classes"] == 10
    assert settings["data"]["vae"] == "nobody/nothing" and settings["data"]["scale"] == [0.5, 0.25, 1.0, 2.0]


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
        ("--num-workers", 0)]


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
        images = sample.sample_images(model, train.load_vae(str(vae)), settings["data"], range(12),
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


def cut_short(run, copy, step):
    """A copy of a run as a kill after `step` leaves it, with half of the next checkpoint under its temporary name."""
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "settings.json", copy)
    shutil.copy(run / "checkpoints" / f"{step:07d}.pt", copy / "checkpoints")
    whole = (run / "checkpoints" / f"{step:07d}.pt").read_bytes()
    (copy / "checkpoints" / f"{step + 3:07d}.pt.tmp").write_bytes(whole[: len(whole) // 2])
    return copy


def assert_same_run(a, b):
    a, b = load(a), load(b)
    assert a["step"] == b["step"]
    for part in ("model", "ema"):
        assert list(a[part]) == list(b[part]) and all(torch.equal(a[part][key], b[part][key]) for key in a[part]), part
    assert list(a["opt"]["state"]) == list(b["opt"]["state"])
    for one, other in zip(a["opt"]["state"].values(), b["opt"]["state"].values()):
        assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def assert_close_run(run, other, step=STEPS):
    """Losses, gradients and weights of the same run in another order of summation."""
    for a, b in zip(log(run), log(other), strict=True):
        for key in ("denoising", "vae_repa", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
    a, b = (load(path / "checkpoints" / f"{step:07d}.pt") for path in (run, other))
    for i, (name, _) in enumerate(built(a["settings"]).named_parameters()):
        one, two = (c["opt"]["state"][i]["exp_avg"] for c in (a, b))  # the gradients of the last steps
        assert (one - two).abs().max() <= 1e-3 * one.abs().max(), name
        # a weight moves up to 1e-3 a step
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=0, atol=3e-4, msg=name)


def test_processes_and_micro_batches_change_nothing(alone, pair):
    weights = [train.draw_step(BATCH, (4, 8, 8), 1, step, [0, 0.5], 0.1, "cpu")[4] for step in range(STEPS)]
    inside = [weight.count_nonzero().item() for weight in torch.stack(weights).view(-1, BATCH // 2)]  # of each share
    assert 0 in inside and inside[::2] != inside[1::2]  # where a mean per process would go wrong
    assert_close_run(alone, pair)


def test_accumulation_equals_the_whole_batch(capsys, alone, data, tmp_path):
    fit(capsys, data, tmp_path / "run", *SHARED, "--max-steps", STEPS, "--micro-batch", 1)
    assert_close_run(alone, tmp_path / "run")


def test_two_processes_resume_to_the_bit(pair, data, tmp_path):
    run = cut_short(pair, tmp_path / "run", 3)
    flags = ("--max-steps", STEPS, "--micro-batch", 2, "--num-workers", 1)
    process("train", *SHARED, "--data", data, "--run-dir", run, *flags, processes=2)
    assert_same_run(pair / "checkpoints" / "0000012.pt", run / "checkpoints" / "0000012.pt")
    assert log(run)[0]["step"] == 4


def test_a_killed_run_resumes_to_the_bit(alone, data, tmp_path):
    run = tmp_path / "run"
    command = [*map(str, SHARED), "--data", str(data), "--run-dir", str(run)]
    with open(tmp_path / "stderr", "w") as stderr:
        training = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command, "--max-steps", "100000"],
                                    stdout=stderr, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first, deadline = run / "checkpoints" / "0000003.pt", time.time() + 120
    while not first.exists() and training.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    training.kill()
    training.wait()
    killed_after = max(int(path.stem) for path in (run / "checkpoints").glob("*.pt"))
    assert killed_after < STEPS, (tmp_path / "stderr").read_text()
    process("train", *command, "--max-steps", STEPS)
    assert [line["step"] for line in log(run)][-(STEPS - killed_after) :] == list(range(killed_after + 1, STEPS + 1))
    assert_same_run(alone / "checkpoints" / "0000012.pt", run / "checkpoints" / "0000012.pt")


def test_resuming_plain_sit_with_previews_and_workers(capsys, latents, tmp_path):
    """Neither a preview nor what may change between runs disturbs the weights."""
    flags = ("--vae-repa-depth", 0, "--max-steps", 5, "--ckpt-every", 2, "--lr", 1e-3)
    fit(capsys, latents, tmp_path / "whole", *flags)
    run = cut_short(tmp_path / "whole", tmp_path / "run", 2)
    fit(capsys, latents, run, *flags, "--sample-every", 4, "--log-every", 2, "--num-workers", 1)
    assert (run / "samples" / "0000004.png").exists()
    assert_same_run(tmp_path / "whole" / "checkpoints" / "0000005.pt", run / "checkpoints" / "0000005.pt")


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
    lambda f: (f / "latents.json").write_text("[]"), lambda f: (f / "latents.json").write_text('{"count": 12}'),
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
    (("--vae-repa-depth", 7), ["7", "6"]),
    (("--vae-repa-depth", -1), ["-1"]),
    (("--vae-repa-layers", 1), ["layers"]),
    (("--batch-size", 4, "--micro-batch", 3), ["--batch-size 4", "--micro-batch 3"]),
    (("--batch-size", 4, "--micro-batch", 8), ["--batch-size 4", "--micro-batch 8"]),
    (("--batch-size", 0), ["--batch-size"]),
    (("--vae-repa-interval", 0.6, 0.4), ["--vae-repa-interval 0.6 0.4"]),
    (("--vae-repa-interval", -0.1, 0.4), ["--vae-repa-interval -0.1 0.4"]),
    (("--vae-repa-interval", 0.5, 1.5), ["--vae-repa-interval 0.5 1.5"]),
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


def test_other_latents_than_the_run_began_with(capsys, alone, tmp_path):
    other = write_set(tmp_path / "latents", files_sha256="1", scale=1.0)
    message = complaint(capsys, *SHARED, "--data", other, "--run-dir", alone, "--max-steps", STEPS + 1)
    assert "files_sha256" in message and "scale" in message


@pytest.mark.parametrize("part", [0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_in_the_run_directory(capsys, alone, data, tmp_path, part):
    run = cut_short(alone, tmp_path / "run", 3)
    path = run / "checkpoints" / "0000003.pt"
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    message = complaint(capsys, *SHARED, "--data", data, "--run-dir", run, "--max-steps", STEPS)
    assert str(path) in message
    assert list(run.rglob("*.pt")) == [path] and not (run / "log.jsonl").exists()


def test_a_loss_that_is_not_finite(capsys, tmp_path):
    """The first bad step is named, however late it is noticed, and no checkpoint follows it."""
    good = write_set(tmp_path / "good")
    moments = np.load(good / "moments.npy")
    moments[list(train.StepBatches(12, 4, 0, 0, 3))[2][1], 0, 0, 0] = np.nan  # first met in step 3
    bad = write_set(tmp_path / "bad", moments=moments)
    for every, saved in ((2, ["0000002.pt"]), (5, [])):
        run = tmp_path / f"run{every}"
        flags = ("--max-steps", 5, "--log-every", 5, "--ckpt-every", every)
        message = complaint(capsys, "--data", bad, "--run-dir", run, *flags)
        assert re.search(r"not finite at step 3\b", message)
        assert [path.name for path in run.rglob("*.pt")] == saved and not (run / "log.jsonl").exists()
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
    assert [path.name for path in run.rglob("*.pt")] == ["0000001.pt"]


def test_a_full_disk(capsys, data, tmp_path):
    """The checkpoint that does not fit leaves nothing behind, and the one before it is whole."""
    run = tmp_path / "run"
    _, before = fit(capsys, data, run, "--max-steps", 1)
    kept = run / "checkpoints" / "0000001.pt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kept.stat().st_size // 2, hard))
    try:
        message = complaint(capsys, "--data", data, "--run-dir", run, "--max-steps", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "0000002.pt" in message and "disk full" in message
    assert list((run / "checkpoints").iterdir()) == [kept]
    assert all(torch.equal(value, before["ema"][name]) for name, value in load(kept)["ema"].items())
    fit(capsys, data, run, "--max-steps", 2)
    assert load(run / "checkpoints" / "0000002.pt")["step"] == 2
