#!/usr/bin/env bash
# GRPO on gpt-oss-20b with exact attention sinks: FSDP2, packed rows, vLLM or SGLang as the rollout engine. verl 0.9.1.
#
# WHAT WE RAN of this: that verl's configuration accepts every key (tests/test_recipes.py), and the same trainer on a
# tiny random gpt-oss on a CPU with a Hugging Face rollout (`make demo`).
# WHAT WE DID NOT RUN: this model, this script on GPUs, vLLM, SGLang. The sizes below are arithmetic for one node of
# 8 x 80 GB, not measurements.
#
# Before the first run:
#   pip install ".[verl]" from this repository, on every node; triton-attention-sink doctor
#   Convert the MXFP4 checkpoint once, as FSDP trains, and hands to the rollout engine, ordinary bf16 weights:
#     python3 - <<'PY'
#     from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config
#     model = AutoModelForCausalLM.from_pretrained(
#         "openai/gpt-oss-20b", dtype="bfloat16", quantization_config=Mxfp4Config(dequantize=True))
#     model.config.__dict__.pop("quantization_config", None)
#     model.save_pretrained("gpt-oss-20b-bf16")
#     AutoTokenizer.from_pretrained("openai/gpt-oss-20b").save_pretrained("gpt-oss-20b-bf16")
#     PY
#   triton-attention-sink verify --model gpt-oss-20b-bf16 --layers 4 --dtype bf16     # on one of the GPUs
#
# Run:  MODEL=gpt-oss-20b-bf16 TRAIN=train.parquet VAL=test.parquet bash gpt_oss_20b_grpo.sh [more overrides]
set -euo pipefail

MODEL=${MODEL:?folder of the bf16 checkpoint}
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
  "actor_rollout_ref.model.path='$MODEL'"                          # bf16, see above
  "actor_rollout_ref.model.use_remove_padding=True"                # packed rows; this attention cuts them, eager would not
  "actor_rollout_ref.model.enable_gradient_checkpointing=True"     # keep one activation per layer, recompute the rest

  # Algorithm
  "algorithm.adv_estimator=grpo"                                   # no value-head critic: verl builds that with flash_attention_2
  "actor_rollout_ref.actor.use_kl_loss=False"                      # no reference policy to hold in memory
  "actor_rollout_ref.actor.entropy_coeff=0"                        # verl's default

  # Data
  "data.train_files='$TRAIN'"                                      # column "prompt" holds chat messages
  "data.val_files='$VAL'"                                          # likewise
  "data.train_batch_size=128"                                      # prompts per step
  "data.max_prompt_length=1024"                                    # longer prompts are left out by the next key
  "data.filter_overlong_prompts=True"                              # instead of an error
  "data.max_response_length=7168"                                  # gpt-oss reasons at length
  "+data.apply_chat_template_kwargs.reasoning_effort=medium"       # of the template of gpt-oss: low, medium, high

  # Actor: FSDP2, every rank a shard of weights, gradients and Adam's state
  "actor_rollout_ref.actor.strategy=fsdp2"                         # FSDP1 works with verl as well; we tested FSDP2
  "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2"             # the engine reads this one
  "actor_rollout_ref.actor.fsdp_config.param_offload=True"         # 21e9 parameters, fp32 master weights: to the host in rollouts
  "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True"     # Adam's two states likewise
  "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=$SP"  # 1: whole rows; README.md says what of more is served
  "actor_rollout_ref.actor.optim.lr=1e-6"                          # verl's default
  "actor_rollout_ref.actor.ppo_mini_batch_size=32"                 # prompts per optimiser step
  "actor_rollout_ref.actor.use_dynamic_bsz=True"                   # fill micro-batches by tokens, not by samples
  "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384"        # tokens of a packed row; at least prompt + response
  "actor_rollout_ref.actor.grad_clip=1.0"                          # verl's default; counts the sinks like any parameter

  # Rollout
  "actor_rollout_ref.rollout.name=$ROLLOUT"                        # has attention with sinks of its own
  "actor_rollout_ref.rollout.n=8"                                  # responses per prompt: the group of GRPO
  "actor_rollout_ref.rollout.tensor_model_parallel_size=2"         # 42 GB of weights over two GPUs
  "actor_rollout_ref.rollout.gpu_memory_utilization=0.6"           # the share of a GPU for weights and cache
  "actor_rollout_ref.rollout.max_num_batched_tokens=16384"         # tokens that the engine computes at a time
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
  "trainer.experiment_name=gpt_oss_20b_grpo"                       # likewise
)
if [ "$ROLLOUT" = sglang ]; then
  ARGS+=("+actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend=triton")  # SGLang's own, with sinks
fi

exec python3 -m verl.trainer.main_ppo "${ARGS[@]}" "$@"
