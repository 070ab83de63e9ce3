"""Candidates made ready for a model by their texts, once each, and what their caches would take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import kvx
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.eval.readying import ready
from kvx.eval.search.sizing import Prompts, cache_sizes
from kvx.prose import Prose


@dataclass
class Candidates:
    """Policies by their texts.

    Attributes:
        decoder, tokenizer: the model.
        prose: calibration texts come from its first half.
        calibration: how many of them, and their length in tokens.
        seed: of what calibration draws.
    """

    decoder: Decoder
    tokenizer: Any
    prose: Prose
    calibration: tuple[int, int]
    seed: int
    _made: dict[str, kvx.Policy] = field(default_factory=dict)

    def policy(self, text: str) -> kvx.Policy:
        """The policy, told what it has to know of the model; its text stays the one that was asked for.

        Raises:
            BadInput: text that is no policy, or what calibration refuses.
        """
        if text not in self._made:
            asked = kvx.parse_policy(text)
            asked.check([block.spec for block in self.decoder.blocks])
            (self._made[text],) = ready([asked], self.decoder, self.tokenizer, self.prose, self.calibration, self.seed)
        return self._made[text]

    def sizes(self, texts: Sequence[str], prompts: Prompts) -> Mapping[str, int | BadInput]:
        """Bytes of one prompt's cache under every policy, or why the model cannot have it."""
        found: dict[str, int | BadInput] = {}
        for text in texts:
            try:
                self.policy(text)
            except BadInput as error:
                found[text] = error
        possible = [text for text in texts if text not in found]
        sizes = cache_sizes(self.decoder, prompts, [self.policy(text) for text in possible])
        return found | dict(zip(possible, sizes, strict=True))
