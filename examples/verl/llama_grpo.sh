#!/usr/bin/env bash
# GRPO on a Llama (or any model without sinks) with this attention: FSDP2, packed rows, vLLM or SGLang. verl 0.9.1.
#
# Worth it where one attention should serve sink models and others alike, or where no FlashAttention wheel fits; without
# sinks flash_attention_2 is as exact.
#
# WHAT WE RAN of this: that verl's configuration accepts every key (tests/test_recipes.py), and verl's actor worker on a
# tiny random Llama on a CPU (tests/test_verl.py).
# WHAT WE DID NOT RUN: this model, this script on GPUs, vLLM, SGLang. The sizes below are arithmetic for one node of
# 8 x 80 GB, not measurements.
#
# Before the first run:
#   pip install ".[verl]" from this repository, on every node; triton-attention-sink doctor
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
  # The attention: this one line is all that this package needs.
  "++actor_rollout_ref.model.override_config.attn_implementation=triton_attention_sink"  # of the actor and the reference
  "actor_rollout_ref.model.external_lib=triton_attention_sink_hf"  # optional: without the package the run stops at once

  # Model
  "actor_rollout_ref.model.path='$MODEL'"                          # a folder or a name on the Hub
  "actor_rollout_ref.model.use_remove_padding=True"                # packed rows, cut where position_ids restart
  "actor_rollout_ref.model.enable_gradient_checkpointing=True"     # keep one activation per layer, recompute the rest

  # Algorithm
  "algorithm.adv_estimator=grpo"                                   # no critic
  "actor_rollout_ref.actor.use_kl_loss=True"                       # a reference policy, with the same attention
  "actor_rollout_ref.actor.kl_loss_coef=0.001"                     # verl's default
  "actor_rollout_ref.actor.entropy_coeff=0"                        # verl's default

  # Data
  "data.train_files='$TRAIN'"                                      # column "prompt" holds chat messages
  "data.val_files='$VAL'"                                          # likewise
  "data.train_batch_size=256"                                      # prompts per step
  "data.max_prompt_length=1024"                                    # longer prompts are left out by the next key
  "data.filter_overlong_prompts=True"                              # instead of an error
  "data.max_response_length=3072"                                  # tokens

  # Actor and reference: FSDP2
  "actor_rollout_ref.actor.strategy=fsdp2"                         # FSDP1 works with verl as well; we tested FSDP2
  "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2"             # the engine reads this one
  "actor_rollout_ref.ref.fsdp_config.strategy=fsdp2"               # the reference's engine
  "actor_rollout_ref.ref.fsdp_config.param_offload=True"           # on the host while it is not asked
  "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=$SP"  # 1: whole rows; README.md says what of more is served
  "actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size=$SP"    # of the reference
  "actor_rollout_ref.actor.optim.lr=1e-6"                          # verl's default
  "actor_rollout_ref.actor.ppo_mini_batch_size=64"                 # prompts per optimiser step
  "actor_rollout_ref.actor.use_dynamic_bsz=True"                   # fill micro-batches by tokens, not by samples
  "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384"        # tokens of a packed row; at least prompt + response

  # Rollout
  "actor_rollout_ref.rollout.name=$ROLLOUT"                        # has an attention of its own
  "actor_rollout_ref.rollout.n=8"                                  # responses per prompt: the group of GRPO
  "actor_rollout_ref.rollout.tensor_model_parallel_size=1"         # 16 GB of weights
  "actor_rollout_ref.rollout.gpu_memory_utilization=0.5"           # the share of a GPU for weights and cache
  "actor_rollout_ref.rollout.calculate_log_probs=True"             # training/rollout_probs_diff_*: trainer against rollout

  # Trainer
  "trainer.n_gpus_per_node=$GPUS"                                  # of this machine
  "trainer.nnodes=$NODES"                                          # with Ray started on all of them
  "trainer.total_epochs=1"                                         # over train_files
  "trainer.val_before_train=False"                                 # start at once
  "trainer.test_freq=20"                                           # steps
  "trainer.save_freq=20"                                           # steps; config.json names the attention, see the guide
  "trainer.logger=[console]"                                       # or [console,wandb]
  "trainer.project_name=attention_sinks"                           # where checkpoints go, and the name in a logger
  "trainer.experiment_name=llama_grpo"                             # likewise
)

exec python3 -m verl.trainer.main_ppo "${ARGS[@]}" "$@"
