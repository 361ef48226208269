"""The table in which TensorBoard compares the settings and the final metrics of runs."""

from collections.abc import Mapping
from typing import Any

from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

FIRST = ("augmentation", "learning_rate", "lora_r", "num_train_epochs", "tuning")
"""Settings of the first columns. TensorBoard shows five settings at first, and would take them by the alphabet."""


def add_hyperparameters(writer: SummaryWriter, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Like `SummaryWriter.add_hparams`, but writes into the writer's own directory, and shows `FIRST` first."""
    experiment, start, end = hparams(dict(settings), dict(metrics))
    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        # TensorBoard lists settings that differ between runs first, but a single run cannot know them.
        info.differs = info.name in FIRST
    plugin.content = data.SerializeToString()
    with SummaryWriter(writer.log_dir) as own:
        for part in (experiment, start, end):
            own.file_writer.add_summary(part)
        for name, value in metrics.items():
            own.add_scalar(name, value)
