"""The papers' figures, of any run or checkpoint: `python tests/figures.py COMMAND`, where COMMAND is

    convergence  FID against steps, the speed-up at equal FID, images of the same noise  (VAE-REPA, Fig. 4)
    features     what SiT's blocks hold, by layer and noise level, as colours            (VAE-REPA, Fig. 2)
    cknna        how far they agree with an image encoder, by layer and noise level
    alignment    that during training, and against FID                             (REPA-E, Fig. 3b and 3c)
    latents      variance, total variation and colours of latents               (REPA-E, Table 1 and Fig. 3a)

Numbers are printed, pictures go to --out. The first, third and fourth plot, too, with matplotlib.
COMMAND --help lists its flags.
"""

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fid  # noqa: E402  (these are found only now)
from extract_latents import (  # noqa: E402
    Latents,
    Parser,
    atomic_write,
    content_id,
    decode,
    encode,
    fail,
    first_line,
    fraction,
    init_distributed,
    intact,
    load_vae,
    per_channel,
    positive_int,
    run,
    write_json,
)
from models import load_encoder, load_program  # noqa: E402
from sample import load_model, randn_like, rng, spread_classes  # noqa: E402
from train import interpolate  # noqa: E402

METRICS = {"FID": 2, "sFID": 2, "IS": 2, "Precision": 3, "Recall": 3}  # fid.py's, with decimals to show
HIGHER_IS_BETTER = ("IS", "Precision", "Recall")
CELL, GAP = 128, 16  # of a sheet, in pixels: the side of an image, the space between groups
BATCH = 64  # images per forward


def principal_components(features, reference=None):
    """Scores (B, h, w, 3) of feature maps (B, h, w, D) on their first three principal components.

    First, each place's mean over the images is subtracted: else features show where they are, more than what
    they see. Components come in order of variance, the largest weight of each positive; or, so that pictures
    can be compared, in the order and with the signs in which they correlate with a reference's scores
    (B, H, W, 3) of the same images.
    """
    rows = (features - features.mean(0)).double().flatten(0, 2)
    rows = F.pad(rows, (0, max(3 - rows.shape[1], 0)))
    _, axes = torch.linalg.eigh(rows.T @ rows)  # by rising variance
    axes = axes[:, -3:].flip(1)
    axes *= axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    scores = rows @ axes
    if reference is not None:
        reference = F.interpolate(reference.movedim(3, 1), features.shape[1:3], mode="area").movedim(1, 3)
        correlation = F.normalize(reference.flatten(0, 2), dim=0).T @ F.normalize(scores, dim=0)
        _, order = linear_sum_assignment(correlation.abs(), maximize=True)
        scores = scores[:, order] * torch.where(correlation[range(3), order] < 0, -1, 1)
    return scores.reshape(*features.shape[:3], 3)


def colours(scores):
    """Scores (B, h, w, 3) as RGB, uint8: grey is the mean, two standard deviations are black or full."""
    std = scores.square().mean((0, 1, 2)).sqrt().clamp(min=1e-12)
    return ((scores / std / 4 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def neighbours(features, k):
    """Of features (n, D): the cosines (n, n) with the k nearest others of each, elsewhere 0; where these are,
    (n, n) bool; and the cosines' `hsic` with themselves."""
    features = F.normalize(features.double(), dim=1)  # in float64, as cosines may all be near 1
    cosines = features @ features.T
    cosines.fill_diagonal_(-torch.inf)  # none is its own neighbour
    near = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, cosines.topk(k).indices, True)
    cosines = torch.where(near, cosines, 0)
    return cosines, near, hsic(cosines, cosines)


def cknna(a, b):
    """CKNNA of the `neighbours` of two features of the same images, 1 if they agree (Huh et al. 2024, arXiv
    2405.07987): CKA, to which an image counts only if it is a neighbour by both features."""
    (cosines_a, near_a, own_a), (cosines_b, near_b, own_b) = a, b
    return (hsic(cosines_a * near_b, cosines_b * near_a) / (own_a * own_b).sqrt()).item()


def hsic(a, b):
    """The unbiased HSIC of kernels (n, n) with zeros on the diagonal, n > 3 (Song et al. 2012, Eq. 5)."""
    n = len(a)
    total = (a * b.T).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * a.sum(0) @ b.sum(1)
    return total / (n * (n - 3))


def variance(z):
    """Of latents z (N, C, H, W), over the pixels of each channel: the mean over channels and images."""
    return z.var(dim=(2, 3), correction=0).mean().item()


def total_variation(z):
    """Of latents z (N, C, H, W), the |differences| of neighbours on both axes, summed over the pixels of each
    channel: the mean over channels and images."""
    return sum(z.diff(dim=dim).abs().sum(dim=(2, 3)).mean().item() for dim in (2, 3))


def speed_up(baseline, other):
    """(step at which baseline is lowest, step at which other gets as low, or None).

    Both are {step: value} in order of steps; between checkpoints, values are taken to lie on a line.
    """
    best = min(baseline, key=baseline.get)
    steps, values = list(other), list(other.values())
    for i, value in enumerate(values):
        if value <= baseline[best]:
            before = max(i - 1, 0)
            return best, float(np.interp(baseline[best], [value, values[before]], [steps[i], steps[before]]))
    return best, None


def draw_convergence(args):
    """FID against steps, by sample.py and fid.py for each checkpoint of each RUN. Metrics and samples (10 GB
    for 50,000 of 256x256) are kept in RUN/figures and not made again. Writes convergence.png, and images.png:
    images of the same noise and classes, runs in rows and steps in columns."""
    figure = new_figure(6, 4)  # needs matplotlib: better now than after the samples
    names, checkpoints = find_checkpoints(args)
    curves, table = {name: {} for name in names}, []
    _, space = fid.load_network(args, "cpu")
    if not args.classes:
        _, trained = load_model(next(iter(checkpoints.values())))
        args.classes = spread_classes(trained["data"]["num_classes"], 4)
    images = {key: draw_classes(path, args) for key, path in checkpoints.items()}
    first, *_ = next(iter(images.values()))
    fid.Images(args.ref, len(first))  # fails if --ref cannot be read, or has another size
    for (name, step), path in checkpoints.items():
        metrics = measure(path, space, args)
        if args.metric not in metrics:
            fail(f"--detector {args.detector} gives no {args.metric}; choose another --metric")
        curves[name][step] = metrics[args.metric]
        table.append([name, step, *(f"{metrics[key]:.{decimals}f}" if key in metrics else ""
                                    for key, decimals in METRICS.items())])

    print_table(["", "step", *METRICS], table)
    plot_convergence(figure.subplots(), curves, args)
    save_figure(figure, Path(args.out, "convergence.png"))
    steps = sorted({step for _, step in checkpoints})
    columns = [("step" if step == steps[0] else "", f"{step:,}") for step in steps]
    rows = [(f"class {y}" if name == names[0] else "", name) for y in args.classes for name in names]
    cells = [[images[name, step][i] if (name, step) in images else None for step in steps]
             for i in range(len(args.classes)) for name in names]
    draw_sheet(columns, rows, cells, Path(args.out, "images.png"))


def find_checkpoints(args):
    """(a name for each RUN, {(name, step): path} of the checkpoints that --steps asks for)."""
    names, checkpoints = short_names(args, args.runs), {}
    for name, folder in zip(names, args.runs):
        paths = {path.stem: path for path in Path(folder, "checkpoints").glob("*.pt")}
        paths = {int(stem): path for stem, path in paths.items() if stem.isdecimal()}
        for step in sorted(args.steps or paths) or ["STEP"]:
            if step not in paths:
                fail(f"{folder}/checkpoints has no {step}.pt; train.py writes one every --ckpt-every steps")
            checkpoints[name, step] = paths[step]
    return names, checkpoints


def measured_files(checkpoint, args):
    """Where `convergence` keeps a checkpoint's samples, and their metrics."""
    folder = checkpoint.parent.parent / "figures" / f"{args.num_samples}_{args.mode}-{args.num_steps}"
    return folder / f"{checkpoint.stem}.npz", folder / f"{checkpoint.stem}.json"


def measure(checkpoint, space, args):
    """fid.py's metrics of samples of a checkpoint, {name: value}."""
    samples, record = measured_files(checkpoint, args)
    wanted = {"reference": str(Path(args.ref).resolve()), "feature_space": space}
    if not made_from(samples, checkpoint) or not wanted.items() <= kept(record).items():
        record.unlink(missing_ok=True)
        network = [f"--{flag}={file}" for flag in ("weights", "detector") if (file := getattr(args, flag))]
        call("sample.py", "--ckpt", checkpoint, "--num-samples", args.num_samples, "--mode", args.mode,
             "--num-steps", args.num_steps, "--out", samples, processes=args.nproc_per_node)
        call("fid.py", samples, "--ref", args.ref, *network, "--json", record, processes=args.nproc_per_node)
    return kept(record)


def kept(path):
    """What a JSON file of an earlier run holds, or {} where it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def made_from(samples, checkpoint):
    """Whether sample.py has drawn them from what the checkpoint holds now; they may be gone."""
    return kept(Path(f"{samples}.json")).get("ckpt_content") == content_id(checkpoint)


def draw_classes(checkpoint, args):
    """An image (S, S, 3) of each class by a checkpoint: image i is always of the same noise."""
    classes = "-".join(map(str, args.classes))
    folder = f"{args.mode}-{args.num_steps}_cfg-{args.cfg_scale:g}_classes-{classes}"
    path = checkpoint.parent.parent / "figures" / folder / f"{checkpoint.stem}.png"
    if not path.exists() or not made_from(path, checkpoint):
        call("sample.py", "--ckpt", checkpoint, "--classes", *args.classes, "--per-class", 1, "--mode",
             args.mode, "--num-steps", args.num_steps, "--cfg-scale", args.cfg_scale, "--out", path)
    with Image.open(path) as image:
        return np.split(np.asarray(image), len(args.classes))


def call(script, *words, processes=1):
    """Run a script as a user would; one that fails has said why."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*(launcher if processes > 1 else ()), str(ROOT / script), *map(str, words)]
    print(f"$ python {shlex.join(command)}", flush=True)
    with subprocess.Popen([sys.executable, *command]) as running:
        try:
            status = running.wait()
        finally:
            running.terminate()  # at Ctrl-C, and where this is killed
    if status < 0:
        fail(f"{script} was killed by signal {-status}")
    if status:
        sys.exit(status)


def plot_convergence(axes, curves, args):
    """The metric against the steps; an arrow goes from the first run's best to where another gets as good.

    FID and sFID have a logarithmic axis, along which values between checkpoints are interpolated, too.
    """
    falls = args.metric not in HIGHER_IS_BETTER
    axes.set(xlabel="training steps", ylabel=f"{args.metric} ({Path(args.detector or 'Inception').stem})")
    if falls:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    lower_is_better = {name: {step: np.log(value) if falls else -value for step, value in curve.items()}
                       for name, curve in curves.items()}
    first = next(iter(curves))
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), "o-", label=name)
        best, reached = speed_up(lower_is_better[first], lower_is_better[name])
        value = curves[first][best]
        if name == first:
            print(f"\n{name}: best {args.metric} {value:.4g}, at step {best}")
        elif reached is None:
            print(f"{name}: does not reach it")
        else:
            print(f"{name}: reaches it by step {reached:.0f}, {best / reached:.2f} times as fast")
            arrow = {"arrowstyle": "->", "linestyle": "--"}
            axes.annotate("", (reached, value), (best, value), arrowprops=arrow)
            axes.annotate(f"{best / reached:.1f}×", (reached, value), (-4, -4 if falls else 4), ha="right",
                          va="top" if falls else "bottom", textcoords="offset points")
    axes.legend()


def draw_features(args):
    """What SiT's blocks hold: features.png shows a few images, their latents and the outputs of blocks, whose
    first three principal components over --count images are red, green and blue. SiT is given no label."""
    latents = Latents(args.data)
    models = load_models(args, latents)
    for name, model in models.items():
        if max(args.layers or [1]) > len(model.blocks):
            fail(f"--layers {max(args.layers)}: {name} has {len(model.blocks)} blocks")
    rows, times = choose_rows(latents, args, at_least=2), sorted(set(args.t))
    shown = slice(args.images)  # of the rows
    _, _, device = init_distributed()
    stored = latents.read(rows)
    x, labels = stored["mean"], stored["labels"]
    latent = principal_components(x.movedim(1, 3))
    columns = [("", "image"), ("", "latent")]
    first_two = [decoded(latents, x[shown], device), colours(latent)]
    pictures = {t: list(first_two) for t in times}  # one a column, of all images
    for name, model in models.items():
        layers = args.layers or np.unique(np.linspace(1, len(model.blocks), 6).astype(int)).tolist()
        columns += [(name if layer == layers[0] else "", f"block {layer}") for layer in layers]
        side = model.input_size // model.patch_size
        model.to(device)
        for t in times:
            for h in block_outputs(model, x, rows, labels, t, layers):
                pictures[t].append(colours(principal_components(h.unflatten(1, (side, side)), latent)))
        model.cpu()
    titles = [(f"image {row}" if t == times[0] else "", f"t = {t}") for row in rows[shown] for t in times]
    cells = [[picture[i] if t == times[0] or column >= len(first_two) else None
              for column, picture in enumerate(pictures[t])] for i in range(len(rows[shown])) for t in times]
    draw_sheet(columns, titles, cells, Path(args.out, "features.png"))


def draw_cknna(args):
    """How far SiT's blocks agree with --target: CKNNA of both, averaged over the tokens, for --count images.
    Writes cknna.json and the plot cknna.png. SiT is given no label."""
    figure = new_figure(2.5 * len(set(args.t)) + 1, 3)
    latents = Latents(args.data, extras=[] if args.target == "latents" else ["images"])
    models, times = load_models(args, latents), sorted(set(args.t))
    rows = choose_rows(latents, args, at_least=max(args.k + 1, 4))
    _, _, device = init_distributed()
    x, labels, target = read_and_compare(args, latents, rows, device)

    found = {name: {} for name in models}  # {name: {t: CKNNA of each block}}
    for name, model in models.items():
        layers = range(1, len(model.blocks) + 1)
        model.to(device)
        for t in times:
            outputs = block_outputs(model, x, rows, labels, t, layers, pool=True)
            found[name][t] = [agreement(h, target, args.k) for h in outputs]
        model.cpu()
    write_json(Path(args.out, "cknna.json"), found)
    print_table(["", "block", *(f"t = {t}" for t in times)], [
        [name, layer, *(f"{value:.3f}" for value in values)]
        for name, by_t in found.items() for layer, values in enumerate(zip(*by_t.values()), start=1)])
    axes = figure.subplots(1, len(times), sharey=True, squeeze=False)[0]
    for panel, t in zip(axes, times):
        panel.set(title=f"t = {t}", xlabel="block")
        for name, by_t in found.items():
            panel.plot(range(1, len(by_t[t]) + 1), by_t[t], "o-", label=name)
    axes[0].set_ylabel(f"CKNNA with {Path(args.target).stem}")
    axes[-1].legend()
    save_figure(figure, Path(args.out, "cknna.png"))


def draw_alignment(args):
    """CKNNA of SiT's blocks with --target at one noise level, for each checkpoint of each RUN: of the block
    where it is highest, or of --layer. Each RUN's own VAE encodes the images of --data, so latents may
    differ. Where `convergence` has measured checkpoints, with the same flags, FID is shown against it.
    Writes alignment.json and the plot alignment.png."""
    figure = new_figure(9, 4)
    latents = Latents(args.data, extras=["images"])
    names, checkpoints = find_checkpoints(args)
    rows = choose_rows(latents, args, at_least=max(args.k + 1, 4))
    metrics = {}  # those that `convergence` has measured
    for key, path in checkpoints.items():
        samples, record = measured_files(path, args)
        known = kept(record)
        if isinstance(known.get("FID"), float) and made_from(samples, path):
            metrics[key] = known
    references = {f"{known.get('reference')} in {known.get('feature_space')}" for known in metrics.values()}
    if len(references) > 1:
        fail(f"`convergence` measured these against different references: {' and '.join(references)}")
    _, _, device = init_distributed()
    _, labels, target = read_and_compare(args, latents, rows, device)
    found, x, encoded_by = [], None, None
    for (name, step), path in checkpoints.items():
        model, trained = load_model(path)
        if args.layer and args.layer > len(model.blocks):
            fail(f"--layer {args.layer}: {name} has {len(model.blocks)} blocks")
        model.reads_labels, facts = trained.get("label_dropout") == 0, trained["data"]
        if encoded_by != facts:
            x, encoded_by = encoded(latents, rows, facts, device), facts
        layers = [args.layer] if args.layer else range(1, len(model.blocks) + 1)
        outputs = block_outputs(model.to(device), x, rows, labels, args.t, layers, pool=True)
        best, layer = max((agreement(h, target, args.k), layer) for layer, h in zip(layers, outputs))
        found.append({"run": name, "step": step, "layer": layer, "CKNNA": best,
                      "FID": metrics.get((name, step), {}).get("FID")})
    write_json(Path(args.out, "alignment.json"), found)
    print_table(["", "step", "block", "CKNNA", "FID"], [
        [row["run"], row["step"], row["layer"], f"{row['CKNNA']:.3f}",
         "" if row["FID"] is None else f"{row['FID']:.2f}"] for row in found])
    space = next(iter(references), "").split(" in ")[-1].split(" ")[0]  # without a detector's content
    plot_alignment(figure, names, found, space, args)
    save_figure(figure, Path(args.out, "alignment.png"))


def plot_alignment(figure, names, found, space, args):
    """CKNNA against the steps and, where FID (in a feature space) is known, that against CKNNA, with the r^2
    of a straight line."""
    known = [row for row in found if row["FID"] is not None]
    left, *right = figure.subplots(1, 1 + bool(known), squeeze=False)[0]
    left.set(xlabel="training steps", ylabel=f"CKNNA with {Path(args.target).stem}, t = {args.t}")
    for name in names:
        left.plot(*zip(*[(row["step"], row["CKNNA"]) for row in found if row["run"] == name]), "o-",
                  label=name)
    left.legend()
    for panel in right:
        for name in names:
            points = [(row["CKNNA"], row["FID"]) for row in known if row["run"] == name]
            panel.plot(*zip(*points or [((), ())]), "o")
        panel.set(xlabel="CKNNA", ylabel=f"FID ({space})")
        if len(known) > 2:
            r = np.corrcoef([row["CKNNA"] for row in known], [row["FID"] for row in known])[0, 1]
            panel.set_title(f"r² = {r**2:.2f}")
            print(f"\nFID and CKNNA of {len(known)} checkpoints: r = {r:.3f}, r² = {r**2:.3f}")


def draw_latents(args):
    """Variance and total variation of z, the VAE's own latents, for one or several sets of the same images.
    Writes latents.png, in which their first three principal components are red, green and blue."""
    sets = {name: Latents(folder) for name, folder in zip(short_names(args, args.data), args.data)}
    first = next(iter(sets.values()))
    for name, latents in sets.items():
        files = {facts["files_sha256"] for facts in (latents.facts, first.facts)} - {None}  # None: not known
        if latents.facts["count"] != first.facts["count"] or len(files) > 1:
            fail(f"{name} holds latents of other images than the first set: extract both from one folder")
    rows, shown = choose_rows(first, args, at_least=2), slice(args.images)
    _, _, device = init_distributed()
    table, pictures, reference = [], [], None
    for name, latents in sets.items():
        x = latents.read(rows)["mean"]
        if latents is first:
            pictures.append(decoded(latents, x[shown], device))
        z = x / torch.from_numpy(latents.scale)  # less the shift, which changes nothing here
        shape = "×".join(map(str, z.shape[1:]))
        table.append([name, latents.facts["vae"], shape, f"{variance(z):.4g}", f"{total_variation(z):.5g}"])
        scores = principal_components(z.movedim(1, 3), reference)
        reference = scores if reference is None else reference  # the first set's
        pictures.append(colours(scores)[shown])
    print_table(["", "VAE", "shape", "variance", "total variation"], table)
    columns = [("", title) for title in ("image", *sets)]
    titles = [("", f"image {row}") for row in rows[shown]]
    draw_sheet(columns, titles, list(zip(*pictures)), Path(args.out, "latents.png"))


def load_models(args, latents):
    """{name: model} of --ckpt, each trained on such latents; reads_labels: trained without a null class."""
    models = {}
    for name, path in zip(short_names(args, args.ckpt), args.ckpt):
        models[name], trained = load_model(path)
        models[name].reads_labels = trained.get("label_dropout") == 0
        keys = ["latent_shape", "vae", "shift", "scale"]
        for key in [*keys, "num_classes"] if models[name].reads_labels else keys:
            here, there = latents.facts[key], trained["data"][key]
            if key == "vae":  # a folder may have moved, and SD's two differ in the decoder alone
                here, there = (Path(vae).name.replace("vae-ft-ema", "vae-ft-mse") for vae in (here, there))
            if not np.array_equal(*np.broadcast_arrays(here, there)):  # a number may stand for all channels
                fail(f"{path} was trained on other latents than {args.data}: {key} is {there}, not {here}")
    return models


def choose_rows(latents, args, at_least):
    """Rows of --count images, a fixed random choice."""
    rows = np.random.default_rng(0).permutation(latents.facts["count"])[:args.count]
    if len(rows) < at_least:
        fail(f"{len(rows)} images are too few, this takes at least {at_least}: check --count and the latents")
    return rows


@torch.no_grad()
def block_outputs(model, x, rows, labels, t, layers, pool=False):
    """Outputs of the blocks `layers`, on the CPU: tokens (n, N, D), or if pool their means (n, D).

    x: latents (n, C, H, W), which are noised to t; the noise depends on the row alone.
    """
    device, outputs = next(model.parameters()).device, {layer: [] for layer in layers}
    for i in tqdm(range(0, len(x), BATCH), f"t = {t}"):
        batch = slice(i, i + BATCH)
        noise = randn_like(x[batch], [rng(0, int(row), "cpu") for row in rows[batch]])
        y = labels[batch] if model.reads_labels else torch.full_like(labels[batch], model.null_class)
        times = torch.full(y.shape, t)
        x_t, _ = interpolate(x[batch], noise, times)
        h, c = model.embed(x_t.to(device), times.to(device), y.to(device))
        for layer, block in enumerate(model.blocks, start=1):
            h = block(h, c)
            if layer in layers:
                outputs[layer].append((h.mean(1) if pool else h).cpu())
    return [torch.cat(outputs[layer]) for layer in layers]


def read_and_compare(args, latents, rows, device):
    """Of rows: their latents' means x (n, C, H, W), labels (n,), and `neighbours` by --target."""
    encoder, parts = load_target(args, latents, device), []
    for part in tqdm(np.split(rows, range(BATCH, len(rows), BATCH)), args.target):
        stored = latents.read(part)
        features = target_features(args.target, encoder, device, stored)
        parts.append((stored["mean"], stored["labels"], features))
    x, labels, features = map(torch.cat, zip(*parts))
    where = device if device.type == "cuda" else "cpu"  # MPS has no float64
    return x, labels, neighbours(features.to(where), args.k)


def agreement(features, target, k):
    """CKNNA of features (n, D) with the `neighbours` of a target, where these are."""
    return cknna(neighbours(features.to(target[0].device), k), target)


def load_target(args, latents, device):
    """What --target names: REPA's encoder or a detector, or None for latents."""
    try:
        if args.target.endswith(".pt2"):
            return load_program(intact(args.target), device)
        if args.target != "latents":
            return load_encoder(args.target, latents.facts["image_size"]).to(device)
    except Exception as error:  # of many kinds
        fail(f"--target {args.target} cannot be loaded: {first_line(error)}")


def target_features(name, encoder, device, stored):
    """Features (B, D), on the device, of what `Latents.read` gave: of the latents, or of the images."""
    if name == "latents":
        return stored["mean"].mean((2, 3)).to(device)
    if name.endswith(".pt2"):
        return fid.run_network(encoder, stored["images"].permute(0, 2, 3, 1).numpy(), device)["features"]
    return encoder(stored["images"].to(device)).mean(1)


def encoded(latents, rows, facts, device):
    """Latents x (n, C, H, W), on the CPU, of the images `rows` by the VAE of facts: posteriors' means."""
    try:
        vae = load_vae(facts["vae"], facts.get("vae_content")).to(device)
        shift, scale = map(torch.from_numpy, per_channel(facts["shift"], facts["scale"],
                                                         facts["latent_shape"][0]))
        parts = [encode(vae, latents.read(part)["images"].to(device)).chunk(2, dim=1)[0].cpu() for part in
                 tqdm(np.split(rows, range(16, len(rows), 16)), f"encoding by {facts['vae']}")]
        x = (torch.cat(parts) - shift) * scale
        if list(x.shape[1:]) != facts["latent_shape"]:
            raise ValueError(f"it makes latents of {list(x.shape[1:])}, SiT takes {facts['latent_shape']}")
        return x
    except Exception as error:  # hub, config, weights, sizes
        fail(f"the VAE {facts['vae']} cannot encode these images: {first_line(error)}")


def decoded(latents, x, device):
    """The images (B, S, S, 3) that latents x (B, C, H, W) stand for."""
    facts = latents.facts
    try:
        return decode(load_vae(facts["vae"]).to(device), x.to(device), facts["shift"], facts["scale"]).cpu()
    except Exception as error:  # hub, config, weights, sizes
        fail(f"the VAE {facts['vae']} cannot decode its latents: {first_line(error)}")


def short_names(args, paths):
    """--names, or the words of each path that the others do not all share."""
    if args.names and len(args.names) != len(paths):
        fail(f"there are {len(args.names)} --names for {', '.join(paths)}")
    words = [path.removesuffix(".pt").strip("/").replace("_", "/").split("/") for path in paths]
    shared = set.intersection(*map(set, words))
    names = args.names or [" ".join(word for word in own if word not in shared) or own[-1] for own in words]
    if len(set(names)) < len(names):
        fail(f"two have the same name: {', '.join(names)}; give --names")
    return names


def print_table(headings, rows):
    for row in (headings, ["---"] * len(headings), *rows):
        print("|", " | ".join(map(str, row)), "|")


def new_figure(width, height):
    """An empty plot of this size in inches."""
    try:
        from matplotlib.figure import Figure  # optional
    except ImportError:
        fail("plots need matplotlib: `pip install matplotlib`, then run the same command again")
    return Figure((width, height), layout="constrained")


def save_figure(figure, path):
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    print(path)


def draw_sheet(columns, rows, cells, path):
    """Write images as a table. columns, rows: (group, title) of each, group "" but for the first of a group;
    cells: for each row, an image (H, W, 3) or None for each column."""
    font = ImageFont.load_default(size=14)
    widths = [max(CELL, int(font.getlength(title)) + 6) for _, title in columns]
    left = max(int(font.getlength(text)) for row in rows for text in row) + GAP
    (xs, width), (ys, height) = places(columns, left, widths), places(rows, 2 * GAP, [CELL] * len(rows))
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for x, titles in zip(xs, columns):
        draw.text((x, ys[0] - 2), "\n".join(titles), "black", font, anchor="ld")
    for y, titles in zip(ys, rows):
        draw.text((GAP / 2, y), "\n".join(titles), "black", font)
    for y, row in zip(ys, cells):
        for x, image in zip(xs, row):
            if image is not None:
                how = Image.Resampling.NEAREST if len(image) <= CELL else Image.Resampling.LANCZOS
                sheet.paste(Image.fromarray(np.asarray(image)).resize((CELL, CELL), how), (x, y))
    with atomic_write(path) as file:
        sheet.save(file, "PNG")
    print(path)


def places(titles, start, sizes):
    """Where each row or column begins, with a gap before each group; and where all end."""
    begins = []
    for (group, _), size in zip(titles, sizes):
        start += GAP if group or not begins else 2
        begins.append(start)
        start += size
    return begins, start + GAP


def add_command(commands, draw):
    """A parser with the flags that all commands have."""
    command = commands.add_parser(draw.__name__.removeprefix("draw_"), doc=inspect.cleandoc(draw.__doc__))
    command.set_defaults(draw=draw)
    command.add_argument("--names", nargs="+", help="of what is compared (default: words of the paths)")
    command.add_argument("--out", default="runs/figures", help="folder for the pictures")
    return command


def add_runs(add):
    """RUNs, their checkpoints, and how `convergence` samples them."""
    add("runs", nargs="+", metavar="RUN", help="folder of train.py; the first is the baseline")
    add("--steps", type=positive_int, nargs="+", help="checkpoints to take (default: all)")
    add("--num-samples", type=positive_int, default=50_000, help="of each checkpoint, without guidance")
    add("--mode", choices=["sde", "ode"], default="sde", help="sample.py's")
    add("--num-steps", type=positive_int, default=250, help="sample.py's")


def add_comparison(add, more=""):
    """What CKNNA compares with, and of which images."""
    add("--target", default="dinov2_vitb14", help="what to compare with: a DINOv2 of torch.hub, or a "
        f"FILE.pt2 such as fid.py's --detector{more}")
    add("--count", type=positive_int, default=10_000, help="images to compare")
    add("--k", type=positive_int, default=10, help="nearest neighbours")


def parse_args():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    convergence = add_command(commands, draw_convergence)
    add, either = convergence.add_argument, convergence.add_mutually_exclusive_group().add_argument
    add_runs(add)
    add("--ref", required=True, help="fid.py's; it is measured again for each checkpoint, so .npz is best")
    either("--weights", help="fid.py's: a local file of Inception's weights")
    either("--detector", metavar="FILE.pt2", help="fid.py's: a program in the place of Inception")
    add("--metric", choices=METRICS, default="FID", help="to plot")
    add("--classes", type=int, nargs="+", help="to show (default: up to 4, evenly spaced)")
    add("--cfg-scale", type=float, default=4.0, help="guidance of the images that are shown")
    add("--nproc-per-node", type=positive_int, default=1, help="processes that sample and measure")

    add = add_command(commands, draw_features).add_argument
    several = {"nargs": "+", "action": "extend", "required": True}
    add("--ckpt", **several, metavar="FILE", help="of train.py, REPA or SRA")
    add("--data", required=True, help="folder of extract_latents.py")
    add("--count", type=positive_int, default=64, help="images that the components are of")
    add("--images", type=positive_int, default=4, help="how many of them to show")
    add("--t", type=fraction, nargs="+", default=[0.2, 0.5, 0.8], help="noise levels; 1 is noise")
    add("--layers", type=positive_int, nargs="+", help="blocks to show (default: up to 6, evenly spaced)")

    add = add_command(commands, draw_cknna).add_argument
    add("--ckpt", **several, metavar="FILE", help="of train.py, REPA or SRA")
    add("--data", required=True, help="folder of extract_latents.py --store-images")
    add_comparison(add, "; or `latents`, which takes no images")
    add("--t", type=fraction, nargs="+", default=[0.2, 0.5, 0.8], help="noise levels; 1 is noise")

    add = add_command(commands, draw_alignment).add_argument
    add_runs(add)
    add("--data", required=True, help="folder of extract_latents.py --store-images, for its images")
    add_comparison(add)
    add("--t", type=fraction, default=0.5, help="noise level; 1 is noise")
    add("--layer", type=positive_int, help="block (default: that which agrees most)")

    add = add_command(commands, draw_latents).add_argument
    add("--data", **several, metavar="FOLDER", help="of extract_latents.py")
    add("--count", type=positive_int, default=10_000, help="images to measure")
    add("--images", type=positive_int, default=4, help="how many of them to show")
    return parser.parse_args()


def main():
    args = parse_args()
    if "RANK" in os.environ:
        fail("start this with python, not torchrun; convergence has --nproc-per-node")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which stops what runs
    args.draw(args)


if __name__ == "__main__":
    run(main)
