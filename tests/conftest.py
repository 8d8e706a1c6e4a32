"""What several tests share: the six files on the path, the fixtures, and a tiny model with pictures made of them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(ROOT))
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # only what asks for it is compiled (it takes this away again); DeepSpeed would import the compiler for all

from mmca import IMAGE, TEXT, make_pattern  # noqa: E402
from model import VisualChat, load_llama, load_vit  # noqa: E402
from vision import read_preprocessing  # noqa: E402


def pytest_configure(config):
    """python -m pytest -m quick: what each idea is, in half a minute"""
    config.addinivalue_line("markers", "slow: it starts a process, compiles, or takes seconds")
    config.addinivalue_line("markers", "quick: every test that is not marked slow, and does not ask for the fixture `processes`")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if not item.get_closest_marker("slow") and "processes" not in item.fixturenames:
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def a_quick_test_starts_no_process(request, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("this test starts a process: mark it slow")
    if request.node.get_closest_marker("quick"):
        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
        monkeypatch.setattr(os, "fork", refuse)


def tiny_model(attention="mmca"):
    """The fixtures' vision tower (17 tokens a picture) and language model, joined by a random projection"""
    torch.manual_seed(0)
    model = VisualChat(load_vit(FIXTURES / "tiny-clip"), load_llama(FIXTURES / "tiny-llama"), attention).eval()
    model.language_model.config.max_position_embeddings = 2048  # 128 in the fixture: few rounds fit
    model.preprocessing = read_preprocessing(FIXTURES / "tiny-clip", 56)
    if model.cross_attention is not None:
        for layer in model.cross_attention:
            torch.nn.init.constant_(layer.gate, 0.7)
    return model


@pytest.fixture
def make_model():
    """tiny_model, as a fixture"""
    return tiny_model


def sequence(text, seed=0, image_tokens=17):
    """'TTI' -> ids (1, T) random where T stands, modality (1, T): each I is a whole picture"""
    modality = [m for c in text for m in ([IMAGE] * image_tokens if c == "I" else [TEXT])]
    modality = torch.tensor([modality])
    ids = torch.randint(3, 512, modality.shape, generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(modality == IMAGE, 0), modality


@torch.inference_mode()
def all_logits(model, ids, modality, features=None):
    """The logits of every position (B, T, V), everything at once; zero at image tokens where words alone come out"""
    who = make_pattern(modality, modality, model.attention)
    x = who.arrange(model.embed(ids, modality, features))
    words = model.language_model.model(x, who, None, model.cross_attention)
    none = words.new_zeros(len(words), x.shape[1] - who.num_words, words.shape[2])
    return model.language_model.lm_head(who.restore(torch.cat([words, none], 1)))
