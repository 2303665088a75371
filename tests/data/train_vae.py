"""Train the demo's VAE again, on the shapes of draw_images.py; or one like it on your own images, for where
there is no network: 3x64x64 pixels to 4x8x8 latents.

    python tests/data/train_vae.py --out tests/data/vae
    python tests/data/train_vae.py --out data/my-vae --images-from my-images --steps 2000

It trains on drawn images of seed 1 and reports on those of seed 0, which the demo draws; of your
own images every tenth is left out to report on. It is a diffusers AutoencoderKL without attention, so
any size divisible by 8 goes through.
The loss is that of a VAE whose decoder has Laplace noise of scale b (--kl-weight),

    |x - x_hat| + b * KL(q(z|x) || N(0, I)),    averaged over pixel values,

a KL far stronger than Stable Diffusion's 1e-6, which keeps the latents near a unit Gaussian and
the decoder calm under small errors in them, as a small latent diffusion model will make. About a
quarter of an hour on two cores; the weights in tests/data/vae reach 31.3 dB on the held-out images.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from draw_images import CLASSES, draw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from extract_latents import Parser, fail, list_images, load_batch, run  # noqa: E402  (found only now)

HELD_OUT_SEED, TRAIN_SEED = 0, 1  # 0 is the default of draw_images.py
SIZE = 64


def draw_set(seed, count):
    """`count` images, classes in turn: uint8 (count, 3, 64, 64)."""
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for k in tqdm(range(count), desc=f"drawing seed {seed}", unit="image"):
        i, c = divmod(k, len(CLASSES))
        images[k] = draw(CLASSES[c], np.random.default_rng([seed, c, i]), SIZE)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def read_set(root):
    """(images to train on, every tenth left out) of a folder of class folders, as `draw_set`."""
    images, errors = load_batch(tqdm(list_images(root)[1], desc=f"reading {root}", unit="image"), SIZE)
    if errors:
        fail(f"{len(errors)} file(s) are no images: {'; '.join(errors[:10])} (move them away)")
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    left_out = torch.arange(len(images)) % 10 == 0
    return images[~left_out], images[left_out]


def to_input(images):
    """uint8 (N, 3, H, W) to float32 in [-1, 1], channels last: faster convolutions on the CPU."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def build_vae():
    widths = (16, 32, 32, 48)  # three halvings; as wide as 1 MB of float16 allows
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,  # diffusers gives the decoder one more, where it is needed
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def vae_loss(vae, x, kl_weight):
    """L1 and KL, each averaged over the pixel values of x (N, 3, H, W), and their weighted sum."""
    q = vae.encode(x).latent_dist
    l1 = (vae.decode(q.sample()).sample - x).abs().mean()
    kl = q.kl().sum() / x.numel()  # nats per pixel value, the unit of the L1
    return l1 + kl_weight * kl, l1, kl


@torch.no_grad()
def measure(vae, images):
    """Std of sampled latents, mean posterior std, and L1 and PSNR (dB) of x in [-1, 1]."""
    latents, stds, l1, mse = [], [], [], []
    for batch in images.split(100):
        x = to_input(batch)
        q = vae.encode(x).latent_dist
        z = q.sample()
        error = vae.decode(z).sample.clamp(-1, 1) - x
        latents.append(z)
        stds.append(q.std)
        l1.append(error.abs().mean(dim=(1, 2, 3)))
        mse.append(error.square().mean(dim=(1, 2, 3)))
    psnr = 10 * torch.log10(4 / torch.cat(mse))  # the range is 2, its square 4
    return (torch.cat(latents).std().item(), torch.cat(stds).mean().item(),
            torch.cat(l1).mean().item(), psnr.mean().item())


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for config and weights")
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step")
    parser.add_argument("--images", type=int, default=20000, help="training images drawn up front")
    parser.add_argument("--images-from", type=Path, metavar="FOLDER", help="own images, a folder per class")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--kl-weight", type=float, default=0.02, help="b in the loss above")
    parser.add_argument("--seed", type=int, default=0, help="weights, batches and noise")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    if min(args.steps, args.batch_size, args.images, args.threads) < 1:
        fail("--steps, --batch-size, --images and --threads must be at least 1")
    if args.out.exists():
        fail(f"--out {args.out} exists; give another folder, or remove it")
    return args


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    if args.images_from:
        train, held_out = read_set(args.images_from)
    else:
        train, held_out = draw_set(TRAIN_SEED, args.images), draw_set(HELD_OUT_SEED, 1000)
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99))
    warmup = min(100, args.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)))

    bar = tqdm(range(args.steps), desc="training", unit="step")
    for step in bar:
        x = to_input(train[torch.randint(len(train), (args.batch_size,))])
        loss, l1, kl = vae_loss(vae, x, args.kl_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(l1=f"{l1.item():.4f}", kl=f"{kl.item():.4f}")

    vae.eval()
    latent_std = measure(vae, train[:2000])[0]
    vae.register_to_config(scaling_factor=round(1 / latent_std, 5))  # as in Stable Diffusion
    vae.half().save_pretrained(args.out)

    saved = AutoencoderKL.from_pretrained(args.out, torch_dtype=torch.float32)  # as it ships
    latent_std, posterior_std, l1, psnr = measure(saved, held_out)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"held-out images: PSNR {psnr:.2f} dB, L1 {l1:.4f} in [-1, 1]; "
          f"latent std {latent_std:.3f}, mean posterior std {posterior_std:.3f}; "
          f"{args.out} holds {size:,} bytes")


if __name__ == "__main__":
    run(main)
