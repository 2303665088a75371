"""Draw images from a checkpoint of train.py, or from one that SiT, REPA, SRA or REPA-E published.

    python sample.py --ckpt RUN --classes 207 360 388 --cfg-scale 4              # a grid to look at
    torchrun --nproc_per_node=8 sample.py --ckpt RUN --num-samples 50000         # an .npz for fid.py

t = 1 is noise, t = 0 is data, and sampling runs from 1 to 0. Image i depends on (--seed, i) alone, not on the
batch size or the number of processes (to rounding). If interrupted, run the same command again.
"""

import argparse
import math
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from extract_latents import (
    Parser,
    Progress,
    ResumableArrays,
    agree,
    already_complete,
    atomic_write,
    content_id,
    decode,
    fail,
    first_line,
    fraction,
    init_distributed,
    load_tensors,
    load_vae,
    named_by_flags,
    nonnegative_int,
    positive_int,
    remove_marks,
    run,
    write_json,
)
from models import SIZES, TimestepEmbedder, build_model

# ---- Samplers


def guided_velocity(model, x, t, y, cfg_scale, guidance_interval):
    """v at (x, t); where t is in the interval guided by the null class's, v_null + cfg_scale (v - v_null)."""
    times = x.new_full((len(x),), t)
    low, high = guidance_interval
    if cfg_scale == 1 or not low <= t <= high:  # outside the interval v_null is not computed
        return model(x, times, y).to(x.dtype)
    null = torch.full_like(y, model.null_class)
    v, v_null = model(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, null])).to(x.dtype).chunk(2)
    return v_null + cfg_scale * (v - v_null)


@torch.no_grad()
def sample_sde(model, noise, y, num_steps=250, cfg_scale=1.0, guidance_interval=(0.0, 1.0), generators=None):
    """Euler-Maruyama for dx = (v - w_t s / 2) dt + sqrt(w_t) dW, w_t = 2t, as in REPA (section 4.1, Eq. 6).

    noise: (B, C, H, W); y: labels (B,); generators: one torch.Generator an image, or None for torch's own.
    Returns latents (B, C, H, W). Times: num_steps from 1 to 0.04, then one step to 0 without noise.
    """
    x = noise
    for t, t_next in pairwise([*torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]):
        dt, w = t_next - t, 2 * t
        v = guided_velocity(model, x, t, y, cfg_scale, guidance_interval)
        score = -(x + (1 - t) * v) / t
        x = x + (v - w / 2 * score) * dt
        if t_next > 0:
            x = x + math.sqrt(w * -dt) * randn_like(x, generators)
    return x


@torch.no_grad()
def sample_ode(model, noise, y, num_steps=250, cfg_scale=1.0, guidance_interval=(0.0, 1.0)):
    """Euler's method for dx = v dt: num_steps equal steps from 1 to 0. Arguments as of `sample_sde`."""
    x = noise
    for t, t_next in pairwise(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()):
        x = x + guided_velocity(model, x, t, y, cfg_scale, guidance_interval) * (t_next - t)
    return x


def rng(seed, index, device):
    """A torch.Generator of its own for each (seed, index)."""
    base = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]  # far from the next seed's
    return torch.Generator(device).manual_seed((int(base) + index) % 2**63)


def randn_like(x, generators):
    if generators is None:
        return torch.randn_like(x)
    new = torch.empty_like(x, memory_format=torch.contiguous_format)  # else its order decides
    for image, generator in zip(new, generators):
        image.normal_(generator=generator)
    return new


# ---- Images


def sample_images(model, vae, facts, rows, y, seed, precision, mode="sde", **options):
    """Images `rows` of a seed, of classes y, as uint8 (B, S, S, 3) on the model's device.

    facts: a checkpoint's settings["data"]; options: of `sample_sde` or `sample_ode`.
    """
    device = next(model.parameters()).device
    generators = [rng(seed, i, device) for i in rows]
    noise = randn_like(torch.empty(len(rows), *facts["latent_shape"], device=device), generators)
    y = torch.as_tensor(y, device=device)
    sampler = {"sde": partial(sample_sde, generators=generators), "ode": sample_ode}[mode]
    with autocast(device, precision):  # x stays float32
        x = sampler(model, noise, y, **options)
    return decode(vae, x, facts["shift"], facts["scale"], rows)


def autocast(device, precision):
    """Matrix products in bf16, if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def save_grid(images, columns, path):
    """Write images (N, S, S, 3) row by row into one PNG."""
    black = np.zeros((-len(images) % columns, *images.shape[1:]), np.uint8)  # fill the last row
    rows = np.concatenate([images, black]).reshape(-1, columns, *images.shape[1:])
    with atomic_write(path) as file:
        Image.fromarray(np.concatenate(np.concatenate(rows, axis=1), axis=1)).save(file, "PNG")


def spread_classes(num_classes, most):
    """A list of up to `most` classes, evenly spaced."""
    return np.linspace(0, num_classes - 1, min(num_classes, most)).astype(int).tolist()


def draw_grid(path, model, vae, facts, seed, precision, cfg_scale):
    """Write rows of 4 images of up to 10 classes, always from the same noise; facts: of the latents."""
    y = np.repeat(spread_classes(facts["num_classes"], 10), 4)
    images = sample_images(model, vae, facts_of(facts, model.state_dict()), range(len(y)), y, seed, precision,
                           mode="ode", num_steps=50, cfg_scale=cfg_scale)
    save_grid(images.cpu().numpy(), 4, path)


def to_bf16(model):
    """Keep in bf16 the layers' weights, which autocast rounds in every call: half the memory."""
    for layer in nn.ModuleList([*model.blocks, model.final_layer]).modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.bfloat16()


# ---- Checkpoints

# weights that only training needs: our heads, REPA's, SRA's, and REPA-E's norm
TRAINING_ONLY = ("heads.", "projectors.", "ap_head.", "bn.")


def load_decoder(facts, device):
    """The VAE of facts on latents, and the side of the images that it makes of such latents."""
    try:
        vae = load_vae(facts["vae"], facts.get("vae_content")).to(device)
        x = torch.zeros(1, facts["latent_shape"][0], 4, 4, device=device)
        return vae, decode(vae, x, facts["shift"], facts["scale"]).shape[1] // 4 * facts["latent_shape"][1]
    except Exception as error:  # hub, config, weights, sizes
        fail(f"the VAE {facts['vae']} cannot decode latents of {facts['latent_shape']}: {first_line(error)}")


def newest(path):
    """A checkpoint as it is given; of a run's folder, the newest numbered one."""
    steps = [file for file in Path(path).glob("checkpoints/*.pt") if file.stem.isdecimal()]
    if Path(path).is_dir() and not steps:
        fail(f"{path} has no checkpoints/STEP.pt yet; give a file, such as its state.pt")
    return str(max(steps, key=lambda file: int(file.stem), default=path))


def ema_weights(checkpoint):
    """A checkpoint's EMA weights by name: train.py's, or those of a published file, if need be as ours."""
    weights = {**checkpoint.get("ema", checkpoint)}
    if "settings" in checkpoint:
        return weights
    if "x_embedder.proj.weight" not in weights:
        raise ValueError("it has no x_embedder.proj.weight, as SiT has")
    _, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    if len(weights["final_layer.linear.bias"]) == 2 * channels * patch**2:
        # SiT's: half of its output is not used, and t = 1 is data there, so that the other is -v at 1 - t
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            weights[name] = -weights[name].unflatten(0, (-1, 2, channels))[:, 0].flatten(0, 1)
        omega = TimestepEmbedder.frequencies()
        cos, sin = weights["t_embedder.mlp.0.weight"].float().chunk(2, dim=1)  # times those of omega (1 - t)
        weights["t_embedder.mlp.0.weight"] = torch.cat(
            [cos * omega.cos() + sin * omega.sin(), cos * omega.sin() - sin * omega.cos()], dim=1)
    return weights


def load_model(path):
    """(model with the EMA weights, without heads, in eval mode; the settings it was trained with)."""
    path = newest(path)
    try:
        checkpoint = load_tensors(path)
        weights = ema_weights(checkpoint)
        settings = checkpoint["settings"] if "settings" in checkpoint else published_settings(weights)
        model = build_model(settings, heads=False)
        own = {name: x for name, x in weights.items() if not name.startswith(TRAINING_ONLY)}
        model.load_state_dict(own, assign=True)
        facts = facts_of(settings["data"], weights)
        if settings.get("tune_vae"):
            facts |= {"vae": vae_folder(path), "vae_content": None}
        _, *sides = facts["latent_shape"]
        if sides != [model.input_size] * 2 or type(facts["vae"]) is not str:
            raise ValueError(f"its latents are no square, or its VAE no name: {sides}, {facts['vae']}")
        if type(checkpoint.get("step", 0)) is not int or any(x.layout != torch.strided for x in own.values()):
            raise ValueError("its step is no integer, or a weight is sparse")
    except Exception as error:  # of many kinds
        fail(f"{path} is no checkpoint of train.py, SiT, REPA, SRA or REPA-E: {first_line(error)}")
    return model.float().eval(), {**settings, "data": facts, "step": checkpoint.get("step")}


def facts_of(data, weights):
    """A copy of the facts on latents, with REPA-E's shift and scale if SiT's weights hold its norm, `bn`."""
    if "bn.running_mean" not in weights:
        return {**data}
    mean, std = bn_statistics(weights)
    return {**data, "shift": mean, "scale": [1 / value for value in std]}


def bn_statistics(weights):
    """(mean, std) of latents by REPA-E's norm, lists of a value per channel."""
    return weights["bn.running_mean"].tolist(), weights["bn.running_var"].cpu().sqrt().tolist()


def vae_folder(path):
    """Where the VAE lies that was tuned along with checkpoint `path`, in diffusers' format."""
    return f"{Path(path).resolve().with_suffix('')}-vae"


def save_vae(folder, vae, mean, std):
    """Write a VAE in diffusers' format, with its latents' mean and standard deviation by channel."""
    from safetensors.torch import save  # a part of diffusers

    vae.register_to_config(latents_mean=mean, latents_std=std, shift_factor=None, scaling_factor=1.0)
    with atomic_write(Path(folder, "diffusion_pytorch_model.safetensors")) as file:
        file.write(save(vae.state_dict(), {"format": "pt"}))
    with atomic_write(Path(folder, "config.json")) as file:
        file.write(vae.to_json_string().encode())


def published_settings(weights):
    """Settings of SiT's, REPA's, SRA's and REPA-E's files, by their weights; VAE and scale are theirs."""
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    size = {(d, w): size for size, (d, w, _) in SIZES.items()}[depth, width]
    side = math.isqrt(weights["pos_embed"].shape[1]) * patch
    num_classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    vae = "REPA-E/e2e-sdvae-hf" if "bn.running_mean" in weights else "stabilityai/sd-vae-ft-ema"
    facts = {"vae": vae, "shift": 0.0, "scale": 0.18215, "num_classes": num_classes}
    return {"model": f"{size}/{patch}", "data": {**facts, "latent_shape": [channels, side, side]}}


# ---- The command


def class_number(word, facts):
    """The class that a word of --classes means: a name, where classes have names, or else a number."""
    n, names = facts["num_classes"], facts.get("class_names", [])
    if word in names:
        return names.index(word)
    if word not in map(str, range(n)):
        named = f", named {', '.join(names[:20])}{', …' * (n > 20)}" if names else ""
        fail(f"--classes {word}: this checkpoint has 0 to {n - 1}{named}")
    return int(word)


def class_of(i, num_classes, args):
    """The class of image i."""
    if not args.num_samples:
        return args.classes[i // args.per_class]
    if args.class_balanced:
        return i % num_classes
    return int(np.random.default_rng([args.seed, i]).integers(num_classes))


def parse_args():
    cuda = torch.cuda.is_available()
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to draw").add_argument
    add("--ckpt", required=True, metavar="FILE", type=newest,
        help="checkpoint, whose EMA weights are used, or a run's folder: its newest one")
    add("--classes", nargs="+", help="numbers or folders' names (default: up to 10, evenly spaced)")
    add("--per-class", type=positive_int, default=8, help="images of each")
    add("--num-samples", type=positive_int, help="or this many images of random classes")
    add("--class-balanced", action="store_true", help="of --num-samples: every class equally often")
    add("--seed", type=nonnegative_int, default=0, help="of the noise and the random classes")
    add("--vae", help="another autoencoder to decode with (default: the checkpoint's)")
    add("--out", help="FILE.png, a grid, or FILE.npz, for fid.py (default: beside the checkpoint, named by "
                      "its step and the flags)")
    add = parser.add_argument_group("sampler").add_argument
    add("--mode", choices=["sde", "ode"], default="sde", help="which equation to solve, by Euler's method")
    add("--num-steps", type=positive_int, default=250, help="sampler steps")
    add("--cfg-scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    add("--guidance-interval", type=fraction, nargs=2, default=[0, 1], metavar=("LO", "HI"),
        help="guide where LO <= t <= HI")
    add = parser.add_argument_group("computing").add_argument
    add("--batch-size", type=positive_int, default=64, help="images per forward on one device")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32",
        help="of matrix products (default: bf16 on a GPU, else fp32)")
    add("--compile", action=argparse.BooleanOptionalAction, default=cuda,
        help="torch.compile, with --num-samples; on a GPU it is on")
    args = parser.parse_args()
    if args.num_samples and args.classes or args.class_balanced and not args.num_samples:
        fail("--classes cannot be given with --num-samples, nor --class-balanced without it")
    if not 1 <= args.cfg_scale < math.inf:
        fail(f"--cfg-scale {args.cfg_scale} must be finite and at least 1, which is none")
    if args.out and not args.out.endswith((".png", ".npz")):
        fail(f"--out {args.out} must end in .png, for a grid, or in .npz")
    if args.guidance_interval[0] > args.guidance_interval[1]:
        fail(f"--guidance-interval {args.guidance_interval} must have LO <= HI")
    if not args.out:
        name = named_by_flags(Path(args.ckpt).stem, args, parser, ("ckpt", "batch_size", "compile"))
        args.out = str(Path(args.ckpt).with_name(f"{name}.{'npz' if args.num_samples else 'png'}"))
    return args


def main():
    args = parse_args()
    model, trained = load_model(args.ckpt)
    facts = trained["data"]
    n = facts["num_classes"]
    if args.cfg_scale > 1 and trained.get("label_dropout") == 0:
        fail("trained with --label-dropout 0, this checkpoint has no null class for --cfg-scale")
    if not args.num_samples:
        args.classes = [class_number(word, facts) for word in args.classes or ()] or spread_classes(n, 10)
    count = args.num_samples or len(args.classes) * args.per_class
    if args.vae:
        facts |= {"vae": args.vae, "vae_content": None}  # it may be any other
    args.vae = facts["vae"]
    out, record = Path(args.out), Path(f"{args.out}.json")
    settings = {**vars(args), "ckpt": str(Path(args.ckpt).resolve()), "step": trained["step"],
                "ckpt_content": content_id(args.ckpt), "vae_content": content_id(args.vae)}
    for key in ("out", "batch_size", "compile"):  # they change no image
        del settings[key]
    rank, world_size, device = init_distributed("gloo", timedelta(days=2))
    agree({**settings, f"whether {out} exists": out.exists()})
    if already_complete(out, record, settings):
        return

    vae, side = load_decoder(facts, device)
    model = model.to(device)
    shapes = {"images": ((count, side, side, 3), "uint8")}
    arrays = ResumableArrays(out, settings, count, shapes, rank, world_size)
    if args.precision == "bf16":
        to_bf16(model)
    if args.compile and args.num_samples:
        for layer in (*model.blocks, model.final_layer):
            layer.compile(dynamic=False)
    options = {name: getattr(args, name) for name in ("mode", "num_steps", "cfg_scale", "guidance_interval")}
    batches = arrays.batches(args.batch_size)
    for rows in Progress(batches, "sampling", unit="batch"):
        y = [class_of(i, n, args) for i in rows]
        images = sample_images(model, vae, facts, rows, y, args.seed, args.precision, **options)
        arrays.write(rows, images=images.cpu())

    arrays.finish()
    if rank == 0:
        write_json(record, settings)  # first, so that a file at `out` always has its record
        images = arrays.load("images")
        if out.name.endswith(".npz"):
            with atomic_write(out) as file:
                np.savez(file, arr_0=images)
        else:
            save_grid(images, args.per_class, out)
        remove_marks(out)
        names = facts.get("class_names")
        print(out, *(f"row {i}: class {c}{f' ({names[c]})' if names else ''}"
                     for i, c in enumerate(args.classes or (), start=1)), sep="\n")


if __name__ == "__main__":
    run(main)
