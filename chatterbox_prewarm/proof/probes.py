"""Count actions that a warm process must avoid: using the network, starting programs, writing into the baked state.

Python raises an audit event before each of these, so failed attempts are counted too. Native code raises no audit
events, but the kernel's counters of the network namespace show its packets.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = frozenset(
    f"os.{name}"
    for name in ("chmod", "chown", "link", "mkdir", "remove", "rename", "rmdir", "symlink", "truncate", "utime")
)
_LOOKUPS = frozenset({"socket.getaddrinfo", "socket.gethostbyaddr", "socket.gethostbyname"})
_PROGRAMS = frozenset({"subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "pty.spawn"})
#: Programs that a miss of a compiled family starts. Other programs are reported but do not fail a proof. For example,
#: importing numpy.testing runs lscpu.
COMPILER = re.compile(r"(.*-)?(as|c\+\+|cc|clang|clang\+\+|cc1plus|g\+\+|gcc|ld|ninja|nvcc|ptxas)(-[\w.]+)?")
_SHELLS = frozenset({"sh", "bash", "dash", "env"})
_SEPARATORS = re.compile(r"[\s;&|()'\"]+")
#: Counters of `/proc/net/snmp` that increase with every outgoing attempt, even without a route. Those of TCP count both
#: versions of IP. The counters of UDP over IPv6 are in `/proc/net/snmp6`.
_OUTGOING = (
    ("Tcp", "ActiveOpens"),
    ("Udp", "OutDatagrams"),
    ("Ip", "OutNoRoutes"),
    ("", "Udp6OutDatagrams"),
    ("", "Ip6OutNoRoutes"),
)


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process in bytes; 0 if the kernel does not report it.

    `getrusage` is of no use here: its value includes the program before exec.
    """
    return 1024 * (status_field(os.getpid(), "VmHWM") or 0)


def status_field(pid: int, name: str) -> int | None:
    """Return a number in `/proc/PID/status`; None if the kernel does not report it."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return None


@dataclass
class Probes:
    """The events since `install`, a sentence for each."""

    warm: str
    network: list[str] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Record an audit event. Must be quick and must not raise."""
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITE_FLAGS and self._is_baked(path):
                self.writes.append(f"open {path}")
        elif event in _CHANGES:
            if any(self._is_baked(argument) for argument in arguments):
                self.writes.append(f"{event} {arguments[0]}")
        elif event in _LOOKUPS:
            self.network.append(f"lookup of {arguments[0]}")
        elif event in {"socket.connect", "socket.sendto"}:
            if getattr(arguments[0], "family", None) in {socket.AF_INET, socket.AF_INET6}:
                self.network.append(f"{event} to {arguments[1]}")
        elif event in _PROGRAMS:
            self.programs.append(f"{event} {_program(arguments)}")

    def _is_baked(self, path: Any) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return isinstance(path, str) and f"{path}{os.sep}".startswith(self.warm)


def _program(arguments: tuple[Any, ...]) -> str:
    """Return the program with its arguments, because a shell alone does not show the command that it runs."""
    program, words = arguments[0], arguments[1] if len(arguments) > 1 else ()
    if isinstance(program, (list, tuple)):  # pty.spawn has one list for both
        program, *words = program
    else:
        words = list(words or ())[1:]
    return " ".join(os.fsdecode(word) for word in (program, *words))


def names_a_compiler(event: str) -> bool:
    """Return whether an event starts a compiler, or a shell with a compiler anywhere in its command line."""
    kind, _, command = event.partition(" ")
    words = [Path(word).name for word in _SEPARATORS.split(command) if word]
    through_a_shell = kind == "os.system" or (words and words[0] in _SHELLS)
    return any(COMPILER.fullmatch(word) for word in (words if through_a_shell else words[:1]))


def install(warm: Path) -> Probes:
    """Start counting. An audit hook cannot be removed from a process."""
    probes = Probes(warm=f"{warm}{os.sep}")
    sys.addaudithook(probes)
    return probes


def outgoing_packets() -> dict[str, int]:
    """Return the kernel's counters of outgoing packets in this network namespace; empty if it has no such counters."""
    try:
        lines = Path("/proc/net/snmp").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    values: dict[tuple[str, str], int] = {}
    for names, numbers in zip(lines[::2], lines[1::2], strict=True):
        protocol = names.partition(":")[0]
        for name, number in zip(names.split()[1:], numbers.split()[1:], strict=True):
            values[protocol, name] = int(number)
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/snmp6").read_text(encoding="ascii").splitlines():
            name, number = line.split()
            values["", name] = int(number)
    return {f"{protocol} {name}".strip(): values.get((protocol, name), 0) for protocol, name in _OUTGOING}


def interfaces() -> list[str]:
    """Return the network interfaces that this process can see."""
    return sorted(name for _, name in socket.if_nameindex())


def can_write(directory: Path) -> bool:
    """Try to create a file in `directory`, and return whether it worked."""
    probe = directory / f".probe-{os.getpid()}"
    try:
        probe.touch()
    except OSError:
        return False
    probe.unlink()
    return True


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    """Return every file below `directory` with its size in bytes and its modification time in nanoseconds."""
    files = {}
    for root, _, names in os.walk(directory):
        for name in names:
            status = (Path(root) / name).lstat()
            files[str(Path(root) / name)] = (status.st_size, status.st_mtime_ns)
    return files
