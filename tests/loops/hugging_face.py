"""Loops with the libraries of Hugging Face: transformers, peft, diffusers."""

from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from .data import digits, loader, padded, sounds, texts
from .harness import Loop, Optimizers
from .networks import frozen, trained


class Texts(Loop):
    """Base of the loops on texts: a new object of `transformers` in each run."""

    NEEDS: ClassVar[tuple[str, ...]] = ("transformers",)

    loader: DataLoader[Any]

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(trained(model), lr=2e-3, fused=True)  # as `TrainingArguments` has it

    def step(self, model: Any, batch: Any) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss


def classifier(family: str, **options: int) -> Any:
    """Makes a small classifier of texts, all of whose encoder is frozen."""
    transformers = import_module("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=40,
        **options,
    )
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    model.base_model.requires_grad_(False)
    return model


def train_the_head(model: Any) -> None:
    """Puts all but the frozen encoder in training mode."""
    model.train()
    model.base_model.eval()


class HeadOnRoberta(Texts):
    """A classifier on a frozen RoBERTa; every text is padded to the maximal length.

    Who: `padding="max_length"` in the tokenizer, and `model.roberta.requires_grad_(False)`.
    Hard: places are counted from the ids, a mask of four axes is made from one of two, and the
    head's dropout draws. Only the first token of the last layer is needed.
    Row: a text.
    """

    def __init__(self) -> None:
        rows, topics = texts(96, 6, 24, seed=2)
        ids, mask = padded(rows, 24)
        self.loader = loader(
            [
                {"input_ids": i, "attention_mask": m, "labels": t}
                for i, m, t in zip(ids, mask, topics, strict=True)
            ],
            16,
        )

    def build(self) -> Any:
        return classifier("Roberta", pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def on_epoch(self, model: Any, epoch: int) -> None:
        train_the_head(model)


class DynamicPadding(Texts):
    """The same kind of loop with Hugging Face's default collator: padded to the batch's longest.

    Who: everybody who follows the course: `DataCollatorWithPadding(tokenizer)`.
    Hard: a text comes with other padding in each epoch, so the bits that the model is given hardly
    ever come again. The attention mask shows what the text itself is.
    Row: a text at its own length.
    """

    EXPECT, EPOCHS = "served or told", 5

    def __init__(self) -> None:
        tokenizers, transformers = import_module("tokenizers"), import_module("transformers")
        numbers = {"[PAD]": 0} | {f"w{number}": number for number in range(1, 60)}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, "w1"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
        rows, topics = texts(96, 5, 24, seed=7)
        sentences = [" ".join(f"w{word}" for word in row) for row in rows]
        data = [
            {**tokenizer(text, return_token_type_ids=False), "labels": topic}
            for text, topic in zip(sentences, topics.tolist(), strict=True)
        ]
        self.loader = loader(data, 8, collate=transformers.DataCollatorWithPadding(tokenizer))

    def build(self) -> Any:
        return classifier("Bert")

    def on_epoch(self, model: Any, epoch: int) -> None:
        train_the_head(model)


class Lora(Texts):
    """LoRA in the upper half of a language model.

    Who: users of peft, with `layers_to_transform`.
    Hard: the layers below repeat. Those above hold frozen weights too, but their inputs depend on
    what trains: they must run and pass gradient on. Loss and labels are the model's own.
    Row: a text.
    """

    NEEDS = ("transformers", "peft")
    REENTRANT: ClassVar[bool | None] = None
    """The kind of gradient checkpointing. None: there is none."""

    def __init__(self) -> None:
        rows, _ = texts(80, 8, 20, seed=4)
        ids, mask = padded(rows, 20)
        labels = ids.masked_fill(mask == 0, -100)
        self.loader = loader(
            [
                {"input_ids": i, "attention_mask": m, "labels": t}
                for i, m, t in zip(ids, mask, labels, strict=True)
            ],
            8,
        )

    def build(self) -> Any:
        peft = import_module("peft")
        transformers = import_module("transformers")
        base = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                vocab_size=60,
                hidden_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=160,
                max_position_embeddings=40,
                pad_token_id=0,
                use_cache=False,
            )
        )
        if self.REENTRANT is not None:
            kind = {"use_reentrant": self.REENTRANT}
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
        lora = peft.LoraConfig(
            r=4,
            lora_alpha=16,
            lora_dropout=0.05,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=[2, 3],
        )
        return peft.get_peft_model(base, lora)

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()


class LoraCheckpointed(Lora):
    """LoRA with gradient checkpointing, as transformers has it by default (not reentrant).

    Who: everybody whose activations do not fit.
    Hard: each layer runs a second time inside `backward()`, and must find there what it found at
    first. peft makes the embedding's output require gradient although nothing below trains.
    Row: a text.
    """

    REENTRANT = False


class LoraReentrant(Lora):
    """LoRA with reentrant gradient checkpointing.

    Who: older scripts, which pass `use_reentrant=True` or nothing.
    Hard: layers run under `no_grad` first, and again inside `backward()` by a function of autograd.
    Each layer's input is a new leaf that requires gradient.
    Row: a text.
    """

    EXPECT = "served or told"
    REENTRANT = True


class SpeechClassifier(Texts):
    """A classifier on a frozen wav2vec 2.0, with padded audio and an attention mask.

    Who: keyword spotting, emotion and speaker tasks, after `model.freeze_base_model()`.
    Hard: the mask is computed down to frames by python numbers. The weighted sum of all layers
    trains, so a row's kept values are all hidden states.
    Row: a recording.
    """

    def __init__(self) -> None:
        waves, pitch = sounds(64, 500, 800, seed=6)
        long = torch.stack([F.pad(wave, (0, 800 - len(wave))) for wave in waves])
        mask = torch.stack([torch.arange(800) < len(wave) for wave in waves]).long()
        self.loader = loader(
            [
                {"input_values": w, "attention_mask": m, "labels": t}
                for w, m, t in zip(long, mask, pitch, strict=True)
            ],
            8,
        )

    def build(self) -> Any:
        transformers = import_module("transformers")
        model = transformers.Wav2Vec2ForSequenceClassification(
            self._config(num_labels=4, use_weighted_layer_sum=True, classifier_proj_size=32)
        )
        model.freeze_base_model()
        return model

    @staticmethod
    def _config(**more: Any) -> Any:
        transformers = import_module("transformers")
        return transformers.Wav2Vec2Config(
            vocab_size=8,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            conv_dim=(96, 96, 96),
            conv_stride=(5, 4, 2),
            conv_kernel=(10, 8, 4),
            feat_extract_norm="layer",
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            **more,
        )

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()
        model.wav2vec2.eval()


class SpeechRecognition(SpeechClassifier):
    """CTC: only the convolutions are frozen, and SpecAugment draws from numpy's random state.

    Who: fine-tuning of wav2vec 2.0, HuBERT and WavLM, after `model.freeze_feature_encoder()`.
    Hard: the whole model is in training mode. Masked spans, layer drop and dropout are drawn from
    numpy and torch, after the frozen part. Skipped work must not move these draws.
    Row: a recording.
    """

    def __init__(self) -> None:
        waves, pitch = sounds(64, 800, 800, seed=6)
        letters = torch.stack([1 + (pitch + at) % 7 for at in range(4)], 1)
        self.loader = loader(
            [{"input_values": w, "labels": t} for w, t in zip(waves, letters, strict=True)], 8
        )

    def build(self) -> Any:
        transformers = import_module("transformers")
        model = transformers.Wav2Vec2ForCTC(
            self._config(
                mask_time_prob=0.1, mask_time_length=2, layerdrop=0.1, ctc_loss_reduction="mean"
            )
        )
        model.freeze_feature_encoder()
        return model

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()


class StableDiffusion(Loop):
    """A U-Net of diffusers trains on samples of a frozen `AutoencoderKL`.

    Who: the training scripts of diffusers.
    Hard: `vae.encode` is a method that gives a distribution. Its sample is drawn in each step, and
    so are noise and times. The U-Net is larger than what is frozen.
    Row: an image.
    """

    NEEDS, EPOCHS = ("diffusers",), 3

    def __init__(self) -> None:
        diffusers = import_module("diffusers")
        self.loader = loader(digits(32), 8)
        self.schedule = diffusers.DDPMScheduler(num_train_timesteps=100)

    def build(self) -> Any:
        diffusers = import_module("diffusers")
        vae = diffusers.AutoencoderKL(
            block_out_channels=(48, 48),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
        )
        unet = diffusers.UNet2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
        return nn.ModuleDict({"vae": frozen(vae), "unet": unet})

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(model["unet"].parameters(), lr=2e-3, weight_decay=1e-2)

    def caches(self, model: Any) -> tuple[nn.Module, ...]:
        return model["vae"], model["unet"]

    def step(self, model: Any, batch: Any) -> Tensor:
        x, _ = batch
        with torch.no_grad():
            latents = model["vae"].encode(x).latent_dist.sample() * 0.18
        noise = torch.randn_like(latents)
        times = torch.randint(100, (len(x),))
        noisy = self.schedule.add_noise(latents, noise, times)
        return F.mse_loss(model["unet"](noisy, times).sample, noise)


class SentenceEmbeddings(Texts):
    """A dense layer trains on a frozen sentence encoder, with a loss of sentence-transformers.

    Who: users of sentence-transformers who adapt an embedding to their own pairs.
    Hard: the loss module calls the encoder once for each column of the batch, with dictionaries
    that modules add to as they pass. A sentence is a question here and an answer there.
    Row: a sentence, in whichever column.
    """

    NEEDS = ("sentence_transformers", "transformers")

    def __init__(self) -> None:
        rows, topics = texts(64, 16, 16, seed=5)
        ids, mask = padded(rows, 16)
        of = [torch.where(topics == topic)[0].tolist() for topic in (0, 1)]
        pairs = [(a, b) for same in of for a, b in zip(same, same[1:] + same[:1], strict=True)]
        self.loader = loader(
            [[{"input_ids": ids[i], "attention_mask": mask[i]} for i in pair] for pair in pairs], 8
        )

    def build(self) -> Any:
        sentence_transformers = import_module("sentence_transformers")
        losses = import_module("sentence_transformers.losses")
        models = import_module("sentence_transformers.models")
        model = sentence_transformers.SentenceTransformer(
            modules=[_Words(), models.Pooling(64), models.Dense(64, 32)], device="cpu"
        )
        return losses.MultipleNegativesRankingLoss(model)

    def step(self, model: Any, batch: Any) -> Tensor:
        loss: Tensor = model([dict(column) for column in batch], torch.zeros(0))
        return loss


class _Words(nn.Module):
    """A frozen encoder as sentence-transformers has its own, without files."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.words = nn.Embedding(60, 64)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        frozen(self)

    def train(self, mode: bool = True) -> "_Words":
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.words(features["input_ids"])
        hidden = self.encoder(hidden, src_key_padding_mask=features["attention_mask"] == 0)
        features["token_embeddings"] = hidden
        return features


LOOPS: tuple[type[Loop], ...] = (
    HeadOnRoberta,
    DynamicPadding,
    Lora,
    LoraCheckpointed,
    LoraReentrant,
    SpeechClassifier,
    SpeechRecognition,
    StableDiffusion,
    SentenceEmbeddings,
)
