"""A language model: accumulation by hand, batches without a loader, a seed for each rank. Nothing is wrong with it."""

import math
import os
from contextlib import nullcontext

import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

block_size, vocab, width, gradient_accumulation_steps, batch_size, max_iters = 16, 32, 32, 4, 4, 12
ddp = int(os.environ.get("RANK", -1)) != -1
if ddp:
    init_process_group(backend="gloo")
    ddp_rank, ddp_world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    master_process, seed_offset = ddp_rank == 0, ddp_rank
    assert gradient_accumulation_steps % ddp_world_size == 0
    gradient_accumulation_steps //= ddp_world_size
else:
    master_process, seed_offset = True, 0
torch.manual_seed(1337 + seed_offset)
text = torch.randint(0, vocab, (4000,), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 4, width // 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(block_size, width)
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(width, vocab, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, ids, targets):
        logits = self.head(self.blocks(self.tokens(ids) + self.positions.weight[: ids.shape[1]]))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def get_batch():
    starts = torch.randint(len(text) - block_size - 1, (batch_size,))
    rows = torch.stack([text[i : i + block_size + 1] for i in starts])
    return rows[:, :-1], rows[:, 1:]


def get_lr(iteration):
    return 1e-3 * 0.5 * (1 + math.cos(math.pi * iteration / max_iters))


def train():
    model = DDP(GPT()) if ddp else GPT()
    raw_model = model.module if ddp else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for iteration in range(max_iters):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(iteration)
        for micro_step in range(gradient_accumulation_steps):
            with model.no_sync() if ddp and micro_step < gradient_accumulation_steps - 1 else nullcontext():
                _, loss = model(*get_batch())
                loss = loss / gradient_accumulation_steps
                loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if master_process and iteration % 6 == 0:
            print(f"iter {iteration}: loss {loss.item() * gradient_accumulation_steps:.4f}")
            torch.save({"model": raw_model.state_dict(), "iteration": iteration}, "ckpt.pt")


train()
if ddp:
    destroy_process_group()
