"""Tiny models of text and images, of which fastkd reads the text."""

from __future__ import annotations

from typing import Any

import torch

_TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "patch_size": 4}
_QWEN_IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"text_config": {**_TEXT, "rope_parameters": _ROPE}, "vision_config": _QWEN_VISION, **_QWEN_IDS},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "text_config": {**_TEXT, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
            "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_QWEN_IDS,
        },
    ),
    "llava": (
        "Llava",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_id": 90,
        },
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": {"model_type": "mistral", **_TEXT},
            "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8},
            "image_token_index": 90,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "text_config": {**_TEXT, "sliding_window": 8, "query_pre_attn_scalar": 8},
            "vision_config": {"model_type": "siglip_vision_model", **_VISION},
            "image_token_index": 90,
            "mm_tokens_per_image": 4,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
    ),
}
"""By model type: what the names of its classes begin with, and its configuration's settings."""


def multimodal(name: str, seed: int = 0) -> Any:
    """A model for text from text and images, of two layers."""
    import transformers

    prefix, settings = MODELS[name]
    torch.manual_seed(seed)
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(getattr(transformers, f"{prefix}Config")(**settings)).eval()
