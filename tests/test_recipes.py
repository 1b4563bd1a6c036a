"""The recipes and config files in examples/verl: verl's own main_ppo composes each. Nothing is trained."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "verl"
RECIPES = {"gpt_oss_20b_grpo.sh": "my_ppo", "llama_grpo.sh": "my_ppo_llama"}  # and the config file each starts from
DATA = ("data.train_files=/data/train.parquet", "data.val_files=/data/val.parquet")
GPUS = ("1", "2", "4", "8")
# Below these verl has free-form dictionaries: the only places where a recipe may add a key (+ or ++).
OPEN = (
    "actor_rollout_ref.model.override_config.",
    "data.apply_chat_template_kwargs.",
    "actor_rollout_ref.rollout.engine_kwargs.",
)
# What `python3 -m verl.trainer.main_ppo ARGUMENTS --cfg job` prints, of each of several ARGUMENTS, in one process.
COMPOSE = """
import contextlib, io, json, sys
from verl.trainer import main_ppo

texts = []
for arguments in json.load(sys.stdin):
    sys.argv = ["main_ppo", *arguments, "--cfg", "job"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        main_ppo.main()
    texts.append(text.getvalue())
print(json.dumps(texts))
"""

without_verl = pytest.mark.skipif(
    importlib.util.find_spec("verl") is None, reason="verl is not installed (`make test` does it)"
)


def needs_verl(test):
    """In one worker, so that verl composes once."""
    return without_verl(pytest.mark.xdist_group("recipes")(test))


each_recipe = pytest.mark.parametrize("recipe", RECIPES)
each_config = pytest.mark.parametrize("name", RECIPES.values())


def command(recipe: str, folder: Path, **environment: str) -> list[str]:
    """The arguments that the recipe hands to python3, a stand-in that prints them."""
    python = folder / "python3"
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    python.chmod(0o755)
    environment = {"MODEL": "/a folder/model", "TRAIN": "/data/train.parquet", "VAL": "/data/val.parquet"} | environment
    environment |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    run = ["bash", FOLDER / recipe, "data.seed=7"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def ranks(gpus: str) -> str:
    """The largest Ulysses group that the tests ask for on so many GPUs."""
    return min(gpus, "2")


def compose(arguments: list[list[str]], folder: Path) -> subprocess.CompletedProcess:
    """main_ppo's configuration for each of these, as JSON on stdout."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", COMPOSE]
    return subprocess.run(run, input=json.dumps(arguments), env=environment, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """Configurations by (recipe, ROLLOUT, GPUS), and by the name of a config file."""
    from omegaconf import OmegaConf

    folder = tmp_path_factory.mktemp("recipes")
    arguments = {name: ["--config-dir", str(FOLDER), "--config-name", name, *DATA] for name in RECIPES.values()}
    for recipe in RECIPES:
        for rollout, gpus in [("sglang", "8"), *(("vllm", gpus) for gpus in GPUS)]:
            module, name, *rest = command(recipe, folder, ROLLOUT=rollout, GPUS=gpus, SP=ranks(gpus))
            assert (module, name, rest[-1]) == ("-m", "verl.trainer.main_ppo", "data.seed=7")
            arguments[recipe, rollout, gpus] = rest
    done = compose([*arguments.values()], folder)
    assert done.returncode == 0, done.stderr
    return dict(zip(arguments, map(OmegaConf.create, json.loads(done.stdout)), strict=True))


def check(config, rollout: str = "vllm") -> None:
    """What every recipe and config file must give; verl's own checks among them."""
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    actor = config.actor_rollout_ref
    assert actor.model.override_config.attn_implementation == "triton_attention_sink"
    assert actor.model.external_lib == "triton_attention_sink_hf"
    assert actor.model.use_remove_padding and actor.rollout.calculate_log_probs
    assert actor.rollout.name == rollout
    assert config.algorithm.adv_estimator == "grpo" and actor.rollout.n > 1
    assert (config.data.train_files, config.data.val_files) == ("/data/train.parquet", "/data/val.parquet")
    assert actor.rollout.max_model_len == config.data.max_prompt_length + config.data.max_response_length
    assert actor.rollout.max_model_len <= actor.actor.ppo_max_token_len_per_gpu

    world_size = config.trainer.n_gpus_per_node * config.trainer.nnodes
    assert world_size % actor.rollout.tensor_model_parallel_size == 0  # verl starts so many engines: not 0
    assert config.data.train_batch_size % actor.actor.ppo_mini_batch_size == 0
    assert actor.actor.ppo_mini_batch_size * actor.rollout.n % world_size == 0

    validate_config(config, use_reference_policy=actor.actor.use_kl_loss, use_critic=False)
    engine = omega_conf_to_dataclass(actor.actor).fsdp_config
    assert engine.strategy == actor.ref.fsdp_config.strategy == "fsdp2"
    if actor.actor.use_kl_loss:
        assert actor.ref.fsdp_config.ulysses_sequence_parallel_size == engine.ulysses_sequence_parallel_size


def test_there_are_recipes():
    assert sorted(path.name for path in FOLDER.glob("*.sh")) == [*RECIPES]
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == [*RECIPES.values()]


@each_recipe
def test_bash_takes_it_and_it_names_what_it_lacks(recipe):
    assert subprocess.run(["bash", "-n", FOLDER / recipe]).returncode == 0
    done = subprocess.run(["bash", FOLDER / recipe], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode != 0 and re.search("(MODEL|TRAIN): ", done.stderr)


@each_recipe
def test_every_key_is_explained(recipe):
    keys = [line for line in (FOLDER / recipe).read_text().splitlines() if re.match(r'\s*(ARGS\+=\()?"\+*\w+\.', line)]
    assert len(keys) > 15
    assert [line for line in keys if not re.search(r'"\)?\s+# .+', line)] == []


@each_config
def test_every_value_of_a_config_file_is_explained(name):
    values = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if re.match(r" *\w+: +[^ #]", line)]
    assert len(values) > 15
    assert [line for line in values if not re.search(r" # .+", line)] == []


def test_the_attention_is_named_in_the_config_files_alone():
    for recipe in RECIPES:
        assert "attn_implementation" not in (FOLDER / recipe).read_text()


@needs_verl
@each_config
def test_verl_composes_the_config_file(name, composed):
    check(composed[name])


@needs_verl
@pytest.mark.parametrize("name", ["my_ppo", pytest.param("my_ppo_llama", marks=pytest.mark.exhaustive)])
def test_the_documented_command_composes_the_config_file(name, composed):
    """The command in the file's own header, from the repository, in a process of its own."""
    from omegaconf import OmegaConf

    header = re.sub(r"\\\n#", "", (FOLDER / f"{name}.yaml").read_text())
    (line,) = re.findall(r"^# +python3 (-m verl\.trainer\.main_ppo .*)$", header, re.MULTILINE)
    assert "+" not in line
    run = [sys.executable, *line.split(), *DATA, "--cfg", "job"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert OmegaConf.create(done.stdout) == composed[name]


@needs_verl
@each_recipe
@pytest.mark.parametrize("rollout, gpus", [("sglang", "8"), *(("vllm", gpus) for gpus in GPUS)])
def test_verl_composes_the_recipe(recipe, rollout, gpus, composed):
    config = composed[recipe, rollout, gpus]
    check(config, rollout)
    assert config.data.seed == 7
    assert config.actor_rollout_ref.model.path == "/a folder/model"
    assert config.trainer.n_gpus_per_node == int(gpus)
    assert config.actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size == int(ranks(gpus))


@each_recipe
def test_the_recipe_adds_no_key_that_verl_would_not_see(recipe, tmp_path):
    added = [override.lstrip("+") for override in command(recipe, tmp_path, ROLLOUT="sglang") if override[0] == "+"]
    assert [key for key in added if not key.startswith(OPEN)] == []


@needs_verl
def test_a_key_that_verl_does_not_have_is_noticed(tmp_path):
    known = ["--config-dir", str(FOLDER), "--config-name", "my_ppo", *DATA]
    done = compose([[*known, "actor_rollout_ref.actor.ulysses_size=2"]], tmp_path)
    assert done.returncode != 0 and "ulysses_size" in done.stderr
