"""after_import: an action at the end of somebody else's import, which stays as it was."""

import importlib
import inspect
import sys
import threading

import pytest

from triton_attention_sink_hf.after_import import after_import


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder on the path for modules named after_import_*, and the list that actions append to."""
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield tmp_path
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.startswith("after_import_")]:
        del sys.modules[name]


def test_the_action_runs_once_at_the_end_of_the_import(modules):
    (modules / "after_import_a.py").write_text("import sys\nvalue = 1\nlater = 2\n")
    seen, before = [], list(sys.meta_path)
    after_import("after_import_a", lambda: seen.append(sys.modules["after_import_a"].later))
    assert seen == []
    import after_import_a

    assert seen == [2] and sys.meta_path == before  # nothing is left behind
    importlib.reload(after_import_a)
    assert seen == [2]
    assert type(after_import_a.__loader__).exec_module is after_import_a.__loader__.exec_module.__func__
    assert "value = 1" in inspect.getsource(after_import_a)


def test_a_module_that_is_there_needs_no_waiting():
    seen, before = [], list(sys.meta_path)
    after_import("sys", lambda: seen.append(1))
    assert seen == [1] and sys.meta_path == before


def test_an_import_that_fails_is_waited_for_again(modules):
    (modules / "after_import_b.py").write_text("raise RuntimeError('at first')\n")
    seen = []
    after_import("after_import_b", lambda: seen.append(1))
    with pytest.raises(RuntimeError, match="at first"):
        import after_import_b
    assert seen == []
    (modules / "after_import_b.py").write_text("ready = True\n")
    importlib.invalidate_caches()
    import after_import_b

    assert seen == [1] and after_import_b.ready


def test_an_import_that_has_begun_is_noticed_at_the_next_one(modules):
    """As where transformers.modeling_utils is what imports torch first."""
    (modules / "after_import_c.py").write_text("import after_import_d\ndone = True\n")
    (modules / "after_import_d.py").write_text("import after_import_test\nafter_import_test.wait()\n")
    (modules / "after_import_e.py").write_text("")
    seen = []
    helper = sys.modules["after_import_test"] = type(sys)("after_import_test")
    helper.wait = lambda: after_import("after_import_c", lambda: seen.append(sys.modules["after_import_c"].done))
    import after_import_c

    assert seen == [] and after_import_c.done
    import after_import_e  # noqa: F401

    assert seen == [True]


def test_a_missing_module_stays_missing(modules):
    after_import("after_import_missing", lambda: None)
    assert importlib.util.find_spec("after_import_missing") is None
    with pytest.raises(ModuleNotFoundError, match="after_import_missing"):
        import after_import_missing  # noqa: F401


def test_two_threads_import_it_at_once(modules):
    (modules / "after_import_f.py").write_text("import time\ntime.sleep(0.2)\n")
    seen = []
    after_import("after_import_f", lambda: seen.append(1))
    threads = [threading.Thread(target=importlib.import_module, args=("after_import_f",)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert seen == [1]
