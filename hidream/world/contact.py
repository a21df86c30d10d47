"""A contact sheet of the camera: every shot scale, angle, view and figure."""

from __future__ import annotations

from PIL import Image

from hidream.world.figures import FIGURES
from hidream.world.lens import ANGLES, SHOTS, VIEWS
from hidream.world.render import draw
from hidream.world.scene import BACKGROUNDS, COLORS, Camera
from hidream.world.shots import shot_scene


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
