"""Language models of transformers: encoders, decoders, pairs of both, mixtures of experts, RNNs."""

from typing import Any

from .entry import VOCABULARY, Entry, keywords, padded, tokens
from .transformers_models import DECODER, ENCODER, GROUPED, WIDTH, model

TEXT = keywords(padded())
PAIR = keywords(padded(), tokens("decoder_input_ids", 5))
CLASSIFY, TAG, ANSWER = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
CAUSAL, GENERATE = "ForCausalLM", "ForConditionalGeneration"

BART: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}
MAMBA: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "state_size": 8,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def entries() -> list[Entry]:
    """All of them."""
    return [*encoders(), *decoders(), *pairs(), *mixtures(), *recurrent()]


def encoders() -> list[Entry]:
    """Models that read a text as a whole."""
    return [
        model("Bert", CLASSIFY, TEXT, ENCODER),
        model("Bert", ANSWER, TEXT, ENCODER),
        model("Bert", "ForMaskedLM", TEXT, ENCODER),
        model("Roberta", CLASSIFY, TEXT, ENCODER),
        model("XLMRoberta", TAG, TEXT, ENCODER),
        model(
            "DistilBert",
            CLASSIFY,
            TEXT,
            {
                "vocab_size": VOCABULARY,
                "dim": 64,
                "n_layers": 4,
                "n_heads": 4,
                "hidden_dim": 128,
                "max_position_embeddings": 64,
            },
        ),
        model(
            "DebertaV2",
            CLASSIFY,
            TEXT,
            {
                **ENCODER,
                "relative_attention": True,
                "position_buckets": 16,
                "pos_att_type": ["p2c", "c2p"],
                "share_att_key": True,
                "norm_rel_ebd": "layer_norm",
                "type_vocab_size": 0,
            },
        ),
        model(
            "ModernBert",
            CLASSIFY,
            TEXT,
            {
                **DECODER,
                "global_attn_every_n_layers": 2,
                "local_attention": 8,
                "cls_token_id": 1,
                "sep_token_id": 2,
            },
        ),
        model("Albert", CLASSIFY, TEXT, {**ENCODER, "embedding_size": 32}),
        model("Electra", TAG, TEXT, {**ENCODER, "embedding_size": 32}),
        model("MPNet", CLASSIFY, TEXT, ENCODER),
        model(
            "XLNet",
            CLASSIFY,
            TEXT,
            {
                "vocab_size": VOCABULARY,
                "d_model": 64,
                "n_layer": 4,
                "n_head": 4,
                "d_inner": 128,
                "pad_token_id": 0,
            },
        ),
        model("Longformer", CLASSIFY, TEXT, {**ENCODER, "attention_window": 8}),
        model(
            "BigBird",
            CLASSIFY,
            keywords(padded(64, shortest=32)),
            {**ENCODER, "block_size": 4, "num_random_blocks": 1},
        ),
        model(
            "Funnel",
            CLASSIFY,
            TEXT,
            {
                "vocab_size": VOCABULARY,
                "block_sizes": [2, 2],
                "d_model": 64,
                "n_head": 4,
                "d_head": 16,
                "d_inner": 128,
            },
        ),
        model(
            "Reformer",
            CLASSIFY,
            keywords(padded(16)),
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "feed_forward_size": 128,
                "num_attention_heads": 4,
                "attention_head_size": 16,
                "attn_layers": ["local", "lsh", "local", "lsh"],
                "local_attn_chunk_length": 4,
                "lsh_attn_chunk_length": 4,
                "num_buckets": 4,
                "hash_seed": 1,
                "axial_pos_shape": [4, 4],
                "axial_pos_embds_dim": [16, 48],
                "max_position_embeddings": 64,
            },
        ),
        model("RoFormer", CLASSIFY, TEXT, {**ENCODER, "embedding_size": 64}),
        model("ConvBert", CLASSIFY, TEXT, {**ENCODER, "embedding_size": 64, "head_ratio": 2}),
        model("FNet", CLASSIFY, keywords(tokens("input_ids", 12)), ENCODER),
        model(
            "Nystromformer",
            CLASSIFY,
            keywords(tokens("input_ids", 16)),
            {**ENCODER, "num_landmarks": 4, "segment_means_seq_len": 16},
        ),
    ]


def decoders() -> list[Entry]:
    """Models that read a text from left to right."""
    return [
        model(
            "GPT2",
            "LMHeadModel",
            TEXT,
            {
                "n_embd": 64,
                "n_layer": 4,
                "n_head": 4,
                "vocab_size": VOCABULARY,
                "n_positions": 64,
                "bos_token_id": 1,
                "eos_token_id": 1,
            },
        ),
        model("Llama", CAUSAL, TEXT, GROUPED),
        model("Llama", CLASSIFY, TEXT, GROUPED),
        model("Qwen2", CAUSAL, TEXT, GROUPED),
        model("Qwen3", CAUSAL, TEXT, {**GROUPED, "head_dim": 16}),
        model("Gemma2", CAUSAL, TEXT, {**GROUPED, "head_dim": 16, "sliding_window": 8}),
        model(
            "Gemma3",
            CAUSAL,
            TEXT,
            {**GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
            config="Gemma3TextConfig",
        ),
        model("Mistral", CAUSAL, TEXT, {**GROUPED, "sliding_window": 8}),
        model("Phi", CAUSAL, TEXT, DECODER),
        model("Phi3", CAUSAL, TEXT, GROUPED),
        model("GPTNeoX", CAUSAL, TEXT, DECODER),
        model(
            "GPTNeo",
            CAUSAL,
            TEXT,
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "num_layers": 4,
                "num_heads": 4,
                "attention_types": [[["global", "local"], 2]],
                "window_size": 8,
                "max_position_embeddings": 64,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
        model(
            "GPTJ",
            CAUSAL,
            TEXT,
            {
                "vocab_size": VOCABULARY,
                "n_embd": 64,
                "n_layer": 4,
                "n_head": 4,
                "rotary_dim": 8,
                "n_positions": 64,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
        model(
            "Bloom",
            CAUSAL,
            TEXT,
            {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 4, "n_head": 4},
        ),
        model(
            "OPT",
            CAUSAL,
            TEXT,
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "ffn_dim": 128,
                "max_position_embeddings": 64,
                "word_embed_proj_dim": 32,
                "pad_token_id": 0,
            },
        ),
        model(
            "Falcon",
            CAUSAL,
            TEXT,
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "ffn_hidden_size": 128,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
        model("Olmo2", CAUSAL, TEXT, GROUPED),
        model("StableLm", CAUSAL, TEXT, GROUPED),
    ]


def pairs() -> list[Entry]:
    """Models with an encoder and a decoder."""
    return [
        model("T5", GENERATE, PAIR, T5),
        model("MT5", GENERATE, PAIR, T5),
        model(
            "LongT5",
            GENERATE,
            keywords(padded(16), tokens("decoder_input_ids", 5)),
            {
                **T5,
                "local_radius": 3,
                "global_block_size": 4,
                "encoder_attention_type": "transient-global",
            },
        ),
        model("Bart", GENERATE, PAIR, BART),
        model("MBart", GENERATE, PAIR, BART),
        model("Pegasus", GENERATE, PAIR, BART),
        model("Marian", "MTModel", PAIR, {**BART, "decoder_vocab_size": VOCABULARY}),
    ]


def mixtures() -> list[Entry]:
    """Models that send each token to some of their experts."""
    return [
        model("Mixtral", CAUSAL, TEXT, {**GROUPED, "num_local_experts": 4}),
        model(
            "Qwen2Moe",
            CAUSAL,
            TEXT,
            {
                **GROUPED,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
                "shared_expert_intermediate_size": 64,
            },
        ),
        model(
            "GptOss",
            CAUSAL,
            TEXT,
            {
                **GROUPED,
                "head_dim": 16,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 8,
            },
        ),
        model(
            "SwitchTransformers",
            GENERATE,
            PAIR,
            {
                **T5,
                "num_experts": 4,
                "expert_capacity": 16,
                "num_sparse_encoder_layers": 1,
                "num_sparse_decoder_layers": 1,
            },
        ),
    ]


def recurrent() -> list[Entry]:
    """Models with a state that goes along the text."""
    return [
        model("Mamba", CAUSAL, TEXT, {**MAMBA, "time_step_rank": 4}),
        model(
            "Mamba2",
            CAUSAL,
            TEXT,
            {**MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
        ),
        model("FalconMamba", CAUSAL, TEXT, {**MAMBA, "time_step_rank": 4}),
        model(
            "Rwkv",
            CAUSAL,
            TEXT,
            {
                "vocab_size": VOCABULARY,
                "context_length": 64,
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "attention_hidden_size": 64,
                "intermediate_size": 128,
                # The state that is kept for the next token is written in place.
                "use_cache": False,
            },
        ),
        model(
            "RecurrentGemma",
            CAUSAL,
            TEXT,
            {
                **WIDTH,
                "num_key_value_heads": 2,
                "vocab_size": VOCABULARY,
                "lru_width": 64,
                "attention_window_size": 8,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
    ]
