"""The public name of kdfast/prune/elastic.py: sub-networks of one set of weights."""

import sys

from kdfast.prune import elastic
from kdfast.prune.elastic import *  # noqa: F403  (for who reads types)

sys.modules[__name__] = elastic  # one module by two names
