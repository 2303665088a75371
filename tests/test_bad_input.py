"""Bad, odd and broken input: each command says one sentence that names the thing, with exit status 2; it runs
no code, leaves every file of the user's as it was, and nothing half-written under a final name.

Also: contents that changed under one name; what must not matter (closed streams, names that are no text, a
log torn by a full disk); and two commands that would write one output.
"""

import contextlib
import io
import itertools
import json
import os
import pickle
import resource
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import demo
import numpy as np
import pytest
import torch
from conftest import DETECTOR, ROOT, TINY, Killed, cli, message
from export_encoder import export
from PIL import Image
from safetensors.torch import load_file, save_file
from test_faults import family, gone, started, wait_until
from test_train import load, log

import extract_latents
from extract_latents import Latents

pytestmark = pytest.mark.usefixtures("all_on_one_thread")


class Code:
    """Unpickling it creates a file."""

    def __reduce__(self):
        return open, ("ran", "w")


def packed(save):
    """What save(file) writes."""
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def copy(source):
    return partial(shutil.copy, source)


def array(change):
    """The array, saved again, changed."""
    return lambda path: np.save(path, change(np.load(path)))


def keys(**changes):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def torch_file(source, *keys, **changes):
    """A good file of torch, whose dictionary, or that at the keys, is changed."""
    def save(path):
        found = inner = load(source)
        for key in keys:
            inner = inner[key]
        inner.update(changes)
        torch.save(found, path)
    return save


def bomb(path):
    """A PNG of 400 megapixels, in few bytes."""
    Image.new("1", (20000, 20000)).save(path)


def flipped(share):
    """One bit turned, in the largest part of a zip."""
    def flip(path):
        with zipfile.ZipFile(path) as archive:
            part = max(archive.infolist(), key=lambda part: part.file_size)
        data = bytearray(path.read_bytes())
        start = part.header_offset + 30 + sum(struct.unpack_from("<HH", data, part.header_offset + 26))
        data[start + int(share * part.compress_size)] ^= 0x40
        path.write_bytes(data)
    return flip


def then(*changes):
    return lambda path: [put(path, change) for change in changes]


def vae_file(change):
    """The VAE's file, with its dictionary of tensors changed."""
    def save(path):
        tensors = {name: x.clone() for name, x in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
    return save


def without(*parts):
    """The VAE's file without the tensors whose names begin with these."""
    return vae_file(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(parts)])


def renamed(old, new):
    return vae_file(lambda tensors: tensors.update({new: tensors.pop(old)}))


def scaled(name, factor):
    return vae_file(lambda tensors: tensors[name].mul_(factor).add_(factor))


def averaged(name, value):
    """The checkpoint with one of its EMA weights replaced by value(it)."""
    def save(path):
        found = load("model.pt")
        found["ema"][name] = value(found["ema"][name])
        torch.save(found, path)
    return save


def link(to):
    return lambda path: path.symlink_to(to)


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def unix_socket(path):
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as it:
        it.bind(str(path))


def picture(kind, size=(40, 36)):
    return lambda path: Image.new("RGB", size).save(path, kind)


def archive(**arrays):
    """An .npz of 12 images and these arrays."""
    return lambda path: np.savez(path, arr_0=np.zeros((12, 32, 32, 3), np.uint8), **arrays)


def blank(height, width):
    return lambda path: np.savez(path, np.zeros((8, height, width, 3), np.uint8))


def npz_that_lies(rows, shape):
    """Whose first member's header tells of more images than it holds; another member follows."""
    def save(path):
        text = packed(lambda file: np.save(file, np.zeros((rows, 32, 32, 3), np.uint8)))
        told, real = (f"({count}, ".encode() for count in (shape, rows))
        with zipfile.ZipFile(path, "w") as it:
            it.writestr("arr_0.npy", text.replace(real, told, 1))
            it.writestr("other.npy", bytes(10**6))
    return save


class Tokens(torch.nn.Module):
    def __init__(self, scale=1):
        super().__init__()
        self.register_buffer("scale", torch.full((), float(scale)))

    def forward(self, images):
        return self.scale * images.reshape(images.shape[0], 4, -1)


def encoder(count):
    """A program that takes so many images and no others."""
    example = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    return lambda path: torch.export.save(torch.export.export(Tokens(), (example,)), path)


FOLDER, GONE = object(), object()
CODE, TORCH_CODE = pickle.dumps([Code()]), packed(partial(torch.save, {"ema": {}, "opt": Code()}))
ARRAY_CODE = packed(lambda file: np.save(file, np.array([Code()] * 12, object)))

M, L, A = "latents/moments.npy", "latents/labels.npy", "latents/latents.json"
STATE, IMAGE, OUT, X = "out/run/state.pt", "images/class0/00.png", "out/a.npz", "out/latents.partial/"
VAE = "vae/diffusion_pytorch_model"
V, C, REF = f"{VAE}.safetensors", "vae/config.json", "x.npz"
CODE_VAE = {f"{VAE}.safetensors": [GONE], f"{VAE}.bin": [TORCH_CODE]}
FACTS = [torch_file("model.pt", "settings", "data", **{key: [3, "x"]})
         for key in ("vae", "shift", "latent_shape")]
TRAINED = "--lr 1e-3 --max-steps 6"  # as state.pt was
BAD = [  # command and flags, what the sentence says, {file: what is put there, a case each}, largest file;
    # "killed": it was, before, with its good input; NAME=value: in the environment
    ("train", "python tests/demo.py", {"latents": ["x", GONE]}),
    ("train", "patch size 4", {M: [array(lambda x: x[:, :, :6, :6])]}),
    ("train", "cannot be used", {M: [
        FOLDER, ARRAY_CODE, array(np.float64), array(np.asfortranarray), array(lambda x: x[:, :, :4]),
        array(lambda x: x[:, :7]), array(lambda x: x[1:])]}),
    ("train", "not finite at step 1", {M: [array(lambda x: x * np.nan), array(lambda x: x * np.inf)]}),
    ("train", "cannot be used", {L: [copy(M), CODE, array(lambda x: x * np.nan), array(lambda x: x - 1)]}),
    ("train", "cannot be used", {A: [
        FOLDER, "[" * 100_000, '{"vae": "x", "shift": 0, "num_classes": 3}', keys(num_classes=3.0),
        keys(num_classes=2), keys(shift=float("nan")), keys(scale=0), keys(scale=[1, 2, 3])]}),
    ("train --vae-repa-weight 0", "cannot be used", {A: [keys(vae=[3]), keys(vae=None)]}),
    ("train", "run", {"out/run": ["x"]}),
    ("train", "checkpoints", {"out/run/checkpoints": ["x"]}),
    ("train", "log.jsonl", {"out/run/log.jsonl": [FOLDER]}),
    ("train", "settings.json", {"out/run/settings.json": ["[1]", '{"model": 3}']}),
    ("train", "state.pt", {STATE: [
        TORCH_CODE, CODE, FOLDER, lambda path: torch.save(torch.ones(3), path), copy("model.pt"),
        *(torch_file("state.pt", **{key: {}}) for key in ("step", "model", "ema", "opt"))]}),
    ("train --state-every 0", "--state-every", {}),
    ("train --lr inf", "not finite", {}),
    ("sample --ckpt samples.npz", "samples.npz", {}),
    ("sample --ckpt detector.pt2", "detector.pt2", {}),
    ("sample", "model.pt", {"model.pt": [TORCH_CODE, FACTS[0], FACTS[2]]}),
    ("sample", "VAE", {"model.pt": FACTS[1:2]}),
    ("sample --vae vae", "VAE", CODE_VAE),
    ("sample --vae model.pt", "model.pt", {}),
    ("sample", "a.npz.json", {OUT: ["x"], OUT + ".json": ["[]", FOLDER]}),
    ("killed sample", "a.npz.partial/settings.json", {OUT + ".partial/settings.json": ["3"]}),
    ("killed sample", "a.npz.partial is damaged", {OUT + ".partial/images.npy": [GONE]}),
    ("extract_latents", IMAGE, {IMAGE: [bomb, CODE]}),
    ("extract_latents", "--vae vae", CODE_VAE),
    ("extract_latents", "vae", {"vae/config.json": ["[1]", keys(scaling_factor="x")]}),
    ("extract_latents", "latents.json", {"out/latents/latents.json": [FOLDER]}),
    ("killed extract_latents", "latents.partial is damaged", {X + "done-0.npy": [b"", ARRAY_CODE]}),
    ("killed extract_latents", "latents.partial is damaged", {
        X + "moments.npy": [lambda path: os.truncate(path, 999)]}),
    ("killed extract_latents", "settings.json", {X + "settings.json": ["[]"]}),
    ("fid --ref x.npz", "x.npz", {"x.npz": [copy("model.pt")]}),
    ("fid --ref latents/labels.npy", "labels.npy", {}),
    ("fid --ref images", "00.png", {IMAGE: [bomb]}),
    ("fid --detector model.pt", "model.pt", {}),
    ("fid --json out/a.json", "a.json", {"out/a.json": [FOLDER]}),
    ("fid_stats", "b.npz", {"out/b.npz": [FOLDER]}),
    ("train", "0000003.pt: cannot be written, is the disk full?", {}, 1_000_000),
    ("train --lr 1e-3 --max-steps 6 --state-every 5", "state.pt: cannot be written, is the disk full?",
     {STATE: [copy("state.pt")]}, 20_000_000),
    ("train", "settings.json: cannot be written, is the disk full?", {}, 100),
    ("sample", "a.npz: cannot be written, is the disk full?", {}, 12_450),
    ("sample", "out/a.npz.partial/images.npy: cannot be written, is the disk full?", {}, 5_000),
    ("extract_latents", "out/latents.partial/moments.npy: cannot be written, is the disk full?", {}, 5_000),
    ("fid_stats", "b.npz: cannot be written, is the disk full?", {}, 30_000),
    ("fid --json out/a.json", "a.json: cannot be written, is the disk full?", {}, 100),
    # empty words, as variables give that are not set
    *((command, "an argument is empty", {}) for command in (
        "fid --detector ''", "fid --json=", "fid_stats --weights ' '", "sample --out ''", "sample --ckpt=",
        "train --data ''", "train --run-dir= ", "train --wandb ''", "extract_latents --images ''")),
    # outputs that are something else's
    ("fid --json detector.pt2", "detector.pt2", {}),
    ("fid --json a.json", "a.json", {"a.json": ['{"FID": 3}', "[3]", "x", link("images")]}),
    ("fid --json x/y.json", "y.json has other settings: samples is", {
        "x/y.json": ['{"FID": 3, "samples": "/x.npz", "reference": "/y.npz", "feature_space": "x"}']}),
    ("fid_stats", "b.npz exists", {"out/b.npz": [copy("samples.npz"), "x", link("nowhere")]}),
    ("fid_stats --save-stats samples.npz", "samples.npz exists", {}),
    ("sample", "a.npz exists, and no a.npz.json", {OUT: [copy("samples.npz"), FOLDER]}),
    ("sample --out a.png", "a.png exists", {"a.png": [picture("PNG")]}),
    ("sample --out vae.npz --ckpt vae.npz", "vae.npz exists", {"vae.npz": [copy("model.pt")]}),
    ("sample", "a.npz.json", {OUT + ".json": ["{}", '{"seed": 0, "name": "x"}', link("nowhere")]}),
    ("sample", "a.npz", {OUT: [link("nowhere")]}),
    ("sample", "a.npz.json", {OUT: ["mine"], OUT + ".json": ['{"seed": 0}']}),
    ("sample", "a.npz.partial is in the way", {
        OUT + ".partial/images.npy": ["x"], OUT + ".partial/lock": ["x"]}),
    ("extract_latents", "latents.json", {"out/latents/latents.json": [
        '{"vae": "vae", "shift": 0, "scale": 0.18215, "num_classes": 3}']}),
    ("extract_latents --out images", "images exists", {}),
    ("extract_latents --out images/class1", "images/class1 exists", {}),
    ("extract_latents --out vae", "vae exists", {}),
    ("extract_latents", "latents.partial is in the way", {X + "notes.txt": ["x"], X + "labels.npy": ["x"]}),
    ("train", "out/run has log.jsonl, but no state.pt", {"out/run/log.jsonl": ["{}"]}),
    ("train", "out/run has checkpoints, but no state.pt", {
        "out/run/checkpoints/0000003.pt": ["x", copy("model.pt")]}),
    ("train", "settings.json", {"out/run/settings.json": ["{}", '{"seed": 0, "editor.fontSize": 3}']}),
    ("train --sample-every 3", "out/run has samples", {"out/run/samples/0000003.png": [picture("PNG")]}),
    (f"train {TRAINED}", "no state.pt", {
        **{f"out/run/checkpoints/000000{i}.pt": [copy("model.pt")] for i in (3, 6)},
        "out/run/settings.json": [copy("settings.json")]}),
    (f"train {TRAINED}", "log.jsonl", {
        "out/run/settings.json": [copy("settings.json")], "out/run/log.jsonl": [FOLDER]}),
    # a VAE without all of its weights, or that gives what is no number
    *((command, "lacks", {V: [
        without("decoder.conv_out.bias"), without("encoder.mid"), without("quant", "post"),
        renamed("encoder.conv_in.weight", "encoder.conv_in.w")]})
      for command in ("extract_latents", "sample --vae vae")),
    ("extract_latents", "not finite: image(s) 0, 1, 2", {V: [scaled("quant_conv.weight", 1e6)]}),
    ("extract_latents", "not finite: image(s) 0", {V: [
        scaled("encoder.conv_in.weight", np.nan), scaled("decoder.conv_out.bias", np.inf)]}),
    ("sample --vae vae", "not finite", {V: [scaled("decoder.conv_in.weight", np.nan)]}),
    ("extract_latents", "scale above 0", {C: [
        *(keys(scaling_factor=scale) for scale in (-1, np.nan, 1e-60, -np.inf)), keys(shift_factor=np.inf),
        keys(scaling_factor=None, shift_factor=None, latents_std=[1, np.inf, 1, 1])]}),
    ("sample", "not finite: image(s) 0, 1, 2, 3", {"model.pt": [
        averaged("x_embedder.proj.bias", lambda x: x * np.nan),
        averaged("final_layer.linear.bias", lambda x: x + np.inf),
        averaged("blocks.3.attn.proj.weight", lambda x: x + 1e30)]}),
    *((f"sample --cfg-scale {scale}", "not finite: image(s)", {}) for scale in ("1e308", "1e37", "3.5e38")),
    ("sample", "scale above 0", {"model.pt": [
        torch_file("model.pt", "settings", "data", **facts) for facts in (
            {"scale": -1.0}, {"scale": [1, 1, 0, 1]}, {"shift": np.nan}, {"scale": np.inf})]}),
    # a bit that flipped
    ("sample", "damaged", {"model.pt": list(map(flipped, (0, 0.3, 0.999)))}),
    (f"train {TRAINED}", "damaged", {STATE: [
        then(copy("state.pt"), flipped(share)) for share in (0.1, 0.5, 0.9)]}),
    ("fid", "damaged", {"samples.npz": list(map(flipped, (0.2, 0.6, 0.99)))}),
    ("fid", "damaged", {"detector.pt2": list(map(flipped, (0.2, 0.6, 0.99)))}),
    ("fid_stats", "damaged", {"samples.npz": [flipped(0.4)]}),
    ("train --data set --repa-depth 2 --repa-encoder e.pt2", "damaged", {
        "e.pt2": [then(encoder(2), flipped(share)) for share in (0.1, 0.9)]}),
    # another run's state; a VAE that is not what made the latents
    ("train --max-steps 6", "lr is 0.001 there and 0.0001 here", {STATE: [copy("state.pt")]}),
    (f"train {TRAINED} --seed 3", "seed is 0 there and 3 here", {STATE: [copy("state.pt")]}),
    (f"train {TRAINED} --batch-size 8", "batch_size is 4 there", {STATE: [copy("state.pt")]}),
    (f"train {TRAINED}", "scale is 0.5 there and 2 here", {
        STATE: [copy("state.pt")], A: [keys(scale=2)]}),
    (f"train {TRAINED}", "its step is", {STATE: [torch_file("state.pt", step=x) for x in (-1, 2.5, "3")]}),
    ("train --sample-every 1", "not those that made", {A: [keys(vae_content="0" * 16)]}),
    # images that would not be seen, or for ever
    *((command, "is the same folder as another", {path: [link(to)]})
      for command in ("extract_latents", "fid --ref images") for path, to in (
          ("images/class0/x", "."), ("images/class1/deep/x", "../../class0"), ("images/class2/up", ".."))),
    *((command, "x", {"images/class1/x": [link("x")], "images/class1/y": [link("../class1/x")]})
      for command in ("extract_latents", "fid --ref images")),
    *((command, "00.png", {IMAGE: [
        picture("EPS"), picture("PDF"), fifo, unix_socket,
        *(then(GONE, link(to)) for to in ("/dev/zero", "/dev/stdin", "nowhere"))]})
      for command in ("extract_latents", "fid --ref images")),
    # what is no regular file
    ("sample", "model.pt", {"model.pt": [fifo, unix_socket, then(GONE, link("/dev/zero"))]}),
    *(("train", "latents", {path: [fifo, unix_socket, then(GONE, link("/dev/zero"))]}) for path in (M, L, A)),
    ("train", "settings.json", {"out/run/settings.json": [fifo, unix_socket]}),
    (f"train {TRAINED}", "state.pt", {STATE: [fifo, then(link("/dev/zero"))]}),
    *(("extract_latents", "vae", {path: [fifo, unix_socket]}) for path in (C, V)),
    ("fid", "samples.npz", {"samples.npz": [fifo, unix_socket]}),
    ("fid --ref x.npy", "x.npy", {"x.npy": [fifo, link("/dev/zero")]}),
    ("fid", "detector.pt2", {"detector.pt2": [fifo, then(GONE, link("/dev/zero"))]}),
    ("fid_inception", "w.pth", {"w.pth": [fifo, link("/dev/zero"), copy("model.pt")]}),
    ("killed extract_latents", "settings.json", {X + "settings.json": [fifo]}),
    ("killed sample", "is damaged", {OUT + ".partial/done-0.npy": [fifo]}),
    # sets and statistics that are none
    ("fid", "pixels, not 32 squared", {"samples.npz": [blank(32, 31), blank(32, 64)]}),
    ("fid --ref x.npz", "32 squared", {REF: [blank(32, 33), blank(16, 32), blank(64, 64)]}),
    ("fid --ref x.npz", "mu and sigma are no", {REF: [
        archive(sigma=np.eye(96)), archive(mu=np.zeros(96)), archive(mu=np.zeros(96), sigma=np.ones(96)),
        archive(mu=np.zeros(96), sigma=np.tri(96)), archive(mu=np.zeros(96), sigma=np.eye(96) * 1j),
        archive(mu=np.full(96, np.nan), sigma=np.eye(96)), archive(mu=np.array(["x"] * 96), sigma=np.eye(96)),
        archive(mu=np.full(96, 1e200), sigma=np.eye(96)), archive(mu=np.zeros(96), sigma=-np.eye(96)),
        archive(mu=np.zeros(96), sigma=np.full((96, 96), np.inf)),
        archive(mu_s=np.zeros(4), sigma_s=np.eye(4))]}),
    ("fid --ref x.npz", "mu_s and sigma_s are no", {REF: [
        archive(mu=np.zeros(96), sigma=np.eye(96), **more) for more in (
            {"mu_s": np.zeros(4)}, {"sigma_s": np.eye(4)}, {"mu_s": np.zeros(4), "sigma_s": np.eye(5)})]}),
    ("fid", "shorter than its header says", {"samples.npz": [npz_that_lies(8, 9), npz_that_lies(12, 99)]}),
    # arrays of another shape or kind where a killed command left its own
    ("killed extract_latents", "is damaged", {X + "moments.npy": [
        array(np.float32), array(np.ravel), array(lambda x: x[:, :6]), array(lambda x: x[1:])]}),
    *(("killed sample", "is damaged", {f"{OUT}.partial/{name}.npy": [array(np.int8), array(lambda x: x[1:])]})
      for name in ("images", "done-0")),
    ("killed sample", "marks are not 0 or 255", {OUT + ".partial/done-0.npy": [array(lambda x: x + 1)]}),
    # more than there is
    ("sample --num-samples 1000000000000", "a.npz.partial would take", {}),
    ("sample_grid --per-class 1000000000000", "a.npz.partial would take", {}),
    *((f"train --batch-size {size} --micro-batch 1", "allocate", {}) for size in (10**11, 4 * 10**11)),
    ("extract_latents --image-size 1000000", "--image-size 1000000", {}),
    *((command, "invalid", {}) for command in (
        f"sample --num-samples {10**18}", f"train --max-steps {10**30}", f"train --seed {2**64}",
        f"fid --batch-size {2**70}")),
    ("train", "allocate", {A: [keys(num_classes=2**40, class_names=None)]}),
    ("train", "overflow", {A: [keys(num_classes=2**61, class_names=None)]}),
    ("train --lr inf --max-steps 1", "not finite after step 1", {}),
    ("train --lr 1e38", "not finite", {}),
    # encoders and decoders of other sizes
    ("train --data set --repa-depth 2 --repa-encoder e.pt2", "e.pt2", {
        "e.pt2": [*map(encoder, (1, 2, 3)), fifo]}),
    ("train --sample-every 1", "cannot decode latents of", {M: [
        array(lambda x: np.repeat(x, 2, 1)), array(lambda x: x[:, :6]), array(lambda x: abs(x[:, :2]))]}),
    # torchrun's variables
    *((f"{variables} {command}", says, {}) for command in ("sample", "train", "fid", "extract_latents")
      for variables, says in {"RANK=x": "RANK", "LOCAL_RANK=x": "LOCAL_RANK", "WORLD_SIZE=2.5": "WORLD_SIZE",
                              "RANK=0": "WORLD_SIZE",
                              "RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=x": "'x'",
                              "RANK=0 WORLD_SIZE=1 MASTER_ADDR=x MASTER_PORT=-1": "meet"}.items()),
    # crafted checkpoints
    ("sample", "model.pt", {"model.pt": [
        *(torch_file("model.pt", step=step) for step in ("3", torch.ones(2), 1.5)),
        *(torch_file("model.pt", "settings", "data", latent_shape=shape)
          for shape in ([4, 8, 16], [4, 8], [4, 8, 8, 8], 4)),
        averaged("final_layer.linear.weight", torch.Tensor.to_sparse),
        averaged("pos_embed", torch.Tensor.to_sparse)]})]
BAD = [(command, says, dict(zip(changes, contents)), *limit) for command, says, changes, *limit in BAD
       for contents in itertools.product(*changes.values())]
COMMANDS = {
    "train": " ".join(map(str, TINY)) + " --data latents --run-dir out/run --max-steps 3",
    "sample": "--ckpt model.pt --num-samples 4 --num-steps 2 --out out/a.npz",
    "extract_latents": "--images images --vae vae --image-size 32 --num-workers 1 --out out/latents",
    "fid": "samples.npz --ref samples.npz --detector detector.pt2 --num-workers 1",
    "fid_stats": "samples.npz --save-stats out/b.npz --detector detector.pt2 --num-workers 1"}
COMMANDS["sample_grid"] = COMMANDS["sample"].replace("--num-samples 4", "--classes 0 1")
COMMANDS["fid_inception"] = "samples.npz --ref samples.npz --weights w.pth"


@pytest.fixture
def inputs(latents, images, vae, checkpoint, data, tmp_path, monkeypatch):
    """In the working directory, links to good inputs, and out/."""
    monkeypatch.chdir(tmp_path)
    for name, path in {"latents": latents, "set": data, "images": images, "vae": vae, "model.pt": checkpoint,
                       "state.pt": checkpoint.parents[1] / "state.pt",
                       "settings.json": checkpoint.parents[1] / "settings.json",
                       "detector.pt2": DETECTOR}.items():
        Path(name).symlink_to(path)
    Path("out").mkdir()
    np.savez("samples.npz", arr_0=np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8))


def put(path, content):
    """Put something into the place of a file; the good input that a link leads to stays as it is."""
    top = Path(path.parts[0])
    if top.is_symlink():
        source = top.resolve()
        top.unlink()
        (shutil.copytree if source.is_dir() else shutil.copy)(source, top)
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        return content(path)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if content is FOLDER:
        path.mkdir()
    elif content is not GONE:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def script_of(kind):
    return kind if kind == "extract_latents" else kind.split("_")[0]


def files():
    """{path: what a link, a file or anything else is} of all that is there, below links at the top, too."""
    found = {}
    for top in Path().iterdir():
        for path in (top, *top.resolve().rglob("*")) if top.is_dir() else [top]:
            mode = path.lstat().st_mode
            found[path] = (os.readlink(path) if path.is_symlink() else
                           path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode))
    return found


def final(path):
    """Whether a reader would take it for a whole output; files of settings come first, and are whole."""
    return ".partial" not in str(path) and not path.is_dir() and path.name not in (
        "settings.json", "a.npz.json", "log.jsonl", "lock")


def too_long(*_):
    """Wake up who waits for a pipe, a thread perhaps, and fail."""
    for path in Path().rglob("*"):
        if path.is_fifo():
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    raise Killed("it hangs")


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]}-{' '.join(case[2])}")
def test_bad_input(capsys, caplog, inputs, monkeypatch, case):
    command, says, changes, *limit = case
    words, kill = shlex.split(command), command.startswith("killed ")
    words = words[kill:]
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("="))
        monkeypatch.setattr(extract_latents.time, "sleep", Mock())  # a process but the first waits to speak
    kind, *flags = words
    script, args = script_of(kind), [*COMMANDS[kind].split(), *flags]
    if kill:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(extract_latents.ResumableArrays, "write", Mock(side_effect=Killed))
            cli(capsys, script, *args)
    for path, content in changes.items():
        put(Path(path), content)
    ghostscript = Path("gs")
    ghostscript.write_text("#!/bin/sh\ntouch ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", str(ghostscript.resolve()), raising=False)
    before, (soft, hard) = files(), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    resource.setrlimit(resource.RLIMIT_FSIZE, (*limit, hard) if limit else (soft, hard))
    try:
        status, _, err = cli(capsys, script, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.alarm(0)
    assert status == 2, err
    assert (said := message(err)).startswith(f"{script}.py: error: ") and says in said, said
    assert not [record for record in caplog.records if record.levelname == "ERROR"]  # a library's own words
    after = files()
    assert {path: after.get(path) for path in before if final(path)} == {
        path: content for path, content in before.items() if final(path)}
    assert not [path for path in after.keys() - before.keys() if final(path)] and not Path("ran").exists()
    assert not limit or cli(capsys, script, *args)[0] == 0  # once there is room


@contextlib.contextmanager
def locked_by_another(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    code = f"import fcntl; x = open({str(path)!r}, 'w+'); fcntl.lockf(x, fcntl.LOCK_SH); print(1); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-uc", code], **pipes) as other:
        other.stdout.readline()
        yield
        other.kill()


@pytest.mark.parametrize("script, locked", [
    ("train", "out/run/lock"), ("sample", "out/a.npz.partial/lock"),
    ("extract_latents", "out/latents.partial/lock"), ("fid_stats", "out/b.npz.lock")])
def test_two_commands_never_write_one_output(capsys, inputs, script, locked):
    """The second is refused while the first lives; when that is gone, however it ended, it runs."""
    with locked_by_another(Path(locked)):
        status, _, said = command(capsys, script)
    assert status == 2 and "another process is writing out/" in said
    assert [str(path) for path in Path("out").rglob("*") if path.is_file()] == [locked]
    assert command(capsys, script)[0] == 0


def test_a_state_is_read_once_no_other_process_writes_it(capsys, inputs):
    put(Path(STATE), b"half of a sta")
    with locked_by_another(Path("out/run/lock")):
        assert "another process is writing out/run" in command(capsys, "train")[2]
    assert "cannot be resumed from" in command(capsys, "train")[2]


@pytest.mark.parametrize("script, differs", [
    ("train", {"lr": 2.0}), ("train", {"run_dir": "out/run, at step 3"}), ("train", {"data": {"count": 13}}),
    ("sample", {"seed": 7}), ("sample", {"whether out/a.npz exists": True}),
    ("extract_latents", {"files_sha256": ""}), ("extract_latents", {"whether out/latents exists": True}),
    ("fid", {"contents": [(12, "")] * 2})])
def test_processes_that_differ(capsys, inputs, monkeypatch, under_torchrun, script, differs):
    """In flags, or in the files that their machines have: nothing is made."""
    def gather(everyones, mine):
        assert mine.keys() >= differs.keys() and mine != mine | differs
        assert script != "train" or mine["run_dir"] == "out/run, at step 0"
        assert script != "fid" or mine["contents"] == 2 * [(12, extract_latents.content_id("samples.npz"))]
        everyones.append(mine | differs)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    status, _, said = command(capsys, script)
    assert status == 2 and f"the processes differ in {next(iter(differs))}: all must" in said
    assert not [path for path in Path("out").rglob("*") if final(path)]


# ---- what is not the same any more, though its name is


def command(capsys, words, *more):
    """(status, stdout, its sentence) of one of COMMANDS."""
    kind, *flags = words.split()
    status, stdout, err = cli(capsys, script_of(kind), *COMMANDS[kind].split(), *flags, *more)
    return status, stdout, message(err) if status else ""


def test_a_checkpoint_that_was_trained_anew(capsys, inputs):
    """Under its old name it is another: its samples are neither complete nor gone on with; a copy is not."""
    put(Path("model.pt"), torch_file("model.pt", step=4))
    assert command(capsys, "sample")[0] == 0
    put(Path("model.pt"), torch_file("model.pt", step=4))  # saved again: the same
    (record := Path(OUT + ".json")).write_text(record.read_text().replace("model.pt", "m.pt"))  # and moved
    assert "complete already" in command(capsys, "sample")[1]
    before = Path(OUT).read_bytes()
    put(Path("model.pt"), averaged("final_layer.linear.bias", lambda x: x + 1))
    status, _, said = command(capsys, "sample")
    assert status == 2 and "ckpt_content is" in said
    assert Path(OUT).read_bytes() == before
    assert command(capsys, "sample --out b.npz")[0] == 0
    assert Path("b.npz").read_bytes() != before


@pytest.mark.parametrize("script", ["sample --vae vae", "extract_latents"])
def test_a_vae_that_was_replaced(capsys, inputs, monkeypatch, script):
    """Between a kill and the repeat, and after the end, in the same folder."""
    put(Path(V), kept := Path(V).read_bytes())
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(extract_latents.ResumableArrays, "write", Mock(side_effect=Killed))
        command(capsys, script)
    for _ in range(2):
        put(Path(V), scaled("decoder.conv_out.bias", 1.5))
        status, _, said = command(capsys, script)
        assert status == 2 and "has other settings: vae_content is" in said
        put(Path(V), kept)
        assert command(capsys, script)[0] == 0


def test_latents_know_their_vae(capsys, inputs, monkeypatch):
    """Samples and grids are decoded by the VAE that made the latents, or by one that is asked for."""
    put(Path(V), kept := Path(V).read_bytes())
    assert command(capsys, "extract_latents")[0] == 0
    trained = ("--data", "out/latents", "--run-dir", "r", "--sample-every", 3)
    assert command(capsys, "train", *trained)[0] == 0
    sampled = "sample --ckpt r/checkpoints/0000003.pt --out x.npz"
    put(Path(V), scaled("decoder.conv_out.bias", 1.5))
    for words in (sampled, f"train --max-steps 6 {' '.join(map(str, trained))}"):
        status, _, said = command(capsys, words)
        assert status == 2 and "not those that made the latents" in said
    assert command(capsys, sampled, "--vae", "vae")[0] == 0
    put(Path(V), kept)
    Path("vae").rename("moved")  # the same, elsewhere
    keys(vae="moved")(Path("out/latents/latents.json"))
    assert command(capsys, "train --max-steps 6", *trained)[0] == 0


def test_an_npz_without_a_name(capsys, inputs):
    assert command(capsys, "sample --out .npz")[0] == 0 and len(np.load(".npz")["arr_0"]) == 4


def test_an_encoder_that_was_replaced(capsys, inputs):
    flags = ("--data", "set", "--repa-depth", 2, "--repa-encoder", "e.pt2")
    export(Tokens(), "e.pt2", 32)
    assert command(capsys, "train", *flags)[0] == 0
    assert command(capsys, "train --max-steps 4", *flags[:-1], "./e.pt2")[0] == 0  # the same
    export(Tokens(scale=2), "e.pt2", 32)
    status, _, said = command(capsys, "train --max-steps 5", *flags)
    assert status == 2 and "repa_encoder_content is" in said


def test_a_run_without_its_settings_file(capsys, inputs):
    """The state knows its settings: the file is for people, and is written again."""
    assert command(capsys, "train")[0] == 0
    record = Path("out/run/settings.json")
    told = record.read_bytes()
    for change in (GONE, '{"lr": 3e-4}', "no JSON"):
        put(record, change)
        status, _, said = command(capsys, "train --max-steps 5 --lr 3e-4")
        assert status == 2 and "state.pt has other settings: lr is 0.0001 there and 0.0003 here" in said
    assert command(capsys, "train")[0] == 0 and record.read_bytes() == told


# ---- what must not matter


@pytest.mark.parametrize("torn", ['{"step": 4, "deno', "{", '{"step": 4}'])
def test_a_torn_log(capsys, inputs, torn):
    """What a full disk left of a line goes once the run goes on; the demo reads whole lines meanwhile."""
    put(Path("whole"), FOLDER)
    assert command(capsys, "train --max-steps 5 --run-dir whole")[0] == 0
    assert command(capsys, "train")[0] == 0
    with open("out/run/log.jsonl", "a") as file:
        file.write(torn)
    assert list(demo.read_log(Path("out/run").resolve())) == [1, 2, 3]
    assert command(capsys, "train --max-steps 5")[0] == 0
    losses = [[(line["step"], line["denoising"]) for line in log(Path(run))] for run in ("whole", "out/run")]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_names_that_are_no_text(capsys, inputs):
    """Files may be called anything; what is printed at the end shows it somehow."""
    odd = os.fsdecode(b"\xff\xfe") if sys.platform == "linux" else "odd"
    for words, output in {"extract_latents": f"out/{odd}", "sample": f"out/{odd}.npz", "train": f"{odd}/run",
                          "fid": f"{odd}.json", "fid_stats": f"{odd}.npz"}.items():
        flag = {"train": "--run-dir", "fid": "--json", "fid_stats": "--save-stats"}.get(words, "--out")
        status, stdout, said = command(capsys, words, flag, output)
        assert status == 0, said
        assert Path(output).exists() and (words == "fid" or "udcff" in stdout or odd == "odd")
    assert command(capsys, "fid", "--ref", f"{odd}.npz")[0] == 0


def test_closed_streams(inputs):
    """Without a terminal or a log, the work is done, and no message lands in a file."""
    words = [sys.executable, str(ROOT / "extract_latents.py"), *COMMANDS["extract_latents"].split(), "--out"]
    closed = {"out/two": ">&- 2>&-", "out/three": "<&- >&- 2>&-"}
    pair = [subprocess.Popen(["sh", "-c", f"{shlex.join([*words, out])} {streams}"])
            for out, streams in closed.items()]
    assert [each.wait() for each in pair] == [0, 0]
    for folder in closed:
        found, expected = (Latents(each).read(range(12))["mean"] for each in (folder, "latents"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("script", ["extract_latents", "fid --ref images"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "I/O error")])
def test_folders_that_cannot_be_read(capsys, inputs, monkeypatch, script, error):
    """Whatever the system says of one, it is not left out."""
    real = os.scandir

    def scandir(path):
        if str(path).endswith("class1"):
            raise type(error)(error.errno, error.strerror, path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    status, _, said = command(capsys, script)
    assert status == 2 and "images/class1" in said and error.strerror in said


def test_linked_folders_are_seen(capsys, inputs):
    """A class, or a folder of one, that is a link: by both scripts, as if it lay there."""
    for name in ("class0", "class2"):
        shutil.copytree(f"images/{name}", f"elsewhere/{name}")
    put(Path("linked/class0"), link("../elsewhere/class0"))
    shutil.copytree("images/class1", "linked/class1")
    put(Path("linked/class2/deep"), link("../../elsewhere/class2"))
    assert command(capsys, "extract_latents --images linked")[0] == 0
    assert Latents("out/latents").labels.tolist() == Latents("latents").labels.tolist()
    found, expected = (Latents(folder).read(range(12))["mean"] for folder in ("out/latents", "latents"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
    assert command(capsys, "fid --ref linked --json a.json")[0] == 0
    assert command(capsys, "fid --ref images --json b.json")[0] == 0
    a, b = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert a["FID"] == pytest.approx(b["FID"], rel=1e-4)


@pytest.mark.slow
def test_the_demo_takes_its_trainings_along(tmp_path):
    """kill -TERM: none of what it started goes on, and no lock is left."""
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__")
    script = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored) / "tests" / "demo.py"
    with started(tmp_path / "out.txt", "--images", 10, "--steps", 10**6, script=script) as running:
        wait_until(lambda: len([*(tmp_path / "copy").glob("runs/demo/10-images/*/lock")]) == 2, running)
        everyone = family(running.pid)
        running.terminate()
        assert running.wait(30) == 130 and len(everyone) >= 3 and gone(everyone)
