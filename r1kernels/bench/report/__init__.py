"""The report of `r1kernels bench`: a page with pictures, tables for Markdown, and pictures for the documentation.

Everything here reads the JSON document that `r1kernels bench` writes (format 1), and computes nothing on a device. It
needs matplotlib and jinja2: `pip install '.[bench]'` in a clone of the repository.
"""

from r1kernels.bench.report.ceilings import errors, roofline, shares
from r1kernels.bench.report.curves import active, growth, head
from r1kernels.bench.report.figures import Picture
from r1kernels.bench.report.page import write_html
from r1kernels.bench.report.tables import fidelity_table, source, table

__all__ = ["Picture", "active", "errors", "fidelity_table", "growth", "head", "roofline", "shares", "source", "table",
           "write_html"]
