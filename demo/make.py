#!/usr/bin/env python3
"""Draw the demo's pictures and write what is said about them in the file layouts of the real data sets.

    python demo/make.py data/demo           train/ and held_out/, about different pictures: what train.py learns from
    python demo/make.py data/bases --bases  what the two models of demo/ have learned from (demo/README.md)

A picture of 64 x 64 has one or two things in its quarters (the second of a pair can have three): shapes in colours and
two sizes, digits, short words. Below train/ and held_out/, with N of 2,500 and 100 (--scenes):

    coco/train2017/000000000000.jpg ...     the pictures of LLaVA and of the pairs
    llava/detail_23k.json                   N descriptions
    llava/complex_reasoning_77k.json        N questions that take a step of thought
    llava/conversation_58k.json             N conversations of several rounds, and one about each picture of a pair
    MIMIC-IT/CGD_instructions.json          N pairs of pictures that differ in one thing, six questions about each
    SparklesDialogueCC/, SparklesDialogueVG/    N dialogues about two pictures, in CC both shown at once
"""
import argparse
import json
import random
import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from sentencepiece import SentencePieceTrainer

SIDE, FINE = 64, 2  # pixels of a picture; so many times finer it is drawn
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 220)}
INK = 20, 20, 20
SHAPES, SIZES = ("circle", "square", "triangle"), {"small": 0.22, "large": 0.42}  # radius, of a quarter's side
DIGITS, WORDS = "123", ("sun", "cat")
PLACES = "top left", "top right", "bottom left", "bottom right"
NAMES = [[f"image {c}" for c in letters] for letters in ("123", "123", "abc", "ABC")] + [
    [f"the {word} image" for word in ("first", "second", "third")]]
NUMBERS = "None", "One", "Two", "Three", "Four", "Five"
VISION = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
          "num_attention_heads": 4, "image_size": SIDE, "patch_size": SIDE // 2,
          "initializer_range": 1.0}  # at the usual 0.02 the tower learns what stands in a picture, and not where
LANGUAGE = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
            "num_attention_heads": 4, "vocab_size": 800, "max_position_embeddings": 1024}


# ---- scenes: a dict of place -> thing, a thing is a tuple of words ---------------------------------------------------

def thing(rng):
    """("large", "red", "circle"), ("digit", "3") or ("word", "sun")"""
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(tuple(SIZES)), rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
    return ("digit", rng.choice(DIGITS)) if kind < 0.85 else ("word", rng.choice(WORDS))


def scene(rng):
    """One or two things"""
    places = rng.sample(PLACES, rng.randint(1, 2))
    return {place: thing(rng) for place in PLACES if place in places}


def changed(before, rng):
    """A scene that differs from another at one place"""
    after, place = dict(before), rng.choice(PLACES)
    after.pop(place, None)
    if place not in before or not after or rng.random() < 0.8:
        after[place] = next(new for new in iter(lambda: thing(rng), None) if name(new) != name(before.get(place)))
    return {place: after[place] for place in PLACES if place in after}


def name(what):
    """"a red circle", "the digit 3", "the word sun" or "nothing": its size has a question of its own"""
    return "nothing" if what is None else f"{'a' if len(what) == 3 else 'the'} {' '.join(what[-2:])}"


def listed(names):
    """"a small red circle, the digit 3 and the word sun" """
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part) or "nothing"


def sentence(text):
    """With a capital and a full stop"""
    return text[0].upper() + text[1:] + "."


def draw(things, rng):
    """A scene as a picture on a light ground, each thing somewhere near the middle of its quarter"""
    half = SIDE * FINE // 2
    picture = Image.new("RGB", (2 * half, 2 * half), tuple(rng.randint(225, 255) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for place, what in things.items():
        x, y = (half * ((side in place) + 0.5) + FINE * rng.uniform(-2, 2) for side in ("right", "bottom"))
        if len(what) == 2:
            font = ImageFont.load_default(half * (0.85 if what[0] == "digit" else 0.5))
            pen.text((x, y), what[1], INK, font, "mm")
            continue
        r, colour = half * SIZES[what[0]] * rng.uniform(0.9, 1.05), COLOURS[what[1]]
        if what[2] == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), colour)
        elif what[2] == "square":
            pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), colour)
        else:
            pen.regular_polygon((x, y + 0.15 * r, 1.1 * r), 3, fill=colour)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


# ---- what is said about them -----------------------------------------------------------------------------------------

def introduced(names):
    """"Here are image 1 and image 2. " """
    return f"Here {'are' if names[1:] else 'is'} {listed(names)}. " if names else ""


def described(things):
    """All that is in a scene"""
    whole = [f"a {' '.join(what)}" if len(what) == 3 else name(what) for what in things.values()]
    return sentence(listed([f"{what} at the {place}" for place, what in zip(things, whole)]))


def about_one(things, rng, where=""):
    """A question about one picture and its answer. where: "" or " in image 2" """
    kinds = ["things", "shapes", "at", "at"] if where else ["things", "shapes", "at", "where", "colour", "size", "read", "is there"]
    place, kind = rng.choice(PLACES), rng.choice(kinds)
    seen = list(things.values())
    if kind == "things":
        return f"How many things are{where or ' there'}?", sentence(NUMBERS[len(seen)])
    if kind == "shapes":
        return f"How many shapes are{where or ' there'}?", sentence(NUMBERS[sum(len(what) == 3 for what in seen)])
    for there, what in rng.sample(list(things.items()), len(things)):
        alone = sum(name(other) == name(what) for other in seen) == 1
        if kind == "where" and alone:
            return f"Where is the {' '.join(what[-2:])}{where}?", sentence(f"at the {there}")
        if kind == "size" and alone and len(what) == 3:
            return f"How large is the {' '.join(what[1:])}{where}?", sentence(what[0])
        if kind == "colour" and sum(other[-1] == what[-1] for other in seen) == 1 and len(what) == 3:
            return f"What colour is the {what[2]}{where}?", sentence(what[1])
        if kind == "read" and sum(other[0] == what[0] for other in seen) == 1 and len(what) == 2:
            return f"Which {what[0]} can be read{where}?", sentence(name(what))
    if kind == "is there":
        asked = rng.choice(seen) if rng.random() < 0.5 else thing(rng)
        there = "Yes." if any(asked[-2:] == what[-2:] for what in seen) else "No."
        return (f"Is there a {' '.join(asked[1:])}{where}?" if len(asked) == 3 else f"Can {name(asked)} be read{where}?"), there
    return f"What is at the {place}{where}?", sentence(name(things.get(place)))


def reasoning(things, rng):
    """A question that takes a step of thought"""
    shaped = [what for what in things.values() if len(what) == 3]
    if not shaped or rng.random() < 0.4:
        left, right = (sum(side in place for place in things) for side in ("left", "right"))
        more = "Left." if left > right else "Right." if right > left else "Neither."
        return "On which side are more things?", more
    word = rng.choice(rng.choice(shaped)[1:])
    rest = [name(what) for what in things.values() if word not in what]
    return f"What is left if every {word + ' thing' if word in COLOURS else word} is taken away?", sentence(listed(rest))


def about_all(scenes, names, rng):
    """A question about several pictures, called by these names, and its answer"""
    kind = rng.choice(["one", "one", "which", "which", "which", "more"])
    if kind == "more" and len(scenes) == 2:
        first, second = map(len, scenes)
        return (f"Which has more things, {names[0]} or {names[1]}?",
                "Neither." if first == second else sentence(names[first < second]))
    if kind == "which" and len(scenes) > 1:
        kinds = [{what[-2:] for what in things.values()} for things in scenes]
        alone = [(n, what) for n, own in enumerate(kinds) for what in sorted(own) if sum(what in other for other in kinds) == 1]
        if alone:
            n, what = rng.choice(alone)
            return f"Which image has {'a' if what[0] in COLOURS else 'the'} {' '.join(what)}?", sentence(names[n])
    n = rng.randrange(len(scenes))
    return about_one(scenes[n], rng, f" in {names[n]}")


def difference(before, after, names):
    """What was changed from one scene to another"""
    place = next(place for place in PLACES if before.get(place) != after.get(place))
    return (f"What is the difference between {names[0]} and {names[1]}?",
            sentence(f"at the {place}, {names[0]} has {name(before.get(place))} and {names[1]} has {name(after.get(place))}"))


def several(count, ask):
    """Questions and answers that ask() makes, none twice, up to `count`"""
    rounds = {}
    for _ in range(5 * count):
        if len(rounds) < count:
            question, answer = ask()
            rounds[question] = answer
    return list(rounds.items())


# ---- files -----------------------------------------------------------------------------------------------------------

def record(file, rounds):
    """One record of LLaVA's files: the picture stands before the first question"""
    turns = []
    for n, (question, answer) in enumerate(rounds):
        turns += [{"from": "human", "value": question if n else f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": file[:-4], "image": file, "conversations": turns}


def write(folder, count, rng):
    """train/ or held_out/: the files that the head of this file lists"""
    sparkles = "SparklesDialogueCC", "SparklesDialogueVG"
    for name in ("coco/train2017", "llava", "MIMIC-IT", *(f"{source}/{part}" for source in sparkles for part in ("images", "annotations"))):
        (folder / name).mkdir(parents=True)
    detail, reason, dialogue, pairs, number = [], [], [], {}, 0

    def shown(things, into="coco/train2017", digits=12):
        nonlocal number
        file, number = f"{number:0{digits}}.jpg", number + 1
        draw(things, rng).save(folder / into / file, quality=95, subsampling=0)
        return file

    for n in range(count):
        things = scene(rng)
        file = shown(things)
        detail.append(record(file, [("Describe the image.", described(things))]))
        reason.append(record(file, [reasoning(things, rng)]))
        dialogue.append(record(file, several(4, lambda: about_one(things, rng))))
    for n in range(count):
        before = scene(rng)
        both, names = (before, changed(before, rng)), ("image 1", "image 2")
        files = [shown(things) for things in both]
        for file, things in zip(files, both):
            dialogue.append(record(file, several(3, lambda: about_one(things, rng))))
        asked = [difference(*both, names), *several(5, lambda: about_all(both, names, rng))]
        ids = [f"CGD_INS_{n}_{i}" for i in range(len(asked))]
        for i, (question, answer) in enumerate(asked):
            pairs[ids[i]] = {"instruction": question, "answer": answer, "image_ids": [f"CGD_IMG_{file[:-4]}" for file in files],
                             "rel_ins_ids": [other for other in ids if other != ids[i]]}
    for source in sparkles:
        dialogues = []
        for n in range(count // 2):
            scenes, files, said = [], [], []
            for fresh in ([2, 0, 0, 0, 0] if source == sparkles[0] else [1, 0, 1, 0, 0]):
                new = [scene(rng) for _ in range(fresh)]
                scenes += new
                files += [shown(things, f"{source}/images", 1)[:-4] for things in new]
                names = [f"IMAGE#{file}" for file in files]
                question, answer = next(new for new in iter(lambda: about_all(scenes, names, rng), None)
                                        if all(new[0] not in turn["content"] for turn in said))
                said.append({"role": "user", "content": introduced(
                    [f"IMAGE#{file}<Img><ImageHere></Img>" for file in files[len(files) - fresh:]]) + question,
                             "images": [{"image_id": file, "caption": described(things)} for file, things in
                                        zip(files[len(files) - fresh:], new)]})
                said.append({"role": "assistant", "content": answer})
            dialogues.append({"dialogue": said})
        (folder / source / f"annotations/{source}.json").write_text(json.dumps(dialogues))
    for file, content in (("llava/detail_23k", detail), ("llava/complex_reasoning_77k", reason), ("llava/conversation_58k", dialogue),
                          ("MIMIC-IT/CGD_instructions", {"meta": {}, "data": pairs})):
        (folder / f"{file}.json").write_text(json.dumps(content))


def conversation(rng, most):
    """Some rounds about one to `most` pictures, with words where pictures would stand. The words are a round of their own,
    answered with the picture's number: under MMCA only what follows a picture can know it. In an album they stand before a
    question about them, as where data.py joins conversations about single pictures"""
    scenes, rounds, album = [], [], most == 1 or rng.random() < 0.2
    names = rng.choice(NAMES)
    for fresh in [1 if album else rng.randint(min(2, most), most), *rng.choices([0, 0, 0, 0, 0, 0, 1], k=rng.randint(5, 9))]:
        new = [scene(rng) for _ in range(min(fresh, most - len(scenes)))]
        if len(new) == 2 and rng.random() < 0.7:
            new[1] = changed(new[0], rng)
        if album:
            text = "".join(f"{told(things)} " for things in new)
        else:
            text = ""
            rounds += [{"question": told(things), "answer": f"Image {i}."} for i, things in enumerate(new, len(scenes) + 1)]
        scenes += new
        if not album and (names != NAMES[0] or rng.random() < 0.3):
            text += introduced(names[len(scenes) - len(new):len(scenes)])
        kind = rng.random()
        if len(scenes) == 1 or album:
            question, answer = (("Describe the image.", described(scenes[-1])) if kind < 0.3 else
                                reasoning(scenes[-1], rng) if kind < 0.4 else about_one(scenes[-1], rng))
        elif len(scenes) == 2 and kind < 0.3 and 0 < len(scenes[0].items() ^ scenes[1].items()) < 3:
            question, answer = difference(*scenes, names)
        elif kind < 0.3:
            i = rng.randrange(len(scenes))
            question, answer = f"Describe {names[i]}.", described(scenes[i])
        else:
            question, answer = about_all(scenes, names[:len(scenes)], rng)
        if new or not any(earlier["question"].endswith(question) for earlier in rounds):
            rounds.append({"question": text + question, "answer": answer})
    return rounds


def write_bases(folder, count, rng):
    """one.json and text.json, `count` conversations each without pictures, about one and about up to three; describe.json,
    a quarter as many pictures"""
    (folder / "pictures").mkdir(parents=True)
    pictured = []
    for n in range(count // 4):
        things, file = scene(rng), f"pictures/{n}.jpg"
        draw(things, rng).save(folder / file, quality=95, subsampling=0)
        pictured.append([{"images": [file], "question": "Describe the image.", "answer": described(things)},
                         *({"question": q, "answer": a} for q, a in several(2, lambda: about_one(things, rng)))])
    for file, content in (("describe", pictured), ("one", [conversation(rng, 1) for _ in range(count)]),
                          ("text", [conversation(rng, 3) for _ in range(count)])):
        (folder / f"{file}.json").write_text(json.dumps(content))
    for model, sizes in (("vision_model", VISION), ("language_model", LANGUAGE)):
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(sizes, indent=2))
    lines = []
    for talk in content[:10_000]:  # the template as often as it stands in conversations, so that it becomes few pieces
        lines += ["You are a powerful vision-language assistant.", f"\n\n### Image {rng.randint(1, 8)}:\n\n### Question:"]
        lines += [line for turn in talk for line in ("\n### Question:", turn["question"], "\n### Answer:", turn["answer"])]
    with open(folder / "language_model/tokenizer.model", "wb") as file:
        SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, vocab_size=LANGUAGE["vocab_size"],
                                   model_type="bpe", byte_fallback=True, split_digits=True, minloglevel=2,
                                   normalization_rule_name="identity", remove_extra_whitespaces=False)


def told(things):
    """A scene in shorthand, a word for each quarter, what is large in capitals: what stands where a picture would"""
    def word(what):
        if what[0] == "digit":
            return f"digit{NUMBERS[int(what[1])].lower()}"
        return "".join(what[1:]).upper() if what[0] == "large" else "".join(what[1:]) if len(what) == 3 else "".join(what)
    return " ".join(["picture", *(f"{place[0]}{place.split()[1][0]}{word(things.get(place, ('nothing',)))}" for place in PLACES)])


def main():
    """The command line"""
    parser = argparse.ArgumentParser(description="Draw the demo's pictures and write what is said about them.")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--bases", action="store_true", help="what the two bases learn from instead")
    parser.add_argument("--scenes", type=int, help="N of train/ in the head of this file (2500; with --bases conversations, 100000)")
    parser.add_argument("--seed", type=int, default=1, help="of everything drawn (%(default)s)")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is already there; remove it to draw it anew")
    unfinished = args.out.with_name(f".{args.out.name}.unfinished")  # a half of it is never taken for the whole
    shutil.rmtree(unfinished, ignore_errors=True)
    if args.bases:
        write_bases(unfinished, args.scenes or 100_000, random.Random(f"bases {args.seed}"))
    else:
        write(unfinished / "train", args.scenes or 2500, random.Random(f"train {args.seed}"))
        write(unfinished / "held_out", min(100, (args.scenes or 2500) // 10), random.Random(f"held out {args.seed}"))
    unfinished.rename(args.out)


if __name__ == "__main__":
    main()
