"""Reads a whole mixture before training and reports its problems: `python -m processing_visualchat.doctor`."""

from .diagnosis import Diagnosis, compare_images, examine, format_table
from .report import write_report
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
