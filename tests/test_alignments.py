"""REPA and SRA beside VAE-REPA: targets and losses against formulas, every combination of the three, other VAEs' latents,
--flip and --init-from."""

import argparse
import json
import math
import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, cli, drawn_numbers, drawn_rows, message, process

import models
import train
from extract_latents import decode, load_vae
from models import HEADS, SiT, SiT_models, patchify, to_bf16

CUDA = torch.cuda.is_available()
HUB = ROOT / "tests" / "hub"
METHODS = {"vae_repa": ("--vae-repa-depth", 2), "repa": ("--repa-depth", 3, "--repa-encoder", "dinov2_vitt14"),
           "sra": ("--sra-depth", 2, "--sra-teacher-depth", 4)}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Runs are compared to the bit, which only the CPU promises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def tiny_encoder(seed=0):
    torch.manual_seed(seed)
    return torch.hub.load(str(HUB), "dinov2_vitt14", source="local", pretrained=False)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A local clone with the weights of its tiny encoder."""
    folder = tmp_path_factory.mktemp("hub") / "dinov2"
    shutil.copytree(HUB, folder, ignore=shutil.ignore_patterns("__pycache__"))
    torch.save(tiny_encoder().state_dict(), folder / "dinov2_vitt14_pretrain.pth")
    return folder


def write_set(folder, channels=4, size=8, image_size=32, flip=False, images=True, std=True, **about):
    """Latents as extract_latents.py stores them: 12 of 3 classes; those of the mirrored images are 100 more."""
    rng = np.random.default_rng(0)
    moments = rng.normal(0, 2, (12, 2 * channels, size, size))
    moments[:, channels:] = rng.uniform(0.5, 1.5, moments[:, channels:].shape) if std else 0
    folder.mkdir(parents=True)
    np.save(folder / "moments.npy", np.concatenate([moments, moments + 100][: 1 + flip]).astype(np.float16))
    np.save(folder / "labels.npy", np.arange(12) % 3)
    if images:
        np.save(folder / "images.npy", rng.integers(0, 256, (12, image_size, image_size, 3), np.uint8))
    about = {"vae": "nobody/nothing", "shift": [0.5] * channels, "scale": [0.25 + i / channels for i in range(channels)],
             "num_classes": 3, "files_sha256": "0", **about}
    (folder / "latents.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "latents")


def flags_of(methods, hub):
    flags = [word for method in METHODS for word in (METHODS[method] if method in methods else (f"--{method.replace('_', '-')}-depth", 0))]
    return [*flags, "--repa-hub", hub]


def fit(capsys, data, run, *flags):
    """Train in this process: (log lines, the last state)."""
    status, _, stderr = cli(capsys, "train", *TINY, "--data", data, "--run-dir", run, *flags)
    assert status == 0, stderr
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return lines, torch.load(run / "state.pt", weights_only=True)


def refused(capsys, data, run, *flags):
    status, _, stderr = cli(capsys, "train", *TINY, "--data", data, "--run-dir", run, "--max-steps", 2, *flags)
    assert status == 2, stderr
    assert not run.exists()
    return message(stderr)


def randomised(model, seed=0):
    """Every parameter that starts at zero made random, so that every input shows in the output."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model


# The model's heads


@pytest.mark.parametrize("name, repa, sra", [
    ("SiT-XL/2", 8_131_328, 5_311_872), ("SiT-L/2", 7_869_184, None), ("SiT-B/2", 7_344_896, None)])
def test_head_parameters(name, repa, sra):
    with torch.device("meta"):
        model = SiT_models[name](repa_depth=8, sra_depth=8)
    assert sum(p.numel() for p in model.heads["repa"].parameters()) == repa
    if sra:
        assert sum(p.numel() for p in model.heads["sra"].parameters()) == sra
    assert set(model.heads) == {"repa", "sra"}


SMALL = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 64, "depth": 4, "num_heads": 4, "num_classes": 3}


def test_heads_read_their_blocks():
    """Each head predicts from the output of its own block, by Linear and SiLU as published."""
    model = randomised(SiT(**SMALL, vae_repa_depth=1, repa_depth=3, repa_dim=24, sra_depth=2)).eval()
    x_t, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 1, 3])
    with torch.no_grad():
        v, predictions = model(x_t, t, y, return_align=True)
        weights = model.state_dict()
        h = model.block_output(x_t, t, y, 3)
        for i in (0, 2, 4):
            h = F.linear(F.silu(h) if i else h, weights[f"heads.repa.mlp.{i}.weight"], weights[f"heads.repa.mlp.{i}.bias"])
        torch.testing.assert_close(predictions["repa"], h)
        h = model.block_output(x_t, t, y, 2)
        h = F.linear(h, weights["heads.sra.mlp.0.weight"], weights["heads.sra.mlp.0.bias"])
        h = F.linear(F.silu(h), weights["heads.sra.mlp.2.weight"], weights["heads.sra.mlp.2.bias"])
        torch.testing.assert_close(predictions["sra"], h)
        plain = SiT(**SMALL)
        plain.load_state_dict({k: w for k, w in weights.items() if not k.startswith(HEADS)})
        assert torch.equal(plain(x_t, t, y), v) and plain(x_t, t, y, return_align=True)[1] == {}
    assert set(predictions) == {"vae_repa", "repa", "sra"} and predictions["repa"].shape == (3, 16, 24)


def test_block_output_stops_at_its_depth():
    model = randomised(SiT(**SMALL)).eval()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    x_t, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 3])
    with torch.no_grad():
        h = model.block_output(x_t, t, y, 3)
        assert len(outputs) == 3 and torch.equal(h, outputs[2])  # block 4 and the final layer never run
        model(x_t, t, y)
    assert torch.equal(outputs[5], h)


# REPA


def test_preprocessing_by_hand():
    """uint8 / 255, ImageNet's mean and std, and only then bicubic interpolation (a = -0.75, half-pixel centres) to 7/8."""
    encoder = models.Encoder(tiny_encoder(), 32)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    x = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]

    def weight(d, a=-0.75):
        d = abs(d)
        return (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0

    matrix = np.zeros((28, 32))
    for i in range(28):
        centre = (i + 0.5) * 32 / 28 - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), 31)] += weight(centre - j)
    expected = np.einsum("ip,jq,pqc->cij", matrix, matrix, x)
    got = encoder.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None])
    assert got.dtype == torch.float32 and got.shape == (1, 3, 28, 28)
    np.testing.assert_allclose(got[0], expected, atol=1e-4)


@pytest.mark.parametrize("size, inside", [(256, 224), (512, 448), (64, 56)])
def test_input_sizes_are_repas(size, inside):
    encoder = models.Encoder(tiny_encoder(), size)
    assert encoder.input_size == inside and encoder.side == inside // 14
    assert encoder.network.pos_embed.shape == (1, 1 + (inside // 14) ** 2, 32)


def test_positions_are_resampled_once_and_smoothly():
    """The class token's position is kept; a linear table stays linear, away from the edges, when 37 x 37 become 16 x 16."""
    rows = torch.arange(37.0).view(37, 1, 1).expand(37, 37, 1)
    table = torch.cat([torch.full((1, 1, 2), 7.0), torch.cat([rows, rows.transpose(0, 1)], 2).reshape(1, 37 * 37, 2)], 1)
    small = models.resample_positions(table, 16)
    assert small.shape == (1, 257, 2) and torch.equal(small[:, 0], table[:, 0])
    grid, at = small[0, 1:].view(16, 16, 2), (torch.arange(16) + 0.5) * 37 / 16 - 0.5
    torch.testing.assert_close(grid[2:-2, 5, 0], at[2:-2], rtol=0, atol=0.02)
    torch.testing.assert_close(grid[5, 2:-2, 1], at[2:-2], rtol=0, atol=0.02)
    checkered = ((torch.arange(37)[:, None] + torch.arange(37)) % 2).float().view(1, -1, 1)
    small = models.resample_positions(torch.cat([torch.zeros(1, 1, 1), checkered], 1), 16)[0, 1:]
    assert small.std() < 0.1  # antialias: without it the 16 x 16 table would keep the checkers' contrast
    torch.testing.assert_close(models.resample_positions(table, 37), table)


def test_the_encoders_tokens():
    """They are the network's normalised patch tokens, the class token left out, and carry no gradient."""
    encoder = models.Encoder(tiny_encoder(), 32)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = encoder(images)
    with torch.no_grad():
        everything = encoder.network.forward_features(encoder.preprocess(images))
    assert torch.equal(tokens, everything["x_norm_patchtokens"]) and tokens.shape == (2, 4, 32)
    assert not tokens.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.network.training


class Heads(torch.nn.Module):
    """Stands in for SiT: a velocity of zero, and heads that predict what they are told to."""

    def __init__(self, **predictions):
        super().__init__()
        self.predictions = predictions

    def forward(self, x_t, t, y, return_align):
        return torch.zeros_like(x_t), self.predictions


def losses_of(batch, args, ema=None, encoder=None, **predictions):
    return train.training_losses(Heads(**predictions), batch, argparse.Namespace(**args), ema, encoder)


def some_batch():
    x, noise = torch.randn(2, 3, 4, 8, 8)
    return {"x": x, "noise": noise, "t": torch.tensor([0.5, 0.9, 0.1]), "t_teacher": torch.tensor([0.4, 0.75, 0.0]),
            "y": torch.tensor([0, 3, 1]), "images": torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)}


def test_repas_loss():
    """Minus the mean cosine of the tokens; in float32, so that a target in bf16 is normalised without rounding."""
    prediction, target = torch.randn(2, 3, 5, 8).bfloat16().unbind(0)
    batch = some_batch()
    asked = []
    loss = losses_of(batch, {}, encoder=lambda images: asked.append(images) or target, repa=prediction)["repa"]
    a, b = prediction.float(), target.float()
    expected = -sum((a[:, i] * b[:, i]).sum(1) / (a[:, i].norm(dim=1) * b[:, i].norm(dim=1)) for i in range(5)) / 5
    torch.testing.assert_close(loss, expected)
    assert asked[0] is batch["images"]


# SRA


def test_the_teacher_sees_less_noise_and_gets_no_gradient():
    ema = randomised(SiT(**SMALL)).eval()  # its weights would take a gradient if they were asked
    batch, prediction = some_batch(), torch.randn(3, 16, 64, requires_grad=True)
    loss = losses_of(batch, {"sra_teacher_depth": 3}, ema, sra=prediction)["sra"]
    x, noise = batch["x"], batch["noise"]
    x_s = torch.stack([0.6 * x[0] + 0.4 * noise[0], 0.25 * x[1] + 0.75 * noise[1], x[2]])
    delta = (prediction - ema.block_output(x_s, batch["t_teacher"], batch["y"], 3)).abs()
    expected = torch.where(delta < 0.05, delta**2 / 0.1, delta - 0.025).mean((1, 2))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    assert prediction.grad.any() and all(p.grad is None for p in ema.parameters())


def test_weights_and_sras_schedule():
    args = argparse.Namespace(vae_repa_weight=1.5, repa_weight=0.5, sra_weight=0.2)
    weights = [train.loss_weight("sra", args, epoch) for epoch in (0, 149, 150, 1149)]
    assert weights == pytest.approx([0.2, 0.2, 0.2 * 0.1**0.001, 0.02])
    assert [train.loss_weight(name, args, 1149) for name in ("denoising", "vae_repa", "repa")] == [1.0, 1.5, 0.5]


# All of them in train.py


def test_what_main_aligns_with(capsys, monkeypatch, data, hub, tmp_path):
    """One step: each term of the log, and the gradient of their weighted sum, computed by hand from the files."""
    kept = {}

    def keep(model, batch, *rest):
        kept["batch"] = batch
        return original(model, batch, *rest)

    original = train.training_losses
    monkeypatch.setattr(train, "training_losses", keep)
    flags = ("--batch-size", 12, "--max-steps", 1, "--grad-clip", "inf", "--repa-weight", 0.7, "--sra-weight", 0.3, "--seed", 3)
    (line,), checkpoint = fit(capsys, data, tmp_path / "run", *flags, *flags_of(METHODS, hub))
    rows, batch = drawn_rows(3, 0, 12, 12), kept["batch"]
    _, _, t, _, u = drawn_numbers(3, 0, 12, (4, 8, 8))
    torch.testing.assert_close(batch["t_teacher"], (t - 0.2 * u).clamp(min=0))
    assert torch.equal(batch["images"], torch.from_numpy(np.load(data / "images.npy")[rows]).permute(0, 3, 1, 2))

    torch.manual_seed(3)
    start = SiT_models["SiT-Ti/4"](input_size=8, num_classes=3, vae_repa_depth=2, repa_depth=3, repa_dim=32, sra_depth=2)
    s = t.view(12, 1, 1, 1)
    v, predictions = start((1 - s) * batch["x"] + s * batch["noise"], t, batch["y"], return_align=True)
    tokens = models.Encoder(tiny_encoder(), 32)(batch["images"])
    s = batch["t_teacher"].view(12, 1, 1, 1)
    with torch.no_grad():
        teacher = start.block_output((1 - s) * batch["x"] + s * batch["noise"], batch["t_teacher"], batch["y"], 4)
    smooth_l1 = F.smooth_l1_loss
    losses = {"denoising": (v - batch["noise"] + batch["x"]).square().mean(),
              "vae_repa": smooth_l1(predictions["vae_repa"], patchify(batch["x"], 4), beta=0.05),
              "repa": -F.cosine_similarity(predictions["repa"], tokens, dim=2).mean(),
              "sra": smooth_l1(predictions["sra"], teacher, beta=0.05)}
    assert list(line)[1:5] == list(losses)
    for name, loss in losses.items():
        assert line[name] == pytest.approx(loss.item(), rel=1e-4), name
    (losses["denoising"] + losses["vae_repa"] + 0.7 * losses["repa"] + 0.3 * losses["sra"]).backward()
    for i, (name, p) in enumerate(start.named_parameters()):
        torch.testing.assert_close(checkpoint["opt"]["state"][i]["exp_avg"] * 10, p.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert not any("network" in key for key in checkpoint["model"]) and checkpoint["settings"]["repa_dim"] == 32


CHAIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import train
joined = train.init_distributed()  # once for all runs, because a process group cannot be made again on the same port
train.init_distributed = lambda: joined
for argv in json.loads(sys.argv[2]):
    sys.argv = ["train.py", *argv]
    train.main()
"""


def test_every_combination_trains_on_two_processes_and_resumes_to_the_bit(capsys, data, hub, tmp_path, monkeypatch):
    """Two steps at once, or one and another after a restart; and one process gives the same run to rounding."""
    sets = [methods for count in range(4) for methods in combinations(METHODS, count)]
    commands = []
    for methods in sets:
        common = [*TINY, "--data", data, *flags_of(methods, hub), "--batch-size", 4, "--lr", 1e-3]
        name = "+".join(methods) or "plain"
        commands += [[*common, "--run-dir", tmp_path / "whole" / name, "--max-steps", 2],
                     [*common, "--run-dir", tmp_path / "parts" / name, "--max-steps", 1],
                     [*common, "--run-dir", tmp_path / "parts" / name, "--max-steps", 2]]
    commands = json.dumps([list(map(str, command)) for command in commands])
    script = tmp_path / "chain.py"
    script.write_text(CHAIN)
    process(script.with_suffix(""), ROOT, commands, processes=2)
    assert len(sets) == 8
    for methods in sets:
        name = "+".join(methods) or "plain"
        whole, parts = (torch.load(tmp_path / kind / name / "state.pt", weights_only=True) for kind in ("whole", "parts"))
        for part in ("model", "ema"):
            assert all(torch.equal(value, parts[part][key]) for key, value in whole[part].items()), name
        assert {key.split(".")[1] for key in whole["model"] if key.startswith("heads.")} == set(methods)
        lines = (tmp_path / "whole" / name / "log.jsonl").read_text().splitlines()
        alone, one = fit(capsys, data, tmp_path / "alone" / name, *flags_of(methods, hub), "--max-steps", 2, "--lr", 1e-3)
        for a, b in zip(alone, map(json.loads, lines), strict=True):
            assert {key: a[key] for key in methods} == pytest.approx({key: b[key] for key in methods}, rel=1e-3, abs=1e-4)
        for key, value in whole["model"].items():
            torch.testing.assert_close(one["model"][key], value, rtol=0, atol=3e-4, msg=f"{name} {key}")


def test_a_method_that_is_off_leaves_no_trace(capsys, data, hub, tmp_path):
    """Plain training is the same to the bit, whatever is said of methods that are off; and REPA's trunk starts alike."""
    flags = ("--max-steps", 2, "--lr", 1e-3)
    _, plain = fit(capsys, data, tmp_path / "plain", *flags, "--vae-repa-depth", 0)
    off = ("--vae-repa-depth", 2, "--vae-repa-weight", 0, "--repa-depth", 3, "--repa-weight", 0, "--sra-depth", 2, "--sra-weight", 0)
    _, same = fit(capsys, data, tmp_path / "off", *flags, *off, "--sra-t-max", 0.5, "--repa-hub", "nowhere")
    assert list(plain["model"]) == list(same["model"])
    assert all(torch.equal(value, same["model"][key]) for key, value in plain["model"].items())
    settings = [{**plain["settings"], "vae_repa_depth": 0}, {**plain["settings"], "repa_depth": 3, "repa_dim": 32, "sra_depth": 2}]
    start, aligned = (built(each) for each in settings)
    assert all(torch.equal(value, aligned[key]) for key, value in start.items()) and len(aligned) > len(start)


def built(settings):
    """The weights that a run starts from."""
    torch.manual_seed(settings["seed"])
    return models.build_model(settings, heads=True).state_dict()


def test_the_encoder_comes_from_the_hub_with_its_weights(hub):
    encoder = models.load_encoder("dinov2_vitt14", str(hub), 32)
    for key, value in tiny_encoder().state_dict().items():
        if key != "pos_embed":
            assert torch.equal(encoder.network.state_dict()[key], value), key


def test_without_a_clone_the_encoder_is_asked_of_dinov2s_repository(monkeypatch, tmp_path):
    asked, encoder = [], tiny_encoder()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "load", lambda *names, **options: asked.append((names, options)) or encoder)
    assert models.load_encoder("dinov2_vitb14", None, 32).dim == 32
    assert asked == [(("facebookresearch/dinov2", "dinov2_vitb14"), {"verbose": False})]


def test_bf16_encoder_has_the_results_of_autocast():
    encoder = models.Encoder(tiny_encoder(), 32)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(images)
        to_bf16(encoder)
        assert torch.equal(encoder(images), rounded)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_bf16_and_compile_on_a_gpu(capsys, monkeypatch, data, hub, tmp_path):
    """All three at once: the losses of float32 in eager mode, to bf16's rounding; and the samples of the result."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    flags = ("--batch-size", 12, "--max-steps", 4, "--lr", 1e-3, *flags_of(METHODS, hub))
    rounded, _ = fit(capsys, data, tmp_path / "bf16", *flags, "--precision", "bf16", "--compile")
    exact, _ = fit(capsys, data, tmp_path / "fp32", *flags)
    for a, b in zip(rounded, exact, strict=True):
        for name in ("denoising", *METHODS):
            assert a[name] == pytest.approx(b[name], rel=0.03, abs=0.01), name


# Mirrored halves, other latents


def test_training_on_a_mirrored_set(capsys, monkeypatch, hub, tmp_path):
    """Half of the rows are mirror images, by (seed, step) alone, and REPA's encoder sees the image mirrored too."""
    folder, seen = write_set(tmp_path / "set", flip=True, scale=1.0, shift=0.0), []
    original, images = train.training_losses, np.load(folder / "images.npy").transpose(0, 3, 1, 2)
    monkeypatch.setattr(train, "training_losses", lambda model, batch, *rest: seen.append(batch) or original(model, batch, *rest))
    _, state = fit(capsys, folder, tmp_path / "run", "--max-steps", 12, *flags_of(METHODS, hub))
    for step, batch in enumerate(seen):
        rows = drawn_rows(0, step, 4, 12, flip=True)
        assert [row % 12 for row in rows] == drawn_rows(0, step, 4, 12)
        assert (batch["x"].mean((1, 2, 3)) > 50).tolist() == [row >= 12 for row in rows]
        expected = [images[row - 12][..., ::-1] if row >= 12 else images[row] for row in rows]
        assert np.array_equal(batch["images"].numpy(), expected)
    mirrored = sum((batch["x"].mean((1, 2, 3)) > 50).sum().item() for batch in seen)
    assert 12 < mirrored < 36 and len(seen) == 12 and state["settings"]["data"]["flip"] is True


@pytest.mark.parametrize("model, channels, size, std", [
    ("SiT-Ti/2", 16, 8, True), ("SiT-Ti/1", 32, 4, True), ("SiT-Ti/1", 32, 2, False)], ids=["SD3", "VA-VAE", "DC-AE"])
def test_other_latents_train_resume_and_predict(capsys, tmp_path, model, channels, size, std):
    """16 and 32 channels, patch 1, per-channel normalisation, a deterministic VAE: the target is the normalised latent."""
    folder = write_set(tmp_path / "set", channels, size, std=std, images=False)
    flags = ("--model", model, "--batch-size", 12, "--grad-clip", "inf")
    (line, _), checkpoint = fit(capsys, folder, tmp_path / "run", *flags, "--max-steps", 2)
    rows = drawn_rows(0, 0, 12, 12)
    mean, std = np.split(np.load(folder / "moments.npy").astype(np.float64)[rows], 2, axis=1)
    eps = drawn_numbers(0, 0, 12, (channels, size, size))[0].numpy()
    about = json.loads((folder / "latents.json").read_text())
    x = (mean + std * eps - np.reshape(about["shift"], (-1, 1, 1))) * np.reshape(about["scale"], (-1, 1, 1))
    delta = np.abs(x)  # the head starts at zero
    assert line["vae_repa"] == pytest.approx(np.where(delta < 0.05, delta**2 / 0.1, delta - 0.025).mean(), rel=1e-4)
    fit(capsys, folder, tmp_path / "parts", *flags, "--max-steps", 1)
    _, again = fit(capsys, folder, tmp_path / "parts", *flags, "--max-steps", 2)
    assert all(torch.equal(value, again["model"][key]) for key, value in checkpoint["model"].items())


def save_vae(kind, folder):
    """A diffusers autoencoder of random weights for 3 x 32 x 32 images, without a normalisation that fits but in FLUX's case."""
    from diffusers import AutoencoderDC, AutoencoderKL

    torch.manual_seed(0)
    if kind == "DC-AE":
        blocks = {"layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ()), "block_out_channels": (8, 8, 32)}
        both = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in blocks.items()}
        vae = AutoencoderDC(latent_channels=32, attention_head_dim=4, scaling_factor=0.18215, **both)
    else:
        normalisation = {"scaling_factor": 0.3611, "shift_factor": 0.1159} if kind == "FLUX" else {}
        vae = AutoencoderKL(block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4,
                            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=16 if kind == "FLUX" else 32, **normalisation)
    vae.save_pretrained(folder)


@pytest.mark.parametrize("kind, channels", [("FLUX", 16), ("VA-VAE", 32), ("DC-AE", 32)])
def test_other_vaes_end_to_end(capsys, images, tmp_path, kind, channels):
    """Images, latents, a step of training, samples: the round trip through the normalisation is the autoencoder's own."""
    save_vae(kind, tmp_path / "vae")
    flags = ("--images", images, "--vae", tmp_path / "vae", "--image-size", 32, "--out", tmp_path / "set", "--num-workers", 0, "--dtype", "float32")
    status, stdout, err = cli(capsys, "extract_latents", *flags)
    assert status == 0, err
    about, moments = json.loads((tmp_path / "set" / "latents.json").read_text()), torch.from_numpy(np.load(tmp_path / "set" / "moments.npy"))
    side = moments.shape[2]
    assert about["latent_shape"] == [channels, side, side] and moments[:, channels:].any() == (kind != "DC-AE")
    assert ("gives no scale" in stdout) == (kind != "FLUX")
    shift, scale = (torch.tensor(about[key]).reshape(-1, 1, 1) for key in ("shift", "scale"))
    x = (moments[:, :channels] - shift) * scale
    if kind == "DC-AE":  # measured, and without a std of its own
        assert x.mean((0, 2, 3)).abs().max() < 1e-3 and (x.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-3
    vae = load_vae(str(tmp_path / "vae"))
    with torch.no_grad():
        pixels = ((vae.decode(moments[:, :channels]).sample + 1) * 127.5).round().clamp(0, 255)
    back = decode(vae, x, about["shift"], about["scale"]).permute(0, 3, 1, 2)
    assert (back - pixels).abs().max() <= 1 and ((back - pixels) == 0).float().mean() > 0.99
    fit(capsys, tmp_path / "set", tmp_path / "run", "--model", "SiT-Ti/1", "--max-steps", 1, "--sample-every", 1)
    status, _, err = cli(capsys, "sample", "--ckpt", tmp_path / "run/checkpoints/0000001.pt", "--num-steps", 2, "--per-class", 1)
    assert status == 0, err
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2


# --init-from


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Random weights of a SiT-Ti/4 for 3 classes and 4 x 8 x 8 latents, in train.py's, REPA's and SRA's published forms."""
    folder = tmp_path_factory.mktemp("trained")
    model = randomised(SiT_models["SiT-Ti/4"](input_size=8, num_classes=3, vae_repa_depth=2, repa_depth=2, sra_depth=2))
    ema = model.state_dict()
    settings = {"model": "SiT-Ti/4", "data": {"vae": "nobody/nothing", "shift": 0.0, "scale": 1.0, "latent_shape": [4, 8, 8], "num_classes": 3}}
    torch.save({"ema": ema, "step": 4, "settings": settings}, folder / "ours.pt")
    for name, ours, theirs in (("repa", "heads.repa.mlp", "projectors.0"), ("sra", "heads.sra.mlp", "ap_head")):
        weights = {key.replace(ours, theirs): value for key, value in ema.items()
                   if key.startswith(ours) or not key.startswith(HEADS)}
        torch.save({"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(model="SiT-Ti/4"), "steps": 4}, folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize("form", ["ours", "repa", "sra"])
@pytest.mark.parametrize("classes", [3, 5])
def test_training_starts_from_the_weights_of_a_file(capsys, trained, tmp_path, form, classes):
    """Model and EMA start from its EMA weights; another number of classes means a label table of one's own."""
    folder = write_set(tmp_path / "set", num_classes=classes, images=False)
    flags = ("--init-from", trained / f"{form}.pt", "--lr", 1e-9, "--vae-repa-depth", 3)
    _, checkpoint = fit(capsys, folder, tmp_path / "run", "--max-steps", 1, *flags)
    weights = torch.load(trained / "ours.pt", weights_only=True)["ema"]
    table = "y_embedder.embedding_table.weight"
    for part in ("model", "ema"):
        for key, value in checkpoint[part].items():
            if key == table and classes != 3:
                assert value.shape == (6, 128) and value.std() == pytest.approx(0.02, rel=0.1)
            elif not key.startswith("heads."):
                torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-6, msg=key)
    head = "heads.vae_repa.mlp.0.weight"
    assert not torch.equal(checkpoint["model"][head], weights[head])
    _, again = fit(capsys, folder, tmp_path / "run", "--max-steps", 2, *flags)  # it resumes and does not start anew
    assert again["step"] == 2 and again["opt"]["state"][0]["step"] == 2


# Bad input


@pytest.mark.parametrize("flags, says", [
    (("--repa-depth", 7), "repa depth 7"), (("--sra-depth", 7, "--sra-teacher-depth", 8), "sra depth 7"),
    (("--sra-depth", 2, "--sra-teacher-depth", 8), "--sra-teacher-depth 8"),
    (("--sra-depth", 4), "--sra-teacher-depth 4 is not above --sra-depth 4"), (("--sra-depth", 3, "--sra-teacher-depth", 2), "2"),
    (("--sra-depth", 2, "--sra-t-max", 1.5), "--sra-t-max"), (("--sra-weight", -1), "--sra-weight"), (("--repa-weight", "nan"), "--repa-weight"),
    (("--repa-depth", 2, "--model", "SiT-Ti/2"), "2x2 tokens"), (("--repa-depth", 2, "--repa-encoder", "dinov2_vitz14"), "dinov2_vitz14"),
    (("--repa-depth", 2, "--repa-encoder", "dinov2_vitb14"), "dinov2_vitb14_pretrain.pth"), (("--repa-depth", 2, "--repa-hub", "nowhere"), "nowhere")])
def test_bad_flags(capsys, data, hub, tmp_path, flags, says):
    common = ("--repa-encoder", "dinov2_vitt14", "--repa-hub", hub)
    assert says in refused(capsys, data, tmp_path / "run", *common, *flags)


def test_repa_without_images_or_with_others(capsys, hub, tmp_path):
    flags = flags_of(["repa"], hub)
    assert "--store-images" in refused(capsys, write_set(tmp_path / "none", images=False), tmp_path / "run", *flags)
    few = write_set(tmp_path / "few")
    np.save(few / "images.npy", np.load(few / "images.npy")[:11])
    assert "images.npy" in refused(capsys, few, tmp_path / "run", *flags)
    np.save(few / "images.npy", np.asfortranarray(np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)))
    assert "C order" in refused(capsys, few, tmp_path / "run", *flags)
    odd = write_set(tmp_path / "odd", image_size=40)
    assert "40 pixels" in refused(capsys, odd, tmp_path / "run", *flags)


def test_damaged_encoder_weights(capsys, data, hub, tmp_path):
    shutil.copytree(hub, tmp_path / "hub")
    weights = tmp_path / "hub" / "dinov2_vitt14_pretrain.pth"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "dinov2_vitt14" in refused(capsys, data, tmp_path / "run", *flags_of(["repa"], tmp_path / "hub"))


@pytest.mark.parametrize("flags, about, says", [
    (("--model", "SiT-S/4"), {}, "SiT-S/4"), (("--model", "SiT-Ti/2"), {}, "SiT-Ti/2"),
    ((), {"channels": 16}, "x_embedder"), ((), {"size": 16}, "pos_embed")])
def test_weights_of_other_widths_and_latents(capsys, trained, tmp_path, flags, about, says):
    folder = write_set(tmp_path / "set", **about, images=False)
    for form in ("ours", "repa"):
        line = refused(capsys, folder, tmp_path / "run", "--init-from", trained / f"{form}.pt", *flags)
        assert f"{form}.pt does not fit" in line and says in line
    assert "cannot be read as a checkpoint" in refused(capsys, folder, tmp_path / "run", "--init-from", tmp_path / "missing.pt")
