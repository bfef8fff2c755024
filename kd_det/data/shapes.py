"""Draws synthetic scenes: textured shapes of six classes that overlap on a textured background."""

import cv2
import numpy as np

CLASSES = ("disc", "square", "triangle", "ring", "cross", "star")
# Increase this with every change of the pictures: a folder made by another version counts as different.
VERSION = 1
MIN_VISIBLE_SHARE = 0.3
MIN_VISIBLE_PIXELS = 25
SUBPIXEL_BITS = 4


def make_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draws a scene.

    Later shapes hide earlier ones; clutter without a class (blobs, bars, lines) lies among them. A shape of which less
    than 30 % or fewer than 25 pixels are visible stays in the picture, but is not returned.

    Args:
        rng: Source of all randomness.
        size: Side of the image in pixels. Shapes measure 16 to 72 pixels at 160 and scale with it.

    Returns:
        The image, (size, size, 3) uint8 in BGR, and the class index and the visible mask, (size, size) bool, of each
        object.
    """
    image = _texture(rng, size, size, rng.uniform(0, 255, 3), contrast=45)
    objects: list[tuple[int, np.ndarray, float]] = []
    occupied = np.zeros((size, size), bool)
    for _ in range(rng.integers(3, 9)):
        class_index = int(rng.integers(len(CLASSES)))
        is_clutter = rng.random() < 0.12
        contours = _place(rng, size, _clutter(rng) if is_clutter else _outline(rng, CLASSES[class_index]))
        alpha = _rasterise(contours, size)
        mask = alpha >= 0.5
        if occupied[mask].sum() > 0.4 * mask.sum():
            continue
        occupied |= mask
        _paint(rng, image, alpha)
        _hide(objects, mask)
        if not is_clutter:
            outer, *holes = (cv2.contourArea(contour.astype(np.float32)) for contour in contours)
            objects.append((class_index, mask, outer - sum(holes)))
    for _ in range(rng.integers(0, 2)):
        start, end = rng.integers(0, size, (2, 2)).tolist()
        line = np.zeros((size, size), np.float32)
        cv2.line(line, start, end, 1.0, int(rng.integers(1, 2 + size // 80)))
        _paint(rng, image, line)
        _hide(objects, line > 0)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9))
    np.add(image, rng.normal(0, rng.uniform(1, 6), image.shape), out=image)
    seen = [(c, m) for c, m, area in objects if m.sum() >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * area)]
    return image.clip(0, 255).astype(np.uint8), seen


def _hide(objects: list[tuple[int, np.ndarray, float]], mask: np.ndarray) -> None:
    for _, visible, _ in objects:
        visible &= ~mask


def _polygon(radii: np.ndarray) -> np.ndarray:
    """Returns points at equal angles around the origin, at the given distances from it."""
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]


def _outline(rng: np.random.Generator, name: str) -> list[np.ndarray]:
    """Returns the contours of a class within the unit circle; those after the first are holes."""
    if name == "cross":
        a, b = rng.uniform(0.2, 0.36), 0.93
        quarter = np.array([[b, -a], [b, a], [a, a]])
        turn = np.array([[0, 1], [-1, 0]])  # This turns row vectors by a right angle.
        return [np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])]
    if name == "star":
        return [_polygon(np.tile([1, rng.uniform(0.4, 0.55)], 5))]
    if name in ("square", "triangle"):
        return [_polygon(np.ones(4 if name == "square" else 3))]
    circle = _polygon(np.ones(48))
    return [circle] if name == "disc" else [circle, circle * rng.uniform(0.4, 0.65)]


def _clutter(rng: np.random.Generator) -> list[np.ndarray]:
    """Returns the contour of a bar or an irregular blob within the unit circle."""
    if rng.random() < 0.4:
        return [np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [0.95, rng.uniform(0.1, 0.3)]]
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    waves = np.zeros_like(angles)
    for k in (2, 3, 5):
        waves += rng.uniform(0.08, 0.3) * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
    return [_polygon((1 + waves) / (1 + waves).max())]


def _place(rng: np.random.Generator, size: int, contours: list[np.ndarray]) -> list[np.ndarray]:
    """Squeezes contours in the unit circle a little, and rotates, scales and moves them into the image."""
    radius = size / 160 * np.exp(rng.uniform(np.log(16), np.log(72))) / 2
    squeeze = np.diag([1, rng.uniform(0.8, 1)])
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = rng.uniform(0.03 * size, 0.97 * size, 2)
    return [contour @ squeeze @ turn * radius + centre for contour in contours]


def _rasterise(contours: list[np.ndarray], size: int) -> np.ndarray:
    """Computes the coverage of each pixel, (size, size) float32 from 0 to 1; fillPoly leaves holes open."""
    fixed = [np.round(contour * 2**SUBPIXEL_BITS).astype(np.int32) for contour in contours]
    canvas = np.zeros((size, size), np.uint8)
    return cv2.fillPoly(canvas, fixed, 255, cv2.LINE_AA, SUBPIXEL_BITS).astype(np.float32) / 255


def _paint(rng: np.random.Generator, image: np.ndarray, alpha: np.ndarray) -> None:
    """Fills a region of the image with a texture; about one in eight resembles the region beneath."""
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    patch, alpha = image[y : y + height, x : x + width], alpha[y : y + height, x : x + width, None]
    if not patch.size:
        return
    colour = rng.uniform(0, 255, 3)
    if rng.random() < 0.12:
        colour = patch.mean((0, 1)) + rng.choice([-1, 1], 3) * rng.uniform(12, 40, 3)
    patch += alpha * (_texture(rng, height, width, colour, contrast=rng.uniform(0, 40)) - patch)


def _texture(rng: np.random.Generator, height: int, width: int, colour: np.ndarray, contrast: float) -> np.ndarray:
    """Draws a gradient, stripes, checks or clouds around a colour, (height, width, 3) float32."""
    kind = rng.choice(["gradient", "stripes", "checks", "clouds"])
    angle, period = rng.uniform(0, 2 * np.pi), max(height, width) * rng.uniform(0.03, 0.25) + 3
    y, x = np.ogrid[:height, :width]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == "gradient":
        field = (u - u.mean()) / max(height, width)
    elif kind == "stripes":
        field = np.sin(2 * np.pi * u / period) / 2
    elif kind == "checks":
        field = np.sign(np.sin(np.pi * u / period) * np.sin(np.pi * v / period)) / 2
    else:
        cells = int(rng.integers(4, 24))
        field = cv2.resize(rng.uniform(-1, 1, (cells, cells)), (width, height), interpolation=cv2.INTER_CUBIC)
    tint = contrast * rng.uniform(-1, 1, 3)
    return (colour + field[..., None] * tint).astype(np.float32)
