"""Every setting of a training run: its name, type, default and help text.

Names are those of `transformers.TrainingArguments`, `peft.LoraConfig` and the `run_image_classification`
scripts. The defaults are the recipe of the PEFT guide "Image classification using LoRA". Nothing here
imports torch, so that a mistake in the settings costs a second and not a minute.
"""

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

RECIPES = resources.files("lora_dist") / "recipes"


class Group(BaseModel):
    """A group of settings; the first line of its docstring is the heading in `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_null(cls, value: Any) -> Any:
        """No path, name or label can have a NUL, which only YAML can express."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a NUL character in a text")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _yaml_words(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML 1.1 reads a bare `no` as False, and `yes` as True, which must not pass for the number 1."""
        is_bool = cls.model_fields[str(info.field_name)].annotation is bool
        return ("no", "yes")[value] if isinstance(value, bool) and not is_bool else value


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_split_commas)]
Interval = Annotated[int, Field(gt=0)] | Literal["epoch", "no"]
Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ModelSettings(Group):
    """Model"""

    model_name_or_path: str = "google/vit-base-patch16-224-in21k"
    """Base model: a Hub name or a local directory."""
    model_revision: str | None = None
    """Branch, tag or commit of the base model on the Hub."""
    adapter_name_or_path: str | None = None
    """An adapter to go on from, with its base and its shape of LoRA, or to evaluate with --do_eval_only: a directory,
    or a name on the Hub (org/name or org/name@revision)."""
    tuning: Literal["lora", "head", "full"] = "lora"
    """What trains: LoRA and the head, the head alone (linear probe), or every weight."""
    init_from_config: bool = False
    """Start from random weights: only the configuration and processor of the base are read (with --tuning full)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    torch_compile: bool = False
    """Compile the model with torch.compile: a slow first step, then faster ones on a GPU, and slower ones on a CPU."""
    trust_remote_code: bool = False
    """Run model code that comes with the base model. Only for sources you trust."""


class LoraSettings(Group):
    """LoRA (with --tuning lora)"""

    lora_r: Count = 16
    """Rank of the update matrices."""
    lora_alpha: Count = 16
    """Scale of the update: alpha / r."""
    lora_dropout: Fraction = 0.1
    """Dropout on the input of the update."""
    lora_target_modules: Annotated[Names, Field(min_length=1)] = ["auto"]
    """Modules to adapt, separated by commas. auto: the query and value projections, or what stands for them."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Decompose weights into magnitude and direction (DoRA)."""
    init_lora_weights: Literal["default", "gaussian", "pissa"] = "default"
    """Start of the update matrices; pissa takes the principal singular vectors of the base."""
    loraplus_lr_ratio: Positive = 1.0
    """Learning rate of the B matrices relative to the others (LoRA+ suggests 16)."""


class DataSettings(Group):
    """Data"""

    train_dir: str | None = None
    """A folder with one sub-folder of images a class."""
    validation_dir: str | None = None
    """The same for validation; without it a part of the training images is held out."""
    dataset_name: str | None = None
    """A Hub data set, a local directory of parquet, Arrow or tar files, or one written by save_to_disk."""
    dataset_config_name: str | None = None
    """Configuration of the data set."""
    streaming: bool = False
    """Read the training split of a data set as it goes, and keep none of it: parquet or WebDataset tar files."""
    streaming_lanes: Count | None = None
    """Shards that are read at the same time. Default: the largest power of two up to 64 and the number of shards."""
    shuffle_buffer_size: Annotated[int, Field(ge=2)] = 4096
    """Encoded images held in memory, over all processes, to be shuffled (with --streaming)."""
    train_split: str = "train"
    """Split to train on; slices such as train[:5000] work."""
    validation_split: str | None = None
    """Split to validate on; without it a part of the training split is held out."""
    train_val_split: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share held out for validation, seeded and stratified by class, when no validation data is given."""
    exclude: str | None = None
    """Leave out the files listed in this text file, one path a line; lora_dist.audit writes one."""
    image_column_name: str | None = None
    """Column of the images; by default the one of type Image."""
    label_column_name: str | None = None
    """Column of the labels; by default the one of type ClassLabel, or 'label'."""
    max_train_samples: Count | None = None
    """Use a seeded random selection of this many training samples."""
    max_eval_samples: Count | None = None
    """Use a seeded random selection of this many validation samples."""
    allow_missing_classes: bool = False
    """Go on when a class has images in one of training and validation only."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """An image that cannot be read stops the run (fail), or is left out and counted (skip); the others stay where they
    are, and an update is what they make of it."""
    cache_dir: str | None = None
    """Keep all training images in this directory, decoded and resized to 8/7 of what the model takes, and read them
    from there; what is there of another run with the same data is used."""
    dataloader_num_workers: Annotated[int, Field(ge=0)] | None = None
    """Worker processes that decode images, for each training process. Default: by cores and device."""
    dataloader_prefetch_factor: Count = 4
    """Batches each worker prepares ahead."""


class AugmentationSettings(Group):
    """Augmentation"""

    augmentation: Literal["none", "basic", "randaugment", "trivialaugment"] = "basic"
    """none: as in evaluation. basic: random resized crop and flip; the others add a policy after these."""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of the image that a random crop keeps."""
    horizontal_flip: Probability = 0.5
    """Probability of a left-right flip; 0 for text, digits and other things with a handedness."""
    augment_on_device: bool = False
    """Resize and flip the crops on the device that trains, a batch at a time, rather than in the worker processes; for
    GPUs: on a CPU it takes longer."""
    random_erasing: Probability = 0.0
    """Probability of erasing a random rectangle."""
    mixup_alpha: NonNegative = 0.0
    """Mix pairs of images, with a share from Beta(alpha, alpha)."""
    cutmix_alpha: NonNegative = 0.0
    """Paste a rectangle from another image; with mixup as well, one of both is drawn for each pair."""
    label_smoothing_factor: Fraction = 0.0
    """Share of the target spread evenly over all classes."""


class OptimizationSettings(Group):
    """Optimization"""

    num_train_epochs: Positive = 5.0
    """Passes over the training data."""
    max_train_steps: Count | None = None
    """Number of updates; overrides --num_train_epochs."""
    per_device_train_batch_size: Count = 128
    """Samples in one forward pass of one process."""
    gradient_accumulation_steps: Count = 4
    """Forward passes in one update."""
    auto_batch_size: bool = False
    """Halve --per_device_train_batch_size until it fits into memory, on all processes, and accumulate as many more."""
    per_device_eval_batch_size: Count = 128
    """Samples in one evaluation pass of one process."""
    learning_rate: Positive = 5e-3
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates over which the learning rate rises from 0."""
    warmup_ratio: Fraction = 0.0
    """The same as a share of all updates."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay on matrices; biases and norms are exempt."""
    adam_beta1: Fraction = 0.9
    """AdamW's decay of the mean gradient."""
    adam_beta2: Fraction = 0.999
    """AdamW's decay of the mean squared gradient."""
    adam_epsilon: Positive = 1e-8
    """AdamW's term for stability."""
    max_grad_norm: NonNegative = 1.0
    """Clip the gradient to this norm; 0 leaves it as it is."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto: fp16 or bf16 where the launch file says so, else fp16 on a GPU and no on a CPU."""
    metric_for_best_model: Literal["accuracy", "top5_accuracy", "macro_f1", "loss"] = "accuracy"
    """Validation metric that chooses the best checkpoint."""
    max_nonfinite_updates: Count = 3
    """Stop when the loss or gradient of this many updates in a row is not finite; the ones before are left out."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations without a better metric."""


class RunSettings(Group):
    """Run"""

    output_dir: str = "runs/lora"
    """Where everything of this run goes."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of initialisation, order, augmentation and dropout."""
    eval_steps: Interval = "epoch"
    """Evaluate every N updates, every epoch, or only at the end (no)."""
    checkpointing_steps: Interval = "epoch"
    """Save a checkpoint every N updates, every epoch, or only with each evaluation and at the end (no)."""
    save_total_limit: Count = 2
    """Checkpoints to keep, besides the best."""
    resume_from_checkpoint: str | None = None
    """auto: the newest complete checkpoint of --output_dir, or a start from scratch; or the path of a checkpoint in
    --output_dir, or in another directory if --output_dir is empty."""
    ddp_timeout: Count = 1800
    """Seconds after which a process that waits for others gives up; it says so after ten."""
    stall_timeout: NonNegative = 600
    """Seconds without a micro-batch, an evaluation batch or a save after which the run writes the stacks of all threads
    and ends with code 124, so that a scheduler can start it again; 0 waits for ever."""
    logging_steps: Count = 10
    """Log every N updates."""
    dry_run: bool = False
    """Say what would run, with its time and memory from two updates and what speaks against it, and write nothing."""
    do_eval_only: bool = False
    """Evaluate --adapter_name_or_path on the validation data and train nothing."""


class HubSettings(Group):
    """Hugging Face Hub"""

    push_to_hub: bool = False
    """Push the adapter, or model, with its card after each best evaluation and at the end. Needs a token, which is no
    setting: `hf auth login` or HF_TOKEN."""
    hub_model_id: str | None = None
    """Repository to push to; by default the name of --output_dir, in your own namespace."""
    hub_private_repo: bool = False
    """Make the repository private, if it has to be made; otherwise the namespace's default decides."""


class Settings(Group):
    """All settings of a training run, by group; on the command line and in YAML the names are flat."""

    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    optimization: OptimizationSettings = OptimizationSettings()
    run: RunSettings = RunSettings()
    hub: HubSettings = HubSettings()


class Problem(NamedTuple):
    """A contradiction between settings: the flat names it is about, and a message that shows the way out."""

    names: tuple[str, ...]
    message: str


def recipe_names() -> list[str]:
    """Names of the packaged recipes that `--config` takes."""
    return sorted(Path(entry.name).stem for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))
