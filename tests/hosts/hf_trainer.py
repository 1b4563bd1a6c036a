"""A user's script for the Hugging Face Trainer, which knows nothing of this package but a name on its command line."""

import argparse
import json
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

parser = argparse.ArgumentParser()
for name in ("--model", "--data", "--attn", "--out"):
    parser.add_argument(name, required=True)
parser.add_argument("--packed", action="store_true")
arguments = parser.parse_args()

samples = [json.loads(line) for line in Path(arguments.data).read_text().splitlines()]
training = TrainingArguments(
    arguments.out, max_steps=2, per_device_train_batch_size=len(samples), optim="sgd", learning_rate=0.1,
    lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no",
)  # fmt: skip
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
collator = DataCollatorWithFlattening() if arguments.packed else DataCollatorForSeq2Seq(tokenizer)
model = AutoModelForCausalLM.from_pretrained(arguments.model, attn_implementation=arguments.attn)
trainer = Trainer(model, training, data_collator=collator, train_dataset=samples)
trainer.train()
trainer.save_model(arguments.out)
