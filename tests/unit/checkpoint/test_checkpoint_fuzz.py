"""A short run of the checkpoint fuzzer; `benchmarks/checkpoint_fuzz.py` runs many more cases."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).parents[3] / "benchmarks" / "checkpoint_fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("checkpoint_fuzz", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["checkpoint_fuzz"] = module
    spec.loader.exec_module(module)
    return module


def test_two_hundred_damaged_folders_are_refused_or_load_correctly(fuzz: ModuleType) -> None:
    """Catches any exception but ours, a hang, a wrong structure, and damage that verification lets through."""
    results = fuzz.run_cases(200, seed=1)
    assert sum(result.cases for result in results.values()) == 200
    assert [failure for result in results.values() for failure in result.failures] == []
    assert all(result.refused_by_verify >= result.refused for result in results.values())
    assert max(result.peak_mib for result in results.values()) < 50


def test_the_judge_notices_wrong_values_and_structure(fuzz: ModuleType, tmp_path: Path) -> None:
    """Without this, a fuzzer that accepts everything would look perfect."""
    folder, state = fuzz.make_bases(tmp_path)[1]
    assert fuzz.judge(folder, state, verify=True) == "exact"
    assert fuzz.judge(folder, state | {"norm.weight": torch.zeros(16)}, verify=True) == "silent"
    assert fuzz.judge(folder, state | {"norm.weight": torch.zeros(3)}, verify=True) == "loaded with a wrong structure"
    assert fuzz.judge(folder, state | {"more": torch.zeros(3)}, verify=True) == "loaded with a wrong structure"
