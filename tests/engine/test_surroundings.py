"""Whatever a program has switched on in PyTorch, numbers stay as they are, or it is refused."""

import copy
import pickle
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from engine_tiny import build, hf_model, true_model
from engine_tiny import pairs as drawn_pairs
from torch.nn.utils import parametrizations, prune

import deltapatch
import deltapatch.models.stand_in
from deltapatch import DeltapatchError
from deltapatch.engine.wavefront.pool import threads
from deltapatch.models.patched import patched_logits
from deltapatch.models.surroundings import undisturbed
from deltapatch.tasks.answered import answered

VARIANT = "llama-grouped"


@contextmanager
def switched(on, before, *values):
    on(*values)
    try:
        yield
    finally:
        on(*before)


SWITCHES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default-dtype-wide": lambda: switched(torch.set_default_dtype, [torch.float32], torch.float64),
    "default-dtype-narrow": lambda: switched(torch.set_default_dtype, [torch.float32], torch.bfloat16),
    "default-device": lambda: torch.device("meta"),
    "set-default-device": lambda: switched(torch.set_default_device, [None], "meta"),
    "inference-mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, [False], True),
    "low-products": lambda: switched(torch.set_float32_matmul_precision, ["highest"], "medium"),
    "anomalies": torch.autograd.detect_anomaly,
    "numpy-raises": lambda: np.errstate(all="raise"),
}
pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hf_model(VARIANT).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    peft = pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("adapter")
    wrapped = peft.get_peft_model(build(VARIANT), peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
    wrapped.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pairs():
    return [deltapatch.PromptPair(*pair) for pair in drawn_pairs(true_model(VARIANT), [5, 4, 5, 4])]


def everything(folder, adapter, pairs):
    """Numbers from every way in that computes: name -> array."""
    tokens = pairs[0].clean
    out = {}
    for stream in (False, True):
        model = deltapatch.load_model(folder, device="cpu", stream=stream, adapter=adapter)
        effects = deltapatch.sweep(
            model, pairs, sites="mlp_out,z", precision="bf16", noise_sample=4, progress=False
        )
        floor = effects.meta["noise_floor"]["relative_error"]
        out |= {f"{site} {stream}": effects.values("kl", site) for site in effects.sites}
        out[f"floor {stream}"] = np.array([floor[name] for name in sorted(floor)])
        out[f"logits {stream}"] = model.logits(tokens).numpy()
        out[f"fingerprint {stream}"] = np.array(model.fingerprint())
    patch = deltapatch.Patch("mlp_post", 1, -1, 3)
    joint = [deltapatch.Intervention(0, [patch])]
    for source in ("noise", "mean", "resample"):
        got = deltapatch.run(model, pairs, joint, source=source, precision="fp32", progress=False)
        out[f"run {source}"] = got.values("logit_diff")
    out["answered"] = answered(model, pairs)
    out["plain"] = patched_logits(model, torch.tensor([tokens], device="cpu"), lambda *_: None).numpy()
    own = deltapatch.from_transformers(hf_model(VARIANT))
    out["shared"] = own.logits(torch.tensor(tokens, device="cpu")).numpy()
    return out


@pytest.fixture(scope="module")
def plain(folder, adapter, pairs):
    with threads(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltapatch.engine.wavefront.products.FEW", 0)
        return everything(folder, adapter, pairs)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_numbers_do_not_depend_on_what_is_switched_on(switch, folder, adapter, pairs, plain):
    before = state()
    with SWITCHES[switch]():
        inside = state()
        found = everything(folder, adapter, pairs)
        assert state() == inside  # what was switched on still is
    assert state() == before
    for name, values in plain.items():
        assert np.array_equal(found[name], values, equal_nan=values.dtype.kind == "f"), name


def state():
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


def test_a_thread_that_ends_first_leaves_the_others_settings():
    torch.set_float32_matmul_precision("medium")
    try:
        inside, ended = threading.Event(), threading.Event()

        def other():
            with undisturbed():
                inside.set()
                ended.wait(10)

        thread = threading.Thread(target=other)
        with undisturbed():
            thread.start()
            inside.wait(10)
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # the other thread computes on
        ended.set()
        thread.join()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_error_puts_everything_back():
    before = state()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(DeltapatchError):
        deltapatch.sweep(deltapatch.from_transformers(hf_model(VARIANT)), [], progress=False)
    assert state() == before


# Modules that are shared with the program ---------------------------------------------------------------

MLP = "model.layers.1.mlp.down_proj"


def hooked(hf):
    hf.get_submodule(MLP).register_forward_hook(lambda module, args, out: out * 2)


def hooked_before(hf):
    hf.get_submodule(MLP).register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def another_forward(hf):
    hf.get_submodule(MLP).forward = lambda x: x


def pruned(hf):
    prune.l1_unstructured(hf.get_submodule(MLP), "weight", 0.5)


def parametrized(hf):
    parametrizations.orthogonal(hf.get_submodule(MLP))


def replaced(hf):
    hf.get_submodule(MLP).weight = torch.nn.Parameter(torch.zeros(16, 24))


def moved(hf):
    hf.to(torch.bfloat16)


def shrunk(hf):
    hf.model.layers = hf.model.layers[:2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hooked, "model.layers.1.mlp.down_proj .Linear. has a forward hook .hooked.*remove the hook"),
        (hooked_before, "has a forward hook .hooked_before.*remove the hook"),
        (another_forward, "down_proj .Linear. has a forward of its own .another_forward"),
        (pruned, r"'model.layers.1.mlp.down_proj.weight_orig'\).* by torch.nn.utils.prune.remove"),
        (parametrized, "parametrizations.* by torch.nn.utils.parametrize.remove_parametrizations"),
    ],
)
def test_what_a_module_does_beside_its_weights_is_refused(change, said):
    hf = build(VARIANT)
    change(hf)
    with pytest.raises(DeltapatchError, match=said):
        deltapatch.from_transformers(hf)


@pytest.mark.parametrize("change", [hooked, another_forward, pruned, parametrized, replaced, moved, shrunk])
def test_and_so_is_what_it_does_since(change, pairs):
    hf = build(VARIANT)
    model = deltapatch.from_transformers(hf)
    model.logits([1, 2])
    change(hf)
    with pytest.raises(DeltapatchError, match=r"remove|call from_transformers again"):
        model.logits([1, 2])
    with pytest.raises(DeltapatchError, match=r"remove|call from_transformers again"):
        deltapatch.sweep(model, pairs, progress=False)


def test_pruned_weights_that_are_made_permanent_are_those_that_count():
    hf = build(VARIANT)
    pruned(hf)
    prune.remove(hf.get_submodule(MLP), "weight")
    with torch.no_grad():
        true = hf(torch.tensor([[1, 2, 3]])).logits[0]
    assert (deltapatch.from_transformers(hf).logits([1, 2, 3]) - true).norm() < 1e-5 * true.norm()


def test_hooks_that_only_note_what_passes_are_none_of_ours():
    hf = build(VARIANT)
    with torch.no_grad():
        hf(torch.tensor([[1, 2]]), output_hidden_states=True)  # transformers leaves hooks that note it
    assert torch.equal(
        deltapatch.from_transformers(hf).logits([1, 2]),
        deltapatch.from_transformers(build(VARIANT)).logits([1, 2]),
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_module_is_what_it_was():
    want = deltapatch.from_transformers(hf_model(VARIANT)).logits([1, 2, 3])
    whole, part = torch.compile(build(VARIANT)), build(VARIANT)
    part.model.layers[1] = torch.compile(part.model.layers[1])
    for hf in (whole, part):
        assert torch.equal(deltapatch.from_transformers(hf).logits([1, 2, 3]), want)


# Copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_from_files_is_pickled_by_its_place(stream, folder, adapter, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = deltapatch.load_model(
        folder.name, device="cpu", dtype="float64", stream=stream, adapter=adapter
    ).first_layers(2)
    data = pickle.dumps(model)
    monkeypatch.chdir("/")
    for twin in (pickle.loads(data), copy.deepcopy(model), copy.copy(model)):
        assert repr(twin) == repr(model)
        assert torch.equal(twin.logits([1, 2, 3]), model.logits([1, 2, 3]))


def test_a_model_in_memory_is_pickled_with_its_weights():
    hf = build(VARIANT)
    model = deltapatch.from_transformers(hf)
    twins = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    before = model.logits([1, 2, 3])
    with torch.no_grad():
        hf.get_submodule(MLP).weight.zero_()
    assert not torch.equal(model.logits([1, 2, 3]), before)
    for twin in twins:
        assert torch.equal(twin.logits([1, 2, 3]), before)


def test_a_stand_in_says_why_it_cannot_be_pickled():
    fields = build(VARIANT).config.to_dict()
    made = deltapatch.models.stand_in.stand_in(fields, "config.json", torch.device("cpu"), False)
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(DeltapatchError, match="cannot be pickled or copied: only models of load_model"):
            copied(made)
