"""Train SiT with VAE-REPA: a small MLP on an early block also predicts the clean latent that the input was made from.

    torchrun --nproc_per_node=8 train.py --model SiT-XL/2 --vae-repa-depth 8      # or plain `python` on one GPU or a CPU

    x_t = (1 - t) x + t noise,  v = dx_t/dt = noise - x        t = 1 is noise, t = 0 is data, t ~ U[0, 1]    (Eq. 1, 3)
    L = |v_pred - v|^2 + lambda smooth_l1(x_pred, x; beta)     v_pred: last block, x_pred: block d        (Eq. 4, 7, 8)

x is the VAE's latent, drawn from its posterior anew every step, shifted and scaled. Nothing else is needed: no teacher,
no encoder. Run the same command again and it resumes; `--vae-repa-depth 0` is plain SiT.

Two methods that it is compared and combined with run in the same loop. All three are a head on an early block and differ in
where its target comes from; each is off unless its depth is given, and --vae-repa-depth 0 leaves VAE-REPA out.

    VAE-REPA    --vae-repa-depth 8    the clean latent x
    REPA        --repa-depth 8        the patch tokens of an image encoder, DINOv2 (arXiv 2410.06940)
    SRA         --sra-depth 8         a later block of the EMA model, at an earlier time (arXiv 2505.02831)
"""

import argparse
import atexit
import contextlib
import copy
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from extract_latents import (Parser, barrier, check_same_settings, fail, init_distributed, load_vae, lock,
                             natural, per_channel, positive_int, read_json, reason, run, whole_file, write_json)
from models import ALIGN_DEPTHS, SIZES, SRA_DEPTHS, Encoder, SiT_models, patchify
from sample import HEADS, build_model, load_checkpoint, load_weights, sample_images, save_grid, stream, to_bf16


def interpolate(x, noise, t):
    """(x_t, v) of the linear interpolant: x, noise (B, C, H, W), t (B,)."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x + t * noise, noise - x


def alignment_loss(prediction, target, objective, beta, patch_size):
    """Distance of the head's prediction from the clean latent, (B, C, H, W) each -> (B,): Eq. 7 and the others of Table 1.

    Eq. 7 as printed jumps at |delta| = beta; torch's smooth-L1, which is continuous there, is what is meant.
    """
    if objective == "cosine":  # over each token's patch vector
        return 1 + token_cosine(patchify(prediction, patch_size), patchify(target, patch_size))
    if objective == "smooth_l1":
        loss = F.smooth_l1_loss(prediction, target, beta=beta, reduction="none")
    else:
        loss = {"l1": F.l1_loss, "l2": F.mse_loss}[objective](prediction, target, reduction="none")
    return loss.flatten(1).mean(dim=1)


def training_losses(model, batch, alignments):
    """The terms of Eq. 8 per image, unweighted, in float32: {"denoising": (B,), and (B,) for each of the alignments}.

    batch: x, the clean latents (B, C, H, W); noise like x; t (B,); y (B,), the labels, the null class where dropped; and what
    else the targets need. NAME_share (B,), where there is one, weighs the images in the alignment NAME, see `draw_step`.
    """
    x_t, v = interpolate(batch["x"], batch["noise"], batch["t"])
    v_pred, predictions = model(x_t, batch["t"], batch["y"], return_align=True)
    losses = {"denoising": (v_pred.float() - v).square().mean(dim=(1, 2, 3))}                           # Eq. 4
    for name, alignment in alignments.items():  # "vae_repa" is Eq. 7: its target is the x that made x_t
        loss = alignment.loss(predictions[name].float(), alignment.target(batch).float())
        losses[name] = loss * batch.get(f"{name}_share", 1)
    return losses


class Alignment(NamedTuple):
    """A method's term of the loss; its head and the depth it sits at are the model's (`models.SiT.align`)."""

    target: Callable  # of a batch: what the head's prediction is compared with; no gradient flows into it
    loss: Callable    # of (prediction, target): (B,)
    weight: Callable  # of the epoch: lambda in Eq. 8


def clean_latent(batch):
    """VAE-REPA's target, (B, C, H, W)."""
    return batch["x"]


def encoder_tokens(encoder, batch):
    """REPA's target: the encoder's normalised patch tokens (B, N, dim) of the images."""
    return encoder(batch["images"])


@torch.no_grad()
def teacher_tokens(ema, depth, batch):
    """SRA's target: the EMA model's block `depth`, (B, N, D), for the same latents, noise and labels at the times t_teacher."""
    x_t, _ = interpolate(batch["x"], batch["noise"], batch["t_teacher"])
    return ema.block_output(x_t, batch["t_teacher"], batch["y"], depth)


def token_cosine(prediction, target):
    """REPA's loss: minus the cosine of prediction and target, tokens (B, N, D), mean over tokens -> (B,)."""
    return -F.cosine_similarity(prediction, target, dim=-1).mean(dim=1)


def constant(weight, epoch):
    return weight


def sra_weight(weight, epoch):
    """SRA's schedule: constant until epoch 149, then a tenth every 1000 epochs."""
    return weight * 0.1 ** (max(epoch - 149, 0) / 1000)


def build_alignments(args, ema, encoder):
    """{name: Alignment} of the methods in use."""
    smooth_l1 = partial(alignment_loss, objective="smooth_l1", beta=0.05, patch_size=ema.patch_size)
    alignments = {
        "vae_repa": Alignment(clean_latent, partial(smooth_l1, objective=args.vae_repa_loss, beta=args.vae_repa_beta),
                              partial(constant, args.vae_repa_weight)),
        "repa": Alignment(partial(encoder_tokens, encoder), token_cosine, partial(constant, args.repa_weight)),
        "sra": Alignment(partial(teacher_tokens, ema, args.sra_teacher_depth), smooth_l1, partial(sra_weight, args.sra_weight)),
    }
    return {name: alignment for name, alignment in alignments.items() if ema.align_depths[name]}


def sample_posterior(moments, eps, shift, scale):
    """x = (z - shift) * scale, z = mean + std * eps: raw moments (B, 2C, H, W), eps (B, C, H, W), shift, scale (C, 1, 1)."""
    mean, std = moments.float().chunk(2, dim=1)
    return (mean + std * eps - shift) * scale


def draw_step(batch_size, latent_shape, seed, step, interval, label_dropout, device):
    """All random numbers of one training step, for the whole global batch: (eps, noise, t, drop, inside, u).

    They depend on (seed, step) alone, and every process keeps its own rows: neither a resume nor the number of processes
    changes the run. inside (B,) weighs VAE-REPA's term: 0 where t is outside the interval, else B / (images inside), so
    that the mean over the batch is the mean over the images inside. u (B,) in [0, 1) is for SRA's times.
    """
    g = stream([seed, 1], step, device)
    eps, noise = torch.randn(2, batch_size, *latent_shape, generator=g, device=device)
    t = torch.rand(batch_size, generator=g, device=device)
    drop = torch.rand(batch_size, generator=g, device=device) < label_dropout
    u = torch.rand(batch_size, generator=g, device=device)
    inside = ((interval[0] <= t) & (t <= interval[1])).float()
    return eps, noise, t, drop, inside * batch_size / inside.sum().clamp(min=1), u


def build_batch(loaded, drawn, shift, scale, null_class, sra_t_max):
    """What `training_losses` takes, from an item of the loader of `Latents` and the numbers of `draw_step` for its rows."""
    moments, y, *images = loaded
    eps, noise, t, drop, inside, u = drawn
    batch = {"x": sample_posterior(moments, eps, shift, scale), "noise": noise, "t": t, "y": torch.where(drop, null_class, y),
             "vae_repa_share": inside, "t_teacher": (t - sra_t_max * u).clamp(min=0)}
    return {**batch, "images": images[0]} if images else batch


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, parameter by parameter."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def training_step(model, raw_model, ema, optimizer, batch, alignments, epoch, args):
    """One optimizer step on this process's images: (its mean losses, unweighted, and the gradient norm of all processes).

    model is raw_model, or DDP around it; losses (1 + alignments,) are in the order of `training_losses`.
    """
    share, weights = len(batch["x"]), [1.0, *(alignment.weight(epoch) for alignment in alignments.values())]
    totals = torch.zeros(len(weights), device=batch["x"].device)
    for first in range(0, share, args.micro_batch):
        part = {name: values[first : first + args.micro_batch] for name, values in batch.items()}
        last = first + args.micro_batch == share  # DDP averages the gradients over the processes once, in the last backward
        with contextlib.nullcontext() if last or model is raw_model else model.no_sync():
            with torch.autocast(totals.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                losses = training_losses(model, part, alignments)
            losses = torch.stack([loss.sum() / share for loss in losses.values()])
            sum(weight * loss for weight, loss in zip(weights, losses)).backward()                    # Eq. 8
        totals += losses.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    update_ema(ema, raw_model, args.ema_decay)
    return totals, grad_norm


class Latents(Dataset):
    """Item i: (moments (2C, H, W) as stored, label) and, if with_images, the image, uint8 (3, S, S).

    In a set made with --flip, i >= count is the mirror image of i - count.
    """

    def __init__(self, folder, with_images=False):
        self.folder, self.with_images, self.moments = Path(folder), with_images, None
        self.labels = np.load(self.folder / "labels.npy")

    def __getitem__(self, i):
        if self.moments is None:  # opened by each worker for itself: a memory map does not pickle as one
            self.moments = np.load(self.folder / "moments.npy", mmap_mode="r")
            self.images = np.load(self.folder / "images.npy", mmap_mode="r") if self.with_images else None
        mirrored, row = divmod(i, len(self.labels))
        item = torch.from_numpy(np.array(self.moments[i])), int(self.labels[row])
        if self.with_images:
            image = torch.from_numpy(np.array(self.images[row])).permute(2, 0, 1)
            item += ((image.flip(2) if mirrored else image).contiguous(),)
        return item


class StepBatches:
    """This process's rows of the global batch of each step in [start, stop).

    The batches are cut from one endless sequence of shuffled epochs, whose order depends on the seed alone. flip: half of
    the rows, drawn by (seed, step), are taken from the mirrored half of the set.
    """

    def __init__(self, count, batch_size, seed, start, stop, rank=0, world_size=1, flip=False):
        self.count, self.batch_size, self.seed, self.start, self.stop = count, batch_size, seed, start, stop
        self.rank, self.share, self.flip = rank, batch_size // world_size, flip

    def __iter__(self):
        epoch = None
        for step in range(self.start, self.stop):
            mirrored = np.zeros(self.batch_size, int)
            if self.flip:
                mirrored = np.random.default_rng([self.seed, 3, step]).integers(2, size=self.batch_size)
            rows = []
            for i in range(self.rank * self.share, (self.rank + 1) * self.share):
                position = step * self.batch_size + i
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = np.random.default_rng([self.seed, 2, epoch]).permutation(self.count)
                rows.append(int(order[position % self.count] + self.count * mirrored[i]))
            yield rows


def load_data(folder, with_images=False):
    """What latents.json says of a finished set, as a dict; fails if the set is missing, unfinished or damaged."""
    folder = Path(folder)
    if not (folder / "latents.json").exists():
        if (folder / "moments.npy.settings").exists():
            fail(f"the latents at {folder} are unfinished; run the same extract_latents.py command again, it continues")
        fail(f"no latents at --data {folder}; make them with `python extract_latents.py --images FOLDER --out {folder}`, "
             "or see the whole pipeline on drawn images with `python tests/demo.py`")
    try:
        about = read_json(folder / "latents.json")
        kept = ("vae", "shift", "scale", "latent_shape", "image_size", "count", "files_sha256")
        data = {key: about[key] for key in kept}
        data["num_classes"] = len(about["class_names"])
        moments, labels = np.load(folder / "moments.npy", mmap_mode="r"), np.load(folder / "labels.npy")
        channels, height, width = data["latent_shape"]
        if moments.dtype.kind != "f" or labels.dtype.kind not in "iu":
            raise ValueError(f"arrays of type {moments.dtype} and {labels.dtype} are no moments and labels")
        if any(type(number) is not int for number in (data["count"], *data["latent_shape"])):
            raise ValueError("count and latent_shape are not whole numbers")
        if about.get("flip"):
            data["flip"] = True
        rows = data["count"] * (2 if "flip" in data else 1)
        if moments.shape != (rows, 2 * channels, height, width) or labels.shape != (data["count"],):
            raise ValueError(f"arrays of shape {moments.shape} and {labels.shape} do not match latents.json")
        if height != width:
            raise ValueError(f"latents of {height}x{width} are not square")
        for key in ("shift", "scale"):
            values = np.ravel(data[key]).astype(np.float64)
            if len(values) not in (1, channels) or not np.isfinite(values).all():
                raise ValueError(f"{key} is {data[key]}, and there are {channels} channels")
        if with_images and (folder / "images.npy").exists():
            images, size = np.load(folder / "images.npy", mmap_mode="r"), data["image_size"]
            if images.shape != (data["count"], size, size, 3) or images.dtype != np.uint8:
                raise ValueError(f"images.npy holds {images.dtype} of shape {images.shape}, not {data['count']} images of "
                                 f"{size} pixels")
        if labels.min() < 0 or labels.max() >= data["num_classes"]:
            raise ValueError(f"labels run from {labels.min()} to {labels.max()} but there are {data['num_classes']} classes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        fail(f"the latents at {folder} are damaged ({type(error).__name__}: {error}); remove the folder and extract them again")
    if with_images and not (folder / "images.npy").exists():
        fail(f"--repa-depth needs the images beside the latents, and {folder} holds no images.npy: extract with --store-images")
    return data


TIMEOUT = timedelta(minutes=15)  # how long processes wait for one that hangs; torchrun ends those that one that dies leaves
NEVER = 2**62  # the step of a loss that was always finite
signals = []  # those that asked this process to stop: Slurm's before preemption, Ctrl-C


def note_signal(number, frame):
    signals.append(signal.Signals(number).name)


def listen_for_signals():
    signals.clear()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, note_signal)


def leave_signals_to_the_parent(worker):
    """For the processes that read latents: a signal sent to all of a job must not end them while training finishes a step."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_readers():
    """Whatever ends training, they go with it: an exception would wait for them for ever, since they ignore SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain of their death
    for reader in multiprocessing.active_children():
        reader.kill()


def any_signal(group):
    """Whether a signal has reached any of the processes: the same answer on all of them, and no look at the GPU."""
    noted = torch.tensor(len(signals))
    if group:
        dist.all_reduce(noted, dist.ReduceOp.MAX, group)
    return noted > 0


def check_same_start(start, group):
    """Fail if the processes do not resume from the same step: machines that do not see one folder would mix two runs."""
    starts = [None] * dist.get_world_size()
    dist.all_gather_object(starts, start, group)
    if len(set(starts)) > 1:
        fail(f"the processes resume from different steps, {starts}: all machines must see the same files in --run-dir")


def check_finite(bad_step):
    """The one look at the GPU for losses that are not finite: where the loop synchronises anyway, before any checkpoint."""
    if dist.is_initialized():
        dist.all_reduce(bad_step, dist.ReduceOp.MIN)
    if bad_step < NEVER:
        fail(f"the loss or its gradient is not finite at step {int(bad_step)}; no checkpoint holds it: look for NaN in the "
             "latents, or resume with a lower --lr in another --run-dir")


def log_line(step, names, totals, largest_norm, steps, batch_size, seconds):
    """A line of log.jsonl: means over the last `steps` steps of all processes, losses unweighted; GiB on the GPU, or in RAM."""
    if dist.is_initialized():
        dist.all_reduce(totals)
        totals /= dist.get_world_size()
    means = dict(zip([*names, "grad_norm"], (totals / steps).tolist()))
    if totals.is_cuda:
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"step": step, **means, "grad_norm_max": largest_norm.item(),  # shows a single spike, which is clipped
            "images_per_s": steps * batch_size / seconds, "memory_gib": memory}


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/latents", help="folder that extract_latents.py wrote")
    add("--model", default="SiT-XL/2", choices=list(SiT_models), metavar="SiT-{XL,L,B,S,Ti}/{1,2,4,8}", help="size/patch size")
    add("--vae-repa-depth", type=int, help="align the output of this block; 0 is plain SiT (default: XL 8, L 8, others 2)")
    add("--vae-repa-weight", type=float, default=1.0, help="lambda of Eq. 8")
    add("--vae-repa-loss", choices=["smooth_l1", "l1", "l2", "cosine"], default="smooth_l1", help="alignment objective")
    add("--vae-repa-beta", type=float, default=0.05, help="beta of smooth_l1, Eq. 7")
    add("--vae-repa-layers", type=int, default=5, help="layers of the alignment head")
    add("--vae-repa-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LO", "HI"), help="align where LO <= t <= HI")
    add("--repa-depth", type=natural, default=0, help="REPA on the output of this block (REPA: 8); 0 is off")
    add("--repa-weight", type=float, default=0.5, help="weight of REPA's loss")
    add("--repa-encoder", default="dinov2_vitb14", help="a DINOv2 of torch.hub's facebookresearch/dinov2")
    add("--repa-hub", metavar="DIR", help="local clone of it, with ENCODER_pretrain.pth inside (default: downloaded once)")
    add("--sra-depth", type=natural, default=0, help="SRA on the output of this block (SRA: XL 8, L 6, B 3); 0 is off")
    add("--sra-teacher-depth", type=natural, help="block of the EMA model that it is aligned to (default: XL 20, L 16, B 8)")
    add("--sra-t-max", type=float, default=0.2, help="the teacher sees a time earlier by up to this")
    add("--sra-weight", type=float, default=0.2, help="weight of SRA's loss until epoch 149, from where it falls slowly")
    add("--init-from", metavar="FILE", help="start from these EMA weights: of train.py, or published by REPA or SRA")
    add("--batch-size", type=positive_int, default=256, help="global: images per step over all processes")
    add("--micro-batch", type=positive_int, help="images per forward and process; gradients accumulate (default: all)")
    add("--max-steps", type=positive_int, default=400_000, help="optimizer steps")
    add("--lr", type=float, default=1e-4, help="AdamW's constant learning rate")
    add("--label-dropout", type=float, default=0.1, help="share of labels replaced by the null class")
    add("--ema-decay", type=float, default=0.9999, help="of the averaged weights that sampling uses")
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if torch.cuda.is_available() else "fp32",
        help="of the model's matrix products")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="torch.compile the blocks")
    add("--seed", type=natural, default=0, help="of weights, data order and noise")
    add("--num-workers", type=natural, default=4, help="processes per GPU that read latents")
    add("--run-dir", help="folder to write, or to resume in (default: runs/, then the settings that matter)")
    add("--log-every", type=positive_int, default=100, help="steps between lines of log.jsonl")
    add("--ckpt-every", type=positive_int, default=50_000, help="steps between checkpoints; the last step has one too")
    add("--keep", type=positive_int, help="keep only this many of them (default: all)")
    add("--newest-every", type=natural, default=10_000, help="steps between rewrites of checkpoints/newest.pt, to resume from")
    add("--sample-every", type=natural, default=10_000, help="steps between sample grids; 0 draws none")
    args = parser.parse_args()

    low, high = args.vae_repa_interval
    size = args.model.split("-")[1].split("/")[0]
    args.vae_repa_depth = ALIGN_DEPTHS[size] if args.vae_repa_depth is None else args.vae_repa_depth
    for method in ("vae_repa", "repa", "sra"):
        if not getattr(args, f"{method}_weight"):  # weight 0 builds no head either
            setattr(args, f"{method}_depth", 0)
    args.sra_teacher_depth = SRA_DEPTHS[size][1] if args.sra_teacher_depth is None else args.sra_teacher_depth
    if args.sra_depth and not args.sra_depth < args.sra_teacher_depth <= SIZES[size][0]:
        fail(f"--sra-teacher-depth {args.sra_teacher_depth} is not above --sra-depth {args.sra_depth} and within the model's "
             f"{SIZES[size][0]} blocks")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    args.micro_batch = args.micro_batch or max(args.batch_size // world_size, 1)
    if args.batch_size % (world_size * args.micro_batch):
        fail(f"--batch-size {args.batch_size} is not divisible by {world_size} process(es) x --micro-batch {args.micro_batch}")
    if not 0 <= low <= high <= 1:
        fail(f"--vae-repa-interval {low} {high} is not within [0, 1] in rising order")
    for name, fits, wanted in [
            ("vae_repa_weight", args.vae_repa_weight >= 0, "at least 0"), ("vae_repa_beta", args.vae_repa_beta > 0, "above 0"),
            ("repa_weight", args.repa_weight >= 0, "at least 0"), ("sra_weight", args.sra_weight >= 0, "at least 0"),
            ("sra_t_max", 0 <= args.sra_t_max <= 1, "in [0, 1]"),
            ("lr", args.lr > 0, "above 0"), ("grad_clip", args.grad_clip > 0, "above 0 (inf clips nothing)"),
            ("label_dropout", 0 <= args.label_dropout < 1, "in [0, 1)"), ("ema_decay", 0 <= args.ema_decay < 1, "in [0, 1)")]:
        if not fits:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is not {wanted}")
    args.run_dir = args.run_dir or default_run_dir(args, parser)
    return args


METHODS = {"vae_repa": ["depth", "weight", "loss", "beta", "layers", "interval"],
           "repa": ["depth", "weight", "encoder"], "sra": ["depth", "teacher_depth", "t_max", "weight"]}  # and their settings


def default_run_dir(args, parser):
    """runs/MODEL_METHODS, then each setting that changes what is learned and is not at its default."""
    methods = [method for method in METHODS if getattr(args, f"{method}_depth")]
    name = [args.model.replace("/", "-")]
    name += [f"{method.replace('_', '-')}-depth-{getattr(args, f'{method}_depth')}" for method in methods] or ["plain"]
    name += [f"data-{Path(args.data).name}"] if args.data != parser.get_default("data") else []
    name += [f"from-{Path(args.init_from).stem}"] if args.init_from else []
    matter = [f"{method}_{key}" for method in methods for key in METHODS[method][1:]]
    for key in [*matter, "batch_size", "lr", "label_dropout", "ema_decay", "grad_clip", "precision", "seed"]:
        value, default = getattr(args, key), parser.get_default(key)
        if key == "sra_teacher_depth":
            default = SRA_DEPTHS[args.model.split("-")[1].split("/")[0]][1]
        if value != default:
            name.append(f"{key.replace('_', '-')}-{'-'.join(map(str, value)) if isinstance(value, list) else value}")
    return str(Path("runs", "_".join(name)))


def comparable(settings):
    """The settings that a run may not change when it resumes, flat; those of methods that are off play no part."""
    free = ("run_dir", "micro_batch", "max_steps", "compile", "num_workers", "log_every", "ckpt_every", "keep",
            "newest_every", "sample_every", "repa_hub", "data")
    settings = settings if isinstance(settings, dict) else {}  # of a damaged file: all differ
    data = settings.get("data") if isinstance(settings.get("data"), dict) else {}
    off = tuple(f"{method}_" for method in METHODS if not settings.get(f"{method}_depth"))
    own = {key: value for key, value in settings.items() if key not in free and not key.startswith(off)}
    return {**own, **{f"data {key}": value for key, value in data.items()}}


def load_encoder(name, hub, image_size):
    """The models.Encoder `name` of torch.hub's facebookresearch/dinov2, or of a local clone of it."""
    try:
        if hub:
            weights = Path(hub, f"{name}_pretrain.pth")
            network = torch.hub.load(hub, name, source="local", pretrained=not weights.exists())
            if weights.exists():
                network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        else:
            os.makedirs(torch.hub.get_dir(), exist_ok=True)
            with open(Path(torch.hub.get_dir(), "dinov2.lock"), "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # one process of a machine downloads, the others find it there
                network = torch.hub.load("facebookresearch/dinov2", name, verbose=False)
        return Encoder(network, image_size)
    except Exception as error:  # hub, network, code, file and shape errors have no common class
        fail(f"cannot use the encoder {name!r} of {hub or 'facebookresearch/dinov2'}: {reason(error)} (give --repa-hub a clone "
             f"of that repository with {name}_pretrain.pth in it)")


def initial_weights(path, settings, model):
    """The weights of --init-from for this model; without the label table if that is of another number of classes."""
    weights, there = load_weights(path)
    table = "y_embedder.embedding_table.weight"
    wanted = {key: value.shape for key, value in model.state_dict().items() if not key.startswith(HEADS)}
    if table in weights and weights[table].shape[1:] == wanted[table][1:] and len(weights[table]) != wanted[table][0]:
        del weights[table], wanted[table]
    if {key: value.shape for key, value in weights.items()} != wanted:
        fail(f"--init-from {path} holds a {there['model']} for latents of {there['data']['latent_shape']}, and this run is a "
             f"{settings['model']} for latents of {settings['data']['latent_shape']}")
    return weights


def draw_grid(ema, vae, data, args, path):
    """A row of 4 images for each of up to 10 classes, by the EMA model, always of the same noise; guidance 4 as in Fig. 4."""
    classes = np.linspace(0, data["num_classes"] - 1, min(data["num_classes"], 10)).astype(int)
    y = np.repeat(classes, 4)
    options = {"mode": "ode", "num_steps": 50, "cfg_scale": 4.0}
    images = sample_images(ema, vae, data, range(len(y)), y, args.seed, args.precision, **options)
    save_grid(images.cpu().numpy(), 4, path)


def numbered(folder):
    """The checkpoints that --ckpt-every left, in order of their steps."""
    return sorted((path for path in folder.glob("*.pt") if path.stem.isdigit()), key=lambda path: int(path.stem))


def newest_checkpoint(folder):
    """(path, contents) of the checkpoint with the most steps, or (None, None); fails if it is damaged."""
    found = []
    for path in [*numbered(folder)[-1:], *folder.glob("newest.pt")]:
        checkpoint = load_checkpoint(path)
        if not {"model", "ema", "opt", "step", "settings"} <= set(checkpoint):
            fail(f"{path} is no checkpoint of train.py; remove it")
        found.append((path, checkpoint))
    return max(found, key=lambda pair: pair[1]["step"], default=(None, None))


def save_checkpoint(folder, checkpoint, rolling, keep):
    """Write STEP.pt, or newest.pt if rolling; only once that is safely on disk, remove what it makes superfluous."""
    with whole_file(folder / ("newest.pt" if rolling else f"{checkpoint['step']:07d}.pt")) as file:
        torch.save(checkpoint, file)  # tensors, numbers and dicts: loads weights-only
    if not rolling:
        superfluous = numbered(folder)[:-keep] if keep else []
        for path in [folder / "newest.pt", *superfluous]:
            path.unlink(missing_ok=True)


def prepare(args):
    """Every check, before the GPU is touched.

    Returns the settings and, each None where there is none: the checkpoint to resume, the weights to start from, REPA's
    encoder, and the VAE for the sample grids.
    """
    run_dir, initial, encoder, vae = Path(args.run_dir), None, None, None
    settings = {**vars(args), "data": load_data(args.data, args.repa_depth > 0)}
    if args.repa_depth:
        encoder = load_encoder(args.repa_encoder, args.repa_hub, settings["data"]["image_size"])
        settings["repa_dim"] = encoder.dim
    try:
        with torch.device("meta"):
            model = build_model(settings, heads=True)
    except ValueError as error:
        fail(f"--model {args.model} does not fit: {error}")
    if encoder and encoder.side != model.input_size // model.patch_size:
        fail(f"--repa-encoder {args.repa_encoder} gives {encoder.side}x{encoder.side} tokens for images of "
             f"{settings['data']['image_size']} pixels, and {args.model} has {model.input_size // model.patch_size} a side")
    if (run_dir / "settings.json").exists():
        there = read_json(run_dir / "settings.json")
        check_same_settings(run_dir, comparable(there), comparable(settings))
    path, checkpoint = newest_checkpoint(run_dir / "checkpoints")
    if checkpoint:
        check_same_settings(path, comparable(checkpoint["settings"]), comparable(settings))
        try:
            for weights in ("model", "ema"):  # on the meta device this only compares names and shapes
                model.load_state_dict(dict(checkpoint[weights]), assign=True)  # dict(), or torch notes `assign` in the original
        except (RuntimeError, TypeError, ValueError) as error:
            fail(f"{path} does not hold the weights of {args.model} with these heads ({' '.join(str(error).split())[:200]}); "
                 "remove it, and the run resumes from an older one")
    elif args.init_from:
        initial = initial_weights(args.init_from, settings, model)
    if int(os.environ.get("RANK", 0)) == 0:
        vae = load_vae(settings["data"]["vae"]) if 0 < args.sample_every <= args.max_steps else None
        lock(run_dir / "lock", run_dir)
        for folder in (run_dir / "checkpoints", run_dir / "samples"):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "settings.json", settings)
    return settings, checkpoint, initial, encoder, vae


def build_training(settings, device, initial=None):
    """(model, EMA, optimizer) at step 0, the same on every process."""
    torch.manual_seed(settings["seed"])
    model = build_model(settings, heads=True)
    if initial:
        model.load_state_dict(initial, strict=False)  # `initial_weights` has checked them
    model.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], betas=(0.9, 0.999), weight_decay=0,
                                  fused=device.type != "mps")
    if settings["compile"]:
        for block in model.blocks:  # one by one: quick to compile, and DDP's all-reduce still overlaps with backward
            block.compile()
        for block in ema.blocks[: settings["sra_teacher_depth"] if settings["sra_depth"] else 0]:
            block.compile(dynamic=False)  # static, so that the sample grids' other batch size does not slow the teacher down
    return model, ema, optimizer


def main():
    args = parse_args()
    settings, checkpoint, initial, encoder, vae = prepare(args)
    data, run_dir = settings["data"], Path(args.run_dir)

    rank, world_size, device = init_distributed(timeout=TIMEOUT)
    raw_model, ema, optimizer = build_training(settings, device, initial)
    start = 0
    if checkpoint:
        raw_model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["opt"])
        start = checkpoint["step"]
    del checkpoint, initial
    if encoder:
        encoder.to(device)
        if args.precision == "bf16":
            to_bf16(encoder)
    alignments = build_alignments(args, ema, encoder)
    model, group = raw_model, None
    if world_size > 1:
        model = DistributedDataParallel(raw_model, gradient_as_bucket_view=True)
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        check_same_start(start, group)
    if rank == 0:
        vae = vae and vae.to(device)
        millions = sum(p.numel() for p in raw_model.parameters()) / 1e6
        print(f"{run_dir}: {millions:.1f} M parameters, from step {start}, on {world_size} x {device.type}")

    share = args.batch_size // world_size
    mine = slice(rank * share, (rank + 1) * share)
    shift, scale = (per_channel(data[key], torch.empty(0, device=device)) for key in ("shift", "scale"))
    order = StepBatches(data["count"], args.batch_size, args.seed, start, args.max_steps, rank, world_size, "flip" in data)
    batches = iter(DataLoader(Latents(args.data, args.repa_depth > 0), batch_sampler=order, num_workers=args.num_workers,
                              pin_memory=device.type == "cuda", worker_init_fn=leave_signals_to_the_parent))
    bad_step = torch.full((), NEVER, device=device)  # first step whose loss or gradient is not finite
    names = ["denoising", *alignments]
    totals, largest_norm = torch.zeros(len(names) + 1, device=device), torch.zeros((), device=device)
    done, since, clock = start, start, time.perf_counter()
    atexit.register(end_readers)
    listen_for_signals()
    progress = tqdm(range(start, args.max_steps), desc="training", initial=start, total=args.max_steps, disable=rank > 0)
    for step in progress:
        loaded = [values.to(device, non_blocking=True) for values in next(batches)]
        drawn = [values[mine] for values in draw_step(
            args.batch_size, data["latent_shape"], args.seed, step, args.vae_repa_interval, args.label_dropout, device)]
        batch = build_batch(loaded, drawn, shift, scale, data["num_classes"], args.sra_t_max)
        epoch = step * args.batch_size // data["count"]
        losses, grad_norm = training_step(model, raw_model, ema, optimizer, batch, alignments, epoch, args)
        totals += torch.cat([losses, grad_norm.view(1)])
        largest_norm = torch.maximum(largest_norm, grad_norm)
        bad_step = torch.minimum(bad_step, torch.where(totals.sum().isfinite(), NEVER, step + 1))

        done, stop = step + 1, any_signal(group)
        log, keep, roll, draw = (every and done % every == 0 for every in
                                 (args.log_every, args.ckpt_every, args.newest_every, args.sample_every))
        keep = keep or done == args.max_steps
        if log or keep or roll or draw or stop:
            check_finite(bad_step)  # synchronises with the GPU
        if log:
            line = log_line(done, names, totals, largest_norm, done - since, args.batch_size, time.perf_counter() - clock)
            if rank == 0:
                with open(run_dir / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                progress.set_postfix({key: f"{line[key]:.3g}" for key in (*names, "images_per_s")})
            totals, largest_norm = torch.zeros_like(totals), torch.zeros_like(largest_norm)
            since, clock = done, time.perf_counter()
        paused = time.perf_counter()
        if rank == 0 and (keep or roll or stop):
            save_checkpoint(run_dir / "checkpoints", {"model": raw_model.state_dict(), "ema": ema.state_dict(),
                            "opt": optimizer.state_dict(), "step": done, "settings": settings}, not keep, args.keep)
        if rank == 0 and draw:
            draw_grid(ema, vae, data, args, run_dir / "samples" / f"{done:07d}.png")
        clock += time.perf_counter() - paused
        if stop:
            break
    barrier()
    if rank == 0:
        stopped = f", stopped by {' '.join(signals) or 'a signal'}; the same command goes on" if done < args.max_steps else ""
        print(f"{run_dir}: done at step {done}{stopped}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
