"""A distillation job as frozen dataclasses: what `configs/*.toml` say, section by section, with their defaults."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from kvx.errors import BadInput
from kvx.section import Count, Positive, Range, Section, Share, Weight, Whole

Amount = Share | Whole
"""A float is a share of a stage's steps, an integer a number of steps."""

AxisSize = Count | Literal[-1]
"""Devices along an axis of the mesh; -1: all that the others leave."""


Remat = Literal["none", "dots", "full"]
"""What a layer's backward pass recomputes: nothing, so that all activations are kept; everything but the results of its
projections, attention's scores above all; or everything, so that only the layer's input is kept."""


@dataclass(frozen=True)
class TeacherSection(Section):
    """Whom the student imitates.

    Attributes:
        model: as `Job.model`; None: the source itself, before its conversion. Same vocabulary as the student.
        shapes: as `Job.shapes`, of the teacher.
        dtype: of its weights and of its pass.
    """

    model: str | None = None
    shapes: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class ConvertSection(Section):
    """How chosen layers' attention becomes latent attention.

    Attributes:
        recipe: of `kvx.train.convert`; "none" trains the model as it is.
        layers: "all", or the indices of those that are converted.
        options: of the recipe: rank, rotary, query_rank, delta, ...
        calibration_tokens: of the training text, for recipes that look at activations.
    """

    recipe: str = "x_ecomla"
    layers: Literal["all"] | tuple[Whole, ...] = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration_tokens: Count = 32768


@dataclass(frozen=True)
class PairsSection(Section):
    """Preferences for DPO: JSONL of prompt, chosen, rejected.

    Attributes:
        train: files, or folders of them.
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
    tokens_dtype: Literal["uint16", "uint32"] = "uint16"
    document_end: Whole | None = None
    pairs: PairsSection = PairsSection()


@dataclass(frozen=True)
class LossSection(Section):
    """Weights of the losses that are added (`kvx.train.losses`), each a mean per token.

    Attributes:
        ce: cross-entropy of the text.
        kl: KL(teacher || student) of the logits.
        reverse_kl: KL(student || teacher).
        js: Jensen-Shannon divergence.
        hidden: squared distance of hidden states after each layer.
        relation: MiniLM's relations of queries, keys and values in the last layer.
        temperature: of the three divergences.
        beta: of DPO.
        chunk: tokens whose logits exist at a time.
    """

    ce: Weight = 0.0
    kl: Weight = 1.0
    reverse_kl: Weight = 0.0
    js: Weight = 0.0
    hidden: Weight = 0.0
    relation: Weight = 0.0
    temperature: Positive = 1.0
    beta: Positive = 0.01
    chunk: Count = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any((self.ce, self.kl, self.reverse_kl, self.js, self.hidden, self.relation)):
            raise BadInput("ce, kl, reverse_kl, js, hidden and relation are all 0; allowed: one of them above 0")


@dataclass(frozen=True)
class StageSection(Section):
    """One stage of training, with an optimizer of its own.

    Attributes:
        kind: "distill": the losses of `loss` on text; "dpo": preferences, against the student as the stage begins.
        tokens: to train on, padding included; or
        steps: of the optimizer: one of the two.
        batch: sequences (dpo: pairs) of a step, over all devices and accumulated parts.
        accumulate: parts that a batch is cut into, one after the other.
        learning_rate: its peak.
        schedule: after the warmup: "cosine" to 0; "constant"; "wsd": constant, then 1 - sqrt over the last `decay`.
        warmup: steps of linear growth from 0 (an integer), or their share (a float).
        decay: as warmup, of "wsd" alone.
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: global norm of the gradient; None: as it is.
        loss: weights of the losses.
        train: "all"; "attention": what was converted; or a regular expression found in the parameters' paths.
        remat: which activations of a layer are recomputed in the backward pass, to save memory.
        compute_dtype: of the student's pass; its master weights are float32.
        ema: decay of a running mean of the weights, which is then what is judged and saved; None: none.
    """

    kind: Literal["distill", "dpo"] = "distill"
    tokens: Count | None = None
    steps: Count | None = None
    batch: Count = 8
    accumulate: Count = 1
    learning_rate: Positive = 8e-5
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup: Amount = 0.01
    decay: Amount = 0.1
    weight_decay: Weight = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    clip: Positive | None = 1.0
    loss: LossSection = LossSection()
    train: str = "all"
    remat: Remat = "full"
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    ema: Annotated[float, Range(0, 1, open_low=True, open_high=True)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tokens is None) == (self.steps is None):
            raise BadInput(f"tokens={self.tokens} and steps={self.steps}; allowed: one of the two")
        if self.kind == "dpo" and self.steps is None:
            raise BadInput(f"tokens={self.tokens} of a dpo stage; allowed: steps")
        if self.batch % self.accumulate:
            raise BadInput(f"accumulate={self.accumulate}; allowed: a divisor of batch={self.batch}")
        try:
            re.compile(self.train)
        except re.error as error:
            raise BadInput(f"train={self.train!r}, which is no regular expression: {error}") from None

    def total_steps(self, sequence: int) -> int:
        """Steps of the optimizer.

        Args:
            sequence: tokens of a row.
        """
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None, "one of the two is there"
        return max(1, self.tokens // (self.batch * sequence))


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
        policies: of the cache, as text: the trained model is judged under each, through the decode path.
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
