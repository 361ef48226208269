"""Settings of a training run: names, types, defaults and help texts. What cannot be combined: `train_contradictions`.

The names are those of `transformers.TrainingArguments`, `peft.LoraConfig` and the `run_image_classification` scripts.
The defaults are the recipe of the PEFT guide "Image classification using LoRA".
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from lora_dist.settings.fields import (
    SINGLE_LABEL,
    Blocks,
    Color,
    Count,
    Fold,
    Fraction,
    Group,
    ImageSize,
    Interval,
    MaxPixels,
    Metric,
    Names,
    NonNegative,
    NonNegativeInt,
    Pattern,
    PixelRange,
    Positive,
    Probability,
    ProblemType,
    Resume,
    Trackers,
    several,
)

FULL_LEARNING_RATE = 5e-5
"""Default of --learning_rate with --tuning full and pretrained weights."""


class ModelSettings(Group):
    """Model"""

    model_name_or_path: str = "google/vit-base-patch16-224-in21k"
    """Base model: a Hub name or a local directory."""
    model_revision: str | None = None
    """Branch, tag or commit of the base model on the Hub."""
    image_processor_name: str | None = None
    """Image processor: a Hub name or a local directory. Default: that of the base model."""
    adapter_name_or_path: str | None = None
    """Adapter to continue training, with its base model and LoRA settings, or to evaluate with --do_eval_only: a
    directory or a Hub name (org/name or org/name@revision)."""
    tuning: Literal["lora", "head", "full"] = "lora"
    """What to train: LoRA and the head, only the head (linear probe), or all weights."""
    pooling: Literal["pooler", "class_token", "mean"] | None = None
    """Train a linear head on these features of the backbone: the output of its own pooler, its class token, or the mean
    of its patches. Default: the classifier that transformers has for the model; without one, the pooler, or else the
    mean. The model records it."""
    image_size: ImageSize | None = Field(default=None, json_schema_extra=several("N"))
    """Height and width of the images, or one number for both. Position embeddings of the base model are interpolated.
    Default: the size of its image processor. The model records it."""
    drop_path: Fraction | None = None
    """Highest rate of stochastic depth in training, for architectures that have it: the share of samples for which a
    branch of a block is left out. Default: that of the base model's configuration."""
    init_from_config: bool = False
    """Start from random weights: reads only the configuration and processor of the base model. Needs --tuning full."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: keep the frozen base in bf16 and compute in bf16 without autocast, which is faster on a GPU and halves
    the memory of the base. LoRA and the head train in fp32, and the result is for the base in fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: uses less memory and takes about a third more time."""
    torch_compile: bool = False
    """Compile the repeated blocks of the model with torch.compile. The first step is slow; later steps are faster on a
    GPU only."""
    trust_remote_code: bool = False
    """Run model code that comes with the base model. Use only with sources that you trust."""

    @property
    def input_size(self) -> tuple[int, int] | None:
        """`image_size` as height and width."""
        return None if self.image_size is None else (self.image_size[0], self.image_size[1])


class LoraSettings(Group):
    """LoRA (with --tuning lora)"""

    lora_r: Count = 16
    """Rank of the update matrices."""
    lora_alpha: Count = 16
    """Numerator of the scale of the update, alpha / r."""
    lora_dropout: Fraction = 0.1
    """Dropout on the input of the update."""
    lora_target_modules: Annotated[Names, Field(min_length=1)] = Field(default=["auto"])
    """Modules to adapt, separated by commas. auto: the query and value projections or their equivalents."""
    layers_to_transform: Blocks | None = None
    """Blocks to adapt: their numbers, from 0 in the order of computation, or last:N for the last N. Default: all."""
    lora_rank_pattern: Pattern = Field(default={})
    """Other ranks than --lora_r for some modules: NAME=N,NAME=N. A name is the end of a module's name or, as in PEFT, a
    regular expression for it; the first that fits counts."""
    lora_alpha_pattern: Pattern = Field(default={})
    """Other values than --lora_alpha for some modules, as --lora_rank_pattern."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train."""
    train_norms: bool = False
    """Train the norm layers as well, in full. The adapter contains them."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (rank-stabilized LoRA)."""
    use_dora: bool = False
    """Decompose weights into magnitude and direction (DoRA)."""
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa"] = "default"
    """Initialization of the update matrices. orthogonal: both random and orthogonal to each other, for even ranks.
    pissa: principal singular vectors of the base weights."""
    loraplus_lr_ratio: Positive = 1.0
    """Learning rate of the B matrices relative to the other weights (LoRA+ suggests 16)."""


class DataSettings(Group):
    """Data"""

    train_dir: str | None = None
    """Folder of training images with one sub-folder per class."""
    problem_type: ProblemType = "single_label_classification"
    """single_label_classification: each image has one class. multi_label_classification: each has any number of labels,
    including none. The model records it."""
    labels_file: str | None = None
    """Text file with the labels of the images in --train_dir: path,label[,split[,group]], with commas, semicolons or
    tabs. Columns of a header are found by their names, or set with --image_column_name and so on."""
    split_column_name: str | None = None
    """Column of --labels_file with train, validation or test. Default: the one called split."""
    group_column_name: str | None = None
    """Column of groups in --labels_file, such as patients. Images of a group stay on one side of the split. Default:
    the one called group."""
    validation_dir: str | None = None
    """Folder of validation images with one sub-folder per class. Default: hold out training images."""
    test_dir: str | None = None
    """Folder of test images with one sub-folder per class. The best model is evaluated on them once, at the end."""
    dataset_name: str | None = None
    """Data set: a Hub name, a local directory of parquet, Arrow or tar files, or a save_to_disk directory."""
    dataset_config_name: str | None = None
    """Configuration of the data set."""
    streaming: bool = False
    """Stream the training split (parquet or WebDataset tar files) without storing it."""
    streaming_lanes: Count | None = None
    """Number of shards to read at the same time. Default: the largest power of two that is at most min(64, shards)."""
    shuffle_buffer_size: Annotated[int, Field(ge=2)] = 4096
    """Number of encoded images, over all processes, in the shuffle buffer (with --streaming)."""
    train_split: str = "train"
    """Training split. Slices such as train[:5000] work."""
    validation_split: str | None = None
    """Validation split. Default: hold out training images."""
    test_split: str | None = None
    """Test split. The best model is evaluated on it once, at the end."""
    train_val_split: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Without validation data: fraction of the training images to hold out, seeded and stratified by class."""
    fold: Fold | None = None
    """K/N: cut the training images into N folds, by --seed, stratified by class and with groups kept whole, and
    validate on fold K. lora_dist.folds gathers the runs of all folds."""
    exclude: str | None = None
    """Text file with the paths of images and folders to leave out, one per line. lora_dist.audit writes one."""
    image_column_name: str | None = None
    """Image column. Default: the column of type Image, or of paths in --labels_file."""
    label_column_name: str | None = None
    """Label column. Default: a ClassLabel called label, or else the only ClassLabel or column called label, labels or
    cls. With several labels: a column of lists; in --labels_file a column of label;label, or columns of 0 and 1, such
    as cat,dog,bird."""
    slice_columns: Names = Field(default=[])
    """Columns of --labels_file or of the data set, separated by commas, such as site,camera. The results and the model
    card have the validation and test metrics of the images of each value."""
    max_train_samples: Count | None = None
    """Train on a seeded random selection of this many samples, stratified by class."""
    max_eval_samples: Count | None = None
    """Validate on a seeded random selection of this many samples, stratified by class."""
    balanced_sampling: bool = False
    """Show images of every class equally often: repeats those of small classes, and takes turns in large ones. An epoch
    has as many images as before."""
    allow_missing_classes: bool = False
    """Allow classes with images in only one of training and validation."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What to do with an unreadable image. fail: stop the run. skip: leave the image out and count it; the loss is
    averaged over the readable samples."""
    transparent_background: Color = "white"
    """Color behind transparent images: white, black or R,G,B. ignore: drop the alpha channel. The model records it."""
    pixel_range: PixelRange | None = Field(default=None, json_schema_extra=several("X"))
    """LOW HIGH: in images of more than 8 bits, LOW becomes 0 and HIGH becomes 255. Default: the range of 64 training
    images, or validation images with --streaming. The model records it."""
    max_image_pixels: MaxPixels | None = None
    """Largest image to decode, in pixels. Default: Pillow's limit, 178,956,970."""
    cache_dir: str | None = None
    """Directory for a cache of all training images, decoded and resized to 8/7 of the input size. An existing cache of
    the same data is reused."""
    dataloader_num_workers: NonNegativeInt | None = None
    """Worker processes per training process that decode images. Default: by cores and device."""
    dataloader_prefetch_factor: Count = 4
    """Batches that each worker prepares in advance."""


class AugmentationSettings(Group):
    """Augmentation"""

    augmentation: Literal["none", "basic", "randaugment", "trivialaugment"] = "basic"
    """none: as in evaluation. basic: random resized crop and flip. The others: basic, then the named policy."""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest fraction of the image area in a random crop."""
    horizontal_flip: Probability = 0.5
    """Probability of a left-right flip. Use 0 for text, digits and other images that a flip changes in meaning."""
    augment_on_device: bool = False
    """Resize and flip the crops in batches on the training device instead of in the workers. Slower on a CPU."""
    random_erasing: Probability = 0.0
    """Probability of erasing a random rectangle."""
    mixup_alpha: NonNegative = 0.0
    """Alpha of mixup: mixes pairs of images with a ratio from Beta(alpha, alpha). 0 disables it."""
    cutmix_alpha: NonNegative = 0.0
    """Alpha of CutMix: pastes a rectangle from another image. With mixup, each pair randomly uses one of the two."""
    label_smoothing_factor: Fraction = 0.0
    """Fraction of the target that is spread evenly over all classes. With several labels: over yes and no."""


class OptimizationSettings(Group):
    """Optimization"""

    num_train_epochs: Positive = 5.0
    """Passes over the training data."""
    max_train_steps: Count | None = None
    """Number of updates. Overrides --num_train_epochs."""
    per_device_train_batch_size: Count = 128
    """Samples per process in one forward pass."""
    gradient_accumulation_steps: Count = 4
    """Forward passes per update."""
    auto_batch_size: bool = False
    """Halve --per_device_train_batch_size until it fits into the memory of all processes, and raise
    --gradient_accumulation_steps to match."""
    per_device_eval_batch_size: Count = 128
    """Samples per process in one forward pass of evaluation. Default on a CPU: 8 of 224 x 224, and up to 32 smaller
    ones."""
    learning_rate: Positive = 5e-3
    """Peak learning rate. The default with --tuning full and pretrained weights is 5e-5."""
    head_learning_rate: Positive | None = None
    """Peak learning rate of the head. Default: --learning_rate."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a block relative to that of the next one, as in timm: the head has its own rate, the last block
    this fraction of --learning_rate, and the embeddings the lowest rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate schedule after the warmup."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of a linear or cosine schedule. --head_learning_rate, --layer_decay and
    --loraplus_lr_ratio keep their proportions to it."""
    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises from 0."""
    warmup_ratio: Fraction = 0.0
    """Warmup as a fraction of all updates."""
    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"
    """Optimizer. sgd keeps one number per weight instead of the two of AdamW, and needs a higher --learning_rate."""
    momentum: Fraction = 0.9
    """Momentum of SGD, without Nesterov."""
    weight_decay: NonNegative = 0.0
    """Weight decay of matrices: decoupled in AdamW, added to the gradient in SGD. Biases and norms have none."""
    adam_beta1: Fraction = 0.9
    """Decay rate of AdamW's mean of gradients."""
    adam_beta2: Fraction = 0.999
    """Decay rate of AdamW's mean of squared gradients."""
    adam_epsilon: Positive = 1e-8
    """AdamW's term for numerical stability."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average (EMA) of the trained weights. The EMA is evaluated and saved instead of
    the weights. The decay is lower in the first updates."""
    max_grad_norm: NonNegative = 1.0
    """Clip gradients to this norm. 0 disables clipping."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto: the precision of the launch file if it is fp16 or bf16; otherwise bf16 on a GPU that has it, fp16 on other
    GPUs, and no on a CPU."""
    tf32: bool = False
    """Compute fp32 matrix products of a CUDA device in TF32: faster, with the precision of fp16. For --mixed_precision
    no."""
    class_weights: str = "none"
    """Weights of the classes in the loss. balanced: inverse to the number of training images. Or a YAML or JSON file
    with a weight for each class name. The loss of an update is the weighted mean over its samples. With several labels:
    the weight of images with the label relative to those without it; balanced: negatives / positives."""
    focal_gamma: NonNegative = 0.0
    """Gamma of focal loss, which lowers the weight of samples that are classified well. 0: cross-entropy."""
    metric_for_best_model: Metric = "accuracy"
    """Validation metric that selects the best checkpoint; the loss decides between equal ones. With several labels:
    mAP (default), micro_f1, macro_f1 or loss."""
    max_nonfinite_updates: Count = 3
    """Stop after this many consecutive updates with a non-finite loss or gradient. Fewer such updates are skipped."""
    early_stopping_patience: Count | None = None
    """Stop after this many consecutive evaluations without improvement."""


class RunSettings(Group):
    """Run"""

    output_dir: str = "runs/lora"
    """Directory for all files of the run."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of initialization, data order, augmentation and dropout."""
    deterministic: bool = False
    """Let torch use deterministic algorithms only, so that a repeated run on the same GPUs gives the same bits. Slower,
    and an operation that has no such algorithm ends the run. A CPU does not need this."""
    eval_steps: Interval = "epoch"
    """Evaluate every N updates, every epoch, or only at the end (no)."""
    checkpointing_steps: Interval = "epoch"
    """Save a checkpoint every N updates, every epoch, or only with each evaluation and at the end (no)."""
    save_total_limit: Count = 2
    """Number of checkpoints to keep besides the best one."""
    resume_from_checkpoint: Resume = None
    """auto: resume from the newest complete checkpoint in --output_dir, or start from scratch without one. Or the path
    of a checkpoint in --output_dir, or in another directory if --output_dir is empty."""
    ddp_timeout: Count = 1800
    """Seconds before a process stops waiting for the others. It logs a message after 10 seconds."""
    stall_timeout: NonNegative = 600
    """Seconds without a micro-batch, an evaluation batch or a save before the run writes the stacks of all threads and
    exits with code 124, for a scheduler to restart it. 0 disables this check."""
    logging_steps: Count = 10
    """Log every N updates."""
    report_to: Trackers = Field(default=[])
    """Trackers besides TensorBoard, separated by commas: wandb, mlflow, trackio, comet_ml, aim, clearml, dvclive or
    swanlab. Each one must be installed."""
    probe: bool = False
    """Before training, measure a linear probe and nearest neighbours on the features of the base, which LoRA has to
    beat."""
    dry_run: bool = False
    """Report what would run, its time and memory, measured on two updates, and all problems. Writes no files."""
    do_eval_only: bool = False
    """Evaluate --adapter_name_or_path on the validation data without training."""


class HubSettings(Group):
    """Hugging Face Hub"""

    push_to_hub: bool = False
    """Push the adapter or model with its model card after each best evaluation and at the end. Needs a token from
    `hf auth login` or HF_TOKEN; no flag takes one."""
    hub_model_id: str | None = None
    """Repository to push to. Default: the name of --output_dir in your namespace."""
    hub_private_repo: bool = False
    """Create the repository as private. Default: as the namespace is configured."""


class Settings(Group):
    """All settings of a training run, by group. Flags and YAML use the flat names."""

    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    optimization: OptimizationSettings = OptimizationSettings()
    run: RunSettings = RunSettings()
    hub: HubSettings = HubSettings()

    def with_default_learning_rate(self) -> "Settings":
        """Returns the settings with the default learning rate of their tuning, unless a rate was given.

        The rate that suits LoRA and a new head ruins pretrained weights that are trained in full.
        """
        is_pretrained_in_full = self.model.tuning == "full" and not self.model.init_from_config
        return self._with_default("learning_rate", FULL_LEARNING_RATE) if is_pretrained_in_full else self

    def with_default_eval_batch_size(self, size: int) -> "Settings":
        """Returns the settings with this batch size of evaluations, unless one was given."""
        return self._with_default("per_device_eval_batch_size", size)

    def with_default_metric(self) -> "Settings":
        """Returns the settings with the default metric of their problem type, unless a metric was given."""
        return self if self.data.problem_type == SINGLE_LABEL else self._with_default("metric_for_best_model", "mAP")

    def _with_default(self, name: str, value: Any) -> "Settings":
        """Returns the settings with a value of `OptimizationSettings`, unless one was given."""
        if name in self.optimization.model_fields_set:
            return self
        return self.model_copy(update={"optimization": self.optimization.model_copy(update={name: value})})
