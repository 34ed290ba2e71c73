"""Makes packing.py and attention_inputs.py importable as `kernels_...`, and fills fresh memory with NaN."""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# --import-mode=importlib puts no test folder on sys.path, so a plain import would not find it
for _name in ("packing", "attention_inputs"):
    _spec = importlib.util.spec_from_file_location(
        f"kernels_{_name}", Path(__file__).with_name(f"{_name}.py")
    )
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[f"kernels_{_name}"] = _module
    _spec.loader.exec_module(_module)


# Once will do what Triton's interpreter does in each call of a function in a kernel, for a third of its time.
if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()


# test_triton.py sets this to run the interpreter's tests on a GPU.
torch.set_default_device(os.environ.get("DELTAPATCH_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """A cell that an operation leaves unwritten is NaN, never a lucky number."""

    def poisoned(make):
        def fresh(*args, **options):
            out = make(*args, **options)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return fresh

    for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(where, name, poisoned(getattr(where, name)))
