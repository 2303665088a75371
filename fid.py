"""FID, sFID, Inception Score, precision and recall, as ADM's evaluator computes them (guided-diffusion).

    python fid.py SAMPLES.npz --ref VIRTUAL_imagenet256_labeled.npz   # or with torchrun
    python fid.py --save-stats ref.npz IMAGES --image-size 256        # make a reference, ADM's reads it too

SAMPLES, IMAGES and --ref are each an .npz (arr_0) or .npy of uint8 images (N, S, S, 3), or a folder of
images, read in a fixed shuffled order. Statistics in an .npz (mu, sigma, mu_s, sigma_s) are used in the place
of its images' own. Only a reference folder is cropped, as ADM crops.

--detector is a program of torch.export from uint8 images (B, 3, H, W) to a dict of "features" (B, D) and, if
it has them, "spatial" (B, S) and "logits" (B, C). Without logits there is no IS, without spatial no sFID.
"""

import errno
import hashlib
import os
import struct
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from extract_latents import (
    Parser,
    Progress,
    agree,
    atomic_write,
    check_same_settings,
    content_id,
    fail,
    files_in,
    first_line,
    init_distributed,
    intact,
    load_batch,
    load_image,
    load_tensors,
    lock,
    positive_int,
    read_ahead,
    read_rows,
    run,
    write_json,
)
from models import hub_lock, load_program

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
ADM_INCEPTION = "ADM's Inception (2015-12-05)"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # ADM's names: of the features, of the spatial features


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2) of Gaussians (Heusel et al. 2017, Eq. 6).

    mu: (D,), sigma: (D, D) symmetric, of any rank. With sigma1 = L L^T, sigma1 sigma2 has the eigenvalues of
    L^T sigma2 L, which is symmetric: no matrix root, and unlike sqrtm nothing to add to a singular diagonal.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0))
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root.T @ sigma2 @ root).clip(0)).sum()
    return max(0.0, np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root)


def inception_score(probabilities, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))) of class probabilities (N, C), as a float (Salimans et al. 2016).

    As in ADM a mean over chunks of consecutive rows, of which a short last one counts as much as the others.
    """
    scores = []
    for p in torch.as_tensor(probabilities).split(split_size):
        p = p.double()
        kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # 0 log 0 = 0
        scores.append(kl.sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(reference, samples, k=3, block=2000):
    """(precision, recall) of features (N, D) and (M, D), floats (Kynkäänniemi et al. 2019, Eq. 1 and 2).

    A set's manifold is the union of balls around its points that reach their k-th neighbour. Precision is the
    share of samples in the reference's manifold, recall the share of the reference in the samples'.
    """
    reference, samples = torch.as_tensor(reference).float(), torch.as_tensor(samples).float()
    reference_radii, sample_radii = squared_radii(reference, k, block), squared_radii(samples, k, block)
    precise, covered = torch.zeros_like(sample_radii, dtype=torch.bool), []
    for rows, radii in zip(reference.split(block), reference_radii.split(block)):
        distances = squared_distances(rows, samples)
        precise |= (distances <= radii[:, None]).any(0)
        covered.append((distances <= sample_radii).any(1))
    return precise.sum().item() / len(samples), torch.cat(covered).sum().item() / len(reference)


def squared_radii(x, k, block):
    """Squared distance (N,) of every point of x (N, D) to its k-th nearest other point."""
    nearest = [squared_distances(rows, x).topk(k + 1, largest=False).values for rows in x.split(block)]
    return torch.cat(nearest)[:, k]  # the first is the point itself


def squared_distances(u, v):
    """Squared distances (N, M) of u (N, D), v (M, D), rounded as ADM's: float16, float32 if that overflows.

    Rounding makes ties, which `<=` counts: plain float32 would give about 0.002 less precision and recall.
    """
    for dtype in (torch.float16, torch.float32):
        a, b = u.to(dtype), v.to(dtype)
        norm_a, norm_b = (x.square().sum(1, dtype=torch.float32).to(dtype) for x in (a, b))
        dot = (a.float() @ b.float().T).to(dtype)  # as tensor cores do: exact products, float32 sums, rounded
        distances = (norm_a[:, None] - 2 * dot + norm_b).clamp(min=0)
        if distances.isfinite().all():
            break
    return distances.float()


def resize_bilinear(x, size=299):
    """TensorFlow 1's bilinear resize of x (N, C, H, W) to (N, C, size, size), along x and then y.

    source = target * in / out in float32, without torch's half-pixel centres and PIL's antialiasing.
    """
    for dim in (3, 2):
        length = x.shape[dim]
        source = torch.arange(size, device=x.device) * (length / size)
        low = source.long().clamp(max=length - 1)
        weight = (source - low).view(-1, *[1] * (3 - dim))
        a, b = (x.index_select(dim, i) for i in (low, (low + 1).clamp(max=length - 1)))
        x = a + (b - a) * weight
    return x


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions beside a pooling branch, concatenated; names as in torchvision.

    chains: name -> [(channels, kernel), …]; two kernels: convolutions a and b of the same input. The last
    convolution of each chain has the stride.
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
                    geometry = (stride, 0) if strided else (1, "same")
                    self.add_module(conv, Conv(width, channels, kernel, *geometry))
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
    """The Inception of 2015-12-05 that FID is defined by, with the weights of the file WEIGHTS (472 tensors).

    Images (N, 3, H, W) in [0, 255] -> {"features": pooled (N, 2048), "spatial": ADM's (N, 2023), "logits":
    (N, 1008)}. Unlike torchvision's network, its average pooling leaves the padding out, and
    Mixed_7c pools by a maximum (mseitzer/pytorch-fid, inception.py).
    """

    def __init__(self):
        super().__init__()
        average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        reduce = nn.MaxPool2d(3, stride=2)
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        for name, width, pool_channels in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", Mixed(
                width, average, pool_channels, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)]))
        self.Mixed_6a = Mixed(288, reduce, stride=2, branch3x3=[(384, 3)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
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
        x = (resize_bilinear(images.float()) - 128) / 128  # (N, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # (N, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (N, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # ADM's mixed_6/conv is the 1x1 branch; NHWC
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (N, 2048, 8, 8)
        pool = x.mean((2, 3))
        logits = F.linear(pool, self.fc.weight)  # ADM leaves the bias out
        return {"features": pool, "spatial": spatial, "logits": logits}


def load_network(args, device):
    """(network in eval mode, name of its feature space): Inception, or the --detector."""
    path = Path(args.detector or args.weights or Path(torch.hub.get_dir(), "checkpoints", WEIGHTS))
    try:
        if args.detector:
            return load_program(intact(path), device), f"detector {sha256(path)[:16]}"
        if not args.weights and not path.exists():
            with hub_lock():
                if not path.exists():
                    path.parent.mkdir(exist_ok=True)
                    torch.hub.download_url_to_file(WEIGHTS_URL, path, WEIGHTS_SHA256)
        network = InceptionV3()
        network.load_state_dict(load_tensors(path))
    except Exception as error:  # network, file, pickle and shape errors have no common class
        hint = "" if args.detector else f" (see --weights, and {WEIGHTS_URL})"
        fail(f"{path} cannot be loaded: {first_line(error)}{hint}")
    digest = sha256(path)
    space = ADM_INCEPTION if digest == WEIGHTS_SHA256 else f"Inception with weights {digest[:16]}"
    return network.to(device).eval().requires_grad_(False), space


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Images:
    """The images of an .npz (arr_0), an .npy or a folder: path, count, size (H, W), what else is stored.

    crop: side to which those of a folder are cropped; None takes them as they are, all of one size.
    """

    def __init__(self, path, crop=None):
        self.path, self.crop, self.files, self.stored = Path(path), crop, [], {}
        try:
            if self.path.is_dir():
                found = sorted(map(Path, files_in(path, set())))
                if not found:
                    raise ValueError("it holds no files")
                order = np.random.default_rng(0).permutation(len(found))  # sorted classes spoil the IS
                self.files = [found[i] for i in order]
                self.count, self.size = len(found), load_image(self.files[0], crop).shape[:2]
            else:
                self.array = map_array(intact(self.path))
                self.count, *self.size, channels = self.array.shape
                if self.array.dtype != np.uint8 or channels != 3 or not self.array.flags.c_contiguous:
                    raise ValueError(f"{self.array.dtype} {self.array.shape} is not uint8 NHWC in C order")
                if self.path.suffix == ".npz":
                    with np.load(path) as archive:
                        names = (*STATISTICS, "feature_space")
                        self.stored = {name: archive[name] for name in names if name in archive}
                    check_statistics(self.stored)
            height, width = self.size
            if height != width or crop and crop != width:
                raise ValueError(f"its images have {height} x {width} pixels, not {crop or height} squared")
            if self.count < 4:
                raise ValueError("recall and precision take at least 4 images")
        except Exception as error:  # file, zip, header, pickle and PIL errors have no common class
            fail(f"{path} cannot be read as images: {first_line(error)}")

    def read(self, rows):
        """Images `rows` as uint8 (B, H, W, 3)."""
        if not self.files:
            return read_rows(self.array, rows) if isinstance(self.array, np.memmap) else self.array[rows]
        images, errors = load_batch([self.files[row] for row in rows], self.crop)
        if not errors:
            errors = [f"{self.files[row]} (of {image.shape[:2]} pixels, and others of {self.size})"
                      for row, image in zip(rows, images) if image.shape[:2] != self.size]
        if errors:
            raise OSError(errno.EIO, f"cannot be used: {errors[0]}", self.path)
        return np.stack(images)

    def drawn(self):
        """The rows, rising, of which a reference keeps images: 10,000 in a fixed random choice, or all."""
        return np.sort(np.random.default_rng(0).permutation(self.count)[:10_000])


def check_statistics(stored):
    """Raise ValueError if, of an .npz's arrays by name, the statistics are not what ADM stores."""
    for names in (STATISTICS, STATISTICS[2:]):
        if not stored.keys() & names:
            continue
        mu, sigma = (stored.get(name, np.zeros(())) for name in names[:2])
        shapes_fit = mu.dtype.kind == sigma.dtype.kind == "f" and mu.ndim == 1 and sigma.shape == 2 * mu.shape
        if not shapes_fit or not (abs(mu).max() < 1e30 and abs(sigma).max() < 1e30  # NaN is not
                                  and sigma.diagonal().min() >= 0 and np.allclose(sigma, sigma.T)):
            raise ValueError(f"its {names[0]} and {names[1]} are no finite mean and covariance")


def map_array(path):
    """The array of an .npy, or arr_0 of an .npz, memory-mapped; where that is compressed, read as a whole."""
    if path.suffix != ".npz":
        return np.load(path, mmap_mode="r")
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("arr_0.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        with np.load(path) as archive:
            return archive["arr_0"]
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)  # where the header that precedes the member gives two lengths
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        start = file.tell()
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        array = np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
        if array.offset + array.nbytes > start + member.file_size:
            raise ValueError("arr_0 is shorter than its header says")
        return array


@torch.no_grad()
def run_network(network, images, device):
    """{"features": (B, D), "spatial": (B, S), "probabilities": (B, C)} of uint8 images (B, H, W, 3).

    A detector may give the first alone.
    """
    try:
        outputs = network(torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous())
        outputs = {name: x.float() for name, x in outputs.items()}
        if any(x.ndim != 2 or len(x) != len(images) for x in (outputs["features"], *outputs.values())):
            raise ValueError("outputs must be (B, D)")
    except Exception as error:  # a detector may raise anything
        fail(f"the network cannot be used on images of shape {images.shape}: {first_line(error)}")
    if "logits" in outputs:
        outputs["probabilities"] = outputs.pop("logits").softmax(1)
    return outputs


def compute_features(network, images, keep, args, rank, world_size, device):
    """Statistics of all images, and features and probabilities of the rows `keep`: numpy arrays by name.

    mu (D,), sigma (D, D), mu_s (S,), sigma_s (S, S) in float64, as np.cov has them; features (len(keep), D)
    and probabilities (len(keep), C) in float32. Valid on rank 0 only.
    """
    where = device if device.type == "cuda" else "cpu"  # MPS has no float64
    first = run_network(network, images.read(range(1)), device)
    kept = {name: torch.zeros(len(keep), x.shape[1]) for name, x in first.items() if name != "spatial"}
    sums = {name: x[0].to(where).double() * 0 for name, x in first.items() if name != "probabilities"}
    products = {name: total.outer(total) for name, total in sums.items()}
    starts = range(0, images.count, args.batch_size)[rank::world_size]
    batches = [range(i, min(i + args.batch_size, images.count)) for i in starts]
    progress = Progress(batches, images.path.name)
    for rows, batch in zip(progress, read_ahead(images.read, batches, args.num_workers)):
        outputs = run_network(network, batch, device)
        for name in sums:
            x = outputs[name].to(where).double()
            sums[name] += x.sum(0)
            products[name].addmm_(x.T, x)
        chosen = np.isin(rows, keep)
        for name in kept:
            kept[name][np.searchsorted(keep, np.array(rows)[chosen])] = outputs[name].cpu()[chosen]

    found = {name: sum_to_rank0(x) for name, x in kept.items()}  # each row is 0 on all processes but one
    for name, total in sums.items():
        mu, sigma = STATISTICS[:2] if name == "features" else STATISTICS[2:]
        found[mu] = sum_to_rank0(total) / images.count
        squares = sum_to_rank0(products[name]) - images.count * np.outer(found[mu], found[mu])
        found[sigma] = squares / (images.count - 1)
    if rank == 0 and not all(np.isfinite(x).all() for x in found.values()):
        fail(f"the features of {images.path} are not finite")
    return found


def sum_to_rank0(x):
    """The sum over the processes, as numpy; valid on rank 0 only."""
    x = x.cpu()
    if dist.is_initialized():
        dist.reduce(x, 0)
    return x.numpy()


def use_stored(found, images, space):
    """Put the statistics that are stored in an .npz in the place of those of its images, as ADM does."""
    stored = images.stored
    network = str(stored.get("feature_space", ADM_INCEPTION))
    if "mu" in stored and network != space:
        fail(f"{images.path} holds statistics of {network}, not of {space}")
    for name in STATISTICS if "mu" in stored else ():
        computed = found.pop(name, None)
        if name in stored:
            found[name] = stored[name]
            if computed is not None and found[name].shape != computed.shape:
                fail(f"{images.path} holds {name} of another network")


def report(args, about, samples, reference, found, found_ref, device):
    """Print the metrics that the features allow, and write them to --json."""
    metrics = {}
    for metric, (mu, sigma) in {"FID": STATISTICS[:2], "sFID": STATISTICS[2:]}.items():
        if sigma in found and sigma in found_ref:
            metrics[metric] = frechet_distance(found[mu], found[sigma], found_ref[mu], found_ref[sigma])
    if "probabilities" in found:
        metrics["IS"] = inception_score(found["probabilities"])
    features, features_ref = (torch.from_numpy(x["features"]).to(device) for x in (found, found_ref))
    metrics["Precision"], metrics["Recall"] = precision_recall(features_ref, features)

    if args.json:
        write_json(args.json, {**metrics, **about, "count": samples.count})
    statistics = "stored statistics" if "mu" in reference.stored else f"statistics of {reference.count:,}"
    print(f"{samples.path} ({samples.count:,} images)")
    print(f"against {reference.path} ({len(features_ref):,} images, {statistics})")
    print(f"features: {about['feature_space']}{', not ImageNet FID' if args.detector else ''}")
    for metric, value in metrics.items():
        print(f"  {metric:<10} {value:.4f}")


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("images", help="samples, or with --save-stats the images of a reference: .npz, .npy or folder")
    either = parser.add_mutually_exclusive_group(required=True).add_argument
    either("--ref", help="reference to compare with: .npz, .npy or folder")
    either("--save-stats", metavar="FILE.npz", help="write a reference: 10,000 images and statistics of all")
    add("--image-size", type=positive_int, help="side to which the images of a reference folder are cropped")
    add("--json", help="file to write the numbers to")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--weights", help=f"local file of {WEIGHTS} (default: downloaded once, by torch.hub)")
    either("--detector", metavar="FILE.pt2", help="program that takes Inception's place, see above")
    add("--batch-size", type=positive_int, default=64, help="images per forward on one device")
    add("--num-workers", type=positive_int, default=8, help="threads per device that read images")
    args = parser.parse_args()
    if args.save_stats and (args.json or not args.save_stats.endswith(".npz")):
        fail("--save-stats takes the name of an .npz, and no --json")
    if args.save_stats and os.path.lexists(args.save_stats):
        fail(f"{args.save_stats} exists; give another name")
    return args


def main():
    args = parse_args()
    samples = Images(args.images, args.image_size if args.save_stats else None)
    sets = [Images(args.ref, args.image_size or samples.size[0]), samples] if args.ref else [samples]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # moves features by 1e-3
    rank, world_size, device = init_distributed("gloo", timedelta(days=2))
    network, space = load_network(args, device)
    about = {"samples": os.path.realpath(args.images), "reference": os.path.realpath(args.ref or ""),
             "feature_space": space}
    contents = [(x.count, x.path.suffix == ".npz" and content_id(x.path)) for x in sets]
    agree({**vars(args), "feature_space": space, "contents": contents})
    output = rank == 0 and (args.json or args.save_stats)
    if output:
        lock(f"{output}.lock", output)
    try:
        if args.json and os.path.lexists(args.json):
            check_same_settings(Path(args.json), about)
        if args.save_stats and os.path.lexists(args.save_stats):
            fail(f"{args.save_stats} exists; give another name")
        found = {}
        for images in sets:
            draw = args.save_stats or (images is not samples and images.path.suffix != ".npz")
            keep = images.drawn() if draw else np.arange(images.count)
            found[images] = compute_features(network, images, keep, args, rank, world_size, device)
            if args.ref:
                use_stored(found[images], images, space)
        if rank == 0 and args.save_stats:
            statistics = {name: x for name, x in found[samples].items() if name in STATISTICS}
            drawn = samples.read(samples.drawn())
            with atomic_write(args.save_stats) as file:  # in ADM's format
                np.savez(file, arr_0=drawn, feature_space=space, **statistics)
            print(f"{args.save_stats}: {len(drawn):,} images, statistics of {samples.count:,}, {space}")
        elif rank == 0:
            report(args, about, samples, sets[0], found[samples], found[sets[0]], device)
    finally:
        if output:
            Path(f"{output}.lock").unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
