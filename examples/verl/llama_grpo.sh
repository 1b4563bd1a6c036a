#!/usr/bin/env bash
# GRPO on a Llama (or any model without sinks) with this attention: FSDP2, packed rows, vLLM or SGLang. verl 0.9.1.
# my_ppo_llama.yaml holds the attention and the algorithm; this script adds the machine and the sizes.
#
# Use it to have one attention for models with and without sinks, or if no FlashAttention wheel fits. Without sinks
# flash_attention_2 is as exact.
#
# TESTED:
#   - verl's configuration accepts every key, for 1, 2, 4 and 8 GPUs (tests/test_recipes.py);
#   - verl's actor worker with a tiny random Llama on a CPU (tests/test_verl.py);
#   - three steps of the same trainer with vLLM 0.25.1 and a small random Llama on one H100 (`make gpu-demo`).
# NOT TESTED:
#   - this script on a GPU: a real checkpoint, and these sizes. They are arithmetic for one node of 8 x 80 GB, not
#     measurements;
#   - more than one GPU with this model (a gpt-oss ran on two: `make gpu-demo SP=2`);
#   - CUDA graphs of the engine (the steps above had rollout.enforce_eager=True);
#   - SGLang.
#
# Before the first run:
#   On every node, from this repository: pip install ".[verl]" "vllm==0.25.1", then triton-attention-sink doctor.
#   Without flash-attn, verl takes log-probs token by token and loses seconds a step. "Log-probs token by token" in
#   CLEAN_USAGE_GUIDE.md says what to install, or what to set for a Llama with tied embeddings.
#   triton-attention-sink verify --model meta-llama/Llama-3.1-8B-Instruct --layers 8 --dtype bf16
#
# Run:  TRAIN=train.parquet VAL=test.parquet bash llama_grpo.sh [more overrides]
set -euo pipefail

MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
TRAIN=${TRAIN:?parquet of prompts, as the preprocessing scripts of verl write it}
VAL=${VAL:?parquet of prompts}
ROLLOUT=${ROLLOUT:-vllm}    # vllm or sglang
GPUS=${GPUS:-8}             # per node
NODES=${NODES:-1}
SP=${SP:-1}                 # Ulysses sequence parallelism

ARGS=(
  "actor_rollout_ref.model.path='$MODEL'"                          # a folder or a name on the Hub

  # Data
  "data.train_files='$TRAIN'"                                      # column "prompt" holds chat messages
  "data.val_files='$VAL'"                                          # likewise

  # Actor and reference
  "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=$SP"  # 1 = no sharing of rows; more: "6. Sequence parallelism" of the guide
  "actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size=$SP"    # of the reference
  "actor_rollout_ref.actor.optim.lr=1e-6"                          # verl's default
  "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384"        # tokens of a packed row; at least prompt + response

  # Rollout
  "actor_rollout_ref.rollout.name=$ROLLOUT"                        # has an attention of its own
  "actor_rollout_ref.rollout.gpu_memory_utilization=0.5"           # the share of a GPU for weights and cache

  # Trainer
  "trainer.n_gpus_per_node=$GPUS"                                  # GPUs per node
  "trainer.nnodes=$NODES"                                          # with Ray started on all of them
  "trainer.total_epochs=1"                                         # over train_files
  "trainer.val_before_train=False"                                 # start at once
  "trainer.test_freq=20"                                           # steps
  "trainer.save_freq=20"                                           # steps; config.json names the attention, see the guide
  "trainer.project_name=attention_sinks"                           # where checkpoints go, and the name in a logger
  "trainer.experiment_name=llama_grpo"                             # likewise
)

exec python3 -m verl.trainer.main_ppo --config-dir "$(dirname "$0")" --config-name my_ppo_llama "${ARGS[@]}" "$@"
