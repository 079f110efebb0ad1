"""Models of transformers for sound, for several kinds of input at once, and for time series."""

from typing import Any

import torch

from .entry import VOCABULARY, Entry, Part, keywords, normal, ones, padded, tokens, uniform
from .transformers_models import DECODER, ENCODER, GROUPED, WIDTH, model
from .transformers_text import BART, GENERATE
from .transformers_vision import SWIN, VIT

SOUND = keywords(normal("input_values", 4000))
PIXELS = normal("pixel_values", 3, 32, 32)

WAVES: dict[str, Any] = {
    **WIDTH,
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 4, 4],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
    # It draws from NumPy's generator.
    "apply_spec_augment": False,
}
WHISPER: dict[str, Any] = {
    **BART,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "decoder_start_token_id": 1,
}
SERIES: dict[str, Any] = {
    "prediction_length": 4,
    "context_length": 12,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
    "d_model": 32,
}
IMAGE_TOKEN = VOCABULARY - 1


def entries() -> list[Entry]:
    """All of them."""
    return [*sound(), *mixed(), *series()]


def sound() -> list[Entry]:
    """Models that read waves or spectrograms."""
    classify, ctc = "ForSequenceClassification", "ForCTC"
    return [
        model("Wav2Vec2", classify, SOUND, WAVES),
        model("Wav2Vec2", ctc, SOUND, WAVES),
        model("Hubert", classify, SOUND, WAVES),
        model("Hubert", ctc, SOUND, WAVES),
        model("WavLM", classify, SOUND, {**WAVES, "num_buckets": 32, "max_bucket_distance": 80}),
        model("SEW", classify, SOUND, WAVES),
        model(
            "UniSpeechSat",
            "ForAudioFrameClassification",
            SOUND,
            {**WAVES, "num_codevectors_per_group": 8, "codevector_dim": 32},
        ),
        model(
            "AST",
            "ForAudioClassification",
            keywords(normal("input_values", 32, 16)),
            {
                **WIDTH,
                "patch_size": 8,
                "frequency_stride": 4,
                "time_stride": 4,
                "max_length": 32,
                "num_mel_bins": 16,
            },
        ),
        model(
            "Whisper",
            "ForAudioClassification",
            keywords(normal("input_features", 16, 100)),
            {**WHISPER, "classifier_proj_size": 32},
        ),
        model(
            "Whisper",
            GENERATE,
            keywords(normal("input_features", 16, 100), tokens("decoder_input_ids", 5)),
            {**WHISPER, "max_target_positions": 32},
        ),
        model(
            "Speech2Text",
            GENERATE,
            keywords(
                normal("input_features", 64, 16),
                ones("attention_mask", 64),
                tokens("decoder_input_ids", 5),
            ),
            {
                **BART,
                "input_feat_per_channel": 16,
                "conv_channels": 32,
                "max_source_positions": 64,
                "max_target_positions": 32,
            },
        ),
    ]


def mixed() -> list[Entry]:
    """Models that read a text and something else."""
    clip: dict[str, Any] = {
        "text_config": {**DECODER, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1},
        "vision_config": VIT,
        "projection_dim": 32,
    }
    return [
        model("CLIP", "Model", keywords(padded(), PIXELS), clip),
        model(
            "Siglip",
            "Model",
            keywords(padded(), PIXELS),
            {"text_config": {**DECODER, "projection_size": 64}, "vision_config": VIT},
        ),
        model("CLIPSeg", "ForImageSegmentation", keywords(padded(), PIXELS), clip_seg(clip)),
        model(
            "Blip",
            "Model",
            keywords(padded(), PIXELS),
            {
                "text_config": {**DECODER, "encoder_hidden_size": 64},
                "vision_config": VIT,
                "projection_dim": 32,
            },
        ),
        model(
            "Blip",
            "ForImageTextRetrieval",
            keywords(padded(), PIXELS),
            {
                "text_config": {**DECODER, "encoder_hidden_size": 64},
                "vision_config": VIT,
                "projection_dim": 32,
                "image_text_hidden_size": 32,
            },
        ),
        model(
            "Vilt",
            "ForQuestionAnswering",
            keywords(padded(), PIXELS, ones("pixel_mask", 32, 32)),
            {**ENCODER, "image_size": 32, "patch_size": 8, "num_labels": 5},
        ),
        model(
            "Lxmert",
            "ForQuestionAnswering",
            keywords(padded(), normal("visual_feats", 6, 16), uniform("visual_pos", 6, 4)),
            {
                **{name: value for name, value in ENCODER.items() if name != "num_hidden_layers"},
                "l_layers": 2,
                "x_layers": 2,
                "r_layers": 1,
                "visual_feat_dim": 16,
                "num_qa_labels": 10,
            },
        ),
        model(
            "LayoutLM",
            "ForTokenClassification",
            keywords(padded(), boxes("bbox", 12)),
            {**ENCODER, "max_2d_position_embeddings": 128},
        ),
        model(
            "Clap",
            "Model",
            keywords(padded(), normal("input_features", 1, 64, 16)),
            {
                "text_config": {**DECODER, "projection_dim": 32},
                "audio_config": {
                    "num_mel_bins": 16,
                    "spec_size": 32,
                    "window_size": 4,
                    "patch_embeds_hidden_size": 16,
                    "hidden_size": 32,
                    "depths": [1, 1],
                    "num_attention_heads": [2, 2],
                    "num_hidden_layers": 2,
                    "projection_dim": 32,
                },
                "projection_dim": 32,
            },
        ),
        model(
            "OwlViT",
            "ForObjectDetection",
            keywords(padded(), PIXELS),
            {"text_config": DECODER, "vision_config": VIT, "projection_dim": 64},
        ),
        model(
            "Git",
            "ForCausalLM",
            keywords(padded(), PIXELS),
            {**DECODER, "vision_config": VIT},
        ),
        model(
            "Llava",
            GENERATE,
            keywords(captions(16, images=16), PIXELS),
            {
                "text_config": {"model_type": "llama", **GROUPED},
                "vision_config": {"model_type": "clip_vision_model", **VIT},
                "image_token_id": IMAGE_TOKEN,
                "image_seq_length": 16,
            },
        ),
        model(
            "VisionEncoderDecoder",
            "Model",
            keywords(normal("pixel_values", 3, 64, 64), tokens("decoder_input_ids", 8)),
            {
                "encoder": {"model_type": "swin", **SWIN},
                "decoder": {
                    "model_type": "bert",
                    **ENCODER,
                    "is_decoder": True,
                    "add_cross_attention": True,
                },
                "pad_token_id": 0,
                "decoder_start_token_id": 1,
            },
        ),
    ]


def clip_seg(clip: dict[str, Any]) -> dict[str, Any]:
    """The settings of CLIPSeg, which reads some layers of a CLIP."""
    return {
        **clip,
        "extract_layers": [1, 2, 3],
        "reduce_dim": 16,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }


def boxes(name: str, count: int) -> Part:
    """The corners of each word's box, on a page that is 128 wide and high."""

    def part(rows: int, generator: torch.Generator) -> dict[str, Any]:
        corners = torch.randint(0, 128, (rows, count, 2, 2), generator=generator)
        return {name: corners.sort(dim=2).values.flatten(2)}

    return part


def captions(length: int, images: int) -> Part:
    """Texts that begin with the places for an image's patches.

    Args:
        length: of the text behind them, in tokens.
        images: the patches of an image.
    """

    def part(rows: int, generator: torch.Generator) -> dict[str, Any]:
        text = padded(length)(rows, generator)
        # No word may look like a patch.
        ids = text["input_ids"].clamp(max=IMAGE_TOKEN - 1)
        places = torch.full((rows, images), IMAGE_TOKEN)
        return {
            "input_ids": torch.cat([places, ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(places), text["attention_mask"]], dim=1),
        }

    return part


def series() -> list[Entry]:
    """Models that forecast."""
    patches: dict[str, Any] = {
        "num_input_channels": 3,
        "context_length": 32,
        "prediction_length": 8,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 32,
        "ffn_dim": 64,
    }
    past = keywords(normal("past_values", 32, 3))
    layers = {
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
    }
    forecast = keywords(
        normal("past_values", 14),
        normal("past_time_features", 14, 1),
        ones("past_observed_mask", 14),
        normal("future_values", 4),
        normal("future_time_features", 4, 1),
    )
    return [
        model("PatchTST", "ForPrediction", past, patches),
        model(
            "PatchTST",
            "ForClassification",
            past,
            {**patches, "num_targets": 4, "use_cls_token": True},
        ),
        model("PatchTSMixer", "ForPrediction", past, patches),
        model("Informer", "ForPrediction", forecast, {**SERIES, **layers}),
        model("TimeSeriesTransformer", "ForPrediction", forecast, {**SERIES, **layers}),
        model("Autoformer", "ForPrediction", forecast, {**SERIES, **layers}),
    ]
