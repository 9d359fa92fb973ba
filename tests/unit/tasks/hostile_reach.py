"""Hostile programs that reach for what is not theirs: files, secrets, network, other processes, the kernel."""

REACH: dict[str, str] = {
    "files": """
### reads the secret
leak(open(world["file"]).read())
### writes into it
attempt(lambda: open(world["file"], "a").write("x"))
### empties it
attempt(lambda: os.truncate(world["file"], 0))
### removes it
attempt(lambda: os.unlink(world["file"]))
### renames it
attempt(lambda: os.rename(world["file"], world["file"] + ".old"))
### changes its mode
attempt(lambda: os.chmod(world["file"], 0))
### changes its owner
attempt(lambda: os.chown(world["file"], 65534, 65534))
### changes its times
attempt(lambda: os.utime(world["file"], (1, 1)))
### extended attribute
attempt(lambda: os.setxattr(world["file"], "user.x", b"x"))
### new file beside it
attempt(lambda: open(world["folder"] + "/new", "w"))
### new folder beside it
attempt(lambda: os.mkdir(world["folder"] + "/new"))
### lists the folder
leak(str(os.listdir(world["folder"])))
### passwords
attempt(lambda: open("/etc/passwd").read())
attempt(lambda: open("/etc/shadow").read())
### up and out
os.chdir("..")
attempt(lambda: open("../" * 20 + world["file"].lstrip("/")).read())
### by descriptor of the folder
attempt(lambda: os.open(world["file"].rpartition("/")[2], os.O_RDONLY, dir_fd=os.open(world["folder"], os.O_PATH)))
### by handle
import ctypes
libc = ctypes.CDLL(None)
handle = ctypes.create_string_buffer(b"\\x80\\0\\0\\0" + bytes(140))
mount = ctypes.c_int()
if libc.name_to_handle_at(-100, world["file"].encode(), handle, ctypes.byref(mount), 0) == 0: escaped("handle")
### memory devices
for path in ("/dev/mem", "/dev/kmem", "/dev/port", "/dev/kmsg", "/dev/vda", "/dev/sda"):
    attempt(lambda: open(path, "rb").read(1))
### makes a device
import stat
attempt(lambda: os.mknod("disk", stat.S_IFBLK | 0o666, os.makedev(254, 0)))
### installed packages
for name in ("site-packages", "dist-packages"):
    for path in sys.path:
        attempt(lambda: open(path + "/" + name + "/README.txt").read())
        attempt(lambda: open(path + "/" + name + "/pip/__init__.py").read())
### the package that judges
sys.path += [world["source"]]
attempt(lambda: __import__("openmimo.tasks"))
""",
    "proc and environment": """
### environment
if world["secret_name"] in os.environ or os.environ: escaped(str(dict(os.environ)))
### environment of the parent
leak(open(f"/proc/{os.getppid()}/environ").read())
### environment of a neighbour
leak(open(f"/proc/{world['victim']}/environ").read())
### command line of a neighbour
leak(open(f"/proc/{world['victim']}/cmdline").read())
### every environment
for name in os.listdir("/proc"):
    if name.isdigit():
        try: leak(open(f"/proc/{name}/environ", errors="replace").read())
        except OSError: pass
### memory of a neighbour
attempt(lambda: open(f"/proc/{world['victim']}/mem", "rb").read(1))
### maps of a neighbour
attempt(lambda: open(f"/proc/{world['victim']}/maps").read())
### root of a neighbour
leak(open(f"/proc/{world['victim']}/root{world['file']}").read())
### root of the first process
attempt(lambda: open(f"/proc/1/root{world['file']}").read())
### descriptors of the parent
attempt(lambda: os.listdir(f"/proc/{os.getppid()}/fd"))
### descriptors of the grader
for fd in range(64):
    attempt(lambda: open(f"/proc/{world['grader']}/fd/{fd}", "rb").read(1))
### kernel's switches
attempt(lambda: open("/proc/sys/kernel/core_pattern").read())
attempt(lambda: open("/sys/kernel/uevent_helper", "w"))
### a proc of its own
import ctypes
if ctypes.CDLL(None).mount(b"proc", b"/tmp", b"proc", 0, None) == 0: escaped("proc")
### list of mounts
attempt(lambda: open("/proc/self/mountinfo").read())
### groups
attempt(lambda: os.listdir("/sys/fs/cgroup"))
### C environment
import ctypes
get = ctypes.CDLL(None).getenv
get.restype = ctypes.c_char_p
if get(world["secret_name"].encode()): escaped("getenv")
""",
    "inherited descriptors": """
### any but the first three
for fd in range(3, 2048):
    try: os.fstat(fd)
    except OSError: continue
    escaped(f"descriptor {fd}")
### writes to all
for fd in range(3, 2048):
    attempt(lambda: os.write(fd, b"ended 0\\n"))
### reads from all
for fd in range(3, 256):
    attempt(lambda: leak(os.read(fd, 100).decode(errors="replace")))
### the terminal
attempt(lambda: os.open("/dev/tty", os.O_RDWR))
### pushes keys into it
import fcntl
attempt(lambda: fcntl.ioctl(0, 0x5412, b"x"))
### hidden in the first three
for fd in (0, 1, 2):
    import stat
    if stat.S_ISSOCK(os.fstat(fd).st_mode) or stat.S_ISDIR(os.fstat(fd).st_mode): escaped(f"descriptor {fd}")
### stolen from its parent
import ctypes
libc = ctypes.CDLL(None)
pid_fd = libc.syscall(434, os.getppid(), 0)
if pid_fd >= 0 and libc.syscall(438, pid_fd, 3, 0) >= 0: escaped("descriptor taken")
""",
    "network": """
### TCP to a listener
import socket
socket.create_connection(("127.0.0.1", world["port"]), 0.3).send(b"x")
escaped("connected")
### TCP by IPv6
import socket
s = socket.socket(socket.AF_INET6); s.settimeout(0.3); s.connect(("::1", world["port6"]))
escaped("connected")
### UDP
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b"x", ("127.0.0.1", world["udp"]))
### UDP by a connected socket
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(("127.0.0.1", world["udp"])); s.send(b"x")
### socket in a file
import socket
s = socket.socket(socket.AF_UNIX); s.connect(world["unix"])
escaped("connected")
### datagram socket in a file
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.sendto(b"x", world["unix"])
### abstract socket
import socket
s = socket.socket(socket.AF_UNIX); s.connect("\\0" + world["abstract"])
escaped("connected")
### raw packets
import socket
attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
### netlink
import socket
attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
### listens itself
import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen()
escaped("listening")
### by system call
import ctypes
fd = ctypes.CDLL(None).syscall(41, 2, 1, 0)
if fd >= 0:
    import socket
    socket.socket(fileno=fd).connect(("127.0.0.1", world["port"]))
    escaped("connected")
### web request
import urllib.request
attempt(lambda: urllib.request.urlopen(f"http://127.0.0.1:{world['port']}/", timeout=0.3))
### name look-up
import socket
attempt(lambda: socket.getaddrinfo("example.com", 80))
### virtual machine socket
import socket
attempt(lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).connect((2, 1)))
### socket pair of another kind
import socket
attempt(lambda: socket.socketpair(socket.AF_INET))
### by io_uring
import ctypes
if ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120)) >= 0: escaped("io_uring")
""",
    "links": """
### to the secret
os.symlink(world["file"], "link")
leak(open("link").read())
### to the secret, written
os.symlink(world["file"], "link")
attempt(lambda: open("link", "w"))
### to its folder
os.symlink(world["folder"], "link")
leak(str(os.listdir("link")))
### hard link
attempt(lambda: os.link(world["file"], "hard"))
### to the root
os.symlink("/", "root")
attempt(lambda: open("root" + world["file"]).read())
### left behind for the one who cleans up
os.symlink(world["folder"], "link")
os.mkdir("d"); os.symlink(world["folder"], "d/link")
### swapped while the one cleans up
if os.fork() == 0:
    while True:
        try:
            os.mkdir("swap"); os.rmdir("swap"); os.symlink(world["folder"], "swap"); os.unlink("swap")
        except OSError: pass
### chain of links
os.symlink(world["file"], "a"); os.symlink("a", "b"); os.symlink("b", "c")
leak(open("c").read())
### link through proc
attempt_quiet(lambda: os.symlink("/proc/self/root", "r"))
attempt(lambda: open("r" + world["file"]).read())
### its own folder replaced
cwd = os.getcwd()
attempt_quiet(lambda: os.rename(cwd, cwd + "-gone"))
attempt_quiet(lambda: os.symlink(world["folder"], cwd))
### closed folder left behind
os.mkdir("closed"); open("closed/x", "w").close()
attempt_quiet(lambda: os.chmod("closed", 0))
""",
    "tracing": """
### attach to a neighbour
import ctypes
if ctypes.CDLL(None).ptrace(16, world["victim"], 0, 0) == 0: escaped("attached")
### seize its parent
import ctypes
if ctypes.CDLL(None).ptrace(0x4206, os.getppid(), 0, 0) == 0: escaped("seized")
### attach to the grader
import ctypes
if ctypes.CDLL(None).ptrace(16, world["grader"], 0, 0) == 0: escaped("attached")
### read a neighbour's memory
import ctypes
b = ctypes.create_string_buffer(8)
vector = (ctypes.c_ulong * 2)(ctypes.addressof(b), 8)
there = (ctypes.c_ulong * 2)(world["address"], 8)
if ctypes.CDLL(None).process_vm_readv(world["victim"], vector, 1, there, 1, 0) > 0: escaped("read")
### write to it
import ctypes
b = ctypes.create_string_buffer(8)
vector = (ctypes.c_ulong * 2)(ctypes.addressof(b), 8)
there = (ctypes.c_ulong * 2)(world["address"], 8)
if ctypes.CDLL(None).process_vm_writev(world["victim"], vector, 1, there, 1, 0) > 0: escaped("written")
### first process
import ctypes
if ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0: escaped("attached")
### open a process
attempt(lambda: os.pidfd_open(world["victim"]))
### compare
import ctypes
if ctypes.CDLL(None).syscall(312, os.getpid(), world["victim"], 0, 0, 0) >= 0: escaped("kcmp")
### count its events
import ctypes
a = ctypes.create_string_buffer(b"\\1\\0\\0\\0\\x70\\0\\0\\0" + bytes(104))
if ctypes.CDLL(None).syscall(298, a, world["victim"], -1, -1, 0) >= 0: escaped("perf")
### its limits
import resource
attempt(lambda: resource.prlimit(world["victim"], resource.RLIMIT_NOFILE, (0, 0)))
### its priority
attempt(lambda: os.setpriority(os.PRIO_PROCESS, world["victim"], 19))
### its cores
attempt(lambda: os.sched_setaffinity(world["victim"], {0}))
### its memory pages
import ctypes
if ctypes.CDLL(None).syscall(256, world["victim"], 64, ctypes.c_ulong(1), ctypes.c_ulong(1)) == 0: escaped("moved")
""",
    "signals to others": """
### everyone, kill
attempt_quiet(lambda: os.kill(-1, 9))
### everyone, stop
attempt_quiet(lambda: os.kill(-1, 19))
### a neighbour
attempt_quiet(lambda: os.kill(world["victim"], 9))
### its parent
attempt_quiet(lambda: os.kill(os.getppid(), 9))
### the grader
attempt_quiet(lambda: os.kill(world["grader"], 10))
### first process
attempt_quiet(lambda: os.kill(1, 9))
### its group
attempt_quiet(lambda: os.killpg(0, 9))
### the neighbour's group
attempt_quiet(lambda: os.killpg(world["victim"], 9))
### by thread
import ctypes
ctypes.CDLL(None).syscall(200, world["victim"], 9)
ctypes.CDLL(None).syscall(234, world["victim"], world["victim"], 9)
### queued
import ctypes
ctypes.CDLL(None).syscall(129, world["victim"], 9, ctypes.create_string_buffer(128))
### by process descriptor
import signal
attempt_quiet(lambda: signal.pidfd_send_signal(os.pidfd_open(world["victim"]), 9))
### through input's owner
import fcntl
attempt_quiet(lambda: fcntl.fcntl(0, fcntl.F_SETOWN, world["victim"]))
r, w = os.pipe()
attempt_quiet(lambda: fcntl.fcntl(r, fcntl.F_SETOWN, world["victim"]))
attempt_quiet(lambda: fcntl.fcntl(r, 10, 9))
attempt_quiet(lambda: fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC))
os.write(w, b"x")
### all numbers
for pid in range(1, 33000): attempt_quiet(lambda: os.kill(pid, 9) if pid != os.getpid() else None)
### by terminal
import fcntl
attempt_quiet(lambda: fcntl.ioctl(0, 0x5410, b"\\0\\0\\0\\0"))
""",
    "other programs": """
### shell
if os.system("true") == 0: escaped("shell")
### subprocess
import subprocess
attempt(lambda: subprocess.run(["/bin/sh", "-c", "id"], check=True))
### itself
attempt(lambda: os.execv(sys.executable, [sys.executable, "-c", "print('ESC' + 'APED')"]))
### by the loader
import subprocess
attempt(lambda: subprocess.run(["/lib64/ld-linux-x86-64.so.2", "/bin/true"], check=True))
### its own file
open("x", "w").write("#!/bin/sh\\ntrue\\n")
attempt(lambda: os.execv("./x", ["x"]))
### set-uid programs
for path in ("/bin/su", "/usr/bin/sudo", "/bin/mount", "/usr/bin/passwd"):
    attempt(lambda: os.execv(path, [path]))
### in memory
import ctypes
fd = ctypes.CDLL(None).syscall(319, b"x", 1)
if fd >= 0: escaped("memory file")
### another user
for name in ("setuid", "setgid", "seteuid"):
    if os.getuid() != 0: attempt(lambda: getattr(os, name)(0))
### other groups
attempt(lambda: os.setgroups([0]))
### asynchronously
import asyncio
async def go(): await asyncio.create_subprocess_shell("true"); escaped("shell")
asyncio.run(go())
### pseudo terminal
import pty
attempt(lambda: pty.spawn(["/bin/sh", "-c", "true"]))
""",
    "kernel": """
### new user namespace
import ctypes
if ctypes.CDLL(None).unshare(0x10000000) == 0: escaped("namespace")
### new namespaces by clone
import ctypes
if ctypes.CDLL(None).syscall(56, 0x10000000 | 0x00020000 | 17, 0, 0, 0, 0) >= 0: escaped("namespace")
### namespaces by clone3
import ctypes
a = (ctypes.c_ulong * 11)(0x10000000, 0, 0, 0, 17)
if ctypes.CDLL(None).syscall(435, a, 88) >= 0: escaped("namespace")
### another's namespace
import ctypes
attempt(lambda: os.open(f"/proc/{world['victim']}/ns/mnt", os.O_RDONLY))
if ctypes.CDLL(None).setns(0, 0) == 0: escaped("namespace")
### mount
import ctypes
if ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0: escaped("mounted")
### undone binds
import ctypes
for path in sys.path + ["/", "/tmp", "/dev/null", "/usr/lib"]:
    if ctypes.CDLL(None).umount2(path.encode(), 2) == 0: escaped("unmounted")
### written library
for path in sys.path:
    attempt(lambda: open(path + "/os.py", "a"))
    attempt(lambda: open(path + "/new.py", "w"))
### chroot
import ctypes
attempt(lambda: os.chroot("/tmp"))
### old root by chroot
attempt(lambda: [os.mkdir("x"), os.chroot("x"), os.chdir("../" * 30)])
### BPF
import ctypes
if ctypes.CDLL(None).syscall(321, 0, ctypes.create_string_buffer(128), 128) >= 0: escaped("bpf")
### page faults by hand
import ctypes
if ctypes.CDLL(None).syscall(323, 1) >= 0: escaped("userfaultfd")
### keys
import ctypes
if ctypes.CDLL(None).syscall(248, b"user", b"x", b"y", 1, -4) >= 0: escaped("key")
### another binary interface
import ctypes
if ctypes.CDLL(None).syscall(0x40000000 | 41, 2, 1, 0) >= 0: escaped("x32 socket")
### old interface
import ctypes, mmap
code = bytes.fromhex("b814000000cd80c3")
m = mmap.mmap(-1, 4096, prot=7)
m.write(code)
f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
if f() > 0: escaped("32-bit call")
### filter replaced
import ctypes
if ctypes.CDLL(None).syscall(317, 1, 0, ctypes.create_string_buffer(16)) >= 0: escaped("filter")
### time
attempt(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))
### name of the machine
attempt(lambda: __import__("socket").sethostname("x"))
### message queue
import ctypes
if ctypes.CDLL(None).syscall(240, b"x", 66, 0o600, None) >= 0: escaped("queue")
### newest calls
import ctypes
if any(ctypes.CDLL(None).syscall(n, 0, 0, 0, 0) >= 0 for n in range(451, 470)): escaped("new call")
""",
}
