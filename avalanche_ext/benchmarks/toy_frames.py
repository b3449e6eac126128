"""Pictures of toy objects on toy backgrounds: short smooth clips, as CORe50's, without a camera.

Ten silhouettes stand for CORe50's ten categories. The five objects of a category differ in
colours, pattern and proportions. A session is a room: its background, its light, its viewpoint.
Inside a clip position, angle, distance and light move slowly, so neighbouring frames are nearly
the same.

Everything is drawn once into tables (``World``) by one generator, for all objects and sessions;
a picture depends on the tables, the moment and the size alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CATEGORIES", "VALIDATION_SESSIONS", "World", "draw_world", "render_clip"]

# CORe50's eleven sessions, and three more to choose settings on.
VALIDATION_SESSIONS = (12, 13, 14)
_OBJECTS, _SESSIONS, _WAVES = 50, 14, 6
# Moving quantities of a clip: x, y, size, angle, light, background x, background y.
_MOVING = 7


@dataclass(frozen=True)
class World:
    """All that was drawn at random; rows are objects ``O = 50``, sessions ``S = 14`` or clips.

    Shapes:
        colours ``(O, 3, 3)``: body, pattern and detail, RGB in [0, 1].
        pattern ``(O, 3)``: kind (0 plain, 1 stripes, 2 dots, 3 checks), waves per unit, angle.
        proportions ``(O, 2)``: width and height, about 1.
        rooms ``(S, 3, 3)``: three background colours.
        waves ``(S, 2, 6, 3)``: two background patterns of six waves: frequencies x, y; phase.
        light ``(S, 3)``: gain of R, G, B. slope ``(S, 2)``: its slope across the picture.
        pose ``(O, S, 4)``: x, y, size, angle around which the object moves.
        place ``(O, S, 2)``: which part of the room is seen.
        motion ``(O, S, 7, 2, 2)``: frequency and phase of two sines for each moving quantity.
    """

    colours: Tensor
    pattern: Tensor
    proportions: Tensor
    rooms: Tensor
    waves: Tensor
    light: Tensor
    slope: Tensor
    pose: Tensor
    place: Tensor
    motion: Tensor


def draw_world(seed: int) -> World:
    """Fifty objects and fourteen rooms; the global random state is not touched."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    variant = torch.arange(_OBJECTS) % 5
    hue = (variant / 5 + uniform(0, 0.1, _OBJECTS))[:, None] + torch.tensor([0.0, 0.42, 0.0])
    hue[:, 2] = uniform(0, 1, _OBJECTS)
    saturation = torch.stack([uniform(0.55, 1, _OBJECTS), uniform(0.2, 0.8, _OBJECTS),
                              uniform(0, 0.3, _OBJECTS)], 1)  # fmt: skip
    value = torch.stack([uniform(0.6, 1, _OBJECTS), uniform(0.5, 1, _OBJECTS),
                         uniform(0.1, 0.9, _OBJECTS).round() * 0.8 + 0.1], 1)  # fmt: skip
    kinds = torch.stack([torch.randperm(5, generator=generator) % 4 for _ in range(10)]).flatten()
    fineness = uniform(0.3, 1, _SESSIONS, 1, 1, 1) * torch.tensor([6.0, 6.0])
    directions = uniform(-1, 1, _SESSIONS, 2, _WAVES, 2) * fineness
    motion = torch.stack(
        [
            torch.stack([uniform(0.2, 0.5, _OBJECTS, _SESSIONS, _MOVING),
                         uniform(0.5, 1.1, _OBJECTS, _SESSIONS, _MOVING)], -1),
            uniform(0, 1, _OBJECTS, _SESSIONS, _MOVING, 2),
        ],
        -1,
    )  # fmt: skip
    return World(
        colours=_rgb(hue, saturation, value),
        pattern=torch.stack([kinds.float(), uniform(1.5, 3, _OBJECTS),
                             uniform(0, math.pi, _OBJECTS)], 1),
        proportions=uniform(0.85, 1.15, _OBJECTS, 2),
        rooms=_rgb(uniform(0, 1, _SESSIONS, 3), uniform(0.05, 0.35, _SESSIONS, 3),
                   uniform(0.35, 0.85, _SESSIONS, 1) * uniform(0.75, 1.1, _SESSIONS, 3)),
        waves=torch.cat([directions, uniform(0, 1, _SESSIONS, 2, _WAVES, 1)], -1),
        light=uniform(0.8, 1.05, _SESSIONS, 1) * uniform(0.93, 1.07, _SESSIONS, 3),
        slope=uniform(-0.25, 0.25, _SESSIONS, 2),
        pose=torch.stack([uniform(-0.2, 0.2, _OBJECTS, _SESSIONS),
                          uniform(-0.2, 0.2, _OBJECTS, _SESSIONS),
                          uniform(0.75, 0.95, _OBJECTS, _SESSIONS),
                          uniform(-0.6, 0.6, _OBJECTS, _SESSIONS)], -1),
        place=uniform(-1, 1, _OBJECTS, _SESSIONS, 2),
        motion=motion,
    )  # fmt: skip


def render_clip(world: World, session: int, obj: int, frames: int, size: int) -> Tensor:
    """The frames of one object in one session, at even moments of the same clip.

    Twice as many frames are the same clip looked at twice as often.

    Args:
        world: See ``draw_world``.
        session: 1 to 11, or 12 to 14 (``VALIDATION_SESSIONS``).
        obj: 1 to 50; its category is ``(obj - 1) // 5``.
        frames: Number of frames F.
        size: Width and height in pixels.

    Returns:
        uint8 ``(F, 3, size, size)``.
    """
    s, o = session - 1, obj - 1
    moments = torch.arange(frames) / frames
    frequency, phase = world.motion[o, s].unbind(-1)
    turns = 2 * math.pi * (frequency[..., None] * moments + phase[..., None])
    sway = (turns.sin() * torch.tensor([0.7, 0.3])[:, None]).sum(1)[..., None, None]  # (7, F, 1, 1)
    steps = (torch.arange(size) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(steps, steps, indexing="ij")

    room = _background(world, s, x + world.place[o, s, 0] + 0.15 * sway[5],
                       y + world.place[o, s, 1] + 0.15 * sway[6])  # fmt: skip
    px, py, scale, angle = world.pose[o, s]
    scale = scale * (1 + 0.15 * sway[2])
    angle = angle + 0.35 * sway[3]
    dx, dy = x - px - 0.15 * sway[0], y - py - 0.15 * sway[1]
    u = (dx * angle.cos() + dy * angle.sin()) / (scale * world.proportions[o, 0])
    v = (dy * angle.cos() - dx * angle.sin()) / (scale * world.proportions[o, 1])
    body, detail = _SILHOUETTES[o // 5](u, v)
    edge = 2 / (size * scale)  # one pixel, in units of the object
    surface = _surface(world, o, u, v, _inside(detail, edge))
    alpha = _inside(body, edge)[:, None]
    picture = alpha * surface + (1 - alpha) * room

    slope = 1 + world.slope[s, 0] * x + world.slope[s, 1] * y
    lit = picture * (slope * (1 + 0.08 * sway[4]))[:, None] * world.light[s][:, None, None]
    return lit.clamp(0, 1).mul(255).round().to(torch.uint8)


def _background(world: World, s: int, x: Tensor, y: Tensor) -> Tensor:
    """Two sums of waves mix the room's three colours: carpets, blinds, leaves; ``(F, 3, H, W)``."""
    fx, fy, phase = world.waves[s][..., None, None, None, :].unbind(-1)
    waves = (2 * math.pi * (0.5 * (fx * x + fy * y) + phase)).cos().sum(1)  # (2, F, H, W)
    first, second = (3 * waves / math.sqrt(_WAVES)).sigmoid()[:, :, None]
    a, b, c = world.rooms[s][..., None, None]
    return (a * first + b * (1 - first)) * second + c * (1 - second)


def _surface(world: World, o: int, u: Tensor, v: Tensor, detail: Tensor) -> Tensor:
    """The object's colours before light; ``(F, 3, H, W)``."""
    kind, waves, angle = world.pattern[o].tolist()
    along = 2 * math.pi * waves * (u * math.cos(angle) + v * math.sin(angle))
    across = 2 * math.pi * waves * (v * math.cos(angle) - u * math.sin(angle))
    marks = (
        torch.full_like(u, -1.0), along.sin(), along.sin() + across.sin() - 0.8,
        3 * along.sin() * across.sin(),
    )[int(kind)]  # fmt: skip
    mix = (4 * marks).sigmoid()[:, None]
    first, second, third = world.colours[o][..., None, None]
    body = first * (1 - mix) + second * mix
    return body + detail[:, None] * (third - body)


def _inside(distance: Tensor, edge: Tensor) -> Tensor:
    """1 inside (distance < 0), 0 outside, linear over one pixel."""
    return (0.5 - distance / edge).clamp(0, 1)


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Hue (1 = a full turn), saturation and value to RGB, on a new last axis."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[..., None]) % 6
    chroma = (value * saturation)[..., None]
    return value[..., None] - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


# Silhouettes: signed distances, negative inside, of the body and of its detail. The object fills
# about [-1, 1] in u (right) and v (down).


def _box(u: Tensor, v: Tensor, x: float, y: float, w: float, h: float, r: float = 0.05) -> Tensor:
    du, dv = (u - x).abs() - (w - r), (v - y).abs() - (h - r)
    outside = (du.clamp(min=0) ** 2 + dv.clamp(min=0) ** 2).sqrt()
    return outside + torch.maximum(du, dv).clamp(max=0) - r


def _disc(u: Tensor, v: Tensor, x: float, y: float, r: float) -> Tensor:
    return ((u - x) ** 2 + (v - y) ** 2).sqrt() - r


def _ring(u: Tensor, v: Tensor, x: float, y: float, r: float, width: float) -> Tensor:
    return _disc(u, v, x, y, r).abs() - width / 2


def _bar(u: Tensor, v: Tensor, a: tuple[float, float], b: tuple[float, float], r: float) -> Tensor:
    along = (b[0] - a[0], b[1] - a[1])
    share = ((u - a[0]) * along[0] + (v - a[1]) * along[1]) / (along[0] ** 2 + along[1] ** 2)
    share = share.clamp(0, 1)
    return ((u - a[0] - share * along[0]) ** 2 + (v - a[1] - share * along[1]) ** 2).sqrt() - r


def _any(*parts: Tensor) -> Tensor:
    return torch.stack(parts).amin(0)


def _plug_adapter(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    prongs = _any(_box(u, v, -0.25, -0.55, 0.1, 0.35), _box(u, v, 0.25, -0.55, 0.1, 0.35))
    return _any(_box(u, v, 0, 0.3, 0.58, 0.5, 0.15), prongs), prongs


def _mobile_phone(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _box(u, v, 0, 0, 0.5, 0.9, 0.1), _box(u, v, 0, -0.1, 0.38, 0.6)


def _scissor(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    rings = _any(_ring(u, v, -0.4, 0.55, 0.26, 0.16), _ring(u, v, 0.4, 0.55, 0.26, 0.16))
    blades = _any(
        _bar(u, v, (-0.25, 0.35), (0.3, -0.9), 0.1), _bar(u, v, (0.25, 0.35), (-0.3, -0.9), 0.1)
    )
    return _any(rings, blades), rings


def _light_bulb(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    base = _box(u, v, 0, 0.62, 0.24, 0.3)
    return _any(_disc(u, v, 0, -0.25, 0.6), base), base


def _can(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    rims = _any(_box(u, v, 0, -0.72, 0.6, 0.13), _box(u, v, 0, 0.72, 0.6, 0.13))
    return _box(u, v, 0, 0, 0.55, 0.85, 0.2), rims


def _glass(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lenses = _any(_ring(u, v, -0.48, 0, 0.34, 0.16), _ring(u, v, 0.48, 0, 0.34, 0.16))
    arms = _any(
        _bar(u, v, (-0.15, -0.05), (0.15, -0.05), 0.08),
        _bar(u, v, (-0.8, -0.1), (-0.95, -0.5), 0.08),
        _bar(u, v, (0.8, -0.1), (0.95, -0.5), 0.08),
    )
    return _any(lenses, arms), arms


def _ball(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _disc(u, v, 0, 0, 0.75), _box(u, v, 0, 0, 1, 0.13)


def _marker(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    cap = _any(_box(u, v, 0, -0.55, 0.22, 0.25), _box(u, v, 0, -0.88, 0.1, 0.12))
    return _any(_box(u, v, 0, 0.2, 0.2, 0.78), cap), cap


def _cup(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    handle = _ring(u, v, 0.5, 0.05, 0.28, 0.16)
    return _any(_box(u, v, -0.15, 0.05, 0.55, 0.65, 0.15), handle), handle


def _remote_control(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    columns, rows = (u + 0.12).remainder(0.24) - 0.12, (v + 0.15).remainder(0.3) - 0.15
    keys = torch.maximum(_disc(columns, rows, 0, 0, 0.08), _box(u, v, 0, 0, 0.36, 0.75))
    return _box(u, v, 0, 0, 0.38, 0.95, 0.1), keys


_Silhouette = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_SILHOUETTES: tuple[_Silhouette, ...] = (
    _plug_adapter, _mobile_phone, _scissor, _light_bulb, _can, _glass, _ball, _marker, _cup,
    _remote_control,
)  # fmt: skip
CATEGORIES = tuple(shape.__name__[1:] for shape in _SILHOUETTES)
