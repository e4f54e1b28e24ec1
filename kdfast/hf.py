"""The public name of kdfast/models/reader.py: reading transformers' models."""

import sys

from kdfast.models import reader
from kdfast.models.reader import *  # noqa: F403  (for who reads types)

sys.modules[__name__] = reader  # one module by two names
