"""LLaMA-2, the projections, images put among the words, and weights in and out.

This file explains the language model (LLaMA-2, arXiv:2307.09288; numerics as in Hugging Face's LlamaForCausalLM, whose
module names it keeps), the three projections and CrA's added layers, how `VisualChat` writes the features of the
pictures into the sequence, and how weights stream from published files into the model and back. Not here: which token
attends to which (mmca.py), the vision towers (vision.py), text and batches (data.py).

Shapes: B batch, T tokens, N images in the batch, P tokens of an image, S pixels a side, D width, Dv vision width, F MLP
width, H heads, K key/value heads, d head width, L layers, V vocabulary.
"""
import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from mmca import IMAGE, TEXT, attend, image_term, pattern
from vision import (InputError, QwenConfig, QwenViT, Resampler, ViT, ViTConfig, ViTLayer, apply, image_tokens,
                    make_config, read_config, read_json, read_preprocessing, read_section,
                    read_vit_config, reason_of)


def choose_device(device=None, dtype=None):
    """The one place where device, number format and kernels are chosen; the choice is printed.

    device: "cpu", "cuda:1", several with commas between, None for the best there is; dtype: "float32", "bfloat16",
    "float16", None for the best that the devices compute. Returns (list of torch.device, torch.dtype)."""
    # cuDNN's attention, torch's first choice on an H100, makes a plan for each new shape (half a
    # second), and here nearly every batch has one; with a mask some shapes give NaN gradients
    # (pytorch issue 196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    devices = []
    for name in str(device or torch.accelerator.current_accelerator(check_available=True) or "cpu").split(","):
        try:
            devices.append(torch.empty(1, device=name).device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
            raise InputError(f"device {name}: {reason_of(error)}") from error
    kinds, reason = {device.type for device in devices}, "as asked"
    if dtype is None and kinds == {"cpu"}:
        dtype, reason = "float32", "the exact format of a CPU"
    elif dtype is None:
        has = "cuda" not in kinds or torch.cuda.is_bf16_supported(including_emulation=False)
        dtype, reason = ("bfloat16", "this device has it") if has else ("float16", "this GPU has no bfloat16")
    if not int(os.environ.get("RANK", 0)):
        print(f"device {', '.join(map(str, devices))}, number format {dtype} ({reason})")
    return devices, getattr(torch, dtype)


# ---- LLaMA-2 -------------------------------------------------------------------------------------------------------

@dataclass
class LlamaConfig:
    """Sizes of a LLaMA-2 decoder, under the names of its config.json."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    @classmethod
    def read(cls, folder):
        """From config.json as transformers 4 and 5 write it. What this file does not compute is refused by name."""
        file = Path(folder) / "config.json"
        config = read_config(file)
        rope = {**read_section(config, "rope_scaling"), **read_section(config, "rope_parameters")}
        rope.setdefault("rope_type", rope.get("type", "default" if rope.keys() <= {"rope_theta"} else "missing"))
        config |= rope
        computed = {"model_type": ["llama"], "attention_bias": [False], "mlp_bias": [False], "sliding_window": [],
                    "hidden_act": ["silu", "swish"], "partial_rotary_factor": [1], "rope_type": ["default"]}
        strange = [f"{name} = {config[name]!r}" for name in computed
                   if config.get(name) not in [None, *computed[name]]]
        if strange:
            raise InputError(f"{file}: not supported by this LLaMA-2: {', '.join(strange)}")
        # what transformers leaves out
        with suppress(KeyError, TypeError, ZeroDivisionError):
            config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
        config = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "head_dim": 0, **config}
        return make_config(cls, "a LLaMA", file, config)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (arXiv:1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        """x (..., D) -> (..., D)"""
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotary(positions, config, dtype):
    """cos and sin of position x frequency for `rotate`, the sin of the first half negative (arXiv:2104.09864).
    positions (B, T) -> two of (B, 1, T, d)"""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[:, None, :, None].float() / config.rope_theta ** exponent             # (B, 1, T, d / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)         # two of (B, 1, T, d)


def rotate(x, cos, sin):
    """Turn the pair (a, b) = (x[i], x[i + d/2]) by its angle: (a cos - b sin, b cos + a sin). Hugging Face's order;
    Meta's files pair 2i with 2i + 1. x (B, H, T, d) -> (B, H, T, d)"""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class LlamaAttention(nn.Module):
    """Queries of the words, keys and values of every row, rotated to their position; then `mmca.attend`."""

    def __init__(self, config):
        super().__init__()
        D, d, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.d = d
        self.q_proj, self.k_proj = nn.Linear(D, H * d, bias=False), nn.Linear(D, K * d, bias=False)
        self.v_proj, self.o_proj = nn.Linear(D, K * d, bias=False), nn.Linear(H * d, D, bias=False)

    def heads(self, x):
        """x (B, n, heads d) -> (B, heads, n, d)"""
        return x.unflatten(2, (-1, self.d)).transpose(1, 2)

    def query(self, x, cos, sin):
        """What words (B, n, D) ask, rotated -> (B, H, n, d)"""
        return rotate(self.heads(self.q_proj(x)), cos, sin)                 # (B, H, n, d)

    def forward(self, x, cos, sin, pattern, cache=None, rows=None):
        """x (B, n + m, D), words first, cos and sin (B, 1, n + m, d) -> (B, n + m, D), or only so many rows of it"""
        n = pattern.n
        q = self.query(x[:, :n], cos[:, :, :n], sin[:, :, :n])              # (B, H, n, d): an image token asks nothing
        k = rotate(self.heads(self.k_proj(x)), cos, sin)                    # (B, K, n + m, d)
        v = self.heads(self.v_proj(x))                                      # (B, K, n + m, d)
        out = attend(q, k, v, pattern, cache)                               # (B, H, n + m, d)
        return self.o_proj(out[:, :, :rows].transpose(1, 2).flatten(2))     # (B, n + m, D)


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(D, F_, bias=False), nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)

    def forward(self, x):
        """x (B, T, D) -> (B, T, D)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, D)


class LlamaLayer(nn.Module):
    """One block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(config), LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, pattern, cache=None, rows=None):
        """x (B, n + m, D), words first, cos and sin (B, 1, n + m, d) -> (B, n + m, D), or only so many rows of it"""
        x = x[:, :rows] + self.self_attn(self.input_layernorm(x), cos, sin, pattern, cache, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class CrossAttention(LlamaAttention):
    """What CrA adds before each decoder layer (`kind="cross"`; Flamingo, arXiv:2204.14198): text rows get
    x += tanh(gate) * o_proj(softmax(QK' . M2) V), with weights of its own; queries come from the normed rows, keys and
    values from the projected features, unrotated. The gate starts at zero: an untrained layer changes nothing."""

    def __init__(self, config):
        super().__init__(config)
        self.norm, self.gate = RMSNorm(config.hidden_size, config.rms_norm_eps), nn.Parameter(torch.zeros(1))

    def forward(self, x, features, pattern, cache=None):
        """x (B, n, D) the words, features (B, m, D) the new image tokens, newest first -> (B, n, D)"""
        q = self.heads(self.q_proj(self.norm(x)))                           # (B, H, n, d)
        k, v = self.heads(self.k_proj(features)), self.heads(self.v_proj(features))     # (B, K, m, d), (B, K, m, d)
        if cache is not None:
            k, v = cache.add_images(k, v)                                   # (B, K, all image tokens, d), twice
        out = image_term(q, k, v, pattern)                                  # (B, H, n, d)
        return x + torch.tanh(self.gate) * self.o_proj(out.transpose(1, 2).flatten(2))       # (B, n, D)


class LlamaModel(nn.Module):
    """Word embeddings, L layers, a last norm."""
    gradient_checkpointing = False
    devices = ()  # of each layer, where they are spread over several

    def __init__(self, config):
        super().__init__()
        self.config = config
        words = torch.randn(config.vocab_size, config.hidden_size) * 0.02                    # (V, D)
        self.embed_tokens = nn.Embedding.from_pretrained(words, freeze=False)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, pattern, cache=None, cross_attention=None):
        """x (B, n + m, D) embeddings, words first -> hidden states of the words (B, n, D): nobody asks for others.

        With a cache the rows continue it; image tokens that it knows already may be left out of x. cross_attention:
        CrA's L added layers; only words then pass the decoder, image tokens stay as they were."""
        features = None
        if cross_attention is not None:
            x, features = x[:, :pattern.n], x[:, pattern.n:]                # (B, n, D), (B, m, D)
        cos, sin = rotary(pattern.positions[:, :x.shape[1]], self.config, x.dtype)           # (B, 1, n + m, d)
        for i, layer in enumerate(self.layers):
            if self.devices and self.devices[i] != x.device:
                x, features, cos, sin, pattern = moved((x, features, cos, sin, pattern), self.devices[i])
            store = None if cache is None else cache.layer(i, pattern)
            if cross_attention is not None:
                x = apply(cross_attention[i], x, features, pattern, store, again=self.gradient_checkpointing)
            # behind the last keys and values nobody needs an image token; without one the last layer is as the others
            rows = pattern.n if layer is self.layers[-1] and x.shape[1] > pattern.n else None
            x = apply(layer, x, cos, sin, pattern, store, rows, again=self.gradient_checkpointing)
        return self.norm(x)                                                 # (B, n, D)


def moved(thing, device):
    """A tensor, or the tensors in a dataclass or a tuple, on device"""
    if isinstance(thing, torch.Tensor):
        return thing.to(device)
    if is_dataclass(thing):
        return replace(thing, **{name: moved(part, device) for name, part in vars(thing).items()})
    return tuple(moved(part, device) for part in thing) if isinstance(thing, tuple) else thing


class LoRA(nn.Module):
    """A frozen linear layer and a trained change of low rank (arXiv:2106.09685, section 4.1): x W' + x A' B'.

    Its scale alpha / r is 1. B starts at zero: an untrained change changes nothing."""

    def __init__(self, linear, rank):
        super().__init__()
        self.weight, self.bias, self.rank = linear.weight, linear.bias, rank
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features), a=5 ** 0.5))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        """x (..., in) -> (..., out)"""
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(layers, rank):
    """Put LoRA in the place of every linear layer of some blocks"""
    for module in list(layers.modules()):
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(module, name, LoRA(linear, rank))


class Llama(nn.Module):
    """LLaMA-2 with its head: Hugging Face's LlamaForCausalLM."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids):
        """input_ids (B, T), text alone -> logits (B, T, V)"""
        modality = torch.full_like(input_ids, TEXT)                         # (B, T)
        x = self.model(self.model.embed_tokens(input_ids), pattern(modality, modality, "causal"))    # (B, T, D)
        return self.lm_head(x)                                              # (B, T, V)


class KVCache:
    """Keys and values of a conversation, in one buffer a layer: words fill it from the front, image tokens from the end.

    So both are whole slices, and `attend` is two plain attentions over them. length: the most tokens it will hold;
    2 L K length d numbers in all. devices: one for each layer, or one device for all."""

    def __init__(self, config, length, devices, dtype):
        shape = 1, config.num_key_value_heads, length, config.head_dim
        devices = devices if isinstance(devices, list) else [devices] * config.num_hidden_layers
        self.config = config
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for device in devices]   # L times (1, K, length, d)
        self.values = [torch.empty_like(keys) for keys in self.keys]                         # L times (1, K, length, d)
        self.modality = torch.zeros(1, length, dtype=torch.long, device=devices[0])          # (1, length)
        self.size = length
        self.words = self.images = 0  # tokens held

    @property
    def length(self):
        """How many tokens it holds"""
        return self.words + self.images

    @property
    def nbytes(self):
        """The memory of its buffers"""
        return sum(2 * keys.nbytes for keys in self.keys)

    def append(self, modality):
        """Note the modality (1, T) of T new tokens -> that of all (1, Tk). The layers bring their keys and values."""
        stop = self.length + modality.shape[1]
        if stop > self.size:
            raise InputError(f"the conversation needs {stop} tokens, and there is room for {self.size}")
        self.modality[:, self.length:stop] = modality
        return self.modality[:, :stop]

    def place(self, picture, position):
        """Put the P tokens of a picture (`VisualChat.read_picture`) at a position: only now are its keys rotated."""
        stop = self.size - int((self.modality[:, :position] == IMAGE).sum())
        new = slice(stop - picture.images, stop)
        positions = torch.arange(position, position + picture.images, device=self.modality.device).flip(0)   # (P)
        cos, sin = rotary(positions[None], self.config, self.keys[0].dtype)                  # (1, 1, P, d)
        for i, (keys, values) in enumerate(zip(picture.keys, picture.values)):
            self.keys[i][:, :, new] = rotate(keys, cos.to(keys.device), sin.to(keys.device))
            self.values[i][:, :, new] = values

    def advance(self, pattern):
        """After the last layer: only now the new tokens count as held (under "causal" all of them as words)."""
        self.words += pattern.n
        self.images += pattern.positions.shape[1] - pattern.n

    def truncate(self, length):
        """Hold the first `length` tokens only"""
        images = int((self.modality[:, :length] == IMAGE).sum()) if self.images else 0
        self.words, self.images = length - images, images

    @torch.inference_mode()
    def blank(self):
        """Zero what holds nothing. Where a mask hides it, it is multiplied by zero, and so it has to be a number"""
        for buffer in (*self.keys, *self.values):
            buffer[:, :, self.words:self.size - self.images] = 0

    def layer(self, i, pattern):
        """The part of layer i in the pass of a pattern, as `attend` and `CrossAttention` use it"""
        return _CacheLayer(self.keys[i], self.values[i], self.words, self.size - pattern.image_mask.shape[3])


@dataclass
class _CacheLayer:
    keys: torch.Tensor    # (1, K, length, d)
    values: torch.Tensor  # (1, K, length, d)
    words_before: int     # how many it held before this pass
    images_start: int     # the first image token's place, those of this pass included

    def add_words(self, k, v):
        """New words (1, K, n, d) go behind the old -> all of them, twice (1, K, words, d)"""
        start, stop = self.words_before, self.words_before + k.shape[2]
        self.keys[:, :, start:stop], self.values[:, :, start:stop] = k, v
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def add_images(self, k, v):
        """New image tokens (1, K, m, d), newest first, go before the old, unless `KVCache.place` has put them there
        (then m is 0) -> all of them"""
        keys, values = self.all_images()
        keys[:, :, :k.shape[2]], values[:, :, :k.shape[2]] = k, v
        return keys, values

    def all_images(self):
        """Keys and values of all image tokens, newest first, twice (1, K, images, d)"""
        return self.keys[:, :, self.images_start:], self.values[:, :, self.images_start:]


# ---- pictures among the words --------------------------------------------------------------------------------------

def make_projection(kind, vision, language):
    """Features (N, P, Dv) -> word-sized vectors (N, P, D): "linear" (the original's `baseline`), "vit" (one more CLIP
    block of the tower's sizes, then linear) or "perceiver" (256 queries look at the features, P becomes 256)."""
    D = language.hidden_size
    if kind == "perceiver":
        return Perceiver(vision, D)
    linear = nn.Sequential(nn.Linear(vision.hidden_size, D), nn.LayerNorm(D, eps=1e-12))
    if kind == "vit":
        return nn.Sequential(OrderedDict(vis_layer=ViTLayer(vision), projection=linear))
    if kind != "linear":
        raise InputError(f"projection {kind!r} is not known, only linear, vit and perceiver")
    return linear


class Perceiver(Resampler):
    """Qwen-VL's resampler on the patches of any tower (the class token is left out), then LayerNorm and Linear."""

    def __init__(self, vision, D):
        super().__init__(vision.hidden_size, D, eps=1e-12, kv_proj=nn.Linear(vision.hidden_size, D))
        self.projection = nn.Sequential(nn.LayerNorm(D, eps=1e-12), nn.Linear(D, D))
        self.class_token = vision.class_token
        for linear in (self.kv_proj, self.attn.out_proj, self.projection[1]):  # as the original begins
            with gathered([linear.weight, linear.bias], writer=0):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def forward(self, features):
        """features (N, P, Dv) -> (N, 256, D)"""
        return self.projection(super().forward(features[:, int(self.class_token):]))         # (N, 256, D)


class VisualChat(nn.Module):
    """Vision tower, projection and language model: pictures and words in one sequence (figure 1 of the post)."""

    def __init__(self, vision_model, language_model, attention="mmca", projection="linear"):
        super().__init__()
        if attention not in ("mmca", "causal", "cross"):
            raise InputError(f"attention {attention!r} is not known, only mmca, causal and cross")
        self.vision_model, self.language_model = vision_model, language_model
        self.attention, self.projection_kind = attention, projection
        self.projection = make_projection(projection, vision_model.config, language_model.config)
        self.cross_attention = None
        if attention == "cross":
            layers = language_model.model.layers
            self.cross_attention = nn.ModuleList(CrossAttention(language_model.config) for _ in layers)
        self.image_tokens = image_tokens(projection, vision_model.config)
        self.preprocessing = None  # the content of preprocessor_config.json

    def set_trained(self, everything=False):
        """Train the recipe's word embedding, projection, CrA's layers and LoRA, or everything that a feature passes"""
        self.requires_grad_(everything)
        for part in (self.language_model.model.embed_tokens, self.projection, self.cross_attention):
            if part is not None:
                part.requires_grad_(True)
        for module in self.modules():
            if isinstance(module, LoRA):
                module.lora_A.requires_grad_(True), module.lora_B.requires_grad_(True)
            for part in getattr(module, "untrained", []):
                part.requires_grad_(False)

    def encode_images(self, pixels):
        """pixels (N, 3, S, S) -> projected features (N, P, D); a frozen tower runs without a graph"""
        trained = any(p.requires_grad for p in self.vision_model.parameters())
        with nullcontext() if trained else torch.no_grad():
            features = self.vision_model(pixels.to(self.language_model.model.norm.weight.dtype))     # (N, P, Dv)
        return self.projection(features)                                                     # (N, P, D)

    def embed(self, input_ids, modality, features=None):
        """Words are looked up, features (N, P, D) written to the image positions in order -> (B, T, D)"""
        embeds = self.language_model.model.embed_tokens(input_ids)          # (B, T, D)
        places = (modality == IMAGE).nonzero(as_tuple=True)                 # (N P), (N P): row and position
        rows = embeds[0, :0] if features is None else features.flatten(0, 1)    # (N P, D)
        if len(places[0]) != len(rows):
            raise InputError(f"{len(places[0])} image positions in the batch, but {len(rows)} image tokens "
                             "to put there")
        return embeds.index_put(places, rows)                               # (B, T, D)

    def forward(self, input_ids, modality, labels, pixels, image_index):
        """One batch of `data.collate` -> the loss of every trained token, and whether it was the first choice.

        input_ids, modality, labels (B, T); labels[t] is input_ids[t] or -100: the shift is made here. pixels
        (U, 3, S, S) are the distinct pictures, image_index (N) says which of them stands at each place. Returns losses
        (n) float32 and hits (n) bool, one for each label but -100, row by row; logits are computed there only."""
        features = self.encode_images(pixels)[image_index] if len(image_index) else None     # (N, P, D)
        # a GPU's kernels want rows of a mask that are multiples of 8; else torch would fill them up, in each layer
        who = pattern(modality, modality, self.attention, 1 if modality.is_cpu else 8)
        following = F.pad(labels[:, 1:], (0, 1), value=-100)                # (B, T): what each token should say next
        targets = who.arrange(following)[:, :who.n]                         # (B, n)
        # where the labels are is asked before the decoder: to count them Python waits until the GPU
        # has come that far; from then on it runs ahead
        trained = (targets != -100).nonzero(as_tuple=True)                  # (labels), (labels): row and word
        if len(trained[0]) != int((following != -100).sum()):
            raise InputError("a label stands on an image token or behind one, where no word says it")
        targets = targets[trained]                                          # (labels)
        x = who.arrange(self.embed(input_ids, modality, features))          # (B, n + m, D), words first
        x = self.language_model.model(x, who, None, self.cross_attention)   # (B, n, D)
        logits = self.language_model.lm_head(x[trained]).float()            # (labels, V)
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    @torch.inference_mode()
    def read_picture(self, features):
        """features (P, D) of a picture -> what `read` takes of it.

        Under MMCA an image token sees only itself, so that its keys and values in all layers depend on nothing else:
        they are computed here, once for every conversation and place, by the same pass as always, with image tokens
        and no words. All stand at position 0, where a key is not rotated. Returns a KVCache of P tokens; under the
        other two the features."""
        if self.attention != "mmca":
            return features
        model = self.language_model.model
        modality = features.new_full((1, len(features)), IMAGE, dtype=torch.long)            # (1, P)
        who = pattern(modality, modality)
        who.positions.zero_()
        picture = KVCache(model.config, len(features), list(model.devices) or features.device, features.dtype)
        model(features[None].flip(1), who, picture)
        picture.advance(who)
        return picture

    @torch.inference_mode()
    def read(self, input_ids, modality, cache, pictures=()):
        """Continue a conversation: T new tokens (1, T), the last a word, go into the cache -> logits of the next (V).
        pictures: what `read_picture` made of each picture among them; under MMCA only the words pass the decoder."""
        who = pattern(modality, cache.append(modality), self.attention)
        if self.attention == "mmca":
            starts = who.positions[0, who.n:].flip(0)[::self.image_tokens].tolist()
            if len(starts) != len(pictures):
                raise InputError(f"{len(starts)} pictures in the tokens, {len(pictures)} given")
            for start, picture in zip(starts, pictures):
                cache.place(picture, start)
            x = self.language_model.model.embed_tokens(who.arrange(input_ids)[:, :who.n])    # (1, n, D)
        else:
            x = who.arrange(self.embed(input_ids, modality, torch.stack(pictures) if pictures else None))
        x = self.language_model.model(x, who, cache, self.cross_attention)  # (1, n, D)
        head = self.language_model.lm_head  # where it shares its weight with the embedding, on the first device
        logits = head(x[0, -1].to(head.weight.device)).float()              # (V)
        cache.advance(who)  # last: until here an interrupt leaves the cache as it was
        return logits

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Open a checkpoint that `save_pretrained` wrote. device: one, or a list of them, over which the language
        model's layers are spread in order; the first has the vision tower, the last the head."""
        folder, devices = checkpoint_folder(folder), device if isinstance(device, list) else [device]
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} is no checkpoint: config.json, projection.safetensors, language_model/ and "
                             "vision_model/ belong there; train.py writes them to OUT/epoch-N")
        config = read_json(folder / "config.json")
        try:
            features = config["feature_layer"], config["class_token"]
            vision = load_vit(folder / "vision_model", dtype, devices[0], *features)
            language = load_llama(folder / "language_model", dtype, devices)
            model = cls(vision, language, config["attention"], config["projection"]).to(dtype)
        except KeyError as error:
            raise InputError(f"{folder}/config.json is not that of a checkpoint: {error.args[0]} missing") from error
        fill(model.projection.to(devices[0]), [folder / "projection.safetensors"])
        if model.cross_attention is not None:
            fill(model.cross_attention, [folder / "cross_attention.safetensors"])
            places = language.model.devices or devices * len(model.cross_attention)
            for layer, where in zip(model.cross_attention, places):
                layer.to(where)
        model.preprocessing = read_preprocessing(folder / "vision_model", vision.config.image_size)
        return model.eval()

    def save_pretrained(self, folder, tokenizer=None, bases=None):
        """Write the checkpoint that `from_pretrained` opens and whose two folders transformers opens; bit-exact, LoRA
        merged into plain weights.

        It is written beside and renamed when whole; InputError if the disk does not take it. tokenizer: the file
        tokenizer.model, copied to language_model/. bases: the folders of language model and vision tower that were
        trained from; then only what was trained is written, LoRA as its factors, and where the rest is. Under ZeRO-3
        every process must call this: each tensor is gathered, and process 0 writes."""
        folder = Path(folder).resolve()
        work, old = folder.with_name(f".{folder.name}.unfinished"), folder.with_name(f".{folder.name}.old.unfinished")
        language, vision = self.language_model.config, self.vision_model.config
        qwen = isinstance(vision, QwenConfig)
        dtype = str(self.language_model.model.norm.weight.dtype).removeprefix("torch.")
        sizes = {k: v for k, v in asdict(vision).items() if k not in ("feature_layer", "class_token")}
        configs = {
            "config.json": {"model_type": "visualchat", "attention": self.attention, "projection": self.projection_kind,
                            "image_tokens": self.image_tokens, "feature_layer": vision.feature_layer,
                            "class_token": vision.class_token,
                            **{f"{name}lora_rank": next((m.rank for m in part.modules() if isinstance(m, LoRA)), 0)
                               for name, part in (("", self.language_model), ("vision_", self.vision_model))}},
            "language_model/config.json": {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                                           **asdict(language), "hidden_act": "silu", "bos_token_id": 1,
                                           "eos_token_id": 2, "torch_dtype": dtype},
            "vision_model/config.json": {"visual": sizes, "torch_dtype": dtype} if qwen else {
                "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **sizes, "torch_dtype": dtype},
            "vision_model/preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor",
                                                      **self.preprocessing}}
        parts = {"language_model": self.language_model, "vision_model": self.vision_model}
        try:
            if is_main():
                shutil.rmtree(work, ignore_errors=True)
                for part, base in zip(parts, bases or [None, None]):
                    (work / part).mkdir(parents=True)
                    if base:
                        configs[f"{part}/config.json"]["base"] = os.path.relpath(Path(base).resolve(), folder / part)
                for name, content in configs.items():
                    write_json(work / name, content)
                if tokenizer:
                    shutil.copyfile(tokenizer, work / "language_model/tokenizer.model")
            for part, module in parts.items():
                if bases:
                    save_weights(((n, [p]) for n, p in module.named_parameters() if p.requires_grad),
                                 work / part / "trained.safetensors")
                else:
                    prefix = "vision_model." if part == "vision_model" and not qwen else ""
                    save_weights(plain_weights(module, prefix), work / part / "model.safetensors")
            save_weights(plain_weights(self.projection), work / "projection.safetensors")
            if self.cross_attention is not None:
                save_weights(plain_weights(self.cross_attention), work / "cross_attention.safetensors")
            if is_main():
                if folder.exists():
                    folder.rename(old)
                work.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            raise InputError(f"{folder} cannot be written: {reason_of(error)}") from error


# ---- weights in and out --------------------------------------------------------------------------------------------

def load_llama(folder, dtype=torch.float32, device="cpu", empty=partial(torch.device, "meta")):
    """A LLaMA-2 from a folder in Hugging Face layout: config.json and *.safetensors (or *.bin), one file or shards.

    device: one, or a list over which the layers are spread in order. empty() is the context in which the model is made
    before its weights come: nowhere, or DeepSpeed's zero.Init, and then no process holds more of it than its part."""
    with empty():
        model = Llama(LlamaConfig.read(folder))
    tied, devices = model.config.tie_word_embeddings, device if isinstance(device, list) else [device]
    L = len(model.model.layers)
    layers = [devices[i * len(devices) // L] for i in range(L)]
    model.model.devices = layers if len(devices) > 1 else ()

    def rename(name):
        return None if name.endswith("rotary_emb.inv_freq") or tied and name == "lm_head.weight" else name

    def place(name):
        if name.startswith("model.layers."):
            return layers[int(name.split(".")[2])]
        return devices[0 if name == "model.embed_tokens.weight" else -1]

    load_weights(model, folder, rename, dtype, place)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def load_vit(folder, dtype=torch.float32, device="cpu", feature_layer=-1, class_token=True,
             empty=partial(torch.device, "meta")):
    """A vision tower: CLIP's, from a CLIPVisionModel (with the prefix vision_model. or without) or a whole CLIPModel;
    or Qwen-VL's, extracted or from a whole checkpoint, of which nothing else is read and no other shard needed."""
    sizes = vit_sizes(folder, feature_layer, class_token)
    with empty():
        model = make_vit(sizes)
    load_weights(model, folder, vit_name, dtype, lambda name: device)
    return model.eval()


def vit_sizes(folder, feature_layer=-1, class_token=True):
    """ViTConfig or QwenConfig of a folder, and from its weights, if there are any, the number of Qwen-VL's queries"""
    config = read_vit_config(folder, feature_layer, class_token)
    for file in weight_files(bases(folder)[0], vit_name) if has_weights(folder) else ():
        for name, shape, _ in _tensors(file):
            if vit_name(name) == "attn_pool.query":
                if isinstance(config, ViTConfig):
                    raise InputError(f"{folder} holds the weights of Qwen-VL's encoder, but its config.json has no "
                                     "section `visual`: put Qwen-VL's config.json there")
                config.n_queries = shape[0]
    return config


def vit_name(name):
    """A name in a published file -> its name in ViT or QwenViT; None for CLIP's text tower, Qwen-VL's language model
    and its last matrix (which the original does not use), and for what is computed"""
    language = "transformer.h.", "transformer.wte.", "transformer.ln_f.", "transformer.rotary_emb.", "lm_head."
    rest = "transformer.visual.proj", "text_model.", "text_projection.", "visual_projection.", "logit_scale"
    if name.startswith(language + rest) or name.endswith("position_ids"):
        return None
    return name.removeprefix("transformer.visual.").removeprefix("vision_model.")


def make_vit(config):
    """The vision tower of these sizes, with random weights"""
    return QwenViT(config) if isinstance(config, QwenConfig) else ViT(config)


def weight_files(folder, rename=lambda name: name):
    """The files that hold a model's weights, one or those shards of an index with a tensor that rename does not leave
    out; InputError if there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, files = folder / f"{name}.index.json", [folder / name]
        if index.exists():
            places = read_section(read_json(index), "weight_map")
            files = [folder / file for file in sorted({file for name, file in places.items() if rename(name)})]
            missing = [file.name for file in files if not file.exists()]
            if missing:
                raise InputError(f"{folder}: {index.name} names {', '.join(missing)}, not found there")
        if files and files[0].exists():
            return files
    raise InputError(f"{folder} holds no weights: model.safetensors, or shards with model.safetensors.index.json, "
                     "belong there")


def bases(folder):
    """[folder], or if it holds only what was trained, first the folders that it was trained from"""
    folder = Path(folder)
    base = read_json(folder / "config.json").get("base")
    if not base:
        return [folder]
    if not (folder / str(base) / "config.json").is_file():
        raise InputError(f"{folder} holds only what was trained; its base {base} is not there")
    return [*bases(folder / base), folder]


def has_weights(folder):
    """Whether a folder holds weights, and not a config.json alone"""
    folder = bases(folder)[0]
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def load_weights(module, folder, rename, dtype, place):
    """Fill module from the weights of a folder; what was trained from a base comes on top of it"""
    base, *trained = bases(folder)
    fill(module, weight_files(base, rename), rename, dtype, place)
    parameters = dict(module.named_parameters())
    for file in (folder / "trained.safetensors" for folder in trained):
        factors = {}
        for name, shape, read in _tensors(file):
            target, _, factor = name.partition(".lora_")
            parameter = parameters.get(f"{target}.weight" if factor else name)
            if parameter is None or not factor and shape != size_of(parameter):
                raise InputError(f"{file}: {name} {tuple(shape)} does not fit the model of its base {base}")
            if factor:
                factors.setdefault(target, {})[factor] = read().to(parameter)
            with gathered([parameter], writer=0):
                if not factor:
                    parameter.data.copy_(read())
                elif len(factors[target]) == 2:
                    parameter.data.copy_(merged(parameter.data, **factors.pop(target)))


def merged(weight, A, B):
    """A linear layer's weight (out, in) and LoRA's factors A (r, in), B (out, r) -> W + B A, computed in float32"""
    return (weight.float() + B.float() @ A.float()).to(weight.dtype)                         # (out, in)


def fill(module, files, rename=lambda name: name, dtype=None, place=lambda name: None):
    """Stream tensors from files into the parameters of module, one at a time; strict.

    rename(name in the file) -> name in the module, or None for a tensor left out on purpose. Parameters on the meta
    device are made as they come, with dtype and on place(name); of those that ZeRO-3 has spread process 0 reads each
    and gives every process its part. InputError names unknown and missing tensors and shapes that do not fit."""
    targets, wrong = dict(module.named_parameters()), []
    for file in files:
        for name, shape, read in _tensors(file):
            target = rename(name)
            if target is None:
                continue
            if target not in targets:
                wrong.append(f"{name} is not in the model")
                continue
            parameter = targets.pop(target)
            if shape != size_of(parameter):
                wrong.append(f"{name} is {tuple(shape)} in the file, {tuple(size_of(parameter))} in the model")
            elif parameter.is_meta:
                owner, _, leaf = target.rpartition(".")
                setattr(module.get_submodule(owner), leaf, nn.Parameter(read().to(place(target), dtype)))
            else:
                with gathered([parameter], writer=0):
                    if is_main() or not hasattr(parameter, "ds_id"):
                        parameter.data.copy_(read())
    wrong += [f"{name} is missing" for name in targets]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(f"the weights in {files[0].parent} do not fit the model: {'; '.join(wrong[:5])}{more}")


def _tensors(file):
    """(name, shape, function that reads it) of each tensor of a .safetensors or, running no code in it, a .bin file."""
    try:
        if file.suffix == ".bin":
            mapped = zipfile.is_zipfile(file)  # torch's format since version 1.6; before it was a pickle
            if not mapped and file.open("rb").read(1) != b"\x80":
                raise TypeError("not in torch's format; was it downloaded whole, or is it a Git LFS pointer?")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            if not (isinstance(content, dict) and all(isinstance(t, torch.Tensor) for t in content.values())):
                raise TypeError("something else than named tensors is in them")
            yield from ((name, tensor.shape, lambda tensor=tensor: tensor) for name, tensor in content.items())
        else:
            with safe_open(file, "pt") as content:
                for name in content.keys():
                    shape = torch.Size(content.get_slice(name).get_shape())
                    yield name, shape, lambda name=name: content.get_tensor(name)
    except pickle.UnpicklingError as error:
        raise InputError(f"weights {file} hold more than tensors and are not opened: code in them could run") from error
    except Exception as error:  # of a damaged file anything
        raise InputError(f"weights {file} cannot be read: {reason_of(error)}") from error


def checkpoint_folder(path):
    """The folder of a checkpoint: train.py's OUT/best is a file with the name of the one beside it"""
    path = Path(path)
    if path.name == "best" and path.is_file():
        return path.parent / path.read_text(errors="replace").strip()
    return path


def is_main():
    """Whether this is the one process that prints and writes"""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def size_of(parameter):
    """The shape of a parameter, also where ZeRO-3 holds only this process's part of it"""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameters, writer=None):
    """A context in which parameters that ZeRO-3 has spread are whole; what process `writer` changes is everybody's"""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer)


def plain_weights(module, prefix=""):
    """(name, parameters that it is made of) of each tensor of a model as it is published: LoRA's factors are merged"""
    for name, parameter in module.named_parameters():
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if isinstance(owner, LoRA) and leaf == "weight":
            yield prefix + name, [parameter, owner.lora_A, owner.lora_B]
        elif not leaf.startswith("lora_"):
            yield prefix + name, [parameter]


FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def save_weights(tensors, file, shard_bytes=5e9):
    """Write (name, parameters) of `plain_weights` to a .safetensors file; above shard_bytes to shards with an index.

    The format (github.com/huggingface/safetensors): the length of a JSON header as 8 bytes, the header with the place
    of each tensor, their bytes. Since sizes are known before, each tensor is gathered, written and let go."""
    shards, size = [[]], 0
    for name, parts in tensors:
        count = size_of(parts[0]).numel() * parts[0].element_size()
        if shards[-1] and size + count > shard_bytes:
            shards, size = shards + [[]], 0
        shards[-1].append((name, parts, [size, size + count]))
        size += count
    index = {}
    for n, shard in enumerate(shards, 1):
        target = file if len(shards) == 1 else file.with_name(f"{file.stem}-{n:05d}-of-{len(shards):05d}{file.suffix}")
        index |= {name: target.name for name, *_ in shard}
        header = json.dumps({"__metadata__": {"format": "pt"}, **{
            name: {"dtype": FORMATS[parts[0].dtype], "shape": list(size_of(parts[0])), "data_offsets": place}
            for name, parts, place in shard}}).encode()
        header += b" " * (-len(header) % 8)
        with open(target, "wb") if is_main() else nullcontext() as output:
            if output:
                output.write(len(header).to_bytes(8, "little") + header)
            for _, parts, _ in shard:
                with gathered(parts):
                    if output:
                        tensor = parts[0] if len(parts) == 1 else merged(*parts)
                        output.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    if len(shards) > 1 and is_main():
        write_json(file.with_name(f"{file.name}.index.json"), {"metadata": {}, "weight_map": index})


def write_json(path, content):
    """Write content to a JSON file, readable and in UTF-8"""
    Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
