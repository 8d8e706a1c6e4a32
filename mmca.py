"""Who attends to whom, with how many softmaxes.

This file explains multi-modal causal attention (MMCA): section 3 and figure 2 of the
DeepSpeed-VisualChat post, section 3 of the paper (arXiv:2309.14327). Beside it stand the two
mechanisms that it is compared with: causal attention (CA) and cross attention with causal attention
(CrA). `attend_explicit` is the formula word for word; `attend` gives the same numbers as two
ordinary attentions, because the rows stand in the order that the mechanism wants: words first,
image tokens behind them (`Pattern`). Not here: the projections to queries, keys and values, rotary
positions and the cache (model.py).

    python mmca.py                             draws figure 2, and compares the two ways
    python mmca.py "text text <image> text"    the same for a sequence of your own

The example of this file, five tokens T T I I T (text, image); a row is a query, a column a key:

    position     M             M1 = [M == 1]     M2 = [M == 2]     arranged: positions 0 1 4, 3 2
    0 T          1 · · · ·     1 · · · ·         · · · · ·         image_mask, keys 3 2:
    1 T          1 1 · · ·     1 1 · · ·         · · · · ·             query 0: · ·
    2 I          · · 1 · ·     · · 1 · ·         · · · · ·             query 1: · ·
    3 I          · · · 1 ·     · · · 1 ·         · · · · ·             query 4: 1 1
    4 T          1 1 2 2 1     1 1 · · 1         · · 1 1 ·

Shapes: B batch, T tokens (Tq queries, Tk keys), H heads, K key/value heads, d head width; n words
and m image tokens.
"""
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

PAD, TEXT, IMAGE = 0, 1, 2  # the modality of a position: the one thing that says where pictures are


# ---- the definition ------------------------------------------------------------------------------

def attention_matrix(query_modality, key_modality, kind="mmca"):
    """M: which softmax, if any, lets a query see a key (the post, figure 2).

    query_modality (B, Tq), key_modality (B, Tk): PAD, TEXT or IMAGE; the queries are the last Tq of
    the Tk positions. kind "mmca" or "cross": 1 where text meets text at or before it and where an
    image token meets itself (under "cross" no such row passes the decoder), 2 where text meets an
    image token before it, 0 elsewhere. kind
    "causal": 1 at or before. Padding neither sees nor is seen. Returns M (B, Tq, Tk) of int64.
    ValueError if kind is not known."""
    if kind not in ("mmca", "causal", "cross"):
        raise ValueError(f"attention is one of mmca, causal, cross; not {kind!r}")
    key = torch.arange(key_modality.shape[1], device=key_modality.device)   # (Tk)
    query = key[-query_modality.shape[1]:, None]                            # (Tq, 1)
    q = query_modality[:, :, None]                                          # (B, Tq, 1)
    k = key_modality[:, None]                                               # (B, 1, Tk)
    # a product with PAD, which is 0, is PAD
    past = (key <= query) & (q * k != PAD)                                  # (B, Tq, Tk)
    if kind == "causal":
        return past.long()                                                  # (B, Tq, Tk)
    # TEXT and IMAGE are the numbers of the softmaxes: a word sees words with 1, image tokens with
    # 2; an image token sees itself with 1
    return past * torch.where(q == TEXT, k, key == query)                   # (B, Tq, Tk)


def softmax(q, k, keep):
    """softmax(QK' . keep): the entries to keep, True in keep, share a weight of one.

    "." removes an entry before the softmax; a row that has none left is zero. q (B, H, Tq, d),
    k (B, K, Tk, d), keep (B, 1, Tq, Tk) -> (B, H, Tq, Tk)"""
    scores = q @ _shared(k, q).transpose(2, 3) / q.shape[3] ** 0.5          # (B, H, Tq, Tk)
    # the least number there is, not -inf: a row with nothing to keep would be NaN. Times keep it
    # is zero
    scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)       # (B, H, Tq, Tk)
    return scores.softmax(3) * keep                                         # (B, H, Tq, Tk)


def attend_explicit(q, k, v, M):
    """(softmax(QK' . M1) + softmax(QK' . M2)) V with M1 = [M == 1], M2 = [M == 2]: the formula,
    word for word.

    The terms are summed, not averaged: a text row that sees pictures has a total weight of 2.
    q (B, H, Tq, d), k and v (B, K, Tk, d), M (B, Tq, Tk) -> (B, H, Tq, d). Slow and plain: for
    reading, for experiments with M, and to judge `attend`."""
    M = M[:, None]                                                          # (B, 1, Tq, Tk)
    v = _shared(v, q)                                                       # (B, H, Tk, d)
    return (softmax(q, k, M == 1) + softmax(q, k, M == 2)) @ v              # (B, H, Tq, d)


# ---- the same, fast ------------------------------------------------------------------------------

@dataclass
class Pattern:
    """Who stands where and sees whom: made once a forward, used by every layer.

    Where a row lies in memory means nothing to a transformer: its position comes from the rotation,
    and what it sees from M. So the rows are sorted once: all words in reading order, behind them
    all image tokens, the newest first. A batch row with fewer words or image tokens than the
    longest is filled up with rows at position Tk: behind everything, where nothing sees them. Under
    "causal" all are words, in reading order."""
    kind: str
    positions: torch.Tensor         # (B, n + m) of each arranged row
    text_mask: torch.Tensor | None  # (B, 1, n, all words), the M1 term; None: is_causal says it
    image_mask: torch.Tensor        # (B, 1, n, all image tokens), the M2 term
    queries: range                  # the positions that are arranged

    @property
    def num_words(self):
        """n, the word rows of the arranged order"""
        return self.image_mask.shape[2]

    @property
    def batch(self):
        """0, 1, ... (B, 1): the batch row of each place"""
        return torch.arange(len(self.positions), device=self.positions.device)[:, None]

    def arrange(self, x):
        """x (B, T, ...) in reading order -> (B, n + m, ...), words first; fillers hold the last
        row's numbers: where x is labels, the -100 that model.py puts at their end"""
        place = self.positions - self.queries.start                         # (B, n + m)
        return x[self.batch, place.clamp(max=x.shape[1] - 1)]               # (B, n + m, ...)

    def restore(self, y):
        """y (B, n + m, ...), words first -> (B, T, ...) in reading order; padding is zero"""
        # one place behind the last position takes what the fillers hold, and is cut off
        x = y.new_zeros(len(y), self.queries.stop + 1, *y.shape[2:])        # (B, Tk + 1, ...)
        x[self.batch, self.positions] = y
        return x[:, self.queries.start:-1]                                  # (B, T, ...)


def make_pattern(query_modality, key_modality, kind="mmca", fill=1):
    """query_modality (B, Tq), the last Tq of key_modality (B, Tk) -> Pattern. Where Tq < Tk, in a
    conversation that goes on, B is 1. Image tokens are filled up to a multiple of fill.

    A rule of your own about what words see of the pictures is an edit of the comparison that makes
    image_mask, and of `attention_matrix`: `python mmca.py` shows whether the two agree. On a GPU
    also of `shown` in chat.py's FixedStep, by which an answer's words are read."""
    Tk = key_modality.shape[1]
    start = Tk - query_modality.shape[1]
    # CA knows no pictures: their tokens are words like others, padding stays what it is
    if kind == "causal":
        key_modality = key_modality.clamp(max=TEXT)

    all_words = _positions(TEXT, key_modality)                              # (B, all words)
    all_images = _positions(IMAGE, key_modality)                            # (B, all images)
    # fill: a GPU's kernels take masks whose rows are multiples of 8.
    # flip: the newest stands first, as in a cache, which they fill from its end. So what a cache
    # holds of them is one slice, and the new ones stand before it
    all_images = F.pad(
        all_images, (0, -all_images.shape[1] % fill), value=Tk).flip(1)     # (B, all images)
    # of these the rows of this pass (with start 0 all, else B is 1)
    words = all_words[:, all_words[0] >= start]                             # (B, n)
    images = all_images[:, all_images[0] >= start]                          # (B, m)

    # M1 among the words. Where the keys are the queries, it is the triangle that torch makes
    # without a mask; its is_causal is aligned to the top left: wrong where a cache was before
    query = words[:, None, :, None]                                         # (B, 1, n, 1)
    text_mask = None
    if start:
        text_mask = all_words[:, None, None] <= query                       # (B, 1, n, all words)
    # M2: a word sees the image tokens before it. A filler's position Tk is before none
    image_mask = all_images[:, None, None] < query                          # (B, 1, n, all images)
    return Pattern(
        kind,
        torch.cat([words, images], 1),
        text_mask,
        image_mask,
        queries=range(start, Tk))


def attend(q, k, v, pattern, cache=None):
    """The same as `attend_explicit`, as two ordinary attentions over slices: words to words, words
    to image tokens.

    q (B, H, n, d), k and v (B, K, n + m, d), words first -> (B, H, n + m, d). kind "cross": the M1
    term alone, since the M2 term is the added layers'. With a `cache` (`KVCache.layer`) k and v are
    those of the new rows; the earlier come from it.

    That an image token sees itself alone is not asked of M, but said here: its result is its own v,
    and so `LlamaAttention` makes no query for it. A rule by which it sees more needs a query and a
    softmax: the formula has both (tests/experiment.py)."""
    n = q.shape[2]
    # copies: torch.compile (2.13, seen on a CPU) takes strides of slices for constants, and the
    # next shape fails
    words = [x[:, :, :n].contiguous() for x in (k, v)]                      # (B, K, n, d), twice
    images = [x[:, :, n:].contiguous() for x in (k, v)]                     # (B, K, m, d), twice
    # a softmax over one entry is 1, and 1 times v is v
    own = _shared(images[1], q)                                             # (B, H, m, d)
    if cache is not None:
        words = cache.add_words(*words)                                     # (B, K, all words, d)
        images = cache.add_images(*images)                                  # (B, K, all images, d)
    out = _attention(q, *words, pattern.text_mask)                          # (B, H, n, d)
    if pattern.kind == "mmca" and images[0].shape[2]:
        out = out + image_term(q, *images, pattern)                         # (B, H, n, d)
    return torch.cat([out, own], 2)                                         # (B, H, n + m, d)


def image_term(q, k, v, pattern):
    """softmax(QK' . M2) V for the words: q (B, H, n, d), k and v (B, K, all images, d) ->
    (B, H, n, d)"""
    # a word with no picture before it sees nothing. Kernels differ in what they make of that, some
    # give NaN: so it sees everything, and then its result is made zero
    mask = pattern.image_mask.to(q.device)                                  # (B, 1, n, all images)
    blind = ~mask.any(3, keepdim=True)                                      # (B, 1, n, 1)
    out = _attention(q, k, v, mask | blind)                                 # (B, H, n, d)
    return out.masked_fill(blind, 0)                                        # (B, H, n, d)


def reads_pictures_once(kind):
    """Whether the keys and values of a picture depend on it alone, so that a chat may keep them.

    So it is where an image token sees itself alone. That is asked of `attention_matrix`, so that a
    rule of your own there is noticed. Under "cross" no picture passes the decoder: False."""
    # on the CPU, also where a model is made on a device that holds no numbers
    modality = torch.tensor([[TEXT, IMAGE, IMAGE]], device="cpu")           # (1, 3)
    M = attention_matrix(modality, modality, kind)                          # (1, 3, 3)
    return kind != "cross" and M[0, 2].tolist() == [0, 0, 1]


# ---- what serves it ------------------------------------------------------------------------------

def _positions(which, modality):
    """The positions of `which` in modality (B, T) -> (B, as many as the fullest batch row has), in
    order, filled up with T"""
    T = modality.shape[1]
    position = torch.arange(T, device=modality.device)                      # (T)
    # what is not asked for counts as at T, behind every position, where nothing sees it: image
    # tokens of the example stand at 5 5 2 3 5, sorted at 2 3 5 5 5, of which 2 3 are left
    found = position.where(modality == which, T).sort(1).values             # (B, T)
    return found[:, :(found < T).sum(1).max()]


def _attention(q, k, v, mask):
    """softmax(QK') V by torch, where mask says so; None: each query sees the keys up to its own"""
    grouped = k.shape[1] < q.shape[1]
    if mask is not None:
        # layers may be on several devices
        mask = mask.to(q.device)
        # of a GPU's kernels flash attention alone takes grouped heads, and it takes no mask: torch
        # would make the whole (B, H, n, m)
        if grouped and not q.is_cpu:
            return _attention(q, _shared(k, q), _shared(v, q), mask)        # (B, H, n, d)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        is_causal=mask is None,
        enable_gqa=grouped)


def _shared(x, q):
    """x (B, K, m, d) -> (B, H, m, d): each key/value head serves H / K heads of the queries q"""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def main():
    """Draw figure 2 of the post, or M for the words of the command line, where <image> is one image
    token; then compare `attend` with the formula."""
    figure_2 = "User : <image1> <image2> <image3> Please describe the image ."
    words = (" ".join(sys.argv[1:]) or figure_2).split()
    modality = torch.tensor([
        [IMAGE if word.startswith("<image") else TEXT for word in words]])  # (1, T)
    M = attention_matrix(modality, modality)                                # (1, T, T)
    causal = attention_matrix(modality, modality, "causal")                 # (1, T, T)
    # image tokens do not pass the decoder
    cross = M * (modality == TEXT)[:, :, None]                              # (1, T, T)

    column = 2 * len(words) + 3
    print("A row is a query, a column a key, in the same order; . is not seen.\n")
    print(f"{'':11}{'CA':{column}}{'CrA':{column}}MMCA")
    for word, *rows in zip(words, causal[0], cross[0], M[0]):
        drawn = [" ".join(".12"[m] for m in row) for row in rows]
        print(f"{word:11}" + "    ".join(drawn))
    print("\nCA: softmax over 1. CrA: softmax over 1 in the layer, over 2 in an added one. MMCA:\n"
          "softmax(QK' . M1) + softmax(QK' . M2), M1 = [M == 1], M2 = [M == 2]; M is on the right.")

    # random queries, keys and values of one head, by the formula and by the fast way
    qkv = torch.randn(3, 1, 1, len(words), 16)                              # (1, 1, T, d) each
    explicit = attend_explicit(*qkv, M)                                     # (1, 1, T, d)
    pattern = make_pattern(modality, modality)
    order = pattern.positions[0]                                            # (T), words first
    q, k, v = qkv[..., order, :]                                            # (1, 1, T, d) each
    fast = attend(q[:, :, :pattern.num_words], k, v, pattern)               # (1, 1, T, d)
    difference = fast - explicit[:, :, order]                               # (1, 1, T, d)
    print(f"attend and attend_explicit differ by {difference.abs().max():.0e} at most "
          "(rounding: below 1e-05).")


if __name__ == "__main__":
    main()
