"""Kill a reinforcement-learning run and a distillation run (SIGKILL) at random points and go on each time.

Usage: python benchmarks/kills.py [--kills 20] [--steps 40] [--seed 0]
A run must end with the very bytes of one that was never stopped, the same metrics, and every prompt counted once. The
points take turns among sampling, grading, updating, handing over the weights and writing a checkpoint. Prints a table
and one JSON line; exits with 1 where a run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit" / "rl"))

from rl_cases import rl_recipe

from openmimo.checkpoint import training_state
from openmimo.checkpoint.training_state import checkpoint_dirs, latest_valid, load_training_state
from openmimo.config.recipe import load_recipe, to_toml
from openmimo.config.rl import RLRecipe
from openmimo.engine import Engine
from openmimo.evals.measuring import describe_machine, print_result, print_table
from openmimo.rl import loop
from openmimo.rl.grading import Grading
from openmimo.rl.update import PolicyUpdater
from openmimo.train.state import TRAINING_STATE

# Where a run is killed, and how many calls at most pass before it is: about two steps' worth.
PHASES = {"sampling": 60, "grading": 8, "updating": 6, "weights": 2, "checkpoint": 4}
EQUAL = ("weights", "metrics", "prompts")
# Of a record, what the clock decides: the engine also drafts where it measured that drafts pay.
CLOCKS = ("seconds", "monitor_share_of_step", "acceptance_length")
# Of a state, what a process begins with by chance and nothing here draws from: answers have seeds of their own.
CHANCE = "rng"


def main() -> int:
    options = parse_options()
    if options.child:
        return child(options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        results = {name: attack(name, folder, options) for name in ("grpo", "mopd")}
    rows = [
        (name, r["kills"], ", ".join(f"{n} {k}" for k, n in r["by_phase"].items()), *(r[key] for key in EQUAL))
        for name, r in results.items()
    ]
    print_table(("run", "kills", "where", "weights equal", "metrics equal", "prompts counted once"), rows)
    print_result("kills", describe_machine(), results)
    return 0 if all(r[key] for r in results.values() for key in EQUAL) else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each run")
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="chooses the points")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--phase", default="", help=argparse.SUPPRESS)
    parser.add_argument("--after", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def attack(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The run once undisturbed, then with kills; what is equal."""
    taught = {"teachers": [{"domain": "logic", "folder": "self"}]} if name == "mopd" else {}
    recipe = rl_recipe(steps=options.steps, algorithm=name, **taught)
    path = folder / f"{name}.toml"
    path.write_text(to_toml(recipe))
    undisturbed, killed = folder / f"{name}-undisturbed", folder / f"{name}-killed"
    if start(path, undisturbed).returncode:
        raise SystemExit(f"{name}: the undisturbed run failed")
    chance = random.Random(f"{name}/{options.seed}")
    kills: Counter[str] = Counter()
    while kills.total() < options.kills:
        phase = list(PHASES)[kills.total() % len(PHASES)]
        done = start(path, killed, phase, chance.randrange(PHASES[phase]) + 1)
        if done.returncode == 0:
            raise SystemExit(f"{name}: came to its end after {kills.total()} kills; give it more --steps")
        if done.returncode != -signal.SIGKILL:
            raise SystemExit(f"{name}: a resumed run failed with {done.returncode}:\n{done.stderr.decode()}")
        kills[phase] += 1
        steps = checkpoint_dirs(killed / "checkpoints")
        print(f"{name}: killed in {phase}, {steps[-1].name if steps else 'no checkpoint yet'}", file=sys.stderr)
    last = start(path, killed)
    if last.returncode:
        raise SystemExit(f"{name}: the last run failed:\n{last.stderr.decode()}")
    return {
        "kills": kills.total(),
        "by_phase": dict(kills),
        "weights": model_bytes(undisturbed) == model_bytes(killed) and state_of(undisturbed)[0] == state_of(killed)[0],
        "metrics": metrics(undisturbed) == metrics(killed),
        "prompts": state_of(undisturbed)[1] == state_of(killed)[1],
    }


def start(recipe: Path, out: Path, phase: str = "", after: int = 0) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, __file__, "--child", str(recipe), "--out", str(out)]
    return subprocess.run([*command, "--phase", phase, "--after", str(after)], capture_output=True, check=False)


def child(options: argparse.Namespace) -> int:
    """Run, or go on, and be killed at call number `after` of the phase's function."""
    points: dict[str, tuple[Any, str]] = {
        "sampling": (Engine, "step_to_completions"),
        "grading": (Grading, "grade"),
        "updating": (PolicyUpdater, "add"),
        "weights": (Engine, "update_weights"),
        # Between the weights' files and the training state, before the folder gets its name.
        "checkpoint": (training_state, "save_training_state"),
    }
    if options.phase:
        owner, attribute = points[options.phase]
        setattr(owner, attribute, deadly(getattr(owner, attribute), options.after))
    recipe = load_recipe(options.child, [], RLRecipe)
    resume = bool(checkpoint_dirs(options.out / "checkpoints"))
    loop.PolicyRun(recipe, options.out, resume=resume, overwrite=True).finish()
    return 0


def deadly(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    left = after

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)

    return wrapped


def model_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "model").glob("*.safetensors"))}


def state_of(run: Path) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Moments and master weights as plain numbers, and the scheduler's counts, of the last checkpoint."""
    tensors, meta = load_training_state(latest_valid(run / "checkpoints") / TRAINING_STATE)
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items() if name != CHANCE}, {
        key: meta[key] for key in ("step", "sampled_tokens", "scheduler", "rollout")
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records without what the clock decides."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for name in CLOCKS:
            record.pop(name)
        record["rollout"].pop("seconds")
    return records


if __name__ == "__main__":
    sys.exit(main())
