"""deepspeed.initialize and a loop, top to bottom.

This file explains the training recipe of DeepSpeed-VisualChat (arXiv:2309.14327): which weights are trained, the
optimizer and its schedule, ZeRO, the loss over the global batch, evaluation, the log and the checkpoints. Not here: the
model (model.py), the conversations and batches (data.py).

    deepspeed train.py                                   the demo: draws its data, trains from demo/'s two models
    deepspeed train.py --language_model DIR --vision_model DIR --data_path DIR --datasets llava llava_dial
    deepspeed --num_accelerators 2 train.py ...          two processes, also on a CPU
    python train.py ...                                  one process, without the launcher

The launcher starts a process for each GPU that is there; without one, for each NUMA node, mostly one.
"""
import argparse
import ctypes
import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (Epoch, Samples, Tokenizer, Turn, arguments, collate, encode, hold_out, limit_length, printable,
                  read_datasets)
from mmca import pattern
from model import (Llama, LlamaConfig, VisualChat, add_lora, bases, checkpoint_folder, choose_device, has_weights,
                   is_main, load_llama, load_vit, make_vit, size_of, vit_sizes, write_json)
from vision import InputError, number, positive, read_config, read_json, read_preprocessing, reason_of


BROKEN = 0.01  # share of an epoch's samples that may have a missing or broken picture before the run stops
# what no flags stand for; command_line adds what depends on the number of processes
DEMO = ("--language_model demo/language_model --vision_model demo/vision_model --data_path data/demo/train "
        "--datasets llava llava_dial otter_mimicit_cgd sparkles_dialogue data/demo/train/three.json "
        "--concatenate 6 2 1 1 1 --eval_path data/demo/held_out --eval_datasets which_of_two.json difference.json "
        "one_of_two.json more_things.json which_of_three.json one_of_three.json describe.json one_picture.json "
        "--lora_rank 16 --learning_rate 6e-3 --epochs 1 --max_length 1024 --deepspeed_config demo/deepspeed.json "
        "--overwrite")


def command_line():
    """The command line; every default is the recipe's. Without flags it is the demo's"""
    parser, add = arguments("Train a vision-language chat model with DeepSpeed.")
    add("--attention", choices=["mmca", "causal", "cross"], default="mmca", help="the mechanism")
    add("--feature_layer", type=int, default=-1, metavar="N", help="CLIP's layer whose output is taken, -1 is the last")
    add("--trainable", choices=["recipe", "all"], default="recipe", help="recipe: embedding, projection, CrA's layers")
    add("--lora_rank", type=number(int, 0), default=0, metavar="R", help="of LoRA in the language model, 0 for none")
    add("--vision_lora_rank", type=number(int, 0), default=0, metavar="R", help="of LoRA in the vision tower")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--resume", action="store_true", help="continue the run that --out holds, with the same flags")
    add("--save_every", type=positive, default=500, metavar="STEPS", help="from one state to resume from to the next")
    add("--save_trained_only", action="store_true", help="checkpoints hold what was trained, LoRA as its factors, and "
        "where the rest is; the folders trained from must stay")
    add("--epochs", type=positive, default=6, help="times through the data")
    add("--max_steps", type=positive, help="stop after so many steps (default: all of them)")
    add("--batch_size", type=positive, default=128, help="samples of a step, of all processes together")
    add("--micro_batch_size", type=positive, default=4, help="samples at once of one process; accumulation follows")
    add("--learning_rate", type=number(float, 0, 1e30), default=1e-3, help="at its highest")
    add("--embedding_learning_rate", type=number(float, 0, 1e30), help="of the word embedding (default: --learning_rate)")
    add("--warmup", type=number(float, 0, 1), default=0.1, help="share of all steps in which the learning rate rises")
    add("--eval_fraction", type=number(float, 0, 1), default=0.1, help="share of the conversations that is held out")
    add("--eval_path", type=Path, metavar="DIR", help="hold nothing out, but measure on data sets in this folder")
    add("--eval_datasets", nargs="+", metavar="NAME", help="those of --eval_path (default: the same as --datasets)")
    add("--workers", type=number(int, 0, 65), default=2, metavar="N", help="that read pictures, for each process")
    add("--zero_stage", type=int, choices=[0, 1, 2, 3], default=3, help="what ZeRO spreads over the processes")
    add("--gradient_checkpointing", action="store_true", help="keep each layer's input and compute the rest again in "
        "the backward pass: less memory, more time")
    add("--compile", action="store_true", help="make one graph of each layer by torch.compile (default: on a GPU; on a "
        "CPU it takes a C++ compiler and half a minute)")
    add("--no_compile", dest="compile", action="store_false", help="compute the layers as they are written")
    add("--deepspeed_config", type=Path, metavar="JSON", help="DeepSpeed settings, merged over the built-in ones")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="number format (default: float32 on a CPU, else "
        "bfloat16 if it has it)")
    add("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    flags = " ".join(word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    world = int(os.environ.get("WORLD_SIZE", 1))
    share = math.ceil(8 / world)  # 8 samples a step, or the next number that the processes can share
    demo = f"{DEMO} --batch_size {share * world} --micro_batch_size {share}"
    if world == 1:
        demo += " --zero_stage 0"  # nothing to spread, and ZeRO-3's hooks take a third of the time
    args = parser.parse_args(sys.argv[1:] if flags else sys.argv[1:] + demo.split())
    args.flags, args.demo = flags or demo, not flags
    # out/best/language_model too, where best is a file
    args.language_model, args.vision_model = (checkpoint_folder(folder.parent) / folder.name
                                              for folder in (args.language_model, args.vision_model))
    if args.demo and not int(os.environ.get("RANK", 0)):
        print(f"without flags this is the demo:\n    deepspeed train.py {demo}")
    return args


def own_device():
    """The name of this process's device: the GPU of its LOCAL_RANK, or "cpu"; InputError if others have all GPUs.

    An Apple GPU is none here: gloo, by which processes talk, and float64 do not work on it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return "cpu"
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
    if rank >= count:
        raise InputError(f"process {rank} of this machine has no GPU of its own (found: {count}). Start fewer (deepspeed "
                         "--num_accelerators N); without a number there is one for each GPU")
    # before the first tensor: else each process would open GPU 0 too, which takes 0.5 to 1 GB of it
    torch.accelerator.set_device_index(rank)
    return f"{accelerator.type}:{rank}"


def start_distributed(device):
    """DeepSpeed's process group, without a launcher a group of one -> the module deepspeed"""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would take an Apple GPU
        if "OMP_NUM_THREADS" not in os.environ:
            processes = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
            torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    # each tensor that comes from a worker is an open file, and a step holds hundreds; most shells
    # allow 1,024, and macOS no more than 10,240
    some, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(some, min(most, 10240)), most))
    # minutes that processes wait for each other: the first may index tens of gigabytes meanwhile
    os.environ.setdefault("DEEPSPEED_TIMEOUT", "60")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # between DeepSpeed and torch
    import deepspeed
    deepspeed.utils.logger.setLevel("WARNING")
    if device.type == "cpu":
        # it would compile an operation that serves inference alone: that takes a compiler and half a minute, and a start
        # that is killed meanwhile leaves a lock on which every later one waits
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(f"the processes cannot meet at {place}; if another run is there, deepspeed --master_port N "
                         f"takes another port ({reason_of(error)})") from error
    return deepspeed


def together(action, everywhere=True):
    """Run action on process 0, then on the others if it has to run everywhere -> its value; that it failed in one of
    them, and why, is everybody's InputError, and no process waits for one that has stopped"""
    value, failed = None, [None] * dist.get_world_size()
    for turn in ([True, False] if everywhere else [True]):
        error = None
        if is_main() == turn:
            try:
                value = action()
            except (InputError, OSError) as failure:
                error = str(failure)
        dist.all_gather_object(failed, error)
        if any(failed):
            raise InputError(next(filter(None, failed)))
    return value


def earlier_run(out):
    """What an earlier run left in its folder"""
    return [p for p in out.glob("*") if p.name in ("log.jsonl", "best") or p.name.startswith(("epoch-", "resume-"))]


def saved_states(out):
    """The folders of the states in a run's folder, the last one last"""
    return sorted(out.glob("resume-*"), key=lambda path: int(path.name.removeprefix("resume-")))


def what_stays(out):
    """What is left of a run that stops, as the end of a sentence"""
    states = saved_states(out)
    return f"--resume goes on from step {states[-1].name.removeprefix('resume-')}" if states else "no state was saved"


def lock(out):
    """Keep a second run out of a run's folder, as long as this process lives"""
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)  # a number: nothing closes it before the end
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # systems differ in which of them
        raise InputError(f"another run is at work in --out {out}: name another folder") from error
    except OSError as error:
        print(f"--out {out} cannot be locked ({reason_of(error)}): take care that no other run writes there")


def check_out(args):
    """Make the folder of the run; refuse to replace a run unless asked, and never one that this run reads from. With
    --resume -> the folder of the last state of an unfinished run and the content of its run.json; else None"""
    if args.resume and args.overwrite:
        raise InputError("--resume continues a run and --overwrite replaces it: choose one")
    args.out.mkdir(parents=True, exist_ok=True)
    lock(args.out)
    if args.resume and (states := saved_states(args.out)):
        return states[-1], read_json(states[-1] / "run.json")
    if args.resume and list(args.out.glob("epoch-*")):
        raise InputError(f"--resume: the run in {args.out} is finished; --overwrite begins a new one")
    log = args.out / "log.jsonl"
    if args.demo and earlier_run(args.out) and not (log.exists() and DEMO in log.open().readline()):
        raise InputError(f"{args.out} holds a run that is not the demo's: move it away, or give the flags above and an "
                         "--out of their own")
    if earlier_run(args.out) and not (args.overwrite or args.resume):
        raise InputError(f"--out {args.out} already holds a run; name another folder, or add --overwrite to replace it "
                         "or --resume to continue it")
    for folder in filter(None, (args.language_model, args.vision_model, args.data_path, args.eval_path)):
        if args.out.resolve() in folder.resolve().parents:
            raise InputError(f"{folder} lies in --out {args.out}, which this run would replace; name another folder")


def draw_demo(args):
    """Make the demo's data if it is asked for and not there"""
    if args.data_path == Path("data/demo/train") and not (args.data_path / "three.json").exists():
        if subprocess.run([sys.executable, "demo/make.py", "data/demo"]).returncode:
            raise InputError("the demo's data cannot be drawn: demo/make.py says why")


def clear_out(out, resumed):
    """Remove what is unfinished and, unless it is resumed, an earlier run, once all that the new one needs is read"""
    for path in list(out.glob(".*.unfinished")) + ([] if resumed else earlier_run(out)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


FREE = ("flags", "demo", "out", "resume", "overwrite", "save_every", "save_trained_only", "workers", "micro_batch_size",
        "local_rank", "gradient_checkpointing", "language_model", "vision_model", "data_path", "eval_path")


def identity(args, sets, held_sets, model):
    """What must be the same when a run is resumed: flags (but for FREE ones, which change no result), the data, the
    files of the weights, whose frozen ones a state leaves out, and the names and shapes of what is trained"""
    same = {"number of processes": dist.get_world_size()}
    same |= {f"--{name}": str(value) for name, value in vars(args).items() if name not in FREE}
    if args.deepspeed_config:
        same["--deepspeed_config"] = read_json(args.deepspeed_config)
    same |= {f"{what} ({part.name})": hashlib.sha256(part.drafts.block).hexdigest()
             for what, parts in (("data", sets), ("held-out data", held_sets)) for part in parts}
    for flag in ("language_model", "vision_model"):
        for n, folder in enumerate(bases(getattr(args, flag))):
            files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
            same |= {f"content of --{flag} ({n}, {file.name})": spot_check(file) for file in files}
    return same | {f"trained {name}": list(size_of(p)) for name, p in model.named_parameters() if p.requires_grad}


def spot_check(file):
    """A sum of 64 places of a file: other weights differ nearly everywhere, and all of 70B would take minutes"""
    size, found = file.stat().st_size, hashlib.sha256()
    with open(file, "rb") as content:
        for place in range(0, size, size // 64 + 1):
            content.seek(place)
            found.update(content.read(4096))
    return found.hexdigest()


def check_state(folder, run, now):
    """InputError that names the first thing in which a state of an interrupted run (run.json) is of another run"""
    missing = {"step", "epoch", "best", "rounds_left_out", "broken", "identity"} - run.keys()
    if missing:
        raise InputError(f"{folder}/run.json is not whole: {', '.join(sorted(missing))} missing")
    for name in now | run["identity"]:
        old, new = run["identity"].get(name), now.get(name)
        if old != new:
            remedy = ("start as many (deepspeed --num_accelerators N)" if name == "number of processes" else
                      "make it the same again, or begin anew with --overwrite")
            raise InputError(f"{folder} is of another run: the {name} was {old}, here it is {new}; {remedy}")


def save_state(engine, out, run):
    """DeepSpeed's checkpoint of this moment without the frozen weights, and run.json -> OUT/resume-STEP; one is kept"""
    work, old = out / f".resume-{run.step}.unfinished", saved_states(out)
    try:
        engine.save_checkpoint(work, "state", save_latest=False, exclude_frozen_parameters=True)
        if is_main():  # save_checkpoint ended with a barrier: every process has written its part
            write_json(work / "run.json", vars(run))
            work.rename(out / f"resume-{run.step}")
            for folder in old:
                remove(folder)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when a disk is full
        shutil.rmtree(work, ignore_errors=True)
        raise InputError(f"the state of step {run.step} cannot be written to {out} (is the disk full?): "
                         f"{reason_of(error)}") from error


def own_part(parameter):
    """The numbers of a parameter that this process holds, under ZeRO-3 its part of them. Parts are of one size: what
    fills up the last ones has never been written, and may be anything"""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    part = parameter.ds_tensor.detach()
    return part[:max(0, parameter.ds_numel - dist.get_rank() * part.numel())]


def remove(folder):
    """Remove a folder so that a half of it is never taken for the whole"""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old.unfinished")))


def load_state(engine, out, run):
    """Take up DeepSpeed's checkpoint of a state, without frozen weights (check_state knows the names), and its log"""
    folder, log = out / f"resume-{run.step}", out / "log.jsonl"
    try:
        path, _ = engine.load_checkpoint(folder, "state", load_module_strict=False)
    except Exception as error:  # of a damaged file anything
        raise InputError(f"{folder} cannot be read: {reason_of(error)}; begin anew with --overwrite") from error
    if path is None:
        raise InputError(f"{folder} is not whole; begin anew with --overwrite")
    if is_main():  # the log is cut back to this step
        lines = log.read_text().splitlines(keepends=True)
        steps = [n for n, line in enumerate(lines) if f'"step": {run.step}, ' in line and '"seconds"' in line]
        (out / ".log.unfinished").write_text("".join(lines[:steps[0] + 1] if steps else lines))
        (out / ".log.unfinished").replace(log)


# what may stand at the top of a file of settings; DeepSpeed passes over other names without a word
KINDS = {dict: "zero_optimization optimizer bf16 fp16 data_types aio checkpoint comms_logger flops_profiler timers "
               "tensorboard wandb comet csv_monitor", str: "communication_data_type",
         (int, float): "gradient_clipping prescale_gradients gradient_predivide_factor zero_allow_untested_optimizer "
                       "zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown memory_breakdown dump_state"}
KNOWN = {name: kind for kind, names in KINDS.items() for name in names.split()}


def flatten(settings, above=""):
    """Settings with their names in full: {"a": {"b": 1}} -> ("a", {"b": 1}), ("a.b", 1)"""
    for name, value in settings.items():
        yield above + name, value
        if isinstance(value, dict):
            yield from flatten(value, f"{above}{name}.")


def merge(ours, theirs):
    """Settings over settings, object by object; one of another "type" is taken whole"""
    both = isinstance(ours, dict) and isinstance(theirs, dict)
    if not both or theirs.get("type", ours.get("type")) != ours.get("type"):
        return theirs
    return {**ours, **{name: merge(ours.get(name), value) for name, value in theirs.items()}}


def engine_settings(args, dtype, accumulation):
    """DeepSpeed's settings: the recipe's, and over them those of --deepspeed_config"""
    settings = {
        "train_batch_size": args.batch_size, "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "gradient_accumulation_steps": accumulation, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.zero_stage},
        "optimizer": {"type": "AdamW", "params": {"lr": args.learning_rate, "betas": [0.9, 0.95], "weight_decay": 0.0,
                                                  "torch_adam": True}},
        "bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    if args.deepspeed_config:
        given = read_config(args.deepspeed_config)
        flags = {"train_batch_size": "batch_size", "gradient_accumulation_steps": "batch_size", "scheduler": "warmup",
                 "train_micro_batch_size_per_gpu": "micro_batch_size", "activation_checkpointing": "gradient_checkpointing",
                 "zero_optimization.stage": "zero_stage", "bf16.enabled": "dtype", "fp16.enabled": "dtype",
                 "optimizer.params.lr": "learning_rate"}
        flat = dict(flatten(given))
        for name, value in flat.items():
            if name in flags:
                wrong = f"is set by --{flags[name]}, take it out of the file"
            elif value in ("auto", None):
                wrong = f"is {json.dumps(value)}, and nobody here fills it in"
            elif "." not in name and not isinstance(value, KNOWN.get(name, ())):
                wrong = f"= {value!r} is not known to DeepSpeed, or has no effect here"
            elif isinstance(value, float) and not math.isfinite(value):
                wrong = f"is {value}"
            elif value == "nvme" and name.removesuffix("device") + "nvme_path" not in flat:
                wrong = "is nvme, and there is no nvme_path beside it"
            else:
                continue
            raise InputError(f"{args.deepspeed_config}: {name} {wrong}")
        settings = merge(settings, given)
    return settings


@contextmanager
def blame(file):
    """What DeepSpeed raises about the settings in a file is an InputError that names it"""
    try:
        yield
    except Exception as error:
        if not file or isinstance(error, RuntimeError):  # of memory or communication
            raise
        raise InputError(f"{file}: {reason_of(error)}") from error


@contextmanager
def frugal():
    """While a model is loaded or saved: freed blocks from 1 MB on go back to the system at once. glibc otherwise keeps
    some of up to 32 MB, which makes training on a CPU faster"""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    try:
        yield
    finally:
        mallopt(-3, 32 << 20), mallopt(-1, 64 << 20)  # and M_TRIM_THRESHOLD


@frugal()
def make_model(args, conversations, device, dtype, spread):
    """Vision tower, language model and tokenizer from their folders, or from nothing -> VisualChat, Tokenizer.

    spread is DeepSpeed's zero.Init: under ZeRO-3 each parameter is spread over the processes as soon as it is made,
    and the weights stream from the files into the parts; else a context that does nothing."""
    made = {"empty": lambda: spread} if args.zero_stage == 3 else {}
    new = []
    for folder in (args.language_model, args.vision_model):
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} holds no model: config.json and model.safetensors belong there")
        new.append(not has_weights(folder))
        if new[-1] and args.trainable != "all":
            raise InputError(f"{folder} holds config.json but no weights (*.safetensors): a model from nothing needs "
                             "--trainable all")
    features = args.feature_layer, args.class_token
    sizes = vit_sizes(args.vision_model, *features)
    file = args.language_model / "tokenizer.model"
    if not file.exists():
        if not new[0]:
            raise InputError(f"{file} is missing: LLaMA-2's SentencePiece tokenizer belongs beside its weights")
        file = args.out / "tokenizer.model"
        size = LlamaConfig.read(args.language_model).vocab_size
        if not (args.resume and file.exists()):
            together(lambda: Tokenizer.train(conversations, size, file), everywhere=False)
    tokenizer = Tokenizer(file)
    torch.manual_seed(args.seed)
    if new[0]:
        config = LlamaConfig.read(args.language_model)
        config.vocab_size = len(tokenizer)
        with spread:
            language = Llama(config)
    else:
        language = load_llama(args.language_model, dtype, device, **made)
        if len(tokenizer) > language.config.vocab_size:
            raise InputError(f"{file} has {len(tokenizer)} pieces, the language model only "
                             f"{language.config.vocab_size} embeddings: they do not belong together")
    if not new[1]:
        vision = load_vit(args.vision_model, dtype, device, *features, **made)
    torch.manual_seed(args.seed + 1)  # loading under zero.Init has drawn numbers
    with spread:
        vision = make_vit(sizes) if new[1] else vision
        model = VisualChat(vision, language, args.attention, args.projection)
        for layers, rank in ((language.model.layers, args.lora_rank), (vision.blocks, args.vision_lora_rank)):
            if rank:
                add_lora(layers, rank)
    language.model.gradient_checkpointing = vision.gradient_checkpointing = args.gradient_checkpointing
    model.preprocessing = read_preprocessing(args.vision_model, vision.config.image_size)
    model.set_trained(everything=args.trainable == "all")
    return (model if args.zero_stage == 3 else model.to(device=device, dtype=dtype)), tokenizer


def compile_layers(model, deepspeed):
    """Make one graph of each layer's forward, so that norms, rotation and casts are fused with what they stand between.

    Under ZeRO-3 the hooks by which every Linear gathers its weights would cut it: a leaf gathers all of its own before
    its forward. Returns how many numbers the largest layer has."""
    torch._dynamo.config.recompile_limit = 64  # train and evaluate, last layer, batches of one: a few graphs each
    blocks = model.vision_model.blocks
    layers = [*model.language_model.model.layers, *blocks, *(model.cross_attention or [])]
    for layer in layers:
        deepspeed.utils.set_z3_leaf_module(layer, True)
        layer.forward = torch.compile(layer.forward, dynamic=True)  # lengths change from batch to batch
    if any(p.requires_grad for p in blocks.parameters()):
        # DeepSpeed takes a leaf's gradients when that of its input has come: LoRA's first block needs one there too
        blocks[0].register_forward_pre_hook(lambda block, inputs: inputs[0].requires_grad_())
    return max(sum(size_of(p).numel() for p in layer.parameters()) for layer in layers)


def micro_batches(conversations, args, rank, world, done=0):
    """The indices of the samples of each micro-batch of one process, after `done` steps; some lists are empty.

    A micro-batch is as long as its longest sample. Which sample of a step sits in which of them changes nothing but
    rounding, since the loss is the mean over the whole step: so the samples of a step are sorted by size, the largest
    first, and each accumulation round takes a run of them, each process a part of it. Then all work on like sizes."""
    def size(index):
        turns = conversations[index]
        pictures = sum(len(turn.images) for turn in turns)
        return pictures, sum(len(turn.question) + len(turn.answer) for turn in turns)

    for start in range(0, len(conversations), args.batch_size)[done:]:
        step = range(start, min(start + args.batch_size, len(conversations)))
        step = sorted(step, key=size, reverse=True)
        for first in range(rank * args.micro_batch_size, args.batch_size, world * args.micro_batch_size):
            yield step[first:first + args.micro_batch_size]


def finish_batch(samples, dummy, attention):
    """What Samples gives, several times -> (batch, what is counted of it, broken samples). A batch without a picture
    gets a sample of weight zero: under ZeRO-3 all processes must run the same modules."""
    examples, left_out, broken = zip(*samples) if samples else ((), (), ())
    whole = [example for example in examples if example]
    tokens = sum(len(example.input_ids) for example in whole)
    if not any(example.images for example in whole):
        whole.append(dummy)
    batch = collate(whole)
    rows = pattern(batch["modality"], batch["modality"], attention).positions.numel()
    counts = Counter(tokens=tokens, trained_tokens=int((batch["labels"] != -100).sum()), rows=rows,
                     rounds_left_out=sum(left_out))
    if torch.utils.data.get_worker_info():
        # else the thread that sends the batch would do it, and what fails there (in a container
        # whose /dev/shm is small) nobody hears of: the run would wait for a batch that never comes
        for tensor in batch.values():
            tensor.share_memory_()
    return batch, counts, [text for text in broken if text]


def batches(conversations, model, tokenizer, args, done=0):
    """An iterator of this process's micro-batches after `done` steps, read by workers; equally many for all"""
    side = model.vision_model.config.image_size
    samples = Samples(conversations, tokenizer, model.image_tokens, model.preprocessing, args.max_length,
                      args.max_images)
    dummy = encode([Turn("", None, ["dummy"])], tokenizer, model.image_tokens)
    dummy.pixels = [torch.zeros(3, side, side)]
    sampler = micro_batches(conversations, args, dist.get_rank(), dist.get_world_size(), done)
    # a step takes all of its micro-batches before the first is computed: meanwhile the workers
    # read those of the next step
    accumulation = args.batch_size // (args.micro_batch_size * dist.get_world_size())
    ahead = max(2, math.ceil(accumulation / args.workers)) if args.workers else None
    return iter(torch.utils.data.DataLoader(samples, batch_sampler=sampler, num_workers=args.workers,
                                            prefetch_factor=ahead,
                                            collate_fn=partial(finish_batch, dummy=dummy, attention=model.attention),
                                            multiprocessing_context="fork" if args.workers else None,  # shares Packed
                                            timeout=600 if args.workers else 0))  # rather than to wait for ever


def next_step(loader, accumulation, device):
    """(micro-batches of one step; over all processes what is counted of them, and broken samples); None at the end"""
    parts = list(itertools.islice(loader, accumulation))
    if not parts:
        return None
    step, counts, broken = zip(*parts)
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (sum(counts, Counter()), sum(broken, [])))
    counts, broken = zip(*everywhere)
    moved = [{name: value.to(device) for name, value in batch.items()} for batch in step]
    return moved, sum(counts, Counter()), sum(broken, [])


@torch.no_grad()
def evaluate(engine, loader, accumulation, device, note):
    """Held-out conversations -> loss, trained tokens, exact answers, answers. Exact: every token, the end token too, is
    the model's first choice, as greedy decoding would have it, without generating"""
    engine.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)                                # (4)
    while step := next_step(loader, accumulation, device):
        note(step[-1])
        for batch in step[0]:
            losses, hits = engine(**batch)
            trained = batch["labels"][:, 1:] != -100                                         # (B, T - 1)
            first = trained & ~torch.nn.functional.pad(trained, (1, 0))[:, :-1]  # the first token of each answer
            answer = first.flatten().cumsum(0)[trained.flatten()] - 1                        # (n), which answer
            exact = torch.ones(int(first.sum()), dtype=torch.long, device=device)
            exact = exact.scatter_reduce(0, answer, hits.long(), "amin")                     # (answers)
            sums += torch.tensor([float(losses.sum()), len(losses), int(exact.sum()), len(exact)], device=device)
    dist.all_reduce(sums)
    engine.train()
    return sums.tolist()


def split_data(args):
    """-> the data sets and which conversations of each are trained on; those to measure on, and which of theirs"""
    sets = together(lambda: read_datasets(args))  # process 0 first: it makes the index of a picture file
    if not args.eval_path:
        if args.eval_datasets:
            raise InputError("--eval_datasets are read from --eval_path: name that folder too")
        split = [hold_out(len(data.drafts), args.eval_fraction, f"{args.seed} {data.name}") for data in sets]
        return sets, [training for training, _ in split], sets, [rest for _, rest in split]
    names = [str(args.eval_path / Path(name).name) if name.endswith(".json") else name
             for name in args.eval_datasets or args.datasets]
    there = argparse.Namespace(**vars(args) | {"data_path": args.eval_path, "datasets": names, "samples": ["all"]})
    if args.eval_datasets:  # --concatenate is about others
        there.concatenate = None
    held_sets = together(lambda: read_datasets(there))
    training, rest = ([range(len(data.drafts)) for data in part] for part in (sets, held_sets))
    return sets, training, held_sets, rest


def train(args, run):
    """The whole of it. run: where it stands, which a state keeps in its run.json"""
    # what is asked for
    (device,), dtype = choose_device(own_device(), args.dtype)
    if device.type == "cpu" and dtype == torch.float16:
        raise InputError("--dtype float16: DeepSpeed has none on a CPU; take bfloat16 or float32")
    if args.compile is None:
        args.compile = device.type != "cpu"
    # processes
    deepspeed = start_distributed(device)
    world = dist.get_world_size()
    accumulation, rest = divmod(args.batch_size, args.micro_batch_size * world)
    if rest or not accumulation:
        raise InputError(f"--batch_size {args.batch_size} is no multiple of --micro_batch_size {args.micro_batch_size} "
                         f"x {world} processes")
    if args.trainable == "all" and (args.lora_rank or args.vision_lora_rank or args.save_trained_only):
        raise InputError("--trainable all trains every weight: --lora_rank, --vision_lora_rank and --save_trained_only "
                         "are for frozen ones")
    settings = engine_settings(args, dtype, accumulation)
    with blame(args.deepspeed_config):
        spread = deepspeed.zero.Init(config_dict_or_path=settings) if args.zero_stage == 3 else nullcontext()
    found = [together(lambda: check_out(args), everywhere=False)]
    dist.broadcast_object_list(found)
    folder, state = found[0] or (None, {"step": 0, "epoch": 0, "best": math.inf, "rounds_left_out": 0, "broken": []})

    # data
    together(lambda: draw_demo(args), everywhere=False)
    sets, training, held_sets, rest = split_data(args)
    left_out = [text for data in sets for text in data.left_out]
    if left_out and is_main():
        print(printable(f"{len(left_out)} records are left out: {'; '.join(left_out[:3])}"))
    if not any(training):
        raise InputError(f"{', '.join(args.datasets)}: no conversation is left to train on")
    held_out = [Epoch([data], [part], args.seed, "held out") for data, part in zip(held_sets, rest) if part]
    held_missing, held_count = [picture for part in held_out for picture in part.missing], sum(map(len, held_out))
    epochs = [Epoch(sets, training, args.seed, epoch) for epoch in range(args.epochs)]
    for samples in epochs:
        lost, count = samples.missing + held_missing, len(samples) + held_count
        if len(lost) > BROKEN * count:
            raise InputError(f"{len(lost)} of {count} samples lack a picture, more than {BROKEN:.0%}: "
                             f"{', '.join(lost[:5])}")
    ends = list(itertools.accumulate(math.ceil(len(samples) / args.batch_size) for samples in epochs))  # in steps
    total = min(ends[-1], args.max_steps or ends[-1])

    # model
    model, tokenizer = make_model(args, epochs[0], device, dtype, spread)
    limit_length(args)
    if all(encode(talk, tokenizer, model.image_tokens, None, args.max_length, args.max_images).left_out == len(talk)
           for talk in epochs[0]):
        raise InputError(f"nothing is left to train on: of {len(epochs[0])} samples none has a round that fits into "
                         f"--max_length {args.max_length} and --max_images {args.max_images}")
    now = identity(args, sets, held_sets, model)
    if folder:
        together(lambda: check_state(folder, state, now), everywhere=False)
    vars(run).update(state | {"identity": now})
    begun = run.step
    embedding, words = model.language_model.model.embed_tokens.weight, args.embedding_learning_rate
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p is not embedding], "lr": args.learning_rate},
              {"params": [embedding], "lr": args.learning_rate if words is None else words}]
    if is_main():
        every, part = (sum(size_of(p).numel() for p in parameters) for parameters in (model.parameters(), trained))
        print(f"{every:,} parameters, {part:,} of them trained; "
              f"{sum(map(len, training))} conversations to train on, {sum(map(len, rest))} held out; {total} steps")
        if lost:
            print(printable(f"{len(lost)} of {count} samples lack a picture and are replaced: {', '.join(lost[:5])}"))

    # engine
    def schedule(step):
        rise = max(1, round(args.warmup * total))
        return (step + 1) / rise if step < rise else (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2

    if args.compile:
        # a leaf waits for all of its weights at once: so those of the next are fetched while it is
        # at work. DeepSpeed's own sizes are a quarter of a 7B layer, and 1.2 layers of 70B
        layer = compile_layers(model, deepspeed)
        ahead = {"stage3_prefetch_bucket_size": layer, "stage3_max_live_parameters": max(10 ** 9, 3 * layer)}
        settings["zero_optimization"] = ahead | settings["zero_optimization"]
    with blame(args.deepspeed_config):
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=groups, config=settings,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule))
    together(lambda: clear_out(args.out, folder), everywhere=False)  # all that could be refused has been read
    if folder:
        load_state(engine, args.out, run)

    # loop
    log = open(args.out / "log.jsonl", "a" if folder else "w") if is_main() else None

    def write(**line):
        if log:
            print(json.dumps({"step": run.step, **line}), file=log, flush=True)

    def note(sentences):
        run.broken += sentences
        for sentence in sentences:
            write(broken=sentence)
        if len(run.broken) > BROKEN * (len(samples) + held_count):
            raise InputError(f"{len(run.broken)} samples of this epoch cannot be used, more than {BROKEN:.0%}: "
                             f"{'; '.join(run.broken[:5])}")

    def check_finite(value, name):
        if not math.isfinite(value):
            raise InputError(f"the {name} step {run.step} is {value}, at a learning rate of {rate:.2e}: begin "
                             f"anew with a lower one or a longer --warmup (and --overwrite); {what_stays(args.out)}")

    def save():
        weights = sum(float(own_part(p).sum(dtype=torch.float)) for p in trained)
        weights = torch.tensor(weights, device=device)
        dist.all_reduce(weights)
        check_finite(weights.item(), "sum of the weights after")
        save_state(engine, args.out, run)

    if not folder:
        write(flags=args.flags)
    bar = tqdm(total=total, initial=run.step, unit="step", disable=not is_main())
    rate = engine.get_lr()[0]
    for run.epoch, samples in list(enumerate(epochs))[run.epoch:]:
        done = run.step - [0, *ends][run.epoch]
        if not done:
            run.broken = []
        loader = batches(samples, model, tokenizer, args, done)
        began = time.perf_counter()
        while run.step < total and (work := next_step(loader, accumulation, device)):
            parts, counts, sentences = work
            note(sentences)
            tokens, count, rate = counts["tokens"], counts["trained_tokens"], engine.get_lr()[0]
            loss = torch.zeros((), device=device)
            for batch in parts:
                losses, _ = engine(**batch)
                loss += losses.detach().sum()
                # DeepSpeed divides by processes and accumulation; what is wanted is the mean over all trained tokens
                engine.backward(losses.sum() * (world * accumulation / max(count, 1)))
                engine.step()
            dist.all_reduce(loss)
            loss, seconds, began = loss.item() / max(count, 1), time.perf_counter() - began, time.perf_counter()
            run.step, run.rounds_left_out = run.step + 1, run.rounds_left_out + counts["rounds_left_out"]
            check_finite(loss, "loss of")
            measured = {"loss": loss} if count else {}  # a step without a label has none
            write(epoch=run.epoch + 1, **measured, learning_rate=rate, tokens=tokens, trained_tokens=count,
                  real_rows=round(tokens / counts["rows"], 4), tokens_per_second=round(tokens / seconds, 1),
                  seconds=round(seconds, 4))
            bar.update()
            bar.set_postfix_str(f"loss {loss:.4f}, learning rate {rate:.2e}, {tokens / seconds:.0f} tokens/s")
            if run.step % args.save_every == 0 and run.step not in (ends[run.epoch], total):
                save()
        sums = [evaluate(engine, batches(part, model, tokenizer, args), accumulation, device, note)
                for part in held_out]
        loss, tokens, exact, answers = map(sum, zip([0] * 4, *sums))
        name, mean = f"epoch-{run.epoch + 1}", loss / tokens if tokens else math.inf
        check_finite(loss, "held-out loss after")
        if run.step != begun:  # the state of an epoch's end is kept when it is known to be good
            save()
        if answers:
            shares = [(part.sets[0].name, right / asked) for part, (*_, right, asked) in zip(held_out, sums) if asked]
            write(epoch=run.epoch + 1, eval_loss=mean, eval_exact=exact / answers, eval_exact_of=dict(shares))
            bar.write(f"epoch {run.epoch + 1}: held-out loss {mean:.4f}, exact match {exact / answers:.2%}")
            for part, share in shares if len(shares) > 1 else ():
                bar.write(f"    {Path(part).stem:22}{share:8.2%}")
        with frugal():
            begun_from = (args.language_model, args.vision_model) if args.save_trained_only else None
            engine.module.save_pretrained(args.out / name, tokenizer.file, begun_from)
        if not (answers and mean >= run.best):
            run.best = min(run.best, mean)
            if is_main():
                (args.out / ".best.unfinished").write_text(name)  # no link: not every disk knows them
                (args.out / ".best.unfinished").replace(args.out / "best")
        if run.step == total:
            break
    bar.close()
    if is_main():
        for state in saved_states(args.out):
            remove(state)
        print(f"{run.step} steps; {run.rounds_left_out} rounds left out (--max_length, --max_images); "
              f"the model is in {args.out}/best")
    dist.destroy_process_group()


def say(sentence):
    """One line on stderr, whatever the bar does"""
    tqdm.write(printable(f"train.py: {sentence}"), file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()


def main():
    """Run; what the user can mend is one sentence on stderr and exit code 2"""
    args, run = command_line(), argparse.Namespace(step=0)

    # a terminal may lack a character, and stop() flushes nothing
    sys.stdout.reconfigure(errors="replace", line_buffering=True)

    def stop(*_):
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_IGN)  # the launcher sends one more
        # an exception could be caught on its way; the workers that read pictures come here too
        if not multiprocessing.parent_process():
            sentence = printable(f"stopped at step {run.step}; {what_stays(args.out)}")
            os.write(2, f"\ntrain.py: {sentence}\n".encode())  # Python's own stderr may be in the middle of a line
        os._exit(130)

    # Ctrl-C, and what the launcher makes of it. The others have nothing to say: the system makes an
    # end of them, also while they wait for a GPU, where Python would not come to it. (Process 0 may
    # not come to it there either; then the launcher ends it.)
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_DFL if int(os.environ.get("RANK", 0)) else stop)
    try:
        train(args, run)
    except (InputError, OSError, RuntimeError, AssertionError) as error:
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # what happens to all says process 0, and the launcher stops the others
        sentence = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in sentence:
            sentence = ("out of memory; less is needed with a lower --micro_batch_size (now "
                        f"{args.micro_batch_size}), a lower --max_length (now {args.max_length}), or "
                        f"--gradient_checkpointing (now {'on' if args.gradient_checkpointing else 'off'})")
        elif isinstance(error, OSError):  # a full disk
            sentence = f"{error.filename or args.out}: {reason_of(error)}"
        elif "shared memory(shm)" in sentence or "out of shared memory" in sentence:
            sentence = (f"/dev/shm is too small for what --workers {args.workers} read ahead: make it larger "
                        "(docker run --shm-size 8g), or do without them (--workers 0)")
        elif isinstance(error, torch._dynamo.exc.TorchDynamoException):
            sentence = f"a layer cannot be compiled: {reason_of(error)}; --no_compile computes it as it is written"
        elif not isinstance(error, InputError):
            if args.compile:
                error.add_note("train.py: should this come from a compiled layer, --no_compile does without")
            raise
        say(sentence)
        os._exit(2) if dist.is_initialized() else sys.exit(2)


if __name__ == "__main__":
    main()
