"""Hostile programs that take too much or do not end: processes, memory, disk, output, time.

One text per class; `### name` starts a program. Each runs after `sandbox_corpus.PRELUDE`.
"""

RESOURCES: dict[str, str] = {
    "fork bomb": """
### two branches for ever
while True:
    try: os.fork()
    except OSError: pass
### quiet doubling
for _ in range(40):
    try: os.fork()
    except OSError: pass
time.sleep(60)
### chain, each child forks and its parent leaves
while True:
    try:
        if os.fork(): os._exit(0)
    except OSError: time.sleep(0.001)
### chain that changes its session each time
while True:
    try:
        if os.fork(): os._exit(0)
        os.setsid()
    except OSError: time.sleep(0.001)
### threads for ever
import threading
while True:
    try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    except RuntimeError: time.sleep(0.001)
### threads with small stacks
import threading
threading.stack_size(32768)
started = 0
try:
    while started < 500:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        started += 1
except RuntimeError: pass
if started > 64: escaped(f"{started} threads")
### processes counted
children = 0
try:
    while children < 100:
        if os.fork() == 0: time.sleep(60)
        children += 1
except OSError: pass
if children > 64: escaped(f"{children} processes")
### zombies, never waited for
while True:
    try:
        if os.fork() == 0: os._exit(0)
    except OSError: time.sleep(0.001)
### raw clone by number
import ctypes
libc = ctypes.CDLL(None)
for _ in range(10000): libc.syscall(56, 17, 0, 0, 0, 0)
time.sleep(60)
### vfork by number
import ctypes
libc = ctypes.CDLL(None)
for _ in range(100): libc.syscall(57)
time.sleep(60)
### posix_spawn of itself
for _ in range(100):
    attempt(lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"], {}))
### multiprocessing pool
import multiprocessing
attempt(lambda: multiprocessing.get_context("fork").Pool(64))
""",
    "memory": """
### one large block
x = bytearray(8 << 30)
escaped("8 GiB")
### doubling list
x = [0]
while True: x += x
### doubling string
x = "x"
while True: x += x
### map and touch
import mmap
m = [mmap.mmap(-1, 64 << 20) for _ in range(200)]
escaped("12 GiB mapped")
### large power
x = 10 ** (10 ** 10)
### factorial
import math
math.factorial(10 ** 9)
### many processes with a share each
for _ in range(30):
    try:
        if os.fork() == 0:
            x = [bytearray(1 << 20) for _ in range(400)]
            escaped("400 MiB in a child of 256")
    except OSError: pass
time.sleep(60)
### handled and tried again
x = []
while True:
    try: x.append(bytearray(1 << 26))
    except MemoryError: pass
### nested tuples
x = ()
while True: x = (x, [x] * 1000)
### format width
"%0*d" % (10 ** 10, 1)
escaped("10 GB of text")
### shared memory file
attempt(lambda: os.memfd_create("x"))
import ctypes
fd = ctypes.CDLL(None).syscall(319, b"x", 0)
if fd >= 0: escaped("memory file")
### System V segment
import ctypes
libc = ctypes.CDLL(None)
segment = libc.shmget(0, 1 << 26, 0o1666)
if segment >= 0: escaped("segment that outlives us")
### compressed bomb
import zlib
data = zlib.compress(bytes(1 << 24), 9)
x = b"".join(zlib.decompress(data) for _ in range(1000))
### regular expression
import re
re.match("(" * 90 + ")" * 90 + "x{1,60000}" * 50, "x" * 10 ** 6)
""",
    "disk": """
### one endless file
with open("flood", "wb") as f:
    while True: f.write(bytes(1 << 20))
### many files
total = 0
for i in range(100):
    with open(f"f{i}", "wb") as f: total += f.write(bytes(1 << 20))
escaped(f"{total} bytes in files")
### sparse file
with open("sparse", "wb") as f: f.truncate(1 << 40)
escaped("sparse")
### many empty files
for i in range(10 ** 6): open(f"e{i}", "wb").close()
### deep folders
while True:
    os.mkdir("d"); os.chdir("d")
### fallocate
with open("full", "wb") as f: os.posix_fallocate(f.fileno(), 0, 1 << 34)
escaped("16 GiB reserved")
### deleted but open
files = []
while True:
    f = open("x", "wb"); f.write(bytes(8 << 20)); f.flush(); os.unlink("x"); files.append(f)
    if len(files) > 20: escaped("160 MiB in deleted files")
### elsewhere
for place in ("/dev/shm/flood", "/var/tmp/flood", "/run/flood", "/flood", world["folder"] + "/flood"):
    attempt(lambda: open(place, "wb").write(bytes(1 << 20)))
### in its own input
attempt(lambda: os.write(0, bytes(1 << 20)))
attempt(lambda: os.ftruncate(0, 1 << 30))
### links without end
for i in range(10 ** 5): os.symlink("x" * 4000, f"l{i}")
### fifo without end
for i in range(10 ** 5): os.mkfifo(f"p{i}")
""",
    "output flood": """
### standard output
while True: os.write(1, b"y" * 65536)
### standard error
while True: os.write(2, b"y" * 65536)
### both in turns
while True: os.write(1, b"y" * 4096); os.write(2, b"y" * 4096)
### print for ever
while True: print("y" * 1000)
### one huge line
sys.stdout.write("y" * (100 << 20))
### from children
for _ in range(4):
    try: os.fork()
    except OSError: pass
while True: os.write(1, b"y" * 65536)
### endless traceback
def f(n): raise ValueError("y" * 10 ** 6)
for _ in range(10000):
    try: f(0)
    except ValueError:
        import traceback; traceback.print_exc()
### enlarged pipe
import fcntl
attempt_quiet(lambda: fcntl.fcntl(1, 1031, 1 << 20))
while True: os.write(1, b"y" * (1 << 20))
### one byte at a time
while True: os.write(1, b"y")
""",
    "does not end": """
### loop
while True: pass
### sleep
time.sleep(3600)
### waits for input that never comes
r, w = os.pipe()
os.read(r, 1)
### one call that takes hours
sum(range(10 ** 13))
### catastrophic expression
import re
re.match(r"(a+)+b", "a" * 60)
### finaliser that sleeps
import atexit
atexit.register(time.sleep, 3600)
### thread that outlives the main one
import threading
threading.Thread(target=time.sleep, args=(3600,)).start()
### swallows everything
while True:
    try:
        while True: time.sleep(1)
    except BaseException: pass
### destructor without end
class D:
    def __del__(self):
        while True: pass
d = D()
### closes its output and goes on
os.close(1); os.close(2)
time.sleep(3600)
### dead lock
import threading
lock = threading.Lock(); lock.acquire(); lock.acquire()
### deep recursion in C
sys.setrecursionlimit(10 ** 9)
def f(): return f()
f()
""",
    "ignored signals": """
### all that can be
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
### handlers that go on
import signal
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGALRM):
    signal.signal(number, lambda *_: None)
while True: time.sleep(1)
### blocked
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: pass
### child ignores, parent leaves
import signal
if os.fork(): os._exit(0)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE): signal.signal(number, signal.SIG_IGN)
while True: time.sleep(1)
### stops itself
import signal
os.kill(os.getpid(), signal.SIGSTOP)
### processor limit caught
import signal, resource
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
attempt_quiet(lambda: resource.setrlimit(resource.RLIMIT_CPU, (10 ** 6, 10 ** 6)))
while True: pass
### death by parent undone
import ctypes
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
if os.fork(): os._exit(0)
time.sleep(3600)
### raised limits
import resource
for name in ("RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_CPU", "RLIMIT_NOFILE"):
    attempt(lambda: resource.setrlimit(getattr(resource, name), (1 << 40, 1 << 40)))
""",
    "daemons that hold the pipes": """
### double fork
if os.fork() == 0:
    if os.fork() == 0: time.sleep(3600)
    os._exit(0)
### double fork with a new session
if os.fork() == 0:
    attempt_quiet(os.setsid)
    if os.fork() == 0: time.sleep(3600)
    os._exit(0)
### new group
if os.fork() == 0:
    attempt_quiet(lambda: os.setpgid(0, 0))
    time.sleep(3600)
### child of a killed parent
if os.fork() == 0:
    if os.fork() == 0: time.sleep(3600)
    os.kill(os.getpid(), 9)
    os.abort()
### writes on after the end
if os.fork() == 0:
    while True:
        time.sleep(0.01); os.write(1, b".")
### copies of the pipe
for fd in range(10, 20): os.dup2(1, fd)
if os.fork() == 0: time.sleep(3600)
### sub-reaper of its own
import ctypes
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
if os.fork() == 0:
    if os.fork() == 0:
        if os.fork() == 0: time.sleep(3600)
        time.sleep(3600)
    os._exit(0)
### vanishing middle
for _ in range(3):
    if os.fork() == 0:
        if os.fork(): os._exit(0)
        time.sleep(3600)
### fork at exit
import atexit
def last():
    if os.fork() == 0: time.sleep(3600)
atexit.register(last)
""",
}
