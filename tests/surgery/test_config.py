"""Configurations follow a cut where the class can build what is left: saved, loaded, the same outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import prunelab as pl

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(20).view(2, 10)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def causal(kind: str, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


def small(model: nn.Module, **options: Any) -> nn.Module:
    """Cut a quarter of every group but the widths of heads, by which scores are scaled and positions are rotated."""
    graph = pl.trace(model, {"input_ids": TOKENS})
    wide = ("embed", "wte", "mlp", "heads")
    narrow = [group.name for group in graph.groups if not any(word in group.name for word in wide)]
    narrow += [group.name for group in graph.groups if "head_width" in group.name]
    scores = pl.criteria.get("magnitude")(graph)
    plan = pl.plan(scores, **{"ratio": 0.25, "scope": "layer", "ignore": narrow, **options})
    return pl.apply(model, plan, backend="module")


def numbers(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    return {key: value for key, value in config.to_dict().items() if type(value) is int}


@pytest.mark.parametrize(
    ("kind", "sizes", "changed"),
    [
        ("Llama", SIZES, {"hidden_size": 24, "intermediate_size": 36}),
        (
            "Llama",
            {**SIZES, "num_key_value_heads": 4, "tie_word_embeddings": True},
            {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3},
        ),
        ("Qwen2", SIZES, {"hidden_size": 24, "intermediate_size": 36, "head_dim": 8}),
        ("GPT2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, {"n_embd": 24, "n_head": 3}),
    ],
    ids=["grouped heads", "tied embeddings", "a number that the class worked out", "other names"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_saved_is_loaded_without_prunelab(kind, sizes, changed, dtype, tmp_path):
    causal(kind, **sizes).to(dtype).save_pretrained(tmp_path / "whole")  # in its own type, with buffers in theirs
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=dtype).eval()
    before = numbers(model)
    state = torch.get_rng_state()
    cut = small(model)
    assert torch.equal(torch.get_rng_state(), state)
    now = numbers(cut)
    assert {key: value for key, value in now.items() if before.get(key) != value} == changed
    assert numbers(model) == before
    cut.save_pretrained(tmp_path / "cut")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=dtype).eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, cut(TOKENS).logits)


def test_layers_of_several_widths_leave_the_configuration_alone():
    model = causal("Llama", **SIZES)
    cut = small(model, scope="global", ratio=0.3)
    widths = {layer.mlp.gate_proj.out_features for layer in cut.model.layers}
    assert len(widths) > 1 and cut.config.intermediate_size == SIZES["intermediate_size"]


def test_a_buffer_that_the_class_would_compute_again_is_compared_by_value():
    cut = small(causal("Gemma", **SIZES, head_dim=8))  # it multiplies embeddings by the root of their width
    assert cut.config.hidden_size == SIZES["hidden_size"]


def test_narrower_heads_are_not_those_of_a_model_built_with_them(tmp_path):
    model = causal("Llama", **SIZES)
    graph = pl.trace(model, {"input_ids": TOKENS})
    narrower = {group.name: 0.5 if "q_proj:head_width" in group.name else 0.0 for group in graph.groups}
    plan = pl.plan(pl.criteria.get("magnitude")(graph), ratio=0.1, scope="layer", overrides=narrower)
    cut = pl.apply(model, plan, backend="module")
    assert plan.removed and cut.model.layers[0].self_attn.q_proj.out_features == 16
    cut.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):  # it would turn them by other angles
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
