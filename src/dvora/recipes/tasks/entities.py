"""The entities that a model sees in a text.

Dimensions: T tokens, C classes of tokens.
"""

from collections.abc import Sequence

from torch import Tensor

from ...tensors import Float
from ..data.entities import Offsets, tagged


def entities_in(
    text: str, offsets: Offsets, logits: Float[Tensor, "T C"], tags: Sequence[str]
) -> list[dict[str, str | int | float]]:
    """The entities that a model sees in a text, by `start`, `end`, `label`, `score` and `text`.

    Args:
        text: as it was read.
        offsets: of its tokens.
        logits: of each token.
        tags: names of the classes. The score is the mean probability of the entity's tokens.
    """
    scores, best = (part.tolist() for part in logits.double().softmax(-1).max(-1))
    tokens = [token for token, (start, end) in enumerate(offsets) if text[start:end].strip()]
    answers = list[dict[str, str | int | float]]()
    for first, behind, label in tagged([tags[best[token]] for token in tokens]):
        start, end = offsets[tokens[first]][0], offsets[tokens[behind - 1]][1]
        # Some tokenizers take the space before a word for a part of it.
        start = end - len(text[start:end].lstrip())
        # Without digits that single precision does not have.
        score = round(sum(scores[token] for token in tokens[first:behind]) / (behind - first), 7)
        answers.append({"start": start, "end": end, "label": label, "score": score, "text": text[start:end]})
    return answers
