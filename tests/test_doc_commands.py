"""Every shell command and YAML block of the documents runs here, or a table says why not and which test does instead.

A command stands in a ```bash block, or between backquotes behind the name of a program. One that neither runs nor is
listed fails. What all of them name exists: make targets and variables, files, modules, options, extras, versions.
"""

import io
import re
import shlex
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from command_line import invoke
from doc_blocks import PAGES
from processes import ROOT, environment
from results import ENVIRONMENTS

from triton_attention_sink_hf.cli import app

if sys.version_info >= (3, 11):
    import tomllib

PROGRAMS = (
    "accelerate", "git", "make", "pip", "python", "python3", "swift", "torchrun", "triton-attention-sink", "trl",
)  # fmt: skip
without_verl = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed (`make test` does it)")


class Command(NamedTuple):
    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Without comment and environment variables in front."""
        words = shlex.split(self.text, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        return words


def fenced(page: str, languages: str) -> list[str]:
    return re.findall(rf"^```(?:{languages})\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[Command]:
    found = [
        Command(page, line)
        for block in fenced(page, "bash|sh")
        for line in re.sub(r"\\\n *", "", block).splitlines()
        if line and not line.startswith("#")
    ]
    prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    inline = (Command(page, text.replace("\\|", "|")) for text in re.findall(r"`([^`\n]+)`", prose))
    bare = ("pip install", "accelerate launch")  # names of a step
    return found + [x for x in inline if x.text.split(" ")[0] in PROGRAMS and " " in x.text and x.text not in bare]


COMMANDS = list({command.text: command for page in PAGES for command in commands(page)}.values())
each_command = pytest.mark.parametrize("command", COMMANDS, ids=[command.text for command in COMMANDS])

# What runs here, by its first words; the second in this order, of one block.
RUN = (
    "export LOCAL_KERNELS=", "python3 -c", "triton-attention-sink export",
    "triton-attention-sink verify --model /path/to/checkpoint",
)  # fmt: skip
TRITON_PART = ("mkdir flash-attn-triton", "tar -xzf flash_attn-", "printf")

# What does not, by its first words: why, and where it runs: a file, and what stands in it.
INSTALLS = "installs packages"
TRAINS = "trains for minutes"
GPU = "needs a GPU"
LISTED = {
    "git clone": ("the repository's address is the reader's", None),
    "cd triton-attention-sink": ("the clone's folder", None),
    "pip install .[hf]": (INSTALLS, ("Makefile", '".[hf,verl,bench,test]"')),
    "pip install .[verl]": (INSTALLS, ("Makefile", '".[hf,verl,bench,test]"')),
    "pip install .[hf] trl": (INSTALLS, ("Makefile", "--upgrade --target $(VENV)/trl trl")),
    "pip install -e": (INSTALLS, ("Makefile", "-e ")),
    "pip install --pre flash-attn-4": (INSTALLS, None),
    "pip install --no-deps ./flash-attn-triton": (INSTALLS, None),
    "pip install kernels": (INSTALLS, ("Makefile", "$(VENV)/kernels kernels")),
    "pip install numpy<2.4": (INSTALLS, ("pyproject.toml", '"numpy<2.4"')),
    "pip install transformers": (INSTALLS, ("triton_attention_sink_hf/cli/export.py", '("5.9.0", "0.14.1")')),
    "pip install triton": (INSTALLS, ("pyproject.toml", '"triton>=3.4"')),
    "pip install wheel": (INSTALLS, None),
    "pip download": ("downloads flash-attn", None),
    "pip uninstall": ("takes packages out", None),
    "python3 -m verl.trainer.main_ppo": (TRAINS, ("tests/test_recipes.py", '"-m", "verl.trainer.main_ppo"')),
    "python -m verl.trainer.main_ppo": (TRAINS, ("tests/test_verl.py", "def test_main_ppo_by_one_config_line")),
    "torchrun --nproc_per_node=8 -m verl.trainer.sft_trainer": (
        TRAINS, ("tests/sft_runs.py", "from verl.trainer.sft_trainer import SFTTrainer"),
    ),
    "torchrun -m triton_attention_sink_hf": (TRAINS, ("tests/test_launcher.py", "torch.distributed.run")),
    "accelerate launch": (TRAINS, ("tests/test_launcher.py", "accelerate.commands.launch")),
    "python -m triton_attention_sink_hf": ("starts your program", ("tests/test_launcher.py", '"-m", NAME')),
    "trl sft": (TRAINS, ("tests/hosts/catalogue.py", '"trl", "sft"')),
    "swift sft": (TRAINS, ("tests/hosts/catalogue.py", '"swift", "sft"')),
    "make test": ("is this run", ("Makefile", "-m pytest tests")),
    "make nightly": ("takes hours", ("Makefile", "-m pytest tests")),
    "make lint": ("installs ruff", ("Makefile", "ruff check .")),
    "make demo": (TRAINS, ("tests/test_verl.py", "def test_main_ppo_by_one_config_line")),
    "make hosts": ("installs trainers, 40 minutes", ("tests/test_hosts.py", "compare.py")),
    "make peer-tests": ("takes checkouts of other packages", ("tests/test_peers.py", '"run.py"')),
    "make arch-table": ("half an hour", ("tests/test_compile_targets.py", "import architectures")),
    "make gpu-demo": (GPU, ("tests/test_verl.py", "gpu_demo.failures")),
    "make gpu-test": (GPU, ("tests/test_gpu.py", "pytest.mark.gpu")),
    "python test_attention_sink/test_basic.py": ("runs", ("tests/test_cli.py", '"test_basic.py", path=()')),
    "python tests/machine_code.py": ("compiles for ten minutes", None),
    "python tests/model_support.py": ("an hour", ("tests/test_model_support.py", "model_support")),
    "python benchmarks/hf_route.py": (GPU, ("tests/test_gpu_scripts.py", "hf_route.py")),
    "python benchmarks/long_context.py": (GPU, ("tests/test_long_context.py", "long_context")),
    "python benchmarks/shared_prefix.py": (GPU, None),
    "python benchmarks/random_calls.py": (GPU, ("tests/test_gpu_scripts.py", "random_calls")),
    "python benchmarks/determinism.py": (GPU, ("tests/test_gpu_scripts.py", "determinism")),
    "python benchmarks/sanitized.py": (GPU, ("tests/test_gpu_scripts.py", "sanitized")),
    "torchrun --nproc-per-node 2 benchmarks/two_gpus.py": (GPU, ("tests/test_sequence_parallel.py", "two_gpus")),
    "triton-attention-sink COMMAND --help": ("runs", ("tests/test_doc_commands.py", "def test_the_help_of")),
    "triton-attention-sink doctor": ("runs", ("tests/test_doctor.py", '"doctor", "--json"')),
    "triton-attention-sink verify": ("runs", ("tests/test_doc_commands.py", "verify --model /path/to/checkpoint")),
    "triton-attention-sink bench": (GPU, ("tests/test_bench.py", '"bench", "--redraw"')),
}  # fmt: skip


def entry(command: Command) -> str | None:
    """The longest key of the tables that the command begins with."""
    line = " ".join(command.words)
    return max((key for key in (*RUN, *TRITON_PART, *LISTED) if line.startswith(key)), key=len, default=None)


def test_there_are_commands():
    assert len(COMMANDS) > 60 and {command.page for command in COMMANDS} >= {"README.md", "CLEAN_USAGE_GUIDE.md"}


@each_command
def test_every_command_runs_or_is_listed(command):
    assert entry(command), f"{command.page}: {command.text}: add it to RUN, or to LISTED with a reason"


@pytest.mark.parametrize("key", [*RUN, *TRITON_PART, *LISTED])
def test_no_entry_is_left_over(key):
    assert key in map(entry, COMMANDS)
    file, text = LISTED.get(key, ("", None))[1] or (None, None)
    own = re.compile(r"^LISTED = .*?^}", re.MULTILINE | re.DOTALL)
    assert file is None or text in own.sub("", (ROOT / file).read_text())


@each_command
def test_what_a_command_names_exists(command):
    program, *arguments = command.words
    options = [word.split("=")[0] for word in arguments if word.startswith("--")]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in arguments:
            name, is_variable, _ = word.partition("=")
            assert re.search(rf"^{name} \?=" if is_variable else rf"^{name}:", makefile, re.MULTILINE), word
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "triton-attention-sink" and arguments[0] != "COMMAND":
        known = {flag for it in cli()[arguments[0]].params for flag in it.opts}
        assert set(options) <= known
    elif program in ("python", "python3", "torchrun"):
        for word in arguments:
            if word.endswith(".py") and "/" in word:
                assert not [option for option in options if f'"{option}"' not in (ROOT / word).read_text()
                            and program != "torchrun"]  # fmt: skip
        if "--config-dir" in options:
            folder, name = (arguments[arguments.index(option) + 1] for option in ("--config-dir", "--config-name"))
            assert (ROOT / folder / f"{name}.yaml").is_file()
    elif program == "pip":
        for word in arguments:
            check_requirement(word)


def cli():
    return typer.main.get_command(app).commands


@pytest.mark.parametrize("name", cli())
def test_the_help_of_every_command(name):
    shown = invoke(name, "--help")
    assert shown.exit_code == 0 and "Usage:" in shown.stdout


def check_requirement(word: str) -> None:
    """Extras are ours; a pinned version is one that was run: in constraints.txt or a result, or the Makefile's."""
    if word.startswith(".["):
        assert set(re.findall(r"\w+", word)) <= set(project()["optional-dependencies"])
    name, pinned, version = word.partition("==")
    if pinned and re.match(r"\d", version):
        pins = (ROOT / "constraints.txt").read_text() + (ROOT / "triton_attention_sink_hf/cli/export.py").read_text()
        guides = "flash-attn==2.8.3"  # verl's pin, for its Triton part
        assert word == guides or f'"{version}"' in pins or word in pins.splitlines() or any(
            known.get(name) == version for known in ENVIRONMENTS
        ), f"{word}: no result was made with it"  # fmt: skip


def project() -> dict:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with what the commands of ``RUN`` find where they run, and programs of this Python."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "bin").mkdir()
    for name, arguments in (("python3", ""), ("triton-attention-sink", " -m triton_attention_sink_hf.cli")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    with tarfile.open(folder / "flash_attn-2.8.3.tar.gz", "w:gz") as archive:
        for name in ("flash_attn/ops/triton/cross_entropy.py", "flash_attn/__init__.py"):
            archive.addfile(tarfile.TarInfo(f"flash_attn-2.8.3/{name}"), io.BytesIO())
    pytest.importorskip("transformers")
    from triton_attention_sink_hf.checks import tiny_gpt_oss

    config = tiny_gpt_oss("eager").config
    config.num_hidden_layers, config.layer_types = 4, config.layer_types * 2
    config.save_pretrained(folder / "checkpoint")
    return folder


def run(command: Command, folder: Path) -> str:
    """What it prints, in a shell."""
    text = command.text.replace("/path/to/checkpoint", f"{folder / 'checkpoint'}")
    env = environment(ROOT, PATH=f"{folder / 'bin'}:/usr/bin:/bin")
    done = subprocess.run(["bash", "-euc", text], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.xdist_group("doc commands")
@pytest.mark.parametrize("key", RUN)
def test_the_command_runs(key, here):
    for command in COMMANDS:
        if entry(command) != key:
            continue
        if "from verl" in command.text and find_spec("verl") is None:
            pytest.skip("verl is not installed (`make test` does it)")
        printed = run(command, here)
        assert "verify" not in key or "PASS: log-probs" in printed
        assert key != "triton-attention-sink export" or (here / "my-kernel" / "build" / "torch-universal").is_dir()


@pytest.mark.xdist_group("doc commands")
def test_the_triton_part_of_flash_attn_is_a_package_of_its_own(here):
    for key in TRITON_PART:
        (command,) = (command for command in COMMANDS if entry(command) == key)
        run(command, here)
    folder = here / "flash-attn-triton"
    assert sorted(f"{x.relative_to(folder)}" for x in folder.rglob("*.*")) == [
        "flash_attn/ops/triton/cross_entropy.py", "pyproject.toml",
    ]  # fmt: skip
    if sys.version_info >= (3, 11):
        written = tomllib.loads((folder / "pyproject.toml").read_text())
        assert written["project"] == {"name": "flash-attn-triton", "version": "2.8.3"}


# Configuration

YAML = [(page, block) for page in PAGES for block in fenced(page, "yaml")]
VERL_CONFIG = Path(getattr(find_spec("verl"), "origin", "/")).parent / "trainer" / "config"
VERL = [command for command in COMMANDS if any(word.startswith("verl.trainer.") for word in command.words)]


def composed(name: str, folder: Path, overrides: list[str]):
    """verl's configuration ``name``, or a file of ``folder`` that starts from one."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(f"{folder}", version_base=None):
        return compose(name, [f"hydra.searchpath=[file://{VERL_CONFIG}]", *overrides])


@without_verl
@pytest.mark.parametrize("command", VERL, ids=[command.text for command in VERL])
def test_verl_knows_the_keys_of_the_command(command):
    overrides = [word for word in command.words if re.match(r"\+*[\w.]+=", word) and not word.startswith("--")]
    config = "my_ppo" if "main_ppo" in command.text else "sft_trainer_engine"
    made = composed(config, ROOT / "examples" / "verl" if config == "my_ppo" else VERL_CONFIG, overrides)
    model = made.actor_rollout_ref.model if config == "my_ppo" else made.model
    assert model.override_config.attn_implementation == "triton_attention_sink" or not overrides


@without_verl
@pytest.mark.parametrize(("page", "block"), YAML)
def test_verl_knows_the_keys_of_the_block(page, block, tmp_path):
    import yaml

    values = yaml.safe_load(block)
    if "attn_implementation" in values:  # a config.json's, or any trainer's
        assert set(values) == {"attn_implementation"} and "triton_attention_sink" in values["attn_implementation"]
        return
    head = "" if "defaults" in values else "defaults: [ppo_trainer, _self_]\n"
    (tmp_path / "own.yaml").write_text(head + block)
    model = composed("own", tmp_path, []).actor_rollout_ref.model
    assert model.override_config == {"attn_implementation": "triton_attention_sink"}
