"""Batches of Hugging Face's own, with its own models; skipped where `transformers` is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import prunelab as pl

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore")]


def language_model() -> nn.Module:
    torch.manual_seed(0)
    plain = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8, **plain)
    return transformers.GPT2LMHeadModel(config).eval()


def classifier() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes)).eval()


def batches(words: bool) -> list[Any]:
    torch.manual_seed(1)
    out = []
    for size, padding in ((4, 2), (3, 0)):
        ids, mask = torch.randint(20, (size, 6)), torch.ones(size, 6, dtype=torch.int64)
        mask[0, 6 - padding :] = 0
        labels = ids.masked_fill(mask == 0, -100) if words else torch.randint(2, (size,))
        out.append(transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": labels}))
    return out


@pytest.mark.parametrize("words", [True, False], ids=["GPT-2", "BERT"])
def test_encodings_with_labels_are_batches(words):
    model, given = language_model() if words else classifier(), batches(words)
    graph = pl.trace(model, {name: given[0][name] for name in ("input_ids", "attention_mask")})
    for name, options in (("obd", {}), ("obd", {"fisher": "mc"}), ("kron_obs", {}), ("gate", {"curvature": "mc"})):
        scores = pl.criteria.get(name, **options)(graph, given)
        assert all(scores[group].isfinite().all() for group in graph.groups)
    gradients, count = 0, 0.0
    weight = model.transformer.h[0].mlp.c_fc.weight if words else model.bert.encoder.layer[0].intermediate.dense.weight
    for batch in given:
        used = float((batch["labels"][:, 1:] != -100).sum()) if words else float(len(batch["labels"]))
        gradients = gradients + used * torch.autograd.grad(model(**batch).loss, weight)[0]
        count += used
    name = next(name for name, value in model.named_parameters() if value is weight)
    found = pl.collect(graph, given, {"grad"}).gradient[name]
    torch.testing.assert_close(found, gradients / count, rtol=1e-4, atol=1e-6)


def test_experts_that_share_one_tensor_become_narrower():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=64, num_hidden_layers=2, num_local_experts=4, **sizes)
    model, tokens = transformers.MixtralForCausalLM(config).eval(), torch.arange(20).view(2, 10)
    graph = pl.trace(model, {"input_ids": tokens})
    if "grouped_mm" not in {op.name.lstrip("_") for op in graph.tape}:
        pytest.skip("this PyTorch has no grouped products")
    scores = pl.criteria.get("magnitude")(graph)
    with pytest.raises(pl.PlanError, match="round_to"):
        pl.apply(model, pl.plan(scores, params=0.7), backend="module")
    plan = pl.plan(scores, ratio=0.25, scope="layer", round_to=4)
    cut, silent = pl.apply(model, plan, backend="module"), pl.masked(model, plan)
    widths = [layer.mlp.experts.down_proj.shape for layer in cut.model.layers]
    assert any(shape[2] < 48 for shape in widths) and all(shape[1] < 32 for shape in widths)
    with torch.no_grad():
        torch.testing.assert_close(cut(tokens[:, :7]).logits, silent(tokens[:, :7]).logits, rtol=1e-4, atol=1e-5)
    assert cut.generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, 12)
