"""Checkpoints that can be trusted: written in the background, whole or not at all, and checked before they are used.

One folder a step, written by Orbax; beside Orbax's files lies `sha256.json`, the SHA-256 of each of them. It is written
before the folder gets its final name, so that no committed step is without one. Orbax itself does not notice a flipped
bit and does not look past a broken newest step; `Checkpoints.restore` does both, and says what it left aside.

    checkpoints/1000/state/...      every array of the TrainState, by its dotted name
    checkpoints/1000/notes/...      JSON: the config, the place of the data loader
    checkpoints/1000/sha256.json

Arrays come back bit for bit, on any mesh.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from sora_jax.errors import NoRoomError, UserError
from sora_jax.training.array_names import by_name, bytes_of, check_arrays, from_names
from sora_jax.training.files import COMMITTED, is_url, no_room

MANIFEST = "sha256.json"
# A process reads what its devices hold, in whole chunks of an array, and never more at once than the largest array and
# READ_AHEAD: so a state that fits the devices of a pod need not fit its hosts, whatever mesh it was saved on.
CHUNK = READ_AHEAD = 2**24  # bytes
# Orbax writes the time of the commit into this one after everything else.
_UNHASHED = frozenset({MANIFEST, "_CHECKPOINT_METADATA", COMMITTED})


_log = logging.getLogger(__name__)


@contextlib.contextmanager
def _silent_orbax() -> Iterator[None]:
    """A manager that only reads warns, twice, that it does."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _RoomIsOurs(logging.Filter):
    """Keeps pages of tracebacks that Orbax's threads log about a full disk back: `NoRoomError` says it in a line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not no_room(error or RuntimeError(record.getMessage()))


_room_is_ours = _RoomIsOurs()


def check_place(folder: epath.PathLike) -> None:
    """Raises `UserError` for what is no place for checkpoints, before anything is looked for or made there."""
    if not os.fspath(folder):
        raise UserError('a run needs a workdir, and "" names none: give a folder (. for this one) or a gs:// URL')
    if is_url(folder) and not os.fspath(folder).startswith("gs://"):
        raise UserError(f"checkpoints go to a folder or to gs://, where Orbax can write, and not to {folder}")


class Restored(NamedTuple):
    """A step that was read back."""

    step: int
    state: Any  # a tree like the one asked for
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of one folder (a path or a URL). `say` gets one line for each thing worth knowing."""

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep: int | None = None,
        read_only: bool = False,
        say: Callable[[str], None] = _log.warning,
    ):
        check_place(folder)
        # Orbax wants to know where from the root; a URL stays as it is.
        self.folder = epath.Path(folder if is_url(folder) else os.path.abspath(folder))
        self._say = say
        self._read_only = read_only
        self._keep = keep
        self._saving: int | None = None
        logging.getLogger("absl").addFilter(_room_is_ours)  # the same one again changes nothing
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        keep, read_only = self._keep, self._read_only
        with _silent_orbax() if read_only else contextlib.nullcontext():
            return ocp.CheckpointManager(
                self.folder,
                item_names=("state", "notes"),
                item_handlers={"state": ocp.PyTreeCheckpointHandler(), "notes": ocp.JsonCheckpointHandler()},
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,  # what a killed run left half-written
                    enable_async_checkpointing=not read_only,
                    async_options=(
                        None if read_only else ocp.AsyncOptions(post_finalization_callback=self._write_manifest)
                    ),
                ),
            )

    # ------------------------------------------------------------------------------------------------------------ save

    def save(self, step: int, state: Any, notes: Mapping[str, Any]) -> None:
        """Start to write `state` and the JSON-able `notes` as `step`; returns once the arrays may be overwritten.

        A failure in the background (a full disk, say) raises here at the next save, or in `wait`.
        """
        self.wait()
        self._saving = step
        arrays = by_name(state)
        self._check_room(sum(map(bytes_of, arrays.values())))
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays, save_args=dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=CHUNK))),
            notes=ocp.args.JsonSave(dict(notes)),
        )
        with self._failures_told():
            self._manager.save(step, args=arguments, force=True)

    def _check_room(self, needed: int) -> None:
        """Before Orbax begins to write, and fails in several threads that all report it. Of several processes one alone
        might find its disk full, and leave the others waiting."""
        if is_url(self.folder) or jax.process_count() > 1:
            return
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._no_room(
                f"{os.strerror(errno.ENOSPC)}, it takes {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} are left"
            )

    def _no_room(self, reason: str) -> NoRoomError:
        return NoRoomError(
            f"checkpoint {self._saving} cannot be written to {self.folder}: {reason}; those before it are as they "
            "were. Make room and give the same command again"
        )

    def _write_manifest(self) -> None:
        """Runs in Orbax's background thread on the first process, after all data is written, before the commit."""
        # On object stores the folder has its final name from the start.
        unfinished = list(self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        folder = unfinished[0] if unfinished else self.folder / str(self._saving)
        (folder / MANIFEST).write_text(json.dumps(_hashes(folder, sorted(_names(folder))), indent=1))

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong in the background."""
        with self._failures_told():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._forget_failure()
            if reason := no_room(error):
                raise self._no_room(reason) from error
            raise

    def _forget_failure(self) -> None:
        """Orbax fails in several threads, names the step its newest all the same, and would raise again later."""
        if jax.process_count() > 1:  # a new manager would wait for the other processes
            self._manager.reload()
            return
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = self._open()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def reached_preemption(self, step: int) -> bool:
        """True on all processes at the same step after any of them was told to stop (jax.distributed runs only)."""
        return self._manager.reached_preemption(step)

    # --------------------------------------------------------------------------------------------------------- restore

    def steps(self) -> list[int]:
        """Committed steps, oldest first; a save that is under way is waited for."""
        self.wait()
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def size(self, step: int) -> int:
        """Bytes of all files of a step."""
        return sum(path.stat().length for path in _files(self.folder / str(step)))

    def notes(self, step: int) -> dict[str, Any]:
        return self._read(step, "notes", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Every array of a step by its dotted name, in host memory; random keys as the words they are made of."""
        names = self._saved(step)
        as_numpy = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
        arguments = ocp.args.PyTreeRestore(dict.fromkeys(names, 0), restore_args=as_numpy)
        return self._read(step, "state", ocp.PyTreeCheckpointHandler(), arguments)

    def _saved(self, step: int) -> dict[str, Any]:
        """Shape and dtype of every array of a step."""
        tree = ocp.PyTreeCheckpointHandler().metadata(self.folder / str(step) / "state")
        # Orbax has wrapped this tree in different classes over time; each can be indexed by key.
        return {name: tree[name] for name in tree}

    def _read(self, step: int, item: str, handler: Any, arguments: Any) -> Any:
        """Not by the manager, which reads nothing any more from a store in which one of its saves has failed."""
        return handler.restore(self.folder / str(step) / item, args=arguments)

    def newest_good(self) -> int | None:
        """The newest step whose files are what they were when they were written; says which newer ones are not.

        None when the folder has no checkpoint. Raises `UserError` when there are some and none is good.
        """
        return self._walk_back()[0]

    def _walk_back(self) -> tuple[int | None, list[int]]:
        """The newest good step, and the newer ones, which are damaged."""
        steps = self.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            if not (fault := self.fault(step)):
                return step, damaged
            damaged.append(step)
            self._say(f"checkpoint {step} is damaged ({fault}); going back to the one before")
        if steps:
            raise UserError(f"every checkpoint in {self.folder} is damaged (steps {', '.join(map(str, steps))})")
        return None, []

    def restore(self, like: Any, *, part: str = "", since: Collection[str] = ()) -> Restored | None:
        """The newest good step as a tree like `like`, whose leaves give shape, dtype and (if any) sharding.

        `part` names the branch of the saved state that `like` is: `restore(params, part="ema")` reads nothing else.
        `since` names the branches that a checkpoint of an older version may lack; they are zeros then.
        None when there is no checkpoint. Raises `UserError`, naming the array, when the saved arrays are not those of
        `like` (Orbax would cast a wrong dtype in silence).
        """
        step, damaged = self._walk_back()
        if step is None:
            return None
        if damaged and not self._read_only:
            self._set_aside(damaged)
        wanted = by_name(like, part)
        saved = {name: meta for name, meta in self._saved(step).items() if not part or name.startswith(part + ".")}
        lacking = [name for name in wanted if name not in saved and name.partition(".")[0] in since]
        added = {name: wanted[name] for name in lacking}
        wanted = {name: leaf for name, leaf in wanted.items() if name not in added}
        check_arrays(step, wanted, saved)
        arguments = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype, strict=True), wanted
        )
        largest = max((bytes_of(leaf) for leaf in wanted.values()), default=0)
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=(largest + READ_AHEAD) / 10**9)
        asked = ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=bool(part))
        arrays = self._read(step, "state", handler, asked)
        zeros = {name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) for name, leaf in added.items()}
        return Restored(step, from_names(arrays | zeros, like, part), self.notes(step))

    def _set_aside(self, damaged: Collection[int]) -> None:
        """Make way for new checkpoints of the steps that are damaged: 3 becomes 3.damaged, which nobody reads."""
        if jax.process_index() == 0:
            for step in damaged:
                aside = self.folder / f"{step}.damaged"
                if aside.exists():
                    aside.rmtree()
                (self.folder / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()

    def fault(self, step: int) -> str:
        """What is wrong with the files of a step, every byte of them read; empty when nothing is.

        Each of several processes reads its share of the files, and all come to the same verdict.
        """
        folder = self.folder / str(step)
        try:
            expected = json.loads((folder / MANIFEST).read_text())
            there = _names(folder)
            share = sorted(expected.keys() | there)[jax.process_index() :: jax.process_count()]
            found = _hashes(folder, there.intersection(share))
            fault = next((fault for name in share if (fault := _difference(name, expected, found))), "")
        except (OSError, ValueError) as error:
            fault = f"its files cannot be read: {type(error).__name__}"
        return _first_of_all(fault)


def _difference(name: str, expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    if name not in found:
        return f"{name} is missing"
    return f"{name} has changed" if found[name] != expected.get(name) else ""


def _first_of_all(fault: str) -> str:
    """What the first process that has something to say says, the same in all of them."""
    if jax.process_count() == 1:
        return fault
    said = np.zeros(512, np.uint8)
    words = np.frombuffer(fault.encode(), np.uint8)[: said.size]
    said[: words.size] = words
    each = np.asarray(multihost_utils.process_allgather(said))
    return next((bytes(words[words > 0]).decode(errors="replace") for words in each if words.any()), "")


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    pending = [folder]
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir():
                pending.append(path)
            else:
                yield path


def _names(folder: epath.Path) -> set[str]:
    """The files under `folder` that a manifest lists, by their relative paths."""
    return {str(path.relative_to(folder)) for path in _files(folder) if path.name not in _UNHASHED}


def _hashes(folder: epath.Path, names: Collection[str]) -> dict[str, str]:
    """SHA-256 by name; hashing lets go of the interpreter's lock, so files are read side by side."""

    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            hashed = hashlib.sha256()
            while block := file.read(1 << 22):
                hashed.update(block)
        return hashed.hexdigest()

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
