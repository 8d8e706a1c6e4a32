"""The experiment's other rules, and that it goes on where it was stopped. python -m pytest tests/test_experiment.py"""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, sequence, tiny_model

import experiment
import train
from data import Tokenizer, Turn, encode
from mmca import IMAGE, TEXT, attention_matrix

T, I = TEXT, IMAGE  # noqa: E741


@pytest.mark.parametrize("rule, rows", [
    (experiment.union, "1... 11.. ..1. 1111"),
    (experiment.earlier_text, "1... 11.. 111. 1121"),
    (experiment.average, "1... 11.. ..1. 1121")])
def test_each_of_the_other_rules_has_its_matrix(rule, rows):
    M, _ = rule(torch.tensor([[T, T, I, T]]))
    assert " ".join("".join(map(str, row)).replace("0", ".") for row in M[0].tolist()) == rows


def test_image_tokens_see_the_number_in_their_heading_and_no_other_word():
    tokenizer, talk = Tokenizer(ROOT / "demo/language_model/tokenizer.model"), [Turn("What?", "A.", ["a", "b"]), Turn("And?", "B.", ["c"])]
    example = encode(talk, tokenizer, 5)
    modality = example.modality[None]
    M, halved = experiment.own_number(modality)
    expected, image = attention_matrix(modality, modality), modality[0] == IMAGE
    assert torch.equal(M[0, ~image], expected[0, ~image]) and not halved
    more = (M - expected)[0, image].nonzero()
    assert more[:, 0].tolist() == list(range(15)), "each one more"
    assert [tokenizer.decode([int(example.input_ids[column])]).strip() for column in more[:, 1]] == ["1"] * 5 + ["2"] * 5 + ["3"] * 5


def test_a_rule_goes_through_the_whole_model(monkeypatch):
    """M as it is, by the formula and in reading order, gives the losses of MMCA in its own order"""
    model, (ids, modality) = tiny_model(), sequence("TTITTTITTT")
    labels = ids.masked_fill((modality == IMAGE) | (modality.roll(1) == IMAGE), -100)
    batch = ids, modality, labels, torch.randn(2, 3, 56, 56), torch.arange(2)
    expected, _ = model(*batch)
    for name in ("make_pattern", "attend"):
        monkeypatch.setattr(experiment.visualchat, name, getattr(experiment.visualchat, name))  # put back afterwards
    experiment.use_rule(lambda modality: (attention_matrix(modality, modality), False))
    torch.testing.assert_close(model(*batch)[0], expected, atol=1e-5, rtol=1e-5)
    experiment.use_rule(experiment.earlier_text)
    assert (model(*batch)[0] - expected).abs().max() > 1e-3


def test_the_average_is_half_the_sum_where_there_are_two(monkeypatch):
    monkeypatch.setattr(experiment.visualchat, "make_pattern", None)
    monkeypatch.setattr(experiment.visualchat, "attend", None)
    q, k, v = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    modality, results = torch.tensor([[T, T, I, T]]), []
    for rule in (lambda modality: (experiment.average(modality)[0], False), experiment.average):
        experiment.use_rule(rule)
        results.append(experiment.visualchat.attend(q, k, v, experiment.visualchat.make_pattern(modality, modality, "mmca")))
    assert torch.equal(results[0][:, :, :3], results[1][:, :, :3]) and torch.equal(results[0][:, :, 3], 2 * results[1][:, :, 3])


@pytest.mark.slow
def test_a_run_is_kept_and_the_next_start_goes_on(tmp_path, monkeypatch, capsys):
    subprocess.run([sys.executable, ROOT / "demo/make.py", tmp_path / "data/demo", "--scenes", "32"], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "wanted", lambda seeds, quick: [
        experiment.Job("causal", "mmca", 8, steps, 6e-3, seed) for seed in range(1, seeds + 1) for steps in (2, 3)])
    monkeypatch.setattr(sys, "argv", ["experiment.py", "--seeds", "1"])
    experiment.main()
    file = tmp_path / "out/experiment.jsonl"
    line, longer = sorted(map(json.loads, file.read_text().splitlines()), key=lambda line: line["steps"])
    assert [line["steps"], longer["steps"]] == [2, 3] and line["variant"] == "mmca" and line["trained"] == 275_328 and sum(line["asked"].values()) > 20
    assert [row.split()[1:3] for row in capsys.readouterr().out.splitlines()[2:4]] == [["8", "2"], ["8", "3"]]
    monkeypatch.setattr(sys, "argv", ["experiment.py", "--seeds", "2"])
    experiment.main()
    assert [json.loads(text)["seed"] for text in file.read_text().splitlines()] == [1, 1, 2, 2]


def test_the_table_has_mean_and_spread_over_seeds_and_the_most_frequent_answers(capsys):
    kinds = experiment.KINDS
    guess = experiment.always_the_same({kind: [[Turn("Which?", answer)] for answer in ("Image 1.", "Image 2.", "Image 2.", "Image 3.")[:n + 1]]
                                        for n, kind in enumerate(kinds[:4])} | {kind: [[Turn("?", "Yes.")]] * 4 for kind in kinds[4:]})
    assert guess["asked"] == dict(zip(kinds, [1, 2, 3, 4, 4, 4, 4, 4]))
    assert guess["right"] == dict(zip(kinds, [1, 1, 2, 2, 4, 4, 4, 4]))
    lines = [{"taught": "causal", "variant": "mmca", "size": 250, "seed": seed, "steps": 10, "rate": 6e-3, "seconds": 10 * seed, "trained": 7,
              "asked": dict.fromkeys(kinds, 10), "right": dict.fromkeys(kinds, right)} for seed, right in ((1, 4), (2, 5), (3, 6))]
    experiment.table(lines, guess)
    first, second = capsys.readouterr().out.split("\n\n")
    names, always, mmca = (line.split() for line in first.splitlines())
    assert names[6:9] == ["several", "describe", "one_picture"] and always[-3:] == ["77.8", "100.0", "100.0"], "14 of 18 about several"
    assert mmca == ["causal", "250", "10", "0.006", "mmca", "3", *["50.0", "±", "10.0"] * 3, "7", "2.000"]
    names, always, mmca = (line.split() for line in second.splitlines())
    assert names[6:] == list(kinds[:6]) and always[-6:] == ["100.0", "50.0", "66.7", "50.0", "100.0", "100.0"]
    assert mmca == ["causal", "250", "10", "0.006", "mmca", "3", *["50.0", "±", "10.0"] * 6]


def test_it_trains_as_the_demo_does(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", "@demo/flags"])
    flags = train.command_line()
    assert dict(zip(flags.datasets, flags.concatenate)) == experiment.SETS and flags.samples == ["all"]
    assert flags.eval_datasets == [f"{kind}.json" for kind in experiment.KINDS]
    assert (flags.batch_size, flags.warmup, flags.lora_rank) == (experiment.BATCH, experiment.WARMUP, experiment.RANK)
    assert flags.learning_rate == experiment.VARIANTS["mmca"].rate


def test_every_kind_of_run_is_wanted_once():
    jobs = experiment.wanted(5, False)
    assert len(jobs) == len(set(jobs)) == 111, "as the docstring says"
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs), "seed by seed"
    assert set(experiment.wanted(1, False)) <= set(jobs) and len(experiment.wanted(1, True)) == 6
    tried = {(job.variant, job.rate) for job in jobs if job.size == experiment.ABLATED and job.steps == experiment.STEPS}
    assert {(name, rate) for name in experiment.MECHANISMS for rate in experiment.RATES} <= tried
    assert {job.variant for job in jobs if job.taught == "mmca"} == set(experiment.MECHANISMS)
