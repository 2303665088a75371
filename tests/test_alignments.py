"""REPA and SRA beside VAE-REPA: the image encoder against formulas, every combination of the three against a
plain loop, other latents and VAEs, bad input."""

import argparse
import json
import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import cli, tiny_encoder
from test_train import SHARED, assert_as_plain, assert_close_run, assert_same_run, fit, refused

import models
import train
from extract_latents import decode, load_vae

pytestmark = pytest.mark.usefixtures("all_on_one_thread")
METHODS = {"vae_repa": ("--vae-repa-depth", 2),
           "repa": ("--repa-depth", 3, "--repa-encoder", "dinov2_vitt14"),
           "sra": ("--sra-depth", 2, "--sra-teacher-depth", 4)}


def flags_of(methods):
    off = () if "vae_repa" in methods else ("--vae-repa-depth", 0)
    return [*off, *(word for name in methods for word in METHODS[name])]


def test_preprocessing_by_hand():
    """uint8 / 255, ImageNet's mean and std, then to 7/8, bicubic (a = -0.75, half-pixel centres)."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    x = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels, a, matrix = np.arange(-2, 34), -0.75, np.zeros((32, 28))
    d = abs(pixels[:, None] - ((np.arange(28) + 0.5) * 32 / 28 - 0.5))
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    np.add.at(matrix, pixels.clip(0, 31), np.where(d <= 1, near, np.where(d < 2, far, 0)))
    expected = np.einsum("pi,qj,pqc->cij", matrix, matrix, x)
    got = models.Encoder(tiny_encoder(), 32).preprocess(torch.from_numpy(image).permute(2, 0, 1)[None])
    np.testing.assert_allclose(got[0], expected, atol=1e-4)


def test_positions_are_resampled_smoothly():
    """The class token's is kept; away from the edges a linear table of 37 x 37 stays linear as 16 x 16."""
    rows = torch.arange(37.0).view(37, 1, 1).expand(37, 37, 1)
    linear = torch.cat([rows, rows.transpose(0, 1)], 2).reshape(1, 37 * 37, 2)
    table = torch.cat([torch.full((1, 1, 2), 7.0), linear], 1)
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
    """The network's normalised patch tokens; code and weights come from torch.hub."""
    encoder = models.load_encoder("dinov2_vitt14", 32)
    expected = models.Encoder(tiny_encoder(), 32)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = encoder(images)
    with torch.no_grad():
        everything = expected.network.forward_features(expected.preprocess(images))
    assert torch.equal(tokens, everything["x_norm_patchtokens"]) and tokens.shape == (2, 4, 32)
    assert not tokens.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.network.training
    for size, inside in ((256, 16), (512, 32)):  # 224 and 448 pixels in patches of 14
        encoder = models.Encoder(tiny_encoder(), size)
        assert (encoder.input_size, encoder.side) == (14 * inside, inside)
        assert encoder.network.pos_embed.shape == (1, 1 + inside**2, 32)


@pytest.mark.parametrize("methods", [m for n in range(4) for m in combinations(METHODS, n)], ids="+".join)
def test_every_combination_trains_and_resumes_to_the_bit(capsys, monkeypatch, data, tmp_path, methods):
    """As a plain loop does; and what is said of methods that are off leaves no trace."""
    epochs, weights = set(), train.loss_weights
    monkeypatch.setattr(train, "loss_weights", lambda *of: epochs.add(of[1]) or weights(*of))
    common = [*flags_of(methods), "--lr", 1e-3, "--batch-size", 12, "--vae-repa-weight", 1.5]
    common += [] if "repa" in methods else ["--repa-depth", 3, "--repa-weight", 0, "--repa-encoder", "none"]
    common += [] if "sra" in methods else ["--sra-depth", 2, "--sra-weight", 0]
    for name, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        _, state = fit(capsys, data, tmp_path / name, *common, "--max-steps", steps)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert {name.split(".")[1] for name in state["model"] if name.startswith("heads.")} == set(methods)
    assert not any("network" in name for name in state["model"]) and epochs == {0, 1}
    assert_as_plain(data, tmp_path / "whole", 2, models.Encoder(tiny_encoder(), 32))


def test_micro_batches_change_nothing(capsys, data, tmp_path):
    """Nor the means in the log. Nor do processes: test_readme.py's two machines."""
    common = (*flags_of(METHODS), *SHARED, "--max-steps", 3)
    fit(capsys, data, tmp_path / "whole", *common)
    fit(capsys, data, tmp_path / "micro", *common, "--micro-batch", 1)
    assert_close_run(tmp_path / "whole", tmp_path / "micro", 3)


def test_weights_and_sras_schedule():
    """SRA's weight falls to a tenth every 1000 epochs after epoch 149."""
    args = argparse.Namespace(vae_repa_weight=1.5, repa_weight=0.5, sra_weight=0.2)
    for epoch, sra in {0: 0.2, 149: 0.2, 150: 0.2 * 0.1**0.001, 1149: 0.02}.items():
        expected = {"denoising": 1, "vae_repa": 1.5, "repa": 0.5, "sra": pytest.approx(sra)}
        assert train.loss_weights(args, epoch) == expected


def save_vae(kind, folder):
    """An autoencoder of random weights for 3 x 32 x 32 images, normalised as its kind is."""
    from diffusers import AutoencoderDC, AutoencoderKL  # slow to import

    torch.manual_seed(0)
    if kind == "DC-AE":
        sizes = {"layers_per_block": (1,) * 3, "qkv_multiscales": ((),) * 3, "block_out_channels": (8, 8, 32)}
        both = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in sizes.items()}
        vae = AutoencoderDC(latent_channels=32, attention_head_dim=4, **both, scaling_factor=0.41407)
    else:
        flux = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
        each = {"latents_mean": [i / 50 for i in range(32)], "latents_std": [1 + i / 20 for i in range(32)]}
        own = flux if kind == "FLUX" else {"latent_channels": 32, **each}
        blocks = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3, (8, 16, 16)
        vae = AutoencoderKL(3, 3, *blocks, norm_num_groups=4, **own)
    vae.save_pretrained(folder)


@pytest.mark.parametrize("kind, channels", [("FLUX", 16), ("VA-VAE", 32), ("DC-AE", 32)])
def test_other_vaes_end_to_end(capsys, images, tmp_path, kind, channels):
    """Images, latents of 16 or 32 channels, training with patch 1, samples; decoded as the VAE does."""
    save_vae(kind, tmp_path / "vae")
    flags = ("--images", images, "--vae", tmp_path / "vae", "--image-size", 32, "--out", tmp_path / "set")
    status, _, err = cli(capsys, "extract_latents", *flags, "--num-workers", 1, "--store-images")
    assert status == 0, err
    about = json.loads((tmp_path / "set" / "latents.json").read_text())
    mean, std = torch.from_numpy(np.load(tmp_path / "set" / "moments.npy")).float().chunk(2, dim=1)
    assert mean.shape[1] == channels and std.any() == (kind != "DC-AE")  # which has no posterior
    shift, scale = (torch.tensor(about[key]).reshape(-1, 1, 1) for key in ("shift", "scale"))
    x = (mean - shift) * scale
    vae = load_vae(str(tmp_path / "vae"))
    with torch.no_grad():
        pixels = ((vae.decode(mean).sample + 1) * 127.5).round().clamp(0, 255)
    off = (decode(vae, x, about["shift"], about["scale"]).permute(0, 3, 1, 2) - pixels).abs()
    assert off.max() <= 1 and (off == 0).float().mean() > 0.99
    fit(capsys, tmp_path / "set", tmp_path / "run", "--model", "SiT-Ti/1", "--lr", 1e-3, "--max-steps", 2)
    assert_as_plain(tmp_path / "set", tmp_path / "run", 2)
    drawn = ("--ckpt", tmp_path / "run/checkpoints/0000002.pt", "--num-steps", 2, "--per-class", 1)
    status, _, err = cli(capsys, "sample", *drawn)
    assert status == 0 and list(tmp_path.glob("run/checkpoints/0000002_*.png")), err


@pytest.mark.parametrize("flags, says", [
    (("--repa-depth", 7), "repa depth 7"), (("--sra-depth", 7, "--sra-teacher-depth", 8), "sra depth 7"),
    (("--sra-depth", 2, "--sra-teacher-depth", 8), "--sra-teacher-depth 8"),
    (("--sra-depth", 4), "--sra-teacher-depth 4 is not above --sra-depth 4"), (("--sra-t-max", 1.5), "t-max"),
    (("--sra-weight", -1), "--sra-weight"), (("--repa-weight", "nan"), "--repa-weight"),
    (("--repa-depth", 2, "--model", "SiT-Ti/2"), "2x2 tokens"),
    (("--repa-depth", 2, "--repa-encoder", "dinov2_vitz14"), "dinov2_vitz14"),
    (("--repa-depth", 2, "--repa-encoder", "nowhere.pt2"), "nowhere.pt2")])
def test_bad_flags(capsys, data, tmp_path, flags, says):
    common = ("--repa-encoder", "dinov2_vitt14")
    assert says in refused(capsys, data, tmp_path / "run", *common, *flags)


def test_repa_without_its_images_or_weights(capsys, monkeypatch, data, hub, tmp_path):
    folder, flags = shutil.copytree(data, tmp_path / "set"), flags_of(["repa"])
    images = np.load(data / "images.npy")
    (folder / "images.npy").unlink()
    assert "--store-images" in refused(capsys, folder, tmp_path / "run", *flags)
    odd = np.zeros((12, 40, 40, 3), np.uint8)
    for others, says in ((images[:11], "images.npy"), (images.copy("F"), "C order"), (odd, "40 pixels")):
        np.save(folder / "images.npy", others)
        assert says in refused(capsys, folder, tmp_path / "run", *flags)
    shutil.copytree(hub, tmp_path / "hub")
    weights = tmp_path / "hub" / "checkpoints" / "dinov2_vitt14_pretrain.pth"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "dinov2_vitt14" in refused(capsys, data, tmp_path / "run", *flags)
