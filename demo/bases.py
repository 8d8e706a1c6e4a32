#!/usr/bin/env python3
"""Make the demo's tokenizer, language model and vision tower from nothing.

    python demo/bases.py out/bases    seventy minutes on two cores; stopped, it goes on when
                                      started again

The same command on the same machine writes the same files, whose checksums it prints. In order:

    tokenizer       pieces of what make.py says about its scenes
    language model  answers questions about scenes that it is told. It never sees a picture: where
                    the five vectors of one would stand, five sums of words' vectors stand, as
                    "top left" + "small" + "red circle" for the first quarter
    vision tower    describes drawn pictures to this language model, which learns nothing more

Both models are trained as parts of a whole VisualChat. What is trained with them, a projection and
the vectors of those words, is thrown away: train.py begins with a projection of its own.

--attention causal makes models that have never met MMCA: the five sums are read as words are, each
seeing what stands before it. tests/experiment.py compares what can be trained from either.
"""
import argparse
import hashlib
import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

# threads that wait for each other sleep: else other work on the same cores makes them very slow
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from sentencepiece import SentencePieceTrainer
from torch import nn

DEMO = Path(__file__).parent
sys.path.insert(0, str(DEMO.parent))

import make  # noqa: E402
from data import SYSTEM, Tokenizer, Turn, collate, encode, printable  # noqa: E402
from model import Llama, VisualChat, read_llama_config  # noqa: E402
from train import schedule  # noqa: E402
from vision import (InputError, ViT, number, preprocess, read_preprocessing,  # noqa: E402
                    read_vit_config, write_whole)

# Which of several pictures is meant takes longest to learn. It is learned first where nothing else
# matters, in few rounds about two pictures that have little in common, and once more at the end
SELECT = {make.describe_one_of: 60, make.about_one_of: 40}
COMPARE = {make.describe_one_of: 45, make.about_one_of: 35, make.which_image: 10,
           make.difference: 5, make.more_things: 5}
ALL = {make.which_image: 38, make.describe_one_of: 13, make.difference: 20,
       make.about_one_of: 20, make.more_things: 9}
WHICH = {make.which_image: 70, make.describe_one_of: 8, make.difference: 8,
         make.about_one_of: 8, make.more_things: 6}


class Lesson(NamedTuple):
    """What is learned up to a step of the language model's training"""
    until: int      # this step
    pictures: list  # how often one, two, three
    rounds: int     # of a conversation
    differ: float   # share of pairs whose second picture is the first with one change
    named: float    # share of conversations that give the pictures names, as "image b"
    mix: dict       # of questions about several pictures


LESSONS = [Lesson(1_250, [0, 1, 0], 3, 0, 0, SELECT),
           Lesson(2_000, [1, 3, 2], 5, 0, 0.1, COMPARE),
           Lesson(4_000, [1, 3, 3], 8, make.DIFFER, 0.3, ALL),
           Lesson(14_000, [1, 2, 4], 4, make.DIFFER, 0.3, WHICH)]
TOWER_STEPS = 1_000
TEXTS = 5_000  # conversations that the tokenizer learns from
BATCH = 16  # conversations of a step
SAVE_EVERY = 500  # steps
# "red circle" is one of them. From "red" + "circle" a model this small learned which picture has
# both, but hardly which has them in one thing
WORDS = ["", "picture", "nothing", *make.PLACES, *make.SIZES,
         *(f"{colour} {shape}" for colour in make.COLOURS for shape in make.SHAPES),
         *(f"digit {digit}" for digit in make.DIGITS), *(f"word {word}" for word in make.WORDS)]


# ---- what is said: lists of Turn, in which a scene stands for its picture ------------------------

def about_some(rng, lesson):
    """Rounds about one to three scenes, that are shown at once or one after the other"""
    count, = rng.choices((1, 2, 3), lesson.pictures)
    if count == 1:
        return about_one(rng, lesson.rounds)
    scenes = make.scenes_of(count, rng, lesson.differ)
    shown = [0] * lesson.rounds
    later = sorted(rng.choices(range(lesson.rounds), k=2))
    for start in rng.choice([(0, 0, 0), (0, 0, 0), (0, 0, later[0]), (0, *later)])[:count]:
        shown[start] += 1
    # by other names than their headings' a text has to introduce them
    names = rng.choice(make.NAMES) if rng.random() < lesson.named else make.NAMES[0]
    number, turns = 0, []
    for new, question, answer in make.rounds_about(scenes, names, shown, rng, lesson.mix):
        if names != make.NAMES[0]:
            question = make.introduced(names[number:number + len(new)]) + question
        number += len(new)
        turns.append(Turn(question, answer, new))
    return turns


def about_one(rng, rounds):
    """Rounds about one scene, whose description is one of them"""
    things = make.scene(rng)

    def ask():
        return (make.reasoning if rng.random() < 0.2 else make.about_one)(things, rng)

    asked = [*make.several(rounds - 1, ask), ("Describe the image.", make.described(things))]
    turns = [Turn(*one) for one in rng.sample(asked, len(asked))]
    turns[0].images = [things]
    return turns


# ---- numbers of it: what VisualChat.forward takes ------------------------------------------------

class Told(nn.Module):
    """What stands in the tower's place: a scene in words -> the features of its picture"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(len(WORDS), config.hidden_size, padding_idx=0)

    def forward(self, scenes):
        """scenes (N, P, 3), three words of WORDS each -> features (N, P, Dv), their sums"""
        return self.words(scenes.long()).sum(2)                             # (N, P, Dv)


def tell(things):
    """A scene -> (P, 3): the words of a class token and of each quarter"""
    rows = [["picture"]]
    for place in make.PLACES:
        what = things.get(place, ["nothing"])
        rows.append([place, *what[:-2], " ".join(what[-2:])])
    return torch.tensor([[WORDS.index(word) for word in (*row, "", "")[:3]] for row in rows])


def batch_of(conversations, tokenizer, image_tokens, show):
    """Conversations about scenes -> one batch. show(scene): what is a picture's pixels elsewhere"""
    examples = []
    for turns in conversations:
        example = encode(turns, tokenizer, image_tokens)
        example.pixels = [show(things) for things in example.images]
        # by these names a batch knows its pictures
        example.images = [(len(examples), n) for n in range(len(example.images))]
        examples.append(example)
    return collate(examples)


# ---- the trainings -------------------------------------------------------------------------------

def begin(out, attention, steps):
    """The folder of the results, new or of the same command; InputError if it is of another"""
    out.mkdir(parents=True, exist_ok=True)
    sources = b"".join(Path(file).read_bytes() for file in (__file__, make.__file__))
    made_by = (f"bases.py and make.py {hashlib.sha256(sources).hexdigest()} "
               f"attention {attention} steps {steps}\n")
    known = out / "made_by"
    if not known.exists() and not any(out.iterdir()):
        write_whole(known, made_by)
    if not known.exists() or known.read_text() != made_by:
        raise InputError(f"{out} is not a folder that this command has begun; remove it, or name "
                         "another")


def learn_tokenizer(file, rng):
    """Learn the pieces of conversations and write them to file. The template stands among them as
    often as it occurs, so that it becomes few pieces"""
    lines = []
    widest = LESSONS[2]
    for turns in (about_some(rng, widest) for _ in range(TEXTS)):
        lines += [SYSTEM, *(f"\n\n### Image {n}:" for n in range(1, 9))]
        for turn in turns:
            lines += ["\n\n### Question:", turn.question, "\n### Answer:", turn.answer]
    with open(file, "wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe",
            vocab_size=read_llama_config(DEMO / "language_model").vocab_size, byte_fallback=True,
            split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            minloglevel=2)


def train(model, batch, total, file):
    """Train the parts of a model that are not frozen for `total` steps, on what batch(step) gives.
    The state in `file` is begun with, and written every SAVE_EVERY steps"""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Muon learns which picture is meant in fewer steps than AdamW, but is for inner matrices alone
    inner = {name for name, p in trained.items() if ".layers." in name and p.ndim == 2}
    matrices, others = ([p for name, p in trained.items() if (name in inner) == which]
                        for which in (True, False))
    optimizers = [torch.optim.Muon(matrices, lr=0.01, weight_decay=0),
                  torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.99), weight_decay=0)]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first, seconds = 0, 0
    if file.exists():
        state = torch.load(file)
        first, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        for optimizer, content in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(content)
    began = time.process_time() - seconds
    for step in range(first, total):
        factor = schedule(step, warmup=total // 50, total=total)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * factor
        losses, hits = model(**batch(step))                                 # (labels), (labels)
        losses.mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        done = step + 1
        if done % SAVE_EVERY == 0 or done == total:
            minutes = (time.process_time() - began) / 60
            print(f"{file.stem}: step {done} of {total}, loss {losses.mean():.4f}, "
                  f"{hits.float().mean():.1%} of the words right, {minutes:.1f} CPU minutes",
                  flush=True)
            state = {"step": done, "seconds": 60 * minutes, "model": model.state_dict(),
                     "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            torch.save(state, f"{file}.unfinished")
            Path(f"{file}.unfinished").replace(file)


def language_model(out, tokenizer, attention, total):
    """Train a language model of random numbers on scenes in words -> Llama"""
    torch.manual_seed(1)
    language = Llama(read_llama_config(DEMO / "language_model"))
    # as small as LLaMA's begin; torch's own would drown what attention adds to them
    language.model.embed_tokens.weight.data.mul_(0.02)
    model = VisualChat(Told(read_vit_config(DEMO / "vision_model")), language, attention)

    def batch(step):
        rng = random.Random(f"language model {step}")
        # in a shorter training each lesson is
        lesson = next(one for one in LESSONS if step * LESSONS[-1].until < one.until * total)
        talks = [about_some(rng, lesson) for _ in range(BATCH)]
        return batch_of(talks, tokenizer, model.image_tokens, tell)

    train(model, batch, total, out / "language_model.state")
    return language


def vision_tower(out, tokenizer, language, attention, total):
    """Train a tower of random numbers on drawn pictures, beside a language model that is frozen
    -> VisualChat of both"""
    torch.manual_seed(2)
    # torch's random positions, as large as they are: a fiftieth of that, as is usual, and a tower
    # learns what stands in a picture, but hardly where
    tower = ViT(read_vit_config(DEMO / "vision_model"))
    model = VisualChat(tower, language.requires_grad_(False), attention)
    model.preprocessing = read_preprocessing(DEMO / "vision_model", tower.config.image_size)

    def batch(step):
        rng = random.Random(f"vision tower {step}")
        talks = [about_one(rng, 3) for _ in range(2 * BATCH)]
        return batch_of(talks, tokenizer, model.image_tokens,
                        lambda things: preprocess(make.draw(things, rng), model.preprocessing))

    train(model, batch, total, out / "vision_tower.state")
    return model


def main():
    """The command line; what the user can mend is one sentence on stderr and exit code 2"""
    parser = argparse.ArgumentParser(description="Make the demo's two models from nothing.")
    parser.add_argument("out", type=Path, help="the folder of both; what it holds is gone on with")
    parser.add_argument("--attention", choices=["mmca", "causal"], default="mmca",
                        help="how the models are taught to read (default: %(default)s)")
    parser.add_argument("--steps", type=number(int, 1), nargs=2, metavar=("LANGUAGE", "TOWER"),
                        default=[LESSONS[-1].until, TOWER_STEPS],
                        help="of the trainings (default: %(default)s)")
    args = parser.parse_args()
    # rounding hangs on how many threads share a sum
    torch.set_num_threads(2)
    try:
        begin(args.out, args.attention, args.steps)
        learn_tokenizer(args.out / "tokenizer.model", random.Random("tokenizer"))
        tokenizer = Tokenizer(args.out / "tokenizer.model")
        language = language_model(args.out, tokenizer, args.attention, args.steps[0])
        model = vision_tower(args.out, tokenizer, language, args.attention, args.steps[1])
        model.bfloat16().save_pretrained(args.out / "model", tokenizer)
    except (InputError, OSError) as error:
        print(printable(f"bases.py: {error}"), file=sys.stderr)
        sys.exit(2)
    for file in sorted((args.out / "model").glob("*_model/*")):
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}")


if __name__ == "__main__":
    main()
