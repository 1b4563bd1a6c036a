"""The recipes in examples/verl: bash takes them, and verl's own configuration takes every key. Nothing is trained."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "verl"
RECIPES = sorted(FOLDER.glob("*.sh"))
# Below these verl has free-form dictionaries: the only places where a recipe may add a key (+ or ++).
OPEN = (
    "actor_rollout_ref.model.override_config.",
    "data.apply_chat_template_kwargs.",
    "actor_rollout_ref.rollout.engine_kwargs.",
)

needs_verl = pytest.mark.skipif(
    importlib.util.find_spec("verl") is None, reason="verl is not installed (`make test` does it)"
)
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def command(recipe: Path, folder: Path, **environment: str) -> list[str]:
    """The arguments that the recipe hands to python3, a stand-in that prints them."""
    python = folder / "python3"
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    python.chmod(0o755)
    environment = {"MODEL": "/a folder/model", "TRAIN": "/data/train.parquet", "VAL": "/data/val.parquet"} | environment
    environment |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", recipe, "trainer.seed_of_the_user=7"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def composed(overrides: list[str]):
    """verl's configuration with the overrides, as main_ppo composes it; raises for a key that verl does not have."""
    from hydra import compose, initialize_config_dir

    config = Path(importlib.util.find_spec("verl").origin).parent / "trainer" / "config"
    with initialize_config_dir(str(config), version_base=None):
        return compose("ppo_trainer", overrides)


def test_there_are_recipes():
    assert [recipe.name for recipe in RECIPES] == ["gpt_oss_20b_grpo.sh", "llama_grpo.sh"]


@each_recipe
def test_bash_takes_it_and_it_names_what_it_lacks(recipe):
    assert subprocess.run(["bash", "-n", recipe]).returncode == 0
    done = subprocess.run(["bash", recipe], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode != 0 and re.search("(MODEL|TRAIN): ", done.stderr)


@each_recipe
def test_every_key_is_explained(recipe):
    keys = [line for line in recipe.read_text().splitlines() if re.match(r'\s*(ARGS\+=\()?"\+*\w+\.', line)]
    assert len(keys) > 25
    assert [line for line in keys if not re.search(r'"\)?\s+# .+', line)] == []


@needs_verl
@each_recipe
@pytest.mark.parametrize("rollout", ["vllm", "sglang"])
def test_verl_takes_every_key(recipe, rollout, tmp_path):
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    module, name, *overrides, of_the_user = command(recipe, tmp_path, ROLLOUT=rollout, SP="2")
    assert (module, name, of_the_user) == ("-m", "verl.trainer.main_ppo", "trainer.seed_of_the_user=7")
    added = [override.lstrip("+") for override in overrides if override.startswith("+")]
    assert [key for key in added if not key.startswith(OPEN)] == []

    config = composed(overrides)
    actor = config.actor_rollout_ref
    assert actor.model.override_config.attn_implementation == "triton_attention_sink"
    assert actor.model.path == "/a folder/model"
    assert actor.model.use_remove_padding and actor.rollout.calculate_log_probs
    assert actor.rollout.name == rollout
    assert config.algorithm.adv_estimator == "grpo"
    assert actor.actor.fsdp_config.ulysses_sequence_parallel_size == 2
    samples = config.data.max_prompt_length + config.data.max_response_length
    assert samples <= actor.actor.ppo_max_token_len_per_gpu

    validate_config(config, use_reference_policy=actor.actor.use_kl_loss, use_critic=False)
    engine = omega_conf_to_dataclass(actor.actor).fsdp_config
    assert engine.strategy == "fsdp2" and engine.ulysses_sequence_parallel_size == 2
    if actor.actor.use_kl_loss:
        reference = actor.ref.fsdp_config
        assert reference.strategy == "fsdp2" and reference.ulysses_sequence_parallel_size == 2


@needs_verl
def test_a_key_that_verl_does_not_have_is_noticed():
    from hydra.errors import ConfigCompositionException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    with pytest.raises((ConfigCompositionException, ConfigAttributeError, ConfigKeyError)):
        composed(["actor_rollout_ref.actor.ulysses_size=2"])
