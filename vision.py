"""From a picture file to patch features.

This file explains how a picture is turned into the numbers that CLIP was trained on (`preprocess`),
and read by a vision transformer: CLIP's (`ViT`) or Qwen-VL's with its resampler (`QwenViT`); below
the line, how it is opened (`load_image`). Sources: CLIP (arXiv:2103.00020), openai/CLIP
clip/model.py; Qwen-VL (arXiv:2308.12966), visual.py beside its weights. Module names are those of
the published weights, which load without a table. Not here: the projection into the language model,
and the reading of weights (model.py).

Another tower takes a config with hidden_size and image_tokens, a branch in `read_vit_config`, a
module with config, blocks (its layers, for LoRA and compiling), untrained and
gradient_checkpointing, and a line in model.py's make_vit.

Shapes: N images, S pixels a side, P tokens of an image (patches and the class token), Dv width, H
heads, d head width.
"""
import argparse
import base64
import json
import math
import os
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch.utils.checkpoint import checkpoint


# ---- pixels --------------------------------------------------------------------------------------

def preprocess(image, config):
    """PIL RGB -> (3, S, S) float32, exactly as CLIP does: the numbers of what `fit` leaves of the
    picture, less CLIP's mean, divided by its deviation. config: what `read_preprocessing` gives."""
    pixels = torch.from_numpy(np.array(fit(image, config))).float()         # (S, S, 3)
    # mean and deviation over the pictures that CLIP was trained on, from 0 to 1
    mean = torch.tensor(config["image_mean"])                               # (3)
    std = torch.tensor(config["image_std"])                                 # (3)
    pixels = pixels.div_(255).sub_(mean).div_(std)                          # (S, S, 3)
    return pixels.permute(2, 0, 1).contiguous()                             # (3, S, S)


def fit(image, config):
    """PIL picture -> the S x S picture that the model sees: resized so that the shorter side is
    shortest_edge, or to height and width; then its middle is cut out, with black around a smaller
    one."""
    size = config["size"]
    if "shortest_edge" in size:
        # the other side is cut to an integer, not rounded, as CLIP does
        width, height = [size["shortest_edge"] * side // min(image.size) for side in image.size]
    else:
        width, height = size["width"], size["height"]
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    S = config["crop_size"]["height"]
    left = (width - S) // 2
    top = (height - S) // 2
    return image.crop((left, top, left + S, top + S))


# ---- CLIP's vision transformer -------------------------------------------------------------------

class ViTEmbeddings(nn.Module):
    """Cut the picture into patches, make a vector of each, put the class token before them, add the
    positions."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(D))
        # a step as long as the patch: one matrix for every patch
        self.patch_embedding = nn.Conv2d(3, D, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(patches + 1, D)

    def forward(self, pixels):
        """pixels (N, 3, S, S) -> (N, P, Dv), class token first"""
        # (N, Dv, side, side) -> row by row
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)   # (N, P - 1, Dv)
        first = self.class_embedding.expand(len(patches), 1, -1)            # (N, 1, Dv)
        x = torch.cat([first, patches], 1)                                  # (N, P, Dv)
        # all there are: a picture of another size does not fit
        places = torch.arange(self.position_embedding.num_embeddings, device=x.device)      # (P)
        return x + self.position_embedding(places)                          # (N, P, Dv)


class ViTAttention(nn.Module):
    """Every patch attends to every patch of its image."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x):
        """x (N, P, Dv) -> (N, P, Dv)"""
        heads = self.heads, -1
        q = self.q_proj(x).unflatten(2, heads)                              # (N, P, H, d)
        k = self.k_proj(x).unflatten(2, heads)                              # (N, P, H, d)
        v = self.v_proj(x).unflatten(2, heads)                              # (N, P, H, d)
        return self.out_proj(multi_head(q, k, v))                           # (N, P, Dv)


def multi_head(q, k, v):
    """softmax(QK' / sqrt(d)) V of each head: q, k, v (N, P, H, d) -> the heads joined (N, P, Dv)"""
    # no mask: a picture has no before and after
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))            # (N, H, P, d)
    return out.transpose(1, 2).flatten(2)                                   # (N, P, Dv)


class ViTLayer(nn.Module):
    """One block, layer norm first: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.layer_norm1 = nn.LayerNorm(D, config.layer_norm_eps)
        self.self_attn = ViTAttention(config)
        self.layer_norm2 = nn.LayerNorm(D, config.layer_norm_eps)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(D, inner),
            act=ACTIVATIONS[config.hidden_act](),
            fc2=nn.Linear(inner, D)))

    def forward(self, x):
        """x (N, P, Dv) -> (N, P, Dv)"""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ViT(nn.Module):
    """CLIP's vision transformer, whose features are the hidden states of one layer, without CLIP's
    final norm."""
    gradient_checkpointing = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = ViTEmbeddings(config)
        # the published spelling
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(
            ViTLayer(config) for _ in range(config.num_hidden_layers))})
        # of the class token alone, for CLIP's comparison with a text: no feature passes it, it is
        # kept for who opens a checkpoint with transformers
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels):
        """pixels (N, 3, S, S) -> features (N, P, Dv)"""
        x = self.pre_layrnorm(self.embeddings(pixels))                      # (N, P, Dv)
        for layer in self.blocks:
            x = apply(layer, x, again=self.gradient_checkpointing)          # (N, P, Dv)
        return x if self.config.class_token else x[:, 1:]                   # (N, P, Dv)

    @property
    def blocks(self):
        """The layers that a feature passes"""
        # -1 is the output of the last layer, -2 that of the one before
        return self.encoder["layers"][
            :self.config.num_hidden_layers + 1 + self.config.feature_layer]

    @property
    def untrained(self):
        """What is never trained, since no feature passes it"""
        return [self.post_layernorm, *self.encoder["layers"][len(self.blocks):]]


# ---- Qwen-VL's vision transformer and its resampler ----------------------------------------------

class QwenAttention(nn.Module):
    """Every patch attends to every patch of its image."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.in_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x):
        """x (N, P, Dv) -> (N, P, Dv)"""
        # query, key and value of head 0, then those of head 1, ...
        qkv = self.in_proj(x).unflatten(2, (self.heads, 3, -1))             # (N, P, H, 3, d)
        return self.out_proj(multi_head(*qkv.unbind(3)))                    # (N, P, Dv)


class QwenBlock(nn.Module):
    """One block, layer norm first: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        D, inner = config.width, config.intermediate_size
        self.ln_1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = QwenAttention(config)
        self.ln_2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(D, inner),
            gelu=nn.GELU(),
            c_proj=nn.Linear(inner, D)))

    def forward(self, x):
        """x (N, P, Dv) -> (N, P, Dv)"""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Resampler(nn.Module):
    """n learned queries look at the features of a picture, which are P before and n after it
    (Qwen-VL, section 2.1).

    width: of the features; D: of the result, at least 128 and a multiple of its D // 128 heads."""

    def __init__(self, width, D, queries=256, eps=1e-6, bias=False):
        super().__init__()
        if D < 128 or D % (D // 128):
            raise InputError(f"a resampler of width {D} cannot be made: the width is at least 128 "
                             "and a multiple of its width // 128 heads")
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(queries, D), std=0.02))
        # a fixed table; a parameter since the published files hold it
        self.pos_embed = nn.Parameter(torch.empty(queries, D))
        self.pos_embed.data.copy_(fixed_positions(math.isqrt(queries), D))
        self.attn = nn.MultiheadAttention(D, D // 128, batch_first=True)
        self.kv_proj = nn.Linear(width, D, bias)
        self.ln_q = nn.LayerNorm(D, eps)
        self.ln_kv = nn.LayerNorm(D, eps)

    def forward(self, x):
        """x (N, P, Dv) -> (N, n, D)"""
        values = self.ln_kv(self.kv_proj(x))                                # (N, P, D)
        # positions are added to what is compared, not to what is taken
        keys = values + resize_positions(self.pos_embed, math.isqrt(x.shape[1]))    # (N, P, D)
        queries = (self.ln_q(self.query) + self.pos_embed).expand(
            len(x), -1, -1)                                                 # (N, n, D)
        return self.attn(queries, keys, values, need_weights=False)[0]      # (N, n, D)

    @property
    def untrained(self):
        """What is never trained"""
        return [self.pos_embed]


class QwenViT(nn.Module):
    """Qwen-VL's encoder, whose features are what its resampler makes of the patches: no class
    token, no projection."""
    gradient_checkpointing = False

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.config = config
        self.conv1 = nn.Conv2d(3, D, config.patch_size, config.patch_size, bias=False)
        # of 16 x 16 patches, whatever the size of the picture
        self.positional_embedding = nn.Parameter(torch.randn(256, D) * 0.02)
        self.ln_pre = nn.LayerNorm(D, eps=1e-6)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(
            QwenBlock(config) for _ in range(config.num_hidden_layers))})
        self.attn_pool = Resampler(D, config.hidden_size, config.n_queries)
        self.ln_post = nn.LayerNorm(config.hidden_size, eps=1e-6)

    def forward(self, pixels):
        """pixels (N, 3, S, S) -> features (N, P, Dv): P queries, Dv hidden_size"""
        x = self.conv1(pixels)                                              # (N, width, side, side)
        places = resize_positions(self.positional_embedding, x.shape[2])    # (side side, width)
        x = x.flatten(2).transpose(1, 2)                                    # (N, side side, width)
        x = self.ln_pre(x + places)                                         # (N, side side, width)
        for block in self.blocks:
            x = apply(block, x, again=self.gradient_checkpointing)          # (N, side side, width)
        return self.ln_post(self.attn_pool(x))                              # (N, P, Dv)

    @property
    def blocks(self):
        """The layers before the resampler"""
        return self.transformer["resblocks"]


# ---- what serves it: configurations --------------------------------------------------------------

@dataclass
class ViTConfig:
    """Sizes of a CLIP vision tower, under the names of its config.json; the defaults are those of
    CLIP-B/32, which transformers leaves out. feature_layer and class_token say what of it the
    language model sees: -1 is the output of the last layer (the post), -2 that of the layer before
    (LLaVA)."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    feature_layer: int = -1
    class_token: bool = True

    @property
    def image_tokens(self):
        """P: how many positions an image takes"""
        return (self.image_size // self.patch_size) ** 2 + self.class_token


@dataclass
class QwenConfig(ViTConfig):
    """Sizes of Qwen-VL's picture encoder, under the names of CLIP's, translated as they are read:
    hidden_size is that of the features, width that of the blocks. n_queries is not in published
    files: it is the number of rows of attn_pool.query."""
    width: int = 1664
    n_queries: int = 256
    visual: dict | None = None  # what it was read from, for the config.json of a checkpoint

    @property
    def image_tokens(self):
        """P: how many positions an image takes"""
        return self.n_queries


def read_vit_config(folder, feature_layer=-1, class_token=True):
    """From a folder's config.json: QwenConfig if it has a section `visual`, else ViTConfig with
    these features, of a CLIPVisionModel or, under vision_config, of a whole CLIPModel"""
    file = Path(folder) / "config.json"
    whole = read_config(file)
    section = read_section(whole, "vision_config") or whole
    if "visual" in whole:
        config = qwen_config(read_section(whole, "visual"), file)
        layers = 1
    elif section.get("model_type", whole.get("model_type")) in ("clip", "clip_vision_model"):
        config = make_config(ViTConfig, file, section)
        config.feature_layer = feature_layer
        config.class_token = class_token
        layers = config.num_hidden_layers
        if config.hidden_act not in ACTIVATIONS:
            raise InputError(f"{file}: hidden_act = {config.hidden_act!r} is not supported, only "
                             f"{' and '.join(ACTIVATIONS)}")
    else:
        raise InputError(f"{file} is not that of a CLIP vision model: its model_type is neither "
                         "clip nor clip_vision_model")
    if not -layers <= feature_layer <= -1:
        raise InputError(f"feature layer {feature_layer}: {folder} gives the features of its "
                         f"layers -{layers} to -1, counted from the last")
    return config


def qwen_config(visual, file):
    """The section `visual` of the config.json of a Qwen-VL checkpoint, translated"""
    try:
        return QwenConfig(
            hidden_size=visual["output_dim"],
            intermediate_size=int(visual["mlp_ratio"] * visual["width"]),
            num_hidden_layers=visual["layers"],
            num_attention_heads=visual["heads"],
            image_size=visual["image_size"],
            patch_size=visual["patch_size"],
            hidden_act="gelu",
            class_token=False,
            width=visual["width"],
            visual=visual)
    except KeyError as error:
        raise InputError(f"{file} is not that of Qwen-VL's picture encoder: {error} missing in its "
                         "section visual") from error


def read_checkpoint(folder):
    """The model in a checkpoint that train.py wrote, under the names of train.py's flags: its two
    folders, and from config.json how they are joined"""
    model = {
        "language_model": folder / "language_model",
        "vision_model": folder / "vision_model"}
    config = read_config(folder / "config.json")
    try:
        for name in ("attention", "projection", "feature_layer", "class_token"):
            model[name] = config[name]
    except KeyError as error:
        raise InputError(f"{folder}/config.json is not that of a checkpoint of train.py: {error} "
                         "missing") from error
    return model


def make_config(kind, file, section):
    """A dataclass of sizes from a section of a config.json; InputError names what is missing"""
    known = {f.name: section[f.name] for f in fields(kind) if f.name in section}
    try:
        return kind(**known)
    except TypeError as error:
        raise InputError(f"{file} has not all sizes: {reason_of(error)}") from error


def count_image_tokens(projection, vision):
    """P: how many positions a picture takes with a projection and the sizes of a vision tower; the
    perceiver's are the queries of `Resampler`"""
    return 256 if projection == "perceiver" else vision.image_tokens


# ---- what serves it: parts of the towers ---------------------------------------------------------

class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)"""

    def forward(self, x):
        """x (...) -> (...)"""
        # in this form with one tensor beside x, not three
        return F.silu(1.702 * x, inplace=True).div_(1.702)                  # (...)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def fixed_positions(side, D):
    """Sines and cosines of a side x side grid, row by row -> (side side, D): D / 2 numbers of the
    column, then D / 2 of the row, each sines and then cosines of place / 10000^(i / (D / 4))."""
    # by numpy in float64: the published tables were made so
    angles = np.arange(side)[:, None] / 10000 ** (np.arange(D // 4) / (D // 4))     # (side, D / 4)
    line = np.concatenate([np.sin(angles), np.cos(angles)], 1)              # (side, D / 2)
    line = torch.from_numpy(line).float()                                   # (side, D / 2)
    # the place in its row, and the row, of each
    return torch.cat(
        [line.repeat(side, 1), line.repeat_interleave(side, 0)], 1)         # (side side, D)


def resize_positions(table, side):
    """Positions (n, D) of a square grid -> (side side, D) of a finer or coarser one: bicubic, not
    antialiased"""
    old = math.isqrt(len(table))
    if old == side:
        return table
    square = table.float().T.unflatten(1, (old, old))                       # (D, old, old)
    square = F.interpolate(square[None], (side, side), mode="bicubic")[0]   # (D, side, side)
    return square.flatten(1).T.to(table.dtype)                              # (side side, D)


def apply(layer, *inputs, again=False):
    """layer(*inputs). again: what its gradient needs is not kept but computed again
    (arXiv:1604.06174)"""
    if again and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return layer(*inputs)


# ---- what serves it: picture files ---------------------------------------------------------------

# long text beside the pixels is no reason to refuse them
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def load_image(path):
    """Open a picture as PIL RGB. path: a file, or (file, offset, length) for base64 text inside a
    JSON file.

    It is turned as its EXIF orientation says (CLIP's own code does not: a phone's photograph would
    lie on its side), transparency is laid on white, of an animation the first frame is taken.
    InputError with path and reason if it cannot be read, is more than 500 times as long as wide, or
    has 32 bits a value, of which nobody says what is white."""
    try:
        source = embedded(*path) if isinstance(path, tuple) else path
        with Image.open(source) as image:
            # resized, a very thin picture would take gigabytes
            if max(image.size) > 500 * min(image.size):
                raise InputError("it is more than 500 times as long as wide; cut out what matters")
            # a file with a name is mapped, and a mapped TIFF is turned wrong (Pillow 13.0)
            image.filename = ""
            image.load()
            return upright_rgb(image)
    except Exception as error:  # a decoder may raise anything
        raise InputError(f"picture {path} cannot be read: {reason_of(error)}") from error


def embedded(file, offset, length):
    """A picture that stands as base64 text in a JSON file -> its bytes, to be opened"""
    with open(file, "rb") as content:
        content.seek(offset)
        text = content.read(length)
    # JSON may write a slash with a backslash before it
    return BytesIO(base64.b64decode(text.replace(b"\\/", b"/"), validate=True))


def upright_rgb(image):
    """A loaded picture of any mode, turned as its metadata say, as RGB"""
    turn = None
    # what cannot be read of the metadata is as if it was not there
    with suppress(Exception):
        turn = image.getexif().get(ExifTags.Base.Orientation)
    if image.mode in ("I", "F"):
        raise InputError("it has 32 bits a value, of which nobody says what is white; save it with "
                         "8 or 16")
    # Pillow would cut off all above 255
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode != "RGB" or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(
            Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if turn in range(2, 9):
        # this alone: the rest would be written back, and fail where it is odd
        image.info = {}
        image.getexif()[ExifTags.Base.Orientation] = turn
        image = ImageOps.exif_transpose(image)
    return image


# of openai/clip-vit-large-patch14
CLIP_PREPROCESSING = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711]}
# what `preprocess` does; 3 is bicubic
STEPS = {
    "do_resize": True,
    "resample": 3,
    "do_center_crop": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True}


def read_preprocessing(folder, image_size):
    """preprocessor_config.json of a folder as a dict, or what transformers 5 writes in its place,
    the section image_processor of processor_config.json; where there is none, CLIP's own for
    pictures of image_size. `size` is {"shortest_edge": 224} or {"height": 224, "width": 224}, and
    `crop_size` the latter, also where the file says 224, as old ones do."""
    file = Path(folder) / "preprocessor_config.json"
    config = {"size": image_size, "crop_size": image_size, **CLIP_PREPROCESSING, **STEPS}
    if file.exists():
        config |= read_config(file)
    newer = file.with_name("processor_config.json")
    if newer.exists():
        config |= read_section(read_config(newer), "image_processor")
    for name, done in STEPS.items():
        if config[name] != done:
            raise InputError(f"{folder}: pictures with {name} = {config[name]!r} are not "
                             f"supported, only {done}")
    if isinstance(config["size"], int):
        config["size"] = {"shortest_edge": config["size"]}
    if not config["size"].keys() & {"shortest_edge", "height"}:
        raise InputError(f"{folder}: pictures of size {config['size']} are not supported, only a "
                         "shortest_edge, or height and width")
    square = {"height": image_size, "width": image_size}
    if config["crop_size"] not in (image_size, square):
        raise InputError(f"{folder} makes pictures of {config['crop_size']}, the vision model "
                         f"takes {image_size} x {image_size}")
    config["crop_size"] = square
    return config


# ---- what serves all files -----------------------------------------------------------------------

class InputError(ValueError):
    """What the user gave cannot be used. The message names thing and remedy; programs print it and
    exit with 2."""


def reason_of(error):
    """What an exception says, its first forty words in one line"""
    said = getattr(error, "strerror", None) or str(error) or repr(error)
    return " ".join(said.split()[:40])


def out_of_memory(error):
    """Whether an exception says that a device, or the machine, has no memory left"""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def is_main():
    """Whether this is the one process that prints and writes"""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def number(kind, low, below=math.inf):
    """For argparse: a function that reads an int or a float from low to below another"""
    def read(text):
        with suppress(ValueError):
            if low <= kind(text) < below:
                return kind(text)
        raise argparse.ArgumentTypeError(
            f"{text!r} is no {'whole ' if kind is int else ''}number from {low} to below {below}")
    return read


positive = number(int, 1)


def read_json(path, kind=dict):
    """The object, or with kind=list the list, in a JSON file; InputError with the file and where in
    it the fault is."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}") from error
    if not isinstance(content, kind):
        raise InputError(f"{path} holds no JSON {'object' if kind is dict else 'list'}")
    return content


def once(pairs):
    """The object of these (name, value): where a name stands twice, Python would drop the first
    value without a word"""
    section = {}
    for name, value in pairs:
        if name in section:
            raise ValueError(f"the name {name!r} stands twice in an object")
        section[name] = value
    return section


def without_null(section):
    """The settings of an object but those that are null, which stand for the default"""
    return {name: value for name, value in section.items() if value is not None}


def read_config(file):
    """The settings of a config.json"""
    return without_null(read_json(file))


def read_section(config, name):
    """A part of a config.json that is itself an object, {} if it is not there"""
    return without_null(config.get(name) or {})


def write_whole(file, text):
    """Write a text file under another name and rename it when it is whole; InputError if the disk
    does not take it"""
    # another process may be at the same file
    unfinished = Path(f"{file}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="replace", newline="")
        unfinished.replace(file)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(f"{file} cannot be written: {reason_of(error)}") from error


def checkpoint_path(path):
    """A path, in which OUT/best, a file that train.py writes with the name of the best checkpoint,
    is replaced by that; OUT itself, the folder of a run, stands for it, too"""
    path = Path(path)
    if (path / "best").is_file():
        path /= "best"
    for best in (path, path.parent):
        if best.name == "best" and best.is_file():
            return best.parent / best.read_text().strip() / path.relative_to(best)
    return path
