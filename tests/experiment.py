"""The paper's claim at the size of a laptop: MMCA learns from as few samples as cross attention, at
the price of causal attention.

    python tests/experiment.py            causal, cross and mmca, 3 sizes of training set, 5 seeds;
                                          at one size other rules for the image tokens, no LoRA, and
                                          (3 seeds) other rates, three times the steps and other
                                          models to begin with: 111 runs, one a core
    python tests/experiment.py --seeds 1  a quarter of it
    python tests/experiment.py --quick    causal, cross and mmca from both pairs of models, 1 seed,
                                          a third of the steps: three minutes

Every run is a line in --out: the same command goes on where it was stopped, and prints at once
where all is there. The data are the demo's (`python demo/make.py data/demo`), and what is trained,
and how; but each mechanism has a learning rate of its own, and a run is one process of one thread
without DeepSpeed. The figure needs matplotlib, as nothing else here does.

What a mechanism reaches depends on what the language model and the tower were taught before
(demo/README.md). In those of demo/causal all that comes before an image token is read, as a
published LLaMA would: a head start for causal attention. Those of demo/ were taught to read as MMCA
does. None has met cross attention.
"""
import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model as visualchat  # noqa: E402
from data import Epoch, Tokenizer, collate, encode, read_datasets  # noqa: E402
from mmca import IMAGE, TEXT, attend_explicit, attention_matrix, make_pattern  # noqa: E402
from model import VisualChat, add_lora, load_llama, load_vit  # noqa: E402
from train import schedule  # noqa: E402
from vision import load_image, positive, preprocess, read_preprocessing  # noqa: E402

# the demo's data sets, how many conversations of each are joined at most, and how it trains: a test
# compares these with demo/flags
SETS = {"llava": 6, "llava_dial": 2, "otter_mimicit_cgd": 1, "sparkles_dialogue": 1,
        "data/demo/train/three.json": 1}
BATCH, RANK, WARMUP = 8, 16, 0.1

DATA = Path("data/demo")
BASES = {"causal": ROOT / "demo/causal", "mmca": ROOT / "demo"}  # by what they were taught

SIZES = 250, 1000, 4000  # of the training set; the steps are the same for each
STEPS = 600
ABLATED = 1000  # the size at which everything else is tried
RATES = 1.5e-3, 3e-3, 6e-3
LONGER = 1800   # steps
SEVERAL = ("which_of_two", "difference", "one_of_two", "more_things", "which_of_three",
           "one_of_three")  # what is asked about several pictures
KINDS = *SEVERAL, "describe", "one_picture"


# ---- other rules ---------------------------------------------------------------------------------
# modality (B, T) -> an edited M (B, T, T), and whether the sum of its two softmaxes is halved

def union(modality):
    """One softmax over all that MMCA sees"""
    return attention_matrix(modality, modality).clamp(max=1), False


def earlier_text(modality):
    """Image tokens look at the text before them too, as the original's code lets them"""
    M, T = attention_matrix(modality, modality), modality.shape[1]
    past = torch.ones(T, T, dtype=torch.bool, device=M.device).tril()
    image_to_text = (modality == IMAGE)[:, :, None] & (modality == TEXT)[:, None, :]
    return M.masked_fill(past & image_to_text, 1), False


def own_number(modality):
    """Image tokens see the number in their picture's heading too: it stands two places before the
    first of them. From the second layer on that place also holds what the number has read"""
    M, image = attention_matrix(modality, modality), modality == IMAGE
    place = torch.arange(modality.shape[1], device=modality.device)         # (T)
    begins = image & ~image.roll(1, 1)                                      # (B, T)
    number = (place * begins).cummax(1).values - 2                          # (B, T)
    return M.masked_fill(image[:, :, None] & (place == number[:, :, None]), 1), False


def average(modality):
    """The mean of the two softmaxes instead of their sum, where a row has both"""
    return attention_matrix(modality, modality), True


class Variant(NamedTuple):
    """What a run trains, and how fast"""
    attention: str
    rate: float          # of RATES: in trials half of causal's, or twice mmca's, were worse
    rule: object = None  # edits M
    rank: int = RANK     # of LoRA; 0: none


MECHANISMS = {"causal": Variant("causal", 1.5e-3), "cross": Variant("cross", 3e-3),
              "mmca": Variant("mmca", 6e-3)}
ABLATIONS = {"one softmax over the union": Variant("mmca", 6e-3, union),
             "image tokens see earlier text": Variant("mmca", 6e-3, earlier_text),
             "image tokens see their number": Variant("mmca", 6e-3, own_number),
             "average instead of sum": Variant("mmca", 6e-3, average),
             "causal without LoRA": Variant("causal", 1.5e-3, rank=0),
             "mmca without LoRA": Variant("mmca", 6e-3, rank=0)}
VARIANTS = MECHANISMS | ABLATIONS


def use_rule(rule):
    """Let VisualChat attend by `attend_explicit` and a rule's M, from now on: every token asks, as
    a word does under "causal", in reading order"""
    def order(modality, *_, **fill):
        pattern = make_pattern(modality, modality, "causal")
        pattern.rule = rule(modality)
        return pattern

    def look(q, k, v, pattern, cache=None):
        M, halved = pattern.rule
        out = attend_explicit(q, k, v, M)                                   # (B, H, T, d)
        if halved:
            has_both = (M == 2).any(-1)                                     # (B, T)
            out = torch.where(has_both[:, None, :, None], out / 2, out)
        return out

    visualchat.make_pattern, visualchat.attend = order, look


# ---- one run -------------------------------------------------------------------------------------

class Job(NamedTuple):
    """Which run: a line of --out begins with it"""
    taught: str  # of BASES
    variant: str
    size: int    # samples: conversations, some joined
    steps: int
    rate: float
    seed: int


def samples(folder, datasets, seed, factors=None):
    """The samples of some data sets in an order that the seed draws; factors: of how many
    conversations each is joined at most"""
    args = argparse.Namespace(datasets=datasets, samples=["all"], concatenate=factors, seed=seed,
                              data_path=folder, out=folder)
    return list(Epoch(read_datasets(args), None, seed, 0))


def held_out():
    """What is measured: {kind of question: conversations of one round}, about pictures that are
    drawn anew. There are 3,266 scenes of one or two things: many are met in training too"""
    return {kind: samples(DATA / "held_out", [f"{DATA}/held_out/{kind}.json"], 0)
            for kind in KINDS}


def features_of(files, tower, preprocessing):
    """The frozen tower's features of every picture: {file: (P, Dv)}"""
    known = {}
    with torch.inference_mode():
        for n in range(0, len(files), 64):
            some = files[n:n + 64]
            pixels = [preprocess(load_image(file), preprocessing) for file in some]
            known.update(zip(some, tower(torch.stack(pixels))))
    return known


def train(model, examples, job):
    """Train what is not frozen, in steps of BATCH examples, each once before any comes again ->
    seconds"""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0)
    rng, left, began = random.Random(job.seed), [], time.process_time()
    for step in range(job.steps):
        while len(left) < BATCH:
            left += rng.sample(examples, len(examples))
        now, left = left[:BATCH], left[BATCH:]
        now.sort(key=lambda example: len(example.input_ids))
        count = sum(answered(example) for example in now)
        # in two halves of like lengths less is padded
        for half in now[:BATCH // 2], now[BATCH // 2:]:
            losses, _ = model(**collate(half))                              # (labels)
            (losses.sum() / count).backward()
        factor = schedule(step, round(WARMUP * job.steps), job.steps)
        optimizer.param_groups[0]["lr"] = job.rate * factor
        torch.nn.utils.clip_grad_norm_(trained, 1)
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - began


def answered(example):
    """The number of an example's labels"""
    return int((example.labels != -100).sum())


def exact(model, examples):
    """How many examples are answered right in every token"""
    with torch.inference_mode():
        _, hits = model(**collate(examples))                                # (labels)
    return sum(bool(answer.all()) for answer in hits.split(list(map(answered, examples))))


def run(job):
    """Train on job.size samples, measure on all that are held out -> a line of --out"""
    torch.set_num_threads(1)
    variant, bases = VARIANTS[job.variant], BASES[job.taught]
    training = samples(DATA / "train", list(SETS), job.seed, list(SETS.values()))[:job.size]
    if len(training) < job.size:
        raise ValueError(f"{DATA} has {len(training)} samples, fewer than {job.size}")
    test = held_out()
    language_model, vision_model = bases / "language_model", bases / "vision_model"
    tokenizer = Tokenizer(language_model / "tokenizer.model")

    if variant.rule:
        use_rule(variant.rule)
    torch.manual_seed(job.seed)
    model = VisualChat(load_vit(vision_model), load_llama(language_model), variant.attention)
    if variant.rank:
        add_lora(model.language_model.model.layers, variant.rank)
    model.set_trained()

    files = sorted({image for talk in chain(training, *test.values())
                    for turn in talk for image in turn.images})
    size = model.vision_model.config.image_size
    features = features_of(files, model.vision_model, read_preprocessing(vision_model, size))
    model.vision_model.forward = lambda features: features  # frozen: it has been asked once

    def examples(talks):
        encoded = [encode(talk, tokenizer, model.image_tokens) for talk in talks]
        for example in encoded:
            example.pixels = [features[image] for image in example.images]
        return encoded

    seconds = train(model, examples(training), job)
    return {**job._asdict(), "seconds": round(seconds, 1),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "asked": {kind: len(talks) for kind, talks in test.items()},
            "right": {kind: exact(model, examples(talks)) for kind, talks in test.items()}}


# ---- all of them, the table and the figure -------------------------------------------------------

def spread(values):
    """Mean and standard deviation over the seeds in percent, as text; of one seed its value"""
    values = [100 * value for value in values]
    deviation = f" ± {statistics.stdev(values):3.1f}" if values[1:] else " " * 6
    return f"{statistics.mean(values):5.1f}{deviation}"


def share(line, kinds):
    """The share of these kinds of questions that a run answered exactly"""
    return sum(line["right"][kind] for kind in kinds) / sum(line["asked"][kind] for kind in kinds)


def always_the_same(talks):
    """A line as of a run that answers each question by the most frequent answer of its kind.
    talks: {kind: conversations}"""
    answers = {kind: Counter(turn.answer for turn, in asked) for kind, asked in talks.items()}
    return {"asked": {kind: each.total() for kind, each in answers.items()},
            "right": {kind: max(each.values()) for kind, each in answers.items()}}


def table(lines, guess):
    """Print held-out exact match in percent, a row for each kind of run: about several pictures and
    about one, then by what is asked about several"""
    def shares(runs):
        return {name: spread([share(line, kinds) for line in runs])
                for name, kinds in {"several": SEVERAL, **{kind: [kind] for kind in KINDS}}.items()}

    groups = defaultdict(list)
    for line in lines:
        job = job_of(line)
        place = job.taught, job.size, job.steps, list(VARIANTS).index(job.variant), job.rate
        groups[place].append(line)
    rows = [{"variant": "the most frequent answer", **shares([guess])}]
    for (taught, size, steps, _, rate), runs in sorted(groups.items()):
        seconds = statistics.median(line["seconds"] / steps for line in runs)
        rows.append({"taught": taught, "samples": size, "steps": steps, "rate": rate,
                     "variant": runs[0]["variant"], "seeds": len(runs), **shares(runs),
                     "trained": f"{runs[0]['trained']:,}", "s / step": f"{seconds:.3f}"})

    job = ["taught", "samples", "steps", "rate", "variant", "seeds"]
    print_columns(rows, [*job, "several", "describe", "one_picture", "trained", "s / step"])
    print()
    print_columns(rows, [*job, *SEVERAL])


def print_columns(rows, names):
    """Print these of the rows' cells below their names; what a row has no cell for stays empty"""
    lines = [names] + [[str(row.get(name, "")) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [cell.ljust(width) if name == "variant" else cell.rjust(width)
                 for name, cell, width in zip(names, line, widths)]
        print("  ".join(cells).rstrip())


def figure(lines, file):
    """Accuracy against the number of training samples, one panel for each kind of question, bars
    over the seeds"""
    try:
        import matplotlib
    except ImportError:
        print("no figure: it is drawn by matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    drawing, panels = pyplot.subplots(2, len(KINDS) // 2, figsize=(13, 6), sharex=True, sharey=True)
    for panel, kind in zip(panels.flat, KINDS):
        for name in MECHANISMS:
            runs = defaultdict(list)
            for line in lines:
                if line["variant"] == name:
                    runs[line["size"]].append(100 * share(line, [kind]))
            sizes = sorted(runs)
            bars = [statistics.stdev(runs[size]) if runs[size][1:] else 0 for size in sizes]
            panel.errorbar(sizes, [statistics.mean(runs[size]) for size in sizes], bars, marker="o",
                           capsize=3, label=name)
        panel.set(title=kind.replace("_", " "), xscale="log", xticks=SIZES, xticklabels=SIZES)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    drawing.supxlabel("training samples")
    drawing.supylabel("held-out exact match, %")
    drawing.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper center",
                   ncols=len(MECHANISMS), frameon=False)
    drawing.tight_layout(rect=(0, 0, 1, 0.93))
    drawing.savefig(file, dpi=110)
    print(f"the figure is in {file}")


def identity():
    """What a run depends on besides its Job and the code, as a few letters: recipe, data, bases"""
    whole = hashlib.sha256(f"{SETS} {BATCH} {RANK} {WARMUP}".encode())
    files = [DATA / "made_by", *sorted(DATA.rglob("*.json"))]
    for bases in BASES.values():
        files += sorted(bases.glob("*_model/*"))
    for file in files:
        whole.update(file.read_bytes())
    return whole.hexdigest()[:12]


def job_of(line):
    """The Job that a line of --out is of"""
    return Job(*(line[name] for name in Job._fields))


def wanted(seeds, quick):
    """All runs, seed by seed"""
    def at_its_rate(name, size, steps, seed, taught="causal"):
        return Job(taught, name, size, steps, VARIANTS[name].rate, seed)

    if quick:
        return [at_its_rate(name, ABLATED, 200, 1, taught)
                for taught in BASES for name in MECHANISMS]
    jobs = []
    for seed in range(1, seeds + 1):
        for size in SIZES:
            jobs += [at_its_rate(name, size, STEPS, seed)
                     for name in (VARIANTS if size == ABLATED else MECHANISMS)]
        if seed > 3:
            continue
        for name in MECHANISMS:
            jobs += [at_its_rate(name, ABLATED, LONGER, seed),
                     at_its_rate(name, ABLATED, STEPS, seed, "mmca")]
            jobs += [Job("causal", name, ABLATED, STEPS, rate, seed)
                     for rate in RATES if rate != VARIANTS[name].rate]
    return jobs


def main():
    """The command line"""
    parser = argparse.ArgumentParser(
        description="Causal attention, cross attention and MMCA on the demo's data.")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--seeds", type=positive, default=5, metavar="N",
                      help="runs of each kind, of some at most 3 (%(default)s)")
    some.add_argument("--quick", action="store_true", help="200 steps, 1 seed")
    parser.add_argument("--out", type=Path, default=Path("out/experiment.jsonl"),
                        help="a line for each run; those that are there are kept (%(default)s)")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character
    args = parser.parse_args()
    if not DATA.is_dir():
        parser.error(f"{DATA} is not there; python demo/make.py {DATA} draws it")

    same = identity()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = args.out.read_text() if args.out.exists() else ""
    lines = [line for line in map(json.loads, text.splitlines()) if line["identity"] == same]
    lines = {job_of(line): line for line in lines}
    jobs = wanted(args.seeds, args.quick)
    missing = [job for job in jobs if job not in lines]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that begin now: a run takes one core
    # each run has a process of its own, since use_rule changes model.py; Ctrl-C ends all of them
    with get_context("spawn").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
        results = pool.imap_unordered(run, missing)
        for line in tqdm(results, total=len(missing), unit="run", disable=not missing):
            lines[job_of(line)] = line
            with open(args.out, "a") as file:
                print(json.dumps(line | {"identity": same}), file=file)

    table([lines[job] for job in jobs], always_the_same(held_out()))
    if not args.quick:
        curves = [job for job in jobs if job.taught == "causal" and job.steps == STEPS
                  and job.rate == VARIANTS[job.variant].rate]
        figure([lines[job] for job in curves], args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
