"""The report page of `saccade compare`: one html file that works offline."""

from saccade.bench.report.page import SCHEMA, write

__all__ = ["SCHEMA", "write"]
