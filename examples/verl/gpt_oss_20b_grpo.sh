#!/usr/bin/env bash
# GRPO on gpt-oss-20b with exact attention sinks: FSDP2, packed rows, vLLM or SGLang as the rollout engine. verl 0.9.1.
# my_ppo.yaml holds the attention and the algorithm; this script adds the machine and the sizes.
#
# TESTED:
#   - verl's configuration accepts every key, for 1, 2, 4 and 8 GPUs (tests/test_recipes.py);
#   - the same trainer with a tiny random gpt-oss on a CPU and a Hugging Face rollout (`make demo`);
#   - this script's first step on one H100: vLLM 0.25.1, a tiny random gpt-oss in bf16, packed rows. Probabilities of
#     trainer and engine differ by 1.8e-3 on average; with eager and padded rows by 2.1e-3;
#   - three steps of the same trainer with vLLM 0.25.1 and a small random gpt-oss on one H100 and on two
#     that share every row (`make gpu-demo`, SP=2).
# NOT TESTED:
#   - a real checkpoint, and these sizes: they are arithmetic for one node of 8 x 80 GB, not measurements;
#   - verl on more than two GPUs;
#   - CUDA graphs of the engine (the steps above had rollout.enforce_eager=True);
#   - SGLang.
#
# Before the first run:
#   On every node, from this repository: pip install ".[verl]" "vllm==0.25.1", then triton-attention-sink doctor.
#     (verl 0.9.1 pins vLLM 0.24.0, which cannot load gpt-oss in bf16: KeyError 'layers.0.mlp.experts.w2_weight')
#   Without flash-attn, verl takes log-probs token by token and loses seconds a step. "Log-probs token by token" in
#   CLEAN_USAGE_GUIDE.md says what to install.
#   Convert the MXFP4 checkpoint once: FSDP trains bf16 weights and hands them to the rollout engine.
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
TP=$((GPUS % 2 ? 1 : 2))    # tensor parallelism of the engine: 42 GB of weights on two GPUs, or on one if it must be

ARGS=(
  "actor_rollout_ref.model.path='$MODEL'"                          # bf16, see above

  # Data
  "data.train_files='$TRAIN'"                                      # column "prompt" holds chat messages
  "data.val_files='$VAL'"                                          # likewise

  # Actor
  "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=$SP"  # 1 = no sharing of rows; more: "6. Sequence parallelism" of the guide
  "actor_rollout_ref.actor.optim.lr=1e-6"                          # verl's default
  "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384"        # tokens of a packed row; at least prompt + response

  # Rollout
  "actor_rollout_ref.rollout.name=$ROLLOUT"                        # has attention with sinks of its own
  "actor_rollout_ref.rollout.tensor_model_parallel_size=$TP"       # with fewer GPUs than this verl starts no engine
  "actor_rollout_ref.rollout.gpu_memory_utilization=0.6"           # the share of a GPU for weights and cache
  "actor_rollout_ref.rollout.max_num_batched_tokens=16384"         # tokens that the engine computes at a time

  # Trainer
  "trainer.n_gpus_per_node=$GPUS"                                  # GPUs per node
  "trainer.nnodes=$NODES"                                          # with Ray started on all of them
  "trainer.total_epochs=1"                                         # over train_files
  "trainer.val_before_train=False"                                 # start at once
  "trainer.test_freq=20"                                           # steps
  "trainer.save_freq=20"                                           # steps; config.json names the attention, see the guide
  "trainer.project_name=attention_sinks"                           # where checkpoints go, and the name in a logger
  "trainer.experiment_name=gpt_oss_20b_grpo"                       # likewise
)
if [ "$ROLLOUT" = sglang ]; then
  ARGS+=("+actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend=triton")  # SGLang's own, with sinks
fi

exec python3 -m verl.trainer.main_ppo --config-dir "$(dirname "$0")" --config-name my_ppo "${ARGS[@]}" "$@"
