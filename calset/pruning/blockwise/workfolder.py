"""A pruned checkpoint in the making, beside its place: whole when it is finished, continued when it was killed.

It begins as a copy of the dense model's weight files, so that a disk that is too small is known before the work; each
finished block's matrices replace the dense ones there, then a line in ``progress.jsonl`` says so. The line comes after
the bytes are on the disk: a block without one is done again, from the dense weights, and comes out the same.
It must not know how matrices are pruned.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.errors import CalsetError, InputError, PruningError, Stopped, first_line
from calset.io.files import existing_parent, size, sync
from calset.io.weights import INDEX, weight_files
from calset.pruning.model import checkpoint
from calset.pruning.model.tensorfiles import copy_files, read_headers, write_tensor

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = 64 << 20  # bytes of free disk beyond what is planned
PROGRESS = "progress.jsonl"
SHARES = "shares.json"  # of a measured allocation


def folder_of(out: Path) -> Path:
    """Where the work for ``out`` is done: beside it, so that the end is a rename."""
    return out.absolute().parent / f".{out.name}.calset-work"


def check_out(out: Path, n_bytes: int) -> None:
    """Refuse an output folder that holds something, and a disk that cannot hold ``n_bytes`` more.

    Raises:
        InputError: ``out`` is not a new or empty folder.
        CalsetError: too little free disk.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and holds something: name a new folder with -o")
    # The end is a rename to this name.
    if out.is_symlink() or os.path.ismount(out) or (out.exists() and os.path.samefile(out, os.curdir)):
        raise InputError(f"{out} cannot be replaced (a link, a mount or this very folder): name a new folder with -o")
    check_own(folder_of(out))
    parent = existing_parent(out)
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent} cannot be written to: name another folder with -o")
    need, free = n_bytes - held_bytes(out) + MARGIN, shutil.disk_usage(parent).free
    if free < need:
        raise CalsetError(f"{out} needs {size(need)} and its disk has {size(free)} free: make room there")


def check_own(folder: Path) -> None:
    """Refuse a work folder that somebody else may have put there: a run writes into it and goes on from its files.

    Raises:
        InputError: it is a link or a file, it is another user's, or others may write to it.
    """
    try:
        found = os.lstat(folder)
    except OSError:
        return  # none yet, or a place where none can be made, which making it reports
    wrong = (
        "it is no folder but a link or a file" * (not stat.S_ISDIR(found.st_mode))
        or "it belongs to another user" * (found.st_uid != os.geteuid())
        or "others may write to it" * (bool(found.st_mode & 0o022) and _keeps_modes(folder.parent))
    )
    if wrong:
        remedy = f"if it is yours, chmod go-w {folder}; else " if wrong.startswith("others") else ""
        raise InputError(
            f"calset does not work in {folder}: {wrong}; {remedy}remove it, or name another folder with -o"
        )


def _keeps_modes(folder: Path) -> bool:
    """Return False on a file system that gives every folder the same mode, as those of Windows do."""
    try:
        with tempfile.TemporaryDirectory(prefix=".calset-", dir=folder) as made:
            return not os.stat(made).st_mode & 0o022
    except OSError:
        return True


def held_bytes(out: Path) -> int:
    """What the interrupted work for ``out`` takes on the disk, if there is one."""
    folder = folder_of(out)
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0


def check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse settings that differ from those of the interrupted work for ``out``, if there is one.

    Raises:
        InputError: naming the first setting that differs.
    """
    lines = _read_progress(folder_of(out))
    if not lines:
        return
    before, now = lines[0]["settings"], json.loads(json.dumps(settings, default=str))
    if other := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        key = other[0]
        raise InputError(
            f"an interrupted pruning into {out} had {key} {before.get(key)!r}, not {now.get(key)!r}: give the same to "
            f"continue it, or remove {folder_of(out)} to begin anew"
        )


@dataclass(slots=True)
class WorkFolder:
    """Opened with ``opened``. ``blocks``: the records of the blocks that are finished, in order.

    ``shares``: each matrix's sparsity, where they were measured before the first block.
    """

    out: Path
    folder: Path
    blocks: list[Mapping[str, Any]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    shares: dict[str, float] | None = None

    @property
    def model(self) -> Path:
        """The checkpoint so far: finished blocks pruned, the others dense."""
        return self.folder / "model"

    @property
    def scratch(self) -> Path:
        """For files that only this run needs."""
        path = self.folder / "scratch"
        path.mkdir(exist_ok=True)
        return path

    def remember(self, shares: Mapping[str, float]) -> None:
        """Keep what was measured: a run that continues this one prunes by the same, to the bit.

        Raises:
            PruningError: it could not be written.
        """
        with _writing(self.out):
            _write_whole(self.folder / SHARES, json.dumps(shares))
        self.shares = dict(shares)

    def finish_block(self, tensors: Iterable[tuple[str, Tensor]], record: Mapping[str, Any]) -> None:
        """Write a block's pruned tensors, by their stored names, and then that it is done.

        Raises:
            PruningError: they could not be written.
        """
        with _writing(self.out):
            stored = read_headers(self.model)
            for name, tensor in tensors:
                write_tensor(stored[name], tensor)
        self.note(record)

    def note(self, record: Mapping[str, Any]) -> None:
        """Write that a block is done, whose tensors are written or come at the end.

        Raises:
            PruningError: it could not be written.
        """
        with _writing(self.out):
            _append(self.folder, record)
        self.blocks.append(record)

    def fill(self, write: Callable[[Path], None]) -> None:
        """Write the weight files anew: ``write`` gets the empty folder of the checkpoint.

        Raises:
            PruningError: they could not be written.
        """
        with _writing(self.out):
            _clear(self.model, keep=())
            write(self.model)

    def complete(
        self, source: Path, record: Mapping[str, Any], section: str, switches: Mapping[str, Any] | None = None
    ) -> None:
        """Add what stands beside the weights and put everything in its place.

        Args:
            switches: what config.json is to say differently.

        Raises:
            PruningError: it could not be written.
        """
        with _writing(self.out):
            _clear(self.model, keep=[p.name for p in weight_files(self.model)] + [INDEX])
            checkpoint.write_companions(source, self.model, record, section, switches or {})
            flush(self.model)
            self.model.rename(self.out)
            sync(self.out.absolute().parent)


@contextmanager
def opened(out: Path, source: Path | None, settings: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """The work folder for ``out``, new or where an interrupted run left it; gone afterwards unless it can be continued.

    Args:
        source: where the weight files are that the checkpoint begins as; None: it is filled at the end.
        settings: all that decides the result; JSON. An interrupted run is only continued with the same.

    Raises:
        InputError: another process works on it, an interrupted run had other settings, or it is not this user's.
        PruningError: it could not be written.
        Stopped: by Ctrl-C with blocks finished; the same call continues.
    """
    folder = folder_of(out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        check_own(folder)
    with _locked(folder, out):
        check_settings(out, settings)  # before anything is touched: another run's work is not this one's to remove
        work = WorkFolder(out, folder)
        keep = False
        try:
            _begin(work, source, settings)
            yield work
        except BaseException as error:
            keep = bool(work.blocks or work.shares) and not _is_final(error)
            if keep and isinstance(error, KeyboardInterrupt):
                raise Stopped(f"stopped with {len(work.blocks)} blocks done; the same command continues") from error
            raise
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


def _is_final(error: BaseException) -> bool:
    """Whether the same settings would end the same way: the pruning itself failed, not the disk or the memory."""
    return isinstance(error, CalsetError) and not isinstance(error.__cause__, OSError)


def _begin(work: WorkFolder, source: Path | None, settings: Mapping[str, Any]) -> None:
    lines = _read_progress(work.folder)
    shutil.rmtree(work.folder / "scratch", ignore_errors=True)  # hidden states of a killed run
    if lines:
        work.blocks = list(lines[1:])
        work.shares = _read_shares(work.folder)
        work.resumed_at = [*(work.blocks[-1].get("resumed_at", []) if work.blocks else []), len(work.blocks)]
        return
    with _writing(work.out):
        shutil.rmtree(work.model, ignore_errors=True)
        (work.folder / SHARES).unlink(missing_ok=True)
        work.model.mkdir()
        if source is not None:
            copy_files(source, work.model)
        flush(work.model)
        _append(work.folder, {"settings": settings})


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    import fcntl

    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another process is pruning into {out}: wait for it, or name another folder") from error
        yield


def _read_progress(folder: Path) -> list[dict[str, Any]]:
    """The settings' line and one a finished block; a line that a kill cut short does not count."""
    path = folder / PROGRESS
    if not path.is_file():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines if lines and "settings" in lines[0] else []


def _append(folder: Path, record: Mapping[str, Any]) -> None:
    kept = _read_progress(folder)
    text = "".join(json.dumps(line, default=str) + "\n" for line in [*kept, record])
    # Rewritten whole: an appended line could follow half of a killed run's.
    _write_whole(folder / PROGRESS, text)


def _write_whole(path: Path, text: str) -> None:
    """Put a file in its place whole, or not at all."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    sync(path.parent)


def _read_shares(folder: Path) -> dict[str, float] | None:
    path = folder / SHARES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PruningError(f"could not write {out}: {error.strerror or first_line(error)}") from error


def _clear(folder: Path, keep: Sequence[str]) -> None:
    """Remove what a run that was killed at the very end had put beside the weights."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def flush(folder: Path) -> None:
    """Delayed allocation can report a full disk only here, and a rename must not precede its files' bytes."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        # safetensors writes for the owner only, whatever the umask, and a copied folder has its source's mode.
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if path.is_file():
            sync(path)
