"""The whole pipeline on drawn images, on a CPU with 2 cores and no network, in a few minutes:

    python tests/demo.py

draws images, encodes them, trains plain SiT and SiT + VAE-REPA with the same seed, samples from both and
measures the samples. Everything goes to runs/demo. It only calls the scripts that a user would call, and
prints each command first.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs/demo")
STEPS = 1800
METHODS = {"SiT-Ti/2": 0, "SiT-Ti/2 + VAE-REPA": 2}  # alignment depth


def run(*command):
    print(f"\n$ python {shlex.join(map(str, command))}", flush=True)
    if status := subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode:
        sys.exit(status)


def main():
    started, table, pictures = time.perf_counter(), [], []
    run("tests/data/draw_images.py", RUNS / "images", "--count", 2000, "--size", 64)
    run("extract_latents.py", "--images", RUNS / "images", "--out", RUNS / "latents",
        "--vae", "tests/data/vae", "--image-size", 64, "--num-workers", 1)
    for method, depth in METHODS.items():
        folder = RUNS / f"depth-{depth}"
        checkpoint = folder / "checkpoints" / f"{STEPS:07d}.pt"
        run("train.py", "--data", RUNS / "latents", "--run-dir", folder, "--model", "SiT-Ti/2",
            "--vae-repa-depth", depth, "--max-steps", STEPS, "--batch-size", 32, "--lr", 2e-3,
            "--ema-decay", 0.99, "--log-every", 100, "--sample-every", 900)
        ode = ("sample.py", "--ckpt", checkpoint, "--mode", "ode")
        run(*ode, "--num-steps", 50, "--cfg-scale", 2.5, "--out", folder / "grid.png")
        run(*ode, "--num-steps", 30, "--num-samples", 500, "--out", folder / "500.npz")
        run("fid.py", folder / "500.npz", "--ref", RUNS / "images", "--detector", "tests/data/detector.pt2",
            "--num-workers", 1, "--json", folder / "500.json")
        loss = json.loads((ROOT / folder / "log.jsonl").read_text().splitlines()[-1])
        metrics = json.loads((ROOT / folder / "500.json").read_text())
        cells = (metrics[key] for key in ("FID", "sFID", "IS", "Precision", "Recall"))
        table.append([method, f"{loss['denoising']:.4f}", *(f"{cell:.3f}" for cell in cells)])
        pictures.append(f"{method}: {folder}/grid.png (a row per class), while training: {folder}/samples")

    print("\nTraining loss of the last 100 steps, and the metrics of 500 samples without guidance (Frechet\n"
          "distance of its features and of its spatial features, as FID and sFID are, …) in the space of a\n"
          "small classifier of its own ten classes (tests/data/detector.pt2): not comparable with any FID\n"
          "on ImageNet.\n")
    for row in [["", "denoising", "Frechet", "spatial", "IS", "precision", "recall"], *table]:
        print(f"{row[0]:22}" + "".join(f"{cell:>11}" for cell in row[1:]))
    print("", *pictures, f"{time.perf_counter() - started:.0f} s in all", sep="\n")


if __name__ == "__main__":
    main()
