"""Read the tensors of a TorchScript archive, the form of the CLIP checkpoints that OpenAI published, and run nothing of it.

`torch.jit.load` compiles a program that comes with the file and may run parts of it, and Python's pickle imports and calls
what a file names; neither is for a file from elsewhere. In an archive, a ZIP file, `data.pkl` describes the modules, and
`data/0`, `data/1`, ... hold the bytes of their tensors, uncompressed. Here the operations of `data.pkl` are read as data:
modules become dictionaries, the one function that is known makes a tensor of such bytes, and any other one ends the reading.
The program (`code/`) is never looked at.
"""

import pickletools
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vipbench.harness.errors import UserError

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
DESCRIPTION_BYTES = 64 * 2**20  # of data.pkl, at most; OpenAI's are below 1 MiB
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Buffers of OpenAI's modules that are numbers about the model. No other archive has them, so they identify OpenAI's.
OPENAI_BUFFERS = {"input_resolution", "context_length", "vocab_size"}


@dataclass(frozen=True)
class Name:
    """A class or function that the archive names."""

    module: str
    name: str


@dataclass
class Module:
    """A module of the archive: parameters, buffers, submodules and other attributes by name."""

    attributes: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their dotted names; a module that lies in several places is taken once, so that no loop is endless."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        todo = [("", self)]
        while todo:
            prefix, module = todo.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            for name, value in module.attributes.items():
                if isinstance(value, Tensor):
                    found[f"{prefix}{name}"] = value
                elif isinstance(value, Module):
                    todo.append((f"{prefix}{name}.", value))
        return found


def is_torchscript(path: Path) -> bool:
    """Return True for a TorchScript archive: a ZIP file with compiled constants beside the data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_openai(path: Path) -> dict[str, Tensor]:
    """Weights of an archive that OpenAI published, under the names that open_clip's models have for them.

    Raises:
        UserError: it is the archive of another model.
        Exception: of several kinds, where it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        tensors = _Reader(path, archive).read().tensors()
    if not tensors.keys() >= OPENAI_BUFFERS:
        raise UserError(
            f"{path}: a TorchScript archive, but none of OpenAI's CLIP models, so that its activation function is not known; "
            "save the model's state_dict as safetensors"
        )
    # The causal mask is an attribute of the blocks there; models make their own.
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in OPENAI_BUFFERS and name.rpartition(".")[2] != "attn_mask"
    }


class _Reader:
    """The modules of one archive."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.archive, self.storages = archive, dict[str, Tensor]()
        self.root = archive.namelist()[0].partition("/")[0]
        records = [record for record in archive.infolist() if record.filename.startswith(f"{self.root}/data")]
        if any(record.compress_type != zipfile.ZIP_STORED for record in records) or (
            sum(record.file_size for record in records) > path.stat().st_size
        ):
            raise ValueError("its records are compressed or overlap")

    def read(self) -> Module:
        """Build the model from its description."""
        record = self.archive.getinfo(f"{self.root}/data.pkl")
        if record.file_size > DESCRIPTION_BYTES:
            raise ValueError(f"data.pkl has {record.file_size} bytes")
        model = self._evaluate(self.archive.read(record))
        if not isinstance(model, Module):
            raise ValueError("it holds no module")
        return model

    def _evaluate(self, description: bytes) -> Any:
        """The value that a description builds, by the operations that torch writes and no others."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            place = marks.pop()
            items = stack[place:]
            del stack[place:]
            return items

        argument: Any
        for opcode, argument, _ in pickletools.genops(description):
            name = opcode.name
            if name in VALUES:
                stack.append(argument)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name == "GLOBAL":
                stack.append(Name(*argument.split(" ", 1)))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in TUPLES:
                stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
            elif name in ("APPEND", "APPENDS"):
                items = [stack.pop()] if name == "APPEND" else since_mark()
                stack[-1].extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            elif name in ("NEWOBJ", "REDUCE"):
                arguments, called = stack.pop(), stack.pop()
                stack.append(self._call(called, arguments))
            elif name == "BUILD":
                attributes = stack.pop()
                stack[-1].attributes.update(attributes)
            elif name == "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            elif name == "STOP":
                return stack.pop()
            elif name != "PROTO":
                raise ValueError(f"an operation {name} is not expected")
        raise ValueError("its description has no end")

    def _call(self, called: Name, arguments: tuple[Any, ...]) -> Any:
        if called.module.startswith("__torch__"):
            return Module()
        if called == Name("torch._utils", "_rebuild_tensor_v2"):
            storage, offset, size, stride = arguments[:4]
            return torch.as_strided(storage, size, stride, offset)  # checks that it lies within the storage
        if called == Name("collections", "OrderedDict"):
            return {}
        if called.module == "torch.jit._pickle":  # lists of one type: the list itself
            return arguments[0]
        raise ValueError(f"a call of {called.module}.{called.name} is not expected")

    def _storage(self, kind: str, dtype: Name, key: str, *_: Any) -> Tensor:
        """The bytes of a record as a flat tensor, wherever they were when they were saved."""
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.root}/data/{key}"))  # checks the checksum
            self.storages[key] = torch.frombuffer(content, dtype=DTYPES[dtype.name])
        return self.storages[key]
