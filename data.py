"""Conversations: template, tokens, data sets, blending, batches.

This file explains how a conversation about pictures becomes numbers: the template (the
DeepSpeed-VisualChat post, section 6), tokens, labels and modality side by side (`encode`); how a
published data set is read (`llava`, then the others, listed in `DATASETS`), how samples of several
pictures and rounds are made of them (sections 4.1 and 4.2: `concatenate`, `blend_llava_otter`), and
batches (`collate`). `python data.py --show 3 ...` prints what the model sees (`render`). Not here:
how a picture is opened (vision.py), what the model does with the batch (model.py).

Shapes: B batch, T tokens, N images in the batch, U distinct ones, P tokens of an image, S pixels a
side.
"""
import argparse
import json
import mmap
import os
import pickle
import random
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, cycle, groupby
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from mmca import IMAGE, PAD, TEXT
from vision import (InputError, checkpoint_path, count_image_tokens, is_main, load_image,
                    positive, preprocess, read_checkpoint, read_config, read_json, read_vit_config,
                    write_whole)

SYSTEM = "You are a powerful vision-language assistant."


@dataclass
class Turn:
    """One round; a conversation is a list of them.

    A picture is a path, or (file, offset, length) of base64 text inside a JSON file."""
    question: str
    answer: str | None                          # None: still to come
    images: list = field(default_factory=list)  # shown before the question


@dataclass
class Example:
    """One encoded conversation"""
    input_ids: torch.Tensor                     # (T)
    labels: torch.Tensor                        # (T)
    modality: torch.Tensor                      # (T)
    images: list                                # its pictures in order
    left_out: int = 0                           # the rounds at its end that did not fit
    pixels: list = field(default_factory=list)  # (3, S, S) of each picture, once they are read
    broken: bool = False                        # it stands in for one that cannot be read


def encode(conversation, tokenizer, image_tokens, shown=None, max_length=None, max_images=None):
    """A list of Turn -> Example: the template, one piece after the other (the post, section 6).

    [Turn("Why?", "It is.", ["a.png"])] with two positions an image, by the tests' tokenizer:

        piece                      input_ids                     labels               modality
        <s>, SYSTEM                1 341 ... 466                 -100 -100 ... -100   1 1 ... 1
        \\n\\n### Image 1:         447 13 13 ... 480 470         -100 ...             1 ...
        two positions              0 0                           -100 -100            2 2
        \\n### Question:           447 13 38 ... 470             -100 ...             1 ...
        Why?                       338 468 474                   -100 -100 -100       1 1 1
        \\n### Answer:             447 13 38 ... 470             -100 ...             1 ...
        It is.                     287 450 272 466               287 450 272 466      1 1 1 1
        </s>                       2                             2                    1

    labels are ids in answers and their `</s>`, -100 elsewhere; they are not shifted here: model.py
    does that. A last answer of None leaves the round open. shown: None begins a conversation; a
    number continues one in which so many pictures have been shown. From the first round that would
    pass max_length tokens or max_images pictures on, rounds are left out whole and counted: half an
    answer would teach to stop in the middle."""
    rows = []  # (id, label, modality): made in one place, the three cannot drift apart
    images = []
    fitting = 0
    number = shown or 0

    def add(piece, kind=TEXT, trained=False):
        rows.extend((i, i if trained else -100, kind) for i in piece)

    # pieces are tokenized one by one, in which `<image>` and `</s>` are ordinary characters, and
    # `quote` indents a line that begins with ###: nothing that is written becomes markup
    if shown is None:
        add([tokenizer.bos] + tokenizer.encode(SYSTEM))
    for turn in conversation:
        start = len(rows)
        # an empty line before each round, none between its pictures
        lines = "\n\n"
        for _ in turn.images:
            number += 1
            add(tokenizer.encode(f"{lines}### Image {number}:"))
            add([0] * image_tokens, IMAGE)
            lines = "\n"
        add(tokenizer.encode(f"{lines}### Question:"))
        add(tokenizer.encode(quote(turn.question)))
        # no blank at its end: the answer's first piece begins with one
        add(tokenizer.encode("\n### Answer:"))
        if turn.answer is not None:
            add(tokenizer.encode(quote(turn.answer)) + [tokenizer.eos], trained=True)
        too_long = max_length and len(rows) > max_length
        if too_long or max_images and len(images) + len(turn.images) > max_images:
            del rows[start:]
            break
        images += turn.images
        fitting += 1
    columns = torch.tensor(rows, dtype=torch.long).view(-1, 3)              # (T, 3)
    return Example(*columns.T, images, left_out=len(conversation) - fitting)


def quote(text):
    """Text that can never become markup: a line that begins like a heading of the template is
    indented by a blank"""
    return re.sub("^###", " ###", text, flags=re.MULTILINE)


# ---- a data set ----------------------------------------------------------------------------------
# Two functions. The first makes a list of Turn of a record in the data set's JSON file; LeftOut if
# it is no conversation. The second, (rounds, rng) -> conversation, draws what may be chosen (a
# wording, a caption, an order), anew in each epoch. `DATASETS`, below, names both.

def llava(pictures, key, record, rest):
    """A record of LLaVA's, about one picture or none. The picture is shown before the question that
    holds the marker; if none does, before the first."""
    messages = record["conversations"]
    shown = [f"{pictures}/{record['image']}"] if record.get("image") else []
    rounds = []
    # a question behind the last answer is no round
    for asked, said in zip(messages[::2], messages[1::2]):
        if (asked["from"], said["from"]) != ("human", "gpt"):
            raise LeftOut("human and gpt do not take turns")
        marked = "<image>" in asked["value"]
        if marked and not shown:
            raise LeftOut("a marker and no picture")
        rounds.append(Turn(clean(asked["value"]), said["value"], shown if marked else []))
    if rounds and not pictures_of(rounds):
        rounds[0].images = shown
    return rounds


def as_written(rounds, rng):
    """Nothing is chosen"""
    return rounds


def concatenate(conversations, factor, rng):
    """Simple concatenation (the post, 4.1): shuffle, and join groups of 1 to `factor`, their sizes
    drawn uniformly by rng, a random.Random. Every conversation is used once. Returns conversations;
    `encode` numbers their pictures. So three conversations of LLaVA become one sample by chance
    (its factor is 3, see CONCATENATE), and none comes twice in an epoch, unless the next sample
    stands in for one whose picture cannot be read (`Samples`)."""
    order = rng.sample(conversations, len(conversations))
    groups = []
    start = 0
    while start < len(order):
        # the last group takes what is left, perhaps fewer than drawn
        stop = start + rng.randint(1, factor)
        groups.append(list(chain(*order[start:stop])))
        start = stop
    return groups


def blend_llava_otter(rounds, pictures, about, rng):
    """LLaVA-Otter blending (the post, 4.2): some conversations about each picture by itself, then
    rounds about all.

    rounds: those about all pictures (what pictures stand in them is ignored); about: for each
    picture a list of conversations. At least one conversation of each list, of the last also none,
    and at least one round are drawn by rng, a random.Random. Each picture is shown once, in order:
    with its first conversation, or with the first round. Returns a conversation.

    So a pair of Otter's (CGD) is used where each of its pictures but the last has a conversation in
    one of LLaVA's three files, found by the name of the picture; else the record is left out."""
    conversation = []
    unseen = []
    for number, (picture, conversations) in enumerate(zip(pictures, about), 1):
        # were an earlier one left to the rounds, it would be shown behind a later one
        least = 1 if number < len(pictures) else 0
        count = rng.randint(least, len(conversations))
        chosen = rng.sample(conversations, count)
        if chosen:
            conversation += shown_first([picture], chain(*chosen))
        else:
            unseen.append(picture)
    count = rng.randint(1, len(rounds))
    return conversation + shown_first(unseen, rng.sample(rounds, count))


def pictures_of(conversation):
    """Its pictures in order"""
    return [image for turn in conversation for image in turn.images]


def shown_first(pictures, rounds):
    """The rounds, with all of the pictures in the first and none in the others"""
    rounds = [replace(turn, images=[]) for turn in rounds]
    rounds[0].images = pictures
    return rounds


class Epoch:
    """All samples of one epoch, a sequence of conversations: grouped, shuffled and drawn by seed,
    epoch, name of the set and index in it alone, so that any number of workers and processes sees
    the same. parts: for each set the indices that are used; None: all."""

    def __init__(self, sets, parts, seed, epoch):
        self.sets = sets
        self.seed = seed
        self.epoch = epoch
        rng = random.Random(f"epoch {seed} {epoch}")
        parts = parts or [range(len(data.records)) for data in sets]
        groups = []
        # only conversations of one set are joined; (n, i) stands for the i-th of the n-th set
        for n, (data, part) in enumerate(zip(sets, parts)):
            groups += concatenate([[(n, i)] for i in part], data.factor, rng)
        rng.shuffle(groups)
        self.groups = Packed(groups)

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index):
        conversation = []
        for n, i in self.groups[index]:
            data = self.sets[n]
            # a generator for each conversation: what it draws hangs on no other one
            rng = random.Random(f"{self.seed} {self.epoch} {data.name} {i}")
            conversation += data.converse(data.records[i], rng)
        return conversation


class Samples:
    """Conversations -> Example with its pixels, in a DataLoader's workers. For one with a picture
    that cannot be read, which is named on stderr, the next one stands in."""

    def __init__(self, conversations, tokenizer, image_tokens, preprocessing, max_length,
                 max_images):
        self.conversations = conversations
        self.preprocessing = preprocessing
        self.encode = partial(encode, tokenizer=tokenizer, image_tokens=image_tokens,
                              max_length=max_length, max_images=max_images)

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        for place in range(index, index + 100):
            example = self.encode(self.conversations[place % len(self)])
            example.broken = place > index
            try:
                example.pixels = [preprocess(load_image(image), self.preprocessing)
                                  for image in example.images]              # (3, S, S)
                return example
            except InputError as error:
                print(printable(f"{error}; the next sample stands in for it"), file=sys.stderr,
                      flush=True)
        # so many in a row are not met where few are broken: nothing to learn from, and train.py
        # stops
        return replace(self.encode([]), broken=True)


def collate(examples):
    """Examples with pixels -> one batch: input_ids, labels, modality (B, T), padded at the right;
    pixels (U, 3, S, S) of the distinct pictures; image_index (N), which of them stands where"""
    batch = {}
    for name, filler in (("input_ids", 0), ("labels", -100), ("modality", PAD)):
        rows = [getattr(example, name) for example in examples]
        batch[name] = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=filler)                   # (B, T)
    # a picture that occurs twice is encoded once
    pixels = {}
    for example in examples:
        pixels.update(zip(example.images, example.pixels))
    distinct = list(pixels)
    index = [distinct.index(image) for example in examples for image in example.images]
    batch["image_index"] = torch.tensor(index, dtype=torch.long)            # (N)
    # without pictures there are no sizes to stack
    batch["pixels"] = torch.stack(list(pixels.values())) if pixels else torch.empty(0)
    return batch


def render(example, tokenizer, colour=True):
    """What the model sees as text: trained tokens coloured (or in brackets), pictures as
    <image 2: 256 tokens>"""
    special = {tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    before, after = ("\x1b[32m", "\x1b[0m") if colour else "[]"
    ids = example.input_ids.tolist()
    trained = (example.labels != -100).tolist()
    text = ""
    number = 0
    # one run of a kind after the other: a token alone may be half a character
    names = [special.get(i) for i in ids]
    for (kind, learned, name), run in groupby(zip(example.modality.tolist(), trained, names)):
        length = len(list(run))
        said = name or printable(tokenizer.decode(ids[:length]))
        if kind == IMAGE:
            number += 1
            said = f"<image {number}: {length} tokens>"
        text += before + said + after if learned else said
        del ids[:length]
    return text


# ---- what serves it ------------------------------------------------------------------------------

class Tokenizer:
    """LLaMA-2's tokenizer: SentencePiece with `<s>` and `</s>`, which no text can write."""

    def __init__(self, file):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{file} is no SentencePiece model; LLaMA-2's tokenizer.model belongs "
                             "there, beside the weights") from error
        self.file = file
        self.bos = self.model.bos_id()
        self.eos = self.model.eos_id()
        # list of ids -> text
        self.decode = self.model.decode

    def __len__(self):
        return self.model.vocab_size()

    def encode(self, text):
        """text -> list of ids; `<s>`, `</s>` and `<image>` in it are ordinary characters"""
        return self.model.encode(whole(text))


def whole(text):
    """Text without halves of characters, which JSON can hold and a terminal can send"""
    return text.encode("utf-8", "replace").decode()


def printable(text):
    """Text without the control characters that a terminal would obey, and without halves of
    characters"""
    # the last ones turn lines around
    orders = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069"
    return re.sub(f"[{orders}]", "", whole(text))


# ---- reading a data set's files ------------------------------------------------------------------

# data set, its JSON file, the field in which the records are (- for none), where its pictures are
FILES = """
llava              llava/detail_23k.json                      -            coco/train2017
llava              llava/complex_reasoning_77k.json           -            coco/train2017
llava_dial         llava/conversation_58k.json                -            coco/train2017
otter_mimicit_cgd  MIMIC-IT/CGD_instructions.json             data         coco/train2017
otter_mimicit_sd   MIMIC-IT/SD_instructions.json              data         MIMIC-IT/SD.json
otter_mimicit_sn   MIMIC-IT/SN_instructions.json              data         MIMIC-IT/SN.json
otter_mimicit_tvc  MIMIC-IT/TVC_instructions.json             data         MIMIC-IT/TVC.json
otter_mimicit_vst  MIMIC-IT/VST_instructions.json             data         MIMIC-IT/VST.json
sparkles_dialogue SparklesDialogueCC/annotations/SparklesDialogueCC.json - SparklesDialogueCC/images
sparkles_dialogue SparklesDialogueVG/annotations/SparklesDialogueVG.json - SparklesDialogueVG/images
minigpt4           cc_sbu_align/filter_cap.json               annotations  cc_sbu_align/image
coco_caption       coco_caption/dataset.json                  images       coco/2014
ocr_vqa            OCR_VQA/dataset.json                       -            OCR_VQA/images
aokvqa             aokvqa/annotations/aokvqa_v1p0_train.json  -            coco/train2017
"""
# folder, who has what is in it
SOURCES = """
llava               liuhaotian/LLaVA-Instruct-150K on Hugging Face
coco                cocodataset.org (train2017.zip; for captions train2014.zip and val2014.zip)
MIMIC-IT            pufanyi/MIMICIT on Hugging Face
SparklesDialogueCC  HYPJUDY/Sparkles on Hugging Face
SparklesDialogueVG  HYPJUDY/Sparkles on Hugging Face
cc_sbu_align        Vision-CAIR/MiniGPT-4 on GitHub (cc_sbu_align.zip)
coco_caption        cs.stanford.edu/people/karpathy/deepimagesent (caption_datasets.zip)
OCR_VQA             ocr-vqa.github.io
aokvqa              allenai/aokvqa on GitHub (aokvqa_v1p0.tar.gz)
"""


class LeftOut(Exception):
    """Why a record is no conversation"""


def find(folder, name):
    """A file or a folder below the data folder -> its path; InputError that says where to get it"""
    if not (folder / name).exists():
        source = re.search(f"^{name.split('/')[0]} +(.*)", SOURCES, re.MULTILINE)[1]
        raise InputError(f"{folder / name} is missing: {source} has it")
    return folder / name


def published(name, make, args, left_out):
    """The rounds of the records in a data set's files. make: as in `each`, with the pictures before
    the key"""
    for row in re.findall(f"^{name} (.*)", FILES, re.MULTILINE):
        file, field, pictures = row.split()
        file = find(args.data_path, file)
        pictures = find(args.data_path, pictures)
        if pictures.suffix == ".json":
            pictures = picture_index(pictures, args.out)
        content = read_json(file, (list, dict))
        if field in content:
            content = content[field]
        yield from each(content, file, partial(make, pictures), left_out)


def each(content, file, make, left_out):
    """Yield make(key, record, rest) of the records in a list or an object: its rounds. rest: the
    records not read yet, from which it may take some away. "id: why" is appended to left_out for
    one that is left out; InputError names one that is not as it should be."""
    # one form for both: a list's records are named by their index
    rest = content if isinstance(content, dict) else dict(enumerate(content))
    for key in list(rest):
        # one that a group has taken by now
        if key not in rest:
            continue
        try:
            rounds = make(key, rest.pop(key), rest)
            if not rounds:
                # nothing to train, and no round to show pictures in
                raise LeftOut("no round")
            for turn in rounds:
                # a number would be noticed hours later, when its turn comes to be encoded
                texts([turn.question, turn.answer])
            yield rounds
        except LeftOut as why:
            left_out.append(f"{key if isinstance(key, str) else f'{file.stem}[{key}]'}: {why}")
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{file}[{key!r}] has a wrong or missing field: {error}") from error


def texts(value):
    """A list of texts; TypeError for anything else: a text alone would be taken letter by letter"""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{repr(value)[:80]} should be text")
    return value


def clean(text, marker="<image>"):
    """A question without picture markers, its white space single blanks"""
    return " ".join(text.replace(marker, "").split())


# ---- the other data sets -------------------------------------------------------------------------

MAX_IMAGES = 8  # of one conversation, as in the original; also the default of --max_images

DESCRIBE = """\
Please describe this image.
What does this image show?
Write a caption for this image.
Give this image a fitting title.
Tell me what you see here.
Summarize the content of the image.
What is going on in this picture?
How would you describe this picture to somebody who cannot see it?""".splitlines()

REASON = """\
Why?
Please say why.
What is the reason?
How do you know?
Explain your answer.
Give reasons for your answer.""".splitlines()

STYLES = """\
image a, image b, image c, image d, image e, image f, image g, image h
image A, image B, image C, image D, image E, image F, image G, image H
the first image, the second image, the third image, the fourth image, the fifth image, \
the sixth image, the seventh image, the eighth image""".splitlines()


def first_round(rounds, rng):
    """LLaVA's detailed descriptions and complex reasoning, as the original reads them"""
    return rounds[:1]


def one_round(rounds, rng):
    """One of the wordings, captions or questions"""
    return [rng.choice(rounds)]


def minigpt4(pictures, key, record, rest):
    """MiniGPT-4's second stage: one picture and its description, asked for in changing words"""
    image = f"{pictures}/{record['image_id']}.jpg"
    return [Turn(request, record["caption"], [image]) for request in DESCRIBE]


def coco_caption(pictures, key, record, rest):
    """COCO's captions, five or so a picture, asked for in the words of DESCRIBE, too"""
    image = f"{pictures}/{record['filename']}"
    captions = [sentence["raw"] for sentence in record["sentences"]]
    return [Turn(request, text, [image]) for request in DESCRIBE for text in captions]


def aokvqa(pictures, key, record, rest):
    """A-OKVQA: a question that takes knowledge, a request for the reason, the right choice and all
    reasons"""
    right = texts(record["choices"])[record["correct_choice_idx"]]
    answer = f"The answer is {right}. Because {' '.join(texts(record['rationales']))}"
    image = f"{pictures}/{record['image_id']:012}.jpg"
    return [Turn(record["question"] + f" {why}", answer, [image]) for why in REASON]


def ocr_vqa(pictures, key, record, rest):
    """OCR-VQA: the cover of a book and questions about it"""
    image = f"{pictures}/{key}{os.path.splitext(record['imageURL'])[1]}"
    # absent or broken ones are noticed later
    with suppress(InputError, OSError):
        # covers that are gone are one pixel wide or high; to open all others would take minutes
        if os.path.getsize(image) < 10_000:
            width, height = load_image(image).size
            if min(width, height) == 1:
                raise LeftOut(f"picture of {width} x {height} pixels")
    pairs = zip(texts(record["questions"]), texts(record["answers"]))
    return [Turn(question, answer, [image]) for question, answer in pairs]


def group(images, record, rest):
    """The rounds of one of MIMIC-IT's instructions and of those that it names, which lead no group
    then; the pictures before the first"""
    members = [record] + [rest.pop(name) for name in texts(record["rel_ins_ids"]) if name in rest]
    return shown_first(images, [Turn(clean(member["instruction"]), member["answer"])
                                for member in members])


def mimicit(pictures, key, record, rest):
    """MIMIC-IT's SD (two photographs of a scene), SN (rooms), TVC (films) and VST (stories), whose
    pictures lie inside a JSON file"""
    images = [pictures[name] for name in texts(record["image_ids"]) if name in pictures]
    if not images:
        raise LeftOut("none of its pictures is in the picture file")
    if len(images) > MAX_IMAGES:
        raise LeftOut(f"{len(images)} pictures")
    return group(images, record, rest)


def mimicit_cgd(pictures, key, record, rest, about=None):
    """MIMIC-IT's CGD, pairs of COCO's pictures. about: LLaVA's conversations by picture; if given,
    all pictures but the last need one"""
    names = [name.removeprefix("CGD_IMG_") for name in texts(record["image_ids"])]
    images = [f"{pictures}/{name}.jpg" for name in names]
    if about is not None and not all(image in about for image in images[:-1]):
        raise LeftOut("a picture before the last one has no LLaVA conversation")
    return group(images, record, rest)


def in_any_order(rounds, rng):
    """The rounds shuffled, the pictures still before the first"""
    return shown_first(rounds[0].images, rng.sample(rounds, len(rounds)))


def llava_otter_blend(args, left_out):
    """Reads CGD's pairs, with LLaVA's conversations about each of their pictures"""
    about = {}
    for name in ("llava", "llava_dial"):
        for rounds in published(name, llava, args, left_out):
            for image in set(pictures_of(rounds)):
                about.setdefault(image, []).append(rounds)
    pairs = published("otter_mimicit_cgd", partial(mimicit_cgd, about=about), args, left_out)
    for rounds in pairs:
        yield rounds, [about.get(image, []) for image in rounds[0].images]


def blended(record, rng):
    """Draws a conversation by `blend_llava_otter`"""
    rounds, about = record
    return blend_llava_otter(rounds, rounds[0].images, about, rng)


def sparkles_dialogue(pictures, key, record, rest):
    """SparklesDialogue: several pictures over several rounds, IMAGE#14 in the text"""
    messages = record["dialogue"]
    if len(messages) % 2:
        raise LeftOut("odd number of messages")
    rounds = []
    for asked, said in zip(messages[::2], messages[1::2]):
        if (asked["role"], said["role"]) != ("user", "assistant"):
            raise LeftOut("roles do not alternate, user first")
        question = clean(asked["content"], "<Img><ImageHere></Img>")
        images = [f"{pictures}/{image['image_id']}.jpg" for image in asked.get("images") or []]
        rounds.append(Turn(question, said["content"], images))
    images = pictures_of(rounds)
    if not all(map(os.path.exists, images)):
        raise LeftOut("a picture file is missing")
    if len(images) > MAX_IMAGES:
        raise LeftOut(f"{len(images)} pictures")
    return rounds


def with_names(rounds, rng):
    """IMAGE#14 becomes the name of a picture, as "image a" or "the first image" """
    unused = iter(rng.choice(STYLES).split(", "))
    names = {}

    def named(text):
        # a mention is a whole id: in IMAGE#1417 there is no IMAGE#14
        text = re.sub("IMAGE#([0-9A-Za-z_]+)", lambda found: names.get(found[1], found[0]), text)
        # a name may now stand where a sentence begins
        return re.sub(r"(^|[.?!][ \n])\w", lambda found: found[0].upper(), text)

    conversation = []
    for turn in rounds:
        # in a text only those have a name that have been shown
        for image in turn.images:
            names.setdefault(Path(image).stem, next(unused))
        conversation.append(Turn(named(turn.question), named(turn.answer), turn.images))
    return conversation


def own(folder, key, talk, rest):
    """Your own conversations: a JSON list of lists of {"images": [...], "question": "...",
    "answer": "..."}, one object for each round; paths of pictures are relative to the file."""
    rounds = []
    for said in talk:
        # else a misspelt "images" would silently lose its pictures
        unknown = said.keys() - {"answer", "images", "question"}
        if unknown:
            raise ValueError(f"{min(unknown)!r} is none of answer, images, question")
        images = [str(folder / name) for name in texts(said.get("images") or [])]
        rounds.append(Turn(said["question"], said["answer"], images))
    return rounds


# name -> (what makes the rounds of a record, what draws a conversation of them). A new data set is
# a row here, one in FILES for each file, one in SOURCES for a new folder, and mostly one function
# (`llava_otter_blend` alone reads its files itself)
DATASETS = {
    # the nine of the post
    "llava": (llava, first_round),
    "llava_dial": (llava, as_written),
    "otter_mimicit_cgd": (mimicit_cgd, in_any_order),
    "otter_mimicit_sd": (mimicit, in_any_order),
    "otter_mimicit_sn": (mimicit, in_any_order),
    "otter_mimicit_tvc": (mimicit, in_any_order),
    "otter_mimicit_vst": (mimicit, in_any_order),
    "llava_otter_blend": (llava_otter_blend, blended),
    "sparkles_dialogue": (sparkles_dialogue, with_names),
    # four more that the original reads
    "minigpt4": (minigpt4, one_round),
    "coco_caption": (coco_caption, one_round),
    "ocr_vqa": (ocr_vqa, one_round),
    "aokvqa": (aokvqa, one_round)}
CONCATENATE = {"llava": 3, "llava_dial": 2}  # the factors of the original's script

# an entry of a JSON object {id: base64}; neither part holds a quotation mark. *+ takes all that it
# can for good: in a file that breaks off, nothing is tried again
ENTRY = re.compile(rb'(?:\A\s*+{|,)\s*+("[^"]*+")\s*+:\s*+"([^"]*+)"\s*+')
CLOSING = re.compile(rb"}\s*+")


def picture_index(file, out):
    """Where the pictures of a JSON object {id: base64} lie: {id: (file, offset, length)}.

    A file of tens of GB is read through once for each `out`, where the result is kept. InputError
    if it breaks off."""
    status = file.stat()
    if not status.st_size:
        raise InputError(f"{file} is empty")
    # another file of the same name, or this one when it has changed, has an index of its own
    place = out / f"{file.name}.{status.st_size}.{status.st_mtime_ns}.index"
    if not place.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps(look_through(file)))
    return {name: (str(file), *where) for name, where in read_json(place).items()}


def look_through(file):
    """{id: (offset, length)} of all pictures of a file"""
    places = {}
    end = 0
    with open(file, "rb") as source:
        # mapped: the process itself holds nothing of a file of tens of GB
        text = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
    # each entry begins where the one before has ended: none is passed over
    while match := ENTRY.match(text, end):
        start, stop = match.span(2)
        places[json.loads(match[1])] = start, stop - start
        end = match.end()
    if not CLOSING.fullmatch(text, end):
        raise InputError(f'{file} is no JSON object of "id": "base64", or breaks off, behind byte '
                         f"{end}: was it downloaded whole?")
    return places


# ---- from data sets to epochs --------------------------------------------------------------------

MISSING = 0.01  # the share of conversations that may lack a picture
NO_PICTURE = ": no such picture"


class Packed:
    """A list kept in one block of bytes, pickled item by item: the workers that read pictures share
    it after a fork. Of a million conversations in an ordinary list, whose reference counts change
    when they are read, a process and two workers held 1.8 GB after an epoch instead of 0.6 GB."""

    def __init__(self, items):
        parts = [pickle.dumps(item) for item in items]
        self.block = b"".join(parts)
        self.ends = np.cumsum([0, *map(len, parts)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        # beyond the last, numpy's IndexError ends a `for` over the list
        return pickle.loads(self.block[self.ends[index]:self.ends[index + 1]])


@dataclass
class DataSet:
    """A data set as it is used."""
    name: str
    records: Packed
    converse: object  # (record, rng) -> conversation
    factor: int       # of concatenation
    left_out: list    # "id: why", "picture: no such picture"


def read_datasets(args):
    """What --datasets, --samples and --concatenate ask for -> list of DataSet, or InputError"""
    names = args.datasets
    factors = args.concatenate or [CONCATENATE.get(name, 1) for name in names]
    for flag, values in (("--concatenate", factors), ("--samples", args.samples)):
        if len(values) not in (1, len(names)):
            raise InputError(f"{flag} has {len(values)} values for {len(names)} data sets; give "
                             "one, or one for each")
    rows = zip(names, cycle(factors), cycle(args.samples))
    return [read_dataset(name, factor, amount, args) for name, factor, amount in rows]


def read_dataset(name, factor, amount, args):
    """One of them, without the conversations about a missing picture"""
    make, converse = DATASETS.get(name, (own, as_written))
    left_out = []
    file = Path(name)
    if name == "llava_otter_blend":
        found = llava_otter_blend(args, left_out)
    elif name in DATASETS:
        found = published(name, make, args, left_out)
    elif file.suffix == ".json":
        found = each(read_json(file, list), file, partial(own, file.parent), left_out)
    else:
        raise InputError(f"data set {name!r} is not known; the known ones are "
                         f"{', '.join(DATASETS)}, and your own as path/to/conversations.json")
    found = list(found)
    if amount != "all" and amount < len(found):
        found = random.Random(f"samples {args.seed} {name}").sample(found, amount)
    kept = []
    for record in found:
        # base64 in a picture file is there
        missing = [image for image in pictures_of(converse(record, random.Random(0)))
                   if isinstance(image, str) and not os.path.exists(image)]
        if missing:
            left_out.append(missing[0] + NO_PICTURE)
        else:
            kept.append(record)
    return DataSet(name, Packed(kept), converse, factor, left_out)


def hold_out(count, fraction, seed):
    """Split the numbers below count -> (training, held out): a share of them drawn by seed, each
    part in order"""
    rng = random.Random(f"hold out {seed}")
    chosen = set(rng.sample(range(count), round(fraction * count)))
    return [i for i in range(count) if i not in chosen], sorted(chosen)


def read_data(args):
    """What is trained on and what is measured on -> an Epoch for each epoch of the training, an
    Epoch for each data set of which a part is held out. InputError if hardly anything is left."""
    if args.eval_datasets and not args.eval_path:
        raise InputError("--eval_datasets are read from --eval_path: name that folder too")
    sets = read_datasets(args)
    measured = []
    training = None
    if args.eval_path:
        measured = read_datasets(elsewhere(args))
        held = [range(len(data.records)) for data in measured]
    else:
        training, held = zip(*[hold_out(len(data.records), args.eval_fraction,
                                        f"{args.seed} {data.name}") for data in sets])
    check_left_out(sets + measured)
    epochs = [Epoch(sets, training, args.seed, epoch) for epoch in range(args.epochs)]
    if not epochs[0]:
        raise InputError(f"{', '.join(args.datasets)}: no conversation is left to train on")
    held_out = [Epoch([data], [part], args.seed, "held out")
                for data, part in zip(measured or sets, held) if part]
    return epochs, held_out


def elsewhere(args):
    """The flags with which the data sets in --eval_path are read"""
    names = args.eval_datasets or args.datasets
    # one's own are files there too
    names = [name if name in DATASETS else str(args.eval_path / Path(name).name) for name in names]
    return argparse.Namespace(
        data_path=args.eval_path, out=args.out, datasets=names, samples=["all"], seed=args.seed,
        # it is about --datasets: others take the original's factors
        concatenate=None if args.eval_datasets else args.concatenate)


def check_left_out(sets):
    """Say which records are left out; InputError if many lack a picture: then a folder is not what
    it should be"""
    left_out = [text for data in sets for text in data.left_out]
    count = len(left_out) + sum(len(data.records) for data in sets)
    if left_out and is_main():
        print(printable(f"{len(left_out)} of {count} records are left out: "
                        f"{'; '.join(left_out[:3])}"))
    missing = [record for record in left_out if record.endswith(NO_PICTURE)]
    if len(missing) > MISSING * count:
        raise InputError(f"{len(missing)} of {count} conversations lack a picture, more than "
                         f"{MISSING:.0%}: {', '.join(missing[:5])}")


# ---- the command line ----------------------------------------------------------------------------

def arguments(description):
    """The flags that say what the model sees -> (parser, a function that adds one more); train.py
    adds its own"""
    parser = argparse.ArgumentParser(description=description)

    def add(flag, default=None, help="", **options):
        said = help if default is None else f"{help} (default: %(default)s)"
        parser.add_argument(flag, default=default, help=said, **options)

    add("--language_model", None, "LLaMA-2 in Hugging Face layout", type=checkpoint_path)
    add("--vision_model", None, "CLIP's vision model, or Qwen-VL's alone or in its whole "
        "checkpoint, in Hugging Face layout", type=checkpoint_path)
    add("--checkpoint", None, "in the place of both: a folder that train.py wrote; its projection, "
        "attention and features go on", type=checkpoint_path)
    add("--projection", "linear", "from features to word vectors",
        choices=["linear", "vit", "perceiver"])
    parser.add_argument("--no_class_token", dest="class_token", action="store_false",
                        help="CLIP's patches alone")
    add("--data_path", Path("data"), "the folder that holds the data sets", type=Path)
    add("--datasets", ["llava", "llava_dial"], f"of {', '.join(DATASETS)}, or "
        "path/to/your_own.json", nargs="+")
    add("--samples", ["all"], "so many conversations of each set; one value serves all", nargs="+",
        type=lambda text: text if text == "all" else positive(text))
    add("--concatenate", None, "join 1 to N conversations; one value serves all (default: as in "
        f"the original, {CONCATENATE}, 1 for others)", nargs="+", type=positive)
    add("--max_length", 4096, "tokens of a sample; rounds beyond are left out whole",
        type=positive)
    add("--max_images", MAX_IMAGES, "pictures of a sample, in the same way", type=positive)
    add("--seed", 1234, "of every random choice", type=int)
    add("--out", Path("out"), "where the results go", type=Path)
    return parser, add


def parse(parser):
    """The flags that were typed, and with --checkpoint what it says of its model, as if that had
    been typed. What contradicts it or cannot be read is a sentence and exit code 2."""
    try:
        args = parser.parse_args()
        if args.checkpoint:
            model = read_checkpoint(args.checkpoint)
            parser.set_defaults(**model)
            # once more: what is now not as in the model was typed
            args = parser.parse_args()
            for name in model:
                if getattr(args, name) != model[name]:
                    parser.error(f"the {name} of --checkpoint {args.checkpoint} is {model[name]}, "
                                 f"and a flag says {getattr(args, name)}: leave that flag out")
    except ValueError as error:  # such as a quote in @FILE that does not end
        parser.error(f"{error}")
    if None in (args.language_model, args.vision_model):
        parser.error("--language_model and --vision_model are needed, or --checkpoint")
    return args


def limit_length(args):
    """--max_length is at most the number of positions of the language model: beyond, it has learned
    nothing"""
    positions = read_config(args.language_model / "config.json").get(
        "max_position_embeddings", 2048)
    if positions < args.max_length:
        if is_main():
            print(f"--max_length {args.max_length} is more than the language model's positions: "
                  f"{positions} is taken")
        args.max_length = positions


def check_fit(samples, tokenizer, image_tokens, args):
    """InputError if no sample has a round that fits into --max_length and --max_images"""
    for conversation in samples:
        example = encode(conversation, tokenizer, image_tokens, None, args.max_length,
                         args.max_images)
        if example.left_out < len(conversation):
            return
    raise InputError(f"nothing is left to train on: of {len(samples)} samples none has a round "
                     f"that fits into --max_length {args.max_length} and --max_images "
                     f"{args.max_images}")


def show(args):
    """Print samples of the first epoch and the names of their pictures; count all samples"""
    limit_length(args)
    sets = read_datasets(args)
    tokenizer = Tokenizer(args.language_model / "tokenizer.model")
    config = read_vit_config(args.vision_model, class_token=args.class_token)
    mixed = Epoch(sets, None, args.seed, 0)
    samples = Samples(mixed, tokenizer, count_image_tokens(args.projection, config), None,
                      args.max_length, args.max_images)
    for number, conversation in zip(range(args.show), mixed):
        example = samples.encode(conversation)
        print(f"---- sample {number + 1}: {len(example.input_ids)} tokens, "
              f"{int((example.labels != -100).sum())} trained")
        print(render(example, tokenizer, sys.stdout.isatty()))
        print(printable(f"---- pictures: {example.images}\n"))
    print(f"{'':22}conversations   samples  tokens of a sample: median, most")
    for data in sets:
        every = Epoch([data], None, args.seed, 0)
        lengths = [len(samples.encode(conversation).input_ids) for conversation in every]
        print(f"{data.name:22}{len(data.records):13,}{len(every):10,}"
              f"{np.median(lengths or [0]):10,.0f}{max(lengths, default=0):8,}")
        if data.left_out:
            print(printable(f"    {len(data.left_out):,} left out: {'; '.join(data.left_out[:3])}"))


def main():
    """python data.py --show 3 --datasets ...: what the model sees"""
    parser, add = arguments("Show what the model sees: samples, their pictures, counts.")
    add("--show", 3, "so many samples", type=positive)
    # a terminal that lacks a character
    sys.stdout.reconfigure(errors="replace")
    try:
        show(parse(parser))
    except (InputError, OSError) as error:
        parser.exit(2, printable(f"data.py: {error}\n"))


if __name__ == "__main__":
    main()
