"""Who attends to whom, with how many softmaxes.

This file explains multi-modal causal attention (MMCA): section 3 and figure 2 of the DeepSpeed-VisualChat post, section
3 of the paper (arXiv:2309.14327). Beside it stand the two mechanisms that it is compared with: causal attention (CA)
and cross attention with causal attention (CrA). `attend_explicit` is the formula word for word; `attend` gives the
same numbers without ever building a T x T matrix of floats. Not here: the projections to queries, keys and values,
rotary positions and the cache (model.py).

    python mmca.py                             draws figure 2
    python mmca.py "text text <image> text"    draws M for a sequence of your own

Shapes: B batch, T tokens (Tq queries, Tk keys), H heads, K key/value heads, d head width.
"""
import sys
from dataclasses import dataclass, replace
from itertools import count

import torch
import torch.nn.functional as F

PAD, TEXT, IMAGE = 0, 1, 2  # the modality of a position: the one thing that says where pictures are


def attention_matrix(query_modality, key_modality, kind="mmca"):
    """M: which softmax, if any, lets a query see a key (the post, figure 2).

    query_modality (B, Tq), key_modality (B, Tk): PAD, TEXT or IMAGE; the queries are the last Tq of the Tk positions.
    kind "mmca" or "cross": 1 where text meets text at or before it and where an image token meets itself, 2 where text
    meets an image token before it, 0 elsewhere. kind "causal": 1 at or before. Padding neither sees nor is seen.
    Returns M (B, Tq, Tk) of int64."""
    _check(query_modality, key_modality, kind)
    Tq, Tk = query_modality.shape[1], key_modality.shape[1]
    key = torch.arange(Tk, device=key_modality.device)
    query = key[Tk - Tq:, None]                                                              # (Tq, 1)
    q, k = query_modality[:, :, None], key_modality[:, None, :]                              # (B, Tq, 1), (B, 1, Tk)
    past = (key <= query) & (q != PAD) & (k != PAD)                                          # (B, Tq, Tk)
    if kind == "causal":
        return past.long()                                                                   # (B, Tq, Tk)
    first = past & ((q == TEXT) & (k == TEXT) | (q == IMAGE) & (key == query))               # (B, Tq, Tk)
    second = past & (q == TEXT) & (k == IMAGE)                                               # (B, Tq, Tk)
    return first + 2 * second                                                                # (B, Tq, Tk)


def attend_explicit(q, k, v, M):
    """(softmax(QK' . M1) + softmax(QK' . M2)) V with M1 = [M == 1], M2 = [M == 2]: the formula, word for word.

    "." removes an entry before the softmax; a row that has none left gets zero from that term. The terms are summed,
    not averaged: a text row that sees pictures has a total weight of 2. q (B, H, Tq, d), k and v (B, K, Tk, d),
    M (B, Tq, Tk) -> (B, H, Tq, d). Slow and plain: for reading, for experiments with M, and to judge `attend`."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))                # (B, H, Tk, d)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                                    # (B, H, Tq, Tk)

    def softmax(keep):
        row = keep.any(-1, keepdim=True)
        weights = scores.masked_fill(~keep & row, -torch.inf).softmax(-1)                    # (B, H, Tq, Tk)
        return weights.masked_fill(~row, 0)

    return (softmax((M == 1)[:, None]) + softmax((M == 2)[:, None])) @ v                     # (B, H, Tq, d)


@dataclass
class Rows:
    """Some of the T positions of every batch row, moved together: (B, T, ...) <-> (B, n, ...).

    index (B * n) counts through the flattened (B, T); None means the first n. Batch rows with fewer than n members are
    filled up with positions that are none; `real` (B, n) is False there (None: no such fillers)."""
    n: int
    index: torch.Tensor | None = None
    real: torch.Tensor | None = None

    def take(self, x, dim=1):
        """x (B, T, ...), or with T at dim -> (B, n, ...)"""
        if self.index is None:
            return x if self.n == x.shape[dim] else x.narrow(dim, 0, self.n)
        x = x.transpose(1, dim)
        x = x.flatten(0, 1).index_select(0, self.index).unflatten(0, (len(x), self.n))       # (B, n, ...)
        return x.transpose(1, dim)

    def put(self, x, rows):
        """x (B, T, ...) with the members replaced by rows (B, n, ...)"""
        if self.index is None:
            return rows if self.n == x.shape[1] else torch.cat([rows, x[:, self.n:]], 1)
        index, rows = self.index, rows.flatten(0, 1)
        if self.real is not None:
            index, rows = index[self.real.flatten()], rows[self.real.flatten()]
        return x.flatten(0, 1).index_copy(0, index, rows).view_as(x)


def _rows(modality, kind):
    """Rows of the positions of one kind in modality (B, T): TEXT in order, fillers last; IMAGE from last to first."""
    B, T = modality.shape
    member, place = modality == kind, torch.arange(T, device=modality.device)                # (B, T), (T)
    counts = member.sum(1, keepdim=True)                                                     # (B, 1)
    real, n = place < counts, int(counts.max())                                              # (B, T)
    if kind == TEXT and bool(((member == real) & (real | (modality == PAD) | (place >= n))).all()):
        return Rows(n)  # the first n already, but for padding
    index, real = member.byte().argsort(descending=True, stable=True)[:, :n], real[:, :n]    # (B, n), (B, n)
    if kind == IMAGE:
        index, real = index.flip(1), real.flip(1)
    index = index + T * torch.arange(B, device=modality.device)[:, None]
    return Rows(n, index.flatten(), None if bool(real.all()) else real)


@dataclass
class Pattern:
    """Everything that `attend` needs to know about the modalities, made once a forward and used by every layer.

    Images stand newest first, so that the pictures before a query are always a suffix, also in a cache that fills up
    from its end. Under "causal" every token counts as text."""
    kind: str
    queries: Rows  # the text rows among the queries: the only ones that attend
    keys: Rows  # the text rows among the keys
    images: Rows  # the image rows among the keys
    new_images: Rows  # the image rows among the queries: what a cache has still to learn
    text_mask: torch.Tensor | None  # (B, 1, n, text keys) of bool; None where is_causal says the same or all is seen
    is_causal: bool
    blind: torch.Tensor  # (B, 1, n, 1) of bool: the queries with no picture before them
    spans: list  # (start, stop, seen, mask): these queries see the last `seen` image keys, where mask (or None) says so

    def text_only(self, kind):
        """The same where only the text rows come: "causal" as if there were no pictures (CrA's decoder layers), "mmca"
        as if a cache had learned of them before."""
        return replace(self, kind=kind, queries=Rows(self.queries.n), keys=Rows(self.keys.n), new_images=Rows(0))


def pattern(query_modality, key_modality, kind="mmca"):
    """Index lists and masks for `attend`. query_modality (B, Tq), the last Tq of key_modality (B, Tk) -> Pattern."""
    _check(query_modality, key_modality, kind)
    if kind == "causal":
        key_modality = key_modality.clamp(max=TEXT)  # a picture's tokens are text too
    (B, Tq), Tk = query_modality.shape, key_modality.shape[1]
    new = slice(Tk - Tq, Tk)
    keys, images = (_rows(key_modality, m) for m in (TEXT, IMAGE))
    queries, new_images = (_rows(key_modality[:, new], m) for m in (TEXT, IMAGE)) if Tq < Tk else (keys, images)
    text_mask = None
    if Tq < Tk and B * Tq > 1:  # is_causal is aligned to the top left: right only where Tq == Tk
        seen = queries.take((key_modality == TEXT).cumsum(1)[:, new]).clamp(min=1)           # (B, n)
        text_mask = (torch.arange(keys.n, device=seen.device) < seen[..., None])[:, None]    # (B, 1, n, text keys)
    seen = queries.take((key_modality == IMAGE).cumsum(1)[:, new])                           # (B, n)
    if queries.real is not None:  # fillers see what the last member of their row sees
        seen = seen.masked_fill(~queries.real, 0).cummax(1).values
    return Pattern(kind, queries, keys, images, new_images, text_mask, Tq == Tk,
                   (seen == 0)[:, None, :, None], _spans(seen))


def _spans(seen, shortest=32):
    """Cut the text queries where the number of pictures before them grows, so that most spans need no mask.

    seen (B, n): the number of image keys before each text query, rising. A batch whose rows grow at different places
    would fall into many small spans: those are joined up to `shortest` queries and get a mask. In it a query that sees
    nothing sees everything (else some kernel gives NaN); `image_term` makes its result zero."""
    if not seen.numel():
        return []
    most, least = seen.amax(0), seen.amin(0)                                                 # (n), (n)
    cuts = (most.diff().nonzero().flatten() + 1).tolist()
    most, least, spans, start = most.tolist(), least.tolist(), [], 0
    for stop in [*cuts, len(most)]:
        see, mask = most[stop - 1], None
        if least[start] < see:
            if stop - start < shortest and stop < len(most):
                continue
            rank = torch.arange(see - 1, -1, -1, device=seen.device)  # 0 is the oldest: newest first
            rows = seen[:, start:stop, None]                                                 # (B, span, 1)
            mask = ((rank < rows) | (rows == 0))[:, None]                                    # (B, 1, span, see)
        spans.append((start, stop, see, mask))
        start = stop
    return spans


def _attention(q, k, v, mask=None, is_causal=False):
    """softmax(QK') V by torch. Where one query sees all, heads that share keys are queries of one: that is faster."""
    if q.shape[2] != 1 or mask is not None or k.shape[1] == q.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=k.shape[1] < q.shape[1])
    shared = q.reshape(len(k), k.shape[1], -1, q.shape[3])                                   # (B, K, H / K, d)
    return F.scaled_dot_product_attention(shared, k, v).reshape(*q.shape[:3], -1)            # (B, H, 1, d)


def image_term(q, k, v, pattern):
    """softmax(QK' . M2) V for the text rows: q (B, H, n, d), k and v (B, K, image keys, d) -> (B, H, n, d)"""
    parts = []
    for start, stop, seen, mask in pattern.spans:
        if not seen:
            parts.append(torch.zeros_like(q[:, :, start:stop]))
            continue
        part = _attention(q[:, :, start:stop], k[:, :, -seen:], v[:, :, -seen:], mask)       # (B, H, span, d)
        parts.append(part if mask is None else part.masked_fill(pattern.blind[:, :, start:stop], 0))
    return torch.cat(parts, 2) if parts else torch.zeros_like(q)                             # (B, H, n, d)


def attend(q, k, v, pattern, cache=None):
    """The same as `attend_explicit`, as two ordinary attentions: text to text and text to image.

    An image row sees only itself, so its result is its own v; only text rows attend. q (B, H, Tq, d), k and v
    (B, K, Tk, d) -> (B, H, Tq, d); padding rows hold anything finite. kind "cross": the M1 term alone, since the M2
    term is the added layers'. With a `cache` (`KVCache.layer`), k and v are those of the Tq new positions and the
    earlier ones come from it."""
    text, image = (pattern.keys, pattern.images) if cache is None else (pattern.queries, pattern.new_images)
    queries = pattern.queries.take(q, 2)                                                     # (B, H, n, d)
    keys, values = text.take(k, 2), text.take(v, 2)                                          # (B, K, text keys, d)
    if cache is not None:
        keys, values = cache.add_text(keys, values)
    out = _attention(queries, keys, values, pattern.text_mask, pattern.is_causal)            # (B, H, n, d), the M1 term
    if pattern.kind == "mmca" and pattern.images.n:
        keys, values = image.take(k, 2), image.take(v, 2)                                    # (B, K, image keys, d)
        if cache is not None:
            keys, values = cache.add_images(keys, values)
        out = out + image_term(queries, keys, values, pattern)                               # (B, H, n, d)
    if pattern.queries.index is None and pattern.queries.n == q.shape[2]:
        return out  # text alone
    new, group = v.shape[2] - q.shape[2], q.shape[1] // v.shape[1]
    own = v.transpose(1, 2)[:, new:, :, None].expand(-1, -1, -1, group, -1).flatten(2, 3)    # (B, Tq, H, d)
    return pattern.queries.put(own, out.transpose(1, 2)).transpose(1, 2)                     # (B, H, Tq, d)


def _check(query_modality, key_modality, kind):
    if kind not in ("mmca", "causal", "cross"):
        raise ValueError(f"attention is one of mmca, causal, cross; not {kind!r}")
    if query_modality.shape[1] > key_modality.shape[1]:
        raise ValueError(f"{query_modality.shape[1]} queries cannot be the last of {key_modality.shape[1]} positions")


def main():
    """Draw figure 2 of the post, or M for the words of the command line, where <image> is one image token."""
    words = " ".join(sys.argv[1:]).split() or "User : <image> <image> <image> Please describe the image .".split()
    number = count(1)
    tokens = [f"I-token{next(number)}" if word == "<image>" else word for word in words]
    modality = torch.tensor([[IMAGE if word == "<image>" else TEXT for word in words]])      # (1, T)
    causal, M = (attention_matrix(modality, modality, kind)[0] for kind in ("causal", "mmca"))   # (T, T), (T, T)
    drawings = {"CA: softmax over 1": causal,
                "CrA: 1 in the layer, 2 in an added one": M.masked_fill(modality[0, :, None] == IMAGE, 0),
                "MMCA: softmax over 1 + softmax over 2": M}
    signs = ("· ", "\033[34m1\033[0m ", "\033[33m2\033[0m ") if sys.stdout.isatty() else ("· ", "1 ", "2 ")
    wide, column = max(map(len, tokens)) + 2, max(2 * len(tokens), *map(len, drawings)) + 3
    gap = " " * (column - 2 * len(tokens))
    print("A row is a query, a column a key, in the same order; · is not seen.\n")
    print((" " * wide + "".join(title.ljust(column) for title in drawings)).rstrip())
    for i, token in enumerate(tokens):
        rows = ("".join(signs[m] for m in drawing[i].tolist()) + gap for drawing in drawings.values())
        print((token.ljust(wide) + "".join(rows)).rstrip())
    print("\nMMCA: softmax(QK' . M1) + softmax(QK' . M2), M1 = [M == 1], M2 = [M == 2]; M is the drawing on the right.")


if __name__ == "__main__":
    main()
