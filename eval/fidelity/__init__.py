"""Fidelity: what a policy costs without any task, measured along held-out documents against the full cache."""

from kvx.eval.fidelity.findings import Fidelity
from kvx.eval.fidelity.measure import fidelity
from kvx.eval.fidelity.samples import fidelity_records

__all__ = ["Fidelity", "fidelity", "fidelity_records"]
