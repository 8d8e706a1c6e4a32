"""Who attends to whom, with how many softmaxes.

This file explains multi-modal causal attention (MMCA): section 3 and figure 2 of the DeepSpeed-VisualChat post, section
3 of the paper (arXiv:2309.14327). Beside it stand the two mechanisms that it is compared with: causal attention (CA)
and cross attention with causal attention (CrA). `attend_explicit` is the formula word for word; `attend` gives the
same numbers as two ordinary attentions, because the rows stand in the order that the mechanism wants: words first,
image tokens behind them (`Pattern`). Not here: the projections to queries, keys and values, rotary positions and the
cache (model.py).

    python mmca.py                             draws figure 2
    python mmca.py "text text <image> text"    draws M for a sequence of your own

Shapes: B batch, T tokens (Tq queries, Tk keys), H heads, K key/value heads, d head width; n words and m image tokens.
"""
import sys
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F

PAD, TEXT, IMAGE = 0, 1, 2  # the modality of a position: the one thing that says where pictures are


# ---- the definition ------------------------------------------------------------------------------------------------

def attention_matrix(query_modality, key_modality, kind="mmca"):
    """M: which softmax, if any, lets a query see a key (the post, figure 2).

    query_modality (B, Tq), key_modality (B, Tk): PAD, TEXT or IMAGE; the queries are the last Tq of the Tk positions.
    kind "mmca" or "cross": 1 where text meets text at or before it and where an image token meets itself, 2 where text
    meets an image token before it, 0 elsewhere. kind "causal": 1 at or before. Padding neither sees nor is seen.
    Returns M (B, Tq, Tk) of int64."""
    _check(kind)
    Tq, Tk = query_modality.shape[1], key_modality.shape[1]
    key = torch.arange(Tk, device=key_modality.device)
    query = key[Tk - Tq:, None]                                         # (Tq, 1)
    q, k = query_modality[:, :, None], key_modality[:, None]            # (B, Tq, 1), (B, 1, Tk)
    past = (key <= query) & (q != PAD) & (k != PAD)                     # (B, Tq, Tk)
    if kind == "causal":
        return past.long()                                              # (B, Tq, Tk)
    first = (q == TEXT) & (k == TEXT) | (q == IMAGE) & (key == query)   # (B, Tq, Tk)
    second = (q == TEXT) & (k == IMAGE)                                 # (B, Tq, Tk)
    return past * (first + 2 * second)                                  # (B, Tq, Tk)


def softmax(q, k, keep):
    """softmax(QK' . keep): the entries to keep, True in keep, share a weight of one. "." removes an entry before the
    softmax; a row that has none left is zero. q (B, H, Tq, d), k (B, K, Tk, d), keep (B, 1, Tq, Tk) ->
    (B, H, Tq, Tk)"""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)                # (B, H, Tk, d)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5                  # (B, H, Tq, Tk)
    empty = ~keep.any(3, keepdim=True)                                  # (B, 1, Tq, 1)
    scores = scores.masked_fill(~(keep | empty), -torch.inf)            # (B, H, Tq, Tk)
    return scores.softmax(3).masked_fill(empty, 0)                      # (B, H, Tq, Tk)


def attend_explicit(q, k, v, M):
    """(softmax(QK' . M1) + softmax(QK' . M2)) V with M1 = [M == 1], M2 = [M == 2]: the formula, word for word.

    The terms are summed, not averaged: a text row that sees pictures has a total weight of 2. q (B, H, Tq, d), k and
    v (B, K, Tk, d), M (B, Tq, Tk) -> (B, H, Tq, d). Slow and plain: for reading, for experiments with M, and to judge
    `attend`."""
    M = M[:, None]                                                      # (B, 1, Tq, Tk)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)                # (B, H, Tk, d)
    return (softmax(q, k, M == 1) + softmax(q, k, M == 2)) @ v          # (B, H, Tq, d)


# ---- the same, fast ------------------------------------------------------------------------------------------------

@dataclass
class Pattern:
    """Who stands where and sees whom: made once a forward, used by every layer.

    Where a row lies in memory means nothing to a transformer: its position comes from the rotation, and what it sees
    from M. So the rows are sorted once: all words in reading order, behind them all image tokens, the newest first, as
    a cache holds them that fills up from its end: text image image text text stand as positions 0 3 4, 2 1. A batch row
    with fewer words or image tokens than the longest is filled up with rows at position Tk: behind everything, where
    nothing sees them. Under "causal" all are words, in reading order."""
    kind: str
    positions: torch.Tensor         # (B, n + m) of each arranged row
    text_mask: torch.Tensor | None  # (B, 1, n, all words), the M1 term; None where is_causal says the same
    image_mask: torch.Tensor        # (B, 1, n, all image tokens), the M2 term
    queries: range                  # the positions that are arranged

    @property
    def num_words(self):
        """n, the word rows of the arranged order"""
        return self.image_mask.shape[2]

    def to(self, device):
        """The same on another device"""
        masks = (mask if mask is None else mask.to(device) for mask in (self.text_mask, self.image_mask))
        return Pattern(self.kind, self.positions.to(device), *masks, self.queries)

    def arrange(self, x):
        """x (B, T, ...) in reading order -> (B, n + m, ...), words first; fillers hold the last row's numbers"""
        batch = torch.arange(len(x), device=x.device)[:, None]          # (B, 1)
        place = self.positions - self.queries.start                     # (B, n + m)
        return x[batch, place.clamp(max=x.shape[1] - 1)]                # (B, n + m, ...)

    def restore(self, y):
        """y (B, n + m, ...), words first -> (B, T, ...) in reading order; padding is zero"""
        batch = torch.arange(len(y), device=y.device)[:, None]          # (B, 1)
        x = y.new_zeros(len(y), len(self.queries) + 1, *y.shape[2:])    # (B, T + 1, ...), one place for the fillers
        x[batch, self.positions - self.queries.start] = y
        return x[:, :-1]                                                # (B, T, ...)


def make_pattern(query_modality, key_modality, kind="mmca", fill=1):
    """query_modality (B, Tq), the last Tq of key_modality (B, Tk) -> Pattern, whose m is a multiple of fill. ValueError
    if kind is not known or there are more queries than keys.

    A rule of your own about what words see of the pictures is an edit of the comparison that makes image_mask."""
    _check(kind)
    if kind == "causal":
        key_modality = key_modality.clamp(max=TEXT)
    Tq, Tk = query_modality.shape[1], key_modality.shape[1]
    if Tq > Tk:
        raise ValueError(f"{Tq} queries cannot be the last of {Tk} positions")
    position = torch.arange(Tk, device=key_modality.device)             # (Tk)

    def positions(modality, start=0, fill=1):
        """The positions of a modality from start on, in order -> (B, as many as the fullest batch row has)"""
        found = position.where(key_modality == modality, Tk)[:, start:].sort(1).values  # (B, Tk - start), Tk at the end
        most = int((found < Tk).sum(1).max())
        return F.pad(found[:, :most], (0, -most % fill), value=Tk)

    words = positions(TEXT, Tk - Tq)                                    # (B, n)
    images = positions(IMAGE, Tk - Tq, fill).flip(1)                    # (B, m)
    query = words[:, None, :, None]                                     # (B, 1, n, 1)
    text_mask = None
    if Tq < Tk:  # is_causal is aligned to the top left: right only where the keys are the queries
        text_mask = positions(TEXT)[:, None, None] <= query             # (B, 1, n, all words)
    key = positions(IMAGE, 0, fill).flip(1)[:, None, None]              # (B, 1, 1, all image tokens)
    image_mask = key < query                                            # (B, 1, n, all image tokens)
    return Pattern(kind, torch.cat([words, images], 1), text_mask, image_mask, range(Tk - Tq, Tk))


def attend(q, k, v, pattern, cache=None):
    """The same as `attend_explicit`, as two ordinary attentions over slices: words to words, words to image tokens.

    An image token sees only itself, so its result is its own v, and queries exist for words alone. q (B, H, n, d), k
    and v (B, K, n + m, d), words first -> (B, H, n + m, d). kind "cross": the M1 term alone, since the M2 term is the
    added layers'. With a `cache` (`KVCache.layer`) k and v are those of the new rows; the earlier come from it."""
    n = q.shape[2]
    # copies: torch.compile (2.13, seen on a CPU) takes strides of slices for constants, and the next shape fails
    words = k[:, :, :n].contiguous(), v[:, :, :n].contiguous()          # (B, K, n, d), twice
    images = k[:, :, n:].contiguous(), v[:, :, n:].contiguous()         # (B, K, m, d), twice
    own = images[1].repeat_interleave(q.shape[1] // v.shape[1], 1)      # (B, H, m, d)
    if cache is not None:
        words, images = cache.add_words(*words), cache.add_images(*images)
    out = _attention(q, *words, pattern.text_mask)                      # (B, H, n, d), the M1 term
    if pattern.kind == "mmca" and images[0].shape[2]:
        out = out + image_term(q, *images, pattern)                     # (B, H, n, d)
    return torch.cat([out, own], 2)                                     # (B, H, n + m, d)


def image_term(q, k, v, pattern):
    """softmax(QK' . M2) V for the words: q (B, H, n, d), k and v (B, K, all image tokens, d) -> (B, H, n, d)

    A word with no picture before it sees nothing. Kernels differ in what they make of that, some give NaN: so it sees
    everything, and then its result is made zero."""
    blind = ~pattern.image_mask.any(3, keepdim=True)                    # (B, 1, n, 1)
    out = _attention(q, k, v, pattern.image_mask | blind)               # (B, H, n, d)
    return out.masked_fill(blind, 0)


def _attention(q, k, v, mask):
    """softmax(QK') V by torch, where mask says so; None: each query sees the keys up to its own"""
    grouped = k.shape[1] < q.shape[1]
    if grouped and mask is not None and not q.is_cpu:
        # of a GPU's kernels flash attention alone takes grouped heads, and it takes no mask: torch
        # would make the whole (B, H, n, m)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)            # (B, H, m, d)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)            # (B, H, m, d)
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


def _check(kind):
    if kind not in ("mmca", "causal", "cross"):
        raise ValueError(f"attention is one of mmca, causal, cross; not {kind!r}")


def main():
    """Draw figure 2 of the post, or M for the words of the command line, where <image> is one image token."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character
    words = " ".join(sys.argv[1:]).split() or "User : <image> <image> <image> Please describe the image .".split()
    modality = torch.tensor([[IMAGE if word == "<image>" else TEXT for word in words]])     # (1, T)
    causal, M = (attention_matrix(modality, modality, kind)[0] for kind in ("causal", "mmca"))  # (T, T), (T, T)
    cross = M * (modality[0] == TEXT)[:, None]                          # (T, T)
    titles = "CA: softmax over 1", "CrA: 1 in the layer, 2 in an added one", "MMCA: softmax over 1 + softmax over 2"
    number = count(1)
    tokens = [f"I-token{next(number)}" if word == "<image>" else word for word in words]
    label = max(map(len, tokens)) + 2
    column = max(2 * len(tokens), *map(len, titles)) + 3
    print("A row is a query, a column a key, in the same order; · is not seen.\n")
    print(" " * label + "".join(title.ljust(column) for title in titles).rstrip())
    for token, *rows in zip(tokens, causal, cross, M):
        drawn = (" ".join("·12"[m] for m in row).ljust(column) for row in rows)
        print(token.ljust(label) + "".join(drawn).rstrip())
    print("\nMMCA: softmax(QK' . M1) + softmax(QK' . M2), M1 = [M == 1], M2 = [M == 2]; M is the drawing on the right.")


if __name__ == "__main__":
    main()
