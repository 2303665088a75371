"""What training costs on this machine, beside the paper's Table 4.

    python tests/benchmark.py train                                      # or torchrun --nproc_per_node=8 tests/benchmark.py train
    python tests/benchmark.py profile                                    # where the time of a step goes
    python tests/benchmark.py memory                                     # the largest --micro-batch of a 24 and an 80 GB GPU
    python tests/benchmark.py train --device cpu --model SiT-Ti/2 --micro-batch 8 --steps 2      # small, anywhere

Plain SiT and VAE-REPA take turns in one process, so that their ratio holds while the machine's speed drifts; figures are medians
over the turns. Both run train.py's own step on latents read from disk by its own loader.
"""

import argparse
import gc
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from extract_latents import Parser, fail, init_distributed, natural, positive_int, run, write_json  # noqa: E402
from models import ALIGN_DEPTHS, SiT_models  # noqa: E402
from train import Latents, StepBatches, build_training, draw_step, sample_posterior, training_step  # noqa: E402

# Table 4, measured on H100s at a global batch of 256: external + head parameters (M), it/s, GFLOPs, forward latency (ms)
PAPER = {("SiT-XL/2", "plain"): (0, 0, 8.1, 114.46, 18.05), ("SiT-XL/2", "VAE-REPA"): (0, 18, 7.2, 118.55, 19.20)}
LATENT_SHAPE, NUM_CLASSES, PAPER_GPUS, PAPER_BATCH = (4, 32, 32), 1000, 8, 256


def count_macs(model):
    """(as the paper counts, with attention): multiply-adds of a forward pass of one image, of a model on the meta device.

    The paper's count is fvcore's: linear layers and convolutions, 4 per element of a LayerNorm, no product inside attention.
    """
    counted = []
    hooks = [module.register_forward_hook(lambda module, _, y: counted.append(macs(module, y)))
             for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm))]
    size = model.input_size
    x, t, y = (torch.zeros(shape, device="meta", dtype=kind) for shape, kind in
               (((1, model.in_channels, size, size), None), ((1,), None), ((1,), torch.long)))
    model(x, t, y, return_align=True)
    for hook in hooks:
        hook.remove()
    tokens = (size // model.patch_size) ** 2
    return sum(counted), sum(counted) + sum(2 * tokens**2 * block.mlp.fc2.out_features for block in model.blocks)


def macs(module, y):
    if isinstance(module, nn.LayerNorm):
        return 4 * y.numel()
    fan_in = module.weight[0].numel()
    return y.numel() * fan_in


def write_latents(folder, count=2048):
    """A set of random moments in the form that train.py reads."""
    rng = np.random.default_rng(0)
    channels, *size = LATENT_SHAPE
    np.save(folder / "moments.npy", rng.random((count, 2 * channels, *size), np.float32).astype(np.float16))
    np.save(folder / "labels.npy", rng.integers(NUM_CLASSES, size=count))


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Run:
    """One method, ready to take steps: the objects that train.py's main holds."""

    def __init__(self, depth, options, folder, device, rank, world_size):
        self.device, self.rank, self.world_size, self.step = device, rank, world_size, 0
        self.args = SimpleNamespace(micro_batch=options.micro_batch, precision=options.precision, vae_repa_loss="smooth_l1",
                                    vae_repa_beta=0.05, vae_repa_weight=1.0, grad_clip=1.0, ema_decay=0.9999)
        settings = {"model": options.model, "vae_repa_depth": depth, "seed": 0, "lr": 1e-4, "compile": options.compile,
                    "data": {"latent_shape": list(LATENT_SHAPE), "num_classes": NUM_CLASSES}}
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        started = time.perf_counter()
        self.model, self.ema, self.optimizer = build_training(settings, device)
        self.wrapped = self.model
        if world_size > 1:
            self.wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.batch = options.micro_batch * world_size
        order = StepBatches(2048, self.batch, 0, 0, 10**9, rank, world_size)
        self.loader = iter(DataLoader(Latents(folder), batch_sampler=order, num_workers=options.num_workers, pin_memory=device.type == "cuda"))
        self.kept = next(self.loader)
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
            moments, y = (values.to(self.device, non_blocking=True) for values in (next(self.loader) if from_disk else self.kept))
            mine = slice(self.rank * len(y), (self.rank + 1) * len(y))
            eps, noise, t, drop, align = (values[mine] for values in draw_step(self.batch, LATENT_SHAPE, 0, self.step, (0, 1), 0.1, self.device))
            x = sample_posterior(moments, eps, 0.0, 0.18215)
            training_step(self.wrapped, self.model, self.ema, self.optimizer, x, torch.where(drop, NUM_CLASSES, y), t, noise, align, self.args)
            self.step += 1
        synchronise(self.device)
        return time.perf_counter() - started

    @torch.no_grad()
    def latency(self, repeats=20):
        """Median milliseconds of a forward pass of one image, head included."""
        x, t, y = torch.zeros(1, *LATENT_SHAPE, device=self.device), torch.zeros(1, device=self.device), torch.zeros(1, device=self.device, dtype=torch.long)
        times = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            for _ in range(repeats):
                synchronise(self.device)
                started = time.perf_counter()
                self.model(x, t, y, return_align=True)
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
    """Figures of both methods, by name."""
    depth = ALIGN_DEPTHS[options.model.split("-")[1].split("/")[0]]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder))
        runs = {name: Run(d, options, folder, device, rank, world_size) for name, d in (("plain", 0), ("VAE-REPA", depth))}
        times = {(name, disk): [] for name in runs for disk in (True, False)}
        for _ in tqdm(range(options.repeats), desc="turns", disable=rank > 0):
            for key in times:
                times[key].append(runs[key[0]].seconds(options.steps, key[1]) / options.steps)
        rate = product_rate(device, options.precision)
        for name, state in runs.items():
            with torch.device("meta"):
                bare = SiT_models[options.model](vae_repa_depth=state.model.vae_repa_depth)
            paper_macs, all_macs = count_macs(bare)
            step = statistics.median(times[name, True])
            figures[name] = {
                "external_parameters_m": 0, "head_parameters_m": sum(p.numel() for k, p in bare.named_parameters() if k.startswith("vae_repa_head")) / 1e6,
                "gflops_as_paper": paper_macs / 1e9, "gflops_with_attention": all_macs / 1e9, "latency_ms": state.latency(),
                "images_per_s": state.batch / step, "step_ms": [1e3 * s for s in times[name, True]],
                "it_per_s_at_256": 1 / step if state.batch == PAPER_BATCH else state.batch / world_size / step * PAPER_GPUS / PAPER_BATCH,
                "it_per_s_measured": state.batch == PAPER_BATCH, "peak_memory_gib": state.memory, "start_up_s": state.start_up,
                "utilisation": 3 * 2 * all_macs * state.batch / world_size / step / rate, "product_tflops": rate / 1e12,
                "loader_ratio": statistics.median(a / b for a, b in zip(times[name, True], times[name, False]))}
        figures["VAE-REPA"]["cost_over_plain"] = statistics.median(a / b - 1 for a, b in zip(times["VAE-REPA", True], times["plain", True]))
    return figures


def print_table(figures, options, world_size):
    how = "compiled" if options.compile else "eager"
    print(f"\n{options.model}, {options.micro_batch} images per device, {world_size} x {hardware(options.device)}, {options.precision}, "
          f"{how}, torch {torch.__version__}; in brackets: the paper's Table 4, on H100s\n")
    rows = [("external + head, M", lambda f, p: f"{f['external_parameters_m']} + {f['head_parameters_m']:.1f}" + (f" ({p[0]} + {p[1]})" if p else "")),
            ("GFLOPs, paper's count", lambda f, p: f"{f['gflops_as_paper']:.2f}" + (f" ({p[3]})" if p else "")),
            ("GFLOPs with attention", lambda f, p: f"{f['gflops_with_attention']:.2f}"),
            ("forward of 1 image, ms", lambda f, p: f"{f['latency_ms']:.2f}" + (f" ({p[4]})" if p else "")),
            ("images/s", lambda f, p: f"{f['images_per_s']:.1f}" + (f" ({p[2] * PAPER_BATCH / PAPER_GPUS:.0f} per GPU)" if p else "")),
            ("step, ms: min median max", lambda f, p: " ".join(f"{g(f['step_ms']):.1f}" for g in (min, statistics.median, max))),
            ("it/s at batch 256", lambda f, p: f"{f['it_per_s_at_256']:.2f}{'' if f['it_per_s_measured'] else ' on 8 such, extrapolated'}" + (f" ({p[2]})" if p else "")),
            ("peak memory, GiB", lambda f, p: "not measured" if f["peak_memory_gib"] is None else f"{f['peak_memory_gib']:.2f}"),
            ("utilisation", lambda f, p: f"{100 * f['utilisation']:.1f} % of {f['product_tflops']:.3g} TFLOP/s"),
            ("disk / repeated batch", lambda f, p: f"{f['loader_ratio']:.3f}"),
            ("start-up, s", lambda f, p: f"{f['start_up_s']:.1f}")]
    print(f"{'':26}" + "".join(f"{name:>38}" for name in figures))
    for name, cell in rows:
        print(f"{name:26}" + "".join(f"{cell(f, PAPER.get((options.model, method))):>38}" for method, f in figures.items()))
    print(f"\nVAE-REPA's step costs {100 * figures['VAE-REPA']['cost_over_plain']:+.1f} % (paired median; paper: 8.1 -> 7.2 it/s, +12.5 %)")


KINDS = [("optimizer", "adam"), ("EMA", "lerp"), ("gradient clipping", "norm_|lpnorm|clip_|foreach_norm|foreach_mul"),
         ("attention", "attention|flash|fmha|sdpa"), ("matrix products", r"gemm|nvjet|cutlass|::mm|addmm|bmm|matmul|linear|mkldnn|convolution"),
         ("copies", "memcpy|copy_|memset|::to$"), ("random numbers", "randn|normal_|uniform_|distribution")]


def profile(options, device, rank, world_size):
    """Milliseconds per step of VAE-REPA, by kind of kernel (of operator, on a CPU)."""
    depth = ALIGN_DEPTHS[options.model.split("-")[1].split("/")[0]]
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder))
        state = Run(depth, options, folder, device, rank, world_size)
        wall = state.seconds(options.steps) / options.steps
        started = time.perf_counter()
        for _ in range(options.steps):
            next(state.loader)
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
    depth = ALIGN_DEPTHS[options.model.split("-")[1].split("/")[0]]
    torch.cuda.set_per_process_memory_fraction(min(limit_gib * 2**30 / torch.cuda.get_device_properties(device).total_memory, 1.0))
    fits, too_large = 0, 4 * 256
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder))
        while too_large - fits > 4:
            options.micro_batch = (fits + too_large) // 8 * 4
            try:
                Run(depth, options, folder, device, 0, 1)
                fits = options.micro_batch
            except torch.OutOfMemoryError:
                too_large = options.micro_batch
            gc.collect()
            torch.cuda.empty_cache()
    return fits


def hardware(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def main():
    parser = Parser(__doc__)
    parser.add_argument("mode", choices=["train", "profile", "memory"], help="what to measure")
    parser.add_argument("--model", default="SiT-XL/2", choices=list(SiT_models), metavar="SiT-{XL,L,B,S,Ti}/{1,2,4,8}", help="size/patch size")
    parser.add_argument("--micro-batch", type=positive_int, default=PAPER_BATCH // PAPER_GPUS, help="images per step and device")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 on CUDA, else fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    parser.add_argument("--steps", type=positive_int, default=20 if torch.cuda.is_available() else 2, help="steps per turn")
    parser.add_argument("--repeats", type=positive_int, default=5, help="turns of each method")
    parser.add_argument("--num-workers", type=natural, default=4, help="processes that read latents")
    parser.add_argument("--json", help="file to write (default: runs/benchmark-MODE.json)")
    options = parser.parse_args()
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    options.compile = options.device == "cuda" if options.compile is None else options.compile
    if options.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no CUDA device here")
    if options.mode == "memory" and options.device != "cuda":
        fail("the mode memory asks a GPU how much it holds, and there is none here")
    rank, world_size, device = init_distributed()
    if options.device == "cpu":
        device = torch.device("cpu")
    if options.mode == "memory":  # 1 GiB less than the label: the driver and the display take some
        figures = {f"{gb} GB": largest_micro_batch(options, device, gb - 1) for gb in (24, 80)}
    else:
        figures = (measure if options.mode == "train" else profile)(options, device, rank, world_size)
    if rank == 0:
        if options.mode == "train":
            print_table(figures, options, world_size)
        elif options.mode == "memory":
            print(f"{options.model} + VAE-REPA, largest --micro-batch: {figures}")
        else:
            for kind, ms in figures["ms_per_step"].items():
                print(f"{kind:28}{ms:10.2f} ms {100 * ms / figures['wall_ms_per_step']:6.1f} %")
            print(f"{'a step':28}{figures['wall_ms_per_step']:10.2f} ms; the loader alone {figures['loader_alone_ms_per_step']:.2f} ms")
        out = Path(options.json or f"runs/benchmark-{options.mode}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        made_with = {"hardware": hardware(options.device), "processes": world_size, "torch": torch.__version__,
                     "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), **vars(options)}
        write_json(out, {"made_with": made_with, **figures})
        print(out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
