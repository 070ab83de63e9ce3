"""A distillation job as frozen dataclasses: what `configs/*.toml` say, section by section, with their defaults."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from kvx.errors import BadInput
from kvx.section import Count, Range, Section, Whole
from kvx.train.stage import StageSection

AxisSize = Count | Literal[-1]
"""Devices along an axis of the mesh; -1: all that the others leave."""

RawIds = Literal["uint16", "uint32"]
"""What the ids of a .bin file are, which says nothing of itself."""


MOST_CALIBRATION = 1 << 20
"""Tokens that a conversion reads at most."""


@dataclass(frozen=True)
class TeacherSection(Section):
    """Whom the student imitates.

    Attributes:
        model: as `Job.model`; None: the source itself, before its conversion. Same vocabulary as the student.
        shapes: as `Job.shapes`, of the teacher; with `model` alone.
        dtype: of its weights and of its pass.
    """

    model: str | None = None
    shapes: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shapes is not None and self.model is None:
            raise BadInput(f"shapes={self.shapes!r} without model, so the source teaches; allowed: both, or neither")


@dataclass(frozen=True)
class ConvertSection(Section):
    """How chosen layers' attention becomes latent attention.

    Attributes:
        recipe: of `kvx.train.convert`; "none" trains the model as it is.
        layers: "all", or the indices of those that are converted.
        options: of the recipe: rank, rotary, query_rank, delta, ...
        calibration_tokens: of the training text, read anew where it ends, for recipes that look at activations. All
            their residual streams are in memory together, in float32: `MOST_CALIBRATION` take 4 GiB for each 1024
            channels of the model's width, and no paper reads as many.
    """

    recipe: str = "x_ecomla"
    layers: Literal["all"] | tuple[Whole, ...] = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration_tokens: Annotated[int, Range(1, MOST_CALIBRATION)] = 32768

    def __post_init__(self) -> None:
        super().__post_init__()
        if "layers" in self.options:
            raise BadInput(f"options.layers={self.options['layers']!r}; allowed: none, but layers beside options")


@dataclass(frozen=True)
class PairsSection(Section):
    """Preferences for DPO: prompt, chosen and rejected, each a text or a list of messages.

    Attributes:
        train: JSONL (.gz too), Parquet or Arrow files, or folders of them.
        sequence: tokens of a prompt with its answer; a longer answer is cut.
        prompt: tokens of a prompt; of a longer one the last.
    """

    train: tuple[str, ...] = ()
    sequence: Annotated[int, Range(2)] = 1024
    prompt: Count = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt >= self.sequence:
            raise BadInput(f"prompt={self.prompt}; allowed: an integer below sequence={self.sequence}")


@dataclass(frozen=True)
class DataSection(Section):
    """Text to learn from and text to judge by.

    Attributes:
        train: text files, JSONL (.gz too), Parquet, Arrow, pre-tokenised .npy or .bin, or folders of them.
        held_out: the same, of which nothing may be among `train`.
        field: of a JSONL object, a Parquet or an Arrow row: a text, or messages, which the chat template writes out.
        sequence: tokens of a row; documents are packed into rows and see only themselves.
        shuffle: order of the documents by the job's seed, anew every epoch; False: as they come.
        tokens_dtype: of a .bin file.
        document_end: the token that ends a document in .npy and .bin files; None: the tokenizer's end of text.
        pairs: preferences, for stages of kind "dpo".
    """

    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    field: str = "text"
    sequence: Annotated[int, Range(2)] = 2048
    shuffle: bool = True
    tokens_dtype: RawIds = "uint16"
    document_end: Whole | None = None
    pairs: PairsSection = PairsSection()


@dataclass(frozen=True)
class MeshSection(Section):
    """Devices along each axis; one of them may be -1: all that the others leave.

    Attributes:
        data: copies of the model, each with rows of its own.
        fsdp: rows of their own too, and a share of every parameter.
        tensor: a share of every layer's heads and channels.
        sequence: a share of every row's tokens.
    """

    data: AxisSize = -1
    fsdp: AxisSize = 1
    tensor: AxisSize = 1
    sequence: AxisSize = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if [self.data, self.fsdp, self.tensor, self.sequence].count(-1) > 1:
            raise BadInput(f"{self._text()}; allowed: -1 for one axis at most")

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices along each axis.

        Raises:
            BadInput: the axes do not make up that many devices.
        """
        given = {name: getattr(self, name) for name in ("data", "fsdp", "tensor", "sequence")}
        fixed = 1
        for size in given.values():
            fixed *= 1 if size == -1 else size
        if devices % fixed or (-1 not in given.values() and fixed != devices):
            raise BadInput(f"mesh {self._text()}; allowed: axes whose product is that of {devices} devices")
        return {name: devices // fixed if size == -1 else size for name, size in given.items()}

    def _text(self) -> str:
        return f"data={self.data} fsdp={self.fsdp} tensor={self.tensor} sequence={self.sequence}"


@dataclass(frozen=True)
class CheckpointSection(Section):
    """What is kept of a run, to resume it and to go back.

    Attributes:
        every: steps between checkpoints.
        keep: newest ones that stay.
        best: the one with the lowest held-out loss stays too.
    """

    every: Count = 500
    keep: Count = 3
    best: bool = True


@dataclass(frozen=True)
class EvaluateSection(Section):
    """How the student is judged along the way.

    Attributes:
        every: steps between evaluations.
        tokens: of held-out text.
        passkey: prompts of the passkey workload, asked along the way and, policy by policy, at the end; 0: none.
        passkey_length: tokens of each.
        policies: of the cache, as text: the trained model is judged under each, through the decode path, where there
            is held-out text.
    """

    every: Count = 500
    tokens: Count = 65536
    passkey: Whole = 0
    passkey_length: Annotated[int, Range(64)] = 1024
    policies: tuple[str, ...] = ("full",)


@dataclass(frozen=True)
class Job(Section):
    """A conversion and its training, start to end.

    Attributes:
        name: of the run.
        model: the pretrained source: a zoo name, a Hugging Face directory, a .gguf file, or a hub id.
        stages: of training, in order.
        output: folder of the run: metrics, checkpoints, and `model/` at the end; None: runs/NAME.
        saved_dtype: of the weights in `model/`.
        shapes: a config.json of the source, for checks and ahead-of-time compilation without its weights.
        seed: of everything random.
    """

    name: str
    model: str
    stages: tuple[StageSection, ...]
    output: str | None = None
    saved_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    shapes: str | None = None
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    teacher: TeacherSection = TeacherSection()
    convert: ConvertSection = ConvertSection()
    data: DataSection = DataSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise BadInput(f"name={self.name!r}; allowed: letters, digits, '.', '_' and '-', as in a file's name")
        if not self.stages:
            raise BadInput("stages is empty; allowed: one stage or more")
        if self.output is None:
            object.__setattr__(self, "output", f"runs/{self.name}")
