"""Conversations: template, tokens, data sets, blending, batches.

This file explains how a conversation about pictures becomes numbers: the template (the DeepSpeed-VisualChat post,
section 6), tokens, labels and modality side by side (`encode`), the published data sets, each read by one function
(`DATASETS`), how multi-picture, multi-round samples are made of them (sections 4.1 and 4.2: `concatenate`,
`blend_llava_otter`), and batches (`collate`). `python data.py --show 3 ...` prints what the model sees. Not here: how a
picture is opened (vision.py), what the model does with the batch (model.py).

Shapes: B batch, T tokens, N images in the batch, P tokens of an image, S pixels a side.
"""
import argparse
import io
import json
import os
import pickle
import random
import re
import statistics
import sys
from array import array
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain, cycle, groupby
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from mmca import IMAGE, PAD, TEXT
from vision import (InputError, checkpoint_path, count_image_tokens, load_image, positive, preprocess, read_config,
                    read_json, read_vit_config)

SYSTEM = "You are a powerful vision-language assistant."
NO_PICTURE = ": no such picture"
MISSING = 0.01  # the share of conversations that may lack a picture: beyond, a folder is not what it should be


@dataclass
class Turn:
    """One round; a conversation is a list of them. A picture is a path, or (file, offset, length) in a JSON file."""
    question: str
    answer: str | None                          # None: still to come
    images: list = field(default_factory=list)  # shown before the question


# ---- tokens --------------------------------------------------------------------------------------------------------

class Tokenizer:
    """LLaMA-2's tokenizer: SentencePiece with `<s>` and `</s>`, which no text can write."""

    def __init__(self, file):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{file} is no SentencePiece model; LLaMA-2's tokenizer.model belongs there, "
                             "beside the weights") from error
        self.file, self.bos, self.eos = file, self.model.bos_id(), self.model.eos_id()
        if min(self.bos, self.eos) < 0:
            raise InputError(f"{file} has no <s> or no </s>, which mark the start and the end of answers")

    def __len__(self):
        return self.model.vocab_size()

    def encode(self, text):
        """text -> list of ids; `<s>`, `</s>` and `<image>` in it are ordinary characters"""
        return self.model.encode(whole(text))

    def decode(self, ids):
        """list of ids -> text"""
        return self.model.decode(ids)


def whole(text):
    """Text without halves of characters, which JSON can hold and a terminal can send"""
    return text.encode("utf-8", "replace").decode()


def quote(text):
    """Text can never become markup: a line of it that begins like a heading of the template is indented by a blank."""
    return re.sub("^###", " ###", text, flags=re.MULTILINE)


_fixed = cache(Tokenizer.encode)  # for the pieces of the template, which come again and again


@dataclass
class Example:
    """One encoded conversation."""
    input_ids: torch.Tensor                     # (T)
    labels: torch.Tensor                        # (T)
    modality: torch.Tensor                      # (T)
    images: list                                # its pictures in order
    left_out: int = 0                           # the rounds at its end that did not fit
    pixels: list = field(default_factory=list)  # (3, S, S) of each picture, once they are read
    broken: bool = False                        # whether it stands in for one with a picture that cannot be read


def encode(conversation, tokenizer, image_tokens, shown=None, max_length=None, max_images=None):
    """A list of Turn -> Example. The template, one piece after the other (the post, section 6):

        <s> system | "### Image 1:" | P image positions | "### Question:" | question | "### Answer:" | answer </s>

    Every piece is tokenized by itself, so that nothing written in a question can become markup. labels[t] is
    input_ids[t] in answers and their `</s>`, -100 elsewhere; input_ids is 0 at images. A last answer of None leaves the
    round open. shown: None begins a conversation, a number continues one in which so many pictures have been shown.
    Rounds from the first that would pass max_length tokens or max_images pictures on are left out whole and counted."""
    ids, labels, modality, images, number, left_out = [], [], [], [], shown or 0, len(conversation)

    def add(piece, kind=TEXT, trained=False):
        ids.extend(piece)
        labels.extend(piece if trained else [-100] * len(piece))
        modality.extend([kind] * len(piece))

    if shown is None:
        add([tokenizer.bos] + _fixed(tokenizer, SYSTEM))
    for turn in conversation:
        start, lines = len(ids), "\n\n"
        for number, _ in enumerate(turn.images, number + 1):
            add(_fixed(tokenizer, f"{lines}### Image {number}:"))
            add([0] * image_tokens, IMAGE)
            lines = "\n"
        add(_fixed(tokenizer, f"{lines}### Question:"))
        add(tokenizer.encode(quote(turn.question)))
        add(_fixed(tokenizer, "\n### Answer:"))
        if turn.answer is not None:
            add(tokenizer.encode(quote(turn.answer)) + [tokenizer.eos], trained=True)
        if max_length and len(ids) > max_length or max_images and len(images) + len(turn.images) > max_images:
            del ids[start:], labels[start:], modality[start:]
            break
        images += turn.images
        left_out -= 1
    tensors = (torch.from_numpy(np.array(part, np.int64)) for part in (ids, labels, modality))  # (T), (T), (T)
    return Example(*tensors, images, left_out)  # torch.tensor would take longer than all the rest


# ---- data sets -----------------------------------------------------------------------------------------------------
# A reader takes the data folder (and --out, for an index that the data folder does not take) and yields, for each
# conversation, a draft: a function of a random.Random that returns the list of Turn, so that what may be chosen (a
# wording, a caption, an order) is chosen anew each epoch. A record that it leaves out is a text instead, "id: why".

MAX_IMAGES = 8  # of one conversation, as in the original; also the default of --max_images
COCO, LLAVA = "cocodataset.org (train2017.zip)", "liuhaotian/LLaVA-Instruct-150K on Hugging Face"
MIMICIT, SPARKLES = "pufanyi/MIMICIT on Hugging Face", "HYPJUDY/Sparkles on Hugging Face"
MINIGPT4, OCRVQA = "Vision-CAIR/MiniGPT-4 on GitHub (cc_sbu_align.zip)", "ocr-vqa.github.io"
DESCRIBE = ["Please describe this image.", "What does this image show?", "Write a caption for this image.",
            "Give this image a fitting title.", "Tell me what you see here.", "Summarize the content of the image.",
            "What is going on in this picture?", "How would you describe this picture to somebody who cannot see it?"]
REASON = ["Why?", "Please say why.", "What is the reason?", "How do you know?", "Explain your answer.",
          "Give reasons for your answer."]


def _one_of(conversations, rng):
    return rng.choice(conversations)


def _shown_first(pictures, turns):
    """The turns, with all of the pictures in the first and none in the others"""
    return [replace(turn, images=[] if n else pictures) for n, turn in enumerate(turns)]


def _shuffled(rounds, pictures, rng):
    return _shown_first(pictures, rng.sample(rounds, len(rounds)))


def _wrong(value, shape):
    """How a JSON value differs from a shape, None if it does not. A shape is a type, a tuple of types, [shape] for a
    list, or a dict for an object with these fields; "name?" may be missing, ... stands for all of its fields."""
    kind, parts = shape if isinstance(shape, (type, tuple)) else type(shape), []
    if not isinstance(value, kind):
        return f": {str(value)[:40]!r} is no {getattr(kind, '__name__', 'str or int')}"
    if isinstance(shape, list):
        parts = ((i, item, shape[0]) for i, item in enumerate(value))
    elif isinstance(shape, dict):
        if missing := [name for name in shape if name is not ... and name[-1] != "?" and name not in value]:
            return f" has no {missing[0]!r}"
        rest = shape.get(..., object)
        parts = ((name, item, shape.get(name, shape.get(f"{name}?", rest))) for name, item in value.items())
    return next((f"[{name!r}]{wrong}" for name, item, inner in parts if (wrong := _wrong(item, inner))), None)


def _read(file, source, shape):
    """The content of a data set's JSON file; InputError with the index of a record that is not of the shape"""
    if source and not file.exists():
        raise InputError(f"{file} is missing: {source} has it")
    content = read_json(file, type(shape))
    if wrong := _wrong(content, shape):
        raise InputError(f"{file}{wrong}")
    return content


def _pictures(folder, source):
    """The path of a folder of pictures; InputError that says where to get it"""
    if not folder.is_dir():
        raise InputError(f"the folder of pictures {folder} is missing: {source} has them")
    return str(folder)


@cache
def _listing(folder):
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def _clean(text, marker="<image>"):
    """A question without picture markers, its white space single blanks"""
    return " ".join(text.replace(marker, "").split())


def _llava(folder, *names):
    """LLaVA's files -> for each of their records its picture, if it has one, and its rounds, or "id: why" if it is left
    out. The picture stands at the text's markers, without one before the first question."""
    pictures = _pictures(folder / "coco/train2017", COCO)
    shape = [{"image?": str, "conversations": [{"from": str, "value": str}]}]
    for name in names:
        for index, record in enumerate(_read(folder / "llava" / name, LLAVA, shape)):
            said, picture = record["conversations"], "image" in record and f"{pictures}/{record['image']}"
            rounds = [Turn(_clean(q["value"]), a["value"], [picture] if "<image>" in q["value"] else [])
                      for q, a in zip(said[::2], said[1::2])]
            shown = any(turn.images for turn in rounds)
            if not rounds or any(message["from"] != ("human", "gpt")[n % 2] for n, message in enumerate(said)):
                yield picture, f"{name}[{index}]: human and gpt do not take turns"
            elif shown and not picture:
                yield picture, f"{name}[{index}]: a marker and no picture"
            else:
                yield picture, rounds if shown or not picture else _shown_first([picture], rounds)


def llava(folder, out):
    """LLaVA's detailed descriptions and complex reasoning: one picture, one round."""
    for _, rounds in _llava(folder, "detail_23k.json", "complex_reasoning_77k.json"):
        yield rounds if isinstance(rounds, str) else partial(_one_of, [rounds[:1]])


def llava_dial(folder, out):
    """LLaVA's conversations: one picture, several rounds."""
    for _, rounds in _llava(folder, "conversation_58k.json"):
        yield rounds if isinstance(rounds, str) else partial(_one_of, [rounds])


def minigpt4(folder, out):
    """MiniGPT-4's second stage: one picture and its description, asked for in changing words."""
    pictures = _pictures(folder / "cc_sbu_align/image", MINIGPT4)
    shape = {"annotations": [{"image_id": str, "caption": str}]}
    for record in _read(folder / "cc_sbu_align/filter_cap.json", MINIGPT4, shape)["annotations"]:
        picture = f"{pictures}/{record['image_id']}.jpg"
        yield partial(_one_of, [[Turn(request, record["caption"], [picture])] for request in DESCRIBE])


def coco_caption(folder, out):
    """COCO's captions, five or so a picture, of which one is drawn."""
    pictures = _pictures(folder / "coco/2014", "cocodataset.org (train2014.zip, val2014.zip)")
    shape = {"images": [{"filename": str, "sentences": [{"raw": str}]}]}
    source = "cs.stanford.edu/people/karpathy/deepimagesent (caption_datasets.zip: dataset_coco.json)"
    for record in _read(folder / "coco_caption/dataset.json", source, shape)["images"]:
        captions, name = [sentence["raw"] for sentence in record["sentences"]], record["filename"]
        choices = [[Turn(request, c, [f"{pictures}/{name}"])] for request in DESCRIBE for c in captions]
        yield partial(_one_of, choices) if choices else f"{name}: no caption"


def aokvqa(folder, out):
    """A-OKVQA: a question that takes knowledge, a request for the reason, the right choice and all reasons."""
    pictures, source = _pictures(folder / "coco/train2017", COCO), "allenai/aokvqa on GitHub (aokvqa_v1p0.tar.gz)"
    file = folder / "aokvqa/annotations/aokvqa_v1p0_train.json"
    shape = [{"image_id": int, "question": str, "choices": [str], "correct_choice_idx": int, "rationales": [str]}]
    for index, record in enumerate(_read(file, source, shape)):
        choices, right = record["choices"], record["correct_choice_idx"]
        if not 0 <= right < len(choices):
            raise InputError(f"{file}[{index}]: correct_choice_idx is none of the choices")
        answer = f"The answer is {choices[right]}. Because {' '.join(record['rationales'])}"
        picture = f"{pictures}/{record['image_id']:012}.jpg"
        yield partial(_one_of, [[Turn(f"{record['question']} {why}", answer, [picture])] for why in REASON])


def ocr_vqa(folder, out):
    """OCR-VQA: the cover of a book, one of the questions about it. Placeholders one pixel wide or high are left out."""
    pictures = _pictures(folder / "OCR_VQA/images", OCRVQA)
    shape = {...: {"imageURL": str, "questions": [str], "answers": [str]}}
    for key, record in _read(folder / "OCR_VQA/dataset.json", OCRVQA, shape).items():
        name = key + os.path.splitext(record["imageURL"])[1]
        size, picture = (0, 0), f"{pictures}/{name}"
        if name in _listing(pictures) and os.path.getsize(picture) < 10_000:  # a larger file is no placeholder
            with suppress(InputError):  # a broken one is replaced when its turn comes
                size = load_image(picture).size
        rounds = [[Turn(q, a, [picture])] for q, a in zip(record["questions"], record["answers"])]
        wrong = {"no question": not rounds, f"picture of {size[0]} x {size[1]} pixels": min(size) == 1}
        why = next((reason for reason, holds in wrong.items() if holds), None)
        yield f"{key}: {why}" if why else partial(_one_of, rounds)


def _groups(folder, name, choose, draw):
    """One of MIMIC-IT's instruction files -> for each group of related instructions a draft, or "id: why".

    An instruction that is still unused leads a group; those that it names and that are still unused join it. choose:
    the leader's image_ids -> what draw takes between the rounds and rng, the pictures first, or a text that says why
    the leader is left out; then its relatives stay unused."""
    shape = {"data": {...: {"instruction": str, "answer": str, "image_ids": [str], "rel_ins_ids": [str]}}}
    data, used = _read(folder / f"MIMIC-IT/{name}_instructions.json", MIMICIT, shape)["data"], set()
    for leader, record in data.items():
        if leader in used:
            continue
        used.add(leader)
        chosen = choose(record["image_ids"])
        if isinstance(chosen, str):
            yield f"{leader}: {chosen}"
            continue
        members = [m for m in dict.fromkeys(record["rel_ins_ids"]) if m in data and m not in used]
        used.update(members)
        rounds = [Turn(_clean(data[m]["instruction"]), data[m]["answer"]) for m in [leader, *members]]
        yield partial(draw, rounds, *chosen)


def otter_mimicit_cgd(folder, out):
    """MIMIC-IT's CGD: pairs of COCO's pictures, rounds about them in any order."""
    coco = _pictures(folder / "coco/train2017", COCO)

    def choose(ids):
        return [[f"{coco}/{i.removeprefix('CGD_IMG_')}.jpg" for i in ids]]
    yield from _groups(folder, "CGD", choose, _shuffled)


def _mimicit(name, folder, out):
    """MIMIC-IT's other sets, whose pictures lie inside a JSON file: those of SD (two photographs of a scene), SN
    (rooms), TVC (films) and VST (stories); rounds about them in any order."""
    file = folder / f"MIMIC-IT/{name}.json"
    index = _picture_index(file, out)

    def choose(ids):
        found = [(str(file), *index[i]) for i in ids if i in index]
        if not found:
            return "none of its pictures is in the picture file"
        return f"{len(found)} pictures" if name != "SD" and len(found) > MAX_IMAGES else [found]
    yield from _groups(folder, name, choose, _shuffled)


def _picture_index(file, out):
    """Where the pictures of a JSON object {id: base64} lie: id -> [offset, length]. The file is read through once, in
    blocks; the result is kept beside it, or in `out` where its folder cannot be written."""
    if not file.exists():
        raise InputError(f"{file} is missing: {MIMICIT} has it")
    version = [file.stat().st_size, file.stat().st_mtime_ns]
    places = [file.with_name(f"{file.name}.index"), out / f"{file.name}.index"]
    for kept in map(read_json, filter(Path.exists, places)):
        if kept.get("version") == version:
            return kept["pictures"]
    quotes, pictures, end = array("Q"), {}, 0  # the positions of all quotation marks: base64 holds none, nor do ids
    with open(file, "rb") as source, tqdm(desc=f"index of {file}", total=version[0], unit="B", unit_scale=True,
                                          delay=1) as bar:
        while block := source.read(1 << 24):
            quotes.extend(np.flatnonzero(np.frombuffer(block, np.uint8) == ord('"')) + source.tell() - len(block))
            bar.update(len(block))
        for start, stop in zip(quotes[2::4], quotes[3::4]):
            source.seek(end)
            before = re.fullmatch(rb'\s*[{,]\s*("[^"]*")\s*:\s*"', source.read(min(start + 1 - end, 9999)))
            if not before:
                raise InputError(f'{file} is no JSON object of "id": "base64": broken at byte {end}')
            pictures[json.loads(before[1])] = [start + 1, stop - start - 1]
            end = stop + 1
        source.seek(end)
        rest = source.read(9999).split()
        if len(quotes) % 4 or rest not in ([b"}"], [b"{}"], [b"{", b"}"]) or source.read(1):
            raise InputError(f"{file} breaks off or goes wrong behind byte {end}: was it downloaded whole?")
    for place in places:
        unfinished = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps({"version": version, "pictures": pictures}))
            unfinished.replace(place)
            return pictures
        except OSError as error:
            failed = error
            with suppress(OSError):
                unfinished.unlink()
    raise InputError(f"the index of {file} cannot be written, beside it or in {out}: {failed}") from failed


STYLES = [[f"image {c}" for c in "abcdefgh"], [f"image {c}" for c in "ABCDEFGH"],
          [f"the {n} image" for n in "first second third fourth fifth sixth seventh eighth".split()]]


def _sparkles(rounds, rng):
    """rounds: (user's text, assistant's text, ids, pictures). A picture is called by its name in one of the styles."""
    unused, names, conversation = iter(rng.choice(STYLES)), {}, []
    for user, assistant, ids, pictures in rounds:
        for i in ids:
            names.setdefault(i, next(unused))
        known, texts = "|".join(map(re.escape, names)), []
        for text in (_clean(user, "<Img><ImageHere></Img>"), assistant):
            text = re.sub(rf"IMAGE#({known})(?!\w)", lambda m: names.get(m[1], m[0]), text, flags=re.ASCII)
            texts.append(re.sub(r"(^|[.?!][ \n])(\w)", lambda m: m[1] + m[2].upper(), text))
        conversation.append(Turn(*texts, pictures))
    return conversation


def sparkles_dialogue(folder, out):
    """SparklesDialogue: several pictures over several rounds, named in the text as "image a", "the first image", ..."""
    shape = [{"dialogue": [{"role": str, "content": str, "images?": [{"image_id": (str, int)}]}]}]
    for source in ("SparklesDialogueCC", "SparklesDialogueVG"):
        pictures = _pictures(folder / source / "images", SPARKLES)
        for index, record in enumerate(_read(folder / source / f"annotations/{source}.json", SPARKLES, shape)):
            said = record["dialogue"]
            texts, roles = [message["content"] for message in said], [message["role"] for message in said]
            ids = [[str(image["image_id"]) for image in message.get("images", [])] for message in said]
            paths = [[f"{pictures}/{i}.jpg" for i in part] for part in ids]
            shown = [os.path.basename(path) for path in chain(*paths)]
            wrong = {"odd number of messages": len(said) % 2,
                     "roles do not alternate, user first": roles != ["user", "assistant"] * (len(said) // 2),
                     "a picture file is missing": not _listing(pictures).issuperset(shown),
                     f"{len(shown)} pictures": len(shown) > MAX_IMAGES}
            why = next((reason for reason, holds in wrong.items() if holds), None)
            rounds = list(zip(texts[::2], texts[1::2], ids[::2], paths[::2]))
            yield f"{source}[{index}]: {why}" if why else partial(_sparkles, rounds)


def llava_otter_blend(folder, out):
    """CGD's pairs, each after what LLaVA says about its pictures; a pair needs it for all pictures but the last."""
    about, coco = defaultdict(list), _pictures(folder / "coco/train2017", COCO)
    for picture, rounds in _llava(folder, "detail_23k.json", "complex_reasoning_77k.json", "conversation_58k.json"):
        if isinstance(rounds, str):
            yield rounds
        elif picture:
            about[picture].append(rounds)

    def choose(ids):
        pictures = [f"{coco}/{i.removeprefix('CGD_IMG_')}.jpg" for i in ids]
        said = [about.get(picture, []) for picture in pictures]
        return (pictures, said) if all(said[:-1]) else "a picture before the last one has no LLaVA conversation"
    yield from _groups(folder, "CGD", choose, blend_llava_otter)


def own(file, folder, out):
    """Your own conversations: a JSON list of lists of {"images": [...], "question": "...", "answer": "..."}, one object
    for each round; paths of pictures are relative to the file."""
    file, known = Path(file), {"images", "question", "answer"}
    for index, rounds in enumerate(_read(file, None, [[{"question": str, "answer": str, "images?": [str]}]])):
        if unknown := set().union(*rounds) - known:
            raise InputError(f"{file}[{index}]: field {min(unknown)!r} is not known, only {', '.join(sorted(known))}")
        yield partial(_one_of, [[Turn(r["question"], r["answer"], [str(file.parent / i) for i in r.get("images", [])])
                                 for r in rounds]]) if rounds else f"{file.name}[{index}]: no round"


DATASETS = {
    "llava": llava, "llava_dial": llava_dial, "otter_mimicit_cgd": otter_mimicit_cgd,
    **{f"otter_mimicit_{name.lower()}": partial(_mimicit, name) for name in ("SD", "SN", "TVC", "VST")},
    "llava_otter_blend": llava_otter_blend, "sparkles_dialogue": sparkles_dialogue,  # the nine of the post
    "minigpt4": minigpt4, "coco_caption": coco_caption, "ocr_vqa": ocr_vqa, "aokvqa": aokvqa}
CONCATENATE = {"llava": 3, "llava_dial": 2}  # the factors of the original's script


# ---- from data sets to samples -------------------------------------------------------------------------------------

def concatenate(conversations, factor, rng):
    """Simple concatenation (the post, 4.1): shuffle, and join groups of 1 to `factor`, their sizes drawn uniformly by
    rng, a random.Random. Every conversation is used once. Returns conversations; `encode` numbers their pictures."""
    order, groups, start = rng.sample(conversations, len(conversations)), [], 0
    while start < len(order):
        stop = start + rng.randint(1, factor)
        groups.append(list(chain(*order[start:stop])))
        start = stop
    return groups


def blend_llava_otter(rounds, pictures, about, rng):
    """LLaVA-Otter blending (the post, 4.2): some conversations about each picture by itself, then rounds about all.

    rounds: those about all pictures, without pictures; about: for each picture a list of conversations. At least one
    conversation of each list, of the last also none, and at least one round are drawn by rng, a random.Random. Each
    picture is shown once, in order: with its first conversation, or with the first round. Returns a conversation."""
    blended, unseen = [], list(pictures)
    for n, (picture, conversations) in enumerate(zip(pictures, about), 1):
        chosen = rng.sample(conversations, rng.randint(n < len(pictures), len(conversations)))
        if chosen:
            blended += _shown_first([picture], chain(*chosen))
            unseen.remove(picture)
    return blended + _shown_first(unseen, rng.sample(rounds, rng.randint(1, len(rounds))))


class Packed:
    """A list kept in one block of bytes, pickled item by item: the workers that read pictures share it after a fork,
    where the reference counts of ordinary objects would copy page after page."""

    def __init__(self, items):
        self.ends, parts = array("Q", [0]), io.BytesIO()
        for item in items:
            pickle.dump(item, parts)
            self.ends.append(parts.tell())
        self.block = parts.getvalue()

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        return pickle.loads(memoryview(self.block)[self.ends[index]:self.ends[index + 1]])


@dataclass
class DataSet:
    """A data set as it is used."""
    name: str
    drafts: Packed
    factor: int     # of concatenation
    left_out: list  # "id: why"


def read_datasets(args):
    """What --datasets, --samples and --concatenate ask for -> list of DataSet, or InputError. Conversations about a
    missing picture are left out; that is found by listing folders, no picture is opened."""
    names = args.datasets
    if unknown := [name for name in names if name not in DATASETS and not name.endswith(".json")]:
        raise InputError(f"data set {unknown[0]!r} is not known; the known ones are {', '.join(DATASETS)}, "
                         "and your own as path/to/conversations.json")
    factors, amounts, sets = args.concatenate or [CONCATENATE.get(name, 1) for name in names], args.samples, []
    for flag, values in (("--concatenate", factors), ("--samples", amounts)):
        if len(values) not in (1, len(names)):
            raise InputError(f"{flag} has {len(values)} values for {len(names)} data sets; give one, or one for each")
    for name, factor, amount in zip(names, cycle(factors), cycle(amounts)):
        found = list(DATASETS.get(name, partial(own, name))(args.data_path, args.out))
        left_out = [text for text in found if isinstance(text, str)]
        drafts = [draft for draft in found if not isinstance(draft, str)]
        if amount != "all" and amount < len(drafts):
            drafts = random.Random(f"samples {args.seed} {name}").sample(drafts, amount)
        whole = []
        for draft in drafts:
            pictures = [picture for turn in draft(random.Random(0)) for picture in turn.images]
            missing = [picture for picture in pictures if isinstance(picture, str)
                       and os.path.basename(picture) not in _listing(os.path.dirname(picture))]
            if missing:
                left_out.append(missing[0] + NO_PICTURE)
            else:
                whole.append(draft)
        sets.append(DataSet(name, Packed(whole), factor, left_out))
    _listing.cache_clear()
    return sets


def hold_out(count, fraction, seed):
    """Split the numbers below count -> (training, held out): a share of them drawn by seed, each part in order."""
    chosen = set(random.Random(f"hold out {seed}").sample(range(count), round(fraction * count)))
    return [i for i in range(count) if i not in chosen], sorted(chosen)


class Epoch:
    """All samples of one epoch, a sequence of conversations: grouped, shuffled and drawn by (seed, epoch) and the index
    of each conversation in its set, by nothing else. parts: for each set, the indices that are used."""

    def __init__(self, sets, parts, seed, epoch):
        self.sets, self.seed, self.epoch = sets, seed, epoch
        rng = random.Random(f"epoch {seed} {epoch}")
        groups = [group for n, (data, part) in enumerate(zip(sets, parts))
                  for group in concatenate([[(n, i)] for i in part], data.factor, rng)]
        rng.shuffle(groups)
        self.groups = Packed(groups)

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index):
        return [turn for n, i in self.groups[index] for turn in
                self.sets[n].drafts[i](random.Random(f"{self.seed} {self.epoch} {self.sets[n].name} {i}"))]


def read_data(args):
    """What is trained on and what is measured on -> the Epoch of each epoch; one of each data set of which a part is
    held out. InputError if hardly anything is left."""
    if args.eval_datasets and not args.eval_path:
        raise InputError("--eval_datasets are read from --eval_path: name that folder too")
    sets = held_sets = read_datasets(args)
    if args.eval_path:
        names = args.eval_datasets or args.datasets
        names = [str(args.eval_path / Path(name).name) if name.endswith(".json") else name for name in names]
        # --concatenate is about --datasets: of others that are measured on each conversation is a sample
        factors = None if args.eval_datasets else args.concatenate
        elsewhere = {"data_path": args.eval_path, "datasets": names, "samples": ["all"], "concatenate": factors}
        held_sets = read_datasets(argparse.Namespace(**vars(args) | elsewhere))
        training = [range(len(data.drafts)) for data in sets]
        held = [range(len(data.drafts)) for data in held_sets]
    else:
        split = [hold_out(len(data.drafts), args.eval_fraction, f"{args.seed} {data.name}") for data in sets]
        training, held = zip(*split)

    both = sets if held_sets is sets else [*sets, *held_sets]
    left_out = [record for data in both for record in data.left_out]
    count = len(left_out) + sum(len(data.drafts) for data in both)
    if left_out and not int(os.environ.get("RANK", 0)):
        print(printable(f"{len(left_out)} of {count} records are left out: {'; '.join(left_out[:3])}"))
    missing = [record for record in left_out if record.endswith(NO_PICTURE)]
    if len(missing) > MISSING * count:
        raise InputError(f"{len(missing)} of {count} conversations lack a picture, more than {MISSING:.0%}: "
                         f"{', '.join(missing[:5])}")
    if not any(training):
        raise InputError(f"{', '.join(args.datasets)}: no conversation is left to train on")
    epochs = [Epoch(sets, training, args.seed, epoch) for epoch in range(args.epochs)]
    held_out = [Epoch([data], [part], args.seed, "held out") for data, part in zip(held_sets, held) if part]
    return epochs, held_out


# ---- batches -------------------------------------------------------------------------------------------------------

class Samples(torch.utils.data.Dataset):
    """Conversations -> Example with its pixels, in a DataLoader's workers. For one with a picture that cannot be read,
    which is named on stderr, the next one stands in."""

    def __init__(self, conversations, tokenizer, image_tokens, preprocessing, max_length, max_images):
        self.conversations, self.preprocessing = conversations, preprocessing
        self.encode = partial(encode, tokenizer=tokenizer, image_tokens=image_tokens, max_length=max_length,
                              max_images=max_images)

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        for place in range(index, index + 100):
            example = self.encode(self.conversations[place % len(self)])
            example.broken = place > index
            try:
                example.pixels = [preprocess(load_image(image), self.preprocessing) for image in example.images]
                return example
            except InputError as error:
                print(printable(f"{error}; the next sample stands in for it"), file=sys.stderr, flush=True)
        # so many in a row are not met where few are broken: nothing to learn from, and train.py stops
        return replace(self.encode([]), broken=True)


def collate(examples):
    """Examples with pixels -> one batch, padded at the right: input_ids, labels, modality (B, T), pixels (U, 3, S, S)
    of the distinct pictures, so that one that occurs twice is encoded once, and image_index (N), which stands where."""
    def pad(name, filler):
        rows = [getattr(example, name) for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)         # (B, T)

    pixels = dict(chain.from_iterable(zip(example.images, example.pixels) for example in examples))
    index = {image: i for i, image in enumerate(pixels)}
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "modality": pad("modality", PAD),
            "pixels": torch.stack(list(pixels.values())) if pixels else torch.empty(0),              # (U, 3, S, S)
            "image_index": torch.tensor([index[i] for e in examples for i in e.images], dtype=torch.long)}  # (N)


# ---- the command line ----------------------------------------------------------------------------------------------

def arguments(description):
    """The flags that say what the model sees -> (parser, a function that adds one more); train.py adds its own"""
    parser = argparse.ArgumentParser(description=description)

    def add(flag, default=None, help="", **options):
        said = help if default is None else f"{help} (default: %(default)s)"
        parser.add_argument(flag, default=default, help=said, **options)

    add("--language_model", type=checkpoint_path, required=True, metavar="DIR", help="LLaMA-2 in Hugging Face layout")
    add("--vision_model", type=checkpoint_path, required=True, metavar="DIR", help="CLIP's vision model, or Qwen-VL's alone or "
        "in its whole checkpoint, in Hugging Face layout")
    add("--projection", choices=["linear", "vit", "perceiver"], default="linear", help="from features to word vectors")
    parser.add_argument("--no_class_token", dest="class_token", action="store_false", help="CLIP's patches alone")
    add("--data_path", type=Path, default=Path("data"), metavar="DIR", help="the folder that holds the data sets")
    add("--datasets", nargs="+", default=["llava", "llava_dial"], metavar="NAME", help=f"of {', '.join(DATASETS)}, or "
        "path/to/your_own.json")
    add("--samples", nargs="+", type=lambda text: text if text == "all" else positive(text), default=["all"],
        metavar="N|all", help="conversations of each set; one value serves all")
    add("--concatenate", nargs="+", type=positive, metavar="N", help="join 1 to N conversations; one value serves all "
        f"(default: the original's: {', '.join(f'{k} {v}' for k, v in CONCATENATE.items())}, others 1)")
    add("--max_length", type=positive, default=4096, help="tokens of a sample; rounds beyond are left out whole")
    add("--max_images", type=positive, default=MAX_IMAGES, help="pictures of a sample, in the same way")
    add("--seed", type=int, default=1234, help="of every random choice")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where the results go")
    return parser, add


def limit_length(args):
    """--max_length is at most the number of positions of the language model: beyond, it has learned nothing"""
    file = args.language_model / "config.json"
    positions = read_config(file).get("max_position_embeddings", 2048) if file.exists() else args.max_length
    if isinstance(positions, int) and 0 < positions < args.max_length:
        if not int(os.environ.get("RANK", 0)):
            print(f"--max_length {args.max_length} is more than the language model's positions: {positions} is taken")
        args.max_length = positions


def check_fit(samples, tokenizer, image_tokens, args):
    """InputError if no sample has a round that fits into --max_length and --max_images"""
    for conversation in samples:
        example = encode(conversation, tokenizer, image_tokens, None, args.max_length, args.max_images)
        if example.left_out < len(conversation):
            return
    raise InputError(f"nothing is left to train on: of {len(samples)} samples none has a round that fits into "
                     f"--max_length {args.max_length} and --max_images {args.max_images}")


def printable(text):
    """Text without the control characters that a terminal would obey, and without halves of characters"""
    orders = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069"  # the last ones turn lines around
    return re.sub(f"[{orders}]", "", whole(text))


def render(example, tokenizer, colour=True):
    """What the model sees as text: trained tokens coloured (or in brackets), pictures as <image 2: 256 tokens>"""
    special, text, number = {tokenizer.bos: "<s>", tokenizer.eos: "</s>"}, "", 0
    rows = zip(example.modality.tolist(), (example.labels != -100).tolist(), example.input_ids.tolist())
    for (kind, trained, name), run in groupby(rows, key=lambda row: (*row[:2], special.get(row[2]))):
        ids = [row[2] for row in run]
        number += kind == IMAGE  # the heading of the next picture stands between two of them
        said = f"<image {number}: {len(ids)} tokens>" if kind == IMAGE else name or printable(tokenizer.decode(ids))
        text += said.join(("\x1b[32m", "\x1b[0m") if colour else "[]") if trained else said
    return text


def contact_sheet(samples, side=160):
    """Lists of pictures -> one PIL picture: a row for each sample, its pictures with their numbers"""
    sheet = Image.new("RGB", (side * max(1, *map(len, samples)), (side + 16) * len(samples)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, images in enumerate(samples):
        for column, image in enumerate(images):
            x, y = column * side, row * (side + 16)
            draw.text((x, y), f"sample {row + 1}, image {column + 1}", "black")
            try:
                sheet.paste(ImageOps.contain(load_image(image), (side - 4, side)), (x, y + 14))
            except InputError:
                draw.text((x, y + 14), "cannot be read", "red")
    return sheet


def show(args):
    """Print samples of the first epoch, write the sheet of their pictures; then count all samples, set by set"""
    limit_length(args)
    sets, tokenizer = read_datasets(args), Tokenizer(args.language_model / "tokenizer.model")
    tokens = count_image_tokens(args.projection, read_vit_config(args.vision_model, class_token=args.class_token))
    tokenize = partial(encode, tokenizer=tokenizer, image_tokens=tokens, max_length=args.max_length,
                       max_images=args.max_images)
    mixed = Epoch(sets, [range(len(data.drafts)) for data in sets], args.seed, 0)
    shown = [tokenize(mixed[index]) for index in range(min(args.show, len(mixed)))]
    for number, example in enumerate(shown, 1):
        print(f"---- sample {number}: {len(example.input_ids)} tokens, {int((example.labels != -100).sum())} trained\n"
              + render(example, tokenizer, sys.stdout.isatty()))
    if shown:
        args.out.mkdir(parents=True, exist_ok=True)
        contact_sheet([example.images for example in shown]).save(args.out / "samples.png")
        print(f"---- pictures: {args.out / 'samples.png'}\n")
    print(f"{'':22}conversations   samples    rounds  pictures  tokens of a sample: median, most")
    for data in sets:
        samples = Epoch([data], [range(len(data.drafts))], args.seed, 0)
        total, lengths = Counter(), []
        for conversation in tqdm(samples, desc=data.name, delay=1, leave=False):
            example = tokenize(conversation)
            pictures = sum(len(turn.images) for turn in conversation)
            total.update(rounds=len(conversation), pictures=pictures, left_out=example.left_out)
            lengths.append(len(example.input_ids))
        print(f"{data.name:22}{len(data.drafts):13,}{len(samples):10,}{total['rounds']:10,}{total['pictures']:10,}"
              f"{statistics.median(lengths or [0]):10,.0f}{max(lengths, default=0):8,}")
        reasons = defaultdict(list)
        for text in data.left_out:
            record, _, why = text.rpartition(": ")
            reasons[f"left out, {why}"].append(record)
        for why, which in reasons.items():
            if which:
                print(printable(f"    {len(which):,} {why}: {', '.join(which[:3])}{', ...' if which[3:] else ''}"))
        if total["left_out"]:
            print(f"    {total['left_out']:,} rounds left out by --max_length or --max_images")


def main():
    """python data.py --show 3 --datasets ...: what the model sees"""
    parser, add = arguments("Show what the model sees: samples, their pictures, counts.")
    add("--show", type=positive, default=3, metavar="N", help="so many samples")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character
    try:
        show(parser.parse_args())
    except (InputError, OSError) as error:
        print(printable(f"data.py: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
