"""Layer maps: which student layer learns from which teacher layer, as data that is checked before anything runs."""

from collections.abc import Sequence

LayerMap = tuple[tuple[int, int], ...]
"""(student layer, teacher layer) pairs. Layers count from 1; 0 is the embedding output, where a method takes it."""


def layer_map(
    setting: str | Sequence[Sequence[int]], student_layers: int, teacher_layers: int, *, embeddings: bool = False
) -> LayerMap:
    """The pairs behind the configuration's `layer_map`.

    Args:
        setting: "last" (last to last), "uniform" (student i to teacher i * L_T / L_S), or pairs of (student layer, teacher layer).
        student_layers: L_S.
        teacher_layers: L_T.
        embeddings: "uniform" begins with (0, 0), and pairs may name layer 0.

    Raises:
        ValueError, TypeError: a setting of another form, layers that do not exist, a pair given twice, no pairs; "uniform" where L_T
            is no multiple of L_S.
    """
    if setting == "last":
        return ((student_layers, teacher_layers),)
    if setting == "uniform":
        if teacher_layers % student_layers:
            raise ValueError(
                f'layer_map="uniform": {teacher_layers} teacher layers are no multiple of {student_layers} student layers. Use "last", '
                "or list the pairs."
            )
        ratio = teacher_layers // student_layers
        return tuple((layer, layer * ratio) for layer in range(0 if embeddings else 1, student_layers + 1))
    if isinstance(setting, str):
        raise ValueError(
            f'layer_map={setting!r} is not known: use "last", "uniform" or a list of [student layer, teacher layer] pairs.'
        )
    return _pairs(setting, student_layers, teacher_layers, first=0 if embeddings else 1)


def intervals(student_layers: int, teacher_layers: int, filter_interval: int, teacher_filter_interval: int) -> LayerMap:
    """TED's map: (k n_S, k n_T) for k = 1 .. K; K = L_S // n_S must equal L_T // n_T. Layers left at the top have no partner."""
    for name, interval, layers in (
        ("filter_interval", filter_interval, student_layers),
        ("teacher_filter_interval", teacher_filter_interval, teacher_layers),
    ):
        if not 1 <= interval <= layers:
            raise ValueError(f"{name}={interval}: the model has {layers} layers; give a number from 1 to {layers}.")
    counts = student_layers // filter_interval, teacher_layers // teacher_filter_interval
    if counts[0] != counts[1]:
        raise ValueError(
            f"filter_interval={filter_interval} makes {counts[0]} filters on {student_layers} student layers, and "
            f"teacher_filter_interval={teacher_filter_interval} makes {counts[1]} on {teacher_layers}. Choose intervals that make "
            "as many on both sides."
        )
    return tuple((k * filter_interval, k * teacher_filter_interval) for k in range(1, counts[0] + 1))


def _pairs(setting: Sequence[Sequence[int]], student_layers: int, teacher_layers: int, first: int) -> LayerMap:
    pairs = []
    for entry in setting:
        if isinstance(entry, str | int) or len(entry) != 2 or not all(type(layer) is int for layer in entry):
            raise TypeError(f"layer_map: {entry!r} is not a pair of layer numbers. Write [student layer, teacher layer].")
        pairs.append((entry[0], entry[1]))
    if not pairs:
        raise ValueError('layer_map is empty: nothing would be learned from the teacher\'s layers. Use "last", "uniform" or pairs.')
    for student, teacher in pairs:
        for side, layer, layers in (("student", student, student_layers), ("teacher", teacher, teacher_layers)):
            if not first <= layer <= layers:
                raise ValueError(
                    f"layer_map: pair [{student}, {teacher}] names {side} layer {layer}; the {side}'s are {first} to {layers}."
                )
    if repeated := sorted({pair for pair in pairs if pairs.count(pair) > 1}):
        raise ValueError(f"layer_map: {repeated} given more than once. A pair counts once; use the loss weights for more.")
    return tuple(pairs)
