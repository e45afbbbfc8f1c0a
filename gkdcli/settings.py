"""Every setting, declared once: name, default, unit, range and reason. `gkdcli.resolve` merges sources."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # becomes a folder's name

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=1000.0)]


def _setting(default: Any, description: str, unit: str = "", **constraints: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"unit": unit}, **constraints)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


FlowMethod = Literal["tvl1", "tvl1-torch", "dis", "farneback", "raft"]
TORCH_METHODS: tuple[FlowMethod, ...] = ("tvl1-torch", "raft")


class DataSettings(_Section):
    """What `gkd prepare` writes, and how the videos are divided."""

    source: Literal["videos", "listed", "drawn"] = _setting(
        "videos",
        "videos: folders or a list say the classes; listed: published split lists must be there;"
        " drawn: the demo's motions are drawn first",
    )
    storage: Literal["jpeg", "raw"] = _setting(
        "jpeg", "frames in the store: JPEG (13 times smaller) or raw uint8"
    )
    jpeg_quality: int = _setting(95, "quality of stored JPEG frames", "libjpeg scale", ge=50, le=100)
    short_side: int = _setting(
        256, "frames are scaled to this length of the shorter side; 0: not", "px", ge=0, le=2160
    )
    size: list[Annotated[int, Field(ge=16, le=2160)]] = _setting(
        [], "exact [width, height] (THUMOS14: 112x112); empty: `short_side` decides", "px", max_length=2
    )
    fps: float = _setting(0.0, "frames kept per second of video; 0 keeps all", "frames/s", ge=0.0, le=240.0)
    flow: FlowMethod = _setting(
        "tvl1",
        "optical flow between stored frames: the paper's TV-L1, the same in PyTorch on CPU or GPU, the much"
        " faster DIS or Farneback, or RAFT with weights of yours",
    )
    flow_bound: float = _setting(
        20.0, "flow is cut here and stored in 8 bit: -bound is 0, bound 255", "px/frame", gt=0.0, le=256.0
    )
    flow_batch: int = _setting(
        64, "what tvl1-torch and raft take at once; on a GPU more is faster", "pairs", ge=1, le=1024
    )
    flow_weights: str = _setting(
        "",
        "file of RAFT's weights, torchvision's raft_large or raft_small; needed by raft alone",
        max_length=4096,
    )
    workers: int = _setting(0, "processes of `gkd prepare`; 0: one per core", "processes", ge=0, le=256)
    gpu_share: float = _setting(
        0.0, "of a GPU, for a flow task of `--executor ray`: 0.25: four on each", "fraction", ge=0.0, le=1.0
    )
    timeout: float = _setting(
        600.0, "a video is rejected when no frame came for so long; 0 waits for ever", "s", ge=0.0, le=86400.0
    )
    test_fraction: float = _setting(
        0.2, "share of each class tested where a folder names no split", "fraction", gt=0.0, lt=1.0
    )
    holdout: float = _setting(
        0.1, "training videos held out to choose `best`; 0: none, `last` is used", "fraction", ge=0.0, lt=1.0
    )
    draw_train: int = _setting(60, "drawn training videos per class", "videos", ge=2, le=10000)
    draw_test: int = _setting(20, "drawn test videos per class", "videos", ge=1, le=10000)
    draw_seed: int = _setting(2020, "seed of the drawn videos", ge=0)

    def stored(self, modality: str) -> dict[str, Any]:
        """The settings that a store depends on; a page that differs in them is refused."""
        others = {"workers", "gpu_share", "timeout", "holdout", "flow_batch", "flow_weights"}
        others |= set() if modality == "flow" else {"flow", "flow_bound"}
        return self.model_dump(mode="json", exclude=others)

    @model_validator(mode="after")
    def _size_is_a_pair(self) -> DataSettings:
        if len(self.size) == 1:
            raise ValueError(
                "data.size takes two numbers, width and height, or none", "for example [112, 112]"
            )
        return self


class ClipSettings(_Section):
    """What of a video enters the network, and how it is varied in training (METHOD.md 4)."""

    length: int = _setting(64, "consecutive frames of a clip", "frames", ge=16, le=1024, multiple_of=8)
    crop: int = _setting(224, "side of the square the network sees", "px", ge=32, le=512)
    short_side: int = _setting(
        0, "stored frames are first rescaled to this short side (HMDB51: 240); 0: not", "px", ge=0, le=2160
    )
    scales: list[Annotated[float, Field(gt=0.1, le=1.0)]] = _setting(
        [1.0, 0.875, 0.75, 0.66],
        "multi-scale crop: sides as shares of the shorter side",
        "fraction",
        min_length=1,
    )
    flip: bool = _setting(True, "mirror half of the training clips; off where left and right are classes")
    mean: list[float] = _setting(
        [0.485, 0.456, 0.406],
        "subtracted from pixels in [0,1]; one value serves all channels",
        "fraction",
        min_length=1,
        max_length=3,
    )
    std: list[Annotated[float, Field(gt=0.0)]] = _setting(
        [0.229, 0.224, 0.225], "divides pixels after `mean`", "fraction", min_length=1, max_length=3
    )
    stride: int = _setting(
        30, "detection: from one training window of a video to the next", "frames", ge=1, le=1024
    )


VideoTrunk = Literal["r3d_18", "mc3_18", "r2plus1d_18", "s3d"]
Backbone = Literal["i3d", "top-i3d", "bottom-i3d", "i2d", VideoTrunk]


class ModelSettings(_Section):
    """The two networks (METHOD.md 1), or torchvision's video networks in their place."""

    teacher: Backbone = _setting("i3d", "backbone of the teacher")
    student: Backbone = _setting("top-i3d", "backbone of the student")
    attention: Literal["official", "lite"] = _setting(
        "official",
        "of the network in training, a teacher keeps its run's: the published one, or a light one that is not"
        " bound to the clip",
    )
    width: float = _setting(
        1.0,
        "of all channel counts; of torchvision's networks the tap's and head's",
        "factor",
        ge=0.0625,
        le=2.0,
    )
    dropout: float = _setting(0.5, "dropout before the classifier", "probability", ge=0.0, lt=1.0)
    bn_momentum: float = _setting(
        0.01, "of a batch in batch norm's statistics; 0.01 lags in short runs", "fraction", gt=0.0, le=1.0
    )


class OptimSettings(_Section):
    """Optimisers of both stages (METHOD.md 4)."""

    algorithm: Literal["sgd", "adam"] = _setting("sgd", "optimiser of backbone, attention and head")
    learning_rate: float = _setting(1e-3, "learning rate of backbone, attention and head", gt=0.0, le=10.0)
    momentum: float = _setting(0.9, "momentum of SGD", ge=0.0, lt=1.0)
    weight_decay: float = _setting(
        5e-4, "weight decay of backbone, attention and head; coupled, the plain kind", ge=0.0, le=1.0
    )
    schedule: Literal["constant", "cosine", "step"] = _setting(
        "constant", "learning rate over the run, both optimisers; step: falls at `step_epochs`"
    )
    warmup_epochs: float = _setting(0.0, "linear rise at the start", "epochs", ge=0.0, le=1000.0)
    batch_size: int = _setting(
        6, "clips per optimiser step and process, before accumulation", "clips", ge=1, le=4096
    )
    accumulation: int = _setting(
        1, "batches whose gradients are added up before a step", "batches", ge=1, le=4096
    )
    clip_norm: float = _setting(
        0.0, "gradients of a step, of each optimiser, are scaled down to this 2-norm; 0: not", ge=0.0
    )
    epochs: int = _setting(200, "passes over the training videos", "epochs", ge=1, le=100000)
    generator_lr: float = _setting(1e-4, "learning rate of the CVAE (Adam)", gt=0.0, le=10.0)
    generator_betas: tuple[Fraction, Fraction] = _setting((0.8, 0.999), "betas of the CVAE's Adam")
    step_epochs: list[Annotated[float, Field(gt=0.0)]] = _setting(
        [], "schedule step: the rates fall after so many epochs, each time", "epochs"
    )
    step_factor: float = _setting(0.1, "schedule step: what they are multiplied with", gt=0.0, lt=1.0)
    ema: float = _setting(
        0.0,
        "scored and exported is a mean of the weights that keeps this share of itself at each step; 0: none",
        ge=0.0,
        lt=1.0,
    )
    label_smoothing: float = _setting(
        0.0, "share of a clip's class, or of a matched prior's, spread over all", "fraction", ge=0.0, lt=1.0
    )

    @model_validator(mode="after")
    def _steps_are_named(self) -> OptimSettings:
        if self.schedule == "step" and not self.step_epochs:
            raise ValueError("optim.schedule is step, but optim.step_epochs is empty", "for example [30, 45]")
        return self


class DistillSettings(_Section):
    """Weights of the loss terms (METHOD.md 4)."""

    method: Literal["gkd", "none"] = _setting(
        "gkd", "generative distillation, or the plain student: backbone and classifier, task loss only"
    )
    beta: float = _setting(0.1, "weight of attention distillation", ge=0.0)
    generative_weight: float = _setting(
        0.01, "weight of generative distillation in the generator stage", ge=0.0
    )
    reconstruction_weight: float = _setting(
        0.5, "weight of the generated feature's error, once ramped up", ge=0.0
    )
    kl_weight: float = _setting(0.1, "weight of the KL term in the CVAE loss", ge=0.0)
    location_weight: float = _setting(
        10.0, "detection: weight of the coarse and the refined location", ge=0.0
    )
    class_weight: float = _setting(
        1.0, "detection: weight of the coarse and the refined class, and of the quality", ge=0.0
    )
    background_weight: float = _setting(35.0, "detection: weight of the background feature's loss", ge=0.0)
    contrast_weight: float = _setting(0.1, "detection: weight of the boundary contrast", ge=0.0)
    refine_iou: float = _setting(
        0.5,
        "detection: coarse segments that overlap their action so much are refined",
        "tIoU",
        ge=0.0,
        le=1.0,
    )
    ramp_epochs: int = _setting(
        20, "epochs until the reconstruction weight is reached; 0: all epochs of the run", "epochs", ge=0
    )


def _number_as_text(value: Any) -> Any:
    """`train.precision=32` needs no quotes."""
    return str(value) if type(value) is int else value


class TrainSettings(_Section):
    """How a run proceeds."""

    schedule: Literal["epoch", "step"] = _setting(
        "epoch", "two passes per epoch as published, or both stages on one student forward"
    )
    init: str = _setting(
        "scratch", "the student's first weights: scratch, teacher, or a file or run", min_length=1
    )
    seed: int = _setting(2020, "seed of weights, order, crops, noise and dropout", ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = _setting(
        "auto", "where networks run; auto: CUDA where there is one"
    )
    workers: int = _setting(
        0, "processes that load clips; 0: the training process itself", "processes", ge=0, le=256
    )
    threads: int = _setting(
        0, "of an operation; 0: PyTorch's choice; dear where cores are busy", "threads", ge=0, le=1024
    )
    precision: Annotated[Literal["32", "bf16", "fp16"], BeforeValidator(_number_as_text)] = _setting(
        "32",
        "of forward passes in training, bf16 and fp16 on GPUs only; losses, heads, evaluation are in float32",
    )
    compile: bool = _setting(False, "backbones go through torch.compile in training; needs a C++ compiler")
    channels_last: Literal["auto", "on", "off"] = _setting(
        "auto", "backbones with channels innermost in memory; auto: below width 0.5, where CPUs gain by it"
    )
    sync_batch_norm: bool = _setting(
        False,
        "several GPUs: batch norm goes by the clips of all processes; off: each process goes by its own",
    )
    checkpoint_minutes: float = _setting(
        10.0, "a checkpoint is also written this often within an epoch", "minutes", gt=0.0
    )
    tensorboard: bool = _setting(False, "TensorBoard events in the run folder; needs `gkdcli[tensorboard]`")
    teacher_cache: int = _setting(
        0,
        "distill: views of each clip that the teacher is shown, once and for all; 0: a new one in every step",
        "views", ge=0, le=9999,
    )  # fmt: skip
    checkpoint_steps: int = _setting(0, "likewise, after so many batches; 0: not", "steps", ge=0, le=10**9)
    keep_checkpoints: int = _setting(
        1, "the newest is `last`; those before it stay as step-N", "files", ge=1, le=10000
    )
    checkpoint_activations: bool = _setting(
        False, "backward computes the backbone's blocks again and keeps less: less memory, more time"
    )

    @model_validator(mode="after")
    def _one_way_to_keep_less(self) -> TrainSettings:
        if self.compile and self.checkpoint_activations:
            raise ValueError(
                "train.compile and train.checkpoint_activations exclude each other",
                "the compiler chooses by itself what backward computes again",
            )
        return self


class EvalSettings(_Section):
    """How scores are computed."""

    batch_size: int = _setting(
        8, "clips per forward pass; the scores do not depend on it", "clips", ge=1, le=4096
    )
    fusion_weights: tuple[Weight, Weight] = _setting(
        (1.0, 1.0), "of the rgb and the flow logits in `--fusion`", "factor"
    )
    stride: int = _setting(
        128, "detection: from one window of a test video to the next", "frames", ge=1, le=1024
    )
    score_threshold: float = _setting(
        0.01, "detection: candidates need a higher score", "score", ge=0.0, lt=1.0
    )
    nms_sigma: float = _setting(
        0.1, "detection: width of the Gaussian by which soft-NMS lowers the score of overlapping ones", gt=0.0
    )
    nms_floor: float = _setting(0.001, "detection: soft-NMS ends below this score", "score", ge=0.0, lt=1.0)
    top_k: int = _setting(
        5000, "detection: most detections of a class in a video", "detections", ge=1, le=100000
    )
    tiou: list[Annotated[float, Field(gt=0.0, le=1.0)]] = _setting(
        [], "detection: overlaps at which a detection counts as right; empty: 0.1 to 0.7", "tIoU"
    )


class ExportSettings(_Section):
    """What leaves the house."""

    opset: int = _setting(20, "ONNX operator set", ge=18, le=25)
    tolerance: float = _setting(
        1e-4, "largest accepted relative difference of exported and live logits", "fraction", gt=0.0, le=0.1
    )


class Settings(_Section):
    """A resolved page: what one command works with."""

    name: str = _setting("unnamed", "name of the preset; runs are filed under it", pattern=NAME)
    dataset: str = _setting("unnamed", "name of the data set; stores are filed under it", pattern=NAME)
    task: Literal["recognition", "detection"] = _setting("recognition", "what the networks are for")
    recipe: Literal["official", "corrected"] = _setting(
        "corrected", "the published code to the last quirk, or the method as its text means it (METHOD.md 8)"
    )
    data: DataSettings = DataSettings()
    clips: ClipSettings = ClipSettings()
    model: ModelSettings = ModelSettings()
    optim: OptimSettings = OptimSettings()
    distill: DistillSettings = DistillSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    export: ExportSettings = ExportSettings()

    @model_validator(mode="after")
    def _fusion_needs_a_weight(self) -> Settings:
        if not any(self.eval.fusion_weights):
            raise ValueError(
                "eval.fusion_weights are both 0, so nothing would be scored", "for example [1, 1.5]"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> Settings:
        if self.task == "detection" and self.clips.length % 128:
            raise ValueError(
                f"clips.length is {self.clips.length} frames; the detector needs a multiple of 128",
                f"use {max(round(self.clips.length / 128), 1) * 128}",
            )
        if self.task == "detection" and self.recipe == "official" and self.optim.batch_size != 1:
            raise ValueError(
                f"optim.batch_size is {self.optim.batch_size}; recipe official sums over the batch"
                " in detection and needs 1",
                "optim.accumulation makes larger steps",
            )
        for role, kind in (("teacher", self.model.teacher), ("student", self.model.student)):
            if self.task == "detection" and kind in get_args(VideoTrunk):
                raise ValueError(
                    f"model.{role} is {kind}, which has no tap Mixed_4f; the detector needs it",
                    "use i3d, top-i3d, bottom-i3d or i2d",
                )
        return self


# a stage, as overlays and run folders know it -> its command
STAGES = {
    "prepare": "prepare",
    "pretrain": "pretrain-attention",
    "distill": "distill",
    "evaluate": "evaluate",
    "export": "export",
    "import": "import",
}
Role = Literal["teacher", "student"]
CHANNELS = {"rgb": 3, "flow": 2}
MODALITIES = tuple(CHANNELS)
SECTIONS = tuple(
    name
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, _Section)
)
