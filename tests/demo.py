"""The whole pipeline on drawn images, on a CPU with 2 cores and no network, in about three minutes:

    python tests/demo.py              # plain SiT and SiT + VAE-REPA with the same seed, side by side
    python tests/demo.py --seeds 5    # both with five seeds: which difference is chance, and which is not

draws images, encodes them, trains, samples, and measures the samples, all by the commands that a user would
give; each is printed. Everything goes to runs/demo. If interrupted, run the same command again.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extract_latents import Parser, fail, positive_int, run  # noqa: E402  (found only now)
from models import SiT_models  # noqa: E402

METRICS = {"denoising": "denoising loss", "FID": "Fréchet distance", "sFID": "of spatial features",
           "IS": "IS", "Precision": "precision", "Recall": "recall"}
LOWER_IS_BETTER = ("denoising", "FID", "sFID")
CAPTION = """
Denoising loss: the mean of the last 100 training steps. The others: 500 samples without guidance against the
images trained on, in the feature space of a small classifier of their ten classes (tests/data/detector.pt2):
no number here is an FID on ImageNet. ± is the standard deviation over seeds; differences are within a seed.
"""


def run_script(*command, log=None):
    """Run a script; if two run side by side, its output is added to the file `log`."""
    command, options = [str(word) for word in command], {}
    tqdm.write(f"$ python {shlex.join(command)}")
    if log:
        threads = max((os.cpu_count() or 1) // 2, 1)
        options["env"] = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        options |= {"stdout": open(log, "a"), "stderr": subprocess.STDOUT}
    if subprocess.run([sys.executable, *command], cwd=ROOT, **options).returncode:
        fail(f"{command[0]} failed" + (f": {log.read_text().splitlines()[-1]} ({log})" if log else ""))


def experiment(args, data, folder, seed, depth):
    """Train, draw a grid, sample and measure: {metric: value}."""
    checkpoint, log = folder / "checkpoints" / f"{args.steps:07d}.pt", ROOT / folder / "output.txt"
    metrics, sample = checkpoint.with_suffix(".json"), ("sample.py", "--ckpt", checkpoint, "--mode", "ode")
    log.parent.mkdir(parents=True, exist_ok=True)
    run_script("train.py", "--data", data / "latents", "--run-dir", folder, "--model", args.model,
               "--seed", seed, "--vae-repa-depth", depth, "--max-steps", args.steps, "--batch-size", 32,
               "--lr", 2e-3, "--ema-decay", 0.99, "--log-every", min(args.steps, 100),
               "--sample-every", max(args.steps // 2, 1), log=log)
    run_script(*sample, "--seed", seed, "--num-steps", 50, "--cfg-scale", 2.5, log=log)
    run_script(*sample, "--seed", seed, "--num-steps", 30, "--num-samples", 500, log=log)
    run_script("fid.py", checkpoint.with_suffix(".npz"), "--ref", data / "images", "--json", metrics,
               "--detector", "tests/data/detector.pt2", "--num-workers", 1, log=log)
    return {**last_log(folder), **json.loads((ROOT / metrics).read_text())}


def last_log(folder):
    log = ROOT / folder / "log.jsonl"
    return json.loads(log.read_text().splitlines()[-1]) if log.exists() else {"step": 0}


def table(model, plain, aligned):
    """Both methods' metrics, one dict a seed, as a Markdown table."""
    plain, aligned = (np.array([[metrics[key] for key in METRICS] for metrics in method])
                      for method in (plain, aligned))  # (seeds, metrics)
    rows = {model: plain, f"{model} + VAE-REPA": aligned, "difference": aligned - plain}
    lines = ["| | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    several = len(plain) > 1
    for name, values in rows.items():
        cells = [f"{mean:.3f}" for mean in values.mean(axis=0)]
        if several:
            cells = [f"{cell} ± {std:.3f}" for cell, std in zip(cells, values.std(axis=0, ddof=1))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if several:
        sign = [-1 if key in LOWER_IS_BETTER else 1 for key in METRICS]
        better = ((aligned - plain) * sign > 0).sum(axis=0)
        lines.append("| VAE-REPA better in | " + " | ".join(f"{n} of {len(plain)}" for n in better) + " |")
    return "\n".join(lines)


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=positive_int, default=1, help="train with seeds 0, 1, … this many")
    parser.add_argument("--model", choices=SiT_models, default="SiT-Ti/2", metavar="SIZE", help="of train.py")
    parser.add_argument("--steps", type=positive_int, default=1400, help="of training")
    parser.add_argument("--images", type=positive_int, default=2000, help="to draw, a multiple of 10")
    return parser.parse_args()


def main():
    args, started = parse_args(), time.perf_counter()
    data = Path(f"runs/demo/{args.images}-images")
    run_script("tests/data/draw_images.py", data / "images", "--count", args.images, "--size", 64)
    run_script("extract_latents.py", "--images", data / "images", "--out", data / "latents",
               "--vae", "tests/data/vae", "--image-size", 64, "--num-workers", 1)
    name = args.model.replace("/", "-")
    folders = {(seed, depth): data / f"{name}_seed-{seed}_depth-{depth}"
               for seed in range(args.seeds) for depth in (0, 2)}
    total = len(folders) * args.steps
    with ThreadPoolExecutor(2) as pool, tqdm(total=total, desc="training", unit="step") as bar:
        futures = [pool.submit(experiment, args, data, folder, *job) for job, folder in folders.items()]
        try:
            while True:
                done, waiting = wait(futures, timeout=1, return_when=FIRST_EXCEPTION)
                bar.update(sum(last_log(folder)["step"] for folder in folders.values()) - bar.n)
                if not waiting or any(future.exception() for future in done):
                    break
        finally:
            pool.shutdown(cancel_futures=True)
    metrics = [future.result() for future in futures]
    print(CAPTION, table(args.model, metrics[::2], metrics[1::2]), "", sep="\n")
    print(f"Samples, a row per class: checkpoints/{args.steps:07d}.png, and while training samples/, in")
    print(*folders.values(), f"{time.perf_counter() - started:.0f} s in all", sep="\n")


if __name__ == "__main__":
    run(main)
