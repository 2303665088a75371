"""The whole pipeline on drawn images, on a CPU with 2 cores and no network, in about three minutes:

    python tests/demo.py              # plain SiT and SiT + VAE-REPA with the same seed, side by side
    python tests/demo.py --seeds 5    # both with five seeds: which difference is chance, and which is not

draws images, encodes them, trains, samples, and measures the samples, all by the commands that a user would
give; each is printed. As a test bench, it compares any flags of train.py, an own loss's, too, with plain SiT:

    python tests/demo.py --seeds 5 --variant "VAE-REPA:" --variant "depth 1: --vae-repa-depth 1"

Everything goes to runs/demo. If interrupted, run the same command again; runs that exist are not done again.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "data")]
from export_encoder import export  # noqa: E402
from train_detector import Detector  # noqa: E402

import train  # noqa: E402  (these are found only now)
from extract_latents import (  # noqa: E402
    Latents,
    Parser,
    content_id,
    fail,
    positive_int,
    run,
    write_json,
)
from models import SiT_models, load_program  # noqa: E402

METRICS = {"denoising": ("denoising loss", 4), "FID": ("Fréchet distance", 2),
           "sFID": ("Fréchet, spatial", 3), "IS": ("IS", 2)}  # with decimals to show
LOWER_IS_BETTER = ("denoising", "FID", "sFID")
CAPTION = """
Denoising loss: the mean of the last 100 training steps. The others: {samples} samples without guidance
against the images trained on, in the feature space of {detector}: no number here is an FID on ImageNet.
"""
SEVERAL = """After ± stands the standard deviation over seeds. Differences are from {first}, within a seed: their mean ± its
standard error, and in how many seeds it is better; bold is what chance alone gives in 1 of 20 comparisons.
"""
SCRIPTS = ("train.py", "models.py", "sample.py", "extract_latents.py", "fid.py")
FIXED = ("data", "run_dir", "seed", "max_steps")  # what a variant's flags may not change


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


# ---- What is compared: {name: flags of train.py}


def variant(text):
    """"NAME: FLAGS" as (name, list of flags)."""
    name, colon, flags = text.partition(":")
    if not colon or not name.strip() or "|" in name:
        raise ValueError  # argparse then names the flag
    return name.strip(), shlex.split(flags)


def read_flags(args, data, name, flags):
    """What train.py makes of a variant's flags and those of all runs; fails as it does."""
    script, sys.argv = sys.argv[0], [f"--variant {name}".replace("/", "-"), *map(str, (
        "--data", data / "latents", "--model", args.model, "--batch-size", 32, "--lr", 2e-3,
        "--ema-decay", 0.99, "--repa-encoder", encoder_of(args), "--max-steps", args.steps, "--log-every", math.gcd(args.steps, 100),
        "--sample-every", max(args.steps // 2, 1),
        "--ckpt-every", args.steps if args.variant else max(args.steps // 7, 1), *flags))]
    settings, words = train.parse_args(), sys.argv[1:]
    sys.argv[:] = [script]
    return settings, words


def find_runs(args, data):
    """{name: (settings, flags of train.py, folder with {seed} in its name)} of plain SiT and all variants."""
    default, _ = read_flags(args, data, "", ())
    runs = {}
    for name, flags in ((args.model, ("--vae-repa-depth", 0)), *(args.variant or [("VAE-REPA", ())])):
        if name in runs:
            fail(f"two variants are called {name}")
        settings, words = read_flags(args, data, name, flags)
        differ = {key: x for key, x in vars(settings).items() if x != vars(default).get(key)}
        differ.pop("run_dir", None)  # its default is made of the others
        if fixed := {"data", "seed", "max_steps"} & differ.keys() or "--run-dir" in words and {"run_dir"}:
            fail(f"--variant {name} cannot have --{min(fixed).replace('_', '-')}, which is the demo's to give")
        called = "_".join(f"{key}-{x}".replace("_", "-") for key, x in differ.items())
        called = {"": "vae-repa", "vae-repa-depth-0": "plain"}.get(called, re.sub(r"[^\w.]+", "-", called))
        run_name = f"{args.model.replace('/', '-')}_{args.steps}-steps_seed-{{seed}}_{called[:150]}"
        runs[name] = settings, words, str(data / run_name)
    return runs


def cost(settings):
    """To sort by: what takes longest comes first."""
    return settings.tune_vae, settings.repa_depth > 0, settings.sra_depth > 0, settings.vae_repa_depth > 0


def commands_of(args, data, folder, seed, flags):
    """Train, draw a grid, sample and measure."""
    checkpoint, samples = folder / "checkpoints" / f"{args.steps:07d}.pt", folder / f"{args.samples}.npz"
    sample = ("sample.py", "--ckpt", checkpoint, "--seed", seed, "--mode", "ode")
    return [
        ("train.py", *flags, "--run-dir", folder, "--seed", seed),
        (*sample, "--num-steps", 50, "--cfg-scale", 2.5, "--out", folder / "grid.png"),
        (*sample, "--num-steps", 30, "--num-samples", args.samples, "--out", samples),
        ("fid.py", samples, "--ref", args.images_from or data / "images", "--num-workers", 1,
         "--detector", args.detector, "--json", metrics_of(args, folder))]


def metrics_of(args, folder):
    return folder / f"{args.samples}.json"


def note_code(folders):
    """Record the scripts that make a run; say which runs others made."""
    code, others, changed = {name: content_id(name) for name in SCRIPTS}, [], set()
    for folder in folders:
        record = folder / "code.json"
        if not (folder / "log.jsonl").exists():
            write_json(record, code)
        made_by = json.loads(record.read_text()) if record.exists() else {}
        if made_by != code:
            others.append(str(folder))
            changed |= {name for name in code if made_by.get(name) != code[name]}
    if others:
        tqdm.write(f"{len(others)} of {len(folders)} runs were made before {', '.join(sorted(changed))} changed. "
                   f"To make them anew: rm -r {shlex.join(others)}")


class Encoder(torch.nn.Module):
    """REPA's, for variants: the classifier's last map, as tokens (B, N, 96) of uint8 images (B, 3, S, S)."""

    def __init__(self):
        super().__init__()
        self.detector = Detector()
        self.detector.load_state_dict(load_program(ROOT / "tests/data/detector.pt2", "cpu").state_dict())

    def forward(self, images):
        x = images.float() / 127.5 - 1
        for conv, norm in zip(self.detector.convs, self.detector.norms):
            x = F.silu(norm(conv(x)))
        return x.flatten(2).transpose(1, 2)


def encoder_of(args):
    return f"runs/demo/encoder-{args.image_size}.pt2"


# ---- The results


def read_log(folder):
    """The denoising loss that a run has logged so far, {step: loss}; a resumed run repeats steps."""
    log = folder / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else ()  # whole ones
    return {line["step"]: line["denoising"] for line in map(json.loads, lines)}


def last_step(folder):
    return max(read_log(folder), default=0)


def results(args, folder):
    """A run's METRICS, a list."""
    last = [loss for step, loss in read_log(folder).items() if step > args.steps - 100]
    found = {"denoising": np.mean(last), **json.loads(metrics_of(args, folder).read_text())}
    return [found[name] for name in METRICS]


def differences(values, first):
    """(mean, standard error, half of a 95 % interval, in how many seeds it is better), each (metrics,), of
    values - first (seeds, metrics). The interval is Student's, for two seeds or more, and else NaN.
    """
    n, found = len(values), values - first
    error = found.std(axis=0, ddof=1) / n**0.5 if n > 1 else np.full(len(METRICS), np.nan)
    better = found * [-1 if name in LOWER_IS_BETTER else 1 for name in METRICS] > 0
    return found.mean(axis=0), error, error * stats.t.ppf(0.975, n - 1), better.sum(axis=0)


def table(measured):
    """Means of METRICS, and differences from the first, as Markdown; measured: {name: (seeds, metrics)}."""
    headings, decimals = zip(*METRICS.values())
    rows = [["", *headings], ["---"] * (len(METRICS) + 1)]
    (first, values), *others = measured.items()
    n = len(values)
    for name, values in measured.items():
        cells = [f"{mean:.{d}f}" for mean, d in zip(values.mean(axis=0), decimals)]
        if n > 1:
            cells = [f"{cell} ± {x:.{d}f}" for cell, x, d in zip(cells, values.std(axis=0, ddof=1), decimals)]
        rows.append([name, *cells])
        if name == first:
            continue
        cells = []
        for mean, error, half, better, d in zip(*differences(values, measured[first]), decimals):
            cell = f"{mean:+.{d}f}" + (f" ± {error:.{d}f}" if n > 1 else "")
            cells.append((f"**{cell}**" if abs(mean) > half else cell) + (f", {better}/{n}" if n > 1 else ""))
        rows.append(["difference", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(measured, path):
    """The differences from the first, with 95 % intervals and a dot a seed, as a picture."""
    try:
        from matplotlib.figure import Figure  # optional
    except ImportError:
        return print("To see this as a picture: pip install matplotlib, then the same command again")
    (first, values), *others = measured.items()
    figure = Figure((3 * len(METRICS), 1.2 + 0.4 * len(others)), layout="constrained")
    for i, (axes, (key, (title, _))) in enumerate(zip(
            figure.subplots(1, len(METRICS), sharey=True), METRICS.items())):
        axes.axvline(0, color="black", linewidth=0.8)
        for row, (name, those) in enumerate(others):
            mean, _, half, _ = (x[i] for x in differences(those, values))
            good = (mean < 0) == (key in LOWER_IS_BETTER)
            color = "gray" if abs(mean) <= half else "tab:blue" if good else "tab:red"
            axes.errorbar(mean, row, xerr=half, fmt="o", capsize=3, color=color)
            axes.plot((those - values)[:, i], [row] * len(values), ".", color=color, alpha=0.4)
        axes.set_title(f"{title}, {'lower' if key in LOWER_IS_BETTER else 'higher'} is better", fontsize=9)
    axes.set_yticks(range(len(others)), [name for name, _ in others])
    axes.set_ylim(len(others) - 0.5, -0.5)
    figure.suptitle(f"Difference from {first} within a seed: mean and 95 % interval of {len(values)} seeds; blue "
                    "is better, red worse")
    figure.savefig(path)
    print(f"{path}: the differences as a picture")


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=positive_int, default=1, help="train with seeds 0, 1, … this many")
    add("--variant", type=variant, action="append", metavar='"NAME: FLAGS"',
        help="flags of train.py to compare with plain SiT; may be repeated (default: VAE-REPA alone)")
    add("--model", choices=SiT_models, default="SiT-Ti/2", metavar="SIZE", help="to train")
    add("--steps", type=positive_int, default=1400, help="to train")
    add("--samples", type=positive_int, default=500, help="to measure of each run")
    add("--images", type=positive_int, default=2000, help="to draw, a multiple of 10")
    add("--images-from", metavar="FOLDER", help="own images instead, in a folder for each class")
    add("--image-size", type=positive_int, default=64, help="to which images are drawn or cropped")
    add("--vae", default="tests/data/vae", help="as of extract_latents.py; the default knows drawn shapes")
    add("--detector", default="tests/data/detector.pt2", help="as of fid.py")
    args = parser.parse_args()
    for name in ("images_from", "vae", "detector"):  # all commands run in this repository's folder
        if getattr(args, name) and os.path.exists(getattr(args, name)):
            setattr(args, name, os.path.relpath(getattr(args, name), ROOT))
    return args


def main():
    args, started = parse_args(), time.perf_counter()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which stops what runs
    data = Path("runs/demo", Path(args.images_from).name if args.images_from else f"{args.images}-images")
    runs = find_runs(args, data)

    images, size = args.images_from or data / "images", ("--image-size", args.image_size)
    if not args.images_from:
        prepare("tests/data/draw_images.py", images, "--count", args.images, "--size", args.image_size)
    prepare("extract_latents.py", "--images", images, "--out", data / "latents", "--vae", args.vae, *size,
            "--store-images", "--num-workers", 1)
    facts = Latents(data / "latents", ["images"]).facts
    if any(settings.repa_depth for settings, _, _ in runs.values()) and not os.path.exists(encoder_of(args)):
        export(Encoder(), encoder_of(args), args.image_size)
    for settings, _, _ in runs.values():
        train.build(settings, facts)  # fails now, and not hours later

    folders = {(name, seed): Path(folder.format(seed=seed)) for name, (_, _, folder) in runs.items()
               for seed in range(args.seeds)}
    note_code(sorted({*folders.values()}))
    jobs = {}
    for (name, seed), folder in sorted(folders.items(), key=lambda x: (cost(runs[x[0][0]][0]), -x[0][1]),
                                       reverse=True):
        if not metrics_of(args, folder).exists():
            jobs[folder] = commands_of(args, data, folder, seed, runs[name][1]), folder / "output.txt"
    with tqdm(total=len(jobs) * args.steps, desc="training", unit="step") as bar:
        side_by_side(jobs.values(), lambda: bar.update(sum(map(last_step, jobs)) - bar.n))

    measured = {name: np.array([results(args, folders[name, seed]) for seed in range(args.seeds)])
                for name in runs}
    detector = "a small classifier of drawn shapes" if args.detector == "tests/data/detector.pt2" else args.detector
    print(CAPTION.format(samples=args.samples, detector=detector), end="")
    print(SEVERAL.format(first=args.model) if args.seeds > 1 else "", table(measured), "", sep="\n")
    if args.seeds > 1:
        draw(measured, data / f"{args.model.replace('/', '-')}_{args.steps}-steps.png")
    print("Samples are in grid.png, a row per class, and from during training in samples/, of")
    print(*dict.fromkeys(folders.values()), f"{time.perf_counter() - started:.0f} s in all", sep="\n")
    note_code(sorted({*folders.values()}))


def prepare(*command):
    if start(command).wait():
        fail(f"{command[0]} failed")


if __name__ == "__main__":
    run(main)
