"""Whether a training run fits on hardware that is not here, and how fast it might go there.

The training step itself is lowered and compiled ahead of time for every way to split it over the
topology; what the compiled program says of memory, collectives and time is the plan. No number here
is a measurement.
"""

from crosscoder_jax.planning.chips import CHIPS as CHIPS
from crosscoder_jax.planning.chips import Chip as Chip
from crosscoder_jax.planning.config import PlanConfig as PlanConfig
from crosscoder_jax.planning.plan import MeshPlan as MeshPlan
from crosscoder_jax.planning.plan import Plan as Plan
from crosscoder_jax.planning.plan import make_plan as make_plan
from crosscoder_jax.planning.topology import Topology as Topology
