"""sample.py: samplers against a field whose flow is known and REPA's formulas, images against the samplers.

No batch size, number of processes, kill or other command changes an image or an output, the EMA weights of
our own and of published checkpoints sample, and bad input is one sentence.
"""

import argparse
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import Killed, cli, message, process
from PIL import Image

import sample
from extract_latents import content_id, load_vae
from models import SiT_models
from sample import guided_velocity, load_model, sample_ode, sample_sde, to_bf16

pytestmark = pytest.mark.usefixtures("all_on_one_thread")
NULL, Y = 12, torch.tensor([3, 5])  # 12 classes


# ---- samplers, in float64, for data N(mean, std^2): v = E[noise - x | x_t] is linear in x_t


def field(x, t, mean=1.5, std=0.4):
    variance = (1 - t) ** 2 * std**2 + t**2
    return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)


class Exact:
    """The field of the labels' data; the null class's is another. It notes t and labels of each call."""

    null_class = NULL

    def __init__(self):
        self.times, self.labels = [], []

    def __call__(self, x, t, y):
        self.times.append(float(t[0]))
        self.labels.append(y.tolist())
        t, null = t.view(-1, 1, 1, 1), (y == NULL).view(-1, 1, 1, 1)
        return torch.where(null, field(x, t, -0.5, 0.8), field(x, t))


def generators(count=2):
    return [torch.Generator().manual_seed(7 + i) for i in range(count)]


Z = torch.stack([torch.randn(4, 8, 8, generator=g, dtype=torch.float64) for g in generators()])


def test_euler_is_of_first_order():
    """Against the exact flow, from z at t = 1 to mean + std z at t = 0; 250 steps are the default."""
    coarse, fine, finest = ((sample_ode(Exact(), Z, Y, **steps) - (1.5 + 0.4 * Z)).abs().max().item()
                            for steps in ({"num_steps": 62}, {"num_steps": 125}, {}))
    assert coarse / fine == pytest.approx(125 / 62, rel=0.1) and fine / finest == pytest.approx(2, rel=0.1)
    assert 1e-4 < finest < 0.02


def repa_euler_maruyama(model, x, y, num_steps, generators, cfg_scale, low, high):
    """REPA's sampler, step by step: guidance on the drift, noise in all steps but the last."""
    t_steps = [1 - (1 - 0.04) * i / (num_steps - 1) for i in range(num_steps)] + [0.0]
    for i, (t_cur, t_next) in enumerate(zip(t_steps[:-1], t_steps[1:])):
        drifts = []
        for labels in (y, torch.full_like(y, NULL)):
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
def test_sde_equals_repa(scale, low, high):
    options = {"cfg_scale": scale, "guidance_interval": (low, high), "generators": generators()}
    expected = repa_euler_maruyama(Exact(), Z, Y, 250, generators(), scale, low, high)
    torch.testing.assert_close(sample_sde(Exact(), Z, Y, **options), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", [sample_ode, sample_sde])  # 25 steps from 1 reach 0.04 in both
@pytest.mark.parametrize("low, high", [(0.04, 0.52), (0.52, 0.52), (0.53, 0.55), (0.0, 1.0)])
def test_guidance(sampler, low, high):
    """v0 + s (v - v0) at times inside the interval, edges included; no null class outside, or at scale 1."""
    model, times = Exact(), np.linspace(1, 0.04, 25)
    options = {"num_steps": 25, "guidance_interval": (low, high)}
    sampler(model, Z, Y, cfg_scale=1.0, **options)
    assert model.labels == [[3, 5]] * 25
    np.testing.assert_allclose(model.times, times, rtol=1e-12)
    sampler(model, Z, Y, cfg_scale=1.5, **options)
    guided = [low <= t <= high for t in times.round(9)]
    assert model.labels[25:] == [[3, 5, NULL, NULL] if each else [3, 5] for each in guided]
    v, null = guided_velocity(model, Z, 0.54, Y, 2.5, (0.5, 0.6)), field(Z, 0.54, -0.5, 0.8)
    torch.testing.assert_close(v, null + 2.5 * (field(Z, 0.54) - null), rtol=1e-12, atol=1e-12)


# ---- one stream per image, with a model whose output depends on x, t and y


def lively(name="SiT-Ti/4", num_classes=NULL, latent=8, seed=0, **head):
    """A SiT all of whose parameters are random, those that start at zero too."""
    torch.manual_seed(seed)
    model = SiT_models[name](input_size=latent, num_classes=num_classes, **head).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    torch.nn.init.normal_(model.y_embedder.embedding_table.weight)
    return model


def settings_for(vae="x", model="SiT-Ti/4", num_classes=NULL, latent=8, **others):
    data = {"vae": str(vae), "shift": 0.25, "scale": 0.5, "num_classes": num_classes}
    return {"model": model, "data": {**data, "latent_shape": [4, latent, latent]}, **others}


@pytest.fixture(scope="module")
def tiny(vae, tmp_path_factory):
    """A checkpoint of a lively SiT-Ti/4; it also holds a model, whose weights differ."""
    path = tmp_path_factory.mktemp("tiny") / "0000007.pt"
    torch.save({"model": lively(seed=1).state_dict(), "ema": lively().state_dict(), "opt": {}, "step": 7,
                "settings": settings_for(vae)}, path)
    return path


def stream(seed, i):
    """The stream of image i, from its definition; earlier outputs can go on only if it stays as it is."""
    base = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed((base + i) % 2**63)


def drawn(ckpt, y, seed=0, vae=None, mode="sde", **options):
    """Images of classes y in 4 steps, from their definition: noise first, then the steps, from the stream of
    each; z = x / scale + shift, decoded and rounded."""
    (model, settings), streams = load_model(ckpt), [stream(seed, i) for i in range(len(y))]
    x, data = torch.stack([torch.randn(4, 8, 8, generator=g) for g in streams]), settings["data"]
    if mode == "sde":
        x = sample_sde(model, x, torch.tensor(y), 4, generators=streams, **options)
    else:
        x = sample_ode(model, x, torch.tensor(y), 4, **options)
    with torch.no_grad():
        pixels = load_vae(vae or data["vae"]).decode(x / data["scale"] + data["shift"]).sample
    return torch.floor((pixels + 1) * 127.5 + 0.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()


def close(a, b):
    """Equal to one grey level, and nearly all the same."""
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1 and (a == b).mean() > 0.999


def test_streams():
    """Different for any two (seed, index), near or far; train.py's seeds are lists."""
    pairs = [(seed, i) for seed in (0, 1, 2, 2**40, [0, 1], [1, 1], [1, 2]) for i in range(50)]
    starts = [torch.randn(4, generator=sample.rng(*pair, "cpu")).tolist() for pair in pairs]
    assert len(set(map(tuple, starts))) == len(pairs)
    assert starts == [torch.randn(4, generator=stream(*pair)).tolist() for pair in pairs]


def test_bf16(tiny):
    """Weights kept in bf16 or rounded by autocast in every call: the same bits. All else is in float32."""
    for sampler in (lambda *args: sample_sde(*args, generators()), sample_ode):
        model, latents = load_model(tiny)[0], []
        wide = torch.nn.Module()
        wide.forward, wide.null_class = lambda *args: model(*args).float(), NULL
        for each, bf16 in ((model, False), (wide, False), (model, True)):
            if bf16:
                to_bf16(model)
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(sampler(each, Z.float(), Y, 3, 2.0, (0.0, 0.7)))
        assert model.blocks[0].mlp.fc1.weight.dtype == model.final_layer.linear.weight.dtype == torch.bfloat16
        assert all(x.dtype == torch.float32 and torch.equal(x, latents[0]) for x in latents)


# ---- the command line


@pytest.fixture
def run(capsys, tiny, tmp_path):
    """Draws, and returns the pixels that lie at `out`; or is refused with one sentence, and no file more."""
    def run(*args, out="out.npz", ckpt=tiny, refused=None):
        before, out = sorted(tmp_path.rglob("*")), tmp_path / out
        status, stdout, err = cli(capsys, "sample", "--ckpt", ckpt, "--num-steps", 4, "--out", out, *args)
        if refused:
            said = message(err)
            assert status == 2 and said.startswith("sample.py: error: ") and refused in said, said
            assert sorted(tmp_path.rglob("*")) == before
            return None
        assert status == 0 and str(out) in stdout.split(), err
        return read(out)
    return run


def read(path):
    """Images of 32 x 32 pixels (N, 32, 32, 3), of a grid row by row."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            assert file.files == ["arr_0"]
            return file["arr_0"]
    with Image.open(path) as image:
        grid = np.asarray(image)
    return grid.reshape(len(grid) // 32, 32, -1, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)


def random_labels(count, seed=0):
    return [int(np.random.default_rng([seed, i]).integers(NULL)) for i in range(count)]


def test_npz(run, tiny, tmp_path):
    """arr_0 is uint8 NHWC; row i is image i of the seed, of a class that depends on (seed, i), however many
    rows, processes and images per batch there are; or every class equally often. bf16 differs a little."""
    flags = ("--num-samples", 10, "--num-steps", 4, "--batch-size", 3, "--out", tmp_path / "two.npz")
    with ThreadPoolExecutor() as beside:
        two = beside.submit(process, "sample", "--ckpt", tiny, *flags, processes=2)
        other = run("--num-samples", 4, "--seed", 1, out="seed.npz")
        even = run("--num-samples", NULL + 2, "--class-balanced", "--batch-size", 5, out="even.npz")
        rounded = run("--num-samples", 4, "--precision", "bf16", out="bf16.npz")
    assert two.result().returncode == 0
    written = {f"{name}.npz{more}" for name in ("two", "seed", "even", "bf16") for more in ("", ".json")}
    assert {path.name for path in tmp_path.iterdir()} == written
    images = read(tmp_path / "two.npz")
    assert images.dtype == np.uint8 and close(images, drawn(tiny, random_labels(10)))
    assert close(other, drawn(tiny, random_labels(4, seed=1), seed=1))
    assert (np.abs(other.astype(int)[:, None] - images).mean(axis=(2, 3, 4)) > 3).all()  # none is any other
    assert close(even, drawn(tiny, [*range(NULL), 0, 1]))
    assert 0 < np.abs(rounded.astype(int) - images[:4]).mean() < 3  # grey levels


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_grid_and_npz_hold_the_same_pixels(run, tiny, tmp_path, mode):
    """A row of the grid per class; the sampler gets its flags."""
    flags = ("--classes", 3, 9, "--per-class", 3, "--mode", mode, "--cfg-scale", 3)
    images = run(*flags, "--guidance-interval", 0.2, 0.8)
    guided = {"mode": mode, "cfg_scale": 3.0, "guidance_interval": (0.2, 0.8)}
    assert close(images, drawn(tiny, [3, 3, 3, 9, 9, 9], **guided))
    assert np.array_equal(run(*flags, "--guidance-interval", 0.2, 0.8, out="grid.png"), images)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 32, 2 * 32)


def test_default_outputs_and_records(capsys, run, tiny, vae, tmp_path):
    """Beside the checkpoint: a grid of 10 classes, evenly spaced, or random ones, the rest of a row black;
    beside each what it was made with, in full; the classes of a grid are named."""
    ckpt, classes = shutil.copy(tiny, tmp_path / "run.pt"), [0, 1, 2, 3, 4, 6, 7, 8, 9, 11]
    record = {"ckpt": str(ckpt), "ckpt_content": content_id(ckpt), "step": 7, "vae": str(vae),
              "vae_content": content_id(vae), "seed": 0, "classes": classes, "per_class": 8,
              "num_samples": None, "class_balanced": False, "mode": "sde", "num_steps": 4, "cfg_scale": 1.0,
              "guidance_interval": [0, 1], "precision": "fp32"}
    for name, flags, changed in (
            ("run_num-steps-4.png", (), {}),
            ("run_num-samples-1_num-steps-4.npz", ("--num-samples", 1), {"classes": None, "num_samples": 1})):
        assert cli(capsys, "sample", "--ckpt", ckpt, "--num-steps", 4, *flags)[0] == 0
        assert json.loads((tmp_path / f"{name}.json").read_text()) == {**record, **changed}
    assert close(read(tmp_path / "run_num-steps-4.png"), drawn(tiny, np.repeat(classes, 8)))
    assert len(read(tmp_path / name)) == 1
    grid = run("--num-samples", 5, "--per-class", 3, out="random.png")
    assert close(grid[:5], drawn(tiny, random_labels(5))) and len(grid) == 6 and not grid[5].any()


def test_another_vae(run, tiny, vae, tmp_path):
    """--vae replaces the decoder; shift and scale stay those of the latents the model was trained on."""
    other = load_vae(str(vae))
    other.decoder.conv_out.bias.data += 0.2
    other.register_to_config(scaling_factor=7.0, shift_factor=3.0)
    other.save_pretrained(tmp_path / "vae")
    images = run("--classes", 1, 2, "--per-class", 2, "--vae", tmp_path / "vae")
    assert close(images, drawn(tiny, [1, 1, 2, 2], vae=tmp_path / "vae"))


def test_compiled_samples_are_the_same(run, monkeypatch):
    """Every block, for each size of batch: guided or not, and the short one at the end; not for grids. By a
    quick compiler: in test_train.py the real one compiles these layers."""
    layers, real = [], torch.nn.Module.compile

    def compile(layer, **how):
        layers.append((type(layer).__name__, how))
        real(layer, **how, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    flags = ("--num-samples", 5, "--batch-size", 3, "--cfg-scale", 2, "--guidance-interval", 0, 0.5)
    images = run(*flags, "--compile")
    run("--classes", 1, "--per-class", 1, "--compile", out="grid.png")
    assert layers == [(name, {"dynamic": False}) for name in 6 * ["SiTBlock"] + ["FinalLayer"]]
    assert close(images, run(*flags, "--no-compile", out="eager.npz"))


# ---- outputs that are there, and those that a kill left


@pytest.mark.parametrize("name, call, after, size", [
    ("a.png", "fsync", 13, 2), ("a.npz", "fsync", 14, 5), ("a.npz", "replace", 4, 2)])
def test_killed_it_continues(run, tmp_path, monkeypatch, name, call, after, size):
    """Wherever it dies, the same command draws what is missing and no more, and gives the same bytes; one of
    another batch size may draw more.

    fsync 13 and 14 follow the folder, two arrays and settings.json with their names, three batches, and the
    fourth's images or all of it; replace 4 those files and the record, and would give the result its name.
    """
    out, args = tmp_path / name, ("--classes", 1, 2, "--per-class", 6, "--batch-size")
    run(*args, 2, out=f"whole-{name}")
    real, left, rows = getattr(os, call), list(range(after)), []

    def dying(*args):
        if not left:
            raise Killed
        left.pop()
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, call, dying)
        run(*args, 2, out=name)
    done = np.flatnonzero(np.load(f"{out}.partial/done-0.npy")).tolist()
    assert done and not out.exists()
    run(*args, 2, "--seed", 1, out=name, refused="seed is 0 there and 1 here")
    draw = sample.sample_images
    monkeypatch.setattr(sample, "sample_images", lambda *a, **b: (rows.extend(a[3]), draw(*a, **b))[1])
    run(*args, size, out=name)
    assert sorted(rows + done) == list(range(12)) or size == 5
    assert out.read_bytes() == (tmp_path / f"whole-{name}").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("a.*")) == [name, f"{name}.json"]


def test_rows_that_are_not_there(capsys, tiny, tmp_path, monkeypatch):
    """No file, but a sentence; nor one in the place of what another process has made meanwhile."""
    out, real = tmp_path / "a.npz", sample.load_decoder
    command = ("sample", "--ckpt", tiny, "--num-samples", 3, "--num-steps", 2, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(sample.ResumableArrays, "write", lambda *args, **values: None)
        assert "a.npz.partial still lacks 3 row(s)" in message(cli(capsys, *command)[2])
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(sample, "load_decoder", lambda *args: out.write_text("its") and real(*args))
        assert "another process has just made" in message(cli(capsys, *command)[2])
    assert out.read_text() == "its"


def test_finished_output(run, tmp_path, monkeypatch):
    """The same command again does nothing; other settings are named; both leave it as it is."""
    args = ("--classes", 1, 2, "--per-class", 2)
    run(*args)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    monkeypatch.setattr(sample, "sample_images", None)
    run(*args, "--batch-size", 3, "--compile")  # they change no image
    for other, says in (("--seed 3", "seed is 0 there and 3 here"), ("--vae x", "and 'x' here"),
                        ("--classes 1 1 2 2 --per-class 1", "per_class is 2 there")):
        run(*args, *other.split(), refused=says)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


# ---- checkpoints


def same_weights(model, expected):
    loaded = model.state_dict()
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[k], v) for k, v in expected.items())


def test_checkpoints_of_train(run, checkpoint, tiny):
    """EMA weights sample, without the head, with the class count, VAE, shift and scale of training."""
    model, settings = load_model(tiny)
    assert same_weights(model, lively().state_dict()) and not model.training and settings["step"] == 7
    ema = torch.load(checkpoint, weights_only=True)["ema"]
    model, settings = load_model(checkpoint)
    assert any(k.startswith("heads.vae_repa") for k in ema)
    assert same_weights(model, {k: v for k, v in ema.items() if not k.startswith("heads.")})
    assert model.null_class == 3 and (settings["data"]["shift"], settings["data"]["scale"]) == (0.25, 0.5)
    images = run("--classes", 0, 2, "--per-class", 2, ckpt=checkpoint)
    assert close(images, drawn(checkpoint, [0, 0, 2, 2]))


@pytest.mark.parametrize("name, classes, latent, head", [
    ("SiT-S/8", 7, 16, "projectors.0.0.weight"), ("SiT-Ti/1", 1000, 8, "ap_head.2.bias"),
    ("SiT-Ti/2", 5, 8, None)])
def test_published_checkpoints(tmp_path, name, classes, latent, head):
    """Model, class count and latent size are read off the weights, less REPA's or SRA's head's, or off a bare
    state dict, whose halves become float32."""
    model, ckpt = lively(name, classes, latent).half().float(), tmp_path / "published.pt"
    weights = model.state_dict()
    torch.save({"model": {key: 0 * value for key, value in weights.items()},
                "ema": {**weights, head: torch.ones(3)}, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
                "args": argparse.Namespace(model="SiT-S/8", cfg_prob=0.1), "steps": 400000} if head else
               {key: value.half() for key, value in weights.items()}, ckpt)
    loaded, settings = load_model(ckpt)
    data = {"vae": "stabilityai/sd-vae-ft-ema", "latent_shape": [4, latent, latent], "shift": 0.0,
            "scale": 0.18215, "num_classes": classes}
    assert same_weights(loaded, weights) and settings == {"model": name, "data": data, "step": None}


# ---- bad input


def test_no_checkpoint(run, tiny, tmp_path):
    """Refused by its name, and so is what holds more than tensors and numbers, which could be code."""
    path, whole, weights = tmp_path / "other.pt", tiny.read_bytes(), lively().state_dict()
    fit = {"ema": weights, "settings": settings_for()}
    run(ckpt=path, refused="other.pt is no checkpoint")
    for content in [b"none", whole[: len(whole) // 2], pickle.dumps([path]), {**fit, "opt": path}, [1, 2], {},
                    {"ema": 5}, {**fit, "settings": 3}, {**fit, "ema": {**weights, "extra": torch.ones(1)}},
                    *({**fit, "settings": settings_for(**other)} for other in (
                        {"model": "SiT-S/4"}, {"model": "SiT-Z/4"}, {"num_classes": 11}, {"latent": 9},
                        {"data": {}})),
                    *({**about, "ema": {k: v for k, v in weights.items() if not k.startswith(less)}}
                      for less, about in (("blocks.5", {}), ("final", {}), ("blocks.5.mlp", fit)))]:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        run(ckpt=path, refused="other.pt is no checkpoint")


@pytest.mark.parametrize("flags, says", [
    ("--cfg-scale 0.9", "at least 1"), ("--cfg-scale nan", "at least 1"), ("--cfg-scale inf", "finite"),
    ("--guidance-interval 0.7 0", "[0.7, 0.0]"), ("--guidance-interval -0.1 1", "fraction"),
    ("--classes 1 --num-samples 3", "--num-samples"), ("--class-balanced", "--class-balanced"),
    ("--seed -1", "nonnegative_int"), ("--num-samples 0", "positive_int"), ("--num-steps 0", "positive_int"),
    ("--per-class 0", "positive_int"), ("--batch-size 0", "positive_int"), ("--mode dopri5", "--mode"),
    ("--vae /nonexistent", "/nonexistent"), ("--classes 12", "0 to 11"), ("--classes -1 3", "0 to 11"),
    ("--cfg 2", "--cfg"), ("--out folder", ".png")])
def test_flags_out_of_range(run, flags, says):
    run(*flags.split(), refused=says)


def test_what_surrounds_a_checkpoint(run, vae, tmp_path):
    """No null class to guide with; a VAE of other channels."""
    unguided, decoder = tmp_path / "unguided.pt", load_vae(str(vae))
    torch.save({"ema": lively().state_dict(), "settings": settings_for(vae, label_dropout=0)}, unguided)
    type(decoder).from_config({**decoder.config, "latent_channels": 16}).save_pretrained(tmp_path / "wide")
    run("--cfg-scale", 2, ckpt=unguided, refused="label-dropout")
    run("--vae", tmp_path / "wide", refused="cannot decode latents of [4, 8, 8]")
