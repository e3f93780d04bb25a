"""Gives the tests of this folder eight CPU devices. tests/test_devices.py runs them.

Nearly all of their time is compilation, so XLA's optimizer is off.
"""

import os

import jax

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # from here on the number is fixed, also for a run that would ask for fewer
