"""Models of diffusers, segmentation-models-pytorch, open_clip and sentence-transformers."""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .entry import (
    VOCABULARY,
    Batch,
    Entry,
    Inputs,
    Part,
    integers,
    keywords,
    normal,
    padded,
    positional,
)
from .transformers_models import ENCODER

LATENT = normal("sample", 4, 16, 16)
STEP = integers("timestep", 0, 1000)
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
AUTOENCODER: dict[str, Any] = {
    **TWO_LEVELS,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "sample_size": 32,
}


def diffusers() -> list[Entry]:
    """Denoisers and autoencoders."""
    words = normal("encoder_hidden_states", 6, 32)
    conditional: dict[str, Any] = {
        **TWO_LEVELS,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    }
    return [
        _diffuser(
            "UNet2DConditionModel",
            keywords(LATENT, STEP, words),
            {
                **conditional,
                "sample_size": 16,
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            },
        ),
        _diffuser(
            "UNet2DModel",
            keywords(normal("sample", 3, 16, 16), STEP),
            {
                **TWO_LEVELS,
                "sample_size": 16,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": 8,
            },
        ),
        _diffuser(
            "ControlNetModel",
            keywords(LATENT, STEP, words, normal("controlnet_cond", 3, 128, 128)),
            {**conditional, "conditioning_embedding_out_channels": (8, 16, 16, 32)},
        ),
        _diffuser("AutoencoderKL", keywords(normal("sample", 3, 32, 32)), AUTOENCODER),
        _diffuser("VQModel", keywords(normal("sample", 3, 32, 32)), AUTOENCODER),
        _diffuser(
            "DiTTransformer2DModel",
            keywords(normal("hidden_states", 4, 8, 8), STEP, integers("class_labels", 0, 10)),
            {
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "num_layers": 3,
                "norm_num_groups": 8,
                "sample_size": 8,
                "num_embeds_ada_norm": 10,
            },
        ),
        _diffuser(
            "PixArtTransformer2DModel",
            keywords(normal("hidden_states", 4, 8, 8), words, STEP),
            {
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "num_layers": 3,
                "norm_num_groups": 8,
                "sample_size": 8,
                "cross_attention_dim": 64,
                "caption_channels": 32,
                "use_additional_conditions": False,
            },
        ),
        _diffuser(
            "SD3Transformer2DModel",
            keywords(
                normal("hidden_states", 4, 8, 8), words, normal("pooled_projections", 16), STEP
            ),
            {
                "sample_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 3,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": 32,
                "caption_projection_dim": 64,
                "pooled_projection_dim": 16,
                "pos_embed_max_size": 8,
            },
        ),
        _diffuser(
            "FluxTransformer2DModel",
            keywords(
                normal("hidden_states", 16, 16),
                words,
                normal("pooled_projections", 16),
                STEP,
                _places("img_ids", 4, 4),
                _places("txt_ids", 6, 1),
            ),
            {
                "in_channels": 16,
                "num_layers": 2,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 16,
                "axes_dims_rope": (4, 6, 6),
            },
        ),
    ]


def _diffuser(name: str, inputs: Inputs, settings: dict[str, Any]) -> Entry:
    return Entry(name, "diffusers", _builder("diffusers", name, settings), inputs)


def _builder(library: str, name: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        built: nn.Module = getattr(importlib.import_module(library), name)(**settings)
        return built

    return build


def _places(name: str, height: int, width: int) -> Part:
    """Where the tokens of a grid are: the same for all rows, so without a dimension for them."""

    def part(rows: int, generator: torch.Generator) -> dict[str, Any]:
        down, along = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return {name: torch.stack([torch.zeros_like(down), down, along], dim=2).flatten(0, 1)}

    return part


def segmentation_models() -> list[Entry]:
    """Decoders upon encoders of other libraries."""
    library = "segmentation_models_pytorch"
    made = {
        "Unet": "resnet18",
        "UnetPlusPlus": "resnet18",
        "MAnet": "resnet18",
        "Linknet": "resnet18",
        "FPN": "mobilenet_v2",
        "PSPNet": "resnet18",
        "PAN": "resnet18",
        "DeepLabV3": "mobilenet_v2",
        "DeepLabV3Plus": "resnet18",
        "UPerNet": "resnet18",
        "Segformer": "mit_b0",
    }
    return [
        Entry(
            f"segmentation-models-pytorch: {name} on {encoder}",
            "segmentation-models-pytorch",
            _builder(
                library, name, {"encoder_name": encoder, "encoder_weights": None, "classes": 3}
            ),
            # PAN halves what the encoder gives three times.
            positional(normal("x", 3, 128, 128) if name == "PAN" else normal("x", 3, 64, 64)),
        )
        for name, encoder in made.items()
    ]


def open_clip() -> list[Entry]:
    """Pairs of an image encoder and a text encoder."""
    vision = {"layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": VOCABULARY, "width": 64, "heads": 4, "layers": 3}
    convolutional = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16, "image_size": 32}
    inputs = keywords(normal("image", 3, 32, 32), _text("text", 12))

    def clip(tower: dict[str, Any]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            library: Any = importlib.import_module("open_clip.model")
            built: nn.Module = library.CLIP(
                32, library.CLIPVisionCfg(**tower), library.CLIPTextCfg(**text)
            )
            return built

        return build

    def coca() -> Any:
        library: Any = importlib.import_module("open_clip.coca_model")
        built: Any = library.CoCa(
            64,
            library.MultimodalCfg(**text),
            library.CLIPTextCfg(**{**text, "embed_cls": True, "output_tokens": True}),
            library.CLIPVisionCfg(
                **vision,
                attentional_pool=True,
                attn_pooler_queries=8,
                attn_pooler_heads=4,
                output_tokens=True,
            ),
        )
        # The library leaves what was in the memory before.
        nn.init.normal_(built.text_decoder.text_projection, std=0.1)
        return built

    return [
        Entry("open_clip: CLIP", "open_clip", clip(vision), inputs),
        Entry("open_clip: CLIP with a ResNet", "open_clip", clip(convolutional), inputs),
        Entry("open_clip: CoCa", "open_clip", coca, inputs),
    ]


def _text(name: str, length: int) -> Part:
    """Texts alone, without a mask."""

    def part(rows: int, generator: torch.Generator) -> dict[str, Any]:
        return {name: padded(length)(rows, generator)["input_ids"]}

    return part


def sentence_transformers() -> list[Entry]:
    """A text encoder, a mean over its tokens, and a layer behind it."""

    def build() -> nn.Module:
        transformers: Any = importlib.import_module("transformers")
        library: Any = importlib.import_module("sentence_transformers")
        modules: Any = importlib.import_module("sentence_transformers.models")
        with tempfile.TemporaryDirectory() as folder:
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
            words += [f"word{number}" for number in range(len(words), VOCABULARY)]
            vocabulary = Path(folder, "vocab.txt")
            vocabulary.write_text("\n".join(words))
            transformers.BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
            transformers.BertModel(transformers.BertConfig(**ENCODER)).save_pretrained(folder)
            encoder = modules.Transformer(folder)
        built: nn.Module = library.SentenceTransformer(
            modules=[encoder, modules.Pooling(64), modules.Dense(64, 16)], device="cpu"
        )
        return built

    def inputs(rows: int, seed: int) -> Batch:
        _, features = keywords(padded())(rows, seed)
        return (features,), {}

    name = "sentence-transformers: BERT, mean, dense"
    return [Entry(name, "sentence-transformers", build, inputs)]
