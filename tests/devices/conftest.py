"""Gives the tests of this folder eight CPU devices. tests/test_devices.py runs them."""

import os

import jax

from tests import quick

os.environ.update(quick.environment())
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # from here on the number is fixed, also for a run that would ask for fewer
