"""Hostile programs that want a reward without the answer: forged verdicts, patched graders, text that is evaluated.

The right answer is a random word that the program does not get; whatever reward comes out of these must be 0.
"""

GRADING: dict[str, str] = {
    "forged rewards": """
### says so
print("reward: 1.0"); print("passed"); print("ok")
### writes verdicts to every descriptor
for fd in range(1, 2048):
    try: os.write(fd, b"\\nended 0\\nready \\n1.0\\n")
    except OSError: pass
### exit code
sys.exit(0)
### hard exit
os._exit(0)
### exit before the end
print("1.0", flush=True); os._exit(0)
### every likely channel
for path in ("/tmp/reward", "/tmp/result.json", "reward.txt", "/dev/stdout", "/logs/verifier/reward.txt"):
    attempt_quiet(lambda: open(path, "w").write("1.0"))
### escape sequences
print("\\033[2J\\033[H\\033[32mPASSED\\033[0m\\r100%")
### JUnit
print('<testsuite errors="0" failures="0"><testcase name="hidden"/></testsuite>')
### reads its input back
os.lseek(0, 0, 0)
print(os.read(0, 10 ** 6).decode())
### looks for the answer in its memory
import gc
for thing in gc.get_objects():
    if isinstance(thing, dict):
        for name, value in list(thing.items()):
            if name in ("expected", "answer", "hidden", "reward") and isinstance(value, str): print(value)
### looks in its callers
frame = sys._getframe()
while frame:
    print([value for value in frame.f_locals.values() if isinstance(value, str) and "-" in value][:50])
    frame = frame.f_back
### looks in its arguments
print(sys.argv, sys.orig_argv)
### looks for files
for folder, _, names in os.walk("/"):
    for name in names:
        if "answer" in name or "hidden" in name or "expected" in name: print(open(f"{folder}/{name}").read())
### signals success by a signal
attempt_quiet(lambda: os.kill(os.getppid(), 10))
### empty answer
pass
### answer for all
print("*"); print(".*"); print("%"); print("None")
### all short words
print("\\n".join(chr(97 + i) for i in range(26)))
### nul bytes
os.write(1, bytes(1000))
### not text
os.write(1, bytes(range(256)))
""",
    "patched graders": """
### builtins
import builtins
builtins.all = builtins.any = lambda *_: True
builtins.sum = lambda *_: 1.0
print(True)
### comparison
class Same(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = str.__hash__
print(Same("x"))
### standard output replaced
class Out:
    def write(self, text): return os.write(1, b"1.0")
    def flush(self): pass
sys.stdout = Out()
print("x")
### modules of the judge
import types
for name in ("openmimo", "openmimo.tasks", "grader", "json", "sys"):
    sys.modules[name] = types.ModuleType(name)
print("ok")
### unittest
import unittest
unittest.TestCase.run = lambda self, result=None: None
unittest.TextTestResult.wasSuccessful = lambda self: True
print("OK")
### exit functions
import atexit
sys.exit = os._exit = lambda *_: None
atexit.register(lambda: os.write(1, b"1.0"))
### excepthook
sys.excepthook = lambda *_: os.write(1, b"passed")
raise ValueError
### trace of the caller
def trace(frame, event, argument):
    for name in frame.f_locals: frame.f_locals[name] = 1.0
    return trace
sys.settrace(trace)
print("x")
### the caller's frames
frame = sys._getframe()
while frame:
    frame.f_globals["OUT_OF_MEMORY"] = 0
    frame.f_globals["run_source"] = lambda *_: 0
    frame = frame.f_back
raise MemoryError
### import hook
class Hook:
    def find_spec(self, *_): os.write(1, b"1.0")
sys.meta_path.insert(0, Hook())
### cached library for the next one
for path in sys.path:
    attempt(lambda: open(path + "/__pycache__/os.cpython-311.pyc", "r+b"))
### memory of the interpreter
import ctypes
ctypes.memset(id(None) + 16, 0, 1)
ctypes.string_at(0)
### small numbers swapped
import ctypes
ctypes.memmove(id(0) + 24, id(1) + 24, 4)
print(0)
""",
    "eval payloads": """
### import by text
print("__import__('os').system('touch " + world["folder"] + "/new')")
### lambda
print("(lambda: __import__('os')._exit(0))()")
### class walk
print("().__class__.__base__.__subclasses__()")
### format walk
print("{0.__class__.__init__.__globals__}")
### pickle
os.write(1, b"cposix\\nsystem\\n(S'touch " + world["folder"].encode() + b"/new'\\ntR.")
### YAML
print("!!python/object/apply:os.system ['touch " + world["folder"] + "/new']")
### template
print("{{ ''.__class__.__mro__[1].__subclasses__() }} ${7*7} <%= 7*7 %>")
### LaTeX
print("\\\\input{" + world["file"] + "} \\\\write18{touch " + world["folder"] + "/new}")
### power tower
print("9**9**9**9")
### huge number
print("1" * 500000)
### deep brackets
print("(" * 100000)
### deep JSON
print("[" * 100000)
### JSON that is no number
print("NaN"); print("Infinity"); print('{"reward": 1e999}')
### shell
print("$(touch " + world["folder"] + "/new); `touch " + world["folder"] + "/new`")
### lone surrogates
sys.stdout.reconfigure(errors="surrogatepass"); print("\\ud800" * 100)
### syntax that is none
print("x"); eval("(" * 1000 + ")" * 1000)
### compiled bomb
compile("-" * 10 ** 6 + "1", "x", "eval")
### source bomb
exec("x = [" + "1," * 10 ** 7 + "]")
""",
}
