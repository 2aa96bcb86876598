"""Files of tensors: written beside the old file, verified and renamed; read strictly."""

import json
import os
import platform
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_func.errors import AdapterFileError
from lora_func.version import __version__

FORMAT = 1
ENTRY = "lora_func"
"""The entry of a file's metadata that this library writes: JSON."""


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        kind: The kind of content: "adapter".
        tensors: Its tensors, on the CPU.
        facts: What the library says about the tensors, as JSON.
        metadata: What the user says, text by name.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    metadata: Mapping[str, str]


def write(path: Path, content: Content) -> None:
    """Write a file. If the process dies at any moment, the old file or the new one remains.

    Args:
        path: The path of the file.
        content: Its content.

    Raises:
        TypeError: If the metadata is not text, or a fact is not JSON.
        ValueError: If a name in the metadata is reserved.
        OSError: If the file cannot be written, or differs when it is read again.
    """
    from safetensors.torch import save

    for name, value in content.metadata.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"metadata: got {name!r}: {value!r}, expected text by name")
        if name in (ENTRY, "format"):
            raise ValueError(f"metadata: the name {name!r} is taken; choose another")
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in content.tensors.items()
    }
    # the facts as they will be read
    facts = json.loads(json.dumps(content.facts))
    content = content._replace(tensors=tensors, facts=facts)
    entry = {
        "format": FORMAT,
        "version": __version__,
        "kind": content.kind,
        "names": [*tensors],
        "crc32": _checksum(content),
        "facts": facts,
    }
    written = save(tensors, {**content.metadata, ENTRY: json.dumps(entry)})

    def verify(beside: Path) -> None:
        again = read(beside, content.kind).tensors
        if any(
            not torch.equal(byte_view(again[name]), byte_view(tensors[name])) for name in tensors
        ):
            raise OSError(f"{path}: what was written is not what is read; nothing was replaced")

    replace_file(path, written, verify)


def replace_file(
    path: Path, written: bytes, verify: Callable[[Path], None] = lambda beside: None
) -> None:
    """Write a file beside an old one, and replace the old one.

    Temporary files that a killed process left for this path are removed.

    Args:
        path: The file.
        written: Its new content.
        verify: Called with the path of the new file before it replaces the old one; raises to
            refuse it.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(os.path.realpath(path))  # the target of a link, not the link
    if path.is_dir():
        raise OSError(f"{path}: is a folder; give the path of a file")
    own = f".{zlib.crc32(path.name.encode()):08x}.{zlib.crc32(platform.node().encode()):08x}"
    for left in path.parent.glob(f"{own}.*.tmp"):
        _remove_if_left(left)
    beside = path.with_name(f"{own}.{os.getpid()}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        verify(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":
        _flush_folder(path.parent)


def _remove_if_left(temporary: Path) -> None:
    """Remove a temporary file of this machine, if the process that wrote it is gone."""
    process = int(temporary.name.split(".")[3])
    try:
        # elsewhere the signal would kill the process, and an open file cannot be removed
        if os.name == "posix":
            os.kill(process, 0)
            return
    except ProcessLookupError:
        pass
    except OSError:
        return
    with suppress(OSError):
        temporary.unlink()


def kind_of(path: Path) -> str:
    """Return the kind of content of a file that ``write`` has written; "" for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            entry = json.loads((file.metadata() or {}).get(ENTRY, "{}"))
            return str(entry.get("kind", ""))
    except (OSError, ValueError, SafetensorError):
        return ""


def read(path: Path, kind: str) -> Content:
    """Read a file that ``write`` has written.

    Args:
        path: The path of the file.
        kind: The expected kind of content.

    Returns:
        Its content, in new memory.

    Raises:
        FileNotFoundError: If there is no file.
        AdapterFileError: If the file is of another kind or format, or is damaged.
    """
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if not path.is_file():
        raise AdapterFileError(f"{path}: is no file; give the path of a safetensors file")
    try:
        # an inference tensor could not be trained
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # copies: in a mapped file tensors are not aligned, and kernels may round differently
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a parser may raise anything on a damaged file
        raise AdapterFileError(f"{path}: {_guess(path)} ({error})") from error
    if ENTRY not in metadata:
        raise AdapterFileError(
            f"{path}: a safetensors file that lora_func has not written; load its tensors with "
            "safetensors.torch.load_file, or a PEFT checkpoint with lora_func.peft.from_peft"
        )
    try:
        entry = json.loads(metadata.pop(ENTRY))
        kept = tuple(entry[name] for name in ("format", "kind", "names", "crc32", "facts"))
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(f"{path}: its metadata are broken ({error!r})") from error
    its_format, its_kind, names, checksum, facts = kept
    if its_format != FORMAT:
        raise AdapterFileError(
            f"{path}: has format version {its_format!r}, this release reads {FORMAT}; lora_func "
            f"{entry.get('version')} has written it"
        )
    if its_kind != kind:
        raise AdapterFileError(f"{path}: is a file of {its_kind!r}, expected {kind!r}")
    content = Content(kind, {n: found[n] for n in names if n in found}, facts, metadata)
    if found.keys() != content.tensors.keys() or _checksum(content) != checksum:
        raise AdapterFileError(f"{path}: its checksum is wrong; the file has been damaged")
    return content


def _checksum(content: Content) -> int:
    about = [[n, str(t.dtype), [*t.shape]] for n, t in content.tensors.items()]
    said = [content.kind, content.facts, {**content.metadata}, about]
    checksum = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for tensor in content.tensors.values():
        checksum = zlib.crc32(byte_view(tensor).numpy().data, checksum)
    return checksum


def byte_view(tensor: Tensor) -> Tensor:
    """Return a tensor's memory as bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def _guess(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" or start[:1] == b"\x80":
        return "looks like a pickle or a zip, which is never loaded; expected a safetensors file"
    return "is no safetensors file, or a broken one"


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
