"""Encode a folder of class folders into VAE latents, once, before training.

    torchrun --nproc_per_node=8 extract_latents.py --images IMAGENET/train   # or `python` on one device

makes the folder --out, which gets its name when it is complete; its rows are the images by folder and path:

    moments.npy  (N, 2C, H, W)  float16: mean and std of each image's posterior, before shift and scale
    labels.npy   (N,)           int64: the index of the image's class folder in sorted order
    images.npy   (N, S, S, 3)   uint8: with --store-images, the cropped images, for REPA
    latents.json                VAE, shift, scale, number of classes
    reconstructions.npy         uint8: with --reconstruct, the decoded means, for fid.py's rFID

train.py draws z ~ N(mean, std) anew every step and trains on x = (z - shift) * scale. If interrupted, run
the same command again.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from tqdm import tqdm

# ---- Images


def center_crop(image, size):
    """ADM's crop of a PIL image: box-halve to a short side < 2 size, bicubic to size, then the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


# what PIL decodes itself: for EPS, under any name, it would run Ghostscript
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def load_image(path, size=None):
    """An image file as uint8 RGB (H, W, 3), upright by its EXIF tag; given a size, its crop (size, size, 3).

    Alpha is dropped, and other modes are converted by PIL, as in ADM.
    """
    with Image.open(regular(path), formats=FORMATS) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey: PIL would clip it to 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        image = image.convert("RGB")
        return np.array(center_crop(image, size) if size else image)


def load_batch(files, size=None):
    """(images of the files, a list of arrays; what is wrong with those that cannot be read)."""
    images, errors = [], []
    for file in files:
        try:
            images.append(load_image(file, size))
        except Exception as error:  # PIL raises many kinds; one bad file must not stop the others
            errors.append(f"{file} ({first_line(error)})")
    return images, errors


def files_in(folder, seen):
    """Sorted paths of all files in a folder; follows links, skips hidden names. seen: folders met before.

    Raises OSError for a folder that cannot be read or is met again.
    """
    folders, files = [str(folder)], []
    for each in folders:  # which grows
        if (real := os.path.realpath(each)) in seen:
            raise OSError(errno.ELOOP, "is the same folder as another", each)
        seen.add(real)
        for entry in os.scandir(each):
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else files).append(entry.path)
    return sorted(files)


def list_images(root):
    """(class names, file paths, label of each file), all in sorted order; hidden files are skipped."""
    classes = sorted(x.name for x in os.scandir(root) if x.is_dir() and not x.name.startswith("."))
    if not classes:
        fail(f"--images {root} holds no class folders; put the images into one per class, or all into one")
    files, labels, seen = [], [], set()
    for label, name in enumerate(classes):
        found = files_in(Path(root, name), seen)
        if not found:
            fail(f"class folder {Path(root, name)} holds no images; fill it, or move it away")
        files += found
        labels += [label] * len(found)
    return classes, files, labels


# ---- The VAE


def load_vae(name, content=None):
    """A diffusers autoencoder in float32: a folder, or "owner/name[/subfolder]" on the hub.

    content: the folder's `content_id`, if known. Raises ValueError for other or missing weights.
    """
    import diffusers  # slow to import, and not needed for training
    from huggingface_hub import errors, snapshot_download

    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # errors are raised, too
    folder = Path(name)
    if not folder.exists():
        repo, inside = "/".join(name.split("/")[:2]), name.split("/")[2:]
        files = ("config.json", "diffusion_pytorch_model.safetensors")
        files = ["/".join([*inside, file]) for file in files]
        try:
            folder = Path(snapshot_download(repo, allow_patterns=files), *inside)
        except (errors.HFValidationError, errors.LocalEntryNotFoundError):
            moved = "; if moved, put its path into latents.json, or use sample.py --vae" if content else ""
            raise ValueError(f"there is no such folder, and the hub was not reached{moved}") from None
    elif content and content_id(name) != content:
        raise ValueError("its weights are not those that made the latents")
    config = diffusers.AutoencoderKL.load_config(folder)
    network = getattr(diffusers, config["_class_name"])
    vae, loaded = network.from_pretrained(folder, output_loading_info=True)
    if missing := loaded["missing_keys"]:
        raise ValueError(f"its file has no {missing[0]}, and lacks {len(missing)} weights in all")
    return vae.float().eval().requires_grad_(False)


def latent_normalization(config):
    """(shift, scale) of a diffusers VAE's config, floats or one per channel: x = (z - shift) * scale."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    shift, scale = config.get("shift_factor"), config.get("scaling_factor")
    if std and not shift and scale in (None, 1, 0.18215):
        return list(mean or [0.0]), [1 / value for value in std]
    # 0.18215 is Stable Diffusion's, and diffusers writes it into every config that names no other
    repa_e = re.search(r"(/|--)e2e-[^/]*(/snapshots/\w+)?$", str(config.get("_name_or_path")))
    if std or mean or not scale or scale == 0.18215 and (repa_e or config.get("latent_channels") != 4):
        raise ValueError("its config.json must give either latents_mean and latents_std or a scaling_factor")
    return shift or 0.0, scale


def per_channel(shift, scale, channels):
    """[shift, scale] as float32 arrays (1 or channels, 1, 1). Raises ValueError if they are none."""
    arrays = [np.array(value, np.float32).reshape(-1, 1, 1) for value in (shift, scale)]
    np.broadcast_to(sum(arrays), (channels, 1, 1))
    if not np.isfinite(sum(arrays)).all() or arrays[1].min() <= 0:
        raise ValueError("shift must be finite, and scale above 0")
    return arrays


def finite(x, rows):
    """x (B, …), of images `rows`. Raises FloatingPointError if not all of it is finite."""
    bad = [i for i, good in zip(rows, x.flatten(1).isfinite().all(1).tolist()) if not good]
    if bad:
        raise FloatingPointError(f"not finite: image(s) {str(bad[:10])[1:-1]}")
    return x


@torch.no_grad()
def encode(vae, images):
    """uint8 images (B, 3, S, S) -> raw moments (B, 2C, H, W): mean, then std, 0 if there is no posterior."""
    out = vae.encode(images.float() / 127.5 - 1)
    if hasattr(out, "latent_dist"):
        return torch.cat([out.latent_dist.mean, out.latent_dist.std], dim=1)
    latent = out.latent if hasattr(out, "latent") else out.latents
    return torch.cat([latent, torch.zeros_like(latent)], dim=1)


@torch.no_grad()
def decode(vae, x, shift, scale, rows=range(10**6)):
    """Latents x (B, C, H, W) -> uint8 images (B, S, S, 3): z = x / scale + shift, decoded, rounded.

    rows: the images' numbers, for the error of `finite`.
    """
    shift, scale = (torch.from_numpy(a).to(x.device) for a in per_channel(shift, scale, x.shape[1]))
    z = x.float() / scale + shift
    images = torch.cat([vae.decode(part).sample.float() for part in z.split(16)])  # in parts: it takes memory
    images = (finite(images, rows) + 1) * 127.5
    return images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


# ---- On disk: what is stored, its writer and its reader


class ResumableArrays:
    """Arrays that processes fill in batches of rows, on one machine or more; if killed, run the same again.

    In the folder OUT.partial: NAME.npy, of full size; done-RANK.npy, 255 for each row that this process has
    put on disk; and settings.json, what decides the rows. shapes: {name: (shape, dtype)}.
    """

    def __init__(self, out, settings, count, shapes, rank=0, world_size=1):
        self.folder, self.rank, self.world_size = Path(f"{out}.partial"), rank, world_size
        marks = {f"done-{i}": ((count,), "uint8") for i in range(world_size)}
        self.shapes = {**marks, **shapes}
        record = self.folder / "settings.json"
        if rank == 0:
            names = {path.name for path in self.folder.glob("[!.]*")}  # NFS hides those deleted while in use
            if "done-0.npy" not in names and names - {"lock", "done-0.npy.tmp"}:  # those come before it
                fail(f"{self.folder} is in the way, and not from this command; give another output")
            lock(self.folder / "lock", out)
            if os.path.lexists(out):
                fail(f"another process has just made {out}; run the same command again to see")
            if begun := record.exists():
                check_same_settings(record, settings)
            size = {k: math.prod(shape) * np.dtype(kind).itemsize for k, (shape, kind) in self.shapes.items()}
            total, free = sum(size.values()), shutil.disk_usage(self.folder).free
            if total > free and not begun:
                fail(f"{self.folder} would take {total / 2**30:.1f} GiB, and {free / 2**30:.1f} are free")
            for name, (shape, dtype) in self.shapes.items():
                if not begun or name in marks and f"{name}.npy" not in names:  # now there are more processes
                    with atomic_write(self.folder / f"{name}.npy") as file:  # zeros, which take no space yet
                        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                        file.truncate(file.tell() + size[name])
            if not begun:
                write_json(record, settings)  # last: the arrays are ready
        barrier()
        try:
            list(map(self.load, self.shapes))
            self.done()
        except Exception as error:  # of many kinds
            fail(f"{self.folder} is damaged, or not on a disk that all machines share ({first_line(error)}); "
                 "if damaged, remove it and run the same command again")

    def load(self, name):
        array = np.load(regular(self.folder / f"{name}.npy"), mmap_mode="r")
        if (array.shape, array.dtype.name) != self.shapes.get(name, self.shapes["done-0"]):
            raise ValueError(f"{name}.npy is {array.dtype} {array.shape}")
        return array

    def done(self):
        """Which rows are on disk (count,), by the marks of all processes, now and before."""
        marks = np.array([self.load(path.stem) for path in self.folder.glob("done-*.npy")])
        if not np.isin(marks, (0, 255)).all():
            raise ValueError("its marks are not 0 or 255")
        return marks.any(0)

    def batches(self, batch_size):
        """This process's share of the batches to do: ranges of rows, cut at multiples of batch_size."""
        done = self.done()
        barrier()  # before any writes
        starts = [i for i in range(0, len(done), batch_size) if not done[i : i + batch_size].all()]
        return [range(i, min(i + batch_size, len(done))) for i in starts[self.rank :: self.world_size]]

    def write(self, rows, **values):
        """Write a batch, then mark it done; not through a memory map: a full disk would kill the process."""
        for name, value in {**values, f"done-{self.rank}": np.full(len(rows), 255)}.items():
            array = self.load(name)
            with writing(array.filename, "wb", in_place) as file:
                file.seek(array.offset + rows.start * array[:1].nbytes)
                file.write(np.ascontiguousarray(value, array.dtype))

    def finish(self):
        """Wait for all processes; fail unless every row is on disk."""
        barrier()
        if self.rank == 0 and (left := int((~self.done()).sum())):
            fail(f"{self.folder} still lacks {left} row(s): is it on a disk that all machines share? Run the "
                 "same command again")


class Latents:
    """Reads what this script made, or a user; KEYS are what latents.json needs at least.

    extras: names of further arrays NAME.npy, with a row for each image, such as "images", for `read` to add.
    facts: what training and sampling need, and a resumed run must find unchanged: these keys, latent_shape
    [C, H, W], count, a hash of labels and first moments, and if there are class_names and image_size.
    """

    KEYS = {"vae": "a diffusers autoencoder, to decode samples", "shift": "of x = (z - shift) * scale",
            "scale": "of x = (z - shift) * scale", "num_classes": "labels are from 0 to num_classes - 1"}

    def __init__(self, folder, extras=()):
        folder = Path(folder)
        if not (folder / "latents.json").exists():
            state = "unfinished" if Path(f"{folder}.partial").exists() else "no"
            fail(f"{state} latents at --data {folder}; run `python extract_latents.py --images FOLDER --out "
                 f"{folder}`, or `python tests/demo.py`, the whole pipeline on drawn images")
        cure = "README, Add your own, says what they must be"
        try:
            about = json.loads(regular(folder / "latents.json").read_text())
            if "files_sha256" in about:  # of this script
                cure = "if damaged, remove them and extract them again"
            if missing := [key for key in self.KEYS if key not in about]:
                raise ValueError(f"latents.json has no {missing[0]}: {self.KEYS[missing[0]]}")
            self.arrays = {name: np.load(regular(folder / f"{name}.npy"), mmap_mode="r")
                           for name in ("labels", "moments", *extras)}
            (count, channels, side, _), n = self.arrays["moments"].shape, about["num_classes"]
            if "vae_content" not in about:  # made by hand; else it was read in extraction, and is large
                about["vae_content"] = content_id(str(about["vae"]))
            keys = (*self.KEYS, "vae_content", "files_sha256")
            self.facts = {**{key: about.get(key) for key in keys}, "count": count,
                          "latent_shape": [channels // 2, side, side]}
            integers = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"]
            forms = {"moments": (["float16", "float32"], (count, channels // 2 * 2, side, side)),
                     "labels": (integers, (count,))}
            if "images" in extras:
                self.facts["image_size"] = size = self.arrays["images"].shape[1]
                forms["images"] = (["uint8"], (count, size, size, 3))
            for name, array in self.arrays.items():
                dtypes, shape = forms.get(name, ([array.dtype.name], (count, *array.shape[1:])))
                if array.dtype.name not in dtypes or array.shape != shape or not array.flags.c_contiguous:
                    order = "C" if array.flags.c_contiguous else "Fortran"
                    raise ValueError(f"{name}.npy is {array.dtype} {array.shape} in {order} order, not "
                                     f"{' or '.join(dtypes)} {shape} in C order")
                torch.from_numpy(np.empty(0, array.dtype))  # TypeError for what torch does not have
            self.labels = self.arrays.pop("labels").astype(np.int64)
            if not isinstance(n, int) or not 0 <= self.labels.min() <= self.labels.max() < n:
                raise ValueError("labels must be from 0 to num_classes - 1")
            if not isinstance(about["vae"], str):
                raise ValueError("vae must be a name or a folder")
            if names := about.get("class_names"):
                self.facts["class_names"] = names
                if not isinstance(names, list) or [type(name) for name in names] != n * [str]:
                    raise ValueError("class_names must be a list of num_classes names")
            first = np.array(self.arrays["moments"][:100])  # all may be 21 GB
            self.facts["latents_sha256"] = hashlib.sha256(first.tobytes() + self.labels.tobytes()).hexdigest()
            if (first[:, channels // 2 :] < 0).any():
                raise ValueError("moments.npy has standard deviations below 0: log-variances, other axes?")
            self.shift, self.scale = per_channel(about["shift"], about["scale"], channels // 2)
        except FileNotFoundError as error:
            repa = ", which REPA needs: extract again, with --store-images"
            fail(f"there is no {error.filename}{repa if 'images.npy' in str(error) else ''}")
        except Exception as error:  # files can be wrong in many ways
            fail(f"the latents at {folder} cannot be used ({type(error).__name__}: {first_line(error)}); "
                 f"{cure}")

    def rows(self, step, batch_size, seed):
        """Rows (batch_size,) of a training step's batch, cut from an endless series of shuffled epochs."""
        count, positions = self.facts["count"], np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, places = np.divmod(positions, count)
        rows = [epoch_order(count, seed, int(e))[places[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(rows)

    def read(self, rows):
        """Of these rows (B,), tensors by name: "mean" and "std" of x = (z - shift) * scale, (B, C, H, W)
        float32; "labels" (B,) int64; and the extras as they are, but "images" as (B, 3, S, S) uint8.
        """
        found = {name: read_rows(array, rows) for name, array in self.arrays.items()}
        mean, std = np.split(found.pop("moments").astype(np.float32), 2, axis=1)
        if "images" in found:
            found["images"] = found["images"].transpose(0, 3, 1, 2)
        found["mean"], found["std"] = (mean - self.shift) * self.scale, std * self.scale
        found["labels"] = self.labels[rows]
        return {name: torch.from_numpy(array) for name, array in found.items()}


@functools.lru_cache(maxsize=4)
def epoch_order(count, seed, epoch):
    return np.random.default_rng([seed, 2, epoch]).permutation(count)


def read_rows(array, rows):
    """array[rows] of a memory-mapped array, by system calls: a page fault would hold the GIL."""
    found = np.empty((len(rows), *array.shape[1:]), array.dtype)
    with open(array.filename, "rb") as file:
        for i, row in enumerate(rows):
            buffer = found[i : i + 1]
            if os.preadv(file.fileno(), [buffer], array.offset + int(row) * buffer.nbytes) < buffer.nbytes:
                raise OSError(errno.EIO, "ends too early", array.filename)
    return found


# ---- The command


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--images", required=True, help="folder that holds one folder of images per class")
    add("--out", default="data/latents", help="folder to make")
    add("--vae", default="stabilityai/sd-vae-ft-mse",
        help="autoencoder of diffusers: a folder, or owner/name[/subfolder] on the hub")
    add("--image-size", type=positive_int, default=256, help="side of the centre crop in pixels")
    add("--store-images", action="store_true", help="store the cropped images, for REPA")
    add("--reconstruct", action="store_true", help="store what the VAE makes of them, for rFID")
    add("--batch-size", type=positive_int, default=64, help="images per forward on one device")
    add("--num-workers", type=positive_int, default=8, help="threads per device that decode and crop images")
    return parser.parse_args()


def main():
    args = parse_args()
    classes, files, labels = list_images(args.images)
    out, count, size = Path(args.out), len(files), args.image_size
    listing = "\n".join(os.path.relpath(file, args.images) for file in files)
    settings = {"vae": str(Path(args.vae).resolve()) if Path(args.vae).is_dir() else args.vae,
                "vae_content": content_id(args.vae), "image_size": size,
                "store_images": args.store_images, "reconstruct": args.reconstruct,
                "files_sha256": hashlib.sha256(os.fsencode(listing)).hexdigest()}
    rank, world_size, device = init_distributed("gloo", timedelta(days=2))
    agree({**settings, f"whether {out} exists": out.exists()})
    if already_complete(out, out / "latents.json", settings):
        return

    try:
        vae = load_vae(args.vae).to(device)
        shift, scale = latent_normalization(vae.config)
        moments = encode(vae, torch.zeros(1, 3, size, size, device=device))
        side = decode(vae, moments.chunk(2, dim=1)[0], shift, scale).shape[1]
        if side != size:
            raise ValueError(f"it gives back {side} pixels; take a multiple of what a latent pixel covers")
    except Exception as error:  # hub, config, weights, sizes
        fail(f"--vae {args.vae} cannot be used with --image-size {size}: {first_line(error)}")
    shapes = {"moments": ((count, *moments.shape[1:]), "float16")}
    for name, wanted in (("images", args.store_images), ("reconstructions", args.reconstruct)):
        if wanted:
            shapes[name] = (count, size, size, 3), "uint8"
    arrays = ResumableArrays(out, settings, count, shapes, rank, world_size)

    batches = arrays.batches(args.batch_size)
    loaded = read_ahead(lambda rows: load_batch([files[i] for i in rows], size), batches, args.num_workers)
    progress = Progress(batches, "encoding", unit="batch")
    bad = []
    for rows, (images, errors) in zip(progress, loaded):
        bad += errors
        if not errors:
            images = torch.from_numpy(np.stack(images))
            moments = encode(vae, images.to(device).permute(0, 3, 1, 2).contiguous())
            values = {"moments": finite(moments.half(), rows).cpu(), "images": images}
            if args.reconstruct:
                values["reconstructions"] = decode(vae, moments.chunk(2, dim=1)[0], 0.0, 1.0, rows).cpu()
            arrays.write(rows, **{name: values[name] for name in shapes})
    if bad := sum(gather(bad), []):
        fail(f"{len(bad)} file(s) are no images: {'; '.join(bad[:10])} (replace them and run the same "
             f"command again, or move them away and remove {arrays.folder})")
    arrays.finish()
    if rank > 0:
        return

    with atomic_write(arrays.folder / "labels.npy") as file:
        np.save(file, np.array(labels, np.int64))
    write_json(arrays.folder / "latents.json", {
        **settings, "shift": shift, "scale": scale, "num_classes": len(classes), "class_names": classes})
    os.replace(arrays.folder, out)
    sync(out.parent)
    remove_marks(out)
    print(f"{out}: {count} images of {len(classes)} classes, moments {list(moments.shape[1:])}")


# ---- Shared by the scripts


def first_line(error):
    """The first line of what an exception says that is no mere heading, or else its type."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and line[-1] != ":"), type(error).__name__)[:300]


def fail(message, status=2):
    """Print one sentence on stderr and exit."""
    if os.environ.get("LOCAL_RANK", "0") != "0":  # the first process speaks; torchrun then ends the others
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    message = str(message).replace("\n", "\\n")  # of a file's name
    for bar in list(tqdm._instances):  # else they would come after the error
        bar.close()
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(status)


def run(main):
    """Run a script's main; what the system refuses, as a full disk, is one sentence."""
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))  # if closed
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # names of files may be no text
    if any(re.fullmatch(r"(--[\w-]+=)?\s*", word) for word in sys.argv[1:]):
        fail("an argument is empty: is a variable of the shell not set?")
    if not all(os.environ.get(name, "1").isdecimal() for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        fail("RANK, LOCAL_RANK and WORLD_SIZE must be numbers, as torchrun sets them, or not be set")
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # one that ends amid an operation aborts
            dist.destroy_process_group()
    except OSError as error:
        fail(f"{error.filename or 'disk'}: {error.strerror or error}")
    except FloatingPointError as error:
        fail(f"{error} (damaged weights? too large a flag?)")
    except (MemoryError, RuntimeError) as error:
        if "by peer" in str(error):
            sys.stderr.write("another process ended or cannot be reached\n")
            os._exit(2)
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not out_of_memory and not re.search("t allocate|overflow", str(error)):
            raise
        fail(f"{first_line(error)} (lower --batch-size, or in training --micro-batch)")
    except KeyboardInterrupt:
        fail("interrupted", status=130)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        known = action.default is None or "(default" in action.help
        return action.help if known else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in its --help, and complaints of one sentence, also of a GPU out of sight."""

    def __init__(self, doc=None, **options):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def parse_args(self, *words):
        args = super().parse_args(*words)
        if unseen_gpu():
            fail(f"torch {torch.__version__} sees none of this machine's GPUs: is the driver older than CUDA "
                 f"{torch.version.cuda}? (to run on the CPU, put CUDA_VISIBLE_DEVICES= before the command)")
        return args

    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def unseen_gpu():
    """Whether there is a GPU that torch should see and does not, and nobody has hidden it."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and torch.version.cuda
    return bool(wanted and os.path.exists("/dev/nvidiactl") and not torch.cuda.is_available())


def positive_int(text):
    if not 0 < int(text) < 2**40:
        raise ValueError  # argparse then names the flag and the type
    return int(text)


def nonnegative_int(text):
    if not 0 <= int(text) < 2**63:
        raise ValueError
    return int(text)


def nonnegative_float(text):
    if not float(text) >= 0:
        raise ValueError
    return float(text)


def fraction(text):
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def first_process():
    """Whether this is the one of torchrun's that speaks and writes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def named_by_flags(name, args, parser, skip):
    """A file's name: the given one, then each flag that is not at its default; of a path the last part."""
    for key, value in vars(args).items():
        if key not in skip and value != parser.get_default(key):
            value = Path(value).name if isinstance(value, str) else re.sub(r"\.0\b", "", str(value))
            name += "_" + re.sub(r"[^\w.]+|_", "-", f"{key}-{value}").strip("-")
    whole = os.fsencode(name)  # file systems take 255 bytes
    short = f"{whole[:150].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"
    return name if len(whole) < 160 else short


def read_ahead(read, items, threads=1):
    """read(item) for each item, in order, by threads that work while the caller does."""
    with ThreadPoolExecutor(threads) as pool:
        coming = deque()
        for item in items:
            coming.append(pool.submit(read, item))
            if len(coming) > threads + 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


class Progress(tqdm):
    """tqdm's bar, of the first process; where stderr is no terminal, as in a job's log, a line a minute."""

    def __init__(self, items, what, **options):
        if not sys.stderr.isatty():
            options |= {"mininterval": 60, "miniters": 1}
        super().__init__(items, what, disable=not first_process(), **options)

    @staticmethod
    def status_printer(file):
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda line: line and print(line, file=file, flush=True)


def init_distributed(backend=None, timeout=timedelta(minutes=15)):
    """(rank, number of processes, device), under torchrun or not. timeout: for a process that hangs."""
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local_rank >= torch.cuda.device_count():
        fail(f"there are only {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
    if cuda:
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.enable_cudnn_sdp(False)  # its bf16 gradients were NaN for others (pytorch 196678)
    mps = torch.backends.mps.is_available()
    device = torch.device(f"cuda:{local_rank}" if cuda else "mps" if mps else "cpu")
    if "RANK" not in os.environ:
        return 0, 1, device
    try:
        patience = min(timeout, timedelta(minutes=15))
        store, rank, world_size = next(dist.rendezvous("env://", timeout=patience))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT")  # the store keeps addresses from before
        store = dist.PrefixStore(f"start {restart}", store)
        store.set(f"{rank} is here", "")
        store.wait([f"{i} is here" for i in range(world_size)], patience)
    except (ValueError, RuntimeError) as error:  # a variable is missing, a port is taken, a machine not there
        fail(f"the processes cannot meet: {first_line(error)}")
    backend = backend or ("cpu:gloo,cuda:nccl" if cuda else "gloo")
    dist.init_process_group(backend, timeout=timeout, rank=rank, world_size=world_size, store=store)
    return rank, world_size, device


def gather(mine):
    """What each process gives, a list by rank."""
    everyones = [mine]
    if dist.is_initialized():
        everyones *= dist.get_world_size()
        dist.all_gather_object(everyones, mine)
    return everyones


def agree(mine):
    """Fail, naming what differs, unless all processes have the same dictionary."""
    everyones = gather(mine)
    if differ := [key for key in mine if any(other[key] != mine[key] for other in everyones)]:
        fail(f"the processes differ in {', '.join(differ)}: all must have the same flags and see the same "
             "files")


def barrier():
    if dist.is_initialized():
        dist.barrier()


def write_json(path, value):
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def sync(folder):
    """Put the names in a folder on disk, as fsync does with a file's content."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some network file systems cannot
            raise
    finally:
        os.close(file)


def make_folder(folder):
    """Make a folder, and those above it, unless they are there."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextlib.contextmanager
def writing(path, mode, opener=None):
    """A file, opened to write, then fsynced. Whatever goes wrong is an OSError that names it."""
    try:
        with open(path, mode, opener=opener) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save answers a full disk with a RuntimeError
        message = f"cannot be written, is the disk full? ({first_line(error)})"
        raise OSError(errno.EIO, message, str(path)) from error


def in_place(path, flags):
    """An opener for `open` that keeps the content, to overwrite rows of a file that others write, too.

    Without O_WRONLY and O_DSYNC, NFS may send whole pages, with old copies of the others' rows.
    """
    return os.open(path, os.O_WRONLY | os.O_DSYNC)


@contextlib.contextmanager
def atomic_write(path):
    """A file to write, under a name of its own until the disk has all of it; then the disk has its name."""
    part = Path(f"{path}.tmp")
    make_folder(part.parent)
    try:
        with writing(part, "wb") as file:
            yield file
        os.replace(part, path)
        sync(part.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def regular(path):
    """The path of a regular file. Raises OSError for others: a pipe may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return path


def intact(path):
    """The path of a regular file. Raises ValueError for a zip (.pt, .pt2, .npz) with a wrong checksum, which
    torch and memory maps ignore.
    """
    if zipfile.is_zipfile(regular(path)):
        try:
            damaged = zipfile.ZipFile(path).testzip()
        except Exception as error:  # of many kinds
            damaged = first_line(error)
        if damaged:
            raise ValueError(f"{path} is damaged: {damaged}")
    return path


def content_id(path):
    """16 hex digits for what a file holds, or a VAE's folder; None if there is neither, as on a hub."""
    path = Path(path)
    if path.is_dir():
        files = (path / "config.json", path / "diffusion_pytorch_model.safetensors")
        content = b"".join(regular(file).read_bytes() for file in files if file.exists())
    elif not path.exists():
        return None
    elif zipfile.is_zipfile(regular(path)):  # it may be large, but has checksums
        content = str([part.CRC for part in zipfile.ZipFile(path).infolist()]).encode()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def load_tensors(path):
    """A dictionary that torch.save wrote, on the CPU, read from disk when used; no code in it is run."""
    mapped = zipfile.is_zipfile(intact(path))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # which REPA's and SRA's hold
            return {**torch.load(path, "cpu", weights_only=True, mmap=mapped)}
    except Exception as error:  # of many kinds; torch's own advice would be to run the code in the file
        raise ValueError(f"{path} holds more than tensors, or is no file of torch.save") from error


def lock(path, output):
    """Refuse a second command on the same output. The lock ends with this process."""
    make_folder(Path(path).parent)
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)  # never closed: that would end the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else a network file system without locks
            fail(f"another process is writing {output} now; wait for it, or give another output")


def check_same_settings(record, settings, there=None, cure="give another output"):
    """Fail, naming each setting that differs, if `record`, a JSON file of an output, has others (or `there`).

    What `there` does not know is not compared, nor are the paths of equal contents.
    """
    try:
        known = there or json.loads(regular(record).read_text())
        known = known | (known["data"] if isinstance(known.get("data"), dict) else {})  # of train.py
        if missing := not there and settings.keys() - known.keys():
            raise ValueError(f"it has no {min(missing)}")
    except Exception as error:
        fail(f"{record} does not say how its output was made ({first_line(error)}); {cure}")
    known, settings = json.loads(json.dumps([known, settings]))  # tuples are lists there
    skip = set()
    for key in (key for key in settings if key.endswith("_content")):
        if None in (settings[key], known.get(key)):
            skip.add(key)  # a file is not there: its path counts
        elif settings[key] == known[key]:
            skip.add(key.removesuffix("_content"))  # the same file: its path does not
    differ = [f"{key} is {known[key]!r} there and {value!r} here" for key, value in settings.items()
              if key in known and known[key] != value and key not in skip]
    if differ:
        fail(f"{record} has other settings: {'; '.join(differ)} ({cure})")


def remove_marks(out):
    """Remove OUT.partial, once the result is elsewhere, or the marks in OUT if it has become that.

    done-0.npy, which tells whose they are, goes last.
    """
    folder = Path(out if os.path.isdir(out) else f"{out}.partial")
    names = r"done-\d+\.npy|settings\.json|lock" if folder == Path(out) else ".*"
    if (mark := folder / "done-0.npy").exists():
        with contextlib.suppress(OSError):  # another process may do the same
            for path in folder.iterdir():
                if path != mark and re.fullmatch(names, path.name):
                    path.unlink()
            sync(folder)
            mark.unlink()
            folder.rmdir()  # if it is empty


def already_complete(out, record, settings):
    """Whether this command has made `out` before; fails if anything else has."""
    if os.path.lexists(record):
        check_same_settings(record, settings)
    elif os.path.lexists(out):
        fail(f"{out} exists, and no {record.name} says how it was made; give another output")
    if out.exists():
        remove_marks(out)  # left by a kill at the very end
        print(f"{out} is complete already")
    return out.exists()


if __name__ == "__main__":
    run(main)
