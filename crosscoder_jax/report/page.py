"""Put words, tables, figures and cards together into one HTML page that needs no network."""

import base64
import datetime
import hashlib
import importlib.resources
import json
from collections.abc import Sequence

import jinja2
from plotly.offline import get_plotlyjs

from crosscoder_jax.report import comparison, palette, plots, recipe, wording
from crosscoder_jax.report.cards import NO_SNIPPETS, CardLimits, card_groups
from crosscoder_jax.report.config import ReportConfig
from crosscoder_jax.report.content import Method
from crosscoder_jax.report.gaps import missing_parts, stale_parts
from crosscoder_jax.report.names import VERDICTS
from crosscoder_jax.report.scatter import NU
from crosscoder_jax.report.tables import class_rows, latent_rows, method_rows
from crosscoder_jax.report.text import json_for_script
from crosscoder_jax.report.trajectories import trajectory_plots

_TEMPLATES = importlib.resources.files("crosscoder_jax.report") / "templates"


def render_page(config: ReportConfig, methods: Sequence[Method], today: datetime.date) -> str:
    """Render the page of a report as HTML."""
    crosscoders = tuple(method for method in methods if method.has_classes)
    scaled = tuple(method for method in crosscoders if _has_ratios(method))
    histogram_plots = tuple(plots.histogram_plot(method) for method in crosscoders)
    scatter_plots = tuple(plot for method in scaled for plot in plots.scatter_plots(method))
    training_plots = plots.training_plots(methods)
    trajectories = tuple(plot for method in methods for plot in trajectory_plots(method))
    all_plots = (*histogram_plots, *scatter_plots, *trajectories, *training_plots)
    limits = CardLimits(config.num_cards, config.tokens_before, config.tokens_after)
    scripts = (get_plotlyjs().replace("\r\n", "\n"), _asset("page.js"))
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=config.title,
            headline=wording.headline(methods),
            conclusion=wording.conclusion(methods),
            methods=methods,
            sources=comparison.compared_sources(methods[0]),
            short_model=comparison.short_model,
            texts=comparison.text_shares(methods[0]),
            token_rows=comparison.token_rows(methods),
            recipe_rows=recipe.recipe_rows(methods),
            method_rows=method_rows(methods),
            class_rows=class_rows(crosscoders),
            latent_tables=tuple(latent_rows(method) for method in crosscoders),
            intervals=wording.intervals(scaled),
            crosscoders=crosscoders,
            null_notes=wording.null_notes(crosscoders),
            shown_verdicts=tuple(v for v in VERDICTS if any(m.all_found().verdicts[v] for m in crosscoders)),
            histogram_plots=histogram_plots,
            scatter_plots=scatter_plots,
            training_plots=training_plots,
            trajectory_plots=trajectories,
            figures_json=json_for_script(figures_json(all_plots)),
            groups=tuple(group for method in methods for group in card_groups(method, limits)),
            num_snippets=config.num_snippets,
            no_snippets=NO_SNIPPETS,
            missing=missing_parts(methods),
            stale=stale_parts(methods),
            versions=comparison.versions(methods),
            configs=tuple((method.name, comparison.config_json(method)) for method in methods),
            num_documents=methods[0].num_documents(),
            today=today.isoformat(),
            nu=NU,
            palette=palette,
            policy=content_security_policy(scripts),
            scripts=scripts,
            style=_asset("page.css"),
        )
    )


def figures_json(all_plots: Sequence[plots.Plot]) -> str:
    """Give the data and layout of every figure as one JSON object by key."""
    content = {plot.key: json.loads(str(plot.figure.to_json())) for plot in all_plots}
    return json.dumps(content, ensure_ascii=True, separators=(",", ":"))


def content_security_policy(scripts: Sequence[str]) -> str:
    """Allow exactly these scripts to run and nothing to be fetched."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode()}'"
        for script in scripts
    )
    allowed = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    return f"{allowed}; base-uri 'none'; form-action 'none'"


def _has_ratios(method: Method) -> bool:
    return method.latents.has("nu_error") and method.latents.has("nu_recon")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8").replace("\r\n", "\n")
