"""The centre crop that ImageNet's generators are trained and measured on."""

from __future__ import annotations

from PIL import Image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` of a picture whose shorter side is scaled to `size` pixels.

    While the shorter side is twice `size` or longer, the picture is halved by box averages; a
    bicubic resize does the rest. That is the crop of ADM (Dhariwal and Nichol 2021), whose
    statistics FIDs on ImageNet are measured against; another filter gives another FID.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
