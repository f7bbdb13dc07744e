"""What happens to slices on their way through collections, one change each, for tests of what finds copies."""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageOps

from tests.imaging.files import encoded

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def jpeg(image: Image.Image, rng: np.random.Generator, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality)))


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
