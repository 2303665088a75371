"""What others trained, made readable: tests/convert_vae.py against LDM's autoencoder, written out by its
names of weights, and tests/export_encoder.py against the network itself."""

import json
import sys
from argparse import Namespace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import cli, message

import models
from extract_latents import encode, load_vae

CHANNELS, LATENT = (32, 32, 64), 6


class Ldm:
    """LDM's AutoencoderKL as formulas on its weights {name: tensor}."""

    def __init__(self, weights):
        self.w = weights

    def conv(self, name, x, **options):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)

    def attention(self, name, x):
        q, k, v = (self.conv(f"{name}.{part}", self.norm(f"{name}.norm", x)).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(dim=2)  # of each pixel's query
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def level(self, name, x):
        for j in range(3):
            if f"{name}.block.{j}.norm1.weight" in self.w:
                x = self.block(f"{name}.block.{j}", x)
            if f"{name}.attn.{j}.norm.weight" in self.w:
                x = self.attention(f"{name}.attn.{j}", x)
        return x

    def middle(self, name, x):
        x = self.attention(f"{name}.attn_1", self.block(f"{name}.block_1", x))
        return self.block(f"{name}.block_2", x)

    def end(self, name, x):
        return self.conv(f"{name}.conv_out", F.silu(self.norm(f"{name}.norm_out", x)), padding=1)

    def encode(self, images):
        """Mean and standard deviation of the posterior (B, 2C, h, w)."""
        x = self.conv("encoder.conv_in", images, padding=1)
        for i in range(len(CHANNELS)):
            x = self.level(f"encoder.down.{i}", x)
            if i < len(CHANNELS) - 1:
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        mean, logvar = self.conv("quant_conv", self.end("encoder", self.middle("encoder.mid", x))).chunk(2, 1)
        return torch.cat([mean, (0.5 * logvar).exp()], dim=1)

    def decode(self, z):
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1)
        x = self.middle("decoder.mid", x)
        for i in reversed(range(len(CHANNELS))):
            x = self.level(f"decoder.up.{i}", x)
            if i:
                x = self.conv(f"decoder.up.{i}.upsample.conv", F.interpolate(x, scale_factor=2), padding=1)
        return self.end("decoder", x)


def ldm_weights(attends_in=("encoder", "decoder")):
    """Random weights as LDM names and shapes them; attention at the lowest resolution as in VA-VAE."""
    torch.manual_seed(0)
    weights, top = {}, CHANNELS[-1]

    def conv(name, a, b, side=3):
        weights[f"{name}.weight"] = torch.randn(b, a, side, side) / (a * side**2) ** 0.5
        weights[f"{name}.bias"] = torch.randn(b) / 10

    def norm(name, width):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.rand(width) + 0.5, torch.randn(width) / 10

    def block(name, a, b):
        norm(f"{name}.norm1", a), conv(f"{name}.conv1", a, b), norm(f"{name}.norm2", b)
        conv(f"{name}.conv2", b, b)
        if a != b:
            conv(f"{name}.nin_shortcut", a, b, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    for part, way, ends, count in (("encoder", "down", (3, 2 * LATENT), 2),
                                   ("decoder", "up", (LATENT, 3), 3)):
        widths = (CHANNELS[0], *CHANNELS) if part == "encoder" else (*CHANNELS, top)
        conv(f"{part}.conv_in", ends[0], CHANNELS[0] if part == "encoder" else top)
        for i, width in enumerate(CHANNELS):
            before = widths[i] if part == "encoder" else widths[i + 1]
            for j in range(count):
                block(f"{part}.{way}.{i}.block.{j}", width if j else before, width)
                if i == len(CHANNELS) - 1 and part in attends_in:
                    attention(f"{part}.{way}.{i}.attn.{j}", width)
            if part == "encoder" and i < len(CHANNELS) - 1:
                conv(f"encoder.down.{i}.downsample.conv", width, width)
            if part == "decoder" and i:
                conv(f"decoder.up.{i}.upsample.conv", width, width)
        block(f"{part}.mid.block_1", top, top), attention(f"{part}.mid.attn_1", top)
        block(f"{part}.mid.block_2", top, top)
        last = top if part == "encoder" else CHANNELS[0]
        norm(f"{part}.norm_out", last), conv(f"{part}.conv_out", last, ends[1])
    conv("quant_conv", 2 * LATENT, 2 * LATENT, 1), conv("post_quant_conv", LATENT, LATENT, 1)
    return weights


MEAN, STD = torch.linspace(-2, 3, LATENT), torch.linspace(0.5, 4, LATENT)


def lightning_dit(folder):
    """VA-VAE: what trained it along, and a file of statistics."""
    others = {"loss.discriminator.main.0.weight": torch.zeros(2), "linear_proj.weight": torch.zeros(2),
              "foundation_model.model.encoder.conv_in.weight": torch.zeros(2)}
    torch.save({"mean": MEAN.view(1, -1, 1, 1), "std": STD.view(1, -1, 1, 1)}, folder / "latents_stats.pt")
    return {"state_dict": ldm_weights() | others, "global_step": 3}, ("--stats", folder / "latents_stats.pt")


def repa_e(folder):
    """A VAE of REPA-E: weights alone, and a file of statistics."""
    stats = {"latents_scale": 1 / STD.view(1, -1, 1, 1), "latents_bias": MEAN.view(1, -1, 1, 1)}
    torch.save(stats, folder / "vae-latents-stats.pt")
    return ldm_weights(attends_in=()), ("--stats", folder / "vae-latents-stats.pt")


def repa_e_training(folder):
    """A checkpoint of REPA-E's training: the VAE among others, the statistics in the EMA model's norm."""
    norm = {"bn.running_mean": MEAN, "bn.running_var": STD**2}
    return {"vae": ldm_weights(), "ema": norm, "model": {"encoder.conv_in.weight": MEAN},
            "args": Namespace(lr=1e-4), "discriminator": {}}, ()


def latent_diffusion(folder):
    """A whole latent diffusion model: the VAE by a prefix; attention in the encoder alone, as in MAR's."""
    weights = {f"first_stage_model.{name}": x for name, x in ldm_weights(("encoder",)).items()}
    torch.save({"mean": MEAN, "std": STD}, folder / "stats.pt")
    weights["model.diffusion_model.out.0.bias"] = MEAN
    return {"state_dict": weights}, ("--stats", folder / "stats.pt")


def convert(capsys, folder, checkpoint, *flags):
    torch.save(checkpoint, folder / "vae.pt")
    return cli(capsys, "convert_vae", folder / "vae.pt", "--out", folder / "vae", *flags)


@pytest.mark.parametrize("make", [lightning_dit, repa_e, repa_e_training, latent_diffusion])
def test_a_converted_vae_is_the_vae(capsys, images, tmp_path, make):
    """Encoder and decoder to rounding, and statistics that training takes."""
    checkpoint, flags = make(tmp_path)
    weights = checkpoint.get("vae", checkpoint.get("state_dict", checkpoint))
    status, said, err = convert(capsys, tmp_path, checkpoint, *flags)
    assert (status, said) == (0, f"{tmp_path / 'vae'}: {said.split(': ')[1]}"), err
    assert f"{LATENT} channels for 4 x 4 pixels" in said and not list(tmp_path.glob("*.partial"))
    ldm, vae = Ldm({name.removeprefix("first_stage_model."): x for name, x in weights.items()}), load_vae(
        str(tmp_path / "vae"))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = ldm.encode(pixels / 127.5 - 1)
    assert 0.05 < expected.std() < 50
    torch.testing.assert_close(encode(vae, pixels), expected, rtol=1e-4, atol=1e-5)
    z = torch.randn(2, LATENT, 8, 8)
    torch.testing.assert_close(vae.decode(z).sample, ldm.decode(z), rtol=1e-4, atol=1e-4)

    flags = ("--images", images, "--vae", tmp_path / "vae", "--image-size", 32, "--out", tmp_path / "set")
    assert cli(capsys, "extract_latents", *flags, "--num-workers", 1)[0] == 0
    about = json.loads((tmp_path / "set/latents.json").read_text())
    assert about["shift"] == pytest.approx(MEAN.tolist())
    assert about["scale"] == pytest.approx((1 / STD).tolist())


def test_measured_statistics(capsys, images, tmp_path):
    """Those of draws from the posteriors: x of the images has mean 0 and standard deviation 1."""
    flags = ("--images", images, "--image-size", 32)
    assert convert(capsys, tmp_path, ldm_weights(), *flags)[0] == 0
    flags += ("--vae", tmp_path / "vae", "--out", tmp_path / "set", "--num-workers", 1)
    assert cli(capsys, "extract_latents", *flags)[0] == 0
    about = json.loads((tmp_path / "set/latents.json").read_text())
    shift, scale = (np.reshape(about[key], (-1, 1, 1)) for key in ("shift", "scale"))
    mean, std = np.split(np.load(tmp_path / "set/moments.npy").astype(np.float64), 2, axis=1)
    mean, std = (mean - shift) * scale, std * scale
    np.testing.assert_allclose(mean.mean((0, 2, 3)), 0, atol=2e-3)
    np.testing.assert_allclose((mean**2 + std**2).mean((0, 2, 3)), 1, atol=2e-3)


def without(weights, name):
    return {key: x for key, x in weights.items() if key != name}


@pytest.mark.parametrize("change, flags, says", [
    (lambda w: {"model": w}, (), "no VAE of the LDM format"),
    (lambda w: without(w, "decoder.up.2.block.1.conv2.bias"), ("--stats", "STATS"),
     "up_blocks.0.resnets.1.conv2.bias"),
    (lambda w: w | {"encoder.extra.weight": torch.zeros(1)}, ("--stats", "STATS"), "encoder.extra.weight"),
    (lambda w: without(w, "encoder.down.0.block.0.conv1.weight"), (), "encoder.down.0.block.0.conv1.weight"),
    (lambda w: w | {"quant_conv.bias": torch.full((2 * LATENT,), torch.nan)}, (), "quant_conv.bias is not"),
    (lambda w: w, (), "no statistics of its latents; give --stats or --images"),
    (lambda w: w, ("--stats", "SHORT"), "SHORT gives no statistics of its latents: not 6 finite means"),
    (lambda w: w, ("--stats", "ZERO"), "standard deviations above 0"),
    (lambda w: w, ("--stats", "NAN"), "standard deviations above 0"),
    (lambda w: w, ("--stats", "vae.pt"), "no statistics of its latents"),
    (lambda w: w, ("--images", "IMAGES", "--image-size", 2), "IMAGES gives no statistics of its latents"),
    (lambda w: {"vae": w, "ema": None}, (), "no statistics of its latents; give"),
    (lambda w: {"vae": w, "ema": {"bn.running_mean": MEAN, "bn.running_var": MEAN}}, (), "above 0"),
    (lambda w: w | {f"decoder.conv_out.{name}": torch.zeros(4, *shape) for name, shape in
                    (("weight", (32, 3, 3)), ("bias", ()))}, (), "decodes to 4 channels, not 3"),
    (lambda w: {"vae": SimpleNamespace()}, (), "holds more than tensors"),
    (lambda w: w, ("--stats", "nowhere.pt"), "nowhere.pt"),
    (lambda w: w, ("--images", "nowhere"), "nowhere")])
def test_vaes_that_cannot_be_converted(capsys, images, monkeypatch, tmp_path, change, flags, says):
    monkeypatch.chdir(tmp_path)
    torch.save({"mean": MEAN, "std": STD}, "STATS")
    torch.save({"mean": MEAN[:4], "std": STD[:4]}, "SHORT")
    torch.save({"mean": MEAN, "std": 0 * STD}, "ZERO")
    torch.save({"mean": MEAN, "std": torch.where(STD > 2, torch.nan, STD)}, "NAN")
    (tmp_path / "IMAGES").symlink_to(images)
    status, _, err = convert(capsys, tmp_path, change(ldm_weights()), *flags)
    assert status == 2 and says in message(err) and not (tmp_path / "vae").exists(), err


def test_files_that_are_no_checkpoint_and_an_output_that_exists(capsys, tmp_path):
    (tmp_path / "vae.pt").write_bytes(b"no zip")
    status, _, err = cli(capsys, "convert_vae", tmp_path / "vae.pt", "--out", tmp_path / "vae")
    assert status == 2 and "vae.pt cannot be converted" in message(err)
    (tmp_path / "vae").mkdir()
    status, _, err = cli(capsys, "convert_vae", tmp_path / "vae.pt", "--out", tmp_path / "vae")
    assert status == 2 and "exists" in message(err)


class Network(torch.nn.Module):
    """In the place of transformers' networks, where that is not installed: 14 x 14 pixels to a token, after a
    class token, if it has one."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.dtype = kind, torch.float32
        self.config = SimpleNamespace(model_type=kind, patch_size=14, image_size=224)
        self.config_class = self.config
        self.conv = torch.nn.Conv2d(3, 8, 14, 14)
        self.embeddings = torch.nn.Module()
        self.embeddings.position_embeddings = torch.nn.Parameter(torch.randn(1, 1 + 37**2, 8))

    def to(self, dtype):
        self.dtype = dtype
        return super().to(dtype)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        if self.kind != "ijepa":
            tokens = F.pad(tokens, (0, 0, 1, 0))
        if self.kind == "dinov2":
            tokens = tokens + self.embeddings.position_embeddings
        return SimpleNamespace(last_hidden_state=tokens)


def small_networks():
    """{name of transformers' class: a small random network of it}, and where they are found by source."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    import transformers

    torch.manual_seed(0)
    return {
        "clip-l": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
            **sizes, intermediate_size=64, image_size=224)),
        "i-jepa-h": transformers.IJepaModel(transformers.IJepaConfig(
            **sizes, intermediate_size=64, image_size=224)),
        "dinov2-l": transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=2, image_size=518))}


@pytest.fixture(params=["imitated", "real"])
def source(request, monkeypatch, tmp_path):
    """A function: encoder -> (what --source takes, its network)."""
    if request.param == "real":
        pytest.importorskip("transformers")
        return lambda name: (tmp_path / name, save(small_networks()[name].eval(), tmp_path / name))
    kinds = {"CLIPVisionModel": "clip_vision_model", "IJepaModel": "ijepa", "Dinov2Model": "dinov2"}
    module = MagicMock()
    for name, kind in kinds.items():
        def load(folder, output_loading_info, kind=kind):
            assert folder == "somewhere" and output_loading_info
            return Network(kind), {"missing_keys": set()}
        setattr(module, name, SimpleNamespace(from_pretrained=load))
    monkeypatch.setitem(sys.modules, "transformers", module)
    names = {"clip-l": "clip_vision_model", "i-jepa-h": "ijepa", "dinov2-l": "dinov2"}
    return lambda name: ("somewhere", Network(names[name]))


def save(network, folder):
    network.save_pretrained(folder)
    return network


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.mark.parametrize("name, statistics, extra", [
    ("clip-l", CLIP, 1), ("i-jepa-h", IMAGENET, 0), ("dinov2-l", IMAGENET, 1)])
def test_exported_encoders(capsys, source, tmp_path, name, statistics, extra):
    """What --repa-encoder takes: images resized and normalised as in REPA, and the tokens of the patches."""
    where, network = source(name)
    images = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    x = (F.interpolate(images / 255, (224, 224), mode="bicubic") - mean) / std
    if name == "dinov2-l":  # REPA resamples the table of positions, with antialias; the class token's stays
        table = network.embeddings.position_embeddings.detach()
        grid = table[0, 1:].T.reshape(1, -1, 37, 37)
        grid = F.interpolate(grid, (16, 16), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        network.embeddings.position_embeddings.data = torch.cat([table[:, :1], grid], dim=1)
    with torch.no_grad():
        expected = network(x).last_hidden_state[:, extra:]
    for precision, off in (("fp32", 1e-4), ("bf16", 0.1)):
        out = tmp_path / f"{precision}.pt2"
        flags = (name, "--source", where, "--out", out, "--precision", precision)
        status, said, err = cli(capsys, "export_encoder", *flags)
        assert status == 0 and f"{out}: 256 tokens of {expected.shape[2]} numbers" in said, err
        encoder = models.load_encoder(str(out), 256)
        assert (encoder.side, encoder.dim) == (16, expected.shape[2])
        torch.testing.assert_close(encoder(images).float(), expected, rtol=off, atol=off)


@pytest.mark.parametrize("flags, says", [
    (("clip-l", "--out", "a.pt"), ".pt2"), (("clip-l", "--out", "here.pt2"), "not exist"),
    (("vit", "--out", "a.pt2"), "vit"),
    (("clip-l", "--out", "a.pt2", "--image-size", 512), "224 pixels, not 7/8 of 512"),
    (("dinov2-b", "--out", "a.pt2", "--image-size", 250), "7/8 of 250 pixels is not a multiple of 14")])
def test_encoders_that_are_refused(capsys, source, monkeypatch, tmp_path, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.pt2").write_text("somebody's")
    where, _ = source({"dinov2-b": "dinov2-l"}.get(flags[0], "clip-l"))
    status, _, err = cli(capsys, "export_encoder", *flags, "--source", where)
    assert status == 2 and says in message(err), err
    assert [path.read_text() for path in tmp_path.glob("*.pt2")] == ["somebody's"]


def test_transformers_that_are_not_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = cli(capsys, "export_encoder", "clip-l", "--out", tmp_path / "a.pt2")
    assert status == 2 and "pip install transformers" in message(err)
