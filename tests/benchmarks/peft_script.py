"""What people start once per configuration: load the base, adapt it with PEFT, train, save the adapter.

python peft_script.py MODEL_FOLDER BATCHES.json OUT --r 8 --alpha 16 --lr 1e-3 [--weight-decay 0] [--seed 0]

BATCHES.json: [[[token, ...], ...], ...], one list of equally long rows for each step. Prints the losses as JSON."""

import argparse
import json
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("batches", type=Path)
    parser.add_argument("out")
    parser.add_argument("--r", type=int, required=True)
    parser.add_argument("--alpha", type=float, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    batches = json.loads(arguments.batches.read_text())
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = peft.LoraConfig(
        r=arguments.r, lora_alpha=arguments.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, weight_decay=arguments.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / len(batches))
    model.train()
    losses = []
    for batch in batches:
        ids = torch.tensor(batch)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(arguments.out)
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
