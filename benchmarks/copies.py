"""What chestct.data.duplicates finds of planted near-copies, and what it joins wrongly: `python -m benchmarks.copies`.

Phantoms with different bodies are drawn as training draws them, and some are copied with one change each: whatever is
found besides the planted copies is a false pair. `--root FOLDER` plants the same changes among the slices of a real
collection instead; what is found there besides may be real near-copies, so it is only counted.
"""

import argparse
import io
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from chestct.config.schema import PhantomConfig, WindowConfig
from chestct.data.duplicates import find_pairs, group
from chestct.imaging.decode import decode
from chestct.imaging.preprocess import thumbnail
from chestct.imaging.slice import pixel_hash
from chestct.phantom.thorax import display, draw

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def jpeg(image: Image.Image, rng: np.random.Generator, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def zoom(image: Image.Image, rng: np.random.Generator, factor: float) -> Image.Image:
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.BILINEAR)


def crop(image: Image.Image, rng: np.random.Generator, low: float = 0.0) -> Image.Image:
    left, top, right, bottom = rng.uniform(low, 0.05, 4) * [*image.size, *image.size]
    return image.crop((round(left), round(top), image.width - round(right), image.height - round(bottom)))


def shift(image: Image.Image, rng: np.random.Generator, low: float = 0.0) -> Image.Image:
    x, y = rng.uniform(low, 0.05, 2) * rng.choice([-1, 1], 2) * image.size
    moved = Image.new("L", image.size)
    moved.paste(image, (round(x), round(y)))
    return moved


def border(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.expand(image, round(image.width * rng.uniform(0.01, 0.05)), int(rng.choice([0, 255])))


def scribble(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.array(image)
    height, width = pixels.shape
    y, x = int(rng.uniform(0, 0.7) * height), int(rng.uniform(0, 0.9) * width)
    pixels[y : y + height // 4, x : x + 3] = 255
    return Image.fromarray(pixels)


def levels(image: Image.Image, curve: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    table = curve(np.arange(256) / 255)
    return image.point(np.rint(255 * np.clip(table, 0, 1)).astype(int).tolist())


def brightness(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    by = rng.uniform(-0.15, 0.15)
    return levels(image, lambda v: v + by)


def contrast(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    by = rng.uniform(0.75, 1.25)
    return levels(image, lambda v: (v - 0.5) * by + 0.5)


def window(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    low, high = rng.uniform(0, 0.12), rng.uniform(0.8, 1)
    return levels(image, lambda v: (v - low) / (high - low))


def gamma(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    power = np.exp(rng.uniform(-0.5, 0.5))
    return levels(image, lambda v: v**power)


def combination(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    changed = gamma(crop(zoom(image, rng, rng.uniform(0.6, 1.4)), rng), rng)
    return jpeg(changed, rng, int(rng.integers(50, 90)))


CHANGES: dict[str, Change] = {
    "JPEG, quality 40": partial(jpeg, quality=40),
    "JPEG, quality 95": partial(jpeg, quality=95),
    "half as large": partial(zoom, factor=0.5),
    "twice as large": partial(zoom, factor=2.0),
    "crop, up to 5 % a side": crop,
    "crop, 5 % on every side": partial(crop, low=0.05),
    "shift, up to 5 % a side": shift,
    "shift, 5 % both ways": partial(shift, low=0.05),
    "border, up to 5 %": border,
    "line drawn across": scribble,
    "brightness, ±15 %": brightness,
    "contrast, ±25 %": contrast,
    "gamma, 0.6 to 1.6": gamma,
    "display window": window,
    "zoom, crop, gamma, JPEG": combination,
}


def phantom(index: int) -> np.ndarray:
    subtype = ("normal", "adenocarcinoma", "large_cell", "squamous")[index % 4]
    drawn = draw(np.random.default_rng([21, index]), subtype, PhantomConfig())
    return display(drawn.hu, drawn.window)


def originals(root: str | None, slices: int) -> list[np.ndarray]:
    """Slices of different content, uint8 [H, W] each."""
    if not root:
        with multiprocessing.Pool(2) as pool:
            return pool.map(phantom, range(slices), chunksize=16)
    files = sorted(path for path in Path(root).rglob("*") if path.is_file())
    decoded = [decode(path, WindowConfig()) for path in files]
    distinct = {pixel_hash(slice_.levels): slice_ for slice_ in decoded}
    return [np.uint8(np.rint(slice_.gray * 255)) for slice_ in distinct.values()]


def planted(root: str | None, slices: int) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """Originals followed by their copies: thumbs uint8 [N, 56, 56], content, original and change of each (-1: none).

    Three in four originals get one copy, of each kind equally many.
    """
    drawn = originals(root, slices)
    order = np.random.default_rng(0).permutation(len(drawn))[: len(drawn) * 3 // 4]
    change = np.arange(len(order)) % len(CHANGES)
    makers = list(CHANGES.values())
    copies = [
        np.asarray(makers[kind](Image.fromarray(drawn[i]), np.random.default_rng([22, int(i)])).convert("L"))
        for i, kind in zip(order, change, strict=True)
    ]
    everything = [*drawn, *copies]
    thumbs = np.stack([thumbnail(gray) for gray in everything])
    nothing = np.full(len(drawn), -1)
    original = np.concatenate([np.arange(len(drawn)), order])
    return thumbs, [pixel_hash(gray) for gray in everything], original, np.concatenate([nothing, change])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=2000, help="different phantoms")
    parser.add_argument("--root", help="folder with real slices, instead of phantoms")
    arguments = parser.parse_args()
    thumbs, content, original, change = planted(arguments.root, arguments.slices)
    pairs = find_pairs(thumbs, content)
    groups = group(len(thumbs), pairs)
    together = groups == groups[original]
    own = original[pairs["a"]] == original[pairs["b"]]
    near = (pairs["kind"] == "near").to_numpy()
    for kind, name in enumerate([*CHANGES, "all"]):
        of_kind = change == kind if name != "all" else change >= 0
        found = together[of_kind]
        print(f"{name:26}{len(found):6} copies {found.sum():6} found   recall {found.mean():.4f}")
    others = pairs["similarity"][near & ~own]
    print(
        f"{(change < 0).sum()} different slices; {len(others)} pairs of different ones among {near.sum()} near pairs"
        + (f", the most alike {others.max():.3f}" if len(others) else "")
    )


if __name__ == "__main__":
    main()
