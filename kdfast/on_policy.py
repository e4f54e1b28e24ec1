"""The public name of kdfast/train/on_policy.py: students that learn from samples of their own."""

import sys

from kdfast.train import on_policy
from kdfast.train.on_policy import *  # noqa: F403  (for who reads types)

sys.modules[__name__] = on_policy  # one module by two names
