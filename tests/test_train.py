"""train.py: the paper's losses, draws and update against formulas and a plain loop; runs of other processes,
micro-batches, kills and compilers that must be the same run; what it writes; the paper's flags; bad input."""

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY, Killed, cli, drawn_numbers, drawn_rows, message, write_set
from PIL import Image
from torch._dynamo.testing import CompileCounter

import sample
import train
from extract_latents import load_vae
from models import SiT_models, patchify

pytestmark = pytest.mark.usefixtures("all_on_one_thread")


def fit(capsys, data, run, *flags, script="train"):
    """Train in this process: (log lines, the last state)."""
    status, _, stderr = cli(capsys, script, *TINY, "--data", data, "--run-dir", run, *flags)
    assert status == 0, stderr
    return log(run), load(run / "state.pt")


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def load(path):
    return torch.load(path, weights_only=True)


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    return train.parse_args()


def same_tensors(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_run(a, b):
    """The states of two runs, bit by bit; and their last numbered checkpoints."""
    one, other = load(a / "state.pt"), load(b / "state.pt")
    assert one["step"] == other["step"] and list(one["opt"]["state"]) == list(other["opt"]["state"])
    assert same_tensors(one["model"], other["model"]) and same_tensors(one["ema"], other["ema"])
    assert all(map(same_tensors, one["opt"]["state"].values(), other["opt"]["state"].values()))
    for run, state in ((a, one), (b, other)):
        assert same_tensors(load(run / "checkpoints" / f"{one['step']:07d}.pt")["ema"], state["ema"])


def assert_close_run(run, other, steps):
    """Losses, gradients and weights of the same run in another order of summation."""
    for a, b in zip(log(run), log(other), strict=True):
        for key in a.keys() - {"seconds", "images_per_s", "memory_gib"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (a["step"], key)
    a, b = (load(path / "state.pt") for path in (run, other))
    assert a["step"] == b["step"] == steps
    for i, (name, _) in enumerate(built(a["settings"]).named_parameters()):
        one, two = (state["opt"]["state"][i]["exp_avg"] for state in (a, b))  # the last gradients
        assert (one - two).abs().max() <= 1e-3 * one.abs().max(), name
        # a weight moves up to 1e-3 a step
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=0, atol=3e-4, msg=name)


def distance(a, b, kind="smooth_l1", beta=0.05):
    """Of tokens (B, N, dim) from others: (B,)."""
    delta = (a - b).abs()
    if kind == "cosine":
        norms = a.norm(dim=2).clamp(min=1e-8) * b.norm(dim=2).clamp(min=1e-8)
        return -((a * b).sum(2) / norms).mean(1)
    smooth = torch.where(delta < beta, delta**2 / (2 * beta), delta - beta / 2)
    return {"smooth_l1": smooth, "l1": delta, "l2": delta**2}[kind].mean((1, 2))


def built(settings):
    """The model that main builds, with main's initial weights."""
    torch.manual_seed(settings["seed"])
    channels, size, _ = settings["data"]["latent_shape"]
    heads = ("vae_repa_depth", "vae_repa_layers", "vae_repa_loss", "repa_depth", "sra_depth", "repa_dim")
    return SiT_models[settings["model"]](
        input_size=size, in_channels=channels, num_classes=settings["data"]["num_classes"],
        **{name: settings[name] for name in heads if name in settings})


def plain_loop(settings, folder, steps, encoder=None):
    """What these settings ask train.py to compute, from the files: (log lines, weights, averaged weights)."""
    args, facts, model = SimpleNamespace(**settings), settings["data"], built(settings)
    about = json.loads((folder / "latents.json").read_text())
    moments, labels, images = (torch.from_numpy(np.load(folder / f"{name}.npy"))
                               for name in ("moments", "labels", "images"))
    images = images.permute(0, 3, 1, 2)
    shift, scale = (torch.tensor(about[key]).view(-1, 1, 1) for key in ("shift", "scale"))
    ema, size, weights, lines = copy.deepcopy(model), args.batch_size, list(model.parameters()), []
    first, second = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    for step in range(steps):
        rows = torch.tensor(drawn_rows(args.seed, step, size, 12))
        eps, noise, t, u_drop, u_teacher = drawn_numbers(args.seed, step, size, facts["latent_shape"])
        mean, std = moments[rows].float().chunk(2, dim=1)
        x = (mean + std * eps - shift) * scale
        y = torch.where(u_drop < args.label_dropout, facts["num_classes"], labels[rows])
        s, u = t.view(-1, 1, 1, 1), (t - args.sra_t_max * u_teacher).clamp(min=0)
        v, heads = model((1 - s) * x + s * noise, t, y, return_align=True)
        losses = {"denoising": (v - (noise - x)).square().mean()}
        if args.vae_repa_depth:
            low, high = args.vae_repa_interval
            inside, target = (low <= t) & (t <= high), patchify(x, like=heads["vae_repa"])
            each = distance(heads["vae_repa"], target, args.vae_repa_loss, args.vae_repa_beta)
            losses["vae_repa"] = (each * inside).mean() / (high - low)
        if args.repa_depth:
            losses["repa"] = distance(heads["repa"], encoder(images[rows]), "cosine").mean()
        if args.sra_depth:
            s = u.view(-1, 1, 1, 1)
            teacher, _ = ema.early_blocks((1 - s) * x + s * noise, u, y, args.sra_teacher_depth)
            losses["sra"] = distance(heads["sra"], teacher.detach()).mean()
        factors = {"denoising": 1, **{name: settings[f"{name}_weight"] for name in heads}}
        gradients = torch.autograd.grad(sum(factors[name] * loss for name, loss in losses.items()), weights,
                                        allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, gradients)]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        lines.append({**{name: loss.item() for name, loss in losses.items()}, "grad_norm": norm.item()})
        with torch.no_grad():
            for p, g, m, w, average in zip(weights, gradients, first, second, ema.parameters()):
                g = g * min(args.grad_clip / (norm.item() + 1e-6), 1)
                m.mul_(0.9).add_(g, alpha=0.1)
                w.mul_(0.999).add_(g**2, alpha=0.001)
                p -= args.lr * (m / (1 - 0.9 ** (step + 1))) / ((w / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                average.copy_(args.ema_decay * average + (1 - args.ema_decay) * p)
    return lines, model.state_dict(), ema.state_dict()


def assert_as_plain(data, run, steps, encoder=None):
    state = load(run / "state.pt")
    lines, weights, average = plain_loop(state["settings"], data, steps, encoder)
    for line, expected in zip(log(run), lines, strict=True):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=1e-3, abs=1e-6), (line["step"], key)
        assert list(line)[1:-5] == list(expected)
    for found, expected in ((state["model"], weights), (state["ema"], average)):
        assert list(found) == list(expected)
        for name in found:
            off = (found[name] - expected[name]).abs() > 2e-5
            assert off.float().mean() < 1e-3, name  # of a gradient that is 0 to rounding, Adam takes any sign


PLAIN = [("--vae-repa-depth", 0), ("--vae-repa-weight", 0)]


@pytest.mark.parametrize("flags", [
    *PLAIN, ("--vae-repa-depth", 6), ("--vae-repa-weight", 0.1), ("--vae-repa-layers", 2),
    ("--vae-repa-beta", 0.8), ("--vae-repa-loss", "l1"), ("--vae-repa-loss", "l2"), ("--model", "SiT-Ti/2"),
    ("--vae-repa-loss", "cosine"), ("--vae-repa-interval", 0.2, 0.6), ("--vae-repa-interval", 0.5, 1),
    ("--grad-clip", 0.01, "--lr", 3e-3), ("--label-dropout", 0.5, "--batch-size", 8, "--seed", 5),
    ("--sra-t-max", 0.6, "--sra-depth", 1)], ids=lambda flags: "_".join(map(str, flags)))
def test_training_equals_a_plain_loop(capsys, data, tmp_path, flags):
    """Rows of the paper's Table 1, other flags, and plain SiT: losses, norms, weights and their average."""
    common = ("--max-steps", 3, "--lr", 1e-3, "--ema-decay", 0.75)
    _, state = fit(capsys, data, tmp_path / "run", *common, *flags)
    value = list(flags[1:]) if flags[0] == "--vae-repa-interval" else flags[1]
    assert state["settings"][flags[0][2:].replace("-", "_")] == value
    assert any("vae_repa" in name for name in state["model"]) == (flags not in PLAIN)
    assert_as_plain(data, tmp_path / "run", 3)
    (group,) = state["opt"]["param_groups"]
    assert (tuple(group["betas"]), group["weight_decay"]) == ((0.9, 0.999), 0)


@pytest.mark.parametrize("objective", ["smooth_l1", "l1", "l2", "cosine"])
def test_losses_of_bf16_predictions(objective):
    """They are float32, of each image, and no target is rounded to bf16, which would be off by 1e-3."""
    x, noise, v = torch.randn(3, 3, 4, 8, 8)
    aligned, repa, tokens, sra, teacher = (each.bfloat16() for each in torch.randn(5, 3, 16, 16))
    patches = patchify(x, like=aligned)
    aligned[0] = patches[0] + 0.02 * aligned[0]  # an image on either branch of smooth-L1
    batch = {"x": x, "noise": noise, "t": torch.tensor([0.25, 0.4, 0.75]), "t_teacher": torch.rand(3),
             "y": torch.arange(3), "tokens": tokens}
    answer = v.bfloat16(), {"vae_repa": aligned, "repa": repa, "sra": sra}
    asked = []  # of the teacher, after x_t
    ema = SimpleNamespace(early_blocks=lambda *inputs: asked.append(inputs[1:]) or (teacher, None))
    args = SimpleNamespace(vae_repa_loss=objective, vae_repa_beta=0.05, vae_repa_interval=[0.25, 0.5],
                           sra_teacher_depth=3)
    losses = train.training_losses(lambda *inputs, return_align: answer, ema, batch, args)
    expected = {"denoising": (v.bfloat16().float() - (noise - x)).square().mean((1, 2, 3)),
                "vae_repa": distance(aligned.float(), patches, objective) * torch.tensor([4.0, 4.0, 0.0]),
                "repa": distance(repa.float(), tokens.float(), "cosine"),
                "sra": distance(sra.float(), teacher.float())}
    assert list(losses) == list(expected) and asked == [(batch["t_teacher"], batch["y"], 3)]
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)


STEPS, BATCH = 9, 8
SHARED = ("--batch-size", BATCH, "--seed", 1, "--lr", 1e-3, "--vae-repa-depth", 2,
          "--vae-repa-interval", 0, 0.5, "--ckpt-every", 3, "--state-every", 2, "--max-steps", STEPS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """An undisturbed run."""
    fit(None, data, run := tmp_path_factory.mktemp("whole"), *SHARED)
    return run


def test_a_killed_run_resumes_to_the_bit(capsys, monkeypatch, whole, data, tmp_path):
    """Killed as it writes a state, it goes on from the one before; log lines are means over their steps."""
    run, save, every, saved = tmp_path / "run", train.save, ("--log-every", 3), []

    def die(path, checkpoint):
        saved.append((path.name, checkpoint["step"]))
        if saved[-1] == ("state.pt", 8):
            Path(f"{path}.tmp").write_bytes(b"half of it")
            raise Killed
        save(path, checkpoint)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save", die)
        fit(capsys, data, run, *SHARED, *every)
    assert load(run / "state.pt")["step"] == 6
    assert [step for name, step in saved if name == "state.pt"] == [2, 3, 4, 6, 8]
    lines, _ = fit(capsys, data, run, *SHARED, *every, "--micro-batch", 8)
    assert_same_run(whole, run)
    assert [line["step"] for line in lines] == [3, 6, 9]
    each = log(whole)
    assert [line["step"] for line in each] == list(range(1, STEPS + 1))
    for line, *three in zip(lines, each[::3], each[1::3], each[2::3]):
        for key in ("denoising", "vae_repa", "grad_norm"):
            assert line[key] == pytest.approx(np.mean([one[key] for one in three]), rel=1e-4)
        assert line["grad_norm_max"] == pytest.approx(max(one["grad_norm"] for one in three))
        assert 0 < line["images_per_s"] < 1e5
        assert line["memory_gib"] == torch.cuda.max_memory_allocated() / 2**30  # of a GPU's tests, or 0


def test_checkpoints_and_settings(capsys, whole, data):
    """Numbered ones hold the EMA's weights and the settings, state.pt all that a resume needs."""
    before = contents(whole)
    assert sorted(path.name for path in before) == [
        "0000003.pt", "0000006.pt", "0000009.pt", "lock", "log.jsonl", "settings.json", "state.pt"]
    state = load(whole / "state.pt")
    assert set(state) == {"model", "ema", "opt", "step", "settings", "log"} and state["step"] == STEPS
    assert list(state["model"]) == list(state["ema"]) == list(built(state["settings"]).state_dict())
    for step in (3, 6, 9):
        numbered = load(whole / "checkpoints" / f"{step:07d}.pt")
        assert set(numbered) == {"ema", "step", "settings"} and numbered["step"] == step
    assert same_tensors(numbered["ema"], state["ema"]) and not same_tensors(state["model"], state["ema"])
    settings = state["settings"]
    content = b"".join(np.load(data / f"{name}.npy").tobytes() for name in ("moments", "labels"))
    facts = {**json.loads((data / "latents.json").read_text()), "vae_content": None, "count": 12,
             "latent_shape": [4, 8, 8], "latents_sha256": hashlib.sha256(content).hexdigest()}
    assert settings == numbered["settings"] and settings["data"] == facts
    assert json.loads((whole / "settings.json").read_text()) == settings
    fit(capsys, data, whole, *SHARED)  # again: nothing to do
    assert contents(whole) == before


@pytest.mark.parametrize("dropout", [0.1, 0])
def test_grids_are_drawn_by_the_ema(capsys, latents, vae, tmp_path, dropout):
    """Guided, unless no null class was trained, when sample.py too refuses to; they disturb no weight."""
    flags = ("--max-steps", 3, "--ema-decay", 0.5, "--lr", 0.1, "--ckpt-every", 2, "--label-dropout", dropout)
    _, state = fit(capsys, latents, tmp_path / "run", *flags, "--sample-every", 2)
    fit(capsys, latents, tmp_path / "without", *flags)
    assert_same_run(tmp_path / "without", tmp_path / "run")
    (grid,) = (tmp_path / "run" / "samples").iterdir()
    drawn, checkpoint = np.array(Image.open(grid)), tmp_path / "run" / "checkpoints" / "0000002.pt"
    assert grid.name == "0000002.png" and drawn.shape == (3 * 32, 4 * 32, 3)  # 4 of each class
    model = built(state["settings"]).eval()
    model.load_state_dict(load(checkpoint)["ema"])
    pictures = sample.sample_images(model, load_vae(str(vae)), state["settings"]["data"], range(12),
                                    np.repeat([0, 1, 2], 4), 0, "fp32", mode="ode", num_steps=50,
                                    cfg_scale=4.0 if dropout else 1.0).numpy()
    drawn = drawn.reshape(3, 32, 4, 32, 3).transpose(0, 2, 1, 3, 4)
    assert np.array_equal(drawn, pictures.reshape(drawn.shape))
    guided = ("--ckpt", checkpoint, "--cfg-scale", 2, "--num-steps", 2, "--per-class", 1)
    status, _, stderr = cli(capsys, "sample", *guided)
    assert (status, "--label-dropout 0" in stderr) == ((0, False) if dropout else (2, True)), stderr


def test_weights_and_biases(capsys, monkeypatch, latents, tmp_path, few_steps):
    """Off by default; else it gets log.jsonl's numbers and the grids, in one W&B run for a run's resumes."""
    calls = []
    module = SimpleNamespace(init=lambda **options: calls.append(options),
                             log=lambda values, step: calls.append((step, values)),
                             Image=lambda path: np.array(Image.open(path)).shape)
    common = ("--sample-every", 2, "--log-every", 2)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    flags = ("--data", latents, "--run-dir", tmp_path / "run", "--max-steps", 1, "--wandb", "sit")
    status, _, stderr = cli(capsys, "train", *TINY, *flags)
    assert status == 2 and "--wandb sit" in message(stderr) and "wandb login" in stderr
    monkeypatch.setitem(sys.modules, "wandb", module)
    fit(capsys, latents, tmp_path / "run", "--max-steps", 2, *common)
    assert not calls
    fit(capsys, latents, tmp_path / "other", "--max-steps", 1, "--wandb", "sit")
    other, _ = calls
    calls.clear()
    for steps in (4, 5, 6):
        lines, state = fit(capsys, latents, tmp_path / "run", "--max-steps", steps, *common, "--wandb", "sit")
    began = [call for call in calls if "project" in call]
    assert {(call["project"], call["name"], call["resume"]) for call in began} == {("sit", "run", "allow")}
    assert len({call["id"] for call in began} | {other["id"]}) == 2
    assert began[2]["config"] == state["settings"]
    size = (3 * 32, 4 * 32, 3)  # of a grid
    assert [call for call in calls if call not in began] == [
        (4, lines[1]), (4, {"samples": size}), (5, lines[2]), (6, lines[3]), (6, {"samples": size})]


@pytest.mark.filterwarnings("ignore:.*script_method", "ignore:The .grad", "ignore:Skip")  # the compiler
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_compiled_training_is_the_same_run(capsys, whole, data, tmp_path):
    _, state = fit(capsys, data, tmp_path / "run", *SHARED, "--compile")
    assert_close_run(whole, tmp_path / "run", STEPS)
    assert list(state["model"]) == list(load(whole / "state.pt")["model"])  # no compiler's prefixes


def test_layers_compile_whole_under_ddp(monkeypatch):
    """One graph for all blocks, one for the head, one for the final layer, however DDP cuts its buckets."""
    store, counter, real = torch.distributed.HashStore(), CompileCounter(), torch.nn.Module.compile
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **how: real(layer, backend=counter, **how))
    model = SiT_models["SiT-S/2"](input_size=8, vae_repa_depth=2)  # a block has more than DDP's first MiB
    args = SimpleNamespace(sra_depth=0)
    try:
        torch.compiler.reset()
        with torch._dynamo.config.patch(optimize_ddp=True):  # as torch has it
            train.compile_layers(model, model, args)
            wrapped, zeros = torch.nn.parallel.DistributedDataParallel(model), torch.zeros(2)
            wrapped(torch.randn(2, 4, 8, 8), zeros, zeros.long(), return_align=True)
    finally:
        torch.distributed.destroy_process_group()
    assert counter.frame_count == 3


def test_one_process_under_torchrun(capsys, monkeypatch, under_torchrun, whole, data, tmp_path):
    """It meets what eight do, DDP and its process group, and the run is the same."""
    monkeypatch.setattr(train, "DDP", Mock(wraps=train.DDP))
    fit(capsys, data, tmp_path / "run", *SHARED)
    assert train.DDP.call_count == 1 and not torch.distributed.is_initialized()
    assert_same_run(whole, tmp_path / "run")


def test_a_process_that_does_not_come(capsys, monkeypatch, under_torchrun, data, tmp_path):
    """It is not waited for for days."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    patience = timedelta(seconds=1)
    monkeypatch.setattr(train, "init_distributed", partial(train.init_distributed, timeout=patience))
    status, _, stderr = cli(capsys, "train", *TINY, "--data", data, "--run-dir", tmp_path / "run")
    assert status == 2 and "the processes cannot meet" in message(stderr)


def test_defaults_are_the_papers(monkeypatch):
    recipe = {"model": "SiT-XL/2", "lr": 1e-4, "batch_size": 256, "micro_batch": 256, "max_steps": 400_000,
              "grad_clip": 1, "ema_decay": 0.9999, "label_dropout": 0.1, "seed": 0, "data": "data/latents",
              "vae_repa_depth": 8, "vae_repa_weight": 1, "vae_repa_loss": "smooth_l1", "vae_repa_beta": 0.05,
              "vae_repa_layers": 5, "vae_repa_interval": [0, 1], "repa_depth": 0, "repa_weight": 0.5,
              "repa_encoder": "dinov2_vitb14", "sra_depth": 0, "sra_weight": 0.2,
              "sra_teacher_depth": None, "sra_t_max": 0.2, "ckpt_every": 50_000, "state_every": 10_000,
              "sample_every": 10_000, "log_every": 100, "wandb": None,
              "tune_vae": False, "vae_from_scratch": False, "l1_weight": 1.0, "lpips_weight": 1.0,
              "kl_weight": 1e-6, "gan_weight": 0.1, "tune_repa_weight": 1.5, "disc_init": None,
              "lpips_weights": ["vgg16-397923af.pth", "vgg.pth"],
              "run_dir": "runs/SiT-XL-2_vae-repa-depth-8",
              "precision": "fp32", "compile": False, "init": None}  # of a machine without a GPU
    assert vars(parsed(monkeypatch)) == recipe
    for size, expected in {"Ti": (2, 4), "S": (2, 8), "B": (2, 8), "L": (8, 16), "XL": (8, 20)}.items():
        args = parsed(monkeypatch, "--model", f"SiT-{size}/2", "--sra-depth", 1)
        assert (args.vae_repa_depth, args.sra_teacher_depth) == expected


def test_gpus_are_hidden_from_tests(request):
    """And from what they start; those of a GPU come before."""
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"
    assert not torch.cuda.is_available()
    others = ["gpu" not in item.fixturenames for item in request.session.items]
    assert others == sorted(others)


@pytest.mark.parametrize("visible, cuda, refused", [
    (None, "13.0", True), ("0,1", "13.0", True), ("", "13.0", False), ("-1", "13.0", False),
    (None, None, False)])
def test_a_gpu_that_torch_does_not_see(capsys, monkeypatch, data, tmp_path, visible, cuda, refused):
    """It is no silent run on the CPU, unless someone hides it or torch is built for a CPU."""
    real = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl" or real(path))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    flags = (*TINY, "--data", data, "--run-dir", tmp_path / "run", "--max-steps", 1)
    status, _, stderr = cli(capsys, "train", *flags)
    assert (status, (tmp_path / "run").exists()) == ((2, False) if refused else (0, True)), stderr
    assert not refused or re.search("older than CUDA 13.0.*CUDA_VISIBLE_DEVICES= ", message(stderr))
    assert cli(capsys, "train", "--help")[0] == 0


def test_too_little_memory(capsys, monkeypatch, data, tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(train, "training_step", Mock(side_effect=error))
    status, _, stderr = cli(capsys, "train", *TINY, "--data", data, "--run-dir", tmp_path / "run")
    assert status == 2 and "2.00 GiB" in message(stderr) and "--micro-batch" in message(stderr)


CHANGES = [
    ("--model", "SiT-Ti/8"), ("--precision", "bf16"), ("--seed", 2), ("--batch-size", 16), ("--lr", 2e-4),
    ("--label-dropout", 0.2), ("--ema-decay", 0.999), ("--grad-clip", 2), ("--vae-repa-depth", 6),
    ("--vae-repa-depth", 0), ("--vae-repa-weight", 0.5), ("--vae-repa-loss", "l2"), ("--vae-repa-beta", 0.1),
    ("--vae-repa-layers", 2), ("--vae-repa-interval", 0, 0.75), ("--vae-repa-interval", 0.5, 1)]
FREE = [("--wandb", "sit"), ("--max-steps", 7), ("--micro-batch", 1), ("--log-every", 1), ("--ckpt-every", 1),
        ("--sample-every", 1), ("--state-every", 1), ("--compile",), ("--lpips-weights", "vgg", "lin")]


def test_settings_that_matter(capsys, monkeypatch, whole, data):
    """Each leads to a run directory of its own, and is refused where a run goes on; no other does."""
    default = parsed(monkeypatch).run_dir
    names = [parsed(monkeypatch, *change).run_dir for change in (*CHANGES, ("--data", "other/set"))]
    assert len({default, *names}) == 1 + len(names) and all(name.startswith("runs/") for name in names)
    assert {parsed(monkeypatch, *change).run_dir for change in FREE} == {default}
    for change in CHANGES:
        said = refused(capsys, data, whole, *SHARED, *change)
        assert change[0][2:].replace("-", "_") in said and str(change[-1]) in said and str(whole) in said


def refused(capsys, data, run, *flags, script="train"):
    """The one sentence on bad input, which writes nothing."""
    before = contents(run)
    common = (*TINY, "--max-steps", 2, "--data", data, "--run-dir", run)
    status, _, stderr = cli(capsys, script, *common, *flags)
    assert status == 2 and contents(run) == before, stderr
    said = message(stderr)
    assert said.startswith(f"{script}.py: error: ")
    return said


@pytest.mark.parametrize("flags, says", [
    (("--model", "SiT-XXL/2"), "SiT-XL/2"), (("--vae-repa-depth", 7), "depth 7 is not one of the 6"),
    (("--vae-repa-depth", -1), "'-1'"), (("--vae-repa-layers", 1), "layers"), (("--seed", -1), "--seed"),
    (("--batch-size", 4, "--micro-batch", 3), "4 is not divisible by 1 process(es) x --micro-batch 3"),
    (("--batch-size", 4, "--micro-batch", 8), "--micro-batch 8"), (("--batch-size", 0), "--batch-size"),
    (("--vae-repa-interval", 0.6, 0.4), "--vae-repa-interval 0.6 0.4"),
    (("--vae-repa-interval", 0.5, 0.5), "LO < HI"),
    (("--vae-repa-interval", -0.1, 0.4), "'-0.1'"), (("--vae-repa-interval", 0.5, 1.5), "'1.5'"),
    (("--vae-repa-interval", 0, "nan"), "'nan'"), (("--vae-repa-dept", 2), "--vae-repa-dept"),
    (("--vae-repa-loss", "huber"), "smooth_l1"), (("--vae-repa-beta", "nan"), "--vae-repa-beta"),
    (("--vae-repa-weight", -1), "--vae-repa-weight"), (("--label-dropout", 1.5), "--label-dropout"),
    (("--lr", "nan"), "--lr"), (("--lr", -1), "--lr"), (("--ema-decay", 1.1), "--ema-decay"),
    (("--grad-clip", -1), "--grad-clip"), (("--sample-every", 2), "nobody/nothing")])  # a grid needs the VAE
def test_bad_flags(capsys, data, tmp_path, flags, says):
    assert says in refused(capsys, data, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes, micro_batch", [(3, 1), (2, 4)])
def test_a_batch_of_4_cannot_be_shared(capsys, monkeypatch, data, tmp_path, processes, micro_batch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert f"{processes} process" in refused(capsys, data, tmp_path, "--micro-batch", micro_batch)


def test_what_disagrees_with_the_run_and_what_may(capsys, whole, data, tmp_path):
    """Other latents do, a cut state, and a flag that is newer than the run, unless it is at its default."""
    run = shutil.copytree(whole, tmp_path / "run")
    said = refused(capsys, write_set(tmp_path / "latents", files_sha256="1", scale=1.0), run, *SHARED)
    assert "files_sha256" in said and "scale" in said
    state = load(run / "state.pt")
    del state["settings"]["sra_t_max"]
    torch.save(state, run / "state.pt")
    assert "sra_t_max is 0.2 there and 0.3" in refused(capsys, data, run, *SHARED, "--sra-t-max", 0.3)
    lines, state = fit(capsys, data, run, *SHARED, "--max-steps", STEPS + 1)
    assert lines[-1]["step"] == state["step"] == STEPS + 1
    whole_state = (run / "state.pt").read_bytes()
    for part in (0, 0.001, 0.5, 0.999):
        (run / "state.pt").write_bytes(whole_state[: int(part * len(whole_state))])
        assert str(run / "state.pt") in refused(capsys, data, run, *SHARED, "--max-steps", STEPS + 1)


def test_a_loss_that_is_not_finite(capsys, data, tmp_path):
    """The first bad step is named, however late it is noticed, and no checkpoint follows it."""
    moments = np.load(data / "moments.npy")
    moments[drawn_rows(0, 2, 4, 12)[1], 0, 0, 0] = np.nan  # first met in step 3
    bad = shutil.copytree(data, tmp_path / "bad")
    np.save(bad / "moments.npy", moments)
    for every, saved in ((2, ["0000002.pt", "state.pt"]), (5, [])):
        run = tmp_path / f"run{every}"
        flags = ("--max-steps", 5, "--log-every", 5, "--ckpt-every", every)
        status, _, stderr = cli(capsys, "train", *TINY, "--data", bad, "--run-dir", run, *flags)
        assert status == 2 and re.search(r"not finite at step 3\b", message(stderr))
        assert sorted(path.name for path in run.rglob("*.pt")) == saved and log(run) == []
        for path in run.rglob("*.pt"):
            assert all(value.isfinite().all() for value in load(path)["ema"].values())


