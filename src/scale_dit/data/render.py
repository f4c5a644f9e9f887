"""Scene descriptions to pictures: antialiased, at any resolution, batched, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scale_dit.data.textures import fractal_noise, hash_unit
from scale_dit.data.world import COLOURS, GROUNDS, PATTERNS, SHAPES, Scene
from scale_dit.errors import UserError

SLOTS = 4
STRIPES_PER_DIAMETER = 3.5
# Beyond this, intermediate pictures leave the processor's caches and rendering becomes three times slower.
CPU_CHUNK_PIXELS = 2**18
SURFACE_NOISE = (0.10, 0.94)


def pack(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Parameter tensors of a batch of scenes, cheap enough for data-loader workers.

    Returns:
        ``view [B, 4]``, ``objects [B, 4, 23]``, ``ground [B, 22]`` (float32) and ``seed [B]`` (int32).
    """
    return {
        "view": torch.tensor([scene.view for scene in scenes], dtype=torch.float32),
        "objects": torch.tensor([_pack_objects(scene) for scene in scenes], dtype=torch.float32),
        "ground": torch.tensor([_pack_ground(scene) for scene in scenes], dtype=torch.float32),
        "seed": torch.tensor([scene.seed for scene in scenes], dtype=torch.int32),
    }


def render(scenes: Sequence[Scene], height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Render scenes to ``[B, 3, height, width]`` float32 in [0, 1].

    Raises:
        UserError: No scene, or a scene whose aspect is not that of the picture.
    """
    if not scenes:
        raise UserError("No scene to render: pass at least one.")
    for scene in scenes:
        if abs(scene.aspect * height / width - 1) > 0.02:
            raise UserError(
                f"A scene of aspect {scene.aspect:g} does not fit a picture of {width}x{height} pixels: "
                f"sample it with aspect={width / height:g}."
            )
    packed = {name: values.to(device) for name, values in pack(scenes).items()}
    return render_packed(packed, height, width)


def render_packed(packed: dict[str, Tensor], height: int, width: int) -> Tensor:
    """Render the tensors of `pack`, on their device, to ``[B, 3, height, width]`` float32 in [0, 1]."""
    chunk = max(1, CPU_CHUNK_PIXELS // (height * width))
    if packed["view"].device.type == "cpu" and len(packed["view"]) > chunk:
        parts = zip(*(values.split(chunk) for values in packed.values()), strict=True)
        return torch.cat([_render(dict(zip(packed, part, strict=True)), height, width) for part in parts])
    return _render(packed, height, width)


def _render(packed: dict[str, Tensor], height: int, width: int) -> Tensor:
    view, objects = packed["view"], packed["objects"]
    x = view[:, 0:1] + view[:, 2:3] * ((torch.arange(width, device=view.device) + 0.5) / width)
    y = view[:, 1:2] + view[:, 3:4] * ((torch.arange(height, device=view.device) + 0.5) / height)
    pixel = (view[:, 2] / width + view[:, 3] / height)[:, None, None] / 2
    picture = _draw_ground(packed, x, y, pixel, height, width)

    amplitude, gain = (torch.full_like(view[:, 0], value) for value in SURFACE_NOISE)
    unstretched = torch.ones_like(view[:, :2])
    shading = 1 + fractal_noise(view, amplitude, gain, unstretched, ~packed["seed"], height, width)
    for slot in range(SLOTS):
        picture = _draw_object(picture, objects[:, slot, :, None, None], x, y, pixel, shading)
    return picture.clamp(0, 1)


def signed_distance(
    x: Tensor,
    y: Tensor,
    is_round: Tensor,
    is_cross: Tensor,
    a: Tensor,
    b: Tensor,
    sector: Tensor,
    turn: Tensor,
    normal: Sequence[Tensor],
) -> Tensor:
    """Signed distance to a shape's outline, exact near its edges; the circumscribed circle has radius 1.

    Polygons and stars are folded into half of one sector, where the outline is a straight line from the tip at radius 1
    with outward ``normal``; ``turn`` is the angle from straight up to a tip. Arguments broadcast; inside is negative.
    """
    length = torch.sqrt(x * x + y * y)
    circle = (length - a).abs() - b
    horizontal, vertical = x.abs(), y.abs()
    cross = torch.maximum(torch.maximum(horizontal, vertical) - a, torch.minimum(horizontal, vertical) - b)
    angle = torch.atan2(x, -y) - turn
    angle = (angle - torch.round(angle / sector) * sector).abs()
    polygon = (length * torch.cos(angle) - 1) * normal[0] + length * torch.sin(angle) * normal[1]
    return torch.where(is_round > 0, circle, torch.where(is_cross > 0, cross, polygon))


def _coverage(distance: Tensor, pixel: Tensor) -> Tensor:
    """Share of a pixel inside an edge at signed ``distance`` (same unit as ``pixel``)."""
    return (0.5 - distance / pixel).clamp(0, 1)


def _draw_object(picture: Tensor, values: Tensor, x: Tensor, y: Tensor, pixel: Tensor, shading: Tensor) -> Tensor:
    """Lay one object of every scene over the pictures. ``values``: ``[B, 23, 1, 1]``."""
    centre_x, centre_y, radius, cosine, sine, is_round, is_cross, a, b, sector, turn, normal_x, normal_y = values[
        :, :13
    ].unbind(1)
    striped, dotted, checkered, present = values[:, 13:17].unbind(1)
    first, second = values[:, 17:20], values[:, 20:23]
    dx, dy = (x[:, None, :] - centre_x) / radius, (y[:, :, None] - centre_y) / radius
    u, v = cosine * dx + sine * dy, cosine * dy - sine * dx
    unit = pixel / radius
    distance = signed_distance(u, v, is_round, is_cross, a, b, sector, turn, (normal_x, normal_y))
    alpha = _coverage(distance, unit) * present

    along, across = u * (STRIPES_PER_DIAMETER / 2) + 0.25, v * (STRIPES_PER_DIAMETER / 2) + 0.25
    along, across = (along - torch.round(along)).abs(), (across - torch.round(across)).abs()
    cell = unit * (STRIPES_PER_DIAMETER / 2)
    bar, row = _coverage(along - 0.25, cell), _coverage(across - 0.25, cell)
    dot = _coverage(torch.sqrt(along * along + across * across) - 0.3, cell)
    tone = striped * bar + dotted * dot + checkered * (bar + row - 2 * bar * row)
    light = shading * (1 - 0.08 * v)
    colour = torch.lerp(first, second, tone[:, None]) * light[:, None]
    return torch.lerp(picture, colour, alpha[:, None])


def _draw_ground(packed: dict[str, Tensor], x: Tensor, y: Tensor, pixel: Tensor, height: int, width: int) -> Tensor:
    view, values, seed = packed["view"], packed["ground"], packed["seed"]
    amplitude, gain, stretch = values[:, 9], values[:, 10], values[:, 11:13]
    noise = fractal_noise(view, amplitude, gain, stretch, seed, height, width)
    cell_width, cell_height, shift, joint, tint = values[:, 13:18, None, None].unbind(1)
    wave, cycles_x, cycles_y, bend = values[:, 18:22, None, None].unbind(1)

    row = y[:, :, None] / cell_height
    row_index = torch.floor(row)
    column = x[:, None, :] / cell_width + row_index * shift
    column_index = torch.floor(column)
    row, column = row - row_index, column - column_index
    nearest = torch.minimum(torch.minimum(column, 1 - column) * cell_width, torch.minimum(row, 1 - row) * cell_height)
    in_joint = _coverage(nearest - joint, pixel) * (joint > 0)
    cell = hash_unit(column_index.to(torch.int32), row_index.to(torch.int32), seed[:, None, None])

    turn = 2 * math.pi
    ripple = torch.cos(turn * (cycles_x * x[:, None, :] + bend * noise)) * torch.cos(
        turn * (cycles_y * y[:, :, None] + bend * noise)
    )
    # A wave shorter than two pixels cannot be shown; it fades out before.
    fade = (2 - 4 * torch.maximum(cycles_x, cycles_y) * pixel).clamp(0, 1)
    level = noise + tint * cell + wave * fade * ripple
    face = values[:, 0:3, None, None] + level[:, None] * values[:, 3:6, None, None]
    joint_face = values[:, 6:9, None, None] + 0.5 * noise[:, None]
    return torch.lerp(face, joint_face, in_joint[:, None])


def _pack_objects(scene: Scene) -> list[list[float]]:
    rows = [[0.0, 0.0, 1.0, *([0.0] * 6), 1.0, *([0.0] * 13)] for _ in range(SLOTS)]
    for row, item in zip(rows, scene.objects, strict=False):
        a, b = SHAPES[item.shape]
        is_round, is_cross = item.shape in ("circle", "ring"), item.shape == "cross"
        sector, normal_x, normal_y = 1.0, 0.0, 0.0
        if not is_round and not is_cross:
            sector = 2 * math.pi / a
            # The edge runs from (1, 0) to the inner vertex; its outward normal is that direction turned by -90 degrees.
            edge_x, edge_y = b * math.cos(sector / 2) - 1, b * math.sin(sector / 2)
            length = math.hypot(edge_x, edge_y)
            normal_x, normal_y = edge_y / length, -edge_x / length
        turn = math.pi / 4 if item.shape == "square" else 0.0
        patterns = [float(item.pattern == name) for name in PATTERNS[1:]]
        row[:] = [
            *item.centre,
            item.radius,
            math.cos(item.angle),
            math.sin(item.angle),
            float(is_round),
            float(is_cross),
            a,
            b,
            sector,
            turn,
            normal_x,
            normal_y,
            *patterns,
            1.0,
            *COLOURS[item.colour][0],
            *COLOURS[item.colour][1],
        ]
    return rows


def _pack_ground(scene: Scene) -> list[float]:
    ground = GROUNDS[scene.ground]
    # Each scene's ground is a little brighter or darker, with larger or smaller bricks, boards or ripples.
    brightness = 0.9 + 0.2 * (scene.seed % 1009) / 1009
    scale = 0.75 * 1.8 ** ((scene.seed // 1009 % 1013) / 1013)
    cell_width, cell_height = (side * scale if side else 1.0 for side in ground.cell)
    wave, cycles_x, cycles_y, bend = ground.wave
    return [
        *(brightness * value for value in ground.colour),
        *ground.light,
        *ground.joint_colour,
        *ground.noise,
        *ground.stretch,
        cell_width,
        cell_height,
        ground.shift,
        ground.joint * scale,
        ground.tint,
        wave,
        cycles_x / scale,
        cycles_y / scale,
        bend,
    ]
