"""From a plan to the module that runs it. Kernels are imported here, when the first plan asks for them."""

import importlib
from types import ModuleType

from fdpp_jax.plans.backend import Plan
from fdpp_jax.plans.backends import by_name


def module_of(plan: Plan) -> ModuleType:
    """The module that runs the plan; `plans.backend.Backend` says which functions it has."""
    return importlib.import_module(by_name(plan.backend).run)
