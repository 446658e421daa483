"""Walls around a grading worker: no keys, no network, no changed files, no other processes, a bounded memory.

Why it exists: a grader reads text that a model wrote, and a library that reads formulas, boards or code may run it. The
deadline bounds a worker's time; the walls bound everything else. The kernel keeps them up, whatever runs inside.

There are two steps, because imports are trusted and need more than answers do: they cache compiled modules in files and
ask other programs about the machine. ``before_imports`` closes the network, ``before_answers`` the rest. A wall that
the kernel does not offer is left out and named. Must not know: graders, pools, messages.

Linux: rlimits; unshare(2), capabilities(7), seccomp(2) and landlock(7) through ctypes. Elsewhere: rlimits alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from contextlib import suppress
from typing import Any, NamedTuple

from calset.io.child import limit, limit_memory

# Of address space beside what the import has mapped (math 66 MB, gym 197 MB, torch for a CPU 0.6 GB, for CUDA more).
# Address space is more than what is used: each thread takes 72 MB of it.
MEMORY_BYTES = 4 * 2**30
OPEN_FILES = 64

_CLONE_THREAD, _CLONE_NEWUSER, _CLONE_NEWNET = 0x10000, 0x10000000, 0x40000000
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITIES_VERSION_3, _DAC_OVERRIDE, _DAC_READ_SEARCH = 0x20080522, 1 << 1, 1 << 2


def before_imports() -> list[str]:
    """Raise the walls that imports live within: core dumps, privileges, network.

    To be called while the process has one thread: a process of several cannot enter a user namespace.

    Returns:
        What this machine still lets a worker do, as verb phrases.
    """
    limit("CORE", 0)
    libc = _libc()
    if libc is None:
        return ["use the network"]
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Whoever may, enters a network namespace alone: in a user namespace root cannot read what belongs to others any
    # more, such as an environment in a user's home.
    alone = libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0
    _drop_capabilities(libc)
    # Namespaces do not hide sockets that are files, of which one may belong to a service that runs programs.
    if _refuse(libc, "network"):
        return []
    return ["connect to local services" if alone else "use the network"]


def before_answers() -> list[str]:
    """Raise the other walls: memory, files, processes, open descriptors. None of them can be taken down again.

    Returns:
        What this machine still lets a worker do, as verb phrases.
    """
    gaps = []
    if not limit_memory(MEMORY_BYTES):
        gaps.append(f"take more than {MEMORY_BYTES >> 30} GiB of memory")
    if not limit("FSIZE", 0):
        gaps.append("write files")
    limit("NOFILE", OPEN_FILES)
    libc = _libc()
    if libc is None or not _refuse(libc, "changes"):
        gaps.append("change the permissions of files")
        # Only here: on Linux this limit counts threads, which a grader may have. Root is not bound by it.
        if not limit("NPROC", 0) or os.geteuid() == 0:
            gaps.append("start processes")
    if libc is None or not _protect_files(libc):
        gaps.append("empty and delete files")
    elif _call(libc, _CREATE_RULESET, None, 0, 1) < 3:
        gaps.append("empty files")
    if libc is None or _readable(f"/proc/{os.getppid()}/environ"):
        gaps.append("read the environment of calset's process")
    return gaps


def _threads() -> int:
    """The threads of this process; 0 where the system does not say."""
    with suppress(OSError):
        return len(os.listdir("/proc/self/task"))
    return 0


def _readable(path: str) -> bool:
    with suppress(OSError), open(path, "rb"):
        return True
    return False


def _libc() -> Any:
    """The C library of a Linux process; None elsewhere."""
    with suppress(OSError):
        return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    return None


def _drop_capabilities(libc: Any) -> None:
    """Keep of root's capabilities the reading of files that belong to others; drop what a new namespace gave."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITIES_VERSION_3, 0))
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice, for 64 bits
    if libc.capget(header, sets) == 0:
        kept = _DAC_OVERRIDE | _DAC_READ_SEARCH
        sets[:] = [sets[0] & kept, sets[1] & kept, 0, 0, 0, 0]
        libc.capset(header, sets)


# --- seccomp: system calls that are refused -----------------------------------------------------------------------


class _Architecture(NamedTuple):
    """Numbers of one architecture: of its ABI, of seccomp, clone and prlimit, and of the calls that a wall refuses."""

    audit: int
    seccomp: int
    clone: int
    refused: dict[str, tuple[int, ...]]
    prlimit: int


_CLONE3 = 435  # on every architecture
_ARCHITECTURES = {
    "x86_64": _Architecture(
        0xC000003E, 317, 56,
        {
            "network": (41, 425),  # socket, io_uring_setup (a ring opens sockets too)
            "changes": (
                57, 58, 76, 90, 91, 268, 452,  # fork, vfork, truncate, chmod, fchmod, fchmodat, fchmodat2
                109, 112, 101, 310, 311,  # setpgid, setsid, ptrace, process_vm_readv, process_vm_writev
                62, 129, 200, 234, 297, 424,  # kill, tkill, tgkill and the other calls that send a signal
                141, 144, 203, 251,  # setpriority, sched_setscheduler, sched_setaffinity, ioprio_set
                92, 93, 94, 260, 132, 235, 261, 280,  # chown, utime and their kin
                188, 189, 190, 197, 198, 199, 463, 466,  # setxattr, removexattr and their kin
                29, 64, 68, 240, 248, 249, 250,  # shmget, semget, msgget, mq_open, add_key, request_key, keyctl
            ),
        },
        302,
    ),
    "aarch64": _Architecture(
        0xC00000B7, 277, 220,
        {
            "network": (198, 425),
            "changes": (  # the same; this architecture has no fork, vfork, chmod, chown, utime
                45, 52, 53, 452, 154, 157, 117, 270, 271, 129, 138, 130, 131, 240, 424, 140, 119, 122, 30,
                54, 55, 88, 5, 6, 7, 14, 15, 16, 463, 466, 194, 190, 186, 180, 217, 218, 219,
            ),
        },
        261,
    ),
}  # fmt: skip
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # the instructions of a filter (bpf)
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_SECCOMP_SET_MODE_FILTER, _ALL_THREADS, _SPEC_ALLOW = 1, 1, 4


def _refuse(libc: Any, wall: str) -> bool:
    """Refuse a wall's system calls with EPERM in every thread. False where the kernel or the machine has no filters."""
    machine = _ARCHITECTURES.get(platform.machine())
    if machine is None or sys.maxsize < 2**32:
        return False
    program = _program(machine, wall)
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filters = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(buffer)))
    flags = _ALL_THREADS | _SPEC_ALLOW  # older kernels slow down a process that has a filter, unless it says no
    return _call(libc, machine.seccomp, _SECCOMP_SET_MODE_FILTER, flags, filters) == 0


def _program(machine: _Architecture, wall: str) -> list[tuple[int, int, int, int]]:
    """The filter as (instruction, steps to skip if true, if false, operand)."""
    refusal = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, machine.audit), refusal]  # calls by another ABI have other numbers
    program += [(_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, 0x40000000), refusal]  # so have those of x32
    for number in machine.refused[wall]:
        program += [(_EQUAL, 0, 1, number), refusal]
    if wall == "changes":
        # A filter cannot see the flags of clone3; without it the C library takes clone, whose flags are an argument.
        program += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
        program += [(_EQUAL, 0, 3, machine.clone), (_LOAD, 0, 0, 16), (_ANY_BIT, 1, 0, _CLONE_THREAD), refusal]
        # Its own limits alone, as process 0: those of calset's process are another's. The number is read again.
        program += [(_LOAD, 0, 0, 0), (_EQUAL, 0, 3, machine.prlimit), (_LOAD, 0, 0, 16), (_EQUAL, 1, 0, 0), refusal]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


# --- Landlock: files that are not changed -------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_EXECUTE, _WRITE_FILE, _TRUNCATE, _IOCTL_DEVICE = 1 << 0, 1 << 1, 1 << 14, 1 << 15
_REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))
_LINK_ELSEWHERE = 1 << 13
_PATH_BENEATH = 1


def _protect_files(libc: Any) -> bool:
    """Let this process run no program, and make, change or remove no file but /dev/null; reading stays as it is.

    Where the kernel can, also: no TCP, no sockets of other processes, no signals to them. False without Landlock, and
    where it holds for this thread alone while there are others, which an import has started.
    """
    version = _call(libc, _CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    files = _EXECUTE | _WRITE_FILE | _REMOVE_AND_MAKE
    for bit, since in ((_LINK_ELSEWHERE, 2), (_TRUNCATE, 3), (_IOCTL_DEVICE, 5)):
        files |= bit if version >= since else 0
    handled = struct.pack("=QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = _call(libc, _CREATE_RULESET, handled, len(handled), 0)
    if rules < 0:
        return False
    try:
        with suppress(OSError):  # whoever silences a library opens it
            null = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
            allowed = struct.pack("=Qi", files & (_WRITE_FILE | _TRUNCATE | _IOCTL_DEVICE), null)
            _call(libc, _ADD_RULE, rules, _PATH_BENEATH, allowed, 0)
            os.close(null)
        return _call(libc, _RESTRICT_SELF, rules, 0) == 0 and _threads() == 1
    finally:
        os.close(rules)


def _call(libc: Any, number: int, *arguments: Any) -> int:
    """A system call by its number; integers are passed as wide as the kernel reads them."""
    wide = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    return libc.syscall(ctypes.c_long(number), *wide)
