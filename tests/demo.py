"""The whole pipeline on drawn images, on a CPU with 2 cores and no network, in about three minutes:

    python tests/demo.py              # plain SiT and SiT + VAE-REPA with the same seed, side by side
    python tests/demo.py --seeds 5    # both with five seeds: which difference is chance, and which is not

draws images, encodes them, trains, samples, and measures the samples, all by the commands that a user would
give; each is printed. Everything goes to runs/demo. If interrupted, run the same command again; after a
change of code, remove that folder first, as finished parts are not done again.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extract_latents import Parser, fail, positive_int, run  # noqa: E402  (found only now)
from models import SiT_models  # noqa: E402

METHODS = {"plain": ("--vae-repa-depth", 0), "vae-repa": ()}  # VAE-REPA is on by default
METRICS = {"denoising": ("denoising loss", 4), "FID": ("Fréchet distance", 2),
           "sFID": ("Fréchet, spatial", 3), "IS": ("IS", 2),
           "Precision": ("precision", 3), "Recall": ("recall", 3)}  # with decimals to show
LOWER_IS_BETTER = ("denoising", "FID", "sFID")
CAPTION = """
Denoising loss: the mean of the last 100 training steps. The others: 500 samples without guidance against the
images trained on, in the feature space of a small classifier of their ten classes (tests/data/detector.pt2):
no number here is an FID on ImageNet. After ± stands the standard deviation over seeds; each difference is
between two runs of one seed.
"""


def start(command, log=None):
    """Start a script; if two run side by side, each gets half of the threads and adds its output to `log`."""
    command = [str(word) for word in command]
    tqdm.write(f"$ python {shlex.join(command)}")
    if not log:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT)
    threads = str(max(torch.get_num_threads() // 2, 1))
    with open(log, "a") as file:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file,
                                env={**os.environ, "OMP_NUM_THREADS": threads})


def side_by_side(jobs, after_a_while):
    """Work off each (commands, log) of `jobs`, two at a time; if one fails or Ctrl-C comes, both stop."""
    jobs, running = list(jobs), []  # running: (process, commands left, log)
    try:
        while jobs or running:
            for process, commands, log in [job for job in running if job[0].poll() is not None]:
                running.remove((process, commands, log))
                if process.returncode:
                    said = [line for line in log.read_text().splitlines() if "error: " in line][-1:]
                    fail(f"status {process.returncode} of the last command in {log} {''.join(said)}")
                if commands:
                    jobs.insert(0, (commands, log))
            while jobs and len(running) < 2:
                (command, *commands), log = jobs.pop(0)
                running.append((start(command, log), commands, log))
            time.sleep(0.5)
            after_a_while()
    finally:
        for process, _, _ in running:
            process.terminate()
            process.wait()


def commands_of(args, data, folder, seed, method):
    """Train, draw a grid, sample and measure."""
    checkpoint = folder / "checkpoints" / f"{args.steps:07d}.pt"
    sample = ("sample.py", "--ckpt", checkpoint, "--seed", seed, "--mode", "ode")
    return [
        ("train.py", "--data", data / "latents", "--run-dir", folder, "--model", args.model, *METHODS[method],
         "--seed", seed, "--max-steps", args.steps, "--batch-size", 32, "--lr", 2e-3, "--ema-decay", 0.99,
         "--log-every", math.gcd(args.steps, 100), "--sample-every", max(args.steps // 2, 1),
         "--ckpt-every", max(args.steps // 7, 1)),
        (*sample, "--num-steps", 50, "--cfg-scale", 2.5, "--out", folder / "grid.png"),
        (*sample, "--num-steps", 30, "--num-samples", 500, "--out", folder / "500.npz"),
        ("fid.py", folder / "500.npz", "--ref", data / "images", "--json", folder / "metrics.json",
         "--detector", "tests/data/detector.pt2", "--num-workers", 1)]


def read_log(folder):
    """The denoising loss that a run has logged so far, {step: loss}; a resumed run repeats steps."""
    log = ROOT / folder / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else ()  # whole ones
    return {line["step"]: line["denoising"] for line in map(json.loads, lines)}


def last_step(folder):
    return max(read_log(folder), default=0)


def results(args, folder):
    """A run's METRICS, {name: value}."""
    last = [loss for step, loss in read_log(folder).items() if step > args.steps - 100]
    return {"denoising": np.mean(last), **json.loads((ROOT / folder / "metrics.json").read_text())}


def table(model, plain, aligned):
    """Both methods' metrics, one dict a seed, as a Markdown table."""
    plain, aligned = (np.array([[metrics[key] for key in METRICS] for metrics in method])
                      for method in (plain, aligned))  # (seeds, metrics)
    rows = {model: plain, f"{model} + VAE-REPA": aligned, "difference": aligned - plain}
    headings, decimals = zip(*METRICS.values())
    lines = ["| | " + " | ".join(headings) + " |", "|---" * (len(METRICS) + 1) + "|"]
    several = len(plain) > 1
    for name, values in rows.items():
        cells = [f"{mean:.{n}f}" for mean, n in zip(values.mean(axis=0), decimals)]
        if several:
            std = values.std(axis=0, ddof=1)
            cells = [f"{cell} ± {value:.{n}f}" for cell, value, n in zip(cells, std, decimals)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if several:
        sign = [-1 if key in LOWER_IS_BETTER else 1 for key in METRICS]
        better = ((aligned - plain) * sign > 0).sum(axis=0)
        lines.append("| VAE-REPA better in | " + " | ".join(f"{n} of {len(plain)}" for n in better) + " |")
    return "\n".join(lines)


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=positive_int, default=1, help="train with seeds 0, 1, … this many")
    parser.add_argument("--model", choices=SiT_models, default="SiT-Ti/2", metavar="SIZE", help="to train")
    parser.add_argument("--steps", type=positive_int, default=1400, help="to train")
    parser.add_argument("--images", type=positive_int, default=2000, help="to draw, a multiple of 10")
    return parser.parse_args()


def main():
    args, started = parse_args(), time.perf_counter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which stops what runs
    data = Path(f"runs/demo/{args.images}-images")
    for command in (("tests/data/draw_images.py", data / "images", "--count", args.images, "--size", 64),
                    ("extract_latents.py", "--images", data / "images", "--out", data / "latents",
                     "--vae", "tests/data/vae", "--image-size", 64, "--store-images", "--num-workers", 1)):
        if start(command).wait():
            fail(f"{command[0]} failed")

    name = f"{args.model.replace('/', '-')}_{args.steps}-steps"
    folders = {(seed, method): data / f"{name}_seed-{seed}_{method}" for seed in range(args.seeds)
               for method in METHODS}
    jobs = []
    for (seed, method), folder in folders.items():
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        jobs.append((commands_of(args, data, folder, seed, method), ROOT / folder / "output.txt"))
    with tqdm(total=len(folders) * args.steps, desc="training", unit="step") as bar:
        side_by_side(jobs, lambda: bar.update(sum(map(last_step, folders.values())) - bar.n))

    plain, aligned = ([results(args, folders[seed, method]) for seed in range(args.seeds)]
                      for method in METHODS)
    print(CAPTION, table(args.model, plain, aligned), "", sep="\n")
    print("Samples are in grid.png, a row per class, and from during training in samples/, of")
    print(*folders.values(), f"{time.perf_counter() - started:.0f} s in all", sep="\n")


if __name__ == "__main__":
    run(main)
