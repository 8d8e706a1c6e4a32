"""LLaMA-2, the projections, pictures put among the words, and weights in and out.

This file explains the language model (LLaMA-2, arXiv:2307.09288; numerics as in Hugging Face's
LlamaForCausalLM, whose module names it keeps), the three projections and CrA's added layers, how
`VisualChat` writes the features of the pictures into the sequence, how a conversation goes on in a
cache, and how weights stream from published files into the model and back. Not here: which token
attends to which (mmca.py), the vision towers (vision.py), text and batches (data.py).

Shapes: B batch, T tokens, N images in the batch, P tokens of an image, S pixels a side, D width, Dv
vision width, F MLP width, H heads, K key/value heads, d head width, L layers, V vocabulary; n words
and m image tokens.
"""
import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmca import IMAGE, TEXT, attend, image_term, make_pattern, reads_pictures_once
from vision import (InputError, QwenConfig, QwenViT, Resampler, ViT, ViTLayer, apply,
                    checkpoint_path, count_image_tokens, is_main, make_config, read_checkpoint,
                    read_config, read_json, read_preprocessing, read_section, read_vit_config,
                    reason_of)


# ---- LLaMA-2 -------------------------------------------------------------------------------------

@dataclass
class LlamaConfig:
    """Sizes of a LLaMA-2 decoder, under the names of its config.json; the defaults are those that
    transformers leaves out."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (arXiv:1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """x (..., D) -> (..., D)"""
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotary(positions, config, dtype):
    """cos and sin of position x frequency for `rotate`, the sin of the first half negative
    (arXiv:2104.09864). positions (B, T) -> two of (B, 1, T, d)"""
    # all of it in float32: in bfloat16 position 257 would be 256
    pair = torch.arange(0, config.head_dim, 2, device=positions.device).float()     # (d / 2)
    frequency = config.rope_theta ** (-pair / config.head_dim)              # (d / 2)
    angles = positions[:, None, :, None].float() * frequency                # (B, 1, T, d / 2)
    cos = angles.cos()                                                      # (B, 1, T, d / 2)
    sin = angles.sin()                                                      # (B, 1, T, d / 2)
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x, cos, sin):
    """Turn the pair (a, b) = (x[i], x[i + d/2]) by its angle: (a cos - b sin, b cos + a sin).
    Hugging Face's order; Meta's files pair 2i with 2i + 1. x (B, H, T, d) -> (B, H, T, d)"""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class LlamaAttention(nn.Module):
    """Queries of the words, keys and values of every row, rotated to their position; then
    `mmca.attend`."""

    def __init__(self, config):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.d = d
        self.q_proj = nn.Linear(D, H * d, bias=False)
        self.k_proj = nn.Linear(D, K * d, bias=False)
        self.v_proj = nn.Linear(D, K * d, bias=False)
        self.o_proj = nn.Linear(H * d, D, bias=False)

    def heads(self, x):
        """x (B, n, heads d) -> (B, heads, n, d)"""
        return x.unflatten(2, (-1, self.d)).transpose(1, 2)

    def forward(self, x, cos, sin, pattern, cache=None):
        """x (B, n + m, D), words first, cos and sin (B, 1, n + m, d) -> (B, n + m, D)"""
        n = pattern.num_words
        # an image token asks nothing: it sees itself alone, and its result is its own value
        q = self.heads(self.q_proj(x[:, :n]))                               # (B, H, n, d)
        q = rotate(q, cos[:, :, :n], sin[:, :, :n])                         # (B, H, n, d)
        k = rotate(self.heads(self.k_proj(x)), cos, sin)                    # (B, K, n + m, d)
        v = self.heads(self.v_proj(x))                                      # (B, K, n + m, d)
        out = attend(q, k, v, pattern, cache)                               # (B, H, n + m, d)
        return self.o_proj(out.transpose(1, 2).flatten(2))                  # (B, n + m, D)


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x):
        """x (B, T, D) -> (B, T, D)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """One block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, pattern, cache=None):
        """x (B, n + m, D), words first, cos and sin (B, 1, n + m, d) -> (B, n + m, D)"""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, pattern, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Word embeddings, L layers, a last norm."""
    gradient_checkpointing = False
    devices = ()  # of each layer, where they are spread over several

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, pattern, cache=None, cross_attention=None):
        """x (B, n + m, D) embeddings, words first -> hidden states of the words (B, n, D): nobody
        asks for others.

        With a cache the rows continue it; image tokens that it knows already may be left out of x.
        cross_attention: CrA's L added layers; only words then pass the decoder, image tokens stay
        as they were."""
        n = pattern.num_words
        features = x[:, n:]                                                 # (B, m, D)
        if cross_attention is not None:
            x = x[:, :n]                                                    # (B, n, D)
        # below, n + m stands for the rows that pass the decoder, with CrA the n words alone
        positions = pattern.positions[:, :x.shape[1]]                       # (B, n + m)
        cos, sin = rotary(positions, self.config, x.dtype)                  # (B, 1, n + m, d)
        for i, layer in enumerate(self.layers):
            if self.devices and self.devices[i] != x.device:
                x, features, cos, sin = (t.to(self.devices[i]) for t in (x, features, cos, sin))
            store = cache and cache.layer(i, pattern)
            if cross_attention is not None:
                x = apply(
                    cross_attention[i], x, features, pattern, store,
                    again=self.gradient_checkpointing)                      # (B, n, D)
            x = apply(
                layer, x, cos, sin, pattern, store,
                again=self.gradient_checkpointing)                          # (B, n + m, D)
        return self.norm(x[:, :n])                                          # (B, n, D)


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
        x = self.model(
            self.model.embed_tokens(input_ids),
            make_pattern(modality, modality, "causal"))                     # (B, T, D)
        return self.lm_head(x)                                              # (B, T, V)


# ---- pictures among the words --------------------------------------------------------------------

def make_projection(kind, vision, language):
    """Features (N, P, Dv) -> word-sized vectors (N, P, D): "linear" (the original's `baseline`),
    "vit" (one more CLIP block of the tower's sizes, then linear) or "perceiver" (256 queries look
    at the features, P becomes 256). One of your own is one more case here, and in the choices of
    --projection (data.py); in `count_image_tokens` (vision.py) if it changes P."""
    D = language.hidden_size
    if kind == "perceiver":
        return Perceiver(vision, D)
    linear = nn.Sequential(
        nn.Linear(vision.hidden_size, D),
        nn.LayerNorm(D, eps=1e-12))
    if kind == "vit":
        return nn.Sequential(OrderedDict(
            vis_layer=ViTLayer(vision),
            projection=linear))
    if kind != "linear":
        raise InputError(f"projection {kind!r} is not known, only linear, vit and perceiver")
    return linear


class Perceiver(Resampler):
    """Qwen-VL's resampler on the patches of any tower (the class token is left out), then LayerNorm
    and Linear."""

    def __init__(self, vision, D):
        super().__init__(vision.hidden_size, D, eps=1e-12, bias=True)
        self.projection = nn.Sequential(
            nn.LayerNorm(D, eps=1e-12),
            nn.Linear(D, D))
        self.class_token = vision.class_token
        # as the original begins
        for linear in (self.kv_proj, self.attn.out_proj, self.projection[1]):
            with gathered([linear.weight, linear.bias], writer=0):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def forward(self, features):
        """features (N, P, Dv) -> (N, 256, D)"""
        return self.projection(super().forward(
            features[:, int(self.class_token):]))                           # (N, 256, D)


class CrossAttention(LlamaAttention):
    """What CrA adds before each decoder layer (`kind="cross"`; Flamingo, arXiv:2204.14198): words
    get x += tanh(gate) * o_proj(softmax(QK' . M2) V), with weights of its own; queries come from
    the normed words, keys and values from the projected features, unrotated. The gate starts at
    zero: an untrained layer changes nothing."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, features, pattern, cache=None):
        """x (B, n, D) the words, features (B, m, D) the new image tokens, newest first ->
        (B, n, D)"""
        q = self.heads(self.q_proj(self.norm(x)))                           # (B, H, n, d)
        k = self.heads(self.k_proj(features))                               # (B, K, m, d)
        v = self.heads(self.v_proj(features))                               # (B, K, m, d)
        if cache is not None:
            k, v = cache.add_images(k, v)                                   # (B, K, all images, d)
        out = image_term(q, k, v, pattern)                                  # (B, H, n, d)
        out = self.o_proj(out.transpose(1, 2).flatten(2))                   # (B, n, D)
        return x + torch.tanh(self.gate) * out                              # (B, n, D)


class VisualChat(nn.Module):
    """Vision tower, projection and language model: pictures and words in one sequence (figure 1 of
    the post)."""

    def __init__(
            self,
            vision_model,
            language_model,
            attention="mmca",
            projection="linear"):
        super().__init__()
        self.vision_model = vision_model
        self.language_model = language_model
        self.attention = attention
        self.reads_pictures_once = reads_pictures_once(attention)
        self.projection_kind = projection
        config = language_model.config
        self.projection = make_projection(projection, vision_model.config, config)
        self.cross_attention = None
        if attention == "cross":
            self.cross_attention = nn.ModuleList(
                CrossAttention(config) for _ in range(config.num_hidden_layers))
        self.image_tokens = count_image_tokens(projection, vision_model.config)   # P
        self.preprocessing = None  # the content of preprocessor_config.json

    def set_trained(self, everything=False):
        """Train the recipe's word embedding, projection, CrA's layers and LoRA, or everything that
        a feature passes.

        At 13B with CLIP's ViT-L/14 and the linear projection that is 32,000 x 5,120 for the words,
        1,024 x 5,120 + 5,120 and 2 x 5,120 for the projection's Linear and LayerNorm: 169,098,240
        of 13.3 billion."""
        recipe = "language_model.model.embed_tokens", "projection", "cross_attention"
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(
                everything or name.startswith(recipe) or ".lora_" in name)
        # tables of positions, and layers behind the one whose features are taken
        for module in self.modules():
            for part in getattr(module, "untrained", []):
                part.requires_grad_(False)

    def encode_images(self, pixels):
        """pixels (N, 3, S, S) -> projected features (N, P, D); a frozen tower runs without a
        graph"""
        trained = any(p.requires_grad for p in self.vision_model.parameters())
        with nullcontext() if trained else torch.no_grad():
            features = self.vision_model(pixels.to(
                self.language_model.model.norm.weight.dtype))               # (N, P, Dv)
        return self.projection(features)                                    # (N, P, D)

    def embed(self, input_ids, modality, features=None):
        """Words are looked up, features (N, P, D) written to the image positions in order ->
        (B, T, D)"""
        embeds = self.language_model.model.embed_tokens(input_ids)          # (B, T, D)
        places = (modality == IMAGE).nonzero(as_tuple=True)                 # (N P), (N P)
        rows = embeds[0, :0] if features is None else features.flatten(0, 1)    # (N P, D)
        if len(places[0]) != len(rows):
            raise InputError(f"{len(places[0])} image positions in the batch, but {len(rows)} image"
                             " tokens to put there")
        return embeds.index_put(places, rows)                               # (B, T, D)

    def forward(
            self,
            input_ids,
            modality,
            labels,
            pixels,
            image_index):
        """One batch of `data.collate` -> the loss of every trained token, and whether it was the
        first choice.

        input_ids, modality, labels (B, T); labels[t] is input_ids[t] or -100: the shift is made
        here. pixels (U, 3, S, S) are the distinct pictures, image_index (N) says which of them
        stands at each place. Returns losses (labels) float32 and hits (labels) bool, one for each
        label but -100, row by row; logits are computed there only."""
        features = None
        if len(image_index):
            features = self.encode_images(pixels)[image_index]              # (N, P, D)
        # rows of a mask that are multiples of 8 are what a GPU's kernels take; torch would fill up
        # others anew in each layer
        pattern = make_pattern(
            modality,
            modality,
            self.attention,
            fill=1 if modality.is_cpu else 8)
        # what each token should say is the label of the next one
        following = F.pad(labels[:, 1:], (0, 1), value=-100)                # (B, T)
        targets = pattern.arrange(following)[:, :pattern.num_words]         # (B, n)
        # to count the labels Python waits until the GPU has come that far: so it does that here,
        # before the decoder, through which it then runs ahead of the GPU
        trained = (targets != -100).nonzero(as_tuple=True)                  # (labels), (labels)
        assert len(trained[0]) == int((following != -100).sum()), (
            "a label stands behind an image token: no word says it")
        targets = targets[trained]                                          # (labels)
        x = pattern.arrange(self.embed(input_ids, modality, features))      # (B, n + m, D)
        x = self.language_model.model(x, pattern, None, self.cross_attention)   # (B, n, D)
        logits = self.language_model.lm_head(x[trained]).float()            # (labels, V)
        losses = F.cross_entropy(logits, targets, reduction="none")         # (labels)
        return losses, logits.argmax(-1) == targets

    @torch.inference_mode()
    def keep_picture(self, features):
        """features (P, D) of a picture -> what `extend` takes of it.

        Under MMCA an image token sees only itself, so that its keys and values in all layers depend
        on nothing else: they are computed here, once for every conversation and place, by the same
        pass as always, with image tokens and no words. Returns a KVCache of P tokens; under the
        other two, or a rule of your own by which image tokens see more, the features."""
        if not self.reads_pictures_once:
            return features
        language = self.language_model.model
        modality = features.new_full((1, len(features)), IMAGE, dtype=torch.long)   # (1, P)
        pattern = make_pattern(modality, modality)
        # all at position 0, where a key is not rotated: that is done when it is placed
        pattern.positions.zero_()
        kept = KVCache(language, len(features))
        language(features[None].flip(1), pattern, kept)
        kept.advance(pattern)
        return kept

    @torch.inference_mode()
    def extend(self, input_ids, modality, cache, pictures=()):
        """Continue a conversation: T new tokens (1, T), the last a word, go into the cache ->
        logits of the next (V). pictures: what `keep_picture` made of each picture among them."""
        language = self.language_model.model
        pattern = make_pattern(modality, cache.append(modality), self.attention)
        if self.reads_pictures_once:
            # keys and values of the pictures are known: only the words pass the decoder
            places = pattern.positions[0, pattern.num_words:].flip(0)       # (N P)
            starts = places[::self.image_tokens].tolist()
            for start, picture in zip(starts, pictures, strict=True):
                cache.place(picture, start)
            x = language.embed_tokens(
                pattern.arrange(input_ids)[:, :pattern.num_words])          # (1, n, D)
        else:
            features = torch.stack(pictures) if pictures else None          # (N, P, D)
            x = pattern.arrange(self.embed(input_ids, modality, features))  # (1, n + m, D)
        x = language(x, pattern, cache, self.cross_attention)               # (1, n, D)
        # a head that shares its weight with the embedding stands on the first device
        head = self.language_model.lm_head
        logits = head(x[0, -1].to(head.weight.device)).float()              # (V)
        # last: until here an interrupt leaves the cache as it was
        cache.advance(pattern)
        return logits

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, devices=["cpu"]):
        """Open a checkpoint that `save_pretrained` wrote. The language model's layers are spread
        over the devices in order; the first has the vision tower, the last the head."""
        folder = checkpoint_path(folder)
        has = read_checkpoint(folder)
        vision = load_vit(
            has["vision_model"],
            dtype,
            devices[0],
            has["feature_layer"],
            has["class_token"])
        language = load_llama(has["language_model"], dtype, devices)
        # what is new in it is made nowhere before its weights come
        with torch.device("meta"):
            model = cls(vision, language, has["attention"], has["projection"])
        model.load_joint(folder, dtype)
        model.preprocessing = read_preprocessing(has["vision_model"], vision.config.image_size)
        return model.eval()

    def load_joint(self, folder, dtype=None):
        """Fill what joins the two models, the projection and CrA's layers, from a checkpoint"""
        language = self.language_model.model
        fill(
            self.projection,
            weight_files(folder, "projection"),
            dtype=dtype,
            place=lambda name: language.embed_tokens.weight.device)
        if self.cross_attention is not None:
            # each beside the decoder layer that it stands before
            fill(
                self.cross_attention,
                weight_files(folder, "cross_attention"),
                dtype=dtype,
                place=lambda name: language.layers[
                    int(name.split(".")[0])].mlp.up_proj.weight.device)

    def save_pretrained(self, folder, tokenizer=None, bases=None):
        """Write a checkpoint. Bit-exact, but for LoRA, which is merged into plain weights.

            config.json              attention, projection, image tokens, features
            projection.safetensors   and cross_attention.safetensors for CrA
            language_model/          config.json, model*.safetensors, tokenizer.model
            vision_model/            config.json, model*.safetensors, preprocessor_config.json

        `from_pretrained` opens it for chat.py, with the attention it was trained with; train.py
        goes on from it (--checkpoint), or begins from either folder with a new projection; and
        transformers opens both (with LLaMA's own, causal attention; the tower if it is CLIP's).

        tokenizer: a data.Tokenizer, whose file is copied to language_model/. bases: the folders of
        language model and vision tower that were trained from; then the two folders hold only what
        was trained, trained*.safetensors with LoRA as its factors, and the place of the rest, and
        transformers does not open them. Under ZeRO-3 every process must call this: weights are
        gathered, and process 0 writes. InputError if the disk does not take it."""
        with whole_folder(folder) as work:
            if is_main():
                write_configs(self, work, tokenizer, bases)
            for part in ("language_model", "vision_model"):
                module = getattr(self, part)
                # CLIP's published files are those of a larger model with two towers
                prefix = "vision_model." if isinstance(module, ViT) else ""
                weights = plain_weights(module, prefix)
                name = "model"
                if bases:
                    weights = [
                        (n, [p])
                        for n, p in module.named_parameters()
                        if p.requires_grad]
                    name = "trained"
                save_weights(weights, work / part / f"{name}.safetensors")
            save_weights(plain_weights(self.projection), work / "projection.safetensors")
            if self.cross_attention is not None:
                save_weights(
                    plain_weights(self.cross_attention),
                    work / "cross_attention.safetensors")


# ---- a conversation that goes on -----------------------------------------------------------------

class KVCache:
    """Keys and values of a conversation, in one buffer a layer: words fill it from the front, image
    tokens from the end.

    So both are whole slices, and `attend` is two plain attentions over them. language: the
    LlamaModel that fills it; length: the most tokens it will hold, 2 L K length d numbers in
    all."""

    def __init__(self, language, length):
        config = self.config = language.config
        shape = 1, config.num_key_value_heads, length, config.head_dim
        # each layer's beside its weights. Memory that is not written takes no room on a CPU
        weights = [layer.self_attn.k_proj.weight for layer in language.layers]
        self.keys = [weight.new_empty(shape) for weight in weights]         # (1, K, length, d) each
        self.values = [weight.new_empty(shape) for weight in weights]       # (1, K, length, d) each
        self.modality = weights[0].new_zeros(1, length, dtype=torch.long)   # (1, length)
        self.size = length
        self.num_words = 0         # tokens held, at the front
        self.num_image_tokens = 0  # and at the end

    @property
    def length(self):
        """How many tokens it holds"""
        return self.num_words + self.num_image_tokens

    @property
    def nbytes(self):
        """The memory of its buffers"""
        return sum(2 * keys.nbytes for keys in self.keys)

    def append(self, modality):
        """Note the modality (1, T) of T new tokens -> that of all (1, Tk). The layers bring their
        keys and values."""
        stop = self.length + modality.shape[1]
        assert stop <= self.size, f"{stop} tokens, and there is room for {self.size}"
        self.modality[:, self.length:stop] = modality
        return self.modality[:, :stop]

    def place(self, picture, position):
        """Put the P tokens of a picture (`VisualChat.keep_picture`) at a position: only now are its
        keys rotated, and that is all in which they differ from those at another place."""
        stop = self.size - int((self.modality[:, :position] == IMAGE).sum())
        new = slice(stop - picture.num_image_tokens, stop)
        # the newest first, as they stand in the buffer
        positions = torch.arange(
            position,
            position + picture.num_image_tokens,
            device=self.modality.device).flip(0)                            # (P)
        cos, sin = rotary(positions[None], self.config, self.keys[0].dtype)         # (1, 1, P, d)
        for i, (keys, values) in enumerate(zip(picture.keys, picture.values)):
            self.keys[i][:, :, new] = rotate(keys, cos.to(keys.device), sin.to(keys.device))
            self.values[i][:, :, new] = values

    def advance(self, pattern):
        """After the last layer: only now the new tokens count as held (under "causal" all of them
        as words)."""
        # no call between the two: there an interrupt would leave one without the other
        n = pattern.num_words
        self.num_words += n
        self.num_image_tokens += pattern.positions.shape[1] - n

    def truncate(self, length):
        """Hold the first `length` tokens at most"""
        length = min(length, self.length)
        # under "causal" pictures count as words
        if self.num_image_tokens:
            self.num_image_tokens = int((self.modality[:, :length] == IMAGE).sum())
        self.num_words = length - self.num_image_tokens

    def layer(self, i, pattern):
        """The part of layer i in the pass of a pattern, as `attend` and `CrossAttention` use it"""
        stop = self.num_words + pattern.num_words
        return CacheLayer(
            self.keys[i],
            self.values[i],
            slice(self.num_words, stop),
            stop,
            self.size - pattern.image_mask.shape[3])


@dataclass
class CacheLayer:
    """One layer of a cache during a pass"""
    keys: torch.Tensor            # (1, K, length, d)
    values: torch.Tensor          # (1, K, length, d)
    places: slice | torch.Tensor  # where the new words go; in a CUDA graph (1)
    words_stop: int               # words are looked for up to here
    images_start: int             # and image tokens from here on, those of this pass included

    def add_words(self, k, v):
        """New words (1, K, n, d) go to their places -> all of them, twice (1, K, words, d)"""
        self.keys[:, :, self.places] = k
        self.values[:, :, self.places] = v
        return self.keys[:, :, :self.words_stop], self.values[:, :, :self.words_stop]

    def add_images(self, k, v):
        """New image tokens (1, K, m, d), newest first, go before the old, unless `KVCache.place`
        has put them there (then m is 0) -> all of them"""
        keys, values = self.all_images()
        # a compiler makes a copy of the whole cache even of an empty write
        if k.shape[2]:
            keys[:, :, :k.shape[2]] = k
            values[:, :, :k.shape[2]] = v
        return keys, values

    def all_images(self):
        """Keys and values of all image tokens, newest first, twice (1, K, images, d)"""
        return self.keys[:, :, self.images_start:], self.values[:, :, self.images_start:]


# ---- what serves it: LoRA ------------------------------------------------------------------------

class LoRA(nn.Module):
    """A frozen linear layer and a trained change of low rank (arXiv:2106.09685, section 4.1):
    x W' + x A' B'.

    Its scale alpha / r is 1. B starts at zero: an untrained change changes nothing."""

    def __init__(self, linear, rank):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))   # (r, in)
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))  # (out, r)

    def forward(self, x):
        """x (..., in) -> (..., out)"""
        return (F.linear(F.linear(x, self.lora_A), self.lora_B)
                + F.linear(x, self.weight, self.bias))                      # (..., out)


def add_lora(layers, rank):
    """Put LoRA in the place of every linear layer of some blocks; rank 0 for none"""
    for module in list(layers.modules()) if rank else ():
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(module, name, LoRA(linear, rank))


def merged(weight, A, B):
    """A linear layer's weight (out, in) and LoRA's factors A (r, in), B (out, r) -> W + B A,
    computed in float32"""
    return (weight.float() + B.float() @ A.float()).to(weight.dtype)        # (out, in)


# ---- what serves it: weights from files ----------------------------------------------------------

def read_llama_config(folder):
    """LlamaConfig from a config.json as transformers 4 and 5 write it. What this file does not
    compute is refused by name."""
    file = Path(folder) / "config.json"
    config = read_config(file)
    # transformers 5 has rope_theta in a section, which may also say that the rotation is another
    rope = read_section(config, "rope_scaling") | read_section(config, "rope_parameters")
    default = "default" if rope.keys() <= {"rope_theta"} else "missing"
    config |= {"rope_type": rope.get("type", default), **rope}
    computed = {
        "model_type": ["llama"],
        "attention_bias": [False],
        "mlp_bias": [False],
        "sliding_window": [],
        "hidden_act": ["silu", "swish"],
        "partial_rotary_factor": [1],
        "rope_type": ["default"],
        "quantization_config": []}
    strange = [
        f"{name} = {config[name]!r}"
        for name in computed
        if config.get(name) not in [None, *computed[name]]]
    if strange:
        raise InputError(f"{file}: not supported by this LLaMA-2: {', '.join(strange)}")
    # transformers leaves these out, too
    heads = config.get("num_attention_heads")
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", heads and config.get("hidden_size", 0) // heads)
    return make_config(LlamaConfig, file, config)


def load_llama(
        folder,
        dtype=torch.float32,
        devices=["cpu"],
        empty=partial(torch.device, "meta")):
    """A LLaMA-2 from a folder in Hugging Face layout: config.json and *.safetensors (or *.bin), one
    file or shards.

    The layers are spread over the devices in order. empty() is the context in which the model is
    made before its weights come: nowhere, or DeepSpeed's zero.Init, and then no process holds more
    of it than its part."""
    with empty():
        model = Llama(read_llama_config(folder))
    L = len(model.model.layers)
    devices = devices[:L]
    layers = [devices[i * len(devices) // L] for i in range(L)]
    model.model.devices = layers if len(devices) > 1 else ()
    tied = model.config.tie_word_embeddings

    def rename(name):
        """LLaMA-2's published files hold what is computed; a tied head is the embedding"""
        if name.endswith("rotary_emb.inv_freq") or tied and name == "lm_head.weight":
            return None
        return name

    def place(name):
        if name.startswith("model.layers."):
            return layers[int(name.split(".")[2])]
        return devices[0 if name == "model.embed_tokens.weight" else -1]

    load_weights(model, folder, rename, dtype, place)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def load_vit(
        folder,
        dtype=torch.float32,
        device="cpu",
        feature_layer=-1,
        class_token=True,
        empty=partial(torch.device, "meta")):
    """A vision tower: CLIP's, from a CLIPVisionModel (with the prefix vision_model. or without) or
    a whole CLIPModel; or Qwen-VL's, extracted or from a whole checkpoint, of which nothing else is
    read and no other shard needed."""
    # not in that context: zero.Init would change what a .bin file is read into
    sizes = vit_sizes(folder, feature_layer, class_token)
    with empty():
        model = make_vit(sizes)
    load_weights(model, folder, vit_name, dtype, lambda name: device)
    return model


def vit_sizes(folder, feature_layer=-1, class_token=True):
    """ViTConfig or QwenConfig of a folder; the number of Qwen-VL's queries stands in its weights
    alone"""
    sizes = read_vit_config(folder, feature_layer, class_token)
    for file in weight_files(bases(folder)[0], "model", vit_name):
        for name, shape, _ in read_tensors(file):
            if vit_name(name) == "attn_pool.query":
                sizes.n_queries = shape[0]
    return sizes


def vit_name(name):
    """A name in a published file -> its name in ViT or QwenViT; None for CLIP's text tower,
    Qwen-VL's language model and its last matrix (which the original does not use), and for what is
    computed"""
    others = (
        "transformer.h.", "transformer.wte.", "transformer.ln_f.", "transformer.rotary_emb.",
        "lm_head.", "transformer.visual.proj",
        "text_model.", "text_projection.", "visual_projection.", "logit_scale")
    if name.startswith(others) or name.endswith("position_ids"):
        return None
    return name.removeprefix("transformer.visual.").removeprefix("vision_model.")


def make_vit(config):
    """The vision tower of these sizes, with random weights"""
    return QwenViT(config) if isinstance(config, QwenConfig) else ViT(config)


def bases(folder):
    """[folder], or if it holds only what was trained, first the folders that it was trained from"""
    folder = Path(folder)
    base = read_json(folder / "config.json").get("base")
    return [*bases((folder / base).resolve()), folder] if base else [folder]


def weight_files(folder, part="model", rename=lambda name: name):
    """The files of a part's weights: PART.safetensors, or the shards in its index that hold a
    tensor which rename does not leave out. InputError if there are none."""
    for name in (f"{part}.safetensors", f"pytorch_{part}.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = read_section(read_json(index), "weight_map")
            return [folder / file for file in sorted(
                {shards[name] for name in shards if rename(name)})]
        if (folder / name).exists():
            return [folder / name]
    raise InputError(f"{folder} holds no weights: {part}.safetensors, or shards with "
                     f"{part}.safetensors.index.json, belong there")


def load_weights(module, folder, rename, dtype, place):
    """Fill module from the weights of a folder; what was trained from a base comes on top of it"""
    base, *trained = bases(folder)
    fill(module, weight_files(base, "model", rename), rename, dtype, place)
    parameters = dict(module.named_parameters())
    for folder in trained:
        tensors = {
            name: read()
            for file in weight_files(folder, "trained")
            for name, _, read in read_tensors(file)}
        for name, tensor in tensors.items():
            target, _, factor = name.partition(".lora_")
            if factor == "A":
                continue  # it is taken with its B
            parameter = parameters.get(f"{target}.weight" if factor else name)
            if parameter is None or not factor and tensor.shape != size_of(parameter):
                raise InputError(f"{folder}: {name} does not fit the model of its base {base}")
            with gathered([parameter], writer=0):
                if factor:
                    tensor = merged(
                        parameter.data,
                        tensors[f"{target}.lora_A"].to(parameter),
                        tensor.to(parameter))                               # (out, in)
                parameter.data.copy_(tensor)


def fill(
        module,
        files,
        rename=lambda name: name,
        dtype=None,
        place=lambda name: None):
    """Stream tensors from files into the parameters of module, one at a time; strict.

    rename(name in the file) -> name in the module, or None for a tensor left out on purpose.
    Parameters on the meta device are made as they come, with dtype and on place(name); of those
    that ZeRO-3 has spread process 0 reads each and gives every process its part. InputError names
    unknown and missing tensors and shapes that do not fit."""
    targets = dict(module.named_parameters())
    wrong = []
    for file in files:
        for name, shape, read in read_tensors(file):
            target = rename(name)
            parameter = targets.pop(target, None)
            if target is None:
                continue
            if parameter is None:
                wrong.append(f"{name} is not in the model")
            elif shape != size_of(parameter):
                wrong.append(f"{name} is {tuple(shape)} in the file, {tuple(size_of(parameter))} "
                             "in the model")
            elif parameter.is_meta:
                owner, _, leaf = target.rpartition(".")
                tensor = read().to(place(target), dtype)
                setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor))
            else:
                with gathered([parameter], writer=0):
                    if is_main() or not hasattr(parameter, "ds_id"):
                        parameter.data.copy_(read())
    wrong += [f"{name} is missing" for name in targets]
    if wrong:
        raise InputError(f"the weights in {files and files[0].parent} do not fit the model: "
                         f"{'; '.join(wrong[:5])} ({len(wrong)} in all)")


def read_tensors(file):
    """(name, shape, function that reads it) of each tensor of a .safetensors or, running no code in
    it, a .bin file."""
    try:
        if file.suffix == ".bin":
            # torch's format since version 1.6 can be mapped; before it was a pickle
            content = torch.load(
                file,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(file))
            for name, tensor in content.items():
                yield name, tensor.shape, lambda tensor=tensor: tensor
        else:
            with safe_open(file, "pt") as content:
                for name in content.keys():
                    shape = torch.Size(content.get_slice(name).get_shape())
                    yield name, shape, partial(content.get_tensor, name)
    except Exception as error:  # of a damaged file anything
        reason = reason_of(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = "they hold more than tensors, and code in them could run"
        raise InputError(f"weights {file} cannot be read: {reason}; was it downloaded whole, or is "
                         "it a Git LFS pointer?") from error


# ---- what serves it: weights to files ------------------------------------------------------------

@contextmanager
def whole_folder(folder):
    """A folder to write to, which takes the place of `folder` when all is written: whatever
    happens, a half of one never has that name"""
    folder = Path(folder).resolve()
    work = folder.with_name(f".{folder.name}.unfinished")
    old = folder.with_name(f".{folder.name}.old.unfinished")
    try:
        if is_main():
            for leftover in (work, old):
                shutil.rmtree(leftover, ignore_errors=True)
        yield work
        if is_main():
            if folder.exists():
                folder.rename(old)
            work.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    except (InputError, OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise InputError(f"{folder} cannot be written: {reason_of(error)}") from error


def write_configs(model, folder, tokenizer, bases):
    """The files of a checkpoint that are no weights; bases as in `save_pretrained`"""
    vision = model.vision_model.config
    own = {
        "model_type": "visualchat",
        "attention": model.attention,
        "projection": model.projection_kind,
        "image_tokens": model.image_tokens,
        "feature_layer": vision.feature_layer,
        "class_token": vision.class_token}
    language = {"model_type": "llama", **asdict(model.language_model.config)}
    tower = {"model_type": "clip_vision_model", **asdict(vision)}
    # they are no part of the tower
    del tower["feature_layer"], tower["class_token"]
    if isinstance(vision, QwenConfig):
        tower = {"visual": vision.visual}
    preprocessing = {"image_processor_type": "CLIPImageProcessor", **model.preprocessing}

    (folder / "language_model").mkdir(parents=True)
    (folder / "vision_model").mkdir()
    if tokenizer:
        shutil.copyfile(tokenizer.file, folder / "language_model/tokenizer.model")
        # with others transformers would not stop
        language |= {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    if bases:
        # relative to where the folder will be when it is whole, beside this one
        language["base"], tower["base"] = (
            os.path.relpath(Path(base).resolve(), folder / "language_model") for base in bases)
    write_json(folder / "config.json", own)
    write_json(folder / "language_model/config.json", language)
    write_json(folder / "vision_model/config.json", tower)
    write_json(folder / "vision_model/preprocessor_config.json", preprocessing)


def plain_weights(module, prefix=""):
    """(name, parameters that it is made of) of each tensor of a model as it is published: LoRA's
    factors are merged"""
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner)
        if isinstance(owner, LoRA) and leaf == "weight":
            yield prefix + name, [parameter, owner.lora_A, owner.lora_B]
        elif not leaf.startswith("lora_"):
            yield prefix + name, [parameter]


SHARD_BYTES = 1e9  # of a file: so much, or one tensor, process 0 gathers before it writes


def save_weights(tensors, file):
    """Write (name, parameters) of `plain_weights` to a .safetensors file; if they are more than
    SHARD_BYTES, to shards with an index."""
    shards = [[]]
    size = 0
    for name, parts in tensors:
        count = size_of(parts[0]).numel() * parts[0].element_size()
        size += count
        if shards[-1] and size > SHARD_BYTES:
            shards.append([])
            size = count
        shards[-1].append((name, parts))
    index = {}
    for n, shard in enumerate(shards, 1):
        numbered = f"{file.stem}-{n:05d}-of-{len(shards):05d}.safetensors"
        target = file.with_name(numbered) if len(shards) > 1 else file
        content = {}
        for name, parts in shard:
            index[name] = target.name
            with gathered(parts):
                if is_main():
                    tensor = parts[0] if len(parts) == 1 else merged(*parts)
                    if not tensor.isfinite().all():
                        raise InputError(f"{name} has values that are no finite numbers")
                    content[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if is_main():
            save_file(content, target, {"format": "pt"})
    if len(shards) > 1 and is_main():
        write_json(
            file.with_name(f"{file.name}.index.json"),
            {"metadata": {}, "weight_map": index})


def write_json(path, content):
    """Write content to a JSON file, readable and in UTF-8"""
    Path(path).write_text(
        json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8")


# ---- what serves it: processes and devices -------------------------------------------------------

def size_of(parameter):
    """The shape of a parameter, also where ZeRO-3 holds only this process's part of it"""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameters, writer=None):
    """A context in which parameters that ZeRO-3 has spread are whole; what process `writer` changes
    is everybody's"""
    if not hasattr(parameters[0], "ds_id"):
        return nullcontext()
    import deepspeed
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer)


def choose_device(device=None, dtype=None):
    """Choose device, number format and attention's kernels; the choice is printed.

    device: "cpu", "cuda:1", several with commas between, None for the best there is; dtype:
    "float32", "bfloat16", "float16", None for the best that the devices compute. Returns (list of
    torch.device, torch.dtype)."""
    # cuDNN's attention, torch's first choice on an H100, makes a plan for each new shape (half a
    # second), and here nearly every batch has one; with a mask some shapes give NaN gradients
    # (pytorch issue 196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    devices = []
    for name in str(device).split(","):
        try:
            devices.append(torch.empty(1, device=name).device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
            raise InputError(f"device {name}: {reason_of(error)}") from error
    if dtype is None:
        kinds = {device.type for device in devices}
        dtype = "float32" if kinds == {"cpu"} else "bfloat16"
        # older GPUs have no bfloat16
        if "cuda" in kinds and not torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = "float16"
    if not int(os.environ.get("RANK", 0)):
        print(f"device {', '.join(map(str, devices))}, number format {dtype}")
    return devices, getattr(torch, dtype)
