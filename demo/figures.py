#!/usr/bin/env python3
"""Draw README's two pictures with what the project itself computes.

    python demo/figures.py     assets/samples.png   the three sample pictures under their numbers
                               assets/mmca.png      M of figure 2 under CA, CrA and MMCA, in colours
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from mmca import IMAGE, TEXT, attention_matrix  # noqa: E402

WORDS = "User : <image1> <image2> <image3> Please describe the image .".split()
COLOURS = {0: "#f0f0f0", 1: "#3b6fb5", 2: "#f28e2b"}  # not seen, the first softmax, the second
NAMES = {
    1: "first softmax: words, and an image token itself",
    2: "second softmax (CrA: of an added layer): image tokens"}
CELL = 22  # pixels of an entry
GAP = 26   # between two matrices
LEFT = 92  # room for the words beside the rows
TOP = 34   # and for the names above


def samples():
    """The pictures of demo/samples side by side, each under its number"""
    side = 160
    files = sorted((ROOT / "demo/samples").glob("*.jpg"))
    sheet = Image.new("RGB", (len(files) * (side + GAP) - GAP, side + TOP), "white")
    draw = ImageDraw.Draw(sheet)
    for n, file in enumerate(files):
        left = n * (side + GAP)
        picture = Image.open(file).resize((side, side), Image.Resampling.BICUBIC)
        draw.text((left, 6), f"image {n + 1}", "black", font_size=18)
        draw.rectangle([left, TOP - 1, left + side - 1, TOP + side - 1], outline="#c0c0c0")
        sheet.paste(picture.crop((1, 1, side - 1, side - 1)), (left + 1, TOP))
    return sheet


def matrices():
    """M of a sequence: a row is a query, a column a key"""
    modality = torch.tensor([
        [IMAGE if word.startswith("<image") else TEXT for word in WORDS]])  # (1, T)
    mmca = attention_matrix(modality, modality)[0]                          # (T, T)
    causal = attention_matrix(modality, modality, "causal")[0]              # (T, T)
    # image tokens do not pass the decoder
    cross = mmca * (modality[0] == TEXT)[:, None]                           # (T, T)
    width = len(WORDS) * CELL
    sheet = Image.new("RGB", (LEFT + 3 * (width + GAP), TOP + width + 40), "white")
    draw = ImageDraw.Draw(sheet)
    for row, word in enumerate(WORDS):
        draw.text((LEFT - 8, TOP + row * CELL + 3), word, "black", font_size=14, anchor="ra")
    for n, (name, M) in enumerate((("CA", causal), ("CrA", cross), ("MMCA", mmca))):
        left = LEFT + n * (width + GAP)
        draw.text((left, 8), name, "black", font_size=18)
        for row, entries in enumerate(M.tolist()):
            for column, entry in enumerate(entries):
                x = left + column * CELL
                y = TOP + row * CELL
                draw.rectangle([x, y, x + CELL - 2, y + CELL - 2], COLOURS[entry])
    for n, (entry, name) in enumerate(NAMES.items()):
        x = LEFT + n * 350
        y = TOP + width + 12
        draw.rectangle([x, y, x + 14, y + 14], COLOURS[entry])
        draw.text((x + 22, y - 2), name, "black", font_size=14)
    return sheet


def main():
    """Write both"""
    samples().save(ROOT / "assets/samples.png", optimize=True)
    matrices().save(ROOT / "assets/mmca.png", optimize=True)


if __name__ == "__main__":
    main()
