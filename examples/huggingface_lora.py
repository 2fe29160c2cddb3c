"""A Hugging Face Trainer, with a LoRA adapter of PEFT on a tiny model with random weights."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from optwatch.integrations.transformers import WatchCallback

set_seed(0)
config = GPT2Config(
    vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
model = get_peft_model(
    GPT2LMHeadModel(config), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
)
texts = torch.randint(128, (32, 32), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": text, "labels": text} for text in texts]

with tempfile.TemporaryDirectory() as directory:
    arguments = TrainingArguments(
        directory, max_steps=8, per_device_train_batch_size=4, logging_steps=2, save_steps=4, report_to=[],
        use_cpu=True, disable_tqdm=True, include_num_input_tokens_seen=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        callbacks=[WatchCallback()],  # this line
    )
    trainer.train()
print(f"trained for {trainer.state.global_step} steps")
