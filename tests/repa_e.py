"""REPA-E's ablations (Tables 1 and 7): what tunes the VAE, and what that does to its latents.

    torchrun --nproc_per_node=8 tests/repa_e.py --variant NAME  # and train.py's flags, but for --tune-vae

NAME is diffusion-loss (which tunes the VAE in the place of REPA's loss), no-stop-gradient (all of SiT's loss
tunes it, too) or no-batch-norm (latents are normalised by the first VAE's statistics).

    python tests/repa_e.py --seeds 5  # or of fewer --methods

compares them on the demo's images, an hour a seed on 2 cores: it trains SiT with REPA with a fixed VAE,
with --tune-vae, with that but no alignment loss on the VAE, and as above. REPA's encoder is the classifier of
tests/data/detector.pt2, cut before its last convolution; LPIPS is off for want of weights, the GAN for want
of time. It prints a table and draws into runs/repa-e: reconstructions.png, a row of images and one for each
VAE, and samples.png, a row for each SiT. If interrupted, run the same command again. tests/PAPERS.md has what
came out.
"""

import itertools
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from demo import (  # noqa: E402
    DETECTOR,
    OF_SEEDS,
    SCRIPTS,
    add_flags,
    compared_with,
    data_folder,
    encoder_of,
    export_encoder,
    in_root,
    prepare,
    record,
    results,
    say_what_is_old,
    side_by_side,
    table,
)
from figures import total_variation, variance  # noqa: E402

import models  # noqa: E402
import train  # noqa: E402  (these are found only now)
from extract_latents import Latents, Parser, content_id, fail, positive_int, run  # noqa: E402
from sample import save_grid  # noqa: E402

TUNED = ("--lpips-weight", 0, "--gan-weight", 0)
METHODS = {"fixed VAE": (), "REPA-E": ("--tune-vae", *TUNED),
           "without alignment": ("--tune-vae", "--tune-repa-weight", 0, *TUNED),
           "diffusion loss": ("--variant", "diffusion-loss", *TUNED),
           "without stop-gradient": ("--variant", "no-stop-gradient", *TUNED),
           "without batch norm": ("--variant", "no-batch-norm", *TUNED)}

# train.py's own, which a variant replaces
vae_losses, vae_loss_weights, make_parser = train.vae_losses, train.vae_loss_weights, train.make_parser


def normalized(z):
    """Latents z (b, C, H, W) by their own statistics, as in `LatentNorm.update`, but with gradients, also of
    the statistics: SiT's input if nothing is detached. Of a --micro-batch, over all processes."""
    centred = z - channel_means(z)
    return centred / (channel_means(centred.square()) + models.LatentNorm.EPS).sqrt()


def channel_means(x):
    x = x.mean((0, 2, 3), keepdim=True)
    return all_reduce(x) / dist.get_world_size() if dist.is_initialized() else x


def sit_losses(model, z, batch, args):
    """The terms of SiT's loss, of latents z that are not detached: {name: (b,)}."""
    with train.autocast(z.device, args.precision):
        return train.training_losses(model, None, {**batch, "x": normalized(z)}, args)


def diffusion_loss(tuned, model, batch, args):
    """REPA-E's Table 1: the diffusion loss tunes the VAE, in the place of REPA's loss."""
    z, losses = vae_losses(tuned, model, batch, args)
    losses["tune_sit"] = sit_losses(model, z, batch, args)["denoising"]
    del losses["tune_repa"]
    return z, losses


def no_stop_gradient(tuned, model, batch, args):
    """REPA-E's Table 7: all of SiT's loss tunes the VAE, too."""
    z, losses = vae_losses(tuned, model, batch, args)
    weights = train.loss_weights(args, 0)
    losses["tune_sit"] = sum(weights[name] * loss for name, loss in sit_losses(model, z, batch, args).items())
    return z, losses


# name: `vae_losses` in its place; no-batch-norm keeps them
VARIANTS = {"diffusion-loss": diffusion_loss, "no-stop-gradient": no_stop_gradient,
            "no-batch-norm": vae_losses}


def variant_parser():
    """train.py's, with --variant, a kind of --tune-vae: the run is named, recorded and resumed as such."""
    parser = make_parser()
    parser.add_argument("--variant", dest="tune_vae", choices=VARIANTS, help="in the place of --tune-vae")
    return parser


def train_variant(args):
    """train.py, with another VAE's loss, or another norm of latents."""
    train.vae_losses = VARIANTS[args.tune_vae]
    train.vae_loss_weights = lambda args: {**vae_loss_weights(args), "tune_sit": 1}
    if args.tune_vae == "no-batch-norm":  # Table 7: the statistics stay those of the VAE as it was
        models.LatentNorm.update = models.LatentNorm.forward
    train.main()


# as demo.METRICS
COLUMNS = {"variance": ("variance", 2, 0), "variation": ("total variation", 1, 0), "cosine": ("cosine", 3, 0),
           "denoising": ("denoising loss", 3, 0), "FID": ("Fréchet distance", 2, -1),
           "rFID": ("of reconstructions", 3, -1)}


def commands_of(args, data, folder, seed, method):
    """Train and sample; encode and reconstruct the images with the run's own VAE; measure both."""
    flags, checkpoint = METHODS[method], folder / "checkpoints" / f"{args.steps:07d}"
    vae = f"{checkpoint}-vae" if flags else args.vae
    if flags:  # the KL is a sum over an image's latent, all else a mean; this is as 1e-6 at 256 pixels
        flags = (*flags, "--kl-weight", 1e-6 * (256 / args.image_size) ** 2)
    return [
        ("tests/repa_e.py" if "--variant" in flags else "train.py", "--data", data / "latents", "--run-dir",
         folder, "--model", "SiT-Ti/2", *flags, "--vae-repa-depth", 0, "--repa-depth", 2, "--repa-encoder",
         encoder_of(args), "--batch-size", 32, "--max-steps", args.steps, "--lr", args.lr, "--seed", seed,
         "--ema-decay", 0.99, "--log-every", math.gcd(args.steps, 10), "--sample-every", args.steps),
        ("extract_latents.py", "--images", args.images_from or data / "images", "--out", folder / "latents",
         "--vae", vae, "--image-size", args.image_size, "--reconstruct", "--num-workers", 1),
        ("sample.py", "--ckpt", f"{checkpoint}.pt", "--mode", "ode", "--num-steps", 30, "--num-samples", 500,
         "--seed", seed, "--out", folder / "500.npz"),
        ("fid.py", folder / "500.npz", *compared_with(args, data), "--json", folder / "500.json"),
        ("fid.py", folder / "latents/reconstructions.npy", *compared_with(args, data), "--json",
         folder / "500_rfid.json")]


def columns(folder, steps):
    """A run's COLUMNS, a list."""
    latents = Latents(folder / "latents")
    z = latents.read(range(latents.facts["count"]))["mean"] / torch.from_numpy(latents.scale)
    drawn, rebuilt = (results(folder, steps, folder / name) for name in ("500.json", "500_rfid.json"))
    return [variance(z), total_variation(z), -drawn["repa"], drawn["denoising"], drawn["FID"], rebuilt["FID"]]


def parse_args():
    if any(word.split("=")[0] == "--variant" for word in sys.argv):
        train.make_parser = variant_parser
        args = train.parse_args()
        if args.tune_vae not in VARIANTS or "--tune-vae" in sys.argv:
            fail("--variant and --tune-vae exclude each other")
        if args.sra_depth or args.vae_from_scratch and args.tune_vae == "no-batch-norm":
            fail("--sra-depth cannot be with --variant, nor --vae-from-scratch with no-batch-norm")
        return args
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=positive_int, default=1, help="train with seeds 0, 1, … this many")
    parser.add_argument("--lr", type=train.nonnegative_float, default=2e-3, help="of SiT and of the VAE")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="to compare")
    add_flags(parser)
    return in_root(parser)


def main():
    args = parse_args()
    if "tune_vae" in args:
        train_variant(args)
    else:
        compare(args)


def compare(args):
    """Train and measure each of METHODS with each seed: rows of the table, and of the picture."""
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which stops what runs
    data, started = data_folder(args), time.perf_counter()
    prepare(args, data)
    export_encoder(args)
    out = Path("runs/repa-e", data.name)
    if args.detector != DETECTOR:
        out = out.with_name(f"{out.name}_{content_id(args.detector)}")
    args.methods = [method for method in METHODS if method in args.methods]
    folders, records, jobs = {}, {}, {}
    for method, seed in itertools.product(args.methods[::-1], range(args.seeds)):  # the longest come first
        name = f"{method.replace(' ', '-')}_{args.steps}-steps_lr-{args.lr:g}_seed-{seed}"
        folders[method, seed] = folder = out / name
        commands = commands_of(args, data, folder, seed, method)
        records[folder] = record([*map(str, commands[0])], [*SCRIPTS, "tests/repa_e.py", encoder_of(args)])
        if not (folder / "500_rfid.json").exists():
            jobs[folder] = records[folder], commands
    say_what_is_old(records, args.steps)
    side_by_side(jobs, args.steps)

    measured = {method: np.array([columns(folders[method, seed], args.steps) for seed in range(args.seeds)])
                for method in args.methods}
    print(OF_SEEDS if args.seeds > 1 else "", table(measured, COLUMNS), "", sep="\n")
    latents = Latents(data / "latents", extras=["images"])
    _, shown = np.unique(latents.labels, return_index=True)  # an image of each class
    pictures, samples = [latents.arrays["images"][shown]], []
    for method in args.methods:
        folder = folders[method, 0]
        pictures.append(np.load(folder / "latents/reconstructions.npy", mmap_mode="r")[shown])
        samples.append(np.load(folder / "500.npz")["arr_0"][:16])
    save_grid(np.concatenate(pictures), len(shown), out / "reconstructions.png")
    save_grid(np.concatenate(samples), 16, out / "samples.png")
    say_what_is_old(records, args.steps)
    print(f"{out}/reconstructions.png, samples.png; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    run(main)
