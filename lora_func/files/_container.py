"""Files of tensors, whole or not there: written beside, verified, renamed; read strictly."""

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_func.errors import AdapterFileError

FORMAT = 1
OURS = "lora_func"
"""The entry of a file's metadata that is ours: JSON."""


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        kind: What it is a file of.
        tensors: Its tensors, on the CPU.
        facts: What we say of them, as far as JSON knows it.
        metadata: What the user says; text by name.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    metadata: Mapping[str, str]


def write(path: Path, content: Content) -> None:
    """Write a file, such that whenever the process dies the old file or the new one stands there.

    Args:
        path: Where.
        content: What.

    Raises:
        TypeError: If the metadata is no text, or JSON does not know a fact.
        ValueError: If a name in it is taken.
        OSError: If the file cannot be written, or holds something else when it is read again.
    """
    from safetensors.torch import save

    for name, value in content.metadata.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"metadata: got {name!r}: {value!r}, expected text by name")
        if name in (OURS, "format"):
            raise ValueError(f"metadata: the name {name!r} is taken; choose another")
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in content.tensors.items()
    }
    # as it will be read
    facts = json.loads(json.dumps(content.facts))
    content = content._replace(tensors=tensors, facts=facts)
    ours = {
        "format": FORMAT,
        "version": version("lora_func"),
        "kind": content.kind,
        "names": [*tensors],
        "crc32": _checksum(content),
        "facts": facts,
    }
    written = save(tensors, {**content.metadata, OURS: json.dumps(ours)})

    def verify(beside: Path) -> None:
        again = read(beside, content.kind).tensors
        if any(not torch.equal(bits(again[name]), bits(tensors[name])) for name in tensors):
            raise OSError(f"{path}: what was written is not what is read; nothing was replaced")

    replace_file(path, written, verify)


def replace_file(
    path: Path, written: bytes, verify: Callable[[Path], None] = lambda beside: None
) -> None:
    """Write a file beside another, and put it in its place.

    Args:
        path: The file.
        written: What it is to hold.
        verify: Called with the new file before it takes its place; raises if it may not.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(os.path.realpath(path))  # what a link leads to, not the link
    if path.is_dir():
        raise OSError(f"{path}: is a folder; give the path of a file")
    beside = path.with_name(f".{uuid.uuid4().hex[:12]}.tmp")
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


def read(path: Path, kind: str) -> Content:
    """Read a file that ``write`` has written.

    Args:
        path: Where.
        kind: What it is to be a file of.

    Returns:
        What it holds, in memory of its own.

    Raises:
        FileNotFoundError: If there is none.
        AdapterFileError: If it is another file, of another format, or broken.
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
    except Exception as error:  # whatever a parser makes of a file that is none
        raise AdapterFileError(f"{path}: {_guess(path)} ({error})") from error
    if OURS not in metadata:
        raise AdapterFileError(
            f"{path}: a safetensors file that lora_func has not written; load its tensors with "
            "safetensors.torch.load_file, or a PEFT checkpoint with lora_func.peft.from_peft"
        )
    try:
        ours = json.loads(metadata.pop(OURS))
        kept = tuple(ours[name] for name in ("format", "kind", "names", "crc32", "facts"))
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(f"{path}: its metadata are broken ({error!r})") from error
    its_format, its_kind, names, checksum, facts = kept
    if its_format != FORMAT:
        raise AdapterFileError(
            f"{path}: has format version {its_format!r}, this release reads {FORMAT}; lora_func "
            f"{ours.get('version')} has written it"
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
        checksum = zlib.crc32(bits(tensor).numpy().data, checksum)
    return checksum


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's memory, byte by byte."""
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
