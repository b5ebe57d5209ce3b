"""The process that `sandbox.py` starts: shuts itself in, runs the program that stands on its standard input, and says
on a pipe how that ended. A script of its own, which imports the standard library alone."""

import ctypes
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
APART = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
CAPABILITY_VERSION_3 = 0x20080522
# What the interpreter's own files need besides them: the C library and those that its extensions are linked to.
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib")
WORK = "/work"
# Above those that systems give to users; another one for each sandbox, as the kernel counts processes by user.
FIRST_ID = 1 << 30

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FOREIGN_CODE = frozenset(
    {"ctypes", "_ctypes", "cffi", "_cffi_backend", "_posixsubprocess", "_socket", "_multiprocessing"}
)
REFUSED = ("socket.", "ctypes.", "subprocess.", "pty.", "syslog.", "sqlite3.", "webbrowser.", "resource.")
REFUSED_EXACTLY = frozenset(
    {
        *(
            f"os.{name}"
            for name in ("fork", "forkpty", "exec", "posix_spawn", "spawn", "system", "kill", "killpg")
        ),
        *(
            f"os.{name}"
            for name in ("chroot", "fchdir", "setxattr", "removexattr", "lockf", "putenv", "unsetenv")
        ),
        *("signal.pthread_kill", "sys.addaudithook", "code.__new__", "cpython.remote_debugger_script"),
    }
)
# Arguments that are paths which are changed.
CHANGING = {
    **{
        f"os.{name}": 1
        for name in ("remove", "rmdir", "mkdir", "truncate", "chmod", "chown", "chflags", "utime")
    },
    **{f"os.{name}": 2 for name in ("rename", "link", "symlink")},
    "shutil.rmtree": 1,
    "os.chdir": 1,
}


def main() -> None:
    spec = json.loads(sys.argv[1])
    program = sys.stdin.read()
    if spec["way"] == "namespaces":
        in_namespaces(spec, program)
    else:
        os.chdir(spec["folder"])
        limit(spec, None)
        sys.addaudithook(refusing(os.path.realpath(spec["folder"])))
        run(spec, program, spec["folder"])


def in_namespaces(spec: dict[str, Any], program: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    unused_id = FIRST_ID + os.getpid()
    is_root = os.geteuid() == 0
    if is_root and libc.unshare(APART) == 0:
        drops_to = unused_id
    else:
        drops_to = None
        if is_root:
            # Of root's processes the kernel counts none.
            become(unused_id)
            checked(libc.prctl(PR_SET_DUMPABLE, 1), "prctl")
        outside = os.geteuid(), os.getegid()
        checked(libc.unshare(APART | CLONE_NEWUSER), "no namespaces for users here")
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {outside[0]} 1"),
            ("gid_map", f"0 {outside[1]} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    move_in(libc, spec, drops_to)
    # The first process of the new namespace: with it all others end.
    first = os.fork()
    if first:
        _, status = os.waitpid(first, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    if drops_to is not None:
        become(drops_to)
    drop_capabilities(libc)
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
    second = os.fork()
    if second:
        os.close(spec["verdict"])
        while os.waitpid(-1, 0)[0] != second:
            pass
        os._exit(0)
    os.setsid()
    os.chdir(WORK)
    limit(spec, spec["processes"])
    run(spec, program, WORK)


def move_in(libc: ctypes.CDLL, spec: dict[str, Any], owner: int | None) -> None:
    """A root of its own: what the interpreter reads, and one folder to write to."""
    root = spec["folder"]
    mount(libc, None, "/", None, MS_REC | MS_PRIVATE)
    mount(libc, "none", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=755")
    seen = {os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)}
    for path in sorted({*seen, *(path for path in LIBRARIES if os.path.isdir(path))}):
        inside = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            if not os.path.lexists(inside):
                os.symlink(os.path.realpath(path), inside)
        elif not os.path.isdir(inside):
            os.makedirs(inside)
            bind(libc, path, inside)
    os.mkdir(root + "/dev")
    for device in ("/dev/null", "/dev/urandom"):
        with open(root + device, "wb"):
            pass
        mount(libc, device, root + device, None, MS_BIND)
    os.mkdir(root + WORK)
    os.symlink(WORK, root + "/tmp")
    options = f"size={spec['file_bytes']},nr_inodes=1024,mode=700"
    mount(libc, "none", root + WORK, "tmpfs", MS_NOSUID | MS_NODEV, options)
    if owner is not None:
        os.chown(root + WORK, owner, owner)
    mount(libc, None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(root)
    checked(libc.pivot_root(b".", b"."), "pivot_root")
    checked(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


def bind(libc: ctypes.CDLL, path: str, inside: str) -> None:
    """The same files at another place, read only. Flags that the system has set must stay."""
    mount(libc, path, inside, None, MS_BIND | MS_REC)
    flags = os.statvfs(inside).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount(libc, None, inside, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | flags)


def mount(
    libc: ctypes.CDLL, source: str | None, target: str, kind: str | None, flags: int, options: str = ""
) -> None:
    words = [word.encode() if word else None for word in (source, target, kind, options)]
    checked(libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), f"mount {target}")


def become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def drop_capabilities(libc: ctypes.CDLL) -> None:
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    checked(libc.capset(header, nothing), "capset")


def checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        sys.exit(f"{what}: {os.strerror(number)}")


def limit(spec: dict[str, Any], processes: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_FSIZE, (spec["file_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (spec["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (spec["cpu_s"], spec["cpu_s"] + 1))
    if processes is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))


def refusing(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    def refuse(what: str) -> NoReturn:
        raise PermissionError(f"not allowed here: {what}")

    def is_inside(path: Any) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        return real == folder or real.startswith(folder + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int) or path is None:
                return
            # `os.open` has no mode. A folder that it opens would be a way to others.
            if (mode is None or flags & WRITING) and not is_inside(path):
                refuse(f"opening {path!r}")
        elif event == "import":
            if arguments[0].split(".")[0] in FOREIGN_CODE:
                refuse(f"importing {arguments[0]}")
        elif event in CHANGING:
            for path in arguments[: CHANGING[event]]:
                if isinstance(path, int) or not is_inside(path):
                    refuse(f"{event} {path!r}")
        elif event in REFUSED_EXACTLY or event.startswith(REFUSED):
            refuse(event)

    return hook


def run(spec: dict[str, Any], program: str, folder: str) -> NoReturn:
    """The program as a main module, then the verdict: a line of JSON."""
    tempfile.tempdir = folder
    passed, reason = False, "left before its end"
    pid = os.getpid()
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
        passed, reason = True, ""
    except BaseException as error:  # whatever it is, of code that nobody knows
        reason = f"{type(error).__name__}: {error}"[:300]
    if os.getpid() != pid:
        os._exit(1)  # a process that it forked
    os.write(
        spec["verdict"], json.dumps({"passed": passed, "reason": " ".join(reason.split())}).encode() + b"\n"
    )
    os._exit(0)


main()
