"""What training costs on this machine, beside the paper's Table 4, and what sampling, extraction and evaluation cost.

    python tests/benchmark.py train                                      # or torchrun --nproc_per_node=8 tests/benchmark.py train
    python tests/benchmark.py profile                                    # where the time of a step goes
    python tests/benchmark.py memory                                     # the largest --micro-batch of a 24 and an 80 GB GPU
    python tests/benchmark.py train --device cpu --model SiT-Ti/2 --micro-batch 8 --steps 2 --repa-encoder dinov2_vitt14
    python tests/benchmark.py sample                                     # sample.py's loop beside a plain float32 one
    python tests/benchmark.py extract                                    # extract_latents.py: its loader, its encoder, both
    python tests/benchmark.py fid                                        # fid.py: reading, the network, every metric
    python tests/benchmark.py sample --device cpu --model SiT-Ti/2 --vae tests/data/vae          # small, anywhere
    python tests/benchmark.py extract --device cpu --vae tests/data/vae --image-size 64          # small, anywhere
    python tests/benchmark.py fid --device cpu                                                   # small, anywhere

Plain SiT, VAE-REPA, REPA and SRA take turns in one process, so that their ratios hold while the machine's speed drifts; figures
are medians over the turns. All run train.py's own step on latents, and REPA on images, read from disk as it
reads them. REPA's encoder is tests/data/dinov2's, of DINOv2's sizes with random weights; dinov2_vitl14, the paper's
in this table, unless told otherwise.

The last three call the scripts' own functions on one device, with random weights and random images, whose files the system still
has in memory. The start of the loader's processes counts, so that a small --count shows less than a long run has.
"""

import argparse
import copy
import gc
import itertools
import platform
import re
import statistics
import sys
import tempfile
import time
import zipfile
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from extract_latents import (ImageFiles, Latents, Parser, ResumableArray, decode, encode,  # noqa: E402
                             encode_files, fail, first_line, init_distributed, list_images, load_vae,
                             nonnegative_int, positive_int, read_ahead, rng, run, write_json)
from fid import (DRAWN, Images, InceptionV3, apply, extract, frechet_distance, inception_score,  # noqa: E402
                 precision_recall)
from models import ALIGN_DEPTHS, SRA_DEPTHS, Encoder, SiT_models, build_model, to_bf16  # noqa: E402
from sample import guided_velocity, randn_like, sample_sde  # noqa: E402
from train import (any_signal, compile_layers, make_batch, step_rows, training_losses,  # noqa: E402
                   training_step)

# Table 4, measured on H100s at a global batch of 256: external + head parameters (M), it/s, GFLOPs, forward latency (ms)
PAPER = {("SiT-XL/2", "plain"): (0, 0, 8.1, 114.46, 18.05), ("SiT-XL/2", "VAE-REPA"): (0, 18, 7.2, 118.55, 19.20),
         ("SiT-XL/2", "REPA"): (303, 8, 5.4, 194.50, 29.03), ("SiT-XL/2", "SRA"): (481, 2, 5.1, 197.57, 30.90)}
LATENT_SHAPE, IMAGE_SIZE, NUM_CLASSES, PAPER_GPUS, PAPER_BATCH = (4, 32, 32), 256, 1000, 8, 256
LATENTS = 512  # in the set that training reads
METHODS = ["plain", "VAE-REPA", "REPA", "SRA"]
GUIDANCE = {"cfg_scale": 1.8, "guidance_interval": (0.0, 0.7)}  # of the paper's Table 3
IMAGENET, SAMPLES = 1_281_167, 50_000


def settings_of(method, model, repa_dim=1024):
    """The settings that train.py gives a run of one of the methods."""
    size = model.split("-")[1].split("/")[0]
    student, teacher = SRA_DEPTHS[size]
    return {"model": model, "data": {"latent_shape": LATENT_SHAPE, "num_classes": NUM_CLASSES},
            "vae_repa_depth": ALIGN_DEPTHS[size] if method == "VAE-REPA" else 0,
            "repa_depth": ALIGN_DEPTHS[size] if method == "REPA" else 0, "repa_dim": repa_dim,
            "sra_depth": student if method == "SRA" else 0, "sra_teacher_depth": teacher}


def count_macs(settings, encoder=None):
    """(as the paper counts, with attention, the external part of the latter): multiply-adds of a training step's forward passes.

    Of one image: the model with its heads, REPA's encoder and SRA's teacher, on the meta device. The paper's count is fvcore's:
    linear layers and convolutions, 4 per element of a LayerNorm, no product inside attention.
    """
    with torch.device("meta"):
        model = build_model(settings, heads=True)
        size = model.input_size
        inputs = torch.zeros(1, model.in_channels, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        tokens, width = (size // model.patch_size) ** 2, model.blocks[0].mlp.fc2.out_features
        own, external = hooked(model, model, *inputs, return_align=True), 0
        products, external_products = len(model.blocks) * 2 * tokens**2 * width, 0
        if settings["sra_depth"]:
            depth = settings["sra_teacher_depth"]
            external, external_products = hooked(model, model.block_output, *inputs, depth), depth * 2 * tokens**2 * width
        if encoder:
            image = torch.zeros(1, 3, encoder.input_size, encoder.input_size)
            network = copy.deepcopy(encoder.network).to("meta")
            external = hooked(network, network.forward_features, image)
            external_products = len(network.blocks) * 2 * (encoder.side**2 + 1) ** 2 * encoder.dim
    everything = own + external + products + external_products
    return own + external, everything, external + external_products


def hooked(module, function, *inputs, **options):
    """Multiply-adds of the module's layers as function(*inputs, **options) runs them."""
    counted = []
    hooks = [layer.register_forward_hook(lambda layer, _, y: counted.append(macs(layer, y)))
             for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d, nn.LayerNorm))]
    function(*inputs, **options)
    for hook in hooks:
        hook.remove()
    return sum(counted)


def macs(layer, y):
    return y.numel() * (4 if isinstance(layer, nn.LayerNorm) else layer.weight[0].numel())


def external_parameters(settings, encoder=None):
    """Of REPA's encoder, or of the part of the EMA model that is SRA's teacher."""
    if encoder:
        return sum(p.numel() for p in encoder.network.parameters())
    if not settings["sra_depth"]:
        return 0
    with torch.device("meta"):
        model = build_model(settings)
    parts = [model.x_embedder, model.t_embedder, model.y_embedder, *model.blocks[: settings["sra_teacher_depth"]]]
    return sum(p.numel() for part in parts for p in part.parameters())


def load_encoder(name):
    """REPA's encoder with random weights."""
    hub = str(Path(__file__).resolve().parent / "data" / "dinov2")
    try:
        return Encoder(torch.hub.load(hub, name, source="local", pretrained=False), IMAGE_SIZE)
    except RuntimeError as error:
        fail(f"--repa-encoder {name}: {first_line(error)}")


def write_latents(folder):
    """A set of random moments and images in the form that train.py reads."""
    random = np.random.default_rng(0)
    channels, *size = LATENT_SHAPE
    moments = random.random((LATENTS, 2 * channels, *size), np.float32)
    np.save(folder / "moments.npy", moments.astype(np.float16))
    np.save(folder / "labels.npy", random.integers(NUM_CLASSES, size=LATENTS))
    np.save(folder / "images.npy", random.integers(0, 256, (LATENTS, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))
    about = {"vae": "", "shift": 0.0, "scale": 0.18215, "num_classes": NUM_CLASSES}
    write_json(folder / "latents.json", about)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Run:
    """One method, ready to take steps: the objects that train.py's main holds."""

    def __init__(self, method, options, folder, device, rank, world_size):
        self.device, self.step = device, 0
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        started = time.perf_counter()
        self.encoder = load_encoder(options.repa_encoder).to(device) if method == "REPA" else None
        self.settings = settings_of(method, options.model, self.encoder.dim if self.encoder else 0)
        # the settings and train.py's other flags at their defaults, as far as its functions read them
        self.args = args = SimpleNamespace(
            **self.settings, micro_batch=options.micro_batch, batch_size=options.micro_batch * world_size,
            precision=options.precision, seed=0, label_dropout=0.1, grad_clip=1.0, ema_decay=0.9999,
            vae_repa_weight=1.0, vae_repa_loss="smooth_l1", vae_repa_beta=0.05, vae_repa_interval=(0, 1),
            repa_weight=0.5, sra_weight=0.2, sra_t_max=0.2)
        torch.manual_seed(0)
        self.raw_model = self.model = build_model(self.settings, heads=True).to(device)
        self.ema = copy.deepcopy(self.raw_model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.raw_model.parameters(), 1e-4, betas=(0.9, 0.999),
                                           weight_decay=0, fused=True)
        if options.compile:
            compile_layers(self.raw_model, self.ema, args)
        if world_size > 1:
            self.model = DistributedDataParallel(self.raw_model, gradient_as_bucket_view=True)
            self.model.broadcast_buffers = False
        latents = Latents(folder, with_images=method == "REPA")
        local = slice(rank * args.micro_batch, (rank + 1) * args.micro_batch)
        self.facts, self.local = latents.facts, local
        rows = (step_rows(latents.facts, args, step)[local] for step in itertools.count())
        self.from_disk = read_ahead(latents.read, rows, threads=4)
        self.kept = next(self.from_disk)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.seconds(1)
        self.start_up = time.perf_counter() - started
        self.seconds(2)
        self.memory = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else None

    def seconds(self, steps, from_disk=True):
        """Time of `steps` training steps; from_disk=False repeats one batch that is at hand."""
        synchronise(self.device)
        started = time.perf_counter()
        for _ in range(steps):
            stored = next(self.from_disk) if from_disk else self.kept
            batch = make_batch(stored, self.step, self.facts, self.args, self.local, self.device)
            training_step(self.model, self.ema, self.optimizer, self.encoder, batch,
                          self.args, epoch=0)
            any_signal()  # the processes meet here too in every step
            self.step += 1
        synchronise(self.device)
        return time.perf_counter() - started

    @torch.no_grad()
    def latency(self, repeats=20):
        """Median milliseconds of the forward passes of one image: model, heads, REPA's encoder, SRA's teacher."""
        t, y = torch.zeros(1, device=self.device), torch.zeros(1, device=self.device, dtype=torch.long)
        x = torch.zeros(1, *LATENT_SHAPE, device=self.device)
        images = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=self.device, dtype=torch.uint8)
        batch = {"x": x, "noise": x, "t": t, "t_teacher": t, "interval_weight": t, "y": y, "images": images}
        times = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            for _ in range(repeats):
                synchronise(self.device)
                started = time.perf_counter()
                training_losses(self.raw_model, batch, self.args, self.ema, self.encoder)
                synchronise(self.device)
                times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)


def product_rate(device, precision):
    """FLOP/s of a large matrix product on this device in the precision of training."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    times = []
    for _ in range(8):
        synchronise(device)
        started = time.perf_counter()
        a @ b
        synchronise(device)
        times.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(times[3:])


def measure(options, device, rank, world_size):
    """Figures of the methods, by name."""
    figures, batch = {}, options.micro_batch * world_size
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder))
        runs = {method: Run(method, options, folder, device, rank, world_size) for method in options.methods}
        times = {(method, disk): [] for method in runs for disk in (True, False)}
        for _ in tqdm(range(options.repeats), desc="turns", disable=rank > 0):
            for key in times:
                times[key].append(runs[key[0]].seconds(options.steps, key[1]) / options.steps)
        rate = product_rate(device, options.precision)
        for method, state in runs.items():
            paper_macs, all_macs, external = count_macs(state.settings, state.encoder)
            step = statistics.median(times[method, True])
            figures[method] = {
                "external_parameters_m": external_parameters(state.settings, state.encoder) / 1e6,
                "head_parameters_m": sum(p.numel() for p in state.raw_model.heads.parameters()) / 1e6,
                "gflops_as_paper": paper_macs / 1e9, "gflops_with_attention": all_macs / 1e9, "latency_ms": state.latency(),
                "images_per_s": batch / step, "step_ms": [1e3 * s for s in times[method, True]],
                "it_per_s_at_256": (PAPER_BATCH if batch == PAPER_BATCH else options.micro_batch * PAPER_GPUS)
                                   / PAPER_BATCH / step,
                "it_per_s_measured": batch == PAPER_BATCH,
                "peak_memory_gib": state.memory, "start_up_s": state.start_up,
                # a multiply-add is 2 operations, and the backward pass twice a forward; the external part has none
                "utilisation": 2 * (3 * all_macs - 2 * external) * options.micro_batch / step / rate,
                "product_tflops": rate / 1e12,
                "loader_ratio": statistics.median(a / b for a, b in zip(times[method, True], times[method, False]))}
            if "plain" in runs and method != "plain":
                figures[method]["cost_over_plain"] = statistics.median(
                    a / b - 1 for a, b in zip(times[method, True], times["plain", True]))
    return figures


def print_table(figures, options, world_size):
    how = "compiled" if options.compile else "eager"
    print(f"\n{options.model}, {options.micro_batch} images per device, {world_size} x {hardware(options.device)}, {options.precision}, "
          f"{how}, torch {torch.__version__}; in brackets: the paper's Table 4, on H100s\n")
    rows = [("external + head, M", lambda f, p: f"{f['external_parameters_m']:.0f} + {f['head_parameters_m']:.1f}" + (f" ({p[0]} + {p[1]})" if p else "")),
            ("GFLOPs, paper's count", lambda f, p: f"{f['gflops_as_paper']:.2f}" + (f" ({p[3]})" if p else "")),
            ("GFLOPs with attention", lambda f, p: f"{f['gflops_with_attention']:.2f}"),
            ("forward of 1 image, ms", lambda f, p: f"{f['latency_ms']:.2f}" + (f" ({p[4]})" if p else "")),
            ("images/s", lambda f, p: f"{f['images_per_s']:.1f}" + (f" ({p[2] * PAPER_BATCH / PAPER_GPUS:.0f} per GPU)" if p else "")),
            ("step, ms: min median max", lambda f, p: " ".join(f"{g(f['step_ms']):.1f}" for g in (min, statistics.median, max))),
            ("it/s at batch 256", lambda f, p: f"{f['it_per_s_at_256']:.2f}{'' if f['it_per_s_measured'] else ', extrapolated to 8'}" + (f" ({p[2]})" if p else "")),
            ("peak memory, GiB", lambda f, p: "not measured" if f["peak_memory_gib"] is None else f"{f['peak_memory_gib']:.2f}"),
            ("utilisation", lambda f, p: f"{100 * f['utilisation']:.1f} % of {f['product_tflops']:.3g} TFLOP/s"),
            ("disk / repeated batch", lambda f, p: f"{f['loader_ratio']:.3f}"),
            ("start-up, s", lambda f, p: f"{f['start_up_s']:.1f}")]
    print(f"{'':26}" + "".join(f"{name:>32}" for name in figures))
    for name, cell in rows:
        print(f"{name:26}" + "".join(f"{cell(f, PAPER.get((options.model, method))):>32}" for method, f in figures.items()))
    for method, f in figures.items():
        if "cost_over_plain" in f:
            print(f"{method}'s step costs {100 * f['cost_over_plain']:+.1f} % more than plain SiT's (paired median; paper, SiT-XL/2: "
                  f"{100 * (PAPER['SiT-XL/2', 'plain'][2] / PAPER['SiT-XL/2', method][2] - 1):+.1f} %)")


KINDS = [("optimizer", "adam"), ("EMA", "lerp"), ("gradient clipping", "norm_|lpnorm|clip_|foreach_norm|foreach_mul"),
         ("attention", "attention|flash|fmha|sdpa"), ("matrix products", r"gemm|nvjet|cutlass|::mm|addmm|bmm|matmul|linear|mkldnn|convolution"),
         ("copies", "memcpy|copy_|memset|::to$"), ("random numbers", "randn|normal_|uniform_|distribution")]


def profile(options, device, rank, world_size):
    """Milliseconds per step of VAE-REPA, by kind of kernel (of operator, on a CPU)."""
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder))
        state = Run("VAE-REPA", options, folder, device, rank, world_size)
        wall = state.seconds(options.steps) / options.steps
        started = time.perf_counter()
        for _ in range(options.steps):
            next(state.from_disk)
        loader = (time.perf_counter() - started) / options.steps
        cuda = device.type == "cuda"
        with torch.profiler.profile() as profiler:
            state.seconds(options.steps)
    spent = {}
    for event in profiler.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        time_us = event.self_device_time_total if cuda and on_device else 0 if cuda else event.self_cpu_time_total
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, event.key, re.I)), "element-wise and the rest")
        spent[kind] = spent.get(kind, 0) + time_us / 1e3 / options.steps
    spent = dict(sorted(spent.items(), key=lambda item: -item[1]))
    if cuda:
        spent["gaps"] = max(1e3 * wall - sum(spent.values()), 0)
    return {"ms_per_step": spent, "wall_ms_per_step": 1e3 * wall, "loader_alone_ms_per_step": 1e3 * loader}


def largest_micro_batch(options, device, limit_gib):
    """The largest --micro-batch, to within 4, whose step stays within limit_gib of this GPU; 0 if none does."""
    torch.cuda.set_per_process_memory_fraction(min(limit_gib * 2**30 / torch.cuda.get_device_properties(device).total_memory, 1.0))
    fits, too_large = 0, 4 * 256
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder))
        while too_large - fits > 4:
            options.micro_batch = (fits + too_large) // 8 * 4
            try:
                Run("VAE-REPA", options, folder, device, 0, 1)
                fits = options.micro_batch
            except torch.OutOfMemoryError:
                too_large = options.micro_batch
            gc.collect()
            torch.cuda.empty_cache()
    return fits


def timed(device, function, *args, **options):
    """(seconds that function(*args, **options) takes, with all that it has the device do; what it returns)."""
    synchronise(device)
    started = time.perf_counter()
    result = function(*args, **options)
    synchronise(device)
    return time.perf_counter() - started, result


def allow_tf32(matmul, cudnn):
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def make_vae(options, device):
    """The autoencoder that --vae names, or one of SD-VAE's size with random weights."""
    if options.vae:
        return load_vae(options.vae).to(device)
    from diffusers import AutoencoderKL  # slow to import

    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4)
    return vae.eval().requires_grad_(False).to(device)


def draw(model, precision, num_steps, options, device, seed=0, nudge=0.0):
    """Final latents (B, C, H, W) of one batch, drawn as sample.py does; nudge: relative change of the noise it starts from."""
    generators = [rng(seed, i, device) for i in range(options.batch_size)]
    z = randn_like(torch.empty(options.batch_size, *LATENT_SHAPE, device=device), generators) * (1 + nudge)
    y = torch.arange(options.batch_size, device=device) % NUM_CLASSES
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return sample_sde(model, z, y, num_steps, generators=generators, **GUIDANCE)


@torch.no_grad()
def call_ms(model, t, options, device, repeats=10):
    """Median milliseconds of the velocity of a batch at time t, in bf16."""
    x = torch.randn(options.batch_size, *LATENT_SHAPE, device=device)
    y = torch.arange(options.batch_size, device=device) % NUM_CLASSES
    with torch.autocast(device.type, torch.bfloat16):
        return 1e3 * statistics.median(timed(device, guided_velocity, model, x, t, y, **GUIDANCE)[0] for _ in range(repeats))


def decode_and_copy(vae, x):
    """Images of latents x, decoded and on the CPU."""
    return decode(vae, x, 0.0, 1.0).cpu()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def measure_sample(options, device):
    """Figures of sample.py's loop and of a plain one (eager, float32 weights, TF32 products), in paired turns."""
    torch.manual_seed(0)
    plain = SiT_models[options.model](num_classes=NUM_CLASSES).to(device).eval().requires_grad_(False)
    for parameter in plain.parameters():
        if not parameter.any():  # what starts at zero would make the velocity zero
            nn.init.normal_(parameter, std=0.05)
    ours = copy.deepcopy(plain)
    to_bf16(ours)
    if options.compile:
        for layer in (*ours.blocks, ours.final_layer):
            layer.compile(dynamic=False)
    vae, steps = make_vae(options, device), options.num_steps
    try:
        decode_and_copy(vae, torch.zeros(options.batch_size, *LATENT_SHAPE, device=device))
    except (RuntimeError, ValueError, TypeError) as error:
        fail(f"--vae {options.vae} cannot decode latents of {LATENT_SHAPE}: {first_line(error)}")

    methods = {"plain": (plain, "fp32", (True, True)), "ours": (ours, "bf16", (False, True))}  # the latter: torch's defaults
    seconds, decoding, drawn = {name: [] for name in methods}, [], {}
    for turn in tqdm(range(-1, options.repeats), desc="turns"):
        for name, (model, precision, tf32) in methods.items():
            allow_tf32(*tf32)
            taken, drawn[name] = timed(device, draw, model, precision, steps if turn >= 0 else 4, options, device)
            seconds[name] += [taken] if turn >= 0 else []  # the turn before the first, of 4 steps, compiles
        decoding.append(timed(device, decode_and_copy, vae, drawn["ours"])[0])
    decode_s = statistics.median(decoding)
    figures = {"unguided_call_ms": call_ms(ours, 0.9, options, device), "guided_call_ms": call_ms(ours, 0.5, options, device)}
    nudged, other = (draw(ours, "bf16", steps, options, device, **change) for change in ({"nudge": 1e-6}, {"seed": 1}))
    allow_tf32(False, False)
    exact = draw(plain, "fp32", steps, options, device)
    for name in methods:
        batch_s = statistics.median(seconds[name]) + decode_s
        hours = SAMPLES / options.batch_size * batch_s / 3600
        figures[name] = {"sampler_s": seconds[name], "images_per_s": options.batch_size / batch_s, "hours_1_device": hours,
                         "hours_8_devices": hours / 8, "difference_from_float32": relative(drawn[name], exact)}
    figures |= {"speedup": statistics.median(a / b for a, b in zip(seconds["plain"], seconds["ours"])),
                "difference_nudged": relative(nudged, drawn["ours"]), "difference_other_seed": relative(other, drawn["ours"]),
                "decode_ms": 1e3 * decode_s, "decode_share": decode_s * figures["ours"]["images_per_s"] / options.batch_size}
    both = [figures[name] for name in methods]
    title = f"{options.model}, SDE of {steps} steps, {options.batch_size} images per batch, guidance 1.8 on [0, 0.7]"
    print_rows(title, options, [
        ("", f"plain: fp32{', TF32' * (device.type == 'cuda')}", f"ours: bf16, {'compiled' if options.compile else 'eager'}"),
        ("sampler, s per batch", *(f"{statistics.median(f['sampler_s']):.2f}" for f in both)),
        ("images/s, with decoding", *(f"{f['images_per_s']:.3g}" for f in both)),
        ("hours for 50,000, 1 device", *(f"{f['hours_1_device']:.2f}" for f in both)),
        ("  on 8 such, extrapolated", *(f"{f['hours_8_devices']:.2f}" for f in both)),
        ("difference from float32", *(f"{f['difference_from_float32']:.2e}" for f in both)),
        ("  noise changed by 1e-6", "", f"{figures['difference_nudged']:.2e}"),
        ("  another seed", "", f"{figures['difference_other_seed']:.2e}"),
        ("call without guidance, ms", "", f"{figures['unguided_call_ms']:.2f}"),
        ("call with guidance, ms", "", f"{figures['guided_call_ms']:.2f}"),
        ("decode and copy, ms per batch", "", f"{figures['decode_ms']:.1f} ({100 * figures['decode_share']:.1f} %)")])
    print(f"\nour sampler is {figures['speedup']:.2f} times as fast as the plain one (paired median)")
    return figures


def smooth_image(random, width, height, cell):
    """A random image whose colours change over `cell` pixels."""
    colours = random.integers(256, size=(-(-height // cell), -(-width // cell), 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def memory_mib(field="VmRSS"):
    """Memory of this process in MiB, now or, VmHWM, at its peak."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def peak_gib(device):
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def watched(batches, resident):
    """The batches, with this process's memory put down before each."""
    for batch in batches:
        resident.append(memory_mib())
        yield batch


def encode_again(vae, images, times, device):
    for _ in range(times):
        encode(vae, images.to(device, non_blocking=True))


def measure_extract(options, device):
    """Figures of extract_latents.py: its loader alone, its encoder alone, and both at work."""
    vae, random, cuda = make_vae(options, device), np.random.default_rng(0), device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "images" / "class").mkdir(parents=True)
        for i in tqdm(range(options.count), desc="writing JPEGs"):  # as large as ImageNet's
            smooth_image(random, 500, 375, 4).save(folder / "images" / "class" / f"{i:06d}.jpg", quality=90)
        kib = sum(file.stat().st_size for file in folder.rglob("*.jpg")) / options.count / 1024
        _, files, _ = list_images(folder / "images")
        images = ImageFiles(folder / "images", files, options.image_size)
        kept = torch.stack([images[i][1] for i in range(min(options.batch_size, options.count))])
        kept = kept.pin_memory() if cuda else kept
        try:
            latent_shape = encode(vae, kept.to(device)).shape[1:]
        except (RuntimeError, ValueError, TypeError) as error:
            fail(f"the VAE cannot encode images of --image-size {options.image_size}: {first_line(error)}")
        seconds = {"loader": [], "encoder": [], "whole": []}
        for turn in tqdm(range(options.repeats), desc="turns"):
            moments = ResumableArray(folder / f"moments{turn}.npy", (options.count, *latent_shape), "float16", {})
            batches, resident = moments.batches(options.batch_size), []
            loader = DataLoader(images, batch_sampler=batches, num_workers=options.num_workers, pin_memory=cuda)
            seconds["loader"].append(timed(device, deque, loader, maxlen=0)[0])  # a deque of no length only asks for each
            again = timed(device, encode_again, vae, kept, len(batches), device)[0]
            seconds["encoder"].append(again * options.count / (len(batches) * len(kept)))  # the last batch may be short
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds["whole"].append(timed(device, encode_files, vae, watched(loader, resident), moments, files, device)[0])
            resident.append(memory_mib())
            moments.finish()  # fails if a row is missing
    rates = {f"{name}_images_per_s": options.count / statistics.median(taken) for name, taken in seconds.items()}
    hours = IMAGENET / rates["whole_images_per_s"] / 3600
    figures = {"jpeg_kib": kib, **{f"{name}_s": taken for name, taken in seconds.items()}, **rates,
               "whole_over_slower": statistics.median(max(a, b) / c for a, b, c in zip(*seconds.values())),
               "hours_imagenet_1_device": hours, "hours_imagenet_8_devices": hours / 8, "peak_gpu_gib": peak_gib(device),
               "resident_mib_at_quarter": resident[len(resident) // 4], "resident_mib_at_end": resident[-1]}
    title = (f"{options.count} JPEGs of 500x375, {kib:.0f} KiB each, cropped to {options.image_size}, "
             f"{options.vae or 'a VAE of SD-VAE size'}, {options.num_workers} loader processes, fp32")
    print_rows(title, options, [
        *((f"{name}, images/s", f"{rates[f'{name}_images_per_s']:.1f}") for name in seconds),
        ("whole / slower of the two", f"{figures['whole_over_slower']:.3f}"),
        ("hours for ImageNet, 1 device", f"{hours:.2f}"),
        ("  on 8 such, extrapolated", f"{hours / 8:.2f}"),
        ("resident, MiB: 1/4, end", f"{figures['resident_mib_at_quarter']:.0f} {figures['resident_mib_at_end']:.0f}"),
        ("peak GPU memory, GiB", f"{figures['peak_gpu_gib']:.2f}" if cuda else "no GPU")])
    return figures


def write_samples(path, count, size, seed):
    """An .npz of random images as sample.py writes it, without holding them all."""
    random = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)})
        for _ in tqdm(range(count), desc=f"writing {path.name}"):
            file.write(smooth_image(random, size, size, 32).tobytes())


def apply_again(network, batch, times, device):
    for _ in range(times):
        apply(network, batch, device)


def pairs(n, m):
    """Distances that precision and recall of n and m points need."""
    return n * n + m * m + n * m


def measure_fid(options, device):
    """Figures of fid.py, with Inception's random weights: extraction and its two parts, then each metric."""
    torch.manual_seed(0)
    allow_tf32(False, False)  # as fid.py sets them
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    network = InceptionV3()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # torch's own would let the features vanish
    network = network.to(device).eval().requires_grad_(False)
    args = SimpleNamespace(cache=None, batch_size=options.batch_size, num_workers=options.num_workers)
    count, batch = options.count, options.batch_size
    batches = [range(i, min(i + batch, count)) for i in range(0, count, batch)]
    seconds, extracting, found = {}, [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(("samples", "reference")):
            write_samples(Path(folder, f"{name}.npz"), count, options.image_size, seed)
        sets = [Images(Path(folder, f"{name}.npz")) for name in ("samples", "reference")]
        seconds["reading"], _ = timed(device, deque, read_ahead(sets[0].__getitem__, batches), maxlen=0)
        first = sets[0][batches[0]].to(device)
        with torch.no_grad():
            apply(network, first, device)
            taken, _ = timed(device, apply_again, network, first, len(batches), device)
        seconds["network"] = taken * count / (len(batches) * len(first))  # the last batch may be short
        for images in sets:
            taken, values = timed(device, extract, network, "random weights", images, np.arange(count), args, 0, 1, device)
            extracting.append(taken)
            found.append(values)
    resident_after_extract = memory_mib("VmHWM")
    samples, reference = found
    seconds["fid"], fid = timed(device, frechet_distance, *(x[name] for x in found for name in ("mu", "sigma")))
    seconds["sfid"], sfid = timed(device, frechet_distance, *(x[name] for x in found for name in ("mu_s", "sigma_s")))
    ours, theirs = (torch.from_numpy(x["features"]).to(device) for x in (samples, reference))
    for _ in range(2):  # the first call warms up: milliseconds, which the extrapolation would multiply
        seconds["inception_score"], score = timed(device, inception_score, samples["probabilities"])
        seconds["precision_recall"], (precision, recall) = timed(device, precision_recall, theirs, ours)
    resident = memory_mib("VmHWM")
    many, some = (torch.randn(n, 2048, device=device) for n in (options.pr_count, min(options.pr_count, DRAWN)))
    seconds["precision_recall_many"], _ = timed(device, precision_recall, some, many)

    rate = 2 * count / sum(extracting)
    metrics_50k = (seconds["fid"] + seconds["sfid"] + seconds["inception_score"] * SAMPLES / count
                   + seconds["precision_recall_many"] * pairs(SAMPLES, DRAWN) / pairs(len(many), len(some)))
    figures = {"seconds": seconds, "extract_s": extracting, "reading_images_per_s": count / seconds["reading"],
               "network_images_per_s": count / seconds["network"], "extract_images_per_s": rate,
               "metrics": {"FID": fid, "sFID": sfid, "IS": score, "Precision": precision, "Recall": recall},
               "pr_points": [len(many), len(some)], "peak_gpu_gib": peak_gib(device),
               "peak_resident_mib_extract": resident_after_extract, "peak_resident_mib": resident,
               "minutes_per_1000_images": 1000 / rate / 60,
               "minutes_50k_and_10k_extrapolated": ((SAMPLES + DRAWN) / rate + metrics_50k) / 60}
    size = options.image_size
    print_rows(f"2 x {count} images of {size}x{size}, {batch} per batch, Inception with random weights, fp32", options, [
        *((f"{name}, images/s", f"{figures[f'{name}_images_per_s']:.1f}") for name in ("reading", "network", "extract")),
        ("FID of 2048 features, s", f"{seconds['fid']:.2f}"),
        ("sFID of 2023 features, s", f"{seconds['sfid']:.2f}"),
        (f"IS of {count}, s", f"{seconds['inception_score']:.3f}"),
        (f"P, R of {count} and {count}, s", f"{seconds['precision_recall']:.3f}"),
        (f"P, R of {len(many)} and {len(some)}, s", f"{seconds['precision_recall_many']:.2f}"),
        ("peak resident, MiB", f"{resident_after_extract:.0f} extracting, {resident:.0f} in all"),
        ("peak GPU memory, GiB", f"{figures['peak_gpu_gib']:.2f}" if device.type == "cuda" else "no GPU"),
        ("minutes per 1,000 images", f"{figures['minutes_per_1000_images']:.2f}"),
        ("minutes, 50,000 + 10,000", f"{figures['minutes_50k_and_10k_extrapolated']:.1f}, extrapolated")])
    return figures


def print_rows(title, options, rows):
    """The title with hardware and versions, and below it rows of a name and its cells."""
    print(f"\n{title}; {hardware(options.device)}, torch {torch.__version__}, Python {platform.python_version()}\n")
    for name, *cells in rows:
        print(f"{name:32}" + "".join(f"{cell:>28}" for cell in cells))


def hardware(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{name[1] if name else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


# the modes that measure one device: function, precision that it has, and defaults on CUDA and elsewhere
ON_ONE_DEVICE = {"sample": (measure_sample, "bf16", {"batch_size": (64, 4), "num_steps": (250, 10)}),
                 "extract": (measure_extract, "fp32", {"batch_size": (64, 4), "count": (2048, 48)}),
                 "fid": (measure_fid, "fp32", {"batch_size": (64, 16), "count": (5000, 64), "pr_count": (50_000, 2000)})}


def main():
    parser = Parser(__doc__)
    parser.add_argument("mode", choices=["train", "profile", "memory", *ON_ONE_DEVICE], help="what to measure")
    parser.add_argument("--model", default="SiT-XL/2", choices=list(SiT_models), metavar="SiT-{XL,L,B,S,Ti}/{1,2,4,8}", help="size/patch size")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="what train compares")
    parser.add_argument("--repa-encoder", default="dinov2_vitl14", help="REPA's: dinov2_vitl14, dinov2_vitb14 or, tiny, dinov2_vitt14")
    parser.add_argument("--micro-batch", type=positive_int, default=PAPER_BATCH // PAPER_GPUS, help="images per step and device")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 on CUDA, else fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    parser.add_argument("--steps", type=positive_int, default=20 if torch.cuda.is_available() else 2, help="steps per turn")
    parser.add_argument("--repeats", type=positive_int, default=5, help="turns of each method")
    parser.add_argument("--num-workers", type=nonnegative_int, default=4, help="of extract, reading images")
    parser.add_argument("--batch-size", type=positive_int, help="of sample, extract and fid (default: 64 on CUDA, else 4, 4, 16)")
    parser.add_argument("--num-steps", type=positive_int, help="sampler steps of sample (default: 250 on CUDA, else 10)")
    parser.add_argument("--vae", help="autoencoder of sample and extract (default: of SD-VAE's size, with random weights)")
    parser.add_argument("--count", type=positive_int, help="images of extract and fid (default: 2048 and 5000, or 48 and 64)")
    parser.add_argument("--image-size", type=positive_int, default=256, help="side of the images of extract and fid")
    parser.add_argument("--pr-count", type=positive_int, help="points of fid's larger precision, recall (default: 50000, or 2000)")
    parser.add_argument("--json", help="file to write (default: runs/benchmark-MODE.json)")
    options = parser.parse_args()
    of_device = "bf16" if options.device == "cuda" else "fp32"
    function, precision, defaults = ON_ONE_DEVICE.get(options.mode, (None, of_device, {}))
    if function and options.precision not in (None, precision):
        fail(f"the mode {options.mode} has its precision, {precision}; leave --precision out")
    options.precision = options.precision or precision
    for name, (on_cuda, elsewhere) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, on_cuda if options.device == "cuda" else elsewhere)
    options.compile = options.device == "cuda" if options.compile is None else options.compile
    if options.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no CUDA device here")
    if options.mode == "memory" and options.device != "cuda":
        fail("the mode memory asks a GPU how much it holds, and there is none here")
    if options.mode == "train" and "REPA" in options.methods and not options.model.endswith("/2"):
        fail(f"REPA's encoder has 16x16 tokens and {options.model} has others; take a model /2, or leave REPA out of --methods")
    if options.mode == "fid" and min(options.count, options.pr_count) < 4:
        fail("precision and recall look for third neighbours, so that --count and --pr-count must be at least 4")
    if options.mode in ("extract", "fid") and not Path("/proc/self/status").exists():
        fail(f"the mode {options.mode} reads the memory it takes from /proc, which only Linux has")
    rank, world_size, device = init_distributed()
    if options.device == "cpu":
        device = torch.device("cpu")
    if options.mode not in ("train", "profile") and world_size > 1:
        fail(f"the mode {options.mode} measures one device; start it with plain python")
    if function:
        figures = function(options, device)
    elif options.mode == "memory":  # 1 GiB less than the label: the driver and the display take some
        figures = {f"{gb} GB": largest_micro_batch(options, device, gb - 1) for gb in (24, 80)}
    else:
        figures = (measure if options.mode == "train" else profile)(options, device, rank, world_size)
    if rank == 0:
        if options.mode == "train":
            print_table(figures, options, world_size)
        elif options.mode == "memory":
            print(f"{options.model} + VAE-REPA, largest --micro-batch: {figures}")
        elif options.mode == "profile":
            for kind, ms in figures["ms_per_step"].items():
                print(f"{kind:28}{ms:10.2f} ms {100 * ms / figures['wall_ms_per_step']:6.1f} %")
            print(f"{'a step':28}{figures['wall_ms_per_step']:10.2f} ms; the loader alone {figures['loader_alone_ms_per_step']:.2f} ms")
        out = Path(options.json or f"runs/benchmark-{options.mode}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        made_with = {"hardware": hardware(options.device), "processes": world_size, "torch": torch.__version__,
                     "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), **vars(options)}
        write_json(out, {"made_with": made_with, **figures})
        print(out)


if __name__ == "__main__":
    run(main)
