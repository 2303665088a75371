"""Draw a small labelled image set: ten plain shapes, each class in its own folder.

    python tests/data/draw_images.py OUT --count 2000 --size 64 --seed 0

writes OUT/<class name>/<index>.png, the same number for every class. Position, size, rotation and
colours vary; the silhouette alone tells the class. Image i of class c depends on (seed, c, i) only,
so a larger count leaves the earlier images as they were.
"""
import argparse
import colorsys
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm


def ellipse(cx, cy, rx, ry):
    """Points (96, 2) on an axis-aligned ellipse."""
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


def star(points, inner):
    """Corners (2 * points, 2) of a star of outer radius 1, one tip pointing up."""
    angle = np.pi * np.arange(2 * points) / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 1, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def heart():
    """Points (96, 2) on the sine heart curve, scaled into the unit circle."""
    a = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x = 16 * np.sin(a) ** 3
    y = -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a))
    return np.stack([x, y - 2], axis=1) / 17


# name -> (polygons to fill, polygons to cut out again), within about the unit circle, y down
SHAPES = {
    "arrow": ([[(-1, -.26), (.1, -.26), (.1, -.75), (1, 0), (.1, .75), (.1, .26), (-1, .26)]], []),
    "circle": ([ellipse(0, 0, .85, .85)], []),
    "crescent": ([ellipse(0, 0, .95, .95)], [ellipse(.45, 0, .78, .78)]),
    "cross": ([[(-.95, -.3), (.95, -.3), (.95, .3), (-.95, .3)],
               [(-.3, -.95), (.3, -.95), (.3, .95), (-.3, .95)]], []),
    "fish": ([ellipse(.2, 0, .8, .5), [(-.35, 0), (-1, -.6), (-1, .6)]], []),
    "heart": ([heart()], []),
    "ring": ([ellipse(0, 0, .95, .95)], [ellipse(0, 0, .52, .52)]),
    "square": ([[(-.75, -.75), (.75, -.75), (.75, .75), (-.75, .75)]], []),
    "star": ([star(5, .42)], []),
    "triangle": ([[(0, -1), (.87, .6), (-.87, .6)]], []),
}
CLASSES = list(SHAPES)


def colours(rng):
    """A shape colour and two background colours, RGB in [0, 1]; the shape always stands out."""
    hue = rng.random()
    if rng.random() < 0.5:  # vivid shape on a pale ground
        fg = colorsys.hsv_to_rgb(hue, rng.uniform(.75, 1), rng.uniform(.35, .7))
        ground = {"s": rng.uniform(.05, .3), "v": rng.uniform(.9, 1)}
    else:                   # pale shape on a dark ground
        fg = colorsys.hsv_to_rgb(hue, rng.uniform(.15, .6), rng.uniform(.9, 1))
        ground = {"s": rng.uniform(.4, .9), "v": rng.uniform(.12, .35)}
    ground_hue = hue + rng.uniform(.25, .75)  # another part of the colour wheel than the shape's
    top = colorsys.hsv_to_rgb(ground_hue % 1, **ground)
    bottom = colorsys.hsv_to_rgb((ground_hue + rng.uniform(-.1, .1)) % 1, ground["s"],
                                 ground["v"] * rng.uniform(.75, 1))
    return np.array(fg), np.array(top), np.array(bottom)


def draw(name, rng, size):
    """One image of class `name`: PIL RGB, (size, size); all variation comes from the Generator."""
    big = 4 * size  # drawn large, then averaged down: smooth edges
    radius = big * rng.uniform(.34, .44)
    centre = big / 2 + big * rng.uniform(-.06, .06, 2)
    angle = np.deg2rad(rng.uniform(-12, 12))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    mask = Image.new("L", (big, big))
    pen = ImageDraw.Draw(mask)
    for polygons, value in zip(SHAPES[name], (255, 0)):
        for points in polygons:
            pen.polygon([tuple(p) for p in radius * np.array(points) @ turn + centre], fill=value)
    mask = np.asarray(mask.reduce(4), dtype=np.float64)[..., None] / 255  # (size, size, 1)

    fg, top, bottom = colours(rng)
    ground = top + np.linspace(0, 1, size)[:, None, None] * (bottom - top)  # (size, 1, 3)
    pixels = mask * fg + (1 - mask) * ground  # (size, size, 3)
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def refuse(sentence):
    print(sentence, file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description="Draw ten classes of plain shapes as PNG files.")
    parser.add_argument("out", type=Path, help="folder to write, one folder per class inside")
    parser.add_argument("--count", type=int, default=2000, help="images in all, a multiple of 10")
    parser.add_argument("--size", type=int, default=64, help="pixels along each side, at least 16")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images")
    args = parser.parse_args()
    if args.count < 1 or args.count % len(CLASSES):
        refuse(f"--count must be a positive multiple of {len(CLASSES)}, not {args.count}.")
    if args.size < 16:
        refuse(f"--size must be at least 16 to show the shapes, not {args.size}.")
    if args.seed < 0:
        refuse(f"--seed must not be negative, but is {args.seed}.")

    jobs = {args.out / name / f"{i:05d}.png": (c, name, i)
            for c, name in enumerate(CLASSES) for i in range(args.count // len(CLASSES))}
    strays = set(args.out.glob("*/*")) - set(jobs)
    if strays:  # they would pass for part of the set
        refuse(f"{args.out} already holds other files, such as {min(strays)}; give a new folder.")
    try:
        for name in CLASSES:
            (args.out / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"Cannot make the class folders: {error}.")
    for path, (c, name, i) in tqdm(jobs.items(), desc="drawing", unit="image"):
        draw(name, np.random.default_rng([args.seed, c, i]), args.size).save(path)


if __name__ == "__main__":
    main()
