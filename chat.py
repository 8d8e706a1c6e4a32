"""A conversation at the terminal.

This file explains inference: a conversation whose keys and values stay in one cache, so that each round computes only
its new tokens; pictures that are read once in their life; greedy decoding and sampling; answers that appear while they
are made; a look at where an answer looked; and what makes one token at a time fast, on a CPU (`RowLinear`) and on a GPU
(`FixedStep`). The REPL and the script runner stand on top of it. Not here: the model and its cache (model.py), the
template (data.py).

    python chat.py                                       the checkpoint in out/best
    python chat.py out/epoch-3 --temperature 0.7 --top_p 0.9
    python chat.py out/best --script questions.json --out answers.csv

Shapes: T tokens, N images, P tokens of an image, S pixels a side, D width, H heads, K key/value heads, d head width,
L layers, V vocabulary.
"""
import argparse
import csv
import hashlib
import io
import json
import os
import re
import shlex
import signal
import sys
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from subprocess import CalledProcessError
from urllib.parse import unquote

import torch
import torch.nn as nn
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import Tokenizer, Turn, encode, printable
from mmca import IMAGE, TEXT, Pattern, softmax
from model import CacheLayer, KVCache, VisualChat, choose_device, rotate
from vision import (InputError, ViT, checkpoint_path, fit, load_image, number, positive, preprocess, read_json,
                    reason_of, write_whole)

DEFAULT = Path("out/best")
HEIGHT, ORANGE = 512, (255, 120, 0)  # of the pictures that /look draws, and where the answer looked
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # Chinese, Japanese, Korean
PAIRS = """() [] {} <> "" '' `` “” ‘’ «» 「」""".split()
HELP = """Write a question. A picture file that it names is attached to it.
  /image a.jpg "b c.png"   attach pictures to the next question; alone: no pictures
  /look                    where the last answer looked, drawn over each picture (MMCA)
  /undo                    take the last round back
  /clear                   begin a new conversation; pictures stay known
  /save talk.json          write the conversation in the form that train.py reads
  /help                    this
  /quit                    leave (also Ctrl-D); Ctrl-C stops an answer"""


def pick(logits, temperature=0.0, top_p=1.0, generator=None):
    """The next token from its logits (V): the best for temperature 0, else drawn from the smallest set of likely tokens
    whose probabilities sum to top_p (nucleus sampling, arXiv:1904.09751). The draw comes from the CPU, so that a seed
    gives the same everywhere; the choice is made where the logits are, and one number comes back."""
    if not temperature:
        return int(logits.argmax())
    logits = (logits.float() - logits.max()) / temperature              # (V), the best is 0 however cold it is
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)    # (V), (V)
    before = probabilities.cumsum(0) - probabilities                    # (V)
    kept = probabilities.masked_fill(before >= top_p, 0).cumsum(0)      # (V), summed up
    draw = float(torch.rand((), generator=generator))
    return int(order.take((kept <= kept[-1] * draw).sum()))


# ---- one token at a time, fast -------------------------------------------------------------------------------------

class RowLinear(nn.Linear):
    """A linear layer for one row in float32 on a CPU; its weight (out, in) lies in memory by columns.

    A token takes as long as it takes to read all weights, and torch multiplies one row with one core. A batch of
    products keeps all cores busy: each takes a part of the row and the columns that belong to it."""

    def forward(self, x):
        """x (..., in) -> (..., out)"""
        if x.numel() != self.in_features:
            return super().forward(x)
        columns = self.weight.t().view(self.parts, -1, self.out_features)   # (parts, in / parts, out)
        y = torch.bmm(x.view(self.parts, 1, -1), columns).sum(0)            # (1, out)
        return y.view(*x.shape[:-1], -1)                                    # (..., out)


def lay_out(model):
    """Make each linear layer without a bias, in float32 on a CPU, a `RowLinear`; names and values stay, and no memory is
    added. A layer whose width the parts do not divide stays as it is."""
    # at least one for each core, and a power of two: that divides what models are wide
    parts = 1 << (torch.get_num_threads() - 1).bit_length()
    for linear in model.modules():
        if type(linear) is not nn.Linear or linear.bias is not None or linear.in_features % parts:
            continue
        if linear.weight.is_cpu and linear.weight.dtype == torch.float32:
            linear.weight.data = linear.weight.data.t().contiguous().t()
            linear.__class__, linear.parts = RowLinear, parts


class FixedStep:
    """`VisualChat.extend` of one word, in shapes that stay the same from word to word: on a GPU one CUDA graph.

    A word takes some forty small kernels a layer, and Python needs longer to launch them than they run. A graph
    launches all at once, but it does the same with the same memory each time (and so a model stays where it is). What
    changes from word to word stands in a tensor, `state`, and attention goes over a fixed part of the cache, held or
    not: masks that are made of the state hide the rest. To the layers this object is the cache (`layer`).

    words, images: how many places are seen from the front and from the end of the cache."""

    def __init__(self, model, cache, words, images, compiled=True):
        self.model, self.cache, self.compiled = model, cache, compiled
        self.words_stop, self.images_start = words, cache.size - images
        device = cache.modality.device
        self.state = torch.zeros(3, dtype=torch.long, device=device)    # token; words and image tokens held
        self.graph, self.on_gpu = None, device.type == "cuda"

    def layer(self, i, pattern):
        """What `KVCache.layer` is to `VisualChat.extend`"""
        keys, values, place = self.cache.keys[i], self.cache.values[i], self.state[1:2]
        return CacheLayer(keys, values, place, self.words_stop, self.images_start)

    def forward(self):
        """The word in `state` goes into the cache -> logits of the next (V)"""
        token, words, images = self.state                               # (), (), ()
        place = torch.arange(self.cache.size, device=token.device)      # (length)
        held = place[:self.words_stop] <= words                         # (words), with the new one
        shown = place[self.images_start:] >= self.cache.size - images   # (images)
        position = (words + images)[None, None]                         # (1, 1)
        masks = held[None, None, None], shown[None, None, None]         # (1, 1, 1, words), (1, 1, 1, images)
        pattern = Pattern(self.model.attention, position, *masks, range(1))
        language = self.model.language_model
        x = language.model.embed_tokens(token[None, None])              # (1, 1, D)
        x = language.model(x, pattern, self, self.model.cross_attention)    # (1, 1, D)
        return language.lm_head(x[0, 0]).float()                        # (V)

    def capture(self):
        """Note the kernels of `forward` in a graph. Layers are compiled for that moment: replaying needs no Python"""
        layers = [*self.model.language_model.model.layers, *(self.model.cross_attention or [])]
        graph = torch.cuda.CUDAGraph()
        try:
            if self.compiled:
                torch._dynamo.config.recompile_limit = 64  # once for each size
                for layer in layers:
                    layer.forward = torch.compile(layer.forward, dynamic=False)
            with torch.cuda.device(self.state.device):
                self.forward()  # what happens at a first call alone, compiling above all, cannot be noted
                with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                    self.logits = self.forward()                        # (V)
            self.graph = graph
        finally:
            if self.compiled:
                for layer in layers:
                    vars(layer).pop("forward", None)

    @torch.inference_mode()
    def __call__(self, token):
        """The next word's id -> logits of the one after it (V), good until the next call"""
        self.cache.append(torch.tensor([[TEXT]], device=self.state.device))
        self.state.copy_(torch.tensor([token, self.cache.num_words, self.cache.num_image_tokens]))
        if self.on_gpu:
            if self.graph is None:
                self.capture()
            self.graph.replay()
        else:
            self.logits = self.forward()                                # (V)
        self.cache.num_words += 1  # last: until here an interrupt leaves the cache as it was
        return self.logits


@torch.inference_mode()
def blank(cache):
    """Zero what holds nothing. Where a mask hides it, it is multiplied by zero, and so it has to be a number"""
    for buffer in (*cache.keys, *cache.values):
        buffer[:, :, cache.num_words:cache.size - cache.num_image_tokens] = 0


def places(held, most):
    """How many places of a cache are seen for so many that are held: 0, 512, 1024, 2048, ...; few graphs, and little
    that is looked at for nothing"""
    return min(most, max(512, 1 << (held - 1).bit_length())) if held else 0


# ---- the conversation ----------------------------------------------------------------------------------------------

@dataclass
class Round:
    """One round: its tokens, which grow while the answer comes; what `VisualChat.keep_picture` made of its pictures."""
    turn: Turn
    ids: list
    modality: list  # of the question; all that follows is text
    pictures: list


class Chat:
    """One conversation with a VisualChat model. `ask` answers; the cache holds the beginning of what was said, mostly
    all of it, and whatever it does not hold is read next time: an interrupt at any place does no harm.

    picture_bytes: the most memory for pictures that are known; those of the conversation stay whatever it is. compiled:
    whether a GPU's graphs are made of compiled layers."""

    def __init__(self, model, tokenizer, picture_bytes=2e9, compiled=True):
        self.model, self.tokenizer, self.picture_bytes = model, tokenizer, picture_bytes
        language = model.language_model.model
        self.context, weight = language.config.max_position_embeddings, language.embed_tokens.weight
        self.device = weight.device
        self.cache = KVCache(language, self.context)
        self.known = OrderedDict()  # sha256 of a picture file -> what is kept of it, the least recently used first
        self.head = encode([], tokenizer, model.image_tokens).input_ids.tolist()  # `<s>` and the system's words
        self.fixed = self.device.type == "cuda" and not language.devices  # a graph is one device's
        self.compiled, self.steps = compiled, {}  # places that are seen, of words and image tokens -> FixedStep
        lay_out(model)
        self.clear()

    def clear(self):
        """Begin a new conversation; pictures stay known"""
        self.cache.truncate(0)
        self.rounds, self.first, self.notice = [], 0, None  # rounds before the first were let go, as the notice says

    def look_at(self, path):
        """A picture file -> what is kept of it. By its content it is known wherever it comes again; of all that are
        known the least recently used are forgotten first."""
        if not Path(path).is_file():  # a device would never end
            raise InputError(f"picture {path} cannot be read: no such file")
        with open(path, "rb") as file:
            key = hashlib.file_digest(file, "sha256").digest()
        if key not in self.known:
            pixels = preprocess(load_image(path), self.model.preprocessing).to(self.device)  # (3, S, S)
            with torch.inference_mode():
                self.known[key] = self.model.keep_picture(self.model.encode_images(pixels[None])[0])
        self.known.move_to_end(key)
        kept = self.known[key]
        while sum(picture.nbytes for picture in self.known.values()) > self.picture_bytes:
            self.known.popitem(last=False)
        return kept

    def said(self):
        """ids (T), modality (T) and pictures (N) of the conversation, as far as it has not been let go, as lists"""
        rounds = self.rounds[self.first:]
        ids = self.head + [i for r in rounds for i in r.ids]
        modality = [m for r in rounds for m in r.modality + [TEXT] * (len(r.ids) - len(r.modality))]
        return ids, [TEXT] * len(self.head) + modality, [picture for r in rounds for picture in r.pictures]

    def catch_up(self, stop=None):
        """The cache learns what was said and it does not hold, up to token `stop` -> logits of the next token (V)"""
        (ids, modality, pictures), start = self.said(), self.cache.length
        known = modality[:start].count(IMAGE) // self.model.image_tokens
        new = (torch.tensor([part[start:stop]], device=self.device) for part in (ids, modality))     # (1, T), (1, T)
        return self.model.extend(*new, self.cache, pictures[known:])

    def extend(self, token):
        """The cache learns one word more -> logits of the next token (V)"""
        if not self.fixed:
            ids = torch.tensor([[token]], device=self.device)           # (1, 1)
            return self.model.extend(ids, torch.full_like(ids, TEXT), self.cache)

        cache = self.cache
        size = places(cache.num_words + 1, cache.size), places(cache.num_image_tokens, cache.size)
        try:
            if size not in self.steps:
                self.steps[size] = FixedStep(self.model, cache, *size, self.compiled)
            return self.steps[size](token)
        except (RuntimeError, OSError, CalledProcessError) as error:
            # of a driver, a compiler, memory: an answer without a graph is better than none
            remedy = "; --no_compile may help" if self.compiled else ""
            reason = reason_of(error.__context__ or error)  # noting adds an error of its own
            print(printable("chat.py: words are computed without a graph from here on, slower"
                            f"{remedy} ({reason})"), file=sys.stderr)
            self.fixed = False
            self.steps = {}  # graphs take memory
        return self.extend(token)

    def ask(self, question, images=(), max_new_tokens=256, temperature=0.0, top_p=1.0, generator=None):
        """One round: reads question and picture files -> a generator of the answer's token ids, without the end token.

        Where the context is full the oldest rounds are let go, until a quarter of it is free, and what is left is read
        anew, as if the conversation had begun there (`notice` names them). The conversation is consistent wherever the
        generator is stopped: an answer cut short gets its `</s>` before the next round, and a round whose question was
        not read to its end has not been said."""
        pictures = [self.look_at(image) for image in images]
        turn = Turn(question, None, [str(image) for image in images])
        shown = sum(len(r.turn.images) for r in self.rounds)
        prompt = encode([turn], self.tokenizer, self.model.image_tokens, shown)
        ids, modality = prompt.input_ids.tolist(), prompt.modality.tolist()
        room = self.context - len(self.head) - len(ids) - 1
        if room < 1:
            raise InputError(f"a question of {len(ids)} tokens is too long for a context of {self.context}: ask less, "
                             "or show fewer pictures at once")
        if self.rounds and self.rounds[-1].ids[-1] != self.tokenizer.eos:
            self.rounds[-1].ids.append(self.tokenizer.eos)
        before, first, held = (self.first, self.rounds), self.first_that_stays(room, max_new_tokens), self.cache.length
        self.notice = None
        if first > self.first:
            shown, gone = (sum(len(r.turn.images) for r in self.rounds[:n]) for n in (self.first, first))
            names = [f"{what} {', '.join(map(str, range(start + 1, stop + 1)))}" for what, start, stop in
                     (("round", self.first, first), ("image", shown, gone)) if start < stop]
            self.notice = f"the context of {self.context} tokens is full; let go: {'; '.join(names)}"
            held = min(held, len(self.head))
        try:
            self.cache.truncate(held)
            if self.fixed:
                blank(self.cache)
            self.first, self.rounds = first, [*self.rounds, Round(turn, ids, modality, pictures)]
            logits = self.catch_up()
        except BaseException:
            self.cache.truncate(held)
            self.first, self.rounds = before
            raise
        for left in self.rounds[:first]:
            left.pictures = []
        room = min(max_new_tokens, self.context - len(self.said()[0]) - 1)
        return self.answer(self.rounds[-1], logits, room, temperature, top_p, generator)

    def first_that_stays(self, room, answer):
        """Where `room` tokens are left for the rounds so far and an answer of at most `answer`: the first round that
        stays in the context. If they are too few, rounds go until a quarter of the context is free."""
        first, lengths = self.first, [len(r.ids) for r in self.rounds]
        if sum(lengths[first:]) + min(answer, self.context // 4) > room:
            while sum(lengths[first:]) > max(0, room - self.context // 4):
                first += 1
        return first

    def answer(self, this, logits, room, temperature, top_p, generator):
        """Logits of the first token -> a generator of at most `room` tokens, each read when the next is asked for"""
        for n in range(room):
            if n:
                logits = self.extend(this.ids[-1])                      # (V)
            token = pick(logits[:len(self.tokenizer)], temperature, top_p, generator)
            this.ids.append(token)
            if token == self.tokenizer.eos:
                return
            yield token

    def undo(self):
        """Take the last round back -> its question; what was let go stays so"""
        if not self.rounds:
            raise InputError("nothing has been said")
        length = len(self.head) + sum(len(r.ids) for r in self.rounds[self.first:-1])
        self.cache.truncate(min(self.cache.length, length))
        self.first = min(self.first, len(self.rounds) - 1)
        return self.rounds.pop().turn.question

    def save(self, file):
        """Write the conversation as JSON that data.py reads: pictures are named relative to the file"""
        if not self.rounds:
            raise InputError("nothing has been said")
        folder = os.path.dirname(os.path.abspath(file))
        turns = [{"images": [os.path.relpath(image, folder) for image in r.turn.images], "question": r.turn.question,
                  "answer": self.tokenizer.decode([i for i in r.ids[len(r.modality):] if i != self.tokenizer.eos])}
                 for r in self.rounds]
        write_whole(file, json.dumps([turns], indent=1) + "\n")

    def look(self):
        """Where the last answer looked: (number, path, weights (P)) of each picture in the context.

        The weights are MMCA's second softmax, whose rows sum to one over all image tokens, as the mean over heads,
        layers and the rows from which the answer's tokens came."""
        model, layers = self.model, self.model.language_model.model.layers
        if model.attention != "mmca":
            raise InputError(f"no look under {model.attention!r}: only MMCA has a softmax over the image tokens alone")
        if not isinstance(model.vision_model, ViT) or model.projection_kind == "perceiver":
            raise InputError("no look: the tokens of this model's pictures are queries, not places in the picture")
        ids, _, pictures = self.said()
        if not pictures:
            raise InputError("no picture has been shown")
        last, total = self.rounds[-1], []

        def note(attention, inputs):
            x, cos, sin, pattern, cache = inputs  # words alone: what was kept of the pictures is in the cache
            q = rotate(attention.heads(attention.q_proj(x)), cos, sin)  # (1, H, n, d)
            k, _ = cache.all_images()                                   # (1, K, N P, d)
            total.append(softmax(q, k, pattern.image_mask).float().mean((0, 1, 2)).cpu())   # (N P), newest first

        start = len(ids) - len(last.ids) + len(last.modality) - 1  # the row from which the answer's first token came
        if self.cache.length < start:
            self.catch_up(start)
        self.cache.truncate(start)
        hooks = [layer.self_attn.register_forward_pre_hook(note) for layer in layers]
        try:
            self.catch_up(max(start + 1, len(ids) - 1))
        finally:
            for hook in hooks:
                hook.remove()
        weights = torch.stack(total).mean(0).flip(0).view(len(pictures), -1)                 # (N, P), oldest first
        paths = list(enumerate((image for r in self.rounds for image in r.turn.images), 1))
        return [(*path, part) for path, part in zip(paths[-len(pictures):], weights)]


def look_sheet(looked, config):
    """What `Chat.look` gives -> one PIL picture: side by side what the model sees of each (`fit`), the
    more orange the more was looked there.

    One scale for all of them: no orange where the smallest weight is, seven tenths of it where the
    largest is. The class token's weight belongs to no place."""
    side = int(len(looked[0][2]) ** 0.5)
    weights = torch.stack([part[-side * side:] for *_, part in looked])     # (N, side side)
    span = weights.max() - weights.min()
    heat = (weights - weights.min()) / span.clamp(min=1e-9)                 # (N, side side), 0 to 1
    heat = (0.7 * 255 * heat).byte().view(-1, side, side).numpy()           # (N, side, side)

    sheet = Image.new("RGB", (len(looked) * (HEIGHT + 8), HEIGHT + 40), "white")
    draw = ImageDraw.Draw(sheet)
    left = 4
    for (n, path, part), opacity in zip(looked, heat):
        picture = fit(load_image(path), config).resize((HEIGHT, HEIGHT))
        mask = Image.fromarray(opacity).resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
        picture.paste(ORANGE, mask=mask)
        sheet.paste(picture, (left, 0))
        draw.text(
            (left + HEIGHT // 2, HEIGHT + 20),
            f"image {n}: {part.sum():.0%}",
            "black",
            font_size=24,
            anchor="mm")
        left += HEIGHT + 8
    return sheet


def stream(tokens, tokenizer):
    """Token ids -> pieces of text; never half a character, never a control character that a terminal would obey"""
    ids, said = [], ""
    for token in tokens:
        ids.append(token)
        text = printable(tokenizer.decode(ids))
        whole = text.rstrip("\ufffd")  # the last character may still lack bytes
        if len(whole) > len(said):
            yield whole[len(said):]
            said = whole
    text = printable(tokenizer.decode(ids)) if ids else ""
    if text[len(said):]:
        yield text[len(said):]


def attachments(line):
    """A line -> (the pictures that it names, the line without them). A name may stand in quotes, in brackets or before a
    mark, hold blanks and marks of its own, "\\ " among them, or be a file:// address."""
    endings, pictures, rest, start = [".heic", ".heif", *Image.registered_extensions()], [], "", 0
    # where a name may begin or end: at marks, where writing without blanks begins or ends, and behind a picture's ending
    cuts = rf"[^\w/\\~.-]|\.+(?![\w/.])|(?<=[{CJK}])(?![{CJK}])|(?<![{CJK}])(?=[{CJK}])|\Z"
    cuts = "|".join([cuts, *(rf"(?<={re.escape(ending)})(?![a-z0-9_~/-]|\.\w)" for ending in endings)])
    marks = [*re.finditer(cuts, line, re.IGNORECASE)]
    while marks:
        # the longest name of a file counts; where none begins, what stands before the next mark is a word
        for mark in reversed(marks[:24]):
            path = re.sub(r"\\(.)", r"\1", line[start:mark.start()])
            if path.startswith("file://"):
                path = unquote(re.sub("^file://[^/]*", "", path))
            path = os.path.expanduser(path)
            found = os.path.isfile(path)
            if found:
                break
        shown = found and os.path.splitext(path)[1].lower() in endings[2:]
        if found and not shown:
            with suppress(InputError):
                shown = bool(load_image(path))
        if shown:
            pictures.append(path)
            around = rest[-1:] + mark[0] in PAIRS
            rest = rest[:-1] if around else rest + mark[0]
        else:
            rest += line[start:mark.start()] + mark[0]
            if found or re.search(f"({'|'.join(map(re.escape, endings))})(?![a-z0-9])", path, re.IGNORECASE):
                print(printable(f"(no picture {path} that can be opened: taken as a word)"))
        start = mark.end()
        del marks[:marks.index(mark) + 1]
    if not pictures:
        return pictures, line.strip()
    return pictures, " ".join(rest.split()) if re.search(r"\w", rest) else ""


def completions(line, start):
    """What Tab offers behind a line up to the cursor: paths that its last word begins, from column `start` on"""
    word = os.path.expanduser(re.sub(r"\\(.)", r"\1", re.search(r"(?:\\.|[^\s\\])*$", line)[0]))
    rest = ((path + "/" * os.path.isdir(path))[len(word):] for path in sorted(glob(escape(word) + "*")))
    return [line[start:] + re.sub(r"([\s\\'\"])", r"\\\1", ending) for ending in rest]


def start_readline():
    """History, editing and path completion for input()"""
    import readline  # not on every system

    def complete(text, n):
        return ([*completions(readline.get_line_buffer()[:readline.get_endidx()], readline.get_begidx()), None])[n]
    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def repl(chat, args, samples=()):
    """Read lines until /quit or the end of the input. Nothing that a line holds ends the conversation; Ctrl-C stops
    what is being done, once for each line. samples: pictures that are offered at the beginning"""
    generator, attached, armed = torch.Generator().manual_seed(args.seed), [], False

    def interrupt(*_):
        nonlocal armed
        if armed:  # where it is caught, and not again while it is
            armed = False
            raise KeyboardInterrupt

    def attach(paths):
        for path in paths:
            chat.look_at(path)
            attached.append(path)

    def obey(line):
        nonlocal attached
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            raise EOFError
        if command == "/clear":
            attached = []
            chat.clear()
            print("(a new conversation)")
        elif command == "/undo":
            print(printable(f"(taken back: {chat.undo()})"))
        elif command == "/save" and len(paths := shlex.split(rest)) == 1:
            chat.save(os.path.expanduser(paths[0]))
            print(printable(f"({len(chat.rounds)} rounds in {paths[0]})"))
        elif command == "/look":
            looked = chat.look()
            look_sheet(looked, chat.model.preprocessing).save("look.png")
            for n, path, weights in looked:
                print(printable(f"(image {n}, {path}: {weights.sum():.0%} of what was looked at)"))
            print("(look.png shows where)")
        elif command == "/image":
            paths = [os.path.expanduser(path) for path in shlex.split(rest)]
            if not paths:
                attached = []
            attach(paths)
            print(f"({len(attached)} pictures attached to the next question)")
        elif re.fullmatch("/[a-z]*", command):
            print(HELP)
        else:
            pictures, question = attachments(line)
            if not question:
                attach(pictures)
                print(f"({len(attached)} pictures attached; ask about them)" if attached else "(ask something)")
                return
            pictures = attached + pictures
            tokens = chat.ask(question, pictures, args.max_new_tokens, args.temperature, args.top_p, generator)
            attached = []
            if chat.notice:
                print(f"({chat.notice})")
            for piece in stream(tokens, chat.tokenizer):
                print(piece, end="", flush=True)
            print()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        print(HELP)
        if samples:
            print(f"Pictures to try: {' '.join(map(str, samples))}, for example\n"
                  f"  {samples[0]} {samples[1]} What is the difference between image 1 and image 2?")
        while True:
            try:
                armed = True
                obey(input("\n> "))
                armed = False
            except EOFError:
                print()
                return
            except BrokenPipeError:  # an OSError too, but nobody would read its message
                raise
            except KeyboardInterrupt:
                print(" (stopped; /quit or Ctrl-D leaves)")
            except (ValueError, OSError, RuntimeError, MemoryError) as error:  # InputError is a ValueError
                armed = False
                print(printable(f"({error})"))
    finally:
        signal.signal(signal.SIGINT, before)


def split_paths(pictures):
    """['a.jpg "b c.jpg"'] or [] -> paths, quoted as a shell would"""
    try:
        return [path for text in pictures for path in shlex.split(text)]
    except ValueError as error:
        raise InputError(f"pictures {pictures[0]!r}: {error}; quote a path as a shell would") from error


def run_script(chat, script, out, args):
    """Answer a JSON file of dialogues, {"name": [["question", "a.jpg 'b c.jpg'"], ["follow-up"]]}, picture paths
    relative to it, to a CSV with the columns test_name, image_path, question, answer."""
    dialogues, rows, script, out = read_json(script), [], Path(script), Path(out)
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"--out {out} cannot be written: name a file in a folder that exists")
    for name, rounds in dialogues.items():  # all of it is checked before the first answer
        for turn in rounds if isinstance(rounds, list) else [None]:
            if not (isinstance(turn, list) and 1 <= len(turn) <= 2 and all(isinstance(part, str) for part in turn)):
                raise InputError(f'{script}: {name!r} is not a list of ["question"] and ["question", "a.jpg b.jpg"]')
            for path in split_paths(turn[1:]):
                if not (script.parent / path).is_file():
                    raise InputError(f"{script}: {name!r} shows {path}, and there is no picture {script.parent / path}")
    generator = torch.Generator().manual_seed(args.seed)
    try:
        for name, rounds in tqdm(dialogues.items(), unit="dialogue"):
            chat.clear()
            for question, *pictures in rounds:
                paths = [str(script.parent / path) for path in split_paths(pictures)]
                tokens = chat.ask(question, paths, args.max_new_tokens, args.temperature, args.top_p, generator)
                if chat.notice:
                    tqdm.write(printable(f"{name}: {chat.notice}"), sys.stderr)
                rows.append([name, *(pictures or [""]), question, chat.tokenizer.decode(list(tokens))])
    finally:  # a broken picture, Ctrl-C: what has been answered is not lost
        table = io.StringIO()
        csv.writer(table).writerows([["test_name", "image_path", "question", "answer"], *rows])
        write_whole(out, table.getvalue())
        print(f"{len(rows)} answers in {out}")


def main():
    """The command line"""
    parser = argparse.ArgumentParser(description="Chat about pictures.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, default=DEFAULT, help="a folder that train.py wrote (%(default)s)")
    add("--max_new_tokens", type=positive, default=256, help="the longest answer (%(default)s)")
    add("--temperature", type=number(float, 0), default=0.0, help="0 always takes the most likely token (%(default)s)")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest tokens that sum to this (%(default)s)")
    add("--seed", type=int, default=1234, help="of the draws (%(default)s)")
    add("--device", help="cpu, cuda:0, ... or several with commas between, over which the layers are spread (the best "
        "there is)")
    add("--picture_memory", type=number(float, 0), default=2.0, metavar="GB", help="the most for known pictures; those of the "
        "conversation stay whatever it is (%(default)s)")
    add("--no_compile", dest="compile", action="store_false", help="on a GPU: compute the layers as they are written, "
        "where else an answer waits some seconds when the conversation has grown")
    add("--script", type=Path, metavar="JSON", help="answer the dialogues of this file instead of a person's (none)")
    add("--out", type=Path, default=Path("answers.csv"), metavar="CSV", help="where its answers go (%(default)s)")
    args = parser.parse_args()
    try:
        if not 0 < args.top_p <= 1:
            raise InputError("--top_p is a number above 0 and at most 1")
        device, dtype = choose_device(args.device)
        folder = checkpoint_path(args.checkpoint)
        model = VisualChat.from_pretrained(folder, dtype, device)
        if len(device) > 1 and device[0].type == "cuda":
            print("layers on several devices: every word is read without a CUDA graph, which is slower")
        tokenizer = Tokenizer(folder / "language_model" / "tokenizer.model")
        chat = Chat(model, tokenizer, args.picture_memory * 1e9, args.compile)
        for file in (sys.stdin, sys.stdout):
            file.reconfigure(errors="replace")  # bytes that are no text; a terminal that lacks a character
        if args.script:
            run_script(chat, args.script, args.out, args)
        else:
            if sys.stdin.isatty():
                start_readline()
            repl(chat, args, sorted(Path("demo/samples").glob("*.jpg")) if args.checkpoint == DEFAULT else [])
    except KeyboardInterrupt:
        sys.exit("\nchat.py: stopped")
    except BrokenPipeError:  # who read the answers has gone; what is still buffered is for nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        print(printable(f"chat.py: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
