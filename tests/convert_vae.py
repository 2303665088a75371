"""A VAE of the LDM format as a folder of diffusers, for extract_latents.py --vae:

    python tests/convert_vae.py vavae-imagenet256-f16d32-dinov2.pt --stats latents_stats.pt --out data/vaes/va

takes LightningDiT's VA-VAE; REPA-E's VAEs, before and after tuning; the VAE within a checkpoint of REPA-E's
training; and what else CompVis' latent-diffusion and its heirs write. The architecture is read off the
weights. config.json gets the mean and standard deviation of the latents by channel, from

    --stats FILE     LightningDiT's latents_stats.pt, or REPA-E's *-latents-stats.pt
    --images FOLDER  or measured, on images in a folder for each class
    neither          the norm that a checkpoint of REPA-E's training holds
"""

import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extract_latents import (  # noqa: E402  (found only now)
    Parser,
    encode,
    fail,
    first_line,
    init_distributed,
    list_images,
    load_batch,
    load_tensors,
    positive_int,
    run,
)
from sample import bn_statistics, save_vae  # noqa: E402

# LDM's names of layers, and diffusers'
NAMES = {
    r"(encoder|decoder)\.(down|up)\.(\d+)\.block\.": r"\1.\2_blocks.\3.resnets.",
    r"(encoder|decoder)\.(down|up)\.(\d+)\.attn\.": r"\1.\2_blocks.\3.attentions.",
    r"(encoder|decoder)\.(down|up)\.(\d+)\.(down|up)sample\.": r"\1.\2_blocks.\3.\4samplers.0.",
    r"\.mid\.attn_1\.": ".mid_block.attentions.0.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.norm_out\.": ".conv_norm_out.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
    r"(attentions\.\d+)\.norm\.": r"\1.group_norm.",
    r"(attentions\.\d+)\.([qkv])\.": r"\1.to_\2.",
    r"(attentions\.\d+)\.proj_out\.": r"\1.to_out.0.",
}
PARTS = r"(encoder|decoder|quant_conv|post_quant_conv)\."


def read_checkpoint(path):
    """Of a file: the VAE's weights by LDM's names, and the weights of a SiT that was trained along, or {}."""
    checkpoint = load_tensors(path)
    weights = checkpoint.get("vae", checkpoint.get("state_dict", checkpoint))
    weights = {name.removeprefix("first_stage_model."): x for name, x in weights.items()}
    weights = {name: x for name, x in weights.items() if re.match(PARTS, name)}  # the rest only trained it
    if "encoder.conv_in.weight" not in weights or "decoder.conv_in.weight" not in weights:
        raise ValueError("it has no encoder.conv_in and decoder.conv_in, so it is no VAE of the LDM format")
    return weights, checkpoint.get("ema") or {}


def count(pattern, weights):
    """How many numbers stand in the place of (\\d+) of a pattern."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


def build(weights):
    """diffusers' AutoencoderKL of LDM's weights {name: tensor}."""
    from diffusers import AutoencoderKL  # slow to import

    levels = count(r"encoder\.down\.(\d+)\.", weights)
    kinds = {}
    for part, way, order in (("encoder", "down", range(levels)), ("decoder", "up", reversed(range(levels)))):
        attends = [count(rf"{part}\.{way}\.{i}\.attn\.(\d+)\.", weights) for i in order]
        way = f"{way.title()}{part.title()}Block2D"
        kinds[part] = tuple(f"Attn{way}" if attentions else way for attentions in attends)
    vae = AutoencoderKL(
        weights["encoder.conv_in.weight"].shape[1], weights["decoder.conv_out.weight"].shape[0],
        kinds["encoder"], kinds["decoder"],
        tuple(len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)),
        layers_per_block=count(r"encoder\.down\.0\.block\.(\d+)\.", weights),
        latent_channels=weights["decoder.conv_in.weight"].shape[1],
        use_quant_conv="quant_conv.weight" in weights,
        use_post_quant_conv="post_quant_conv.weight" in weights)
    renamed = {}
    for name, x in weights.items():
        if up := re.match(r"decoder\.up\.(\d+)", name):  # counted from the image there, from the latent here
            name = f"decoder.up.{levels - 1 - int(up[1])}{name[up.end():]}"
        for pattern, new in NAMES.items():
            name = re.sub(pattern, new, name)
        if re.search(r"to_(q|k|v|out\.0)\.weight", name):  # 1x1 convolutions there, linear layers here
            x = x.flatten(1)
        renamed[name] = x
    vae.load_state_dict(renamed)
    if (ends := (vae.config.in_channels, vae.config.out_channels)) != (3, 3):
        raise ValueError(f"it encodes images of {ends[0]} and decodes to {ends[1]} channels, not 3")
    if bad := [name for name, x in vae.named_parameters() if not x.isfinite().all()]:
        raise ValueError(f"{bad[0]} is not finite")
    return vae.eval()


def read_statistics(path):
    """(mean, std) of latents by LightningDiT's or REPA-E's file."""
    stats = load_tensors(path)
    if "latents_scale" in stats:
        return stats["latents_bias"], 1 / stats["latents_scale"]
    return stats["mean"], stats["std"]


def measure_statistics(vae, args):
    """(mean, std) of the latents of --count images, as of draws from their posteriors: tensors (C,)."""
    _, files, _ = list_images(args.images)
    chosen = np.random.default_rng(0).permutation(len(files))[: args.count]
    _, _, device = init_distributed()
    vae, parts = vae.to(device), []
    for rows in tqdm(np.split(chosen, range(16, len(chosen), 16)), "encoding", unit="batch"):
        images, errors = load_batch([files[row] for row in rows], args.image_size)
        if errors:
            fail(f"not an image that can be read: {errors[0]}")
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
        mean, std = encode(vae, pixels).cpu().double().chunk(2, dim=1)
        parts.append(torch.stack([mean, mean.square() + std.square()]).mean(dim=(3, 4)))  # (2, b, C)
    mean, square = torch.cat(parts, dim=1).mean(dim=1)
    vae.cpu()
    return mean, (square - mean.square()).sqrt()


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="FILE", help="of LightningDiT, REPA-E or latent-diffusion")
    add("--out", required=True, metavar="FOLDER", help="to make")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--stats", metavar="FILE", help="statistics of its latents")
    either("--images", metavar="FOLDER", help="or images to measure them on")
    add("--count", type=positive_int, default=10_000, help="of --images to take")
    add("--image-size", type=positive_int, default=256, help="to which they are cropped")
    return parser.parse_args()


def main():
    args = parse_args()
    if "RANK" in os.environ:
        fail("start this with python, not torchrun")
    if os.path.lexists(args.out):
        fail(f"--out {args.out} exists; remove it, or give another")
    try:
        weights, sit = read_checkpoint(args.checkpoint)
        vae = build(weights)
    except KeyError as error:
        fail(f"{args.checkpoint} cannot be converted: it has no {error.args[0]}")
    except Exception as error:  # of many kinds
        fail(f"{args.checkpoint} cannot be converted: {first_line(error)}")
    source = args.stats or args.images or args.checkpoint
    if not (args.stats or args.images or "bn.running_mean" in sit):
        fail(f"{args.checkpoint} holds no statistics of its latents; give --stats or --images")
    try:
        if args.stats:
            statistics = read_statistics(source)
        else:
            statistics = measure_statistics(vae, args) if args.images else bn_statistics(sit)
        mean, std = (torch.as_tensor(values).double().flatten() for values in statistics)
        channels = vae.config.latent_channels
        if not len(mean) == len(std) == channels or not (mean + std).isfinite().all() or not std.min() > 0:
            raise ValueError(f"not {channels} finite means and standard deviations above 0, one a channel")
    except Exception as error:
        fail(f"{source} gives no statistics of its latents: {first_line(error)}")
    partial = Path(f"{args.out}.partial")
    save_vae(partial, vae, mean.tolist(), std.tolist())
    partial.rename(args.out)
    side = 2 ** (len(vae.config.block_out_channels) - 1)
    millions = sum(p.numel() for p in vae.parameters()) / 1e6
    print(f"{args.out}: {millions:.1f} M weights, {channels} channels for {side} x {side} pixels")


if __name__ == "__main__":
    run(main)
