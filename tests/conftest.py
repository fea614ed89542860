"""Eight CPU devices for every test, set before any of them is touched."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
