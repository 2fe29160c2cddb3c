"""What the demo trains: a GPT-2 of a few million random weights, and the bytes it learns."""

from __future__ import annotations

import os
import pydoc_data.topics

import torch
from torch import Tensor

CONTEXT = 128  # bytes the model sees


def make_model(device: torch.device) -> torch.nn.Module:
    """A GPT-2 over bytes: 6 blocks, 4.8 million parameters, random; nothing is downloaded.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(switch, "1")
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 - an optional dependency

    config = GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=256,
        n_layer=6,
        n_head=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model: torch.nn.Module = GPT2LMHeadModel(config).to(device)
    return model.train()


def next_byte_loss(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """The mean cross entropy, in nats, of each byte given those before it."""
    logits = model(input_ids=tokens).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def corpus() -> Tensor:
    """The help texts of the Python language, about half a megabyte, as bytes (uint8)."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def random_batch(data: Tensor, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``[size, CONTEXT]`` token ids (int64) from random places of the text."""
    starts = torch.randint(len(data) - CONTEXT, (size, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT)].long().to(device)
