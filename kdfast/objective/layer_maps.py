"""Which layer of the teacher a layer of the student learns from.

Hidden states are numbered as `transformers` does: 0 is the embeddings' output, i the output of layer i. A map is a dict
of student states to teacher states; negative numbers count from the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral

LayerMap = str | Mapping[int, int]
NAMES = ("uniform", "skip", "last")


def layer_map(layers: LayerMap, student_layers: int, teacher_layers: int, who: str = "layer_map") -> dict[int, int]:
    """The map of states of a student of M layers to those of a teacher of N.

    Args:
        layers: "uniform": j to j·N/M, for all M layers (TinyBERT); "skip": the same without the student's last layer,
            and "last": j to N - M + j, without it too (Patient-KD, whose last layer learns from the logits); or a dict.
            Where N is no multiple of M, j·N/M is rounded.
        student_layers: M.
        teacher_layers: N.
        who: begins the errors.

    Returns:
        Numbers from 0 to M and from 0 to N, in the student's order.

    Raises:
        TypeError: neither a name nor a dict of whole numbers.
        ValueError: another name, a number beyond the last layer, an empty map, or a student deeper than its teacher
            ("uniform", "skip", "last").
    """
    m, n = student_layers, teacher_layers
    if isinstance(layers, str):
        if layers not in NAMES:
            raise ValueError(f"{who}: layers: expected one of {', '.join(NAMES)} or a dict, got {layers!r}")
        if m > n or (m == 1 and layers != "uniform"):
            got = f"{layers!r} for a student of {m} layers and a teacher of {n}"
            raise ValueError(f"{who}: layers: expected a dict where the rule has no pairs, got {got}")
        if layers == "last":
            return {j: n - m + j for j in range(1, m)}
        return {j: (2 * j * n + m) // (2 * m) for j in range(1, m + (layers == "uniform"))}
    if not isinstance(layers, Mapping) or not all(isinstance(x, Integral) for pair in layers.items() for x in pair):
        expected = (
            f"one of {', '.join(NAMES)} or a dict of the student's states to the teacher's, such as {{1: 2, 2: 4}}"
        )
        raise TypeError(f"{who}: layers: expected {expected}, got {layers!r}")
    if not layers:
        raise ValueError(f"{who}: layers: expected at least one pair, got none")
    found = {}
    for student, teacher in layers.items():
        for state, count, side in ((student, m, "student"), (teacher, n, "teacher")):
            if not -count - 1 <= state <= count:
                raise ValueError(f"{who}: layers: expected states of the {side} from 0 to {count}, got {state}")
        found[student % (m + 1)] = teacher % (n + 1)
    return dict(sorted(found.items()))
