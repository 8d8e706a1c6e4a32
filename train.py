"""deepspeed.initialize and a loop, top to bottom.

This file explains the training recipe of DeepSpeed-VisualChat (arXiv:2309.14327): which weights are
trained, the optimizer and its schedule, ZeRO, the loss over the global batch, evaluation, the log
and the checkpoints. Not here: the model (model.py), the conversations and batches (data.py).

    deepspeed train.py @demo/flags               the demo; a file of flags of your own is a recipe
    deepspeed train.py --language_model DIR --vision_model DIR --data_path DIR --datasets llava
    deepspeed train.py --checkpoint out/best --datasets mine.json     goes on from what a run has made
    deepspeed --num_accelerators 2 train.py ...  two processes, also on a CPU
    python train.py ...                          one process, without the launcher

The launcher starts a process for each GPU that is there; where there is none, for each NUMA node of
the processor, mostly one. Shapes: B batch, T tokens, S pixels a side.
"""
import argparse
import fcntl
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

from data import (Samples, Tokenizer, Turn, arguments, check_fit, collate, encode, limit_length,
                  parse, pictures_of, printable, read_data)
from model import (VisualChat, add_lora, bases, choose_device, load_llama, load_vit,
                   size_of)
from vision import (InputError, is_main, number, out_of_memory, positive, read_config,
                    read_preprocessing, reason_of, write_whole)

BROKEN = 0.01  # the share of an epoch's samples that may have a picture that cannot be read


def command_line():
    """The command line; every default is the recipe's"""
    parser, add = arguments("Train a vision-language chat model with DeepSpeed. @FILE stands for "
                            "the flags in a file: @demo/flags is the demo.")
    # words as in a shell, over several lines, with comments
    parser.fromfile_prefix_chars = "@"
    parser.convert_arg_line_to_args = partial(shlex.split, comments=True)
    rate = number(float, 0, 1e30)
    share = number(float, 0, 1)
    count = number(int, 0)
    add("--attention", choices=["mmca", "causal", "cross"], default="mmca", help="the mechanism")
    add("--feature_layer", type=int, default=-1,
        help="CLIP's layer whose output is taken, -1 is the last")
    add("--trainable", choices=["recipe", "all"], default="recipe",
        help="recipe: embedding, projection, CrA's layers, LoRA")
    add("--lora_rank", type=count, default=0, help="in the language model, 0 for none")
    add("--vision_lora_rank", type=count, default=0, help="in the vision tower")

    add("--epochs", type=positive, default=6, help="times through the data")
    add("--max_steps", type=positive, help="stop after so many steps (default: all of them)")
    add("--batch_size", type=positive, default=128, help="samples of a step, of all processes")
    add("--micro_batch_size", type=positive, default=4,
        help="samples at once of one process, at most; accumulation follows")
    add("--learning_rate", type=rate, default=1e-3, help="at its highest")
    add("--embedding_learning_rate", type=rate, help="of words (default: --learning_rate)")
    add("--warmup", type=share, default=0.1, help="share of all steps in which the rate rises")

    add("--eval_fraction", type=share, default=0.1, help="share of conversations that is held out")
    add("--eval_path", type=Path,
        help="hold nothing out, but measure on data sets in this folder")
    add("--eval_datasets", nargs="+",
        help="those of --eval_path (default: the same as --datasets)")

    either = parser.add_mutually_exclusive_group().add_argument
    either("--overwrite", action="store_true", help="replace the run that --out holds")
    either("--resume", action="store_true", help="continue it; without a state, begin anew")
    add("--save_every", type=positive, default=500,
        help="steps from one state to resume from to the next")
    add("--save_trained_only", action="store_true",
        help="checkpoints hold what was trained, LoRA as its factors, and where the rest is; the "
             "folders trained from must stay")

    add("--zero_stage", type=int, choices=[0, 1, 2, 3], default=3,
        help="what ZeRO spreads over the processes")
    add("--gradient_checkpointing", action="store_true",
        help="keep each layer's input and compute the rest again in the backward pass: less "
             "memory, more time")
    add("--compile", action="store_true",
        help="make one graph of each layer by torch.compile (default: on a GPU; on a CPU it takes "
             "a C++ compiler and half a minute)")
    add("--no_compile", dest="compile", action="store_false", help="layers as they are written")
    add("--deepspeed_config", type=Path,
        help="a JSON file of DeepSpeed settings, merged over the built-in ones")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="number format (default: float32 on a CPU, else bfloat16 if it has it)")
    add("--workers", type=number(int, 0, 65), default=2,
        help="processes that read pictures, for each that trains")
    add("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    return parse(parser)


@dataclass
class Progress:
    """Where a run stands. A state keeps it beside weights and optimizer; a resumed run goes on."""
    step: int = 0             # steps done
    epoch: int = 0            # counted from 0
    best: float = math.inf    # the lowest held-out loss of an epoch
    rounds_left_out: int = 0  # too long, or too many pictures
    broken: int = 0           # samples of this epoch that another one stands in for


def train(args, progress):
    """The whole of it, in nine steps. progress is main's, which says where it was stopped"""
    # ---- 1. settings and processes ----
    # every process runs this file from here to the end, each on its own part of the data
    (device,), args.dtype = choose_device(own_device(), args.dtype)
    if args.compile is None:
        args.compile = device.type != "cpu"
    check_flags(args)
    deepspeed = start_distributed(device)
    settings = engine_settings(args, accumulation_of(args, dist.get_world_size()))
    log = open_log(args) if is_main() else None

    # ---- 2. data ----
    # which samples an epoch has, and in what order, follows from the seed: it is not saved
    with main_first():
        epochs, held_out = read_data(args)
    steps = [math.ceil(len(samples) / args.batch_size) for samples in epochs]
    total = min(sum(steps), args.max_steps or sum(steps))

    # ---- 3. model ----
    model, tokenizer = make_model(args, device, deepspeed, settings)
    limit_length(args)
    check_fit(epochs[0], tokenizer, model.image_tokens, args)

    # ---- 4. what is trained, at which rate ----
    model.set_trained(everything=args.trainable == "all")
    groups = parameter_groups(model, args)
    trained = sum(size_of(p).numel() for group in groups for p in group["params"])
    if is_main():
        print(f"{sum(size_of(p).numel() for p in model.parameters()):,} parameters, {trained:,} of "
              f"them trained; {len(epochs[0]):,} samples to train on, "
              f"{sum(map(len, held_out)):,} held out; {total:,} steps")

    # ---- 5. engine ----
    if args.compile:
        compile_layers(model, deepspeed, settings)
    factor = partial(schedule, warmup=round(args.warmup * total), total=total)
    with blame(args.deepspeed_config):
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=settings,
                                          lr_scheduler=partial(LambdaLR, lr_lambda=factor))
    if args.zero_stage == 0:
        # in 16 bit DeepSpeed has made a step of zero gradients, which Adam would count as its first
        engine.basic_optimizer.state.clear()

    # ---- 6. resume ----
    # only now is an earlier run replaced: all that can be refused has been read
    resumed = args.resume and saved_step(args.out)
    if log:
        begin_log(log, resumed, args, epochs, held_out, trained)
    if resumed:
        load_state(engine, args.out, progress)
    elif args.checkpoint:
        # on the same data this is the loss that the run it comes from ended with (rounded anew, in
        # 16 bit, where LoRA was merged)
        measure(engine, held_out, tokenizer, args, progress, log, 0)

    # ---- 7. loop ----
    resumed_at = progress.step
    bar = tqdm(total=total, initial=resumed_at, unit="step", disable=not is_main())
    for epoch in range(progress.epoch, args.epochs):
        last = min(total, sum(steps[:epoch + 1]))
        done = progress.step - sum(steps[:epoch])
        if not done:
            progress.epoch, progress.broken = epoch, 0
        loader = batches(epochs[epoch], model, tokenizer, args, done)
        while progress.step < last:
            began = time.perf_counter()
            micro_batches, counts = next_step(loader, args, device)
            rate = engine.get_lr()[0]
            loss = train_step(engine, micro_batches, counts.trained_tokens)
            seconds = time.perf_counter() - began

            progress.step += 1
            progress.rounds_left_out += counts.rounds_left_out
            progress.broken += counts.broken
            must_be_finite(loss, f"loss of step {progress.step}", args)
            check_broken(progress, epochs[epoch])
            log_step(log, engine, bar, progress, loss, rate, counts, seconds)
            # an epoch's last state waits until its weights are measured, and so a good one stays
            if progress.step % args.save_every == 0 and progress.step < last:
                save_state(engine, progress, args)

        # ---- 8. end of an epoch: measure, state, checkpoint, best ----
        held_out_loss = measure(engine, held_out, tokenizer, args, progress, log, epoch + 1)
        if progress.step > resumed_at:
            save_state(engine, progress, args)
        name = f"epoch-{epoch + 1}"
        rest = (args.language_model, args.vision_model) if args.save_trained_only else None
        model.save_pretrained(args.out / name, tokenizer, rest)
        # with nothing held out the last epoch is the best
        if held_out_loss <= progress.best:
            progress.best = held_out_loss
            if is_main():
                write_whole(args.out / "best", name)
        if progress.step == total:
            break

    # ---- 9. end ----
    bar.close()
    if is_main():
        remove(made(args.out, STATE))
        # unless somebody's copy lies there
        with suppress(OSError):
            (args.out / "state").rmdir()
        print(f"{progress.step} steps; {progress.rounds_left_out} rounds left out (--max_length, "
              f"--max_images); the model is in {args.out}/best")
    dist.destroy_process_group()


def train_step(engine, micro_batches, trained_tokens):
    """One step: micro-batches forward and backward, then the optimizer -> the step's loss.

    It is the mean over all trained tokens of the global batch, those of all micro-batches of all
    processes; not a mean of means, in which the tokens of a short answer would weigh more.
    trained_tokens: how many there are."""
    total = torch.zeros((), device=engine.device)
    # DeepSpeed takes the loss of a micro-batch for a mean: it divides it by the number of
    # micro-batches, and averages gradients over the processes. Both are undone by this factor
    undo = engine.gradient_accumulation_steps() * dist.get_world_size()
    for batch in micro_batches:
        losses, _ = engine(**batch)                                         # (labels)
        engine.backward(losses.sum() * (undo / max(trained_tokens, 1)))
        # changes the weights after the last micro-batch; before, it only counts them
        engine.step()
        total += losses.detach().sum()
    dist.all_reduce(total)
    return total.item() / max(trained_tokens, 1)


def log_step(log, engine, bar, progress, loss, rate, counts, seconds):
    """A step in the log and in the bar"""
    # a step in which nothing was to be learned has no loss
    write(log, engine, progress, epoch=progress.epoch + 1,
          loss=loss if counts.trained_tokens else None, learning_rate=rate, **counts._asdict(),
          seconds=round(seconds, 4))
    bar.set_postfix_str(f"loss {loss:.4f}, rate {rate:.2e}, {counts.tokens / seconds:.0f} tokens/s")
    bar.update()


def schedule(step, warmup, total):
    """What the learning rates of a step, counted from 0, are multiplied by: up a line to 1 in
    `warmup` steps, then down a cosine to 0 at `total`"""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def parameter_groups(model, args):
    """What is trained, for the optimizer: the word embedding, which may have a rate of its own,
    and the rest"""
    embedding = model.language_model.model.embed_tokens.weight
    others = [p for p in model.parameters() if p.requires_grad and p is not embedding]
    rate = args.embedding_learning_rate
    if rate is None:
        rate = args.learning_rate
    return [{"params": others, "lr": args.learning_rate}, {"params": [embedding], "lr": rate}]


# ---- the batches of a step -----------------------------------------------------------------------

class Counts(NamedTuple):
    """What is counted of a step, over all of its micro-batches on all processes"""
    trained_tokens: int
    tokens: int
    rounds_left_out: int
    broken: int


def accumulation_of(args, world):
    """How many micro-batches each of `world` processes computes in a step"""
    return math.ceil(args.batch_size / (args.micro_batch_size * world))


def deal(conversations, args, rank, world, done=0):
    """-> the indices of the samples of each micro-batch of one process, after `done` steps; some
    lists are empty.

    A micro-batch is as long as its longest sample. Which sample of a step sits in which of them
    changes nothing but rounding, since the loss is the mean over the whole step: so the samples of
    a step are sorted by size, the largest first, and each accumulation round takes a run of them,
    each process a part of it. Then all work on like sizes."""
    def size(index):
        turns = conversations[index]
        letters = sum(len(turn.question) + len(turn.answer) for turn in turns)
        return len(pictures_of(turns)), letters

    parts = world * accumulation_of(args, world)
    for start in range(0, len(conversations), args.batch_size)[done:]:
        step = range(len(conversations))[start:start + args.batch_size]
        step = sorted(step, key=size, reverse=True)
        share = math.ceil(len(step) / parts)
        for part in range(rank, parts, world):
            yield step[part * share:(part + 1) * share]


def batches(conversations, model, tokenizer, args, done=0):
    """An iterator of this process's micro-batches after `done` steps, read by workers; equally many
    for all processes"""
    world = dist.get_world_size()
    samples = Samples(conversations, tokenizer, model.image_tokens, model.preprocessing,
                      args.max_length, args.max_images)
    # a whole sample of one black picture, without an answer to train
    dummy = encode([Turn("", None, ["dummy"])], tokenizer, model.image_tokens)
    side = model.vision_model.config.image_size
    dummy.pixels = [torch.zeros(3, side, side)]                             # (3, S, S)
    options = {} if not args.workers else {
        # a step takes all of its micro-batches before the first is computed: meanwhile the workers
        # read those of the next step
        "prefetch_factor": max(2, math.ceil(accumulation_of(args, world) / args.workers)),
        # workers share the data sets instead of having copies of them
        "multiprocessing_context": "fork",
        # seconds, rather than to wait for ever for one that stands still
        "timeout": 600}
    return iter(DataLoader(
        samples, batch_sampler=deal(conversations, args, dist.get_rank(), world, done),
        num_workers=args.workers, collate_fn=partial(finish_batch, dummy=dummy), **options))


def finish_batch(examples, dummy):
    """Examples of a micro-batch -> (what VisualChat.forward takes, Counts of it)"""
    counts = Counts(
        trained_tokens=sum(int((example.labels[1:] != -100).sum()) for example in examples),
        tokens=sum(len(example.input_ids) for example in examples),
        rounds_left_out=sum(example.left_out for example in examples),
        broken=sum(example.broken for example in examples))
    # under ZeRO-3 all processes must run the same modules, as often: one without a picture would
    # leave the others waiting in the vision tower
    if not any(example.images for example in examples):
        examples = [*examples, dummy]
    batch = collate(examples)
    if get_worker_info():
        # else the thread that sends the batch would do it, and what fails there (in a container
        # whose /dev/shm is small) nobody hears of: the run would wait for a batch that never comes
        for tensor in batch.values():
            tensor.share_memory_()
    return batch, counts


def next_step(loader, args, device):
    """-> this process's micro-batches of the next step, on its device; Counts of all processes"""
    micro_batches, counts = zip(*islice(
        loader, accumulation_of(args, dist.get_world_size())))
    counts = torch.tensor(counts, device=device).sum(0)                     # (4)
    dist.all_reduce(counts)
    micro_batches = [{name: tensor.to(device) for name, tensor in batch.items()}
                     for batch in micro_batches]
    return micro_batches, Counts(*counts.tolist())


# ---- how good it is ------------------------------------------------------------------------------

class Score(NamedTuple):
    """What is measured on a data set, summed over all processes"""
    loss: float     # of all trained tokens
    tokens: float   # how many there are
    exact: float    # answers that are right in every token
    answers: float  # how many there are


@torch.no_grad()
def evaluate(engine, samples, tokenizer, args):
    """Held-out samples -> Score. An answer is exact if each of its tokens, the end token too, is
    the model's first choice after those before it: what greedy decoding would say, without
    generating."""
    engine.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)        # (4)
    loader = batches(samples, engine.module, tokenizer, args)
    for _ in range(0, len(samples), args.batch_size):
        micro_batches, _ = next_step(loader, args, engine.device)
        for batch in micro_batches:
            losses, hits = engine(**batch)                                  # (labels), (labels)
            # Two answers, "a cat </s>" and "no </s>", whose "no" is not the first choice:
            #   trained   . . 1 1 1 . . 1 1     labelled tokens, in their places
            #   first     . . 1 . . . . 1 .     those that none stands before
            #   starts        0         3       their places among the labels
            #   hits          1 1 1     0 1     split there: "a cat </s>" is exact
            trained = batch["labels"][:, 1:] != -100                        # (B, T - 1)
            first = trained & ~F.pad(trained, (1, 0))[:, :-1]               # (B, T - 1)
            starts = first[trained].nonzero()[:, 0].cpu()                   # (answers)
            exact = [bool(answer.all()) for answer in hits.tensor_split(starts)[1:]]
            sums += sums.new_tensor([losses.sum(), len(losses), sum(exact), len(exact)])
    dist.all_reduce(sums)
    engine.train()
    return Score(*sums.tolist())


def measure(engine, held_out, tokenizer, args, progress, log, epoch):
    """Evaluate after an epoch, or before the first (0), for log and terminal -> the mean held-out
    loss, inf if nothing is held out"""
    scores = [evaluate(engine, samples, tokenizer, args) for samples in held_out]
    both = Score(*map(sum, zip([0] * 4, *scores)))
    if not both.answers:
        return math.inf
    loss = both.loss / both.tokens
    must_be_finite(loss, f"held-out loss after step {progress.step}", args)
    exact = both.exact / both.answers
    shares = {samples.sets[0].name: score.exact / score.answers
              for samples, score in zip(held_out, scores) if score.answers}
    write(log, engine, progress, epoch=epoch, eval_loss=loss, eval_exact=exact,
          eval_exact_of=shares)
    if log:
        tqdm.write(f"epoch {epoch}: held-out loss {loss:.4f}, exact match {exact:.2%}")
        for name, share in shares.items() if len(shares) > 1 else ():
            tqdm.write(f"    {Path(name).stem:22}{share:8.2%}")
    return loss


# ---- what serves it: the model, and what cannot be right -----------------------------------------

def make_model(args, device, deepspeed, settings):
    """-> VisualChat of the vision tower and the language model in their folders, and its Tokenizer.
    What joins the two is new, or that of --checkpoint.

    How 70B get into 8 GPUs under ZeRO-3: in the context zero.Init each parameter that is made is
    cut into 8 parts at once. `fill` (model.py) then takes tensor after tensor from the files:
    process 0 reads it, the parameter is gathered for that moment, and each process keeps its part.
    So none ever holds more than an eighth, 18 GB in 16 bit, and one tensor. (What was trained alone
    is read whole by each.)"""
    spread = nullcontext()
    options = {}
    if args.zero_stage == 3:
        with blame(args.deepspeed_config):
            spread = deepspeed.zero.Init(config_dict_or_path=settings)
        options = {"empty": lambda: spread}
    vision = load_vit(args.vision_model, args.dtype, device, args.feature_layer, args.class_token,
                      **options)
    language = load_llama(args.language_model, args.dtype, [device], **options)
    tokenizer = Tokenizer(args.language_model / "tokenizer.model")
    if len(tokenizer) > language.config.vocab_size:
        raise InputError(f"{tokenizer.file} has {len(tokenizer)} pieces, the language model only "
                         f"{language.config.vocab_size} embeddings: they do not belong together")
    # loading under zero.Init has drawn numbers
    torch.manual_seed(args.seed + 1)
    with spread:
        model = VisualChat(vision, language, args.attention, args.projection)
        add_lora(language.model.layers, args.lora_rank)
        add_lora(vision.blocks, args.vision_lora_rank)
    if args.checkpoint:
        model.load_joint(args.checkpoint)
    elif is_main() and list(args.language_model.parent.glob("projection*.safetensors")):
        print("the projection begins anew; --checkpoint "
              f"{args.language_model.parent} goes on with the one there")
    language.model.gradient_checkpointing = args.gradient_checkpointing
    vision.gradient_checkpointing = args.gradient_checkpointing
    model.preprocessing = read_preprocessing(args.vision_model, vision.config.image_size)
    if args.zero_stage < 3:
        model.to(device=device, dtype=args.dtype)
    return model, tokenizer


def check_flags(args):
    """InputError for flags that contradict each other"""
    if args.trainable == "all" and (
            args.lora_rank or args.vision_lora_rank or args.save_trained_only):
        raise InputError("--trainable all trains every weight: --lora_rank, --vision_lora_rank and "
                         "--save_trained_only are for frozen ones")


def check_broken(progress, samples):
    """InputError if too many samples of the epoch have a picture that cannot be read"""
    if progress.broken > BROKEN * len(samples):
        raise InputError(f"{progress.broken} samples of this epoch have a picture that cannot be "
                         f"read, more than {BROKEN:.0%}; it is said above which")


def must_be_finite(loss, name, args):
    """InputError if a loss is no finite number"""
    if not math.isfinite(loss):
        raise InputError(f"the {name} is {loss}: begin anew with a lower --learning_rate or a "
                         f"longer --warmup (and --overwrite); {what_stays(args.out)}")


# ---- processes and DeepSpeed ---------------------------------------------------------------------

def own_device():
    """The name of this process's device: the GPU of its LOCAL_RANK, or "cpu"; InputError if others
    have all GPUs.

    An Apple GPU is none here: gloo, by which processes talk, and float64 do not work on it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank >= torch.accelerator.device_count():
        raise InputError(f"process {rank} of this machine has no GPU of its own (found: "
                         f"{torch.accelerator.device_count()}). Start fewer (deepspeed "
                         "--num_accelerators N); without a number there is one for each GPU")
    # before the first tensor: else each process would open GPU 0 too, which takes 0.5 to 1 GB of it
    torch.accelerator.set_device_index(rank)
    return f"{accelerator.type}:{rank}"


def start_distributed(device):
    """DeepSpeed's process group, without a launcher a group of one -> the module deepspeed"""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT="0")
    # minutes that processes wait for each other: the first may index tens of gigabytes meanwhile
    os.environ.setdefault("DEEPSPEED_TIMEOUT", "60")
    if device.type == "cpu":
        # else DeepSpeed would take an Apple GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # the processes of a machine share its cores
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // int(
                os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))))
    # each tensor that comes from a worker is an open file, and a step holds hundreds; most shells
    # allow 1,024, and macOS no more than 10,240
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(allowed, min(most, 10240)), most))
    # a matter between DeepSpeed and torch
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    deepspeed.utils.logger.setLevel("WARNING")
    if device.type == "cpu":
        # it would compile an operation that serves inference alone: that takes a compiler and half
        # a minute, and a start that is killed meanwhile leaves a lock on which every later one
        # waits
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistError as error:
        raise InputError(f"the processes cannot meet at {os.environ['MASTER_ADDR']}:"
                         f"{os.environ['MASTER_PORT']}; if another run is there, deepspeed "
                         f"--master_port N takes another port ({reason_of(error)})") from error
    return deepspeed


@contextmanager
def main_first():
    """What stands in this context is done by process 0, then by the others"""
    if not is_main():
        dist.barrier()
    yield
    if is_main():
        dist.barrier()


# what a flag says must not stand in --deepspeed_config: there it would be said twice
SET_BY = {
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "activation_checkpointing": "gradient_checkpointing",
    "scheduler": "warmup",
    "zero_optimization.stage": "zero_stage",
    "optimizer.params.lr": "learning_rate",
    "bf16.enabled": "dtype",
    "fp16.enabled": "dtype"}
# DeepSpeed passes over other names at the top without a word; below it names them
KNOWN = """zero_optimization optimizer bf16 fp16 data_types aio checkpoint comms_logger
    flops_profiler timers tensorboard wandb comet csv_monitor communication_data_type
    gradient_clipping prescale_gradients gradient_predivide_factor zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown memory_breakdown
    dump_state""".split()


def engine_settings(args, accumulation):
    """DeepSpeed's settings: the recipe's, and over them those of --deepspeed_config"""
    settings = {
        "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.zero_stage},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": args.learning_rate,
                "betas": [0.9, 0.95],
                "weight_decay": 0.0,
                # DeepSpeed's own would have to be compiled
                "torch_adam": True}},
        "bf16": {"enabled": args.dtype == torch.bfloat16},
        "fp16": {"enabled": args.dtype == torch.float16}}
    file = args.deepspeed_config
    return merge(settings, read_config(file), file) if file else settings


def merge(ours, theirs, file, above=""):
    """Settings over settings, object by object; an optimizer of another "type" is taken whole.
    "auto" leaves a setting to the flags or to DeepSpeed, as in files for transformers"""
    merged = dict(ours) if theirs.get("type") in (ours.get("type"), "auto", None) else {}
    for name, value in theirs.items():
        if value in ("auto", None):
            continue
        if above + name in SET_BY:
            raise InputError(f"{file}: {above}{name} is set by --{SET_BY[above + name]}, take it "
                             "out of the file")
        if not above and name not in KNOWN:
            raise InputError(f"{file}: {name} is not known to DeepSpeed, or has no effect here")
        if isinstance(value, dict):
            value = merge(merged.get(name, {}), value, file, f"{above}{name}.")
        merged[name] = value
    return merged


@contextmanager
def blame(file):
    """What DeepSpeed refuses is an InputError that names the file of its settings"""
    try:
        yield
    except RuntimeError:  # of memory or communication
        raise
    except Exception as error:
        raise InputError(f"{file or 'DeepSpeed'}: {reason_of(error)}") from error


def compile_layers(model, deepspeed, settings):
    """Make one graph of each layer's forward, so that norms, rotation and casts are fused with what
    they stand between.

    Under ZeRO-3 the hooks by which every Linear gathers its weights would cut it: so each layer is
    made a leaf, which gathers all of its own before its forward."""
    # train and evaluate, batches of one: a few graphs each
    torch._dynamo.config.recompile_limit = 64
    blocks = model.vision_model.blocks
    layers = [*model.language_model.model.layers, *blocks, *(model.cross_attention or [])]
    for layer in layers:
        deepspeed.utils.set_z3_leaf_module(layer, True)
        # lengths change from batch to batch
        layer.forward = torch.compile(layer.forward, dynamic=True)
    if any(p.requires_grad for p in blocks.parameters()):
        # DeepSpeed takes a leaf's gradients when that of its input has come: LoRA's first block
        # needs one there too
        blocks[0].register_forward_pre_hook(lambda block, inputs: inputs[0].requires_grad_())
    # a leaf waits for all of its weights at once: so those of the next are fetched while it is at
    # work. DeepSpeed's own sizes are a quarter of a 7B layer, and 1.2 layers of 70B
    largest = max(sum(size_of(p).numel() for p in layer.parameters()) for layer in layers)
    ahead = {"stage3_prefetch_bucket_size": largest,
             "stage3_max_live_parameters": max(10 ** 9, 3 * largest)}
    settings["zero_optimization"] = ahead | settings["zero_optimization"]


# ---- the folder of a run -------------------------------------------------------------------------
#   log.jsonl   what the run is, then a line for each step and each epoch; locked while it runs
#   epoch-N/    checkpoints; best is a file with the name of the best of them
#   state/      step-N/, DeepSpeed's state, and latest, a file that names it; gone at the run's end
#
# After a step the log gets a line, and every --save_every steps there is a state: DeepSpeed's
# files, then latest by a rename, then the state before is removed. At the end of an epoch come the
# scores, a state, the checkpoint (written beside and renamed) and best. So a kill at any moment
# leaves the last state whole. --resume compares what the run is with the first line of the log
# (`begin_log`; flags in FREE may differ), and takes up the weights that are trained, the optimizer,
# the schedule and Progress; frozen weights come from their folders again, the order of the data
# from the seed. Where no state was saved it begins anew.

def open_log(args):
    """Make the folder of the run -> its log, locked; InputError if it holds what must stay"""
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log.jsonl", "a+")
    try:
        # until this process ends, however it ends. (The system drops it, too, when the process
        # closes any file of that name: so the log is opened once, here)
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # systems differ in which of them
        raise InputError(f"another run is at work in --out {out}: name another folder") from error
    except OSError as error:
        print(f"--out {out} cannot be locked ({reason_of(error)}): take care that no other run "
              "writes there")
    # a run that has ended has epochs and no state
    ended = list(out.glob("epoch-*")) and not saved_step(out)
    earlier = made(out, MADE)
    # opened to append, the log says by its position how long it is
    if (log.tell() or earlier) and not (args.overwrite or args.resume and not ended):
        raise InputError(f"--out {out} already holds a run; name another folder, or add "
                         "--overwrite to replace it or, if it was interrupted, --resume to "
                         "continue it")
    for folder in (*bases(args.language_model), *bases(args.vision_model)):
        if any(folder.resolve().is_relative_to(path) for path in earlier):
            raise InputError(f"{folder} lies in --out {out}, which this run would replace; name "
                             "another folder")
    return log


# what a run makes; a copy that somebody has made, such as epoch-2-backup, is left alone
STATE = r"state/(latest|step-\d+|zero_to_(fp32|torch)\.py)"
MADE = rf"best|epoch-\d+|\..*\.unfinished|{STATE}"


def made(out, names):
    """What a run has made in its folder under these names; latest before the state, so that a half
    of one, while it is removed, is never taken for the whole"""
    out = out.resolve()
    paths = sorted([*out.glob("*"), *out.glob("state/*")])
    return [path for path in paths if re.fullmatch(names, str(path.relative_to(out)))]


def remove(paths):
    """Remove files and folders"""
    for path in paths:
        # a link is removed, not what it leads to
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# flags that change no step of a run, or nothing but its rounding
FREE = ["--out", "--resume", "--overwrite", "--save_every", "--save_trained_only", "--workers",
        "--micro_batch_size", "--gradient_checkpointing", "--local_rank"]


def begin_log(log, resumed, args, epochs, held_out, trained):
    """Replace an earlier run and write what this one is; if it is resumed, see that it is the
    same"""
    now = {f"--{name}": str(value) for name, value in vars(args).items()}
    if args.deepspeed_config:
        now["--deepspeed_config"] = str(read_config(args.deepspeed_config))
    # other data and other models are known by their numbers
    now["number of processes (--num_accelerators)"] = str(dist.get_world_size())
    now["number of trained parameters"] = str(trained)
    now["numbers of samples"] = str([len(samples) for samples in (*epochs, *held_out)])
    if resumed:
        log.seek(0)
        before = json.loads(log.readline() or "{}")
        for name in now:
            if name not in FREE and before.get(name) != now[name]:
                raise InputError(f"--resume: the {name} was {before.get(name)}, here it is "
                                 f"{now[name]}; make it the same again, or begin anew with "
                                 "--overwrite")
        return
    remove(made(args.out, MADE))
    log.truncate(0)
    print(json.dumps({"step": 0, **now}), file=log, flush=True)


def write(log, engine, progress, **values):
    """A line of the log, where there is one. After --resume some steps come twice: the later line
    is what holds. Its numbers also go to the monitors of --deepspeed_config (TensorBoard,
    csv_monitor, ...), as DeepSpeed's own do: over the count of samples"""
    if log:
        print(json.dumps({"step": progress.step, **values}), file=log, flush=True)
    engine.monitor.write_events([
        (f"Train/Samples/{name}", value, engine.global_samples)
        for name, value in values.items()
        if isinstance(value, int | float)])


def saved_step(out):
    """The step of the last state in a run's folder, as text; "" if there is none"""
    latest = out / "state/latest"
    return latest.read_text().removeprefix("step-") if latest.exists() else ""


def what_stays(out):
    """What is left of a run that stops, as the end of a sentence"""
    step = saved_step(out)
    return f"--resume goes on from step {step}" if step else "no state was saved"


def save_state(engine, progress, args):
    """DeepSpeed's checkpoint of this moment, without frozen weights, in the place of the last"""
    folder = args.out / "state"
    name = f"step-{progress.step}"
    try:
        engine.save_checkpoint(folder, name, client_state={"progress": vars(progress)},
                               save_latest=False, exclude_frozen_parameters=True)
        # it ended with a barrier, every process has written its part: now, and not before, it is
        # the latest. (DeepSpeed's own way of naming it could be cut in the middle)
        if is_main():
            write_whole(folder / "latest", name)
            remove(path for path in made(args.out, r"state/step-\d+")
                   if path.name != name)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when a disk is full
        raise InputError(f"the state of step {progress.step} cannot be written to {folder} (is the "
                         f"disk full?): {reason_of(error)}") from error


def load_state(engine, out, progress):
    """Take up the last state: weights that are trained, optimizer, schedule and progress"""
    try:
        # frozen weights are not in it
        _, state = engine.load_checkpoint(out / "state", load_module_strict=False)
        vars(progress).update(state["progress"])
    except Exception as error:  # of a damaged file anything
        raise InputError(f"{out}/state cannot be read: {reason_of(error)}") from error


# ---- the command ---------------------------------------------------------------------------------

def sentence_of(error, args):
    """What is said of an error that the user can mend; None for others"""
    text = str(error)
    if out_of_memory(error):
        return ("out of memory; less is needed with a lower --micro_batch_size (now "
                f"{args.micro_batch_size}), a lower --max_length (now {args.max_length}), or "
                f"--gradient_checkpointing (now {'on' if args.gradient_checkpointing else 'off'})")
    if "shared memory(shm)" in text or "out of shared memory" in text:
        return (f"/dev/shm is too small for what --workers {args.workers} read ahead: make it "
                "larger (docker run --shm-size 8g), or do without them (--workers 0)")
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return (f"a layer cannot be compiled: {reason_of(error)}; --no_compile computes it as it "
                "is written")
    if isinstance(error, OSError):  # mostly a full disk
        return f"{error.filename or args.out}: {reason_of(error)}"
    return text if isinstance(error, InputError) else None


def main():
    """Run; what the user can mend is one sentence on stderr and exit code 2"""
    args = command_line()
    progress = Progress()
    rank = int(os.environ.get("RANK", 0))
    stops = signal.SIGINT, signal.SIGTERM
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a terminal lacks a character

    def stop(*_):
        """Say where the run stood, and end at once: an exception could be caught on its way"""
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # the launcher sends one more
        if not multiprocessing.parent_process():  # the workers that read pictures come here too
            sentence = f"\ntrain.py: stopped at step {progress.step}; {what_stays(args.out)}\n"
            # Python's own stderr may be in the middle of a line
            os.write(2, sentence.encode())
        os._exit(130)

    # Ctrl-C, and the signal that the launcher then sends. Only process 0 has something to say. The
    # system ends the others at once, also while they wait for a GPU, where no Python runs. (Process
    # 0 may wait there, too; then the launcher ends it, and nothing is said)
    for kind in stops:
        signal.signal(kind, signal.SIG_DFL if rank else stop)
    try:
        train(args, progress)
    except Exception as error:
        if rank:
            time.sleep(5)  # process 0 says what happens to all, and the launcher stops the others
        sentence = sentence_of(error, args)
        if sentence is None:
            raise
        tqdm.write(printable(f"train.py: {sentence}"), file=sys.stderr)
        os._exit(2)  # at once: what is tidied up at an exit would wait for the other processes


if __name__ == "__main__":
    main()
