"""Contact sheets for the documentation: the camera, storyboards, layouts."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from hidream.world.figures import FIGURES
from hidream.world.lens import ANGLES, SHOTS, VIEWS
from hidream.world.render import draw
from hidream.world.scene import BACKGROUNDS, COLORS, Camera
from hidream.world.shots import shot_scene
from hidream.world.tasks import eval_seed, sample


def camera_sheet(side: int = 96) -> Image.Image:
    """Pictures of `side` pixels, seven a row: the shot scales; the angles, of a car and, but for
    eye-level, of a mug; and for each view (front, side, back, three-quarter) all figures."""
    usual = Camera(shot="full", angle="eye-level", view="three-quarter")
    rows: list[list[tuple[str, Camera]]] = [
        [("robot", Camera(shot=shot, angle=usual.angle, view=usual.view)) for shot in SHOTS],
        [("car", Camera(shot="medium-full", angle=angle, view=usual.view)) for angle in ANGLES]
        + [
            ("mug", Camera(shot="medium-full", angle=angle, view=usual.view))
            for angle in ANGLES
            if angle != usual.angle
        ],
    ]
    for view in VIEWS:
        camera = Camera(shot="medium-full", angle=usual.angle, view=view)
        rows.append([(kind, camera) for kind in FIGURES])
    sheet = Image.new("RGB", (side * max(map(len, rows)), side * len(rows)), "white")
    for i, row in enumerate(rows):
        for j, (kind, camera) in enumerate(row):
            column = i if i < 2 else j + 2
            background, color = BACKGROUNDS[column % 6], COLORS[3 * column % 10]
            scene = shot_scene(kind, color, background, camera)
            sheet.paste(draw(scene, side, side), (j * side, i * side))
    return sheet


def storyboard_sheet(side: int = 192) -> Image.Image:
    """Four storyboards of `side` pixels side by side."""
    items = (sample("text_to_image", eval_seed(5), i, category="storyboards") for i in range(99))
    grids = {(len(item.panels), item.columns): item for item in items}
    shown = [grids[grid] for grid in ((4, 2), (3, 1), (6, 3), (2, 2))]
    return _row([item.target(side, side) for item in shown], side)


def layout_sheet(side: int = 96) -> Image.Image:
    """Three layouts, one a column: two references of `side` pixels over the true picture, in it the
    boxes."""
    items = (sample("text_to_image", eval_seed(5), i, category="layout") for i in range(99))
    columns = []
    for item in [item for item in items if len(item.layout) == 2][:3]:
        picture = Image.fromarray(item.target(2 * side, 2 * side))
        for x1, x2, y1, y2 in item.layout:
            corners = [round(2 * side * value) for value in (x1, y1, x2, y2)]
            ImageDraw.Draw(picture).rectangle(corners, outline=(220, 0, 0))
        top = np.hstack(item.reference_pictures(side, side))
        columns.append(np.vstack([top, np.asarray(picture)]))
    return _row(columns, 2 * side)


def _row(pictures: list[np.ndarray], width: int, gap: int = 8) -> Image.Image:
    """Pictures of one width side by side."""
    sheet = Image.new("RGB", (len(pictures) * (width + gap) - gap, len(pictures[0])), "grey")
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (i * (width + gap), 0))
    return sheet
