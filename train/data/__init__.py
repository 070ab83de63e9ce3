"""Text as batches: documents from files, packed rows of them, preferences; each iterator can stop and go on."""

from kvx.train.data.documents import Documents, open_documents
from kvx.train.data.encoding import Encoding
from kvx.train.data.pairs import open_pairs, pair_batches
from kvx.train.data.stream import Stream, held_out_batches, text_batches

__all__ = [
    "Documents",
    "Encoding",
    "Stream",
    "held_out_batches",
    "open_documents",
    "open_pairs",
    "pair_batches",
    "text_batches",
]
