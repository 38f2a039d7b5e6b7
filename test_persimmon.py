"""Tests of persimmon.py and sample.py: `pytest`. On the CPU, no download; the oracles are transformers and SentencePiece.

Random weights everywhere but in tiny/. Every parameter is random, norms and biases too: a norm weight of one and a bias
of zero would hide that two norms are swapped or a bias is lost. All axes of a model have different sizes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import enum
import fcntl
import gzip
import io
import itertools
import json
import math
import os
import pty
import random
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import termios
import time
import warnings
import weakref
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy
import pytest
import sentencepiece
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import convert
import persimmon
import sample as sample_script
from persimmon import (
    Int4Linear,
    Int8Linear,
    Int8SparseLinear,
    KVCache,
    Linear,
    PersimmonConfig,
    PersimmonForCausalLM,
    PersimmonForSequenceClassification,
    PersimmonForTokenClassification,
    PersimmonModel,
    SparseLinear,
    StreamDecoder,
    Tokenizer,
    apply_repetition_penalty,
    apply_rope,
    causal_mask,
    chat_prompt,
    cpu_attention,
    generate,
    quantize_model,
    rope_tables,
    sample,
)

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny"

# name: (config, length of the test sequence). Longer than 64 positions, where RoPE's slow pairs have begun to turn.
CONFIGS = {
    "D16": PersimmonConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=3,
        max_position_embeddings=160, bos_token_id=1, eos_token_id=None, pad_token_id=5,
    ),
    "D64": PersimmonConfig(
        vocab_size=151, hidden_size=128, intermediate_size=208, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=180, bos_token_id=1, eos_token_id=None,
    ),
    "no QK-norm, other RoPE": PersimmonConfig(
        vocab_size=101, hidden_size=120, intermediate_size=88, num_hidden_layers=2, num_attention_heads=5,
        max_position_embeddings=170, bos_token_id=1, eos_token_id=None, qk_layernorm=False, rope_theta=1000.0,
        partial_rotary_factor=0.25, layer_norm_eps=1e-3,
    ),
}  # fmt: skip
B, T = 2, 71


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Fill every parameter with noise, norm weights around one; logits come out with a spread of one or so."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        scale = 0.3 if p.dim() == 1 else 3.0 if "embed" in name else 1.5 / math.sqrt(p.shape[1])
        noise = torch.randn(p.shape, generator=generator) * scale
        p.data = (noise + 1 if "norm" in name and name.endswith("weight") else noise).to(p.dtype)
    return model


def write_config(folder: Path, config: PersimmonConfig, form: str) -> None:
    """config.json as the hub had it in 2023, or as transformers 5 writes it."""
    raw = config.to_dict()
    del raw["rope_scaling"], raw["rope_parameters"], raw["rope_theta"], raw["partial_rotary_factor"]
    del raw["dtype"], raw["torch_dtype"]
    if form == "2023":
        raw |= {"rope_theta": config.rope_theta, "rope_scaling": None, "torch_dtype": "float32", "pretraining_tp": 1,
                "num_key_value_heads": config.num_attention_heads, "rms_norm_eps": 1e-6}  # fmt: skip
        if config.partial_rotary_factor != 0.5:
            raw["partial_rotary_factor"] = config.partial_rotary_factor
    else:
        rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
        raw |= {"rope_parameters": {**rope, "partial_rotary_factor": config.partial_rotary_factor}, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """A folder for each config and form of config.json, written without save_pretrained."""
    made = {}
    for name, config in CONFIGS.items():
        for form in ("2023", "transformers 5"):
            folder = made[name, form] = tmp_path_factory.mktemp("model")
            state = randomize(PersimmonForCausalLM(config)).state_dict()
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            write_config(folder, config, form)
    return made


@pytest.fixture(scope="session", params=CONFIGS)
def models(request, folders):
    """The same weights as our model, as that with all products for one token, and as transformers'."""
    folder = folders[request.param, "transformers 5"]
    model = PersimmonForCausalLM.from_pretrained(folder)
    return model, with_transposed_weights(model), oracle(folder)


@pytest.fixture(params=["plain", "one-token products"])
def pair(request, models, monkeypatch):
    """Our model and transformers', without and with the products for one token that only large models use."""
    if request.param == "plain":
        return models[0], models[2]
    use_one_token_products(monkeypatch)
    return models[1], models[2]


# What processors have of what cpu_has asks for. In float16 AMX is of no use.
PROCESSORS = {"AMX": ("amx_tile", "avx512_bf16"), "Zen 4": ("avx512_bf16",), "other": ()}


def use_one_token_products(monkeypatch, processor: str = "Zen 4") -> None:
    """However small the matrices and the cache are, the products that are chosen on a processor."""
    monkeypatch.setattr(Linear, "large", 0)
    monkeypatch.setattr(persimmon, "cpu_has", lambda feature: feature in PROCESSORS[processor])
    monkeypatch.setattr(KVCache, "block", 8)
    monkeypatch.setattr(KVCache, "transposed_from", {torch.float32: 0, torch.bfloat16: 0})


def with_transposed_weights(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            layer.large = 0
            layer.transpose()
            assert layer.weight.t().is_contiguous() and not layer.weight.is_contiguous()
    return model


def oracle(folder: Path, **options) -> transformers.PersimmonForCausalLM:
    return transformers.PersimmonForCausalLM.from_pretrained(folder, dtype="float32", **options).eval()


def random_ids(config: PersimmonConfig, rows: int = B, length: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small(folders) -> PersimmonForCausalLM:
    return PersimmonForCausalLM.from_pretrained(folders["D16", "2023"])


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance


# --- parity with transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["2023", "transformers 5"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_loss(folders, name, form):
    ours, theirs = PersimmonForCausalLM.from_pretrained(folders[name, form]), oracle(folders[name, form])
    assert theirs.config.rope_parameters["rope_theta"] == CONFIGS[name].rope_theta  # a parity of two wrong thetas is none
    ids = random_ids(CONFIGS[name])
    labels = ids.clone()
    labels[0, :20] = -100
    with torch.no_grad():
        a, b = ours(ids, labels=labels), theirs(ids, labels=labels)
        assert b.logits.std() > 0.3
        assert close(a.logits, b.logits) and close(a.loss, b.loss)
        assert close(ours(ids, logits_to_keep=3).logits, b.logits[:, -3:])
        embeds = torch.randn(B, T, CONFIGS[name].hidden_size)
        assert close(ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits)
        assert close(ours.model(ids).last_hidden_state, theirs.model(ids).last_hidden_state)


def test_gradients(pair):
    ours, theirs = pair
    ids = random_ids(ours.config)
    ids[1, 30:35] = 5  # pad_token_id of D16, whose embedding gets no gradient
    for model in pair:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        # Without QK-norm nothing holds back the gradients: they are in the hundreds there.
        assert close(p.grad, expected[name].grad, 1e-4 * max(1.0, expected[name].grad.abs().max().item())), name
        assert expected[name].grad.abs().max() > 1e-4, name
    assert (ours.model.embed_tokens.weight.grad[5].abs().sum() == 0) == (ours.config.pad_token_id == 5)


@pytest.mark.parametrize("which", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_where_transformers_has_it(folders, tmp_path, which):
    """p = 1 drops everything, so training is deterministic, and differs from evaluation."""
    source = folders["D64", "2023"]
    write_config(tmp_path, replace(CONFIGS["D64"], **{which: 1.0}), "2023")
    shutil.copy(source / "model.safetensors", tmp_path)
    ours, theirs = PersimmonForCausalLM.from_pretrained(tmp_path), oracle(tmp_path)
    ids = random_ids(CONFIGS["D64"])
    with torch.no_grad():
        assert close(ours.train()(ids).logits, theirs.train()(ids).logits)
        dropped = ours(ids).logits
        assert not close(dropped, ours.eval()(ids).logits, 0.1)
        assert close(ours(ids).logits, theirs.eval()(ids).logits)


def test_greedy_tokens_over_100_steps(pair):
    ours, theirs = pair
    ids = random_ids(ours.config, length=20)
    ones = torch.ones_like(ids)
    expected = theirs.generate(ids, attention_mask=ones, max_new_tokens=100, do_sample=False, pad_token_id=0)
    assert len(set(expected[0, 20:].tolist())) > 3  # not one token for ever
    assert torch.equal(ours.generate(ids, max_new_tokens=100), expected)
    penalty = {"max_new_tokens": 60, "repetition_penalty": 1.3}
    expected = theirs.generate(ids, attention_mask=ones, do_sample=False, pad_token_id=0, **penalty)
    assert torch.equal(ours.generate(ids, **penalty), expected)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding(pair, side):
    ours, theirs = pair
    ids = random_ids(ours.config)
    mask = torch.ones_like(ids)
    if side != "right":
        mask[0, :13] = 0
    if side != "left":
        mask[1, 60:] = 0
    with torch.no_grad():
        a, b = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
        alone = ours(ids[:1][mask[:1] == 1][None]).logits
    assert a.isfinite().all()
    assert close(a[mask == 1], b[mask == 1])
    assert close(a[0][mask[0] == 1], alone[0])


def test_bfloat16_is_as_exact_as_transformers(pair):
    ours, theirs = pair
    ids = random_ids(ours.config)
    with torch.no_grad():
        truth = theirs(ids).logits
        a = PersimmonForCausalLM(ours.config).eval()
        a.load_state_dict(ours.state_dict())
        b = type(theirs)(theirs.config).eval()
        b.load_state_dict(theirs.state_dict())
        a, b = (m.bfloat16()(ids).logits.float() for m in (a, b))
    assert truth.numel() >= 10_000
    rms = [(x - truth).square().mean().sqrt().item() for x in (a, b)]
    assert 0 < rms[0] <= 1.1 * rms[1], rms


# --- classifiers, fine-tuning ----------------------------------------------------------------------------------------


def classifier(tmp_path: Path, kind: str, **changes):
    """Random weights as our classifier and as transformers', with gradients to compare."""
    ours = {"sequence": PersimmonForSequenceClassification, "token": PersimmonForTokenClassification}[kind]
    theirs = getattr(transformers, ours.__name__)
    randomize(ours(replace(CONFIGS["D16"], **changes))).save_pretrained(tmp_path)
    return ours.from_pretrained(tmp_path), theirs.from_pretrained(tmp_path, dtype="float32").eval()


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows, padded with id 5 on the left, on the right and not at all."""
    ids, mask = random_ids(CONFIGS["D16"], rows=3), torch.ones(3, T, dtype=torch.long)
    ids[0, :9], mask[0, :9], ids[1, 50:], mask[1, 50:] = 5, 0, 5, 0
    return ids, mask


def compare(ours, theirs, *inputs, **options):
    a, b = ours(*inputs, **options), theirs(*inputs, **options)
    assert close(a.logits, b.logits) and close(a.loss, b.loss)
    a.loss.backward(), b.loss.backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert close(p.grad, expected[name].grad), name


@pytest.mark.parametrize(
    ("K", "problem_type", "labels"),
    [(1, None, torch.randn(3)), (1, None, torch.randn(3, 1)), (4, "regression", torch.randn(3, 4)),
     (4, None, torch.tensor([3, 0, 1])), (4, "single_label_classification", torch.tensor([3, -100, 1])),
     (4, None, torch.rand(3, 4)), (4, "multi_label_classification", torch.rand(3, 4).round()), (2, None, torch.tensor([1, 0, 1]))],
)  # fmt: skip
def test_sequence_classification(tmp_path, K, problem_type, labels):
    ours, theirs = classifier(tmp_path, "sequence", num_labels=K, problem_type=problem_type)
    assert theirs.config.num_labels == K
    ids, mask = padded_batch()
    compare(ours, theirs, ids, attention_mask=mask, labels=labels)
    with torch.no_grad():
        alone = torch.cat([ours(ids[b : b + 1, mask[b] == 1]).logits for b in range(3)])
        assert close(ours(ids, mask).logits, alone)  # the padding is not what is judged
        embeds = torch.randn(3, T, 48)
        assert close(ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits)


def test_sequence_classification_without_padding_token(tmp_path):
    ours, theirs = classifier(tmp_path, "sequence", num_labels=3, pad_token_id=None)
    ids = random_ids(CONFIGS["D16"], rows=1)
    compare(ours, theirs, ids, labels=torch.tensor([2]))
    with pytest.raises(ValueError, match="to find where 2 texts end, config.json has to have a pad_token_id"):
        ours(ids.expand(2, -1))


def test_token_classification(tmp_path):
    ours, theirs = classifier(tmp_path, "token", num_labels=6)
    ids, mask = padded_batch()
    labels = torch.randint(6, (3, T))
    labels[mask == 0] = -100
    labels[2, 10:20] = -100
    a, b = ours(ids, mask), theirs(ids, mask)
    assert close(a.logits[mask == 1], b.logits[mask == 1]) and a.loss is None
    compare(ours, theirs, ids[2:], labels=labels[2:])
    assert close(ours(ids, mask, labels=labels).loss, theirs(ids, mask, labels=labels).loss)


@pytest.mark.parametrize("changes", [{"classifier_dropout": 1.0}, {"hidden_dropout": 1.0},
                                     {"hidden_dropout": 1.0, "classifier_dropout": 0.0}])  # fmt: skip
def test_token_classification_dropout(tmp_path, changes):
    ours, theirs = classifier(tmp_path, "token", num_labels=6, **changes)
    ids = random_ids(CONFIGS["D16"])
    trained = ours.train()(ids).logits
    assert close(trained, theirs.train()(ids).logits) and not close(trained, ours.eval()(ids).logits, 0.1)
    is_all_bias = close(trained, ours.score.bias.expand_as(trained), 1e-6)
    assert is_all_bias == (changes.get("classifier_dropout") != 0.0)


def test_another_default_device(folder, monkeypatch):
    """A model that is loaded onto the CPU stays and works there ("meta" stands for a GPU)."""
    use_one_token_products(monkeypatch)
    models = []
    for place in ("cpu", "meta"):
        with torch.device(place), pytest.warns(UserWarning, match="has no classifier"):
            head = PersimmonForTokenClassification.from_pretrained(folder).score
            models.append(PersimmonForCausalLM.from_pretrained(folder))
        assert head.weight.device.type == head.bias.device.type == "cpu"
    ids, prompt = random_ids(models[0].config, rows=1), {"max_new_tokens": 9, "stop_ids": ()}
    with torch.device("meta"):
        found = models[1].generate(ids, **prompt).tolist()
    assert found == models[0].generate(ids, **prompt).tolist()


@pytest.mark.parametrize("cls", [PersimmonForSequenceClassification, PersimmonForTokenClassification])
def test_a_classifier_from_a_language_model(folder, tmp_path, cls, small):
    with pytest.warns(UserWarning, match="has no classifier: score.*weight is new, random.*lm_head.weight is not used"):
        model = cls.from_pretrained(folder, num_labels=50, pad_token_id=7)
    assert model.config.num_labels == 50 and model.config.pad_token_id == 7
    assert torch.equal(model.model.layers[1].mlp.dense_4h_to_h.bias, small.model.layers[1].mlp.dense_4h_to_h.bias)
    assert model.score.weight.shape == (50, 48) and 0.015 < model.score.weight.std() < 0.025
    assert model.score.bias is None or (model.score.bias == 0).all()
    # a classifier's own folder is strict again
    model.save_pretrained(tmp_path / "own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = cls.from_pretrained(tmp_path / "own")
    assert torch.equal(again.score.weight, model.score.weight) and again.config.num_labels == 50
    file = tmp_path / "own" / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.zeros(97, 48)}, file)
    with pytest.raises(ValueError, match="has the tensor lm_head.weight, which is not in"):
        cls.from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"score.\w+ in shape \(50"):
        model.save_pretrained(tmp_path / "own")
        cls.from_pretrained(tmp_path / "own", num_labels=3, id2label=None)


def test_label_names_are_kept(tmp_path):
    names = {"0": "sad", "1": "glad", "2": "mad"}
    model = PersimmonForTokenClassification(replace(CONFIGS["D16"], num_labels=3, id2label=names))
    model.save_pretrained(tmp_path)
    assert PersimmonConfig.from_pretrained(tmp_path).id2label == names
    theirs = transformers.PersimmonForTokenClassification.from_pretrained(tmp_path)
    assert list(theirs.config.id2label.values()) == list(names.values())


def test_training_in_float16_is_refused(small):
    ids = random_ids(small.config)
    for cls in (PersimmonForCausalLM, PersimmonForSequenceClassification, PersimmonForTokenClassification):
        model = cls(small.config).half()
        labels = {"labels": torch.zeros(2, dtype=torch.long) if "Sequence" in cls.__name__ else ids * 0}
        with pytest.raises(ValueError, match="float16 .* use bfloat16"):
            model.train()(ids, **labels)
        assert model.eval()(ids, **labels).loss.dtype == torch.float32
        assert model.bfloat16().train()(ids, **labels).loss.isfinite()


def test_gradient_checkpointing(small):
    """The same gradients, dropout included, out of much less that is kept for the backward pass."""
    ids, results = random_ids(small.config), []
    for is_on in (False, True):
        model = PersimmonForCausalLM(replace(small.config, hidden_dropout=0.3, attention_dropout=0.2))
        model.load_state_dict(small.state_dict())
        if is_on:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model.train()(ids, labels=ids).loss
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters()}, sum(kept)))
    (loss, grads, kept), (same_loss, same_grads, kept_less) = results
    assert loss == same_loss and all(torch.equal(grads[name], same_grads[name]) for name in grads)
    assert kept_less < kept / 3


# --- positions, cache, mask ------------------------------------------------------------------------------------------


def test_causal_mask():
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    mask = causal_mask(torch.arange(2, 5), 5, padding)[:, 0].int().tolist()
    assert mask == [[[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]]
    mask = causal_mask(torch.arange(2, 5), 5, None)[0, 0].int().tolist()
    assert mask == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert causal_mask(torch.arange(5), 5, None) is causal_mask(torch.tensor([4]), 5, None) is None


@pytest.mark.parametrize("chunks", [(5, 1, 3), (1, 1, 7), (9,), (2, 7)])
@pytest.mark.parametrize("is_padded", [False, True])
def test_chunks_equal_one_go(pair, chunks, is_padded):
    model, ids = pair[0], random_ids(pair[0].config, length=9)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.no_grad():
        whole = model(ids, mask if is_padded else None).logits
        cache, parts = KVCache(model.config, B, 9, torch.float32, "cpu"), []
        cache.keys.fill_(math.nan), cache.values.fill_(math.nan)  # nothing may be read that was not written
        for n in chunks:
            seen = cache.length
            part_mask = mask[:, : seen + n] if is_padded else None
            parts.append(model(ids[:, seen : seen + n], part_mask, cache=cache).logits)
            assert cache.length == int(cache.position) == seen + n
    kept = mask == 1 if is_padded else mask >= 0
    assert close(torch.cat(parts, 1)[kept], whole[kept], 1e-5)


def test_cache_refuses_what_does_not_fit(small):
    cache = KVCache(small.config, B, 9, torch.float32, "cpu")
    with torch.no_grad():
        small(random_ids(small.config, length=6), cache=cache)
        with pytest.raises(ValueError, match="room for 9 positions: 6 are taken and 4 more"):
            small(random_ids(small.config, length=4), cache=cache)
        with pytest.raises(ValueError, match="batch of 2, the input has 1 rows"):
            small(random_ids(small.config, rows=1, length=2), cache=cache)
        assert cache.length == int(cache.position) == 6  # an error moves nothing
        small(random_ids(small.config, length=3), cache=cache)


def test_position_ids(pair):
    """Far positions agree with transformers, and differ from near ones: rounding at 16000 is part of the model."""
    ours, theirs = pair
    ids, far = random_ids(ours.config), torch.arange(16000, 16000 + T)[None]
    scattered = torch.arange(T)[None] * 3
    with torch.no_grad():
        assert close(ours(ids, position_ids=far).logits, theirs(ids, position_ids=far).logits)
        # transformers takes a jump in position_ids for a new sequence, unless there is a mask
        b = theirs(ids, position_ids=scattered, attention_mask=torch.ones_like(ids)).logits
        assert close(ours(ids, position_ids=scattered).logits, b)
        assert not close(ours(ids).logits, b, 1e-2)


def test_rope_turns_the_first_R_of_D_only():
    config = PersimmonConfig()  # D = 64, R = 32
    x, position_ids = torch.randn(1, 3, 2, 64), torch.tensor([[0, 1, 16383]])
    y = apply_rope(x, *rope_tables(position_ids, config, torch.float32))
    assert torch.equal(y[..., 32:], x[..., 32:])
    assert torch.equal(y[:, 0], x[:, 0])
    for t, p in enumerate((0, 1, 16383)):
        for i in range(16):
            angle = p * 25000.0 ** (-2 * i / 32)
            a, b = x[0, t, 1, i].double(), x[0, t, 1, i + 16].double()
            expected = torch.stack((a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)))
            # float32 holds an angle of 16383 to 1e-3
            assert close(y[0, t, 1, [i, i + 16]].double(), expected, 1e-5 if p < 2 else 6e-3)


def test_inputs_that_do_not_fit(small):
    ids = random_ids(small.config, length=4)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and has to have \(B, S\) = \(2, 4\)"):
        small(ids, attention_mask=torch.ones(2, 3))
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 4, 48)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            small(**arguments)
    for options in ({"labels": ids, "logits_to_keep": 1}, {"logits_to_keep": -1}):
        with pytest.raises(ValueError, match="logits_to_keep"):
            small(ids, **options)
    for arguments in ({"input_ids": ids[0]}, {"inputs_embeds": torch.zeros(2, 4, 47)}, {"inputs_embeds": torch.zeros(4, 48)}):
        with pytest.raises(ValueError, match=r"inputs_embeds \(B, T, C\) with C = 48"):
            small(**arguments)
    for shape in ((2, 3), (1, 1), (3, 4)):
        with pytest.raises(ValueError, match=r"position_ids have shape .* \(B, T\) = \(2, 4\)"):
            small(ids, position_ids=torch.zeros(shape).long())


# --- one token on a CPU ----------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """Counts of the operations that are for one row, while every matrix counts as large."""
    counts = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    bag, dots = torch.nn.functional.embedding_bag, torch.ops.aten._embedding_bag_per_sample_weights_backward
    monkeypatch.setattr(torch.nn.functional, "embedding_bag", counted("sums", bag))
    monkeypatch.setattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", counted("dots", dots))
    monkeypatch.setattr(torch, "mv", counted("mv", torch.mv))
    monkeypatch.setattr(torch.nn.functional, "linear", counted("linear", torch.nn.functional.linear))
    use_one_token_products(monkeypatch)
    return counts


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_for_one_row(monkeypatch, reads, processor, bias, dtype):
    use_one_token_products(monkeypatch, processor)
    layer = Linear(24, 56, bias).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for shape in ((1, 1, 24), (24,), (2, 1, 24), (1, 32, 24), (1, 33, 24)):
        rows, x = math.prod(shape[:-1]), torch.randn(shape).to(dtype)
        is_dots = processor == "Zen 4" and dtype != torch.float16 and rows == 1
        is_amx = processor == "AMX" and dtype == torch.bfloat16 and rows <= 32
        reads.clear()
        with torch.no_grad():
            y = layer(x)
            assert reads == ({"dots": 1} if is_dots else {"mv": 1} if is_amx and rows == 1 else {} if is_amx else {"linear": 1})
            assert close(y, torch.nn.functional.linear(x, layer.weight, layer.bias), tolerance) and y.is_contiguous()
    reads.clear()
    x = torch.randn(1, 24).to(dtype)
    layer(x).sum().backward()
    with torch.no_grad():
        monkeypatch.setattr(Linear, "large", layer.weight.nbytes + 1)
        layer(x)
        monkeypatch.setattr(Linear, "large", 0)
        layer.weight.data = layer.weight.t().contiguous().t()
        layer(x)
    assert reads == {"linear": 3}


def test_linear_compiles_in_one_piece(monkeypatch):
    """Dynamo can't look into what tells the processor's abilities."""
    monkeypatch.setattr(Linear, "large", 0)
    layer, x = Linear(24, 56).bfloat16(), torch.randn(1, 24).bfloat16()
    with torch.no_grad():
        y = torch.compile(layer, backend="eager", fullgraph=True)(x)
        assert torch.equal(y, torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_what_the_processor_has():
    assert all(persimmon.cpu_has(name) == getattr(torch.cpu, f"_is_{name}_supported")() for name in PROCESSORS["AMX"])
    assert persimmon.cpu_has("nonsense") is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, density", [(1, 0.0), (1, 0.1), (1, 1.0), (3, 0.2), (3, 0.6), (16, 0.05), (17, 0.05)])
def test_sparse_linear(reads, rows, density, dtype):
    layer = SparseLinear(397, 24).to(dtype)  # a number that no number of bags divides
    x = (torch.rand(rows, 1, 397) + 0.5) * (torch.rand(rows, 1, 397) < density)
    x[rows // 2] = 0  # a row without anything
    x = x.to(dtype)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()).to(dtype)
        assert close(layer(x), expected, 1e-5 if dtype == torch.float32 else 0.13)
    assert reads["sums"] == 0
    weight = layer.weight.clone()
    layer.transpose()
    assert torch.equal(layer.weight, weight) and layer.weight.stride() == (1, 24)
    with torch.no_grad():
        assert close(layer(x), expected, 1e-5 if dtype == torch.float32 else 0.13)
    assert reads["sums"] == (rows <= 16 and x.count_nonzero() <= 1.5 * 397)


def test_sparse_linear_reads_only_what_it_needs(reads):
    """A weight that only zeros multiply may be anything, even NaN."""
    layer = SparseLinear(40, 24)
    layer.transpose()
    layer.weight.data[:, 7] = math.nan
    x = torch.rand(2, 40)
    x[:, 7:20] = 0
    with torch.no_grad():
        assert layer(x).isfinite().all()
        x[1, 7] = 1
        assert layer(x)[0].isfinite().all() and layer(x)[1].isnan().all()


@pytest.mark.parametrize("N, S", [(20, 1), (20, 7), (20, 8), (20, 9), (20, 20), (20, 24), (7, 1), (7, 7), (8, 8)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_cpu_attention(monkeypatch, N, S, is_masked):
    use_one_token_products(monkeypatch)
    cache = KVCache(CONFIGS["D16"], 2, N, torch.float32, "cpu")
    keys, values = cache.keys[1], cache.values[1]
    rounded = {20: 24}.get(N, N)  # to blocks of 8, of which a shorter cache is one
    assert keys.shape == values.shape == (2, 3, rounded, 16) and keys.stride(3) == rounded
    keys.copy_(torch.randn(keys.shape))
    values.copy_(torch.randn(keys.shape))
    q, k, v = torch.randn(2, 3, 1, 16), keys[:, :, :S].clone(), values[:, :, :S].clone()
    keys[:, :, S:], values[:, :, S:] = math.nan, math.nan  # what is not there yet is not read
    mask = torch.rand(2, 1, 1, S) < 0.5 if is_masked else None
    if is_masked:
        mask[..., S - 1] = True
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert close(cpu_attention(q, keys, values, S, mask), expected, 1e-6)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("dtype, N, expected", [
    (torch.bfloat16, 64, True), (torch.float16, 64, True), (torch.bfloat16, 63, False), (torch.float32, 9000, False),
])  # fmt: skip
def test_where_keys_lie_transposed(monkeypatch, processor, dtype, N, expected):
    """In 16 bit from 64 positions for the 8B's 64 heads: shorter ones, float32, and bfloat16 on AMX, are SDPA's."""
    monkeypatch.setattr(persimmon, "cpu_has", lambda feature: feature in PROCESSORS[processor])
    expected &= processor != "AMX" or dtype == torch.float16
    config = PersimmonConfig(hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=64)
    assert KVCache(config, 1, N, dtype, "cpu").is_transposed == expected
    assert not KVCache(config, 1, N, dtype, "meta").is_transposed


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("rows", [1, 2])
def test_autocast(monkeypatch, small, rows, processor):
    """The products of sections 4 and 10 are not among what PyTorch casts; float32 and bfloat16 meet here."""
    use_one_token_products(monkeypatch, processor)
    ids = random_ids(small.config, rows=rows, length=6)
    with torch.no_grad():
        expected = small(ids).logits
    for model in (small, with_transposed_weights(small), quantize_model(copy.deepcopy(small), "int8")):
        cache = KVCache(small.config, rows, 6, torch.float32, "cpu")
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            logits = [model(ids[:, :3], cache=cache).logits, *(model(ids[:, t : t + 1], cache=cache).logits for t in (3, 4, 5))]
        assert close(torch.cat(logits, 1).float(), expected, 0.1)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_pass_uses_the_products(monkeypatch, reads, small, processor):
    use_one_token_products(monkeypatch, processor)
    model = with_transposed_weights(small).bfloat16()
    cache = KVCache(model.config, 1, 20, torch.bfloat16, "cpu")
    with torch.no_grad():
        model(random_ids(model.config, rows=1, length=9), cache=cache)
        assert not reads - Counter(linear=1000)
        reads.clear()
        model(random_ids(model.config, rows=1, length=1), cache=cache)
    L = model.config.num_hidden_layers
    assert reads == {"AMX": {"sums": L, "mv": 3 * L + 1}, "Zen 4": {"sums": 3 * L, "dots": 3 * L + 1},
                     "other": {"sums": 3 * L, "linear": 3 * L + 1}}[processor]  # fmt: skip


def test_loading_transposes_what_is_large(folders, monkeypatch):
    folder = folders["D16", "2023"]
    monkeypatch.setattr(Linear, "large", 48 * 80 * 4)
    for options, is_transposed in (({}, True), ({"sparse": False}, False)):
        fractions = []
        model = PersimmonForCausalLM.from_pretrained(folder, progress=fractions.append, **options)
        assert fractions == sorted(fractions) and fractions[-1] == 1
        for name, p in model.named_parameters():
            assert p.is_contiguous() != (is_transposed and name.endswith("dense_4h_to_h.weight"))
        for name, p in load_file(folder / "model.safetensors").items():
            assert torch.equal(model.state_dict()[name], p)
        assert persimmon.is_plain(model) == persimmon.is_plain(model.float()) == (not is_transposed)
        assert persimmon.is_plain(model.to("meta"))  # or any other device
    monkeypatch.setattr(Linear, "large", 48 * 80 * 4 + 1)
    assert all(p.is_contiguous() for p in PersimmonForCausalLM.from_pretrained(folder).parameters())


@pytest.mark.parametrize("processor", PROCESSORS)
def test_one_token_products_in_bfloat16(folders, monkeypatch, processor):
    """Their error against float32 is at most 1.35 times that of plain operations: biases and scores are rounded."""
    model = PersimmonForCausalLM.from_pretrained(folders["D64", "2023"])
    ids = random_ids(model.config, rows=1, length=150)

    def logits(model: PersimmonForCausalLM) -> torch.Tensor:
        with torch.no_grad():
            cache = KVCache(model.config, 1, 150, model.lm_head.weight.dtype, "cpu")
            return torch.cat([model(ids[:, t : t + 1], cache=cache).logits[0].float() for t in range(150)])

    truth = logits(model)
    model = model.bfloat16()
    plain = (logits(model) - truth).square().mean().sqrt()
    use_one_token_products(monkeypatch, processor)
    fast = (logits(with_transposed_weights(model)) - truth).square().mean().sqrt()
    assert 0 < fast <= 1.35 * plain, (fast, plain)


# --- quantization ----------------------------------------------------------------------------------------------------


def dequantized(layer: torch.nn.Module) -> torch.Tensor:
    """W of a quantized layer, (O, C) in float64, from what is stored, with numpy alone and by the format's description."""
    stored = {name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
              for name, tensor in layer.named_buffers()}  # fmt: skip
    weight = stored["weight"]
    if isinstance(layer, Int8Linear):
        return torch.from_numpy(weight.astype(numpy.float64) * stored["scale"][:, None])
    W = numpy.zeros((layer.out_features, layer.in_features))
    if isinstance(layer, Int8SparseLinear):
        for f, row in enumerate(weight):
            scale, offset = numpy.frombuffer(row[-8:].tobytes(), numpy.float32)
            W[:, f] = row[:-8] * float(scale) + float(offset)
        return torch.from_numpy(W)
    for o in range(layer.out_features):
        byte = weight[o // 64, :, o % 32]
        number = byte >> 4 if o % 64 >= 32 else byte & 15
        scale = numpy.repeat(stored["scale"][:, o].astype(numpy.float64), layer.group_size, axis=0)
        W[o] = scale[:, 0] * (number.astype(numpy.float64) - 8) + scale[:, 1]
    return torch.from_numpy(W)


QUANTIZED = [(Int8Linear, 128), (Int8SparseLinear, 128), (Int4Linear, 32), (Int4Linear, 64), (Int4Linear, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cls", "group_size"), QUANTIZED)
@pytest.mark.parametrize("O", [64, 100])
def test_quantized_layers(cls, group_size, O, dtype):  # noqa: E741
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, O).to(dtype)
    layer, W = cls(linear, group_size), linear.weight.double()
    layer.block = 64  # or less than a block may have
    assert len(list(layer.blocks(dtype))) == {64: 1, 100: 2}[O]
    off = ((dequantized(layer) - W).norm() / W.norm()).item()
    assert off < {Int8Linear: 0.006, Int8SparseLinear: 0.006}.get(cls, 0.065)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for rows in (1, 3, 40, 70):
        x = torch.rand(rows, 1, 256)
        if cls is Int8SparseLinear:
            x *= torch.rand(rows, 1, 256) < 0.3
        expected = x.to(dtype).double() @ dequantized(layer).T + linear.bias.double()
        with torch.no_grad():
            y = layer(x.to(dtype))
        error = (y.double() - expected).norm() / expected.norm()
        assert y.dtype == dtype and y.shape == (rows, 1, O)
        assert error < tolerance
        x, gradient = x.to(dtype).requires_grad_(), torch.randn(y.shape).to(dtype)
        layer(x).backward(gradient)
        expected = gradient.double() @ dequantized(layer)
        assert (x.grad.double() - expected).norm() / expected.norm() < tolerance
    again = cls(linear, group_size).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize(("cls", "group_size"), QUANTIZED)
def test_quantizing_small_float16(cls, group_size):
    """Where scales are hardly numbers any more, signs stay."""
    linear = torch.nn.Linear(128, 64).half()
    linear.weight.data = (torch.randn(64, 128) * 1e-4).half()
    linear.weight.data[:, 0] = 2e-4
    linear.weight.data[5] = 3e-8  # less than any scale
    w, W = linear.weight.double(), dequantized(cls(linear, group_size))
    assert (W - w)[:5].abs().max() < 1e-4 and (W[:5] * w[:5] >= 0)[w[:5].abs() > 5e-5].all() and W.isfinite().all()


@pytest.mark.parametrize(("cls", "group_size"), QUANTIZED)
def test_quantized_layers_do_not_overflow(cls, group_size):
    """In float16 numbers end at 65504: what is summed has to be of the size of the result."""
    linear = torch.nn.Linear(4096, 64, bias=False)
    linear.weight.data.abs_()
    x = torch.rand(100, 4096) * 20
    layer, expected = cls(linear.half(), group_size), linear.double()(x.double())
    assert 300 < expected.min()
    for rows in (2, 100):
        with torch.no_grad():
            assert (layer(x[:rows].half()).double() / expected[:rows] - 1).abs().max() < 0.02


@pytest.mark.parametrize(("cls", "group_size"), QUANTIZED)
def test_quantized_layers_take_any_layout_and_new_weights(cls, group_size):
    torch.manual_seed(0)
    layer, other = (cls(torch.nn.Linear(128, 64).bfloat16(), group_size) for _ in range(2))
    wide = (torch.rand(3, 4, 131) * (torch.rand(3, 4, 131) < 0.3)).bfloat16()
    with torch.no_grad():
        for x in (wide[..., :128], wide[:, -1:, 3:], wide[1, 2, :128], wide[0, :, :128].t().contiguous().t()):
            assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))
        x = wide[..., :128]
        assert not torch.equal(layer(x), other(x))
        layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
        assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("cls", [Int8Linear, Int8SparseLinear])
def test_quantized_layers_of_one_input(cls):
    linear = torch.nn.Linear(1, 50)
    layer, x = cls(linear, 128), torch.rand(40, 1)
    assert close(layer(x), x.double() @ dequantized(layer).T + linear.bias.double(), 1e-5)


@pytest.mark.parametrize("group_size", [32, 128])
def test_int4_is_better_than_the_range_of_a_group(group_size):
    torch.manual_seed(0)
    w = torch.randn(128, 256)
    groups = w.unflatten(1, (-1, group_size))
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (most - least) / 15
    plain = (((groups - least) / step).round() * step + least - groups).square().sum()
    linear = torch.nn.Linear(256, 128)
    linear.weight.data = w
    assert (dequantized(Int4Linear(linear, group_size)) - w).square().sum() < 0.9 * plain


@pytest.mark.parametrize(("cls", "group_size"), QUANTIZED)
def test_quantizing_odd_weights(cls, group_size):
    linear = torch.nn.Linear(256, 70).bfloat16()
    weight = linear.weight.data
    weight[3], weight[:, 5], weight[66, 128:] = 0, 0, 0.75  # zeros by row and by column; a group of equal numbers
    layer = cls(linear, group_size)
    W = dequantized(layer)
    assert W.isfinite().all() and (W[3].abs() < 1e-2).all() and (W[66, 128:] - 0.75).abs().max() < 0.02
    if cls is not Int4Linear:
        assert (W[:, 5] == 0).all()
    if cls is Int4Linear:
        assert (W[3] == 0).all() and (W[66, 128:] == 0.75).all()  # groups that are all equal are exact
    x = torch.randn(100, 256).bfloat16()
    x[:, 5] = 300  # times 0, whatever the others are
    expected = (x.double() @ W.T + linear.bias.double()).detach()
    for rows in (2, 100):
        with torch.no_grad():
            assert (layer(x[:rows]) - expected[:rows]).norm() < (0.01 if cls is Int8Linear else 0.03) * expected[:rows].norm()
    for bad in (math.inf, -math.inf, math.nan):
        weight[4, 4] = bad
        with pytest.raises(ValueError, match="not finite"):
            cls(linear, group_size)


@pytest.mark.parametrize(("cls", "operator", "rows"), [
    (Int8Linear, "_weight_int8pack_mm", 16), (Int4Linear, "_weight_int4pack_mm_for_cpu", 64),
    (Int8SparseLinear, "embedding_bag_byte_rowwise_offsets", 64)])  # fmt: skip
def test_quantized_layers_use_the_kernel_or_go_without(monkeypatch, cls, operator, rows):
    layer, calls = cls(torch.nn.Linear(256, 64).bfloat16(), 64), []
    namespace = torch.ops.quantized if cls is Int8SparseLinear else torch.ops.aten
    original = getattr(namespace, operator)
    monkeypatch.setattr(namespace, operator, lambda *a, **k: calls.append(1) or original(*a, **k))
    x = (torch.rand(2, 256) * (torch.rand(2, 256) < 0.3)).bfloat16()
    with torch.no_grad():
        y = layer(x)
        few = torch.zeros(rows, 256).bfloat16()
        few[:, :12] = torch.rand(rows, 12)  # 3 * 256 numbers at most
        assert close(layer(few), few.double() @ dequantized(layer).T + layer.bias.double(), 0.01) and len(calls) == 2
        layer(torch.cat((few, few[:1])))
        assert len(calls) == 2
        layer(torch.ones(8, 256).bfloat16())  # 8 * 256 that are not zero
        assert len(calls) == 2 + (cls is not Int8SparseLinear)
        calls.clear()
        for dtype in (torch.float32, torch.float16):  # for which the kernels of dense weights are not vectorized
            layer(x.to(dtype))
            assert len(calls) == (cls is Int8SparseLinear)
            calls.clear()
        layer(x)
        layer(x.requires_grad_())
    assert len(calls) == 2
    layer(x).sum().backward()
    assert len(calls) == 2 and x.grad.abs().sum() > 0
    monkeypatch.setattr(persimmon, "private_operator", lambda name: None)
    with torch.no_grad():
        assert close(layer(x), y, 0.01)


def first_byte(file: Path) -> int:
    """Where the numbers begin in a safetensors file."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_int8_kernel_gets_what_it_can_read(monkeypatch, folders, tmp_path):
    """It reads 16 numbers at once: at other addresses it crashes, with other widths it multiplies what is beyond."""
    original, calls = torch.ops.aten._weight_int8pack_mm, []

    def strict(x, weight, scale):
        assert x.shape[1] % 16 == x.data_ptr() % 32 == weight.data_ptr() % 16 == 0
        calls.append(1)
        return original(x, weight, scale)

    monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", strict)
    for C, is_used in ((40, False), (48, True)):
        layer = Int8Linear(torch.nn.Linear(C, 64).bfloat16(), 128)
        x = torch.rand(3 * C + 1).bfloat16()[1:].view(3, C)
        expected = x.double() @ dequantized(layer).T + layer.bias.double()
        with torch.no_grad():
            assert close(layer(x), expected, 0.02)
            layer(torch.rand(3, C + 3).bfloat16()[:, :C])
            weight = torch.empty(64 * C + 8, dtype=torch.int8)[8:].view(64, C)
            layer.load_state_dict({**layer.state_dict(), "weight": weight.copy_(layer.weight)}, assign=True)
            assert close(layer(x), expected, 0.02)
        assert len(calls) == 3 * is_used
    # weights in a file, where this program and where another one puts them
    ids = torch.tensor([[1, 2, 3]])
    model = PersimmonForCausalLM.from_pretrained(folders["D64", "2023"], "bfloat16", quantize="int8")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    at, content = first_byte(file), file.read_bytes()
    assert at % 64 == 0
    for spaces in (0, 1, 8):
        file.write_bytes((at - 8 + spaces).to_bytes(8, "little") + content[8:at] + b" " * spaces + content[at:])
        with torch.no_grad():
            assert torch.equal(PersimmonForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    assert len(calls) > 20


def test_a_kernel_that_is_gone_is_reported():
    with pytest.warns(UserWarning, match="this PyTorch has no aten._weight_int3pack_mm"):
        assert persimmon.private_operator("aten._weight_int3pack_mm") is None
    assert persimmon.private_operator("aten._weight_int8pack_mm") is not None


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_int4_on_other_processors(capability):
    """PyTorch's kernel orders the numbers by the processor's abilities, which this variable hides."""
    code = """if True:
        import torch, persimmon
        torch.manual_seed(0)
        layer, x = persimmon.Int4Linear(torch.nn.Linear(256, 100).bfloat16(), 64), torch.randn(2, 256).bfloat16()
        with torch.no_grad():
            y = layer(x)
            layer.load_state_dict(persimmon.Int4Linear(torch.nn.Linear(256, 100).bfloat16(), 64).state_dict())
            assert layer.packed is None and (layer(x) - y).abs().max() > 0.1
            y = layer(x)
            persimmon.private_operator = lambda name: None
            assert (layer(x) - y).abs().max() < 0.02, (layer(x) - y).abs().max()
        print(layer.packed is layer.weight)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, timeout=120,
                            env={**os.environ, "ATEN_CPU_CAPABILITY": capability})  # fmt: skip
    assert result.returncode == 0 and result.stdout == "False\n", result.stderr


@pytest.mark.parametrize(("kind", "group_size"), [("int8", 128), ("int4", 32), ("int4", 64)])
def test_quantized_model(folders, tmp_path, kind, group_size):
    """Its logits are those of a model with the same weights as plain numbers, for prompts and for single tokens."""
    folder = folders["D64", "2023"]
    fractions = []
    model = PersimmonForCausalLM.from_pretrained(
        folder, quantize=kind, group_size=group_size, progress=fractions.append)  # fmt: skip
    plain = PersimmonForCausalLM.from_pretrained(folder)
    assert fractions == sorted(fractions) and fractions[-1] == 1
    types = Counter(type(module).__name__ for module in model.modules())
    assert types[f"I{kind[1:]}Linear"] == 10 and types["Int8SparseLinear"] == 3 and types["Linear"] == 0
    for name, module in model.named_modules():
        if isinstance(module, persimmon.QuantizedLinear):
            target = plain.get_submodule(name)
            assert close(target.weight.double(), dequantized(module), 0.3)
            target.weight.data = dequantized(module).float()
    ids = random_ids(model.config, length=50)
    with torch.no_grad():
        expected = plain(ids).logits
        assert close(model(ids).logits, expected)
        cache = KVCache(model.config, 2, 50, torch.float32, "cpu")
        one_by_one = [model(ids[:, t : t + 1], cache=cache).logits for t in range(50)]
        assert close(torch.cat(one_by_one, dim=1), expected)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["quantization_config"] == {"quant_method": "persimmon.py", "quantize": kind, "group_size": group_size}
    again = PersimmonForCausalLM.from_pretrained(tmp_path)
    assert again.config == replace(model.config, dtype="float32")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert torch.equal(again.generate(ids, max_new_tokens=9), plain.generate(ids, max_new_tokens=9))
    with pytest.raises(RuntimeError):  # it warns that it does not know this method, and then the shapes do not fit
        transformers.PersimmonForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the model is quantized already, in {kind}"):
        PersimmonForCausalLM.from_pretrained(tmp_path, quantize="int8")
    inner = again.model  # a model in its own right
    with pytest.raises(ValueError, match=f"the model is quantized already, in {kind}"):
        quantize_model(inner, "int8")
    inner.save_pretrained(tmp_path / "inner")
    hidden = PersimmonModel.from_pretrained(tmp_path / "inner")(ids).last_hidden_state
    assert torch.equal(hidden, inner(ids).last_hidden_state)


def test_quantization_refuses(folders, tmp_path):
    with pytest.raises(ValueError, match="query_key_value: a matrix of 48 inputs can't be quantized in groups of 32"):
        PersimmonForCausalLM.from_pretrained(folders["D16", "2023"], quantize="int4", group_size=32)
    for changes, message in (({"quantize": "int3"}, "quantize = 'int3' is neither"), ({"group_size": 16}, "none of 32")):
        with pytest.raises(ValueError, match=message):
            PersimmonForCausalLM.from_pretrained(folders["D64", "2023"], **{"quantize": "int4", **changes})
    model = PersimmonForCausalLM.from_pretrained(folders["D64", "2023"])
    model.model.layers[1].mlp.dense_4h_to_h.weight.data = torch.full((128, 208), math.nan)
    with pytest.raises(ValueError, match="layers.1.mlp.dense_4h_to_h: weights that are not finite"):
        quantize_model(model, "int8")
    quantized = PersimmonForCausalLM.from_pretrained(folders["D64", "2023"], quantize="int8")
    quantized.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), pytest.warns(UserWarning, match="has no classifier"):
        expected = quantized.model(ids).last_hidden_state
        assert torch.equal(PersimmonModel.from_pretrained(tmp_path)(ids).last_hidden_state, expected)
        classifier = PersimmonForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(classifier.model(ids).last_hidden_state, expected)
    state = load_file(tmp_path / "model.safetensors")
    for dtype in (torch.float32, torch.uint8):
        state["lm_head.weight"] = state["lm_head.weight"].to(dtype)
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"lm_head.weight as {dtype}: config.json makes it torch.int8"):
            PersimmonForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("kind", "group_size", "limit"), [("int8", 128, 0.004), ("int4", 32, 0.02), ("int4", 128, 0.04)])
def test_quantized_loss_of_the_embedded_model(kind, group_size, limit):
    """On lines of Shakespeare, which the model may have seen: more than the bars for its validation text leave."""
    text = ("KING HENRY V:\nOnce more unto the breach, dear friends, once more;\nOr close the wall up with our English "
            "dead.\nIn peace there's nothing so becomes a man\nAs modest stillness and humility.\n\nJULIET:\nO Romeo, "
            "Romeo! wherefore art thou Romeo?\nDeny thy father and refuse thy name.\n")  # fmt: skip
    ids = Tokenizer(TINY)(text)["input_ids"]
    with torch.no_grad():
        plain, quantized = (PersimmonForCausalLM.from_pretrained(TINY, **options)(ids, labels=ids).loss.item()
                            for options in ({}, {"quantize": kind, "group_size": group_size}))  # fmt: skip
    assert quantized != plain and abs(quantized / plain - 1) < limit, (plain, quantized)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_convert_quantizes(tmp_path, capsys, kind):
    out = tmp_path / "out"
    assert convert.main([str(TINY), str(out), "--quantize", kind, "--group-size", "64",
                         "--shard-size", "1MB"]) == 0  # fmt: skip
    assert {file.name for file in out.iterdir() if "model-0000" not in file.name} == {
        "config.json", "generation_config.json", "model.safetensors.index.json", "special_tokens_map.json",
        "tokenizer.model", "tokenizer_config.json"}  # fmt: skip
    assert all(first_byte(file) % 64 == 0 for file in out.glob("*.safetensors"))
    expected = PersimmonForCausalLM.from_pretrained(TINY, quantize=kind, group_size=64)
    model = PersimmonForCausalLM.from_pretrained(out)
    assert model.config.quantize == kind and model.config.group_size == 64
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / (TINY / "model.safetensors").stat().st_size
    assert size < {"int8": 0.56, "int4": 0.43}[kind]
    stdout = sample_py("--model", out, "-n", "9", "--temp", "0").stdout
    assert stdout == sample_py("--quantize", kind, "--group-size", "64", "-n", "9", "--temp", "0").stdout != b""
    error = sample_py("--model", out, "--quantize", "int8").stderr.decode()
    assert error == f"sample.py: error: the model is quantized already, in {kind}\n"
    assert convert.main([str(out), str(tmp_path / "no")]) == 2 and not (tmp_path / "no").exists()
    assert f"convert.py: error: {out} is quantized, in {kind}: start" in capsys.readouterr().err


def test_convert_quantizes_a_classifier(tmp_path, capsys):
    """All but its head, in another dtype."""
    with pytest.warns(UserWarning, match="has no classifier"):
        model = PersimmonForTokenClassification.from_pretrained(TINY, num_labels=3)
    model.save_pretrained(tmp_path / "model")
    shutil.copy(TINY / "tokenizer.model", tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), "--quantize", "int4", "--dtype", "float32"]
    assert convert.main(arguments) == 0 and "5,003,523 parameters" in capsys.readouterr().out
    expected = quantize_model(model.float(), "int4").state_dict()
    state = PersimmonForTokenClassification.from_pretrained(tmp_path / "out").state_dict()
    assert state.keys() == expected.keys() and state["score.weight"].shape == (3, 256)
    assert all(torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype for name, tensor in state.items())
    PersimmonForCausalLM.from_pretrained(TINY).bfloat16().save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.1.self_attn.dense.weight"][3, 3] = -math.inf
    save_file(state, tmp_path / "model" / "model.safetensors")
    assert convert.main([*arguments, "--force"]) == 2
    assert "model.layers.1.self_attn.dense: weights that are not finite" in capsys.readouterr().err


# --- CUDA graphs and Triton kernels -----------------------------------------------------------------------------------
#
# The kernels run on CUDA where there is one, else in Triton's interpreter, which has to be chosen before triton is
# imported: a test starts these tests once more in a process where it is. What is around them is tested with PyTorch's
# operations in their place.

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
runs_kernel = pytest.mark.skipif(DEVICE == "cpu" and not IS_INTERPRETED, reason="no GPU; see the test in the interpreter")
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


class PlainKernels:
    """What the kernels compute, by PyTorch, with the number of calls; as they do, it looks up the position itself."""

    def __init__(self) -> None:
        self.calls = Counter()

    def attention(self, qkv, layer, rope, mask, cache):
        self.calls["attention"] += 1
        (B, T, C), S = qkv.shape, int(cache.position) + qkv.shape[1]
        q, k, v = qkv.view(B, T, layer.num_heads, 3, layer.head_dim).unbind(3)
        q, k = apply_rope(layer.q_layernorm(q), *rope), apply_rope(layer.k_layernorm(k), *rope)
        for block, new in ((cache.keys, k), (cache.values, v)):
            block[layer.layer, :, :, S - T : S] = new.transpose(1, 2)
        mask = causal_mask(torch.arange(S - T, S), S, None) if mask is None else mask[..., :S]
        y = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), cache.keys[layer.layer, :, :, :S], cache.values[layer.layer, :, :, :S], attn_mask=mask,
            is_causal=mask is None and T > 1)  # fmt: skip
        return y.transpose(1, 2).reshape(B, T, C // 3)

    def linear(self, x, linear, norm=None, others=None, square=False):
        self.calls["linear"] += 1
        y = torch.nn.functional.linear(x if norm is None else norm(x), linear.weight, linear.bias)
        y = y.relu().square() if square else y
        return y if others is None else y + others


def run_again(forward, ids):
    """persimmon.record without a GPU: whatever it does once more, in the same memory."""
    logits = forward(ids).clone()

    def replay(new):
        ids.copy_(new)
        return logits.copy_(forward(ids))

    return replay


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, in whatever way they can run here."""
    if IS_INTERPRETED:
        from triton import language
        from triton.runtime import interpreter

        # It looks for triton.language among the globals of a kernel's file, and where it rewrites the code (so that
        # `n = 1` makes a tensor of Triton, which these kernels do not need) it knows nothing outside of the function.
        monkeypatch.setattr(persimmon, "tl", language, raising=False)
        monkeypatch.setattr(interpreter.FunctionRewriter, "rewrite_ast", lambda self: self.fn)
        monkeypatch.setattr(KVCache, "block", 10**9)  # keys as on a GPU: not transposed
        dot = interpreter.InterpreterBuilder.create_dot

        def widened(handle):  # it keeps bfloat16 as integers, and its product would multiply these
            if handle.dtype.scalar != language.bfloat16:
                return handle
            return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), language.float32)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot",
                            lambda self, a, b, *others: dot(self, widened(a), widened(b), *others))
        cores = argparse.Namespace(multi_processor_count=3)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cores)
        monkeypatch.setattr(persimmon, "record", run_again)

    def make(rows: int, heads: int, splits: int | None = None) -> persimmon.Kernels:
        found = persimmon.Kernels(rows, heads, DEVICE)
        found.splits = splits or found.splits
        return found

    return make


def test_kernel_in_the_interpreter():
    import triton

    triton_version, numpy_version = ([*map(int, p.__version__.split(".")[:2])] for p in (triton, numpy))
    if triton_version < [3, 7] and numpy_version >= [2, 4]:
        pytest.skip("the interpreter of Triton before 3.7 needs NumPy before 2.4")
    arguments = ("-m", "pytest", "-q", "-W", "error::RuntimeWarning", __file__, "-k", "kernel_runs")
    result = subprocess.run([sys.executable, *arguments], env={**os.environ, "TRITON_INTERPRET": "1"},
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert re.search(r"\b13 passed, \d+ deselected", result.stdout), result.stdout


MASKS = ("none", "padding", "holes")


@runs_kernel
@pytest.mark.parametrize("T", [1, 2, 5, 17, 64, 100])
def test_kernel_runs_as_plain_attention(kernels, T):
    """Against the module in float32, with the same input: result, what is written to the cache, what is not."""
    random.seed(T), torch.manual_seed(T)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # q, k and p are rounded, scores are large
    for cached, dtype in itertools.product((0, 1, 63, 64, 65, 200, 400), tolerance):
        S = T + cached
        has_norm, kind, splits, rows = random.random() < 0.7, random.choice(MASKS), random.choice((1, 2, 8)), 2
        H, D, R = 3, *random.choice(((64, 32), (32, 16), (32, 24), (16, 4)))
        config = PersimmonConfig(hidden_size=H * D, num_attention_heads=H, intermediate_size=8, vocab_size=8,
                                 num_hidden_layers=1, partial_rotary_factor=R / D, qk_layernorm=has_norm)
        plain = persimmon.Attention(config, 0).to(DEVICE).eval()
        plain.dense = torch.nn.Identity()
        for p in (*plain.q_layernorm.parameters(), *plain.k_layernorm.parameters()):
            p.data = torch.randn_like(p).to(dtype).float()
        fused = copy.deepcopy(plain).to(dtype)
        qkv = torch.randn(rows, T, 3 * H * D, device=DEVICE).to(dtype)
        plain.query_key_value.forward = lambda _, qkv=qkv: qkv.float()
        fused.query_key_value.forward = lambda _, qkv=qkv: qkv
        attention_mask = None
        if kind == "padding":
            attention_mask = (torch.arange(S) >= torch.tensor([[S // 2], [S - 1]])).long().to(DEVICE)
        elif kind == "holes":
            attention_mask = torch.randint(2, (S, rows), device=DEVICE).t()
        place = torch.arange(cached, S, device=DEVICE)
        mask = causal_mask(place, S, attention_mask)
        position_ids = (place[:, None] + torch.tensor([0, 5], device=DEVICE)[: 1 if kind == "none" else rows]).t()
        rope = rope_tables(position_ids, config, torch.float32)
        exact = KVCache(config, rows, S + 3, torch.float32, DEVICE)
        exact.keys.normal_(), exact.values.normal_()
        cache = KVCache(config, rows, S + 3, dtype, DEVICE)
        exact.kernels, cache.kernels = None, kernels(rows, H, splits)
        exact.seek(cached), cache.seek(cached)
        for block, other in ((exact.keys, cache.keys), (exact.values, cache.values)):
            block.copy_(block.to(dtype))
            other.copy_(block)
            other[:, :, :, cached:] = math.nan
        before = cache.keys.clone(), cache.values.clone()
        with torch.no_grad():
            y = plain(torch.empty(rows, T, H * D, device=DEVICE), rope, mask, exact)
            ours = fused(torch.empty(rows, T, H * D, device=DEVICE, dtype=dtype), rope, mask, cache)
        case = f"{cached} cached, {dtype}, D = {D}, R = {R}, norm: {has_norm}, mask: {kind}, {splits} parts"
        assert ours.dtype == dtype and ours.shape == y.shape
        assert (ours.float() - y).norm() < tolerance[dtype] * y.norm(), case
        new = slice(cached, S)
        assert torch.equal(cache.values[..., new, :].float(), exact.values[..., new, :]), case
        k = exact.keys[..., new, :]
        assert (cache.keys[..., new, :].float() - k).norm() < tolerance[dtype] / 4 * k.norm(), case
        for block, old in zip((cache.keys, cache.values), before):
            assert torch.equal(block[..., :cached, :], old[..., :cached, :]) and block[..., S:, :].isnan().all(), case
        assert not cache.kernels.arrived.any(), case  # ready for the next launch


@runs_kernel
def test_kernel_runs_within_the_cache(kernels):
    """What there is no room for is not written, which would be into the next head's keys."""
    config = CONFIGS["D64"]
    cache, layer = KVCache(config, 2, 9, torch.float32, DEVICE), persimmon.Attention(config, 0).to(DEVICE)
    cache.keys.normal_(), cache.values.normal_()
    cache.kernels = kernels(2, config.num_attention_heads)
    cache.seek(8)
    before = cache.keys.clone(), cache.values.clone()
    for T in (3, 16):
        qkv = torch.randn(2, T, 3 * config.hidden_size, device=DEVICE)
        rope = rope_tables(torch.arange(8, 8 + T, device=DEVICE)[None], config, torch.float32)
        with torch.no_grad():
            cache.kernels.attention(qkv, layer, rope, None, cache)
        for block, old in zip((cache.keys, cache.values), before):
            assert torch.equal(block[0, :, :, :8], old[0, :, :, :8]) and torch.equal(block[1:], old[1:])
            assert not torch.equal(block[0, :, :, 8], old[0, :, :, 8])


@runs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_runs_as_linear(kernels, dtype):
    """With and without what can stand around a product; sizes that powers of two divide often, seldom and not at all."""
    torch.manual_seed(0)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    kernels = kernels(1, 2)
    shapes = itertools.cycle(((64, 128), (96, 40), (208, 33), (13, 8), (4096, 24), (8192, 6), (16, 2)))
    for (C, O), (has_norm, has_bias, others, square) in zip(shapes, 2 * [*itertools.product((0, 1), repeat=4)]):  # noqa: E741
        linear = torch.nn.Linear(C, O, bias=has_bias).to(DEVICE, dtype)
        norm = torch.nn.LayerNorm(C, 1e-3).to(DEVICE, dtype) if has_norm else None
        for p in (*linear.parameters(), *(norm.parameters() if has_norm else ())):
            p.data = torch.randn_like(p)
        linear.weight.data /= C**0.5  # float16 would overflow
        x, r = (torch.randn(1, 1, n, device=DEVICE).to(dtype) + 0.5 for n in (C, O))
        with torch.no_grad():
            y = kernels.linear(x, linear, norm, r if others else None, square)
            expected = PlainKernels().linear(x.double(), copy.deepcopy(linear).double(),
                                             copy.deepcopy(norm).double() if has_norm else None, r if others else None, square)
        assert y.dtype == dtype and y.shape == expected.shape
        assert (y - expected).norm() <= tolerance * expected.norm(), (C, O, has_norm, has_bias, others, square)


@runs_kernel
@pytest.mark.parametrize("name", ["D64", "no QK-norm, other RoPE"])  # the second with D = 24, for which there is no kernel
def test_kernel_runs_in_the_model(kernels, folders, monkeypatch, name):
    """Logits of chunks, and greedy tokens, as those of transformers; sampled ones as without kernels."""
    model = PersimmonForCausalLM.from_pretrained(folders[name, "2023"], device=DEVICE)
    is_possible = model.config.head_dim in (16, 32, 64)
    calls, find = Counter(), persimmon.kernels_for

    def counted(config, batch_size, device):
        assert DEVICE == "cpu" or (find(config, batch_size, device) is not None) == is_possible
        found = kernels(batch_size, config.num_attention_heads, 2) if is_possible else None
        for method in ("attention", "linear") if is_possible else ():
            monkeypatch.setattr(found, method, lambda *a, f=getattr(found, method), m=method, **b: (
                calls.update([m]) or f(*a, **b)), raising=False)
        return found

    monkeypatch.setattr(persimmon, "kernels_for", counted)
    ids = random_ids(model.config, length=21).to(DEVICE)
    theirs = oracle(folders[name, "2023"]).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits[mask == 1]
        cache, parts = KVCache(model.config, B, 30, torch.float32, DEVICE), []
        for start, stop in ((0, 5), (5, 6), (6, 8), (8, 21)):
            parts.append(model(ids[:, start:stop], mask[:, :stop], cache=cache).logits)
        assert calls["attention"] == 4 * model.config.num_hidden_layers * is_possible
        assert close(torch.cat(parts, 1)[mask == 1], expected, 1e-4)
        expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=5)
        assert torch.equal(model.generate(ids, mask, max_new_tokens=7), expected) and not calls["linear"]
        expected = theirs.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=5)
        assert torch.equal(model.generate(ids, max_new_tokens=7), expected) and not calls["linear"]  # without a mask
        few = 3 if DEVICE == "cpu" else 7  # the interpreter is slow
        assert torch.equal(model.generate(ids[:1], max_new_tokens=few), expected[:1, : 21 + few])
        assert bool(calls["linear"]) == is_possible
        variants = [({}, quantize_model(copy.deepcopy(model), "int8"), ids)]
        variants.append(({"temperature": 0.8, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.2}, model,
                         ids if DEVICE == "cpu" else ids[:1]))
        found = [other.generate(x, max_new_tokens=few, **options) for options, other, x in variants]
        monkeypatch.setattr(persimmon, "kernels_for", lambda *_: None)
        for y, (options, other, x) in zip(found, variants):
            assert torch.equal(y, other.generate(x, max_new_tokens=few, **options)), options


def test_record(monkeypatch):
    """Once to prepare and once to record, then only replays; what the pass reads stays in memory. No GPU takes part."""
    graph, stream = Mock(), Mock()
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(persimmon, "recording_stream", lambda device: stream)
    ids, read, calls = torch.tensor([[3]]), torch.tensor([2.0]), []
    kept = weakref.ref(read)
    replay = persimmon.record(lambda ids, read=read: calls.append(1) or ids * read, ids)
    del read
    assert replay(torch.tensor([[5]])).item() == 6 and ids.item() == 5  # what the replay writes is the GPU's business
    assert kept() is not None and len(calls) == 2 and graph.replay.call_count == 1


@on_a_gpu
def test_a_recording_keeps_what_it_reads(folders):
    """Memory that is free after recording, filled with NaN, changes nothing."""
    model = PersimmonForCausalLM.from_pretrained(folders["D64", "2023"], device=DEVICE)
    ids = random_ids(model.config, length=21).to(DEVICE)
    for rows, mask in ((1, None), (2, torch.ones(2, 30, dtype=torch.long, device=DEVICE))):
        cache = KVCache(model.config, rows, 30, torch.float32, DEVICE)
        with torch.no_grad():
            model(ids[:rows], cache=cache)
            expected = model(ids[:rows, :1], cache=cache).logits.clone()
            cache.seek(21)
            step = persimmon.recorded_step(model, cache, mask)
            junk = [torch.full((n,), math.nan, device=DEVICE) for n in (1, 8, 64, 128, 256, 512, 1024, 4096, 10**5) * 100]
            assert close(step(ids[:rows, :1]), expected, 1e-4) and cache.length == 22 and len(junk) == 900


@runs_kernel
def test_kernel_runs_under_autocast_and_in_a_copied_cache(kernels, folders):
    model = PersimmonForCausalLM.from_pretrained(folders["D64", "2023"], device=DEVICE)
    ids = random_ids(model.config, length=21).to(DEVICE)
    a, b = (KVCache(model.config, B, 30, torch.float32, DEVICE) for _ in range(2))
    a.kernels, b.kernels = kernels(B, model.config.num_attention_heads), None
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        for chunk in (ids[:, :3], ids[:, 3:], ids[:, :1]):
            assert close(model(chunk, cache=a).logits, model(chunk, cache=b).logits, 0.1)
    branch = copy.deepcopy(a)
    with torch.no_grad():
        expected = model(ids[:, :1], cache=a).logits
        assert branch.length == 22 and torch.equal(model(ids[:, :1], cache=branch).logits, expected)


@on_a_gpu
def test_parts_are_put_together_the_same_each_time(kernels):
    """Which program is the last differs from launch to launch, what it sees must not: 40,000 launches, the same bits."""
    config = PersimmonConfig(num_hidden_layers=1)
    layer = persimmon.Attention(config, 0).to(DEVICE, torch.bfloat16)
    for rows, T, cached in ((1, 1, 3000), (2, 1, 700), (1, 3, 1500), (1, 16, 300)):
        cache = KVCache(config, rows, cached + T, torch.bfloat16, DEVICE)
        cache.keys.normal_(), cache.values.normal_()
        cache.seek(cached)
        place = torch.arange(cached, cached + T, device=DEVICE)
        qkv = torch.randn(rows, T, 3 * config.hidden_size, device=DEVICE, dtype=torch.bfloat16)
        others = layer, rope_tables(place[None], config, torch.bfloat16), causal_mask(place, cached + T, None), cache
        different = torch.zeros((), dtype=torch.long, device=DEVICE)
        with torch.no_grad():
            expected, graph = cache.kernels.attention(qkv, *others), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(100):
                    different += (cache.kernels.attention(qkv, *others) != expected).any()
        for _ in range(100):
            graph.replay()
        assert cache.kernels.splits > 1 and int(different) == 0


TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


@pytest.mark.skipif(sys.platform != "linux" or IS_INTERPRETED, reason="Triton compiles on Linux, without its interpreter")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_kernel_compiles(target, dtype, tmp_path, monkeypatch):
    """For GPUs that are not here: all that the 8B's shape uses, and other head sizes and widths."""
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    attend, product = persimmon.gpu_kernels()
    norms, norm = ("q_weight", "q_bias", "k_weight", "k_bias"), ("norm_weight", "norm_bias")
    usual = [(64, 16, splits, absent) for splits in (8, 4, 2, 1) for absent in ((), ("mask",))]
    others = [(64, 32, 0, ("mask",)), (16, 16, 4, norms), (32, 16, 1, (*norms, "mask")), (128, 32, 0, (*norms, "mask")), (128, 16, 2, norms)]
    cases = [(attend, {"H": 64, "D": D, "R": D // 2, "M": M, "P": min(64, 2**16 // (D * int(dtype[2:]))), "SPLITS": splits}, absent)
             for D, M, splits, absent in usual + others]  # fmt: skip
    cases += [(product, {"C": C, "ROWS": rows, "COLUMNS": n, "SQUARE": square}, absent) for C, rows, n, square, absent in (
        (4096, 2, 4096, False, ("others",)), (4096, 2, 4096, False, norm), (4096, 2, 4096, True, ("others",)),
        (16384, 1, 4096, False, norm), (4096, 2, 4096, False, ("bias", "others")), (96, 1, 32, False, ()))]
    for kernel, constants, absent in cases:
        constants |= dict.fromkeys(absent)
        kinds = {"mask": "*u1", "position": "*i64", "eps": "fp32", "parts": "*fp32", "lse": "*fp32", "arrived": "*i32"}
        kinds |= dict.fromkeys(("B", "T", "N", "O", "rope_stride", "mask_stride", "mask_width"), "i32")
        signature = {name: "constexpr" if name in constants else kinds.get(name, f"*{dtype}") for name in kernel.arg_names}
        aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(signature.values()) if kind.startswith("*")}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": 8} if kernel is product else {}
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        assert len(compiled.asm["cubin" if target.startswith("sm") else "hsaco"]) > 1000
        assert compiled.metadata.shared <= 64 * 1024  # what small GPUs have


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_where_the_kernels_are_used(monkeypatch):
    """Not without triton, not with an old one, not off CUDA, not with D = 24; with up to four programs for each core."""
    import triton

    def found():
        persimmon.gpu_kernels.cache_clear()
        return persimmon.gpu_kernels()

    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "triton", None)
            assert found() is None and persimmon.kernels_for(CONFIGS["D64"], 1, "cuda") is None
        with monkeypatch.context() as patch:
            patch.setattr(triton, "JITFunction", object)  # an old one's has no get_capture_scope
            assert found() is None
        pair = found()
    finally:
        persimmon.gpu_kernels.cache_clear()
    assert len(pair) == 2
    cores, zeros = argparse.Namespace(multi_processor_count=132), torch.zeros
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cores)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    monkeypatch.setattr(persimmon, "gpu_kernels", lambda: pair)
    monkeypatch.setattr("triton.runtime.driver", argparse.Namespace(active=argparse.Namespace()))
    with pytest.warns(UserWarning, match="Triton does not work here .*: decoding is slower"):
        assert persimmon.kernels_for(CONFIGS["D64"], 1, "cuda") is None
    monkeypatch.setattr("triton.runtime.driver.active.get_current_target", lambda: None, raising=False)
    for rows, splits in ((1, 8), (33, 8), (34, 4), (132, 2), (133, 1), (300, 1)):
        kernels = persimmon.kernels_for(CONFIGS["D64"], rows, "cuda:1")
        assert kernels.splits == copy.deepcopy(kernels).splits == splits  # a cache can be copied, with its kernels
        assert kernels.arrived.shape == (rows * CONFIGS["D64"].num_attention_heads,)
    assert persimmon.kernels_for(CONFIGS["D64"], 1, "cpu") is None
    assert persimmon.kernels_for(CONFIGS["no QK-norm, other RoPE"], 1, "cuda") is None


def test_recorded_decoding(pair, monkeypatch):
    """Logits and tokens are those of plain passes, in ragged batches and conversations too; a row alone has products of
    its own, 4 a layer, but not where a part of the model has been replaced."""
    model = pair[0]
    L, made, recorded = model.config.num_hidden_layers, [], []
    monkeypatch.setattr(persimmon, "record", lambda *a: recorded.append(1) or run_again(*a))
    monkeypatch.setattr(persimmon, "kernels_for", lambda *_: made.append(PlainKernels()) or made[-1])
    ids = random_ids(model.config, length=9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    holes = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 1]])

    def expected(model, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(persimmon, "kernels_for", lambda *_: None)
            return model.generate(*arguments, **options)

    def changed(change):
        other = copy.deepcopy(model)
        return change(other, other.model.layers[0].mlp) or other

    def halve(module, inputs, output):
        return output / 2

    class Packed(torch.Tensor):
        """As weights of torchao's are, which a kernel can't read."""

    special = [changed(change) for change in (
        lambda other, mlp: quantize_model(other, "int8"),
        lambda other, mlp: setattr(mlp, "dense_h_to_4h", torch.nn.Sequential(mlp.dense_h_to_4h).eval()),
        lambda other, mlp: mlp.register_forward_hook(halve) and None,
        lambda other, mlp: setattr(mlp, "forward", lambda x: x),
        lambda other, mlp: setattr(mlp.dense_4h_to_h, "bias", torch.nn.Parameter(mlp.dense_4h_to_h.bias.data.as_subclass(Packed))),
        lambda other, mlp: with_transposed_weights(other))]  # fmt: skip
    assert not any(map(persimmon.is_plain, special))
    wide = PersimmonConfig(hidden_size=32, num_attention_heads=2, vocab_size=8, num_hidden_layers=1, intermediate_size=68)
    assert [persimmon.is_plain(PersimmonForCausalLM(replace(wide, intermediate_size=n))) for n in (68, 64)] == [False, True]
    for case in ((model, ids, mask), (model, ids, None), (model, ids[:1], holes), *((other, ids[:1]) for other in special),
                 (model, ids[1:])):  # fmt: skip
        options = {"max_new_tokens": 8, "repetition_penalty": 1.2}
        assert torch.equal(case[0].generate(*case[1:], **options), expected(*case, **options))
        is_alone = case[0] is model and len(case) == 2 and persimmon.is_plain(model)
        passes = 8 + 1  # a recording here is one more
        assert made[-1].calls == Counter(attention=passes * L, linear=8 * (4 * L + 1) * is_alone)
    assert len(recorded) == 10
    cache, text = KVCache(model.config, 1, 40, torch.float32, "cpu"), ids[:1]
    cache.values.fill_(math.nan), cache.keys.fill_(math.nan)  # what lies behind the end is not looked at
    for _ in range(2):
        answer = model.generate(text, max_new_tokens=5, cache=cache)
        assert torch.equal(answer, expected(model, text, max_new_tokens=5))
        assert cache.length == int(cache.position) == answer.shape[1] - 1
        text = torch.cat((answer, ids[1:, :3]), 1)
    count = len(recorded)
    model.generate(ids, max_new_tokens=1)
    made[-1].calls.clear()
    model.train().generate(ids, max_new_tokens=3)
    assert len(recorded) == count and not made[-1].calls
    model.eval()(ids, cache=KVCache(model.config, 2, 9, torch.float32, "cpu"))  # gradients are enabled
    assert not made[-1].calls
    model.model.layers[0].train()
    model.generate(ids, max_new_tokens=3)
    with torch.autocast("cpu", torch.bfloat16):
        model.eval().generate(ids, max_new_tokens=3)
    assert len(recorded) == count


def test_on_host(small, monkeypatch):
    """With a lag of one, as on CUDA, pass n + 1 is asked for before the result of pass n is looked at, but for the first."""
    events, on_host = [], persimmon.on_host

    def passes():
        for n in range(3):
            events.append(f"pass {n}")
            yield torch.tensor([n, 7]), torch.tensor([0.5, -float(n)])

    for lag in (0, 1):
        for tokens, logprobs in on_host(passes(), lag):
            assert tokens[1] == 7 and logprobs == [0.5, -tokens[0]]
            events.append(f"result {tokens[0]}")
    assert events[:6] == ["pass 0", "result 0", "pass 1", "result 1", "pass 2", "result 2"]
    assert events[6:] == ["pass 0", "result 0", "pass 1", "pass 2", "result 1", "result 2"]

    ids = random_ids(small.config, length=9)
    steps = list(generate(small, ids, max_new_tokens=30, temperature=0.7))
    ends = [step.tokens[0] for step in steps[9:11]]
    for stop_ids in ((), ends):
        expected = list(generate(small, ids[:1], max_new_tokens=30, temperature=0.7, stop_ids=stop_ids))
        with monkeypatch.context() as patch:
            patch.setattr(persimmon, "on_host", lambda pairs, lag: on_host(pairs, 1))
            count, cache = count_passes(small), KVCache(small.config, 1, 40, torch.float32, "cpu")
            found = list(generate(small, ids[:1], max_new_tokens=30, temperature=0.7, stop_ids=stop_ids, cache=cache))
        assert found == expected and len(count) == min(30, len(expected) + 1)
        assert cache.length == 9 + len(count) - 1


# --- the shape comments, executed ------------------------------------------------------------------------------------

SHAPE = re.compile(r"#.*?\(([0-9A-Z][0-9A-Z*/+, ]*)\)")


def shape_comments() -> dict[int, tuple[int, list[str], list[str]]]:
    """First line of an assignment -> (its last line, the names it assigns, the axes that the comment there claims)."""
    source = Path(persimmon.__file__).read_text().splitlines()
    found = {}
    for node in ast.walk(ast.parse("\n".join(source))):
        claim = SHAPE.search(source[node.end_lineno - 1]) if isinstance(node, ast.Assign) else None
        if claim:
            target = node.targets[0]
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            axes = [axis.strip() for axis in claim[1].split(",") if axis.strip()]
            found[node.lineno] = node.end_lineno, [ast.unparse(name) for name in names], axes
    return found


def test_shape_comments(small, monkeypatch):
    """Run the model under a tracer that compares what each commented line has assigned with what it says.

    Letters are looked up in the config, as local variables, and as the caller's; no two sizes are equal.
    """
    claims, checked, c, fast = shape_comments(), set(), small.config, with_transposed_weights(small)
    use_one_token_products(monkeypatch)
    sizes = {"C": c.hidden_size, "F": c.intermediate_size, "L": c.num_hidden_layers, "V": c.vocab_size,
             "H": c.num_attention_heads, "D": c.head_dim, "R": c.rotary_dim}  # fmt: skip
    assert len(set(sizes.values()) | {2, 7, 5, 12, 14}) == len(sizes) + 5

    def check(frame, line):
        end, names, axes = claims[line]
        scope, letters = frame, {}
        while scope is not None:
            x = scope.f_locals.get("x")
            own = dict(zip("BT", x.shape)) if isinstance(x, torch.Tensor) and x.dim() == 3 else {}
            own |= {name: scope.f_locals[name] for name in ("blocks", *"BTSNPOC") if name in scope.f_locals}
            if scope.f_code.co_name == "forward" and scope.f_locals.get("input_ids") is not None:
                own |= dict(zip("BT", scope.f_locals["input_ids"].shape))
            if scope.f_code.co_name == "rope_tables":
                own |= dict(zip("BT", scope.f_locals["position_ids"].shape))
            letters = own | letters
            scope = scope.f_back
        letters = sizes | letters
        expected = tuple(int(eval(axis, {}, letters)) for axis in axes)
        for name in names:
            shape = tuple(eval(name, {}, frame.f_locals).shape)
            assert shape == expected, f"line {line}: {name} is {shape}, the comment says {axes} = {expected}"
        checked.add(line)

    def tracer(frame, event, _):
        if frame.f_code.co_filename != persimmon.__file__ or frame.f_code.co_name.startswith("<"):
            return None
        last = None

        def lines(frame, event, _):
            nonlocal last
            if last in claims and (event == "return" or not last <= frame.f_lineno <= claims[last][0]):
                check(frame, last)
            if event == "line" and not (last in claims and last <= frame.f_lineno <= claims[last][0]):
                last = frame.f_lineno
            return lines

        return lines

    def run():
        ids = random_ids(c, rows=2, length=7)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        options = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
        list(generate(small, ids, mask, max_new_tokens=5, **options))
        list(generate(small, ids, max_new_tokens=5))
        list(generate(fast, ids, mask, max_new_tokens=5))
        list(generate(fast, ids[:1], max_new_tokens=5))
        cache = KVCache(c, 2, 14, torch.float32, "cpu")
        with torch.no_grad():
            small(ids, cache=cache)
            small(ids[:, :5], cache=cache)
            small(ids, labels=ids)
        small.generate(ids, max_new_tokens=5)
        for cls in (PersimmonForSequenceClassification, PersimmonForTokenClassification):
            cls(c).eval()(ids)
        quantize_model(copy.deepcopy(small), "int8")(ids)
        Int4Linear(torch.nn.Linear(64, 128), 32)
        monkeypatch.setattr(persimmon, "record", lambda forward, ids: forward)
        monkeypatch.setattr(persimmon, "kernels_for", lambda *_: PlainKernels())
        list(generate(small, ids, mask, max_new_tokens=5))
        list(generate(small, ids[:1], max_new_tokens=5))

    sys.settrace(tracer)
    try:
        run()
    finally:
        sys.settrace(None)
    assert len(claims) > 40
    assert checked == set(claims), f"never run: lines {sorted(set(claims) - checked)}"
    # every comment that looks like a shape stands on such a line
    lines = Path(persimmon.__file__).read_text().splitlines()
    code = [n for n, line in enumerate(lines, 1) if SHAPE.search(line) and not line.startswith("#")]
    assert sorted(end for end, _, _ in claims.values()) == code


# --- sampling --------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(n)]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2},
     {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05}],
)  # fmt: skip
def test_sampling_has_the_exact_probabilities(options):
    """A chi-square test against the probabilities that transformers' filters leave."""
    options = {"temperature": 1.0, **options}
    scores = TemperatureLogitsWarper(options["temperature"])(None, LOGITS[None])
    for name, warper in {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}.items():
        scores = warper(options[name])(None, scores) if name in options else scores
    p = scores.softmax(-1)[0]
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = sample(LOGITS.expand(n, -1), [generator] * n, **options)
    count = torch.bincount(drawn, minlength=len(LOGITS)).double()
    kept = p > 0
    assert count[~kept].sum() == 0
    chi_square = ((count[kept] - n * p[kept]) ** 2 / (n * p[kept])).sum().item()
    # 99.9% quantiles of chi-square for 0 to 7 degrees of freedom
    assert chi_square < (0.0001, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32)[int(kept.sum()) - 1]


@pytest.mark.parametrize("top_k, top_p, spread, is_short", [
    (0, 0.9, 4.0, True), (0, 0.9, 0.1, False), (7, 0.5, 0.1, True), (300, 1.0, 4.0, True), (700, 1.0, "whole numbers", False),
])  # fmt: skip
def test_ranking_a_part_is_as_good_as_all(top_k, top_p, spread, is_short):
    """Also with ties, of which numbers of 16 bit have many; and a row does not depend on the others."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5000)
    logits = logits.round() if spread == "whole numbers" else (logits * spread).bfloat16().float()
    logits -= logits.amax(-1, keepdim=True)
    everything, all_ids = logits.sort(dim=-1, descending=True, stable=True)
    part, ids = persimmon.ranked(logits, top_k, top_p)
    assert (part.shape[1] < 5000) == is_short
    share = everything.softmax(-1)
    kept = top_k or int(((share.cumsum(-1) - share) < top_p).sum(-1).max())
    assert torch.equal(part[:, :kept], everything[:, :kept]) and torch.equal(ids[:, :kept], all_ids[:, :kept])
    options = {"temperature": 1.0, "top_k": top_k, "top_p": top_p}
    beside_a_flat_row = torch.stack((logits[0], torch.zeros(5000)))
    for row in range(20):
        drawn = sample(beside_a_flat_row, [torch.Generator().manual_seed(row) for _ in range(2)], **options)[0]
        assert drawn == sample(logits[:1], [torch.Generator().manual_seed(row)], **options)[0]


def test_greedy_ties_and_limits():
    tied = torch.tensor([[0.0, 3.0, 3.0, 1.0, 3.0]] * 20)
    assert sample(tied, [], 0.0).tolist() == [1] * 20
    for options in ({"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}):
        assert sample(tied, generators(20), 1.0, **options).tolist() == [1] * 20  # greedy, ties included
    assert set(sample(tied, generators(20), 1.0, min_p=1.0).tolist()) == {1, 2, 4}
    assert sample(tied, generators(20), 1e-50).tolist() == [1] * 20
    assert set(sample(tied, generators(20), 1e-20).tolist()) == {1, 2, 4}  # no overflow to inf - inf
    assert set(sample(tied, generators(20), 1.0, top_k=2).tolist()) == {1, 2}
    assert sample(tied, generators(20), 1.0, top_k=99).max() <= 4


def test_repetition_penalty_is_that_of_transformers():
    logits, ids = torch.randn(3, 50), torch.randint(50, (3, 20))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(apply_repetition_penalty(logits, seen, 1.7), RepetitionPenaltyLogitsProcessor(1.7)(ids, logits))


# --- generation ------------------------------------------------------------------------------------------------------


def count_passes(model) -> list[int]:
    """New positions of each forward pass from now on."""
    passes = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: passes.append(output.shape[1]))
    return passes


def test_n_tokens_are_n_passes(folders):
    model = PersimmonForCausalLM.from_pretrained(folders["D16", "2023"])
    passes = count_passes(model)
    steps = list(generate(model, random_ids(model.config, length=7), max_new_tokens=6))
    assert len(steps) == 6 and passes == [7, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "repetition_penalty": 1.2, "top_p": 0.9}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(pair, side, options):
    model, lengths = pair[0], (11, 3, 1, 8)
    rows = [random_ids(model.config, 1, n, seed=n)[0] for n in lengths]
    ids, mask = torch.full((4, 11), 5), torch.zeros(4, 11, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(11 - len(row), 11)
        ids[b, at], mask[b, at] = row, 1
    together = list(generate(model, ids, mask, max_new_tokens=30, seed=4, **options))
    for b, row in enumerate(rows):
        alone = list(generate(model, row[None], max_new_tokens=30, seed=4 + b, **options))
        assert [s.tokens[b] for s in together] == [s.tokens[0] for s in alone]
    if options:
        other = list(generate(model, ids, mask, max_new_tokens=30, seed=400, **options))
        assert [s.tokens for s in other] != [s.tokens for s in together]


def test_logprobs_are_the_models(small):
    ids = random_ids(small.config, length=7)
    steps = list(generate(small, ids, max_new_tokens=5, temperature=0.7, top_k=3, repetition_penalty=1.5))
    new = torch.tensor([s.tokens for s in steps]).T
    with torch.no_grad():
        logprobs = small(torch.cat((ids, new), 1)).logits.log_softmax(-1)[:, 6:-1].gather(2, new[..., None])[..., 0]
    assert close(torch.tensor([s.logprobs for s in steps]).T, logprobs, 1e-5)


def test_stop_ids_and_padding(small):
    ids = random_ids(small.config, length=7)
    free = list(generate(small, ids, max_new_tokens=12))
    rows = [[s.tokens[b] for s in free] for b in range(2)]
    assert [s.finish_reasons for s in free] == [[None, None]] * 11 + [["length", "length"]]
    stop = next(t for t in rows[0] if t not in rows[1])
    at = rows[0].index(stop)
    steps = list(generate(small, ids, max_new_tokens=12, stop_ids=[stop]))
    assert [s.tokens[1] for s in steps] == rows[1]  # the other row goes on undisturbed
    assert [s.tokens[0] for s in steps] == rows[0][: at + 1] + [5] * (11 - at)
    assert [s.finish_reasons[0] for s in steps] == [None] * at + ["stop"] * (12 - at)
    assert all(s.logprobs[0] == 0.0 for s in steps[at + 1 :])
    assert len(list(generate(small, ids[:1], max_new_tokens=12, stop_ids=[stop]))) == at + 1
    small.config.__dict__["eos_token_id"] = stop  # the default; the dataclass is frozen for everyone else
    try:
        output = small.generate(ids, max_new_tokens=12)
        assert len(list(generate(small, ids[:1], max_new_tokens=12))) == at + 1
        assert len(list(generate(small, ids[:1], max_new_tokens=12, stop_ids=()))) == 12
    finally:
        small.config.__dict__["eos_token_id"] = None
    assert output.tolist() == [ids[0].tolist() + rows[0][: at + 1] + [5] * (11 - at), ids[1].tolist() + rows[1]]


def test_the_context_limit(small):
    limit = small.config.max_position_embeddings
    ids, mask = random_ids(small.config, length=limit - 3), torch.ones(2, limit - 3, dtype=torch.long)
    mask[1, :10] = 0
    steps = list(generate(small, ids, mask, max_new_tokens=50))
    assert [s.finish_reasons[0] for s in steps] == [None] * 2 + ["context"] * 11  # each row has a context of its own
    assert [s.finish_reasons[1] for s in steps] == [None] * 12 + ["context"]
    assert [s.finish_reasons for s in generate(small, ids, max_new_tokens=3)][-1] == ["length", "length"]
    assert len(list(generate(small, random_ids(small.config, length=limit - 1)))) == 1
    with pytest.raises(ValueError, match="160 tokens and leaves no room for another one: the context limit is 160"):
        next(generate(small, random_ids(small.config, length=limit)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens = 0 is out of range"), ({"temperature": -1.0}, "temperature = -1.0"),
     ({"temperature": math.nan}, "temperature = nan"), ({"top_p": 1.5}, "top_p = 1.5"), ({"top_k": -1}, "top_k = -1"),
     ({"min_p": 2}, "min_p = 2"), ({"repetition_penalty": 0}, "repetition_penalty = 0"),
     ({"repetition_penalty": math.inf}, "repetition_penalty = inf"), ({"seed": -1}, "seed = -1"),
     ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "a token at least"),
     ({"input_ids": torch.tensor([[1, 97]])}, "ids from 1 to 97: the model's vocabulary has 97"),
     ({"input_ids": torch.tensor([[-1, 9]])}, "ids from -1"),
     ({"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\)"),
     ({"attention_mask": torch.zeros(1, 3)}, "row 0 of the prompt is nothing but padding")],
)  # fmt: skip
def test_generate_refuses(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        next(generate(small, **{"input_ids": torch.tensor([[1, 2, 3]]), **arguments}))


def test_ids_of_other_kinds(small):
    ids = torch.tensor([[1, 2, 3]])
    expected = small.generate(ids, max_new_tokens=6)
    assert torch.equal(small.generate(ids.to(torch.int16), max_new_tokens=6), expected)
    third = expected[0, 5]  # a tensor
    at = (expected[0, 3:] == third).nonzero()[0, 0]
    assert small.generate(ids, max_new_tokens=6, stop_ids=[third]).shape[1] == 4 + at


def test_model_generate_lengths(small):
    ids = random_ids(small.config, length=7)
    assert torch.equal(small.generate(ids, max_length=12), small.generate(ids, max_new_tokens=5))
    assert small.generate(ids).shape == (2, 160)  # 200 by default, and the context is 160
    with pytest.raises(ValueError, match="max_length = 7 leaves no room: the prompt has 7 tokens"):
        small.generate(ids, max_length=7)
    with pytest.raises(ValueError, match="not both"):
        small.generate(ids, max_length=9, max_new_tokens=2)


def test_logits_that_are_not_numbers(folders):
    model = PersimmonForCausalLM.from_pretrained(folders["D16", "2023"])
    model.lm_head.weight.data[3] = math.nan
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5}):
        with pytest.raises(FloatingPointError, match="token 1: the logits are not numbers"):
            next(generate(model, random_ids(model.config), **options))


# --- tokenizer -------------------------------------------------------------------------------------------------------

CORPUS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "To be, or not to be",
          "how vexingly quick daft zebras jump", "sphinx of black quartz, judge my vow", "été à la plage"] * 3  # fmt: skip


def train_sentencepiece(file: Path, **options) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=330, byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


ENDOFTEXT = {"user_defined_symbols": ["|ENDOFTEXT|"]}
STYLES = {
    "as SentencePiece makes it": ENDOFTEXT,
    "control": {"control_symbols": ["|ENDOFTEXT|"], "normalization_rule_name": "identity"},
    "spaces kept": {**ENDOFTEXT, "remove_extra_whitespaces": False},
    "no space in front": {**ENDOFTEXT, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, tuple[Tokenizer, sentencepiece.SentencePieceProcessor]]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for style, options in STYLES.items():
        file = folder / f"{style}.model"
        oracle = train_sentencepiece(file, **options)
        made[style] = Tokenizer(file), oracle
    return made


texts = st.text(max_size=40) | st.lists(st.sampled_from(["the", " quick", "  ", "\n", "é", "日本", "🙂", "fox "])).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=texts, style=st.sampled_from(list(STYLES)))
@example(text="", style="as SentencePiece makes it")
@example(text="  a  b ", style="spaces kept")
def test_tokenizer_is_sentencepiece(tokenizers, text, style):
    tokenizer, oracle = tokenizers[style]
    ids = oracle.encode(text)
    assert tokenizer.encode(text, add_bos=False) == ids
    assert tokenizer.encode(text) == [oracle.piece_to_id("|ENDOFTEXT|"), *ids]
    assert tokenizer.decode(tokenizer.encode(text)) == oracle.decode(ids)


@st.composite
def token_sequences(draw):
    """Any ids, but often bytes, and often bytes that make characters."""
    byte = st.integers(0, 255).map(lambda value: f"<0x{value:02X}>")
    characters = st.characters(min_codepoint=0x80, exclude_categories=["Cs"])
    character = characters.map(lambda c: [f"<0x{b:02X}>" for b in c.encode()])
    piece = st.integers(0, 340)
    runs = st.one_of(piece.map(lambda i: [i]), byte.map(lambda b: [b]), character, character.map(lambda c: c[:-1]),
                     st.sampled_from([["▁"], ["|ENDOFTEXT|"], ["▁jump"], ["</s>"]]))  # fmt: skip
    return [token for run in draw(st.lists(runs, max_size=12)) for token in run]


@settings(max_examples=500, deadline=None)
@given(sequence=token_sequences(), prompt=token_sequences(), style=st.sampled_from(list(STYLES)))
@example(sequence=["▁jump", "▁jump"], prompt=["|ENDOFTEXT|"], style="as SentencePiece makes it")
@example(sequence=["▁jump"], prompt=["▁jump"], style="as SentencePiece makes it")
@example(sequence=["▁", "▁jump"], prompt=[], style="as SentencePiece makes it")
@example(sequence=["▁", "▁jump"], prompt=[], style="spaces kept")
@example(sequence=["<0xC3>", "<0xC3>", "▁jump", "<0xA9>"], prompt=[], style="spaces kept")
@example(sequence=["<0xE2>", "|ENDOFTEXT|", "<0x82>", "<0xAC>"], prompt=[], style="control")
@example(sequence=["<0xED>", "<0xA0>", "<0x80>", "<0xF4>", "<0x90>", "<0xC0>", "<0x80>"], prompt=["▁"], style="control")
def test_streaming_equals_decoding_the_whole(tokenizers, sequence, prompt, style):
    tokenizer, oracle = tokenizers[style]
    assert oracle.piece_to_id("▁jump") != oracle.unk_id() != oracle.piece_to_id("▁")
    new, old = ([i if isinstance(i, int) else oracle.piece_to_id(i) for i in part] for part in (sequence, prompt))
    whole = tokenizer.decode(old + new)
    eot, unknown = tokenizer.end_of_text, oracle.unk_id()
    assert whole == oracle.decode([i if i < len(oracle) else unknown for i in old + new if i != eot])
    decoder, text = StreamDecoder(tokenizer, []), ""
    for n, i in enumerate(old + new, 1):
        text += decoder.push(i)
        assert whole.startswith(text) or not text.isprintable()
        # nothing is held but what is no character, or not one yet
        assert tokenizer.decode((old + new)[:n])[len(text) :].strip("\ufffd") == ""
    assert text + decoder.finish() == whole
    # after a prompt that ends where a character ends, only what follows it
    before = tokenizer.decode(old)
    if not before.endswith("\ufffd"):
        decoder = StreamDecoder(tokenizer, old)
        assert before + "".join(map(decoder.push, new)) + decoder.finish() == whole


def test_no_torn_character_is_shown(tokenizers):
    tokenizer, oracle = tokenizers["spaces kept"]
    ids = tokenizer.encode("日🙂é fox", add_bos=False)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) == "日🙂é fox"
    assert pieces.count("") >= 2 + 3  # the bytes before the last one of 日 and of 🙂


def test_a_prompt_of_replacement_characters(tokenizers):
    """What looks like a torn character is none, and is not said again."""
    tokenizer, oracle = tokenizers["spaces kept"]
    character = [oracle.piece_to_id(f"<0x{byte:02X}>") for byte in "\ufffd".encode()]
    assert tokenizer.decode(character * 2) == "\ufffd\ufffd"
    decoder = StreamDecoder(tokenizer, character * 2)
    assert decoder.pending == []
    assert "".join(map(decoder.push, tokenizer.encode("日", add_bos=False))).strip() == "日"


def test_tokenizer_files(tmp_path):
    oracle = train_sentencepiece(tmp_path / "tokenizer.model", **ENDOFTEXT)
    bos = [oracle.piece_to_id("|ENDOFTEXT|")]
    for config, expected in (({}, bos), ({"add_bos_token": True}, bos), ({"add_bos_token": False}, [])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert Tokenizer(tmp_path).encode("fox") == expected + oracle.encode("fox")
        assert Tokenizer(tmp_path / "tokenizer.model").encode("fox") == expected + oracle.encode("fox")
    assert Tokenizer(tmp_path).encode("fox", add_bos=True) == bos + oracle.encode("fox")
    (tmp_path / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    with pytest.raises(ValueError, match="tokenizer_config.json asks for add_eos_token"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert len(Tokenizer(tmp_path)) == len(oracle)
    oracle = train_sentencepiece(tmp_path / "plain.model")
    assert Tokenizer(tmp_path / "plain.model").end_of_text == oracle.eos_id() == 2
    train_sentencepiece(tmp_path / "none.model", eos_id=-1)
    with pytest.raises(ValueError, match="none.model has no piece |ENDOFTEXT|"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(FileNotFoundError, match="no file .*nothing"):
        Tokenizer(tmp_path / "nothing")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="bad.model is damaged or no SentencePiece model"):
        Tokenizer(tmp_path / "bad.model")


def test_tokenizer_batches(tokenizers, small):
    tokenizer, oracle = tokenizers["spaces kept"]
    batch = tokenizer(["the fox", "the lazy dog jumps"], return_tensors="pt")
    lengths = batch["attention_mask"].sum(1).tolist()
    for ids, mask, text in zip(*batch.values(), ["the fox", "the lazy dog jumps"]):
        assert ids[mask == 1].tolist() == tokenizer.encode(text)
        assert mask.sort().values.equal(mask)  # padding on the left
    assert lengths[0] < lengths[1] == batch["input_ids"].shape[1]
    assert tokenizer("the fox")["input_ids"].tolist() == [tokenizer.encode("the fox")]
    with pytest.raises(ValueError, match="return_tensors = 'np'"):
        tokenizer("fox", return_tensors="np")
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer("a\udc80")


def test_chat_prompt():
    assert chat_prompt(["Hi, there"]) == "human: Hi, there\n\nadept:"
    assert chat_prompt(["a", " b ", "c"]) == "human: a\n\nadept: b\n\nhuman: c\n\nadept:"
    for turns in (["a", "b"], []):
        with pytest.raises(ValueError, match=f"ends with a human's turn: turns are odd in number, not {len(turns)}"):
            chat_prompt(turns)


# --- config, loading, saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported: a Persimmon checkpoint has 'relu2'"),
     ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "config key type = 'linear' is not supported"),
     ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type = 'yarn'"),
     ({"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}}, "config key factor of RoPE is not supported"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"factor": 2.0}}, "config key factor of RoPE"),
     ({"rope_parameters": [1]}, r"rope_parameters = \[1\]"),
     ({"num_key_value_heads": 1}, "num_key_value_heads = 1 is not supported: a Persimmon checkpoint has 3"),
     ({"head_dim": 32}, "head_dim = 32"), ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
     ({"model_type": "llama"}, "model_type = 'llama'"), ({"quantization_config": {}}, "quantization_config"),
     ({"hidden_size": 49}, "hidden_size = 49 is no multiple of num_attention_heads = 3"),
     ({"hidden_size": "big"}, "hidden_size = 'big' is not of type int"), ({"num_hidden_layers": 0}, "has to be above 0"),
     ({"qk_layernorm": 1}, "qk_layernorm = 1 is not of type bool"), ({"hidden_dropout": 1.5}, "hidden_dropout = 1.5"),
     ({"eos_token_id": [1, 2]}, r"eos_token_id = \[1, 2\]"), ({"pad_token_id": 97}, "pad_token_id = 97"),
     ({"partial_rotary_factor": 0.2}, "rotates 3 of the 16.*an even number"), ({"rope_theta": 0}, "rope_theta = 0 has to be above 0"),
     ({"rope_theta": math.inf}, "rope_theta = inf"), ({"partial_rotary_factor": math.inf}, "partial_rotary_factor = inf"),
     ({"vocab_size": 10**30}, "vocab_size = 10+ has to be above 0 and below"),
     ({"problem_type": "guess"}, "problem_type = 'guess'"), ({"id2label": 3}, "id2label = 3 is not of type"),
     ({"partial_rotary_factor": 0.01}, "partial_rotary_factor = 0.01 rotates 0 of the 16"),
     ({"torch_dtype": "int8"}, "dtype int8 is not supported")],
)  # fmt: skip
def test_config_refuses(folders, tmp_path, change, message):
    raw = json.loads((folders["D16", "2023"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(ValueError, match=message):
        PersimmonConfig.from_pretrained(tmp_path)


def test_config_files(tmp_path):
    assert PersimmonConfig().hidden_dropout == 0.0 and PersimmonConfig().head_dim == 64
    with pytest.raises(FileNotFoundError, match="no file .*config.json"):
        PersimmonConfig.from_pretrained(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "has to hold a JSON object, not a list"), ("\xff", "JSON")):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            PersimmonConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "persimmon", "rope_scaling": null, "bos_token_id": null}')
    assert PersimmonConfig.from_pretrained(tmp_path) == PersimmonConfig(bos_token_id=None)
    with pytest.raises(AttributeError):
        PersimmonConfig().hidden_size = 5


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of a model's folder, to be damaged."""
    return Path(shutil.copytree(folders["D16", "2023"], tmp_path / "model"))


def shard(folder: Path) -> dict:
    """Split model.safetensors in two with an index; return the index."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return index


def test_shards(folder, small):
    shard(folder)
    state = PersimmonForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(state[name], p) for name, p in small.state_dict().items())


def damage(folder: Path, kind: str) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    if kind == "missing":
        del state["model.layers.2.mlp.dense_h_to_4h.bias"]
    elif kind == "unexpected":
        state["model.layers.4.mlp.dense_h_to_4h.bias"] = torch.zeros(80)
    elif kind == "misshapen":
        state["model.layers.2.self_attn.dense.bias"] = torch.zeros(47)
    elif kind == "integers":
        state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)
    if kind in ("missing", "unexpected", "misshapen", "integers"):
        file.unlink()
        save_file(state, file)
    elif kind == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "not safetensors":
        file.write_bytes(b"PK\x03\x04 something else entirely")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "only .bin":
        file.rename(folder / "pytorch_model-00001-of-00002.bin")
    elif kind == "no weights":
        file.unlink()
    elif kind == "shard missing":
        shard(folder)
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif kind == "shard cut off":
        shard(folder)
        (folder / "model-00002-of-00002.safetensors").write_bytes(b"\x09" * 50)
    elif kind == "wrong shard":
        index = shard(folder)
        index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "bad index":
        shard(folder)
        (folder / "model.safetensors.index.json").write_text("{}")
    elif kind == "no folder":
        shutil.rmtree(folder)


DAMAGES = {
    "missing": "lacks the tensor layers.2.mlp.dense_h_to_4h.bias",
    "unexpected": "has the tensor layers.4.mlp.dense_h_to_4h.bias, which is not in a PersimmonForCausalLM",
    "misshapen": r"model.safetensors has the tensor model.layers.2.self_attn.dense.bias in shape \(47,\)",
    "integers": "model.safetensors has the tensor lm_head.weight as torch.int8",
    "cut off": "model.safetensors is cut off, damaged or no safetensors file",
    "not safetensors": "model.safetensors is cut off, damaged or no safetensors file",
    "empty": "model.safetensors is cut off, damaged or no safetensors file",
    "only .bin": "python convert.py .*model .*model-safetensors",
    "no weights": "holds no weights in safetensors, no model.safetensors",
    "shard missing": "index.json says that .* is in model-00002-of-00002.safetensors, and there is no such file",
    "shard cut off": "model-00002-of-00002.safetensors is cut off, damaged",
    "wrong shard": "model-00002-of-00002.safetensors lacks the tensor lm_head.weight",
    "bad index": "index.json has no weight_map",
    "no folder": "there is no folder .*model",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_loading_is_strict(folder, kind):
    damage(folder, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=DAMAGES[kind]) as caught:
        PersimmonForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_the_exceptions_to_strictness(folder, small):
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    state["model.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(state, folder / "model.safetensors")
    ids = random_ids(small.config)
    with torch.no_grad():
        expected = small.model(ids).last_hidden_state
        assert torch.equal(PersimmonForCausalLM.from_pretrained(folder)(ids).logits, small(ids).logits)
        bare = PersimmonModel.from_pretrained(folder)
        assert torch.equal(bare(ids).last_hidden_state, expected)
        bare.save_pretrained(folder)  # now without `model.` in front of the names
        assert "layers.0.mlp.dense_h_to_4h.bias" in load_file(folder / "model.safetensors")
        assert torch.equal(PersimmonModel.from_pretrained(folder)(ids).last_hidden_state, expected)
    with pytest.raises(ValueError, match="lacks the tensor lm_head.weight"):
        PersimmonForCausalLM.from_pretrained(folder)


def test_a_tensor_that_is_there_twice_is_refused(folder):
    state = load_file(folder / "model.safetensors")
    save_file({**state, "final_layernorm.bias": torch.zeros(48)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="has tensors twice, with and without `model.`"):
        PersimmonForCausalLM.from_pretrained(folder)


def test_dtype(folder):
    def dtype_of(config_dtype, tensors, dtype="auto"):
        state = {name: t.to(tensors) for name, t in load_file(folder / "model.safetensors").items()}
        save_file(state, folder / "model.safetensors")
        raw = json.loads((folder / "config.json").read_text())
        raw.pop("torch_dtype", None), raw.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps(raw | config_dtype))
        model = PersimmonForCausalLM.from_pretrained(folder, dtype)
        (found,) = {p.dtype for p in model.parameters()}
        return found

    assert dtype_of({}, torch.float32) == torch.float32
    assert dtype_of({"torch_dtype": "bfloat16"}, torch.float32) == torch.bfloat16
    assert dtype_of({"dtype": "float16", "torch_dtype": "bfloat16"}, torch.float32) == torch.float16
    assert dtype_of({"torch_dtype": "bfloat16"}, torch.float32, "float32") == torch.float32
    assert dtype_of({"torch_dtype": "bfloat16"}, torch.float32, torch.float16) == torch.float16
    assert dtype_of({}, torch.bfloat16) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype float8 is not supported: use one of bfloat16, float16, float32"):
        PersimmonForCausalLM.from_pretrained(folder, "float8")


def test_weights_are_mapped_and_training_leaves_the_file(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = PersimmonForCausalLM.from_pretrained(folder)
    assert not model.training and str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()
    ids = random_ids(model.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert (folder / "model.safetensors").read_bytes() == before


def test_save_pretrained(folder, tmp_path, monkeypatch):
    model, ids = PersimmonForCausalLM.from_pretrained(folder), random_ids(CONFIGS["D16"])
    new = tmp_path / "deep" / "new"
    model.save_pretrained(new)
    assert sorted(os.listdir(new)) == ["config.json", "model.safetensors"] and os.listdir(new.parent) == ["new"]
    (tmp_path / "plain").mkdir()
    assert new.stat().st_mode == (tmp_path / "plain").stat().st_mode  # and not a temporary folder's
    (tmp_path / "plain").rmdir()
    assert (new / "model.safetensors").stat().st_mode == (new / "config.json").stat().st_mode
    with torch.no_grad():
        expected = model(ids).logits
        theirs = oracle(new)
        assert torch.equal(PersimmonForCausalLM.from_pretrained(new)(ids).logits, expected)
        assert close(theirs(ids).logits, expected)
        theirs.save_pretrained(tmp_path / "theirs")  # and back
        assert torch.equal(PersimmonForCausalLM.from_pretrained(tmp_path / "theirs")(ids).logits, expected)
    assert PersimmonConfig.from_pretrained(tmp_path / "theirs") == PersimmonConfig.from_pretrained(new)
    # over itself, in another dtype, beside a file that stays
    (new / "tokenizer.model").write_bytes(b"x")
    model.bfloat16().save_pretrained(new)
    assert (new / "tokenizer.model").exists() and PersimmonConfig.from_pretrained(new).dtype == "bfloat16"
    assert next(PersimmonForCausalLM.from_pretrained(new).parameters()).dtype == torch.bfloat16
    # weights that lie transposed are stored like others
    with_transposed_weights(model).save_pretrained(new)
    assert all(torch.equal(p, load_file(new / "model.safetensors")[name]) for name, p in model.state_dict().items())
    # whole or not at all
    before = {file.name: file.read_bytes() for file in new.iterdir()}
    cpu, copied = torch.Tensor.cpu, []

    def fails(tensor):
        if len(copied) == 10:
            raise KeyboardInterrupt
        copied.append(tensor)
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", fails)
    for target in (new, tmp_path / "other"):
        with pytest.raises(KeyboardInterrupt):
            model.float().save_pretrained(target)
    assert len(copied) == 10
    assert {file.name: file.read_bytes() for file in new.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["deep", "model", "theirs"] and os.listdir(new.parent) == ["new"]


def test_new_weights():
    config = replace(CONFIGS["D16"], initializer_range=0.05)
    for name, p in PersimmonForCausalLM(config).named_parameters():
        if p.dim() == 2:
            assert 0.04 < p.std() < 0.06 and abs(p.mean()) < 0.01, name
        else:
            assert (p == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
    assert (PersimmonForCausalLM(config).model.embed_tokens.weight[5] == 0).all()


# --- convert.py ------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def piece_message(text: str, kind: int) -> bytes:
    """A piece of a SentencePiece model: text, score 0.0, type (1 normal, 3 control, 4 user-defined, 5 unused)."""
    inner = b"\x0a" + varint(len(text.encode())) + text.encode() + b"\x15\0\0\0\0" + b"\x18" + bytes([kind])
    return b"\x0a" + varint(len(inner)) + inner


def with_placeholders(model: bytes, text: str = "|IMAGE_PATCH_{}|", kind: int = 4) -> bytes:
    """A SentencePiece model with 70,000 pieces for images put in as ids 3 to 70002, as in Adept's."""
    fields = [whole for _, whole, _ in convert.fields_of(model)]
    return b"".join(fields[:3] + [piece_message(text.format(n), kind) for n in range(70_000)] + fields[3:])


RELEASE = PersimmonConfig(
    vocab_size=400, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3,
    max_position_embeddings=160, hidden_dropout=0.1, layer_norm_eps=1e-5,
)  # fmt: skip


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("vocabulary") / "adept_vocab.model"
    train_sentencepiece(file, **ENDOFTEXT)
    return file.read_bytes()


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    return randomize(PersimmonForCausalLM(RELEASE)).bfloat16().state_dict()


def release_pickle(weights: dict, changes: dict | None = None, config: PersimmonConfig = RELEASE, **extra) -> dict:
    """What is in Adept's model_optim_rng.pt: nested and dotted keys mixed, args, numbers and states of the training run."""
    encoder = {f"layers.{n}.self_attention.rotary_emb.inv_freq": torch.ones(4) for n in range(config.num_hidden_layers)}
    for name, tensor in weights.items():
        if "layer" in name:
            encoder[name.removeprefix("model.").replace("self_attn", "self_attention")] = tensor
    model = {
        "language_model": {
            "embedding": {"word_embeddings": {"weight": weights.get("model.embed_tokens.weight")}}, "encoder": encoder,
        },
        "word_embeddings_for_head": {"weight": weights.get("lm_head.weight")},
    }  # fmt: skip
    args = {
        "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "kv_channels": config.head_dim,
        "ffn_hidden_size": config.intermediate_size, "num_attention_heads": config.num_attention_heads,
        "rotary_pct": 0.5, "rotary_emb_base": 25000, "layernorm_epsilon": 1e-5, "padded_vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings, "qk_layernorm": "weights_per_layer", "sq_relu": True,
        "untie_embeddings": True, "pos_emb": "rotary", "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "hidden_dropout": 0.1, "attention_dropout": 0.0, "init_method_std": 0.02, "params_dtype": torch.bfloat16,
        "iteration": 1251, "sample_temp_type": SomeEnum.first, **(changes or {}),
    }  # fmt: skip
    args = argparse.Namespace(**{name: value for name, value in args.items() if value != "absent"})
    states = {"random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state(),
              "torch_rng_state": torch.get_rng_state(), "of": SomeClass()}  # fmt: skip
    return {"args": args, "checkpoint_version": 3.0, "iteration": 1251, "tokens": 0, "model": model,
            "rng_state": [states], **extra}  # fmt: skip


class SomeEnum(enum.Enum):
    """Stands for a class of megatron's that a pickle names."""

    first = 1


class SomeClass:
    """Another one, with state of an unusual kind."""

    def __reduce__(self):
        return SomeClass, (), ("a", 5)


def release_tar(file: Path, checkpoint, vocabulary: bytes, members: dict[str, bytes] | None = None) -> Path:
    """A tar as Adept made it, and `members` beside."""
    pickled = io.BytesIO()
    torch.save(checkpoint, pickled)
    folder = "8b_chat_model_release"
    contents = {"latest_checkpointed_iteration.txt": b"1251\n", "adept_vocab.vocab": b"<unk>\t0\n",
                "adept_vocab.model": vocabulary, "iter_0001251/mp_rank_00/model_optim_rng.pt": pickled.getvalue()}  # fmt: skip
    with tarfile.open(file, "w") as tar:
        for name, data in ({f"{folder}/{name}": data for name, data in contents.items()} | (members or {})).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def hub_folder(folder: Path, weights: dict, vocabulary: bytes, shards: int) -> Path:
    folder.mkdir()
    write_config(folder, RELEASE, "2023")
    (folder / "tokenizer.model").write_bytes(vocabulary)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true, "eos_token": null}')
    names = sorted(weights)
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    places = {name: f"pytorch_model-0000{1 + n * shards // len(names)}-of-0000{shards}.bin" for n, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: weights[name] for name in names if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def make_source(kind: str, folder: Path, weights: dict, vocabulary: bytes) -> list[str | Path]:
    """A source of one of the kinds; the arguments that name it."""
    if kind == "safetensors":
        model = PersimmonForCausalLM(RELEASE).bfloat16()
        model.load_state_dict(weights)
        model.save_pretrained(folder / "source")
        (folder / "source" / "tokenizer.model").write_bytes(vocabulary)
        return [folder / "source"]
    if kind.startswith("hub"):
        return [hub_folder(folder / "source", weights, vocabulary, int(kind[-1]))]
    tar = release_tar(folder / "release.tar", release_pickle(weights), vocabulary)
    if kind == "tar":
        return [tar]
    with tarfile.open(tar) as opened:
        opened.extractall(folder, filter="data")
    release = folder / "8b_chat_model_release"
    if kind == "unpacked":
        return [release]
    return [release / "iter_0001251/mp_rank_00/model_optim_rng.pt", "--tokenizer", release / "adept_vocab.model"]


KINDS = ["tar", "unpacked", "pt", "hub 1", "hub 3", "safetensors"]


def rewritten_pickle(file: Path, weights: dict, compression: int = zipfile.ZIP_STORED, big: bool = False) -> Path:
    """Adept's pickle, in an archive that another program has laid out."""
    torch.save(release_pickle(weights), file)
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, b"big" if big and name.endswith("/byteorder") else content)
    return file


def converted(*arguments: str | Path) -> int:
    return convert.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", KINDS)
def test_convert(tmp_path, weights, vocabulary, kind, capsys):
    source = make_source(kind, tmp_path, weights, vocabulary)
    assert converted(*source, tmp_path / "out", "--shard-size", "30KB") == 0
    said = capsys.readouterr()
    assert f"python sample.py --model {tmp_path / 'out'}" in said.out and said.err == ""
    shards = sorted(file.name for file in (tmp_path / "out").glob("model-*"))
    assert len(shards) > 3 and all((tmp_path / "out" / name).stat().st_size < 45_000 for name in shards)
    model = PersimmonForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(weights[name], p) and p.dtype == torch.bfloat16 for name, p in model.state_dict().items())
    tokenizer = Tokenizer(tmp_path / "out")
    end = tokenizer.end_of_text
    expected = replace(RELEASE, bos_token_id=end, eos_token_id=end, dtype="bfloat16")
    assert PersimmonConfig.from_pretrained(tmp_path / "out") == expected
    truth = PersimmonForCausalLM(RELEASE).bfloat16().eval()
    truth.load_state_dict(weights)
    ids = random_ids(RELEASE)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, truth(ids).logits)
        theirs = transformers.PersimmonForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
        assert theirs.dtype == torch.bfloat16 and theirs.config.rope_parameters["rope_theta"] == 25000.0
        assert theirs.config.hidden_dropout == 0.1 and theirs.config.eos_token_id == end
        assert close(model.float()(ids).logits, theirs.float()(ids).logits)
    files = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files | set(shards) | {"model.safetensors.index.json"}
    # and once more, from there to another dtype in one file
    assert converted(tmp_path / "out", tmp_path / "again", "--dtype", "float32") == 0
    again = PersimmonForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(weights[name].float(), p) and p.dtype == torch.float32 for name, p in again.state_dict().items())
    assert (tmp_path / "again" / "model.safetensors").is_file()
    assert sample_script.main(["--model", str(tmp_path / "out"), "fox", "-n", "3", "--quiet", "--device", "cpu"]) == 0


def test_convert_without_args_of_training(tmp_path, weights, vocabulary):
    changes = dict.fromkeys(("hidden_dropout", "attention_dropout", "init_method_std"), "absent")
    tar = release_tar(tmp_path / "release.tar", release_pickle(weights, changes), vocabulary)
    assert converted(tar, tmp_path / "out") == 0
    config = PersimmonConfig.from_pretrained(tmp_path / "out")
    assert (config.hidden_dropout, config.attention_dropout, config.initializer_range) == (0.0, 0.0, 0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"qk_layernorm": "weights_per_attention_head_and_layer"}, "args.qk_layernorm = 'weights_per_attention_head_and_layer'"),
     ({"sq_relu": False}, "args.sq_relu = False, which is not supported: True is"),
     ({"tensor_model_parallel_size": 2}, "args.tensor_model_parallel_size = 2"), ({"kv_channels": 32}, "args.kv_channels"),
     ({"untie_embeddings": False}, "untie_embeddings"), ({"rotary_pct": "absent"}, "no args.rotary_pct"),
     ({"ffn_hidden_size": 96}, "in shape .* its config makes it"), ({"num_layers": 4}, "lacks the tensor model.layers.3"),
     ({"num_layers": 2}, "has the tensor model.layers.2"), ({"padded_vocab_size": 300}, "in shape"),
     ({"qk_layernorm": "none"}, "has the tensor model.layers.0.self_attn.q_layernorm")],
)  # fmt: skip
def test_convert_checks_args(tmp_path, weights, vocabulary, changes, message, capsys):
    tar = release_tar(tmp_path / "release.tar", release_pickle(weights, changes), vocabulary)
    assert converted(tar, tmp_path / "out") == 2
    said = capsys.readouterr()
    assert re.search(message, said.err) and said.err.count("\n") == 1 and said.out == ""
    assert os.listdir(tmp_path) == ["release.tar"]


def test_convert_without_qk_layernorm(tmp_path, weights, vocabulary):
    few = {name: t for name, t in weights.items() if "q_layernorm" not in name and "k_layernorm" not in name}
    tar = release_tar(tmp_path / "release.tar", release_pickle(few, {"qk_layernorm": "none"}), vocabulary)
    assert converted(tar, tmp_path / "out") == 0
    assert not PersimmonForCausalLM.from_pretrained(tmp_path / "out").config.qk_layernorm


def test_convert_refuses(tmp_path, weights, vocabulary, capsys, monkeypatch):
    """Each failure: one sentence, exit code 2, nothing written."""

    def refused(message, *arguments):
        before = sorted(os.listdir(tmp_path))
        assert converted(*arguments) == 2
        said = capsys.readouterr()
        assert re.search(message, said.err) and said.err.count("\n") == 1, said.err
        assert sorted(os.listdir(tmp_path)) == before

    out = tmp_path / "out"
    good = release_tar(tmp_path / "good.tar", release_pickle(weights), vocabulary)

    def tar(name, checkpoint, **options):
        return release_tar(tmp_path / f"{name}.tar", checkpoint, vocabulary, **options)

    refused("there is no .*nothing", tmp_path / "nothing", out)
    refused("an entry 'ema', of which nothing is known", tar("unknown", release_pickle(weights, ema={})), out)
    second = "8b_chat_model_release/iter_0001251/mp_rank_01/model_optim_rng.pt"
    refused(r"is in 2 parts \(mp_rank_\*\)", tar("parts", release_pickle(weights), members={second: b"x"}), out)
    latest = {"8b_chat_model_release/latest_checkpointed_iteration.txt": b"7"}
    refused("has no iter_0000007/mp_rank_00/model_optim_rng.pt", tar("latest", release_pickle(weights), members=latest), out)
    latest = {"8b_chat_model_release/latest_checkpointed_iteration.txt": b"release"}
    refused("holds 'release' and no number", tar("release", release_pickle(weights), members=latest), out)
    name = "model.layers.1.mlp.dense_4h_to_h.bias"
    broken = weights[name].clone()
    broken[7] = math.nan
    refused(f"{name} has NaN or infinite numbers", tar("nan", release_pickle({**weights, name: broken})), out)
    broken[7] = -math.inf
    refused(f"{name} has NaN or infinite numbers", tar("inf", release_pickle({**weights, name: broken})), out)
    broken[7] = 70000
    refused(f"{name} overflows in torch.float16", tar("big", release_pickle({**weights, name: broken})), out, "--dtype", "float16")
    extra = {**weights, "model.layers.0.mlp.gate.weight": weights[name]}
    refused("the tensor model.layers.0.mlp.gate.weight, which no PersimmonForCausalLM", tar("more", release_pickle(extra)), out)
    turned = weights["model.layers.0.mlp.dense_h_to_4h.weight"].t().contiguous().t()
    turned = {**weights, "model.layers.0.mlp.dense_h_to_4h.weight": turned}
    refused("dense_h_to_4h.weight with its numbers in another order", tar("turned", release_pickle(turned)), out)
    integers = {**weights, name: torch.zeros(48, dtype=torch.int8)}
    refused(f"{name} as torch.int8", tar("integers", release_pickle(integers)), out)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    refused("cut.tar", cut, out)
    (tmp_path / "text.pt").write_text("hello")
    refused("without its tokenizer", tmp_path / "text.pt", out)
    (tmp_path / "v").write_bytes(vocabulary)
    refused("damaged or no checkpoint", tmp_path / "text.pt", out, "--tokenizer", tmp_path / "v")
    for name, change, message in (
        ("zipped", {"compression": zipfile.ZIP_DEFLATED}, "is compressed: write it anew with torch.save"),
        ("other", {}, "elsewhere than torch would write them"), ("big", {"big": True}, "numbers in big-endian order"),
    ):  # fmt: skip
        refused(message, rewritten_pickle(tmp_path / f"{name}.pt", weights, **change), out, "--tokenizer", tmp_path / "v")
    folder = hub_folder(tmp_path / "hub", weights, vocabulary, 1)
    circle: dict = {}
    circle["a"] = circle
    negated = torch._neg_view(weights["lm_head.weight"])
    for content, message in ((5, "holds no dict of tensors"), (circle, "dicts in dicts without end"),
                             ({"lm_head.weight": negated}, "lm_head.weight with its numbers in another order or form")):
        torch.save(content, folder / "pytorch_model.bin")
        refused(message, folder, out)
    with torch.utils.serialization.config.patch({"save.storage_alignment": 1}):
        torch.save(weights, folder / "pytorch_model.bin")  # numbers that begin at odd places
    refused("elsewhere than torch would write them", folder, out)
    for content in ("{}", "[1]", '{"weight_map": 5}', '{"weight_map": {"a": 1}}', "{nope"):
        (folder / "pytorch_model.bin.index.json").write_text(content)
        refused("pytorch_model.bin.index.json (has no weight_map|has to hold|is not valid)", folder, out)
    for names in ("5", "[5]", '"PersimmonForCausalLM"', '["PersimmonConfig"]'):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": json.loads(names)}))
        refused("names the architectures .* of which none is known here", folder, out)
    for changes in ({"hidden_size": "x"}, {"num_attention_heads": 0}, {"rotary_emb_base": None}):
        refused("config key .* (is not of type|has to be above 0)", tar("args", release_pickle(weights, changes)), out)
    with gzip.open(tmp_path / "release.tar.gz", "wb") as file:
        file.write(good.read_bytes())
    refused("release.tar.gz is compressed, cut off or damaged", tmp_path / "release.tar.gz", out)
    (tmp_path / "bad.model").write_bytes(b"hello")
    refused("bad.model is damaged or no SentencePiece model", good, out, "--tokenizer", tmp_path / "bad.model")
    # the source, and what is not a leftover, stay where they are
    shutil.copytree(TINY, tmp_path / "x.unfinished" / "source")
    shutil.copytree(TINY, tmp_path / "x.replaced")
    refused("x.unfinished, which is OUTPUT or made on the way to it, is or holds", tmp_path / "x.unfinished/source", tmp_path / "x")
    refused("x.unfinished is in the way", TINY, tmp_path / "x")
    shutil.rmtree(tmp_path / "x.unfinished")
    refused("x.replaced, which is OUTPUT or", tmp_path / "x.replaced", tmp_path / "x")
    (tmp_path / "link").symlink_to(tmp_path / "x.replaced")
    refused("is or holds the source", tmp_path / "link", tmp_path / "x.replaced", "--force")
    refused("is or holds the source", tmp_path / "x.replaced", tmp_path / "link", "--force")
    refused("can't be made", TINY, "/")
    assert converted(TINY, tmp_path / "link", "--force") == 0  # to where it leads
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "link.replaced").exists()
    capsys.readouterr()
    refused("is not one of Adept's releases", good, out, "--verify")
    refused("no file .*config.json", tmp_path, out)
    refused("OUTPUT .* is or holds the source", good, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    refused("GB free, and .* GB are needed", good, out)
    monkeypatch.undo()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused("exists: give another name, or --force", good, tmp_path / "mine")
    refused("is not a model's folder: --force does not", good, tmp_path / "mine", "--force")
    assert converted(good, out, "--dry-run") == 0 and not out.exists()
    assert converted(good, out) == 0
    refused("exists: give another name, or --force", good, out)
    (out / "left over").write_text("x")
    assert converted(good, out, "--force", "--dtype", "float32") == 0
    assert not (out / "left over").exists() and PersimmonConfig.from_pretrained(out).dtype == "float32"


def test_convert_notices_what_reads_back_differently(tmp_path, weights, vocabulary, monkeypatch, capsys):
    tar, write = release_tar(tmp_path / "release.tar", release_pickle(weights), vocabulary), convert.write_shard

    def bad_disk(file, *rest):
        sums = write(file, *rest)
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        return sums

    monkeypatch.setattr(convert, "write_shard", bad_disk)
    assert converted(tar, tmp_path / "out") == 2
    assert "reads back differently" in capsys.readouterr().err and os.listdir(tmp_path) == ["release.tar"]


class Evil:
    """A pickle of this calls something when it is loaded."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["args", "model", "rng_state", "entry", "tensor"])
@pytest.mark.parametrize("attack", ["system", "eval", "open", "chain", "subprocess"])
def test_nothing_in_a_pickle_is_executed(tmp_path, weights, vocabulary, attack, where):
    trace = tmp_path / "trace"
    evil = {
        "system": Evil(os.system, f"touch {trace}"),
        "eval": Evil(eval, f"open({str(trace)!r}, 'w')"),
        "open": Evil(open, str(trace), "w"),
        "chain": Evil(Evil, Evil(getattr, Evil(__import__, "os"), "mkdir"), Evil(os.mkdir, str(trace))),
        "subprocess": Evil(subprocess.Popen, ["touch", str(trace)]),
    }[attack]
    checkpoint = release_pickle(weights, {"evil": evil} if where == "args" else None)
    if where == "model":
        checkpoint["model"]["language_model"]["evil"] = evil
    elif where == "tensor":
        checkpoint["model"]["word_embeddings_for_head"]["weight"] = evil
    elif where == "rng_state":
        checkpoint["rng_state"] = [evil]
    elif where == "entry":
        checkpoint["evil"] = evil
    tar = release_tar(tmp_path / "release.tar", checkpoint, vocabulary)
    command = [sys.executable, HERE / "convert.py", tar, tmp_path / "out"]
    code = converted(*command[2:])
    assert not trace.exists()
    assert code in (0, 2) and sorted(os.listdir(tmp_path)) == (["out"] if code == 0 else []) + ["release.tar"]
    assert code == 2 or where in ("args", "rng_state")  # what is ignored may be anything
    assert converted(hub_folder(tmp_path / "hub", {**weights, "x": evil}, vocabulary, 1), tmp_path / "out2") == 2
    assert not trace.exists()


def test_a_tar_is_not_unpacked(tmp_path, weights, vocabulary, capsys):
    members = {"../escaped": b"x", "/tmp/escaped-by-test": b"x", "8b_chat_model_release/../../escaped": b"x"}
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    tar = release_tar(inside / "release.tar", release_pickle(weights), vocabulary, members)
    with tarfile.open(tar, "a") as opened:
        for name, target in (("link", "/etc/passwd"), ("8b_chat_model_release/adept_vocab2.model", "/etc/passwd")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            opened.addfile(info)
    assert converted(tar, inside / "out") == 0
    assert sorted(os.listdir(inside)) == ["out", "release.tar"] and os.listdir(tmp_path) == ["deep"]
    assert os.listdir(tmp_path / "deep") == ["deeper"] and not Path("/tmp/escaped-by-test").exists()
    # the tokenizer as a link to a file of this machine
    with tarfile.open(tar) as source, tarfile.open(inside / "linked.tar", "w") as opened:
        for member in source.getmembers():
            if member.name.endswith("release/adept_vocab.model"):
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "adept_vocab.vocab", 0
            opened.addfile(member, source.extractfile(member) if member.isreg() else None)
    capsys.readouterr()
    assert converted(inside / "linked.tar", inside / "other") == 2
    assert "has 0 members adept_vocab.model" in capsys.readouterr().err


def test_convert_killed_at_any_moment(tmp_path, weights, vocabulary):
    """kill -9 leaves no OUTPUT, and the next run succeeds."""
    tar = release_tar(tmp_path / "release.tar", release_pickle(weights), vocabulary)
    slow = f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
import convert
pieces = convert.pieces_of
def slowly(*arguments):
    print("writing", flush=True)
    for piece in pieces(*arguments):
        time.sleep(0.02)
        yield piece
convert.pieces_of = slowly
sys.exit(convert.main(sys.argv[1:]))
"""
    for delay in (0, 0.1, 0.3, 0.5):  # of about a second that it writes
        command = [sys.executable, "-c", slow, tar, tmp_path / "out", "--shard-size", "30KB"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert any("writing" in line for line in process.stdout)
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert sorted(os.listdir(tmp_path)) == ["out.unfinished", "release.tar"]
    assert converted(tar, tmp_path / "out") == 0 and sorted(os.listdir(tmp_path)) == ["out", "release.tar"]
    # killed between the renames of --force: the old folder comes back, or the new one is whole
    (tmp_path / "out").rename(tmp_path / "out.replaced")
    assert converted(tar, tmp_path / "out") == 2 and sorted(os.listdir(tmp_path)) == ["out", "release.tar"]


def test_drop_unused(tmp_path, vocabulary, capsys):
    big = with_placeholders(vocabulary)
    pieces = sum(number == 1 for number, _, _ in convert.fields_of(big))
    config = replace(RELEASE, vocab_size=pieces + 9, num_hidden_layers=1)
    model = randomize(PersimmonForCausalLM(config))
    model.lm_head.weight.data[3:70003] = 0  # logits of 0, where the largest of the others are above it
    checkpoint = release_pickle(model.state_dict(), config=config, changes={"num_layers": 1})
    tar = release_tar(tmp_path / "release.tar", checkpoint, big)
    assert converted(tar, tmp_path / "whole") == 0 and converted(tar, tmp_path / "less", "--drop-unused") == 0
    whole, less = (PersimmonForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "less"))
    old, new = Tokenizer(tmp_path / "whole"), Tokenizer(tmp_path / "less")
    assert less.config.vocab_size == config.vocab_size - 70_000 == len(new) + 9 and len(old) == len(new) + 70_000
    assert less.config.eos_token_id == new.end_of_text == old.end_of_text - 70_000
    assert new.processor.id_to_piece(new.end_of_text) == "|ENDOFTEXT|"

    def shifted(ids):
        return [i if i < 3 else i - 70_000 for i in ids]

    for text in ("the quick brown fox", "日本 🙂 jumps", " |ENDOFTEXT| of black quartz,\n\njudge"):
        assert new.encode(text) == shifted(old.encode(text)) and new.decode(new.encode(text)) == old.decode(old.encode(text))
    ids = torch.tensor([old.encode("the quick brown fox jumps")])
    kept = torch.tensor([*range(3), *range(70_003, config.vocab_size)])
    with torch.no_grad():
        assert torch.equal(less(torch.tensor([shifted(ids[0].tolist())])).logits, whole(ids).logits[..., kept])
    a = whole.generate(ids, max_new_tokens=20)[0].tolist()
    assert less.generate(torch.tensor([shifted(ids[0].tolist())]), max_new_tokens=20)[0].tolist() == shifted(a)
    transformers.PersimmonForCausalLM.from_pretrained(tmp_path / "less")
    assert converted(tar, tmp_path / "int8", "--drop-unused", "--quantize", "int8") == 0
    state, expected = PersimmonForCausalLM.from_pretrained(tmp_path / "int8").state_dict(), quantize_model(less, "int8").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    # refused where the pieces are not placeholders
    capsys.readouterr()
    for changed, message in (
        (with_placeholders(vocabulary, kind=1), "'|IMAGE_PATCH_0|' is one of ordinary text"),
        (with_placeholders(vocabulary, "|PATCH|"), "release.tar is damaged or no SentencePiece model"),
        (with_placeholders(vocabulary).replace(b"|IMAGE_PATCH_69999|", b"|STOP_TALKING_NOW!|"), "are not one text around"),
    ):
        tar = release_tar(tmp_path / "release.tar", checkpoint, changed)
        assert converted(tar, tmp_path / "bad", "--drop-unused") == 2 and message in capsys.readouterr().err
    tar = release_tar(tmp_path / "release.tar", checkpoint, vocabulary)
    assert converted(tar, tmp_path / "bad", "--drop-unused") == 2 and "none to drop" in capsys.readouterr().err


# --- the file alone, the well-known snippet, tiny/, the command line -------------------------------------------------


def test_persimmon_py_alone_needs_torch_only(tmp_path):
    shutil.copy(HERE / "persimmon.py", tmp_path)
    code = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("safetensors", "sentencepiece", "triton", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
threads, state = torch.get_num_threads(), torch.get_rng_state()
import persimmon
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
config = persimmon.PersimmonConfig(vocab_size=50, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                                   num_attention_heads=2)
model = persimmon.PersimmonForCausalLM(config).eval()
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).shape)
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "torch.Size([1, 8])\n", result.stderr
    assert result.stderr == ""


def test_the_snippet_of_transformers_documentation():
    """With its imports changed, and this project's model for Adept's."""
    path = TINY
    tokenizer = Tokenizer(path)
    model = PersimmonForCausalLM.from_pretrained(path, dtype="auto")
    inputs = tokenizer("Plants create energy through a process known as photosynthesis.", return_tensors="pt")
    outputs = model.generate(**inputs, max_length=50)
    text = tokenizer.decode(outputs[0])
    assert text.startswith("Plants create energy through a process known as photosynthesis.") and len(outputs[0]) <= 50


def test_tiny_is_a_persimmon():
    config, tokenizer = PersimmonConfig.from_pretrained(TINY), Tokenizer(TINY)
    assert (config.head_dim, config.rotary_dim, config.rope_theta) == (64, 32, 25000.0) and config.qk_layernorm
    assert config.intermediate_size == 4 * config.hidden_size and config.vocab_size == len(tokenizer)
    assert config.bos_token_id == config.eos_token_id == tokenizer.end_of_text
    assert tokenizer.processor.id_to_piece(tokenizer.end_of_text) == "|ENDOFTEXT|"
    assert sum(file.stat().st_size for file in TINY.iterdir() if file.is_file()) <= 11e6
    theirs = oracle(TINY)
    ids = tokenizer("ROMEO:\nWhat light through yonder window breaks?\n")["input_ids"]
    with torch.no_grad():
        ours = PersimmonForCausalLM.from_pretrained(TINY, "float32")
        assert close(ours(ids).logits, theirs(ids).logits)
        loss = ours(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / len(tokenizer.decode(ids[0]))
    assert loss < 2.0  # nats a character; noise has log(1024) a token, about 3


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60) | st.text("ab \n\t.", max_size=60))
def test_tiny_tokenizer_loses_nothing(text):
    tokenizer = Tokenizer(TINY)
    text = text.replace("\0", "")  # SentencePiece's own end of string
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")  # its own sign for a space


def train_py(folder: Path, *arguments: str) -> list[str | Path]:
    """A command line for tiny/train.py, on a text made here."""
    (folder / "text").write_text("".join(f"{line}\n" for line in CORPUS * 30))
    options = ["--text", folder / "text", "--out", folder / "out", "--batch", "1", "--eval-every", "1"]
    return [sys.executable, TINY / "train.py", *options, "--device", "cpu", *arguments]


def losses_of(*outputs: str) -> list[str]:
    return [line for output in outputs for line in re.findall(r"step \d+/\d+  loss \S+", output)]


def test_training_resumed_equals_uninterrupted(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    done = subprocess.run(train_py(whole, "--steps", "6"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(os.listdir(whole / "out")) == files

    process = subprocess.Popen(train_py(parts, "--steps", "6"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # the first validation loss
    process.send_signal(signal.SIGINT)
    _, first = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command with --resume goes on" in first and "Traceback" not in first
    other = subprocess.run(train_py(parts, "--steps", "7", "--resume"), capture_output=True, text=True, timeout=120)
    assert other.returncode == 2 and "--resume: the run was begun with" in other.stderr
    second = subprocess.run(train_py(parts, "--steps", "6", "--resume"), capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert 1 <= len(losses_of(first)) <= 5
    assert losses_of(first, second.stderr) == losses_of(done.stderr) and len(losses_of(done.stderr)) == 6
    assert sorted(os.listdir(parts / "out")) == files
    assert all((whole / "out" / file).read_bytes() == (parts / "out" / file).read_bytes() for file in files)
    model = PersimmonForCausalLM.from_pretrained(whole / "out")
    assert next(model.parameters()).dtype == torch.bfloat16
    oracle(whole / "out")
    again = subprocess.run(train_py(whole, "--steps", "6"), capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "holds a model" in again.stderr and again.stderr.count("\n") == 1


def test_fine_tuning_and_a_loss_that_is_not_finite(tmp_path):
    tuned = subprocess.run(train_py(tmp_path, "--steps", "1", "--init", TINY), capture_output=True, text=True, timeout=120)
    assert tuned.returncode == 0, tuned.stderr
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
    before, after = (load_file(f / "model.safetensors") for f in (TINY, tmp_path / "out"))
    change = [(after[name] - before[name]).abs().max().item() for name in before]
    assert 0 < max(change) < 0.1
    shutil.rmtree(tmp_path / "out")
    command = train_py(tmp_path, "--steps", "9", "--init", TINY, "--lr", "1e30")
    broken = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert broken.returncode == 2 and re.search(r"train.py: error: step \d: the loss is nan", broken.stderr), broken.stderr
    assert "Traceback" not in broken.stderr


ON_CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # for sample.py, which would take a GPU


def sample_py(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, HERE / "sample.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, **{"cwd": "/", "env": ON_CPU, **options})


def test_command_line_writes_text():
    first, second = (sample_py("--seed", "7", "-n", "30") for _ in range(2))
    assert first.returncode == 0
    assert first.stdout == second.stdout and first.stdout.decode().startswith("ROMEO:\n") and len(first.stdout) > 40
    assert first.stdout != sample_py("--seed", "8", "-n", "30").stdout
    figures = first.stderr.decode()
    assert re.search(r"\d+% of activations not zero\n", figures)
    for figure in ("prompt ", " tok/s", "first token after", "generated     30 tokens", "GB/s", "peak memory", "seed 7",
                   "stopped by length"):  # fmt: skip
        assert figure in figures, figures


def test_command_line_options():
    greedy = sample_py("To be, or not", "--temp", "0", "-n", "20", "--quiet", "--dtype", "float32", "--threads", "1")
    assert greedy.stderr == b"" and greedy.stdout.startswith(b"To be, or not")
    model, tokenizer = PersimmonForCausalLM.from_pretrained(TINY, "float32"), Tokenizer(TINY)
    ids = torch.tensor([tokenizer.encode("To be, or not")])
    assert greedy.stdout.decode() == tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]) + "\n"
    ids = ids[:, 1:]
    no_bos = sample_py("To be, or not", "--temp", "0", "-n", "20", "--quiet", "--dtype", "float32", "--no-bos")
    assert no_bos.stdout.decode() == tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]) + "\n"
    piped = sample_py("-", "--temp", "0", "-n", "20", "--quiet", "--dtype", "float32", input=b"To be, or not\n")
    assert piped.stdout == greedy.stdout
    several = sample_py("--num-samples", "3", "--seed", "5", "-n", "12", "--dtype", "float32").stdout.decode()
    alone = [sample_py("--seed", str(s), "-n", "12", "--dtype", "float32").stdout.decode() for s in (5, 6, 7)]
    assert several == "\n---\n\n".join(text if n == 2 else text + "" for n, text in enumerate(alone))
    assert "top-p" in sample_py("--help").stdout.decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "/nowhere"], "there is no folder /nowhere"), (["--temp", "-1"], "--temp -1.0 is out of range"),
     (["--temp", "hot"], "--temp: invalid float value: 'hot'"), (["--what"], "unrecognized arguments: --what"),
     (["--num-samples", "9" * 12], "--num-samples 999999999999 is out of range: it goes from 1 to 100000"),
     (["--threads", "2147483648"], "--threads 2147483648 is out of range"),
     (["--bench", "--random", "8b:" + "9" * 5000], "is no shape: give 8b, or 8b:L"),
     (["-n", "0"], "--max-tokens 0 is out of range"), (["--top-p", "2", "--chat"], "--top-p 2.0 is out of range"),
     (["--num-samples", "0"], "--num-samples"), (["--threads", "0"], "--threads"), (["--dtype", "int8"], "--dtype"),
     (["--device", "abacus"], "--device abacus is not available on this machine"), (["", "--no-bos"], "with a token at least"),
     (["word " * 3000], "and leaves no room for another one: the context limit is"),
     (["--device", "meta"], "--device meta is not available"), (["a", "--chat"], "only one of"),
     (["a", "--bench"], "only one of"), (["--random", "8b"], "--random is for --bench"),
     (["--bench", "--random", "7b"], "7b is no shape"), (["--bench", "--random", "8b:x"], "8b:x is no shape"),
     (["--bench", "--density", "0"], "--density 0.0 is out of range"), (["--bench", "-r", "0"], "--repetitions 0 is"),
     (["a\udc80"], "not valid Unicode"), (["-"], "standard input is not UTF-8: invalid start byte at byte 1")],
)  # fmt: skip
def test_command_line_errors(arguments, message):
    result = sample_py(*arguments, input=b"a\xff")
    error = result.stderr.decode(errors="replace")
    assert result.returncode == 2 and result.stdout == b"" and message in error, error
    assert error.count("\n") == 1 and "Traceback" not in error


def test_bench():
    result = sample_py("--bench", "-r", "2", "--n-prompt", "128,512", "--n-depth", "0,2048,40", "--batch-size", "1,3")
    error, lines = result.stderr.decode(), result.stdout.decode().splitlines()
    assert result.returncode == 0 and "tg64 @ 2048 left out: the context is 1024" in error
    limits = re.search(r"reads memory at ([\d.]+) GB/s and multiplies matrices at ([\d.]+) TFLOP/s", lines[-1])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| tiny")]
    names = ["pp128", "pp512", "tg64 @ 0", "tg64 @ 40"]
    assert [row[5] for row in rows] == names + [f"{name} x 3" for name in names]
    assert {row[3] for row in rows} == {"bfloat16"}
    for row in rows:
        mean, spread = map(float, row[6].split(" ± "))
        assert mean > 0 and spread >= 0 and len(row) == 10
    c, tensors = PersimmonConfig.from_pretrained(TINY), load_file(TINY / "model.safetensors")
    C, F, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    weights = sum(p.numel() for name, p in tensors.items() if "embed" not in name) * 2
    gigabytes = {"tg64 @ 0": weights + L * C * 128, "tg64 @ 40": weights + L * C * 288}  # 2 * 2 bytes * (0 or 40, + 32)
    gigabytes |= {"tg64 @ 0 x 3": weights / 3 + L * C * 128, "tg64 @ 40 x 3": weights / 3 + L * C * 288}
    for row in rows:
        tokens, (work, unit) = float(row[6].split()[0]), row[7].split()
        if row[5].startswith("pp"):
            T = int(row[5].split()[0][2:])
            each = 2 * (L * (4 * C * C + 2 * F * C) - 2 * F * C + L * C * T) / 1e12
            assert unit == "TFLOP/s"
        else:
            each = gigabytes[row[5]] / 1e9
            assert unit == "GB/s"
        assert float(work) == pytest.approx(tokens * each, rel=0.002, abs=0.006)
        limit = float(limits[1 if unit == "GB/s" else 2])
        assert float(row[8].strip("%")) == pytest.approx(100 * float(work) / limit, abs=1 + 0.6 / limit)  # both rounded


def test_bench_measures_what_is_settled_and_goes_on_when_memory_is_out(monkeypatch, capsys):
    clock = 0.0

    def steps(model, ids, max_new_tokens, **_):
        nonlocal clock
        if len(ids) == 3:
            raise torch.OutOfMemoryError
        for n in range(max_new_tokens):
            clock += 10.0 if n == 1 else 0.5  # as if a pass were recorded
            yield n

    monkeypatch.setattr(persimmon, "generate", steps)
    monkeypatch.setattr(sample_script, "machine_speed", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    arguments = ("--bench", "--device", "cpu", "-r", "1", "--n-prompt", "20", "--n-depth", "0", "--batch-size", "1,3,2")
    assert sample_script.main(arguments) == 0
    out, error = capsys.readouterr()
    rows = {line.split("|")[6].strip(): float(line.split("|")[7].split()[0]) for line in out.splitlines() if "tiny" in line}
    assert list(rows) == ["pp20", "tg64 @ 0", "pp20 x 2", "tg64 @ 0 x 2"]
    assert list(rows.values()) == [40.0, 2.0, 80.0, 4.0] and "pp20 x 3 left out: out of memory" in error


def test_speed_is_that_of_settled_steps(monkeypatch, capsys):
    """The first is the prompt's; on CUDA the second is slow, since a pass is recorded, and does not count either."""
    clock = 0.0

    def steps(*_, **__):
        nonlocal clock
        for seconds in (1.0, 10.0, 0.5, 0.5, 0.5, 0.5):
            clock += seconds
            yield persimmon.Step([71], [0.0], [None])

    monkeypatch.setattr(persimmon, "generate", steps)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    for is_cuda, speed in ((True, 2.0), (False, 5 / 12)):
        monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
        assert sample_script.main(["hi", "--json", "--quiet", "--device", "cpu"]) == 0
        figures = json.loads(capsys.readouterr().out)["figures"]
        assert figures["tokens"] == 6 and figures["seconds_to_first_token"] == 1.0
        assert figures["tokens_per_second"] == pytest.approx(speed, abs=0.005)


def test_which_errors_mean_that_memory_is_out(monkeypatch, capsys):
    """PyTorch raises RuntimeErrors for it, and for what is a bug."""
    errors = {"DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.": True,
              "CUDA out of memory. Tried to allocate 2.00 GiB.": True,
              "CUDA error: an illegal memory access was encountered": False}  # fmt: skip
    for text, is_memory in errors.items():
        monkeypatch.setattr(sample_script, "run", Mock(side_effect=RuntimeError(text)))
        if is_memory:
            assert sample_script.main(["hi"]) == 2 and "error: out of memory: try" in capsys.readouterr().err
        else:
            with pytest.raises(RuntimeError, match=text):
                sample_script.main(["hi"])
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(sample_script, "run", Mock(side_effect=error))
    assert sample_script.main(["hi"]) == 2 and "error: out of memory: try" in capsys.readouterr().err


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_random_model_and_its_density(density, monkeypatch):
    """The density of random weights is what was asked for, and what is said to be read depends on it."""
    use_one_token_products(monkeypatch)
    config = replace(CONFIGS["D64"], hidden_size=512, intermediate_size=1024)
    fractions, count = [], sample_script.Density
    model = sample_script.random_model(config, density, torch.float32, "cpu", True, None, fractions.append)
    assert fractions[-1] == 1 and all(p.isfinite().all() for p in model.parameters())
    counted = count(model)
    for step in generate(model, torch.tensor([[7]]), max_new_tokens=30):
        assert math.isfinite(step.logprobs[0])
    assert counted.stop() == pytest.approx(density, abs=0.05)
    down = 3 * 512 * 1024 * 4
    weights = sum(p.nbytes for p in model.parameters()) - 151 * 512 * 4
    for rows in (1, 2, 12):
        read = counted.weights_read(model, rows)
        assert read == pytest.approx(weights - max(0, 1 - rows * density) * down, rel=0.02)
    total = counted.total
    list(generate(model, torch.tensor([[7]]), max_new_tokens=2))
    assert counted.total == total
    dense = sample_script.random_model(config, density, torch.float32, "cpu", False, None, fractions.append)
    assert count(dense).weights_read(dense, 1) == weights
    small = sample_script.random_model(config, density, torch.float32, "cpu", True, "int8", fractions.append)
    counted = count(small)
    list(generate(small, random_ids(config, rows=1, length=9), max_new_tokens=1))
    assert counted.total == 1024  # of a prompt only the last token of the last layer comes alone
    list(generate(small, torch.tensor([[7]]), max_new_tokens=30))
    everything = sum(x.nbytes for name, x in small.state_dict().items() if "embed" not in name)
    skipped = (1 - counted.stop()) * 3 * 1024 * 520
    assert counted.weights_read(small, 1) == pytest.approx(everything - skipped)


@pytest.mark.parametrize("kind", ["missing", "cut off", "only .bin", "not safetensors", "shard missing"])
def test_command_line_with_a_damaged_folder(folder, kind):
    damage(folder, kind)
    result = sample_py("--model", folder, "fox")
    assert result.returncode == 2 and result.stdout == b"" and result.stderr.count(b"\n") == 1, result.stderr


def test_command_line_does_not_import_compilers():
    """PyTorch's and Triton's would double the time to the first token."""
    code = "import sys, sample; sample.main(['-n', '3']); assert not {'torch._dynamo', 'triton'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, env=ON_CPU, check=True, timeout=120)


def test_command_line_ctrl_c_and_closed_pipe():
    command = [sys.executable, HERE / "sample.py", "-n", "1000", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ON_CPU)
    process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in error and b"stopped by Ctrl-C" in error, error
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ON_CPU)
    process.stdout.read(30)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == -signal.SIGPIPE


@pytest.mark.parametrize("script, arguments, closed, code, error", [
    ("sample.py", "hi -n 3 --quiet", "<&-", 0, ""), ("sample.py", "hi -n 3", "2>&-", 0, ""),
    ("sample.py", "- -n 3", "<&-", 2, "sample.py: error: stdin is closed\n"),
    ("sample.py", "hi -n 3", ">&-", 2, "sample.py: error: stdout is closed\n"),
    ("convert.py", "tiny {out}", "2>&-", 0, ""), ("convert.py", "nothing {out}", "2>&-", 2, ""),
])  # fmt: skip
def test_command_line_with_closed_streams(tmp_path, script, arguments, closed, code, error):
    arguments = arguments.format(out=tmp_path / "out")
    result = subprocess.run(["sh", "-c", f'exec "$0" {script} {arguments} {closed}', sys.executable],
                            cwd=HERE, env=ON_CPU, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert (result.returncode, result.stderr) == (code, error)
    assert (tmp_path / "out").exists() == (code == 0 and script == "convert.py")


def test_convert_ctrl_c_at_any_moment(tmp_path):
    """While torch is imported, too."""
    for seconds in (0.8, 1.5):
        command = [sys.executable, HERE / "convert.py", TINY, tmp_path / "out", "--force", "--shard-size", "50KB"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode in (0, 130, -signal.SIGINT) and error == b"", error
        assert not (tmp_path / "out.unfinished").exists()


def test_command_line_stop_texts():
    options = ["--seed", "3", "-n", "80", "--quiet", "--dtype", "float32", "--ignore-eos"]
    free = sample_py(*options).stdout.decode().removesuffix("\n")
    assert len(free) > 90
    for stop in (free[40:43], free[60:75], free[90]):
        stopped = sample_py(*options, "--stop", "never there", "--stop", stop).stdout.decode().removesuffix("\n")
        generated = free[len("ROMEO:\n") :]
        assert stopped == "ROMEO:\n" + generated[: generated.index(stop)]
    assert sample_py(*options, "--stop", "never there").stdout.decode().removesuffix("\n") == free


def test_command_line_files_json_and_logprobs(tmp_path):
    model, tokenizer = PersimmonForCausalLM.from_pretrained(TINY, "float32"), Tokenizer(TINY)
    (tmp_path / "one").write_text("JULIET:\n\n")
    (tmp_path / "many").write_bytes(b'"JULIET:\\n"\n\r\nTo be, or not\r\n{"no": "string"}\n')
    greedy = ["--temp", "0", "-n", "9", "--quiet", "--dtype", "float32"]
    (one,) = map(json.loads, sample_py("--file", tmp_path / "one", "--json", *greedy).stdout.splitlines())
    many = [json.loads(line) for line in sample_py("--batch", tmp_path / "many", "--json", *greedy).stdout.splitlines()]
    assert [o["prompt"] for o in many] == ["JULIET:\n", "To be, or not", '{"no": "string"}'] and one["prompt"] == "JULIET:\n"
    for o in (one, *many):
        steps = list(generate(model, tokenizer(o["prompt"])["input_ids"], max_new_tokens=9))
        assert o["ids"] == [s.tokens[0] for s in steps] and o["finish_reason"] == steps[-1].finish_reasons[0]
        assert close(torch.tensor(o["logprobs"]), torch.tensor([s.logprobs[0] for s in steps]), 1e-4)
        assert o["text"] == tokenizer.decode(o["ids"])
        assert {"prompt_tokens", "tokens_per_second", "seconds_to_first_token"} <= o["figures"].keys()
    lines = sample_py("--file", tmp_path / "one", "--logprobs", *greedy).stdout.decode().splitlines()
    pieces = [tokenizer.processor.id_to_piece(i) for i in one["ids"]]
    assert lines == [f"{logprob:9.4f}  {piece!r}" for logprob, piece in zip(one["logprobs"], pieces)]
    ids = tokenizer("ROMEO:\n")["input_ids"]
    penalized, free = ([s.tokens[0] for s in generate(model, ids, max_new_tokens=40, repetition_penalty=p)] for p in (1.8, 1))
    (o,) = map(json.loads, sample_py("--json", "--repetition-penalty", "1.8", *greedy, "-n", "40").stdout.splitlines())
    assert o["ids"] == penalized != free
    options = ["-n", "3", "--json", "--dtype", "float32"]
    seeds = sample_py("--batch", tmp_path / "many", "--num-samples", "7", "--seed", "5", *options).stdout  # in two groups
    seeds = [json.loads(line) for line in seeds.splitlines()]
    assert [o["seed"] for o in seeds] == list(range(5, 26))
    (alone,) = map(json.loads, sample_py(seeds[18]["prompt"], "--seed", "23", *options).stdout.splitlines())
    assert alone["ids"] == seeds[18]["ids"] and len({tuple(o["ids"]) for o in seeds}) > 9


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_reads_only_what_is_new_and_answers_as_a_fresh_run(monkeypatch, capsys):
    model, tokenizer = PersimmonForCausalLM.from_pretrained(TINY, "float32"), Tokenizer(TINY)
    questions = ["Who are you, that speak to the king?", "What is your name?", "/reset", "Where is Juliet?"]
    lines, fed = iter(questions), []  # by turn, the ids of each forward pass

    def answer_next(prompt):
        fed.append([])
        return next(lines, "/exit")

    model.model.register_forward_pre_hook(lambda module, args: fed[-1].append(args[0][0].tolist()))
    monkeypatch.setattr("builtins.input", answer_next)
    args = sample_script.parse(["--chat", "--temp", "0", "-n", "30"])
    assert sample_script.chat(model, tokenizer, args, seed=0) == 0
    printed = capsys.readouterr()
    reads = [int(n) for n in re.findall(r"\((\d+) tokens read", printed.err)]
    one, two, three = [turn for turn in fed if turn]
    fed.append([])
    assert reads == [len(turn[0]) for turn in (one, two, three)]  # one pass over what is new
    assert all(len(ids) == 1 for turn in (one, two, three) for ids in turn[1:])  # and one a token
    assert all(tokenizer.end_of_text not in ids for turn in (two, three) for ids in turn)  # it begins a text, no turn
    answers = []

    def fresh(conversation: list[int]) -> str:
        ids = [s.tokens[0] for s in generate(model, torch.tensor([conversation]), max_new_tokens=30)]
        answers.append(tokenizer.decode(ids).split("\n\nhuman:")[0])
        return answers[-1]

    assert one[0] == tokenizer.encode(chat_prompt(questions[:1]))
    first = fresh(one[0])
    # What the cache holds, and then what is new, is the whole conversation: its text, and no more.
    answer = tokenizer.encode(chat_prompt([questions[0], first, questions[1]]))
    whole = sum(one, [])
    while not chat_prompt([questions[0], first, questions[1]]).startswith(tokenizer.decode(whole)):
        whole.pop()
    whole += two[0]
    assert tokenizer.decode(whole) == chat_prompt([questions[0], first, questions[1]])
    assert len(two[0]) < len(answer) - len(one[0]) < len(answer)
    fresh(whole)
    forgotten = tokenizer.encode(chat_prompt([questions[3]]))
    assert forgotten[-len(three[0]) :] == three[0] != forgotten  # "human:" is in the cache
    fresh(forgotten)
    assert printed.out == "".join(f"{answer.lstrip()}\n" for answer in answers)


def test_ids_in_context():
    """An answer keeps the tokens that it was made of, even if the tokenizer would have split it differently."""
    tokenizer = Tokenizer(TINY)
    known_text = "human: Who speaks?\n\nadept: I do"
    spelled = [i for c in known_text for i in tokenizer.encode(c, add_bos=False)]  # letter by letter
    known_ids, text = [tokenizer.end_of_text, *spelled], known_text + "\n\nhuman: And you?\n\nadept:"
    usual = tokenizer.encode(text)
    found = sample_script.ids_in_context(tokenizer, known_ids, known_text, text, usual)
    rest = tokenizer.encode("\n\nhuman: And you?\n\nadept:", add_bos=False)
    assert found == known_ids + rest != usual and tokenizer.decode(found) == text
    assert sample_script.ids_in_context(tokenizer, known_ids, "human: Someone else", text, usual) == usual
    assert sample_script.ids_in_context(tokenizer, [], "", text, usual) == usual


class Terminal:
    """sample.py on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.screen = ""

        def take_terminal():
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches the program

        command = [sys.executable, HERE / "sample.py", *arguments]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal,
                                        env=ON_CPU)  # fmt: skip
        os.close(slave)

    def expect(self, pattern: str) -> str:
        """Read until the pattern appears; return what came before it and drop both from the screen."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.screen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.screen!r}"
            if select.select([self.master], [], [], 1)[0]:
                self.screen += os.read(self.master, 4096).decode(errors="replace")
        before, self.screen = self.screen[: found.start()], self.screen[found.end() :]
        return before

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_chat_in_a_terminal():
    terminal = Terminal("--chat", "--temp", "0", "-n", "400", "--ignore-eos", "--stop", "\n", "--seed", "1")
    terminal.expect("> ")
    terminal.send("Speak, speak.\n")
    assert len(terminal.expect(r"\(\d+ tokens read at [\d.]+ tok/s, \d+ written at [\d.]+ tok/s, stopped by stop\)")) > 5
    terminal.expect("> ")
    terminal.send("What say you, sir?\n")
    terminal.expect("stopped by stop")
    terminal.expect("> ")
    time.sleep(0.5)  # until it waits for a line
    terminal.send("\x03")
    terminal.expect(r"\(/exit leaves\)")
    terminal.send("/reset\n")
    terminal.expect(r"\(forgotten\)")
    terminal.send("/exit\n")
    assert terminal.process.wait(timeout=30) == 0


def test_chat_ctrl_c_stops_the_answer_only():
    terminal = Terminal("--chat", "-n", "900", "--ignore-eos", "--seed", "1", "--stop", "")
    terminal.expect("> ")
    terminal.send("Speak, speak.\n")
    terminal.expect("K[^\x1b]{30}")  # 30 characters after the note about the prompt was wiped
    terminal.send("\x03")
    terminal.expect("stopped by (Ctrl-C|stop)")
    terminal.expect("> ")
    terminal.send("And then?\n")
    terminal.expect("K[^\x1b]{10}")
    terminal.send("\x03")
    terminal.expect("stopped by (Ctrl-C|stop)")
    terminal.expect("> ")
    terminal.send("\x04")  # end of file
    assert terminal.process.wait(timeout=30) == 0


def test_chat_with_a_full_context():
    lines = "Speak, speak.\nWhat is it?\nTell me more of it.\n" + "word " * 200 + "\nAnd now?\n"
    result = sample_py("--chat", "--ctx-size", "90", "-n", "20", "--seed", "1", input=lines.encode())
    error = result.stderr.decode()
    assert result.returncode == 0 and "Traceback" not in error
    assert "(the context of 90 tokens is full: the oldest" in error
    assert re.search(r"\(that is too long: \d+ tokens, and the context is 90\)", error)
    assert error.count("written at") == 4 and error.splitlines()[-1].count("written at") == 1


@pytest.mark.skipif("PERSIMMON_8B_CHAT" not in os.environ, reason="PERSIMMON_8B_CHAT names no folder with Adept's weights")
def test_the_published_answer_of_the_real_chat_model():
    """From transformers' own integration test of adept/persimmon-8b-chat."""
    folder = os.environ["PERSIMMON_8B_CHAT"]
    model, tokenizer = PersimmonForCausalLM.from_pretrained(folder, "bfloat16"), Tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(chat_prompt(["Simply put, the theory of relativity states that?"]))])
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=60)[0, ids.shape[1] :])
    assert answer.strip() == ("The theory of relativity states that the laws of physics are the same for all observers, "
                              "regardless of their relative motion.")  # fmt: skip
    with torch.no_grad():
        means = model(torch.tensor([[1, 306, 4658, 278, 6593, 310, 2834, 338]])).logits.float().mean(-1)
    expected = [-11.4726, -11.1495, -11.2694, -11.2223, -10.9452, -11.0663, -11.0031, -11.1028]
    assert close(means, torch.tensor([expected]), 0.3)  # those were computed in 8 bits


def test_command_line_in_a_terminal():
    """The note about the prompt is wiped before the text appears."""
    terminal = Terminal("-n", "5")
    terminal.expect(r"reading \d+ tokens \.\.\.\r\x1b\[KROMEO:")
    terminal.expect("peak memory")
    assert terminal.process.wait(timeout=30) == 0


# --- run as a script: the benchmark against transformers --------------------------------------------------------------


def with_plain_linears(model: PersimmonForCausalLM) -> PersimmonForCausalLM:
    """A copy of the model for quantize_model to replace the Linear layers of; it shares all weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def two_models(layers: int, vocab_size: int, device: str) -> tuple[PersimmonForCausalLM, transformers.PersimmonForCausalLM]:
    """Ours and transformers', with the same random bfloat16 weights of full width."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    config = PersimmonConfig(num_hidden_layers=layers, vocab_size=vocab_size, bos_token_id=1, eos_token_id=1)
    raw = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "dtype", "torch_dtype")}
    with torch.device(device):
        theirs = transformers.PersimmonForCausalLM._from_config(
            transformers.PersimmonConfig(**raw), dtype=torch.bfloat16).eval()  # fmt: skip
    with torch.device("meta"):
        ours = PersimmonForCausalLM(config).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours, theirs


def gpu_benchmark(layers: int, vocab_size: int, rounds: int) -> None:
    """Time new tokens after contexts of several lengths, and the first one, with our `generate` and transformers'.

    Prints medians over the rounds, in which both take turns: transformers with the cache that it takes by default, and
    last, for a short context, with its static cache, for which it compiles the model.
    """
    ours, theirs = two_models(layers, vocab_size, "cuda")
    theirs.generation_config.eos_token_id = None
    print(f"{torch.cuda.get_device_name()}; full width, {layers} layers, vocabulary {vocab_size}, random weights, bfloat16; "
          f"torch {torch.__version__}, transformers {transformers.__version__}; {rounds} rounds", flush=True)  # fmt: skip

    def our_times(ids: torch.Tensor, n: int = 33) -> tuple[float, float]:
        """Seconds to the first token, and for each one after the second."""
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in generate(ours, ids, max_new_tokens=n, stop_ids=())]
        return times[1] - times[0], (times[-1] - times[2]) / (n - 2)

    def their_times(ids: torch.Tensor, n: int = 33, **options) -> tuple[float, float]:
        seconds = []
        for tokens in (1, n):
            start = time.perf_counter()
            theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                            pad_token_id=0, **options)  # fmt: skip
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds[0], (seconds[1] - seconds[0]) / (n - 1)

    ways = {"persimmon.py": our_times, "transformers": their_times,
            "transformers, static cache": partial(their_times, cache_implementation="static")}  # fmt: skip
    for S, rows, names in ((128, 1, 2), (2048, 1, 2), (8192, 1, 2), (16000, 1, 2), (128, 16, 2), (2048, 16, 2), (128, 1, 3)):
        ids = random_ids(ours.config, rows, S).cuda()
        results = {name: [] for name in [*ways][:names]}
        for n in range(rounds + 1):  # the first round is to warm up
            for name, times in results.items():
                start = time.perf_counter()
                found = ways[name](ids)
                if n > 0:
                    times.append(found)
                elif names == 3:
                    print(f"{name}: warm after {time.perf_counter() - start:.1f} s", flush=True)
        for name, times in results.items():
            first, each = map(statistics.median, zip(*times))
            print(f"{rows:2} x {S:5}  {name:27} first token {1e3 * first:8.1f} ms, then {1e3 * each:7.3f} ms a step, "
                  f"{rows / each:7.1f} tok/s", flush=True)  # fmt: skip


def benchmark(layers: int, vocab_size: int, rounds: int) -> None:
    """Time our model and transformers' in turns, in one process, on the same random bfloat16 weights of full width.

    Prints medians over the rounds, of each of our ways beside transformers' in the same rounds, and how far logits are
    from those of transformers.
    """
    ours, theirs = two_models(layers, vocab_size, "cpu")
    config = ours.config
    down = [block.mlp.dense_4h_to_h for block in ours.model.layers]
    plain = [layer.weight.data for layer in down]
    for layer in down:
        layer.transpose()
    transposed = [layer.weight.data for layer in down]
    quantized = {f"{kind}{f', groups of {g}' if kind == 'int4' else ''}": quantize_model(with_plain_linears(ours), kind, g)
                 for kind, g in (("int8", 128), ("int4", 32), ("int4", 128))}  # fmt: skip
    ids = random_ids(config, rows=1, length=512)
    memory = torch.ones(2**29)  # 2.1 GB
    size = sum(p.nbytes for p in ours.parameters()) - ours.model.embed_tokens.weight.nbytes

    def use(weights: list[torch.Tensor], density: float) -> None:
        for layer, weight in zip(down, weights):
            layer.weight.data = weight
        shift = 0.02 * 64 * statistics.NormalDist().inv_cdf(density)  # of W x with x normalized: 0.02 * sqrt(C) wide
        for block in ours.model.layers:  # the biases are the same tensors in both models
            block.mlp.dense_h_to_4h.bias.fill_(shift)

    def seconds(function) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def decode(S: int, model: PersimmonForCausalLM = ours, n: int = 16) -> float:
        cache = KVCache(config, 1, S + 17 + n, torch.bfloat16, "cpu")
        cache.keys.zero_(), cache.values.zero_(), cache.seek(S)
        model(ids[:, :16], cache=cache, logits_to_keep=1)
        return seconds(lambda: [model(ids[:, i : i + 1], cache=cache, logits_to_keep=1) for i in range(n)]) / n

    def their_decode(n: int = 16) -> float:
        cache = theirs(ids[:, :16], use_cache=True, logits_to_keep=1).past_key_values
        return seconds(
            lambda: [theirs(ids[:, i : i + 1], past_key_values=cache, logits_to_keep=1) for i in range(n)]
        ) / n  # fmt: skip

    def prefill(model: PersimmonForCausalLM = ours) -> float:
        cache = KVCache(config, 1, 600, torch.bfloat16, "cpu")
        return seconds(lambda: model(ids, cache=cache, logits_to_keep=1))

    ways = {  # name: (weights of the sparse layers, density, what is timed, what to compare with)
        "transformers, decode": (plain, 0.5, their_decode, None),
        "decode, half zeros": (transposed, 0.5, lambda: decode(0), "transformers, decode"),
        "decode, 90% zeros": (transposed, 0.1, lambda: decode(0), "transformers, decode"),
        "decode, all weights read": (plain, 0.5, lambda: decode(0), "transformers, decode"),
        "decode after 8192, half zeros": (transposed, 0.5, lambda: decode(8192), "decode, half zeros"),
        "transformers, prompt of 512": (plain, 0.5, lambda: seconds(lambda: theirs(ids, logits_to_keep=1)), None),
        "prompt of 512": (transposed, 0.5, prefill, "transformers, prompt of 512"),
    }
    for name, model in quantized.items():
        for way, function, other in (("decode", partial(decode, 0, model), "transformers, decode"),
                                     ("prompt of 512", partial(prefill, model), "prompt of 512")):  # fmt: skip
            ways[f"{name}, {way}"] = transposed, 0.5, function, other
    times: dict[str, list[float]] = {way: [] for way in ways}
    reads = []
    for n in range(rounds + 1):  # the first round is to warm up
        for way, (weights, density, function, _) in ways.items():
            print(f"round {n} of {rounds}: {way}", end=" \x1b[K\r", file=sys.stderr, flush=True)
            use(weights, density)
            reads.append(memory.nbytes / 1e9 / min(seconds(memory.sum), seconds(memory.view(torch.int32).amax)))
            times[way].append(function())
    median = {way: statistics.median(values[1:]) for way, values in times.items()}
    print(f"full width, {layers} layers, vocabulary {vocab_size}, random weights, bfloat16, {torch.get_num_threads()} "
          f"threads; torch {torch.__version__}, transformers {transformers.__version__}; {rounds} rounds\n"
          f"{size / 1e9:.2f} GB of weights for a token; memory was read at {statistics.median(reads):.1f} GB/s (median; "
          f"best {max(reads):.1f})\n")  # fmt: skip
    for way, (*_, other) in ways.items():
        ratios = [b / a for a, b in zip(times[way][1:], times.get(other, [])[1:])]
        ratio = f"   {statistics.median(ratios):5.2f} x the speed of: {other}" if ratios else ""
        print(f"{way:34} {1e3 * median[way]:8.1f} ms{ratio}")
    full = size / median["decode, all weights read"] / 1e9
    print(f"\nwith all weights read: {full:.1f} GB/s, {full / statistics.median(reads):.0%} of the median read")
    use(transposed, 0.5)
    cache = KVCache(config, 1, 300, torch.bfloat16, "cpu")
    a = torch.cat([ours(ids[:, i : i + 1], cache=cache).logits for i in range(48)], 1).float()
    b, c = theirs(ids[:, :48]).logits.float(), ours(ids[:, :48]).logits.float()
    print(f"logits (their standard deviation is {b.std():.3f}), root mean square of what differs from transformers: "
          f"{(a - b).square().mean().sqrt():.4f} token by token, {(c - b).square().mean().sqrt():.4f} in one go")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=benchmark.__doc__.splitlines()[0] + " The tests: pytest.")
    parser.add_argument("--layers", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32768, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    args = vars(parser.parse_args())
    (gpu_benchmark if args.pop("device") == "cuda" else benchmark)(**args)
