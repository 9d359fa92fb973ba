"""Compare the tensors of a checkpoint with those a configuration asks for, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from openmimo.checkpoint.names import SCALE_SUFFIX, HubTensor, hub_tensors
from openmimo.checkpoint.reader import CheckpointReader
from openmimo.config.model import ModelConfig
from openmimo.errors import nearest

_MAX_PROBLEMS = 1000
_MAX_LISTED = 10
# Written by old versions of other libraries; recomputed here.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True)
class CoverageReport:
    """Which tensors of a model the files hold.

    `missing`: the model needs them. `unexpected`: the files have them. `mismatched`: shape or format differs, in words.
    `cut_short`: the search stopped at a thousand problems.
    """

    loaded: tuple[HubTensor, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    cut_short: bool = False

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def describe(self) -> str:
        """Up to ten names of each kind of problem; a missing name with the nearest unexpected one."""
        lines = [f"loaded: {len(self.loaded)}"]
        for title, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("wrong shape or format", self.mismatched),
        ):
            if names:
                lines.append(f"{title}: {len(names)}{' or more' if self.cut_short else ''}")
                lines += [
                    f"  {self._with_hint(name) if names is self.missing else name}" for name in names[:_MAX_LISTED]
                ]
        return "\n".join(lines)

    def _with_hint(self, name: str) -> str:
        hint = nearest(name, self.unexpected[:_MAX_PROBLEMS])
        return f"{name} ({hint})" if hint.startswith("did you mean") else name


def check_coverage(reader: CheckpointReader, config: ModelConfig) -> CoverageReport:
    """Look up every tensor of `config` in the files.

    Cost: stops after a thousand problems, so a configuration that claims absurd sizes is refused quickly.
    """
    loaded: list[HubTensor] = []
    missing: list[str] = []
    mismatched: list[str] = []
    used: set[str] = {"lm_head.weight"} if config.tie_embeddings else set()
    cut_short = False
    for tensor in hub_tensors(config):
        location = reader.locate(tensor)
        if location is None:
            missing.append(tensor.name)
        else:
            used |= {location.name, location.name + SCALE_SUFFIX}
            problem = reader.problem(tensor, location, config)
            if problem is None:
                loaded.append(tensor)
            else:
                mismatched.append(problem)
        cut_short = len(missing) + len(mismatched) >= _MAX_PROBLEMS
        if cut_short:
            break
    unexpected = [name for name in reader.names if name not in used and not name.endswith(_IGNORED_SUFFIX)]
    return CoverageReport(
        loaded=tuple(loaded),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched),
        cut_short=cut_short,
    )
