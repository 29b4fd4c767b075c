"""Rows in; tables, figures and one page out."""

from captum_fusion.evaluation.report.page import write
from captum_fusion.evaluation.report.statistics import Cell, Outline, summarize

__all__ = ["Cell", "Outline", "summarize", "write"]
