"""Streamed weights: read in order and ahead, copied to a GPU (a fake one) in the right order, and dropped."""

import gc
import hashlib
import threading
import weakref
from contextlib import closing, contextmanager

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapatch import DeltapatchError, load_model
from deltapatch.models import memory, model_weights, stream
from deltapatch.models.fetch import fetch, hash_of_tensor, tensor_spans
from deltapatch.models.stream import HELD, ReadAhead, Upload
from deltapatch.models.tensors import SafetensorsFiles


class Mark:
    """Reached once the fake GPU has done so many steps of a stream."""

    def __init__(self, stream, step):
        self.stream, self.step = stream, step


class FakeLane:
    """Two streams that do nothing until they are told to: whoever waits runs them up to the mark."""

    def __init__(self):
        self.queues = {"copy": [], "main": []}
        self.done = {"copy": 0, "main": 0}
        self.current = threading.local()
        self.waited, self.used = [], []
        self.lock = threading.RLock()

    def name(self):
        return getattr(self.current, "name", "main")

    @contextmanager
    def copying(self):
        self.current.name = "copy"
        try:
            yield
        finally:
            self.current.name = "main"

    def pinned(self, n_bytes):
        return torch.zeros(n_bytes, dtype=torch.uint8)

    def empty_like(self, tensor):
        lane = self

        class OnGpu(torch.Tensor):
            """Copies to it happen when the stream comes to them."""

            def copy_(self, source, non_blocking=False):
                assert non_blocking, "the host would wait"
                plain = self.as_subclass(torch.Tensor)
                lane.queue(lambda: plain.copy_(source))
                return self

        return torch.full(tensor.shape, torch.nan, dtype=tensor.dtype).as_subclass(OnGpu)

    def queue(self, work):
        self.queues[self.name()].append(work)

    def run(self, mark):
        with self.lock:
            while self.done[mark.stream] < mark.step:
                self.done[mark.stream] += 1
                self.queues[mark.stream][self.done[mark.stream] - 1]()

    def mark(self):
        return Mark(self.name(), len(self.queues[self.name()]))

    def wait_here(self, mark):
        self.waited.append((threading.current_thread().name, mark.stream))
        self.run(mark)

    def wait_there(self, mark):
        self.queue(lambda: self.run(mark))

    def used_here(self, tensor):
        self.used.append(self.name())

    def finish(self):
        for name in ("main", "copy"):  # as late as can be: what main does not wait for has not happened yet
            self.run(Mark(name, len(self.queues[name])))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=2, max_size=8),
    st.integers(2, 24),
    st.booleans(),
)
def test_what_a_gpu_computes_with_is_what_was_read(sizes, stage, eager):
    """Whatever the order in which the GPU gets things done, each layer is whole when it is used."""
    parts = [tuple(torch.arange(n) + 100.0 * i + j for j, n in enumerate(ns)) for i, ns in enumerate(sizes)]
    lane, seen = FakeLane(), []
    original, stream.STAGE = stream.STAGE, stage * 4
    try:
        upload = Upload(lane)
        reading = ReadAhead(lambda i: tuple(upload(t) for t in parts[i]), len(parts) - 1, lane)
        for i in range(len(parts)):
            got = reading._part(i)
            lane.queue(lambda got=got: seen.append([t.as_subclass(torch.Tensor).clone() for t in got]))
            if eager:
                lane.finish()
        reading.close()
        lane.finish()
    finally:
        stream.STAGE = original
    assert [[t.tolist() for t in part] for part in seen] == [[t.tolist() for t in p] for p in parts]
    assert all(thread.startswith("reading") for thread, _ in lane.waited), "the pass itself has waited"
    assert len(lane.used) == sum(map(len, parts))
    assert set(lane.used) == {"main"}


def test_no_more_than_three_parts_are_on_the_gpu():
    lane, alive = FakeLane(), []
    most = []

    def read(i):
        held = torch.ones(3)
        alive.append(weakref.ref(held))
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        return (held,)

    reading = ReadAhead(read, 9, lane)
    for i in range(10):
        part = reading._part(i)
        lane.queue(lambda: None)
        del part
    reading.close()
    assert max(most) <= HELD
    waits = [stream for _, stream in lane.waited]
    assert waits == ["main"] * (10 - HELD)


def test_parts_are_read_one_ahead_and_in_order():
    read, first, second = [], threading.Event(), threading.Event()

    def one(i):
        read.append(i)
        (first, second)[min(i, 1)].set()
        return (torch.tensor([i]),)

    reading = ReadAhead(one, 4, None)
    assert first.wait(10)
    assert int(reading.layer(0)[0]) == 0
    assert second.wait(10)
    with pytest.raises(IndexError, match="part 3 was asked for in place of 1"):
        reading.layer(3)
    assert [int(reading.layer(i)[0]) for i in (1, 2, 3)] == [1, 2, 3]
    assert int(reading.ends()[0]) == 4
    with pytest.raises(IndexError):
        reading.ends()
    reading.close()
    assert read == [0, 1, 2, 3, 4]


def test_an_error_of_the_thread_is_raised_where_the_layer_is_asked_for():
    def one(i):
        if i == 1:
            raise DeltapatchError("damaged")
        return ()

    with closing(ReadAhead(one, 3, None)) as reading:
        reading.layer(0)
        with pytest.raises(DeltapatchError, match="damaged"):
            reading.layer(1)


def test_the_thread_ends_with_the_pass():
    def broken():
        with closing(ReadAhead(lambda i: (), 5, None)) as reading:
            reading.layer(0)
            raise ValueError("enough")

    before = threading.active_count()
    with pytest.raises(ValueError, match="enough"):
        broken()
    assert threading.active_count() == before


# ------------------------------------------------------------------------------------- from the file


def written(path, tensors):
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["float16", "bfloat16", "float32", "float64"]), st.integers(0, 9000)),
        min_size=1,
        max_size=5,
    )
)
def test_fetched_tensors_are_those_of_the_file(tmp_path_factory, kinds):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": torch.randn(n, 1, generator=generator).to(getattr(torch, dtype))
        for i, (dtype, n) in enumerate(kinds)
    }
    path = written(tmp_path_factory.mktemp("fetch") / "model.safetensors", tensors)
    files = SafetensorsFiles("here", [path])
    for name, tensor in tensors.items():
        got = files.fetch(name)
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)
        assert torch.equal(files.read(name), tensor)
        assert files.hash(name) == hash_of_tensor(tensor)
        content = path.read_bytes()[slice(*tensor_spans(path)[name])]
        assert files.hash(name) == hashlib.sha256(content).digest()


def test_writing_into_a_fetched_tensor_leaves_the_file(tmp_path):
    path = written(tmp_path / "model.safetensors", {"a": torch.ones(5)})
    files = SafetensorsFiles("here", [path])
    files.fetch("a").zero_()
    assert files.fetch("a").tolist() == [1.0] * 5


def test_a_file_that_has_become_shorter(tmp_path):
    path = written(tmp_path / "model.safetensors", {"a": torch.ones(5000)})
    span = tensor_spans(path)["a"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="shorter"):
        fetch(path, span, torch.float32)


def mappings(path):
    with open("/proc/self/maps") as file:
        return sum(str(path) in line for line in file)


def test_a_dropped_tensor_is_no_longer_mapped(tmp_path):
    path = written(tmp_path / "model.safetensors", {"a": torch.ones(5000)})
    files = SafetensorsFiles("here", [path])
    before = mappings(path)
    held = files.fetch("a")
    assert mappings(path) == before + 1
    del held
    assert mappings(path) == before


# ------------------------------------------------------------------------------------- models


def test_a_layer_that_is_asked_for_by_itself_is_dropped_too(build, saved):
    folder = saved(build("gptj"))
    streamed, before = load_model(folder, stream=True), mappings(folder)
    held = streamed.layer(1, None)
    assert mappings(folder) > before
    del held
    assert mappings(folder) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["gptj", "llama"])
def test_a_streamed_model_has_the_same_weights(kind, dtype, adapted, build, saved, tmp_path, ids):
    tied = {"tie_word_embeddings": kind == "llama"}
    hf = build(kind, **tied).to(torch.float16)
    folder, adapter = saved(hf), None
    if adapted:
        peft = pytest.importorskip("peft")
        target = "q_proj"
        wrapped = peft.get_peft_model(build(kind, **tied), peft.LoraConfig(r=2, target_modules=[target]))
        for name, weight in wrapped.named_parameters():
            if "lora" in name:
                weight.data.normal_()
        adapter = tmp_path / "adapter"
        wrapped.save_pretrained(adapter)
    options = {"device": "cpu", "dtype": dtype, "adapter": adapter}
    kept, streamed = (load_model(folder, stream=s, **options) for s in (False, True))
    assert (kept.n_bytes, kept.dtype) == (streamed.n_bytes, streamed.dtype)
    assert streamed.holds_what_it_reads == (dtype != "auto" or adapted)
    assert not kept.holds_what_it_reads
    assert torch.equal(kept.logits(ids), streamed.logits(ids))
    assert torch.equal(kept.embed(torch.tensor([3, 5])), streamed.embed(torch.tensor([3, 5])))
    with kept.reading() as one, streamed.reading() as other:
        for l in range(kept.spec.n_layers):
            for a, b in zip(flat(one.layer(l)), flat(other.layer(l)), strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
        a, b = one.ends(), other.ends()
        assert torch.equal(a.unembedding.weight, b.unembedding.weight)
        assert torch.equal(a.norm.weight, b.norm.weight)
        assert len(b.embedding) == (kept.spec.d_vocab if kept.spec.tied_embeddings else 0)
    for a, b in zip(flat(kept.ends(None)), flat(streamed.ends(None)), strict=True):
        assert torch.equal(a, b)


def flat(part):
    if isinstance(part, torch.Tensor):
        return [part]
    return [t for p in part or () for t in flat(p)]


def test_a_part_of_a_streamed_model_is_read_to_see_how_fast_that_is(build, saved, monkeypatch):
    folder = saved(build("llama"))
    kept, streamed = (load_model(folder, device="cpu", stream=stream) for stream in (False, True))
    fetched, really = [], SafetensorsFiles.fetch
    monkeypatch.setattr(SafetensorsFiles, "fetch", lambda it, name: fetched.append(name) or really(it, name))
    matrix = 4 * 32 * 72
    for asked, read in ((1, 1), (matrix, 1), (2 * matrix, 2), (1 << 30, 2)):
        fetched.clear()
        assert streamed.read_some(asked) == read * matrix
        assert len(fetched) == len({name.split(".")[2] for name in fetched}) == read
    assert kept.read_some(1 << 30) == 0


def test_streamed_weights_are_checked(build, saved):
    hf = build("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
        hf.model.embed_tokens.weight[7] = torch.inf
    streamed = load_model(saved(hf), device="cpu", stream=True)
    with pytest.raises(DeltapatchError, match=r"layers\.1\.mlp\.down_proj\.weight' holds NaN"):
        streamed.logits([1, 2])
    with pytest.raises(DeltapatchError, match=r"embed_tokens\.weight' holds NaN or infinity"):
        streamed.logits([1, 7])


def test_a_model_that_does_not_fit_is_streamed(build, saved, monkeypatch):
    folder = saved(build("llama"))
    n_bytes = load_model(folder, device="cpu").n_bytes
    assert not load_model(folder, device="cpu").stream
    for free, dtype, streams in (
        (n_bytes * 4 // 3 + 1, "auto", False),
        (n_bytes, "auto", True),
        (n_bytes, "bfloat16", False),
        (n_bytes, "float64", True),
    ):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        loaded = load_model(folder, device="cpu", dtype=dtype)
        assert loaded.stream == streams
        assert ("streamed" in repr(loaded)) == streams
    assert model_weights.fits is memory.fits


# ------------------------------------------------------------------------------------- memory

MEMINFO = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   10000000 kB\n"


def files(root, contents):
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({}, 10_000_000 << 10),
        # Version 2: the group that leaves least, its cache of files counted as free, but not shared memory.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.current": "5000\n",
                "sys/fs/cgroup/a/b/memory.max": "9000000\n",
                "sys/fs/cgroup/a/b/memory.current": "8000000\n",
                "sys/fs/cgroup/a/b/memory.stat": "anon 5000000\nfile 3000000\nshmem 1000000\n",
            },
            9_000_000 - 8_000_000 + 2_000_000,
        ),
        # In a container the group is at the top.
        (
            {
                "proc/self/cgroup": "0::/elsewhere\n",
                "sys/fs/cgroup/memory.max": "7000\n",
                "sys/fs/cgroup/memory.current": "1000\n",
            },
            6000,
        ),
        # Version 1.
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n3:memory:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "7000\n",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "5000\n",
                "sys/fs/cgroup/memory/x/memory.stat": "total_cache 500\n",
            },
            2500,
        ),
        # Used beyond the limit.
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "7000\n",
                "sys/fs/cgroup/memory.current": "8000\n",
            },
            0,
        ),
    ],
)
def test_available_memory(contents, expected, tmp_path):
    assert memory.available(root=files(tmp_path, {"proc/meminfo": MEMINFO, **contents})) == expected


def test_available_memory_here_and_where_nothing_is_known(tmp_path):
    assert 1 << 20 < memory.available() < 1 << 50
    assert memory.available(torch.device("cpu"), tmp_path) == 8 << 30
