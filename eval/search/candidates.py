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
            BadInput: text that is no policy, or what the model or calibration refuses.
        """
        if refused := self._make([text]).get(text):
            raise refused
        return self._made[text]

    def sizes(self, texts: Sequence[str], prompts: Prompts) -> Mapping[str, int | BadInput]:
        """Bytes of one prompt's cache under every policy, or why the model cannot have it."""
        refused = self._make(texts)
        possible = [text for text in texts if text not in refused]
        sizes = cache_sizes(self.decoder, prompts, [self._made[text] for text in possible])
        return refused | dict(zip(possible, sizes, strict=True))

    def _make(self, texts: Sequence[str]) -> dict[str, BadInput]:
        """Make ready what is not yet, together, so that one calibration may serve all; returns what cannot be."""
        asked: dict[str, kvx.Policy] = {}
        refused: dict[str, BadInput] = {}
        for text in texts:
            if text not in self._made:
                try:
                    asked[text] = kvx.parse_policy(text)
                    asked[text].check([block.spec for block in self.decoder.blocks])
                except BadInput as error:
                    refused[text] = error
        chosen = {text: policy for text, policy in asked.items() if text not in refused}
        try:
            self._made |= dict(zip(chosen, self._ready(list(chosen.values())), strict=True))
        except BadInput as error:
            if len(chosen) == 1:
                return refused | dict.fromkeys(chosen, error)
            for text in chosen:
                refused |= self._make([text])
        return refused

    def _ready(self, policies: list[kvx.Policy]) -> list[kvx.Policy]:
        return ready(policies, self.decoder, self.tokenizer, self.prose, self.calibration, self.seed)
