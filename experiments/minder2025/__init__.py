"""The runs of Minder et al. 2025 (arXiv 2504.02922), from harvest to report."""
