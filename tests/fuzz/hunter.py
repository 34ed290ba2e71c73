"""Sends broken files to prey.py, and says what came of them; strategies for breaking them."""

import json
import selectors
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

MEMORY = 512 << 20  # bytes that reading a small file may take
PATIENCE = 60  # seconds, of a machine that has other things to do as well


class Hunter:
    """A process that reads what it is told to, started again where it dies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        prey = Path(__file__).with_name("prey.py")
        with open(self.folder / "stderr", "w") as said:
            process = subprocess.Popen(
                [sys.executable, prey, str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                cwd=self.folder,
            )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", (self.folder / "stderr").read_text()
        return process

    def ask(self, target: str, path: Path) -> dict[str, str]:
        """What comes of it: "ok", "refused", "raised", "died" or "hung"."""
        self.process = self.process or self.start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"target": target, "path": str(path)}), file=self.process.stdin, flush=True)
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            ready = waiting.select(PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if line:
            found: dict[str, str] = json.loads(line)
            return found
        self.close()
        said = (self.folder / "stderr").read_text()[-2000:]
        return {"outcome": "died" if ready else "hung", "text": said}

    def check(self, target: str, seed: Path, broken: dict[str, bytes], right: str | None = None) -> str:
        """The outcome for a folder with some files changed, which must be a right result or one sentence.

        Args:
            right: the digest of the only right result, if there is only one.
        """
        folder = self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.folder / "converted", ignore_errors=True)
        shutil.copytree(seed, folder, symlinks=True)
        for name, content in broken.items():
            (folder / name).write_bytes(content)
        outside = sorted(self.folder.parent.iterdir())
        found = self.ask(target, folder)
        assert found["outcome"] in ("ok", "refused"), found
        if found["outcome"] == "ok":
            assert right in (None, found["text"]), "a wrong result"
        else:
            assert "\n" not in found["text"], found["text"]
            assert 0 < len(found["text"]) <= 1000
        assert sorted(self.folder.parent.iterdir()) == outside
        return found["outcome"]

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


# Breaking files --------------------------------------------------------------------------------------------

_DEEP, _LONG, _HUGE = "@deep@", "@long@", "@huge@"
_RAW = {
    f'"{_DEEP}"': "[" * 100_000 + "]" * 100_000,
    f'"{_LONG}"': "1" * 5_000,
    f'"{_HUGE}"': '"' + "x" * 20_000 + '"',
}
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 10**9, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**30]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), 2.0]),
    st.integers(-5, 80),
    st.sampled_from(["", "0", "x", "..", "../../x", "/etc/passwd", "a/b", "\x00", "\ud800", "\n", _HUGE]),
    st.sampled_from([_DEEP, _LONG, "F64", "BF16", "I8", "gptj", "llama", "gelu", "model.safetensors"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, v in inside for p in places(v, (*path, key)))]


@st.composite
def broken_json(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with a few of its parts replaced, left out or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["put", "put", "put", "drop", "name", "move"]))
        if kind == "put":
            holder[path[-1]] = draw(VALUES)
        elif kind == "drop":
            del holder[path[-1]]
        elif isinstance(holder, dict) and kind == "name":
            holder[draw(LEAVES.filter(lambda v: isinstance(v, str)))] = holder.pop(path[-1])
        elif isinstance(holder, dict):
            other = draw(st.sampled_from(sorted(holder)))
            holder[path[-1]], holder[other] = holder[other], holder[path[-1]]
        else:
            holder.append(holder[path[-1]])
    return value


def as_text(value: Any) -> str:
    """JSON, with what Python would not write itself."""
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(mark, raw)
    return text


@st.composite
def broken_text(draw: st.DrawFn, value: Any) -> bytes:
    """The bytes of a JSON file that is broken in its values or in its bytes."""
    if draw(st.integers(0, 3)):
        return as_text(draw(broken_json(value))).encode("utf-8", "surrogatepass")
    return draw(broken_bytes(json.dumps(value).encode()))


@st.composite
def broken_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes changed, cut off, doubled, put in or taken out."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        size = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(["flip", "cut", "put", "take", "double", "fill"]))
        if kind == "flip":
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "put":
            content = content[:at] + draw(st.binary(min_size=size, max_size=size)) + content[at:]
        elif kind == "take":
            content = content[:at] + content[at + size :]
        elif kind == "double":
            content = content[:at] + content[at : at + size] + content[at:]
        else:
            content = content[:at] + bytes([draw(st.sampled_from([0, 255]))]) * size + content[at + size :]
    return content


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(header: str, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; its header may lie about its length."""
    raw = header.encode("utf-8", "surrogatepass")
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


@st.composite
def broken_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file that is broken in its header, in its length or in its bytes."""
    header, data = split(content)
    kind = draw(st.sampled_from(["header", "header", "offsets", "shape", "length", "bytes", "twice"]))
    if kind == "bytes":
        return draw(broken_bytes(content))
    if kind == "header":
        return joined(as_text(draw(broken_json(header))), data)
    name = draw(st.sampled_from(sorted(n for n in header if n != "__metadata__")))
    entry = header[name]
    if kind == "twice":  # one name, two tensors
        other = draw(st.sampled_from(sorted(n for n in header if n != "__metadata__")))
        return joined(json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}", data)
    if kind == "length":
        right = len(json.dumps(header).encode())
        sizes = st.sampled_from([0, 1, right - 1, right + 1, right + 8, 10**8, 2**31, 2**63, 2**64 - 1])
        return joined(json.dumps(header), data, draw(sizes))
    numbers = st.sampled_from([0, 1, 2, 4, 8, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 10**30, -1, len(data)])
    if kind == "offsets":
        at = draw(st.integers(0, 1))
        entry["data_offsets"][at] = draw(numbers | st.integers(0, len(data)))
    else:
        entry["shape"] = draw(st.lists(numbers, max_size=4))
        if draw(st.booleans()):
            entry["data_offsets"] = [0, 0]
    return joined(json.dumps(header), data)
