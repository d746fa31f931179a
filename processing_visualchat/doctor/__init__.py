"""Reads a whole mixture before training and reports its problems: `python -m processing_visualchat.doctor`."""

from .diagnosis import Diagnosis, compare_images, examine
from .report import format_table, write_report
from .samples import Sample, draw_sample, make_estimating_processor


__all__ = [
    "Diagnosis",
    "Sample",
    "compare_images",
    "draw_sample",
    "examine",
    "format_table",
    "make_estimating_processor",
    "write_report",
]
