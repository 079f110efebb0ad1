"""LoRA in the upper layers of a language model, by PEFT and an `accelerate` loop.

pip install transformers peft accelerate && python examples/lora.py
"""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import cachefreeze

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=6,
                num_attention_heads=4, num_key_value_heads=2, use_cache=False)
)  # fmt: skip
adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[4, 5])
model = get_peft_model(model, adapters)
loader = DataLoader(torch.randint(5, 300, (160, 32)), batch_size=16, shuffle=True)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
accelerator = Accelerator(cpu=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

cache = cachefreeze.ActivationCache(model)
for epoch in range(4):
    for ids in loader:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}  loss {loss.item():.4f}")

trained = [p.detach().double().sum() for p in model.parameters() if p.requires_grad]
print("weights", sum(trained).item())
print(cache)
