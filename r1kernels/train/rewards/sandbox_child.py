"""What runs inside the sandbox: it locks the door behind itself, then runs a stranger's program.

Not a module of this package: `sandbox` hands its text, after that of `plain`, to a bare interpreter. Argument: a JSON
object with `kind`, `privileged`, `visible` and the limits. On stdin and stdout travel frames, of eight bytes of length
and then so many bytes. First it says "ready": whatever goes wrong before is the sandbox's own failure, told on
stderr. Then it is given a program.

The layers, outermost first, each enough against most of what could be tried:

* namespaces (bubblewrap's, or made here): no network, no other processes, a root directory with the interpreter and
  the system's libraries, read-only, and /dev/null; a small tmpfs at /tmp; no /proc;
* an unprivileged user without any capability, in a user namespace of its own;
* limits of address space, CPU time, file size, open files and threads;
* a filter of system calls: no second process, no other program, no sockets, no memory beyond that address space.
"""

import ctypes
import os
import resource
import struct
import sys

NOBODY = 65534
ROOM = 32 * 2**20  # that the limit of memory must leave to a program
FRAME = struct.Struct(">Q")
MACHINE = os.uname().machine
libc = ctypes.CDLL(None, use_errno=True)

NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # mount, UTS, IPC, PID, network
NEW_USER = 0x10000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH, SIGKILL = 2, 9
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38


def call(name: str, *arguments: object) -> None:
    """Calls a function of libc, which returns 0 or raises."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        shown = ", ".join(str(argument) for argument in arguments)
        raise OSError(number, f"{name}({shown}): {os.strerror(number)}")


def syscall(x86_64: int, aarch64: int, *arguments: object) -> None:
    """Makes a system call for which libc has no function."""
    call("syscall", ctypes.c_long(aarch64 if MACHINE == "aarch64" else x86_64), *arguments)


def enter_namespaces(privileged: bool, visible: list[str]) -> None:
    """Does bubblewrap's part: goes on in new namespaces, as their first process, with a new root directory."""
    user, group = os.getuid(), os.getgid()
    call("unshare", NEW_NAMESPACES | (0 if privileged else NEW_USER))
    if not privileged:
        maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {user} 1", "gid_map": f"{NOBODY} {group} 1"}
        for name, text in maps.items():
            try:
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            except OSError as error:
                raise OSError(error.errno, f"write of '{text}' to {name}: {error.strerror}") from None
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    os.mkdir("/tmp/old")
    syscall(155, 41, b"/tmp", b"/tmp/old")  # pivot_root
    os.chdir("/")
    for path in visible:
        if os.path.islink("/old" + path):
            os.symlink(os.readlink("/old" + path), path)
        else:
            os.makedirs(path)
            call("mount", f"/old{path}".encode(), path.encode(), None, MS_BIND | MS_REC, None)
    os.mkdir("/dev")
    os.close(os.open("/dev/null", os.O_CREAT | os.O_WRONLY))
    call("mount", b"/old/dev/null", b"/dev/null", None, MS_BIND, None)
    os.mkdir("/tmp")
    call("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")
    read_only = struct.pack("QQQQ", 1, 0, 0, 0)  # set MOUNT_ATTR_RDONLY, for this mount and all below it
    syscall(442, 442, ctypes.c_int(-100), b"/", ctypes.c_uint(0x8000), read_only, ctypes.c_long(len(read_only)))


def lock_in(privileged: bool, file_bytes: int) -> None:
    """Gives up the last privileges, for good; before that, they mount /tmp."""
    options = f"size={file_bytes},nr_inodes=1024,mode=1777".encode()
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    os.chdir("/tmp")
    if privileged:
        # Limits of threads do not bind root, whatever it calls itself in a user namespace.
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("unshare", NEW_USER)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    call("capset", header, none)
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    os.setsid()


def limit(memory_bytes: int, cpu_seconds: int, file_bytes: int, files: int, threads: int) -> None:
    """Sets the limits of this process, which nothing in it can raise again."""
    for name, value in (
        ("AS", memory_bytes),
        ("CPU", cpu_seconds),
        ("FSIZE", file_bytes),
        ("NOFILE", files),
        ("NPROC", threads),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
        ("SIGPENDING", 64),
    ):
        which = getattr(resource, f"RLIMIT_{name}")
        _, most = resource.getrlimit(which)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(which, (value, value))


# What is refused: numbers on x86_64 and aarch64. (Not socketpair, which asyncio's loops need; it reaches nobody else.)
REFUSED = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_by_handle_at": (304, 265), "socket": (41, 198), "shmget": (29, 194),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "memfd_create": (319, 279),
    "userfaultfd": (323, 282), "bpf": (321, 280), "perf_event_open": (298, 241), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "pidfd_open": (434, 434), "modify_ldt": (154, None),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "personality": (135, 92),
}  # fmt: skip
AUDIT_AND_CLONE = {"x86_64": (0xC000003E, 56), "aarch64": (0xC00000B7, 220)}
# The same everywhere: io_uring_*, open_tree to fspick, pidfd_getfd, mount_setattr, memfd_secret.
NEWER_CALLS = (*range(425, 434), 438, 442, 447)
CLONE3, LAST_KNOWN = 435, 450
CLONE_THREAD = 0x00010000
LOAD, EQUAL, GREATER, HAS_BITS, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
KILL, ALLOW, REFUSE, UNKNOWN = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026  # the last two: EPERM, ENOSYS


def filter_calls() -> None:
    """From here on, the kernel refuses the system calls that a lone computation does not need."""
    architecture, clone = AUDIT_AND_CLONE[MACHINE]
    refused = [numbers[MACHINE == "aarch64"] for numbers in REFUSED.values()]
    refused = [number for number in (*refused, *NEWER_CALLS) if number is not None]
    # (operation, value, steps to skip when true, when false); loads are from struct seccomp_data.
    program = [
        (LOAD, 4, 0, 0),
        (EQUAL, architecture, 1, 0),
        (RETURN, KILL, 0, 0),
        (LOAD, 0, 0, 0),
        (EQUAL, CLONE3, 1, 0),  # glibc then makes its threads with clone, whose flags can be seen here
        (GREATER, LAST_KNOWN, 0, 1),
        (RETURN, UNKNOWN, 0, 0),
        *((EQUAL, number, len(refused) - index + 3, 0) for index, number in enumerate(refused)),
        (EQUAL, clone, 0, 2),
        (LOAD, 16, 0, 0),
        (HAS_BITS, CLONE_THREAD, 0, 1),
        (RETURN, ALLOW, 0, 0),
        (RETURN, REFUSE, 0, 0),
    ]
    code = b"".join(struct.pack("HBBI", operation, yes, no, value) for operation, value, yes, no in program)
    held = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(held))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, 2, header, 0, 0)


def receive(source: int) -> bytes:
    """The next frame; ends the process where there is none."""
    frame, need = b"", FRAME.size
    while len(frame) < need:
        piece = os.read(source, need - len(frame))
        if not piece:
            os._exit(0)
        frame += piece
        if len(frame) == need == FRAME.size:
            need += FRAME.unpack(frame)[0]
    return frame[FRAME.size :]


def send(target: int, text: bytes) -> None:
    frame = memoryview(FRAME.pack(len(text)) + text)
    while frame:
        frame = frame[os.write(target, frame) :]


def run(name: str, sources: list[str]) -> dict:
    """Runs program text as a module of this name."""
    module = sys.modules[name] = type(sys)(name)
    for source in sources:
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return module.__dict__


def answer_calls(entry_point: str, sources: list[str]) -> None:
    """Calls the program's function with each frame of arguments, and answers with its result or exception."""
    requests, replies, nothing = os.dup(0), os.dup(1), os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    function = run("candidate", sources)[entry_point]
    while True:
        request = receive(requests)
        arguments, keywords = read(request, trusted=True)  # noqa: F821
        try:
            result = function(*arguments, **keywords)
            reply = write(("value", result))  # noqa: F821
            if result is None:
                reply = with_arguments(reply, request, arguments, keywords)
        except BaseException as error:
            reply = write(("raise", [base.__name__ for base in type(error).__mro__], str(error)[:1000]))  # noqa: F821
        send(replies, reply)


def with_arguments(reply: bytes, request: bytes, arguments: tuple, keywords: dict) -> bytes:
    """The answer of a function that returns nothing, beside what it made of its arguments."""
    try:
        if write((arguments, keywords)) != request:  # noqa: F821
            return write(("value", None, arguments, keywords))  # noqa: F821
    except (TypeError, ValueError):  # no longer plain data
        pass
    return reply


def main() -> None:
    settings = json.loads(sys.argv[1])  # noqa: F821
    kind, privileged = settings["kind"], settings["privileged"]
    try:
        if kind == "unshare":
            enter_namespaces(privileged, settings["visible"])
        if kind != "none":
            lock_in(privileged, settings["limits"]["file_bytes"])
        limit(**settings["limits"])
        bytearray(ROOM)
        if kind != "none":
            filter_calls()
    except (OSError, ValueError, MemoryError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyError as error:
        sys.exit(f"no filter of system calls for {error}")
    sys.argv[:] = [""]
    os.environ.clear()
    send(1, b"ready")
    program = json.loads(receive(0))  # noqa: F821
    if program["entry_point"] is not None:
        answer_calls(program["entry_point"], program["sources"])
    nothing = os.open("/dev/null", os.O_WRONLY)
    os.dup2(nothing, 2)
    run("__main__", program["sources"])


main()
