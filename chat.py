"""A conversation at the terminal.

This file explains inference: a conversation whose keys and values stay in one cache, so that each
round computes only its new tokens (`Chat`); pictures that are read once in their life (`look_at`);
greedy decoding and sampling (`pick`); answers that appear while they are made (`stream`). Below the
line: what makes one token at a time fast, on a CPU (`RowLinear`) and on a GPU (`FixedStep`); a look
at where an answer looked; scripts of questions. Not here: the model and its cache (model.py), the
template (data.py).

    python chat.py                                       the checkpoint in out/best
    python chat.py out/epoch-3 --temperature 0.7 --top_p 0.9
    python chat.py out/best --script questions.json --out answers.csv

Shapes: T tokens, N images, P tokens of an image, S pixels a side, D width, H heads, K key/value
heads, d head width, L layers, V vocabulary.
"""
import argparse
import csv
import hashlib
import json
import os
import re
import shlex
import signal
import sys
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError

import torch
import torch.nn as nn
from PIL import Image, ImageDraw
from torch.nn.modules.module import register_module_forward_pre_hook
from tqdm import tqdm

from data import Tokenizer, Turn, encode, printable, texts
from mmca import IMAGE, TEXT, Pattern, softmax
from model import CacheLayer, KVCache, LlamaAttention, VisualChat, choose_device, rotate
from vision import (
    InputError,
    ViT,
    checkpoint_path,
    fit,
    load_image,
    number,
    out_of_memory,
    positive,
    preprocess,
    read_json,
    reason_of,
    write_whole)

DEFAULT = Path("out/best")
WIDTH = 512  # of each picture that /look draws
HELP = """Write a question. A picture file that it names is attached to it.
  /image a.jpg "b c.png"   attach pictures to the next question; alone: no pictures
  /look                    where the last answer looked, drawn over each picture in look.png (MMCA)
  /undo                    take the last round back
  /clear                   begin a new conversation; pictures stay known
  /save talk.json          write the conversation in the form that train.py reads
  /help                    this
  /quit                    leave (also Ctrl-D); Ctrl-C stops an answer"""

SAMPLES = """Pictures to try: demo/samples/1.jpg demo/samples/2.jpg demo/samples/3.jpg, for example
  demo/samples/1.jpg demo/samples/2.jpg What is the difference between image 1 and image 2?"""


@dataclass
class Round:
    """One round of a conversation."""
    turn: Turn
    ids: list       # its tokens, which grow while the answer comes
    modality: list  # of the question; all that follows is text
    pictures: list  # what `VisualChat.keep_picture` made of each of its pictures


class Chat:
    """One conversation with a VisualChat model. `ask` answers.

    The cache holds the beginning of what was said, mostly all of it. What it lacks is read with the
    next question; what it holds beyond, of a question that was stopped or of a round that was taken
    back, is cut off then (`catch_up`). So an interrupt at any place does no harm.

    picture_bytes: the most memory for pictures that are known; those of the conversation stay
    whatever it is."""

    def __init__(self, model, tokenizer, picture_bytes=2e9):
        self.model = model
        self.tokenizer = tokenizer
        self.picture_bytes = picture_bytes
        language = model.language_model.model
        self.device = language.embed_tokens.weight.device
        self.context = language.config.max_position_embeddings
        self.cache = KVCache(language, self.context)
        # sha256 of a picture file -> what is kept of it, the least recently used first
        self.known = OrderedDict()
        # `<s>` and the system's words
        self.head = encode([], tokenizer, model.image_tokens).input_ids.tolist()
        # a GPU's words are read by graphs, and a graph is one device's
        self.fixed = self.device.type == "cuda" and not language.devices
        if self.fixed:
            # a mask hides what was never written, but multiplied by zero it has to be a number
            for buffer in (*self.cache.keys, *self.cache.values):
                buffer.zero_()
        self.compiled = True  # and those are made of compiled layers
        self.steps = {}  # how many places are seen -> FixedStep
        lay_out(model)
        self.clear()

    def clear(self):
        """Begin a new conversation; pictures stay known"""
        self.rounds = []
        self.first = 0  # the rounds before it were let go, as `notice` says
        self.notice = None

    def ask(self, question, images=(), max_new_tokens=256, **sampling):
        """One round: reads question and picture files -> a generator of the answer's token ids,
        without the end token. sampling: temperature, top_p and generator, as `pick` takes them.

        Wherever the generator is stopped the conversation stays consistent: an answer cut short
        gets its `</s>` before the next round. A question that was not read to its end has not been
        said. InputError, and no round is added, if a picture cannot be read or the question is
        longer than the context."""
        pictures = [self.look_at(image) for image in images]
        turn = Turn(question, None, [str(image) for image in images])
        # pictures keep their numbers, also when those before them were let go
        shown = sum(len(r.turn.images) for r in self.rounds)
        prompt = encode([turn], self.tokenizer, self.model.image_tokens, shown)
        this = Round(turn, prompt.input_ids.tolist(), prompt.modality.tolist(), pictures)
        # one more for the `</s>` of an answer that was cut short, which ends here
        self.make_room(len(this.ids) + 1, max_new_tokens)
        if self.rounds and self.rounds[-1].ids[-1] != self.tokenizer.eos:
            self.rounds[-1].ids.append(self.tokenizer.eos)
        logits = self.catch_up(this)                                        # (V)
        # only now has it been said: an interrupt before leaves the rounds as they were
        self.rounds.append(this)
        room = min(max_new_tokens, self.context - self.cache.length - 1)
        return self.answer(this, logits, room, sampling)

    def answer(self, this, logits, room, sampling):
        """Logits of the first token -> a generator of at most `room` tokens, each read when the
        next is asked for"""
        # who asked has read it; of a question that was stopped it waits for the next
        self.notice = None
        for n in range(room):
            if n:
                logits = self.extend(this.ids[-1])                          # (V)
            # a head may be wider than the tokenizer
            token = pick(logits[:len(self.tokenizer)], **sampling)
            this.ids.append(token)
            if token == self.tokenizer.eos:
                return
            yield token

    def said(self, *new):
        """The conversation, as far as it has not been let go, and new rounds -> its ids (T),
        modality (T) and pictures (N), as lists"""
        ids = list(self.head)
        modality = [TEXT] * len(ids)
        pictures = []
        for r in (*self.rounds[self.first:], *new):
            ids += r.ids
            modality += r.modality
            modality += [TEXT] * (len(ids) - len(modality))
            pictures += r.pictures
        return ids, modality, pictures

    def catch_up(self, *new, stop=None):
        """The cache learns what it lacks of what was said and of a new round, up to token `stop`
        -> logits of the next token (V)"""
        # what it holds beyond the rounds was not said in the end
        self.cache.truncate(len(self.said()[0]))
        ids, modality, pictures = self.said(*new)
        start = self.cache.length
        known = modality[:start].count(IMAGE) // self.model.image_tokens
        return self.model.extend(
            torch.tensor([ids[start:stop]], device=self.device),            # (1, T)
            torch.tensor([modality[start:stop]], device=self.device),       # (1, T)
            self.cache,
            pictures[known:])

    def extend(self, token):
        """The cache learns one word more -> logits of the next token (V)"""
        if not self.fixed:
            ids = torch.tensor([[token]], device=self.device)               # (1, 1)
            return self.model.extend(ids, torch.full_like(ids, TEXT), self.cache)
        # 512, 1024, 2048, ... places: few graphs, and little that is looked at for nothing
        size = max(512, 1 << self.cache.length.bit_length())
        try:
            if size not in self.steps:
                self.steps[size] = FixedStep(self.model, self.cache, size, self.compiled)
            return self.steps[size](token)
        except (RuntimeError, OSError, CalledProcessError) as error:
            # of a driver, a compiler, memory: a slower answer is better than none, first with
            # layers as they are, at the next error without a graph. A capture that fails adds an
            # error of its own to that of the cause
            reason = printable(reason_of(error.__context__ or error))
            what = "compiled layers" if self.compiled else "a graph"
            print(f"chat.py: without {what} from here on, slower ({reason})", file=sys.stderr)
            self.fixed = self.compiled
            self.compiled = False
            self.steps = {}  # graphs take memory
        return self.extend(token)

    def look_at(self, path):
        """A picture file -> what is kept of it. By its content it is known wherever it comes again;
        of all that are known the least recently used are forgotten first. InputError if it cannot
        be read."""
        if not Path(path).is_file():  # /dev/zero would be read for ever
            raise InputError(f"picture {path} cannot be read: no such file")
        key = hashlib.sha256(Path(path).read_bytes()).digest()
        kept = self.known.pop(key, None)
        if kept is None:
            pixels = preprocess(load_image(path), self.model.preprocessing)     # (3, S, S)
            with torch.inference_mode():
                features = self.model.encode_images(pixels[None].to(self.device))   # (1, P, D)
            kept = self.model.keep_picture(features[0])
        # the last in order is the last that was used
        self.known[key] = kept
        while sum(picture.nbytes for picture in self.known.values()) > self.picture_bytes:
            self.known.popitem(last=False)
        return kept

    def make_room(self, new, answer):
        """Where the context is too full for `new` tokens and an answer of at most `answer` (a
        quarter of the context is enough), let the oldest rounds go: what is left is read anew, as
        if the conversation had begun there. That costs as much as all of it, so it is done seldom:
        a quarter of the context gets free."""
        room = self.context - len(self.head) - new - 1
        if room < 1:
            raise InputError(f"a question of {new} tokens is too long for a context of "
                             f"{self.context}: ask less, or show fewer pictures at once")
        free = room - sum(len(r.ids) for r in self.rounds[self.first:])
        quarter = self.context // 4
        if free >= min(answer, quarter):
            return
        while free < quarter and self.first < len(self.rounds):
            # before `first` moves: an interrupt in between leaves a cache that lacks something
            self.cache.truncate(len(self.head))
            oldest = self.rounds[self.first]
            self.first += 1
            free += len(oldest.ids)
            oldest.pictures = []
            self.notice = (f"the context of {self.context} tokens is full: rounds up to "
                           f"{self.first} are let go, with their pictures")

    def undo(self):
        """Take the last round back -> its question; what was let go stays so"""
        if not self.rounds:
            raise InputError("nothing has been said")
        self.first = min(self.first, len(self.rounds) - 1)
        return self.rounds.pop().turn.question


def pick(logits, temperature=0.0, top_p=1.0, generator=None):
    """The next token from its logits (V): the best for temperature 0, else drawn from the smallest
    set of likely tokens whose probabilities sum to top_p (nucleus sampling, arXiv:1904.09751)."""
    if not temperature:
        return int(logits.argmax())
    probabilities = (logits.float() / temperature).softmax(-1)              # (V)
    # stable: of tokens that are equally likely always the same one stands first
    probabilities, order = probabilities.sort(descending=True, stable=True)     # (V), (V)
    # a token is kept while those before it sum to less than top_p
    before = probabilities.cumsum(0) - probabilities                        # (V)
    kept = probabilities.masked_fill(before >= top_p, 0)                    # (V)
    # drawn on the CPU, so that a seed gives the same everywhere
    drawn = torch.multinomial(kept.cpu(), 1, generator=generator)           # (1)
    return int(order[drawn])


def stream(tokens, tokenizer):
    """Token ids -> pieces of text; never half a character, never a control character that a
    terminal would obey"""
    ids = []
    said = ""
    for token in tokens:
        ids.append(token)
        # all of it again: what a token means depends on those before it
        text = printable(tokenizer.decode(ids))
        # the last character may still lack bytes
        piece = text.rstrip("\ufffd")[len(said):]
        said += piece
        yield piece
    yield printable(tokenizer.decode(ids))[len(said):]


def say(text):
    """A remark of the program, which is no answer"""
    print(printable(f"({text})"))


def obey(chat, line, attached, answering):
    """Do what a line says. attached: the pictures that wait for the next question, changed here.
    answering: what `Chat.ask` takes beside question and pictures"""
    def attach(paths):
        # read before any is attached: one that cannot be would spoil every question to come
        for path in paths:
            chat.look_at(path)
        attached.extend(paths)
        say(f"{len(attached)} pictures attached to the next question")

    command, _, rest = line.strip().partition(" ")
    # /home/me/cat.jpg is no command
    if not re.fullmatch("/[a-z]*", command):
        pictures, question = attachments(line)
        if not question:
            attach(pictures)
            return
        tokens = chat.ask(question, attached + pictures, **answering)
        # the question has been said: whatever becomes of the answer, they are not asked again
        attached.clear()
        if chat.notice:
            say(chat.notice)
        for piece in stream(tokens, chat.tokenizer):
            print(piece, end="", flush=True)
        print()
        return

    paths = [os.path.expanduser(path) for path in shlex.split(rest)]
    if command == "/clear":
        attached.clear()
        chat.clear()
        say("a new conversation")
    elif command == "/undo":
        say(f"taken back: {chat.undo()}")
    elif command == "/save" and len(paths) == 1:
        save(chat, paths[0])
        say(f"{len(chat.rounds)} rounds in {paths[0]}")
    elif command == "/look":
        looked = look(chat)
        look_sheet(looked, chat.model.preprocessing).save("look.png")
        for n, path, weights in looked:
            say(f"image {n}, {path}: {weights.sum():.0%} of what was looked at")
        say("look.png shows where")
    elif command == "/image":
        if not paths:
            attached.clear()
        attach(paths)
    else:
        print(HELP)


def repl(chat, answering):
    """Read lines until /quit or the end of the input. Nothing that a line holds ends the
    conversation; Ctrl-C stops what is being done."""
    attached = []
    while True:
        try:
            while True:
                try:
                    line = input("\n> ")
                    if line.strip() == "/quit":
                        return
                    obey(chat, line, attached, answering)
                except (ValueError, OSError, RuntimeError) as error:
                    say(error)  # an InputError is a ValueError
                except KeyboardInterrupt:
                    print(" (stopped; /quit or Ctrl-D leaves)")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            # another one, while the first was answered
            continue


# ---- what serves it: one token at a time, fast ---------------------------------------------------

class RowLinear(nn.Linear):
    """A linear layer for one row in float32 on a CPU; its weight (out, in) lies in memory by
    columns.

    A token takes as long as it takes to read all weights, and torch multiplies one row with one
    core. A batch of products keeps all cores busy: each takes a part of the row and the columns
    that belong to it."""

    def forward(self, x):
        """x (..., in) -> (..., out)"""
        if x.numel() != self.in_features:
            return super().forward(x)
        columns = self.weight.t().view(
            self.parts, -1, self.out_features)                              # (parts, in/parts, out)
        y = torch.bmm(x.view(self.parts, 1, -1), columns).sum(0)            # (1, out)
        return y.view(*x.shape[:-1], -1)                                    # (..., out)


def lay_out(model):
    """Make each linear layer without a bias, in float32 on a CPU, a `RowLinear`; names and values
    stay, and no memory is added. A layer whose width the parts do not divide stays as it is."""
    # at least one for each core, and a power of two: that divides what models are wide
    parts = 1 << (torch.get_num_threads() - 1).bit_length()
    for linear in model.modules():
        if type(linear) is not nn.Linear or linear.bias is not None or linear.in_features % parts:
            continue
        if linear.weight.is_cpu and linear.weight.dtype == torch.float32:
            linear.weight.data = linear.weight.data.t().contiguous().t()
            linear.__class__ = RowLinear
            linear.parts = parts


class FixedStep:
    """`VisualChat.extend` of one word, in shapes that stay the same from word to word: on a GPU one
    CUDA graph.

    A word takes some forty small kernels a layer, and Python needs longer to launch them than they
    run. A graph launches all at once, but it does the same with the same memory each time (and so a
    model stays where it is). What changes from word to word stands in a tensor, `state`, and
    attention goes over a fixed part of the cache, held or not: masks that are made of the state
    hide the rest. To the layers this object is the cache (`layer`).

    size: how many places are seen from the front of the cache, for words, and from its end."""

    def __init__(self, model, cache, size, compiled):
        self.model = model
        self.cache = cache
        self.compiled = compiled
        self.words_stop = min(size, cache.size)
        self.images_start = cache.size - self.words_stop
        # the token; how many words and image tokens are held
        self.state = cache.modality.new_zeros(3)
        self.graph = None

    def layer(self, i, pattern):
        """What `KVCache.layer` is to `VisualChat.extend`"""
        return CacheLayer(
            self.cache.keys[i],
            self.cache.values[i],
            self.state[1:2],
            self.words_stop,
            self.images_start)

    def forward(self):
        """The word in `state` goes into the cache -> logits of the next (V)"""
        token, words, images = self.state                                   # (), (), ()
        place = torch.arange(self.cache.size, device=token.device)          # (cache.size)
        # the places that are held, with that of the new word
        held = place[:self.words_stop] <= words                             # (size)
        shown = place[self.images_start:] >= self.cache.size - images       # (size)
        pattern = Pattern(
            self.model.attention,
            (words + images)[None, None],                                   # (1, 1)
            held[None, None, None],                                         # (1, 1, 1, size)
            shown[None, None, None],                                        # (1, 1, 1, size)
            range(1))
        language = self.model.language_model
        x = language.model.embed_tokens(token[None, None])                  # (1, 1, D)
        x = language.model(x, pattern, self, self.model.cross_attention)    # (1, 1, D)
        return language.lm_head(x[0, 0]).float()                            # (V)

    def capture(self):
        """The kernels of `forward` as a graph. Layers are compiled for that moment alone: else,
        as lengths differ from question to question, each would be compiled again and again"""
        layers = [*self.model.language_model.model.layers, *(self.model.cross_attention or [])]
        graph = torch.cuda.CUDAGraph()
        try:
            if self.compiled:
                torch._dynamo.config.recompile_limit = 64  # once for each size
                for layer in layers:
                    layer.forward = torch.compile(layer.forward, dynamic=False)
            with torch.cuda.device(self.state.device):
                # what happens at a first call alone, compiling above all, cannot be captured
                self.forward()
                with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                    self.logits = self.forward()                            # (V)
            self.graph = graph
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    @torch.inference_mode()
    def __call__(self, token):
        """The next word's id -> logits of the one after it (V), good until the next call"""
        cache = self.cache
        # notes its modality behind what is held, where nothing looks yet
        cache.append(torch.tensor([[TEXT]], device=self.state.device))
        self.state.copy_(torch.tensor([token, cache.num_words, cache.num_image_tokens]))
        if self.graph is None:
            self.capture()
        self.graph.replay()
        # last: until here an interrupt leaves the cache as it was
        cache.num_words += 1
        return self.logits


# ---- what serves it: commands and scripts --------------------------------------------------------

def attachments(line):
    """A line -> (the picture files that it names, the line without them). A name with blanks stands
    in quotes, or they are written "\\ "; marks around a name are not part of it."""
    endings = [".heic", ".heif", *Image.registered_extensions()]
    ending = f"(?:{'|'.join(map(re.escape, endings))})"
    # from a quote to the next of its kind; the apostrophe of Tom's is none
    quoted = rf"""(?<![a-z])(["'])((?:(?!\1).)+{ending})\1"""
    # cat.png in cat.png.bak or cat.pngx is no name; in cat.png. and cat.png's it is one. It begins
    # where such characters begin: tried at each of them, a long line would take minutes
    bare = rf"(?<![\w./~\\-])(?:file://)?((?:\\.|[\w./~-])+{ending})(?![a-z0-9_~/-]|\.\w)"
    pictures = []

    def take(match):
        path = match[2] or re.sub(r"\\(.)", r"\1", match[3])
        # in a script without blanks (Chinese) a name may follow a letter
        for name in (path, re.search("(?<=[^\\0-~])[!-~]+$|$", path)[0]):
            if os.path.isfile(os.path.expanduser(name)):
                pictures.append(os.path.expanduser(name))
                return path.removesuffix(name)
        say(f"no picture {path}: taken as a word")
        return match[0]

    rest = re.sub(f"{quoted}|{bare}", take, line, flags=re.IGNORECASE)
    if not pictures:
        return pictures, line.strip()
    # marks alone, as the brackets around a name, ask nothing
    return pictures, " ".join(rest.split()) if re.search(r"\w", rest) else ""


def start_readline():
    """History, editing and completion of file names (Tab) for input()"""
    import readline  # not on every system
    readline.set_completer_delims(" \t\n")
    libedit = "libedit" in str(readline.__doc__)
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def save(chat, file):
    """Write the conversation as JSON that data.py reads: pictures are named relative to the file"""
    folder = Path(file).absolute().parent
    turns = []
    for r in chat.rounds:
        turns.append({
            "images": [os.path.relpath(image, folder) for image in r.turn.images],
            "question": r.turn.question,
            "answer": chat.tokenizer.decode(r.ids[len(r.modality):])})
    write_whole(file, json.dumps([turns], indent=1))


def look(chat):
    """Where the last answer looked: (number, path, weights (P)) of each picture in the context.

    The weights are those of MMCA's second softmax. In each row they sum to one over all image
    tokens, and so does their mean over heads, layers and the rows from which the answer's tokens
    came. `/look` draws them over what the model sees of each picture, the more orange the more was
    looked there (`look_sheet`)."""
    model = chat.model
    in_places = isinstance(model.vision_model, ViT) and model.projection_kind != "perceiver"
    if model.attention != "mmca" or not in_places:
        raise InputError("no look: it takes MMCA, which has a softmax over image tokens alone, and "
                         "image tokens that are places in the picture, not a resampler's queries")
    ids, _, pictures = chat.said()
    if not pictures:
        raise InputError("no picture has been shown")
    last = chat.rounds[-1]
    # the row from which the answer's first token came; stop: the last token's row, which gave none
    start = len(ids) - len(last.ids) + len(last.modality) - 1
    stop = max(start + 1, len(ids) - 1)
    layers = []

    def note(module, inputs):
        if not isinstance(module, LlamaAttention):
            return
        # a hook that an interrupt left behind finds its layers full, and does nothing
        if len(layers) == len(model.language_model.model.layers):
            return
        # words alone: what was kept of the pictures is in the cache
        x, cos, sin, pattern, cache = inputs
        q = rotate(module.heads(module.q_proj(x)), cos, sin)                # (1, H, n, d)
        k, _ = cache.all_images()                                           # (1, K, N P, d)
        mask = pattern.image_mask.to(q.device)[:, :, start - stop:]         # (1, 1, rows, N P)
        weights = softmax(q[:, :, start - stop:], k, mask)                  # (1, H, rows, N P)
        layers.append(weights.float().mean((0, 1, 2)).cpu())                # (N P)

    # these rows are read once more
    chat.cache.truncate(start)
    with register_module_forward_pre_hook(note):
        chat.catch_up(stop=stop)
    # the newest image token stands first in the cache
    weights = torch.stack(layers).mean(0).flip(0).view(len(pictures), -1)   # (N, P)
    shown = [image for r in chat.rounds for image in r.turn.images]
    # the first of them may have been let go
    paths = list(enumerate(shown, 1))[-len(pictures):]
    return [(*path, part) for path, part in zip(paths, weights)]


def look_sheet(looked, config):
    """What `look` gives -> one PIL picture: what the model sees of each picture, side by side, the
    more orange the more was looked there.

    One scale for all of them: no orange where the smallest weight is, 178 of 255 where the largest
    is. The class token's weight belongs to no place."""
    side = int(len(looked[0][2]) ** 0.5)
    weights = torch.stack([part[-side * side:] for *_, part in looked])     # (N, side * side)
    weights -= weights.min()
    heat = 178 * weights / weights.max().clamp(min=1e-9)                    # (N, side * side)
    sheet = Image.new("RGB", (len(looked) * WIDTH, WIDTH))
    for i, (n, path, part) in enumerate(looked):
        panel = fit(load_image(path), config).resize((WIDTH, WIDTH))
        opacity = Image.fromarray(heat[i].byte().view(side, side).numpy())
        panel.paste("orange", mask=opacity.resize(panel.size))
        ImageDraw.Draw(panel).text((8, 8), f"image {n}: {part.sum():.0%}", "red", font_size=24)
        sheet.paste(panel, (i * WIDTH, 0))
    return sheet


def run_script(chat, script, out, answering):
    """Answer a JSON file of dialogues, {"name": [["question", "a.jpg 'b c.jpg'"], ["follow-up"]]},
    picture paths relative to it, to a CSV with the columns test_name, image_path, question, answer.

    Each answer is in the file when it is there. A question that cannot be asked is named on stderr
    and left out. InputError if the script is not of that form or `out` cannot be begun."""
    dialogues = read_json(script)
    for name, rounds in dialogues.items():
        with suppress(TypeError):
            if isinstance(rounds, list) and {len(texts(turn)) for turn in rounds} <= {1, 2}:
                continue
        raise InputError(f'{script}: {name!r} is not a list of ["question"] and '
                         '["question", "a.jpg b.jpg"]')
    try:
        # x: what is there already took hours, perhaps
        table = open(out, "x", newline="", encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({reason_of(error)}): name a new file in "
                         "a folder that exists") from error
    rows = csv.writer(table)
    rows.writerow(["test_name", "image_path", "question", "answer"])
    answered = 0
    with table:
        for name, rounds in tqdm(dialogues.items()):
            chat.clear()
            for question, *pictures in rounds:
                shown = "".join(pictures)
                try:
                    paths = [script.parent / path for path in shlex.split(shown)]
                    tokens = chat.ask(question, paths, **answering)
                except (ValueError, OSError) as error:  # such as a quote that does not end
                    tqdm.write(printable(f"{name}: {question!r} is left out: {error}"), sys.stderr)
                    continue
                if chat.notice:
                    tqdm.write(printable(f"{name}: {chat.notice}"), sys.stderr)
                rows.writerow([name, shown, question, chat.tokenizer.decode(list(tokens))])
                table.flush()
                answered += 1
    print(f"{answered} answers in {out}")


def main():
    """The command line"""
    parser = argparse.ArgumentParser(description="Chat about pictures.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, default=DEFAULT,
        help="a folder that train.py wrote (%(default)s)")
    add("--max_new_tokens", type=positive, default=256, help="the longest answer (%(default)s)")
    add("--temperature", type=number(float, 0), default=0.0,
        help="0 always takes the most likely token (%(default)s)")
    add("--top_p", type=number(float, 1e-6, 1.000001), default=1.0,
        help="draw from the likeliest tokens that sum to this (%(default)s)")
    add("--seed", type=int, default=1234, help="of the draws (%(default)s)")
    add("--device", help="cpu, cuda:0, ... or several with commas between, over which the layers "
        "are spread (the best there is)")
    add("--picture_memory", type=number(float, 0), default=2.0,
        help="GB at most of known pictures; those of the conversation stay whatever it is "
        "(%(default)s)")
    add("--script", type=Path,
        help="answer the dialogues of this JSON file instead of a person's (none)")
    add("--out", type=Path, default=Path("answers.csv"),
        help="where its answers go, a new CSV file (%(default)s)")
    args = parser.parse_args()
    # who reads the answers may leave: then this ends, without a word, as every filter does
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # bytes that are no text; a terminal that lacks a character
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="replace")
    try:
        devices, dtype = choose_device(args.device)
        folder = checkpoint_path(args.checkpoint)
        model = VisualChat.from_pretrained(folder, dtype, devices)
        tokenizer = Tokenizer(folder / "language_model" / "tokenizer.model")
        chat = Chat(model, tokenizer, args.picture_memory * 1e9)
        answering = {
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "generator": torch.Generator().manual_seed(args.seed)}
        if args.script:
            run_script(chat, args.script, args.out, answering)
            return
        if sys.stdin.isatty():
            start_readline()
        print(HELP)
        if args.checkpoint == DEFAULT:
            print(SAMPLES)
        repl(chat, answering)
    except KeyboardInterrupt:
        sys.exit("\nchat.py: stopped")
    except (InputError, OSError, RuntimeError) as error:
        if out_of_memory(error):
            error = ("out of memory: the weights, and keys and values of a whole context, must fit; "
                     "--device spreads them over several GPUs, or takes the processor (cpu)")
        elif isinstance(error, RuntimeError):
            raise
        print(printable(f"chat.py: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
