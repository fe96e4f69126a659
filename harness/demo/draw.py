"""Draw images of skin-like lesions from visual attributes, with the nuisances of real photographs.

    rng = generator("example", 1)
    pixels = draw(sample(BROAD, rng), Scene.sample(rng), rng)

A drawing is no model of any disease: it is a picture with known attributes.
"""

import hashlib
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from vipbench.harness.demo.attributes import Lesion

SIZE = 64
FINE = 2 * SIZE  # thin things are drawn at twice the size and averaged down, which makes their edges soft
RINGS = 128  # angles at which an outline is computed

Field = NDArray[np.float32]  # [SIZE, SIZE], or [SIZE, SIZE, 3] for colours in 0..255


def rgb(*values: float) -> Field:
    """A colour, 0..255 each."""
    return np.array(values, dtype=np.float32)


COLOURS = {
    "light brown": (172, 118, 76),
    "dark brown": (98, 58, 36),
    "black": (38, 30, 32),
    "red": (178, 44, 42),
    "pink": (226, 138, 140),
    "white": (238, 232, 226),
    "blue-grey": (98, 116, 148),
    "yellow": (220, 180, 84),
    "brown": (82, 46, 26),
}
PALE_SKIN, DARK_SKIN = rgb(236, 204, 184), rgb(164, 116, 88)
ASYMMETRY = {"symmetric": 0.0, "slightly asymmetric": 0.5, "asymmetric": 1.0}
BORDER = {"smooth": 0.0, "uneven": 0.5, "jagged": 1.0}
EDGE_PIXELS = {"sharp": 0.5, "soft": 1.5, "blurry": 3.5}
RADIUS = {"small": 0.36, "medium": 0.54, "large": 0.76}  # half the image's width is 1

AXIS = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1
Y, X = np.meshgrid(AXIS, AXIS, indexing="ij")


def generator(*key: str | int) -> np.random.Generator:
    """Random numbers that depend on the key alone, whatever was drawn before."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


@dataclass(frozen=True)
class Scene:
    """The nuisances that the images of one patient share."""

    tone: float  # 0 pale skin .. 1 dark skin
    redness: float
    hairs: float  # how many, on average
    warmth: float  # colour of the light
    freckles: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        tone, redness, hairs, warmth, freckles = rng.random(5)
        return cls(tone, redness, 5 * hairs**2, warmth - 0.5, freckles)


@dataclass(frozen=True)
class Shape:
    """The place and form of a lesion: its centre and radius (half the image's width is 1), its outline and its mask."""

    x: float
    y: float
    radius: float
    asymmetry: float
    outline: Field  # [RINGS] radius at equal angles
    mask: Field  # 1 inside, 0 outside


def draw(lesion: Lesion, scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one photograph: uint8 [SIZE, SIZE, 3], RGB. The same lesion looks different for each state of `rng`."""
    shape = _shape(lesion, rng)
    canvas = _skin(scene, rng)
    canvas = _blend(canvas, _pigment(lesion, shape, rng), shape.mask)
    canvas = _structures(canvas, lesion, shape, rng)
    return _photograph(canvas, scene, rng)


def _shape(lesion: Lesion, rng: np.random.Generator) -> Shape:
    asymmetry = float(np.clip(ASYMMETRY[lesion.symmetry] + rng.normal(0, 0.1), 0, 1.2))
    irregular = float(np.clip(BORDER[lesion.border] + rng.normal(0, 0.1), 0, 1.2))
    radius = RADIUS[lesion.size] * rng.uniform(0.9, 1.1)
    angles = np.linspace(0, 2 * np.pi, RINGS, endpoint=False)
    outline = 1 + rng.uniform(0, 0.12) * np.cos(2 * (angles - rng.uniform(0, np.pi)))
    for frequency, amplitude in ((1, 0.22), (3, 0.16)):  # odd waves set the halves apart
        outline += asymmetry * amplitude * rng.uniform(0.7, 1.2) * np.cos(frequency * angles + rng.uniform(0, 6.3))
    for frequency in rng.integers(6, 15, size=4):
        outline += irregular * 0.065 * np.cos(frequency * angles + rng.uniform(0, 6.3))
    outline *= radius
    room = max(0.0, 0.9 - radius)
    x, y = rng.uniform(-room, room, size=2) * 0.7
    distance = np.hypot(X - x, Y - y)
    position = (np.arctan2(Y - y, X - x) / (2 * np.pi) % 1) * RINGS
    reach = np.interp(position, np.arange(RINGS + 1), np.append(outline, outline[0]))
    width = EDGE_PIXELS[lesion.edge] * rng.uniform(0.8, 1.2) * 2 / SIZE
    mask = _step((reach - distance) / width)
    return Shape(x, y, radius, asymmetry, outline.astype(np.float32), mask)


def _skin(scene: Scene, rng: np.random.Generator) -> Field:
    colour = PALE_SKIN + scene.tone * (DARK_SKIN - PALE_SKIN) + rgb(6, -8, -6) * scene.redness
    canvas = colour + (5 * _noise(rng, 6) + 3 * _noise(rng, 24))[..., None]
    pen = _Pen()
    for _ in range(rng.poisson(5 * scene.freckles**2)):
        x, y, radius = rng.uniform((-1, -1, 0.02), (1, 1, 0.05))
        pen.disc(x, y, radius)
    return _blend(canvas, colour * 0.8, 0.5 * pen.mask())


def _pigment(lesion: Lesion, shape: Shape, rng: np.random.Generator) -> Field:
    """The colours inside: the main one, and patches that lie round the centre in a symmetric lesion, else beside it."""
    inside = _shade(lesion.colour, rng) + (7 * _noise(rng, 8))[..., None]
    for colour, extent in zip(lesion.patches, (0.72, 0.55, 0.4), strict=False):
        angle, away = rng.uniform(0, 2 * np.pi), shape.asymmetry * rng.uniform(0.35, 0.6) * shape.radius
        distance = np.hypot(X - shape.x - away * np.cos(angle), Y - shape.y - away * np.sin(angle))
        reach = extent * shape.radius * (rng.uniform(0.85, 1.1) + 0.15 * _noise(rng, 6))
        inside = _blend(inside, _shade(colour, rng), 0.9 * _step((reach - distance) / 0.05))
    return inside


def _structures(canvas: Field, lesion: Lesion, shape: Shape, rng: np.random.Generator) -> Field:
    if lesion.network == "present":
        canvas = _blend(canvas, canvas * 0.45, shape.mask * _net(rng))
    if lesion.surface == "rough":
        canvas = canvas + (shape.mask * (16 * _noise(rng, 20) + 12 * _noise(rng, 40)))[..., None]
    if lesion.veil == "present":
        canvas = _blend(canvas, rgb(150, 172, 206), _veil(shape, rng))
    if lesion.centre != "plain":
        canvas = _centre(canvas, lesion.centre, shape, rng)
    if lesion.streaks != "none":
        canvas = _blend(canvas, _shade("brown", rng), 0.85 * _streaks(lesion.streaks, shape, rng))
    if lesion.dots != "none":
        canvas = _blend(canvas, _shade(lesion.dot_colour, rng), 0.95 * _dots(lesion.dots, shape, rng))
    if lesion.vessels != "none":
        canvas = _blend(canvas, rgb(190, 24, 36), 0.8 * _vessels(lesion.vessels, shape, rng))
    if lesion.surface == "shiny":
        canvas = _blend(canvas, rgb(255, 255, 255), 0.85 * _shine(shape, rng))
    return canvas


def _net(rng: np.random.Generator) -> Field:
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(26, 34)
    along, across = X * np.cos(angle) + Y * np.sin(angle), Y * np.cos(angle) - X * np.sin(angle)
    bend = 0.9 * _noise(rng, 6)
    lines = np.maximum(np.cos(pitch * along + bend), np.cos(pitch * across - bend))
    return (0.75 * np.clip((lines - 0.55) / 0.45, 0, 1)).astype(np.float32)


def _veil(shape: Shape, rng: np.random.Generator) -> Field:
    angle, away = rng.uniform(0, 2 * np.pi), 0.35 * shape.radius
    distance = np.hypot(X - shape.x - away * np.cos(angle), Y - shape.y - away * np.sin(angle))
    reach = shape.radius * (0.75 + 0.1 * _noise(rng, 6))
    return shape.mask * 0.7 * _step((reach - distance) / 0.12)


def _centre(canvas: Field, kind: str, shape: Shape, rng: np.random.Generator) -> Field:
    distance = np.hypot(X - shape.x - rng.normal(0, 0.03), Y - shape.y - rng.normal(0, 0.03))
    reach = shape.radius * (rng.uniform(0.34, 0.44) + 0.08 * _noise(rng, 10))
    area = _step((reach - distance) / 0.03)
    if kind == "sore":
        rim = _step((reach + 0.07 - distance) / 0.03)
        return _blend(_blend(canvas, rgb(226, 120, 108), 0.8 * rim), rgb(120, 12, 18), area)
    if kind == "crust":
        flakes = rgb(206, 158, 62) + (26 * _noise(rng, 24))[..., None]
        return _blend(canvas, flakes, area)
    return _blend(canvas, rgb(244, 238, 234), 0.85 * _step((reach - distance) / 0.09))


def _streaks(amount: str, shape: Shape, rng: np.random.Generator) -> Field:
    count = int(rng.integers(5, 9) if amount == "few" else rng.integers(15, 22))
    start = rng.uniform(0, 2 * np.pi)
    spread = rng.uniform(2, 3.5) if amount == "few" else 2 * np.pi
    pen = _Pen()
    for angle in start + spread * (np.arange(count) + rng.uniform(-0.25, 0.25, size=count)) / count:
        reach = shape.outline[int(angle / (2 * np.pi) % 1 * RINGS)]
        first, last = reach * 0.8, reach + rng.uniform(0.1, 0.2)
        cos, sin = np.cos(angle), np.sin(angle)
        pen.line([(shape.x + r * cos, shape.y + r * sin) for r in (first, last)], width=3)
    return pen.mask()


def _dots(amount: str, shape: Shape, rng: np.random.Generator) -> Field:
    count = int(rng.integers(3, 7) if amount == "few" else rng.integers(14, 24))
    pen = _Pen()
    for angle, away, size in rng.random((count, 3)):
        reach = 0.88 * np.sqrt(away) * shape.outline[int(angle * RINGS)]
        x, y = shape.x + reach * np.cos(2 * np.pi * angle), shape.y + reach * np.sin(2 * np.pi * angle)
        pen.disc(x, y, 0.042 + 0.024 * size)
    return pen.mask()


def _vessels(amount: str, shape: Shape, rng: np.random.Generator) -> Field:
    pen = _Pen()
    for _ in range(int(rng.integers(1, 3) if amount == "few" else rng.integers(4, 7))):
        angle = rng.uniform(0, 2 * np.pi)
        x, y = shape.x + 0.9 * shape.radius * np.cos(angle), shape.y + 0.9 * shape.radius * np.sin(angle)
        _branch(pen, x, y, angle + np.pi + rng.normal(0, 0.4), shape.radius, 2, rng)
    return pen.mask()


def _branch(pen: "_Pen", x: float, y: float, angle: float, length: float, forks: int, rng: np.random.Generator) -> None:
    points = [(x, y)]
    for turn in rng.normal(0, 0.4, size=4):
        angle += turn
        x, y = x + length / 4 * np.cos(angle), y + length / 4 * np.sin(angle)
        points.append((x, y))
    pen.line(points, width=2)
    if forks:
        for at, side in ((2, 0.8), (3, -0.8)):
            _branch(pen, *points[at], angle + side + rng.normal(0, 0.2), length * 0.5, forks - 1, rng)


def _shine(shape: Shape, rng: np.random.Generator) -> Field:
    area = np.zeros((SIZE, SIZE), np.float32)
    for angle, away, size in rng.random((3, 3)):
        x = shape.x + 0.65 * away * shape.radius * np.cos(2 * np.pi * angle)
        y = shape.y + 0.65 * away * shape.radius * np.sin(2 * np.pi * angle)
        width = (0.05 + 0.07 * size) * (0.5 + shape.radius)
        area = np.maximum(area, np.exp(-(((X - x) / width) ** 2) - ((Y - y) / (0.6 * width)) ** 2))
    return area


def _photograph(canvas: Field, scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Hairs over the skin, light that falls from a side, focus and sensor noise."""
    pen = _Pen()
    for _ in range(rng.poisson(scene.hairs)):
        start, end, bend = rng.uniform(-1.1, 1.1, size=(3, 2))
        weights = np.linspace(0, 1, 8)[:, None]
        curve = (1 - weights) ** 2 * start + 2 * weights * (1 - weights) * bend + weights**2 * end
        pen.line([(x, y) for x, y in curve], width=1)
    canvas = _blend(canvas, rgb(52, 40, 34), 0.8 * pen.mask())
    slope_x, slope_y = rng.normal(0, 0.06, size=2)
    light = rng.uniform(0.86, 1.1) + slope_x * X + slope_y * Y
    canvas = canvas * light[..., None] * rgb(1 + 0.06 * scene.warmth, 1, 1 - 0.06 * scene.warmth)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.7)))
    noise = rng.standard_normal((SIZE, SIZE), dtype=np.float32) * rng.uniform(1, 5)
    return np.clip(np.asarray(image, np.float32) + noise[..., None], 0, 255).astype(np.uint8)


def _shade(colour: str, rng: np.random.Generator) -> Field:
    return (np.array(COLOURS[colour]) * rng.uniform(0.92, 1.08) + rng.normal(0, 4, size=3)).astype(np.float32)


def _noise(rng: np.random.Generator, cells: int) -> Field:
    """Smooth noise of unit variance or less, [SIZE, SIZE], `cells` bumps across."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _step(value: Field | NDArray[np.float64]) -> Field:
    """A soft step from 0 (far below zero) to 1 (far above)."""
    return (1 / (1 + np.exp(-2 * np.clip(value, -20, 20)))).astype(np.float32)


def _blend(canvas: Field, over: Field, alpha: Field) -> Field:
    """`over`, a colour or an image, upon `canvas` with opacity `alpha`."""
    return canvas + alpha[..., None] * (over - canvas)


class _Pen:
    """Draws thin things into a mask; coordinates as in `Shape`, widths in fine pixels."""

    def __init__(self) -> None:
        self.image = Image.new("L", (FINE, FINE))
        self.drawing = ImageDraw.Draw(self.image)

    def disc(self, x: float, y: float, radius: float) -> None:
        x, y, radius = (x + 1) * SIZE, (y + 1) * SIZE, radius * SIZE
        self.drawing.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)

    def line(self, points: list[tuple[float, float]], width: int) -> None:
        self.drawing.line([((x + 1) * SIZE, (y + 1) * SIZE) for x, y in points], fill=255, width=width)

    def mask(self) -> Field:
        return np.asarray(self.image.reduce(FINE // SIZE), np.float32) / np.float32(255)
