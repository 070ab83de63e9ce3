"""Heads: where attention sinks, which KV heads retrieve and which could stream, as a report that policies can take."""

from kvx.eval.heads.report import HeadReport, head_report, read_heads
from kvx.eval.heads.sinks import Sinks, attention_sinks

__all__ = ["HeadReport", "Sinks", "attention_sinks", "head_report", "read_heads"]
