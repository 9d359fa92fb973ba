"""What the engine promises, shown in full size: `identity`, `determinism`, `distribution`, `cache`, `formats` or `all`.

    python benchmarks/engine_proofs.py identity                 # 48 ways to decode 1,000 prompts x 256 tokens
    python benchmarks/engine_proofs.py determinism              # 200 trials of everything that may not matter
    python benchmarks/engine_proofs.py distribution             # 10^6 draws for every sampling option
    python benchmarks/engine_proofs.py cache                    # 10^5 random steps of scheduler and cache
    python benchmarks/engine_proofs.py formats --model runs/demo

`identity`, `determinism` and `formats` train a small model first, unless `--model` names a folder. Progress goes to
stderr. Prints tables, then one JSON line; exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import describe_machine, print_result
from openmimo.cli.machine import usable_cores
from openmimo.engine.loading import resolve_model_folder
from openmimo.engine.native_runner import WEIGHTS
from proofs.cache import prove_cache
from proofs.determinism import prove_determinism
from proofs.formats import prove_formats
from proofs.identity import prove_identity
from proofs.small_model import save_random_model, save_small_model

ROOT = Path(__file__).resolve().parent.parent
PROOFS = ("identity", "determinism", "distribution", "cache", "formats")


def prove_distribution(draws: int) -> dict[str, object]:
    """The unit test of the exact distribution, with the full number of draws for each option."""
    started = time.perf_counter()
    test = ROOT / "tests" / "unit" / "engine" / "test_engine_exactness.py"
    environment = {**os.environ, "OPENMIMO_EXACT_DRAWS": str(draws)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=sys.stderr, check=False)
    return {"draws": draws, "failures": int(done.returncode != 0), "seconds": time.perf_counter() - started}


def prove(name: str, options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """One proof's figures."""
    if name == "cache":
        return prove_cache(num_steps=options.steps)
    if name == "distribution":
        return prove_distribution(options.draws)
    folder = _model_folder(options.model, scratch)
    if name == "determinism":
        return prove_determinism(folder, trials=options.trials, weights=options.weights, threads=options.processes)
    if name == "identity":
        return prove_identity(
            folder,
            num_prompts=options.prompts,
            num_tokens=options.tokens,
            weights=options.weights,
            processes=options.processes,
        )
    save_random_model(scratch / "random")
    return prove_formats(folder, scratch / "random", num_tokens=options.text_tokens, processes=options.processes)


def _model_folder(named: Path | None, scratch: Path) -> Path:
    """The folder that was named, or that of the small model, trained at its first use."""
    if named is not None:
        return resolve_model_folder(named)
    folder = scratch / "trained"
    if not folder.exists():
        save_small_model(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proof", nargs="?", default="all", choices=("all", *PROOFS))
    parser.add_argument("--model", type=Path, help="model or run folder, in place of the small model")
    parser.add_argument("--weights", default="bf16", choices=WEIGHTS, help="of identity and determinism")
    parser.add_argument("--prompts", type=int, default=1000, help="of identity")
    parser.add_argument("--tokens", type=int, default=256, help="per prompt of identity")
    parser.add_argument("--trials", type=int, default=200, help="of determinism")
    parser.add_argument("--draws", type=int, default=1_000_000, help="of distribution, per option")
    parser.add_argument("--steps", type=int, default=100_000, help="of cache")
    parser.add_argument("--text-tokens", type=int, default=60_000, help="of formats")
    parser.add_argument("--processes", type=int, default=usable_cores())
    options = parser.parse_args()
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in PROOFS if options.proof == "all" else (options.proof,):
            print(f"== {name}", flush=True)
            figures[name] = prove(name, options, Path(scratch))
    failed = [name for name, found in figures.items() if isinstance(found, dict) and found["failures"]]
    print(f"failed: {', '.join(failed)}" if failed else "all of it holds")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    print_result("engine_proofs", describe_machine(), {"options": settings, "failed": failed, **figures})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
