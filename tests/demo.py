"""The whole pipeline on drawn images, on a CPU with 2 cores and no network, in about three minutes:

    python tests/demo.py              # plain SiT and SiT + VAE-REPA with the same seed, side by side
    python tests/demo.py --seeds 5    # both with five seeds: which difference is chance, and which is not

draws images, encodes them, trains, samples, and measures the samples, all by the commands that a user would
give; each is printed. What any flags of train.py do, those of your own loss, too, is shown by

    python tests/demo.py --seeds 5 --variant "VAE-REPA:" --variant "depth 1: --vae-repa-depth 1"

which trains plain SiT and each NAME: FLAGS. Everything goes to runs/demo. If interrupted, run the same
command again; what is there is not made again.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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
    first_line,
    list_images,
    named_by_flags,
    positive_int,
    run,
    write_json,
)
from models import SiT_models, load_program  # noqa: E402
from sample import newest  # noqa: E402

# title, decimals to show, whether more is better (1), less (-1), or neither (0)
METRICS = {"denoising": ("denoising loss", 4, -1), "FID": ("Fréchet distance", 2, -1),
           "sFID": ("Fréchet, spatial", 3, -1), "IS": ("IS", 2, 1)}
VAE, DETECTOR, SIZE = "tests/data/vae", "tests/data/detector.pt2", 64
SCRIPTS = ("train.py", "models.py", "sample.py", "extract_latents.py", "fid.py")
FLAGS, DEVICE = "set of flags", "kind of device"
CAPTION = """
Denoising loss: the mean of the last 100 training steps; it compares runs on the same latents only.
The others: {samples} samples without guidance against the images trained on (to copy these would be
best), in features {features}.
These are no FIDs on ImageNet."""
OF_DRAWN = "of a small classifier of drawn shapes, which is also REPA's encoder and flatters it"
OF_SEEDS = """± is the standard deviation over seeds. A difference is a value minus the first row's of the
same seed: the mean over seeds ± its standard error, and in how many seeds it is better. Bold: its 95 %
interval (Student's t) excludes 0, as it does in 1 of 20 cells without any effect.
"""


def start(command, log=None):
    """Start a script. With a log, its output is added there, and it gets half of the threads."""
    command = [str(word) for word in command]
    line = f"$ python {shlex.join(command)}"
    tqdm.write(line)
    if not log:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT)
    threads = str(max(torch.get_num_threads() // 2, 1))
    with open(log, "a") as file:
        print(line, file=file, flush=True)
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file,
                                env={**os.environ, "OMP_NUM_THREADS": threads})


def side_by_side(jobs, steps):
    """Run the commands of each folder, two folders at a time; if one fails or Ctrl-C comes, both stop.

    jobs: {folder: (its `record`, commands, of which the first trains so many steps)}.
    """
    waiting, running = [(folder, *job) for folder, job in jobs.items()], []  # running: (process, one of them)
    trained = {}  # {folder: steps}
    try:
        with tqdm(total=len(jobs) * steps, desc="training", unit="step", disable=not jobs) as bar:
            while waiting or running:
                for job in [job for job in running if job[0].poll() is not None]:
                    running.remove(job)
                    process, (folder, made_of, commands) = job
                    if process.returncode:
                        log = folder / "output.txt"
                        _, _, said = log.read_text(errors="replace").rpartition("$ python ")
                        said = [line for line in said.splitlines() if "error: " in line][-1:]
                        fail(f"status {process.returncode} of the last command in {log} {''.join(said)}")
                    if commands:
                        waiting.insert(0, (folder, made_of, commands))
                while waiting and len(running) < 2:
                    folder, made_of, (command, *commands) = waiting.pop(0)
                    if not (folder / "state.pt").exists():  # files may have changed since the demo began
                        now = record(made_of[FLAGS], made_of.keys() - {FLAGS, DEVICE})
                        write_json(folder / "made_of.json", now)
                    running.append((start(command, folder / "output.txt"), (folder, made_of, commands)))
                time.sleep(0.5)
                trained |= {folder: max(read_log(folder), default=0) for _, (folder, *_) in running}
                bar.update(sum(trained.values()) - bar.n)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM) if running else ():
            signal.signal(number, signal.SIG_IGN)  # a second one would leave a process behind
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.wait()


def record(flags, files):
    """What decides a run, {name: value}: its flags, any dictionary, the device, and the contents of files."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # which have other random numbers, and defaults
    contents = {str(name): content_id(name) for name in files}
    return json.loads(json.dumps({FLAGS: flags, DEVICE: device, **contents}))


def say_what_is_old(records, steps):
    """Name the runs that other files began than today's. Fails if one had other flags, another device, or is
    to go on.

    records: {folder: its `record` as it is now}.
    """
    old, changed = [], set()
    for folder, now in records.items():
        if (folder / "state.pt").exists() or [*folder.glob("[0-9]*.json")]:
            file = folder / "made_of.json"
            then = json.loads(file.read_text()) if file.exists() else {}
            if differ := {name for name in {**now, **then} if now.get(name) != then.get(name)}:
                old.append(str(folder))
                changed |= differ
                other = differ & {FLAGS, DEVICE}
                if then and other or steps not in read_log(folder):
                    fail(f"{folder} was begun with another {min(other or differ)}; remove it, to begin anew")
    if old:
        print(f"{len(old)} of {len(records)} runs were begun before {', '.join(sorted(changed))} changed. "
              f"Keep them if that cannot matter to them; else, in {ROOT}:\n  rm -r {shlex.join(old)}")


# ---- What is compared


def data_folder(args):
    """Where everything goes that is made of these images."""
    name, own = f"{args.images}-images", args.images_from
    if own:  # its files may change, and another folder may have the same name
        files = [(os.path.relpath(path, own), os.stat(path)) for path in list_images(own)[1]]
        known = [(name, about.st_size, about.st_mtime_ns) for name, about in files]
        name = f"{Path(own).resolve().name}-{hashlib.sha256(str(known).encode()).hexdigest()[:8]}"
    if args.image_size != SIZE:
        name += f"_{args.image_size}-pixels"
    if args.vae != VAE:
        name += f"_{Path(args.vae).name}" + f"-{content_id(args.vae)}"[:9] * os.path.isdir(args.vae)
    return Path("runs/demo", name)


def prepare(args, data):
    """Draw the images and encode them, unless that is done."""
    own, size = args.images_from, args.image_size
    commands = [("extract_latents.py", "--images", own or data / "images", "--out", data / "latents",
                 "--vae", args.vae, "--image-size", size, "--store-images", "--num-workers", 1)]
    if not own and not (data / "latents").exists():
        draw = ("tests/data/draw_images.py", data / "images", "--count", args.images, "--size", size)
        commands.insert(0, draw)
    for command in commands:
        running = start(command)
        try:
            if running.wait():
                fail(f"{command[0]} failed")
        finally:
            running.terminate()
            running.wait()


def variant(text):
    """"NAME: FLAGS" as (name, list of flags)."""
    name, colon, flags = (part.strip() for part in text.partition(":"))
    try:
        if not colon or not name.isprintable() or not name or "|" in name:
            raise ValueError('it is not "NAME: FLAGS"')
        return name, shlex.split(flags)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def read_flags(args, data, name, flags):
    """(train.py's settings, flags) of a variant's flags and those that all have; fails where it would."""
    flags = ["--data", data / "latents", "--model", args.model, "--max-steps", args.steps, "--batch-size", 32,
             "--lr", 2e-3, "--ema-decay", 0.99, "--repa-encoder", encoder_of(args),
             "--log-every", math.gcd(args.steps, 10), "--sample-every", max(args.steps // 2, 1),
             "--ckpt-every", max(args.steps // 7, 1), *flags]
    me, sys.argv = sys.argv, [f"--variant {name}".replace("/", "-"), *map(str, flags)]  # errors begin with it
    settings, sys.argv = train.parse_args(), me
    return settings, flags


def find_runs(args, data):
    """The base and each variant, {name: (settings, flags of train.py, what its folders are called)}.

    A folder is called by what the flags mean, so that a run is found under another name, too.
    """
    settings, _ = read_flags(args, data, "", ())
    defaults, runs = SimpleNamespace(get_default=vars(settings).get), {}
    base = args.base or (args.model, ["--vae-repa-depth", "0"])
    for name, flags in (base, *(args.variant or [("VAE-REPA", [])])):
        if name in runs:
            fail(f"two variants are called {name}")
        taken = {"--model", "--data", "--run-dir", "--seed", "--max-steps", "--log-every", "-h", "--help"}
        if taken := taken & {word.split("=")[0] for word in flags}:
            fail(f"--variant {name} cannot have {min(taken)}: the demo gives it")
        settings, flags = read_flags(args, data, name, flags)
        called = named_by_flags("", settings, defaults, ("run_dir",))
        called = {"": "_vae-repa", "_vae-repa-depth-0": "_plain"}.get(called, called)
        runs[name] = settings, flags, called
        for other, (same, _, its) in runs.items():
            if its == called and {**vars(same), "run_dir": 0} != {**vars(settings), "run_dir": 0}:
                fail(f"--variant {name} and {other} have files of the same name; rename one")
    return runs


def duration(settings):
    """To sort by: larger for runs that take longer."""
    return settings.tune_vae, settings.repa_depth > 0, settings.sra_depth > 0, settings.vae_repa_depth > 0


def commands_of(args, data, folder, seed, flags, guidance=2.5):
    """Train, draw a grid, sample and measure."""
    checkpoint, samples = folder / "checkpoints" / f"{args.steps:07d}.pt", folder / f"{args.samples}.npz"
    sample = ("sample.py", "--ckpt", checkpoint, "--seed", seed, "--mode", "ode")
    return [
        ("train.py", *flags, "--run-dir", folder, "--seed", seed),
        (*sample, "--num-steps", 50, "--cfg-scale", guidance, "--out", folder / "grid.png"),
        (*sample, "--num-steps", 30, "--num-samples", args.samples, "--out", samples),
        ("fid.py", samples, *compared_with(args, data), "--json", metrics_of(args, folder))]


def compared_with(args, data):
    """fid.py's flags for all."""
    detector = () if args.detector == "inception" else ("--detector", args.detector)
    return "--ref", data / "latents/images.npy", *detector, "--num-workers", 1


def metrics_of(args, folder):
    return folder / f"{args.samples}_{content_id(args.detector) or args.detector}.json"


class Encoder(torch.nn.Module):
    """REPA's tokens, uint8 images (B, 3, S, S) -> (B, (S/16)^2, 96): the classifier's fourth map of five.
    The fifth is mostly the mean of its class (cosine 0.83), and SiT knows the class without it."""

    def __init__(self):
        super().__init__()
        self.detector = Detector()
        self.detector.load_state_dict(load_program(ROOT / DETECTOR, "cpu").state_dict())

    def forward(self, images):
        x = images.float() / 127.5 - 1
        for conv, norm in zip(self.detector.convs[:-1], self.detector.norms):
            x = F.silu(norm(conv(x)))
        return x.flatten(2).transpose(1, 2)


def encoder_of(args):
    """It is made once: an `Encoder` that you change needs another name."""
    return Path(f"runs/demo/encoder-{args.image_size}_map-4.pt2")


def export_encoder(args):
    if not encoder_of(args).exists():
        export(Encoder(), encoder_of(args), args.image_size)


# ---- The results


def read_log(folder):
    """What a run has logged so far, {step: line}."""
    log = folder / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else ()  # whole ones
    return {line["step"]: line for line in map(json.loads, lines)}


def results(folder, steps, metrics):
    """{name: number}: the means of what a run logged in its last 100 steps, and fid.py's file `metrics`."""
    try:
        lines = read_log(folder)
        if steps not in lines:
            raise ValueError(f"log.jsonl has no step {steps}")
        last = [lines[step] for step in lines if step > steps - 100]
        return {name: np.mean([line[name] for line in last]) for name in lines[steps]} | json.loads(
            metrics.read_text())
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{folder} is damaged ({first_line(error)}); remove it and run the same command again")


def differences(values, first):
    """Of values - first (seeds, metrics): each metric's mean, its standard error and the half width of its
    95 % interval by Student's t, (metrics,) each. One seed has no errors, but NaN.
    """
    n, found = len(values), values - first
    error = found.std(axis=0, ddof=1) / n**0.5 if n > 1 else np.full(len(found[0]), np.nan)
    return found.mean(axis=0), error, error * stats.t.ppf(0.975, n - 1)


def table(measured, metrics=METRICS):
    """Means, and differences from the first, as Markdown; measured: {name: array (seeds, metrics)}."""
    headings, decimals, signs = zip(*metrics.values())
    rows = [["", *headings], ["---"] * (len(metrics) + 1)]
    first, *_ = measured.values()
    n = len(first)
    for name, values in measured.items():
        std = values.std(axis=0, ddof=min(n - 1, 1))
        rows.append([name, *(f"{mean:.{d}f}" + f" ± {x:.{d}f}" * (n > 1)
                             for mean, x, d in zip(values.mean(axis=0), std, decimals))])
        if values is not first:
            rows.append(["difference"])
            better = ((values - first) * signs > 0).sum(axis=0)
            for mean, error, half, count, d, sign in zip(
                    *differences(values, first), better, decimals, signs):
                cell = f"{mean:+.{d}f}" + f" ± {error:.{d}f}" * (n > 1)
                cell = f"**{cell}**" if abs(mean) > half else cell
                rows[-1].append(cell + f", {count}/{n}" * (n > 1 and sign != 0))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(measured, path, metrics=METRICS):
    """Differences from the first with their 95 % intervals, and a dot for each seed, as a picture."""
    try:
        from matplotlib.figure import Figure  # optional
    except ImportError:
        print("To have this as a picture, too: pip install matplotlib, and the same command again")
        return
    (name, first), *others = measured.items()
    figure = Figure((3 * len(metrics), 1.2 + 0.3 * len(others)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True)
    for i, (axes, (title, _, sign)) in enumerate(zip(panels, metrics.values())):
        axes.set_title(f"{title} ({'higher' if sign > 0 else 'lower'} is better)", fontsize=9)
        axes.axvline(0, color="black", linewidth=0.8)
        for row, (_, values) in enumerate(others):
            mean, _, half = (x[i] for x in differences(values, first))
            color = "gray" if abs(mean) <= half else "tab:blue" if mean * sign > 0 else "tab:red"
            axes.errorbar(mean, row, xerr=half, fmt="o", capsize=3, color=color)
            axes.plot((values - first)[:, i], [row] * len(values), ".", color=color, alpha=0.4)
    panels[0].set_yticks(range(len(others)), [name.replace("$", r"\$") for name, _ in others])
    panels[0].set_ylim(len(others) - 0.5, -0.5)
    figure.suptitle(f"Difference from {name} within a seed, mean and 95 % interval of {len(first)} seeds: "
                    "blue is better, red is worse, grey may be chance", fontsize=10)
    figure.savefig(path)
    print(f"{path} shows the differences")


# ---- The command


def add_flags(parser):
    """The flags that tests/repa_e.py has, too."""
    add = parser.add_argument
    add("--steps", type=positive_int, default=1400, help="to train")
    add("--images", type=positive_int, default=2000, help="to draw, a multiple of 10")
    add("--images-from", metavar="FOLDER", help="or your own, in a folder for each class")
    add("--image-size", type=positive_int, default=SIZE, help="side in pixels")
    add("--vae", default=VAE, help="of extract_latents.py (default: one of drawn shapes)")
    add("--detector", default=DETECTOR,
        help="of fid.py, or inception, which is downloaded (default: one of drawn shapes)")


def in_root(parser):
    """Parse the arguments; paths become those from this repository's folder, where all commands run."""
    args = parser.parse_args()
    for name in ("images_from", "vae", "detector"):
        path = getattr(args, name)
        if path != parser.get_default(name) and os.path.exists(path):
            setattr(args, name, os.path.relpath(path, ROOT))
    if args.detector != "inception" and not Path(ROOT, args.detector).exists():
        fail(f"--detector {args.detector} is not there")
    return args


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=positive_int, default=1, help="train with seeds 0, 1, … this many")
    add("--variant", type=variant, action="append", metavar='"NAME: FLAGS"',
        help="flags of train.py, with paths from its folder; may be repeated (default: VAE-REPA alone)")
    add("--base", type=variant, metavar='"NAME: FLAGS"', help="what to compare with (default: plain SiT)")
    add("--model", choices=SiT_models, default="SiT-Ti/2", metavar="SIZE", help="to train")
    add("--samples", type=positive_int, default=500, help="of each run to measure")
    add_flags(parser)
    args = in_root(parser)
    if args.samples < 4:
        fail("--samples must be at least 4: fid.py needs that many")
    return args


def main():
    args, started = parse_args(), time.perf_counter()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which stops what runs
    data = data_folder(args)
    runs = find_runs(args, data)
    prepare(args, data)
    if any(settings.repa_depth for settings, _, _ in runs.values()):
        export_encoder(args)
    facts = Latents(data / "latents", ["images"]).facts
    for settings, _, _ in runs.values():
        train.build(settings, facts)  # a depth, say, fails now rather than when its turn comes

    parser, model = train.make_parser(), args.model.replace("/", "-")
    folders, records, jobs = {}, {}, {}
    for name, (settings, flags, called) in runs.items():
        decides = {key: x for key, x in vars(settings).items()  # a flag that is new to train.py is left out
                   if key not in train.FREE and x != parser.get_default(key)}
        files = (settings.init and newest(settings.init), settings.disc_init,
                 settings.repa_depth and settings.repa_encoder)
        made_of = record(decides, (*SCRIPTS, *filter(None, files)))
        guidance = 2.5 if settings.label_dropout else 1
        for seed in range(args.seeds):
            folders[name, seed] = folder = data / f"{model}_{args.steps}-steps_seed-{seed}{called}"
            records[folder] = made_of
            if not metrics_of(args, folder).exists():
                commands = commands_of(args, data, folder, seed, flags, guidance)
                jobs[folder] = duration(settings), -seed, commands
    say_what_is_old(records, args.steps)
    longest_first = sorted(jobs, key=lambda folder: jobs[folder][:2], reverse=True)
    side_by_side({folder: (records[folder], jobs[folder][2]) for folder in longest_first}, args.steps)

    found = {run: results(folder, args.steps, metrics_of(args, folder)) for run, folder in folders.items()}
    metrics = {key: x for key, x in METRICS.items() if all(key in each for each in found.values())}
    measured = {name: np.array([[found[name, seed][key] for key in metrics] for seed in range(args.seeds)])
                for name in runs}
    own = args.detector == DETECTOR
    print(CAPTION.format(samples=args.samples, features=OF_DRAWN if own else f"of {args.detector}"),
          OF_SEEDS if args.seeds > 1 else "", table(measured, metrics), "", sep="\n")
    if args.seeds > 1:
        draw(measured, data / f"{model}_{args.steps}-steps.png", metrics)
    say_what_is_old(records, args.steps)
    print("Each of these has grid.png, a row for each of up to 10 classes, and samples/, from training:")
    print(*records, f"{time.perf_counter() - started:.0f} s in all", sep="\n")


if __name__ == "__main__":
    run(main)
