"""Tiny random bases of many families, with the embedded base's tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch
from helpers import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

TOKENIZER = ROOT / "loop" / "embedded" / "base"
COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0**i for i in range(8)],
    "original_max_position_embeddings": 256,
    "factor": 8.0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "llama_4_scaling_beta": 0.5,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
WIDE, NARROW = {"sliding_window": 4096}, {"sliding_window": 128}
FULL = {"layer_types": ["full_attention", "full_attention"]}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}

# name: (model_type, what differs from COMMON; ...: the key is left out)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "biogpt": ("biogpt", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "cohere2": ("cohere2", {**WIDE, "layer_types": ["sliding_attention", "full_attention"]}),
    "deepseek_v2": ("deepseek_v2", MLA),
    "deepseek_v3": ("deepseek_v3", MLA),
    "doge": ("doge", {}),
    "dots1": ("dots1", {**MLA, "head_dim": 16, "n_shared_experts": 1}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2}),
    "exaone4": ("exaone4", {"sliding_window": None, **FULL}),
    "falcon": ("falcon", {"alibi": False}),
    "falcon_h1": ("falcon_h1", {}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {**GEMMA, **WIDE}),
    "gemma2, no soft caps": ("gemma2", {**GEMMA, **WIDE, "attn_logit_softcapping": None}),
    "gemma3_text": ("gemma3_text", {**GEMMA, **WIDE}),
    "gemma3_text, narrow window": ("gemma3_text", {**GEMMA, **NARROW}),
    "gemma3n_text": (
        "gemma3n_text",
        {"head_dim": 16, "num_kv_shared_layers": 0, **FULL, **WIDE, "laurel_rank": 8}
        | {"vocab_size_per_layer_input": 2048, "hidden_size_per_layer_input": 16}
        | {"activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [96, 96]},
    ),
    "gemma4_text": ("gemma4_text", {"head_dim": 16, **WIDE}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "glm4_moe": ("glm4_moe", {**MLA, "head_dim": 16}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048}),
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": ..., "rotary_pct": 0.25}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {"num_key_value_heads": ...}),
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "granite": ("granite", {"attention_multiplier": 0.1, "logits_scaling": 2.0}),
    "granitemoehybrid, attention alone": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * 2, "num_local_experts": 0, "mamba_n_heads": 8}
        | {"shared_intermediate_size": 96},
    ),
    "gptj": ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("helium", {"head_dim": 16}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 16}),
    "jamba": ("jamba", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "jetmoe": ("jetmoe", {"num_local_experts": 2, "num_experts_per_tok": 1, "kv_channels": 16}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "llama": ("llama", {}),
    "llama, dynamic NTK": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 1024}),
    "llama, odd heads": (
        "llama",
        {"hidden_size": 60, "head_dim": 20, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 1}),
    "minimax": (
        "minimax",
        {"num_local_experts": 2, "head_dim": 16, "layer_types": ["linear_attention"] * 2},
    ),
    "llama4_text": (
        "llama4_text",
        {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96}
        | {"no_rope_layers": [1, 0], "moe_layers": [], "attention_chunk_size": 4096},
    ),
    "minicpm3": ("minicpm3", {**MLA}),
    "minimax_m2": (
        "minimax_m2",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "ministral3": ("ministral3", {"head_dim": 16, "sliding_window": None, "rope_parameters": YARN}),
    "ministral": ("ministral", {"head_dim": 16, **WIDE}),
    "mistral": ("mistral", {**WIDE}),
    "mistral, narrow window": ("mistral", {**NARROW}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "nanochat": ("nanochat", {}),
    "nemotron": ("nemotron", {"head_dim": 16}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**WIDE}),
    "olmoe": ("olmoe", EXPERTS),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "persimmon": ("persimmon", {"num_key_value_heads": ...}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phi3, longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
    ),
    "phimoe": ("phimoe", {"num_local_experts": 2, "num_experts_per_tok": 1, **WIDE}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16}),
    "qwen3_next": ("qwen3_next", {**EXPERTS, "head_dim": 16}),
    "recurrent_gemma": ("recurrent_gemma", {"head_dim": 16}),
    "seed_oss": ("seed_oss", {"head_dim": 16, "attention_dropout": 0.0}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {**WIDE, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
    "gemma3 (with images)": ("gemma3", {"text_config": ("gemma3_text", {**GEMMA, **WIDE})}),
    "llava (with images)": ("llava", {"text_config": ("llama", {})}),
    "mistral3 (with images)": ("mistral3", {"text_config": ("mistral", {})}),
    "qwen2_5_vl (with images)": ("qwen2_5_vl", {"text_config": ("qwen2", {})}),
}
# Of every kind one: what the quick test runs.
QUICK = (
    "llama",
    "qwen3",
    "gemma2",
    "mistral, narrow window",
    "phi3, longrope",
    "mixtral",
    "opt",
    "lfm2",
    "xglm",
    "gpt_neox",
    "llava (with images)",
)


def build_base(name: str, folder: Path) -> None:
    """Writes the base to the folder. Families that are refused by their configuration have no
    weights there.
    """
    kind, settings = FAMILIES[name]
    if "text_config" in settings:
        text_kind, text = settings["text_config"]
        text_config = AutoConfig.for_model(text_kind, **{**COMMON, **text}).to_dict()
        values = {"text_config": text_config, "vision_config": {}}
        if kind == "gemma3":
            values["vision_config"] = {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            }
            values["mm_tokens_per_image"] = 4
    else:
        values = {k: v for k, v in {**COMMON, **settings}.items() if v is not ...}
    torch.manual_seed(0)
    model_config = AutoConfig.for_model(kind, **values)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    except (ValueError, TypeError, ImportError, AttributeError):
        model_config.save_pretrained(folder)
    else:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / file, folder / file)
