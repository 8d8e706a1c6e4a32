#!/usr/bin/env python3
"""Draw the demo's pictures and write what is said about them in the file layouts of the real data sets.

    python demo/make.py data/demo    train/ and held_out/, about different pictures: what train.py learns from

A picture of 64 x 64 has one or two things in its quarters (the second of a pair can have three): shapes in colours and
two sizes, digits, short words. Below train/, with N of 5,000 (--scenes):

    coco/train2017/000000000000.jpg ...         the pictures of the pairs
    MIMIC-IT/CGD_instructions.json              eight questions each about N pairs, of which two in three differ in one thing
    llava/detail_23k.json                       N / 8 descriptions, of the pictures of the first pairs
    llava/complex_reasoning_77k.json            a question that takes a step of thought about each of them
    llava/conversation_58k.json                 a conversation of eight rounds about each of them
    SparklesDialogueCC/, SparklesDialogueVG/    N / 20 dialogues each about two pictures, in CC both shown at once
    three.json                                  N conversations of eight rounds about three pictures, in the form of one's own data

Below held_out/ a file for each kind of question, with 150 conversations that have it as their only one. What is asked later can
be answered from what was said before; what is asked first, from the pictures alone.
"""
import argparse
import hashlib
import json
import random
import shutil
from itertools import chain
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, FINE = 64, 2  # pixels of a picture; so many times finer it is drawn
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 220)}
INK = 20, 20, 20
SHAPES, SIZES = ("circle", "square", "triangle"), {"small": 0.22, "large": 0.42}  # radius, of a quarter's side
DIGITS, WORDS = "123", ("sun", "cat")
PLACES = "top left", "top right", "bottom left", "bottom right"
NAMES = [[f"image {c}" for c in letters] for letters in ("123", "123", "abc", "ABC")] + [
    [f"the {word} image" for word in ("first", "second", "third")]]
DIFFER = 2 / 3  # share of the pairs whose second picture is the first with one change
ROUNDS = 8  # of a conversation about several pictures
NUMBERS = "None", "One", "Two", "Three", "Four", "Five"


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


def scenes_of(count, rng, differ=DIFFER):
    """So many scenes, the second often made from the first"""
    scenes = [scene(rng) for _ in range(count)]
    if count > 1 and rng.random() < differ:
        scenes[1] = changed(scenes[0], rng)
    return scenes


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
    return picture.reduce(FINE)


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


# Questions about several pictures, called by these names. None where there is nothing of the kind to ask

def which_image(scenes, names, rng):
    """Which picture has a thing that no other has"""
    kinds = [{what[-2:] for what in things.values()} for things in scenes]
    alone = [(n, what) for n, own in enumerate(kinds) for what in sorted(own) if sum(what in other for other in kinds) == 1]
    if alone and len(scenes) > 1:
        n, what = rng.choice(alone)
        return f"Which image has {'a' if what[0] in COLOURS else 'the'} {' '.join(what)}?", sentence(names[n])


def about_one_of(scenes, names, rng):
    """A question about one of them"""
    n = rng.randrange(len(scenes))
    return about_one(scenes[n], rng, f" in {names[n]}")


def describe_one_of(scenes, names, rng):
    """All that is in one of them"""
    n = rng.randrange(len(scenes))
    return f"Describe {names[n]}.", described(scenes[n])


def more_things(scenes, names, rng):
    """Which of two has more things"""
    if len(scenes) == 2:
        first, second = map(len, scenes)
        more = "Neither." if first == second else sentence(names[first < second])
        return f"Which has more things, {names[0]} or {names[1]}?", more


def difference(scenes, names, rng):
    """What was changed from the first of two to the second, where it is one thing"""
    if len(scenes) == 2:
        before, after = scenes
        places = [place for place in PLACES if before.get(place) != after.get(place)]
        if len(places) == 1:
            old, new = name(before.get(places[0])), name(after.get(places[0]))
            if old != new:  # the same in another size has no question
                return (f"What is the difference between {names[0]} and {names[1]}?",
                        sentence(f"at the {places[0]}, {names[0]} has {old} and {names[1]} has {new}"))


# how often they are drawn. Descriptions teach most, since they train most words; "which image" is learned last
MIX = {which_image: 50, describe_one_of: 25, difference: 12, about_one_of: 10, more_things: 3}


def about_all(scenes, names, rng, mix=MIX):
    """One of these questions and its answer"""
    while True:
        ask, = rng.choices(list(mix), mix.values())
        if asked := ask(scenes, names, rng):
            return asked


def rounds_about(scenes, names, shown, rng, mix=MIX):
    """A round for each number in `shown`: so many more of the scenes are shown before its question -> for each round what
    is new, the question, the answer"""
    asked, seen = {}, 0
    for count in shown:
        new, seen = scenes[seen:seen + count], seen + count
        question = None
        while question is None or question in asked:
            if len(new) == 1 and rng.random() < 0.25:
                question, answer = "Describe the image.", described(*new)  # the one that has just been shown
            elif seen == 1:
                question, answer = about_one(scenes[0], rng)
            else:
                question, answer = about_all(scenes[:seen], names, rng, mix)
        asked[question] = new, question, answer
    return list(asked.values())


def several(count, ask):
    """Questions and answers that ask() makes, none twice, up to `count`"""
    rounds = {}
    for _ in range(5 * count):
        if len(rounds) < count:
            question, answer = ask()
            rounds[question] = answer
    return list(rounds.items())


# ---- files -----------------------------------------------------------------------------------------------------------

class Album:
    """A folder of pictures, whose names are numbers"""

    def __init__(self, folder, rng, digits=1):
        folder.mkdir(parents=True)
        self.folder, self.rng, self.digits, self.count = folder, rng, digits, 0

    def add(self, things):
        """Draw a scene -> the name of its file without .jpg"""
        number, self.count = f"{self.count:0{self.digits}}", self.count + 1
        draw(things, self.rng).save(self.folder / f"{number}.jpg", quality=95, subsampling=0)
        return number


def save(file, content):
    """Write JSON, in a folder that may not be there yet"""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def llava_record(number, rounds):
    """One record of LLaVA's files: the picture stands before the first question"""
    said = [{"from": speaker, "value": text} for one in rounds for speaker, text in zip(("human", "gpt"), one)]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": number, "image": f"{number}.jpg", "conversations": said}


def cgd(pairs, rng):
    """CGD_instructions.json: a group of questions about each pair"""
    data = {}
    for n, pair in enumerate(pairs):
        numbers, scenes = zip(*pair)
        ids = [f"CGD_INS_{n}_{i}" for i in range(ROUNDS)]
        for own, (_, question, answer) in zip(ids, rounds_about(scenes, NAMES[0], [2] + [0] * (ROUNDS - 1), rng)):
            data[own] = {"instruction": question, "answer": answer, "image_ids": [f"CGD_IMG_{number}" for number in numbers],
                         "rel_ins_ids": [i for i in ids if i != own]}
    return {"meta": {}, "data": data}


def sparkles(album, count, shown, rng):
    """SparklesDialogueCC.json or ...VG.json: so many dialogues, in which a picture is called by the name of its file"""
    dialogues = []
    for _ in range(count):
        scenes, said = scenes_of(2, rng), []
        pictures = [{"image_id": album.add(things), "caption": described(things)} for things in scenes]
        names = [f"IMAGE#{picture['image_id']}" for picture in pictures]
        for new, question, answer in rounds_about(scenes, names, shown, rng):
            fresh, pictures = pictures[:len(new)], pictures[len(new):]
            intro = introduced([f"IMAGE#{picture['image_id']}<Img><ImageHere></Img>" for picture in fresh])
            said.append({"role": "user", "content": intro + question, "images": fresh})
            said.append({"role": "assistant", "content": answer})
        dialogues.append({"dialogue": said})
    return dialogues


def three_pictures(album, count, rng):
    """three.json: conversations in the form of one's own data, in most of them with all pictures in the first round"""
    talks = []
    for _ in range(count):
        scenes, shown = scenes_of(3, rng), [0] * ROUNDS
        for start in rng.choice([(0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, rng.randint(1, 6)), (0, rng.randint(1, 2), rng.randint(3, 6))]):
            shown[start] += 1
        talks.append([{"images": [f"{album.folder.name}/{album.add(things)}.jpg" for things in new], "question": question, "answer": answer}
                      for new, question, answer in rounds_about(scenes, NAMES[0], shown, rng)])
    return talks


def write(folder, count, rng):
    """train/: the files that the head of this file lists"""
    coco, detail, reason, dialogue = Album(folder / "coco/train2017", rng, digits=12), [], [], []
    pairs = [[(coco.add(things), things) for things in scenes_of(2, rng)] for _ in range(count)]
    for number, things in chain(*pairs[:count // 16]):
        detail.append(llava_record(number, [("Describe the image.", described(things))]))
        reason.append(llava_record(number, [reasoning(things, rng)]))
        dialogue.append(llava_record(number, several(ROUNDS, lambda: about_one(things, rng))))
    save(folder / "llava/detail_23k.json", detail)
    save(folder / "llava/complex_reasoning_77k.json", reason)
    save(folder / "llava/conversation_58k.json", dialogue)
    save(folder / "MIMIC-IT/CGD_instructions.json", cgd(pairs, rng))
    for source, shown in (("SparklesDialogueCC", [2, 0, 0, 0, 0]), ("SparklesDialogueVG", [1, 0, 1, 0, 0])):
        dialogues = sparkles(Album(folder / source / "images", rng), count // 20, shown, rng)
        save(folder / source / f"annotations/{source}.json", dialogues)
    save(folder / "three.json", three_pictures(Album(folder / "pictures", rng), count, rng))


def held_out(folder, count, rng):
    """held_out/: each kind of question about new pictures"""
    def describe(scenes, *_):
        return "Describe the image.", described(*scenes)

    def one_picture(scenes, names, rng):
        return about_one(*scenes, rng)

    album = Album(folder / "pictures", rng)
    for kind, pictures, ask in (("which_of_two", 2, which_image), ("difference", 2, difference), ("one_of_two", 2, about_one_of),
                                ("more_things", 2, more_things), ("which_of_three", 3, which_image), ("one_of_three", 3, about_one_of),
                                ("describe", 1, describe), ("one_picture", 1, one_picture)):
        talks = []
        while len(talks) < count:
            scenes = scenes_of(pictures, rng)
            if asked := ask(scenes, NAMES[0], rng):  # not all scenes have something of the kind
                images = [f"pictures/{album.add(things)}.jpg" for things in scenes]
                talks.append([{"images": images, "question": asked[0], "answer": asked[1]}])
        save(folder / f"{kind}.json", talks)


def main():
    """The command line"""
    parser = argparse.ArgumentParser(description="Draw the demo's pictures and write what is said about them.")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--scenes", type=int, default=5000, help="N of train/ in the head of this file (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of everything drawn (%(default)s)")
    args = parser.parse_args()
    # by this the data of another version, or of other flags, are known
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    made_by = f"make.py {source} scenes {args.scenes} seed {args.seed}\n"
    if args.out.exists():
        known = args.out / "made_by"
        if known.exists() and known.read_text() == made_by:
            print(f"{args.out} is already there")
            return
        parser.error(f"{args.out} is already there, not as this command makes it; remove it to draw it anew")
    unfinished = args.out.with_name(f".{args.out.name}.unfinished")  # a half of it is never taken for the whole
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished / "train", args.scenes, random.Random(f"train {args.seed}"))
    held_out(unfinished / "held_out", min(150, args.scenes), random.Random(f"held out {args.seed}"))
    (unfinished / "made_by").write_text(made_by)
    unfinished.rename(args.out)


if __name__ == "__main__":
    main()
