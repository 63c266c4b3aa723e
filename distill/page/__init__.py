"""One self-contained HTML page a run, or of several runs side by side: inline CSS and SVG, no script, nothing fetched."""

from distill.page.writing import PAGE, REPORT, write_comparison, write_figures, write_models, write_run

__all__ = ["PAGE", "REPORT", "write_comparison", "write_figures", "write_models", "write_run"]
