"""REPA-E on the demo's images: what tuning the VAE does to its latents, in 45 minutes on a CPU core:

    python tests/repa_e.py

trains SiT with REPA three times with the same seed: with a fixed VAE; with --tune-vae; and with the VAE tuned
by the diffusion loss in the place of REPA's, which REPA-E warns of (Table 1): its latents collapse. REPA's
encoder is the classifier of tests/data/detector.pt2, cut before its mean over places; LPIPS is off for want
of weights, the GAN for want of time. It prints a table and draws reconstructions.png, a row of images and one
for each VAE, into runs/repa-e. If interrupted, run the same command again.

What README's table says: as in REPA-E's Table 1, the diffusion loss makes the latents collapse: easy to
denoise, poor as images. REPA-E's stay whole, and vary less between neighbours in units of their standard
deviation (62 instead of 77). But samples are no better here, perhaps as this VAE was trained to be easy to
denoise, with a strong KL, or in want of steps.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "data")]
from figures import call, print_table, total_variation, variance  # noqa: E402
from train_detector import SIZE, Detector  # noqa: E402

import train  # noqa: E402  (these are found only now)
from extract_latents import Latents, Parser, positive_int, run  # noqa: E402
from sample import save_grid  # noqa: E402

TUNED = ("--tune-vae", "--lpips-weight", 0, "--gan-weight", 0)
vae_losses = train.vae_losses
METHODS = {"fixed VAE": (), "REPA-E": TUNED, "diffusion loss": (*TUNED, "--tune-repa-weight", 1)}


def naive_losses(tuned, model, batch, args):
    """`train.vae_losses`, with the diffusion loss in the place of REPA's."""
    z, losses = vae_losses(tuned, model, batch, args)
    x_t, v = train.interpolate(model.bn(z), batch["noise"], batch["t"])
    v_pred = model(x_t, batch["t"], batch["y"])
    return z, {**losses, "tune_repa": (v_pred - v).square().mean(dim=(1, 2, 3))}


class Encoder(torch.nn.Module):
    """The classifier's last map as tokens: uint8 images (B, 3, 64, 64) -> (B, 16, 96)."""

    def __init__(self):
        super().__init__()
        self.detector = Detector()
        self.detector.load_state_dict(torch.export.load(ROOT / "tests/data/detector.pt2").state_dict)

    def forward(self, images):
        x = images.float() / 127.5 - 1
        for conv, norm in zip(self.detector.convs, self.detector.norms):
            x = F.silu(norm(conv(x)))
        return x.flatten(2).transpose(1, 2)


def export(module, path, size):
    """Write an encoder as a program of torch.export for any number of images."""
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    n = torch.export.Dim("n", min=1, max=2**16)  # torch 2.6 asks for a maximum
    with torch.no_grad():  # else torch 2.6 cannot save modules that say so themselves
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: n},), strict=False)
    torch.export.save(program, path)


def measure(folder, data, args):
    """Sample, extract and reconstruct with a run's own VAE: a row of the table."""
    checkpoint, fid = folder / "checkpoints" / f"{args.steps:07d}", ("--detector", "tests/data/detector.pt2")
    vae = f"{checkpoint}-vae" if Path(f"{checkpoint}-vae").exists() else "tests/data/vae"
    call("extract_latents.py", "--images", data / "images", "--out", folder / "latents", "--vae", vae,
         "--image-size", SIZE, "--reconstruct", "--num-workers", 1)
    call("sample.py", "--ckpt", f"{checkpoint}.pt", "--mode", "ode", "--num-steps", 30, "--num-samples", 500)
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
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=positive_int, default=1400, help="to train")
    return parser.parse_args()


def main():
    args, data, out, rows = parse_args(), Path("runs/demo/2000-images"), Path("runs/repa-e"), []
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
        script = ("tests/repa_e.py", "naive") if method == "diffusion loss" else ("train.py",)
        call(*script, "--data", data / "latents", "--run-dir", folder, "--model", "SiT-Ti/2", *flags,
             "--vae-repa-depth", 0, "--repa-depth", 2, "--repa-encoder", out / "encoder.pt2",
             "--batch-size", 32, "--max-steps", args.steps, "--lr", 1e-3, "--ema-decay", 0.99,
             "--log-every", args.steps // 10 or 1, "--sample-every", args.steps)
        rows.append([method, *measure(folder, data, args)])
        pictures.append(np.load(folder / "latents/reconstructions.npy", mmap_mode="r")[shown])
    save_grid(np.concatenate(pictures), len(shown), out / "reconstructions.png")
    print_table(["", "variance", "total variation", "cosine", "denoising loss", "Fréchet distance",
                 "of reconstructions"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["naive"]:
        del sys.argv[1]
        train.vae_losses, main = naive_losses, train.main
    run(main)
