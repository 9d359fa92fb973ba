"""What a model can do and how fast: accuracy per domain, draft acceptance, decoding speed."""

from openmimo.evals.accuracy import DomainReport, EvalSample, evaluate_domains, reports_as_json
from openmimo.evals.speed import SpeedReport, measure_draft_speed

__all__ = [
    "DomainReport",
    "EvalSample",
    "SpeedReport",
    "evaluate_domains",
    "measure_draft_speed",
    "reports_as_json",
]
