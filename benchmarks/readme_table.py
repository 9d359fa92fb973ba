"""Write the measured table into both READMEs from the JSON lines in `benchmarks/results`.

    python benchmarks/train.py | tail -n 1 > benchmarks/results/train.json
    cp runs/demo/report.json benchmarks/results/demo-0.json
    python benchmarks/readme_table.py

Every figure comes from a file; a file that is missing leaves its rows out.
"""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- measured: start -->", "<!-- measured: end -->"
HEADS = {
    "README.md": ("what", "command", "figure", "machine"),
    "README.zh-CN.md": ("项目", "命令", "数值", "机器"),
}
MACHINE = {"README.md": "Machine {}: {}.", "README.zh-CN.md": "机器 {} 为 {}。"}

Rows = list[tuple[str, str, str]]


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


class Machines:
    """The machines of the table, lettered in the order in which they come up."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def mark(self, rows: Rows, name: str) -> list[tuple[str, ...]]:
        """The rows that came from the first of the files that `name` matches, with the letter of its machine."""
        found = [json.loads(path.read_text()).get("machine") for path in sorted(RESULTS.glob(f"{name}.json"))]
        known = [describe(machine) for machine in found if machine]
        if not known:
            return [(*row, "") for row in rows]
        letter = self.letters.setdefault(known[0], chr(ord("A") + len(self.letters)))
        return [(*row, letter) for row in rows]


def describe(machine: dict[str, Any]) -> str:
    features = ", ".join(machine["features"])
    versions = f"torch {machine['torch_version']}, Python {machine['python']}"
    return f"{machine['cpu']}, {machine['cores']} cores ({features}), {versions}"


def demo_rows() -> Rows:
    """Base, best teacher and student of every domain, acceptance and time, over the seeds that were run."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("demo-*.json"))]
    if not reports:
        return []
    rows: Rows = []
    command = f"`openmimo demo --seed N`, {len(reports)} seed{'s' * (len(reports) > 1)}"
    for domain in reports[0]["domains"]:
        figures = [demo_scores(report, domain) for report in reports]
        constant = max(r["domains"][domain]["constant_baseline"] for r in reports)
        label = f"demo, {domain}: before, best teacher, MOPD student (held out, drawn at temperature 1)"
        rows.append((label, command, f"{'; '.join(figures)} (best constant {100 * constant:.1f}%)"))
    recovered = ", ".join(f"{r['students']['MOPD']['recovered']:.0%}" for r in reports)
    rows.append(("demo: share of the teachers' headroom that the student has", command, recovered))
    lengths = [", ".join(f"{value:.2f}" for value in r["acceptance_length"].values()) for r in reports]
    rows.append(("demo: tokens per step with 3 heads, of 4 (math, code, logic)", command, "; ".join(lengths)))
    speed = ", ".join(f"{r['draft_speedup']:.2f}x" for r in reports)
    same = all(r["identical_output"] for r in reports)
    rows.append(
        ("demo: decoding with drafts / without", command, f"{speed}; output {'identical' if same else 'DIFFERS'}")
    )
    minutes = ", ".join(f"{r['seconds'] / 60:.1f} min" for r in reports)
    rows.append(("demo: time after set-up", command, minutes))
    return rows


def demo_scores(report: Any, domain: str) -> str:
    best = max(teacher["drawn"][domain] for teacher in report["teachers"].values())
    scores = (report["base"]["drawn"][domain], best, report["students"]["MOPD"]["drawn"][domain])
    return ", ".join(f"{100 * score:.1f}%" for score in scores)


def train_rows(preset: str) -> Rows:
    found = read(f"train-{preset}")
    if found is None:
        return []
    ours, theirs = (found["tokens_per_second"][name] for name in ("openmimo", "transformers"))
    share, peak = 100 * found["utilisation"]["openmimo"], found["matmul_peak_flops"] / 1e9
    figure = (
        f"{found['ratio']:.1f}x ({ours:,.0f} / {theirs:,.0f} tokens/s); {share:.0f}% of the matmul peak "
        f"of the same run, {peak:.0f} GFLOP/s (transformers {found['utilisation']['transformers']:.0%})"
    )
    label = f"training `{preset}` in bf16 beside transformers ({found['their_settings']})"
    apart = " --apart" if found["options"].get("apart") else ""
    return [(label, f"`python benchmarks/train.py --preset {preset}{apart}`", figure)]


def attention_rows() -> Rows:
    found = read("attention")
    if found is None:
        return []
    rows: Rows = []
    for backward, label in ((False, "forward"), (True, "forward + backward")):
        points = [m for m in found["measurements"] if m["kind"] == "sliding" and m["backward"] == backward]
        pairs = list(pairwise(points))
        times = [median(now / before for now, before in zip(b["seconds"], a["seconds"], strict=True)) for a, b in pairs]
        memory = [b["peak_bytes"] / max(a["peak_bytes"], 1) for a, b in pairs]
        figure = (
            f"time x{median(times):.2f} (worst {max(times):.2f}), memory x{median(memory):.2f} per doubling, "
            f"{points[0]['length']:,} to {points[-1]['length']:,} tokens"
        )
        rows.append((f"one sliding layer of `tiny`, {label}", "`python benchmarks/attention.py`", figure))
    return rows


def rows_by_work(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of `openmimo bench`, by work and then by target."""
    by_work: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        by_work.setdefault(row["work"], {})[row["target"]] = row
    return by_work


def bench_rows(path: Path) -> Rows:
    """What `openmimo bench WHAT --model M` printed, kept as bench-WHAT-M.json: ours beside every peer of the run."""
    found = json.loads(path.read_text())
    verb = found["benchmark"].removeprefix("bench ")
    if verb == "mtp":
        return mtp_rows(found)
    if verb == "load":
        (row,) = found["rows"]
        figure = f"{statistics.median(row['seconds']):.2f} s, {row['details']['peak_bytes'] / 1e9:.1f} GB at most"
        command = f"`openmimo bench load --model {found['model']}`"
        return [(f"files to first token, `{found['model']}` in {found['weights']}, packed before", command, figure)]
    rows: Rows = []
    for work, sides in rows_by_work(found).items():
        ours = sides.pop("openmimo")
        peers = [
            f"{name} {side['tokens_per_s']:,.0f} ({paired(side['seconds'], ours['seconds']):.1f}x)"
            for name, side in sides.items()
        ]
        share = ours.get("share_of_limit", ours["tokens_per_s"] / ours["limit_tokens_per_s"])
        figure = f"{ours['tokens_per_s']:,.0f} tokens/s, {100 * share:.0f}% of the limit; {', '.join(peers)}"
        command = f"`openmimo bench {verb} --model {found['model']} --against ...`"
        rows.append((f"{verb}, `{found['model']}` in {found['weights']}, {work}", command, figure))
    return rows


def paired(seconds: list[float], others: list[float]) -> float:
    """How many times as long as the others, round by round."""
    return median(mine / other for mine, other in zip(seconds, others, strict=True))


def mtp_rows(found: dict[str, Any]) -> Rows:
    """Drafting beside plain decoding, and the faster of llama.cpp's two ways."""
    rows: Rows = []
    for work, sides in rows_by_work(found).items():
        plain, drafts, auto = (sides["openmimo" + name] for name in ("", ", 3 drafts", ", auto drafts"))
        peer = max(side["tokens_per_s"] for name, side in sides.items() if name.startswith("llama.cpp"))
        figure = (
            f"3 drafts {drafts['tokens_per_s'] / plain['tokens_per_s']:.2f}x of plain decoding at "
            f"{drafts['details']['acceptance_length']:.2f} tokens per step, automatic {auto['tokens_per_s']:,.0f} "
            f"tokens/s ({auto['tokens_per_s'] / plain['tokens_per_s']:.2f}x); llama.cpp {peer:,.0f} "
            f"({auto['tokens_per_s'] / peer:.1f}x)"
        )
        rows.append(
            (
                f"drafting, demo model, {work}",
                "`openmimo bench mtp --model RUN --against llama.cpp`",
                figure,
            )
        )
    return rows


def table10_rows() -> Rows:
    """Speed-up by batch, for each number of tokens per step."""
    found = read("table10")
    if found is None:
        return []
    lines: dict[str, list[str]] = {}
    for cell in found["cells"]:
        wanted = cell["wanted"]
        name = f"{wanted:g} tokens per step" if wanted is not None else f"own heads, {cell['prompts']}"
        lines.setdefault(name, []).append(f"{cell['speedup']:.2f}x at {cell['batch']}")
    return [
        (
            f"Table 10, demo model: speed-up by drafts, {name}",
            "`openmimo reproduce table10 --model RUN`",
            ", ".join(line),
        )
        for name, line in lines.items()
    ]


def context_rows() -> Rows:
    found = read("context")
    if found is None:
        return []
    rows: Rows = []
    for row in found["rows"]:
        if row["tokens"] in (1024, 32768) or row is found["rows"][-1]:
            extra = f"; x{row['ratio']:.2f} of its extra bytes' time" if row["ratio"] else ""
            figure = (
                f"{1e3 * row['step_s']:.2f} ms per token{extra}; cache {row['used_bytes'] / 1e6:.1f} MB, "
                f"of it sliding layers and heads {row['sliding_bytes'] / 1e6:.2f} MB; prompt {row['prompt_s']:.1f} s"
            )
            rows.append(
                (f"`{found['preset']}` behind {row['tokens']:,} tokens", "`python benchmarks/context.py`", figure)
            )
    return rows


def table7_rows() -> Rows:
    """MOPD beside other ways to one model, the mean over the seeds."""
    found = read("table7")
    if found is None:
        return []
    rows: Rows = []
    domains = list(found["base"]["drawn"])
    before = ", ".join(f"{found['base']['drawn'][d]:.1%}" for d in domains)
    best = ", ".join(f"{max(t['drawn'][d] for t in found['teachers'].values()):.1%}" for d in domains)
    names = ", ".join(domains)
    rows.append((f"before, best teacher ({names})", "`openmimo reproduce table7`", f"{before}; {best}"))
    for name, student in found["students"].items():
        scores = ", ".join(f"{student['drawn'][d]:.1%}" for d in domains)
        figure = f"{scores}; {student['recovered']:.0%} of the headroom"
        seeds = f"{len(student['by_seed'])} seed{'s' * (len(student['by_seed']) > 1)}"
        rows.append((f"{name} ({names}), {seeds}", "`openmimo reproduce table7`", figure))
    return rows


def figure6_rows() -> Rows:
    """Steps until a student stands where its teachers do, nearly."""
    found = read("figure6")
    if found is None:
        return []
    parts = [
        f"{arm['name']} {arm['reached'] or 'not within ' + str(arm['curves'][0][-1]['step'])}" for arm in found["arms"]
    ]
    label = f"steps until 95% of the way to the teachers, {len(found['arms'][0]['curves'])} seeds"
    return [(label, "`openmimo reproduce figure6`", ", ".join(parts))]


def numzeros_rows() -> Rows:
    """What the count does where balance is undone and where a few samples are learnt by heart."""
    found = read("numzeros")
    if found is None:
        return []
    last = {arm["name"]: mean(arm["num_zeros"][-len(arm["num_zeros"]) // 5 :]) for arm in found["arms"]}
    control = last.pop(found["arms"][0]["name"])
    alerts = {arm["name"]: [f"{word} at step {step}" for step, word in arm["alerts"]] for arm in found["arms"]}
    parts = [f"{name} {count / control:.2f}x ({(alerts[name] or ['no alert'])[0]})" for name, count in last.items()]
    cost = max(arm["cost"] for arm in found["arms"])
    figure = f"{', '.join(parts)}; counting costs {cost:.2%} of a step"
    return [
        ("num-zeros of the last fifth of the steps, over those of other data", "`openmimo reproduce numzeros`", figure)
    ]


def ablation_rows() -> Rows:
    """Arms of attention: held-out loss, retrieval at the ends, bytes; and what the sink changes."""
    found = read("ablation")
    if found is None:
        return []
    windows = ",".join(str(window) for window, *_ in found["sink_minus_none"]["loss"])
    command = f"`openmimo reproduce attention --windows {windows}`"
    rows: Rows = []
    whole = found["arms"][0]["speeds"]
    for name, arm in zip(found["arm_names"], found["arms"], strict=True):
        exams = arm["exams"]
        by_level = {level: [] for level in sorted({cell["level"] for cell in exams[0]["retrieval"]})}
        for exam in exams:
            for cell in exam["retrieval"]:
                by_level[cell["level"]].append(cell["accuracy"])
        shares = ", ".join(f"{mean(values):.1%}" for values in by_level.values())
        loss = f"{mean(exam['loss'] for exam in exams):.3f}"
        ratios = [
            first["cache_bytes"] / speed["cache_bytes"] for first, speed in zip(whole, arm["speeds"], strict=True)
        ]
        kept = "".join(
            f"; {ratio:.2f}x fewer bytes at {speed['tokens']:,} tokens"
            for ratio, speed in zip(ratios, arm["speeds"], strict=True)
            if arm["arm"]["window"] is not None
        )
        figure = f"retrieval at 1, 2, 4, 8x {shares}; held-out text {loss} nats{kept}"
        rows.append((f"attention: {name}, {len(exams)} seeds", command, figure))
    changes = ", ".join(
        f"{value} {difference:+.4f} +-{error:.4f} at window {window}"
        for value in ("loss", "domains")
        for window, difference, error in found["sink_minus_none"][value]
    )
    rows.append(("attention: what the sink changes, seed by seed", command, changes))
    flash = f"{found['flash_cache_ratio_256k']:.2f}x fewer bytes by formula; the report: nearly 6x"
    rows.append(("attention: MiMo-V2-Flash at 256k tokens beside global layers only", command, flash))
    return rows


def retrieval_rows() -> Rows:
    """Needles found after the extension, by length; of several seeds the worst."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("retrieval-*.json"))]
    rows: Rows = []
    for task in dict.fromkeys(cell["task"] for run in runs for cell in run["retrieval"]):
        shares: dict[float, list[float]] = {}
        for run in runs:
            for cell in run["retrieval"]:
                if cell["task"] == task:
                    shares.setdefault(round(cell["num_tokens"] / run["native_length"], 1), []).append(cell["accuracy"])
        figure = ", ".join(f"{min(found):.1%} at {times}x" for times, found in shares.items())
        num_problems = runs[0]["retrieval"][0]["num_problems"]
        label = f"long context: `{task}` at times the native length, worst of {len(runs)} seeds, {num_problems} each"
        commands = "`openmimo train pretrain recipes/long-context.toml`, `openmimo eval retrieval`"
        rows.append((label, commands, figure))
    return rows


def ranks_rows() -> Rows:
    """Training on several processes beside one."""
    found = read("ranks")
    if found is None:
        return []
    command = "`python benchmarks/ranks.py`"
    worst = ", ".join(f"{name} {apart:.0e}" for name, (apart, _) in found["layouts"].items())
    bits = "the same bits" if all(same for _, same in found["layouts"].values()) else "OTHER BITS"
    disk = "; ".join(f"{name}: {text}" for name, (text, _) in found["disk"].items())
    return [
        ("training on 2 and 4 processes beside one: losses and gradient norms apart", command, f"{worst}; {bits} read"),
        ("killed ranks, resumed", command, f"{found['kills']:.0e} apart at the end"),
        ("flipped bits of a checkpoint", command, f"{found['flips']} not seen"),
        ("a full disk; a truncated part", command, disk),
    ]


def plan_rows() -> Rows:
    """`openmimo plan` beside what was measured."""
    found = read("plan")
    if found is None:
        return []
    rows: Rows = []
    for name, figures in found["figures"].items():
        parts = [f"memory {figures['bytes'] / figures['planned_bytes'] - 1:+.0%}"]
        if "seconds" in figures:
            parts.append(f"time of a decoding step {figures['seconds'] / figures['planned_seconds'] - 1:+.0%}")
        rows.append((f"measured over planned, {name}", "`python benchmarks/plan.py`", ", ".join(parts)))
    return rows


def grpo_rows() -> Rows:
    """A step of reinforcement learning beside TRL's trainer."""
    rows: Rows = []
    for path in sorted(RESULTS.glob("grpo_step*.json")):
        found = json.loads(path.read_text())
        ours = found["seconds"]["openmimo"]
        figure = f"{ours:.2f} s, TRL {ours * found['times_faster']:.2f} s ({found['times_faster']:.1f}x)"
        length = found["tokens_per_answer"]["openmimo"]
        label = f"GRPO step, {found['answers']} answers of {length:.0f} tokens"
        fixed = f" --fixed-tokens {found['fixed_tokens']}" if found["fixed_tokens"] else ""
        rows.append((label, f"`python benchmarks/grpo_step.py{fixed}`", figure))
    return rows


def r3_rows() -> Rows:
    """What replay does to the mismatch of trainer and sampler, by sampling precision."""
    found = read("r3")
    if found is None:
        return []
    rows: Rows = []
    for gap in found["gaps"]:
        figure = (
            f"KL {gap['native_kl']:.1e} without, {gap['kl']:.1e} with; ratio beyond 2 {gap['native_extreme']:.3%}, "
            f"{gap['extreme']:.3%} of tokens; other experts {gap['native_routes']:.1%}, {gap['routes']:.1%}"
        )
        exact = gap["precision"] == "exact"
        pair = "trainer and sampler on one fp32 path" if exact else f"sampler in {gap['precision']}, trainer in bf16"
        label = f"{pair}: without and with replay (R3)"
        rows.append((label, "`openmimo reproduce r3 --steps 0`", figure))
    return rows


def fuzz_rows() -> Rows:
    found = read("checkpoint_fuzz")
    if found is None:
        return []
    figure = f"{found['cases']:,} cases, {found['failures']} failures, {found['peak_mib']} MiB at most"
    return [("mutated checkpoint and config files", "`python benchmarks/checkpoint_fuzz.py`", figure)]


def server_rows() -> Rows:
    """The server beside llama-server."""
    found = read("server_speed")
    rows: Rows = []
    for row in found["rows"] if found else ():
        rate = (
            f"{row['tokens_per_s']:,.0f} tokens/s, llama-server {row['llama_tokens_per_s']:,.0f} ({row['ratio']:.2f}x)"
        )
        first, other = 1e3 * row["first_token_s"], 1e3 * row["llama_first_token_s"]
        figure = f"{rate}; first token after {first:.0f} ms, llama-server {other:.0f} ms"
        label = (
            f"server, `{row['model']}`, {row['clients']} clients" if row["clients"] > 1 else f"server, `{row['model']}`"
        )
        rows.append((label, "`python benchmarks/server_speed.py`", figure))
    return rows


def main() -> None:
    machines = Machines()
    rows: list[tuple[str, ...]] = []
    rows += machines.mark(demo_rows(), "demo-*")
    for name, made in (
        ("table7", table7_rows),
        ("figure6", figure6_rows),
        ("numzeros", numzeros_rows),
        ("grpo_step*", grpo_rows),
        ("r3", r3_rows),
        ("ablation", ablation_rows),
        ("retrieval-*", retrieval_rows),
        ("ranks", ranks_rows),
        ("plan", plan_rows),
    ):
        rows += machines.mark(made(), name)
    for preset in ("tiny", "small"):
        rows += machines.mark(train_rows(preset), f"train-{preset}")
    rows += machines.mark(attention_rows(), "attention")
    for path in sorted(RESULTS.glob("bench-*.json")):
        rows += machines.mark(bench_rows(path), path.stem)
    rows += machines.mark(table10_rows(), "table10")
    rows += machines.mark(context_rows(), "context")
    rows += machines.mark(server_rows(), "server_speed")
    rows += machines.mark(fuzz_rows(), "checkpoint_fuzz")
    for name, head in HEADS.items():
        path = ROOT / name
        text = path.read_text()
        before, _, rest = text.partition(START)
        _, _, after = rest.partition(END)
        table = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * 4, *rows)]
        known = [MACHINE[name].format(letter, words) + "\n" for words, letter in machines.letters.items()]
        path.write_text("\n".join([before + START, *known, *table, END]) + after)


if __name__ == "__main__":
    main()
