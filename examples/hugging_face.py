"""Hugging Face's `Trainer`: the last layer and head of a BERT are trained, the rest is frozen.

pip install transformers accelerate && python examples/hugging_face.py
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import cachefreeze

torch.manual_seed(0)
texts = [
    {"input_ids": torch.randint(5, 500, (24,)), "attention_mask": torch.ones(24), "labels": n % 2}
    for n in range(200)
]
model = BertForSequenceClassification(
    BertConfig(vocab_size=500, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
               intermediate_size=128)
)  # fmt: skip
cachefreeze.freeze(model.bert.embeddings, *model.bert.encoder.layer[:3])
arguments = TrainingArguments(
    tempfile.mkdtemp(), num_train_epochs=4, per_device_train_batch_size=16, report_to="none",
    save_strategy="no", logging_strategy="epoch", use_cpu=True, disable_tqdm=True,
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=texts)

cache = cachefreeze.ActivationCache(model)
trainer.train()

print("weights", model.classifier.weight.detach().double().sum().item())
print(cache)
