"""Rotation concentrated in a few shared pairs: keys of one frequency are mixed over heads until few carry the most.

RoPE multiplies each pair of every head by the same complex number, so keys of one frequency may be mixed over heads by
any invertible complex map, undone on the query's side, without touching a logit. Principal axes of that mix put what
needs rotation into few components that all heads share; the others go on unrotated.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Complex, Float, Int

from kvx.errors import BadInput
from kvx.train.convert.moments import Moments
from kvx.train.convert.rotary_split import RotarySplit, Widths, check_even, needed
from kvx.train.convert.source import Source, as_channels, as_real_map
from kvx.train.convert.weighing import logit_effects


@dataclass(frozen=True)
class Components:
    """Keys of all heads and frequencies, z = synthesis y, as components y = analysis z, each of one frequency.

    Attributes:
        analysis, synthesis: inverse to each other; z is head by head, pair by pair.
        gain: what is lost if a component is not rotated, in the rule's own units.
        frequency: index of each component's frequency among those of a head.
    """

    analysis: Complex[np.ndarray, "K GP"]
    synthesis: Complex[np.ndarray, "GP K"]
    gain: Float[np.ndarray, "K"]
    frequency: Int[np.ndarray, "K"]

    def split(
        self, source: Source, rotated: Bool[np.ndarray, "K"], fade: Complex[np.ndarray, "H P"] | float = 1.0
    ) -> RotarySplit:
        """The split that goes on rotating some components.

        Args:
            fade: factor on each pair of the content part, in the place of its rotation.
        """
        owner = np.arange(source.heads) // source.group
        keys = self.analysis @ source.key_pairs.reshape(-1, source.key.shape[-1])
        spread = self.synthesis.reshape(source.kv_heads, -1, len(self.gain))[owner]
        fade = np.broadcast_to(fade, spread.shape[:2])
        lift = source.magnitude**2 * fade[..., None] * spread[:, :, ~rotated]
        return RotarySplit(
            rotary_query=np.einsum("hpk,hpx->hkx", spread[:, :, rotated].conj(), source.query_pairs),
            rotary_key=keys[None, rotated],
            frequencies=source.frequencies[None, self.frequency[rotated]],
            magnitude=source.magnitude,
            content_query=source.query,
            content_key=as_channels(keys[~rotated]),
            lift=np.stack([as_real_map(each) for each in lift]),
        )


def principal_components(
    source: Source,
    inputs: Float[np.ndarray, "X X"],
    weights: Float[np.ndarray, "G P"] | float = 1.0,
    *,
    fold: int = 1,
    phases: bool = False,
) -> Components:
    """Principal axes of the keys within each frequency, largest first.

    Args:
        inputs: second moments of the layer's inputs.
        weights: of the squared keys of each head and pair.
        fold: neighbouring frequencies that are taken for one, and mixed too.
        phases: mix by complex numbers, so that heads may also differ by a phase; otherwise by real ones.
    """
    heads, pairs = source.kv_heads, source.head_dim // 2
    keys = source.key_pairs
    roots = np.sqrt(np.broadcast_to(weights, (heads, pairs)))
    index = np.arange(heads * pairs).reshape(heads, pairs)
    analysis = np.zeros((heads * pairs, heads * pairs), complex)
    synthesis, gains = np.zeros_like(analysis), []
    for first in range(0, pairs, fold):
        these = index[:, first : first + fold].ravel()
        rows, root = keys.reshape(heads * pairs, -1)[these], roots.ravel()[these]
        moments = root[:, None] * (rows @ inputs @ rows.conj().T) * root
        values, axes = np.linalg.eigh(moments if phases else np.real(moments))
        values, axes = values[::-1], axes[:, ::-1]
        place = slice(first * heads, (first + fold) * heads)
        analysis[place, these] = axes.conj().T * root
        synthesis[these, place] = axes / root[:, None]
        gains.append(values)
    frequency = np.repeat(np.arange(0, pairs, fold), heads * fold)
    return Components(analysis, synthesis, np.concatenate(gains), frequency)


@dataclass(frozen=True)
class Concentrated:
    """RoRoPE and FreqFold: the first axes of every frequency go on rotating, as many of each (TransMLA, Meng et al.
    2025, section 4).

    With rotary = G D and fold = 1 everything is rotated, which is exact for any moments.

    Attributes:
        rotary: channels of the rotary key.
        fold: neighbouring frequencies M that share their axes; of M components that rotate, each takes one of the
            frequencies, evenly spaced.
    """

    rotary: int
    fold: int = 1
    reads_text = True

    def widths(self, kv_heads: int, head_dim: int) -> Widths:
        """Queries stay whole, and every group of frequencies gives as many components as another."""
        pairs = head_dim // 2
        rows = kv_heads * head_dim - check_even(self.rotary, kv_heads * head_dim)
        if self.fold < 1 or pairs % self.fold:
            raise BadInput(f"fold={self.fold} is out of range; allowed: divisors of {pairs}, the pairs of a head")
        each = self._each(pairs)
        if each * pairs != self.rotary // 2 * self.fold or (each and self.fold % each and each % self.fold):
            raise BadInput(
                f"rotary={self.rotary} with fold={self.fold} gives {self.rotary * self.fold / head_dim:g} "
                "components to each group of frequencies; allowed: a divisor or a multiple of fold"
            )
        return Widths(head_dim, 1, rows)

    def _each(self, pairs: int) -> int:
        """Components that rotate, of each group of frequencies."""
        return self.rotary // 2 * self.fold // pairs

    def __call__(self, source: Source, moments: Moments | None) -> RotarySplit:
        """Raises BadInput for widths that do not go up evenly."""
        moments = needed(moments, "concentrating rotation")
        self.widths(source.kv_heads, source.head_dim)
        pairs, heads = source.head_dim // 2, source.kv_heads
        each = self._each(pairs)
        components = principal_components(source, moments.inputs, fold=self.fold)
        rank = np.tile(np.arange(heads * self.fold), pairs // self.fold)
        inside = rank * self.fold // each if 0 < each <= self.fold else rank % self.fold
        spaced = Components(
            components.analysis,
            components.synthesis,
            components.gain,
            components.frequency + np.where(rank < each, inside, 0),
        )
        return spaced.split(source, rank < each)


@dataclass(frozen=True)
class Unsteady:
    """The components go on rotating whose phase varies most where heads look; the others turn by their mean phase.

    Seen from query head h, pair j of a key d tokens back is turned by exp(-i theta_j d). Over the head's attention the
    mean turn is a_hj; a position-free pair does best with that factor, and what it then misses of its logits is in
    proportion to 1 - |a_hj|^2. So keys are weighted by

        w_gj = sum over heads h of group g of (effect of a logit of h) E|q_hj|^2 (1 - |a_hj|^2)

    before their principal components are taken, by complex numbers, and the components of largest weighted energy stay
    rotary, whatever their frequencies: slow pairs, however large, need no rotation; what is small or unread neither.

    Attributes:
        rotary: channels of the rotary key.
        mean_phase: turn the other pairs by it; otherwise not at all, as the published splits do.
        attended: count each key by the attention that it gets; otherwise all alike.
    """

    rotary: int
    mean_phase: bool = True
    attended: bool = True
    reads_text = True

    def widths(self, kv_heads: int, head_dim: int) -> Widths:
        """Queries stay whole."""
        return Widths(head_dim, 1, kv_heads * head_dim - check_even(self.rotary, kv_heads * head_dim))

    def __call__(self, source: Source, moments: Moments | None) -> RotarySplit:
        """Raises BadInput for a width that the heads do not have."""
        moments = needed(moments, "finding unsteady pairs")
        self.widths(source.kv_heads, source.head_dim)
        turns = mean_turns(source, moments)
        missed = 1 - np.abs(turns) ** 2
        rows = source.query_pairs
        queries = np.real(np.sum((rows.conj() @ moments.inputs) * rows, axis=-1))
        strength = logit_effects(source, moments)[:, None] * queries * missed
        weights = np.sum(strength.reshape(source.kv_heads, source.group, -1), axis=1)
        weights = np.maximum(weights, LEAST_WEIGHT * np.max(weights))
        keys = moments.attended if self.attended else moments.inputs
        components = principal_components(source, keys, weights, phases=True)
        rotated = np.zeros(len(components.gain), bool)
        rotated[np.argsort(-components.gain, kind="stable")[: self.rotary // 2]] = True
        return components.split(source, rotated, turns if self.mean_phase else 1.0)


LEAST_WEIGHT = 1e-6
"""Of a pair, as a share of the largest: the map to components has to have an inverse."""


def mean_turns(source: Source, moments: Moments) -> Complex[np.ndarray, "H P"]:
    """Mean of exp(-i theta_j d) over each head's attention to the token d places back."""
    back = np.arange(moments.distances.shape[1])
    return moments.distances @ np.exp(-1j * np.outer(back, source.frequencies))
