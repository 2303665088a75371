"""What this repository costs on this machine's GPU, or CPU: `python tests/benchmark.py MODE`.

    train    a training step of plain SiT, VAE-REPA, REPA and SRA, beside the paper's Table 4
    profile  where the time of VAE-REPA's step goes, by kind of kernel, beside the least it could take
    memory   the largest --micro-batch in 24, 40 and 80 GiB: by the peaks of two, or on a CPU computed
    sample   sample.py, beside itself in float32, eager, with TF32; hours for 50,000 images
    extract  extract_latents.py; hours for ImageNet
    fid      fid.py; minutes for --count samples and a fifth as many references, 12 GB on disk

What is compared takes turns in alternating order, since a machine's speed drifts. Figures are medians over
turns, ratios medians over pairs. After the first, no turn begins that would end after 8 minutes; a mode that
is not done after 9.5 minutes ends without figures. What it has until then is in JSON.partial, written after
each turn and, by memory, after each method. train holds all its methods at once: four of SiT-XL/2 take 60 GB,
and 0.3 GB more for each image of the largest --micro-batch. Weights, latents and images are random. sample
and extract are timed on some images and on twice as many, and subtracted.

train has a step of the first --micro-batch, "32", and one of --batch-size in forwards of each --micro-batch,
"256 by 128". "GFLOPs" are multiply-adds of an image's forwards, as the paper counts, "operations" those of a
step, forward and backward, times 2. "External" is what has no gradient: REPA's encoder, SRA's teacher.
"start-up" is building, compiling and the first step; "peak memory" that of the largest.

"of the products' rate": the time of the network's matrix products (of SiT's alone in sample) at the speed of
large ones, over the time taken. "of the limit": that time and the optimizer's least, over the time taken.
The optimizer's least is 40 bytes a parameter at the speed of a large copy: to read the gradient for its
norm; to read gradient, weight, AdamW's two moments and the EMA; to write the last four. Both speeds are
measured in the same run.
"""

import argparse
import gc
import itertools
import os
import re
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_inductor_cache
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import extract_latents  # these are found only now
import fid
import sample
import train
from extract_latents import Parser, encode, fail, load_vae, positive_int, read_ahead, write_json
from models import ALIGN_DEPTHS, LPIPS, Encoder, SiT_models, build_model

ON_8, FORWARD = "it/s on 8 GPUs, no all-reduce", "forward of 1 image, ms"
PAPER_ROWS = "external, M", "head, M", ON_8, "GFLOPs", FORWARD  # Table 4, on H100s
PAPER = {"plain": (0, 0, 8.1, 114.46, 18.05), "VAE-REPA": (0, 18, 7.2, 118.55, 19.20),
         "REPA": (303, 8, 5.4, 194.50, 29.03), "SRA": (481, 2, 5.1, 197.57, 30.90)}
PAPER = {name: dict(zip(PAPER_ROWS, figures)) for name, figures in PAPER.items()}
DATA = {"vae": "", "shift": 0.0, "scale": 0.18215, "num_classes": 1000, "latent_shape": (4, 32, 32)}
IMAGE_SIZE, DINOV2 = 256, Path(__file__).resolve().parent / "data" / "dinov2"
LAST_TURN, LAST = 480, 570  # seconds: no turn begins that would end later; the mode ends


def timed(function):
    """Seconds that function() takes, with all that it has the GPU do."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else int
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def take_turns(work, args, warm_up=True):
    """Seconds of each turn of the functions `work`, {name: list}; there is at least one turn."""
    seconds, longest = {name: [] for name in work}, 0
    args.details["seconds"] |= seconds
    for turn in tqdm(range(-warm_up, args.repeats), "turns"):
        started = time.monotonic()
        if turn > 0 and started + longest > args.deadline:
            break
        for name in list(work)[:: 1 if turn % 2 else -1]:
            taken = timed(work[name])
            seconds[name] += [taken] if turn >= 0 else []  # turn -1 compiles and warms up
        longest = max(longest, time.monotonic() - started) if turn >= 0 else 0
        write_json(f"{args.json}.partial", args.details)
    return seconds


def paired(numerators, denominators):
    return median(a / b for a, b in zip(numerators, denominators))


def device_rates(args, precision):
    """The device's own limits: FLOP/s of large matrix products, and bytes/s that a large copy reads and
    writes; many of each in a row, as training keeps a GPU hot. precision: bf16, tf32 or fp32."""
    n, count, times = (8192, 2**28, 300) if torch.cuda.is_available() else (512, 2**24, 10)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, c = torch.randn(3, n, n, device=args.device, dtype=dtype)
    source, target = torch.rand(2, count, device=args.device)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    seconds = take_turns({"products": lambda: [torch.mm(a, b, out=c) for _ in range(times)],
                          "copies": lambda: [target.copy_(source) for _ in range(times)]}, args)
    rates = times * 2 * n**3, times * 2 * source.nbytes
    return rates[0] / median(seconds["products"]), rates[1] / median(seconds["copies"])


def command(*words):
    return mock.patch("sys.argv", list(map(str, words)))


def train_args(method, args, *flags):
    """train.py's flags for a method."""
    size = args.model.split("/")[0]
    encoder = "dinov2_vitt14" if size == "SiT-Ti" else "dinov2_vitl14"  # the table's is L
    depth, sra_depth = ALIGN_DEPTHS.get(size, 2), {"SiT-XL": 8, "SiT-L": 6, "SiT-Ti": 2}.get(size, 3)
    depth = {"plain": [], "VAE-REPA": ["--vae-repa-depth", depth], "SRA": ["--sra-depth", sra_depth],
             "REPA": ["--repa-depth", depth, "--repa-encoder", encoder],
             "REPA-E": ["--repa-depth", depth, "--repa-encoder", encoder.replace("vitl", "vitb"),
                        "--tune-vae"]}[method]
    with command("train", "--model", args.model, "--vae-repa-depth", 0, *depth, *flags):
        return train.parse_args()


def random_encoder(name, image_size=IMAGE_SIZE):
    """In the place of models.load_encoder: REPA's encoder with random weights."""
    return Encoder(torch.hub.load(str(DINOV2), name, source="local", pretrained=False), image_size)


def count_work(args):
    """Millions of parameters, and billions of multiply-adds of an image's forward passes in training.

    GFLOPs leave out products inside attention, as the paper's. External, without gradient, are REPA's encoder
    and SRA's teacher. Operations are of an image's step, forward and backward.
    """
    with torch.device("meta"):
        encoder = random_encoder(args.repa_encoder) if args.repa_depth else None
        model = build_model({**vars(args), "data": DATA, "repa_dim": encoder and encoder.dim})
        inputs = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        own, external, parts = count_macs(model, *inputs, return_align=True), (0, 0), []
        if args.repa_depth:
            external, parts = count_macs(encoder, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)), [encoder]
        elif args.sra_depth:
            external, blocks = count_macs(model.early_blocks, *inputs, args.sra_teacher_depth), model.blocks
            parts = model.x_embedder, model.t_embedder, model.y_embedder, *blocks[: args.sra_teacher_depth]
    return {"external, M": sum(p.numel() for part in parts for p in part.parameters()) / 1e6,
            "head, M": sum(p.numel() for p in model.heads.parameters()) / 1e6,
            "trained, M": sum(p.numel() for p in model.parameters()) / 1e6,
            "GFLOPs": (own[0] + external[0]) / 1e9, "GFLOPs with attention": sum(own + external) / 1e9,
            "operations of a step, G": 2 * (3 * sum(own) + sum(external)) / 1e9}  # backward: twice a forward


def count_macs(function, *inputs, **named):
    """Multiply-adds (of layers, inside attention) as function(*inputs) runs them."""
    counted = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda layer, _, y: counted.append(layer_macs(layer, y)))
    function(*inputs, **named)
    hook.remove()
    return tuple(map(sum, zip(*counted)))


def layer_macs(layer, y):
    if type(layer).__name__ == "Attention":  # Q K^T and A V; y: (1, N, D)
        return 0, 2 * y.shape[1] * y.numel()
    if isinstance(layer, nn.LayerNorm):  # fvcore's convention
        return y.numel() * (5 if layer.elementwise_affine else 4), 0
    return y.numel() * layer.weight[0].numel() if isinstance(layer, (nn.Linear, nn.Conv2d)) else 0, 0


def least_seconds(work, images, rates):
    """The limit of a step: (its products' time, its optimizer's); work: `count_work`'s."""
    products, copies = rates
    return 1e9 * work["operations of a step, G"] * images / products, 40e6 * work["trained, M"] / copies


def build(method, args, folder, *sizes):
    """({size: train.py's arguments}, latents, model, EMA model, REPA's encoder or None, what REPA-E tunes).

    A size is (images of a step, images of a forward).
    """
    flags = ("--data", folder, "--run-dir", f"{folder}/{method} {sizes[0]}", "--sample-every", 0,
             "--precision", args.precision, "--lpips-weights", folder / "vgg.pth", folder / "lin.pth",
             "--compile" if args.compile else "--no-compile", "--batch-size")
    run_args = {(n, micro): train_args(method, args, *flags, n, "--micro-batch", micro) for n, micro in sizes}
    latents = extract_latents.Latents(folder, extras=["images"] if "REPA" in method.split("-") else [])
    with mock.patch.object(train, "load_encoder", random_encoder):
        model, ema, encoder, tuned, _ = train.build(run_args[sizes[0]], latents.facts)
    return run_args, latents, model, ema, encoder, tuned


class Run:
    """One method, ready for steps of some sizes: what train.py's main holds."""

    def __init__(self, method, args, folder, *sizes):
        x = torch.ones(64, 64, device=args.device, requires_grad=True)
        (x @ x).sum().backward()  # cuBLAS keeps its workspaces: they would be of the first run's peak alone
        held, started, first = torch.cuda.memory_allocated(), time.perf_counter(), sizes[0]
        self.device, self.step = args.device, 0
        self.args, latents, self.model, self.ema, self.encoder, self.tuned = build(
            method, args, folder, *sizes)
        for module in filter(None, (self.model, self.ema, self.encoder, self.tuned)):
            module.to(self.device)
        trained = [*self.model.parameters(), *self.tuned.parameters()]
        self.optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0, fused=True)
        torch.compiler.reset()  # else a method would not pay for layers that an earlier one compiled
        torch._dynamo.config.cache_size_limit = 64  # past 8 sizes torch would go on eager
        if args.compile:
            train.compile_layers(self.model, self.ema, self.args[first])
        self.stored = {}
        for size in sizes:
            rows = map(partial(latents.rows, batch_size=size[0], seed=0), itertools.count())
            self.stored[size] = read_ahead(latents.read, rows, threads=4)
        self.kept = next(self.stored[first])  # a batch to repeat
        with fresh_inductor_cache():
            timed(partial(self.take_steps, 1, first))
        self.start_up = time.perf_counter() - started
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for size in sizes:
            timed(partial(self.take_steps, 2, size))
        self.peak_gib = (torch.cuda.max_memory_allocated() - held) / 2**30

    def batch(self, stored, args):
        local, null_class = slice(0, args.batch_size), self.model.null_class
        return train.make_batch(stored, self.step, null_class, args, local, self.device)

    def add_tokens(self, batch, args):
        if self.encoder:
            batch["tokens"] = train.image_tokens(self.encoder, batch, args)
        return batch

    def take_steps(self, steps, size, repeated=None):
        """Training steps of a size, of images read from disk, or of one batch that is repeated."""
        args = self.args[size]
        for _ in range(steps):
            batch = self.add_tokens(self.batch(repeated or next(self.stored[size]), args), args)
            if self.tuned:
                batch["x"], _ = train.vae_step(self.tuned, self.model, batch, args)
            train.training_step(self.model, self.ema, self.optimizer, batch, args, 0)
            self.step += 1

    @torch.no_grad()
    def forward_one(self):
        """The forward passes of one image, eager: model, heads, REPA's encoder, SRA's teacher."""
        args = next(iter(self.args.values()))
        batch = {name: values[:1] for name, values in self.batch(self.kept, args).items()}
        with torch.compiler.set_stance("force_eager"), sample.autocast(self.device, args.precision):
            train.training_losses(self.model, self.ema, self.add_tokens(batch, args), args)


def measure_train(args, folder):
    small, large = args.micro_batch[0], args.batch_size
    sizes = {f"{small}": (small, small)}
    sizes |= {f"{large} by {n}": (large, n) for n in args.micro_batch if (large, n) != (small, small)}
    steps = {label: max(args.steps * small // n, 1) for label, (n, _) in sizes.items()}
    runs = {name: Run(name, args, folder, *sizes.values()) for name in args.methods}
    work = {f"{name} {label}": partial(r.take_steps, steps[label], size)
            for name, r in runs.items() for label, size in sizes.items()}
    work |= {f"{name} again": partial(r.take_steps, args.steps, (small, small), r.kept)
             for name, r in runs.items()}
    seconds, columns = take_turns(work, args), {}
    latency = take_turns({name: r.forward_one for name, r in runs.items()}, args)
    rates = device_rates(args, args.precision)
    profiled(partial(runs[args.methods[0]].take_steps, 1, (small, small)), args)
    for name, r in runs.items():
        rows = columns[name] = count_work(r.args[small, small])
        rows |= {FORWARD: 1e3 * median(latency[name]), "start-up, s": r.start_up,
                 "peak memory, GiB": r.peak_gib,
                 "products, TFLOP/s": rates[0] / 1e12, "copies, TB/s": rates[1] / 1e12,
                 "reading / repeated batch": paired(seconds[f"{name} {small}"], seconds[f"{name} again"])}
        for label, (n, _) in sizes.items():
            step = median(seconds[f"{name} {label}"]) / steps[label]
            products, optimizer = least_seconds(rows, n, rates)
            rows |= {f"{label}: step, ms": 1e3 * step, f"{label}: images/s": n / step,
                     f"{label}: of the products' rate": products / step,
                     f"{label}: of the limit": (products + optimizer) / step}
            if "plain" in runs:
                rows[f"{label}: step / plain's"] = paired(seconds[f"{name} {label}"],
                                                          seconds[f"plain {label}"])
        if small == 32:
            rows[ON_8] = rows["32: images/s"] * 8 / 256
    return columns


KINDS = {"compiled element-wise": "^triton_(poi|per|red|mix|spl|for)_|^cpp_fused",
         "communication": "nccl|all_?reduce", "attention": "flash|fmha|attention|sdpa|dot_do_o|convert_dq",
         "optimizer": "adam", "EMA": "lerp",
         "clipping": "lpnorm|NormTwoOps|BinaryOpScalarTensorFunctor|foreach_(norm|mul)|vector_norm",
         "matrix products": "gem[mv]|nvjet|cutlass|cublas|conv|::mm$|addmm|bmm|matmul|::linear|mkldnn"
                            "|^triton_(tem|mm)",
         "copies": "memcpy|memset|copy|CatArray"}


def kind_of(name):
    """The kind of a CUDA kernel, or of a CPU's operator, by its name."""
    kinds = [kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)]
    return kinds[0] if kinds else "element-wise and the rest"


def kernel_ms(events, cuda):
    """[(ms, name)] of a profile's kernels, on a CPU of its operators; annotations repeat kernels."""
    return [((event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3, event.key)
            for event in events
            if not cuda or event.device_type.name == "CUDA" and not event.is_user_annotation]


def profiled(function, args):
    """[(ms, kind, name)] of the kernels, on a CPU of the operators, that function() runs. Those of attention
    go into the JSON file."""
    with torch.profiler.profile() as profiler:
        timed(function)
    kernels = kernel_ms(profiler.key_averages(), torch.cuda.is_available())
    kernels = [(ms, kind_of(name), name) for ms, name in kernels]
    args.details["made_with"]["attention kernels"] = [
        name for _, kind, name in kernels if kind == "attention"]
    return kernels


def element_wise_bytes(model, args):
    """Bytes that the compiler's element-wise kernels read and write in a step's layers, by its own count."""
    h = torch.zeros(args.micro_batch[0], *model.pos_embed.shape[1:], device=args.device, requires_grad=True)
    c, counted, codegen = h[:, 0].detach().requires_grad_(), [], GraphLowering.codegen
    layers = [(layer, 1) for layer in (model.final_layer, *model.heads.values())]

    def counting(graph):
        code = codegen(graph)
        counted.extend(node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes
                       if not node.is_extern())
        return code

    total = 0
    for layer, count in [(model.blocks[0], len(model.blocks)), *layers]:
        counted.clear()
        torch.compiler.reset()
        with mock.patch.object(GraphLowering, "codegen", counting), fresh_inductor_cache():
            with sample.autocast(args.device, args.precision):
                y = layer(h, c)
            y.sum().backward()
        total += count * sum(counted)
    model.zero_grad()
    return total


def measure_profile(args, folder):
    """Beside the time of each kind of kernel stands the least that it could take, where that can be told: for
    products and attention at the products' rate, for the rest at a copy's. As kernels of their own,
    optimizer, EMA and clipping move 52 bytes a parameter instead of 40. With TORCHINDUCTOR_PROFILE=1 in the
    environment torch prints the bytes/s of each kernel that it compiled."""
    size = args.micro_batch[0], args.micro_batch[0]
    run = Run("VAE-REPA", args, folder, size)
    steps = partial(run.take_steps, args.steps, size)
    step = 1e3 * median(take_turns({"step": steps}, args)["step"]) / args.steps
    kernels = sorted(profiled(steps, args), reverse=True)
    kernels = [(ms / args.steps, kind, name) for ms, kind, name in kernels]
    rows = {"a step": step, "gaps": max(step - sum(ms for ms, _, _ in kernels), 0)}
    for ms, kind, _ in kernels:
        rows[kind] = rows.get(kind, 0) + ms
    args.details["kernels"] = kernels
    work, rates = count_work(train_args("VAE-REPA", args)), device_rates(args, args.precision)
    products, optimizer = (1e3 * seconds for seconds in least_seconds(work, size[0], rates))
    layers = work["GFLOPs"] / work["GFLOPs with attention"]
    limit = {"matrix products": layers * products, "attention": (1 - layers) * products,
             "optimizer": 28 / 40 * optimizer, "EMA": 12 / 40 * optimizer, "clipping": 12 / 40 * optimizer}
    if "compiled element-wise" in rows:  # not so on a CPU, whose profile does not name them
        limit["compiled element-wise"] = 1e3 * element_wise_bytes(run.model, args) / rates[1]
    limit["a step"] = sum(limit.values())
    return {"ms": rows, "of the step": {row: ms / step for row, ms in rows.items()},
            "the least, ms": {row: limit.get(row, 0.0) for row in rows}}


def measure_memory(args, folder):
    """Of a step of several forwards: from the second on there are gradients. A tenth of the GPU's memory is
    left to its driver, to fragments, and to what a backward needs for a moment."""
    columns, bytes_of = {}, peak_bytes if args.device.type == "cuda" else computed_bytes
    for name in args.methods:
        fixed, each = bytes_of(name, args, folder)
        columns[name] = {"without images, GiB": fixed / 2**30, "an image, MiB": each / 2**20}
        for gib in (24, 40, 80):
            most = int((0.9 * gib * 2**30 - fixed) // each)
            columns[name][f"largest --micro-batch in {gib} GiB"] = max(most, 0)
        write_json(f"{args.json}.partial", {**args.details, "figures": columns})
    return columns


def write_tuning(args, folder):
    """What REPA-E loads, with random weights: the VAE, VGG16 and LPIPS's."""
    for name, weights in zip(("vgg", "lin"), lpips_weights(64, 128, 256, 512, 512)):
        torch.save(weights, folder / f"{name}.pth")
    write_json(folder / "latents.json", {**DATA, "vae": make_vae(args, folder)})


def lpips_weights(*widths):
    """(torchvision's weights of VGG16, LPIPS's for it), random, for stages of these widths."""
    vgg, lin, before = {}, {}, 3
    for i, (width, stage) in enumerate(zip(widths, LPIPS.STAGES)):
        for n in stage:
            vgg[f"features.{n}.weight"] = torch.randn(width, before, 3, 3) / (3 * before**0.5)
            vgg[f"features.{n}.bias"], before = torch.randn(width) / 10, width
        lin[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1)
    return vgg, lin


def peak_bytes(method, args, folder):
    """Bytes (without images, of an image), by the peaks of two sizes of --micro-batch."""
    few, many = (2, 4) if method == "REPA-E" else (8, 24)
    peaks = {}
    for n in (few, many):
        torch.compiler.reset()
        gc.collect()  # compiled layers are cycles
        peaks[n] = 2**30 * Run(method, args, folder, (2 * n, n)).peak_gib
    each = (peaks[many] - peaks[few]) / (many - few)
    return peaks[few] - few * each, each


def computed_bytes(method, args, folder):
    """Bytes (without images, of an image): weights, gradients, AdamW's two moments, EMA, REPA's encoder; and
    what a forward saves for its backward. REPA-E has the VAE's before SiT's, which saves less.
    """
    torch.compiler.reset()
    few, many = (1, 2) if method == "REPA-E" else (2, 4)
    run_args, latents, model, ema, encoder, tuned = build(method, args, folder, (many, many))
    run_args, saved = run_args[many, many], {}
    if args.compile:  # the compiler's choice of what is saved and what computed again, without its kernels
        partition = partial(torch.compile, backend="aot_eager_decomp_partition")
        with mock.patch.object(torch, "compile", partition):
            train.compile_layers(model, ema, run_args)
    batch = latents.read(range(many))
    batch = train.make_batch(batch, 0, model.null_class, run_args, slice(many), args.device)
    if encoder:
        batch["tokens"] = train.image_tokens(encoder, batch, run_args)
    for n in (few, many):
        part = {name: values[:n] for name, values in batch.items()}
        if tuned:
            saved[n] = saved_bytes([model, tuned], train.vae_step, tuned, model, part, run_args)
        else:
            with sample.autocast(args.device, args.precision):
                saved[n] = saved_bytes([model], train.training_losses, model, ema, part, run_args)
    each = (saved[many] - saved[few]) / (many - few)
    tuning = 4 * sum(b.numel() for b in tuned.buffers()) + 16 * sum(p.numel() for p in tuned.parameters())
    trained, external = (sum(p.numel() for p in m.parameters()) if m else 0 for m in (model, encoder))
    return saved[few] - few * each + 20 * trained + 4 * external + tuning, each


def saved_bytes(modules, function, *inputs):
    """Bytes that function(*inputs) saves for its backward passes, the modules' own tensors aside.

    Group norms are in float32, as CUDA's autocast has them and a CPU's has not; so has it the head's layer
    norm, which is left out: less than 1 % of an image's bytes.
    """
    storages, own = [], [x.untyped_storage().data_ptr() for module in modules
                         for x in (*module.parameters(), *module.buffers())]
    hooks = (lambda x: storages.append(x.untyped_storage()) or x), (lambda x: x)
    in_float32 = mock.patch.object(F, "group_norm", lambda x, *of, norm=F.group_norm: norm(x.float(), *of))
    with torch.autograd.graph.saved_tensors_hooks(*hooks), in_float32:
        function(*inputs)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}  # all are alive
    return sum(size for pointer, size in sizes.items() if pointer not in own)


# sample, extract, fid


def operations(function, *inputs):
    """Floating-point operations of the products in function(*inputs), those inside attention too."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function(*inputs)
    return counter.get_total_flops()


def run_script(script, *flags):
    """Run a command and throw away what it writes; in float32, with TF32."""
    torch.backends.cuda.matmul.allow_tf32 = "fp32" in flags
    with tempfile.TemporaryDirectory() as out:
        with command(script.__name__, *flags, "--json" if script is fid else "--out", f"{out}/out.npz"):
            script.main()


def steady_seconds(script, args, commands):
    """Seconds of each turn, {name: list}, that the second of commands {name: (flags, flags)} takes longer."""
    work = {}
    for name, both in commands.items():
        work[name], work[f"{name}, more"] = (partial(run_script, script, *flags) for flags in both)
        work[name]()  # compiles and warms up
    seconds = take_turns(work, args, warm_up=False)
    return {name: [b - a for a, b in zip(seconds[name], seconds[f"{name}, more"])] for name in commands}


def make_vae(args, folder):
    """--vae, or a folder with random weights of SD-VAE's size."""
    if not args.vae:
        from diffusers import AutoencoderKL  # slow to import

        AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                      down_block_types=["DownEncoderBlock2D"] * 4,
                      up_block_types=["UpDecoderBlock2D"] * 4).save_pretrained(folder / "vae")
    return args.vae or str(folder / "vae")


def measure_sample(args, folder):
    size, plain = args.batch_size, "float32, TF32, eager"
    settings = {"model": args.model, "data": {**DATA, "vae": make_vae(args, folder)}}
    torch.save({"ema": build_model(settings).state_dict(), "settings": settings}, folder / "model.pt")
    flags = ("--ckpt", folder / "model.pt", "--batch-size", size, "--num-steps", args.steps,
             "--cfg-scale", 1.8, "--guidance-interval", 0, 0.7,  # REPA's guidance
             "--precision", args.precision, "--num-samples")
    commands = {"as it is": [(*flags, n) for n in (size, 2 * size)]}
    commands[plain] = [(*command, "--precision", "fp32", "--no-compile") for command in commands["as it is"]]
    seconds = steady_seconds(sample, args, commands)
    rate, columns = device_rates(args, "bf16" if args.precision == "bf16" else "tf32")[0], {}
    calls = (1 + (torch.linspace(1, 0.04, args.steps, dtype=torch.float64) <= 0.7)).sum().item()
    flops = 2e9 * count_work(train_args("plain", args))["GFLOPs with attention"] * size * calls
    for name, turns in seconds.items():
        batch = median(turns)
        columns[name] = {f"{size} images, s": batch, "hours for 50,000 images": 50_000 / size * batch / 3600,
                         "times as fast": paired(seconds[plain], turns),
                         "of the products' rate": flops / batch / rate}
    return columns


def measure_extract(args, folder):
    random, count, images = np.random.default_rng(0), args.count, folder / "images"
    for name in ("half/a", "rest"):
        (images / name).mkdir(parents=True)
    for i in tqdm(range(2 * count), "writing JPEGs"):  # of ImageNet's mean size
        image = Image.fromarray(random.integers(0, 256, (94, 125, 3), np.uint8)).resize((500, 375))
        image.save(images / ("half/a" if i < count else "rest") / f"{i}.jpg", quality=90)
    flags = ("--vae", make_vae(args, folder), "--image-size", args.image_size, "--batch-size",
             args.batch_size, "--num-workers", args.num_workers, "--images")
    commands = {"": [(*flags, images / "half"), (*flags, images)]}
    rate = count / median(steady_seconds(extract_latents, args, commands)[""])
    vae, image = load_vae(flags[1]).to("meta"), torch.zeros(1, 3, *2 * [args.image_size], device="meta")
    limit = device_rates(args, "tf32" if torch.backends.cudnn.allow_tf32 else "fp32")[0]  # its convolutions
    return {"": {"images/s": rate, "hours for ImageNet": 1_281_167 / rate / 3600,
                 "of the products' rate": operations(encode, vae, image) * rate / limit}}


def measure_fid(args, folder):
    random, size, network = np.random.default_rng(0), args.image_size, fid.InceptionV3().eval()
    torch.save(network.state_dict(), folder / "weights.pth")
    for name, n in (("samples", args.count), ("reference", args.count // 5)):
        np.savez(folder / f"{name}.npz", random.integers(0, 256, (n, size, size, 3), np.uint8))
    flags = ("--ref", folder / "reference.npz", "--weights", folder / "weights.pth", "--batch-size",
             args.batch_size, "--num-workers", args.num_workers)
    work = {"": partial(run_script, fid, folder / "samples.npz", *flags)}
    seconds = median(take_turns(work, args, warm_up=False)[""])
    count = args.count + args.count // 5
    limit = count * operations(network, torch.zeros(1, 3, size, size)) / device_rates(args, "fp32")[0]
    return {"": {"samples": args.count, "minutes": seconds / 60, "of the products' rate": limit / seconds}}


def write_latents(folder):
    """Random moments and images, to be read by train.py."""
    random = np.random.default_rng(0)
    np.save(folder / "moments.npy", random.random((256, 8, 32, 32), np.float32).astype(np.float16))
    np.save(folder / "labels.npy", random.integers(1000, size=256))
    np.save(folder / "images.npy", random.integers(0, 256, (256, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))
    write_json(folder / "latents.json", DATA)


def print_table(columns, paper):
    """Columns {name: {row: number}}, with the paper's in brackets."""
    print(f"{'':34}", *(f"{name:>20}" for name in columns))
    for row in next(iter(columns.values())):
        cells = [(f"{column[row]:.5g}", paper.get(name, {}).get(row)) for name, column in columns.items()]
        cells = [ours if theirs is None else f"{ours} ({theirs})" for ours, theirs in cells]
        print(f"{row:34}", *(f"{text:>20}" for text in cells))


def too_slow(args, number, frame):
    fail(f"{args.mode} does not end within 10 minutes here: lower --steps, --count or --batch-size, or give "
         f"fewer --methods or a smaller --model (turns that ended are in {args.json}.partial)")


MODES = {"train": measure_train, "profile": measure_profile, "memory": measure_memory,
         "sample": measure_sample, "extract": measure_extract, "fid": measure_fid}


def parse_args():
    cuda, parser = torch.cuda.is_available(), Parser(__doc__)
    add = parser.add_argument
    add("mode", choices=MODES)
    add("--device", choices=["cuda", "cpu"], default="cuda" if cuda else "cpu", help="to run on")
    add("--model", choices=SiT_models, default="SiT-XL/2", metavar="SIZE", help="SiT-{XL,L,B,S,Ti}/{1,2,4,8}")
    add("--methods", choices=[*PAPER, "REPA-E"], nargs="+", help="of train and memory (default: all but "
        "REPA-E, which only memory knows)")
    add("--micro-batch", type=positive_int, nargs="+", help="images of a forward, of train and profile "
        "(default: 32); train does its larger step with each")
    add("--attention", choices=["flash", "cudnn"], help="of train and profile, on a GPU (default: flash)")
    add("--precision", choices=["bf16", "fp32"], help="of training (default: as train.py's)")
    add("--compile", action=argparse.BooleanOptionalAction, help="of training (default: as train.py's)")
    add("--vae", help="of sample, extract and REPA-E (default: one of SD-VAE's size)")
    add("--json", help="file to write (default: runs/benchmark-MODE-MODEL.json)")
    for name, default, text in (
            ("repeats", 5, "turns"),
            ("batch-size", None, "of train's larger step (default: 256), or of a forward (64)"),
            ("steps", None, "of a turn of training (default: 20), or of the sampler (250)"),
            ("count", None, "images of extract (default: 2048), samples of fid (50000)"),
            ("image-size", 256, "of extract, fid"), ("num-workers", 8, "threads of extract, fid")):
        add(f"--{name}", type=positive_int, default=default, help=text)
    args = parser.parse_args()
    args.batch_size = args.batch_size or (256 if args.mode == "train" else 64)
    args.steps = args.steps or (250 if args.mode == "sample" else 20)
    args.count = args.count or (50_000 if args.mode == "fid" else 2048)
    if args.device == "cuda" and not cuda:
        fail("--device cuda needs a GPU")
    as_on_gpus = args.device == "cuda" or args.mode == "memory"
    args.precision = args.precision or ("bf16" if as_on_gpus else "fp32")
    args.compile = as_on_gpus if args.compile is None else args.compile
    if "RANK" in os.environ:
        fail("it measures one device: start it without torchrun")
    for flag, modes, default in (
            ("methods", ("train", "memory"), list(PAPER)), ("micro_batch", ("train", "profile"), [32]),
            ("attention", ("train", "profile"), "flash")):
        given = getattr(args, flag)
        if given is not None and args.mode not in modes:
            fail(f"--{flag.replace('_', '-')} is of {' and '.join(modes)}, not of {args.mode}")
        setattr(args, flag, default if given is None else given)
    if "REPA-E" in args.methods and args.mode == "train":
        fail("REPA-E is a method of memory, not of train")
    if args.mode == "profile" and len(args.micro_batch) > 1:
        fail("profile takes one --micro-batch")
    if args.attention == "cudnn" and args.device == "cpu":
        fail("--attention cudnn needs a GPU")
    args.json = args.json or f"runs/benchmark-{args.mode}-{args.model.replace('/', '-')}.json"
    return args


def main():
    args = parse_args()
    cuda, made_with = args.device == "cuda", {**vars(args), "date": time.strftime("%Y-%m-%d")}
    hardware = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    made_with |= {"hardware": hardware, "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    args.device, args.deadline = torch.device(args.device), time.monotonic() + LAST_TURN
    args.details = {"made_with": made_with, "seconds": {}}
    torch.backends.cudnn.allow_tf32 = args.precision == "bf16"  # as torch has it, but not in float32
    torch._functorch.config.enable_autograd_cache = False  # it would mix up kernels of attention
    first = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[args.attention]
    attention = sdpa_kernel([first, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)
    Path(f"{args.json}.partial").unlink(missing_ok=True)  # an earlier run's
    # the scripts take a GPU where there is one
    visible = mock.patch.object(torch.cuda, "is_available", lambda: cuda)
    with tempfile.TemporaryDirectory() as folder, visible, attention:
        signal.signal(signal.SIGALRM, partial(too_slow, args))
        signal.setitimer(signal.ITIMER_REAL, LAST, 5)
        try:
            write_latents(Path(folder))
            if "REPA-E" in args.methods:
                write_tuning(args, Path(folder))
            columns = MODES[args.mode](args, Path(folder))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    print(f"\n{made_with}\n")
    print_table(columns, PAPER if args.mode == "train" and args.model == "SiT-XL/2" else {})
    write_json(args.json, {**args.details, "figures": columns})
    Path(f"{args.json}.partial").unlink(missing_ok=True)
    print(args.json)


if __name__ == "__main__":
    extract_latents.run(main)
