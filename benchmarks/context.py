"""What a long context costs: prompts of 1k to 256k tokens.

    python benchmarks/context.py                                # `tiny`, 1k to 256k: about twelve minutes
    python benchmarks/context.py --preset small --longest 32768

At each length: bytes of the cache in use beside the formula (`openmimo.config.cost.kv_cache_bytes` for whole pages),
those of the sliding layers and MTP heads alone, the time of the prompt and that of a decoding step. Then how much
longer a step takes than at the shortest length, beside the time of reading the global layers' additional bytes at the
speed of this machine's memory. Steps and readings of as many bytes take turns, and each bout of steps is compared with
the reading behind it, because that speed changes by half from one second to the next. Prints a table, then one JSON
line.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from typing import Any

import torch

from common import MemoryReader, describe_machine, print_result, print_table
from openmimo.config.cost import kv_cache_bytes
from openmimo.config.model import preset
from openmimo.engine import Engine, SamplingParams
from openmimo.engine.runner import PAGE_TOKENS
from openmimo.evals.bench_limits import MOST_READ_BYTES
from openmimo.model import build_model

BOUT = 8  # steps between two readings of memory
FEWEST_BOUTS, MOST_BOUTS = 8, 64  # of a length: one for 1,024 tokens, so that it hardly grows meanwhile
REST = 0.05  # seconds behind a reading, whose threads look for more work for a while


def num_decoded(length: int) -> int:
    """Tokens to decode behind a prompt; the first of them comes with the prompt."""
    return 1 + BOUT * min(MOST_BOUTS, max(FEWEST_BOUTS, length // 1024))


def measure(engine: Engine, prompt: list[int], read_bytes: int, reader: MemoryReader) -> dict[str, Any]:
    """Seconds and bytes of one prompt and of decoding behind it, and the speed of memory meanwhile, bout by bout."""
    request = engine.add_request(prompt, SamplingParams(max_tokens=num_decoded(len(prompt)), ignore_eos=True))
    started, steps, bouts, reads, used = time.perf_counter(), list[float](), list[float](), list[float](), 0
    prompt_seconds = 0.0
    while True:
        began = time.perf_counter()
        events = engine.step()
        ended = time.perf_counter()
        if not events:
            continue
        if prompt_seconds == 0.0:
            prompt_seconds = ended - started
        else:
            steps.append(ended - began)
            if len(steps) % BOUT == 0:
                bouts.append(statistics.median(steps[-BOUT:]))
                reads.append(reader.bandwidth(read_bytes, rounds=1, min_seconds=0.005))
                time.sleep(REST)
        if any(event.completion is not None for event in events):
            break
        used = engine.used_cache_bytes
    engine.abort(request)
    return {
        "prompt_s": prompt_seconds,
        "step_s": statistics.median(steps),
        "used_bytes": used,
        "bout_s": bouts,
        "bandwidth": reads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=262144)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    config = preset(options.preset)
    longest = min(options.longest, config.max_positions - num_decoded(options.longest))
    torch.set_num_threads(options.threads)
    model = build_model(config, seed=0, dtype=torch.bfloat16).eval()
    engine = Engine(
        model,
        runner="native",
        draft_heads=0,
        max_batch=1,
        cache_tokens=longest + num_decoded(longest) + 4 * PAGE_TOKENS,
        prefix_cache_bytes=0,
        threads=options.threads,
    )
    text = random.Random(0).choices(range(config.vocab_size), k=longest)
    rows: list[dict[str, Any]] = []
    reader = MemoryReader(MOST_READ_BYTES)
    length = options.shortest
    while True:
        length = min(length, longest)
        pages = -(-(length + num_decoded(length) - 1) // PAGE_TOKENS) * PAGE_TOKENS
        formula = kv_cache_bytes(config, pages, draft_slots=config.num_mtp_heads, mtp_heads=config.num_mtp_heads)
        read_bytes = min(MOST_READ_BYTES, max(1 << 24, formula.global_layers))
        row = {"tokens": length, **measure(engine, text[:length], read_bytes, reader), "formula_bytes": formula.total}
        row["global_bytes"] = formula.global_layers
        row["sliding_bytes"] = row["used_bytes"] - formula.global_layers
        rows.append(row)
        first = rows[0]
        row["extra_s"] = row["step_s"] - first["step_s"]
        extra = row["global_bytes"] - first["global_bytes"]
        row["memory_s"] = extra / statistics.median(row["bandwidth"])
        ratios = [(step - first["step_s"]) * speed for step, speed in zip(row["bout_s"], row["bandwidth"], strict=True)]
        row["ratio"] = statistics.median(ratios) / extra if extra else 0.0
        print(f"{length} tokens: {row['step_s'] * 1e3:.2f} ms per step", file=sys.stderr)
        if length == longest:
            break
        length *= 2
    print_table(
        ("tokens", "cache MB", "formula", "sliding MB", "prompt s", "step ms", "longer by ms", "memory ms", "ratio"),
        [
            [
                int(row["tokens"]),
                f"{row['used_bytes'] / 1e6:.2f}",
                f"{100 * (row['used_bytes'] / row['formula_bytes'] - 1):+.2f}%",
                f"{row['sliding_bytes'] / 1e6:.3f}",
                f"{row['prompt_s']:.2f}",
                f"{row['step_s'] * 1e3:.2f}",
                f"{row['extra_s'] * 1e3:.2f}",
                f"{row['memory_s'] * 1e3:.2f}",
                f"x{row['ratio']:.2f}" if row["ratio"] else "-",
            ]
            for row in rows
        ],
    )
    about = {"preset": options.preset, "threads": options.threads, "engine": engine.runner.__class__.__name__}
    print_result("context", describe_machine(), {**about, "rows": rows})


if __name__ == "__main__":
    main()
