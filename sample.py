"""Draw images from a checkpoint of train.py, or from one that REPA or SRA published.

    python sample.py --ckpt runs/NAME/checkpoints/0400000.pt --classes 207 360 388 --cfg-scale 4         # a grid to look at
    torchrun --nproc_per_node=8 sample.py --ckpt … --num-samples 50000 --cfg-scale 1.8 --guidance-interval 0 0.7

Time: t = 1 is noise, t = 0 is data, and sampling runs from 1 to 0. Image i depends on (--seed, i) alone, not on the batch size
or the number of processes (to rounding). Killed, the same command continues.
"""

import argparse
import math
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from extract_latents import (BackgroundWriter, Parser, ResumableArray, barrier, check_same_settings, clean_up, decode, fail,
                             init_distributed, load_vae, natural, positive_int, read_json, reason, rename, run,
                             whole_file, write_json)
from models import SIZES, SiT_models


def guided_velocity(model, x, t, y, cfg_scale, guidance_interval):
    """v at (x, t), guided while t lies in the interval: v0 + cfg_scale (v - v0), where v0 is the null class's velocity."""
    times = x.new_full((len(x),), t)
    low, high = guidance_interval
    if cfg_scale == 1 or not low <= t <= high:  # outside the interval the unconditional half is not computed
        return model(x, times, y).to(x.dtype)
    null = torch.full_like(y, model.num_classes)
    v, v_null = model(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, null])).to(x.dtype).chunk(2)
    return v_null + cfg_scale * (v - v_null)


@torch.no_grad()
def sample_sde(model, z, y, num_steps=250, cfg_scale=1.0, guidance_interval=(0.0, 1.0), generators=None):
    """Euler-Maruyama for dx = (v - w_t s / 2) dt + sqrt(w_t) dW with w_t = 2t, as REPA samples (paper section 4.1, Eq. 6).

    z: noise (B, C, H, W); y: labels (B,); generators: one torch.Generator per image, or None for torch's global one.
    Returns latents (B, C, H, W). Times: num_steps from 1 to 0.04, and a last step from 0.04 to 0 without noise.
    """
    x = z
    for t, t_next in pairwise([*torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]):
        dt, w = t_next - t, 2 * t
        v = guided_velocity(model, x, t, y, cfg_scale, guidance_interval)
        score = -(x + (1 - t) * v) / t
        x = x + (v - w / 2 * score) * dt
        if t_next > 0:
            x = x + math.sqrt(w * -dt) * randn_like(x, generators)
    return x


@torch.no_grad()
def sample_ode(model, z, y, num_steps=250, cfg_scale=1.0, guidance_interval=(0.0, 1.0), heun=False):
    """Euler's method, or Heun's, for dx = v dt over num_steps equal steps from t = 1 to 0; arguments as in `sample_sde`."""
    x = z
    for t, t_next in pairwise(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()):
        dt = t_next - t
        v = guided_velocity(model, x, t, y, cfg_scale, guidance_interval)
        if heun:  # the second slope is at t_next, and so is the test of the guidance interval
            v = (v + guided_velocity(model, x + v * dt, t_next, y, cfg_scale, guidance_interval)) / 2
        x = x + v * dt
    return x


def stream(seed, index, device):
    """A generator that depends on (seed, index) alone; indices of one seed never share a stream."""
    base = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]  # hashed, so that neighbouring seeds lie far apart
    return torch.Generator(device).manual_seed((int(base) + index) % 2**63)


def randn_like(x, generators):
    if generators is None:
        return torch.randn_like(x)
    return torch.stack([torch.randn(x.shape[1:], generator=g, device=x.device, dtype=x.dtype) for g in generators])


def sample_images(model, vae, data, rows, y, seed, precision, mode="sde", **options):
    """Images `rows` of the stream `seed`, as uint8 (B, S, S, 3) on the model's device; data: the checkpoint's data settings."""
    device = next(model.parameters()).device
    generators = [stream(seed, i, device) for i in rows]
    z = randn_like(torch.empty(len(rows), *data["latent_shape"], device=device), generators)
    y = torch.as_tensor(y, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):  # the state x stays in float32
        if mode == "sde":
            x = sample_sde(model, z, y, generators=generators, **options)
        else:
            x = sample_ode(model, z, y, **options)
    return decode(vae, x, data["shift"], data["scale"])


def to_bf16(model):
    """Keep the weights that autocast would round in every call in bf16: the same results, in half the memory."""
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.bfloat16()


def save_grid(images, columns, path):
    """Write images (N, S, S, 3) row by row into one PNG."""
    size = images.shape[1]
    grid = Image.new("RGB", (columns * size, -(-len(images) // columns) * size))
    for i, image in enumerate(images):
        grid.paste(Image.fromarray(image), (i % columns * size, i // columns * size))
    with whole_file(path) as file:
        grid.save(file, "PNG")


HEADS = ("vae_repa_head.", "projectors.", "ap_head.")  # of VAE-REPA, REPA and SRA; not needed to sample


def build_model(settings, heads=False):
    """The SiT that a settings dict describes, with or without its alignment heads."""
    data = settings["data"]
    channels, size, _ = data["latent_shape"]
    names = ("vae_repa_depth", "vae_repa_layers", "repa_depth", "repa_dim", "sra_depth")
    options = {name: settings[name] for name in names if name in settings} if heads else {}
    return SiT_models[settings["model"]](input_size=size, in_channels=channels, num_classes=data["num_classes"], **options)


def load_checkpoint(path):
    """A checkpoint's contents on the CPU, read from disk as they are used; no code in the file is run."""
    if not Path(path).is_file():
        fail(f"there is no checkpoint {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA and SRA store one; ours hold plain dicts
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle and header errors have no common class
        fail(f"{path} cannot be read as a checkpoint ({reason(error)}): it may be cut off, or of torch's format before 1.6")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("ema", {}), dict):
        fail(f"{path} does not hold a checkpoint")
    return checkpoint


def load_weights(path):
    """(EMA weights without alignment heads, named as in models.py; the settings that they were trained with)."""
    checkpoint = load_checkpoint(path)
    weights = checkpoint.get("ema", checkpoint)
    try:
        if "settings" in checkpoint:
            settings = checkpoint["settings"]
            if not {"model", "data"} <= set(settings):
                raise ValueError("its settings are not those of train.py")
        else:
            settings = published_settings(weights)
            encoder_depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
            weights = {rename_published(key, encoder_depth): value for key, value in weights.items()}
        weights = {key: value for key, value in weights.items() if not key.startswith(HEADS)}
        return weights, {**settings, "step": checkpoint.get("step", checkpoint.get("steps"))}
    except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        fail(f"the weights in {path} do not fit a SiT of train.py, REPA or SRA ({type(error).__name__}: {reason(error)})")


def load_model(path, device="cpu"):
    """(model with the EMA weights and no alignment head, in eval mode; the settings it was trained with)."""
    weights, settings = load_weights(path)
    kind = "a SiT of train.py, REPA or SRA"
    try:
        kind = settings["model"]
        with torch.device("meta"):  # no time for an initialisation that the weights replace
            model = build_model(settings)
        kind += f" with {model.num_classes} classes"
        model.load_state_dict(weights, assign=True)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f"the weights in {path} do not fit {kind} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
    return model.float().to(device).eval(), settings


def published_settings(weights):
    """Settings of REPA's and SRA's files, read off the shapes of their weights; SD-VAE's latents, decoded as they do it."""
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = len({key.rsplit(".attn", 1)[0] for key in weights if key.endswith("attn.qkv.weight")})
    size = next(size for size, (d, w, _) in SIZES.items() if (d, w) == (depth, width))
    side = math.isqrt(weights["pos_embed"].shape[1]) * patch
    num_classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    data = {"vae": "stabilityai/sd-vae-ft-ema", "shift": 0.0, "scale": 0.18215, "latent_shape": [channels, side, side],
            "num_classes": num_classes}
    return {"model": f"SiT-{size}/{patch}", "data": data}


def rename_published(key, encoder_depth):
    """REPA's oldest files count the blocks after the projector anew: decoder_blocks.0 follows the last of blocks."""
    if not key.startswith("decoder_blocks."):
        return key
    _, index, rest = key.split(".", 2)
    return f"blocks.{int(index) + encoder_depth}.{rest}"


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint file; its EMA weights are used")
    add("--classes", type=int, nargs="+", help="draw these classes (default: up to 10, evenly spaced)")
    add("--per-class", type=positive_int, default=8, help="images of each of --classes")
    add("--num-samples", type=positive_int, help="draw this many images of random classes instead")
    add("--class-balanced", action="store_true", help="every class equally often in --num-samples, which lowers FID a little")
    add("--out", help="FILE.png: a grid; FILE.npz: arr_0, uint8 NHWC, for ADM's evaluator; else a folder of PNGs (default: in "
                      "the run's samples/, a grid, or an npz for --num-samples)")
    add("--mode", choices=["sde", "ode"], default="sde", help="Euler-Maruyama, or the probability-flow ODE")
    add("--heun", action="store_true", help="Heun's method instead of Euler's, for --mode ode")
    add("--num-steps", type=positive_int, default=250, help="sampler steps")
    add("--cfg-scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    add("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LO", "HI"), help="guide where LO <= t <= HI")
    add("--seed", type=natural, default=0, help="of the noise and the random classes")
    add("--batch-size", type=positive_int, default=64, help="images per forward on one device")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if torch.cuda.is_available() else "fp32",
        help="of the model's matrix products")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks (default: on CUDA, for --num-samples)")
    add("--vae", help="another autoencoder to decode with (default: the one in the checkpoint)")
    args = parser.parse_args()
    args.compile = torch.cuda.is_available() and bool(args.num_samples) if args.compile is None else args.compile
    low, high = args.guidance_interval
    if args.classes and args.num_samples:
        fail("--classes and --num-samples exclude each other; give one")
    if args.class_balanced and not args.num_samples:
        fail("--class-balanced needs --num-samples")
    if not 1 <= args.cfg_scale < math.inf:
        fail(f"--cfg-scale {args.cfg_scale} is not a number from 1 up; 1 is no guidance, and papers use 1.5 to 4")
    if not 0 <= low <= high <= 1:
        fail(f"--guidance-interval {low} {high} is not within [0, 1] in rising order")
    if args.heun and args.mode != "ode":
        fail("--heun needs --mode ode")
    return args


def default_out(args):
    folder = Path(args.ckpt).resolve().parent
    folder = (folder.parent if folder.name == "checkpoints" else folder) / "samples"
    low, high = args.guidance_interval
    guidance = f"-cfg{args.cfg_scale:g}-{low:g}-{high:g}" if args.cfg_scale > 1 else ""
    what = f"{args.num_samples}.npz" if args.num_samples else "grid.png"
    sampler = f"{args.mode}{'-heun' if args.heun else ''}{args.num_steps}"
    return folder / f"{Path(args.ckpt).stem}-{sampler}{guidance}-seed{args.seed}-{what}"


def main():
    args = parse_args()
    model, trained = load_model(args.ckpt)
    data = trained["data"]
    num_classes = data["num_classes"]
    wrong = [c for c in args.classes or [] if not 0 <= c < num_classes]
    if wrong:
        fail(f"--classes {' '.join(map(str, wrong))}: this checkpoint knows the classes 0 to {num_classes - 1}")
    if args.num_samples:
        y = [i % num_classes if args.class_balanced else int(np.random.default_rng([args.seed, i]).integers(num_classes))
             for i in range(args.num_samples)]
    else:
        classes = args.classes or np.linspace(0, num_classes - 1, min(num_classes, 10)).astype(int).tolist()
        y = [c for c in classes for _ in range(args.per_class)]

    options = {"mode": args.mode, "num_steps": args.num_steps, "cfg_scale": args.cfg_scale,
               "guidance_interval": list(args.guidance_interval), **({"heun": args.heun} if args.mode == "ode" else {})}
    vae_name = args.vae or data["vae"]
    settings = {"ckpt": str(Path(args.ckpt).resolve()), "step": trained["step"], "vae": vae_name, "seed": args.seed,
                "count": len(y), "precision": args.precision, **options}
    if args.num_samples:
        settings["labels"] = "class-balanced" if args.class_balanced else "random"
    else:
        settings |= {"labels": y, "per_class": args.per_class}  # per_class: the columns of a grid
    out = Path(args.out) if args.out else default_out(args)
    record = Path(f"{out}.json")
    if out.exists():
        if not record.exists():
            fail(f"{out} exists, and nothing says how it was made; give another --out, or remove it")
        check_same_settings(out, read_json(record), settings)
        clean_up(out)  # of a command killed as it was doing so
        print(f"{out} is complete already")
        return

    vae = load_vae(vae_name)
    rank, world_size, device = init_distributed("gloo", timedelta(days=2))  # the processes only meet at the end
    model, vae = model.to(device), vae.to(device)
    try:
        side = decode(vae, torch.zeros(1, *data["latent_shape"], device=device), data["shift"], data["scale"]).shape[1]
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        fail(f"the VAE {vae_name!r} cannot decode latents of {data['latent_shape']}: {reason(error)}")
    images = ResumableArray(out, (len(y), side, side, 3), "uint8", settings, rank)
    if args.precision == "bf16":
        to_bf16(model)
    if args.compile:
        for block in model.blocks:  # for the two sizes of batch there are, with and without the null class
            block.compile(dynamic=False)
    batches = images.batches(args.batch_size, rank, world_size)
    with BackgroundWriter() as writer:
        for rows in tqdm(batches, desc=f"sampling, {world_size} process(es)", unit="batch", disable=rank > 0):
            drawn = list(rows)
            if args.compile:  # the short batch at the end is filled up, or it would be compiled for anew
                drawn += [rows[0]] * (min(args.batch_size, len(y)) - len(rows))
            drawn = sample_images(model, vae, data, drawn, [y[i] for i in drawn], args.seed, args.precision, **options)
            writer.put(images.write, rows, drawn[: len(rows)])

    barrier()
    if rank == 0:
        write_json(record, settings)  # first, so that a file at `out` always has its record
        write_images(np.load(images.partial, mmap_mode="r"), out, args.per_class)
        clean_up(out)
        print(out)
    if dist.is_initialized():
        dist.destroy_process_group()


def write_images(images, out, per_class):
    """Write uint8 images (N, S, S, 3) as what the name of `out` asks for, under a temporary name first."""
    if out.suffix == ".npz":
        with whole_file(out) as file:
            np.savez(file, arr_0=images)
    elif out.suffix == ".png":
        save_grid(images, per_class, out)
    else:
        temporary = Path(f"{out}.tmp")
        temporary.mkdir(exist_ok=True)
        names = [temporary / f"{i:06d}.png" for i in range(len(images))]
        with ThreadPoolExecutor(8) as threads:  # compressing leaves Python free
            list(tqdm(threads.map(save_png, images, names), desc="writing PNGs", total=len(images)))
        os.sync()
        rename(temporary, out)


def save_png(image, path):
    Image.fromarray(image).save(path)


if __name__ == "__main__":
    run(main)
