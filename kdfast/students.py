"""The public name of kdfast/models/students.py: students made of their teachers."""

import sys

from kdfast.models import students
from kdfast.models.students import *  # noqa: F403  (for who reads types)

sys.modules[__name__] = students  # one module by two names
