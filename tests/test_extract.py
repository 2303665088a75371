"""extract_latents.py: the crop and the file modes against formulas on known images, the moments against diffusers,
continuation after a kill, the reader of the set, and bad input."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLWan, UNet2DModel
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import extract_latents
from conftest import ROOT, TINY, Killed, cli, message, process
from extract_latents import (BackgroundWriter, Latents, center_crop, decode, encode, latent_normalization,
                             list_images, load_image, load_vae, read_ahead)


def flags(images, vae, out, **others):
    """The flags of an extraction, at 32 pixels and without workers unless told otherwise."""
    given = {"images": images, "vae": vae, "out": out, "image_size": 32, "num_workers": 0, **others}
    return [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]


def extract(capsys, images, vae, out, *more, **others):
    status, stdout, err = cli(capsys, "extract_latents", *flags(images, vae, out, **others), *more)
    assert status == 0, err
    return stdout, err


def refused(capsys, images, vae, out, *more, **others):
    """The one line with which an extraction ends, status 2, when it refuses its input."""
    status, _, err = cli(capsys, "extract_latents", *flags(images, vae, out, **others), *more)
    assert status == 2, err
    line = message(err)
    assert line.startswith("extract_latents.py: error: ")
    return line


def refused_by_train(capsys, latents, tmp_path):
    status, _, err = cli(capsys, "train", "--data", latents, "--run-dir", tmp_path / "run")
    assert status == 2 and not (tmp_path / "run").exists(), err
    return message(err)


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# The centre crop


def box(x):
    return (-0.5 < x) & (x <= 0.5)


def cubic(x):
    """Keys' kernel with a = -1/2."""
    x = abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def resample(rows, size, kernel, support):
    """Rows (N, ...) -> (size, ...): each new row is a kernel-weighted mean; the kernel widens when the size shrinks."""
    n, ratio = len(rows), len(rows) / size
    position = ((np.arange(n) + 0.5) - (np.arange(size)[:, None] + 0.5) * ratio) / max(ratio, 1)
    weights = np.where(abs(position) <= support, kernel(position), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.floor(np.tensordot(weights, rows.astype(np.float64), 1) + 0.5).clip(0, 255)


def resize(pixels, width, height, kernel, support):
    across = resample(pixels.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1)
    return resample(across, height, kernel, support)


def reference_crop(pixels, size):
    """ADM's centre crop of pixels (H, W, 3), in numpy."""
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = (side // 2 for side in pixels.shape[:2])
        if pixels.shape[0] % 2 == pixels.shape[1] % 2 == 0:
            pixels = pixels.reshape(height, 2, width, 2, -1).mean(axis=(1, 3))
        else:
            pixels = resize(pixels, width, height, box, 0.5)
    height, width = pixels.shape[:2]
    height, width = round(height * size / min(height, width)), round(width * size / min(height, width))
    if (height, width) != pixels.shape[:2]:
        pixels = resize(pixels, width, height, cubic, 2)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("width, height", [(32, 32), (47, 32), (32, 47), (40, 36), (63, 90), (64, 64), (64, 100),
                                           (129, 130), (300, 131), (20, 11), (9, 9), (1, 3), (256, 128)])
def test_crop_equals_the_formula(width, height):
    image = noise_image(width, height, seed=width)
    cropped = np.asarray(center_crop(image, 32), float)
    assert cropped.shape == (32, 32, 3)
    assert_allclose(cropped, reference_crop(np.asarray(image), 32), atol=2)  # PIL rounds between its passes


def test_crop_halves_by_box_means():
    """128 x 64 at size 16 is halved twice: the gradient 2x becomes 4i + 1, then 8k + 3; columns 8 to 23 stay."""
    gradient = np.broadcast_to(2 * np.arange(128, dtype=np.uint8), (64, 128)).copy()
    expected = np.broadcast_to(8 * np.arange(8, 24) + 3, (16, 16))
    assert_array_equal(np.asarray(center_crop(Image.fromarray(gradient), 16)), expected)
    assert_array_equal(np.asarray(center_crop(Image.fromarray(gradient.T.copy()), 16)), expected.T)


def test_crop_of_checkerboards():
    """Cells of 2 pixels become cells of 1 at half the size, and cells of 1 pixel become grey."""
    board = (np.indices((64, 96)).sum(0) % 2 * 255).astype(np.uint8)
    coarse = board[:32, :48].repeat(2, 0).repeat(2, 1)
    assert_array_equal(np.asarray(center_crop(Image.fromarray(coarse), 32)), board[:32, 8:40])
    assert_array_equal(np.asarray(center_crop(Image.fromarray(board), 32)), np.full((32, 32), 128))


def test_crop_takes_the_middle():
    """Where the short side has the size already nothing is resampled; an odd margin is smaller at the left or top."""
    gradient = np.broadcast_to(5 * np.arange(41, dtype=np.uint8), (36, 41)).copy()
    assert_array_equal(np.asarray(center_crop(Image.fromarray(gradient), 36)), gradient[:, 2:38])
    assert_array_equal(np.asarray(center_crop(Image.fromarray(gradient.T.copy()), 36)), gradient.T[2:38])


# File modes: the images have the crop's size, so that the pixels themselves are compared

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY_RGB = np.stack([GREY] * 3, axis=2)
ALPHA = np.where(GREY % 3 == 0, 0, 255).astype(np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)


def loaded(image, path, **save):
    image.save(path, **save)
    pixels = load_image(path, 16)
    assert pixels.dtype == np.uint8 and pixels.shape == (16, 16, 3)
    return pixels


def test_grey_files(tmp_path):
    assert_array_equal(loaded(Image.fromarray(GREY), tmp_path / "l.png"), GREY_RGB)
    grey_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    assert_array_equal(loaded(grey_alpha, tmp_path / "la.png"), GREY_RGB)
    bits = Image.fromarray(GREY > 100)
    assert bits.mode == "1"
    assert_array_equal(loaded(bits, tmp_path / "bits.png"), (GREY_RGB > 100) * 255)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_grey_scales(tmp_path, name):
    """65535 is white and 257 is the first grey above black: nothing is clipped."""
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert_array_equal(loaded(deep, tmp_path / name), GREY_RGB)
    between = np.random.default_rng(2).integers(0, 65536, (16, 16), np.uint16)
    assert_allclose(loaded(Image.fromarray(between), tmp_path / name)[..., 0], between / 257, atol=1)


@pytest.mark.parametrize("transparency", [None, 7, bytes(range(256))], ids=["opaque", "one index", "by index"])
@pytest.mark.filterwarnings("ignore:Palette images")
def test_palette_files(tmp_path, transparency):
    palette = np.random.default_rng(3).integers(0, 256, (256, 3), np.uint8)
    image = Image.fromarray(GREY, "L")
    image.putpalette(palette.tobytes())
    save = {} if transparency is None else {"transparency": transparency}
    assert_array_equal(loaded(image, tmp_path / "p.png", **save), palette[GREY])
    assert_array_equal(loaded(image, tmp_path / "p.gif"), palette[GREY])


def test_colour_files(tmp_path):
    """Alpha is dropped and not blended; CMYK is the complement, darkened by black."""
    assert_array_equal(loaded(Image.fromarray(np.dstack([COLOUR, ALPHA])), tmp_path / "rgba.png"), COLOUR)
    cmyk = Image.fromarray(np.dstack([COLOUR, np.zeros_like(GREY)]), "CMYK")
    assert_array_equal(loaded(cmyk, tmp_path / "cmyk.tif"), 255 - COLOUR)
    black = Image.fromarray(np.dstack([np.zeros_like(COLOUR), GREY]), "CMYK")
    assert_array_equal(loaded(black, tmp_path / "black.tif"), 255 - GREY_RGB)
    even = loaded(Image.new("CMYK", (16, 16), (200, 100, 0, 0)), tmp_path / "even.jpg", quality=95)
    assert_allclose(even, np.broadcast_to([55, 155, 255], (16, 16, 3)), atol=3)


@pytest.mark.parametrize("orientation, turns", [(6, 1), (3, 2), (8, 3)])
def test_exif_rotation(tmp_path, orientation, turns):
    """A camera held otherwise stores the pixels turned and says so in a tag; the loaded image stands upright."""
    cells = np.random.default_rng(4).integers(0, 256, (2, 2, 3), np.uint8)
    upright = cells.repeat(16, 0).repeat(24, 1)  # 48 x 32: every block of the JPEG has one colour
    exif = Image.Exif()
    exif[0x0112] = orientation
    save = {"quality": 95, "subsampling": 0}
    Image.fromarray(upright).save(tmp_path / "upright.jpg", **save)
    Image.fromarray(np.rot90(upright, turns)).save(tmp_path / "turned.jpg", exif=exif, **save)
    expected = load_image(tmp_path / "upright.jpg", 32)
    assert_allclose(expected, upright[:, 8:40], atol=3)
    assert_allclose(load_image(tmp_path / "turned.jpg", 32), expected.astype(int), atol=3)


# Moments, labels and latents.json


def crops(images):
    """The images of the fixture, 40 x 36, cropped to 32 by hand, in sorted class and file order."""
    files = sorted(Path(images).glob("*/*.png"))
    small = [Image.open(file).resize((36, 32), Image.Resampling.BICUBIC).crop((2, 0, 34, 32)) for file in files]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def expected_moments(images, vae):
    """What diffusers gives for the images of the fixture, (12, 8, 8, 8) in float32."""
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(vae).encode(crops(images) / 127.5 - 1).latent_dist
    return torch.cat([posterior.mean, posterior.std], 1).numpy()


def test_moments_are_those_of_diffusers(latents, expected_moments):
    moments = np.load(latents / "moments.npy", mmap_mode="r")
    assert moments.dtype == np.float16 and moments.shape == (12, 8, 8, 8)
    assert abs(expected_moments[:, None] - expected_moments).max(axis=(2, 3, 4))[~np.eye(12, dtype=bool)].min() > 0.01
    assert_allclose(moments, expected_moments.astype(np.float16), rtol=2**-10, atol=1e-5)
    labels = np.load(latents / "labels.npy")
    assert labels.dtype == np.int64 and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_latents_json(vae, latents):
    about = json.loads((latents / "latents.json").read_text())
    expected = {"vae": str(vae), "scale": 0.5, "shift": 0.25, "class_names": ["class0", "class1", "class2"],
                "num_classes": 3, "latent_shape": [4, 8, 8], "count": 12, "image_size": 32,
                "dtype": "float16"}
    assert {key: about[key] for key in expected} == expected
    assert sorted(path.name for path in latents.iterdir()) == ["labels.npy", "latents.json", "moments.npy"]


def test_relative_vae_path_is_stored_absolute(capsys, images, vae, tmp_path, monkeypatch):
    monkeypatch.chdir(vae.parent)
    extract(capsys, images, vae.name, tmp_path)
    assert json.loads((tmp_path / "latents.json").read_text())["vae"] == str(vae)


def test_float32(capsys, images, vae, tmp_path, expected_moments):
    extract(capsys, images, vae, tmp_path, dtype="float32")
    moments = np.load(tmp_path / "moments.npy")
    assert moments.dtype == np.float32 and (moments != moments.astype(np.float16)).any()
    assert_allclose(moments, expected_moments, rtol=1e-4, atol=1e-5)


def test_deterministic_autoencoder_has_no_std(capsys, images, tmp_path):
    torch.manual_seed(0)
    blocks = {"layers_per_block": (1, 1), "qkv_multiscales": ((), ()), "block_out_channels": (8, 8)}
    both = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in blocks.items()}
    dc = AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.4, **both).eval()
    dc.save_pretrained(tmp_path / "dc")
    extract(capsys, images, tmp_path / "dc", tmp_path / "out", dtype="float32")
    mean, std = np.split(np.load(tmp_path / "out/moments.npy"), 2, axis=1)
    with torch.no_grad():
        assert_allclose(mean, dc.encode(crops(images) / 127.5 - 1).latent, rtol=1e-4, atol=1e-5)
    assert (std == 0).all() and mean.std() > 0.01
    about = json.loads((tmp_path / "out/latents.json").read_text())
    assert (about["scale"], about["shift"]) == (0.4, 0.0)


def with_config(vae, folder, **changes):
    """A copy of a VAE's folder whose config.json says something else."""
    shutil.copytree(vae, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_per_channel_statistics(capsys, images, vae, tmp_path, expected_moments):
    """They take precedence over the two scalars, and leave the stored moments raw."""
    own = with_config(vae, tmp_path / "vae", latents_mean=[0.5, -1, 2, 0], latents_std=[2, 4, 0.5, 1],
                      scaling_factor=0.18215, shift_factor=None)
    extract(capsys, images, own, tmp_path / "out", dtype="float32")
    about = json.loads((tmp_path / "out/latents.json").read_text())
    assert about["shift"] == [0.5, -1, 2, 0] and about["scale"] == [0.5, 0.25, 2, 1]
    assert_allclose(np.load(tmp_path / "out/moments.npy"), expected_moments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config, expected", [
    ({"scaling_factor": 0.18215}, (0.0, 0.18215)),
    ({"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None}, (0.0, 0.18215)),
    ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, (0.0609, 1.5305)),
    ({"scaling_factor": 0.18215, "latents_mean": [[[1.0]], [[2.0]]], "latents_std": (4, 5)}, ([1, 2], [0.25, 0.2])),
    ({"scaling_factor": 1.0, "latents_std": (4, 5), "latent_channels": 2}, (0.0, [0.25, 0.2])),
    ({"scaling_factor": 3.0, "latents_mean": [1.0, 2.0]}, ([1, 2], 3.0)),
    ({"scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 16}, (0.1159, 0.3611)),  # FLUX.1
    ({"scaling_factor": 0.41407, "latent_channels": 32}, (0.0, 0.41407)),  # DC-AE
    ({"scaling_factor": 0.18215, "latent_channels": 4}, (0.0, 0.18215)),
    ({"scaling_factor": 0.18215, "latent_channels": 32}, (None, None)),  # nobody's: diffusers' default
    ({"scaling_factor": None, "shift_factor": 0.5}, (None, None)), ({"scaling_factor": 0}, (None, None)),
    ({"latents_std": [1.0, 0.0]}, (None, None))], ids=str)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_latent_normalization(config, expected):
    assert latent_normalization(config) == expected


@pytest.mark.parametrize("config, says", [
    ({"scaling_factor": 0.5, "latents_std": [1.0, 2.0]}, "latents_std and a scaling_factor of 0.5"),
    ({"scaling_factor": 1, "latents_mean": [1.0, 2.0], "shift_factor": 0.1}, "latents_mean and a shift_factor of 0.1"),
    ({"latents_std": [1.0, 2.0, 3.0], "latent_channels": 4}, "3 values of latents_std for 4 channels"),
    ({"scaling_factor": "0.5"}, "scaling_factor of '0.5'"), ({"latents_mean": [1.0, [2.0, 3.0]]}, "latents_mean of [1.0, [2.0")])
def test_scale_fields_that_conflict(capsys, config, says):
    with pytest.raises(SystemExit) as stop:
        latent_normalization(config)
    assert stop.value.code == 2 and says in message(capsys.readouterr().err)


class FakeVae:
    """Decodes a latent (B, 4, H, W) to its first three channels and keeps what it was given."""

    dtype = torch.float32

    def __init__(self):
        self.seen = []

    def decode(self, z):
        self.seen.append(z)
        return SimpleNamespace(sample=z[:, :3])


@pytest.mark.parametrize("shift, scale", [(0.25, 0.5), ([0.5, -1.0, 2.0, 0.0], [0.5, 0.25, 2.0, 1.0])])
def test_decode_inverts_the_normalisation(shift, scale):
    """x = (z - shift) * scale is undone before the VAE sees it, in the order of the batch, however it is split."""
    z = torch.randn(37, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x = (z - torch.tensor(shift).reshape(-1, 1, 1)) * torch.tensor(scale).reshape(-1, 1, 1)
    vae = FakeVae()
    images = decode(vae, x, shift, scale)
    torch.testing.assert_close(torch.cat(vae.seen), z)
    expected = torch.floor((z[:, :3] + 1) * 127.5 + 0.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert images.dtype == torch.uint8 and (images - expected).abs().max() <= 1
    assert (images == expected).float().mean() > 0.99


def test_decode_rounds():
    levels = torch.tensor([-3.0, -0.4, 0.4, 0.6, 99.4, 99.6, 254.4, 254.6, 255.4, 300.0])  # in grey levels
    x = (levels / 127.5 - 1).reshape(-1, 1, 1, 1).expand(-1, 4, 1, 1)
    assert decode(FakeVae(), x, 0.0, 1.0)[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 99, 100, 254, 255, 255, 255]


def test_encode_maps_pixels_to_plus_minus_one():
    seen = []
    vae = SimpleNamespace(encode=lambda x: seen.append(x) or SimpleNamespace(latents=x))
    moments = encode(vae, torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1))
    torch.testing.assert_close(seen[0].flatten(), torch.tensor([-1, -0.6, 1]))
    torch.testing.assert_close(moments.flatten(), torch.tensor([-1, -0.6, 1, 0, 0, 0]))


# Reading the set, as training does


PER_CHANNEL = {"latents_mean": [0.5, -1, 2, 0], "latents_std": [2, 4, 0.5, 1], "scaling_factor": None,
               "shift_factor": None}


@pytest.mark.parametrize("more", [(), ("--flip",), ("--store-images",), ("--flip", "--store-images")],
                         ids=" ".join)
@pytest.mark.parametrize("config, dtype", [({}, "float16"), (PER_CHANNEL, "float32")],
                         ids=["one scale", "a scale per channel"])
def test_the_reader_gives_back_what_the_writer_wrote(capsys, images, vae, tmp_path, config, dtype, more):
    """x = (z - shift) * scale, by hand from the files: mean and std of x, labels, and images for REPA."""
    flip, with_images, out = "--flip" in more, "--store-images" in more, tmp_path / "out"
    extract(capsys, images, with_config(vae, tmp_path / "vae", **config), out, *more, dtype=dtype)
    moments, labels = np.load(out / "moments.npy").astype(np.float32), np.load(out / "labels.npy")
    about = json.loads((out / "latents.json").read_text())
    shift, scale = (np.float32(about[key]).reshape(-1, 1, 1) for key in ("shift", "scale"))
    assert len(shift) == len(scale) == (4 if config else 1)

    latents = Latents(out, with_images=with_images)
    size = {"image_size": 32} if with_images else {}
    keys = ("vae", "shift", "scale", "num_classes", "latent_shape", "count", "flip", "files_sha256")
    assert latents.facts == {**{key: about[key] for key in keys}, **size}
    rows = np.array([5, 0, 11, 5, *((23, 12, 17) if flip else ())])  # row 12 + i is the mirror image of row i
    mean, std, y, *stored = (x.numpy() for x in latents.read(rows))
    assert (mean.dtype, std.dtype, y.dtype) == (np.float32, np.float32, np.int64)
    assert_allclose(mean, (moments[rows, :4] - shift) * scale, rtol=1e-6, atol=1e-6)
    assert_allclose(std, moments[rows, 4:] * scale, rtol=1e-6)
    assert_array_equal(y, labels[rows % 12])
    assert len(stored) == with_images
    if with_images:  # each is the image whose moments stand beside it
        upright = np.load(out / "images.npy")
        expected = [upright[i] if i < 12 else upright[i - 12, :, ::-1] for i in rows]
        assert stored[0].dtype == np.uint8
        assert_array_equal(stored[0], np.stack(expected).transpose(0, 3, 1, 2))
        encoded = encode(load_vae(str(vae)), torch.from_numpy(stored[0])).numpy()
        assert_allclose(mean, (encoded[:, :4] - shift) * scale, rtol=1e-3, atol=1e-3)
    for i, row in enumerate(rows):  # alone as in a batch
        alone = latents.read(rows[i : i + 1])
        assert all(np.array_equal(a[0], b[i]) for a, b in zip(alone, (mean, std, y, *stored)))


@pytest.mark.parametrize("threads", [1, 4])
def test_reading_ahead(threads):
    """Results come in order; while the caller works on one, threads + 1 more are read, and no others."""
    asked = []

    def read(i):
        asked.append(i)
        time.sleep(0.01 * (i % 3))  # they do not end in the order in which they began
        return 10 * i

    results = read_ahead(read, range(20), threads)
    got = [next(results)]
    for _ in range(200):
        time.sleep(0.01)
        if len(asked) == threads + 2:
            break
    time.sleep(0.05)
    assert sorted(asked) == list(range(threads + 2))
    assert got + list(results) == list(range(0, 200, 10)) and sorted(asked) == list(range(20))


def test_what_fails_in_reading_ahead_is_raised():
    results = read_ahead(lambda i: 1 / i, [2, 1, 0, 1])
    assert [next(results), next(results)] == [0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def by_hand(folder, **about):
    """A set as the README says to make it from other sources: 6 latents 4 x 8 x 8 of 2 classes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(2, 6, 4, 8, 8))
    np.save(folder / "moments.npy", np.concatenate([mean, abs(std)], axis=1).astype(np.float32))
    np.save(folder / "labels.npy", np.arange(6) % 2)
    about = {"vae": "mine", "shift": [0.1, 0.2, 0.3, 0.4], "scale": 0.5, "num_classes": 2, **about}
    (folder / "latents.json").write_text(json.dumps(about))
    return folder


def test_a_set_made_by_hand_trains(capsys, tmp_path):
    folder, run = by_hand(tmp_path / "set"), tmp_path / "run"
    status, stdout, err = cli(capsys, "train", *TINY, "--data", folder, "--run-dir", run, "--max-steps", 2)
    assert status == 0, err
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["denoising"]) and line["vae_repa"] > 0 for line in lines)
    facts = torch.load(run / "checkpoints" / "0000002.pt", weights_only=True)["settings"]["data"]
    expected = {"vae": "mine", "shift": [0.1, 0.2, 0.3, 0.4], "scale": 0.5, "num_classes": 2,
                "latent_shape": [4, 8, 8], "count": 6, "flip": False}
    assert {key: facts[key] for key in expected} == expected


@pytest.mark.parametrize("name, array", [
    ("moments", np.zeros((5, 8, 8, 8), np.float32)), ("moments", np.zeros((18, 8, 8, 8), np.float32)),
    ("moments", np.zeros((6, 7, 8, 8), np.float32)), ("moments", np.zeros((6, 8, 8, 4), np.float32)),
    ("moments", np.zeros((6, 8, 64), np.float32)), ("moments", np.zeros((6, 8, 8, 8), np.uint8)),
    ("moments", np.zeros((6, 8, 8, 8), np.float32, "F")), ("moments", np.zeros(0)),
    ("labels", np.arange(7) % 2), ("labels", np.zeros((6, 1), int)), ("labels", np.array([0, 1, 2, 0, 1, 0])),
    ("labels", np.array([0, 1, -1, 0, 1, 0])), ("labels", np.zeros(6)), ("labels", np.zeros(0, int)),
    ("labels", np.array(["cat"] * 6))],
    ids=lambda x: x if isinstance(x, str) else f"{x.dtype} {x.shape}")
def test_arrays_made_by_hand_that_do_not_fit(capsys, tmp_path, name, array):
    folder = by_hand(tmp_path / "set")
    np.save(folder / f"{name}.npy", array)
    assert "are damaged" in refused_by_train(capsys, folder, tmp_path)


@pytest.mark.parametrize("about", [
    {"num_classes": 1}, {"num_classes": 2.0}, {"num_classes": None}, {"shift": [0.1, 0.2, 0.3]},
    {"scale": [1] * 5}, {"scale": []}, {"scale": 0}, {"scale": [1, 1, -1, 1]}, {"scale": float("nan")}, {"shift": [0, 0, float("inf"), 0]},
    {"scale": None}, {"shift": "none"}, {"scale": {"a": 1}}, {"scale": [1, [2, 3]]}], ids=str)
def test_facts_made_by_hand_that_do_not_fit(capsys, tmp_path, about):
    assert "are damaged" in refused_by_train(capsys, by_hand(tmp_path / "set", **about), tmp_path)


@pytest.mark.parametrize("key", ["vae", "shift", "scale", "num_classes"])
def test_facts_made_by_hand_that_are_missing(capsys, tmp_path, key):
    folder = by_hand(tmp_path / "set")
    about = json.loads((folder / "latents.json").read_text())
    del about[key]
    (folder / "latents.json").write_text(json.dumps(about))
    line = refused_by_train(capsys, folder, tmp_path)
    assert "are damaged" in line and key in line


@pytest.mark.parametrize("name", ["moments.npy", "labels.npy", "latents.json"])
def test_files_of_a_set_that_are_cut_off(capsys, tmp_path, name):
    file = by_hand(tmp_path / "set") / name
    file.write_bytes(file.read_bytes()[:-20])
    assert "are damaged" in refused_by_train(capsys, file.parent, tmp_path)
    if name != "latents.json":
        file.unlink()
        assert name in refused_by_train(capsys, file.parent, tmp_path)


# Which files


def test_hidden_and_nested_files(capsys, images, vae, tmp_path):
    """Nested folders belong to their class; hidden files and folders, and files beside the classes, are left out."""
    root = shutil.copytree(images, tmp_path / "images")
    (root / "class1" / "more" / "deep").mkdir(parents=True)
    noise_image(32, 32).save(root / "class1" / "more" / "deep" / "a.png")
    for junk in ("a.txt", ".cache/x.png", "class0/.DS_Store", "class2/._00.png", "class0/.ipynb_checkpoints/0.png"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).write_text("no image")
    expected = [f"class{c}/{i:02d}.png" for c in range(3) for i in range(c, 12, 3)]
    expected.insert(8, "class1/more/deep/a.png")
    assert list_images(root) == (["class0", "class1", "class2"], expected, [0] * 4 + [1] * 5 + [2] * 4)
    extract(capsys, root, vae, tmp_path / "out")
    assert np.load(tmp_path / "out/labels.npy").tolist() == [0] * 4 + [1] * 5 + [2] * 4


def test_file_name_that_is_not_utf8(capsys, images, vae, tmp_path):
    root = shutil.copytree(images, tmp_path / "images")
    try:
        shutil.copy(images / "class1" / "01.png", os.fsencode(root / "class0") + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    extract(capsys, root, vae, tmp_path / "out")
    assert np.load(tmp_path / "out/labels.npy").tolist() == [0] * 5 + [1] * 4 + [2] * 4


# Continuation


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    """2 classes of 100 different images."""
    root = tmp_path_factory.mktemp("many")
    for i in range(200):
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        noise_image(8, 8, seed=i).save(root / f"class{i % 2}" / f"{i:03d}.png")
    return root


def kill_midway(args, progress, rows):
    """Start an extraction, kill it once at least this many rows are done, and return which are."""
    command = [sys.executable, str(ROOT / "extract_latents.py"), *map(str, args)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not progress.exists() or progress.read_bytes().count(1) < rows:
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    run.kill()
    run.wait()
    done = np.frombuffer(progress.read_bytes(), bool)
    assert rows <= done.sum() < len(done)
    return done


def test_killed_it_continues(capsys, many_images, vae, tmp_path, one_thread):
    """Killed, the set counts as unfinished; then no row is encoded twice, and the bytes are those of an
    undisturbed run. Continued with another batch size and two processes, the numbers are."""
    root, out = shutil.copytree(many_images, tmp_path / "images"), tmp_path / "out"
    extract(capsys, root, vae, tmp_path / "whole", batch_size=1)
    undisturbed, args = contents(tmp_path / "whole"), flags(root, vae, out, batch_size=1)
    done = kill_midway(args, out / "moments.npy.progress", 40)
    assert not (out / "latents.json").exists() and not (out / "moments.npy").exists()
    assert "unfinished" in refused_by_train(capsys, out, tmp_path)
    assert "image_size is 32 there and 16 here" in refused(capsys, root, vae, out, image_size=16)

    other = shutil.copytree(out, tmp_path / "other")
    for path in np.array(list_images(root)[1])[done]:  # whoever reads one of these again fails
        (root / path).write_text("no image any more")
    extract(capsys, root, vae, out, batch_size=1)
    assert contents(out).keys() == {"labels.npy", "latents.json", "moments.npy"}
    assert contents(out) == undisturbed

    shutil.copytree(many_images, root, dirs_exist_ok=True)
    process("extract_latents", *flags(root, vae, other, batch_size=7), processes=2)
    assert_allclose(np.load(other / "moments.npy"), np.load(out / "moments.npy"), rtol=2**-9, atol=1e-5)
    assert {**contents(other), "moments.npy": undisturbed["moments.npy"]} == undisturbed


def test_processes_share_the_batches(tmp_path):
    """Each batch belongs to one process; what is done is not given out again, whatever the batch size."""
    rows = extract_latents.ResumableArray(tmp_path / "a.npy", (20, 2), "float32", {})
    assert [rows.batches(3, rank, 3) for rank in range(3)] == [
        [range(0, 3), range(9, 12), range(18, 20)], [range(3, 6), range(12, 15)], [range(6, 9), range(15, 18)]]
    rows.write(range(3, 9), np.ones((6, 2)))
    again = extract_latents.ResumableArray(tmp_path / "a.npy", (20, 2), "float32", {})
    assert [list(part) for rank in range(2) for part in again.batches(4, rank, 2)] == [
        [0, 1, 2, 3], [12, 13, 14, 15], [8, 9, 10, 11], [16, 17, 18, 19]]
    for part in again.batches(4):
        again.write(part, np.full((4, 2), part.start))
    again.finish()
    expected = np.repeat([0, 1, 8, 12, 16], 4)
    assert_array_equal(np.load(tmp_path / "a.npy"), np.stack([expected, expected], axis=1))


def test_background_writer():
    """Everything arrives whole and in order, the caller runs at most two ahead, and leaving waits for the rest."""
    gate, stored = threading.Event(), []

    def store(rows, values):
        gate.wait(30)
        stored.append((rows, values))

    with BackgroundWriter() as writer:
        writer.put(store, 0, torch.zeros(2))
        writer.put(store, 1, torch.ones(2))
        third = threading.Thread(target=writer.put, args=(store, 2, torch.full((2,), 2.0)))
        third.start()
        third.join(0.2)
        assert third.is_alive() and not stored  # the caller did not wait for the first two, but does for its third
        gate.set()
        third.join(30)
    assert [rows for rows, _ in stored] == [0, 1, 2]
    assert all((values == rows).all() and isinstance(values, np.ndarray) for rows, values in stored)


@pytest.mark.parametrize("puts", [1, 5])
def test_what_fails_in_the_background_is_raised(puts):
    stored = []

    def store(rows, values):
        if rows == 0:
            raise OSError(28, "No space left on device")
        stored.append(rows)

    with pytest.raises(OSError, match="No space"), BackgroundWriter() as writer:
        for i in range(puts):
            writer.put(store, i, torch.zeros(1))
    with pytest.raises(ZeroDivisionError), BackgroundWriter() as writer:  # the caller's own error, once all is stored
        stored.clear()
        writer.put(store, 7, torch.zeros(1))
        1 / 0
    assert stored == [7]


def test_two_processes_write_the_same_bytes(capsys, images, vae, tmp_path, one_thread):
    process("extract_latents", *flags(images, vae, tmp_path / "two", batch_size=5, num_workers=1), processes=2)
    extract(capsys, images, vae, tmp_path / "one", batch_size=5)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("last_step", ["finish", "labels", "latents.json"])
def test_killed_at_the_very_end(capsys, images, vae, tmp_path, monkeypatch, one_thread, last_step):
    """Between the last row and latents.json nothing can be lost, wherever it stops."""
    extract(capsys, images, vae, tmp_path / "whole")
    out, real = tmp_path / "out", extract_latents.write_json

    def stop(*args, **kwargs):
        raise Killed

    def stop_at_last(path, value):
        return stop() if path.name == "latents.json" else real(path, value)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*{"finish": (extract_latents.ResumableArray, "finish", stop), "labels": (np, "save", stop),
                        "latents.json": (extract_latents, "write_json", stop_at_last)}[last_step])
        extract(capsys, images, vae, out)
    assert not (out / "latents.json").exists()
    assert "unfinished" in refused_by_train(capsys, out, tmp_path)
    monkeypatch.setattr(extract_latents, "load_image", stop)  # every row is there: none is read again
    extract(capsys, images, vae, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_finished_set_is_left_alone(capsys, images, vae, latents, monkeypatch):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in latents.iterdir()}
    monkeypatch.setattr(extract_latents, "load_vae", None)  # not even loaded
    stdout, err = extract(capsys, images, vae, latents)
    assert "complete already" in stdout and not err
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in latents.iterdir()} == before


@pytest.mark.parametrize("name, value", [("dtype", "float32"), ("image_size", 64), ("vae", "elsewhere")])
def test_other_settings_are_refused(capsys, images, vae, latents, name, value):
    before = contents(latents)
    given = {"vae": vae, name: value}
    line = refused(capsys, images, given.pop("vae"), latents, **given)
    assert f"{name} is" in line and str(value) in line and line.count(" there and ") == 1
    assert contents(latents) == before


def test_other_images_are_refused(capsys, images, vae, latents, tmp_path):
    root, before = shutil.copytree(images, tmp_path / "images"), contents(latents)
    noise_image(32, 32).save(root / "class1" / "more.png")
    assert "count is 12 there and 13 here" in refused(capsys, root, vae, latents)
    (root / "class1" / "01.png").unlink()  # as many, by other names
    assert "files_sha256 is" in refused(capsys, root, vae, latents)
    assert contents(latents) == before


# Bad input


def truncated_jpeg(path):
    noise_image(64, 64).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def decompression_bomb(path):
    """A PNG of a few bytes that says it has 400 megapixels."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]:
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(file)


def text(path):
    path.write_text("no image")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [text, empty, truncated_jpeg, decompression_bomb])
def test_file_that_is_no_image(capsys, images, vae, tmp_path, spoil, one_thread):
    """It is named; once a good image stands in its place, the same command completes the set."""
    root, out = shutil.copytree(images, tmp_path / "images"), tmp_path / "out"
    spoil(root / "class1" / "04.png")
    line = refused(capsys, root, vae, out, batch_size=4)
    assert str(root / "class1" / "04.png") in line and "1 file(s)" in line
    assert not (out / "latents.json").exists() and not (out / "moments.npy").exists()
    assert "unfinished" in refused_by_train(capsys, out, tmp_path)
    shutil.copy(images / "class1" / "04.png", root / "class1" / "04.png")
    extract(capsys, root, vae, out, batch_size=4)
    extract(capsys, root, vae, tmp_path / "whole", batch_size=4)
    assert contents(out) == contents(tmp_path / "whole")


def test_error_line_of_the_real_command(images, vae, tmp_path):
    """With a worker, two bad files, and the real stderr."""
    root = shutil.copytree(images, tmp_path / "images")
    decompression_bomb(root / "class0" / "00.png")
    text(root / "class2" / "02.png")
    args = flags(root, vae, tmp_path / "out", num_workers=1, batch_size=6)
    run = process("extract_latents", *args, check=False)
    assert run.returncode == 2
    line = message(run.stderr)
    assert "2 file(s)" in line and "class0/00.png" in line and "class2/02.png" in line


def test_folders_without_images(capsys, vae, tmp_path):
    file, flat, hollow, out = (tmp_path / name for name in ("file", "flat", "hollow", "out"))
    file.write_text("x")
    flat.mkdir()
    (hollow / "cat").mkdir(parents=True)
    (hollow / "dog").mkdir()
    noise_image(8, 8).save(hollow / "dog" / "0.png")
    noise_image(8, 8).save(flat / "0.png")
    assert f"{tmp_path / 'none'} is not a folder" in refused(capsys, tmp_path / "none", vae, out)
    assert f"{file} is not a folder" in refused(capsys, file, vae, out)
    assert f"{flat} holds no class folders" in refused(capsys, flat, vae, out)
    assert str(hollow / "cat") in refused(capsys, hollow, vae, out)
    assert not out.exists()


@pytest.fixture(scope="module")
def bad_vaes(tmp_path_factory, vae):
    """Folders that hold no autoencoder of images, by what is wrong with them."""
    root = tmp_path_factory.mktemp("bad")
    for name in ("broken config", "truncated weights", "no weights", "no class"):
        shutil.copytree(vae, root / name)
    (root / "broken config" / "config.json").write_text('{"_class_name": "Auto')
    (root / "no class" / "config.json").write_text('{"in_channels": 3}')
    for weights in (root / "truncated weights").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    for weights in (root / "no weights").glob("*.safetensors"):
        weights.unlink()
    (root / "empty").mkdir()
    UNet2DModel(sample_size=8, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, norm_num_groups=4,
                up_block_types=("UpBlock2D",) * 2, layers_per_block=1).save_pretrained(root / "no autoencoder")
    AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
                     latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_pretrained(root / "video")
    return root


@pytest.mark.parametrize("name", ["missing", "empty", "broken config", "truncated weights", "no weights", "no class",
                                  "no autoencoder", "video"])
def test_vae_that_cannot_be_used(capsys, images, bad_vaes, tmp_path, name):
    line = refused(capsys, images, bad_vaes / name, tmp_path / "out")
    assert "VAE" in line or "not an autoencoder" in line
    assert not (tmp_path / "out").exists()


def test_vae_without_a_scale(capsys, images, vae, tmp_path):
    """Latents are normalised by what they themselves have: draws from the posteriors get mean 0 and std 1 in every channel."""
    own = with_config(vae, tmp_path / "vae", scaling_factor=None)
    stdout, _ = extract(capsys, images, own, tmp_path / "out", dtype="float32", batch_size=5)
    assert "gives no scale" in stdout
    about, moments = json.loads((tmp_path / "out/latents.json").read_text()), np.load(tmp_path / "out/moments.npy")
    mean, std = np.split(moments.astype(np.float64), 2, axis=1)
    z = mean + std * np.random.default_rng(0).normal(size=(500, *mean.shape))
    assert_allclose(about["shift"], z.mean((0, 1, 3, 4)), atol=0.01)
    assert_allclose(1 / np.array(about["scale"]), z.std((0, 1, 3, 4)), rtol=0.01)
    assert len(about["shift"]) == len(about["scale"]) == 4


def test_mirrored_images_and_stored_images(capsys, images, vae, tmp_path, expected_moments, one_thread):
    """--flip: a second half that encodes each crop mirrored. --store-images: the crops themselves, once, in the same order."""
    extract(capsys, images, vae, tmp_path / "out", "--flip", "--store-images", dtype="float32", batch_size=5)
    moments, stored = np.load(tmp_path / "out/moments.npy"), np.load(tmp_path / "out/images.npy")
    assert_array_equal(stored, crops(images).permute(0, 2, 3, 1))
    assert_allclose(moments[:12], expected_moments, rtol=1e-4, atol=1e-5)
    mirrored = encode(load_vae(str(vae)), crops(images).flip(3))
    assert_allclose(moments[12:], mirrored, rtol=1e-4, atol=1e-5)
    about = json.loads((tmp_path / "out/latents.json").read_text())
    assert about["flip"] and about["store_images"] and about["count"] == len(np.load(tmp_path / "out/labels.npy")) == 12
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images.npy", "labels.npy", "latents.json", "moments.npy"]
    extract(capsys, images, vae, tmp_path / "plain", dtype="float32")
    assert "flip is False there and True here" in refused(capsys, images, vae, tmp_path / "plain", "--flip", dtype="float32")


def test_two_processes_mirror_and_store_the_same_bytes(capsys, images, vae, tmp_path, one_thread):
    extract(capsys, images, vae, tmp_path / "one", "--flip", "--store-images", batch_size=5)
    process("extract_latents", *flags(images, vae, tmp_path / "two", batch_size=5), "--flip", "--store-images", processes=2)
    for name in ("moments.npy", "images.npy", "labels.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("size", [1, 2, 6, 10, 30, 33])
def test_image_size_that_the_vae_cannot_encode(capsys, images, vae, tmp_path, size):
    """One latent pixel of this VAE covers 4 x 4 pixels."""
    assert f"--image-size {size}" in refused(capsys, images, vae, tmp_path / "out", image_size=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error")
def test_latents_that_float16_cannot_hold(capsys, images, vae, tmp_path):
    loud = AutoencoderKL.from_pretrained(vae)
    loud.encoder.conv_out.weight.data *= 1e8
    loud.save_pretrained(tmp_path / "loud")
    assert "--dtype float32" in refused(capsys, images, tmp_path / "loud", tmp_path / "out")
    assert not (tmp_path / "out" / "latents.json").exists()
    extract(capsys, images, tmp_path / "loud", tmp_path / "out32", dtype="float32")


def test_impossible_output(capsys, images, vae, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "latents"):
        assert str(tmp_path / "file") in refused(capsys, images, vae, out)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_output(capsys, images, vae, tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in refused(capsys, images, vae, tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_damaged_latents_json(capsys, images, vae, tmp_path):
    (tmp_path / "latents.json").write_text('{"vae": ')
    assert "latents.json" in refused(capsys, images, vae, tmp_path)


@pytest.mark.parametrize("flag, value", [("image_size", 0), ("batch_size", "many"), ("dtype", "int8"),
                                         ("num_workers", -1), ("imags", "x"), ("num_worker", 1)])
def test_flags_out_of_range(capsys, images, vae, tmp_path, flag, value):
    assert f"--{flag.replace('_', '-')}" in refused(capsys, images, vae, tmp_path / "out", **{flag: value})
    assert not (tmp_path / "out").exists()
