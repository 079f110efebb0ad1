"""sentence-transformers' own trainer: a Dense layer learns on a frozen encoder, with triplets."""

import tempfile

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers import models as modules
from sentence_transformers.losses import TripletLoss
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import cachefreeze

torch.manual_seed(0)
words = {"[PAD]": 0, "[UNK]": 1, **{f"w{n}": n + 2 for n in range(200)}}
tokenizer = Tokenizer(WordLevel(words, "[UNK]"))
tokenizer.pre_tokenizer = Whitespace()
folder = tempfile.mkdtemp()
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
).save_pretrained(folder)
BertModel(
    BertConfig(vocab_size=210, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
               intermediate_size=64, max_position_embeddings=32)
).save_pretrained(folder)  # fmt: skip

encoder = modules.Transformer(folder)
parts = [encoder, modules.Pooling(32), modules.Dense(32, 16)]
model = SentenceTransformer(modules=parts, device="cpu")
cachefreeze.freeze(encoder)


def text(number: int) -> str:
    return " ".join(f"w{(number * 7 + k * k) % 200}" for k in range(12))


rows = {name: [text(n * step) for n in range(64)] for name, step in
        (("anchor", 1), ("positive", 3), ("negative", 5))}  # fmt: skip
arguments = SentenceTransformerTrainingArguments(
    tempfile.mkdtemp(), num_train_epochs=4, per_device_train_batch_size=8, report_to="none",
    save_strategy="no", use_cpu=True, disable_tqdm=True,
)  # fmt: skip
trainer = SentenceTransformerTrainer(
    model=model, args=arguments, train_dataset=Dataset.from_dict(rows), loss=TripletLoss(model)
)

cache = cachefreeze.ActivationCache(model)
trainer.train()

print("weights", sum(p.detach().double().sum() for p in model[2].parameters()).item())
print(cache)
