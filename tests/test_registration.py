"""Registration with transformers: the names, when it happens, and what importing the package must not do."""

import importlib.util
import os
import textwrap

import pytest
from processes import ROOT, python

import triton_attention_sink_hf
from triton_attention_sink_hf.registration import NAME, path_problem, register, registered_names

FOLDER = os.path.dirname(os.path.abspath(triton_attention_sink_hf.__file__))
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def run(code: str, *path: str) -> str:
    """stdout of ``code`` in a fresh process that finds our package, ``path`` first."""
    done = python("-W", "default", "-c", textwrap.dedent(code), path=(*path, ROOT))
    return done.stdout + done.stderr


@needs_transformers
def test_importing_registers_and_never_touches_a_gpu():
    out = run(
        """
        import torch, triton_attention_sink_hf
        from transformers import AttentionInterface, AttentionMaskInterface
        from triton_attention_sink_hf.registration import registered_names
        for name in registered_names():
            assert name in AttentionInterface().valid_keys() and name in AttentionMaskInterface().valid_keys(), name
        assert not torch.cuda.is_initialized()
        print("fine")
        """
    )
    assert out.strip().endswith("fine")


@needs_transformers
def test_registering_twice_changes_nothing():
    from transformers import AttentionInterface, AttentionMaskInterface

    before = [dict(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
    assert register() == registered_names()
    assert before == [interface._global_mapping for interface in (AttentionInterface, AttentionMaskInterface)]


@needs_transformers
@pytest.mark.parametrize("name", registered_names())
def test_every_name_builds_a_model(name):
    from tiny_models import tiny
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny(LlamaConfig, short_window=False)
    config._attn_implementation = name
    model = LlamaForCausalLM(config)
    assert model.config._attn_implementation == name
    model.set_attn_implementation("eager")
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name


@needs_transformers
def test_a_saved_model_is_built_from_its_own_config(tmp_path):
    from tiny_models import tiny
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    AutoModelForCausalLM.from_config(tiny(LlamaConfig, short_window=False)).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert loaded.config._attn_implementation == NAME
    config = AutoConfig.from_pretrained(tmp_path, attn_implementation=NAME)
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == NAME


def test_names():
    names = registered_names()
    assert names[0] == NAME
    assert all(word not in NAME for word in ("flash", "sdpa", "flex"))
    if path_problem(FOLDER) is None:
        assert FOLDER in names and FOLDER + "/" in names


@needs_transformers
def test_both_paths_of_a_linked_folder_work(tmp_path):
    if path_problem(os.path.realpath(FOLDER)) or path_problem(str(tmp_path)):
        pytest.skip(f"transformers cannot take a path such as {FOLDER} or {tmp_path}")
    link = tmp_path / "triton_attention_sink_hf"
    link.symlink_to(FOLDER)
    names = [str(link), f"{link}/", os.path.realpath(FOLDER), os.path.realpath(FOLDER) + "/"]
    code = f"""
import triton_attention_sink_hf
assert triton_attention_sink_hf.__file__.startswith({str(tmp_path)!r})
from tiny_models import tiny
from transformers import LlamaConfig, LlamaForCausalLM
config = tiny(LlamaConfig, short_window=False)
for name in {names!r}:
    config._attn_implementation = name
    LlamaForCausalLM(config)
print("fine")
"""
    assert run(code, str(tmp_path), str(ROOT / "tests")).strip().endswith("fine")


@pytest.mark.parametrize(
    "path, reason",
    [
        ("/opt/flash/triton_attention_sink_hf", "'flash'"),
        ("/opt/sdpa/x", "'sdpa'"),
        ("/opt/flexible/x", "'flex'"),
        ("/opt/a|b/x", "'|'"),
        ("./triton_attention_sink_hf", "absolute"),
        ("~/triton_attention_sink_hf", "absolute"),
    ],
)
def test_paths_that_transformers_would_misread(path, reason):
    assert reason in path_problem(path)


def test_a_fine_path():
    assert path_problem("/opt/site-packages/triton_attention_sink_hf") is None


def test_the_functional_api_works_without_transformers():
    out = run(
        """
        import importlib.util, sys
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "transformers" else find_spec(name, *a)
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "transformers":
                    raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        sys.meta_path.insert(0, Absent())
        import torch, triton_attention_sink_hf as package
        q = torch.randn(1, 4, 2, 16)
        assert package.attention_sink(q, q, q, torch.zeros(2)).shape == q.shape
        from triton_attention_sink_hf.registration import register
        try:
            register()
        except ImportError as error:
            print(error)
        """
    )
    assert "transformers must be installed and >= 4.57" in out and "Warning" not in out


def test_a_transformers_without_the_mask_interface_is_named(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("__version__ = '4.40.0'\n")
    (tmp_path / "transformers" / "modeling_utils.py").write_text("")
    out = run("import triton_attention_sink_hf, transformers.modeling_utils; print('fine')", str(tmp_path))
    assert "fine" in out
    assert "UserWarning: triton_attention_sink is not registered with transformers" in out
    assert "transformers must be installed and >= 4.57, got" in out
