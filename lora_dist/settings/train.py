"""Settings of a training run: names, types, defaults, help texts and contradictions.

The names are those of `transformers.TrainingArguments`, `peft.LoraConfig` and the `run_image_classification` scripts.
The defaults are the recipe of the PEFT guide "Image classification using LoRA".
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lora_dist.settings.fields import (
    SEVERAL,
    Blocks,
    Color,
    Count,
    Fold,
    Fraction,
    Group,
    ImageSize,
    Interval,
    MaxPixels,
    Names,
    NonNegative,
    NonNegativeInt,
    Pattern,
    PixelRange,
    Positive,
    Probability,
    Problem,
    Trackers,
    impossible_output,
    missing_paths,
)
from lora_dist.settings.problem_type import problem_type_contradictions

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
    image_size: ImageSize | None = Field(default=None, json_schema_extra=SEVERAL)
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
    problem_type: Literal["single_label_classification", "multi_label_classification"] = "single_label_classification"
    """single_label_classification: each image has one class. multi_label_classification: each has any number of labels,
    also none. The model records it."""
    labels_file: str | None = None
    """Text file with the labels of the images in --train_dir: path,label[,split[,group]], with commas, semicolons or
    tabs. Columns of a header are found by their names, or set with --image_column_name and so on."""
    split_column_name: str | None = None
    """Column of --labels_file with train, validation or test. Default: the one called split."""
    group_column_name: str | None = None
    """Column of --labels_file whose equal values stay on one side of the split, such as a patient. Default: the one
    called group."""
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
    """Fraction of the training images to hold out, seeded and stratified by class, without validation data."""
    fold: Fold | None = None
    """K/N: cut the training images into N folds, by --seed, stratified by class and with groups kept whole, and
    validate on fold K. lora_dist.folds gathers the runs of all folds."""
    exclude: str | None = None
    """Text file with the paths of images and folders to leave out, one per line. lora_dist.audit writes one."""
    image_column_name: str | None = None
    """Image column. Default: the column of type Image, or of paths in --labels_file."""
    label_column_name: str | None = None
    """Label column. Default: a ClassLabel called label, or else the only ClassLabel or column called label, labels or
    cls. Of several labels: a column of lists, or of label;label in --labels_file, or its columns of 0 and 1, such as
    cat,dog,bird."""
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
    pixel_range: PixelRange | None = Field(default=None, json_schema_extra=SEVERAL)
    """LOW HIGH: values that become 0 and 255 in images of more than 8 bits. Default: the range of 64 training images,
    or validation images with --streaming. The model records it."""
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
    """Fraction of the target that is spread evenly over all classes. Of several labels: over yes and no."""


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
    """Samples per process in one forward pass of evaluation."""
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
    """Optimizer. sgd has one moment instead of two, and needs a higher --learning_rate."""
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
    """Decay of an exponential moving average of the trained weights, which is then evaluated and saved instead of them.
    It is lower in the first updates."""
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
    with a weight for each class name. Each update is the weighted mean over all of its samples. Of several labels: the
    weight of the images that have the label against those without it; balanced: negatives / positives."""
    focal_gamma: NonNegative = 0.0
    """Gamma of focal loss, which lowers the weight of samples that are classified well. 0: cross-entropy."""
    metric_for_best_model: Literal[
        "accuracy", "balanced_accuracy", "top5_accuracy", "mAP", "micro_f1", "macro_f1", "loss"
    ] = "accuracy"
    """Validation metric that selects the best checkpoint; the loss decides between equal ones. Of several labels: mAP,
    micro_f1, macro_f1 or loss. The default is then mAP."""
    max_nonfinite_updates: Count = 3
    """Stop after this many consecutive updates with a non-finite loss or gradient. Fewer are skipped."""
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
    resume_from_checkpoint: str | None = None
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
    """Trackers beside TensorBoard, separated by commas: wandb, mlflow, trackio, comet_ml, aim, clearml, dvclive or
    swanlab, each of which must be installed."""
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
        if not is_pretrained_in_full or "learning_rate" in self.optimization.model_fields_set:
            return self
        optimization = self.optimization.model_copy(update={"learning_rate": FULL_LEARNING_RATE})
        return self.model_copy(update={"optimization": optimization})

    def with_default_metric(self) -> "Settings":
        """Returns the settings with the default metric of their problem type, unless a metric was given."""
        is_given = "metric_for_best_model" in self.optimization.model_fields_set
        if is_given or self.data.problem_type == "single_label_classification":
            return self
        return self.model_copy(
            update={"optimization": self.optimization.model_copy(update={"metric_for_best_model": "mAP"})}
        )


def contradictions(settings: Settings) -> Iterator[Problem]:
    """Yields every combination of settings that cannot work."""
    model, data, optimization = settings.model, settings.data, settings.optimization
    run, hub = settings.run, settings.hub
    yield from problem_type_contradictions(settings)
    if data.train_dir and data.dataset_name:
        yield Problem(("train_dir", "dataset_name"), "two data sources: use only one of them")
    if not (data.train_dir or data.dataset_name or (run.do_eval_only and data.validation_dir)):
        yield Problem(("train_dir", "dataset_name"), "no data: set a folder of images or the name of a data set")
    if data.validation_dir and data.dataset_name:
        yield Problem(("validation_dir", "dataset_name"), "use --validation_split to validate with a data set")
    if data.validation_split and data.train_dir:
        yield Problem(("validation_split", "train_dir"), "use --validation_dir to validate with a folder")
    if data.labels_file and not data.train_dir:
        yield Problem(("labels_file", "train_dir"), "the labels are of images in a folder: set --train_dir")
    for name in ("split_column_name", "group_column_name"):
        if getattr(data, name) and not data.labels_file:
            yield Problem((name, "labels_file"), f"--{name} is a column of --labels_file: set it as well")
    if data.test_dir and data.dataset_name:
        yield Problem(("test_dir", "dataset_name"), "use --test_split to test with a data set")
    if data.test_split and not data.dataset_name:
        yield Problem(("test_split", "train_dir"), "use --test_dir to test with a folder")
    for name in ("test_dir", "test_split"):
        if run.do_eval_only and getattr(data, name):
            text = "to evaluate on test data alone, name it with --validation_dir or --validation_split"
            yield Problem(("do_eval_only", name), text)
    if data.streaming:
        if data.train_dir:
            yield Problem(("streaming", "train_dir"), "folders cannot be streamed: remove one of them")
        elif not data.validation_split:
            yield Problem(("streaming", "validation_split"), "a stream cannot be held out: set --validation_split")
        if data.cache_dir:
            yield Problem(("streaming", "cache_dir"), "streams are not cached: remove one of them")
        if data.max_train_samples:
            yield Problem(("streaming", "max_train_samples"), "streams are not sampled: use --max_train_steps instead")
        for name, is_set in {
            "class_weights": optimization.class_weights != "none",
            "balanced_sampling": data.balanced_sampling,
        }.items():
            if is_set:
                yield Problem(("streaming", name), "a stream's labels are not known in advance: remove one of them")
        if "[" in data.train_split or "+" in data.train_split:
            yield Problem(("streaming", "train_split"), "streams do not support slices or sums: set one whole split")
    elif data.streaming_lanes:
        yield Problem(("streaming_lanes", "streaming"), "lanes need a stream: add --streaming")
    if data.slice_columns and (data.train_dir or data.validation_dir):
        if not data.labels_file:
            text = "a folder of classes has no columns: name them in --labels_file"
            yield Problem(("slice_columns", "labels_file"), text)
        elif data.validation_dir:
            text = "the validation images are not in --labels_file: add them there, with a column of splits"
            yield Problem(("slice_columns", "validation_dir"), text)
    if data.fold:
        for name in ("validation_dir", "validation_split", "streaming", "max_eval_samples"):
            if getattr(data, name):
                yield Problem(("fold", name), "a fold of the training images is the validation data: remove one")
        if data.train_val_split != DataSettings().train_val_split:
            yield Problem(("fold", "train_val_split"), "the number of folds decides how many are held out: remove one")
    if data.balanced_sampling and optimization.class_weights == "balanced":
        yield Problem(("balanced_sampling", "class_weights"), "both balance the classes: use only one of them")
    if data.exclude and data.dataset_name:
        yield Problem(("exclude", "dataset_name"), "only images in folders can be excluded: remove one of them")
    yield from missing_paths(data.train_dir, data.validation_dir, data.exclude, data.test_dir, data.labels_file)
    yield from impossible_output(run.output_dir)
    if settings.augmentation.augment_on_device and settings.augmentation.augmentation != "basic":
        text = "the device supports only crops and flips: use --augmentation basic or remove --augment_on_device"
        yield Problem(("augment_on_device", "augmentation"), text)
    if optimization.warmup_steps and optimization.warmup_ratio:
        yield Problem(("warmup_steps", "warmup_ratio"), "two warmup lengths: use only one of them")
    if optimization.min_lr and optimization.lr_scheduler_type == "constant":
        yield Problem(("min_lr", "lr_scheduler_type"), "a constant learning rate has no minimum: remove --min_lr")
    if optimization.layer_decay != 1 and model.tuning == "head":
        yield Problem(
            ("layer_decay", "tuning"), "only the head trains, whose rate does not decay: remove --layer_decay"
        )
    if settings.lora.train_norms and model.tuning != "lora":
        yield Problem(
            ("train_norms", "tuning"), "norms are trained beside LoRA or with all weights: remove one of them"
        )
    for name in ("momentum",) if optimization.optim == "adamw_torch" else ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if getattr(optimization, name) != OptimizationSettings.model_fields[name].default:
            yield Problem((name, "optim"), f"{optimization.optim} does not use --{name}: remove one of them")
    learning_rate = settings.with_default_learning_rate().optimization.learning_rate
    if optimization.min_lr > learning_rate:
        yield Problem(("min_lr", "learning_rate"), f"the minimum exceeds the learning rate of {learning_rate:g}")
    odd = [rank for rank in (settings.lora.lora_r, *settings.lora.lora_rank_pattern.values()) if rank % 2]
    if settings.lora.init_lora_weights == "orthogonal" and odd:
        text = f"an orthogonal start needs even ranks, and {odd[0]} is odd"
        yield Problem(("init_lora_weights", "lora_r", "lora_rank_pattern"), text)
    if model.init_from_config and model.tuning != "full":
        yield Problem(("init_from_config", "tuning"), "random weights need full training: add --tuning full")
    if run.do_eval_only and not model.adapter_name_or_path:
        yield Problem(("do_eval_only", "adapter_name_or_path"), "nothing to evaluate: set --adapter_name_or_path")
    if model.adapter_name_or_path and model.image_processor_name:
        text = "the adapter has its own image processor: remove --image_processor_name"
        yield Problem(("adapter_name_or_path", "image_processor_name"), text)
    if model.adapter_name_or_path and not run.do_eval_only:
        if model.tuning != "lora":
            yield Problem(("adapter_name_or_path", "tuning"), "adapters continue as LoRA: remove one of them")
        if settings.lora.init_lora_weights != "default":
            text = "the adapter sets the initial weights: remove one of them"
            yield Problem(("adapter_name_or_path", "init_lora_weights"), text)
    if model.base_dtype != "float32":
        if model.tuning == "full":
            yield Problem(("base_dtype", "tuning"), "nothing is frozen: remove one of them, see --mixed_precision")
        if settings.lora.lora_bias != "none":
            yield Problem(("base_dtype", "lora_bias"), "biases train in the dtype of their layers: remove one of them")
        if optimization.mixed_precision in ("bf16", "fp16"):
            text = "the model computes in the dtype of its base, without autocast: remove --mixed_precision"
            yield Problem(("base_dtype", "mixed_precision"), text)
        if run.do_eval_only:
            yield Problem(("do_eval_only", "base_dtype"), "the base is evaluated in fp32: remove --base_dtype")
    for name in ("transparent_background", "pixel_range", "pooling", "image_size"):
        if run.do_eval_only and name in data.model_fields_set | model.model_fields_set:
            yield Problem(("do_eval_only", name), f"the model records how it was trained: remove --{name}")
    if run.do_eval_only and run.dry_run:
        yield Problem(("dry_run", "do_eval_only"), "dry runs are for training: remove one of them")
    if run.do_eval_only and run.resume_from_checkpoint:
        yield Problem(("do_eval_only", "resume_from_checkpoint"), "evaluations cannot be resumed: remove one of them")
    if optimization.early_stopping_patience and run.eval_steps == "no":
        yield Problem(("early_stopping_patience", "eval_steps"), "early stopping needs evaluations: set --eval_steps")
    if run.report_to and run.do_eval_only:
        yield Problem(("report_to", "do_eval_only"), "evaluations are printed, not tracked: remove one of them")
    if run.probe and (data.streaming or run.do_eval_only):
        other = "streaming" if data.streaming else "do_eval_only"
        yield Problem(("probe", other), "the features of all training images are needed: remove one of them")
    if hub.push_to_hub and run.do_eval_only:
        yield Problem(("push_to_hub", "do_eval_only"), "evaluations have nothing to push: remove one of them")
    if (hub.hub_model_id or hub.hub_private_repo) and not hub.push_to_hub:
        yield Problem(("hub_model_id", "hub_private_repo", "push_to_hub"), "nothing is pushed: add --push_to_hub")
