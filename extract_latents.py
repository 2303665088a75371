"""Encode a folder of class folders into VAE latents, once, before training.

    torchrun --nproc_per_node=8 extract_latents.py --images IMAGENET/train  # or plain `python` on one GPU or a CPU

Writes to --out (default data/latents):

    moments.npy    (N, 2C, H, W)  posterior mean and std of every image, raw (before shift and scale), float16;
                                  with --flip (2N, 2C, H, W): those of the mirrored images follow
    labels.npy     (N,)           int64, the index of the image's class folder in sorted order
    images.npy     (N, S, S, 3)   with --store-images: the cropped images, uint8, for REPA's encoder
    latents.json   VAE, shift, scale, number of classes, origin; written last: marks a complete set

train.py draws z ~ N(mean, std) anew every step and trains on x = (z - shift) * scale. `Latents` below reads the set.
If interrupted, run the same command again.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


def center_crop(image, size):
    """ADM's centre crop of a PIL image to size x size: box-halve while the short side >= 2 * size, bicubic to size, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_image(path, size):
    """An image file of any mode, turned upright by its EXIF tag, as a centre-cropped uint8 RGB array (size, size, 3).

    Alpha is dropped and grey, palette and CMYK are converted as ADM's loader does it, by PIL.
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey: PIL would clip it to 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        return np.array(center_crop(image.convert("RGB"), size))


def list_images(root):
    """(class names, file paths relative to root, label of each file), all in sorted order; hidden files are skipped."""
    root = Path(root)
    if not root.is_dir():
        fail(f"--images {root} is not a folder; give a folder that holds one folder of images per class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        fail(f"--images {root} holds no class folders; put the images into one folder per class (one for all is fine)")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = [os.path.relpath(os.path.join(folder, file), root) for folder, _, names in os.walk(root / name) for file in names]
        found = sorted(path for path in found if "/." not in path)
        if not found:
            fail(f"class folder {root / name} holds no images; remove it or fill it")
        files += found
        labels += [label] * len(found)
    return classes, files, labels


class ImageFiles(Dataset):
    """Item i: (row i, uint8 (3, size, size), ""), or (row i, zeros, what is wrong) for a file that does not decode.

    flip: the mirrored images follow as the second half.
    """

    def __init__(self, root, files, size, flip=False):
        self.root, self.files, self.size, self.flip = root, files, size, flip

    def __len__(self):
        return len(self.files) * (2 if self.flip else 1)

    def __getitem__(self, i):
        mirrored, file = divmod(i, len(self.files))
        path = os.path.join(self.root, self.files[file])
        try:
            image = torch.from_numpy(load_image(path, self.size)).permute(2, 0, 1)
        except Exception as error:  # PIL raises many kinds; one bad file must not stop a million good ones
            return i, torch.zeros(3, self.size, self.size, dtype=torch.uint8), f"{path} ({error})"
        return i, (image.flip(2) if mirrored else image).contiguous(), ""


def load_vae(name):
    """A diffusers autoencoder in float32 from a hub name or a local folder; "owner/name/subfolder" reads a subfolder."""
    name = str(name)
    parts = [name] if Path(name).exists() or name.startswith((".", "/")) else name.split("/")
    repo, subfolder = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        import diffusers  # slow to import, and not needed for training
        import huggingface_hub

        diffusers.utils.logging.set_verbosity_error()
        huggingface_hub.utils.logging.set_verbosity_error()
        config = diffusers.AutoencoderKL.load_config(repo, subfolder=subfolder)
        vae = getattr(diffusers, config["_class_name"]).from_pretrained(repo, subfolder=subfolder)
    except Exception as error:  # hub, network, config and weight errors have no common class
        fail(f"cannot load the VAE {name!r}: {first_line(error)} (give --vae a diffusers autoencoder: a local folder that holds "
             "config.json and its weights, or a hub name that this machine can reach)")
    if not hasattr(vae, "encode") or not hasattr(vae, "decode"):
        fail(f"{name!r} is a {type(vae).__name__}, not an autoencoder")
    return vae.float().eval().requires_grad_(False)


SD_SCALE = 0.18215  # diffusers writes Stable Diffusion's into every config that names no other


def latent_normalization(config):
    """(shift, scale) of a diffusers config, each a float or a list with one per channel: x = (z - shift) * scale.

    (None, None) where the config gives no scale that can be meant, SD_SCALE for other than 4 channels among them.
    """
    config = dict(config)
    for key in ("latents_mean", "latents_std", "shift_factor", "scaling_factor"):
        values = np.ravel(np.array(config.get(key) or 0, object))
        if not all(isinstance(value, (int, float)) for value in values):
            fail(f"the VAE's config has a {key} of {config[key]!r}, which is no number and no list of them; correct its config.json")
    mean, std, shift, factor = (config.get(key) for key in ("latents_mean", "latents_std", "shift_factor", "scaling_factor"))
    channels = config.get("latent_channels")
    for a, b in (("latents_std", "scaling_factor"), ("latents_mean", "shift_factor")):
        if config.get(a) is not None and config.get(b) not in (None, 0, 1, SD_SCALE):
            fail(f"the VAE's config has both {a} and a {b} of {config[b]}: keep the one that is meant in its config.json")
        if config.get(a) is not None and np.size(config[a]) not in (1, channels or np.size(config[a])):
            fail(f"the VAE's config has {np.size(config[a])} values of {a} for {channels} channels; correct its config.json")
    if std is not None:
        scale = (1 / np.ravel(std)).tolist()
    else:
        scale = None if factor == SD_SCALE and channels not in (None, 4) else factor
    if scale is None or not np.isfinite(scale).all() or np.min(scale) <= 0:
        return None, None
    return np.ravel(mean).tolist() if mean is not None else shift or 0.0, scale


def measure_normalization(path):
    """(shift, scale), lists with one per channel, that give x = (z - shift) * scale mean 0 and std 1 over stored moments."""
    moments = np.load(path, mmap_mode="r")
    sums = np.zeros((2, moments.shape[1] // 2))
    for first in tqdm(range(0, len(moments), 1024), desc="measuring mean and std", unit="batch"):
        mean, std = np.split(moments[first : first + 1024].astype(np.float64), 2, axis=1)
        sums += mean.sum((0, 2, 3)), (mean**2 + std**2).sum((0, 2, 3))  # z ~ N(mean, std)
    mean, square = sums / (len(moments) * moments[0, 0].size)
    variance = square - mean**2
    if not (variance > 1e-12 * square).all():
        fail(f"channel {int(np.argmin(variance))} of the latents is constant and cannot be normalised: is this VAE trained?")
    return mean.tolist(), (variance**-0.5).tolist()


@torch.no_grad()
def encode(vae, images):
    """uint8 images (B, 3, S, S) -> raw moments (B, 2C, H, W), mean then std; a deterministic autoencoder has std 0."""
    out = vae.encode(images.float() / 127.5 - 1)
    if hasattr(out, "latent_dist"):
        return torch.cat([out.latent_dist.mean, out.latent_dist.std], dim=1)
    latent = out.latent if hasattr(out, "latent") else out.latents
    return torch.cat([latent, torch.zeros_like(latent)], dim=1)


@torch.no_grad()
def decode(vae, x, shift, scale):
    """Latents x (B, C, H, W) -> uint8 images (B, S, S, 3): z = x / scale + shift, decoded, rounded (not truncated)."""
    z = x.float() / per_channel(scale, x) + per_channel(shift, x)
    images = torch.cat([vae.decode(part).sample.float() for part in z.split(16)])  # in parts: decoding takes memory
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def per_channel(value, x):
    """A float or a list of C floats, shaped to broadcast over x (B, C, H, W)."""
    return torch.tensor(value, dtype=torch.float32, device=x.device).reshape(-1, 1, 1)


# what reading a file of another form than expected may raise
MALFORMED = (AttributeError, EOFError, IndexError, KeyError, RecursionError, RuntimeError, TypeError, ValueError)


def first_line(error):
    """The first line of what an exception says that is no mere heading, or else its type."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.endswith(":")), type(error).__name__)[:300]


def fail(message, status=2):
    """Print one sentence on stderr and exit."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        with contextlib.suppress(ValueError):  # in a thread, which may set no handler
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training only notes it
        time.sleep(10)  # under torchrun the first process speaks for all: once it has failed, torchrun ends the others
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)  # clears the line of a progress bar first
    sys.exit(status)


def run(main):
    """Run a script's main; what the system refuses (a full disk, a folder that may not be written) is one sentence too."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except OSError as error:
        fail(f"{error.filename or 'disk'}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail("interrupted", status=130)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose complaint is one sentence and whose --help shows the defaults."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)

    def group(self, title):
        """add_argument of a new group of flags."""
        return self.add_argument_group(title).add_argument

    def error(self, message):
        fail(f"{message} (--help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def number(text, kind, fits, meaning):
    """Read a flag's value; the types below, for argparse, are this function with its last three arguments given."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not fits(value):  # NaN fits nothing
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
    return value


positive_int = partial(number, kind=int, fits=lambda n: n >= 1, meaning="a whole number above 0")
nonnegative_int = partial(number, kind=int, fits=lambda n: n >= 0, meaning="a whole number of at least 0")
positive_float = partial(number, kind=float, fits=lambda x: x > 0, meaning="a number above 0")
nonnegative_float = partial(number, kind=float, fits=lambda x: x >= 0, meaning="a number of at least 0")
fraction = partial(number, kind=float, fits=lambda x: 0 <= x <= 1, meaning="a number in [0, 1]")


def rng(seed, index, device):
    """A torch.Generator that depends on (seed, index) alone; no two indices of one seed share their numbers."""
    base = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]  # hashed: neighbouring seeds lie far apart
    return torch.Generator(device).manual_seed((int(base) + index) % 2**63)


def read_ahead(read, items, threads=1):
    """read(item) for each item, in order, done by threads while the caller works on earlier items."""
    with ThreadPoolExecutor(threads) as pool:
        coming = deque()
        for item in items:
            coming.append(pool.submit(read, item))
            if len(coming) > threads + 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def init_distributed(backend=None, timeout=timedelta(minutes=15)):
    """(rank, number of processes, device): joined to the others under torchrun, alone (0, 1) under plain python.

    timeout: how long the others wait for a process that hangs.
    """
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local_rank >= torch.cuda.device_count():
        fail(f"there are more processes than this machine's {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
    if cuda:
        torch.cuda.set_device(local_rank)
    kind = "cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(kind, local_rank if cuda else 0)
    if "RANK" not in os.environ:
        return 0, 1, device
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")  # the store still has the addresses of those that were killed
    backend = backend or ("cpu:gloo,cuda:nccl" if cuda else "gloo")  # each device's tensors by its own backend
    dist.init_process_group(backend, timeout=timeout, rank=rank, world_size=world_size,
                            store=dist.PrefixStore(f"start {restarts}", store))
    return dist.get_rank(), dist.get_world_size(), device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def read_json(path):
    """A JSON file that one of the scripts wrote, as a dict."""
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("it holds no settings")
    except (ValueError, RecursionError) as error:
        fail(f"{path} is damaged ({error}); remove what it belongs to and make it again")
    return value


@contextlib.contextmanager
def atomic_write(path):
    """A file to write, which takes its name only once the disk has all of it; where writing fails, nothing of it stays."""
    part = Path(f"{path}.tmp")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(part, path)
    except (OSError, RuntimeError) as error:  # torch.save answers a full disk with a RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(errno.EIO, f"cannot be written, is the disk full? ({first_line(error)})", str(path)) from error


def rename(part, path):
    """Give what is on disk its final name, and wait until the disk has the name too: a power cut may undo it until then."""
    os.replace(part, path)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_json(path, value):
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def lock(path, output):
    """Refuse a second command on the same output. The kernel ends the lock with this process, however that ends.

    A POSIX lock, because worker processes do not inherit it and so cannot outlive this process with it.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_CREAT | os.O_RDWR)  # never closed: that would end the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"another process is writing {output} now; wait for it, or give another output")
    except OSError as error:  # some network file systems have no locks
        tqdm.write(f"warning: {path} cannot be locked ({error.strerror}); run no second command on it", file=sys.stderr)


def check_same_settings(where, there, asked):
    """Fail, naming each setting that differs between what `where` was made with and what is asked for now."""
    differ = [f"{key} is {there.get(key)!r} there and {asked.get(key)!r} here" for key in sorted({*there, *asked})
              if there.get(key) != asked.get(key)]
    if differ:
        fail(f"{where} was made with other settings: {'; '.join(differ)} (give another output, or remove it)")


def is_complete(path, record, settings):
    """Whether `path` is there already, made with these settings, which are in `record`; fails if with others."""
    if not path.exists():
        return False
    if not record.exists():
        fail(f"{path} exists, without {record}, which would say how it was made; give another output, or remove it")
    check_same_settings(path, read_json(record), settings)
    clean_up(path)  # of a command killed as it was doing so
    print(f"{path} is complete already")
    return True


class ResumableArray:
    """An array on disk that several processes fill in batches of rows, and that a killed command continues.

    PATH.partial holds the array as .npy, PATH.progress one byte per row, 1 once the row is on disk, and PATH.settings what
    the rows were made with; PATH itself is written by the caller, or by finish(), only when every row is there.
    """

    def __init__(self, path, shape, dtype, settings, rank=0):
        self.dtype = dtype
        self.path, self.partial, self.progress, self.settings = (
            Path(f"{path}{end}") for end in ("", ".partial", ".progress", ".settings"))
        if rank == 0:
            lock(f"{path}.lock", path)
        if self.settings.exists():
            check_same_settings(self.partial, read_json(self.settings), settings)
            self.check(shape)
        elif rank == 0:
            try:
                np.lib.format.open_memmap(self.partial, "w+", dtype, shape)
                self.progress.write_bytes(bytes(shape[0]))
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.partial)) from error
            write_json(self.settings, settings)  # last: it says that the two others are ready
        barrier()

    def check(self, shape):
        """Fail if what a power cut may lose is not there, rather than take rows that nobody wrote for done."""
        try:
            done = self.progress.read_bytes()
            whole = len(done) == shape[0] and (
                (all(done) and not self.partial.exists()) or np.load(self.partial, mmap_mode="r").shape == tuple(shape))
        except (OSError, ValueError, EOFError):
            whole = False
        if not whole:
            fail(f"{self.partial} or {self.progress} is damaged; remove both and {self.settings}, and run the same command again")

    def batches(self, batch_size, rank=0, world_size=1):
        """This process's share of the batches still to do, as ranges of rows.

        Their bounds are fixed, so that a continued run computes the same batches as an undisturbed one.
        """
        done = np.frombuffer(self.progress.read_bytes(), np.uint8)
        barrier()  # all have read it before any goes on to write
        starts = [i for i in range(0, len(done), batch_size) if not done[i : i + batch_size].all()]
        return [range(i, min(i + batch_size, len(done))) for i in starts[rank::world_size]]

    def write(self, rows, values):
        """Store the values of a range of rows, and mark the rows done once the disk has them."""
        array = np.load(self.partial, mmap_mode="r")
        write_at(self.partial, array.offset + rows.start * array[0].nbytes, np.asarray(values, array.dtype).tobytes())
        write_at(self.progress, rows.start, b"\1" * len(rows))

    def finish(self):
        """Give the array its final name, unless that has happened before."""
        assert all(self.progress.read_bytes()), f"{self.progress} has rows that nobody wrote"
        if self.partial.exists():
            rename(self.partial, self.path)


def clean_up(path):
    """Remove what a ResumableArray keeps beside its output, once that is whole."""
    for end in (".settings", ".partial", ".progress", ".lock"):
        Path(f"{path}{end}").unlink(missing_ok=True)


def write_at(path, offset, data):
    try:
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class BackgroundWriter:
    """A thread that stores results, in order, while the caller computes the next ones.

    Leaving the `with` block waits until all is stored; what goes wrong in the thread is raised in the caller.
    """

    def __init__(self):
        self.thread, self.pending = ThreadPoolExecutor(1), deque()

    def put(self, store, rows, values):
        """Have store(rows, values) called, values a tensor here and a numpy array there, once the device has computed them."""
        while len(self.pending) >= 2:  # bounds the memory, and how far the caller runs ahead of the device
            self.pending.popleft().result()
        ready = torch.cuda.Event(blocking=True) if values.is_cuda else None
        values = values.to("cpu", non_blocking=values.is_cuda)  # from CUDA into pinned memory, without waiting for it
        if ready:
            ready.record()
        self.pending.append(self.thread.submit(self.store, store, rows, values, ready))

    def store(self, store, rows, values, ready):
        if ready:
            ready.synchronize()
        store(rows, values.numpy())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.thread.shutdown()  # waits: what is computed is kept even if the caller failed
        while self.pending and error[0] is None:
            self.pending.popleft().result()


class Latents:
    """Reads what this script wrote, or a set made by hand: moments.npy and labels.npy as above, and a latents.json
    with at least {"vae": name, "shift": float or list, "scale": float or list, "num_classes": int}.

    facts: what training and sampling need to know of the set, and a resumed run must find unchanged: these keys,
    latent_shape [C, H, W], count, flip and, with_images, image_size. Errors are one sentence.
    """

    def __init__(self, folder, with_images=False):
        folder = Path(folder)
        if not (folder / "latents.json").exists():
            if (folder / "moments.npy.settings").exists():
                fail(f"the latents at {folder} are unfinished; run the same extract_latents.py command again")
            fail(f"no latents at --data {folder}; make them with `python extract_latents.py --images FOLDER "
                 f"--out {folder}`, or see the whole pipeline on drawn images with `python tests/demo.py`")
        if with_images and not (folder / "images.npy").exists():
            fail(f"--repa-depth needs the images, and {folder} has no images.npy: extract with --store-images")
        try:
            about = json.loads((folder / "latents.json").read_text())
            self.moments = np.load(folder / "moments.npy", mmap_mode="r")
            self.labels = np.load(folder / "labels.npy").astype(np.int64, casting="safe")
            self.images = np.load(folder / "images.npy", mmap_mode="r") if with_images else None
            self.shift, self.scale = (np.array(about[key], np.float32).reshape(-1, 1, 1) for key in ("shift", "scale"))
            self.facts = {key: about[key] for key in ("vae", "shift", "scale", "num_classes")}
            self.facts |= {"files_sha256": about.get("files_sha256"), **self.check()}
        except (OSError, *MALFORMED) as error:
            fail(f"the latents at {folder} are damaged ({type(error).__name__}: {first_line(error)}); remove the "
                 "folder and extract them again")

    def check(self):
        """The facts that the arrays tell; raises ValueError where they do not fit together."""
        rows, channels, height, width = self.moments.shape
        count, channels, num_classes = len(self.labels), channels // 2, self.facts["num_classes"]
        if self.moments.dtype.kind != "f" or not self.moments.flags.c_contiguous:
            raise ValueError("moments.npy is not an array of floats in C order")
        if self.moments.shape[1:] != (2 * channels, height, height):
            raise ValueError(f"moments of shape {self.moments.shape} are not (N, 2C, H, H)")
        if self.labels.shape != (count,) or rows not in (count, 2 * count):
            raise ValueError(f"there are {rows} rows of moments and labels of shape {self.labels.shape}")
        if type(num_classes) is not int or self.labels.min() < 0 or self.labels.max() >= num_classes:
            raise ValueError(f"labels are {self.labels.min()} to {self.labels.max()}, num_classes is {num_classes}")
        for value in (self.shift, self.scale):
            if len(value) not in (1, channels) or not np.isfinite(value).all():
                raise ValueError(f"shift and scale must each be one number or {channels}")
        if (self.scale <= 0).any():
            raise ValueError(f"scale is {self.facts['scale']}, not above 0")
        facts = {"latent_shape": [channels, height, width], "count": count, "flip": rows > count}
        if self.images is not None:
            size = facts["image_size"] = self.images.shape[1]
            if self.images.shape != (count, size, size, 3) or self.images.dtype != np.uint8:
                raise ValueError(f"images.npy holds {self.images.dtype} of shape {self.images.shape}, and there are "
                                 f"{count} labels")
            if not self.images.flags.c_contiguous:
                raise ValueError("images.npy is not in C order")
        return facts

    def read(self, rows):
        """Normalised mean and std, of x = (z - shift) * scale, (B, C, H, W) float32; labels (B,) int64; and, with_images,
        images (B, 3, S, S) uint8: all tensors. rows: (B,) integers; those from `count` on are mirror images.
        """
        mean, std = np.split(read_rows(self.moments, rows).astype(np.float32), 2, axis=1)
        mirrored, rows = np.divmod(rows, len(self.labels))
        arrays = [(mean - self.shift) * self.scale, std * self.scale, self.labels[rows]]
        if self.images is not None:
            images = read_rows(self.images, rows).transpose(0, 3, 1, 2)
            arrays.append(np.where(mirrored.reshape(-1, 1, 1, 1), images[..., ::-1], images))
        return tuple(map(torch.from_numpy, arrays))


def read_rows(array, rows):
    """array[rows] of a memory-mapped array. Unlike page faults, these system calls let the other threads run."""
    size = array[0].nbytes
    with open(array.filename, "rb") as file:
        found = [os.pread(file.fileno(), size, array.offset + int(row) * size) for row in rows]
    return np.frombuffer(b"".join(found), array.dtype).reshape(len(rows), *array.shape[1:])


def encode_files(vae, batches, moments, files, device, stored=None):
    """Encode the batches of ImageFiles into the array `moments`, and put the images themselves into `stored` if it is given.

    Returns what is wrong with the files that do not decode.
    """
    bad = []
    with BackgroundWriter() as writer:
        for rows, images, errors in batches:
            bad += filter(None, errors)
            values = encode(vae, images.to(device, non_blocking=True))
            if not any(errors):
                store = partial(store_batch, moments, stored, files, images if stored else None)
                writer.put(store, range(int(rows[0]), int(rows[-1]) + 1), values)
    return bad


def store_batch(moments, stored, files, images, rows, values):
    """Write float32 values (B, 2C, H, W) to their rows, unless the stored type cannot hold them, and images (B, 3, S, S)."""
    with np.errstate(over="ignore"):
        values = values.astype(moments.dtype)
    if not np.isfinite(values).all():
        first, last = (files[row % len(files)] for row in (rows[0], rows[-1]))
        fail(f"the VAE gives latents that {moments.dtype} cannot hold for a file from {first} to {last}; try --dtype float32")
    upright = range(rows.start, min(rows.stop, len(files)))  # the mirrored half needs no images
    if stored and upright:
        stored.write(upright, images[: len(upright)].permute(0, 2, 3, 1).numpy())
    moments.write(rows, values)  # last: a row counts as done once its moments are


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("--images", required=True, help="folder that holds one folder of images per class")
    parser.add_argument("--out", default="data/latents", help="folder to write")
    parser.add_argument("--vae", default="stabilityai/sd-vae-ft-mse", help="diffusers autoencoder: hub name or local folder")
    parser.add_argument("--image-size", type=positive_int, default=256, help="side of the centre crop in pixels")
    parser.add_argument("--flip", action="store_true", help="store the moments of the mirrored images too, for training to draw from")
    parser.add_argument("--store-images", action="store_true", help="keep the cropped images, which train.py --repa-depth needs")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="of the stored moments")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images per forward on one device")
    parser.add_argument("--num-workers", type=nonnegative_int, default=8, help="processes per GPU that decode and crop images")
    return parser.parse_args()


def main():
    args = parse_args()
    classes, files, labels = list_images(args.images)
    out, listing = Path(args.out), hashlib.sha256(os.fsencode("\n".join(files))).hexdigest()
    vae_name = str(Path(args.vae).resolve()) if Path(args.vae).is_dir() else args.vae
    settings = {"vae": vae_name, "image_size": args.image_size, "dtype": args.dtype, "count": len(files),
                "files_sha256": listing, "flip": args.flip, "store_images": args.store_images}
    if (out / "latents.json").exists():
        there = {"flip": False, "store_images": False, **read_json(out / "latents.json")}
        check_same_settings(out, {key: there.get(key) for key in settings}, settings)
        for name in ("moments.npy", "images.npy"):
            clean_up(out / name)  # of a command killed as it was doing so
        print(f"{out} is complete already: {len(files)} images")
        return

    vae = load_vae(args.vae)
    shift, scale = latent_normalization(vae.config)
    rank, world_size, device = init_distributed("gloo", timedelta(days=2))  # the processes only meet at the end
    vae.to(device)
    try:
        latent = encode(vae, torch.zeros(1, 3, args.image_size, args.image_size, device=device))
        side = decode(vae, latent.chunk(2, dim=1)[0], shift or 0.0, scale or 1.0).shape[1]
    except (RuntimeError, ValueError, TypeError) as error:
        fail(f"the VAE cannot encode images of --image-size {args.image_size}: {first_line(error)}")
    if side != args.image_size:
        fail(f"the VAE makes images of {side} pixels out of those of --image-size {args.image_size}: take a multiple of what "
             "one latent pixel covers")
    channels, height, width = latent.shape[1] // 2, *latent.shape[2:]

    dataset, stored = ImageFiles(args.images, files, args.image_size, args.flip), None
    if args.store_images:
        stored = ResumableArray(out / "images.npy", (len(files), side, side, 3), "uint8", settings, rank)
    moments = ResumableArray(out / "moments.npy", (len(dataset), *latent.shape[1:]), args.dtype, settings, rank)
    batches = moments.batches(args.batch_size, rank, world_size)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=args.num_workers, pin_memory=device.type == "cuda")
    progress = tqdm(loader, desc=f"encoding, {world_size} process(es)", unit="batch", disable=rank > 0)
    bad = encode_files(vae, progress, moments, files, device, stored)
    if world_size > 1:
        everyones = [None] * world_size
        dist.all_gather_object(everyones, bad)
        bad = sum(everyones, [])
    if bad:
        fail(f"{len(bad)} file(s) cannot be read as images: {'; '.join(bad[:10])} (put a good image in the place of each and "
             "run the same command again, it continues; or remove them, and --out with them)")

    if rank == 0:
        for array in filter(None, (stored, moments)):
            array.finish()
        with atomic_write(out / "labels.npy") as file:
            np.save(file, np.array(labels, np.int64))
        if scale is None:
            print(f"the config of {vae_name} gives no scale for its latents; they are normalised by their own mean and std")
            shift, scale = measure_normalization(moments.path)
        origin = {"images": str(Path(args.images).resolve()), "crop": "ADM centre crop", "torch": torch.__version__}
        write_json(out / "latents.json", {**settings, "latent_shape": [channels, height, width], "shift": shift,
                                          "scale": scale, "num_classes": len(classes), "class_names": classes,
                                          "made_with": origin})
        for array in filter(None, (stored, moments)):
            clean_up(array.path)
        print(f"{out}: {len(files)} images of {len(classes)} classes, latents {channels}x{height}x{width}")


if __name__ == "__main__":
    run(main)
