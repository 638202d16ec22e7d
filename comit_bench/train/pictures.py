"""The validation picture: images, the crops that were seen in order, and what the message gives back.

Unlike the measures, whose messages are of the whole image, a picture shows messages made the way
training makes them: crops at random places, the first one global with the probability of the
configuration. They are keyed by seed and image, so all pictures of a run show the same crops.

Shape legend: ``n`` images, ``K`` crops, ``S`` image side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from comit_bench.files import atomic_path
from comit_bench.nn.flow import Guidance
from comit_bench.seeding import seed_for
from comit_bench.tokenizers.comit.codec import decode, encode_crops, one_step_decode, to_uint8
from comit_bench.tokenizers.comit.crops import CELLS, CropPolicy
from comit_bench.tokenizers.comit.model import Comit
from comit_bench.train.config import TrainConfig
from comit_bench.train.draws import uniforms, words
from comit_bench.train.objectives.comit import crop_locations
from comit_bench.train.sampling import WHOLE, crop_corners

TILE = 160  # pixels of an enlarged image, about
LABEL = 150  # pixels of the column with row names
GAP = 6
UNSEEN = 0.35  # brightness of what no crop covers
COLOURS = (
    "#ffd400", "#ff4d4d", "#2ecc71", "#3aa0ff", "#ff8c1a", "#c86bff", "#00d0c8", "#ff7ab8", "#b0e000",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Sheet:
    """What a picture shows."""

    images: Tensor  # uint8 [n, 3, S, S]
    corners: Tensor  # int64 [K, n, 2], (top, left) of every crop; WHOLE for the whole image
    crop: int  # side of a local crop in pixels
    one_step: Tensor  # uint8 [n, 3, S, S], from one Euler step without guidance
    guided: Tensor  # uint8 [n, 3, S, S], sampled as in decoding
    guided_label: str  # how


def picture_corners(config: TrainConfig, ids: tuple[str, ...]) -> Tensor:
    """Corners int64 [K, n, 2] of the crops shown, drawn like those of training."""
    spec, crops = config.model.spec(), config.crops
    count = min(config.validation.picture_crops, crops.max_crops)
    samples = np.array([seed_for(0, name) for name in ids])
    drawn = words(config.seed, "picture", samples, CELLS + 2)
    corners = crop_corners(spec, crops.places, drawn[:, 1:])[:, :count]
    corners[uniforms(drawn[:, 0]) < crops.global_first, 0] = WHOLE
    return torch.from_numpy(corners).transpose(0, 1).contiguous()


@torch.inference_mode()
def make_sheet(
    model: Comit, config: TrainConfig, images: Tensor, noise: Tensor, ids: tuple[str, ...]
) -> Sheet:
    """Encode images [n, 3, S, S] in [-1, 1] from their crops, reconstruct them from noise [n, C, h, w]."""
    codec, geometry = model.codec, model.spec.geometry
    corners = picture_corners(config, ids)
    places = crop_locations(geometry, corners).to(images.device)
    codes, offsets = [], []
    for i in range(images.shape[0]):  # one by one: crops at one step differ in size between images
        crops = []
        for top, left in corners[:, i].tolist():
            window = images[i : i + 1]
            if top != WHOLE:
                window = window[:, :, top : top + geometry.crop, left : left + geometry.crop]
            crops.append(window)
        done = encode_crops(model, crops, list(places[:, i : i + 1]), CropPolicy())
        codes.append(done.codes)
        offsets.append(done.offset)
    message, offset = torch.cat(codes), torch.cat(offsets)
    settings = config.validation
    guidance = Guidance(weight=settings.guidance)
    latents = decode(model, message, offset, noise, steps=settings.steps, guidance=guidance).latents
    one = codec.decode(one_step_decode(model, message, offset, noise))
    label = f"{settings.steps} steps\nguidance {settings.guidance:g}"
    shown = [to_uint8(x).cpu() for x in (images, one, codec.decode(latents))]
    return Sheet(shown[0], corners, geometry.crop, shown[1], shown[2], label)


def _tile(image: Tensor, factor: int) -> Image.Image:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def _covered(side: int, corners: Tensor, crop: int) -> Tensor:
    """Boolean [S, S]: what any of the crops [K, 2] shows."""
    seen = torch.zeros(side, side, dtype=torch.bool)
    for top, left in corners.tolist():
        if top == WHOLE:
            return torch.ones(side, side, dtype=torch.bool)
        seen[top : top + crop, left : left + crop] = True
    return seen


def _crops_tile(image: Tensor, corners: Tensor, crop: int, factor: int) -> Image.Image:
    """The image, dark where no crop covers it, with a numbered frame per crop."""
    side = image.shape[-1]
    seen = _covered(side, corners, crop)
    shown = torch.where(seen, image.float(), image.float() * UNSEEN).to(torch.uint8)
    tile = _tile(shown, factor)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(12)
    boxes = []
    for top, left in corners.tolist():
        whole = top == WHOLE
        x, y, size = (0, 0, side) if whole else (left, top, crop)
        boxes.append((x * factor, y * factor, (x + size) * factor - 1, (y + size) * factor - 1))
    for number, box in enumerate(boxes):
        draw.rectangle(box, outline=COLOURS[number % len(COLOURS)], width=3)
    taken: set[tuple[int, int]] = set()
    for number, (left, top, right, bottom) in enumerate(boxes):
        # a free corner of the frame, so that numbers of crops at the same place do not cover each other
        ends = [(left, top), (right - 14, top), (left, bottom - 15), (right - 14, bottom - 15)]
        x, y = next((e for e in ends if not any(abs(e[0] - a) < 15 and abs(e[1] - b) < 16 for a, b in taken)),
                    ends[number % 4])  # fmt: skip
        taken.add((x, y))
        draw.rectangle((x, y, x + 14, y + 15), fill=COLOURS[number % len(COLOURS)])
        draw.text((x + 7, y + 8), str(number + 1), fill="black", font=font, anchor="mm")
    return tile


def draw_sheet(sheet: Sheet) -> Image.Image:
    """The picture as a PIL image: a labelled row each of images, crops seen, one-step and guided."""
    count, side = sheet.images.shape[0], sheet.images.shape[-1]
    factor = max(1, round(TILE / side))
    size = side * factor
    crops = "1 crop seen" if sheet.corners.shape[0] == 1 else f"{sheet.corners.shape[0]} crops seen\nin order"
    seen = zip(sheet.images, sheet.corners.unbind(1), strict=True)
    rows = [
        ("image", [_tile(image, factor) for image in sheet.images]),
        (crops, [_crops_tile(image, corners, sheet.crop, factor) for image, corners in seen]),
        ("one step\nno guidance", [_tile(image, factor) for image in sheet.one_step]),
        (sheet.guided_label, [_tile(image, factor) for image in sheet.guided]),
    ]
    step = size + GAP
    picture = Image.new("RGB", (LABEL + count * step, GAP + len(rows) * step), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(18)
    for row, (label, tiles) in enumerate(rows):
        y = GAP + row * step
        draw.multiline_text((LABEL - 12, y + size // 2), label, "black", font, anchor="rm", align="right")
        for column, tile in enumerate(tiles):
            picture.paste(tile, (LABEL + column * step, y))
    return picture


def save_picture(sheet: Sheet, path: Path) -> None:
    """Write :func:`draw_sheet` as a PNG."""
    with atomic_path(path) as temporary:
        draw_sheet(sheet).save(temporary, format="PNG")
