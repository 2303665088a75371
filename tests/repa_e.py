"""REPA-E's ablations (Tables 1 and 7): what tunes the VAE, and what that does to its latents.

    torchrun --nproc_per_node=8 tests/repa_e.py --variant NAME  # and train.py's flags, but for --tune-vae

NAME is diffusion-loss (which tunes the VAE in the place of REPA's loss), no-stop-gradient (all of SiT's loss
tunes it, too) or no-batch-norm (latents are normalised by the first VAE's statistics).

    python tests/repa_e.py

compares them on the demo's images, in two hours on a CPU core: it trains SiT with REPA five times with the
same seed, with a fixed VAE, with --tune-vae, and as above. REPA's encoder is the classifier of
tests/data/detector.pt2, cut before its mean over places; LPIPS is off for want of weights, the GAN for want
of time. It prints a table and draws reconstructions.png, a row of images and one for each VAE, into
runs/repa-e. If interrupted, run the same command again.

What the numbers in tests/PAPERS.md say: where the diffusion loss reaches the VAE, latents collapse. Within
an image they vary a tenth as much as before (0.12 and 0.15 instead of 1.4), which is easy to denoise (0.15
instead of 0.64), and samples are poor (Fréchet distance 36 and 38 instead of 6). REPA-E's stay whole, and
vary less between neighbours in units of their standard deviation (62 instead of 77). But samples are no
better here, perhaps as this VAE was trained to be easy to denoise, with a strong KL, or in want of steps; and
without batch norm they are no worse.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from demo import SIZE, Encoder  # noqa: E402
from export_encoder import export  # noqa: E402
from figures import call, print_table, total_variation, variance  # noqa: E402

import models  # noqa: E402
import train  # noqa: E402  (these are found only now)
from extract_latents import Latents, Parser, fail, positive_int, run  # noqa: E402
from sample import save_grid  # noqa: E402

TUNED = ("--lpips-weight", 0, "--gan-weight", 0)
METHODS = {"fixed VAE": (), "REPA-E": ("--tune-vae", *TUNED),
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


def measure(folder, data, args):
    """Sample, extract and reconstruct with a run's own VAE: a row of the table."""
    checkpoint, fid = folder / "checkpoints" / f"{args.steps:07d}", ("--detector", "tests/data/detector.pt2")
    vae = f"{checkpoint}-vae" if Path(f"{checkpoint}-vae").exists() else "tests/data/vae"
    call("extract_latents.py", "--images", data / "images", "--out", folder / "latents", "--vae", vae,
         "--image-size", SIZE, "--reconstruct", "--num-workers", 1)
    call("sample.py", "--ckpt", f"{checkpoint}.pt", "--mode", "ode", "--num-steps", 30, "--num-samples", 500,
         "--out", f"{checkpoint}.npz")
    for name, images in (("samples", f"{checkpoint}.npz"), ("rfid", folder / "latents/reconstructions.npy")):
        call("fid.py", images, "--ref", data / "images", *fid, "--json", folder / f"{name}.json")
    latents = Latents(folder / "latents")
    z = latents.read(range(latents.facts["count"]))["mean"] / torch.from_numpy(latents.scale)
    last = json.loads((folder / "log.jsonl").read_text().split("\n")[-2])
    generated, rebuilt = (json.loads((folder / f"{name}.json").read_text())["FID"]
                          for name in ("samples", "rfid"))
    return [f"{variance(z):.3g}", f"{total_variation(z):.3g}", f"{-last['repa']:.3f}",
            f"{last['denoising']:.3f}", f"{generated:.2f}", f"{rebuilt:.3f}"]


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
    parser.add_argument("--steps", type=positive_int, default=1400, help="to train")
    return parser.parse_args()


def main():
    args = parse_args()
    if "tune_vae" in args:
        train_variant(args)
    else:
        compare(args)


def compare(args):
    """Train and measure each of METHODS: a row of the table, and of the picture."""
    data, out, rows = Path("runs/demo/2000-images"), Path("runs/repa-e"), []
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which stops what runs
    call("tests/data/draw_images.py", data / "images", "--count", 2000, "--size", SIZE)
    call("extract_latents.py", "--images", data / "images", "--out", data / "latents",
         "--vae", "tests/data/vae", "--image-size", SIZE, "--store-images", "--num-workers", 1)
    out.mkdir(parents=True, exist_ok=True)
    export(Encoder(), out / "encoder.pt2", SIZE)
    latents = Latents(data / "latents", extras=["images"])
    _, shown = np.unique(latents.labels, return_index=True)  # an image of each class
    pictures = [latents.arrays["images"][shown]]
    for method, flags in METHODS.items():
        folder = out / f"{method.replace(' ', '-')}_{args.steps}-steps"
        script = "tests/repa_e.py" if "--variant" in flags else "train.py"
        call(script, "--data", data / "latents", "--run-dir", folder, "--model", "SiT-Ti/2", *flags,
             "--vae-repa-depth", 0, "--repa-depth", 2, "--repa-encoder", out / "encoder.pt2",
             "--batch-size", 32, "--max-steps", args.steps, "--lr", 1e-3, "--ema-decay", 0.99,
             "--log-every", args.steps // 10 or 1, "--sample-every", args.steps)
        rows.append([method, *measure(folder, data, args)])
        pictures.append(np.load(folder / "latents/reconstructions.npy", mmap_mode="r")[shown])
    save_grid(np.concatenate(pictures), len(shown), out / "reconstructions.png")
    print_table(["", "variance", "total variation", "cosine", "denoising loss", "Fréchet distance",
                 "of reconstructions"], rows)


if __name__ == "__main__":
    run(main)
