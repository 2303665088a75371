"""Train the demo's feature detector again, a classifier of the shapes of draw_images.py, for fid.py.

    python tests/data/train_detector.py --out tests/data/detector.pt2
    python fid.py SAMPLES.npz --ref IMAGES --detector tests/data/detector.pt2 --image-size 64

It trains on images of seed 1 and reports on images of seed 0, those the demo draws, which it never saw. The
silhouette alone tells the class, so a second loss asks the same features for a 4x4 thumbnail of the image: a
Frechet distance on them then sees wrong colours and places too. The thumbnail's head does not ship.

Run it with torch 2.6: each version loads the files of earlier ones, not those of later ones.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from draw_images import CLASSES, draw
from torch import nn
from tqdm import tqdm

HELD_OUT_SEED, TRAIN_SEED = 0, 1  # 0 is the default of draw_images.py
SIZE = 64


class Detector(nn.Module):
    """uint8 (N, 3, H, W) -> features (N, 96), spatial (N, 112) from an earlier layer, and logits (N, 10)."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 48, 64, 96, 96)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=1 if a == b else 2, padding=1, bias=False)
                                   for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.classify = nn.Linear(widths[-1], len(CLASSES))

    def forward(self, images):
        x = images.float() / 127.5 - 1
        maps = []
        for conv, norm in zip(self.convs, self.norms):
            x = F.silu(norm(conv(x)))
            maps.append(x)
        features = x.mean((2, 3))  # (N, 96)
        spatial = F.adaptive_avg_pool2d(maps[2][:, :7], 4)  # 7 channels as in sFID
        spatial = spatial.permute(0, 2, 3, 1).flatten(1)  # (N, 112)
        return {"features": features, "spatial": spatial, "logits": self.classify(features)}


def draw_set(seed, count):
    """`count` images, classes in turn: uint8 (count, 3, 64, 64) and labels (count,)."""
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for k in tqdm(range(count), desc=f"drawing seed {seed}", unit="image"):
        i, c = divmod(k, len(CLASSES))
        images[k] = draw(CLASSES[c], np.random.default_rng([seed, c, i]), SIZE)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % len(CLASSES)


@torch.no_grad()
def accuracy(detector, images, labels):
    batches = zip(images.split(100), labels.split(100))
    right = sum((detector(x)["logits"].argmax(1) == y).sum().item() for x, y in batches)
    return right / len(images)


def export(detector, path):
    """Write the detector as a program of torch.export for any number of images of sides from 32."""
    example = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)  # it ships too; n of one image would be fixed
    n = torch.export.Dim("n", min=1, max=2**16)  # torch 2.6 asks for a maximum
    height, width = (torch.export.Dim(name, min=32, max=2**16) for name in ("height", "width"))
    shapes = ({0: n, 2: height, 3: width},)
    program = torch.export.export(detector, (example,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:  # its other records hold the paths of the machine it was traced on
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    torch.export.save(program, path)


def main():
    parser = argparse.ArgumentParser(description="Train the small classifier in tests/data/detector.pt2.")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .pt2")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--images", type=int, default=20000, help="training images drawn up front")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="weights and batches")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    if min(args.steps, args.batch_size, args.images, args.threads) < 1:
        print("--steps, --batch-size, --images and --threads must be at least 1.", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    (images, labels), held_out = draw_set(TRAIN_SEED, args.images), draw_set(HELD_OUT_SEED, 2000)
    detector, thumbnail = Detector(), nn.Linear(96, 3 * 4 * 4)
    parameters = [*detector.parameters(), *thumbnail.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1)

    bar = tqdm(range(args.steps), desc="training", unit="step")
    for step in bar:
        rows = torch.randint(len(images), (args.batch_size,))
        out = detector(images[rows])
        target = F.adaptive_avg_pool2d(images[rows].float() / 127.5 - 1, 4).flatten(1)
        class_loss = F.cross_entropy(out["logits"], labels[rows])
        thumbnail_loss = F.mse_loss(thumbnail(out["features"]), target)
        optimizer.zero_grad()
        (class_loss + thumbnail_loss).backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(class_loss=f"{class_loss.item():.3f}",
                            thumbnail_loss=f"{thumbnail_loss.item():.4f}")

    detector.eval().requires_grad_(False)
    export(detector, args.out)
    shipped = torch.export.load(args.out).module()
    right, size = accuracy(shipped, *held_out), args.out.stat().st_size
    print(f"{args.out}: held-out accuracy {right:.2%}, {size:,} bytes")


if __name__ == "__main__":
    main()
