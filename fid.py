"""FID, sFID, Inception Score, precision and recall as ADM's evaluator (guided-diffusion, evaluations/evaluator.py) computes them.

    python fid.py SAMPLES.npz --ref VIRTUAL_imagenet256_labeled.npz         # or torchrun --nproc_per_node=8 fid.py …
    python fid.py --save-stats ref.npz IMAGES --image-size 256              # make a reference that ADM's evaluator reads too
    python fid.py SAMPLES.npz --ref IMAGES --detector FILE.pt               # another feature space: these are not ImageNet FIDs

SAMPLES, IMAGES and --ref are each an .npz (arr_0) or .npy of uint8 images (N, H, W, 3), or a folder of image files, which is read
in a fixed shuffled order. Samples are taken as they are; a reference folder is cropped as ADM crops, to --image-size or else to
the samples' size. Statistics stored in an .npz (mu, sigma, mu_s, sigma_s) are used in place of those of its images.

--detector takes a TorchScript module from uint8 images (N, 3, H, W) to a dict with "features" (N, D) and, if it has them,
"spatial" (N, S) and "logits" (N, C), or a tuple in that order. Without logits there is no Inception Score, without spatial no sFID.
"""

import hashlib
import os
import sys
import zipfile
from datetime import timedelta
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from extract_latents import (Parser, atomic_write, barrier, fail, first_line, init_distributed, load_image,
                             nonnegative_int, positive_int, read_ahead, run, write_json)

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
ADM_INCEPTION = "ADM's Inception (2015-12-05)"
DRAWN = 10_000  # images that a reference keeps for precision and recall
STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's names in an .npz


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2) of two Gaussians (Heusel et al. 2017, Eq. 6), as a float.

    mu: (D,), sigma: (D, D) symmetric, of any rank. With sigma1 = L L^T, sigma1 sigma2 has the eigenvalues of L^T sigma2 L, which
    is symmetric: no matrix root, no imaginary parts and, unlike sqrtm, nothing to add to a singular diagonal.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0))
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root.T @ sigma2 @ root).clip(0)).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root)


def inception_score(probabilities, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))) of class probabilities (N, C), as a float (Salimans et al. 2016).

    As in ADM it is the mean over consecutive chunks of split_size rows, in which a short last chunk counts as much as the others.
    """
    scores = []
    for p in torch.as_tensor(probabilities).split(split_size):
        p = p.double()
        kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # 0 log 0 = 0
        scores.append(kl.sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(reference, samples, k=3, block=10_000):
    """(precision, recall) of features (N, D) and (M, D), as floats (Kynkäänniemi et al. 2019, Eq. 1 and 2).

    A set's manifold is the union of balls around its points that reach their k-th neighbour. Precision is the share of samples
    in the reference's manifold, recall the share of the reference in the samples'. Memory grows with block^2.
    """
    reference, samples = torch.as_tensor(reference).float(), torch.as_tensor(samples).float()
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"{k} neighbours need at least {k + 1} points, not {min(len(reference), len(samples))}")
    reference_radii, sample_radii = (squared_radii(x, k, block) for x in (reference, samples))
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    starts = list(product(range(0, len(reference), block), range(0, len(samples), block)))
    for i, j in tqdm(starts, desc="precision, recall", leave=False, delay=5):
        rows, columns = slice(i, i + block), slice(j, j + block)
        distances = squared_distances(reference[rows], samples[columns])
        covered[rows] |= (distances <= sample_radii[columns]).any(1)
        precise[columns] |= (distances <= reference_radii[rows, None]).any(0)
    return precise.sum().item() / len(samples), covered.sum().item() / len(reference)


def squared_radii(x, k, block):
    """Squared distance (N,) of every point of x (N, D) to its k-th nearest other point."""
    radii = []
    for rows in tqdm(x.split(block), desc="neighbours", leave=False, delay=5):
        blocks = (squared_distances(rows, columns) for columns in x.split(block))
        nearest = [distances.topk(min(k + 1, distances.shape[1]), largest=False).values for distances in blocks]
        radii.append(torch.cat(nearest, 1).sort(1).values[:, k])  # column 0 is the point itself
    return torch.cat(radii)


def squared_distances(u, v):
    """Squared distances (N, M) of u (N, D) and v (M, D), rounded as ADM's are: float16 throughout, float32 if that overflows.

    The rounding makes ties, and `<=` counts them, so that plain float32 would give about 0.002 less precision and recall.
    """
    for dtype in (torch.float16, torch.float32):
        a, b = u.to(dtype), v.to(dtype)
        norm_a, norm_b = (x.square().sum(1, dtype=torch.float32).to(dtype) for x in (a, b))
        dot = (a.float() @ b.float().T).to(dtype)  # as tensor cores do: exact products, float32 sums, then rounded
        distances = (norm_a[:, None] - 2 * dot + norm_b).clamp(min=0)
        if distances.isfinite().all():
            break
    return distances.float()


def resize_bilinear(x, size=299):
    """TensorFlow 1's bilinear resize of x (N, C, H, W) to (N, C, size, size): source = target * in / out, along x and then y.

    Neither half-pixel centres nor antialiasing, unlike torch's and PIL's.
    """
    for dim in (3, 2):
        length = x.shape[dim]
        source = torch.arange(size, dtype=torch.float32) * (torch.tensor(float(length)) / size)  # float32 as in TensorFlow
        low = source.long().clamp(max=length - 1)
        weight = (source - low).to(x.device).reshape(-1, *[1] * (3 - dim))
        a, b = (x.index_select(dim, i.to(x.device)) for i in (low, (low + 1).clamp(max=length - 1)))
        x = a + (b - a) * weight
    return x


class FrozenBatchNorm(nn.Module):
    """Batch normalisation with stored statistics."""

    def __init__(self, channels):
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # some copies of the weights hold it
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.001)


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = FrozenBatchNorm(out_channels)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """An Inception block: chains of convolutions beside a pooling branch, concatenated; names as in torchvision.

    chains: name -> [(channels, kernel), …]; a step with two kernels is two convolutions a and b of the same input, concatenated.
    In a block of stride 2 the last step of every chain has that stride.
    """

    def __init__(self, in_channels, pool, pool_channels=0, stride=1, **chains):
        super().__init__()
        self.pool, self.chains = pool, []
        for name, steps in chains.items():
            self.chains.append([])
            width = in_channels
            for i, (channels, *kernels) in enumerate(steps, start=1):
                step = f"{name}_{i}" if len(steps) > 1 else name
                names = [f"{step}a", f"{step}b"] if len(kernels) > 1 else [step]
                strided = stride > 1 and i == len(steps)
                for conv, kernel in zip(names, kernels):
                    self.add_module(conv, Conv(width, channels, kernel, *((stride, 0) if strided else (1, "same"))))
                self.chains[-1].append(names)
                width = channels * len(names)
        self.branch_pool = Conv(in_channels, pool_channels, 1) if pool_channels else nn.Identity()

    def forward(self, x):
        outputs = []
        for chain in self.chains:
            y = x
            for names in chain:
                y = torch.cat([getattr(self, name)(y) for name in names], dim=1)
            outputs.append(y)
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], dim=1)


class InceptionV3(nn.Module):
    """The Inception of 2015-12-05 that FID is defined by; load_state_dict takes the file WEIGHTS (472 tensors).

    uint8 or float images (N, 3, H, W) in [0, 255] -> pool features (N, 2048), ADM's spatial features (N, 2023), class probabilities
    (N, 1008). It differs from torchvision's network in its pooling branches: averages leave the padding out, and Mixed_7c takes a
    maximum (mseitzer/pytorch-fid, inception.py).
    """

    def __init__(self):
        super().__init__()
        average, reduce = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), nn.MaxPool2d(3, stride=2)
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        for name, width, pool_channels in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", Mixed(
                width, average, pool_channels, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)]))
        self.Mixed_6a = Mixed(288, reduce, stride=2, branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
        for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", Mixed(
                768, average, 192, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))]))
        self.Mixed_7a = Mixed(768, reduce, stride=2, branch3x3=[(192, 1), (320, 3)],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)])
        for name, width, pool in (("7b", 1280, average), ("7c", 2048, nn.MaxPool2d(3, stride=1, padding=1))):
            self.add_module(f"Mixed_{name}", Mixed(
                width, pool, 192, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, (1, 3), (3, 1))],
                branch3x3dbl=[(448, 1), (384, 3), (384, (1, 3), (3, 1))]))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        x = (resize_bilinear(images.float()) - 128) / 128                       # (N, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # (N, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))       # (N, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # ADM's mixed_6/conv is the 1x1 branch, which comes first; NHWC as there
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))       # (N, 2048, 8, 8)
        pool = x.mean((2, 3))
        return pool, spatial, F.linear(pool, self.fc.weight).softmax(1)  # ADM leaves the bias out


class Detector(nn.Module):
    """A TorchScript module with InceptionV3's interface; None stands for what it does not give."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        outputs = self.module(images)
        if isinstance(outputs, dict):
            outputs = [outputs.get(name) for name in ("features", "spatial", "logits")]
        outputs = [outputs] if torch.is_tensor(outputs) else outputs
        features, spatial, logits = [*outputs, None, None][:3]
        if features is None or any(x.ndim != 2 or len(x) != len(images) for x in (features, spatial, logits) if x is not None):
            raise ValueError("features must be (N, D) for N images, and so must spatial and logits where they are given")
        probabilities = None if logits is None else logits.float().softmax(1)
        return features.float(), None if spatial is None else spatial.float(), probabilities


def load_network(weights, detector, device):
    """(network in eval mode, name of its feature space): Inception, or what --detector names."""
    if detector:
        try:
            network = Detector(torch.jit.load(detector, map_location=device))
        except Exception as error:  # zip, TorchScript and device errors have no common class
            fail(f"--detector {detector} cannot be loaded as a TorchScript module: {first_line(error)}")
        return network.eval(), f"detector {sha256(detector)[:16]}"
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS)
    if not weights:
        if not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(WEIGHTS_URL, path, hash_prefix=WEIGHTS_SHA256)
            except Exception as error:  # network, disk and hash errors have no common class
                fail(f"the Inception weights {WEIGHTS} are not here and cannot be downloaded ({first_line(error)}): get them from "
                     f"{WEIGHTS_URL} and put them into {path.parent}, or name the file with --weights")
        barrier()
    try:
        digest = sha256(path)
        network = InceptionV3()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # file, pickle and shape errors have no common class
        fail(f"{path} does not hold the weights of {WEIGHTS}: {first_line(error)} (get that file from {WEIGHTS_URL})")
    if digest != WEIGHTS_SHA256 and not weights:
        fail(f"{path} is damaged: its sha256 is not {WEIGHTS_SHA256}; remove it and run the same command again")
    space = ADM_INCEPTION if digest == WEIGHTS_SHA256 else f"Inception with weights {digest[:16]}"
    return network.to(device).eval().requires_grad_(False), space


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Images(Dataset):
    """The images of an .npz (arr_0), an .npy or a folder: images[rows] is uint8 (B, 3, H, W), or a sentence on what is wrong.

    An array is read row by row from disk, compressed or not, and never as a whole; rows in rising order cost least.
    crop: side to which the images of a folder are cropped, as ADM crops; None takes them as they are, all of one size.
    """

    def __init__(self, path, crop=None):
        self.path, self.files, self.stored = Path(path), [], {}
        self.crop = crop if self.path.is_dir() else None
        try:
            if self.path.is_dir():
                self.open_folder()
            elif self.path.suffix in (".npz", ".npy"):
                self.open_array()
            else:
                raise ValueError("it is neither an .npz, an .npy nor a folder" if self.path.exists() else "there is no such file")
        except Exception as error:  # file, zip, header, pickle and PIL errors have no common class
            fail(f"{path} cannot be read: {first_line(error)}")
        if self.count < 4:
            fail(f"{path} holds {self.count} image(s), and the third nearest neighbour needs at least 4")

    def open_folder(self):
        kinds = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
        found = sorted(Path(folder, name) for folder, _, names in os.walk(self.path, followlinks=True) for name in names
                       if name.lower().endswith(kinds) and not name.startswith("."))
        if not found:
            raise ValueError(f"it holds no image files ({' '.join(kinds)})")
        self.files = [found[i] for i in np.random.default_rng(0).permutation(len(found))]  # sorted classes would spoil the IS
        self.count, self.size = len(found), None
        first = self[range(1)]
        if isinstance(first, str):
            raise ValueError(first)
        self.size = tuple(first.shape[2:])

    def open_array(self):
        if self.path.suffix == ".npz":
            archive = zipfile.ZipFile(self.path)
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(f"it holds no images named arr_0, only {', '.join(archive.namelist()) or 'nothing'}")
            self.file, length = archive.open("arr_0.npy"), archive.getinfo("arr_0.npy").file_size
            with np.load(self.path, allow_pickle=False) as arrays:
                names = ("mu", "sigma", "mu_s", "sigma_s", "feature_space")
                self.stored = {name: arrays[name] for name in names if name in arrays}
        else:
            self.file, length = open(self.path, "rb"), self.path.stat().st_size
        version = np.lib.format.read_magic(self.file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, self.dtype = read_header(self.file)
        if self.dtype.kind not in "uif":
            raise ValueError(f"its images are of type {self.dtype}, not uint8 (nothing is ever unpickled)")
        if len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
            raise ValueError(f"its images have the shape {shape}{' in Fortran order' if fortran else ''}, not (N, H, W, 3)")
        self.count, self.size, self.start = shape[0], shape[1:3], self.file.tell()
        self.row_bytes = int(np.prod(shape[1:])) * self.dtype.itemsize
        if length < self.start + self.count * self.row_bytes:
            raise ValueError(f"it is cut off: {length:,} bytes cannot hold {self.count:,} images")

    def __len__(self):
        return self.count

    def __getitem__(self, rows):
        images = []
        for row in rows:
            try:
                images.append(self.read(row))
            except Exception as error:  # as above; in a worker process, so that it is the caller who says it
                return f"{self.files[row] if self.files else f'{self.path}, image {row},'} cannot be used: {first_line(error)}"
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    def read(self, row):
        """Image `row`: uint8 (H, W, 3)."""
        if self.files:
            image = load_image(self.files[row], self.crop) if self.crop else load_uncropped(self.files[row])
            if self.size and image.shape[:2] != self.size:
                raise ValueError(f"it has {image.shape[0]}x{image.shape[1]} pixels and others {self.size[0]}x{self.size[1]}; "
                                 "stretched to one size they would shift every metric: crop them (--image-size does it for --ref "
                                 "and --save-stats)")
            return image
        self.file.seek(self.start + row * self.row_bytes)
        image = np.frombuffer(self.file.read(self.row_bytes), self.dtype).reshape(*self.size, 3)
        if self.dtype.kind == "f" and not np.isfinite(image).all():
            raise ValueError("it holds NaN or infinite values, which would make every metric meaningless")
        if self.dtype != np.uint8 and (image.min() < 0 or image.max() > 255 or (image != np.round(image)).any()):
            raise ValueError(f"its values ({image.min():g} to {image.max():g}) are not whole numbers from 0 to 255, which the "
                             "network expects; store uint8, images in [-1, 1] as ((x + 1) * 127.5).round().clip(0, 255)")
        return image.astype(np.uint8)

    def drawn(self):
        """The rows, in rising order, that a reference keeps as images: DRAWN of them, in a fixed random choice, or all."""
        return np.sort(np.random.default_rng(0).permutation(self.count)[:DRAWN])


def load_uncropped(path):
    """An image file as uint8 RGB (H, W, 3)."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its mode {image.mode} has more than 8 bits per channel")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


@torch.no_grad()
def extract(network, space, images, keep, args, rank, world_size, device):
    """Statistics of all images and features of the rows `keep`: a dict of numpy arrays, complete on the first process.

    features (len(keep), D) and probabilities (len(keep), C) in float32; mu (D,), sigma (D, D), mu_s (S,), sigma_s (S, S) in
    float64, as np.cov has them. What the network does not give is absent. Every process takes each world_size-th batch.
    """
    if args.cache:  # the key names what the features depend on, without reading the images
        files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in images.files or [images.path.resolve()]]
        key = hashlib.sha256(repr([space, files, images.crop, len(keep)]).encode()).hexdigest()[:24]
        cache = Path(args.cache, f"{images.path.stem}-{key}.npz")
        if cache.exists():
            try:
                with np.load(cache, allow_pickle=False) as file:
                    found = dict(file)
                if found["features"].shape[:1] != (len(keep),):
                    raise ValueError("it holds features of other images")
                return found
            except Exception as error:  # zip and header errors have no common class
                fail(f"the cache {cache} cannot be read ({first_line(error)}); remove it")

    widths = {name: x.shape[1] for name, x in apply(network, images[range(1)], device).items()}
    kept = {name: torch.zeros(len(keep), width) for name, width in widths.items() if name != "spatial"}
    where = device if device.type == "cuda" else "cpu"  # MPS has no float64
    totals = {name: torch.zeros(widths[name], dtype=torch.float64, device=where) for name in STATISTICS if name in widths}
    products = {name: torch.outer(total, total) for name, total in totals.items()}  # sums of x and of x x^T
    batches = [range(i, min(i + args.batch_size, len(images))) for i in range(0, len(images), args.batch_size)][rank::world_size]
    if images.files:
        loader = DataLoader(images, batch_size=None, sampler=batches, num_workers=args.num_workers, pin_memory=device.type == "cuda")
    else:
        loader = read_ahead(images.__getitem__, batches)
    progress = tqdm(loader, total=len(batches), desc=f"{images.path.name}, {world_size} process(es)", unit="batch", disable=rank > 0)
    for batch, rows in zip(progress, batches):
        outputs = apply(network, batch, device)
        for name in totals:
            x = outputs[name].to(where).double()
            totals[name] += x.sum(0)
            products[name].addmm_(x.T, x)
        chosen = np.isin(rows, keep)
        for name, rest in kept.items():
            rest[np.searchsorted(keep, np.array(rows)[chosen])] = outputs[name].cpu()[chosen]

    found = {name: reduce(rest).numpy() for name, rest in kept.items()}
    for name in totals:
        mu, sigma = STATISTICS[name]
        found[mu] = reduce(totals[name].cpu()).numpy() / len(images)
        found[sigma] = (reduce(products[name].cpu()).numpy() - len(images) * np.outer(found[mu], found[mu])) / (len(images) - 1)
    if rank == 0 and not all(np.isfinite(value).all() for value in found.values()):
        fail(f"the features of {images.path} hold NaN or infinite values, which would make every metric meaningless")
    if rank == 0 and args.cache:
        with atomic_write(cache) as file:
            np.savez(file, **found)
    barrier()  # no other process looks for the file before it is whole
    return found


def apply(network, batch, device):
    """What the network gives for a batch of images, by name."""
    if isinstance(batch, str):
        fail(batch)
    try:
        outputs = network(batch.to(device, non_blocking=True))
    except Exception as error:  # a detector may raise anything
        fail(f"the network cannot take {len(batch)} images of {batch.shape[2]}x{batch.shape[3]} pixels: {first_line(error)}")
    return {name: x for name, x in zip(("features", "spatial", "probabilities"), outputs) if x is not None}


def reduce(x):
    """The sum over all processes, on the first; kept rows are zero on all processes but one, so that their sum is exact."""
    if dist.is_initialized():
        dist.reduce(x, 0)
    return x


def use_stored(found, images, space):
    """Put the statistics stored beside the images of an .npz in the place of those found, as ADM does; returns warnings."""
    stored, warnings = images.stored, []
    made_with = str(stored.get("feature_space", space if space == ADM_INCEPTION else ""))
    if stored and made_with not in ("", space):
        fail(f"{images.path} holds statistics of {made_with}, not of {space}: make them with --save-stats and the same network")
    if stored and not made_with:
        warnings.append(f"{images.path} does not say which network its mu and sigma are of; FID means nothing unless it is {space}")
    for metric, (mu, sigma) in zip(("FID", "sFID"), STATISTICS.values()):
        if not stored or mu not in found:
            continue
        if mu not in stored or sigma not in stored:
            warnings.append(f"{metric} is left out: {images.path} stores statistics, but no {mu} and {sigma}")
            del found[mu]
        elif (stored[mu].shape, stored[sigma].shape) != (found[mu].shape, found[sigma].shape):
            fail(f"{images.path} holds {mu} and {sigma} of the shapes {stored[mu].shape} and {stored[sigma].shape}, but the "
                 f"features here are {len(found[mu])} wide: they are another network's")
        elif not (np.isfinite(stored[mu]).all() and np.isfinite(stored[sigma]).all()):
            fail(f"{images.path} holds NaN or infinite values in {mu} or {sigma}")
        else:
            found[mu], found[sigma] = stored[mu], stored[sigma]
    return warnings


def write_reference(path, images, found, space):
    """Write ADM's reference format, arr_0 (drawn images, uint8) and the statistics of all images, an image at a time."""
    rows, arrays = images.drawn(), {name: found[name] for pair in STATISTICS.values() for name in pair if name in found}
    with atomic_write(path) as whole, zipfile.ZipFile(whole, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *images.size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for row in tqdm(rows, desc=f"writing {path}", unit="image"):
                file.write(images.read(row).tobytes())
        for name, array in {**arrays, "feature_space": np.array(space)}.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def cautions(samples, reference, found, space):
    """Sentences on what makes these numbers differ from a paper's."""
    width, said = found["features"].shape[1], []
    for images, name in (samples, "samples"), (reference, "references"):
        if images.count <= width and not images.stored:
            said.append(f"{images.count:,} {name} are too few for {width} features: their covariance is singular, FID far too high")
    if space == ADM_INCEPTION and width < samples.count < 50_000:
        said.append(f"{samples.count:,} samples: papers use 50,000, and fewer raise FID (10,000 by about 2, 5,000 by about 5)")
    if samples.size != reference.size:
        said.append(f"samples have {samples.size[0]}x{samples.size[1]} pixels, references {reference.size[0]}x{reference.size[1]}: "
                    "their sharpness differs, and FID counts that; make both of one size")
    if samples.stored:
        said.append(f"the statistics stored in {samples.path} replace those of its images, as in ADM")
    if any(file.suffix.lower() in (".jpg", ".jpeg") for file in samples.files):
        said.append("samples are JPEGs, whose losses shift every metric; store PNGs or an .npz")
    if space != ADM_INCEPTION:
        said.append("this is not ADM's network: compare these numbers with each other only, never with a paper's")
    if "probabilities" in found:
        p = found["probabilities"]
        as_stored, shuffled = inception_score(p), inception_score(p[np.random.default_rng(0).permutation(len(p))])
        if shuffled > 1.05 * as_stored:
            said.append(f"samples look sorted by class: IS, a mean over chunks of 5000 in file order, is {as_stored:.2f}, and would "
                        f"be {shuffled:.2f} in random order; shuffle the samples")
    return said


def report(args, samples, reference, found, found_ref, warnings, space, device):
    """Compute the metrics that the features allow, print them with their cautions, write them to --json."""
    metrics = {}
    for name, (mu, sigma) in zip(("FID", "sFID"), STATISTICS.values()):
        if mu in found and mu in found_ref:
            metrics[name] = frechet_distance(found[mu], found[sigma], found_ref[mu], found_ref[sigma])
    if "probabilities" in found:
        metrics["IS"] = inception_score(found["probabilities"])
    features, features_ref = (torch.from_numpy(x["features"]).to(device) for x in (found, found_ref))
    metrics["Precision"], metrics["Recall"] = precision_recall(features_ref, features)

    of = "stored statistics" if "mu" in reference.stored else f"statistics of {reference.count:,}"
    print(f"{samples.path} ({samples.count:,} images) against {reference.path} ({len(features_ref):,} images, {of})")
    print(f"features: {f'{args.detector}, {space}: not ImageNet FID' if args.detector else space}")
    for name, value in metrics.items():
        print(f"  {name:<10} {value:.4f}")
    warnings = warnings + cautions(samples, reference, found, space)
    for warning in warnings:
        print(f"fid.py: warning: {warning}", file=sys.stderr)
    if args.json:
        sets = {name: {"path": str(x.path.resolve()), "count": x.count, "size": x.size, "stored_statistics": "mu" in x.stored}
                for name, x in (("samples", samples), ("reference", reference))}
        write_json(args.json, {**metrics, "feature_space": space, **sets, "warnings": warnings, "torch": torch.__version__})


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("images", help="samples, or with --save-stats the images of a reference: .npz, .npy or folder")
    parser.add_argument("--ref", help="reference to compare with: .npz, .npy or folder")
    parser.add_argument("--save-stats", metavar="FILE.npz", help="write a reference: 10,000 of the images and statistics of all")
    parser.add_argument("--image-size", type=positive_int, help="side to which the images of a reference folder are cropped")
    parser.add_argument("--json", help="file to write the numbers to")
    parser.add_argument("--weights", help=f"local file of {WEIGHTS} (default: downloaded once into torch.hub's folder)")
    parser.add_argument("--detector", help="TorchScript module that takes Inception's place, see above")
    parser.add_argument("--cache", metavar="FOLDER", help="keep the features of each input there and use them again")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images per forward on one device")
    parser.add_argument("--num-workers", type=nonnegative_int, default=min(8, os.cpu_count()), help="processes per device that read a folder")
    args = parser.parse_args()
    if bool(args.ref) == bool(args.save_stats):
        fail("give either --ref, to compare, or --save-stats, to make a reference")
    if args.save_stats and (args.json or not args.save_stats.endswith(".npz")):
        fail("--save-stats writes an .npz, and no --json")
    if args.weights and args.detector:
        fail("--weights and --detector exclude each other; give one")
    for folder in (args.json and Path(args.json).parent, args.save_stats and Path(args.save_stats).parent, args.cache):
        Path(folder or ".").mkdir(parents=True, exist_ok=True)  # what cannot be written shows now, not after an hour
    return args


def main():
    args = parse_args()
    samples = Images(args.images, args.image_size if args.save_stats else None)
    if args.ref and Path(args.ref).is_dir() and not args.image_size and samples.size[0] != samples.size[1]:
        fail("the samples are not square: give --image-size, the side to which the reference is cropped")
    sets = [Images(args.ref, args.image_size or samples.size[0]), samples] if args.ref else [samples]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # 10 bits of mantissa: features off by 1e-3
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    rank, world_size, device = init_distributed("gloo", timedelta(days=2))
    network, space = load_network(args.weights, args.detector, device)

    found, warnings = {}, []
    for images in sets:
        draw = args.save_stats or (images is not samples and images.files)
        keep = images.drawn() if draw else np.arange(images.count)
        found[images] = extract(network, space, images, keep, args, rank, world_size, device)
        warnings += use_stored(found[images], images, space) if args.ref else []
    if rank == 0 and args.save_stats:
        write_reference(args.save_stats, samples, found[samples], space)
        print(f"{args.save_stats}: {len(samples.drawn()):,} images, statistics of {samples.count:,}, {space}")
    elif rank == 0:
        reference = sets[0]
        report(args, samples, reference, found[samples], found[reference], warnings, space, device)


if __name__ == "__main__":
    run(main)
