"""Preference training (DPO): the outputs of the frozen reference model for each answer are cached.

pip install transformers && python examples/preference.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import cachefreeze

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, use_cache=False,
)  # fmt: skip
policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config).eval()
reference.load_state_dict(policy.state_dict())
reference.requires_grad_(False)
# A prompt of 8 tokens, with an answer that is liked and one that is not.
prompts, answers = torch.randint(5, 300, (64, 1, 8)), torch.randint(5, 300, (64, 2, 16))
pairs = torch.cat([prompts.expand(-1, 2, -1), answers], 2)
loader = DataLoader(pairs, batch_size=16, shuffle=True)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)


def said(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the logarithm of the probability of each answer, (n,)."""
    logs = model(input_ids=ids).logits[:, 7:-1].log_softmax(-1)
    return logs.gather(2, ids[:, 8:, None]).sum((1, 2))


cache = cachefreeze.ActivationCache(reference)
for epoch in range(4):
    for batch in loader:
        liked, other = batch.unbind(1)
        with torch.no_grad():
            before = said(reference, liked) - said(reference, other)
        loss = -F.logsigmoid(0.1 * (said(policy, liked) - said(policy, other) - before)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}  loss {loss.item():.4f}")

print("weights", sum(p.detach().double().sum() for p in policy.parameters()).item())
print(cache)
