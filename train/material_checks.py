"""What a job's tokenizers and texts mean for each other and for its judging: checked once they are read."""

from collections.abc import Sequence
from typing import Any

from kvx.errors import BadInput
from kvx.models.tokenizer import Tokenizer
from kvx.train.data import Encoding
from kvx.train.job import Job


def check_pieces(job: Job, mine: Tokenizer, teachers: Tokenizer) -> None:
    """Refuse a teacher for whom the source's ids mean other text; special tokens may have other names."""
    ours, theirs = mine.pieces, teachers.pieces
    if ours != theirs:
        piece = min(piece for piece in ours.keys() | theirs.keys() if ours.get(piece) != theirs.get(piece))
        raise BadInput(
            f"teacher.model={job.teacher.model!r} has another tokenizer: {piece!r} is token {theirs.get(piece)}, and "
            f"{ours.get(piece)} for {job.model!r}; allowed: a teacher with the source's tokens"
        )


def check_row(job: Job, held_out: Sequence[Any], encoding: Encoding) -> None:
    """Refuse too little held-out text to judge a cache by: less than a row."""
    sequence, count = job.data.sequence, 0
    for index in range(len(held_out)):
        count += len(encoding(held_out[index]))
        if count >= sequence:
            return
    raise BadInput(f"data.held_out holds {count} tokens; allowed: at least a row of data.sequence={sequence}")


def check_room(job: Job, tokenizer: Tokenizer, samples: Sequence[Any], positions: int) -> None:
    """Refuse passkeys whose answers, as `kvx.train.judging` has them generated, go beyond the model's positions."""
    from kvx.eval.answering import batches
    from kvx.eval.prompts import Frame

    asked = batches(tokenizer, Frame(), samples, 1, "aware")
    need = max(len(each.contexts[0]) + len(each.questions[0][0]) - 1 + each.room for each in asked)
    if need > positions:
        raise BadInput(
            f"evaluate.passkey_length={job.evaluate.passkey_length} makes {need} tokens with the answer; allowed: at "
            f"most {positions}, the model's positions"
        )
