"""Damage small checkpoint folders in many ways and load them: each must be refused or load correctly.

Usage: python benchmarks/checkpoint_fuzz.py [--cases 2000] [--seed 0]
Prints a table per kind of damage and one JSON line. Exits with 1 on any unexpected outcome.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from openmimo.checkpoint.load import load_model
from openmimo.checkpoint.save import save_model
from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, MoEConfig
from openmimo.errors import MimoError
from openmimo.model.model import build_model

State = dict[str, torch.Tensor]
INDEX, CONFIG, MANIFEST = "model.safetensors.index.json", "config.json", "manifest.json"
EXTREMES: tuple[object, ...] = (
    0, -1, 1, 2, 3, 7, 10**6, 10**9, 10**18, 2**63, 10**400, 0.0, -1.5, 1e308, True, False, None, "", "x", "../x",
    "\ud800", "\0", [], [0], [1] * 50, [[]], {}, {"a": 1},
)  # fmt: skip
GARBAGE = (
    b"", b"\0" * 100, b"[" * 200_000, b'{"a":' * 100_000, b'{"a": 1e999}', b'{"a": NaN}', b'{"a":' + b"9" * 9999 + b"}",
    b'{"a":1,"a":2}', b"\xff\xfe{}", b"[]", b"null", b'"x"', b"{}", b'{"\\ud800": 1}',
)  # fmt: skip


@dataclass
class KindResult:
    """Outcomes of one kind of damage. `silent`: loaded with other values, without --verify; with it, a failure."""

    cases: int = 0
    refused: int = 0
    exact: int = 0
    silent: int = 0
    refused_by_verify: int = 0
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0  # of processor time, so that a busy machine does not matter
    peak_mib: float = 0.0


def tiny_config() -> ModelConfig:
    def attention(kv_heads: int, window: int | None) -> AttentionConfig:
        return AttentionConfig(
            num_heads=4, num_kv_heads=kv_heads, qk_head_dim=192, v_head_dim=128,
            rope_theta=1e4, sink=window is not None, window_keys=window,
        )  # fmt: skip

    return ModelConfig(
        vocab_size=24,
        hidden_size=16,
        dense_dim=20,
        layer_kinds=(AttentionKind.GLOBAL, AttentionKind.SLIDING),
        layer_is_moe=(False, True),
        global_attention=attention(2, None),
        sliding_attention=attention(4, 5),
        moe=MoEConfig(num_experts=3, num_experts_per_token=2, expert_dim=12),
        num_mtp_heads=1,
        rope_fraction=0.5,
    )


# --- damage: each function changes a folder in place -------------------------------------------------------------


def pick(rng: random.Random, folder: Path, pattern: str = "*") -> Path:
    return rng.choice(sorted(folder.glob(pattern)))


def split(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(path: Path, header: dict | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def flip(rng: random.Random, path: Path, limit: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    position = rng.randrange(min(limit or len(content), len(content)))
    content[position] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_any(rng: random.Random, folder: Path) -> None:
    flip(rng, pick(rng, folder))


def flip_header(rng: random.Random, folder: Path) -> None:
    path = pick(rng, folder, "*.safetensors")
    flip(rng, path, 8 + int.from_bytes(path.read_bytes()[:8], "little"))


def flip_json(rng: random.Random, folder: Path) -> None:
    flip(rng, pick(rng, folder, "*.json"))


def truncate(rng: random.Random, folder: Path) -> None:
    path = pick(rng, folder)
    os.truncate(path, rng.randrange(path.stat().st_size))


def extend(rng: random.Random, folder: Path) -> None:
    with open(pick(rng, folder, "*.safetensors"), "ab") as file:
        file.write(rng.randbytes(rng.randint(1, 64)))


def header_length(rng: random.Random, folder: Path) -> None:
    path = pick(rng, folder, "*.safetensors")
    header, data = split(path)
    join(path, header, data, rng.choice([0, 1, 7, 10**5, 10**8, 10**8 + 1, 2**31, 2**32, 2**63, 2**64 - 1]))


def header_field(rng: random.Random, folder: Path) -> None:
    """Another dtype, shape or offset: overlaps, gaps, lies about sizes, values of the wrong type."""
    path = pick(rng, folder, "*.safetensors")
    header, data = split(path)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    key = rng.choice(["dtype", "shape", "data_offsets", "new"])
    if key == "dtype":
        entry[key] = rng.choice(
            [d for d in ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I64", "BOOL") if d != entry[key]]
        )
    elif key == "new" or rng.random() < 0.4:
        entry[key] = rng.choice(EXTREMES)
    elif key == "shape" and rng.random() < 0.5:
        entry[key] = [1, *entry[key]]
    else:
        entry[key][rng.randrange(len(entry[key]))] += rng.choice([-4, -1, 1, 4, 2**40])
    join(path, header, data)


def duplicate_name(rng: random.Random, folder: Path) -> None:
    path = pick(rng, folder, "*.safetensors")
    header, data = split(path)
    name = rng.choice([name for name in header if name != "__metadata__"])
    extra = json.dumps({name: header[name]})[1:]
    join(path, (json.dumps(header)[:-1] + ", " + extra).encode(), data)


def swap_names(rng: random.Random, folder: Path) -> None:
    """Exchange the places of two tensors of a file: valid, wrong, and visible to a hash only when shapes agree."""
    path = pick(rng, folder, "*.safetensors")
    header, data = split(path)
    names = [name for name in header if name != "__metadata__"]
    if len(names) < 2:
        return flip(rng, path)
    first, second = rng.sample(names, 2)
    header[first], header[second] = header[second], header[first]
    return join(path, header, data)


def drop_or_add_tensor(rng: random.Random, folder: Path) -> None:
    path = pick(rng, folder, "*.safetensors")
    header, data = split(path)
    index = json.loads((folder / INDEX).read_text())
    if rng.random() < 0.5:
        old = rng.choice([name for name in header if name != "__metadata__"])
        new = rng.choice([old + "x", "model.layers.99.x", "", "\0", "a" * 10_000])
        header[new] = header.pop(old)
    else:
        new = rng.choice(
            ["extra", "model.mtp.layers.77.enorm.weight", "model.layers.0.self_attn.o_proj.weight_scale_inv"]
        )
        header[new] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        old, data = "", data + bytes(4)
    if rng.random() < 0.7:
        index["weight_map"].pop(old, None)
        index["weight_map"][new] = path.name
        (folder / INDEX).write_text(json.dumps(index))
    join(path, header, data)


def swap_files(rng: random.Random, folder: Path) -> None:
    first, second = rng.sample(sorted(folder.iterdir()), 2)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def json_garbage(rng: random.Random, folder: Path) -> None:
    pick(rng, folder, "*.json").write_bytes(rng.choice([*GARBAGE, rng.randbytes(50)]))


def json_value(rng: random.Random, folder: Path) -> None:
    """One value of a JSON file, at any depth, becomes something extreme; sometimes a key goes or comes."""
    path = rng.choice([folder / CONFIG, folder / CONFIG, folder / INDEX, folder / MANIFEST])
    content = node = json.loads(path.read_text())
    while True:
        key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    action = rng.random()
    if action < 0.1:
        del node[key]
    elif action < 0.2 and isinstance(node, dict):
        node["unknown_key"] = rng.choice(EXTREMES)
    else:
        node[key] = rng.choice(EXTREMES)
    path.write_text(json.dumps(content))


def index_path(rng: random.Random, folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = rng.choice(sorted(index["weight_map"]))
    files = [path.name for path in folder.glob("*.safetensors")]
    places = ["/etc/passwd", "../x.safetensors", f"../{folder.name}/model_mtp.safetensors", ".", "..", "/dev/zero",
              CONFIG, "~", "a" * 300, "x\0y", "con:", *files]  # fmt: skip
    index["weight_map"][name] = rng.choice([place for place in places if place != index["weight_map"][name]])
    (folder / INDEX).write_text(json.dumps(index))


def replace_by_special(rng: random.Random, folder: Path) -> None:
    path = pick(rng, folder)
    other = pick(rng, folder)
    path.unlink()
    kind = rng.choice(["gone", "link", "loop", "zero", "folder", "pipe", "dangling"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.symlink_to({"link": other.name, "loop": path.name, "zero": "/dev/zero", "dangling": "nothing"}[kind])


DAMAGE: tuple[Callable[[random.Random, Path], None], ...] = (
    flip_any, flip_header, flip_json, truncate, extend, header_length, header_field, duplicate_name, swap_names,
    drop_or_add_tensor, swap_files, json_garbage, json_value, index_path, replace_by_special,
)  # fmt: skip


# --- judging ------------------------------------------------------------------------------------------------------


class StuckError(Exception):
    """A load that took too long."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise StuckError(f"still loading after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def memory_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def judge(folder: Path, expected: State, *, verify: bool) -> str:
    """`refused`, `exact`, `silent` (right structure, other values) or a description of the failure."""
    try:
        with time_limit(10):
            got = load_model(folder, verify=verify).state_dict()
    except MimoError:
        return "refused"
    except Exception as error:  # any other exception is what this program looks for
        return f"{type(error).__name__}: {error}"[:200]
    if got.keys() != expected.keys() or any(got[name].shape != expected[name].shape for name in got):
        return "loaded with a wrong structure"
    same = all(torch.equal(got[name], expected[name]) for name in got)
    return "exact" if same else "silent"


def make_bases(folder: Path) -> list[tuple[Path, State]]:
    model = build_model(tiny_config(), seed=0)
    bases = []
    for layout, dtype in (("hub", "fp8"), ("hub", "bfloat16"), ("native", "float32")):
        path = folder / f"{layout}-{dtype}"
        save_model(model, path, layout=layout, dtype=dtype, max_shard_bytes=100_000)
        bases.append((path, load_model(path, verify=True).state_dict()))
    return bases


def run_cases(cases: int, seed: int, *, progress: bool = False) -> dict[str, KindResult]:
    """Run `cases` seeded cases, spread evenly over the kinds of damage and the base checkpoints."""
    results: dict[str, KindResult] = defaultdict(KindResult)
    with tempfile.TemporaryDirectory() as scratch:
        bases = make_bases(Path(scratch))
        for case in range(cases):
            rng = random.Random(f"{seed}/{case}")
            damage = DAMAGE[case % len(DAMAGE)]
            base, expected = bases[case // len(DAMAGE) % len(bases)]
            folder = Path(scratch) / "case"
            shutil.copytree(base, folder)
            damage(rng, folder)
            run_case(f"case {case}", results[damage.__name__], folder, expected)
            shutil.rmtree(folder)
            if progress and case % 100 == 99:
                print(f"{case + 1}/{cases}", file=sys.stderr, flush=True)
    return dict(results)


def run_case(name: str, result: KindResult, folder: Path, expected: State) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before_kib, start = memory_kib("VmRSS:"), time.process_time()
    outcome = judge(folder, expected, verify=False)
    result.slowest_s = max(result.slowest_s, time.process_time() - start)
    result.peak_mib = max(result.peak_mib, (memory_kib("VmHWM:") - before_kib) / 1024)
    verified = judge(folder, expected, verify=True)
    result.cases += 1
    result.refused_by_verify += verified == "refused"
    if verified not in ("refused", "exact"):
        result.failures.append(f"{name}: with verify: {verified}")
    if outcome in ("refused", "exact", "silent"):
        setattr(result, outcome, getattr(result, outcome) + 1)
    else:
        result.failures.append(f"{name}: {outcome}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("openmimo").setLevel(logging.ERROR)
    start = time.perf_counter()
    results = run_cases(options.cases, options.seed, progress=True)
    columns = ("cases", "refused", "exact", "silent", "verify", "fail", "cpu s", "MiB")
    print(f"{'damage':20}" + "".join(f"{column:>8}" for column in columns))
    for name, r in results.items():
        print(
            f"{name:20}{r.cases:8}{r.refused:8}{r.exact:8}{r.silent:8}{r.refused_by_verify:8}{len(r.failures):8}"
            f"{r.slowest_s:8.3f}{r.peak_mib:8.1f}"
        )
    failures = [failure for result in results.values() for failure in result.failures]
    print(*failures[:20], sep="\n")
    totals = Counter[str]()
    for result in results.values():
        totals.update({k: v for k, v in asdict(result).items() if isinstance(v, int)})
    summary = {
        "benchmark": "checkpoint_fuzz",
        "seed": options.seed,
        **totals,
        "failures": len(failures),
        "slowest_cpu_s": round(max(r.slowest_s for r in results.values()), 4),
        "peak_mib": round(max(r.peak_mib for r in results.values()), 1),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(summary))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
