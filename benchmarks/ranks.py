"""Training on several processes, in full size: one process's losses; kills, a full disk and flipped bits survived.

Usage: python benchmarks/ranks.py [layouts] [kills] [disk] [flips] [--steps 50] [--kills 20] [--flips 1000]
layouts: FSDP2, divided experts, and both, beside one process; and their checkpoints read by other numbers of ranks.
kills: a random rank is killed (SIGKILL) at a random step, again and again; the run goes on from its newest checkpoint.
disk: a checkpoint that does not fit the file system (needs user namespaces), and a truncated part.
flips: one random bit of a checkpoint at a time; each must be seen.
Prints a table and one JSON line; exits with 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit" / "parallel"))

import torch
from rank_cases import ENVIRONMENT, RECIPE, WORKER, children, torchrun, torchrun_command, train_command, train_on
from safetensors.torch import load_file

from openmimo.checkpoint.training_state import checkpoint_dirs, latest_valid
from openmimo.errors import CheckpointError
from openmimo.evals.measuring import describe_machine, print_result, print_table

# Processes, and of those that divide the experts.
LAYOUTS = {
    "FSDP2 2": (2, 1),
    "FSDP2 4": (4, 1),
    "experts 2": (2, 2),
    "experts 4": (4, 4),
    "FSDP2 2 x experts 2": (4, 2),
}
PARTS = ("layouts", "kills", "disk", "flips")
TOLERANCE = 1e-4
MOST_STEPS_TO_KILL = 9
# Writes a checkpoint where there is room for one and a half.
FULL_DISK = """
mount -t tmpfs -o size={size} tmpfs {mount} && cp -r {run} {mount}/run || exit 99
{python} -m openmimo train pretrain {recipe} --out {mount}/run --resume; echo "rc $?"
ls {mount}/run/checkpoints
mount -o remount,size=2g {mount}
{python} -m openmimo train pretrain {recipe} --out {mount}/run --resume; echo "rc $?"
cp {mount}/run/metrics.jsonl {out}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them without")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=1000)
    options = parser.parse_args()
    parts = options.parts or PARTS
    logging.getLogger("openmimo").setLevel(logging.ERROR)  # each damaged checkpoint is a warning
    figures: dict[str, Any] = {}
    rows: list[tuple[str, str, bool]] = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Ranks(Path(scratch), options.steps)
        bench.train_alone()
        if "layouts" in parts:
            figures["layouts"] = bench.layouts()
            for name, (worst, same_bits) in figures["layouts"].items():
                rows.append((f"{name}: losses beside one process", f"{worst:.1e} apart at most", worst <= TOLERANCE))
                rows.append((f"{name}: state read by other ranks", "same bits" if same_bits else "differs", same_bits))
        if "kills" in parts:
            figures["kills"] = worst = bench.kills(options.kills)
            rows.append((f"{options.kills} kills of a rank", f"{worst:.1e} apart at most", worst <= TOLERANCE))
        if "disk" in parts:
            figures["disk"] = bench.disk()
            rows += [(name, text, good) for name, (text, good) in figures["disk"].items()]
        if "flips" in parts:
            figures["flips"] = missed = bench.flips(options.flips)
            rows.append((f"{options.flips} flips of a bit", f"{missed} not seen", missed == 0))
    print_table(("", "found", "holds"), rows)
    print_result("ranks", describe_machine(), figures)
    return 0 if all(good for *_, good in rows) else 1


class Ranks:
    """Runs of one recipe in `folder`."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(RECIPE)
        self.overrides = overrides(steps)
        self.alone = folder / "alone"

    def train_alone(self) -> None:
        command = [sys.executable, *train_command(self.recipe, self.alone, *self.overrides)]
        subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)

    def layouts(self) -> dict[str, tuple[float, bool]]:
        """The greatest relative difference of a loss or gradient norm, and whether other ranks read the same bits."""
        found: dict[str, tuple[float, bool]] = {}
        for name, (size, expert_ranks) in LAYOUTS.items():
            out = self.folder / f"{size}-{expert_ranks}"
            done = train_on(size, self.recipe, out, *self.overrides, f"parallel.expert_ranks={expert_ranks}")
            _demand(done, name)
            readers = [(1, 1), (2, 2) if size == 4 else (4, 2)]
            states = [self.read_by(out, *reader) for reader in readers]
            own = self.read_by(out, size, expert_ranks)
            same = all(_equal(own, state) for state in states)
            found[name] = (self.difference(out), same)
            _say(f"{name}: {found[name][0]:.1e}, {'same bits' if same else 'other bits'}")
        return found

    def read_by(self, run_dir: Path, size: int, expert_ranks: int) -> dict[str, torch.Tensor]:
        step, target = checkpoint_dirs(run_dir / "checkpoints")[-1], self.folder / "state.safetensors"
        arguments = [str(WORKER), str(step), str(target), str(expert_ranks)]
        if size == 1:
            subprocess.run([sys.executable, *arguments], check=True, env=ENVIRONMENT)
        else:
            _demand(torchrun(size, *arguments), f"reading by {size}")
        return load_file(target)

    def kills(self, number: int) -> float:
        """Kill one of two ranks that often; the greatest difference to two that live, with every step there once."""
        chance, out, living, done = random.Random(0), self.folder / "killed", self.folder / "living", 0
        steps = max(self.steps, MOST_STEPS_TO_KILL * number)
        options = [*overrides(steps), "parallel.expert_ranks=2"]
        _demand(train_on(2, self.recipe, living, *options), "the run that nobody kills")
        while done < number:
            goal = self.seen(out) + chance.randrange(2, MOST_STEPS_TO_KILL)
            resume = bool(checkpoint_dirs(out / "checkpoints"))
            if not resume:
                shutil.rmtree(out, ignore_errors=True)
            process = subprocess.Popen(
                torchrun_command(2, *train_command(self.recipe, out, *options, *["--resume"] * resume)),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT,
            )
            while self.seen(out) < goal and process.poll() is None:
                time.sleep(0.02)
            if process.poll() is not None:
                raise SystemExit(f"the run ended after {done} kills with {process.returncode}; give it more --steps")
            os.kill(chance.choice(children(process.pid)), signal.SIGKILL)
            if process.wait(120) == 0:
                raise SystemExit("a run whose rank was killed ended with 0")
            done += 1
            _say(
                f"killed at step {self.seen(out)}, {[step.name for step in checkpoint_dirs(out / 'checkpoints')[-1:]]}"
            )
        _demand(train_on(2, self.recipe, out, *options, "--resume"), "the last run")
        return difference(out, living, steps)

    def disk(self) -> dict[str, tuple[str, bool]]:
        """A full file system and a truncated part: what was said, and whether the run ended as if nothing had been."""
        run = self.folder / "short"
        shutil.copytree(self.alone, run)
        shutil.rmtree(run / "model")
        *_, before, last = checkpoint_dirs(run / "checkpoints")
        shutil.rmtree(last)
        for other in checkpoint_dirs(run / "checkpoints")[:-1]:
            shutil.rmtree(other)
        size = int(1.5 * sum(path.stat().st_size for path in run.rglob("*") if path.is_file()))
        mount, out = self.folder / "mount", self.folder / "after-full-disk.jsonl"
        mount.mkdir()
        script = FULL_DISK.format(
            size=size,
            mount=mount,
            run=run,
            python=sys.executable,
            recipe=f"{self.recipe} {' '.join(self.overrides)}",
            out=out,
        )
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
        )
        found: dict[str, tuple[str, bool]] = {}
        if done.returncode or not out.is_file():
            found["full disk"] = (f"could not be tried: {done.stderr[-300:]}", False)
        else:
            text = done.stdout + done.stderr
            codes = [line for line in done.stdout.splitlines() if line.startswith("rc ")]
            kept = before.name in done.stdout
            equal = losses(out) == losses(self.alone / "metrics.jsonl")
            said = re.search(r"No space[^;\n]*", " ".join(text.split()))
            good = codes[0] != "rc 0" and codes[1] == "rc 0" and kept and equal and said is not None
            words = said[0] if said else "nothing was said of space"
            found["full disk"] = (f"{words}; then resumed to {'the same' if equal else 'other'} losses", good)
        found["truncated part"] = self.truncated()
        return found

    def truncated(self) -> tuple[str, bool]:
        """The newest checkpoint of two ranks with a part cut short."""
        run = self.folder / "truncated"
        options = [*self.overrides, "parallel.expert_ranks=2"]
        _demand(train_on(2, self.recipe, run, *options), "the run whose part is cut")
        *_, before, last = checkpoint_dirs(run / "checkpoints")
        part = next((last / "training_state").glob("shard-00002-*"))
        os.truncate(part, part.stat().st_size // 2)
        chosen = latest_valid(run / "checkpoints")
        done = train_on(2, self.recipe, run, *options, "--resume")
        _demand(done, "the run after the cut")
        worst = self.difference(run)
        return f"{chosen.name} instead of {last.name}, then {worst:.1e} apart", chosen == before and worst <= TOLERANCE

    def flips(self, number: int) -> int:
        """How many flipped bits of the newest checkpoint were not seen."""
        checkpoints = self.folder / "flipped"
        shutil.copytree(self.alone / "checkpoints", checkpoints)
        *_, before, last = checkpoint_dirs(checkpoints)
        files = [path for path in last.rglob("*") if path.is_file()]
        chance, missed = random.Random(0), 0
        for count in range(number):
            # Small files as often as large ones.
            path = chance.choice(files)
            place, bit = chance.randrange(path.stat().st_size), 1 << chance.randrange(8)
            flip(path, place, bit)
            try:
                missed += latest_valid(checkpoints) != before
            except CheckpointError:
                missed += 1
            flip(path, place, bit)
            if count % 100 == 99:
                _say(f"{count + 1} bits flipped, {missed} not seen")
        if latest_valid(checkpoints) != last:
            raise SystemExit("the checkpoint is not what it was before")
        return missed

    def seen(self, run_dir: Path) -> int:
        """Steps with a line of metrics."""
        path = run_dir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    def difference(self, run_dir: Path) -> float:
        return difference(run_dir, self.alone, self.steps)


def overrides(steps: int) -> list[str]:
    """Half the steps for each stage of the recipe, and a rate that suits so many.

    At the tests' rate of 3e-3 training is chaotic: losses 1e-7 apart are 4e-3 apart 40 steps later.
    """
    return [f"stages.0.steps={steps // 2}", f"stages.1.steps={steps - steps // 2}", "optimizer.peak_lr=1e-3"]


def difference(run_dir: Path, other: Path, steps: int) -> float:
    """The greatest relative difference of any loss or gradient norm of two runs. Every step must be there."""
    ours, theirs = losses(run_dir / "metrics.jsonl"), losses(other / "metrics.jsonl")
    if len(ours) != steps or len(theirs) != steps:
        raise SystemExit(f"{run_dir.name} has {len(ours)} steps, {other.name} {len(theirs)}, expected {steps}")
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def losses(path: Path) -> list[Sequence[float]]:
    """Of every step, in order."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    if [record["step"] for record in records] != list(range(1, len(records) + 1)):
        raise SystemExit(f"{path} does not have every step once")
    return [(record["loss"], *record["mtp_losses"], record["balance_loss"], record["grad_norm"]) for record in records]


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (old,) = file.read(1)
        file.seek(place)
        file.write(bytes([old ^ bit]))


def _equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def _demand(done: subprocess.CompletedProcess[str], what: str) -> None:
    if done.returncode:
        raise SystemExit(f"{what}: failed with {done.returncode}:\n{done.stderr[-2000:]}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
