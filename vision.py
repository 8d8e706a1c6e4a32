"""From a picture file to patch features.

This file explains how a picture is opened (`load_image`), turned into the numbers that CLIP was trained on
(`preprocess`), and read by a vision transformer: CLIP's (`ViT`) or Qwen-VL's with its resampler (`QwenViT`). Sources:
CLIP (arXiv:2103.00020), openai/CLIP clip/model.py; Qwen-VL (arXiv:2308.12966), visual.py beside its weights. Module
names are those of the published weights, which load without a table. Not here: the projection into the language
model, and the reading of weights (model.py).

Shapes: N images, S pixels a side, P tokens of an image (patches and the class token), Dv width, H heads, d head width.
"""
import argparse
import base64
import json
import math
import warnings
from collections import OrderedDict
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """What the user gave cannot be used. The message names thing and remedy; programs print it and exit with 2."""


def reason_of(error):
    """What an exception says, its first three lines as one"""
    said = getattr(error, "strerror", None) or str(error) or repr(error)
    return " ".join(map(str.strip, said.splitlines()[:3]))


def number(kind, low, below=math.inf):
    """For argparse: a function that reads an int or a float from low to below another"""
    def read(text):
        with suppress(ValueError):
            if low <= kind(text) < below:
                return kind(text)
        what, most = "whole number" if kind is int else "number", "" if below == math.inf else f" and below {below}"
        raise argparse.ArgumentTypeError(f"{text!r} is no {what} from {low}{most}")
    return read


positive = number(int, 1)


def read_json(path, kind=dict):
    """The object, or with kind=list the list, in a JSON file; InputError with the file and where in it the fault is."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {reason_of(error)}") from error
    if not isinstance(content, kind):
        raise InputError(f"{path} holds no JSON {'object' if kind is dict else 'list'}")
    return content


def write_whole(file, text):
    """Write a text file under another name and rename it when it is whole; InputError if the disk does not take it"""
    unfinished = Path(f"{file}.unfinished")
    try:
        with open(unfinished, "w", newline="", encoding="utf-8", errors="replace") as content:
            content.write(text)
        unfinished.replace(file)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(f"{file} cannot be written: {reason_of(error)}") from error


def checkpoint_path(path):
    """A path, OUT/best or in it followed: train.py writes best as a file with the name of the best checkpoint"""
    path = Path(path)
    for best in (path, path.parent):
        if best.name == "best" and best.is_file():
            return best.parent / best.read_text(errors="replace").strip() / path.relative_to(best)
    return path


def read_config(file):
    """The settings of a config.json but those that are null, which stand for the default"""
    return {name: value for name, value in read_json(file).items() if value is not None}


def read_section(config, name):
    """A part of a config.json that is itself an object, {} if it is not there; without what is null"""
    section = {} if config.get(name) is None else config[name]
    if not isinstance(section, dict):
        raise InputError(f"config.json: {name} is {section!r}, not an object")
    return {name: value for name, value in section.items() if value is not None}


def make_config(kind, what, file, section):
    """A dataclass of sizes from a section of a config.json; InputError names what is missing or no size"""
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in section]
    if missing:
        raise InputError(f"{file} is not that of {what}: {', '.join(missing)} missing")
    config = kind(**{f.name: section[f.name] for f in fields(kind) if f.name in section})
    for f in fields(kind):
        value = getattr(config, f.name)
        size = f.type in (int, float) and f.name != "feature_layer"
        if size and not (isinstance(value, (int, f.type)) and (f.type is int) <= value < math.inf):
            raise InputError(f"{file}: {f.name} is {value!r}, not a positive {f.type.__name__}")
    return config


# ---- pictures ------------------------------------------------------------------------------------------------------

CLIP_PREPROCESSING = {"image_mean": [0.48145466, 0.4578275, 0.40821073],  # of openai/clip-vit-large-patch14
                      "image_std": [0.26862954, 0.26130258, 0.27577711]}
STEPS = {"do_convert_rgb": True, "do_resize": True, "resample": 3, "do_center_crop": True, "do_rescale": True,
         "rescale_factor": 1 / 255, "do_normalize": True}  # those of `preprocess`; 3 is bicubic
# long text beside the pixels is no reason to refuse them
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def load_image(path):
    """Open a picture as PIL RGB. path: a file, or (file, offset, length) for base64 text inside a JSON file.

    It is turned as its EXIF orientation says (CLIP's own code does not: a phone's photograph would lie on its side),
    transparency is laid on white, 16 and 32 bits are scaled, of an animation the first frame is taken. A JPEG of more
    than 89 megapixels is decoded at a part of its size. InputError with path and reason if it cannot be read."""
    source = path
    try:
        if isinstance(path, tuple):
            file, offset, length = path
            path = f"{file}, bytes {offset} to {offset + length}"
            with open(file, "rb") as content:
                content.seek(offset)
                source = BytesIO(base64.b64decode(content.read(length).replace(b"\\/", b"/"), validate=True))
        with warnings.catch_warnings(action="ignore"), Image.open(source) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # a phone's; Pillow refuses twice as many
                image.draft(None, (2048, 2048))
            image.filename = ""  # a file with a name is mapped, and a mapped TIFF is turned wrong (Pillow 13.0)
            image.load()
            turn = None
            with suppress(Exception):  # what cannot be read of the metadata is as if it was not there
                turn = image.getexif().get(ExifTags.Base.Orientation)
            clear = image.info.get("transparency")
            if isinstance(clear, tuple) and max(clear) > 255:  # of a PNG of 16 bits, which Pillow has brought to 8
                image.info["transparency"] = tuple(part >> 8 for part in clear)
            if image.mode[0] in "IF":
                image = to_8_bits(image, clear)
            if image.mode != "RGB" or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            if turn in range(2, 9):
                image.info = {}  # exif_transpose would write it back, and fail where it is odd
                image.getexif()[ExifTags.Base.Orientation] = turn
                image = ImageOps.exif_transpose(image)
            return image
    except Exception as error:  # a decoder may raise anything
        raise InputError(f"picture {path} cannot be read: {reason_of(error)}") from error


def to_8_bits(image, clear):
    """Grey of 16 or 32 bits a pixel -> 8 bits, the transparent grey white. 32 bits have no agreed white: it is 1 for
    floats (a filter may pass that by a little), 255, 65535 or the brightest pixel, as the pixels need it"""
    pixels = np.asarray(image).astype(np.float32)
    most = np.nan_to_num(pixels, posinf=0).max()
    white = max(65535, most) if "16" in image.mode or most > 255 else 255
    if image.mode == "F" and most < 2:
        white = 1
    pixels[pixels == clear] = white
    return Image.fromarray(np.nan_to_num(pixels.clip(0, white) * 255 / white).astype(np.uint8))


def read_preprocessing(folder, image_size):
    """preprocessor_config.json of a folder as a dict, or CLIP's own for pictures of image_size where there is none."""
    file = Path(folder) / "preprocessor_config.json"
    config = {"size": image_size, "crop_size": image_size, **CLIP_PREPROCESSING}
    if file.exists():
        config |= read_config(file)
    for name, value in config.items():
        if (name in STEPS or name.startswith("do_")) and value != STEPS.get(name, False):
            raise InputError(f"{file}: {name} = {value!r} is not supported, only {STEPS.get(name, False)}")
    try:
        made = tuple(preprocess(Image.new("RGB", (image_size, image_size)), config).shape)
    except Exception as error:  # whatever it is, it comes from the file
        raise InputError(f"{file} cannot be used: {reason_of(error)}") from error
    if made != (3, image_size, image_size):
        raise InputError(f"{file} makes pictures of {made}, the vision model takes (3, {image_size}, {image_size})")
    return config


def middle(image, width, height):
    """The middle of a picture; black surrounds a smaller one"""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fit(image, config):
    """PIL picture -> the part of it that counts, and in (width, height) what `preprocess` makes of that: its size when
    it is fitted, and the size of the middle that is kept. A picture more than 500 times as long as wide counts with
    its middle alone: all of a thread would take gigabytes."""
    longest = 500 * min(image.size)
    if max(image.size) > longest:
        image = middle(image, *(min(side, longest) for side in image.size))
    size, crop = config["size"], config.get("crop_size", config["size"])
    if isinstance(size, int) or "shortest_edge" in size:
        short = size if isinstance(size, int) else size["shortest_edge"]
        fitted = tuple(int(short * side / min(image.size)) for side in image.size)  # cut to an integer, not rounded
    else:
        fitted = size["width"], size["height"]
    kept = (crop, crop) if isinstance(crop, int) else (crop.get("width", fitted[0]), crop.get("height", fitted[1]))
    return image, fitted, kept


def preprocess(image, config):
    """PIL RGB -> (3, S, S) float32, exactly as CLIP does: shorter side to `size`, centre crop, mean and deviation.

    config: the content of preprocessor_config.json, in the old spelling ("size": 224) or the new one
    ("size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}); height and width squash."""
    image, fitted, kept = fit(image, config)
    image = middle(image.resize(fitted, Image.Resampling.BICUBIC), *kept)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("image_mean", "image_std"))  # (3, 1, 1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float()         # (3, S, S)
    return pixels.div_(255).sub_(mean).div_(std)                                             # (3, S, S)


# ---- the CLIP vision transformer -----------------------------------------------------------------------------------

@dataclass
class ViTConfig:
    """Sizes of a CLIP vision tower, under the names of its config.json; the defaults are those of CLIP-B/32, which
    transformers leaves out. feature_layer and class_token say what of it the language model sees: -1 is the output of
    the last layer (the post), -2 that of the layer before (LLaVA)."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02  # of the places and the class token in a tower made from nothing
    feature_layer: int = -1
    class_token: bool = True

    @property
    def image_tokens(self):
        """P: how many positions an image takes"""
        return (self.image_size // self.patch_size) ** 2 + self.class_token

    @classmethod
    def read(cls, folder):
        """From the config.json of a CLIPVisionModel or, under vision_config, of a whole CLIPModel."""
        file = Path(folder) / "config.json"
        whole = read_config(file)
        section = read_section(whole, "vision_config") | read_section(whole, "vision_config_dict") or whole
        kind = section.get("model_type", whole.get("model_type", "clip" if "hidden_size" in section else None))
        if kind not in ("clip", "clip_vision_model"):
            raise InputError(f"{file} is not that of a CLIP vision model: model_type is {kind!r}")
        config = make_config(cls, "a CLIP vision model", file, section)
        if config.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise InputError(f"{file}: hidden_act {config.hidden_act!r} is not supported, only {known}")
        return config


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), with one tensor beside x"""

    def forward(self, x):
        """x (...) -> (...)"""
        return F.silu(1.702 * x, inplace=True).div_(1.702)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def multi_head(q, k, v):
    """softmax(QK' / sqrt(d)) V of each head: q (N, n, H, d), k and v (N, P, H, d) -> the heads joined (N, n, H d)"""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))            # (N, H, n, d)
    return out.transpose(1, 2).flatten(2)                                                    # (N, n, H d)


class ViTAttention(nn.Module):
    """Every patch attends to every patch of its image."""

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        """x (N, P, Dv) -> (N, P, Dv)"""
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(x).unflatten(2, (self.heads, -1)) for project in projections)     # (N, P, H, d)
        return self.out_proj(multi_head(q, k, v))                                            # (N, P, Dv)


class ViTLayer(nn.Module):
    """One block, layer norm first: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(D, config.layer_norm_eps) for _ in range(2))
        self.self_attn = ViTAttention(config)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(D, F_), act=ACTIVATIONS[config.hidden_act](),
                                             fc2=nn.Linear(F_, D)))

    def forward(self, x):
        """x (N, P, Dv) -> (N, P, Dv)"""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ViTEmbeddings(nn.Module):
    """Cut the picture into patches, make a vector of each, put the class token before them, add the positions."""

    def __init__(self, config):
        super().__init__()
        D, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(D) * config.initializer_range)
        self.patch_embedding = nn.Conv2d(3, D, config.patch_size, config.patch_size, bias=False)
        places = torch.randn(patches + 1, D) * config.initializer_range                      # (P, Dv)
        self.position_embedding = nn.Embedding.from_pretrained(places, freeze=False)

    def forward(self, pixels):
        """pixels (N, 3, S, S) -> (N, P, Dv), class token first"""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)                    # (N, P - 1, Dv)
        first = self.class_embedding.expand(len(patches), 1, -1)                             # (N, 1, Dv)
        places = torch.arange(patches.shape[1] + 1, device=pixels.device)                    # (P)
        return torch.cat([first, patches], 1) + self.position_embedding(places)              # (N, P, Dv)


class ViT(nn.Module):
    """CLIP's vision transformer, whose features are the hidden states of one layer, without CLIP's final norm."""

    gradient_checkpointing = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = ViTEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # the published spelling
        layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # kept; no feature passes it

    def forward(self, pixels):
        """pixels (N, 3, S, S) -> features (N, P, Dv)"""
        check_pixels(pixels, self.config.image_size)
        x = self.pre_layrnorm(self.embeddings(pixels))                                       # (N, P, Dv)
        for layer in self.blocks:
            x = apply(layer, x, again=self.gradient_checkpointing)                           # (N, P, Dv)
        return x if self.config.class_token else x[:, 1:]

    @property
    def blocks(self):
        """The layers that a feature passes"""
        return self.encoder["layers"][:self.config.num_hidden_layers + 1 + self.config.feature_layer]

    @property
    def untrained(self):
        """What is never trained, since no feature passes it"""
        return [self.post_layernorm, *self.encoder["layers"][len(self.blocks):]]


# ---- Qwen-VL's vision transformer and its resampler ----------------------------------------------------------------

@dataclass
class QwenConfig:
    """Sizes of Qwen-VL's picture encoder, under the names of the section `visual` of its config.json. n_queries is not
    in published files: it is the number of rows of attn_pool.query."""
    width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    mlp_ratio: float
    output_dim: int
    n_queries: int = 256
    feature_layer, class_token = -1, False  # as in ViTConfig, but there is no choice

    # what a projection asks of a vision tower; the last two are those of the CLIP block in projection "vit"
    hidden_size = property(lambda self: self.output_dim)
    image_tokens = property(lambda self: self.n_queries)
    num_attention_heads = property(lambda self: self.heads)
    intermediate_size = property(lambda self: int(self.mlp_ratio * self.width))
    hidden_act, layer_norm_eps = "gelu", 1e-5

    @classmethod
    def read(cls, folder):
        """From the config.json of a Qwen-VL checkpoint"""
        file = Path(folder) / "config.json"
        config = make_config(cls, "Qwen-VL's picture encoder", file, read_section(read_json(file), "visual"))
        if config.intermediate_size < 1:
            raise InputError(f"{file}: mlp_ratio {config.mlp_ratio} of width {config.width} is less than one row")
        if config.width % config.heads:
            raise InputError(f"{file}: width {config.width} is no multiple of {config.heads} heads")
        return config


class QwenAttention(nn.Module):
    """Every patch attends to every patch; in_proj gives query, key and value of head 0, then those of head 1, ..."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.in_proj, self.out_proj = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x):
        """x (N, P, Dv) -> (N, P, Dv)"""
        q, k, v = self.in_proj(x).unflatten(2, (self.heads, 3, -1)).unbind(3)                # (N, P, H, d)
        return self.out_proj(multi_head(q, k, v))                                            # (N, P, Dv)


class QwenBlock(nn.Module):
    """One block, layer norm first: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        D, F_ = config.width, config.intermediate_size
        self.ln_1, self.ln_2 = (nn.LayerNorm(D, eps=1e-6) for _ in range(2))
        self.attn = QwenAttention(config)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(D, F_), gelu=nn.GELU(), c_proj=nn.Linear(F_, D)))

    def forward(self, x):
        """x (N, P, Dv) -> (N, P, Dv)"""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def fixed_positions(side, D):
    """Sines and cosines of a side x side grid, row by row -> (side * side, D): D / 2 numbers of the column, then D / 2
    of the row, each sines and then cosines of place / 10000^(i / (D / 4))."""
    angles = np.arange(side)[:, None] / 10000 ** (np.arange(D // 4) / (D // 4))  # in float64
    line = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], 1)).float()     # (side, D / 2)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], 1)             # (side * side, D)


def resize_positions(table, side):
    """Positions (n, D) of a square grid -> (side * side, D) of a finer or coarser one: bicubic, not antialiased"""
    old = math.isqrt(len(table))
    if old == side:
        return table
    square = table.float().T.unflatten(1, (old, old))                                        # (D, old, old)
    square = F.interpolate(square[None], (side, side), mode="bicubic", align_corners=False)[0]   # (D, side, side)
    return square.flatten(1).T.to(table.dtype)                                               # (side * side, D)


class ResamplerAttention(nn.Module):
    """Queries of their own attend to every key: softmax(QK' / sqrt(d)) V. Weights as in torch's MultiheadAttention."""

    def __init__(self, D):
        super().__init__()
        self.heads = D // 128
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * D, D)))  # of all q, all k, all v
        self.in_proj_bias, self.out_proj = nn.Parameter(torch.zeros(3 * D)), nn.Linear(D, D)

    def forward(self, queries, keys, values):
        """queries (n, D), keys and values (N, P, D) -> (N, n, D)"""
        inputs = zip((queries[None], keys, values), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(*each).unflatten(2, (self.heads, -1)) for each in inputs)        # (N or 1, n or P, H, d)
        return self.out_proj(multi_head(q.expand(len(k), -1, -1, -1), k, v))                 # (N, n, D)


class Resampler(nn.Module):
    """n learned queries look at the features of a picture, which are P before and n after it (Qwen-VL, section 2.1).

    width: of the features; D: of the result, at least 128 and a multiple of its D // 128 heads."""

    def __init__(self, width, D, queries=256, eps=1e-6, kv_proj=None):
        super().__init__()
        if D < 128 or D % (D // 128) or D % 4 or math.isqrt(queries) ** 2 != queries:
            raise InputError(f"a resampler of width {D} with {queries} queries cannot be made: the width is at least "
                             "128 and a multiple of 4 and of its width // 128 heads, the queries are a square number")
        self.query, self.attn = nn.Parameter(torch.empty(queries, D)), ResamplerAttention(D)
        self.pos_embed = nn.Parameter(torch.empty(queries, D).copy_(fixed_positions(math.isqrt(queries), D)))
        self.kv_proj = kv_proj or (nn.Identity() if width == D else nn.Linear(width, D, bias=False))
        self.ln_q, self.ln_kv = (nn.LayerNorm(D, eps) for _ in range(2))
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, x):
        """x (N, P, Dv) -> (N, n, D). Positions are added to queries and keys, not to values."""
        values = self.ln_kv(self.kv_proj(x))                                                 # (N, P, D)
        keys = values + resize_positions(self.pos_embed, math.isqrt(x.shape[1]))             # (N, P, D)
        return self.attn(self.ln_q(self.query) + self.pos_embed, keys, values)               # (N, n, D)

    untrained = property(lambda self: [self.pos_embed])  # a fixed table


class QwenViT(nn.Module):
    """Qwen-VL's encoder, whose features are what its resampler makes of the patches: no class token, no projection."""

    gradient_checkpointing = False

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.width
        self.conv1 = nn.Conv2d(3, D, config.patch_size, config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(256, D) * 0.02)  # 16 x 16 patches, whatever the picture
        self.ln_pre = nn.LayerNorm(D, eps=1e-6)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(QwenBlock(config) for _ in range(config.layers))})
        self.attn_pool = Resampler(D, config.output_dim, config.n_queries)
        self.ln_post = nn.LayerNorm(config.output_dim, eps=1e-6)

    def forward(self, pixels):
        """pixels (N, 3, S, S) -> features (N, P, Dv): P queries, Dv output_dim"""
        check_pixels(pixels, self.config.image_size)
        x = self.conv1(pixels)                                                       # (N, width, side, side)
        places = resize_positions(self.positional_embedding, x.shape[2])                     # (side * side, width)
        x = self.ln_pre(x.flatten(2).transpose(1, 2) + places)                       # (N, side * side, width)
        for block in self.blocks:
            x = apply(block, x, again=self.gradient_checkpointing)                   # (N, side * side, width)
        return self.ln_post(self.attn_pool(x))                                               # (N, P, Dv)

    blocks = property(lambda self: self.transformer["resblocks"])  # the layers before the resampler


def apply(layer, *inputs, again=False):
    """layer(*inputs). again: what its gradient needs is not kept but computed again (arXiv:1604.06174)"""
    if again and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return layer(*inputs)


def check_pixels(pixels, size):
    """InputError unless pixels are (N, 3, size, size)"""
    if pixels.shape[1:] != (3, size, size):
        raise InputError(f"the vision model takes pictures (3, {size}, {size}), not {tuple(pixels.shape[1:])}: "
                         "does preprocessor_config.json belong to it?")


def read_vit_config(folder, feature_layer=-1, class_token=True):
    """QwenConfig if the config.json of a folder has a section `visual`, else ViTConfig with these features"""
    if "visual" in read_json(Path(folder) / "config.json"):
        config, layers = QwenConfig.read(folder), 1
    else:
        config = ViTConfig.read(folder)
        config.feature_layer, config.class_token, layers = feature_layer, class_token, config.num_hidden_layers
    if not -layers <= feature_layer <= -1:
        raise InputError(f"feature layer {feature_layer}: {folder} gives the features of its layers -{layers} to -1, "
                         "counted from the last")
    return config


def count_image_tokens(projection, vision):
    """P: how many positions a picture takes, projection and vision tower being these"""
    return 256 if projection == "perceiver" else vision.image_tokens
