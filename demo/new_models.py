#!/usr/bin/env python3
"""Write a language model and a vision tower of random numbers, for a training from nothing.

A folder that holds a config.json alone says how large a model is to be. train.py only loads models;
this makes one of that size:

    python demo/new_models.py --language_model demo/easyvqa/language_model \\
        --vision_model demo/easyvqa/vision_model --data_path data/easyvqa \\
        --datasets llava llava_dial --samples all 6000 --out out/new

OUT/language_model and OUT/vision_model are then in the layout of published models, for train.py
with --trainable all. A tokenizer.model beside the language model's config.json is copied. Without
one, pieces are learned from the conversations of --datasets, at most as many as the config's
vocab_size. The same flags give the same files; another --seed gives other numbers.
"""
import io
import re
import shutil
import sys
from pathlib import Path

import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import (SYSTEM, Epoch, Tokenizer, arguments, parse, printable, quote,  # noqa: E402
                  read_datasets, whole)
from model import (Llama, make_vit, plain_weights, read_llama_config,  # noqa: E402
                   save_weights, write_json)
from vision import InputError, QwenConfig, read_json, read_vit_config, reason_of  # noqa: E402


def learn_tokenizer(conversations, size, file):
    """Learn at most `size` pieces, in LLaMA-2's style, and write them to file -> Tokenizer"""
    text = {SYSTEM, "\n\n### Question:", "\n### Question:", "\n### Answer:"}
    text |= {f"{lines}### Image {n}:" for n in range(1, 9) for lines in ("\n\n", "\n")}
    said = (part for turns in conversations for t in turns for part in (t.question, t.answer))
    text |= {whole(quote(part)) for part in said if part}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sorted(text)), model_writer=model, model_type="bpe",
            vocab_size=size, hard_vocab_limit=False, byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            max_sentence_length=100_000, input_sentence_size=500_000, minloglevel=2)
    except RuntimeError as error:
        least = re.search(r"required_chars. \d+ vs (\d+)", str(error))
        reason = f"its characters take {least[1]}" if least else reason_of(error)
        raise InputError(f"no tokenizer can be learned from this data with vocab_size {size}, as "
                         f"the language model's config.json has it: {reason}") from error
    Path(file).write_bytes(model.getvalue())
    return Tokenizer(file)


def check(args):
    """InputError where random numbers would take the place of something else"""
    for folder in (args.language_model, args.vision_model):
        if [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            raise InputError(f"{folder} already holds weights, which random numbers would replace; "
                             "a folder with a config.json alone belongs here")
    for folder in (args.out / "language_model", args.out / "vision_model"):
        if folder.exists():
            raise InputError(f"{folder} is already there; remove it, or name another --out")


def write_language_model(args, folder):
    """Write config.json, tokenizer.model and weights -> Llama"""
    config = read_llama_config(args.language_model)
    folder.mkdir(parents=True)
    own = args.language_model / "tokenizer.model"
    if own.exists():
        tokenizer = Tokenizer(own)
        shutil.copyfile(own, folder / own.name)
    else:
        sets = read_datasets(args)
        conversations = Epoch(sets, None, args.seed, 0)
        tokenizer = learn_tokenizer(conversations, config.vocab_size, folder / own.name)
    # the data may fill fewer pieces than are asked for, and an embedding without a piece is no use
    config.vocab_size = len(tokenizer)
    content = read_json(args.language_model / "config.json")
    write_json(folder / "config.json", content | {"vocab_size": len(tokenizer)})
    model = Llama(config)
    # as small as LLaMA's begin; torch's own would drown what attention adds to them
    model.model.embed_tokens.weight.data.mul_(0.02)
    save_weights(plain_weights(model), folder / "model.safetensors")
    return model


def write_vision_model(args, folder):
    """Write config.json, what says how pictures are prepared if it is there, and weights -> ViT or
    QwenViT"""
    sizes = read_vit_config(args.vision_model)
    folder.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        if (args.vision_model / name).exists():
            shutil.copyfile(args.vision_model / name, folder / name)
    model = make_vit(sizes)
    if not isinstance(sizes, QwenConfig):
        # torch's 1 would drown the patches, whose numbers are small
        model.embeddings.class_embedding.data.mul_(0.02)
        model.embeddings.position_embedding.weight.data.mul_(0.02)
    # the names of published files: CLIP's tower is a part of a larger model there
    prefix = "" if isinstance(sizes, QwenConfig) else "vision_model."
    save_weights(plain_weights(model, prefix), folder / "model.safetensors")
    return model


def main():
    """The command line; what the user can mend is one sentence on stderr and exit code 2"""
    parser, _ = arguments("Make a language model and a vision tower of random numbers.")
    args = parse(parser)
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character
    # both are written beside and renamed at the end: a half is never taken for the whole
    unfinished = args.out.resolve().with_name(f".{args.out.resolve().name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        check(args)
        torch.manual_seed(args.seed)
        language = write_language_model(args, unfinished / "language_model")
        vision = write_vision_model(args, unfinished / "vision_model")
        args.out.mkdir(parents=True, exist_ok=True)
        for folder in list(unfinished.iterdir()):
            folder.rename(args.out / folder.name)
    except (InputError, OSError) as error:
        print(printable(f"new_models.py: {error}"), file=sys.stderr)
        sys.exit(2)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    words, pictures = (sum(p.numel() for p in model.parameters()) for model in (language, vision))
    print(f"{words:,} parameters in {args.out}/language_model, {pictures:,} in {args.out}/vision_model")


if __name__ == "__main__":
    main()
