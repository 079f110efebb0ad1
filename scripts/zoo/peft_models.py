"""Models whose weights PEFT froze, with its adapters."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from .entry import Entry, Inputs
from .transformers_text import entries as text_entries
from .transformers_vision import entries as vision_entries

CAUSAL = {"task_type": "CAUSAL_LM"}
CLASSIFIER = {"task_type": "SEQ_CLS"}


def frozen_by_peft(model: nn.Module, share: float) -> set[str]:
    """The names of the parameters that PEFT froze, whatever the share.

    It knows them by their names: someone may have thawed or frozen others since.
    """
    kept = ("lora_", "ia3_", "prompt_encoder.", "modules_to_save.", "adaption_", "vera_")
    return {name for name, _ in model.named_parameters() if not any(part in name for part in kept)}


def entries() -> list[Entry]:
    """All of them."""
    queries = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    return [
        entry(
            "LoRA on Llama's upper layers",
            "LlamaForCausalLM",
            "LoraConfig",
            {**CAUSAL, **queries, "layers_to_transform": [2, 3]},
        ),
        entry("LoRA on Llama", "LlamaForCausalLM", "LoraConfig", {**CAUSAL, **queries}),
        entry(
            "DoRA on Llama's upper layers",
            "LlamaForCausalLM",
            "LoraConfig",
            {**CAUSAL, **queries, "layers_to_transform": [2, 3], "use_dora": True},
        ),
        entry(
            "AdaLoRA on Llama",
            "LlamaForCausalLM",
            "AdaLoraConfig",
            {**CAUSAL, "init_r": 4, "target_r": 2, "total_step": 100, "target_modules": ["q_proj"]},
        ),
        entry(
            "IA3 on Llama",
            "LlamaForCausalLM",
            "IA3Config",
            {
                **CAUSAL,
                "target_modules": ["k_proj", "v_proj", "down_proj"],
                "feedforward_modules": ["down_proj"],
            },
        ),
        entry(
            "prefix tuning of Llama",
            "LlamaForCausalLM",
            "PrefixTuningConfig",
            {**CAUSAL, "num_virtual_tokens": 4},
        ),
        entry(
            "prompt tuning of Llama",
            "LlamaForCausalLM",
            "PromptTuningConfig",
            {**CAUSAL, "num_virtual_tokens": 4},
        ),
        entry(
            "prompt tuning of BERT",
            "BertForSequenceClassification",
            "PromptTuningConfig",
            {**CLASSIFIER, "num_virtual_tokens": 4},
        ),
        entry(
            "LoRA on BERT",
            "BertForSequenceClassification",
            "LoraConfig",
            {**CLASSIFIER, "r": 4, "target_modules": ["query", "value"]},
        ),
        entry(
            "LoRA on ViT's upper layers",
            "ViTForImageClassification",
            "LoraConfig",
            {
                "r": 4,
                "target_modules": r".*\.(2|3)\..*\.(query|value|q_proj|v_proj)",
                "modules_to_save": ["classifier"],
            },
        ),
        entry(
            "LoRA on ConvNext's last stage",
            "ConvNextForImageClassification",
            "LoraConfig",
            {
                "r": 4,
                "target_modules": r".*stages\.3\..*pwconv\d",
                "modules_to_save": ["classifier"],
            },
        ),
    ]


def entry(name: str, base: str, config: str, settings: dict[str, Any]) -> Entry:
    """The entry of a model with adapters.

    Args:
        name: of the entry, behind "peft: ".
        base: the model's class in transformers, which has an entry itself.
        config: the class of PEFT's configuration.
        settings: of PEFT's configuration.
    """
    build_base, inputs = _base(base)

    def build() -> nn.Module:
        peft: Any = importlib.import_module("peft")
        built: nn.Module = peft.get_peft_model(build_base(), getattr(peft, config)(**settings))
        return built

    return Entry(f"peft: {name}", "peft", build, inputs, frozen=frozen_by_peft)


def _base(name: str) -> tuple[Callable[[], nn.Module], Inputs]:
    for entry in (*text_entries(), *vision_entries()):
        if entry.name == name:
            return entry.build, entry.inputs
    raise KeyError(name)
