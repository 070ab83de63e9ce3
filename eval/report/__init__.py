"""report.html: what a results folder says, as one page that needs nothing beside itself."""

from kvx.eval.report.document import report, write_report
from kvx.eval.report.study import Study

__all__ = ["Study", "report", "write_report"]
