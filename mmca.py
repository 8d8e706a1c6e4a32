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
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])                                    # (B, H, Tk, d)
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
    index: torch.Tensor | None
    real: torch.Tensor | None

    def take(self, x):
        """x (B, T, ...) -> (B, n, ...)"""
        if self.index is None:
            return x[:, :self.n]
        return x.flatten(0, 1).index_select(0, self.index).unflatten(0, (x.shape[0], self.n))

    def put(self, x, rows):
        """x (B, T, ...) with the members replaced by rows (B, n, ...)"""
        if self.index is None:
            return rows if self.n == x.shape[1] else torch.cat([rows, x[:, self.n:]], 1)
        index, rows = self.index, rows.flatten(0, 1)
        if self.real is not None:
            index, rows = index[self.real.flatten()], rows[self.real.flatten()]
        return x.flatten(0, 1).index_copy(0, index, rows).view_as(x)


def _rows(member, padding, newest_first=False):
    """Rows of a (B, T) bool: members in order, fillers after them; or turned round, fillers first."""
    B, T = member.shape
    counts = member.sum(1, keepdim=True)                                                     # (B, 1)
    n = int(counts.max())
    place = torch.arange(T, device=member.device)
    if not newest_first and bool(((member == (place < counts)) & (member | padding | (place >= n))).all()):
        return Rows(n, None, None)  # the first n already, but for padding
    index = member.byte().argsort(dim=1, descending=True, stable=True)[:, :n]                    # (B, n)
    real = place[:n] < counts                                                                # (B, n)
    if newest_first:
        index, real = index.flip(1), real.flip(1)
    index = index + T * torch.arange(B, device=member.device)[:, None]
    return Rows(n, index.flatten(), None if bool(real.all()) else real)


@dataclass
class Pattern:
    """Everything that `attend` needs to know about the modalities, made once a forward and used by every layer.

    queries        the text rows among the queries: the only ones that attend (under "causal" every row counts as text)
    keys, images   the text rows and the image rows among the keys; images stand newest first, so that the pictures
                   before a query are always a suffix, also in a cache that fills up from its end
    new_images     the image rows among the queries, newest first: what a cache has still to learn
    text_mask      (B, 1, text queries, text keys) of bool; None where `is_causal` says the same or everything is seen
    spans          (start, stop, seen, mask): text queries start..stop see the last `seen` image keys, of them those
                   that mask (B, 1, stop - start, seen) keeps (None: all of them)
    """
    kind: str
    queries: Rows
    keys: Rows
    images: Rows
    new_images: Rows
    text_mask: torch.Tensor | None
    is_causal: bool
    spans: list

    def text_only(self):
        """The same among the text rows alone, as if the pictures' positions were not there (CrA's decoder layers)."""
        every = Rows(self.queries.n, None, None)
        return replace(self, kind="causal", queries=every, keys=Rows(self.keys.n, None, None))


def pattern(query_modality, key_modality, kind="mmca"):
    """Index lists and masks for `attend`. query_modality (B, Tq), the last Tq of key_modality (B, Tk) -> Pattern."""
    _check(query_modality, key_modality, kind)
    Tq, Tk = query_modality.shape[1], key_modality.shape[1]
    text = key_modality == TEXT if kind != "causal" else key_modality != PAD                 # (B, Tk)
    image = (key_modality == IMAGE) & (kind != "causal")                                     # (B, Tk)
    padding, new = key_modality == PAD, slice(Tk - Tq, Tk)                                   # (B, Tk)
    keys, images = _rows(text, padding), _rows(image, padding, newest_first=True)
    queries, new_images = keys, images
    if Tq < Tk:
        queries = _rows(text[:, new], padding[:, new])
        new_images = _rows(image[:, new], padding[:, new], newest_first=True)

    text_mask = None
    if Tq < Tk and not (Tq == 1 and len(text) == 1):  # is_causal is aligned to the top left: right only where Tq == Tk
        seen = queries.take(text.cumsum(1)[:, new]).clamp(min=1)                        # (B, n)
        text_mask = (torch.arange(keys.n, device=seen.device) < seen[..., None])[:, None]    # (B, 1, n, text keys)
    seen = queries.take(image.cumsum(1)[:, new])                                        # (B, n)
    if queries.real is not None:  # fillers see what the last member of their row sees
        seen = torch.where(queries.real, seen, seen.masked_fill(~queries.real, 0).amax(1, keepdim=True))
    return Pattern(kind, queries, keys, images, new_images, text_mask, Tq == Tk, _spans(seen))


def _spans(seen, shortest=32):
    """Cut the text queries where the number of pictures before them grows, so that most spans need no mask.

    seen (B, n): the number of image keys before each text query, rising. A batch whose rows grow at different places
    would fall into many small spans: those are joined up to `shortest` queries."""
    if not seen.numel() or not int(seen.max()):
        return []
    most, least = seen.amax(0), seen.amin(0)                                                 # (n)
    cuts = (most.diff().nonzero().flatten() + 1).tolist()
    most, least, spans, start = most.tolist(), least.tolist(), [], 0
    for stop in cuts + [len(most)]:
        if stop - start < shortest and stop < len(most) and least[start] < most[stop - 1]:
            continue
        mask = None
        if least[start] < most[stop - 1]:
            rank = torch.arange(most[stop - 1] - 1, -1, -1, device=seen.device)  # 0 is the oldest: newest first
            mask = (rank < seen[:, start:stop, None])[:, None]                               # (B, 1, span, seen)
        spans.append((start, stop, most[stop - 1], mask))
        start = stop
    return spans


def text_term(q, k, v, pattern):
    """softmax(QK' . M1) V for the text rows: q (B, H, n, d), k and v (B, K, text keys, d) -> (B, H, n, d)"""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=pattern.text_mask, is_causal=pattern.is_causal,
                                          enable_gqa=k.shape[1] < q.shape[1])


def image_term(q, k, v, pattern):
    """softmax(QK' . M2) V for the text rows: q (B, H, n, d), k and v (B, K, image keys, d) -> (B, H, n, d)"""
    parts, stop = [], 0
    for start, stop, seen, mask in pattern.spans:
        if not seen:
            parts.append(torch.zeros_like(q[:, :, start:stop]))
            continue
        nothing = None
        if mask is not None:  # a row that sees nothing may see everything, and is then made zero: no kernel gives NaN
            nothing = ~mask.any(-1, keepdim=True)
            mask = mask | nothing
        part = F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, -seen:], v[:, :, -seen:], attn_mask=mask,
                                              enable_gqa=k.shape[1] < q.shape[1])            # (B, H, span, d)
        parts.append(part if nothing is None else part.masked_fill(nothing, 0))
    return torch.cat(parts, 2) if parts else torch.zeros_like(q)                             # (B, H, n, d)


def attend(q, k, v, pattern, cache=None):
    """The same as `attend_explicit`, as two ordinary attentions: text to text and text to image.

    An image row sees only itself, so its result is its own v; only text rows attend. q (B, H, Tq, d), k and v
    (B, K, Tk, d) -> (B, H, Tq, d); padding rows hold anything finite. kind "cross": the M1 term alone, since the M2
    term is the added layers'. With a `cache` (`KVCache.layer`), k and v are those of the Tq new positions and the
    earlier ones come from it."""
    own = _repeat(v, q.shape[1])[:, :, v.shape[2] - q.shape[2]:].transpose(1, 2)             # (B, Tq, H, d)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                        # (B, T, H or K, d)

    def take(rows, x):
        return rows.take(x).transpose(1, 2)                                                  # (B, H or K, n, d)

    text = pattern.keys if cache is None else pattern.queries
    image = pattern.images if cache is None else pattern.new_images
    keys, values = take(text, k), take(text, v)                                              # (B, K, text keys, d)
    if cache is not None:
        keys, values = cache.add_text(keys, values)
    queries = take(pattern.queries, q)                                                       # (B, H, n, d)
    out = text_term(queries, keys, values, pattern)                                          # (B, H, n, d)
    if pattern.kind == "mmca":
        keys, values = take(image, k), take(image, v)                                        # (B, K, image keys, d)
        if cache is not None:
            keys, values = cache.add_images(keys, values)
        if pattern.spans:
            out = out + image_term(queries, keys, values, pattern)
    return pattern.queries.put(own, out.transpose(1, 2)).transpose(1, 2)                     # (B, H, Tq, d)


def _repeat(x, heads):
    """Each key/value head serves heads / K query heads: (B, K, T, d) -> (B, heads, T, d)"""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _check(query_modality, key_modality, kind):
    if kind not in ("mmca", "causal", "cross"):
        raise ValueError(f"attention is one of mmca, causal, cross; not {kind!r}")
    if query_modality.shape[1] > key_modality.shape[1]:
        raise ValueError(f"{query_modality.shape[1]} queries cannot be the last of {key_modality.shape[1]} positions")


def draw(tokens, modality):
    """The tokens, M and what each mechanism lets a token see, side by side, as text for a terminal."""
    colour = sys.stdout.isatty()
    paint = {0: "·", 1: "\033[34m1\033[0m" if colour else "1", 2: "\033[33m2\033[0m" if colour else "2"}
    modality = torch.tensor([modality])
    mmca = attention_matrix(modality, modality)[0].tolist()
    causal = attention_matrix(modality, modality, "causal")[0].tolist()
    image = [m == IMAGE for m in modality[0].tolist()]
    cross = [[0 if image[i] else m for m in row] for i, row in enumerate(mmca)]
    wide = max(map(len, tokens)) + 2
    titles = "CA: softmax over 1", "CrA: 1 in the layer, 2 in an added one", "MMCA: softmax over 1 + softmax over 2"
    column = max(2 * len(tokens), *map(len, titles)) + 3
    lines = [(" " * wide + "".join(t.ljust(column) for t in titles)).rstrip()]
    for i, token in enumerate(tokens):
        space = " " * (column - 2 * len(tokens))
        cells = ["".join(f"{paint[m]} " for m in M[i]) + space for M in (causal, cross, mmca)]
        lines.append((token.ljust(wide) + "".join(cells)).rstrip())
    return "\n".join(lines)


def main():
    """Draw figure 2 of the post, or M for the words of the command line, where <image> is one image token."""
    words = " ".join(sys.argv[1:]).split() or "User : <image> <image> <image> Please describe the image .".split()
    modality = [IMAGE if word == "<image>" else TEXT for word in words]
    number = iter(range(1, len(words) + 1))
    tokens = [f"I-token{next(number)}" if word == "<image>" else word for word in words]
    print("A row is a query, a column a key, in the same order; · is not seen.\n")
    print(draw(tokens, modality))
    print("\nMMCA: softmax(QK' . M1) + softmax(QK' . M2), M1 = [M == 1], M2 = [M == 2]; M is the drawing on the right.")


if __name__ == "__main__":
    main()
