"""A conversation at the terminal.

This file explains inference: a conversation whose keys and values stay in one cache, so that each round computes only
its new tokens; pictures that are encoded once; greedy decoding and sampling; answers that appear while they are
made. The REPL and the script runner stand on top of it. Not here: the model (model.py), the template (data.py).

    python chat.py                                       the checkpoint in out/best
    python chat.py out/epoch-3 --temperature 0.7 --top_p 0.9
    python chat.py out/best --script questions.json --out answers.csv

Shapes: T tokens, N images, P tokens of an image, D width, V vocabulary.
"""
import argparse
import csv
import hashlib
import os
import re
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch
from PIL import Image
from tqdm import tqdm

from data import Tokenizer, Turn, encode, printable
from mmca import TEXT
from model import KVCache, VisualChat, choose_device
from vision import InputError, load_image, preprocess, read_json

HELP = """Write a question. A word that is a picture file is attached to it (quote a path with blanks).
  /image a.jpg "b c.png"   attach pictures to the next question
  /clear                   begin a new conversation
  /help                    this
  /quit                    leave (also Ctrl-D); Ctrl-C stops an answer"""


def pick(logits, temperature=0.0, top_p=1.0, generator=None):
    """The next token from its logits (V): the best for temperature 0, else drawn from the smallest set of likely tokens
    whose probabilities sum to top_p (nucleus sampling, arXiv:1904.09751)."""
    if not temperature:
        return int(logits.argmax())
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(descending=True)      # (V), (V)
    probabilities[probabilities.cumsum(0) - probabilities > top_p] = 0  # the first is always kept
    return int(order[torch.multinomial(probabilities.cpu(), 1, generator=generator)])


class Chat:
    """One conversation with a VisualChat model. `ask` answers; what was said stays in the cache."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.config = model.language_model.config
        weight, devices = model.language_model.model.embed_tokens.weight, model.language_model.model.devices
        self.device = weight.device
        self.cache = KVCache(self.config, self.config.max_position_embeddings, devices or self.device, weight.dtype)
        self.features = {}  # sha1 of the pixels -> features (P, D): a picture is encoded once in its life
        self.clear()

    def clear(self):
        """Begin a new conversation; pictures that were encoded stay known"""
        self.cache.texts = self.cache.images = 0
        self.shown = None  # pictures shown so far; None: nothing has been said
        self.pending = []  # ids of the conversation that the cache has still to read

    def look_at(self, path):
        """A picture file -> projected features (P, D), computed at its first use only"""
        pixels = preprocess(load_image(path), self.model.preprocessing)                      # (3, S, S)
        key = hashlib.sha1(pixels.numpy().tobytes()).digest()
        if key not in self.features:
            with torch.inference_mode():
                self.features[key] = self.model.encode_images(pixels[None].to(self.device))[0]   # (P, D)
        return self.features[key]

    def ask(self, question, images=(), max_new_tokens=256, temperature=0.0, top_p=1.0, generator=None):
        """One round: a question and picture files -> a generator of the answer's token ids, without the end token.

        The conversation is consistent wherever the generator is stopped: an answer cut short gets its `</s>` before the
        next round, and a round whose question was not read to its end has not been said."""
        features = [self.look_at(image) for image in images]
        turn = Turn(question, None, list(images))
        example = encode([turn], self.tokenizer, self.model.image_tokens, self.shown)
        ids = torch.tensor([self.pending + example.input_ids.tolist()], device=self.device)      # (1, T)
        modality = torch.tensor([[TEXT] * len(self.pending) + example.modality.tolist()], device=self.device)  # (1, T)
        room = self.config.max_position_embeddings - self.cache.length - ids.shape[1] - 1
        if room < 1:
            raise InputError(f"the conversation is full: {self.cache.length} of {self.config.max_position_embeddings} "
                             f"tokens are used, and this round needs {ids.shape[1]}; /clear begins a new one")
        logits = self.model.read(ids, modality, self.cache, torch.stack(features) if features else None)  # (V)
        self.shown, self.pending = (self.shown or 0) + len(features), [self.tokenizer.eos]
        one = torch.tensor([[TEXT]], device=self.device)
        for _ in range(min(room, max_new_tokens)):
            token = pick(logits[:len(self.tokenizer)], temperature, top_p, generator)
            if token == self.tokenizer.eos:
                return
            self.pending = [token, self.tokenizer.eos]
            yield token
            logits = self.model.read(torch.tensor([[token]], device=self.device), one, self.cache)  # (V)
            self.pending = [self.tokenizer.eos]


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
    """A line -> (the pictures that words of it name, the line without them). A word may be quoted, hold "\\ " or be a
    file:// address."""
    endings, pictures = Image.registered_extensions(), []

    def take(match):
        word = match[0]
        path = word[1:-1] if word[0] in "\"'" else re.sub(r"\\(.)", r"\1", word)
        if path.startswith("file://"):
            path = unquote(urlparse(path).path)
        if os.path.splitext(path)[1].lower() not in endings:
            return word
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            print(f"(no picture {path}: taken as a word)")
            return word
        pictures.append(path)
        return ""

    rest = re.sub(r"""(?<!\S)(?:"[^"]+"|'[^']+'|(?:\\.|[^\s\\])+)(?!\S)""", take, line)
    return pictures, " ".join(rest.split()) if pictures else rest.strip()


def repl(chat, args):
    """Read lines until /quit or the end of the input. Nothing that a line holds ends the conversation."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  history and editing for input()
    generator, attached = torch.Generator().manual_seed(args.seed), []
    print(HELP)
    while True:
        try:
            line = input("\n> ")
            command, _, rest = line.strip().partition(" ")
            if command == "/quit":
                return
            if command == "/clear":
                chat.clear()
                attached = []
                print("(a new conversation)")
            elif command == "/image":
                for path in shlex.split(rest):
                    load_image(path)
                    attached.append(path)
                print(f"({len(attached)} pictures attached to the next question)")
            elif re.fullmatch("/[a-z]*", command):
                print(HELP)
            else:
                pictures, question = attachments(line)
                attached += pictures
                if not question:
                    print(f"({len(attached)} pictures attached; ask about them)" if attached else "(ask something)")
                    continue
                tokens = chat.ask(question, attached, args.max_new_tokens, args.temperature, args.top_p, generator)
                attached = []
                for piece in stream(tokens, chat.tokenizer):
                    print(piece, end="", flush=True)
                print()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(" (stopped; /quit or Ctrl-D leaves)")
        except (ValueError, OSError, RuntimeError) as error:  # InputError is a ValueError
            attached = []
            print(f"({error})")


def split_paths(pictures):
    """['a.jpg "b c.jpg"'] or [] -> paths, quoted as a shell would"""
    try:
        return [path for text in pictures for path in shlex.split(text)]
    except ValueError as error:
        raise InputError(f"pictures {pictures[0]!r}: {error}; quote a path as a shell would") from error


def run_script(chat, script, out, args):
    """Answer a JSON file of dialogues, {"name": [["question", "a.jpg 'b c.jpg'"], ["follow-up"]]}, picture paths
    relative to it, to a CSV with the columns test_name, image_path, question, answer; written when whole."""
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
    for name, rounds in tqdm(dialogues.items(), unit="dialogue"):
        chat.clear()
        for question, *pictures in rounds:
            paths = [str(script.parent / path) for path in split_paths(pictures)]
            tokens = chat.ask(question, paths, args.max_new_tokens, args.temperature, args.top_p, generator)
            rows.append([name, *(pictures or [""]), question, chat.tokenizer.decode(list(tokens))])
    unfinished = out.with_name(f".{out.name}.unfinished")
    with open(unfinished, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["test_name", "image_path", "question", "answer"], *rows])
    os.replace(unfinished, out)
    print(f"{len(rows)} answers in {out}")


def main():
    """The command line"""
    parser = argparse.ArgumentParser(description="Chat about pictures.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, default=Path("out/best"), help="a folder that train.py wrote (%(default)s)")
    add("--max_new_tokens", type=int, default=256, help="the longest answer (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 always takes the most likely token (%(default)s)")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest tokens that sum to this (%(default)s)")
    add("--seed", type=int, default=1234, help="of the draws (%(default)s)")
    add("--device", help="cpu, cuda:0, ... or several with commas between, over which the layers are spread (the best "
        "there is)")
    add("--script", type=Path, metavar="JSON", help="answer the dialogues of this file instead of a person's (none)")
    add("--out", type=Path, default=Path("answers.csv"), metavar="CSV", help="where its answers go (%(default)s)")
    args = parser.parse_args()
    try:
        if not (0 <= args.temperature < float("inf") and 0 < args.top_p <= 1):
            raise InputError("--temperature is a number from 0, --top_p one above 0 and at most 1")
        device, dtype = choose_device(args.device)
        model = VisualChat.from_pretrained(args.checkpoint, dtype, device)
        chat = Chat(model, Tokenizer(args.checkpoint / "language_model" / "tokenizer.model"))
        run_script(chat, args.script, args.out, args) if args.script else repl(chat, args)
    except InputError as error:
        print(printable(f"chat.py: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
