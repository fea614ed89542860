"""Which plans come up to what was aimed at."""

from crosscoder_jax.planning import Plan
from experiments.plans.sizes import Size

COLUMNS = (
    *("chips", "latents", "batch"),
    *("70 % of peak", "selecting under 10 %", "temporaries under the weights"),
)
_PEAK, _SELECTING = 0.70, 0.10


def row(size: Size, plan: Plan) -> tuple[str, ...]:
    """Return a line of the table: each aim, whether it is met, and with what."""
    begin = (size.product, f"{plan.config.num_latents:,}", f"{size.batch_size:,}")
    mesh = plan.cheapest
    if mesh is None:
        return (*begin, *["does not fit"] * 3)
    sizes, selecting, peak = mesh.bytes_per_chip, mesh.cycle_shares.get("selection", 0), mesh.utilization or 0
    temporaries = sizes.temporaries or 0
    return (
        *begin,
        _told(peak >= _PEAK, f"{peak:.1%}"),
        _told(selecting < _SELECTING, f"{selecting:.1%}"),
        _told(temporaries < sizes.weights, f"{temporaries / sizes.weights:.1f} of them"),
    )


def _told(is_met: bool, value: str) -> str:
    return f"{'yes' if is_met else 'no'}, {value}"
