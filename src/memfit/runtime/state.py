"""Saves and loads the state of a training run: killed at any moment, it resumes bit for bit.

A run folder holds one sub-folder for each of the last checkpoints and the name of the newest::

    DIR/latest                          "step-00000012"
    DIR/step-00000012/model.safetensors      parameters and buffers
    DIR/step-00000012/optimizer.safetensors  the optimizer's tensors
    DIR/step-00000012/random.safetensors     generator states
    DIR/step-00000012/state.json             everything that is not a tensor, and a checksum of each file

Rule 1  A checkpoint is written into ``step-N.tmp``, flushed to the disk, and then renamed: a folder with its
        final name is whole.
Rule 2  ``latest`` is replaced by one ``os.replace`` after that: it always names a whole checkpoint.
        It is renamed back before it is removed.
Rule 3  The previous checkpoint is removed only once it is two behind. A failed save removes nothing but its
        own half-written folder.

Tensors are written one by one straight from their own memory: saving needs no copy of the model, which
matters under a memory limit.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from memfit.core.stored import decode, is_intact, read, sealed, short, told

FORMAT = "memfit-checkpoint"
VERSION = 1
KEEP = 2  # checkpoints that stay
_STEP_NAME = re.compile(r"step-([0-9]{8,18})")
_CHUNK_BYTES = 1 << 20
# A full disk, a full quota, a file size limit.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Tensors = dict[str, torch.Tensor]
# What a state of other content than was saved may raise, in memfit, in torch or in an optimizer.
_NOT_FITTING = (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError, OverflowError)


class BadCheckpoint(ValueError):
    """A checkpoint folder that is corrupt, incomplete, or belongs to something else."""


@dataclass(frozen=True, slots=True)
class RandomState:
    """The state of every generator that training may draw from.

    Attributes:
        tensors: torch's generator states by device: ``cpu``, ``cuda:0``...
        python: The state of Python's ``random``.
        numpy: The state of numpy's global generator; ``None`` where numpy was not imported.
    """

    tensors: Tensors
    python: Any
    numpy: Any

    @staticmethod
    def capture() -> RandomState:
        """Returns the present state; changes none."""
        tensors = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            for index, state in enumerate(torch.cuda.get_rng_state_all()):
                tensors[f"cuda:{index}"] = state
        numpy = sys.modules.get("numpy")
        legacy = None if numpy is None else numpy.random.get_state(legacy=True)
        return RandomState(tensors, random.getstate(), None if legacy is None else _plain_numpy(legacy))

    def check(self) -> None:
        """Raises what :meth:`restore` would, and leaves every generator as it is."""
        now = RandomState.capture()
        try:
            self.restore()
        finally:
            now.restore()

    def restore(self) -> None:
        """Puts every generator back into this state."""
        for device, state in self.tensors.items():
            if device == "cpu":
                torch.set_rng_state(state)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(state, device)
        version, words, gauss = self.python
        random.setstate((version, tuple(words), gauss))
        if self.numpy is not None:
            import numpy

            numpy.random.set_state(tuple(self.numpy))


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands, besides its tensors.

    Attributes:
        step: Steps done; also the index of the next batch.
        micro_batch_size: Rows of a micro-batch of the plan in use; ``None`` for a plain run. Another size
            would add in another order and change the last bits.
    """

    step: int
    micro_batch_size: int | None = None


def save_checkpoint(
    folder: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Path:
    """Saves model, optimizer, random state and position; returns the checkpoint's folder.

    Safe against a kill at any moment: afterwards ``folder`` holds this checkpoint or the previous one, whole.
    A step that ``latest`` names already is not written again, because it could not be replaced in one stroke.

    Raises:
        ValueError: The state holds something that is neither a tensor nor plain data.
        OSError: The disk is full or cannot be written; the previous checkpoint is untouched.
    """
    final = folder / f"step-{position.step:08d}"
    partial = folder / f"{final.name}.tmp"
    if latest_checkpoint(folder) == final:
        return final
    _remove(final)  # a later one of a future that was given up
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_checkpoint(partial, position, model, optimizer)
        os.rename(partial, final)
        _sync_folder(folder)
        replace_text(folder / "latest", final.name)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _explained(error, final) from error
    _remove_others(folder, position.step)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint in ``folder``, ``None`` if the run was stopped before its first.

    Raises:
        BadCheckpoint: ``latest`` is not what memfit writes, or names a folder that is not there.
    """
    pointer = folder / "latest"
    try:
        name = pointer.read_text("utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{pointer} cannot be read ({error}). {_others(folder)}") from error
    if not _STEP_NAME.fullmatch(name):
        raise BadCheckpoint(f"{pointer} does not name a checkpoint of memfit. {_others(folder)}")
    if not (folder / name).is_dir():
        raise BadCheckpoint(f"{pointer} names {name}, which is not there. {_others(folder)}")
    return folder / name


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Position, RandomState]:
    """Loads a checkpoint into ``model`` and ``optimizer``; returns position and random state to restore.

    Every file is checked before anything is changed.

    Raises:
        BadCheckpoint: A file is missing, damaged or foreign, or does not fit the model; names it and the
            cure.
    """
    content = _read_state(checkpoint)
    model_tensors = _read_tensors(checkpoint, "model", content)
    optimizer_tensors = _read_tensors(checkpoint, "optimizer", content)
    random_tensors = _read_tensors(checkpoint, "random", content)
    try:
        _fill_model(checkpoint, model, _unpack(content["model"], model_tensors))
        optimizer.load_state_dict(_unpack(content["optimizer"], optimizer_tensors))
        drawn = _unpack(content["random"], random_tensors)
        position = read(Position, content["position"], "a position")
        if position.step != _step_of(checkpoint):
            raise ValueError(f"it is of step {position.step}")
        state = RandomState(drawn["torch"], drawn["python"], drawn["numpy"])
        state.check()
    except BadCheckpoint:
        raise
    except _NOT_FITTING as error:
        raise BadCheckpoint(
            f"{checkpoint} does not fit this model and optimizer: {short(error)}. Resume with the TARGET and "
            f"the options the run was started with, or start anew in another --out."
        ) from error
    return position, state


def replace_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``: a reader, and a kill, finds the old text or the new, never a part.

    Raises:
        OSError: It cannot be written; it names the file.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    _sync_folder(path.parent)


def _write_checkpoint(
    partial: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Writes the files of a checkpoint into ``partial`` and flushes them to the disk."""
    drawn = RandomState.capture()
    parts: dict[str, object] = {
        "model": {"state": dict(model.state_dict()), "hidden": _hidden_buffers(model)},
        "optimizer": optimizer.state_dict(),
        "random": {"torch": drawn.tensors, "python": drawn.python, "numpy": drawn.numpy},
    }
    content: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        "position": {"step": position.step, "micro_batch_size": position.micro_batch_size},
    }
    checksums: dict[str, int] = {}
    for name, part in parts.items():
        tensors: Tensors = {}
        content[name] = _pack(part, name, tensors, {})
        checksums[name] = _write_tensors(partial / f"{name}.safetensors", tensors)
    content["checksums"] = checksums
    replace_text(partial / "state.json", sealed(content))


def _hidden_buffers(model: nn.Module) -> Tensors:
    """Returns the buffers that ``state_dict`` leaves out, without which a run could not be resumed."""
    shown = set(model.state_dict(keep_vars=True))
    return {name: buffer for name, buffer in model.named_buffers() if name not in shown}


def _fill_model(checkpoint: Path, model: nn.Module, saved: Any) -> None:
    """Copies the saved parameters and buffers into ``model``; its ties between them stay."""
    buffers = dict(model.named_buffers())
    if set(saved["hidden"]) != set(_hidden_buffers(model)):
        raise BadCheckpoint(
            f"{checkpoint}/model.safetensors has other buffers than this model. Resume with the TARGET "
            f"the run was started with, or start anew in another --out."
        )
    model.load_state_dict(saved["state"])
    with torch.no_grad():
        for name, tensor in saved["hidden"].items():
            buffers[name].copy_(tensor)


def _pack(value: object, path: str, tensors: Tensors, known: dict[object, str]) -> object:
    """Returns ``value`` as JSON data, its tensors moved into ``tensors`` and referred to by name.

    Args:
        path: Where ``value`` stands, the name its tensor gets.
        known: Names of the tensors met so far by identity, so that a tied weight is saved once.
    """
    if isinstance(value, torch.Tensor):
        identity = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.storage_offset())
        key: object = identity if value.numel() else path
        if key not in known:
            known[key] = path if path not in tensors else f"{path}#{len(tensors)}"
            tensors[known[key]] = value
        name = known[key]
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, Mapping):
        items = value.items()
        return {"dict": [[_pack_key(k, path), _pack(v, f"{path}.{k}", tensors, known)] for k, v in items]}
    if isinstance(value, list | tuple):
        packed = [_pack(item, f"{path}.{index}", tensors, known) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": packed}
    raise ValueError(
        f"The training state holds a {type(value).__name__} at {path!r}, which cannot be saved. "
        f"Keep only tensors, numbers, strings, lists and dicts in the state of the model and the optimizer."
    )


def _pack_key(key: object, path: str) -> object:
    """Returns the key of a dictionary if JSON can hold it."""
    if isinstance(key, str | int):
        return key
    raise ValueError(f"The training state has a key of type {type(key).__name__} at {path!r}; use a name.")


def _unpack(packed: Any, tensors: Tensors) -> Any:
    """Returns what ``_pack`` was given."""
    ((kind, inner),) = packed.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "value":
        return inner
    if kind == "dict":
        return {key: _unpack(value, tensors) for key, value in inner}
    items = [_unpack(item, tensors) for item in inner]
    return tuple(items) if kind == "tuple" else items


def _write_tensors(path: Path, tensors: Tensors) -> int:
    """Writes ``tensors`` in the safetensors format, one at a time; returns the file's CRC-32."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPE_NAMES:
            raise ValueError(f"{name} has the type {tensor.dtype}, which cannot be saved.")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors at multiples of eight
    with open(path, "wb") as file:
        checksum = _write(file, len(text).to_bytes(8, "little") + text, 0)
        for tensor in tensors.values():
            checksum = _write(file, _content(tensor), checksum)
        file.flush()
        os.fsync(file.fileno())
    return checksum


def _content(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a tensor; copies it only where it is not on the CPU and contiguous already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write(file: BinaryIO, content: bytes | memoryview, checksum: int) -> int:
    """Writes ``content``; returns the checksum continued over it."""
    file.write(content)
    return zlib.crc32(content, checksum)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the content of ``state.json``, after checking that it is one of ours."""
    path = checkpoint / "state.json"
    try:
        content = decode(path.read_text("utf-8"), "the state of a run")
        if content.get("format") == FORMAT and content.get("version") == VERSION:
            is_intact(content, "the state of a run")
    except FileNotFoundError:
        raise BadCheckpoint(f"{path} is missing. {_others(checkpoint.parent)}") from None
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} is damaged ({error}). {_others(checkpoint.parent)}") from error
    if content.get("format") != FORMAT:
        raise BadCheckpoint(f"{path} was not written by memfit. Give the --out of a memfit run.")
    if content.get("version") != VERSION:
        raise BadCheckpoint(
            f"{path} has version {told(content.get('version'))} and this memfit reads version {VERSION}. "
            f"Resume with the memfit that wrote it."
        )
    wanted = {"position", "model", "optimizer", "random", "checksums"}
    if not wanted.issubset(content):
        missing = ", ".join(sorted(wanted.difference(content)))
        raise BadCheckpoint(f"{path} is damaged (no {missing}). {_others(checkpoint.parent)}")
    return content


def _read_tensors(checkpoint: Path, name: str, content: dict[str, Any]) -> Tensors:
    """Returns the tensors of one file of a checkpoint, after comparing its checksum."""
    path = checkpoint / f"{name}.safetensors"
    try:
        checksum = 0
        for chunk in _chunks(path):
            checksum = zlib.crc32(chunk, checksum)
        if not isinstance(content["checksums"], dict) or checksum != content["checksums"].get(name):
            raise BadCheckpoint(f"{path} is damaged (its checksum differs). {_others(checkpoint.parent)}")
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BadCheckpoint(f"{path} is missing. {_others(checkpoint.parent)}") from None
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path} cannot be read ({error}). {_others(checkpoint.parent)}") from error


def _chunks(path: Path) -> Iterator[bytes]:
    """Yields the content of a file in pieces of 1 MiB."""
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _checkpoints(folder: Path) -> list[Path]:
    """Returns the whole checkpoints of a run, the oldest first."""
    return sorted((path for path in folder.glob("step-*") if _STEP_NAME.fullmatch(path.name)), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    """Returns the step a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def _others(folder: Path) -> str:
    """Returns the cure for a damaged checkpoint: the others that are there."""
    names = [path.name for path in _checkpoints(folder)]
    if not names:
        return "Start anew in another --out."
    return (
        f"Go on from another checkpoint by writing its name into {folder / 'latest'} "
        f"(there: {', '.join(names)}), or start anew in another --out."
    )


def _remove_others(folder: Path, step: int) -> None:
    """Removes what is no longer needed once the checkpoint of ``step`` is the latest.

    That is all but the last ones up to ``step``, later ones (a future that was given up), and what killed
    saves left behind.
    """
    whole = _checkpoints(folder)
    kept = [path for path in whole if _step_of(path) <= step][-KEEP:]
    for path in [*(path for path in whole if path not in kept), *folder.glob("step-*.tmp")]:
        _remove(path)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; what a kill leaves of it must not have the name of a whole one."""
    if not checkpoint.exists():
        return
    if checkpoint.suffix != ".tmp":
        doomed = checkpoint.with_name(f"{checkpoint.name}.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            checkpoint.rename(doomed)
        except OSError:
            return
        checkpoint = doomed
    shutil.rmtree(checkpoint, ignore_errors=True)


def _explained(error: OSError, final: Path) -> OSError:
    """Returns an error that says what could not be saved, why, and that nothing was lost."""
    reason = "the disk is full" if error.errno in _NO_ROOM else (error.strerror or str(error))
    return OSError(
        error.errno,
        f"{final.name} could not be saved in {final.parent}: {reason}. The previous checkpoint is untouched. "
        f"Make room or the folder writable, and go on with --resume",
    )


def _sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to the disk: a rename is lasting only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain_numpy(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns numpy's generator state with its words as a list, which JSON can hold."""
    kind, words, position, has_gauss, gauss = state
    return (kind, [int(word) for word in words], position, has_gauss, gauss)
