"""extract_latents.py, and models.py's part for VAEs: crops and pixels; the moments, against diffusers; the
set on disk and its reader; going on after kills, full disks and bad images, by two processes too, to an
undisturbed run's bytes; the hub without a network; one sentence for all that is bad."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, Killed, cli, message, process, write_set
from diffusers import AutoencoderKL, VQModel
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import extract_latents
from extract_latents import Latents, ResumableArrays, decode, encode, load_image, load_vae

pytestmark = pytest.mark.usefixtures("all_on_one_thread")  # sets are compared byte by byte

DEEP = "class1/more/deep/" + (os.fsdecode(b"\xff.png") if sys.platform == "linux" else "a.png")  # no UTF-8
NAMES = [*(f"class0/{i:02d}.png" for i in (0, 3, 6, 9)), *(f"class1/{i:02d}.png" for i in (1, 4, 7, 10)),
         DEEP, *(f"class2/{i:02d}.png" for i in (2, 5, 8, 11))]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def flags(images, vae, out, *more):
    return ["--images", images, "--vae", vae, "--out", out, "--image-size", 32, "--batch-size", 2,
            "--num-workers", 1, *more, "--store-images"]


def extract(capsys, flags):
    status, stdout, stderr = cli(capsys, "extract_latents", *flags)
    assert status == 0, stderr
    return stdout


def refused(capsys, flags):
    """The one sentence with which an extraction refuses what it is given."""
    status, _, stderr = cli(capsys, "extract_latents", *flags)
    assert status == 2 and message(stderr).startswith("extract_latents.py: error: "), stderr
    return message(stderr)


def contents(folder, *without):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name not in without}


def partial(out):
    return Path(f"{out}.partial")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, images):
    """13 images of 3 classes, one of them deeper, in a hidden folder, among what is to be left out."""
    root = shutil.copytree(images, tmp_path_factory.mktemp("x") / ".hidden" / "images")
    for name in ("a.txt", ".x/x.png", "class0/.DS_Store", "class2/._0.png", "class0/.x/0.png", DEEP):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(40, 36).save(root / name, "PNG")
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pictures, vae, all_on_one_thread):
    """The set of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    extract(None, flags(f"{pictures}/", vae, out))
    return out


def adm_crop(image, size):
    """ADM's center_crop_arr."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    pixels = np.array(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def test_crop_is_that_of_adm():
    for size in [(32, 32), (47, 32), (32, 47), (40, 36), (36, 41), (63, 90), (64, 64), (129, 130), (300, 131),
                 (20, 11), (1, 3), (256, 128)]:
        assert_array_equal(extract_latents.center_crop(noise(*size), 32), adm_crop(noise(*size), 32))


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
DEEP_GREY = np.random.default_rng(2).integers(0, 65536, (16, 16), np.uint16)
WIDE_GREY = (GREY.astype(np.int32) - 50) * 1000  # beyond 16 bits, on both sides
COLOUR = np.asarray(noise(16, 16))
PALETTE = Image.fromarray(GREY)
PALETTE.putpalette(COLOUR.tobytes())
TURNED = Image.Exif()  # a camera held otherwise stores the pixels turned
TURNED[0x0112] = 6


@pytest.mark.parametrize("image, name, save, expected", [
    (GREY, "grey.png", {}, GREY), (GREY > 100, "bits.png", {}, (GREY > 100) * 255),
    (DEEP_GREY, "deep.png", {}, DEEP_GREY // 257), (DEEP_GREY, "deep.tif", {}, DEEP_GREY // 257),
    (WIDE_GREY, "wide.tif", {}, WIDE_GREY.clip(0, 65535) // 257),
    (PALETTE, "palette.png", {}, COLOUR.reshape(256, 3)[GREY]),
    (np.dstack([COLOUR, GREY]), "alpha.png", {}, COLOUR),  # dropped, not blended
    (np.rot90(COLOUR), "turned.png", {"exif": TURNED}, COLOUR)],
    ids=lambda x: x if isinstance(x, str) else "")
def test_pixels_of_every_kind_of_file(tmp_path, image, name, save, expected):
    """The images have the crop's size, so that nothing but the pixels themselves is compared."""
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(tmp_path / name, **save)
    expected = np.broadcast_to(np.reshape(expected, (16, 16, -1)), (16, 16, 3))
    for pixels in (load_image(tmp_path / name, 16), load_image(tmp_path / name)):
        assert pixels.dtype == np.uint8
        assert_array_equal(pixels, expected)


def test_the_set_on_disk(whole, pictures, vae):
    """Each row has the crop, the moments and the label of its file, and latents.json says what they are."""
    assert set(contents(whole)) == {"moments.npy", "labels.npy", "images.npy", "latents.json"}
    moments, labels, stored = (np.load(whole / f"{name}.npy") for name in ("moments", "labels", "images"))
    crops = np.stack([adm_crop(Image.open(pictures / name), 32) for name in NAMES])
    assert_array_equal(stored, crops)
    with torch.no_grad():
        x = torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = AutoencoderKL.from_pretrained(vae).encode(x).latent_dist
    expected = torch.cat([posterior.mean, posterior.std], 1).numpy()
    apart = abs(expected[:, None] - expected).max(axis=(2, 3, 4)) + np.eye(13)
    assert apart.min() > 0.01 and moments.dtype == np.float16  # no row could stand for another
    assert_allclose(moments, expected.astype(np.float16), rtol=2**-10, atol=1e-5)
    assert labels.dtype == np.int64 and labels.tolist() == [0] * 4 + [1] * 5 + [2] * 4
    about = json.loads((whole / "latents.json").read_text())
    assert about.pop("files_sha256") == hashlib.sha256(os.fsencode("\n".join(NAMES))).hexdigest()
    assert about == {
        "vae": str(vae), "vae_content": hashlib.sha256(
            (vae / "config.json").read_bytes() + (vae / WEIGHTS).read_bytes()).hexdigest()[:16],
        "image_size": 32, "store_images": True, "reconstruct": False, "shift": 0.25,
        "scale": 0.5, "num_classes": 3, "class_names": ["class0", "class1", "class2"]}


def test_classes_are_sorted(tmp_path):
    for name in (names := "hcxaqmzbk"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    files = [f"{tmp_path}/{name}/0.png" for name in sorted(names)]
    assert extract_latents.list_images(tmp_path) == (sorted(names), files, list(range(9)))


def with_config(vae, folder, **changes):
    """A copy of a VAE whose config.json gives this scale instead."""
    config = json.loads((shutil.copytree(vae, folder) / "config.json").read_text())
    config.update({"scaling_factor": None, "shift_factor": None, **changes})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("config, expected", [
    ({"scaling_factor": 0.18215, "latent_channels": 4, "latents_std": None}, (0.0, 0.18215)),  # SD's
    ({"scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 16}, (0.1159, 0.3611)),  # FLUX.1's
    *(({"scaling_factor": scale, "latents_mean": (1.0, 2.0), "latents_std": [4, 5]}, ([1, 2], [0.25, 0.2]))
      for scale in (None, 1.0, 0.18215)),  # what diffusers writes where the statistics are meant
    ({"latents_std": (4, 5)}, ([0], [0.25, 0.2])), ({"scaling_factor": 0.18215, "latent_channels": 32}, None),
    ({"scaling_factor": 0}, None), ({"scaling_factor": 3.0, "latents_mean": [1, 2]}, None),
    ({"scaling_factor": 3.0, "latents_std": [1, 2]}, None),
    ({"latents_std": [1, 2], "shift_factor": 1}, None)], ids=str)
def test_latent_normalization(config, expected):
    """A scale that cannot be known is refused: diffusers also writes 0.18215 where no one asked for it."""
    with contextlib.nullcontext() if expected else pytest.raises(ValueError, match="scaling_factor"):
        assert extract_latents.latent_normalization(config) == expected


def test_autoencoders_without_a_posterior(tmp_path):
    """Of the class that the config names; another calls `latent` what this calls `latents`."""
    VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(tmp_path)
    vae, images = load_vae(str(tmp_path)), torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    latents = vae.encode(images / 127.5 - 1).latents
    assert isinstance(vae, VQModel) and latents.std() > 0.1
    assert torch.equal(encode(vae, images), torch.cat([latents, torch.zeros_like(latents)], 1))


@pytest.mark.parametrize("shift, scale", [(0.25, 0.5), ([0.5, -1.0, 2.0, 0.0], [0.5, 0.25, 2.0, 1.0])])
def test_decode(shift, scale):
    """x = (z - shift) * scale is undone, in the batch's order; grey levels are rounded and clipped."""
    levels = (torch.arange(37 * 4 * 4).reshape(37, 4, 2, 2) - 100.0) * 0.9 + 0.03
    z, parts = levels / 127.5 - 1, []
    x = (z - torch.tensor(shift).reshape(-1, 1, 1)) * torch.tensor(scale).reshape(-1, 1, 1)
    vae = SimpleNamespace(decode=lambda z: parts.append(z) or SimpleNamespace(sample=z[:, :3]))
    images = decode(vae, x.double(), shift, scale)
    assert images.dtype == torch.uint8 and parts[0].dtype == torch.float32 and max(map(len, parts)) <= 16
    assert_array_equal(images, levels[:, :3].round().clamp(0, 255).permute(0, 2, 3, 1))


def test_vae_of_the_hub_without_a_network(capsys, pictures, vae, whole, tmp_path, monkeypatch):
    """In the hub's cache it is found by its name, of its two files; else one sentence, at once. A scale per
    channel is stored as it is, and the moments stay raw."""
    repo, commit = tmp_path / "hub" / "models--owner--pipeline", "0123456789" * 4
    for folder in (".", "vae"):
        with_config(vae, repo / "snapshots" / commit / folder, latents_mean=[0.5, -1, 2, 0],
                    latents_std=[2, 4, 0.5, 1])
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    download = Mock(wraps=huggingface_hub.snapshot_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as closed:  # a port that answers no one, also where there is a network
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        for name, out in (("owner/pipeline", tmp_path / "a"), ("owner/pipeline/vae", tmp_path / "b")):
            extract(capsys, flags(pictures, name, out))
            about = json.loads((out / "latents.json").read_text())
            assert about == {**about, "vae": name, "shift": [0.5, -1, 2, 0], "scale": [0.5, 0.25, 2, 1]}
            assert contents(out, "latents.json") == contents(whole, "latents.json")
        began, line = time.time(), refused(capsys, flags(pictures, "owner/absent", tmp_path / "c"))
    assert line.endswith(": there is no such folder, and the hub was not reached")
    assert time.time() - began < 10
    assert [(*call.args, *sorted(call.kwargs["allow_patterns"])) for call in download.mock_calls[:2]] == [
        ("owner/pipeline", "config.json", WEIGHTS),
        ("owner/pipeline", "vae/config.json", f"vae/{WEIGHTS}")]


def test_vae_that_cannot_be_used(capsys, images, vae, tmp_path):
    """Damaged, missing, of another kind, or without a scale; or of sizes that do not fit."""
    root, out = tmp_path / "vaes", tmp_path / "data" / "out"
    for i, config in enumerate([{}, {"latents_std": [1, 1, 1]}, {"_class_name": "UNet2DModel"}]):
        with_config(vae, root / str(i), **config)
    weights = shutil.copytree(vae, root / "cut") / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:99])
    for path in (*root.iterdir(), root / "missing", root / "0" / "config.json"):
        assert f"--vae {path} cannot be used" in refused(capsys, flags(images, path, out))
    for size in (2, 30):  # one latent pixel of this VAE covers 4 x 4
        assert f"--image-size {size}: " in refused(capsys, flags(images, vae, out, "--image-size", size))
    assert not out.parent.exists()


def test_the_reader(tmp_path):
    """Mean and std of x = (z - shift) * scale, labels, and images for REPA, of a set made by hand."""
    folder, rows = write_set(tmp_path / "set"), [5, 0, 11, 5]
    moments, labels, images = (np.load(folder / f"{name}.npy") for name in ("moments", "labels", "images"))
    np.save(folder / "moments.npy", moments.astype(np.float32))
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    np.save(folder / "clip.npy", clip := np.random.default_rng(1).normal(size=(12, 3, 5)))
    about = json.loads((folder / "latents.json").read_text())
    np.save(folder / "score.npy", score := np.arange(12.0))
    latents = Latents(folder, ["images", "clip", "score"])
    content = b"".join((moments.astype(np.float32).tobytes(), labels.astype(np.int64).tobytes()))
    facts = {**about, "vae_content": None, "count": 12, "latent_shape": [4, 8, 8],
             "latents_sha256": hashlib.sha256(content).hexdigest()}
    assert latents.facts == {**facts, "image_size": 32} and Latents(folder).facts == facts
    shift, scale = (np.float32(about[key]).reshape(-1, 1, 1) for key in ("shift", "scale"))
    expected = {"mean": (moments[rows, :4] - shift) * scale, "std": moments[rows, 4:] * scale,
                "labels": labels[rows], "images": images[rows].transpose(0, 3, 1, 2), "clip": clip[rows],
                "score": score[rows]}
    found = latents.read(np.array(rows))
    assert set(found) == set(expected) and set(Latents(folder).read(rows)) == {"mean", "std", "labels"}
    for name, value in expected.items():
        assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)
        assert found[name].numpy().dtype == value.dtype
    for bad in (clip[1:], clip.astype(">f4"), np.array(["x"] * 12)):
        np.save(folder / "clip.npy", bad)
        with pytest.raises(SystemExit, match="2"):
            Latents(folder, ["clip"])


def test_reading_ahead():
    """Results come in order; threads + 1 more are read than the caller has, no others; errors reach it."""
    asked, threads = [], 4

    def read(i):
        asked.append(i)
        time.sleep(0.01 * (i % 3))  # they do not end in the order in which they began
        return 10 / (19 - i)

    results, deadline = extract_latents.read_ahead(read, range(20), threads), time.time() + 30
    got = [next(results)]
    while len(asked) < threads + 2 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(asked) == list(range(threads + 2))
    with pytest.raises(ZeroDivisionError):
        got.extend(results)
    assert got == [10 / (19 - i) for i in range(19)]


def failing(function, nth, error):
    """The function, of which the nth call, from 1, raises an error."""
    return Mock(wraps=function, side_effect=chain(repeat(DEFAULT, nth - 1), [error], repeat(DEFAULT)))


FULL = OSError(errno.ENOSPC, "No space left on device")


# os.fsync is called for the folder; done, moments, images and settings.json, each with its name; the first
# three with each of 7 batches; labels and latents.json with their names; and for the name of the set
@pytest.mark.parametrize("error, owner, name, nth, rows_left", [
    *((Killed(), os, "fsync", nth, left) for nth, left in [(8, 13), (12, 11), (29, 1), (31, 0)]),
    *((FULL, os, "fsync", nth, left) for nth, left in [(8, 13), (11, 13), (33, 0)]),
    (FULL, shutil, "disk_usage", 1, 13), (Killed(), os, "replace", 7, 0), (Killed(), os, "unlink", 2, 0),
    (KeyboardInterrupt(), os, "fsync", 13, 11),
    (OSError("no answer"), extract_latents, "load_image", 4, 2)])  # by the end, it can be read
def test_stopped_anywhere_it_goes_on(
        capsys, pictures, vae, whole, tmp_path, monkeypatch, error, owner, name, nth, rows_left):
    """No batch that is on disk is done again, and the bytes become those of an undisturbed run."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(owner, name, failing(getattr(owner, name), nth, error))
        status, _, stderr = cli(capsys, "extract_latents", *flags(pictures, vae, out))
        assert status == (130 if isinstance(error, KeyboardInterrupt) else 2)
        assert "o space left" in message(stderr) or error is not FULL
        assert not [*tmp_path.rglob("*.tmp")]
    assert not out.exists() or name == "unlink"
    monkeypatch.setattr(extract_latents, "load_image", Mock(wraps=load_image))
    extract(capsys, flags(pictures, vae, out))
    loaded = {call.args for call in extract_latents.load_image.mock_calls}
    assert len(loaded) == rows_left  # no list: threads of the first command may go on for a while
    assert contents(out) == contents(whole) and not partial(out).exists()


def test_killed_then_continued_by_two_processes(capsys, pictures, vae, whole, tmp_path):
    """A real kill amid the third batch. No other command may join before it, or do what was done after it."""
    root, out = shutil.copytree(pictures, tmp_path / "images"), tmp_path / "out"
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import extract_latents as it; "
            "read = it.load_image; "
            f"it.load_image = lambda *x: time.sleep(999) if x[0].endswith({NAMES[5]!r}) else read(*x); "
            "it.run(it.main)")
    command = [sys.executable, "-c", code, *map(str, flags(root, vae, out))]
    own, done = {**os.environ, "OMP_NUM_THREADS": "1"}, partial(out) / "done-0.npy"
    deadline = time.time() + 120
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=own) as running:
        try:
            while not (partial(out) / "settings.json").exists() or np.load(done).sum() < 4 * 255:
                assert running.poll() is None and time.time() < deadline
                time.sleep(0.01)
            line = refused(capsys, flags(root, vae, out, "--image-size", 16))  # before its settings are seen
            assert f"another process is writing {out} now" in line
        finally:
            running.kill()
    assert np.load(done).tolist() == [255] * 4 + [0] * 9
    for i in range(4):  # on disk already: nobody reads them again
        (root / NAMES[i]).write_text("no image now")
    run = process("extract_latents", *flags(root, vae, out), processes=2)
    assert run.stdout.count(f"{out}: 13 images of 3 classes, moments [8, 8, 8]") == 1
    assert contents(out, "latents.json") == contents(whole, "latents.json")


def test_processes_share_the_batches(tmp_path):
    """Each batch belongs to one of them, until all of it is on disk; the batch size may change."""
    def arrays(processes):
        return [ResumableArrays(tmp_path / "a", {"a": 1}, 20, {"x": ((20, 2), "float16")}, rank, processes)
                for rank in range(processes)]

    first = arrays(3)
    assert [each.batches(6) for each in first] == [[range(6), range(18, 20)], [range(6, 12)], [range(12, 18)]]
    first[1].write(range(3, 9), x=np.ones((2, 6)).T)
    assert [[r.start for r in each.batches(4)] for each in arrays(2)] == [[0, 12], [8, 16]]
    (last,) = arrays(1)
    for rows in last.batches(4):
        last.write(rows, x=np.full((4, 2), rows.start + 0.1))
    expected = np.repeat([0.1, 1, 8.1, 12.1, 16.1], 4).astype(np.float16)
    assert_array_equal(np.load(partial(tmp_path / "a") / "x.npy"), np.stack([expected, expected], axis=1))


def test_marks_that_are_not_there(capsys, pictures, vae, whole, tmp_path, monkeypatch):
    """As when machines do not share the disk: no set, but a sentence; once they do, the rest is done."""
    real, out = ResumableArrays.write, tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ResumableArrays, "write", lambda self, rows, **values: rows.start == 4 or real(
            self, rows, **values))
        assert f"{partial(out)} still lacks 2 row(s)" in refused(capsys, flags(pictures, vae, out))
    assert not out.exists()
    extract(capsys, flags(pictures, vae, out))
    assert contents(out) == contents(whole)


def test_rows_are_written_alone(capsys, pictures, vae, tmp_path, monkeypatch):
    """No file of rows is opened to read and write, and each write is synchronous: NFS might else send pages
    with old copies of other machines' rows. A mark is only written once its rows are."""
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *how: opened.append((Path(path).name, *how)) or real(
        path, *how))
    extract(capsys, flags(pictures, vae, tmp_path / "out"))
    written = [(name, how[0]) for name, *how in opened if name.endswith(".npy")]
    assert [name for name, _ in written] == ["moments.npy", "images.npy", "done-0.npy"] * 7
    assert {how for _, how in written} == {os.O_WRONLY | os.O_DSYNC}


def test_finished_set_is_left_alone(capsys, pictures, vae, whole, tmp_path, monkeypatch):
    """The same command has nothing to do, wherever the images lie; one of other settings is refused."""
    root = shutil.copytree(pictures, tmp_path / "images")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.iterdir()}
    monkeypatch.setattr(extract_latents, "load_vae", None)  # not even loaded
    for name in ("done-0.npy", "done-1.npy", "settings.json", "lock"):
        (whole / name).touch()  # as a kill may leave them
    monkeypatch.chdir(vae.parent)
    assert "complete already" in extract(capsys, flags(root, vae.name, whole))
    for command, says in [(flags(root, vae, whole, "--image-size", 64), "image_size is 32 there and 64 here"),
                          (flags(root, "x", whole), f"vae is {str(vae)!r} there and 'x' here"),
                          (flags(root, vae, whole)[:-1], "store_images is True there and False here")]:
        assert f"latents.json has other settings: {says} (" in refused(capsys, command)
    (root / NAMES[4]).rename(root / "class1" / "02.png")
    assert "files_sha256 is" in refused(capsys, flags(root, vae, whole))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.iterdir()} == before


def test_files_that_are_no_images(capsys, pictures, vae, tmp_path):
    """All are named, and all other batches are done. The set is not read, or gone on with otherwise."""
    root, out = shutil.copytree(pictures, tmp_path / "images"), tmp_path / "out"
    for i, data in ((1, b"no image"), (2, b""), (7, (root / NAMES[7]).read_bytes()[:1500])):
        (root / NAMES[i]).write_bytes(data)
    line = refused(capsys, flags(root, vae, out))
    assert "3 file(s)" in line and [i for i in range(13) if f"{root / NAMES[i]} (" in line] == [1, 2, 7]
    assert np.load(partial(out) / "done-0.npy").tolist() == [0] * 4 + [255, 255, 0, 0] + [255] * 5
    line = refused(capsys, flags(root, vae, out, "--image-size", 16))
    assert "settings.json has other settings: image_size is 32 there and 16 here (" in line
    (partial(out) / "done-0.npy").write_bytes(b"\x93NUMPY")
    assert f"{partial(out)} is damaged" in refused(capsys, flags(root, vae, out))
    with pytest.raises(SystemExit, match="2"):
        Latents(out)
    assert f"unfinished latents at --data {out}" in capsys.readouterr().err


def test_impossible_folders_and_flags(capsys, images, vae, tmp_path, monkeypatch):
    file, hollow, out = tmp_path / "file", tmp_path / "hollow", tmp_path / "out"
    (hollow / "cat" / ".x").mkdir(parents=True)
    for path in (file, hollow / "0.png", hollow / "cat" / ".x" / "0.png"):
        path.write_text("x")
    for root, says in ((tmp_path / "none", "No such file or directory"), (file, "Not a directory")):
        assert refused(capsys, flags(root, vae, out)).endswith(f": {root}: {says}")
    root = hollow / "cat"
    assert f"--images {root} holds no class folders" in refused(capsys, flags(root, vae, out))
    assert f"class folder {hollow / 'cat'} holds no images" in refused(capsys, flags(hollow, vae, out))
    for output in (file, file / "latents"):
        assert str(file) in refused(capsys, flags(images, vae, output))
    for words in ["--image-size 0", "--batch-size many", "--num-workers 0", "--num-worker 1"]:
        assert words.split()[0] in refused(capsys, flags(images, vae, out, *words.split()))
    assert "--images" in refused(capsys, []) and not out.exists() and not partial(out).exists()
    monkeypatch.setattr(sys, "argv", ["extract_latents.py", "--images", "x"])
    assert vars(extract_latents.parse_args()) == {
        "images": "x", "out": "data/latents", "vae": "stabilityai/sd-vae-ft-mse", "image_size": 256,
        "store_images": False, "reconstruct": False, "batch_size": 64, "num_workers": 8}
    status, stdout, _ = cli(capsys, "extract_latents", "--help")
    assert status == 0 and "(default: 256)" in stdout and "default: None" not in stdout
