"""Conversations: template, tokens, data sets, concatenation, batches.

This file explains how a conversation about pictures becomes numbers: the template (the DeepSpeed-VisualChat post,
section 6), tokens, labels and modality side by side (`encode`), readers of published data sets (`DATASETS`), how
single pictures become multi-picture, multi-round samples (section 4.1, `concatenate`), and batches (`collate`). Not
here: how a picture is opened (vision.py), what the model does with the batch (model.py).

Shapes: B batch, T tokens, N images in the batch, P tokens of an image, S pixels a side.
"""
import io
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
import torch

from mmca import IMAGE, PAD, TEXT
from vision import InputError, load_image, preprocess, read_json

SYSTEM = "You are a powerful vision-language assistant."


@dataclass
class Turn:
    """One round: the pictures shown before the question, the question, its answer (None: still to come).

    A picture is a path, or (file, offset, length) for one inside a JSON file; a conversation is a list of Turn."""
    question: str
    answer: str | None
    images: list = field(default_factory=list)


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
        return self.model.encode(text.encode("utf-8", "replace").decode())  # a terminal can send half a character

    def decode(self, ids):
        """list of ids -> text"""
        return self.model.decode(ids)

    @classmethod
    def train(cls, conversations, size, file):
        """Learn a vocabulary of at most `size` pieces, in LLaMA-2's style, from conversations, and write it to file."""
        text = {heading for n in range(1, 9) for heading in _headings(n)} | {SYSTEM}
        text |= {_quote(t) for turns in conversations for turn in turns for t in (turn.question, turn.answer) if t}
        model = io.BytesIO()

        def learn(size):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sorted(text)), model_writer=model, vocab_size=size, model_type="bpe",
                byte_fallback=True, split_digits=True, normalization_rule_name="identity",
                remove_extra_whitespaces=False, max_sentence_length=100_000, input_sentence_size=500_000, minloglevel=2)
        try:
            learn(size)
        except RuntimeError as error:  # what it says when the text holds too little for the size asked for
            fits = re.search(r"smaller value than (\d+)|<= (\d+)", str(error))
            if not fits:
                reason = str(error).splitlines()[-1]
                raise InputError(f"no tokenizer can be learned from this data: {reason}") from error
            learn(int(fits[1] or fits[2]))
        Path(file).write_bytes(model.getvalue())
        return cls(file)


def _headings(number):
    return f"\n\n### Image {number}:", f"\n### Image {number}:", "\n\n### Question:", "\n### Question:", "\n### Answer:"


def _quote(text):
    """Text can never become markup: a line of it that begins like a heading of the template is indented by a blank."""
    return re.sub("^###", " ###", text, flags=re.MULTILINE)


@dataclass
class Example:
    """One encoded conversation: input_ids, labels, modality (T), the pictures in order and, once they are read, their
    pixels. left_out: the rounds at its end that did not fit."""
    input_ids: torch.Tensor
    labels: torch.Tensor
    modality: torch.Tensor
    images: list
    left_out: int = 0
    pixels: list = field(default_factory=list)


def encode(conversation, tokenizer, image_tokens, shown=None, max_length=None, max_images=None):
    """A list of Turn -> Example. The template, one piece after the other (the post, section 6):

        <s> system | "### Image 1:" | P image positions | "### Question:" | question | "### Answer:" | answer </s>

    Every piece is tokenized by itself and never joined with another as text, so that nothing written in a question can
    become markup. labels[t] is input_ids[t] in answers and their `</s>`, -100 elsewhere; input_ids is 0 at images.
    A last answer of None leaves the round open. shown: None begins a conversation; a number continues one in which so
    many pictures have been shown. Rounds from the first that would pass max_length tokens or max_images pictures on
    are left out whole and counted."""
    ids, labels, modality, images, number = [], [], [], [], shown or 0

    def add(piece, trained=False, kind=TEXT):
        ids.extend(piece)
        labels.extend(piece if trained else [-100] * len(piece))
        modality.extend([kind] * len(piece))

    if shown is None:
        add([tokenizer.bos] + tokenizer.encode(SYSTEM))
    for done, turn in enumerate(conversation):
        start, lines = len(ids), "\n\n"
        for _ in turn.images:
            number += 1
            add(tokenizer.encode(f"{lines}### Image {number}:"))
            add([0] * image_tokens, kind=IMAGE)
            lines = "\n"
        add(tokenizer.encode(f"{lines}### Question:"))
        add(tokenizer.encode(_quote(turn.question)))
        add(tokenizer.encode("\n### Answer:"))
        if turn.answer is not None:
            add(tokenizer.encode(_quote(turn.answer)) + [tokenizer.eos], trained=True)
        if max_length and len(ids) > max_length or max_images and len(images) + len(turn.images) > max_images:
            del ids[start:], labels[start:], modality[start:]
            return Example(*map(torch.tensor, (ids, labels, modality)), images, len(conversation) - done)
        images += turn.images
    return Example(*map(torch.tensor, (ids, labels, modality)), images)


# ---- data sets: each reader takes the data folder and returns conversations ----------------------------------------

COCO = "the COCO pictures (train2017.zip of cocodataset.org)"
LLAVA = "the LLaVA-Instruct-150K files (liuhaotian/LLaVA-Instruct-150K on Hugging Face)"


def _records(file, source):
    """The list in a JSON file of a data set; InputError that says where to get it if it is missing"""
    if not file.exists():
        raise InputError(f"{file} is missing: {source} belong there")
    return read_json(file, list)


def _clean(text):
    """A question without picture markers, its white space single blanks"""
    return " ".join(text.replace("<image>", " ").split())


def _llava_conversations(folder, name):
    """One conversation for each record of folder/llava/NAME: human and gpt in turn, the picture where its marker is."""
    file, pictures = folder / "llava" / name, folder / "coco" / "train2017"
    conversations = []
    for index, record in enumerate(_records(file, LLAVA)):
        try:
            picture, messages = str(pictures / record["image"]), record["conversations"]
            said = [(m["value"], m["from"]) for m in messages]
            if any(not isinstance(text, str) or who != ("human", "gpt")[n % 2] for n, (text, who) in enumerate(said)):
                raise InputError(f"{file}: record {index}: the texts of human and gpt should take turns")
            conversations.append([Turn(_clean(human), gpt, [picture] if "<image>" in human else [])
                                  for (human, _), (gpt, _) in zip(said[::2], said[1::2])])
        except (KeyError, TypeError) as error:
            raise InputError(f"{file}: record {index} is not that of LLaVA: {error} not found") from error
    if not pictures.is_dir():
        raise InputError(f"{pictures} is missing: {COCO} belong there")
    return conversations


def llava(folder):
    """LLaVA's detailed descriptions and complex reasoning: one picture, one round."""
    both = (_llava_conversations(folder, name) for name in ("detail_23k.json", "complex_reasoning_77k.json"))
    return [conversation[:1] for conversations in both for conversation in conversations]


def llava_dial(folder):
    """LLaVA's conversations: one picture, several rounds."""
    return _llava_conversations(folder, "conversation_58k.json")


DATASETS = {"llava": llava, "llava_dial": llava_dial}
CONCATENATE = {"llava": 3, "llava_dial": 2}  # the factors of the original's script


def read_dataset(name, folder, samples, seed):
    """The conversations of a data set by name, all of them (samples None) or so many drawn by seed."""
    if name not in DATASETS:
        raise InputError(f"data set {name!r} is not known; the known ones are {', '.join(DATASETS)}")
    conversations = DATASETS[name](Path(folder))
    if samples is not None and samples < len(conversations):
        conversations = random.Random(f"samples {seed} {name}").sample(conversations, samples)
    return conversations


def hold_out(conversations, fraction, seed):
    """Split off a share of the conversations for evaluation, by seed -> (training, held out), each in its order."""
    count = len(conversations)
    chosen = set(random.Random(f"hold out {seed}").sample(range(count), round(fraction * count)))
    return ([c for i, c in enumerate(conversations) if i not in chosen],
            [c for i, c in enumerate(conversations) if i in chosen])


def concatenate(conversations, factor, rng):
    """Simple concatenation (the post, 4.1): shuffle, and join groups of 1 to `factor`, their sizes drawn uniformly.

    Every conversation is used once. rng: a random.Random. Returns conversations; `encode` numbers their pictures."""
    order, groups, start = rng.sample(conversations, len(conversations)), [], 0
    while start < len(order):
        stop = start + rng.randint(1, factor)
        groups.append([turn for conversation in order[start:stop] for turn in conversation])
        start = stop
    return groups


def epoch_samples(sets, factors, seed, epoch):
    """All samples of one epoch, grouped and shuffled anew by (seed, epoch). sets: a list of lists of conversations."""
    rng = random.Random(f"epoch {seed} {epoch}")
    samples = [group for part, factor in zip(sets, factors) for group in concatenate(part, factor, rng)]
    rng.shuffle(samples)
    return samples


# ---- batches -------------------------------------------------------------------------------------------------------

class Samples(torch.utils.data.Dataset):
    """Conversations as Examples with their pixels; None where no answer fits into max_length and max_images.

    A picture that cannot be read comes back as the InputError itself, so that a worker's answer stays one sentence."""

    def __init__(self, conversations, tokenizer, image_tokens, preprocessing, max_length, max_images):
        self.conversations, self.tokenizer, self.preprocessing = conversations, tokenizer, preprocessing
        self.image_tokens, self.max_length, self.max_images = image_tokens, max_length, max_images

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        example = encode(self.conversations[index], self.tokenizer, self.image_tokens,
                         max_length=self.max_length, max_images=self.max_images)
        if (example.labels == -100).all():
            return example.left_out
        try:
            example.pixels = [preprocess(load_image(image), self.preprocessing) for image in example.images]
        except InputError as error:
            return error
        return example


def collate(examples):
    """Examples with pixels -> one batch, padded at the right.

    input_ids, labels, modality (B, T); pixels (U, 3, S, S) of the distinct pictures and image_index (N), which of them
    stands at each place, so that a picture that occurs twice is encoded once."""
    length = max(len(example.input_ids) for example in examples)

    def pad(name, filler):
        rows = torch.full((len(examples), length), filler)                                   # (B, T)
        for row, example in zip(rows, examples):
            row[:len(example.input_ids)] = getattr(example, name)
        return rows

    distinct = {}
    for example in examples:
        distinct.update(zip(example.images, example.pixels))
    index = {image: i for i, image in enumerate(distinct)}
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "modality": pad("modality", PAD),
            "pixels": torch.stack(list(distinct.values())) if distinct else torch.empty(0),      # (U, 3, S, S)
            "image_index": torch.tensor([index[i] for e in examples for i in e.images], dtype=torch.long)}  # (N)
