"""The evidence of one or several runs as a single self-contained HTML page.

`write_report` imports plotly, jinja2 and pyarrow only when it is called, so a command line can build its
parser from `ReportConfig` on a machine that has none of them.
"""

from crosscoder_jax.report.config import ReportConfig as ReportConfig
from crosscoder_jax.report.write import write_report as write_report
